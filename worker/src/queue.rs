//! Sessions that wait for a place at a group whose peers are all full (`queue`). Whose turn it is, over all workers, is
//! on the board (`culvert_shared::queue`); here are this worker's sessions in their order, and what wakes them.
//!
//! Whoever frees a place rings a bell that all workers share, if anybody waits. A waiting session takes a place only
//! when its ticket is the lowest of all, so a place goes to whoever has waited longest.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use culvert_shared::counters::{Board, WorkerRow};
use culvert_shared::queue::Claim;
use mio::Interest;
use mio::unix::SourceFd;
use nix::sys::eventfd::EventFd;

use crate::clock;
use crate::drive::Next;
use crate::event_loop::{QUEUE_BELL, QUEUE_TIMER, Worker};
use crate::session::{Phase, Session};
use crate::sockets;
use crate::table::Token;

/// How often a worker whose sessions wait looks without having been called: places become free also because a worker
/// died, because a peer is up again, or because the limit was raised.
const LOOK_EVERY_MS: u64 = 100;

/// This worker's waiting sessions.
pub struct Queues {
    /// By group, in order of arrival.
    groups: Vec<VecDeque<Waiter>>,
    bell: Arc<EventFd>,
    /// The bell is listened to.
    listening: bool,
}

struct Waiter {
    ticket: u64,
    token: Token,
    until_ms: u64,
}

impl Queues {
    /// Nobody waits.
    pub fn new(groups: usize, bell: Arc<EventFd>) -> Queues {
        Queues {
            groups: (0..groups).map(|_| VecDeque::new()).collect(),
            bell,
            listening: false,
        }
    }

    fn is_empty(&self) -> bool {
        self.groups.iter().all(VecDeque::is_empty)
    }
}

impl Worker {
    /// The session waits for a place from now on. False: too many do, or its group has no queue.
    pub(crate) fn enqueue(&mut self, token: Token, session: &mut Session, group: usize) -> bool {
        let Some(queue) = self.config.upstreams[group].queue else {
            return false;
        };
        // One that has waited in another worker keeps its place and its time.
        let (own, until_ms) = match session.claim.take() {
            Some((claim, until_ms)) if claim.group == self.group_rows[group] => {
                (Some(claim.ticket), until_ms)
            }
            _ => (None, clock::now_ms() + queue.timeout.as_millis() as u64),
        };
        let waiters = &self.queues.groups[group];
        let at = own.map_or(waiters.len(), |own| {
            waiters.partition_point(|waiter| waiter.ticket < own)
        });
        let size = u64::from(queue.size);
        let Some(ticket) = self.groups[group].enqueue(&self.scene(), size, until_ms, at == 0, own) else {
            return false;
        };
        let waiter = Waiter {
            ticket,
            token,
            until_ms,
        };
        self.queues.groups[group].insert(at, waiter);
        session.phase = Phase::Waiting {
            deadline_ms: until_ms,
            ticket,
        };
        // If its last peer failed, the master has another socket of it.
        self.keep_again(token, session);
        if session.seat.is_none_or(|seat| !seat.kept) {
            self.note_young(token, session);
        }
        if !self.queues.listening {
            let bell = &mut SourceFd(&self.queues.bell.as_fd().as_raw_fd());
            // Without it, the timer alone brings them on.
            self.queues.listening = self
                .poll
                .registry()
                .register(bell, QUEUE_BELL, Interest::READABLE)
                .is_ok();
            self.wheel.set(QUEUE_TIMER, clock::now_ms() + LOOK_EVERY_MS);
        }
        true
    }

    /// The place of a session that waits, for the worker that goes on with it.
    pub(crate) fn claim_of(&self, session: &Session) -> Option<Claim> {
        let (Phase::Waiting { ticket, .. }, Some((group, _))) = (session.phase, &session.tried) else {
            return None;
        };
        let group = self.group_rows[*group];
        Some(Claim { group, ticket })
    }

    /// A session that has waited in another worker, or that was to leave for one, waits here.
    pub(crate) fn wait_again(&mut self, token: Token, session: &mut Session) -> Next {
        self.recall_hello(session);
        session.phase = Phase::Connecting { deadline_ms: 0 };
        self.connect(token, session)
    }

