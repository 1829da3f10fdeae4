//! A session and the states of its two directions. Transitions only: no I/O, time passed in.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use culvert_bpf::Outstanding;
use culvert_shared::client::{Shown, is_unix};
use culvert_shared::config::{Address, ProxyProtocol, Stream as Settings};
use culvert_shared::counters::FallbackReason;
use culvert_shared::ids::Direction;
use culvert_shared::limits::Held;
use culvert_shared::queue::Claim;
use nix::errno::Errno;

use crate::busy::Seen;
use crate::drain::Drain;
use crate::gather::Gathering;
use crate::hosts::Host;
use crate::http::Connection;
use crate::pace::Pace;
use crate::route::Ends;
use crate::sockets::Interest;
use crate::store::Seat;
use crate::table::Side;

/// Where one direction stands. Its source is the socket that the bytes come from, its target the other.
///
/// ```text
///            the kernel takes it                    the source has ended or left bytes, or small pieces gather
///   Relay ───────────────────────────────► Kernel ──────────────────────────┐
///     │ ▲                                                                    ▼
///     │ └──── target has all, bytes are left to copy ─────────────────── Settling
///     │                                                                    ▲ │ target has all,
///     └──────────── the source has ended, all is copied ───────────────────┘ ▼ nothing is left
///                                                                          Ended
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Way {
    /// User space reads the source and writes the target.
    Relay,
    /// The kernel forwards; user space touches neither socket's data.
    Kernel,
    /// The kernel forwards no more; what it took is on its way into the target's TCP.
    Settling,
    /// The target has every byte and then the end of the stream.
    Ended,
}

/// How the buffers of a direction that the kernel has held back are sized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Buffers {
    /// As TCP sizes them: it was never held back.
    Own,
    /// The target's for all that may be outstanding, the source's so that it flows on at once when it is let go.
    Wide,
    /// The source's no larger than its share of the worker's total.
    Narrow,
}

/// One direction of a session.
pub struct Stream {
    /// Where it stands.
    pub way: Way,
    /// Whether the source's end of stream has been read.
    pub source_ended: bool,
    /// What this process itself has to say and has not written yet: of a status document. Proxied bytes never stand here.
    pub pending: VecDeque<u8>,
    /// Bytes that user space read from the source.
    pub read_bytes: u64,
    /// Bytes that user space wrote to the target.
    pub written_bytes: u64,
    /// What the target's TCP had taken when it was last asked while settling.
    pub settled_bytes: u64,
    /// How its sockets' buffers were sized for back-pressure.
    pub buffers: Buffers,
    /// Milliseconds until a settling direction is looked at again; doubles each time.
    pub patience_ms: u64,
    /// When it is looked at then; 0: as soon as may be.
    pub look_ms: u64,
    /// While its source is held back: when it is looked at, for the programs may not say that its target has drained.
    pub drain: Option<Drain>,
    /// Its limit in bytes per second; `None`: without. A limited direction is copied.
    pub pace: Option<Pace>,
    /// Whether it is copied for a while.
    pub gathering: Gathering,
}

impl Stream {
    /// A direction in which nothing has moved yet.
    pub fn new() -> Stream {
        Stream {
            way: Way::Relay,
            source_ended: false,
            pending: VecDeque::new(),
            read_bytes: 0,
            written_bytes: 0,
            settled_bytes: 0,
            buffers: Buffers::Own,
            patience_ms: 1,
            look_ms: 0,
            drain: None,
            pace: None,
            gathering: Gathering::default(),
        }
    }

    /// The kernel has taken the pair.
    pub fn offload(&mut self) {
        let free = self.pace.is_none();
        if free && self.way == Way::Relay && self.pending.is_empty() && !self.source_ended {
            self.way = Way::Kernel;
        }
        self.check_invariants();
    }

    /// Whether the kernel has it.
    pub fn is_kernels(&self) -> bool {
        self.way == Way::Kernel
    }

