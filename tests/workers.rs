//! The worker processes: where they run, what they may, that a dead one is replaced, and that idle
//! sessions cost nothing.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::harness::pattern::{pause, ping};
use crate::harness::program::{need, run};
use crate::harness::{Ending, PATIENCE, Plan, Proxy, Upstream, connect, process, receive, within};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn field_of_each(proxy: &Proxy, key: &str) -> Vec<String> {
    let mut workers = proxy.status().workers();
    workers.sort_by_key(|w| w.slot);
    workers.iter().map(|w| process::field(w.pid, key)).collect()
}

#[test]
fn workers_are_pinned_as_worker_cpu_affinity_says() {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    assert!(cpus >= 2, "this test needs two CPUs");
    for (affinity, expected) in [
        ("\"auto\"", ["0", "1"]),
        ("[\"01\", \"10\"]", ["0", "1"]),
        ("[\"10\", \"01\"]", ["1", "0"]),
        ("[\"11\", \"0-1\"]", ["0-1", "0-1"]),
    ] {
        let mut plan = Plan::new()
            .workers(2)
            .global(&format!("worker_cpu_affinity = {affinity}"));
        plan.server("127.0.0.1:1");
        let proxy = plan.start();
        assert_eq!(
            field_of_each(&proxy, "Cpus_allowed_list"),
            expected,
            "worker_cpu_affinity = {affinity}"
        );
    }
}

#[test]
fn workers_hold_no_right_and_run_as_the_configured_user() {
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new().workers(2).global("user = \"nobody\"");
    let front = plan.server(&echo);
    let proxy = plan.start();
    for key in ["CapEff", "CapPrm", "CapInh", "CapAmb", "CapBnd"] {
        for held in field_of_each(&proxy, key) {
            assert_eq!(
                u64::from_str_radix(&held, 16),
                Ok(0),
                "{key} of a worker is {held}"
            );
        }
    }
    for (key, expected) in [
        ("NoNewPrivs", "1"),
        ("Uid", "65534"),
        ("Gid", "65534"),
        ("Groups", ""),
    ] {
        for found in field_of_each(&proxy, key) {
            let right = found
                .split_whitespace()
                .all(|word| word == expected || key == "Groups" && word == "65534");
            assert!(right, "{key} of a worker is {found:?}, not {expected:?}");
        }
    }
    // Without any right, the worker still hands its sessions to the kernel, before and after a reload.
    let mut client = connect(front);
    proxy.wait("the session is offloaded", |s| s.offloaded() == 1);
    ping(&mut client, 1, 10).expect("an offloaded session");
    drop(client);
    let status = proxy.settle();
    assert_eq!(
        (status.sockmap().to_upstream, status.relay().to_upstream),
        (240, 0)
    );
    let generation = status.generation();
    proxy.signal(Signal::SIGHUP);
    proxy.wait("the generation has changed", |s| s.generation() > generation);
    let _client = connect(front);
    proxy.wait("a session of the new generation is offloaded", |s| {
        s.offloaded() == 1
    });
}

#[test]
fn workers_hold_no_right_where_no_user_is_configured() {
    let mut plan = Plan::new().workers(2);
    plan.server("127.0.0.1:1");
    let proxy = plan.start();
    for key in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
        for held in field_of_each(&proxy, key) {
            assert_eq!(
                u64::from_str_radix(&held, 16),
                Ok(0),
                "{key} of a worker is {held}"
            );
        }
    }
    assert_eq!(field_of_each(&proxy, "NoNewPrivs"), ["1", "1"]);
}

/// Echoes, and tells how the connection ended.
fn echo_to_the_end(mut stream: TcpStream) -> Ending {
    let mut buffer = [0u8; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return Ending::Fin,
            Ok(got) => stream.write_all(&buffer[..got]).expect("echoing"),
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => return Ending::Reset,
            Err(_) => return Ending::Silent,
        }
    }
}

