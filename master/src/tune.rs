//! What a listening socket is told besides its address: what `listen` says, what accepted sockets inherit from it. All
//! of it can be said again, so that a reload changes a socket that goes on listening.

use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Result, anyhow, ensure};
use culvert_shared::config::{Action, Config, Keepalive, Listen, ListenOptions, Server, TcpCongestion};
use culvert_shared::congestion;
use culvert_shared::sys::socket::{self, IntOption, RECEIVE_LOCKED, SEND_LOCKED};
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, getsockopt, setsockopt, sockopt};

/// How long a connection may be silent before it is accepted all the same, in seconds (nginx: the same).
const DEFER_S: i32 = 1;

/// Has the kernel accept connections of a listener that bring data in their SYN (ip-sysctl.rst, tcp_fastopen).
const FAST_OPEN_SERVER: u64 = 2;

/// Sets what accepted sockets inherit, and the backlog; listens, if the socket does not yet.
///
/// # Errors
/// The kernel refused a setting.
pub fn tune(socket: &OwnedFd, server: &Server, listen_on: &Listen) -> Result<()> {
    let what = |errno: Errno| {
        let reason = errno.desc().to_lowercase();
        anyhow!("failed to listen on {}: {reason}", listen_on.address)
    };
    // A process that dies has its sockets closed for it, and that would end a truncated stream as if it
    // were whole. With this, inherited by each accepted socket, it is a reset (tcp_close, net/ipv4/tcp.c).
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    setsockopt(socket, sockopt::Linger, &linger).map_err(what)?;
    let options = &listen_on.options;
    size_buffers(socket, options).map_err(what)?;
    if listen_on.address.tcp().is_some() {
        setsockopt(socket, sockopt::TcpNoDelay, &server.stream.tcp_nodelay).map_err(what)?;
        // As workers have it on the other side (`sockets::urgent_inline`).
        setsockopt(socket, sockopt::OobInline, &true).map_err(what)?;
        keep_alive(socket, options.keepalive).map_err(what)?;
        control_congestion(socket, server, listen_on)?;
        let defer = if options.deferred { DEFER_S } else { 0 };
        set_where_it_differs(socket, IntOption::DeferAccept, defer).map_err(what)?;
        let queue = options.fastopen.unwrap_or(0) as i32;
        set_where_it_differs(socket, IntOption::FastOpen, queue).map_err(what)?;
    }
    socket::listen(socket.as_fd(), listen_on.backlog)
        .map_err(|error| what(Errno::from_raw(error.raw_os_error().unwrap_or(0))))
}

/// Whether the congestion control of a listener is to be had, without listening.
///
/// # Errors
/// The kernel does not have it, or workers may not choose it.
pub fn try_congestion(server: &Server, listen_on: &Listen) -> Result<()> {
    let family = match listen_on.address.tcp() {
        Some(address) if address.is_ipv6() => AddressFamily::Inet6,
        _ => AddressFamily::Inet,
    };
    let flags = SockFlag::SOCK_CLOEXEC;
    match nix::sys::socket::socket(family, SockType::Stream, flags, None) {
        Ok(socket) => control_congestion(&socket, server, listen_on),
        // A host without IPv6 says so when it is to listen.
        Err(_) => Ok(()),
    }
}

/// The congestion control of what is accepted, and whether workers may choose it for the other side as well.
fn control_congestion(socket: &OwnedFd, server: &Server, listen_on: &Listen) -> Result<()> {
    let (Some(default), Some(address)) = (congestion::default(), listen_on.address.tcp()) else {
        return Ok(());
    };
    let setting = server.stream.tcp_congestion;
    let wanted = setting.choose(default, address.ip()).unwrap_or(default);
    if congestion::of(socket.as_fd()) != Some(wanted) {
        congestion::set(socket.as_fd(), wanted).map_err(|errno| {
            let reason = match errno {
                Errno::ENOENT => "this kernel does not have it, net.ipv4.tcp_available_congestion_control lists what it has",
                Errno::EPERM => "net.ipv4.tcp_allowed_congestion_control does not list it",
                other => other.desc(),
            };
            anyhow!("listener {address}: tcp_congestion = \"{}\": {reason}", wanted.name())
        })?;
    }
    let TcpCongestion::Named(named) = setting else {
        return Ok(());
    };
    let allowed = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_allowed_congestion_control");
    let is_allowed = |list: String| list.split_whitespace().any(|name| name == named.name());
    ensure!(
        named == default || allowed.map_or(true, is_allowed),
        "listener {address}: tcp_congestion = \"{}\": workers, who connect to the peers, may not choose it; add it to \
         net.ipv4.tcp_allowed_congestion_control",
        named.name()
    );
    Ok(())
}

