//! The system calls that neither the standard library nor `nix` offers in a safe form: one per function.
//!
//! Holds: this is the only module of the crate with unsafe code. Not here: when to call what.
#![allow(
    unsafe_code,
    reason = "the module that wraps what only libc offers; every block says why it is sound"
)]

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Command, ExitStatus};
use std::ptr::{NonNull, null_mut};

use nix::errno::Errno;
use nix::unistd::Gid;
use tokio::io::unix::AsyncFd;

use crate::process::child::ChildSetup;

/// Most bytes that one [`add_entropy`] takes.
pub(crate) const MAX_ENTROPY: usize = roost_common::guest::MAX_ENTROPY;

/// A child that has ended, if there is one. It stays to be reaped; until it is, the same may be answered again.
///
/// # Errors
/// ECHILD: there are no children.
pub(crate) fn peek_ended() -> io::Result<Option<u32>> {
    // SAFETY: siginfo_t is plain data: all zero is a valid value.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: waitid writes one siginfo_t to the pointer, which is valid for the call.
    let result = unsafe { libc::waitid(libc::P_ALL, 0, &raw mut info, flags) };
    check(result.into())?;
    // SAFETY: waitid has filled in the fields of a child, or left all of them zero.
    let pid = unsafe { info.si_pid() };
    Ok(u32::try_from(pid).ok().filter(|pid| *pid != 0))
}

/// Reaps a child if it has ended. `None` while it lives; also for a pid that is no child of ours.
pub(crate) fn reap(pid: u32) -> Option<ExitStatus> {
    let pid = i32::try_from(pid).ok().filter(|pid| *pid > 0)?;
    let mut status = 0;
    // SAFETY: waitpid writes one int to the pointer, which is valid for the call.
    let reaped = unsafe { libc::waitpid(pid, &raw mut status, libc::WNOHANG) };
    // `nix` fails here for signals it has no name for, after the child is gone: the status would be lost.
    (reaped == pid).then(|| ExitStatus::from_raw(status))
}

/// Address space without memory, until it is [filled](Self::fill).
pub(crate) struct Blank {
    start: NonNull<libc::c_void>,
    length: usize,
}

impl Blank {
    /// # Errors
    /// ENOMEM, where the kernel does not promise as much; EINVAL for nothing.
    pub(crate) fn reserve(length: usize) -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping, wherever the kernel has room: no other memory is touched.
        let start = unsafe { libc::mmap(null_mut(), length, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        match NonNull::new(start) {
            Some(start) if start.as_ptr() != libc::MAP_FAILED => Ok(Self { start, length }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Has the kernel put pages of zeros there.
    ///
    /// # Errors
    /// ENOMEM, also for a range that is not reserved; EINVAL of kernels before 5.14.
    pub(crate) fn fill(&self, start: usize, length: usize) -> io::Result<()> {
        if start.checked_add(length).is_none_or(|end| end > self.length) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        // SAFETY: the offset is within the mapping.
        let start = unsafe { self.start.byte_add(start) };
        // SAFETY: the range is within the mapping, which is nobody's but this value's.
        let result = unsafe { libc::madvise(start.as_ptr(), length, libc::MADV_POPULATE_WRITE) };
        check(result.into()).map(drop)
    }
}

impl Drop for Blank {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's, which nobody uses any more.
        unsafe { libc::munmap(self.start.as_ptr(), self.length) };
    }
}

/// Has `setup` run in the child, between fork and exec.
pub(crate) fn set_child_setup(command: &mut Command, setup: ChildSetup) {
    // SAFETY: the closure runs in a forked child of a process with threads, so it may only make async-signal-safe
    // calls; `ChildSetup::enter` is written to that rule (system calls on values made before the fork, no allocation,
    // no lock).
    unsafe { command.pre_exec(move || setup.enter()) };
}

/// Marks every descriptor from `first` on close-on-exec.
///
/// # Errors
/// The kernel's; ENOSYS before 5.11.
pub(crate) fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: the call takes three integers; it closes nothing, so no owned descriptor becomes invalid.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    check(result)
}

/// Gives a signal its default disposition; those that cannot be changed are left alone silently. Past libc, which
/// refuses the two signals that it uses itself, although a program may have inherited them ignored.
pub(crate) fn reset_signal(signal: i32) {
    /// The kernel's `struct sigaction`: handler (SIG_DFL is 0), flags, restorer, and a mask of 64 signals.
    const DEFAULT: [u64; 4] = [0; 4];
    // SAFETY: the call reads one sigaction, which lives for the call, and writes none; the mask's size is 8 bytes.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigaction,
            signal,
            DEFAULT.as_ptr(),
            std::ptr::null_mut::<libc::c_void>(),
            8_usize,
        )
    };
}

