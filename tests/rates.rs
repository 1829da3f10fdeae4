//! `proxy_upload_rate` and `proxy_download_rate`: how fast a limited direction is, that the other one is the kernel's and
//! as fast as ever, and that a limit changes nothing else of a session.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use crate::harness::pattern::{fill, pause, receive_from};
use crate::harness::{
    Bytes, Ending, Front, PATIENCE, Plan, Proxy, Received, Towards, Writer, connect, process, receive,
    sockets, within,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const UP: u64 = 51;
const DOWN: u64 = 52;
/// What a limited direction may be ahead of its rate, in seconds: credit gathered before the first byte.
const AHEAD: f64 = 0.2;

fn key(towards: Towards) -> &'static str {
    match towards {
        Towards::Upstream => "proxy_upload_rate",
        Towards::Downstream => "proxy_download_rate",
    }
}

/// What arrived of a limited stream, and when.
struct Paced {
    received: Received,
    /// Until its end.
    seconds: f64,
    /// As many bytes as came in any one second.
    best_second: u64,
}

/// Receives the stream of `seed` to its end; it must never be ahead of `rate`, from `since` on.
fn paced(stream: &mut TcpStream, seed: u64, rate: u64, since: Instant) -> Paced {
    let (mut buffer, mut expected) = (vec![0; 64 << 10], vec![0; 64 << 10]);
    let (mut bytes, mut best_second) = (0, 0);
    let mut arrivals = std::collections::VecDeque::from([(0.0, 0)]);
    loop {
        let got = stream.read(&mut buffer).expect("reading a limited stream");
        let seconds = since.elapsed().as_secs_f64();
        if got == 0 {
            let whole = Received {
                bytes,
                ending: Ending::Fin,
                wrong_at: None,
            };
            return Paced {
                received: whole,
                seconds,
                best_second,
            };
        }
        fill(seed, bytes, &mut expected[..got]);
        assert!(
            buffer[..got] == expected[..got],
            "wrong bytes after {bytes} of a limited stream"
        );
        bytes += got as u64;
        arrivals.push_back((seconds, bytes));
        while arrivals.front().is_some_and(|(at, _)| seconds - at > 1.0) {
            arrivals.pop_front();
        }
        best_second = arrivals
            .front()
            .map_or(0, |(_, first)| bytes - first)
            .max(best_second);
        assert!(
            bytes as f64 <= (seconds + AHEAD) * rate as f64,
            "{bytes} bytes after {seconds} s are ahead of {rate} bytes per second"
        );
    }
}

/// Sends as much as `seconds` take at `rate` through a session, and looks at when it arrives.
#[track_caller]
fn must_take(session: (TcpStream, TcpStream), seed: u64, rate: u64, seconds: u64, since: Instant) {
    let (writer, mut reader) = session;
    let bytes = rate * seconds;
    let writing = Writer::start_to_end(&writer, seed, bytes, 16 << 10);
    let paced = paced(&mut reader, seed, rate, since);
    paced.received.must_be_whole(bytes);
    assert_eq!(writing.join().expect("writing"), bytes);
    let (took, best) = (paced.seconds, paced.best_second);
    // What a worker misses that comes late is not made up for, so the whole may take longer.
    assert!(
        (0.9..=2.0).contains(&(took / seconds as f64)) && best as f64 >= 0.85 * rate as f64,
        "{bytes} bytes at {rate} bytes per second took {took} s, at most {best} in one"
    );
}

fn both_handles(session: &(TcpStream, TcpStream)) -> (TcpStream, TcpStream) {
    let again = |stream: &TcpStream| stream.try_clone().expect("a second handle on a socket");
    (again(&session.0), again(&session.1))
}

