//! Lets sessions outlive this process. One that has lived long enough is given to the master's keeping: its
//! descriptors are sent there, and its record in the store says all that another worker needs. At a reload
//! every session that can be moved is let go, for the next worker to adopt (`adopt`).

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering::Relaxed;

use culvert_shared::config::OnReload;
use culvert_shared::counters::{Board, Transit, WorkerRow};
use culvert_shared::ids::Direction;
use culvert_shared::message::{BATCH, SessionId, ToMaster};
use culvert_shared::queue::Claim;
use culvert_shared::sessions::{Carrier, Kept, Saved, SavedHello, SavedSettings, SavedStream, Stage};
use culvert_shared::sys::{fdpass, socket};
use nix::errno::Errno;

use crate::clock;
use crate::drive::Next;
use crate::event_loop::{KEEP_TIMER, SERVICE_TIMER, Worker};
use crate::session::{Awaited, Datapath, Phase, Session, Stream};
use crate::store::Seat;
use crate::table::{Side, Token};
use crate::tally;

/// How long a session lives before it is given to the master: most are over by then, and pay nothing.
const KEEP_AFTER_MS: u64 = 1_000;
/// Sessions are given to the master in batches, at multiples of this.
const BATCH_EVERY_MS: u64 = 250;
/// When the master is told again what it had no room to hear.
const RETRY_MS: u64 = 10;
/// How long a worker that has handed its sessions over goes on answering status and HTTP requests that it has.
const SERVICE_PATIENCE_MS: u64 = 500;

/// What the worker has to tell the master of its sessions.
#[derive(Default)]
pub struct Keeping {
    /// Sessions that are not yet kept, oldest first, and when they are due.
    young: VecDeque<(Token, u64)>,
    /// The session is to leave this worker as soon as it can be moved.
    handing_over: bool,
    /// Taken out of the table, for another worker.
    leaving: Vec<(Token, Box<Session>)>,
    /// Ended, and not yet told.
    forgotten: Vec<SessionId>,
}

impl Keeping {
    /// Whether the master knows everything.
    pub fn is_told(&self) -> bool {
        self.leaving.is_empty() && self.forgotten.is_empty()
    }

    /// A session that the master keeps is over.
    pub fn forget(&mut self, id: SessionId) {
        self.forgotten.push(id);
    }
}

impl Worker {
    /// A session has begun, and has to be waited for.
    pub(crate) fn note_young(&mut self, token: Token, session: &mut Session) {
        if std::mem::replace(&mut session.is_young, true) {
            return;
        }
        let due_ms = (clock::now_ms() + KEEP_AFTER_MS).next_multiple_of(BATCH_EVERY_MS);
        if self.keeping.young.is_empty() {
            self.wheel.set(KEEP_TIMER, due_ms);
        }
        self.keeping.young.push_back((token, due_ms));
    }

    /// Gives the sessions that have lived long enough to the master.
    pub(crate) fn keep_due(&mut self) {
        let now_ms = clock::now_ms();
        let mut old: Vec<(Token, Box<Session>)> = Vec::new();
        let mut entered = 0;
        while old.len() + entered < BATCH
            && let Some(&(token, due_ms)) = self.keeping.young.front()
            && due_ms <= now_ms
        {
            self.keeping.young.pop_front();
            let Some(mut session) = self.table.take(token) else {
                continue;
            };
            session.is_young = false;
            if session.is_late() {
                entered += 1;
                self.table.put(token, session);
                self.with_session(token, |worker, session| {
                    worker.enter_kernel(token, session);
                    worker.stream(token, session)
                });
                match self.table.take(token) {
                    Some(again) => session = again,
                    None => continue,
                }
            }
            if can_be_moved(&session) && self.can_be_kept(&mut session) {
                old.push((token, session));
            } else {
                self.table.put(token, session);
            }
        }
        let sent = self.send_to_keep(&mut old);
        for (token, mut session) in old.drain(..).rev() {
            if sent.is_err() {
                self.give_room_back(&mut session);
                session.is_young = true;
                self.keeping.young.push_front((token, now_ms + BATCH_EVERY_MS));
            }
            self.table.put(token, session);
        }
        self.wake_to_keep(now_ms);
    }

    fn wake_to_keep(&mut self, now_ms: u64) {
        let due = self.keeping.young.front().map(|(_, due_ms)| *due_ms);
        let retry = Some(now_ms + RETRY_MS).filter(|_| !self.keeping.is_told());
        if let Some(wake_ms) = due.into_iter().chain(retry).min() {
            self.wheel.set(KEEP_TIMER, wake_ms.max(now_ms + 1));
        }
    }