    /// When it is looked at whether the kernel is given it again, if it is copied for a while.
    pub fn due_back_ms(&self) -> Option<u64> {
        let free = self.pace.is_none() && self.pending.is_empty() && !self.source_ended;
        self.gathering
            .look_ms()
            .filter(|_| self.way == Way::Relay && free)
    }

    /// The source has nothing more for the kernel: it has ended, or what is left is user space's.
    pub fn settle(&mut self) {
        if matches!(self.way, Way::Kernel | Way::Relay) {
            self.way = Way::Settling;
            self.patience_ms = 1;
            self.look_ms = 0;
            self.drain = None;
        }
        self.check_invariants();
    }

    /// It was looked at in vain, and is looked at again a while later, up to `longest_ms`.
    pub fn look_later(&mut self, now_ms: u64, longest_ms: u64) {
        self.look_ms = now_ms + self.patience_ms;
        self.patience_ms = (2 * self.patience_ms).min(longest_ms);
    }

    /// Its source is held back, and was looked at: its clock runs from now on.
    pub fn held(&mut self, now_ms: u64, now: &Outstanding) {
        self.drain = Some(Drain::after(self.drain, now_ms, now));
    }

    /// The target's TCP has everything that it was sent. Says whether the end of the stream is due now.
    pub fn settled(&mut self) -> bool {
        if self.way != Way::Settling {
            return false;
        }
        let over = self.source_ended && self.pending.is_empty();
        self.way = if over { Way::Ended } else { Way::Relay };
        self.check_invariants();
        over
    }

    fn check_invariants(&self) {
        debug_assert!(
            self.way != Way::Kernel || self.pending.is_empty(),
            "bytes would overtake each other"
        );
        debug_assert!(
            self.way != Way::Kernel || !self.source_ended,
            "an ended source has no more bytes"
        );
        debug_assert!(
            self.way != Way::Ended || (self.source_ended && self.pending.is_empty()),
            "truncated"
        );
    }
}

/// What a socket has reported since it was last worked on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Readiness {
    /// There may be data, or the end of the stream.
    pub readable: bool,
    /// There may be space.
    pub writable: bool,
    /// There was none once: since then it is watched for that. Most sessions never fill a buffer.
    pub filled: bool,
    /// Urgent data has arrived: a read may end before it although more is there.
    pub urgent: bool,
    /// The end of the stream has arrived.
    pub ended: bool,
    /// There is an error.
    pub failed: bool,
}

/// Whether, and why not, the kernel carries a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Datapath {
    /// It is still to be handed over.
    Pending,
    /// User space copies until the session has moved so many bytes, and so is no short one.
    Late(u64),
    /// The kernel has both sockets.
    Sockmap,
    /// User space copies because the operator says so.
    Relay,
    /// User space copies although the kernel should.
    Fallback(FallbackReason),
}

impl Datapath {
    /// The name that log lines use.
    pub fn name(self) -> &'static str {
        match self {
            Datapath::Pending => "none",
            Datapath::Sockmap => "sockmap",
            Datapath::Late(_) | Datapath::Relay | Datapath::Fallback(_) => "relay",
        }
    }
}

/// A peer that did not take a session, or the group in which there was none for it.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// Its name.
    pub name: String,
    /// How long it was tried.
    pub ms: u64,
}

/// The upstream side of a session.
pub struct Upstream {
    /// The socket.
    pub socket: OwnedFd,
    /// Whether it is TCP; a unix socket is not.
    pub tcp: bool,
    /// What it is connected to.
    pub address: Address,
    /// The peer's row on the board, if the configuration names the peer.
    pub row: Option<usize>,
}

/// What is read of a client before its peer is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Awaited {
    /// Its PROXY header.
    Header,
    /// Its TLS hello.
    Hello,
}

