//! The first message of a TLS client (RFC 8446 section 4.1.2; RFC 6066 section 3; RFC 7301): which name it asks for and what
//! it speaks. Bytes only: no I/O, and no byte from the network makes it panic.

/// What the first bytes of a connection are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Read {
    /// The beginning of a hello.
    Incomplete,
    /// A hello.
    Hello(Hello),
    /// Something else.
    NotTls,
}

/// What a hello says, as variables give it: empty where it says nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hello {
    /// The name of the server that is asked for.
    pub server_name: String,
    /// The protocols that the client would speak, separated by commas.
    pub alpn_protocols: String,
    /// The highest version of TLS that the client speaks.
    pub protocol: &'static str,
}

const HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;
/// The longest fragment of a record (RFC 8446 section 5.1).
const LONGEST_FRAGMENT: usize = 1 << 14;
const SERVER_NAME: u16 = 0;
const ALPN: u16 = 16;
const SUPPORTED_VERSIONS: u16 = 43;
/// The longest name (RFC 1035 section 2.3.4).
const LONGEST_NAME: usize = 255;

/// Reads the hello at the beginning of `bytes`.
pub fn read(bytes: &[u8]) -> Read {
    // A hello may be spread over several records.
    let mut message: Vec<u8> = Vec::new();
    let mut rest = bytes;
    loop {
        if let Some(whole) = whole_message(&message) {
            return match hello(whole) {
                Some(hello) => Read::Hello(hello),
                None => Read::NotTls,
            };
        }
        let fits = |at: usize, right: fn(u8) -> bool| rest.get(at).is_none_or(|byte| right(*byte));
        if !fits(0, |kind| kind == HANDSHAKE) || !fits(1, |major| major == 3) {
            return Read::NotTls;
        }
        let Some((head, after)) = rest.split_first_chunk::<5>() else {
            return Read::Incomplete;
        };
        let length = usize::from(u16::from_be_bytes([head[3], head[4]]));
        if length == 0 || length > LONGEST_FRAGMENT {
            return Read::NotTls;
        }
        let here = length.min(after.len());
        message.extend(&after[..here]);
        if message.first().is_some_and(|kind| *kind != CLIENT_HELLO) {
            return Read::NotTls;
        }
        rest = &after[here..];
        if here < length && whole_message(&message).is_none() {
            return Read::Incomplete;
        }
    }
}

/// The body of the message, once all of it is there.
fn whole_message(message: &[u8]) -> Option<&[u8]> {
    let (head, body) = message.split_first_chunk::<4>()?;
    let length = u32::from_be_bytes([0, head[1], head[2], head[3]]) as usize;
    body.get(..length)
}

/// Takes things off the front of bytes.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn number(&mut self) -> Option<u16> {
        let bytes = self.bytes(2)?;
        Some(u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    /// What a length of one byte stands before.
    fn short(&mut self) -> Option<Reader<'a>> {
        let length = self.bytes(1)?[0];
        self.bytes(length.into()).map(Reader)
    }

    /// What a length of two bytes stands before.
    fn long(&mut self) -> Option<Reader<'a>> {
        let length = self.number()?;
        self.bytes(length.into()).map(Reader)
    }
}

fn hello(body: &[u8]) -> Option<Hello> {
    let mut body = Reader(body);
    let mut found = Hello {
        protocol: version_name(body.number()?),
        ..Hello::default()
    };
    let _random = body.bytes(32)?;
    let _session = body.short()?;
    let _ciphers = body.long()?;
    let _compressions = body.short()?;
    if body.0.is_empty() {
        return Some(found);
    }
    let mut extensions = body.long()?;
    while !extensions.0.is_empty() {
        let kind = extensions.number()?;
        let mut content = extensions.long()?;
        match kind {
            SERVER_NAME => found.server_name = server_name(&mut content)?,
            ALPN => found.alpn_protocols = protocols(&mut content)?,
            SUPPORTED_VERSIONS => found.protocol = highest_version(&mut content)?,
            _ => {}
        }
    }
    Some(found)
}

/// The first host name. One that cannot be a name is none: it would end up in logs and addresses.
fn server_name(content: &mut Reader) -> Option<String> {
    let mut list = content.long()?;
    while !list.0.is_empty() {
        let kind = list.bytes(1)?[0];
        let name = list.long()?.0;
        if kind == 0 {
            let sound = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
            let sound = name.len() <= LONGEST_NAME && name.iter().all(sound);
            return Some(if sound { text(name) } else { String::new() });
        }
    }
    Some(String::new())
}

fn protocols(content: &mut Reader) -> Option<String> {
    let mut list = content.long()?;
    let mut names = Vec::new();
    while !list.0.is_empty() {
        names.push(text(list.short()?.0));
    }
    Some(names.join(","))
}

/// Text for logs and comparisons: what is no printable letter is a question mark.
fn text(bytes: &[u8]) -> String {
    let letter = |byte: &u8| match byte {
        b',' => '?',
        byte if byte.is_ascii_graphic() => char::from(*byte),
        _ => '?',
    };
    bytes.iter().map(letter).collect()
}

