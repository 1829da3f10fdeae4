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

use crate::buffers;
use crate::supervise::Master;
use crate::worker::{State, Worker, never_wait};

/// The sessions that are kept. A worker is believed what it says of sessions that are in its care, and of no others: they may
/// be in the hands of another one.
#[derive(Default)]
pub struct Keeper {
    sessions: HashMap<SessionId, Kept>,
    /// Sessions that no worker cares for.
    unheld: Vec<SessionId>,
    /// How many there have ever been descriptors for. Workers reserve room before they send; one that does not is not to
    /// leave the master without.
    room: usize,
}

/// Where a kept session is to be entered by a binary that goes on with it: as in [`Keeper`].
pub type Handed = (SessionId, Option<Owner>, Arc<Store>, [OwnedFd; 2]);

struct Kept {
    /// The worker that cares for it.
    holder: Option<Owner>,
    /// Where its record is. What nobody else has any more is still to be cared for.
    store: Arc<Store>,
    sockets: Sockets,
}

/// Downstream and upstream.
struct Sockets([OwnedFd; 2]);

impl Drop for Sockets {
    fn drop(&mut self) {
        // Its worker has had them meanwhile.
        self.0.iter().for_each(never_wait);
    }
}

impl Keeper {
    /// What another binary kept, and those of the sessions that no worker cares for.
    pub fn of(sessions: Vec<Handed>, unheld: Vec<SessionId>) -> Keeper {
        let kept = |(id, holder, store, sockets)| {
            let kept = Kept {
                holder,
                store,
                sockets: Sockets(sockets),
            };
            (id, kept)
        };
        Keeper {
            sessions: sessions.into_iter().map(kept).collect(),
            unheld,
            room: 0,
        }
    }

    /// So many may be kept from now on. A worker may have reserved room before by what was said earlier.
    pub fn allow(&mut self, room: u64) {
        self.room = self.room.max(usize::try_from(room).unwrap_or(usize::MAX));
    }

