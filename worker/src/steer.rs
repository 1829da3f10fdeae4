//! Marks the flows of offloaded sessions for receive flow steering, so that the kernel's work for them runs
//! on this worker's CPU. Reads no byte; setting the host up is the master's.
//!
//! What receives or sends on a socket leaves its CPU in a table of the host, under the hash of the flow
//! (`sock_rps_record_flow`), and the next segment of the flow is handled there (`get_rps_cpu`; Linux 6.12). A
//! session that is copied marks its flows by that. For an offloaded one:
//!
//! - accept(2) has marked the downstream flow (`__inet_accept`); the hash was kept from the ACK that ended the
//!   handshake (`tcp_check_req`).
//! - The upstream flow's hash is known as soon as the SYN-ACK has arrived (`tcp_v4_do_rcv`), and nothing has
//!   marked it: connect(2) does not.
//! - The kworker marks a flow with its own CPU whenever it sends on the socket (`sk_psock_handle_skb`), which keeps a
//!   marked session where it is, and a strayed one where it has strayed to. A table entry belongs to the flow
//!   that wrote it last, and a peer on this host changes its hash after a timeout (`sk_rethink_txhash`): so
//!   active sessions are marked anew every `ebpf_timer_period`.

use std::os::fd::AsRawFd;

use culvert_shared::config::FlowSteering;
use nix::sys::socket::{MsgFlags, recv};

use crate::clock;
use crate::event_loop::Worker;
use crate::session::{Datapath, Session};
use crate::table::Side;

impl Worker {
    /// Marks the upstream flow of a session that has just entered the kernel, if flows are to be steered.
    pub(crate) fn mark_upstream(&self, session: &Session) {
        if self.is_steered(session) {
            mark(session, Side::Upstream);
        }
    }

    /// Marks both flows of a session again, unless no byte has moved for a while.
    pub(crate) fn mark_again(&self, session: &Session) {
        if !self.is_steered(session) {
            return;
        }
        if self.kernel_active_ms(session) + 2 * self.marking_period_ms(session) >= clock::now_ms() {
            mark(session, Side::Downstream);
            mark(session, Side::Upstream);
        }
    }

    /// When a session is to be marked again: all sessions at the same time, so that any number of them wakes
    /// the worker once a period.
    pub(crate) fn marking_due_ms(&self, session: &Session) -> Option<u64> {
        if !self.is_steered(session) {
            return None;
        }
        Some((clock::now_ms() + 1).next_multiple_of(self.marking_period_ms(session)))
    }

    fn is_steered(&self, session: &Session) -> bool {
        self.config.flow_steering != FlowSteering::Off && session.datapath == Datapath::Sockmap
    }

    fn marking_period_ms(&self, session: &Session) -> u64 {
        (session.settings.ebpf_timer_period.as_millis() as u64).max(1)
    }
}

/// Leaves this CPU's number in the table, for the flow of one socket. The cheapest call that does it is a
/// recv(2) of no bytes: the flow is marked before the protocol is asked, and for a socket in a sockmap that
/// returns at once, without the socket lock (`inet_recvmsg`, `tcp_bpf_recvmsg`).
fn mark(session: &Session, side: Side) {
    if let Some(socket) = session.socket(side) {
        // Whatever it answers: what is wrong with a socket is found by those who use it.
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        let _ = recv(socket.as_raw_fd(), &mut [], flags);
    }
}
