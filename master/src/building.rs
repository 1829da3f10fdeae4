//! What a reload has to have made before its generation can be put together, and what takes its time: maps and
//! programs that the kernel has to check. It is made piece by piece, one in each turn of the master's loop, so that a
//! worker that dies meanwhile is replaced at once and not when everything stands.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use culvert_shared::config::Config;
use culvert_worker::Store;

use crate::accepting::{Draft, Groups};
use crate::generation::Generation;
use crate::kernel::Kernel;
use crate::listen::Listeners;
use crate::rights;

/// When the kernel is asked again that has not let go of something.
const RETRY: Duration = Duration::from_millis(5);

/// A generation of which some pieces are made. What it has made goes with it.
pub struct Building {
    config: Config,
    begun: Instant,
    due: Instant,
    own: Vec<Arc<Store>>,
    next: Piece,
}

/// What is to be made next, in this order.
enum Piece {
    /// What all slots have in common.
    Kernel,
    /// The stores of the slots, one after the other.
    Stores,
    /// The program that chooses among workers.
    Program,
    /// The listening sockets.
    Sockets,
    /// What that program, if it can be had, knows of them.
    Groups(Listeners, Option<Draft>),
}

/// All the pieces.
pub struct Built {
    /// The configuration.
    pub config: Config,
    /// For each slot its own store.
    pub own: Vec<Arc<Store>>,
    /// The listening sockets.
    pub listeners: Listeners,
    /// What chooses among them; `None` where there is no BPF.
    pub groups: Option<Groups>,
    /// When it was begun.
    pub begun: Instant,
}

/// How far building has got.
pub enum Step {
    /// Pieces are left.
    More(Building),
    /// None is.
    Done(Built),
}

impl Building {
    /// Nothing is made yet.
    ///
    /// # Errors
    /// The workers cannot be had that the configuration asks for.
    pub fn begin(config: Config, now: Instant) -> Result<Building> {
        rights::check(&config)?;
        Ok(Building {
            own: Vec::with_capacity(config.worker_cpus.len()),
            config,
            begun: now,
            due: now,
            next: Piece::Kernel,
        })
    }

    /// When the next piece is to be made.
    pub fn due(&self) -> Instant {
        self.due
    }

    /// Makes the next piece that takes its time, and those up to it that take none. `current`, which serves, must have
    /// the same stores and sockets each time.
    ///
    /// # Errors
    /// Something cannot be had.
    pub fn step(self, current: &Generation, kernel: &mut Kernel, now: Instant) -> Result<Step> {
        let Building {
            config,
            begun,
            mut due,
            mut own,
            mut next,
        } = self;
        loop {
            let takes_time;
            (next, takes_time) = match next {
                Piece::Kernel => {
                    let was_open = kernel.is_open();
                    kernel.open_for(&config);
                    (Piece::Stores, kernel.is_open() != was_open)
                }
                Piece::Stores if own.len() < config.worker_cpus.len() => {
                    let (store, is_new) = kernel.own_store(&config, &current.stores, own.len())?;
                    own.push(store);
                    (Piece::Stores, is_new)
                }
                Piece::Stores => (Piece::Program, false),
                Piece::Program => (Piece::Sockets, kernel.is_open() && kernel.accept.open()?),
                Piece::Sockets => {
                    let listeners = current.listeners.next(&config)?;
                    let draft = match kernel.is_open() {
                        true => {
                            Some((kernel.accept).draft(&listeners, &current.groups, &current.listeners)?)
                        }
                        false => None,
                    };
                    (Piece::Groups(listeners, draft), false)
                }
                Piece::Groups(listeners, mut draft) => {
                    let groups = match &mut draft {
                        Some(draft) => draft.fill(&listeners)?,
                        None => None,
                    };
                    if groups.is_some() || draft.is_none() {
                        return Ok(Step::Done(Built {
                            config,
                            own,
                            listeners,
                            groups,
                            begun,
                        }));
                    }
                    due = now + RETRY;
                    (Piece::Groups(listeners, draft), true)
                }
            };
            if takes_time {
                return Ok(Step::More(Building {
                    config,
                    begun,
                    due,
                    own,
                    next,
                }));
            }
        }
    }
}
