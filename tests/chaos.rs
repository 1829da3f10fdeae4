//! Reloads, kills, changing numbers of workers and upgrades mixed at random under load. The order follows from a seed
//! that the test prints.
//!
//! | variable | effect |
//! |---|---|
//! | `TEST_CHAOS_SEED` | the seed to begin with |
//! | `TEST_CHAOS` | which disturbances, such as `reload,kill`; all of them unless set |
//! | `TEST_OUTLIVE_...` | sizes, see `harness::load` |

use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use crate::harness::load::{Load, Sizes, from_environment};
use crate::harness::random::Random;
use crate::harness::turns::beside_others;
use crate::harness::{Plan, Proxy, Status};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// What may happen, each as often as the others.
const ALL: &str = "reload,kill,workers,connections,upgrade,burst,freeze";

struct Chaos<'a> {
    proxy: &'a Proxy,
    load: &'a Load,
    binary: &'a Path,
    random: Random,
    workers: u64,
    connections: u64,
    told: Vec<String>,
}

impl Chaos<'_> {
    fn one(&mut self, kinds: &[&str]) {
        let kind = kinds[self.random.below(kinds.len() as u64) as usize];
        let at = self.load.ledger.clock(Instant::now());
        self.told.push(format!("{at} {kind}"));
        match kind {
            "reload" => self.proxy.signal(Signal::SIGHUP),
            "kill" => self.kill_a_worker(),
            "workers" => {
                let count = 1 + self.random.below(4);
                self.told.push(count.to_string());
                self.set("worker_processes", self.workers, count);
                self.workers = count;
            }
            "connections" => {
                let count = 2000 + self.random.below(2000);
                self.set("worker_connections", self.connections, count);
                self.connections = count;
            }
            "upgrade" => {
                let new = self.binary.with_extension("new");
                crate::harness::program::copy(env!("CARGO_BIN_EXE_master"), &new);
                std::fs::rename(&new, self.binary).expect("putting the new binary in its place");
                self.proxy.signal(Signal::SIGUSR2);
            }
            // All at once, so that they meet each other halfway.
            "burst" => {
                self.proxy.signal(Signal::SIGHUP);
                std::thread::sleep(Duration::from_millis(self.random.below(30)));
                self.kill_a_worker();
                self.proxy.signal(Signal::SIGHUP);
            }
            "freeze" => self.freeze_a_worker(),
            other => panic!("TEST_CHAOS: there is no {other:?} in {ALL:?}"),
        }
    }

    /// Of the workers that there are at the moment, whatever generation they are of.
    fn a_worker(&mut self) -> Option<Pid> {
        let workers = Status::fetch(self.proxy.status_address()).ok()?.workers();
        let worker = &workers[self.random.below(workers.len() as u64) as usize];
        Some(Pid::from_raw(worker.pid))
    }

    fn kill_a_worker(&mut self) {
        if let Some(victim) = self.a_worker() {
            self.load.ledger.kill();
            // It may have gone by itself meanwhile.
            let _ = kill(victim, Signal::SIGKILL);
        }
    }

    /// A worker stands still while a reload passes it by.
    fn freeze_a_worker(&mut self) {
        if let Some(worker) = self.a_worker() {
            let frozen = kill(worker, Signal::SIGSTOP).is_ok();
            self.proxy.signal(Signal::SIGHUP);
            std::thread::sleep(Duration::from_millis(100 + self.random.below(200)));
            if frozen {
                let _ = kill(worker, Signal::SIGCONT);
            }
        }
    }

    fn set(&self, key: &str, from: u64, to: u64) {
        self.proxy
            .edit(&format!("{key} = {from}\n"), &format!("{key} = {to}\n"));
        self.proxy.signal(Signal::SIGHUP);
    }
}

#[test]
fn whatever_happens_to_workers_no_old_session_is_lost_and_none_ends_wrong() {
    let _beside = beside_others();
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let seed = from_environment("TEST_CHAOS_SEED", now.map_or(0, |now| now.as_nanos() as u64));
    let kinds = std::env::var("TEST_CHAOS").unwrap_or_else(|_| ALL.to_owned());
    let kinds: Vec<&str> = kinds.split(',').collect();
    eprintln!("TEST_CHAOS_SEED={seed} TEST_CHAOS={}", kinds.join(","));
    let mut sizes = Sizes::get();
    sizes.lasts = sizes.lasts.max(Duration::from_secs(5));
    let mut plan = Plan::new()
        .workers(2)
        .lifetime(sizes.lifetime())
        .global("error_log = { path = \"stderr\", level = \"warn\" }")
        .global("worker_connections = 2048");
    let binary = plan.file("culvert");
    crate::harness::program::copy(env!("CARGO_BIN_EXE_master"), &binary);
    plan = plan.binary(binary.clone());
    let mut load = Load::new(&mut plan, sizes);
    let proxy = plan.start();
    load.begin(&proxy);
    load.churn(15, seed);
    let mut chaos = Chaos {
        proxy: &proxy,
        load: &load,
        binary: &binary,
        random: Random(seed),
        workers: 2,
        connections: 2048,
        told: Vec::new(),
    };
    load.meanwhile(Duration::from_millis(350), || {
        let pause = chaos.random.below(300);
        std::thread::sleep(Duration::from_millis(pause));
        chaos.one(&kinds);
    });
    let (told, workers) = (chaos.told.join(", "), chaos.workers);
    load.ledger.note(format!("seed {seed}: {told}"));
    proxy.wait("the last configuration serves", |s| {
        s.workers().iter().filter(|w| !w.draining).count() as u64 == workers
    });
    load.finish(&proxy, "chaos");
}