/// Sets the supplementary groups of the calling thread alone; libc's call sets those of all threads.
///
/// # Errors
/// EPERM without CAP_SETGID; EINVAL for more than the kernel takes.
pub(crate) fn set_thread_groups(groups: &[Gid]) -> nix::Result<()> {
    let ids: Vec<libc::gid_t> = groups.iter().map(|group| group.as_raw()).collect();
    // SAFETY: the call reads as many ids as it is told from the pointer; they live for the call.
    let result = unsafe { libc::syscall(libc::SYS_setgroups, ids.len(), ids.as_ptr()) };
    Errno::result(result).map(drop)
}

/// Takes all capabilities from the calling thread, for good.
///
/// # Errors
/// None that the kernel documents for giving up.
pub(crate) fn drop_thread_capabilities() -> nix::Result<()> {
    /// `struct __user_cap_header_struct` of linux/capability.h: version 3, the calling thread.
    const HEADER: [u32; 2] = [0x2008_0522, 0];
    /// Two of `struct __user_cap_data_struct`: effective, permitted, inheritable.
    const NONE: [u32; 6] = [0; 6];
    let mut header = HEADER;
    // SAFETY: the call reads the header, to which it may write a version, and 24 bytes of data; both live for the call.
    let result = unsafe { libc::syscall(libc::SYS_capset, header.as_mut_ptr(), NONE.as_ptr()) };
    Errno::result(result).map(drop)
}

