//! How long it takes a new generation to adopt thousands of resting sessions. `TEST_ADOPT_SESSIONS` says how many.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::harness::load::{KEPT_AFTER, from_environment};
use crate::harness::pattern::fill;
use crate::harness::turns::{alone, beside_others};
use crate::harness::{Flag, Front, PATIENCE, Plan, Proxy, Status, connect, patient, process, within};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Thousands of sessions are adopted in this time, but for what other programs have the processors meanwhile; they may
/// spoil a try or two all the same.
const ADOPTED_WITHIN: Duration = Duration::from_millis(100);
const TRIES: usize = 3;

/// `(process, sessions, milliseconds)` of each line `… PROCESS: adopted N sessions in M ms`.
fn adoptions(log: &str) -> Vec<(i32, u64, f64)> {
    let adopted = log.lines().filter_map(|line| line.split_once(": adopted "));
    let parse = |(begin, rest): (&str, &str)| {
        let (_, process) = begin.rsplit_once(' ')?;
        let (sessions, rest) = rest.split_once(" sessions in ")?;
        let (time, _) = rest.split_once(" ms")?;
        Some((
            process.parse().ok()?,
            sessions.trim().parse().ok()?,
            time.trim().parse().ok()?,
        ))
    };
    adopted.filter_map(parse).collect()
}

/// Each end says something and the other hears it.
fn echo(client: &mut TcpStream, server: &mut TcpStream, seed: u64) -> std::io::Result<()> {
    let mut said = [0u8; 24];
    fill(seed, 0, &mut said);
    let mut heard = [0u8; 24];
    client.write_all(&said)?;
    server.read_exact(&mut heard)?;
    server.write_all(&heard)?;
    client.read_exact(&mut heard)?;
    if heard != said {
        return Err(std::io::Error::other("the echo differs from what was sent"));
    }
    Ok(())
}

/// Opens sessions, some at a time, because upstreams see them in another order than clients.
#[track_caller]
fn open_some(front: &Front, open: &mut Vec<(TcpStream, TcpStream)>, count: u64) {
    let client = |number: u64| {
        let mut client = connect(front.address);
        client.write_all(&number.to_le_bytes()).expect("naming a session");
        Some(client)
    };
    let mut clients: Vec<Option<TcpStream>> = (0..count).map(client).collect();
    for _ in 0..count {
        let mut server = front.accept();
        let mut number = [0; 8];
        server.read_exact(&mut number).expect("a session's name");
        let number = u64::from_le_bytes(number) as usize;
        let client = clients.get_mut(number).and_then(Option::take);
        open.push((client.expect("a client of that name"), server));
    }
}

#[track_caller]
fn all_echo(sessions: &mut [(TcpStream, TcpStream)], round: u64) {
    let mut failed = Vec::new();
    for (number, (client, server)) in sessions.iter_mut().enumerate() {
        if let Err(e) = echo(client, server, round * 100_000 + number as u64) {
            failed.push(format!("{number}: {e}"));
        }
    }
    failed.truncate(20);
    assert!(
        failed.is_empty(),
        "round {round}: sessions do not echo: {failed:?}"
    );
}

/// Reloads, and returns the slowest worker's time when all sessions have been adopted.
#[track_caller]
fn reload_and_measure(proxy: &Proxy, sessions: u64) -> Duration {
    let lines = adoptions(&proxy.log()).len();
    let old: Vec<i32> = proxy.status().workers().iter().map(|w| w.pid).collect();
    let start = Instant::now();
    proxy.reload();
    let mut fresh = Vec::new();
    let adopted = within(PATIENCE, || {
        fresh = adoptions(&proxy.log()).split_off(lines);
        fresh.iter().map(|(_, count, _)| count).sum::<u64>() == sessions
    });
    assert!(
        adopted,
        "of {sessions} sessions, as the workers say (process, sessions, milliseconds): {fresh:?}"
    );
    let took = start.elapsed();
    let gone = within(Duration::from_secs(5), || {
        !old.iter().any(|&pid| process::is_alive(pid))
    });
    assert!(gone, "old workers live on: {old:?}");
    proxy.wait("all of them are counted again", |s| {
        s.active() == sessions && s.offloaded() == sessions
    });
    let own_time = |(process, _, milliseconds): &(i32, u64, f64)| {
        let time = Duration::from_secs_f64(milliseconds / 1000.0);
        time.saturating_sub(process::waited_for_a_processor(*process))
    };
    let slowest = fresh.iter().map(own_time).max().unwrap_or_default();
    eprintln!(
        "adopted {fresh:?} (process, sessions, ms), {slowest:?} without waiting for a processor; the reload took {took:?}"
    );
    slowest
}

