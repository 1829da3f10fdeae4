//! What the master hears from a worker over its control socket, in turns. What a message means for a session is not
//! known here (`keeper.rs`).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use culvert_shared::message::ToMaster;
use culvert_shared::sys::fdpass;
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{getsockopt, setsockopt, sockopt};

use super::{State, Worker};

/// What is heard from a worker in one turn of the master's loop: one that never stops talking is to keep it from nothing
/// else.
const MESSAGES_AT_ONCE: usize = 64;

impl Worker {
    /// The socket to wait on for [`Worker::hear`].
    pub fn control(&self) -> Option<BorrowedFd<'_>> {
        self.control.as_ref().map(AsFd::as_fd)
    }

    /// What the worker says next of its sessions, with the sockets that come along; `None`: nothing now, or enough for
    /// this turn.
    pub fn hear(&mut self, now: Instant) -> Option<(ToMaster, Vec<OwnedFd>)> {
        while let Some(control) = &self.control {
            if self.heard == MESSAGES_AT_ONCE {
                return None;
            }
            self.heard += 1;
            match fdpass::receive(control.as_fd()) {
                Err(Errno::EAGAIN) => return None,
                Err(Errno::EINTR) => {}
                Ok(received) if !received.message.is_empty() => {
                    received.descriptors.iter().for_each(never_wait);
                    match ToMaster::decode(&received.message) {
                        Some(ToMaster::Ready) => {
                            self.was_ready = true;
                            if self.state == State::Starting {
                                self.state = State::Serving;
                            }
                        }
                        Some(message) => return Some((message, received.descriptors)),
                        None => log::error!(
                            "worker {} (process {}) sent an unknown message",
                            self.slot,
                            self.pid
                        ),
                    }
                }
                Ok(_) | Err(_) => {
                    // Most likely it is dying. It cannot be steered any more, so make sure of that.
                    self.control = None;
                    self.stop_by(now);
                }
            }
        }
        None
    }

    /// Lets more be heard in this turn, if there may be more.
    pub fn hear_on(&mut self) -> bool {
        std::mem::take(&mut self.heard) == MESSAGES_AT_ONCE
    }
}

/// Sees to it that closing a socket that a worker has sent does not hold up the master: with SO_LINGER set to a time,
/// whoever closes it last waits until its peer has everything, or for that long (inet_release, tcp_close).
pub fn never_wait(socket: &OwnedFd) {
    if let Ok(linger) = getsockopt(socket, sockopt::Linger)
        && linger.l_onoff != 0
        && linger.l_linger != 0
    {
        let at_once = libc::linger {
            l_linger: 0,
            ..linger
        };
        let _ = setsockopt(socket, sockopt::Linger, &at_once);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::worker;
    use super::*;
    use crate::testing;

    #[test]
    fn a_worker_that_never_stops_talking_is_listened_to_in_turns() {
        for message in [&b"R"[..], b"?", b"F"] {
            let (mut worker, theirs, now) = worker();
            let mut sent = 0;
            while fdpass::send(theirs.as_fd(), message, &[]).is_ok() {
                sent += 1;
            }
            assert!(sent > MESSAGES_AT_ONCE);
            while worker.hear(now).is_some() {}
            assert_eq!(worker.heard, MESSAGES_AT_ONCE);
            assert!(fdpass::send(theirs.as_fd(), message, &[]).is_ok(), "{message:?}");
            worker.advance(now);
            assert_eq!(worker.heard, 0);
            let mut turns = 0;
            while worker.hear_on() || turns == 0 {
                while worker.hear(now).is_some() {}
                turns += 1;
            }
            assert_eq!(turns, 1 + (sent + 1 - MESSAGES_AT_ONCE) / MESSAGES_AT_ONCE);
        }
    }

    #[test]
    fn a_socket_whose_close_would_wait_for_its_peer_holds_up_nobody() {
        let (mut worker, theirs, now) = worker();
        let (socket, _peer) = testing::lingering();
        fdpass::send(theirs.as_fd(), &ToMaster::Ready.encode(), &[socket.as_fd()]).unwrap();
        drop(socket);
        worker.hear(now);
        assert!(now.elapsed() < testing::LINGER / 2, "{:?}", now.elapsed());
    }
}
