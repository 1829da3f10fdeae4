//! The master keeps no more sessions than it has descriptors for, and where descriptors are missing all the same, each
//! session goes on or is reset at both ends, and nobody else suffers.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::harness::pattern::{pause, ping};
use crate::harness::program::{need, run};
use crate::harness::{Front, PATIENCE, Plan, Proxy, Upstream, connect, patient, process, within};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Once as many are kept as should be: in that time others would be, too.
const MORE_WOULD_BE_KEPT_MS: u64 = 1500;

/// Client and upstream.
type Pair = (TcpStream, TcpStream);

/// A byte each way.
fn speaks((client, server): &mut Pair) -> std::io::Result<()> {
    let mut byte = [0];
    client.write_all(b"?")?;
    server.read_exact(&mut byte)?;
    server.write_all(b"!")?;
    client.read_exact(&mut byte)
}

#[track_caller]
fn all_speak(pairs: &mut [Pair]) {
    for (number, pair) in pairs.iter_mut().enumerate() {
        speaks(pair).unwrap_or_else(|error| panic!("session {number}: {error}"));
    }
}

/// Whether a session was reset at both ends, which must be the same at both.
#[track_caller]
fn is_reset((client, server): &mut Pair) -> bool {
    let look = |stream: &mut TcpStream| {
        stream
            .set_nonblocking(true)
            .expect("a socket that does not block");
        let read = stream.read(&mut [0]).map_err(|error| error.kind());
        stream.set_nonblocking(false).expect("a socket that blocks");
        match read {
            Err(ErrorKind::WouldBlock) => false,
            Err(ErrorKind::ConnectionReset) => true,
            other => panic!("neither open nor reset: {other:?}"),
        }
    };
    let ends = [look(client), look(server)];
    assert_eq!(ends[0], ends[1], "client and upstream: only one is reset");
    ends[0]
}

/// Waits until so many were reset, and takes them out; the others go on.
#[track_caller]
fn bury(proxy: &Proxy, pairs: &mut Vec<Pair>, reset: u64) {
    proxy.wait("they are counted", |s| s.number("/closes/worker_died") == reset);
    pause(200);
    let before = pairs.len();
    pairs.retain_mut(|pair| !is_reset(pair));
    assert_eq!(before - pairs.len(), reset as usize, "{}", proxy.log());
    all_speak(pairs);
}

fn open(front: &Front, count: usize) -> Vec<Pair> {
    (0..count).map(|_| front.open()).collect()
}

fn pids(proxy: &Proxy) -> Vec<i32> {
    proxy.status().workers().iter().map(|w| w.pid).collect()
}

fn tell(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).expect("signalling a worker");
}

/// The numbers of open descriptors.
fn numbers(pid: i32) -> BTreeSet<u64> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("a process");
    let names = entries.flatten().map(|entry| entry.file_name());
    names.filter_map(|name| name.to_str()?.parse().ok()).collect()
}

/// Sets a running process's own limit on descriptors.
fn limit(pid: i32, soft: u64) {
    let mut command = Command::new(need("prlimit", "util-linux"));
    command
        .arg(format!("--pid={pid}"))
        .arg(format!("--nofile={soft}:"));
    run(command, Duration::from_secs(10)).must_succeed("prlimit");
}

/// Leaves a process room for so many descriptors more; says how to take that back.
pub fn leave_room_for(pid: i32, more: u64) -> u64 {
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).expect("its limits");
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"));
    let soft = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    let open = numbers(pid);
    let free = |limit: u64| limit - open.range(..limit).count() as u64;
    let tight = (0..).find(|limit| free(*limit) == more).expect("a limit");
    limit(pid, tight);
    soft.expect("the limit")
}

fn kept(proxy: &Proxy) -> u64 {
    proxy.status().number("/sessions/kept")
}

/// Waits until so many are kept; how many are a while later.
#[track_caller]
fn kept_once_there_are(proxy: &Proxy, least: u64) -> u64 {
    proxy.wait("as many are kept as should be", |s| {
        s.number("/sessions/kept") >= least
    });
    pause(MORE_WOULD_BE_KEPT_MS);
    kept(proxy)
}

