//! The new binary, in the process of the old one: rebuilds the master from the document and goes on. Workers of
//! the old binary serve until those of this one are ready, as at a reload.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use culvert_bpf::{Bpf, Cgroup, ENTRY_DESCRIPTORS, Entry, OWN_DESCRIPTORS, SlotMaps};
use culvert_shared::config::{self, Config};
use culvert_shared::counters::Board;
use culvert_shared::ids::Owner;
use culvert_shared::limits::Limits;
use culvert_shared::logging;
use culvert_shared::message::SessionId;
use culvert_shared::sessions::Place;
use culvert_shared::sys::inherit;
use culvert_shared::sys::shm::Shared;
use culvert_worker::Store;
use nix::unistd::Pid;

use super::Upgrade;
use super::document::{self, Id, Stage, State, StoreState, WorkerState};
use crate::access_log::{AccessLogs, Files};
use crate::args::Args;
use crate::boot;
use crate::error_log::ErrorLog;
use crate::generation::Generation;
use crate::keeper::Keeper;
use crate::kernel::{Kernel, SlotStores, StoreTable};
use crate::listen::Listeners;
use crate::pidfile::PidFile;
use crate::retain;
use crate::steering::Steering;
use crate::supervise::{Master, Outside, Phase, SlotCare};
use crate::worker::{self, Born, Worker};

type Stores = BTreeMap<u32, Arc<Store>>;

/// `--take-over`: goes on with what the document in that descriptor describes, until told to stop.
///
/// # Errors
/// It cannot: the workers notice that they have no master, and finish what they carry.
pub fn run(args: Args, document: RawFd) -> Result<ExitCode> {
    retain::drop_the_rest()?;
    // They are blocked since before the exec; what came meanwhile waits.
    let signals = boot::take_signals()?;
    let mut state = document::read(inherit::take(document)?)?;
    ensure!(
        state.pid == std::process::id(),
        "the document is for process {}",
        state.pid
    );
    let config = current_config(&args, &state.config)?;
    logging::init(config.error_log.level);
    let log = ErrorLog::of(inherit::take(state.log)?, &config.error_log);
    log.install()?;
    let master = rebuild(args, config, log, &mut state).inspect_err(|error| {
        log::error!("failed to take over from the binary before: {error:#}");
    })?;
    log::info!(
        "culvert {} has taken over: {} workers, {} sessions kept, process {}",
        env!("CARGO_PKG_VERSION"),
        state.workers.len(),
        state.sessions.len(),
        std::process::id()
    );
    master.run(&signals)?;
    Ok(ExitCode::SUCCESS)
}

/// The configuration that is in force, for when the one in the file is refused.
///
/// # Errors
/// Neither can be read.
pub(super) fn current_config(args: &Args, dumped: &str) -> Result<Config> {
    config::load_dumped(dumped)
        // Another version may have other keys; it has taken the file when it was asked.
        .or_else(|_| config::load(&args.config, &args.set))
        .map_err(|diagnostics| {
            let lines: Vec<String> = diagnostics.iter().map(ToString::to_string).collect();
            anyhow!("the configuration has errors: {}", lines.join("; "))
        })
}

fn rebuild(args: Args, config: Config, log: ErrorLog, state: &mut State) -> Result<Master> {
    let now = Instant::now();
    let board_file = inherit::take(state.board)?;
    let board = Arc::new(Shared::<Board>::of_fd(board_file.as_fd(), 1)?);
    let (pid_path, pid_file) = &state.pid_file;
    let pid_file = PidFile::taken_over(pid_path.clone(), inherit::take(*pid_file)?)?;
    let entries = take_entries(state)?;
    let stores = take_stores(state, &entries)?;
    let cgroup = take_cgroup(state);
    let bpf = take_bpf(state, &cgroup, &entries);
    let kernel = Kernel::after(cgroup, bpf, state.last_store);
    let listeners = (state.listeners.iter())
        .map(|(address, slot, socket)| Ok((address.clone(), *slot, inherit::take(*socket)?)))
        .collect::<Result<Vec<_>>>()?;
    // Not opened anew: their folder may be gone by now, and nobody could be asked any more.
    let opened = take_access_logs(state)?;
    let access_logs = AccessLogs::with(&config, Files::of(&config, &opened))?;
    let generation = Generation::taken_over(
        state.generation,
        config,
        std::mem::take(&mut state.rows),
        Listeners::of(listeners)?,
        take_table(state, &stores)?,
        Limits::taken_over(take_all(state.limits.memory)?, state.limits.secret)?,
        access_logs,
    )?;
    let outside = Outside {
        log,
        pid_file,
        // The journal says what the binary before has changed on the host.
        steering: Steering::begin(&generation.config),
        upgrade: Upgrade::from(state.binary.clone(), board_file),
    };
    let mut master = Master::new(args, generation, kernel, board, outside);
    master.has_served = true;
    master.last_owner = state.last_owner;
    if state.paused {
        master.phase = Phase::Paused;
    }
    master.keeper = take_keeper(state, &stores)?;
    // Not if the configuration is another one, see `current_config`.
    let names = state.access_logs.iter().map(|(name, _)| name.as_str());
    let has_its_access_logs = master.current.access_logs.names().eq(names);
    for worker in &state.workers {
        let mut worker = take_worker(worker, &stores, now)?;
        // One that is leaving may be of a generation that was refused, which had the same number.
        if worker.generation == master.current.number && !worker.is_leaving() {
            worker.resolvers = master.current.config.resolvers();
            if has_its_access_logs {
                worker.access_logs = master.current.access_logs.clone();
            }
        }
        master.workers.push(worker);
    }
    for (care, due) in master.slots.iter_mut().zip(&state.replace_in_ms) {
        *care = SlotCare::due(due.map(|ms| now + Duration::from_millis(ms)));
    }
    Ok(master)
}

