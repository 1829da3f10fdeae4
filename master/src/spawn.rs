//! Filling a worker slot: fork, and in the child pin, drop rights, serve.

use std::collections::HashSet;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use anyhow::{Context, Result};
use culvert_bpf::Totals;
use culvert_shared::counters::{Board, MAX_WORKERS};
use culvert_shared::ids::Owner;
use culvert_shared::sys::shm::Shared;
use culvert_shared::sys::{fdpass, process, signals};
use culvert_worker::{Listener, Store, WorkerStart};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::Pid;

use crate::error_log::ErrorLog;
use crate::generation::Generation;
use crate::rights;
use crate::supervise::Master;
use crate::worker::{Born, Worker};

/// A worker is steered through its control socket only. These would reach it as well: a terminal sends
/// some of them to the whole process group, and administrators signal by name.
const IGNORED: [Signal; 8] = [
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGHUP,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGWINCH,
    Signal::SIGPIPE,
];

/// What a worker is for.
#[derive(Clone)]
pub enum Post {
    /// It serves in its slot.
    Slot,
    /// It takes over the sessions of this store and no connections.
    Carer(Arc<Store>),
}

/// What a worker is made from.
pub struct Blueprint<'a> {
    /// Its generation.
    pub generation: &'a Generation,
    /// Its slot.
    pub slot: usize,
    /// Its row on the board: one of [`Master::free_rows`].
    pub row: Option<usize>,
    /// What it is for.
    pub post: Post,
    /// Its mark.
    pub owner: Owner,
    /// The board.
    pub board: &'a Arc<Shared<Board>>,
    /// The bytes that the kernel forwarded.
    pub totals: Option<Arc<Totals>>,
    /// Where it writes its log.
    pub log: &'a ErrorLog,
}

impl Blueprint<'_> {
    fn stores(&self) -> Vec<Arc<Store>> {
        match &self.post {
            Post::Slot => self.generation.stores.of_slot(self.slot),
            Post::Carer(store) => vec![Arc::clone(store)],
        }
    }

    fn listeners(&self) -> Result<Vec<Listener>> {
        match self.post {
            Post::Slot => self.generation.worker_listeners(self.slot),
            Post::Carer(_) => Ok(Vec::new()),
        }
    }
}

/// Starts a worker.
///
/// # Errors
/// The board is full, or the system has no room for another process or descriptor.
pub fn spawn(blueprint: Blueprint<'_>) -> Result<Worker> {
    let Blueprint {
        generation,
        slot,
        row,
        owner,
        board,
        ..
    } = blueprint;
    let row = row.with_context(|| {
        format!(
            "{MAX_WORKERS} worker processes are alive, old generations included: wait until some have drained"
        )
    })?;
    board[0].worker_rows.fetch_max(row as u32 + 1, Relaxed);
    let (ours, theirs) = fdpass::pair()?;
    let stores = blueprint.stores();
    let maps = stores.first().and_then(|own| own.maps.as_ref());
    let pairs = maps.map_or(0, |maps| maps.capacity());
    board[0].workers[row].claim(
        slot,
        generation.number,
        &generation.config.worker_cpus[slot],
        pairs,
    );
    match process::fork_here()? {
        process::Side::Parent(pid) => {
            board[0].workers[row].pid.store(pid.as_raw() as u32, Relaxed);
            drop(theirs);
            let born = Born {
                pid,
                slot,
                row,
                owner,
                generation: generation.number,
                stores,
                access_logs: generation.access_logs.clone(),
                resolvers: generation.config.resolvers(),
                control: Some(ours),
            };
            Ok(match blueprint.post {
                Post::Slot => Worker::new(born, Instant::now()),
                Post::Carer(_) => Worker::carer(born, Instant::now()),
            })
        }
        process::Side::Child => {
            // Nothing of the master's may run in the child: neither its destructors nor its loop.
            let status = catch_unwind(AssertUnwindSafe(|| live(&blueprint, row, theirs))).unwrap_or(101);
            std::process::exit(status)
        }
    }
}

