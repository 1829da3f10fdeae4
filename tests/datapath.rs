//! What a session may expect of the proxy, whichever way its bytes go: every byte and then FIN, or an
//! exact prefix and then RST; and that the kernel, not user space, carries it where it can.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::harness::pattern::{exchange_and_end, fill, pause, ping, receive_from, wait_for_a_byte};
use crate::harness::sockets::{Deaf, rewind};
use crate::harness::{
    Bytes, Front, Plan, Proxy, Received, Upstream, connect, exchange, receive, receive_exactly, send,
    upstream,
};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::MsgFlags;
use nix::unistd::Pid;

const UP: u64 = 11;
const DOWN: u64 = 22;
const MIB: u64 = 1024 * 1024;

/// A proxy before one upstream.
fn proxy_for<T>(upstream: &Upstream<T>) -> (Proxy, SocketAddr) {
    let mut plan = Plan::new();
    let front = plan.server(upstream);
    (plan.start(), front)
}

/// A client whose session the kernel has taken over.
fn offloaded_client(proxy: &Proxy, front: SocketAddr) -> TcpStream {
    let client = connect(front);
    proxy.wait("the session is offloaded", |s| s.offloaded() == 1);
    client
}

/// An upstream that answers `answer` bytes at the first byte it gets, and checks what it receives.
fn answering(ip: &str, answer: u64) -> Upstream<Received> {
    Upstream::serve(ip, move |stream| {
        wait_for_a_byte(&stream);
        exchange(stream, DOWN, answer, UP)
    })
}

fn the_kernel_carries_exactly_the_bytes(client_ip: &str, upstream_ip: &str) {
    const QUESTION: u64 = MIB + 17;
    const ANSWER: u64 = 2 * MIB + 3;
    let upstream = Upstream::serve(upstream_ip, |stream| {
        wait_for_a_byte(&stream);
        exchange_and_end(stream, DOWN, ANSWER, UP, QUESTION);
    });
    let mut plan = Plan::new();
    let front = plan.server_with(client_ip, &upstream, "");
    let proxy = plan.start();

    let client = offloaded_client(&proxy, front);
    exchange_and_end(client, UP, QUESTION, DOWN, ANSWER);
    upstream.result();

    let status = proxy.settle();
    assert_eq!(
        status.sockmap(),
        Bytes {
            to_upstream: QUESTION,
            to_downstream: ANSWER
        }
    );
    assert_eq!(status.relay(), Bytes::default());
    assert_eq!(status.number("/sessions/total"), 1);
    assert_eq!(status.fallbacks(), 0);
}

#[test]
fn the_kernel_carries_exactly_the_bytes_of_an_ipv4_session() {
    the_kernel_carries_exactly_the_bytes("127.0.0.1", "127.0.0.1");
}

#[test]
fn the_kernel_carries_exactly_the_bytes_of_an_ipv6_session() {
    the_kernel_carries_exactly_the_bytes("::1", "::1");
}

#[test]
fn the_kernel_carries_exactly_the_bytes_of_an_ipv6_client_of_an_ipv4_upstream() {
    the_kernel_carries_exactly_the_bytes("::1", "127.0.0.1");
}

#[test]
fn the_kernel_carries_exactly_the_bytes_of_an_ipv4_client_of_an_ipv6_upstream() {
    the_kernel_carries_exactly_the_bytes("127.0.0.1", "::1");
}

#[test]
fn what_a_client_sends_before_the_upstream_is_connected_arrives_first() {
    const EARLY: u64 = 300_000;
    let deaf = Deaf::new();
    let mut plan = Plan::new();
    let front = plan.server(deaf.address);
    let proxy = plan.start();

    let client = connect(front);
    let mut early = client.try_clone().expect("a second handle");
    let sender = std::thread::spawn(move || send(&mut early, UP, 0, EARLY));
    pause(300);
    // From now on the upstream answers; the proxy's SYN is repeated after a second.
    let upstream = Upstream::on(deaf.hear(), |stream| exchange(stream, DOWN, 1000, UP));
    sender.join().expect("the sender").expect("sending early");
    send(&mut &client, UP, EARLY, EARLY + 50_000).expect("sending late");
    client.shutdown(Shutdown::Write).expect("ending the question");

    receive(&mut &client, DOWN).must_be_whole(1000);
    upstream.result().must_be_whole(EARLY + 50_000);
    let carried = proxy.settle().carried();
    assert_eq!(
        carried,
        Bytes {
            to_upstream: EARLY + 50_000,
            to_downstream: 1000
        }
    );
}

#[test]
fn a_server_that_talks_first_is_heard_by_a_silent_client() {
    let upstream = Upstream::serve("127.0.0.1", |mut stream| {
        send(&mut stream, DOWN, 0, 100).expect("sending the greeting");
        receive_exactly(&mut stream, UP, 50);
        send(&mut stream, DOWN, 100, 200).expect("sending the second line");
        receive_from(&mut stream, UP, 50, u64::MAX)
    });
    let (proxy, front) = proxy_for(&upstream);
    let client = connect(front);
    receive_exactly(&mut &client, DOWN, 100);
    send(&mut &client, UP, 0, 50).expect("answering");
    assert_eq!(receive_from(&mut &client, DOWN, 100, 200).bytes, 100);
    drop(client);
    upstream.result().must_be_whole(0);
    proxy.settle();
}

