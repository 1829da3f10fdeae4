//! Readers that are slow or stand still: what the kernel holds for them stays bounded, the writer feels it, the session
//! stays with the kernel, and what is held back is let go again. `held_back.rs` has what may happen meanwhile.
//!
//! `TEST_PRESSURE_SECONDS` is how long a reader stands still at the least in the tests of memory (2 unless set).

use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::harness::pattern::{pause, ping, receive_from};
use crate::harness::program::{need, run};
use crate::harness::slow::{
    BACKLOG_DEFAULT, DOWN, MIB, PIECE, UP, bound, finish, must_be_sound, must_have_stayed_in_the_kernel,
    proxy_with, standstill,
};
use crate::harness::sockets::{number_after, ss};
use crate::harness::turns::{alone, beside_others};
use crate::harness::{Ending, PATIENCE, Plan, Proxy, Towards, Writer, connect, memory, receive};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{RcvBuf, TcpMaxSeg};
use nix::unistd::Pid;

/// Smaller pieces are copied for a while where they come too fast.
const SMALL: usize = 2048;
/// The reader's own buffer, which the kernel doubles.
const READERS_BUFFER: usize = MIB as usize;
/// A writer that has got rid of nothing for so long is held back.
const STALLED: Duration = Duration::from_millis(500);

/// Fast at first, so that buffers grow, then a reader that stands still while the writer pushes, then the rest.
fn a_reader_stands_still(ip: &str, towards: Towards, first: u64, piece: usize, total: u64) {
    let _alone = alone();
    let (proxy, front) = proxy_with(ip, "");
    let (writing, mut reading) = front.offloaded(&proxy, towards);
    // What the reader's own socket takes is not the proxy's doing, and without this up to the host's tcp_rmem.
    setsockopt(&reading, RcvBuf, &READERS_BUFFER).expect("SO_RCVBUF");
    let (tcp, available) = (memory::tcp_bytes(), memory::available_bytes());
    let writer = Writer::start(&writing, UP, total, piece);
    assert_eq!(receive_from(&mut reading, UP, 0, first).bytes, first);

    let (mut most_tcp, mut most_held) = (0, 0);
    let begun = Instant::now();
    let mut grown = begun;
    // Until the writer has been held back for a while, too.
    while begun.elapsed() < standstill() || (grown.elapsed() < STALLED && begun.elapsed() < PATIENCE) {
        most_tcp = most_tcp.max(memory::tcp_bytes().saturating_sub(tcp));
        // The reader may have what the writer's thread has not counted yet.
        let held = writer.accepted().saturating_sub(first);
        if held > most_held {
            (most_held, grown) = (held, Instant::now());
        }
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
        most_held <= bound(),
        "{most_held} bytes accepted from the writer and not read"
    );
    assert!(most_tcp <= bound(), "{most_tcp} bytes of kernel memory charged");
    let open = proxy.status();
    let pauses = open.number("/pauses");
    let gathered = piece < SMALL && open.number("/gathers") > 0;
    assert!(
        pauses > 0 || gathered,
        "no pause of the open session is in the status"
    );
    assert_eq!(open.number("/workers/0/pauses"), pauses);

    finish(writer, writing, reading, UP, first, total);
    let status = proxy.settle();
    match gathered {
        true => must_be_sound(&status),
        false => must_have_stayed_in_the_kernel(&status),
    }
    assert!(status.number("/pauses") >= pauses, "the counter fell");
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

/// In a network whose receive buffers are as large from the beginning as the host lets them grow.
fn with_grown_buffers<T: Send>(test: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let inside = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("a network of its own (as root?)");
            let mut command = Command::new(need("ip", "iproute2"));
            command.args(["link", "set", "lo", "up"]);
            run(command, PATIENCE).must_succeed("ip link");
            std::fs::write("/proc/sys/net/ipv4/tcp_rmem", "4096 67108864 67108864").expect("tcp_rmem");
            test()
        });
        inside
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

