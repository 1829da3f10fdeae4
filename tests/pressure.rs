//! Readers that are slow or stand still: what the kernel holds for them stays bounded, the writer feels it,
//! the session stays with the kernel, and in the end every byte and the true ending arrive, whatever the two
//! ends and the workers do meanwhile.
//!
//! `TEST_PRESSURE_SECONDS` is how long a reader stands still in the tests of memory (5 unless set).

mod harness;

use std::net::{Shutdown, TcpStream};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use harness::pattern::{pause, ping, receive_from};
use harness::sockets::{reset, reset_on_close};
use harness::{Ending, Front, Plan, Proxy, Status, Towards, Writer, memory, process, receive, within};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const UP: u64 = 11;
const DOWN: u64 = 22;
const MIB: u64 = 1024 * 1024;
const PIECE: usize = 64 * 1024;
/// What one session may take of the kernel's memory, whatever its reader does.
const BOUND: u64 = 24 * MIB;
const BACKLOG_DEFAULT: u64 = 4 * MIB;

/// The tests of memory run alone: what they read is the whole machine's.
static MACHINE: RwLock<()> = RwLock::new(());

fn alone() -> RwLockWriteGuard<'static, ()> {
    MACHINE.write().unwrap_or_else(PoisonError::into_inner)
}

fn beside_others() -> RwLockReadGuard<'static, ()> {
    MACHINE.read().unwrap_or_else(PoisonError::into_inner)
}

/// A proxy with one front.
fn proxy_with(ip: &str, stream: &str) -> (Proxy, Front) {
    let mut plan = Plan::new()
        .stream(stream)
        .lifetime(standstill() + Duration::from_secs(60));
    let front = Front::new(&mut plan, ip, "");
    (plan.start(), front)
}

fn standstill() -> Duration {
    let seconds = std::env::var("TEST_PRESSURE_SECONDS").map_or(5, |text| {
        text.parse()
            .expect("TEST_PRESSURE_SECONDS must be a whole number")
    });
    Duration::from_secs(seconds)
}

/// Panics unless nothing was lost, and nearly all went through the kernel.
#[track_caller]
fn must_have_stayed_in_the_kernel(status: &Status) {
    let (sockmap, all) = (status.sockmap().sum(), status.carried().sum());
    assert!(
        sockmap * 100 >= all * 99,
        "{sockmap} of {all} bytes through the kernel"
    );
    must_be_sound(status);
}

#[track_caller]
fn must_be_sound(status: &Status) {
    assert_eq!(
        status.number("/closes/integrity"),
        0,
        "the kernel's counters did not add up"
    );
}

/// Reads the rest of a stream, `from..total`, and only then lets the writer end it: bytes that a source has left
/// when its end arrives while it is held back are copied, and that is not what is looked at.
#[track_caller]
fn finish(writer: Writer, writing: TcpStream, mut reading: TcpStream, seed: u64, from: u64, total: u64) {
    let got = receive_from(&mut reading, seed, from, total);
    assert_eq!(
        (got.bytes, got.ending, got.wrong_at),
        (total - from, Ending::Enough, None)
    );
    writer.join().expect("writing everything");
    writing.shutdown(Shutdown::Write).expect("ending");
    receive_from(&mut reading, seed, total, u64::MAX).must_be_whole(0);
}

