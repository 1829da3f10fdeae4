//! HUP: a new generation takes over, and nobody notices; a bad file changes nothing.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::harness::pattern::{pause, ping};
use crate::harness::sockets::try_connect;
use crate::harness::{
    Bytes, Flag, PATIENCE, Plan, Port, Proxy, Status, Upstream, connect, exchange, process, within,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

#[test]
fn reloads_under_load_refuse_and_reset_nobody() {
    const RELOADS: u64 = 8;
    const STREAM: u64 = 40 << 20;
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new().workers(2);
    let front = plan.server(&echo);
    let proxy = plan.start();
    let mut long: Vec<_> = (0..20).map(|_| connect(front)).collect();
    for client in &mut long {
        ping(client, 1, 1).expect("a long session before the reloads");
    }

    let stop = Flag::default();
    let served = AtomicU64::new(0);
    let failures = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        let at_the_end = stop.raise_at_the_end();
        for thread in 0..3u64 {
            let (stop, served, failures) = (&stop, &served, &failures);
            scope.spawn(move || {
                while !stop.is_up() {
                    let result = try_connect(front).and_then(|mut client| ping(&mut client, thread, 2));
                    match result {
                        Ok(()) => _ = served.fetch_add(1, Ordering::Relaxed),
                        Err(e) => failures.lock().expect("the list").push(e.to_string()),
                    }
                    pause(2);
                }
            });
        }
        let stream = scope.spawn(|| exchange(connect(front), 9, STREAM, 9));
        let mut before = proxy.status();
        let generation = before.generation();
        for _ in 0..RELOADS {
            let now = proxy.reload();
            assert!(
                now.carried().to_upstream >= before.carried().to_upstream,
                "a counter fell at a reload"
            );
            assert!(
                now.number("/sessions/total") >= before.number("/sessions/total"),
                "a counter fell"
            );
            before = now;
            pause(150);
        }
        assert_eq!(before.generation(), generation + RELOADS);
        drop(at_the_end);
        stream.join().expect("the stream").must_be_whole(STREAM);
    });
    let failures = failures.into_inner().expect("the list");
    assert!(
        failures.is_empty(),
        "{} of {served:?} sessions failed: {failures:?}",
        failures.len()
    );
    assert!(served.into_inner() > 100, "too little load to show anything");

    for client in &mut long {
        ping(client, 2, 5).expect("a long session after the reloads");
    }
    drop(long);
    proxy.settle();
    let gone = within(PATIENCE, || process::children(proxy.pid()).len() == 2);
    assert!(
        gone,
        "old workers without a session stay: {:?}",
        process::children(proxy.pid())
    );
}

#[test]
fn new_sessions_follow_the_new_file_and_old_ones_stay_where_they_are() {
    const STREAM: u64 = 5 << 20;
    let (old, new) = (
        Upstream::echo("127.0.0.1"),
        Upstream::serve("127.0.0.1", |s| exchange(s, 5, 1000, 6)),
    );
    let mut plan = Plan::new();
    let front = plan.server(&old);
    let proxy = plan.start();
    let mut client = connect(front);
    ping(&mut client, 1, 3).expect("the old session before");

    let text = std::fs::read_to_string(proxy.file()).expect("the configuration");
    let text = text.replace(&old.address.to_string(), &new.address.to_string());
    std::fs::write(proxy.file(), text).expect("writing the configuration");
    proxy.reload();
    exchange(connect(front), 6, 2000, 5).must_be_whole(1000);
    new.result().must_be_whole(2000);
    ping(&mut client, 2, 3).expect("the old session after");
    exchange(client, 7, STREAM, 7).must_be_whole(STREAM);
    let carried = proxy.settle().carried();
    let echoed = 6 * 24 + STREAM;
    assert_eq!(
        carried,
        Bytes {
            to_upstream: echoed + 2000,
            to_downstream: echoed + 1000
        }
    );
}

