//! `[[server]]`: listeners that clash with none, what is done with a connection, and the stream settings in force.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use config::{Map, Value, ValueKind};

use super::access_log::AccessLogs;
use super::check::{Check, YEAR};
use super::diagnostic::{Fault, OriginId, short};
use super::file::nearest;
use super::names::Written;
use super::source::join;
use super::template::{self, Unresolved, is_name_char};
use super::upstreams::room;
use super::valid::{self, Given};
use super::{
    Action, Address, Balance, LimitZone, Network, OffloadAfter, OnReload, Part, Peer, ProxyBind, Rate, Rule,
    Server, Stream, Target, TcpCongestion, Template, Upstream, VariableMap,
};
use super::{address, units};

/// Two buffers of this size for each relayed session are 128 MiB: enough for any link.
const BUFFER_MAX_BYTES: usize = 64 << 20;
/// Looked at anew with each segment that arrives, so it must not be long. A hello with everything is below 16 KiB.
const PREREAD_MAX_BYTES: usize = 64 << 10;
/// Less than one full segment of the loopback device would pause at each of them.
const BACKLOG_SIZE_MIN_BYTES: usize = 64 << 10;
/// Sequence numbers are compared in 32 bits, signed.
const BACKLOG_SIZE_MAX_BYTES: usize = 1 << 30;
/// More peers than a program can have counters for.
const TRIES_MAX: u32 = 65_535;

/// More often than this, looking at idle sessions would itself be work.
const TIMER_PERIOD_MIN: Duration = Duration::from_millis(10);

/// Less often than this, timeouts would be noticed far too late.
const TIMER_PERIOD_MAX: Duration = Duration::from_secs(3600);

/// Reads the servers. Addresses written in `proxy_pass` are collected as unnamed upstreams.
pub(super) struct Servers<'c, 'a> {
    pub(super) check: &'c mut Check<'a>,
    /// The named groups, then the unnamed ones.
    upstreams: Vec<Upstream>,
    /// What leads nowhere, and why: each server that says so is told, and no name is looked up twice for it.
    astray: BTreeMap<String, Fault>,
    zones: &'c [LimitZone],
    maps: &'c [VariableMap],
    /// Every address that is listened on, with the key and the place of its listener.
    pub(super) listeners: HashMap<Address, (String, OriginId)>,
    access_logs: AccessLogs,
}

impl<'c, 'a> Servers<'c, 'a> {
    pub(super) fn new(
        check: &'c mut Check<'a>,
        upstreams: Vec<Upstream>,
        (zones, maps): (&'c [LimitZone], &'c [VariableMap]),
        access_logs: AccessLogs,
    ) -> Self {
        Servers {
            check,
            upstreams,
            astray: BTreeMap::new(),
            zones,
            maps,
            listeners: HashMap::new(),
            access_logs,
        }
    }

    /// All upstreams, what `[stream]` says, and all servers.
    /// `resolver`: what `[stream]` says of one.
    pub(super) fn read(
        mut self,
        root: &Map<String, Value>,
        resolver: &Written,
    ) -> (Vec<Upstream>, Stream, Vec<Server>) {
        let nothing = Map::new();
        let inherited = match root.get("stream").map(|value| &value.kind) {
            Some(ValueKind::Table(table)) => table,
            _ => &nothing,
        };
        // Where everything went wrong, an hour and a byte stand in for what [stream] would have said.
        let hour = Duration::from_secs(3600);
        let stand_in = Stream {
            ebpf_enable: true,
            proxy_timeout: hour,
            proxy_connect_timeout: hour,
            proxy_next_upstream: true,
            proxy_next_upstream_tries: 0,
            proxy_next_upstream_timeout: Duration::ZERO,
            proxy_buffer_size: 1,
            proxy_half_close: true,
            tcp_nodelay: true,
            tcp_congestion: TcpCongestion::System,
            proxy_socket_keepalive: false,
            proxy_bind: ProxyBind::Off,
            ebpf_timer_period: hour,
            ebpf_backlog_size: BACKLOG_SIZE_MIN_BYTES as u32,
            ebpf_offload_after: OffloadAfter::Auto,
            on_reload: OnReload::Keep,
            proxy_protocol: None,
            proxy_protocol_timeout: hour,
            set_real_ip_from: Vec::new(),
            access: Vec::new(),
            limit_conn: Vec::new(),
            limit_conn_rate: Vec::new(),
            proxy_upload_rate: Rate::OFF,
            proxy_download_rate: Rate::OFF,
            ssl_preread: false,
            preread_buffer_size: 1,
            preread_timeout: hour,
            resolver: None,
            access_log: None,
        };
        let inherited = Stream {
            resolver: resolver.clone().or(&Written::default()).map(Arc::new),
            ..self.stream(inherited, "stream", &stand_in)
        };
        let tables = self.check.tables(root, "server");
        let none = match root.get("server").map(|value| &value.kind) {
            None => true,
            Some(ValueKind::Array(items)) => items.is_empty(),
            Some(_) => false,
        };
        if none {
            let start = self.check.findings.start();
            let text = "none, write at least one [[server]] with listen and proxy_pass";
            self.check.findings.report(start, "server", text);
        }
        let servers = tables.into_iter().map(|(key, at, table)| Server {
            listen: self.listen(&key, at, table),
            action: self.action(&key, at, table),
            stream: Stream {
                resolver: self
                    .check
                    .written_resolver(table, &key)
                    .or(resolver)
                    .map(Arc::new),
                ..self.stream(table, &key, &inherited)
            },
        });
        let mut servers: Vec<Server> = servers.collect();
        if let Some(http) = root.get("http")
            && let ValueKind::Table(table) = &http.kind
        {
            let at = self.check.findings.origin_of(http);
            servers.push(Server {
                listen: self.listen("http", at, table),
                action: Action::Http,
                stream: Stream {
                    access_log: None,
                    ..inherited.clone()
                },
            });
        }
        (self.upstreams, inherited, servers)
    }

