//! The configuration as it is used: every value present, checked and in its final unit.
//!
//! `file` is what a person may write, `valid` turns single values into what is used, `check` looks at
//! the whole, `defaults` holds every default with its reason. Nothing outside this folder sees a raw value.
//!
//! The way of a value: `source` (text, place, `expand`, `include`) → `layer` (defaults, file, environment, command line) →
//! `check`, `upstreams` and `servers` (with `valid`, `units`, `address`, `cpus`, `template`) → [`Config`] → `dump`.

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
mod expand;
mod file;
mod health;
mod include;
mod known;
mod layer;
mod limit;
mod listen;
mod map;
mod names;
mod network;
mod offload_after;
mod proxy_bind;
mod rate;
mod servers;
mod source;
mod syslog;
mod template;
#[cfg(test)]
mod tests;
mod units;
mod upstreams;
mod valid;
mod world;

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

pub use access::{Rule, allows};
pub use congestion::{Algorithm, TcpCongestion};
pub use diagnostic::{Diagnostic, Place};
pub use dump::dump;
pub use health::{CHECK_MAX_BYTES, Check, Expect, write_bytes};
pub use known::{has_ready_made_format, knows_key, knows_log_variable, knows_variable};
pub use limit::{LimitConn, LimitRate, LimitZone};
pub use listen::{Keepalive, ListenOptions};
pub use map::{MapEntry, Pattern, VariableMap};
pub use names::is_host_name;
pub use network::Network;
pub use offload_after::OffloadAfter;
pub use proxy_bind::ProxyBind;
pub use rate::Rate;
pub use syslog::Syslog;

/// Reads, merges and checks a configuration: the file with what it includes, over it the environment
/// (`CULVERT_STREAM__PROXY_TIMEOUT=5s`), over that `overrides` (`stream.proxy_timeout=5s`, the last one counts).
///
/// # Errors
///
/// All errors that were found, in file order, then those of the environment and of `overrides`.
pub fn load(path: &Path, overrides: &[String]) -> Result<Config, Vec<Diagnostic>> {
    load_in(&world::Machine, path, overrides)
}

/// Checks a text as [`load`] checks the file at `path`, which need not exist.
///
/// # Errors
///
/// As with [`load`].
pub fn load_text(path: &Path, text: &str) -> Result<Config, Vec<Diagnostic>> {
    read_in(
        &world::Machine,
        |reader| reader.bytes(path, text.as_bytes()),
        path,
        &[],
    )
}

/// Takes what [`dump`] has written for the same again. The environment is in it: an override would count twice, and a
/// variable that the file named (`${CULVERT_PEER}`) would be one.
///
/// # Errors
///
/// As with [`load`].
pub fn load_dumped(text: &str) -> Result<Config, Vec<Diagnostic>> {
    load_dumped_in(&world::Machine, text)
}

fn load_dumped_in(world: &dyn world::World, text: &str) -> Result<Config, Vec<Diagnostic>> {
    let path = Path::new("the configuration in force");
    let read = |reader: &mut source::Reader| reader.bytes(path, text.as_bytes());
    read_in(&world::Bare(world), read, path, &[])
}

fn load_in(world: &dyn world::World, path: &Path, overrides: &[String]) -> Result<Config, Vec<Diagnostic>> {
    read_in(world, |reader| reader.file(path), path, overrides)
}

fn read_in(
    world: &dyn world::World,
    read: impl FnOnce(&mut source::Reader),
    path: &Path,
    overrides: &[String],
) -> Result<Config, Vec<Diagnostic>> {
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
    read(&mut reader);
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

/// The error log.
#[derive(Clone, Debug, PartialEq)]
pub struct ErrorLog {
    /// Where lines go.
    pub target: LogTarget,
    /// The least severe level that is written.
    pub level: log::LevelFilter,
}

/// Where log lines go.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum LogTarget {
    /// Standard error.
    Stderr,
    /// A file that is appended to, and reopened by USR1.
    File(PathBuf),
    /// A syslog server; each line is a datagram.
    Syslog(Syslog),
}

impl fmt::Display for LogTarget {
    /// As a file would write it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LogTarget::Stderr => f.write_str("stderr"),
            LogTarget::File(path) => path.display().fmt(f),
            LogTarget::Syslog(settings) => f.write_str(&settings.text()),
        }
    }
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
    /// Its peers, in file order; empty only where there are names.
    pub peers: Vec<Peer>,
    /// How they are checked; `None`: not at all.
    pub check: Option<Check>,
    /// Where sessions wait while all peers are at `max_conns`; `None`: they do not.
    pub queue: Option<Queue>,
    /// Names whose addresses are peers as well, looked up while the program runs; in file order.
    pub names: Vec<Named>,
}

