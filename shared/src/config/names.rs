//! `resolve`, `service` and `resolver`: names whose addresses are looked up while the program runs.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use config::{Map, Value, ValueKind};

use super::check::{Check, YEAR};
use super::diagnostic::Fault;
use super::source::{entries, join};
use super::units::write_duration;
use super::valid::{self, Given};
use super::world::World;
use super::{Peer, address, defaults, units};

/// The port of name servers (RFC 1035, section 4.2).
const DNS_PORT: u16 = 53;

/// What a name can have at most, in bytes, and each of its labels (RFC 1035, section 2.3.4).
const NAME_MAX_BYTES: usize = 253;
/// See [`NAME_MAX_BYTES`].
const LABEL_MAX_BYTES: usize = 63;

/// A name that is not there any more is not believed more often than once a second.
const VALID_MIN: Duration = Duration::from_secs(1);

const SERVERS: &str = "write \"127.0.0.53\", \"127.0.0.1:5353\" or \"[::1]:53\"";

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

/// A resolver as far as it was written.
#[derive(Clone, Debug, Default)]
pub(super) struct Written {
    resolver: Option<Resolver>,
    timeout: Option<Duration>,
}

impl Written {
    /// What holds for an upstream or a server that says less than all.
    pub(super) fn or(self, outer: &Written) -> Option<Resolver> {
        let mut resolver = self.resolver.or_else(|| outer.resolver.clone())?;
        resolver.timeout = self
            .timeout
            .or(outer.timeout)
            .unwrap_or(defaults::RESOLVER_TIMEOUT);
        Some(resolver)
    }
}

impl Check<'_> {
    /// What `[stream]` says of a resolver.
    pub(super) fn stream_resolver(&mut self, root: &Map<String, Value>) -> Written {
        match root.get("stream").map(|value| &value.kind) {
            Some(ValueKind::Table(table)) => self.written_resolver(table, "stream"),
            _ => Written::default(),
        }
    }

    /// `resolver` and `resolver_timeout` of one table.
    pub(super) fn written_resolver(&mut self, table: &Map<String, Value>, prefix: &str) -> Written {
        let wait = |given: Given| units::duration(given, Duration::from_millis(1)..=YEAR);
        let timeout = self.at(table, prefix, "resolver_timeout", wait);
        let key = join(prefix, "resolver");
        let resolver = table.get("resolver").and_then(|value| match &value.kind {
            ValueKind::Nil => None,
            ValueKind::Table(inner) => {
                let servers = match inner.get("addresses") {
                    Some(value) => self.name_servers(&join(&key, "addresses"), value),
                    None => {
                        let at = self.findings.origin_of(value);
                        let text =
                            format!("missing, a resolver needs the address of a name server: {SERVERS}");
                        self.findings.report(at, &join(&key, "addresses"), text);
                        Vec::new()
                    }
                };
                let mut resolver = Resolver::new(servers);
                resolver.valid = self.at(inner, &key, "valid", |given| {
                    units::duration(given, VALID_MIN..=YEAR)
                });
                let hold = self.at(inner, &key, "hold", |given| {
                    units::duration(given, Duration::ZERO..=YEAR)
                });
                resolver.hold = hold.unwrap_or(resolver.hold);
                resolver.ipv4 = self.at(inner, &key, "ipv4", valid::boolean).unwrap_or(true);
                let ipv6 = self.at(inner, &key, "ipv6", |given| {
                    let wanted = valid::boolean(given)?;
                    match wanted || resolver.ipv4 {
                        true => Ok(wanted),
                        false => Err(Fault::new(
                            "ipv4 is off as well, so nothing is left to ask for",
                            "turn one of them on",
                        )),
                    }
                });
                resolver.ipv6 = ipv6.unwrap_or(true);
                Some(resolver)
            }
            _ => Some(Resolver::new(self.name_servers(&key, value))),
        });
        Written { resolver, timeout }
    }

    fn name_servers(&mut self, key: &str, value: &Value) -> Vec<SocketAddr> {
        let items = entries(key, value);
        if items.is_empty() {
            self.read(key, value, |_| Err::<(), _>(Fault::new("empty", SERVERS)));
        }
        let world = self.world;
        let mut servers = Vec::new();
        for (key, item) in items {
            let read = self.read(&key, item, |given| {
                name_server(valid::text(given, "\"127.0.0.1:5353\"")?, world)
            });
            servers.extend(read.into_iter().flatten());
        }
        servers
    }

    /// A server of an upstream that is a table, if its name is to be looked up while the program runs. `None`: it is
    /// an ordinary peer.
    pub(super) fn named(
        &mut self,
        key: &str,
        table: &Map<String, Value>,
        like: &Peer,
        resolver: Option<&Resolver>,
    ) -> Option<Option<Named>> {
        let resolve = self.at(table, key, "resolve", valid::boolean).unwrap_or(false);
        let service = self.at(table, key, "service", |given| {
            let text = valid::text(given, "\"http\"")?;
            match resolve {
                true => is_name(text).map(|()| text.to_owned()),
                false => Err(Fault::new(
                    "a service has to be looked up",
                    "set resolve = true beside it",
                )),
            }
        });
        let address = match table.get("address").map(|value| &value.kind) {
            Some(ValueKind::String(text)) => text.as_str(),
            _ => return None,
        };
        // What is no name has nothing to be looked up, as with nginx.
        let wants_service = table.contains_key("service");
        if !resolve || (is_literal(address) && !wants_service) {
            return None;
        }
        let split = self.at(table, key, "address", |_| match wants_service {
            true => service_host(address).map(|host| (host, 0)),
            false => address::host_and_port(address),
        });
        let named = split.and_then(|(host, port)| {
            let host = host.trim_end_matches('.');
            let long = service
                .as_ref()
                .map_or(0, |service| service.len() + "_._tcp.".len());
            self.at(table, key, "address", |_| {
                is_name(host)?;
                match host.len() + long > NAME_MAX_BYTES {
                    true => Err(Fault::new(
                        format!("with its service longer than the {NAME_MAX_BYTES} bytes of a name"),
                        "use a shorter one",
                    )),
                    false => Ok(()),
                }
            })?;
            Some((host.to_ascii_lowercase(), port))
        });
        let Some(resolver) = resolver else {
            self.at(table, key, "resolve", |_| {
                Err::<(), _>(Fault::new(
                    "there is no resolver to ask",
                    "write for example resolver = \"127.0.0.53\" in [stream]",
                ))
            });
            return Some(None);
        };
        Some(named.map(|(host, port)| Named {
            host,
            port,
            service,
            like: like.clone(),
            resolver: resolver.clone(),
        }))
    }
}

