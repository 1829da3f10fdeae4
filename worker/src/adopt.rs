//! Takes sessions over that another worker has let go of, or left behind when it died: their sockets come from
//! the master, what is known of them from their records.

use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use culvert_shared::config::{Action, Address, OnReload, Stream as Settings, Target};
use culvert_shared::counters::{Board, CloseReason, Transit, WorkerRow};
use culvert_shared::ids::Direction;
use culvert_shared::message::SessionId;
use culvert_shared::sessions::{Carrier, Kept, Saved, SavedSettings, SavedStream, Stage};
use culvert_shared::sys::socket;

use crate::client_hello::{self, Hello};
use crate::clock;
use crate::drive::Next;
use crate::event_loop::Worker;
use crate::keep;
use crate::pace::Pace;
use crate::proxy_protocol::Addresses;
use crate::route::Ends;
use crate::session::{Awaited, Buffers, Datapath, Phase, Session, Stream, Upstream, Way, target};
use crate::sockets;
use crate::store::Seat;
use crate::table::Token;
use crate::tally;

impl Worker {
    /// Takes sessions over; `sockets` are their descriptors, downstream and upstream of each. Says how many.
    pub(crate) fn adopt(
        &mut self,
        sessions: Vec<SessionId>,
        mut sockets: impl Iterator<Item = OwnedFd>,
    ) -> u64 {
        let (mut adopted, mut missing) = (0, 0);
        for id in sessions {
            // Both are there, or this process may open no more descriptors: one that came alone is closed.
            let (Some(downstream), Some(upstream)) = (sockets.next(), sockets.next()) else {
                missing += 1;
                self.give_up(id);
                continue;
            };
            match self.adopt_one(id, downstream, upstream) {
                Ok(()) => adopted += 1,
                Err(why) => {
                    log::error!(
                        "a session that an earlier worker left (store {}, place {}) is reset: {why}",
                        id.store,
                        id.place.0
                    );
                    self.give_up(id);
                }
            }
        }
        if missing > 0 {
            log::error!(
                "{missing} sessions that an earlier worker left are reset: their sockets are missing, because the limit on \
                 open descriptors is too low"
            );
        }
        Board::add(&self.board[0].adopted, adopted);
        adopted
    }

    /// A session is not taken over: the master closes its sockets, which resets it, and frees its place.
    fn give_up(&mut self, id: SessionId) {
        self.board[0].count_close(None, CloseReason::WorkerDied);
        self.give_back_of(id);
        self.keeping.forget(id);
    }

    fn adopt_one(
        &mut self,
        id: SessionId,
        downstream: OwnedFd,
        upstream: OwnedFd,
    ) -> Result<(), &'static str> {
        let ward = self
            .wards
            .iter()
            .position(|ward| ward.store.id == id.store)
            .ok_or("its store is not this worker's")?;
        let store = std::sync::Arc::clone(&self.wards[ward].store);
        let record = store.record_of(id).ok_or("its record is another session's")?;
        let ends = [downstream.as_fd(), upstream.as_fd()];
        let reset = |why| {
            ends.iter().for_each(|end| drop(socket::reset(*end)));
            Err(why)
        };
        if !record.can_be_taken_over() {
            return reset("its worker died while it held bytes of it");
        }
        if !record.begin_adoption() {
            return reset("workers have died at taking it over");
        }
        let Some(mut saved) = record.read() else {
            return reset("its record makes no sense");
        };
        if ends.map(|end| socket::cookie(end).unwrap_or(0)) != saved.cookies {
            return reset("its sockets are not the ones that the record names");
        }
        let died = !record.was_let_go();
        // Before the record: until both are this worker's, the master takes the earlier worker's session for one that
        // lives on.
        self.tally.take_over(&saved.holds);
        record.pass_to(self.owner);
        record.set_kept(Kept::Yes);

