//! The clients: request and response on open connections, one connection per request, and a writer that pushes.
//! Each counts what it did within its time; each checks the answers.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::peers::MESSAGE_BYTES;

/// An answer that takes longer is a failure.
const PATIENCE: Duration = Duration::from_secs(10);
/// Before the clock starts: time for a session to reach its steady state.
const WARM_UP: Duration = Duration::from_millis(150);
const REQUEST: [u8; MESSAGE_BYTES] = *b"sixty-four bytes that go to the server and come back unchanged..";

/// What a client got done.
#[derive(Debug, Clone, Copy)]
pub struct Done {
    /// Requests that were answered.
    pub requests: u64,
    /// The time they took together.
    pub seconds: f64,
}

impl Done {
    /// Requests per second.
    pub fn rate(self) -> f64 {
        self.requests as f64 / self.seconds
    }
}

/// A connection on which no request waits for another to be acknowledged.
pub fn connect(address: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect(address).with_context(|| format!("connecting to {address}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// One request and its answer.
pub fn exchange(stream: &mut TcpStream) -> Result<()> {
    stream.write_all(&REQUEST).context("sending a request")?;
    let mut answer = [0; MESSAGE_BYTES];
    stream.read_exact(&mut answer).context("reading an answer")?;
    ensure!(
        answer == REQUEST,
        "a wrong answer: {:?}",
        answer.escape_ascii().to_string()
    );
    Ok(())
}

/// One request after another on one connection. `started` is called when the clock starts.
pub fn one_connection(address: SocketAddr, seconds: f64, started: impl FnOnce()) -> Result<Done> {
    let mut stream = connect(address)?;
    let warm = Instant::now() + WARM_UP;
    while Instant::now() < warm {
        exchange(&mut stream)?;
    }
    started();
    let begun = Instant::now();
    let mut requests = 0;
    while begun.elapsed().as_secs_f64() < seconds {
        // The clock is looked at only now and then.
        for _ in 0..16 {
            exchange(&mut stream)?;
        }
        requests += 16;
    }
    Ok(Done {
        requests,
        seconds: begun.elapsed().as_secs_f64(),
    })
}

/// One request in flight on each of many connections, from one thread.
pub fn many_connections(
    address: SocketAddr,
    count: usize,
    seconds: f64,
    started: impl FnOnce(),
) -> Result<Done> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let mut streams = Vec::new();
    for token in 0..count {
        let mut stream = connect(address)?;
        exchange(&mut stream)?;
        stream.set_nonblocking(true)?;
        epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, token as u64))?;
        streams.push(stream);
    }
    for stream in &mut streams {
        stream.write_all(&REQUEST).context("sending a request")?;
    }
    let mut run = |seconds: f64| -> Result<Done> {
        let begun = Instant::now();
        let mut events = [EpollEvent::empty(); 64];
        let mut answer = [0; MESSAGE_BYTES];
        let mut requests = 0;
        while begun.elapsed().as_secs_f64() < seconds {
            let ready = epoll.wait(&mut events, EpollTimeout::try_from(PATIENCE)?)?;
            ensure!(ready > 0, "no answer on any connection for {PATIENCE:?}");
            for event in &events[..ready] {
                let stream = &mut streams[event.data() as usize];
                let n = stream.read(&mut answer).context("reading an answer")?;
                ensure!(
                    n == MESSAGE_BYTES && answer == REQUEST,
                    "a wrong answer: {:?}",
                    answer[..n].escape_ascii().to_string()
                );
                stream.write_all(&REQUEST).context("sending a request")?;
                requests += 1;
            }
        }
        Ok(Done {
            requests,
            seconds: begun.elapsed().as_secs_f64(),
        })
    };
    run(WARM_UP.as_secs_f64())?;
    started();
    run(seconds)
}

/// A new connection for every request, closed by the client, from `threads` threads, to each address in turn.
pub fn connections(addresses: &[SocketAddr], threads: usize, seconds: f64) -> Result<Done> {
    let begun = Instant::now();
    let one = || -> Result<u64> {
        let mut requests = 0;
        for &address in addresses.iter().cycle() {
            if begun.elapsed().as_secs_f64() >= seconds {
                break;
            }
            let mut stream =
                TcpStream::connect(address).with_context(|| format!("connecting to {address}"))?;
            exchange(&mut stream)?;
            requests += 1;
        }
        Ok(requests)
    };
    let requests = thread::scope(|scope| {
        let clients: Vec<_> = (0..threads).map(|_| scope.spawn(one)).collect();
        let mut sum = 0;
        for client in clients {
            match client.join() {
                Ok(done) => sum += done?,
                Err(_) => bail!("a client panicked"),
            }
        }
        Ok(sum)
    })?;
    Ok(Done {
        requests,
        seconds: begun.elapsed().as_secs_f64(),
    })
}

/// A writer that sends as fast as it may. Dropping it closes the connection.
#[derive(Debug)]
pub struct Writer {
    pushed_bytes: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    /// Connects and starts to write.
    pub fn start(address: SocketAddr) -> Result<Writer> {
        let stream = connect(address)?;
        stream.set_nonblocking(true)?;
        let (pushed_bytes, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (counter, flag) = (pushed_bytes.clone(), stop.clone());
        let thread = thread::spawn(move || push(stream, &counter, &flag));
        Ok(Writer {
            pushed_bytes,
            stop,
            thread: Some(thread),
        })
    }

    /// What the kernel has taken from it.
    pub fn pushed_bytes(&self) -> u64 {
        self.pushed_bytes.load(Ordering::Relaxed)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn push(mut stream: TcpStream, pushed_bytes: &AtomicU64, stop: &AtomicBool) {
    let block = vec![0x5a; 256 * 1024];
    while !stop.load(Ordering::Relaxed) {
        match stream.write(&block) {
            Ok(n) => {
                pushed_bytes.fetch_add(n as u64, Ordering::Relaxed);
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                let mut fds = [PollFd::new(stream.as_fd(), PollFlags::POLLOUT)];
                let _ = poll(&mut fds, PollTimeout::from(100u8));
            }
            Err(_) => return,
        }
    }
}
