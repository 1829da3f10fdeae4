//! Which row of the board belongs to which listener and peer. A name keeps its row as long as the
//! program runs, whatever reloads come, so its counters never fall and never mix with another's.

use std::collections::HashMap;

use anyhow::{Result, bail};
use culvert_shared::config::Config;
use culvert_shared::counters::{MAX_GROUPS, MAX_LISTENERS, MAX_PEERS};
use serde::{Deserialize, Serialize};

/// The rows given so far.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Rows {
    listeners: HashMap<String, usize>,
    peers: HashMap<String, usize>,
    groups: HashMap<String, usize>,
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
                rows.push(row(&mut self.peers, name, MAX_PEERS, "peers")?);
            }
            assigned.peers.push(rows);
            let name = upstream.name.clone();
            assigned
                .groups
                .push(row(&mut self.groups, name, MAX_GROUPS, "upstreams")?);
        }
        Ok(assigned)
    }
}

fn row(rows: &mut HashMap<String, usize>, name: String, limit: usize, what: &str) -> Result<usize> {
    if let Some(row) = rows.get(&name) {
        return Ok(*row);
    }
    let row = rows.len();
    if row >= limit {
        bail!(
            "too many different {what} since the program was started: {limit} have counters, there is no room \
             for more (those that earlier configurations named count too: restart the program to forget them)"
        );
    }
    rows.insert(name, row);
    Ok(row)
}

#[cfg(test)]
mod tests {
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
