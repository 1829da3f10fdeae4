//! Sessions on a machine that is short of memory for sockets: the kernel refuses buffers, and drops what it has no room
//! for. Such a session is slow; it loses nothing, and stands still no longer than the shortage lasts.
//!
//! Two of the tests set limits of the whole machine, and put back what they found: `cargo test --release -p master --test
//! machine memory_pressure:: -- --ignored` runs them, and so does `make test-kernels`, where the machine is theirs.

use std::io::Read;
use std::net::TcpStream;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::harness::cramped::Cramped;
use crate::harness::pattern::{pause, ping};
use crate::harness::slow::{DOWN, MIB, PIECE, UP, must_be_sound};
use crate::harness::turns::{alone, beside_others};
use crate::harness::{Ending, Front, Plan, Proxy, Received, Towards, Writer, patient, receive, upstream};

/// How long a reader waits for the next byte.
const SILENCE: Duration = Duration::from_secs(30);

fn proxy_in(group: &Cramped, stream: &str) -> (Proxy, Front) {
    let mut plan = Plan::new()
        .launched_by(&group.launcher().each_ref().map(String::as_str))
        .stream(stream)
        .lifetime(Duration::from_secs(150));
    let front = Front::new(&mut plan, "127.0.0.1", "");
    (plan.start(), front)
}

/// A reader that takes a little at a time.
struct Slow(TcpStream);

impl Read for Slow {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        std::thread::sleep(Duration::from_millis(2));
        let part = buffer.len().min(32 * 1024);
        self.0.read(&mut buffer[..part])
    }
}

/// A session under way: one end writes all it has and ends the stream, the other one reads.
struct Running {
    writer: Writer,
    reader: JoinHandle<Received>,
}

/// Sessions in both directions, `(writer, reader)` of each.
fn open(proxy: &Proxy, front: &Front, sessions: usize) -> Vec<(TcpStream, TcpStream)> {
    (0..sessions)
        .map(|number| front.offloaded(proxy, Towards::BOTH[number % 2]))
        .collect()
}

/// Sets them going; every other pair of readers is slow.
fn run(sessions: Vec<(TcpStream, TcpStream)>, bytes: u64) -> Vec<Running> {
    let sessions = sessions.into_iter().enumerate();
    sessions
        .map(|(number, (writing, reading))| {
            reading
                .set_read_timeout(Some(patient(SILENCE)))
                .expect("a timeout");
            let writer = Writer::start_to_end(&writing, UP, bytes, PIECE);
            let reader = std::thread::spawn(move || {
                let got = match number % 4 < 2 {
                    true => receive(&mut &reading, UP),
                    false => receive(&mut Slow(reading), UP),
                };
                drop(writing);
                got
            });
            Running { writer, reader }
        })
        .collect()
}

/// What a limit of the whole machine was; it is put back when this value goes.
struct Machine {
    file: String,
    before: String,
}

impl Machine {
    #[track_caller]
    fn set(name: &str, value: &str) -> Machine {
        let file = format!("/proc/sys/net/{name}");
        let before = std::fs::read_to_string(&file).unwrap_or_else(|e| panic!("failed to read {file}: {e}"));
        std::fs::write(&file, value).unwrap_or_else(|e| panic!("failed to write {file}: {e}"));
        Machine { file, before }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Err(error) = std::fs::write(&self.file, &self.before) {
            eprintln!(
                "{} was {} and could not be put back: {error}",
                self.file, self.before
            );
        }
    }
}

fn all_must_be_whole(running: Vec<Running>, bytes: u64) {
    for Running { writer, reader } in running {
        reader.join().expect("the reader").must_be_whole(bytes);
        writer.join().expect("writing everything");
    }
}

/// The same, but for sessions that ended in a reset; how many were whole.
fn all_must_be_whole_or_reset(running: Vec<Running>, bytes: u64) -> usize {
    let mut whole = 0;
    for Running { writer, reader } in running {
        let got = reader.join().expect("the reader");
        match got.ending {
            Ending::Fin => {
                got.must_be_whole(bytes);
                whole += 1;
            }
            _ => got.must_be_a_prefix_and_a_reset(bytes),
        }
        let _ = writer.join();
    }
    whole
}

/// How often the machine's TCP came to be short of memory.
fn tcp_memory_pressures() -> u64 {
    let text = std::fs::read_to_string("/proc/net/netstat").expect("reading /proc/net/netstat");
    let mut lines = text.lines().filter(|line| line.starts_with("TcpExt:"));
    let (names, counts) = (lines.next().expect("names"), lines.next().expect("counts"));
    let counter = names.split(' ').zip(counts.split(' '));
    let found = counter.filter(|(name, _)| *name == "TCPMemoryPressures");
    found
        .map(|(_, count)| count.parse::<u64>().expect("a number"))
        .sum()
}