/// Fast at first, so that buffers grow, then a reader that stands still while the writer pushes, then the rest.
fn a_reader_stands_still(ip: &str, towards: Towards, first: u64, piece: usize, total: u64) {
    let _alone = alone();
    let (proxy, front) = proxy_with(ip, "");
    let (writing, mut reading) = front.offloaded(&proxy, towards);
    let (tcp, available) = (memory::tcp_bytes(), memory::available_bytes());
    let writer = Writer::start(&writing, UP, total, piece);
    assert_eq!(receive_from(&mut reading, UP, 0, first).bytes, first);

    let (mut most_tcp, mut most_held) = (0, 0);
    let end = Instant::now() + standstill();
    while Instant::now() < end {
        most_tcp = most_tcp.max(memory::tcp_bytes().saturating_sub(tcp));
        most_held = most_held.max(writer.accepted() - first);
        pause(20);
    }
    let taken = available.saturating_sub(memory::available_bytes());
    eprintln!(
        "{ip} {towards:?}: {:.1} MiB accepted and not read, {:.1} MiB charged to TCP, \
         the machine has {:.1} MiB less",
        most_held as f64 / MIB as f64,
        most_tcp as f64 / MIB as f64,
        taken as f64 / MIB as f64
    );
    assert!(writer.accepted() < total, "the writer was never held back");
    assert!(
        most_held <= BOUND,
        "{most_held} bytes accepted from the writer and not read"
    );
    assert!(most_tcp <= BOUND, "{most_tcp} bytes of kernel memory charged");

    finish(writer, writing, reading, UP, first, total);
    let status = proxy.settle();
    must_have_stayed_in_the_kernel(&status);
    assert!(status.number("/pauses") > 0, "the source was never held back");
}

#[test]
fn a_client_pushes_to_an_ipv4_upstream_that_stands_still() {
    a_reader_stands_still("127.0.0.1", Towards::Upstream, 1000, PIECE, 100 * MIB);
}

#[test]
fn an_upstream_pushes_to_an_ipv4_client_that_stands_still() {
    a_reader_stands_still("127.0.0.1", Towards::Downstream, 1000, PIECE, 100 * MIB);
}

#[test]
fn a_client_pushes_to_an_ipv6_upstream_that_stands_still() {
    a_reader_stands_still("::1", Towards::Upstream, 1000, PIECE, 100 * MIB);
}

#[test]
fn an_upstream_pushes_to_an_ipv6_client_that_stands_still() {
    a_reader_stands_still("::1", Towards::Downstream, 1000, PIECE, 100 * MIB);
}

#[test]
fn a_reader_stands_still_after_a_long_time_at_full_speed() {
    for towards in Towards::BOTH {
        a_reader_stands_still("127.0.0.1", towards, 500 * MIB, PIECE, 700 * MIB);
    }
}

#[test]
fn segments_of_a_few_bytes_are_bounded_too() {
    a_reader_stands_still("127.0.0.1", Towards::Upstream, 1000, 16, 24 * MIB);
}

#[test]
fn a_writer_that_closes_before_a_reader_that_stands_still_is_heard_to_its_end() {
    let _beside = beside_others();
    for backlog in ["64k", "1m"] {
        let (proxy, front) = proxy_with("127.0.0.1", &format!("ebpf_backlog_size = \"{backlog}\""));
        // Around the points where the source is held back, so that its end comes before, while and after it is.
        let step = if backlog == "64k" { 37_001 } else { 260_003 };
        for towards in Towards::BOTH {
            let mut sessions = Vec::new();
            for number in 1..=24 {
                let bytes = number * step;
                let (writing, reading) = front.offloaded(&proxy, towards);
                let writer = Writer::start_to_end(&writing, UP, bytes, PIECE);
                sessions.push((writing, reading, writer, bytes));
            }
            pause(700);
            for (writing, mut reading, writer, bytes) in sessions {
                receive(&mut reading, UP).must_be_whole(bytes);
                writer.join().expect("writing everything");
                drop(writing);
            }
        }
        let status = proxy.settle();
        must_be_sound(&status);
        assert_eq!(status.number("/closes/finished"), 48);
        let (relay, pauses) = (status.relay().sum(), status.number("/pauses"));
        eprintln!(
            "backlog {backlog}: {pauses} pauses, {relay} bytes copied after the end of a held-back source"
        );
        assert!(pauses > 0, "no source was held back");
        assert!(relay > 0, "no source ended while it was held back");
    }
}

