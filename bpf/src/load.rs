//! Making the maps of a worker slot and attaching the verdict program. Needs CAP_BPF, CAP_NET_ADMIN and
//! CAP_PERFMON; what it makes is used without any.

use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use anyhow::{Context, Result, ensure};
use culvert_shared::ids::Direction;
use culvert_shared::sys::shm::Shared;
use libbpf_rs::skel::{OpenSkel, SkelBuilder};
use libbpf_rs::{MapHandle, MapType, OpenObject};

use crate::abi::CpuTotal;
use crate::pair::SlotMaps;
use crate::skel::VerdictSkelBuilder;

/// The most sessions of one worker: two sockets each must be countable by the kernel's map index.
const MAX_WORKER_CONNECTIONS: u32 = 1 << 24;

/// What the slots of a program have in common.
pub struct Bpf {
    totals_map: MapHandle,
    totals: Arc<Totals>,
}

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

    /// Bytes of both directions for each CPU that forwarded any, with its number.
    pub fn by_cpu(&self) -> impl Iterator<Item = (usize, u64)> {
        let sum = |cpu: &CpuTotal| cpu.forwarded_bytes.iter().map(|bytes| bytes.load(Relaxed)).sum();
        self.0
            .iter()
            .map(sum)
            .enumerate()
            .filter(|(_, bytes)| *bytes != 0)
    }
}

impl Bpf {
    /// Creates what all slots share. Fails where BPF is not to be had.
    pub fn open() -> Result<Bpf> {
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
        Ok(Bpf { totals_map, totals })
    }

    /// The bytes that the kernel forwarded.
    pub fn totals(&self) -> Arc<Totals> {
        Arc::clone(&self.totals)
    }

    /// Makes the maps of one worker slot, for `worker_connections` pairs, and attaches the program. They
    /// last as long as the value, in whichever process.
    pub fn load_slot(&self, worker_connections: u32) -> Result<SlotMaps> {
        ensure!(
            (1..=MAX_WORKER_CONNECTIONS).contains(&worker_connections),
            "worker_connections = {worker_connections} does not fit a sockmap, at most {MAX_WORKER_CONNECTIONS} do"
        );
        let sockets = 2 * worker_connections;
        let mut storage = MaybeUninit::<OpenObject>::uninit();
        let mut open = VerdictSkelBuilder::default()
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
        let loaded = open.load().with_context(|| {
            format!(
                "failed to load the BPF program for {worker_connections} sessions \
                 (needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON, or root, and a kernel with BTF)"
            )
        })?;
        loaded
            .progs
            .verdict
            .attach_sockmap(std::os::fd::AsRawFd::as_raw_fd(&loaded.maps.sources.as_fd()))
            .context("failed to attach the verdict program to its sockmap")?;
        SlotMaps::new(&loaded.maps, worker_connections)
    }
}

/// Loads everything once and lets it go: the answer to `-t`.
pub fn trial() -> Result<()> {
    Bpf::open()?.load_slot(1).map(|_| ())
}
