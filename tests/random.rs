//! Random sessions through the real binary against a model of what TCP owes its users: every byte and then FIN, or
//! an exact prefix and then RST. Every session follows from one number, its seed.
//!
//! | variable | effect |
//! |---|---|
//! | `TEST_RANDOM_SECONDS` | how long it goes on; 8 unless set |
//! | `TEST_RANDOM_GIB` | over loopback larger sessions, nearly all on listeners that the kernel takes, until so many GiB have come through |
//! | `TEST_RANDOM_SEED` | this session alone, again and again for as long as the other variables say |

use std::fmt::Write;
use std::net::{SocketAddr, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use crate::harness::end::{Ends, Gap, Half, Outcome, Script, Start, play};
use crate::harness::long_way::{LongWay, Way};
use crate::harness::networks::Networks;
use crate::harness::random::Random;
use crate::harness::{Ending, Flag, Front, Plan, Proxy, connect};

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;
const GIB: u64 = 1024 * MIB;

const IPS: [&str; 2] = ["127.0.0.1", "::1"];
/// What a listener's sessions are carried by.
const PATHS: [&str; 4] = ["", "ebpf_backlog_size = \"64k\"", LATE, "ebpf_enable = false"];
/// By the kernel once it has moved as much as its listener says: each another one.
const LATE: &str = "ebpf_offload_after";
const LATE_BYTES: [u64; 4] = [1, 3_000, 150_000, 2 * MIB];
/// Listeners: every path between every two kinds of addresses. A session's seed says which it uses.
const LANES: usize = 16;
/// Those among them whose sessions the kernel takes.
const KERNEL_LANES: u64 = 12;

/// How much the sessions of a run have to carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Size {
    /// A few MiB at most, for a link that carries little.
    Small,
    Usual,
    /// As usual, in small pieces most of the time, which cost the kernel more than their bytes.
    Fine,
    /// Bulk for the kernel.
    Large,
}

impl Random {
    /// Once in `times`.
    fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// From 1 to `limit`, each order of magnitude as likely as the others.
    fn any_size(&mut self, limit: u64) -> u64 {
        let bits = self.below(u64::from(limit.ilog2()) + 1);
        let base = 1 << bits;
        (base + self.below(base)).min(limit)
    }

    fn milliseconds(&mut self, limit: u64) -> Duration {
        Duration::from_millis(self.below(limit))
    }

    fn stream_bytes(&mut self, size: Size) -> u64 {
        let kinds = match size {
            Size::Small => 9,
            Size::Usual => 10,
            Size::Fine => 12,
            Size::Large => 20,
        };
        match self.below(kinds) {
            0 => 0,
            1..=2 => self.any_size(200),
            3..=5 => self.any_size(200 * KIB),
            6..=8 => self.any_size(4 * MIB),
            9 => self.any_size(32 * MIB),
            _ if size == Size::Fine => self.any_size(64 * MIB),
            _ => self.any_size(512 * MIB),
        }
    }

    fn half(&mut self, seed: u64, bytes: u64, size: Size) -> Half {
        let largest = if self.once_in(3) {
            self.any_size(256 * KIB)
        } else if size == Size::Fine {
            16 + self.any_size(2 * KIB)
        } else {
            64 * KIB
        };
        // Pieces of a byte are for streams that end within seconds all the same.
        let most = if size == Size::Fine { 400_000 } else { 20_000 };
        let piece = largest.max(bytes / most + 1);
        let gap = self.once_in(3).then(|| {
            // Waits of a second and a half in all at most.
            let times = 1 + self.below(30);
            Gap {
                every: bytes / times + 1,
                pause: self.milliseconds(1500 / times),
            }
        });
        Half {
            seed,
            bytes,
            piece: piece as usize,
            gap,
        }
    }
}

