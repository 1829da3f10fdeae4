//! `c/abi.h` as atomics: the same layout, asserted against the types that libbpf-cargo read from the
//! object's BTF. Never a second definition of a meaning.

use std::mem::offset_of;
use std::sync::atomic::{AtomicU32, AtomicU64};

use culvert_shared::sys::shm::Shareable;

use crate::skel::accept::types as accept;
use crate::skel::slot::types;

/// One direction of one pair (`struct flow`).
#[repr(C)]
pub struct Flow {
    pub cookie: AtomicU64,
    pub forwarded_bytes: AtomicU64,
    pub last_active_ns: AtomicU64,
    pub trimmed_bytes: AtomicU64,
    pub next_seq: AtomicU32,
    pub flags: AtomicU32,
    pub acked_base: AtomicU32,
    pub high_bytes: AtomicU32,
    pub low_bytes: AtomicU32,
    pub pause: AtomicU32,
    pub wake: AtomicU32,
    pub pauses: AtomicU32,
    pub largest_outstanding_bytes: AtomicU32,
    pub lane: AtomicU32,
    pub held_bytes: AtomicU32,
    pub runaway_bytes: AtomicU32,
    pub indexed_cookie: AtomicU64,
    pub queued: AtomicU32,
    pub small: AtomicU32,
    pub gather: AtomicU32,
    pub window_bytes: AtomicU32,
    pub settable_bytes: AtomicU32,
    pub narrowed: AtomicU32,
    pub tick: AtomicU32,
    pub tick_segments: AtomicU32,
    pub crowded_ticks: AtomicU32,
    pub period_start: AtomicU32,
}

// SAFETY: only atomics in a `repr(C)` layout; zero is valid.
unsafe impl Shareable for Flow {}

/// What the `join` program is asked for (`struct join_request`).
#[repr(C)]
pub struct JoinRequest {
    pub cookies: [u64; 2],
    pub sockets: [i32; 2],
    pub sources: i32,
    pub targets: i32,
    pub places: i32,
    pub index: u32,
    pub wanted: u32,
    pub pad: u32,
}

const _: () = {
    assert!(size_of::<JoinRequest>() == size_of::<types::join_request>());
    assert!(offset_of!(JoinRequest, cookies) == offset_of!(types::join_request, cookies));
    assert!(offset_of!(JoinRequest, sockets) == offset_of!(types::join_request, sockets));
    assert!(offset_of!(JoinRequest, sources) == offset_of!(types::join_request, sources));
    assert!(offset_of!(JoinRequest, targets) == offset_of!(types::join_request, targets));
    assert!(offset_of!(JoinRequest, places) == offset_of!(types::join_request, places));
    assert!(offset_of!(JoinRequest, index) == offset_of!(types::join_request, index));
    assert!(offset_of!(JoinRequest, wanted) == offset_of!(types::join_request, wanted));
};

/// What it answers (`enum join_answer`, where they are explained), if no negative error number.
pub mod join_answer {
    use crate::skel::slot::types::join_answer;

    /// As wanted.
    pub const WANTED: i32 = join_answer::JOIN_WANTED.0 as i32;
    /// The downstream socket is a source, the upstream socket could not become one.
    pub const TO_UPSTREAM_ONLY: i32 = join_answer::JOIN_TO_UPSTREAM_ONLY.0 as i32;
}

/// Counted on one CPU (`struct cpu_total`).
#[repr(C)]
pub struct CpuTotal {
    pub forwarded_bytes: [AtomicU64; 2],
    pub pauses: AtomicU64,
    pub pad: [AtomicU64; 5],
}

// SAFETY: only atomics in a `repr(C)` layout; zero is valid.
unsafe impl Shareable for CpuTotal {}

/// How much a worker slot carries (`struct accept_slot`).
#[repr(C)]
pub struct AcceptSlot {
    pub state: AtomicU32,
    pub sessions: AtomicU32,
    pub room: AtomicU32,
    pub started: AtomicU32,
    pub taken: AtomicU32,
    pub aged_started: AtomicU32,
    pub aged_ns: AtomicU64,
    pub pad: [AtomicU64; 4],
    pub cpus: [AtomicU64; 16],
}

// SAFETY: only atomics in a `repr(C)` layout; zero is valid.
unsafe impl Shareable for AcceptSlot {}

