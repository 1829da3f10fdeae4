//! Connections that hear nothing until something is read from them ([`TcpInfo::is_deaf`]). Where both of a session's are so, each waits
//! for the other: its source is held back because too much is outstanding in the other one, which does not hear that it is
//! acknowledged. What breaks the circle is to read one of them, whatever the other one has outstanding.
//!
//! Two streams of small pieces bring it about that cross: as many as a window allows take more room than there is, and with
//! each of them another is allowed (tcp_select_window rounds up what it must not shrink, 6.12). Linux 6.17 and later have it, up to where
//! "tcp: implement RFC 7323 window retraction receiver requirements" (0e24d17bd966) is in.
//!
//! [`TcpInfo::is_deaf`]: culvert_shared::sys::socket::TcpInfo::is_deaf

use std::os::fd::AsFd;

use culvert_shared::ids::Direction;
use culvert_shared::message::Buffer;

use crate::drive::Next;
use crate::event_loop::Worker;
use crate::session::{Session, Way, target};
use crate::table::Token;

impl Worker {
    /// Reads the source of a direction, which is deaf. One that the kernel holds back is copied for a while: then it goes no further than
    /// its target's buffer. One that is copied already is tried although its target has not said that it has room, for which
    /// a third of its buffer would have to be empty (sk_stream_is_writeable); where nothing of it is, that grows.
    pub(crate) fn read_deaf(&mut self, token: Token, session: &mut Session, direction: Direction) -> Next {
        if self.flow(session, direction).paused {
            return self.gather(token, session, direction);
        }
        if session.stream(direction).way != Way::Relay {
            return self.wait(session);
        }
        let before = session.stream(direction).written_bytes;
        session.try_both();
        let next = self.stream(token, session);
        let (_, given) = self.given_sizes(session, target(direction));
        if session.stream(direction).written_bytes == before
            && given.is_none()
            && let Some(socket) = session.socket(target(direction))
        {
            let bytes = culvert_bpf::largest_send_buffer(session.settings.ebpf_backlog_size) as usize;
            // What the master has no room to hear is said again: this is called by the clock until the circle is broken.
            let _ = self.size(socket.as_fd(), Buffer::Send, bytes);
        }
        next
    }
}
