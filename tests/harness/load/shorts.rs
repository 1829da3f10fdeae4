//! Short connections at a steady rate: connect, send, check the echo, end cleanly. Both ends account for each of them.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::super::pattern::fill;
use super::super::{Flag, PATIENCE, Upstream, patient};
use super::ledger::{Fault, Ledger};

/// From the attempt to connect to the echo, whatever happens to workers meanwhile, but for the time in which the machine
/// stands still.
pub const SERVED_WITHIN: Duration = Duration::from_secs(1);
/// Enough that those which wait for a worker do not hold up the others.
const THREADS: u64 = 16;
const STACK: usize = 256 * 1024;

/// Their upstream.
pub fn upstream(ledger: &Arc<Ledger>) -> Upstream<()> {
    let ledger = Arc::clone(ledger);
    Upstream::serve("127.0.0.1", move |stream| echo(stream, &ledger))
}

/// Each connection begins with the number of bytes that follow, so that a clean end before the last of them is seen.
fn echo(mut stream: TcpStream, ledger: &Ledger) {
    let mut buffer = vec![0u8; 16 * 1024];
    let mut wanted: Option<u64> = None;
    let (mut head, mut bytes) = (Vec::new(), 0u64);
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => {
                // The harness ends an upstream by a connection that says nothing.
                if bytes != 0 && wanted != Some(bytes) {
                    ledger.wrong(
                        Fault::Truncated,
                        format!("the upstream of a short connection saw a clean end after {bytes} of {wanted:?} bytes"),
                    );
                }
                let _ = stream.shutdown(Shutdown::Write);
                return;
            }
            Ok(got) => {
                bytes += got as u64;
                if wanted.is_none() {
                    head.extend(&buffer[..got.min(8)]);
                    let first = head.get(..8).and_then(|first| first.try_into().ok());
                    wanted = first.map(|first| 8 + u64::from_le_bytes(first));
                }
                if stream.write_all(&buffer[..got]).is_err() {
                    return;
                }
            }
            Err(_) => return,
        }
    }
}

