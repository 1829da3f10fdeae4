//! What all workers know of a peer from checking it: when the next check is due and who runs it, how the last ones
//! ended, whether the peer is down for that. It lies on the board, in the peer's row.
//!
//! A check is run by the worker that moves `next_ms` on by compare-and-exchange, so by one of all. Until it is over
//! `next_ms` says when that worker is given up: then another one takes the check over. Times are milliseconds of
//! CLOCK_MONOTONIC.

use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU32, AtomicU64};

/// How much longer than its timeout a check may seem to take before its worker is given up: more than a busy worker
/// needs for one turn.
const GRACE_MS: u64 = 1_000;

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Outcome {
    /// The peer took the connection, and answered as it should.
    Passed = 1,
    /// It cannot be connected to.
    ConnectFailed = 2,
    /// It did not take the connection in time.
    ConnectTimeout = 3,
    /// It took the connection and said nothing in time.
    NoAnswer = 4,
    /// What it said is not what was expected.
    WrongAnswer = 5,
    /// It ended the connection before it had said anything.
    Closed = 6,
    /// The connection broke.
    Broken = 7,
}

impl Outcome {
    const ALL: [Outcome; 7] = [
        Outcome::Passed,
        Outcome::ConnectFailed,
        Outcome::ConnectTimeout,
        Outcome::NoAnswer,
        Outcome::WrongAnswer,
        Outcome::Closed,
        Outcome::Broken,
    ];

    /// The name that the status document uses.
    pub fn name(self) -> &'static str {
        match self {
            Outcome::Passed => "passed",
            Outcome::ConnectFailed => "connect_failed",
            Outcome::ConnectTimeout => "connect_timeout",
            Outcome::NoAnswer => "no_answer",
            Outcome::WrongAnswer => "wrong_answer",
            Outcome::Closed => "closed",
            Outcome::Broken => "connection_broken",
        }
    }
}

/// How long checks take at most and how often they come, as the configuration has it.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// From the start of one to the start of the next.
    pub interval_ms: u64,
    /// When one is given up.
    pub timeout_ms: u64,
}

impl Pace {
    /// No check that keeps this pace sets the next one further off.
    fn longest_ms(self) -> u64 {
        self.interval_ms.max(self.timeout_ms + GRACE_MS)
    }
}

/// A check that its holder is to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    until_ms: u64,
    resume_ms: u64,
}

/// What the end of a check has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// The peer is up again.
    Up,
    /// The peer is down.
    Down,
}

/// The checks of one peer.
#[derive(Debug, Default)]
#[repr(C)]
pub struct CheckRow {
    /// When the next one is due; while one is under way, when its worker is given up.
    next_ms: AtomicU64,
    /// When the next one is due if the worker of the one under way dies.
    resume_ms: AtomicU64,
    /// One more than the row of the worker that runs one; 0: none does.
    runner: AtomicU32,
    /// 1: the peer is down.
    down: AtomicU32,
    /// Results in a row that speak against `down`.
    streak: AtomicU32,
    /// The last [`Outcome`]; 0: there was none.
    last: AtomicU32,
    /// Checks that passed.
    pub passed: AtomicU64,
    /// Checks that failed.
    pub failed: AtomicU64,
}

impl CheckRow {
    /// When the next check is due. One that is further off than this pace has comes from another configuration, and is
    /// due now.
    pub fn due_ms(&self, pace: Pace, now_ms: u64) -> u64 {
        let next = self.next_ms.load(Relaxed);
        match next.saturating_sub(now_ms) > pace.longest_ms() {
            true => now_ms,
            false => next,
        }
    }

    /// Takes the check that is due for the worker with this row. `None`: none is, or another worker has it.
    pub fn claim(&self, worker_row: usize, pace: Pace, now_ms: u64) -> Option<Lease> {
        let next = self.next_ms.load(Relaxed);
        if self.due_ms(pace, now_ms) > now_ms {
            return None;
        }
        let lease = Lease {
            until_ms: now_ms + pace.timeout_ms + GRACE_MS,
            resume_ms: now_ms + pace.interval_ms,
        };
        self.next_ms
            .compare_exchange(next, lease.until_ms, AcqRel, Relaxed)
            .ok()?;
        self.resume_ms.store(lease.resume_ms, Relaxed);
        self.runner.store(worker_row as u32 + 1, Release);
        Some(lease)
    }

    /// Takes the end of a check down, and lets the next one come. Counts for nothing if it was taken over meanwhile.
    pub fn settle(&self, lease: Lease, outcome: Outcome, rise: u32, fall: u32) -> Option<Turn> {
        if self.next_ms.load(Acquire) != lease.until_ms {
            return None;
        }
        let passed = outcome == Outcome::Passed;
        self.last.store(outcome as u32, Relaxed);
        let counter = if passed { &self.passed } else { &self.failed };
        counter.fetch_add(1, Relaxed);
        let is_down = self.is_down();
        let mut turn = None;
        if passed != is_down {
            self.streak.store(0, Relaxed);
        } else {
            let streak = self.streak.load(Relaxed).saturating_add(1);
            let (needed, change) = if passed {
                (rise, Turn::Up)
            } else {
                (fall, Turn::Down)
            };
            let is_over = streak >= needed;
            self.streak.store(if is_over { 0 } else { streak }, Relaxed);
            if is_over {
                self.down.store((change == Turn::Down).into(), Relaxed);
                turn = Some(change);
            }
        }
        self.give_back(lease);
        turn
    }

