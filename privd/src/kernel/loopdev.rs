//! Loop devices: a regular file as a block device.
//!
//! Holds: file, flags and autoclear are set by one `LOOP_CONFIGURE`, so a loop never exists without its end being decided: it
//! detaches when the last user of its device is gone, a killed privd included. There is nothing to undo.
//! Not here: which file (the agent opens it), whether it may be one (`check`).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

use super::sys;

/// Major number of loop devices.
pub(crate) const MAJOR: u32 = 7;

/// How often an attach starts over because another one took the free loop first. Eight calls run at a time, and others on the
/// host attach loops too; so many defeats in a row mean that something is wrong.
const ATTEMPTS: usize = 64;

/// What a loop is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LoopUse {
    /// An image: read-only, through the page cache that all its readers share.
    Origin,
    /// A sandbox's exception store: written, and past the page cache, which would only hold every block twice.
    Cow,
}

/// An attached loop. It lives for as long as `device` is open or a device-mapper table uses it.
#[derive(Debug)]
pub(crate) struct Loop {
    /// Number of the loop, `/dev/loopN`.
    pub(crate) number: u32,
    /// Keeps it.
    #[expect(dead_code, reason = "held to keep the loop until a table does")]
    pub(crate) device: OwnedFd,
}

impl Loop {
    /// A loop held by `device`.
    pub(crate) fn new(number: u32, device: OwnedFd) -> Self {
        Self { number, device }
    }
}

/// Attaches `file` to a free loop device.
///
/// # Errors
/// The kernel's; nothing is attached then.
pub(crate) fn attach(file: BorrowedFd<'_>, usage: LoopUse) -> io::Result<Loop> {
    let control = File::open("/dev/loop-control")?;
    for _ in 0..ATTEMPTS {
        let number = sys::loop_ctl_get_free(control.as_fd())?;
        let path = format!("/dev/loop{number}");
        let device = match open(path.as_str(), OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()) {
            Ok(device) => device,
            // Removed by hand between the two calls.
            Err(nix::Error::ENXIO | nix::Error::ENOENT) => continue,
            Err(errno) => return Err(errno.into()),
        };
        match configure(device.as_fd(), file, usage) {
            Ok(()) => return Ok(Loop::new(number, device)),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::from_raw_os_error(libc::EBUSY))
}

fn configure(device: BorrowedFd<'_>, file: BorrowedFd<'_>, usage: LoopUse) -> io::Result<()> {
    match usage {
        LoopUse::Origin => sys::loop_configure(device, file, sys::LO_FLAGS_AUTOCLEAR | sys::LO_FLAGS_READ_ONLY),
        LoopUse::Cow => {
            let direct = sys::loop_configure(device, file, sys::LO_FLAGS_AUTOCLEAR | sys::LO_FLAGS_DIRECT_IO);
            match direct {
                // Most kernels fall back by themselves on a filesystem without direct I/O; the others say so.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                    sys::loop_configure(device, file, sys::LO_FLAGS_AUTOCLEAR)
                }
                outcome => outcome,
            }
        }
    }
}
