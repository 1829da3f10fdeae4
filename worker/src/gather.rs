//! Directions of small pieces. Where they come faster than the kernel thread takes them one by one, which the programs see, they are
//! copied many at once: for a moment, and for longer and longer where they come as fast each time that the kernel has them
//! again. It has them again soon when they are large (over loopback, where a segment can be), or few.

use std::os::fd::AsFd;

use culvert_bpf::SMALL_SEGMENT;
use culvert_shared::counters::Board;
use culvert_shared::ids::Direction;
use culvert_shared::sys::socket::{self, TcpInfo, tcp_info};

use crate::clock;
use crate::drive::Next;
use crate::event_loop::Worker;
use crate::offload::sent_by_us;
use crate::session::{Session, source, target};
use crate::table::Token;

/// How long a direction is copied at first, and how often its pieces are looked at.
const GATHER_MS: u64 = 500;
/// How long it is copied at most.
const LONGEST_MS: u64 = 8 * GATHER_MS;
/// A direction that gathers anew within so long is copied for twice as long as before. The programs take some 30 ms to see it.
const AGAIN_MS: u64 = 1_000;
/// Fewer segments between two looks are no trouble to the kernel thread.
const MANY_SEGMENTS: u32 = 2_000;
/// How soon it is asked again whether a reader that is slow has caught up.
const CATCHES_UP_MS: u64 = 100;

/// Whether and until when a direction is copied for a while.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Gathering {
    /// When it is looked at whether the kernel has it again; `None`: it is not copied for a while.
    look_ms: Option<u64>,
    /// When it has it whatever its pieces are.
    until_ms: u64,
    /// How long it was, or is, copied.
    lasts_ms: u64,
    /// When the kernel had it again last.
    returned_ms: u64,
    /// What had come when it was looked at last.
    segments: u32,
    bytes: u64,
}

impl Gathering {
    /// When it is to be looked at.
    pub fn look_ms(&self) -> Option<u64> {
        self.look_ms
    }

    /// Has it looked at then, and given back whatever its pieces are.
    pub fn give_back_at(&mut self, look_ms: u64) {
        self.look_ms = Some(look_ms);
        self.until_ms = look_ms;
    }

    /// It is copied from now on. `come`: what has come from its source so far.
    fn begin(&mut self, now_ms: u64, come: &TcpInfo) {
        let is_again = self.lasts_ms > 0 && now_ms < self.returned_ms + AGAIN_MS;
        self.lasts_ms = match is_again {
            true => (2 * self.lasts_ms).min(LONGEST_MS),
            false => GATHER_MS,
        };
        self.until_ms = now_ms + self.lasts_ms;
        self.look_again(now_ms, come);
    }

    fn look_again(&mut self, now_ms: u64, come: &TcpInfo) {
        self.look_ms = Some((now_ms + GATHER_MS).min(self.until_ms));
        (self.segments, self.bytes) = (come.segments_received, come.bytes_received);
    }

    /// Whether the kernel is to have it again; if not, it is looked at again later.
    fn is_over(&mut self, now_ms: u64, come: &TcpInfo) -> bool {
        if now_ms >= self.until_ms {
            return true;
        }
        let segments = come.segments_received.wrapping_sub(self.segments);
        let bytes = come.bytes_received.saturating_sub(self.bytes);
        if segments < MANY_SEGMENTS || bytes >= u64::from(segments) * u64::from(SMALL_SEGMENT) {
            return true;
        }
        self.look_again(now_ms, come);
        false
    }

    /// The kernel has it again.
    fn end(&mut self, now_ms: u64) {
        self.look_ms = None;
        self.returned_ms = now_ms;
    }
}

impl Worker {
    /// The programs have held a direction back because its pieces are small and too many.
    pub(crate) fn gather(&mut self, token: Token, session: &mut Session, direction: Direction) -> Next {
        if let Some((maps, place)) = self.pair(session) {
            maps.withdraw(place, direction);
        }
        Board::add(&self.board[0].gathers, 1);
        let come = come(session, direction);
        let stream = session.stream(direction);
        if stream.is_kernels() {
            stream.gathering.begin(clock::now_ms(), &come);
            stream.settle();
        }
        self.stream(token, session)
    }

