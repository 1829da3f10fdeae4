//! Where new connections go: lets the accept program choose among the sockets of each listening address, and shows it
//! which worker slots are served. Where there is no such program, the kernel deals connections out by their
//! hash, to slots without a worker too.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::os::fd::AsFd;
use std::rc::Rc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use culvert_bpf::{Group, Put, SlotLoad, Steering};

use crate::listen::{Bound, Listeners};
use crate::supervise::Master;
use crate::worker::{State, Worker};

/// How long the kernel may take to free the map of a program that was replaced. A socket can be in one such map
/// only, and that of a process that is gone, or was replaced by another binary, still has it until then.
const FREEING_PATIENCE: Duration = Duration::from_secs(2);

/// How soon it is asked again.
const RETRY: Duration = Duration::from_millis(5);

/// What the programs of all addresses share; empty where BPF is not to be had or not wanted.
#[derive(Default)]
pub struct Accept {
    steering: Option<Rc<Steering>>,
}

/// What the programs know of one configuration's addresses. Cloning shares it.
#[derive(Clone, Default)]
pub struct Groups {
    groups: HashMap<Bound, Rc<Group>>,
    steering: Option<Rc<Steering>>,
    /// Why there are none.
    reason: Option<String>,
}

impl Accept {
    /// Groups for all addresses of `listeners`: those of `current`, and new ones for the rest. The program learns
    /// of new sockets here, and chooses them when [`Master::steer`] says so. `served` are the sockets that `current`
    /// stands for.
    ///
    /// # Errors
    /// A program could not be loaded, or refuses a socket.
    pub fn groups(&mut self, listeners: &Listeners, current: &Groups, served: &Listeners) -> Result<Groups> {
        let mut draft = self.draft(listeners, current, served)?;
        loop {
            match draft.fill(listeners)? {
                Some(groups) => return Ok(groups),
                None => sleep(RETRY),
            }
        }
    }

    /// Loads the program if that was not done yet, and says whether it was not: it takes its time.
    ///
    /// # Errors
    /// The program could not be loaded.
    pub fn open(&mut self) -> Result<bool> {
        let is_new = self.steering.is_none();
        if is_new {
            self.steering = Some(Rc::new(Steering::open()?));
        }
        Ok(is_new)
    }

    /// As [`Accept::groups`], except that the program has still to learn of the sockets.
    ///
    /// # Errors
    /// A program could not be loaded, or attached to a socket.
    pub fn draft(&mut self, listeners: &Listeners, current: &Groups, served: &Listeners) -> Result<Draft> {
        self.open()?;
        let steering = self.steering.clone().context("a program that was loaded")?;
        let mut groups = current.groups.clone();
        let both = || served.sockets().chain(listeners.sockets());
        let missing: HashSet<Bound> = (both().map(|(bound, ..)| bound))
            .filter(|bound| !groups.contains_key(bound))
            .collect();
        steering.make_room(missing.len())?;
        // All of them, before any is given a socket: the program of a binary before this one has the sockets of all its
        // addresses until the last has another.
        for (bound, _, socket) in both() {
            if let Entry::Vacant(place) = groups.entry(bound) {
                let group = steering
                    .attach(socket.as_fd())
                    .with_context(|| what(place.key()))?;
                place.insert(Rc::new(group));
            }
        }
        Ok(Draft {
            groups,
            steering,
            give_up: None,
        })
    }

    /// As [`Accept::groups`] at the start, when there is nothing yet to fall back on.
    pub fn first_groups(&mut self, listeners: &Listeners) -> Groups {
        self.groups(listeners, &Groups::default(), &Listeners::default())
            .unwrap_or_else(|error| {
                log::warn!("new connections are dealt out by their hash: {error:#}");
                Groups::none(Some(format!("{error:#}")))
            })
    }
}

fn what(bound: &Bound) -> String {
    format!("failed to choose workers for connections to {}", bound.address)
}

/// Groups whose program does not know of all sockets yet.
pub struct Draft {
    groups: HashMap<Bound, Rc<Group>>,
    steering: Rc<Steering>,
    give_up: Option<Instant>,
}

impl Draft {
    /// Lets the program learn of `listeners`, those that it was drawn up for. `None`: the kernel has still to free a map
    /// of a program that was replaced; to be asked again.
    ///
    /// # Errors
    /// The program refuses a socket, or the kernel takes too long.
    pub fn fill(&mut self, listeners: &Listeners) -> Result<Option<Groups>> {
        let mut next = Groups {
            steering: Some(Rc::clone(&self.steering)),
            ..Groups::default()
        };
        for (bound, slot, socket) in listeners.sockets() {
            let group = self.groups.get(&bound).with_context(|| what(&bound))?;
            match group.put(slot, socket.as_fd()).with_context(|| what(&bound))? {
                Put::Done => {}
                Put::Busy(error) => {
                    let now = Instant::now();
                    let give_up = *self.give_up.get_or_insert(now + FREEING_PATIENCE);
                    return match now < give_up {
                        true => Ok(None),
                        false => Err(error).with_context(|| what(&bound)),
                    };
                }
            }
            next.groups.insert(bound, Rc::clone(group));
        }
        Ok(Some(next))
    }
}

impl Groups {
    /// No programs, and why.
    pub fn none(reason: Option<String>) -> Groups {
        Groups {
            reason,
            ..Groups::default()
        }
    }

    /// What the worker of a slot tells the programs; `None` where there are none.
    pub fn load_of(&self, slot: usize) -> Option<SlotLoad> {
        self.steering.as_ref().and_then(|steering| steering.load_of(slot))
    }

    /// Why there are none.
    pub fn reason(&self) -> Option<&str> {
        self.reason.as_deref()
    }
}

impl Master {
    /// Lets connections that wait in the sockets of a slot go to other workers, because this one's replacement
    /// is some time off.
    pub fn rescue(&mut self, slot: usize) {
        let others_serve = self.workers.iter().any(|worker| self.serves(worker));
        // While a reload is under way the next generation has these sockets too, so they would not be closed.
        if self.current.groups.steering.is_none() || self.is_reloading() || !others_serve {
            return;
        }
        self.steer();
        let renewed = self.current.listeners.renewed(&self.current.config, slot);
        let renewed = renewed.and_then(|listeners| {
            let current = &self.current;
            let groups = (self.kernel.accept).groups(&listeners, &current.groups, &current.listeners)?;
            Ok((listeners, groups))
        });
        match renewed {
            Ok((listeners, groups)) => {
                self.current.listeners = listeners;
                self.current.groups = groups;
            }
            Err(error) => log::warn!("connections wait for the next worker {slot}: {error:#}"),
        }
    }

    fn serves(&self, worker: &Worker) -> bool {
        worker.generation == self.current.number && worker.state() == State::Serving && !worker.is_leaving()
    }

    /// Shows the accept programs which slots there are and which of them have a worker that serves. To be
    /// called whenever that may have changed.
    pub fn steer(&self) {
        let Some(steering) = &self.current.groups.steering else {
            return;
        };
        let serves = |slot| {
            let mut workers = self.workers.iter();
            workers.any(|worker| worker.slot == slot && self.serves(worker))
        };
        let slots = self.current.config.worker_cpus.iter().enumerate();
        steering.show(slots.map(|(slot, cpus)| (serves(slot), cpus.as_slice())));
    }
}
