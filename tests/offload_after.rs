//! Sessions that are copied until they have moved `ebpf_offload_after` bytes, and go on in the kernel then: which carries
//! what, and that no byte is lost, doubled or moved where the one takes over from the other.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use crate::harness::pattern::{exchange_and_end, fill, pause, ping, receive_from, wait_for_a_byte};
use crate::harness::sockets::{reset, send_and_hold};
use crate::harness::{
    Bytes, Flag, Front, Plan, Proxy, Towards, Upstream, connect, exchange, receive, receive_exactly, send,
    within,
};

const UP: u64 = 51;
const DOWN: u64 = 52;
const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;
/// What user space may have copied beyond the limit: a buffer each way.
const SLACK: u64 = 2 * 16 * KIB;

/// A proxy whose only listener has this limit; both ends are the test's.
fn front_after(bytes: u64) -> (Proxy, Front) {
    let mut plan = Plan::new();
    let front = Front::new(&mut plan, "127.0.0.1", &format!("ebpf_offload_after = {bytes}"));
    (plan.start(), front)
}

/// Sends `from..to` one way, and waits until it has come through.
fn pass(from_end: &mut TcpStream, to_end: &mut TcpStream, seed: u64, from: u64, to: u64) {
    send(from_end, seed, from, to).expect("sending");
    assert_eq!(receive_from(to_end, seed, from, to).bytes, to - from);
}

#[test]
fn a_short_session_never_touches_the_sockmap() {
    let (proxy, front) = front_after(64 * KIB);
    for _ in 0..20 {
        let (mut client, mut upstream) = front.open();
        pass(&mut client, &mut upstream, UP, 0, 40 * KIB);
        pass(&mut upstream, &mut client, DOWN, 0, 20 * KIB);
        drop(client);
        receive_from(&mut upstream, UP, 40 * KIB, u64::MAX).must_be_whole(0);
    }
    let status = proxy.settle();
    assert_eq!(status.number("/sessions/total_offloaded"), 0);
    assert_eq!(status.sockmap(), Bytes::default());
    assert_eq!(
        status.relay(),
        Bytes {
            to_upstream: 20 * 40 * KIB,
            to_downstream: 20 * 20 * KIB
        }
    );
    assert_eq!(
        status.fallbacks(),
        0,
        "it is as it should be: {:#}",
        status.json()
    );
}

#[test]
fn a_session_is_taken_over_with_the_byte_that_makes_it_long() {
    let (proxy, front) = front_after(64 * KIB);
    let (mut client, mut upstream) = front.open();
    pass(&mut client, &mut upstream, UP, 0, 32 * KIB);
    pass(&mut upstream, &mut client, DOWN, 0, 32 * KIB - 1);
    let before = proxy.status();
    pass(&mut client, &mut upstream, UP, 32 * KIB, 32 * KIB + 1);
    // Less than a second has passed if this says what it should.
    assert_eq!(before.offloaded(), 0);
    proxy.wait("the session is offloaded", |s| s.offloaded() == 1);
    pass(&mut client, &mut upstream, UP, 32 * KIB + 1, MIB);
    pass(&mut upstream, &mut client, DOWN, 32 * KIB - 1, 2 * MIB);
    drop(client);
    receive_from(&mut upstream, UP, MIB, u64::MAX).must_be_whole(0);
    drop(upstream);
    let status = proxy.settle();
    let copied = Bytes {
        to_upstream: 32 * KIB + 1,
        to_downstream: 32 * KIB - 1,
    };
    assert_eq!(status.relay(), copied);
    assert_eq!(
        status.sockmap(),
        Bytes {
            to_upstream: MIB - copied.to_upstream,
            to_downstream: 2 * MIB - copied.to_downstream
        }
    );
    assert_eq!(status.fallbacks(), 0);
}

#[test]
fn a_session_that_rests_is_taken_over_after_a_second() {
    let (proxy, front) = front_after(1 << 30);
    let (mut client, mut upstream) = front.open();
    pass(&mut client, &mut upstream, UP, 0, 10);
    assert_eq!(proxy.status().offloaded(), 0);
    proxy.wait("the session is offloaded, and kept", |s| {
        s.offloaded() == 1 && s.number("/sessions/kept") == 1
    });
    pass(&mut client, &mut upstream, UP, 10, 1000);
    pass(&mut upstream, &mut client, DOWN, 0, 2000);
    drop((client, upstream));
    let status = proxy.settle();
    assert_eq!(
        status.sockmap(),
        Bytes {
            to_upstream: 990,
            to_downstream: 2000
        }
    );
}

