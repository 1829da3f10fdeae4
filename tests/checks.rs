//! Active health checks: what makes a peer down and up, and that all workers together are one checker.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::harness::{PATIENCE, Plan, Port, Proxy, Status, Upstream, within};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Greets with one byte, then waits for its client's end.
fn greeter(name: u8) -> Upstream<()> {
    Upstream::serve("127.0.0.1", move |stream| greet(stream, name))
}

fn greeter_on(address: SocketAddr, name: u8) -> Upstream<()> {
    let listener = TcpListener::bind(address).expect("binding");
    Upstream::on(listener, move |stream| greet(stream, name))
}

fn greet(mut stream: TcpStream, name: u8) {
    if stream.write_all(&[name]).is_ok() {
        let _ = stream.read_to_end(&mut Vec::new());
    }
}

/// Connects, and tells which greeter answered; `None`: none did.
fn visit(front: SocketAddr) -> Option<(TcpStream, u8)> {
    let mut name = [0u8];
    let mut stream = TcpStream::connect(front).ok()?;
    stream
        .set_read_timeout(Some(PATIENCE))
        .expect("setting a timeout");
    stream.read_exact(&mut name).ok()?;
    Some((stream, name[0]))
}

fn names(front: SocketAddr, count: usize) -> Vec<u8> {
    (0..count).map(|_| visit(front).expect("a greeting").1).collect()
}

fn group(servers: &[String], check: &str) -> String {
    let servers: Vec<String> = servers
        .iter()
        .map(|server| format!("  {{ {server} }},\n"))
        .collect();
    format!(
        "[[upstream]]\nname = \"group\"\nserver = [\n{}]\n{check}\n",
        servers.concat()
    )
}

/// A peer that failed attempts never take out, so that only checks do.
fn at(address: SocketAddr, more: &str) -> String {
    format!("address = \"{address}\", max_fails = 0{more}")
}

fn peer(status: &Status, index: usize, pointer: &str) -> serde_json::Value {
    let upstreams = status.json()["upstreams"].as_array().expect("upstreams");
    let group = upstreams.iter().find(|group| group["name"] == "group");
    let peer = &group.expect("the group")["peers"][index];
    peer.pointer(pointer)
        .unwrap_or_else(|| panic!("no {pointer}: {peer:#}"))
        .clone()
}

fn wait_for_state(proxy: &Proxy, index: usize, state: &str) {
    proxy.wait(&format!("peer {index} is {state}"), |status| {
        peer(status, index, "/state") == state
    });
}

/// The log says this so often, or soon will: a thread of its own writes it.
#[track_caller]
fn must_say_times(proxy: &Proxy, what: &str, times: usize) {
    let said = || proxy.log().matches(what).count();
    within(PATIENCE, || said() >= times);
    assert_eq!(said(), times, "{what}: {}", proxy.log());
}

/// A server that notes when it was connected to.
fn counted(times: &Arc<Mutex<Vec<Instant>>>) -> Upstream<()> {
    let times = Arc::clone(times);
    Upstream::serve("127.0.0.1", move |mut stream| {
        times.lock().expect("the times").push(Instant::now());
        let _ = stream.read_to_end(&mut Vec::new());
    })
}

#[test]
fn a_peer_that_is_down_gets_nothing_and_is_back_after_rise() {
    let (claim, two) = (Port::claim(), greeter(2));
    let address = claim.on("127.0.0.1");
    let one = greeter_on(address, 1);
    let check = "check = { interval = \"100ms\", fall = 2, rise = 3, timeout = \"1s\" }";
    let lines = [at(address, ", max_conns = 1"), at(two.address, "")];
    let mut plan = Plan::new().workers(3).tables(&group(&lines, check));
    let front = plan.server("group");
    let proxy = plan.start();
    let first = proxy.wait("both were checked", |s| {
        (0..2).all(|index| peer(s, index, "/check/passed").as_u64() >= Some(2))
    });
    // Its one place is free, however often it is checked.
    assert_eq!(peer(&first, 0, "/active"), 0);
    assert_eq!(
        (0..4)
            .filter(|_| {
                let (_, seed) = visit(front).expect("a greeting");
                proxy.wait("its place is free again", |s| peer(s, 0, "/active") == 0);
                seed == 1
            })
            .count(),
        2
    );

    let gone = Instant::now();
    drop(one);
    wait_for_state(&proxy, 0, "unhealthy");
    // With an interval that nobody has set it would be ten seconds.
    assert!(
        gone.elapsed() < crate::harness::patient(Duration::from_secs(4)),
        "{:?}",
        gone.elapsed()
    );
    let before = peer(&proxy.status(), 0, "/connect_failures");
    assert_eq!(names(front, 20), [2; 20]);
    let status = proxy.status();
    assert_eq!(
        peer(&status, 0, "/connect_failures"),
        before,
        "a session was led to it"
    );
    assert_eq!(peer(&status, 0, "/check/last"), "connect_failed");
    assert!(peer(&status, 0, "/check/failed").as_u64() >= Some(2));
    assert_eq!(peer(&status, 1, "/check/failed"), 0);

    let _one = greeter_on(address, 1);
    wait_for_state(&proxy, 0, "up");
    assert!(within(PATIENCE, || visit(front).is_some_and(|(_, name)| name == 1)));
    must_say_times(&proxy, "is down: 2 checks in a row failed", 1);
    must_say_times(&proxy, "is up: 3 checks in a row passed", 1);
    assert!(proxy.settle().sockmap().sum() > 0, "the kernel carried nothing");
}

