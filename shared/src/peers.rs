//! What all workers know of peers and of the groups that they form: health, load, whose turn it is. It lies on
//! the board, so that it is one and the same for the whole program, and outlives workers and reloads.
//!
//! Places and plain numbers; which peer is chosen is decided by the worker (`balance`). Times are milliseconds of
//! CLOCK_MONOTONIC, which all processes share.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicI64, AtomicU32, AtomicU64};
use std::time::{Duration, Instant};

use crate::health::CheckRow;
use crate::queue::QueueCounters;

/// How long a lock is waited for before its holder is taken for stopped. It is held for about a microsecond, but a host that
/// has more to do than it can leaves a holder without its CPU for some milliseconds; the master frees that of a dead one.
const LOCK_PATIENCE: Duration = Duration::from_millis(50);

/// For how long a session that is between two workers counts: adopting takes milliseconds. It lapses, so that
/// one that nobody adopts does not count for ever.
const TRANSIT_MS: u64 = 2_000;

/// Attempts to connect that failed.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Failures {
    /// `proxy_connect_timeout` ran out, or TCP's own patience.
    pub timeouts: AtomicU64,
    /// The peer, or the network, refused.
    pub errors: AtomicU64,
}

impl Failures {
    /// All of them.
    pub fn sum(&self) -> u64 {
        self.timeouts.load(Relaxed) + self.errors.load(Relaxed)
    }
}

/// One peer.
#[derive(Debug, Default)]
#[repr(C)]
pub struct PeerRow {
    /// Connections established.
    pub connected: AtomicU64,
    /// Attempts that failed.
    pub connect_failures: Failures,
    /// Bytes of ended sessions: to the peer, from the peer.
    pub bytes: [AtomicU64; 2],
    /// Attempts that failed since it was last seen alive: nginx's count for `max_fails`.
    pub fails: AtomicU32,
    /// By how much its weight is lowered because of failures; each pick takes one off.
    pub penalty: AtomicU32,
    /// When an attempt last failed.
    pub failed_ms: AtomicU64,
    /// When it was last tried after a failure.
    pub checked_ms: AtomicU64,
    /// Since when it has been alive again, for `slow_start`; 0: it was never out.
    pub live_since_ms: AtomicU64,
    /// What it has been passed over for, in smooth weighted round robin.
    pub turn: AtomicI64,
    /// How long connecting takes: a moving average in microseconds; 0: never connected.
    pub connect_us: AtomicU64,
    /// Sessions since then that another peer got because it was faster.
    pub passed_over: AtomicU64,
    /// What checks found.
    pub check: CheckRow,
    /// Its sessions that are between two workers.
    pub transit: Transit,
}

/// Sessions that are between two workers: for an instant one counts here and there, never nowhere. So whoever lets go of
/// one begins before its own gauge goes down, and whoever takes it in ends after its own went up.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Transit {
    /// How many (24 bits), above that until when they count (40 bits: 34 years). One word, because all workers let go
    /// of their sessions at the same time.
    word: AtomicU64,
}

const TRANSIT_BITS: u32 = 24;

fn transit_of(word: u64) -> (u64, u32) {
    (word >> TRANSIT_BITS, word as u32 & ((1 << TRANSIT_BITS) - 1))
}

impl Transit {
    /// Sessions are on their way from one worker to another.
    pub fn begin(&self, sessions: u32, now_ms: u64) {
        let raised = |word| {
            let (until_ms, before) = transit_of(word);
            let before = if now_ms < until_ms { before } else { 0 };
            let sessions = before.saturating_add(sessions).min((1 << TRANSIT_BITS) - 1);
            Some((now_ms + TRANSIT_MS) << TRANSIT_BITS | u64::from(sessions))
        };
        let _ = self.word.fetch_update(Release, Relaxed, raised);
    }

    /// Nothing is known of any.
    fn forget(&self) {
        self.word.store(0, Relaxed);
    }

