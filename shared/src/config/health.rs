//! `check`: how the peers of a group are asked whether they live. What a person writes → what is used, and back.

use std::time::Duration;

use config::{Map, Value, ValueKind};
use regex::bytes::{Regex, RegexBuilder};

use super::check::{Check as Checker, YEAR};
use super::diagnostic::Fault;
use super::source::join;
use super::units::write_duration;
use super::valid::{self, Given};
use super::{defaults, expand, units};

/// How much of an answer is looked at, and how much may be sent: enough for any greeting, and little enough to hold for
/// every peer at once.
pub const CHECK_MAX_BYTES: usize = 4096;

/// What a pattern may take once it is compiled.
const PATTERN_MAX_BYTES: usize = 1 << 20;

/// More often than this is no check, it is a load.
const INTERVAL_MIN: Duration = Duration::from_millis(10);

/// No peer needs more results in a row than that to be believed.
const ROW_MAX: u32 = 65_535;

/// How the peers of a group are checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Check {
    /// From the start of one check of a peer to the next.
    pub interval: Duration,
    /// Checks in a row that have to pass before a peer that is down is up.
    pub rise: u32,
    /// Checks in a row that have to fail before a peer that is up is down.
    pub fall: u32,
    /// How long one check may take.
    pub timeout: Duration,
    /// The port to connect to; `None`: the peer's own.
    pub port: Option<u16>,
    /// What is sent once connected; may be empty.
    pub send: Vec<u8>,
    /// What must be among the first bytes of the answer; `None`: nothing is read.
    pub expect: Option<Expect>,
}

/// What an answer must hold.
#[derive(Clone, Debug)]
pub enum Expect {
    /// These bytes.
    Text(Vec<u8>),
    /// A match of this pattern.
    Pattern(Regex),
}

impl Expect {
    /// Whether the answer so far has it.
    pub fn is_in(&self, answer: &[u8]) -> bool {
        match self {
            Expect::Text(text) => answer.windows(text.len()).any(|window| window == text),
            Expect::Pattern(pattern) => pattern.is_match(answer),
        }
    }
}

impl PartialEq for Expect {
    fn eq(&self, other: &Expect) -> bool {
        match (self, other) {
            (Expect::Text(one), Expect::Text(other)) => one == other,
            (Expect::Pattern(one), Expect::Pattern(other)) => one.as_str() == other.as_str(),
            _ => false,
        }
    }
}

/// As it is written.
impl std::fmt::Display for Expect {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Expect::Text(text) => f.write_str(&write_bytes(text)),
            Expect::Pattern(pattern) => write!(f, "~ {}", pattern.as_str()),
        }
    }
}

impl Checker<'_> {
    /// The `check` of one upstream; `None`: it has none.
    pub(super) fn health(&mut self, key: &str, upstream: &Map<String, Value>) -> Option<Check> {
        let key = join(key, "check");
        let ValueKind::Table(table) = &upstream.get("check")?.kind else {
            // Anything else was reported as being no table.
            return None;
        };
        let wait = |given: Given| units::duration(given, Duration::from_millis(1)..=YEAR);
        let row = |given: Given| valid::number(given, 1..=ROW_MAX);
        let interval = self.at(table, &key, "interval", |given| {
            units::duration(given, INTERVAL_MIN..=YEAR)
        });
        let port = self.at(table, &key, "port", |given| valid::number(given, 1..=65_535));
        Some(Check {
            interval: interval.unwrap_or(defaults::CHECK_INTERVAL),
            rise: self.at(table, &key, "rise", row).unwrap_or(defaults::CHECK_RISE),
            fall: self.at(table, &key, "fall", row).unwrap_or(defaults::CHECK_FALL),
            timeout: self
                .at(table, &key, "timeout", wait)
                .unwrap_or(defaults::CHECK_TIMEOUT),
            port: port.map(|port| port as u16),
            send: self.at(table, &key, "send", send).unwrap_or_default(),
            expect: self.at(table, &key, "expect", expect),
        })
    }
}

fn send(given: Given) -> Result<Vec<u8>, Fault> {
    // An empty line is something to send.
    match given.str() {
        Some(text) => bounded(read_bytes(text)?),
        None => Err(given.wrong_type("write it as text, for example \"PING\\r\\n\"")),
    }
}

fn expect(given: Given) -> Result<Expect, Fault> {
    let Some(text) = given.str() else {
        return Err(given.wrong_type("write it as text, for example \"+PONG\""));
    };
    let pattern = match text.strip_prefix('~') {
        Some(rest) => match rest.strip_prefix('*') {
            Some(rest) => format!("(?i){}", rest.trim_start()),
            None => rest.trim_start().to_owned(),
        },
        None => {
            let bytes = bounded(read_bytes(text)?)?;
            return match bytes.is_empty() {
                true => Err(Fault::new(
                    "empty, every answer has that",
                    "leave expect out to check that the peer takes the connection",
                )),
                false => Ok(Expect::Text(bytes)),
            };
        }
    };
    // Bytes, not characters: an answer need not be text.
    let mut builder = RegexBuilder::new(&pattern);
    builder.unicode(false).size_limit(PATTERN_MAX_BYTES);
    builder.build().map(Expect::Pattern).map_err(|error| {
        let text = error.to_string();
        let last = text.lines().last().unwrap_or_default().trim();
        let why = last.strip_prefix("error: ").unwrap_or(last);
        Fault::new(
            format!("not a regular expression: {why}"),
            "write for example \"~ ^(220|250) \"; text that begins with ~ begins with \\x7e",
        )
    })
}

