//! Descriptors and small messages over a unix `SOCK_SEQPACKET` pair (`SCM_RIGHTS`, unix(7)).

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use anyhow::{Context, Result};
use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
    socketpair,
};

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
    /// The descriptors that came with them; fewer than were sent when this process may open no more.
    pub descriptors: Vec<OwnedFd>,
}

/// Receives one message, or `EAGAIN`.
pub fn receive(socket: BorrowedFd<'_>) -> Result<Received, Errno> {
    let mut buffer = [0u8; MESSAGE_BYTES];
    let mut space = cmsg_space!([RawFd; MAX_DESCRIPTORS]);
    let mut parts = [IoSliceMut::new(&mut buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    let received = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    let bytes = received.bytes;
    let mut descriptors = Vec::new();
    for control in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = control {
            for fd in raw {
                // SAFETY: the kernel has just installed this descriptor for us (unix_detach_fds), and
                // nobody else knows its number.
                descriptors.push(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
    }
    Ok(Received {
        message: buffer[..bytes].to_vec(),
        descriptors,
    })
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
    fn a_closed_end_reads_as_an_empty_message() {
        let (left, right) = pair().unwrap();
        assert_eq!(receive(right.as_fd()).err(), Some(Errno::EAGAIN));
        drop(left);
        assert!(receive(right.as_fd()).unwrap().message.is_empty());
    }
}
