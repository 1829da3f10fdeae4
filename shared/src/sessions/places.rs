//! Which places of a slot a worker may take.

use std::collections::VecDeque;

use super::{Place, Record};
use crate::ids::Owner;

/// The places that one worker may take. Another worker of the slot may hold some of them.
pub struct Places {
    owner: Owner,
    free: Vec<u32>,
    /// Seen in the hands of another; asked again when `free` is empty, oldest first.
    elsewhere: VecDeque<u32>,
}

/// Places in other hands that one call to [`Places::take`] asks again at most.
const ASK_AGAIN: usize = 8;

impl Places {
    /// All places of a slot.
    pub fn new(capacity: usize, owner: Owner) -> Places {
        Places {
            owner,
            free: (0..capacity as u32).rev().collect(),
            elsewhere: VecDeque::new(),
        }
    }

    /// Takes a place; `None` when all are in use.
    pub fn take(&mut self, records: &[Record]) -> Option<Place> {
        while let Some(index) = self.free.pop() {
            if self.claim(records, index) {
                return Some(Place(index));
            }
        }
        let mut asked = 0;
        while asked < ASK_AGAIN
            && let Some(index) = self.elsewhere.pop_front()
        {
            let before = self.elsewhere.len();
            if self.claim(records, index) {
                return Some(Place(index));
            }
            asked += self.elsewhere.len() - before;
        }
        None
    }

    /// Takes this place if it is free. It is asked again if another worker has it; not if this one has, with a session
    /// that it took over: when that ends the place is given back or let go of. Were such places asked again, hundreds in
    /// a row would hide the free ones behind them.
    fn claim(&mut self, records: &[Record], index: u32) -> bool {
        let Some(record) = records.get(index as usize) else {
            return false;
        };
        let taken = record.take(self.owner);
        if !taken && record.owner() != Some(self.owner) {
            self.elsewhere.push_back(index);
        }
        taken
    }

    /// Gives a place back whose sockets are closed.
    pub fn give_back(&mut self, records: &[Record], place: Place) {
        if let Some(record) = records.get(place.0 as usize) {
            record.free();
        }
        self.free.push(place.0);
    }

    /// A place that this worker held is in the hands of another, who will free it.
    pub fn let_go(&mut self, place: Place) {
        self.elsewhere.push_back(place.0);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::records;
    use super::*;

    #[test]
    fn no_place_is_given_to_two_workers() {
        let records = records(3);
        let (mut old, mut new) = (Places::new(3, Owner(1)), Places::new(3, Owner(2)));
        let held: Vec<Place> = (0..2).filter_map(|_| old.take(&records)).collect();
        let third = new.take(&records).unwrap();
        assert!(!held.contains(&third));
        assert_eq!(new.take(&records), None);
        old.give_back(&records, held[0]);
        assert_eq!(new.take(&records), Some(held[0]));
        assert_eq!(records[held[0].0 as usize].owner(), Some(Owner(2)));
    }

    #[test]
    fn sessions_that_were_taken_over_hide_no_free_places() {
        const TAKEN_OVER: u32 = 100;
        let records = records(TAKEN_OVER as usize + 3);
        let mut old = Places::new(TAKEN_OVER as usize, Owner(1));
        while let Some(place) = old.take(&records) {
            records[place.0 as usize].pass_to(Owner(2));
        }
        let mut new = Places::new(records.len(), Owner(2));
        // Each of its own sessions was kept: the master frees the places.
        for round in 0..20 {
            let held: Vec<Place> = (0..3).filter_map(|_| new.take(&records)).collect();
            assert_eq!(held.len(), 3, "round {round}");
            assert_eq!(new.take(&records), None);
            for place in held {
                new.let_go(place);
                records[place.0 as usize].free();
            }
        }
        // A session that was taken over ends like any other.
        new.let_go(Place(7));
        records[7].free();
        assert_eq!((0..9).filter_map(|_| new.take(&records)).count(), 4);
    }
}
