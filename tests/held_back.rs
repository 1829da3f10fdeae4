//! What may happen while a source is held back: either end leaves, a direction ends, the worker stands still, the
//! configuration is reloaded, the session runs out of time. Nothing is lost, and the true ending arrives.

use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use crate::harness::pattern::{pause, receive_from};
use crate::harness::slow::{
    BACKLOG_DEFAULT, DOWN, MIB, PIECE, UP, bound, finish, must_be_sound, must_have_stayed_in_the_kernel,
    proxy_with,
};
use crate::harness::sockets::{reset, reset_on_close, rewind};
use crate::harness::turns::beside_others;
use crate::harness::{
    Ending, Front, PATIENCE, Plan, Proxy, Towards, Writer, patient, process, receive, send, within,
};
use culvert_shared::sys::socket::unacknowledged_bytes;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::RcvBuf;
use nix::unistd::Pid;

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
            .set_read_timeout(Some(crate::harness::PATIENCE))
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
        let sender = std::thread::spawn(move || crate::harness::send(&mut handle, UP, from, from + TOTAL));
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
    let gone = within(PATIENCE, || process::children(proxy.pid()).len() == 1);
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

/// What was let through under the old limits is not measured by the new ones.
#[test]
fn a_session_with_much_under_way_goes_on_after_a_reload_that_allows_little() {
    let _beside = beside_others();
    const TOTAL: u64 = 300 * MIB;
    let (proxy, front) = proxy_with("127.0.0.1", "ebpf_backlog_size = \"128m\"");
    let (writing, reading) = front.offloaded(&proxy, Towards::Upstream);
    let writer = Writer::start(&writing, UP, TOTAL, PIECE);
    proxy.wait("the source is held back", |s| s.number("/pauses") > 0);
    pause(300);
    proxy.edit("\"128m\"", "\"64k\"");
    let before = proxy.status().generation();
    proxy.signal(Signal::SIGHUP);
    proxy.wait("the generation has changed", |s| s.generation() > before);
    finish(writer, writing, reading, UP, 0, TOTAL);
    must_have_stayed_in_the_kernel(&proxy.settle());
}

#[test]
fn sessions_of_a_worker_that_found_no_ring_buffer_end_as_they_should() {
    // As many as a slot has.
    const RING_BUFFERS: usize = 4;
    let _beside = beside_others();
    let (proxy, front) = proxy_with("127.0.0.1", "ebpf_backlog_size = \"64m\"");
    let mut frozen = Vec::new();
    let tell = |pid: i32, signal| kill(Pid::from_raw(pid), signal).expect("signalling a worker");
    for _ in 0..RING_BUFFERS {
        let status = proxy.status();
        let mut workers = status.workers().into_iter().map(|worker| worker.pid);
        let serves = workers.find(|pid| !frozen.contains(pid)).expect("a worker");
        // It keeps its ring buffer.
        tell(serves, Signal::SIGSTOP);
        frozen.push(serves);
        proxy.signal(Signal::SIGHUP);
        proxy.wait("the next generation serves", |s| {
            s.generation() > status.generation()
        });
    }
    // More than a send buffer takes and less than sources are held back for: when a writer ends, its reader's TCP has not
    // taken all, nothing tells the worker when it has, and it has to look again.
    for towards in Towards::BOTH {
        let sessions = (1..=5).map(|number| {
            let bytes = number * 3 * MIB + 6;
            let (writing, reading) = front.offloaded(&proxy, towards);
            let writer = Writer::start_to_end(&writing, UP, bytes, PIECE);
            (writing, reading, writer, bytes)
        });
        let sessions: Vec<_> = sessions.collect();
        pause(700);
        for (writing, mut reading, writer, bytes) in sessions {
            receive(&mut reading, UP).must_be_whole(bytes);
            writer.join().expect("writing everything");
            drop(writing);
        }
    }
    frozen.iter().for_each(|&pid| tell(pid, Signal::SIGCONT));
    must_be_sound(&proxy.settle());
}

/// A sender that always has three segments ahead of a gap, so that no acknowledgement has room for an option: that is
/// where sources are held back otherwise.
struct Holey {
    stream: Option<TcpStream>,
    /// All before it was sent, and something behind it.
    sent: u64,
}

impl Holey {
    const SEGMENTS: u64 = 3;

    /// Goes `bytes` on (or back, if it is negative) without sending what lies between.
    fn leap(&mut self, bytes: i64) {
        // What arrives while there is no socket would be answered by a reset.
        pause(1);
        self.stream = self.stream.take().map(|old| rewind(old, (-bytes) as u32));
    }

    fn send(&mut self, from: u64, to: u64) -> &TcpStream {
        let stream = self.stream.as_mut().expect("a connection");
        send(stream, UP, from, to).expect("sending");
        stream
    }

    /// Sends the byte at `at`, beyond what was sent.
    fn place(&mut self, at: u64) {
        let ahead = (at - self.sent) as i64;
        self.leap(ahead);
        self.send(at, at + 1);
        self.leap(-ahead - 1);
    }

    /// Sends `bytes`, after it has placed the segments that lie so far ahead of them. False: they are not acknowledged.
    fn go_on(&mut self, bytes: u64) -> bool {
        let next = self.sent + bytes;
        for segment in 0..Self::SEGMENTS {
            // Not where the next part ends: then more than that would be acknowledged.
            self.place(next + bytes + 1 + 2 * segment);
        }
        self.send(self.sent, next);
        self.sent = next;
        let end = Instant::now() + patient(Duration::from_millis(500));
        while !self.is_through() && Instant::now() < end {
            pause(1);
        }
        self.is_through()
    }

    /// Whether all that was sent is acknowledged.
    fn is_through(&self) -> bool {
        let stream = self.stream.as_ref().expect("a connection");
        unacknowledged_bytes(stream.as_fd()).is_ok_and(|bytes| bytes == 0)
    }
}

#[test]
fn a_sender_with_holes_in_what_it_sends_is_held_back_too() {
    let _beside = beside_others();
    let (proxy, front) = proxy_with("127.0.0.1", "");
    let (writing, mut reading) = front.offloaded(&proxy, Towards::Upstream);
    setsockopt(&reading, RcvBuf, &(MIB as usize)).expect("SO_RCVBUF");
    let mut sender = Holey {
        stream: Some(writing),
        sent: 0,
    };
    // As fast as the receiver's window grows.
    // What is not acknowledged soon may only be late.
    let is_only_late =
        |sender: &Holey| proxy.status().number("/pauses") == 0 && within(PATIENCE, || sender.is_through());
    while sender.sent < 2 * bound()
        && (sender.go_on((sender.sent / 4).clamp(16 * 1024, 256 * 1024)) || is_only_late(&sender))
    {}
    let status = proxy.status();
    assert!(
        sender.sent < bound(),
        "{} bytes were taken: {:#}",
        sender.sent,
        status.json()
    );
    assert!(status.number("/pauses") > 0, "{:#}", status.json());
    let sent = sender.sent;
    drop(sender);
    receive(&mut reading, UP).must_be_whole(sent);
    drop(reading);
    proxy.settle();
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
            (Duration::from_millis(900)..Duration::from_secs(15)).contains(&took),
            "ended after {took:?}"
        );
        receive(&mut reading, UP).must_be_a_prefix_and_a_reset(accepted);
    }
    let status = proxy.settle();
    must_be_sound(&status);
    assert_eq!(status.number("/closes/idle_timeout"), 2);
}
