//! How many sessions there are for each key, and how fast they come: `limit_conn` and `limit_conn_rate`. The counts lie in
//! memory that the master makes before its first fork, so they are those of the whole program, whatever
//! reloads and deaths of workers come.
//!
//! A key is known by its hash, 64 bits with a secret of this run. A session that counts has a hold, which says who
//! cares for it and what it counts in: when a worker dies, the master gives back what its sessions held. What a bucket
//! counts is raised under its lock, which names its holder, for a few instructions without a system call; it is lowered
//! without, because that may not fail: a holder can be stopped for longer than anybody waits.

use std::collections::HashSet;
use std::hash::{BuildHasher, DefaultHasher, Hash, Hasher, RandomState};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::ids::Owner;
use crate::sys::shm::{Shareable, Shared};

/// The version of this layout; change it whenever something changes its place or meaning.
const LAYOUT: &str = "culvert limits, layout 2";

/// How the counts are laid out and how keys are hashed, for two binaries to compare.
pub fn layout() -> String {
    format!(
        "{LAYOUT}, {BUCKETS} buckets of {} and {HOLDS} holds of {} bytes, hash {:016x}",
        size_of::<Bucket>(),
        size_of::<Hold>(),
        print([1, 2], "zone", "key")
    )
}

/// Buckets of [`CELLS`] keys: from about 100,000 keys at once, one in ten thousand finds its bucket full.
const BUCKETS: usize = 1 << 14;
const CELLS: usize = 16;
/// Sessions that can be counted at once, one for each `limit_conn` that applies to it.
const HOLDS: usize = 1 << 20;
/// Holds that are asked at most before there is none.
const ASK: usize = 4096;
/// From one that is taken to the next that is asked: those beside it are most likely another worker's as well. It shares
/// no divisor with their number, so none is asked twice.
const LEAP: usize = 40_503;
/// How long a lock is waited for: a host that has more to do than it can leaves its holder without its CPU for some
/// milliseconds, and so long the master may need to free that of a holder that died.
const LOCK_PATIENCE: Duration = Duration::from_millis(50);

/// `limit_conn` entries that one session can count in.
pub const MAX_HOLDS: usize = 4;

#[repr(C)]
struct Bucket {
    /// The worker that changes it ([`Owner`]); 0: nobody.
    lock: AtomicU32,
    unused: AtomicU32,
    cells: [Cell; CELLS],
}

/// One key.
#[repr(C)]
struct Cell {
    /// The key's hash; 0: free.
    print: AtomicU64,
    /// Sessions.
    count: AtomicU32,
    unused: AtomicU32,
    /// When all connections so far would have come, had they come at the rate: microseconds of CLOCK_MONOTONIC.
    due_us: AtomicU64,
}

#[repr(C)]
struct Hold {
    /// The worker that cares for the session ([`Owner`]); 0: free.
    owner: AtomicU32,
    /// The cell that it counts in, by its number from 1; 0: none yet.
    cell: AtomicU32,
}

// SAFETY: only atomics in a `repr(C)` layout; zero is valid, and so is anything else: indices are checked.
unsafe impl Shareable for Bucket {}
// SAFETY: as above.
unsafe impl Shareable for Hold {}

/// Names a session's count; never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held(pub u32);

/// Why a session is not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The limit is reached.
    Limit,
    /// There is no room to count it.
    Full,
}

/// All counts of the program.
pub struct Limits {
    buckets: Shared<Bucket>,
    holds: Shared<Hold>,
    secret: [u64; 2],
    /// The memory of both.
    files: [OwnedFd; 2],
}

/// The holds that a worker has given back, to be asked first, and where it looks for others.
pub struct Desk {
    owner: Owner,
    free: Vec<u32>,
    next: usize,
}

impl Desk {
    /// A worker's own.
    pub fn new(owner: Owner) -> Desk {
        // Workers begin in different places.
        let next = (owner.0 as usize).wrapping_mul(LEAP) * 16 % HOLDS;
        Desk {
            owner,
            free: Vec::new(),
            next,
        }
    }
}

impl Limits {
    /// Nothing counted yet.
    ///
    /// # Errors
    /// No memory can be mapped. Pages that are never touched take none.
    pub fn new() -> Result<Limits> {
        let (buckets, buckets_file) = Shared::in_file(c"culvert-limits", BUCKETS)?;
        let (holds, holds_file) = Shared::in_file(c"culvert-limits-holds", HOLDS)?;
        let random = RandomState::new();
        Ok(Limits {
            buckets,
            holds,
            secret: [random.hash_one(0), random.hash_one(1)],
            files: [buckets_file, holds_file],
        })
    }

