//! Socket calls that `nix` has no safe wrapper for.

use std::io;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};

/// What the kernel tells of a TCP connection that user space may not compute itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpInfo {
    /// Bytes that the peer has acknowledged (`tcpi_bytes_acked`, tcp_get_info under the socket lock).
    pub bytes_acked: u64,
    /// Bytes received in order (`tcpi_bytes_received`), an end of stream counting as one (tcp_fin).
    pub bytes_received: u64,
    /// Segments with data received, those that the network card put together counted one by one (`tcpi_data_segs_in`).
    pub segments_received: u32,
    /// Neither end has ended its stream.
    pub established: bool,
    /// Both have, and all of ours has been sent once: from here Linux sends no reset (tcp_disconnect, 6.12).
    pub past_reset: bool,
    /// Bytes that the last ACK allowed the peer to send (`tcpi_rcv_wnd`); `None` before Linux 6.2.
    pub receive_window: Option<u32>,
    /// As many bytes as the peer's segments have, as the kernel estimates it (`tcpi_rcv_mss`).
    pub receive_segment: u32,
    /// Bytes on their way, whole segments: sent and not acknowledged (`tcpi_unacked`).
    pub in_flight_bytes: u64,
    /// Nothing has been heard since what is on its way was sent again after a timeout (`tcpi_retransmits`), or since a closed window was
    /// probed the third time (`tcpi_probes`): within 500 ms a peer answers once (tcp_oow_rate_limited, 6.12).
    pub timed_out: bool,
    /// The smoothed round-trip time (`tcpi_rtt`).
    pub round_trip: Duration,
    /// By how many bits windows are shifted: those that the peer tells in the lower four, our own in the others.
    pub window_scales: u8,
}

// Of the kernel's tcp_states.h.
const ESTABLISHED: u8 = 1;
const LAST_ACK: u8 = 9;
const CLOSING: u8 = 11;

/// Reads `TCP_INFO`.
pub fn tcp_info(fd: BorrowedFd<'_>) -> io::Result<TcpInfo> {
    // SAFETY: `tcp_info` is plain numbers, for which all zeros is a valid value.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut len = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to `info`, which lives across the call.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            std::ptr::from_mut(&mut info).cast(),
            &mut len,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(TcpInfo {
        bytes_acked: info.tcpi_bytes_acked,
        bytes_received: info.tcpi_bytes_received,
        segments_received: info.tcpi_data_segs_in,
        established: info.tcpi_state == ESTABLISHED,
        past_reset: matches!(info.tcpi_state, LAST_ACK | CLOSING) && info.tcpi_notsent_bytes == 0,
        receive_window: (len as usize > offset_of!(libc::tcp_info, tcpi_rcv_wnd))
            .then_some(info.tcpi_rcv_wnd),
        receive_segment: info.tcpi_rcv_mss,
        in_flight_bytes: u64::from(info.tcpi_unacked) * u64::from(info.tcpi_snd_mss),
        timed_out: info.tcpi_retransmits > 0 || info.tcpi_probes > 2,
        round_trip: Duration::from_micros(info.tcpi_rtt.into()),
        window_scales: info.tcpi_snd_rcv_wscale,
    })
}

impl TcpInfo {
    /// Whether the connection may be deaf: its receive buffer is full, its window is closed, and Linux takes no acknowledgement from
    /// a segment beyond that window (tcp_sequence; since 6.17 not from one that begins within it either). A peer that had sent
    /// more before it closed has nothing else to say it with, so what it has long received is sent to it again and again
    /// until something is read here.
    pub fn is_deaf(&self) -> bool {
        self.timed_out && self.receive_window == Some(0)
    }
}

/// Whether neither end has ended its stream: only then does a sockmap take the socket
/// (sock_map_sk_state_allowed).
pub fn is_established(fd: BorrowedFd<'_>) -> bool {
    tcp_info(fd).is_ok_and(|info| info.established)
}

/// Bytes written to the socket and not yet acknowledged (`SIOCOUTQ`, tcp(7)).
pub fn unacknowledged_bytes(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: TIOCOUTQ writes one int to the address given, which lives across the call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCOUTQ, &mut bytes) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(bytes.max(0) as u64)
}

