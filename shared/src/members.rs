//! The peers that names stand for at the moment, for each upstream of a generation: written by the master whenever
//! an answer changes them, read by its workers before they choose. Places and plain values; what a name stands for
//! is found out in the master (`names`).
//!
//! One writer, many readers, no lock: a version that is odd while the set is being written, and a reader that comes
//! in between goes on with what it has. So a master that dies half-way harms nobody.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU32, AtomicU64, fence};

use crate::counters::MAX_PEERS;
use crate::sys::shm::Shareable;

/// Addresses that the names of one upstream can stand for at once.
pub const MAX_PRESENT: usize = 256;
/// Peers beside them that are gone and still shown.
pub const MAX_FORMER: usize = 256;
/// Names that one upstream can have.
pub const MAX_NAMES: usize = 64;

/// One peer that was found by its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its row on the board.
    pub row: usize,
    /// The index of its name in `Upstream::names`.
    pub name: usize,
    /// Where to connect.
    pub address: SocketAddr,
    /// Its share.
    pub weight: u32,
    /// Takes sessions only when no other peer does.
    pub backup: bool,
    /// Its name does not stand for it any more: it keeps the sessions that it has and gets no new ones.
    pub former: bool,
}

/// How it is with the looking up of one name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NameState {
    /// Lookups that ended, one way or the other.
    pub lookups: u64,
    /// Those of them that failed.
    pub failures: u64,
    /// When one last ended, in milliseconds since the Unix epoch; 0: none has yet.
    pub last_lookup_unix_ms: u64,
    /// Whether that one failed.
    pub failing: bool,
}

/// The peers of one upstream that were found by name.
#[repr(C)]
pub struct MemberSet {
    version: AtomicU64,
    count: AtomicU32,
    unused: AtomicU32,
    states: [StateCell; MAX_NAMES],
    members: [Cell; MAX_PRESENT + MAX_FORMER],
}

// SAFETY: only atomics, in a `repr(C)` layout; all zeros is a valid value, and so is any other.
unsafe impl Shareable for MemberSet {}

#[repr(C)]
struct StateCell {
    lookups: AtomicU64,
    failures: AtomicU64,
    last_lookup_unix_ms: AtomicU64,
    failing: AtomicU64,
}

#[repr(C)]
struct Cell {
    ip: [AtomicU64; 2],
    /// Row (32 bits), port (16), flags (16).
    place: AtomicU64,
    /// Name (32 bits), weight (32).
    share: AtomicU64,
}

const V4: u64 = 1;
const BACKUP: u64 = 2;
const FORMER: u64 = 4;

impl MemberSet {
    /// One more with each change; 0: nothing was written yet.
    pub fn version(&self) -> u64 {
        self.version.load(Acquire)
    }

    /// Writes a set; what is beyond the room for it is left out. For one writer only.
    pub fn write(&self, members: &[Member]) {
        let version = self.version.load(Relaxed) & !1;
        self.version.store(version + 1, Relaxed);
        fence(Release);
        let count = members.len().min(self.members.len());
        self.count.store(count as u32, Relaxed);
        for (cell, member) in self.members.iter().zip(members) {
            cell.write(member);
        }
        self.version.store(version + 2, Release);
    }

    /// The set and its version. `None`: it is being written.
    pub fn read(&self) -> Option<(u64, Vec<Member>)> {
        let version = self.version.load(Acquire);
        if version & 1 != 0 {
            return None;
        }
        let count = (self.count.load(Relaxed) as usize).min(self.members.len());
        let members = self.members[..count].iter().filter_map(Cell::read).collect();
        fence(Acquire);
        (self.version.load(Relaxed) == version).then_some((version, members))
    }

    /// Says how it is with a name.
    pub fn set_state(&self, name: usize, state: NameState) {
        let Some(cell) = self.states.get(name) else { return };
        cell.lookups.store(state.lookups, Relaxed);
        cell.failures.store(state.failures, Relaxed);
        cell.last_lookup_unix_ms.store(state.last_lookup_unix_ms, Relaxed);
        cell.failing.store(state.failing.into(), Relaxed);
    }

    /// How it is with a name.
    pub fn state(&self, name: usize) -> NameState {
        self.states
            .get(name)
            .map_or_else(NameState::default, |cell| NameState {
                lookups: cell.lookups.load(Relaxed),
                failures: cell.failures.load(Relaxed),
                last_lookup_unix_ms: cell.last_lookup_unix_ms.load(Relaxed),
                failing: cell.failing.load(Relaxed) != 0,
            })
    }
}