/// The scripts of a session's two ends: the client's and the upstream's.
fn scripts(seed: u64, size: Size) -> [Script; 2] {
    let mut random = Random(seed);
    let lengths = [random.stream_bytes(size), random.stream_bytes(size)];
    let seeds = [random.next(), random.next()];
    let mut ends = [0, 1].map(|end| {
        let other = 1 - end;
        Script {
            out: random.half(seeds[end], lengths[end], size),
            into: random.half(seeds[other], lengths[other], size),
            start: Start::After(if random.once_in(2) {
                Duration::ZERO
            } else {
                random.milliseconds(30)
            }),
            glued: random.once_in(4),
            ends: Ends::AtOnce,
            reset_after: None,
            // Less than a segment moves a few times a second at best (silly-window avoidance).
            receive_buffer: random
                .once_in(4)
                .then(|| (4096 + random.below(256 * KIB)).max(lengths[other] / 8) as usize),
        }
    });
    // At most one end waits for the other, or they would wait for ever.
    if random.once_in(2) {
        let waiting = usize::from(!random.once_in(3));
        ends[waiting].start = if random.once_in(2) {
            Start::Answering
        } else {
            Start::AfterEnd
        };
    }
    // Bulk for the kernel: half-closed sessions leave it when they are first held back, so most end both ways at once.
    if size == Size::Large && !random.once_in(8) {
        for end in &mut ends {
            (end.ends, end.glued) = (Ends::Last, false);
            // Nobody waits for an end that is held back for him.
            if !matches!(end.start, Start::After(_)) {
                end.start = Start::After(Duration::ZERO);
            }
        }
    }
    if random.once_in(4) {
        let resetting = random.below(2) as usize;
        ends[resetting].reset_after = Some(random.below(lengths[0] + lengths[1] + 1));
        if size == Size::Small {
            // Once both streams have an end a socket sends no reset (tcp_disconnect, Linux 6.12), and nobody can tell the other
            // end that what was lost will not be sent again. So this one does not end before, nor does anybody wait for that.
            ends[resetting].ends = Ends::Never;
            if !matches!(ends[1 - resetting].start, Start::After(_)) {
                ends[1 - resetting].start = Start::After(Duration::ZERO);
            }
        }
    }
    ends
}

/// What is wrong with what `reader` saw of the stream that `writer` sent.
fn judge(writer: &Outcome, script: &Script, reader: &Outcome) -> Result<(), String> {
    let got = &reader.received;
    if let Some(offset) = got.wrong_at {
        return Err(format!("the byte at {offset} is not the sender's"));
    }
    if got.bytes > writer.written {
        return Err(format!("{} bytes received, {} sent", got.bytes, writer.written));
    }
    let whole = writer.ended && got.bytes == script.out.bytes;
    match got.ending {
        Ending::Fin if whole => Ok(()),
        Ending::Fin => Err("a clean end of a stream that is not whole".to_owned()),
        Ending::Reset if writer.reset => Ok(()),
        Ending::Reset => Err("a reset that nobody sent".to_owned()),
        Ending::Enough if reader.reset => Ok(()),
        Ending::Enough => Err("the reader stopped by itself".to_owned()),
        // TCP's resets can be lost, for nobody sends them again: see `run`.
        Ending::Silent if writer.reset => Ok(()),
        Ending::Silent => Err("neither bytes nor an end for long".to_owned()),
    }?;
    match reader.write_error {
        Some(errno) if !writer.reset => Err(format!("writing failed ({errno}) although nobody had reset")),
        _ => Ok(()),
    }
}

/// What all sessions together did.
#[derive(Default)]
struct Tally {
    sessions: AtomicU64,
    resets: AtomicU64,
    /// Those whose other end waited for them in vain.
    lost_resets: AtomicU64,
    /// By direction: to_upstream, to_downstream.
    written: [AtomicU64; 2],
    received: [AtomicU64; 2],
    failures: Mutex<Vec<String>>,
}

impl Tally {
    fn received_bytes(&self) -> u64 {
        self.received
            .iter()
            .map(|bytes| bytes.load(Ordering::Relaxed))
            .sum()
    }

    fn has_failed(&self) -> bool {
        !self.failures.lock().expect("the list").is_empty()
    }
}

