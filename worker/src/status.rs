//! The status document (`ebpf_status_return`): one JSON object, then the end of the stream.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use culvert_shared::busy::{BUSIEST, BusySession};
use culvert_shared::client::Shown;
use culvert_shared::config::Address;
use culvert_shared::counters::{CloseReason, FallbackReason, GroupRow, PeerRow};
use culvert_shared::health::Outcome;
use culvert_shared::ids::Direction;
use culvert_shared::members::NameState;
use serde_json::{Map, Value, json};

use crate::balance::{Group, Member, Scene};
use crate::clock;
use crate::drive::Next;
use crate::event_loop::Worker;
use crate::session::{Datapath, Session};
use crate::table::{Side, Token};

/// Places in the sockmap that one session takes: one for each socket.
const SLOTS_PER_PAIR: u32 = 2;

impl Worker {
    /// Makes the session write the document and end. What its client sends is read and dropped: closing
    /// with unread data would reset the connection under the document.
    pub(crate) fn answer_status(&mut self, token: Token, session: &mut Session) -> Next {
        session.datapath = Datapath::Relay;
        session.ready[Side::Downstream.index()].readable = true;
        session.ready[Side::Downstream.index()].writable = true;
        self.refresh_groups();
        let mut text = self.status().to_string();
        text.push('\n');
        let stream = session.stream(Direction::ToDownstream);
        stream.pending.extend(text.as_bytes());
        stream.source_ended = true;
        self.stream(token, session)
    }

    /// The document with the busiest sessions of all workers, as far as these have told of them.
    pub(crate) fn status_with_sessions(&self) -> Value {
        let mut status = self.status();
        let now_ms = clock::now_ms();
        let mut rates = [0, 0];
        let mut sessions = Vec::new();
        for (row, worker) in self.board[0].live_workers() {
            let Some((told, of_worker)) = self.lookout.told(row, now_ms) else {
                continue;
            };
            (0..2).for_each(|way| rates[way] += of_worker[way]);
            let slot = worker.slot.load(Relaxed);
            sessions.extend(told.into_iter().map(|session| (slot, session)));
        }
        let moved = |bytes: [u64; 2]| bytes[0].saturating_add(bytes[1]);
        sessions.sort_by_key(|(_, session)| std::cmp::Reverse((moved(session.rates), moved(session.bytes))));
        sessions.truncate(BUSIEST);
        let busiest = sessions
            .iter()
            .map(|(slot, session)| self.session_status(*slot, session, now_ms));
        status["rates"] = by_direction(|way| rates[way.index()]);
        status["busiest"] = busiest.collect();
        status
    }

    fn session_status(&self, slot: u32, session: &BusySession, now_ms: u64) -> Value {
        let listener = self
            .rows
            .iter()
            .position(|(row, _)| *row == session.listener as usize);
        let wanted = session.peer.map(|row| row as usize);
        let peer = wanted.and_then(|row| self.groups.iter().find_map(|group| group.address_of(row)));
        json!({
            "session": session.number,
            "worker": slot,
            "client": Shown(session.client).to_string(),
            "listener": listener.map(|at| self.addresses[at].to_string()),
            "peer": peer.map(ToString::to_string),
            "datapath": if session.in_kernel { "sockmap" } else { "relay" },
            "age_seconds": now_ms.saturating_sub(session.started_ms) / 1000,
            "bytes": by_direction(|way| session.bytes[way.index()]),
            "rates": by_direction(|way| session.rates[way.index()]),
            "pauses": session.pauses,
        })
    }

    /// Worker slots in which nobody takes new sessions.
    pub(crate) fn slots_without_worker(&self) -> Vec<usize> {
        let serves = |slot: &usize| {
            self.board[0].live_workers().any(|(_, row)| {
                row.slot.load(Relaxed) as usize == *slot
                    && row.ready.load(Relaxed) != 0
                    && row.draining.load(Relaxed) == 0
            })
        };
        let slots = 0..self.config.worker_cpus.len();
        slots.filter(|slot| !serves(slot)).collect()
    }

