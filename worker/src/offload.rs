//! When and how a pair enters the kernel, how it is seen that everything has come out at the other end,
//! and how it leaves. The data itself is never touched here.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use culvert_bpf::{Joined, SlotMaps, Terms, flow_flag};
use culvert_shared::config::{OffloadAfter, Stream as Settings};
use culvert_shared::counters::{Board, FallbackReason, WorkerRow};
use culvert_shared::ids::Direction;
use culvert_shared::message::SessionId;
use culvert_shared::sessions::Place;
use culvert_shared::sys::socket;
use nix::errno::Errno;
use nix::sys::socket::MsgFlags;

use crate::brevity::SHORT_BYTES;
use crate::clock;
use crate::drive::{Next, Trouble};
use crate::event_loop::Worker;
use crate::session::{Datapath, Failed, Session, source, target};
use crate::store::{Seat, Ward};
use crate::table::{Side, Token};

impl Worker {
    /// Both ends are there: the kernel takes the session, or user space copies it.
    pub(crate) fn begin_streaming(&mut self, token: Token, session: &mut Session) -> Next {
        let kept = session.seat.is_some_and(|seat| seat.kept);
        let copied_first = match session.settings.ebpf_offload_after {
            // It has lived for long enough.
            _ if kept => 0,
            OffloadAfter::Bytes(bytes) => bytes,
            OffloadAfter::Auto if self.brevity.is_expected(session.listener, clock::now_ms()) => SHORT_BYTES,
            OffloadAfter::Auto => 0,
        };
        if copied_first > 0 && self.may_enter(session).is_ok() {
            session.datapath = Datapath::Late(copied_first);
            Board::add(&self.board[0].sessions_copied_first, 1);
            begin_copying(session);
        } else {
            self.enter_kernel(token, session);
        }
        log::debug!("session {}: datapath {:?}", session.number, session.datapath);
        match kept {
            // The record still says that it is connecting.
            true => drop(self.fill_record(session)),
            false => self.note_young(token, session),
        }
        self.stream(token, session)
    }

    /// The kernel takes the session now, if it takes it at all.
    pub(crate) fn enter_kernel(&mut self, token: Token, session: &mut Session) {
        let late = session.is_late();
        let result = match late && !session.is_open() {
            true => Err(Datapath::Relay),
            false => self.offload(token, session),
        };
        session.datapath = match result {
            Ok(Joined::Wanted) if session.is_limited() => {
                // One direction is the kernel's, the other one user space's.
                session.streams.iter_mut().for_each(|stream| stream.offload());
                self.board[0].count_fallback(FallbackReason::RateLimited);
                begin_copying(session);
                Datapath::Sockmap
            }
            Ok(Joined::Wanted) => {
                session.streams.iter_mut().for_each(|stream| stream.offload());
                Datapath::Sockmap
            }
            Ok(Joined::ToUpstreamOnly) => {
                session.stream(Direction::ToUpstream).offload();
                begin_copying(session);
                Datapath::Sockmap
            }
            // It was a short one after all.
            Err(Datapath::Fallback(FallbackReason::EarlyEnd)) if late => Datapath::Relay,
            Err(datapath) => {
                if let Datapath::Fallback(reason) = datapath {
                    self.board[0].count_fallback(reason);
                }
                begin_copying(session);
                datapath
            }
        };
        if late {
            log::debug!("session {}: datapath {:?} now", session.number, session.datapath);
            session.try_both();
        }
        self.mark_upstream(session);
        if session.datapath == Datapath::Sockmap {
            Board::add(&self.board[0].sessions_offloaded, 1);
            WorkerRow::up(&self.gauges().offloaded);
        }
    }

    /// The maps for a session, and which of its directions the kernel is to forward; otherwise why user space copies it.
    fn may_enter(&self, session: &Session) -> Result<(Arc<SlotMaps>, [bool; 2]), Datapath> {
        let refuse = |reason| Err(Datapath::Fallback(reason));
        if !session.settings.ebpf_enable {
            return Err(Datapath::Relay);
        }
        // A session that an earlier worker began may have its place already.
        let ward = session.seat.map_or(OWN, |seat| seat.ward);
        let Some(maps) = self.wards[ward].store.maps.clone() else {
            return refuse(FallbackReason::BpfUnavailable);
        };
        if session.is_unix() || !session.upstream.as_ref().is_some_and(|upstream| upstream.tcp) {
            return refuse(FallbackReason::NotTcp);
        }
        match Direction::BOTH.map(|way| session.streams[way.index()].pace.is_none()) {
            [false, false] => refuse(FallbackReason::RateLimited),
            wanted => Ok((maps, wanted)),
        }
    }

