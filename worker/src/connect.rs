//! From an accepted connection to a connected peer: route, balance, a non-blocking connect, and the next
//! peer of the group when one refuses.

use std::os::fd::AsFd;

use culvert_shared::config::{Action, Address, Target};
use culvert_shared::counters::{Board, CloseReason};
use culvert_shared::ids::Direction;
use culvert_shared::sys::socket;
use nix::errno::Errno;

use crate::balance::{Change, Pick, Scene};
use crate::clock;
use crate::dial::{Asker, start_connecting};
use crate::drive::Next;
use crate::event_loop::Worker;
use crate::proxy_protocol;
use crate::route::{Astray, Route};
use crate::session::{Attempt, Phase, Session, Upstream};
use crate::sockets;
use crate::table::{Side, Token};

impl Worker {
    /// Starts a session: finds where it goes and begins to connect.
    pub(crate) fn connect(&mut self, token: Token, session: &mut Session) -> Next {
        let config = std::sync::Arc::clone(&self.config);
        let action = session.server.map(|server| &config.servers[server].action);
        let Some(Action::Proxy(target)) = action else {
            return Next::Close(CloseReason::NoRoute);
        };
        session.owes = session.settings.proxy_protocol;
        if (matches!(target, Target::Variable(_)) || session.owes.is_some())
            && let Some(local) = sockets::local_address(session.downstream.as_fd())
        {
            session.ends.local = local;
        }
        self.limit_rates(session, clock::now_ns());
        match self.router.route(target, &session.ends) {
            Ok(Route::Host(host, port)) => {
                // It may have waited for a group in another worker, which had another configuration.
                session.tried = None;
                self.lead_to_host(token, session, (host, port), 0)
            }
            Ok(Route::Group(group)) => {
                // One that waited in another worker goes on with what was tried there.
                let tried = session.tried.take().filter(|(before, _)| *before == group);
                session.tried = Some(tried.unwrap_or((group, Vec::new())));
                if tried_none(session) {
                    session.connecting_since_ms = clock::now_ms();
                }
                if self.groups[group].key().is_some()
                    && let Some(local) = sockets::local_address(session.downstream.as_fd())
                {
                    session.ends.local = local;
                }
                self.connect_next(token, session)
            }
            Ok(Route::Address(address)) => {
                session.tried = None;
                match self.open(token, session, &address, None) {
                    Ok(next) => next,
                    Err(errno) if is_ours(errno) => self.out_of(session, errno),
                    Err(errno) => self.peer_failed(token, session, errno),
                }
            }
            Err(astray) => {
                log::error!("session {}: proxy_pass leads to {astray}", session.number);
                Next::Close(CloseReason::NoRoute)
            }
        }
    }

    /// Where the session leads, as the present configuration says.
    pub(crate) fn route_of(&self, session: &Session) -> Result<Route, Astray> {
        let server = session.server.and_then(|server| self.config.servers.get(server));
        match server.map(|server| &server.action) {
            Some(Action::Proxy(target)) => self.router.route(target, &session.ends),
            _ => Err(Astray::nowhere()),
        }
    }

    /// Connects to the next peer of the session's group, if there is one.
    pub(crate) fn connect_next(&mut self, token: Token, session: &mut Session) -> Next {
        loop {
            let Some((group, tried)) = &session.tried else {
                return Next::Close(CloseReason::ConnectFailed);
            };
            let group = *group;
            self.groups[group].refresh(&self.members[group]);
            let key = match self.groups[group].key() {
                Some(key) => self.router.expand(key, &session.ends),
                None => String::new(),
            };
            let random = self.next_random();
            let waiting = match session.phase {
                Phase::Waiting { deadline_ms, ticket } => Some((deadline_ms, ticket)),
                _ => None,
            };
            let ticket = waiting.map(|(_, ticket)| ticket);
            let peer = match self.groups[group].pick(&self.scene(), tried, &key, random, ticket) {
                Pick::Peer(peer) => peer,
                Pick::Full => match waiting {
                    Some((deadline_ms, _)) => return Next::Wait(deadline_ms),
                    // Once more: a place that was freed before it stood in the queue is not announced to it.
                    None if self.enqueue(token, session, group) => continue,
                    None => return self.no_peer(session, group),
                },
                Pick::Nobody => return self.no_peer(session, group),
            };
            if waiting.is_some() {
                self.leave_queue(session);
                if tried_none(session) {
                    session.connecting_since_ms = clock::now_ms();
                }
                // Until the attempt is under way.
                session.phase = Phase::Connecting { deadline_ms: 0 };
            }
            let peer = &self.groups[group].members()[peer];
            let (row, address) = (peer.row, peer.address.clone());
            if let Some((_, tried)) = &mut session.tried {
                tried.push(row);
            }
            match self.open(token, session, &address, Some(row)) {
                Ok(next) => return next,
                Err(errno) => {
                    self.free_place(row);
                    if let Some(next) = self.next_after(session, &address, Some(row), errno) {
                        return next;
                    }
                }
            }
        }
    }

