//! Making the maps of a worker slot and attaching the verdict program. Needs CAP_BPF, CAP_NET_ADMIN and
//! CAP_PERFMON; what it makes is used without any.

use std::collections::BTreeSet;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use culvert_shared::ids::Direction;
use culvert_shared::sys::shm::Shared;
use libbpf_rs::skel::{OpenSkel, SkelBuilder};
use libbpf_rs::{Link, MapCore, MapFlags, MapHandle, MapType, OpenObject};

use crate::abi::CpuTotal;
use crate::cgroup::Cgroup;
use crate::pair::SlotMaps;
use crate::skel::entry::EntrySkelBuilder;
use crate::skel::slot::SlotSkelBuilder;

/// The most sessions of one worker: two sockets each must be countable by the kernel's map index.
const MAX_WORKER_CONNECTIONS: u32 = 1 << 24;

/// What the slots of a program have in common. Sockets made after it belong to its cgroup.
pub struct Bpf {
    totals_map: MapHandle,
    totals: Arc<Totals>,
    entry: Arc<Entry>,
    _cgroup: Cgroup,
}

/// The entry program: attached to the cgroup, it sends each socket's events to its slot's program.
pub(crate) struct Entry {
    places: MapHandle,
    programs: MapHandle,
    /// Detaches the program when the last process closes it.
    link: Link,
    /// Numbers of slot programs that are in use.
    numbers: Mutex<BTreeSet<u32>>,
}

impl Entry {
    fn load(cgroup: &Cgroup) -> Result<Entry> {
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
        let places = MapHandle::try_from(&loaded.maps.places).context("failed to duplicate a BPF map")?;
        let programs = MapHandle::try_from(&loaded.maps.slots).context("failed to duplicate a BPF map")?;
        Ok(Entry {
            places,
            programs,
            link,
            numbers: Mutex::default(),
        })
    }

    /// Makes the events of sockets with this number go to `program`.
    fn add(&self, program: OwnedFd) -> Result<u32> {
        let mut numbers = self.numbers.lock().unwrap_or_else(PoisonError::into_inner);
        let number = (0..self.programs.max_entries())
            .find(|number| !numbers.contains(number))
            .context("too many worker slots, old generations included")?;
        let value = program.as_raw_fd() as u32;
        self.programs
            .update(&number.to_ne_bytes(), &value.to_ne_bytes(), MapFlags::ANY)
            .context("failed to give the entry program its slot's program")?;
        numbers.insert(number);
        Ok(number)
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
                           or root, and a kernel with BTF)";

/// Bytes that the kernel forwarded since the program started, by CPU and direction.
pub struct Totals(Shared<CpuTotal>);

impl Totals {
    /// Bytes of one direction, over all CPUs.
    pub fn forwarded_bytes(&self, direction: Direction) -> u64 {
        self.0
            .iter()
            .map(|cpu| cpu.forwarded_bytes[direction.index()].load(Relaxed))
            .sum()
    }

    /// Begins at nothing again.
    pub(crate) fn forget(&self) {
        let all = self.0.iter().flat_map(|cpu| &cpu.forwarded_bytes);
        all.for_each(|bytes| bytes.store(0, Relaxed));
    }

    /// Bytes of each direction, by its index, for each CPU that forwarded any, with its number.
    pub fn by_cpu(&self) -> impl Iterator<Item = (usize, [u64; 2])> {
        let read = |cpu: &CpuTotal| std::array::from_fn(|way| cpu.forwarded_bytes[way].load(Relaxed));
        self.0
            .iter()
            .map(read)
            .enumerate()
            .filter(|(_, bytes)| *bytes != [0; 2])
    }
}

impl Bpf {
    /// Creates what all slots share. Fails where BPF is not to be had. `stay` keeps the process in its
    /// cgroup: for a program whose listeners exist already.
    pub fn open(stay: bool) -> Result<Bpf> {
        crate::probe::log_libbpf_at_debug();
        let cpus = libbpf_rs::num_possible_cpus().context("failed to count the possible CPUs")?;
        let options = libbpf_rs::libbpf_sys::bpf_map_create_opts {
            sz: size_of::<libbpf_rs::libbpf_sys::bpf_map_create_opts>() as _,
            map_flags: libbpf_rs::libbpf_sys::BPF_F_MMAPABLE,
            ..Default::default()
        };
        let value_size = size_of::<CpuTotal>() as u32;
        let totals_map = MapHandle::create(
            MapType::Array,
            Some("totals"),
            4,
            value_size,
            cpus as u32,
            &options,
        )
        .context("failed to create a BPF map (needs CAP_BPF, or root)")?;
        let totals = Arc::new(Totals(Shared::of_fd(totals_map.as_fd(), cpus)?));
        let cgroup = Cgroup::enter(stay)?;
        let entry = Arc::new(Entry::load(&cgroup)?);
        Ok(Bpf {
            totals_map,
            totals,
            entry,
            _cgroup: cgroup,
        })
    }

    /// The bytes that the kernel forwarded.
    pub fn totals(&self) -> Arc<Totals> {
        Arc::clone(&self.totals)
    }

    /// Makes the maps of one worker slot, for `worker_connections` pairs, and attaches its programs. They
    /// last as long as the value, in whichever process.
    pub fn load_slot(&self, worker_connections: u32) -> Result<SlotMaps> {
        ensure!(
            (1..=MAX_WORKER_CONNECTIONS).contains(&worker_connections),
            "worker_connections = {worker_connections} does not fit a sockmap, at most {MAX_WORKER_CONNECTIONS} do"
        );
        let sockets = 2 * worker_connections;
        let mut storage = MaybeUninit::<OpenObject>::uninit();
        let mut open = SlotSkelBuilder::default()
            .open(&mut storage)
            .context("failed to open the BPF object")?;
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
            .reuse_fd(self.totals_map.as_fd())
            .context("failed to share the totals map")?;
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
        let pressure = loaded
            .progs
            .pressure
            .as_fd()
            .try_clone_to_owned()
            .context("failed to duplicate a program")?;
        let number = self.entry.add(pressure)?;
        SlotMaps::new(&loaded.maps, worker_connections, number, Arc::clone(&self.entry))
    }
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