#[test]
fn the_master_is_given_no_more_sessions_than_it_has_descriptors_for() {
    const LIMIT: u64 = 400;
    const SESSIONS: usize = 200;
    need("setpriv", "util-linux");
    let mut plan = Plan::new()
        .workers(2)
        .global("worker_connections = 150")
        .launched_by(&[
            "setpriv",
            "--bounding-set=-sys_resource",
            "--",
            "prlimit",
            &format!("--nofile={LIMIT}"),
        ]);
    let front = Front::new(&mut plan, "127.0.0.1", "");
    let proxy = plan.start();
    let log = proxy.log();
    let said = log
        .split_once(" only ")
        .and_then(|(_, rest)| rest.split_once(" can outlive"));
    let room: u64 = said
        .and_then(|(room, _)| room.parse().ok())
        .expect("what there is room for");
    assert!(room > 50 && room < SESSIONS as u64 * 3 / 4, "{room}");
    let old = pids(&proxy);

    // All at once: both workers give theirs away at the same moment.
    let mut pairs = open(&front, SESSIONS);
    // One may be refused while another asks.
    let now_kept = kept_once_there_are(&proxy, room - 2);
    all_speak(&mut pairs);
    assert!((room - 2..=room).contains(&now_kept), "{now_kept} of {room}");
    let open_in_master = process::descriptors(proxy.pid()).len() as u64;
    assert!(
        open_in_master + 64 < LIMIT,
        "nothing is left: {open_in_master} are open"
    );

    // What cannot be kept stays where it is.
    proxy.reload();
    proxy.wait("the others are adopted", |s| {
        s.number("/sessions/adopted") >= now_kept
    });
    all_speak(&mut pairs);
    let log = proxy.log();
    assert!(
        !log.contains("the master is gone") && !log.contains("are missing"),
        "{log}"
    );
    assert_eq!(proxy.status().number("/sessions/unkept"), 0);
    assert!(old.iter().any(|&pid| process::is_alive(pid)), "{log}");

    let adopted = proxy.status().number("/sessions/adopted");
    assert!(kept(&proxy) <= room);
    old.iter()
        .filter(|&&pid| process::is_alive(pid))
        .for_each(|&pid| tell(pid, Signal::SIGKILL));
    bury(&proxy, &mut pairs, SESSIONS as u64 - adopted);
    pids(&proxy).iter().for_each(|&pid| tell(pid, Signal::SIGKILL));
    proxy.wait("the rest outlives it", |s| {
        s.number("/sessions/adopted") == 2 * adopted
    });
    all_speak(&mut pairs);

    // Room comes back.
    drop(pairs);
    proxy.settle();
    assert!(within(PATIENCE, || kept(&proxy) == 0));
    let mut pairs = open(&front, 100);
    let now_kept = kept_once_there_are(&proxy, room.min(100) - 2);
    assert!(
        (room.min(100) - 2..=room).contains(&now_kept),
        "{now_kept} of {room}"
    );
    all_speak(&mut pairs);
}

#[test]
fn sessions_whose_sockets_do_not_reach_the_master_end_with_their_worker_and_disturb_nobody() {
    const SESSIONS: u64 = 60;
    const ARRIVE: u64 = 20;
    let mut plan = Plan::new();
    let front = Front::new(&mut plan, "127.0.0.1", "");
    let proxy = plan.start();
    let (master, worker) = (proxy.pid(), proxy.worker());
    let before = numbers(master).len() as u64;
    // One that comes alone is of no use to anybody.
    let enough = leave_room_for(master, 2 * ARRIVE + 1);
    let mut pairs = open(&front, SESSIONS as usize);
    let status = proxy.wait("the master has heard of all", |s| {
        s.number("/sessions/kept") + s.number("/sessions/unkept") == SESSIONS
    });
    assert_eq!(status.number("/sessions/kept"), ARRIVE, "{}", proxy.log());
    all_speak(&mut pairs);
    assert_eq!(numbers(master).len() as u64, before + 2 * ARRIVE);
    proxy.must_say("are not kept and end with it");
    limit(master, enough);

    // The worker serves on, and hands over what it can.
    assert_eq!(proxy.worker(), worker);
    let mut late = open(&front, 1);
    assert_eq!(kept_once_there_are(&proxy, ARRIVE + 1), ARRIVE + 1);
    all_speak(&mut late);
    pairs.append(&mut late);
    proxy.reload();
    bury(&proxy, &mut pairs, SESSIONS - ARRIVE);
    proxy.must_say("has let go of are reset: they were not kept");
    let log = proxy.log();
    assert!(!log.contains("the master is gone"), "{log}");
    tell(proxy.worker(), Signal::SIGKILL);
    proxy.wait("the rest outlives it", |s| {
        s.number("/sessions/adopted") == 2 * (ARRIVE + 1)
    });
    all_speak(&mut pairs);

    drop(pairs);
    proxy.settle();
    let least = || numbers(master).len() as u64 <= before;
    assert!(within(PATIENCE, least), "{:?}", process::descriptors(master));
    assert_eq!(kept(&proxy), 0);
}

