//! What is read of a client before its peer is chosen: its PROXY header, its TLS hello. The receive queue is only looked at
//! (MSG_PEEK), and of it exactly the header is taken out: what follows, the hello too, stays in the queue, for the kernel to
//! forward. A session holds no buffer meanwhile, and each segment that arrives is one look of bounded length.

use std::os::fd::AsFd;

use culvert_shared::client::{Shown, is_unix};
use culvert_shared::config::{Config, allows};
use culvert_shared::counters::CloseReason;
use culvert_shared::ids::Direction;
use nix::errno::Errno;

use crate::client_hello;
use crate::clock;
use crate::drive::Next;
use crate::event_loop::Worker;
use crate::proxy_protocol::{self, Header, Read};
use crate::session::{Awaited, Phase, Session};
use crate::sockets;
use crate::table::{Side, Token};

/// Where the beginning of a stream is looked at; all sessions of the worker share it.
pub struct Glance(Vec<u8>);

impl Glance {
    /// Large enough for whatever is read ahead.
    pub fn new(config: &Config) -> Glance {
        let hellos = config.servers.iter().map(|server| &server.stream);
        let hellos = hellos.filter(|stream| stream.ssl_preread);
        let longest = hellos.map(|stream| stream.preread_buffer_size).max().unwrap_or(0);
        Glance(vec![0; longest.max(proxy_protocol::LONGEST)])
    }
}

/// What a look at the beginning of a stream came to.
enum Look {
    /// It is there and was dealt with.
    Done,
    /// More has to come.
    Incomplete,
    /// It will never be what it should.
    Bad(&'static str),
}

impl Worker {
    /// A session was accepted: what its client has to send first is read first.
    pub(crate) fn enter(&mut self, token: Token, session: &mut Session, header_first: bool) -> Next {
        if !header_first {
            return self.admit(token, session);
        }
        let patience = session.settings.proxy_protocol_timeout;
        session.phase = Phase::Reading {
            deadline_ms: session.started_ms + patience.as_millis() as u64,
            awaited: Awaited::Header,
        };
        self.read_ahead(token, session)
    }

    /// Looks at what has come so far.
    pub(crate) fn read_ahead(&mut self, token: Token, session: &mut Session) -> Next {
        let Phase::Reading { deadline_ms, awaited } = session.phase else {
            return self.go_on(token, session);
        };
        let limit = match awaited {
            Awaited::Header => proxy_protocol::LONGEST,
            Awaited::Hello => session.settings.preread_buffer_size,
        };
        let mut glance = std::mem::take(&mut self.glance.0);
        let limit = limit.min(glance.len());
        let seen = sockets::peek(session.downstream.as_fd(), &mut glance[..limit]);
        let look = match seen {
            Ok(0) => Err(CloseReason::DownstreamLeftReading),
            Ok(seen) => match awaited {
                Awaited::Header => self.look_for_header(session, &glance[..seen]),
                Awaited::Hello => Ok(look_for_hello(session, &glance[..seen], limit)),
            },
            Err(Errno::EAGAIN) => Ok(Look::Incomplete),
            Err(_) => Err(CloseReason::DownstreamLeftReading),
        };
        self.glance.0 = glance;
        match look {
            Ok(Look::Done) => match awaited {
                Awaited::Header => self.admit(token, session),
                Awaited::Hello => self.go_on(token, session),
            },
            // A stream that has ended brings no more.
            Ok(Look::Incomplete) if session.ready[Side::Downstream.index()].ended => {
                Next::Close(CloseReason::DownstreamLeftReading)
            }
            Ok(Look::Incomplete) => {
                self.note_young(token, session);
                Next::Wait(deadline_ms)
            }
            Ok(Look::Bad(why)) => {
                log::info!(
                    "session {}: closing client {} of {}: {why}",
                    session.number,
                    session.client(),
                    Shown(session.ends.local)
                );
                Next::Close(CloseReason::BadRequest)
            }
            Err(reason) => Next::Close(reason),
        }
    }

