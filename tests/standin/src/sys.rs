//! A child that does not outlive us.
#![allow(
    unsafe_code,
    reason = "pre_exec runs code between fork and exec, and passed descriptors come as numbers"
)]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getpid, getppid};

/// Has the kernel kill the child when the thread that starts it ends.
pub(crate) fn die_with_us(command: &mut Command) -> &mut Command {
    let us = getpid();
    // SAFETY: between fork and exec the closure makes two system calls on values it owns; it neither allocates nor locks.
    unsafe { command.pre_exec(move || tie_to(us)) }
}

fn tie_to(parent: Pid) -> io::Result<()> {
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    // The parent may have ended before the signal was asked for.
    if getppid() == parent {
        Ok(())
    } else {
        Err(io::Error::from(Errno::ESRCH))
    }
}

/// Takes a descriptor that our command line names.
pub(crate) fn passed(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD reads a flag of the descriptor table; any number is fine.
    if unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, and the command line hands it to us: each option takes its own number, once.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
