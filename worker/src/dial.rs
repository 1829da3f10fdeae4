//! Opens a socket towards a peer and begins to connect it: where it comes from (`proxy_bind`) and whether a silent
//! peer is asked if it is still there (`proxy_socket_keepalive`). Knows no session.

use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use culvert_shared::client::is_unix;
use culvert_shared::config::{Address, Algorithm, ProxyBind, Stream as Settings};
use culvert_shared::congestion;
use culvert_shared::sys::socket::{self, IntOption};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, UnixAddr, bind, connect, setsockopt, sockopt,
};

use crate::sockets;

/// A session that wants a connection.
pub struct Asker<'a> {
    /// What counts for it.
    pub settings: &'a Settings,
    /// Its client's address.
    pub client: SocketAddr,
    /// The congestion control that the host gives to new sockets.
    pub congestion: Option<Algorithm>,
}

/// A connecting socket, and whether the connection is still under way. `for_whom`: none for a health check.
///
/// # Errors
/// What the host says, or what the peer has said already. EAFNOSUPPORT: the peer cannot be reached from where the
/// settings want it.
pub fn start_connecting(address: &Address, for_whom: Option<Asker<'_>>) -> Result<(OwnedFd, bool), Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let open = |family| nix::sys::socket::socket(family, SockType::Stream, flags, None);
    let (socket, result) = match address {
        Address::Tcp(address) => {
            let socket = open(if address.is_ipv4() {
                AddressFamily::Inet
            } else {
                AddressFamily::Inet6
            })?;
            if let Some(Asker {
                settings,
                client,
                congestion,
            }) = for_whom
            {
                if let Some(default) = congestion
                    && let Some(wanted) = settings.tcp_congestion.choose(default, address.ip())
                    && let Err(errno) = congestion::set(socket.as_fd(), wanted)
                {
                    // The master has seen that it can be had, so somebody has changed that since.
                    log::warn!(
                        "connection to {address} without tcp_congestion = \"{}\": {}",
                        wanted.name(),
                        errno.desc()
                    );
                }
                if settings.proxy_socket_keepalive {
                    setsockopt(&socket, sockopt::KeepAlive, &true)?;
                }
                if let Some((from, transparent)) = origin(settings.proxy_bind, client) {
                    come_from(socket.as_fd(), from, transparent, *address)?;
                }
            }
            let result = connect(socket.as_raw_fd(), &SockaddrStorage::from(*address));
            (socket, result)
        }
        Address::Unix(path) => {
            let socket = open(AddressFamily::Unix)?;
            let result = connect(socket.as_raw_fd(), &UnixAddr::new(path)?);
            (socket, result)
        }
    };
    match result {
        Ok(()) => Ok((socket, false)),
        // A peer on this host may have answered already: the handshake's segments were handled before
        // connect returned. Seeing that at once saves a turn of the event loop.
        Err(Errno::EINPROGRESS) => {
            let under_way = !sockets::is_connected(socket.as_fd());
            Ok((socket, under_way))
        }
        Err(errno) => Err(errno),
    }
}

/// Where a connection is to come from, and whether that need not be this host. A client of a unix socket has no
/// address to come from: then it is the host's.
fn origin(proxy_bind: ProxyBind, client: SocketAddr) -> Option<(SocketAddr, bool)> {
    match proxy_bind {
        ProxyBind::Off => None,
        ProxyBind::Address { address, transparent } => Some((address, transparent)),
        ProxyBind::Client { .. } if is_unix(client) => None,
        ProxyBind::Client { port } => {
            let port = if port { client.port() } else { 0 };
            Some((SocketAddr::new(client.ip().to_canonical(), port), true))
        }
    }
}

fn come_from(
    socket: BorrowedFd<'_>,
    from: SocketAddr,
    transparent: bool,
    to: SocketAddr,
) -> Result<(), Errno> {
    if from.is_ipv4() != to.is_ipv4() {
        log::warn!(
            "no connection can be made from {} to {to}: they are of two kinds",
            from.ip()
        );
        return Err(Errno::EAFNOSUPPORT);
    }
    let set = |option| socket::set_int(socket, option, 1).map_err(|error| errno_of(&error));
    let prepared = || {
        if transparent {
            set(match from.is_ipv4() {
                true => IntOption::TransparentV4,
                false => IntOption::TransparentV6,
            })?;
        }
        match from.port() {
            // The port is chosen when the peer is known, so that there are as many for each peer as the host has.
            0 => set(IntOption::BindAddressNoPort)?,
            // Sessions with different peers may share it, and one that has just ended is not in the way.
            _ => setsockopt(&socket, sockopt::ReuseAddr, &true)?,
        }
        bind(socket.as_raw_fd(), &SockaddrStorage::from(from))
    };
    prepared().inspect_err(|errno| {
        let why = match errno {
            Errno::EPERM => ": the worker lacks CAP_NET_RAW",
            Errno::EADDRNOTAVAIL => ": it is no address of this host (ip address shows them)",
            _ => "",
        };
        log::warn!(
            "failed to connect to {to} from {from}, as proxy_bind says: {}{why}",
            errno.desc()
        );
    })
}

fn errno_of(error: &std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_without_an_address_is_nobody_to_come_from() {
        let client = "192.0.2.7:5000".parse().unwrap();
        let bind = ProxyBind::Client { port: false };
        assert_eq!(origin(bind, client), Some(("192.0.2.7:0".parse().unwrap(), true)));
        assert_eq!(
            origin(
                ProxyBind::Client { port: true },
                "[::ffff:192.0.2.7]:5000".parse().unwrap()
            ),
            Some((client, true)),
            "a mapped address is the IPv4 address"
        );
        assert_eq!(origin(bind, culvert_shared::client::UNIX), None);
        assert_eq!(origin(ProxyBind::Off, client), None);
    }
}
