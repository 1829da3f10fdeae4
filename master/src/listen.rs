//! The listening sockets: one `SO_REUSEPORT` socket for each address and worker slot. They belong to
//! the slot and are held by the master, so what waits in them outlives a worker.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use culvert_shared::config::{Config, Listen, Server};
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, listen, setsockopt, socket, sockopt,
};

/// How long a start waits for addresses that are in use.
const ORPHANS_PATIENCE: Duration = Duration::from_secs(1);

/// All listening sockets of one configuration. Cloning shares the sockets; one is closed when the last
/// set that has it is dropped.
#[derive(Clone, Debug, Default)]
pub struct Listeners {
    sockets: HashMap<(SocketAddr, usize), Rc<OwnedFd>>,
}

impl Listeners {
    /// The sockets that `config` needs: those that this set has already, and new ones for the rest. The
    /// new ones are bound and listening; this set is left as it is.
    ///
    /// # Errors
    /// An address cannot be bound; nothing new is left behind then.
    pub fn next(&self, config: &Config) -> Result<Listeners> {
        // The workers of a master that was killed take a moment to notice and let go.
        let patience = if self.sockets.is_empty() {
            ORPHANS_PATIENCE
        } else {
            Duration::ZERO
        };
        let give_up = Instant::now() + patience;
        for (_, listen) in addresses(config) {
            // A sharing socket could be bound beside that of any other program of this user, and the
            // kernel would deal the connections out among the two: ask for the address unshared first.
            // Ours would be in the way where they have the port already.
            if !self.overlaps(listen.address) {
                ask_for(listen.address, give_up).map_err(|errno| bind_error(listen.address, errno))?;
            }
        }
        let mut next = Listeners::default();
        for slot in 0..config.worker_cpus.len() {
            for (server, listen) in addresses(config) {
                let key = (listen.address, slot);
                let socket = match self.sockets.get(&key) {
                    Some(socket) => Rc::clone(socket),
                    None => open_shared(server, listen)?,
                };
                next.sockets.insert(key, socket);
            }
        }
        Ok(next)
    }

    /// Gives sockets that were there before the settings that `config` has for them.
    ///
    /// # Errors
    /// The kernel refused a setting; the sockets go on as they are.
    pub fn apply(&self, config: &Config) -> Result<()> {
        for (server, listen) in addresses(config) {
            for slot in 0..config.worker_cpus.len() {
                if let Some(socket) = self.sockets.get(&(listen.address, slot)) {
                    tune(socket, server, listen)?;
                }
            }
        }
        Ok(())
    }

    /// This set with new sockets for a slot. What waits in the old ones moves to sockets of other slots when
    /// these are closed, if there is a program that chooses.
    ///
    /// # Errors
    /// An address cannot be bound once more.
    pub fn renewed(&self, config: &Config, slot: usize) -> Result<Listeners> {
        let mut next = self.clone();
        for (server, listen) in addresses(config) {
            next.sockets
                .insert((listen.address, slot), open_shared(server, listen)?);
        }
        Ok(next)
    }

    /// A descriptor of the socket for this address and slot, for a worker to own.
    ///
    /// # Errors
    /// No more descriptors are to be had.
    pub fn duplicate(&self, address: SocketAddr, slot: usize) -> Result<OwnedFd> {
        let socket = self
            .sockets
            .get(&(address, slot))
            .with_context(|| format!("there is no listening socket for {address} in worker slot {slot}"))?;
        socket
            .try_clone()
            .with_context(|| format!("failed to duplicate the listening socket of {address}"))
    }

    /// All sockets, with their addresses and slots.
    pub fn sockets(&self) -> impl Iterator<Item = (SocketAddr, usize, &OwnedFd)> {
        self.sockets
            .iter()
            .map(|((address, slot), socket)| (*address, *slot, &**socket))
    }

    /// The sockets that another binary has opened.
    pub fn of(sockets: impl IntoIterator<Item = (SocketAddr, usize, OwnedFd)>) -> Listeners {
        let sockets = sockets.into_iter();
        Listeners {
            sockets: sockets
                .map(|(address, slot, socket)| ((address, slot), Rc::new(socket)))
                .collect(),
        }
    }

    fn overlaps(&self, address: SocketAddr) -> bool {
        let port_and_family = |address: SocketAddr| (address.port(), address.is_ipv4());
        self.sockets
            .keys()
            .any(|(ours, _)| port_and_family(*ours) == port_and_family(address))
    }
}

/// Binds the address for a moment, unshared.
fn ask_for(address: SocketAddr, give_up: Instant) -> Result<(), Errno> {
    loop {
        match open(address, false) {
            Err(Errno::EADDRINUSE) if Instant::now() < give_up => sleep(Duration::from_millis(20)),
            other => return other.map(drop),
        }
    }
}

fn addresses(config: &Config) -> impl Iterator<Item = (&Server, &Listen)> {
    config
        .servers
        .iter()
        .flat_map(|server| server.listen.iter().map(move |listen| (server, listen)))
}

fn open(address: SocketAddr, shared: bool) -> Result<OwnedFd, Errno> {
    let family = if address.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(family, SockType::Stream, flags, None)?;
    setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    setsockopt(&socket, sockopt::ReusePort, &shared)?;
    if address.is_ipv6() {
        // "[::]:80" and "0.0.0.0:80" are two listeners, each with counters of its own.
        setsockopt(&socket, sockopt::Ipv6V6Only, &true)?;
    }
    bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
    Ok(socket)
}

/// One more socket of an address, listening.
fn open_shared(server: &Server, listen: &Listen) -> Result<Rc<OwnedFd>> {
    let socket = open(listen.address, true).map_err(|errno| bind_error(listen.address, errno))?;
    tune(&socket, server, listen)?;
    Ok(Rc::new(socket))
}

