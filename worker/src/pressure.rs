//! Back-pressure on offloaded sessions. The programs hold a source back when its target has too much
//! outstanding, and say when that has drained; this file lets it go again. No byte is touched here.

use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd};

use anyhow::Result;
use culvert_bpf::{Event, EventKind, Events, FlowState, Hold, LaneNumber, SlotMaps, flow_flag};
use culvert_shared::ids::{Direction, Owner};
use culvert_shared::message::{Buffer, ToMaster};
use culvert_shared::sys::fdpass;

use crate::clock;
use crate::drive::{Next, Trouble};
use crate::event_loop::{PRESSURE_TIMER, RECOUNT_TIMER, Worker};
use crate::session::{Buffers, Session, source, target};
use crate::sockets;
use crate::store::Ward;
use crate::table::{Side, Token};

/// How often sources that are held back are looked at although nothing was reported: a target that only
/// retransmits reports nothing.
const LOOK_MS: u64 = 100;
/// The same for a worker that is told nothing at all, because every ring buffer of its slot has a reader.
const LOOK_UNTOLD_MS: u64 = 5;

/// How often it is counted anew what is outstanding, where anything is.
const RECOUNT_MS: u64 = 3_000;
/// A flow in which nothing was forwarded for so long rests; and how often it is counted anew where the worker is full.
const RESTS_MS: u64 = 200;
/// Counting may take one part in so many of the worker's time.
const RECOUNT_SHARE: u64 = 50;

/// The smallest receive buffer for a source that is held back from time to time. A smaller one is flooded each time that the
/// source is let go (`is_flooded` in the program), so there is a pause for each few segments.
const RECEIVE_BYTES_MIN: usize = 2 << 20;

/// Segments that the smallest receive buffer of a source has to hold.
const NARROW_SEGMENTS: usize = 4;

/// What the programs of one store tell its worker.
pub struct Reader {
    lane: LaneNumber,
    /// `None`: nothing is told, the clock is all there is.
    events: Option<Events>,
    /// Events that were lost when this worker last looked at all flows.
    lost_events: u32,
}

impl Reader {
    /// Takes a ring buffer of the store, if one is free.
    pub fn open(maps: Option<&SlotMaps>, owner: Owner) -> Result<Reader> {
        let (lane, events) = match maps {
            Some(maps) => maps.open_events(owner)?,
            None => Default::default(),
        };
        Ok(Reader {
            lane,
            events,
            lost_events: maps.map_or(0, SlotMaps::lost_events),
        })
    }

    /// What becomes readable when there is something to tell.
    pub fn raw_fd(&self) -> Option<i32> {
        self.events.as_ref().map(Events::raw_fd)
    }

    /// Where the programs put what they tell this worker.
    pub fn lane(&self) -> LaneNumber {
        self.lane
    }
}

/// Flows that have to be looked at by the clock.
#[derive(Default)]
pub struct Pressure {
    /// Flows that are held back, or were when they were last looked at.
    paused: HashSet<(Token, Direction)>,
    /// Flows whose source may gather less than it should, because many were held back at once.
    narrow: HashSet<(Token, Direction)>,
    /// Before then nothing is counted anew.
    recount_ms: u64,
}

impl Worker {
    pub(crate) fn take_kernel_events(&mut self) {
        let (mut room, mut held) = (false, false);
        for ward in 0..self.wards.len() {
            let events = self.wards[ward].reader.events.as_mut();
            for event in events.map_or(Vec::new(), Events::take) {
                room |= event.kind == EventKind::Room;
                held |= event.kind == EventKind::Held;
                let tokens = &self.wards[ward].tokens;
                if let Some(token) = tokens.get(event.pair as usize).copied().flatten() {
                    self.take_kernel_event(token, event);
                }
            }
        }
        if held {
            self.recount_later();
        }
        if room {
            self.look_at_paused();
        }
    }

    fn take_kernel_event(&mut self, token: Token, event: Event) {
        let direction = event.direction;
        self.with_session(token, |worker, session| match event.kind {
            // Not without a look: it may have been let go since, by the clock, and be about to gather anew. Then the kernel
            // has it still, and there would be two movers.
            EventKind::Paused => {
                if !worker.flow(session, direction).gathers {
                    worker.note_paused(token, direction);
                    worker.size_buffers(token, session, direction);
                }
                worker.look_at_flow(token, session, direction)
            }
            EventKind::Drained if worker.has_room(session, direction) => {
                worker.resume(token, session, direction)
            }
            EventKind::Drained | EventKind::Room | EventKind::Held | EventKind::Lost => worker.wait(session),
            EventKind::Trouble => worker.look_at_flow(token, session, direction),
            EventKind::Narrow => {
                worker.size_send_buffer(session, direction);
                worker.wait(session)
            }
        });
    }

