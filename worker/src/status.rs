//! The status document (`ebpf_status_return`): one JSON object, then the end of the stream.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use culvert_shared::config::Address;
use culvert_shared::counters::{CloseReason, FallbackReason, PeerRow};
use culvert_shared::ids::Direction;
use serde_json::{Map, Value, json};

use crate::drive::Next;
use crate::event_loop::Worker;
use crate::session::{Datapath, Session};
use crate::sockets::Interest;
use crate::table::{Side, Token};

/// Places in the sockmap that one session takes: one for each socket.
const SLOTS_PER_PAIR: u32 = 2;

impl Worker {
    /// Makes the session write the document and end. What its client sends is read and dropped: closing
    /// with unread data would reset the connection under the document.
    pub(crate) fn answer_status(&mut self, token: Token, session: &mut Session) -> Next {
        if self.attend(token, session, Interest::Data).is_err() {
            return Next::Close(CloseReason::Resource);
        }
        session.datapath = Datapath::Relay;
        session.ready[Side::Downstream.index()].readable = true;
        session.ready[Side::Downstream.index()].writable = true;
        let mut text = self.status().to_string();
        text.push('\n');
        let stream = session.stream(Direction::ToDownstream);
        stream.pending.extend(text.as_bytes());
        stream.source_ended = true;
        self.stream(token, session)
    }

    fn status(&self) -> Value {
        let board = &self.board[0];
        let now_unix_ms = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |time| time.as_millis() as u64);
        let live = || board.live_workers().map(|(_, row)| row);
        let active: u64 = live().map(|row| u64::from(row.sessions.load(Relaxed))).sum();
        let offloaded: u64 = live().map(|row| u64::from(row.offloaded.load(Relaxed))).sum();
        let workers: Vec<Value> = live()
            .map(|row| {
                json!({
                    "slot": row.slot.load(Relaxed),
                    "pid": row.pid.load(Relaxed),
                    "generation": row.generation.load(Relaxed),
                    "draining": row.draining.load(Relaxed) != 0,
                    "cpus": row.cpu_list(),
                    "sessions": row.sessions.load(Relaxed),
                    "offloaded": row.offloaded.load(Relaxed),
                    "slots_used": SLOTS_PER_PAIR * row.pairs.load(Relaxed),
                    "slots_total": SLOTS_PER_PAIR * row.pairs_total.load(Relaxed),
                })
            })
            .collect();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "generation": load(&board.generation),
            "uptime_seconds": now_unix_ms.saturating_sub(load(&board.started_unix_ms)) / 1000,
            "datapath": if self.wards[0].store.maps.is_some() { "sockmap" } else { "relay" },
            "datapath_reason": self.relay_reason,
            "workers": workers,
            "worker_restarts": load(&board.worker_restarts),
            "reloads": {
                "succeeded": load(&board.reloads_succeeded),
                "failed": load(&board.reloads_failed),
            },
            "listeners": self.listener_status(),
            "upstreams": self.upstream_status(),
            "sessions": {
                "active": active,
                "offloaded": offloaded,
                "relayed": active.saturating_sub(offloaded),
                "total": load(&board.sessions),
                "total_offloaded": load(&board.sessions_offloaded),
                "kept": load(&board.kept),
                "adopted": load(&board.adopted),
            },
            "bytes": {
                "sockmap": by_direction(|way| self.totals.as_ref().map_or(0, |totals| totals.forwarded_bytes(way))),
                "relay": by_direction(|way| load(&board.relay_bytes[way.index()])),
            },
            "pauses": load(&board.pauses),
            "cpus": self.cpu_status(),
            "fallbacks": by_reason(FallbackReason::ALL.iter().map(|reason| reason.name()), &board.fallbacks),
            "closes": by_reason(CloseReason::ALL.iter().map(|reason| reason.name()), &board.closes),
            "log_lines_dropped": load(&board.log_lines_dropped),
        })
    }

    /// Bytes that the kernel forwarded on each CPU.
    fn cpu_status(&self) -> Vec<Value> {
        let totals = self.totals.iter().flat_map(|totals| totals.by_cpu());
        totals
            .map(|(cpu, bytes)| json!({ "cpu": cpu, "sockmap_bytes": bytes }))
            .collect()
    }

    fn listener_status(&self) -> Vec<Value> {
        let board = &self.board[0];
        let one = |listener: &crate::accept::Listening| {
            let row = &board.listeners[listener.row];
            json!({
                "address": listener.address.to_string(),
                "accepted": load(&row.accepted),
                "active": board.listener_active(listener.row),
                "bytes": by_direction(|way| load(&row.bytes[way.index()])),
            })
        };
        self.listeners.iter().map(one).collect()
    }

    fn upstream_status(&self) -> Vec<Value> {
        let groups = self.config.upstreams.iter().zip(&self.peer_rows);
        groups
            .map(|(group, rows)| {
                let peers = group.peers.iter().zip(rows);
                let peers: Vec<Value> = peers
                    .map(|(peer, row)| self.peer_status(&peer.address, peer.weight, *row))
                    .collect();
                json!({ "name": group.name, "peers": peers })
            })
            .collect()
    }

    fn peer_status(&self, address: &Address, weight: u32, row: usize) -> Value {
        let peer: &PeerRow = &self.board[0].peers[row];
        json!({
            "address": address.to_string(),
            "weight": weight,
            "active": self.board[0].peer_active(row),
            "connected": load(&peer.connected),
            "connect_failures": load(&peer.connect_failures),
            "bytes": by_direction(|way| load(&peer.bytes[way.index()])),
        })
    }
}

fn load(counter: &AtomicU64) -> u64 {
    counter.load(Relaxed)
}

fn by_direction(bytes: impl Fn(Direction) -> u64) -> Value {
    Direction::BOTH
        .into_iter()
        .map(|way| (way.name().to_owned(), json!(bytes(way))))
        .collect::<Map<_, _>>()
        .into()
}

fn by_reason(names: impl Iterator<Item = &'static str>, counters: &[AtomicU64]) -> Value {
    names
        .zip(counters)
        .map(|(name, counter)| (name.to_owned(), json!(load(counter))))
        .collect::<Map<_, _>>()
        .into()
}