#[test]
fn sessions_whose_sockets_do_not_reach_the_worker_that_adopts_them_are_reset_and_it_serves_on() {
    const SESSIONS: u64 = 40;
    let mut plan = Plan::new();
    let front = Front::new(&mut plan, "127.0.0.1", "");
    let proxy = plan.start();
    let old = proxy.worker();
    let mut pairs = open(&front, SESSIONS as usize);
    proxy.wait("all are kept", |s| s.number("/sessions/kept") == SESSIONS);
    // The new worker has its limit before it is given anything.
    tell(old, Signal::SIGSTOP);
    proxy.signal(Signal::SIGHUP);
    let switched = || proxy.log().contains("generation 2 serves");
    assert!(within(PATIENCE, switched), "{}", proxy.log());
    let new = process::children(proxy.pid());
    let new = new.into_iter().find(|pid| *pid != old).expect("a new worker");
    let enough = leave_room_for(new, 21);
    tell(old, Signal::SIGCONT);
    let missing = || proxy.log().contains("left are reset: their sockets are missing");
    assert!(within(PATIENCE, missing), "{}", proxy.log());
    limit(new, enough);

    let status = proxy.wait("all are adopted or counted", |s| {
        s.number("/sessions/adopted") + s.number("/closes/worker_died") == SESSIONS
    });
    assert_eq!(status.number("/sessions/adopted"), 10, "{}", proxy.log());
    bury(&proxy, &mut pairs, SESSIONS - 10);
    assert!(within(PATIENCE, || !process::is_alive(old)), "{}", proxy.log());
    assert!(!proxy.log().contains("draining"), "{}", proxy.log());
    assert_eq!(proxy.worker(), new);
    all_speak(&mut open(&front, 3));
    proxy.wait("the master has closed the others", |s| {
        (s.number("/sessions/kept"), s.active()) == (10, 10)
    });
    drop(pairs);
    proxy.settle();
    assert!(within(PATIENCE, || kept(&proxy) == 0));
}

#[test]
fn listeners_of_a_worker_without_descriptors_try_again_twice_a_second_however_many_they_are() {
    const LISTENERS: usize = 7;
    const GAP_MS: u64 = 300;
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new();
    let fronts: Vec<_> = (0..LISTENERS).map(|_| plan.server(&echo)).collect();
    let proxy = plan.start();
    let worker = proxy.worker();
    let enough = leave_room_for(worker, 0);
    let begun = Instant::now();
    let mut clients = Vec::new();
    for front in &fronts {
        clients.push(connect(*front));
        pause(GAP_MS);
    }
    let first = format!("failed to accept on {}: ", fronts[0]);
    let tries = || proxy.log().matches(&first).count();
    assert!(within(PATIENCE, || tries() >= 3), "{}", proxy.log());
    // Each of the others has found no descriptor while the first one rested.
    let (tries, most) = (tries(), 2 + begun.elapsed().as_millis() as usize / 500);
    assert!(tries <= most, "{tries} tries: {}", proxy.log());
    limit(worker, enough);
    let begun = Instant::now();
    for client in &mut clients {
        ping(client, 1, 1).expect("a session, once there are descriptors");
    }
    assert!(
        begun.elapsed() < patient(Duration::from_millis(2500)),
        "{:?}",
        begun.elapsed()
    );
}
