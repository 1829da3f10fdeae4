//! A new generation takes over from the old. All or nothing: until every new worker has said that it is
//! ready, the old ones serve as if nothing had happened.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Result, ensure};
use culvert_shared::config;
use culvert_shared::counters::Board;
use culvert_shared::logging;
use culvert_worker::Store;

use crate::access_log::Files;
use crate::building::{Building, Built, Step};
use crate::error_log::ErrorLog;
use crate::generation::Generation;
use crate::names::FIRST_ANSWERS;
use crate::pidfile::PidFile;
use crate::spawn::{Blueprint, Post, spawn};
use crate::supervise::{Master, Phase, SlotCare};
use crate::tune;
use crate::worker::{State, Worker};

/// How long new workers may take until they accept; they have little to do before that.
const READY_PATIENCE: Duration = Duration::from_secs(10);

/// A generation whose workers were forked and are not all ready yet.
pub struct Pending {
    /// The generation.
    pub generation: Generation,
    /// When it is given up.
    pub deadline: Instant,
    /// Until when its names are waited for.
    names_until: Instant,
    log: ErrorLog,
    pid_file: Option<PidFile>,
}

impl Pending {
    /// Opens its logs anew; says its number, and the error log that its workers write to.
    pub fn reopen_logs(&mut self, files: &mut Files) -> (u64, &ErrorLog) {
        self.generation.access_logs.reopen(files);
        match ErrorLog::open(&self.generation.config.error_log) {
            Ok(log) => self.log = log,
            Err(error) => log::error!("failed to open the next log anew, the old one goes on: {error:#}"),
        }
        (self.generation.number, &self.log)
    }

    /// Until when the switch-over waits for first answers about names; `None`: it does not any more.
    pub fn waits_for_names(&self, now: Instant) -> Option<Instant> {
        (now < self.names_until).then_some(self.names_until)
    }
}

impl Master {
    /// Whether another generation is being built, or starts.
    pub fn is_reloading(&self) -> bool {
        self.building.is_some() || self.pending.is_some()
    }

    /// Loads the configuration again, and begins to build a generation of it.
    pub fn begin_reload(&mut self, now: Instant) {
        if self.is_reloading() {
            self.reload_again = true;
            return;
        }
        log::info!("reloading {}", self.args.config.display());
        let config = match config::load(&self.args.config, &self.args.set) {
            Ok(config) => config,
            Err(diagnostics) => {
                for diagnostic in &diagnostics {
                    log::error!("{diagnostic}");
                }
                return self.count_refused(&format!(
                    "the configuration has errors ({} above)",
                    diagnostics.len()
                ));
            }
        };
        match Building::begin(config, now) {
            Ok(building) => self.building = Some(building),
            Err(error) => self.count_refused(&format!("{error:#}")),
        }
    }

    /// Makes the next piece of a generation that is being built, if it is due. When all are there, its workers start.
    pub fn build(&mut self, now: Instant) {
        let Some(building) = self.building.take_if(|building| building.due() <= now) else {
            return;
        };
        let done = building.step(&self.current, &mut self.kernel, now);
        let pending = done.and_then(|step| match step {
            Step::More(building) => {
                self.building = Some(building);
                Ok(None)
            }
            Step::Done(built) => self.prepare(built).map(Some),
        });
        match pending {
            Ok(None) => {}
            Ok(pending) => {
                self.pending = pending;
                self.want_names(now);
                self.publish_names(now);
                self.start_pending_workers(now);
            }
            Err(error) => self.count_refused(&format!("{error:#}")),
        }
    }

