//! Sees to it that every session that is kept has a worker that cares for it, or gets one. Most often that is the worker
//! of its slot, or the one that replaces it. A store that no slot has any more, that of a worker whose generation was
//! refused, and every store while the program is paused or quits, get a worker of their own when the last one dies, or
//! leaves: it takes no connections, adopts what is there, and drains.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use culvert_shared::message::SessionId;
use culvert_worker::Store;

use crate::spawn::{Blueprint, Post, spawn};
use crate::supervise::{Master, Phase};
use crate::worker::{State, Worker};

/// How long no such worker is started after another, so that one that cannot live does not keep the master busy.
const REST: Duration = Duration::from_secs(1);

impl Master {
    /// The stores of sessions that no worker cares for and none will.
    pub fn uncared(&self) -> Vec<Arc<Store>> {
        let is_late = self.quit_by.is_some_and(|by| by <= Instant::now());
        match self.phase == Phase::Stopping || is_late {
            true => Vec::new(),
            false => self.keeper.unheld_stores(|store| !self.is_awaited(store)),
        }
    }

    /// Whether somebody has this store, or will, who adopts.
    fn is_awaited(&self, store: u32) -> bool {
        let has = |worker: &Worker| worker.stores.iter().any(|own| own.id == store);
        // The next generation cares for the stores of all kept sessions.
        self.is_reloading()
            || (self.phase == Phase::Serving && self.current.stores.has(store))
            || self.workers.iter().any(|worker| worker.is_carer() && has(worker))
    }

    /// Starts workers for what nobody cares for.
    pub fn send_carers(&mut self, now: Instant) {
        let stores = self.uncared();
        if stores.is_empty() || now < self.care_from {
            return;
        }
        self.care_from = now + REST;
        for store in stores {
            let id = store.id;
            let slot = id as usize % self.current.slots();
            let owner = self.next_owner();
            let blueprint = Blueprint {
                generation: &self.current,
                slot,
                row: self.free_rows().next(),
                post: Post::Carer(store),
                owner,
                board: &self.board,
                totals: self.kernel.totals(),
                log: &self.log,
            };
            match spawn(blueprint) {
                Ok(worker) => {
                    log::info!(
                        "process {} cares for sessions of store {id}, which no slot has",
                        worker.pid
                    );
                    self.workers.push(worker);
                }
                Err(error) => log::error!("sessions of store {id} wait for a worker: {error:#}"),
            }
        }
    }

    /// Carers that have been given what there was take nothing more.
    pub fn drain_carers(&mut self, now: Instant) {
        let limit = match self.quit_by {
            Some(by) => Some(by.saturating_duration_since(now)),
            None => self.current.config.worker_shutdown_timeout,
        };
        for worker in &mut self.workers {
            if worker.is_carer() && worker.state() == State::Serving && worker.to_adopt.is_empty() {
                worker.drain(limit, now);
            }
        }
    }

    /// In debug builds: each kept session is held by a worker that is not reaped yet and has its store, or waits for one.
    pub fn check_care(&self) {
        if cfg!(debug_assertions) {
            let unheld: HashSet<&SessionId> = self.keeper.unheld().iter().collect();
            let cared = self.workers.iter().flat_map(|worker| {
                let stores = worker.stores.iter();
                stores.map(|store| (worker.owner.0, store.id))
            });
            let cared: HashSet<(u32, u32)> = cared.collect();
            for (id, holder, _) in self.keeper.sessions() {
                let has = holder.is_some_and(|owner| cared.contains(&(owner.0, id.store)));
                let waits = holder.is_none() && unheld.contains(&id);
                assert!(has || waits, "nobody cares for {id:?}, its holder is {holder:?}");
            }
        }
    }
}
