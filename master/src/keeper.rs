//! Holds what sessions need to outlive their workers: both sockets of each that has lived long enough. Hands
//! them to the next worker when one has let go of its sessions, or has died.

use std::collections::{HashMap, HashSet, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use culvert_shared::counters::{Board, CloseReason};
use culvert_shared::ids::Owner;
use culvert_shared::message::{BATCH, SessionId, ToMaster, ToWorker};
use culvert_shared::sessions::Place;
use culvert_shared::sys::fdpass;
use culvert_worker::Store;
use nix::errno::Errno;

use crate::supervise::{Master, Phase};
use crate::worker::{State, Worker};

/// The sessions that are kept.
#[derive(Default)]
pub struct Keeper {
    sessions: HashMap<SessionId, Kept>,
    /// Sessions that no worker cares for.
    unheld: Vec<SessionId>,
}

/// Where a kept session is to be entered by a binary that goes on with it: as in [`Keeper`].
pub type Handed = (SessionId, Option<Owner>, Arc<Store>, [OwnedFd; 2]);

struct Kept {
    /// The worker that cares for it.
    holder: Option<Owner>,
    /// Where its record is. What nobody else has any more is still to be cared for.
    store: Arc<Store>,
    /// Downstream and upstream.
    sockets: [OwnedFd; 2],
}

impl Keeper {
    /// What another binary kept, and those of the sessions that no worker cares for.
    pub fn of(sessions: Vec<Handed>, unheld: Vec<SessionId>) -> Keeper {
        let kept = |(id, holder, store, sockets)| {
            let kept = Kept {
                holder,
                store,
                sockets,
            };
            (id, kept)
        };
        Keeper {
            sessions: sessions.into_iter().map(kept).collect(),
            unheld,
        }
    }

    /// The sessions, the worker that cares for each, its sockets.
    pub fn sessions(&self) -> impl Iterator<Item = (SessionId, Option<Owner>, [BorrowedFd<'_>; 2])> {
        let sessions = self.sessions.iter();
        sessions.map(|(id, kept)| (*id, kept.holder, kept.sockets.each_ref().map(AsFd::as_fd)))
    }

    /// Those that no worker cares for.
    pub fn unheld(&self) -> &[SessionId] {
        &self.unheld
    }

    /// The stores of those that no worker cares for, as far as `wanted`.
    pub fn unheld_stores(&self, wanted: impl Fn(u32) -> bool) -> Vec<Arc<Store>> {
        let mut stores: HashMap<u32, &Arc<Store>> = HashMap::new();
        for kept in self.unheld.iter().filter_map(|id| self.sessions.get(id)) {
            stores.entry(kept.store.id).or_insert(&kept.store);
        }
        stores.retain(|id, _| wanted(*id));
        stores.into_values().cloned().collect()
    }

    /// The stores of all of them.
    pub fn stores(&self) -> Vec<&Arc<Store>> {
        let stores = self.sessions.values().map(|kept| (kept.store.id, &kept.store));
        let stores: HashMap<u32, &Arc<Store>> = stores.collect();
        stores.into_values().collect()
    }

    fn keep(&mut self, owner: Owner, stores: &[Arc<Store>], sessions: Vec<SessionId>, sockets: Vec<OwnedFd>) {
        let mut sockets = sockets.into_iter();
        for id in sessions {
            let store = stores.iter().find(|store| store.id == id.store);
            // Where descriptors are missing, the worker's death ends the session, as if it was not kept.
            if let (Some(downstream), Some(upstream), Some(store)) = (sockets.next(), sockets.next(), store) {
                let kept = Kept {
                    holder: Some(owner),
                    store: Arc::clone(store),
                    sockets: [downstream, upstream],
                };
                self.sessions.insert(id, kept);
            }
        }
    }

    fn let_go(&mut self, sessions: Vec<SessionId>) {
        for id in sessions {
            if let Some(kept) = self.sessions.get_mut(&id) {
                kept.holder = None;
                self.unheld.push(id);
            }
        }
    }

    /// Takes the sessions of a worker that is gone from it; closes those that nobody can take over. Says how
    /// many live on.
    fn bury(&mut self, owner: Owner, stores: &[Arc<Store>]) -> usize {
        let mut left = 0;
        let unheld = &mut self.unheld;
        self.sessions.retain(|id, kept| {
            if kept.holder != Some(owner) {
                return true;
            }
            let record = stores.iter().find_map(|store| store.record_of(*id));
            let lives = record.is_some_and(|record| record.can_be_taken_over());
            if lives {
                kept.holder = None;
                unheld.push(*id);
                left += 1;
            }
            lives
        });
        left
    }

    /// Sends a worker the sessions that it is to adopt, as far as it takes them now.
    fn send(&self, worker: &mut Worker) {
        let Some(control) = worker.control().and_then(|fd| fd.try_clone_to_owned().ok()) else {
            return;
        };
        while !worker.to_adopt.is_empty() {
            let batch = worker.to_adopt.len().min(BATCH);
            let ids: Vec<SessionId> = worker
                .to_adopt
                .iter()
                .take(batch)
                .filter(|id| self.sessions.contains_key(id))
                .copied()
                .collect();
            let sockets: Vec<_> = ids
                .iter()
                .flat_map(|id| &self.sessions[id].sockets)
                .map(AsFd::as_fd)
                .collect();
            match fdpass::send(control.as_fd(), &ToWorker::Adopt(ids).encode(), &sockets) {
                Ok(()) => drop(worker.to_adopt.drain(..batch)),
                // Waited for by the loop; a worker that is gone is buried.
                Err(Errno::EAGAIN | Errno::EPIPE | Errno::ECONNRESET) => return,
                Err(error) => {
                    worker.rest();
                    return log::warn!(
                        "worker {} (process {}) has to wait for sessions of an earlier one: {error}",
                        worker.slot,
                        worker.pid
                    );
                }
            }
        }
    }
}

impl Master {
    /// Does what workers asked for their sessions, and takes their questions.
    pub fn take_mail(&mut self) {
        let now = Instant::now();
        for at in 0..self.workers.len() {
            for (message, sockets) in std::mem::take(&mut self.workers[at].mail) {
                let (owner, stores) = (self.workers[at].owner, &self.workers[at].stores);
                match message {
                    ToMaster::Keep(sessions) => self.keeper.keep(owner, stores, sessions, sockets),
                    ToMaster::Over(sessions) => self.keeper.let_go(sessions),
                    ToMaster::Forget(sessions) => {
                        for id in sessions {
                            self.keeper.sessions.remove(&id);
                            let store = stores.iter().find(|store| store.record_of(id).is_some());
                            if let Some(store) = store {
                                store.free(id.place);
                            }
                        }
                    }
                    ToMaster::Ask(questions) => {
                        for question in questions {
                            let resolver = usize::from(question.resolver);
                            let hosts = &mut self.names.hosts;
                            match self.workers[at].resolvers.get(resolver) {
                                Some(known) => {
                                    hosts.ask(owner, question, known, now, &self.board[0].hosts);
                                }
                                None => hosts.refuse(owner, question),
                            }
                        }
                    }
                    ToMaster::Ready => {}
                }
            }
        }
        self.entrust();
        let kept = self.keeper.sessions.len() as u64;
        self.board[0].kept.store(kept, Relaxed);
    }

    /// Gives sessions that no worker cares for to those that have their stores.
    fn entrust(&mut self) {
        if !self.keeper.unheld.is_empty() {
            let current = self.current.number;
            for id in std::mem::take(&mut self.keeper.unheld) {
                let Some(kept) = self.keeper.sessions.get_mut(&id) else {
                    continue;
                };
                let cares = |worker: &&mut Worker| {
                    worker.generation == current
                        && worker.state() == State::Serving
                        && worker.stores.iter().any(|store| store.id == id.store)
                };
                match self.workers.iter_mut().find(cares) {
                    Some(worker) => {
                        kept.holder = Some(worker.owner);
                        worker.to_adopt.push_back(id);
                    }
                    // Somebody is on the way: see `care`.
                    None => self.keeper.unheld.push(id),
                }
            }
        }
        for worker in self
            .workers
            .iter_mut()
            .filter(|worker| !worker.to_adopt.is_empty())
        {
            self.keeper.send(worker);
        }
    }

    /// A worker is gone, and its own sockets are closed: what it left is freed, except for the sessions that
    /// another worker can take over.
    pub fn bury_sessions(&mut self, worker: &Worker) {
        let held = u64::from(self.board[0].workers[worker.row].sessions.load(Relaxed));
        let left = self.keeper.bury(worker.owner, &worker.stores);
        for store in &worker.stores {
            store.bury(worker.owner, |id| self.keeper.sessions.contains_key(&id));
        }
        self.give_back_holds(worker);
        let lost = held.saturating_sub(left as u64);
        Board::add(&self.board[0].closes[CloseReason::WorkerDied as usize], lost);
        if held > 0 {
            log::warn!(
                "worker {} (process {}) left {held} sessions: {left} go on, {lost} are reset",
                worker.slot,
                worker.pid
            );
        }
        if self.phase == Phase::Quitting {
            // Nobody will come to see them end.
            self.keeper.sessions.retain(|_, kept| kept.holder.is_some());
            self.keeper.unheld.clear();
        }
    }
}

impl Master {
    /// What the sessions of a worker that is gone counted in (`limit_conn`), except for those that live on.
    fn give_back_holds(&self, worker: &Worker) {
        let mut lives_on = HashSet::new();
        for store in &worker.stores {
            for (place, record) in store.records.iter().enumerate() {
                let id = SessionId {
                    store: store.id,
                    place: Place(place as u32),
                    generation: record.generation(),
                };
                if record.owner() == Some(worker.owner) && self.keeper.sessions.contains_key(&id) {
                    lives_on.extend(record.holds());
                }
            }
        }
        self.current.limits.bury(worker.owner, &lives_on);
    }
}

/// Sessions on their way to a worker.
pub type Queue = VecDeque<SessionId>;
