//! Which worker gets a new connection, and that none is lost while workers come and go.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::harness::pattern::{pause, ping};
use crate::harness::sockets::{connect_from, connect_with_late_ack};
use crate::harness::status::Worker;
use crate::harness::{Flag, PATIENCE, Plan, Port, Proxy, Status, Upstream, connect, process, within};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Keeps this thread, and those that it starts, on one CPU: on loopback that is where its SYNs arrive.
fn stay_on(cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu).expect("a CPU number");
    sched_setaffinity(Pid::from_raw(0), &set).expect("pinning the client (this test needs the CPUs 0 and 1)");
}

fn by_slot(status: &Status) -> Vec<Worker> {
    let mut workers = status.workers();
    workers.sort_by_key(|worker| worker.slot);
    workers
}

fn must_choose_by_cpu(proxy: &Proxy) {
    let status = proxy.status();
    assert_eq!(
        status.json()["accept"],
        "cpu",
        "the accept program is not in use: {}",
        status.json()["accept_reason"]
    );
}

/// Waits until every worker takes connections: on a slow processor the last may be ready seconds after the first.
#[track_caller]
fn wait_for_all(proxy: &Proxy, front: SocketAddr) {
    let all = within(Duration::from_secs(10), || {
        // Of the slots on a CPU the one with fewer sessions is chosen: so each gets one of these.
        let mut held = Vec::new();
        for cpu in [0, 1, 0, 1] {
            stay_on(cpu);
            let mut client = connect(front);
            ping(&mut client, 1, 1).expect("a session");
            held.push(client);
        }
        proxy.status().workers().iter().all(|worker| worker.accepted > 0)
    });
    let workers = proxy.status().workers();
    for worker in workers.iter().filter(|_| !all) {
        let waits_in = std::fs::read_to_string(format!("/proc/{}/wchan", worker.pid)).unwrap_or_default();
        let state = process::field(worker.pid, "State");
        eprintln!("worker {}: {state}, waits in {waits_in}", worker.slot);
    }
    assert!(all, "a worker gets no connections: {workers:?}");
    proxy.settle();
}

#[test]
fn a_session_is_accepted_by_the_worker_on_whose_cpu_it_arrived() {
    const SESSIONS: u64 = 10;
    for ip in ["127.0.0.1", "::1"] {
        let echo = Upstream::echo("127.0.0.1");
        let mut plan = Plan::new()
            .workers(2)
            .global("worker_cpu_affinity = [\"01\", \"10\"]");
        let front = plan.server_with(ip, &echo, "");
        let proxy = plan.start();
        must_choose_by_cpu(&proxy);
        wait_for_all(&proxy, front);
        for cpu in [0, 1, 0, 1] {
            stay_on(cpu);
            let before = by_slot(&proxy.status());
            let mut clients = Vec::new();
            for seed in 0..SESSIONS {
                let mut client = connect(front);
                ping(&mut client, seed, 2).expect("a session");
                clients.push(client);
            }
            let after = by_slot(&proxy.status());
            for (slot, (before, after)) in before.iter().zip(&after).enumerate() {
                let expected = if slot == cpu { SESSIONS } else { 0 };
                assert_eq!(
                    (after.accepted - before.accepted, after.sessions),
                    (expected, expected),
                    "{ip}: sessions of the worker on CPU {slot}, the clients are on CPU {cpu}"
                );
            }
            drop(clients);
            proxy.settle();
        }
    }
}

#[test]
fn sixty_listeners_cost_a_start_about_as_much_as_two_and_each_chooses_by_cpu() {
    let echo = Upstream::echo("127.0.0.1");
    let start = |listeners: usize| {
        let mut plan = Plan::new().workers(2);
        let fronts: Vec<SocketAddr> = (0..listeners).map(|_| plan.server(&echo)).collect();
        let proxy = plan.start();
        // The master does the work; how long it takes depends on who else has some.
        let work = process::processor_time(proxy.pid());
        (proxy, fronts, work)
    };
    let (few, _, short) = start(2);
    drop(few);
    let (proxy, fronts, long) = start(60);
    assert!(
        long < 3 * short + Duration::from_secs(1),
        "two listeners: {short:?}, sixty: {long:?}"
    );
    must_choose_by_cpu(&proxy);
    wait_for_all(&proxy, fronts[0]);
    proxy.settle();
    for cpu in [0, 1] {
        let accepted = || -> Vec<u64> { by_slot(&proxy.status()).iter().map(|w| w.accepted).collect() };
        let before = accepted();
        stay_on(cpu);
        for front in &fronts {
            ping(&mut connect(*front), 1, 1).expect("a session");
            proxy.wait("it has ended", |status| status.active() == 0);
        }
        let after = accepted();
        let there = after[1 - cpu] - before[1 - cpu];
        assert!(
            after[cpu] - before[cpu] >= 60 && there <= 6,
            "{before:?}, {after:?}"
        );
    }
}

