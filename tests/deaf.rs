//! Two streams of small pieces that cross in one session, between ends that read less than they write: none waits for the other
//! one for ever. See `worker/src/deaf.rs`.

use std::time::{Duration, Instant};

use crate::harness::end::{Ends, Half, Script, Start, play};
use crate::harness::slow::{DOWN, MIB, UP, must_be_sound, proxy_with};
use crate::harness::turns::alone;
use crate::harness::{Flag, Front};

const EACH: u64 = 28 * MIB;

/// An end that writes pieces of so many bytes, and reads so many each time.
fn end(seeds: [u64; 2], writes: usize, reads: usize, begins_ms: u64) -> Script {
    let half = |seed, piece| Half {
        seed,
        bytes: EACH,
        piece,
        gap: None,
    };
    Script {
        out: half(seeds[0], writes),
        into: half(seeds[1], reads),
        start: Start::After(Duration::from_millis(begins_ms)),
        glued: false,
        ends: Ends::Last,
        reset_after: None,
        receive_buffer: None,
    }
}

/// Two streams cross. Says how long that takes.
fn cross(front: &Front) -> Duration {
    let (client, upstream) = front.open();
    let since = Instant::now();
    let connected = Flag::default();
    connected.raise();
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| play(&end([UP, DOWN], 969, 236, 22), client, &connected));
        let answering = play(&end([DOWN, UP], 143, 75, 0), upstream, &connected);
        for outcome in [asking.join().expect("the client"), answering] {
            outcome.received.must_be_whole(EACH);
            assert!(outcome.ended, "{outcome:?}");
        }
    });
    since.elapsed()
}

#[test]
fn streams_of_small_pieces_that_fill_both_sides_both_arrive() {
    let _alone = alone();
    // Without `read_deaf` about one in four of them hangs.
    const SESSIONS: u64 = 6;
    let (proxy, front) = proxy_with("::1", "ebpf_backlog_size = \"64k\"");
    for _ in 0..SESSIONS {
        eprintln!("{:?}", cross(&front));
    }
    let status = proxy.settle();
    must_be_sound(&status);
    assert_eq!(status.number("/closes/finished"), SESSIONS);
    assert!(status.sockmap().sum() > EACH, "{:#}", status.json());
}
