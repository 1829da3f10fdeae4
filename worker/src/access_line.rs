//! One line of an access log: what is known of an ended session, put into the form that a format asks for.
//! Pure; time comes in.

use std::fmt::Arguments;
use std::io::Write;
use std::net::SocketAddr;

use culvert_shared::client;
use culvert_shared::config::{Address, Escape, LogFormat, LogPart, LogVariable};
use culvert_shared::counters::{CloseReason, FallbackReason};
use culvert_shared::ids::Direction;
use culvert_shared::sys::local_time::LocalTime;

use crate::route::Ends;
use crate::session::{Attempt, Datapath};

const MONTHS: [&str; 12] = [
    "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
];

/// Bytes of one direction.
#[derive(Clone, Copy, Debug, Default)]
pub struct Carried {
    /// Forwarded by the kernel.
    pub kernel: u64,
    /// Read by user space.
    pub read: u64,
    /// Written by user space.
    pub written: u64,
}

impl Carried {
    /// What its source sent.
    pub fn received(self) -> u64 {
        self.kernel + self.read
    }

    /// What its target was sent.
    pub fn sent(self) -> u64 {
        self.kernel + self.written
    }
}

/// What a line can say of the worker.
#[derive(Clone, Debug)]
pub struct Host {
    /// Its host.
    pub name: String,
    /// Its process id.
    pub pid: u32,
    /// Its slot.
    pub slot: usize,
}

/// When a line is written.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// Milliseconds since the Unix epoch.
    pub unix_ms: u64,
    /// The second of it, where we are.
    pub local: LocalTime,
}

/// What is known of an ended session.
pub struct Ended<'a> {
    /// Its number.
    pub number: u64,
    /// The client.
    pub remote: SocketAddr,
    /// What it connected to.
    pub local: SocketAddr,
    /// What its PROXY header and its TLS hello said.
    pub ends: &'a Ends,
    /// The listener as configured, unless it is gone since a reload.
    pub listener: Option<&'a Address>,
    /// Why it ended.
    pub reason: CloseReason,
    /// Bytes, by [`Direction`].
    pub carried: [Carried; 2],
    /// Times that a source was held back.
    pub pauses: u64,
    /// Who carried it.
    pub datapath: Datapath,
    /// A limit on its rate kept a direction out of the kernel.
    pub limited: bool,
    /// How long it lasted.
    pub lasted_ms: u64,
    /// Peers that did not take it.
    pub failed: &'a [Attempt],
    /// The peer that it had.
    pub upstream: Option<&'a Address>,
    /// How long connecting to that took, if it was connected.
    pub connect_us: Option<u64>,
    /// How long it had that peer.
    pub upstream_ms: Option<u64>,
}

/// nginx's status of a session, by why it ended; `$close_reason` says more.
pub fn status(reason: CloseReason) -> u16 {
    use CloseReason::*;
    match reason {
        Finished
        | DownstreamReset
        | UpstreamReset
        | DownstreamLeftConnecting
        | IdleTimeout
        | HalfClosed
        | Shutdown
        | WorkerDied
        | Removed
        | ReadTimeout
        | DownstreamLeftReading
        | Status => 200,
        BadRequest => 400,
        Denied => 403,
        LimitConn | LimitRate => 503,
        ConnectFailed | ConnectTimeout => 502,
        NoRoute | NameFailed | Resource | Integrity => 500,
    }
}

/// Appends the line, with its end.
pub fn write(out: &mut Vec<u8>, format: &LogFormat, ended: &Ended<'_>, moment: &Moment, host: &Host) {
    for part in &format.parts {
        match part {
            LogPart::Literal(text) => out.extend_from_slice(text.as_bytes()),
            LogPart::Variable(variable) => value(out, format.escape, *variable, ended, moment, host),
        }
    }
    out.push(b'\n');
}

