//! One question under way: which server is asked, over which socket, until when. Never waits: it is told when to look.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use culvert_shared::config::Resolver;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, connect, socket};

use super::message::{self, Answer, Question, Records};

/// How long the first server has for its answer; it doubles with each round of all servers.
const PATIENCE: Duration = Duration::from_secs(1);
/// As long as it gets, and as long as an answer over TCP may take.
const PATIENCE_MAX: Duration = Duration::from_secs(5);

/// Names that may lead to each other over several answers.
const ALIASES_MAX: usize = 8;

/// Datagrams that are no answer, after which the next server is asked: somebody guesses.
const STRAYS_MAX: usize = 64;

/// Datagrams that are read in one go, so that a flood leaves time for the rest of the program.
const TURN: usize = 16;

/// More than any server sends that was not told of a larger buffer (512 bytes, RFC 1035, section 4.2.1).
const DATAGRAM_MAX_BYTES: usize = 4096;

/// What came of a lookup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// There are these, for so many seconds; never empty.
    Found(Records, u32),
    /// There are none, for so many seconds, if it is said.
    Nothing(Option<u32>),
    /// Nobody could say; why.
    Failed(String),
}

/// A question under way.
pub struct Lookup {
    resolver: Resolver,
    asked: Question,
    aliases: usize,
    alias_ttl: u32,
    /// The server that is asked, and how many attempts there were before.
    server: usize,
    attempts: u32,
    /// Servers that are not asked again, because they said that they cannot answer.
    refused: Vec<bool>,
    strays: usize,
    id: u16,
    line: Option<Line>,
    attempt_until: Instant,
    until: Instant,
    trouble: String,
}

/// How a server is spoken to.
enum Line {
    Datagram(UdpSocket),
    Stream {
        stream: TcpStream,
        unsent: Vec<u8>,
        received: Vec<u8>,
    },
}

/// What was heard.
enum Heard {
    Nothing,
    Message(Answer),
    Trouble(io::Error),
}

impl Lookup {
    /// Begins by asking the server with this index.
    pub fn begin(question: Question, resolver: &Resolver, server: usize, now: Instant) -> Lookup {
        let mut lookup = Lookup {
            resolver: resolver.clone(),
            asked: question,
            aliases: 0,
            alias_ttl: u32::MAX,
            server: server % resolver.servers.len().max(1),
            attempts: 0,
            refused: vec![false; resolver.servers.len()],
            strays: 0,
            id: 0,
            line: None,
            attempt_until: now,
            until: now + resolver.timeout,
            trouble: String::new(),
        };
        lookup.ask(now);
        lookup
    }

    /// The index of the server that is asked.
    pub fn server(&self) -> usize {
        self.server
    }

    /// When to look even if nothing is heard.
    pub fn deadline(&self) -> Instant {
        self.attempt_until.min(self.until)
    }