/// A server with `resolve`: whatever addresses its name stands for are peers.
#[derive(Clone, Debug, PartialEq)]
pub struct Named {
    /// The name, in lower case, without a dot at its end.
    pub host: String,
    /// The port of all its peers; 0 with a service.
    pub port: u16,
    /// The service whose records (SRV) say peers and ports.
    pub service: Option<String>,
    /// What each of its peers is like; the address says nothing.
    pub like: Peer,
    /// Who is asked.
    pub resolver: Resolver,
}

/// Who is asked for the addresses of names, and how.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Resolver {
    /// Name servers, at least one.
    pub servers: Vec<SocketAddr>,
    /// How long an answer is valid; `None`: as long as it says itself.
    pub valid: Option<Duration>,
    /// How long the last addresses are kept when the answer is that there are none.
    pub hold: Duration,
    /// Ask for IPv4 addresses.
    pub ipv4: bool,
    /// Ask for IPv6 addresses.
    pub ipv6: bool,
    /// How long one lookup may take.
    pub timeout: Duration,
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

/// An address to connect to, or to listen on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// TCP over IPv4 or IPv6.
    Tcp(SocketAddr),
    /// A unix stream socket.
    Unix(PathBuf),
}

impl Address {
    /// The address, unless it is a unix socket's.
    pub fn tcp(&self) -> Option<SocketAddr> {
        match self {
            Address::Tcp(address) => Some(*address),
            Address::Unix(_) => None,
        }
    }
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
    pub address: Address,
    /// The accept queue's length, in connections.
    pub backlog: u32,
    /// Connections begin with a PROXY header.
    pub proxy_protocol: bool,
    /// What else its socket is told.
    pub options: ListenOptions,
}

/// What a server does with a connection.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Forward it.
    Proxy(Target),
    /// Write the status document and close (`ebpf_status_return`).
    Status,
    /// Serve metrics and the status over HTTP: what `http` says is the last server.
    Http,
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
    /// The client's address in the PROXY header, without port.
    ProxyProtocolAddr,
    /// The client's port in the PROXY header.
    ProxyProtocolPort,
    /// The address that the client connected to, as the PROXY header says it, without port.
    ProxyProtocolServerAddr,
    /// The port that the client connected to, as the PROXY header says it.
    ProxyProtocolServerPort,
    /// The address that connected here, whatever a PROXY header says, without port.
    RealipRemoteAddr,
    /// The port that connected here.
    RealipRemotePort,
    /// The server that the TLS hello asks for.
    SslPrereadServerName,
    /// The protocols that the TLS hello offers, separated by commas.
    SslPrereadAlpnProtocols,
    /// The highest version of TLS that the hello offers.
    SslPrereadProtocol,
    /// What the map at this index of [`Config::maps`] gives.
    Map(usize),
    /// What the group of this number of a map's regular expression has found, 1 to 9; in that expression's value only.
    Capture(u8),
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
    /// The congestion control of both sockets.
    pub tcp_congestion: TcpCongestion,
    /// Ask silent peers whether they are still there (SO_KEEPALIVE).
    pub proxy_socket_keepalive: bool,
    /// Where connections to peers come from.
    pub proxy_bind: ProxyBind,
    /// How often the counters of idle sessions are looked at.
    pub ebpf_timer_period: Duration,
    /// Bytes that may be outstanding towards one side of an offloaded session before the other is held back.
    pub ebpf_backlog_size: u32,
    /// When the kernel takes a session.
    pub ebpf_offload_after: OffloadAfter,
    /// What becomes of a session whose listener or peer is gone after a reload.
    pub on_reload: OnReload,
    /// Send the upstream a PROXY header of this version.
    pub proxy_protocol: Option<ProxyProtocol>,
    /// How long a client may take to send its PROXY header.
    pub proxy_protocol_timeout: Duration,
    /// Whose PROXY headers are believed.
    pub set_real_ip_from: Vec<Network>,
    /// Who may connect.
    pub access: Vec<Rule>,
    /// How many sessions a key may have at once.
    pub limit_conn: Vec<LimitConn>,
    /// How fast the connections of a key may come.
    pub limit_conn_rate: Vec<LimitRate>,
    /// How fast a session's bytes may come from the client.
    pub proxy_upload_rate: Rate,
    /// How fast they may come from the peer.
    pub proxy_download_rate: Rate,
    /// Look at the client's TLS hello before its peer is chosen.
    pub ssl_preread: bool,
    /// How long a TLS hello may be, in bytes.
    pub preread_buffer_size: usize,
    /// How long a client may take to send it.
    pub preread_timeout: Duration,
    /// Who is asked for the addresses of a host name that `proxy_pass` gives a session; `None`: nobody.
    pub resolver: Option<Arc<Resolver>>,
    /// Where a line is written for each ended session; equal ones of a configuration are the same value.
    pub access_log: Option<Arc<AccessLog>>,
}