#[test]
fn thousands_of_resting_sessions_are_adopted_at_once_and_each_goes_on() {
    let _alone = alone();
    let sessions = from_environment("TEST_ADOPT_SESSIONS", 5000);
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("the limit of descriptors");
    assert!(
        hard > 2 * sessions + 500,
        "{sessions} sessions need {} descriptors in one process; the hard limit is {hard}",
        2 * sessions + 500
    );
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("raising the limit of descriptors");
    let mut plan = Plan::new()
        .workers(2)
        .lifetime(Duration::from_secs(120))
        .global(&format!("worker_connections = {}", sessions + 200))
        .global("error_log = { path = \"stderr\", level = \"info\" }");
    let front = Front::new(&mut plan, "127.0.0.1", "");
    let proxy = plan.start();
    let mut open = Vec::new();
    while (open.len() as u64) < sessions {
        let missing = sessions - open.len() as u64;
        open_some(&front, &mut open, missing.min(100));
    }
    all_echo(&mut open, 0);
    proxy.wait("all are offloaded", |s| s.offloaded() == sessions);
    std::thread::sleep(patient(KEPT_AFTER));

    let mut times = Vec::new();
    while times.len() < TRIES && !times.iter().any(|time| *time < patient(ADOPTED_WITHIN)) {
        times.push(reload_and_measure(&proxy, sessions));
        all_echo(&mut open, times.len() as u64);
    }
    assert!(
        times.iter().any(|time| *time < patient(ADOPTED_WITHIN)),
        "adopting {sessions} sessions took {times:?}"
    );
    let status = proxy.status();
    assert_eq!(status.relay().sum(), 0, "user space has copied bytes");
    assert_eq!(
        status.sockmap().sum(),
        sessions * (8 + 2 * 24 * (1 + times.len() as u64)),
        "carried by the kernel"
    );
    drop(open);
    proxy.settle();
    let (mut client, mut server) = front.open();
    echo(&mut client, &mut server, 1).expect("a new session");
}

#[test]
fn sessions_that_move_are_counted_all_the_while() {
    let _beside = beside_others();
    const SESSIONS: u64 = 1000;
    let mut plan = Plan::new()
        .workers(2)
        .global(&format!("worker_connections = {}", 2 * SESSIONS));
    let front = Front::new(&mut plan, "127.0.0.1", "");
    let proxy = plan.start();
    let mut open = Vec::new();
    while (open.len() as u64) < SESSIONS {
        open_some(&front, &mut open, 100);
    }
    proxy.wait("all are offloaded", |s| s.offloaded() == SESSIONS);
    let (over, asked, address) = (Flag::default(), AtomicU32::new(0), proxy.status_address());
    let least = std::thread::scope(|scope| {
        let _over = over.raise_at_the_end();
        let watcher = scope.spawn(|| {
            let mut least = [u64::MAX; 3];
            while !over.is_up() {
                if let Ok(status) = Status::fetch(address) {
                    let now = [
                        status.active(),
                        status.offloaded(),
                        status.number("/listeners/0/active"),
                    ];
                    least = [0, 1, 2].map(|at| least[at].min(now[at]));
                    asked.fetch_add(1, Ordering::Relaxed);
                }
            }
            least
        });
        let mut reloads = 0;
        while reloads < 6 || asked.load(Ordering::Relaxed) < 100 {
            proxy.reload();
            std::thread::sleep(Duration::from_millis(50));
            reloads += 1;
        }
        over.raise();
        watcher.join().expect("the watcher")
    });
    assert_eq!(least, [SESSIONS; 3], "active, offloaded, of the listener");
    proxy.wait("none is counted twice", |s| {
        s.active() == SESSIONS && s.offloaded() == SESSIONS
    });
    drop(open);
    proxy.settle();
}