#[test]
fn with_every_syn_on_one_cpu_no_worker_has_much_more_than_its_share() {
    const SESSIONS: u64 = 400;
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new()
        .workers(4)
        .global("worker_cpu_affinity = [\"01\", \"10\", \"01\", \"10\"]");
    let front = plan.server(&echo);
    let proxy = plan.start();
    must_choose_by_cpu(&proxy);
    wait_for_all(&proxy, front);
    stay_on(0);
    // One after the other, so that each worker has long published its sessions; and all at once, so that
    // nothing but what the program has counted itself is known.
    for gap in [Duration::from_millis(2), Duration::ZERO] {
        let mut clients = Vec::new();
        for _ in 0..SESSIONS {
            clients.push(connect(front));
            std::thread::sleep(gap);
        }
        let status = proxy.wait("all sessions are accepted", |s| s.active() == SESSIONS);
        let sessions: Vec<u64> = by_slot(&status).iter().map(|w| w.sessions).collect();
        assert_eq!(sessions.iter().sum::<u64>(), SESSIONS);
        assert!(
            sessions.iter().all(|n| 2 * n <= 3 * SESSIONS / 4),
            "gap {gap:?}: one has more than 1.5 times the mean: {sessions:?}"
        );
        assert!(
            sessions[0] + sessions[2] >= 240,
            "gap {gap:?}: the workers on the clients' CPU are not preferred: {sessions:?}"
        );
        for client in &mut clients {
            ping(client, 1, 1).expect("a session");
        }
        drop(clients);
        proxy.settle();
    }
}

#[test]
fn what_a_worker_tells_last_before_it_leaves_keeps_no_connections_from_the_one_that_follows_it() {
    const ROOM: usize = 6;
    let echo = Upstream::echo("127.0.0.1");
    let port = Port::claim();
    let http = port.on("127.0.0.1");
    let mut plan = Plan::new().workers(2).global(&format!(
        "worker_cpu_affinity = [\"01\", \"10\"]\nworker_connections = {ROOM}\nhttp = {{ listen = \"{http}\" }}"
    ));
    let front = plan.server(&echo);
    let proxy = plan.start();
    must_choose_by_cpu(&proxy);
    wait_for_all(&proxy, front);
    let old: Vec<i32> = by_slot(&proxy.status()).iter().map(|w| w.pid).collect();
    stay_on(0);
    // They are nobody's to take over, and fill the worker.
    let mut clients: Vec<TcpStream> = (0..ROOM).map(|_| connect(http)).collect();
    let full = within(PATIENCE, || process::connections(old[0]).len() == ROOM);
    assert!(full, "{:?}", process::connections(old[0]));
    let stop = Flag::default();
    std::thread::scope(|scope| {
        let _at_the_end = stop.raise_at_the_end();
        let client = &mut clients[0];
        // So it has something to tell, also once its successor has said that it has room.
        scope.spawn(|| {
            let asked = |client: &mut TcpStream| {
                client
                    .write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
                    .is_ok()
                    && client.read(&mut [0; 1024]).is_ok_and(|read| read > 0)
            };
            while !stop.is_up() && asked(client) {}
        });
        proxy.signal(Signal::SIGHUP);
        let mut new = Vec::new();
        let forked = within(PATIENCE, || {
            new = process::children(proxy.pid());
            new.retain(|pid| !old.contains(pid));
            new.len() == 2
        });
        assert!(forked, "{}", proxy.log());
        let last = Pid::from_raw(new.into_iter().max().expect("a worker"));
        kill(last, Signal::SIGSTOP).expect("stopping a worker");
        pause(300);
        kill(last, Signal::SIGCONT).expect("waking a worker");
        proxy.wait("the next generation serves alone", |s| {
            s.generation() == 2 && s.workers().len() == 2
        });
    });
    let mut sessions = Vec::new();
    for seed in 0..3 {
        let mut client = connect(front);
        ping(&mut client, seed, 1).expect("a session");
        sessions.push(client);
    }
    let taken: Vec<u64> = by_slot(&proxy.status()).iter().map(|w| w.sessions).collect();
    assert_eq!(taken, [3, 0], "the clients are on the CPU of slot 0");
}

