//! What flows have outstanding, each and all of a slot together, as user space sees it: whether a source that is held back may
//! be let go, and the slot's sum where the programs do not see it change. Their side of it is in `c/slot/`.

use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::time::Duration;

use culvert_shared::ids::Direction;
use culvert_shared::sessions::Place;
use culvert_shared::sys::socket::{self, TcpInfo};

use super::SlotMaps;
use crate::abi::{FLOW_FLOOR_BYTES, Flow, SEGMENT_COST_BYTES, flow_pause};

/// Whether the source of a direction is held back ([`SlotMaps::hold`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// It is not.
    Off,
    /// It is, although its target has drained: it may be let go.
    Drained,
    /// It is, and its target has drained, but the slot has too much outstanding.
    Full {
        /// As [`Outstanding::is_deaf`].
        is_deaf: bool,
    },
    /// It is, and has to be.
    On(Outstanding),
}

/// What the target of a held-back source has outstanding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outstanding {
    /// What its peer has acknowledged, low 32 bits.
    pub acked_bytes: u32,
    /// What has to be acknowledged until the source may be let go.
    pub above_bytes: u32,
    /// Of what there is, what is on its way. The rest the kernel thread has not sent yet, or the reader has no space for it.
    pub in_flight_bytes: u64,
    /// The last round trip's time.
    pub round_trip: Duration,
    /// It may be that the target does not hear what is acknowledged ([`TcpInfo::is_deaf`]).
    pub is_deaf: bool,
}

impl SlotMaps {
    /// Limits what all flows of the slot together may have outstanding before those above the floor are held
    /// back; `None`: no limit. A quarter of it has to drain before they are let go.
    pub fn limit_total(&self, bytes: Option<u64>) {
        let limit = bytes.unwrap_or(0);
        self.total().low_bytes.store(limit - limit / 4, Relaxed);
        self.total().limit_bytes.store(limit, Relaxed);
    }

    /// Whether the total of the slot lets a flow go on that has few enough bytes outstanding itself. If not,
    /// the programs will say when there is room.
    pub fn has_room(&self, place: Place, direction: Direction) -> bool {
        let flow = &self.flows[self.index(place, direction.index())];
        // Below the floor a flow counts for nothing.
        if flow.held_bytes.load(Relaxed) == 0 || self.slot_has_room() {
            return true;
        }
        flow.wake.store(1, Relaxed);
        self.total().wake.store(1, Release);
        false
    }

    fn slot_has_room(&self) -> bool {
        let total = self.total();
        total.limit_bytes.load(Relaxed) == 0 || total.held_bytes.load(Relaxed) < total.low_bytes.load(Relaxed)
    }

    /// What one of `sources` sources that are held back may gather: all of them let go at once then take half
    /// of the slot's total. `None`: as much as it likes.
    pub fn share_bytes(&self, sources: usize) -> Option<u64> {
        let limit = self.total().limit_bytes.load(Relaxed);
        (limit != 0).then(|| (limit / 2 / sources.max(1) as u64).max(u64::from(FLOW_FLOOR_BYTES)))
    }

    /// How a direction stands; to be asked when it is held back, and by the clock from then on. The programs see its target at
    /// a round-trip sample that is the first of its flight (RTT_CB, tcp_rtt_estimator) and when it sends. One that
    /// only retransmits has no sample, and one that has all of it in flight says nothing until it has drained wholly.
    pub fn hold(&self, place: Place, direction: Direction, target: BorrowedFd<'_>) -> Hold {
        let flow = &self.flows[self.index(place, direction.index())];
        if flow.pause.load(Acquire) == flow_pause::OFF {
            return Hold::Off;
        }
        let info = socket::tcp_info(target).unwrap_or_default();
        let charge = charge(flow, target, &info);
        self.count_held(flow, charge);
        let high = flow.high_bytes.load(Relaxed);
        let low = low_mark(high, info.in_flight_bytes);
        flow.low_bytes.store(low, Relaxed);
        let above = i64::from(charge) - i64::from(low);
        if above < 0 {
            return match self.has_room(place, direction) {
                true => Hold::Drained,
                false => Hold::Full {
                    is_deaf: info.is_deaf(),
                },
            };
        }
        Hold::On(Outstanding {
            acked_bytes: info.bytes_acked as u32,
            above_bytes: u32::try_from(above).unwrap_or(u32::MAX),
            in_flight_bytes: info.in_flight_bytes,
            round_trip: info.round_trip,
            is_deaf: info.is_deaf(),
        })
    }

    /// Counts anew what a flow has outstanding in which nothing was forwarded since `since_ns`. The programs do not see its
    /// target while its last flight is acknowledged (see [`SlotMaps::hold`]), so what that flow stood for in the slot's
    /// sum would stay until it has something to say again.
    pub fn recount(&self, place: Place, direction: Direction, target: BorrowedFd<'_>, since_ns: u64) {
        let flow = &self.flows[self.index(place, direction.index())];
        if flow.held_bytes.load(Relaxed) != 0
            && flow.last_active_ns.load(Relaxed) < since_ns
            && let Ok(info) = socket::tcp_info(target)
        {
            self.count_held(flow, charge(flow, target, &info));
        }
    }

    /// Bytes that all flows of the slot have outstanding, as far as is known.
    pub fn held_bytes(&self) -> u64 {
        self.total().held_bytes.load(Relaxed)
    }

    /// From now on the programs say again when they become more: to be asked for before all are counted anew.
    pub fn tell_when_held(&self) {
        self.total().counted.store(0, SeqCst);
    }

    /// As the programs' function of that name: the flow's part of the slot's sum.
    pub(super) fn count_held(&self, flow: &Flow, outstanding: i32) {
        let held = u32::try_from(outstanding).unwrap_or(0);
        let held = if held > FLOW_FLOOR_BYTES { held } else { 0 };
        let before = flow.held_bytes.swap(held, Relaxed);
        let difference = u64::from(held).wrapping_sub(u64::from(before));
        self.total().held_bytes.fetch_add(difference, Relaxed);
    }
}

/// Bytes outstanding below which a source is let go: half of what may be. Where a round trip takes more than that, its
/// target would run dry before more comes, so it is let go early.
pub(super) fn low_mark(high_bytes: u32, in_flight_bytes: u64) -> u32 {
    let half = high_bytes / 2;
    if in_flight_bytes > half.into() {
        high_bytes - high_bytes / 8
    } else {
        half
    }
}

/// What a flow costs the kernel, as the programs' function of that name has it.
fn charge(flow: &Flow, target: BorrowedFd<'_>, info: &TcpInfo) -> i32 {
    let acked = (info.bytes_acked as u32).wrapping_sub(flow.acked_base.load(Relaxed));
    let outstanding = (flow.forwarded_bytes.load(Relaxed) as u32).wrapping_sub(acked) as i32;
    match flow.queued.load(Relaxed) {
        0 => outstanding,
        // What the program saw last may have been taken since: there are no more segments than bytes that are not.
        queued => {
            let taken = socket::unacknowledged_bytes(target).unwrap_or(0);
            let left = u64::try_from(outstanding).unwrap_or(0).saturating_sub(taken);
            let cost = left.min(queued.into()) * u64::from(SEGMENT_COST_BYTES);
            i32::try_from(i64::from(outstanding).saturating_add_unsigned(cost)).unwrap_or(i32::MAX)
        }
    }
}
