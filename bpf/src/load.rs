//! Making the maps of a worker slot and attaching the verdict program. Needs CAP_BPF, CAP_NET_ADMIN and
//! CAP_PERFMON; what it makes is used without any.

use std::collections::BTreeSet;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use culvert_shared::ids::Direction;
use culvert_shared::sys::shm::Shared;
use libbpf_rs::skel::{OpenSkel, SkelBuilder};
use libbpf_rs::{MapCore, MapFlags, MapHandle, MapType, OpenObject};

use crate::abi::{CpuTotal, SlotTotal};
use crate::cgroup::Cgroup;
use crate::pair::SlotMaps;
use crate::skel::entry::{EntryMaps, EntrySkelBuilder};
use crate::skel::slot::SlotSkelBuilder;

/// The most sessions of one worker: two sockets each must be countable by the kernel's map index.
const MAX_WORKER_CONNECTIONS: u32 = 1 << 24;

/// What the slots of a program have in common.
pub struct Bpf {
    entry: Arc<Entry>,
}

/// Descriptors of an entry: two maps, the link, and what is counted.
pub const ENTRY_DESCRIPTORS: usize = 5;

/// The entry program: attached to the cgroup, it sends each socket's events to its slot's program. And what
/// the programs of these slots count.
pub struct Entry {
    places: MapHandle,
    programs: MapHandle,
    /// Detaches the program when the last process closes it.
    link: OwnedFd,
    totals_map: MapHandle,
    slot_totals_map: MapHandle,
    totals: Arc<Totals>,
    /// Numbers of slot programs that are in use.
    numbers: Mutex<BTreeSet<u32>>,
}

impl Entry {
    /// `totals_map`: where to count by CPU, in common with the slots of other entries.
    fn load(cgroup: &Cgroup, totals_map: MapHandle) -> Result<Entry> {
        let mut storage = MaybeUninit::<OpenObject>::uninit();
        let open = EntrySkelBuilder::default()
            .open(&mut storage)
            .context("failed to open the BPF object")?;
        let loaded = open.load().context(LOAD_FAILED)?;
        let cgroup_fd = cgroup.directory().as_raw_fd();
        let link = loaded
            .progs
            .entry
            .attach_cgroup(cgroup_fd)
            .context("failed to attach to the cgroup")?;
        // A descriptor of it is all that keeps it attached.
        let link = link.as_fd().try_clone_to_owned();
        let slots = loaded.maps.slots.max_entries() as usize;
        let slot_totals_map = shared_array("slot_totals", size_of::<SlotTotal>(), slots)?;
        Entry::of(
            &loaded.maps,
            link.context("failed to duplicate a link")?,
            totals_map,
            slot_totals_map,
        )
    }

    pub(crate) fn of(
        maps: &EntryMaps<'_>,
        link: OwnedFd,
        totals_map: MapHandle,
        slot_totals_map: MapHandle,
    ) -> Result<Entry> {
        let handle = |map| MapHandle::try_from(map).context("failed to duplicate a BPF map");
        let totals = Totals {
            cpus: Shared::of_fd(totals_map.as_fd(), totals_map.max_entries() as usize)?,
            slots: Shared::of_fd(slot_totals_map.as_fd(), slot_totals_map.max_entries() as usize)?,
        };
        Ok(Entry {
            places: handle(&maps.places)?,
            programs: handle(&maps.slots)?,
            link,
            totals_map,
            slot_totals_map,
            totals: Arc::new(totals),
            numbers: Mutex::default(),
        })
    }

    /// What another program needs to go on with it, in the order of [`Entry::take_over`].
    pub fn descriptors(&self) -> [BorrowedFd<'_>; ENTRY_DESCRIPTORS] {
        [
            self.places.as_fd(),
            self.programs.as_fd(),
            self.link.as_fd(),
            self.totals_map.as_fd(),
            self.slot_totals_map.as_fd(),
        ]
    }

    /// A number that is in use already.
    pub(crate) fn claim(&self, number: u32) {
        let mut numbers = self.numbers.lock().unwrap_or_else(PoisonError::into_inner);
        numbers.insert(number);
    }

    pub(crate) fn totals(&self) -> &Arc<Totals> {
        &self.totals
    }

    pub(crate) fn totals_map(&self) -> &MapHandle {
        &self.totals_map
    }

    /// Slots that can exist at once.
    fn capacity(&self) -> u32 {
        self.programs.max_entries()
    }

