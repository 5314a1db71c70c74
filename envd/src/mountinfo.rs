//! `/proc/self/mountinfo`: which filesystems are on disks, and in which order they have to be frozen.
//!
//! Only mounts that envd's own namespace shows: a disk that a container in the guest mounted for itself is not seen. It is
//! a loop over a file, because the sandbox has one disk, so its writes end at a filesystem that is seen.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

/// The device number of a filesystem, as `st_dev` has it for most kinds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) major: u64,
    pub(crate) minor: u64,
}

/// One filesystem that is on a disk and may be written to, with all places at which it is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DiskFilesystem {
    pub(crate) device: Device,
    pub(crate) kind: String,
    /// What was mounted, as whoever mounted it called it.
    pub(crate) source: PathBuf,
    /// In the order in which they were mounted. Some may show a part of it only, be it a single file.
    pub(crate) points: Vec<PathBuf>,
}

impl DiskFilesystem {
    pub(crate) fn is_root(&self) -> bool {
        self.points.iter().any(|point| point == Path::new("/"))
    }
}

/// Reads the text of mountinfo: the writable filesystems on disks, each once, in the order in which they may be frozen.
/// Lines that are none are passed over.
///
/// The order is the newest first and the root last. Freezing writes, and a disk may be a file of another filesystem (a
/// loop), which must then still take the write; that other one was mounted earlier.
pub(crate) fn disk_filesystems(text: &[u8]) -> Vec<DiskFilesystem> {
    let mut found: Vec<DiskFilesystem> = Vec::new();
    for line in text.split(|byte| *byte == b'\n').filter_map(Line::parse) {
        if !line.is_writable_disk() {
            continue;
        }
        let index = found.iter().position(|known| known.device == line.device);
        // A filesystem is as old as its first mount.
        let index = index.unwrap_or_else(|| {
            found.push(DiskFilesystem {
                device: line.device,
                kind: line.kind.clone(),
                source: line.source.clone(),
                points: Vec::new(),
            });
            found.len() - 1
        });
        found[index].points.push(line.point);
    }
    found.reverse();
    // Stable: the rest keeps its order.
    found.sort_by_key(DiskFilesystem::is_root);
    found
}

/// One mount. The fields of a line, as proc_pid_mountinfo(5) has them:
///
/// ```text
/// 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
/// id parent device shows point options optional... - kind source options-of-the-filesystem
/// ```
struct Line {
    device: Device,
    point: PathBuf,
    kind: String,
    source: PathBuf,
    read_only: bool,
}

impl Line {
    fn parse(line: &[u8]) -> Option<Self> {
        let mut fields = line.split(|byte| *byte == b' ');
        let device = std::str::from_utf8(fields.nth(2)?).ok()?;
        let (major, minor) = device.split_once(':')?;
        let (_shows, point, _options) = (fields.next()?, fields.next()?, fields.next()?);
        fields.find(|field| *field == b"-")?;
        let (kind, source, options) = (fields.next()?, fields.next()?, fields.next()?);
        Some(Self {
            device: Device {
                major: major.parse().ok()?,
                minor: minor.parse().ok()?,
            },
            point: path(point),
            kind: String::from_utf8_lossy(kind).into_owned(),
            source: path(source),
            // Of the filesystem, not of the mount: another mount of it may be writable.
            read_only: options.split(|byte| *byte == b',').any(|option| option == b"ro"),
        })
    }

    fn is_writable_disk(&self) -> bool {
        // Filesystems without a disk have numbers with major 0; of those with one, btrfs alone has such a number too.
        let is_on_disk = self.device.major != 0 || self.source.starts_with("/dev");
        // FUSE cannot be frozen, and to open its root may wait for its server for ever.
        !self.read_only && is_on_disk && !self.kind.starts_with("fuse")
    }
}

/// The kernel writes space, tab, newline, backslash and some others as a backslash and three octal digits.
fn path(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let escaped = (*first == b'\\').then(|| tail.get(..3)).flatten().and_then(octal);
        bytes.push(escaped.unwrap_or(*first));
        rest = if escaped.is_some() { &tail[3..] } else { tail };
    }
    OsString::from_vec(bytes).into()
}

