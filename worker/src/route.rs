//! Where a session goes: `proxy_pass` with its variables. Pure, except that the host's name is read once.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use culvert_shared::client;
use culvert_shared::config::{Address, Part, Target, Template, Upstream, Variable, VariableMap};

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

    /// The session's route; an error is the value that leads nowhere.
    pub fn route(&self, target: &Target, ends: &Ends) -> Result<Route, String> {
        match target {
            Target::Upstream(group) => Ok(Route::Group(*group)),
            Target::Variable(template) => {
                let value = self.expand(template, ends);
                self.look_up(&value).ok_or(value)
            }
        }
    }

    fn look_up(&self, value: &str) -> Option<Route> {
        if let Some(group) = self.groups.get(value) {
            return Some(Route::Group(*group));
        }
        if let Some(path) = value.strip_prefix("unix:").filter(|path| !path.is_empty()) {
            return Some(Route::Address(Address::Unix(PathBuf::from(path))));
        }
        value
            .parse()
            .ok()
            .map(|address| Route::Address(Address::Tcp(address)))
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
        router().route(&Target::Variable(Template(parts)), &ends())
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
        assert_eq!(route(vec![literal("nobody")]), Err("nobody".into()));
    }
}