#[test]
fn a_session_under_full_load_both_ways_loses_nothing_where_the_kernel_takes_over() {
    const BYTES: u64 = 48 * MIB;
    for limit in [1, 100_000, 3 * MIB] {
        let upstream = Upstream::serve("127.0.0.1", |stream| exchange(stream, DOWN, BYTES, UP));
        let mut plan = Plan::new();
        let front = plan.server_with("127.0.0.1", &upstream, &format!("ebpf_offload_after = {limit}"));
        let proxy = plan.start();
        for _ in 0..4 {
            exchange(connect(front), UP, BYTES, DOWN).must_be_whole(BYTES);
            upstream.result().must_be_whole(BYTES);
        }
        let status = proxy.settle();
        let each_way = Bytes {
            to_upstream: 4 * BYTES,
            to_downstream: 4 * BYTES,
        };
        assert_eq!(status.carried(), each_way);
        assert_eq!(status.number("/sessions/total_offloaded"), 4, "after {limit}");
        assert!(status.sockmap().sum() > 4 * BYTES, "{:#}", status.json());
        assert_eq!(status.fallbacks(), 0);
    }
}

#[test]
fn a_request_that_ends_its_stream_about_where_the_kernel_takes_over_is_answered_whole() {
    const LIMIT: u64 = 64 * KIB;
    const ANSWER: u64 = 300_000;
    let upstream = Upstream::serve("127.0.0.1", |mut stream| {
        wait_for_a_byte(&stream);
        let question = receive(&mut stream, UP);
        send(&mut stream, DOWN, 0, ANSWER).expect("answering");
        question
    });
    let mut plan = Plan::new();
    let front = plan.server_with("127.0.0.1", &upstream, &format!("ebpf_offload_after = {LIMIT}"));
    let proxy = plan.start();
    let mut sent = 0;
    for question in [1, LIMIT - 1, LIMIT, LIMIT + 1, LIMIT + SLACK, 4 * LIMIT] {
        for glued in [false, true] {
            let mut client = connect(front);
            match glued {
                true => {
                    let mut bytes = vec![0; question as usize];
                    fill(UP, 0, &mut bytes);
                    send_and_hold(&client, &bytes);
                }
                false => send(&mut client, UP, 0, question).expect("asking"),
            }
            client.shutdown(Shutdown::Write).expect("ending the question");
            receive(&mut client, DOWN).must_be_whole(ANSWER);
            upstream.result().must_be_whole(question);
            sent += question;
        }
    }
    let status = proxy.settle();
    let carried = Bytes {
        to_upstream: sent,
        to_downstream: 12 * ANSWER,
    };
    assert_eq!(status.carried(), carried);
    assert_eq!(status.fallbacks(), 0, "nothing failed: {:#}", status.json());
    assert_eq!(status.number("/closes/finished"), 12);
}

#[test]
fn a_reset_about_where_the_kernel_takes_over_is_a_prefix_and_a_reset() {
    const LIMIT: u64 = 64 * KIB;
    let (proxy, front) = front_after(LIMIT);
    for towards in Towards::BOTH {
        for bytes in [LIMIT - 1, LIMIT, LIMIT + 1, LIMIT + SLACK, 4 * LIMIT] {
            let (client, upstream) = front.open();
            let (mut writer, mut reader) = match towards {
                Towards::Upstream => (client, upstream),
                Towards::Downstream => (upstream, client),
            };
            send(&mut writer, UP, 0, bytes).expect("sending");
            reset(writer);
            receive(&mut reader, UP).must_be_a_prefix_and_a_reset(bytes);
        }
    }
    let status = proxy.settle();
    assert_eq!(status.number("/closes/integrity"), 0);
    assert_eq!(status.number("/closes/finished"), 0);
}

