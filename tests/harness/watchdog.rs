//! The end of a test that hangs: every running proxy is registered here with the time by which it
//! must be gone. Past it, its processes are killed, so that the test's sockets fail and it ends with
//! a report; if even that does not help, the whole test binary aborts.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{patient, process};

/// What a test may take unless it says otherwise.
pub const LIFETIME: Duration = Duration::from_secs(180);
/// Between killing a test's processes and aborting the test binary.
const GRACE: Duration = Duration::from_secs(45);

struct Entry {
    test: String,
    kill_at: Instant,
    killed: bool,
}

static WATCHED: Mutex<BTreeMap<i32, Entry>> = Mutex::new(BTreeMap::new());

fn watched() -> MutexGuard<'static, BTreeMap<i32, Entry>> {
    WATCHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Registers the process `pid` and its children for killing after `lifetime`.
pub fn watch(pid: i32, lifetime: Duration) {
    static START: Once = Once::new();
    START.call_once(|| {
        std::thread::spawn(|| {
            loop {
                std::thread::sleep(Duration::from_millis(200));
                look();
            }
        });
    });
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    watched().insert(
        pid,
        Entry {
            test,
            kill_at: Instant::now() + patient(lifetime),
            killed: false,
        },
    );
}

/// Takes a process off the list: it has ended and its number may be used again.
pub fn forget(pid: i32) {
    watched().remove(&pid);
}

fn look() {
    let mut list = watched();
    let now = Instant::now();
    for (&pid, entry) in list.iter_mut() {
        if !entry.killed && now > entry.kill_at {
            eprintln!(
                "watchdog: {} took too long; killing process {pid} and its children",
                entry.test
            );
            entry.killed = true;
            kill_family(pid);
        }
    }
    if list.values().any(|entry| now > entry.kill_at + patient(GRACE)) {
        eprintln!("watchdog: a test did not end although its processes were killed; aborting");
        for &pid in list.keys() {
            kill_family(pid);
        }
        std::process::abort();
    }
}

/// Kills a process and its children, the children first listed so that none is missed.
pub fn kill_family(pid: i32) {
    let children = process::children(pid);
    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    for child in children {
        let _ = kill(Pid::from_raw(child), Signal::SIGKILL);
    }
}