    fn prepare(&mut self, built: Built) -> Result<Pending> {
        let config = &built.config;
        let log = ErrorLog::open(&config.error_log)?;
        let pid_file = match self.pid_file.path() == config.pid {
            true => None,
            false => Some(PidFile::acquire(&config.pid)?),
        };
        let wanted = config.worker_cpus.len();
        let free = self.free_rows().count();
        ensure!(
            wanted <= free,
            "{} worker processes are alive, there is room for {free} more and {wanted} are needed: wait until old \
             ones have drained, or set worker_shutdown_timeout",
            self.workers.len()
        );
        let filling: Vec<Arc<Store>> = self
            .workers
            .iter()
            .filter_map(|worker| worker.stores.first().cloned())
            .chain(self.keeper.stores().into_iter().cloned())
            .collect();
        let begun = built.begun;
        let generation = self.current.next(built, &filling, &self.kernel)?;
        log::info!(
            "generation {} was built in {} ms, its workers start",
            generation.number,
            begun.elapsed().as_millis()
        );
        Ok(Pending {
            generation,
            deadline: Instant::now() + READY_PATIENCE,
            names_until: Instant::now() + FIRST_ANSWERS,
            log,
            pid_file,
        })
    }

    fn start_pending_workers(&mut self, now: Instant) {
        let slots = self
            .pending
            .as_ref()
            .map_or(0, |pending| pending.generation.slots());
        for slot in 0..slots {
            let owner = self.next_owner();
            let totals = self.kernel.totals();
            let Some(pending) = &self.pending else { return };
            let generation = &pending.generation;
            let blueprint = Blueprint {
                generation,
                slot,
                row: self.free_rows().next(),
                post: Post::Slot,
                owner,
                board: &self.board,
                totals,
                log: &pending.log,
            };
            match spawn(blueprint) {
                Ok(worker) => self.workers.push(worker),
                Err(error) => {
                    return self.refuse_reload(&format!("failed to start worker {slot}: {error:#}"), now);
                }
            }
        }
    }

    /// Begins the reload that was asked for during another one.
    pub fn reload_again(&mut self, now: Instant) {
        if !self.is_reloading() && std::mem::take(&mut self.reload_again) && !self.is_ending() {
            self.begin_reload(now);
        }
    }

    /// Switches over when all new workers are ready, gives up when they take too long.
    pub fn advance_reload(&mut self, now: Instant) {
        let Some(pending) = &self.pending else { return };
        let number = pending.generation.number;
        let ready = |worker: &&Worker| worker.generation == number && worker.state() == State::Serving;
        let names = pending.waits_for_names(now).is_none() || self.names.are_heard();
        if names && self.workers.iter().filter(ready).count() == pending.generation.slots() {
            self.finish_reload(now);
        } else if pending.deadline <= now {
            self.refuse_reload(
                &format!("its workers were not ready within {READY_PATIENCE:?}"),
                now,
            );
        }
    }

    fn finish_reload(&mut self, now: Instant) {
        let Some(Pending {
            generation,
            log,
            pid_file,
            ..
        }) = self.pending.take()
        else {
            return;
        };
        let (number, limit) = (generation.number, generation.config.worker_shutdown_timeout);
        match log.install() {
            Ok(_) => {
                self.log = log;
                logging::set_level(generation.config.error_log.level);
                for worker in self
                    .workers
                    .iter_mut()
                    .filter(|worker| worker.generation != number || worker.is_leaving())
                {
                    worker.write_log_to(&self.log);
                }
            }
            Err(error) => log::error!("the new error log is not used: {error:#}"),
        }
        if let Some(pid_file) = pid_file {
            self.pid_file = pid_file;
        }
        // What only the old generation had is closed before its workers are told: they take what waits
        // in a socket, then close theirs, and with it the address is free or refuses at once.
        self.current = generation;
        self.board[0].kept_limit.store(self.current.keeper_room, Relaxed);
        (self.current.stores).limit_totals(self.current.config.worker_backlog_size);
        self.keeper.allow(self.current.keeper_room);
        if let Err(error) = self.current.listeners.apply(&self.current.config) {
            log::warn!("a listener keeps its old settings: {error:#}");
        }
        tune::report(&self.current.config);
        self.steering.apply(&self.current.config);
        self.slots = vec![SlotCare::default(); self.current.slots()];
        self.phase = Phase::Serving;
        self.want_names(now);
        // Removed slots get nothing new from here on, so that their workers can empty them.
        self.steer();
        self.say_which_listeners_are_gone();
        // A refused generation had the same number.
        for worker in self
            .workers
            .iter_mut()
            .filter(|worker| worker.generation != number || worker.is_leaving())
        {
            worker.hand_over(limit, now);
        }
        self.check_care();
        self.forget_checks();
        self.board[0].generation.store(number, Relaxed);
        Board::add(&self.board[0].reloads_succeeded, 1);
        self.board[0].last_reload_failed.store(0, Relaxed);
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let unix_ms = now.map_or(0, |now| now.as_millis() as u64);
        self.board[0].last_reload_unix_ms.store(unix_ms, Relaxed);
        log::info!("generation {number} serves with {} workers", self.current.slots());
    }

