//! Addresses: what `listen`, a peer's `address` and `proxy_pass` may hold. Names are resolved here, once.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use super::diagnostic::Fault;
use super::world::World;

/// What a peer's address looks like.
const PEER: &str = "write host:port, [IPv6 address]:port or unix:/path";

/// What a listener's address looks like.
const LISTENER: &str = "write a port, address:port, *:port, [IPv6 address]:port, one of these with a range of ports such as \
                        5000-5010, or unix:/path";

/// The longest path of a unix socket: `sun_path` of sockaddr_un without its final NUL.
const UNIX_PATH_MAX_BYTES: usize = 107;

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

    /// The address that is shown as `text`.
    pub fn shown_as(text: &str) -> Address {
        let path = || Address::Unix(text.strip_prefix("unix:").unwrap_or(text).into());
        text.parse().map_or_else(|_| path(), Address::Tcp)
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

/// The addresses that a peer stands for. A host name is resolved now, as nginx does: all its addresses are peers.
pub(super) fn peers(text: &str, world: &dyn World) -> Result<Vec<Address>, Fault> {
    if let Some(path) = text.strip_prefix("unix:") {
        return unix(path, PEER).map(|address| vec![address]);
    }
    let (host, port) = split(text, PEER)?;
    Ok(resolve(host, port, PEER, world)?
        .into_iter()
        .map(Address::Tcp)
        .collect())
}

fn unix(path: &str, remedy: &str) -> Result<Address, Fault> {
    match path {
        "" => Err(Fault::new("a unix socket without a path", remedy)),
        _ if path.contains('\0') => Err(Fault::new("a path cannot hold the character NUL", remedy)),
        _ if path.len() > UNIX_PATH_MAX_BYTES => Err(Fault::new(
            format!("a socket's path has at most {UNIX_PATH_MAX_BYTES} bytes"),
            "use a shorter one",
        )),
        _ => Ok(Address::Unix(PathBuf::from(path))),
    }
}

/// The unix socket that a server, not a peer, is reached at: `unix:` and its path.
pub(super) fn unix_server(text: &str, remedy: &str) -> Result<Address, Fault> {
    unix(text.strip_prefix("unix:").unwrap_or(text), remedy)
}

/// As [`peers`], for what speaks over sockets of the internet only.
pub(super) fn sockets(text: &str, remedy: &str, world: &dyn World) -> Result<Vec<SocketAddr>, Fault> {
    let (host, port) = split(text, remedy)?;
    resolve(host, port, remedy, world)
}

/// The name and the port of a peer whose name is looked up later.
pub(super) fn host_and_port(text: &str) -> Result<(&str, u16), Fault> {
    split(text, PEER)
}

/// The addresses that a listener stands for. A bare port and `*` mean every IPv4 address, as with nginx; each port of a
/// range is a listener of its own.
pub(super) fn listeners(text: &str, world: &dyn World) -> Result<Vec<Address>, Fault> {
    if let Some(path) = text.strip_prefix("unix:") {
        // Relative to what, the start, a reload and an upgrade would not agree on.
        return match path.is_empty() || path.starts_with('/') {
            true => unix(path, LISTENER).map(|address| vec![address]),
            false => Err(Fault::new("a socket's path has to begin with /", LISTENER)),
        };
    }
    let Some((before, last)) = range(text) else {
        return one_port(text, world).map(|found| found.into_iter().map(Address::Tcp).collect());
    };
    let last = port(last, LISTENER)?;
    let mut found = Vec::new();
    for first in one_port(before, world)? {
        if first.port() > last {
            return Err(Fault::new(
                "a range of ports that ends before it begins",
                LISTENER,
            ));
        }
        found.extend((first.port()..=last).map(|port| Address::Tcp(SocketAddr::new(first.ip(), port))));
    }
    Ok(found)
}

/// The last port of a range, and what stands before it. A host's name may hold the sign too.
fn range(text: &str) -> Option<(&str, &str)> {
    let (before, last) = text.rsplit_once('-')?;
    let first = before.rsplit_once(':').map_or(before, |(_, first)| first);
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    (digits(first) && !last.contains([':', ']'])).then_some((before, last))
}

fn one_port(text: &str, world: &dyn World) -> Result<Vec<SocketAddr>, Fault> {
    if text.bytes().all(|b| b.is_ascii_digit()) {
        return Ok(vec![SocketAddr::from((
            Ipv4Addr::UNSPECIFIED,
            port(text, LISTENER)?,
        ))]);
    }
    let (host, port) = split(text, LISTENER)?;
    let addresses = match host {
        "*" => vec![SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))],
        host => resolve(host, port, LISTENER, world)?,
    };
    let mapped = addresses.iter().find_map(|address| match address.ip() {
        IpAddr::V6(ip) => ip.to_ipv4_mapped(),
        IpAddr::V4(_) => None,
    });
    match mapped {
        Some(ip) => Err(Fault::new(
            "an IPv6 listener takes no IPv4 connections",
            format!("write {ip}:{port}"),
        )),
        None => Ok(addresses),
    }
}

