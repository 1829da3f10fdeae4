//! The sessions of a worker slot, in memory that the master makes: what a worker has to know of a session to
//! take it over from another one that has left or died. Places and plain numbers; no socket is touched here.
//!
//! A worker takes a place for each session that the kernel forwards, or that is to outlive it. Who holds a
//! place is decided by its owner mark alone, so that no place is ever in two hands.

mod places;
mod saved;

use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU32, AtomicU64};

use crate::ids::Owner;
use crate::limits::MAX_HOLDS;
use crate::sys::shm::Shareable;

pub use places::Places;
pub use saved::{Carrier, MAX_TRIED, Saved, SavedHello, SavedSettings, SavedStream, Stage};
pub(crate) use saved::{address, address_words};

use saved::{at, holds, ways};

/// The version of this layout: another binary may go on with a table if it has the same ([`layout`]). Change it
/// whenever a word or a bit changes its place or meaning.
const LAYOUT: &str = "culvert sessions, layout 6";

/// How a record is laid out, for two binaries to compare.
pub fn layout() -> String {
    format!("{LAYOUT}, {} bytes", size_of::<Record>())
}

/// One place of a worker slot.
#[repr(C)]
pub struct Record {
    /// The worker that holds it ([`Owner`]); 0: it is free.
    owner: AtomicU32,
    /// How many sessions have had it: names its session where the place alone would not.
    generation: AtomicU32,
    /// A [`Kept`].
    kept: AtomicU32,
    /// Not 0: user space holds bytes of the session, or is writing this record. If its worker dies now,
    /// nobody can say what was delivered.
    busy: AtomicU32,
    /// How often a worker has begun to take the session over since one was last done with it.
    attempts: AtomicU32,
    padding: AtomicU32,
    words: [AtomicU64; at::END],
}

// SAFETY: only atomics in a `repr(C)` layout; zero is valid, and so is anything else: what is read from it is
// checked when it is decoded.
unsafe impl Shareable for Record {}

/// Whether a session can outlive its worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kept {
    /// The worker alone has its sockets.
    No = 0,
    /// The master has them too, and the record is filled in.
    Yes = 1,
    /// It is being ended: nobody is to take it over any more.
    Closing = 2,
    /// Its worker has let go of it in good order.
    LetGo = 3,
}

/// How often it is tried to take a session over. A worker may be killed in the middle of it once; a session at which
/// two die may be what kills them.
const MOST_ATTEMPTS: u32 = 2;

/// A place of a worker slot: the index of its record, and of its pair in the slot's maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Place(pub u32);

impl Record {
    /// Who holds the place; `None`: nobody.
    pub fn owner(&self) -> Option<Owner> {
        Some(Owner(self.owner.load(Acquire))).filter(|owner| owner.0 != 0)
    }

    /// Names the session that has the place.
    pub fn generation(&self) -> u32 {
        self.generation.load(Relaxed)
    }

    /// Takes the place, if it is free, for another session.
    fn take(&self, owner: Owner) -> bool {
        let taken = self.owner.compare_exchange(0, owner.0, AcqRel, Relaxed).is_ok();
        if taken {
            self.kept.store(Kept::No as u32, Relaxed);
            self.busy.store(0, Relaxed);
            self.attempts.store(0, Relaxed);
            self.generation.fetch_add(1, Relaxed);
        }
        taken
    }

    /// Passes the place, and the session in it, from a worker that has left to another.
    pub fn pass_to(&self, owner: Owner) {
        self.owner.store(owner.0, Release);
    }

    /// Frees the place. Its sockets must be closed.
    pub fn free(&self) {
        self.kept.store(Kept::No as u32, Relaxed);
        self.owner.store(0, Release);
    }

    /// Says whether the session can outlive its worker.
    pub fn set_kept(&self, kept: Kept) {
        self.kept.store(kept as u32, Release);
    }