fn limited_one_way(towards: Towards, rate: u64) {
    const SECONDS: u64 = 4;
    const FREE_BYTES: u64 = 100 << 20;
    let log = crate::harness::Scratch::new();
    let file = log.file("access.log");
    let mut plan = Plan::new().tables(
        "[[log_format]]\nname = \"way\"\nformat = \"$datapath $fallback_reason $relay_to_upstream $relay_to_downstream\"",
    );
    let lines = format!(
        "{} = \"{}k\"\naccess_log = {{ path = \"{}\", format = \"way\", flush = \"0\" }}",
        key(towards),
        rate >> 10,
        file.display()
    );
    let front = Front::new(&mut plan, "127.0.0.1", &lines);
    let proxy = plan.start();
    let since = Instant::now();
    let (client, upstream) = front.open();
    let (limited, free) = match towards {
        Towards::Upstream => ((client, upstream), 0),
        Towards::Downstream => ((upstream, client), 1),
    };
    let (reader, writer) = both_handles(&limited);
    let switches = process::voluntary_switches(proxy.worker());
    std::thread::scope(|scope| {
        let other = scope.spawn(move || {
            let (mut reader, writer) = (reader, writer);
            let began = Instant::now();
            let writing = Writer::start(&writer, DOWN, FREE_BYTES, 64 << 10);
            receive_from(&mut reader, DOWN, 0, FREE_BYTES);
            let took = began.elapsed().as_secs_f64();
            writing.join().expect("writing");
            // Not before: what a source that is held back when it ends has left is copied.
            writer.shutdown(Shutdown::Write).expect("the end of the stream");
            receive(&mut reader, DOWN).must_be_whole(0);
            took
        });
        must_take(limited, UP, rate, SECONDS, since);
        let took = other.join().expect("the direction without a limit");
        let speed = FREE_BYTES as f64 / took;
        assert!(
            speed > 10.0 * rate as f64,
            "the direction without a limit: {speed} bytes per second"
        );
    });
    let woken = process::voluntary_switches(proxy.worker()) - switches;
    // Fifty times a second for the limit, and as often again because its source goes on.
    assert!(woken < 400 * SECONDS, "the worker was woken {woken} times");

    let status = proxy.settle();
    let limited = rate * SECONDS;
    let bytes = |at: usize, bytes| Bytes {
        to_upstream: if at == 0 { bytes } else { 0 },
        to_downstream: if at == 1 { bytes } else { 0 },
    };
    assert_eq!(status.relay(), bytes(free, limited), "{:#}", status.json());
    assert_eq!(
        status.sockmap(),
        bytes(1 - free, FREE_BYTES),
        "{:#}",
        status.json()
    );
    assert_eq!(status.number("/fallbacks/rate_limited"), 1);
    assert_eq!(status.fallbacks(), 1);
    assert_eq!(status.number("/sessions/total_offloaded"), 1);
    assert_eq!(status.number("/closes/finished"), 1);
    let relayed = status.relay();
    let line = format!(
        "mixed rate_limited {} {}\n",
        relayed.to_upstream, relayed.to_downstream
    );
    let read = || std::fs::read_to_string(&file).unwrap_or_default();
    assert!(
        within(PATIENCE, || read() == line),
        "{:?} and not {line:?}",
        read()
    );
}

#[test]
fn an_upload_keeps_its_rate_and_the_download_beside_it_is_the_kernels() {
    limited_one_way(Towards::Upstream, 1 << 20);
}

#[test]
fn a_download_keeps_its_rate_and_the_upload_beside_it_is_the_kernels() {
    limited_one_way(Towards::Downstream, 2 << 20);
}

#[test]
fn both_ways_keep_their_own_rates_high_and_low_and_nothing_is_the_kernels() {
    let mut plan = Plan::new();
    let lines = "proxy_upload_rate = 20000\nproxy_download_rate = \"24m\"";
    let front = Front::new(&mut plan, "127.0.0.1", lines);
    let proxy = plan.start();
    let since = Instant::now();
    let (client, upstream) = front.open();
    let up = (client, upstream);
    let again = both_handles(&up);
    std::thread::scope(|scope| {
        scope.spawn(move || must_take((again.1, again.0), DOWN, 24 << 20, 3, since));
        must_take(up, UP, 20_000, 4, since);
    });
    let status = proxy.settle();
    let relayed = Bytes {
        to_upstream: 4 * 20_000,
        to_downstream: 3 * (24 << 20),
    };
    assert_eq!(status.relay(), relayed);
    assert_eq!(status.sockmap(), Bytes::default());
    assert_eq!(status.number("/fallbacks/rate_limited"), 1);
    assert_eq!(status.number("/sessions/total_offloaded"), 0);
}

#[test]
fn a_session_without_limits_stays_in_the_kernel_beside_limited_ones() {
    let mut plan = Plan::new().stream("proxy_download_rate = \"1k\"");
    let front = Front::new(&mut plan, "127.0.0.1", "proxy_download_rate = 0");
    let proxy = plan.start();
    let (upstream, client) = front.offloaded(&proxy, Towards::Downstream);
    let writing = Writer::start_to_end(&upstream, DOWN, 1 << 20, 16 << 10);
    client
        .shutdown(Shutdown::Write)
        .expect("the end of the other stream");
    receive(&mut &client, DOWN).must_be_whole(1 << 20);
    writing.join().expect("writing");
    let status = proxy.settle();
    assert_eq!(status.relay(), Bytes::default());
    assert_eq!(status.fallbacks(), 0);
}

