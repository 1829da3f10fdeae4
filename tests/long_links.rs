//! Links on which much is on its way at any time, or lost: a long way, or a slow router with a long queue. Over loopback there is never
//! more than one burst, and whoever looks only there does not see what waits for an acknowledgement that is far away.

use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use crate::harness::long_way::{LongWay, Way};
use crate::harness::networks::Networks;
use crate::harness::pattern::{pause, receive_from};
use crate::harness::slow::{DOWN, MIB, PIECE, UP, must_be_sound, must_have_stayed_in_the_kernel};
use crate::harness::sockets::reset;
use crate::harness::turns::{alone, beside_others};
use crate::harness::{Front, PATIENCE, Plan, Writer, connect, receive, send, within};

const CLIENT: usize = 0;
const PROXY: usize = 2;

/// A client, a router and the proxy with its upstream. The router's way to the client carries 1 Gbit/s, and 16 MB wait there.
///
/// ```text
///   client 10.78.1.2 ─── 10.78.1.1 router 10.78.2.1 ─── 10.78.2.2 proxy
/// ```
fn networks() -> Networks<3> {
    Networks::new(["c", "r", "p"], |[c, r, p]| {
        vec![
            format!("ip -n {r} link add to-c type veth peer name to-r netns {c}"),
            format!("ip -n {r} link add to-p type veth peer name to-r netns {p}"),
            format!("ip -n {c} addr add 10.78.1.2/24 dev to-r; ip -n {c} link set to-r up"),
            format!("ip -n {r} addr add 10.78.1.1/24 dev to-c; ip -n {r} link set to-c up"),
            format!("ip -n {r} addr add 10.78.2.1/24 dev to-p; ip -n {r} link set to-p up"),
            format!("ip -n {p} addr add 10.78.2.2/24 dev to-r; ip -n {p} link set to-r up"),
            format!("ip -n {c} route add default via 10.78.1.1; ip -n {p} route add default via 10.78.2.1"),
            format!("ip netns exec {r} sysctl -qw net.ipv4.ip_forward=1"),
            format!("ip netns exec {r} tc qdisc add dev to-c root tbf rate 1gbit burst 256kb limit 16mb"),
            // It fills the queue of a router, which others avoid, and is allowed everywhere.
            format!("ip netns exec {p} sysctl -qw net.ipv4.tcp_congestion_control=reno"),
        ]
    })
}

/// How often what a machine that stands still may spoil is tried.
const TRIES: u32 = 3;

/// How long the stream takes after its first part, in which TCP finds out what the link carries.
fn time(writing: &TcpStream, reading: &mut TcpStream, total: u64) -> Duration {
    const FIRST: u64 = 32 * MIB;
    let writer = Writer::start(writing, DOWN, total, PIECE);
    assert_eq!(receive_from(reading, DOWN, 0, FIRST).bytes, FIRST);
    let begun = Instant::now();
    assert_eq!(receive_from(reading, DOWN, FIRST, total).bytes, total - FIRST);
    let took = begun.elapsed();
    writer.join().expect("writing");
    took
}

#[test]
fn a_source_that_is_held_back_is_let_go_before_a_long_link_runs_dry() {
    const TOTAL: u64 = 192 * MIB;
    let _alone = alone();
    let networks = &networks();
    networks.within(PROXY, || {
        let listener = TcpListener::bind(("10.78.2.2", 0)).expect("binding");
        let address = listener.local_addr().expect("its address");
        let mut client = networks.within(CLIENT, || connect(address));
        let (server, _) = listener.accept().expect("accepting");
        let direct = time(&server, &mut client, TOTAL);
        drop((client, server));

        // A machine that stands still for a moment proves nothing.
        let is_as_fast = (0..TRIES).any(|_| {
            let mut plan = Plan::new();
            let front = Front::between(&mut plan, "10.78.2.2", "127.0.0.1", "");
            let proxy = plan.start();
            let mut client = networks.within(CLIENT, || connect(front.address));
            let upstream = front.accept();
            let proxied = time(&upstream, &mut client, TOTAL);
            drop((client, upstream));
            let status = proxy.settle();
            must_have_stayed_in_the_kernel(&status);
            let pauses = status.number("/pauses");
            eprintln!("direct {direct:.2?}, by the proxy {proxied:.2?}, {pauses} pauses");
            assert!(pauses > 3, "the link was faster than the upstream");
            proxied < direct * 3 / 2
        });
        assert!(is_as_fast, "slower than a direct connection each time");
    });
}

