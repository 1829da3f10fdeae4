//! What every black-box test uses: the real binary on a configuration of its own, upstreams and
//! clients whose every byte is known from its offset, and deadlines on everything.
//!
//! Nothing in here knows the program's insides: it speaks to it through its command line, its
//! signals, its sockets and its status document.
//!
//! | room | owns |
//! |---|---|
//! | `ports` | addresses that no other test, and no outgoing connection, takes |
//! | `plan` | the configuration file of one proxy |
//! | `proxy` | one running proxy: start, wait, signal, stop, clean up |
//! | `watchdog` | the end of a test that hangs |
//! | `status` | the status document |
//! | `pattern` | the bytes of a stream, sent and checked |
//! | `upstream` | servers for the proxy to connect to |
//! | `sockets` | what std does not offer: resets, full accept queues, FIN glued to data, repaired sequence numbers |
//! | `process` | `/proc` of a process |
//! | `end` | one end of a session that behaves as a script says |
//! | `dns` | name servers, and upstreams that tell which address was connected to |
//! | `hello` | TLS hellos |
//! | `pair` | one session with both ends in the test's hands, and writers that say how far they have come |
//! | `load` | many long streams and short connections at once, with an account of all of them |
//! | `slow` | sessions whose reader is slow: their proxy, their end, what must hold |
//! | `cramped` | a cgroup in which a proxy's sockets are short of memory |
//! | `metrics` | the page of metrics, read by two parsers |
//! | `long_way` | a long and faulty way between two networks |
//! | `memory` | what the kernel's TCP holds, and the memory of the machine |
//! | `networks` | networks of the test's own |
//! | `program` | other programs: run to the end, or kept running |
//! | `random` | numbers that follow from a seed |
//! | `turns` | tests that need the machine for themselves |

// Each of the test programs uses its own part of the harness.
#![allow(dead_code, unused_imports)]

pub mod cramped;
pub mod dns;
pub mod end;
pub mod greeter;
pub mod hello;
pub mod load;
pub mod long_way;
pub mod memory;
pub mod metrics;
pub mod networks;
pub mod pair;
pub mod pattern;
pub mod plan;
pub mod ports;
pub mod process;
pub mod program;
pub mod proxy;
pub mod random;
pub mod slow;
pub mod sockets;
pub mod status;
pub mod turns;
pub mod upstream;
pub mod watchdog;

pub use pair::{Front, Towards, Writer};
pub use pattern::{Ending, Received, exchange, receive, receive_exactly, send};
pub use plan::{Plan, Scratch, Target};
pub use ports::Port;
pub use proxy::Proxy;
pub use sockets::connect;
pub use status::{Bytes, Status};
pub use upstream::Upstream;

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long one blocking call of a test may take. Longer than any pause that a test makes on purpose.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A limit as it is on this machine: `TEST_PATIENCE` times as long where that is set, as on an emulated processor.
pub fn patient(limit: Duration) -> Duration {
    static FACTOR: OnceLock<u32> = OnceLock::new();
    let factor = FACTOR.get_or_init(|| match std::env::var("TEST_PATIENCE") {
        Ok(text) => text.parse().expect("TEST_PATIENCE must be a whole number"),
        Err(_) => 1,
    });
    limit * *factor
}

/// Asks `question` again and again until it answers true; false when `limit` has passed first.
pub fn within(limit: Duration, mut question: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + patient(limit);
    loop {
        if question() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A flag that a test raises for its threads; raised for certain when the test leaves its scope, by a panic too,
/// so that no thread waits for ever.
#[derive(Debug, Default)]
pub struct Flag(AtomicBool);

impl Flag {
    /// Raises it when the returned value goes.
    pub fn raise_at_the_end(&self) -> impl Drop + '_ {
        struct AtTheEnd<'a>(&'a Flag);
        impl Drop for AtTheEnd<'_> {
            fn drop(&mut self) {
                self.0.0.store(true, Ordering::SeqCst);
            }
        }
        AtTheEnd(self)
    }

    /// Raises it now.
    pub fn raise(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Whether it is up.
    pub fn is_up(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}
