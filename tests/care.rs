//! Workers die where no slot's worker can go on with their sessions: there is always another who does.

use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::harness::pattern::ping;
use crate::harness::{PATIENCE, Plan, Proxy, Upstream, connect, exchange, patient, process, receive, within};
use crate::reload::{HALVES, half_a_reload};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const STREAM: u64 = 1 << 20;
/// Within that a session that was left is gone on with: before the master looks for workers that hang.
const SOON: Duration = Duration::from_secs(4);

fn tell(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).expect("signalling a worker");
}

/// Kills a worker, and waits until another one has been started for its sessions; says which.
fn kill_the_last(proxy: &Proxy, worker: i32) -> i32 {
    let before = process::children(proxy.pid());
    tell(worker, Signal::SIGKILL);
    let mut new = Vec::new();
    let replaced = || {
        new = process::children(proxy.pid());
        new.retain(|pid| !before.contains(pid));
        !new.is_empty()
    };
    assert!(within(PATIENCE, replaced), "nobody came: {}", proxy.log());
    new[0]
}

/// Each still ends as it should, which nobody but a worker sees to.
fn end_well(clients: Vec<TcpStream>) {
    for client in clients {
        exchange(client, 5, STREAM, 5).must_be_whole(STREAM);
    }
}

#[test]
fn sessions_of_a_refused_generation_outlive_their_worker() {
    let echo = Upstream::echo("127.0.0.1");
    for _ in 0..HALVES {
        // A store of its own: nobody else has it, and the worker goes on alone.
        let mut plan = Plan::new().workers(2).global("worker_connections = 1024");
        let front = plan.server(&echo);
        let proxy = plan.start();
        proxy.edit("worker_connections = 1024", "worker_connections = 999");
        let Some((old, last)) = half_a_reload(&proxy) else {
            continue;
        };
        let first = process::children(proxy.pid());
        let first = first.into_iter().find(|pid| !old.contains(pid) && *pid != last);
        let first = first.expect("the worker that is ready");
        // So many at once that each slot has some, on whatever CPU they come.
        let mut clients: Vec<_> = (0..48).map(|_| connect(front)).collect();
        let taken = || process::connections(first).len() >= 2;
        assert!(within(PATIENCE, taken), "it takes nobody: {}", proxy.log());
        tell(last, Signal::SIGKILL);
        let refused = || proxy.log().contains("reload refused");
        assert!(within(PATIENCE, refused), "{}", proxy.log());
        old.iter().for_each(|&pid| tell(pid, Signal::SIGCONT));
        for client in &mut clients {
            ping(client, 1, 2).expect("a session of either generation");
        }
        proxy.wait("all are kept", |s| s.number("/sessions/kept") == 48);
        let second = kill_the_last(&proxy, first);
        for client in &mut clients {
            ping(client, 2, 2).expect("a session after its worker's death");
        }
        let adopted = || proxy.log().contains(&format!("{second}: adopted "));
        assert!(within(PATIENCE, adopted), "{}", proxy.log());
        let third = kill_the_last(&proxy, second);
        proxy.reload();
        let gone = || !process::is_alive(third);
        assert!(within(PATIENCE, gone), "it does not hand over: {}", proxy.log());
        end_well(clients);
        assert_eq!(proxy.settle().number("/closes/worker_died"), 0);
        return;
    }
    panic!("no worker was ready before another");
}

/// Eight sessions that the master keeps.
fn eight(proxy: &Proxy, front: SocketAddr) -> Vec<TcpStream> {
    let mut clients: Vec<_> = (0..8).map(|_| connect(front)).collect();
    for client in &mut clients {
        ping(client, 1, 2).expect("a session");
    }
    proxy.wait("all are kept", |s| s.number("/sessions/kept") == 8);
    clients
}

