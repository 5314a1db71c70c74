//! Freezing the filesystems that are on disks, and thawing them: what the kernel is asked, in which order, and what is
//! undone when it refuses.
//!
//! Holds: a call that fails leaves no filesystem frozen that it froze itself.
//! Not here: whether the guest is frozen, and what waits for that to end (`filesystems`).

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use nix::sys::stat::{major, minor};

use crate::cgroups::CgroupError;
use crate::console::{chain, say};
use crate::mountinfo::{Device, DiskFilesystem, disk_filesystems};
use crate::sys;

/// Why filesystems are not frozen, or not thawed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FreezeError {
    #[error("the mounts cannot be read")]
    Mounts(#[source] io::Error),
    #[error("{} cannot be opened", .0.display())]
    Open(PathBuf, #[source] io::Error),
    #[error("{} cannot be frozen", .0.display())]
    Freeze(PathBuf, #[source] io::Error),
    #[error("{} cannot be thawed", .0.display())]
    Thaw(PathBuf, #[source] io::Error),
    #[error("it took too long")]
    Late,
    #[error("the programs do not go on")]
    Release(#[source] CgroupError),
}

/// A filesystem that can be frozen: the kernel's, or a test's.
pub(crate) trait Filesystem {
    /// Where it is mounted.
    fn point(&self) -> PathBuf;
    fn is_root(&self) -> bool;
    fn freeze(&self) -> io::Result<()>;
    fn thaw(&self) -> io::Result<()>;
}

/// A filesystem by its open root. That stays what it is when something is mounted over it, or it is unmounted: as long as
/// it is held, what was frozen through it can be thawed.
pub(crate) struct Mounted {
    filesystem: DiskFilesystem,
    at: PathBuf,
    directory: File,
}

impl Mounted {
    /// All that are to be frozen, in that order.
    ///
    /// # Errors
    /// [`FreezeError::Mounts`]; [`FreezeError::Open`] for the root.
    pub(crate) fn all() -> Result<Vec<Self>, FreezeError> {
        let text = fs::read("/proc/self/mountinfo").map_err(FreezeError::Mounts)?;
        let mut all = Vec::new();
        for filesystem in disk_filesystems(&text) {
            let is_root = filesystem.is_root();
            match Self::open(filesystem) {
                Ok(mounted) => all.push(mounted),
                Err(error) if is_root => return Err(error),
                // Hidden behind other mounts. It lies on the root's disk, directly or not: that one holds up its writes.
                Err(error) => say!("passed over: {}", chain(&error)),
            }
        }
        Ok(all)
    }

    fn open(filesystem: DiskFilesystem) -> Result<Self, FreezeError> {
        let mut failed = None;
        for point in &filesystem.points {
            match open_directory(point, &filesystem) {
                Ok(directory) => {
                    return Ok(Self {
                        at: point.clone(),
                        directory,
                        filesystem,
                    });
                }
                Err(error) => failed = failed.or(Some((point.clone(), error))),
            }
        }
        let (point, error) = failed.expect("a filesystem of mountinfo is mounted somewhere");
        Err(FreezeError::Open(point, error))
    }
}

/// Opens a mount point and makes sure that it is not one of another filesystem, mounted over it.
fn open_directory(point: &PathBuf, filesystem: &DiskFilesystem) -> io::Result<File> {
    // A mount of a single file may be one of a device or a pipe, which must not be opened.
    let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let directory = OpenOptions::new().read(true).custom_flags(flags).open(point)?;
    let device = directory.metadata()?.dev();
    let device = Device {
        major: major(device),
        minor: minor(device),
    };
    // btrfs gives each subvolume a number of its own, which mountinfo does not have.
    if device == filesystem.device || filesystem.device.major == 0 {
        Ok(directory)
    } else {
        Err(io::Error::other("another filesystem is mounted over it"))
    }
}

impl Filesystem for Mounted {
    fn point(&self) -> PathBuf {
        self.at.clone()
    }

    fn is_root(&self) -> bool {
        self.filesystem.is_root()
    }

    fn freeze(&self) -> io::Result<()> {
        sys::freeze(self.directory.as_fd())
    }

    fn thaw(&self) -> io::Result<()> {
        sys::thaw(self.directory.as_fd())
    }
}

/// One attempt to freeze, which another thread can end while it waits in the kernel.
pub(crate) struct Attempt<F>(Mutex<Progress<F>>);

struct Progress<F> {
    given_up: bool,
    /// By this attempt, in this order.
    frozen: Vec<Arc<F>>,
}

impl<F: Filesystem> Attempt<F> {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(Progress {
            given_up: false,
            frozen: Vec::new(),
        }))
    }

    /// Freezes in the given order; those that are frozen already stay so. Returns what it froze itself. Blocks.
    ///
    /// # Errors
    /// [`FreezeError::Freeze`], and [`FreezeError::Late`] after [`Attempt::give_up`]; what it froze is thawed.
    pub(crate) fn run(&self, filesystems: Vec<F>) -> Result<Vec<Arc<F>>, FreezeError> {
        for filesystem in filesystems {
            if self.progress().given_up {
                return Err(FreezeError::Late);
            }
            let filesystem = Arc::new(filesystem);
            // Not under the lock: it may wait until the attempt is given up.
            match filesystem.freeze() {
                Ok(()) => {
                    let mut progress = self.progress();
                    if progress.given_up {
                        // The others have been thawed already.
                        drop(progress);
                        thaw_or_say(&*filesystem);
                        return Err(FreezeError::Late);
                    }
                    progress.frozen.push(filesystem);
                }
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) && !filesystem.is_root() => {
                    // As for those that are hidden: it lies on the root's disk.
                    say!("{} is of a kind that cannot be frozen", filesystem.point().display());
                }
                Err(error) => {
                    self.undo();
                    return Err(FreezeError::Freeze(filesystem.point(), error));
                }
            }
        }
        Ok(std::mem::take(&mut self.progress().frozen))
    }

    /// Thaws what the attempt has frozen so far, and has it end with the next answer of the kernel. That may be what the
    /// kernel waits for: a disk that is served by a program in the guest, which wants to write to a frozen filesystem.
    pub(crate) fn give_up(&self) {
        self.progress().given_up = true;
        self.undo();
    }

    fn undo(&self) {
        let frozen = std::mem::take(&mut self.progress().frozen);
        for filesystem in frozen.iter().rev() {
            thaw_or_say(&**filesystem);
        }
    }

    fn progress(&self) -> MutexGuard<'_, Progress<F>> {
        self.0.lock().expect("no holder of an attempt panics")
    }
}

