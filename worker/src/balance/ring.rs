//! Hashes of keys, computed as nginx does (`hash` and `hash … consistent` of its stream module), so that both
//! send a key to the same peer. On a ring that is so where peers are written as addresses: for nginx a name's peers stand at the
//! points of the name, here each at those of its address. Pure.

use culvert_shared::config::{Address, Peer};

/// Points on the ring for each unit of weight.
const POINTS: u32 = 160;

/// Tries of the plain hash before the choice is another's.
const TRIES: u32 = 20;

/// Units of weight that a ring has room for, as many as a file may have; records of a service may say more.
const WEIGHT_MAX: u64 = 8_192;

/// The points of a consistent hash, sorted: where one is, and whose it is.
#[derive(Default)]
pub(super) struct Ring(Vec<(u32, usize)>);

impl Ring {
    pub(super) fn new<'a>(peers: impl Iterator<Item = (usize, &'a Peer)>) -> Ring {
        let mut points = Vec::new();
        let peers: Vec<(usize, &Peer)> = peers.collect();
        let total: u64 = peers.iter().map(|(_, peer)| u64::from(peer.weight)).sum();
        let share = |weight: u32| match total <= WEIGHT_MAX {
            true => u64::from(weight),
            false => (u64::from(weight) * WEIGHT_MAX / total).max(1),
        };
        for (index, peer) in peers {
            let (host, port) = match &peer.address {
                Address::Tcp(address) => match address.to_string().rsplit_once(':') {
                    Some((host, port)) => (host.to_owned(), port.to_owned()),
                    None => (address.to_string(), String::new()),
                },
                Address::Unix(path) => (path.display().to_string(), String::new()),
            };
            let base = [host.as_bytes(), b"\0", port.as_bytes()]
                .iter()
                .fold(!0, |crc, part| update(crc, part));
            let mut before = 0u32;
            for _ in 0..share(peer.weight) * u64::from(POINTS) {
                let point = !update(base, &before.to_le_bytes());
                points.push((point, index));
                before = point;
            }
        }
        // Of two peers at one point the first one in the file has it.
        points.sort_by_key(|(point, _)| *point);
        points.dedup_by_key(|(point, _)| *point);
        Ring(points)
    }

    /// The peer whose point comes next after the key's, of those that `is_ready`.
    pub(super) fn pick(&self, key: &str, is_ready: impl Fn(usize) -> bool) -> Option<usize> {
        let hash = crc32(key.as_bytes());
        let from = self.0.partition_point(|(point, _)| *point < hash);
        let (before, after) = self.0.split_at(from);
        let mut peers = after.iter().chain(before).map(|(_, peer)| *peer);
        peers.find(|peer| is_ready(*peer))
    }
}

/// The peer that a key's hash falls on, hashing again if it is not ready; `None`: too often.
pub(super) fn plain(key: &str, weights: &[(usize, u64)], is_ready: impl Fn(usize) -> bool) -> Option<usize> {
    let total: u64 = weights.iter().map(|(_, weight)| weight).sum();
    let mut sum = 0u64;
    for round in 0..=TRIES {
        let salt = if round == 0 {
            String::new()
        } else {
            round.to_string()
        };
        let hash = !update(update(!0, salt.as_bytes()), key.as_bytes());
        sum += u64::from(hash >> 16 & 0x7fff);
        let mut at = sum % total.max(1);
        for (peer, weight) in weights {
            if at < *weight {
                match is_ready(*peer) {
                    true => return Some(*peer),
                    false => break,
                }
            }
            at -= weight;
        }
    }
    None
}

fn crc32(bytes: &[u8]) -> u32 {
    !update(!0, bytes)
}

fn update(crc: u32, bytes: &[u8]) -> u32 {
    bytes
        .iter()
        .fold(crc, |crc, byte| TABLE[(crc as u8 ^ byte) as usize] ^ crc >> 8)
}

/// Of the reflected polynomial that Ethernet and zip use.
const TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = crc >> 1 ^ if crc & 1 == 1 { 0xedb8_8320 } else { 0 };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_the_common_one() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }
}