    /// The counts of the binary before, with what its [`Limits::descriptors`] and [`Limits::secret`] said.
    ///
    /// # Errors
    /// The memory cannot be mapped.
    pub fn taken_over(files: [OwnedFd; 2], secret: [u64; 2]) -> Result<Limits> {
        Ok(Limits {
            buckets: Shared::of_fd(files[0].as_fd(), BUCKETS)?,
            holds: Shared::of_fd(files[1].as_fd(), HOLDS)?,
            secret,
            files,
        })
    }

    /// The memory, for another binary.
    pub fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        self.files.each_ref().map(AsFd::as_fd)
    }

    /// What keys are hashed with.
    pub fn secret(&self) -> [u64; 2] {
        self.secret
    }

    /// What a key of a zone is known by.
    pub fn print(&self, zone: &str, key: &str) -> u64 {
        print(self.secret, zone, key)
    }

    /// Counts a session, if fewer than `limit` are counted.
    ///
    /// # Errors
    /// It is not counted.
    pub fn hold(&self, desk: &mut Desk, print: u64, limit: u32, now_us: u64) -> Result<Held, Refused> {
        let held = self.take(desk).ok_or(Refused::Full)?;
        let counted = self.change(desk.owner, bucket_of(print), |bucket| {
            let (number, cell) = find(bucket, print, now_us).ok_or(Refused::Full)?;
            if cell.count.load(Relaxed) >= limit {
                return Err(Refused::Limit);
            }
            // First the hold: what a dead worker was about to count may be taken off without having been counted,
            // which lasts until the key is unused. The other way round it would count for ever.
            let number = bucket_of(print) * CELLS + number + 1;
            self.holds[held].cell.store(number as u32, Release);
            cell.count.fetch_add(1, Release);
            Ok(())
        });
        match counted.unwrap_or(Err(Refused::Full)) {
            Ok(()) => Ok(Held(held as u32 + 1)),
            Err(refused) => {
                self.holds[held].owner.store(0, Release);
                desk.free.push(held as u32);
                Err(refused)
            }
        }
    }

    /// Lets a connection in, if those of its key come at `interval_us` on average, `burst` more at most at once
    /// (nginx: limit_req with nodelay).
    ///
    /// # Errors
    /// It comes too early, and does not count.
    pub fn pace(
        &self,
        by: Owner,
        print: u64,
        interval_us: u64,
        burst: u32,
        now_us: u64,
    ) -> Result<(), Refused> {
        let let_in = self.change(by, bucket_of(print), |bucket| {
            let (_, cell) = find(bucket, print, now_us).ok_or(Refused::Full)?;
            let due_us = cell.due_us.load(Relaxed).max(now_us);
            if due_us - now_us > interval_us.saturating_mul(burst.into()) {
                return Err(Refused::Limit);
            }
            cell.due_us.store(due_us.saturating_add(interval_us), Relaxed);
            Ok(())
        });
        let_in.unwrap_or(Err(Refused::Full))
    }

    /// A session is over.
    pub fn release(&self, desk: &mut Desk, held: Held) {
        if self.uncount(held) {
            desk.free.push(held.0 - 1);
        }
    }

    /// Another worker cares for the session now.
    pub fn pass_to(&self, held: Held, owner: Owner) {
        if let Some(hold) = self.holds.get((held.0 as usize).wrapping_sub(1)) {
            hold.owner.store(owner.0, Release);
        }
    }

    /// A worker is gone: what its sessions held is given back, except for those that live on.
    pub fn bury(&self, owner: Owner, lives_on: &HashSet<u32>) {
        for bucket in self.buckets.iter() {
            let _ = bucket.lock.compare_exchange(owner.0, 0, Release, Relaxed);
        }
        for (index, hold) in self.holds.iter().enumerate() {
            let held = index as u32 + 1;
            if hold.owner.load(Acquire) == owner.0 && !lives_on.contains(&held) {
                self.uncount(Held(held));
            }
        }
    }

    /// How many sessions a key has.
    #[cfg(test)]
    fn count(&self, print: u64) -> u32 {
        let cells = &self.buckets[bucket_of(print)].cells;
        let cell = cells.iter().find(|cell| cell.print.load(Relaxed) == print);
        cell.map_or(0, |cell| cell.count.load(Relaxed))
    }

    fn take(&self, desk: &mut Desk) -> Option<usize> {
        let claim = |index: usize| {
            let free = self.holds[index]
                .owner
                .compare_exchange(0, desk.owner.0, Acquire, Relaxed);
            free.is_ok().then_some(index)
        };
        while let Some(index) = desk.free.pop() {
            if let Some(index) = claim(index as usize) {
                return Some(index);
            }
        }
        for _ in 0..ASK {
            let index = desk.next;
            let claimed = claim(index);
            desk.next = (index + if claimed.is_some() { 1 } else { LEAP }) % HOLDS;
            if claimed.is_some() {
                return claimed;
            }
        }
        None
    }

    fn uncount(&self, held: Held) -> bool {
        let Some(hold) = self.holds.get((held.0 as usize).wrapping_sub(1)) else {
            return false;
        };
        if let Some(cell) = (hold.cell.load(Acquire) as usize)
            .checked_sub(1)
            .filter(|cell| *cell < BUCKETS * CELLS)
        {
            let count = &self.buckets[cell / CELLS].cells[cell % CELLS].count;
            let _ = count.fetch_update(Relaxed, Relaxed, |count| count.checked_sub(1));
        }
        hold.cell.store(0, Relaxed);
        hold.owner.store(0, Release);
        true
    }

    /// Does something with a bucket that nobody else does meanwhile; `None`: it was not done.
    fn change<T>(&self, by: Owner, bucket: usize, work: impl FnOnce(&Bucket) -> T) -> Option<T> {
        let bucket = &self.buckets[bucket];
        let mut tries = 0u32;
        let mut since: Option<Instant> = None;
        while bucket.lock.compare_exchange(0, by.0, Acquire, Relaxed).is_err() {
            tries = tries.wrapping_add(1);
            if !tries.is_multiple_of(64) {
                std::hint::spin_loop();
                continue;
            }
            std::thread::yield_now();
            if since.get_or_insert_with(Instant::now).elapsed() > LOCK_PATIENCE {
                return None;
            }
        }
        let done = work(bucket);
        bucket.lock.store(0, Release);
        Some(done)
    }
}