/// A listener's address given as a number: its port.
pub(super) fn listener_port(number: i64) -> Result<Vec<Address>, Fault> {
    let port = port(&number.to_string(), LISTENER)?;
    Ok(vec![Address::Tcp(SocketAddr::from((
        Ipv4Addr::UNSPECIFIED,
        port,
    )))])
}

fn split<'a>(text: &'a str, remedy: &str) -> Result<(&'a str, u16), Fault> {
    let parts = match text.strip_prefix('[') {
        Some(rest) => rest.split_once("]:"),
        None => text.rsplit_once(':'),
    };
    let Some((host, digits)) = parts else {
        let what = if text.parse::<u16>().is_ok() {
            "a port without a host"
        } else {
            "no port"
        };
        return Err(Fault::new(what, remedy));
    };
    if host.contains(':') && !text.starts_with('[') {
        return Err(Fault::new("an IPv6 address needs brackets", remedy));
    }
    Ok((host, port(digits, remedy)?))
}

fn port(digits: &str, remedy: &str) -> Result<u16, Fault> {
    let decimal = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    match digits.parse::<u16>() {
        Ok(port) if port > 0 && decimal => Ok(port),
        _ => Err(Fault::new("not a port from 1 to 65535", remedy)),
    }
}

fn resolve(host: &str, port: u16, remedy: &str, world: &dyn World) -> Result<Vec<SocketAddr>, Fault> {
    if let Ok(ip) = host.parse::<Ipv4Addr>() {
        return Ok(vec![SocketAddr::from((ip, port))]);
    }
    if let Ok(ip) = host.parse::<Ipv6Addr>() {
        return Ok(vec![SocketAddr::from((ip, port))]);
    }
    // The C library takes 127.1 and 0x7f000001 for addresses, and asks a name server about 1.2.3.400.
    if host.bytes().all(|b| b.is_ascii_digit() || b == b'.') || host.starts_with("0x") {
        return Err(Fault::new("not an IPv4 address", remedy));
    }
    let scoped = host
        .split_once('%')
        .is_some_and(|(ip, _)| ip.parse::<Ipv6Addr>().is_ok());
    let named = host
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'));
    if !named && !scoped {
        return Err(Fault::new("neither an address nor a host name", remedy));
    }
    let found = world.resolve(host, port).map_err(|error| {
        Fault::new(
            format!("host {host} cannot be resolved: {error}"),
            "correct the name, or write an address",
        )
    })?;
    let mut addresses: Vec<SocketAddr> = Vec::with_capacity(found.len());
    for address in found {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    match addresses.is_empty() {
        true => Err(Fault::new(
            format!("host {host} has no address"),
            "correct the name, or write an address",
        )),
        false => Ok(addresses),
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;
    use std::io;

    use super::super::User;
    use super::*;

    /// Knows no name, so that an address cannot be one by chance.
    struct Nameless;

    impl World for Nameless {
        fn variable(&self, _: &str) -> Option<OsString> {
            None
        }

        fn variables(&self) -> Vec<(OsString, OsString)> {
            Vec::new()
        }

        fn online_cpus(&self) -> Vec<usize> {
            vec![0]
        }

        fn allowed_cpus(&self) -> Vec<usize> {
            vec![0]
        }

        fn user(&self, _: &str) -> io::Result<Option<User>> {
            Ok(None)
        }

        fn resolve(&self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
            match host {
                "fe80::1%lo" => Ok(vec![SocketAddr::from((Ipv6Addr::LOCALHOST, port))]),
                "nothing" => Ok(Vec::new()),
                _ => Err(io::Error::other("no such name")),
            }
        }
    }

    fn peer(text: &str) -> Result<Vec<String>, String> {
        let peers = peers(text, &Nameless).map_err(|fault| fault.what)?;
        Ok(peers.iter().map(ToString::to_string).collect())
    }

    fn listener(text: &str) -> Result<Vec<String>, String> {
        let listeners = listeners(text, &Nameless).map_err(|fault| fault.what)?;
        Ok(listeners.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn peers_are_ip_addresses_and_unix_paths() {
        assert_eq!(peer("127.0.0.1:80"), Ok(vec!["127.0.0.1:80".into()]));
        assert_eq!(peer("[::1]:80"), Ok(vec!["[::1]:80".into()]));
        assert_eq!(peer("[fe80::1%lo]:80"), Ok(vec!["[::1]:80".into()]));
        assert_eq!(peer("unix:/run/a b"), Ok(vec!["unix:/run/a b".into()]));
    }

    #[test]
    fn wrong_peers_say_why() {
        assert_eq!(peer("127.0.0.1"), Err("no port".into()));
        assert_eq!(peer("8080"), Err("a port without a host".into()));
        assert_eq!(peer("::1:80"), Err("an IPv6 address needs brackets".into()));
        assert_eq!(peer("[::1]"), Err("no port".into()));
        assert_eq!(peer("127.0.0.1:0"), Err("not a port from 1 to 65535".into()));
        assert_eq!(peer("127.0.0.1:+1"), Err("not a port from 1 to 65535".into()));
        assert_eq!(peer("127.0.0.1:65536"), Err("not a port from 1 to 65535".into()));
        assert_eq!(peer("1.2.3.400:1"), Err("not an IPv4 address".into()));
        assert_eq!(peer("127.1:1"), Err("not an IPv4 address".into()));
        assert_eq!(peer(":1"), Err("not an IPv4 address".into()));
        assert_eq!(peer("a b:1"), Err("neither an address nor a host name".into()));
        assert_eq!(peer("[x]y]:1"), Err("neither an address nor a host name".into()));
        assert_eq!(peer("a:1"), Err("host a cannot be resolved: no such name".into()));
        assert_eq!(peer("nothing:1"), Err("host nothing has no address".into()));
        assert_eq!(peer("unix:"), Err("a unix socket without a path".into()));
        assert_eq!(
            peer(&format!("unix:/{}", "x".repeat(107))),
            Err("a socket's path has at most 107 bytes".into())
        );
    }

    #[test]
    fn each_port_of_a_range_is_a_listener() {
        let three = |before: &str| Ok((80..=82).map(|port| format!("{before}:{port}")).collect());
        assert_eq!(listener("127.0.0.1:80-82"), three("127.0.0.1"));
        assert_eq!(listener("[::]:80-82"), three("[::]"));
        assert_eq!(listener("*:80-82"), three("0.0.0.0"));
        assert_eq!(listener("80-82"), three("0.0.0.0"));
        assert_eq!(listener("127.0.0.1:80-80"), Ok(vec!["127.0.0.1:80".into()]));
        assert_eq!(
            listener("a-1:80"),
            Err("host a-1 cannot be resolved: no such name".into())
        );
        assert_eq!(
            listener("unix:/run/a-b:1-2"),
            Ok(vec!["unix:/run/a-b:1-2".into()])
        );
    }

    #[test]
    fn wrong_listeners_say_why() {
        assert_eq!(listener("0"), Err("not a port from 1 to 65535".into()));
        assert_eq!(listener("65536"), Err("not a port from 1 to 65535".into()));
        assert_eq!(
            listener("127.0.0.1:90-80"),
            Err("a range of ports that ends before it begins".into())
        );
        for wrong in ["80-", "0-80", "80-65536", "127.0.0.1:80-x", "[::]:80-90-"] {
            assert_eq!(listener(wrong).map_err(|_| ()), Err(()), "{wrong}");
        }
        assert_eq!(
            listener("unix:a"),
            Err("a socket's path has to begin with /".into())
        );
        assert_eq!(listener("unix:"), Err("a unix socket without a path".into()));
        assert_eq!(
            listener("[::ffff:127.0.0.1]:80"),
            Err("an IPv6 listener takes no IPv4 connections".into())
        );
        assert_eq!(
            listener_port(-1).map_err(|fault| fault.what),
            Err("not a port from 1 to 65535".into())
        );
    }

    #[test]
    fn an_address_is_found_in_what_is_shown_of_it() {
        let tcp = ["192.0.2.7:80", "[2001:db8::1]:443"].map(|text| Address::Tcp(text.parse().unwrap()));
        for address in tcp.into_iter().chain([Address::Unix("/run/a socket".into())]) {
            assert_eq!(Address::shown_as(&address.to_string()), address);
        }
    }
}
