//! One netlink socket, spoken to synchronously: a request is sent, its answers are read, the call returns.
//!
//! Written here, in a page, rather than taken from an async netlink library: kernel work happens in plain functions on threads
//! of their own, some of them in another namespace, where a runtime with tasks of its own has no place.
//! The kernel handles a request inside the `send` that carries it, so what a failed request leaves queued dies with the socket.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer, NetlinkHeader, NetlinkMessage,
    NetlinkPayload, NetlinkSerializable,
};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, setsockopt, socket,
    sockopt,
};
use nix::sys::time::TimeVal;

/// Longest a single answer may take: netlink answers in the same breath, so this only bounds the damage of a wrong belief.
const ANSWER: TimeVal = TimeVal::new(5, 0);

/// Room for one datagram: dumps come in pieces of at most 32 KiB.
const DATAGRAM: usize = 64 * 1024;

/// A netlink socket. It belongs to the network namespace in which it was opened, wherever it is used.
pub(crate) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

/// How a request is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// By an acknowledgement, with these flags beside.
    Change(u16),
    /// By a list.
    List,
}

impl Netlink {
    /// Opens a socket in the calling thread's network namespace, and joins the multicast `groups` (a bit mask).
    pub(crate) fn open(protocol: SockProtocol, groups: u32) -> io::Result<Self> {
        let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &ANSWER)?;
        Ok(Self {
            socket,
            sequence: 0,
            buffer: vec![0; DATAGRAM],
        })
    }

    /// Sends one request and hands the payload of each message of its answer to `on`.
    pub(crate) fn request<T: NetlinkSerializable>(
        &mut self,
        message: T,
        kind: Kind,
        on: impl FnMut(&[u8]),
    ) -> io::Result<()> {
        let mut message = NetlinkMessage::new(NetlinkHeader::default(), NetlinkPayload::InnerMessage(message));
        message.header.flags = NLM_F_REQUEST
            | match kind {
                Kind::Change(flags) => NLM_F_ACK | flags,
                Kind::List => NLM_F_DUMP,
            };
        self.sequence += 1;
        message.header.sequence_number = self.sequence;
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.send(&bytes)?;
        self.answer(self.sequence, on)
    }

    /// Sends bytes as they are.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        match send(self.socket.as_raw_fd(), bytes, MsgFlags::empty())? {
            sent if sent == bytes.len() => Ok(()),
            _ => Err(io::ErrorKind::WriteZero.into()),
        }
    }

    /// Reads the answer to the request of this sequence number to its end.
    pub(crate) fn answer(&mut self, sequence: u32, mut on: impl FnMut(&[u8])) -> io::Result<()> {
        loop {
            let length = self.receive(MsgFlags::empty())?;
            for message in messages(self.buffer.get(..length).unwrap_or_default()) {
                let message = message?;
                if message.sequence_number() != sequence {
                    continue;
                }
                match message.message_type() {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => return acknowledged(&message),
                    _ => on(message.payload()),
                }
            }
        }
    }

    /// Reads what is queued of `expected` acknowledgements, and fails with the first that is an error, or when one is missing.
    pub(crate) fn acknowledgements(&mut self, expected: usize) -> io::Result<()> {
        let mut seen = 0;
        while seen < expected {
            let length = match self.receive(MsgFlags::MSG_DONTWAIT) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                outcome => outcome?,
            };
            for message in messages(self.buffer.get(..length).unwrap_or_default()) {
                let message = message?;
                if message.message_type() == NLMSG_ERROR {
                    acknowledged(&message)?;
                    seen += 1;
                }
            }
        }
        Ok(())
    }

    /// Waits for a message of the multicast groups joined, and discards all that are there. `false` when none came in time.
    pub(crate) fn wait_for_event(&mut self, limit: Duration) -> io::Result<bool> {
        let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        let mut sockets = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        match poll(&mut sockets, limit) {
            Ok(0) => return Ok(false),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        // More events than the queue holds are events all the same.
        self.events(|_| {}).map(|_| true)
    }

    /// Hands the payloads of the messages of the multicast groups joined to `on`, as far as they are there. `false` when there were more
    /// than the queue holds, and some are lost.
    pub(crate) fn events(&mut self, mut on: impl FnMut(&[u8])) -> io::Result<bool> {
        let mut is_whole = true;
        loop {
            let length = match self.receive(MsgFlags::MSG_DONTWAIT) {
                Ok(length) => length,
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    is_whole = false;
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(is_whole),
                Err(error) => return Err(error),
            };
            for message in messages(self.buffer.get(..length).unwrap_or_default()) {
                on(message?.payload());
            }
        }
    }

    fn receive(&mut self, flags: MsgFlags) -> io::Result<usize> {
        loop {
            match recv(self.socket.as_raw_fd(), &mut self.buffer, flags) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(length) => return Ok(length),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// The messages in `bytes`, each with its header checked.
pub(crate) fn messages(mut bytes: &[u8]) -> impl Iterator<Item = io::Result<NetlinkBuffer<&[u8]>>> {
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        let Ok(message) = NetlinkBuffer::new_checked(bytes) else {
            bytes = &[];
            return Some(Err(io::ErrorKind::InvalidData.into()));
        };
        // Messages are padded to four bytes, the last one need not be.
        let length = usize::try_from(message.length()).unwrap_or(usize::MAX);
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Ok(message))
    })
}

fn acknowledged(message: &NetlinkBuffer<&[u8]>) -> io::Result<()> {
    let code = message.payload().first_chunk().map(|code| i32::from_ne_bytes(*code));
    match code {
        Some(0) => Ok(()),
        Some(errno) => Err(io::Error::from_raw_os_error(errno.saturating_neg())),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}
