//! What workers ask the master of host names that sessions lead to, and what it answers: plain values and their bytes. Who
//! asks name servers, and how, is the master's matter (`names`); what is remembered of it, each worker's own (`hosts`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::config::is_host_name;

/// Addresses of one answer: what is more is left out, so that an answer fits a message. Whoever has so many hosts under
/// one name leaves some of them out of each answer himself.
pub const ADDRESSES_MAX: usize = 64;

/// Questions of one message: of the longest names, what has room in it.
pub const BATCH: usize = 15;

/// The longest reason, in bytes.
const WHY_MAX_BYTES: usize = 500;

/// Whether it can be the address of one host. A connection to `0.0.0.0` or `::` would be one to this host.
pub fn is_of_a_host(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(ip) => !ip.is_unspecified() && !ip.is_multicast() && ip != Ipv4Addr::BROADCAST,
        IpAddr::V6(ip) => !ip.is_unspecified() && !ip.is_multicast(),
    }
}

/// A host whose addresses are wanted.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Question {
    /// Who is to be asked, by the index in [`crate::config::Config::resolvers`] of the worker's generation.
    pub resolver: u16,
    /// The host's name, in lower case, without a dot at its end.
    pub host: String,
}

/// What came of a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The host has these addresses, at least one and at most [`ADDRESSES_MAX`].
    Addresses {
        /// They.
        addresses: Vec<IpAddr>,
        /// How long that may be believed, in milliseconds.
        valid_ms: u64,
    },
    /// It has none, or nobody can say.
    Nothing {
        /// Why, for people.
        why: String,
        /// How long that may be believed, in milliseconds; 0: only now.
        valid_ms: u64,
    },
}

impl Question {
    pub(crate) fn encode(&self, bytes: &mut Vec<u8>) {
        bytes.extend(self.resolver.to_ne_bytes());
        bytes.push(self.host.len() as u8);
        bytes.extend(self.host.as_bytes());
    }

    /// The question that the bytes begin with, and what is behind it. `None`: they begin with none.
    pub(crate) fn decode(bytes: &[u8]) -> Option<(Question, &[u8])> {
        let (resolver, rest) = bytes.split_first_chunk()?;
        let (length, rest) = rest.split_first()?;
        let (host, rest) = rest.split_at_checked(usize::from(*length))?;
        let host = str::from_utf8(host).ok().filter(|host| is_host_name(host))?;
        let question = Question {
            resolver: u16::from_ne_bytes(*resolver),
            host: host.to_owned(),
        };
        Some((question, rest))
    }
}

const V4: u8 = 4;
const V6: u8 = 6;

impl Answer {
    pub(crate) fn encode(&self, bytes: &mut Vec<u8>) {
        match self {
            Answer::Addresses { addresses, valid_ms } => {
                bytes.extend(valid_ms.to_ne_bytes());
                for address in addresses.iter().take(ADDRESSES_MAX) {
                    let (family, ip) = match address {
                        IpAddr::V4(ip) => (V4, ip.to_ipv6_mapped()),
                        IpAddr::V6(ip) => (V6, *ip),
                    };
                    bytes.push(family);
                    bytes.extend(ip.octets());
                }
            }
            Answer::Nothing { why, valid_ms } => {
                bytes.extend(valid_ms.to_ne_bytes());
                // No family: what follows are words.
                bytes.push(0);
                bytes.extend(beginning(why).as_bytes());
            }
        }
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Answer> {
        let (valid, rest) = bytes.split_first_chunk()?;
        let valid_ms = u64::from_ne_bytes(*valid);
        if let (0, why) = rest.split_first()? {
            let why = str::from_utf8(why).ok()?.to_owned();
            return Some(Answer::Nothing { why, valid_ms });
        }
        let (cells, odd) = rest.as_chunks::<17>();
        let address = |cell: &[u8; 17]| {
            let ip = Ipv6Addr::from(*cell.last_chunk::<16>()?);
            match cell[0] {
                V4 => ip.to_ipv4_mapped().map(IpAddr::V4),
                V6 => Some(IpAddr::V6(ip)),
                _ => None,
            }
        };
        let addresses = cells.iter().map(address).collect::<Option<Vec<_>>>()?;
        (odd.is_empty() && addresses.len() <= ADDRESSES_MAX)
            .then_some(Answer::Addresses { addresses, valid_ms })
    }
}

/// As much of a text as there is room for.
fn beginning(text: &str) -> &str {
    let end = (0..=text.len().min(WHY_MAX_BYTES)).rfind(|end| text.is_char_boundary(*end));
    &text[..end.unwrap_or(0)]
}
