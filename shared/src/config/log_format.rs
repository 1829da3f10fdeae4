//! `log_format`: what a line of an access log is made of.

use std::collections::BTreeMap;
use std::sync::Arc;

use config::{Map, Value};

use super::check::Check;
use super::diagnostic::{Fault, short};
use super::file::nearest;
use super::source::join;
use super::template::is_name_char;
use super::{Variable, expand, valid};

/// The variables of a line. nginx's names where nginx has the thing.
pub(super) const VARIABLES: &[(&str, LogVariable)] = &[
    ("remote_addr", LogVariable::RemoteAddr),
    ("remote_port", LogVariable::RemotePort),
    ("server_addr", LogVariable::ServerAddr),
    ("server_port", LogVariable::ServerPort),
    ("listener", LogVariable::Listener),
    ("time_local", LogVariable::TimeLocal),
    ("time_iso8601", LogVariable::TimeIso8601),
    ("msec", LogVariable::Msec),
    ("protocol", LogVariable::Protocol),
    ("status", LogVariable::Status),
    ("bytes_sent", LogVariable::BytesSent),
    ("bytes_received", LogVariable::BytesReceived),
    ("session_time", LogVariable::SessionTime),
    ("connection", LogVariable::Connection),
    ("hostname", LogVariable::Hostname),
    ("pid", LogVariable::Pid),
    ("worker", LogVariable::Worker),
    ("upstream_addr", LogVariable::UpstreamAddr),
    ("upstream_bytes_sent", LogVariable::UpstreamBytesSent),
    ("upstream_bytes_received", LogVariable::UpstreamBytesReceived),
    ("upstream_bytes_sent_sum", LogVariable::UpstreamBytesSentSum),
    (
        "upstream_bytes_received_sum",
        LogVariable::UpstreamBytesReceivedSum,
    ),
    ("upstream_connect_time", LogVariable::UpstreamConnectTime),
    ("upstream_session_time", LogVariable::UpstreamSessionTime),
    ("datapath", LogVariable::Datapath),
    ("fallback_reason", LogVariable::FallbackReason),
    ("close_reason", LogVariable::CloseReason),
    ("pauses", LogVariable::Pauses),
    ("sockmap_to_upstream", LogVariable::SockmapToUpstream),
    ("sockmap_to_downstream", LogVariable::SockmapToDownstream),
    ("relay_to_upstream", LogVariable::RelayToUpstream),
    ("relay_to_downstream", LogVariable::RelayToDownstream),
    (
        "proxy_protocol_addr",
        LogVariable::Early(Variable::ProxyProtocolAddr),
    ),
    (
        "proxy_protocol_port",
        LogVariable::Early(Variable::ProxyProtocolPort),
    ),
    (
        "proxy_protocol_server_addr",
        LogVariable::Early(Variable::ProxyProtocolServerAddr),
    ),
    (
        "proxy_protocol_server_port",
        LogVariable::Early(Variable::ProxyProtocolServerPort),
    ),
    (
        "ssl_preread_server_name",
        LogVariable::Early(Variable::SslPrereadServerName),
    ),
    (
        "ssl_preread_alpn_protocols",
        LogVariable::Early(Variable::SslPrereadAlpnProtocols),
    ),
    (
        "ssl_preread_protocol",
        LogVariable::Early(Variable::SslPrereadProtocol),
    ),
];

/// The formats that are there without being written: name, escape, text. The keys of the JSON one are the names
/// of its variables; what may be several things ("a, b") or nothing is a string there, the rest are numbers.
const READY_MADE: &[(&str, Escape, &str)] = &[
    (
        "main",
        Escape::Default,
        "$remote_addr [$time_local] $protocol $status $bytes_sent $bytes_received $session_time \"$upstream_addr\" \
         $upstream_connect_time $datapath $close_reason",
    ),
    (
        "json",
        Escape::Json,
        r#"{"time_iso8601":"$time_iso8601","msec":$msec,"connection":$connection,"pid":$pid,"worker":$worker,"remote_addr":"$remote_addr","remote_port":$remote_port,"server_addr":"$server_addr","server_port":$server_port,"listener":"$listener","protocol":"$protocol","status":$status,"close_reason":"$close_reason","bytes_sent":$bytes_sent,"bytes_received":$bytes_received,"session_time":$session_time,"upstream_addr":"$upstream_addr","upstream_bytes_sent":$upstream_bytes_sent_sum,"upstream_bytes_received":$upstream_bytes_received_sum,"upstream_connect_time":"$upstream_connect_time","upstream_session_time":"$upstream_session_time","datapath":"$datapath","fallback_reason":"$fallback_reason","pauses":$pauses,"sockmap_to_upstream":$sockmap_to_upstream,"sockmap_to_downstream":$sockmap_to_downstream,"relay_to_upstream":$relay_to_upstream,"relay_to_downstream":$relay_to_downstream}"#,
    ),
];

