//! `listen`: the addresses of a server, and what its listening sockets are told besides (nginx: the parameters of
//! `listen` in a stream server).

use std::time::Duration;

use config::{Map, Value, ValueKind};

use super::diagnostic::{Fault, OriginId};
use super::servers::Servers;
use super::source::{entries, join};
use super::units::{write_duration, write_size};
use super::valid::{self, Given};
use super::{Address, address, defaults, units};
use crate::counters::MAX_LISTENERS;

/// The kernel caps it at net.core.somaxconn; more than a million waiting connections help nobody.
const BACKLOG_MAX: u32 = 1 << 20;

/// The kernel doubles what it is told, in an int.
const BUFFER_MAX_BYTES: usize = 1 << 30;

/// The kernel's own limits (do_tcp_setsockopt: MAX_TCP_KEEPIDLE, MAX_TCP_KEEPINTVL).
const KEEPALIVE_MAX: Duration = Duration::from_secs(32_767);
/// MAX_TCP_KEEPCNT.
const KEEPALIVE_PROBES_MAX: u32 = 127;

/// What `so_keepalive` looks like.
const KEEPALIVE: &str = "allowed: true, false, or \"keepidle:keepintvl:keepcnt\" with at least one of the three, for \
                         example \"30m::10\"";

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

/// What a listening socket is told, beside its address and its queue. The kernel passes most of it on to what is
/// accepted.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ListenOptions {
    /// An IPv6 wildcard takes IPv4 connections too (`ipv6only = false`).
    pub dual: bool,
    /// `SO_RCVBUF`, in bytes.
    pub rcvbuf: Option<u32>,
    /// `SO_SNDBUF`, in bytes.
    pub sndbuf: Option<u32>,
    /// A connection is accepted when its first data is there (`TCP_DEFER_ACCEPT`).
    pub deferred: bool,
    /// How many connections with data in their SYN may be waiting for the end of their handshake (`TCP_FASTOPEN`).
    pub fastopen: Option<u32>,
    /// `SO_KEEPALIVE`; `None`: off.
    pub keepalive: Option<Keepalive>,
    /// Who may connect to a unix socket: the permissions of its file.
    pub mode: Option<u32>,
}

/// When the kernel asks a silent peer whether it is still there. What is `None` is as the host has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Keepalive {
    /// Seconds of silence before the first probe (`TCP_KEEPIDLE`).
    pub idle_s: Option<u32>,
    /// Seconds between two probes (`TCP_KEEPINTVL`).
    pub interval_s: Option<u32>,
    /// Probes without an answer after which the connection is dead (`TCP_KEEPCNT`).
    pub probes: Option<u32>,
}

impl Keepalive {
    /// `None`: switched off.
    fn read(given: Given) -> Result<Option<Keepalive>, Fault> {
        let Some(text) = given.str().filter(|text| text.contains(':')) else {
            return valid::boolean(given)
                .map(|on| on.then(Keepalive::default))
                .map_err(|fault| Fault::new(fault.what, KEEPALIVE));
        };
        let parts: Vec<&str> = text.split(':').map(str::trim).collect();
        let [idle, interval, probes] = parts.as_slice() else {
            return Err(Fault::new("not three parts", KEEPALIVE));
        };
        let seconds = |text: &str, which: &str| {
            let kind = ValueKind::from(text);
            let given = Given {
                kind: &kind,
                loose: true,
            };
            let read = units::duration(given, Duration::from_secs(1)..=KEEPALIVE_MAX);
            match (text.is_empty(), read) {
                (true, _) => Ok(None),
                (false, Ok(read)) if read.subsec_millis() == 0 => Ok(Some(read.as_secs() as u32)),
                (false, Ok(_)) => Err(Fault::new(format!("{which} is not in whole seconds"), KEEPALIVE)),
                (false, Err(fault)) => Err(Fault::new(format!("{which}: {}", fault.what), fault.remedy)),
            }
        };
        let keepalive = Keepalive {
            idle_s: seconds(idle, "keepidle")?,
            interval_s: seconds(interval, "keepintvl")?,
            probes: match probes.parse() {
                _ if probes.is_empty() => None,
                Ok(number) if (1..=KEEPALIVE_PROBES_MAX).contains(&number) => Some(number),
                _ => {
                    let what = format!("keepcnt is not a number from 1 to {KEEPALIVE_PROBES_MAX}");
                    return Err(Fault::new(what, KEEPALIVE));
                }
            },
        };
        match keepalive == Keepalive::default() {
            true => Err(Fault::new("none of the three is given", KEEPALIVE)),
            false => Ok(Some(keepalive)),
        }
    }

