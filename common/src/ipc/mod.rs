//! Typed packets that carry descriptors, over Unix `SOCK_SEQPACKET`.
//!
//! One packet is one message in postcard; descriptors ride along as `SCM_RIGHTS`. A field of type [`PassedFd`] serialises as
//! its index in the packet's descriptor list, so that a message simply *has* descriptors in it.
//!
//! Invariants, held for every packet whoever sent it:
//! - received descriptors are close-on-exec, and owned before anything is judged: a refused packet closes all of them;
//! - at most [`MAX_PACKET`] bytes and [`MAX_FDS`] descriptors;
//! - an empty or truncated packet, an index out of range or used twice, a descriptor that no field claims, bytes left over and
//!   an undecodable message are errors after which the connection is to be closed: there is no resynchronising with such a peer.
//!
//! Not here: which messages exist (`privd`, `shim`), who may connect (the listeners decide).

mod fd;
#[cfg(feature = "privd")]
pub mod rpc;
#[cfg(feature = "privd")]
mod socket;

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use serde::de::{DeserializeOwned, Error as _};
use serde::ser::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

pub use fd::Sender;
#[cfg(feature = "privd")]
pub use socket::PacketSocket;

/// Most bytes in a packet.
pub const MAX_PACKET: usize = 64 * 1024;
/// Most descriptors in a packet.
pub const MAX_FDS: usize = 8;

