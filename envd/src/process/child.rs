//! What happens in a child between fork and exec.
//!
//! Invariant: everything here is a system call on values made before the fork. The child of a process with threads may
//! not allocate or take a lock: whoever held it is not there to let go.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Uid, chdir, setgroups, setresgid, setresuid, setsid, write};

use crate::sys;

/// What a child becomes before it runs the program.
pub(crate) struct ChildSetup {
    /// Absent when the child keeps envd's own identity, which needs no privilege.
    pub(crate) credentials: Option<Credentials>,
    pub(crate) workdir: CString,
    /// What becomes the controlling terminal.
    pub(crate) terminal: Option<OwnedFd>,
    /// Takes one byte, the [`Step`], when a step fails. Close-on-exec: end-of-file means all steps went well.
    pub(crate) report: OwnedFd,
}

/// Who a child runs as.
pub(crate) struct Credentials {
    pub(crate) uid: Uid,
    pub(crate) gid: Gid,
    pub(crate) groups: Vec<Gid>,
}

/// The steps that can fail, as the byte on the report pipe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Step {
    Session = 1,
    Descriptors = 2,
    Identity = 3,
    Workdir = 4,
}

impl Step {
    pub(crate) fn from_byte(byte: u8) -> Option<Self> {
        [Step::Session, Step::Descriptors, Step::Identity, Step::Workdir]
            .into_iter()
            .find(|step| *step as u8 == byte)
    }
}

/// Children are to be killed before envd when memory runs out; their own children inherit it.
const OOM_SCORE: &CStr = c"/proc/self/oom_score_adj";
const OOM_SCORE_RAISED: &[u8] = b"100";

/// What a login gives: select(2) breaks above it, and who needs more may raise it up to envd's own.
const OPEN_FILES: u64 = 1024;

impl ChildSetup {
    /// Makes the child what it is to be. The order matters: identity goes before the working directory, which must be
    /// reachable for the user, and after what needs envd's own privilege.
    pub(crate) fn enter(&self) -> io::Result<()> {
        self.steps().map_err(|(step, errno)| {
            // Nobody to tell when this fails; the parent then takes it for a failed exec.
            write(&self.report, &[step as u8]).ok();
            errno.into()
        })
    }

    fn steps(&self) -> Result<(), (Step, Errno)> {
        // Ignored signals stay ignored across exec, and Rust programs ignore SIGPIPE. The signal mask is std's to
        // reset.
        (1..=64).for_each(sys::reset_signal);
        // A session of its own: a signal to the process group reaches what the program starts, and never envd.
        setsid().map_err(|errno| (Step::Session, errno))?;
        if let Some(terminal) = &self.terminal {
            sys::set_controlling_terminal(terminal.as_fd()).map_err(|errno| (Step::Session, errno))?;
        }
        umask(Mode::S_IWGRP | Mode::S_IWOTH);
        // Both are kindnesses: without /proc, or with less privilege, the program runs all the same.
        getrlimit(Resource::RLIMIT_NOFILE)
            .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES.min(hard), hard))
            .ok();
        if let Ok(file) = open(OOM_SCORE, OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty()) {
            write(&file, OOM_SCORE_RAISED).ok();
        }
        sys::close_on_exec_from(3).map_err(|error| {
            (
                Step::Descriptors,
                Errno::from_raw(error.raw_os_error().unwrap_or_default()),
            )
        })?;
        if let Some(Credentials { uid, gid, groups }) = &self.credentials {
            setgroups(groups)
                .and_then(|()| setresgid(*gid, *gid, *gid))
                .and_then(|()| setresuid(*uid, *uid, *uid))
                .map_err(|errno| (Step::Identity, errno))?;
        }
        chdir(self.workdir.as_c_str()).map_err(|errno| (Step::Workdir, errno))
    }
}
