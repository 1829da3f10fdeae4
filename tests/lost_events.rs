//! A worker that stands still while more happens than its ring buffer takes. What could not be told is made up for when
//! it runs again: every session goes on by itself.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use crate::harness::pattern::fill;
use crate::harness::slow::{MIB, must_have_stayed_in_the_kernel};
use crate::harness::turns::beside_others;
use crate::harness::{Front, Plan, Towards, patient};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::RcvBuf;
use nix::unistd::Pid;

/// What each writer writes.
const EACH: usize = MIB as usize;
/// What a reader's own socket takes before anybody reads.
const READERS_BUFFER: usize = 32 * 1024;
/// For how long nothing may move before everything is taken to stand still.
const STILL: Duration = Duration::from_millis(700);

/// One session, moved by hand: hundreds of threads would take the processors from what is tested.
struct Session {
    seed: u64,
    writing: TcpStream,
    reading: TcpStream,
    written: usize,
    read: usize,
}

impl Session {
    /// Writes what fits; whether anything did.
    fn push(&mut self, stream: &[u8]) -> bool {
        let before = self.written;
        while self.written < EACH {
            match self.writing.write(&stream[self.written..]) {
                Ok(bytes) => self.written += bytes,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("session {}: writing failed: {error}", self.seed),
            }
        }
        self.written > before
    }

    /// Reads what is there, and compares; whether anything was.
    fn pull(&mut self, stream: &[u8], buffer: &mut [u8]) -> bool {
        let before = self.read;
        while self.read < EACH {
            match self.reading.read(buffer) {
                Ok(0) => panic!("session {}: ended after {} bytes", self.seed, self.read),
                Ok(bytes) => {
                    let right = stream.get(self.read..self.read + bytes);
                    assert_eq!(right, Some(&buffer[..bytes]), "session {}", self.seed);
                    self.read += bytes;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("session {}: reading failed: {error}", self.seed),
            }
        }
        self.read > before
    }
}

/// Does `step` for all sessions until none has moved for `still`, or all are done.
fn move_all(sessions: &mut [Session], still: Duration, mut step: impl FnMut(&mut Session) -> bool) {
    let mut last = Instant::now();
    while last.elapsed() < patient(still) && sessions.iter().any(|session| session.read < EACH) {
        let mut moved = false;
        for session in sessions.iter_mut() {
            moved |= step(session);
        }
        if moved {
            last = Instant::now();
        } else {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

#[test]
fn sessions_of_which_a_worker_that_stood_still_was_told_nothing_go_on() {
    let _beside = beside_others();
    // Each session that is held back and read empty is two events. The ring buffer takes 1024: those of the first
    // sessions fill it, so that nothing at all is told of the others.
    const FILLING: usize = 560;
    const UNTOLD: usize = 60;
    let mut plan = Plan::new()
        .global("worker_backlog_size = 0")
        .stream("ebpf_backlog_size = \"64k\"")
        .lifetime(Duration::from_secs(120));
    let front = Front::new(&mut plan, "127.0.0.1", "");
    let proxy = plan.start();
    let mut stream = vec![0; EACH];
    fill(1, 0, &mut stream);
    let mut sessions: Vec<Session> = (0..FILLING + UNTOLD)
        .map(|number| {
            let (client, upstream) = front.open();
            let (writing, reading) = match Towards::BOTH[number % 2] {
                Towards::Upstream => (client, upstream),
                Towards::Downstream => (upstream, client),
            };
            setsockopt(&reading, RcvBuf, &READERS_BUFFER).expect("SO_RCVBUF");
            for end in [&writing, &reading] {
                end.set_nonblocking(true).expect("a socket that does not block");
            }
            Session {
                seed: number as u64,
                writing,
                reading,
                written: 0,
                read: 0,
            }
        })
        .collect();
    proxy.wait("all sessions are offloaded", |status| {
        status.number("/sessions/total_offloaded") == (FILLING + UNTOLD) as u64
    });

    let mut buffer = vec![0; 64 * 1024];
    let worker = Pid::from_raw(proxy.worker());
    kill(worker, Signal::SIGSTOP).expect("stopping the worker");
    let (filling, untold) = sessions.split_at_mut(FILLING);
    for part in [filling, untold] {
        move_all(part, STILL, |session| session.push(&stream));
        move_all(part, STILL, |session| session.pull(&stream, &mut buffer));
        let done = part.iter().filter(|session| session.read == EACH).count();
        assert_eq!(done, 0, "sessions that were not held back");
    }
    kill(worker, Signal::SIGCONT).expect("letting the worker go on");

    move_all(&mut sessions, Duration::from_secs(10), |session| {
        session.push(&stream) | session.pull(&stream, &mut buffer)
    });
    let status = proxy.status();
    let lost = status.number("/workers/0/lost_events");
    let stuck = sessions.iter().filter(|session| session.read < EACH).count();
    eprintln!("{lost} events lost, {} pauses", status.number("/pauses"));
    assert!(
        lost >= 2 * UNTOLD as u64,
        "the ring buffer had room: {lost} events lost"
    );
    assert_eq!(stuck, 0, "sessions that stand still although their readers read");
    for Session {
        writing, mut reading, ..
    } in sessions
    {
        writing.shutdown(Shutdown::Write).expect("ending the stream");
        reading.set_nonblocking(false).expect("a socket that blocks");
        assert_eq!(reading.read(&mut buffer).expect("an end of stream"), 0);
    }
    must_have_stayed_in_the_kernel(&proxy.settle());
}
