//! What is done next with a session: looks at what its sockets reported, moves its directions on as far
//! as they go, and says what to wait for.

use std::os::fd::AsFd;

use culvert_shared::counters::CloseReason;
use culvert_shared::ids::Direction;
use culvert_shared::sys::socket;
use nix::errno::Errno;

use crate::clock;
use crate::event_loop::Worker;
use crate::relay::Pumped;
use crate::session::{Failed, Phase, Session, Way, source, target};
use crate::sockets;
use crate::table::{Side, Token};

/// What comes next for a session.
pub enum Next {
    /// It waits for its sockets, and is looked at by this time in any case.
    Wait(u64),
    /// It has more to do, but other sessions come first.
    Again,
    /// It is over.
    Close(CloseReason),
}

/// Why a direction cannot go on.
#[derive(Debug)]
pub enum Trouble {
    /// A socket failed.
    Socket(Failed),
    /// The kernel's counters do not add up, or its program has met what it must not.
    Integrity(String),
}

/// The longest wait between two looks at a settling direction.
const LONGEST_PATIENCE_MS: u64 = 64;
/// How long a client may take to read a status document and close.
const STATUS_PATIENCE_MS: u64 = 5_000;

impl Worker {
    /// Moves a session on after one of its sockets has reported something.
    pub(crate) fn drive(&mut self, token: Token, session: &mut Session) -> Next {
        match session.phase {
            Phase::Streaming => self.stream(token, session),
            Phase::Reading { deadline_ms, .. } => {
                let downstream = &mut session.ready[Side::Downstream.index()];
                if downstream.failed {
                    return Next::Close(CloseReason::DownstreamLeftReading);
                }
                match std::mem::take(&mut downstream.readable) || downstream.ended {
                    true => self.read_ahead(token, session),
                    false => Next::Wait(deadline_ms),
                }
            }
            Phase::Http { .. } => self.serve_http(session),
            Phase::Connecting { deadline_ms } => {
                if session.ready[Side::Downstream.index()].failed {
                    return Next::Close(CloseReason::DownstreamLeftConnecting);
                }
                let upstream = session.ready[Side::Upstream.index()];
                if upstream.writable || upstream.failed || upstream.ended {
                    return self.connect_ended(token, session, deadline_ms);
                }
                Next::Wait(deadline_ms)
            }
            Phase::Waiting { .. } | Phase::Naming { .. } if self.is_client_gone(session) => {
                Next::Close(CloseReason::DownstreamLeftConnecting)
            }
            Phase::Waiting { deadline_ms, .. } | Phase::Naming { deadline_ms } => Next::Wait(deadline_ms),
        }
    }

    /// Looks at a session whose timer has come out.
    pub(crate) fn look_after(&mut self, token: Token, session: &mut Session) -> Next {
        let now_ms = clock::now_ms();
        match session.phase {
            Phase::Reading { deadline_ms, .. } if now_ms < deadline_ms => Next::Wait(deadline_ms),
            Phase::Reading { .. } => Next::Close(CloseReason::ReadTimeout),
            Phase::Connecting { deadline_ms } if now_ms < deadline_ms => Next::Wait(deadline_ms),
            Phase::Http { .. } => self.serve_http(session),
            Phase::Connecting { .. } => self.peer_failed(token, session, Errno::ETIMEDOUT),
            Phase::Waiting { deadline_ms, .. } if now_ms < deadline_ms => Next::Wait(deadline_ms),
            Phase::Waiting { .. } => self.waited_in_vain(session),
            Phase::Naming { deadline_ms } if now_ms < deadline_ms => Next::Wait(deadline_ms),
            Phase::Naming { .. } => self.named_in_vain(session),
            Phase::Streaming => {
                if now_ms >= self.idle_deadline_ms(session) && !readers_progress(session, now_ms) {
                    return Next::Close(CloseReason::IdleTimeout);
                }
                for direction in Direction::BOTH {
                    let drain = session.stream(direction).drain;
                    if drain.is_some_and(|drain| drain.look_ms() <= now_ms)
                        && let Next::Close(reason) = self.look_at_flow(token, session, direction)
                    {
                        return Next::Close(reason);
                    }
                }
                self.mark_again(session);
                self.stream(token, session)
            }
        }
    }

