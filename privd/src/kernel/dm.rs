//! Copy-on-write disks: one dm-snapshot per sandbox over a shared, read-only image.
//!
//! ```text
//! image file --loop, read-only--> [linear + zero] origin --+
//!                                                          +--> snapshot --> /dev/dm-N --> virtio-blk
//! cow file ----loop, direct I/O--> exception store --------+
//! ```
//!
//! The origin is named after its file and the disk's size, and all disks of that file and size share it. Behind the image it
//! reads zeros up to the disk's size, so an image is never resized here.
//!
//! Holds: every device here is marked for deferred removal before its descriptor leaves this module; before that an [`Undo`]
//! removes it. A privd killed in between leaves a device that nobody has open, which the next start removes (`host`).
//! The name is the lock: a device is created under it or not at all, so one exception store never has two writers.
//! Not here: which image, how large (the agent decides), files of any kind (the agent opens them), whether a descriptor is fit
//! to be a disk (`check`).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use devicemapper::{DM, DevId, DmError, DmFlags, DmName, DmOptions, DmUuid, errors};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::{Mode, fchmod, fstat, major, minor};
use nix::unistd::{Uid, fchown};
use roost_common::names;
use roost_common::privd::{DiskNode, PrivdError, ResourceKind, Step};
use roost_common::units::{CHUNK_SECTORS, Sectors};

use super::loopdev::{self, Loop, LoopUse};
use super::{BUSY, at};
use crate::check::DiskSpec;
use crate::undo::Undo;

/// How a device is opened, and its table loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// For reading.
    ReadOnly,
    /// For reading and writing.
    ReadWrite,
}

/// One line of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    /// Where it starts.
    pub(crate) start: Sectors,
    /// How long it is.
    pub(crate) length: Sectors,
    /// What it is.
    pub(crate) map: Map,
}

/// The kinds of targets we use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Map {
    /// The loop of this number.
    Linear {
        /// Its number.
        number: u32,
    },
    /// Zeros.
    Zero,
    /// A persistent snapshot.
    Snapshot {
        /// What it is a snapshot of.
        origin: DiskNode,
        /// Number of the loop with the exception store.
        cow: u32,
    },
}

/// A device that exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    /// Its node.
    pub(crate) node: DiskNode,
    /// Whether it has a table, that is, whether its maker got that far.
    pub(crate) table: Table,
}

/// The table of a device that exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Table {
    /// None yet.
    None,
    /// Kind and length of each target.
    Active(Vec<(String, Sectors)>),
}

