//! What a record says of its session, and the words that it is written in.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

use crate::config::ProxyProtocol;
use crate::counters::{FallbackReason, MAX_LISTENERS, MAX_PEERS};
use crate::limits::MAX_HOLDS;
use crate::queue::Claim;

/// The longest name of an upstream that a record holds; a unix socket's path is shorter (unix(7)).
const NAME_BYTES: usize = 112;
/// The longest text of what a TLS hello said ([`SavedHello`]): a name has 255 bytes at most (RFC 1035 section 2.3.4), a
/// version of TLS 7, and of the protocols those are left out at the end that find no room.
const HELLO_BYTES: usize = 384;
/// Peers that a record can say were tried.
pub const MAX_TRIED: usize = 16;
/// Where the words of a record are; the order of [`Saved`].
pub(super) mod at {
    pub const NUMBER: usize = 0;
    pub const STARTED: usize = 1;
    pub const LAST_ACTIVE: usize = 2;
    pub const COOKIES: usize = 3;
    pub const CLIENT: usize = 5;
    pub const LOCAL: usize = 8;
    pub const ROWS: usize = 11;
    pub const FLAGS: usize = 12;
    pub const WAYS: usize = 13;
    pub const READ: usize = 14;
    pub const WRITTEN: usize = 16;
    pub const TIMEOUT: usize = 18;
    pub const PERIOD: usize = 19;
    pub const SIZES: usize = 20;
    pub const DEADLINE: usize = 21;
    pub const CONNECT_BEGAN: usize = 22;
    pub const CONNECT_TOOK: usize = 23;
    pub const HOLDS: usize = 24;
    pub const HEADER: usize = 26;
    pub const RATES: usize = 32;
    pub const CLAIM: usize = 34;
    pub const CONNECTING_SINCE: usize = 35;
    pub const TRIED: usize = 36;
    pub const NAME_LEN: usize = 40;
    pub const NAME: usize = 41;
    pub const HELLO_LEN: usize = NAME + super::NAME_BYTES / 8;
    pub const HELLO: usize = HELLO_LEN + 1;
    pub const END: usize = HELLO + super::HELLO_BYTES / 8;
}

/// How far a session is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Stage {
    /// Its client is to send a PROXY header. It has no upstream yet: both its sockets are the client's.
    Header = 0,
    /// The same, and its client is to send a TLS hello.
    Hello = 1,
    /// Its peer is being connected to.
    Connecting = 2,
    /// Bytes move.
    Streaming = 3,
    /// It waits for a place at a peer. Both its sockets are the client's.
    Waiting = 4,
    /// The host that it leads to is being looked up. Both its sockets are the client's.
    Naming = 5,
}

impl Stage {
    /// All of them.
    pub const ALL: [Stage; 6] = [
        Stage::Header,
        Stage::Hello,
        Stage::Connecting,
        Stage::Streaming,
        Stage::Waiting,
        Stage::Naming,
    ];
}

/// What a direction is at; as the worker's session states say it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SavedStream {
    /// The state, at most 3.
    pub way: u8,
    /// Its source has ended.
    pub source_ended: bool,
    /// How the buffers of its sockets are sized, at most 3.
    pub buffers: u8,
    /// Bytes that user space read from the source.
    pub read_bytes: u64,
    /// Bytes that user space wrote to the target.
    pub written_bytes: u64,
    /// Bytes per second that it may carry; 0: without limit. Stays what it was when the session began.
    pub rate: u64,
}

/// What the client's TLS hello said, in printable letters of ASCII without spaces; for the log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SavedHello {
    /// The name of the server that was asked for.
    pub server_name: String,
    /// The highest version of TLS that the client speaks.
    pub protocol: String,
    /// The protocols that it would speak, separated by commas.
    pub alpn_protocols: String,
}

impl SavedHello {
    fn to_text(&self) -> String {
        let mut text = format!("{} {} {}", self.server_name, self.protocol, self.alpn_protocols);
        if text.len() > HELLO_BYTES {
            let first = text.len() - self.alpn_protocols.len();
            let cut = text[first..=HELLO_BYTES]
                .rfind(',')
                .map_or(first, |at| first + at);
            text.truncate(cut);
        }
        text
    }

    fn of_text(text: &str) -> Option<SavedHello> {
        let mut words = text.split(' ').map(str::to_owned);
        let (server_name, protocol, alpn_protocols) = (words.next()?, words.next()?, words.next()?);
        Some(SavedHello {
            server_name,
            protocol,
            alpn_protocols,
        })
    }
}