#[test]
fn a_writer_that_resets_while_it_is_held_back_leaves_an_exact_prefix_and_a_reset() {
    let _beside = beside_others();
    for ip in ["127.0.0.1", "::1"] {
        let (proxy, front) = proxy_with(ip, "");
        for towards in Towards::BOTH {
            let (writing, mut reading) = front.offloaded(&proxy, towards);
            let writer = Writer::start(&writing, UP, u64::MAX, PIECE);
            writer.wait_for_stall();
            // The writing thread fails at once, and the last handle resets.
            reset_on_close(&writing);
            writing.shutdown(Shutdown::Both).expect("waking the writer");
            let (_, accepted) = writer.join_failed();
            drop(writing);
            let got = receive(&mut reading, UP);
            got.must_be_a_prefix_and_a_reset(accepted);
            proxy.settle();
        }
        must_be_sound(&proxy.status());
    }
}

#[test]
fn a_reader_that_resets_while_its_writer_is_held_back_resets_the_writer() {
    let _beside = beside_others();
    let (proxy, front) = proxy_with("127.0.0.1", "");
    for towards in Towards::BOTH {
        let (writing, reading) = front.offloaded(&proxy, towards);
        let writer = Writer::start(&writing, UP, u64::MAX, PIECE);
        writer.wait_for_stall();
        reset(reading);
        let (error, _) = writer.join_failed();
        assert!(
            matches!(
                error.kind(),
                std::io::ErrorKind::ConnectionReset | std::io::ErrorKind::BrokenPipe
            ),
            "{error}"
        );
        drop(writing);
        proxy.settle();
    }
    let status = proxy.status();
    must_be_sound(&status);
    assert_eq!(status.number("/closes/downstream_reset"), 1);
    assert_eq!(status.number("/closes/upstream_reset"), 1);
}

#[test]
fn a_pair_that_was_given_back_while_held_back_serves_the_next_session() {
    let _beside = beside_others();
    let mut plan = Plan::new()
        .global("worker_connections = 4")
        .stream("ebpf_backlog_size = \"64k\"");
    let front = Front::new(&mut plan, "127.0.0.1", "");
    let proxy = plan.start();
    for round in 0..40 {
        let towards = Towards::BOTH[round % 2];
        let (writing, reading) = front.offloaded(&proxy, towards);
        let writer = Writer::start(&writing, UP, 4 * MIB, PIECE);
        pause(30);
        reset(reading);
        let _ = writer.join();
        drop(writing);
        let (writing, mut reading) = front.open();
        let writer = Writer::start_to_end(&writing, DOWN, 2 * MIB, PIECE);
        receive(&mut reading, DOWN).must_be_whole(2 * MIB);
        writer.join().expect("writing everything");
    }
    let status = proxy.settle();
    must_be_sound(&status);
    assert!(status.number("/pauses") > 0, "no source was held back");
}

#[test]
fn two_directions_that_stand_still_at_once_both_go_on() {
    let _beside = beside_others();
    const EACH: u64 = 60 * MIB;
    for ip in ["127.0.0.1", "::1"] {
        let (proxy, front) = proxy_with(ip, "");
        let (client, upstream) = front.offloaded(&proxy, Towards::Upstream);
        let question = Writer::start(&client, UP, EACH, PIECE);
        let answer = Writer::start(&upstream, DOWN, EACH, PIECE);
        question.wait_for_stall();
        answer.wait_for_stall();
        // One after the other: that one direction stands still does not hold the other up.
        assert_eq!(receive_from(&mut &upstream, UP, 0, EACH).bytes, EACH);
        assert_eq!(receive_from(&mut &client, DOWN, 0, EACH).bytes, EACH);
        let second = |stream: &TcpStream| stream.try_clone().expect("a second handle");
        finish(question, second(&client), second(&upstream), UP, EACH, EACH);
        finish(answer, upstream, client, DOWN, EACH, EACH);
        let status = proxy.settle();
        must_have_stayed_in_the_kernel(&status);
        assert!(
            status.number("/pauses") >= 2,
            "both directions were to be held back"
        );
    }
}

