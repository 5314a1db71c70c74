//! The cage: what is prepared before the fork, and the few system calls between fork and exec.
//!
//! The child runs on prepared memory only (no allocation, no path lookup but exec's) and does, in this order, what would forbid
//! its predecessor: death signal, cgroup, resource limits, capabilities, no-new-privs, Landlock, descriptors, system calls, exec. Most of
//! these bind only the calling thread, so [`spawn`] insists on there being one. The first failure is written as `(step, errno)` to a
//! close-on-exec pipe, and the child ends; an end of file there is a successful exec.
//!
//! Not here: uid, groups and namespaces (the unit's), limits of the cgroup (`cgroup`), what the rules are (`profile`, `launch`).

pub(crate) mod filter;
pub(crate) mod sys;

use std::ffi::{CString, c_int, c_ulong};
use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr,
    RulesetCreatedAttr, Scope,
};
use nix::fcntl::OFlag;
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::wait::waitpid;
use nix::unistd::{Pid, getpid, getppid, pipe2, write};
use roost_common::shim::{LaunchStep, ShimError};

use self::filter::Filters;
use self::sys::{Argv, Forked};

/// Number of descriptors a VMM starts with, counted from 0: null, serial, messages, tap, API listener, events.
pub(crate) const DESCRIPTORS: usize = 6;
/// The tap's number in the VMM.
pub(crate) const TAP: c_int = 3;
/// The API listener's number in the VMM.
pub(crate) const API: c_int = 4;
/// The event pipe's number in the VMM.
pub(crate) const EVENTS: c_int = 5;

/// Descriptors that are about to be placed, and the error pipe, lie above all places: none is overwritten before its turn.
const ABOVE_PLACES: c_int = 16;
/// cloud-hypervisor grows its descriptor table to the limit at once, and needs some fifty.
const MAX_DESCRIPTORS: u64 = 1024;

/// What a rule allows on a file, or on everything below a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Allow {
    /// Execute and read.
    Execute,
    /// Read, and list where it is a directory.
    Read,
    /// Read, write, and a device's own ioctls.
    ReadWrite,
    /// The VMM's place for files: read, write, list, truncate, make regular files. No directories, links or removals.
    MakeFiles,
}

impl Allow {
    fn rights(self) -> BitFlags<AccessFs> {
        match self {
            Self::Execute => AccessFs::Execute | AccessFs::ReadFile,
            Self::Read => AccessFs::ReadFile | AccessFs::ReadDir,
            Self::ReadWrite => AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev,
            Self::MakeFiles => {
                AccessFs::ReadFile | AccessFs::ReadDir | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::MakeReg
            }
        }
    }
}

/// A Landlock ruleset that denies all of what this kernel's Landlock knows, up to ABI 9, except `rules`. Newer rights wait until
/// a kernel that has them has been tried.
///
/// # Errors
/// [`ShimError::NoLandlock`] where the kernel has none.
pub(crate) fn ruleset(rules: &[(OwnedFd, Allow)]) -> Result<OwnedFd, ShimError> {
    let failed = |error: landlock::RulesetError| failure(LaunchStep::BuildRuleset, &root_cause(&error));
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI::V9))
        .map_err(failed)?
        .handle_access(AccessNet::from_all(ABI::V9))
        .map_err(failed)?
        .scope(Scope::from_all(ABI::V9))
        .map_err(failed)?
        .create()
        .map_err(failed)?;
    for (file, allow) in rules {
        ruleset = ruleset
            .add_rule(PathBeneath::new(file, allow.rights()))
            .map_err(failed)?;
    }
    Option::<OwnedFd>::from(ruleset).ok_or(ShimError::NoLandlock)
}

/// The system's error at the end of a chain.
fn root_cause(error: &(dyn std::error::Error + 'static)) -> io::Error {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(errno) = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
            return io::Error::from_raw_os_error(errno);
        }
        cause = error.source();
    }
    io::Error::from_raw_os_error(libc::EINVAL)
}

/// A failed step as the answer to a launch.
pub(crate) fn failure(step: LaunchStep, error: &io::Error) -> ShimError {
    ShimError::Step {
        step,
        errno: error.raw_os_error().unwrap_or(libc::EIO),
    }
}

