//! One worker process as the master sees it: what it holds, how far it has got, and until when it has time. What goes
//! over its control socket is heard in `hearing` and told in `telling`.

mod hearing;
mod telling;

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use culvert_shared::config::Resolver;
use culvert_shared::ids::Owner;
use culvert_shared::message::ToWorker;
use culvert_worker::Store;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::access_log::AccessLogs;
use crate::keeper::Queue;

pub use hearing::never_wait;

/// How long a worker may take until it says that it is ready, whatever it is told meanwhile: it has little to do before that,
/// and until then nobody serves its slot and the sessions that wait for it. A reload gives its workers up sooner.
const START_PATIENCE: Duration = Duration::from_secs(30);

/// How long a worker has to obey [`ToWorker::Stop`]: it only resets what is open.
const STOP_PATIENCE: Duration = Duration::from_secs(5);

/// How far a worker has got.
///
/// ```text
/// Starting ──Ready──▶ Serving ──Drain──▶ Draining ──time is up──▶ Stopping ──time is up──▶ Killed
///     │                  │                  │                        ▲
///     └──────────────────┴──────────────────┴──Stop, or its control socket closes
/// ```
/// From each of them a worker may die; reaping it is what removes it. And in each of them it is killed when it does not say in
/// time that it is ready: it may be told to drain before it has.
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
    fn deadline(self) -> Option<Instant> {
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
    /// The host had no room for a message: until when none is tried. Its socket says nothing of that.
    rest_until: Option<Instant>,
    /// Sessions that it is to adopt and was not yet told of.
    pub to_adopt: Queue,
    /// When it was forked.
    pub started: Instant,
    /// Messages of this turn.
    heard: usize,
    /// It has said that it is ready.
    was_ready: bool,
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
            was_ready: false,
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
            // Of one that was told something before it was ready that is not known any more.
            was_ready: state != State::Starting,
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

    /// When something is to be done if nothing happens before.
    pub fn deadline(&self) -> Option<Instant> {
        self.state.deadline().into_iter().chain(self.ready_by()).min()
    }

    /// When it is killed if it has not said that it is ready.
    fn ready_by(&self) -> Option<Instant> {
        let is_waited_for = !self.was_ready && self.state != State::Killed;
        is_waited_for.then(|| self.started + START_PATIENCE)
    }

    /// How long it has lived; no time if it has never been ready.
    pub fn lived(&self, now: Instant) -> Duration {
        match self.was_ready {
            true => now.saturating_duration_since(self.started),
            false => Duration::ZERO,
        }
    }

    /// Whether it was told to leave: its end is no accident then.
    pub fn is_leaving(&self) -> bool {
        self.leaving
    }

    /// Whether it was started only to take over sessions that no slot's worker cares for, and still takes some.
    pub fn is_carer(&self) -> bool {
        self.leaving && matches!(self.state, State::Starting | State::Serving)
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

    /// Does what is due.
    pub fn advance(&mut self, now: Instant) {
        self.heard = 0;
        self.say_on();
        if self.ready_by().is_some_and(|ready_by| ready_by <= now) {
            log::error!(
                "worker {} (process {}) was not ready within {START_PATIENCE:?}: it is killed",
                self.slot,
                self.pid
            );
            return self.kill();
        }
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
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use culvert_shared::message::ToMaster;
    use culvert_shared::sys::fdpass;

    use super::*;

    pub(super) fn worker() -> (Worker, OwnedFd, Instant) {
        let (born, theirs, now) = born();
        (Worker::new(born, now), theirs, now)
    }

    fn serving() -> (Worker, OwnedFd, Instant) {
        let (mut worker, theirs, now) = worker();
        fdpass::send(theirs.as_fd(), &ToMaster::Ready.encode(), &[]).unwrap();
        worker.hear(now);
        (worker, theirs, now)
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

    pub(super) fn heard(theirs: &OwnedFd) -> Option<ToWorker> {
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
    fn a_worker_that_is_not_ready_in_time_is_killed_whatever_it_was_told() {
        type Told = fn(&mut Worker, Instant);
        let told: [Told; 3] = [
            |_, _| {},
            |worker, now| worker.drain(None, now),
            |worker, now| worker.hand_over(None, now),
        ];
        for (tell, is_ready) in told.iter().flat_map(|tell| [(tell, false), (tell, true)]) {
            let (mut worker, theirs, now) = worker();
            tell(&mut worker, now);
            if is_ready {
                fdpass::send(theirs.as_fd(), &ToMaster::Ready.encode(), &[]).unwrap();
                worker.hear(now);
            }
            assert_eq!(worker.deadline().is_none(), is_ready);
            worker.advance(now + START_PATIENCE - Duration::from_millis(1));
            assert_ne!(worker.state(), State::Killed);
            worker.advance(now + START_PATIENCE);
            assert_eq!(worker.state() == State::Killed, !is_ready);
            assert_eq!(worker.deadline(), None);
            assert_eq!(worker.lived(now + START_PATIENCE).is_zero(), !is_ready);
        }
    }

    #[test]
    fn a_drain_that_takes_too_long_becomes_a_stop_and_then_a_kill() {
        let (mut worker, theirs, now) = serving();
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
        let (mut worker, theirs, now) = serving();
        worker.drain(None, now);
        assert_eq!(heard(&theirs), Some(ToWorker::Drain));
        assert_eq!(worker.state().deadline(), None);
        worker.advance(now + Duration::from_secs(1_000_000));
        assert_eq!(heard(&theirs), None);
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