#[test]
fn a_server_that_the_new_file_adds_listens_and_one_that_it_drops_does_not() {
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new();
    let kept = plan.server(&echo);
    let added = plan.server(&echo);
    let with_both = plan.text();
    let tables: Vec<&str> = with_both.split("[[server]]").collect();
    let listens = |table: &&&str| !table.contains(&added.to_string());
    let without: Vec<&str> = tables.iter().filter(listens).copied().collect();
    let file = plan.file("proxy.toml");
    std::fs::write(&file, without.join("[[server]]")).expect("writing the configuration");
    let proxy = Proxy::start_file(plan, &file);
    assert!(try_connect(added).is_err(), "nothing listens on {added} yet");

    std::fs::write(&file, &with_both).expect("writing the configuration");
    proxy.reload();
    ping(&mut connect(added), 1, 2).expect("the added server");
    ping(&mut connect(kept), 2, 2).expect("the kept server");

    std::fs::write(&file, without.join("[[server]]")).expect("writing the configuration");
    proxy.reload();
    assert!(
        within(PATIENCE, || try_connect(added).is_err()),
        "{added} still listens"
    );
    ping(&mut connect(kept), 3, 2).expect("the kept server");
}

#[test]
fn a_bad_file_changes_nothing_and_is_reported() {
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new().workers(2);
    let front = plan.server(&echo);
    let proxy = plan.start();
    let mut client = connect(front);
    ping(&mut client, 1, 3).expect("a session before");
    let before = proxy.status();
    let pids = |status: &Status| status.workers().iter().map(|w| w.pid).collect::<Vec<_>>();
    let good = std::fs::read_to_string(proxy.file()).expect("the configuration");

    for (number, bad) in [
        "worker_processes = \"many\"\n",
        "this is not TOML",
        "no_such_key = 1\n",
    ]
    .iter()
    .enumerate()
    {
        let lines = proxy.log().lines().count();
        std::fs::write(proxy.file(), format!("{bad}\n{good}")).expect("writing a bad configuration");
        proxy.signal(Signal::SIGHUP);
        let file = proxy.file().display().to_string();
        let reported = || proxy.log().lines().skip(lines).any(|line| line.contains(&file));
        assert!(
            within(PATIENCE, reported),
            "the log does not name the bad file ({number})"
        );
        pause(200);
        let now = proxy.status();
        assert_eq!(now.generation(), before.generation(), "{bad}");
        assert_eq!(pids(&now), pids(&before), "{bad}");
        ping(&mut client, 2, 3).expect("the old session");
        ping(&mut connect(front), 3, 3).expect("a new session");
    }

    std::fs::write(proxy.file(), good).expect("writing the good configuration");
    let after = proxy.reload();
    assert_eq!(after.generation(), before.generation() + 1);
    ping(&mut client, 4, 3).expect("the old session after the good file");
}

/// Signals a worker.
pub fn tell(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).expect("signalling a worker");
}

/// What stood still goes on: half a reload that did not come about is over.
fn go_on(old: &[i32], last: i32) {
    old.iter()
        .chain([&last])
        .for_each(|&pid| tell(pid, Signal::SIGCONT));
}

/// How often half a reload is tried: on a busy machine the second worker is mostly ready before anybody can stop it.
pub const HALVES: usize = 50;

/// Reloads while the old workers stand still, and stops the last new one before it is ready: the first new one alone takes
/// connections. Returns the old ones and that last one; None if it was ready too soon.
pub fn half_a_reload(proxy: &Proxy) -> Option<(Vec<i32>, i32)> {
    let old = process::children(proxy.pid());
    old.iter().for_each(|&pid| tell(pid, Signal::SIGSTOP));
    proxy.signal(Signal::SIGHUP);
    let mut new = Vec::new();
    let end = Instant::now() + PATIENCE;
    while new.len() < 2 {
        assert!(Instant::now() < end, "no new workers: {}", proxy.log());
        new = process::children(proxy.pid());
        new.retain(|pid| !old.contains(pid));
    }
    let last = new.into_iter().max().expect("new workers");
    tell(last, Signal::SIGSTOP);
    let stands = || process::field(last, "State").starts_with('T');
    assert!(within(PATIENCE, stands), "{}", process::field(last, "State"));
    if !process::is_past_its_start(last) {
        // The first one gets ready meanwhile.
        pause(300);
    }
    if process::is_past_its_start(last) || proxy.log().contains("generation 2 serves") {
        go_on(&old, last);
        return None;
    }
    Some((old, last))
}

