//! How a session ends: each direction by itself, every byte before its FIN; a reset as a reset, on both
//! sides and in every phase; never a clean end of a truncated stream. Each test runs on both paths: forwarded by
//! the kernel, and copied.

use std::io::Write;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::mpsc;

use crate::harness::pattern::{fill, pause, receive_from, wait_for_a_byte};
use crate::harness::sockets::{Deaf, reset, send_and_hold};
use crate::harness::{
    Bytes, Ending, Plan, Proxy, Received, Target, Upstream, connect, exchange, receive, receive_exactly, send,
};

const UP: u64 = 11;
const DOWN: u64 = 22;
const MIB: u64 = 1024 * 1024;

/// Who carries the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Path {
    Kernel,
    Copy,
}

/// Runs a test on both paths; what is printed shows which one failed.
fn on_both_paths(test: impl Fn(Path)) {
    for path in [Path::Kernel, Path::Copy] {
        eprintln!("on the path {path:?}");
        test(path);
    }
}

impl Path {
    /// A proxy before the target.
    fn proxy_for(self, target: impl Target) -> (Proxy, SocketAddr) {
        let mut plan = Plan::new().stream(&format!("ebpf_enable = {}", self == Path::Kernel));
        let front = plan.server(target);
        (plan.start(), front)
    }

    /// A client whose session has reached its path.
    fn client(self, proxy: &Proxy, front: SocketAddr) -> TcpStream {
        let client = connect(front);
        proxy.wait("the session is on its path", |s| match self {
            Path::Kernel => s.offloaded() == 1,
            Path::Copy => s.active() == 1,
        });
        client
    }
}

#[test]
fn a_client_that_has_ended_before_the_upstream_is_connected_still_gets_its_answer() {
    on_both_paths(|path| {
        let deaf = Deaf::new();
        let (proxy, front) = path.proxy_for(deaf.address);

        let client = connect(front);
        send(&mut &client, UP, 0, 5000).expect("sending the question");
        client.shutdown(Shutdown::Write).expect("ending the question");
        pause(300);
        let upstream = Upstream::on(deaf.hear(), |stream| exchange(stream, DOWN, 2 * MIB, UP));

        receive(&mut &client, DOWN).must_be_whole(2 * MIB);
        upstream.result().must_be_whole(5000);
        proxy.settle();
    });
}

#[test]
fn a_fin_glued_to_the_last_data_loses_nothing() {
    on_both_paths(|path| {
        let upstream = Upstream::serve("127.0.0.1", |mut stream| {
            let got = receive(&mut stream, UP);
            let mut answer = vec![0u8; 700];
            fill(DOWN, 0, &mut answer);
            send_and_hold(&stream, &answer);
            stream.shutdown(Shutdown::Write).expect("ending the answer");
            got
        });
        let (proxy, front) = path.proxy_for(&upstream);
        for round in 0..150u64 {
            let length = 1 + round * 97 % 9000;
            let client = connect(front);
            if round % 3 == 0 {
                // Time for the kernel to take the session over; the other rounds race with that.
                pause(5);
            }
            let mut question = vec![0u8; length as usize];
            fill(UP, 0, &mut question);
            send_and_hold(&client, &question);
            client.shutdown(Shutdown::Write).expect("ending the question");
            receive(&mut &client, DOWN).must_be_whole(700);
            upstream.result().must_be_whole(length);
        }
        proxy.settle();
    });
}

#[test]
fn a_client_that_half_closes_still_receives_the_whole_answer() {
    on_both_paths(|path| {
        const ANSWER: u64 = 50 * MIB;
        let upstream = Upstream::serve("127.0.0.1", |mut stream| {
            let question = receive(&mut stream, UP);
            send(&mut stream, DOWN, 0, ANSWER).expect("sending the answer");
            question
        });
        let (proxy, front) = path.proxy_for(&upstream);
        let client = path.client(&proxy, front);
        send(&mut &client, UP, 0, 10).expect("sending the question");
        client.shutdown(Shutdown::Write).expect("ending the question");
        receive(&mut &client, DOWN).must_be_whole(ANSWER);
        upstream.result().must_be_whole(10);
        let carried = proxy.settle().carried();
        assert_eq!(
            carried,
            Bytes {
                to_upstream: 10,
                to_downstream: ANSWER
            }
        );
    });
}

#[test]
fn an_upstream_that_half_closes_still_receives_everything_the_client_sends() {
    on_both_paths(|path| {
        const QUESTION: u64 = 50 * MIB;
        let upstream = Upstream::serve("127.0.0.1", |mut stream| {
            send(&mut stream, DOWN, 0, 10).expect("sending the greeting");
            stream.shutdown(Shutdown::Write).expect("ending the greeting");
            receive(&mut stream, UP)
        });
        let (proxy, front) = path.proxy_for(&upstream);
        let client = connect(front);
        receive(&mut &client, DOWN).must_be_whole(10);
        send(&mut &client, UP, 0, QUESTION).expect("sending after the upstream's end");
        client.shutdown(Shutdown::Write).expect("ending");
        upstream.result().must_be_whole(QUESTION);
        proxy.settle();
    });
}