/// Who carries the bytes of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carrier {
    /// User space, as the operator says.
    Relay,
    /// The kernel.
    Sockmap,
    /// User space, because the kernel does not.
    Fallback(FallbackReason),
}

/// What a record says of its session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    /// Its number, for the log.
    pub number: u64,
    /// When it was accepted, in milliseconds of CLOCK_MONOTONIC.
    pub started_ms: u64,
    /// When user space last saw a byte move, on the same clock.
    pub last_active_ms: u64,
    /// How far it is.
    pub stage: Stage,
    /// Until when that stage may last, on the same clock; 0 where bytes move.
    pub deadline_ms: u64,
    /// The cookies of its sockets: downstream, upstream.
    pub cookies: [u64; 2],
    /// The client's address, as a PROXY header that is believed names it.
    pub client: SocketAddr,
    /// What the client's PROXY header names, believed or not: who connected, and what it connected to.
    pub header: Option<[SocketAddr; 2]>,
    /// What its TLS hello said, where one was read.
    pub hello: Option<SavedHello>,
    /// The PROXY header that its peer is to be sent once it is connected.
    pub owes: Option<ProxyProtocol>,
    /// It is to be served a status document, and is no proxied session.
    pub is_status: bool,
    /// The address that the client connected to.
    pub local: SocketAddr,
    /// The listener's row on the board.
    pub listener: u32,
    /// The peer's row on the board, if it has one.
    pub peer: Option<u32>,
    /// The upstream socket is TCP.
    pub tcp: bool,
    /// Its sockets are in the maps of the slot, at this place.
    pub joined: bool,
    /// Who carries its bytes.
    pub carrier: Carrier,
    /// Its place among those that wait for a group.
    pub claim: Option<Claim>,
    /// Since when it is looked for a peer, in milliseconds of CLOCK_MONOTONIC.
    pub connecting_since_ms: u64,
    /// The rows on the board of the peers that were tried, in order; of more than [`MAX_TRIED`] the last.
    pub tried: Vec<u16>,
    /// What it is connected to, for people.
    pub upstream: String,
    /// When connecting to the peer began, in nanoseconds of CLOCK_MONOTONIC.
    pub connect_began_ns: u64,
    /// How long that took, in microseconds.
    pub connect_us: u64,
    /// Its directions: to_upstream, to_downstream.
    pub streams: [SavedStream; 2],
    /// What it counts in, by [`crate::limits::Held`]; 0: nothing.
    pub holds: [u32; MAX_HOLDS],
    /// The settings that were in force for it, for when its listener is gone.
    pub settings: SavedSettings,
}

/// Settings that go on to apply to a session whose `[[server]]` is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SavedSettings {
    /// `proxy_timeout`.
    pub proxy_timeout_ms: u64,
    /// `ebpf_timer_period`.
    pub timer_period_ms: u64,
    /// `proxy_buffer_size`.
    pub buffer_bytes: u32,
    /// `ebpf_backlog_size`.
    pub backlog_bytes: u32,
    /// `proxy_half_close`.
    pub half_close: bool,
    /// `on_reload` is `"close"`.
    pub close_on_reload: bool,
}

const TCP: u64 = 1;
const JOINED: u64 = 1 << 1;
const HALF_CLOSE: u64 = 1 << 2;
const CLOSE_ON_RELOAD: u64 = 1 << 3;
const STATUS: u64 = 1 << 4;
const CARRIER_SHIFT: u32 = 8;
const STAGE_SHIFT: u32 = 16;
const OWES_SHIFT: u32 = 24;
const SOURCE_ENDED: u64 = 1 << 2;
const BUFFERS_SHIFT: u32 = 3;
/// Bits of a direction in the word of ways: the way in two, then those above, buffers in two.
const WAY_BITS: usize = 8;

pub(super) fn ways(streams: &[SavedStream; 2]) -> u64 {
    let bits = |stream: &SavedStream| {
        u64::from(stream.way & 3)
            | if stream.source_ended { SOURCE_ENDED } else { 0 }
            | u64::from(stream.buffers & 3) << BUFFERS_SHIFT
    };
    bits(&streams[0]) | bits(&streams[1]) << WAY_BITS
}