    /// What to wait for.
    pub fn source(&self) -> Option<PollFd<'_>> {
        Some(match self.line.as_ref()? {
            Line::Datagram(socket) => PollFd::new(socket.as_fd(), PollFlags::POLLIN),
            Line::Stream { stream, unsent, .. } => {
                let wanted = match unsent.is_empty() {
                    true => PollFlags::POLLIN,
                    false => PollFlags::POLLOUT,
                };
                PollFd::new(stream.as_fd(), wanted)
            }
        })
    }

    /// Reads what has come, and asks the next server where it has taken too long. `None`: it is still under way.
    pub fn advance(&mut self, now: Instant) -> Option<Outcome> {
        for _ in 0..TURN {
            let outcome = match self.hear() {
                Heard::Nothing => break,
                Heard::Message(answer) => self.take(answer, now),
                Heard::Trouble(error) => {
                    self.refuse(error.to_string(), now);
                    None
                }
            };
            if outcome.is_some() {
                return outcome;
            }
        }
        if self.line.is_some() && now < self.deadline() {
            return None;
        }
        if self.refused.iter().all(|refused| *refused) || now >= self.until {
            let late = format!("no answer within {:?}", self.resolver.timeout);
            let trouble = std::mem::take(&mut self.trouble);
            return Some(Outcome::Failed(if trouble.is_empty() { late } else { trouble }));
        }
        // Where no socket was to be had, it is said already what is wrong.
        if self.line.is_some() {
            self.trouble = format!("no answer from {}", self.address());
        }
        self.next_server(now);
        None
    }

    fn address(&self) -> SocketAddr {
        // A resolver has a server at least: the configuration is checked for that.
        let nobody = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        self.resolver.servers.get(self.server).copied().unwrap_or(nobody)
    }

    fn take(&mut self, answer: Answer, now: Instant) -> Option<Outcome> {
        match answer {
            Answer::Stray => {
                self.strays += 1;
                if self.strays > STRAYS_MAX {
                    self.refuse("too many answers to other questions".to_owned(), now);
                }
            }
            Answer::Found(records, ttl) => return Some(Outcome::Found(records, ttl.min(self.alias_ttl))),
            Answer::Nothing(ttl) => return Some(Outcome::Nothing(ttl.map(|ttl| ttl.min(self.alias_ttl)))),
            Answer::Alias(name, ttl) if self.aliases < ALIASES_MAX => {
                self.aliases += 1;
                self.alias_ttl = self.alias_ttl.min(ttl);
                self.asked.name = name;
                self.ask(now);
            }
            Answer::Alias(..) => {
                return Some(Outcome::Failed(format!(
                    "more than {ALIASES_MAX} names that lead to each other"
                )));
            }
            Answer::Truncated if matches!(self.line, Some(Line::Datagram(_))) => self.ask_over_tcp(now),
            Answer::Truncated | Answer::Garbled => {
                self.refuse("an answer that makes no sense".to_owned(), now)
            }
            Answer::Refused(code) => self.refuse(code, now),
        }
        None
    }

    /// This server is not asked again.
    fn refuse(&mut self, why: String, now: Instant) {
        self.trouble = format!("{why} from {}", self.address());
        if let Some(refused) = self.refused.get_mut(self.server) {
            *refused = true;
        }
        self.next_server(now);
    }

    fn next_server(&mut self, now: Instant) {
        self.line = None;
        let count = self.refused.len();
        let others = (1..=count).map(|step| (self.server + step) % count);
        if let Some(next) = others.into_iter().find(|server| !self.refused[*server]) {
            self.server = next;
            self.attempts += 1;
            self.ask(now);
        }
    }

    fn ask(&mut self, now: Instant) {
        let round = self.attempts / self.refused.len().max(1) as u32;
        let patience = PATIENCE.saturating_mul(1 << round.min(8)).min(PATIENCE_MAX);
        self.attempt_until = now + patience;
        self.strays = 0;
        self.id = random();
        let sent = match message::query(&self.asked, self.id) {
            Some(bytes) => datagram(self.address(), &bytes),
            None => Err(io::Error::other("a name that cannot be asked for")),
        };
        self.open(sent, now);
    }

    fn ask_over_tcp(&mut self, now: Instant) {
        self.attempt_until = now + PATIENCE_MAX;
        self.id = random();
        let opened = match message::query(&self.asked, self.id) {
            Some(bytes) => stream(self.address(), &bytes),
            None => Err(io::Error::other("a name that cannot be asked for")),
        };
        self.open(opened, now);
    }

    fn open(&mut self, line: io::Result<Line>, now: Instant) {
        match line {
            Ok(line) => self.line = Some(line),
            // Looked at when it is due, not at once: a host without a network would be asked in a circle.
            Err(error) => {
                self.line = None;
                self.trouble = format!("{}: {error}", self.address());
                if let Some(refused) = self.refused.get_mut(self.server) {
                    *refused = true;
                }
                self.attempt_until = now;
            }
        }
    }

    fn hear(&mut self) -> Heard {
        match &mut self.line {
            None => Heard::Nothing,
            Some(Line::Datagram(socket)) => {
                let mut buffer = [0; DATAGRAM_MAX_BYTES];
                match socket.recv(&mut buffer) {
                    // It has more, which nobody asked for.
                    Ok(DATAGRAM_MAX_BYTES) => Heard::Message(Answer::Stray),
                    Ok(bytes) => Heard::Message(message::read(&buffer[..bytes], self.id, &self.asked)),
                    Err(error) if waits(&error) => Heard::Nothing,
                    Err(error) => Heard::Trouble(error),
                }
            }
            Some(Line::Stream {
                stream,
                unsent,
                received,
            }) => match exchange(stream, unsent, received) {
                Ok(None) => Heard::Nothing,
                Ok(Some(bytes)) => match message::read(bytes, self.id, &self.asked) {
                    Answer::Stray => Heard::Message(Answer::Garbled),
                    answer => Heard::Message(answer),
                },
                Err(error) => Heard::Trouble(error),
            },
        }
    }
}

