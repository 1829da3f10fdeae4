//! Sessions that wait for a place at a group whose peers are full: in order of arrival over all workers, at most so
//! many, at most so long.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::harness::sockets::try_connect;
use crate::harness::{PATIENCE, Plan, Proxy, Status, Upstream, connect, within};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// What a peer has seen.
#[derive(Debug, Default)]
struct Seen {
    now: AtomicUsize,
    most: AtomicUsize,
    /// The first byte of each connection, in order.
    order: Mutex<Vec<u8>>,
}

/// A peer that reads one byte, sends it back, and keeps the connection until its client ends it.
fn peer(seen: &Arc<Seen>) -> Upstream<()> {
    let seen = Arc::clone(seen);
    Upstream::serve("127.0.0.1", move |mut stream| {
        let now = 1 + seen.now.fetch_add(1, Ordering::SeqCst);
        seen.most.fetch_max(now, Ordering::SeqCst);
        let mut name = [0u8];
        if stream.read_exact(&mut name).is_ok() {
            seen.order.lock().expect("the order").push(name[0]);
            let _ = stream.write_all(&name);
            let _ = stream.read_to_end(&mut Vec::new());
        }
        // Before its own end is sent, which frees the place.
        seen.now.fetch_sub(1, Ordering::SeqCst);
    })
}

fn group(address: SocketAddr, max_conns: u32, queue: &str) -> String {
    format!(
        "[[upstream]]\nname = \"group\"\nserver = [{{ address = \"{address}\", max_conns = {max_conns} }}]\n{queue}\n"
    )
}

/// A peer that takes so many sessions at once, and a proxy with a queue before it.
fn behind_a_queue(workers: usize, places: u32, queue: &str) -> (Arc<Seen>, Upstream<()>, Proxy, SocketAddr) {
    let seen = Arc::new(Seen::default());
    let upstream = peer(&seen);
    let table = group(upstream.address, places, queue);
    let mut plan = Plan::new().workers(workers).tables(&table);
    let front = plan.server("group");
    let proxy = plan.start();
    (seen, upstream, proxy, front)
}

/// Connects and says its name at once.
fn come(front: SocketAddr, name: u8) -> TcpStream {
    let mut stream = connect(front);
    stream
        .set_read_timeout(Some(PATIENCE))
        .expect("setting a timeout");
    stream.write_all(&[name]).expect("saying a name");
    stream
}

/// Whether the peer has answered; waits for it.
fn is_served(stream: &mut TcpStream, name: u8) -> bool {
    let mut answer = [0u8];
    stream.read_exact(&mut answer).is_ok() && answer[0] == name
}

/// The place of `first`, whose name is 0, goes to all who wait, one after the other as they came.
#[track_caller]
fn must_be_served_in_order(first: TcpStream, clients: Vec<(TcpStream, u8)>, seen: &Seen) {
    let names: Vec<u8> = std::iter::once(0)
        .chain(clients.iter().map(|(_, name)| *name))
        .collect();
    drop(first);
    for (mut client, name) in clients {
        assert!(is_served(&mut client, name), "{name}");
    }
    assert_eq!(*seen.order.lock().expect("the order"), names);
    assert_eq!(seen.most.load(Ordering::SeqCst), 1);
}

fn queue(status: &Status, key: &str) -> u64 {
    let upstreams = status.json()["upstreams"].as_array().expect("upstreams");
    let group = upstreams.iter().find(|group| group["name"] == "group");
    let queue = &group.expect("the group")["queue"];
    queue[key].as_u64().unwrap_or_else(|| panic!("no {key}: {queue}"))
}

fn wait_for_waiting(proxy: &Proxy, count: u64) -> Status {
    proxy.wait(&format!("{count} sessions wait"), |s| {
        queue(s, "waiting") == count
    })
}