    fn text(self) -> String {
        let seconds =
            |s: Option<u32>| s.map_or(String::new(), |s| write_duration(Duration::from_secs(s.into())));
        match self == Keepalive::default() {
            true => "true".to_owned(),
            false => {
                let probes = self.probes.map_or(String::new(), |probes| probes.to_string());
                format!(
                    "\"{}:{}:{probes}\"",
                    seconds(self.idle_s),
                    seconds(self.interval_s)
                )
            }
        }
    }
}

/// One listener of a file, before its addresses are known.
#[derive(Default)]
struct Read {
    backlog: Option<u32>,
    proxy_protocol: bool,
    options: ListenOptions,
    /// Options that only some addresses can have, as they are written.
    written: Vec<&'static str>,
}

/// Options that only TCP has.
const OF_TCP: [&str; 4] = ["so_keepalive", "deferred", "fastopen", "ipv6only"];

impl Servers<'_, '_> {
    pub(super) fn listen(&mut self, key: &str, at: OriginId, table: &Map<String, Value>) -> Vec<Listen> {
        let key = join(key, "listen");
        let Some(value) = table.get("listen") else {
            self.check.findings.report(
                at,
                &key,
                "missing, a server needs an address such as listen = \"0.0.0.0:8080\"",
            );
            return Vec::new();
        };
        let items = entries(&key, value);
        if items.is_empty() {
            self.check.read(&key, value, |_| {
                Err::<(), _>(Fault::new("empty", "give at least one address"))
            });
        }
        let mut listen = Vec::new();
        for (key, item) in items {
            let ValueKind::Table(table) = &item.kind else {
                self.bind(&key, item, (&Read::default(), table), &mut listen);
                continue;
            };
            if !table.contains_key("address") {
                let at = self.check.findings.origin_of(item);
                let text = "missing, a listener needs an address such as \"0.0.0.0:8080\"";
                self.check.findings.report(at, &join(&key, "address"), text);
            }
            let read = self.options(&key, table);
            if let Some(address) = table.get("address") {
                self.bind(&join(&key, "address"), address, (&read, table), &mut listen);
            }
        }
        listen
    }

    fn options(&mut self, key: &str, table: &Map<String, Value>) -> Read {
        let check = &mut self.check;
        let buffer = |given: Given| units::size(given, 1..=BUFFER_MAX_BYTES);
        let queue = |given: Given| valid::number(given, 1..=BACKLOG_MAX);
        let ipv6only = check.at(table, key, "ipv6only", valid::boolean);
        let options = ListenOptions {
            dual: ipv6only == Some(false),
            rcvbuf: check.at(table, key, "rcvbuf", buffer).map(|bytes| bytes as u32),
            sndbuf: check.at(table, key, "sndbuf", buffer).map(|bytes| bytes as u32),
            deferred: check.at(table, key, "deferred", valid::boolean).unwrap_or(false),
            fastopen: check.at(table, key, "fastopen", queue),
            keepalive: check.at(table, key, "so_keepalive", Keepalive::read).flatten(),
            mode: check.at(table, key, "mode", mode),
        };
        let only_some = OF_TCP.into_iter().chain(["mode"]);
        Read {
            backlog: check.at(table, key, "backlog", queue),
            proxy_protocol: check
                .at(table, key, "proxy_protocol", valid::boolean)
                .unwrap_or(false),
            options,
            written: only_some.filter(|name| table.contains_key(*name)).collect(),
        }
    }

