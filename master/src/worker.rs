//! One worker process as the master sees it: what it holds, what it was told, and until when it has time.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use culvert_shared::config::Resolver;
use culvert_shared::hosts::{Answer, Question};
use culvert_shared::ids::Owner;
use culvert_shared::message::{ToMaster, ToWorker};
use culvert_shared::sys::fdpass;
use culvert_worker::Store;
use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{getsockopt, setsockopt, sockopt};
use nix::unistd::Pid;

use crate::access_log::AccessLogs;
use crate::error_log::ErrorLog;
use crate::keeper::Queue;

/// How long a worker has to obey [`ToWorker::Stop`]: it only resets what is open.
const STOP_PATIENCE: Duration = Duration::from_secs(5);

/// How long a worker is told nothing more after the host had no memory for it.
const REST: Duration = Duration::from_millis(20);

/// What is heard from a worker in one turn of the master's loop: one that never stops talking is to keep it from nothing
/// else.
const MESSAGES_AT_ONCE: usize = 64;

/// Answers that wait for a worker to listen: more than it may have asked for at once.
const UNHEARD_MAX: usize = 2048;

/// How far a worker has got.
///
/// ```text
/// Starting ──Ready──▶ Serving ──Drain──▶ Draining ──time is up──▶ Stopping ──time is up──▶ Killed
///     │                  │                  │                        ▲
///     └──────────────────┴──────────────────┴──Stop, or its control socket closes
/// ```
/// From each of them a worker may die; reaping it is what removes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Forked, not yet accepting.
    Starting,
    /// Accepts connections.
    Serving,
    /// Finishes its sessions; told to stop at this time, if there is one.
    Draining(Option<Instant>),
    /// Was told to stop, or cannot be told anything any more; killed at this time.
    Stopping(Instant),
    /// SIGKILL was sent.
    Killed,
}

impl State {
    /// When something is to be done if nothing happens before.
    pub fn deadline(self) -> Option<Instant> {
        match self {
            State::Starting | State::Serving | State::Killed => None,
            State::Draining(stop_at) => stop_at,
            State::Stopping(kill_at) => Some(kill_at),
        }
    }
}

/// One worker process.
pub struct Worker {
    /// Its process id.
    pub pid: Pid,
    /// Its worker slot.
    pub slot: usize,
    /// Its row on the board.
    pub row: usize,
    /// The mark of the sockmap pairs that it holds.
    pub owner: Owner,
    /// Its generation.
    pub generation: u64,
    /// The stores that it cares for; kept until it is gone, because the master frees its places then.
    pub stores: Vec<Arc<Store>>,
    /// The files of the access logs that it writes.
    pub access_logs: AccessLogs,
    /// Whom it may have asked for hosts, by the indexes that it uses.
    pub resolvers: Vec<Arc<Resolver>>,
    /// What it is to do, with descriptors, where it has no room to hear it.
    orders: VecDeque<(ToWorker, Vec<OwnedFd>)>,
    /// The same for what came of its questions.
    unheard: VecDeque<ToWorker>,
    /// The host had no memory for a message: until when none is tried. Its socket says nothing of that.
    rest_until: Option<Instant>,
    /// Sessions that it is to adopt and was not yet told of.
    pub to_adopt: Queue,
    /// When it was forked.
    pub started: Instant,
    /// Messages of this turn.
    heard: usize,
    state: State,
    leaving: bool,
    control: Option<OwnedFd>,
}

/// What is known of a worker when it is forked.
pub struct Born {
    /// As in [`Worker`].
    pub pid: Pid,
    /// As in [`Worker`].
    pub slot: usize,
    /// As in [`Worker`].
    pub row: usize,
    /// As in [`Worker`].
    pub owner: Owner,
    /// As in [`Worker`].
    pub generation: u64,
    /// As in [`Worker`].
    pub stores: Vec<Arc<Store>>,
    /// As in [`Worker`].
    pub access_logs: AccessLogs,
    /// As in [`Worker`].
    pub resolvers: Vec<Arc<Resolver>>,
    /// The master's end of the pair; `None` when the other one was closed.
    pub control: Option<OwnedFd>,
}

