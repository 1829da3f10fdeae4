//! The self-test: whether this kernel does with a pair what the data path relies on. Kernels are known
//! that lose or double bytes, and a distribution's version number does not tell which; so it is tried, over
//! loopback, with the programs that will serve. A kernel that fails is not trusted, and sessions are copied.

mod session;
mod socket;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use culvert_shared::ids::{Direction, Owner};
use culvert_shared::sessions::Place;

use crate::events::{EventKind, Events};
use crate::load::Bpf;
use crate::pair::{LaneNumber, SlotMaps};
use socket::{LOOK, pattern};

pub use session::Session;
pub use socket::Socket;

/// What is tried, in this order.
const STEPS: [(&str, Step); 5] = [
    ("activation", activation),
    ("overlap", overlap),
    ("end of stream", end_of_stream),
    ("partial send", partial_send),
    ("pause and resume", pause_and_resume),
];

/// How long a step may take, and how long one that waits for a reader may stand still. A sound kernel needs a tenth of a
/// second for all of them together; a virtual machine without hardware support may need ten times that, and so
/// may a host whose CPUs are busy: to be slow is no fault, and who fails is copied for until the next start. With buffers as
/// small as some steps have, one missed moment costs a sender's timeout, and the next one twice that (0.2 s, 0.4 s, …).
const STEP_TIME: Duration = Duration::from_secs(6);

/// The same for all of them together. The master does nothing else meanwhile, at a reload that wants the kernel for the
/// first time too, and a service manager or the master that is to be replaced waits for it.
const WHOLE_TIME: Duration = Duration::from_secs(8);

/// Pairs of the slot that it is done in. A step has one at a time.
const PAIRS: u32 = 4;

/// Seeds of the bytes that travel each way.
const UP: u32 = 1;
const DOWN: u32 = 2;

/// A target without back-pressure: more than any step sends.
const NO_LIMIT: u32 = 1 << 30;

type Step = fn(&mut Bench<'_>) -> Result<()>;

/// Called once in each step, with its name, at the moment that the step is about.
pub type Meddle<'a> = &'a mut dyn FnMut(&str, &Session<'_>);

struct Bench<'a> {
    maps: &'a SlotMaps,
    free: Vec<Place>,
    lane: LaneNumber,
    events: Events,
    step: &'static str,
    step_time: Duration,
    deadline: Instant,
    meddle: Meddle<'a>,
}

/// Does the self-test in a slot of its own, which leaves nothing behind; returns how long it took.
///
/// # Errors
/// A step failed: the chain names it, what was expected and what came. What cannot be tried for want of a
/// right fails too: a kernel that was not proven is not trusted.
pub fn run(bpf: &Bpf) -> Result<Duration> {
    run_meddled(bpf, STEP_TIME, &mut |_, _| {})
}

/// The same, with somebody who spoils something, to test that the self-test notices; a step may take
/// `step_time`.
///
/// # Errors
/// As [`run`].
pub fn run_meddled(bpf: &Bpf, step_time: Duration, meddle: Meddle<'_>) -> Result<Duration> {
    let start = Instant::now();
    let maps = bpf.load_slot(PAIRS)?;
    // The maps are this function's alone, so any mark will do.
    let owner = Owner(1);
    let (lane, events) = maps.open_events(owner)?;
    let mut bench = Bench {
        maps: &maps,
        free: (0..PAIRS).map(Place).collect(),
        lane,
        events: events.context("the ring buffers of a new slot have readers")?,
        step: "",
        step_time,
        deadline: start,
        meddle,
    };
    let tried = STEPS.into_iter().try_for_each(|(name, step)| {
        bench.step = name;
        let left = WHOLE_TIME.saturating_sub(start.elapsed());
        bench.step_time = step_time.min(left);
        bench.deadline = Instant::now() + bench.step_time;
        let begun = Instant::now();
        step(&mut bench).with_context(|| format!("the self-test failed at {name}"))?;
        log::debug!("self-test, {name}: passed in {:?}", begun.elapsed());
        anyhow::Ok(())
    });
    // What it forwarded is nobody's traffic.
    bpf.totals().forget();
    tried.map(|()| start.elapsed())
}

impl<'a> Bench<'a> {
    fn connect(&mut self, buffer_bytes: Option<usize>) -> Result<Session<'a>> {
        let place = self.free.pop().context("all pairs are in use")?;
        Session::connect(self.maps, place, self.deadline, buffer_bytes)
    }

    fn meddle(&mut self, session: &Session<'_>) {
        (self.meddle)(self.step, session);
    }

    /// Both streams end here.
    fn finish(&mut self, session: Session<'_>) -> Result<()> {
        let place = session.finish()?;
        self.maps.forget(place);
        self.free.push(place);
        Ok(())
    }
}

