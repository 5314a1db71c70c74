//! The system calls that no safe wrapper offers, or none that is safe between fork and exec: one each, nothing decided here.
#![allow(
    unsafe_code,
    reason = "fork, exec and what only makes sense between them; see SAFETY at each block"
)]

use std::ffi::{CStr, CString, c_char, c_int, c_long, c_uint, c_ulong};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use roost_common::shim::WaitStatus;
use seccompiler::sock_filter;

/// Arguments of a program with the table of pointers that `execve` wants, so that nothing is allocated after a fork.
pub(crate) struct Argv {
    pointers: Vec<*const c_char>,
    /// Owns what `pointers` points at; a `CString`'s bytes stay where they are when it moves.
    _strings: Vec<CString>,
}

impl Argv {
    /// Takes the arguments, the program's name among them.
    pub(crate) fn new(strings: Vec<CString>) -> Self {
        let pointers = strings.iter().map(|s| s.as_ptr()).chain([ptr::null()]).collect();
        Self {
            pointers,
            _strings: strings,
        }
    }
}

/// Which side of a fork this is.
pub(crate) enum Forked {
    /// The process that forked, and the child's id.
    Parent(c_int),
    /// The new process.
    Child,
}

fn check(result: c_long) -> io::Result<c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Forks. The caller has one thread (it asserts so), which leaves no lock held in the child.
pub(crate) fn fork() -> io::Result<Forked> {
    // SAFETY: fork has no memory preconditions; with a single thread the child is a complete copy and may run any code.
    match check(c_long::from(unsafe { libc::fork() }))? {
        0 => Ok(Forked::Child),
        pid => Ok(Forked::Parent(pid as c_int)),
    }
}

/// Ends this process without unwinding, exit handlers or flushing.
pub(crate) fn exit_now(code: c_int) -> ! {
    // SAFETY: _exit takes a number and does not return.
    unsafe { libc::_exit(code) }
}

/// Replaces this process by `program`, with an empty environment. Returns only to say why it could not.
pub(crate) fn execve(program: &CStr, arguments: &Argv) -> io::Error {
    let environment: [*const c_char; 1] = [ptr::null()];
    // SAFETY: `program` ends in NUL; both tables end in a null pointer, and each pointer before it is to a NUL-terminated string
    // that `arguments` owns.
    unsafe { libc::execve(program.as_ptr(), arguments.pointers.as_ptr(), environment.as_ptr()) };
    io::Error::last_os_error()
}

/// A descriptor for `process`, a child that has not been reaped.
pub(crate) fn pidfd_open(process: c_int) -> io::Result<OwnedFd> {
    // SAFETY: two numbers; no flags.
    let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_open, process, 0) })?;
    // SAFETY: the kernel made this descriptor (close-on-exec, always) for us just now and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Sends SIGKILL to the process behind a pidfd.
pub(crate) fn kill(process: BorrowedFd<'_>) -> io::Result<()> {
    let (fd, info) = (process.as_raw_fd(), ptr::null::<libc::siginfo_t>());
    // SAFETY: a null siginfo asks for what kill(2) would fill in.
    check(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, libc::SIGKILL, info, 0) }).map(drop)
}

/// Reaps the child behind a pidfd, waiting for it: its exit code, or the signal that ended it. nix has no answer for a child that
/// ends by a real-time signal, and a VMM can choose that.
pub(crate) fn reap(process: BorrowedFd<'_>) -> io::Result<WaitStatus> {
    // SAFETY: an all-zero siginfo is valid.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let id = process.as_raw_fd().unsigned_abs();
    // SAFETY: waitid writes one siginfo.
    check(c_long::from(unsafe {
        libc::waitid(libc::P_PIDFD, id, &raw mut info, libc::WEXITED)
    }))?;
    // SAFETY: waitid fills the status of a SIGCHLD siginfo.
    let status = unsafe { info.si_status() };
    Ok(if info.si_code == libc::CLD_EXITED {
        WaitStatus::Exited(status)
    } else {
        WaitStatus::Signaled(status)
    })
}