    fn offload(&mut self, token: Token, session: &mut Session) -> Result<Joined, Datapath> {
        let refuse = |reason| Err(Datapath::Fallback(reason));
        let (maps, wanted) = self.may_enter(session)?;
        let ward = session.seat.map_or(OWN, |seat| seat.ward);
        let Some(upstream) = &session.upstream else {
            return refuse(FallbackReason::NotTcp);
        };
        let Some(seat) = session.seat.or_else(|| self.wards[OWN].take_seat()) else {
            return refuse(FallbackReason::SlotsUsedUp);
        };
        if let Some(record) = self.wards[ward].store.record(seat.id.place).filter(|_| seat.kept) {
            record.begin();
        }
        let place = seat.id.place;
        let ends = [session.downstream.as_fd(), upstream.socket.as_fd()];
        let terms = self.terms(ward, &session.settings);
        let sent_bytes = Direction::BOTH.map(|way| sent_by_us(session, way));
        match maps.join(place, ends, &terms, sent_bytes, wanted) {
            Ok(joined) => {
                self.wards[ward].tokens[place.0 as usize] = Some(token);
                session.seat = Some(Seat { joined: true, ..seat });
                self.arm_untold();
                WorkerRow::up(&self.gauges().pairs);
                Ok(joined)
            }
            Err(error) => {
                if session.seat.is_none() {
                    self.wards[ward].give_back(place);
                }
                // sock_map_sk_state_allowed takes established sockets only.
                if ends
                    .iter()
                    .any(|end| socket::tcp_info(*end).is_ok_and(|info| !info.established))
                {
                    return refuse(FallbackReason::EarlyEnd);
                }
                log::warn!(
                    "session {}: the kernel refused to take it into the sockmap: {error}",
                    session.number
                );
                refuse(FallbackReason::KernelRefused)
            }
        }
    }

    /// On what terms the kernel has a session whose place is in this ward.
    pub(crate) fn terms(&self, ward: usize, settings: &Settings) -> Terms {
        Terms {
            now_ns: clock::now_ns(),
            backlog_bytes: settings.ebpf_backlog_size,
            window_bytes: self.limits.window_bytes,
            settable_bytes: u32::try_from(self.limits.receive_bytes.min(self.limits.send_bytes))
                .unwrap_or(u32::MAX),
            lane: self.wards[ward].reader.lane(),
        }
    }

    /// The source has ended. Whatever arrived before is with the program or waits for user space: which
    /// of the two, a look at the socket tells, and that look takes the socket lock, so it comes after
    /// the segment that carried the end. Until it does, the direction stays with the kernel.
    pub(crate) fn leave_kernel(
        &mut self,
        session: &mut Session,
        direction: Direction,
    ) -> Result<(), Trouble> {
        let side = source(direction);
        let Some(fd) = session.socket(side).map(|socket| socket.as_fd()) else {
            return Ok(());
        };
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        match nix::sys::socket::recv(fd.as_raw_fd(), &mut [0], flags) {
            Ok(0) => {
                session.stream(direction).source_ended = true;
                session.stream(direction).settle();
                self.check_received(session, direction)
            }
            Ok(_) => {
                session.stream(direction).settle();
                Ok(())
            }
            Err(Errno::EAGAIN) => Ok(()),
            Err(errno) => Err(Trouble::Socket(Failed { side, errno })),
        }
    }

    /// Once a source has ended: every byte that its TCP received was forwarded or read, and the program
    /// met nothing on the way. Anything else means that bytes were lost, and the session is reset.
    pub(crate) fn check_received(&self, session: &Session, direction: Direction) -> Result<(), Trouble> {
        let side = source(direction);
        let Some(fd) = session.socket(side).filter(|_| session.joined().is_some()) else {
            return Ok(());
        };
        let failed = |error: std::io::Error| {
            Trouble::Socket(Failed {
                side,
                errno: errno_of(&error),
            })
        };
        let received = socket::tcp_info(fd.as_fd()).map_err(failed)?.bytes_received;
        let flow = self.flow(session, direction);
        let read = session.streams[direction.index()].read_bytes;
        // The end of the stream counts as a byte (tcp_fin, tcp_rcv_nxt_update).
        if flow.flags & flow_flag::FATAL == 0 && received == read + flow.forwarded_bytes + 1 {
            return Ok(());
        }
        Err(Trouble::Integrity(format!(
            "{}: {received} bytes received with the end of stream, {read} read, {} forwarded{}{}",
            direction.name(),
            flow.forwarded_bytes,
            if flow.flags & flow_flag::FATAL == 0 {
                ""
            } else {
                "; "
            },
            flow_flag::describe(flow.flags),
        )))
    }

