//! Reloads, kills, changing numbers of workers and upgrades mixed at random under load: as usual, where sessions are to go
//! with their listeners, and where the master has no room for all of them. And masters that are killed in a reload. The
//! order follows from a seed that the test prints.
//!
//! | variable | effect |
//! |---|---|
//! | `TEST_CHAOS_SEED` | the seed to begin with |
//! | `TEST_CHAOS` | which disturbances, such as `reload,kill`; those of the test unless set |
//! | `TEST_CHAOS_ROUNDS` | how often the master is killed |
//! | `TEST_OUTLIVE_...` | sizes, see `harness::load` |

use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crate::harness::load::{Fleet, Kind, Lane, Ledger, Load, Sizes, from_environment};
use crate::harness::random::Random;
use crate::harness::sockets::try_connect;
use crate::harness::turns::beside_others;
use crate::harness::{Ending, PATIENCE, Plan, Proxy, Status, Upstream, patient, receive, within};
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
    guests: Option<Guests>,
}

/// Sessions of a server that comes and goes.
struct Guests {
    address: SocketAddr,
    /// Its table, as long as it is not in the file.
    table: Option<String>,
    present: Vec<TcpStream>,
    /// Their server is gone.
    doomed: Vec<TcpStream>,
}

impl Guests {
    fn at(address: SocketAddr, proxy: &Proxy) -> Guests {
        let mut guests = Guests {
            address,
            table: None,
            present: Vec::new(),
            doomed: Vec::new(),
        };
        guests.come(proxy);
        guests
    }

    fn come(&mut self, proxy: &Proxy) {
        let mut made = Vec::new();
        let all = within(PATIENCE, || {
            made.extend(try_connect(self.address));
            made.len() == 4
        });
        assert!(all, "nothing listens on {}: {}", self.address, proxy.log());
        self.present.extend(made);
    }

    /// Takes the server out of the file, or puts it in again.
    fn move_server(&mut self, proxy: &Proxy, ledger: &Ledger) {
        match self.table.take() {
            Some(table) => {
                let text = std::fs::read_to_string(proxy.file()).expect("the configuration");
                std::fs::write(proxy.file(), text + &table).expect("writing the configuration");
                proxy.signal(Signal::SIGHUP);
                self.come(proxy);
            }
            None => {
                let text = std::fs::read_to_string(proxy.file()).expect("the configuration");
                let mut tables = text.split("[[server]]");
                let own = tables.find(|table| table.contains(&self.address.to_string()));
                let table = format!("[[server]]{}", own.expect("the server's table"));
                proxy.edit(&table, "");
                self.table = Some(table);
                proxy.signal(Signal::SIGHUP);
                self.present.iter().for_each(|_| ledger.excused("guests"));
                self.doomed.append(&mut self.present);
            }
        }
    }

    /// Those whose server is gone have been reset, once the file is in force. The others end.
    fn leave(self, proxy: &Proxy, ledger: &Ledger) {
        proxy.reload();
        for mut guest in self.doomed {
            assert_eq!(
                receive(&mut guest, 0).ending,
                Ending::Reset,
                "its listener is gone"
            );
        }
        self.present.iter().for_each(|_| ledger.excused("guests"));
    }
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
            "servers" => {
                let guests = self.guests.as_mut().expect("a server that comes and goes");
                guests.move_server(self.proxy, &self.load.ledger);
            }
            other => panic!("TEST_CHAOS: there is no {other:?} in {ALL:?}, and servers"),
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
            // It may have gone by itself meanwhile.
            let _ = self.load.ledger.killing(|| kill(victim, Signal::SIGKILL));
        }
    }

    /// A worker stands still while a reload passes it by.
    fn freeze_a_worker(&mut self) {
        if let Some(worker) = self.a_worker() {
            let since = Instant::now();
            let frozen = kill(worker, Signal::SIGSTOP).is_ok();
            self.proxy.signal(Signal::SIGHUP);
            std::thread::sleep(Duration::from_millis(100 + self.random.below(200)));
            if frozen {
                let _ = kill(worker, Signal::SIGCONT);
                // A worker does not go while it is frozen.
                self.load.ledger.stood_still(since.elapsed());
            }
        }
    }

    fn set(&self, key: &str, from: u64, to: u64) {
        self.proxy
            .edit(&format!("{key} = {from}\n"), &format!("{key} = {to}\n"));
        self.proxy.signal(Signal::SIGHUP);
    }
}

fn seed() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    from_environment("TEST_CHAOS_SEED", now.map_or(0, |now| now.as_nanos() as u64))
}

/// What else is unlike a usual run.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Odd {
    Nothing,
    /// `on_reload = "close"`: what loses its listener is reset, and nothing else.
    Close,
    /// The master may keep fewer sessions than there are.
    FewKept,
}

