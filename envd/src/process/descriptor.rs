//! Our end of a pipe or a terminal, which waits on no thread.
//!
//! Holds: readiness is taken for used up only when the kernel says so. A terminal may hand out less than it has, and is not
//! announced again, so the ends of pipes that the runtime offers would wait there for ever.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{read, write};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::sys;

pub(super) struct Descriptor(AsyncFd<OwnedFd>);

impl Descriptor {
    /// To be called on a runtime.
    ///
    /// # Errors
    /// The kernel's; EPERM for a file, which is always ready.
    pub(super) fn new(descriptor: OwnedFd) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&descriptor, FcntlArg::F_GETFL)?);
        fcntl(&descriptor, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        sys::wait_for(descriptor).map(Self)
    }

    /// Reads what there is, once there is something. A call that is given up has read nothing.
    pub(super) async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = |descriptor: &OwnedFd| Ok(read(descriptor, buffer)?);
        self.0.async_io(Interest::READABLE, read).await
    }

    /// Reads what there is now.
    ///
    /// # Errors
    /// `WouldBlock`: there is nothing yet.
    pub(super) fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(read(self.0.get_ref(), buffer)?)
    }

    /// Writes all of `bytes`; waits for the reader.
    pub(super) async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let write = |descriptor: &OwnedFd| Ok(write(descriptor, bytes)?);
            let written = self.0.async_io(Interest::WRITABLE, write).await?;
            bytes = &bytes[written..];
        }
        Ok(())
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}