impl Resolver {
    fn new(servers: Vec<SocketAddr>) -> Resolver {
        Resolver {
            servers,
            valid: None,
            hold: defaults::RESOLVER_HOLD,
            ipv4: true,
            ipv6: true,
            timeout: defaults::RESOLVER_TIMEOUT,
        }
    }

    /// What [`Check::stream_resolver`] takes for the same.
    pub(super) fn write(&self) -> String {
        let servers: Vec<String> = self
            .servers
            .iter()
            .map(|server| format!("\"{server}\""))
            .collect();
        let valid = self.valid.map_or(String::new(), |valid| {
            format!(", valid = \"{}\"", write_duration(valid))
        });
        format!(
            "resolver = {{ addresses = [{}]{valid}, hold = \"{}\", ipv4 = {}, ipv6 = {} }}\nresolver_timeout = \"{}\"",
            servers.join(", "),
            write_duration(self.hold),
            self.ipv4,
            self.ipv6,
            write_duration(self.timeout)
        )
    }
}

impl std::fmt::Display for Named {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.service {
            Some(service) => write!(f, "{} service={service}", self.host),
            None => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

/// A name server; a name is looked up now by the system, as nginx does.
fn name_server(text: &str, world: &dyn World) -> Result<Vec<SocketAddr>, Fault> {
    let bare = text.trim_start_matches('[').trim_end_matches(']');
    let found = match bare.parse::<IpAddr>() {
        Ok(ip) => vec![SocketAddr::new(ip, DNS_PORT)],
        Err(_) if text.contains(':') => address::sockets(text, SERVERS, world)?,
        Err(_) => address::sockets(&format!("{text}:{DNS_PORT}"), SERVERS, world)?,
    };
    match found.iter().any(|address| address.ip().is_unspecified()) {
        true => Err(Fault::new("no address that can be asked", SERVERS)),
        false => Ok(found),
    }
}

fn is_literal(address: &str) -> bool {
    address.starts_with("unix:")
        || address.starts_with('[')
        || address.parse::<SocketAddr>().is_ok()
        || address.parse::<IpAddr>().is_ok()
}

/// A service has its ports in its records.
fn service_host(address: &str) -> Result<&str, Fault> {
    match address.contains(':') || is_literal(address) {
        true => Err(Fault::new(
            "a service is looked up by a host name without a port",
            "write for example address = \"backend.example.com\"",
        )),
        false => Ok(address),
    }
}

/// Whether a text has the form of a host's name (RFC 1035, section 2.3.4, and `_`), without a dot at its end. Nothing else
/// is asked for, written to a log as it is, or sent from one process to another.
pub fn is_host_name(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
    let right =
        |label: &str| !label.is_empty() && label.len() <= LABEL_MAX_BYTES && label.bytes().all(allowed);
    text.len() <= NAME_MAX_BYTES && text.split('.').all(right)
}

fn is_name(text: &str) -> Result<(), Fault> {
    match is_host_name(text) {
        true => Ok(()),
        false => Err(Fault::new(
            "not a host name",
            "a name has letters, digits, - and _, in parts of at most 63 between dots, 253 bytes in all",
        )),
    }
}
