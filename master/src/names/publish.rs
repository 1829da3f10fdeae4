//! Brings what names stand for to the workers of a generation: each address gets its row on the board, and the set of
//! its upstream is written anew when it has changed.

use std::net::SocketAddr;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use culvert_shared::config::Upstream;
use culvert_shared::counters::Board;
use culvert_shared::members::{MAX_FORMER, MAX_PRESENT, Member};

use super::{Found, Names};
use crate::generation::Generation;
use crate::rows::Gone;
use crate::supervise::Master;

/// Peers of one upstream that are gone and have no sessions, and yet keep a row of their own: the most recent
/// deployments of a service. What others have counted goes into their upstream's sum.
const IDLE_FORMERS_MAX: usize = 64;

/// Addresses that a log line names.
const LOGGED_MAX: usize = 16;

impl Master {
    /// Reads what name servers have said, and tells the workers.
    pub fn look_up(&mut self, now: Instant) {
        self.names.hosts.advance(now, &self.board[0].hosts);
        for (owner, question, answer) in self.names.hosts.answers() {
            if let Some(worker) = self.workers.iter_mut().find(|worker| worker.owner == owner) {
                worker.answer(question, answer);
            }
        }
        if self.is_ending() {
            return;
        }
        if self.names.advance(now) {
            self.publish_names(now);
        }
    }

    /// Tells the workers of the generation that serves, or is about to, what names stand for.
    pub fn publish_names(&mut self, now: Instant) {
        let generation = match &mut self.pending {
            Some(pending) => &mut pending.generation,
            None => &mut self.current,
        };
        generation.publish(&mut self.names, &self.board[0], now);
    }

    /// Says which names are of interest: those of every generation that serves or is about to.
    pub fn want_names(&mut self, now: Instant) {
        let pending = self.pending.iter().map(|pending| &*pending.generation.config);
        self.names.want(pending.chain([&*self.current.config]), now);
    }
}

impl Generation {
    /// Writes the sets that have changed.
    pub fn publish(&mut self, names: &mut Names, board: &Board, now: Instant) {
        let config = std::sync::Arc::clone(&self.config);
        for (index, upstream) in config.upstreams.iter().enumerate() {
            if upstream.names.is_empty() {
                continue;
            }
            let mut found: Vec<(usize, Found)> = Vec::new();
            for (name, named) in upstream.names.iter().enumerate() {
                for peer in names.peers_of(named, now) {
                    let is_known = found.iter().any(|(_, other)| other.address == peer.address);
                    if !is_known && found.len() < MAX_PRESENT {
                        found.push((name, peer));
                    }
                }
                self.members[index].set_state(name, names.state_of(named));
            }
            self.publish_upstream(index, upstream, &found, board);
        }
    }

    fn publish_upstream(
        &mut self,
        index: usize,
        upstream: &Upstream,
        found: &[(usize, Found)],
        board: &Board,
    ) {
        let mut gone = Gone {
            board,
            now_ms: crate::supervise::now_ms(),
            present: self.present.iter().flatten().map(|member| member.row).collect(),
        };
        let before = &self.present[index];
        let mut present = Vec::with_capacity(found.len());
        let mut missing = 0;
        for (name, peer) in found {
            let Some(row) = self.rows.found_row(&upstream.name, peer.address, &gone) else {
                missing += 1;
                continue;
            };
            gone.present.push(row);
            if !before.iter().any(|member| member.row == row) {
                // Whose turn it is was settled without it.
                board.peers[row].turn.store(0, Relaxed);
            }
            present.push(Member {
                row,
                name: *name,
                address: peer.address,
                weight: peer.weight,
                backup: peer.backup,
                former: false,
            });
        }
        if present == *before && self.members[index].version() != 0 {
            return;
        }
        log_change(&upstream.name, before, &present, missing);
        let is_present = |row: usize| present.iter().any(|member| member.row == row);
        let others = gone
            .present
            .iter()
            .filter(|row| !before.iter().any(|member| member.row == **row));
        let gone = Gone {
            present: others
                .copied()
                .chain(present.iter().map(|member| member.row))
                .collect(),
            ..gone
        };
        self.rows.fold(&upstream.name, IDLE_FORMERS_MAX, &gone);
        let mut all = present.clone();
        let mut former: Vec<Member> = self
            .rows
            .found_of(&upstream.name)
            .filter(|(_, row)| !is_present(*row))
            .map(|(address, row)| Member {
                row,
                name: 0,
                address,
                weight: 1,
                backup: false,
                former: true,
            })
            .collect();
        // Where there is no room for all, those with sessions are shown.
        former.sort_by_key(|member| board.peer_active(member.row, gone.now_ms) == 0);
        all.extend(former.into_iter().take(MAX_FORMER));
        self.members[index].write(&all);
        self.present[index] = present;
    }
}

fn log_change(upstream: &str, before: &[Member], now: &[Member], missing: usize) {
    if missing > 0 {
        log::error!(
            "upstream {upstream}: {missing} addresses get no sessions, there are no rows left for their counters: restart \
             the program, or use fewer peers"
        );
    }
    let addresses =
        |members: &[Member]| -> Vec<SocketAddr> { members.iter().map(|member| member.address).collect() };
    if now.is_empty() && before.is_empty() {
        return log::warn!("upstream {upstream}: its names have no addresses yet, it has no peers by them");
    }
    log::info!(
        "upstream {upstream}: its names stand for {} now, before for {}",
        listed(&addresses(now)),
        listed(&addresses(before))
    );
}

fn listed(addresses: &[SocketAddr]) -> String {
    let shown: Vec<String> = addresses
        .iter()
        .take(LOGGED_MAX)
        .map(ToString::to_string)
        .collect();
    match addresses.len().saturating_sub(LOGGED_MAX) {
        0 if shown.is_empty() => "nothing".to_owned(),
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}
