//! `TCP_REPAIR` (linux/tcp.h): a connection whose place in the stream is set by hand, to act as a peer
//! that sends again what the other end has already. Needs CAP_NET_ADMIN.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::sockopt::{TcpMaxSeg, TcpRepair};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, getpeername, getsockname, getsockopt,
    setsockopt, socket,
};
use nix::{getsockopt_impl, setsockopt_impl, sockopt_impl};

use super::socket::tcp_info;

sockopt_impl!(
    /// Which queue [`QueueSequence`] is of.
    RepairQueue,
    SetOnly,
    libc::IPPROTO_TCP,
    libc::TCP_REPAIR_QUEUE,
    u32
);
sockopt_impl!(
    /// The sequence number at the end of a queue.
    QueueSequence,
    Both,
    libc::IPPROTO_TCP,
    libc::TCP_QUEUE_SEQ,
    u32
);
sockopt_impl!(
    /// `struct tcp_repair_window`: snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup.
    RepairWindow,
    SetOnly,
    libc::IPPROTO_TCP,
    libc::TCP_REPAIR_WINDOW,
    [u32; 5]
);

sockopt_impl!(
    /// Two of `struct tcp_repair_opt`: the number of a TCP option, and its value.
    RepairOptions,
    SetOnly,
    libc::IPPROTO_TCP,
    libc::TCP_REPAIR_OPTIONS,
    [u32; 4]
);

// Values of TCP_REPAIR and TCP_REPAIR_QUEUE.
const ON: u32 = 1;
const OFF_WITHOUT_PROBE: u32 = u32::MAX;
const RECEIVE_QUEUE: u32 = 1;
const SEND_QUEUE: u32 = 2;
// Numbers of TCP options (RFC 9293, RFC 7323).
const MAXIMUM_SEGMENT: u32 = 2;
const WINDOW_SCALE: u32 = 3;
/// The window that both ends are taken to have granted.
const WINDOW: u32 = 60_000;
/// How long somebody else may hold the old socket.
const PATIENCE: Duration = Duration::from_secs(1);

/// Replaces an idle connection by one between the same addresses that stands `bytes` earlier in what it
/// sends: its next bytes are taken for those that were sent last. The peer notices nothing.
///
/// # Errors
/// The right is missing, or somebody else has the local address meanwhile.
pub fn rewind(old: OwnedFd, bytes: u32) -> Result<OwnedFd> {
    let local: SockaddrStorage = getsockname(old.as_raw_fd()).context("failed to read a local address")?;
    let peer: SockaddrStorage = getpeername(old.as_raw_fd()).context("failed to read a peer's address")?;
    setsockopt(&old, TcpRepair, &ON).context("failed to set TCP_REPAIR (needs CAP_NET_ADMIN)")?;
    let sequence =
        |queue| setsockopt(&old, RepairQueue, &queue).and_then(|()| getsockopt(&old, QueueSequence));
    let places = [SEND_QUEUE, RECEIVE_QUEUE].map(sequence);
    let [send, receive] = [places[0], places[1]].map(|place| place.context("failed to read TCP_QUEUE_SEQ"));
    let (send, receive) = (send?.wrapping_sub(bytes), receive?);
    let segment = getsockopt(&old, TcpMaxSeg).context("failed to read TCP_MAXSEG")?;
    let scales = u32::from(
        tcp_info(old.as_fd())
            .context("failed to read TCP_INFO")?
            .window_scales,
    );
    let scales = (scales & 0xf) | (scales >> 4) << 16;
    // A socket under repair is closed without a word to its peer (__tcp_close).
    drop(old);

    let family = match local.as_sockaddr_in() {
        Some(_) => AddressFamily::Inet,
        None => AddressFamily::Inet6,
    };
    let new = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
        .context("failed to create a socket")?;
    setsockopt(&new, TcpRepair, &ON).context("failed to set TCP_REPAIR")?;
    for (queue, place) in [(SEND_QUEUE, send), (RECEIVE_QUEUE, receive)] {
        setsockopt(&new, RepairQueue, &queue)
            .and_then(|()| setsockopt(&new, QueueSequence, &place))
            .context("failed to set TCP_QUEUE_SEQ")?;
    }
    bind(new.as_raw_fd(), &local).context("failed to bind to the old connection's address")?;
    connect_again(&new, &peer).context("failed to connect under TCP_REPAIR")?;
    let options = [MAXIMUM_SEGMENT, segment, WINDOW_SCALE, scales];
    setsockopt(&new, RepairOptions, &options).context("failed to set TCP_REPAIR_OPTIONS")?;
    let window = [receive, WINDOW, WINDOW, WINDOW, receive];
    setsockopt(&new, RepairWindow, &window)
        .and_then(|()| setsockopt(&new, TcpRepair, &OFF_WITHOUT_PROBE))
        .context("failed to leave TCP_REPAIR")?;
    Ok(new)
}

/// Connects as soon as the old socket is gone: a program that is just being started has a copy of it, from the fork
/// to the exec.
fn connect_again(new: &OwnedFd, peer: &SockaddrStorage) -> nix::Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        match connect(new.as_raw_fd(), peer) {
            Err(Errno::EADDRNOTAVAIL) if Instant::now() < end => std::thread::sleep(Duration::from_millis(5)),
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn a_rewound_connection_sends_old_bytes_that_plain_tcp_leaves_out() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        let mut came = [0; 8];
        client.write_all(b"01234567").unwrap();
        server.read_exact(&mut came).unwrap();
        let mut client = TcpStream::from(rewind(client.into(), 4).expect("needs CAP_NET_ADMIN"));
        client.write_all(b"456789ABCDEF").unwrap();
        server.read_exact(&mut came).unwrap();
        assert_eq!(&came, b"89ABCDEF");
    }
}