    /// Moves both directions on as far as they go.
    pub(crate) fn stream(&mut self, token: Token, session: &mut Session) -> Next {
        for side in [Side::Downstream, Side::Upstream] {
            if !std::mem::take(&mut session.ready[side.index()].failed) {
                continue;
            }
            // Asking takes the error from the socket, and whoever goes on after this process would not see it.
            self.begin_copying(session);
            let errno = session
                .socket(side)
                .and_then(|socket| sockets::pending_error(socket.as_fd()));
            if let Some(errno) = errno {
                return Next::Close(self.explain(session, Trouble::Socket(Failed { side, errno })));
            }
        }
        let mut again = false;
        for direction in Direction::BOTH {
            match self.step(session, direction) {
                Ok(more) => again |= more,
                Err(trouble) => return Next::Close(self.explain(session, trouble)),
            }
        }
        if session.is_finished() {
            return Next::Close(if session.is_status {
                CloseReason::Status
            } else {
                CloseReason::Finished
            });
        }
        if session.is_long() {
            self.enter_kernel(token, session);
        }
        self.give_back_gathered(session);
        if again { Next::Again } else { self.wait(session) }
    }

    /// Moves one direction on; true: it stopped only because its turn is over.
    fn step(&mut self, session: &mut Session, direction: Direction) -> Result<bool, Trouble> {
        loop {
            match session.stream(direction).way {
                Way::Ended => return Ok(false),
                Way::Relay => match self.pump(session, direction).map_err(Trouble::Socket)? {
                    Pumped::Blocked => return Ok(false),
                    Pumped::TurnOver => return Ok(true),
                    Pumped::SourceEnded => {
                        session.stream(direction).settle();
                        self.check_received(session, direction)?;
                    }
                },
                Way::Kernel => {
                    if !session.ready[source(direction).index()].ended {
                        return Ok(false);
                    }
                    self.leave_kernel(session, direction)?;
                    if session.stream(direction).way == Way::Kernel {
                        session
                            .stream(direction)
                            .look_later(clock::now_ms(), LONGEST_PATIENCE_MS);
                        return Ok(false);
                    }
                }
                Way::Settling => {
                    if !self.is_settled(session, direction)? {
                        session
                            .stream(direction)
                            .look_later(clock::now_ms(), LONGEST_PATIENCE_MS);
                        return Ok(false);
                    }
                    if session.stream(direction).settled() {
                        self.pass_end_on(session, direction)?;
                    } else {
                        session.try_both();
                    }
                }
            }
        }
    }

    fn pass_end_on(&mut self, session: &mut Session, direction: Direction) -> Result<(), Trouble> {
        session.last_active_ms = clock::now_ms();
        if session.is_finished() && !session.seat.is_some_and(|seat| seat.kept) {
            // Closing it, which comes next, says the same, unless the master has the socket too.
            return Ok(());
        }
        // Whoever takes it over may end it once more, but must not take the end itself for a byte too many.
        self.save(session);
        let side = target(direction);
        match session
            .socket(side)
            .map(|socket| sockets::shut_down_write(socket.as_fd()))
        {
            None | Some(Ok(())) => Ok(()),
            Some(Err(errno)) => Err(Trouble::Socket(Failed { side, errno })),
        }
    }

    /// What a session that has nothing to do now waits for.
    pub(crate) fn wait(&mut self, session: &mut Session) -> Next {
        let now_ms = clock::now_ms();
        let mut wake_ms = self.idle_deadline_ms(session);
        if let Some(next) = self.end_half_closed(session) {
            return next;
        }
        wake_ms = wake_ms.min(self.marking_due_ms(session).unwrap_or(u64::MAX));
        for direction in Direction::BOTH {
            // An end that was reported and not yet found comes with no further event.
            let end_is_near = session.ready[source(direction).index()].ended;
            let is_readable = session.ready[source(direction).index()].readable;
            let stream = &session.streams[direction.index()];
            if let Some(pace) = &stream.pace
                && stream.way == Way::Relay
                && stream.pending.is_empty()
                && is_readable
                && pace.is_waiting()
            {
                wake_ms = wake_ms.min(pace.due_ns().div_ceil(1_000_000));
            }
            wake_ms = wake_ms.min(stream.due_back_ms().unwrap_or(u64::MAX));
            wake_ms = wake_ms.min(stream.drain.map_or(u64::MAX, |drain| drain.look_ms()));
            // What looks at the session for another reason, maybe every few milliseconds, must not put this off.
            if stream.way == Way::Settling || (stream.way == Way::Kernel && end_is_near) {
                wake_ms = wake_ms.min(stream.look_ms);
            }
        }
        Next::Wait(wake_ms.max(now_ms + 1))
    }