    /// One of them has arrived.
    pub fn end(&self) {
        // Nothing is lowered where it has lapsed.
        let lowered = |word| (transit_of(word).1 > 0).then(|| word - 1);
        let _ = self.word.fetch_update(Release, Relaxed, lowered);
    }

    /// How many are on their way.
    pub fn count(&self, now_ms: u64) -> u32 {
        let (until_ms, sessions) = transit_of(self.word.load(Acquire));
        if now_ms < until_ms { sessions } else { 0 }
    }
}

impl PeerRow {
    /// A check has found it alive again.
    pub fn revive(&self, now_ms: u64) {
        self.fails.store(0, Relaxed);
        self.penalty.store(0, Relaxed);
        self.live_since_ms.store(now_ms, Relaxed);
    }

    /// Takes a connection's duration into the average so far: an eighth of it counts at once, as with TCP's round trips.
    pub fn note_connect_time(&self, mean_us: u64, took_us: u64) {
        let took = took_us.max(1);
        let mean = match mean_us {
            0 => took,
            mean => (7 * mean + took).div_ceil(8),
        };
        self.connect_us.store(mean, Relaxed);
        self.passed_over.store(0, Relaxed);
    }
}

/// What peers that are gone have counted together.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Former {
    /// See [`PeerRow::connected`].
    pub connected: AtomicU64,
    /// See [`PeerRow::connect_failures`].
    pub connect_failures: Failures,
    /// See [`PeerRow::bytes`].
    pub bytes: [AtomicU64; 2],
    /// See [`CheckRow::passed`].
    pub checks_passed: AtomicU64,
    /// See [`CheckRow::failed`].
    pub checks_failed: AtomicU64,
}

impl Former {
    /// Adds what a peer has counted, and makes its row that of a peer of whom nothing is known.
    pub fn take_in(&self, peer: &PeerRow) {
        let counters = [
            (&self.connected, &peer.connected),
            (&self.connect_failures.timeouts, &peer.connect_failures.timeouts),
            (&self.connect_failures.errors, &peer.connect_failures.errors),
            (&self.bytes[0], &peer.bytes[0]),
            (&self.bytes[1], &peer.bytes[1]),
            (&self.checks_passed, &peer.check.passed),
            (&self.checks_failed, &peer.check.failed),
        ];
        for (sum, counter) in counters {
            sum.fetch_add(counter.swap(0, Relaxed), Relaxed);
        }
        // All of them, so that a new field is not forgotten.
        let PeerRow {
            connected: _,
            connect_failures: _,
            bytes: _,
            fails,
            penalty,
            failed_ms,
            checked_ms,
            live_since_ms,
            turn,
            connect_us,
            passed_over,
            check,
            transit,
        } = peer;
        for number in [fails, penalty] {
            number.store(0, Relaxed);
        }
        for number in [failed_ms, checked_ms, live_since_ms, connect_us, passed_over] {
            number.store(0, Relaxed);
        }
        turn.store(0, Relaxed);
        check.forget();
        transit.forget();
    }
}

/// One group of peers.
#[derive(Debug, Default)]
#[repr(C)]
pub struct GroupRow {
    /// Held while a peer is chosen, so that workers choose one after the other.
    pub lock: Lock,
    /// Sessions for which no peer was to be had.
    pub refused: AtomicU64,
    /// What became of those that waited for a place.
    pub queue: QueueCounters,
    /// Of peers that were found by name and are gone.
    pub former: Former,
}

/// A lock between processes. It never sleeps in the kernel, and a holder that died or was stopped holds nobody up
/// for long: what it guards must make sense at every instant.
#[derive(Debug, Default)]
#[repr(transparent)]
pub struct Lock(AtomicU32);