#[test]
fn buffers_that_have_grown_are_not_filled_although_the_worker_comes_late() {
    const FIRST: u64 = 100 * MIB;
    const TOTAL: u64 = 300 * MIB;
    let _alone = alone();
    // The smaller are copied for a while; then it is a buffer that nobody reads.
    let cases = Towards::BOTH.map(|towards| [(towards, PIECE), (towards, 700)]);
    for (towards, piece) in cases.into_iter().flatten() {
        with_grown_buffers(|| {
            let (proxy, front) = proxy_with("127.0.0.1", "");
            let (writing, mut reading) = front.offloaded(&proxy, towards);
            setsockopt(&reading, RcvBuf, &READERS_BUFFER).expect("SO_RCVBUF");
            let worker = Pid::from_raw(proxy.worker());
            let writer = Writer::start(&writing, UP, TOTAL, piece);
            assert_eq!(receive_from(&mut reading, UP, 0, FIRST).bytes, FIRST);
            kill(worker, Signal::SIGSTOP).expect("stopping the worker");
            let held = writer.wait_for_stall() - FIRST;
            kill(worker, Signal::SIGCONT).expect("letting the worker go on");
            let mib = held as f64 / MIB as f64;
            eprintln!("{towards:?}, pieces of {piece}: {mib:.1} MiB accepted and not read");
            assert!(
                held <= bound(),
                "{mib:.1} MiB accepted from the writer and not read"
            );
            finish(writer, writing, reading, UP, FIRST, TOTAL);
            let status = proxy.settle();
            match piece < SMALL {
                true => must_be_sound(&status),
                false => must_have_stayed_in_the_kernel(&status),
            }
        });
    }
}

#[test]
fn buffers_are_as_large_as_the_backlog_needs_though_the_host_lets_nobody_ask_for_that() {
    let _alone = alone();
    let settable = memory::settable_receive_buffer().max(memory::settable_send_buffer());
    let backlog = (4 * settable).max(BACKLOG_DEFAULT);
    let total = 3 * backlog + 32 * MIB;
    for towards in Towards::BOTH {
        let (proxy, front) = proxy_with(
            "127.0.0.1",
            &format!("ebpf_backlog_size = \"{}k\"", backlog / 1024),
        );
        let (writing, reading) = front.offloaded(&proxy, towards);
        setsockopt(&reading, RcvBuf, &READERS_BUFFER).expect("SO_RCVBUF");
        // How ss(8) names the proxy's end of each.
        let buffers = |end: &TcpStream, letters: &str| {
            let (own, peer) = (end.local_addr().unwrap(), end.peer_addr().unwrap());
            let said = ss("-m", &format!("( src {peer} and dst {own} )"));
            number_after(&said, letters)
        };
        let writer = Writer::start(&writing, UP, total, PIECE);
        let sized = || (buffers(&reading, ",tb"), buffers(&writing, ",rb"));
        let wanted = (2 * backlog, backlog);
        let begun = Instant::now();
        while sized() != wanted && begun.elapsed() < PATIENCE {
            pause(50);
        }
        assert_eq!(
            sized(),
            wanted,
            "the target's send buffer, the source's receive buffer"
        );
        finish(writer, writing, reading, UP, 0, total);
        must_have_stayed_in_the_kernel(&proxy.settle());
    }
}

#[test]
fn what_a_sender_was_allowed_finds_room_although_its_buffer_is_limited() {
    const FIRST: u64 = 20 * MIB;
    let _alone = alone();
    for round in 0..6 {
        with_grown_buffers(|| {
            let (proxy, front) = proxy_with("127.0.0.1", "");
            let (writing, mut reading) = front.offloaded(&proxy, Towards::BOTH[round % 2]);
            setsockopt(&reading, RcvBuf, &READERS_BUFFER).expect("SO_RCVBUF");
            let worker = Pid::from_raw(proxy.worker());
            let writer = Writer::start(&writing, UP, 100 * MIB, PIECE);
            assert_eq!(receive_from(&mut reading, UP, 0, FIRST).bytes, FIRST);
            kill(worker, Signal::SIGSTOP).expect("stopping the worker");
            writer.wait_for_stall();
            // What was dropped is sent again after a timeout that doubles, and counts as sent until then; a window that is
            // closed is asked for with nothing.
            let mut command = Command::new(need("ss", "iproute2"));
            let own = writing.local_addr().expect("the writer's address");
            command.args(["-Htin", "src", &own.to_string()]);
            let told = run(command, PATIENCE);
            kill(worker, Signal::SIGCONT).expect("letting the worker go on");
            let told = told.must_succeed("ss");
            assert!(
                told.contains("cwnd:") && !told.contains("unacked:"),
                "round {round}: {told}"
            );
            finish(writer, writing, reading, UP, FIRST, 100 * MIB);
            must_have_stayed_in_the_kernel(&proxy.settle());
        });
    }
}

