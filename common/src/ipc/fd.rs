//! One packet in, one packet out, with the descriptors that ride along: the only unsafe code of this crate.
//!
//! Written on `libc` because the safe wrapper at hand answers a truncated control message with an error and forgets the
//! descriptors that the kernel had installed by then: a peer could fill our descriptor table packet by packet. Here every
//! installed descriptor becomes an `OwnedFd` before anything is judged.
#![allow(
    unsafe_code,
    reason = "sendmsg and recvmsg with control messages; see SAFETY at each block"
)]

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Most descriptors the kernel passes in one message (`SCM_MAX_FD`), whatever we accept.
const KERNEL_MAX_FDS: usize = 253;

/// Control buffer that holds the most a peer can send: 253 descriptors and its credentials. In `u64`s for the alignment of
/// `cmsghdr`.
const CONTROL_WORDS: usize = 140;

/// Who sent a packet, as the kernel tells it in our user namespace (`SCM_CREDENTIALS`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sender {
    /// Process id; 0 where it is in no namespace of ours.
    pub pid: i32,
    /// User id; the overflow uid (65534) where it has no mapping here.
    pub uid: u32,
    /// Group id, likewise.
    pub gid: u32,
}

/// A packet as the kernel delivered it. Nothing has been judged yet but every descriptor is owned.
#[derive(Debug)]
pub(super) struct RawPacket {
    pub(super) length: usize,
    pub(super) descriptors: Vec<OwnedFd>,
    pub(super) sender: Option<Sender>,
    /// Payload or control data did not fit.
    pub(super) truncated: bool,
}

/// Receives one packet into `payload`. Blocks, or fails with `WouldBlock`, as the socket is set. Received descriptors are
/// close-on-exec. A length of 0 is the peer's end of file or an empty packet; SEQPACKET cannot tell them apart.
pub(super) fn receive(socket: BorrowedFd<'_>, payload: &mut [u8]) -> io::Result<RawPacket> {
    let mut control = [0u64; CONTROL_WORDS];
    let mut iov = libc::iovec {
        iov_base: payload.as_mut_ptr().cast(),
        iov_len: payload.len(),
    };
    // SAFETY: an all-zero msghdr is valid (null pointers with zero lengths).
    let mut header: libc::msghdr = unsafe { mem::zeroed() };
    header.msg_iov = &raw mut iov;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = mem::size_of_val(&control);
    let length = loop {
        // SAFETY: header points at `iov` and `control`, both alive and exclusively ours for the call, with their true lengths.
        let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_CMSG_CLOEXEC) };
        match usize::try_from(got) {
            Ok(got) => break got,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    };
    let mut packet = RawPacket {
        length,
        descriptors: Vec::new(),
        sender: None,
        truncated: header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0,
    };
    // SAFETY: the kernel wrote msg_controllen bytes of well-formed control messages into `control`.
    let mut message = unsafe { libc::CMSG_FIRSTHDR(&raw const header) };
    while !message.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR return null or a header that lies inside the control buffer.
        let current = unsafe { *message };
        // SAFETY: as above; the data follows its header.
        let data = unsafe { libc::CMSG_DATA(message) };
        // SAFETY: pure arithmetic on a length.
        let overhead = unsafe { libc::CMSG_LEN(0) } as usize;
        let bytes = (current.cmsg_len as usize).saturating_sub(overhead);
        match (current.cmsg_level, current.cmsg_type) {
            (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
                for index in 0..bytes / mem::size_of::<RawFd>() {
                    // SAFETY: index is within the descriptors of this message; the data need not be aligned.
                    let raw: RawFd = unsafe { data.cast::<RawFd>().wrapping_add(index).read_unaligned() };
                    // SAFETY: the kernel installed this descriptor for us just now and nobody else knows of it.
                    packet.descriptors.push(unsafe { OwnedFd::from_raw_fd(raw) });
                }
            }
            (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) if bytes >= mem::size_of::<libc::ucred>() => {
                // SAFETY: the message is at least as long as a ucred; the data need not be aligned.
                let credentials: libc::ucred = unsafe { data.cast::<libc::ucred>().read_unaligned() };
                packet.sender = Some(Sender {
                    pid: credentials.pid,
                    uid: credentials.uid,
                    gid: credentials.gid,
                });
            }
            _ => {}
        }
        // SAFETY: message is inside the control buffer that header describes.
        message = unsafe { libc::CMSG_NXTHDR(&raw const header, message) };
    }
    Ok(packet)
}

/// Sends one packet. A peer that has gone is an error (`BrokenPipe`), never a signal.
pub(super) fn send(socket: BorrowedFd<'_>, payload: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    debug_assert!(descriptors.len() <= KERNEL_MAX_FDS);
    let mut control = [0u64; CONTROL_WORDS];
    let mut iov = libc::iovec {
        iov_base: payload.as_ptr().cast_mut().cast(),
        iov_len: payload.len(),
    };
    // SAFETY: an all-zero msghdr is valid (null pointers with zero lengths).
    let mut header: libc::msghdr = unsafe { mem::zeroed() };
    header.msg_iov = &raw mut iov;
    header.msg_iovlen = 1;
    if !descriptors.is_empty() {
        let bytes = u32::try_from(mem::size_of_val(descriptors)).map_err(|_| io::ErrorKind::InvalidInput)?;
        header.msg_control = control.as_mut_ptr().cast();
        // SAFETY: pure arithmetic on a length.
        header.msg_controllen = unsafe { libc::CMSG_SPACE(bytes) } as _;
        // SAFETY: msg_controllen is within `control`: 253 descriptors need 1,032 of its 1,120 bytes.
        let message = unsafe { libc::CMSG_FIRSTHDR(&raw const header) };
        let head = libc::cmsghdr {
            // SAFETY: pure arithmetic on a length.
            cmsg_len: unsafe { libc::CMSG_LEN(bytes) } as _,
            cmsg_level: libc::SOL_SOCKET,
            cmsg_type: libc::SCM_RIGHTS,
        };
        // SAFETY: CMSG_FIRSTHDR returned a header inside `control`, because msg_controllen has room for one.
        unsafe { message.write(head) };
        // SAFETY: as above; the data follows its header.
        let data = unsafe { libc::CMSG_DATA(message) };
        for (index, descriptor) in descriptors.iter().enumerate() {
            // SAFETY: CMSG_SPACE made room for this many descriptors behind the header.
            unsafe {
                data.cast::<RawFd>()
                    .wrapping_add(index)
                    .write_unaligned(descriptor.as_raw_fd())
            };
        }
    }
    loop {
        // SAFETY: header points at `iov` and `control`, alive for the call; the kernel only reads them.
        let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const header, libc::MSG_NOSIGNAL) };
        match usize::try_from(sent) {
            Ok(_) => return Ok(()), // SEQPACKET sends whole packets or nothing
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// Has the runtime watch a socket.
#[cfg(feature = "privd")]
pub(super) fn watch(socket: OwnedFd) -> io::Result<tokio::io::unix::AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd always returns the same descriptor and keeps it open for as long as it lives, which is what `register`
    // asks of its value; nobody replaces the socket inside the AsyncFd.
    let watched = unsafe { tokio::io::unix::AsyncFd::register(socket) };
    watched.map_err(io::Error::from)
}
