//! Active health checks: the peers of a group that says `check` are asked whether they live. Which worker runs a check
//! and what its result means is decided on the board (`culvert_shared::health`), so that all workers together are
//! one checker; here it is run, in the worker's own poll.
//!
//! A check is no session: it takes no slot, and counts at no peer.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::Ordering::Relaxed;

use culvert_shared::config::{Address, CHECK_MAX_BYTES, Check, write_bytes};
use culvert_shared::health::{Lease, Outcome, Pace, Turn};
use mio::Interest;
use mio::unix::SourceFd;
use nix::errno::Errno;

use crate::balance::Member;
use crate::clock;
use crate::connect::is_ours;
use crate::dial::start_connecting;
use crate::event_loop::{CHECK_TIMER, Worker};
use crate::sockets;

/// The poll's tokens of checks begin here; listeners have those below.
pub(crate) const FIRST_TOKEN: usize = 1 << 32;

/// Checks that one worker has under way at most: each takes a descriptor.
const AT_ONCE: usize = 256;
/// Checks that one worker begins at a time, so that sessions do not wait for those of thousands of peers.
const BATCH: usize = 32;
/// Peers are looked at no more often than this.
const SCAN_EVERY_MS: u64 = 10;
/// How often a worker of a generation that is not in force yet looks whether it is.
const IN_FORCE_EVERY_MS: u64 = 50;
/// How often it is looked at whether names stand for other addresses.
const NAMES_EVERY_MS: u64 = 500;
/// Each peer has a worker of its own that checks it; how much later the others would, as a part of the interval.
const OTHERS_PART: u64 = 4;
/// How much of a wrong answer the log shows.
const SHOWN_BYTES: usize = 64;

/// The checks that this worker runs.
#[derive(Default)]
pub struct Checks {
    running: HashMap<usize, Run>,
    /// The token of the next one.
    next: usize,
    /// When peers are looked at next.
    scan_ms: u64,
}

impl Checks {
    /// Whether none is under way.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty()
    }
}

/// A check that is under way.
struct Run {
    upstream: usize,
    row: usize,
    peer: String,
    lease: Lease,
    deadline_ms: u64,
    socket: OwnedFd,
    connected: bool,
    sent: usize,
    answer: Vec<u8>,
}

/// What came of working on a check.
type Step = Option<(Outcome, String)>;

impl Worker {
    /// Begins to check.
    pub(crate) fn begin_checks(&mut self) {
        if self
            .config
            .upstreams
            .iter()
            .any(|upstream| upstream.check.is_some())
        {
            self.wheel.set(CHECK_TIMER, clock::now_ms());
        }
    }

    /// Begins no more checks, and gives up those that are under way.
    pub(crate) fn drop_checks(&mut self) {
        for (_, run) in self.checks.running.drain() {
            self.board[0].peers[run.row].check.give_back(run.lease);
        }
    }

    /// Ends the checks whose time is over, and begins those that are due.
    pub(crate) fn run_checks(&mut self) {
        let now_ms = clock::now_ms();
        let running = self.checks.running.iter();
        let late: Vec<usize> = running
            .filter(|(_, run)| run.deadline_ms <= now_ms)
            .map(|(token, _)| *token)
            .collect();
        for token in late {
            if let Some(run) = self.checks.running.remove(&token) {
                let (outcome, why) = run.ran_out();
                self.conclude(run, outcome, &why);
            }
        }
        if now_ms >= self.checks.scan_ms {
            self.checks.scan_ms = match self.draining {
                true => u64::MAX,
                false if !self.is_in_force() => now_ms + IN_FORCE_EVERY_MS,
                false => self.begin_due(now_ms),
            };
        }
        self.wake_to_check();
    }

    /// Something has happened on the socket of a check.
    pub(crate) fn check_event(&mut self, token: usize) {
        let Some(mut run) = self.checks.running.remove(&token) else {
            return;
        };
        match self.check_of(&run).and_then(|check| run.step(check)) {
            None => {
                self.checks.running.insert(token, run);
            }
            Some((outcome, why)) => {
                self.conclude(run, outcome, &why);
                self.wake_to_check();
            }
        }
    }