/// What disks need of the kernel.
pub(crate) trait DiskKernel {
    /// Attaches a loop.
    fn attach(&self, file: BorrowedFd<'_>, usage: LoopUse) -> io::Result<Loop>;
    /// Looks a device up.
    fn find(&self, name: &str) -> io::Result<Option<Found>>;
    /// Creates a device without a table; `AlreadyExists` when the name is taken.
    fn create(&self, name: &str) -> io::Result<DiskNode>;
    /// Loads a table.
    fn load(&self, name: &str, table: &[Target], access: Access) -> io::Result<()>;
    /// Makes the loaded table the active one.
    fn resume(&self, name: &str) -> io::Result<()>;
    /// Opens a device; `NotFound` when it is on its way out.
    fn open(&self, node: DiskNode, access: Access) -> io::Result<OwnedFd>;
    /// Removes a device at its last close, which is now when nobody has it open.
    fn remove_when_unused(&self, name: &str) -> io::Result<()>;
    /// Makes the node behind `device` its owner's alone.
    fn give(&self, device: &OwnedFd, owner: u32) -> io::Result<()>;
    /// From here on changes are remembered for [`DiskKernel::wait`].
    fn watch(&self) -> io::Result<()>;
    /// Waits until a device has come or gone since [`DiskKernel::watch`]; `false` when none did before the deadline.
    fn wait(&self, deadline: Instant) -> io::Result<bool>;
}

/// A disk: its node, and the descriptor that keeps it.
#[derive(Debug)]
pub(crate) struct OpenedDisk {
    /// Its node.
    pub(crate) node: DiskNode,
    /// Keeps it.
    pub(crate) device: OwnedFd,
}

/// Opens the disk that `spec` describes. It lives until the last close of its device.
///
/// # Errors
/// [`PrivdError::Busy`] when the sandbox's disk still exists after [`BUSY`], [`PrivdError::Kernel`] with the step that failed.
/// Nothing is left of either.
pub(crate) fn open_snapshot(kernel: &impl DiskKernel, spec: &DiskSpec) -> Result<OpenedDisk, PrivdError> {
    let deadline = Instant::now() + BUSY;
    // Both are held open until the snapshot's table holds them, so declared before what undoes that.
    let origin = open_origin(kernel, spec, deadline)?;
    let cow = kernel
        .attach(spec.cow.as_fd(), LoopUse::Cow)
        .map_err(at(Step::AttachCowLoop))?;

    let name = names::disk(&spec.sandbox);
    let mut undo = Undo::default();
    let node = create_when_free(kernel, &name, deadline)?;
    undo.add(Step::CreateSnapshot, || kernel.remove_when_unused(&name));
    let table = [Target {
        start: Sectors(0),
        length: spec.size,
        map: Map::Snapshot {
            origin: origin.node,
            cow: cow.number,
        },
    }];
    kernel
        .load(&name, &table, Access::ReadWrite)
        .map_err(at(Step::LoadSnapshot))?;
    kernel.resume(&name).map_err(at(Step::ResumeSnapshot))?;
    let device = kernel.open(node, Access::ReadWrite).map_err(at(Step::OpenSnapshot))?;
    kernel.remove_when_unused(&name).map_err(at(Step::DeferRemoval))?;
    // The descriptor holds it now: an early return closes it, and that removes the device.
    undo.commit();
    kernel.give(&device, spec.owner).map_err(at(Step::GiveNode))?;
    Ok(OpenedDisk { node, device })
}

/// Creates a device, waiting for one of the same name to go: removal is the kernel's and runs in its own time.
fn create_when_free(kernel: &impl DiskKernel, name: &str, deadline: Instant) -> Result<DiskNode, PrivdError> {
    loop {
        kernel.watch().map_err(at(Step::CreateSnapshot))?;
        match kernel.create(name) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                if !kernel.wait(deadline).map_err(at(Step::CreateSnapshot))? {
                    return Err(PrivdError::Busy {
                        what: ResourceKind::Disk,
                    });
                }
            }
            outcome => return outcome.map_err(at(Step::CreateSnapshot)),
        }
    }
}

/// Origins are looked up, made and opened one at a time in this process, so that no call meets another's half-made one. It is
/// no state: nothing is remembered in it.
static ORIGINS: Mutex<()> = Mutex::new(());

/// Opens the origin of `spec`, shared with others that have one of the same file and size, or made for the purpose. It goes with
/// its last user.
fn open_origin(kernel: &impl DiskKernel, spec: &DiskSpec, deadline: Instant) -> Result<OpenedDisk, PrivdError> {
    let _one_at_a_time = ORIGINS.lock().unwrap_or_else(PoisonError::into_inner);
    // While the origin exists its loop holds the image's file open, so the inode number cannot come to mean another file.
    let name = names::origin(spec.image.device, spec.image.inode, spec.size);
    let expected = origin_table(spec, 0);
    loop {
        kernel.watch().map_err(at(Step::OpenOrigin))?;
        match kernel.find(&name).map_err(at(Step::OpenOrigin))? {
            None => match create_origin(kernel, spec, &name) {
                Err(PrivdError::Busy { .. }) => {}
                outcome => return outcome,
            },
            // Made by a privd that was killed before it went on; nobody else works on origins while we hold the lock.
            Some(Found { table: Table::None, .. }) => kernel.remove_when_unused(&name).map_err(at(Step::OpenOrigin))?,
            Some(Found {
                table: Table::Active(table),
                ..
            }) if !matches(&table, &expected) => {
                // The image was cut or extended in place below sandboxes that use it.
                return Err(PrivdError::Busy {
                    what: ResourceKind::Disk,
                });
            }
            Some(found) => match kernel.open(found.node, Access::ReadOnly) {
                // Minor numbers are used again: only if the name still leads to it, it is what we looked up, and now it stays.
                Ok(device) if kernel.find(&name).map_err(at(Step::OpenOrigin))?.as_ref() == Some(&found) => {
                    return Ok(OpenedDisk {
                        node: found.node,
                        device,
                    });
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    // On its way out: wait until it is gone, or anything else has changed.
                    kernel.wait(deadline).map_err(at(Step::OpenOrigin))?;
                }
                Err(error) => return Err(at(Step::OpenOrigin)(error)),
            },
        }
        if Instant::now() >= deadline {
            return Err(PrivdError::Busy {
                what: ResourceKind::Disk,
            });
        }
    }
}