    /// Takes a number for a slot.
    fn reserve(&self) -> Result<u32> {
        let mut numbers = self.numbers.lock().unwrap_or_else(PoisonError::into_inner);
        let number = (0..self.capacity())
            .find(|number| !numbers.contains(number))
            .context("too many worker slots, old generations included")?;
        numbers.insert(number);
        Ok(number)
    }

    /// Makes the events of sockets with this number go to `program`.
    fn set(&self, number: u32, program: BorrowedFd<'_>) -> Result<()> {
        let value = program.as_raw_fd() as u32;
        self.programs
            .update(&number.to_ne_bytes(), &value.to_ne_bytes(), MapFlags::ANY)
            .context("failed to give the entry program its slot's program")
    }

    pub(crate) fn remove(&self, number: u32) {
        let _ = self.programs.delete(&number.to_ne_bytes());
        self.numbers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&number);
    }

    pub(crate) fn places(&self) -> &MapHandle {
        &self.places
    }

    /// Without these the kernel forgets the slot programs, and detaches the entry.
    pub(crate) fn fds(&self) -> [RawFd; 3] {
        [self.places.as_fd(), self.programs.as_fd(), self.link.as_fd()].map(|fd| fd.as_raw_fd())
    }
}

/// Why loading fails most often.
const LOAD_FAILED: &str = "failed to load the BPF programs (needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON, \
                           or root, and Linux 5.17 with BTF)";

/// What the programs have counted since the program started, by CPU, and what the worker slots hold.
pub struct Totals {
    cpus: Shared<CpuTotal>,
    slots: Shared<SlotTotal>,
}

/// What all flows of a worker slot have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotState {
    /// Outstanding bytes of all flows that have more than a little outstanding.
    pub held_bytes: u64,
    /// What they may be before such flows are held back; 0: no limit.
    pub limit_bytes: u64,
    /// Times that a source was held back, since the slot's maps were made.
    pub pauses: u64,
    /// Events for which a ring buffer had no room, since then.
    pub lost_events: u32,
}

impl Totals {
    /// Bytes of one direction, over all CPUs.
    pub fn forwarded_bytes(&self, direction: Direction) -> u64 {
        self.cpus
            .iter()
            .map(|cpu| cpu.forwarded_bytes[direction.index()].load(Relaxed))
            .sum()
    }

    /// Times that a source was held back.
    pub fn pauses(&self) -> u64 {
        self.cpus.iter().map(|cpu| cpu.pauses.load(Relaxed)).sum()
    }

    /// The slot with a number of [`SlotMaps::number`].
    pub fn slot(&self, number: u32) -> SlotState {
        let total = self.slot_total(number);
        SlotState {
            held_bytes: total.held_bytes.load(Relaxed),
            limit_bytes: total.limit_bytes.load(Relaxed),
            pauses: total.pauses.load(Relaxed),
            lost_events: total.lost_events.load(Relaxed),
        }
    }

    pub(crate) fn slot_total(&self, number: u32) -> &SlotTotal {
        &self.slots[number as usize]
    }

    /// Begins at nothing again.
    pub(crate) fn forget(&self) {
        for cpu in self.cpus.iter() {
            let counters = cpu.forwarded_bytes.iter().chain([&cpu.pauses]);
            counters.for_each(|counter| counter.store(0, Relaxed));
        }
    }

    /// The number goes to another slot.
    fn forget_slot(&self, number: u32) {
        let total = self.slot_total(number);
        for counter in [
            &total.held_bytes,
            &total.limit_bytes,
            &total.low_bytes,
            &total.pauses,
        ] {
            counter.store(0, Relaxed);
        }
        total.wake.store(0, Relaxed);
        total.lost_events.store(0, Relaxed);
        total.counted.store(0, Relaxed);
    }

    /// Bytes of each direction, by its index, for each CPU that forwarded any, with its number.
    pub fn by_cpu(&self) -> impl Iterator<Item = (usize, [u64; 2])> {
        let read = |cpu: &CpuTotal| std::array::from_fn(|way| cpu.forwarded_bytes[way].load(Relaxed));
        self.cpus
            .iter()
            .map(read)
            .enumerate()
            .filter(|(_, bytes)| *bytes != [0; 2])
    }
}

impl Bpf {
    /// Creates what all slots share; the events of sockets in `cgroup` are seen. Fails where BPF is not to be had.
    pub fn open(cgroup: &Cgroup) -> Result<Bpf> {
        crate::probe::log_libbpf_at_debug();
        let cpus = libbpf_rs::num_possible_cpus().context("failed to count the possible CPUs")?;
        // First, because it fails with the clearest words where BPF is not to be had.
        let totals_map = shared_array("totals", size_of::<CpuTotal>(), cpus)?;
        Bpf::with(totals_map, cgroup)
    }