        let server = self.server_of(saved.listener as usize);
        let settings = match server {
            Some(server) => Rc::clone(&self.settings[server]),
            None => Rc::new(settings_of(&saved.settings, &self.config.stream)),
        };
        if let (true, Some(maps)) = (saved.joined, &store.maps) {
            let terms = self.terms(ward, &settings);
            let carried = saved.streams.map(|stream| way_of(stream.way) == Way::Kernel);
            maps.adopt(id.place, ends, &terms, carried, died);
        }
        let seat = Seat {
            ward,
            id,
            joined: saved.joined,
            kept: true,
            stale: false,
        };
        let tried = std::mem::take(&mut saved.tried);
        let mut session = revive(saved, downstream, upstream, server, settings, seat);
        session.tried = self.tried_by(&session, &tried);
        if session.joined().is_some() {
            // Of what the worker before copied for a while only, it did not write down until when.
            let now_ms = clock::now_ms();
            session
                .streams
                .iter_mut()
                .for_each(|stream| stream.gathering.give_back_at(now_ms));
        }
        self.take_in(session, died);
        record.end_adoption();
        Ok(())
    }

    /// Takes a session that is not taken over off the counts.
    fn give_back_of(&mut self, id: SessionId) {
        let ward = self.wards.iter().find(|ward| ward.store.id == id.store);
        if let Some(record) = ward.and_then(|ward| ward.store.record_of(id)) {
            let holds = tally::revived(&record.holds());
            self.tally.release(&holds);
        }
    }

    /// Gives a session that was built from its record a slot, and goes on with it.
    fn take_in(&mut self, session: Session, died: bool) {
        self.refresh_groups();
        let gone = self.is_gone(&session);
        let token = self.table.reserve();
        self.count_in(token, &session, died);
        self.table.put(token, Box::new(session));
        self.with_session(token, |worker, session| {
            if gone {
                return Next::Close(CloseReason::Removed);
            }
            match session.phase {
                Phase::Reading { .. } => return worker.read_ahead(token, session),
                Phase::Connecting { deadline_ms } => {
                    // The choice of its next peer may depend on it.
                    worker.recall_hello(session);
                    return Next::Wait(deadline_ms);
                }
                Phase::Waiting { .. } => return worker.wait_again(token, session),
                Phase::Naming { .. } => return worker.name_again(token, session),
                Phase::Streaming | Phase::Http { .. } => {}
            }
            // What is there already is found by trying.
            session.try_both();
            for direction in Direction::BOTH {
                // What the programs said of it went to another worker.
                let next = worker.look_at_flow(token, session, direction);
                if matches!(next, Next::Close(_)) {
                    return next;
                }
                if session.stream(direction).buffers == Buffers::Narrow {
                    worker.size_buffers(token, session, direction);
                }
                // Whether the end was passed on before the worker died is not known; twice does no harm.
                if died
                    && session.streams[direction.index()].way == Way::Ended
                    && let Some(socket) = session.socket(target(direction))
                {
                    let _ = sockets::shut_down_write(socket.as_fd());
                }
            }
            worker.arm_untold();
            worker.stream(token, session)
        });
    }

    fn count_in(&mut self, token: Token, session: &Session, died: bool) {
        // Of what is not joined the programs say nothing.
        if let Some(seat) = session.seat.filter(|seat| seat.joined) {
            self.wards[seat.ward].tokens[seat.id.place.0 as usize] = Some(token);
            WorkerRow::up(&self.gauges().pairs);
            WorkerRow::up(&self.gauges().offloaded);
        }
        if !session.is_status {
            WorkerRow::up(&self.gauges().sessions);
            WorkerRow::up(&self.gauges().listener_active[session.listener]);
        }
        if let Some(row) = session.upstream.as_ref().and_then(|upstream| upstream.row) {
            WorkerRow::up(&self.gauges().peer_active[row]);
            if died {
                self.board[0].peers[row].transit.end();
            }
        }
        if !died {
            keep::transits(&self.board[0], session).for_each(Transit::end);
        }
    }

    /// The server that a listener belongs to now, if it is still there.
    fn server_of(&self, listener_row: usize) -> Option<usize> {
        self.rows
            .iter()
            .find(|(row, _)| *row == listener_row)
            .map(|(_, server)| *server)
    }

    /// Whether the listener or the peer of a session is gone and it is to be closed for that.
    fn is_gone(&self, session: &Session) -> bool {
        let phase = session.phase;
        if matches!(
            phase,
            Phase::Reading { .. } | Phase::Waiting { .. } | Phase::Naming { .. }
        ) {
            // Without a listener nobody knows where it would have to go.
            return match session.server.map(|server| &self.config.servers[server].action) {
                Some(Action::Proxy(_)) => session.is_status,
                Some(Action::Status) => !session.is_status,
                Some(Action::Http) | None => true,
            };
        }
        if session.settings.on_reload == OnReload::Keep {
            return false;
        }
        let Some(server) = session.server else {
            return true;
        };
        let peer = session.upstream.as_ref().and_then(|upstream| upstream.row);
        let leads_to = |group: usize| peer.is_some_and(|row| self.groups[group].knows(row));
        match &self.config.servers[server].action {
            Action::Proxy(Target::Upstream(group)) => !leads_to(*group),
            Action::Proxy(Target::Variable(_)) => peer.is_some() && !(0..self.groups.len()).any(leads_to),
            Action::Status | Action::Http => true,
        }
    }

    /// The group of a session that looks for a peer, and the rows of those that were tried, the one that is being tried
    /// last.
    fn tried_by(&self, session: &Session, tried: &[u16]) -> Option<(usize, Vec<usize>)> {
        let current = session.upstream.as_ref().and_then(|upstream| upstream.row);
        let group = match (session.phase, current, session.claim) {
            (Phase::Connecting { .. }, Some(row), _) => self.groups.iter().position(|group| group.knows(row)),
            (Phase::Waiting { .. }, _, Some((claim, _))) => {
                self.group_rows.iter().position(|row| *row == claim.group)
            }
            _ => None,
        }?;
        let rows = tried.iter().map(|row| usize::from(*row));
        let before = rows.filter(|row| Some(*row) != current && self.groups[group].knows(*row));
        Some((group, before.chain(current).collect()))
    }
}

