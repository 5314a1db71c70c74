//! From request to specification: everything a peer says is judged here, before anything is made.
//!
//! Ids and slots are checked by their types while they are decoded; what is left are descriptors, sizes, uids and counts. A
//! specification is proof that it was checked: its fields are private to nobody, but nothing else in this crate builds one.
//! Files are judged by what their descriptor says (`fstat`, `F_GETFL`), never by a path, so there is no race to win.

use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat};
use nix::sys::statfs::fstatfs;
use roost_common::ids::{SandboxId, Slot};
use roost_common::privd::{
    DescriptorRole, EgressPolicy, MAX_NETWORKS, MAX_RESOLVERS, OpenDisk, OpenNetwork, PrivdError, ResourceKind,
    SizeRefusal, Step, Wanted,
};
use roost_common::units::{CHUNK_SECTORS, MAX_DISK, SECTOR, Sectors};

use crate::kernel::at;

/// Uids that systemd gives to services with `DynamicUser=`.
const DYNAMIC_UIDS: RangeInclusive<u32> = 61184..=65519;

/// Filesystems that hold files on a disk, by their magic number: ext2 to ext4, XFS, Btrfs, F2FS, bcachefs, ZFS. Others answer
/// from memory (tmpfs) or from a program of somebody's own (FUSE), and a disk on such is a way to exhaust or to stall the host.
const DISK_FILESYSTEMS: [i64; 6] = [0xEF53, 0x5846_5342, 0x9123_683E, 0xF2F5_2010, 0xCA45_1A4E, 0x2FC1_2FC1];

/// Who calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Peer {
    pub(crate) uid: u32,
    /// 0 where it has none in our namespace.
    pub(crate) pid: i32,
}

/// What is judged by beside the request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Most disks at a time: more than a host has uids for VMs.
    pub(crate) disks: u32,
    /// Magic numbers of filesystems whose files may become disks.
    pub(crate) filesystems: &'static [i64],
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            disks: 8192,
            filesystems: &DISK_FILESYSTEMS,
        }
    }
}

/// A disk to be opened.
#[derive(Debug)]
pub(crate) struct DiskSpec {
    pub(crate) sandbox: SandboxId,
    pub(crate) origin: OwnedFd,
    pub(crate) image: Image,
    pub(crate) cow: OwnedFd,
    pub(crate) size: Sectors,
    pub(crate) owner: u32,
}

/// The identity and length of an image's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Image {
    pub(crate) device: u64,
    pub(crate) inode: u64,
    pub(crate) length: Sectors,
}

impl DiskSpec {
    /// Judges a request of `peer`.
    ///
    /// # Errors
    /// [`PrivdError::WrongSize`], [`PrivdError::WrongOwner`], [`PrivdError::WrongDescriptor`]; [`PrivdError::Kernel`] when a
    /// descriptor cannot be asked.
    pub(crate) fn check(limits: &Limits, peer: Peer, request: OpenDisk) -> Result<Self, PrivdError> {
        let size = request.size;
        let refuse = |reason| PrivdError::WrongSize { size, reason };
        if size > MAX_DISK {
            return Err(refuse(SizeRefusal::TooLarge));
        }
        if size.0 == 0 || !size.0.is_multiple_of(CHUNK_SECTORS) {
            return Err(refuse(SizeRefusal::NotWholeChunks));
        }
        let cow_length = size.cow_length().ok_or_else(|| refuse(SizeRefusal::TooLarge))?;
        if request.owner != peer.uid && !DYNAMIC_UIDS.contains(&request.owner) {
            return Err(PrivdError::WrongOwner { uid: request.owner });
        }

        let origin = File::inspect(limits, DescriptorRole::Origin, request.origin.as_fd(), OFlag::O_RDONLY)?;
        origin.demand(origin.owner() == 0 || origin.owner() == peer.uid, Wanted::CallersOwn)?;
        let others = Mode::S_IWGRP | Mode::S_IWOTH;
        origin.demand(!origin.mode().intersects(others), Wanted::NotWritableByOthers)?;
        origin.demand(
            origin.length() > 0 && origin.length().is_multiple_of(SECTOR),
            Wanted::ProperLength,
        )?;
        let image = Image {
            device: origin.status.st_dev,
            inode: origin.status.st_ino,
            length: Sectors(origin.length() / SECTOR),
        };
        if image.length > size {
            return Err(refuse(SizeRefusal::SmallerThanOrigin));
        }

        let cow = File::inspect(limits, DescriptorRole::Cow, request.cow.as_fd(), OFlag::O_RDWR)?;
        cow.demand(cow.owner() == peer.uid, Wanted::CallersOwn)?;
        cow.demand(cow.status.st_nlink == 1, Wanted::SingleLink)?;
        if cow.length() < cow_length.0 {
            return Err(refuse(SizeRefusal::CowTooShort));
        }
        let store = std::fs::File::from(request.cow.into_owned().map_err(at(Step::InspectDescriptor))?);
        let mut header = [0; STORE_HEADER];
        store
            .read_exact_at(&mut header, 0)
            .map_err(at(Step::InspectDescriptor))?;
        cow.demand(is_store_header(&header), Wanted::ExceptionStore)?;

        Ok(Self {
            sandbox: request.sandbox,
            origin: request.origin.into_owned().map_err(at(Step::InspectDescriptor))?,
            image,
            cow: store.into(),
            size,
            owner: request.owner,
        })
    }
}

