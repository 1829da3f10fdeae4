//! `proxy_upload_rate` and `proxy_download_rate`: how many bytes of a direction may be copied now. Pure, time passed in.
//!
//! A bucket of credit that fills with time. It is emptied, then left to fill for a while, so that a limited session wakes
//! the worker some tens of times a second at most, and moves pieces small enough to look like a steady stream.

use culvert_shared::config::Rate;
use culvert_shared::ids::Direction;

use crate::event_loop::Worker;
use crate::session::Session;
use crate::sockets;
use std::os::fd::AsFd;

const SECOND_NS: u64 = 1_000_000_000;
/// How long the bucket fills before it is emptied again.
const FILL_NS: u64 = SECOND_NS / 50;
/// At a low rate as long as a segment of this size takes, but no longer than [`LONGEST_FILL_NS`].
const SEGMENT_BYTES: u64 = 1460;
const LONGEST_FILL_NS: u64 = SECOND_NS / 4;
/// Credit for so much more time can be gathered: what a direction that was quiet may send at once, and how late the worker
/// may come without the rate suffering.
const SLACK_NS: u64 = SECOND_NS / 10;

/// The limit of one direction.
#[derive(Clone, Debug)]
pub struct Pace {
    /// Bytes per second, at least 1.
    rate: u64,
    /// The time that is paid for, on the worker's clock.
    paid_ns: u64,
    fill_ns: u64,
    /// The bucket is being emptied.
    open: bool,
}

impl Pace {
    /// A limit of so many bytes per second from now on; `None`: without limit.
    pub fn new(rate: u64, now_ns: u64) -> Option<Pace> {
        if rate == 0 {
            return None;
        }
        let segment_ns = SEGMENT_BYTES * SECOND_NS / rate;
        let fill_ns = segment_ns
            .clamp(FILL_NS, LONGEST_FILL_NS)
            // At the very least a byte.
            .max(SECOND_NS.div_ceil(rate));
        Some(Pace {
            rate,
            // The first bytes need not wait.
            paid_ns: now_ns.saturating_sub(fill_ns),
            fill_ns,
            open: false,
        })
    }

    /// Bytes per second.
    pub fn rate(&self) -> u64 {
        self.rate
    }

    /// How many bytes may be taken now; 0: none before [`Pace::due_ns`].
    pub fn budget(&mut self, now_ns: u64) -> usize {
        self.paid_ns = self.paid_ns.max(now_ns.saturating_sub(self.fill_ns + SLACK_NS));
        let credit_ns = now_ns.saturating_sub(self.paid_ns);
        // What comes in while it is emptied is left for the next time.
        self.open = credit_ns >= if self.open { self.fill_ns / 8 } else { self.fill_ns };
        let credit = u128::from(credit_ns) * u128::from(self.rate) / u128::from(SECOND_NS);
        self.open &= credit > 0;
        if self.open { credit as usize } else { 0 }
    }

    /// So many were taken.
    pub fn spend(&mut self, bytes: usize) {
        let ns = bytes as u128 * u128::from(SECOND_NS) / u128::from(self.rate);
        self.paid_ns += ns as u64;
    }

    /// When the bucket is full enough to be emptied again.
    pub fn due_ns(&self) -> u64 {
        self.paid_ns + self.fill_ns
    }

    /// It waits for that.
    pub fn is_waiting(&self) -> bool {
        !self.open
    }
}

impl Worker {
    /// Sets the limits of a session that is about to be connected, as its settings say.
    pub(crate) fn limit_rates(&self, session: &mut Session, now_ns: u64) {
        let settings = std::rc::Rc::clone(&session.settings);
        for (direction, rate) in [
            (Direction::ToUpstream, &settings.proxy_upload_rate),
            (Direction::ToDownstream, &settings.proxy_download_rate),
        ] {
            let rate = match rate {
                Rate::Fixed(rate) => *rate,
                Rate::Variable(template) => {
                    if let Some(local) = sockets::local_address(session.downstream.as_fd()) {
                        session.ends.local = local;
                    }
                    let value = self.router.expand(template, &session.ends);
                    Rate::parse(&value).unwrap_or_else(|| {
                        log::error!(
                            "session {}: \"{value}\" is no rate for {}, which is not limited; a rate is a size such as \"1m\"",
                            session.number,
                            direction.name()
                        );
                        0
                    })
                }
            };
            session.stream(direction).pace = Pace::new(rate, now_ns);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Takes as much as may be, in pieces of `buffer` bytes at most, whenever it is due and `late_ns` after that.
    fn taken_until(pace: &mut Pace, end_ns: u64, buffer: usize, late_ns: u64) -> (u64, u64) {
        let (mut now_ns, mut taken, mut wakes) = (SECOND_NS, 0, 0);
        while now_ns < end_ns {
            loop {
                let piece = pace.budget(now_ns).min(buffer);
                if piece == 0 {
                    break;
                }
                pace.spend(piece);
                taken += piece as u64;
            }
            assert!(pace.is_waiting());
            wakes += 1;
            now_ns = pace.due_ns().max(now_ns + 1) + late_ns;
        }
        (taken, wakes)
    }

    proptest! {
        #[test]
        fn what_is_taken_is_the_rate_however_late_the_worker_is(
            rate in prop_oneof![1u64..2000, 1u64..1 << 40],
            buffer in prop_oneof![1usize << 14..1 << 17, Just(usize::MAX)],
            late_ns in 0..SLACK_NS,
        ) {
            let buffer = buffer.max(rate as usize / 1000);
            let mut pace = Pace::new(rate, SECOND_NS).unwrap();
            let (taken, wakes) = taken_until(&mut pace, 11 * SECOND_NS, buffer, late_ns);
            let once = (u128::from(pace.fill_ns + SLACK_NS) * u128::from(rate) / u128::from(SECOND_NS)) as u64 + 1;
            prop_assert!(taken <= 10 * rate + once + rate / 1000, "{taken} of {rate}");
            prop_assert!(taken + 2 * once + rate / 100 >= 10 * rate, "{taken} of {rate}");
            prop_assert!(wakes <= 10 * 60, "{wakes} wakes");
        }
    }

    #[test]
    fn a_quiet_direction_gathers_little() {
        let mut pace = Pace::new(1000, 0).unwrap();
        assert!(pace.budget(3600 * SECOND_NS) <= 1000 / 2);
        assert!(Pace::new(0, 0).is_none());
    }
}