fn take_all<const N: usize>(numbers: [RawFd; N]) -> Result<[OwnedFd; N]> {
    let taken: Vec<OwnedFd> = numbers.into_iter().map(inherit::take).collect::<Result<_>>()?;
    taken.try_into().map_err(|_| anyhow!("descriptors are missing"))
}

/// By their names.
fn take_access_logs(state: &State) -> Result<HashMap<String, Arc<OwnedFd>>> {
    let mut taken: BTreeMap<RawFd, Arc<OwnedFd>> = BTreeMap::new();
    let mut named = HashMap::new();
    for (name, number) in &state.access_logs {
        let file = match taken.get(number) {
            Some(file) => Arc::clone(file),
            None => Arc::new(inherit::take(*number)?),
        };
        taken.insert(*number, Arc::clone(&file));
        named.insert(name.clone(), file);
    }
    Ok(named)
}

fn take_entries(state: &State) -> Result<Vec<Arc<Entry>>> {
    let take = |entry: &[RawFd; ENTRY_DESCRIPTORS]| Ok(Arc::new(Entry::take_over(take_all(*entry)?)?));
    state.entries.iter().map(take).collect()
}

fn take_stores(state: &State, entries: &[Arc<Entry>]) -> Result<Stores> {
    let store = |store: &StoreState| {
        let taken = take_store(store, entries);
        Ok((
            store.id,
            Arc::new(taken.with_context(|| format!("store {}", store.id))?),
        ))
    };
    state.stores.iter().map(store).collect()
}

fn take_store(state: &StoreState, entries: &[Arc<Entry>]) -> Result<Store> {
    let records_file = inherit::take(state.records)?;
    let records = Shared::of_fd(records_file.as_fd(), state.capacity as usize)?;
    let maps = match &state.maps {
        Some(maps) => {
            let entry = entries.get(maps.entry).context("its entry program is missing")?;
            let own: [OwnedFd; OWN_DESCRIPTORS] = take_all(maps.own)?;
            Some(Arc::new(SlotMaps::take_over(
                own,
                maps.number,
                state.capacity,
                entry,
            )?))
        }
        None => None,
    };
    Ok(Store {
        id: state.id,
        records,
        records_file,
        maps,
    })
}

fn take_cgroup(state: &State) -> Result<Cgroup> {
    match state.cgroup.clone() {
        Some((path, parent)) => Cgroup::take_over(path, parent),
        None => Cgroup::stay(),
    }
}

fn take_bpf(state: &State, cgroup: &Result<Cgroup>, entries: &[Arc<Entry>]) -> Result<Bpf, Option<String>> {
    let Some(entry) = state.bpf else {
        return Err(state.no_bpf.clone());
    };
    let before = entries.get(entry).context("its entry program is missing");
    let cgroup = cgroup.as_ref().map_err(|error| anyhow!("{error:#}"));
    before
        .and_then(|before| Bpf::take_over(before, cgroup?))
        .map_err(|error| {
            log::error!("in-kernel forwarding is not to be had any more, new sessions are copied: {error:#}");
            Some(format!("{error:#}"))
        })
}

fn take_table(state: &State, stores: &Stores) -> Result<StoreTable> {
    let slot = |(own, inherited): &(u32, Vec<u32>)| {
        Ok(SlotStores {
            own: find(stores, *own)?,
            inherited: inherited
                .iter()
                .map(|id| find(stores, *id))
                .collect::<Result<_>>()?,
        })
    };
    let slots = state.slots.iter().map(slot).collect::<Result<_>>()?;
    Ok(StoreTable::of(slots, state.no_maps.clone()))
}

fn find(stores: &Stores, id: u32) -> Result<Arc<Store>> {
    stores
        .get(&id)
        .cloned()
        .with_context(|| format!("store {id} was not handed over"))
}

fn take_keeper(state: &State, stores: &Stores) -> Result<Keeper> {
    let mut sessions = Vec::new();
    for (id, holder, sockets) in &state.sessions {
        let id = session(*id);
        let store = find(stores, id.store)?;
        sessions.push((id, holder.map(Owner), store, take_all(*sockets)?));
    }
    Ok(Keeper::of(
        sessions,
        state.unheld.iter().copied().map(session).collect(),
    ))
}

fn take_worker(state: &WorkerState, stores: &Stores, now: Instant) -> Result<Worker> {
    let in_ms = |ms| now + Duration::from_millis(ms);
    let stage = match state.stage {
        Stage::Starting => worker::State::Starting,
        Stage::Serving => worker::State::Serving,
        Stage::Draining { stop_in_ms } => worker::State::Draining(stop_in_ms.map(in_ms)),
        Stage::Stopping { kill_in_ms } => worker::State::Stopping(in_ms(kill_in_ms)),
        Stage::Killed => worker::State::Killed,
    };
    let born = Born {
        pid: Pid::from_raw(state.pid),
        slot: state.slot,
        row: state.row,
        owner: Owner(state.owner),
        generation: state.generation,
        stores: state
            .stores
            .iter()
            .map(|id| find(stores, *id))
            .collect::<Result<_>>()?,
        // Those of the present generation are known, see `rebuild`; another one goes on with the files that it has.
        access_logs: AccessLogs::default(),
        resolvers: Vec::new(),
        control: state.control.map(inherit::take).transpose()?,
    };
    let to_adopt = state.to_adopt.iter().copied().map(session).collect();
    Ok(Worker::taken_over(born, stage, state.leaving, to_adopt, now))
}

fn session([store, place, generation]: Id) -> SessionId {
    SessionId {
        store,
        place: Place(place),
        generation,
    }
}