fn print(secret: [u64; 2], zone: &str, key: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    (secret, zone, key).hash(&mut hasher);
    hasher.finish().max(1)
}

fn bucket_of(print: u64) -> usize {
    print as usize % BUCKETS
}

/// The cell of a key, or a free one that is the key's from now on.
fn find(bucket: &Bucket, print: u64, now_us: u64) -> Option<(usize, &Cell)> {
    let mut cells = bucket.cells.iter().enumerate();
    if let Some(found) = cells.find(|(_, cell)| cell.print.load(Relaxed) == print) {
        return Some(found);
    }
    let is_free = |cell: &Cell| cell.count.load(Relaxed) == 0 && cell.due_us.load(Relaxed) <= now_us;
    let free = bucket.cells.iter().enumerate().find(|(_, cell)| is_free(cell))?;
    free.1.due_us.store(0, Relaxed);
    free.1.print.store(print, Relaxed);
    Some(free)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_as_many_sessions_as_its_limit_says_whoever_counts_them() {
        let limits = Limits::new().unwrap();
        let (mut one, mut two) = (Desk::new(Owner(1)), Desk::new(Owner(2)));
        let (key, other) = (limits.print("z", "a"), limits.print("z", "b"));
        let first = limits.hold(&mut one, key, 2, 0).unwrap();
        limits.hold(&mut two, key, 2, 0).unwrap();
        assert_eq!(limits.hold(&mut one, key, 2, 0), Err(Refused::Limit));
        assert_eq!(limits.hold(&mut two, key, 2, 0), Err(Refused::Limit));
        limits.hold(&mut one, other, 1, 0).unwrap();
        limits.release(&mut one, first);
        limits.hold(&mut two, key, 2, 0).unwrap();
        assert_eq!(limits.count(key), 2);
    }

    #[test]
    fn what_a_dead_worker_held_is_given_back_except_for_what_lives_on() {
        let limits = Limits::new().unwrap();
        let (mut dead, mut heir) = (Desk::new(Owner(1)), Desk::new(Owner(2)));
        let key = limits.print("z", "a");
        let held: Vec<Held> = (0..5)
            .map(|_| limits.hold(&mut dead, key, 9, 0).unwrap())
            .collect();
        limits.pass_to(held[0], Owner(2));
        // It died in the middle of a change.
        limits.buckets[bucket_of(key)].lock.store(1, Relaxed);
        limits.bury(Owner(1), &HashSet::from([held[1].0]));
        assert_eq!(limits.count(key), 2);
        limits.pass_to(held[1], Owner(2));
        limits.release(&mut heir, held[0]);
        limits.release(&mut heir, held[1]);
        assert_eq!(limits.count(key), 0);
        limits.bury(Owner(1), &HashSet::new());
        assert_eq!(limits.count(key), 0);
    }

    #[test]
    fn a_session_that_ends_is_not_counted_any_more_though_a_worker_was_stopped_while_it_counted_another() {
        let limits = Limits::new().unwrap();
        let mut desk = Desk::new(Owner(1));
        let key = limits.print("z", "a");
        let held = limits.hold(&mut desk, key, 9, 0).unwrap();
        let lock = &limits.buckets[bucket_of(key)].lock;
        lock.store(2, Relaxed);
        limits.release(&mut desk, held);
        lock.store(0, Relaxed);
        assert_eq!(limits.count(key), 0);
    }

    #[test]
    fn a_client_is_not_refused_because_a_worker_waits_for_its_cpu_while_it_counts_another() {
        let limits = Limits::new().unwrap();
        let key = limits.print("z", "a");
        let lock = &limits.buckets[bucket_of(key)].lock;
        lock.store(2, Relaxed);
        let begun = Instant::now();
        let counted = std::thread::scope(|scope| {
            let other = scope.spawn(|| limits.hold(&mut Desk::new(Owner(1)), key, 9, 0));
            std::thread::sleep(LOCK_PATIENCE / 5);
            lock.store(0, Release);
            other.join().unwrap()
        });
        let took = begun.elapsed();
        assert!(
            counted.is_ok() || took > LOCK_PATIENCE,
            "{counted:?} after {took:?}"
        );
    }

    #[test]
    fn a_worker_finds_a_hold_though_it_begins_to_look_where_another_has_many() {
        let limits = Limits::new().unwrap();
        let (mut one, mut two) = (Desk::new(Owner(1)), Desk::new(Owner(2)));
        two.next = one.next + 10;
        let key = limits.print("z", "a");
        for _ in 0..2 * ASK {
            limits.hold(&mut one, key, u32::MAX, 0).unwrap();
        }
        limits.hold(&mut two, key, u32::MAX, 0).unwrap();
    }

    #[test]
    fn connections_come_at_the_rate_and_a_burst_at_once() {
        let limits = Limits::new().unwrap();
        let key = limits.print("z", "a");
        let pace = |now_us| limits.pace(Owner(1), key, 100_000, 2, now_us);
        let burst: Vec<bool> = (0..5).map(|_| pace(1_000_000).is_ok()).collect();
        assert_eq!(burst, [true, true, true, false, false]);
        assert_eq!(pace(1_099_999), Err(Refused::Limit));
        assert_eq!(pace(1_100_000), Ok(()));
        assert_eq!(pace(1_100_000), Err(Refused::Limit));
        let later: Vec<bool> = (0..4).map(|_| pace(9_000_000).is_ok()).collect();
        assert_eq!(later, [true, true, true, false]);
    }

    #[test]
    fn keys_that_are_unused_make_room_and_a_full_bucket_refuses() {
        let limits = Limits::new().unwrap();
        let mut desk = Desk::new(Owner(1));
        let keys: Vec<u64> = (1..=17).map(|n| n << 32 | 7).collect();
        let held: Vec<Held> = keys[..16]
            .iter()
            .map(|key| limits.hold(&mut desk, *key, 1, 0).unwrap())
            .collect();
        assert_eq!(limits.hold(&mut desk, keys[16], 1, 0), Err(Refused::Full));
        limits.release(&mut desk, held[3]);
        limits.hold(&mut desk, keys[16], 1, 0).unwrap();
    }

    #[test]
    fn threads_that_count_at_once_never_pass_the_limit_and_lose_none() {
        let limits = Limits::new().unwrap();
        let key = limits.print("z", "a");
        let inside = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for owner in 1..=4 {
                let (limits, inside) = (&limits, &inside);
                scope.spawn(move || {
                    let mut desk = Desk::new(Owner(owner));
                    for _ in 0..20_000 {
                        if let Ok(held) = limits.hold(&mut desk, key, 2, 0) {
                            assert!(inside.fetch_add(1, Relaxed) < 2, "more than the limit");
                            inside.fetch_sub(1, Relaxed);
                            limits.release(&mut desk, held);
                        }
                    }
                });
            }
        });
        assert_eq!(limits.count(key), 0);
    }
}