    /// What becomes of the session after an attempt that failed at once; `None`: another peer is tried.
    pub(crate) fn next_after(
        &self,
        session: &mut Session,
        address: &Address,
        row: Option<usize>,
        errno: Errno,
    ) -> Option<Next> {
        // For this peer no address of this host's is fit, or no port of it is left: that says nothing of the peer, and
        // for another one there may be one.
        let has_no_way = errno == Errno::EADDRNOTAVAIL;
        if is_ours(errno) && !has_no_way {
            return Some(self.out_of(session, errno));
        }
        self.note_failure(session, &address.to_string(), row.filter(|_| !has_no_way), errno);
        match self.may_try_again(session) {
            true => None,
            false if has_no_way => Some(self.out_of(session, errno)),
            false => Some(Next::Close(CloseReason::ConnectFailed)),
        }
    }

    /// Whether the session goes on to another peer after a failed attempt: as `proxy_next_upstream`, its tries and
    /// its timeout say, and only if there are peers that it has not tried.
    pub(crate) fn may_try_again(&self, session: &Session) -> bool {
        let (attempts, is_one_left) = match (&session.tried, &session.host) {
            (Some((group, tried)), _) => (tried.len(), tried.len() < self.groups[*group].len()),
            (None, Some(host)) => (host.attempts, !host.left.is_empty()),
            (None, None) => return false,
        };
        let settings = &session.settings;
        let (tries, limit) = (
            settings.proxy_next_upstream_tries as usize,
            settings.proxy_next_upstream_timeout,
        );
        let spent_ms = clock::now_ms().saturating_sub(session.connecting_since_ms);
        settings.proxy_next_upstream
            && is_one_left
            && (tries == 0 || attempts < tries)
            && (limit.is_zero() || u128::from(spent_ms) < limit.as_millis())
    }

    /// No peer of the group is left to be tried.
    pub(crate) fn no_peer(&self, session: &mut Session, group: usize) -> Next {
        // As nginx says it: $upstream_addr "keeps the name of the server group".
        session.failed_peers.push(Attempt {
            name: self.config.upstreams[group].name.clone(),
            ms: 0,
        });
        Board::add(&self.board[0].groups[self.group_rows[group]].refused, 1);
        log::error!(
            "session {}: no peer of upstream {} is left for client {}",
            session.number,
            self.config.upstreams[group].name,
            session.client()
        );
        Next::Close(CloseReason::ConnectFailed)
    }

    /// Has the peers of every group that names stand for now.
    pub(crate) fn refresh_groups(&mut self) {
        for (group, set) in self.groups.iter_mut().zip(self.members.iter()) {
            group.refresh(set);
        }
    }