const ESCAPES: &[(&str, Escape)] = &[
    ("default", Escape::Default),
    ("json", Escape::Json),
    ("none", Escape::None),
];

/// What a line of an access log is made of.
#[derive(Clone, Debug, PartialEq)]
pub struct LogFormat {
    /// Its name.
    pub name: String,
    /// How values are made harmless.
    pub escape: Escape,
    /// Its parts, in order.
    pub parts: Vec<LogPart>,
}

/// How values are made harmless in a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Escape {
    /// Quotes, backslashes and what is no printable ASCII as `\xHH`; a missing value is `-`.
    Default,
    /// As in a JSON string; a missing value is empty.
    Json,
    /// Not at all; a missing value is empty.
    None,
}

/// One part of a [`LogFormat`].
#[derive(Clone, Debug, PartialEq)]
pub enum LogPart {
    /// Text as it is.
    Literal(String),
    /// A value of the session.
    Variable(LogVariable),
}

/// What a line can tell of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogVariable {
    /// The client's address without port.
    RemoteAddr,
    /// The client's port.
    RemotePort,
    /// The address that the client connected to, without port.
    ServerAddr,
    /// The port that the client connected to.
    ServerPort,
    /// The listener as configured; a wildcard stays one.
    Listener,
    /// When the session ended, as the Common Log Format has it.
    TimeLocal,
    /// When it ended, ISO 8601.
    TimeIso8601,
    /// When it ended, Unix seconds with milliseconds.
    Msec,
    /// `TCP`.
    Protocol,
    /// 200, 400, 403, 500, 502 or 503, as in nginx.
    Status,
    /// Bytes sent to the client.
    BytesSent,
    /// Bytes received from the client.
    BytesReceived,
    /// How long it lasted, in seconds with milliseconds.
    SessionTime,
    /// Its number.
    Connection,
    /// The host's name.
    Hostname,
    /// The worker's process id.
    Pid,
    /// The worker's slot.
    Worker,
    /// The peers that were tried, the last one served it.
    UpstreamAddr,
    /// Bytes sent to the peer.
    UpstreamBytesSent,
    /// Bytes received from the peer.
    UpstreamBytesReceived,
    /// What all of its peers were sent together: a number.
    UpstreamBytesSentSum,
    /// What was received of all of its peers together: a number.
    UpstreamBytesReceivedSum,
    /// How long connecting took, in seconds with milliseconds, for each of the peers.
    UpstreamConnectTime,
    /// How long the session with the last peer lasted.
    UpstreamSessionTime,
    /// Who carried the bytes: `sockmap`, `relay`, `mixed` or `none`.
    Datapath,
    /// Why the kernel did not, where it should have.
    FallbackReason,
    /// Why it ended.
    CloseReason,
    /// Times that a source was held back.
    Pauses,
    /// Bytes to the peer that the kernel forwarded.
    SockmapToUpstream,
    /// Bytes to the client that the kernel forwarded.
    SockmapToDownstream,
    /// Bytes to the peer that user space copied.
    RelayToUpstream,
    /// Bytes to the client that user space copied.
    RelayToDownstream,
    /// What its PROXY header or TLS hello said.
    Early(Variable),
}

impl Escape {
    /// The word that a file uses.
    pub(super) fn name(self) -> &'static str {
        ESCAPES
            .iter()
            .find(|(_, escape)| *escape == self)
            .map_or("", |(name, _)| name)
    }
}

/// Every `[[log_format]]` by its name, and the ready-made ones.
pub(super) fn read(check: &mut Check<'_>, root: &Map<String, Value>) -> BTreeMap<String, Arc<LogFormat>> {
    let mut formats = BTreeMap::new();
    for (name, escape, text) in READY_MADE {
        let format = LogFormat {
            name: (*name).to_owned(),
            escape: *escape,
            parts: parse(text).unwrap_or_default(),
        };
        formats.insert(format.name.clone(), Arc::new(format));
    }
    for (key, at, table) in check.tables(root, "log_format") {
        for needed in ["name", "format"] {
            if !table.contains_key(needed) {
                let text = "missing, a [[log_format]] needs a name and a format";
                check.findings.report(at, &join(&key, needed), text);
            }
        }
        let name = check.at(table, &key, "name", |given| {
            let name = valid::text(given, "\"main\"")?;
            match formats.contains_key(name) {
                false => Ok(name.to_owned()),
                true if is_ready_made(name) => Err(Fault::new(
                    "a ready-made format has this name",
                    "give yours another one",
                )),
                true => Err(Fault::new(
                    "already the name of another [[log_format]]",
                    "give each format a name of its own",
                )),
            }
        });
        let escape = check.at(table, &key, "escape", |given| {
            let word = valid::text(given, "\"json\"")?;
            let known = ESCAPES.iter().find(|(name, _)| *name == word);
            known.map(|(_, escape)| *escape).ok_or_else(|| {
                Fault::new(
                    "unknown way of escaping",
                    "allowed: \"default\", \"json\", \"none\"",
                )
            })
        });
        let parts = check.at(table, &key, "format", |given| {
            parse(valid::text(given, "\"$remote_addr $status\"")?)
        });
        if let Some(name) = name {
            let format = LogFormat {
                name: name.clone(),
                escape: escape.unwrap_or(Escape::Default),
                parts: parts.unwrap_or_default(),
            };
            formats.insert(name, Arc::new(format));
        }
    }
    formats
}