    /// Takes the addresses of one listener, unless another one has them.
    ///
    /// Only equal addresses clash: every listener is bound with SO_REUSEPORT by the same user, and then Linux lets
    /// a wildcard and an address of the same port stand side by side and gives a connection to the closer match
    /// (`inet_csk_get_port`, `inet_lhash2_lookup`): an IPv4 wildcard before an IPv6 one that takes IPv4 too.
    fn bind(
        &mut self,
        key: &str,
        value: &Value,
        (read, table): (&Read, &Map<String, Value>),
        listen: &mut Vec<Listen>,
    ) {
        let world = self.check.world;
        let addresses = self.check.read(key, value, |given| match given.kind {
            ValueKind::I64(port) => address::listener_port(*port),
            _ => address::listeners(valid::text(given, "\"0.0.0.0:8080\"")?, world),
        });
        let at = self.check.findings.origin_of(value);
        let addresses = addresses.unwrap_or_default();
        let options_key = key.strip_suffix(".address").unwrap_or(key);
        if let Some(first) = addresses.first() {
            for name in &read.written {
                if let Some(fault) = misplaced(name, first) {
                    self.check.at(table, options_key, name, |_| Err::<(), _>(fault));
                }
            }
        }
        for address in addresses {
            if let Some((other, other_at)) = self.listeners.get(&address) {
                let place = self.check.place(*other_at);
                let what = format!("{address} is already taken by {other} at {place}");
                let fault = Fault::new(what, "give each listener an address of its own");
                self.check.findings.fault(at, key, fault);
                continue;
            }
            if self.listeners.len() == MAX_LISTENERS {
                let fault = Fault::new(
                    format!("with it there are more than {MAX_LISTENERS} listeners"),
                    "leave some out; each port of a range is one",
                );
                return self.check.findings.fault(at, key, fault);
            }
            self.listeners.insert(address.clone(), (key.to_owned(), at));
            listen.push(Listen {
                address,
                backlog: read.backlog.unwrap_or(defaults::BACKLOG),
                proxy_protocol: read.proxy_protocol,
                options: read.options.clone(),
            });
        }
    }
}

/// Why an option says nothing of a listener at this address.
fn misplaced(option: &str, address: &Address) -> Option<Fault> {
    let what = match (option, address) {
        ("mode", Address::Tcp(_)) => "only a unix socket has permissions",
        ("mode", Address::Unix(_)) => return None,
        (_, Address::Unix(_)) => "a unix socket has no such thing",
        ("ipv6only", Address::Tcp(address)) if address.is_ipv4() => "the address is not IPv6",
        _ => return None,
    };
    Some(Fault::new(what, "remove it"))
}

/// Permissions in octal digits.
fn mode(given: Given) -> Result<u32, Fault> {
    const REMEDY: &str = "write them as octal digits in quotes, for example \"0660\"";
    let text = valid::text(given, "\"0660\"").map_err(|fault| Fault::new(fault.what, REMEDY))?;
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 && text.bytes().all(|b| b.is_ascii_digit()) => Ok(mode),
        _ => Err(Fault::new("not permissions", REMEDY)),
    }
}

/// The options of a listener as keys of its table, those alone that are not as they are anyway.
pub(super) fn write(options: &ListenOptions) -> String {
    let mut text = String::new();
    let mut key = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            text.push_str(&format!(", {name} = {value}"));
        }
    };
    let size = |bytes: u32| format!("\"{}\"", write_size(bytes as usize));
    key("ipv6only", options.dual.then(|| "false".to_owned()));
    key("rcvbuf", options.rcvbuf.map(size));
    key("sndbuf", options.sndbuf.map(size));
    key("deferred", options.deferred.then(|| "true".to_owned()));
    key("fastopen", options.fastopen.map(|queue| queue.to_string()));
    key("so_keepalive", options.keepalive.map(Keepalive::text));
    key("mode", options.mode.map(|mode| format!("\"{mode:04o}\"")));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Option<Keepalive>, String> {
        let kind = ValueKind::from(text);
        Keepalive::read(Given {
            kind: &kind,
            loose: true,
        })
        .map_err(|fault| fault.what)
    }

    #[test]
    fn keepalive_has_the_three_parts_of_nginx_of_which_each_may_be_missing() {
        let parts = |idle_s, interval_s, probes| {
            Ok(Some(Keepalive {
                idle_s,
                interval_s,
                probes,
            }))
        };
        assert_eq!(read("30m::10"), parts(Some(1800), None, Some(10)));
        assert_eq!(read("5:6:7"), parts(Some(5), Some(6), Some(7)));
        assert_eq!(read(":2s:"), parts(None, Some(2), None));
        assert_eq!(read("on"), Ok(Some(Keepalive::default())));
        assert_eq!(read("off"), Ok(None));
    }

    #[test]
    fn keepalive_of_another_form_is_refused() {
        for (text, what) in [
            ("::", "none of the three is given"),
            ("1:2", "not three parts"),
            ("1:2:3:4", "not three parts"),
            ("500ms::", "keepidle: out of range"),
            ("1s500ms::", "keepidle is not in whole seconds"),
            (":10h:", "keepintvl: out of range"),
            ("::128", "keepcnt is not a number from 1 to 127"),
            ("maybe", "neither true nor false"),
        ] {
            assert_eq!(read(text), Err(what.to_owned()), "{text}");
        }
    }
}