/// What is wrong with a connection. Every variant ends it.
#[derive(Debug, thiserror::Error)]
pub enum IpcError {
    /// The peer closed the connection, or sent an empty packet: SEQPACKET does not tell them apart.
    #[error("the peer closed the connection")]
    Closed,
    /// The system call failed.
    #[error("the socket failed")]
    Socket(#[source] io::Error),
    /// Payload or descriptors were cut off.
    #[error("a packet exceeds {MAX_PACKET} bytes or its descriptors could not all be received")]
    Truncated,
    /// More descriptors than a packet may carry.
    #[error("a packet carries {0} descriptors, more than {MAX_FDS}")]
    TooManyDescriptors(usize),
    /// Descriptors that no field of the message claims.
    #[error("{0} descriptors of a packet belong to no field")]
    UnclaimedDescriptors(usize),
    /// The message does not decode; also an index out of range or used twice, and bytes left over.
    #[error("a packet does not decode")]
    Undecodable(#[source] postcard::Error),
    /// Our own message does not fit a packet.
    #[error("a message does not fit a packet")]
    Unencodable(#[source] postcard::Error),
    /// Our own message is larger than a packet.
    #[error("a message of {0} bytes does not fit a packet")]
    TooLarge(usize),
    /// The peer breaks the rules of the call protocol.
    #[error("the peer {0}")]
    Protocol(&'static str),
}

/// A descriptor as a field of a message. Cloning shares it.
#[derive(Debug, Clone)]
pub struct PassedFd(Arc<OwnedFd>);

impl PassedFd {
    /// The descriptor as its only owner; duplicated (close-on-exec) where a clone is still about.
    ///
    /// # Errors
    /// `EMFILE` while duplicating.
    pub fn into_owned(self) -> io::Result<OwnedFd> {
        Arc::try_unwrap(self.0).or_else(|shared| shared.as_fd().try_clone_to_owned())
    }
}

impl From<OwnedFd> for PassedFd {
    fn from(descriptor: OwnedFd) -> Self {
        Self(Arc::new(descriptor))
    }
}

impl AsFd for PassedFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

thread_local! {
    /// Descriptors of the packet that this thread is encoding or decoding. Both are synchronous, so one table is enough;
    /// `None` means that a message with descriptors is being (de)serialised outside a packet, which is an error.
    static TABLE: RefCell<Option<Table>> = const { RefCell::new(None) };
}

enum Table {
    Sending(Vec<PassedFd>),
    Received(Vec<Option<OwnedFd>>),
}

impl Serialize for PassedFd {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let index = TABLE.with_borrow_mut(|table| match table {
            Some(Table::Sending(list)) if list.len() < MAX_FDS => {
                list.push(self.clone());
                u8::try_from(list.len() - 1).ok()
            }
            _ => None,
        });
        index
            .ok_or_else(|| S::Error::custom("no room for a descriptor in this packet"))?
            .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for PassedFd {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let index = usize::from(u8::deserialize(deserializer)?);
        let descriptor = TABLE.with_borrow_mut(|table| match table {
            Some(Table::Received(list)) => list.get_mut(index).and_then(Option::take),
            _ => None,
        });
        descriptor
            .map(Self::from)
            .ok_or_else(|| D::Error::custom("no such descriptor in this packet"))
    }
}

/// Empties the table at the end of one packet, also when serialisation panics.
struct Scope;

impl Scope {
    fn enter(table: Table) -> Self {
        TABLE.with_borrow_mut(|slot| *slot = Some(table));
        Self
    }

    fn take(&self) -> Option<Table> {
        TABLE.with_borrow_mut(Option::take)
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        self.take();
    }
}

/// An encoded message with its descriptors, ready to be sent.
#[derive(Debug)]
pub struct Packet {
    payload: Vec<u8>,
    descriptors: Vec<PassedFd>,
}

impl Packet {
    /// Encodes `message`.
    ///
    /// # Errors
    /// [`IpcError::Unencodable`] with more than [`MAX_FDS`] descriptors, [`IpcError::TooLarge`] above [`MAX_PACKET`] bytes.
    pub fn encode<T: Serialize>(message: &T) -> Result<Self, IpcError> {
        let scope = Scope::enter(Table::Sending(Vec::new()));
        let payload = postcard::to_stdvec(message).map_err(IpcError::Unencodable)?;
        let descriptors = match scope.take() {
            Some(Table::Sending(list)) => list,
            Some(Table::Received(_)) | None => Vec::new(),
        };
        if payload.len() > MAX_PACKET {
            return Err(IpcError::TooLarge(payload.len()));
        }
        Ok(Self { payload, descriptors })
    }

    /// Sends the packet; `WouldBlock` inside [`IpcError::Socket`] leaves it unsent.
    ///
    /// # Errors
    /// [`IpcError::Closed`] when the peer has gone, [`IpcError::Socket`] otherwise.
    pub fn send(&self, socket: BorrowedFd<'_>) -> Result<(), IpcError> {
        let descriptors: Vec<BorrowedFd<'_>> = self.descriptors.iter().map(AsFd::as_fd).collect();
        fd::send(socket, &self.payload, &descriptors).map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => IpcError::Closed,
            _ => IpcError::Socket(error),
        })
    }
}

/// Encodes and sends one message.
///
/// # Errors
/// Those of [`Packet::encode`] and [`Packet::send`].
pub fn send<T: Serialize>(socket: BorrowedFd<'_>, message: &T) -> Result<(), IpcError> {
    Packet::encode(message)?.send(socket)
}

/// Receives and decodes one message, and who sent it where the socket has `SO_PASSCRED`.
///
/// # Errors
/// Any [`IpcError`]; `WouldBlock` inside [`IpcError::Socket`] means that nothing has arrived yet, all others end the connection.
pub fn receive<T: DeserializeOwned>(socket: BorrowedFd<'_>) -> Result<(T, Option<Sender>), IpcError> {
    let mut payload = vec![0; MAX_PACKET];
    let packet = fd::receive(socket, &mut payload).map_err(|error| match error.kind() {
        io::ErrorKind::ConnectionReset => IpcError::Closed,
        _ => IpcError::Socket(error),
    })?;
    if packet.truncated {
        return Err(IpcError::Truncated);
    }
    if packet.descriptors.len() > MAX_FDS {
        return Err(IpcError::TooManyDescriptors(packet.descriptors.len()));
    }
    if packet.length == 0 {
        return Err(IpcError::Closed);
    }
    let scope = Scope::enter(Table::Received(packet.descriptors.into_iter().map(Some).collect()));
    let (message, rest) = postcard::take_from_bytes(&payload[..packet.length]).map_err(IpcError::Undecodable)?;
    let unclaimed = match scope.take() {
        Some(Table::Received(list)) => list.iter().flatten().count(),
        Some(Table::Sending(_)) | None => 0,
    };
    if unclaimed > 0 {
        return Err(IpcError::UnclaimedDescriptors(unclaimed));
    }
    if !rest.is_empty() {
        return Err(IpcError::Undecodable(postcard::Error::DeserializeBadEncoding));
    }
    Ok((message, packet.sender))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Seek, Write};
    use std::os::fd::AsRawFd;

    use nix::fcntl::{FcntlArg, FdFlag, fcntl};
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};