/// One session, from its seed to the verdict.
fn session(seed: u64, size: Size, client: TcpStream, front: &Front, tally: &Tally) {
    let scripts = scripts(seed, size);
    let connected = Flag::default();
    let outcomes = std::thread::scope(|scope| {
        let playing = scope.spawn(|| play(&scripts[0], client, &connected));
        let upstream = front.accept();
        connected.raise();
        let upstream = play(&scripts[1], upstream, &connected);
        [playing.join().expect("the client"), upstream]
    });
    tally.sessions.fetch_add(1, Ordering::Relaxed);
    for end in 0..2 {
        let (writer, reader) = (&outcomes[end], &outcomes[1 - end]);
        tally.written[end].fetch_add(writer.written, Ordering::Relaxed);
        tally.received[end].fetch_add(reader.received.bytes, Ordering::Relaxed);
        tally.resets.fetch_add(u64::from(writer.reset), Ordering::Relaxed);
        let is_lost = writer.reset && reader.received.ending == Ending::Silent;
        tally.lost_resets.fetch_add(u64::from(is_lost), Ordering::Relaxed);
        if let Err(what) = judge(writer, &scripts[end], reader) {
            let way = ["to_upstream", "to_downstream"][end];
            let mut text = format!("{way}: {what}; to see it again in this test: TEST_RANDOM_SEED={seed}");
            if size == Size::Large {
                text.push_str(" TEST_RANDOM_GIB=1");
            }
            for (name, end) in [("client", 0), ("upstream", 1)] {
                let _ = write!(text, "\n  {name}: {:?}\n    {:?}", scripts[end], outcomes[end]);
            }
            tally.failures.lock().expect("the list").push(text);
        }
    }
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name} must be a whole number, and is {text}")),
    )
}

/// Plays sessions on all lanes until the time is over or enough has come through, then looks at what the proxy says of
/// them.
fn run(size: Size, fronts: &[Front], proxy: Proxy, connect: impl Fn(SocketAddr) -> TcpStream + Sync) {
    let replayed = number("TEST_RANDOM_SEED");
    let wanted = match size {
        Size::Large => number("TEST_RANDOM_GIB").map_or(u64::MAX, |gib| gib * GIB),
        Size::Small | Size::Usual | Size::Fine => u64::MAX,
    };
    let lanes = fronts.len() as u64;
    let base = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |time| time.as_nanos() as u64);
    let end = Instant::now() + seconds(size);
    let tally = Tally::default();
    let goes_on = || Instant::now() < end && tally.received_bytes() < wanted && !tally.has_failed();
    std::thread::scope(|scope| {
        for (lane, front) in fronts.iter().enumerate() {
            let (tally, goes_on, connect, lane) = (&tally, &goes_on, &connect, lane as u64);
            // What is to be carried in bulk is what the kernel carries.
            let left_out = size == Size::Large && lane >= KERNEL_LANES;
            if replayed.map_or(left_out, |seed| seed % lanes != lane) {
                continue;
            }
            let mut random = Random(base ^ lane);
            scope.spawn(move || {
                while goes_on() {
                    let seed = replayed.unwrap_or_else(|| random.next() / 2 / lanes * lanes + lane);
                    session(seed, size, connect(front.address), front, tally);
                }
            });
        }
    });

    let failures = tally.failures.into_inner().expect("the list");
    let sessions = tally.sessions.into_inner();
    let (resets, lost_resets) = (tally.resets.into_inner(), tally.lost_resets.into_inner());
    eprintln!(
        "{sessions} sessions, {resets} resets of which {lost_resets} are lost, {:.1} GiB, {} failures",
        tally
            .received
            .iter()
            .map(|bytes| bytes.load(Ordering::Relaxed))
            .sum::<u64>() as f64
            / GIB as f64,
        failures.len()
    );
    assert!(
        failures.is_empty(),
        "{} of {sessions} sessions failed:\n{}",
        failures.len(),
        failures.join("\n")
    );

    // A reset that overtakes lost data is answered with a challenge (RFC 5961), which may be lost too, or held back after another
    // (tcp_oow_rate_limited, Linux 6.12). Nothing is lost on loopback.
    let may_be_lost = if size == Size::Small { 1 + resets / 50 } else { 0 };
    assert!(
        lost_resets <= may_be_lost,
        "{lost_resets} of {resets} resets did not arrive"
    );

    let status = proxy.settle();
    eprintln!(
        "{:?} by the kernel, {:?} copied, {} pauses, {}",
        status.sockmap(),
        status.relay(),
        status.number("/pauses"),
        status.json()["closes"]
    );
    assert_eq!(
        status.number("/closes/integrity"),
        0,
        "the kernel's counters did not add up"
    );
    assert_eq!(
        status.fallbacks(),
        status.number("/fallbacks/early_end"),
        "{:#}",
        status.json()
    );
    let carried = status.carried();
    let carried_by_kernel = status.sockmap().sum();
    for (way, bytes) in [carried.to_upstream, carried.to_downstream]
        .into_iter()
        .enumerate()
    {
        let (read, sent) = (&tally.received[way], &tally.written[way]);
        let (read, sent) = (read.load(Ordering::Relaxed), sent.load(Ordering::Relaxed));
        assert!(
            (read..=sent).contains(&bytes),
            "{bytes} bytes counted, {sent} sent and {read} received"
        );
    }
    assert!(sessions > 0, "no session was played");
    let (sockmap, all) = (carried_by_kernel, carried.to_upstream + carried.to_downstream);
    eprintln!(
        "{:.1} GiB through the sockmap, {:.1} % of all; first seed {base}",
        sockmap as f64 / GIB as f64,
        sockmap as f64 * 100.0 / all.max(1) as f64
    );
    if size == Size::Large && replayed.is_none() {
        assert!(sockmap * 2 > all, "{sockmap} of {all} bytes through the kernel");
    }
}

