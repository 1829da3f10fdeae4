//! Which row of the board belongs to which listener and peer. A name keeps its row as long as the
//! program runs, whatever reloads come, so its counters never fall and never mix with another's.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;

use anyhow::{Error, Result, anyhow};
use culvert_shared::config::Config;
use culvert_shared::counters::{Board, MAX_GROUPS, MAX_LISTENERS, MAX_PEERS};
use serde::{Deserialize, Serialize};

/// The rows given so far.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Rows {
    listeners: HashMap<String, usize>,
    peers: HashMap<String, usize>,
    groups: HashMap<String, usize>,
    /// Peers that were found by name, for each upstream.
    found: BTreeMap<String, BTreeMap<SocketAddr, usize>>,
    /// Rows of peers that were given back.
    spare: Vec<usize>,
}

/// The rows of one configuration.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Assigned {
    /// For each server, for each of its listeners.
    pub listeners: Vec<Vec<usize>>,
    /// For each upstream, for each of its peers.
    pub peers: Vec<Vec<usize>>,
    /// For each upstream.
    pub groups: Vec<usize>,
}

impl Rows {
    /// The rows of all listeners that there ever were.
    pub fn listeners(&self) -> impl Iterator<Item = usize> {
        self.listeners.values().copied()
    }

    /// Gives each listener and each peer of the configuration its row.
    ///
    /// # Errors
    /// All rows are taken.
    pub fn assign(&mut self, config: &Config) -> Result<Assigned> {
        let mut assigned = Assigned::default();
        for server in &config.servers {
            let mut rows = Vec::new();
            for listen in &server.listen {
                let name = listen.address.to_string();
                rows.push(row(&mut self.listeners, name, MAX_LISTENERS, "listeners")?);
            }
            assigned.listeners.push(rows);
        }
        for upstream in &config.upstreams {
            let mut rows = Vec::new();
            for (index, peer) in upstream.peers.iter().enumerate() {
                // The same address may stand twice in a group; each has counters of its own.
                let earlier = upstream.peers[..index]
                    .iter()
                    .filter(|other| other.address == peer.address)
                    .count();
                let name = format!("{}\n{}\n{earlier}", upstream.name, peer.address);
                rows.push(self.peer_row(name)?);
            }
            assigned.peers.push(rows);
            let name = upstream.name.clone();
            assigned
                .groups
                .push(row(&mut self.groups, name, MAX_GROUPS, "upstreams")?);
        }
        Ok(assigned)
    }

    fn peer_row(&mut self, name: String) -> Result<usize> {
        if let Some(row) = self.peers.get(&name) {
            return Ok(*row);
        }
        let Some(row) = self.free_peer_row() else {
            return Err(used_up("peers", MAX_PEERS));
        };
        self.peers.insert(name, row);
        Ok(row)
    }

    fn free_peer_row(&mut self) -> Option<usize> {
        let found: usize = self.found.values().map(BTreeMap::len).sum();
        let next = self.peers.len() + found + self.spare.len();
        self.spare.pop().or((next < MAX_PEERS).then_some(next))
    }

    /// The row of an address that was found by name. Where all rows are taken, those of peers that are gone are freed.
    /// `None`: there are none of them either.
    pub fn found_row(&mut self, upstream: &str, address: SocketAddr, gone: &Gone<'_>) -> Option<usize> {
        if let Some(row) = self.found.get(upstream).and_then(|found| found.get(&address)) {
            return Some(*row);
        }
        let row = match self.free_peer_row() {
            Some(row) => row,
            None => {
                let upstreams: Vec<String> = self.found.keys().cloned().collect();
                upstreams.iter().for_each(|upstream| self.fold(upstream, 0, gone));
                self.spare.pop()?
            }
        };
        self.found
            .entry(upstream.to_owned())
            .or_default()
            .insert(address, row);
        Some(row)
    }

    /// Every address that an upstream was found to have, with its row; most of them may be gone.
    pub fn found_of(&self, upstream: &str) -> impl Iterator<Item = (SocketAddr, usize)> {
        let found = self.found.get(upstream).into_iter().flatten();
        found.map(|(address, row)| (*address, *row))
    }

    /// Gives back the rows of peers of an upstream that are gone and have no sessions, but for so many. What was counted
    /// there goes into the upstream's sum.
    pub fn fold(&mut self, upstream: &str, keep: usize, gone: &Gone<'_>) {
        let (Some(found), Some(group)) = (self.found.get_mut(upstream), self.groups.get(upstream)) else {
            return;
        };
        let idle = found.iter().filter(|(_, row)| gone.is_idle(**row));
        let folded: Vec<(SocketAddr, usize)> =
            idle.map(|(address, row)| (*address, *row)).skip(keep).collect();
        for (address, row) in folded {
            gone.board.groups[*group].former.take_in(&gone.board.peers[row]);
            found.remove(&address);
            self.spare.push(row);
        }
    }
}

/// Tells which peers are gone.
pub struct Gone<'a> {
    /// The board.
    pub board: &'a Board,
    /// The time.
    pub now_ms: u64,
    /// The rows of all peers that names stand for.
    pub present: Vec<usize>,
}

impl Gone<'_> {
    fn is_idle(&self, row: usize) -> bool {
        !self.present.contains(&row) && self.board.peer_active(row, self.now_ms) == 0
    }
}