    /// Makes a session ready to be kept: the master has room for it, and its record is filled. What the master keeps
    /// already stays so.
    fn can_be_kept(&mut self, session: &mut Session) -> bool {
        let can = self.reserve_room(session) && self.fill_record(session);
        if !can {
            self.give_room_back(session);
        }
        can
    }

    /// Before its sockets are sent, because what the master has no room for it cannot refuse any more: from then on this
    /// worker may let go of the session.
    fn reserve_room(&self, session: &mut Session) -> bool {
        let is_kept = session.seat.is_some_and(|seat| seat.kept);
        if !is_kept && !session.has_room {
            session.has_room = self.board[0].reserve_keeping(self.row);
        }
        is_kept || session.has_room
    }

    fn give_room_back(&self, session: &mut Session) {
        if std::mem::take(&mut session.has_room) {
            self.board[0].give_keeping_back(self.row);
        }
    }

    /// Writes a session down, in a place that it takes for that if it has none. False: there is none.
    pub(crate) fn fill_record(&mut self, session: &mut Session) -> bool {
        let seat = match session.seat {
            Some(seat) => seat,
            None => match self.wards[0].take_seat() {
                Some(seat) => seat,
                None => return false,
            },
        };
        session.seat = Some(seat);
        let (Some(record), Some(saved)) = (
            self.wards[seat.ward].store.record(seat.id.place),
            saved(session, seat, self.claim_of(session)),
        ) else {
            return false;
        };
        record.fill(&saved, session.holds_bytes());
        true
    }

    /// Sends the descriptors of sessions whose records are filled, and that have room, to the master; those again of which
    /// it has old ones. After an error the new ones are all not sent.
    fn send_to_keep(&self, sessions: &mut [(Token, Box<Session>)]) -> Result<(), Errno> {
        let (mut new, mut ids) = (Vec::new(), Vec::new());
        for (_, session) in sessions {
            match session.seat {
                Some(seat) if !seat.kept => {
                    new.push(session);
                    ids.push(seat.id);
                }
                Some(seat) if seat.stale => self.send_again(session)?,
                _ => {}
            }
        }
        if new.is_empty() {
            return Ok(());
        }
        let descriptors: Vec<BorrowedFd<'_>> = new.iter().flat_map(|session| both_sockets(session)).collect();
        // Before they are sent: from then on the master may have to judge by it.
        new.iter().for_each(|session| self.mark(session, Kept::Yes));
        let sent = fdpass::send(self.control.as_fd(), &ToMaster::Keep(ids).encode(), &descriptors);
        if sent.is_err() {
            new.iter().for_each(|session| self.mark(session, Kept::No));
        } else {
            for session in new {
                // The master takes the reservation off.
                session.has_room = false;
                if let Some(seat) = &mut session.seat {
                    seat.kept = true;
                }
            }
        }
        sent
    }

    /// A session that the master keeps has another upstream socket now: its first or next peer is being tried.
    pub(crate) fn keep_again(&mut self, token: Token, session: &mut Session) {
        if session.seat.is_none_or(|seat| !seat.kept) {
            return;
        }
        let filled = self.fill_record(session);
        if !filled || self.send_again(session).is_err() {
            self.note_stale(session);
            self.note_young(token, session);
        }
    }

    /// Sends the sockets of a session that the master keeps once more. It has room for them: the old ones go.
    fn send_again(&self, session: &mut Session) -> Result<(), Errno> {
        let Some(seat) = &mut session.seat else {
            return Ok(());
        };
        seat.stale = false;
        let message = ToMaster::KeepAgain(seat.id).encode();
        self.mark(session, Kept::Yes);
        let sent = fdpass::send(self.control.as_fd(), &message, &both_sockets(session));
        if sent.is_err() {
            self.note_stale(session);
        }
        sent
    }

    /// The master has the former socket: with that nobody could go on.
    fn note_stale(&self, session: &mut Session) {
        self.stop_keeping(session);
        if let Some(seat) = &mut session.seat {
            seat.stale = true;
        }
    }

    fn mark(&self, session: &Session, kept: Kept) {
        if let Some(seat) = session.seat
            && let Some(record) = self.wards[seat.ward].store.record(seat.id.place)
        {
            record.set_kept(kept);
        }
    }

