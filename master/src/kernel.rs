//! The BPF maps of the worker slots, where BPF is to be had. Held by the master, so they outlive workers.

use std::sync::Arc;

use anyhow::{Context, Result};
use culvert_bpf::{Bpf, SlotMaps, Totals};
use culvert_shared::config::Config;

/// What all slots have in common; empty where BPF is not to be had or not wanted.
#[derive(Default)]
pub struct Kernel {
    bpf: Option<Bpf>,
}

/// The maps of the slots of one configuration. Cloning shares them; maps are gone when the last set
/// that has them is dropped and no worker has them any more.
#[derive(Clone, Default)]
pub struct MapTable {
    slots: Vec<Option<Entry>>,
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
    /// Opens BPF if the configuration wants it. Where it is not to be had, that is said in the log and
    /// the program serves by copying.
    /// `running`: listeners exist already, and have to be seen where they are.
    pub fn open_for(&mut self, config: &Config, running: bool) {
        if self.bpf.is_none() && wanted(config) {
            match Bpf::open(running) {
                Ok(bpf) => self.bpf = Some(bpf),
                Err(error) => warn_unavailable(&error),
            }
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
            return Ok(MapTable {
                slots: vec![None; slots],
            });
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
                warn_unavailable(&error);
                self.bpf = None;
                MapTable {
                    slots: vec![None; config.worker_cpus.len()],
                }
            })
    }
}

fn warn_unavailable(error: &anyhow::Error) {
    log::warn!(
        "in-kernel forwarding is not to be had, serving by copying in user space: {error:#}; run as root or with \
         CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON, or set ebpf_enable = false"
    );
}

impl MapTable {
    /// The maps of a slot.
    pub fn slot(&self, slot: usize) -> Option<Arc<SlotMaps>> {
        self.entry(slot).map(|entry| Arc::clone(&entry.maps))
    }

    fn entry(&self, slot: usize) -> Option<&Entry> {
        self.slots.get(slot).and_then(Option::as_ref)
    }
}
