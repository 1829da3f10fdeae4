//! The PROXY protocol, versions 1 and 2 (HAProxy's doc/proxy-protocol.txt): what a header says, and the header
//! that says it. Bytes and addresses only: no I/O, and no byte from the network makes it panic.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use culvert_shared::client::is_unix;
use culvert_shared::config::ProxyProtocol;

/// The longest header that is read. Version 1 has at most 107 bytes; version 2 has 16, at most 216 of addresses, and
/// TLVs, for which this leaves what nginx leaves (`NGX_PROXY_PROTOCOL_MAX_HEADER`).
pub const LONGEST: usize = 4096;

/// The longest header of version 1, its end of line included (section 2.1 of the specification).
const LONGEST_V1: usize = 107;
const PREFIX_V1: &[u8] = b"PROXY ";
const SIGNATURE_V2: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// The signature, version and command, family and transport, and the length of the rest.
const FIXED_V2: usize = 16;

/// What the first bytes of a connection are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Read {
    /// The beginning of a header.
    Incomplete,
    /// A header, and what follows it.
    Header(Header),
    /// No header, and why.
    Invalid(&'static str),
}

/// A header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Its length.
    pub bytes: usize,
    /// What it names; `None`: nothing (UNKNOWN, LOCAL, no TCP).
    pub addresses: Option<Addresses>,
}

/// The two ends of the connection that a header speaks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// Who connected.
    pub source: SocketAddr,
    /// What it connected to.
    pub destination: SocketAddr,
}

/// Reads the header at the beginning of `bytes`.
pub fn read(bytes: &[u8]) -> Read {
    if begins_alike(bytes, SIGNATURE_V2) {
        read_v2(bytes)
    } else if begins_alike(bytes, PREFIX_V1) {
        read_v1(bytes)
    } else {
        Read::Invalid("it begins with no PROXY header")
    }
}

/// Whether one is the beginning of the other.
fn begins_alike(bytes: &[u8], expected: &[u8]) -> bool {
    let len = bytes.len().min(expected.len());
    bytes[..len] == expected[..len]
}

fn read_v1(bytes: &[u8]) -> Read {
    let line = &bytes[..bytes.len().min(LONGEST_V1)];
    let Some(end) = line.windows(2).position(|pair| pair == b"\r\n") else {
        return match line.len() {
            LONGEST_V1 => Read::Invalid("the PROXY header has no end of line within 107 bytes"),
            _ => Read::Incomplete,
        };
    };
    let Some(text) = line
        .get(PREFIX_V1.len()..end)
        .and_then(|text| std::str::from_utf8(text).ok())
    else {
        return Read::Invalid("the PROXY header is no text");
    };
    let header = |addresses| {
        Read::Header(Header {
            bytes: end + 2,
            addresses,
        })
    };
    // What follows UNKNOWN is to be ignored.
    if text == "UNKNOWN" || text.starts_with("UNKNOWN ") {
        return header(None);
    }
    match addresses_v1(text) {
        Some(addresses) => header(Some(addresses)),
        None => {
            Read::Invalid("the PROXY header is not \"TCP4\" or \"TCP6\" with two addresses and two ports")
        }
    }
}

fn addresses_v1(text: &str) -> Option<Addresses> {
    let mut words = text.split(' ');
    let family = words.next()?;
    let mut address = || -> Option<IpAddr> {
        let word = words.next()?;
        match family {
            "TCP4" => word.parse::<Ipv4Addr>().ok().map(IpAddr::V4),
            "TCP6" => word.parse::<Ipv6Addr>().ok().map(IpAddr::V6),
            _ => None,
        }
    };
    let (source, destination) = (address()?, address()?);
    let mut port = || words.next().and_then(port);
    let (source_port, destination_port) = (port()?, port()?);
    if words.next().is_some() {
        return None;
    }
    Some(Addresses {
        source: SocketAddr::new(source.to_canonical(), source_port),
        destination: SocketAddr::new(destination.to_canonical(), destination_port),
    })
}

fn port(word: &str) -> Option<u16> {
    // A sign is no digit, though parse takes one; leading zeros are not allowed.
    let digits = word.bytes().all(|byte| byte.is_ascii_digit());
    let plain = word == "0" || !word.starts_with('0');
    word.parse().ok().filter(|_| digits && plain)
}

fn read_v2(bytes: &[u8]) -> Read {
    let Some(fixed) = bytes.first_chunk::<FIXED_V2>() else {
        return Read::Incomplete;
    };
    let (version, command) = (fixed[12] >> 4, fixed[12] & 0xf);
    let rest = usize::from(u16::from_be_bytes([fixed[14], fixed[15]]));
    if version != 2 {
        return Read::Invalid("the PROXY header has an unknown version");
    }
    if command > 1 {
        return Read::Invalid("the PROXY header has an unknown command");
    }
    if FIXED_V2 + rest > LONGEST {
        return Read::Invalid("the PROXY header is longer than 4096 bytes");
    }
    let Some(rest) = bytes.get(FIXED_V2..FIXED_V2 + rest) else {
        return Read::Incomplete;
    };
    let addresses = match (command, fixed[13]) {
        (1, 0x11) => ends_v2::<4>(rest),
        (1, 0x21) => ends_v2::<16>(rest),
        // LOCAL, no family, or something else than TCP: the connection's own addresses are the ones that count.
        _ => Some(None),
    };
    match addresses {
        Some(addresses) => Read::Header(Header {
            bytes: FIXED_V2 + rest.len(),
            addresses,
        }),
        None => Read::Invalid("the PROXY header is too short for its addresses"),
    }
}

