//! The listening sockets: one `SO_REUSEPORT` socket for each TCP address and worker slot, and one for each unix path.
//! They are held by the master, so what waits in them outlives a worker.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::rc::Rc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use culvert_shared::config::{Address, Config, Listen, Server};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, getsockopt, setsockopt, socket, sockopt,
};

use crate::tune::tune;
use crate::unix_socket::{DEFAULT_MODE, UnixSocket};

/// How long a start waits for addresses that are in use.
const ORPHANS_PATIENCE: Duration = Duration::from_secs(1);

/// What a TCP listener is bound to. Whether IPv4 is taken too cannot be changed any more, so that is part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Bound {
    /// The address.
    pub address: SocketAddr,
    /// An IPv6 wildcard takes IPv4 connections too.
    pub dual: bool,
}

impl Bound {
    fn of(listen: &Listen) -> Option<Bound> {
        let address = listen.address.tcp()?;
        let dual = listen.options.dual;
        Some(Bound { address, dual })
    }
}

/// All listening sockets of one configuration. Cloning shares the sockets; one is closed when the last
/// set that has it is dropped.
#[derive(Clone, Debug, Default)]
pub struct Listeners {
    sockets: HashMap<(Bound, usize), Rc<OwnedFd>>,
    /// One for each path, for all worker slots.
    unix: HashMap<PathBuf, Rc<UnixSocket>>,
}

impl Listeners {
    /// The sockets that `config` needs: those that this set has already, and new ones for the rest. The
    /// new ones are bound and listening; this set is left as it is.
    ///
    /// # Errors
    /// Addresses that cannot be bound, all of them; nothing new is left behind then.
    pub fn next(&self, config: &Config) -> Result<Listeners> {
        // The workers of a master that was killed take a moment to notice and let go.
        let patience = if self.sockets.is_empty() && self.unix.is_empty() {
            ORPHANS_PATIENCE
        } else {
            Duration::ZERO
        };
        let give_up = Instant::now() + patience;
        // A sharing socket could be bound beside that of any other program of this user, and the kernel would deal the
        // connections out among the two: ask for the address unshared first. Ours would be in the way where they have the
        // port already.
        let refused: Vec<String> = tcp(config)
            .filter(|(_, _, bound)| !self.overlaps(*bound))
            .filter_map(|(_, _, bound)| {
                let errno = ask_for(bound, give_up).err()?;
                Some(bind_error(bound.address, errno).to_string())
            })
            .collect();
        ensure!(refused.is_empty(), "{}", refused.join("; "));
        let mut next = Listeners::default();
        for slot in 0..config.worker_cpus.len() {
            for (server, listen, bound) in tcp(config) {
                let socket = match self.sockets.get(&(bound, slot)) {
                    Some(socket) => Rc::clone(socket),
                    None => open_shared(server, listen, bound)?,
                };
                next.sockets.insert((bound, slot), socket);
            }
        }
        for (server, listen) in all(config) {
            let Address::Unix(path) = &listen.address else {
                continue;
            };
            let socket = match self.unix.get(path) {
                Some(socket) => Rc::clone(socket),
                None => {
                    let socket = UnixSocket::bind(path, mode(listen), give_up)?;
                    tune(socket.fd(), server, listen)?;
                    Rc::new(socket)
                }
            };
            next.unix.insert(path.clone(), socket);
        }
        Ok(next)
    }

    /// Gives sockets that were there before the settings that `config` has for them.
    ///
    /// # Errors
    /// The kernel refused a setting; the sockets go on as they are.
    pub fn apply(&self, config: &Config) -> Result<()> {
        for (server, listen, bound) in tcp(config) {
            for slot in 0..config.worker_cpus.len() {
                if let Some(socket) = self.sockets.get(&(bound, slot)) {
                    tune(socket, server, listen)?;
                }
            }
        }
        for (server, listen) in all(config) {
            if let Address::Unix(path) = &listen.address
                && let Some(socket) = self.unix.get(path)
            {
                socket.allow(mode(listen))?;
                tune(socket.fd(), server, listen)?;
            }
        }
        Ok(())
    }

