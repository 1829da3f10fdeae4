//! Which worker gets a new connection: a program for many listening addresses, and what it goes by.
//! Loading needs CAP_BPF; what is shown to the programs afterwards is shown through memory.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::{Relaxed, Release};

use anyhow::{Context, Error, Result, ensure};
use culvert_shared::sys::shm::Shared;
use culvert_shared::sys::socket;
use libbpf_rs::skel::{OpenSkel, SkelBuilder};
use libbpf_rs::{ErrorKind, MapCore, MapFlags, MapHandle, OpenObject};

use crate::abi::{AcceptSlot, accept_state};
use crate::skel::accept::AcceptSkelBuilder;

/// Addresses that one program has room for at least. Each takes 2 KiB, and 8 KiB of buckets.
const ADDRESSES: usize = 64;

/// Sockets of one slot and address that are known at once: one that is closed hands what waits in it to its
/// successor, and the program must know both.
const KNOWN: usize = 2;

/// The programs of all addresses, and what they have in common.
pub struct Steering {
    map: MapHandle,
    slots: Arc<Shared<AcceptSlot>>,
    programs: RefCell<Vec<Rc<Program>>>,
}

/// A loaded program.
struct Program {
    choose: OwnedFd,
    sockets: MapHandle,
    addresses: MapHandle,
    /// Where addresses can begin in `sockets`.
    free: RefCell<Vec<u32>>,
}

/// The sockets of one listening address. Its program stays with them; dropping this makes the
/// kernel deal connections out by their hash.
pub struct Group {
    program: Rc<Program>,
    first: u32,
    slots: u32,
    /// By slot, the cookies of its sockets, newest last.
    cookies: RefCell<BTreeMap<u32, Vec<u64>>>,
}

/// What became of a socket that a program was to learn of.
#[must_use]
pub enum Put {
    /// The program knows it.
    Done,
    /// The socket is still in the map of a program that was replaced, or whose process is gone: the kernel frees it in a
    /// while. What it says meanwhile.
    Busy(Error),
}

/// What the worker of one slot tells the programs. It needs no right and no descriptor.
pub struct SlotLoad {
    slots: Arc<Shared<AcceptSlot>>,
    slot: usize,
}

impl Steering {
    /// Loads a program for a usual number of addresses, and makes what all programs share.
    ///
    /// # Errors
    /// The kernel or the rights of this process do not allow it.
    pub fn open() -> Result<Steering> {
        crate::probe::log_libbpf_at_debug();
        let (program, map) = load(ADDRESSES, None)?;
        let slots = Arc::new(Shared::of_fd(map.as_fd(), map.max_entries() as usize)?);
        Ok(Steering {
            map,
            slots,
            programs: RefCell::new(vec![program]),
        })
    }

    /// Makes room for so many addresses more, so that they need no program each.
    ///
    /// # Errors
    /// As for [`Steering::open`].
    pub fn make_room(&self, addresses: usize) -> Result<()> {
        let mut programs = self.programs.borrow_mut();
        let free: usize = programs.iter().map(|program| program.free.borrow().len()).sum();
        if free < addresses {
            let (program, _) = load(ADDRESSES.max(addresses - free), Some(&self.map))?;
            programs.push(program);
        }
        Ok(())
    }

    /// Lets a program choose among the sockets of the group that `socket`, which listens, belongs to. It
    /// knows none of them yet.
    ///
    /// # Errors
    /// As for [`Steering::open`], or the socket belongs to no group.
    pub fn attach(&self, socket: BorrowedFd<'_>) -> Result<Group> {
        self.make_room(1)?;
        let programs = self.programs.borrow();
        let found = programs.iter().find_map(|program| {
            let first = program.free.borrow_mut().pop()?;
            Some((Rc::clone(program), first))
        });
        let (program, first) = found.context("there is no room for one more address")?;
        let group = Group {
            program,
            first,
            slots: self.map.max_entries(),
            cookies: RefCell::default(),
        };
        socket::attach_reuseport(socket, group.program.choose.as_fd())
            .context("failed to attach a program to a listening socket")?;
        Ok(group)
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
            // Not the room: the next worker may have told it already, and tells it again only when something has woken it,
            // which is nothing as long as it gets no connection. Before it is shown to serve it has told it in any case.
        }
        let state = if serves {
            accept_state::LIVE
        } else {
            accept_state::WAITING
        };
        self.state.store(state, Release);
    }
}

