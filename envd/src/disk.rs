//! Proof that the root disk answers: one block of it, read past all caches of the guest.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::sys::stat::{major, minor};
use tokio::sync::Mutex;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use crate::filesystems::LIMIT;
use crate::mountinfo::{DiskFilesystem, disk_filesystems};

/// Bytes of a block: what any disk can read directly, and what a page is.
const BLOCK: usize = 4096;

/// Bytes of a sector in sysfs, whatever the disk's own is.
const SECTOR: u64 = 512;

/// Memory that a disk can write to directly.
#[repr(C, align(4096))]
struct Block([u8; BLOCK]);

/// Why the root disk is not known to answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiskError {
    #[error("the root is on no disk")]
    NoDisk,
    #[error("{} cannot be read", .0.display())]
    Sysfs(PathBuf, #[source] io::Error),
    #[error("there is no random number for the offset")]
    Random(#[source] io::Error),
    #[error("{} cannot be opened", .0.display())]
    Open(PathBuf, #[source] io::Error),
    #[error("{} cannot be read at byte {at}", .device.display())]
    Read {
        device: PathBuf,
        at: u64,
        source: io::Error,
    },
    #[error("the disk took too long")]
    Late,
}

/// The disk that `/` is on.
#[derive(Default)]
pub(crate) struct RootDisk {
    /// Held by the thread that reads, whatever becomes of its caller: calls that are given up and repeated, before a disk
    /// that does not answer, would take all threads.
    reading: Arc<Mutex<()>>,
}

impl RootDisk {
    /// Reads one block somewhere on the disk.
    ///
    /// # Errors
    /// [`DiskError`]; [`DiskError::Late`] after [`LIMIT`].
    pub(crate) async fn read(&self) -> Result<(), DiskError> {
        let read = async {
            let guard = Arc::clone(&self.reading).lock_owned().await;
            let work = spawn_blocking(move || {
                let result = read_somewhere();
                drop(guard);
                result
            });
            work.await.expect("reading a block does not panic")
        };
        timeout(LIMIT, read).await.map_err(|_| DiskError::Late)?
    }
}

fn read_somewhere() -> Result<(), DiskError> {
    let device = root_device()?;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(&device.path)
        .map_err(|error| DiskError::Open(device.path.clone(), error))?;
    // Anywhere, so that the host has not just read the same for us.
    let mut random = [0; 8];
    File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut random))
        .map_err(DiskError::Random)?;
    let at = offset(u64::from_ne_bytes(random), device.bytes).ok_or(DiskError::NoDisk)?;
    read_block(&file, at).map_err(|source| DiskError::Read {
        device: device.path,
        at,
        source,
    })
}

/// Past the page cache. The kernel first writes what is dirty of the block, as metadata of a filesystem may be; of one that
/// is frozen nothing is, so before a thaw this writes nothing (`blkdev_direct_IO`, block/fops.c; `ext4_freeze`).
fn read_block(file: &File, at: u64) -> io::Result<()> {
    let mut block = Box::new(Block([0; BLOCK]));
    file.read_exact_at(&mut block.0, at)
}

/// The start of a block that lies within `bytes`. `None`: there is none.
fn offset(random: u64, bytes: u64) -> Option<u64> {
    let block = BLOCK as u64;
    Some(random.checked_rem(bytes / block)? * block)
}

#[derive(Debug)]
struct BlockDevice {
    path: PathBuf,
    bytes: u64,
}

/// The device of `/`, by what the kernel calls it: the name under which it was mounted may be one of the boot arguments'
/// (`/dev/root`) that does not exist.
fn root_device() -> Result<BlockDevice, DiskError> {
    let number = match number_of_root() {
        Some(number) => number,
        None => number_of_source()?,
    };
    let sysfs = PathBuf::from(format!("/sys/dev/block/{}:{}", major(number), minor(number)));
    let read = |name: &str| {
        let path = sysfs.join(name);
        fs::read_to_string(&path).map_err(|error| DiskError::Sysfs(path, error))
    };
    let uevent = read("uevent")?;
    let name = device_name(&uevent).ok_or(DiskError::NoDisk)?;
    let sectors: u64 = read("size")?.trim().parse().map_err(|_| DiskError::NoDisk)?;
    Ok(BlockDevice {
        path: Path::new("/dev").join(name),
        bytes: sectors.saturating_mul(SECTOR),
    })
}

/// `None` where the filesystem has a number of its own, as btrfs and those without a disk have: major 0.
fn number_of_root() -> Option<u64> {
    let number = fs::metadata("/").ok()?.dev();
    (major(number) != 0).then_some(number)
}

/// The number of what was mounted, where that is a disk.
fn number_of_source() -> Result<u64, DiskError> {
    let path = PathBuf::from("/proc/self/mountinfo");
    let text = fs::read(&path).map_err(|error| DiskError::Sysfs(path, error))?;
    let mut filesystems = disk_filesystems(&text).into_iter();
    let root = filesystems.find(DiskFilesystem::is_root).ok_or(DiskError::NoDisk)?;
    let metadata = fs::metadata(root.source).map_err(|_| DiskError::NoDisk)?;
    if metadata.file_type().is_block_device() {
        Ok(metadata.rdev())
    } else {
        Err(DiskError::NoDisk)
    }
}

/// The node's name below `/dev`, as a device's uevent file has it.
fn device_name(uevent: &str) -> Option<&str> {
    uevent.lines().find_map(|line| line.strip_prefix("DEVNAME="))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Dir;

    #[test]
    fn the_offset_is_that_of_a_whole_block_within_the_disk() {
        let bytes = 10 * BLOCK as u64 + 512;
        let offsets: std::collections::BTreeSet<_> = (0..100).map(|random| offset(random, bytes).unwrap()).collect();
        assert_eq!(offsets.len(), 10);
        assert!(
            offsets
                .iter()
                .all(|at| at % BLOCK as u64 == 0 && at + BLOCK as u64 <= bytes)
        );
        assert!(offset(u64::MAX, bytes).unwrap() < bytes);
        assert_eq!(offset(5, BLOCK as u64 - 1), None);
    }

    #[test]
    fn a_block_that_is_not_there_is_a_failure() {
        let dir = Dir::new("block");
        let path = dir.path().join("disk");
        fs::write(&path, vec![1; 2 * BLOCK]).unwrap();
        let file = File::open(path).unwrap();
        read_block(&file, BLOCK as u64).unwrap();
        assert!(read_block(&file, 2 * BLOCK as u64).is_err());
    }

    #[test]
    fn the_memory_that_is_read_into_is_aligned_to_a_block() {
        let block = Box::new(Block([0; BLOCK]));
        assert_eq!(block.0.as_ptr().align_offset(BLOCK), 0);
    }

    #[test]
    fn a_uevent_names_the_node() {
        assert_eq!(
            device_name("MAJOR=254\nMINOR=0\nDEVNAME=vda\nDEVTYPE=disk\n"),
            Some("vda")
        );
        assert_eq!(device_name("MAJOR=254\n"), None);
    }
}