    /// With an entry of its own, beside those that are attached already.
    pub(crate) fn with(totals_map: MapHandle, cgroup: &Cgroup) -> Result<Bpf> {
        Ok(Bpf {
            entry: Arc::new(Entry::load(cgroup, totals_map)?),
        })
    }

    /// The entry of its slots.
    pub fn entry(&self) -> &Arc<Entry> {
        &self.entry
    }

    /// What the programs counted.
    pub fn totals(&self) -> Arc<Totals> {
        Arc::clone(self.entry.totals())
    }

    /// Makes the maps of one worker slot, for `worker_connections` pairs, and attaches its programs. They
    /// last as long as the value, in whichever process.
    pub fn load_slot(&self, worker_connections: u32) -> Result<SlotMaps> {
        ensure!(
            (1..=MAX_WORKER_CONNECTIONS).contains(&worker_connections),
            "worker_connections = {worker_connections} does not fit a sockmap, at most {MAX_WORKER_CONNECTIONS} do"
        );
        let number = self.entry.reserve()?;
        self.entry.totals.forget_slot(number);
        let loaded = self.load_numbered(number, worker_connections);
        if loaded.is_err() {
            self.entry.remove(number);
        }
        loaded
    }

    fn load_numbered(&self, number: u32, worker_connections: u32) -> Result<SlotMaps> {
        let sockets = 2 * worker_connections;
        let mut storage = MaybeUninit::<OpenObject>::uninit();
        let mut open = SlotSkelBuilder::default()
            .open(&mut storage)
            .context("failed to open the BPF object")?;
        open.maps
            .rodata_data
            .as_deref_mut()
            .context("the BPF object has no constants")?
            .slot_number = number;
        let maps = &mut open.maps;
        for map in [
            &mut maps.sources,
            &mut maps.targets,
            &mut maps.indices,
            &mut maps.flows,
        ] {
            map.set_max_entries(sockets).context("failed to size a BPF map")?;
        }
        maps.totals
            .reuse_fd(self.entry.totals_map.as_fd())
            .context("failed to share the totals map")?;
        maps.slot_totals
            .reuse_fd(self.entry.slot_totals_map.as_fd())
            .context("failed to share the slots' totals map")?;
        maps.places
            .reuse_fd(self.entry.places().as_fd())
            .context("failed to share the places map")?;
        let loaded = open
            .load()
            .with_context(|| format!("{LOAD_FAILED}, for {worker_connections} sessions of a worker"))?;
        loaded
            .progs
            .verdict
            .attach_sockmap(loaded.maps.sources.as_fd().as_raw_fd())
            .context("failed to attach the verdict program to its sockmap")?;
        self.entry.set(number, loaded.progs.pressure.as_fd())?;
        let join = loaded.progs.join.as_fd().try_clone_to_owned();
        let join = join.context("failed to duplicate a BPF program")?;
        SlotMaps::new(
            &loaded.maps,
            join,
            worker_connections,
            number,
            Arc::clone(&self.entry),
        )
    }
}

/// An array that user space maps.
fn shared_array(name: &str, value_bytes: usize, entries: usize) -> Result<MapHandle> {
    let options = libbpf_rs::libbpf_sys::bpf_map_create_opts {
        sz: size_of::<libbpf_rs::libbpf_sys::bpf_map_create_opts>() as _,
        map_flags: libbpf_rs::libbpf_sys::BPF_F_MMAPABLE,
        ..Default::default()
    };
    MapHandle::create(
        MapType::Array,
        Some(name),
        4,
        value_bytes as u32,
        entries as u32,
        &options,
    )
    .context("failed to create a BPF map (needs CAP_BPF, or root)")
}

/// Loads everything once, without attaching it, and lets it go: the answer to `-t`.
pub fn trial() -> Result<()> {
    crate::probe::log_libbpf_at_debug();
    let mut storage = MaybeUninit::<OpenObject>::uninit();
    let entry = EntrySkelBuilder::default()
        .open(&mut storage)
        .context("failed to open the BPF object")?;
    entry.load().context(LOAD_FAILED)?;
    let mut storage = MaybeUninit::<OpenObject>::uninit();
    let slot = SlotSkelBuilder::default()
        .open(&mut storage)
        .context("failed to open the BPF object")?;
    slot.load().context(LOAD_FAILED)?;
    crate::accept::trial()
}
