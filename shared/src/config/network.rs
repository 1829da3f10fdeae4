//! Networks: addresses and CIDR blocks, as `set_real_ip_from` names them. IPv4 addresses that come
//! mapped into IPv6 are IPv4 addresses. Unix sockets are one more network (nginx: `unix:`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::diagnostic::Fault;
use crate::client::is_unix;

/// What a network looks like.
const EXAMPLE: &str = "write an address such as \"10.0.0.1\", a network such as \"10.0.0.0/8\" or \"2001:db8::/32\", or \"unix:\"";

/// A block of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    /// Its first address; never IPv4 mapped into IPv6.
    first: IpAddr,
    /// How many leading bits all its addresses have in common.
    bits: u8,
    /// It is that of the unix sockets, and has no addresses.
    unix: bool,
}

impl Network {
    /// All clients of unix sockets.
    pub const UNIX: Network = Network {
        first: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        bits: 0,
        unix: true,
    };

    /// The block of all addresses that share `bits` leading bits with `ip`.
    ///
    /// # Errors
    /// There are not so many bits.
    pub(super) fn new(ip: IpAddr, bits: u8) -> Result<Network, Fault> {
        let longest = if ip.is_ipv4() { 32 } else { 128 };
        if bits > longest {
            return Err(Fault::new(
                format!("a prefix of more than {longest} bits"),
                EXAMPLE,
            ));
        }
        Ok(match ip {
            IpAddr::V4(ip) => Network {
                first: Ipv4Addr::from(u32::from(ip) & mask_v4(bits)).into(),
                bits,
                unix: false,
            },
            IpAddr::V6(ip) => {
                let first = Ipv6Addr::from(u128::from(ip) & mask_v6(bits));
                match first.to_ipv4_mapped() {
                    Some(first) if bits >= 96 => Network {
                        first: first.into(),
                        bits: bits - 96,
                        unix: false,
                    },
                    _ => Network {
                        first: first.into(),
                        bits,
                        unix: false,
                    },
                }
            }
        })
    }

    /// Reads an address or `address/bits`. As with nginx, bits beyond the prefix do not count.
    pub(super) fn read(text: &str) -> Result<Network, Fault> {
        if text == "unix:" {
            return Ok(Network::UNIX);
        }
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (text, None),
        };
        let ip: IpAddr = address
            .parse()
            .map_err(|_| Fault::new("neither an address nor a network", EXAMPLE))?;
        let bits = match bits {
            None if ip.is_ipv4() => 32,
            None => 128,
            Some(bits) => bits
                .parse()
                .map_err(|_| Fault::new("a network's prefix is no number of bits", EXAMPLE))?,
        };
        Network::new(ip, bits)
    }

    /// Whether a client belongs to it.
    pub fn holds(&self, client: SocketAddr) -> bool {
        match is_unix(client) {
            true => self.unix,
            false => !self.unix && self.contains(client.ip()),
        }
    }

    /// Whether an address is within its bounds.
    fn contains(&self, ip: IpAddr) -> bool {
        match (self.first, ip.to_canonical()) {
            (IpAddr::V4(first), IpAddr::V4(ip)) => u32::from(ip) & mask_v4(self.bits) == u32::from(first),
            (IpAddr::V6(first), IpAddr::V6(ip)) => u128::from(ip) & mask_v6(self.bits) == u128::from(first),
            _ => false,
        }
    }
}

fn mask_v4(bits: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(bits.min(32))).unwrap_or(0)
}

fn mask_v6(bits: u8) -> u128 {
    u128::MAX.checked_shl(128 - u32::from(bits.min(128))).unwrap_or(0)
}

impl std::fmt::Display for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.unix {
            true => f.write_str("unix:"),
            false => write!(f, "{}/{}", self.first, self.bits),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn network(text: &str) -> Network {
        Network::read(text).unwrap()
    }

    #[test]
    fn a_network_holds_what_shares_its_prefix() {
        let holds = |net: &str, ip: &str| network(net).contains(ip.parse().unwrap());
        assert!(holds("10.0.0.0/8", "10.255.0.1"));
        assert!(!holds("10.0.0.0/8", "11.0.0.1"));
        assert!(holds("10.0.0.1", "10.0.0.1"));
        assert!(!holds("10.0.0.1", "10.0.0.2"));
        assert!(holds("0.0.0.0/0", "255.255.255.255"));
        assert!(!holds("0.0.0.0/0", "::1"));
        assert!(holds("::/0", "2001:db8::1"));
        assert!(holds("2001:db8::/33", "2001:db8:7fff::1"));
        assert!(!holds("2001:db8::/33", "2001:db8:8000::1"));
    }

    #[test]
    fn clients_of_unix_sockets_are_in_a_network_of_their_own() {
        let (unix, other) = (crate::client::UNIX, "0.0.0.0:80".parse().unwrap());
        assert!(network("unix:").holds(unix) && !network("unix:").holds(other));
        assert!(!network("0.0.0.0/0").holds(unix) && network("0.0.0.0/0").holds(other));
        assert_eq!(network("unix:").to_string(), "unix:");
    }

    #[test]
    fn mapped_addresses_are_ipv4_addresses() {
        assert_eq!(network("::ffff:10.0.0.0/104"), network("10.0.0.0/8"));
        assert!(network("10.0.0.0/8").contains("::ffff:10.1.1.1".parse().unwrap()));
        assert!(!network("::/0").contains("::ffff:10.1.1.1".parse().unwrap()));
    }

    #[test]
    fn bits_beyond_the_prefix_do_not_count() {
        assert_eq!(network("10.1.2.3/8").to_string(), "10.0.0.0/8");
    }

    #[test]
    fn what_is_no_network_is_refused() {
        for text in [
            "",
            "10",
            "10.0.0.0/",
            "10.0.0.0/33",
            "::/129",
            "10.0.0.0/-1",
            "all",
            "a.example",
            "10.0.0.0/255.0.0.0",
        ] {
            assert!(Network::read(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_network_is_read_as_it_is_written(ip in any::<IpAddr>(), bits in 0u8..=128) {
            if let Ok(network) = Network::new(ip, bits) {
                prop_assert_eq!(Network::read(&network.to_string()), Ok(network));
                prop_assert!(network.contains(ip) || (ip.is_ipv6() && ip.to_canonical().is_ipv4()));
            }
        }
    }
}