/// Reads what a check sends, then does as `serve` says.
fn asked(serve: impl Fn(TcpStream) + Send + Sync + 'static) -> Upstream<Duration> {
    Upstream::serve("127.0.0.1", move |mut stream| {
        let begun = Instant::now();
        let mut question = [0u8; 6];
        if stream.read_exact(&mut question).is_ok() {
            assert_eq!(&question, b"PING\r\n");
            serve(stream);
        }
        begun.elapsed()
    })
}

fn say(stream: &mut TcpStream, text: &[u8]) -> bool {
    stream.write_all(text).is_ok()
}

fn wait_for_end(mut stream: TcpStream) {
    let _ = stream.read_to_end(&mut Vec::new());
}

#[test]
fn a_peer_is_judged_by_its_answer() {
    let pause = || std::thread::sleep(Duration::from_millis(30));
    let right = asked(move |mut stream| {
        for piece in [&b"+P"[..], b"ONG", b"\r", b"\n"] {
            let _ = say(&mut stream, piece);
            pause();
        }
        wait_for_end(stream);
    });
    let wrong = asked(|mut stream| {
        let _ = say(&mut stream, b"-ERR\r\n");
        wait_for_end(stream);
    });
    let short = asked(|mut stream| {
        let _ = say(&mut stream, b"+PON");
    });
    let silent = asked(wait_for_end);
    let mute = asked(drop);
    let endless = asked(|mut stream| while say(&mut stream, &[b'x'; 1000]) {});
    let deaf = crate::harness::sockets::Deaf::new();
    let claim = Port::claim();
    let peers = [
        (right.address, "passed", "up"),
        (wrong.address, "wrong_answer", "unhealthy"),
        (short.address, "wrong_answer", "unhealthy"),
        (silent.address, "no_answer", "unhealthy"),
        (mute.address, "closed", "unhealthy"),
        (endless.address, "wrong_answer", "unhealthy"),
        (deaf.address, "connect_timeout", "unhealthy"),
        (claim.on("127.0.0.1"), "connect_failed", "unhealthy"),
    ];
    let lines: Vec<String> = peers.iter().map(|(address, ..)| at(*address, "")).collect();
    for expect in ["+PONG\\\\r\\\\n", "~ ^\\\\+PONG\\\\r\\\\n$"] {
        let check = format!(
            "check = {{ interval = \"300ms\", timeout = \"3s\", send = \"PING\\r\\n\", expect = \"{expect}\" }}"
        );
        let mut plan = Plan::new().tables(&group(&lines, &check));
        plan.server("group");
        let proxy = plan.start();
        let status = proxy.wait("every peer was judged", |status| {
            (0..peers.len()).all(|index| !peer(status, index, "/check/last").is_null())
        });
        for (index, (_, last, state)) in peers.iter().enumerate() {
            assert_eq!(peer(&status, index, "/check/last"), *last, "peer {index}");
            assert_eq!(peer(&status, index, "/state"), *state, "peer {index}");
        }
        // It would talk for the whole timeout if it were let.
        assert!(endless.result() < crate::harness::patient(Duration::from_millis(2500)));
        must_say_times(&proxy, "checks in a row failed", 7);
        proxy.must_say("it answered \"-ERR\\r\\n\"");
    }
}

/// How many checks come within a time, and how many there would be if each came in time.
fn rate(times: &Mutex<Vec<Instant>>, limit: Duration, mut meanwhile: impl FnMut()) -> (usize, usize) {
    let begun = Instant::now();
    let before = times.lock().expect("the times").len();
    while begun.elapsed() < limit {
        meanwhile();
    }
    let seen = times.lock().expect("the times").len() - before;
    (seen, (begun.elapsed().as_millis() / 100) as usize)
}

