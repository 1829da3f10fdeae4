//! The busiest sessions of each worker, for whoever looks at the status: in memory that the master creates, because
//! whichever worker is asked has to tell of all of them. A worker writes here only while somebody asks.

use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering::Acquire, Ordering::Relaxed, Ordering::Release, fence};

use anyhow::{Context, Result};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::counters::MAX_WORKERS;
use crate::sessions::{address, address_words};
use crate::sys::shm::{Shareable, Shared};

/// Sessions that each worker tells of.
pub const BUSIEST: usize = 16;
/// How long after the last question workers go on telling.
pub const ASKED_FOR_MS: u64 = 10_000;
/// What was told longer ago is not shown: its worker may be gone.
const STALE_MS: u64 = 5_000;

const WORDS: usize = 13;

/// One live session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BusySession {
    /// Its number.
    pub number: u64,
    /// The client.
    pub client: SocketAddr,
    /// The listener's row on the board.
    pub listener: u32,
    /// The peer's row on the board, if it has one.
    pub peer: Option<u32>,
    /// The kernel carries it.
    pub in_kernel: bool,
    /// When it was accepted, in milliseconds of CLOCK_MONOTONIC.
    pub started_ms: u64,
    /// Bytes so far, by direction.
    pub bytes: [u64; 2],
    /// Bytes in a second, by direction, lately.
    pub rates: [u64; 2],
    /// Times that a source was held back.
    pub pauses: u64,
}

/// What all workers tell, and who asks.
#[repr(C)]
struct BusyBoard {
    /// When somebody last asked, in milliseconds of CLOCK_MONOTONIC.
    asked_ms: AtomicU64,
    rows: [BusyRow; MAX_WORKERS],
}

// SAFETY: only atomics, in a `repr(C)` layout; all zeros is a valid value.
unsafe impl Shareable for BusyBoard {}

/// What one worker tells.
#[repr(C)]
struct BusyRow {
    /// Odd while it is being written.
    version: AtomicU64,
    /// When it was written, on the same clock.
    told_ms: AtomicU64,
    /// Bytes in a second of all its sessions, by direction.
    rates: [AtomicU64; 2],
    count: AtomicU64,
    sessions: [[AtomicU64; WORDS]; BUSIEST],
}

/// The board, and the bell that wakes every worker to write on it.
pub struct Lookout {
    board: Shared<BusyBoard>,
    bell: EventFd,
}

impl Lookout {
    /// For all workers that are forked from now on.
    ///
    /// # Errors
    /// There is no memory or descriptor for it.
    pub fn new() -> Result<Lookout> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Lookout {
            board: Shared::anonymous(1)?,
            bell: EventFd::from_flags(flags).context("failed to create an eventfd")?,
        })
    }

    /// The bell's number, for a list of what to keep open.
    pub fn raw_fd(&self) -> RawFd {
        self.bell.as_raw_fd()
    }

    /// Somebody asks. True: nobody had for long enough that workers have stopped telling.
    pub fn ask(&self, now_ms: u64) -> bool {
        let before = self.board[0].asked_ms.swap(now_ms, Relaxed);
        let stopped = now_ms.saturating_sub(before) >= ASKED_FOR_MS;
        if stopped {
            // It is never read, so that each worker's edge-triggered poll sees each stroke; the counter holds
            // more strokes than there will ever be. A failure only means that the answer is an old one.
            let _ = self.bell.write(1);
        }
        stopped
    }

    /// Whether somebody wants to know.
    pub fn is_asked(&self, now_ms: u64) -> bool {
        let asked_ms = self.board[0].asked_ms.load(Relaxed);
        asked_ms != 0 && now_ms.saturating_sub(asked_ms) < ASKED_FOR_MS
    }

    /// Writes what the worker of a row has to tell; sessions beyond [`BUSIEST`] are left out.
    pub fn tell(&self, row: usize, sessions: &[BusySession], rates: [u64; 2], now_ms: u64) {
        let Some(row) = self.board[0].rows.get(row) else {
            return;
        };
        row.version.fetch_add(1, Acquire);
        fence(Release);
        for (place, session) in row.sessions.iter().zip(sessions) {
            for (word, value) in place.iter().zip(session.encode()) {
                word.store(value, Relaxed);
            }
        }
        row.count.store(sessions.len().min(BUSIEST) as u64, Relaxed);
        row.rates
            .iter()
            .zip(rates)
            .for_each(|(word, rate)| word.store(rate, Relaxed));
        row.told_ms.store(now_ms, Relaxed);
        row.version.fetch_add(1, Release);
    }

    /// What the worker of a row told lately: its sessions, and bytes in a second of all that it has.
    pub fn told(&self, row: usize, now_ms: u64) -> Option<(Vec<BusySession>, [u64; 2])> {
        let row = self.board[0].rows.get(row)?;
        // Writing takes microseconds: who meets it twice in a row has met a worker that died at it.
        for _ in 0..3 {
            let version = row.version.load(Acquire);
            let told_ms = row.told_ms.load(Relaxed);
            let count = row.count.load(Relaxed) as usize;
            let sessions: Vec<[u64; WORDS]> = row
                .sessions
                .iter()
                .take(count)
                .map(|words| std::array::from_fn(|at| words[at].load(Relaxed)))
                .collect();
            let rates = [0, 1].map(|way| row.rates[way].load(Relaxed));
            fence(Acquire);
            if version % 2 == 0 && row.version.load(Relaxed) == version {
                let fresh = told_ms != 0 && now_ms.saturating_sub(told_ms) < STALE_MS;
                let sessions = sessions.iter().filter_map(BusySession::decode).collect();
                return fresh.then_some((sessions, rates));
            }
        }
        None
    }

    /// Forgets what a worker before told, so that the row's next one is not taken for it.
    pub fn forget(&self, row: usize) {
        if let Some(row) = self.board[0].rows.get(row) {
            let version = row.version.load(Relaxed);
            row.version.store(version.next_multiple_of(2), Relaxed);
            row.told_ms.store(0, Relaxed);
        }
    }
}

