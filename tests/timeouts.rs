//! When the proxy ends a session by itself: idleness, an upstream that does not answer, an upstream
//! that refuses; and when it must not.

use std::io::Write;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::harness::pattern::{pause, ping};
use crate::harness::sockets::{Deaf, try_connect};
use crate::harness::{Bytes, Ending, Plan, Port, Upstream, connect, receive, send};

const UP: u64 = 11;
const DOWN: u64 = 22;
const SHORT: &str = "proxy_timeout = \"1s\"\nebpf_timer_period = \"200ms\"";
/// Long enough that a busy machine brings each byte in time, and short enough that all of them take longer.
const LONGER: &str = "proxy_timeout = \"2s\"\nebpf_timer_period = \"200ms\"";
/// Between two of the bytes that keep a session alive.
const PAUSE_MS: u64 = 400;

#[test]
fn an_idle_session_is_reset_on_both_sides_at_proxy_timeout() {
    for server in ["", "ebpf_enable = false"] {
        let upstream = Upstream::sink("127.0.0.1", UP);
        let mut plan = Plan::new().stream(SHORT);
        let front = plan.server_with("127.0.0.1", &upstream, server);
        let proxy = plan.start();
        let mut client = connect(front);
        let start = Instant::now();
        send(&mut client, UP, 0, 100).expect("sending");
        let got = receive(&mut client, DOWN);
        let took = start.elapsed();
        assert!(
            (Duration::from_millis(800)..Duration::from_secs(15)).contains(&took),
            "closed after {took:?}"
        );
        assert_eq!((got.bytes, got.ending), (0, Ending::Reset));
        upstream.result().must_be_a_prefix_and_a_reset(100);
        proxy.settle();
    }
}

#[test]
fn a_session_that_never_says_anything_is_closed_at_proxy_timeout() {
    let upstream = Upstream::sink("127.0.0.1", UP);
    let mut plan = Plan::new().stream(SHORT);
    let front = plan.server(&upstream);
    let proxy = plan.start();
    let start = Instant::now();
    let mut client = connect(front);
    assert_eq!(receive(&mut client, DOWN).bytes, 0);
    let took = start.elapsed();
    assert!(
        (Duration::from_millis(800)..Duration::from_secs(15)).contains(&took),
        "closed after {took:?}"
    );
    assert_eq!(upstream.result().bytes, 0);
    proxy.settle();
}

#[test]
fn bytes_that_only_the_kernel_sees_keep_a_session_alive() {
    let upstream = Upstream::sink("127.0.0.1", UP);
    let mut plan = Plan::new().stream(LONGER);
    let front = plan.server(&upstream);
    let proxy = plan.start();
    let mut client = connect(front);
    proxy.wait("the session is offloaded", |s| s.offloaded() == 1);
    for offset in 0..12 {
        pause(PAUSE_MS);
        send(&mut client, UP, offset, offset + 1).expect("a byte within the timeout");
    }
    drop(client);
    upstream.result().must_be_whole(12);
    assert_eq!(
        proxy.settle().sockmap(),
        Bytes {
            to_upstream: 12,
            to_downstream: 0
        }
    );
}

#[test]
fn bytes_towards_the_client_alone_keep_a_session_alive() {
    let upstream = Upstream::serve("127.0.0.1", |mut stream| {
        for offset in 0..12 {
            pause(PAUSE_MS);
            send(&mut stream, DOWN, offset, offset + 1).expect("a byte within the timeout");
        }
    });
    let mut plan = Plan::new().stream(LONGER);
    let front = plan.server(&upstream);
    let proxy = plan.start();
    receive(&mut connect(front), DOWN).must_be_whole(12);
    upstream.result();
    proxy.settle();
}

#[test]
fn a_half_closed_session_that_still_carries_bytes_stays_alive() {
    let upstream = Upstream::serve("127.0.0.1", |mut stream| {
        let question = receive(&mut stream, UP);
        for offset in 0..8 {
            pause(PAUSE_MS);
            send(&mut stream, DOWN, offset, offset + 1).expect("a byte within the timeout");
        }
        question
    });
    let mut plan = Plan::new().stream(LONGER);
    let front = plan.server(&upstream);
    let proxy = plan.start();
    let mut client = connect(front);
    send(&mut client, UP, 0, 10).expect("sending");
    client
        .shutdown(std::net::Shutdown::Write)
        .expect("ending the question");
    receive(&mut client, DOWN).must_be_whole(8);
    upstream.result().must_be_whole(10);
    proxy.settle();
}