    /// Gives directions that were copied for a while back to the kernel, when it is time.
    pub(crate) fn give_back_gathered(&mut self, session: &mut Session) {
        let now_ms = clock::now_ms();
        for direction in Direction::BOTH {
            let due_ms = session.stream(direction).due_back_ms();
            if due_ms.is_none_or(|due_ms| now_ms < due_ms) {
                continue;
            }
            let come = come(session, direction);
            if !session.stream(direction).gathering.is_over(now_ms, &come) {
                continue;
            }
            // A reader that is slow has a full send buffer before it, and would have a backlog besides.
            let waiting = session
                .socket(target(direction))
                .and_then(|socket| socket::unacknowledged_bytes(socket.as_fd()).ok());
            if waiting.is_some_and(|bytes| bytes > u64::from(session.settings.ebpf_backlog_size) / 2) {
                let gathering = &mut session.stream(direction).gathering;
                gathering.give_back_at(now_ms + CATCHES_UP_MS);
                continue;
            }
            session.stream(direction).gathering.end(now_ms);
            // From here on who dies cannot say who has forwarded what comes next.
            self.begin_copying(session);
            let sent_bytes = sent_by_us(session, direction);
            let rejoined = match (self.pair(session), session.socket(source(direction))) {
                (Some((maps, place)), Some(socket)) => {
                    maps.rejoin(place, direction, socket.as_fd(), sent_bytes)
                }
                _ => false,
            };
            if rejoined {
                session.stream(direction).offload();
            }
        }
    }
}

/// What has come from a direction's source; nothing where that cannot be told.
fn come(session: &Session, direction: Direction) -> TcpInfo {
    session
        .socket(source(direction))
        .and_then(|socket| tcp_info(socket.as_fd()).ok())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn come(segments_received: u32, bytes_received: u64) -> TcpInfo {
        TcpInfo {
            segments_received,
            bytes_received,
            ..TcpInfo::default()
        }
    }

    /// How long a direction is copied from `now_ms` on, whose pieces come at that rate per millisecond; and what has come then.
    fn copied_ms(
        gathering: &mut Gathering,
        from_ms: u64,
        segments: u32,
        bytes: u64,
        so_far: &mut TcpInfo,
    ) -> u64 {
        gathering.begin(from_ms, so_far);
        let mut now_ms = from_ms;
        loop {
            let look_ms = gathering.look_ms().expect("it is copied");
            let elapsed = look_ms - now_ms;
            assert!(elapsed > 0, "it is looked at again and again");
            now_ms = look_ms;
            *so_far = come(
                so_far.segments_received.wrapping_add(segments * elapsed as u32),
                so_far.bytes_received + bytes * elapsed,
            );
            if gathering.is_over(now_ms, so_far) {
                gathering.end(now_ms);
                return now_ms - from_ms;
            }
        }
    }

    #[test]
    fn what_gathers_again_and_again_is_copied_for_longer_and_longer() {
        let mut gathering = Gathering::default();
        let mut so_far = come(u32::MAX - 1000, 0);
        let mut now_ms = 5;
        let mut lasted = Vec::new();
        for _ in 0..6 {
            let ms = copied_ms(&mut gathering, now_ms, 100, 6_400, &mut so_far);
            lasted.push(ms);
            now_ms += ms + 30;
        }
        assert_eq!(lasted, [500, 1_000, 2_000, 4_000, 4_000, 4_000]);
        now_ms += AGAIN_MS;
        assert_eq!(copied_ms(&mut gathering, now_ms, 100, 6_400, &mut so_far), 500);
    }

    #[test]
    fn large_pieces_and_few_ones_are_the_kernels_again_at_once() {
        let mut gathering = Gathering::default();
        let mut so_far = come(0, 0);
        let mut now_ms = 0;
        for _ in 0..4 {
            now_ms += copied_ms(&mut gathering, now_ms, 100, 6_400, &mut so_far) + 30;
        }
        assert_eq!(copied_ms(&mut gathering, now_ms, 3, 200, &mut so_far), GATHER_MS);
        let large = u64::from(SMALL_SEGMENT);
        assert_eq!(
            copied_ms(&mut gathering, now_ms, 100, 100 * large, &mut so_far),
            GATHER_MS
        );
    }
}
