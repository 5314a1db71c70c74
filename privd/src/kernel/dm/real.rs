//! [`DiskKernel`] on the real kernel, by device-mapper's ioctls, and what of ours it has.
//!
//! The `devicemapper` crate waits for udev after activating and removing a device wherever it sees `/run/udev/control`; there is
//! no option against it. Our unit hides that path: the node is the kernel's own, so there is nothing to wait for. (Where it is
//! visible, calls take a tenth of a second longer and are right all the same, as long as the System V semaphores that it waits
//! on are shared with udev: no `PrivateIPC=` without hiding the path.)

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::time::{Duration, Instant};

use devicemapper::{DM, DevId, DmError, DmFlags, DmName, DmOptions, DmUuid, errors};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::{Mode, fchmod, fstat, major, minor};
use nix::unistd::{Uid, fchown};
use roost_common::names;
use roost_common::privd::DiskNode;
use roost_common::units::Sectors;

use super::{Access, DiskKernel, Found, Table, Target};
use crate::kernel::loopdev::{self, Loop, LoopUse};

/// The kernel, through one open `/dev/mapper/control`.
pub(crate) struct RealKernel {
    dm: DM,
}

impl RealKernel {
    /// Opens the control device.
    pub(crate) fn open() -> io::Result<Self> {
        Ok(Self {
            dm: DM::new().map_err(errno)?,
        })
    }
}

/// The errno inside one of the crate's errors. Where it hides it (opening the control device) or there is none, `EIO`.
fn errno(error: DmError) -> io::Error {
    match error {
        DmError::Core(errors::Error::Ioctl(_, _, _, errno)) => (*errno).into(),
        DmError::Core(errors::Error::ContextInit(_)) => io::Error::from_raw_os_error(libc::ENODEV),
        _ => io::Error::from_raw_os_error(libc::EIO),
    }
}

fn dm_name(name: &str) -> io::Result<&DmName> {
    DmName::new(name).map_err(|_| io::ErrorKind::InvalidInput.into())
}

impl DiskKernel for RealKernel {
    fn attach(&self, file: BorrowedFd<'_>, usage: LoopUse) -> io::Result<Loop> {
        loopdev::attach(file, usage)
    }

    fn find(&self, name: &str) -> io::Result<Option<Found>> {
        let options = DmOptions::default().set_flags(DmFlags::DM_STATUS_TABLE | DmFlags::DM_NOFLUSH);
        match self
            .dm
            .table_status(&DevId::Name(dm_name(name)?), options)
            .map_err(errno)
        {
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            Err(error) => Err(error),
            Ok((info, lines)) => Ok(Some(Found {
                node: DiskNode {
                    minor: info.device().minor,
                },
                is_ours: info.uuid().is_some_and(|uuid| uuid.to_string() == name),
                table: if info.flags().contains(DmFlags::DM_ACTIVE_PRESENT) {
                    Table::Active(
                        lines
                            .into_iter()
                            .map(|(_, length, kind, _)| (kind, Sectors(length)))
                            .collect(),
                    )
                } else {
                    Table::None
                },
            })),
        }
    }

