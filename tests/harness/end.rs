//! One end of a session that behaves as a script says: how much it writes, in which pieces, when it waits, how slowly
//! it reads, and whether it ends its stream or resets. It says afterwards what it did and what it met.

use std::io::{ErrorKind, Read};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::RcvBuf;
use nix::sys::socket::{MsgFlags, setsockopt};

use super::pattern::{Ending, Received, fill};
use super::sockets::reset;
use super::{Flag, PATIENCE, patient};

/// When an end begins to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// After so long.
    After(Duration),
    /// When a byte, or the end, has come from the other end.
    Answering,
    /// When the other end's stream has ended.
    AfterEnd,
}

/// When an end ends its stream, all of which it has written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ends {
    /// At once.
    AtOnce,
    /// When it has every byte of the other end's.
    Last,
    /// Never: it resets.
    Never,
}

/// A wait: `pause` each time that `every` bytes have gone by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    /// Bytes between two waits.
    pub every: u64,
    /// How long each is.
    pub pause: Duration,
}

/// One direction at one end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Half {
    /// The seed of its bytes.
    pub seed: u64,
    /// How many the writer has to write.
    pub bytes: u64,
    /// The largest piece of one call.
    pub piece: usize,
    /// Where it waits.
    pub gap: Option<Gap>,
}

/// What an end does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Script {
    /// What it writes.
    pub out: Half,
    /// What it reads.
    pub into: Half,
    /// When it begins to write.
    pub start: Start,
    /// Its end of stream travels in the last segment.
    pub glued: bool,
    /// When it ends its stream.
    pub ends: Ends,
    /// It resets once so many bytes have been written and read in all.
    pub reset_after: Option<u64>,
    /// A receive buffer of its own size.
    pub receive_buffer: Option<usize>,
}

/// What became of an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// Bytes that its socket took.
    pub written: u64,
    /// It ended its stream, after all of them.
    pub ended: bool,
    /// It reset the connection.
    pub reset: bool,
    /// What it received, and how that ended; `Enough` where it reset.
    pub received: Received,
    /// Why it could not write on.
    pub write_error: Option<Errno>,
}

/// An end at work.
struct End<'a> {
    script: &'a Script,
    stream: TcpStream,
    outcome: Outcome,
    read_over: bool,
    write_at: Option<Instant>,
    read_at: Instant,
    buffer: Vec<u8>,
    expected: Vec<u8>,
}

/// Plays a script on a connected socket. A reset waits until `connected` is up, so that the other end exists.
pub fn play(script: &Script, stream: TcpStream, connected: &Flag) -> Outcome {
    if let Some(bytes) = script.receive_buffer {
        setsockopt(&stream, RcvBuf, &bytes).expect("SO_RCVBUF");
    }
    stream
        .set_nonblocking(true)
        .expect("a socket that does not block");
    let now = Instant::now();
    let largest = script.out.piece.max(script.into.piece);
    let end = End {
        script,
        stream,
        outcome: Outcome {
            written: 0,
            ended: false,
            reset: false,
            received: Received {
                bytes: 0,
                ending: Ending::Silent,
                wrong_at: None,
            },
            write_error: None,
        },
        read_over: false,
        write_at: match script.start {
            Start::After(wait) => Some(now + wait),
            Start::Answering | Start::AfterEnd => None,
        },
        read_at: now,
        buffer: vec![0; largest],
        expected: vec![0; largest],
    };
    end.run(connected)
}

