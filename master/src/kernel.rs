//! The stores of the worker slots: the tables of their sessions and, where BPF is to be had, their maps. Held
//! by the master, so they outlive workers.

use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use culvert_bpf::{Bpf, Cgroup, Totals, selftest};
use culvert_shared::config::Config;
use culvert_shared::sys::shm::Shared;
use culvert_worker::Store;

use crate::accepting::Accept;
use crate::retain;

/// What all slots have in common; empty where BPF is not to be had or not wanted.
pub struct Kernel {
    /// The cgroup of all sockets and workers, or why there are none.
    cgroup: Result<Cgroup>,
    bpf: Option<Bpf>,
    /// Why it is empty.
    reason: Option<String>,
    /// The number of the newest store.
    pub last_store: u32,
    /// What chooses the workers of new connections.
    pub accept: Accept,
    /// The number of the newest store that another binary made; its programs are that binary's.
    last_foreign: u32,
}

/// The stores of the slots of one configuration. Cloning shares them; a store is gone when the last set that
/// has it is dropped and no worker has it any more.
#[derive(Clone, Default)]
pub struct StoreTable {
    slots: Vec<SlotStores>,
    /// Why there are no maps.
    reason: Option<String>,
}

/// The stores that the workers of one slot care for.
#[derive(Clone)]
pub struct SlotStores {
    /// Where the slot's new sessions go.
    pub own: Arc<Store>,
    /// Those of slots that are no more, or that had another size, with sessions left in them.
    pub inherited: Vec<Arc<Store>>,
}

/// Whether any server is to be forwarded in the kernel.
pub fn wanted(config: &Config) -> bool {
    config.servers.iter().any(|server| server.stream.ebpf_enable)
}

impl Kernel {
    /// With nothing opened yet, for a process that is in this cgroup before it has a socket.
    pub fn new(cgroup: Result<Cgroup>) -> Kernel {
        Kernel {
            cgroup,
            bpf: None,
            reason: None,
            last_store: 0,
            accept: Accept::default(),
            last_foreign: 0,
        }
    }

    /// Goes on after another binary, which has made stores up to number `last_store`: `bpf` is what it had
    /// opened, or why it had not.
    pub fn after(cgroup: Result<Cgroup>, bpf: Result<Bpf, Option<String>>, last_store: u32) -> Kernel {
        let (bpf, reason) = match bpf {
            Ok(bpf) => (Some(bpf), None),
            Err(reason) => (None, reason),
        };
        Kernel {
            bpf,
            reason,
            last_store,
            last_foreign: last_store,
            ..Kernel::new(cgroup)
        }
    }

    /// What all slots have in common, if it was opened.
    pub fn bpf(&self) -> Option<&Bpf> {
        self.bpf.as_ref()
    }

    /// The cgroup that it is in.
    pub fn cgroup(&self) -> Option<&Cgroup> {
        self.cgroup.as_ref().ok()
    }

    /// Why it was not.
    pub fn reason(&self) -> Option<&str> {
        self.reason.as_deref()
    }

    /// Opens BPF if the configuration wants it, and tries whether the kernel can be trusted with it. Where it
    /// is not to be had, that is said in the log and the program serves by copying.
    pub fn open_for(&mut self, config: &Config) {
        if self.bpf.is_none() && wanted(config) {
            match open_trusted(&self.cgroup) {
                Ok(bpf) => {
                    (self.bpf, self.reason) = (Some(bpf), None);
                    self.report();
                }
                Err((error, remedy)) => self.do_without(&error, remedy),
            }
        }
    }