/// The addresses of `N` bytes each, then the ports. TLVs may follow; none of them is used.
fn ends_v2<const N: usize>(rest: &[u8]) -> Option<Option<Addresses>>
where
    [u8; N]: Into<IpAddr>,
{
    let (source, rest) = rest.split_first_chunk::<N>()?;
    let (destination, rest) = rest.split_first_chunk::<N>()?;
    let ports = rest.first_chunk::<4>()?;
    let end = |ip: [u8; N], port: [u8; 2]| {
        let ip: IpAddr = ip.into();
        SocketAddr::new(ip.to_canonical(), u16::from_be_bytes(port))
    };
    Some(Some(Addresses {
        source: end(*source, [ports[0], ports[1]]),
        destination: end(*destination, [ports[2], ports[3]]),
    }))
}

/// The header that names these two ends.
pub fn write(version: ProxyProtocol, source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    let (source, destination) = (canonical(source), canonical(destination));
    // A header has one family for both: an IPv4 address beside an IPv6 one is mapped.
    let v4 = match (source.ip(), destination.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => Some((source, destination)),
        _ => None,
    };
    let ports = (source.port(), destination.port());
    // A client of a unix socket has no address.
    if is_unix(source) {
        return match version {
            ProxyProtocol::V1 => b"PROXY UNKNOWN\r\n".to_vec(),
            ProxyProtocol::V2 => [&SIGNATURE_V2[..], &[0x20, 0, 0, 0]].concat(),
        };
    }
    match version {
        ProxyProtocol::V1 => {
            let (family, source, destination) = match v4 {
                Some((source, destination)) => ("TCP4", source.to_string(), destination.to_string()),
                None => ("TCP6", v6(source).to_string(), v6(destination).to_string()),
            };
            format!(
                "PROXY {family} {source} {destination} {} {}\r\n",
                ports.0, ports.1
            )
            .into_bytes()
        }
        ProxyProtocol::V2 => {
            let (family, ends) = match v4 {
                Some((source, destination)) => (0x11, [source.octets(), destination.octets()].concat()),
                None => (0x21, [v6(source).octets(), v6(destination).octets()].concat()),
            };
            let mut header = SIGNATURE_V2.to_vec();
            header.extend([0x21, family]);
            header.extend((ends.len() as u16 + 4).to_be_bytes());
            header.extend(ends);
            header.extend(ports.0.to_be_bytes());
            header.extend(ports.1.to_be_bytes());
            header
        }
    }
}

