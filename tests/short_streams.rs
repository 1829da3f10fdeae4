//! Streams that are over before their source would be held back for the first time: the kernel has to be as fast with them as a copy.
//! See `widen_target` in `bpf/c/slot/buffers.h`.

use std::io::Write;
use std::net::{Shutdown, TcpListener};
use std::time::Instant;

use nix::sys::socket::{setsockopt, sockopt::TcpMaxSeg};

use crate::harness::pattern::fill;
use crate::harness::slow::{DOWN, UP, must_be_sound};
use crate::harness::turns::alone;
use crate::harness::{Plan, Upstream, connect, receive};

/// Less than `ebpf_backlog_size`.
const BYTES: u64 = 7 << 19;
const ROUNDS: usize = 15;

#[test]
fn a_stream_over_an_ethernet_does_not_wait_for_ticks() {
    let _alone = alone();
    let listener = TcpListener::bind("127.0.0.1:0").expect("binding an upstream");
    setsockopt(&listener, TcpMaxSeg, &1460).expect("TCP_MAXSEG");
    let upstream = Upstream::on(listener, |mut stream| {
        receive(&mut stream, UP).must_be_whole(BYTES);
        stream.shutdown(Shutdown::Write).expect("ending the stream");
    });
    let mut plan = Plan::new();
    let forwarded = plan.server(&upstream);
    let copied = plan.server_with("127.0.0.1", &upstream, "ebpf_enable = false");
    let proxy = plan.start();
    let mut poured = vec![0; BYTES as usize];
    fill(UP, 0, &mut poured);
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        for (front, times) in [forwarded, copied].into_iter().zip(&mut times) {
            let mut client = connect(front);
            let since = Instant::now();
            client.write_all(&poured).expect("sending");
            client.shutdown(Shutdown::Write).expect("ending the stream");
            receive(&mut client, DOWN).must_be_whole(0);
            times.push(since.elapsed());
            upstream.result();
        }
    }
    let status = proxy.settle();
    must_be_sound(&status);
    let carried = status.sockmap().sum();
    // What ends while it is held back is copied, so not all of it is the kernel's.
    assert!(
        carried >= BYTES * ROUNDS as u64 / 2,
        "{carried} bytes through the kernel"
    );
    let [forwarded, copied] = times.map(|mut times| {
        times.sort_unstable();
        times[ROUNDS / 2]
    });
    eprintln!("forwarded {forwarded:?}, copied {copied:?}");
    // Where the kernel thread sleeps for ticks, it takes 18 ms beside 8.
    assert!(
        forwarded < 2 * copied,
        "forwarded {forwarded:?}, copied {copied:?}"
    );
}