impl Saved {
    fn flags(&self) -> u64 {
        let mut flags = 0;
        for (bit, set) in [
            (TCP, self.tcp),
            (JOINED, self.joined),
            (HALF_CLOSE, self.settings.half_close),
            (CLOSE_ON_RELOAD, self.settings.close_on_reload),
            (STATUS, self.is_status),
        ] {
            flags |= if set { bit } else { 0 };
        }
        let carrier = match self.carrier {
            Carrier::Relay => 0,
            Carrier::Sockmap => 1,
            Carrier::Fallback(reason) => 2 + reason as u64,
        };
        let owes = match self.owes {
            None => 0,
            Some(ProxyProtocol::V1) => 1,
            Some(ProxyProtocol::V2) => 2,
        };
        flags | carrier << CARRIER_SHIFT | (self.stage as u64) << STAGE_SHIFT | owes << OWES_SHIFT
    }

    pub(super) fn encode(&self) -> [u64; at::END] {
        let mut words = [0; at::END];
        words[at::NUMBER] = self.number;
        words[at::STARTED] = self.started_ms;
        words[at::LAST_ACTIVE] = self.last_active_ms;
        words[at::DEADLINE] = self.deadline_ms;
        words[at::COOKIES..][..2].copy_from_slice(&self.cookies);
        words[at::CLIENT..][..3].copy_from_slice(&address_words(self.client));
        words[at::LOCAL..][..3].copy_from_slice(&address_words(self.local));
        for (end, address) in self.header.iter().flatten().enumerate() {
            words[at::HEADER + 3 * end..][..3].copy_from_slice(&address_words(*address));
        }
        words[at::ROWS] = u64::from(self.listener) | u64::from(self.peer.unwrap_or(u32::MAX)) << 32;
        words[at::FLAGS] = self.flags();
        words[at::WAYS] = ways(&self.streams);
        for (way, stream) in self.streams.iter().enumerate() {
            words[at::READ + way] = stream.read_bytes;
            words[at::WRITTEN + way] = stream.written_bytes;
            words[at::RATES + way] = stream.rate;
        }
        words[at::TIMEOUT] = self.settings.proxy_timeout_ms;
        words[at::PERIOD] = self.settings.timer_period_ms;
        words[at::SIZES] =
            u64::from(self.settings.buffer_bytes) | u64::from(self.settings.backlog_bytes) << 32;
        for (word, pair) in self.holds.chunks(2).enumerate() {
            words[at::HOLDS + word] = u64::from(pair[0]) | u64::from(pair[1]) << 32;
        }
        words[at::CLAIM] = self.claim.map_or(0, Claim::to_word);
        words[at::CONNECTING_SINCE] = self.connecting_since_ms;
        let first = self.tried.len().saturating_sub(MAX_TRIED);
        for (number, row) in self.tried[first..].iter().enumerate() {
            words[at::TRIED + number / 4] |= (u64::from(*row) + 1) << (16 * (number % 4));
        }
        words[at::CONNECT_BEGAN] = self.connect_began_ns;
        words[at::CONNECT_TOOK] = self.connect_us;
        let name = self.upstream.as_bytes();
        let name = &name[..name.len().min(NAME_BYTES)];
        put_text(&mut words, at::NAME_LEN, name);
        if let Some(hello) = &self.hello {
            put_text(&mut words, at::HELLO_LEN, hello.to_text().as_bytes());
        }
        words
    }

