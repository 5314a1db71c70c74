//! Waiting for devices: the kernel announces each on a netlink socket, after its node and its sysfs entry are there.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket};

/// Why a device is not there.
#[derive(Debug, thiserror::Error)]
pub(super) enum WaitError {
    #[error("{path} did not appear within {} s", .within.as_secs())]
    Timeout { path: PathBuf, within: Duration },
    #[error("cannot listen for devices")]
    Listen(#[source] io::Error),
}

/// Returns when `path` exists.
pub(super) fn wait_for(path: &Path, within: Duration) -> Result<(), WaitError> {
    if path.exists() {
        return Ok(());
    }
    let deadline = Instant::now() + within;
    let listen = |errno: Errno| WaitError::Listen(errno.into());
    let events = listen_to_kernel().map_err(listen)?;
    // What appeared before we listened is there now; what appears later is announced.
    while !path.exists() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(WaitError::Timeout {
                path: path.to_owned(),
                within,
            });
        }
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(events.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(_) | Err(Errno::EINTR) => drain(&events),
            Err(errno) => return Err(listen(errno)),
        }
    }
    Ok(())
}

fn listen_to_kernel() -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let events = socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        flags,
        SockProtocol::NetlinkKObjectUEvent,
    )?;
    // Group 1: what the kernel itself says.
    bind(events.as_raw_fd(), &NetlinkAddr::new(0, 1))?;
    Ok(events)
}

/// What exactly was announced does not matter: the path is looked at again. ENOBUFS (too many) is an answer like any
/// other.
fn drain(events: &OwnedFd) {
    let mut message = [0; 4096];
    while recv(events.as_raw_fd(), &mut message, MsgFlags::MSG_DONTWAIT).is_ok() {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_exists_is_not_waited_for_and_what_does_not_is_given_up() {
        wait_for(Path::new("/proc/self"), Duration::ZERO).unwrap();
        let missing = wait_for(Path::new("/proc/self/no-such"), Duration::from_millis(20));
        assert!(matches!(missing, Err(WaitError::Timeout { .. })), "{missing:?}");
    }
}
