//! The congestion control of sockets: what the host gives them, and what they are told instead
//! ([`TcpCongestion`](crate::config::TcpCongestion) says which).

use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, getsockopt, setsockopt, sockopt};

use crate::config::Algorithm;

/// What the socket has (TCP_CONGESTION).
pub fn of(socket: BorrowedFd<'_>) -> Option<Algorithm> {
    let name = getsockopt(&socket, sockopt::TcpCongestion).ok()?;
    Algorithm::new(name.to_str()?)
}

/// What sockets of this network namespace begin with (`net.ipv4.tcp_congestion_control`).
pub fn default() -> Option<Algorithm> {
    let open = |family| nix::sys::socket::socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).ok();
    // A host may be without one of the two families.
    let socket = [AddressFamily::Inet, AddressFamily::Inet6]
        .into_iter()
        .find_map(open)?;
    of(socket.as_fd())
}

/// Gives the socket that one; a listener's is inherited by what it accepts.
///
/// # Errors
/// ENOENT: the kernel does not have it. EPERM: `net.ipv4.tcp_allowed_congestion_control` does not list it, and the caller is
/// without CAP_NET_ADMIN.
pub fn set(socket: BorrowedFd<'_>, algorithm: Algorithm) -> nix::Result<()> {
    setsockopt(&socket, sockopt::TcpCongestion, &OsString::from(algorithm.name()))
}