#[test]
fn the_limit_of_all_sessions_of_a_worker_is_changed_by_a_reload_and_not_by_one_that_is_refused() {
    let echo = Upstream::echo("127.0.0.1");
    let line = |megabytes: u64| format!("worker_backlog_size = \"{megabytes}m\"");
    let begin = || {
        let mut plan = Plan::new().workers(2).global(&line(64));
        plan.server(&echo);
        let proxy = plan.start();
        proxy.edit(&line(64), &line(32));
        half_a_reload(&proxy).map(|(old, last)| (proxy, old, last))
    };
    let (proxy, old, last) = (0..HALVES)
        .find_map(|_| begin())
        .expect("a worker that is not ready");
    let must_be = |megabytes: u64| {
        let status = proxy.wait("one generation is there", |s| s.workers().len() == 2);
        for worker in 0..2 {
            let limit = status.number(&format!("/workers/{worker}/backlog_limit_bytes"));
            assert_eq!(limit, megabytes << 20, "{:#}", status.json());
        }
    };
    tell(last, Signal::SIGKILL);
    let refused = || proxy.log().contains("reload refused");
    assert!(within(PATIENCE, refused), "{}", proxy.log());
    old.iter().for_each(|&pid| tell(pid, Signal::SIGCONT));
    must_be(64);
    proxy.reload();
    must_be(32);
}

#[test]
fn sessions_that_workers_of_a_refused_generation_have_taken_go_on() {
    let echo = Upstream::echo("127.0.0.1");
    let answers = |client: &mut std::net::TcpStream| {
        let patience = Duration::from_millis(100);
        client
            .set_read_timeout(Some(patience))
            .expect("setting a timeout");
        let answers = ping(client, 1, 1).is_ok();
        client
            .set_read_timeout(Some(PATIENCE))
            .expect("setting a timeout");
        answers
    };
    // With a store that both generations have, and with one of its own.
    for worker_connections in [1024, 999] {
        let begin = || {
            let mut plan = Plan::new().workers(2).global("worker_connections = 1024");
            let front = plan.server(&echo);
            let proxy = plan.start();
            let text = format!("worker_connections = {worker_connections}");
            proxy.edit("worker_connections = 1024", &text);
            let (old, last) = half_a_reload(&proxy)?;
            // So many at once that each slot has some, on whatever CPU they come. Those of the other slot wait there.
            let clients: Vec<_> = (0..48).map(|_| connect(front)).collect();
            let (mut taken, mut waiting) = (Vec::new(), Vec::new());
            for mut client in clients {
                match taken.len() < 3 && answers(&mut client) {
                    true => taken.push(client),
                    false => waiting.push(client),
                }
            }
            if taken.is_empty() {
                // The first one was not ready in time, or was stopped with what it waits for.
                go_on(&old, last);
                return None;
            }
            Some((proxy, old, last, taken, waiting))
        };
        let (proxy, old, last, mut taken, waiting) = (0..HALVES)
            .find_map(|_| begin())
            .expect("a worker that is ready beside one that is not");
        tell(last, Signal::SIGKILL);
        let refused = || proxy.log().contains("reload refused");
        assert!(within(PATIENCE, refused), "{}", proxy.log());
        old.iter().for_each(|&pid| tell(pid, Signal::SIGCONT));
        for client in &mut taken {
            ping(client, 2, 3).expect("a session that a refused generation took");
        }
        proxy.reload();
        let gone = || process::children(proxy.pid()).len() == 2;
        assert!(within(PATIENCE, gone), "{}", proxy.log());
        for client in &mut taken {
            ping(client, 3, 3).expect("the same after another reload");
        }
        drop((taken, waiting));
        assert_eq!(proxy.settle().number("/closes/shutdown"), 0);
    }
}