/// Everything a VMM is executed with.
pub(crate) struct Cage {
    /// The VMM.
    pub(crate) program: CString,
    /// Its arguments, its name among them.
    pub(crate) arguments: Vec<CString>,
    /// `cgroup.procs` of its cgroup; `None`: it stays in this process's.
    pub(crate) entrance: Option<OwnedFd>,
    /// Its Landlock rules.
    pub(crate) ruleset: OwnedFd,
    /// Its system calls.
    pub(crate) filters: Filters,
    /// Its descriptors 0 to 5.
    pub(crate) descriptors: [OwnedFd; DESCRIPTORS],
}

/// A VMM that has been executed, and is not reaped yet.
pub(crate) struct Process {
    /// Its process id.
    pub(crate) pid: u32,
    /// Its pidfd.
    pub(crate) pidfd: OwnedFd,
}

/// What the child works on.
struct Prepared {
    program: CString,
    arguments: Argv,
    entrance: Option<OwnedFd>,
    ruleset: OwnedFd,
    filters: Filters,
    descriptors: Vec<OwnedFd>,
    errors: OwnedFd,
    parent: Pid,
}

/// Executes the VMM in its cage.
///
/// # Errors
/// The step that failed, in this process or in the child; no process is left behind.
pub(crate) fn spawn(cage: Cage) -> Result<Process, ShimError> {
    assert_eq!(threads(), 1, "confinement binds one thread");
    let at = |step| move |error: io::Error| failure(step, &error);
    let above =
        |fd: &OwnedFd| sys::duplicate_from(fd.as_fd(), ABOVE_PLACES).map_err(at(LaunchStep::ArrangeDescriptors));
    let (outcome, errors) = pipe2(OFlag::O_CLOEXEC).map_err(|e| at(LaunchStep::OpenPipes)(e.into()))?;
    let mut prepared = Prepared {
        program: cage.program,
        arguments: Argv::new(cage.arguments),
        entrance: cage.entrance.as_ref().map(above).transpose()?,
        ruleset: above(&cage.ruleset)?,
        filters: cage.filters,
        descriptors: cage.descriptors.iter().map(above).collect::<Result<_, _>>()?,
        errors: above(&errors)?,
        parent: getpid(),
    };
    drop(errors);
    let pid = match sys::fork().map_err(at(LaunchStep::Fork))? {
        Forked::Child => run_child(&mut prepared),
        Forked::Parent(pid) => pid,
    };
    drop(prepared); // closes this side of the error pipe
    let mut record = Vec::with_capacity(RECORD);
    let told = fs::File::from(outcome).take(RECORD as u64).read_to_end(&mut record);
    let refused = match told {
        Err(error) => Some(failure(LaunchStep::Fork, &error)),
        Ok(0) => None,
        Ok(_) => Some(decode(&record)),
    };
    // The child has not been reaped, so its number is still its own.
    match (refused, sys::pidfd_open(pid)) {
        (None, Ok(pidfd)) => Ok(Process {
            pid: pid.unsigned_abs(),
            pidfd,
        }),
        (refused, watched) => {
            nix::sys::signal::kill(Pid::from_raw(pid), Signal::SIGKILL).ok(); // it may have ended by itself
            waitpid(Pid::from_raw(pid), None).ok();
            let unwatched = watched.err().map(|error| failure(LaunchStep::WatchProcess, &error));
            Err(refused.or(unwatched).expect("one of the two failed"))
        }
    }
}

/// How many threads this process has.
pub(crate) fn threads() -> usize {
    fs::read_dir("/proc/self/task").map_or(0, Iterator::count)
}

/// The child, from fork to exec.
fn run_child(prepared: &mut Prepared) -> ! {
    let Err((step, error)) = confine(prepared);
    let errno = error.raw_os_error().unwrap_or(libc::EIO);
    let record = encode(step, errno);
    // Below `PIPE_BUF`, so written whole; there is nobody else to tell if it cannot be.
    if write(&prepared.errors, &record).is_err() {
        sys::exit_now(126);
    }
    sys::exit_now(127)
}

