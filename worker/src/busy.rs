//! Tells of the busiest sessions while somebody asks: looks at all sessions of this worker once a period, keeps
//! the few that moved most. A worker that nobody asks does nothing here.

use culvert_shared::busy::{BUSIEST, BusySession};
use culvert_shared::ids::Direction;

use crate::clock;
use crate::event_loop::{BUSY_TIMER, Worker};
use crate::session::{Datapath, Session};

/// How often sessions are looked at.
const PERIOD_MS: u64 = 1_000;
/// Looking may take one part in so many of the worker's time.
const SHARE: u64 = 50;

/// What was last seen of a session.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    /// When; 0: never.
    at_ms: u64,
    bytes: [u64; 2],
}

impl Seen {
    /// Bytes in a second since then, or over its whole life where that is too long ago.
    fn rates(&self, bytes: [u64; 2], started_ms: u64, now_ms: u64) -> [u64; 2] {
        let recent = self.at_ms != 0 && now_ms.saturating_sub(self.at_ms) < 5 * PERIOD_MS;
        let (since_ms, before) = if recent {
            (self.at_ms, self.bytes)
        } else {
            (started_ms, [0, 0])
        };
        let ms = now_ms.saturating_sub(since_ms).max(1);
        [0, 1].map(|way| bytes[way].saturating_sub(before[way]).saturating_mul(1000) / ms)
    }
}

impl Worker {
    /// Somebody may want to know.
    pub(crate) fn tell_busiest(&mut self) {
        let begun_ns = clock::now_ns();
        let now_ms = begun_ns / 1_000_000;
        if !self.lookout.is_asked(now_ms) {
            return;
        }
        let mut busiest: Vec<BusySession> = Vec::new();
        let mut rates = [0, 0];
        for token in self.table.tokens() {
            let Some(mut session) = self.table.take(token) else {
                continue;
            };
            if !session.is_status {
                let told = self.look_at(&mut session, now_ms);
                (0..2).for_each(|way| rates[way] += told.rates[way]);
                let rank = |session: &BusySession| {
                    (
                        session.rates[0] + session.rates[1],
                        session.bytes[0] + session.bytes[1],
                    )
                };
                let place = busiest.partition_point(|other| rank(other) >= rank(&told));
                if place < BUSIEST {
                    busiest.insert(place, told);
                    busiest.truncate(BUSIEST);
                }
            }
            self.table.put(token, session);
        }
        self.lookout.tell(self.row, &busiest, rates, now_ms);
        let took_ms = (clock::now_ns() - begun_ns) / 1_000_000;
        self.wheel
            .set(BUSY_TIMER, now_ms + PERIOD_MS.max(SHARE * took_ms));
    }

    fn look_at(&self, session: &mut Session, now_ms: u64) -> BusySession {
        let flows = Direction::BOTH.map(|way| self.flow(session, way));
        let bytes = [0, 1].map(|way| flows[way].forwarded_bytes + session.streams[way].written_bytes);
        let rates = session.seen.rates(bytes, session.started_ms, now_ms);
        session.seen = Seen { at_ms: now_ms, bytes };
        let peer = session.upstream.as_ref().and_then(|upstream| upstream.row);
        BusySession {
            number: session.number,
            client: session.ends.remote,
            listener: session.listener as u32,
            peer: peer.map(|row| row as u32),
            in_kernel: session.datapath == Datapath::Sockmap,
            started_ms: session.started_ms,
            bytes,
            rates,
            pauses: flows.iter().map(|flow| u64::from(flow.pauses)).sum(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_counts_from_the_last_look_or_from_the_start() {
        let never = Seen::default();
        assert_eq!(never.rates([1000, 0], 10_000, 12_000), [500, 0]);
        let seen = Seen {
            at_ms: 11_000,
            bytes: [400, 0],
        };
        assert_eq!(seen.rates([1000, 7], 10_000, 12_000), [600, 7]);
        assert_eq!(seen.rates([100_400, 0], 10_000, 111_000), [994, 0]);
    }
}
