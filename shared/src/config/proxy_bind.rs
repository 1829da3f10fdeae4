//! `proxy_bind`: the address that connections to peers are made from (nginx: the same).

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use super::diagnostic::Fault;
use super::valid::{self, Given};

/// What it looks like.
const REMEDY: &str = "allowed: \"off\", an address or address:port of this host, either with \" transparent\" behind it \
                      for an address that is not, \"transparent\" or \"$remote_addr:$remote_port transparent\" for the \
                      client's";

/// Where connections to peers come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ProxyBind {
    /// Wherever the host's routes say.
    #[default]
    Off,
    /// This address; port 0: any.
    Address {
        /// The address.
        address: SocketAddr,
        /// It need not be this host's.
        transparent: bool,
    },
    /// The client's address, which is not this host's.
    Client {
        /// The client's port too.
        port: bool,
    },
}

impl ProxyBind {
    /// Whether connections are made from addresses that need not be this host's.
    pub fn is_transparent(self) -> bool {
        match self {
            ProxyBind::Off => false,
            ProxyBind::Address { transparent, .. } => transparent,
            ProxyBind::Client { .. } => true,
        }
    }

    pub(super) fn read(given: Given) -> Result<ProxyBind, Fault> {
        let fault = |what: &str| Fault::new(what, REMEDY);
        let text = valid::text(given, "\"10.0.0.1\"").map_err(|fault| Fault::new(fault.what, REMEDY))?;
        let words: Vec<&str> = text.split_whitespace().collect();
        let (address, transparent) = match words.as_slice() {
            ["off"] => return Ok(ProxyBind::Off),
            ["transparent"] => return Ok(ProxyBind::Client { port: false }),
            [address] => (*address, false),
            [address, "transparent"] => (*address, true),
            _ => return Err(fault("more than an address")),
        };
        match address {
            "$remote_addr" | "$remote_addr:$remote_port" if !transparent => {
                Err(fault("the client's address is not this host's"))
            }
            "$remote_addr" => Ok(ProxyBind::Client { port: false }),
            "$remote_addr:$remote_port" => Ok(ProxyBind::Client { port: true }),
            _ if address.contains('$') => Err(fault("no other variable can stand here")),
            _ => {
                let bare = address.trim_start_matches('[').trim_end_matches(']');
                let ip: Option<IpAddr> = address.parse().ok().or_else(|| bare.parse().ok());
                let address = match (ip, address.parse::<SocketAddr>()) {
                    (Some(ip), _) => SocketAddr::new(ip, 0),
                    (None, Ok(address)) => address,
                    (None, Err(_)) => return Err(fault("not an address")),
                };
                match address.ip().is_unspecified() {
                    true => Err(fault("every address is none in particular")),
                    false => Ok(ProxyBind::Address { address, transparent }),
                }
            }
        }
    }
}

/// As a file has it.
impl fmt::Display for ProxyBind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProxyBind::Off => f.write_str("off"),
            ProxyBind::Client { port: false } => f.write_str("transparent"),
            ProxyBind::Client { port: true } => f.write_str("$remote_addr:$remote_port transparent"),
            ProxyBind::Address { address, transparent } => {
                match address {
                    SocketAddr::V6(scoped) if scoped.scope_id() != 0 => write!(f, "{address}")?,
                    _ if address.port() == 0 => write!(f, "{}", address.ip())?,
                    _ => write!(f, "{address}")?,
                }
                f.write_str(if *transparent { " transparent" } else { "" })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use config::ValueKind;

    fn read(text: &str) -> Result<ProxyBind, String> {
        let kind = ValueKind::from(text);
        let given = Given {
            kind: &kind,
            loose: false,
        };
        ProxyBind::read(given).map_err(|fault| fault.what)
    }

    #[test]
    fn the_forms_are_those_of_nginx_and_are_written_as_they_are_read() {
        for text in [
            "off",
            "transparent",
            "$remote_addr:$remote_port transparent",
            "10.0.0.1",
            "10.0.0.1:5000",
            "10.0.0.1:5000 transparent",
            "2001:db8::1",
            "[2001:db8::1]:5000",
            "[fe80::1%2]:0",
        ] {
            assert_eq!(read(text).map(|bind| bind.to_string()), Ok(text.to_owned()));
        }
        assert_eq!(read("[::1]"), read("::1"));
        assert_eq!(read("$remote_addr transparent"), read("transparent"));
    }

    #[test]
    fn what_binds_to_nothing_is_refused() {
        let wrong = [
            ("$remote_addr", "the client's address is not this host's"),
            ("$server_addr transparent", "no other variable can stand here"),
            ("10.0.0.1 maybe", "more than an address"),
            ("localhost", "not an address"),
            ("0.0.0.0", "every address is none in particular"),
            ("10.0.0.1:70000", "not an address"),
        ];
        for (text, what) in wrong {
            assert_eq!(read(text), Err(what.to_owned()), "{text}");
        }
    }
}