    fn stream(&mut self, table: &Map<String, Value>, key: &str, inherited: &Stream) -> Stream {
        let millisecond = Duration::from_millis(1);
        let timeout = |given: Given| units::duration(given, millisecond..=YEAR);
        // 0 means: no limit, both as with nginx.
        let limit = |given: Given| units::duration(given, Duration::ZERO..=YEAR);
        let tries = |given: Given| valid::number(given, 0..=TRIES_MAX);
        let period = |given: Given| units::duration(given, TIMER_PERIOD_MIN..=TIMER_PERIOD_MAX);
        let buffer = |given: Given| units::size(given, 1..=BUFFER_MAX_BYTES);
        let backlog = |given: Given| units::size(given, BACKLOG_SIZE_MIN_BYTES..=BACKLOG_SIZE_MAX_BYTES);
        let preread = |given: Given| units::size(given, 1..=PREREAD_MAX_BYTES);
        let (zones, maps) = (self.zones, self.maps);
        let rate = |given: Given| Rate::read(given, maps);
        let check = &mut self.check;
        let Stream {
            ebpf_enable,
            proxy_timeout,
            proxy_connect_timeout,
            proxy_next_upstream,
            proxy_next_upstream_tries,
            proxy_next_upstream_timeout,
            proxy_buffer_size,
            proxy_half_close,
            tcp_nodelay,
            tcp_congestion,
            proxy_socket_keepalive,
            proxy_bind,
            ebpf_timer_period,
            ebpf_backlog_size,
            ebpf_offload_after,
            on_reload,
            proxy_protocol,
            proxy_protocol_timeout,
            ref set_real_ip_from,
            ref access,
            ref limit_conn,
            ref limit_conn_rate,
            ref proxy_upload_rate,
            ref proxy_download_rate,
            ssl_preread,
            preread_buffer_size,
            preread_timeout,
            // What a table says of it counts together with what the other one says: see `Servers::read`.
            resolver: _,
            ref access_log,
        } = *inherited;
        let access_log = self.access_logs.of_table(check, table, key, access_log);
        Stream {
            ebpf_enable: check
                .at(table, key, "ebpf_enable", valid::boolean)
                .unwrap_or(ebpf_enable),
            proxy_timeout: check
                .at(table, key, "proxy_timeout", timeout)
                .unwrap_or(proxy_timeout),
            proxy_connect_timeout: check
                .at(table, key, "proxy_connect_timeout", timeout)
                .unwrap_or(proxy_connect_timeout),
            proxy_next_upstream: check
                .at(table, key, "proxy_next_upstream", valid::boolean)
                .unwrap_or(proxy_next_upstream),
            proxy_next_upstream_tries: check
                .at(table, key, "proxy_next_upstream_tries", tries)
                .unwrap_or(proxy_next_upstream_tries),
            proxy_next_upstream_timeout: check
                .at(table, key, "proxy_next_upstream_timeout", limit)
                .unwrap_or(proxy_next_upstream_timeout),
            proxy_buffer_size: check
                .at(table, key, "proxy_buffer_size", buffer)
                .unwrap_or(proxy_buffer_size),
            proxy_half_close: check
                .at(table, key, "proxy_half_close", valid::boolean)
                .unwrap_or(proxy_half_close),
            tcp_nodelay: check
                .at(table, key, "tcp_nodelay", valid::boolean)
                .unwrap_or(tcp_nodelay),
            tcp_congestion: check
                .at(table, key, "tcp_congestion", TcpCongestion::read)
                .unwrap_or(tcp_congestion),
            proxy_socket_keepalive: check
                .at(table, key, "proxy_socket_keepalive", valid::boolean)
                .unwrap_or(proxy_socket_keepalive),
            proxy_bind: check
                .at(table, key, "proxy_bind", ProxyBind::read)
                .unwrap_or(proxy_bind),
            ebpf_timer_period: check
                .at(table, key, "ebpf_timer_period", period)
                .unwrap_or(ebpf_timer_period),
            ebpf_backlog_size: check
                .at(table, key, "ebpf_backlog_size", backlog)
                .map_or(ebpf_backlog_size, |bytes| bytes as u32),
            ebpf_offload_after: check
                .at(table, key, "ebpf_offload_after", OffloadAfter::read)
                .unwrap_or(ebpf_offload_after),
            on_reload: check
                .at(table, key, "on_reload", valid::on_reload)
                .unwrap_or(on_reload),
            proxy_protocol: check
                .at(table, key, "proxy_protocol", valid::proxy_protocol)
                .unwrap_or(proxy_protocol),
            proxy_protocol_timeout: check
                .at(table, key, "proxy_protocol_timeout", timeout)
                .unwrap_or(proxy_protocol_timeout),
            set_real_ip_from: check
                .list(table, key, "set_real_ip_from", |given| {
                    Network::read(valid::text(given, "\"10.0.0.0/8\"")?)
                })
                .unwrap_or_else(|| set_real_ip_from.clone()),
            access: check
                .list(table, key, "access", |given| {
                    Rule::read(valid::text(given, "\"deny 10.0.0.0/8\"")?)
                })
                .unwrap_or_else(|| access.clone()),
            limit_conn: check
                .limit_conn(table, key, zones)
                .unwrap_or_else(|| limit_conn.clone()),
            limit_conn_rate: check
                .limit_conn_rate(table, key, zones)
                .unwrap_or_else(|| limit_conn_rate.clone()),
            proxy_upload_rate: check
                .at(table, key, "proxy_upload_rate", rate)
                .unwrap_or_else(|| proxy_upload_rate.clone()),
            proxy_download_rate: check
                .at(table, key, "proxy_download_rate", rate)
                .unwrap_or_else(|| proxy_download_rate.clone()),
            ssl_preread: check
                .at(table, key, "ssl_preread", valid::boolean)
                .unwrap_or(ssl_preread),
            preread_buffer_size: check
                .at(table, key, "preread_buffer_size", preread)
                .unwrap_or(preread_buffer_size),
            preread_timeout: check
                .at(table, key, "preread_timeout", timeout)
                .unwrap_or(preread_timeout),
            resolver: None,
            access_log,
        }
    }