    /// User space is about to read or write: if this process dies before the next [`Worker::save`], nobody
    /// can say what was delivered.
    pub(crate) fn begin_copying(&self, session: &Session) {
        if let Some(seat) = session.seat.filter(|seat| seat.kept)
            && let Some(record) = self.wards[seat.ward].store.record(seat.id.place)
        {
            record.begin();
        }
    }

    /// Writes down how far a session is that is to outlive this process.
    pub(crate) fn save(&self, session: &Session) {
        if let Some(seat) = session.seat.filter(|seat| seat.kept)
            && let Some(record) = self.wards[seat.ward].store.record(seat.id.place)
        {
            if session.phase == Phase::Streaming {
                let streams = [0, 1].map(|way| saved_stream(&session.streams[way]));
                record.save(session.last_active_ms, &streams, session.holds_bytes());
            } else if let Some(saved) = saved(session, seat, self.claim_of(session)) {
                record.fill(&saved, false);
            }
        }
    }

    /// The session is being ended: if this process dies before that is done, nobody is to take it over.
    pub(crate) fn stop_keeping(&self, session: &Session) {
        if let Some(seat) = session.seat.filter(|seat| seat.kept)
            && let Some(record) = self.wards[seat.ward].store.record(seat.id.place)
        {
            record.set_kept(Kept::Closing);
        }
    }

    /// Frees the place of a session whose sockets this process has closed. Those that the master has too are
    /// closed only when it closes them, so it frees the place as well.
    pub(crate) fn free_seat(&mut self, seat: Seat) {
        if seat.joined {
            WorkerRow::down(&self.gauges().pairs);
            WorkerRow::down(&self.gauges().offloaded);
        }
        let ward = &mut self.wards[seat.ward];
        ward.tokens[seat.id.place.0 as usize] = None;
        if seat.kept {
            ward.places.let_go(seat.id.place);
            self.keeping.forget(seat.id);
        } else {
            ward.give_back(seat.id.place);
        }
    }

    /// Takes no new sessions, and lets go of each of the old ones as soon as it can be moved.
    pub(crate) fn hand_over(&mut self) {
        self.keeping.handing_over = true;
        // The next workers begin them anew.
        self.drop_checks();
        self.drain();
        self.wheel
            .set(SERVICE_TIMER, clock::now_ms() + SERVICE_PATIENCE_MS);
        for token in self.table.tokens() {
            self.with_session(token, |worker, session| match session.phase {
                Phase::Reading { deadline_ms, .. }
                | Phase::Connecting { deadline_ms }
                | Phase::Waiting { deadline_ms, .. }
                | Phase::Naming { deadline_ms }
                | Phase::Http { deadline_ms } => Next::Wait(deadline_ms),
                Phase::Streaming => worker.wait(session),
            });
        }
    }

    /// Whether a session that has nothing to do now is to leave; its record is filled then.
    pub(crate) fn is_to_leave(&mut self, token: Token, session: &mut Session) -> bool {
        let leaves = self.keeping.handing_over
            && can_be_moved(session)
            && !session.holds_bytes()
            && !session.queued
            && !self.is_stranded(session)
            && self.reserve_room(session);
        if leaves && session.is_late() {
            // Its record does not say that it is to be looked at once more.
            self.enter_kernel(token, session);
        }
        leaves && self.can_be_kept(session)
    }

    /// Whether a session is better off here for now: it is to be kept, its listener is gone, and what was to become of
    /// it only this worker knows. Once its peer is known, any worker can go on with it.
    fn is_stranded(&self, session: &Session) -> bool {
        let phase = session.phase;
        matches!(
            phase,
            Phase::Reading { .. } | Phase::Waiting { .. } | Phase::Naming { .. }
        ) && session.settings.on_reload == OnReload::Keep
            && self.board[0].listeners[session.listener].gone.load(Relaxed) != 0
    }

    /// Takes a session out of the table for another worker.
    pub(crate) fn leave(&mut self, token: Token, mut session: Box<Session>) {
        if let Phase::Waiting { deadline_ms, .. } = session.phase {
            session.claim = self.claim_of(&session).map(|claim| (claim, deadline_ms));
            self.leave_queue(&session);
        }
        self.leave_naming(token, &session);
        self.keeping.leaving.push((token, session));
    }

