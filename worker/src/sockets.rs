//! The epoll instance that the worker waits on, and the plain calls on sockets.
//!
//! mio always adds EPOLLIN to what it watches; an offloaded socket must not have it, or every segment
//! that the kernel forwards wakes the worker. So sessions and listeners stand in an epoll of their own, and mio's,
//! for all that is rare, is watched in it like any other descriptor: what comes often costs one wait and no more.
//!
//! Sessions are edge-triggered. What is watched anew, or for something else, is reported if it is there already.
//! Listeners are not: a connection that was left is reported again.

use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result};
use culvert_shared::sys::socket::{receive_memory, tcp_info};
use nix::errno::Errno;
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
    /// Space.
    Write,
    /// Data and space.
    Data,
}

impl Interest {
    fn flags(self) -> EpollFlags {
        let wanted = match self {
            Interest::End => EpollFlags::EPOLLRDHUP,
            Interest::Read => EpollFlags::EPOLLRDHUP | READ,
            Interest::Connected | Interest::Write => EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLOUT,
            Interest::Data => EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLOUT | READ,
        };
        wanted | EpollFlags::EPOLLET
    }
}

/// Data, and whether some of it is urgent.
const READ: EpollFlags = EpollFlags::EPOLLIN.union(EpollFlags::EPOLLPRI);

/// What an event is about.
pub enum Source {
    /// A socket of a session.
    Session(Token, Side),
    /// A listener.
    Listener(usize),
    /// mio's poll, with all the rest.
    Poll,
}

/// A slot that no session has: the upper half of the data says what it is then.
const NO_SESSION: u64 = u32::MAX as u64;
/// mio's poll; a smaller number is a listener's.
const POLL: u64 = u32::MAX as u64;

impl Source {
    fn decode(data: u64) -> Source {
        match (data & NO_SESSION, data >> 32) {
            (NO_SESSION, POLL) => Source::Poll,
            (NO_SESSION, listener) => Source::Listener(listener as usize),
            _ => {
                let (token, side) = Token::decode(data);
                Source::Session(token, side)
            }
        }
    }
}

/// The epoll instance.
pub struct Sockets {
    epoll: Epoll,
    events: Vec<EpollEvent>,
}

/// Events that one turn takes.
const TURN_EVENTS: usize = 256;

impl Sockets {
    /// A new instance.
    pub fn new() -> Result<Sockets> {
        Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)
            .map(|epoll| Sockets {
                epoll,
                events: vec![EpollEvent::empty(); TURN_EVENTS],
            })
            .context("failed to create an epoll instance")
    }

    /// Watches mio's poll, until all that it has was asked for.
    pub fn watch_poll(&self, poll: BorrowedFd<'_>) -> Result<(), Errno> {
        let event = EpollEvent::new(EpollFlags::EPOLLIN, POLL << 32 | NO_SESSION);
        self.epoll.add(poll, event)
    }

    /// Watches a listener for connections.
    pub fn watch_listener(&self, fd: BorrowedFd<'_>, listener: usize) -> Result<(), Errno> {
        self.epoll.add(fd, listener_event(listener, true))
    }

    /// Says whether connections of a listener are wanted now.
    pub fn heed_listener(&self, fd: BorrowedFd<'_>, listener: usize, wanted: bool) -> Result<(), Errno> {
        self.epoll.modify(fd, &mut listener_event(listener, wanted))
    }

    /// Watches a listener no more; closing it is not enough while another process has it too.
    pub fn unwatch_listener(&self, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        self.epoll.delete(fd)
    }

    /// Starts to watch a socket.
    pub fn watch(&self, fd: &OwnedFd, token: Token, side: Side, interest: Interest) -> Result<(), Errno> {
        self.epoll
            .add(fd, EpollEvent::new(interest.flags(), token.encode(side)))
    }

    /// Changes what is waited for; what is already there is reported again.
    pub fn change(&self, fd: &OwnedFd, token: Token, side: Side, interest: Interest) -> Result<(), Errno> {
        self.epoll
            .modify(fd, &mut EpollEvent::new(interest.flags(), token.encode(side)))
    }

    /// Watches a socket no more; closing it is not enough while another process has it too.
    pub fn unwatch(&self, fd: &OwnedFd) {
        // It cannot fail: it is watched.
        let _ = self.epoll.delete(fd);
    }

    /// Waits until something has happened, for so long at most (`None`: without end), and says how much: see
    /// [`Sockets::event`]. If it is more than one turn takes, the rest comes first the next time.
    pub fn wait(&mut self, patience: Option<Duration>) -> Result<usize, Errno> {
        let longest = EpollTimeout::MAX;
        let timeout = patience.map_or(EpollTimeout::NONE, |patience| {
            EpollTimeout::try_from(patience).unwrap_or(longest)
        });
        match self.epoll.wait(&mut self.events, timeout) {
            Err(Errno::EINTR) => Ok(0),
            result => result,
        }
    }

    /// One of the events that the last wait brought.
    pub fn event(&self, index: usize) -> (Source, EpollFlags) {
        let event = &self.events[index];
        (Source::decode(event.data()), event.events())
    }
}

