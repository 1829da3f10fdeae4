//! Turns at what belongs to the whole machine, for the tests of one program: tests that measure or change it run alone,
//! all others of that program beside each other, no more of them at once than there are processors.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::available_parallelism;

#[derive(Debug, Default)]
struct Turns {
    /// Tests that run, each with a share of the machine.
    running: usize,
    /// Tests that wait for the whole of it: no other one begins before them.
    waiting: usize,
}

static TURNS: Mutex<Turns> = Mutex::new(Turns {
    running: 0,
    waiting: 0,
});
static OVER: Condvar = Condvar::new();

fn turns() -> MutexGuard<'static, Turns> {
    TURNS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A test's turn; it ends with this value.
#[derive(Debug)]
pub struct Turn {
    share: usize,
}

impl Drop for Turn {
    fn drop(&mut self) {
        turns().running -= self.share;
        OVER.notify_all();
    }
}

fn processors() -> usize {
    available_parallelism().map_or(1, usize::from)
}

/// A test that needs the machine for itself holds this while it runs.
pub fn alone() -> Turn {
    let mut turns = turns();
    turns.waiting += 1;
    turns = OVER
        .wait_while(turns, |turns| turns.running > 0)
        .unwrap_or_else(PoisonError::into_inner);
    turns.waiting -= 1;
    let share = processors();
    turns.running = share;
    Turn { share }
}

/// Any other test of its program holds this. Taken once, by the test itself.
pub fn beside_others() -> Turn {
    let mut turns = OVER
        .wait_while(turns(), |turns| {
            turns.waiting > 0 || turns.running >= processors()
        })
        .unwrap_or_else(PoisonError::into_inner);
    turns.running += 1;
    Turn { share: 1 }
}