    /// Whether the session can be taken over from a worker that is gone.
    pub fn can_be_taken_over(&self) -> bool {
        let kept = self.kept.load(Acquire);
        (kept == Kept::Yes as u32 || kept == Kept::LetGo as u32) && self.busy.load(Acquire) == 0
    }

    /// Whether its worker let go of it in good order; otherwise it died at any point.
    pub fn was_let_go(&self) -> bool {
        self.kept.load(Acquire) == Kept::LetGo as u32
    }

    /// A worker begins to take the session over. False: it is not to, others have died at that.
    pub fn begin_adoption(&self) -> bool {
        self.attempts.fetch_add(1, Release) < MOST_ATTEMPTS
    }

    /// The worker that took it over has lived through that.
    pub fn end_adoption(&self) {
        self.attempts.store(0, Release);
    }

    /// From here on nobody else can say how far the session is, until [`Record::save`].
    pub fn begin(&self) {
        self.busy.store(1, Release);
        // What follows must not be seen before it.
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    }

    /// Writes the whole record; `busy`: user space holds bytes of the session.
    pub fn fill(&self, saved: &Saved, busy: bool) {
        self.begin();
        // Most sessions have no hello: then its pages stay untouched.
        let words = saved.encode();
        let used = at::HELLO + (words[at::HELLO_LEN] as usize).div_ceil(8);
        for (word, value) in self.words.iter().zip(words).take(used) {
            word.store(value, Relaxed);
        }
        self.busy.store(busy.into(), Release);
    }

    /// Writes what changes while a session lives.
    pub fn save(&self, last_active_ms: u64, streams: &[SavedStream; 2], busy: bool) {
        self.begin();
        self.words[at::LAST_ACTIVE].store(last_active_ms, Relaxed);
        self.words[at::WAYS].store(ways(streams), Relaxed);
        for (way, stream) in streams.iter().enumerate() {
            self.words[at::READ + way].store(stream.read_bytes, Relaxed);
            self.words[at::WRITTEN + way].store(stream.written_bytes, Relaxed);
        }
        self.busy.store(busy.into(), Release);
    }

    /// What its session counts in.
    pub fn holds(&self) -> [u32; MAX_HOLDS] {
        holds(&[0, 1].map(|word| self.words[at::HOLDS + word].load(Relaxed)))
    }

    /// Reads the record; `None`: it makes no sense.
    pub fn read(&self) -> Option<Saved> {
        let words: [u64; at::END] = std::array::from_fn(|word| self.words[word].load(Relaxed));
        Saved::decode(&words)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::shm::Shared;

    pub fn records(n: usize) -> Shared<Record> {
        Shared::anonymous(n).unwrap()
    }

    #[test]
    fn a_record_that_is_being_written_cannot_be_taken_over() {
        let records = records(1);
        Places::new(1, Owner(1)).take(&records).unwrap();
        records[0].set_kept(Kept::Yes);
        assert!(records[0].can_be_taken_over());
        records[0].begin();
        assert!(!records[0].can_be_taken_over());
        records[0].save(1, &Default::default(), false);
        assert!(records[0].can_be_taken_over());
        records[0].set_kept(Kept::Closing);
        assert!(!records[0].can_be_taken_over());
    }

    #[test]
    fn a_session_at_which_two_workers_died_is_not_taken_over_by_a_third() {
        let records = records(1);
        let mut places = Places::new(1, Owner(1));
        let place = places.take(&records).unwrap();
        for _ in 0..3 {
            assert!(records[0].begin_adoption());
            records[0].end_adoption();
        }
        assert!(records[0].begin_adoption(), "the first dies at it");
        assert!(records[0].begin_adoption(), "and the second");
        assert!(!records[0].begin_adoption());
        places.give_back(&records, place);
        places.take(&records).unwrap();
        assert!(
            records[0].begin_adoption(),
            "the next session in the place is another one"
        );
    }
}