    fn status(&self) -> Value {
        let board = &self.board[0];
        let live = || board.live_workers().map(|(_, row)| row);
        let now_ms = clock::now_ms();
        let (active, offloaded) = (board.active(now_ms), board.offloaded(now_ms));
        let workers: Vec<Value> = live()
            .map(|row| {
                let totals = self.totals.as_ref().zip(row.slot_number());
                let slot = totals.map(|(totals, number)| totals.slot(number));
                json!({
                    "slot": row.slot.load(Relaxed),
                    "pid": row.pid.load(Relaxed),
                    "generation": row.generation.load(Relaxed),
                    "draining": row.draining.load(Relaxed) != 0,
                    "cpus": row.cpu_list(),
                    "accepted": load(&row.accepted),
                    "sessions": row.sessions.load(Relaxed),
                    "offloaded": row.offloaded.load(Relaxed),
                    "slots_used": SLOTS_PER_PAIR * row.pairs.load(Relaxed),
                    "slots_total": SLOTS_PER_PAIR * row.pairs_total.load(Relaxed),
                    "pauses": slot.map_or(0, |slot| slot.pauses),
                    "lost_events": slot.map_or(0, |slot| slot.lost_events),
                    "backlog_bytes": slot.map_or(0, |slot| slot.held_bytes),
                    "backlog_limit_bytes": slot.map_or(0, |slot| slot.limit_bytes),
                })
            })
            .collect();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "generation": load(&board.generation),
            "uptime_seconds": now_ms.saturating_sub(load(&board.started_ms)) / 1000,
            "datapath": if self.wards[0].store.maps.is_some() { "sockmap" } else { "relay" },
            "datapath_reason": self.relay_reason,
            "confinement": crate::confine::status(),
            "accept": self.intake.chosen_by(),
            "accept_reason": self.intake.reason(),
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
                "total_copied_first": load(&board.sessions_copied_first),
                "kept": load(&board.kept),
                "unkept": load(&board.unkept),
                "adopted": load(&board.adopted),
            },
            "bytes": {
                "sockmap": by_direction(|way| self.totals.as_ref().map_or(0, |totals| totals.forwarded_bytes(way))),
                "relay": by_direction(|way| load(&board.relay_bytes[way.index()])),
            },
            "gathers": load(&board.gathers),
            "pauses": self.totals.as_ref().map_or(0, |totals| totals.pauses()),
            "cpus": self.cpu_status(),
            "fallbacks": by_reason(FallbackReason::ALL.iter().map(|reason| reason.name()), &board.fallbacks),
            "closes": by_reason(CloseReason::ALL.iter().map(|reason| reason.name()), &board.closes),
            "hosts": {
                "sessions": load(&board.hosts.sessions),
                "remembered": load(&board.hosts.remembered),
                "lookups": load(&board.hosts.lookups),
                "failed": load(&board.hosts.failed),
                "refused": load(&board.hosts.refused),
            },
            "access_log": {
                "written": load(&board.access_lines_written),
                "dropped": load(&board.access_lines_dropped),
            },
            "log_lines_dropped": load(&board.log_lines_dropped),
        })
    }

    /// Bytes that the kernel forwarded on each CPU, together and by direction.
    fn cpu_status(&self) -> Vec<Value> {
        let totals = self.totals.iter().flat_map(|totals| totals.by_cpu());
        totals
            .map(|(cpu, bytes)| {
                json!({
                    "cpu": cpu,
                    "sockmap_bytes": bytes.iter().sum::<u64>(),
                    "bytes": by_direction(|way| bytes[way.index()]),
                })
            })
            .collect()
    }

    fn listener_status(&self) -> Vec<Value> {
        let board = &self.board[0];
        // Not its sockets: a worker that drains has closed them.
        let one = |((row_number, _), address): (&(usize, usize), &Address)| {
            let row = &board.listeners[*row_number];
            json!({
                "address": address.to_string(),
                "accepted": load(&row.accepted),
                "active": board.listener_active(*row_number, clock::now_ms()),
                "bytes": by_direction(|way| load(&row.bytes[way.index()])),
            })
        };
        self.rows.iter().zip(&self.addresses).map(one).collect()
    }

    fn upstream_status(&self) -> Vec<Value> {
        let scene = self.scene();
        let groups = self.config.upstreams.iter().zip(&self.groups);
        groups
            .zip(self.members.iter().zip(&self.group_rows))
            .enumerate()
            .map(|(index, ((config, group), (set, group_row)))| {
                let is_checked = config.check.is_some();
                let peers =
                    (0..group.members().len()).map(|peer| peer_status(&scene, (group, is_checked), peer));
                let gone = group
                    .former()
                    .iter()
                    .filter_map(|(address, row)| former_status(&scene, address, *row));
                let row = &scene.board.groups[*group_row];
                let mut status = json!({
                    "name": config.name,
                    "balance": self.config.balance_of(config),
                    "refused": load(&row.refused),
                    "queue": self.queue_status(index),
                    "peers": peers.chain(gone).collect::<Vec<Value>>(),
                });
                if !config.names.is_empty() {
                    let names = config.names.iter().enumerate();
                    let names = names.map(|(index, named)| name_status(&named.to_string(), set.state(index)));
                    status["names"] = names.collect();
                    status["former"] = former_sum(&scene, row, group.former());
                }
                status
            })
            .collect()
    }
}