    /// Before old workers hand their sessions over.
    fn say_which_listeners_are_gone(&self) {
        let there: HashSet<usize> = self
            .current
            .assigned
            .listeners
            .iter()
            .flatten()
            .copied()
            .collect();
        for row in self.current.rows.listeners() {
            let gone = u32::from(!there.contains(&row));
            self.board[0].listeners[row].gone.store(gone, Relaxed);
        }
    }

    /// A peer that is not checked any more is not down for what checks found.
    fn forget_checks(&self) {
        let upstreams = self.current.config.upstreams.iter();
        let mut checked = HashSet::new();
        for (upstream, rows) in upstreams.zip(&self.current.assigned.peers) {
            if upstream.check.is_some() {
                let written = upstream.peers.iter().zip(rows);
                checked.extend(written.filter(|(peer, _)| !peer.down).map(|(_, row)| *row));
                checked.extend(self.current.rows.found_of(&upstream.name).map(|(_, row)| row));
            }
        }
        self.board[0].forget_checks(|row| checked.contains(&row));
    }

    /// Gives the new generation up; the old one goes on.
    pub fn refuse_reload(&mut self, why: &str, now: Instant) {
        let Some(pending) = self.pending.take() else {
            return;
        };
        let number = pending.generation.number;
        let limit = self.current.config.worker_shutdown_timeout;
        // Sessions that its workers have taken go on under its rows, so nobody else may be given these.
        self.current.rows = pending.generation.rows;
        // One may have said in this very turn that it is ready, and serve since.
        self.hear_all(now);
        for worker in self
            .workers
            .iter_mut()
            .filter(|worker| worker.generation == number && !worker.is_leaving())
        {
            let own = worker.stores.first().map(|own| own.id);
            match worker.state() {
                // It may have taken connections already, from sockets that both generations have.
                State::Serving if own.is_some_and(|own| self.current.stores.has(own)) => {
                    worker.hand_over(limit, now);
                }
                // Nobody else has its store, before another reload.
                State::Serving => worker.drain(limit, now),
                _ => worker.stop(now),
            }
        }
        self.count_refused(why);
        self.go_back_to_names(now);
    }

    /// The generation that goes on has not heard what was answered meanwhile.
    fn go_back_to_names(&mut self, now: Instant) {
        self.want_names(now);
        self.publish_names(now);
    }

    /// Forgets a reload because the program does something else now; its workers are told by the caller.
    pub fn abandon_reload(&mut self) {
        self.reload_again = false;
        let built = self.building.take().is_some();
        let pending = self.pending.take();
        let has_begun = pending.is_some() || built;
        if let Some(pending) = pending {
            self.current.rows = pending.generation.rows;
        }
        if has_begun {
            self.count_refused("the program was told to stop or to pause meanwhile");
            if !self.is_ending() {
                self.go_back_to_names(Instant::now());
            }
        }
    }

    fn count_refused(&self, why: &str) {
        Board::add(&self.board[0].reloads_failed, 1);
        self.board[0].last_reload_failed.store(1, Relaxed);
        log::error!(
            "reload refused, generation {} goes on: {why}",
            self.current.number
        );
    }
}
