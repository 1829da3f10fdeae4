//! What belongs to a worker slot and outlives its workers: the table of its sessions, and its maps. The master
//! makes it; the worker of the slot works with it, and with those of slots that are no more.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use anyhow::Result;
use culvert_bpf::SlotMaps;
use culvert_shared::ids::Owner;
use culvert_shared::message::SessionId;
use culvert_shared::sessions::{Place, Places, Record};
use culvert_shared::sys::shm::Shared;

use crate::pressure::Reader;
use crate::table::Token;

/// The store of a worker slot.
pub struct Store {
    /// Its number; never used again while the program runs.
    pub id: u32,
    /// The table, one record for each session that the slot has room for.
    pub records: Shared<Record>,
    /// Its memory, for a program that goes on with it.
    pub records_file: OwnedFd,
    /// The maps, with a pair for each record; `None` where BPF is not to be had.
    pub maps: Option<Arc<SlotMaps>>,
}

impl Store {
    /// The record at a place.
    pub fn record(&self, place: Place) -> Option<&Record> {
        self.records.get(place.0 as usize)
    }

    /// The record of a session, if the session still has it.
    pub fn record_of(&self, id: SessionId) -> Option<&Record> {
        self.record(id.place)
            .filter(|record| id.store == self.id && record.generation() == id.generation)
    }

    /// Whether a session is left in it.
    pub fn is_used(&self) -> bool {
        self.records.iter().any(|record| record.owner().is_some())
    }

    /// Frees a place whose sockets were closed, by another process than the one that is asked.
    pub fn free(&self, place: Place) {
        if let Some(maps) = &self.maps {
            maps.release(place);
        }
        if let Some(record) = self.record(place) {
            record.free();
        }
    }

    /// Frees what a dead worker left, except where `is_kept` says that the session lives on.
    pub fn bury(&self, owner: Owner, is_kept: impl Fn(SessionId) -> bool) {
        for (index, record) in self.records.iter().enumerate() {
            let id = SessionId {
                store: self.id,
                place: Place(index as u32),
                generation: record.generation(),
            };
            if record.owner() == Some(owner) && !is_kept(id) {
                self.free(id.place);
            }
        }
        if let Some(maps) = &self.maps {
            maps.release_events(owner);
        }
    }
}

/// A store as the worker that cares for it sees it.
pub struct Ward {
    /// The store.
    pub store: Arc<Store>,
    /// The places that this worker may take.
    pub places: Places,
    /// What the programs tell of its pairs.
    pub reader: Reader,
    /// The session at each place, if it is this worker's.
    pub tokens: Vec<Option<Token>>,
}

impl Ward {
    /// Opens a store for a worker.
    pub fn open(store: Arc<Store>, owner: Owner) -> Result<Ward> {
        let capacity = store.records.len();
        Ok(Ward {
            places: Places::new(capacity, owner),
            reader: Reader::open(store.maps.as_deref(), owner)?,
            tokens: vec![None; capacity],
            store,
        })
    }
}

/// Where a session stands: its place in one of the worker's stores.
#[derive(Clone, Copy, Debug)]
pub struct Seat {
    /// Which of the worker's stores.
    pub ward: usize,
    /// The session's name for other processes.
    pub id: SessionId,
    /// Its sockets are in the store's maps.
    pub joined: bool,
    /// The master has its sockets too.
    pub kept: bool,
    /// It has other sockets than the master knows of, which had no room to hear of them.
    pub stale: bool,
}
