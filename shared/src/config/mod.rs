//! The configuration as it is used: every value present, checked and in its final unit.
//!
//! `file` is what a person may write, `valid` turns single values into what is used, `check` looks at
//! the whole, `defaults` holds every default with its reason. Nothing outside this folder sees a raw value. What is used is
//! defined in the file that reads it: [`Upstream`] in `upstreams`, [`Server`] in `servers`, [`Stream`] in `stream`.
//!
//! The way of a value, in `load`: `source` (text, place, `expand`, `include`) → `layer` (defaults, file, environment, command
//! line) → `check`, `upstreams`, `servers` and `stream` (with `valid`, `units`, `address`, `cpus`, `template`) → [`Config`] →
//! `dump`.

mod access;
mod access_log;
mod address;
mod balance;
mod check;
mod congestion;
mod cpus;
mod defaults;
mod diagnostic;
mod dump;
mod error_log;
mod expand;
mod file;
mod health;
mod include;
mod known;
mod layer;
mod limit;
mod listen;
mod load;
mod log_format;
mod map;
mod names;
mod network;
mod offload_after;
mod proxy_bind;
mod rate;
mod servers;
mod source;
mod stream;
mod syslog;
mod template;
#[cfg(test)]
mod tests;
mod units;
mod upstreams;
mod valid;
mod world;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

pub use access::{Rule, allows};
pub use access_log::AccessLog;
pub use address::Address;
pub use balance::{Balance, Metric};
pub use congestion::{Algorithm, TcpCongestion};
pub use diagnostic::{Diagnostic, Place};
pub use dump::dump;
pub use error_log::{ErrorLog, LogTarget};
pub use health::{CHECK_MAX_BYTES, Check, Expect, write_bytes};
pub use known::{has_ready_made_format, knows_key, knows_log_variable, knows_variable};
pub use limit::{LimitConn, LimitRate, LimitZone};
pub use listen::{Keepalive, Listen, ListenOptions};
pub use load::{load, load_dumped, load_pid, load_text};
pub use log_format::{Escape, LogFormat, LogPart, LogVariable};
pub use map::{MapEntry, Pattern, VariableMap};
pub use names::{Named, Resolver, is_host_name};
pub use network::Network;
pub use offload_after::OffloadAfter;
pub use proxy_bind::ProxyBind;
pub use rate::Rate;
pub use servers::{Action, Server, Target};
pub use stream::{OnReload, ProxyProtocol, Stream};
pub use syslog::Syslog;
pub use template::{Part, Template, Variable};
pub use upstreams::{Peer, Queue, Upstream};

/// A checked configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The user that workers run as; `None`: the starting user.
    pub user: Option<User>,
    /// The CPUs of each worker slot; its length is the number of workers. A CPU list is never empty.
    pub worker_cpus: Vec<Vec<usize>>,
    /// Sessions that one worker holds at once.
    pub worker_connections: u32,
    /// Bytes that all offloaded sessions of one worker together may have outstanding before those with more
    /// than a little are held back; `None`: no limit.
    pub worker_backlog_size: Option<u64>,
    /// How long an old worker may finish its sessions; `None`: without limit.
    pub worker_shutdown_timeout: Option<Duration>,
    /// Whether the kernel's work for a session is steered to the CPU of its worker.
    pub flow_steering: FlowSteering,
    /// Where the master writes its process id.
    pub pid: PathBuf,
    /// Where error log lines go.
    pub error_log: ErrorLog,
    /// Upstream groups, in file order.
    pub upstreams: Vec<Upstream>,
    /// What `[stream]` says, for sessions whose server is gone.
    pub stream: Stream,
    /// Variables that are made from others.
    pub maps: Vec<VariableMap>,
    /// What sessions are counted by.
    pub limit_zones: Vec<LimitZone>,
    /// Servers, in file order.
    pub servers: Vec<Server>,
}

/// How the packets of a session reach the CPU of its worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowSteering {
    /// They are handled wherever the device brings them in.
    Off,
    /// By the kernel's receive flow steering, which the master sets up on the host.
    Rfs,
}

/// A resolved user: nginx's `user`, with its primary group.
#[derive(Clone, Debug, PartialEq)]
pub struct User {
    /// The name as written.
    pub name: String,
    /// Its user id.
    pub uid: u32,
    /// Its primary group id.
    pub gid: u32,
}

impl Config {
    /// How an upstream chooses among its peers, in the words of the file.
    pub fn balance_of(&self, upstream: &Upstream) -> String {
        balance::write(&upstream.balance, &self.maps)
    }

    /// Every access log, once, in the order in which they stand.
    pub fn access_logs(&self) -> Vec<Arc<AccessLog>> {
        let mut logs: Vec<Arc<AccessLog>> = Vec::new();
        let named = std::iter::once(&self.stream).chain(self.servers.iter().map(|server| &server.stream));
        for log in named.filter_map(|stream| stream.access_log.as_ref()) {
            if !logs.contains(log) {
                logs.push(Arc::clone(log));
            }
        }
        logs
    }

    /// Every resolver that a server's sessions may need, once, in the order in which they stand: that of a server whose
    /// `proxy_pass` holds variables. Workers and the master know a resolver by its index here.
    pub fn resolvers(&self) -> Vec<Arc<Resolver>> {
        let mut resolvers: Vec<Arc<Resolver>> = Vec::new();
        for server in &self.servers {
            if let (Action::Proxy(Target::Variable(_)), Some(resolver)) =
                (&server.action, &server.stream.resolver)
                && !resolvers.contains(resolver)
            {
                resolvers.push(Arc::clone(resolver));
            }
        }
        resolvers
    }
}