/// Length of an exception store's header: magic, valid, version, chunk size, 32 bits each, little-endian.
const STORE_HEADER: usize = 16;
/// `SnAp`, the magic number of exception stores.
const STORE_MAGIC: u32 = 0x7041_6e53;

/// Whether a store begins as one that device-mapper makes anew, or as one of our chunk size. What its header says overrides
/// what the table says, and the kernel reserves memory by it.
fn is_store_header(header: &[u8; STORE_HEADER]) -> bool {
    if header.iter().all(|byte| *byte == 0) {
        return true;
    }
    let (fields, _) = header.as_chunks();
    match fields
        .iter()
        .map(|field| u32::from_le_bytes(*field))
        .collect::<Vec<_>>()[..]
    {
        // Not `valid`: of a store that overflowed the kernel makes a disk that answers with errors.
        [magic, _, version, chunk] => magic == STORE_MAGIC && version == 1 && u64::from(chunk) == CHUNK_SECTORS,
        _ => false,
    }
}

/// A network to be opened.
#[derive(Debug)]
pub(crate) struct NetworkSpec {
    pub(crate) slot: Slot,
    pub(crate) policy: EgressPolicy,
}

impl NetworkSpec {
    /// Judges a request.
    ///
    /// # Errors
    /// Those of [`policy`].
    pub(crate) fn check(request: OpenNetwork) -> Result<Self, PrivdError> {
        Ok(Self {
            slot: request.slot,
            policy: policy(request.policy)?,
        })
    }
}

/// Judges a policy. Any address may be a resolver, and any range allowed: the host's own table keeps the host and other sandboxes closed
/// to them.
///
/// # Errors
/// [`PrivdError::TooMany`] of something, [`PrivdError::WrongRange`].
pub(crate) fn policy(policy: EgressPolicy) -> Result<EgressPolicy, PrivdError> {
    at_most(MAX_RESOLVERS, policy.resolvers.len(), ResourceKind::Resolvers)?;
    for ranges in [&policy.allowed, &policy.denied] {
        at_most(MAX_NETWORKS, ranges.len(), ResourceKind::Ranges)?;
        if let Some(range) = ranges.iter().find(|range| !range.is_proper()) {
            return Err(PrivdError::WrongRange { range: *range });
        }
    }
    Ok(policy)
}

fn at_most(max: usize, count: usize, what: ResourceKind) -> Result<(), PrivdError> {
    if count <= max {
        return Ok(());
    }
    Err(PrivdError::TooMany {
        what,
        max: u32::try_from(max).unwrap_or(u32::MAX),
    })
}

/// Refuses one more disk beside `existing` ones.
///
/// # Errors
/// [`PrivdError::TooMany`].
pub(crate) fn room_for_a_disk(limits: &Limits, existing: usize) -> Result<(), PrivdError> {
    if u32::try_from(existing).is_ok_and(|existing| existing < limits.disks) {
        Ok(())
    } else {
        Err(PrivdError::TooMany {
            what: ResourceKind::Disk,
            max: limits.disks,
        })
    }
}

/// A descriptor that is a regular file on a disk, opened as its role demands.
struct File {
    role: DescriptorRole,
    status: FileStat,
}