    /// What a choice of a peer needs to know.
    pub(crate) fn scene(&self) -> Scene<'_> {
        Scene {
            board: &self.board[0],
            worker: self.row,
            now_ms: clock::now_ms(),
        }
    }

    /// A number that follows from the ones before, and looks as if it did not (xorshift64).
    fn next_random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        // The low bits of a multiple are as good as its high bits.
        self.random.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn open(
        &mut self,
        token: Token,
        session: &mut Session,
        address: &Address,
        row: Option<usize>,
    ) -> Result<Next, Errno> {
        session.connect_began_ns = clock::now_ns();
        let asker = Asker {
            settings: &session.settings,
            client: session.ends.remote,
            congestion: self.congestion,
        };
        let (socket, under_way) = start_connecting(address, Some(asker))?;
        let tcp = matches!(address, Address::Tcp(_));
        let settings = std::rc::Rc::clone(&session.settings);
        if tcp {
            socket::reset_on_close(socket.as_fd(), true)?;
            sockets::urgent_inline(socket.as_fd())?;
            if settings.tcp_nodelay {
                sockets::no_delay(socket.as_fd())?;
            }
        }
        let deadline_ms =
            session.connect_began_ns / 1_000_000 + settings.proxy_connect_timeout.as_millis() as u64;
        session.watched[Side::Upstream.index()] = None;
        session.ready[Side::Upstream.index()] = Default::default();
        log::debug!(
            "session {}: client {} to upstream {address}",
            session.number,
            session.client()
        );
        session.upstream = Some(Upstream {
            socket,
            tcp,
            address: address.clone(),
            row,
        });
        session.phase = Phase::Connecting { deadline_ms };
        self.keep_again(token, session);
        Ok(if under_way {
            self.note_young(token, session);
            Next::Wait(deadline_ms)
        } else {
            self.connected(token, session)
        })
    }

    /// An attempt has ended, one way or the other.
    pub(crate) fn connect_ended(&mut self, token: Token, session: &mut Session, deadline_ms: u64) -> Next {
        let Some(upstream) = &session.upstream else {
            return Next::Close(CloseReason::ConnectFailed);
        };
        match sockets::pending_error(upstream.socket.as_fd()) {
            None if sockets::is_connected(upstream.socket.as_fd()) => self.connected(token, session),
            // What was reported was not that.
            None => {
                session.ready[Side::Upstream.index()] = Default::default();
                Next::Wait(deadline_ms)
            }
            Some(errno) => self.peer_failed(token, session, errno),
        }
    }

    /// The peer did not take the connection: the next one is tried.
    pub(crate) fn peer_failed(&mut self, token: Token, session: &mut Session, errno: Errno) -> Next {
        let (name, row) = match session.upstream.take() {
            Some(upstream) => {
                if let Some(row) = upstream.row {
                    self.free_place(row);
                }
                if session.seat.is_some_and(|seat| seat.kept) {
                    // The master has it too, and what it reports from now on is not the next one's.
                    if session.watched[Side::Upstream.index()].take().is_some() {
                        self.sockets.unwatch(&upstream.socket);
                    }
                    let _ = socket::reset(upstream.socket.as_fd());
                }
                (upstream.address.to_string(), upstream.row)
            }
            None => (String::from("the upstream"), None),
        };
        self.note_failure(session, &name, row, errno);
        if self.may_try_again(session) {
            return match session.host {
                Some(_) => self.connect_host(token, session),
                None => self.connect_next(token, session),
            };
        }
        match self.lead_again(token, session) {
            Some(next) => next,
            None if errno == Errno::ETIMEDOUT => Next::Close(CloseReason::ConnectTimeout),
            None => Next::Close(CloseReason::ConnectFailed),
        }
    }

    /// This host, not the peer, is why no connection was made.
    pub(crate) fn out_of(&self, session: &Session, errno: Errno) -> Next {
        log::warn!(
            "session {}: no connection could be opened: {}",
            session.number,
            errno.desc()
        );
        Next::Close(CloseReason::Resource)
    }

    /// An attempt has failed. `row`: the peer's, where it is to blame.
    fn note_failure(&self, session: &mut Session, name: &str, row: Option<usize>, errno: Errno) {
        session.failed_peers.push(Attempt {
            name: name.to_owned(),
            ms: clock::now_ns().saturating_sub(session.connect_began_ns) / 1_000_000,
        });
        if let Some(row) = row {
            let failures = &self.board[0].peers[row].connect_failures;
            let counter = match errno {
                Errno::ETIMEDOUT => &failures.timeouts,
                _ => &failures.errors,
            };
            Board::add(counter, 1);
        }
        let attempt = match (&session.tried, &session.host) {
            (Some((_, tried)), _) => tried.len(),
            (None, Some(host)) => host.attempts,
            (None, None) => 1,
        };
        log::warn!(
            "session {}: attempt {attempt}: failed to connect to {name} for client {}: {}",
            session.number,
            session.client(),
            errno.desc()
        );
        if row.is_some()
            && let Some((group, tried)) = &session.tried
            && let Some(peer) = tried.last().and_then(|row| self.groups[*group].index_of(*row))
            && self.groups[*group].failed(&self.scene(), peer) == Some(Change::TakenOut)
        {
            let peer = &self.groups[*group].members()[peer];
            log::warn!(
                "upstream {}: peer {name} is taken out for {:?}, max_fails = {} is reached",
                self.config.upstreams[*group].name,
                std::time::Duration::from_millis(peer.fail_timeout_ms),
                peer.max_fails
            );
        }
    }

    fn connected(&mut self, token: Token, session: &mut Session) -> Next {
        // Its record says that it is connecting until all of this is done.
        self.begin_copying(session);
        match self.send_header(session) {
            Ok(()) => {}
            Err(errno) if is_ours(errno) => return self.out_of(session, errno),
            Err(errno) => return self.peer_failed(token, session, errno),
        }
        if let Some(row) = session.upstream.as_ref().and_then(|upstream| upstream.row) {
            Board::add(&self.board[0].peers[row].connected, 1);
        }
        if let Some((group, tried)) = session.tried.take()
            && let Some(peer) = tried.last().and_then(|row| self.groups[group].index_of(*row))
        {
            let took_us = clock::now_ns().saturating_sub(session.connect_began_ns) / 1000;
            if self.groups[group].connected(&self.scene(), peer, took_us) == Some(Change::Revived) {
                log::info!(
                    "upstream {}: peer {} is alive again",
                    self.config.upstreams[group].name,
                    self.groups[group].members()[peer].address
                );
            }
        }
        session.host = None;
        session.phase = Phase::Streaming;
        let now_ns = clock::now_ns();
        session.connect_us = Some(now_ns.saturating_sub(session.connect_began_ns) / 1000);
        self.board[0]
            .connect_duration
            .count(session.connect_us.unwrap_or(0));
        session.last_active_ms = now_ns / 1_000_000;
        self.begin_streaming(token, session)
    }
}