    pub(super) fn decode(words: &[u64; at::END]) -> Option<Saved> {
        let flags = words[at::FLAGS];
        let has = |bit: u64| flags & bit != 0;
        let stream = |way: usize| {
            let bits = words[at::WAYS] >> (way * WAY_BITS);
            SavedStream {
                way: (bits & 3) as u8,
                source_ended: bits & SOURCE_ENDED != 0,
                buffers: (bits >> BUFFERS_SHIFT & 3) as u8,
                read_bytes: words[at::READ + way],
                written_bytes: words[at::WRITTEN + way],
                rate: words[at::RATES + way],
            }
        };
        let carrier = match flags >> CARRIER_SHIFT & 0xff {
            0 => Carrier::Relay,
            1 => Carrier::Sockmap,
            n => Carrier::Fallback(*FallbackReason::ALL.get(n as usize - 2)?),
        };
        let header = match words[at::HEADER] {
            0 => None,
            _ => Some([address(&words[at::HEADER..])?, address(&words[at::HEADER + 3..])?]),
        };
        let hello = text(words, at::HELLO_LEN, HELLO_BYTES)?;
        let peer = (words[at::ROWS] >> 32) as u32;
        Some(Saved {
            number: words[at::NUMBER],
            started_ms: words[at::STARTED],
            last_active_ms: words[at::LAST_ACTIVE],
            stage: *Stage::ALL.get((flags >> STAGE_SHIFT & 0xff) as usize)?,
            deadline_ms: words[at::DEADLINE],
            cookies: [words[at::COOKIES], words[at::COOKIES + 1]],
            client: address(&words[at::CLIENT..])?,
            local: address(&words[at::LOCAL..])?,
            header,
            hello: SavedHello::of_text(&hello),
            owes: match flags >> OWES_SHIFT & 0xff {
                0 => None,
                1 => Some(ProxyProtocol::V1),
                2 => Some(ProxyProtocol::V2),
                _ => return None,
            },
            is_status: has(STATUS),
            listener: Some(words[at::ROWS] as u32).filter(|row| (*row as usize) < MAX_LISTENERS)?,
            peer: match peer {
                u32::MAX => None,
                row if (row as usize) < MAX_PEERS => Some(row),
                _ => return None,
            },
            tcp: has(TCP),
            joined: has(JOINED),
            carrier,
            upstream: text(words, at::NAME_LEN, NAME_BYTES)?,
            claim: Claim::of_word(words[at::CLAIM]),
            connecting_since_ms: words[at::CONNECTING_SINCE],
            tried: (0..MAX_TRIED)
                .map(|number| (words[at::TRIED + number / 4] >> (16 * (number % 4))) as u16)
                .filter_map(|row| row.checked_sub(1))
                .collect(),
            connect_began_ns: words[at::CONNECT_BEGAN],
            connect_us: words[at::CONNECT_TOOK],
            streams: [stream(0), stream(1)],
            holds: holds(&[words[at::HOLDS], words[at::HOLDS + 1]]),
            settings: SavedSettings {
                proxy_timeout_ms: words[at::TIMEOUT],
                timer_period_ms: words[at::PERIOD],
                buffer_bytes: words[at::SIZES] as u32,
                backlog_bytes: (words[at::SIZES] >> 32) as u32,
                half_close: has(HALF_CLOSE),
                close_on_reload: has(CLOSE_ON_RELOAD),
            },
        })
    }
}

/// Writes a text behind its length.
fn put_text(words: &mut [u64; at::END], at: usize, text: &[u8]) {
    words[at] = text.len() as u64;
    for (byte, value) in text.iter().enumerate() {
        words[at + 1 + byte / 8] |= u64::from(*value) << (8 * (byte % 8));
    }
}

/// The text behind its length; `None`: it cannot be so long.
fn text(words: &[u64; at::END], at: usize, longest: usize) -> Option<String> {
    let length = usize::try_from(words[at])
        .ok()
        .filter(|length| *length <= longest)?;
    let bytes = (0..length).map(|byte| (words[at + 1 + byte / 8] >> (8 * (byte % 8))) as u8);
    Some(String::from_utf8_lossy(&bytes.collect::<Vec<u8>>()).into_owned())
}

pub(super) fn holds(words: &[u64; MAX_HOLDS / 2]) -> [u32; MAX_HOLDS] {
    std::array::from_fn(|hold| (words[hold / 2] >> (32 * (hold % 2))) as u32)
}

pub(crate) fn address_words(address: SocketAddr) -> [u64; 3] {
    let (family, ip, scope) = match address {
        SocketAddr::V4(v4) => (4u64, u128::from(u32::from(*v4.ip())), 0),
        SocketAddr::V6(v6) => (6, u128::from(*v6.ip()), v6.scope_id()),
    };
    let head = family << 56 | u64::from(address.port()) << 32 | u64::from(scope);
    [head, (ip >> 64) as u64, ip as u64]
}

