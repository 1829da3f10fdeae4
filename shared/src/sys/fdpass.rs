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
const MESSAGE_BYTES: usize = 64;

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

/// Sends one message, with a descriptor if one is given.
pub fn send(socket: BorrowedFd<'_>, message: &[u8], descriptor: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
    let raw: Vec<RawFd> = descriptor.iter().map(|fd| fd.as_raw_fd()).collect();
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
    /// The descriptor that came with them.
    pub descriptor: Option<OwnedFd>,
}

/// Receives one message, or `EAGAIN`.
pub fn receive(socket: BorrowedFd<'_>) -> Result<Received, Errno> {
    let mut buffer = [0u8; MESSAGE_BYTES];
    let mut space = cmsg_space!(RawFd);
    let mut parts = [IoSliceMut::new(&mut buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    let received = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    let bytes = received.bytes;
    let mut descriptor = None;
    for control in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = control {
            for fd in raw {
                // SAFETY: the kernel has just installed this descriptor for us (unix_detach_fds), and
                // nobody else knows its number.
                descriptor = Some(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
    }
    Ok(Received {
        message: buffer[..bytes].to_vec(),
        descriptor,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    #[test]
    fn a_descriptor_travels_with_its_message() {
        let (left, right) = pair().unwrap();
        let (mut reader, writer) = std::io::pipe().unwrap();
        send(left.as_fd(), b"log", Some(writer.as_fd())).unwrap();
        drop(writer);
        let received = receive(right.as_fd()).unwrap();
        assert_eq!(received.message, b"log");
        let mut file = std::fs::File::from(received.descriptor.unwrap());
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