/// An IPv4 address as such, where it comes mapped into IPv6.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn v6(address: SocketAddr) -> Ipv6Addr {
    match address.ip() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(bytes: &[u8]) -> Header {
        match read(bytes) {
            Read::Header(header) => header,
            other => panic!("{other:?} of {bytes:?}"),
        }
    }

    fn v2(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
        let mut bytes = SIGNATURE_V2.to_vec();
        bytes.extend([command, family]);
        bytes.extend((rest.len() as u16).to_be_bytes());
        bytes.extend(rest);
        bytes
    }

    #[test]
    fn the_examples_of_the_specification_are_read() {
        let line = b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\nGET / HTTP/1.1\r\n";
        let Header { bytes, addresses } = header(line);
        assert_eq!(&line[bytes..], b"GET / HTTP/1.1\r\n");
        let addresses = addresses.unwrap();
        assert_eq!(addresses.source, "192.168.0.1:56324".parse().unwrap());
        assert_eq!(addresses.destination, "192.168.0.11:443".parse().unwrap());
        let full =
            "ffff:f...f:ffff ffff:f...f:ffff 65535 65535".replace("f...f", "ffff:ffff:ffff:ffff:ffff:ffff");
        let unknown = format!("PROXY UNKNOWN {full}\r\n");
        assert_eq!(unknown.len(), LONGEST_V1, "the longest line");
        assert_eq!(header(unknown.as_bytes()).addresses, None);
        let tcp6 = format!("PROXY TCP6 {full}\r\n");
        assert!(header(tcp6.as_bytes()).addresses.is_some());
        assert_eq!(header(b"PROXY UNKNOWN\r\n").bytes, 15);
    }

    #[test]
    fn a_header_that_names_nobody_is_skipped_with_what_it_carries() {
        for (command, family, rest) in [
            (0x20, 0x00, &b""[..]),
            (0x20, 0x11, b"whatever it may be"),
            (0x21, 0x00, b"\x03\0\x04abcd"),
            (0x21, 0x12, &[1; 12]),
            (0x21, 0x31, &[0; 216]),
        ] {
            let bytes = v2(command, family, rest);
            let whole = Header {
                bytes: bytes.len(),
                addresses: None,
            };
            assert_eq!(read(&[&bytes[..], b"payload"].concat()), Read::Header(whole));
        }
    }

    #[test]
    fn tlvs_after_the_addresses_belong_to_the_header() {
        let mut rest = vec![10, 0, 0, 1, 10, 0, 0, 2, 0x1f, 0x90, 0, 80];
        rest.extend([0x04; 300]);
        let bytes = v2(0x21, 0x11, &rest);
        let read = header(&bytes);
        assert_eq!(read.bytes, bytes.len());
        assert_eq!(read.addresses.unwrap().source, "10.0.0.1:8080".parse().unwrap());
    }

    #[test]
    fn a_mapped_address_is_an_ipv4_address() {
        let line = b"PROXY TCP6 ::ffff:10.1.2.3 ::1 1 2\r\n";
        assert_eq!(
            header(line).addresses.unwrap().source,
            "10.1.2.3:1".parse().unwrap()
        );
    }

    #[test]
    fn what_is_no_header_is_refused_as_soon_as_that_is_clear() {
        let long = [b"PROXY TCP4 ", &[b'1'; 200][..]].concat();
        let huge = v2(0x21, 0x11, &[0; LONGEST]);
        for bytes in [
            &b"G"[..],
            b"PROXX",
            b"PROXY TCP4 1.2.3.4 1.2.3.4 1\r\n",
            b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2 3\r\n",
            b"PROXY TCP4 1.2.3.4 1.2.3.4 +1 2\r\n",
            b"PROXY TCP4 1.2.3.4 1.2.3.4 01 2\r\n",
            b"PROXY TCP4 1.2.3.4 1.2.3.4 1 65536\r\n",
            b"PROXY TCP4  1.2.3.4 1.2.3.4 1 2\r\n",
            b"PROXY TCP4 ::1 ::1 1 2\r\n",
            b"PROXY TCP6 1.2.3.4 1.2.3.4 1 2\r\n",
            b"PROXY UDP4 1.2.3.4 1.2.3.4 1 2\r\n",
            b"PROXY UNKNOWNS\r\n",
            b"PROXY \xff\r\n",
            b"PROXY \r\n",
            &long,
            b"\r\n\r\n\0\r\nQUIT\r",
            &v2(0x11, 0x11, &[0; 12]),
            &v2(0x22, 0x11, &[0; 12]),
            &v2(0x21, 0x11, &[0; 11]),
            &v2(0x21, 0x21, &[0; 35]),
            &huge[..FIXED_V2],
        ] {
            assert!(
                matches!(read(bytes), Read::Invalid(_)),
                "{:?} of {bytes:?}",
                read(bytes)
            );
        }
    }

    fn any_address() -> impl Strategy<Value = SocketAddr> {
        let any = (any::<IpAddr>(), any::<u16>()).prop_map(SocketAddr::from);
        any.prop_filter("the mark of a unix socket", |address| {
            !culvert_shared::client::is_unix(canonical(*address))
        })
    }

    #[test]
    fn a_client_without_an_address_is_unknown() {
        let unix = culvert_shared::client::UNIX;
        for version in [ProxyProtocol::V1, ProxyProtocol::V2] {
            let bytes = write(version, unix, unix);
            let read = header(&bytes);
            assert_eq!((read.bytes, read.addresses), (bytes.len(), None));
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back_and_every_piece_of_it_is_incomplete(
            source in any_address(),
            destination in any_address(),
            version in prop::sample::select(vec![ProxyProtocol::V1, ProxyProtocol::V2]),
            payload in prop::collection::vec(any::<u8>(), 0..20),
        ) {
            let written = write(version, source, destination);
            prop_assert!(written.len() <= LONGEST_V1);
            let expected = Header {
                bytes: written.len(),
                addresses: Some(Addresses { source: canonical(source), destination: canonical(destination) }),
            };
            let glued = [&written[..], &payload].concat();
            prop_assert_eq!(read(&glued), Read::Header(expected));
            for end in 0..written.len() {
                prop_assert_eq!(read(&written[..end]), Read::Incomplete, "the first {} bytes", end);
            }
        }

        #[test]
        fn no_bytes_make_it_panic_or_claim_more_than_there_is(
            start in prop::sample::select(vec![&b""[..], b"PROXY ", b"PROXY TCP4 ", b"PROXY TCP6 ", SIGNATURE_V2]),
            rest in prop::collection::vec(any::<u8>(), 0..300),
        ) {
            let bytes = [start, &rest].concat();
            if let Read::Header(header) = read(&bytes) {
                prop_assert!(header.bytes <= bytes.len() && header.bytes <= LONGEST);
            }
        }
    }
}