    /// The session waits no more, for whatever reason.
    pub(crate) fn leave_queue(&mut self, session: &Session) {
        let (Phase::Waiting { ticket, .. }, Some((group, _))) = (session.phase, &session.tried) else {
            return;
        };
        let waiters = &mut self.queues.groups[*group];
        let Ok(at) = waiters.binary_search_by_key(&ticket, |waiter| waiter.ticket) else {
            return;
        };
        waiters.remove(at);
        let first = waiters.front().map(|waiter| (waiter.ticket, waiter.until_ms));
        let own = self.gauges();
        own.queues[self.group_rows[*group]].show(first, self.queues.groups[*group].len() as u32);
        WorkerRow::down(&own.waiting);
        // It may be the next one's turn, and a place may be free.
        self.ring();
        if self.queues.is_empty() {
            let bell = &mut SourceFd(&self.queues.bell.as_fd().as_raw_fd());
            let _ = self.poll.registry().deregister(bell);
            self.queues.listening = false;
            self.wheel.cancel(QUEUE_TIMER);
        }
    }

    /// A session has left a peer.
    pub(crate) fn free_place(&self, row: usize) {
        WorkerRow::down(&self.gauges().peer_active[row]);
        self.ring();
    }

    fn ring(&self) {
        if self.board[0].is_anybody_waiting() {
            // Edges are what is listened to; the number never matters.
            let _ = self.queues.bell.write(1);
        }
    }

    /// Lets those go on whose turn it is and for whom there is a place.
    pub(crate) fn look_at_queues(&mut self) {
        for group in 0..self.queues.groups.len() {
            while let Some((ticket, token)) = self.first_waiter(group) {
                let turn = self.board[0].first_in_queue(self.group_rows[group], clock::now_ms());
                if turn.is_some_and(|turn| turn < ticket) {
                    break;
                }
                self.with_session(token, |worker, session| worker.connect_next(token, session));
                if self.first_waiter(group).is_some_and(|(first, _)| first == ticket) {
                    break;
                }
            }
        }
    }

    /// Looks again after a while, as long as anybody waits.
    pub(crate) fn look_at_queues_in_time(&mut self) {
        self.look_at_queues();
        if !self.queues.is_empty() {
            self.wheel.set(QUEUE_TIMER, clock::now_ms() + LOOK_EVERY_MS);
        }
    }

    fn first_waiter(&self, group: usize) -> Option<(u64, Token)> {
        let first = self.queues.groups[group].front()?;
        Some((first.ticket, first.token))
    }

    /// Something was reported of a session that waits, for a place or for a host's addresses: only its client can have.
    pub(crate) fn is_client_gone(&self, session: &Session) -> bool {
        let client = session.ready[crate::table::Side::Downstream.index()];
        // One that has sent something and ended its stream may still read the answer.
        client.failed || (client.ended && sockets::has_ended_unread(session.downstream.as_fd()))
    }

    /// The session has waited long enough.
    pub(crate) fn waited_in_vain(&self, session: &mut Session) -> Next {
        let Some((group, _)) = session.tried else {
            return Next::Close(culvert_shared::counters::CloseReason::ConnectFailed);
        };
        let counters = &self.board[0].groups[self.group_rows[group]].queue;
        Board::add(&counters.timed_out, 1);
        self.no_peer(session, group)
    }

    /// How many of all workers' sessions wait for a group, for the status document.
    pub(crate) fn queue_status(&self, group: usize) -> serde_json::Value {
        let Some(queue) = self.config.upstreams[group].queue else {
            return serde_json::Value::Null;
        };
        let row = self.group_rows[group];
        let counters = &self.board[0].groups[row].queue;
        serde_json::json!({
            "size": queue.size,
            "waiting": self.board[0].waiting(row),
            "queued": counters.queued.load(Relaxed),
            "timed_out": counters.timed_out.load(Relaxed),
            "overflowed": counters.overflowed.load(Relaxed),
        })
    }
}