#[test]
fn single_bytes_arrive_one_by_one_and_in_order() {
    const BYTES: u64 = 20_000;
    let upstream = Upstream::echo("127.0.0.1");
    let (proxy, front) = proxy_for(&upstream);
    let mut client = offloaded_client(&proxy, front);
    let mut sending = client.try_clone().expect("a second handle");
    let sender = std::thread::spawn(move || {
        for offset in 0..BYTES {
            let mut byte = [0u8];
            fill(UP, offset, &mut byte);
            sending.write_all(&byte).expect("sending a byte");
        }
        sending.shutdown(Shutdown::Write).expect("ending");
    });
    receive(&mut client, UP).must_be_whole(BYTES);
    sender.join().expect("the sender");
    let status = proxy.settle();
    // Where they come faster than the kernel takes them one by one, some are gathered and copied.
    assert_eq!(
        status.carried(),
        Bytes {
            to_upstream: BYTES,
            to_downstream: BYTES
        }
    );
    assert!(status.sockmap().to_upstream > 0, "{:#}", status.json());
    assert!(status.relay().sum() == 0 || status.number("/gathers") > 0);
}

#[test]
fn questions_and_answers_alternate_without_delay() {
    let upstream = Upstream::echo("127.0.0.1");
    let (proxy, front) = proxy_for(&upstream);
    let mut client = offloaded_client(&proxy, front);
    let start = std::time::Instant::now();
    ping(&mut client, UP, 2000).expect("2000 rounds");
    // A delayed acknowledgement or Nagle's algorithm would cost 40 ms a round, 80 s in all.
    assert!(
        start.elapsed() < Duration::from_secs(40),
        "2000 rounds took {:?}",
        start.elapsed()
    );
    assert_eq!(proxy.status().relay(), Bytes::default());
}

#[test]
fn two_hundred_mebibytes_each_way_arrive_byte_for_byte() {
    const EACH: u64 = 200 * MIB;
    let upstream = answering("127.0.0.1", EACH);
    let (proxy, front) = proxy_for(&upstream);
    let client = offloaded_client(&proxy, front);
    exchange(client, UP, EACH, DOWN).must_be_whole(EACH);
    upstream.result().must_be_whole(EACH);
    let status = proxy.settle();
    assert_eq!(
        status.carried(),
        Bytes {
            to_upstream: EACH,
            to_downstream: EACH
        }
    );
    // The direction that ends last is copied from the first pause after the other's end on, and how far it has come by
    // then nobody knows.
    assert!(status.sockmap().sum() > EACH, "by copying: {:?}", status.relay());
}

#[test]
fn bytes_sent_twice_in_an_overlapping_segment_are_delivered_once() {
    let text = |proxied: bool| {
        let upstream = Upstream::serve("127.0.0.1", |mut stream| {
            let mut text = String::new();
            stream.read_to_string(&mut text).expect("reading to the end");
            text
        });
        let (proxy, front) = proxy_for(&upstream);
        let client = if proxied {
            offloaded_client(&proxy, front)
        } else {
            connect(upstream.address)
        };
        (&client)
            .write_all(b"0123456789")
            .expect("sending the first segment");
        pause(200);
        // Four old bytes and four new ones in one segment.
        let client = rewind(client, 4);
        (&client)
            .write_all(b"6789ABCD")
            .expect("sending the overlapping segment");
        pause(200);
        (&client).write_all(b"EFGH").expect("sending a later segment");
        client.shutdown(Shutdown::Write).expect("ending");
        upstream.result()
    };
    assert_eq!(text(false), "0123456789ABCDEFGH", "without a proxy");
    assert_eq!(text(true), "0123456789ABCDEFGH", "through the proxy");
}

#[test]
fn a_unix_socket_upstream_is_served_by_copying() {
    let scratch = crate::harness::Scratch::new();
    let path = scratch.file("upstream.sock");
    let results = upstream::unix(&path, |mut stream| {
        let question = receive(&mut stream, UP);
        send(&mut stream, DOWN, 0, 100_000).expect("answering");
        question
    });
    let mut plan = Plan::new();
    let front = plan.server(format!("unix:{}", path.display()).as_str());
    let proxy = plan.start();
    exchange(connect(front), UP, 50_000, DOWN).must_be_whole(100_000);
    results
        .recv_timeout(crate::harness::PATIENCE)
        .expect("a result")
        .must_be_whole(50_000);
    let status = proxy.settle();
    assert_eq!(
        status.relay(),
        Bytes {
            to_upstream: 50_000,
            to_downstream: 100_000
        }
    );
    assert_eq!(status.sockmap(), Bytes::default());
}

