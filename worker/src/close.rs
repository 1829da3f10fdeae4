//! The way out of a session: its sockets end or reset, its slot and pair are freed, the board and the log
//! are told who ended it and why.

use std::os::fd::AsFd;
use std::sync::atomic::AtomicU64;

use culvert_shared::client::Shown;
use culvert_shared::counters::{Board, CloseReason, WorkerRow};
use culvert_shared::ids::Direction;
use culvert_shared::sys::socket::{is_past_reset, reset, reset_on_close};

use crate::access_line::Carried;
use crate::clock;
use crate::event_loop::Worker;
use crate::session::{Datapath, Session, Way, target};
use crate::table::{Side, Token};

impl Worker {
    /// Ends a session that was taken out of the table.
    pub(crate) fn close(&mut self, token: Token, mut session: Session, reason: CloseReason) {
        self.http_connections -= usize::from(session.http.is_some());
        self.stop_keeping(&session);
        self.leave_queue(&session);
        self.leave_naming(token, &session);
        for side in [Side::Downstream, Side::Upstream] {
            let Some(socket) = session.socket(side) else {
                continue;
            };
            if self.ends_in_order(&session, side, reason) {
                // A failure leaves the reset in place, which errs on the safe side.
                let _ = reset_on_close(socket.as_fd(), false);
            } else if !is_past_reset(socket.as_fd()) && session.seat.is_some_and(|seat| seat.kept) {
                // The master has the socket too, so closing ours alone would not reset it. Unix sockets know no
                // reset; they end when the master closes them.
                let _ = reset(socket.as_fd());
            }
        }
        if !session.is_status {
            self.account(&session, reason);
        } else if matches!(
            reason,
            CloseReason::Denied | CloseReason::LimitConn | CloseReason::LimitRate
        ) {
            self.board[0].count_close(Some(session.listener), reason);
        }
        self.tally.give_back(&mut session);
        self.part(&session);
        let seat = session.seat.take();
        drop(session);
        if let Some(seat) = seat {
            self.free_seat(seat);
        }
        self.table.release(token);
        self.make_room();
    }

    fn account(&mut self, session: &Session, reason: CloseReason) {
        let board = &self.board[0];
        let carried = Direction::BOTH.map(|direction| {
            let stream = &session.streams[direction.index()];
            Carried {
                kernel: self.flow(session, direction).forwarded_bytes,
                read: stream.read_bytes,
                written: stream.written_bytes,
            }
        });
        let pauses: u32 = Direction::BOTH
            .map(|direction| self.flow(session, direction).pauses)
            .iter()
            .sum();
        // What this program itself says to one side, a PROXY header, is none of the other's.
        let [to_upstream, to_downstream] = carried;
        let of_client = [to_upstream.received(), to_downstream.sent()];
        let of_peer = [to_upstream.sent(), to_downstream.received()];
        let count = |counters: &[AtomicU64; 2], bytes| {
            counters
                .iter()
                .zip(bytes)
                .for_each(|(counter, bytes)| Board::add(counter, bytes));
        };
        count(&board.listeners[session.listener].bytes, of_client);
        if let Some(row) = session.upstream.as_ref().and_then(|upstream| upstream.row) {
            count(&board.peers[row].bytes, of_peer);
            self.free_place(row);
        }
        board.count_close(Some(session.listener), reason);
        let now_ms = clock::now_ms();
        let lasted_ms = now_ms.saturating_sub(session.started_ms);
        if session.datapath != Datapath::Pending {
            self.brevity
                .note(session.listener, of_client.iter().sum(), now_ms);
        }
        board.session_duration.count(1000 * lasted_ms);
        // Last: whoever sees that the session is gone sees all that it counts for.
        WorkerRow::down(&self.gauges().sessions);
        WorkerRow::down(&self.gauges().listener_active[session.listener]);
        // The access log says the same, and where there is one, that is where it is looked for.
        let level = match session.settings.access_log {
            Some(_) => log::Level::Debug,
            None => log::Level::Info,
        };
        if log::log_enabled!(level) {
            log::log!(
                level,
                "session {}: client {} listener {} upstream {} closed: {}; datapath {}, \
                 to_upstream {} sockmap {} relay, to_downstream {} sockmap {} relay bytes, {pauses} pauses, {} ms",
                session.number,
                session.client(),
                Shown(session.ends.local),
                session
                    .upstream
                    .as_ref()
                    .map_or(String::from("-"), |upstream| upstream.address.to_string()),
                reason.name(),
                session.datapath.name(),
                to_upstream.kernel,
                to_upstream.written,
                to_downstream.kernel,
                to_downstream.written,
                lasted_ms,
            );
        }
        self.log_session(session, reason, carried, u64::from(pauses));
    }

    /// Whether a socket may end with FIN: only when the stream that it carries to its reader is complete.
    /// A status document's reader may keep its own side open as long as it likes.
    fn ends_in_order(&self, session: &Session, side: Side, reason: CloseReason) -> bool {
        let complete = Direction::BOTH.into_iter().any(|direction| {
            target(direction) == side && session.streams[direction.index()].way == Way::Ended
        });
        complete
            && (session.upstream.is_none()
                || matches!(reason, CloseReason::Finished | CloseReason::HalfClosed))
    }
}