/// A socket of its own for each question has a port of its own, and the kernel lets in only what comes from the
/// server: with the id, that is what somebody else would have to guess (RFC 5452).
fn datagram(server: SocketAddr, query: &[u8]) -> io::Result<Line> {
    let any: IpAddr = match server {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.set_nonblocking(true)?;
    socket.connect(server)?;
    socket.send(query)?;
    Ok(Line::Datagram(socket))
}

fn stream(server: SocketAddr, query: &[u8]) -> io::Result<Line> {
    let family = match server {
        SocketAddr::V4(_) => AddressFamily::Inet,
        SocketAddr::V6(_) => AddressFamily::Inet6,
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let opened: OwnedFd = socket(family, SockType::Stream, flags, None)?;
    match connect(opened.as_raw_fd(), &SockaddrStorage::from(server)) {
        Ok(()) | Err(Errno::EINPROGRESS) => {}
        Err(errno) => return Err(errno.into()),
    }
    let length = u16::try_from(query.len()).map_err(io::Error::other)?;
    Ok(Line::Stream {
        stream: TcpStream::from(opened),
        unsent: [&length.to_be_bytes(), query].concat(),
        received: Vec::new(),
    })
}

/// Sends what is unsent, reads what has come. The message, once it is whole (two bytes of length before it).
fn exchange<'a>(
    stream: &mut TcpStream,
    unsent: &mut Vec<u8>,
    received: &'a mut Vec<u8>,
) -> io::Result<Option<&'a [u8]>> {
    while !unsent.is_empty() {
        match stream.write(unsent) {
            Ok(sent) => drop(unsent.drain(..sent)),
            Err(error) if waits(&error) => return Ok(None),
            Err(error) => return Err(error),
        }
    }
    loop {
        let wanted = match received.get(..2) {
            Some(length) => 2 + usize::from(u16::from_be_bytes([length[0], length[1]])),
            None => 2,
        };
        if wanted > 2 && received.len() >= wanted {
            return Ok(Some(&received[2..wanted]));
        }
        if received.len() == 2 && wanted == 2 {
            return Err(io::Error::other("an empty answer"));
        }
        let mut buffer = [0; DATAGRAM_MAX_BYTES];
        let room = buffer.len().min(wanted - received.len());
        match stream.read(&mut buffer[..room]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(bytes) => received.extend_from_slice(&buffer[..bytes]),
            Err(error) if waits(&error) => return Ok(None),
            Err(error) => return Err(error),
        }
    }
}

