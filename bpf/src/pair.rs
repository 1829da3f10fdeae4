//! Pairs: two sockets of one session in the maps of a worker slot. Takes, joins, reads and frees them;
//! never reads or writes their data, and needs no capability.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};

use anyhow::{Context, Result};
use culvert_shared::ids::{Direction, Owner};
use culvert_shared::sys::shm::Shared;
use culvert_shared::sys::socket;
use libbpf_rs::{MapCore, MapFlags, MapHandle};

use crate::abi::Flow;
use crate::skel::VerdictMaps;

/// The maps of one worker slot.
pub struct SlotMaps {
    sources: MapHandle,
    targets: MapHandle,
    indices: MapHandle,
    flows_map: MapHandle,
    flows: Shared<Flow>,
    capacity: u32,
}

/// A pair that this worker owns. Given back with [`PairPool::give_back`].
#[derive(Debug, PartialEq, Eq)]
pub struct Pair(u32);

/// One direction of a pair as the program left it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowState {
    /// Bytes redirected to the other socket.
    pub forwarded_bytes: u64,
    /// When the last of them was, in nanoseconds of CLOCK_MONOTONIC.
    pub last_active_ns: u64,
    /// Bytes cut off because they had been forwarded before.
    pub trimmed_bytes: u64,
    /// What the flow has met; see [`crate::flow_flag`].
    pub flags: u32,
}

/// How far [`SlotMaps::join`] came.
#[derive(Debug)]
pub enum Joined {
    /// Both directions are forwarded in the kernel.
    Both,
    /// The kernel forwards to_upstream; the upstream socket could not become a source (most likely it has
    /// just ended its stream), so to_downstream is left to user space.
    ToUpstreamOnly,
}

impl SlotMaps {
    pub(crate) fn new(maps: &VerdictMaps<'_>, capacity: u32) -> Result<SlotMaps> {
        let handle = |map| MapHandle::try_from(map).context("failed to duplicate a BPF map descriptor");
        let flows = Shared::of_fd(maps.flows.as_fd(), 2 * capacity as usize)?;
        Ok(SlotMaps {
            sources: handle(&maps.sources)?,
            targets: handle(&maps.targets)?,
            indices: handle(&maps.indices)?,
            flows_map: handle(&maps.flows)?,
            flows,
            capacity,
        })
    }

    /// The descriptors that a worker must keep open.
    pub fn fds(&self) -> Vec<RawFd> {
        let maps = [&self.sources, &self.targets, &self.indices, &self.flows_map];
        maps.iter().map(|map| map.as_fd().as_raw_fd()).collect()
    }

