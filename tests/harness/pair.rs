//! One session with both of its ends in the test's hands, and writers that say how far they have come.

use std::io::Write;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::pattern::fill;
use super::{PATIENCE, Plan, Proxy, connect, patient, within};

/// Which way the bytes of a test go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Towards {
    /// From the client to the upstream.
    Upstream,
    /// From the upstream to the client.
    Downstream,
}

impl Towards {
    /// Both ways.
    pub const BOTH: [Towards; 2] = [Towards::Upstream, Towards::Downstream];
}

/// A listener of the proxy whose upstream connections come to the test.
#[derive(Debug)]
pub struct Front {
    /// Where the proxy listens.
    pub address: SocketAddr,
    upstream: TcpListener,
}

impl Front {
    /// Adds a server to the plan, with both ends on `ip`.
    pub fn new(plan: &mut Plan, ip: &str, lines: &str) -> Front {
        Front::between(plan, ip, ip, lines)
    }

    /// The same with an address of its own for each end.
    pub fn between(plan: &mut Plan, client_ip: &str, upstream_ip: &str, lines: &str) -> Front {
        let upstream = TcpListener::bind((upstream_ip, 0)).expect("binding an upstream");
        upstream
            .set_nonblocking(true)
            .expect("a listener that does not block");
        let address = upstream.local_addr().expect("the upstream's address");
        Front {
            address: plan.server_with(client_ip, address, lines),
            upstream,
        }
    }

    /// Opens a session: the client's and the upstream's socket. It may not be offloaded yet.
    #[track_caller]
    pub fn open(&self) -> (TcpStream, TcpStream) {
        let client = connect(self.address);
        (client, self.accept())
    }

    /// The upstream's socket of the next session.
    #[track_caller]
    pub fn accept(&self) -> TcpStream {
        let mut accepted = None;
        let came = within(PATIENCE, || {
            accepted = self.upstream.accept().ok();
            accepted.is_some()
        });
        assert!(came, "no connection has come to the upstream of {}", self.address);
        let (stream, _) = accepted.expect("a connection");
        stream.set_nonblocking(false).expect("a socket that blocks");
        stream.set_nodelay(true).expect("TCP_NODELAY");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream.set_write_timeout(Some(PATIENCE)).expect("a timeout");
        stream
    }

    /// Opens a session and waits until the kernel has it; `(writer, reader)` for the way that is asked for.
    #[track_caller]
    pub fn offloaded(&self, proxy: &Proxy, towards: Towards) -> (TcpStream, TcpStream) {
        let before = proxy.status().number("/sessions/total_offloaded");
        let (client, upstream) = self.open();
        proxy.wait("the session is offloaded", |s| {
            s.number("/sessions/total_offloaded") > before
        });
        match towards {
            Towards::Upstream => (client, upstream),
            Towards::Downstream => (upstream, client),
        }
    }
}

/// A thread that writes the stream of a seed as fast as its socket takes it.
#[derive(Debug)]
pub struct Writer {
    accepted: Arc<AtomicU64>,
    thread: JoinHandle<std::io::Result<()>>,
}

impl Writer {
    /// Writes `bytes` bytes in pieces of `piece`, and leaves the stream open.
    pub fn start(stream: &TcpStream, seed: u64, bytes: u64, piece: usize) -> Writer {
        Writer::run(stream, seed, bytes, piece, false)
    }

    /// The same, and ends that direction at once.
    pub fn start_to_end(stream: &TcpStream, seed: u64, bytes: u64, piece: usize) -> Writer {
        Writer::run(stream, seed, bytes, piece, true)
    }

    fn run(stream: &TcpStream, seed: u64, bytes: u64, piece: usize, end: bool) -> Writer {
        let mut stream = stream.try_clone().expect("a second handle on a socket");
        // It may have to wait for as long as the reader stands still.
        stream
            .set_write_timeout(Some(Duration::from_secs(600)))
            .expect("a timeout");
        let accepted = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&accepted);
        let thread = std::thread::spawn(move || {
            let mut buffer = vec![0u8; piece];
            let mut offset = 0;
            while offset < bytes {
                let part = usize::try_from(bytes - offset).map_or(piece, |left| left.min(piece));
                fill(seed, offset, &mut buffer[..part]);
                let mut rest = &buffer[..part];
                while !rest.is_empty() {
                    let written = stream.write(rest)?;
                    rest = &rest[written..];
                    counter.fetch_add(written as u64, Ordering::Relaxed);
                }
                offset += part as u64;
            }
            if end {
                stream.shutdown(Shutdown::Write)
            } else {
                Ok(())
            }
        });
        Writer { accepted, thread }
    }

    /// Bytes that its socket has taken so far.
    pub fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::Relaxed)
    }

    /// Waits until its socket takes nothing for half a second; returns how much it has taken.
    #[track_caller]
    pub fn wait_for_stall(&self) -> u64 {
        let end = Instant::now() + patient(Duration::from_secs(15));
        loop {
            let before = self.accepted();
            std::thread::sleep(Duration::from_millis(500));
            if before != 0 && self.accepted() == before {
                return before;
            }
            assert!(
                Instant::now() < end,
                "the writer does not stall: {} bytes",
                self.accepted()
            );
        }
    }

    /// Waits for its failure: why it could not write on, and how much its socket had taken.
    #[track_caller]
    pub fn join_failed(self) -> (std::io::Error, u64) {
        let result = self.thread.join().expect("the writing thread");
        (
            result.expect_err("writing must fail"),
            self.accepted.load(Ordering::Relaxed),
        )
    }

    /// Waits for its end: what it wrote, or why it could not.
    pub fn join(self) -> std::io::Result<u64> {
        let result = self.thread.join().expect("the writing thread");
        result.map(|()| self.accepted.load(Ordering::Relaxed))
    }
}