fn octal(digits: &[u8]) -> Option<u8> {
    u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(text: &str) -> Vec<String> {
        let points = |filesystem: DiskFilesystem| {
            let texts = filesystem.points.iter().map(|point| point.display().to_string());
            texts.collect::<Vec<_>>().join(" ")
        };
        disk_filesystems(text.as_bytes()).into_iter().map(points).collect()
    }

    #[test]
    fn filesystems_without_a_disk_and_read_only_ones_are_left_out() {
        let text = "\
            21 1 254:0 / / rw,noatime - ext4 /dev/vda rw,noinit_itable\n\
            22 21 0:5 / /dev rw,nosuid - devtmpfs devtmpfs rw,size=1k\n\
            23 21 0:20 / /proc rw - proc proc rw\n\
            24 21 0:22 / /run rw - tmpfs tmpfs rw,mode=755\n\
            25 21 0:40 / /var/lib/docker/overlay2/x/merged rw - overlay overlay rw,lowerdir=/a,upperdir=/b,workdir=/c\n\
            26 21 7:1 / /snap rw,nodev - squashfs /dev/loop1 ro,errors=continue\n\
            27 21 0:41 / /nfs rw - nfs4 host:/export rw\n\
            28 21 8:1 / /ntfs rw - fuseblk /dev/sda1 rw,user_id=0\n";
        assert_eq!(points(text), ["/"]);
    }

    #[test]
    fn a_read_only_mount_of_a_writable_filesystem_counts() {
        assert_eq!(
            points("30 21 254:16 / /data ro,noatime - xfs /dev/vdb rw,attr2\n"),
            ["/data"]
        );
    }

    #[test]
    fn btrfs_counts_although_its_number_is_that_of_no_disk() {
        assert_eq!(points("30 21 0:50 /@ /data rw - btrfs /dev/vdb rw,ssd\n"), ["/data"]);
    }

    #[test]
    fn a_filesystem_that_is_mounted_several_times_comes_once() {
        let text = "\
            30 21 254:16 /a /one rw - ext4 /dev/vdb rw\n\
            31 21 254:16 / /two rw - ext4 /dev/vdb rw\n\
            32 21 254:16 /b /three rw - ext4 /dev/vdb rw\n";
        assert_eq!(points(text), ["/one /two /three"]);
    }

    #[test]
    fn what_lies_on_another_is_frozen_before_it_and_the_root_last() {
        // The loops' files are on the filesystem above them; a later bind mount makes /data no younger.
        let text = "\
            30 21 254:16 / /data rw - ext4 /dev/vdb rw\n\
            21 1 254:0 / / rw - ext4 /dev/vda rw\n\
            31 30 7:0 / /data/loop rw - ext4 /dev/loop0 rw\n\
            32 31 7:1 / /data/loop/loop rw - ext4 /dev/loop1 rw\n\
            33 21 254:16 / /bind rw - ext4 /dev/vdb rw\n\
            34 21 254:0 /home /root-again rw - ext4 /dev/vda rw\n";
        assert_eq!(
            points(text),
            ["/data/loop/loop", "/data/loop", "/data /bind", "/ /root-again"]
        );
    }

    #[test]
    fn octal_escapes_are_undone_and_what_is_none_stays() {
        let text = "30 21 254:16 / /a\\040b\\011c\\012d\\134040 rw shared:1 master:2 - ext4 /dev/v\\040db rw\n";
        let found = disk_filesystems(text.as_bytes());
        assert_eq!(found[0].points, [Path::new("/a b\tc\nd\\040")]);
        assert_eq!(found[0].source, Path::new("/dev/v db"));
        assert_eq!(path(b"\\9\\04"), Path::new("\\9\\04"));
        assert_eq!(path(b"\\777"), Path::new("\\777"));
        assert_eq!(path(b"\xff\\"), Path::new(&OsString::from_vec(b"\xff\\".to_vec())));
    }

    #[test]
    fn lines_that_are_none_are_passed_over() {
        let text =
            "\n30\n30 21 x:y / / rw - ext4 /dev/vda rw\n30 21 254:0 / / rw ext4 /dev/vda rw\n30 21 254:0 / / rw -\n";
        assert_eq!(points(text), Vec::<String>::new());
    }

    #[test]
    fn the_mounts_of_this_machine_can_be_read() {
        let text = std::fs::read("/proc/self/mountinfo").unwrap();
        let lines = text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        assert!(lines.clone().count() > 0 && lines.clone().all(|line| Line::parse(line).is_some()));
    }
}