/// What waits in the receive queues when a pair is joined, a segment that user space has read in part
/// included, and what arrives later, comes out once and in order.
fn activation(bench: &mut Bench<'_>) -> Result<()> {
    const WAITING: usize = 1500;
    const READ: [usize; 2] = [700, 1100];
    let (up, down) = (pattern(UP, 9_000), pattern(DOWN, 7_000));
    let mut session = bench.connect(None)?;
    for (from, bytes) in [(&mut session.client, &up), (&mut session.server, &down)] {
        from.send(&bytes[..WAITING / 3])?;
        from.send(&bytes[WAITING / 3..WAITING])?;
    }
    session.downstream.await_arrival(WAITING)?;
    session.upstream.await_arrival(WAITING)?;
    session.downstream.receive(&up[..READ[0]])?;
    session.upstream.send(&up[..READ[0]])?;
    session.upstream.receive(&down[..READ[1]])?;
    session.downstream.send(&down[..READ[1]])?;
    session.join(NO_LIMIT, bench.lane)?;
    bench.meddle(&session);
    session.client.send(&up[WAITING..])?;
    session.server.send(&down[WAITING..])?;
    session.server.receive(&up)?;
    session.client.receive(&down)?;
    session.counted(Direction::ToUpstream, up.len() - READ[0])?;
    session.counted(Direction::ToDownstream, down.len() - READ[1])?;
    bench.finish(session)
}

/// A segment that begins with bytes that were sent before, as a retransmission may, doubles none of them.
fn overlap(bench: &mut Bench<'_>) -> Result<()> {
    const OLD: usize = 4;
    let (up, down) = (pattern(UP, 16), pattern(DOWN, 100));
    let mut session = bench.connect(None)?;
    session.join(NO_LIMIT, bench.lane)?;
    session.client.send(&up[..8])?;
    session.server.receive(&up[..8])?;
    session.counted(Direction::ToUpstream, 8)?;
    bench.meddle(&session);
    session = session.with_client_rewound(OLD as u32)?;
    session.client.send(&up[8 - OLD..12])?;
    session.server.receive(&up[8..12])?;
    // Were the old bytes counted as new ones by TCP, so small a segment would be stuck.
    session.client.send(&up[12..])?;
    session.server.receive(&up[12..])?;
    session.server.send(&down)?;
    session.client.receive(&down)?;
    session.counted(Direction::ToUpstream, up.len())?;
    session.counted(Direction::ToDownstream, down.len())?;
    let trimmed = session.flow(Direction::ToUpstream).trimmed_bytes;
    ensure!(
        trimmed == OLD as u64,
        "{OLD} bytes were sent twice, the program has trimmed {trimmed}"
    );
    bench.finish(session)
}

/// A FIN without data ends nothing but its own stream: its target stays whole, the other direction goes
/// on. A FIN in the last segment does not take the segment's bytes with it.
fn end_of_stream(bench: &mut Bench<'_>) -> Result<()> {
    let (up, down) = (pattern(UP, 3_000), pattern(DOWN, 5_000));
    let mut session = bench.connect(None)?;
    session.join(NO_LIMIT, bench.lane)?;
    session.client.send(&up[..2_000])?;
    session.server.receive(&up[..2_000])?;
    session.client.end_stream();
    session.downstream.receive_end()?;
    bench.meddle(&session);
    session.server.send(&down[..4_000])?;
    session.client.receive(&down[..4_000])?;
    session.upstream.must_be_well()?;
    session.upstream.send(&up[2_000..])?;
    session.server.receive(&up[2_000..])?;
    session.server.send_with_end(&down[4_000..])?;
    session.client.receive(&down[4_000..])?;
    session.upstream.receive_end()?;
    session.downstream.must_be_well()?;
    session.counted(Direction::ToUpstream, 2_000)?;
    session.counted(Direction::ToDownstream, down.len())?;
    bench.finish(session)
}

