//! The long streams: what each of its two ends does, decided by the stream's number alone, and whether what became of
//! both is what TCP owes them.

use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::super::{Ending, patient};
use super::ledger::{Fault, Ledger};

/// Which of a stream's ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Connects to the proxy.
    Client,
    /// Is connected to by the proxy.
    Upstream,
}

impl Side {
    /// Both of them.
    pub const BOTH: [Side; 2] = [Side::Client, Side::Upstream];

    /// The one at the other end.
    pub fn other(self) -> Side {
        match self {
            Side::Client => Side::Upstream,
            Side::Upstream => Side::Client,
        }
    }
}

/// What carries a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// The kernel.
    Kernel,
    /// The kernel, and its sources are held back early.
    Gated,
    /// The worker.
    Relayed,
}

impl Lane {
    /// All of them, in the order of a load's listeners.
    pub const ALL: [Lane; 3] = [Lane::Kernel, Lane::Gated, Lane::Relayed];

    /// Lines of its server's table.
    pub fn lines(self) -> &'static str {
        match self {
            Lane::Kernel => "",
            Lane::Gated => "ebpf_backlog_size = \"64k\"",
            Lane::Relayed => "ebpf_enable = false",
        }
    }
}

/// How a stream behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A little all the time, both ways.
    Steady,
    /// Much at once, then nothing.
    Bursty,
    /// Nothing for seconds.
    Idle,
    /// This side reads more slowly than the other writes.
    SlowReader(Side),
    /// This side reads nothing for more than a second, again and again.
    Stopping(Side),
    /// This side ends its own direction early.
    HalfClosed(Side),
}

/// What one end does until it is told to finish: it writes `piece` bytes each `every`, and reads.
#[derive(Debug, Clone, Copy)]
pub struct Habit {
    /// Bytes that become due at once.
    pub piece: usize,
    /// The time between two pieces.
    pub every: Duration,
    /// How much it reads at a time and how often; None: what is there.
    pub read: Option<(usize, Duration)>,
    /// It ends its direction after so many bytes.
    pub bytes: Option<u64>,
    /// A receive buffer of its own size.
    pub receive_buffer: Option<usize>,
}

fn writes(piece: usize, milliseconds: u64) -> Habit {
    Habit {
        piece,
        every: Duration::from_millis(milliseconds),
        read: None,
        bytes: None,
        receive_buffer: None,
    }
}

impl Kind {
    /// The kind and the lane of the stream with this number: every twenty streams hold all of them.
    pub fn of(number: u64) -> (Kind, Lane) {
        match number % 20 {
            0..=6 => (Kind::Steady, Lane::Kernel),
            7 => (Kind::Steady, Lane::Relayed),
            8..=10 => (Kind::Bursty, Lane::Kernel),
            11..=13 => (Kind::Idle, Lane::Kernel),
            14 => (Kind::SlowReader(Side::Client), Lane::Gated),
            15 => (Kind::SlowReader(Side::Upstream), Lane::Gated),
            16 => (Kind::Stopping(Side::Client), Lane::Gated),
            17 => (Kind::Stopping(Side::Upstream), Lane::Gated),
            18 => (Kind::HalfClosed(Side::Client), Lane::Kernel),
            _ => (Kind::HalfClosed(Side::Upstream), Lane::Kernel),
        }
    }

    /// What an end of this kind does.
    pub fn habit(self, side: Side) -> Habit {
        match self {
            Kind::Steady => writes(4096, 50),
            Kind::Bursty => writes(160 * 1024, if side == Side::Client { 900 } else { 700 }),
            Kind::Idle => writes(512, if side == Side::Client { 2500 } else { 3100 }),
            Kind::SlowReader(slow) if slow == side => Habit {
                read: Some((8 * 1024, Duration::from_millis(50))),
                receive_buffer: Some(32 * 1024),
                ..writes(1024, 100)
            },
            Kind::Stopping(stopping) if stopping == side => Habit {
                read: Some((4 << 20, Duration::from_millis(1700))),
                ..writes(1024, 100)
            },
            Kind::SlowReader(_) | Kind::Stopping(_) => writes(24 * 1024, 50),
            // Late enough that the session is in the kernel by then, on a machine that is busy too.
            Kind::HalfClosed(ending) if ending == side => Habit {
                bytes: Some(160 * 1024),
                ..writes(4096, 50)
            },
            Kind::HalfClosed(_) => writes(4096, 50),
        }
    }

    /// The longest that its readers may have to wait for a byte while the stream goes on.
    pub fn longest_gap(self) -> Option<Duration> {
        (self == Kind::Steady).then_some(Duration::from_secs(3))
    }
}

/// What became of one end.
#[derive(Debug, Clone, Copy)]
pub struct Outcome {
    /// Bytes that its socket took.
    pub written: u64,
    /// It ended its direction after all of them.
    pub ended: bool,
    /// Right bytes that it read.
    pub received: u64,
    /// How its reading ended.
    pub ending: Ending,
    /// Where the first wrong byte stood.
    pub wrong_at: Option<u64>,
    /// The longest wait between two reads that brought something.
    pub longest_gap: Duration,
    /// When it was over.
    pub over: Instant,
}