    /// It is known who the client is: whether it may come in is decided now, before anything is spent on it.
    fn admit(&mut self, token: Token, session: &mut Session) -> Next {
        if !allows(&session.settings.access, session.ends.remote) {
            return Next::Close(CloseReason::Denied);
        }
        if let Some(reason) = self.count_in_limits(session) {
            return Next::Close(reason);
        }
        if session.settings.ssl_preread && !session.is_status {
            let patience = session.settings.preread_timeout;
            session.phase = Phase::Reading {
                deadline_ms: clock::now_ms() + patience.as_millis() as u64,
                awaited: Awaited::Hello,
            };
            return self.read_ahead(token, session);
        }
        self.go_on(token, session)
    }

    /// All that had to be read is read.
    fn go_on(&mut self, token: Token, session: &mut Session) -> Next {
        session.phase = Phase::Streaming;
        session.last_active_ms = clock::now_ms();
        if session.is_status {
            // A document is not gone on with by another worker.
            self.stop_keeping(session);
            self.answer_status(token, session)
        } else {
            self.connect(token, session)
        }
    }

    fn look_for_header(&self, session: &mut Session, seen: &[u8]) -> Result<Look, CloseReason> {
        let header = match proxy_protocol::read(seen) {
            Read::Header(header) => header,
            Read::Incomplete => return Ok(Look::Incomplete),
            Read::Invalid(why) => return Ok(Look::Bad(why)),
        };
        // Its record says that the header is still to come.
        self.begin_copying(session);
        take_out(session, header.bytes)?;
        believe(session, &header);
        Ok(Look::Done)
    }

    /// Reads the TLS hello of a session that another worker has read it of: it is still in the receive queue.
    pub(crate) fn recall_hello(&mut self, session: &mut Session) {
        if !session.settings.ssl_preread {
            return;
        }
        let glance = &mut self.glance.0;
        let limit = session.settings.preread_buffer_size.min(glance.len());
        if let Ok(seen) = sockets::peek(session.downstream.as_fd(), &mut glance[..limit]) {
            look_for_hello(session, &glance[..seen], limit);
        }
    }
}

/// Whatever it is, nothing of it is taken out: the peer is to have it.
fn look_for_hello(session: &mut Session, seen: &[u8], limit: usize) -> Look {
    match client_hello::read(seen) {
        client_hello::Read::Hello(hello) => {
            session.ends.hello = Some(Box::new(hello));
            Look::Done
        }
        client_hello::Read::NotTls => Look::Done,
        client_hello::Read::Incomplete if seen.len() < limit => Look::Incomplete,
        client_hello::Read::Incomplete => Look::Bad("its TLS hello is longer than preread_buffer_size"),
    }
}

/// Takes the first bytes, which were seen to be there, out of the receive queue.
fn take_out(session: &mut Session, bytes: usize) -> Result<(), CloseReason> {
    let mut dropped = [0; proxy_protocol::LONGEST];
    sockets::discard(session.downstream.as_fd(), &mut dropped[..bytes])
        .map_err(|_| CloseReason::DownstreamLeftReading)?;
    // The books of the session: its TCP has received these as well.
    session.stream(Direction::ToUpstream).read_bytes += bytes as u64;
    Ok(())
}

/// Notes what a header says, and takes the client that it names for the client if it comes from somebody who may
/// say so (nginx: set_real_ip_from).
fn believe(session: &mut Session, header: &Header) {
    session.ends.header = header.addresses;
    let trusted = &session.settings.set_real_ip_from;
    let believed = |peer| trusted.iter().any(|network| network.holds(peer));
    if let Some(addresses) = header.addresses
        && believed(session.ends.peer)
        // Nobody is there; within the program that stands for a unix socket.
        && !is_unix(addresses.source)
    {
        session.ends.remote = addresses.source;
    }
}
