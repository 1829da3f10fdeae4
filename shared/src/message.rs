//! What the master and a worker say to each other, over [`crate::sys::fdpass`]: a byte that names the message,
//! then the sessions, or the host names, that it is about.

use crate::config::Syslog;
use crate::hosts::{self, Answer, Question};
use crate::sessions::Place;
use crate::sys::fdpass::MAX_DESCRIPTORS;

/// The version of these messages, for two binaries to compare: workers of one may have a master of the other.
/// Change it whenever a message changes its bytes or meaning.
pub const LAYOUT: &str = "culvert messages, layout 5";

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

/// A buffer of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Buffer {
    /// SO_SNDBUF.
    Send,
    /// SO_RCVBUF.
    Receive,
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
    /// This came of the question.
    Answer(Question, Answer),
}

/// From a worker to the master.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToMaster {
    /// The worker accepts connections.
    Ready,
    /// Keep the sockets of these sessions, which come with the message, in case the worker dies. For each it has reserved
    /// room ([`crate::counters::Board::reserve_keeping`]).
    Keep(Vec<SessionId>),
    /// Here are other sockets of this session, which is kept.
    KeepAgain(SessionId),
    /// The worker has let go of these sessions: another one is to adopt them.
    Over(Vec<SessionId>),
    /// These sessions have ended: close their sockets, free their places.
    Forget(Vec<SessionId>),
    /// Ask for the addresses of these hosts, of which there are at most [`crate::hosts::BATCH`].
    Ask(Vec<Question>),
    /// Give the socket that comes with the message a send buffer of this many bytes, or a receive buffer, although it is
    /// larger than `net.core.wmem_max`, or `rmem_max`: that takes CAP_NET_ADMIN, which a worker does not have.
    Size(Buffer, u32),
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
            ToWorker::Answer(question, answer) => {
                let mut bytes = encode(b'N', &[]);
                question.encode(&mut bytes);
                answer.encode(&mut bytes);
                bytes
            }
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
        if let Some((b'N', rest)) = bytes.split_first() {
            let (question, rest) = Question::decode(rest)?;
            return Some(ToWorker::Answer(question, Answer::decode(rest)?));
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
            ToMaster::KeepAgain(session) => encode(b'G', &[*session]),
            ToMaster::Over(sessions) => encode(b'O', sessions),
            ToMaster::Forget(sessions) => encode(b'F', sessions),
            ToMaster::Ask(questions) => {
                let mut bytes = encode(b'Q', &[]);
                questions.iter().for_each(|question| question.encode(&mut bytes));
                bytes
            }
            ToMaster::Size(buffer, size) => {
                let name = match buffer {
                    Buffer::Send => SIZE_SEND,
                    Buffer::Receive => SIZE_RECEIVE,
                };
                let mut bytes = encode(name, &[]);
                bytes.extend(size.to_ne_bytes());
                bytes
            }
        }
    }

    /// The message that the bytes stand for; `None` for anything else.
    pub fn decode(bytes: &[u8]) -> Option<ToMaster> {
        if let Some((b'Q', mut rest)) = bytes.split_first() {
            let mut questions = Vec::new();
            while !rest.is_empty() {
                if questions.len() == hosts::BATCH {
                    return None;
                }
                let (question, behind) = Question::decode(rest)?;
                questions.push(question);
                rest = behind;
            }
            return Some(ToMaster::Ask(questions));
        }
        if let Some((name @ (&SIZE_SEND | &SIZE_RECEIVE), size)) = bytes.split_first() {
            let buffer = match *name {
                SIZE_SEND => Buffer::Send,
                _ => Buffer::Receive,
            };
            return Some(ToMaster::Size(buffer, u32::from_ne_bytes(size.try_into().ok()?)));
        }
        match decode(bytes)? {
            (b'R', none) if none.is_empty() => Some(ToMaster::Ready),
            (b'K', sessions) => Some(ToMaster::Keep(sessions)),
            (b'G', sessions) => match sessions[..] {
                [session] => Some(ToMaster::KeepAgain(session)),
                _ => None,
            },
            (b'O', sessions) => Some(ToMaster::Over(sessions)),
            (b'F', sessions) => Some(ToMaster::Forget(sessions)),
            _ => None,
        }
    }
}

