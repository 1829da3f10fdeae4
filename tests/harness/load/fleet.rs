//! All ends of all long streams, driven by one thread: a hundred times a second each of them writes what is due and
//! reads what is there, so that hundreds of streams cost little and none waits for another.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::libc;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::RcvBuf;

use super::super::pattern::fill;
use super::super::sockets::try_connect;
use super::super::{Ending, Flag, PATIENCE, patient};
use super::ledger::{Fault, Ledger};
use super::stream::{Habit, Kind, Lane, Outcome, Side, Stream};

/// With so many bytes each client names its stream to the upstream.
pub const HEADER: usize = 8;
const TICK: Duration = Duration::from_millis(10);
/// The most that one end reads or writes at a turn.
const TURN: usize = 256 * 1024;

/// The streams of one load.
#[derive(Debug)]
pub struct Fleet {
    /// Where the upstream ends are accepted.
    pub upstream: SocketAddr,
    streams: Arc<Mutex<Vec<Arc<Stream>>>>,
    sender: Sender<End>,
    finish: Arc<Flag>,
    thread: JoinHandle<()>,
}

#[derive(Debug)]
struct End {
    socket: TcpStream,
    /// None: an upstream end that has not been told yet which stream it belongs to.
    stream: Option<(Arc<Stream>, Side, Habit)>,
    header: Vec<u8>,
    owed: usize,
    write_at: Instant,
    read_at: Instant,
    ends_at: Option<Instant>,
    last_byte: Instant,
    moved: Instant,
    broken: bool,
    read_over: bool,
    outcome: Outcome,
}

impl Fleet {
    /// No streams yet, and a listener for their upstream ends.
    pub fn new(ledger: &Arc<Ledger>) -> Fleet {
        let listener = TcpListener::bind("127.0.0.1:0").expect("binding an upstream");
        listener
            .set_nonblocking(true)
            .expect("a listener that does not block");
        let (sender, receiver) = channel();
        let streams = Arc::<Mutex<Vec<_>>>::default();
        let finish = Arc::<Flag>::default();
        let upstream = listener.local_addr().expect("the upstream's address");
        let crew = Crew {
            listener,
            receiver,
            streams: Arc::clone(&streams),
            finish: Arc::clone(&finish),
            ledger: Arc::clone(ledger),
            buffers: [vec![0; TURN], vec![0; TURN]],
        };
        Fleet {
            upstream,
            streams,
            sender,
            finish,
            thread: std::thread::spawn(move || crew.run()),
        }
    }

    /// Opens a stream through the proxy.
    pub fn open(
        &self,
        front: SocketAddr,
        kind: Kind,
        lane: Lane,
        lifetime: Option<Duration>,
    ) -> std::io::Result<Arc<Stream>> {
        let socket = try_connect(front)?;
        let mut list = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        let stream = Arc::new(Stream::new(list.len() as u64, kind, lane, lifetime));
        list.push(Arc::clone(&stream));
        drop(list);
        let mut end = End::new(socket);
        // A new connection takes eight bytes at once; if not, it has been reset, and the first read will say so.
        let _ = end.socket.write_all(&stream.id.to_le_bytes());
        end.takes_up(Arc::clone(&stream), Side::Client);
        self.sender.send(end).expect("the fleet's thread");
        Ok(stream)
    }

    /// Every stream there has been.
    pub fn streams(&self) -> Vec<Arc<Stream>> {
        self.streams
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Lets every stream end in good order, and waits until it has.
    pub fn finish(self) -> Vec<Arc<Stream>> {
        let streams = self.streams();
        self.finish.raise();
        self.thread.join().expect("the fleet's thread");
        streams
    }
}

struct Crew {
    listener: TcpListener,
    receiver: Receiver<End>,
    streams: Arc<Mutex<Vec<Arc<Stream>>>>,
    finish: Arc<Flag>,
    ledger: Arc<Ledger>,
    buffers: [Vec<u8>; 2],
}

impl Crew {
    fn run(mut self) {
        let mut ends: Vec<End> = Vec::new();
        loop {
            let start = Instant::now();
            let finishing = self.finish.is_up();
            while let Ok((socket, _)) = self.listener.accept() {
                ends.push(End::new(socket));
            }
            ends.extend(self.receiver.try_iter());
            ends.retain_mut(|end| !self.turn(end, finishing));
            if finishing && ends.is_empty() {
                return;
            }
            std::thread::sleep(TICK.saturating_sub(start.elapsed()));
        }
    }

    /// One end's turn; true when it is over.
    fn turn(&mut self, end: &mut End, finishing: bool) -> bool {
        let now = Instant::now();
        let Some((stream, side, habit)) = end.stream.clone() else {
            return self.read_header(end, finishing);
        };
        let leaving = finishing || end.ends_at.is_some_and(|at| now >= at);
        if !end.read_over && (leaving || now >= end.read_at) {
            end.read(&mut self.buffers, stream.seed(side.other()), habit, leaving);
        }
        if !end.outcome.ended && !end.broken {
            end.write(&mut self.buffers[0], stream.seed(side), habit, leaving);
        }
        let silent = finishing && end.moved.elapsed() > patient(PATIENCE);
        let over = end.read_over && (end.outcome.ended || end.broken);
        if over || silent || end.outcome.wrong_at.is_some() {
            end.outcome.over = Instant::now();
            stream.is_over(side, end.outcome);
            return true;
        }
        false
    }

