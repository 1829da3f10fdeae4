//! What std's sockets do not offer: a reset instead of a close, a listener that answers no SYN, a FIN
//! that travels in the last data segment, and a connection whose sequence numbers are set by hand.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::sockopt::{Linger, ReuseAddr, TcpRepair};
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, SockFlag, SockType, SockaddrStorage, bind, getsockopt, listen,
    setsockopt, socket,
};
use nix::{getsockopt_impl, setsockopt_impl, sockopt_impl};

use super::{PATIENCE, within};

/// Connects with the harness's timeouts.
#[track_caller]
pub fn connect(address: SocketAddr) -> TcpStream {
    try_connect(address).unwrap_or_else(|e| panic!("connecting to {address}: {e}"))
}

/// The same, for a test that counts failures.
pub fn try_connect(address: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

sockopt_impl!(
    BindWithoutPort,
    SetOnly,
    libc::IPPROTO_IP,
    libc::IP_BIND_ADDRESS_NO_PORT,
    bool
);
sockopt_impl!(
    DeferAccept,
    SetOnly,
    libc::IPPROTO_TCP,
    libc::TCP_DEFER_ACCEPT,
    u32
);

/// Connects from one of the loopback addresses: each has all ports of its own.
pub fn connect_from(from: Ipv4Addr, address: SocketAddr) -> std::io::Result<TcpStream> {
    connect_with(address, |socket| {
        setsockopt(socket, BindWithoutPort, &true)?;
        bind(
            socket.as_raw_fd(),
            &SockaddrStorage::from(SocketAddr::from((from, 0))),
        )
    })
}

/// Connects, and leaves the last ACK of the handshake unsent for 200 ms unless data is written sooner: the other
/// side's connection is half-open for so long. (TCP_DEFER_ACCEPT of a client: tcp_rcv_synsent_state_process)
pub fn connect_with_late_ack(address: SocketAddr) -> std::io::Result<TcpStream> {
    connect_with(address, |socket| setsockopt(socket, DeferAccept, &1))
}

fn connect_with(
    address: SocketAddr,
    prepare: impl Fn(&OwnedFd) -> nix::Result<()>,
) -> std::io::Result<TcpStream> {
    let socket = socket(
        AddressFamily::Inet,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    prepare(&socket)?;
    nix::sys::socket::connect(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
    let stream = TcpStream::from(socket);
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Ends the connection with a reset.
pub fn reset(stream: TcpStream) {
    reset_on_close(&stream);
    drop(stream);
}

/// Makes the coming close a reset.
pub fn reset_on_close(stream: &TcpStream) {
    setsockopt(
        stream,
        Linger,
        &libc::linger {
            l_onoff: 1,
            l_linger: 0,
        },
    )
    .expect("setting SO_LINGER");
}

/// Hands data to the socket and keeps the last segment back, so that a following shutdown travels in it.
pub fn send_and_hold(stream: &TcpStream, mut data: &[u8]) {
    let flags = MsgFlags::from_bits_retain(libc::MSG_MORE) | MsgFlags::MSG_NOSIGNAL;
    while !data.is_empty() {
        let sent = nix::sys::socket::send(stream.as_raw_fd(), data, flags).expect("sending with MSG_MORE");
        data = &data[sent..];
    }
}

/// A listener whose accept queue is full, so that a further SYN is not answered; `fillers` are what fills it.
#[derive(Debug)]
pub struct Deaf {
    /// Where it listens.
    pub address: SocketAddr,
    /// Taking connections off this listener lets further ones in.
    pub listener: TcpListener,
    fillers: Vec<TcpStream>,
}

impl Deaf {
    /// Fills a listener's queue until a connection stays unanswered.
    pub fn new() -> Deaf {
        let listener = TcpListener::bind("127.0.0.1:0").expect("binding");
        let address = listener.local_addr().expect("the address");
        listen(&listener, Backlog::new(0).expect("a valid backlog")).expect("listening with a shorter queue");
        let mut fillers = Vec::new();
        for _ in 0..16 {
            match TcpStream::connect_timeout(&address, Duration::from_millis(250)) {
                Ok(stream) => fillers.push(stream),
                Err(_) => {
                    return Deaf {
                        address,
                        listener,
                        fillers,
                    };
                }
            }
        }
        panic!("the accept queue of {address} does not fill up");
    }

    /// Empties the queue: from here on the listener answers. Returns it.
    pub fn hear(self) -> TcpListener {
        for _ in &self.fillers {
            self.listener.accept().expect("accepting a filler");
        }
        // A longer queue for what comes now.
        listen(&self.listener, Backlog::new(128).expect("a valid backlog")).expect("listening again");
        self.listener
    }
}

sockopt_impl!(
    RepairQueue,
    SetOnly,
    libc::IPPROTO_TCP,
    libc::TCP_REPAIR_QUEUE,
    u32
);
sockopt_impl!(QueueSequence, Both, libc::IPPROTO_TCP, libc::TCP_QUEUE_SEQ, u32);
// `struct tcp_repair_window`: snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup.
sockopt_impl!(
    RepairWindow,
    SetOnly,
    libc::IPPROTO_TCP,
    libc::TCP_REPAIR_WINDOW,
    [u32; 5]
);

// Values of TCP_REPAIR and TCP_REPAIR_QUEUE (linux/tcp.h).
const REPAIR_ON: u32 = 1;
const REPAIR_OFF_WITHOUT_PROBE: u32 = u32::MAX;
const RECEIVE_QUEUE: u32 = 1;
const SEND_QUEUE: u32 = 2;
const WINDOW: u32 = 60_000;

/// Takes an idle connection's place with the same addresses, `bytes` earlier in the stream: what is sent
/// next begins with that many bytes that the receiver has already. Needs CAP_NET_ADMIN.
pub fn rewind(old: TcpStream, bytes: u32) -> TcpStream {
    let local = old.local_addr().expect("the local address");
    let peer = old.peer_addr().expect("the peer's address");
    setsockopt(&old, TcpRepair, &REPAIR_ON).expect("TCP_REPAIR (needs CAP_NET_ADMIN)");
    let sequence = |queue: u32| {
        setsockopt(&old, RepairQueue, &queue).expect("TCP_REPAIR_QUEUE");
        getsockopt(&old, QueueSequence).expect("TCP_QUEUE_SEQ")
    };
    let (receive, send) = (sequence(RECEIVE_QUEUE), sequence(SEND_QUEUE));
    // A socket under repair disappears without a word to its peer.
    drop(old);

    let family = if local.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    let new: OwnedFd =
        socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).expect("a socket to continue with");
    setsockopt(&new, ReuseAddr, &true).expect("SO_REUSEADDR");
    setsockopt(&new, TcpRepair, &REPAIR_ON).expect("TCP_REPAIR");
    for (queue, value) in [(SEND_QUEUE, send.wrapping_sub(bytes)), (RECEIVE_QUEUE, receive)] {
        setsockopt(&new, RepairQueue, &queue).expect("TCP_REPAIR_QUEUE");
        setsockopt(&new, QueueSequence, &value).expect("TCP_QUEUE_SEQ");
    }
    bind(new.as_raw_fd(), &SockaddrStorage::from(local)).expect("binding to the old local address");
    // A program that another test starts holds the old socket too, from its fork to its exec.
    let mut last = Ok(());
    let connected = within(PATIENCE, || {
        last = nix::sys::socket::connect(new.as_raw_fd(), &SockaddrStorage::from(peer));
        last != Err(Errno::EADDRNOTAVAIL)
    });
    assert!(connected && last.is_ok(), "connecting under repair: {last:?}");
    let window = [receive, WINDOW, WINDOW, WINDOW, receive];
    setsockopt(&new, RepairWindow, &window).expect("TCP_REPAIR_WINDOW");
    setsockopt(&new, TcpRepair, &REPAIR_OFF_WITHOUT_PROBE).expect("leaving TCP_REPAIR");
    let stream = TcpStream::from(new);
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    stream.set_write_timeout(Some(PATIENCE)).expect("a timeout");
    stream
}