#[test]
fn the_slot_of_a_dead_worker_gets_nothing_until_it_is_replaced() {
    // A worker that lived for a second, on a busy machine, is replaced at once, and proves nothing.
    // In a thread of its own, as it stays on one processor.
    let is_passed_by = |_| std::thread::spawn(is_passed_by_until_it_is_replaced).join();
    let proved = (0..4).map(is_passed_by).any(|tried| tried.expect("a try"));
    assert!(proved, "the replacement came too early each time");
}

/// False: the replacement came too early.
fn is_passed_by_until_it_is_replaced() -> bool {
    // As many as there is time for before the replacement comes, on a machine that has other things to do as well.
    let sessions = 12 / emulation().min(4);
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new()
        .workers(2)
        .global("worker_cpu_affinity = [\"01\", \"10\"]");
    let front = plan.server(&echo);
    let proxy = plan.start();
    must_choose_by_cpu(&proxy);
    let first = |status: &Status| status.workers().into_iter().find(|worker| worker.slot == 0);
    // Each death within a second of the last makes the master wait longer: 100, 200, 400, 800, 1600 ms.
    let mut last = 0;
    let mut next = || {
        let status = proxy.wait("slot 0 has a worker", |s| first(s).is_some_and(|w| w.pid != last));
        last = first(&status).expect("a worker").pid;
        Pid::from_raw(last)
    };
    for _ in 0..5 {
        kill(next(), Signal::SIGKILL).expect("killing a worker");
        // Until the master knows, the slot has a worker for it.
        pause(30);
    }
    let victim = next();
    kill(victim, Signal::SIGSTOP).expect("stopping a worker");
    stay_on(0);
    let queued: Vec<TcpStream> = (0..8).map(|_| connect(front)).collect();
    kill(victim, Signal::SIGKILL).expect("killing a worker");
    // All that is queued there goes to the other.
    let mut before = proxy.status();
    let is_dead = within(PATIENCE / 10, || {
        before = proxy.status();
        first(&before).is_none() && before.active() == 8
    });
    if !is_dead {
        return false;
    }
    let start = Instant::now();
    let clients: Vec<TcpStream> = (0..sessions)
        .map(|seed| {
            let mut client = connect(front);
            ping(&mut client, seed, 2).expect("a session while slot 0 has no worker");
            client
        })
        .collect();
    let took = start.elapsed();
    for client in queued {
        ping(&mut { client }, 1, 2).expect("a session that was queued at slot 0");
    }
    let status = proxy.status();
    if first(&status).is_some() {
        eprintln!("{sessions} sessions had to wait for the replacement, {took:?}");
        return false;
    }
    assert_eq!(
        status.workers()[0].accepted - before.workers()[0].accepted,
        sessions
    );
    drop(clients);

    // Connections go to it from the moment that the master knows that it is ready.
    proxy.wait("the replacement gets sessions again", |s| {
        ping(&mut connect(front), 1, 1).expect("a session after the death");
        first(s).is_some_and(|replacement| replacement.accepted > 0)
    });
    true
}

/// Writes the file with another number of workers, sends HUP and waits until they serve.
#[track_caller]
fn change_workers(proxy: &Proxy, from: usize, to: usize) {
    let text = std::fs::read_to_string(proxy.file()).expect("the configuration");
    let (old, new) = (
        format!("worker_processes = {from}\n"),
        format!("worker_processes = {to}\n"),
    );
    assert!(text.contains(&old), "{text}");
    std::fs::write(proxy.file(), text.replace(&old, &new)).expect("writing the configuration");
    let before = proxy.status().generation();
    proxy.signal(Signal::SIGHUP);
    proxy.wait("the generation has changed", |s| s.generation() > before);
}