#[test]
fn an_upstream_that_does_not_answer_is_given_up_at_proxy_connect_timeout() {
    let deaf = Deaf::new();
    let mut plan = Plan::new().stream("proxy_connect_timeout = \"500ms\"");
    let front = plan.server(deaf.address);
    let proxy = plan.start();
    let start = Instant::now();
    let mut client = connect(front);
    client.write_all(b"anyone there?").expect("sending");
    let got = receive(&mut client, DOWN);
    let took = start.elapsed();
    assert_eq!(got.bytes, 0);
    assert!(
        matches!(got.ending, Ending::Fin | Ending::Reset),
        "the client must be told: {got:?}"
    );
    assert!(
        (Duration::from_millis(400)..Duration::from_secs(15)).contains(&took),
        "given up after {took:?}"
    );
    proxy.settle();
}

#[test]
fn a_peer_that_answers_too_late_is_not_taken_for_the_next_one() {
    let (late, next) = (Deaf::new(), Deaf::new());
    let mut plan = Plan::new()
        .stream("proxy_connect_timeout = \"3500ms\"")
        .tables(&format!(
            "[[upstream]]\nname = \"group\"\nserver = [{{ address = \"{}\" }}, {{ address = \"{}\" }}]\n",
            late.address, next.address
        ));
    let front = plan.server("group");
    let proxy = plan.start();
    let mut client = connect(front);
    proxy.wait("the master has the sockets too", |s| {
        s.number("/sessions/kept") == 1
    });
    // It goes on having the first attempt's.
    let master = Pid::from_raw(proxy.pid());
    kill(master, Signal::SIGSTOP).expect("stopping the master");
    proxy.wait("the second peer is tried", |s| {
        s.number("/upstreams/0/peers/1/active") == 1
    });
    let _late = late.hear();
    // Its SYN is repeated every second.
    pause(1200);
    let upstream = Upstream::on(next.hear(), crate::harness::upstream::echo);
    let echoed = ping(&mut client, UP, 3);
    kill(master, Signal::SIGCONT).expect("letting the master go on");
    echoed.expect("the second peer's answer");
    drop(client);
    let status = proxy.settle();
    assert_eq!(status.number("/closes/finished"), 1);
    assert!(
        status.sockmap().to_upstream > 0 && status.relay().sum() == 0,
        "{:#}",
        status.json()
    );
    drop(upstream);
}

#[test]
fn an_upstream_that_refuses_ends_the_session_at_once_and_nothing_else() {
    let nobody = Port::claim();
    let upstream = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new();
    let refused = plan.server(nobody.on("127.0.0.1"));
    let served = plan.server(&upstream);
    let proxy = plan.start();
    let mut other = connect(served);
    ping(&mut other, UP, 3).expect("the other session before");
    for _ in 0..50 {
        let start = Instant::now();
        match try_connect(refused) {
            Ok(mut client) => {
                let got = receive(&mut client, DOWN);
                assert_eq!(got.bytes, 0);
                assert!(
                    matches!(got.ending, Ending::Fin | Ending::Reset),
                    "the client must be told: {got:?}"
                );
            }
            // The session was over before the client had looked.
            Err(e) => assert_eq!(e.kind(), std::io::ErrorKind::ConnectionReset, "{e}"),
        }
        assert!(
            start.elapsed() < Duration::from_secs(15),
            "told after {:?}",
            start.elapsed()
        );
    }
    ping(&mut other, UP, 3).expect("the other session after");
    drop(other);
    proxy.settle();
}

#[test]
fn a_client_that_leaves_while_the_upstream_is_being_connected_leaves_nothing_behind() {
    let deaf = Deaf::new();
    let mut plan = Plan::new().stream("proxy_connect_timeout = \"2s\"");
    let front = plan.server(deaf.address);
    let proxy = plan.start();
    for _ in 0..10 {
        let client = connect(front);
        pause(20);
        crate::harness::sockets::reset(client);
    }
    proxy.settle();
}