fn value(
    out: &mut Vec<u8>,
    escape: Escape,
    variable: LogVariable,
    ended: &Ended<'_>,
    moment: &Moment,
    host: &Host,
) {
    use LogVariable as V;
    let [up, down] = [Direction::ToUpstream, Direction::ToDownstream].map(|way| ended.carried[way.index()]);
    // nginx has a value for each peer that was tried, and for the one that it has.
    let tried = |bytes: u64| {
        ended
            .failed
            .iter()
            .map(|_| 0)
            .chain(ended.upstream.map(|_| bytes))
    };
    let number = |out: &mut Vec<u8>, number: u64| {
        let _ = write!(out, "{number}");
    };
    // Numbers and our own words need no escaping.
    let plain = |out: &mut Vec<u8>, text: Arguments<'_>| {
        let _ = out.write_fmt(text);
    };
    match variable {
        V::RemoteAddr => text(out, escape, &client::host(ended.remote)),
        V::RemotePort => text(out, escape, &client::port(ended.remote)),
        V::ServerAddr => match ended.listener {
            Some(Address::Unix(_)) => text(
                out,
                escape,
                &ended.listener.map_or(String::new(), ToString::to_string),
            ),
            _ => text(out, escape, &client::host(ended.local)),
        },
        V::ServerPort => text(out, escape, &client::port(ended.local)),
        V::Listener => match ended.listener {
            Some(address) => text(out, escape, &address.to_string()),
            None => missing(out, escape),
        },
        V::TimeLocal => time_local(out, &moment.local),
        V::TimeIso8601 => time_iso8601(out, &moment.local),
        V::Msec => seconds(out, moment.unix_ms),
        V::Protocol => out.extend_from_slice(b"TCP"),
        V::Status => plain(out, format_args!("{}", status(ended.reason))),
        V::BytesSent => plain(out, format_args!("{}", down.sent())),
        V::BytesReceived => plain(out, format_args!("{}", up.received())),
        V::SessionTime => seconds(out, ended.lasted_ms),
        V::Connection => plain(out, format_args!("{}", ended.number)),
        V::Hostname => text(out, escape, &host.name),
        V::Pid => plain(out, format_args!("{}", host.pid)),
        V::Worker => plain(out, format_args!("{}", host.slot)),
        V::UpstreamAddr => {
            let failed = ended.failed.iter().map(|peer| peer.name.as_str());
            let last = ended.upstream.map(Address::to_string);
            let all = failed.chain(last.as_deref());
            list(out, escape, all, |out, name| text(out, escape, name));
        }
        V::UpstreamBytesSent => list(out, escape, tried(up.sent()), number),
        V::UpstreamBytesReceived => list(out, escape, tried(down.received()), number),
        V::UpstreamBytesSentSum => number(out, tried(up.sent()).sum()),
        V::UpstreamBytesReceivedSum => number(out, tried(down.received()).sum()),
        V::UpstreamConnectTime => {
            let failed = ended.failed.iter().map(|_| None);
            let last = ended.upstream.map(|_| ended.connect_us);
            list(out, escape, failed.chain(last), |out, took| match took {
                Some(us) => seconds(out, us / 1000),
                None => out.push(b'-'),
            });
        }
        V::UpstreamSessionTime => {
            let failed = ended.failed.iter().map(|peer| peer.ms);
            list(out, escape, failed.chain(ended.upstream_ms), seconds);
        }
        V::Datapath => {
            let both = ended.datapath == Datapath::Sockmap && ended.carried.iter().any(|way| way.written > 0);
            out.extend_from_slice(if both { "mixed" } else { ended.datapath.name() }.as_bytes());
        }
        V::FallbackReason => match ended.datapath {
            Datapath::Fallback(reason) => out.extend_from_slice(reason.name().as_bytes()),
            Datapath::Sockmap if ended.limited => {
                out.extend_from_slice(FallbackReason::RateLimited.name().as_bytes());
            }
            _ => missing(out, escape),
        },
        V::CloseReason => out.extend_from_slice(ended.reason.name().as_bytes()),
        V::Pauses => plain(out, format_args!("{}", ended.pauses)),
        V::SockmapToUpstream => plain(out, format_args!("{}", up.kernel)),
        V::SockmapToDownstream => plain(out, format_args!("{}", down.kernel)),
        V::RelayToUpstream => plain(out, format_args!("{}", up.written)),
        V::RelayToDownstream => plain(out, format_args!("{}", down.written)),
        V::Early(variable) => match ended.ends.value_of(variable).as_str() {
            "" => missing(out, escape),
            // The client's own words.
            said => text(out, escape, said),
        },
    }
}

