//! A generation: one configuration with all that its workers are made from. It is built completely
//! before anything of it is used, and dropping one that was not used undoes it.

use std::sync::Arc;

use anyhow::{Context, Result};
use culvert_shared::busy::Lookout;
use culvert_shared::config::{Config, Listen, User};
use culvert_shared::limits::Limits;
use culvert_shared::members::{Member, MemberSet};
use culvert_shared::sys::shm::Shared;
use culvert_worker::{Listener, Served, Store};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::accepting::Groups;
use crate::access_log::AccessLogs;
use crate::building::Built;
use crate::kernel::{Kernel, StoreTable};
use crate::limits;
use crate::listen::Listeners;
use crate::rights;
use crate::rows::{Assigned, Rows};

/// One configuration and its resources.
pub struct Generation {
    /// Its number: 1 at the start, one more at each successful reload.
    pub number: u64,
    /// The configuration.
    pub config: Arc<Config>,
    /// The user that workers change to.
    pub user: Option<User>,
    /// The listening sockets.
    pub listeners: Listeners,
    /// What chooses among them.
    pub groups: Groups,
    /// The stores of its slots.
    pub stores: StoreTable,
    /// Where workers tell of their busiest sessions; the same for all generations.
    pub lookout: Arc<Lookout>,
    /// The files of its access logs.
    pub access_logs: AccessLogs,
    /// The rows on the board.
    pub assigned: Assigned,
    /// What limits count; the same in all generations.
    pub limits: Arc<Limits>,
    /// How many sessions the master may keep.
    pub keeper_room: u64,
    /// What all workers hear when a place at a peer is free for which somebody waits.
    pub bell: Arc<EventFd>,
    /// Every name that has had a row.
    pub rows: Rows,
    /// The peers that names stand for, for each upstream, as its workers see them.
    pub members: Arc<Shared<MemberSet>>,
    /// Those of them that get sessions.
    pub present: Vec<Vec<Member>>,
}

impl Generation {
    /// The largest buffer that a worker may want for a socket, in bytes.
    pub fn largest_buffer(&self) -> u32 {
        let backlogs = self
            .config
            .servers
            .iter()
            .map(|server| server.stream.ebpf_backlog_size);
        backlogs.map(culvert_bpf::largest_send_buffer).max().unwrap_or(0)
    }

    /// Builds the first one.
    ///
    /// # Errors
    /// A limit is too low, or an address cannot be bound.
    pub fn first(config: Config, kernel: &mut Kernel) -> Result<Generation> {
        rights::check(&config)?;
        let keeper_room = limits::raise_descriptors(&config)?;
        let bell = new_bell()?;
        let mut rows = Rows::default();
        let assigned = rows.assign(&config)?;
        let access_logs = AccessLogs::open(&config)?;
        let stores = kernel.first_stores_for(&config)?;
        let listeners = Listeners::default().next(&config)?;
        let groups = match kernel.is_open() {
            true => kernel.accept.first_groups(&listeners),
            false => Groups::none(stores.reason().map(str::to_owned)),
        };
        Ok(Generation {
            number: 1,
            user: rights::target_user(&config),
            members: member_sets(&config)?,
            present: vec![Vec::new(); config.upstreams.len()],
            config: Arc::new(config),
            listeners,
            groups,
            stores,
            lookout: Arc::new(Lookout::new()?),
            access_logs,
            assigned,
            limits: Arc::new(Limits::new()?),
            keeper_room,
            bell,
            rows,
        })
    }

