//! Descriptors and small messages over a unix `SOCK_SEQPACKET` pair (`SCM_RIGHTS`, unix(7)).

use std::io::IoSlice;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair};

/// The longest message, in bytes.
pub const MESSAGE_BYTES: usize = 4096;
/// The most descriptors of one message; the kernel's limit is 253 (SCM_MAX_FD, net/scm.h).
pub const MAX_DESCRIPTORS: usize = 250;

/// Makes a connected pair; messages keep their boundaries, both ends are non-blocking and close on exec.
pub fn pair() -> Result<(OwnedFd, OwnedFd)> {
    socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
    )
    .context("failed to create a socket pair between master and worker")
}

/// Sends one message, with at most [`MAX_DESCRIPTORS`].
pub fn send(socket: BorrowedFd<'_>, message: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<(), Errno> {
    let raw: Vec<RawFd> = descriptors.iter().map(|fd| fd.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(message)],
        control,
        MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT,
        None,
    )
    .map(|_| ())
}

/// A received message; an empty one means that the other end is gone.
pub struct Received {
    /// The bytes.
    pub message: Vec<u8>,
    /// The descriptors that came with them, the first of those that were sent.
    pub descriptors: Vec<OwnedFd>,
    /// More were sent: this process may open no more, or not so many in a message.
    pub are_missing: bool,
}

/// Receives one message, or `EAGAIN`.
pub fn receive(socket: BorrowedFd<'_>) -> Result<Received, Errno> {
    loop {
        match receive_now(socket) {
            // The other end went with something unread: said once, before what it had sent (unix_release_sock).
            Err(Errno::ECONNRESET) => {}
            received => return received,
        }
    }
}

/// Room for the control message with the descriptors, aligned as the kernel and the macros of cmsg(3) want it.
type Control = [u64; (size_of::<libc::cmsghdr>() + MAX_DESCRIPTORS * size_of::<RawFd>()).div_ceil(8)];

/// By hand, because where descriptors are missing nix gives none of those out that are there, and they would stay open.
fn receive_now(socket: BorrowedFd<'_>) -> Result<Received, Errno> {
    let mut bytes = [0u8; MESSAGE_BYTES];
    let mut control: Control = [0; _];
    let mut part = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: zero is valid for its integers, and null for its pointers.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control);
    let flags = libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT;
    // SAFETY: the header names memory that outlives the call, with its sizes.
    let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags) };
    let length = Errno::result(received)?;
    Ok(Received {
        // SAFETY: the kernel has filled the header in, and `control`, which it names.
        descriptors: unsafe { descriptors_of(&header) },
        message: bytes[..length as usize].to_vec(),
        are_missing: header.msg_flags & libc::MSG_CTRUNC != 0,
    })
}

/// Takes the descriptors that came with a message.
///
/// # Safety
/// The header is one that recvmsg(2) has just filled in, and its control buffer is there; asked once.
unsafe fn descriptors_of(header: &libc::msghdr) -> Vec<OwnedFd> {
    let mut descriptors = Vec::new();
    // SAFETY: the macros stay within the `msg_controllen` bytes that the kernel wrote, aligned messages whose lengths
    // it has made fit (put_cmsg, scm_detach_fds). It has just installed each of the descriptors for us, and nobody
    // else knows its number.
    unsafe {
        let mut at = libc::CMSG_FIRSTHDR(header);
        while let Some(control) = at.as_ref() {
            if (control.cmsg_level, control.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
                let bytes = control.cmsg_len.saturating_sub(libc::CMSG_LEN(0) as usize);
                let first = libc::CMSG_DATA(at).cast::<RawFd>();
                for n in 0..bytes / size_of::<RawFd>() {
                    descriptors.push(OwnedFd::from_raw_fd(first.add(n).read_unaligned()));
                }
            }
            at = libc::CMSG_NXTHDR(header, at);
        }
    }
    descriptors
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    #[test]
    fn descriptors_travel_with_their_message() {
        let (left, right) = pair().unwrap();
        let (mut reader, writer) = std::io::pipe().unwrap();
        send(left.as_fd(), b"log", &[writer.as_fd(), writer.as_fd()]).unwrap();
        drop(writer);
        let received = receive(right.as_fd()).unwrap();
        assert_eq!(received.message, b"log");
        assert_eq!(received.descriptors.len(), 2);
        let mut file = std::fs::File::from(received.descriptors.into_iter().next().unwrap());
        file.write_all(b"x").unwrap();
        drop(file);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "x");
    }

    #[test]
    fn descriptors_that_come_without_the_rest_are_given_out_and_closed() {
        let (left, right) = pair().unwrap();
        let (mut reader, writer) = std::io::pipe().unwrap();
        // As many as the kernel takes (SCM_MAX_FD): for the last ones the receiver has no room.
        send(left.as_fd(), b"many", &[writer.as_fd(); 253]).unwrap();
        send(left.as_fd(), b"all", &[writer.as_fd(); MAX_DESCRIPTORS]).unwrap();
        drop(writer);
        let received = receive(right.as_fd()).unwrap();
        assert_eq!(received.message, b"many");
        assert_eq!(
            (received.descriptors.len(), received.are_missing),
            (MAX_DESCRIPTORS, true)
        );
        drop(received);
        let received = receive(right.as_fd()).unwrap();
        assert_eq!(
            (received.descriptors.len(), received.are_missing),
            (MAX_DESCRIPTORS, false)
        );
        drop(received);
        // Ends only when nobody has the other end any more.
        let mut nothing = Vec::new();
        assert_eq!(reader.read_to_end(&mut nothing).unwrap(), 0);
    }

    #[test]
    fn what_was_sent_before_an_end_that_left_something_unread_is_heard() {
        let (left, right) = pair().unwrap();
        send(right.as_fd(), b"unread", &[]).unwrap();
        send(left.as_fd(), b"last words", &[]).unwrap();
        drop(left);
        assert_eq!(receive(right.as_fd()).unwrap().message, b"last words");
        assert!(receive(right.as_fd()).unwrap().message.is_empty());
    }

    #[test]
    fn a_closed_end_reads_as_an_empty_message() {
        let (left, right) = pair().unwrap();
        assert_eq!(receive(right.as_fd()).err(), Some(Errno::EAGAIN));
        drop(left);
        assert!(receive(right.as_fd()).unwrap().message.is_empty());
    }
}
