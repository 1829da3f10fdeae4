//! The worker's clock: CLOCK_MONOTONIC, the one that BPF programs read too.

use nix::time::{ClockId, clock_gettime};

/// Nanoseconds since the system started.
pub fn now_ns() -> u64 {
    // CLOCK_MONOTONIC exists on every Linux; zero would only make timers wait.
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |time| {
        time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64
    })
}

/// Milliseconds since the system started.
pub fn now_ms() -> u64 {
    now_ns() / 1_000_000
}