impl End<'_> {
    fn run(mut self, connected: &Flag) -> Outcome {
        let mut progress = Instant::now();
        loop {
            let done = self.outcome.written + self.outcome.received.bytes;
            if self.script.reset_after.is_some_and(|bytes| done >= bytes) && connected.is_up() {
                self.outcome.reset = true;
                if !self.read_over {
                    self.outcome.received.ending = Ending::Enough;
                }
                reset(self.stream);
                return self.outcome;
            }
            let writing = !self.outcome.ended && self.outcome.write_error.is_none();
            if (!writing && self.read_over) || self.outcome.received.wrong_at.is_some() {
                return self.outcome;
            }
            let now = Instant::now();
            if now > progress + patient(PATIENCE) {
                return self.outcome;
            }
            let may_write = writing && !self.holds_its_end() && self.write_at.is_some_and(|at| now >= at);
            let may_read = !self.read_over && now >= self.read_at;
            let ready = self.poll(now, may_write, may_read);
            // What came before a reset is read before the failing write learns of it.
            let moved = (may_read
                && ready.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR)
                && self.read())
                | (may_write && ready.contains(PollFlags::POLLOUT) && self.write());
            if moved {
                progress = Instant::now();
            }
        }
    }

    fn poll(&self, now: Instant, may_write: bool, may_read: bool) -> PollFlags {
        let mut wanted = PollFlags::empty();
        wanted.set(PollFlags::POLLOUT, may_write);
        wanted.set(PollFlags::POLLIN, may_read);
        let waits = [self.write_at.filter(|_| !may_write), Some(self.read_at)];
        let next = waits.into_iter().flatten().filter(|at| *at > now).min();
        let wait = next.map_or(50, |at| (at - now).as_millis().min(50) as u16);
        if wanted.is_empty() {
            // An error would be reported at once, again and again.
            std::thread::sleep(Duration::from_millis(u64::from(wait).max(1)));
            return wanted;
        }
        let mut fds = [PollFd::new(self.stream.as_fd(), wanted)];
        match poll(&mut fds, PollTimeout::from(wait)) {
            Ok(_) => fds[0].revents().unwrap_or(PollFlags::empty()),
            Err(Errno::EINTR) => PollFlags::empty(),
            Err(errno) => panic!("polling a socket: {errno}"),
        }
    }

    fn read(&mut self) -> bool {
        let received = &mut self.outcome.received;
        let half = &self.script.into;
        match self.stream.read(&mut self.buffer[..half.piece]) {
            Ok(0) => {
                // A failed write has taken the error that the reader would have seen.
                let reset = matches!(self.outcome.write_error, Some(Errno::ECONNRESET));
                received.ending = if reset { Ending::Reset } else { Ending::Fin };
                self.read_over = true;
            }
            Ok(got) => {
                let offset = received.bytes;
                fill(half.seed, offset, &mut self.expected[..got]);
                if self.buffer[..got] != self.expected[..got] {
                    let wrong = (0..got).find(|&i| self.buffer[i] != self.expected[i]);
                    received.wrong_at = wrong.map(|i| offset + i as u64);
                    return true;
                }
                received.bytes += got as u64;
                if let Some(wait) = crossed(half.gap, offset, received.bytes) {
                    self.read_at = Instant::now() + wait;
                }
            }
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return false,
            Err(e) if matches!(e.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => {
                received.ending = Ending::Reset;
                self.read_over = true;
            }
            Err(e) => panic!("reading after {} bytes: {e}", received.bytes),
        }
        let may_start = match self.script.start {
            Start::After(_) => false,
            Start::Answering => true,
            Start::AfterEnd => self.read_over,
        };
        if may_start && self.write_at.is_none() {
            self.write_at = Some(Instant::now());
        }
        true
    }

    /// It has written everything, and waits with the end of its stream.
    fn holds_its_end(&self) -> bool {
        let may_end = match self.script.ends {
            Ends::AtOnce => true,
            Ends::Last => self.read_over || self.outcome.received.bytes == self.script.into.bytes,
            Ends::Never => false,
        };
        self.outcome.written == self.script.out.bytes && !may_end
    }

    fn write(&mut self) -> bool {
        let half = &self.script.out;
        let offset = self.outcome.written;
        let left = half.bytes - offset;
        if left > 0 {
            let part = usize::try_from(left).map_or(half.piece, |left| left.min(half.piece));
            fill(half.seed, offset, &mut self.buffer[..part]);
            let mut flags = MsgFlags::MSG_NOSIGNAL;
            if self.script.glued && part as u64 == left {
                flags |= MsgFlags::from_bits_retain(libc::MSG_MORE);
            }
            match nix::sys::socket::send(self.stream.as_raw_fd(), &self.buffer[..part], flags) {
                Ok(sent) => {
                    self.outcome.written += sent as u64;
                    if let Some(wait) = crossed(half.gap, offset, self.outcome.written) {
                        self.write_at = Some(Instant::now() + wait);
                    }
                }
                Err(Errno::EAGAIN | Errno::EINTR) => return false,
                Err(errno) => {
                    self.outcome.write_error = Some(errno);
                    return true;
                }
            }
        }
        if self.outcome.written == half.bytes && !self.holds_its_end() {
            match self.stream.shutdown(Shutdown::Write) {
                Ok(()) => self.outcome.ended = true,
                Err(e) => self.outcome.write_error = Some(Errno::from_raw(e.raw_os_error().unwrap_or(0))),
            }
        }
        true
    }
}

/// How long to wait, if a place to wait at lies between the two offsets.
fn crossed(gap: Option<Gap>, before: u64, after: u64) -> Option<Duration> {
    gap.filter(|gap| before / gap.every != after / gap.every)
        .map(|gap| gap.pause)
}
