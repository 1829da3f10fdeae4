//! A load that notices everything: long streams of many habits with every byte checked in both directions, short
//! connections at a steady rate, and an eye on the status and the processes. Afterwards all of it is accounted for, and
//! a test that disturbed the program meanwhile learns what it broke.
//!
//! | variable | effect |
//! |---|---|
//! | `TEST_OUTLIVE_SECONDS` | how long each disturbance lasts |
//! | `TEST_OUTLIVE_STREAMS` | long streams |
//! | `TEST_OUTLIVE_SHORT` | short connections a second |

mod fleet;
mod ledger;
mod shorts;
mod stream;
mod watch;

use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub use fleet::Fleet;
pub use ledger::{Fault, KEPT_AFTER, Ledger};
pub use shorts::Shorts;
pub use stream::{Kind, Lane, Side, Stream};
pub use watch::Watch;

use super::random::Random;
use super::{Flag, PATIENCE, Plan, Proxy, Status, Upstream, patient, process, within};

/// How much load, and for how long.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// Long streams.
    pub streams: u64,
    /// Short connections a second.
    pub shorts: u64,
    /// How long the disturbance lasts.
    pub lasts: Duration,
}

impl Sizes {
    /// What the environment says, or what fits into a run of all tests.
    pub fn get() -> Sizes {
        Sizes {
            streams: from_environment("TEST_OUTLIVE_STREAMS", 40),
            shorts: from_environment("TEST_OUTLIVE_SHORT", 80),
            lasts: Duration::from_secs(from_environment("TEST_OUTLIVE_SECONDS", 4)),
        }
    }

    /// How long a proxy may run under such a load.
    pub fn lifetime(&self) -> Duration {
        self.lasts + Duration::from_secs(90)
    }
}

/// A whole number from the environment.
pub fn from_environment(name: &str, otherwise: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{name} must be a whole number")),
        Err(_) => otherwise,
    }
}

/// The load on one proxy.
#[derive(Debug)]
pub struct Load {
    /// The account.
    pub ledger: Arc<Ledger>,
    sizes: Sizes,
    fleet: Arc<Fleet>,
    fronts: Vec<SocketAddr>,
    short_front: SocketAddr,
    _short_upstream: Upstream<()>,
    before: Option<Status>,
    shorts: Option<Shorts>,
    watch: Option<Watch>,
    churn: Option<(Arc<Flag>, JoinHandle<()>)>,
}

impl Load {
    /// Adds the load's servers to a plan.
    pub fn new(plan: &mut Plan, sizes: Sizes) -> Load {
        let ledger = Arc::<Ledger>::default();
        let fleet = Fleet::new(&ledger);
        let server = |lane: &Lane| plan.server_with("127.0.0.1", fleet.upstream, lane.lines());
        let fronts = Lane::ALL.iter().map(server).collect();
        let short_upstream = shorts::upstream(&ledger);
        Load {
            short_front: plan.server(&short_upstream),
            _short_upstream: short_upstream,
            ledger,
            sizes,
            fleet: Arc::new(fleet),
            fronts,
            before: None,
            shorts: None,
            watch: None,
            churn: None,
        }
    }

    /// Opens the long streams, waits until all of them stand and are old enough to be kept, and begins the short
    /// connections.
    #[track_caller]
    pub fn begin(&mut self, proxy: &Proxy) {
        let before = proxy.status();
        let offloaded = "/sessions/total_offloaded";
        for number in 0..self.sizes.streams {
            let (kind, lane) = Kind::of(number);
            let opened = self.fleet.open(self.fronts[lane as usize], kind, lane, None);
            opened.unwrap_or_else(|e| panic!("opening stream {number}: {e}"));
        }
        let streams = self.fleet.streams();
        let stand = within(PATIENCE, || streams.iter().all(|s| s.opened.get().is_some()));
        assert!(stand, "not every stream has reached its upstream");
        let by_kernel = streams.iter().filter(|s| s.lane != Lane::Relayed).count() as u64;
        proxy.wait("the streams are offloaded", |s| {
            s.number(offloaded) - before.number(offloaded) == by_kernel
        });
        self.before = Some(before);
        self.watch = Some(Watch::start(proxy, &self.ledger));
        self.shorts = Some(Shorts::start(self.short_front, self.sizes.shorts, &self.ledger));
        std::thread::sleep(patient(KEPT_AFTER + Duration::from_millis(200)));
    }

    /// From now on streams of all ages up to four seconds come and go, so many a second.
    pub fn churn(&mut self, per_second: u64, seed: u64) {
        let stop = Arc::<Flag>::default();
        let (stopped, fleet, ledger) = (
            Arc::clone(&stop),
            Arc::clone(&self.fleet),
            Arc::clone(&self.ledger),
        );
        let front = self.fronts[Lane::Kernel as usize];
        let mut random = Random(seed);
        let thread = std::thread::spawn(move || {
            while !stopped.is_up() {
                let lifetime = Duration::from_millis(50 + random.below(4000));
                let begin = Instant::now();
                match fleet.open(front, Kind::Steady, Lane::Kernel, Some(lifetime)) {
                    Ok(_) => {}
                    // It stood, was accepted, and was reset before this thread looked.
                    Err(e)
                        if e.kind() == std::io::ErrorKind::ConnectionReset
                            && ledger.killed_between(begin, Instant::now()) =>
                    {
                        ledger.excused("streams");
                    }
                    Err(e) => ledger.wrong(Fault::Refused, format!("a stream: {e}")),
                }
                std::thread::sleep(Duration::from_millis(1000 / per_second));
            }
        });
        self.churn = Some((stop, thread));
    }