/// What the segments in the receive queue cost, in bytes of kernel memory (`SO_MEMINFO`, sk_get_meminfo, 6.12).
pub fn receive_memory(fd: BorrowedFd<'_>) -> io::Result<u64> {
    // SK_MEMINFO_RMEM_ALLOC, the first of them, in include/uapi/linux/sock_diag.h.
    let mut allocated = 0u32;
    get(fd, libc::SOL_SOCKET, libc::SO_MEMINFO, &mut allocated)?;
    Ok(allocated.into())
}

/// A number that the kernel has of a socket, or the first of several.
trait Number: Copy {}
impl Number for u32 {}
impl Number for u64 {}

fn get<T: Number>(fd: BorrowedFd<'_>, level: i32, option: i32, value: &mut T) -> io::Result<()> {
    let mut len = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to `value`, any of which are a number, and which lives across the call.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            level,
            option,
            std::ptr::from_mut(value).cast(),
            &mut len,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Every byte ever written to the TCP socket: acknowledged ones and those still queued. `expected` is what
/// it may be at most: when all of that is acknowledged, one reading tells. Otherwise the two readings are
/// repeated until no acknowledgement came between them; `None` when they kept coming, which a caller takes
/// as "ask again". `tcpi_bytes_sent` is no substitute: a segment whose transmission failed locally is
/// counted twice (__tcp_transmit_skb, 6.12).
pub fn written_bytes(fd: BorrowedFd<'_>, expected: u64) -> io::Result<Option<u64>> {
    let mut before = tcp_info(fd)?.bytes_acked;
    if before == expected {
        return Ok(Some(before));
    }
    for _ in 0..4 {
        let queued = unacknowledged_bytes(fd)?;
        let after = tcp_info(fd)?.bytes_acked;
        if before == after {
            return Ok(Some(after + queued));
        }
        before = after;
    }
    Ok(None)
}

/// `SO_RCVLOWAT`: setting it makes the kernel look at the receive queue again (tcp_set_rcvlowat calls
/// tcp_data_ready under the socket lock), which runs the verdict program on what is waiting there.
pub fn set_receive_low_water(fd: BorrowedFd<'_>, bytes: i32) -> io::Result<()> {
    set_int(fd, IntOption::ReceiveLowWater, bytes)
}

/// `SO_ATTACH_REUSEPORT_EBPF`: from now on the program chooses among the sockets of the group that this one
/// belongs to. Another program that did is replaced. It lasts as long as the group.
pub fn attach_reuseport(fd: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    set_int(fd, IntOption::AttachReuseport, program.as_raw_fd())
}

/// An option whose value is an int, and for which there is no safe wrapper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IntOption {
    /// A listener's connections are accepted when their first data has come, or after so many seconds.
    DeferAccept,
    /// How many connections of a listener may bring data before their handshake is over; 0: none.
    FastOpen,
    /// Which buffers have been given a size, by [`RECEIVE_LOCKED`] and [`SEND_LOCKED`]; the others have the one that
    /// TCP finds right. Linux 5.14.
    BufferLock,
    /// Connections may be made from IPv4 addresses that are not this host's. Setting it needs CAP_NET_RAW.
    TransparentV4,
    /// The same for IPv6.
    TransparentV6,
    /// Binding to an address without a port leaves the port to connect(2).
    BindAddressNoPort,
    /// See [`set_receive_low_water`].
    ReceiveLowWater,
    /// See [`attach_reuseport`].
    AttachReuseport,
}

/// See [`IntOption::BufferLock`].
pub const SEND_LOCKED: i32 = 1;
/// See [`IntOption::BufferLock`].
pub const RECEIVE_LOCKED: i32 = 2;

/// `SO_BUF_LOCK` of asm-generic/socket.h, which all architectures have that the program is built for.
const SO_BUF_LOCK: libc::c_int = 72;