fn revive(
    saved: Saved,
    downstream: OwnedFd,
    upstream: OwnedFd,
    server: Option<usize>,
    settings: Rc<Settings>,
    seat: Seat,
) -> Session {
    let mut ends = Ends::new(saved.client, saved.local);
    ends.header = saved
        .header
        .map(|[source, destination]| Addresses { source, destination });
    // Without a header who connected is the client.
    if ends.header.is_some() {
        ends.peer = sockets::peer_address(downstream.as_fd()).unwrap_or(saved.client);
    }
    ends.hello = saved.hello.map(|said| {
        Box::new(Hello {
            protocol: client_hello::version_of(&said.protocol),
            server_name: said.server_name,
            alpn_protocols: said.alpn_protocols,
        })
    });
    let listener = saved.listener as usize;
    let mut session = Session::new(
        saved.number,
        downstream,
        ends,
        listener,
        settings,
        saved.started_ms,
    );
    session.server = server;
    session.last_active_ms = saved.last_active_ms;
    session.is_status = saved.is_status;
    session.owes = saved.owes;
    let deadline_ms = saved.deadline_ms;
    session.phase = match saved.stage {
        Stage::Header => Phase::Reading {
            deadline_ms,
            awaited: Awaited::Header,
        },
        Stage::Hello => Phase::Reading {
            deadline_ms,
            awaited: Awaited::Hello,
        },
        Stage::Connecting => Phase::Connecting { deadline_ms },
        Stage::Waiting => Phase::Waiting {
            deadline_ms,
            ticket: saved.claim.map_or(0, |claim| claim.ticket),
        },
        Stage::Naming => Phase::Naming { deadline_ms },
        Stage::Streaming => Phase::Streaming,
    };
    session.claim = saved.claim.map(|claim| (claim, deadline_ms));
    session.connect_began_ns = saved.connect_began_ns;
    session.connecting_since_ms = saved.connecting_since_ms;
    session.connect_us = Some(saved.connect_us).filter(|_| saved.stage == Stage::Streaming);
    session.streams = saved.streams.map(revive_stream);
    session.holds = tally::revived(&saved.holds);
    session.datapath = match saved.carrier {
        _ if saved.stage != Stage::Streaming => Datapath::Pending,
        Carrier::Relay => Datapath::Relay,
        Carrier::Sockmap => Datapath::Sockmap,
        Carrier::Fallback(reason) => Datapath::Fallback(reason),
    };
    session.upstream = match saved.stage {
        // The second socket is the client's as well.
        Stage::Header | Stage::Hello | Stage::Waiting | Stage::Naming => None,
        Stage::Connecting | Stage::Streaming => Some(Upstream {
            socket: upstream,
            tcp: saved.tcp,
            address: Address::shown_as(&saved.upstream),
            row: saved.peer.map(|row| row as usize),
        }),
    };
    session.seat = Some(seat);
    session
}

fn revive_stream(saved: SavedStream) -> Stream {
    let mut stream = Stream::new();
    stream.way = way_of(saved.way);
    stream.source_ended = saved.source_ended;
    stream.buffers = buffers_of(saved.buffers);
    stream.read_bytes = saved.read_bytes;
    stream.written_bytes = saved.written_bytes;
    stream.pace = Pace::new(saved.rate, clock::now_ns());
    stream
}

/// What [`Way`] was written as.
fn way_of(number: u8) -> Way {
    [Way::Relay, Way::Kernel, Way::Settling, Way::Ended]
        .into_iter()
        .find(|way| *way as u8 == number)
        .unwrap_or(Way::Settling)
}

/// What [`Buffers`] was written as.
fn buffers_of(number: u8) -> Buffers {
    [Buffers::Own, Buffers::Wide, Buffers::Narrow]
        .into_iter()
        .find(|buffers| *buffers as u8 == number)
        .unwrap_or(Buffers::Narrow)
}

/// What goes on to apply to a session whose server is gone; the rest is as `[stream]` says now.
fn settings_of(saved: &SavedSettings, stream: &Settings) -> Settings {
    Settings {
        proxy_timeout: Duration::from_millis(saved.proxy_timeout_ms),
        ebpf_timer_period: Duration::from_millis(saved.timer_period_ms),
        proxy_buffer_size: saved.buffer_bytes as usize,
        ebpf_backlog_size: saved.backlog_bytes,
        proxy_half_close: saved.half_close,
        on_reload: match saved.close_on_reload {
            true => OnReload::Close,
            false => OnReload::Keep,
        },
        ..stream.clone()
    }
}