/// Behind each hole that is filled a burst of segments becomes readable at once.
#[test]
fn a_stream_whose_packets_are_lost_on_the_way_stays_in_the_kernel_and_is_as_fast() {
    const TOTAL: u64 = 56 * MIB;
    let _alone = alone();
    let networks = &Networks::new(["c", "p"], |_| Vec::new());
    // So slow that small pieces of this rate are none of the kernel's troubles.
    let way = Way {
        lost: 1_000,
        ..Way::faultless(Duration::from_millis(10), 125, MIB)
    };
    let _way = LongWay::between(networks, [0, 1], "way", 84, way);
    networks.within(1, || {
        let listener = TcpListener::bind(("10.84.0.2", 0)).expect("binding");
        let address = listener.local_addr().expect("its address");
        let client = networks.within(0, || connect(address));
        let (mut server, _) = listener.accept().expect("accepting");
        let direct = time(&client, &mut server, TOTAL);
        drop((client, server));

        // Nothing is copied on an idle machine. Where others keep the processors from the kernel thread bursts wait, and look like
        // small pieces after all; were each burst taken for those, a tenth would be the kernel's.
        let is_so = (0..TRIES).any(|_| {
            let mut plan = Plan::new();
            let front = Front::between(&mut plan, "10.84.0.2", "127.0.0.1", "");
            let proxy = plan.start();
            let client = networks.within(0, || connect(front.address));
            let mut upstream = front.accept();
            let proxied = time(&client, &mut upstream, TOTAL);
            drop((client, upstream));
            let status = proxy.settle();
            must_be_sound(&status);
            let (sockmap, gathers) = (status.sockmap().sum(), status.number("/gathers"));
            eprintln!(
                "direct {direct:.2?}, by the proxy {proxied:.2?}; {sockmap} of {TOTAL} bytes by the kernel, {gathers} gathers"
            );
            sockmap * 5 > TOTAL && proxied < direct * 3 / 2
        });
        assert!(is_so, "it is slower, or copied, each time");
    });
}

/// From a socket whose streams both have an end Linux sends no reset (tcp_disconnect, 6.12): what it drops then nobody sends again.
#[test]
fn an_answer_that_is_lost_on_the_way_is_not_forgotten_when_its_upstream_resets() {
    const STEP: u64 = 2048;
    const ANSWER: u64 = 10_000;
    const ARRIVES_MS: u64 = 200;
    /// The worker itself may come late: only what stays has to be the upstream's doing.
    const STAYS_MS: u64 = 1_000;
    let _turn = beside_others();
    let networks = &Networks::new(["c", "p"], |[_, p]| {
        let small = "net.ipv4.tcp_wmem='4096 16384 65536'";
        vec![format!("ip netns exec {p} sysctl -qw {small}")]
    });
    let way = Way::faultless(Duration::from_millis(1), 1000, MIB);
    let way = LongWay::between(networks, [0, 1], "way", 85, way);
    networks.within(1, || {
        let mut plan = Plan::new();
        let front = Front::between(&mut plan, "10.85.0.2", "127.0.0.1", "ebpf_enable = false");
        let proxy = plan.start();
        let mut client = networks.within(0, || connect(front.address));
        let mut upstream = front.accept();
        // The client's end of stream is to come behind what the upstream does not read.
        let mut sent = 0;
        while within(Duration::from_millis(STAYS_MS), || {
            sent == proxy.status().relay().to_upstream
        }) {
            send(&mut client, UP, sent, sent + STEP).expect("sending the question");
            sent += STEP;
        }
        client.shutdown(Shutdown::Write).expect("ending the question");
        pause(ARRIVES_MS);
        way.cut(1, true);
        send(&mut upstream, DOWN, 0, ANSWER).expect("sending the answer");
        upstream.shutdown(Shutdown::Write).expect("ending the answer");
        let is_sent = within(PATIENCE, || proxy.status().relay().to_downstream == ANSWER);
        assert!(is_sent, "the answer was not passed on");
        pause(ARRIVES_MS);
        reset(upstream);
        let status = proxy.settle();
        assert_eq!(status.number("/closes/upstream_reset"), 1, "{:#}", status.json());
        way.cut(1, false);
        receive(&mut client, DOWN).must_be_a_prefix_and_a_reset(ANSWER);
    });
}

#[test]
fn what_a_last_flight_had_outstanding_is_counted_anew() {
    const ANSWER: u64 = 3 * MIB;
    /// It is counted anew every three seconds.
    const COUNTED_MS: u64 = 5_000;
    let _turn = beside_others();
    let networks = &networks();
    networks.within(PROXY, || {
        let mut plan = Plan::new();
        let front = Front::between(&mut plan, "10.78.2.2", "127.0.0.1", "");
        let proxy = plan.start();
        let mut client = networks.within(CLIENT, || connect(front.address));
        let upstream = front.accept();
        let backlog = || proxy.status().number("/workers/0/backlog_bytes");
        let mut read = 0;
        let mut answer = || {
            let mut writing = upstream.try_clone().expect("a second handle");
            let writer = std::thread::spawn(move || send(&mut writing, DOWN, read, read + ANSWER));
            assert_eq!(receive_from(&mut client, DOWN, read, read + ANSWER).bytes, ANSWER);
            writer.join().expect("the writer").expect("writing");
            read += ANSWER;
        };
        // All has been read, and so acknowledged.
        let is_left = within(PATIENCE, || {
            answer();
            backlog() > 0
        });
        assert!(is_left, "no flight was so large");
        pause(COUNTED_MS);
        assert_eq!(backlog(), 0, "nothing is outstanding");
        // Nor if nobody has waked the worker since.
        (0..8).for_each(|_| answer());
        pause(COUNTED_MS);
        assert_eq!(backlog(), 0, "nothing is outstanding");
        drop((client, upstream));
        must_have_stayed_in_the_kernel(&proxy.settle());
    });
}
