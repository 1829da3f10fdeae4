//! The servers behind the contenders, each contender with ports of its own, so that nobody pays for the
//! connections that another left in TIME_WAIT. They do as little as they can: what they cost is paid in every
//! figure, the direct connection's too. Never measures.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::RcvBuf;

use crate::contenders::{Background, Setup};
use crate::harness::ports::Port;
use crate::site::Site;

/// Request and answer, in bytes.
pub const MESSAGE_BYTES: usize = 64;

/// Indices of `Peers::ports`.
pub const IPERF: usize = 0;
/// Answers on one blocking thread per connection.
pub const ECHO: usize = 1;
/// Reads for a while, then never again.
pub const STOPPING: usize = 2;
/// Answers on one thread for all connections. From here to the last port, all the same: a client that closes leaves its
/// own port in TIME_WAIT, and on a single address the kernel soon has none left that it may use again at once, so
/// that a rate of connections would measure the search for one (beyond 14,000 a second with Linux's port range).
pub const ECHO_MANY: usize = 3;
/// How many servers each contender has.
pub const COUNT: usize = ECHO_MANY + 8;

/// How long a reader that is going to stop reads first: long enough for every buffer to grow.
const BEFORE_STOPPING: Duration = Duration::from_millis(500);

/// A reader that has stopped. The connection stays open as long as this value lives.
#[derive(Debug)]
pub struct Stopped {
    /// What it had read until then.
    pub read_bytes: u64,
    _stream: TcpStream,
}

/// The servers behind one contender.
#[derive(Debug)]
pub struct Peers {
    iperf: Background,
    ports: [Port; COUNT],
    /// Readers that have stopped.
    pub stopped: Receiver<Stopped>,
}

impl Peers {
    /// Starts them.
    pub fn start(setup: &Setup) -> Result<Peers> {
        let ports = std::array::from_fn(|_| Port::claim());
        let iperf = iperf(&ports[IPERF], setup)?;
        let listener = |port: &Port| listener(&setup.site, port);
        let echo = listener(&ports[ECHO])?;
        thread::spawn(move || {
            for stream in echo.incoming().flatten() {
                thread::spawn(move || answer(stream));
            }
        });
        let stopping = listener(&ports[STOPPING])?;
        setsockopt(&stopping, RcvBuf, &STOPPED_BUFFER_BYTES).context("SO_RCVBUF")?;
        let (sender, stopped) = channel();
        thread::spawn(move || stop_reading(&stopping, &sender));
        let many = ports[ECHO_MANY..]
            .iter()
            .map(listener)
            .collect::<Result<Vec<_>>>()?;
        thread::spawn(move || {
            if let Err(e) = serve(&many) {
                eprintln!("the answering server ended: {e:#}");
            }
        });
        Ok(Peers {
            iperf,
            ports,
            stopped,
        })
    }

    /// The port numbers, to be indexed by the constants above.
    pub fn ports(&self) -> [u16; COUNT] {
        std::array::from_fn(|i| self.ports[i].number)
    }

    /// Starts iperf3's server anew: after a broken test it may stay busy for ever.
    pub fn restart_iperf(&mut self, setup: &Setup) -> Result<()> {
        // The contender leads to this port: the old server must leave it first.
        self.iperf.end();
        self.iperf = iperf(&self.ports[IPERF], setup)?;
        Ok(())
    }
}

fn iperf(port: &Port, setup: &Setup) -> Result<Background> {
    let mut command = Command::new("setpriv");
    let address = SocketAddr::new(setup.site.ip(), port.number);
    command.args(["--pdeathsig", "TERM", "iperf3", "-s", "-B"]);
    command.args([&address.ip().to_string(), "-p", &address.port().to_string()]);
    let log = setup.dir.join(format!("iperf3-{}.log", port.number));
    Background::serving(command, &log, address).context("iperf3's server does not start")
}

fn listener(site: &Site, port: &Port) -> Result<TcpListener> {
    let address = SocketAddr::new(site.ip(), port.number);
    TcpListener::bind(address).with_context(|| format!("failed to listen on {address}"))
}

fn answer(mut stream: TcpStream) {
    let mut message = [0; MESSAGE_BYTES];
    while stream.read_exact(&mut message).is_ok() && stream.write_all(&message).is_ok() {}
}

/// A reader's own buffer is another machine's, where it is not a measurement, and grows as large as `tcp_rmem` says with
/// whatever speed it is served at. So it has one size for all contenders, which the kernel doubles.
const STOPPED_BUFFER_BYTES: usize = 1 << 20;

fn stop_reading(listener: &TcpListener, stopped: &Sender<Stopped>) {
    let mut buffer = vec![0; 256 * 1024];
    for mut stream in listener.incoming().flatten() {
        let end = Instant::now() + BEFORE_STOPPING;
        let mut read_bytes = 0;
        let _ = stream.set_read_timeout(Some(BEFORE_STOPPING));
        while Instant::now() < end {
            match stream.read(&mut buffer) {
                Ok(0) | Err(_) => break,
                Ok(n) => read_bytes += n as u64,
            }
        }
        if read_bytes == 0 {
            continue;
        }
        let reader = Stopped {
            read_bytes,
            _stream: stream,
        };
        if stopped.send(reader).is_err() {
            return;
        }
    }
}

/// Answers on all connections. The listeners' tokens are their indices, the connections' are their descriptors, after
/// those.
fn serve(listeners: &[TcpListener]) -> Result<()> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    for (token, listener) in listeners.iter().enumerate() {
        listener.set_nonblocking(true)?;
        epoll.add(listener, EpollEvent::new(EpollFlags::EPOLLIN, token as u64))?;
    }
    let mut connections: Vec<Option<TcpStream>> = Vec::new();
    let mut events = [EpollEvent::empty(); 64];
    let mut message = [0; MESSAGE_BYTES];
    loop {
        let ready = match epoll.wait(&mut events, EpollTimeout::NONE) {
            Ok(ready) => ready,
            Err(Errno::EINTR) => continue,
            Err(e) => return Err(e).context("epoll_wait"),
        };
        for event in &events[..ready] {
            let token = event.data() as usize;
            if let Some(listener) = listeners.get(token) {
                while let Ok((stream, _)) = listener.accept() {
                    let token = listeners.len() + stream.as_raw_fd() as usize;
                    if connections.len() <= token {
                        connections.resize_with(token + 1, || None);
                    }
                    epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, token as u64))?;
                    connections[token] = Some(stream);
                }
            } else if let Some(stream) = &mut connections[token] {
                // Messages are too small to be split: whatever is here can be read and answered in one go.
                let alive = match stream.read(&mut message) {
                    Ok(0) | Err(_) => false,
                    Ok(n) => stream.write_all(&message[..n]).is_ok(),
                };
                if !alive {
                    connections[token] = None;
                }
            }
        }
    }
}
