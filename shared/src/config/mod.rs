//! The configuration as it is used: every value present, checked and in its final unit.
//!
//! `file` is what a person may write, `valid` turns single values into what is used, `check` looks at
//! the whole, `defaults` holds every default with its reason. Nothing outside this folder sees a raw value.
//!
//! The way of a value: `source` (text, place, `expand`, `include`) → `layer` (defaults, file, environment, command line) →
//! `check`, `upstreams` and `servers` (with `valid`, `units`, `address`, `cpus`, `template`) → [`Config`] → `dump`.

mod address;
mod balance;
mod check;
mod cpus;
mod defaults;
mod diagnostic;
mod dump;
mod expand;
mod file;
mod health;
mod include;
mod layer;
mod servers;
mod source;
mod template;
#[cfg(test)]
mod tests;
mod units;
mod upstreams;
mod valid;
mod world;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use diagnostic::{Diagnostic, Place};
pub use dump::dump;
pub use health::{CHECK_MAX_BYTES, Check, Expect, write_bytes};

/// Reads, merges and checks a configuration: the file with what it includes, over it the environment
/// (`CULVERT_STREAM__PROXY_TIMEOUT=5s`), over that `overrides` (`stream.proxy_timeout=5s`, the last one counts).
///
/// # Errors
///
/// All errors that were found, in file order, then those of the environment and of `overrides`.
pub fn load(path: &Path, overrides: &[String]) -> Result<Config, Vec<Diagnostic>> {
    load_in(&world::Machine, path, overrides)
}

fn load_in(world: &dyn world::World, path: &Path, overrides: &[String]) -> Result<Config, Vec<Diagnostic>> {
    let mut findings = diagnostic::Findings::default();
    // What is missing altogether is reported here.
    findings.origin(
        Place::File {
            path: path.to_owned(),
            line: 1,
            column: 1,
        },
        String::new(),
        false,
    );
    let mut reader = source::Reader::new(world, &mut findings);
    reader.file(path);
    let (files, named, unreadable) = (reader.root, reader.named, reader.unreadable);
    if unreadable {
        // Half a configuration would give errors that are none.
        return Err(findings.into_diagnostics());
    }
    let root = layer::merge(world, &mut findings, files, &named, overrides);
    let config = check::check(world, &mut findings, &root);
    if findings.is_empty() {
        Ok(config)
    } else {
        Err(findings.into_diagnostics())
    }
}

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

/// The error log.
#[derive(Clone, Debug, PartialEq)]
pub struct ErrorLog {
    /// Where lines go.
    pub target: LogTarget,
    /// The least severe level that is written.
    pub level: log::LevelFilter,
}

/// Where log lines go.
#[derive(Clone, Debug, PartialEq)]
pub enum LogTarget {
    /// Standard error.
    Stderr,
    /// A file that is appended to, and reopened by USR1.
    File(PathBuf),
}

/// How an upstream group chooses a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Balance {
    /// Smooth weighted round robin (nginx's default).
    RoundRobin,
    /// The fewest sessions for its weight.
    LeastConn,
    /// By a hash of the key.
    Hash {
        /// What is hashed.
        key: Template,
        /// On a ring (ketama), so that a peer more or less moves few keys.
        consistent: bool,
    },
    /// By chance, by weight.
    Random,
    /// Of two by chance the better one.
    RandomTwo(Metric),
    /// The shortest time to connect for its weight and sessions.
    LeastTime,
    /// By the client's address, on a ring.
    Source,
}

/// What makes one of two peers the better one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// Fewer sessions.
    Connections,
    /// Less time to connect.
    Time,
}

/// A named group of peers.
#[derive(Clone, Debug, PartialEq)]
pub struct Upstream {
    /// Its name, unique in the file.
    pub name: String,
    /// How a peer is chosen.
    pub balance: Balance,
    /// Its peers, in file order; never empty.
    pub peers: Vec<Peer>,
    /// How they are checked; `None`: not at all.
    pub check: Option<Check>,
    /// Where sessions wait while all peers are at `max_conns`; `None`: they do not.
    pub queue: Option<Queue>,
}

/// Where sessions wait for a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queue {
    /// How many at most, of all workers together.
    pub size: u32,
    /// How long at most.
    pub timeout: Duration,
}

