//! Where a session goes: `proxy_pass` with its variables. Pure, except that the host's name is read once.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use culvert_shared::client;
use culvert_shared::config::{
    Address, Part, Target, Template, Upstream, Variable, VariableMap, is_host_name,
};
use culvert_shared::hosts::is_of_a_host;

use regex::Captures;

use crate::client_hello::Hello;
use crate::map::Lookup;
use crate::proxy_protocol::Addresses;

/// Upstream groups by name, and what variables need.
pub struct Router {
    groups: HashMap<String, usize>,
    maps: Vec<Lookup>,
    hostname: String,
}

/// Where a session is to be connected to.
#[derive(Clone, Debug, PartialEq)]
pub enum Route {
    /// An upstream group, by its index in the configuration.
    Group(usize),
    /// One address.
    Address(Address),
    /// Whatever addresses the host of this name has, with this port. The name is in lower case, without a dot at its end.
    Host(String, u16),
}

/// A value of `proxy_pass` that leads nowhere, for people: it comes from clients, so nothing of it is written as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Astray {
    value: String,
    why: &'static str,
}

/// What of such a value is written, in characters.
const SHOWN_MAX: usize = 100;

impl Astray {
    /// There is no `proxy_pass` any more.
    pub fn nowhere() -> Astray {
        Astray {
            value: String::new(),
            why: "nowhere",
        }
    }
}

impl std::fmt::Display for Astray {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shown = self.value.chars().take(SHOWN_MAX).flat_map(char::escape_default);
        let rest = if self.value.chars().nth(SHOWN_MAX).is_some() {
            "…"
        } else {
            ""
        };
        write!(f, "\"{}{rest}\", {}", shown.collect::<String>(), self.why)
    }
}

/// What is known of a session before its peer is chosen.
#[derive(Clone, Debug)]
pub struct Ends {
    /// The client's address: who connected, or who a PROXY header that is believed names.
    pub remote: SocketAddr,
    /// The address that it connected to.
    pub local: SocketAddr,
    /// Who connected.
    pub peer: SocketAddr,
    /// What a PROXY header names, believed or not.
    pub header: Option<Addresses>,
    /// What the TLS hello says.
    pub hello: Option<Box<Hello>>,
}

impl Ends {
    /// Those of a connection that began with no PROXY header.
    pub fn new(remote: SocketAddr, local: SocketAddr) -> Ends {
        Ends {
            remote,
            local,
            peer: remote,
            header: None,
            hello: None,
        }
    }
}

impl Router {
    /// A router for the groups of a configuration.
    pub fn new(upstreams: &[Upstream], hostname: String) -> Router {
        let groups = upstreams
            .iter()
            .enumerate()
            .map(|(index, group)| (group.name.clone(), index))
            .collect();
        Router {
            groups,
            maps: Vec::new(),
            hostname,
        }
    }

    /// The same, with the variables that `[[map]]` makes.
    pub fn with_maps(mut self, maps: &[VariableMap]) -> Router {
        self.maps = maps.iter().map(Lookup::new).collect();
        self
    }

    /// The session's route; an error is a value that leads nowhere.
    pub fn route(&self, target: &Target, ends: &Ends) -> Result<Route, Astray> {
        match target {
            Target::Upstream(group) => Ok(Route::Group(*group)),
            Target::Variable(template) => {
                let value = self.expand(template, ends);
                self.look_up(&value).map_err(|why| Astray { value, why })
            }
        }
    }

