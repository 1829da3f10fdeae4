//! `syslog:…`, as nginx writes it: where the lines of a log are sent, and what stands before each.

use super::Address;
use super::address;
use super::diagnostic::{Fault, short};
use super::world::World;

/// What a log's path looks like when it is a syslog server.
const EXAMPLE: &str =
    "\"syslog:server=unix:/dev/log\" or \"syslog:server=192.0.2.1:514,facility=local7,tag=culvert\"";

/// RFC 3164 (5.3) cuts it there.
const TAG_MAX_BYTES: usize = 32;

/// In the order of their numbers (RFC 3164, 4.1.1), by nginx's names.
const FACILITIES: [&str; 24] = [
    "kern", "user", "mail", "daemon", "auth", "intern", "lpr", "news", "uucp", "clock", "authpriv", "ftp",
    "ntp", "audit", "alert", "cron", "local0", "local1", "local2", "local3", "local4", "local5", "local6",
    "local7",
];

/// In the order of their numbers.
const SEVERITIES: [&str; 8] = [
    "emerg", "alert", "crit", "error", "warn", "notice", "info", "debug",
];

/// A syslog server, and what lines for it begin with.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Syslog {
    /// Where datagrams are sent.
    pub server: Address,
    /// What kind of program the lines come from, 0 to 23.
    pub facility: u8,
    /// How bad the lines of an access log are, 0 to 7; those of the error log have their own.
    pub severity: u8,
    /// The program's name.
    pub tag: String,
    /// Lines name this host.
    pub hostname: bool,
}

impl Syslog {
    /// What was written by [`Syslog::text`].
    pub fn from_text(text: &str) -> Option<Syslog> {
        let written = |server: &str| {
            let address = match server.strip_prefix("unix:") {
                Some(path) => Some(Address::Unix(path.into())),
                None => server.parse().ok().map(Address::Tcp),
            };
            address.ok_or_else(|| Fault::new("no address", EXAMPLE))
        };
        parse(text.strip_prefix("syslog:")?, written).ok()
    }

    /// As a file would write it.
    pub fn text(&self) -> String {
        let name = |names: &[&'static str], at: u8| names.get(usize::from(at)).copied().unwrap_or_default();
        format!(
            "syslog:server={},facility={},tag={},severity={}{}",
            self.server,
            name(&FACILITIES, self.facility),
            self.tag,
            name(&SEVERITIES, self.severity),
            if self.hostname { "" } else { ",nohostname" }
        )
    }
}

/// What stands behind `syslog:`. A server's name is looked up now; the first of its addresses is used.
pub(super) fn read(text: &str, world: &dyn World) -> Result<Syslog, Fault> {
    parse(text, |server| {
        let remedy = format!("write for example {EXAMPLE}");
        if server.starts_with("unix:") {
            return address::unix_server(server, &remedy);
        }
        let has_port = match server.strip_prefix('[') {
            Some(rest) => rest.contains("]:"),
            None => server.contains(':'),
        };
        let whole = match has_port {
            true => server.to_owned(),
            false => format!("{server}:514"),
        };
        let mut found = address::sockets(&whole, &remedy, world)?.into_iter();
        // There is always one: what has none is an error.
        found
            .next()
            .map(Address::Tcp)
            .ok_or_else(|| Fault::new("no address", remedy))
    })
}

fn parse(text: &str, server_of: impl Fn(&str) -> Result<Address, Fault>) -> Result<Syslog, Fault> {
    let remedy = || format!("write for example {EXAMPLE}");
    let (mut server, mut facility, mut severity, mut tag, mut nohostname) = (None, None, None, None, None);
    for part in text.split(',') {
        let (name, value) = part.split_once('=').unwrap_or((part, ""));
        let twice = match (name, part.contains('=')) {
            ("server", true) => server.replace(server_of(value)?).is_some(),
            ("facility", true) => facility.replace(number(&FACILITIES, name, value)?).is_some(),
            ("severity", true) => severity.replace(number(&SEVERITIES, name, value)?).is_some(),
            ("tag", true) => tag.replace(tag_of(value)?).is_some(),
            ("nohostname", false) => nohostname.replace(()).is_some(),
            _ => {
                return Err(Fault::new(
                    format!("unknown parameter \"{}\" of syslog", short(part)),
                    "allowed: server=…, facility=…, tag=…, severity=…, nohostname, with commas between them",
                ));
            }
        };
        if twice {
            return Err(Fault::new(format!("{name} stands twice in it"), "write it once"));
        }
    }
    Ok(Syslog {
        server: server.ok_or_else(|| Fault::new("syslog without a server", remedy()))?,
        // nginx's.
        facility: facility.unwrap_or(23),
        severity: severity.unwrap_or(6),
        tag: tag.unwrap_or_else(|| "culvert".to_owned()),
        hostname: nohostname.is_none(),
    })
}

fn number(names: &[&str], what: &str, word: &str) -> Result<u8, Fault> {
    let found = names.iter().position(|name| *name == word);
    found.map(|at| at as u8).ok_or_else(|| {
        Fault::new(
            format!("unknown {what} \"{}\"", short(word)),
            format!("allowed: {}", names.join(", ")),
        )
    })
}

fn tag_of(word: &str) -> Result<String, Fault> {
    let fits = !word.is_empty()
        && word.len() <= TAG_MAX_BYTES
        && word.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    match fits {
        true => Ok(word.to_owned()),
        false => Err(Fault::new(
            format!("\"{}\" cannot be a tag", short(word)),
            format!("letters, digits and _, at most {TAG_MAX_BYTES}"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        for text in [
            "syslog:server=127.0.0.1:514,facility=local7,tag=culvert,severity=info",
            "syslog:server=[::1]:5514,facility=kern,tag=a_1,severity=emerg,nohostname",
            "syslog:server=unix:/dev/log,facility=cron,tag=x,severity=debug",
        ] {
            assert_eq!(Syslog::from_text(text).expect(text).text(), text);
        }
        assert_eq!(Syslog::from_text("syslog:server=nobody"), None);
        assert_eq!(Syslog::from_text("/var/log/a"), None);
    }
}
