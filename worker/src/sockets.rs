//! The epoll instance of the sessions' sockets, and the plain calls on them.
//!
//! mio always adds EPOLLIN to what it watches; an offloaded socket must not have it, or every segment
//! that the kernel forwards wakes the worker. So sessions have an epoll of their own, which is watched
//! by mio like any other descriptor. All of it is edge-triggered.

use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result};
use culvert_shared::sys::socket::tcp_info;
use nix::errno::Errno;
use nix::libc;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{self, MsgFlags, Shutdown, SockaddrStorage, getsockopt, setsockopt, sockopt};

use crate::proxy_protocol::canonical;
use crate::table::{Side, Token};

/// What a session waits for on one socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// The end of the stream, or an error.
    End,
    /// Data to look at.
    Read,
    /// That a connection attempt ends.
    Connected,
    /// Data and space.
    Data,
}

impl Interest {
    fn flags(self) -> EpollFlags {
        let wanted = match self {
            Interest::End => EpollFlags::EPOLLRDHUP,
            Interest::Read => EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLIN,
            Interest::Connected => EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLOUT,
            Interest::Data => EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLOUT | EpollFlags::EPOLLIN,
        };
        wanted | EpollFlags::EPOLLET
    }
}

/// The epoll instance.
pub struct Sockets(Epoll);

impl Sockets {
    /// A new instance.
    pub fn new() -> Result<Sockets> {
        Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)
            .map(Sockets)
            .context("failed to create an epoll instance")
    }

    /// Its descriptor, to be watched.
    pub fn raw_fd(&self) -> i32 {
        self.0.0.as_raw_fd()
    }

    /// Starts to watch a socket.
    pub fn watch(&self, fd: &OwnedFd, token: Token, side: Side, interest: Interest) -> Result<(), Errno> {
        self.0
            .add(fd, EpollEvent::new(interest.flags(), token.encode(side)))
    }

    /// Changes what is waited for; what is already there is reported again.
    pub fn change(&self, fd: &OwnedFd, token: Token, side: Side, interest: Interest) -> Result<(), Errno> {
        self.0
            .modify(fd, &mut EpollEvent::new(interest.flags(), token.encode(side)))
    }

    /// What has happened, without waiting; fills `events` and returns how many.
    pub fn take(&self, events: &mut [EpollEvent]) -> Result<usize, Errno> {
        self.0.wait(events, EpollTimeout::ZERO)
    }
}

/// Reads what is there.
pub fn receive(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<usize, Errno> {
    retry(|| socket::recv(fd.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT))
}

/// Looks at what is there, and leaves it there.
pub fn peek(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<usize, Errno> {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_PEEK;
    retry(|| socket::recv(fd.as_raw_fd(), buffer, flags))
}

/// Writes what fits.
pub fn send(fd: BorrowedFd<'_>, bytes: &[u8]) -> Result<usize, Errno> {
    retry(|| {
        socket::send(
            fd.as_raw_fd(),
            bytes,
            MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL,
        )
    })
}

fn retry(mut call: impl FnMut() -> nix::Result<usize>) -> Result<usize, Errno> {
    loop {
        match call() {
            Err(Errno::EINTR) => (),
            result => return result,
        }
    }
}

/// Ends the stream that we write; the other one goes on.
pub fn shut_down_write(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    socket::shutdown(fd.as_raw_fd(), Shutdown::Write)
}

/// The error that waits on a socket, and clears it.
pub fn pending_error(fd: BorrowedFd<'_>) -> Option<Errno> {
    match getsockopt(&fd, sockopt::SocketError) {
        Ok(0) => None,
        Ok(code) => Some(Errno::from_raw(code)),
        Err(error) => Some(error),
    }
}

/// Whether closing the socket resets the connection. On from a socket's birth, so that whatever kills
/// the worker cannot turn a truncated stream into a clean end; off only for the orderly close.
pub fn reset_on_close(fd: BorrowedFd<'_>, on: bool) -> Result<(), Errno> {
    setsockopt(
        &fd,
        sockopt::Linger,
        &libc::linger {
            l_onoff: on.into(),
            l_linger: 0,
        },
    )
}

/// Sends small segments at once.
pub fn no_delay(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    setsockopt(&fd, sockopt::TcpNoDelay, &true)
}

/// The address that an accepted connection was made to; a wildcard listener does not tell.
pub fn local_address(fd: BorrowedFd<'_>) -> Option<SocketAddr> {
    let address: SockaddrStorage = socket::getsockname(fd.as_raw_fd()).ok()?;
    let found = address
        .as_sockaddr_in()
        .map(|address| SocketAddr::V4((*address).into()));
    let found = found.or_else(|| {
        address
            .as_sockaddr_in6()
            .map(|address| SocketAddr::V6((*address).into()))
    });
    found.map(canonical)
}

/// What the host lets a process without rights ask for.
#[derive(Clone, Copy, Debug)]
pub struct BufferLimits {
    /// `net.core.wmem_max`.
    pub send_bytes: usize,
    /// `net.core.rmem_max`.
    pub receive_bytes: usize,
}

impl BufferLimits {
    /// Reads them; what cannot be read is taken for zero, and buffers are left to the kernel.
    pub fn read() -> BufferLimits {
        let read = |name: &str| {
            let text = std::fs::read_to_string(format!("/proc/sys/net/core/{name}"));
            text.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
        };
        BufferLimits {
            send_bytes: read("wmem_max"),
            receive_bytes: read("rmem_max"),
        }
    }
}

/// Fixes the size of a send buffer; the kernel doubles it.
pub fn set_send_buffer(fd: BorrowedFd<'_>, bytes: usize) -> Result<(), Errno> {
    setsockopt(&fd, sockopt::SndBuf, &bytes)
}

/// Fixes the size of a receive buffer; the kernel doubles it.
pub fn set_receive_buffer(fd: BorrowedFd<'_>, bytes: usize) -> Result<(), Errno> {
    setsockopt(&fd, sockopt::RcvBuf, &bytes)
}

/// The size of a receive buffer, as the kernel counts it: twice what was asked for.
pub fn receive_buffer(fd: BorrowedFd<'_>) -> Result<usize, Errno> {
    getsockopt(&fd, sockopt::RcvBuf)
}

/// Whether the peer may send nothing: a smaller buffer breaks no promise then. Linux tells it since 6.2; an older
/// one never says so.
pub fn is_window_closed(fd: BorrowedFd<'_>) -> bool {
    tcp_info(fd).is_ok_and(|info| info.receive_window == Some(0))
}

/// How large a connection's segments are.
pub fn segment_bytes(fd: BorrowedFd<'_>) -> Result<usize, Errno> {
    getsockopt(&fd, sockopt::TcpMaxSeg).map(|bytes| bytes as usize)
}