/// A target that takes a segment only in part gets the rest later, once and in order.
fn partial_send(bench: &mut Bench<'_>) -> Result<()> {
    // The kernel doubles it. Segments over loopback are larger than what then fits at once.
    const BUFFER_BYTES: usize = 16 * 1024;
    let up = pattern(UP, 256 * 1024);
    let mut session = bench.connect(Some(BUFFER_BYTES))?;
    session.join(NO_LIMIT, bench.lane)?;
    session.client.send(&up)?;
    session.counted(Direction::ToUpstream, up.len())?;
    let taken = session.upstream.written_bytes()?;
    ensure!(
        taken < up.len() as u64,
        "a target with a send buffer of {BUFFER_BYTES} bytes took {taken} at once, a part was expected"
    );
    bench.meddle(&session);
    session.server.receive(&up)?;
    session.counted(Direction::ToUpstream, up.len())?;
    bench.finish(session)
}

/// A source is held back while its target's peer does not read, what is outstanding stays bounded, the
/// program says when it has drained, and after that everything goes on.
fn pause_and_resume(bench: &mut Bench<'_>) -> Result<()> {
    const BACKLOG_BYTES: u32 = 64 * 1024;
    const BUFFER_BYTES: usize = 64 * 1024;
    // Beyond the backlog: a window of the source that was open when it was decided, and what the server's
    // own buffer has taken. The kernel doubles the buffers' sizes.
    const BOUND: u64 = BACKLOG_BYTES as u64 + 2 * 2 * BUFFER_BYTES as u64 + 64 * 1024;
    /// How often it is looked for a target that has drained and did not say so; as workers do.
    const ASKED_EVERY: Duration = Duration::from_millis(100);
    /// How long nothing may move before the writer counts as stopped.
    const STILL: Duration = Duration::from_millis(3);
    let way = Direction::ToUpstream;
    let up = pattern(UP, 1024 * 1024);
    let mut session = bench.connect(Some(BUFFER_BYTES))?;
    session.join(BACKLOG_BYTES, bench.lane)?;
    bench.meddle(&session);

    let mut sent = 0;
    let mut moved = Instant::now();
    while moved.elapsed() < STILL || !session.flow(way).paused {
        let now = session.client.offer(&up[sent..])?;
        if now > 0 {
            (sent, moved) = (sent + now, Instant::now());
        }
        if sent == up.len() || moved.elapsed() >= bench.step_time {
            bail!(
                "{} bytes were forwarded to a server that does not read, the source was to be held back \
                 beyond {BACKLOG_BYTES}",
                session.flow(way).forwarded_bytes
            );
        }
        std::thread::sleep(LOOK);
    }
    let held = session.flow(way).forwarded_bytes;
    ensure!(
        held <= BOUND,
        "{held} bytes were forwarded to a server that does not read, at most {BOUND} were expected"
    );

    let mut received = 0;
    let mut drained = 0;
    moved = Instant::now();
    let mut looked = moved;
    while received < up.len() {
        let (came, gone) = (
            session.server.take(&up[received..])?,
            session.client.offer(&up[sent..])?,
        );
        (received, sent) = (received + came, sent + gone);
        match came + gone {
            0 => std::thread::sleep(LOOK),
            _ => moved = Instant::now(),
        }
        for event in bench.events.take() {
            match event.kind {
                EventKind::Drained => {
                    drained += 1;
                    ensure!(
                        session.resume(way),
                        "the kernel does not take a source again that was held back"
                    );
                }
                EventKind::Trouble => bail!("the program met flags {:#x}", session.flow(way).flags),
                EventKind::Paused
                | EventKind::Room
                | EventKind::Held
                | EventKind::Narrow
                | EventKind::Lost => {}
            }
        }
        // A target that had to send something again reports no sample of the round trip.
        if looked.elapsed() >= ASKED_EVERY {
            looked = Instant::now();
            ensure!(
                !session.is_due() || session.resume(way),
                "the kernel does not take a source again that was held back"
            );
        }
        // Buffers this small let the sender wait for its probe timer now and then (see `SEGMENT_BYTES`).
        if moved.elapsed() >= bench.step_time {
            bail!(
                "{received} of {} bytes came, then nothing moved, {drained} times the program said that the target had drained",
                up.len()
            );
        }
    }
    session.set_deadline(Instant::now() + bench.step_time);
    session.counted(way, up.len())?;
    let pauses = session.flow(way).pauses;
    ensure!(
        drained > 0 && pauses > 0,
        "the source was held back {pauses} times and the program said {drained} times that the target had drained, \
         both were expected"
    );
    bench.finish(session)
}