impl Master {
    /// Rows of the board that no worker has. The board is not asked: workers can write there.
    pub fn free_rows(&self) -> impl Iterator<Item = usize> {
        let taken: HashSet<usize> = self.workers.iter().map(|worker| worker.row).collect();
        (0..MAX_WORKERS).filter(move |row| !taken.contains(row))
    }
}

/// The child's whole life; returns its exit status.
fn live(blueprint: &Blueprint<'_>, row: usize, control: OwnedFd) -> i32 {
    let slot = blueprint.slot;
    blueprint.board[0].workers[row]
        .pid
        .store(std::process::id(), Relaxed);
    match prepare(blueprint, row, control) {
        Ok(start) => culvert_worker::run(start),
        Err(error) => {
            log::error!("worker {slot} cannot start: {error:#}");
            1
        }
    }
}

fn prepare(blueprint: &Blueprint<'_>, row: usize, control: OwnedFd) -> Result<WorkerStart> {
    let Blueprint {
        generation,
        slot,
        row: _,
        owner,
        board,
        ref totals,
        ref post,
        log,
    } = *blueprint;
    pin(slot, &generation.config.worker_cpus[slot]);
    signals::ignore(&IGNORED)?;
    SigSet::all()
        .thread_unblock()
        .context("failed to unblock signals")?;
    // At most 15 bytes (prctl(2)); ps and top show it.
    let name = std::ffi::CString::new(format!("culvert-w{slot}")).context("failed to name the process")?;
    prctl::set_name(&name).context("failed to name the process")?;

    let (listeners, stores) = (blueprint.listeners()?, blueprint.stores());
    // It does not stand for its slot.
    let load = match post {
        Post::Slot => generation.groups.load_of(slot),
        Post::Carer(_) => None,
    };
    let access_logs = generation.access_logs.duplicate()?;
    let lookout = Arc::clone(&generation.lookout);
    let bell = generation.bell.as_fd().as_raw_fd();
    let mut keep: Vec<RawFd> = vec![control.as_raw_fd(), lookout.raw_fd(), log.install()?, bell];
    keep.extend(listeners.iter().map(|listener| listener.socket.as_raw_fd()));
    keep.extend(access_logs.iter().map(AsRawFd::as_raw_fd));
    let maps = stores.iter().filter_map(|store| store.maps.as_ref());
    keep.extend(maps.flat_map(|maps| maps.fds()));
    process::close_all_except(&keep);

    rights::drop_all(
        generation.user.as_ref(),
        rights::is_transparent(&generation.config),
    )?;
    Ok(WorkerStart {
        slot,
        row,
        owner,
        config: Arc::clone(&generation.config),
        access_logs,
        lookout,
        served: generation.served(),
        listeners,
        peer_rows: generation.assigned.peers.clone(),
        group_rows: generation.assigned.groups.clone(),
        members: Arc::clone(&generation.members),
        board: Arc::clone(board),
        limits: Arc::clone(&generation.limits),
        stores,
        relay_reason: generation.stores.reason().map(str::to_owned),
        totals: totals.clone(),
        load,
        accept_reason: generation.groups.reason().map(str::to_owned),
        bell: Arc::clone(&generation.bell),
        control,
    })
}

/// Pins this process. The configuration was checked against the CPUs that there are, so a refusal means
/// that the host has changed since: a worker on any CPU is better than none.
fn pin(slot: usize, cpus: &[usize]) {
    let mut set = CpuSet::new();
    let result = cpus
        .iter()
        .try_for_each(|cpu| set.set(*cpu))
        .and_then(|()| sched_setaffinity(Pid::this(), &set));
    if let Err(error) = result {
        log::warn!(
            "failed to pin worker {slot} to CPUs {cpus:?}, it runs on any: {}",
            error.desc().to_lowercase()
        );
    }
}