#[test]
fn what_waits_in_the_queue_of_a_removed_worker_goes_to_another() {
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new()
        .workers(2)
        .global("worker_cpu_affinity = [\"01\", \"10\"]");
    let front = plan.server(&echo);
    let proxy = plan.start();
    must_choose_by_cpu(&proxy);
    let worker = Pid::from_raw(by_slot(&proxy.status())[1].pid);
    kill(worker, Signal::SIGSTOP).expect("stopping a worker");
    stay_on(1);
    let mut waiting: Vec<TcpStream> = (0..8).map(|_| connect(front)).collect();
    stay_on(0);
    change_workers(&proxy, 2, 1);
    kill(worker, Signal::SIGKILL).expect("killing the removed worker");
    for client in &mut waiting {
        ping(client, 1, 2).expect("a session that waited in the removed worker's queue");
    }
}

/// By how much slower than real ones the processors are.
fn emulation() -> u64 {
    crate::harness::patient(Duration::from_secs(1)).as_secs()
}

/// New connections, `rate` a second, while the number of workers changes; some of them take their time over
/// the handshake. Returns how many there were.
fn change_workers_under_load(rate: u64) -> u64 {
    let rate = rate / emulation();
    const CLIENTS: u64 = 4;
    const SLOW_CLIENTS: u64 = 24;
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new();
    let front = plan.server(&echo);
    let proxy = plan.start();
    must_choose_by_cpu(&proxy);
    let (stop, served) = (Flag::default(), AtomicU64::new(0));
    let failures = Mutex::new(Vec::new());
    let start = Instant::now();
    let attempt = |connected: std::io::Result<TcpStream>| match connected
        .and_then(|mut client| ping(&mut client, 1, 1))
    {
        Ok(()) => _ = served.fetch_add(1, Ordering::Relaxed),
        Err(e) => failures
            .lock()
            .expect("the list")
            .push((start.elapsed(), e.to_string())),
    };
    let (attempt, stop) = (&attempt, &stop);
    let (mut largest, mut rounds) = (Vec::new(), 0);
    std::thread::scope(|scope| {
        let at_the_end = stop.raise_at_the_end();
        for client in 0..CLIENTS {
            scope.spawn(move || {
                let mut sent = 0;
                while !stop.is_up() {
                    let due = Duration::from_micros((CLIENTS * sent + client) * 1_000_000 / rate);
                    std::thread::sleep(due.saturating_sub(start.elapsed()));
                    // Their ports last longer where they have several addresses.
                    let from = Ipv4Addr::new(127, 0, 1 + client as u8, 1 + (sent % 16) as u8);
                    attempt(connect_from(from, front));
                    sent += 1;
                }
            });
        }
        for _ in 0..SLOW_CLIENTS {
            scope.spawn(move || {
                while !stop.is_up() {
                    attempt(connect_slowly(front));
                }
            });
        }
        pause(500);
        for (from, to) in [(1, 4), (4, 2), (2, 4), (4, 2), (2, 1)] {
            change_workers(&proxy, from, to);
            pause(800);
            largest.push(proxy.status().workers().len());
            rounds += 1;
        }
        drop(at_the_end);
    });
    assert_eq!(rounds, 5);
    let failures = failures.into_inner().expect("the list");
    assert!(
        failures.is_empty(),
        "{} of {served:?} connections were lost: {failures:?}",
        failures.len()
    );
    let served = served.into_inner();
    eprintln!(
        "{served} connections in {:?}, {:.0} a second; workers {largest:?}",
        start.elapsed(),
        served as f64 / start.elapsed().as_secs_f64()
    );
    served
}

/// A connection that is half-open at the proxy for 200 ms. Fails where it was reset by then.
fn connect_slowly(address: SocketAddr) -> std::io::Result<TcpStream> {
    let client = connect_with_late_ack(address)?;
    pause(250);
    Ok(client)
}

#[test]
fn changing_worker_processes_under_load_loses_no_connection() {
    assert!(
        change_workers_under_load(400) > 1000 / emulation(),
        "too little load to show anything"
    );
}

#[test]
#[ignore = "takes two CPUs for itself: cargo test --release -p master --test blackbox accept:: -- --ignored"]
fn changing_worker_processes_under_two_thousand_connections_a_second_loses_none() {
    assert!(
        change_workers_under_load(2000) > 5000,
        "too little load to show anything"
    );
}