impl Cell {
    fn write(&self, member: &Member) {
        let (ip, mut flags) = match member.address.ip() {
            IpAddr::V4(ip) => (ip.to_ipv6_mapped(), V4),
            IpAddr::V6(ip) => (ip, 0),
        };
        let bits = ip.to_bits();
        self.ip[0].store((bits >> 64) as u64, Relaxed);
        self.ip[1].store(bits as u64, Relaxed);
        for (is, flag) in [(member.backup, BACKUP), (member.former, FORMER)] {
            flags |= if is { flag } else { 0 };
        }
        let place = (member.row as u64) << 32 | u64::from(member.address.port()) << 16 | flags;
        self.place.store(place, Relaxed);
        self.share
            .store((member.name as u64) << 32 | u64::from(member.weight), Relaxed);
    }

    fn read(&self) -> Option<Member> {
        let bits = u128::from(self.ip[0].load(Relaxed)) << 64 | u128::from(self.ip[1].load(Relaxed));
        let (place, share) = (self.place.load(Relaxed), self.share.load(Relaxed));
        let ip = Ipv6Addr::from_bits(bits);
        let ip = match place & V4 {
            0 => IpAddr::V6(ip),
            _ => IpAddr::V4(ip.to_ipv4_mapped()?),
        };
        let row = (place >> 32) as usize;
        (row < MAX_PEERS).then_some(Member {
            row,
            name: (share >> 32) as usize,
            address: SocketAddr::new(ip, (place >> 16) as u16),
            weight: (share as u32).max(1),
            backup: place & BACKUP != 0,
            former: place & FORMER != 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::shm::Shared;

    fn member(n: usize, address: &str) -> Member {
        Member {
            row: n,
            name: n % MAX_NAMES,
            address: address.parse().unwrap(),
            weight: 1 + n as u32,
            backup: n % 2 == 1,
            former: n % 3 == 1,
        }
    }

    fn set() -> Shared<MemberSet> {
        Shared::anonymous(1).unwrap()
    }

    #[test]
    fn a_set_is_read_as_it_was_written() {
        let set = set();
        assert_eq!(set[0].read(), Some((0, Vec::new())), "nothing was written yet");
        let members = [
            member(0, "192.0.2.1:80"),
            member(1, "[2001:db8::1]:65535"),
            member(2, "[::ffff:192.0.2.7]:1"),
            member(4095, "255.255.255.255:1"),
        ];
        set[0].write(&members);
        assert_eq!(set[0].read(), Some((2, members.to_vec())));
        set[0].write(&members[..1]);
        assert_eq!(set[0].read(), Some((4, members[..1].to_vec())));
        let state = NameState {
            lookups: 9,
            failures: 3,
            last_lookup_unix_ms: 1 << 41,
            failing: true,
        };
        set[0].set_state(63, state);
        assert_eq!(set[0].state(63), state);
        set[0].set_state(64, state);
        assert_eq!(set[0].state(64), NameState::default(), "there is no room for it");
    }

    #[test]
    fn more_than_there_is_room_for_is_cut_and_nonsense_is_left_out() {
        let set = set();
        let many: Vec<Member> = (0..MAX_PRESENT + MAX_FORMER + 1)
            .map(|n| member(n, "192.0.2.1:80"))
            .collect();
        set[0].write(&many);
        let (_, read) = set[0].read().unwrap();
        assert_eq!(read, many[..many.len() - 1]);
        set[0].write(&[member(MAX_PEERS, "192.0.2.1:80")]);
        assert_eq!(set[0].read().unwrap().1, []);
    }

    #[test]
    fn a_reader_never_sees_half_of_a_set() {
        let set = set();
        let of = |n: usize| -> Vec<Member> {
            let row = n % 100;
            let one = |_| member(row, &format!("192.0.2.{row}:80"));
            (0..1 + n % 50).map(one).collect()
        };
        set[0].write(&of(0));
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| (0..20_000).for_each(|n| set[0].write(&of(n))));
            while !writer.is_finished() {
                if let Some((version, read)) = set[0].read() {
                    let n = (version as usize / 2).saturating_sub(2);
                    assert_eq!(read, of(n), "version {version}");
                }
            }
        });
    }
}