/// One long stream.
#[derive(Debug)]
pub struct Stream {
    /// Its number.
    pub id: u64,
    /// How it behaves.
    pub kind: Kind,
    /// What carries it.
    pub lane: Lane,
    /// It ends by itself so long after its beginning; None: when the load is told to finish.
    pub lifetime: Option<Duration>,
    /// When it had reached its upstream.
    pub opened: OnceLock<Instant>,
    outcomes: [Mutex<Option<Outcome>>; 2],
}

impl Stream {
    /// A stream that does not stand yet.
    pub fn new(id: u64, kind: Kind, lane: Lane, lifetime: Option<Duration>) -> Stream {
        Stream {
            id,
            kind,
            lane,
            lifetime,
            opened: OnceLock::new(),
            outcomes: Default::default(),
        }
    }

    /// The seed of what this side writes.
    pub fn seed(&self, side: Side) -> u64 {
        0x6f75_746c_6976_6500 + 2 * self.id + side as u64
    }

    /// Says what became of one end.
    pub fn is_over(&self, side: Side, outcome: Outcome) {
        *self.outcomes[side as usize]
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(outcome);
    }

    /// What became of it; None while it lives, or if it never was.
    pub fn outcome(&self, side: Side) -> Option<Outcome> {
        *self.outcomes[side as usize]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether both ends stand.
    pub fn is_open(&self) -> bool {
        self.opened.get().is_some() && Side::BOTH.iter().all(|side| self.outcome(*side).is_none())
    }

    /// Bytes that both sides wrote, by side; each client names its stream first.
    pub fn written(&self) -> [u64; 2] {
        Side::BOTH.map(|side| {
            let header = if side == Side::Client {
                super::fleet::HEADER
            } else {
                0
            };
            header as u64 + self.outcome(side).map_or(0, |outcome| outcome.written)
        })
    }

    /// Books what became of it. A wrong byte and a clean end of half a stream are never excused.
    pub fn judge(&self, ledger: &Ledger) {
        let outcomes = Side::BOTH.map(|side| self.outcome(side));
        let name = format!("stream {} ({:?}, {:?})", self.id, self.kind, self.lane);
        let age = |at: Instant| {
            self.opened
                .get()
                .map(|opened| at.saturating_duration_since(*opened))
        };
        let mut reset_at: Option<Instant> = None;
        let mut faults = 0;
        let mut wrong = |fault, text| {
            faults += 1;
            ledger.wrong(fault, text);
        };
        for side in Side::BOTH {
            let Some(outcome) = outcomes[side as usize] else {
                continue;
            };
            let (sent, ended) =
                outcomes[side.other() as usize].map_or((0, false), |other| (other.written, other.ended));
            let what = || format!("{name}, {side:?}, after {:?}: {outcome:?}", age(outcome.over));
            if outcome.wrong_at.is_some() {
                wrong(Fault::WrongByte, what());
                continue;
            }
            match outcome.ending {
                Ending::Fin if !ended || outcome.received != sent => {
                    wrong(
                        Fault::Truncated,
                        format!("{}; the writer: {sent} bytes, ended: {ended}", what()),
                    );
                }
                // The other direction had ended; this end learns of the reset when it writes.
                Ending::Fin if !outcome.ended => {
                    reset_at = Some(reset_at.map_or(outcome.over, |at| at.min(outcome.over)));
                }
                Ending::Fin => {}
                Ending::Reset => {
                    reset_at = Some(reset_at.map_or(outcome.over, |at| at.min(outcome.over)));
                    if outcome.received > sent && outcomes[side.other() as usize].is_some() {
                        wrong(Fault::WrongByte, format!("{}; the writer: {sent} bytes", what()));
                    }
                }
                Ending::Silent | Ending::Enough => wrong(Fault::Stalled, what()),
            }
            if self
                .kind
                .longest_gap()
                .is_some_and(|gap| outcome.longest_gap > patient(gap))
            {
                wrong(
                    Fault::Late,
                    format!("no byte for {:?}: {}", outcome.longest_gap, what()),
                );
            }
        }
        match reset_at {
            Some(at) => {
                // What the worker copies may stand in its memory when it is killed.
                let kept = (self.lane != Lane::Relayed)
                    .then_some(self.opened.get())
                    .flatten();
                if ledger.excuses_reset(kept.copied(), at) {
                    ledger.excused("streams");
                } else {
                    ledger.wrong(Fault::Reset, format!("{name}, {:?} old: {outcomes:?}", age(at)));
                }
            }
            None if outcomes.iter().any(Option::is_none) => {
                ledger.wrong(Fault::Stalled, format!("{name} has not stood: {outcomes:?}"));
            }
            None if faults == 0 => ledger.right("streams"),
            None => {}
        }
    }
}