#[test]
fn a_killed_worker_is_replaced_its_sessions_are_reset_and_the_others_go_on() {
    let echo = Upstream::serve("127.0.0.1", echo_to_the_end);
    let mut plan = Plan::new().workers(2);
    let front = plan.server(&echo);
    let proxy = plan.start();
    let mut clients: Vec<TcpStream> = Vec::new();
    let status = loop {
        // Many at once: those that are older than a second would outlive it.
        let from = clients.len();
        clients.extend((0..20).map(|_| connect(front)));
        for client in &mut clients[from..] {
            ping(client, 1, 2).expect("a session before");
        }
        let status = proxy.wait("all are offloaded", |s| s.offloaded() == clients.len() as u64);
        if status.workers().iter().all(|w| w.sessions >= 5) {
            break status;
        }
        assert!(
            clients.len() < 400,
            "one of two workers gets no sessions: {:?}",
            status.workers()
        );
    };
    let total = status.number("/sessions/total");
    // One of them may have been ready later than the other: it has the younger sessions, and fewer.
    let victim = status.workers().into_iter().min_by_key(|w| w.sessions);
    let victim = victim.expect("two workers");

    let start = Instant::now();
    kill(Pid::from_raw(victim.pid), Signal::SIGKILL).expect("killing a worker");
    let status = proxy.wait("the worker is replaced", |s| {
        let workers = s.workers();
        workers.len() == 2
            && workers
                .iter()
                .all(|w| w.pid != victim.pid && process::is_alive(w.pid))
    });
    assert!(
        start.elapsed() < Duration::from_secs(4),
        "replaced after {:?}",
        start.elapsed()
    );
    assert!(
        status.workers().iter().any(|w| w.slot == victim.slot),
        "the slot is taken again"
    );
    assert!(status.number("/sessions/total") >= total, "a counter fell");

    for seed in 0..20 {
        ping(&mut connect(front), seed, 3).expect("a new session after the replacement");
        // The new sessions end cleanly at the upstream; what else ends there was reset.
    }
    let mut reset = 0;
    let mut alive = Vec::new();
    for mut client in clients {
        if ping(&mut client, 2, 5).is_ok() {
            alive.push(client);
        } else {
            reset += 1;
        }
    }
    let kept = proxy.status().number("/sessions/adopted");
    assert_eq!(
        reset + kept,
        victim.sessions,
        "exactly the killed worker's sessions end, but for {kept} that were a second old"
    );
    assert!(reset > 0, "all were a second old");
    let endings: Vec<Ending> = (0..20 + reset).map(|_| echo.result()).collect();
    let count = |kind| endings.iter().filter(|e| **e == kind).count() as u64;
    assert_eq!(
        (count(Ending::Reset), count(Ending::Fin)),
        (reset, 20),
        "upstreams saw {endings:?}"
    );
    drop(alive);
    proxy.settle();
}

#[test]
fn a_client_of_a_killed_worker_sees_a_reset_and_no_clean_end() {
    let upstream = Upstream::sink("127.0.0.1", 1);
    let mut plan = Plan::new();
    let front = plan.server(&upstream);
    let proxy = plan.start();
    let mut client = connect(front);
    proxy.wait("the session is offloaded", |s| s.offloaded() == 1);
    crate::harness::send(&mut client, 1, 0, 100_000).expect("sending");
    kill(Pid::from_raw(proxy.worker()), Signal::SIGKILL).expect("killing the worker");
    assert_eq!(receive(&mut client, 2).ending, Ending::Reset);
    upstream.result().must_be_a_prefix_and_a_reset(100_000);
    proxy.settle();
}

#[test]
fn a_worker_that_is_killed_again_and_again_is_replaced_each_time() {
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new();
    let front = plan.server(&echo);
    let proxy = plan.start();
    for round in 0..4 {
        let pid = proxy.worker();
        kill(Pid::from_raw(pid), Signal::SIGKILL).expect("killing the worker");
        let replaced = within(PATIENCE, || proxy.worker() != pid);
        assert!(replaced, "not replaced in round {round}");
        ping(&mut connect(front), round, 3).expect("a session after the replacement");
    }
}