/// One address of an upstream group.
#[derive(Clone, Debug, PartialEq)]
pub struct Peer {
    /// Where to connect.
    pub address: Address,
    /// Share of the sessions, at least 1.
    pub weight: u32,
    /// Takes sessions only when no other peer does.
    pub backup: bool,
    /// Takes none; the operator says so.
    pub down: bool,
    /// Sessions that it takes at once, from the whole program; 0: no limit.
    pub max_conns: u32,
    /// Failed attempts within `fail_timeout` that take it out for as long; 0: none do.
    pub max_fails: u32,
    /// See `max_fails`.
    pub fail_timeout: Duration,
    /// How long its weight grows back when it is alive again; 0: it is there at once.
    pub slow_start: Duration,
}

impl Peer {
    /// A peer with the defaults.
    pub fn new(address: Address) -> Peer {
        Peer {
            address,
            weight: defaults::WEIGHT,
            backup: false,
            down: false,
            max_conns: 0,
            max_fails: defaults::MAX_FAILS,
            fail_timeout: defaults::FAIL_TIMEOUT,
            slow_start: Duration::ZERO,
        }
    }
}

/// An address to connect to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// TCP over IPv4 or IPv6.
    Tcp(SocketAddr),
    /// A unix stream socket.
    Unix(PathBuf),
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Address::Tcp(addr) => addr.fmt(f),
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// One `[[server]]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Server {
    /// Its listeners, at least one.
    pub listen: Vec<Listen>,
    /// What is done with a connection.
    pub action: Action,
    /// The stream settings in force, inherited from `[stream]` where the server does not set them.
    pub stream: Stream,
}

/// A bound address.
#[derive(Clone, Debug, PartialEq)]
pub struct Listen {
    /// The address.
    pub address: SocketAddr,
    /// The accept queue's length, in connections.
    pub backlog: u32,
}

/// What a server does with a connection.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Forward it.
    Proxy(Target),
    /// Write the status document and close (`ebpf_status_return`).
    Status,
}

/// Where `proxy_pass` leads.
#[derive(Clone, Debug, PartialEq)]
pub enum Target {
    /// The upstream group at this index of [`Config::upstreams`]. An address written directly in
    /// `proxy_pass` becomes an unnamed group of one at the end of that list (its name is the address).
    Upstream(usize),
    /// Evaluated for each session; names an upstream group or an address.
    Variable(Template),
}

/// A value with `$variables`: parts in order. A server's `set` values are already substituted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template(pub Vec<Part>);

/// One part of a [`Template`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// Text as it is.
    Literal(String),
    /// A variable of the session.
    Variable(Variable),
}

/// Variables that a session has before its peer is chosen (nginx stream's names).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variable {
    /// The client's address without port.
    RemoteAddr,
    /// The client's port.
    RemotePort,
    /// The address that the client connected to, without port.
    ServerAddr,
    /// The port that the client connected to.
    ServerPort,
    /// The host's name.
    Hostname,
}

/// Settings of `[stream]` that a server inherits.
#[derive(Clone, Debug, PartialEq)]
pub struct Stream {
    /// Forward in the kernel.
    pub ebpf_enable: bool,
    /// Close a session when no byte moved either way for this long.
    pub proxy_timeout: Duration,
    /// How long connecting to a peer may take.
    pub proxy_connect_timeout: Duration,
    /// Try the next peer when one cannot be connected to.
    pub proxy_next_upstream: bool,
    /// Attempts that one session makes at most; 0: as many as there are peers.
    pub proxy_next_upstream_tries: u32,
    /// After which time no further attempt is begun; 0: no limit.
    pub proxy_next_upstream_timeout: Duration,
    /// User-space copy buffer, in bytes, for each direction.
    pub proxy_buffer_size: usize,
    /// Pass an end of stream on and keep the other direction open.
    pub proxy_half_close: bool,
    /// Set TCP_NODELAY on both sockets.
    pub tcp_nodelay: bool,
    /// How often the counters of idle sessions are looked at.
    pub ebpf_timer_period: Duration,
    /// Bytes that may be outstanding towards one side of an offloaded session before the other is held back.
    pub ebpf_backlog_size: u32,
    /// What becomes of a session whose listener or peer is gone after a reload.
    pub on_reload: OnReload,
}

/// What becomes of a session whose listener or peer is gone after a reload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnReload {
    /// It goes on until it ends by itself.
    Keep,
    /// It is reset.
    Close,
}

impl OnReload {
    /// All of them, with the words that a file uses.
    pub(crate) const ALL: [(&'static str, OnReload); 2] =
        [("keep", OnReload::Keep), ("close", OnReload::Close)];
}
