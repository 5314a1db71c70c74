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

#[cfg(test)]
mod fake;
mod real;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use roost_common::names;
use roost_common::privd::{DiskNode, PrivdError, ResourceKind, Step};
use roost_common::units::{CHUNK_SECTORS, Sectors};

use super::loopdev::{self, Loop, LoopUse};
use super::{BUSY, at};
use crate::check::DiskSpec;
use crate::undo::Undo;

pub(crate) use real::RealKernel;

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
    /// Whether its uuid is the one that we give to a device of its name.
    pub(crate) is_ours: bool,
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
                // Made by another since we looked, which is a change to look again for.
                Err(PrivdError::Busy { .. }) => {
                    kernel.wait(deadline).map_err(at(Step::CreateOrigin))?;
                }
                outcome => return outcome,
            },
            // Somebody else's that has the name: not shared, and not removed.
            Some(Found { is_ours: false, .. }) => {
                return Err(PrivdError::Busy {
                    what: ResourceKind::Disk,
                });
            }
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

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use super::fake::FakeKernel;
    use super::*;

    /// Every step of a disk whose origin is not there yet, in order.
    const STEPS: [Step; 13] = [
        Step::AttachOriginLoop,
        Step::CreateOrigin,
        Step::LoadOrigin,
        Step::ResumeOrigin,
        Step::OpenOrigin,
        Step::DeferOriginRemoval,
        Step::AttachCowLoop,
        Step::CreateSnapshot,
        Step::LoadSnapshot,
        Step::ResumeSnapshot,
        Step::OpenSnapshot,
        Step::DeferRemoval,
        Step::GiveNode,
    ];

    #[test]
    fn a_failure_at_any_step_leaves_the_kernel_as_it_was() {
        for step in STEPS {
            let kernel = FakeKernel::failing_at(step);
            let failure = open_snapshot(&kernel, &DiskSpec::sample("a", 64)).expect_err("failed");
            assert_eq!(failure, PrivdError::Kernel { step, errno: libc::EIO });
            assert!(
                kernel.inventory().is_empty(),
                "left after {step:?}: {:?}",
                kernel.inventory()
            );
        }
    }

    #[test]
    fn a_failure_at_any_step_leaves_the_disks_that_are_there() {
        for step in STEPS.into_iter().filter(|step| *step >= Step::OpenOrigin) {
            let kernel = FakeKernel::default();
            let _other = open_snapshot(&kernel, &DiskSpec::sample("other", 64)).expect("opened");
            let before = kernel.inventory();
            kernel.fail_at(step);
            let outcome = open_snapshot(&kernel, &DiskSpec::sample("a", 64));
            // The origin is there already, so it is not marked again.
            assert_eq!(outcome.is_err(), step != Step::DeferOriginRemoval, "{step:?}");
            drop(outcome);
            assert_eq!(kernel.inventory(), before, "after {step:?}");
        }
    }

    #[test]
    fn a_disk_and_its_loops_go_with_its_descriptor() {
        let kernel = FakeKernel::default();
        let disk = open_snapshot(&kernel, &DiskSpec::sample("a", 64)).expect("opened");
        assert_eq!(kernel.inventory().len(), 4, "{:?}", kernel.inventory());
        assert_eq!(kernel.owner(disk.node), Some(61184));
        drop(disk);
        assert!(kernel.inventory().is_empty(), "{:?}", kernel.inventory());
    }

    #[test]
    fn the_origin_is_shared_and_goes_with_the_last_disk() {
        let kernel = FakeKernel::default();
        let one = open_snapshot(&kernel, &DiskSpec::sample("a", 64)).expect("opened");
        let two = open_snapshot(&kernel, &DiskSpec::sample("b", 64)).expect("opened");
        let larger = open_snapshot(&kernel, &DiskSpec::sample("c", 128)).expect("opened");
        let origins = || {
            kernel
                .inventory()
                .iter()
                .filter(|name| name.starts_with("roost-o-"))
                .count()
        };
        assert_eq!(origins(), 2, "one for each size");
        drop(one);
        assert_eq!(origins(), 2);
        drop((two, larger));
        assert_eq!(origins(), 0);
    }

    #[test]
    fn an_origin_is_the_image_and_zeros_up_to_the_disks_size() {
        let spec = DiskSpec::sample("a", 64);
        let image = spec.image.length;
        let [linear, zero] = &origin_table(&spec, 3)[..] else {
            panic!("not two targets");
        };
        assert_eq!(
            (linear.start, linear.length, &linear.map),
            (Sectors(0), image, &Map::Linear { number: 3 })
        );
        assert_eq!(
            (zero.start, zero.length, &zero.map),
            (image, Sectors(64 - image.0), &Map::Zero)
        );
        let exact = DiskSpec::sample("a", image.0);
        assert_eq!(origin_table(&exact, 3).len(), 1);
    }

    #[test]
    fn tables_read_as_the_kernel_wants_them() {
        let origin = DiskNode { minor: 5 };
        assert_eq!(Map::Snapshot { origin, cow: 2 }.parameters(254), "254:5 7:2 P 8");
        assert_eq!(Map::Linear { number: 9 }.parameters(254), "7:9 0");
    }

    #[test]
    fn an_origin_left_without_a_table_is_made_again() {
        let kernel = FakeKernel::default();
        let spec = DiskSpec::sample("a", 64);
        let name = names::origin(spec.image.device, spec.image.inode, spec.size);
        kernel.create(&name).expect("created");
        let disk = open_snapshot(&kernel, &spec).expect("opened");
        drop(disk);
        assert!(kernel.inventory().is_empty());
    }

    #[test]
    fn a_device_of_somebody_elses_is_neither_shared_nor_removed() {
        let spec = DiskSpec::sample("a", 64);
        let origin = names::origin(spec.image.device, spec.image.inode, spec.size);
        for (name, table) in [
            (&origin, None),
            (&origin, Some(origin_table(&spec, 0))),
            (&names::disk(&spec.sandbox), None),
        ] {
            let kernel = FakeKernel::default();
            kernel.create_foreign(name, table);
            let refused = open_snapshot(&kernel, &spec).expect_err("took it for ours");
            let what = ResourceKind::Disk;
            assert_eq!(refused, PrivdError::Busy { what });
            assert_eq!(kernel.inventory(), [name.as_str()]);
        }
    }

    #[test]
    fn an_origin_that_goes_while_it_is_looked_up_is_made_again() {
        let kernel = FakeKernel::default();
        let first = open_snapshot(&kernel, &DiskSpec::sample("a", 64)).expect("opened");
        kernel.at_next_open(move || drop(first));
        let second = open_snapshot(&kernel, &DiskSpec::sample("b", 64)).expect("opened");
        assert_eq!(kernel.inventory().len(), 4, "{:?}", kernel.inventory());
        drop(second);
        assert!(kernel.inventory().is_empty());
    }

    #[test]
    fn an_origin_that_another_makes_first_is_shared() {
        let kernel = Rc::new(FakeKernel::default());
        let others = Rc::new(RefCell::new(None));
        let (there, opened) = (Rc::clone(&kernel), Rc::clone(&others));
        kernel.at_next_create(move || {
            // Another process: our lock means nothing to it.
            let spec = DiskSpec::sample("other", 64);
            let name = names::origin(spec.image.device, spec.image.inode, spec.size);
            *opened.borrow_mut() = Some(create_origin(&*there, &spec, &name).expect("made"));
        });
        let disk = open_snapshot(&*kernel, &DiskSpec::sample("a", 64)).expect("opened");
        let origins = kernel
            .inventory()
            .iter()
            .filter(|name| name.starts_with("roost-o-"))
            .count();
        assert_eq!(origins, 1);
        others.take();
        assert_eq!(kernel.inventory().len(), 4, "{:?}", kernel.inventory());
        drop(disk);
        assert!(kernel.inventory().is_empty(), "{:?}", kernel.inventory());
    }

    #[test]
    fn an_origin_of_an_image_cut_in_place_is_not_shared() {
        let kernel = FakeKernel::default();
        let _first = open_snapshot(&kernel, &DiskSpec::sample("a", 64)).expect("opened");
        let mut cut = DiskSpec::sample("b", 64);
        cut.image.length = Sectors(8);
        assert_eq!(
            open_snapshot(&kernel, &cut).expect_err("shared"),
            PrivdError::Busy {
                what: ResourceKind::Disk
            }
        );
    }

    #[test]
    fn a_name_that_is_taken_is_waited_for_and_then_busy() {
        let kernel = FakeKernel::default();
        let first = open_snapshot(&kernel, &DiskSpec::sample("a", 64)).expect("opened");
        let before = kernel.inventory();
        let busy = open_snapshot(&kernel, &DiskSpec::sample("a", 64)).expect_err("twice");
        assert_eq!(
            busy,
            PrivdError::Busy {
                what: ResourceKind::Disk
            }
        );
        assert_eq!(kernel.inventory(), before);
        // It goes while the next one waits.
        kernel.at_next_wait(move || drop(first));
        open_snapshot(&kernel, &DiskSpec::sample("a", 64)).expect("opened at last");
    }
}