#[test]
fn sessions_of_a_paused_program_outlive_their_worker() {
    let echo = Upstream::echo("127.0.0.1");
    // Their listener is not gone, though nobody takes connections from it.
    let mut plan = Plan::new().stream("on_reload = \"close\"");
    let front = plan.server(&echo);
    let proxy = plan.start();
    let clients = eight(&proxy, front);
    let worker = proxy.worker();
    proxy.signal(Signal::SIGWINCH);
    let paused = || proxy.log().contains("SIGWINCH: workers drain");
    assert!(within(PATIENCE, paused), "{}", proxy.log());
    let second = kill_the_last(&proxy, worker);
    end_well(clients);
    let gone = || !process::is_alive(second);
    assert!(within(PATIENCE, gone), "it stays for nothing: {}", proxy.log());
    proxy.signal(Signal::SIGHUP);
    assert_eq!(proxy.settle().number("/closes/worker_died"), 0);
}

#[test]
fn sessions_of_a_worker_that_dies_while_it_leaves_go_to_the_one_that_serves_at_once() {
    let echo = Upstream::echo("127.0.0.1");
    // Copied: without a worker no byte of them moves.
    let mut plan = Plan::new().stream("ebpf_enable = false");
    let front = plan.server(&echo);
    let proxy = plan.start();
    let mut clients = eight(&proxy, front);
    let worker = proxy.worker();
    tell(worker, Signal::SIGSTOP);
    proxy.signal(Signal::SIGHUP);
    let serves = || proxy.log().contains("generation 2 serves");
    assert!(within(PATIENCE, serves), "{}", proxy.log());
    tell(worker, Signal::SIGKILL);
    // Nobody else speaks to the master meanwhile.
    for client in &mut clients {
        client.set_read_timeout(Some(patient(SOON))).expect("a timeout");
        ping(client, 2, 2).expect("a session after its worker's death");
    }
    end_well(clients);
    assert_eq!(proxy.settle().number("/closes/worker_died"), 0);
}

#[track_caller]
fn quit(proxy: &Proxy) {
    proxy.signal(Signal::SIGQUIT);
    let quits = || proxy.log().contains("SIGQUIT: finishing");
    assert!(within(PATIENCE, quits), "{}", proxy.log());
}

#[test]
fn sessions_that_are_being_handed_over_when_the_program_is_told_to_quit_are_finished() {
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new();
    let front = plan.server(&echo);
    let mut proxy = plan.start();
    let clients = eight(&proxy, front);
    let old = proxy.worker();
    tell(old, Signal::SIGSTOP);
    proxy.signal(Signal::SIGHUP);
    let switched = || proxy.log().contains("generation 2 serves");
    assert!(within(PATIENCE, switched), "{}", proxy.log());
    quit(&proxy);
    tell(old, Signal::SIGCONT);
    assert!(within(PATIENCE, || !process::is_alive(old)), "{}", proxy.log());
    end_well(clients);
    let exit = proxy.wait_for_exit(patient(SOON)).expect("an end");
    assert!(exit.success(), "{exit}");
}

#[test]
fn sessions_of_a_program_that_quits_outlive_their_worker_and_are_given_no_more_time_for_that() {
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new().global("worker_shutdown_timeout = \"5s\"");
    let front = plan.server(&echo);
    let mut proxy = plan.start();
    let mut clients = eight(&proxy, front);
    let worker = proxy.worker();
    let begun = Instant::now();
    quit(&proxy);
    std::thread::sleep(Duration::from_millis(2500));
    let second = kill_the_last(&proxy, worker);
    let mut idle = clients.split_off(4);
    end_well(clients);
    assert!(process::is_alive(second));
    let exit = proxy.wait_for_exit(patient(PATIENCE)).expect("an end");
    assert!(exit.success(), "{exit}");
    let took = begun.elapsed();
    // Time that began anew would be over after seven and a half.
    assert!(took < patient(Duration::from_secs(7)), "{took:?}");
    for client in &mut idle {
        receive(client, 9).must_be_a_prefix_and_a_reset(0);
    }
}
