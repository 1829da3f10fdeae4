//! What is measured, and one run of each: a load on one contender, with what it cost.

use std::process::Command;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::Options;
use crate::contenders::{Contender, Proxy, Setup};
use crate::load::{self, Done, Writer};
use crate::machine::{self, Cpu, Memory};
use crate::peers::{self, ECHO, ECHO_MANY, IPERF, Peers, STOPPING};

/// A kind of run.
#[derive(Debug)]
pub struct Measure {
    /// A word for the command line and the raw data.
    pub name: &'static str,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Bulk {
        streams: usize,
        to_downstream: bool,
    },
    /// Pieces that are sent at once, each a segment.
    Pieces {
        bytes: u32,
    },
    OneConnection,
    ManyConnections,
    NewConnections {
        threads: usize,
    },
    Idle,
    Stopped,
}

/// Everything that is measured.
pub const MEASURES: &[Measure] = &[
    bulk("up1", 1, false),
    bulk("down1", 1, true),
    bulk("up8", 8, false),
    bulk("down8", 8, true),
    measure("pieces64", Kind::Pieces { bytes: 64 }),
    measure("pieces1000", Kind::Pieces { bytes: 1000 }),
    measure("rr1", Kind::OneConnection),
    measure("rr64", Kind::ManyConnections),
    measure("conn1", Kind::NewConnections { threads: 1 }),
    measure("conn8", Kind::NewConnections { threads: 8 }),
    measure("idle", Kind::Idle),
    measure("stopped", Kind::Stopped),
];

const fn measure(name: &'static str, kind: Kind) -> Measure {
    Measure { name, kind }
}

const fn bulk(name: &'static str, streams: usize, to_downstream: bool) -> Measure {
    let kind = Kind::Bulk {
        streams,
        to_downstream,
    };
    Measure { name, kind }
}

impl Measure {
    /// Such figures are absolute, hardly vary, and take long.
    pub fn is_about_memory(&self) -> bool {
        matches!(self.kind, Kind::Idle | Kind::Stopped)
    }
}

/// A contender with the servers behind it.
#[derive(Debug)]
pub struct Place {
    /// Who it is.
    pub contender: &'static Contender,
    /// Its servers.
    pub peers: Peers,
    /// It, running.
    pub proxy: Proxy,
}

/// One run.
#[derive(Debug)]
pub struct Sample {
    /// Counted from 0.
    pub round: usize,
    /// The measure's name.
    pub measure: &'static str,
    /// The contender's name.
    pub contender: &'static str,
    /// What came out. The names carry the units.
    pub figures: Vec<(&'static str, f64)>,
    /// CPU time during the run.
    pub cpu: Option<Cpu>,
    /// How long it took.
    pub seconds: f64,
    /// Why nothing came out.
    pub failure: Option<String>,
}

impl Sample {
    /// One of the figures.
    pub fn figure(&self, name: &str) -> Option<f64> {
        self.figures
            .iter()
            .find(|(n, _)| *n == name)
            .map(|(_, value)| *value)
    }

    /// The first figure, for the line that shows progress.
    pub fn short(&self) -> String {
        match (&self.failure, self.figures.first()) {
            (Some(failure), _) => format!("FAILED: {failure};"),
            (None, Some((_, value))) if *value < 1000.0 => format!("{value:.2}"),
            (None, Some((_, value))) => format!("{value:.0}"),
            (None, None) => "nothing".to_owned(),
        }
    }

    /// Whether other programs took more than a twentieth of a CPU.
    pub fn is_disturbed(&self) -> bool {
        self.cpu.is_some_and(|cpu| cpu.foreign_s > 0.05 * self.seconds)
    }
}

/// Runs a measure on a contender. What goes wrong is in the sample.
pub fn run(measure: &Measure, place: &mut Place, round: usize, setup: &Setup, options: &Options) -> Sample {
    let mut outcome = watched(measure, place, setup, options);
    if outcome.is_err() && matches!(measure.kind, Kind::Bulk { .. }) {
        // iperf3's server takes one test at a time and may hang after a broken one: the failure counts only if a
        // new one fails too.
        outcome = place
            .peers
            .restart_iperf(setup)
            .and_then(|()| watched(measure, place, setup, options));
    }
    let mut sample = Sample {
        round,
        measure: measure.name,
        contender: place.contender.name,
        figures: Vec::new(),
        cpu: None,
        seconds: 0.0,
        failure: None,
    };
    match outcome {
        Ok((figures, cpu, seconds)) => {
            (sample.figures, sample.cpu, sample.seconds) = (figures, Some(cpu), seconds);
        }
        Err(e) => sample.failure = Some(format!("{e:#}")),
    }
    sample
}

/// An attempt during which the contender's metrics are read once a second, if it serves any.
fn watched(measure: &Measure, place: &mut Place, setup: &Setup, options: &Options) -> Result<Outcome> {
    let (end, ended) = channel::<()>();
    setup.site.among_clients(move || {
        let (place, proxy) = (&*place, &place.proxy);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                while let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(Duration::from_secs(1)) {
                    proxy.scrape();
                }
            });
            let outcome = attempt(measure, place, setup, options);
            drop(end);
            outcome
        })
    })
}