impl Worker {
    /// A worker that was just forked.
    pub fn new(born: Born, now: Instant) -> Worker {
        let Born {
            pid,
            slot,
            row,
            owner,
            generation,
            stores,
            access_logs,
            resolvers,
            control,
        } = born;
        Worker {
            pid,
            slot,
            row,
            owner,
            generation,
            stores,
            access_logs,
            resolvers,
            orders: VecDeque::new(),
            unheard: VecDeque::new(),
            rest_until: None,
            to_adopt: Queue::new(),
            started: now,
            heard: 0,
            state: State::Starting,
            leaving: false,
            control,
        }
    }

    /// A worker that was just forked for nothing but sessions that no slot's worker cares for.
    pub fn carer(born: Born, now: Instant) -> Worker {
        Worker {
            leaving: true,
            ..Worker::new(born, now)
        }
    }

    /// A worker that another binary has forked, in this process.
    pub fn taken_over(born: Born, state: State, leaving: bool, to_adopt: Queue, now: Instant) -> Worker {
        let mut worker = Worker {
            state,
            leaving,
            to_adopt,
            ..Worker::new(born, now)
        };
        // That binary may have had no room to say it. Twice does no harm, and a worker that has handed over goes on so.
        match state {
            State::Draining(_) => worker.say(ToWorker::Drain, &[]),
            State::Stopping(_) => worker.say(ToWorker::Stop, &[]),
            State::Starting | State::Serving | State::Killed => {}
        }
        worker
    }

    /// How far it has got.
    pub fn state(&self) -> State {
        self.state
    }

    /// Whether it was told to leave: its end is no accident then.
    pub fn is_leaving(&self) -> bool {
        self.leaving
    }

    /// Whether it was started only to take over sessions that no slot's worker cares for, and still takes some.
    pub fn is_carer(&self) -> bool {
        self.leaving && matches!(self.state, State::Starting | State::Serving)
    }

