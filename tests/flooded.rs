//! Clients that have more to send at once than the first window: over loopback their answer to an ACK is there before whoever holds
//! the proxy's socket has let it go, and must not be left with a closed window. See `is_flooded` in `bpf/c/slot/forward.h`.

use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use crate::harness::pattern::fill;
use crate::harness::slow::{DOWN, MIB, UP, must_be_sound};
use crate::harness::sockets::{number_after, ss};
use crate::harness::turns::alone;
use crate::harness::{PATIENCE, Plan, Proxy, Upstream, connect, receive, within};

/// A sender with a closed window probes after 200 ms (TCP_RTO_MIN).
const PROBE: Duration = Duration::from_millis(150);
const SESSIONS: usize = 40;
/// A listener's options that change nothing.
const PLAIN: &str = "backlog = 511";

/// What a stream has in its first bytes, ready to be sent at once.
fn ready(seed: u64, bytes: u64) -> Vec<u8> {
    let mut buffer = vec![0; bytes as usize];
    fill(seed, 0, &mut buffer);
    buffer
}

/// Pours all of it out, and ends when the other end has.
fn pour(mut stream: &TcpStream, bytes: &[u8]) {
    stream.write_all(bytes).expect("sending");
    stream.shutdown(Shutdown::Write).expect("ending the stream");
    receive(&mut stream, DOWN).must_be_whole(0);
}

/// The other end.
fn take(mut stream: &TcpStream, bytes: u64) {
    receive(&mut stream, UP).must_be_whole(bytes);
    stream.shutdown(Shutdown::Write).expect("ending the stream");
}

/// Says how long each of the sessions takes in which a client pours so many bytes out, to a proxy that offloads after the given ones.
/// `options` are the listener's. The kernel has to carry `least` bytes of each on average.
fn sessions(options: &str, offload_after: &str, bytes: u64, least: u64) -> Vec<Duration> {
    let upstream = Upstream::serve("127.0.0.1", move |stream| take(&stream, bytes));
    let mut plan = Plan::new();
    let offload_after = format!("ebpf_offload_after = \"{offload_after}\"");
    let front = plan.server_listening(options, &upstream, &offload_after);
    let proxy = plan.start();
    let poured = ready(UP, bytes);
    let times = (0..SESSIONS).map(|_| {
        let since = Instant::now();
        pour(&connect(front), &poured);
        upstream.result();
        since.elapsed()
    });
    let times = times.collect();
    must_have_been_the_kernel(&proxy, least * SESSIONS as u64);
    times
}

/// What ends while it is held back is copied, so not all of it is the kernel's.
fn must_have_been_the_kernel(proxy: &Proxy, bytes: u64) {
    let status = proxy.settle();
    must_be_sound(&status);
    let carried = status.sockmap().sum();
    assert!(
        carried >= bytes,
        "{carried} bytes through the kernel, not {bytes}"
    );
}

fn must_not_wait_for_probes(times: &[Duration]) {
    let late = times.iter().filter(|time| **time >= PROBE).count();
    eprintln!("{late} of {SESSIONS} late");
    assert!(
        late <= SESSIONS / 10,
        "{late} of {SESSIONS} sessions were late: {times:?}"
    );
}

#[test]
fn a_client_that_has_much_to_say_at_once_does_not_have_to_probe() {
    let _alone = alone();
    for bytes in [300_000, MIB] {
        must_not_wait_for_probes(&sessions(PLAIN, "0", bytes, bytes / 2));
    }
}

/// The copy leaves the receive queue full, so most of what the client sends passes through the socket backlog while that is taken: the
/// source is held back with a window that is closed and nothing in its queue. See `make_room` in `bpf/c/slot/buffers.h`.
#[test]
fn a_client_whose_session_is_taken_over_while_it_pours_does_not_have_to_probe() {
    let _alone = alone();
    for options in [PLAIN, "rcvbuf = \"64k\""] {
        must_not_wait_for_probes(&sessions(options, "200k", MIB, MIB / 16));
    }
}

#[test]
fn a_receive_buffer_that_was_given_more_has_its_own_size_again_afterwards() {
    let _alone = alone();
    let upstream = Upstream::serve("127.0.0.1", |mut stream| {
        std::io::copy(&mut stream, &mut std::io::sink()).expect("receiving")
    });
    let mut plan = Plan::new();
    let front = plan.server_listening("rcvbuf = \"64k\"", &upstream, "");
    let proxy = plan.start();
    let mut client = connect(front);
    client.write_all(&ready(UP, 64 * MIB)).expect("sending");
    let size = || number_after(&ss("-m", &format!("sport = :{}", front.port())), ",rb");
    assert!(within(PATIENCE, || size() == 2 * 64 * 1024), "{}", size());
    drop(client);
    assert_eq!(upstream.result(), 64 * MIB);
    must_have_been_the_kernel(&proxy, 32 * MIB);
}

#[test]
fn a_receive_buffer_of_a_fixed_size_does_not_make_bulk_wait_for_probes() {
    let _alone = alone();
    const BYTES: u64 = 256 * MIB;
    let upstream = Upstream::serve("127.0.0.1", |mut stream| {
        std::io::copy(&mut stream, &mut std::io::sink()).expect("receiving")
    });
    let mut plan = Plan::new();
    let own = plan.server(&upstream);
    let fixed = ["256k", "64k"].map(|bytes| {
        let options = format!("rcvbuf = \"{bytes}\"");
        plan.server_listening(&options, &upstream, "")
    });
    let proxy = plan.start();
    let bytes = ready(UP, BYTES);
    let times = [own, fixed[0], fixed[1]].map(|front| {
        let since = Instant::now();
        pour(&connect(front), &bytes);
        assert_eq!(upstream.result(), BYTES);
        since.elapsed()
    });
    must_have_been_the_kernel(&proxy, BYTES);
    eprintln!("{times:?}");
    // Each pause would cost 200 ms, and there is one for each few megabytes.
    let longest = 8 * times[0] + PROBE;
    assert!(times[1..].iter().all(|time| *time < longest), "{times:?}");
}