    /// This set with new sockets for a slot. What waits in the old ones moves to sockets of other slots when
    /// these are closed, if there is a program that chooses. Unix sockets are everybody's, and stay.
    ///
    /// # Errors
    /// An address cannot be bound once more.
    pub fn renewed(&self, config: &Config, slot: usize) -> Result<Listeners> {
        let mut next = self.clone();
        for (server, listen, bound) in tcp(config) {
            next.sockets
                .insert((bound, slot), open_shared(server, listen, bound)?);
        }
        Ok(next)
    }

    /// A descriptor of the socket for this listener and slot, for a worker to own.
    ///
    /// # Errors
    /// No more descriptors are to be had.
    pub fn duplicate(&self, listen: &Listen, slot: usize) -> Result<OwnedFd> {
        let address = &listen.address;
        let socket = match (address, Bound::of(listen)) {
            (_, Some(bound)) => self.sockets.get(&(bound, slot)).map(|socket| &**socket),
            (Address::Unix(path), _) => self.unix.get(path).map(|socket| socket.fd()),
            (Address::Tcp(_), None) => None,
        };
        socket
            .with_context(|| format!("there is no listening socket for {address} in worker slot {slot}"))?
            .try_clone()
            .with_context(|| format!("failed to duplicate the listening socket of {address}"))
    }

    /// The TCP sockets, with what they are bound to and their slots.
    pub fn sockets(&self) -> impl Iterator<Item = (Bound, usize, &OwnedFd)> {
        self.sockets
            .iter()
            .map(|((bound, slot), socket)| (*bound, *slot, &**socket))
    }

    /// All sockets, with their addresses as [`Listeners::of`] takes them, and slots.
    pub fn named(&self) -> impl Iterator<Item = (String, usize, &OwnedFd)> {
        let tcp = self
            .sockets()
            .map(|(bound, slot, socket)| (bound.address.to_string(), slot, socket));
        let unix = self.unix.iter().map(|(path, socket)| {
            let address = Address::Unix(path.clone());
            (address.to_string(), 0, socket.fd())
        });
        tcp.chain(unix)
    }

    /// The sockets that another binary has opened.
    ///
    /// # Errors
    /// An address makes no sense.
    pub fn of(sockets: impl IntoIterator<Item = (String, usize, OwnedFd)>) -> Result<Listeners> {
        let mut listeners = Listeners::default();
        for (address, slot, socket) in sockets {
            if let Some(path) = address.strip_prefix("unix:") {
                let path = PathBuf::from(path);
                let socket = Rc::new(UnixSocket::of(socket, path.clone()));
                listeners.unix.insert(path, socket);
                continue;
            }
            let address: SocketAddr = address
                .parse()
                .with_context(|| format!("\"{address}\" is no listener's address"))?;
            let dual = address.is_ipv6() && !getsockopt(&socket, sockopt::Ipv6V6Only).unwrap_or(true);
            let key = (Bound { address, dual }, slot);
            listeners.sockets.insert(key, Rc::new(socket));
        }
        Ok(listeners)
    }

    /// Whether a socket of this set would be in the way of an unshared one.
    fn overlaps(&self, wanted: Bound) -> bool {
        let kind = |bound: Bound| (bound.address.port(), bound.address.is_ipv4());
        self.sockets.keys().any(|(ours, _)| {
            let both = ours.dual || wanted.dual;
            kind(*ours) == kind(wanted) || (both && ours.address.port() == wanted.address.port())
        })
    }
}

/// Binds the address for a moment, unshared.
fn ask_for(bound: Bound, give_up: Instant) -> Result<(), Errno> {
    loop {
        match open(bound, false) {
            Err(Errno::EADDRINUSE) if Instant::now() < give_up => sleep(Duration::from_millis(20)),
            other => return other.map(drop),
        }
    }
}

fn all(config: &Config) -> impl Iterator<Item = (&Server, &Listen)> {
    config
        .servers
        .iter()
        .flat_map(|server| server.listen.iter().map(move |listen| (server, listen)))
}

fn tcp(config: &Config) -> impl Iterator<Item = (&Server, &Listen, Bound)> {
    all(config).filter_map(|(server, listen)| Some((server, listen, Bound::of(listen)?)))
}

fn mode(listen: &Listen) -> u32 {
    listen.options.mode.unwrap_or(DEFAULT_MODE)
}