/// What checks found of a peer; null: it is not checked.
fn check_status(row: &PeerRow, peer: &Member, is_checked: bool) -> Value {
    if !is_checked || peer.down {
        return Value::Null;
    }
    json!({
        "passed": load(&row.check.passed),
        "failed": load(&row.check.failed),
        "last": row.check.last().map(Outcome::name),
    })
}

fn peer_status(scene: &Scene<'_>, (group, is_checked): (&Group, bool), index: usize) -> Value {
    let peer = &group.members()[index];
    let counters: &PeerRow = &scene.board.peers[peer.row];
    json!({
        "address": peer.address.to_string(),
        "weight": peer.weight,
        "backup": peer.backup,
        "state": group.health(scene, index).name(),
        "active": scene.board.peer_active(peer.row, scene.now_ms),
        "max_conns": peer.max_conns(),
        "fails": counters.fails.load(Relaxed),
        "connected": load(&counters.connected),
        "connect_failures": counters.connect_failures.sum(),
        "connect_time_us": load(&counters.connect_us),
        "check": check_status(counters, peer, is_checked),
        "bytes": by_direction(|way| load(&counters.bytes[way.index()])),
    })
}

/// A peer that its name does not stand for any more is shown as long as it has sessions.
fn former_status(scene: &Scene<'_>, address: &Address, row: usize) -> Option<Value> {
    let active = scene.board.peer_active(row, scene.now_ms);
    let counters = &scene.board.peers[row];
    (active > 0).then(|| {
        json!({
            "address": address.to_string(),
            "weight": 0,
            "backup": false,
            "state": "gone",
            "active": active,
            "max_conns": 0,
            "fails": 0,
            "connected": load(&counters.connected),
            "connect_failures": counters.connect_failures.sum(),
            "connect_time_us": load(&counters.connect_us),
            "bytes": by_direction(|way| load(&counters.bytes[way.index()])),
        })
    })
}

/// What all peers that names stood for have counted: those with rows of their own, and those before them.
fn former_sum(scene: &Scene<'_>, group: &GroupRow, former: &[(Address, usize)]) -> Value {
    let rows = || former.iter().map(|(_, row)| &scene.board.peers[*row]);
    let sum = |folded: &AtomicU64, of: &dyn Fn(&PeerRow) -> u64| load(folded) + rows().map(of).sum::<u64>();
    json!({
        "connected": sum(&group.former.connected, &|row| load(&row.connected)),
        "connect_failures": group.former.connect_failures.sum() + rows().map(|row| row.connect_failures.sum()).sum::<u64>(),
        "bytes": by_direction(|way| {
            let way = way.index();
            sum(&group.former.bytes[way], &|row| load(&row.bytes[way]))
        }),
    })
}

fn name_status(name: &str, state: NameState) -> Value {
    json!({
        "name": name,
        "lookups": state.lookups,
        "failures": state.failures,
        "failing": state.failing,
        "last_lookup_unix_ms": state.last_lookup_unix_ms,
    })
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