#[test]
fn all_workers_are_one_checker_also_while_they_are_killed_and_replaced() {
    let times = Arc::new(Mutex::new(Vec::new()));
    let peers = [counted(&times)];
    let check = "check = { interval = \"100ms\", timeout = \"1s\" }";
    let lines = [at(peers[0].address, "")];
    let mut plan = Plan::new().workers(4).tables(&group(&lines, check));
    plan.server("group");
    let proxy = plan.start();
    let nothing = || std::thread::sleep(Duration::from_millis(20));

    let (seen, due) = rate(&times, Duration::from_secs(3), nothing);
    assert!(
        (due / 2..=due + 2).contains(&seen),
        "{seen} checks, {due} were due"
    );

    let (seen, due) = rate(&times, Duration::from_secs(4), || {
        let workers = proxy.status().workers();
        for worker in workers.iter().take(3) {
            let _ = kill(Pid::from_raw(worker.pid), Signal::SIGKILL);
            std::thread::sleep(Duration::from_millis(70));
        }
    });
    // Nobody checks while all wait to be replaced.
    assert!(
        (due / 8..=due + 2).contains(&seen),
        "{seen} checks, {due} were due, while workers were killed"
    );

    proxy.wait("all workers are back", |s| s.workers().len() == 4);
    let (seen, due) = rate(&times, Duration::from_secs(4), || {
        proxy.reload();
    });
    // Nobody checks between two generations, and on a busy machine a reload takes long (12 of 40 were seen).
    assert!(
        (due / 8..=due + 2).contains(&seen),
        "{seen} checks, {due} were due, while generations changed"
    );
    let status = proxy.status();
    assert_eq!(peer(&status, 0, "/check/failed"), 0, "{:#}", status.json());
    assert_eq!(status.number("/sessions/total"), 0, "a check is no session");
}

#[test]
fn what_checks_found_outlives_reloads_and_workers() {
    let (claim, two) = (Port::claim(), greeter(2));
    let address = claim.on("127.0.0.1");
    let lines = [at(address, ""), at(two.address, "")];
    let check = "check = { interval = \"1h\" }";
    let mut plan = Plan::new().workers(2).tables(&group(&lines, check));
    let front = plan.server("group");
    let proxy = plan.start();
    wait_for_state(&proxy, 0, "unhealthy");
    let _one = greeter_on(address, 1);
    assert_eq!(names(front, 4), [2; 4]);
    proxy.reload();
    assert_eq!(names(front, 4), [2; 4]);
    let old = proxy.wait("the old workers are gone", |s| {
        s.workers().len() == 2 && s.workers().iter().all(|w| !w.draining)
    });
    let before: Vec<i32> = old.workers().iter().map(|w| w.pid).collect();
    for worker in &before {
        kill(Pid::from_raw(*worker), Signal::SIGKILL).expect("killing a worker");
    }
    proxy.wait("other workers serve", |s| {
        s.workers().len() == 2 && s.workers().iter().all(|w| !before.contains(&w.pid))
    });
    assert_eq!(names(front, 4), [2; 4]);
    // A shorter interval counts from now on, not from the end of the longer one.
    proxy.edit("\"1h\"", "\"100ms\"");
    proxy.reload();
    wait_for_state(&proxy, 0, "up");
    assert!(names(front, 4).contains(&1));
}

#[test]
fn a_check_that_a_reload_takes_away_keeps_nobody_down() {
    let (one, two) = (greeter(1), greeter(2));
    let lines = [at(one.address, ""), at(two.address, ", backup = true")];
    let check = "check = { interval = \"50ms\", expect = \"\\\\x02\" }";
    let mut plan = Plan::new().workers(2).tables(&group(&lines, check));
    let front = plan.server("group");
    let proxy = plan.start();
    // The first one says something else, and the backup is checked too.
    wait_for_state(&proxy, 0, "unhealthy");
    proxy.wait("the backup was checked", |s| {
        peer(s, 1, "/check/passed").as_u64() >= Some(1)
    });
    assert_eq!(names(front, 4), [2; 4]);
    proxy.edit(check, "");
    let status = proxy.reload();
    assert_eq!(peer(&status, 0, "/state"), "up");
    assert!(peer(&status, 0, "/check").is_null());
    assert_eq!(names(front, 4), [1; 4]);
    proxy.edit("backup = true", "down = true");
    proxy.edit("server = [", "check = { interval = \"50ms\" }\nserver = [");
    proxy.reload();
    let status = proxy.wait("the first was checked", |s| peer(s, 0, "/check/last") == "passed");
    assert_eq!(peer(&status, 1, "/state"), "down");
    assert!(
        peer(&status, 1, "/check").is_null(),
        "who is down for good is not checked"
    );
}

#[test]
fn a_lone_peer_whose_check_fails_gets_nothing_and_the_check_may_go_to_another_port() {
    let (claim, one) = (Port::claim(), greeter(1));
    let health = claim.on("127.0.0.1");
    let check = format!("check = {{ interval = \"50ms\", port = {} }}", health.port());
    let mut plan = Plan::new().tables(&group(&[at(one.address, "")], &check));
    let front = plan.server("group");
    let proxy = plan.start();
    wait_for_state(&proxy, 0, "unhealthy");
    assert!(visit(front).is_none());
    assert_eq!(peer(&proxy.status(), 0, "/connected"), 0);
    let _health = greeter_on(health, 9);
    wait_for_state(&proxy, 0, "up");
    assert_eq!(names(front, 2), [1; 2]);
}