    /// Pairs that fit.
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Hands both sockets, `[downstream, upstream]`, to the kernel. What waits in their receive queues
    /// is forwarded first, a half-read segment included. On an error nothing was forwarded and the
    /// sockets are as before.
    ///
    /// The order matters: both sockets are targets before one becomes a source, so no byte can find its
    /// target missing; and the kick comes last, for what arrived before its socket was a source.
    pub fn join(&self, pair: &Pair, sockets: [BorrowedFd<'_>; 2], now_ns: u64) -> io::Result<Joined> {
        for (side, fd) in sockets.iter().enumerate() {
            let flow = &self.flows[self.index(pair, side)];
            flow.cookie.store(socket::cookie(*fd)?, Relaxed);
            flow.forwarded_bytes.store(0, Relaxed);
            flow.trimmed_bytes.store(0, Relaxed);
            flow.last_active_ns.store(now_ns, Relaxed);
            flow.flags.store(0, Release);
        }
        let joined = self.insert(pair, sockets);
        match &joined {
            Ok(_) => {
                for fd in sockets {
                    // Refused only for what is not a socket (sk_setsockopt), and these two are.
                    let _ = socket::set_receive_low_water(fd, 1);
                }
            }
            Err(_) => self.remove(pair),
        }
        joined
    }

    fn insert(&self, pair: &Pair, sockets: [BorrowedFd<'_>; 2]) -> io::Result<Joined> {
        for side in 0..2 {
            let index = self.index(pair, side);
            let cookie = self.flows[index].cookie.load(Relaxed);
            update(
                &self.indices,
                &cookie.to_ne_bytes(),
                &(index as u32).to_ne_bytes(),
            )?;
        }
        for map in [&self.targets, &self.sources] {
            for (side, fd) in sockets.iter().enumerate() {
                let key = (self.index(pair, side) as u32).to_ne_bytes();
                let result = update(map, &key, &(fd.as_raw_fd() as u64).to_ne_bytes());
                if result.is_err()
                    && side == 1
                    && std::ptr::eq(map, &self.sources)
                    && !socket::is_established(*fd)
                {
                    return Ok(Joined::ToUpstreamOnly);
                }
                result?;
            }
        }
        Ok(Joined::Both)
    }

    /// Takes the pair out of all maps and forgets its cookies. Sockets that are closed have left the
    /// sockmaps by themselves (sock_map_close), before which no verdict on them can be running.
    fn remove(&self, pair: &Pair) {
        for side in 0..2 {
            let index = self.index(pair, side);
            let key = (index as u32).to_ne_bytes();
            let _ = self.sources.delete(&key);
            let _ = self.targets.delete(&key);
        }
        self.forget(pair);
    }

    fn forget(&self, pair: &Pair) {
        for side in 0..2 {
            let cookie = self.flows[self.index(pair, side)].cookie.swap(0, Relaxed);
            if cookie != 0 {
                let _ = self.indices.delete(&cookie.to_ne_bytes());
            }
        }
    }

    /// What the program counted for one direction.
    pub fn flow(&self, pair: &Pair, direction: Direction) -> FlowState {
        let flow = &self.flows[self.index(pair, direction.index())];
        FlowState {
            forwarded_bytes: flow.forwarded_bytes.load(Acquire),
            last_active_ns: flow.last_active_ns.load(Relaxed),
            trimmed_bytes: flow.trimmed_bytes.load(Relaxed),
            flags: flow.flags.load(Relaxed),
        }
    }

    /// Frees what a worker left behind when it died. Its sockets are closed by then.
    pub fn release_owner(&self, owner: Owner) {
        for index in 0..self.capacity {
            let pair = Pair(index);
            let mark = &self.flows[self.index(&pair, 0)].owner;
            if mark.load(Acquire) == owner.0 {
                self.remove(&pair);
                mark.store(0, Release);
            }
        }
    }

    fn index(&self, pair: &Pair, side: usize) -> usize {
        2 * pair.0 as usize + side
    }
}

fn update(map: &MapHandle, key: &[u8], value: &[u8]) -> io::Result<()> {
    map.update(key, value, MapFlags::ANY)
        .map_err(|error| match error.kind() {
            libbpf_rs::ErrorKind::OutOfMemory => io::ErrorKind::OutOfMemory.into(),
            _ => io::Error::other(error.to_string()),
        })
}

/// The pairs that one worker may take. Another worker of the slot, draining, may hold some of them: the
/// owner mark in the shared flow decides, so the same pair never goes to two.
pub struct PairPool {
    owner: Owner,
    free: Vec<u32>,
    /// Seen in the hands of another worker; asked again when `free` is empty, oldest first.
    elsewhere: VecDeque<u32>,
}

/// Pairs of other workers that one call to [`PairPool::take`] asks again at most.
const ASK_AGAIN: usize = 8;

impl PairPool {
    /// A pool over all pairs of the slot.
    pub fn new(maps: &SlotMaps, owner: Owner) -> PairPool {
        PairPool {
            owner,
            free: (0..maps.capacity).rev().collect(),
            elsewhere: VecDeque::new(),
        }
    }

    /// Takes a pair; `None` when all are in use.
    pub fn take(&mut self, maps: &SlotMaps) -> Option<Pair> {
        while let Some(index) = self.free.pop() {
            if self.claim(maps, index) {
                return Some(Pair(index));
            }
            self.elsewhere.push_back(index);
        }
        for _ in 0..ASK_AGAIN.min(self.elsewhere.len()) {
            let index = self.elsewhere.pop_front()?;
            if self.claim(maps, index) {
                return Some(Pair(index));
            }
            self.elsewhere.push_back(index);
        }
        None
    }

    fn claim(&self, maps: &SlotMaps, index: u32) -> bool {
        let mark = &maps.flows[maps.index(&Pair(index), 0)].owner;
        mark.compare_exchange(0, self.owner.0, AcqRel, Relaxed).is_ok()
    }

    /// Gives a pair back whose sockets are closed.
    pub fn give_back(&mut self, maps: &SlotMaps, pair: Pair) {
        maps.forget(&pair);
        maps.flows[maps.index(&pair, 0)].owner.store(0, Release);
        self.free.push(pair.0);
    }
}
