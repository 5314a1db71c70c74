//! Taps, and telling ours from any other descriptor that a peer may pass.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, SFlag, fstat, major, minor};

use super::sys;

/// Name of the tap in its namespace.
pub(crate) const NAME: &CStr = c"tap0";

/// Frames without a header of the driver's, each with the header of virtio-net.
const FLAGS: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// `/dev/net/tun`: misc device, minor `TUN_MINOR`.
const DEVICE: (u64, u64) = (10, 200);

/// Makes the tap of the calling thread's network namespace. The descriptor holds both: they end with its last copy.
pub(crate) fn make() -> io::Result<OwnedFd> {
    let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    let tun = open("/dev/net/tun", flags, Mode::empty())?;
    let flags = libc::c_short::try_from(FLAGS).map_err(|_| io::ErrorKind::InvalidInput)?;
    sys::tun_set_interface(tun.as_fd(), NAME, flags)?;
    Ok(tun)
}

/// The namespace of `tap`, `None` when it is no tap named as ours. Whether the namespace is ours its rules must show.
pub(crate) fn namespace(tap: BorrowedFd<'_>) -> io::Result<Option<OwnedFd>> {
    let status = fstat(tap)?;
    let is_device = SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT == SFlag::S_IFCHR;
    // Before any ioctl: its number could mean anything to another device.
    if !is_device || (major(status.st_rdev), minor(status.st_rdev)) != DEVICE {
        return Ok(None);
    }
    match sys::tun_interface(tap) {
        Ok((name, flags)) if name == NAME.to_bytes() && i32::from(flags) & libc::IFF_TAP != 0 => {
            sys::tun_namespace(tap).map(Some)
        }
        // Opened with O_PATH, or not made an interface yet.
        Err(error) if !matches!(error.raw_os_error(), Some(libc::EBADF | libc::EBADFD)) => Err(error),
        Ok(_) | Err(_) => Ok(None),
    }
}