fn bounded(bytes: Vec<u8>) -> Result<Vec<u8>, Fault> {
    match bytes.len() <= CHECK_MAX_BYTES {
        true => Ok(bytes),
        false => Err(Fault::new(
            format!("{} bytes", bytes.len()),
            format!("allowed: up to {CHECK_MAX_BYTES} bytes"),
        )),
    }
}

/// Text with the escapes of nginx and HAProxy, for bytes that TOML has no way to write.
fn read_bytes(text: &str) -> Result<Vec<u8>, Fault> {
    let fault = |what: String| Fault::new(what, "the escapes are \\r, \\n, \\t, \\0, \\\\ and \\x41");
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('\\') {
        out.extend_from_slice(before.as_bytes());
        let mut taken = 1;
        match after.bytes().next() {
            Some(b'r') => out.push(b'\r'),
            Some(b'n') => out.push(b'\n'),
            Some(b't') => out.push(b'\t'),
            Some(b'0') => out.push(0),
            Some(b'\\') => out.push(b'\\'),
            Some(b'x') => {
                taken = 3;
                let digits = after.get(1..3).filter(|digits| !digits.starts_with('+'));
                match digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
                    Some(byte) => out.push(byte),
                    None => return Err(fault("\\x without two hexadecimal digits".to_owned())),
                }
            }
            _ => {
                let what = after.chars().next().map_or(String::new(), |c| c.to_string());
                return Err(fault(format!("unknown escape \\{what}")));
            }
        }
        rest = after.get(taken..).unwrap_or_default();
    }
    out.extend_from_slice(rest.as_bytes());
    Ok(out)
}

/// What [`read_bytes`] takes for the same, and a person can read. A text that begins with `~` would be a pattern.
pub fn write_bytes(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for (at, byte) in bytes.iter().enumerate() {
        match byte {
            b'\r' => out.push_str("\\r"),
            b'\n' => out.push_str("\\n"),
            b'\t' => out.push_str("\\t"),
            b'\\' => out.push_str("\\\\"),
            b'~' if at == 0 => out.push_str("\\x7e"),
            b' '..=b'~' => out.push(char::from(*byte)),
            _ => out.push_str(&format!("\\x{byte:02x}")),
        }
    }
    out
}

/// As an inline table.
pub(super) fn write(check: &Check, quoted: impl Fn(&str) -> String) -> String {
    let mut keys = vec![
        format!("interval = {}", quoted(&write_duration(check.interval))),
        format!("rise = {}", check.rise),
        format!("fall = {}", check.fall),
        format!("timeout = {}", quoted(&write_duration(check.timeout))),
    ];
    if let Some(port) = check.port {
        keys.push(format!("port = {port}"));
    }
    if !check.send.is_empty() {
        keys.push(format!(
            "send = {}",
            quoted(&expand::escape(&write_bytes(&check.send)))
        ));
    }
    if let Some(expect) = &check.expect {
        keys.push(format!(
            "expect = {}",
            quoted(&expand::escape(&expect.to_string()))
        ));
    }
    format!("{{ {} }}", keys.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Expect, Fault> {
        let kind = ValueKind::from(text);
        expect(Given {
            kind: &kind,
            loose: false,
        })
    }

    #[test]
    fn escapes_stand_for_bytes_and_come_back() {
        assert_eq!(
            read_bytes("a\\r\\n\\x00\\xfF\\\\b").expect("bytes"),
            b"a\r\n\0\xff\\b"
        );
        for bytes in [&b"~a"[..], b"\0\x7f\xff", "é\\x".as_bytes(), b""] {
            assert_eq!(read_bytes(&write_bytes(bytes)).expect("bytes"), bytes);
        }
        for wrong in ["\\", "\\q", "\\x4", "\\x+4", "\\xé"] {
            assert!(read_bytes(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_answer_is_searched_for_text_or_for_a_pattern() {
        assert!(read("PONG\\r").expect("text").is_in(b"+PONG\r\n"));
        assert!(!read("PONG\\r").expect("text").is_in(b"+PON"));
        let pattern = read("~ ^(220|250) \\w+\\xff").expect("a pattern");
        assert!(pattern.is_in(b"250 ok\xff"));
        assert!(!pattern.is_in(b" 250 ok\xff"));
        assert!(read("~* ^OK").expect("a pattern").is_in(b"ok"));
        assert!(read("\\x7e a").expect("text").is_in(b"is ~ a"));
        assert!(read("~ (").is_err() && read("").is_err());
    }
}
