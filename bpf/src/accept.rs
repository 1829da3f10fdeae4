//! Which worker gets a new connection: one program for each listening address, and what they all go by.
//! Loading needs CAP_BPF; what is shown to the programs afterwards is shown through memory.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::{Relaxed, Release};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use culvert_shared::sys::shm::Shared;
use culvert_shared::sys::socket;
use libbpf_rs::skel::{OpenSkel, SkelBuilder};
use libbpf_rs::{ErrorKind, MapCore, MapFlags, MapHandle, OpenObject};

use crate::abi::{AcceptSlot, accept_state};
use crate::skel::accept::AcceptSkelBuilder;

/// How long the kernel may take to free the map of a program that was replaced. A socket can be in one such map
/// only, and that of a process that is gone, or was replaced by another binary, still has it until then.
const FREEING_PATIENCE: Duration = Duration::from_secs(2);

/// What the programs of all addresses have in common.
pub struct Steering {
    map: MapHandle,
    slots: Arc<Shared<AcceptSlot>>,
}

/// The program of one listening address. It stays with the address's sockets; dropping this makes the
/// kernel deal connections out by their hash.
pub struct Group {
    sockets: MapHandle,
}

/// What the worker of one slot tells the programs. It needs no right and no descriptor.
pub struct SlotLoad {
    slots: Arc<Shared<AcceptSlot>>,
    slot: usize,
}

impl Steering {
    /// Makes what all addresses share, and shows that the program can be loaded.
    pub fn open() -> Result<Steering> {
        crate::probe::log_libbpf_at_debug();
        let mut storage = MaybeUninit::<OpenObject>::uninit();
        let open = AcceptSkelBuilder::default()
            .open(&mut storage)
            .context("failed to open the BPF object")?;
        let loaded = open.load().context(LOAD_FAILED)?;
        let map = MapHandle::try_from(&loaded.maps.accept_slots).context("failed to duplicate a BPF map")?;
        let slots = Arc::new(Shared::of_fd(map.as_fd(), map.max_entries() as usize)?);
        Ok(Steering { map, slots })
    }

    /// Lets a program choose among the sockets of the group that `socket`, which listens, belongs to. It
    /// knows none of them yet.
    pub fn attach(&self, socket: BorrowedFd<'_>) -> Result<Group> {
        let mut storage = MaybeUninit::<OpenObject>::uninit();
        let mut open = AcceptSkelBuilder::default()
            .open(&mut storage)
            .context("failed to open the BPF object")?;
        open.maps
            .accept_slots
            .reuse_fd(self.map.as_fd())
            .context("failed to share the map of slots")?;
        let loaded = open.load().context(LOAD_FAILED)?;
        let sockets =
            MapHandle::try_from(&loaded.maps.accept_sockets).context("failed to duplicate a BPF map")?;
        socket::attach_reuseport(socket, loaded.progs.choose.as_fd())
            .context("failed to attach a program to a listening socket")?;
        Ok(Group { sockets })
    }

    /// Shows the programs what slots there are, in order: whether a worker serves in it, and on which CPUs.
    pub fn show<'a>(&self, present: impl Iterator<Item = (bool, &'a [usize])>) {
        let mut count = 0;
        for (slot, (serves, cpus)) in self.slots.iter().zip(present) {
            slot.show(serves, cpus);
            count += 1;
        }
        for slot in self.slots.iter().skip(count) {
            slot.state.store(accept_state::ABSENT, Relaxed);
        }
    }

    /// What the worker of a slot tells the programs.
    pub fn load_of(&self, slot: usize) -> Option<SlotLoad> {
        (slot < self.slots.len()).then(|| SlotLoad {
            slots: Arc::clone(&self.slots),
            slot,
        })
    }
}

impl AcceptSlot {
    fn show(&self, serves: bool, cpus: &[usize]) {
        for (word, bits) in self.cpus.iter().enumerate() {
            let own = cpus.iter().filter(|cpu| **cpu / 64 == word);
            bits.store(own.fold(0, |bits, cpu| bits | 1 << (cpu % 64)), Relaxed);
        }
        let before = self.state.load(Relaxed);
        if before == accept_state::ABSENT {
            // What an earlier worker of this number left.
            self.taken.store(self.started.load(Relaxed), Relaxed);
        }
        if !serves && before != accept_state::WAITING {
            self.sessions.store(0, Relaxed);
            self.room.store(0, Relaxed);
        }
        let state = if serves {
            accept_state::LIVE
        } else {
            accept_state::WAITING
        };
        self.state.store(state, Release);
    }
}

impl Group {
    /// Makes `socket` the one of a slot.
    pub fn put(&self, slot: usize, socket: BorrowedFd<'_>) -> Result<()> {
        let cookie = socket::cookie(socket).context("failed to read a socket's cookie")?;
        let key = u32::try_from(slot).context("a slot's number")?.to_ne_bytes();
        // The map answers with cookies, and refuses a socket that it has (reuseport_array_update_check, 6.12).
        let present = self.sockets.lookup(&key, MapFlags::ANY);
        if present.is_ok_and(|value| value.is_some_and(|value| value == cookie.to_ne_bytes())) {
            return Ok(());
        }
        let value = u64::try_from(socket.as_raw_fd()).context("a descriptor")?;
        let give_up = Instant::now() + FREEING_PATIENCE;
        loop {
            match self.sockets.update(&key, &value.to_ne_bytes(), MapFlags::ANY) {
                // Most likely EBUSY, which libbpf-rs has no name for.
                Err(error) if error.kind() == ErrorKind::Other && Instant::now() < give_up => {
                    sleep(Duration::from_millis(5));
                }
                other => {
                    return other.with_context(|| {
                        format!("failed to give the accept program the socket of worker slot {slot}")
                    });
                }
            }
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // The program may stay attached for as long as its sockets live, and a socket can be in one such map
        // only: the next program of this address must be able to take it.
        for slot in 0..self.sockets.max_entries() {
            let _ = self.sockets.delete(&slot.to_ne_bytes());
        }
    }
}

impl SlotLoad {
    /// What the worker holds, and how much more it can.
    pub fn publish(&self, sessions: u32, room: u32) {
        let slot = &self.slots[self.slot];
        set(&slot.sessions, sessions);
        set(&slot.room, room);
    }

