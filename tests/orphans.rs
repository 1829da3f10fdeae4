//! The master dies: its workers take nothing new, finish what they carry, and go; a new master starts at once.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::harness::pattern::{pause, ping};
use crate::harness::{Ending, Plan, Proxy, Upstream, connect, exchange, process, receive, within};
use nix::sys::signal::Signal;

const SOON: Duration = Duration::from_secs(10);

fn is_refused(front: SocketAddr) -> bool {
    match TcpStream::connect_timeout(&front, Duration::from_secs(1)) {
        Ok(_) => false,
        Err(e) => e.kind() == ErrorKind::ConnectionRefused,
    }
}

/// Kills the master; returns the workers that it leaves behind.
#[track_caller]
fn kill_master(proxy: &mut Proxy) -> Vec<i32> {
    let workers: Vec<i32> = proxy.status().workers().iter().map(|w| w.pid).collect();
    proxy.signal(Signal::SIGKILL);
    let exit = proxy.wait_for_exit(SOON).expect("the master is killed");
    assert_eq!(exit.code(), None, "{exit}");
    workers
}

fn all_gone(workers: &[i32], limit: Duration) -> bool {
    within(limit, || !workers.iter().any(|&pid| process::is_alive(pid)))
}

#[test]
fn orphaned_workers_finish_their_sessions_and_go_and_a_new_master_serves_at_once() {
    const STREAM: u64 = 64 << 20;
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new().workers(2);
    let front = plan.server(&echo);
    let mut proxy = plan.start();
    let mut old: Vec<_> = (0..10).map(|_| connect(front)).collect();
    for client in &mut old {
        ping(client, 1, 3).expect("a session before");
    }
    let streaming = old.pop().expect("a session");
    pause(2200);
    for client in &mut old {
        ping(client, 2, 1).expect("a session that is kept");
    }
    let mut streaming = streaming;
    ping(&mut streaming, 2, 1).expect("a session that is kept");

    let orphans = kill_master(&mut proxy);
    let stream = std::thread::spawn(move || exchange(streaming, 9, STREAM, 9));
    let start = Instant::now();
    proxy.start_again();
    assert!(
        start.elapsed() < SOON,
        "a new master took {:?} to serve",
        start.elapsed()
    );
    for seed in 0..50 {
        ping(&mut connect(front), seed, 2).expect("a session of the new master");
    }
    stream.join().expect("the stream").must_be_whole(STREAM);
    for client in &mut old {
        ping(client, 3, 20).expect("a session of the dead master");
    }
    // Ten sessions stood; those that are left keep their workers.
    assert!(
        orphans.iter().any(|&pid| process::is_alive(pid)),
        "the orphans have left their sessions"
    );
    drop(old);
    assert!(
        all_gone(&orphans, SOON),
        "orphans without a session stay: {orphans:?}"
    );
    ping(&mut connect(front), 4, 2).expect("a session when the orphans have gone");
    proxy.settle();
}

#[test]
fn orphaned_workers_take_nothing_new() {
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new().workers(2);
    let front = plan.server(&echo);
    let mut proxy = plan.start();
    let mut client = connect(front);
    ping(&mut client, 1, 3).expect("a session before");
    let orphans = kill_master(&mut proxy);
    assert!(
        within(SOON, || is_refused(front)),
        "new connections are still accepted"
    );
    ping(&mut client, 2, 50).expect("the session goes on");
    drop(client);
    assert!(
        all_gone(&orphans, SOON),
        "orphans without a session stay: {orphans:?}"
    );
}

#[test]
fn orphaned_workers_stay_no_longer_than_worker_shutdown_timeout() {
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new().workers(2).global("worker_shutdown_timeout = \"4s\"");
    let front = plan.server(&echo);
    let mut proxy = plan.start();
    let mut clients: Vec<_> = (0..6).map(|_| connect(front)).collect();
    for client in &mut clients {
        ping(client, 1, 3).expect("a session before");
    }
    pause(2200);
    let orphans = kill_master(&mut proxy);
    pause(1500);
    for client in &mut clients {
        ping(client, 2, 3).expect("a session of an orphan");
    }
    assert!(
        all_gone(&orphans, SOON),
        "orphans stay longer than worker_shutdown_timeout: {orphans:?}"
    );
    for client in &mut clients {
        assert_eq!(
            receive(client, 9).ending,
            Ending::Reset,
            "a cut session ends in a reset"
        );
    }
}