    use super::*;

    #[derive(Debug, Serialize, Deserialize)]
    struct Note {
        text: String,
        files: Vec<PassedFd>,
    }

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).expect("a socket pair")
    }

    fn scratch(text: &str) -> PassedFd {
        let mut file = anonymous_file();
        file.write_all(text.as_bytes()).expect("written");
        file.rewind().expect("rewound");
        PassedFd::from(OwnedFd::from(file))
    }

    fn anonymous_file() -> File {
        let path = std::env::temp_dir().join(format!(
            "roost-ipc-{}-{:?}",
            std::process::id(),
            std::thread::current().id()
        ));
        let file = File::options()
            .create(true)
            .truncate(true)
            .read(true)
            .write(true)
            .open(&path)
            .expect("opened");
        std::fs::remove_file(path).expect("unlinked");
        file
    }

    /// Sends raw bytes and descriptors past our own encoder.
    fn send_raw(socket: &OwnedFd, payload: &[u8], descriptors: &[BorrowedFd<'_>]) {
        fd::send(socket.as_fd(), payload, descriptors).expect("sent");
    }

    /// How often `marker`'s file is open in this process.
    fn open_copies(marker: &PassedFd) -> usize {
        let identity = |fd: &str| std::fs::read_link(format!("/proc/self/fd/{fd}")).ok();
        let wanted = identity(&marker.as_fd().as_raw_fd().to_string());
        std::fs::read_dir("/proc/self/fd")
            .expect("own descriptors")
            .filter(|entry| identity(&entry.as_ref().expect("entry").file_name().to_string_lossy()) == wanted)
            .count()
    }

    #[test]
    fn a_message_and_its_descriptors_arrive_as_sent() {
        let (ours, theirs) = pair();
        let note = Note {
            text: "two".into(),
            files: vec![scratch("one"), scratch("another")],
        };
        send(ours.as_fd(), &note).expect("sent");
        let (got, sender): (Note, _) = receive(theirs.as_fd()).expect("received");
        assert_eq!((got.text.as_str(), got.files.len(), sender), ("two", 2, None));
        let mut read = String::new();
        for file in got.files {
            let flags = fcntl(&file, FcntlArg::F_GETFD).expect("flags");
            assert!(
                FdFlag::from_bits_retain(flags).contains(FdFlag::FD_CLOEXEC),
                "not close-on-exec"
            );
            File::from(file.into_owned().expect("owned"))
                .read_to_string(&mut read)
                .expect("read");
        }
        assert_eq!(read, "oneanother");
    }

    #[test]
    fn the_sender_is_told_where_the_socket_asks_for_it() {
        let (ours, theirs) = pair();
        setsockopt(&theirs, sockopt::PassCred, &true).expect("SO_PASSCRED");
        send(ours.as_fd(), &7u32).expect("sent");
        let (_, sender) = receive::<u32>(theirs.as_fd()).expect("received");
        let sender = sender.expect("credentials");
        assert_eq!(sender.pid, i32::try_from(std::process::id()).expect("a pid"));
        assert_eq!(sender.uid, nix::unistd::getuid().as_raw());
    }

    #[test]
    fn a_peer_that_has_gone_is_closed_for_sender_and_receiver() {
        let (ours, theirs) = pair();
        drop(theirs);
        assert!(matches!(receive::<u32>(ours.as_fd()), Err(IpcError::Closed)));
        assert!(matches!(send(ours.as_fd(), &1u32), Err(IpcError::Closed)));
    }

    #[test]
    fn an_oversized_packet_is_refused_on_both_sides() {
        let (ours, theirs) = pair();
        setsockopt(&ours, sockopt::SndBuf, &(1 << 20)).expect("SO_SNDBUF");
        let big = vec![1u8; MAX_PACKET + 1];
        assert!(matches!(send(ours.as_fd(), &big), Err(IpcError::TooLarge(_))));
        send_raw(&ours, &big, &[]);
        assert!(matches!(receive::<Vec<u8>>(theirs.as_fd()), Err(IpcError::Truncated)));
    }

    #[test]
    fn hostile_packets_are_errors_and_their_descriptors_are_closed() {
        let marker = scratch("marker");
        let one = marker.as_fd();
        let baseline = open_copies(&marker);
        let valid = |files: u8, indices: &[u8]| {
            let mut bytes = vec![1, b'x', files];
            bytes.extend_from_slice(indices);
            bytes
        };
        let cases: Vec<(&str, Vec<u8>, usize)> = vec![
            ("index out of range", valid(1, &[1]), 1),
            ("index without any descriptor", valid(1, &[0]), 0),
            ("index used twice", valid(2, &[0, 0]), 1),
            ("surplus descriptor", valid(1, &[0]), 2),
            ("descriptors with a message that has none", valid(0, &[]), 3),
            ("garbage", vec![0xff; 40], 1),
            ("cut off", valid(2, &[0]), 2),
            ("bytes left over", [valid(1, &[0]), vec![9]].concat(), 1),
            (
                "more descriptors than allowed",
                valid(9, &[0, 1, 2, 3, 4, 5, 6, 7, 8]),
                9,
            ),
            ("as many descriptors as the kernel passes", valid(0, &[]), 253),
            ("an absurd length", vec![0xff, 0xff, 0xff, 0xff, 0x0f, 1, 2], 0),
        ];
        for (what, payload, count) in cases {
            let (ours, theirs) = pair();
            send_raw(&ours, &payload, &vec![one; count]);
            let outcome = receive::<Note>(theirs.as_fd());
            assert!(outcome.is_err(), "{what} was accepted");
            assert!(
                !matches!(outcome, Err(IpcError::Closed | IpcError::Socket(_))),
                "{what}: {outcome:?}"
            );
            drop((ours, theirs));
            assert_eq!(open_copies(&marker), baseline, "{what} leaked a descriptor");
        }
    }

    #[test]
    fn an_empty_packet_ends_the_connection_and_closes_its_descriptors() {
        let marker = scratch("marker");
        let baseline = open_copies(&marker);
        let (ours, theirs) = pair();
        send_raw(&ours, &[], &[marker.as_fd()]);
        assert!(matches!(receive::<Note>(theirs.as_fd()), Err(IpcError::Closed)));
        assert_eq!(open_copies(&marker), baseline);
    }

    #[test]
    fn too_many_descriptors_are_not_encoded() {
        let note = Note {
            text: String::new(),
            files: vec![scratch("x"); MAX_FDS + 1],
        };
        assert!(matches!(Packet::encode(&note), Err(IpcError::Unencodable(_))));
    }

    #[test]
    fn a_descriptor_outside_a_packet_does_not_serialise() {
        assert!(postcard::to_stdvec(&scratch("x")).is_err());
        assert!(postcard::from_bytes::<PassedFd>(&[0]).is_err());
    }
}
