//! What the kernel says about the machine, from `/proc`: CPU time, memory, versions. Reads only.

use std::collections::HashSet;
use std::process::Command;

use anyhow::{Context, Result};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::{Value, json};

use crate::contenders::{CULVERT, find};

/// `/proc` counts CPU time in ticks of this length on every architecture.
const TICKS_PER_SECOND: f64 = 100.0;

/// CPU time since boot.
#[derive(Debug, Clone, Copy)]
pub struct Cpu {
    /// Of the whole machine: programs, kernel, interrupts.
    pub busy_s: f64,
    /// What the hypervisor gave to others.
    pub stolen_s: f64,
    /// Of programs that have nothing to do with this one.
    pub foreign_s: f64,
}

impl Cpu {
    /// Reads the counters.
    pub fn now() -> Result<Cpu> {
        let text = read("/proc/stat")?;
        let line = text.lines().next().unwrap_or_default();
        let ticks: Vec<f64> = line
            .split_whitespace()
            .skip(1)
            .filter_map(|n| n.parse().ok())
            .collect();
        anyhow::ensure!(ticks.len() >= 8, "/proc/stat begins with {line:?}");
        // user nice system idle iowait irq softirq steal
        let busy = ticks[0] + ticks[1] + ticks[2] + ticks[5] + ticks[6];
        Ok(Cpu {
            busy_s: busy / TICKS_PER_SECOND,
            stolen_s: ticks[7] / TICKS_PER_SECOND,
            foreign_s: foreign_ticks() / TICKS_PER_SECOND,
        })
    }

    /// What was used since `earlier`.
    pub fn since(self, earlier: Cpu) -> Cpu {
        Cpu {
            busy_s: self.busy_s - earlier.busy_s,
            stolen_s: self.stolen_s - earlier.stolen_s,
            foreign_s: (self.foreign_s - earlier.foreign_s).max(0.0),
        }
    }
}

/// Ticks of all processes except the kernel's threads, this one and its descendants, with what their ended
/// children used.
fn foreign_ticks() -> f64 {
    let mut processes = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else {
            continue;
        };
        // The command in parentheses may contain anything; after it come state, parent, and so on.
        let Some((_, rest)) = stat.rsplit_once(") ") else {
            continue;
        };
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let parent: u32 = fields.get(1).and_then(|n| n.parse().ok()).unwrap_or(0);
        let ticks: f64 = fields
            .iter()
            .skip(11)
            .take(4)
            .filter_map(|n| n.parse::<f64>().ok())
            .sum();
        processes.push((pid, parent, ticks));
    }
    // 2 is kthreadd, the parent of the kernel's threads.
    let mut own = HashSet::from([2, std::process::id()]);
    loop {
        let before = own.len();
        for (pid, parent, _) in &processes {
            if own.contains(parent) {
                own.insert(*pid);
            }
        }
        if own.len() == before {
            break;
        }
    }
    // Ancestors gather the time of this program itself only once it has ended.
    processes
        .iter()
        .filter(|(pid, ..)| !own.contains(pid))
        .map(|(.., ticks)| ticks)
        .sum()
}

/// Memory of the whole machine.
#[derive(Debug, Clone, Copy)]
pub struct Memory {
    /// What programs could still get, with the free pages that each CPU keeps for itself: tens of megabytes after a
    /// busy moment, which `MemAvailable` counts as used.
    pub available_bytes: f64,
    /// The kernel's small objects: sockets among them.
    pub slab_bytes: f64,
    /// What TCP has charged to its sockets.
    pub tcp_bytes: f64,
}

impl Memory {
    /// Reads the figures.
    pub fn now() -> Result<Memory> {
        let meminfo = read("/proc/meminfo")?;
        let sockstat = read("/proc/net/sockstat")?;
        let pages: f64 = sockstat
            .lines()
            .find_map(|line| line.strip_prefix("TCP:"))
            .and_then(|line| line.split_whitespace().last()?.parse().ok())
            .context("/proc/net/sockstat has no TCP memory")?;
        let page_bytes = kibibytes(&read("/proc/self/smaps")?, "KernelPageSize")?;
        let zones = read("/proc/zoneinfo")?;
        let kept_by_cpus: f64 = zones
            .lines()
            .filter_map(|line| line.trim().strip_prefix("count:")?.trim().parse::<f64>().ok())
            .sum();
        Ok(Memory {
            available_bytes: kibibytes(&meminfo, "MemAvailable")? + kept_by_cpus * page_bytes,
            slab_bytes: kibibytes(&meminfo, "Slab")?,
            tcp_bytes: pages * page_bytes,
        })
    }
}

/// User-space memory of some processes together, in bytes: shared pages counted once, and counted in each.
pub fn user_memory(processes: &[i32]) -> Result<(f64, f64)> {
    let (mut once, mut each) = (0.0, 0.0);
    for pid in processes {
        let rollup = read(&format!("/proc/{pid}/smaps_rollup"))?;
        once += kibibytes(&rollup, "Pss")?;
        each += kibibytes(&rollup, "Rss")?;
    }
    Ok((once, each))
}

/// The value of the first line `key: 12 kB`, in bytes.
fn kibibytes(text: &str, key: &str) -> Result<f64> {
    text.lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok())
        .map(|n| n * 1024.0)
        .with_context(|| format!("no {key} in /proc"))
}

fn read(path: &str) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("failed to read {path}"))
}

/// Thousands of sessions need thousands of descriptors.
pub fn raise_descriptor_limit() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("failed to raise the limit of open descriptors")
}

/// What the figures depend on.
pub fn describe() -> Value {
    let first_line = |path: &str, key: &str| {
        read(path).ok().and_then(|text| {
            let line = text.lines().find(|line| line.starts_with(key))?;
            Some(
                line.split_once(':')
                    .map_or(line, |(_, value)| value)
                    .trim()
                    .to_owned(),
            )
        })
    };
    json!({
        "kernel": kernel(),
        "cpus": std::thread::available_parallelism().map(usize::from).unwrap_or(0),
        "cpu_model": first_line("/proc/cpuinfo", "model name"),
        "memory": first_line("/proc/meminfo", "MemTotal"),
        "versions": {
            "culvert": version(CULVERT, "-V"),
            "nginx": version("nginx", "-v"),
            "haproxy": version("haproxy", "-v"),
            "iperf3": version("iperf3", "-v"),
        },
        "arguments": std::env::args().skip(1).collect::<Vec<_>>(),
    })
}

/// The kernel's version as it was released: what a host's owner writes behind it says nothing to others.
fn kernel() -> Option<String> {
    let release = read("/proc/sys/kernel/osrelease").ok()?;
    release.trim().split('-').next().map(str::to_owned)
}

fn version(program: &str, argument: &str) -> Option<String> {
    let output = Command::new(find(program)?).arg(argument).output().ok()?;
    // nginx writes its version to stderr.
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).trim().to_owned();
    let first_only = program != CULVERT;
    // -V names the kernel as well.
    let full = read("/proc/sys/kernel/osrelease").unwrap_or_default();
    Some(if first_only {
        text.lines().next().unwrap_or_default().to_owned()
    } else {
        text.replace(full.trim(), &kernel()?)
    })
}