    /// The socket to wait on for [`Worker::hear`].
    pub fn control(&self) -> Option<BorrowedFd<'_>> {
        self.control.as_ref().map(AsFd::as_fd)
    }

    /// What the worker says next of its sessions, with the sockets that come along; `None`: nothing now, or enough for
    /// this turn.
    pub fn hear(&mut self, now: Instant) -> Option<(ToMaster, Vec<OwnedFd>)> {
        while let Some(control) = &self.control {
            if self.heard == MESSAGES_AT_ONCE {
                return None;
            }
            self.heard += 1;
            match fdpass::receive(control.as_fd()) {
                Err(Errno::EAGAIN) => return None,
                Err(Errno::EINTR) => {}
                Ok(received) if !received.message.is_empty() => {
                    received.descriptors.iter().for_each(never_wait);
                    match ToMaster::decode(&received.message) {
                        Some(ToMaster::Ready) if self.state == State::Starting => self.state = State::Serving,
                        Some(ToMaster::Ready) => {}
                        Some(message) => return Some((message, received.descriptors)),
                        None => log::error!(
                            "worker {} (process {}) sent an unknown message",
                            self.slot,
                            self.pid
                        ),
                    }
                }
                Ok(_) | Err(_) => {
                    // Most likely it is dying. It cannot be steered any more, so make sure of that.
                    self.control = None;
                    self.stop_by(now);
                }
            }
        }
        None
    }

    /// Lets more be heard in this turn, if there may be more.
    pub fn hear_on(&mut self) -> bool {
        std::mem::take(&mut self.heard) == MESSAGES_AT_ONCE
    }

    /// Tells it to finish its sessions and exit, within `limit`.
    pub fn drain(&mut self, limit: Option<Duration>, now: Instant) {
        self.leaving = true;
        if matches!(self.state, State::Starting | State::Serving) {
            self.say(ToWorker::Drain, &[]);
            self.state = State::Draining(limit.map(|limit| now + limit));
        }
    }

    /// Tells it to let go of its sessions and exit; those that cannot be moved may end within `limit`.
    pub fn hand_over(&mut self, limit: Option<Duration>, now: Instant) {
        self.leaving = true;
        match self.state {
            State::Starting | State::Serving => {
                self.say(ToWorker::HandOver, &[]);
                self.state = State::Draining(limit.map(|limit| now + limit));
            }
            State::Draining(_) => self.say(ToWorker::HandOver, &[]),
            State::Stopping(_) | State::Killed => {}
        }
    }

    /// Tells it to exit now.
    pub fn stop(&mut self, now: Instant) {
        self.leaving = true;
        if matches!(self.state, State::Starting | State::Serving | State::Draining(_)) {
            self.say(ToWorker::Stop, &[]);
            self.stop_by(now);
        }
    }

    /// Ends it without its help.
    pub fn kill(&mut self) {
        // It is our child and was not yet waited for, so the id is still its own.
        if let Err(error) = kill(self.pid, Signal::SIGKILL) {
            log::error!(
                "failed to kill worker {} (process {}): {error}",
                self.slot,
                self.pid
            );
        }
        self.state = State::Killed;
    }

    /// Hands it the error log that it shall write to.
    pub fn write_log_to(&mut self, log: &ErrorLog) {
        self.say(ToWorker::Log(log.syslog().cloned()), &[log.as_fd()]);
    }

    /// The same, with the access logs as they are now.
    pub fn write_logs_to(&mut self, log: &ErrorLog) {
        let access_logs = self.access_logs.clone();
        let logs: Vec<BorrowedFd<'_>> = std::iter::once(log.as_fd())
            .chain(access_logs.descriptors())
            .collect();
        self.say(ToWorker::Log(log.syslog().cloned()), &logs);
    }

    /// Tells it what came of a question, as soon as it has room to hear it. One that asks and never listens is not
    /// told everything.
    pub fn answer(&mut self, question: Question, answer: Answer) {
        if self.unheard.len() >= UNHEARD_MAX {
            return;
        }
        self.unheard.push_back(ToWorker::Answer(question, answer));
        self.say_on();
    }

    /// Whether something waits until it has room to hear it.
    pub fn has_unheard(&self) -> bool {
        !self.to_adopt.is_empty() || !self.orders.is_empty() || !self.unheard.is_empty()
    }

    /// Until when it is told nothing, because the host has no memory for it.
    pub fn rest_until(&self, now: Instant) -> Option<Instant> {
        self.rest_until.filter(|until| *until > now && self.has_unheard())
    }

    /// The host had no memory for what it was to be told.
    pub fn rest(&mut self) {
        self.rest_until = Some(Instant::now() + REST);
    }

    /// Whether to wait until its socket has room.
    pub fn waits_for_room(&self, now: Instant) -> bool {
        self.has_unheard() && self.rest_until(now).is_none()
    }

    /// Says what it had no room to hear, orders first.
    fn say_on(&mut self) {
        if let Err(Errno::ENOBUFS | Errno::ENOMEM) = self.try_to_say_on() {
            self.rest();
        }
    }

    fn try_to_say_on(&mut self) -> Result<(), Errno> {
        let Some(control) = &self.control else {
            self.orders.clear();
            self.unheard.clear();
            return Ok(());
        };
        while let Some((order, descriptors)) = self.orders.front() {
            let descriptors: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
            match fdpass::send(control.as_fd(), &order.encode(), &descriptors) {
                Err(errno) if is_full(errno) => return Err(errno),
                Ok(()) | Err(_) => drop(self.orders.pop_front()),
            }
        }
        while let Some(answer) = self.unheard.front() {
            match fdpass::send(control.as_fd(), &answer.encode(), &[]) {
                Ok(()) => drop(self.unheard.pop_front()),
                Err(errno) if is_full(errno) => return Err(errno),
                // Dying; its death is reported by SIGCHLD.
                Err(_) => self.unheard.clear(),
            }
        }
        Ok(())
    }

    /// Does what is due.
    pub fn advance(&mut self, now: Instant) {
        self.heard = 0;
        self.say_on();
        if self.state.deadline().is_none_or(|deadline| now < deadline) {
            return;
        }
        match self.state {
            State::Draining(_) => {
                log::warn!(
                    "worker {} (process {}) still has sessions after worker_shutdown_timeout: they are reset",
                    self.slot,
                    self.pid
                );
                self.stop(now);
            }
            State::Stopping(_) => {
                log::error!(
                    "worker {} (process {}) does not stop: it is killed",
                    self.slot,
                    self.pid
                );
                self.kill();
            }
            State::Starting | State::Serving | State::Killed => {}
        }
    }

    fn stop_by(&mut self, now: Instant) {
        if !matches!(self.state, State::Stopping(_) | State::Killed) {
            self.state = State::Stopping(now + STOP_PATIENCE);
        }
    }

    /// Gives an order, or keeps it until there is room to hear it: clients decide how many answers there are.
    fn say(&mut self, order: ToWorker, descriptors: &[BorrowedFd<'_>]) {
        let Some(control) = &self.control else { return };
        let sent = match self.orders.is_empty() {
            true => fdpass::send(control.as_fd(), &order.encode(), descriptors),
            false => Err(Errno::EAGAIN),
        };
        let error = match sent {
            Ok(()) => return,
            // Dying; its death is reported by SIGCHLD.
            Err(Errno::EPIPE | Errno::ECONNRESET) => return,
            Err(errno) if is_full(errno) => {
                let own = descriptors.iter().map(BorrowedFd::try_clone_to_owned);
                match own.collect::<Result<Vec<OwnedFd>, _>>() {
                    Ok(descriptors) => {
                        // Of logs the last ones count.
                        if matches!(order, ToWorker::Log(_)) {
                            self.orders
                                .retain(|(before, _)| !matches!(before, ToWorker::Log(_)));
                        }
                        return self.orders.push_back((order, descriptors));
                    }
                    Err(error) => error.to_string(),
                }
            }
            Err(errno) => errno.desc().to_owned(),
        };
        log::error!(
            "failed to tell worker {} (process {}) to {order:?}: {error}",
            self.slot,
            self.pid
        );
    }
}

