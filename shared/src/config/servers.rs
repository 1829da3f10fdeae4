//! `[[server]]`: its listeners (`listen`), what is done with a connection, and the settings in force (`stream`).

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use config::{Map, Value, ValueKind};

use super::access_log::AccessLogs;
use super::check::Check;
use super::diagnostic::{Fault, OriginId, short};
use super::file::nearest;
use super::names::Written;
use super::source::join;
use super::template::{self, Unresolved, is_name_char};
use super::upstreams::room;
use super::{Address, Balance, LimitZone, Listen, Part, Peer, Stream, Template, Upstream, VariableMap};
use super::{address, valid};

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
    /// The upstream group at this index of [`super::Config::upstreams`]. An address written directly in
    /// `proxy_pass` becomes an unnamed group of one at the end of that list (its name is the address).
    Upstream(usize),
    /// Evaluated for each session; names an upstream group or an address.
    Variable(Template),
}

/// Reads the servers. Addresses written in `proxy_pass` are collected as unnamed upstreams.
pub(super) struct Servers<'c, 'a> {
    pub(super) check: &'c mut Check<'a>,
    /// The named groups, then the unnamed ones.
    upstreams: Vec<Upstream>,
    /// What leads nowhere, and why: each server that says so is told, and no name is looked up twice for it.
    astray: BTreeMap<String, Fault>,
    pub(super) zones: &'c [LimitZone],
    pub(super) maps: &'c [VariableMap],
    /// Every address that is listened on, with the key and the place of its listener.
    pub(super) listeners: HashMap<Address, (String, OriginId)>,
    pub(super) access_logs: AccessLogs,
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
        let inherited = Stream {
            resolver: resolver.clone().or(&Written::default()).map(Arc::new),
            ..self.stream(inherited, "stream", &Stream::stand_in())
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