const _: () = {
    assert!(size_of::<AcceptSlot>() == size_of::<accept::accept_slot>());
    assert!(offset_of!(AcceptSlot, state) == offset_of!(accept::accept_slot, state));
    assert!(offset_of!(AcceptSlot, sessions) == offset_of!(accept::accept_slot, sessions));
    assert!(offset_of!(AcceptSlot, room) == offset_of!(accept::accept_slot, room));
    assert!(offset_of!(AcceptSlot, started) == offset_of!(accept::accept_slot, started));
    assert!(offset_of!(AcceptSlot, taken) == offset_of!(accept::accept_slot, taken));
    assert!(offset_of!(AcceptSlot, aged_started) == offset_of!(accept::accept_slot, aged_started));
    assert!(offset_of!(AcceptSlot, aged_ns) == offset_of!(accept::accept_slot, aged_ns));
    assert!(offset_of!(AcceptSlot, cpus) == offset_of!(accept::accept_slot, cpus));
};

/// Whether a worker slot may be given new connections (`enum accept_state`, where they are explained).
pub mod accept_state {
    use crate::skel::accept::types::accept_state;

    /// The configuration has no such slot.
    pub const ABSENT: u32 = accept_state::ACCEPT_ABSENT.0;
    /// It has no worker that serves.
    pub const WAITING: u32 = accept_state::ACCEPT_WAITING.0;
    /// Its worker serves.
    pub const LIVE: u32 = accept_state::ACCEPT_LIVE.0;
}

/// What all flows of a worker slot have in common (`struct slot_total`).
#[repr(C)]
pub struct SlotTotal {
    pub held_bytes: AtomicU64,
    pub limit_bytes: AtomicU64,
    pub low_bytes: AtomicU64,
    pub pauses: AtomicU64,
    pub wake: AtomicU32,
    pub lost_events: AtomicU32,
    pub counted: AtomicU32,
    pub pad: [AtomicU32; 5],
}

// SAFETY: only atomics in a `repr(C)` layout; zero is valid.
unsafe impl Shareable for SlotTotal {}

/// Bytes that every flow may have outstanding (`enum flow_floor`, where it is explained).
pub const FLOW_FLOOR_BYTES: u32 = types::flow_floor::FLOW_FLOOR.0;

/// What an untaken segment costs beside its bytes (`enum segment_cost`, where it is explained).
pub const SEGMENT_COST_BYTES: u32 = types::segment_cost::SEGMENT_COST.0;

/// Segments with fewer bytes are small (likewise).
pub const SMALL_SEGMENT: u32 = types::segment_cost::SMALL_SEGMENT.0;

