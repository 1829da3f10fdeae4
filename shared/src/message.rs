//! What the master and a worker say to each other, over [`crate::sys::fdpass`]: a byte that names the message,
//! then the sessions that it is about.

use crate::config::Syslog;
use crate::sessions::Place;
use crate::sys::fdpass::MAX_DESCRIPTORS;

/// The version of these messages, for two binaries to compare: workers of one may have a master of the other.
/// Change it whenever a message changes its bytes or meaning.
pub const LAYOUT: &str = "culvert messages, layout 2";

/// Sessions of one message at most: each may come with its two sockets.
pub const BATCH: usize = MAX_DESCRIPTORS / 2;

/// Names a session to both processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SessionId {
    /// The number of its store.
    pub store: u32,
    /// Its place there.
    pub place: Place,
    /// The generation of its record.
    pub generation: u32,
}

/// From the master to a worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToWorker {
    /// Take no new sessions, finish those that are open (at most `worker_shutdown_timeout`), exit.
    Drain,
    /// Take no new sessions, hand those that are open over, exit when none is left.
    HandOver,
    /// Reset what is open and exit now.
    Stop,
    /// Write the error log to the descriptor that comes with the message, and the access logs to those behind it. The
    /// error log is a socket to this syslog server, if one is named.
    Log(Option<Syslog>),
    /// Take these sessions over; both sockets of each come with the message.
    Adopt(Vec<SessionId>),
}

/// From a worker to the master.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToMaster {
    /// The worker accepts connections.
    Ready,
    /// Keep the sockets of these sessions, which come with the message, in case the worker dies.
    Keep(Vec<SessionId>),
    /// The worker has let go of these sessions: another one is to adopt them.
    Over(Vec<SessionId>),
    /// These sessions have ended: close their sockets, free their places.
    Forget(Vec<SessionId>),
}

impl ToWorker {
    /// The message's bytes.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            ToWorker::Drain => encode(b'D', &[]),
            ToWorker::HandOver => encode(b'H', &[]),
            ToWorker::Stop => encode(b'S', &[]),
            ToWorker::Log(syslog) => {
                let mut bytes = encode(b'L', &[]);
                bytes.extend(syslog.iter().flat_map(|syslog| syslog.text().into_bytes()));
                bytes
            }
            ToWorker::Adopt(sessions) => encode(b'A', sessions),
        }
    }

    /// The message that the bytes stand for; `None` for anything else.
    pub fn decode(bytes: &[u8]) -> Option<ToWorker> {
        if let Some((b'L', target)) = bytes.split_first() {
            return match str::from_utf8(target).ok()? {
                "" => Some(ToWorker::Log(None)),
                text => Syslog::from_text(text).map(|syslog| ToWorker::Log(Some(syslog))),
            };
        }
        match decode(bytes)? {
            (b'D', none) if none.is_empty() => Some(ToWorker::Drain),
            (b'H', none) if none.is_empty() => Some(ToWorker::HandOver),
            (b'S', none) if none.is_empty() => Some(ToWorker::Stop),
            (b'A', sessions) => Some(ToWorker::Adopt(sessions)),
            _ => None,
        }
    }
}

impl ToMaster {
    /// The message's bytes.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            ToMaster::Ready => encode(b'R', &[]),
            ToMaster::Keep(sessions) => encode(b'K', sessions),
            ToMaster::Over(sessions) => encode(b'O', sessions),
            ToMaster::Forget(sessions) => encode(b'F', sessions),
        }
    }

    /// The message that the bytes stand for; `None` for anything else.
    pub fn decode(bytes: &[u8]) -> Option<ToMaster> {
        match decode(bytes)? {
            (b'R', none) if none.is_empty() => Some(ToMaster::Ready),
            (b'K', sessions) => Some(ToMaster::Keep(sessions)),
            (b'O', sessions) => Some(ToMaster::Over(sessions)),
            (b'F', sessions) => Some(ToMaster::Forget(sessions)),
            _ => None,
        }
    }
}

const ID_BYTES: usize = 12;

fn encode(name: u8, sessions: &[SessionId]) -> Vec<u8> {
    let mut bytes = vec![name];
    for id in sessions {
        for number in [id.store, id.place.0, id.generation] {
            bytes.extend(number.to_ne_bytes());
        }
    }
    bytes
}

fn decode(bytes: &[u8]) -> Option<(u8, Vec<SessionId>)> {
    let (name, rest) = bytes.split_first()?;
    let (ids, odd) = rest.as_chunks::<ID_BYTES>();
    if !odd.is_empty() {
        return None;
    }
    let number =
        |id: &[u8; ID_BYTES], at: usize| u32::from_ne_bytes([id[at], id[at + 1], id[at + 2], id[at + 3]]);
    let sessions = ids.iter().map(|id| SessionId {
        store: number(id, 0),
        place: Place(number(id, 4)),
        generation: number(id, 8),
    });
    Some((*name, sessions.collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some() -> Vec<SessionId> {
        let id = |place| SessionId {
            store: 7,
            place: Place(place),
            generation: u32::MAX,
        };
        vec![id(0), id(1 << 24)]
    }

    #[test]
    fn every_message_is_read_as_it_was_written() {
        for message in [
            ToWorker::Drain,
            ToWorker::HandOver,
            ToWorker::Stop,
            ToWorker::Log(None),
            ToWorker::Log(Syslog::from_text("syslog:server=[::1]:514,tag=a,nohostname")),
            ToWorker::Adopt(some()),
        ] {
            assert_eq!(ToWorker::decode(&message.encode()), Some(message));
        }
        for message in [
            ToMaster::Ready,
            ToMaster::Keep(some()),
            ToMaster::Over(some()),
            ToMaster::Forget(Vec::new()),
        ] {
            assert_eq!(ToMaster::decode(&message.encode()), Some(message));
        }
    }

    #[test]
    fn what_is_no_message_is_not_taken_for_one() {
        for bytes in [&b""[..], b"D ", b"?", b"A123", b"Lx", b"R000000000000"] {
            assert_eq!(ToWorker::decode(bytes), None);
            assert_eq!(ToMaster::decode(bytes), None);
        }
    }
}