pub(super) fn is_ready_made(name: &str) -> bool {
    READY_MADE.iter().any(|(ready, ..)| *ready == name)
}

/// The parts of a format: text, `$name` and, where a letter follows, `${name}`.
fn parse(text: &str) -> Result<Vec<LogPart>, Fault> {
    if text.contains(['\n', '\r']) {
        return Err(Fault::new(
            "a line break within a line",
            "write the format as one line; a \\ at the end of a line of a \"\"\" string joins it to the next",
        ));
    }
    let mut parts = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        let (literal, after) = (&rest[..at], &rest[at + 1..]);
        if !literal.is_empty() {
            parts.push(LogPart::Literal(literal.to_owned()));
        }
        let (name, after) = match after.strip_prefix('{') {
            Some(braced) => braced
                .split_once('}')
                .ok_or_else(|| Fault::new("${ without }", "write $name, or $${name} before a letter"))?,
            None => after.split_at(after.find(|c| !is_name_char(c)).unwrap_or(after.len())),
        };
        parts.push(LogPart::Variable(variable(name)?));
        rest = after;
    }
    if !rest.is_empty() {
        parts.push(LogPart::Literal(rest.to_owned()));
    }
    Ok(parts)
}

fn variable(name: &str) -> Result<LogVariable, Fault> {
    if let Some((_, variable)) = VARIABLES.iter().find(|(known, _)| *known == name) {
        return Ok(*variable);
    }
    if name.is_empty() {
        return Err(Fault::new(
            "$ without a variable's name",
            "write $name, with letters, digits and _",
        ));
    }
    let remedy = match nearest(name, VARIABLES.iter().map(|(name, _)| *name)) {
        Some(near) => format!("did you mean ${near}?"),
        None => {
            let known: Vec<String> = VARIABLES.iter().map(|(name, _)| format!("${name}")).collect();
            format!("known in a log format: {}", known.join(", "))
        }
    };
    Err(Fault::new(format!("unknown variable ${}", short(name)), remedy))
}

/// A format as a file would write it.
pub(super) fn write_format(parts: &[LogPart]) -> String {
    let mut text = String::new();
    for (at, part) in parts.iter().enumerate() {
        match part {
            LogPart::Literal(literal) => text.push_str(literal),
            LogPart::Variable(variable) => {
                let named = VARIABLES.iter().find(|(_, known)| known == variable);
                let name = named.map_or("", |(name, _)| name);
                let touches = matches!(parts.get(at + 1), Some(LogPart::Literal(next)) if next.starts_with(is_name_char));
                match touches {
                    true => text.push_str(&format!("${{{name}}}")),
                    false => text.push_str(&format!("${name}")),
                }
            }
        }
    }
    expand::escape(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ready_made_formats_are_right() {
        for (name, _, text) in READY_MADE {
            assert!(parse(text).is_ok_and(|parts| parts.len() > 10), "{name}");
        }
        let (.., json) = READY_MADE
            .iter()
            .find(|(name, ..)| *name == "json")
            .expect("json");
        // What is empty in most sessions is left to formats of one's own; sums stand under the names of their lists.
        let left_out = |name: &str, variable: LogVariable| {
            matches!(variable, LogVariable::Early(_))
                || ["hostname", "time_local"].contains(&name)
                || name.ends_with("_sum")
        };
        for (name, _) in VARIABLES
            .iter()
            .filter(|(name, variable)| !left_out(name, *variable))
        {
            assert!(json.contains(&format!("\"{name}\":")), "{name} is missing");
        }
    }

    #[test]
    fn a_format_is_written_as_it_was_read() {
        for text in ["$status", "a $status b", "$${status}x$${pid}1$pid"] {
            let bare = text.replace("$${", "${");
            let parts = parse(&bare).expect("right");
            assert_eq!(write_format(&parts), text);
        }
    }

    #[test]
    fn what_is_wrong_with_a_format_is_told() {
        let what = |text| parse(text).expect_err("wrong");
        assert_eq!(what("$").what, "$ without a variable's name");
        assert_eq!(what("$stauts").remedy, "did you mean $status?");
        assert_eq!(what("${status").what, "${ without }");
        assert_eq!(what("a\nb").what, "a line break within a line");
    }
}