    /// Says who else pays.
    fn report(&self) {
        if let Some(cgroup) = self.cgroup()
            && let Some(why) = cgroup.shared()
        {
            log::info!(
                "no cgroup of its own could be made ({why}): the kernel asks the program about every TCP socket of {}",
                cgroup.path().display()
            );
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

    /// Whether BPF is to be had and wanted.
    pub fn is_open(&self) -> bool {
        self.bpf.is_some()
    }

    /// The bytes that the kernel forwarded.
    pub fn totals(&self) -> Option<Arc<Totals>> {
        self.bpf.as_ref().map(Bpf::totals)
    }

    /// The stores that `config` needs: those of `current` that fit, and new ones for the rest. Those that do
    /// not fit are cared for as long as sessions are left in them, or workers may put some there: those of `current`'s
    /// slots, each of which may get another worker before the next generation serves, and `filling`, which living
    /// workers have as their own.
    ///
    /// # Errors
    /// New ones could not be made although BPF works in this program.
    pub fn stores_for(
        &mut self,
        config: &Config,
        current: &StoreTable,
        filling: &[Arc<Store>],
    ) -> Result<StoreTable> {
        let slots = 0..config.worker_cpus.len();
        let own = slots.map(|slot| Ok(self.own_store(config, current, slot)?.0));
        let own = own.collect::<Result<Vec<_>>>()?;
        Ok(self.table(config, own, current, filling))
    }

    /// The own store of one slot: that of `current` if it fits, else a new one. Says too whether it is new: making one
    /// takes its time.
    ///
    /// # Errors
    /// As [`Kernel::stores_for`].
    pub fn own_store(
        &mut self,
        config: &Config,
        current: &StoreTable,
        slot: usize,
    ) -> Result<(Arc<Store>, bool)> {
        let with_maps = self.has_maps(config);
        let fits = |store: &&Arc<Store>| {
            store.id > self.last_foreign
                && store.records.len() == config.worker_connections as usize
                && store.maps.is_some() == with_maps
        };
        let kept = current.slots.get(slot).map(|stores| &stores.own).filter(fits);
        if let Some(store) = kept {
            return Ok((Arc::clone(store), false));
        }
        let made = self.make_store(config, with_maps);
        let made = made.with_context(|| format!("failed to make the maps of worker slot {slot}"))?;
        Ok((Arc::new(made), true))
    }

    /// The stores of a generation whose slots have `own`, and what it has to care for besides; see
    /// [`Kernel::stores_for`].
    pub fn table(
        &self,
        config: &Config,
        own: Vec<Arc<Store>>,
        current: &StoreTable,
        filling: &[Arc<Store>],
    ) -> StoreTable {
        let unwanted = || Some("ebpf_enable = false everywhere".to_owned()).filter(|_| !wanted(config));
        let reason = unwanted().or_else(|| self.reason.clone());
        let slots = own.into_iter().map(|own| SlotStores {
            own,
            inherited: Vec::new(),
        });
        let mut next = StoreTable {
            slots: slots.collect(),
            reason: reason.filter(|_| !self.has_maps(config)),
        };
        let slots = next.slots.len();
        let own = current.slots.iter().map(|slot| &slot.own);
        let used = current.all().filter(|store| store.is_used());
        let mut at = 0;
        for store in own.chain(filling).chain(used) {
            if !next.has(store.id) {
                next.slots[at % slots].inherited.push(Arc::clone(store));
                at += 1;
            }
        }
        next
    }

    fn has_maps(&self, config: &Config) -> bool {
        self.bpf.is_some() && wanted(config)
    }

    fn make_store(&mut self, config: &Config, with_maps: bool) -> Result<Store> {
        let sessions = config.worker_connections;
        let bpf = self.bpf.as_ref().filter(|_| with_maps);
        let maps = bpf.map(|bpf| bpf.load_slot(sessions)).transpose()?;
        if let Some(maps) = &maps {
            maps.limit_total(config.worker_backlog_size);
        }
        self.last_store += 1;
        let (records, records_file) = Shared::in_file(c"culvert-sessions", sessions as usize)?;
        Ok(Store {
            id: self.last_store,
            records,
            records_file,
            maps: maps.map(Arc::new),
        })
    }

    /// As [`Kernel::stores_for`] at the start, when there is nothing yet to fall back on: without maps for
    /// every slot, all of them serve by copying.
    ///
    /// # Errors
    /// There is no memory for them even without maps.
    pub fn first_stores_for(&mut self, config: &Config) -> Result<StoreTable> {
        self.open_for(config);
        self.stores_for(config, &StoreTable::default(), &[])
            .or_else(|error| {
                self.do_without(&error, GIVE_RIGHTS);
                self.stores_for(config, &StoreTable::default(), &[])
            })
    }
}

const GIVE_RIGHTS: &str = "run as root or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON";
/// ip(8) mounts /sys anew, without what was mounted below it.
const MOUNT_CGROUPS: &str =
    "mount a cgroup2 file system (`ip netns exec` hides it: enter the network by `nsenter --net=` instead)";
const CHANGE_KERNEL: &str = "this kernel is not trusted with it: run another one";

/// BPF, on a kernel that has passed the self-test; or why not, and what helps.
pub fn open_trusted(cgroup: &Result<Cgroup>) -> Result<Bpf, (anyhow::Error, &'static str)> {
    let cgroup = cgroup
        .as_ref()
        .map_err(|error| (anyhow!("{error:#}"), MOUNT_CGROUPS))?;
    let bpf = Bpf::open(cgroup).map_err(|error| (error, GIVE_RIGHTS))?;
    let took = selftest::run(&bpf).map_err(|error| (error, CHANGE_KERNEL))?;
    log::info!("the kernel has passed the self-test in {} ms", took.as_millis());
    Ok(bpf)
}

impl StoreTable {
    /// The stores of a slot: its own, then those that it cares for besides.
    pub fn of_slot(&self, slot: usize) -> Vec<Arc<Store>> {
        let stores = self.slots.get(slot).into_iter();
        stores
            .flat_map(|stores| std::iter::once(&stores.own).chain(&stores.inherited))
            .cloned()
            .collect()
    }

    /// A table of stores that another binary made.
    pub fn of(slots: Vec<SlotStores>, reason: Option<String>) -> StoreTable {
        StoreTable { slots, reason }
    }

    /// The stores of all slots.
    pub fn slots(&self) -> &[SlotStores] {
        &self.slots
    }

    /// Why a slot has no maps.
    pub fn reason(&self) -> Option<&str> {
        self.reason.as_deref()
    }

    /// What all sessions of a store together may have outstanding. To be said when its generation serves: until then a store
    /// that is not new is another one's.
    pub fn limit_totals(&self, bytes: Option<u64>) {
        let maps = self.all().filter_map(|store| store.maps.as_ref());
        maps.for_each(|maps| maps.limit_total(bytes));
    }

    /// Whether somebody cares for a store.
    pub fn has(&self, id: u32) -> bool {
        self.all().any(|store| store.id == id)
    }

    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = &Arc<Store>> {
        let slots = self.slots.iter();
        slots.flat_map(|stores| std::iter::once(&stores.own).chain(&stores.inherited))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn every_store_that_sessions_may_come_from_is_cared_for() {
        let mut config = testing::config(&["127.0.0.1:80"], &[]);
        config.worker_cpus = vec![vec![0]; 3];
        let mut kernel = Kernel::new(Err(anyhow!("not wanted")));
        let first = kernel
            .stores_for(&config, &StoreTable::default(), &[])
            .expect("stores");
        let ids = |table: &StoreTable| {
            let mut ids: Vec<u32> = table.all().map(|store| store.id).collect();
            ids.sort_unstable();
            ids
        };
        assert_eq!(ids(&first), [1, 2, 3]);
        // The worker of the slot that is removed has just died, and is replaced before the next generation serves.
        config.worker_cpus.pop();
        let second = kernel.stores_for(&config, &first, &[]).expect("stores");
        assert_eq!(ids(&second), [1, 2, 3]);
        // Nobody is left that could fill it, nothing is in it.
        let third = kernel.stores_for(&config, &second, &[]).expect("stores");
        assert_eq!(ids(&third), [1, 2]);
        // A worker of a generation that was refused still has its own.
        config.worker_connections += 1;
        let refused = kernel.stores_for(&config, &third, &[]).expect("stores");
        assert_eq!(ids(&refused), [1, 2, 4, 5]);
        config.worker_connections -= 1;
        let next = kernel.stores_for(&config, &third, &[Arc::clone(&refused.slots[1].own)]);
        assert_eq!(ids(&next.expect("stores")), [1, 2, 5]);
    }
}