    /// Looks at all flows of a store of whose events some were lost. To be called when the ring buffers are empty.
    pub(crate) fn make_up_for_lost_events(&mut self) {
        for ward in 0..self.wards.len() {
            let Ward { store, reader, .. } = &mut self.wards[ward];
            let lost = store.maps.as_ref().map_or(0, |maps| maps.lost_events());
            if std::mem::replace(&mut reader.lost_events, lost) == lost {
                continue;
            }
            self.recount_later();
            let tokens: Vec<Token> = self.wards[ward].tokens.iter().flatten().copied().collect();
            for token in tokens {
                self.with_session(token, |worker, session| worker.catch_up(token, session));
            }
        }
    }

    /// Looks at all of a session of which some events were lost.
    pub(crate) fn catch_up(&mut self, token: Token, session: &mut Session) -> Next {
        for direction in Direction::BOTH {
            let flow = self.flow(session, direction);
            if flow.paused && !flow.gathers {
                self.size_buffers(token, session, direction);
            }
            if let Next::Close(reason) = self.look_at_flow(token, session, direction) {
                return Next::Close(reason);
            }
        }
        self.drive(token, session)
    }

    /// Looks at a flow of which it is not known what has happened.
    pub(crate) fn look_at_flow(&mut self, token: Token, session: &mut Session, direction: Direction) -> Next {
        let FlowState {
            flags,
            paused,
            gathers,
            ..
        } = self.flow(session, direction);
        if flags & flow_flag::FATAL != 0 {
            let what = format!("{}: {}", direction.name(), flow_flag::describe(flags));
            return Next::Close(self.explain(session, Trouble::Integrity(what)));
        }
        if paused && gathers {
            return self.gather(token, session, direction);
        }
        let is_deaf = match self.hold(session, direction) {
            Hold::Drained => return self.resume(token, session, direction),
            Hold::On(outstanding) => {
                self.note_paused(token, direction);
                session.stream(direction).held(clock::now_ms(), &outstanding);
                outstanding.is_deaf
            }
            Hold::Full { is_deaf } => {
                self.note_paused(token, direction);
                session.stream(direction).drain = None;
                let now_ms = clock::now_ms();
                self.wheel
                    .set_earlier(RECOUNT_TIMER, self.pressure.recount_ms.max(now_ms));
                is_deaf
            }
            Hold::Off => {
                session.stream(direction).drain = None;
                false
            }
        };
        match is_deaf {
            true => self.read_deaf(token, session, direction.opposite()),
            false => self.wait(session),
        }
    }

    /// A flow is held back, from now on or since before this worker had it.
    pub(crate) fn note_paused(&mut self, token: Token, direction: Direction) {
        self.pressure.paused.insert((token, direction));
        self.wheel.set_earlier(PRESSURE_TIMER, clock::now_ms() + LOOK_MS);
    }

