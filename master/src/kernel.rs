//! The BPF maps of the worker slots, where BPF is to be had. Held by the master, so they outlive workers.

use std::sync::Arc;

use anyhow::{Context, Result};
use culvert_bpf::{Bpf, SlotMaps, Totals, selftest};
use culvert_shared::config::Config;

use crate::retain;

/// What all slots have in common; empty where BPF is not to be had or not wanted.
#[derive(Default)]
pub struct Kernel {
    bpf: Option<Bpf>,
    /// Why it is empty.
    reason: Option<String>,
}

/// The maps of the slots of one configuration. Cloning shares them; maps are gone when the last set
/// that has them is dropped and no worker has them any more.
#[derive(Clone, Default)]
pub struct MapTable {
    slots: Vec<Option<Entry>>,
    /// Why there are no maps.
    reason: Option<String>,
}

#[derive(Clone)]
struct Entry {
    worker_connections: u32,
    maps: Arc<SlotMaps>,
}

/// Whether any server is to be forwarded in the kernel.
pub fn wanted(config: &Config) -> bool {
    config.servers.iter().any(|server| server.stream.ebpf_enable)
}

impl Kernel {
    /// Opens BPF if the configuration wants it, and tries whether the kernel can be trusted with it. Where it
    /// is not to be had, that is said in the log and the program serves by copying.
    /// `running`: listeners exist already, and have to be seen where they are.
    pub fn open_for(&mut self, config: &Config, running: bool) {
        if self.bpf.is_none() && wanted(config) {
            match open_trusted(running) {
                Ok(bpf) => (self.bpf, self.reason) = (Some(bpf), None),
                Err((error, remedy)) => self.do_without(&error, remedy),
            }
        }
    }

    fn do_without(&mut self, error: &anyhow::Error, remedy: &str) {
        let (why, remedy) = retain::explain(error, remedy);
        log::warn!(
            "in-kernel forwarding is not to be had, serving by copying in user space: {why}; {remedy}, or set \
             ebpf_enable = false"
        );
        self.bpf = None;
        self.reason = Some(why);
    }

    /// Nothing is forwarded in the kernel.
    fn no_maps(&self, config: &Config) -> MapTable {
        let unwanted = || Some("ebpf_enable = false everywhere".to_owned()).filter(|_| !wanted(config));
        MapTable {
            slots: vec![None; config.worker_cpus.len()],
            reason: unwanted().or_else(|| self.reason.clone()),
        }
    }

    /// The bytes that the kernel forwarded.
    pub fn totals(&self) -> Option<Arc<Totals>> {
        self.bpf.as_ref().map(Bpf::totals)
    }

    /// The maps that `config` needs: those of `current` that fit, and new ones for the rest.
    ///
    /// # Errors
    /// New ones could not be made although BPF works in this program.
    pub fn maps_for(&self, config: &Config, current: &MapTable) -> Result<MapTable> {
        let slots = config.worker_cpus.len();
        let Some(bpf) = self.bpf.as_ref().filter(|_| wanted(config)) else {
            return Ok(self.no_maps(config));
        };
        let mut next = MapTable::default();
        for slot in 0..slots {
            let kept = current
                .entry(slot)
                .filter(|entry| entry.worker_connections == config.worker_connections);
            let entry = match kept {
                Some(entry) => entry.clone(),
                None => Entry {
                    worker_connections: config.worker_connections,
                    maps: Arc::new(
                        bpf.load_slot(config.worker_connections)
                            .with_context(|| format!("failed to make the maps of worker slot {slot}"))?,
                    ),
                },
            };
            next.slots.push(Some(entry));
        }
        Ok(next)
    }

    /// As [`Kernel::maps_for`] at the start, when there is nothing yet to fall back on: without maps for
    /// every slot, all of them serve by copying.
    pub fn first_maps_for(&mut self, config: &Config) -> MapTable {
        self.open_for(config, false);
        self.maps_for(config, &MapTable::default())
            .unwrap_or_else(|error| {
                self.do_without(&error, GIVE_RIGHTS);
                self.no_maps(config)
            })
    }
}

const GIVE_RIGHTS: &str = "run as root or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON";
const CHANGE_KERNEL: &str = "this kernel is not trusted with it: run another one";

/// BPF, on a kernel that has passed the self-test; or why not, and what helps.
fn open_trusted(running: bool) -> Result<Bpf, (anyhow::Error, &'static str)> {
    let bpf = Bpf::open(running).map_err(|error| (error, GIVE_RIGHTS))?;
    let took = selftest::run(&bpf).map_err(|error| (error, CHANGE_KERNEL))?;
    log::info!("the kernel has passed the self-test in {} ms", took.as_millis());
    Ok(bpf)
}

impl MapTable {
    /// The maps of a slot.
    pub fn slot(&self, slot: usize) -> Option<Arc<SlotMaps>> {
        self.entry(slot).map(|entry| Arc::clone(&entry.maps))
    }

    /// Why it has none.
    pub fn reason(&self) -> Option<&str> {
        self.reason.as_deref()
    }

    fn entry(&self, slot: usize) -> Option<&Entry> {
        self.slots.get(slot).and_then(Option::as_ref)
    }
}