    fn create(&self, name: &str) -> io::Result<DiskNode> {
        // The uuid is how the inventory, the start's clean-up and the udev rule know what is ours.
        let uuid = DmUuid::new(name).map_err(|_| io::ErrorKind::InvalidInput)?;
        match self
            .dm
            .device_create(dm_name(name)?, Some(uuid), DmOptions::default())
            .map_err(errno)
        {
            Ok(info) => Ok(DiskNode {
                minor: info.device().minor,
            }),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EEXIST)) => {
                Err(io::Error::from_raw_os_error(libc::EEXIST))
            }
            Err(error) => Err(error),
        }
    }

    fn load(&self, name: &str, table: &[Target], access: Access) -> io::Result<()> {
        let id = DevId::Name(dm_name(name)?);
        let dm_major = self.dm.device_info(&id).map_err(errno)?.device().major;
        let lines: Vec<_> = table
            .iter()
            .map(|target| {
                let kind = target.map.kind().to_owned();
                (target.start.0, target.length.0, kind, target.map.parameters(dm_major))
            })
            .collect();
        let options = match access {
            Access::ReadOnly => DmOptions::default().set_flags(DmFlags::DM_READONLY),
            Access::ReadWrite => DmOptions::default(),
        };
        self.dm.table_load(&id, &lines, options).map_err(errno)?;
        Ok(())
    }

    fn resume(&self, name: &str) -> io::Result<()> {
        // Waits for udev where /run/udev/control is to be seen; our unit hides it.
        self.dm
            .device_suspend(&DevId::Name(dm_name(name)?), DmOptions::default())
            .map_err(errno)?;
        Ok(())
    }

    fn open(&self, node: DiskNode, access: Access) -> io::Result<OwnedFd> {
        let opened = std::fs::File::options()
            .read(true)
            .write(access == Access::ReadWrite)
            .custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW)
            .open(node.to_string());
        match opened {
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENXIO | libc::ENODEV)) => {
                Err(io::Error::from_raw_os_error(libc::ENOENT))
            }
            Err(error) => Err(error),
            Ok(file) => {
                // The kernel names the node after the minor number; if anybody has put another one in its place we stop here.
                let device = fstat(&file)?.st_rdev;
                if minor(device) != u64::from(node.minor) || major(device) == u64::from(loopdev::MAJOR) {
                    return Err(io::Error::from_raw_os_error(libc::ENOTBLK));
                }
                Ok(file.into())
            }
        }
    }

    fn remove_when_unused(&self, name: &str) -> io::Result<()> {
        let options = DmOptions::default().set_flags(DmFlags::DM_DEFERRED_REMOVE);
        self.dm
            .device_remove(&DevId::Name(dm_name(name)?), options)
            .map_err(errno)?;
        Ok(())
    }

    fn give(&self, device: &OwnedFd, owner: u32) -> io::Result<()> {
        // In this order: the node is root's until the last step, so CAP_CHOWN is all this needs.
        fchmod(device, Mode::S_IRUSR | Mode::S_IWUSR)?;
        fchown(device, Some(Uid::from_raw(owner)), None)?;
        Ok(())
    }

    fn watch(&self) -> io::Result<()> {
        self.dm.arm_poll().map_err(errno)?;
        Ok(())
    }

    fn wait(&self, deadline: Instant) -> io::Result<bool> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left < Duration::from_millis(1) {
            return Ok(false);
        }
        let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(self.dm.file().as_fd(), PollFlags::POLLIN)], left) {
            Ok(0) => Ok(false),
            Ok(_) | Err(nix::Error::EINTR) => Ok(true),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// A device of ours, as the inventory shows it.
#[derive(Debug)]
pub(crate) struct Listed {
    pub(crate) name: String,
    pub(crate) node: DiskNode,
    pub(crate) open_count: u32,
    /// A snapshot's status line, empty for others.
    pub(crate) status: String,
    /// The loops that it uses.
    pub(crate) loops: Vec<u32>,
}

/// Loops and devices of device-mapper, a directory each.
const BLOCK_DEVICES: &str = "/sys/devices/virtual/block";

/// A number of disks that there are no more of, by the links of [`BLOCK_DEVICES`]: one for each directory in it, and two of its own. Each
/// disk is a device, and has a loop for its exception store. `None` where there is nothing, as where there is no sysfs.
fn most_disks(links: u64) -> Option<usize> {
    let devices = links.checked_sub(2).filter(|devices| *devices > 0)?;
    usize::try_from(devices / 2).ok()
}

/// Longest status line handed on; the kernel's own are some 40 bytes.
const MAX_STATUS: usize = 64;

impl RealKernel {
    /// The devices whose name starts with `prefix` and whose uuid is the same. One that goes while they are listed is left out.
    pub(crate) fn list(&self, prefix: &str) -> io::Result<Vec<Listed>> {
        let mut listed = Vec::new();
        for (name, _, _) in self.dm.list_devices().map_err(errno)? {
            if let Some(name) = name.to_string().strip_prefix(prefix) {
                listed.extend(self.describe(format!("{prefix}{name}"))?);
            }
        }
        Ok(listed)
    }

    /// How many disks there are: snapshots of sandboxes. Where there are fewer than `limit` for certain, a number that they are no more
    /// than: to count them costs the more the more there are.
    pub(crate) fn count_disks(&self, limit: u32) -> io::Result<usize> {
        let links = std::fs::metadata(BLOCK_DEVICES).map_or(0, |directory| directory.nlink());
        if let Some(at_most) = most_disks(links).filter(|at_most| *at_most < limit as usize) {
            return Ok(at_most);
        }
        let devices = self.dm.list_devices().map_err(errno)?;
        let disks = devices
            .iter()
            .filter(|(name, _, _)| name.to_string().starts_with(names::DISK_PREFIX));
        Ok(disks.count())
    }

    /// Removes a device that nobody has open.
    pub(crate) fn remove(&self, name: &str) -> io::Result<()> {
        // Deferred removal acts at once on a device that is not open, and does not retry for a second on one that is.
        self.remove_when_unused(name)
    }

    fn describe(&self, name: String) -> io::Result<Option<Listed>> {
        let id = DevId::Name(dm_name(&name)?);
        let gone = |error: &io::Error| error.raw_os_error() == Some(libc::ENXIO);
        let options = DmOptions::default().set_flags(DmFlags::DM_NOFLUSH);
        let (info, lines) = match self.dm.table_status(&id, options).map_err(errno) {
            Err(error) if gone(&error) => return Ok(None),
            outcome => outcome?,
        };
        if info.uuid().is_none_or(|uuid| uuid.to_string() != name) {
            return Ok(None);
        }
        let deps = match self.dm.table_deps(&id, DmOptions::default()).map_err(errno) {
            Err(error) if gone(&error) => return Ok(None),
            outcome => outcome?,
        };
        let mut status = lines
            .into_iter()
            .find(|(_, _, kind, _)| kind == "snapshot")
            .map(|(_, _, _, status)| status)
            .unwrap_or_default();
        // ASCII; should it ever not be, it is left out rather than cut in half.
        if status.len() > MAX_STATUS {
            status = status.get(..MAX_STATUS).unwrap_or_default().to_owned();
        }
        Ok(Some(Listed {
            node: DiskNode {
                minor: info.device().minor,
            },
            open_count: u32::try_from(info.open_count()).unwrap_or(0),
            status,
            loops: deps
                .into_iter()
                .filter(|dep| dep.major == loopdev::MAJOR)
                .map(|dep| dep.minor)
                .collect(),
            name,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_disk_is_two_directories_of_block_devices() {
        let found = [0, 1, 2, 3, 4, 5, 12].map(most_disks);
        assert_eq!(found, [None, None, None, Some(0), Some(1), Some(1), Some(5)]);
    }

    #[test]
    fn the_kernel_counts_directories_of_block_devices_as_links() {
        let directory = std::fs::metadata(BLOCK_DEVICES).expect("sysfs");
        let listed = std::fs::read_dir(BLOCK_DEVICES).expect("a directory").count();
        assert_eq!(directory.nlink(), listed as u64 + 2);
    }
}