#[test]
fn a_rate_may_come_from_a_map_and_holds_where_the_kernel_has_no_part() {
    let mut plan = Plan::new();
    let lines = "proxy_upload_rate = \"$rate\"\nebpf_enable = false";
    let slow = Front::new(&mut plan, "127.0.0.1", lines);
    let free = Front::new(&mut plan, "127.0.0.1", "proxy_upload_rate = \"$rate\"");
    let odd = Front::new(&mut plan, "127.0.0.1", "proxy_upload_rate = \"$server_addr\"");
    let plan = plan.tables(&format!(
        "[[map]]\nsource = \"$server_port\"\nvariable = \"$rate\"\nvalues = [\"{} 256k\"]",
        slow.address.port()
    ));
    let proxy = plan.start();
    let since = Instant::now();
    must_take(slow.open(), UP, 256 << 10, 3, since);
    for (front, said) in [(free, false), (odd, true)] {
        let (client, mut upstream) = front.offloaded(&proxy, Towards::Upstream);
        let writing = Writer::start(&client, UP, 4 << 20, 16 << 10);
        assert_eq!(receive_from(&mut upstream, UP, 0, 4 << 20).bytes, 4 << 20);
        writing.join().expect("writing");
        // Not before: what a source has left that ends while it is held back is copied.
        client.shutdown(Shutdown::Write).expect("the end of the stream");
        receive_from(&mut upstream, UP, 4 << 20, u64::MAX).must_be_whole(0);
        match said {
            true => proxy.must_say("\"127.0.0.1\" is no rate"),
            false => assert!(!proxy.log().contains("is no rate"), "{}", proxy.log()),
        }
    }
    let status = proxy.status();
    assert_eq!(status.fallbacks(), 0);
    assert_eq!(status.sockmap().to_upstream, 8 << 20);
    assert_eq!(status.relay().to_upstream, 3 * (256 << 10));
}

#[test]
fn waiting_for_a_limit_is_not_idling() {
    let mut plan = Plan::new();
    let lines = "proxy_upload_rate = 2\nproxy_timeout = \"300ms\"\nebpf_timer_period = \"10ms\"";
    let front = Front::new(&mut plan, "127.0.0.1", lines);
    let proxy = plan.start();
    // It idles until it is written to.
    let mut client = connect(front.address);
    let began = Instant::now();
    client.write_all(b"abcde").expect("writing");
    let mut upstream = front.accept();
    let mut got = [0; 5];
    upstream.read_exact(&mut got).expect("five bytes, two a second");
    assert_eq!(&got, b"abcde");
    let took = began.elapsed();
    assert!(took > Duration::from_millis(1800), "five bytes took {took:?}");
    // And then it idles.
    assert_eq!(receive(&mut upstream, UP).ending, Ending::Reset);
    proxy.wait("the session has idled", |s| s.number("/closes/idle_timeout") == 1);
}

#[test]
fn a_reset_of_either_end_ends_a_limited_session_in_resets() {
    let mut plan = Plan::new();
    let lines = "proxy_upload_rate = \"100k\"\nproxy_download_rate = \"100k\"";
    let front = Front::new(&mut plan, "127.0.0.1", lines);
    let one_way = Front::new(&mut plan, "127.0.0.1", "proxy_upload_rate = \"100k\"");
    let proxy = plan.start();
    for front in [&front, &one_way] {
        for seed in [UP, DOWN] {
            let (client, upstream) = front.open();
            let (writer, mut reader) = match seed {
                UP => (client, upstream),
                _ => (upstream, client),
            };
            let mut end = writer.try_clone().expect("a second handle on a socket");
            crate::harness::send(&mut end, seed, 0, 60_000).expect("writing");
            receive_from(&mut reader, seed, 0, 20_000);
            drop(end);
            sockets::reset(writer);
            let mut rest = vec![0; 64 << 10];
            let failed = loop {
                match reader.read(&mut rest) {
                    Ok(0) => panic!("a clean end of a stream that was reset"),
                    Ok(_) => (),
                    Err(e) => break e,
                }
            };
            assert_eq!(failed.kind(), std::io::ErrorKind::ConnectionReset);
        }
    }
    let status = proxy.settle();
    assert_eq!(
        status.number("/closes/downstream_reset"),
        2,
        "{:#}",
        status.json()
    );
    assert_eq!(status.number("/closes/upstream_reset"), 2, "{:#}", status.json());
}

