//! What the programs tell a worker: the reader of one of its slot's ring buffers.
//!
//! A ring buffer has one reader. A slot has [`LANES`] of them, so that a worker that is draining and the
//! one that follows it each have their own; a worker without one looks at its paused flows by the clock.

use std::cell::RefCell;
use std::os::fd::RawFd;
use std::rc::Rc;
use std::sync::atomic::Ordering::{AcqRel, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicU32, fence};

use anyhow::{Context, Result};
use culvert_shared::ids::{Direction, Owner};
use culvert_shared::sys::shm::Shareable;
use libbpf_rs::{MapHandle, RingBuffer, RingBufferBuilder};

use crate::skel::slot::types;

/// Ring buffers of a slot; as many as `c/maps.h` has, and `say` in `c/slot/tell.h` knows.
pub const LANES: usize = 4;

/// Who reads a ring buffer: its [`Owner`], 0 for nobody.
#[repr(C)]
pub struct Lane(AtomicU32);

// SAFETY: one atomic; zero is valid.
unsafe impl Shareable for Lane {}

impl Lane {
    pub(crate) fn take(&self, owner: Owner) -> bool {
        self.0.compare_exchange(0, owner.0, AcqRel, Relaxed).is_ok()
    }

    pub(crate) fn release(&self, owner: Owner) {
        let _ = self.0.compare_exchange(owner.0, 0, Release, Relaxed);
    }
}

/// What happened to a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// The index of its pair.
    pub pair: u32,
    /// Its direction.
    pub direction: Direction,
    /// What it was.
    pub kind: EventKind,
}

/// `enum event_kind`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// The source is held back.
    Paused,
    /// The source may be let go.
    Drained,
    /// The session must not survive.
    Trouble,
    /// The target's send buffer fills, and is smaller than what may be outstanding.
    Narrow,
    /// The slot holds few enough bytes again: sources that wait for it may be let go.
    Room,
    /// The slot has bytes outstanding, and nobody counts them anew: see [`crate::SlotMaps::recount`].
    Held,
    /// Events were lost: see [`crate::SlotMaps::lost_events`].
    Lost,
}

/// The reader of one ring buffer.
pub struct Events {
    ring: RingBuffer<'static>,
    taken: Rc<RefCell<Vec<Event>>>,
}

impl Events {
    pub(crate) fn open(map: &MapHandle) -> Result<Events> {
        let taken = Rc::new(RefCell::new(Vec::new()));
        let sink = Rc::clone(&taken);
        let mut builder = RingBufferBuilder::new();
        builder
            .add(map, move |bytes| {
                sink.borrow_mut().extend(decode(bytes));
                0
            })
            .context("failed to read the events ring buffer")?;
        let ring = builder.build().context("failed to open the events ring buffer")?;
        Ok(Events { ring, taken })
    }

    /// The descriptor that becomes readable when there are events.
    pub fn raw_fd(&self) -> RawFd {
        self.ring.epoll_fd()
    }

    /// Takes all events that there are. Of one that comes later the descriptor tells, to an edge-triggered reader too.
    ///
    /// bpf_ringbuf_commit wakes the reader only for an event that it finds to be the next one that the reader wants.
    /// libbpf stores how far it has read, and looks for more without a barrier in between (ringbuf_process_ring,
    /// libbpf 1.7): an event that is committed just then is neither seen nor told of, and none after it is. libbpf's
    /// own loop does not mind, because epoll asks a level-triggered descriptor again. So here: a barrier, and another
    /// look, until there is nothing.
    pub fn take(&mut self) -> Vec<Event> {
        // It can only fail through the callback, which does not.
        while self.ring.consume_raw() > 0 {
            fence(SeqCst);
        }
        std::mem::take(&mut self.taken.borrow_mut())
    }
}

fn decode(bytes: &[u8]) -> Option<Event> {
    let word = |at: usize| bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes);
    let index = word(0)?;
    let kind = match types::event_kind(word(4)?) {
        types::event_kind::EVENT_PAUSED => EventKind::Paused,
        types::event_kind::EVENT_DRAINED => EventKind::Drained,
        types::event_kind::EVENT_TROUBLE => EventKind::Trouble,
        types::event_kind::EVENT_ROOM => EventKind::Room,
        types::event_kind::EVENT_LOST => EventKind::Lost,
        types::event_kind::EVENT_HELD => EventKind::Held,
        types::event_kind::EVENT_NARROW => EventKind::Narrow,
        _ => return None,
    };
    let direction = if index & 1 == 0 {
        Direction::ToUpstream
    } else {
        Direction::ToDownstream
    };
    Some(Event {
        pair: index / 2,
        direction,
        kind,
    })
}

const _: () = assert!(size_of::<types::event>() == 8);

#[cfg(test)]
mod tests;