type Outcome = (Vec<(&'static str, f64)>, Cpu, f64);

fn attempt(measure: &Measure, place: &Place, setup: &Setup, options: &Options) -> Result<Outcome> {
    let (seconds, proxy) = (options.seconds, &place.proxy);
    let before = Cpu::now()?;
    let begun = Instant::now();
    // The clients of some loads start the clock themselves, when they have warmed up.
    let (mut before_load, mut load_begun) = (before, begun);
    let mut start_clock = || {
        before_load = Cpu::now().unwrap_or(before);
        load_begun = Instant::now();
    };
    let per_request = |name: &'static str, done: Done| (name, done.rate(), done.requests as f64);
    let (name, value, amount) = match measure.kind {
        Kind::Bulk {
            streams,
            to_downstream,
        } => {
            let streams = streams.to_string();
            let options = ["-P", &streams, "-R"];
            let (gbit_s, gib) = iperf(place, seconds, &options[..2 + usize::from(to_downstream)])?;
            ("gbit_s", gbit_s, gib)
        }
        Kind::Pieces { bytes } => {
            let (gbit_s, gib) = iperf(place, seconds, &["-N", "-l", &bytes.to_string()])?;
            ("gbit_s", gbit_s, gib)
        }
        Kind::OneConnection => {
            let done = load::one_connection(proxy.address(ECHO), seconds, &mut start_clock)?;
            per_request("requests_s", done)
        }
        Kind::ManyConnections => {
            let done = load::many_connections(proxy.address(ECHO_MANY), 64, seconds, &mut start_clock)?;
            per_request("requests_s", done)
        }
        Kind::NewConnections { threads } => {
            let addresses: Vec<_> = (ECHO_MANY..peers::COUNT).map(|i| proxy.address(i)).collect();
            let done = load::connections(&addresses, threads, seconds)?;
            per_request("connections_s", done)
        }
        Kind::Idle => {
            let figures = idle(place, setup, options.sessions)?;
            return Ok((figures, Cpu::now()?.since(before), begun.elapsed().as_secs_f64()));
        }
        Kind::Stopped => {
            let figures = stopped(place, options.stopped)?;
            return Ok((figures, Cpu::now()?.since(before), begun.elapsed().as_secs_f64()));
        }
    };
    let seconds = load_begun.elapsed().as_secs_f64();
    let cpu = Cpu::now()?.since(before_load);
    let cost = match measure.kind {
        Kind::Bulk { .. } | Kind::Pieces { .. } => ("cpu_s_per_gib", cpu.busy_s / amount),
        _ => ("cpu_us_per_request", cpu.busy_s * 1e6 / amount),
    };
    Ok((vec![(name, value), cost], cpu, seconds))
}

/// Gbit/s and GiB received, by iperf3.
fn iperf(place: &Place, seconds: f64, options: &[&str]) -> Result<(f64, f64)> {
    let address = place.proxy.address(IPERF);
    // iperf3 takes whole seconds. `timeout` is there for a contender that loses the end of a test.
    let seconds = seconds.round().max(1.0) as u64;
    let mut command = Command::new("timeout");
    command.arg((seconds + 10).to_string());
    command.args(["iperf3", "-J", "-c", &address.ip().to_string()]);
    command.args(["-p", &address.port().to_string(), "-t", &seconds.to_string()]);
    command.args(options);
    let output = command.output().context("failed to start iperf3")?;
    let result: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("iperf3 ended with {} and wrote no JSON", output.status))?;
    if let Some(error) = result.get("error").and_then(Value::as_str) {
        bail!("iperf3: {error}");
    }
    let number = |pointer: &str| {
        let value = result.pointer(pointer).and_then(Value::as_f64);
        value.with_context(|| format!("iperf3's result has no {pointer}"))
    };
    let bytes = number("/end/sum_received/bytes")?;
    ensure!(bytes > 0.0, "iperf3 received nothing");
    Ok((
        number("/end/sum_received/bits_per_second")? / 1e9,
        bytes / f64::from(1 << 30),
    ))
}

/// What open but silent sessions cost a proxy that has just been started.
fn idle(place: &Place, setup: &Setup, sessions: usize) -> Result<Vec<(&'static str, f64)>> {
    let fresh = place.contender.start(&place.peers.ports(), setup)?;
    let processes = fresh.processes();
    let address = fresh.address(ECHO_MANY);
    let open = |count: usize| -> Result<Vec<_>> {
        let mut list = Vec::with_capacity(count);
        for _ in 0..count {
            let mut stream = load::connect(address)?;
            load::exchange(&mut stream)?;
            list.push(stream);
        }
        Ok(list)
    };
    // What the first sessions make a program allocate once and for all does not count.
    drop(open(32)?);
    std::thread::sleep(Duration::from_millis(500));
    let (resident, each) = machine::user_memory(&processes)?;
    let memory = settled_memory()?;
    let list = open(sessions)?;
    std::thread::sleep(Duration::from_secs(1));
    let (grown, _) = machine::user_memory(&processes)?;
    let kernel = settled_memory()?;
    let per_session = |bytes: f64| bytes / 1024.0 / sessions as f64;
    let mut figures = vec![
        ("user_kib_per_session", per_session(grown - resident)),
        ("resident_kib", resident / 1024.0),
        ("resident_sum_kib", each / 1024.0),
        // With the client's and the server's own sockets, as in the direct connection's figure.
        (
            "slab_kib_per_session",
            per_session(kernel.slab_bytes - memory.slab_bytes),
        ),
    ];
    if let Some(offloaded) = fresh
        .status()
        .and_then(|s| s.pointer("/sessions/offloaded")?.as_f64())
    {
        figures.push(("offloaded_sessions", offloaded));
    }
    drop(list);
    Ok(figures)
}

/// What the kernel holds when the reader has stopped and the writer pushes.
fn stopped(place: &Place, whole_seconds: Option<f64>) -> Result<Vec<(&'static str, f64)>> {
    const LONGEST_S: f64 = 20.0;
    /// Nothing moved for so long: it is over, unless the caller wants to see every second.
    const STALLED: Duration = Duration::from_secs(3);
    let mib = |bytes: f64| bytes / f64::from(1 << 20);
    let base = settled_memory()?;
    let user = machine::user_memory(&place.proxy.processes())?.0;
    let writer = Writer::start(place.proxy.address(STOPPING))?;
    let reader = place
        .peers
        .stopped
        .recv_timeout(Duration::from_secs(10))
        .context("the server never got a byte to read")?;
    let swallowed = || writer.pushed_bytes().saturating_sub(reader.read_bytes) as f64;

    let begun = Instant::now();
    let (mut last, mut moved) = (swallowed(), begun);
    let (mut tcp_peak, mut taken) = (0.0, Vec::new());
    while begun.elapsed().as_secs_f64() < whole_seconds.unwrap_or(LONGEST_S) {
        std::thread::sleep(Duration::from_millis(100));
        let memory = Memory::now()?;
        tcp_peak = f64::max(tcp_peak, memory.tcp_bytes - base.tcp_bytes);
        taken.push(base.available_bytes - memory.available_bytes);
        if swallowed() > last {
            (last, moved) = (swallowed(), Instant::now());
        }
        // The machine is to survive a proxy without a bound.
        if last > 0.25 * base.available_bytes || (whole_seconds.is_none() && moved.elapsed() > STALLED) {
            break;
        }
    }
    let seconds = begun.elapsed().as_secs_f64();
    let grown = machine::user_memory(&place.proxy.processes())?.0 - user;
    // The last second, because such figures waver.
    let from = taken.len().saturating_sub(10);
    let tail = &mut taken[from..];
    tail.sort_by(f64::total_cmp);
    let taken = tail[tail.len() / 2] - grown;
    Ok(vec![
        ("swallowed_mib", mib(last)),
        ("kernel_mib", mib(taken)),
        ("tcp_mib", mib(tcp_peak)),
        ("stopped_s", seconds),
    ])
}

/// The machine's memory when what the last run left behind has been freed.
fn settled_memory() -> Result<Memory> {
    let mut last = Memory::now()?;
    for _ in 0..15 {
        std::thread::sleep(Duration::from_millis(200));
        let now = Memory::now()?;
        let change = (now.available_bytes - last.available_bytes).abs();
        last = now;
        if change < 512.0 * 1024.0 {
            break;
        }
    }
    Ok(last)
}