    /// With `proxy_half_close` off, the end of one stream is the end of the session, as soon as its
    /// reader has acknowledged all of it.
    fn end_half_closed(&self, session: &Session) -> Option<Next> {
        if session.settings.proxy_half_close || session.upstream.is_none() {
            return None;
        }
        let ended = Direction::BOTH
            .into_iter()
            .find(|way| session.streams[way.index()].way == Way::Ended)?;
        let reader = session.socket(target(ended))?;
        match socket::unacknowledged_bytes(reader.as_fd()) {
            Ok(bytes) if bytes > 0 => Some(Next::Wait(clock::now_ms() + LONGEST_PATIENCE_MS)),
            _ => Some(Next::Close(CloseReason::HalfClosed)),
        }
    }

    /// When the session has been idle for too long: rounded up to a multiple of `ebpf_timer_period`, so
    /// that any number of idle sessions wakes the worker once a period at most.
    fn idle_deadline_ms(&self, session: &Session) -> u64 {
        if session.upstream.is_none() {
            return session.started_ms + STATUS_PATIENCE_MS;
        }
        let settings = &session.settings;
        let kernel_ms = self.kernel_active_ms(session);
        // A direction that waits for its limit is not idle.
        let paces = session.streams.iter().filter_map(|stream| stream.pace.as_ref());
        let paced_ms = paces.map(|pace| pace.due_ns() / 1_000_000).max().unwrap_or(0);
        let deadline =
            session.last_active_ms.max(kernel_ms).max(paced_ms) + settings.proxy_timeout.as_millis() as u64;
        deadline.next_multiple_of((settings.ebpf_timer_period.as_millis() as u64).max(1))
    }

    /// Turns trouble into a close reason, and says it if nobody else will.
    pub(crate) fn explain(&self, session: &Session, trouble: Trouble) -> CloseReason {
        match trouble {
            Trouble::Socket(Failed { side, errno }) => {
                log::debug!(
                    "session {}: {side:?} socket failed: {}",
                    session.number,
                    errno.desc()
                );
                match (side, errno) {
                    (_, Errno::ENOMEM | Errno::ENOBUFS) => CloseReason::Resource,
                    (Side::Downstream, _) => CloseReason::DownstreamReset,
                    (Side::Upstream, _) => CloseReason::UpstreamReset,
                }
            }
            Trouble::Integrity(what) => {
                log::error!(
                    "session {}: resetting both ends, what the kernel has forwarded is in doubt: {what}",
                    session.number
                );
                CloseReason::Integrity
            }
        }
    }
}

/// Whether a reader still takes bytes out of a send buffer, although none has been put in for long: then
/// the session is not idle. What is buffered may be megabytes, and the reader slow.
fn readers_progress(session: &mut Session, now_ms: u64) -> bool {
    let mut queued = 0;
    let mut acknowledged = 0;
    for fd in [Side::Downstream, Side::Upstream]
        .into_iter()
        .filter_map(|side| session.socket(side))
    {
        let bytes = socket::unacknowledged_bytes(fd.as_fd()).unwrap_or(0);
        queued += bytes;
        // A unix socket has no such count: there the queue itself shows whether it moves.
        acknowledged += socket::tcp_info(fd.as_fd()).map_or(bytes, |info| info.bytes_acked);
    }
    if queued == 0 || session.acknowledged_bytes.replace(acknowledged) == Some(acknowledged) {
        return false;
    }
    session.last_active_ms = now_ms;
    true
}
