//! From request to specification: everything a peer says is judged here, before anything is made.
//!
//! Ids and slots are checked by their types while they are decoded; what is left are descriptors, sizes, uids and counts. A
//! specification is proof that it was checked: its fields are private to nobody, but nothing else in this crate builds one.
//! Files are judged by what their descriptor says (`fstat`, `F_GETFL`), never by a path, so there is no race to win.

use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat};
use nix::sys::statfs::fstatfs;
use roost_common::ids::{SandboxId, Slot};
use roost_common::privd::{
    DescriptorRole, EgressPolicy, MAX_RESOLVERS, OpenDisk, OpenNetwork, PrivdError, ResourceKind, SizeRefusal, Step,
    Wanted,
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

        Ok(Self {
            sandbox: request.sandbox,
            origin: request.origin.into_owned().map_err(at(Step::InspectDescriptor))?,
            image,
            cow: request.cow.into_owned().map_err(at(Step::InspectDescriptor))?,
            size,
            owner: request.owner,
        })
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

/// Judges a policy. Any address may be a resolver: the host's own table keeps the host and other sandboxes closed to it.
///
/// # Errors
/// [`PrivdError::TooMany`] resolvers.
pub(crate) fn policy(policy: EgressPolicy) -> Result<EgressPolicy, PrivdError> {
    if policy.resolvers.len() > MAX_RESOLVERS {
        return Err(PrivdError::TooMany {
            what: ResourceKind::Resolvers,
            max: u32::try_from(MAX_RESOLVERS).unwrap_or(u32::MAX),
        });
    }
    Ok(policy)
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