/// Has the runtime that this is called on wait for a descriptor.
///
/// # Errors
/// The kernel's; EPERM for a file, which is always ready.
pub(crate) fn wait_for(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` names one descriptor, and keeps it open for as long as it lives itself.
    let registered = unsafe { AsyncFd::register(descriptor) };
    Ok(registered?)
}

/// Makes the terminal `terminal` the controlling one of the calling process, which leads a session without one.
/// Async-signal-safe.
///
/// # Errors
/// The kernel's; EPERM where the session has one, or the terminal has a session.
pub(crate) fn set_controlling_terminal(terminal: BorrowedFd<'_>) -> nix::Result<()> {
    // SAFETY: TIOCSCTTY takes an integer; 0: not to steal it from another session.
    let result = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) };
    Errno::result(result).map(drop)
}

/// Sets the size of a terminal, in character cells; who runs in it is told by SIGWINCH where it has changed.
///
/// # Errors
/// The kernel's; ENOTTY for what is no terminal.
pub(crate) fn set_terminal_size(terminal: BorrowedFd<'_>, columns: u16, rows: u16) -> nix::Result<()> {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCSWINSZ reads one winsize, which lives for the call.
    let result = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    Errno::result(result).map(drop)
}

/// Adds bytes to the kernel's random pool and credits them.
///
/// # Errors
/// EPERM without CAP_SYS_ADMIN; EINVAL for more than [`MAX_ENTROPY`] bytes.
pub(crate) fn add_entropy(random: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<()> {
    /// `struct rand_pool_info` of linux/random.h, with the most that we take.
    #[repr(C)]
    struct PoolInfo {
        entropy_count: libc::c_int,
        buf_size: libc::c_int,
        buf: [u8; MAX_ENTROPY],
    }
    let too_long = |_| io::Error::from_raw_os_error(libc::EINVAL);
    if bytes.len() > MAX_ENTROPY {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let mut info = PoolInfo {
        entropy_count: i32::try_from(bytes.len() * 8).map_err(too_long)?,
        buf_size: i32::try_from(bytes.len()).map_err(too_long)?,
        buf: [0; MAX_ENTROPY],
    };
    info.buf[..bytes.len()].copy_from_slice(bytes);
    // SAFETY: RNDADDENTROPY reads two ints and `buf_size` bytes behind them; `buf_size` is at most the array's length.
    let result = unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const info) };
    check(result.into())
}

/// Has the kernel's generator draw a new key from its pool now, and all that hold a key of it (each processor, the vDSO of
/// each process) take a new one with their next use. Source: `crng_reseed`, drivers/char/random.c.
///
/// # Errors
/// EPERM without CAP_SYS_ADMIN; ENODATA before the generator is seeded, which 32 credited bytes do.
pub(crate) fn reseed(random: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: RNDRESEEDCRNG takes no argument.
    let result = unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) };
    check(result.into())
}

/// `_IOW('R', 0x03, int [2])` and `_IO('R', 0x07)` of linux/random.h.
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

/// Grows the mounted ext4 filesystem that `root` is on to `blocks` of its blocks.
///
/// # Errors
/// The kernel's: EPERM, ENOSPC (the device is smaller), EBUSY (being resized), EOPNOTSUPP (no resize_inode).
pub(crate) fn resize_ext4(root: BorrowedFd<'_>, blocks: u64) -> io::Result<()> {
    /// `_IOW('f', 16, __u64)` of fs/ext4/ext4.h.
    const EXT4_IOC_RESIZE_FS: libc::c_ulong = 0x4008_6610;
    // SAFETY: the call reads one u64 through the pointer, which is valid for the call.
    let result = unsafe { libc::ioctl(root.as_raw_fd(), EXT4_IOC_RESIZE_FS, &raw const blocks) };
    check(result.into())
}

/// Freezes the filesystem that `on` is on: writes what is dirty, then holds up whoever would write. Blocks until the
/// writers of this moment are done.
///
/// # Errors
/// The kernel's: EBUSY (frozen already), EOPNOTSUPP (a kind that cannot), EPERM without CAP_SYS_ADMIN.
pub(crate) fn freeze(on: BorrowedFd<'_>) -> io::Result<()> {
    /// `_IOWR('X', 119, int)` of linux/fs.h.
    const FIFREEZE: libc::c_ulong = 0xc004_5877;
    // SAFETY: whatever its number says, FIFREEZE takes no argument (ioctl_fsfreeze, fs/ioctl.c): nothing is read or written.
    let result = unsafe { libc::ioctl(on.as_raw_fd(), FIFREEZE, 0) };
    check(result.into())
}

/// Undoes [`freeze`].
///
/// # Errors
/// The kernel's: EINVAL (not frozen), EPERM without CAP_SYS_ADMIN; EIO, and then it stays frozen.
pub(crate) fn thaw(on: BorrowedFd<'_>) -> io::Result<()> {
    /// `_IOWR('X', 120, int)` of linux/fs.h.
    const FITHAW: libc::c_ulong = 0xc004_5878;
    // SAFETY: as for FIFREEZE: FITHAW takes no argument (ioctl_fsthaw, fs/ioctl.c).
    let result = unsafe { libc::ioctl(on.as_raw_fd(), FITHAW, 0) };
    check(result.into())
}

/// Sets the IPv4 address of an interface.
///
/// # Errors
/// The kernel's; ENODEV when there is no such interface.
pub(crate) fn set_address(socket: BorrowedFd<'_>, name: &InterfaceName, address: Ipv4Addr) -> io::Result<()> {
    let request = name.request(libc::__c_anonymous_ifr_ifru {
        ifru_addr: socket_address(address),
    });
    // SAFETY: SIOCSIFADDR reads one ifreq, whose union holds the socket address that this call expects.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFADDR, &raw const request) };
    check(result.into())
}

/// Sets the netmask of an interface that has an address.
///
/// # Errors
/// As [`set_address`].
pub(crate) fn set_netmask(socket: BorrowedFd<'_>, name: &InterfaceName, mask: Ipv4Addr) -> io::Result<()> {
    let request = name.request(libc::__c_anonymous_ifr_ifru {
        ifru_netmask: socket_address(mask),
    });
    // SAFETY: SIOCSIFNETMASK reads one ifreq, whose union holds the socket address that this call expects.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFNETMASK, &raw const request) };
    check(result.into())
}

/// Sets the flags of an interface: up and running, nothing else.
///
/// # Errors
/// As [`set_address`].
pub(crate) fn set_up(socket: BorrowedFd<'_>, name: &InterfaceName) -> io::Result<()> {
    // Both are small bits of a 16-bit field.
    let flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    let request = name.request(libc::__c_anonymous_ifr_ifru { ifru_flags: flags });
    // SAFETY: SIOCSIFFLAGS reads one ifreq, whose union holds the flags that this call expects.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    check(result.into())
}

/// Adds the default route over `gateway`.
///
/// # Errors
/// EEXIST when there is one; ENETUNREACH when the gateway is not on a connected network.
pub(crate) fn add_default_route(socket: BorrowedFd<'_>, gateway: Ipv4Addr) -> io::Result<()> {
    // SAFETY: rtentry is plain data (integers, socket addresses and one pointer that may be null): all zero is a valid
    // value.
    let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
    route.rt_dst = socket_address(Ipv4Addr::UNSPECIFIED);
    route.rt_genmask = socket_address(Ipv4Addr::UNSPECIFIED);
    route.rt_gateway = socket_address(gateway);
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    // SAFETY: SIOCADDRT reads one rtentry; its device pointer is null, so it follows none.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCADDRT, &raw const route) };
    check(result.into())
}

/// The name of a network interface: 1 to 15 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct InterfaceName([libc::c_char; libc::IFNAMSIZ]);

impl InterfaceName {
    /// `None` for a name that no interface can have.
    pub(crate) fn new(name: &str) -> Option<Self> {
        let mut bytes = [0; libc::IFNAMSIZ];
        if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.bytes().any(|byte| byte == 0 || byte == b'/') {
            return None;
        }
        for (to, from) in bytes.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        Some(Self(bytes))
    }

    fn request(&self, ifr_ifru: libc::__c_anonymous_ifr_ifru) -> libc::ifreq {
        libc::ifreq {
            ifr_name: self.0,
            ifr_ifru,
        }
    }
}

/// An IPv4 address in the form of the old interface ioctls.
fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let mut sa_data = [0; 14];
    // struct sockaddr_in: port in the first two bytes, then the address in network order.
    for (to, from) in sa_data[2..6].iter_mut().zip(address.octets()) {
        *to = from as libc::c_char;
    }
    libc::sockaddr {
        sa_family: libc::AF_INET as libc::sa_family_t,
        sa_data,
    }
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interface_names_have_one_to_fifteen_bytes() {
        assert!(InterfaceName::new("eth0").is_some());
        assert!(InterfaceName::new("a23456789012345").is_some());
        for bad in ["", "a234567890123456", "a/b", "a\0"] {
            assert_eq!(InterfaceName::new(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_socket_address_holds_the_address_in_network_order() {
        let address = socket_address(Ipv4Addr::new(169, 254, 0, 21));
        let bytes: Vec<u8> = address.sa_data.iter().map(|byte| *byte as u8).collect();
        assert_eq!(bytes, [0, 0, 169, 254, 0, 21, 0, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn freezing_and_thawing_are_known_to_the_kernel_and_refused_for_proc() {
        use std::os::fd::AsFd as _;
        let proc = std::fs::File::open("/proc/self").unwrap();
        let errno = |result: io::Result<()>| result.unwrap_err().raw_os_error().unwrap();
        assert!([libc::EOPNOTSUPP, libc::EPERM].contains(&errno(freeze(proc.as_fd()))));
        assert!([libc::EINVAL, libc::EPERM].contains(&errno(thaw(proc.as_fd()))));
    }

    #[test]
    fn without_privilege_or_with_too_much_the_pool_is_refused() {
        use std::os::fd::AsFd as _;
        let null = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(
            add_entropy(null.as_fd(), &[0; MAX_ENTROPY + 1])
                .unwrap_err()
                .raw_os_error(),
            Some(libc::EINVAL)
        );
        assert_eq!(
            add_entropy(null.as_fd(), &[0; 8]).unwrap_err().raw_os_error(),
            Some(libc::ENOTTY)
        );
    }
}