    fn look_up(&self, value: &str) -> Result<Route, &'static str> {
        if let Some(group) = self.groups.get(value) {
            return Ok(Route::Group(*group));
        }
        if let Some(path) = value.strip_prefix("unix:").filter(|path| !path.is_empty()) {
            return Ok(Route::Address(Address::Unix(PathBuf::from(path))));
        }
        if let Ok(address) = value.parse::<SocketAddr>() {
            return match is_of_a_host(address.ip()) {
                true => Ok(Route::Address(Address::Tcp(address))),
                false => Err("which is no host's address"),
            };
        }
        if value.is_empty() {
            return Err("which is empty");
        }
        let Some((host, port)) = value.rsplit_once(':') else {
            return Err(match is_host(value) {
                true => "which is no upstream, and a host needs a port behind its name",
                false => "which is no upstream, no address and no host's name",
            });
        };
        let host = host.strip_suffix('.').unwrap_or(host);
        if !is_host(host) {
            return Err("which is no upstream, no address and no host's name");
        }
        // Digits only: a sign would be taken as well.
        let digits = port.bytes().all(|byte| byte.is_ascii_digit());
        match port.parse() {
            Ok(port) if port > 0 && digits => Ok(Route::Host(host.to_ascii_lowercase(), port)),
            _ => Err("which has no port that there is, 1 to 65535"),
        }
    }

    /// The text that a template gives for a session.
    pub fn expand(&self, template: &Template, ends: &Ends) -> String {
        self.expand_found(template, ends, None)
    }

    /// The same for the value of a regular expression that has found something.
    fn expand_found(&self, template: &Template, ends: &Ends, found: Option<&Captures>) -> String {
        let mut value = String::new();
        for part in &template.0 {
            match part {
                Part::Literal(text) => value.push_str(text),
                Part::Variable(Variable::Capture(group)) => {
                    let group = found.and_then(|found| found.get(usize::from(*group)));
                    value.push_str(group.map_or("", |group| group.as_str()));
                }
                Part::Variable(variable) => value.push_str(&self.value_of(*variable, ends)),
            }
        }
        value
    }

    fn value_of(&self, variable: Variable, ends: &Ends) -> String {
        match variable {
            Variable::Hostname => self.hostname.clone(),
            Variable::Map(map) => {
                let map = &self.maps[map];
                // A map is made from maps before it alone, so this ends.
                let source = self.expand(&map.source, ends);
                let (value, found) = map.find(&source);
                self.expand_found(value, ends, found.as_ref())
            }
            other => ends.value_of(other),
        }
    }
}

/// Whether a text may be asked for as a host's name. No name ends in a number (RFC 1123, section 2.1): that would be an
/// address in some other spelling, such as 127.1.
fn is_host(text: &str) -> bool {
    let last = text.rsplit('.').next().unwrap_or_default();
    is_host_name(text) && !last.bytes().all(|byte| byte.is_ascii_digit())
}

impl Ends {
    /// The value of a variable that the session alone gives; any other one is empty.
    pub fn value_of(&self, variable: Variable) -> String {
        match variable {
            Variable::RemoteAddr => client::host(self.remote),
            Variable::RemotePort => client::port(self.remote),
            Variable::ServerAddr => client::host(self.local),
            Variable::ServerPort => client::port(self.local),
            Variable::RealipRemoteAddr => client::host(self.peer),
            Variable::RealipRemotePort => client::port(self.peer),
            Variable::SslPrereadServerName => said(self, |hello| &hello.server_name),
            Variable::SslPrereadAlpnProtocols => said(self, |hello| &hello.alpn_protocols),
            Variable::SslPrereadProtocol => said(self, |hello| hello.protocol),
            Variable::ProxyProtocolAddr => named(self, |named| named.source.ip().to_string()),
            Variable::ProxyProtocolPort => named(self, |named| named.source.port().to_string()),
            Variable::ProxyProtocolServerAddr => named(self, |named| named.destination.ip().to_string()),
            Variable::ProxyProtocolServerPort => named(self, |named| named.destination.port().to_string()),
            Variable::Hostname | Variable::Map(_) | Variable::Capture(_) => String::new(),
        }
    }
}

/// Something that the TLS hello says; empty without one, as with nginx.
fn said(ends: &Ends, what: impl FnOnce(&Hello) -> &str) -> String {
    ends.hello.as_deref().map(what).unwrap_or_default().to_owned()
}