#[test]
fn segments_of_a_few_bytes_are_bounded_too() {
    a_reader_stands_still("127.0.0.1", Towards::Upstream, 1000, 16, 24 * MIB);
}

/// Takes the program away that holds sources back, as another one does that clears the callback flags of sockets.
fn detach_pressure(proxy: &Proxy) {
    let bpftool = need("bpftool", "bpftool");
    let directory = format!("/proc/{}/fdinfo", proxy.pid());
    let files = std::fs::read_dir(directory).expect("the master's descriptors");
    let texts = files
        .flatten()
        .filter_map(|file| std::fs::read_to_string(file.path()).ok());
    let links: Vec<String> = texts
        .filter(|text| text.contains("link_type:\tcgroup"))
        .filter_map(|text| {
            Some(
                text.lines()
                    .find_map(|line| line.strip_prefix("link_id:"))?
                    .trim()
                    .to_owned(),
            )
        })
        .collect();
    assert_eq!(links.len(), 1, "links to a cgroup");
    let mut command = Command::new(bpftool);
    command.args(["link", "detach", "id", &links[0]]);
    run(command, PATIENCE).must_succeed("bpftool");
}

#[test]
fn a_source_that_cannot_be_held_back_is_reset_before_it_takes_the_kernels_memory() {
    let _alone = alone();
    let (proxy, front) = proxy_with("127.0.0.1", "");
    for towards in Towards::BOTH {
        let (writing, mut reading) = front.offloaded(&proxy, towards);
        setsockopt(&reading, RcvBuf, &READERS_BUFFER).expect("SO_RCVBUF");
        if towards == Towards::Upstream {
            detach_pressure(&proxy);
        }
        let tcp = memory::tcp_bytes();
        let writer = Writer::start(&writing, UP, 4096 * MIB, PIECE);
        let (error, accepted) = writer.join_failed();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
        receive(&mut reading, UP).must_be_a_prefix_and_a_reset(accepted);
        // Its window, twice, and the margin.
        assert!(accepted < 8 * bound(), "{} MiB were taken", accepted / MIB);
        eprintln!("{towards:?}: {} MiB accepted, {tcp} before", accepted / MIB);
    }
    assert_eq!(proxy.settle().number("/closes/integrity"), 2);
    let log = proxy.log();
    assert_eq!(
        log.matches("its source could not be held back").count(),
        2,
        "{log}"
    );
}

#[test]
fn segments_of_a_few_bytes_take_no_more_memory_than_others_where_the_target_takes_few() {
    const SENT: u64 = 2 * MIB;
    let _alone = alone();
    // Over segments of this size a send buffer stays small as long as nothing is acknowledged: what it does not take
    // waits as it came.
    let listener = TcpListener::bind("127.0.0.1:0").expect("binding an upstream");
    setsockopt(&listener, TcpMaxSeg, &536).expect("TCP_MAXSEG");
    setsockopt(&listener, RcvBuf, &4096).expect("SO_RCVBUF");
    let mut plan = Plan::new().lifetime(PATIENCE * 6);
    let front = plan.server(listener.local_addr().expect("the upstream's address"));
    let proxy = plan.start();
    let client = connect(front);
    let (reading, _) = listener.accept().expect("the proxy's connection");
    reading.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    proxy.wait("the session is offloaded", |s| s.offloaded() == 1);
    let before = memory::slab_bytes();
    let writer = Writer::start(&client, UP, SENT, 8);
    let mut most = 0;
    let mut former = u64::MAX;
    while writer.accepted() < SENT && writer.accepted() != former {
        former = writer.accepted();
        for _ in 0..50 {
            most = most.max(memory::slab_bytes().saturating_sub(before));
            pause(10);
        }
    }
    eprintln!(
        "{} bytes taken, {:.1} MiB more in slabs",
        writer.accepted(),
        most as f64 / MIB as f64
    );
    assert!(most < bound(), "{most} bytes more in slabs");
    finish(writer, client, reading, UP, 0, SENT);
    must_be_sound(&proxy.settle());
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
            took < Duration::from_secs(15),
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
    let echo = std::thread::spawn(move || crate::harness::upstream::echo(upstream));
    let start = Instant::now();
    ping(&mut client, DOWN, 1000).expect("1000 rounds");
    assert!(
        start.elapsed() < Duration::from_secs(20),
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