    /// Sizes the buffers of a direction that is fast enough to be held back. The target's send buffer must
    /// take all that may be outstanding, and what the source gathered while it was held back: where it is
    /// full, sk_psock_backlog sleeps for a jiffy each time. So the source's receive buffer must not grow with
    /// a peer that is held back. The kernel doubles both values (socket(7)).
    ///
    /// What a source has gathered comes all at once when it is let go. So where too many are held back for
    /// each to gather that much within the worker's total, a source's buffer stays as it is, or shrinks to
    /// the source's share, until they are fewer again.
    ///
    /// A buffer shrinks only while its window is closed. What the peer was allowed to send has to fit: a segment
    /// that is dropped although it was allowed is lost for the peer, which sends it again after a timeout that
    /// doubles each time, up to two minutes, and no window that opens meanwhile makes it try earlier.
    ///
    /// A size that a listener was given (`rcvbuf`, `sndbuf`) takes the place of what is right otherwise: a send buffer
    /// of that size is left alone, what does not fit waits before it, and a receive buffer shrinks below that size at
    /// most. What the kernel has given it more for a while (`make_room`) it gives back when its window is closed, or when the source is
    /// not held back and nothing waits: in between, what is left of the window could be too little for a segment.
    pub(crate) fn size_buffers(&mut self, token: Token, session: &mut Session, direction: Direction) {
        let (given_to_source, _) = self.given_sizes(session, source(direction));
        let backlog = session.settings.ebpf_backlog_size as usize;
        let former = session.stream(direction).buffers;
        let mut heard = former != Buffers::Own || self.size_send_buffer(session, direction);
        let given_to_source = given_to_source.map(|bytes| bytes.min(self.limits.receive_bytes));
        let is_given = given_to_source.is_some();
        let wide = given_to_source.unwrap_or((backlog / 2).max(RECEIVE_BYTES_MIN));
        let sources = self.pressure.paused.len();
        let share = self.pair(session).and_then(|(maps, _)| maps.share_bytes(sources));
        // The kernel takes twice what it is told.
        let share = share.map_or(usize::MAX, |bytes| bytes as usize / 2);
        let held_back = self.flow(session, direction).paused;
        let Some(socket) = session.socket(source(direction)) else {
            return;
        };
        let present = sockets::receive_buffer(socket.as_fd()).map_or(0, |bytes| bytes / 2);
        let (buffers, bytes) = if share >= wide {
            (Buffers::Wide, wide)
        } else {
            // Whole segments, or the sender waits for its probe timer each time.
            let segment = sockets::segment_bytes(socket.as_fd()).unwrap_or(0);
            (Buffers::Narrow, share.max(NARROW_SEGMENTS * segment).min(wide))
        };
        let fixed = match buffers {
            // What was fixed once does not size itself again, but may have been given more for a while (`make_room`).
            Buffers::Wide => former != Buffers::Wide || (is_given && present > bytes),
            _ => present > 2 * bytes || present < bytes,
        };
        let is_promised = bytes < present
            && !sockets::is_window_closed(socket.as_fd())
            && !(is_given && !held_back && sockets::finds_room(socket.as_fd(), bytes));
        if fixed && !is_promised {
            heard &= self.size(socket.as_fd(), Buffer::Receive, bytes);
        }
        session.stream(direction).buffers = match fixed && is_promised && buffers == Buffers::Wide {
            // At the next pause, or by the clock.
            false if !heard && buffers == Buffers::Wide => former,
            false => buffers,
            // Looked at by the clock while it is held back, and at its next pause.
            true if held_back => Buffers::Narrow,
            true => Buffers::Own,
        };
        if session.stream(direction).buffers == Buffers::Narrow {
            self.pressure.narrow.insert((token, direction));
            self.wheel.set_earlier(PRESSURE_TIMER, clock::now_ms() + LOOK_MS);
        }
    }

    /// Gives the target of a direction a send buffer for all that may be outstanding, unless its listener has one of a given
    /// size. False: the master, who may have to, has no room to hear that now.
    fn size_send_buffer(&self, session: &Session, direction: Direction) -> bool {
        let (_, given) = self.given_sizes(session, target(direction));
        let bytes = culvert_bpf::largest_window(session.settings.ebpf_backlog_size);
        match (given, session.socket(target(direction))) {
            (None, Some(socket)) => self.size(socket.as_fd(), Buffer::Send, bytes as usize),
            _ => true,
        }
    }

    /// Sizes a buffer; the kernel doubles it. More than the host lets everybody have (208 KiB, unless somebody has raised it)
    /// only the master can give. False: it has no room to hear that now.
    pub(crate) fn size(&self, socket: BorrowedFd<'_>, buffer: Buffer, bytes: usize) -> bool {
        let sized = match buffer {
            Buffer::Send if bytes <= self.limits.send_bytes => sockets::set_send_buffer(socket, bytes),
            Buffer::Receive if bytes <= self.limits.receive_bytes => {
                sockets::set_receive_buffer(socket, bytes)
            }
            _ => {
                let message = ToMaster::Size(buffer, u32::try_from(bytes).unwrap_or(u32::MAX));
                fdpass::send(self.control.as_fd(), &message.encode(), &[socket])
            }
        };
        sized.is_ok()
    }

    /// The sizes that the buffers of a socket were given by its listener, in bytes: receive, send.
    pub(crate) fn given_sizes(&self, session: &Session, side: Side) -> (Option<usize>, Option<usize>) {
        let listener = self.rows.iter().zip(&self.addresses);
        let mut listener = listener.filter(|((row, _), _)| *row == session.listener);
        let Some(((_, server), address)) = listener.next().filter(|_| side == Side::Downstream) else {
            return (None, None);
        };
        let listen = &self.config.servers[*server].listen;
        let options = listen.iter().find(|listen| listen.address == *address);
        options.map_or((None, None), |listen| {
            let size = |bytes: Option<u32>| bytes.map(|bytes| bytes as usize);
            (size(listen.options.rcvbuf), size(listen.options.sndbuf))
        })
    }

