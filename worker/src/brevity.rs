//! Whether the sessions of a listener are so short, and those of the worker so many, that to put each pair into the sockmap
//! and to take it out again costs more than it saves: what `ebpf_offload_after = "auto"` goes by.
//!
//! Each worker judges by the sessions that it has ended itself.

use culvert_shared::counters::MAX_LISTENERS;

/// A session that has moved less, both ways together, is short.
pub const SHORT_BYTES: u64 = 8 * 1024;

/// What was seen counts half after each of these.
const HALF_MS: u64 = 256;

/// How many sessions the worker must have ended of late: about 500 to 1000 a second, a fifth of what it can. Where fewer
/// come, it has time enough for each.
const MANY: u32 = 256;

/// How many more of the listener's must have been short than were not.
const MOST: u32 = 8;

/// The sessions that a worker has ended of late.
pub struct Brevity {
    /// All.
    ended: Recent,
    /// Of each listener, by its row: how many more were short than were not.
    surplus: Box<[Recent]>,
}

/// A number that halves with time.
#[derive(Clone, Copy, Default)]
struct Recent {
    count: u32,
    /// When it was last halved: on the worker's clock, in units of [`HALF_MS`].
    halved: u64,
}

impl Default for Brevity {
    fn default() -> Brevity {
        Brevity {
            ended: Recent::default(),
            surplus: vec![Recent::default(); MAX_LISTENERS].into(),
        }
    }
}

impl Brevity {
    /// A session of a listener has ended that had moved so many bytes, both ways together.
    pub fn note(&mut self, listener: usize, bytes: u64, now_ms: u64) {
        let ended = self.ended.now(now_ms);
        *ended = ended.saturating_add(1);
        let surplus = self.surplus[listener].now(now_ms);
        *surplus = match bytes < SHORT_BYTES {
            true => surplus.saturating_add(1),
            false => surplus.saturating_sub(1),
        };
    }

    /// Whether the listener's next session is most likely a short one, and one of many.
    pub fn is_expected(&mut self, listener: usize, now_ms: u64) -> bool {
        *self.ended.now(now_ms) >= MANY && *self.surplus[listener].now(now_ms) >= MOST
    }
}

impl Recent {
    fn now(&mut self, now_ms: u64) -> &mut u32 {
        let now = now_ms / HALF_MS;
        let halvings = now.saturating_sub(self.halved);
        if halvings > 0 {
            self.count = self.count.checked_shr(halvings.min(32) as u32).unwrap_or(0);
            self.halved = now;
        }
        &mut self.count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ends `rate` sessions a second for `ms`, of `listeners` in turn, each of which has moved so many bytes, and asks.
    fn after(
        brevity: &mut Brevity,
        (from_ms, ms): (u64, u64),
        (rate, listeners): (u64, usize),
        bytes: impl Fn(u64) -> u64,
    ) -> bool {
        for n in 0..rate * ms / 1000 {
            brevity.note(n as usize % listeners, bytes(n), from_ms + n * 1000 / rate);
        }
        (0..listeners).all(|listener| brevity.is_expected(listener, from_ms + ms))
    }

    #[test]
    fn many_short_sessions_are_seen_within_a_fraction_of_a_second() {
        let mut brevity = Brevity::default();
        assert!(!after(&mut brevity, (1000, 60), (4000, 8), |_| 128));
        assert!(after(&mut brevity, (1060, 30), (4000, 8), |_| 128));
    }

    #[test]
    fn a_thousand_a_second_are_many_and_half_as_many_are_not() {
        let lasting = |rate| after(&mut Brevity::default(), (1000, 5000), rate, |_| 128);
        assert!(lasting((1100, 1)));
        assert!(lasting((1100, 8)));
        assert!(!lasting((490, 1)));
    }

    #[test]
    fn what_counts_is_what_most_sessions_of_the_listener_are() {
        let lasting = |listeners, bytes: &dyn Fn(u64) -> u64| {
            after(&mut Brevity::default(), (1000, 2000), (4000, listeners), bytes)
        };
        let long = |fifths: u64| move |n: u64| if n % 5 < fifths { 1 << 20 } else { 128 };
        assert!(lasting(1, &long(1)));
        assert!(!lasting(1, &long(3)));
        assert!(!lasting(1, &|_| SHORT_BYTES));
        let mut brevity = Brevity::default();
        after(&mut brevity, (1000, 2000), (4000, 2), |n| {
            if n % 2 == 0 { 1 << 20 } else { 128 }
        });
        assert!(!brevity.is_expected(0, 3000) && brevity.is_expected(1, 3000));
        assert!(!brevity.is_expected(2, 3000), "nothing is known of it");
    }

    #[test]
    fn what_was_is_forgotten() {
        let mut brevity = Brevity::default();
        assert!(after(&mut brevity, (1000, 2000), (8000, 1), |_| 0));
        assert!(!brevity.is_expected(0, 3000 + 6 * HALF_MS));
        assert!(!brevity.is_expected(0, u64::MAX));
        // A clock that goes back changes nothing.
        assert!(!brevity.is_expected(0, 0));
    }
}