fn open(Bound { address, dual }: Bound, shared: bool) -> Result<OwnedFd, Errno> {
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
        // Unless it is to be otherwise, "[::]:80" and "0.0.0.0:80" are two listeners, each with counters of its own.
        setsockopt(&socket, sockopt::Ipv6V6Only, &!dual)?;
    }
    bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
    Ok(socket)
}

/// One more socket of an address, listening.
fn open_shared(server: &Server, listen: &Listen, bound: Bound) -> Result<Rc<OwnedFd>> {
    let socket = open(bound, true).map_err(|errno| bind_error(bound.address, errno))?;
    tune(&socket, server, listen)?;
    Ok(Rc::new(socket))
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
    use culvert_shared::config::{Keepalive, ListenOptions};
    use culvert_shared::sys::socket::{IntOption, get_int};
    use nix::sys::socket::{Backlog, listen};
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    /// A port that was free a moment ago.
    fn free_port() -> u16 {
        TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port()
    }

    fn plain(address: SocketAddr) -> Bound {
        Bound { address, dual: false }
    }

    #[test]
    fn a_socket_that_had_sizes_and_probes_is_without_them_once_they_are_no_longer_wanted() {
        let address = format!("127.0.0.1:{}", free_port());
        let mut config = testing::config(&[&address], &[]);
        let listeners = Listeners::default().next(&config).unwrap();
        let socket = listeners.duplicate(&config.servers[0].listen[0], 0).unwrap();
        let state = || {
            let lock = get_int(socket.as_fd(), IntOption::BufferLock).unwrap();
            let defer = get_int(socket.as_fd(), IntOption::DeferAccept).unwrap();
            let queue = get_int(socket.as_fd(), IntOption::FastOpen).unwrap();
            let keep = getsockopt(&socket, sockopt::KeepAlive).unwrap();
            let idle = getsockopt(&socket, sockopt::TcpKeepIdle).unwrap();
            (lock, defer, queue, keep, idle)
        };
        let before = state();
        config.servers[0].listen[0].options = ListenOptions {
            rcvbuf: Some(40_000),
            sndbuf: Some(50_000),
            deferred: true,
            fastopen: Some(7),
            keepalive: Some(Keepalive {
                idle_s: Some(77),
                ..Keepalive::default()
            }),
            ..ListenOptions::default()
        };
        listeners.apply(&config).unwrap();
        assert_eq!(state(), (3, 1, 7, true, 77));
        assert_eq!(getsockopt(&socket, sockopt::RcvBuf).unwrap(), 80_000);
        config.servers[0].listen[0].options = ListenOptions {
            keepalive: Some(Keepalive::default()),
            ..ListenOptions::default()
        };
        listeners.apply(&config).unwrap();
        assert_eq!(state(), (before.0, before.1, before.2, true, before.4));
        assert!(getsockopt(&socket, sockopt::RcvBuf).unwrap() > 80_000);
    }

    #[test]
    fn each_slot_has_a_socket_of_its_own_and_a_next_set_keeps_it() {
        let address = format!("127.0.0.1:{}", free_port());
        let mut config = testing::config(&[&address], &[]);
        config.worker_cpus = vec![vec![0]; 2];
        let first = Listeners::default().next(&config).unwrap();
        let key = |slot| (plain(address.parse().unwrap()), slot);
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
        let other = open(plain(address), true).unwrap();
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
        let config = testing::config(&[&address.to_string()], &[]);
        let listeners = Listeners::default().next(&config).unwrap();
        let listen = &config.servers[0].listen[0];
        let listener = TcpListener::from(listeners.duplicate(listen, 0).unwrap());
        let mut client = TcpStream::connect(address).unwrap();
        listener.set_nonblocking(false).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        assert!(getsockopt(&accepted, sockopt::TcpNoDelay).unwrap());
        drop(accepted);
        let error = client.read(&mut [0; 1]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }

    #[test]
    fn all_addresses_that_are_refused_are_named_at_once() {
        let others = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let [first, second] = others
            .each_ref()
            .map(|other| other.local_addr().unwrap().to_string());
        let free = format!("127.0.0.1:{}", free_port());
        let error = Listeners::default()
            .next(&testing::config(&[&first, &free, &second], &[]))
            .unwrap_err()
            .to_string();
        for address in [&first, &second] {
            assert!(error.contains(&format!("failed to bind {address}: ")), "{error}");
        }
        assert!(!error.contains(&free), "{error}");
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
