//! The clock of a source that is held back: when its target will have drained, for the programs may not be there to say so.

use culvert_bpf::Outstanding;

/// The longest time after which a target that drains is looked at again.
const LONGEST_MS: u64 = 100;
/// The part of a round trip after which it is looked at first, where no less tells that it has drained.
const FIRST_PART: f64 = 0.25;

/// The clock.
#[derive(Debug, Clone, Copy)]
pub struct Drain {
    look_ms: u64,
    /// When its target was last looked at,
    seen_ms: u64,
    /// and what its peer had acknowledged then, low 32 bits.
    acked_bytes: u32,
}

impl Drain {
    /// The clock after a look; `former`: the one before it. At first its target is looked at again at the pace of its last round
    /// trip, and soon where little is on its way yet, then at the pace since the last look. Where nothing is
    /// acknowledged, after twice the time each time.
    pub fn after(former: Option<Drain>, now_ms: u64, now: &Outstanding) -> Drain {
        let above_bytes = f64::from(now.above_bytes);
        let wait_ms = match former {
            None => {
                let part = above_bytes / now.in_flight_bytes as f64;
                (1e3 * now.round_trip.as_secs_f64() * part.min(FIRST_PART)) as u64
            }
            Some(former) => {
                let elapsed_ms = now_ms.saturating_sub(former.seen_ms).max(1);
                match now.acked_bytes.wrapping_sub(former.acked_bytes) {
                    0 => 2 * elapsed_ms,
                    acked => (elapsed_ms as f64 * above_bytes / f64::from(acked)) as u64,
                }
            }
        };
        Drain {
            look_ms: now_ms + wait_ms.clamp(1, LONGEST_MS),
            seen_ms: now_ms,
            acked_bytes: now.acked_bytes,
        }
    }

    /// When its target is looked at.
    pub fn look_ms(&self) -> u64 {
        self.look_ms
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// The looks in so many milliseconds at a target that has `acked` acknowledged and `above` to go at each time.
    fn looks(for_ms: u64, acked: impl Fn(u64) -> u32, above: impl Fn(u64) -> u32) -> Vec<u64> {
        let (mut drain, mut now_ms, mut looks) = (None, 0, Vec::new());
        while now_ms <= for_ms {
            let now = Outstanding {
                acked_bytes: acked(now_ms),
                above_bytes: above(now_ms),
                in_flight_bytes: 0,
                round_trip: Duration::from_micros(100),
                is_deaf: false,
            };
            looks.push(now_ms);
            now_ms = drain.insert(Drain::after(drain, now_ms, &now)).look_ms();
        }
        looks
    }

    #[test]
    fn a_target_is_looked_at_when_it_has_drained_and_a_slow_one_rarely() {
        let stopped = looks(10_000, |_| 7, |_| 2_000_000);
        assert_eq!(stopped[..8], [0, 1, 3, 7, 15, 31, 63, 127]);
        assert_eq!(stopped.len(), 8 + 98, "every 100 ms");
        // 10 bytes each millisecond.
        let slow = looks(10_000, |now_ms| 10 * now_ms as u32, |_| 2_000_000);
        assert!(slow.len() < 105, "{slow:?}");
        // 50 ms, as it turns out at the second look.
        let above = |now_ms| 1_000_000u32.saturating_sub(20_000 * now_ms as u32);
        assert_eq!(looks(50, |now_ms| 20_000 * now_ms as u32, above), [0, 1, 50]);
    }

    #[test]
    fn what_is_all_on_its_way_is_looked_at_by_the_round_trip() {
        let first = |in_flight_bytes| {
            let now = Outstanding {
                acked_bytes: 0,
                above_bytes: 500_000,
                in_flight_bytes,
                round_trip: Duration::from_millis(80),
                is_deaf: false,
            };
            Drain::after(None, 1_000, &now).look_ms() - 1_000
        };
        assert_eq!(first(4_000_000), 10);
        // Little of it is yet.
        assert_eq!(first(1_448), 20);
        assert_eq!(first(0), 20);
    }
}