#[test]
fn a_half_closed_session_whose_other_direction_is_held_back_loses_nothing() {
    let _beside = beside_others();
    const TOTAL: u64 = 100 * MIB;
    for towards in Towards::BOTH {
        let (proxy, front) = proxy_with("127.0.0.1", "");
        let (writing, reading) = front.offloaded(&proxy, towards);
        // The reader has nothing to say, and has said so.
        reading
            .shutdown(Shutdown::Write)
            .expect("ending the silent direction");
        receive(&mut &writing, DOWN).must_be_whole(0);
        let writer = Writer::start(&writing, UP, TOTAL, PIECE);
        writer.wait_for_stall();
        finish(writer, writing, reading, UP, 0, TOTAL);
        let status = proxy.settle();
        // A socket that has been sent our end of stream cannot enter a sockmap again (sock_map_sk_state_allowed):
        // from its first pause on it is copied.
        assert!(status.number("/pauses") > 0, "the source was never held back");
        assert_eq!(status.number("/closes/integrity"), 0);
    }
}

#[test]
fn two_directions_at_full_speed_at_once_both_arrive() {
    let _beside = beside_others();
    const EACH: u64 = 300 * MIB;
    let (proxy, front) = proxy_with("127.0.0.1", "");
    let (client, upstream) = front.offloaded(&proxy, Towards::Upstream);
    let question = Writer::start(&client, UP, EACH, PIECE);
    let answer = Writer::start(&upstream, DOWN, EACH, PIECE);
    std::thread::scope(|scope| {
        scope.spawn(|| assert_eq!(receive_from(&mut &upstream, UP, 0, EACH).bytes, EACH));
        assert_eq!(receive_from(&mut &client, DOWN, 0, EACH).bytes, EACH);
    });
    let second = |stream: &TcpStream| stream.try_clone().expect("a second handle");
    finish(question, second(&client), second(&upstream), UP, EACH, EACH);
    finish(answer, upstream, client, DOWN, EACH, EACH);
    must_have_stayed_in_the_kernel(&proxy.settle());
}

#[test]
fn a_permanently_slower_reader_stays_with_the_kernel() {
    let _beside = beside_others();
    const TOTAL: u64 = 60 * MIB;
    const STEP: u64 = MIB / 5;
    for towards in Towards::BOTH {
        let (proxy, front) = proxy_with("127.0.0.1", "");
        let (writing, mut reading) = front.offloaded(&proxy, towards);
        let writer = Writer::start(&writing, UP, TOTAL, PIECE);
        let start = Instant::now();
        let mut offset = 0;
        while offset < TOTAL {
            let due = Duration::from_millis(offset / STEP * 10);
            std::thread::sleep(due.saturating_sub(start.elapsed()));
            let got = receive_from(&mut reading, UP, offset, TOTAL.min(offset + STEP));
            assert_eq!(
                (got.ending, got.wrong_at),
                (Ending::Enough, None),
                "after {offset} bytes"
            );
            offset += got.bytes;
        }
        let took = start.elapsed();
        finish(writer, writing, reading, UP, TOTAL, TOTAL);
        let status = proxy.settle();
        must_have_stayed_in_the_kernel(&status);
        let pauses = status.number("/pauses");
        eprintln!("{towards:?}: {pauses} pauses in {took:?}");
        // Half of what may be outstanding has to drain between two of them.
        let most = TOTAL / (BACKLOG_DEFAULT / 4) + 4;
        assert!((1..=most).contains(&pauses), "{pauses} pauses, at most {most}");
        assert!(
            took < Duration::from_secs(6),
            "a reader of 20 MiB/s was fed for {took:?}"
        );
    }
}