/// Short connections that are being made.
#[derive(Debug)]
pub struct Shorts {
    stop: Arc<Flag>,
    bytes: Arc<AtomicU64>,
    slowest_us: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

/// What all short connections came to.
#[derive(Debug, Clone, Copy)]
pub struct ShortTotals {
    /// Bytes that the whole ones sent each way.
    pub bytes: u64,
    /// The longest time from the attempt to connect to the echo.
    pub slowest: Duration,
}

impl Shorts {
    /// Makes so many a second until told to stop.
    pub fn start(front: SocketAddr, per_second: u64, ledger: &Arc<Ledger>) -> Shorts {
        let stop = Arc::<Flag>::default();
        let (bytes, slowest_us) = (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
        let (next, start) = (Arc::<AtomicU64>::default(), Instant::now());
        let threads = (0..if per_second == 0 { 0 } else { THREADS }).map(|_| {
            let (stop, bytes, slowest_us) = (Arc::clone(&stop), Arc::clone(&bytes), Arc::clone(&slowest_us));
            let (next, ledger) = (Arc::clone(&next), Arc::clone(ledger));
            let work = move || {
                while !stop.is_up() {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let due = start + Duration::from_nanos(1_000_000_000 / per_second * number);
                    std::thread::sleep(due.saturating_duration_since(Instant::now()));
                    if let Some((sent, took)) = one(front, number, &ledger) {
                        bytes.fetch_add(sent, Ordering::Relaxed);
                        slowest_us.fetch_max(took.as_micros() as u64, Ordering::Relaxed);
                    }
                }
            };
            let thread = std::thread::Builder::new().stack_size(STACK).spawn(work);
            thread.expect("a thread for short connections")
        });
        let threads = threads.collect();
        Shorts {
            stop,
            bytes,
            slowest_us,
            threads,
        }
    }

    /// Lets the last ones end.
    pub fn finish(self) -> ShortTotals {
        self.stop.raise();
        for thread in self.threads {
            thread.join().expect("a thread of short connections");
        }
        ShortTotals {
            bytes: self.bytes.load(Ordering::Relaxed),
            slowest: Duration::from_micros(self.slowest_us.load(Ordering::Relaxed)),
        }
    }
}

/// How a short connection failed.
enum Failure {
    Refused(std::io::Error),
    Reset,
    Wrong,
    Truncated(usize),
    Silent,
}

/// One connection from its beginning to its end, and the account of it: what it sent, and when the echo was there.
fn one(front: SocketAddr, number: u64, ledger: &Ledger) -> Option<(u64, Duration)> {
    let begin = Instant::now();
    let result = talk(front, number, begin);
    let killed = ledger.killed_between(begin, Instant::now());
    let (from, took) = (ledger.clock(begin), begin.elapsed());
    let name = format!("short connection {number}, begun at {from} ms, after {took:?}");
    match result {
        Ok((sent, took)) => {
            ledger.right("short");
            let standstill = ledger.standstill_between(begin, begin + took);
            if took > patient(SERVED_WITHIN) + standstill {
                ledger.wrong(Fault::Late, format!("{name}: the echo came after {took:?}"));
            }
            return Some((sent, took));
        }
        Err(Failure::Reset) if killed => ledger.excused("short"),
        Err(Failure::Reset) => ledger.wrong(Fault::Reset, name),
        Err(Failure::Refused(e)) => ledger.wrong(Fault::Refused, format!("{name}: {e}")),
        Err(Failure::Wrong) => ledger.wrong(Fault::WrongByte, name),
        Err(Failure::Truncated(got)) => {
            ledger.wrong(Fault::Truncated, format!("{name}: a clean end after {got} bytes"));
        }
        Err(Failure::Silent) => ledger.wrong(Fault::Stalled, name),
    }
    None
}

fn talk(front: SocketAddr, number: u64, begin: Instant) -> Result<(u64, Duration), Failure> {
    let failed = |e: std::io::Error| match e.kind() {
        // The last is what shutdown says of a socket that was reset before.
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::NotConnected => Failure::Reset,
        ErrorKind::WouldBlock | ErrorKind::TimedOut => Failure::Silent,
        _ => Failure::Refused(e),
    };
    let limit = patient(PATIENCE);
    let mut stream = TcpStream::connect_timeout(&front, limit).map_err(|e| match e.kind() {
        // It stood, was accepted, and was reset before this thread looked.
        ErrorKind::ConnectionReset => Failure::Reset,
        _ => Failure::Refused(e),
    })?;
    stream.set_nodelay(true).map_err(failed)?;
    stream.set_read_timeout(Some(limit)).map_err(failed)?;
    let length = 1 + number * 37 % 3000;
    let mut sent = vec![0u8; 8 + length as usize];
    sent[..8].copy_from_slice(&length.to_le_bytes());
    fill(number, 0, &mut sent[8..]);
    stream.write_all(&sent).map_err(failed)?;
    // Every other one ends its question at once, the others when they have the answer.
    if number.is_multiple_of(2) {
        stream.shutdown(Shutdown::Write).map_err(failed)?;
    }
    let mut got = vec![0u8; sent.len()];
    let mut have = 0;
    while have < got.len() {
        match stream.read(&mut got[have..]).map_err(failed)? {
            0 => return Err(Failure::Truncated(have)),
            more => have += more,
        }
    }
    let took = begin.elapsed();
    if got != sent {
        return Err(Failure::Wrong);
    }
    if !number.is_multiple_of(2) {
        stream.shutdown(Shutdown::Write).map_err(failed)?;
    }
    match stream.read(&mut [0]).map_err(failed)? {
        0 => Ok((sent.len() as u64, took)),
        _ => Err(Failure::Wrong),
    }
}