fn missing(out: &mut Vec<u8>, escape: Escape) {
    if escape == Escape::Default {
        out.push(b'-');
    }
}

/// As nginx lists the peers that were tried: separated by a comma and a space.
fn list<T>(
    out: &mut Vec<u8>,
    escape: Escape,
    items: impl Iterator<Item = T>,
    write: impl Fn(&mut Vec<u8>, T),
) {
    let mut any = false;
    for item in items {
        if std::mem::replace(&mut any, true) {
            out.extend_from_slice(b", ");
        }
        write(out, item);
    }
    if !any {
        missing(out, escape);
    }
}

fn seconds(out: &mut Vec<u8>, ms: u64) {
    let _ = write!(out, "{}.{:03}", ms / 1000, ms % 1000);
}

fn zone(local: &LocalTime) -> (char, i32, i32) {
    let minutes = local.offset_minutes.abs();
    (
        if local.offset_minutes < 0 { '-' } else { '+' },
        minutes / 60,
        minutes % 60,
    )
}

fn time_local(out: &mut Vec<u8>, at: &LocalTime) {
    let month = MONTHS[usize::from(at.month.clamp(1, 12)) - 1];
    let (sign, hours, minutes) = zone(at);
    let _ = write!(
        out,
        "{:02}/{month}/{:04}:{:02}:{:02}:{:02} {sign}{hours:02}{minutes:02}",
        at.day, at.year, at.hour, at.minute, at.second
    );
}

fn time_iso8601(out: &mut Vec<u8>, at: &LocalTime) {
    let (sign, hours, minutes) = zone(at);
    let _ = write!(
        out,
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}{sign}{hours:02}:{minutes:02}",
        at.year, at.month, at.day, at.hour, at.minute, at.second
    );
}

