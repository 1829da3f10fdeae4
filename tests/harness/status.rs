//! The status document. Fetches it and reads the keys that the tests ask for; a missing key is a
//! failure that shows the document.

use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

/// Bytes of one path in both directions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Bytes {
    /// From clients to upstreams.
    pub to_upstream: u64,
    /// From upstreams to clients.
    pub to_downstream: u64,
}

impl Bytes {
    /// Both directions together.
    pub fn sum(self) -> u64 {
        self.to_upstream + self.to_downstream
    }
}

/// One entry of `workers`.
#[derive(Debug, Clone)]
pub struct Worker {
    /// The worker slot.
    pub slot: u64,
    /// The process in it now.
    pub pid: i32,
    /// The configuration's incarnation that it was started for.
    pub generation: u64,
    /// Sessions that it has accepted.
    pub accepted: u64,
    /// Sessions that it carries.
    pub sessions: u64,
    /// Occupied places in the slot's sockmap.
    pub slots_used: u64,
    /// Places in the slot's sockmap.
    pub slots_total: u64,
    /// It takes no new sessions.
    pub draining: bool,
}

/// One status document.
#[derive(Debug, Clone)]
pub struct Status(Value);

impl Status {
    /// Connects to the status listener, reads to the end and parses.
    pub fn fetch(address: SocketAddr) -> Result<Status, String> {
        let limit = Duration::from_secs(5);
        let mut stream = TcpStream::connect_timeout(&address, limit)
            .map_err(|e| format!("connecting to {address}: {e}"))?;
        stream.set_read_timeout(Some(limit)).map_err(|e| e.to_string())?;
        let mut text = String::new();
        stream
            .read_to_string(&mut text)
            .map_err(|e| format!("reading the status from {address}: {e}"))?;
        serde_json::from_str(&text)
            .map(Status)
            .map_err(|e| format!("the status is not JSON: {e}: {text:?}"))
    }

    /// A number by its JSON pointer, such as `/sessions/active`.
    #[track_caller]
    pub fn number(&self, pointer: &str) -> u64 {
        self.0
            .pointer(pointer)
            .and_then(Value::as_u64)
            .unwrap_or_else(|| panic!("the status has no number at {pointer}: {:#}", self.0))
    }

    /// Sessions open now.
    #[track_caller]
    pub fn active(&self) -> u64 {
        self.number("/sessions/active")
    }

    /// Sessions that the kernel forwards.
    #[track_caller]
    pub fn offloaded(&self) -> u64 {
        self.number("/sessions/offloaded")
    }

    /// What the kernel forwarded.
    #[track_caller]
    pub fn sockmap(&self) -> Bytes {
        self.bytes("sockmap")
    }

    /// What the kernel forwarded on one CPU.
    #[track_caller]
    pub fn cpu(&self, cpu: u64) -> Bytes {
        let list = self.0.get("cpus").and_then(Value::as_array);
        let list = list.unwrap_or_else(|| panic!("the status has no list `cpus`: {:#}", self.0));
        let place = list.iter().position(|row| row["cpu"] == cpu);
        place.map_or(Bytes::default(), |at| Bytes {
            to_upstream: self.number(&format!("/cpus/{at}/bytes/to_upstream")),
            to_downstream: self.number(&format!("/cpus/{at}/bytes/to_downstream")),
        })
    }

    /// What user space copied.
    #[track_caller]
    pub fn relay(&self) -> Bytes {
        self.bytes("relay")
    }

    /// Both paths together.
    #[track_caller]
    pub fn carried(&self) -> Bytes {
        let (a, b) = (self.sockmap(), self.relay());
        Bytes {
            to_upstream: a.to_upstream + b.to_upstream,
            to_downstream: a.to_downstream + b.to_downstream,
        }
    }

    #[track_caller]
    fn bytes(&self, path: &str) -> Bytes {
        Bytes {
            to_upstream: self.number(&format!("/bytes/{path}/to_upstream")),
            to_downstream: self.number(&format!("/bytes/{path}/to_downstream")),
        }
    }

    /// Sessions that fell back to copying, all reasons together.
    #[track_caller]
    pub fn fallbacks(&self) -> u64 {
        let reasons = self.0.get("fallbacks").and_then(Value::as_object);
        let reasons = reasons.unwrap_or_else(|| panic!("the status has no object `fallbacks`: {:#}", self.0));
        reasons.values().filter_map(Value::as_u64).sum()
    }

    /// The workers.
    #[track_caller]
    pub fn workers(&self) -> Vec<Worker> {
        let list = self.0.get("workers").and_then(Value::as_array);
        let list = list.unwrap_or_else(|| panic!("the status has no list `workers`: {:#}", self.0));
        (0..list.len())
            .map(|i| {
                let number = |key: &str| self.number(&format!("/workers/{i}/{key}"));
                Worker {
                    slot: number("slot"),
                    pid: i32::try_from(number("pid")).expect("a process id"),
                    generation: number("generation"),
                    accepted: number("accepted"),
                    sessions: number("sessions"),
                    slots_used: number("slots_used"),
                    slots_total: number("slots_total"),
                    draining: list[i]["draining"].as_bool().unwrap_or(false),
                }
            })
            .collect()
    }

    /// Occupied sockmap places of all workers.
    #[track_caller]
    pub fn slots_used(&self) -> u64 {
        self.workers().iter().map(|w| w.slots_used).sum()
    }

    /// The configuration's incarnation.
    #[track_caller]
    pub fn generation(&self) -> u64 {
        self.number("/generation")
    }

    /// The document itself.
    pub fn json(&self) -> &Value {
        &self.0
    }
}