    /// Puts the one together that follows `self`, from pieces that share with it what both need. `self` is left as it
    /// is. `filling`: see [`Kernel::stores_for`].
    ///
    /// # Errors
    /// A limit is too low, or a file cannot be opened.
    pub fn next(&self, built: Built, filling: &[Arc<Store>], kernel: &Kernel) -> Result<Generation> {
        let Built {
            config,
            own,
            listeners,
            groups,
            ..
        } = built;
        let keeper_room = limits::raise_descriptors(&config)?;
        let mut rows = self.rows.clone();
        let assigned = rows.assign(&config)?;
        let access_logs = AccessLogs::open(&config)?;
        let stores = kernel.table(&config, own, &self.stores, filling);
        let groups = groups.unwrap_or_else(|| Groups::none(stores.reason().map(str::to_owned)));
        Ok(Generation {
            number: self.number + 1,
            user: rights::target_user(&config),
            members: member_sets(&config)?,
            present: vec![Vec::new(); config.upstreams.len()],
            config: Arc::new(config),
            listeners,
            groups,
            stores,
            lookout: Arc::clone(&self.lookout),
            access_logs,
            assigned,
            limits: Arc::clone(&self.limits),
            keeper_room,
            bell: Arc::clone(&self.bell),
            rows,
        })
    }

    /// The one that another binary has served; nothing is made anew that could not be had.
    ///
    /// # Errors
    /// A limit is too low.
    pub fn taken_over(
        number: u64,
        config: Config,
        mut rows: Rows,
        listeners: Listeners,
        stores: StoreTable,
        limits: Limits,
        access_logs: AccessLogs,
    ) -> Result<Generation> {
        Ok(Generation {
            number,
            user: rights::target_user(&config),
            keeper_room: limits::raise_descriptors(&config)?,
            assigned: rows.assign(&config)?,
            lookout: Arc::new(Lookout::new()?),
            access_logs,
            members: member_sets(&config)?,
            present: vec![Vec::new(); config.upstreams.len()],
            config: Arc::new(config),
            limits: Arc::new(limits),
            // Workers of the binary before have another; they look by themselves ten times a second as well.
            bell: new_bell()?,
            listeners,
            // The programs of the binary before go on until the next generation has its own.
            groups: Groups::none(None),
            stores,
            rows,
        })
    }

    /// How many worker slots it has.
    pub fn slots(&self) -> usize {
        self.config.worker_cpus.len()
    }

    /// Copies of the listening sockets of one slot, for a worker to own.
    ///
    /// # Errors
    /// No more descriptors are to be had.
    pub fn worker_listeners(&self, slot: usize) -> Result<Vec<Listener>> {
        let duplicated = self.listens().map(|(server, listen, row)| {
            let socket = self
                .listeners
                .duplicate(listen, slot)
                .context("failed to hand over a listener")?;
            Ok(Listener {
                socket,
                address: listen.address.clone(),
                server,
                row,
                proxy_protocol: listen.proxy_protocol,
            })
        });
        duplicated.collect()
    }

    /// The listeners as sessions know them.
    pub fn served(&self) -> Vec<Served> {
        let served = self.listens().map(|(server, listen, row)| Served {
            row,
            server,
            address: listen.address.clone(),
        });
        served.collect()
    }

    /// Each listener with its server's index and its own row on the board.
    fn listens(&self) -> impl Iterator<Item = (usize, &Listen, usize)> {
        let servers = self.config.servers.iter().zip(&self.assigned.listeners);
        servers.enumerate().flat_map(|(server, (configured, rows))| {
            let listens = configured.listen.iter().zip(rows);
            listens.map(move |(listen, row)| (server, listen, *row))
        })
    }
}

fn new_bell() -> Result<Arc<EventFd>> {
    EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
        .map(Arc::new)
        .context("failed to make a descriptor that wakes workers")
}

/// Whether a generation could be built of a configuration, as far as that can be said without building it.
///
/// # Errors
/// As [`Generation::next`].
pub fn check(config: &Config, rows: &Rows) -> Result<()> {
    rights::check(config)?;
    limits::raise_descriptors(config)?;
    rows.clone().assign(config).map(drop)
}

/// A set for each upstream: memory of the generation's own, so that workers of others never read it.
fn member_sets(config: &Config) -> Result<Arc<Shared<MemberSet>>> {
    // Sets that are never written take no memory, and no mapping is empty.
    Ok(Arc::new(Shared::anonymous(config.upstreams.len().max(1))?))
}
