//! The master's loop: signals, what workers say, their deaths, and what falls due. Everything happens
//! here, in one thread; nothing in it blocks but the one poll.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use culvert_shared::counters::Board;
use culvert_shared::ids::Owner;
use culvert_shared::logging;
use culvert_shared::sys::shm::Shared;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::signalfd::SignalFd;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

use crate::access_log::Files;
use crate::args::Args;
use crate::backoff::Backoff;
use crate::building::Building;
use crate::error_log::ErrorLog;
use crate::generation::Generation;
use crate::keeper::Keeper;
use crate::kernel::Kernel;
use crate::listen::Listeners;
use crate::names::Names;
use crate::notify::Notifier;
use crate::pidfile::PidFile;
use crate::reload::Pending;
use crate::spawn::{Blueprint, Post, spawn};
use crate::steering::Steering;
use crate::upgrade::Upgrade;
use crate::worker::{State, Worker};

/// The longest sleep, well within what poll(2) can count.
const LONGEST_SLEEP: Duration = Duration::from_secs(3600);

/// How long the master sleeps where it cannot wait for events.
const WAIT_RETRY: Duration = Duration::from_millis(20);

/// What the program as a whole is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Each slot has a worker, or is about to get one.
    Serving,
    /// After WINCH: workers drain, connections wait in the listening sockets.
    Paused,
    /// After QUIT: workers finish their sessions, then the program ends.
    Quitting,
    /// After TERM or INT: workers stop, then the program ends.
    Stopping,
}

/// What the master knows of a slot besides its worker.
#[derive(Clone, Debug, Default)]
pub struct SlotCare {
    backoff: Backoff,
    /// When its dead worker is to be replaced.
    pub replace_at: Option<Instant>,
}

impl SlotCare {
    /// Of a slot whose worker is to be replaced then.
    pub fn due(replace_at: Option<Instant>) -> SlotCare {
        SlotCare {
            replace_at,
            ..SlotCare::default()
        }
    }
}

/// What the master has to do with beside its workers, from the start to its end.
pub struct Outside {
    /// As in [`Master`].
    pub log: ErrorLog,
    /// As in [`Master`].
    pub pid_file: PidFile,
    /// As in [`Master`].
    pub steering: Steering,
    /// As in [`Master`].
    pub upgrade: Upgrade,
}

/// The running master.
pub struct Master {
    /// The command line, for loading the configuration again.
    pub args: Args,
    /// The generation that serves.
    pub current: Generation,
    /// A generation that is being built.
    pub building: Option<Building>,
    /// The generation that is about to take over.
    pub pending: Option<Pending>,
    /// Another reload was asked for meanwhile.
    pub reload_again: bool,
    /// What the slots' BPF maps and the accept programs have in common.
    pub kernel: Kernel,
    /// The board.
    pub board: Arc<Shared<Board>>,
    /// Every worker process that was not yet reaped, of whatever generation.
    pub workers: Vec<Worker>,
    /// One for each slot of the current generation.
    pub slots: Vec<SlotCare>,
    /// Where the log goes.
    pub log: ErrorLog,
    /// The sessions that outlive their workers.
    pub keeper: Keeper,
    /// What is changed on the host; before the pid file, so that it is put back before another may start.
    pub steering: Steering,
    /// What names stand for.
    pub names: Names,
    /// The pid file.
    pub pid_file: PidFile,
    /// What the program is doing.
    pub phase: Phase,
    /// The service manager, if there is one.
    pub notifier: Notifier,
    /// How it becomes another binary.
    pub upgrade: Upgrade,
    /// The newest mark of a worker.
    pub last_owner: u32,
    /// From when on a worker may be started for sessions that nobody cares for.
    pub care_from: Instant,
    /// After QUIT: until when sessions may take to end, if that is limited.
    pub quit_by: Option<Instant>,
    /// Some worker has accepted connections.
    pub has_served: bool,
    failure: Option<anyhow::Error>,
}