    /// Until the master has switched over to its generation, the workers of the one before check.
    fn is_in_force(&self) -> bool {
        let own = self.gauges().generation.load(Relaxed);
        self.board[0].generation.load(Relaxed) >= own
    }

    fn wake_to_check(&mut self) {
        let deadlines = self.checks.running.values().map(|run| run.deadline_ms);
        let wake_ms = deadlines.chain([self.checks.scan_ms]).min();
        if let Some(wake_ms) = wake_ms.filter(|wake_ms| *wake_ms != u64::MAX) {
            self.wheel.set(CHECK_TIMER, wake_ms);
        }
    }

    /// Begins the checks that are due, and says when to look again.
    fn begin_due(&mut self, now_ms: u64) -> u64 {
        self.refresh_groups();
        let workers = self.config.worker_cpus.len().max(1);
        let slot = self.gauges().slot.load(Relaxed) as usize;
        let mut due = Vec::new();
        let mut next_ms = u64::MAX;
        for (upstream, group) in self.config.upstreams.iter().enumerate() {
            let Some(check) = &group.check else { continue };
            let pace = pace(check);
            if !group.names.is_empty() {
                // Addresses come and go.
                next_ms = next_ms.min(now_ms + NAMES_EVERY_MS);
            }
            for (peer, member) in self.groups[upstream].members().iter().enumerate() {
                if member.down {
                    continue;
                }
                let row = member.row;
                let own = row % workers == slot;
                let after_ms = if own { 0 } else { pace.interval_ms / OTHERS_PART };
                let due_ms = self.board[0].peers[row].check.due_ms(pace, now_ms) + after_ms;
                if due_ms <= now_ms {
                    due.push((upstream, peer));
                } else {
                    next_ms = next_ms.min(due_ms);
                }
            }
        }
        let room = AT_ONCE.saturating_sub(self.checks.running.len()).min(BATCH);
        if !due.is_empty() {
            // Those that find no room, and those that another worker is faster with.
            next_ms = 0;
        }
        for (upstream, peer) in due.into_iter().take(room) {
            self.begin_check(upstream, peer, now_ms);
        }
        next_ms.max(now_ms + SCAN_EVERY_MS)
    }

    fn begin_check(&mut self, upstream: usize, peer: usize, now_ms: u64) {
        let group = &self.config.upstreams[upstream];
        let Some(check) = &group.check else { return };
        let Member { row, address, .. } = &self.groups[upstream].members()[peer];
        let row = *row;
        let Some(lease) = self.board[0].peers[row]
            .check
            .claim(self.row, pace(check), now_ms)
        else {
            return;
        };
        let token = FIRST_TOKEN + self.checks.next;
        self.checks.next += 1;
        let opened = open(address, check.port).and_then(|(socket, under_way)| {
            let interest = Interest::READABLE | Interest::WRITABLE;
            let registry = self.poll.registry();
            registry
                .register(&mut SourceFd(&socket.as_raw_fd()), mio::Token(token), interest)
                .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or_default()))?;
            Ok((socket, under_way))
        });
        let failed = match opened {
            Ok((socket, under_way)) => {
                let run = Run {
                    upstream,
                    row,
                    peer: address.to_string(),
                    lease,
                    deadline_ms: now_ms + check.timeout.as_millis() as u64,
                    socket,
                    connected: !under_way,
                    sent: 0,
                    answer: Vec::new(),
                };
                self.checks.running.insert(token, run);
                return self.check_event(token);
            }
            Err(errno) => errno,
        };
        if is_ours(failed) {
            // It says nothing of the peer.
            log::warn!(
                "upstream {}: peer {address} is not checked: {}",
                group.name,
                failed.desc()
            );
            return self.board[0].peers[row].check.give_back(lease);
        }
        let peer = address.to_string();
        self.take_down(
            (upstream, row, &peer),
            lease,
            Outcome::ConnectFailed,
            failed.desc(),
        );
    }

    fn conclude(&self, run: Run, outcome: Outcome, why: &str) {
        self.take_down((run.upstream, run.row, &run.peer), run.lease, outcome, why);
    }

    /// Takes a result down, and says what it has changed.
    fn take_down(
        &self,
        (upstream, row, peer): (usize, usize, &str),
        lease: Lease,
        outcome: Outcome,
        why: &str,
    ) {
        let group = &self.config.upstreams[upstream];
        let Some(check) = &group.check else { return };
        let row = &self.board[0].peers[row];
        match row.check.settle(lease, outcome, check.rise, check.fall) {
            Some(Turn::Down) => log::warn!(
                "upstream {}: peer {peer} is down: {} checks in a row failed (fall), the last one because {why}",
                group.name,
                check.fall
            ),
            Some(Turn::Up) => {
                row.revive(clock::now_ms());
                log::info!(
                    "upstream {}: peer {peer} is up: {} checks in a row passed (rise)",
                    group.name,
                    check.rise
                );
            }
            None if outcome == Outcome::Passed => {}
            None => log::debug!("upstream {}: a check of peer {peer} failed: {why}", group.name),
        }
    }

    fn check_of(&self, run: &Run) -> Option<&Check> {
        self.config.upstreams[run.upstream].check.as_ref()
    }
}