/// How long it goes on.
fn seconds(size: Size) -> Duration {
    const DAY: u64 = 24 * 3600;
    let unless_set = if size == Size::Large { DAY } else { 8 };
    Duration::from_secs(number("TEST_RANDOM_SECONDS").unwrap_or(unless_set))
}

/// A proxy in the making, whose log has room for what matters: that of many thousand sessions is of no use.
fn plan(size: Size) -> Plan {
    Plan::new()
        .workers(2)
        .lifetime(seconds(size) + Duration::from_secs(120))
        .global("error_log = { path = \"stderr\", level = \"warn\" }")
}

/// What a lane's listener says.
fn lines(lane: usize) -> String {
    match PATHS[lane / 4] {
        LATE => format!("{LATE} = {}", LATE_BYTES[lane % 4]),
        path => path.to_owned(),
    }
}

#[test]
fn random_sessions_are_whole_and_end_in_fin_or_are_a_prefix_and_end_in_reset() {
    over_loopback(match number("TEST_RANDOM_GIB") {
        Some(_) => Size::Large,
        None => Size::Usual,
    });
}

/// In a minute this finds what bulk finds in a day: connections of which each waits for the other one.
#[test]
fn so_are_those_of_small_pieces() {
    over_loopback(Size::Fine);
}

fn over_loopback(size: Size) {
    let mut plan = plan(size);
    let fronts: Vec<_> = (0..LANES)
        .map(|lane| Front::between(&mut plan, IPS[lane % 2], IPS[lane / 2 % 2], &lines(lane)))
        .collect();
    run(size, &fronts, plan.start(), connect);
}

/// Both ends are far away, and on their way packets are lost, doubled and overtaken.
#[test]
fn so_are_those_over_links_that_lose_double_and_disorder() {
    const CLIENT: usize = 0;
    const PROXY: usize = 1;
    const UPSTREAM: usize = 2;
    const PROXY_IPS: [&str; 2] = ["10.81.0.2", "fd00:81::2"];
    const UPSTREAM_IPS: [&str; 2] = ["10.82.0.2", "fd00:82::2"];
    let networks = &Networks::new(["c", "p", "u"], |_| Vec::new());
    let way = Way {
        delay: Duration::from_millis(4),
        mbit_s: 400,
        queue_bytes: 256 * KIB,
        lost: 4_000,
        doubled: 4_000,
        late: 4_000,
    };
    let ways = [
        LongWay::between(networks, [CLIENT, PROXY], "to-proxy", 81, way),
        LongWay::between(networks, [PROXY, UPSTREAM], "to-upstream", 82, way),
    ];
    // Whoever has had no word of a reset is told in the end.
    let mut plan = plan(Size::Small).stream("proxy_timeout = \"8s\"");
    let mut fronts = Vec::new();
    for lane in 0..LANES {
        let (listen, upstream) = (PROXY_IPS[lane % 2], UPSTREAM_IPS[lane / 2 % 2]);
        fronts.push(networks.within(UPSTREAM, || {
            Front::between(&mut plan, listen, upstream, &lines(lane))
        }));
    }
    networks.within(PROXY, || {
        run(Size::Small, &fronts, plan.start(), |address| {
            networks.within(CLIENT, || connect(address))
        });
    });
    for packets in ways.map(LongWay::end) {
        eprintln!("{packets:?}");
        let faults = [packets.lost, packets.doubled, packets.late];
        assert!(faults.iter().all(|&fault| fault > 0), "{packets:?}");
    }
}