impl Master {
    /// A master without workers yet.
    pub fn new(
        args: Args,
        current: Generation,
        kernel: Kernel,
        board: Arc<Shared<Board>>,
        outside: Outside,
    ) -> Master {
        let Outside {
            log,
            pid_file,
            steering,
            upgrade,
        } = outside;
        let slots = vec![SlotCare::default(); current.slots()];
        let counted = Arc::clone(&board);
        logging::on_drop(move |lines| Board::add(&counted[0].log_lines_dropped, lines));
        Master {
            args,
            current,
            building: None,
            pending: None,
            reload_again: false,
            kernel,
            board,
            workers: Vec::new(),
            slots,
            log,
            keeper: Keeper::default(),
            names: Names::default(),
            pid_file,
            steering,
            phase: Phase::Serving,
            notifier: Notifier::from_environment(),
            upgrade,
            last_owner: 0,
            care_from: Instant::now(),
            quit_by: None,
            has_served: false,
            failure: None,
        }
    }

    /// Serves until told to stop.
    ///
    /// # Errors
    /// The first workers could not be started, or the loop itself fails.
    pub fn run(mut self, signals: &SignalFd) -> Result<()> {
        let now = Instant::now();
        self.keeper.allow(self.current.keeper_room);
        match self.has_served {
            true => self.go_on(now),
            false => self.fill_all_slots(now),
        }
        while !(self.is_ending() && self.workers.is_empty() && self.uncared().is_empty()) {
            self.wait(signals);
            let now = Instant::now();
            self.hear_all(now);
            self.look_after_sessions();
            self.look_up(now);
            while let Some(info) = signals.read_signal().context("failed to read a signal")? {
                let from_kernel = info.ssi_code == nix::libc::SI_KERNEL;
                if let Ok(signal) = Signal::try_from(info.ssi_signo as i32) {
                    self.handle(signal, from_kernel, now);
                }
            }
            self.advance(now);
            self.tell_service_manager(now);
        }
        match self.failure.take() {
            Some(failure) => Err(failure),
            None => {
                log::info!("stopped");
                Ok(())
            }
        }
    }

    /// After an exec: workers of this binary take over from those of the one before.
    fn go_on(&mut self, now: Instant) {
        self.reap(now);
        // Should that reload be refused, its own workers have to know of peers, too.
        self.want_names(now);
        if self.phase == Phase::Serving {
            self.begin_reload(now);
        }
    }

    /// Whether the program is on its way out.
    pub fn is_ending(&self) -> bool {
        matches!(self.phase, Phase::Quitting | Phase::Stopping)
    }

    /// A mark that no worker has had yet.
    pub fn next_owner(&mut self) -> Owner {
        self.last_owner = self.last_owner.checked_add(1).unwrap_or(1);
        Owner(self.last_owner)
    }

    fn wait(&self, signals: &SignalFd) {
        let now = Instant::now();
        let mut sources = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        sources.extend(self.workers.iter().filter_map(|worker| {
            let wanted = match worker.waits_for_room(now) {
                false => PollFlags::POLLIN,
                true => PollFlags::POLLIN | PollFlags::POLLOUT,
            };
            worker.control().map(|fd| PollFd::new(fd, wanted))
        }));
        sources.extend(self.names.sources());
        let deadlines = self.workers.iter().filter_map(Worker::deadline);
        let replacements = self.slots.iter().filter_map(|slot| slot.replace_at);
        let carers = Some(self.care_from).filter(|_| !self.uncared().is_empty());
        let building = self.building.iter().map(Building::due);
        let rests = self.workers.iter().filter_map(|worker| worker.rest_until(now));
        let pending = self.pending.iter().map(|pending| pending.deadline);
        let sleep = deadlines
            .chain(replacements)
            .chain(carers)
            .chain(rests)
            .chain(building)
            .chain(pending)
            .chain(
                self.pending
                    .iter()
                    .flat_map(|pending| pending.waits_for_names(now)),
            )
            .chain(self.notifier.deadline())
            .chain(self.upgrade.deadline())
            .chain(self.names.deadline())
            .min()
            // One more millisecond: poll counts whole ones, and waking early would mean spinning.
            .map_or(LONGEST_SLEEP, |at| {
                at.saturating_duration_since(now) + Duration::from_millis(1)
            })
            .min(LONGEST_SLEEP);
        let timeout = PollTimeout::try_from(sleep).unwrap_or(PollTimeout::MAX);
        match poll(&mut sources, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            // The kernel has no memory, or this process may have fewer descriptors than it waits for. What there is is heard
            // all the same.
            Err(_) => std::thread::sleep(WAIT_RETRY),
        }
    }