#[test]
fn a_reset_by_the_client_reaches_the_upstream_as_a_reset() {
    on_both_paths(|path| {
        let (all, arrived) = mpsc::channel();
        let upstream = Upstream::serve("127.0.0.1", move |mut stream| {
            receive_exactly(&mut stream, UP, 70_000);
            all.send(()).expect("saying that all has arrived");
            receive_from(&mut stream, UP, 70_000, u64::MAX)
        });
        let (proxy, front) = path.proxy_for(&upstream);
        let client = path.client(&proxy, front);
        send(&mut &client, UP, 0, 70_000).expect("sending");
        arrived.recv().expect("all has arrived before the reset is sent");
        proxy.wait("the bytes are counted", |s| s.carried().to_upstream == 70_000);
        reset(client);
        let got = upstream.result();
        assert_eq!((got.bytes, got.ending), (0, Ending::Reset));
        proxy.settle();
    });
}

#[test]
fn a_reset_by_the_upstream_reaches_the_client_as_a_reset() {
    on_both_paths(|path| {
        let upstream = Upstream::serve("127.0.0.1", |mut stream| {
            send(&mut stream, DOWN, 0, 70_000).expect("sending");
            wait_for_a_byte(&stream);
            reset(stream);
        });
        let (proxy, front) = path.proxy_for(&upstream);
        let client = connect(front);
        receive_exactly(&mut &client, DOWN, 70_000);
        (&client).write_all(b"!").expect("asking for the reset");
        let got = receive_from(&mut &client, DOWN, 70_000, u64::MAX);
        assert_eq!(
            got,
            Received {
                bytes: 0,
                ending: Ending::Reset,
                wrong_at: None
            }
        );
        upstream.result();
        proxy.settle();
    });
}

#[test]
fn a_reset_in_full_flow_leaves_an_exact_prefix_and_a_reset() {
    on_both_paths(|path| {
        for seed in 0..8u64 {
            let upstream = Upstream::sink("127.0.0.1", seed);
            let (proxy, front) = path.proxy_for(&upstream);
            let client = connect(front);
            let sent = (seed + 1) * MIB + seed * 1111;
            send(&mut &client, seed, 0, sent).expect("sending");
            reset(client);
            upstream.result().must_be_a_prefix_and_a_reset(sent);
            proxy.settle();
        }
    });
}

#[test]
fn a_reset_after_a_half_close_is_still_a_reset() {
    on_both_paths(|path| {
        let upstream = Upstream::serve("127.0.0.1", |mut stream| {
            let question = receive(&mut stream, UP);
            send(&mut stream, DOWN, 0, 1000).expect("sending part of the answer");
            pause(200);
            reset(stream);
            question
        });
        let (proxy, front) = path.proxy_for(&upstream);
        let client = path.client(&proxy, front);
        send(&mut &client, UP, 0, 10).expect("sending the question");
        client.shutdown(Shutdown::Write).expect("ending the question");
        receive(&mut &client, DOWN).must_be_a_prefix_and_a_reset(1000);
        upstream.result().must_be_whole(10);
        proxy.settle();
    });
}

#[test]
fn an_empty_session_is_an_empty_session_for_the_upstream() {
    on_both_paths(|path| {
        let upstream = Upstream::sink("127.0.0.1", UP);
        let (proxy, front) = path.proxy_for(&upstream);
        for _ in 0..20 {
            drop(connect(front));
            upstream.result().must_be_whole(0);
        }
        let status = proxy.settle();
        assert_eq!(status.carried(), Bytes::default());
        assert_eq!(status.number("/sessions/total"), 20);
    });
}

#[test]
fn a_reader_that_stalls_loses_nothing_although_the_client_has_closed() {
    on_both_paths(|path| {
        const SENT: u64 = 8 * MIB;
        let upstream = Upstream::serve("127.0.0.1", |mut stream| {
            receive_exactly(&mut stream, UP, 1000);
            pause(1500);
            receive_from(&mut stream, UP, 1000, u64::MAX)
        });
        let (proxy, front) = path.proxy_for(&upstream);
        let client = path.client(&proxy, front);
        let sender = std::thread::spawn(move || {
            send(&mut &client, UP, 0, SENT).expect("sending");
            // Closed at once, long before the reader goes on.
            drop(client);
        });
        upstream.result().must_be_whole(SENT - 1000);
        sender.join().expect("the sender");
        let carried = proxy.settle().carried();
        assert_eq!(carried.to_upstream, SENT);
    });
}