/// Something that the PROXY header names; empty without one, as with nginx.
fn named(ends: &Ends, what: impl FnOnce(&Addresses) -> String) -> String {
    ends.header.as_ref().map(what).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use culvert_shared::config::Balance;

    fn router() -> Router {
        let group = Upstream {
            name: "port-81".into(),
            balance: Balance::RoundRobin,
            peers: Vec::new(),
            check: None,
            queue: None,
            names: Vec::new(),
        };
        Router::new(&[group], "box".into())
    }

    fn ends() -> Ends {
        Ends::new("192.0.2.1:5000".parse().unwrap(), "[::1]:81".parse().unwrap())
    }

    fn route(parts: Vec<Part>) -> Result<Route, String> {
        let route = router().route(&Target::Variable(Template(parts)), &ends());
        route.map_err(|astray| astray.to_string())
    }

    #[test]
    fn a_variable_may_name_a_group_an_address_or_a_unix_socket() {
        let literal = |text: &str| Part::Literal(text.into());
        let group = route(vec![literal("port-"), Part::Variable(Variable::ServerPort)]);
        assert_eq!(group, Ok(Route::Group(0)));
        let address = route(vec![Part::Variable(Variable::RemoteAddr), literal(":9")]);
        assert_eq!(
            address,
            Ok(Route::Address(Address::Tcp("192.0.2.1:9".parse().unwrap())))
        );
        let unix = route(vec![literal("unix:/run/"), Part::Variable(Variable::Hostname)]);
        assert_eq!(unix, Ok(Route::Address(Address::Unix("/run/box".into()))));
    }

    fn route_text(text: &str) -> Result<Route, String> {
        route(vec![Part::Literal(text.into())])
    }

    #[test]
    fn a_host_has_a_name_and_a_port() {
        for (text, host) in [
            ("App.Example.COM:443", "app.example.com"),
            ("app.example.com.:443", "app.example.com"),
            ("_sip.x-1:443", "_sip.x-1"),
            ("1.2.3.4.example:443", "1.2.3.4.example"),
            ("localhost:443", "localhost"),
        ] {
            assert_eq!(route_text(text), Ok(Route::Host(host.into(), 443)), "{text}");
        }
        let long = "a.".repeat(126);
        assert!(route_text(&format!("{long}b:1")).is_ok(), "253 bytes");
        for text in [
            "a.example",
            "nobody",
            ":443",
            "a.example:",
            "a.example:0",
            "a.example:65536",
            "a.example:+1",
        ]
        .into_iter()
        .chain([
            "a.example:1:2",
            "127.1:80",
            "2130706433:80",
            "1.2.3.4.5:80",
            "1.2.3.4",
            "a..b:1",
            "..:1",
            "a b:1",
        ])
        .chain([
            "[::1]",
            "[a.example]:1",
            "a\u{e9}.example:1",
            "*.example:1",
            "a/b:1",
            "",
            &format!("{long}bc:1"),
        ])
        .chain([&format!("{}.example:1", "a".repeat(64))[..]])
        .chain([
            "0.0.0.0:80",
            "[::]:80",
            "[::ffff:0.0.0.0]:80",
            "224.0.0.1:80",
            "[ff02::1]:80",
        ]) {
            let said = route_text(text).expect_err(text);
            assert!(said.contains(", which "), "{said}");
        }
        assert!(
            route_text("a.example")
                .unwrap_err()
                .ends_with("needs a port behind its name")
        );
        assert!(route_text("a.example:0").unwrap_err().ends_with("1 to 65535"));
    }

    #[test]
    fn what_leads_nowhere_is_said_on_one_short_line_of_plain_letters() {
        let said = route_text(&format!("a\n\u{1b}[2J\"{}", "\u{e9}".repeat(5000))).unwrap_err();
        assert!(said.starts_with(r#""a\n\u{1b}[2J\"\u{e9}"#), "{said}");
        assert!(said.len() < 1000 && said.contains("…\", which"), "{said}");
        assert!(!said.contains(char::is_control));
    }
}
