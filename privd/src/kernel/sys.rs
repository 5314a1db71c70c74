//! The system calls that have no safe wrapper at hand: the only unsafe code of this crate. One call a function, descriptors as
//! `OwnedFd` and `BorrowedFd` only.
#![allow(
    unsafe_code,
    reason = "ioctls of loop and tun devices, the descriptor that systemd passes, and an expression of nftables that its wrapper lacks; \
              see SAFETY at each block"
)]

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

use nftnl::nftnl_sys::{
    NFTNL_EXPR_CONNLIMIT_COUNT, NFTNL_EXPR_CONNLIMIT_FLAGS, nftnl_expr, nftnl_expr_alloc, nftnl_expr_set_u32,
};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};

/// `struct loop_info64` of `linux/loop.h`.
#[repr(C)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    sizelimit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config` of `linux/loop.h`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

// The kernel copies this many bytes, whatever we believe.
const _: () = assert!(size_of::<LoopInfo64>() == 232 && size_of::<LoopConfig>() == 304);

/// The backing file is opened read-only by the loop.
pub(super) const LO_FLAGS_READ_ONLY: u32 = 1;
/// The loop detaches itself when its last user is gone.
pub(super) const LO_FLAGS_AUTOCLEAR: u32 = 4;
/// The loop does direct I/O on its backing file.
pub(super) const LO_FLAGS_DIRECT_IO: u32 = 16;

const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A;
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;

/// The number of a loop device that nothing is attached to at the moment, made where there is none.
pub(super) fn loop_ctl_get_free(control: BorrowedFd<'_>) -> io::Result<u32> {
    // SAFETY: this ioctl takes no argument and returns a number.
    let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
    u32::try_from(number).map_err(|_| io::Error::last_os_error())
}

/// Attaches `backing` to a loop device with all its flags in one step.
pub(super) fn loop_configure(device: BorrowedFd<'_>, backing: BorrowedFd<'_>, flags: u32) -> io::Result<()> {
    let config = LoopConfig {
        fd: u32::try_from(backing.as_raw_fd()).map_err(|_| io::ErrorKind::InvalidInput)?,
        block_size: 0,
        info: LoopInfo64 {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            sizelimit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags,
            file_name: [0; 64],
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        },
        reserved: [0; 8],
    };
    // SAFETY: the kernel reads a `struct loop_config` at this address, which `config` is (layout asserted above), and keeps a
    // reference of its own to the backing file.
    match unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// An `ifreq` that asks for, or tells, an interface name and flags.
fn interface_request(name: &CStr, flags: libc::c_short) -> io::Result<libc::ifreq> {
    // SAFETY: all-zero bytes are a valid ifreq: an empty name and a union of plain numbers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let bytes = name.to_bytes_with_nul();
    let room = request
        .ifr_name
        .get_mut(..bytes.len())
        .ok_or(io::ErrorKind::InvalidInput)?;
    for (to, from) in room.iter_mut().zip(bytes) {
        // `c_char` is signed on some architectures and not on others.
        *to = libc::c_char::from_ne_bytes([*from]);
    }
    request.ifr_ifru.ifru_flags = flags;
    Ok(request)
}

/// Makes an open `/dev/net/tun` the interface `name` in the namespace it was opened in.
pub(super) fn tun_set_interface(tun: BorrowedFd<'_>, name: &CStr, flags: libc::c_short) -> io::Result<()> {
    let mut request = interface_request(name, flags)?;
    // SAFETY: the kernel reads and writes one ifreq at this address, which `request` is.
    match unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Name and flags of the interface behind an open `/dev/net/tun`. Call it for nothing else: the number means other things to
/// other devices.
pub(super) fn tun_interface(tun: BorrowedFd<'_>) -> io::Result<(Vec<u8>, libc::c_short)> {
    let mut request = interface_request(c"", 0)?;
    // SAFETY: the kernel writes one ifreq at this address, which `request` is.
    if unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNGETIFF, &raw mut request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let name = request
        .ifr_name
        .iter()
        .take_while(|byte| **byte != 0)
        .flat_map(|byte| byte.to_ne_bytes())
        .collect();
    // SAFETY: the union holds plain numbers, any bytes are a valid c_short, and TUNGETIFF writes this member.
    Ok((name, unsafe { request.ifr_ifru.ifru_flags }))
}

/// The network namespace of the interface behind an open `/dev/net/tun`; the same caution as for [`tun_interface`].
pub(super) fn tun_namespace(tun: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: this ioctl takes no argument and returns a descriptor.
    let raw = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNGETDEVNETNS) };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel installed this descriptor for us just now (close-on-exec) and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Takes the descriptor that systemd passes to a service of one socket (`SD_LISTEN_FDS_START`) and marks it close-on-exec.
/// Call it once, first thing in the process.
///
/// # Errors
/// When there is no such descriptor.
pub(crate) fn take_passed_socket() -> io::Result<OwnedFd> {
    // SAFETY: called before this process has opened anything that it would know by this number; a number that is not open is
    // found out by the next line, and the failing close on drop touches nothing.
    let passed = unsafe { OwnedFd::from_raw_fd(3) };
    match fcntl(&passed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)) {
        Ok(_) => Ok(passed),
        Err(errno) => {
            std::mem::forget(passed);
            Err(errno.into())
        }
    }
}

/// `linux/netfilter/nf_tables.h`.
const NFT_CONNLIMIT_F_INV: u32 = 1;

/// The condition of nftables that more than so many connections which a rule was asked about are still there (`nft_connlimit`).
pub(super) struct ConnectionsOver(pub(super) u32);

impl nftnl::expr::Expression for ConnectionsOver {
    fn to_expr(&self, _: &nftnl::Rule<'_>) -> NonNull<nftnl_expr> {
        // SAFETY: allocates an expression of a kind that libnftnl knows, or gives NULL where there is no memory. It is the caller's to
        // free, who gives it to a rule.
        let expression = unsafe { nftnl_expr_alloc(c"connlimit".as_ptr()) };
        let expression = NonNull::new(expression).expect("libnftnl knows connlimit");
        let type_of = |kind: u32| u16::try_from(kind).expect("attributes are few");
        // Without it the condition is that there are no more than that.
        let attributes = [
            (NFTNL_EXPR_CONNLIMIT_COUNT, self.0),
            (NFTNL_EXPR_CONNLIMIT_FLAGS, NFT_CONNLIMIT_F_INV),
        ];
        for (kind, value) in attributes {
            // SAFETY: the expression is live and of the kind that has these attributes, of 32 bits.
            unsafe { nftnl_expr_set_u32(expression.as_ptr(), type_of(kind), value) };
        }
        expression
    }
}