fn listener_event(listener: usize, wanted: bool) -> EpollEvent {
    let flags = match wanted {
        true => EpollFlags::EPOLLIN,
        false => EpollFlags::empty(),
    };
    EpollEvent::new(flags, (listener as u64) << 32 | NO_SESSION)
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

/// Whether the stream has ended and nothing of it is left to be read.
pub fn has_ended_unread(fd: BorrowedFd<'_>) -> bool {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_PEEK;
    matches!(retry(|| socket::recv(fd.as_raw_fd(), &mut [0u8], flags)), Ok(0))
}

/// Takes as many bytes out as `buffer` is long, which were seen to be there; what is in `buffer` afterwards means nothing.
/// TCP does not even copy them then (MSG_TRUNC in tcp(7)).
pub fn discard(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<(), Errno> {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC;
    let mut left = buffer.len();
    while left > 0 {
        match retry(|| socket::recv(fd.as_raw_fd(), &mut buffer[..left], flags))? {
            // It was reset meanwhile.
            0 => return Err(Errno::ECONNRESET),
            taken => left -= taken.min(left),
        }
    }
    Ok(())
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

/// Whether a connection attempt has succeeded, though its peer may have ended its stream since.
pub fn is_connected(fd: BorrowedFd<'_>) -> bool {
    socket::getpeername::<SockaddrStorage>(fd.as_raw_fd()).is_ok()
}

/// Sends small segments at once.
pub fn no_delay(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    setsockopt(&fd, sockopt::TcpNoDelay, &true)
}

/// Has urgent data stand among the rest, where it was sent: a proxy knows no other use for it, and what a read leaves out
/// would be lost (tcp_recvmsg_locked, SO_OOBINLINE in socket(7)).
pub fn urgent_inline(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    setsockopt(&fd, sockopt::OobInline, &true)
}

/// The address that an accepted connection was made to; a wildcard listener does not tell.
pub fn local_address(fd: BorrowedFd<'_>) -> Option<SocketAddr> {
    internet(socket::getsockname(fd.as_raw_fd()).ok()?)
}

/// The address that a connection was made from; none once it is reset.
pub fn peer_address(fd: BorrowedFd<'_>) -> Option<SocketAddr> {
    internet(socket::getpeername(fd.as_raw_fd()).ok()?)
}

fn internet(address: SockaddrStorage) -> Option<SocketAddr> {
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
    /// The largest receive buffer that a socket of the host may have, grown by itself or asked for.
    pub window_bytes: Option<u32>,
}

impl BufferLimits {
    /// Asks for them; what cannot be had is taken for zero, and buffers are left to the kernel. Not every kernel and sandbox
    /// shows the two sysctls, so a socket is asked for more than there is.
    pub fn read() -> BufferLimits {
        let probe = socket::socket(
            socket::AddressFamily::Inet,
            socket::SockType::Stream,
            socket::SockFlag::SOCK_CLOEXEC,
            None,
        );
        // The kernel doubles what is asked for, up to this.
        const MOST: usize = i32::MAX as usize / 2;
        let (asked_for, send) = probe.map_or((None, None), |probe| {
            let asked_for =
                setsockopt(&probe, sockopt::RcvBuf, &MOST).and_then(|_| getsockopt(&probe, sockopt::RcvBuf));
            let send =
                setsockopt(&probe, sockopt::SndBuf, &MOST).and_then(|_| getsockopt(&probe, sockopt::SndBuf));
            (asked_for.ok(), send.ok())
        });
        // The last of its numbers.
        let grown = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_rmem")
            .ok()
            .and_then(|text| text.split_whitespace().next_back()?.parse().ok());
        let largest = grown
            .zip(asked_for)
            .map(|(grown, bytes): (usize, usize)| grown.max(bytes));
        BufferLimits {
            send_bytes: send.unwrap_or(0) / 2,
            receive_bytes: asked_for.unwrap_or(0) / 2,
            window_bytes: largest.map(|bytes| u32::try_from(bytes).unwrap_or(u32::MAX)),
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

/// Whether what the peer may still send finds room in a receive buffer for which so many bytes are asked, and in which nothing
/// waits. Where Linux does not tell (before 6.2) that is taken to be so: no more than an empty buffer takes was ever promised.
pub fn finds_room(fd: BorrowedFd<'_>, bytes: usize) -> bool {
    /// What a segment costs beside its bytes: its structures, and pages that are not full.
    const SEGMENT: u64 = 3072;
    let (Ok(info), Ok(waiting)) = (tcp_info(fd), receive_memory(fd)) else {
        return false;
    };
    let promised = info.receive_window.unwrap_or(0);
    // A segment is taken as long as what is there does not go beyond the buffer (tcp_try_rmem_schedule, 6.12), so the last needs
    // no room.
    let segment = info.receive_segment.max(1);
    let before_the_last = u64::from(promised.saturating_sub(segment));
    waiting == 0 && before_the_last + SEGMENT * u64::from(promised / segment) <= 2 * bytes as u64
}

/// How large a connection's segments are.
pub fn segment_bytes(fd: BorrowedFd<'_>) -> Result<usize, Errno> {
    getsockopt(&fd, sockopt::TcpMaxSeg).map(|bytes| bytes as usize)
}
