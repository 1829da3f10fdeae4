//! The user-space copy: what cannot, or must not, be forwarded in the kernel.
//!
//! What is copied is looked at, written, and as much of it as the target took is then taken out of the source. So between
//! two turns no byte of a session is in this process: another worker can go on with it whenever this one has to leave,
//! however long its reader has stopped.

use std::os::fd::AsFd;

use culvert_shared::config::Config;
use culvert_shared::ids::Direction;
use nix::errno::Errno;

use crate::clock;
use crate::event_loop::Worker;
use crate::session::{Failed, Session, source, target};
use crate::sockets;

/// Reads that one direction may make in one turn, so that no session starves the others.
const TURN_BUDGET: usize = 16;

/// The buffer that all sessions of the worker read into.
pub struct Scratch(Vec<u8>);

impl Scratch {
    /// Large enough for the largest `proxy_buffer_size`.
    pub fn new(config: &Config) -> Scratch {
        let largest = config
            .servers
            .iter()
            .map(|server| server.stream.proxy_buffer_size)
            .max()
            .unwrap_or(0);
        Scratch(vec![0; largest.max(1)])
    }
}

/// How far a copy came.
pub enum Pumped {
    /// It waits for a socket.
    Blocked,
    /// It could go on.
    TurnOver,
    /// The source has ended and everything before its end is written.
    SourceEnded,
}

impl Worker {
    /// Copies one direction until a socket has to be waited for, or the turn is over.
    pub(crate) fn pump(&mut self, session: &mut Session, direction: Direction) -> Result<Pumped, Failed> {
        let limit = session.settings.proxy_buffer_size.min(self.scratch.0.len());
        let (from, to) = (source(direction), target(direction));
        for _ in 0..TURN_BUDGET {
            if !self.flush(session, direction)? {
                return Ok(Pumped::Blocked);
            }
            if session.stream(direction).source_ended {
                return Ok(Pumped::SourceEnded);
            }
            if session.is_long() {
                return Ok(Pumped::TurnOver);
            }
            if !session.ready[from.index()].readable {
                return Ok(Pumped::Blocked);
            }
            let limit = match &mut session.streams[direction.index()].pace {
                None => limit,
                Some(pace) => limit.min(pace.budget(clock::now_ns())),
            };
            if limit == 0 {
                // `wait` says when it goes on.
                return Ok(Pumped::Blocked);
            }
            // A status document has no upstream. Its client may send what it likes; nobody reads it.
            let into = session.socket(to);
            if into.is_some() && !session.ready[to.index()].writable {
                return Ok(Pumped::Blocked);
            }
            let Some(socket) = session.socket(from) else {
                return Ok(Pumped::Blocked);
            };
            self.begin_copying(session);
            let buffer = &mut self.scratch.0[..limit];
            let asked = buffer.len();
            let seen = match sockets::peek(socket.as_fd(), buffer) {
                Ok(0) => {
                    session.stream(direction).source_ended = true;
                    return Ok(Pumped::SourceEnded);
                }
                Ok(seen) => seen,
                Err(Errno::EAGAIN) => {
                    session.ready[from.index()].readable = false;
                    return Ok(Pumped::Blocked);
                }
                Err(errno) => return Err(Failed { side: from, errno }),
            };
            let written = match into.map(|into| sockets::send(into.as_fd(), &buffer[..seen])) {
                None => seen,
                Some(Ok(written)) => written,
                Some(Err(Errno::EAGAIN)) => 0,
                Some(Err(errno)) => return Err(Failed { side: to, errno }),
            };
            if let Err(errno) = sockets::discard(socket.as_fd(), &mut buffer[..written]) {
                return Err(Failed { side: from, errno });
            }
            if written < seen {
                session.fill(to);
            } else if seen < asked && session.reads_all(from) {
                session.ready[from.index()].readable = false;
            }
            if written == 0 {
                continue;
            }
            session.last_active_ms = clock::now_ms();
            let stream = session.stream(direction);
            stream.read_bytes += written as u64;
            if let Some(pace) = &mut stream.pace {
                pace.spend(written);
            }
            if session.upstream.is_some() {
                session.stream(direction).written_bytes += written as u64;
                self.board[0].add_relayed(direction, written as u64);
            }
        }
        Ok(Pumped::TurnOver)
    }

    /// Writes what this process itself has to say; true when nothing is left of it.
    fn flush(&mut self, session: &mut Session, direction: Direction) -> Result<bool, Failed> {
        let to = target(direction);
        while !session.streams[direction.index()].pending.is_empty() {
            if !session.ready[to.index()].writable {
                return Ok(false);
            }
            let Some(socket) = session.socket(to) else {
                return Ok(true);
            };
            self.begin_copying(session);
            let written = match sockets::send(
                socket.as_fd(),
                session.streams[direction.index()].pending.as_slices().0,
            ) {
                Ok(written) => written,
                Err(Errno::EAGAIN) => {
                    session.fill(to);
                    return Ok(false);
                }
                Err(errno) => return Err(Failed { side: to, errno }),
            };
            session.last_active_ms = clock::now_ms();
            let stream = session.stream(direction);
            stream.pending.drain(..written);
            stream.written_bytes += written as u64;
            if stream.pending.is_empty() {
                // A session that is done with it holds no buffer.
                stream.pending = Default::default();
            }
            if session.upstream.is_some() {
                self.board[0].add_relayed(direction, written as u64);
            }
        }
        Ok(true)
    }
}