fn set_where_it_differs(socket: &OwnedFd, option: IntOption, value: i32) -> Result<(), Errno> {
    let set = || socket::set_int(socket.as_fd(), option, value);
    match socket::get_int(socket.as_fd(), option) {
        Ok(present) if present == value => Ok(()),
        _ => set().map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0))),
    }
}

/// Probes of silent clients. What is not given is as the host has it.
fn keep_alive(socket: &OwnedFd, keepalive: Option<Keepalive>) -> Result<(), Errno> {
    setsockopt(socket, sockopt::KeepAlive, &keepalive.is_some())?;
    let Some(keepalive) = keepalive else {
        return Ok(());
    };
    let of_host = |name: &str| sysctl(&format!("net/ipv4/{name}"), 0).and_then(|n| u32::try_from(n).ok());
    if let Some(idle) = keepalive.idle_s.or_else(|| of_host("tcp_keepalive_time"))
        && getsockopt(socket, sockopt::TcpKeepIdle)? != idle
    {
        setsockopt(socket, sockopt::TcpKeepIdle, &idle)?;
    }
    if let Some(interval) = keepalive.interval_s.or_else(|| of_host("tcp_keepalive_intvl"))
        && getsockopt(socket, sockopt::TcpKeepInterval)? != interval
    {
        setsockopt(socket, sockopt::TcpKeepInterval, &interval)?;
    }
    if let Some(probes) = keepalive.probes.or_else(|| of_host("tcp_keepalive_probes"))
        && getsockopt(socket, sockopt::TcpKeepCount)? != probes
    {
        setsockopt(socket, sockopt::TcpKeepCount, &probes)?;
    }
    Ok(())
}

/// Gives the buffers the sizes that are wanted. One that had a size until now and is wanted without gets back the size
/// that sockets begin with, and TCP's own sizing of what is accepted; before Linux 5.14 it keeps what it had.
fn size_buffers(socket: &OwnedFd, options: &ListenOptions) -> Result<(), Errno> {
    let locked = socket::get_int(socket.as_fd(), IntOption::BufferLock).unwrap_or(0);
    let mut unlocked = locked;
    match (options.rcvbuf, locked & RECEIVE_LOCKED != 0) {
        (Some(bytes), _) => setsockopt(socket, sockopt::RcvBuf, &(bytes as usize))?,
        (None, true) => {
            let first = sysctl("net/ipv4/tcp_rmem", 1).unwrap_or(131_072);
            setsockopt(socket, sockopt::RcvBuf, &(first as usize / 2))?;
            unlocked &= !RECEIVE_LOCKED;
        }
        (None, false) => {}
    }
    match (options.sndbuf, locked & SEND_LOCKED != 0) {
        (Some(bytes), _) => setsockopt(socket, sockopt::SndBuf, &(bytes as usize))?,
        (None, true) => {
            let first = sysctl("net/ipv4/tcp_wmem", 1).unwrap_or(16_384);
            setsockopt(socket, sockopt::SndBuf, &(first as usize / 2))?;
            unlocked &= !SEND_LOCKED;
        }
        (None, false) => {}
    }
    if unlocked != locked {
        // The sizes that were wanted are locked by what set them.
        let _ = socket::set_int(socket.as_fd(), IntOption::BufferLock, unlocked);
    }
    Ok(())
}

/// Says once, in the log, what the host's settings make of this configuration's listeners.
pub fn report(config: &Config) {
    let caps = [("rcvbuf", "net/core/rmem_max"), ("sndbuf", "net/core/wmem_max")];
    let caps = caps.map(|(key, name)| (key, name, sysctl(name, 0)));
    let servers = config
        .servers
        .iter()
        .filter(|server| server.action != Action::Http);
    for listen in servers.flat_map(|server| &server.listen) {
        let (address, options) = (&listen.address, &listen.options);
        for ((key, name, cap), wanted) in caps.iter().zip([options.rcvbuf, options.sndbuf]) {
            if let (Some(wanted), Some(cap)) = (wanted, cap)
                && u64::from(wanted) > *cap
            {
                let name = name.replace('/', ".");
                log::warn!(
                    "listener {address}: {key} is {cap} bytes instead of {wanted}, which is above {name}"
                );
            }
        }
        let allowed = sysctl("net/ipv4/tcp_fastopen", 0).unwrap_or(0) & FAST_OPEN_SERVER != 0;
        if options.fastopen.is_some() && !allowed {
            log::warn!(
                "listener {address}: fastopen has no effect while net.ipv4.tcp_fastopen is without {FAST_OPEN_SERVER}"
            );
        }
    }
}

/// One of the numbers of a setting of the host.
fn sysctl(name: &str, at: usize) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/sys/{name}")).ok()?;
    text.split_whitespace().nth(at)?.parse().ok()
}