impl File {
    fn inspect(
        limits: &Limits,
        role: DescriptorRole,
        descriptor: BorrowedFd<'_>,
        access: OFlag,
    ) -> Result<Self, PrivdError> {
        let failed = |errno| at(Step::InspectDescriptor)(io::Error::from(errno));
        let flags = OFlag::from_bits_retain(fcntl(descriptor, FcntlArg::F_GETFL).map_err(failed)?);
        let wanted = if access == OFlag::O_RDWR {
            Wanted::ReadWrite
        } else {
            Wanted::ReadOnly
        };
        // With O_PATH the access mode reads as O_RDONLY, though nothing can be read.
        if flags.contains(OFlag::O_PATH) || flags & OFlag::O_ACCMODE != access {
            return Err(PrivdError::WrongDescriptor { what: role, wanted });
        }
        let file = Self {
            role,
            status: fstat(descriptor).map_err(failed)?,
        };
        let kind = SFlag::from_bits_truncate(file.status.st_mode) & SFlag::S_IFMT;
        file.demand(kind == SFlag::S_IFREG, Wanted::RegularFile)?;
        let filesystem = fstatfs(descriptor).map_err(failed)?.filesystem_type().0;
        file.demand(limits.filesystems.contains(&filesystem), Wanted::BackedByDisk)?;
        Ok(file)
    }

    fn demand(&self, holds: bool, wanted: Wanted) -> Result<(), PrivdError> {
        if holds {
            Ok(())
        } else {
            Err(PrivdError::WrongDescriptor {
                what: self.role,
                wanted,
            })
        }
    }

    fn owner(&self) -> u32 {
        self.status.st_uid
    }

    fn mode(&self) -> Mode {
        Mode::from_bits_truncate(self.status.st_mode)
    }

    fn length(&self) -> u64 {
        // The kernel has no negative lengths; if it had, it would be refused as no length.
        u64::try_from(self.status.st_size).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, OpenOptions};
    use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
    use std::path::{Path, PathBuf};
    use std::sync::atomic::{AtomicU32, Ordering};

    use roost_common::ipc::PassedFd;
    use roost_common::privd::Internet;
    use roost_common::units::Mebibytes;

    use roost_common::net::Cidr;

    use super::*;

    /// A directory of files that would do for a disk, each to be spoilt by a test.
    struct Files(PathBuf);

    impl Files {
        fn new() -> Self {
            static MADE: AtomicU32 = AtomicU32::new(0);
            let number = MADE.fetch_add(1, Ordering::Relaxed);
            let place = std::env::temp_dir().join(format!("roost-privd-{}-{number}", std::process::id()));
            fs::create_dir(&place).expect("a directory");
            let files = Self(place);
            fs::write(files.image(), vec![1; 1 << 20]).expect("written");
            fs::set_permissions(files.image(), fs::Permissions::from_mode(0o644)).expect("closed to others");
            let cow = fs::File::create(files.cow()).expect("created");
            cow.set_len(size().cow_length().expect("a size").0).expect("sparse");
            files
        }

        fn image(&self) -> PathBuf {
            self.0.join("image")
        }

        fn cow(&self) -> PathBuf {
            self.0.join("cow")
        }

        fn request(&self) -> OpenDisk {
            OpenDisk {
                sandbox: "a".parse().expect("an id"),
                origin: open(&self.image(), OFlag::O_RDONLY),
                cow: open(&self.cow(), OFlag::O_RDWR),
                size: size(),
                owner: 61184,
            }
        }

        fn check(&self, request: OpenDisk) -> Result<DiskSpec, PrivdError> {
            let here = fstatfs(fs::File::open(&self.0).expect("opened"))
                .expect("known")
                .filesystem_type()
                .0;
            let limits = Limits {
                filesystems: Box::leak(Box::new([here])),
                ..Limits::default()
            };
            DiskSpec::check(&limits, me(), request)
        }

        fn refused(&self, request: OpenDisk) -> PrivdError {
            self.check(request).expect_err("accepted")
        }
    }