    /// Lets the next check come without a result of this one.
    pub fn give_back(&self, lease: Lease) {
        self.runner.store(0, Relaxed);
        let _ = self
            .next_ms
            .compare_exchange(lease.until_ms, lease.resume_ms, Release, Relaxed);
    }

    /// A worker is gone: what it ran is over without a result.
    pub fn bury(&self, worker_row: usize) {
        if self.runner.load(Acquire) == worker_row as u32 + 1 {
            self.runner.store(0, Relaxed);
            let resume = self.resume_ms.load(Relaxed);
            // Never later than it would have been given up.
            let _ = self
                .next_ms
                .fetch_update(Release, Relaxed, |next| Some(next.min(resume)));
        }
    }

    /// The peer is not checked any more: what the checks found is no longer true. The counters stay.
    pub fn forget(&self) {
        for word in [&self.down, &self.streak, &self.last, &self.runner] {
            // A load first: storing would touch, and so allocate, the pages of unused rows.
            if word.load(Relaxed) != 0 {
                word.store(0, Relaxed);
            }
        }
        if self.next_ms.load(Relaxed) != 0 {
            self.next_ms.store(0, Relaxed);
        }
    }

    /// Whether the peer is to get nothing.
    pub fn is_down(&self) -> bool {
        self.down.load(Relaxed) != 0
    }

    /// How the last check ended; `None`: there was none yet.
    pub fn last(&self) -> Option<Outcome> {
        let last = self.last.load(Relaxed);
        Outcome::ALL.into_iter().find(|outcome| *outcome as u32 == last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACE: Pace = Pace {
        interval_ms: 100,
        timeout_ms: 50,
    };

    #[test]
    fn a_check_is_taken_by_one_worker_only() {
        let row = CheckRow::default();
        let taken = std::sync::atomic::AtomicU32::new(0);
        std::thread::scope(|scope| {
            for worker in 0..8 {
                let (row, taken) = (&row, &taken);
                scope.spawn(move || {
                    if row.claim(worker, PACE, 1_000).is_some() {
                        taken.fetch_add(1, Relaxed);
                    }
                });
            }
        });
        assert_eq!(taken.load(Relaxed), 1);
    }

    #[test]
    fn results_in_a_row_turn_a_peer_and_others_do_not() {
        let row = CheckRow::default();
        let mut now = 1_000;
        let mut one = |outcome| {
            now += PACE.interval_ms;
            let lease = row.claim(0, PACE, now).expect("a check is due");
            row.settle(lease, outcome, 2, 3)
        };
        let results = [
            (Outcome::NoAnswer, None),
            (Outcome::NoAnswer, None),
            (Outcome::Passed, None),
            (Outcome::NoAnswer, None),
            (Outcome::NoAnswer, None),
            (Outcome::Closed, Some(Turn::Down)),
            (Outcome::Closed, None),
            (Outcome::Passed, None),
            (Outcome::Closed, None),
            (Outcome::Passed, None),
            (Outcome::Passed, Some(Turn::Up)),
        ];
        for (at, (outcome, turn)) in results.into_iter().enumerate() {
            assert_eq!(one(outcome), turn, "the result at {at}");
        }
        assert_eq!((row.passed.load(Relaxed), row.failed.load(Relaxed)), (4, 7));
        assert_eq!(row.last(), Some(Outcome::Passed));
    }

    #[test]
    fn a_check_is_taken_over_from_a_worker_that_stopped_and_its_result_counts_no_more() {
        let row = CheckRow::default();
        let lost = row.claim(1, PACE, 1_000).expect("due");
        let until = 1_000 + PACE.timeout_ms + GRACE_MS;
        assert!(row.claim(2, PACE, until - 1).is_none());
        let taken = row.claim(2, PACE, until).expect("taken over");
        assert_eq!(row.settle(lost, Outcome::NoAnswer, 1, 1), None);
        assert!(!row.is_down());
        assert_eq!(row.settle(taken, Outcome::NoAnswer, 1, 1), Some(Turn::Down));
    }

    #[test]
    fn the_check_of_a_dead_worker_is_followed_by_the_next_one_at_its_time() {
        let row = CheckRow::default();
        row.claim(1, PACE, 1_000).expect("due");
        row.bury(2);
        assert_eq!(row.due_ms(PACE, 1_000), 1_000 + PACE.timeout_ms + GRACE_MS);
        row.bury(1);
        assert_eq!(row.due_ms(PACE, 1_000), 1_100);
    }

    #[test]
    fn a_shorter_interval_does_not_wait_for_the_end_of_the_longer_one() {
        let row = CheckRow::default();
        let hourly = Pace {
            interval_ms: 3_600_000,
            timeout_ms: 50,
        };
        let lease = row.claim(1, hourly, 1_000).expect("due");
        row.settle(lease, Outcome::Passed, 1, 1);
        assert!(row.claim(1, hourly, 2_000).is_none());
        assert!(row.claim(1, PACE, 2_000).is_some());
    }

    #[test]
    fn a_peer_that_is_not_checked_any_more_is_not_down() {
        let row = CheckRow::default();
        let lease = row.claim(1, PACE, 1_000).expect("due");
        assert_eq!(row.settle(lease, Outcome::Closed, 1, 1), Some(Turn::Down));
        let late = row.claim(1, PACE, 1_100).expect("due");
        row.forget();
        assert_eq!(row.settle(late, Outcome::Closed, 1, 1), None);
        assert!(!row.is_down() && row.last().is_none());
    }
}