    /// Lets a source go. One that has ended meanwhile is not taken by the kernel again: user space copies
    /// what it has left, after what the kernel has taken.
    fn resume(&mut self, token: Token, session: &mut Session, direction: Direction) -> Next {
        session.stream(direction).drain = None;
        let resumed = match (self.pair(session), session.socket(source(direction))) {
            (Some((maps, place)), Some(socket)) => maps.resume(place, direction, socket.as_fd()),
            _ => true,
        };
        if resumed {
            return self.wait(session);
        }
        session.stream(direction).settle();
        self.stream(token, session)
    }

    /// Looks at the flows that are held back, by the clock.
    pub(crate) fn look_at_paused(&mut self) {
        let mut flows = std::mem::take(&mut self.pressure.paused);
        for ward in self.wards.iter().filter(|ward| ward.reader.events.is_none()) {
            for token in ward.tokens.iter().flatten() {
                flows.extend(Direction::BOTH.map(|direction| (*token, direction)));
            }
        }
        for (token, direction) in flows {
            self.with_session(token, |worker, session| {
                let drain = session.stream(direction).drain;
                if drain.is_some_and(|drain| drain.look_ms() > clock::now_ms()) {
                    // Its own clock runs.
                    worker.note_paused(token, direction);
                    return worker.wait(session);
                }
                worker.look_at_flow(token, session, direction)
            });
        }
        // It puts those back for which there is no more room.
        for (token, direction) in std::mem::take(&mut self.pressure.narrow) {
            self.with_session(token, |worker, session| {
                worker.size_buffers(token, session, direction);
                worker.wait(session)
            });
        }
        self.arm_untold();
    }

    /// Sees to it that what is outstanding is counted anew now and then, as long as anything is.
    pub(crate) fn arm_recount(&mut self) {
        let is_held = |ward: &Ward| ward.store.maps.as_ref().is_some_and(|maps| maps.held_bytes() > 0);
        if self.wards.iter().any(is_held) {
            self.recount_later();
        }
    }

    /// Also where nothing is outstanding any more by now: until it is counted anew, the programs do not say that there is
    /// something again.
    pub(crate) fn recount_later(&mut self) {
        self.wheel
            .set_earlier(RECOUNT_TIMER, clock::now_ms() + RECOUNT_MS);
    }

    /// Counts anew what rests: who got a large answer and asks nothing more must not take from what the others may have
    /// outstanding.
    pub(crate) fn recount(&mut self) {
        let begun_ns = clock::now_ns();
        let since_ns = begun_ns.saturating_sub(RESTS_MS * 1_000_000);
        for maps in self.wards.iter().filter_map(|ward| ward.store.maps.as_ref()) {
            maps.tell_when_held();
        }
        for token in self.table.tokens() {
            let Some(session) = self.table.take(token) else {
                continue;
            };
            if let Some((maps, place)) = self.pair(&session) {
                for direction in Direction::BOTH {
                    if let Some(socket) = session.socket(target(direction)) {
                        maps.recount(place, direction, socket.as_fd(), since_ns);
                    }
                }
            }
            self.table.put(token, session);
        }
        let now_ns = clock::now_ns();
        let rest_ms = RECOUNT_SHARE * (now_ns - begun_ns) / 1_000_000;
        self.pressure.recount_ms = now_ns / 1_000_000 + rest_ms.max(RESTS_MS);
        if !self.pressure.paused.is_empty() {
            self.look_at_paused();
        }
        self.arm_recount();
    }

    /// Starts the clock of a worker that is told nothing.
    pub(crate) fn arm_untold(&mut self) {
        let untold = |ward: &Ward| ward.reader.events.is_none() && ward.tokens.iter().any(Option::is_some);
        if self.wards.iter().any(untold) {
            self.wheel
                .set_earlier(PRESSURE_TIMER, clock::now_ms() + LOOK_UNTOLD_MS);
        }
    }

    /// Whether the worker's total lets the direction go on.
    fn has_room(&self, session: &Session, direction: Direction) -> bool {
        self.pair(session)
            .is_none_or(|(maps, place)| maps.has_room(place, direction))
    }

    fn hold(&self, session: &Session, direction: Direction) -> Hold {
        match (self.pair(session), session.socket(target(direction))) {
            (Some((maps, place)), Some(socket)) => maps.hold(place, direction, socket.as_fd()),
            _ => Hold::Off,
        }
    }
}
