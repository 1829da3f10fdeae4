//! How long to wait before a worker that died is replaced. Pure: time comes in, nothing is started here.

use std::time::Duration;

/// A worker that lived this long did not die of its own start.
const LIVED_WELL: Duration = Duration::from_secs(1);
/// The wait after the second quick death in a row; it doubles with each further one.
const FIRST_WAIT: Duration = Duration::from_millis(100);
/// The longest wait: a worker whose trouble has passed is back after at most this.
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// The quick deaths of one worker slot.
#[derive(Clone, Debug, Default)]
pub struct Backoff {
    quick_deaths: u32,
}

impl Backoff {
    /// Takes note of a death and returns how long to wait before the replacement.
    pub fn died_after(&mut self, lived: Duration) -> Duration {
        if lived >= LIVED_WELL {
            self.quick_deaths = 0;
            return Duration::ZERO;
        }
        self.quick_deaths = self.quick_deaths.saturating_add(1);
        match self.quick_deaths {
            1 => Duration::ZERO,
            deaths => FIRST_WAIT
                .saturating_mul(1 << (deaths - 2).min(16))
                .min(LONGEST_WAIT),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUICK: Duration = Duration::from_millis(5);

    #[test]
    fn a_single_death_is_replaced_at_once() {
        assert_eq!(Backoff::default().died_after(QUICK), Duration::ZERO);
        assert_eq!(
            Backoff::default().died_after(Duration::from_secs(60)),
            Duration::ZERO
        );
    }

    #[test]
    fn quick_deaths_in_a_row_double_the_wait_up_to_a_limit() {
        let mut backoff = Backoff::default();
        let waits: Vec<u128> = (0..9).map(|_| backoff.died_after(QUICK).as_millis()).collect();
        assert_eq!(waits, [0, 100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        for _ in 0..100 {
            assert_eq!(backoff.died_after(QUICK), LONGEST_WAIT);
        }
    }

    #[test]
    fn a_worker_that_lived_well_starts_the_count_anew() {
        let mut backoff = Backoff::default();
        for _ in 0..5 {
            backoff.died_after(QUICK);
        }
        assert_eq!(backoff.died_after(LIVED_WELL), Duration::ZERO);
        assert_eq!(backoff.died_after(QUICK), Duration::ZERO);
        assert_eq!(backoff.died_after(QUICK), FIRST_WAIT);
    }
}
