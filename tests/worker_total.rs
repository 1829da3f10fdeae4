//! Many readers that stand still at once: what the kernel holds for all sessions of a worker stays within
//! `worker_backlog_size`, nobody starves for it, and nothing is lost.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use crate::harness::pattern::{pause, ping, receive_from};
use crate::harness::process::voluntary_switches;
use crate::harness::slow::{
    DOWN, MIB, PIECE, UP, finish, must_be_sound, must_have_stayed_in_the_kernel, standstill,
};
use crate::harness::sockets::reset;
use crate::harness::turns::beside_others;
use crate::harness::{Ending, Front, PATIENCE, Plan, Proxy, Status, Towards, Writer, memory, send, within};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::RcvBuf;
use nix::unistd::Pid;

/// What a flow may always have outstanding.
const FLOOR: u64 = 64 * 1024;
/// What a source may gather however many are held back: a few segments, which are of 64 KiB over loopback, twice.
const WINDOW: u64 = 512 * 1024;
/// Since when the kernel tells a socket's window (tcpi_rcv_wnd). On an older one a source keeps the buffer that it has
/// grown, because it cannot be seen when it may shrink.
const TELLS_WINDOWS: (u32, u32) = (6, 2);
/// What the readers' own sockets take before anybody reads: outside of the proxy, and acknowledged.
const READERS_BUFFER: u64 = 128 * 1024;

fn proxy_of(total: &str) -> (Proxy, Front) {
    let mut plan = Plan::new()
        .global(&format!("worker_backlog_size = \"{total}\""))
        .lifetime(standstill() + Duration::from_secs(120));
    let front = Front::new(&mut plan, "127.0.0.1", "");
    (plan.start(), front)
}

struct Held {
    writing: TcpStream,
    reading: TcpStream,
    writer: Writer,
}

/// Sessions, every other one in the other direction, whose writers push as much as they can.
fn push(proxy: &Proxy, front: &Front, sessions: usize, bytes: u64) -> Vec<Held> {
    let one = |number: usize| {
        let (writing, reading) = front.offloaded(proxy, Towards::BOTH[number % 2]);
        // A reader's own buffer does not grow either, so that it is known what it has.
        setsockopt(&reading, RcvBuf, &(READERS_BUFFER as usize / 2)).expect("SO_RCVBUF");
        let writer = Writer::start(&writing, UP, bytes, PIECE);
        Held {
            writing,
            reading,
            writer,
        }
    };
    (0..sessions).map(one).collect()
}

fn held_bytes(status: &Status) -> u64 {
    status.number("/workers/0/backlog_bytes")
}