fn highest_version(content: &mut Reader) -> Option<&'static str> {
    let mut list = content.short()?;
    let mut highest = 0;
    while !list.0.is_empty() {
        let version = list.number()?;
        // Values that stand for nothing (RFC 8701) are among them.
        if !version_name(version).is_empty() {
            highest = highest.max(version);
        }
    }
    Some(version_name(highest))
}

fn version_name(version: u16) -> &'static str {
    match version {
        0x0300 => "SSLv3",
        0x0301 => "TLSv1",
        0x0302 => "TLSv1.1",
        0x0303 => "TLSv1.2",
        0x0304 => "TLSv1.3",
        _ => "",
    }
}

/// The version of that name; nothing if there is none.
pub fn version_of(name: &str) -> &'static str {
    let names = (0x0300..=0x0304).map(version_name);
    names.into_iter().find(|known| *known == name).unwrap_or("")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn with_length(width: usize, bytes: &[u8]) -> Vec<u8> {
        let length = (bytes.len() as u32).to_be_bytes();
        [&length[4 - width..], bytes].concat()
    }

    fn extension(kind: u16, content: &[u8]) -> Vec<u8> {
        [&kind.to_be_bytes()[..], &with_length(2, content)].concat()
    }

    fn message(extensions: &[u8]) -> Vec<u8> {
        let head = [
            &[3, 3][..],
            &[7; 32],
            &with_length(1, &[9; 32]),
            &with_length(2, &[0x13, 1]),
            &[1, 0],
        ]
        .concat();
        let body = [head, with_length(2, extensions)].concat();
        [&[1][..], &with_length(3, &body)].concat()
    }

    /// The message in records of at most `piece` bytes.
    fn records(message: &[u8], piece: usize) -> Vec<u8> {
        let record = |part: &[u8]| [&[22, 3, 1][..], &with_length(2, part)].concat();
        message.chunks(piece).flat_map(record).collect()
    }

    fn example() -> (Vec<u8>, Hello) {
        let name = with_length(2, &[&[0][..], &with_length(2, b"a.example.org")].concat());
        let alpn = with_length(2, &[with_length(1, b"h2"), with_length(1, b"http/1.1")].concat());
        let versions = with_length(1, &[0x7a, 0x7a, 3, 4, 3, 3]);
        let extensions = [
            extension(43, &versions),
            extension(0, &name),
            extension(21, &[0; 600]),
            extension(16, &alpn),
        ];
        let hello = Hello {
            server_name: "a.example.org".into(),
            alpn_protocols: "h2,http/1.1".into(),
            protocol: "TLSv1.3",
        };
        (message(&extensions.concat()), hello)
    }

    #[test]
    fn a_hello_is_read_however_it_is_cut_into_records_and_every_piece_of_it_is_incomplete() {
        let (message, hello) = example();
        for piece in [1, 3, 4, 100, message.len()] {
            let bytes = records(&message, piece);
            for end in 0..bytes.len() {
                assert_eq!(
                    read(&bytes[..end]),
                    Read::Incomplete,
                    "{end} bytes, records of {piece}"
                );
            }
            assert_eq!(read(&bytes), Read::Hello(hello.clone()));
            assert_eq!(read(&[&bytes[..], b"more"].concat()), Read::Hello(hello.clone()));
        }
    }

    #[test]
    fn a_hello_without_extensions_names_nobody() {
        let bare = [
            &[1][..],
            &with_length(3, &[&[3, 1][..], &[7; 32], &[0, 0, 2, 0, 5, 1, 0]].concat()),
        ]
        .concat();
        let hello = Hello {
            protocol: "TLSv1",
            ..Hello::default()
        };
        assert_eq!(read(&records(&bare, 99)), Read::Hello(hello));
    }

    #[test]
    fn a_name_that_cannot_be_one_is_none() {
        for name in [&b"a b"[..], b"a\n", b"\xff", b"a/b", &[b'a'; 300]] {
            let list = with_length(2, &[&[0][..], &with_length(2, name)].concat());
            let bytes = records(&message(&extension(0, &list)), 4096);
            let Read::Hello(hello) = read(&bytes) else {
                panic!("{name:?}")
            };
            assert_eq!(hello.server_name, "");
        }
    }

    #[test]
    fn what_is_no_hello_is_known_at_once() {
        let (message, _) = example();
        let mut lies = records(&message, 4096);
        let last = lies.len() - 1;
        lies[last - 14] = 200; // A protocol's length beyond its list.
        for bytes in [
            &b"GET /"[..],
            b"SSH-2.0",
            &[22, 2],
            &[22, 3, 1, 0, 0],
            &[22, 3, 1, 0x50, 0],
            &[22, 3, 1, 0, 5, 2],
            &lies,
        ] {
            assert_eq!(read(bytes), Read::NotTls, "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(
            flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
            piece in 1usize..700,
            keep in any::<prop::sample::Index>(),
            noise in prop::collection::vec(any::<u8>(), 0..100),
        ) {
            let (message, _) = example();
            let mut bytes = records(&message, piece);
            for (at, value) in flips {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            bytes.truncate(keep.index(bytes.len() + 1));
            read(&bytes);
            read(&noise);
        }
    }
}