impl Lock {
    /// Takes it for the worker with this row, and holds it as long as the value lives.
    pub fn take(&self, worker_row: usize) -> Held<'_> {
        let own = worker_row as u32 + 1;
        let mut tries = 0u32;
        let mut since: Option<Instant> = None;
        while let Err(holder) = self.0.compare_exchange(0, own, Acquire, Relaxed) {
            tries = tries.wrapping_add(1);
            if !tries.is_multiple_of(64) {
                std::hint::spin_loop();
                continue;
            }
            std::thread::yield_now();
            let is_over = since.get_or_insert_with(Instant::now).elapsed() > LOCK_PATIENCE;
            if is_over && self.0.compare_exchange(holder, own, Acquire, Relaxed).is_ok() {
                break;
            }
        }
        Held { lock: self, own }
    }

    /// The worker with this row is gone: it holds it no more.
    pub fn bury(&self, worker_row: usize) {
        let _ = self
            .0
            .compare_exchange(worker_row as u32 + 1, 0, Release, Relaxed);
    }
}

/// A lock that is held.
pub struct Held<'a> {
    lock: &'a Lock,
    own: u32,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        // If it was taken away meanwhile, it is another's to release.
        let _ = self.lock.0.compare_exchange(self.own, 0, Release, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_lets_one_in_at_a_time() {
        let lock = Lock::default();
        let sum = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for row in 0..4 {
                let (lock, sum) = (&lock, &sum);
                scope.spawn(move || {
                    for _ in 0..10_000 {
                        let _held = lock.take(row);
                        sum.store(sum.load(Relaxed) + 1, Relaxed);
                    }
                });
            }
        });
        assert_eq!(sum.load(Relaxed), 40_000);
    }

    #[test]
    fn a_lock_whose_holder_waits_for_its_cpu_stays_its_own_and_that_of_a_dead_one_is_free_at_once() {
        let lock = Lock::default();
        let is_held = AtomicU32::new(1);
        std::thread::scope(|scope| {
            let held = lock.take(3);
            let begun = Instant::now();
            let other = scope.spawn(|| {
                let _own = lock.take(5);
                is_held.load(Relaxed) == 1
            });
            std::thread::sleep(LOCK_PATIENCE / 5);
            is_held.store(0, Relaxed);
            drop(held);
            let took = begun.elapsed();
            let was_taken_away = other.join().expect("the other one");
            assert!(!was_taken_away || took > LOCK_PATIENCE, "after {took:?}");
        });
        std::mem::forget(lock.take(3));
        lock.bury(5);
        assert_eq!(lock.0.load(Relaxed), 4);
        lock.bury(3);
        assert_eq!(lock.0.load(Relaxed), 0);
    }

    #[test]
    fn a_lock_whose_holder_died_is_taken_over() {
        let lock = Lock::default();
        std::mem::forget(lock.take(3));
        drop(lock.take(5));
        assert_eq!(lock.0.load(Relaxed), 0);
        // The row of the dead one may be its successor's.
        std::mem::forget(lock.take(3));
        drop(lock.take(3));
        assert_eq!(lock.0.load(Relaxed), 0);
    }

    #[test]
    fn workers_that_let_go_of_sessions_at_once_lose_none_of_each_others() {
        const WORKERS: u32 = 3;
        let transit = Transit::default();
        let round = std::sync::Barrier::new(WORKERS as usize);
        let wrong = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for worker in 0..WORKERS {
                let (transit, round, wrong) = (&transit, &round, &wrong);
                scope.spawn(move || {
                    for now_ms in (1..5_000).map(|n| n * 2 * TRANSIT_MS) {
                        round.wait();
                        transit.begin(1, now_ms);
                        round.wait();
                        if worker == 0 && transit.count(now_ms) != WORKERS {
                            wrong.fetch_add(1, Relaxed);
                        }
                    }
                });
            }
        });
        assert_eq!(wrong.load(Relaxed), 0, "rounds in which sessions were lost");
    }

    #[test]
    fn a_session_between_two_workers_counts_until_it_arrives_or_is_given_up() {
        let transit = Transit::default();
        transit.begin(3, 1_000);
        transit.end();
        assert_eq!(transit.count(1_500), 2);
        assert_eq!(transit.count(1_000 + TRANSIT_MS), 0);
        transit.begin(1, 9_000);
        assert_eq!(transit.count(9_000), 1, "what was given up counts no more");
        transit.end();
        transit.end();
        assert_eq!(transit.count(9_000), 0);
    }
}