#[test]
fn the_smallest_backlog_still_carries_a_stream_at_a_fair_speed() {
    let _alone = alone();
    const TOTAL: u64 = 50 * MIB;
    for towards in Towards::BOTH {
        let (proxy, front) = proxy_with("127.0.0.1", "ebpf_backlog_size = \"64k\"");
        let (writing, mut reading) = front.offloaded(&proxy, towards);
        let start = Instant::now();
        let writer = Writer::start(&writing, UP, TOTAL, PIECE);
        assert_eq!(receive_from(&mut reading, UP, 0, TOTAL).bytes, TOTAL);
        let took = start.elapsed();
        finish(writer, writing, reading, UP, TOTAL, TOTAL);
        let status = proxy.settle();
        let rate = (TOTAL / MIB) as f64 / took.as_secs_f64();
        eprintln!(
            "{towards:?}: {rate:.0} MiB/s, {} pauses",
            status.number("/pauses")
        );
        must_have_stayed_in_the_kernel(&status);
        assert!(rate >= 20.0, "{rate:.1} MiB/s");
    }
}

#[test]
fn a_worker_that_is_stopped_while_a_source_is_held_back_loses_nothing() {
    let _beside = beside_others();
    const TOTAL: u64 = 60 * MIB;
    for towards in Towards::BOTH {
        let (proxy, front) = proxy_with("127.0.0.1", "");
        let worker = Pid::from_raw(proxy.worker());
        let (writing, mut reading) = front.offloaded(&proxy, towards);
        let writer = Writer::start(&writing, UP, TOTAL, PIECE);
        writer.wait_for_stall();
        kill(worker, Signal::SIGSTOP).expect("stopping the worker");
        // All that had been forwarded arrives, and nothing can be let go on.
        reading
            .set_read_timeout(Some(Duration::from_secs(2)))
            .expect("a timeout");
        let got = receive(&mut reading, UP);
        kill(worker, Signal::SIGCONT).expect("letting the worker go on");
        assert_eq!((got.ending, got.wrong_at), (Ending::Silent, None));
        assert!(got.bytes >= BACKLOG_DEFAULT / 2, "{got:?}");
        reading
            .set_read_timeout(Some(harness::PATIENCE))
            .expect("a timeout");
        finish(writer, writing, reading, UP, got.bytes, TOTAL);
        must_have_stayed_in_the_kernel(&proxy.settle());
    }
}

#[test]
fn an_idle_session_that_was_held_back_before_does_not_wake_its_worker() {
    let _beside = beside_others();
    const TOTAL: u64 = 40 * MIB;
    let (proxy, front) = proxy_with("127.0.0.1", "");
    let (writing, reading) = front.offloaded(&proxy, Towards::Upstream);
    let mut offset = 0;
    for _ in 0..3 {
        // Written by hand: the stream does not end here.
        let mut handle = writing.try_clone().expect("a second handle");
        let from = offset;
        let sender = std::thread::spawn(move || harness::send(&mut handle, UP, from, from + TOTAL));
        pause(700);
        let got = receive_from(&mut &reading, UP, from, from + TOTAL);
        assert_eq!((got.bytes, got.ending), (TOTAL, Ending::Enough));
        sender.join().expect("the sender").expect("sending");
        offset += TOTAL;
    }
    pause(500);
    let worker = proxy.worker();
    let before = process::voluntary_switches(worker);
    pause(3000);
    let woken = process::voluntary_switches(worker) - before;
    assert!(
        woken <= 20,
        "an idle session wakes its worker {woken} times in 3 s"
    );
    drop((writing, reading));
    let status = proxy.settle();
    must_have_stayed_in_the_kernel(&status);
    assert!(status.number("/pauses") >= 3, "the source was to be held back");
}