/// How far a session is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The client has to send something first, until this time.
    Reading {
        /// When it is given up, on the worker's clock.
        deadline_ms: u64,
        /// What it has to send.
        awaited: Awaited,
    },
    /// A peer is being connected to, until this time.
    Connecting {
        /// When the attempt is given up, on the worker's clock.
        deadline_ms: u64,
    },
    /// All peers are full: it waits for a place, until this time.
    Waiting {
        /// When it gives up, on the worker's clock.
        deadline_ms: u64,
        /// Its place in the order of arrival.
        ticket: u64,
    },
    /// The host that it leads to is being looked up, until this time.
    Naming {
        /// When it gives up, on the worker's clock.
        deadline_ms: u64,
    },
    /// Bytes move.
    Streaming,
    /// It is no proxied session, but an HTTP connection.
    Http {
        /// When it is ended, or looked at again, on the worker's clock.
        deadline_ms: u64,
    },
}

/// One downstream connection and what became of it.
pub struct Session {
    /// Its number in this worker, for the log.
    pub number: u64,
    /// The client's socket.
    pub downstream: OwnedFd,
    /// The client's address and the one that it connected to.
    pub ends: Ends,
    /// The index of its listener.
    pub listener: usize,
    /// The index of its server in the configuration; `None`: the server is gone since a reload.
    pub server: Option<usize>,
    /// The settings in force.
    pub settings: Rc<Settings>,
    /// What each socket is watched for, by [`Side`]; `None`: it is not watched yet.
    pub watched: [Option<Interest>; 2],
    /// It is served a status document or HTTP, and is no proxied session.
    pub is_status: bool,
    /// The server's socket; `None` before there is one, and for a status document.
    pub upstream: Option<Upstream>,
    /// The PROXY header that its peer is to be sent before all else, as the settings said when connecting began.
    pub owes: Option<ProxyProtocol>,
    /// The group and the rows of its peers that were tried.
    pub tried: Option<(usize, Vec<usize>)>,
    /// The host that it leads to by its name, until it is connected.
    pub host: Option<Box<Host>>,
    /// Peers that did not take it, for the access log.
    pub failed_peers: Vec<Attempt>,
    /// When connecting to the present peer began, on CLOCK_MONOTONIC.
    pub connect_began_ns: u64,
    /// How long that took; `None` before it is done.
    pub connect_us: Option<u64>,
    /// When its first attempt began.
    pub connecting_since_ms: u64,
    /// Its place in a queue, and until when it waits there, while it goes from one worker to another.
    pub claim: Option<(Claim, u64)>,
    /// How far it is.
    pub phase: Phase,
    /// Its directions, by [`Direction`].
    pub streams: [Stream; 2],
    /// What its sockets reported, by [`Side`].
    pub ready: [Readiness; 2],
    /// Whether the kernel carries it.
    pub datapath: Datapath,
    /// What it counts in, for `limit_conn`.
    pub holds: Vec<Held>,
    /// Its place in a store.
    pub seat: Option<Seat>,
    /// The master has reserved room for its sockets, which were not sent yet.
    pub has_room: bool,
    /// It is among those that are given to the master once they have lived long enough.
    pub is_young: bool,
    /// When it was accepted.
    pub started_ms: u64,
    /// When user space last saw a byte move.
    pub last_active_ms: u64,
    /// What its readers had acknowledged when it last looked idle; `None` before that.
    pub acknowledged_bytes: Option<u64>,
    /// What has come and goes over HTTP, if that is what it is.
    pub http: Option<Box<Connection>>,
    /// What was last told of it to people.
    pub seen: Seen,
    /// It stands in the queue of sessions that have more to do.
    pub queued: bool,
}