    impl Drop for Files {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).expect("removed");
        }
    }

    fn size() -> Sectors {
        Mebibytes(2).sectors()
    }

    fn me() -> Peer {
        Peer {
            uid: nix::unistd::geteuid().as_raw(),
            pid: 1,
        }
    }

    fn open(path: &Path, flags: OFlag) -> PassedFd {
        let writes = flags.intersects(OFlag::O_RDWR | OFlag::O_WRONLY);
        let file = OpenOptions::new()
            .read(!flags.contains(OFlag::O_WRONLY))
            .write(writes)
            .custom_flags((flags & !(OFlag::O_ACCMODE)).bits())
            .open(path)
            .expect("opened");
        OwnedFd::from(file).into()
    }

    fn origin(wanted: Wanted) -> PrivdError {
        PrivdError::WrongDescriptor {
            what: DescriptorRole::Origin,
            wanted,
        }
    }

    fn cow(wanted: Wanted) -> PrivdError {
        PrivdError::WrongDescriptor {
            what: DescriptorRole::Cow,
            wanted,
        }
    }

    #[test]
    fn proper_files_become_a_disk() {
        let files = Files::new();
        let spec = files.check(files.request()).expect("accepted");
        assert_eq!(spec.image.length, Mebibytes(1).sectors());
    }

    #[test]
    fn only_regular_files_opened_as_their_role_demands() {
        let files = Files::new();
        let fifo = files.0.join("fifo");
        nix::unistd::mkfifo(&fifo, Mode::S_IRWXU).expect("a fifo");
        let (image, store) = (files.image(), files.cow());
        for (descriptor, wanted) in [
            (open(&files.0, OFlag::O_RDONLY), Wanted::RegularFile),
            (open(Path::new("/dev/null"), OFlag::O_RDONLY), Wanted::RegularFile),
            (open(&fifo, OFlag::O_RDONLY | OFlag::O_NONBLOCK), Wanted::RegularFile),
            (open(&image, OFlag::O_RDWR), Wanted::ReadOnly),
            (open(&image, OFlag::O_WRONLY), Wanted::ReadOnly),
            (open(&image, OFlag::O_PATH), Wanted::ReadOnly),
        ] {
            let mut request = files.request();
            request.origin = descriptor;
            assert_eq!(files.refused(request), origin(wanted));
        }
        for (descriptor, wanted) in [
            (open(Path::new("/dev/null"), OFlag::O_RDWR), Wanted::RegularFile),
            (open(&fifo, OFlag::O_RDWR), Wanted::RegularFile),
            (open(&store, OFlag::O_RDONLY), Wanted::ReadWrite),
            (open(&store, OFlag::O_WRONLY), Wanted::ReadWrite),
            (open(&store, OFlag::O_PATH), Wanted::ReadWrite),
        ] {
            let mut request = files.request();
            request.cow = descriptor;
            assert_eq!(files.refused(request), cow(wanted));
        }
    }

    #[test]
    fn only_files_on_a_disk() {
        let files = Files::new();
        let refused = DiskSpec::check(
            &Limits {
                filesystems: &[],
                ..Limits::default()
            },
            me(),
            files.request(),
        );
        assert_eq!(refused.expect_err("accepted"), origin(Wanted::BackedByDisk));
        let mut request = files.request();
        request.origin = open(Path::new("/proc/self/maps"), OFlag::O_RDONLY);
        assert_eq!(files.refused(request), origin(Wanted::BackedByDisk));
    }

    #[test]
    fn a_store_with_a_second_link_or_of_another_uid_is_refused() {
        let files = Files::new();
        let stranger = Peer {
            uid: me().uid + 1,
            pid: 1,
        };
        let any = fstatfs(fs::File::open(&files.0).expect("opened"))
            .expect("known")
            .filesystem_type()
            .0;
        let limits = Limits {
            filesystems: Box::leak(Box::new([any])),
            ..Limits::default()
        };
        let refused = DiskSpec::check(&limits, stranger, files.request()).expect_err("accepted");
        // Where the test runs as root the image is root's, which anybody may use; the store still is not theirs.
        let expected = if me().uid == 0 {
            cow(Wanted::CallersOwn)
        } else {
            origin(Wanted::CallersOwn)
        };
        assert_eq!(refused, expected);
        fs::hard_link(files.cow(), files.0.join("second")).expect("a link");
        assert_eq!(files.refused(files.request()), cow(Wanted::SingleLink));
    }

    #[test]
    fn an_image_that_others_may_write_is_refused() {
        let files = Files::new();
        for mode in [0o664, 0o646, 0o666] {
            fs::set_permissions(files.image(), fs::Permissions::from_mode(mode)).expect("changed");
            assert_eq!(
                files.refused(files.request()),
                origin(Wanted::NotWritableByOthers),
                "{mode:o}"
            );
        }
    }

    #[test]
    fn sizes_that_are_no_disk_are_refused() {
        let files = Files::new();
        for (size, reason) in [
            (0, SizeRefusal::NotWholeChunks),
            (1, SizeRefusal::NotWholeChunks),
            (4097, SizeRefusal::NotWholeChunks),
            (MAX_DISK.0 + 8, SizeRefusal::TooLarge),
            (u64::MAX, SizeRefusal::TooLarge),
            (2040, SizeRefusal::SmallerThanOrigin),
            (MAX_DISK.0, SizeRefusal::CowTooShort),
            (size().0 + 8 * 1024, SizeRefusal::CowTooShort),
        ] {
            let size = Sectors(size);
            let mut request = files.request();
            request.size = size;
            assert_eq!(files.refused(request), PrivdError::WrongSize { size, reason });
        }
        for length in [0, 511, 513] {
            fs::write(files.image(), vec![1; length]).expect("written");
            assert_eq!(files.refused(files.request()), origin(Wanted::ProperLength), "{length}");
        }
    }

    #[test]
    fn a_store_may_not_be_a_byte_too_short() {
        let files = Files::new();
        let length = size().cow_length().expect("a size").0;
        fs::File::options()
            .write(true)
            .open(files.cow())
            .and_then(|file| file.set_len(length - 1))
            .expect("cut");
        let reason = SizeRefusal::CowTooShort;
        assert_eq!(
            files.refused(files.request()),
            PrivdError::WrongSize { size: size(), reason }
        );
    }

    #[test]
    fn a_store_is_blank_or_has_a_header_of_our_chunk_size() {
        let files = Files::new();
        let begin_with = |fields: [u32; 4]| {
            let store = fs::File::options().write(true).open(files.cow()).expect("opened");
            let header = fields.map(u32::to_le_bytes).concat();
            store.write_all_at(&header, 0).expect("written");
        };
        for good in [
            [0; 4],
            [0x7041_6e53, 1, 1, 8],
            // Overflowed: its own user's loss.
            [0x7041_6e53, 0, 1, 8],
        ] {
            begin_with(good);
            assert!(files.check(files.request()).is_ok(), "{good:x?}");
        }
        for bad in [
            [0x7041_6e53, 1, 1, 16],
            [0x7041_6e53, 1, 1, 0],
            [0x7041_6e53, 1, 1, 8 << 24],
            [0x7041_6e53, 1, 1, 1 << 21],
            [0x7041_6e53, 1, 0, 8],
            [0x7041_6e53, 1, 2, 8],
            [0x536e_4170, 1, 1, 8],
            [0, 1, 1, 8],
            [0, 0, 0, 1],
            [1, 0, 0, 0],
        ] {
            begin_with(bad);
            assert_eq!(files.refused(files.request()), cow(Wanted::ExceptionStore), "{bad:x?}");
        }
    }

    #[test]
    fn a_disk_is_given_to_a_vms_uid_or_the_callers_own() {
        let files = Files::new();
        for uid in [61184, 65519, me().uid] {
            let mut request = files.request();
            request.owner = uid;
            assert!(files.check(request).is_ok(), "{uid}");
        }
        for uid in [me().uid + 1, 61183, 65520, u32::MAX] {
            let mut request = files.request();
            request.owner = uid;
            assert_eq!(files.refused(request), PrivdError::WrongOwner { uid });
        }
    }

    #[test]
    fn counts_have_limits() {
        let limits = Limits::default();
        assert!(room_for_a_disk(&limits, 8191).is_ok());
        assert!(room_for_a_disk(&limits, 8192).is_err());
        assert!(room_for_a_disk(&limits, usize::MAX).is_err());
        let open = EgressPolicy::of(Internet::Open);
        let with = |count| EgressPolicy {
            resolvers: vec![std::net::Ipv4Addr::UNSPECIFIED; count],
            ..open.clone()
        };
        assert!(policy(with(MAX_RESOLVERS)).is_ok());
        assert!(policy(with(MAX_RESOLVERS + 1)).is_err());
        let all: Cidr = "0.0.0.0/0".parse().expect("a range");
        for count in [MAX_NETWORKS, MAX_NETWORKS + 1] {
            let (allowed, denied) = (vec![all; count], vec![all; count]);
            let allowing = EgressPolicy {
                allowed,
                ..open.clone()
            };
            let denying = EgressPolicy { denied, ..open.clone() };
            for wanted in [allowing, denying] {
                assert_eq!(policy(wanted).is_ok(), count == MAX_NETWORKS, "{count}");
            }
        }
    }

    #[test]
    fn a_range_that_is_none_is_refused() {
        for (network, length) in [([192, 0, 2, 1], 24), ([0, 0, 0, 0], 33), ([255, 255, 255, 255], 255)] {
            let range = Cidr {
                network: network.into(),
                length,
            };
            let open = EgressPolicy::of(Internet::Listed);
            let allowed = EgressPolicy {
                allowed: vec![range],
                ..open.clone()
            };
            let denied = EgressPolicy {
                denied: vec![range],
                ..open
            };
            for wanted in [allowed, denied] {
                assert_eq!(policy(wanted), Err(PrivdError::WrongRange { range }));
            }
        }
    }
}