#[test]
fn a_dead_worker_is_replaced_though_whoever_started_the_program_ignores_the_deaths_of_its_children() {
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new().launched_by(&["env", "--ignore-signal=CHLD"]);
    let front = plan.server(&echo);
    let mut proxy = plan.start();
    let pid = proxy.worker();
    kill(Pid::from_raw(pid), Signal::SIGKILL).expect("killing the worker");
    ping(&mut connect(front), 1, 3).expect("a session after the replacement");
    assert_ne!(proxy.worker(), pid);
    proxy.stop();
}

#[test]
fn a_master_without_descriptors_goes_on_and_replaces_its_worker_when_it_has_some_again() {
    need("prlimit", "util-linux");
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new();
    let front = plan.server(&echo);
    let mut proxy = plan.start();
    let worker = proxy.worker();
    let limit = |soft: &str| {
        let mut command = Command::new("prlimit");
        command.args(["--pid", &proxy.pid().to_string(), &format!("--nofile={soft}:")]);
        run(command, Duration::from_secs(10)).must_succeed("prlimit");
    };
    // Fewer than it waits for: poll(2) refuses that.
    limit("0");
    kill(Pid::from_raw(worker), Signal::SIGKILL).expect("killing the worker");
    let tried = || proxy.log().contains("failed to start worker 0");
    assert!(within(Duration::from_secs(5), tried), "{}", proxy.log());
    limit("4096");
    ping(&mut connect(front), 1, 3).expect("a session after the replacement");
    proxy.stop();
}

/// How often all threads of the process went to sleep within the next three seconds.
fn wake_ups(pid: i32) -> u64 {
    let before = process::voluntary_switches(pid);
    pause(3000);
    process::voluntary_switches(pid) - before
}

#[test]
fn idle_sessions_do_not_wake_their_worker() {
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new();
    let front = plan.server(&echo);
    let proxy = plan.start();
    let worker = proxy.worker();
    let mut clients = Vec::new();
    let mut measured = |count: usize| {
        while clients.len() < count {
            let mut client = connect(front);
            ping(&mut client, 1, 1).expect("an echo");
            clients.push(client);
        }
        proxy.wait("all are offloaded", |s| s.offloaded() == count as u64);
        pause(500);
        wake_ups(worker)
    };
    let (few, many) = (measured(10), measured(400));
    assert!(few <= 20, "10 idle sessions wake their worker {few} times in 3 s");
    assert!(
        many <= few + 10,
        "10 idle sessions cost {few} wake-ups in 3 s, 400 cost {many}"
    );
}

#[test]
fn a_busy_offloaded_session_does_not_wake_its_worker() {
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new();
    let front = plan.server(&echo);
    let proxy = plan.start();
    let mut client = connect(front);
    proxy.wait("the session is offloaded", |s| s.offloaded() == 1);
    pause(300);
    let worker = proxy.worker();
    let (before, begun) = (process::voluntary_switches(worker), Instant::now());
    ping(&mut client, 1, 3000).expect("3000 rounds");
    let woken = process::voluntary_switches(worker) - before;
    // Now and then it wakes by itself.
    assert!(
        woken < 100 + 10 * begun.elapsed().as_secs(),
        "3000 rounds that the kernel carried woke the worker {woken} times"
    );
}

#[test]
fn a_stopped_worker_does_not_stop_its_offloaded_sessions() {
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new();
    let front = plan.server(&echo);
    let proxy = plan.start();
    let mut client = connect(front);
    proxy.wait("the session is offloaded", |s| s.offloaded() == 1);
    pause(300);
    let worker = Pid::from_raw(proxy.worker());
    kill(worker, Signal::SIGSTOP).expect("stopping the worker");
    let carried = ping(&mut client, 1, 1000);
    kill(worker, Signal::SIGCONT).expect("letting the worker go on");
    carried.expect("1000 rounds while the worker is stopped");
    drop(client);
    assert_eq!(proxy.settle().sockmap().sum(), 2 * 24 * 1000);
}