    /// So many connections were accepted. To be called after [`SlotLoad::publish`], so that they are always
    /// counted, in the one place or the other.
    pub fn count_taken(&self, connections: u32) {
        if connections != 0 {
            self.slots[self.slot].taken.fetch_add(connections, Release);
        }
    }
}

/// Stores what has changed: an unchanged cache line stays with the CPUs that read it.
fn set(field: &AtomicU32, value: u32) {
    if field.load(Relaxed) != value {
        field.store(value, Relaxed);
    }
}

const LOAD_FAILED: &str = "failed to load the BPF program that accepts where the work is (needs CAP_BPF, or root, and \
                           Linux 5.17)";

/// Loads the program once, without attaching it, and lets it go.
pub(crate) fn trial() -> Result<()> {
    Steering::open().map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, listen, setsockopt, sockopt,
    };
    use std::net::{SocketAddr, TcpListener, TcpStream};
    use std::os::fd::OwnedFd;

    fn listener(address: SocketAddr) -> OwnedFd {
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = nix::sys::socket::socket(AddressFamily::Inet, SockType::Stream, flags, None).unwrap();
        setsockopt(&socket, sockopt::ReusePort, &true).unwrap();
        bind(socket.as_raw_fd(), &SockaddrStorage::from(address)).unwrap();
        listen(&socket, Backlog::new(128).unwrap()).unwrap();
        socket
    }

    /// Two sockets of one address.
    fn pair() -> (SocketAddr, [OwnedFd; 2]) {
        let first = listener("127.0.0.1:0".parse().unwrap());
        let first = TcpListener::from(first);
        let address = first.local_addr().unwrap();
        (address, [OwnedFd::from(first), listener(address)])
    }

    fn accepted(socket: &OwnedFd) -> usize {
        let listener = TcpListener::from(socket.try_clone().unwrap());
        listener.set_nonblocking(true).unwrap();
        std::iter::from_fn(|| listener.accept().ok()).count()
    }

    fn group(steering: &Steering, sockets: &[OwnedFd; 2]) -> Group {
        let group = steering
            .attach(sockets[0].as_fd())
            .expect("attaching (needs CAP_BPF)");
        for (slot, socket) in sockets.iter().enumerate() {
            group.put(slot, socket.as_fd()).unwrap();
            group.put(slot, socket.as_fd()).unwrap();
        }
        group
    }

    #[test]
    fn connections_go_to_the_slot_that_serves_and_then_to_the_one_that_carries_less() {
        let steering = Steering::open().expect("loading (needs CAP_BPF)");
        let (address, sockets) = pair();
        let _group = group(&steering, &sockets);
        let connect = || {
            let clients: Vec<TcpStream> = (0..40).map(|_| TcpStream::connect(address).unwrap()).collect();
            let taken = [accepted(&sockets[0]), accepted(&sockets[1])];
            for (slot, taken) in taken.into_iter().enumerate() {
                steering.load_of(slot).unwrap().count_taken(taken as u32);
            }
            drop(clients);
            taken
        };
        let no_cpu: &[usize] = &[];
        let loads = [0, 1].map(|slot| steering.load_of(slot).unwrap());
        steering.show([(false, no_cpu), (true, no_cpu)].into_iter());
        loads[1].publish(0, 1000);
        assert_eq!(connect(), [0, 40], "only the second slot serves");
        steering.show([(true, no_cpu)].into_iter());
        loads[0].publish(0, 1000);
        assert_eq!(connect(), [40, 0], "the second slot is no more");
        steering.show([(true, no_cpu), (true, no_cpu)].into_iter());
        loads[1].publish(20, 1000);
        assert_eq!(connect(), [30, 10], "the second slot has 20 sessions");
        loads[1].publish(0, 1000);
        loads[0].publish(0, 5);
        assert_eq!(connect(), [5, 35], "the first slot has room for 5");
    }

    #[test]
    fn a_new_program_takes_the_sockets_of_one_whose_process_is_gone() {
        let steering = Steering::open().expect("loading (needs CAP_BPF)");
        let (_, sockets) = pair();
        let mut old = group(&steering, &sockets);
        let options = libbpf_rs::libbpf_sys::bpf_map_create_opts {
            sz: size_of::<libbpf_rs::libbpf_sys::bpf_map_create_opts>() as _,
            ..Default::default()
        };
        let other = MapHandle::create(libbpf_rs::MapType::Array, None::<&str>, 4, 8, 1, &options).unwrap();
        // As when the process ends: its descriptor of the map is closed, and nothing is taken out of the map.
        drop(std::mem::replace(&mut old.sockets, other));
        group(&steering, &sockets);
    }
}
