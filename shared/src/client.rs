//! The address of a client that has none, because it came through a unix socket. One value that no client on the
//! network can have stands for it, so that whatever holds addresses holds this one too.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

/// Stands for the address of a client of a unix socket, and for that of the socket.
pub const UNIX: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0));

/// What people read for it (nginx: the same).
const NAME: &str = "unix:";

/// Whether it stands for a unix socket.
pub fn is_unix(address: SocketAddr) -> bool {
    address == UNIX
}

/// An address for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shown(pub SocketAddr);

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match is_unix(self.0) {
            true => f.write_str(NAME),
            false => self.0.fmt(f),
        }
    }
}

/// An address without its port, as variables have it.
pub fn host(address: SocketAddr) -> String {
    match is_unix(address) {
        true => NAME.to_owned(),
        false => address.ip().to_string(),
    }
}

/// A port, as variables have it: a unix socket has none.
pub fn port(address: SocketAddr) -> String {
    match is_unix(address) {
        true => String::new(),
        false => address.port().to_string(),
    }
}