#[test]
fn a_limited_stream_that_has_ended_lets_the_other_one_go_on() {
    let mut plan = Plan::new();
    let front = Front::new(&mut plan, "127.0.0.1", "proxy_upload_rate = \"200k\"");
    let proxy = plan.start();
    // Before its end comes: the kernel takes no session that has ended one way.
    let (client, mut upstream) = front.offloaded(&proxy, Towards::Upstream);
    crate::harness::send(&mut &client, UP, 0, 50_000).expect("writing");
    client.shutdown(Shutdown::Write).expect("the end of the stream");
    receive(&mut upstream, UP).must_be_whole(50_000);
    pause(100);
    // No more than is never held back: a half-closed session that was leaves the kernel.
    let writing = Writer::start_to_end(&upstream, DOWN, 1 << 20, 64 << 10);
    receive(&mut &client, DOWN).must_be_whole(1 << 20);
    writing.join().expect("writing");
    let status = proxy.settle();
    assert_eq!(status.sockmap().to_downstream, 1 << 20);
    assert_eq!(status.number("/closes/finished"), 1);
}

/// A session that is limited one way goes on in another worker, at the same rate.
fn keeps_its_limit(replace: impl Fn(&Proxy)) {
    const RATE: u64 = 1 << 20;
    let mut plan = Plan::new();
    let front = Front::new(&mut plan, "127.0.0.1", "proxy_upload_rate = \"1m\"");
    let proxy = plan.start();
    let (mut client, mut upstream) = front.open();
    let began = Instant::now();
    let early = std::thread::spawn(move || {
        crate::harness::send(&mut client, UP, 0, RATE).expect("writing");
        client
    });
    let first = receive_from(&mut upstream, UP, 0, RATE);
    assert_eq!((first.bytes, first.wrong_at), (RATE, None));
    assert!(began.elapsed() > Duration::from_millis(700));
    let client = early.join().expect("the writing thread");
    // Old enough to be kept, and nothing of it is in the worker's hands.
    proxy.wait("the session is kept", |s| s.number("/sessions/kept") == 1);
    pause(50);
    let before = proxy.worker();
    replace(&proxy);
    proxy.wait("another worker has it", |s| {
        s.workers().iter().all(|w| w.pid != before) && s.number("/sessions/adopted") == 1
    });
    pause(300);
    let since = Instant::now();
    // The other direction is still the kernel's.
    let sockmap = proxy.status().sockmap().to_downstream;
    crate::harness::send(&mut &upstream, DOWN, 0, 1 << 20).expect("writing");
    receive_from(&mut &client, DOWN, 0, 1 << 20);
    assert_eq!(proxy.status().sockmap().to_downstream, sockmap + (1 << 20));
    let client_again = client.try_clone().expect("a second handle on a socket");
    let late = std::thread::spawn(move || {
        let mut client = client_again;
        crate::harness::send(&mut client, UP, RATE, 4 * RATE).expect("writing");
        client.shutdown(Shutdown::Write).expect("the end of the stream");
    });
    let rest = receive_from(&mut upstream, UP, RATE, 4 * RATE);
    assert_eq!((rest.bytes, rest.wrong_at), (3 * RATE, None));
    let took = since.elapsed().as_secs_f64();
    assert!((2.7..=5.0).contains(&took), "three seconds' bytes took {took} s");
    late.join().expect("the writing thread");
    upstream.shutdown(Shutdown::Write).expect("the end of the stream");
    let status = proxy.settle();
    assert_eq!(status.number("/closes/finished"), 1, "{:#}", status.json());
    assert_eq!(status.relay().to_upstream, 4 * RATE);
}

#[test]
fn a_session_keeps_its_limit_when_a_reload_takes_it_out_of_the_file() {
    keeps_its_limit(|proxy| {
        proxy.edit("proxy_upload_rate = \"1m\"", "");
        proxy.reload();
    });
}

#[test]
fn a_session_keeps_its_limit_when_its_worker_dies() {
    keeps_its_limit(|proxy| kill(Pid::from_raw(proxy.worker()), Signal::SIGKILL).expect("killing"));
}