/// Sees to it that closing a socket that a worker has sent does not hold up the master: with SO_LINGER set to a time,
/// whoever closes it last waits until its peer has everything, or for that long (inet_release, tcp_close).
pub fn never_wait(socket: &OwnedFd) {
    if let Ok(linger) = getsockopt(socket, sockopt::Linger)
        && linger.l_onoff != 0
        && linger.l_linger != 0
    {
        let at_once = libc::linger {
            l_linger: 0,
            ..linger
        };
        let _ = setsockopt(socket, sockopt::Linger, &at_once);
    }
}

/// Whether a control socket has no room for a message now; the loop waits until it has.
fn is_full(errno: Errno) -> bool {
    matches!(errno, Errno::EAGAIN | Errno::ENOBUFS | Errno::ENOMEM)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    fn worker() -> (Worker, OwnedFd, Instant) {
        let (born, theirs, now) = born();
        (Worker::new(born, now), theirs, now)
    }

    /// Of a worker whose process does not exist: the id is beyond what Linux gives out (PID_MAX_LIMIT).
    fn born() -> (Born, OwnedFd, Instant) {
        let (control, theirs) = fdpass::pair().unwrap();
        let now = Instant::now();
        let pid = Pid::from_raw((1 << 22) + 1);
        let born = Born {
            pid,
            slot: 0,
            row: 0,
            owner: Owner(1),
            generation: 1,
            stores: Vec::new(),
            access_logs: AccessLogs::default(),
            resolvers: Vec::new(),
            control: Some(control),
        };
        (born, theirs, now)
    }

    fn heard(theirs: &OwnedFd) -> Option<ToWorker> {
        fdpass::receive(theirs.as_fd())
            .ok()
            .and_then(|received| ToWorker::decode(&received.message))
    }

    #[test]
    fn a_worker_serves_once_it_says_that_it_is_ready() {
        let (mut worker, theirs, now) = worker();
        worker.hear(now);
        assert_eq!(worker.state(), State::Starting);
        fdpass::send(theirs.as_fd(), &ToMaster::Ready.encode(), &[]).unwrap();
        worker.hear(now);
        assert_eq!(worker.state(), State::Serving);
    }

    #[test]
    fn a_drain_that_takes_too_long_becomes_a_stop_and_then_a_kill() {
        let (mut worker, theirs, now) = worker();
        let limit = Duration::from_secs(60);
        worker.drain(Some(limit), now);
        assert_eq!(heard(&theirs), Some(ToWorker::Drain));
        worker.advance(now + limit - Duration::from_millis(1));
        assert_eq!(heard(&theirs), None);
        worker.advance(now + limit);
        assert_eq!(heard(&theirs), Some(ToWorker::Stop));
        assert_eq!(worker.state(), State::Stopping(now + limit + STOP_PATIENCE));
        worker.advance(now + limit + STOP_PATIENCE);
        assert_eq!(worker.state(), State::Killed);
    }

    #[test]
    fn a_drain_without_limit_waits_for_ever() {
        let (mut worker, theirs, now) = worker();
        worker.drain(None, now);
        assert_eq!(heard(&theirs), Some(ToWorker::Drain));
        assert_eq!(worker.state().deadline(), None);
        worker.advance(now + Duration::from_secs(1_000_000));
        assert_eq!(heard(&theirs), None);
    }

    #[test]
    fn answers_wait_for_a_worker_that_has_no_room_to_hear_them_and_are_bounded() {
        let (mut worker, theirs, now) = worker();
        let host = |n: usize| format!("h{n}.test");
        let most = 10 * UNHEARD_MAX;
        for n in 0..most {
            let question = Question {
                resolver: 0,
                host: host(n),
            };
            let why = String::new();
            worker.answer(question, Answer::Nothing { why, valid_ms: 0 });
        }
        assert_eq!(worker.unheard.len(), UNHEARD_MAX);
        assert!(worker.has_unheard());
        let mut heard_of = Vec::new();
        loop {
            match heard(&theirs) {
                Some(ToWorker::Answer(question, _)) => heard_of.push(question.host),
                _ if worker.has_unheard() => worker.advance(now),
                _ => break,
            }
        }
        assert!(
            (UNHEARD_MAX..most / 2).contains(&heard_of.len()),
            "{}",
            heard_of.len()
        );
        let expected: Vec<String> = (0..heard_of.len()).map(host).collect();
        assert_eq!(heard_of, expected);
    }

    #[test]
    fn an_order_that_finds_no_room_is_given_before_what_else_waits() {
        let (mut worker, theirs, now) = worker();
        for n in 0..10_000 {
            let host = format!("h{n}.test");
            let why = String::new();
            worker.answer(
                Question { resolver: 0, host },
                Answer::Nothing { why, valid_ms: 0 },
            );
        }
        let (reader, log) = nix::unistd::pipe().unwrap();
        worker.say(ToWorker::Log(None), &[reader.as_fd()]);
        worker.say(ToWorker::Log(None), &[log.as_fd()]);
        drop((reader, log));
        worker.hand_over(None, now);
        assert_eq!(worker.orders.len(), 2);
        let mut orders = Vec::new();
        let mut answers_between = 0;
        loop {
            match fdpass::receive(theirs.as_fd()) {
                Ok(received) => match ToWorker::decode(&received.message).unwrap() {
                    ToWorker::Answer(..) if orders.len() == 1 => answers_between += 1,
                    ToWorker::Answer(..) => {}
                    order => orders.push((order, received.descriptors.len())),
                },
                Err(_) if worker.has_unheard() => worker.advance(now),
                Err(_) => break,
            }
        }
        assert_eq!(orders, [(ToWorker::Log(None), 1), (ToWorker::HandOver, 0)]);
        assert_eq!(answers_between, 0);
    }

    #[test]
    fn a_worker_that_never_stops_talking_is_listened_to_in_turns() {
        for message in [&b"R"[..], b"?", b"F"] {
            let (mut worker, theirs, now) = worker();
            let mut sent = 0;
            while fdpass::send(theirs.as_fd(), message, &[]).is_ok() {
                sent += 1;
            }
            assert!(sent > MESSAGES_AT_ONCE);
            while worker.hear(now).is_some() {}
            assert_eq!(worker.heard, MESSAGES_AT_ONCE);
            assert!(fdpass::send(theirs.as_fd(), message, &[]).is_ok(), "{message:?}");
            worker.advance(now);
            assert_eq!(worker.heard, 0);
            let mut turns = 0;
            while worker.hear_on() || turns == 0 {
                while worker.hear(now).is_some() {}
                turns += 1;
            }
            assert_eq!(turns, 1 + (sent + 1 - MESSAGES_AT_ONCE) / MESSAGES_AT_ONCE);
        }
    }

    #[test]
    fn a_socket_whose_close_would_wait_for_its_peer_holds_up_nobody() {
        let (mut worker, theirs, now) = worker();
        let (socket, _peer) = testing::lingering();
        fdpass::send(theirs.as_fd(), &ToMaster::Ready.encode(), &[socket.as_fd()]).unwrap();
        drop(socket);
        worker.hear(now);
        assert!(now.elapsed() < testing::LINGER / 2, "{:?}", now.elapsed());
    }

    #[test]
    fn what_another_binary_may_have_had_no_room_to_say_is_said_again() {
        let now = Instant::now();
        for (state, order) in [
            (State::Serving, None),
            (State::Draining(None), Some(ToWorker::Drain)),
            (State::Stopping(now), Some(ToWorker::Stop)),
        ] {
            let (born, theirs, now) = born();
            let _worker = Worker::taken_over(born, state, order.is_some(), Queue::new(), now);
            assert_eq!(heard(&theirs), order);
        }
    }

    #[test]
    fn orders_are_given_once() {
        let (mut worker, theirs, now) = worker();
        worker.stop(now);
        assert_eq!(heard(&theirs), Some(ToWorker::Stop));
        worker.stop(now + Duration::from_secs(3));
        worker.drain(None, now);
        assert_eq!(heard(&theirs), None);
        assert_eq!(worker.state(), State::Stopping(now + STOP_PATIENCE));
    }

    #[test]
    fn a_worker_that_cannot_be_steered_any_more_is_brought_to_an_end() {
        let (mut worker, theirs, now) = worker();
        drop(theirs);
        worker.hear(now);
        assert!(worker.control().is_none());
        assert_eq!(worker.state(), State::Stopping(now + STOP_PATIENCE));
        worker.advance(now + STOP_PATIENCE);
        assert_eq!(worker.state(), State::Killed);
        assert!(
            !worker.is_leaving(),
            "nobody asked for its end, so it is to be replaced"
        );
    }

    #[test]
    fn a_draining_worker_that_closes_its_socket_is_leaving_as_it_should() {
        let (mut worker, theirs, now) = worker();
        worker.drain(None, now);
        drop(theirs);
        worker.hear(now);
        assert!(worker.is_leaving());
        assert_eq!(worker.state().deadline(), Some(now + STOP_PATIENCE));
    }
}