const SIZE_SEND: u8 = b'W';
const SIZE_RECEIVE: u8 = b'B';

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
    use crate::config::is_host_name;
    use crate::sys::fdpass::MESSAGE_BYTES;
    use proptest::prelude::*;
    use std::net::IpAddr;

    /// The longest name that there is.
    fn question() -> Question {
        Question {
            resolver: u16::MAX,
            host: [&"a.".repeat(126)[..], "a"].concat(),
        }
    }

    fn addresses(count: usize) -> Answer {
        let v6 = |n: usize| IpAddr::from([n as u16, 0, 0, 0, 0, 0xffff, 0, n as u16]);
        let mut addresses: Vec<IpAddr> = (1..count).map(v6).collect();
        addresses.insert(0, IpAddr::from([192, 0, 2, 1]));
        let valid_ms = u64::MAX;
        Answer::Addresses { addresses, valid_ms }
    }

    fn nothing(why: &str) -> Answer {
        let why = why.to_owned();
        Answer::Nothing { why, valid_ms: 7 }
    }

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
            ToWorker::Answer(question(), addresses(hosts::ADDRESSES_MAX)),
            ToWorker::Answer(question(), nothing("why\u{e9}")),
        ] {
            assert_eq!(ToWorker::decode(&message.encode()), Some(message));
        }
        for message in [
            ToMaster::Ready,
            ToMaster::Keep(some()),
            ToMaster::KeepAgain(some()[1]),
            ToMaster::Over(some()),
            ToMaster::Forget(Vec::new()),
            ToMaster::Ask(vec![question(), question()]),
            ToMaster::Size(Buffer::Send, 4 << 20),
            ToMaster::Size(Buffer::Receive, 2 << 20),
        ] {
            assert_eq!(ToMaster::decode(&message.encode()), Some(message));
        }
    }

    #[test]
    fn the_longest_questions_and_answers_fit_a_message_and_what_is_more_is_cut() {
        let questions = vec![question(); hosts::BATCH];
        let asked = ToMaster::Ask(questions.clone()).encode();
        assert!(asked.len() <= MESSAGE_BYTES, "{}", asked.len());
        let read = |answer: Answer| {
            let bytes = ToWorker::Answer(question(), answer).encode();
            assert!(bytes.len() <= MESSAGE_BYTES, "{}", bytes.len());
            ToWorker::decode(&bytes)
        };
        let most = addresses(hosts::ADDRESSES_MAX);
        let expected = ToWorker::Answer(question(), most);
        assert_eq!(read(addresses(hosts::ADDRESSES_MAX + 1)), Some(expected));
        // A letter of two bytes does not end in its middle.
        let expected = ToWorker::Answer(question(), nothing(&format!("a{}", "\u{e9}".repeat(249))));
        assert_eq!(
            read(nothing(&format!("a{}", "\u{e9}".repeat(3000)))),
            Some(expected)
        );
    }

    #[test]
    fn a_name_that_no_host_has_is_no_question() {
        for host in [
            "",
            ".",
            "a..b",
            "a b",
            "a\n",
            "\u{e9}",
            "a.b.",
            &"a".repeat(64),
            &"a.".repeat(127),
        ] {
            let question = Question {
                resolver: 0,
                host: host.to_owned(),
            };
            assert_eq!(
                ToMaster::decode(&ToMaster::Ask(vec![question]).encode()),
                None,
                "{host:?}"
            );
        }
        let mut cut = ToMaster::Ask(vec![question()]).encode();
        cut.pop();
        assert_eq!(ToMaster::decode(&cut), None);
    }

    #[test]
    fn more_questions_than_one_message_has_are_no_message() {
        let short = Question {
            resolver: 0,
            host: "a".to_owned(),
        };
        let asked = |count| ToMaster::Ask(vec![short.clone(); count]);
        let most = asked(hosts::BATCH);
        assert_eq!(ToMaster::decode(&most.encode()), Some(most));
        assert_eq!(ToMaster::decode(&asked(hosts::BATCH + 1).encode()), None);
    }

    #[test]
    fn what_is_no_message_is_not_taken_for_one() {
        for bytes in [
            &b""[..],
            b"D ",
            b"?",
            b"A123",
            b"G",
            b"Lx",
            b"R000000000000",
            b"N",
            b"Q1",
            b"N00\x01a00000000",
            b"N00\x01a00000000\x04",
        ] {
            assert_eq!(ToWorker::decode(bytes), None);
            assert_eq!(ToMaster::decode(bytes), None);
        }
    }

    /// Of every message, and of an answer as far as its question goes.
    fn beginnings() -> Vec<Vec<u8>> {
        let mut answer = ToMaster::Ask(vec![question()]).encode();
        answer[0] = b'N';
        let letters = b"QNLADHSRKGOF".iter().map(|letter| vec![*letter]);
        letters.chain([answer.clone(), answer]).collect()
    }

    proptest! {
        #[test]
        fn no_bytes_make_a_reader_panic(
            first in prop::sample::select(beginnings()),
            rest in prop_oneof![prop::collection::vec(any::<u8>(), 0..12), prop::collection::vec(any::<u8>(), 0..200)],
        ) {
            let bytes = [first, rest].concat();
            let _ = (ToWorker::decode(&bytes), ToMaster::decode(&bytes));
        }

        /// A worker is not trusted with more than its own sessions.
        #[test]
        fn a_question_is_read_if_a_host_can_have_the_name_and_only_then(host in "[a-z0-9._-]{1,20}|[a-z\\PC.]{0,20}") {
            let asked = ToMaster::Ask(vec![Question { resolver: 1, host: host.clone() }]);
            prop_assert_eq!(ToMaster::decode(&asked.encode()), is_host_name(&host).then_some(asked));
        }
    }
}