impl Run {
    /// Goes on as far as it can; `None`: it waits for its socket.
    fn step(&mut self, check: &Check) -> Step {
        if !self.connected {
            if let Some(errno) = sockets::pending_error(self.socket.as_fd()) {
                return Some((Outcome::ConnectFailed, errno.desc().to_owned()));
            }
            if !sockets::is_connected(self.socket.as_fd()) {
                return None;
            }
            self.connected = true;
        }
        while self.sent < check.send.len() {
            match sockets::send(self.socket.as_fd(), &check.send[self.sent..]) {
                Ok(sent) => self.sent += sent,
                Err(Errno::EAGAIN) => return None,
                Err(errno) => return Some((Outcome::Broken, errno.desc().to_owned())),
            }
        }
        let Some(expect) = &check.expect else {
            return Some((Outcome::Passed, String::new()));
        };
        let mut buffer = [0u8; CHECK_MAX_BYTES];
        loop {
            let room = CHECK_MAX_BYTES - self.answer.len();
            match sockets::receive(self.socket.as_fd(), &mut buffer[..room]) {
                Ok(0) if self.answer.is_empty() => {
                    return Some((
                        Outcome::Closed,
                        "it closed the connection without a word".to_owned(),
                    ));
                }
                Ok(0) => return Some(self.wrong("and closed the connection")),
                Ok(got) => self.answer.extend_from_slice(&buffer[..got]),
                Err(Errno::EAGAIN) => return None,
                Err(errno) => return Some((Outcome::Broken, errno.desc().to_owned())),
            }
            if expect.is_in(&self.answer) {
                return Some((Outcome::Passed, String::new()));
            }
            if self.answer.len() == CHECK_MAX_BYTES {
                return Some(self.wrong("and more, without what is expected"));
            }
        }
    }

    /// Its time is over.
    fn ran_out(&self) -> (Outcome, String) {
        match (self.connected, self.answer.is_empty()) {
            (false, _) => (
                Outcome::ConnectTimeout,
                "it took no connection within timeout".to_owned(),
            ),
            (true, true) => (Outcome::NoAnswer, "it did not answer within timeout".to_owned()),
            (true, false) => self.wrong("and nothing that is expected within timeout"),
        }
    }

    fn wrong(&self, more: &str) -> (Outcome, String) {
        let shown = &self.answer[..self.answer.len().min(SHOWN_BYTES)];
        (
            Outcome::WrongAnswer,
            format!("it answered \"{}\" {more}", write_bytes(shown)),
        )
    }
}

fn pace(check: &Check) -> Pace {
    Pace {
        interval_ms: check.interval.as_millis() as u64,
        timeout_ms: check.timeout.as_millis() as u64,
    }
}

fn open(address: &Address, port: Option<u16>) -> Result<(OwnedFd, bool), Errno> {
    match (address, port) {
        (Address::Tcp(address), Some(port)) => {
            let mut address = *address;
            address.set_port(port);
            start_connecting(&Address::Tcp(address), None)
        }
        _ => start_connecting(address, None),
    }
}