/// Text from outside, such as the path of a unix socket.
fn text(out: &mut Vec<u8>, escape: Escape, text: &str) {
    for byte in text.bytes() {
        match (escape, byte) {
            // A line break would make two lines of one, whoever asked for it.
            (Escape::None, b'\n' | b'\r') => out.push(b' '),
            (Escape::None, _) => out.push(byte),
            (Escape::Default, b'"' | b'\\' | ..=0x1f | 0x7f..) => {
                let _ = write!(out, "\\x{byte:02X}");
            }
            (Escape::Json, b'"' | b'\\') => out.extend_from_slice(&[b'\\', byte]),
            (Escape::Json, ..=0x1f) => {
                let _ = write!(out, "\\u{byte:04X}");
            }
            _ => out.push(byte),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use culvert_shared::config::Variable;

    fn line(escape: Escape, variables: &[LogVariable], ended: &Ended<'_>) -> String {
        let format = LogFormat {
            name: "f".into(),
            escape,
            parts: variables
                .iter()
                .flat_map(|variable| [LogPart::Variable(*variable), LogPart::Literal("|".into())])
                .collect(),
        };
        let moment = Moment {
            unix_ms: 1_700_000_000_042,
            local: LocalTime {
                year: 2023,
                month: 11,
                day: 14,
                hour: 18,
                minute: 43,
                second: 20,
                offset_minutes: -210,
            },
        };
        let host = Host {
            name: "box\"1".into(),
            pid: 7,
            slot: 1,
        };
        let mut out = Vec::new();
        write(&mut out, &format, ended, &moment, &host);
        String::from_utf8(out).unwrap()
    }

    fn ended(failed: &[Attempt]) -> Ended<'_> {
        Ended {
            number: 9,
            remote: "[2001:db8::1]:5000".parse().unwrap(),
            local: "192.0.2.1:80".parse().unwrap(),
            ends: Box::leak(Box::new(Ends {
                hello: Some(Box::new(crate::client_hello::Hello {
                    server_name: "a\"b\n".into(),
                    ..Default::default()
                })),
                ..Ends::new(
                    "[2001:db8::1]:5000".parse().unwrap(),
                    "192.0.2.1:80".parse().unwrap(),
                )
            })),
            listener: None,
            reason: CloseReason::Finished,
            carried: [
                Carried {
                    kernel: 100,
                    read: 7,
                    written: 5,
                },
                Carried::default(),
            ],
            pauses: 3,
            datapath: Datapath::Sockmap,
            limited: false,
            lasted_ms: 61_001,
            failed,
            upstream: Some(Box::leak(Box::new(Address::Unix("/a\n\"b".into())))),
            connect_us: Some(12_999),
            upstream_ms: Some(60_000),
        }
    }

    #[test]
    fn times_are_those_of_nginx() {
        use LogVariable::*;
        let written = line(
            Escape::Default,
            &[TimeLocal, TimeIso8601, Msec, SessionTime],
            &ended(&[]),
        );
        assert_eq!(
            written,
            "14/Nov/2023:18:43:20 -0330|2023-11-14T18:43:20-03:30|1700000000.042|61.001|\n"
        );
    }

    #[test]
    fn what_a_client_said_first_is_made_harmless_and_what_it_did_not_say_is_missing() {
        use LogVariable::Early;
        let asked = [
            Early(Variable::SslPrereadServerName),
            Early(Variable::ProxyProtocolPort),
        ];
        assert_eq!(line(Escape::Default, &asked, &ended(&[])), "a\\x22b\\x0A|-|\n");
        assert_eq!(line(Escape::Json, &asked, &ended(&[])), "a\\\"b\\u000A||\n");
    }

    #[test]
    fn each_side_has_its_own_bytes() {
        use LogVariable::*;
        let asked = [
            BytesReceived,
            UpstreamBytesSent,
            SockmapToUpstream,
            RelayToUpstream,
            BytesSent,
            Datapath,
        ];
        assert_eq!(
            line(Escape::Default, &asked, &ended(&[])),
            "107|105|100|5|0|mixed|\n"
        );
    }

    #[test]
    fn every_peer_that_was_tried_is_listed() {
        use LogVariable::*;
        let failed = [Attempt {
            name: "10.0.0.1:1".to_owned(),
            ms: 1_500,
        }];
        let mut session = ended(&failed);
        let asked = [
            UpstreamAddr,
            UpstreamConnectTime,
            UpstreamSessionTime,
            UpstreamBytesSent,
            UpstreamBytesReceived,
            UpstreamBytesSentSum,
        ];
        assert_eq!(
            line(Escape::Default, &asked, &session),
            "10.0.0.1:1, unix:/a\\x0A\\x22b|-, 0.012|1.500, 60.000|0, 105|0, 0|105|\n"
        );
        (session.upstream, session.upstream_ms) = (None, None);
        assert_eq!(
            line(Escape::Default, &asked, &session),
            "10.0.0.1:1|-|1.500|0|0|0|\n"
        );
        session.failed = &[];
        assert_eq!(line(Escape::Default, &asked, &session), "-|-|-|-|-|0|\n");
        assert_eq!(line(Escape::Json, &asked, &session), "|||||0|\n");
    }

    #[test]
    fn no_value_breaks_a_line_or_its_quotes() {
        use LogVariable::*;
        let asked = [Hostname, UpstreamAddr];
        assert_eq!(
            line(Escape::Json, &asked, &ended(&[])),
            "box\\\"1|unix:/a\\u000A\\\"b|\n"
        );
        assert_eq!(line(Escape::None, &asked, &ended(&[])), "box\"1|unix:/a \"b|\n");
        let mut session = ended(&[]);
        session.datapath =
            crate::session::Datapath::Fallback(culvert_shared::counters::FallbackReason::NotTcp);
        assert_eq!(
            line(Escape::Json, &[Datapath, FallbackReason], &session),
            "relay|not_tcp|\n"
        );
    }
}
