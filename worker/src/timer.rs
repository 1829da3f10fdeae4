//! A hierarchical timer wheel. Pure: time comes in as `now_ms`, what is due comes out.
//!
//! Inserting is O(1), and so is each of the few moves of an entry towards its due time. Entries are not
//! cancelled: whoever inserted one decides, when it comes out, whether it still means anything.

/// Slots of a level.
const SLOTS: usize = 64;
/// Bits of the time that one level covers.
const SLOT_BITS: u32 = 6;
/// Levels: 64^6 ms, two years, before an entry is parked at the far end.
const LEVELS: usize = 6;

/// A wheel of entries `T`.
pub struct Wheel<T> {
    now_ms: u64,
    levels: [Level<T>; LEVELS],
}

struct Level<T> {
    occupied: u64,
    slots: Vec<Vec<(u64, T)>>,
}

impl<T> Wheel<T> {
    /// An empty wheel.
    pub fn new(now_ms: u64) -> Wheel<T> {
        let level = || Level {
            occupied: 0,
            slots: (0..SLOTS).map(|_| Vec::new()).collect(),
        };
        Wheel {
            now_ms,
            levels: std::array::from_fn(|_| level()),
        }
    }

    /// Adds an entry that is due at `due_ms`; one in the past is due at the next tick.
    pub fn insert(&mut self, due_ms: u64, entry: T) {
        let due_ms = due_ms.max(self.now_ms + 1);
        self.place(due_ms, entry);
    }

    /// The level is that of the highest digit in which `due_ms` differs from now.
    fn place(&mut self, due_ms: u64, entry: T) {
        let differing = 64 - (due_ms ^ self.now_ms).leading_zeros();
        let level = (differing.saturating_sub(1) / SLOT_BITS).min(LEVELS as u32 - 1) as usize;
        let slot = (due_ms >> (SLOT_BITS * level as u32)) as usize % SLOTS;
        let level = &mut self.levels[level];
        level.occupied |= 1 << slot;
        level.slots[slot].push((due_ms, entry));
    }

    /// When the wheel must be turned next: never later than the first due entry. `None`: it is empty.
    pub fn next_ms(&self) -> Option<u64> {
        (0..LEVELS).find_map(|number| self.next_of_level(number))
    }

    /// The start of the first occupied slot of a level. Entries of a level are due after all entries of
    /// the levels below it.
    fn next_of_level(&self, number: usize) -> Option<u64> {
        let occupied = self.levels[number].occupied;
        if occupied == 0 {
            return None;
        }
        let shift = SLOT_BITS * number as u32;
        let here = (self.now_ms >> shift) as u32 % SLOTS as u32;
        // The slot of the present instant was emptied when it began; an entry there is a turn ahead.
        let ahead = occupied.rotate_right((here + 1) % SLOTS as u32).trailing_zeros() + 1;
        Some(((self.now_ms >> shift) + u64::from(ahead)) << shift)
    }

    /// Turns the wheel to `now_ms`; appends what has become due, with its due time, to `due`.
    pub fn turn(&mut self, now_ms: u64, due: &mut Vec<(u64, T)>) {
        while let Some(next) = self.next_ms().filter(|next| *next <= now_ms) {
            self.now_ms = next;
            // From the top: what moves down lands in a lower level's present slot and is taken there.
            for number in (0..LEVELS).rev() {
                let shift = SLOT_BITS * number as u32;
                if next & ((1 << shift) - 1) != 0 {
                    continue;
                }
                let slot = (next >> shift) as usize % SLOTS;
                let level = &mut self.levels[number];
                if level.occupied & (1 << slot) == 0 {
                    continue;
                }
                level.occupied &= !(1 << slot);
                for (due_ms, entry) in std::mem::take(&mut level.slots[slot]) {
                    if due_ms <= next {
                        due.push((due_ms, entry));
                    } else {
                        self.place(due_ms, entry);
                    }
                }
            }
        }
        self.now_ms = self.now_ms.max(now_ms);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn turn(wheel: &mut Wheel<u32>, now_ms: u64) -> Vec<u32> {
        let mut due = Vec::new();
        wheel.turn(now_ms, &mut due);
        due.into_iter().map(|(_, entry)| entry).collect()
    }

    #[test]
    fn an_entry_comes_out_when_it_is_due_and_not_before() {
        let mut wheel = Wheel::new(1000);
        wheel.insert(1005, 1);
        assert_eq!(wheel.next_ms(), Some(1005));
        assert!(turn(&mut wheel, 1004).is_empty());
        assert_eq!(turn(&mut wheel, 1005), [1]);
        assert_eq!(wheel.next_ms(), None);
    }

    #[test]
    fn an_entry_in_the_past_is_due_at_the_next_tick() {
        let mut wheel = Wheel::new(1000);
        wheel.insert(5, 1);
        assert_eq!(turn(&mut wheel, 1001), [1]);
    }

    proptest! {
        #[test]
        fn every_entry_comes_out_once_in_the_turn_that_reaches_it(
            start in 0u64..1 << 45,
            delays in proptest::collection::vec(0u64..1 << 34, 0..60),
            steps in proptest::collection::vec(1u64..1 << 32, 1..40),
        ) {
            let mut wheel = Wheel::new(start);
            let mut open: Vec<(u64, u32)> = Vec::new();
            for (number, delay) in delays.iter().enumerate() {
                wheel.insert(start + delay, number as u32);
                open.push(((start + delay).max(start + 1), number as u32));
            }
            let mut now = start;
            for step in steps {
                now += step;
                if let Some(first) = open.iter().map(|(due, _)| *due).min() {
                    prop_assert!(wheel.next_ms().is_some_and(|next| next <= first));
                }
                let mut due = turn(&mut wheel, now);
                let mut expected: Vec<u32> =
                    open.iter().filter(|(at, _)| *at <= now).map(|(_, number)| *number).collect();
                open.retain(|(at, _)| *at > now);
                due.sort_unstable();
                expected.sort_unstable();
                prop_assert_eq!(due, expected);
            }
        }
    }
}