pub(crate) fn address(words: &[u64]) -> Option<SocketAddr> {
    let port = (words[0] >> 32) as u16;
    let ip = u128::from(words[1]) << 64 | u128::from(words[2]);
    match words[0] >> 56 {
        4 => Some(SocketAddr::new(IpAddr::V4(Ipv4Addr::from(ip as u32)), port)),
        6 => {
            let scope = words[0] as u32;
            Some(SocketAddrV6::new(Ipv6Addr::from(ip), port, 0, scope).into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::records;
    use super::*;
    use crate::counters::MAX_GROUPS;
    use proptest::prelude::*;

    #[test]
    fn of_protocols_that_find_no_room_the_last_ones_are_left_out() {
        let hello = |alpn_protocols: String| SavedHello {
            server_name: "n".repeat(255),
            protocol: "TLSv1.3".into(),
            alpn_protocols,
        };
        let read = |said: &SavedHello| SavedHello::of_text(&said.to_text());
        let fits = format!("h2,{}", "x".repeat(117));
        assert_eq!(read(&hello(fits.clone())), Some(hello(fits.clone())));
        assert_eq!(read(&hello(fits.clone() + "x")), Some(hello("h2".into())));
        assert_eq!(read(&hello(fits.clone() + ",y")), Some(hello(fits)));
        assert_eq!(read(&hello("x".repeat(500))), Some(hello(String::new())));
    }

    #[test]
    fn a_record_that_names_rows_which_the_board_has_not_makes_no_sense() {
        let mut words = [0; at::END];
        for place in [at::CLIENT, at::LOCAL] {
            words[place..][..3].copy_from_slice(&address_words(([192, 0, 2, 1], 1).into()));
        }
        let mut is_read = |listener: usize, peer: usize| {
            words[at::ROWS] = listener as u64 | (peer as u64) << 32;
            Saved::decode(&words).is_some()
        };
        let (listener, peer, none) = (MAX_LISTENERS - 1, MAX_PEERS - 1, u32::MAX as usize);
        assert!(is_read(listener, peer) && is_read(listener, none));
        assert!(!is_read(listener + 1, peer) && !is_read(listener, peer + 1));
    }

    fn stream() -> impl Strategy<Value = SavedStream> {
        (0u8..4, any::<bool>(), 0u8..4, any::<[u64; 3]>()).prop_map(
            |(way, source_ended, buffers, numbers)| SavedStream {
                way,
                source_ended,
                buffers,
                read_bytes: numbers[0],
                written_bytes: numbers[1],
                rate: numbers[2],
            },
        )
    }

    fn socket_address() -> impl Strategy<Value = SocketAddr> {
        prop_oneof![
            (any::<[u8; 4]>(), any::<u16>()).prop_map(|(ip, port)| SocketAddr::from((ip, port))),
            (any::<[u8; 16]>(), any::<u16>(), any::<u32>()).prop_map(|(ip, port, scope)| SocketAddrV6::new(
                ip.into(),
                port,
                0,
                scope
            )
            .into()),
        ]
    }

    proptest! {
        #[test]
        fn what_is_saved_is_what_is_read(
            numbers in any::<[u64; 10]>(),
            tried in proptest::collection::vec(0..u16::MAX, 0..=MAX_TRIED),
            small in any::<[u32; 3]>(),
            bits in any::<[bool; 5]>(),
            deadline_ms in any::<u64>(),
            stage in 0..Stage::ALL.len(),
            claim in proptest::option::of((0usize..MAX_GROUPS, 1u64..1 << 48)),
            header in proptest::option::of([socket_address(), socket_address()]),
            hello in proptest::option::of(("[a-z.]{0,255}", "(TLSv1[.][23])?", "[a-z/,?]{0,119}")),
            owes in 0usize..3,
            client in socket_address(),
            local in socket_address(),
            peer in proptest::option::of(0u32..4096),
            carrier in 0usize..7,
            upstream in "[ -~]{0,112}",
            streams in [stream(), stream()],
            holds in any::<[u32; MAX_HOLDS]>(),
        ) {
            let saved = Saved {
                number: numbers[0],
                started_ms: numbers[1],
                last_active_ms: numbers[2],
                stage: Stage::ALL[stage],
                deadline_ms,
                cookies: [numbers[3], numbers[4]],
                client,
                local,
                header,
                hello: hello.map(|(server_name, protocol, alpn_protocols)| SavedHello { server_name, protocol, alpn_protocols }),
                owes: [None, Some(ProxyProtocol::V1), Some(ProxyProtocol::V2)][owes],
                is_status: bits[4],
                listener: small[0] % MAX_LISTENERS as u32,
                peer,
                tcp: bits[0],
                joined: bits[1],
                carrier: match carrier {
                    0 => Carrier::Relay,
                    1 => Carrier::Sockmap,
                    n => Carrier::Fallback(FallbackReason::ALL[n - 2]),
                },
                upstream,
                claim: claim.map(|(group, ticket)| Claim { group, ticket }),
                connecting_since_ms: numbers[9],
                tried,
                connect_began_ns: numbers[7],
                connect_us: numbers[8],
                streams,
                holds,
                settings: SavedSettings {
                    proxy_timeout_ms: numbers[5],
                    timer_period_ms: numbers[6],
                    buffer_bytes: small[1],
                    backlog_bytes: small[2],
                    half_close: bits[2],
                    close_on_reload: bits[3],
                },
            };
            let records = records(1);
            records[0].fill(&saved, false);
            prop_assert_eq!(records[0].read(), Some(saved));
        }

        #[test]
        fn whatever_a_record_holds_reading_it_does_not_panic(words in proptest::collection::vec(any::<u64>(), at::END)) {
            let _ = Saved::decode(&words.try_into().unwrap());
        }
    }
}
