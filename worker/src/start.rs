//! What a worker is given by the master.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use culvert_bpf::{SlotLoad, Totals};
use culvert_shared::busy::Lookout;
use culvert_shared::config::{Address, Config};
use culvert_shared::counters::Board;
use culvert_shared::ids::Owner;
use culvert_shared::limits::Limits;
use culvert_shared::logging;
use culvert_shared::members::MemberSet;
use culvert_shared::sys::shm::Shared;

use nix::sys::eventfd::EventFd;

use crate::store::Store;

/// Everything a worker needs; made by the master before the fork, or in the child right after it.
pub struct WorkerStart {
    /// The worker slot.
    pub slot: usize,
    /// The worker's row on the board, already claimed.
    pub row: usize,
    /// The owner mark of the sockmap pairs that this worker takes.
    pub owner: Owner,
    /// The configuration.
    pub config: Arc<Config>,
    /// The files of the access logs, in the order of [`Config::access_logs`].
    pub access_logs: Vec<OwnedFd>,
    /// The listeners of the configuration, which the sessions that it holds belong to.
    pub served: Vec<Served>,
    /// The sockets of those that it takes connections from.
    pub listeners: Vec<Listener>,
    /// Rows on the board: for each upstream, for each of its peers.
    pub peer_rows: Vec<Vec<usize>>,
    /// The peers that names stand for at the moment, for each upstream.
    pub members: Arc<Shared<MemberSet>>,
    /// Rows on the board: for each upstream.
    pub group_rows: Vec<usize>,
    /// The board.
    pub board: Arc<Shared<Board>>,
    /// What limits count.
    pub limits: Arc<Limits>,
    /// Where workers tell of their busiest sessions.
    pub lookout: Arc<Lookout>,
    /// The slot's own store, then those of other slots that it is to care for.
    pub stores: Vec<Arc<Store>>,
    /// Why there are none.
    pub relay_reason: Option<String>,
    /// The bytes that the kernel forwarded, whole program; `None` where BPF is not to be had.
    pub totals: Option<Arc<Totals>>,
    /// What the worker tells the programs that choose among workers; `None` where there are none.
    pub load: Option<SlotLoad>,
    /// Why there are none.
    pub accept_reason: Option<String>,
    /// What all workers hear when a place at a peer is free for which somebody waits.
    pub bell: Arc<EventFd>,
    /// The worker's end of the pair to the master.
    pub control: OwnedFd,
}

/// A listener as sessions know it, whoever accepted them.
pub struct Served {
    /// Its row on the board.
    pub row: usize,
    /// The index of its server in [`Config::servers`].
    pub server: usize,
    /// The address that it is bound to.
    pub address: Address,
}

/// One listening socket.
pub struct Listener {
    /// The socket.
    pub socket: OwnedFd,
    /// The address that it is bound to.
    pub address: Address,
    /// The index of its server in [`Config::servers`].
    pub server: usize,
    /// Its row on the board.
    pub row: usize,
    /// Connections begin with a PROXY header.
    pub proxy_protocol: bool,
}

/// Serves until told to stop; returns the process's exit status.
pub fn run(start: WorkerStart) -> i32 {
    let board = Arc::clone(&start.board);
    let on_drop = move |lines| Board::add(&board[0].log_lines_dropped, lines);
    let served = crate::event_loop::Worker::new(start).and_then(|mut worker| {
        // Before the log writers' threads start, which inherit it; after what reads files.
        crate::confine::apply()?;
        logging::start_writer(on_drop)?;
        worker.access_logs.start(&worker.board)?;
        worker.serve()
    });
    let status = match served {
        Ok(()) => 0,
        Err(error) => {
            log::error!("worker failed: {error:#}");
            1
        }
    };
    logging::flush();
    status
}