/// Sessions held back, then as many reloads, each followed by further ones; then all go on.
fn reloads_with_sessions_held_back(reloads: usize) {
    let _beside = beside_others();
    const TOTAL: u64 = 24 * MIB;
    let (proxy, front) = proxy_with("127.0.0.1", "ebpf_backlog_size = \"256k\"");
    let mut sessions = Vec::new();
    let mut add = |proxy: &Proxy| {
        for towards in Towards::BOTH {
            let (writing, reading) = front.offloaded(proxy, towards);
            let writer = Writer::start(&writing, UP, TOTAL, PIECE);
            sessions.push((writing, reading, writer));
        }
    };
    add(&proxy);
    pause(500);
    for _ in 0..reloads {
        let before = proxy.status().generation();
        proxy.signal(Signal::SIGHUP);
        proxy.wait("the generation has changed", |s| s.generation() > before);
        add(&proxy);
        pause(300);
    }
    let readers: Vec<_> = sessions
        .into_iter()
        .map(|(writing, reading, writer)| {
            assert!(writer.accepted() < TOTAL, "the writer was never held back");
            std::thread::spawn(move || finish(writer, writing, reading, UP, 0, TOTAL))
        })
        .collect();
    for (number, reader) in readers.into_iter().enumerate() {
        assert!(reader.join().is_ok(), "session {number} failed");
    }
    let status = proxy.settle();
    must_have_stayed_in_the_kernel(&status);
    assert!(status.number("/pauses") as usize >= 2 * (reloads + 1));
    let gone = within(Duration::from_secs(5), || {
        process::children(proxy.pid()).len() == 1
    });
    assert!(gone, "old workers stay: {:?}", process::children(proxy.pid()));
}

#[test]
fn sessions_that_are_held_back_go_on_after_a_reload() {
    reloads_with_sessions_held_back(1);
}

#[test]
fn sessions_that_are_held_back_go_on_after_two_reloads_in_a_row() {
    reloads_with_sessions_held_back(2);
}

#[test]
fn sessions_that_are_held_back_go_on_after_more_reloads_than_a_slot_has_ring_buffers() {
    reloads_with_sessions_held_back(6);
}

#[test]
fn a_reader_that_stands_still_for_longer_than_proxy_timeout_ends_the_session_as_idle() {
    let _beside = beside_others();
    let (proxy, front) = proxy_with(
        "127.0.0.1",
        "proxy_timeout = \"1s\"\nebpf_timer_period = \"200ms\"",
    );
    for towards in Towards::BOTH {
        let (writing, mut reading) = front.offloaded(&proxy, towards);
        let start = Instant::now();
        let writer = Writer::start(&writing, UP, u64::MAX, PIECE);
        let (error, accepted) = writer.join_failed();
        let took = start.elapsed();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
        assert!(
            (Duration::from_millis(900)..Duration::from_secs(5)).contains(&took),
            "ended after {took:?}"
        );
        receive(&mut reading, UP).must_be_a_prefix_and_a_reset(accepted);
    }
    let status = proxy.settle();
    must_be_sound(&status);
    assert_eq!(status.number("/closes/idle_timeout"), 2);
}

#[test]
fn other_sessions_go_on_while_many_are_held_back() {
    let _beside = beside_others();
    const HELD: usize = 24;
    let (proxy, front) = proxy_with("127.0.0.1", "ebpf_backlog_size = \"256k\"");
    let mut held = Vec::new();
    for number in 0..HELD {
        let (writing, reading) = front.offloaded(&proxy, Towards::BOTH[number % 2]);
        let writer = Writer::start(&writing, UP, 8 * MIB, PIECE);
        held.push((writing, reading, writer));
    }
    pause(500);
    let (mut client, upstream) = front.offloaded(&proxy, Towards::Upstream);
    let echo = std::thread::spawn(move || harness::upstream::echo(upstream));
    let start = Instant::now();
    ping(&mut client, DOWN, 1000).expect("1000 rounds");
    assert!(
        start.elapsed() < Duration::from_secs(5),
        "1000 rounds took {:?}",
        start.elapsed()
    );
    drop(client);
    echo.join().expect("the echo");
    for (writing, reading, writer) in held {
        finish(writer, writing, reading, UP, 0, 8 * MIB);
    }
    must_have_stayed_in_the_kernel(&proxy.settle());
}
