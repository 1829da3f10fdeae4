//! Who waits for a place at a group whose peers are all full: tickets in the order of arrival, over all workers.
//!
//! Each worker keeps its own waiting sessions in order, and shows on the board the ticket of the first and how many
//! there are. The lowest ticket of all is the one whose turn it is. A dead worker's tickets go with its row.

use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicU32, AtomicU64, fence};

use crate::counters::{Board, MAX_GROUPS, MAX_WORKERS, WorkerRow};

const TICKET: u64 = (1 << 48) - 1;

/// How long a session whose time is over holds the others up: longer, and its worker was stopped.
const GRACE_MS: u64 = 1_000;

/// The place of one session in the order of those that wait for a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The group's row.
    pub group: usize,
    /// Its ticket.
    pub ticket: u64,
}

impl Claim {
    /// Both in one word, never 0. A ticket has 48 bits: a million sessions a second would have to wait for nine years.
    pub(crate) fn to_word(self) -> u64 {
        (self.group as u64 + 1) << 48 | self.ticket & TICKET
    }

    /// What [`Claim::to_word`] made.
    pub(crate) fn of_word(word: u64) -> Option<Claim> {
        let group = (word >> 48).checked_sub(1)? as usize;
        let ticket = word & TICKET;
        (group < MAX_GROUPS && ticket != 0).then_some(Claim { group, ticket })
    }
}

/// The sessions of one worker that wait for one group.
#[derive(Debug, Default)]
#[repr(C)]
pub struct QueueRow {
    /// The ticket of the first; 0: none waits.
    first: AtomicU64,
    /// Until when that one waits.
    until_ms: AtomicU64,
    /// How many wait.
    waiting: AtomicU32,
}

impl QueueRow {
    /// Shows who is first now, until when, and how many there are.
    pub fn show(&self, first: Option<(u64, u64)>, waiting: u32) {
        let (ticket, until_ms) = first.unwrap_or_default();
        self.until_ms.store(until_ms, Relaxed);
        self.first.store(ticket, Relaxed);
        self.waiting.store(waiting, Relaxed);
    }

    /// Its worker is gone.
    pub fn clear(&self) {
        // A load first: storing zero would touch, and so allocate, every page of an unused row.
        if self.first.load(Relaxed) != 0 || self.waiting.load(Relaxed) != 0 {
            self.show(None, 0);
        }
    }
}

/// The counters of one group's queue.
#[derive(Debug, Default)]
#[repr(C)]
pub struct QueueCounters {
    /// Tickets given.
    pub queued: AtomicU64,
    /// Sessions that found no place in time.
    pub timed_out: AtomicU64,
    /// Sessions that found the queue full.
    pub overflowed: AtomicU64,
}

impl Board {
    fn worker_rows_in_use(&self) -> &[WorkerRow] {
        let rows = self.worker_rows.load(Relaxed) as usize;
        &self.workers[..rows.min(MAX_WORKERS)]
    }

    /// The ticket whose turn it is; `None`: nobody waits.
    pub fn first_in_queue(&self, group: usize, now_ms: u64) -> Option<u64> {
        let rows = self.worker_rows_in_use().iter().map(|row| &row.queues[group]);
        rows.filter(|row| row.until_ms.load(Relaxed).saturating_add(GRACE_MS) > now_ms)
            .map(|row| row.first.load(Relaxed))
            .filter(|ticket| *ticket != 0)
            .min()
    }

    /// How many sessions wait for a group.
    pub fn waiting(&self, group: usize) -> u64 {
        let rows = self.worker_rows_in_use().iter().map(|row| &row.queues[group]);
        rows.map(|row| u64::from(row.waiting.load(Relaxed))).sum()
    }

    /// Whether a session waits for any group; asked after a place was freed. A worker that begins to wait looks at the
    /// places after it has said so, hence one of both sees the other.
    pub fn is_anybody_waiting(&self) -> bool {
        fence(SeqCst);
        // Most programs have no queue, and pay a load.
        self.has_queued.load(Relaxed) != 0
            && self
                .worker_rows_in_use()
                .iter()
                .any(|row| row.waiting.load(Relaxed) != 0)
    }

    /// A session of this worker waits from now on, if fewer than `size` do: its ticket. One that has waited in another
    /// worker keeps its `own` ticket, and was counted before. Under the group's lock only.
    pub fn enqueue(
        &self,
        group: usize,
        worker: usize,
        size: u64,
        until_ms: u64,
        is_first: bool,
        own: Option<u64>,
    ) -> Option<u64> {
        let counters = &self.groups[group].queue;
        let waiting = self.waiting(group);
        if waiting >= size && own.is_none() {
            counters.overflowed.fetch_add(1, Relaxed);
            return None;
        }
        let ticket = own.unwrap_or_else(|| 1 + counters.queued.fetch_add(1, Relaxed));
        let worker = &self.workers[worker];
        let row = &worker.queues[group];
        if is_first {
            row.until_ms.store(until_ms, Relaxed);
            row.first.store(ticket, Relaxed);
        }
        row.waiting.fetch_add(1, Relaxed);
        worker.waiting.fetch_add(1, Relaxed);
        self.has_queued.store(1, Relaxed);
        fence(SeqCst);
        Some(ticket)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::shm::Shared;

    fn board() -> Shared<Board> {
        let board = Shared::<Board>::anonymous(1).expect("memory");
        board[0].worker_rows.store(3, Relaxed);
        board
    }

    #[test]
    fn the_lowest_ticket_of_all_workers_is_first_and_goes_with_its_worker() {
        let shared = board();
        let board = &shared[0];
        assert!(!board.is_anybody_waiting() && board.first_in_queue(7, 0).is_none());
        let first = board.enqueue(7, 2, 3, 9_000, true, None).expect("room");
        let second = board.enqueue(7, 0, 3, 9_000, true, None).expect("room");
        let third = board.enqueue(7, 0, 3, 9_000, false, None).expect("room");
        assert!(first < second && second < third);
        assert_eq!(board.enqueue(7, 1, 3, 9_000, true, None), None, "three wait");
        assert_eq!((board.waiting(7), board.first_in_queue(7, 0)), (3, Some(first)));
        assert!(board.is_anybody_waiting());
        board.clear_worker(2, 0);
        assert_eq!((board.waiting(7), board.first_in_queue(7, 0)), (2, Some(second)));
        board.workers[0].queues[7].show(Some((third, 9_000)), 1);
        assert_eq!((board.waiting(7), board.first_in_queue(7, 0)), (1, Some(third)));
        assert_eq!(board.waiting(6), 0, "groups have queues of their own");
    }

    #[test]
    fn a_worker_that_was_stopped_holds_the_others_up_no_longer_than_its_session_would_wait() {
        let shared = board();
        let board = &shared[0];
        board.enqueue(0, 0, 9, 1_000, true, None).expect("room");
        let next = board.enqueue(0, 1, 9, 5_000, true, None).expect("room");
        assert_ne!(board.first_in_queue(0, 1_000), Some(next));
        assert_eq!(board.first_in_queue(0, 1_000 + GRACE_MS), Some(next));
    }
}