/// Sets a signal to its default action: an ignored one would stay ignored across exec.
pub(crate) fn default_action(signal: c_int) -> io::Result<()> {
    // SAFETY: SIG_DFL installs no handler.
    if unsafe { libc::signal(signal, libc::SIG_DFL) } == libc::SIG_ERR {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Removes one capability from the bounding set; `EINVAL` beyond the last one, `EPERM` without CAP_SETPCAP.
pub(crate) fn drop_bounding(capability: c_ulong) -> io::Result<()> {
    // SAFETY: numbers only.
    check(c_long::from(unsafe {
        libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0)
    }))
    .map(drop)
}

/// Version 3 of capget and capset, for the calling thread. The kernel writes it only to correct an unknown version.
#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: c_int,
}

const CAPABILITIES: CapabilityHeader = CapabilityHeader {
    version: 0x2008_0522, // _LINUX_CAPABILITY_VERSION_3: two 32-bit halves of three sets
    pid: 0,
};

/// Whether this thread has any capability, or could pass one on: in its effective, permitted or inheritable set.
pub(crate) fn has_capabilities() -> io::Result<bool> {
    let (mut header, mut sets) = (CAPABILITIES, [0u32; 6]);
    // SAFETY: `header` and `sets` have the layout and length of version 3; the kernel writes into `sets`.
    check(unsafe { libc::syscall(libc::SYS_capget, &raw mut header, sets.as_mut_ptr()) })?;
    Ok(sets.iter().any(|set| *set != 0))
}

/// Empties the effective, permitted and inheritable sets of this thread, and with them the ambient one.
pub(crate) fn empty_capabilities() -> io::Result<()> {
    let (mut header, sets) = (CAPABILITIES, [0u32; 6]);
    // SAFETY: as above; the kernel reads `sets`.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw mut header, sets.as_ptr()) }).map(drop)
}

/// Enters the Landlock domain of a ruleset, for good.
pub(crate) fn landlock_restrict_self(ruleset: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: a descriptor and no flags.
    check(unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0) }).map(drop)
}

/// Adds a filter of system calls to this thread's, for good.
pub(crate) fn install_filter(program: &[sock_filter]) -> io::Result<()> {
    let length = u16::try_from(program.len()).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?;
    let program = libc::sock_fprog {
        len: length,
        // The kernel's own instruction under another name; it reads them only.
        filter: program.as_ptr().cast_mut().cast(),
    };
    let (mode, flags) = (libc::SECCOMP_SET_MODE_FILTER, 0);
    // SAFETY: `program` names as many instructions as it says, and both outlive the call.
    check(unsafe { libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program) }).map(drop)
}

/// A close-on-exec copy of a descriptor with a number of at least `lowest`.
pub(crate) fn duplicate_from(fd: BorrowedFd<'_>, lowest: c_int) -> io::Result<OwnedFd> {
    // SAFETY: F_DUPFD_CLOEXEC takes a number.
    let copy = check(c_long::from(unsafe {
        libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, lowest)
    }))?;
    // SAFETY: the kernel made this descriptor for us just now and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(copy as RawFd) })
}

/// Makes `number` a copy of `fd` that stays open across exec, replacing what it was. Only for a process that is about to exec:
/// owners of the old descriptor are not asked.
pub(crate) fn place(fd: BorrowedFd<'_>, number: c_int) -> io::Result<()> {
    // SAFETY: numbers only; what `number` was is given up by a process that never drops its values (see above).
    check(c_long::from(unsafe { libc::dup3(fd.as_raw_fd(), number, 0) })).map(drop)
}

/// Closes every descriptor from `first` to `last`, under the same condition as [`place`].
pub(crate) fn close_range(first: c_uint, last: c_uint) -> io::Result<()> {
    // SAFETY: numbers only; see `place`.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) }).map(drop)
}

/// The flags of the network interface behind a descriptor of `/dev/net/tun`.
pub(crate) fn tun_flags(fd: BorrowedFd<'_>) -> io::Result<u16> {
    // SAFETY: an all-zero ifreq is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: TUNGETIFF writes one ifreq; the caller has made sure that this is a tun device, so that is what the number means.
    check(c_long::from(unsafe {
        libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF as _, &raw mut request)
    }))?;
    // SAFETY: TUNGETIFF fills the flags of the union.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok(flags as u16)
}
