//! Many sessions, at once and one after another: no wrong byte, and nothing left behind.

use std::net::{Shutdown, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::harness::pattern::ping;
use crate::harness::{
    Flag, PATIENCE, Plan, Proxy, Received, Upstream, connect, exchange, process, receive, send, within,
};

/// How many descriptors each worker holds while no session is open. Asking for the status opens one for
/// a moment, so that the least of several looks counts.
fn descriptors(workers: &[i32]) -> Vec<usize> {
    let look = |pid: &i32| process::descriptors(*pid).len();
    let mut least: Vec<usize> = workers.iter().map(look).collect();
    for _ in 0..15 {
        std::thread::sleep(Duration::from_millis(20));
        least
            .iter_mut()
            .zip(workers)
            .for_each(|(least, pid)| *least = (*least).min(look(pid)));
    }
    least
}

fn pids(proxy: &Proxy) -> Vec<i32> {
    proxy.status().workers().iter().map(|w| w.pid).collect()
}

/// One session through each worker at least, so that what is opened once is open.
fn warm_up(front: SocketAddr) {
    for seed in 0..16 {
        ping(&mut connect(front), seed, 1).expect("a session to warm up");
    }
}

#[track_caller]
fn assert_nothing_is_left(proxy: &Proxy, workers: &[i32], before: &[usize]) {
    let status = proxy.settle();
    for worker in status.workers() {
        assert_eq!((worker.sessions, worker.slots_used), (0, 0), "{worker:?}");
    }
    assert_eq!(pids(proxy), workers, "no worker was replaced");
    if !within(PATIENCE, || descriptors(workers) == before) {
        let now: Vec<_> = workers.iter().map(|&pid| process::descriptors(pid)).collect();
        panic!("the workers had {before:?} descriptors before; now they have {now:#?}");
    }
}

#[test]
fn five_hundred_sessions_at_once_get_their_own_bytes() {
    const SESSIONS: u64 = 500;
    const EACH: u64 = 100_000;
    const CONNECTIONS: u64 = 600;
    let upstream = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new()
        .workers(2)
        .global(&format!("worker_connections = {CONNECTIONS}"));
    let front = plan.server(&upstream);
    let proxy = plan.start();
    warm_up(front);
    proxy.settle();
    let workers = pids(&proxy);
    let before = descriptors(&workers);
    let bytes_before = proxy.status().carried();

    let ready = AtomicU64::new(0);
    let go = Flag::default();
    std::thread::scope(|scope| {
        let at_the_end = go.raise_at_the_end();
        for seed in 0..SESSIONS {
            let (ready, go) = (&ready, &go);
            let session = move || {
                let mut client = connect(front);
                ping(&mut client, seed, 1).expect("a first echo");
                ready.fetch_add(1, Ordering::SeqCst);
                assert!(
                    within(PATIENCE * 3, || go.is_up()),
                    "the other sessions do not come"
                );
                exchange(client, seed, EACH, seed).must_be_whole(EACH);
            };
            std::thread::Builder::new()
                .stack_size(256 * 1024)
                .spawn_scoped(scope, session)
                .expect("a thread");
        }
        assert!(
            within(PATIENCE * 2, || ready.load(Ordering::SeqCst) == SESSIONS),
            "{ready:?} sessions stand"
        );
        let status = proxy.wait("all sessions are offloaded", |s| s.offloaded() == SESSIONS);
        assert_eq!(status.active(), SESSIONS);
        // A session takes two places of its worker's sockmap, one for each socket.
        for worker in status.workers() {
            let places = (worker.slots_used, worker.slots_total);
            assert_eq!(places, (2 * worker.sessions, 2 * CONNECTIONS), "{worker:?}");
        }
        drop(at_the_end);
    });

    let carried = proxy.settle().carried();
    assert_eq!(
        carried.to_upstream - bytes_before.to_upstream,
        SESSIONS * (EACH + 24)
    );
    assert_eq!(
        carried.to_downstream - bytes_before.to_downstream,
        SESSIONS * (EACH + 24)
    );
    assert_nothing_is_left(&proxy, &workers, &before);
}

#[test]
fn twenty_thousand_short_sessions_leave_nothing_behind() {
    const SESSIONS: u64 = 20_000;
    let question = |seed: u64| 1 + seed * 37 % 3000;
    let answer = |seed: u64| 1 + seed * 61 % 3000;
    // The question's length tells the upstream nothing; the answer's follows from its first bytes.
    let upstream = Upstream::serve("127.0.0.1", move |mut stream| {
        let mut seed = [0u8; 8];
        std::io::Read::read_exact(&mut stream, &mut seed).expect("the session's number");
        let seed = u64::from_le_bytes(seed);
        let got = receive(&mut stream, seed);
        send(&mut stream, seed + 1, 0, answer(seed)).expect("answering");
        (seed, got)
    });
    let warm = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new().workers(2);
    let front = plan.server(&upstream);
    let warm_front = plan.server(&warm);
    let proxy = plan.start();
    warm_up(warm_front);
    let at_rest = proxy.settle();
    let workers = pids(&proxy);
    let before = descriptors(&workers);

    let next = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= SESSIONS {
                        return;
                    }
                    let mut client = connect(front);
                    std::io::Write::write_all(&mut client, &seed.to_le_bytes()).expect("sending the number");
                    send(&mut client, seed, 0, question(seed)).expect("asking");
                    client.shutdown(Shutdown::Write).expect("ending the question");
                    receive(&mut client, seed + 1).must_be_whole(answer(seed));
                }
            });
        }
    });
    let mut seen = 0u64;
    for _ in 0..SESSIONS {
        let (seed, got): (u64, Received) = upstream.result();
        got.must_be_whole(question(seed));
        seen += seed;
    }
    assert_eq!(
        seen,
        SESSIONS * (SESSIONS - 1) / 2,
        "every session reached the upstream once"
    );
    let status = proxy.settle();
    assert_eq!(
        status.number("/sessions/total") - at_rest.number("/sessions/total"),
        SESSIONS
    );
    let sent: u64 = (0..SESSIONS).map(|seed| 8 + question(seed)).sum();
    assert_eq!(status.carried().to_upstream - at_rest.carried().to_upstream, sent);
    let answered: u64 = (0..SESSIONS).map(answer).sum();
    assert_eq!(
        status.carried().to_downstream - at_rest.carried().to_downstream,
        answered
    );
    assert_nothing_is_left(&proxy, &workers, &before);
}

#[test]
fn sessions_beyond_worker_connections_do_not_disturb_those_within() {
    let upstream = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new().global("worker_connections = 8");
    let front = plan.server(&upstream);
    let proxy = plan.start();
    let mut within_limit: Vec<_> = (0..6).map(|_| connect(front)).collect();
    for (seed, client) in within_limit.iter_mut().enumerate() {
        ping(client, seed as u64, 2).expect("a session within the limit");
    }
    let beyond: Vec<_> = (0..20)
        .filter_map(|_| crate::harness::sockets::try_connect(front).ok())
        .collect();
    for (seed, client) in within_limit.iter_mut().enumerate() {
        ping(client, seed as u64, 50).expect("a session within the limit, while others knock");
    }
    drop(beyond);
    drop(within_limit);
    proxy.settle();
    // The room is free again.
    ping(&mut connect(front), 99, 2).expect("a session after the crowd has gone");
}