    /// Calls `disturb` until the time is over, `every` so often.
    pub fn meanwhile(&self, every: Duration, mut disturb: impl FnMut()) {
        let end = Instant::now() + self.sizes.lasts;
        let mut next = Instant::now();
        while next < end {
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
            disturb();
            next = (next + every).max(Instant::now());
        }
        std::thread::sleep(every);
    }

    /// Long streams that stand now, as the load sees it.
    pub fn open_streams(&self) -> u64 {
        self.fleet.streams().iter().filter(|s| s.is_open()).count() as u64
    }

    /// Lets everything end in good order and accounts for all of it. What must add up is compared to the byte where
    /// nothing was killed.
    #[track_caller]
    pub fn finish(mut self, proxy: &Proxy, what: &str) {
        if let Some((stop, thread)) = self.churn.take() {
            stop.raise();
            thread.join().expect("the thread that opens streams");
        }
        let shorts = self.shorts.take().expect("the load has begun").finish();
        self.the_open_ones_are_counted(proxy);
        let seen = self.watch.take().expect("the load has begun").finish();
        let fleet = Arc::into_inner(self.fleet).expect("no other thread opens streams");
        let streams = fleet.finish();
        for stream in &streams {
            stream.judge(&self.ledger);
        }
        self.ledger.note(format!(
            "{} documents, {} workers of old generations, gone after {:?}; slowest short connection {:?}",
            seen.documents, seen.old_workers, seen.outlived, shorts.slowest
        ));
        let before = self.before.expect("the load has begun");
        let books = Books {
            ledger: &self.ledger,
            before: &before,
            streams: &streams,
            short_bytes: shorts.bytes,
        };
        books.must_balance(proxy);
        self.ledger.close(what);
    }

    fn the_open_ones_are_counted(&self, proxy: &Proxy) {
        let mut last = (0, 0);
        let counted = within(PATIENCE, || {
            last = (proxy.status().active(), self.open_streams());
            last.0 == last.1
        });
        if !counted {
            let (active, open) = last;
            self.ledger.wrong(
                Fault::WrongFigure,
                format!("sessions.active is {active}, and {open} streams are open"),
            );
        }
    }
}

/// The status at the end against what the load has counted itself.
struct Books<'a> {
    ledger: &'a Ledger,
    before: &'a Status,
    streams: &'a [Arc<Stream>],
    short_bytes: u64,
}

impl Books<'_> {
    fn must_balance(&self, proxy: &Proxy) {
        let clean = self.ledger.is_clean();
        let mut after = proxy.status();
        let rest = within(PATIENCE, || {
            after = proxy.status();
            after.active() == 0 && after.slots_used() == 0
        });
        if !rest {
            let workers = after.workers();
            self.wrong(format!(
                "sessions or places are left when all has ended: {workers:?}"
            ));
        }
        let mut kept = Vec::new();
        let let_go = within(PATIENCE, || {
            kept = process::connections(proxy.pid());
            kept.is_empty()
        });
        if !let_go {
            self.wrong(format!(
                "the master still has connections when all has ended: {kept:?}"
            ));
        }
        let since = |pointer: &str| after.number(pointer).saturating_sub(self.before.number(pointer));
        for reason in [
            "integrity",
            "resource",
            "no_route",
            "name_failed",
            "connect_failed",
            "idle_timeout",
            "shutdown",
        ] {
            let count = since(&format!("/closes/{reason}"));
            if count != 0 {
                self.wrong(format!("{count} sessions were closed for the reason {reason}"));
            }
        }
        let written = |lane: &dyn Fn(Lane) -> bool, side: Side| -> u64 {
            let streams = self.streams.iter().filter(|s| lane(s.lane));
            streams.map(|s| s.written()[side as usize]).sum()
        };
        let received = |side: Side| -> u64 {
            let streams = self.streams.iter().filter(|s| s.lane == Lane::Kernel);
            streams.filter_map(|s| s.outcome(side)).map(|o| o.received).sum()
        };
        for (way, from) in [("to_upstream", Side::Client), ("to_downstream", Side::Upstream)] {
            let (sockmap, relay) = (
                since(&format!("/bytes/sockmap/{way}")),
                since(&format!("/bytes/relay/{way}")),
            );
            // What only the kernel may carry.
            let least = received(from.other());
            if sockmap < least {
                self.wrong(format!(
                    "{way}: the kernel counts {sockmap} bytes and has delivered {least}"
                ));
            }
            // What user space may carry: its own streams, the short ones, and the rest of a source that ends while it
            // is held back.
            let most = written(&|lane| lane != Lane::Kernel, from) + self.short_bytes;
            if clean && self.ledger.excuses() == 0 {
                if relay > most {
                    self.wrong(format!(
                        "{way}: user space has copied {relay} bytes, at most {most} are its own"
                    ));
                }
                let all = written(&|_| true, from) + self.short_bytes;
                if sockmap + relay != all {
                    self.wrong(format!(
                        "{way}: {sockmap} + {relay} bytes are counted, {all} were carried"
                    ));
                }
            }
            self.ledger
                .note(format!("{way}: the kernel {sockmap} bytes, user space {relay}"));
        }
        let (whole, excused) = (
            self.ledger.count("streams") + self.ledger.count("short"),
            self.ledger.excuses(),
        );
        let (total, finished) = (since("/sessions/total"), since("/closes/finished"));
        // A worker that is killed when it has just ended a session whole, and not counted it yet, has one that died with it.
        let uncounted = self.ledger.kills() as u64;
        if total < whole || finished + uncounted < whole || (clean && total > whole + excused) {
            self.wrong(format!(
                "{total} sessions are counted, {finished} of them finished; {whole} were whole, {excused} cut; closed: {}",
                after.json()["closes"]
            ));
        }
    }

    fn wrong(&self, text: String) {
        self.ledger.wrong(Fault::WrongFigure, text);
    }
}