    /// Tells the master what it does not know yet, as far as it has room to hear it.
    pub(crate) fn tell_master(&mut self) {
        if self.keeping.is_told() {
            return;
        }
        match self.tell_all() {
            Ok(()) => {}
            Err(Errno::EAGAIN | Errno::ETOOMANYREFS | Errno::ENOBUFS | Errno::ENOMEM | Errno::EINTR) => {
                self.wake_to_keep(clock::now_ms());
            }
            // It is gone, and nobody is left to take anything over.
            Err(_) => self.stay(),
        }
    }

    fn tell_all(&mut self) -> Result<(), Errno> {
        while !self.keeping.forgotten.is_empty() {
            let batch = self.keeping.forgotten.len().min(BATCH);
            let ids = self.keeping.forgotten[..batch].to_vec();
            fdpass::send(self.control.as_fd(), &ToMaster::Forget(ids).encode(), &[])?;
            self.keeping.forgotten.drain(..batch);
        }
        while !self.keeping.leaving.is_empty() {
            let from = self.keeping.leaving.len().saturating_sub(BATCH);
            let mut batch = self.keeping.leaving.split_off(from);
            let sent = self.let_go(&mut batch);
            if let Err(errno) = sent {
                self.keeping.leaving.append(&mut batch);
                return Err(errno);
            }
            for (token, session) in batch {
                self.release(token, *session);
            }
        }
        Ok(())
    }

    fn let_go(&self, sessions: &mut [(Token, Box<Session>)]) -> Result<(), Errno> {
        self.send_to_keep(sessions)?;
        let mark = |kept| sessions.iter().for_each(|(_, session)| self.mark(session, kept));
        mark(Kept::LetGo);
        let now_ms = clock::now_ms();
        let counts = || {
            sessions
                .iter()
                .flat_map(|(_, session)| transits(&self.board[0], session))
        };
        // Before the master hears of it: they may have arrived before this process goes on.
        counts().for_each(|transit| transit.begin(1, now_ms));
        let seats = sessions.iter().filter_map(|(_, session)| session.seat);
        let ids = seats.map(|seat| seat.id).collect();
        let sent = fdpass::send(self.control.as_fd(), &ToMaster::Over(ids).encode(), &[]);
        if sent.is_err() {
            mark(Kept::Yes);
            counts().for_each(Transit::end);
        }
        sent
    }

    /// Forgets a session that another worker has now. Its sockets stay open, the master has them; so this worker, which may
    /// have a reason to stay, would go on to be woken by them.
    fn release(&mut self, token: Token, session: Session) {
        let sockets = [Side::Downstream, Side::Upstream].map(|side| session.socket(side));
        sockets
            .into_iter()
            .flatten()
            .for_each(|socket| self.sockets.unwatch(socket));
        if !session.is_status {
            WorkerRow::down(&self.gauges().sessions);
            WorkerRow::down(&self.gauges().listener_active[session.listener]);
        }
        if let Some(row) = session.upstream.as_ref().and_then(|upstream| upstream.row) {
            WorkerRow::down(&self.gauges().peer_active[row]);
        }
        if let Some(seat) = session.seat {
            if seat.joined {
                WorkerRow::down(&self.gauges().pairs);
                WorkerRow::down(&self.gauges().offloaded);
            }
            let ward = &mut self.wards[seat.ward];
            ward.tokens[seat.id.place.0 as usize] = None;
            ward.places.let_go(seat.id.place);
        }
        drop(session);
        self.table.release(token);
    }

    /// Goes on with the sessions that were to leave.
    fn stay(&mut self) {
        self.keeping.handing_over = false;
        self.keeping.forgotten.clear();
        for (token, mut session) in std::mem::take(&mut self.keeping.leaving) {
            self.give_room_back(&mut session);
            for side in [Side::Downstream, Side::Upstream] {
                if let (Some(socket), Some(interest)) = (session.socket(side), session.watched[side.index()])
                {
                    // What was reported meanwhile is reported again.
                    let _ = self.sockets.change(socket, token, side, interest);
                }
            }
            self.table.put(token, session);
            self.with_session(token, |worker, session| match session.phase {
                Phase::Waiting { .. } => worker.wait_again(token, session),
                Phase::Naming { .. } => worker.name_again(token, session),
                // What the programs told of it meanwhile went to nobody.
                _ => worker.catch_up(token, session),
            });
        }
    }
}

/// Whether another worker could go on with a session, if no byte of it is in this one's hands.
fn can_be_moved(session: &Session) -> bool {
    match session.phase {
        // What is read is in the receive queue until it is there whole.
        Phase::Reading { .. } => true,
        Phase::Connecting { .. } | Phase::Streaming => session.upstream.is_some(),
        // Nothing was read of it.
        Phase::Waiting { .. } | Phase::Naming { .. } => true,
        Phase::Http { .. } => false,
    }
}