    /// Whether the target's TCP has taken everything that was sent to it, by the kernel or by us. Only
    /// then may its stream be ended: until then a shutdown or close would discard the backlog.
    pub(crate) fn is_settled(
        &mut self,
        session: &mut Session,
        direction: Direction,
    ) -> Result<bool, Trouble> {
        if session.joined().is_none() {
            return Ok(true);
        }
        let side = target(direction);
        let Some(fd) = session.socket(side).map(|socket| socket.as_fd()) else {
            return Ok(true);
        };
        let forwarded = self.flow(session, direction).forwarded_bytes;
        let sent = sent_by_us(session, direction) + forwarded;
        let taken = socket::written_bytes(fd, sent).map_err(|error| {
            Trouble::Socket(Failed {
                side,
                errno: errno_of(&error),
            })
        })?;
        let Some(taken) = taken else { return Ok(false) };
        let stream = session.stream(direction);
        if taken > sent {
            return Err(Trouble::Integrity(format!(
                "{}: {taken} bytes in the target's TCP, {sent} sent to it",
                direction.name()
            )));
        }
        if taken != stream.settled_bytes {
            stream.settled_bytes = taken;
            session.last_active_ms = clock::now_ms();
        }
        Ok(taken == sent)
    }

    /// When the kernel last forwarded a byte of the session, on the worker's clock; 0: never.
    pub(crate) fn kernel_active_ms(&self, session: &Session) -> u64 {
        let last = |direction| self.flow(session, direction).last_active_ns / 1_000_000;
        Direction::BOTH.into_iter().map(last).max().unwrap_or(0)
    }

    /// What the kernel counted for one direction; zeros for a session that it never had.
    pub(crate) fn flow(&self, session: &Session, direction: Direction) -> culvert_bpf::FlowState {
        match self.pair(session) {
            Some((maps, place)) => maps.flow(place, direction),
            None => Default::default(),
        }
    }

    /// Where the kernel has a session, if it does.
    pub(crate) fn pair(&self, session: &Session) -> Option<(&SlotMaps, Place)> {
        let seat = session.joined()?;
        let maps = self.wards[seat.ward].store.maps.as_deref()?;
        Some((maps, seat.id.place))
    }

    /// Cuts the ties between a session's sockets and its pair, before they are closed.
    pub(crate) fn part(&mut self, session: &Session) {
        if let Some((maps, place)) = self.pair(session) {
            maps.part(place);
        }
    }
}

/// What a direction's target was sent by user space, as its TCP counts what is acknowledged.
///
/// The SYN that opens a connection is acknowledged like a byte; that of an accepted one is not counted
/// (tcp_create_openreq_child starts behind it).
pub(crate) fn sent_by_us(session: &Session, direction: Direction) -> u64 {
    let syn = u64::from(target(direction) == Side::Upstream);
    syn + session.streams[direction.index()].written_bytes
}

/// From now on user space reads and writes the session's sockets. What the server has sent, if anything, is reported
/// when its socket is watched for that; what the client has, most often something, is found by trying.
fn begin_copying(session: &mut Session) {
    let [downstream, upstream] = &mut session.ready;
    downstream.readable = true;
    downstream.writable = true;
    upstream.writable = true;
}

/// The store of the worker's own slot, where its new sessions go.
const OWN: usize = 0;

impl Ward {
    /// Takes a place; `None`: all are in use.
    pub(crate) fn take_seat(&mut self) -> Option<Seat> {
        let place = self.places.take(&self.store.records)?;
        Some(Seat {
            ward: OWN,
            id: SessionId {
                store: self.store.id,
                place,
                generation: self.store.record(place)?.generation(),
            },
            joined: false,
            kept: false,
            stale: false,
        })
    }

    /// Gives a place back. The sockets of its pair must be closed: only then can no verdict on them be
    /// running, and the pair's counters be another's.
    pub(crate) fn give_back(&mut self, place: Place) {
        if let Some(maps) = &self.store.maps {
            maps.forget(place);
        }
        self.places.give_back(&self.store.records, place);
    }
}

fn errno_of(error: &std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(0))
}