impl IntOption {
    fn numbers(self) -> (libc::c_int, libc::c_int) {
        match self {
            IntOption::DeferAccept => (libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT),
            IntOption::FastOpen => (libc::IPPROTO_TCP, libc::TCP_FASTOPEN),
            IntOption::BufferLock => (libc::SOL_SOCKET, SO_BUF_LOCK),
            IntOption::TransparentV4 => (libc::IPPROTO_IP, libc::IP_TRANSPARENT),
            IntOption::TransparentV6 => (libc::IPPROTO_IPV6, libc::IPV6_TRANSPARENT),
            IntOption::BindAddressNoPort => (libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT),
            IntOption::ReceiveLowWater => (libc::SOL_SOCKET, libc::SO_RCVLOWAT),
            IntOption::AttachReuseport => (libc::SOL_SOCKET, libc::SO_ATTACH_REUSEPORT_EBPF),
        }
    }
}

/// Listens, or changes how many connections may wait: as many as `net.core.somaxconn` says at most.
pub fn listen(fd: BorrowedFd<'_>, backlog: u32) -> io::Result<()> {
    let backlog = i32::try_from(backlog).unwrap_or(i32::MAX);
    // SAFETY: it takes two numbers.
    match unsafe { libc::listen(fd.as_raw_fd(), backlog) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sets an option.
pub fn set_int(fd: BorrowedFd<'_>, option: IntOption, value: i32) -> io::Result<()> {
    let (level, name) = option.numbers();
    // SAFETY: the kernel reads one int from the address given, which lives across the call.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            std::ptr::from_ref(&value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result != 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Reads an option.
pub fn get_int(fd: BorrowedFd<'_>, option: IntOption) -> io::Result<i32> {
    let (level, name) = option.numbers();
    let mut value: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to `value`, which lives across the call.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            level,
            name,
            std::ptr::from_mut(&mut value).cast(),
            &mut len,
        )
    };
    if result != 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(value)
    }
}

/// Whether closing the socket resets the connection. On from its birth, so that whatever kills the worker cannot turn a truncated
/// stream into a clean end; off only for the orderly close.
pub fn reset_on_close(fd: BorrowedFd<'_>, on: bool) -> Result<(), Errno> {
    let linger = libc::linger {
        l_onoff: on.into(),
        l_linger: 0,
    };
    setsockopt(&fd, sockopt::Linger, &linger)
}

/// Where both streams of a connection that is given up have an end, a reset would say nothing to the peer and drop what has been lost
/// on its way. There the close that follows is made an ordinary one, by which the kernel resets if something was never read,
/// and goes on sending otherwise. That is right for a stream that is whole, and no other may have been ended
/// (shutdown(2)). True: it was so. (An end that arrives at this very moment is not seen.)
pub fn is_past_reset(fd: BorrowedFd<'_>) -> bool {
    tcp_info(fd).is_ok_and(|info| info.past_reset) && reset_on_close(fd, false).is_ok()
}

/// Resets a connection although other processes have its socket too, for whom closing would do nothing:
/// connecting to nowhere disconnects (tcp_disconnect, 6.12). See also [`is_past_reset`].
pub fn reset(fd: BorrowedFd<'_>) -> io::Result<()> {
    if is_past_reset(fd) {
        return Ok(());
    }
    // SAFETY: `sockaddr` is plain numbers, for which all zeros is a valid value.
    let mut nowhere: libc::sockaddr = unsafe { std::mem::zeroed() };
    nowhere.sa_family = libc::AF_UNSPEC as libc::sa_family_t;
    // SAFETY: the kernel reads `size_of` bytes of `nowhere`, which lives across the call.
    let result = unsafe {
        libc::connect(
            fd.as_raw_fd(),
            std::ptr::from_ref(&nowhere),
            size_of::<libc::sockaddr>() as libc::socklen_t,
        )
    };
    if result != 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// The socket's cookie: unique while the system runs (`SO_COOKIE`, sock_gen_cookie).
pub fn cookie(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let mut cookie = 0u64;
    get(fd, libc::SOL_SOCKET, libc::SO_COOKIE, &mut cookie)?;
    Ok(cookie)
}