/// Where a session counts that is between two workers.
pub(crate) fn transits<'b>(board: &'b Board, session: &Session) -> impl Iterator<Item = &'b Transit> {
    let own = [&board.transit, &board.listeners[session.listener].transit];
    let own = Some(own).filter(|_| !session.is_status);
    let in_kernel = session.joined().map(|_| &board.offloaded_transit);
    let peer = session.upstream.as_ref().and_then(|upstream| upstream.row);
    let of_peer = peer.map(|row| &board.peers[row].transit);
    own.into_iter().flatten().chain(in_kernel).chain(of_peer)
}

/// The sockets of a session; one that has no upstream yet shows its client's twice.
fn both_sockets(session: &Session) -> [BorrowedFd<'_>; 2] {
    [Side::Downstream, Side::Upstream].map(|side| session.socket(side).unwrap_or(&session.downstream).as_fd())
}

fn saved(session: &Session, seat: Seat, claim: Option<Claim>) -> Option<Saved> {
    let upstream = session.upstream.as_ref();
    let [downstream_fd, upstream_fd] = both_sockets(session);
    let (stage, deadline_ms) = match session.phase {
        Phase::Reading { deadline_ms, awaited } => match awaited {
            Awaited::Header => (Stage::Header, deadline_ms),
            Awaited::Hello => (Stage::Hello, deadline_ms),
        },
        Phase::Connecting { deadline_ms } => (Stage::Connecting, deadline_ms),
        Phase::Streaming => (Stage::Streaming, 0),
        Phase::Waiting { deadline_ms, .. } => (Stage::Waiting, deadline_ms),
        Phase::Naming { deadline_ms } => (Stage::Naming, deadline_ms),
        Phase::Http { .. } => return None,
    };
    let settings = &session.settings;
    Some(Saved {
        number: session.number,
        started_ms: session.started_ms,
        last_active_ms: session.last_active_ms,
        stage,
        deadline_ms,
        cookies: [
            socket::cookie(downstream_fd).ok()?,
            socket::cookie(upstream_fd).ok()?,
        ],
        client: session.ends.remote,
        header: session
            .ends
            .header
            .map(|header| [header.source, header.destination]),
        hello: session.ends.hello.as_deref().map(|hello| SavedHello {
            server_name: hello.server_name.clone(),
            protocol: hello.protocol.to_owned(),
            alpn_protocols: hello.alpn_protocols.clone(),
        }),
        owes: session.owes,
        is_status: session.is_status,
        local: session.ends.local,
        listener: session.listener as u32,
        peer: upstream.and_then(|upstream| upstream.row).map(|row| row as u32),
        tcp: upstream.is_some_and(|upstream| upstream.tcp),
        joined: seat.joined,
        carrier: match session.datapath {
            Datapath::Sockmap => Carrier::Sockmap,
            Datapath::Fallback(reason) => Carrier::Fallback(reason),
            Datapath::Relay | Datapath::Late(_) | Datapath::Pending => Carrier::Relay,
        },
        upstream: upstream.map_or(String::new(), |upstream| upstream.address.to_string()),
        claim,
        connecting_since_ms: session.connecting_since_ms,
        tried: session
            .tried
            .iter()
            .flat_map(|(_, rows)| rows)
            .map(|row| *row as u16)
            .collect(),
        connect_began_ns: session.connect_began_ns,
        connect_us: session.connect_us.unwrap_or(0),
        streams: Direction::BOTH.map(|way| saved_stream(&session.streams[way.index()])),
        holds: tally::saved(&session.holds),
        settings: SavedSettings {
            proxy_timeout_ms: settings.proxy_timeout.as_millis() as u64,
            timer_period_ms: settings.ebpf_timer_period.as_millis() as u64,
            buffer_bytes: settings.proxy_buffer_size as u32,
            backlog_bytes: settings.ebpf_backlog_size,
            half_close: settings.proxy_half_close,
            close_on_reload: settings.on_reload == OnReload::Close,
        },
    })
}

fn saved_stream(stream: &Stream) -> SavedStream {
    SavedStream {
        way: stream.way as u8,
        source_ended: stream.source_ended,
        buffers: stream.buffers as u8,
        read_bytes: stream.read_bytes,
        written_bytes: stream.written_bytes,
        rate: stream.pace.as_ref().map_or(0, |pace| pace.rate()),
    }
}