fn waits(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

/// A number that nobody outside can guess: the hash of nothing under keys that the standard library takes from
/// the kernel's generator, others each time.
fn random() -> u16 {
    RandomState::new().build_hasher().finish() as u16
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::message::Kind;

    fn resolver(servers: &[&UdpSocket]) -> Resolver {
        Resolver {
            servers: servers
                .iter()
                .map(|server| server.local_addr().unwrap())
                .collect(),
            valid: None,
            hold: Duration::ZERO,
            ipv4: true,
            ipv6: false,
            timeout: Duration::from_secs(10),
        }
    }

    fn server() -> UdpSocket {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        socket
    }

    fn question() -> Question {
        Question {
            name: "a.test".into(),
            kind: Kind::A,
        }
    }

    /// Waits for a question, and answers with its flags and a record.
    fn answer(server: &UdpSocket, flags: u16, ip: Option<[u8; 4]>) -> SocketAddr {
        let mut buffer = [0; 512];
        let (length, from) = server.recv_from(&mut buffer).unwrap();
        let mut bytes = buffer[..length].to_vec();
        bytes[2..4].copy_from_slice(&flags.to_be_bytes());
        if let Some(ip) = ip {
            bytes[7] = 1;
            bytes.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
            bytes.extend(ip);
        }
        server.send_to(&bytes, from).unwrap();
        from
    }

    fn heard(lookup: &mut Lookup, now: Instant) -> Option<Outcome> {
        // What was sent over loopback is there at once; a busy host gets a moment.
        (0..200).find_map(|_| {
            std::thread::sleep(Duration::from_millis(1));
            lookup.advance(now)
        })
    }

    #[test]
    fn a_server_that_fails_is_followed_by_the_next_one_at_once() {
        let (bad, good) = (server(), server());
        let now = Instant::now();
        let mut lookup = Lookup::begin(question(), &resolver(&[&bad, &good]), 0, now);
        answer(&bad, 0x8182, None);
        assert_eq!(heard(&mut lookup, now), None);
        answer(&good, 0x8180, Some([10, 0, 0, 1]));
        let found = Records::Addresses(vec!["10.0.0.1".parse().unwrap()]);
        assert_eq!(heard(&mut lookup, now), Some(Outcome::Found(found, 60)));
        assert_eq!(lookup.server(), 1);
    }

    #[test]
    fn when_all_have_failed_the_lookup_has_and_says_why() {
        let (bad, worse) = (server(), server());
        let now = Instant::now();
        let mut lookup = Lookup::begin(question(), &resolver(&[&bad, &worse]), 1, now);
        answer(&worse, 0x8182, None);
        assert_eq!(heard(&mut lookup, now), None);
        answer(&bad, 0x8185, None);
        let why = format!("REFUSED from {}", bad.local_addr().unwrap());
        assert_eq!(heard(&mut lookup, now), Some(Outcome::Failed(why)));
    }

    #[test]
    fn silent_servers_are_asked_in_turn_from_new_ports_with_new_ids_until_the_time_is_over() {
        let (one, two) = (server(), server());
        let mut now = Instant::now();
        let mut lookup = Lookup::begin(question(), &resolver(&[&one, &two]), 0, now);
        let mut seen = Vec::new();
        let outcome = loop {
            let mut buffer = [0; 512];
            let asked = if lookup.server() == 0 { &one } else { &two };
            let (_, from) = asked.recv_from(&mut buffer).unwrap();
            seen.push((lookup.server(), from.port(), [buffer[0], buffer[1]]));
            now = lookup.deadline();
            if let Some(outcome) = lookup.advance(now) {
                break outcome;
            }
        };
        assert!(
            matches!(&outcome, Outcome::Failed(why) if why.contains("no answer from")),
            "{outcome:?}"
        );
        // 1 + 1 + 2 + 2 + 4 seconds make ten.
        let order: Vec<usize> = seen.iter().map(|(server, ..)| *server).collect();
        assert_eq!(order, [0, 1, 0, 1, 0]);
        let ids: std::collections::HashSet<_> = seen.iter().map(|(.., id)| *id).collect();
        assert!(ids.len() >= 4, "{seen:?}");
    }

    #[test]
    fn answers_to_other_questions_are_passed_over_and_too_many_of_them_are_a_failure() {
        let server = server();
        let now = Instant::now();
        let mut lookup = Lookup::begin(question(), &resolver(&[&server]), 0, now);
        let mut buffer = [0; 512];
        let (length, from) = server.recv_from(&mut buffer).unwrap();
        let mut wrong = buffer[..length].to_vec();
        wrong[2] = 0x81;
        wrong[0] ^= 1;
        for _ in 0..STRAYS_MAX {
            server.send_to(&wrong, from).unwrap();
        }
        assert_eq!(heard(&mut lookup, now), None);
        server.send_to(&wrong, from).unwrap();
        let outcome = heard(&mut lookup, now);
        assert!(
            matches!(&outcome, Some(Outcome::Failed(why)) if why.contains("other questions")),
            "{outcome:?}"
        );
    }

    #[test]
    fn a_server_that_is_not_there_is_known_at_once() {
        let gone = server();
        let resolver = resolver(&[&gone]);
        drop(gone);
        let now = Instant::now();
        let mut lookup = Lookup::begin(question(), &resolver, 0, now);
        let outcome = heard(&mut lookup, now);
        assert!(
            matches!(&outcome, Some(Outcome::Failed(why)) if why.contains("refused")),
            "{outcome:?}"
        );
    }
}
