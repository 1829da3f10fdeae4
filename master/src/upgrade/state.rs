//! Writes the master's state down: what each part of it holds, by name and number of descriptor.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use culvert_bpf::Entry;
use culvert_shared::config;
use culvert_shared::message::SessionId;
use culvert_worker::Store;

use super::check;
use super::document::{Descriptors, Id, LimitsState, MapsState, Stage, State, StoreState, WorkerState};
use crate::supervise::{Master, Phase};
use crate::worker::{self, Worker};

impl Master {
    /// Everything that another binary needs to go on. The descriptors that it names are added to
    /// `descriptors`.
    pub(super) fn to_state<'a>(&'a self, descriptors: &mut Descriptors<'a>, now: Instant) -> Result<State> {
        let mut entries: Vec<&Arc<Entry>> = Vec::new();
        let mut stores = Vec::new();
        for store in self.all_stores() {
            let maps = store.maps.as_ref().map(|maps| {
                let entry = index_of(&mut entries, maps.entry());
                MapsState {
                    own: maps.descriptors().map(|fd| descriptors.add(fd)),
                    number: maps.number(),
                    entry,
                }
            });
            stores.push(StoreState {
                id: store.id,
                capacity: store.records.len() as u32,
                records: descriptors.add(store.records_file.as_fd()),
                maps,
            });
        }
        let bpf = self.kernel.bpf().map(|bpf| index_of(&mut entries, bpf.entry()));
        let cgroup = self.kernel.cgroup().map(|cgroup| {
            let parent = cgroup.parent().map(ToOwned::to_owned);
            (cgroup.path().to_owned(), parent)
        });
        let slots = self.current.stores.slots().iter();
        let sessions = self.keeper.sessions().map(|(session, holder, sockets)| {
            let sockets = sockets.map(|socket| descriptors.add(socket));
            (id(session), holder.map(|owner| owner.0), sockets)
        });
        let limits = &self.current.limits;
        Ok(State {
            sessions: sessions.collect(),
            unheld: self.keeper.unheld().iter().copied().map(id).collect(),
            pid: std::process::id(),
            binary: self.upgrade.binary.clone(),
            capabilities: check::effective_capabilities().context("failed to say what rights there are")?,
            config: config::dump(&self.current.config),
            generation: self.current.number,
            rows: self.current.rows.clone(),
            paused: self.phase == Phase::Paused,
            last_owner: self.last_owner,
            listeners: (self.current.listeners.named())
                .map(|(address, slot, socket)| (address, slot, descriptors.add(socket.as_fd())))
                .collect(),
            cgroup,
            bpf,
            no_bpf: self.kernel.reason().map(str::to_owned),
            entries: entries
                .into_iter()
                .map(|entry| entry.descriptors().map(|fd| descriptors.add(fd)))
                .collect(),
            stores,
            last_store: self.kernel.last_store,
            slots: slots
                .map(|slot| (slot.own.id, slot.inherited.iter().map(|store| store.id).collect()))
                .collect(),
            no_maps: self.current.stores.reason().map(str::to_owned),
            replace_in_ms: self
                .slots
                .iter()
                .map(|care| care.replace_at.map(|at| millis_until(at, now)))
                .collect(),
            workers: self
                .workers
                .iter()
                .map(|worker| worker_state(worker, descriptors, now))
                .collect(),
            board: descriptors.add(self.upgrade.board_file.as_fd()),
            limits: LimitsState {
                memory: limits.descriptors().map(|fd| descriptors.add(fd)),
                secret: limits.secret(),
            },
            log: descriptors.add(self.log.as_fd()),
            access_logs: (self.current.access_logs.names())
                .zip(self.current.access_logs.descriptors())
                .map(|(name, file)| (name, descriptors.add(file)))
                .collect(),
            pid_file: (
                self.pid_file.path().to_owned(),
                descriptors.add(self.pid_file.descriptor()),
            ),
        })
    }

    /// The stores of the current generation, and those that workers of earlier ones still have.
    fn all_stores(&self) -> Vec<&Arc<Store>> {
        let of_workers = self.workers.iter().flat_map(|worker| &worker.stores);
        let of_sessions = self.keeper.stores();
        let mut stores: Vec<&Arc<Store>> = self
            .current
            .stores
            .all()
            .chain(of_workers)
            .chain(of_sessions)
            .collect();
        stores.sort_by_key(|store| store.id);
        stores.dedup_by_key(|store| store.id);
        stores
    }
}

fn index_of<'a>(entries: &mut Vec<&'a Arc<Entry>>, wanted: &'a Arc<Entry>) -> usize {
    let known = entries.iter().position(|entry| Arc::ptr_eq(entry, wanted));
    known.unwrap_or_else(|| {
        entries.push(wanted);
        entries.len() - 1
    })
}

fn worker_state<'a>(worker: &'a Worker, descriptors: &mut Descriptors<'a>, now: Instant) -> WorkerState {
    WorkerState {
        pid: worker.pid.as_raw(),
        slot: worker.slot,
        row: worker.row,
        owner: worker.owner.0,
        generation: worker.generation,
        stage: match worker.state() {
            worker::State::Starting => Stage::Starting,
            worker::State::Serving => Stage::Serving,
            worker::State::Draining(stop_at) => Stage::Draining {
                stop_in_ms: stop_at.map(|at| millis_until(at, now)),
            },
            worker::State::Stopping(kill_at) => Stage::Stopping {
                kill_in_ms: millis_until(kill_at, now),
            },
            worker::State::Killed => Stage::Killed,
        },
        leaving: worker.is_leaving(),
        stores: worker.stores.iter().map(|store| store.id).collect(),
        control: worker.control().map(|control| descriptors.add(control)),
        to_adopt: worker.to_adopt.iter().copied().map(id).collect(),
    }
}

fn id(session: SessionId) -> Id {
    [session.store, session.place.0, session.generation]
}

fn millis_until(at: Instant, now: Instant) -> u64 {
    at.saturating_duration_since(now).as_millis() as u64
}