/// What a source may gather at the most while the worker's total is used up.
fn window() -> u64 {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("the kernel's release");
    let mut numbers = release.split('.').map(|number| number.parse().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= TELLS_WINDOWS {
        return WINDOW;
    }
    // Half of a buffer is for what the kernel keeps beside the bytes.
    memory::largest_receive_buffer() / 2
}

/// Everything arrives, read at the same time.
fn finish_all(sessions: Vec<Held>, from: u64, bytes: u64) {
    let readers: Vec<_> = sessions
        .into_iter()
        .map(
            |Held {
                 writing,
                 reading,
                 writer,
             }| { std::thread::spawn(move || finish(writer, writing, reading, UP, from, bytes)) },
        )
        .collect();
    for (number, reader) in readers.into_iter().enumerate() {
        assert!(reader.join().is_ok(), "session {number} failed");
    }
}

#[test]
fn a_session_that_is_held_back_is_looked_at_by_the_clock_after_a_reload_too() {
    let _beside = beside_others();
    // Less than what a source gathers, so that its buffer is sized by its share.
    let (proxy, front) = proxy_of("4m");
    let Held {
        mut writing,
        mut reading,
        writer,
    } = push(&proxy, &front, 1, 12 * MIB).remove(0);
    proxy.wait("it is held back", |s| s.number("/pauses") > 0);
    assert_eq!(receive_from(&mut reading, UP, 0, 12 * MIB).bytes, 12 * MIB);
    writer.join().expect("writing the first part");
    proxy.wait("it rests, and the master keeps it", |s| {
        held_bytes(s) == 0 && s.number("/sessions/kept") == 1
    });
    let old = proxy.worker();
    let pauses = proxy.reload().number("/pauses");
    proxy.wait("another worker has it", |s| {
        let workers = s.workers();
        workers.len() == 1 && workers[0].pid != old && workers[0].sessions == 1
    });
    let writer = std::thread::spawn(move || send(&mut writing, UP, 12 * MIB, 32 * MIB).map(|()| writing));
    proxy.wait("it is held back again", |s| s.number("/pauses") > pauses);
    pause(500);
    let worker = proxy.worker();
    let before = voluntary_switches(worker);
    pause(2000);
    // Ten times a second, where the processors have nothing else to do.
    let looks = voluntary_switches(worker) - before;
    assert!(looks >= 8, "it was looked at {looks} times");
    assert_eq!(receive_from(&mut reading, UP, 12 * MIB, 32 * MIB).bytes, 20 * MIB);
    let writing = writer.join().expect("the writer").expect("writing the rest");
    drop(writing);
    receive_from(&mut reading, UP, 32 * MIB, u64::MAX).must_be_whole(0);
    drop(reading);
    must_be_sound(&proxy.settle());
}

#[test]
fn sixty_readers_that_stand_still_take_no_more_than_the_workers_total() {
    let _beside = beside_others();
    const SESSIONS: u64 = 60;
    const TOTAL: u64 = 16 * MIB;
    const EACH: u64 = 6 * MIB;
    const STEP: u64 = MIB;
    let (proxy, front) = proxy_of("16m");
    let sessions = push(&proxy, &front, SESSIONS as usize, EACH);
    // Beyond the total each may have its floor, and one that is let go what it has gathered: its share of half
    // the total, or a few segments.
    let slack = SESSIONS * (FLOOR + window()) + TOTAL / 2;
    // What the program counts, and what it must be at the least by what came and what was read.
    let (mut most_held, mut most_inside) = (0, 0);
    let mut watch = |read: u64, time: Duration| {
        let end = Instant::now() + time;
        while Instant::now() < end {
            let status = proxy.status();
            most_held = most_held.max(held_bytes(&status));
            let inside = status
                .sockmap()
                .sum()
                .saturating_sub(read + SESSIONS * READERS_BUFFER);
            most_inside = most_inside.max(inside);
            pause(20);
        }
    };
    watch(0, standstill());
    for round in 0..2 {
        for session in &sessions {
            let got = receive_from(&mut &session.reading, UP, round * STEP, (round + 1) * STEP);
            assert_eq!(
                (got.bytes, got.ending, got.wrong_at),
                (STEP, Ending::Enough, None)
            );
        }
        watch(SESSIONS * (round + 1) * STEP, Duration::from_secs(1));
    }
    eprintln!(
        "of a total of {} MiB: {:.1} MiB counted, {:.1} MiB taken and not read",
        TOTAL / MIB,
        most_held as f64 / MIB as f64,
        most_inside as f64 / MIB as f64
    );
    assert_eq!(proxy.status().number("/workers/0/backlog_limit_bytes"), TOTAL);
    assert!(
        most_held >= TOTAL / 2,
        "the total was never nearly used: {most_held} bytes"
    );
    assert!(most_held <= TOTAL + slack, "{most_held} bytes counted");
    assert!(
        most_inside <= TOTAL + slack,
        "{most_inside} bytes taken and not read"
    );

    finish_all(sessions, 2 * STEP, EACH);
    let status = proxy.settle();
    must_have_stayed_in_the_kernel(&status);
    assert_eq!(held_bytes(&status), 0, "nothing is outstanding any more");
}

#[test]
fn readers_that_stood_still_for_long_are_served_at_once_when_they_read() {
    let _beside = beside_others();
    // A segment that was allowed and dropped is sent again after 0.2, 0.4, ... 3.2 s, and then 6.4 s later: a session
    // that has one is silent for the rest of that.
    const STANDSTILL: Duration = Duration::from_secs(8);
    const SILENCE: Duration = Duration::from_millis(2500);
    const EACH: u64 = 4 * MIB;
    let (proxy, front) = proxy_of("16m");
    let sessions = push(&proxy, &front, 60, EACH);
    std::thread::sleep(STANDSTILL);
    for session in &sessions {
        let silence = crate::harness::patient(SILENCE);
        session
            .reading
            .set_read_timeout(Some(silence))
            .expect("a timeout");
    }
    finish_all(sessions, 0, EACH);
    must_have_stayed_in_the_kernel(&proxy.settle());
}

#[test]
fn a_reader_that_reads_is_served_while_others_use_the_total_up() {
    let _beside = beside_others();
    const EACH: u64 = 8 * MIB;
    const TOTAL: u64 = 40 * MIB;
    let (proxy, front) = proxy_of("4m");
    let sessions = push(&proxy, &front, 12, EACH);
    proxy.wait("the total is used up", |status| held_bytes(status) >= 3 * MIB);
    pause(500);

    let (mut client, upstream) = front.offloaded(&proxy, Towards::Upstream);
    let echo = std::thread::spawn(move || crate::harness::upstream::echo(upstream));
    ping(&mut client, DOWN, 500).expect("500 rounds");
    drop(client);
    echo.join().expect("the echo");

    for towards in Towards::BOTH {
        let (writing, mut reading) = front.offloaded(&proxy, towards);
        let start = Instant::now();
        let writer = Writer::start(&writing, DOWN, TOTAL, PIECE);
        let got = receive_from(&mut reading, DOWN, 0, TOTAL);
        let took = start.elapsed();
        assert_eq!((got.bytes, got.wrong_at), (TOTAL, None), "{towards:?}: {got:?}");
        eprintln!(
            "{towards:?}: {} MiB in {took:?} beside a used up total",
            TOTAL / MIB
        );
        assert!(
            took < crate::harness::patient(Duration::from_secs(15)),
            "{towards:?}: took {took:?}"
        );
        finish(writer, writing, reading, DOWN, TOTAL, TOTAL);
    }
    finish_all(sessions, 0, EACH);
    let status = proxy.settle();
    must_have_stayed_in_the_kernel(&status);
    assert_eq!(held_bytes(&status), 0);
}

#[test]
fn what_sessions_held_is_given_back_when_they_or_their_worker_end() {
    let _beside = beside_others();
    let (proxy, front) = proxy_of("16m");
    let held = |proxy: &Proxy| {
        let sessions = push(proxy, &front, 8, 8 * MIB);
        proxy.wait("bytes are held", |status| held_bytes(status) >= 8 * MIB);
        sessions
    };
    for session in held(&proxy) {
        reset(session.reading);
        let _ = session.writer.join();
    }
    let status = proxy.settle();
    must_be_sound(&status);
    assert_eq!(held_bytes(&status), 0, "the sessions were reset");

    let sessions = held(&proxy);
    let worker = proxy.worker();
    kill(Pid::from_raw(worker), Signal::SIGKILL).expect("killing the worker");
    proxy.wait("the worker was replaced", |status| {
        status
            .workers()
            .iter()
            .any(|other| other.pid > 0 && other.pid != worker)
    });
    for session in sessions {
        drop(session.reading);
        let _ = session.writer.join();
    }
    let given_back = within(PATIENCE, || held_bytes(&proxy.status()) == 0);
    assert!(
        given_back,
        "{} bytes of a dead worker count",
        held_bytes(&proxy.status())
    );
    assert!(
        proxy.status().number("/pauses") > 0,
        "the counter outlives the worker"
    );
}

#[test]
fn without_a_limit_each_session_has_its_own_backlog() {
    let _beside = beside_others();
    const SESSIONS: usize = 12;
    let (proxy, front) = proxy_of("0");
    let sessions = push(&proxy, &front, SESSIONS, 16 * MIB);
    let all = SESSIONS as u64 * 2 * MIB;
    let status = proxy.wait("all have theirs", |status| held_bytes(status) >= all);
    assert_eq!(status.number("/workers/0/backlog_limit_bytes"), 0);
    finish_all(sessions, 0, 16 * MIB);
    must_have_stayed_in_the_kernel(&proxy.settle());
}
