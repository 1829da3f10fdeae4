//! A hierarchical timer wheel. Pure: time comes in as `now_ms`, what is due comes out.
//!
//! Each id has one timer at most: setting it again moves it, so the wheel never holds more than one node
//! for an id, however often sessions change their minds. Setting, moving and cancelling are O(1), and so
//! is each of the few moves of a timer towards its due time.

/// Slots of a level.
const SLOTS: usize = 64;
/// Bits of the time that one level covers.
const SLOT_BITS: u32 = 6;
/// Levels: 64^6 ms, two years, before a timer is parked at the far end.
const LEVELS: usize = 6;
/// No node.
const NONE: u32 = u32::MAX;

/// A wheel of timers, each named by a small id.
pub struct Wheel {
    now_ms: u64,
    /// By id.
    nodes: Vec<Node>,
    /// The first node of each slot, level by level.
    heads: [[u32; SLOTS]; LEVELS],
    /// The slots of each level that have a node.
    occupied: [u64; LEVELS],
}

/// A timer, in the doubly linked list of its slot.
#[derive(Clone, Copy)]
struct Node {
    due_ms: u64,
    /// Level and slot; `None`: the timer is not set.
    place: Option<(u8, u8)>,
    previous: u32,
    next: u32,
}

impl Wheel {
    /// A wheel without timers.
    pub fn new(now_ms: u64) -> Wheel {
        Wheel {
            now_ms,
            nodes: Vec::new(),
            heads: [[NONE; SLOTS]; LEVELS],
            occupied: [0; LEVELS],
        }
    }

    /// Sets the timer of an id; one in the past is due at the next tick.
    pub fn set(&mut self, id: u32, due_ms: u64) {
        let unset = Node {
            due_ms: 0,
            place: None,
            previous: NONE,
            next: NONE,
        };
        if self.nodes.len() <= id as usize {
            self.nodes.resize(id as usize + 1, unset);
        }
        let due_ms = due_ms.max(self.now_ms + 1);
        let node = self.nodes[id as usize];
        if node.place.is_some() {
            if node.due_ms == due_ms {
                return;
            }
            self.unlink(id);
        }
        self.link(id, due_ms);
    }

    /// The same, unless it is set for an earlier time: what asks again and again does not put it off for ever.
    pub fn set_earlier(&mut self, id: u32, due_ms: u64) {
        let node = self.nodes.get(id as usize);
        if node.is_none_or(|node| node.place.is_none() || node.due_ms > due_ms) {
            self.set(id, due_ms);
        }
    }

    /// Clears the timer of an id, if it is set.
    pub fn cancel(&mut self, id: u32) {
        if self
            .nodes
            .get(id as usize)
            .is_some_and(|node| node.place.is_some())
        {
            self.unlink(id);
        }
    }

    /// The level is that of the highest digit in which `due_ms` differs from now.
    fn link(&mut self, id: u32, due_ms: u64) {
        let differing = 64 - (due_ms ^ self.now_ms).leading_zeros();
        let level = (differing.saturating_sub(1) / SLOT_BITS).min(LEVELS as u32 - 1) as usize;
        let slot = (due_ms >> (SLOT_BITS * level as u32)) as usize % SLOTS;
        let next = std::mem::replace(&mut self.heads[level][slot], id);
        if next != NONE {
            self.nodes[next as usize].previous = id;
        }
        self.nodes[id as usize] = Node {
            due_ms,
            place: Some((level as u8, slot as u8)),
            previous: NONE,
            next,
        };
        self.occupied[level] |= 1 << slot;
    }

    fn unlink(&mut self, id: u32) {
        let Node {
            place,
            previous,
            next,
            ..
        } = self.nodes[id as usize];
        let Some((level, slot)) = place else { return };
        let (level, slot) = (usize::from(level), usize::from(slot));
        self.nodes[id as usize].place = None;
        if next != NONE {
            self.nodes[next as usize].previous = previous;
        }
        if previous != NONE {
            self.nodes[previous as usize].next = next;
        } else {
            self.heads[level][slot] = next;
            if next == NONE {
                self.occupied[level] &= !(1 << slot);
            }
        }
    }

    /// When the wheel must be turned next: never later than the first due timer. `None`: none is set.
    pub fn next_ms(&self) -> Option<u64> {
        (0..LEVELS).find_map(|level| self.next_of_level(level))
    }