/// A version of the PROXY protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProxyProtocol {
    /// A line of text.
    V1,
    /// Binary.
    V2,
}

/// A log with a line for each ended session.
#[derive(Clone, Debug, PartialEq)]
pub struct AccessLog {
    /// Where lines go; never [`LogTarget::Stderr`].
    pub target: LogTarget,
    /// What a line is made of.
    pub format: Arc<LogFormat>,
    /// Lines are written when a worker has gathered so many bytes of them.
    pub buffer_bytes: usize,
    /// And after this time at the latest; zero: at once.
    pub flush: Duration,
}

/// What a line of an access log is made of.
#[derive(Clone, Debug, PartialEq)]
pub struct LogFormat {
    /// Its name.
    pub name: String,
    /// How values are made harmless.
    pub escape: Escape,
    /// Its parts, in order.
    pub parts: Vec<LogPart>,
}

/// How values are made harmless in a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Escape {
    /// Quotes, backslashes and what is no printable ASCII as `\xHH`; a missing value is `-`.
    Default,
    /// As in a JSON string; a missing value is empty.
    Json,
    /// Not at all; a missing value is empty.
    None,
}

/// One part of a [`LogFormat`].
#[derive(Clone, Debug, PartialEq)]
pub enum LogPart {
    /// Text as it is.
    Literal(String),
    /// A value of the session.
    Variable(LogVariable),
}

/// What a line can tell of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogVariable {
    /// The client's address without port.
    RemoteAddr,
    /// The client's port.
    RemotePort,
    /// The address that the client connected to, without port.
    ServerAddr,
    /// The port that the client connected to.
    ServerPort,
    /// The listener as configured; a wildcard stays one.
    Listener,
    /// When the session ended, as the Common Log Format has it.
    TimeLocal,
    /// When it ended, ISO 8601.
    TimeIso8601,
    /// When it ended, Unix seconds with milliseconds.
    Msec,
    /// `TCP`.
    Protocol,
    /// 200, 400, 403, 500, 502 or 503, as in nginx.
    Status,
    /// Bytes sent to the client.
    BytesSent,
    /// Bytes received from the client.
    BytesReceived,
    /// How long it lasted, in seconds with milliseconds.
    SessionTime,
    /// Its number.
    Connection,
    /// The host's name.
    Hostname,
    /// The worker's process id.
    Pid,
    /// The worker's slot.
    Worker,
    /// The peers that were tried, the last one served it.
    UpstreamAddr,
    /// Bytes sent to the peer.
    UpstreamBytesSent,
    /// Bytes received from the peer.
    UpstreamBytesReceived,
    /// What all of its peers were sent together: a number.
    UpstreamBytesSentSum,
    /// What was received of all of its peers together: a number.
    UpstreamBytesReceivedSum,
    /// How long connecting took, in seconds with milliseconds, for each of the peers.
    UpstreamConnectTime,
    /// How long the session with the last peer lasted.
    UpstreamSessionTime,
    /// Who carried the bytes: `sockmap`, `relay`, `mixed` or `none`.
    Datapath,
    /// Why the kernel did not, where it should have.
    FallbackReason,
    /// Why it ended.
    CloseReason,
    /// Times that a source was held back.
    Pauses,
    /// Bytes to the peer that the kernel forwarded.
    SockmapToUpstream,
    /// Bytes to the client that the kernel forwarded.
    SockmapToDownstream,
    /// Bytes to the peer that user space copied.
    RelayToUpstream,
    /// Bytes to the client that user space copied.
    RelayToDownstream,
    /// What its PROXY header or TLS hello said.
    Early(Variable),
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