impl AsFd for Lookout {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

impl BusySession {
    fn encode(&self) -> [u64; WORDS] {
        let [client, high, low] = address_words(self.client);
        let rows = u64::from(self.listener) | u64::from(self.peer.unwrap_or(u32::MAX)) << 32;
        let [up, down] = self.bytes;
        let [up_rate, down_rate] = self.rates;
        let kernel = u64::from(self.in_kernel);
        [
            self.number,
            client,
            high,
            low,
            rows,
            kernel,
            self.started_ms,
            up,
            down,
            up_rate,
            down_rate,
            self.pauses,
            0,
        ]
    }

    fn decode(words: &[u64; WORDS]) -> Option<BusySession> {
        let peer = (words[4] >> 32) as u32;
        Some(BusySession {
            number: words[0],
            client: address(&words[1..4])?,
            listener: words[4] as u32,
            peer: Some(peer).filter(|row| *row != u32::MAX),
            in_kernel: words[5] != 0,
            started_ms: words[6],
            bytes: [words[7], words[8]],
            rates: [words[9], words[10]],
            pauses: words[11],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(number: u64) -> BusySession {
        BusySession {
            number,
            client: "[2001:db8::7]:5000".parse().unwrap(),
            listener: 3,
            peer: (number > 1).then_some(4),
            in_kernel: true,
            started_ms: 5,
            bytes: [6, 7],
            rates: [8, 9],
            pauses: 10,
        }
    }

    #[test]
    fn what_is_told_is_read_until_it_is_old() {
        let lookout = Lookout::new().unwrap();
        assert_eq!(lookout.told(3, 100), None);
        lookout.tell(3, &[session(1), session(2)], [11, 12], 100);
        let told = Some((vec![session(1), session(2)], [11, 12]));
        assert_eq!(lookout.told(3, 200), told);
        assert_eq!(lookout.told(3, 100 + STALE_MS), None);
        lookout.forget(3);
        assert_eq!(lookout.told(3, 200), None);
        let many: Vec<BusySession> = (0..100).map(session).collect();
        lookout.tell(3, &many, [0, 0], 100);
        assert_eq!(lookout.told(3, 100).unwrap().0.len(), BUSIEST);
    }

    #[test]
    fn the_bell_rings_only_for_those_who_have_stopped_telling() {
        let lookout = Lookout::new().unwrap();
        assert!(!lookout.is_asked(50_000));
        assert!(lookout.ask(50_000));
        assert!(lookout.is_asked(50_001));
        assert!(!lookout.ask(50_000 + ASKED_FOR_MS - 1));
        assert!(!lookout.is_asked(50_000 + 2 * ASKED_FOR_MS));
        assert!(lookout.ask(50_000 + 2 * ASKED_FOR_MS));
    }
}