    fn handle(&mut self, signal: Signal, from_kernel: bool, now: Instant) {
        match signal {
            Signal::SIGCHLD => self.reap(now),
            Signal::SIGTERM | Signal::SIGINT if self.phase == Phase::Stopping => {
                log::warn!("{signal} again: workers are killed");
                self.workers.iter_mut().for_each(Worker::kill);
            }
            Signal::SIGTERM | Signal::SIGINT => {
                log::info!("{signal}: stopping");
                self.stop(now);
            }
            Signal::SIGQUIT => self.quit(now),
            Signal::SIGHUP if self.is_ending() => log::warn!("reload ignored: the program is stopping"),
            Signal::SIGHUP => self.begin_reload(now),
            Signal::SIGUSR1 => self.reopen_logs(),
            Signal::SIGUSR2 => self.begin_upgrade(now),
            // A terminal sends it whenever its window is resized, which is nobody's wish to pause.
            Signal::SIGWINCH if !from_kernel => self.pause(now),
            _ => {}
        }
    }

    /// Does what is due.
    fn advance(&mut self, now: Instant) {
        for worker in &mut self.workers {
            worker.advance(now);
        }
        if !self.has_served && self.workers.iter().any(|worker| worker.state() == State::Serving) {
            self.has_served = true;
        }
        self.advance_reload(now);
        for slot in 0..self.slots.len() {
            if self.slots[slot].replace_at.is_some_and(|at| at <= now) {
                self.slots[slot].replace_at = None;
                self.fill_slot(slot, now);
            }
        }
        self.send_carers(now);
        self.drain_carers(now);
        // What takes its time comes after the worker that somebody may wait for.
        self.build(now);
        self.reload_again(now);
        self.advance_upgrade(now);
        self.steer();
        // Sessions that a death or a switch-over has left to somebody.
        self.look_after_sessions();
    }

    /// Gives each slot a worker.
    fn fill_all_slots(&mut self, now: Instant) {
        for slot in 0..self.slots.len() {
            self.fill_slot(slot, now);
        }
    }

    fn fill_slot(&mut self, slot: usize, now: Instant) {
        let owner = self.next_owner();
        let totals = self.kernel.totals();
        let blueprint = Blueprint {
            generation: &self.current,
            slot,
            row: self.free_rows().next(),
            post: Post::Slot,
            owner,
            board: &self.board,
            totals,
            log: &self.log,
        };
        match spawn(blueprint) {
            Ok(worker) => {
                log::info!("worker {slot} started, process {}", worker.pid);
                self.workers.push(worker);
            }
            Err(error) => {
                let wait = self.replace_later(slot, Duration::ZERO, now);
                log::error!("failed to start worker {slot}, trying again in {wait:?}: {error:#}");
            }
        }
    }

    fn replace_later(&mut self, slot: usize, lived: Duration, now: Instant) -> Duration {
        let care = &mut self.slots[slot];
        let wait = care.backoff.died_after(lived);
        care.replace_at = Some(now + wait);
        wait
    }

