//! Going on with maps that another binary made, in the same process before an exec: from descriptors back to
//! maps. The programs that work on them stay those that the other binary has loaded; new slots get new ones.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use culvert_shared::sys::shm::Shared;
use libbpf_rs::skel::{OpenSkel, SkelBuilder};
use libbpf_rs::{MapCore, MapHandle, OpenObject};

use crate::abi::{CpuTotal, Flow, SlotTotal};
use crate::cgroup::Cgroup;
use crate::events::LANES;
use crate::load::{Bpf, ENTRY_DESCRIPTORS, Entry};
use crate::pair::{OWN_DESCRIPTORS, SlotMaps};
use crate::skel::entry::EntrySkelBuilder;
use crate::skel::slot::SlotSkelBuilder;

/// The version of `c/abi.h` and of what the maps mean. Change it whenever user space of one version could
/// not work with programs and maps of the other.
const LAYOUT: &str = "culvert maps, layout 3";

/// How the maps are laid out, for two binaries to compare.
pub fn layout() -> String {
    format!(
        "{LAYOUT}, flows of {} bytes, totals of {} and {} bytes, {LANES} ring buffers",
        size_of::<Flow>(),
        size_of::<CpuTotal>(),
        size_of::<SlotTotal>()
    )
}

const WHAT: &str = "failed to take over BPF maps";

impl Entry {
    /// Goes on with an entry program that is attached: its maps, and the link that keeps it so.
    ///
    /// # Errors
    /// The descriptors are not what they are said to be.
    pub fn take_over(descriptors: [OwnedFd; ENTRY_DESCRIPTORS]) -> Result<Entry> {
        let [places, programs, link, totals, slot_totals] = descriptors;
        let mut storage = MaybeUninit::<OpenObject>::uninit();
        let mut open = EntrySkelBuilder::default().open(&mut storage).context(WHAT)?;
        open.maps.places.reuse_fd(places.as_fd()).context(WHAT)?;
        open.maps.slots.reuse_fd(programs.as_fd()).context(WHAT)?;
        // Only the maps are wanted.
        for mut program in open.open_object_mut().progs_mut() {
            program.set_autoload(false);
        }
        let loaded = open.load().context(WHAT)?;
        let (totals, slot_totals) = counting_maps(&totals, &slot_totals)?;
        Entry::of(&loaded.maps, link, totals, slot_totals)
    }
}

impl SlotMaps {
    /// Goes on with the maps of a slot, whose programs the entry knows by `number`.
    ///
    /// # Errors
    /// The descriptors are not what they are said to be.
    pub fn take_over(
        descriptors: [OwnedFd; OWN_DESCRIPTORS],
        number: u32,
        capacity: u32,
        entry: &Arc<Entry>,
    ) -> Result<SlotMaps> {
        let mut storage = MaybeUninit::<OpenObject>::uninit();
        let mut open = SlotSkelBuilder::default().open(&mut storage).context(WHAT)?;
        let [
            sources,
            targets,
            join,
            flows,
            lane_0,
            lane_1,
            lane_2,
            lane_3,
            lanes,
        ] = descriptors;
        let maps = &mut open.maps;
        for (map, descriptor) in [
            (&mut maps.sources, &sources),
            (&mut maps.targets, &targets),
            (&mut maps.flows, &flows),
            (&mut maps.lane_0, &lane_0),
            (&mut maps.lane_1, &lane_1),
            (&mut maps.lane_2, &lane_2),
            (&mut maps.lane_3, &lane_3),
        ] {
            map.reuse_fd(descriptor.as_fd()).context(WHAT)?;
        }
        maps.places.reuse_fd(entry.places().as_fd()).context(WHAT)?;
        // What only the programs use.
        maps.indices.set_autocreate(false).context(WHAT)?;
        maps.totals.set_autocreate(false).context(WHAT)?;
        maps.slot_totals.set_autocreate(false).context(WHAT)?;
        for mut program in open.open_object_mut().progs_mut() {
            program.set_autoload(false);
        }
        let loaded = open.load().context(WHAT)?;
        ensure!(
            loaded.maps.flows.value_size() as usize == size_of::<Flow>()
                && loaded.maps.flows.max_entries() == 2 * capacity,
            "the flows of a worker slot are not {} of {} bytes",
            2 * capacity,
            size_of::<Flow>()
        );
        let lanes = (Shared::of_fd(lanes.as_fd(), LANES)?, lanes);
        let maps = SlotMaps::with(&loaded.maps, join, capacity, number, Arc::clone(entry), lanes)?;
        entry.claim(number);
        Ok(maps)
    }
}

impl Bpf {
    /// Loads new programs, which go on counting by CPU where those of `before` do.
    ///
    /// # Errors
    /// BPF is not to be had any more.
    pub fn take_over(before: &Entry, cgroup: &Cgroup) -> Result<Bpf> {
        crate::probe::log_libbpf_at_debug();
        let totals = MapHandle::try_from(before.totals_map()).context(WHAT)?;
        Bpf::with(totals, cgroup)
    }
}

/// The maps that the programs count in: by CPU, by slot.
fn counting_maps(totals: &OwnedFd, slot_totals: &OwnedFd) -> Result<(MapHandle, MapHandle)> {
    let mut storage = MaybeUninit::<OpenObject>::uninit();
    let mut open = SlotSkelBuilder::default().open(&mut storage).context(WHAT)?;
    open.maps.totals.reuse_fd(totals.as_fd()).context(WHAT)?;
    open.maps
        .slot_totals
        .reuse_fd(slot_totals.as_fd())
        .context(WHAT)?;
    for mut program in open.open_object_mut().progs_mut() {
        program.set_autoload(false);
    }
    for mut map in open.open_object_mut().maps_mut() {
        if map.name() != "totals" && map.name() != "slot_totals" {
            map.set_autocreate(false).context(WHAT)?;
        }
    }
    let loaded = open.load().context(WHAT)?;
    Ok((
        MapHandle::try_from(&loaded.maps.totals).context(WHAT)?,
        MapHandle::try_from(&loaded.maps.slot_totals).context(WHAT)?,
    ))
}