fn row(rows: &mut HashMap<String, usize>, name: String, limit: usize, what: &str) -> Result<usize> {
    if let Some(row) = rows.get(&name) {
        return Ok(*row);
    }
    let row = rows.len();
    if row >= limit {
        return Err(used_up(what, limit));
    }
    rows.insert(name, row);
    Ok(row)
}

fn used_up(what: &str, limit: usize) -> Error {
    anyhow!(
        "too many different {what} since the program was started: {limit} have counters, there is no room \
         for more (those that earlier configurations named count too: restart the program to forget them)"
    )
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use super::*;
    use crate::testing;

    #[test]
    fn a_name_keeps_its_row_across_configurations() {
        let mut rows = Rows::default();
        let first = rows
            .assign(&testing::config(
                &["127.0.0.1:1", "127.0.0.1:2"],
                &[("a", &["10.0.0.1:80", "10.0.0.2:80"])],
            ))
            .unwrap();
        assert_eq!(
            first,
            Assigned {
                listeners: vec![vec![0], vec![1]],
                peers: vec![vec![0, 1]],
                groups: vec![0]
            }
        );

        let second = rows
            .assign(&testing::config(
                &["127.0.0.1:3", "127.0.0.1:2"],
                &[("a", &["10.0.0.2:80", "10.0.0.3:80"])],
            ))
            .unwrap();
        assert_eq!(
            second,
            Assigned {
                listeners: vec![vec![2], vec![1]],
                peers: vec![vec![1, 2]],
                groups: vec![0]
            }
        );
    }

    #[test]
    fn peers_of_the_same_address_have_rows_of_their_own() {
        let mut rows = Rows::default();
        let config = testing::config(
            &[],
            &[("a", &["10.0.0.1:80", "10.0.0.1:80"]), ("b", &["10.0.0.1:80"])],
        );
        let assigned = rows.assign(&config).unwrap();
        assert_eq!(assigned.peers, [vec![0, 1], vec![2]]);
        assert_eq!(rows.assign(&config).unwrap(), assigned);
    }

    fn addresses(count: usize) -> impl Iterator<Item = SocketAddr> {
        (0..count).map(|n| SocketAddr::from(([10, 0, (n >> 8) as u8, n as u8], 80)))
    }

    #[test]
    fn rows_of_peers_that_are_gone_are_given_to_others_and_what_they_counted_stays_in_the_sum() {
        let board = culvert_shared::sys::shm::Shared::<Board>::anonymous(1).unwrap();
        let board = &board[0];
        let mut rows = Rows::default();
        rows.assign(&testing::config(&[], &[("a", &["10.9.9.9:1"])]))
            .unwrap();
        let gone = |present: &[usize]| Gone {
            board,
            now_ms: 5,
            present: present.to_vec(),
        };
        let all: Vec<usize> = addresses(MAX_PEERS - 1)
            .map(|address| rows.found_row("a", address, &gone(&[])).unwrap())
            .collect();
        assert_eq!(all, (1..MAX_PEERS).collect::<Vec<_>>());
        // Two are in use, one by a name and one by a session.
        board.workers[0].peer_active[all[1]].store(1, Relaxed);
        board.worker_rows.store(1, Relaxed);
        let mut counted = 0;
        for (n, row) in all.iter().enumerate() {
            board.peers[*row].connected.store(n as u64, Relaxed);
            counted += n as u64;
        }
        let new: SocketAddr = "192.0.2.1:1".parse().unwrap();
        let row = rows.found_row("a", new, &gone(&all[..1])).unwrap();
        assert!(!all[..2].contains(&row) && row != 0);
        assert_eq!(board.peers[row].connected.load(Relaxed), 0);
        assert_eq!(board.groups[0].former.connected.load(Relaxed), counted - 1);
        let left: Vec<usize> = rows.found_of("a").map(|(_, row)| row).collect();
        assert_eq!(left, [all[0], all[1], row]);
        assert_eq!(
            rows.found_row("a", new, &gone(&[])),
            Some(row),
            "an address keeps its row"
        );
    }

    #[test]
    fn where_every_row_is_in_use_no_address_gets_one() {
        let board = culvert_shared::sys::shm::Shared::<Board>::anonymous(1).unwrap();
        let mut rows = Rows::default();
        rows.assign(&testing::config(&[], &[("a", &["10.9.9.9:1"])]))
            .unwrap();
        let everything = Gone {
            board: &board[0],
            now_ms: 5,
            present: (0..MAX_PEERS).collect(),
        };
        for address in addresses(MAX_PEERS - 1) {
            assert!(rows.found_row("a", address, &everything).is_some());
        }
        assert_eq!(
            rows.found_row("a", "192.0.2.1:1".parse().unwrap(), &everything),
            None
        );
    }

    #[test]
    fn running_out_of_rows_is_an_error_that_says_what_to_do() {
        let mut rows = Rows::default();
        let listeners: Vec<String> = (1..=MAX_LISTENERS + 1)
            .map(|port| format!("127.0.0.1:{port}"))
            .collect();
        let listeners: Vec<&str> = listeners.iter().map(String::as_str).collect();
        let error = rows
            .assign(&testing::config(&listeners, &[]))
            .unwrap_err()
            .to_string();
        assert!(error.contains("too many different listeners"), "{error}");
        assert!(error.contains("restart the program"), "{error}");
    }
}
