//! What a load met: how often each thing happened, what was wrong with it, and when a worker was killed, because
//! that alone excuses a reset.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::super::patient;

/// From this age on a session outlives its worker. The program promises it for sessions older than a second; the rest
/// is for its batches, and for a machine that is busy with other tests.
pub const KEPT_AFTER: Duration = Duration::from_secs(2);
/// A reset that follows a kill is seen this soon.
const RESET_SEEN_WITHIN: Duration = Duration::from_secs(2);
/// How many faults are told in full.
const TOLD: usize = 40;

/// What may go wrong with a connection, or with the program around it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// A connection was refused, or could not be made for another reason.
    Refused,
    /// A connection was reset that had to live on.
    Reset,
    /// A byte was not the sender's.
    WrongByte,
    /// A stream ended cleanly before its last byte.
    Truncated,
    /// Nothing came any more, and no end.
    Stalled,
    /// It was right, and too late.
    Late,
    /// A counter of the status fell.
    CounterFell,
    /// The figures of the status are not what happened.
    WrongFigure,
    /// A worker outlived its generation.
    OldWorker,
    /// Anything else.
    Other,
}

#[derive(Debug, Default)]
struct Book {
    right: BTreeMap<&'static str, u64>,
    excused: BTreeMap<&'static str, u64>,
    faults: BTreeMap<Fault, u64>,
    told: Vec<String>,
    /// From when to when each was under way: `kill` may be called later than the clock is read.
    kills: Vec<(Instant, Option<Instant>)>,
    /// When whatever a worker or the master carried could go with it.
    grave_kills: Vec<Instant>,
    /// From when to when the load's own threads had no processor.
    standstills: Vec<(Instant, Instant)>,
    notes: Vec<String>,
}

/// The account of one load, shared by all its threads.
#[derive(Debug)]
pub struct Ledger {
    opened: Instant,
    keeps_few: AtomicBool,
    book: Mutex<Book>,
}

impl Default for Ledger {
    fn default() -> Ledger {
        Ledger {
            opened: Instant::now(),
            keeps_few: AtomicBool::new(false),
            book: Mutex::default(),
        }
    }
}

impl Ledger {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A moment as milliseconds since the account was opened.
    pub fn clock(&self, at: Instant) -> u128 {
        at.saturating_duration_since(self.opened).as_millis()
    }

    /// The master has no room to keep all sessions: those that it does not keep die with their worker, and cannot be
    /// moved at a reload.
    pub fn keeps_few(&self) {
        self.keeps_few.store(true, Ordering::Relaxed);
    }

    /// Whether a worker may stay for its sessions when it is of an old generation.
    pub fn lets_workers_stay(&self) -> bool {
        self.keeps_few.load(Ordering::Relaxed)
    }

    /// Something went as it should.
    pub fn right(&self, what: &'static str) {
        *self.book().right.entry(what).or_default() += 1;
    }

    /// How often that was.
    pub fn count(&self, what: &'static str) -> u64 {
        self.book().right.get(what).copied().unwrap_or(0)
    }

    /// Something ended in a reset that a killed worker excuses.
    pub fn excused(&self, what: &'static str) {
        *self.book().excused.entry(what).or_default() += 1;
    }

    /// How often that was, whatever it was.
    pub fn excuses(&self) -> u64 {
        self.book().excused.values().sum()
    }

    /// Something went wrong.
    pub fn wrong(&self, fault: Fault, text: String) {
        let mut book = self.book();
        *book.faults.entry(fault).or_default() += 1;
        if book.told.len() < TOLD {
            book.told.push(format!("{fault:?}: {text}"));
        }
    }

    /// Whether nothing has gone wrong so far.
    pub fn is_clean(&self) -> bool {
        self.book().faults.is_empty()
    }

    /// Something worth telling beside the counts.
    pub fn note(&self, text: String) {
        self.book().notes.push(text);
    }

    /// Kills a worker.
    pub fn killing<T>(&self, kill: impl FnOnce() -> T) -> T {
        let number = {
            let mut book = self.book();
            book.kills.push((Instant::now(), None));
            if self.keeps_few.load(Ordering::Relaxed) {
                book.grave_kills.push(Instant::now());
            }
            book.kills.len() - 1
        };
        let result = kill();
        self.book().kills[number].1 = Some(Instant::now());
        result
    }

    /// The master is about to be killed: that excuses every reset.
    pub fn grave_kill(&self) {
        self.book().grave_kills.push(Instant::now());
    }

    /// How many were.
    pub fn kills(&self) -> usize {
        self.book().kills.len()
    }

    /// Whether a worker was killed while something short was going on.
    pub fn killed_between(&self, begin: Instant, end: Instant) -> bool {
        let overlaps =
            |(from, to): &(Instant, Option<Instant>)| *from <= end && to.is_none_or(|to| begin <= to);
        self.book().kills.iter().any(overlaps)
    }

    /// The load's own threads had no processor for so long until now: nor can the program have had what it should.
    pub fn stood_still(&self, time: Duration) {
        let now = Instant::now();
        self.book().standstills.push((now - time, now));
    }

    /// How much of a time that was.
    pub fn standstill_between(&self, begin: Instant, end: Instant) -> Duration {
        let overlap =
            |(from, to): &(Instant, Instant)| end.min(*to).saturating_duration_since(begin.max(*from));
        self.book().standstills.iter().map(overlap).sum()
    }

    /// Whether a kill excuses that a session has been reset: it came just before, and the session was too young to be
    /// kept, or is of a kind that need not be (`opened` is None).
    pub fn excuses_reset(&self, opened: Option<Instant>, seen: Instant) -> bool {
        let (kills, grave_kills) = {
            let book = self.book();
            (book.kills.clone(), book.grave_kills.clone())
        };
        let just_before = |kill: Instant| kill <= seen && seen - kill < patient(RESET_SEEN_WITHIN);
        let is_young = |kill| {
            opened.is_none_or(|opened| {
                kill < opened + patient(KEPT_AFTER) + self.standstill_between(opened, kill)
            })
        };
        grave_kills.iter().any(|&kill| just_before(kill))
            || kills.iter().any(|&(kill, _)| just_before(kill) && is_young(kill))
    }

    /// Prints the account; panics if anything went wrong.
    #[track_caller]
    pub fn close(&self, what: &str) {
        let book = self.book();
        eprintln!(
            "{what}: right {:?}, excused {:?}, {} kills, faults {:?}",
            book.right,
            book.excused,
            book.kills.len(),
            book.faults
        );
        for note in &book.notes {
            eprintln!("  {note}");
        }
        assert!(
            book.faults.is_empty(),
            "{what}: {:?}\n{}",
            book.faults,
            book.told.join("\n")
        );
    }
}
