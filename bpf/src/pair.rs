//! Pairs: two sockets of one session in the maps of a worker slot. Takes, joins, reads and frees them;
//! never reads or writes their data, and needs no capability.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::fence;

use anyhow::{Context, Result};
use culvert_shared::ids::{Direction, Owner};
use culvert_shared::sessions::Place;
use culvert_shared::sys::shm::Shared;
use culvert_shared::sys::socket;
use libbpf_rs::libbpf_sys;
use libbpf_rs::{MapCore, MapFlags, MapHandle};

use crate::abi::{Flow, JoinRequest, SlotTotal, flow_flag, flow_pause, join_answer};
use crate::events::{Events, LANES, Lane};
use crate::load::Entry;
use crate::skel::slot::SlotMaps as SkeletonMaps;

mod hold;

use hold::low_mark;
pub use hold::{Hold, Outstanding};

/// Descriptors of a slot: three maps, the program that joins, the ring buffers, and the memory that says who reads those.
pub const OWN_DESCRIPTORS: usize = 4 + LANES + 1;

/// The maps of one worker slot.
pub struct SlotMaps {
    sources: MapHandle,
    targets: MapHandle,
    /// The program that puts a pair into them.
    join: OwnedFd,
    flows_map: MapHandle,
    flows: Shared<Flow>,
    rings: [MapHandle; LANES],
    lanes: Shared<Lane>,
    /// The memory of `lanes`.
    lanes_file: OwnedFd,
    capacity: u32,
    /// What the entry program knows the slot's program by.
    number: u32,
    entry: Arc<Entry>,
}

/// One direction of a pair as the program left it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowState {
    /// Bytes redirected to the other socket.
    pub forwarded_bytes: u64,
    /// When the last of them was, in nanoseconds of CLOCK_MONOTONIC.
    pub last_active_ns: u64,
    /// Bytes cut off because they had been forwarded before.
    pub trimmed_bytes: u64,
    /// What the flow has met; see [`crate::flow_flag`].
    pub flags: u32,
    /// Times that its source was held back.
    pub pauses: u32,
    /// Its source is held back.
    pub paused: bool,
    /// It is held back so that small segments gather, not for its reader.
    pub gathers: bool,
}

/// No source is allowed less on its way, however little may wait for its target.
const WINDOW_BYTES_MIN: u32 = 4 << 20;

/// The largest receive window that the source of a flow announces, of which so many bytes may be outstanding. What was
/// allowed comes after it is held back, too, whatever its buffer has grown to; and more than may wait for the target makes
/// nothing faster.
pub fn largest_window(backlog_bytes: u32) -> u32 {
    backlog_bytes.max(WINDOW_BYTES_MIN).min(i32::MAX as u32)
}

/// The largest send buffer that a socket is given (`SO_SNDBUF`; the kernel doubles it): one window's bytes have room behind another's.
pub fn largest_send_buffer(backlog_bytes: u32) -> u32 {
    largest_window(backlog_bytes)
        .saturating_mul(2)
        .min(i32::MAX as u32)
}

/// On what terms a pair is joined.
pub struct Terms {
    /// Now, CLOCK_MONOTONIC.
    pub now_ns: u64,
    /// Bytes that may be outstanding towards one target before its source is held back.
    pub backlog_bytes: u32,
    /// The largest receive window that the host gives a socket; `None`: not known.
    pub window_bytes: Option<u32>,
    /// The largest buffer that anyone may ask for, either way (`net.core.rmem_max`, `net.core.wmem_max`). A receive buffer that
    /// would have to be larger is left to the kernel.
    pub settable_bytes: u32,
    /// Where the worker is told what happens.
    pub lane: LaneNumber,
}