/// Loads a program, and says which map of slots it has: that of another program, if there is one.
fn load(addresses: usize, slots: Option<&MapHandle>) -> Result<(Rc<Program>, MapHandle)> {
    let mut storage = MaybeUninit::<OpenObject>::uninit();
    let mut open = AcceptSkelBuilder::default()
        .open(&mut storage)
        .context("failed to open the BPF object")?;
    let maps = &mut open.maps;
    if let Some(map) = slots {
        let shared = maps.accept_slots.reuse_fd(map.as_fd());
        shared.context("failed to share the map of slots")?;
    }
    let stride = maps.accept_slots.max_entries();
    let addresses = u32::try_from(addresses).context("a number of addresses")?;
    let sockets = addresses.checked_mul(stride).context("too many addresses")?;
    let sized = maps.accept_sockets.set_max_entries(sockets);
    sized
        .and_then(|()| {
            maps.accept_addresses
                .set_max_entries(sockets.saturating_mul(KNOWN as u32))
        })
        .context("failed to size a BPF map")?;
    let loaded = open.load().context(LOAD_FAILED)?;
    let duplicate =
        |map: &libbpf_rs::Map<'_>| MapHandle::try_from(map).context("failed to duplicate a BPF map");
    let program = Program {
        choose: (loaded.progs.choose.as_fd().try_clone_to_owned())
            .context("failed to duplicate a BPF program")?,
        sockets: duplicate(&loaded.maps.accept_sockets)?,
        addresses: duplicate(&loaded.maps.accept_addresses)?,
        free: RefCell::new((0..addresses).rev().map(|at| at * stride).collect()),
    };
    Ok((Rc::new(program), duplicate(&loaded.maps.accept_slots)?))
}

impl Group {
    /// Makes `socket` the one of a slot.
    ///
    /// # Errors
    /// The kernel does not take it.
    pub fn put(&self, slot: usize, socket: BorrowedFd<'_>) -> Result<Put> {
        let cookie = socket::cookie(socket).context("failed to read a socket's cookie")?;
        let slot = u32::try_from(slot).context("a slot's number")?;
        ensure!(slot < self.slots, "there is no worker slot {slot}");
        let key = (self.first + slot).to_ne_bytes();
        let sockets = &self.program.sockets;
        // The map answers with cookies, and refuses a socket that it has (reuseport_array_update_check, 6.12).
        let present = sockets.lookup(&key, MapFlags::ANY);
        if present.is_ok_and(|value| value.is_some_and(|value| value == cookie.to_ne_bytes())) {
            return Ok(Put::Done);
        }
        self.know(slot, cookie)?;
        let value = u64::try_from(socket.as_raw_fd()).context("a descriptor")?;
        let put = sockets.update(&key, &value.to_ne_bytes(), MapFlags::ANY);
        let Err(error) = put else {
            return Ok(Put::Done);
        };
        // Most likely EBUSY, which libbpf-rs has no name for.
        let is_busy = error.kind() == ErrorKind::Other;
        let error = Error::from(error).context(format!(
            "failed to give the accept program the socket of worker slot {slot}"
        ));
        match is_busy {
            true => Ok(Put::Busy(error)),
            false => Err(error),
        }
    }

