//! Looks at the status and at the master's children all the while: no counter may fall, the status must be there, and
//! a worker of an old generation must be gone soon. And at the clock: a machine that stands still proves nothing.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::super::{Flag, Proxy, Status, patient, process};
use super::ledger::{Fault, Ledger};

/// An old worker is gone so soon after its successors have taken over.
pub const GONE_WITHIN: Duration = Duration::from_secs(1);
const PERIOD: Duration = Duration::from_millis(50);
/// A thread that is woken so much too late was held up by more than its neighbours.
const HELD_UP: Duration = Duration::from_millis(30);

/// What only rises, as keys of the document's top level.
const COUNTERS: [&str; 8] = [
    "generation",
    "worker_restarts",
    "reloads",
    "bytes",
    "pauses",
    "fallbacks",
    "closes",
    "log_lines_dropped",
];

/// A thread that looks.
#[derive(Debug)]
pub struct Watch {
    stop: Arc<Flag>,
    thread: JoinHandle<Seen>,
    clock: JoinHandle<()>,
}

/// What it has seen.
#[derive(Debug, Clone, Copy, Default)]
pub struct Seen {
    /// Status documents.
    pub documents: u64,
    /// The longest time that a worker outlived its generation.
    pub outlived: Duration,
    /// Workers of old generations.
    pub old_workers: usize,
}

impl Watch {
    /// Begins to look.
    pub fn start(proxy: &Proxy, ledger: &Arc<Ledger>) -> Watch {
        let stop = Arc::<Flag>::default();
        let mut eyes = Eyes {
            address: proxy.status_address(),
            master: proxy.pid(),
            ledger: Arc::clone(ledger),
            counters: BTreeMap::new(),
            workers: BTreeMap::new(),
            seen: Seen::default(),
        };
        let (stopped, ledger) = (Arc::clone(&stop), Arc::clone(ledger));
        let clock = std::thread::spawn(move || {
            while !stopped.is_up() {
                let begin = Instant::now();
                std::thread::sleep(PERIOD);
                let late = begin.elapsed().saturating_sub(PERIOD);
                if late > HELD_UP {
                    ledger.stood_still(late);
                }
            }
        });
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            while !stopped.is_up() {
                eyes.look();
                std::thread::sleep(PERIOD);
            }
            eyes.seen
        });
        Watch { stop, thread, clock }
    }

    /// Ends it.
    pub fn finish(self) -> Seen {
        self.stop.raise();
        self.clock.join().expect("the clock's thread");
        self.thread.join().expect("the watching thread")
    }
}

#[derive(Debug)]
struct Known {
    generation: u64,
    /// Since when another generation serves.
    old_since: Option<Instant>,
    told: bool,
}

struct Eyes {
    address: SocketAddr,
    master: i32,
    ledger: Arc<Ledger>,
    counters: BTreeMap<String, u64>,
    workers: BTreeMap<i32, Known>,
    seen: Seen,
}

impl Eyes {
    fn look(&mut self) {
        let begin = Instant::now();
        match Status::fetch(self.address) {
            Ok(status) => {
                self.seen.documents += 1;
                self.counters_must_not_fall(&status);
                self.know_workers(&status);
            }
            Err(_) if self.ledger.killed_between(begin, Instant::now()) => {}
            Err(e) => self.ledger.wrong(Fault::Refused, e),
        }
        let alive: Vec<i32> = process::children(self.master)
            .into_iter()
            .filter(|pid| process::is_alive(*pid))
            .collect();
        self.workers.retain(|pid, _| alive.contains(pid));
        let now = Instant::now();
        for (pid, worker) in &mut self.workers {
            let Some(since) = worker.old_since else { continue };
            self.seen.outlived = self.seen.outlived.max(now - since);
            let limit = patient(GONE_WITHIN) + self.ledger.standstill_between(since, now);
            if now - since > limit && !worker.told && !self.ledger.lets_workers_stay() {
                worker.told = true;
                self.ledger.wrong(
                    Fault::OldWorker,
                    format!("process {pid} of generation {} lives on", worker.generation),
                );
            }
        }
    }

    fn know_workers(&mut self, status: &Status) {
        let now = Instant::now();
        let workers = status.json()["workers"].as_array().into_iter().flatten();
        for worker in workers {
            let number = |key: &str| worker[key].as_u64();
            let (Some(pid), Some(generation)) = (number("pid"), number("generation")) else {
                continue;
            };
            let pid = i32::try_from(pid).expect("a process id");
            self.workers.entry(pid).or_insert(Known {
                generation,
                old_since: None,
                told: false,
            });
        }
        let serving = status.generation();
        for worker in self.workers.values_mut() {
            if worker.generation < serving && worker.old_since.is_none() {
                worker.old_since = Some(now);
                self.seen.old_workers += 1;
            }
        }
    }

    fn counters_must_not_fall(&mut self, status: &Status) {
        let mut found = BTreeMap::new();
        for key in COUNTERS {
            flatten(key, &status.json()[key], &mut found);
        }
        for key in ["total", "total_offloaded"] {
            flatten(
                &format!("sessions.{key}"),
                &status.json()["sessions"][key],
                &mut found,
            );
        }
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        for listener in list(&status.json()["listeners"]) {
            let name = format!("listener {}", listener["address"]);
            for key in ["accepted", "bytes"] {
                flatten(&format!("{name}.{key}"), &listener[key], &mut found);
            }
        }
        for group in list(&status.json()["upstreams"]) {
            for peer in list(&group["peers"]) {
                let name = format!("peer {} of {}", peer["address"], group["name"]);
                for key in ["connected", "connect_failures", "bytes"] {
                    flatten(&format!("{name}.{key}"), &peer[key], &mut found);
                }
            }
        }
        for (key, value) in found {
            let before = self.counters.insert(key.clone(), value).unwrap_or(0);
            if value < before {
                self.ledger
                    .wrong(Fault::CounterFell, format!("{key}: from {before} to {value}"));
            }
        }
    }
}

/// Every number below a value, by its path.
fn flatten(path: &str, value: &Value, into: &mut BTreeMap<String, u64>) {
    if let Some(number) = value.as_u64() {
        into.insert(path.to_owned(), number);
    }
    for (key, inner) in value.as_object().into_iter().flatten() {
        flatten(&format!("{path}.{key}"), inner, into);
    }
}