impl Terms {
    /// `runaway_bytes`: what the flow had of it, if it goes on: so much may be outstanding, or gathered, from before.
    fn set_limits(&self, flow: &Flow, runaway_bytes: u32) {
        flow.high_bytes.store(self.backlog_bytes, Relaxed);
        flow.low_bytes.store(low_mark(self.backlog_bytes, 0), Relaxed);
        flow.window_bytes
            .store(largest_window(self.backlog_bytes), Relaxed);
        flow.settable_bytes.store(self.settable_bytes, Relaxed);
        // A source that is let go has gathered as much as its buffer takes, and gets no further than another window. A buffer
        // may be as large as the host lets it grow, or as the worker and `limit_buffer` make it: twice the largest window.
        let window = self.window_bytes.map(|of_host| {
            let given = largest_window(self.backlog_bytes).saturating_mul(2);
            of_host.max(given)
        });
        let runaway = window.map_or(0, |window| {
            let bytes = self.backlog_bytes.saturating_add(window.saturating_mul(2));
            bytes.max(runaway_bytes)
        });
        // What is outstanding is a difference of 32-bit counters.
        flow.runaway_bytes.store(runaway.min(i32::MAX as u32), Relaxed);
    }
}

/// A worker's ring buffer of its slot.
#[derive(Clone, Copy, Debug)]
pub struct LaneNumber(u32);

impl LaneNumber {
    /// No ring buffer: nothing is told.
    const NONE: LaneNumber = LaneNumber(u32::MAX);
}

impl Default for LaneNumber {
    fn default() -> LaneNumber {
        LaneNumber::NONE
    }
}

/// How far [`SlotMaps::join`] came.
#[derive(Debug)]
pub enum Joined {
    /// Each direction that was to be is forwarded in the kernel.
    Wanted,
    /// The kernel forwards to_upstream; the upstream socket could not become a source (most likely it has
    /// just ended its stream), so to_downstream is left to user space.
    ToUpstreamOnly,
}

impl Drop for SlotMaps {
    fn drop(&mut self) {
        self.entry.remove(self.number);
    }
}

impl SlotMaps {
    pub(crate) fn new(
        maps: &SkeletonMaps<'_>,
        join: OwnedFd,
        capacity: u32,
        number: u32,
        entry: Arc<Entry>,
    ) -> Result<SlotMaps> {
        SlotMaps::with(
            maps,
            join,
            capacity,
            number,
            entry,
            Shared::in_file(c"culvert-lanes", LANES)?,
        )
    }

    pub(crate) fn with(
        maps: &SkeletonMaps<'_>,
        join: OwnedFd,
        capacity: u32,
        number: u32,
        entry: Arc<Entry>,
        (lanes, lanes_file): (Shared<Lane>, OwnedFd),
    ) -> Result<SlotMaps> {
        let handle = |map| MapHandle::try_from(map).context("failed to duplicate a BPF map descriptor");
        let flows = Shared::of_fd(maps.flows.as_fd(), 2 * capacity as usize)?;
        Ok(SlotMaps {
            sources: handle(&maps.sources)?,
            targets: handle(&maps.targets)?,
            join,
            flows_map: handle(&maps.flows)?,
            flows,
            rings: [
                handle(&maps.lane_0)?,
                handle(&maps.lane_1)?,
                handle(&maps.lane_2)?,
                handle(&maps.lane_3)?,
            ],
            lanes,
            lanes_file,
            capacity,
            number,
            entry,
        })
    }

    /// Its row in [`Totals::slot`].
    pub fn number(&self) -> u32 {
        self.number
    }

    fn total(&self) -> &SlotTotal {
        self.entry.totals().slot_total(self.number)
    }

    /// The descriptors that a worker must keep open.
    pub fn fds(&self) -> Vec<RawFd> {
        let maps = [&self.sources, &self.targets, &self.flows_map];
        let maps = maps
            .into_iter()
            .chain(&self.rings)
            .map(|map| map.as_fd().as_raw_fd());
        maps.chain([self.join.as_raw_fd()])
            .chain(self.entry.fds())
            .collect()
    }

    /// What another program needs to go on with them, besides the entry's; in the order of
    /// [`SlotMaps::take_over`].
    pub fn descriptors(&self) -> [BorrowedFd<'_>; OWN_DESCRIPTORS] {
        let [a, b, c, d] = self.rings.each_ref().map(AsFd::as_fd);
        [
            self.sources.as_fd(),
            self.targets.as_fd(),
            self.join.as_fd(),
            self.flows_map.as_fd(),
            a,
            b,
            c,
            d,
            self.lanes_file.as_fd(),
        ]
    }