    /// Tells the program that a socket belongs to this address.
    fn know(&self, slot: u32, cookie: u64) -> Result<()> {
        let mut cookies = self.cookies.borrow_mut();
        let known = cookies.entry(slot).or_default();
        known.retain(|other| *other != cookie);
        while known.len() >= KNOWN {
            let _ = self.program.addresses.delete(&known.remove(0).to_ne_bytes());
        }
        known.push(cookie);
        let first = self.first.to_ne_bytes();
        (self.program.addresses)
            .update(&cookie.to_ne_bytes(), &first, MapFlags::ANY)
            .context("failed to tell the accept program of a socket")
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // The program may stay attached for as long as its sockets live: it must not choose by what the next
        // address has there, and a socket can be in one place only, which the next group may need.
        for cookie in self.cookies.borrow().values().flatten() {
            let _ = self.program.addresses.delete(&cookie.to_ne_bytes());
        }
        for slot in 0..self.slots {
            let _ = self.program.sockets.delete(&(self.first + slot).to_ne_bytes());
        }
        self.program.free.borrow_mut().push(self.first);
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
    use std::thread::sleep;
    use std::time::{Duration, Instant};

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

    fn put(group: &Group, slot: usize, socket: &OwnedFd) {
        let busy = || match group.put(slot, socket.as_fd()).unwrap() {
            Put::Done => None,
            Put::Busy(error) => Some(error),
        };
        let give_up = Instant::now() + Duration::from_secs(10);
        while let Some(error) = busy() {
            assert!(Instant::now() < give_up, "{error:#}");
            sleep(Duration::from_millis(5));
        }
    }

    fn group(steering: &Steering, sockets: &[OwnedFd; 2]) -> Group {
        let group = steering
            .attach(sockets[0].as_fd())
            .expect("attaching (needs CAP_BPF)");
        for (slot, socket) in sockets.iter().enumerate() {
            put(&group, slot, socket);
            put(&group, slot, socket);
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
    fn as_long_as_no_slot_is_shown_no_socket_is_preferred() {
        let steering = Steering::open().expect("loading (needs CAP_BPF)");
        let (address, sockets) = pair();
        let _group = group(&steering, &sockets);
        let clients: Vec<TcpStream> = (0..40).map(|_| TcpStream::connect(address).unwrap()).collect();
        let taken = [accepted(&sockets[0]), accepted(&sockets[1])];
        assert!(taken.iter().all(|taken| *taken > 4), "{taken:?}");
        drop(clients);
    }

    #[test]
    fn a_worker_that_tells_its_room_before_its_slot_is_shown_gets_connections() {
        let steering = Steering::open().expect("loading (needs CAP_BPF)");
        let (address, sockets) = pair();
        let _group = group(&steering, &sockets);
        let no_cpu: &[usize] = &[];
        let loads = [0, 1].map(|slot| steering.load_of(slot).unwrap());
        loads[0].publish(0, 1000);
        steering.show([(false, no_cpu), (false, no_cpu)].into_iter());
        loads[1].publish(0, 1000);
        steering.show([(true, no_cpu), (true, no_cpu)].into_iter());
        let clients: Vec<TcpStream> = (0..40).map(|_| TcpStream::connect(address).unwrap()).collect();
        assert_eq!([accepted(&sockets[0]), accepted(&sockets[1])], [20, 20]);
        drop(clients);
    }

    #[test]
    fn a_new_program_takes_the_sockets_of_one_whose_process_is_gone() {
        let steering = Steering::open().expect("loading (needs CAP_BPF)");
        let addresses = [pair(), pair()];
        for (_, sockets) in &addresses {
            let mut old = group(&steering, sockets);
            // As when the process ends: nothing is taken out of the maps.
            old.slots = 0;
            old.cookies.borrow_mut().clear();
        }
        drop(steering);
        let steering = Steering::open().unwrap();
        // As long as one address has the old program, that has the sockets of all.
        let new = addresses
            .each_ref()
            .map(|(_, sockets)| steering.attach(sockets[0].as_fd()).unwrap());
        for (group, (_, sockets)) in new.iter().zip(&addresses) {
            put(group, 0, &sockets[0]);
        }
    }

    #[test]
    fn one_program_serves_many_addresses_and_keeps_them_apart() {
        let steering = Steering::open().expect("loading (needs CAP_BPF)");
        steering.make_room(70).unwrap();
        let no_cpu: &[usize] = &[];
        steering.show([(false, no_cpu), (true, no_cpu)].into_iter());
        steering.load_of(1).unwrap().publish(0, 1000);
        // More than one program has room for, were they not made room for.
        for round in 0..3 {
            let addresses: Vec<_> = (0..70).map(|_| pair()).collect();
            let groups = addresses.iter().map(|(_, sockets)| group(&steering, sockets));
            let groups: Vec<Group> = groups.collect();
            assert_eq!(steering.programs.borrow().len(), 2, "round {round}");
            for (address, sockets) in addresses.iter().step_by(23) {
                let _clients: Vec<TcpStream> = (0..8).map(|_| TcpStream::connect(address).unwrap()).collect();
                assert_eq!([accepted(&sockets[0]), accepted(&sockets[1])], [0, 8]);
                steering.load_of(1).unwrap().count_taken(8);
            }
            // Every second one goes first, so that places become free in another order.
            let (first, second): (Vec<_>, Vec<_>) = groups
                .into_iter()
                .enumerate()
                .partition(|(at, _)| at % 2 == round % 2);
            drop(first);
            drop(second);
        }
    }

    #[test]
    fn what_waits_in_a_socket_that_is_closed_goes_to_its_successor() {
        let steering = Steering::open().expect("loading (needs CAP_BPF)");
        let no_cpu: &[usize] = &[];
        steering.show([(true, no_cpu)].into_iter());
        steering.load_of(0).unwrap().publish(0, 1000);
        let (address, [first, second]) = pair();
        let group = steering.attach(first.as_fd()).unwrap();
        put(&group, 0, &first);
        let _clients: Vec<TcpStream> = (0..8).map(|_| TcpStream::connect(address).unwrap()).collect();
        put(&group, 0, &second);
        // A third socket of the address, to which a hash would lead some of them.
        let third = listener(address);
        drop(first);
        assert_eq!([accepted(&second), accepted(&third)], [8, 0]);
    }
}
