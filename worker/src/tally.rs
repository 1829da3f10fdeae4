//! `limit_conn` and `limit_conn_rate`: whether a session is let in by what its key has already, and what it counts in
//! until it ends. The counts are the whole program's (`culvert_shared::limits`).

use std::sync::Arc;

use culvert_shared::counters::CloseReason;
use culvert_shared::ids::Owner;
use culvert_shared::limits::{Desk, Held, Limits, MAX_HOLDS, Refused};

use crate::clock;
use crate::event_loop::Worker;
use crate::session::Session;
use crate::sockets;
use std::os::fd::AsFd;

/// The counts, and what this worker has of them.
pub struct Tally {
    limits: Arc<Limits>,
    desk: Desk,
    owner: Owner,
}

impl Tally {
    /// For one worker.
    pub fn new(limits: Arc<Limits>, owner: Owner) -> Tally {
        Tally {
            limits,
            desk: Desk::new(owner),
            owner,
        }
    }

    /// A session is over.
    pub fn give_back(&mut self, session: &mut Session) {
        let holds = std::mem::take(&mut session.holds);
        self.release(&holds);
    }

    /// Nobody counts in these any more.
    pub fn release(&mut self, holds: &[Held]) {
        for held in holds {
            self.limits.release(&mut self.desk, *held);
        }
    }

    /// These are sessions of this worker's now.
    pub fn take_over(&self, holds: &[u32]) {
        for held in revived(holds) {
            self.limits.pass_to(held, self.owner);
        }
    }
}

impl Worker {
    /// Counts a session where its settings say so. Why it is not let in, if it is not.
    pub(crate) fn count_in_limits(&mut self, session: &mut Session) -> Option<CloseReason> {
        let settings = std::rc::Rc::clone(&session.settings);
        if settings.limit_conn.is_empty() && settings.limit_conn_rate.is_empty() {
            return None;
        }
        if let Some(local) = sockets::local_address(session.downstream.as_fd()) {
            session.ends.local = local;
        }
        let now_us = clock::now_ns() / 1000;
        for limit in &settings.limit_conn {
            let Some(print) = self.print(limit.zone, session) else {
                continue;
            };
            match self
                .tally
                .limits
                .hold(&mut self.tally.desk, print, limit.connections, now_us)
            {
                Ok(held) => session.holds.push(held),
                Err(refused) => return Some(self.refuse(session, refused, CloseReason::LimitConn)),
            }
        }
        for rate in &settings.limit_conn_rate {
            let Some(print) = self.print(rate.zone, session) else {
                continue;
            };
            let interval_us = rate.interval().as_micros() as u64;
            let paced = self
                .tally
                .limits
                .pace(self.owner, print, interval_us, rate.burst, now_us);
            if let Err(refused) = paced {
                return Some(self.refuse(session, refused, CloseReason::LimitRate));
            }
        }
        None
    }

    fn refuse(&self, session: &Session, refused: Refused, reason: CloseReason) -> CloseReason {
        if refused == Refused::Full {
            log::warn!(
                "session {}: client {} is not let in: there are too many different keys to count by",
                session.number,
                session.client()
            );
        }
        reason
    }

    /// What the session's key is known by; an empty one does not count (nginx: the same).
    fn print(&self, zone: usize, session: &Session) -> Option<u64> {
        let zone = &self.config.limit_zones[zone];
        let key = self.router.expand(&zone.key, &session.ends);
        (!key.is_empty()).then(|| self.tally.limits.print(&zone.name, &key))
    }
}

/// As a record has them.
pub fn saved(holds: &[Held]) -> [u32; MAX_HOLDS] {
    std::array::from_fn(|at| holds.get(at).map_or(0, |held| held.0))
}

/// What a record has.
pub fn revived(holds: &[u32]) -> Vec<Held> {
    holds
        .iter()
        .filter(|held| **held != 0)
        .map(|held| Held(*held))
        .collect()
}