fn chaos(odd: Odd, kinds: &str) {
    let _beside = beside_others();
    let seed = seed();
    let kinds = std::env::var("TEST_CHAOS").unwrap_or_else(|_| kinds.to_owned());
    let kinds: Vec<&str> = kinds.split(',').collect();
    eprintln!("TEST_CHAOS_SEED={seed} TEST_CHAOS={}", kinds.join(","));
    let mut sizes = Sizes::get();
    if odd == Odd::Nothing {
        sizes.lasts = sizes.lasts.max(Duration::from_secs(5));
    }
    let mut plan = Plan::new()
        .workers(2)
        .lifetime(sizes.lifetime())
        .global("error_log = { path = \"stderr\", level = \"warn\" }");
    let echo = Upstream::echo("127.0.0.1");
    plan = match odd {
        Odd::Nothing => plan.global("worker_connections = 2048"),
        Odd::Close => plan
            .global("worker_connections = 2048")
            .stream("on_reload = \"close\""),
        Odd::FewKept => with_a_small_keeper(plan, &echo),
    };
    let guests = kinds.contains(&"servers").then(|| plan.server(&echo));
    let binary = plan.file("culvert");
    crate::harness::program::copy(env!("CARGO_BIN_EXE_master"), &binary);
    plan = plan.binary(binary.clone());
    let mut load = Load::new(&mut plan, sizes);
    let proxy = plan.start();
    if odd == Odd::FewKept {
        load.ledger.keeps_few();
    }
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
        guests: guests.map(|address| Guests::at(address, &proxy)),
    };
    load.meanwhile(Duration::from_millis(350), || {
        let pause = chaos.random.below(300);
        std::thread::sleep(Duration::from_millis(pause));
        chaos.one(&kinds);
    });
    let (told, workers, guests) = (chaos.told.join(", "), chaos.workers, chaos.guests);
    load.ledger.note(format!("seed {seed}: {told}"));
    proxy.wait("the last configuration serves", |s| {
        s.workers().iter().filter(|w| !w.draining).count() as u64 == workers
    });
    if let Some(guests) = guests {
        guests.leave(&proxy, &load.ledger);
    }
    load.finish(&proxy, "chaos");
}

/// The master has room for less than the load has: many listeners take descriptors of its, and it may not raise its limit.
fn with_a_small_keeper(plan: Plan, echo: &Upstream<()>) -> Plan {
    crate::harness::program::need("setpriv", "util-linux");
    let mut plan = plan.global("worker_connections = 110").launched_by(&[
        "setpriv",
        "--bounding-set=-sys_resource",
        "--",
        "prlimit",
        "--nofile=334",
    ]);
    for _ in 0..20 {
        plan.server(echo);
    }
    plan
}

#[test]
fn whatever_happens_to_workers_no_old_session_is_lost_and_none_ends_wrong() {
    chaos(Odd::Nothing, ALL);
}

#[test]
fn where_on_reload_is_close_only_sessions_whose_listener_goes_are_reset() {
    chaos(
        Odd::Close,
        "reload,kill,workers,upgrade,burst,freeze,servers,servers",
    );
}

#[test]
fn where_the_master_has_no_room_for_all_sessions_reloads_lose_none() {
    chaos(Odd::FewKept, "reload,reload,kill,upgrade,burst,freeze");
}

#[test]
fn a_master_that_is_killed_in_a_reload_leaves_no_stream_with_a_wrong_end() {
    const STREAMS: u64 = 20;
    let _beside = beside_others();
    let seed = seed();
    let rounds = from_environment("TEST_CHAOS_ROUNDS", 4);
    eprintln!("TEST_CHAOS_SEED={seed} TEST_CHAOS_ROUNDS={rounds}");
    let mut random = Random(seed);
    let ledger = Arc::<Ledger>::default();
    let fleet = Fleet::new(&ledger);
    let mut plan = Plan::new()
        .workers(2)
        .lifetime(Duration::from_secs(60 + 10 * rounds))
        .global("worker_connections = 2048");
    let fronts = Lane::ALL.map(|lane| plan.server_with("127.0.0.1", fleet.upstream, lane.lines()));
    let mut proxy = plan.start();
    for round in 0..rounds {
        let opened: Vec<_> = (0..STREAMS)
            .map(|number| {
                let (kind, lane) = Kind::of(number);
                let stream = fleet.open(fronts[lane as usize], kind, lane, None);
                stream.unwrap_or_else(|e| panic!("opening a stream in round {round}: {e}"))
            })
            .collect();
        let stand = || opened.iter().all(|stream| stream.opened.get().is_some());
        assert!(
            within(PATIENCE, stand),
            "not every stream has reached its upstream"
        );
        proxy.wait("most are kept", |s| s.number("/sessions/kept") >= STREAMS);
        // At every other reload the master has much to build.
        let size = |round: u64| format!("worker_connections = {}\n", 2048 + round / 2);
        proxy.edit(&size(round), &size(round + 1));
        let serves = || proxy.log().matches("generation 2 serves").count();
        let before = serves();
        proxy.signal(Signal::SIGHUP);
        if round % 2 == 0 {
            // Just when the old workers let their sessions go, so that nobody but the master has their sockets.
            let end = Instant::now() + patient(PATIENCE);
            while serves() == before && Instant::now() < end {}
        } else {
            std::thread::sleep(Duration::from_millis(random.below(60)));
        }
        ledger.grave_kill();
        proxy.signal(Signal::SIGKILL);
        proxy.wait_for_exit(PATIENCE).expect("the master is killed");
        let begin = Instant::now();
        proxy.start_again();
        ledger.note(format!("round {round}: served again after {:?}", begin.elapsed()));
    }
    let streams = fleet.finish();
    streams.iter().for_each(|stream| stream.judge(&ledger));
    proxy.settle();
    ledger.close("a master killed");
}