    /// The sessions, the worker that cares for each, its sockets.
    pub fn sessions(&self) -> impl Iterator<Item = (SessionId, Option<Owner>, [BorrowedFd<'_>; 2])> {
        let sessions = self.sessions.iter();
        sessions.map(|(id, kept)| (*id, kept.holder, kept.sockets.0.each_ref().map(AsFd::as_fd)))
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

    /// Whether a kept session is in the care of this worker.
    fn is_of(&self, id: SessionId, owner: Owner) -> bool {
        self.sessions
            .get(&id)
            .is_some_and(|kept| kept.holder == Some(owner))
    }

    /// Takes a session in, if its sockets have come, somebody has its store, and there is room.
    fn keep(
        &mut self,
        id: SessionId,
        owner: Owner,
        stores: &[Arc<Store>],
        sockets: Option<[OwnedFd; 2]>,
    ) -> bool {
        let store = stores.iter().find(|store| store.record_of(id).is_some());
        let (Some(sockets), Some(store)) = (sockets, store) else {
            return false;
        };
        let is_anothers = self.sessions.contains_key(&id) && !self.is_of(id, owner);
        if is_anothers || self.sessions.len() >= self.room {
            return false;
        }
        let kept = Kept {
            holder: Some(owner),
            store: Arc::clone(store),
            sockets: Sockets(sockets),
        };
        self.sessions.insert(id, kept);
        true
    }

    /// Exchanges the sockets of a session that is kept. Where the new ones have not come it is kept no longer: with the old
    /// ones nobody could go on.
    fn keep_again(&mut self, id: SessionId, owner: Owner, sockets: Option<[OwnedFd; 2]>) -> bool {
        let kept = self
            .sessions
            .get_mut(&id)
            .filter(|kept| kept.holder == Some(owner));
        match (kept, sockets) {
            (Some(kept), Some(sockets)) => {
                kept.sockets = Sockets(sockets);
                true
            }
            (Some(_), None) => {
                self.sessions.remove(&id);
                false
            }
            (None, _) => false,
        }
    }

    /// Their worker has let go of these sessions. Says how many of them are not kept, so that nobody can go on with them.
    fn let_go(&mut self, owner: Owner, sessions: Vec<SessionId>) -> usize {
        let mut lost = 0;
        for id in sessions {
            match self.sessions.get_mut(&id) {
                Some(kept) if kept.holder == Some(owner) => {
                    kept.holder = None;
                    self.unheld.push(id);
                }
                Some(_) => {}
                None => lost += 1,
            }
        }
        lost
    }

    /// Its worker says that a session is over: its sockets are closed, and its place is freed.
    fn forget(&mut self, id: SessionId, owner: Owner, stores: &[Arc<Store>]) {
        let Some((store, record)) = stores
            .iter()
            .find_map(|store| Some((store, store.record_of(id)?)))
        else {
            return;
        };
        let is_its_own = match self.sessions.get(&id) {
            Some(kept) => kept.holder == Some(owner),
            // One that was not to be kept.
            None => record.owner() == Some(owner),
        };
        if is_its_own {
            self.sessions.remove(&id);
            store.free(id.place);
        }
    }

    /// Takes the sessions of a worker that is gone from it; closes those that nobody can take over. Says how
    /// many live on of those that it had; what it was still to adopt is not among them.
    fn bury(&mut self, owner: Owner, stores: &[Arc<Store>]) -> usize {
        let mut left = 0;
        let unheld = &mut self.unheld;
        self.sessions.retain(|id, kept| {
            if kept.holder != Some(owner) {
                return true;
            }
            let record = stores.iter().find_map(|store| store.record_of(*id));
            let Some(record) = record.filter(|record| record.can_be_taken_over()) else {
                return false;
            };
            kept.holder = None;
            unheld.push(*id);
            left += usize::from(record.owner() == Some(owner));
            true
        });
        left
    }

    /// Sends a worker the sessions that it is to adopt, as far as it takes them now.
    fn send(&self, worker: &mut Worker) {
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
                .flat_map(|id| &self.sessions[id].sockets.0)
                .map(AsFd::as_fd)
                .collect();
            let Some(control) = worker.control() else { return };
            match fdpass::send(control, &ToWorker::Adopt(ids).encode(), &sockets) {
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
    /// Hears every worker.
    pub fn hear_all(&mut self, now: Instant) {
        for at in 0..self.workers.len() {
            self.hear(at, now);
        }
    }

    /// Does what a worker that is gone has asked for before.
    pub fn hear_out(&mut self, at: usize, now: Instant) {
        self.hear(at, now);
        while self.workers[at].hear_on() {
            self.hear(at, now);
        }
    }

    /// Does what a worker has asked for: message by message, so that there are never more descriptors open that the
    /// keeper does not have yet than come with one.
    pub fn hear(&mut self, at: usize, now: Instant) {
        while let Some((message, sockets)) = self.workers[at].hear(now) {
            let mut sockets = sockets.into_iter();
            // One that came alone is closed.
            let mut pair = || Some([sockets.next()?, sockets.next()?]);
            let worker = &self.workers[at];
            match message {
                ToMaster::Keep(sessions) => {
                    let mut unkept = 0;
                    for id in sessions {
                        let taken = self.keeper.keep(id, worker.owner, &worker.stores, pair());
                        unkept += usize::from(!taken);
                        self.board[0].note_kept(self.keeper.sessions.len() as u64, worker.row);
                    }
                    self.note_unkept(at, unkept);
                }
                ToMaster::KeepAgain(id) => {
                    let taken = self.keeper.keep_again(id, worker.owner, pair());
                    self.note_unkept(at, usize::from(!taken));
                }
                ToMaster::Over(sessions) => {
                    let lost = self.keeper.let_go(worker.owner, sessions);
                    if lost > 0 {
                        // It has closed their sockets, or is about to.
                        Board::add(
                            &self.board[0].closes[CloseReason::WorkerDied as usize],
                            lost as u64,
                        );
                        log::error!(
                            "{lost} sessions that worker {} (process {}) has let go of are reset: they were not kept",
                            worker.slot,
                            worker.pid
                        );
                    }
                }
                ToMaster::Forget(sessions) => {
                    for id in sessions {
                        self.keeper.forget(id, worker.owner, &worker.stores);
                    }
                }
                ToMaster::Ask(questions) => {
                    for question in questions {
                        let resolver = usize::from(question.resolver);
                        let hosts = &mut self.names.hosts;
                        match worker.resolvers.get(resolver) {
                            Some(known) => {
                                hosts.ask(worker.owner, question, known, now, &self.board[0].hosts);
                            }
                            None => hosts.refuse(worker.owner, question),
                        }
                    }
                }
                ToMaster::Size(buffer, bytes) => {
                    let bytes = bytes.min(self.current.largest_buffer());
                    sockets.for_each(|socket| buffers::size(&socket, buffer, bytes));
                }
                ToMaster::Ready => {}
            }
        }
    }

    /// They end with their worker, as if they had not lived long enough.
    fn note_unkept(&self, at: usize, sessions: usize) {
        if sessions > 0 {
            Board::add(&self.board[0].unkept, sessions as u64);
            log::error!(
                "{sessions} sessions of worker {} (process {}) are not kept and end with it: their sockets are missing, \
                 because the limit on open descriptors is too low",
                self.workers[at].slot,
                self.workers[at].pid
            );
        }
    }

    /// Sees to the sessions that workers have let go of, or left.
    pub fn look_after_sessions(&mut self) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;
    use culvert_shared::sessions::{Kept as SessionState, Places};
    use culvert_shared::sys::shm::Shared;

    const OWNER: Owner = Owner(7);

    fn id(store: u32, place: u32) -> SessionId {
        SessionId {
            store,
            place: Place(place),
            generation: 1,
        }
    }

    fn sockets() -> Option<[OwnedFd; 2]> {
        fdpass::pair().ok().map(|(left, right)| [left, right])
    }

    /// Number 1, with a session of OWNER at each place.
    fn store(places: usize) -> Arc<Store> {
        let store = empty_store(places);
        let mut taken = Places::new(places, OWNER);
        (0..places).for_each(|_| assert!(taken.take(&store.records).is_some()));
        store
    }

    /// Number 1.
    fn empty_store(places: usize) -> Arc<Store> {
        let (records, records_file) = Shared::in_file(c"records", places).unwrap();
        Arc::new(Store {
            id: 1,
            records,
            records_file,
            maps: None,
        })
    }

    #[test]
    fn sessions_that_a_worker_was_to_adopt_and_did_not_are_none_that_it_left() {
        let stores = [empty_store(4)];
        let records = &stores[0].records;
        let before = Owner(3);
        // Its own, and one of an earlier worker whose sockets wait for it.
        for owner in [OWNER, before] {
            let place = Places::new(4, owner).take(records).unwrap();
            records[place.0 as usize].set_kept(SessionState::Yes);
        }
        let mut keeper = Keeper::default();
        keeper.allow(9);
        for place in 0..2 {
            assert!(keeper.keep(id(1, place), OWNER, &stores, sockets()));
        }
        assert_eq!(keeper.bury(OWNER, &stores), 1);
        assert_eq!(keeper.unheld().len(), 2, "both wait for another one");
    }

    #[test]
    fn a_session_is_kept_only_with_both_of_its_newest_sockets() {
        let stores = [store(4)];
        let mut keeper = Keeper::default();
        keeper.allow(9);
        assert!(keeper.keep(id(1, 0), OWNER, &stores, sockets()));
        assert!(keeper.keep(id(1, 1), OWNER, &stores, sockets()));
        assert!(!keeper.keep(id(1, 2), OWNER, &stores, None));
        assert!(
            !keeper.keep(id(9, 3), OWNER, &stores, sockets()),
            "nobody has its store"
        );
        assert!(keeper.keep_again(id(1, 0), OWNER, sockets()));
        assert!(
            !keeper.keep_again(id(1, 1), OWNER, None),
            "with the old ones nobody can go on"
        );
        assert!(
            !keeper.keep_again(id(1, 2), OWNER, sockets()),
            "no room was reserved for it"
        );
        let kept: Vec<_> = keeper.sessions().map(|(id, holder, _)| (id, holder)).collect();
        assert_eq!(kept, [(id(1, 0), Some(OWNER))]);
        let all = (0..4).map(|place| id(1, place)).collect();
        assert_eq!(keeper.let_go(OWNER, all), 3);
        assert_eq!(keeper.unheld(), [id(1, 0)]);
    }

    #[test]
    fn a_worker_is_believed_nothing_of_sessions_that_are_not_in_its_care() {
        const LIAR: Owner = Owner(8);
        let stores = [store(4)];
        let mut keeper = Keeper::default();
        keeper.allow(9);
        let (held, unheld) = (id(1, 0), id(1, 1));
        assert!([held, unheld].map(|id| keeper.keep(id, OWNER, &stores, sockets())) == [true; 2]);
        assert_eq!(keeper.let_go(OWNER, vec![unheld]), 0);
        let are_as_before = |keeper: &Keeper| {
            let holders: HashMap<_, _> = keeper.sessions().map(|(id, holder, _)| (id, holder)).collect();
            let owners = stores[0].records[..2].iter().map(|record| record.owner());
            holders == HashMap::from([(held, Some(OWNER)), (unheld, None)])
                && keeper.unheld() == [unheld]
                && owners.eq([Some(OWNER); 2])
        };
        for id in [held, unheld] {
            assert!(!keeper.keep(id, LIAR, &stores, sockets()));
            assert!(!keeper.keep_again(id, LIAR, sockets()));
            assert!(!keeper.keep_again(id, LIAR, None));
            assert_eq!(keeper.let_go(LIAR, vec![id]), 0);
            keeper.forget(id, LIAR, &stores);
            assert!(are_as_before(&keeper), "{id:?}");
        }
        assert_eq!(keeper.let_go(OWNER, vec![unheld]), 0);
        assert!(are_as_before(&keeper), "let go of twice");
        // One that is not kept.
        keeper.forget(id(1, 2), LIAR, &stores);
        assert_eq!(stores[0].records[2].owner(), Some(OWNER));
        for own in [held, id(1, 2)] {
            keeper.forget(own, OWNER, &stores);
        }
        assert!([0, 2].map(|place| stores[0].records[place].owner()) == [None; 2]);
        assert_eq!(keeper.sessions().count(), 1);
    }

    #[test]
    fn sockets_whose_close_would_wait_for_their_peers_hold_up_nobody() {
        let stores = [store(1)];
        let mut keeper = Keeper::default();
        keeper.allow(1);
        let [left, right] = [testing::lingering(), testing::lingering()];
        let theirs = [&left.0, &right.0].map(|socket| socket.try_clone().unwrap());
        assert!(keeper.keep(id(1, 0), OWNER, &stores, Some([left.0.into(), right.0.into()])));
        theirs.iter().for_each(testing::linger);
        drop(theirs);
        let begun = Instant::now();
        keeper.forget(id(1, 0), OWNER, &stores);
        assert!(begun.elapsed() < testing::LINGER / 2, "{:?}", begun.elapsed());
    }

    #[test]
    fn a_worker_that_reserves_no_room_gets_no_more_than_there_are_descriptors_for() {
        let stores = [store(4)];
        let mut keeper = Keeper::default();
        keeper.allow(2);
        let taken = [0, 1, 2].map(|place| keeper.keep(id(1, place), OWNER, &stores, sockets()));
        assert_eq!(taken, [true, true, false]);
        let elsewhere = SessionId {
            place: Place(4),
            ..id(1, 0)
        };
        keeper.allow(9);
        assert!(
            !keeper.keep(elsewhere, OWNER, &stores, sockets()),
            "no such place"
        );
        keeper.allow(1);
        assert!(
            keeper.keep(id(1, 2), OWNER, &stores, sockets()),
            "it was reserved earlier"
        );
    }
}