#[test]
fn sessions_of_a_proxy_that_is_short_of_memory_for_sockets_are_whole() {
    let _beside = beside_others();
    const SESSIONS: usize = 16;
    for (stream, each) in [("", 6 * MIB), ("ebpf_backlog_size = \"64k\"", MIB)] {
        let group = Cramped::new();
        let (proxy, front) = proxy_in(&group, stream);
        let mut sessions = open(&proxy, &front, SESSIONS / 2);
        group.allow(512 * 1024);
        // Others are begun when it is short already.
        sessions.extend(open(&proxy, &front, SESSIONS / 2));
        let start = Instant::now();
        all_must_be_whole(run(sessions, each), each);
        let was_short = group.was_short();
        group.lift();
        let status = proxy.settle();
        eprintln!(
            "{SESSIONS} sessions of {} MiB in {:?}, {} pauses",
            each / MIB,
            start.elapsed(),
            status.number("/pauses")
        );
        assert!(was_short, "there was enough memory");
        must_be_sound(&status);
        assert_eq!(status.number("/closes/finished"), SESSIONS as u64);
    }
}

#[test]
fn sessions_go_on_when_a_shortage_of_memory_is_over() {
    let _beside = beside_others();
    const EACH: u64 = 64 * MIB;
    let group = Cramped::new();
    let (proxy, front) = proxy_in(&group, "");
    let running = run(open(&proxy, &front, 8), EACH);
    let mut was_short = false;
    for _ in 0..3 {
        pause(200);
        // What sockets have cannot be taken from them: the limit follows what they give back.
        for _ in 0..10 {
            group.allow(64 * 1024);
            pause(100);
            was_short |= group.was_short();
        }
        group.lift();
    }
    assert!(was_short, "there was enough memory all the time");
    let start = Instant::now();
    all_must_be_whole(running, EACH);
    eprintln!("whole {:?} after the shortage", start.elapsed());
    // What is served anew is as fast as ever.
    let (mut client, upstream) = front.offloaded(&proxy, Towards::Upstream);
    let echo = std::thread::spawn(move || upstream::echo(upstream));
    ping(&mut client, DOWN, 200).expect("200 rounds");
    drop(client);
    echo.join().expect("the echo");
    must_be_sound(&proxy.settle());
}

#[test]
fn what_the_kernel_ends_for_want_of_memory_is_a_prefix_and_a_reset() {
    let _beside = beside_others();
    const EACH: u64 = 64 * MIB;
    let group = Cramped::new();
    let (mut proxy, front) = proxy_in(&group, "");
    let running = run(open(&proxy, &front, 8), EACH);
    pause(200);
    group.allow_at_most(256 * 1024);
    pause(2000);
    group.lift();
    let whole = all_must_be_whole_or_reset(running, EACH);
    eprintln!("{whole} of 8 sessions whole");
    // The master may have been killed, too.
    proxy.wait_for_exit(Duration::from_millis(200));
}

#[test]
#[ignore = "limits the TCP memory of the whole machine"]
fn sessions_on_a_machine_that_is_short_of_memory_for_tcp_are_whole_or_are_reset() {
    let _alone = alone();
    const EACH: u64 = 4 * MIB;
    let mut plan = Plan::new().lifetime(Duration::from_secs(150));
    let front = Front::new(&mut plan, "127.0.0.1", "");
    let proxy = plan.start();
    for shortage in ["64 96 128", "256 384 512"] {
        let sessions = open(&proxy, &front, 12);
        // Pages, for all sockets, those of the test too. Of what is closed and not yet delivered the kernel resets
        // some then (tcp_out_of_resources).
        let short = Machine::set("ipv4/tcp_mem", shortage);
        let before = tcp_memory_pressures();
        let running = run(sessions, EACH);
        pause(patient(Duration::from_secs(3)).as_millis() as u64);
        drop(short);
        let whole = all_must_be_whole_or_reset(running, EACH);
        let pressures = tcp_memory_pressures() - before;
        let status = proxy.settle();
        eprintln!(
            "tcp_mem {shortage}: {whole} of 12 whole, {} pauses, {pressures} times short of memory",
            status.number("/pauses")
        );
        assert!(pressures > 0, "there was enough memory");
        must_be_sound(&status);
        all_must_be_whole(run(open(&proxy, &front, 4), EACH), EACH);
    }
    must_be_sound(&proxy.settle());
}

#[test]
#[ignore = "limits the socket buffers of the whole machine"]
fn sessions_on_a_machine_that_grants_no_large_buffers_are_whole() {
    let _alone = alone();
    const EACH: u64 = 3 * MIB;
    for limit in ["4608", "65536", "212992"] {
        let limits = ["core/rmem_max", "core/wmem_max"].map(|name| Machine::set(name, limit));
        for stream in ["", "ebpf_backlog_size = \"64k\""] {
            let mut plan = Plan::new().stream(stream).lifetime(Duration::from_secs(120));
            let front = Front::new(&mut plan, "127.0.0.1", "");
            let proxy = plan.start();
            let start = Instant::now();
            all_must_be_whole(run(open(&proxy, &front, 8), EACH), EACH);
            let status = proxy.settle();
            eprintln!(
                "limit {limit}, {stream:?}: {:?}, {} pauses",
                start.elapsed(),
                status.number("/pauses")
            );
            must_be_sound(&status);
        }
        drop(limits);
    }
}
