//! Sessions whose reader is slow or stands still: the proxy, the streams and the checks that all such tests share.
//!
//! `TEST_PRESSURE_SECONDS` is how long a reader stands still at the least in the tests of memory (2 unless set).

use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use super::pattern::receive_from;
use super::{Ending, Front, Plan, Proxy, Status, Writer, memory};

/// The seed of what the writer writes.
pub const UP: u64 = 11;
/// The seed of what goes the other way.
pub const DOWN: u64 = 22;
/// A mebibyte.
pub const MIB: u64 = 1024 * 1024;
/// What a writer hands over at once.
pub const PIECE: usize = 64 * 1024;
/// ebpf_backlog_size unless set.
pub const BACKLOG_DEFAULT: u64 = 4 * MIB;

/// A proxy with one front.
pub fn proxy_with(ip: &str, stream: &str) -> (Proxy, Front) {
    let mut plan = Plan::new()
        .stream(stream)
        .lifetime(standstill() + Duration::from_secs(60));
    let front = Front::new(&mut plan, ip, "");
    (plan.start(), front)
}

/// How long a reader stands still.
pub fn standstill() -> Duration {
    let seconds = std::env::var("TEST_PRESSURE_SECONDS").map_or(2, |text| {
        text.parse()
            .expect("TEST_PRESSURE_SECONDS must be a whole number")
    });
    Duration::from_secs(seconds)
}

/// What one session may take of the kernel's memory, whatever its reader does: its backlog and the buffers of both ends.
/// A host on which no large receive buffer can be asked for, but which lets buffers grow, adds one of those.
pub fn bound() -> u64 {
    const MOST: u64 = 24 * MIB;
    const DEFAULT_RECEIVE_BUFFER: u64 = 6 * MIB;
    match memory::settable_receive_buffer() >= BACKLOG_DEFAULT {
        true => MOST,
        // What the kernel keeps beside the bytes is charged too.
        false => MOST + memory::largest_receive_buffer().saturating_sub(DEFAULT_RECEIVE_BUFFER) * 5 / 4,
    }
}

/// Panics unless nothing was lost, and nearly all went through the kernel.
#[track_caller]
pub fn must_have_stayed_in_the_kernel(status: &Status) {
    let (sockmap, all) = (status.sockmap().sum(), status.carried().sum());
    assert!(
        sockmap * 100 >= all * 99,
        "{sockmap} of {all} bytes through the kernel"
    );
    must_be_sound(status);
}

/// Panics unless the kernel's counters added up.
#[track_caller]
pub fn must_be_sound(status: &Status) {
    assert_eq!(
        status.number("/closes/integrity"),
        0,
        "the kernel's counters did not add up"
    );
}

/// Reads the rest of a stream, `from..total`, and only then lets the writer end it: bytes that a source has left
/// when its end arrives while it is held back are copied, and that is not what is looked at.
#[track_caller]
pub fn finish(writer: Writer, writing: TcpStream, mut reading: TcpStream, seed: u64, from: u64, total: u64) {
    let got = receive_from(&mut reading, seed, from, total);
    assert_eq!(
        (got.bytes, got.ending, got.wrong_at),
        (total - from, Ending::Enough, None)
    );
    writer.join().expect("writing everything");
    writing.shutdown(Shutdown::Write).expect("ending");
    receive_from(&mut reading, seed, total, u64::MAX).must_be_whole(0);
}