    fn action(&mut self, key: &str, at: OriginId, table: &Map<String, Value>) -> Action {
        let status = self.check.at(table, key, "ebpf_status_return", valid::boolean);
        let set = self.set(key, table);
        let pass = table.get("proxy_pass");
        match (status, pass) {
            (Some(true), Some(pass)) => {
                let key = join(key, "proxy_pass");
                let fault = Fault::new(
                    "the server has ebpf_status_return = true",
                    "remove one of the two",
                );
                self.check.read(&key, pass, |_| Err::<(), _>(fault));
                Action::Status
            }
            (_, Some(pass)) => Action::Proxy(self.target(&join(key, "proxy_pass"), pass, &set)),
            (Some(true), None) => Action::Status,
            (_, None) => {
                // A wrong ebpf_status_return has been reported; it may well have been meant.
                if status.is_some() || !table.contains_key("ebpf_status_return") {
                    let text = "missing, a server needs proxy_pass or ebpf_status_return = true";
                    self.check.findings.report(at, &join(key, "proxy_pass"), text);
                }
                Action::Status
            }
        }
    }

    /// The values of `set`, each checked on its own: an unused one may not be wrong either.
    fn set<'v>(&mut self, key: &str, table: &'v Map<String, Value>) -> Set<'v> {
        let key = join(key, "set");
        let values = match table.get("set").map(|value| &value.kind) {
            Some(ValueKind::Table(values)) => values,
            _ => {
                return Set {
                    values: BTreeMap::new(),
                    right: true,
                };
            }
        };
        let mut set = BTreeMap::new();
        let mut right = true;
        for (name, value) in values {
            let named = self.check.read(&join(&key, &short(name)), value, |given| {
                if name.is_empty() || !name.chars().all(is_name_char) {
                    return Err(Fault::new(
                        "not a variable's name",
                        "a name has letters, digits and _, and no $ here",
                    ));
                }
                if template::session_variable(name).is_some() {
                    return Err(Fault::new(
                        format!("${name} is a variable of the session"),
                        "choose another name",
                    ));
                }
                match given.kind {
                    ValueKind::String(text) => Ok(text.as_str()),
                    _ => Err(given.wrong_type("write it as text")),
                }
            });
            right &= named.is_some();
            // A wrong value stays defined, or whatever uses it would be wrong as well.
            if name.chars().all(is_name_char) && template::session_variable(name).is_none() {
                set.insert(name.as_str(), named.unwrap_or_default());
            }
        }
        let names: Vec<&str> = set.keys().copied().collect();
        for name in names {
            // Blanking whatever is to blame ends this: an empty value is right.
            while let Err(Unresolved { within, fault }) =
                template::resolve(&format!("${name}"), &set, self.maps)
            {
                let blamed = within.and_then(|blamed| values.get_key_value(blamed.as_str()));
                let Some((blamed, value)) = blamed else { break };
                self.check
                    .read(&join(&key, &short(blamed)), value, |_| Err::<(), _>(fault));
                set.insert(blamed, "");
                right = false;
            }
        }
        Set { values: set, right }
    }

    fn target(&mut self, key: &str, value: &Value, set: &Set) -> Target {
        let maps = self.maps;
        let resolved = self.check.read(key, value, |given| {
            let text = valid::text(given, "\"127.0.0.1:8000\"")?;
            template::resolve(text, &set.values, maps).map_err(|unresolved| unresolved.fault)
        });
        let parts = match resolved {
            // With a blanked variable it leads somewhere else than it should.
            Some(Template(parts)) if set.right => parts,
            _ => return Target::Upstream(0),
        };
        let name = match parts.as_slice() {
            [] => return Target::Upstream(0),
            [Part::Literal(name)] => name.clone(),
            _ => return Target::Variable(Template(parts)),
        };
        if let Some(index) = self.upstreams.iter().position(|upstream| upstream.name == name) {
            return Target::Upstream(index);
        }
        let found = match self.astray.get(&name) {
            Some(fault) => Err(fault.clone()),
            None => self.peers_at(&name),
        };
        if let Err(fault) = &found {
            self.astray.insert(name.clone(), fault.clone());
        }
        let Some(peers) = self.check.read(key, value, |_| found) else {
            return Target::Upstream(0);
        };
        self.upstreams.push(Upstream {
            name,
            balance: Balance::RoundRobin,
            peers: peers.into_iter().map(Peer::new).collect(),
            check: None,
            queue: None,
            names: Vec::new(),
        });
        Target::Upstream(self.upstreams.len() - 1)
    }

    /// The addresses that `proxy_pass` names where there is no group of that name.
    fn peers_at(&self, name: &str) -> Result<Vec<Address>, Fault> {
        if !name.contains(':') {
            let names = self.upstreams.iter().map(|upstream| upstream.name.as_str());
            return Err(no_upstream(name, names));
        }
        let peers = address::peers(name, self.check.world)?;
        room(self.upstreams.iter(), peers.len()).map(|()| peers)
    }
}

/// The `set` of one server.
struct Set<'v> {
    values: BTreeMap<&'v str, &'v str>,
    /// None was wrong; wrong values are blank.
    right: bool,
}

fn no_upstream<'u>(name: &str, known: impl Iterator<Item = &'u str>) -> Fault {
    let remedy = match nearest(name, known.filter(|known| !known.is_empty())) {
        Some(near) => format!("did you mean \"{near}\"?"),
        None => "write an [[upstream]] of that name, or an address such as \"127.0.0.1:8000\"".to_owned(),
    };
    Fault::new(format!("there is no upstream \"{}\"", short(name)), remedy)
}