impl Session {
    /// A session that was accepted just now.
    pub fn new(
        number: u64,
        downstream: OwnedFd,
        ends: Ends,
        listener: usize,
        settings: Rc<Settings>,
        now_ms: u64,
    ) -> Session {
        Session {
            number,
            downstream,
            ends,
            listener,
            server: None,
            settings,
            watched: [None; 2],
            is_status: false,
            upstream: None,
            owes: None,
            tried: None,
            host: None,
            failed_peers: Vec::new(),
            connect_began_ns: 0,
            connect_us: None,
            connecting_since_ms: now_ms,
            claim: None,
            phase: Phase::Streaming,
            streams: [Stream::new(), Stream::new()],
            ready: [Readiness::default(); 2],
            datapath: Datapath::Pending,
            holds: Vec::new(),
            seat: None,
            has_room: false,
            is_young: false,
            started_ms: now_ms,
            last_active_ms: now_ms,
            acknowledged_bytes: None,
            http: None,
            seen: Seen::default(),
            queued: false,
        }
    }

    /// One of its sockets, if there is one.
    pub fn socket(&self, side: Side) -> Option<&OwnedFd> {
        match side {
            Side::Downstream => Some(&self.downstream),
            Side::Upstream => self.upstream.as_ref().map(|upstream| &upstream.socket),
        }
    }

    /// One of its directions.
    pub fn stream(&mut self, direction: Direction) -> &mut Stream {
        &mut self.streams[direction.index()]
    }

    /// Its place, if its sockets are in the maps of the store.
    pub fn joined(&self) -> Option<Seat> {
        self.seat.filter(|seat| seat.joined)
    }

    /// Whether user space holds bytes that it has read and not yet written.
    pub fn holds_bytes(&self) -> bool {
        self.streams.iter().any(|stream| !stream.pending.is_empty())
    }

    /// What one of its sockets is to be watched for.
    pub fn interest(&self, side: Side) -> Interest {
        match self.phase {
            Phase::Reading { .. } => Interest::Read,
            Phase::Connecting { .. } if side == Side::Upstream => Interest::Connected,
            Phase::Connecting { .. } | Phase::Waiting { .. } | Phase::Naming { .. } => Interest::End,
            Phase::Http { .. } => Interest::Data,
            Phase::Streaming => {
                // What the kernel forwards must not wake the worker.
                let is_copied = |direction: Direction| self.streams[direction.index()].way == Way::Relay;
                let outward = match side {
                    Side::Downstream => Direction::ToUpstream,
                    Side::Upstream => Direction::ToDownstream,
                };
                let is_filled = self.ready[side.index()].filled;
                // No data comes after an end, so where user space has copied all of it the watch stays as it is.
                let is_over = self.streams[outward.index()].way == Way::Ended && self.joined().is_none();
                match (
                    is_copied(outward) || is_over,
                    is_filled && is_copied(outward.opposite()),
                ) {
                    (false, false) => Interest::End,
                    (true, false) => Interest::Read,
                    (false, true) => Interest::Write,
                    (true, true) => Interest::Data,
                }
            }
        }
    }

    /// Whether it is copied because it may be short.
    pub fn is_late(&self) -> bool {
        matches!(self.datapath, Datapath::Late(_))
    }

    /// Whether it is copied because it may be short, and has moved enough by now to be none.
    pub fn is_long(&self) -> bool {
        matches!(self.datapath, Datapath::Late(bytes) if self.copied_bytes() >= bytes)
    }

    fn copied_bytes(&self) -> u64 {
        self.streams.iter().map(|stream| stream.written_bytes).sum()
    }

    /// Whether no stream has ended, as far as is known. The kernel takes no other session.
    pub fn is_open(&self) -> bool {
        let is_open = |stream: &Stream| stream.way == Way::Relay && !stream.source_ended;
        self.streams.iter().all(is_open) && !self.ready.iter().any(|ready| ready.ended || ready.failed)
    }

    /// Its sockets are tried, whatever was reported.
    pub fn try_both(&mut self) {
        for ready in &mut self.ready {
            ready.readable = true;
            ready.writable = true;
        }
    }

    /// A socket has no space.
    pub fn fill(&mut self, side: Side) {
        let ready = &mut self.ready[side.index()];
        ready.writable = false;
        ready.filled = true;
    }