#[test]
fn sessions_of_a_listener_that_was_refused_are_never_another_listeners() {
    let echo = Upstream::echo("127.0.0.1");
    let (refused, next) = (Port::claim(), Port::claim());
    let [refused, next] = [&refused, &next].map(|port| port.on("127.0.0.1"));
    let begin = || {
        let mut plan = Plan::new().workers(2);
        let front = plan.server(&echo);
        let proxy = plan.start();
        let listen = |address| {
            format!(
                "[[server]]\nlisten = \"{address}\"\nproxy_pass = \"{}\"\n",
                echo.address
            )
        };
        let text = std::fs::read_to_string(proxy.file()).expect("the configuration");
        std::fs::write(proxy.file(), text + &listen(refused)).expect("another listener");
        let (old, last) = half_a_reload(&proxy)?;
        let mut new = process::children(proxy.pid());
        new.retain(|pid| !old.contains(pid) && *pid != last);
        // So many at once that each slot has some, on whatever CPU they come.
        let clients: Vec<_> = (0..48).map(|_| connect(refused)).collect();
        // Well before the reload is refused because of the other one.
        let taken = || process::connections(new[0]).len() >= 2;
        if !within(Duration::from_secs(3), taken) {
            go_on(&old, last);
            return None;
        }
        Some((front, proxy, old, last, clients))
    };
    let begun = (0..HALVES).find_map(|_| begin());
    let (_front, proxy, old, last, clients) = begun.expect("a worker that is ready beside one that is not");
    tell(last, Signal::SIGKILL);
    let is_refused = || proxy.log().contains("reload refused");
    assert!(within(PATIENCE, is_refused), "{}", proxy.log());
    old.iter().for_each(|&pid| tell(pid, Signal::SIGCONT));
    proxy.wait("they are kept", |s| s.number("/sessions/kept") > 0);
    proxy.edit(&refused.to_string(), &next.to_string());
    proxy.reload();
    let active = |status: &Status| {
        let listeners = status.json()["listeners"].as_array().expect("listeners");
        let found = listeners
            .iter()
            .find(|listener| listener["address"] == next.to_string());
        found.and_then(|listener| listener["active"].as_u64())
    };
    let status = proxy.wait("a worker that knows it answers", |s| active(s).is_some());
    assert_eq!(active(&status), Some(0), "{:#}", status.json());
    drop(clients);
    proxy.settle();
}

#[test]
fn a_worker_that_dies_while_a_generation_is_built_is_replaced_before_that_is_done() {
    // So many that their maps take much longer to make than a worker to be killed.
    const WORKERS: usize = 24;
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new().workers(WORKERS).global("worker_connections = 1000");
    let front = plan.server(&echo);
    let proxy = plan.start();
    proxy.edit("worker_connections = 1000", "worker_connections = 1001");
    // At a reload it is the size that asks for new maps, at an upgrade the new binary.
    for (generation, signal, begins) in [
        (2, Signal::SIGHUP, "reloading"),
        (3, Signal::SIGUSR2, "has taken over"),
    ] {
        let mut workers = proxy.status().workers();
        workers.retain(|worker| !worker.draining);
        let victim = workers[WORKERS / 2].pid;
        let since = Instant::now();
        proxy.signal(signal);
        let begun = || proxy.log().contains(begins);
        while !begun() {
            assert!(since.elapsed() < PATIENCE, "{}", proxy.log());
            pause(1);
        }
        // The master stands still until the worker is dead: on a busy machine it might be done before.
        proxy.signal(Signal::SIGSTOP);
        tell(victim, Signal::SIGKILL);
        assert!(within(PATIENCE, || !process::is_alive(victim)));
        proxy.signal(Signal::SIGCONT);
        proxy.wait("the next generation serves", |s| s.generation() == generation);
        let log = proxy.log();
        let line = |text: &str| log.lines().position(|line| line.contains(text));
        let replaced = line(&format!(
            "(process {victim}) was killed by SIGKILL: it is replaced"
        ));
        let built = line(&format!("generation {generation} was built"));
        assert!(built.is_some(), "{log}");
        assert!(replaced.is_some() && replaced < built, "{signal}: {log}");
        ping(&mut connect(front), generation, 2).expect("a session afterwards");
    }
}