#[test]
fn reloads_lose_nothing_of_sessions_that_are_still_copied() {
    let upstream = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new();
    let front = plan.server_with("127.0.0.1", &upstream, "ebpf_offload_after = \"1m\"");
    let proxy = plan.start();
    for round in 0..3u64 {
        let mut resting: Vec<TcpStream> = (0..10).map(|_| connect(front)).collect();
        let mut busy = connect(front);
        let mut sending = busy.try_clone().expect("a second handle");
        let sender = std::thread::spawn(move || {
            for part in 0..40 {
                send(&mut sending, round, part * 64 * KIB, (part + 1) * 64 * KIB)?;
                pause(5);
            }
            sending.shutdown(Shutdown::Write)
        });
        for client in &mut resting {
            ping(client, UP, 3).expect("before the reload");
        }
        proxy.reload();
        for client in &mut resting {
            ping(client, DOWN, 3).expect("after the reload");
            client.shutdown(Shutdown::Write).expect("ending");
            receive(client, 0).must_be_whole(0);
        }
        receive(&mut busy, round).must_be_whole(40 * 64 * KIB);
        sender.join().expect("the sender").expect("sending");
    }
    let status = proxy.settle();
    assert_eq!(status.number("/closes/worker_died"), 0);
    assert_eq!(status.number("/closes/integrity"), 0);
    let each_way = 3 * (10 * 6 * 24 + 40 * 64 * KIB);
    assert_eq!(
        status.carried(),
        Bytes {
            to_upstream: each_way,
            to_downstream: each_way
        }
    );
}

#[test]
fn what_user_space_has_sent_counts_for_the_back_pressure_of_the_kernel() {
    // The kernel takes over when a reader that has stopped has 4 MiB of send buffer behind it at most, less than one
    // more ebpf_backlog_size.
    let mut plan = Plan::new();
    let lines = "ebpf_offload_after = \"1m\"\nebpf_backlog_size = \"64k\"";
    let front = Front::new(&mut plan, "127.0.0.1", lines);
    let proxy = plan.start();
    let (client, mut upstream) = front.open();
    let writing = crate::harness::Writer::start_to_end(&client, UP, 64 * MIB, 64 * 1024);
    writing.wait_for_stall();
    let held = proxy.wait("the source is held back, or never was let in", |s| {
        s.number("/pauses") > 0 || s.relay().to_upstream < MIB
    });
    assert!(
        held.sockmap().to_upstream < 2 * MIB,
        "it was taken over with what its reader could not take: {:#}",
        held.json()
    );
    receive(&mut upstream, UP).must_be_whole(64 * MIB);
    writing.join().expect("writing");
    drop((client, upstream));
    let status = proxy.settle();
    assert_eq!(status.carried().to_upstream, 64 * MIB);
}

#[test]
fn a_greeting_is_not_late() {
    let (_proxy, front) = front_after(16 * KIB);
    let (mut client, mut upstream) = front.open();
    upstream.write_all(b"hello").expect("greeting");
    let mut greeting = [0; 5];
    client.read_exact(&mut greeting).expect("the greeting");
    send(&mut client, UP, 0, 50_000).expect("asking");
    receive_exactly(&mut upstream, UP, 50_000);
    drop(client);
    receive_from(&mut upstream, UP, 50_000, u64::MAX).must_be_whole(0);
}

#[test]
fn where_sessions_are_many_and_short_the_next_ones_are_copied_first_until_there_are_fewer() {
    const BYTES: u64 = 4 * MIB;
    let upstream = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new();
    let front = plan.server_with("127.0.0.1", &upstream, "");
    let proxy = plan.start();
    let copied_first = || proxy.status().number("/sessions/total_copied_first");
    let short = || ping(&mut connect(front), UP, 1).expect("a short session");
    (0..100).for_each(|_| short());
    assert_eq!(copied_first(), 0, "these were few");
    let stop = Flag::default();
    let began = std::thread::scope(|scope| {
        let _stop = stop.raise_at_the_end();
        for _ in 0..4 {
            scope.spawn(|| {
                while !stop.is_up() {
                    short();
                }
            });
        }
        let began = within(Duration::from_secs(30), || copied_first() > 200);
        // A long one among them.
        let before = proxy.status().sockmap().to_upstream;
        exchange_and_end(connect(front), DOWN, BYTES, DOWN, BYTES);
        stop.raise();
        let carried = proxy.settle().sockmap().to_upstream - before;
        assert!(carried > BYTES - MIB, "{carried} bytes of {BYTES} in the kernel");
        began
    });
    assert!(began, "{:#}", proxy.status().json());
    std::thread::sleep(Duration::from_secs(2));
    let before = proxy.status();
    short();
    let after = proxy.settle();
    assert_eq!(copied_first(), before.number("/sessions/total_copied_first"));
    assert_eq!(after.relay(), before.relay(), "{:#}", after.json());
    assert_eq!(after.fallbacks(), 0, "{:#}", after.json());
}