/// Sets what accepted sockets inherit, and the backlog; listens, if the socket does not yet.
fn tune(socket: &OwnedFd, server: &Server, listen_on: &Listen) -> Result<()> {
    let what = |errno: Errno| anyhow!("failed to listen on {}: {}", listen_on.address, reason(errno));
    // A process that dies has its sockets closed for it, and that would end a truncated stream as if it
    // were whole. With this, inherited by each accepted socket, it is a reset (tcp_close, net/ipv4/tcp.c).
    setsockopt(
        socket,
        sockopt::Linger,
        &libc::linger {
            l_onoff: 1,
            l_linger: 0,
        },
    )
    .map_err(what)?;
    setsockopt(socket, sockopt::TcpNoDelay, &server.stream.tcp_nodelay).map_err(what)?;
    // `Backlog` takes no more than the usual net.core.somaxconn; beyond it, ask for all that there is.
    let backlog = i32::try_from(listen_on.backlog)
        .ok()
        .and_then(|length| Backlog::new(length).ok());
    listen(socket, backlog.unwrap_or(Backlog::MAXALLOWABLE)).map_err(what)
}

fn reason(errno: Errno) -> String {
    errno.desc().to_lowercase()
}

fn bind_error(address: SocketAddr, errno: Errno) -> anyhow::Error {
    let port = address.port();
    let remedy = match errno {
        Errno::EACCES => format!(
            ": port {port} needs CAP_NET_BIND_SERVICE (or root), choose one above 1023 or give it that"
        ),
        Errno::EADDRINUSE => format!(
            ": another program has it (ss -ltnp 'sport = :{port}' shows which), stop that or choose another"
        ),
        Errno::EADDRNOTAVAIL => {
            ": no interface of this host has that address (ip address shows them)".to_owned()
        }
        Errno::EAFNOSUPPORT => ": this kernel has no IPv6, choose an IPv4 address".to_owned(),
        Errno::EMFILE | Errno::ENFILE => ": raise the descriptor limit (ulimit -Hn)".to_owned(),
        _ => String::new(),
    };
    anyhow!("failed to bind {address}: {}{remedy}", reason(errno))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;
    use nix::sys::socket::getsockopt;
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};

    /// A port that was free a moment ago.
    fn free_port() -> u16 {
        TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port()
    }

    #[test]
    fn each_slot_has_a_socket_of_its_own_and_a_next_set_keeps_it() {
        let address = format!("127.0.0.1:{}", free_port());
        let mut config = testing::config(&[&address], &[]);
        config.worker_cpus = vec![vec![0]; 2];
        let first = Listeners::default().next(&config).unwrap();
        let key = |slot| (address.parse().unwrap(), slot);
        assert_ne!(
            first.sockets[&key(0)].as_raw_fd(),
            first.sockets[&key(1)].as_raw_fd()
        );

        config.worker_cpus = vec![vec![0]; 3];
        let second = first.next(&config).unwrap();
        assert_eq!(second.sockets.len(), 3);
        assert_eq!(
            first.sockets[&key(1)].as_raw_fd(),
            second.sockets[&key(1)].as_raw_fd()
        );

        config.worker_cpus = vec![vec![0]];
        drop(first);
        let third = second.next(&config).unwrap();
        drop(second);
        assert_eq!(third.sockets.len(), 1);
        TcpStream::connect(&address).unwrap();
    }

    #[test]
    fn an_address_that_another_program_has_is_refused_although_it_shares_its_port() {
        let address: SocketAddr = format!("127.0.0.1:{}", free_port()).parse().unwrap();
        let other = open(address, true).unwrap();
        listen(&other, Backlog::new(1).unwrap()).unwrap();
        let error = Listeners::default()
            .next(&testing::config(&[&address.to_string()], &[]))
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with(&format!("failed to bind {address}: address already in use")),
            "{error}"
        );
        assert!(error.contains("ss -ltnp"), "{error}");
    }

    #[test]
    fn the_wildcard_and_a_single_address_may_have_the_same_port() {
        let port = free_port();
        let config = testing::config(&[&format!("127.0.0.1:{port}"), &format!("0.0.0.0:{port}")], &[]);
        let first = Listeners::default().next(&config).unwrap();
        let wider = testing::config(
            &[
                &format!("127.0.0.1:{port}"),
                &format!("0.0.0.0:{port}"),
                &format!("127.0.0.2:{port}"),
            ],
            &[],
        );
        assert_eq!(first.next(&wider).unwrap().sockets.len(), 3);
    }

    #[test]
    fn an_accepted_socket_that_is_dropped_resets() {
        let address: SocketAddr = format!("127.0.0.1:{}", free_port()).parse().unwrap();
        let listeners = Listeners::default()
            .next(&testing::config(&[&address.to_string()], &[]))
            .unwrap();
        let listener = TcpListener::from(listeners.duplicate(address, 0).unwrap());
        let mut client = TcpStream::connect(address).unwrap();
        listener.set_nonblocking(false).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        assert!(getsockopt(&accepted, sockopt::TcpNoDelay).unwrap());
        drop(accepted);
        let error = client.read(&mut [0; 1]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }

    #[test]
    fn an_address_that_this_host_lacks_is_said_to_be_so() {
        let error = Listeners::default()
            .next(&testing::config(&["192.0.2.1:1"], &[]))
            .unwrap_err()
            .to_string();
        assert!(error.starts_with("failed to bind 192.0.2.1:1: "), "{error}");
        assert!(error.contains("no interface of this host"), "{error}");
    }
}