    fn reap(&mut self, now: Instant) {
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return,
                Ok(status) => {
                    if let Some(pid) = status.pid() {
                        self.bury(pid, status, now);
                    }
                }
                Err(Errno::EINTR) => {}
                Err(error) => return log::error!("failed to wait for workers: {error}"),
            }
        }
    }

    fn bury(&mut self, pid: Pid, status: WaitStatus, now: Instant) {
        let Some(at) = self.workers.iter().position(|worker| worker.pid == pid) else {
            return self.upgrade.note_end(pid, status);
        };
        // What it said before it died counts.
        self.hear_out(at, now);
        self.look_after_sessions();
        let worker = self.workers.swap_remove(at);
        self.names.hosts.forget(worker.owner);
        self.bury_sessions(&worker);
        self.board[0].clear_worker(worker.row, now_ms());
        self.check_care();
        let (slot, how) = (worker.slot, ending(status));
        if worker.is_leaving() {
            return log::info!("worker {slot} (process {pid}) is gone: {how}");
        }
        if worker.generation != self.current.number {
            return self.refuse_reload(
                &format!("its worker {slot} (process {pid}) {how} before it was ready"),
                now,
            );
        }
        if !self.has_served && matches!(status, WaitStatus::Exited(..)) {
            let failure = anyhow!("worker {slot} {how} before it was ready: the log says why");
            self.failure.get_or_insert(failure);
            return self.stop(now);
        }
        Board::add(&self.board[0].worker_restarts, 1);
        let wait = self.replace_later(slot, worker.lived(now), now);
        if wait.is_zero() {
            log::error!("worker {slot} (process {pid}) {how}: it is replaced");
        } else {
            log::error!("worker {slot} (process {pid}) {how}: it keeps dying, and is replaced in {wait:?}");
            self.rescue(slot);
        }
    }

    fn stop(&mut self, now: Instant) {
        self.end(Phase::Stopping);
        self.workers.iter_mut().for_each(|worker| worker.stop(now));
    }

    fn quit(&mut self, now: Instant) {
        if self.is_ending() {
            return;
        }
        let limit = self.current.config.worker_shutdown_timeout;
        log::info!("SIGQUIT: finishing {} sessions", self.open_sessions());
        self.quit_by = limit.map(|limit| now + limit);
        self.end(Phase::Quitting);
        self.workers
            .iter_mut()
            .for_each(|worker| worker.drain(limit, now));
    }

    fn end(&mut self, phase: Phase) {
        self.phase = phase;
        self.names.stop();
        self.abandon_reload();
        self.upgrade.abandon();
        self.slots.iter_mut().for_each(|slot| slot.replace_at = None);
        // While the master held them, new connections would wait in them for nobody.
        self.current.listeners = Listeners::default();
    }

    fn pause(&mut self, now: Instant) {
        if self.is_ending() || (self.phase == Phase::Paused && !self.is_reloading()) {
            return;
        }
        log::info!("SIGWINCH: workers drain, connections wait until SIGHUP");
        self.phase = Phase::Paused;
        self.abandon_reload();
        self.slots.iter_mut().for_each(|slot| slot.replace_at = None);
        let limit = self.current.config.worker_shutdown_timeout;
        self.workers
            .iter_mut()
            .for_each(|worker| worker.drain(limit, now));
    }

    fn reopen_logs(&mut self) {
        let mut files = Files::default();
        self.current.access_logs.reopen(&mut files);
        for worker in &mut self.workers {
            worker.access_logs.reopen(&mut files);
        }
        let next = self
            .pending
            .as_mut()
            .map(|pending| pending.reopen_logs(&mut files));
        let opened = ErrorLog::open(&self.current.config.error_log).and_then(|log| {
            log.install()?;
            Ok(log)
        });
        match opened {
            Ok(log) => {
                self.log = log;
                log::info!("SIGUSR1: the logs were opened anew");
            }
            Err(error) => log::error!("failed to open the log anew, the old one goes on: {error:#}"),
        }
        for worker in &mut self.workers {
            let of_next =
                next.filter(|(generation, _)| *generation == worker.generation && !worker.is_leaving());
            worker.write_logs_to(of_next.map_or(&self.log, |(_, log)| log));
        }
    }

    fn open_sessions(&self) -> u64 {
        self.board[0]
            .live_workers()
            .map(|(_, row)| u64::from(row.sessions.load(Relaxed)))
            .sum()
    }
}

/// The clock that workers read.
pub fn now_ms() -> u64 {
    // CLOCK_MONOTONIC exists on every Linux.
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |time| Duration::from(time).as_millis() as u64)
}

/// How a process ended, in words.
pub fn ending(status: WaitStatus) -> String {
    match status {
        WaitStatus::Exited(_, status) => format!("exited with status {status}"),
        WaitStatus::Signaled(_, Signal::SIGSYS, _) => {
            "was killed for a system call that no worker makes (the kernel's log says which)".to_owned()
        }
        WaitStatus::Signaled(_, signal, core) => {
            format!(
                "was killed by {signal}{}",
                if core { ", core dumped" } else { "" }
            )
        }
        other => format!("ended ({other:?})"),
    }
}