    /// The entry program that they belong to.
    pub fn entry(&self) -> &Arc<Entry> {
        &self.entry
    }

    /// Pairs that fit.
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Hands both sockets, `[downstream, upstream]`, to the kernel. What waits in their receive queues
    /// is forwarded first, a half-read segment included. On an error nothing was forwarded and the
    /// sockets are as before.
    ///
    /// `wanted` are the directions that the kernel is to forward; the source of another one stays an ordinary socket
    /// that user space reads. `sent_bytes` is what was sent in each direction before, as its target's TCP will have
    /// counted it when all of it is acknowledged.
    ///
    /// The kick comes last, for what arrived before its socket was a source.
    pub fn join(
        &self,
        place: Place,
        sockets: [BorrowedFd<'_>; 2],
        terms: &Terms,
        sent_bytes: [u64; 2],
        wanted: [bool; 2],
    ) -> io::Result<Joined> {
        for (side, fd) in sockets.iter().enumerate() {
            let flow = &self.flows[self.index(place, side)];
            flow.cookie.store(socket::cookie(*fd)?, Relaxed);
            flow.forwarded_bytes.store(0, Relaxed);
            flow.trimmed_bytes.store(0, Relaxed);
            flow.last_active_ns.store(terms.now_ns, Relaxed);
            // Its low bits, as in the program.
            flow.acked_base.store(sent_bytes[side] as u32, Relaxed);
            terms.set_limits(flow, 0);
            flow.lane.store(terms.lane.0, Relaxed);
            flow.pause.store(flow_pause::OFF, Relaxed);
            for counter in [
                &flow.wake,
                &flow.pauses,
                &flow.largest_outstanding_bytes,
                &flow.queued,
                &flow.small,
                &flow.gather,
                &flow.narrowed,
                &flow.tick,
                &flow.tick_segments,
                &flow.crowded_ticks,
                &flow.period_start,
            ] {
                counter.store(0, Relaxed);
            }
            flow.flags.store(flow_flag::KICKED, Release);
        }
        let joined = self.insert(place, sockets, wanted);
        match &joined {
            Ok(_) => (0..2).for_each(|side| kick(&self.flows[self.index(place, side)], sockets[side])),
            Err(_) => self.release(place),
        }
        joined
    }

    fn insert(&self, place: Place, sockets: [BorrowedFd<'_>; 2], wanted: [bool; 2]) -> io::Result<Joined> {
        let index = self.index(place, 0);
        let mut request = JoinRequest {
            cookies: [index, index + 1].map(|index| self.flows[index].cookie.load(Relaxed)),
            sockets: sockets.map(|socket| socket.as_raw_fd()),
            sources: self.sources.as_fd().as_raw_fd(),
            targets: self.targets.as_fd().as_raw_fd(),
            places: self.entry.places().as_fd().as_raw_fd(),
            index: index as u32,
            wanted: u32::from(wanted[0]) | u32::from(wanted[1]) << 1,
            pad: 0,
        };
        match run(self.join.as_fd(), &mut request)? {
            join_answer::WANTED => Ok(Joined::Wanted),
            join_answer::TO_UPSTREAM_ONLY => Ok(Joined::ToUpstreamOnly),
            error => Err(io::Error::from_raw_os_error(-error)),
        }
    }

    fn insert_socket(&self, map: &MapHandle, index: usize, fd: BorrowedFd<'_>) -> io::Result<()> {
        update(
            map,
            &(index as u32).to_ne_bytes(),
            &(fd.as_raw_fd() as u64).to_ne_bytes(),
        )
    }

    /// Lets a source go that was held back, and makes the kernel look at what it has gathered. False: the
    /// kernel does not take it again (it has received the end of its stream), what it has gathered is left
    /// to user space.
    pub fn resume(&self, place: Place, direction: Direction, source: BorrowedFd<'_>) -> bool {
        let index = self.index(place, direction.index());
        let flow = &self.flows[index];
        flow.wake.store(0, Relaxed);
        flow.gather.store(0, Relaxed);
        flow.crowded_ticks.store(0, Relaxed);
        if flow
            .pause
            .compare_exchange(flow_pause::WANTED, flow_pause::OFF, AcqRel, Acquire)
            != Err(flow_pause::ON)
        {
            return true;
        }
        // In this order: whoever takes the session over when this worker dies in between finds the source in
        // the map, or still held back. While `pause` is on, the program forwards and does not hold back.
        flow.flags.fetch_or(flow_flag::KICKED, AcqRel);
        if self.insert_socket(&self.sources, index, source).is_err() {
            flow.pause.store(flow_pause::OFF, Release);
            return false;
        }
        flow.pause.store(flow_pause::OFF, Release);
        kick(flow, source);
        true
    }

    /// Takes over a direction whose source is held back, for a while: user space copies it from now on, once what the kernel
    /// has of it is out.
    pub fn withdraw(&self, place: Place, direction: Direction) {
        let flow = &self.flows[self.index(place, direction.index())];
        flow.pause.store(flow_pause::OFF, Release);
    }

    /// Gives a direction back to the kernel that was withdrawn. `sent_bytes` is what user space has sent in it, as
    /// for [`SlotMaps::join`]. False: the kernel does not take its source again.
    pub fn rejoin(
        &self,
        place: Place,
        direction: Direction,
        source: BorrowedFd<'_>,
        sent_bytes: u64,
    ) -> bool {
        let index = self.index(place, direction.index());
        let flow = &self.flows[index];
        // The next segment says anew where the stream stands.
        flow.flags.fetch_and(!flow_flag::STARTED, AcqRel);
        flow.flags.fetch_or(flow_flag::KICKED, AcqRel);
        flow.acked_base.store(sent_bytes as u32, Relaxed);
        for counter in [
            &flow.wake,
            &flow.queued,
            &flow.small,
            &flow.gather,
            &flow.crowded_ticks,
        ] {
            counter.store(0, Relaxed);
        }
        let rejoined = self.insert_socket(&self.sources, index, source).is_ok();
        if rejoined {
            kick(flow, source);
        }
        rejoined
    }

    /// Makes this worker the one that is told about a pair, and that goes on where another one left off.
    /// `carried` are the directions that the kernel forwards. After a worker's death (`died`) it is not known
    /// how far it came: a source that it was about to let go is held back again, and both are looked at.
    pub fn adopt(
        &self,
        place: Place,
        sockets: [BorrowedFd<'_>; 2],
        terms: &Terms,
        carried: [bool; 2],
        died: bool,
    ) {
        for (side, fd) in sockets.into_iter().enumerate() {
            let index = self.index(place, side);
            let flow = &self.flows[index];
            terms.set_limits(flow, flow.runaway_bytes.load(Relaxed));
            // Before `pause` is read by the caller: either it sees a pause, or the program sees the lane.
            flow.lane.store(terms.lane.0, SeqCst);
            if !died || !carried[side] {
                continue;
            }
            let key = (index as u32).to_ne_bytes();
            let was_held_back = flow.pause.load(SeqCst) == flow_pause::ON;
            flow.flags.fetch_or(flow_flag::KICKED, AcqRel);
            // It takes the socket's lock: a pause that has just begun is over with it, and the map says so.
            let _ = socket::set_receive_low_water(fd, 1);
            let is_source = self
                .sources
                .lookup(&key, MapFlags::ANY)
                .is_ok_and(|found| found.is_some());
            if is_source && was_held_back {
                let _ = flow
                    .pause
                    .compare_exchange(flow_pause::ON, flow_pause::OFF, AcqRel, Relaxed);
            } else if !is_source {
                flow.pause.store(flow_pause::ON, SeqCst);
            }
            kick(flow, fd);
        }
    }

    /// Forgets the sockets of a pair. To be done before they are closed: closing waits for the socket lock, so
    /// afterwards no event of a socket that lives on as an orphan can reach the pair.
    pub fn part(&self, place: Place) {
        for side in 0..2 {
            self.flows[self.index(place, side)].cookie.store(0, SeqCst);
        }
    }

    /// Takes a ring buffer for a worker; `None`: all have their readers.
    pub fn open_events(&self, owner: Owner) -> Result<(LaneNumber, Option<Events>)> {
        match self.lanes.iter().position(|lane| lane.take(owner)) {
            Some(lane) => Ok((LaneNumber(lane as u32), Some(Events::open(&self.rings[lane])?))),
            None => Ok((LaneNumber::NONE, None)),
        }
    }

    /// Takes a pair out of all maps and forgets its cookies: for one that was not joined wholly, or whose
    /// worker died. The sockets are closed, or nothing was forwarded.
    pub fn release(&self, place: Place) {
        for side in 0..2 {
            let index = self.index(place, side);
            let key = (index as u32).to_ne_bytes();
            let _ = self.sources.delete(&key);
            let _ = self.targets.delete(&key);
        }
        self.forget(place);
    }

    /// Takes a pair out of the slot's books. Its sockets are closed: they have left the sockmaps by themselves
    /// (sock_map_close), before which no verdict on them can be running. What stands in `indices` for them leads
    /// nowhere without a cookie here, until the pair's next sockets replace it.
    pub fn forget(&self, place: Place) {
        self.part(place);
        for side in 0..2 {
            self.count_held(&self.flows[self.index(place, side)], 0);
        }
    }

    /// What the program counted for one direction.
    pub fn flow(&self, place: Place, direction: Direction) -> FlowState {
        let flow = &self.flows[self.index(place, direction.index())];
        FlowState {
            forwarded_bytes: flow.forwarded_bytes.load(Acquire),
            last_active_ns: flow.last_active_ns.load(Relaxed),
            trimmed_bytes: flow.trimmed_bytes.load(Relaxed),
            flags: flow.flags.load(Relaxed),
            pauses: flow.pauses.load(Relaxed),
            paused: flow.pause.load(SeqCst) == flow_pause::ON,
            gathers: flow.gather.load(Relaxed) != 0,
        }
    }

    /// Events that the programs could not tell, because a ring buffer was full. Whoever finds more than before
    /// after it has emptied its own has to look at its flows.
    pub fn lost_events(&self) -> u32 {
        // How far the ring was emptied has to be seen by the programs before the count is read here.
        fence(SeqCst);
        self.total().lost_events.load(Relaxed)
    }

    /// Frees the ring buffer of a worker that is gone.
    pub fn release_events(&self, owner: Owner) {
        self.lanes.iter().for_each(|lane| lane.release(owner));
    }

    fn index(&self, place: Place, side: usize) -> usize {
        2 * place.0 as usize + side
    }
}

/// Makes the kernel look at what waits in the receive queue of a socket that has just become a source. Since before it became one the
/// program knows that its lock is held, because what comes meanwhile may close its window for good (`is_flooded`). The program
/// sets its flags without an atomic: what it sets is never lost, and a stale `KICKED` makes it look for nothing.
fn kick(flow: &Flow, source: BorrowedFd<'_>) {
    // Refused only for what is not a socket (sk_setsockopt).
    let _ = socket::set_receive_low_water(source, 1);
    flow.flags.fetch_and(!flow_flag::KICKED, AcqRel);
}

/// Runs a program of the type BPF_PROG_TYPE_SYSCALL on `context`, and returns its answer.
fn run(program: BorrowedFd<'_>, context: &mut JoinRequest) -> io::Result<i32> {
    let mut options = libbpf_sys::bpf_test_run_opts {
        sz: size_of::<libbpf_sys::bpf_test_run_opts>() as _,
        ctx_in: std::ptr::from_mut(context).cast(),
        ctx_size_in: size_of::<JoinRequest>() as u32,
        ..Default::default()
    };
    // SAFETY: the kernel reads the context, and writes it back (bpf_prog_test_run_syscall), within its size; it and
    // the options live across the call.
    let result = unsafe { libbpf_sys::bpf_prog_test_run_opts(program.as_raw_fd(), &mut options) };
    match result {
        0 => Ok(options.retval as i32),
        error => Err(io::Error::from_raw_os_error(-error)),
    }
}

fn update(map: &MapHandle, key: &[u8], value: &[u8]) -> io::Result<()> {
    map.update(key, value, MapFlags::ANY)
        .map_err(|error| match error.kind() {
            libbpf_rs::ErrorKind::OutOfMemory => io::ErrorKind::OutOfMemory.into(),
            _ => io::Error::other(error.to_string()),
        })
}
