//! A packet socket for tasks: the same packets, waited for by the runtime.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::task::{Context, Poll, ready};

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::unix::AsyncFd;

use super::{IpcError, Packet, Sender, fd, receive};

/// A connected, non-blocking SEQPACKET socket.
#[derive(Debug)]
pub struct PacketSocket(AsyncFd<OwnedFd>);

impl PacketSocket {
    /// Registers a connected, non-blocking socket with the runtime.
    ///
    /// # Errors
    /// When the runtime cannot watch it.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        fd::watch(socket).map(Self)
    }

    /// Receives one message; see [`receive`]. Safe to cancel: a packet is taken whole or not at all.
    ///
    /// # Errors
    /// Any [`IpcError`]; all of them end the connection.
    pub async fn receive<T: DeserializeOwned>(&self) -> Result<(T, Option<Sender>), IpcError> {
        std::future::poll_fn(|cx| self.poll_receive(cx)).await
    }

    /// Sends one message. Safe to cancel: a packet is sent whole or not at all.
    ///
    /// # Errors
    /// Those of [`Packet::encode`] and [`Packet::send`].
    pub async fn send<T: Serialize>(&self, message: &T) -> Result<(), IpcError> {
        let packet = Packet::encode(message)?;
        std::future::poll_fn(|cx| self.poll_send(cx, &packet)).await
    }

    pub(super) fn poll_receive<T: DeserializeOwned>(
        &self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(T, Option<Sender>), IpcError>> {
        loop {
            let mut ready = ready!(self.0.poll_read_ready(cx)).map_err(IpcError::Socket)?;
            match receive(self.0.get_ref().as_fd()) {
                Err(IpcError::Socket(error)) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                outcome => return Poll::Ready(outcome),
            }
        }
    }

    pub(super) fn poll_send(&self, cx: &mut Context<'_>, packet: &Packet) -> Poll<Result<(), IpcError>> {
        loop {
            let mut ready = ready!(self.0.poll_write_ready(cx)).map_err(IpcError::Socket)?;
            match packet.send(self.0.get_ref().as_fd()) {
                Err(IpcError::Socket(error)) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                outcome => return Poll::Ready(outcome),
            }
        }
    }
}

/// For what must be sent without waiting, as while dropping.
impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}
