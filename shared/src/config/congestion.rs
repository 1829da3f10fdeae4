//! `tcp_congestion`: how a session's sockets find out how fast they may send.

use std::fmt;
use std::net::IpAddr;

use super::diagnostic::Fault;
use super::valid::{self, Given};

/// Room for a name with its NUL (TCP_CA_NAME_MAX, include/net/tcp.h).
const NAME_MAX: usize = 16;

/// What is always there and open to any process (`tcp_allowed_congestion_control`, tcp_cong.c), and sends without timers.
const UNPACED: &str = "reno";

/// How a socket's congestion control is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TcpCongestion {
    /// The host's default; over the loopback device one that does not pace.
    Auto,
    /// The host's default.
    System,
    /// This one.
    Named(Algorithm),
}

/// The name of a congestion control algorithm, as TCP_CONGESTION takes it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Algorithm([u8; NAME_MAX]);

impl Algorithm {
    /// `None`: no such name can be.
    pub fn new(name: &str) -> Option<Algorithm> {
        let right = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
        if name.is_empty() || name.len() >= NAME_MAX || !name.bytes().all(right) {
            return None;
        }
        let mut bytes = [0; NAME_MAX];
        bytes[..name.len()].copy_from_slice(name.as_bytes());
        Some(Algorithm(bytes))
    }

    /// The name.
    pub fn name(&self) -> &str {
        let end = self.0.iter().position(|byte| *byte == 0).unwrap_or(NAME_MAX);
        std::str::from_utf8(&self.0[..end]).unwrap_or("")
    }

    /// Whether it sends by timers (`SK_PACING_NEEDED`, set by its init).
    fn paces(&self) -> bool {
        self.name().starts_with("bbr")
    }
}

impl fmt::Debug for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl TcpCongestion {
    /// What a socket has to be told whose other end, or own address, is `ip`; `None`: nothing, the host's `default` is
    /// right. It counts only before the connection is made: pacing that has begun stays, whatever follows.
    pub fn choose(self, default: Algorithm, ip: IpAddr) -> Option<Algorithm> {
        match self {
            TcpCongestion::Auto if default.paces() && ip.to_canonical().is_loopback() => {
                Algorithm::new(UNPACED)
            }
            TcpCongestion::Auto | TcpCongestion::System => None,
            TcpCongestion::Named(algorithm) => (algorithm != default).then_some(algorithm),
        }
    }

    pub(super) fn read(given: Given) -> Result<TcpCongestion, Fault> {
        match valid::text(given, "\"auto\"")? {
            "auto" => Ok(TcpCongestion::Auto),
            "system" => Ok(TcpCongestion::System),
            name => Algorithm::new(name).map(TcpCongestion::Named).ok_or_else(|| {
                Fault::new(
                    "no name of a congestion control",
                    "allowed: \"auto\", \"system\", or one of those that sysctl net.ipv4.tcp_allowed_congestion_control lists",
                )
            }),
        }
    }
}

impl fmt::Display for TcpCongestion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TcpCongestion::Auto => "auto",
            TcpCongestion::System => "system",
            TcpCongestion::Named(algorithm) => algorithm.name(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str) -> Algorithm {
        Algorithm::new(name).unwrap()
    }

    #[test]
    fn only_what_paces_is_replaced_and_only_on_the_loopback_device() {
        let choose = |default, ip: &str| {
            TcpCongestion::Auto
                .choose(named(default), ip.parse().unwrap())
                .map(|algorithm| algorithm.name().to_owned())
        };
        for ip in ["127.0.0.1", "127.9.0.1", "::1", "::ffff:127.0.0.1"] {
            assert_eq!(choose("bbr", ip).as_deref(), Some("reno"), "{ip}");
            assert_eq!(choose("cubic", ip), None, "{ip}");
        }
        for ip in ["192.0.2.1", "0.0.0.0", "::", "2001:db8::1"] {
            assert_eq!(choose("bbr", ip), None, "{ip}");
        }
        let here = "127.0.0.1".parse().unwrap();
        assert_eq!(TcpCongestion::System.choose(named("bbr"), here), None);
        let dctcp = TcpCongestion::Named(named("dctcp"));
        assert_eq!(dctcp.choose(named("bbr"), here), Some(named("dctcp")));
    }

    #[test]
    fn a_name_is_what_the_kernel_can_hold() {
        assert_eq!(named("bbr").name(), "bbr");
        assert_eq!(named("fifteen_letters").name(), "fifteen_letters");
        for wrong in ["", "sixteen_letters_", "a b", "bbr\0"] {
            assert_eq!(Algorithm::new(wrong), None, "{wrong:?}");
        }
    }
}