#[test]
fn the_operator_decides_per_server_whether_the_kernel_forwards() {
    let upstream = answering("127.0.0.1", 30_000);
    let mut plan = Plan::new();
    let kernel = plan.server(&upstream);
    let copy = plan.server_with("127.0.0.1", &upstream, "ebpf_enable = false");
    let proxy = plan.start();
    let client = offloaded_client(&proxy, kernel);
    exchange(client, UP, 20_000, DOWN).must_be_whole(30_000);
    upstream.result().must_be_whole(20_000);
    proxy.settle();
    exchange(connect(copy), UP, 7000, DOWN).must_be_whole(30_000);
    upstream.result().must_be_whole(7000);
    let status = proxy.settle();
    assert_eq!(
        status.sockmap(),
        Bytes {
            to_upstream: 20_000,
            to_downstream: 30_000
        }
    );
    assert_eq!(
        status.relay(),
        Bytes {
            to_upstream: 7000,
            to_downstream: 30_000
        }
    );
    assert_eq!(status.fallbacks(), 0, "a choice is not a fallback");
}

#[test]
fn the_stream_defaults_decide_where_the_server_is_silent() {
    let upstream = answering("127.0.0.1", 30_000);
    let mut plan = Plan::new().stream("ebpf_enable = false");
    let copy = plan.server(&upstream);
    let kernel = plan.server_with("127.0.0.1", &upstream, "ebpf_enable = true");
    let proxy = plan.start();
    exchange(connect(copy), UP, 7000, DOWN).must_be_whole(30_000);
    upstream.result().must_be_whole(7000);
    let status = proxy.settle();
    assert_eq!(
        status.relay(),
        Bytes {
            to_upstream: 7000,
            to_downstream: 30_000
        }
    );
    exchange(offloaded_client(&proxy, kernel), UP, 9000, DOWN).must_be_whole(30_000);
    upstream.result().must_be_whole(9000);
    assert_eq!(
        proxy.settle().sockmap(),
        Bytes {
            to_upstream: 9000,
            to_downstream: 30_000
        }
    );
}

#[test]
fn a_stream_in_full_flow_both_ways_at_the_takeover_keeps_its_bytes() {
    let length = Arc::new(AtomicU64::new(0));
    let answering = Arc::clone(&length);
    let upstream = Upstream::serve("127.0.0.1", move |stream| {
        exchange(stream, DOWN, answering.load(Ordering::SeqCst), UP)
    });
    let (proxy, front) = proxy_for(&upstream);
    let mut sum = 0;
    for round in 0..40 {
        let bytes = 500_000 + round * 40_009;
        length.store(bytes, Ordering::SeqCst);
        exchange(connect(front), UP, bytes, DOWN).must_be_whole(bytes);
        upstream.result().must_be_whole(bytes);
        sum += bytes;
        let carried = proxy.settle().carried();
        assert_eq!(
            carried,
            Bytes {
                to_upstream: sum,
                to_downstream: sum
            },
            "in round {round}"
        );
    }
}

#[test]
fn urgent_data_arrives_where_it_was_sent_however_it_is_carried() {
    for (lines, in_kernel) in [
        ("", [true, true]),
        ("ebpf_enable = false", [false, false]),
        ("ebpf_offload_after = \"1m\"", [false, false]),
        ("proxy_upload_rate = \"1m\"", [false, true]),
        ("proxy_download_rate = \"1m\"", [true, false]),
    ] {
        let mut plan = Plan::new();
        let front = Front::new(&mut plan, "127.0.0.1", lines);
        let proxy = plan.start();
        let (mut client, mut upstream) = front.open();
        ping_through(&mut client, &mut upstream);
        // All of it is there when the worker looks next, if it does: a read of TCP ends where urgent data stands.
        let worker = Pid::from_raw(proxy.worker());
        kill(worker, Signal::SIGSTOP).expect("stopping the worker");
        pause(50);
        for end in [&mut client, &mut upstream] {
            end.write_all(b"before").expect("sending");
            nix::sys::socket::send(end.as_raw_fd(), b"!", MsgFlags::MSG_OOB).expect("sending urgent data");
            end.write_all(b"behind").expect("sending");
            end.shutdown(Shutdown::Write).expect("ending a direction");
        }
        pause(50);
        kill(worker, Signal::SIGCONT).expect("letting the worker go on");
        for end in [&mut upstream, &mut client] {
            let mut text = Vec::new();
            end.read_to_end(&mut text).expect("a stream that ends in order");
            assert_eq!(text.escape_ascii().to_string(), "before!behind", "{lines}");
        }
        let status = proxy.settle();
        let each_way = Bytes {
            to_upstream: 14,
            to_downstream: 14,
        };
        assert_eq!(
            (status.carried(), status.number("/closes/finished")),
            (each_way, 1)
        );
        let sockmap = status.sockmap();
        assert_eq!(
            [sockmap.to_upstream > 0, sockmap.to_downstream > 0],
            in_kernel,
            "{lines}"
        );
    }
}

fn ping_through(client: &mut TcpStream, upstream: &mut TcpStream) {
    client.write_all(b"?").expect("asking");
    upstream.read_exact(&mut [0]).expect("the question");
    upstream.write_all(b"!").expect("answering");
    client.read_exact(&mut [0]).expect("the answer");
}