const _: () = {
    assert!(size_of::<Flow>() == size_of::<types::flow>());
    assert!(offset_of!(Flow, cookie) == offset_of!(types::flow, cookie));
    assert!(offset_of!(Flow, forwarded_bytes) == offset_of!(types::flow, forwarded_bytes));
    assert!(offset_of!(Flow, last_active_ns) == offset_of!(types::flow, last_active_ns));
    assert!(offset_of!(Flow, trimmed_bytes) == offset_of!(types::flow, trimmed_bytes));
    assert!(offset_of!(Flow, next_seq) == offset_of!(types::flow, next_seq));
    assert!(offset_of!(Flow, flags) == offset_of!(types::flow, flags));
    assert!(offset_of!(Flow, acked_base) == offset_of!(types::flow, acked_base));
    assert!(offset_of!(Flow, high_bytes) == offset_of!(types::flow, high_bytes));
    assert!(offset_of!(Flow, low_bytes) == offset_of!(types::flow, low_bytes));
    assert!(offset_of!(Flow, queued) == offset_of!(types::flow, queued));
    assert!(offset_of!(Flow, small) == offset_of!(types::flow, small));
    assert!(offset_of!(Flow, gather) == offset_of!(types::flow, gather));
    assert!(offset_of!(Flow, window_bytes) == offset_of!(types::flow, window_bytes));
    assert!(offset_of!(Flow, settable_bytes) == offset_of!(types::flow, settable_bytes));
    assert!(offset_of!(Flow, narrowed) == offset_of!(types::flow, narrowed));
    assert!(offset_of!(Flow, tick) == offset_of!(types::flow, tick));
    assert!(offset_of!(Flow, tick_segments) == offset_of!(types::flow, tick_segments));
    assert!(offset_of!(Flow, crowded_ticks) == offset_of!(types::flow, crowded_ticks));
    assert!(offset_of!(Flow, period_start) == offset_of!(types::flow, period_start));
    assert!(offset_of!(Flow, runaway_bytes) == offset_of!(types::flow, runaway_bytes));
    assert!(offset_of!(Flow, pause) == offset_of!(types::flow, pause));
    assert!(offset_of!(Flow, wake) == offset_of!(types::flow, wake));
    assert!(offset_of!(Flow, pauses) == offset_of!(types::flow, pauses));
    assert!(
        offset_of!(Flow, largest_outstanding_bytes) == offset_of!(types::flow, largest_outstanding_bytes)
    );
    assert!(offset_of!(Flow, lane) == offset_of!(types::flow, lane));
    assert!(offset_of!(Flow, held_bytes) == offset_of!(types::flow, held_bytes));
    assert!(offset_of!(Flow, indexed_cookie) == offset_of!(types::flow, indexed_cookie));
    assert!(size_of::<CpuTotal>() == size_of::<types::cpu_total>());
    assert!(offset_of!(CpuTotal, forwarded_bytes) == offset_of!(types::cpu_total, forwarded_bytes));
    assert!(offset_of!(CpuTotal, pauses) == offset_of!(types::cpu_total, pauses));
    assert!(size_of::<SlotTotal>() == size_of::<types::slot_total>());
    assert!(offset_of!(SlotTotal, held_bytes) == offset_of!(types::slot_total, held_bytes));
    assert!(offset_of!(SlotTotal, limit_bytes) == offset_of!(types::slot_total, limit_bytes));
    assert!(offset_of!(SlotTotal, low_bytes) == offset_of!(types::slot_total, low_bytes));
    assert!(offset_of!(SlotTotal, pauses) == offset_of!(types::slot_total, pauses));
    assert!(offset_of!(SlotTotal, wake) == offset_of!(types::slot_total, wake));
    assert!(offset_of!(SlotTotal, lost_events) == offset_of!(types::slot_total, lost_events));
    assert!(offset_of!(SlotTotal, counted) == offset_of!(types::slot_total, counted));
};

/// Bits of `flow.flags` (`enum flow_flag`, where they are explained).
pub mod flow_flag {
    use crate::skel::slot::types::flow_flag;

    /// `next_seq` is valid.
    pub const STARTED: u32 = flow_flag::FLOW_STARTED.0;
    /// A segment began after `next_seq`: bytes are missing.
    pub const GAP: u32 = flow_flag::FLOW_GAP.0;
    /// The other socket was not in the map: bytes were left to user space.
    pub const NO_TARGET: u32 = flow_flag::FLOW_NO_TARGET.0;
    /// Bytes that were forwarded before could not be cut off.
    pub const TRIM_FAILED: u32 = flow_flag::FLOW_TRIM_FAILED.0;
    /// The source should have been held back long ago, and still sends.
    pub const RUNAWAY: u32 = flow_flag::FLOW_RUNAWAY.0;
    /// The source's lock is held, for what waits in its receive queue to be forwarded.
    pub const KICKED: u32 = flow_flag::FLOW_KICKED.0;

    /// What no flow must have met that is to end cleanly.
    pub const FATAL: u32 = GAP | NO_TARGET | TRIM_FAILED | RUNAWAY;

    /// What the fatal ones among them mean, for people.
    pub fn describe(flags: u32) -> String {
        let meanings = [
            (GAP, "bytes were missing"),
            (NO_TARGET, "the other socket was not in the map"),
            (TRIM_FAILED, "bytes that came twice could not be cut off"),
            (
                RUNAWAY,
                "its source could not be held back (has another BPF program changed the socket's callback flags?)",
            ),
        ];
        let met = meanings.iter().filter(|(flag, _)| flags & flag != 0);
        met.map(|(_, meaning)| *meaning).collect::<Vec<_>>().join(", ")
    }
}

/// Whether a flow's source is held back (`enum flow_pause`, where they are explained).
pub mod flow_pause {
    use crate::skel::slot::types::flow_pause;

    /// It is forwarded.
    pub const OFF: u32 = flow_pause::PAUSE_OFF.0;
    /// It leaves `sources` at its next ACK.
    pub const WANTED: u32 = flow_pause::PAUSE_WANTED.0;
    /// It is no longer in `sources`.
    pub const ON: u32 = flow_pause::PAUSE_ON.0;
}
