//! What std's sockets do not offer: a reset instead of a close, a listener that answers no SYN, a FIN
//! that travels in the last data segment, and a connection whose sequence numbers are set by hand. What ss(8) says of
//! the proxy's own.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use nix::libc;
use nix::sys::socket::sockopt::Linger;
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, SockFlag, SockType, SockaddrStorage, bind, listen, setsockopt, socket,
};
use nix::{setsockopt_impl, sockopt_impl};

use super::PATIENCE;
use super::program::{need, shell};

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
    /// The last ACK of a client's handshake waits.
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
        let fill = |milliseconds| TcpStream::connect_timeout(&address, Duration::from_millis(milliseconds));
        for _ in 0..16 {
            match fill(250) {
                Ok(stream) => fillers.push(stream),
                // It was only late, and has left a connection in the queue of which nobody knows.
                Err(_) if fill(1000).is_ok() => return Deaf::new(),
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

/// Takes an idle connection's place with the same addresses, `bytes` earlier in the stream: what is sent
/// next begins with that many bytes that the receiver has already. Needs CAP_NET_ADMIN.
pub fn rewind(old: TcpStream, bytes: u32) -> TcpStream {
    let new = culvert_shared::sys::repair::rewind(old.into(), bytes).expect("rewinding a connection");
    let stream = TcpStream::from(new);
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    stream.set_write_timeout(Some(PATIENCE)).expect("a timeout");
    stream
}

/// The proxy's ends of the connections to a port, as ss(8) shows them.
#[track_caller]
pub fn ss(options: &str, filter: &str) -> String {
    need("ss", "iproute2");
    let line = format!("ss -Htn {options} state established '{filter}'");
    shell(&line, Duration::from_secs(10)).replace('\n', " ")
}

/// A number that follows a word in what ss(8) says.
#[track_caller]
pub fn number_after(text: &str, word: &str) -> u64 {
    let (_, rest) = text
        .split_once(word)
        .unwrap_or_else(|| panic!("no {word} in {text:?}"));
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits
        .parse()
        .unwrap_or_else(|_| panic!("no number after {word} in {text:?}"))
}