fn thaw_or_say(filesystem: &impl Filesystem) {
    if let Err(error) = thaw(filesystem) {
        say!("undoing a freeze: {}", chain(&error));
    }
}

/// Thaws all of them, past failures; those that are not frozen stay so. The order is that of freezing, and gone through
/// from its end: thawing writes too, so what a filesystem lies on comes before it.
///
/// # Errors
/// [`FreezeError::Thaw`], the first.
pub(crate) fn thaw_all<'a, F: Filesystem + 'a>(
    in_order_of_freezing: impl DoubleEndedIterator<Item = &'a F>,
) -> Result<(), FreezeError> {
    let mut result = Ok(());
    for filesystem in in_order_of_freezing.rev() {
        result = result.and(thaw(filesystem));
    }
    result
}

fn thaw(filesystem: &impl Filesystem) -> Result<(), FreezeError> {
    match filesystem.thaw() {
        Err(error) if error.raw_os_error() != Some(libc::EINVAL) => Err(FreezeError::Thaw(filesystem.point(), error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::mpsc;

    use super::*;

    /// Freezes and thaws as the kernel does, and remembers in which order.
    #[derive(Default)]
    struct Kernel {
        frozen: Mutex<Vec<&'static str>>,
        log: Mutex<Vec<String>>,
        refusals: BTreeMap<&'static str, i32>,
        /// The filesystem whose freezing waits until nothing is frozen; and whom to tell that it waits.
        stuck: Option<(&'static str, mpsc::SyncSender<()>)>,
        thawed: std::sync::Condvar,
    }

    struct Fake<'a>(&'static str, &'a Kernel);

    impl Kernel {
        fn frozen(&self) -> Vec<&'static str> {
            self.frozen.lock().unwrap().clone()
        }

        fn log(&self) -> String {
            std::mem::take(&mut *self.log.lock().unwrap()).join(" ")
        }

        fn with<'a>(&'a self, points: &[&'static str]) -> Vec<Fake<'a>> {
            points.iter().map(|point| Fake(point, self)).collect()
        }

        fn freeze<'a>(&'a self, points: &[&'static str]) -> Result<Vec<Arc<Fake<'a>>>, FreezeError> {
            Attempt::new().run(self.with(points))
        }
    }

    impl Filesystem for Fake<'_> {
        fn point(&self) -> PathBuf {
            self.0.into()
        }

        fn is_root(&self) -> bool {
            self.0 == "/"
        }

        fn freeze(&self) -> io::Result<()> {
            let Self(point, kernel) = self;
            if let Some(errno) = kernel.refusals.get(point) {
                return Err(io::Error::from_raw_os_error(*errno));
            }
            let mut frozen = kernel.frozen.lock().unwrap();
            if let Some((stuck, told)) = &kernel.stuck
                && stuck == point
            {
                told.send(()).unwrap();
                frozen = kernel.thawed.wait_while(frozen, |frozen| !frozen.is_empty()).unwrap();
            }
            if frozen.contains(point) {
                return Err(io::Error::from_raw_os_error(libc::EBUSY));
            }
            frozen.push(point);
            kernel.log.lock().unwrap().push(format!("+{point}"));
            Ok(())
        }

        fn thaw(&self) -> io::Result<()> {
            let Self(point, kernel) = self;
            let mut frozen = kernel.frozen.lock().unwrap();
            let Some(index) = frozen.iter().position(|frozen| frozen == point) else {
                return Err(io::Error::from_raw_os_error(libc::EINVAL));
            };
            frozen.remove(index);
            kernel.log.lock().unwrap().push(format!("-{point}"));
            kernel.thawed.notify_all();
            Ok(())
        }
    }

    #[test]
    fn freezing_goes_in_order_and_thawing_back() {
        let kernel = Kernel::default();
        let held = kernel.freeze(&["/b", "/a", "/"]).unwrap();
        assert_eq!(kernel.log(), "+/b +/a +/");
        thaw_all(held.iter().map(|held| &**held)).unwrap();
        assert_eq!(kernel.log(), "-/ -/a -/b");
    }

    #[test]
    fn what_is_frozen_already_is_neither_a_failure_nor_ours() {
        let kernel = Kernel::default();
        kernel.freeze(&["/a"]).unwrap();
        let held = kernel.freeze(&["/b", "/a", "/"]).unwrap();
        let held: Vec<_> = held.iter().map(|held| held.0).collect();
        assert_eq!(held, ["/b", "/"]);
        assert!(kernel.freeze(&["/b", "/a", "/"]).unwrap().is_empty());
    }

    #[test]
    fn a_failure_thaws_what_this_call_froze_newest_first_and_names_the_mount() {
        let kernel = Kernel {
            refusals: BTreeMap::from([("/", libc::EIO)]),
            ..Default::default()
        };
        kernel.freeze(&["/old"]).unwrap();
        kernel.log();
        let error = kernel.freeze(&["/c", "/old", "/b", "/"]).err().unwrap();
        assert_eq!(error.to_string(), "/ cannot be frozen");
        assert_eq!(kernel.log(), "+/c +/b -/b -/c");
        assert_eq!(kernel.frozen(), ["/old"]);
    }

    #[test]
    fn a_kind_that_cannot_be_frozen_is_passed_over_unless_it_is_the_root() {
        let kernel = Kernel {
            refusals: BTreeMap::from([("/fat", libc::EOPNOTSUPP)]),
            ..Default::default()
        };
        assert_eq!(kernel.freeze(&["/fat", "/"]).unwrap().len(), 1);
        let kernel = Kernel {
            refusals: BTreeMap::from([("/", libc::EOPNOTSUPP)]),
            ..Default::default()
        };
        assert!(matches!(
            kernel.freeze(&["/a", "/"]),
            Err(FreezeError::Freeze(point, _)) if point.as_os_str() == "/"
        ));
        assert_eq!(kernel.frozen(), [""; 0]);
    }

    #[test]
    fn giving_up_frees_a_freeze_that_waits_for_one_before_it() {
        let (tell, told) = mpsc::sync_channel(1);
        let kernel = Kernel {
            stuck: Some(("/stuck", tell)),
            ..Default::default()
        };
        let attempt = Attempt::new();
        let result = std::thread::scope(|scope| {
            let run = scope.spawn(|| attempt.run(kernel.with(&["/a", "/stuck", "/"])).map(|held| held.len()));
            told.recv().unwrap();
            attempt.give_up();
            run.join().unwrap()
        });
        assert!(matches!(result, Err(FreezeError::Late)), "{result:?}");
        assert_eq!(kernel.log(), "+/a -/a +/stuck -/stuck");
    }

    #[test]
    fn thawing_what_is_not_frozen_is_no_failure() {
        let kernel = Kernel::default();
        thaw_all(kernel.with(&["/a", "/"]).iter()).unwrap();
        assert_eq!(kernel.log(), "");
    }

    #[test]
    fn the_disks_of_this_machine_can_be_opened_and_none_is_opened_twice() {
        let mut devices: Vec<_> = Mounted::all()
            .unwrap()
            .into_iter()
            .map(|mounted| (mounted.filesystem.device.major, mounted.filesystem.device.minor))
            .collect();
        let count = devices.len();
        devices.sort_unstable();
        devices.dedup();
        assert_eq!(devices.len(), count);
    }
}