    /// The start of the first occupied slot of a level. Timers of a level are due after all timers of
    /// the levels below it.
    fn next_of_level(&self, level: usize) -> Option<u64> {
        let occupied = self.occupied[level];
        if occupied == 0 {
            return None;
        }
        let shift = SLOT_BITS * level as u32;
        let here = (self.now_ms >> shift) as u32 % SLOTS as u32;
        // The slot of the present instant was emptied when it began; a timer there is a turn ahead.
        let ahead = occupied.rotate_right((here + 1) % SLOTS as u32).trailing_zeros() + 1;
        Some(((self.now_ms >> shift) + u64::from(ahead)) << shift)
    }

    /// Turns the wheel to `now_ms`; appends the ids whose timers have become due to `due`.
    pub fn turn(&mut self, now_ms: u64, due: &mut Vec<u32>) {
        while let Some(next) = self.next_ms().filter(|next| *next <= now_ms) {
            self.now_ms = next;
            // From the top: what moves down lands in a lower level's present slot and is taken there.
            for level in (0..LEVELS).rev() {
                let shift = SLOT_BITS * level as u32;
                if next & ((1 << shift) - 1) != 0 {
                    continue;
                }
                let slot = (next >> shift) as usize % SLOTS;
                let mut id = self.heads[level][slot];
                while id != NONE {
                    let Node {
                        due_ms,
                        next: following,
                        ..
                    } = self.nodes[id as usize];
                    self.unlink(id);
                    if due_ms <= next {
                        due.push(id);
                    } else {
                        self.link(id, due_ms);
                    }
                    id = following;
                }
            }
        }
        self.now_ms = self.now_ms.max(now_ms);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timer_that_is_asked_for_again_and_again_is_not_put_off() {
        let mut wheel = Wheel::new(0);
        for now_ms in 0..5 {
            wheel.set_earlier(3, now_ms + 5);
        }
        assert_eq!(wheel.next_ms(), Some(5));
        wheel.set_earlier(3, 4);
        assert_eq!(wheel.next_ms(), Some(4));
        let mut due = Vec::new();
        wheel.turn(4, &mut due);
        assert_eq!(due, [3]);
    }
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn turn(wheel: &mut Wheel, now_ms: u64) -> Vec<u32> {
        let mut due = Vec::new();
        wheel.turn(now_ms, &mut due);
        due.sort_unstable();
        due
    }

    #[test]
    fn a_timer_comes_out_when_it_is_due_and_not_before() {
        let mut wheel = Wheel::new(1000);
        wheel.set(1, 1005);
        assert_eq!(wheel.next_ms(), Some(1005));
        assert!(turn(&mut wheel, 1004).is_empty());
        assert_eq!(turn(&mut wheel, 1005), [1]);
        assert_eq!(wheel.next_ms(), None);
    }

    #[test]
    fn a_timer_in_the_past_is_due_at_the_next_tick() {
        let mut wheel = Wheel::new(1000);
        wheel.set(1, 5);
        assert_eq!(turn(&mut wheel, 1001), [1]);
    }

    #[test]
    fn a_timer_that_is_set_again_has_moved_and_a_cancelled_one_is_gone() {
        let mut wheel = Wheel::new(0);
        for due_ms in [600_000, 1, 600_001, 7] {
            wheel.set(3, due_ms);
        }
        wheel.set(4, 7);
        wheel.cancel(4);
        wheel.cancel(5);
        assert_eq!(turn(&mut wheel, 7), [3]);
        assert!(turn(&mut wheel, 700_000).is_empty());
        assert_eq!(wheel.nodes.len(), 5);
    }

    proptest! {
        #[test]
        fn every_timer_comes_out_once_in_the_turn_that_reaches_it(
            start in 0u64..1 << 45,
            rounds in proptest::collection::vec(
                (proptest::collection::vec((0u32..40, proptest::option::of(0u64..1 << 34)), 0..12), 1u64..1 << 32),
                1..40,
            ),
        ) {
            let mut wheel = Wheel::new(start);
            let mut model: HashMap<u32, u64> = HashMap::new();
            let mut now = start;
            for (changes, step) in rounds {
                for (id, delay) in changes {
                    match delay {
                        Some(delay) => {
                            wheel.set(id, now + delay);
                            model.insert(id, (now + delay).max(now + 1));
                        }
                        None => {
                            wheel.cancel(id);
                            model.remove(&id);
                        }
                    }
                }
                match (model.values().min(), wheel.next_ms()) {
                    (Some(first), next) => prop_assert!(next.is_some_and(|next| next <= *first)),
                    (None, next) => prop_assert_eq!(next, None),
                }
                now += step;
                let mut expected: Vec<u32> =
                    model.iter().filter(|(_, due)| **due <= now).map(|(id, _)| *id).collect();
                model.retain(|_, due| *due > now);
                expected.sort_unstable();
                prop_assert_eq!(turn(&mut wheel, now), expected);
            }
        }
    }
}