/// Makes an origin. [`PrivdError::Busy`] when one of that name has appeared since it was looked up.
fn create_origin(kernel: &impl DiskKernel, spec: &DiskSpec, name: &str) -> Result<OpenedDisk, PrivdError> {
    let image = kernel
        .attach(spec.origin.as_fd(), LoopUse::Origin)
        .map_err(at(Step::AttachOriginLoop))?;
    let mut undo = Undo::default();
    let node = match kernel.create(name) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            return Err(PrivdError::Busy {
                what: ResourceKind::Disk,
            });
        }
        outcome => outcome.map_err(at(Step::CreateOrigin))?,
    };
    undo.add(Step::CreateOrigin, || kernel.remove_when_unused(name));
    kernel
        .load(name, &origin_table(spec, image.number), Access::ReadOnly)
        .map_err(at(Step::LoadOrigin))?;
    kernel.resume(name).map_err(at(Step::ResumeOrigin))?;
    let device = kernel.open(node, Access::ReadOnly).map_err(at(Step::OpenOrigin))?;
    kernel.remove_when_unused(name).map_err(at(Step::DeferOriginRemoval))?;
    undo.commit();
    Ok(OpenedDisk { node, device })
}

fn origin_table(spec: &DiskSpec, number: u32) -> Vec<Target> {
    let image = spec.image.length;
    let mut table = vec![Target {
        start: Sectors(0),
        length: image,
        map: Map::Linear { number },
    }];
    let behind = spec.size.0.saturating_sub(image.0);
    if behind > 0 {
        table.push(Target {
            start: image,
            length: Sectors(behind),
            map: Map::Zero,
        });
    }
    table
}

fn matches(found: &[(String, Sectors)], expected: &[Target]) -> bool {
    found.len() == expected.len()
        && found
            .iter()
            .zip(expected)
            .all(|((kind, length), target)| kind == target.map.kind() && *length == target.length)
}

impl Map {
    fn kind(&self) -> &'static str {
        match self {
            Self::Linear { .. } => "linear",
            Self::Zero => "zero",
            Self::Snapshot { .. } => "snapshot",
        }
    }

    /// The target's parameters; `dm` is device-mapper's major number.
    fn parameters(&self, dm: u32) -> String {
        let loops = loopdev::MAJOR;
        match self {
            Self::Linear { number } => format!("{loops}:{number} 0"),
            Self::Zero => String::new(),
            Self::Snapshot { origin, cow } => format!("{dm}:{} {loops}:{cow} P {CHUNK_SECTORS}", origin.minor),
        }
    }
}

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

/// Longest status line handed on; the kernel's own are some 40 bytes.
const MAX_STATUS: usize = 64;

impl RealKernel {
    /// The devices whose name and uuid start with `prefix`. One that goes while they are listed is left out.
    pub(crate) fn list(&self, prefix: &str) -> io::Result<Vec<Listed>> {
        let mut listed = Vec::new();
        for (name, _, _) in self.dm.list_devices().map_err(errno)? {
            if let Some(name) = name.to_string().strip_prefix(prefix) {
                listed.extend(self.describe(format!("{prefix}{name}"), prefix)?);
            }
        }
        Ok(listed)
    }

    /// How many disks there are: snapshots of sandboxes.
    pub(crate) fn count_disks(&self) -> io::Result<usize> {
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

    fn describe(&self, name: String, prefix: &str) -> io::Result<Option<Listed>> {
        let id = DevId::Name(dm_name(&name)?);
        let gone = |error: &io::Error| error.raw_os_error() == Some(libc::ENXIO);
        let options = DmOptions::default().set_flags(DmFlags::DM_NOFLUSH);
        let (info, lines) = match self.dm.table_status(&id, options).map_err(errno) {
            Err(error) if gone(&error) => return Ok(None),
            outcome => outcome?,
        };
        if !info.uuid().is_some_and(|uuid| uuid.to_string().starts_with(prefix)) {
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