#[test]
fn places_go_to_those_who_have_waited_longest_over_all_workers() {
    let (seen, _upstream, proxy, front) = behind_a_queue(4, 2, "queue = { size = 100 }");
    let mut clients: Vec<(TcpStream, u8)> = Vec::new();
    for name in 0..20 {
        let mut client = come(front, name);
        if name < 2 {
            assert!(is_served(&mut client, name));
        } else {
            wait_for_waiting(&proxy, u64::from(name) - 1);
        }
        clients.push((client, name));
    }
    let workers = proxy.status().workers();
    let busy = workers.iter().filter(|worker| worker.sessions > 0).count();
    assert!(busy > 1, "all wait at one worker: {workers:?}");
    let mut took = Vec::new();
    // One place at a time: of two at once nobody could say which the peer saw first.
    let mut places: std::collections::VecDeque<TcpStream> = std::collections::VecDeque::new();
    for (mut client, name) in clients {
        if name >= 2 {
            drop(places.pop_front());
            let begun = Instant::now();
            assert!(is_served(&mut client, name), "{name}");
            took.push(begun.elapsed());
        }
        places.push_back(client);
    }
    drop(places);
    let expected: Vec<u8> = (0..20).collect();
    assert_eq!(*seen.order.lock().expect("the order"), expected);
    assert_eq!(seen.most.load(Ordering::SeqCst), 2);
    let status = proxy.settle();
    assert_eq!((queue(&status, "queued"), queue(&status, "waiting")), (18, 0));
    assert_eq!(queue(&status, "timed_out") + queue(&status, "overflowed"), 0);
    assert!(status.sockmap().sum() > 0, "the kernel carried nothing");
    // Whoever frees a place wakes the one whose turn it is; where each looks ten times a second, most wait for that, and
    // longer than those for whom there is a place.
    let straight = (0..18u8).map(|name| {
        let begun = Instant::now();
        assert!(is_served(&mut come(front, name), name), "{name}");
        let took = begun.elapsed();
        proxy.settle();
        took
    });
    let [waited, straight] = [took, straight.collect()].map(median);
    assert!(
        waited < crate::harness::patient(Duration::from_millis(30)) + 2 * straight,
        "{waited:?} where others waited, {straight:?} where nobody did"
    );
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

#[test]
fn no_more_wait_than_size_and_none_longer_than_timeout() {
    let (seen, _upstream, proxy, front) = behind_a_queue(3, 1, "queue = { size = 2, timeout = \"3s\" }");
    let mut first = come(front, 1);
    assert!(is_served(&mut first, 1));
    let begun = Instant::now();
    let mut second = come(front, 2);
    let mut third = come(front, 3);
    wait_for_waiting(&proxy, 2);
    // It may be reset before its connect has looked.
    if let Ok(mut fourth) = try_connect(front) {
        let _ = fourth.write_all(&[4]);
        assert!(!is_served(&mut fourth, 4));
    }
    assert!(begun.elapsed() < Duration::from_millis(2800), "it was told late");
    assert!(!is_served(&mut second, 2) && !is_served(&mut third, 3));
    let waited = begun.elapsed();
    assert!(waited >= Duration::from_millis(2950), "{waited:?}");
    assert!(
        waited < crate::harness::patient(Duration::from_secs(15)),
        "{waited:?}"
    );
    let status = wait_for_waiting(&proxy, 0);
    assert_eq!(
        (queue(&status, "timed_out"), queue(&status, "overflowed")),
        (2, 1)
    );
    assert_eq!(*seen.order.lock().expect("the order"), [1]);
    // The place is free for who comes next.
    drop(first);
    let mut fifth = come(front, 5);
    assert!(is_served(&mut fifth, 5));
}

#[test]
fn a_client_that_hangs_up_waits_no_more_but_one_that_has_only_ended_its_stream_does() {
    let (_seen, _upstream, proxy, front) = behind_a_queue(2, 1, "queue = { size = 9 }");
    let mut first = come(front, 1);
    assert!(is_served(&mut first, 1));
    let hasty = connect(front);
    wait_for_waiting(&proxy, 1);
    let mut brief = come(front, 3);
    wait_for_waiting(&proxy, 2);
    drop(hasty);
    wait_for_waiting(&proxy, 1);
    brief
        .shutdown(std::net::Shutdown::Write)
        .expect("ending the stream");
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(queue(&proxy.status(), "waiting"), 1);
    drop(first);
    assert!(is_served(&mut brief, 3));
    let status = proxy.settle();
    assert_eq!(status.number("/closes/downstream_left_connecting"), 1);
}

#[test]
fn a_workers_death_takes_its_tickets_along_and_nobody_elses() {
    let (seen, _upstream, proxy, front) = behind_a_queue(2, 1, "queue = { size = 99 }");
    let mut first = come(front, 200);
    assert!(is_served(&mut first, 200));
    let begun = Instant::now();
    let holder = proxy.wait("one worker has it", |s| {
        s.workers().iter().any(|w| w.sessions == 1)
    });
    let holder = holder.workers().iter().find(|w| w.sessions == 1).map(|w| w.pid);
    let holder = holder.expect("the worker that has the first session");
    let mut clients: Vec<(TcpStream, u8)> = Vec::new();
    let both_wait = |s: &Status| {
        s.workers()
            .iter()
            .all(|w| w.sessions > u64::from(w.pid == holder))
    };
    while clients.len() < 6 || !both_wait(&proxy.status()) {
        let name = clients.len() as u8;
        assert!(name < 90, "all come to one worker");
        clients.push((come(front, name), name));
        wait_for_waiting(&proxy, u64::from(name) + 1);
    }
    let workers = proxy.status().workers();
    let (holder, victim) = match workers[0].pid == holder {
        true => (&workers[0], &workers[1]),
        false => (&workers[1], &workers[0]),
    };
    kill(Pid::from_raw(victim.pid), Signal::SIGKILL).expect("killing");
    // None is kept before it is a second old.
    let young = begun.elapsed() < Duration::from_millis(900);
    proxy.wait("another one serves", |s| {
        let workers = s.workers();
        workers.len() == 2 && workers.iter().all(|w| w.pid != victim.pid)
    });
    let left = holder.sessions - 1;
    drop(first);
    let mut served = Vec::new();
    for (mut client, name) in clients {
        if is_served(&mut client, name) {
            served.push(name);
        }
    }
    // Those that the dead worker had for long are kept.
    assert!(served.len() as u64 >= left, "{served:?}, {left} at the other one");
    assert!(
        served.len() as u64 == left || !young,
        "{served:?}, {left} at the other one"
    );
    assert!(served.is_sorted(), "{served:?}");
    assert_eq!(seen.most.load(Ordering::SeqCst), 1);
}

#[test]
fn sessions_that_have_waited_for_a_second_outlive_their_workers_deaths_and_keep_their_order() {
    let (seen, _upstream, proxy, front) = behind_a_queue(2, 1, "queue = { size = 99 }");
    let mut first = come(front, 0);
    assert!(is_served(&mut first, 0));
    let mut clients = Vec::new();
    for name in 1..=12 {
        clients.push((come(front, name), name));
        wait_for_waiting(&proxy, u64::from(name));
    }
    proxy.wait("all are kept", |s| s.number("/sessions/kept") == 13);
    for _ in 0..2 {
        for worker in proxy.status().workers() {
            kill(Pid::from_raw(worker.pid), Signal::SIGKILL).expect("killing");
            proxy.wait("another one serves", |s| {
                let workers = s.workers();
                workers.len() == 2 && workers.iter().all(|w| w.pid != worker.pid)
            });
        }
        wait_for_waiting(&proxy, 12);
    }
    must_be_served_in_order(first, clients, &seen);
}

#[test]
fn sessions_that_wait_outlive_a_reload_and_keep_their_order() {
    let (seen, _upstream, proxy, front) = behind_a_queue(2, 1, "queue = { size = 99 }");
    let mut first = come(front, 0);
    assert!(is_served(&mut first, 0));
    let mut clients = Vec::new();
    for name in 1..=8 {
        clients.push((come(front, name), name));
        wait_for_waiting(&proxy, u64::from(name));
        if name == 4 {
            proxy.reload();
            proxy.wait("the old workers are gone, whoever waits", |s| {
                s.workers().len() == 2
            });
            wait_for_waiting(&proxy, 4);
        }
    }
    must_be_served_in_order(first, clients, &seen);
    assert!(within(PATIENCE, || {
        proxy.status().workers().iter().all(|worker| !worker.draining)
    }));
}

#[test]
fn many_short_sessions_never_exceed_the_limit_and_all_are_served() {
    let (seen, _upstream, proxy, front) = behind_a_queue(3, 3, "queue = { size = 1000 }");
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..30u8 {
            scope.spawn(move || {
                for _ in 0..20 {
                    let mut client = come(front, thread);
                    assert!(is_served(&mut client, thread));
                }
            });
        }
    });
    println!("600 sessions through 3 places in {:?}", begun.elapsed());
    assert_eq!(seen.order.lock().expect("the order").len(), 600);
    assert!(
        seen.most.load(Ordering::SeqCst) <= 3,
        "{} at once",
        seen.most.load(Ordering::SeqCst)
    );
    let status = proxy.settle();
    assert!(queue(&status, "queued") > 100, "hardly anybody had to wait");
}
