//! Back-pressure on offloaded sessions. The programs hold a source back when its target has too much
//! outstanding, and say when that has drained; this file lets it go again. No byte is touched here.

use std::os::fd::AsFd;

use anyhow::Result;
use culvert_bpf::{Event, EventKind, Events, LaneNumber, SlotMaps};
use culvert_shared::ids::{Direction, Owner};

use crate::clock;
use crate::drive::{Next, Trouble};
use crate::event_loop::{PRESSURE_TIMER, Worker};
use crate::session::{Session, source, target};
use crate::sockets;
use crate::store::Ward;
use crate::table::Token;

/// How often sources that are held back are looked at although nothing was reported: a target that only
/// retransmits reports nothing.
const LOOK_MS: u64 = 100;
/// The same for a worker that is told nothing at all, because every ring buffer of its slot has a reader.
const LOOK_UNTOLD_MS: u64 = 5;

/// The smallest receive buffer for a source that is held back from time to time. With a smaller one the last
/// ACK that is sent while it is let go (from its socket backlog, which tcp_space subtracts) closes the
/// window, and nobody opens it for 200 ms.
const RECEIVE_BYTES_MIN: usize = 2 << 20;

/// What the programs of one store tell its worker.
pub struct Reader {
    lane: LaneNumber,
    /// `None`: nothing is told, the clock is all there is.
    events: Option<Events>,
}

impl Reader {
    /// Takes a ring buffer of the store, if one is free.
    pub fn open(maps: Option<&SlotMaps>, owner: Owner) -> Result<Reader> {
        let (lane, events) = match maps {
            Some(maps) => maps.open_events(owner)?,
            None => Default::default(),
        };
        Ok(Reader { lane, events })
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

impl Worker {
    pub(crate) fn take_kernel_events(&mut self) {
        for ward in 0..self.wards.len() {
            let events = self.wards[ward].reader.events.as_mut();
            for event in events.map_or(Vec::new(), Events::take) {
                if let Some(token) = self.wards[ward]
                    .tokens
                    .get(event.pair as usize)
                    .copied()
                    .flatten()
                {
                    self.take_kernel_event(token, event);
                }
            }
        }
    }

    fn take_kernel_event(&mut self, token: Token, event: Event) {
        let direction = event.direction;
        self.with_session(token, |worker, session| match event.kind {
            EventKind::Paused => {
                worker.note_paused(token, direction);
                worker.size_buffers(session, direction);
                worker.wait(session)
            }
            EventKind::Drained => worker.resume(token, session, direction),
            EventKind::Trouble => {
                let flags = worker.flow(session, direction).flags;
                let what = format!("{}: the program met flags {flags:#x}", direction.name());
                Next::Close(worker.explain(session, Trouble::Integrity(what)))
            }
        });
    }

    /// A flow is held back, from now on or since before this worker had it.
    pub(crate) fn note_paused(&mut self, token: Token, direction: Direction) {
        if self.paused.is_empty() {
            self.wheel.set(PRESSURE_TIMER, clock::now_ms() + LOOK_MS);
        }
        if !self.paused.contains(&(token, direction)) {
            self.paused.push((token, direction));
        }
    }

    /// Sizes the buffers of a direction that is fast enough to be held back. The target's send buffer must
    /// take all that may be outstanding, and what the source gathered while it was held back: where it is
    /// full, sk_psock_backlog sleeps for a jiffy each time. So the source's receive buffer must not grow with
    /// a peer that is held back. The kernel doubles both
    /// values (socket(7)), and caps them at net.core.wmem_max and rmem_max; where a cap would make a buffer
    /// smaller than the kernel's own sizing does, it is left alone.
    fn size_buffers(&self, session: &mut Session, direction: Direction) {
        if std::mem::replace(&mut session.stream(direction).buffers_sized, true) {
            return;
        }
        let backlog = session.settings.ebpf_backlog_size as usize;
        let (send, receive) = (
            backlog.max(RECEIVE_BYTES_MIN),
            (backlog / 2).max(RECEIVE_BYTES_MIN),
        );
        if let Some(socket) = session
            .socket(target(direction))
            .filter(|_| send <= self.limits.send_bytes)
        {
            let _ = sockets::set_send_buffer(socket.as_fd(), send);
        }
        if let Some(socket) = session
            .socket(source(direction))
            .filter(|_| receive <= self.limits.receive_bytes)
        {
            let _ = sockets::set_receive_buffer(socket.as_fd(), receive);
        }
    }

    /// Lets a source go. One that has ended meanwhile is not taken by the kernel again: user space copies
    /// what it has left, after what the kernel has taken.
    fn resume(&mut self, token: Token, session: &mut Session, direction: Direction) -> Next {
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
        let mut flows = std::mem::take(&mut self.paused);
        for ward in self.wards.iter().filter(|ward| ward.reader.events.is_none()) {
            for token in ward.tokens.iter().flatten() {
                flows.extend(Direction::BOTH.map(|direction| (*token, direction)));
            }
        }
        for (token, direction) in flows {
            self.with_session(token, |worker, session| {
                if worker.is_due(session, direction) {
                    return worker.resume(token, session, direction);
                }
                if worker.flow(session, direction).paused {
                    worker.note_paused(token, direction);
                }
                worker.wait(session)
            });
        }
        self.arm_untold();
    }

    /// Starts the clock of a worker that is told nothing.
    pub(crate) fn arm_untold(&mut self) {
        let untold = |ward: &Ward| ward.reader.events.is_none() && ward.tokens.iter().any(Option::is_some);
        if self.wards.iter().any(untold) {
            self.wheel.set(PRESSURE_TIMER, clock::now_ms() + LOOK_UNTOLD_MS);
        }
    }

    fn is_due(&self, session: &Session, direction: Direction) -> bool {
        match (self.pair(session), session.socket(target(direction))) {
            (Some((maps, place)), Some(socket)) => maps.is_due(place, direction, socket.as_fd()),
            _ => false,
        }
    }
}