/// Whether it has made no attempt yet.
fn tried_none(session: &Session) -> bool {
    session.tried.as_ref().is_none_or(|(_, tried)| tried.is_empty())
}

impl Worker {
    /// Sends the peer the PROXY header that says who the client is. It goes out before a byte of the client's,
    /// once for each attempt that connects.
    fn send_header(&self, session: &mut Session) -> Result<(), Errno> {
        let (Some(version), Some(upstream)) = (session.owes, &session.upstream) else {
            return Ok(());
        };
        let header = proxy_protocol::write(version, session.ends.remote, session.ends.local);
        match sockets::send(upstream.socket.as_fd(), &header) {
            Ok(sent) if sent == header.len() => {}
            // The send buffer of a new connection has room for it unless the host has no memory left.
            Ok(_) | Err(Errno::EAGAIN) => return Err(Errno::ENOBUFS),
            Err(errno) => return Err(errno),
        }
        session.stream(Direction::ToUpstream).written_bytes += header.len() as u64;
        self.board[0].add_relayed(Direction::ToUpstream, header.len() as u64);
        Ok(())
    }
}

/// Whether an error of a connection attempt says something of this host and nothing of the peer.
pub(crate) fn is_ours(errno: Errno) -> bool {
    use Errno::{EADDRNOTAVAIL, EMFILE, ENFILE, ENOBUFS, ENOMEM, ENOSPC};
    matches!(errno, EADDRNOTAVAIL | EMFILE | ENFILE | ENOBUFS | ENOMEM | ENOSPC)
}