    /// Whether a read of one of its sockets that brings less than was asked for has brought all that was there. Then
    /// what comes next is reported. A read of a unix socket may also end where the writer changes.
    pub fn reads_all(&self, side: Side) -> bool {
        let ready = self.ready[side.index()];
        let tcp = match side {
            Side::Downstream => !self.is_unix(),
            Side::Upstream => self.upstream.as_ref().is_some_and(|upstream| upstream.tcp),
        };
        tcp && !ready.urgent && !ready.ended
    }

    /// Whether a limit on its rate keeps a direction out of the kernel.
    pub fn is_limited(&self) -> bool {
        self.streams.iter().any(|stream| stream.pace.is_some())
    }

    /// Whether both streams have ended.
    pub fn is_finished(&self) -> bool {
        self.streams.iter().all(|stream| stream.way == Way::Ended)
    }

    /// The client's address, for people.
    pub fn client(&self) -> Shown {
        Shown(self.ends.remote)
    }

    /// Whether the client came through a unix socket.
    pub fn is_unix(&self) -> bool {
        is_unix(self.ends.local)
    }
}

/// Where a direction's bytes come from.
pub fn source(direction: Direction) -> Side {
    match direction {
        Direction::ToUpstream => Side::Downstream,
        Direction::ToDownstream => Side::Upstream,
    }
}

/// Where they go.
pub fn target(direction: Direction) -> Side {
    source(direction.opposite())
}

/// A socket of a session failed; which one decides the close reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failed {
    /// The socket.
    pub side: Side,
    /// Its error.
    pub errno: Errno,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_direction_ends_only_after_its_target_has_all() {
        let mut stream = Stream::new();
        stream.offload();
        assert_eq!(stream.way, Way::Kernel);
        stream.source_ended = false;
        stream.settle();
        stream.source_ended = true;
        assert!(stream.settled());
        assert_eq!(stream.way, Way::Ended);
    }

    #[test]
    fn bytes_that_the_kernel_left_are_copied_after_those_that_it_took() {
        let mut stream = Stream::new();
        stream.offload();
        stream.settle();
        stream.pending.extend(b"left");
        assert!(!stream.settled());
        assert_eq!(stream.way, Way::Relay);
    }

    #[test]
    fn a_direction_with_bytes_in_hand_is_not_offloaded() {
        let mut stream = Stream::new();
        stream.pending.extend(b"x");
        stream.offload();
        assert_eq!(stream.way, Way::Relay);
    }

    #[test]
    fn the_clock_of_a_held_back_source_ends_with_that() {
        let mut stream = Stream::new();
        stream.offload();
        let now = Outstanding {
            acked_bytes: 0,
            above_bytes: 1,
            in_flight_bytes: 1,
            round_trip: std::time::Duration::ZERO,
            is_deaf: false,
        };
        stream.held(5, &now);
        assert_eq!(stream.drain.expect("its clock runs").look_ms(), 6);
        stream.settle();
        assert!(stream.drain.is_none(), "it is not held back any more");
    }

    proptest! {
        #[test]
        fn no_order_of_events_ends_a_stream_with_bytes_in_hand(events in proptest::collection::vec(0u8..6, 0..40)) {
            let mut stream = Stream::new();
            for event in events {
                match event {
                    0 => stream.offload(),
                    1 => stream.settle(),
                    2 => { stream.settled(); }
                    3 if matches!(stream.way, Way::Relay | Way::Settling) && !stream.source_ended => {
                        stream.pending.push_back(1);
                    }
                    4 if stream.way == Way::Relay => { stream.pending.clear(); }
                    5 if matches!(stream.way, Way::Relay | Way::Settling) => { stream.source_ended = true; }
                    _ => (),
                }
                prop_assert!(stream.way != Way::Ended || stream.pending.is_empty());
            }
        }
    }
}