/// Confines this process and executes the VMM: system calls only.
fn confine(prepared: &mut Prepared) -> Result<std::convert::Infallible, (LaunchStep, io::Error)> {
    let at = |step| move |error: io::Error| (step, error);
    let os = |step| move |error: nix::Error| (step, io::Error::from(error));

    prctl::set_pdeathsig(Signal::SIGKILL).map_err(os(LaunchStep::DeathSignal))?;
    if getppid() != prepared.parent {
        // The shim died before the signal was set, so it will never be sent.
        return Err((LaunchStep::DeathSignal, io::Error::from_raw_os_error(libc::ESRCH)));
    }
    if let Some(entrance) = &prepared.entrance {
        write(entrance, b"0").map_err(os(LaunchStep::EnterCgroup))?;
    }
    sys::default_action(libc::SIGPIPE).map_err(at(LaunchStep::DeathSignal))?; // ignored by Rust's start code
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None).map_err(os(LaunchStep::DeathSignal))?;

    for (resource, limit) in [(Resource::RLIMIT_NOFILE, MAX_DESCRIPTORS), (Resource::RLIMIT_CORE, 0)] {
        setrlimit(resource, limit, limit).map_err(os(LaunchStep::ResourceLimits))?;
    }

    drop_bounding_set().map_err(at(LaunchStep::DropCapabilities))?;
    // The unit has none to empty, and forbids the call.
    if sys::has_capabilities().map_err(at(LaunchStep::DropCapabilities))? {
        sys::empty_capabilities().map_err(at(LaunchStep::DropCapabilities))?;
    }
    prctl::set_no_new_privs().map_err(os(LaunchStep::NoNewPrivileges))?;
    sys::landlock_restrict_self(prepared.ruleset.as_fd()).map_err(at(LaunchStep::Landlock))?;

    for (number, descriptor) in (0..).zip(&prepared.descriptors) {
        sys::place(descriptor.as_fd(), number).map_err(at(LaunchStep::ArrangeDescriptors))?;
    }
    // All others but the error pipe, which exec closes.
    let errors = prepared.errors.as_raw_fd().unsigned_abs();
    for (first, last) in [(DESCRIPTORS as u32, errors - 1), (errors + 1, u32::MAX)] {
        sys::close_range(first, last).map_err(at(LaunchStep::ArrangeDescriptors))?;
    }
    prepared.filters.set_own_id(getpid().as_raw());
    for program in prepared.filters.programs() {
        sys::install_filter(program).map_err(at(LaunchStep::Seccomp))?;
    }
    Err((LaunchStep::Exec, sys::execve(&prepared.program, &prepared.arguments)))
}

/// Empties the bounding set. Without CAP_SETPCAP that is refused, and the set is then the unit's to empty: it bounds what exec
/// may add, which no_new_privs forbids as well.
fn drop_bounding_set() -> io::Result<()> {
    for capability in 0..64 as c_ulong {
        match sys::drop_bounding(capability) {
            Ok(()) => {}
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EPERM)) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Length of a failure's record: the step's number, then errno.
const RECORD: usize = 5;

fn encode(step: LaunchStep, errno: i32) -> [u8; RECORD] {
    let [a, b, c, d] = errno.to_le_bytes();
    [step as u8, a, b, c, d]
}

fn decode(record: &[u8]) -> ShimError {
    const STEPS: [LaunchStep; 9] = [
        LaunchStep::DeathSignal,
        LaunchStep::EnterCgroup,
        LaunchStep::ResourceLimits,
        LaunchStep::DropCapabilities,
        LaunchStep::NoNewPrivileges,
        LaunchStep::Landlock,
        LaunchStep::Seccomp,
        LaunchStep::ArrangeDescriptors,
        LaunchStep::Exec,
    ];
    let &[step, a, b, c, d] = record else {
        return failure(LaunchStep::Fork, &io::ErrorKind::UnexpectedEof.into());
    };
    ShimError::Step {
        step: STEPS
            .into_iter()
            .find(|known| *known as u8 == step)
            .unwrap_or(LaunchStep::Fork),
        errno: i32::from_le_bytes([a, b, c, d]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_failure_of_the_child_is_told_as_it_was() {
        for step in [LaunchStep::DeathSignal, LaunchStep::Landlock, LaunchStep::Exec] {
            for errno in [1, 2, 133, i32::MAX] {
                assert_eq!(decode(&encode(step, errno)), ShimError::Step { step, errno });
            }
        }
        assert!(matches!(decode(&[1]), ShimError::Step { .. }));
    }
}