    /// An upstream end learns which stream it belongs to. One that is reset before has a client that will tell.
    fn read_header(&mut self, end: &mut End, finishing: bool) -> bool {
        let mut bytes = [0; HEADER];
        let missing = HEADER - end.header.len();
        match end.socket.read(&mut bytes[..missing]) {
            Ok(0) => {
                self.ledger.wrong(
                    Fault::Truncated,
                    format!("an upstream saw a clean end after {} bytes", end.header.len()),
                );
                return true;
            }
            Ok(got) => end.header.extend(&bytes[..got]),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                return finishing && end.moved.elapsed() > patient(PATIENCE);
            }
            Err(_) => return true,
        }
        if let Ok(number) = <[u8; HEADER]>::try_from(end.header.as_slice()) {
            let number = u64::from_le_bytes(number);
            let list = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(stream) = usize::try_from(number).ok().and_then(|i| list.get(i)).cloned() else {
                drop(list);
                self.ledger.wrong(
                    Fault::WrongByte,
                    format!("an upstream was told of a stream {number:#x}"),
                );
                return true;
            };
            drop(list);
            if stream.opened.set(Instant::now()).is_err() {
                self.ledger.wrong(
                    Fault::Other,
                    format!("stream {number} has come to the upstream twice"),
                );
                return true;
            }
            end.takes_up(stream, Side::Upstream);
        }
        false
    }
}

impl End {
    fn new(socket: TcpStream) -> End {
        let now = Instant::now();
        socket
            .set_nonblocking(true)
            .expect("a socket that does not block");
        socket.set_nodelay(true).expect("TCP_NODELAY");
        End {
            socket,
            stream: None,
            header: Vec::new(),
            owed: 0,
            write_at: now,
            read_at: now,
            ends_at: None,
            last_byte: now,
            moved: now,
            broken: false,
            read_over: false,
            outcome: Outcome {
                written: 0,
                ended: false,
                received: 0,
                ending: Ending::Silent,
                wrong_at: None,
                longest_gap: Duration::ZERO,
                over: now,
            },
        }
    }

    fn takes_up(&mut self, stream: Arc<Stream>, side: Side) {
        let habit = stream.kind.habit(side);
        if let Some(bytes) = habit.receive_buffer {
            setsockopt(&self.socket, RcvBuf, &bytes).expect("SO_RCVBUF");
        }
        let now = Instant::now();
        self.ends_at = stream.lifetime.map(|lifetime| now + lifetime);
        self.last_byte = now;
        self.stream = Some((stream, side, habit));
    }

    fn read(&mut self, buffers: &mut [Vec<u8>; 2], seed: u64, habit: Habit, leaving: bool) {
        let [buffer, expected] = buffers;
        let mut left = match habit.read {
            Some((bytes, every)) if !leaving => {
                self.read_at = Instant::now() + every;
                bytes
            }
            _ => TURN,
        };
        let outcome = &mut self.outcome;
        while left > 0 {
            let part = left.min(TURN);
            match self.socket.read(&mut buffer[..part]) {
                Ok(0) => {
                    // A failed write has taken the error that the reader would have seen.
                    outcome.ending = if self.broken { Ending::Reset } else { Ending::Fin };
                    self.read_over = true;
                    self.moved = Instant::now();
                    return;
                }
                Ok(got) => {
                    let offset = outcome.received;
                    fill(seed, offset, &mut expected[..got]);
                    if buffer[..got] != expected[..got] {
                        let wrong = (0..got).find(|&i| buffer[i] != expected[i]);
                        outcome.wrong_at = wrong.map(|i| offset + i as u64);
                        return;
                    }
                    outcome.received += got as u64;
                    left -= got;
                    self.moved = Instant::now();
                    outcome.longest_gap = outcome.longest_gap.max(self.moved - self.last_byte);
                    self.last_byte = self.moved;
                }
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return,
                Err(e) if matches!(e.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => {
                    outcome.ending = Ending::Reset;
                    self.read_over = true;
                    self.broken = true;
                    return;
                }
                Err(e) => panic!("reading after {} bytes: {e}", outcome.received),
            }
        }
    }

    fn write(&mut self, buffer: &mut [u8], seed: u64, habit: Habit, leaving: bool) {
        let now = Instant::now();
        if leaving {
            self.owed = 0;
        } else if now >= self.write_at {
            self.write_at = now + habit.every;
            // A reader that holds its writer up is not sent ever more afterwards.
            self.owed = (self.owed + habit.piece).min(2 * habit.piece);
        }
        let outcome = &mut self.outcome;
        let left = habit.bytes.map_or(u64::MAX, |bytes| bytes - outcome.written);
        let mut part = self.owed.min(TURN);
        part = part.min(usize::try_from(left).unwrap_or(usize::MAX));
        if part > 0 {
            fill(seed, outcome.written, &mut buffer[..part]);
            match self.socket.write(&buffer[..part]) {
                Ok(sent) => {
                    outcome.written += sent as u64;
                    self.owed -= sent;
                    self.moved = now;
                }
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(_) => self.broken = true,
            }
        }
        if leaving || habit.bytes == Some(outcome.written) {
            match self.socket.shutdown(Shutdown::Write) {
                Ok(()) => outcome.ended = true,
                Err(e) if e.raw_os_error() == Some(libc::ENOTCONN) => self.broken = true,
                Err(e) => panic!("ending a stream: {e}"),
            }
        }
    }
}
