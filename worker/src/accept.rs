//! New downstream connections: how many at a turn, when not at all, and what the board is told.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;

use anyhow::{Context, Result};
use culvert_bpf::SlotLoad;
use culvert_shared::client;
use culvert_shared::config::{Action, Address};
use culvert_shared::counters::{Board, WorkerRow};
use mio::net::{TcpListener, UnixListener};

use crate::clock;
use crate::event_loop::{ACCEPT_TIMER, Worker};
use crate::proxy_protocol::canonical;
use crate::route::Ends;
use crate::session::Session;
use crate::start::Listener;

/// Connections that one listener may bring in one turn at most, so that no listener starves the sessions.
const TURN_BUDGET: usize = 64;
/// How long a listener rests after the process ran out of descriptors or memory (nginx: 500 ms).
const REST_MS: u64 = 500;
/// Connections for `http` and the status document that a worker holds besides its `worker_connections` sessions, so that it can
/// be looked at when it is full; more of them count as sessions. The reserve of descriptors has room for these.
const OWN_CONNECTIONS: u32 = 24;
/// How often a full worker says so at most.
const FULL_MS: u64 = 60_000;

/// What the programs that choose among workers are told of this one.
pub struct Intake {
    load: Option<SlotLoad>,
    reason: Option<String>,
    /// Connections accepted since they were told.
    accepted: u32,
    /// The turn of the event loop.
    turn: u64,
    /// When it is to be said again that the worker is full.
    tell_full_ms: u64,
}

impl Intake {
    pub(crate) fn new(load: Option<SlotLoad>, reason: Option<String>) -> Intake {
        Intake {
            load,
            reason,
            accepted: 0,
            turn: 0,
            tell_full_ms: 0,
        }
    }

    /// Another turn of the event loop begins.
    pub(crate) fn turn(&mut self) {
        self.turn += 1;
    }

    /// How the worker of a new connection is chosen, as the status document has it.
    pub(crate) fn chosen_by(&self) -> &'static str {
        if self.load.is_some() { "cpu" } else { "hash" }
    }

    /// Why it is not by CPU.
    pub(crate) fn reason(&self) -> Option<&str> {
        self.reason.as_deref()
    }
}

/// A listening socket, of one of the two kinds that there are.
enum Socket {
    /// The worker's own.
    Tcp(TcpListener),
    /// Shared by all workers: the kernel wakes each of them for a connection, and the first one takes it.
    Unix(UnixListener),
}

impl Socket {
    fn new(listener: OwnedFd, address: &Address) -> Socket {
        match address {
            Address::Tcp(_) => Socket::Tcp(TcpListener::from_std(listener.into())),
            Address::Unix(_) => Socket::Unix(UnixListener::from_std(listener.into())),
        }
    }

    /// The next connection, and who made it. An IPv4 client of a listener for both is an IPv4 client.
    fn accept(&self) -> io::Result<(OwnedFd, SocketAddr)> {
        match self {
            Socket::Tcp(listener) => {
                let (stream, remote) = listener.accept()?;
                Ok((stream.into(), canonical(remote)))
            }
            Socket::Unix(listener) => Ok((listener.accept()?.0.into(), client::UNIX)),
        }
    }

    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Socket::Tcp(listener) => listener.as_fd(),
            Socket::Unix(listener) => listener.as_fd(),
        }
    }

    /// Whether a program has chosen this worker for its connections.
    fn is_chosen(&self) -> bool {
        matches!(self, Socket::Tcp(_))
    }
}

/// A listening socket in use.
pub struct Listening {
    socket: Socket,
    pub(crate) address: Address,
    pub(crate) server: usize,
    pub(crate) row: usize,
    /// Connections begin with a PROXY header.
    proxy_protocol: bool,
    /// Connections that it may bring in this turn. An attempt that finds none costs as much as one that finds one, so
    /// it is one at first, and more where there are always some left.
    batch: usize,
    /// The turn in which it last had connections.
    reported: u64,
    /// It is not watched meanwhile.
    unheeded: bool,
    /// It rests: the process ran out of descriptors or memory.
    resting: bool,
    /// It rests: the worker holds as many connections of its kind as it may.
    full: bool,
}

impl Listening {
    pub(crate) fn open_all(listeners: Vec<Listener>) -> Result<Vec<Listening>> {
        let open = |listener: Listener| Listening {
            socket: Socket::new(listener.socket, &listener.address),
            address: listener.address,
            server: listener.server,
            row: listener.row,
            proxy_protocol: listener.proxy_protocol,
            batch: 1,
            reported: 0,
            unheeded: false,
            resting: false,
            full: false,
        };
        Ok(listeners.into_iter().map(open).collect())
    }
}

impl Worker {
    pub(crate) fn listen(&mut self) -> Result<()> {
        for (token, listener) in self.listeners.iter_mut().enumerate() {
            let watched = self.sockets.watch_listener(listener.socket.as_fd(), token);
            watched.with_context(|| format!("failed to watch the listener {}", listener.address))?;
        }
        Ok(())
    }

    /// Empties the accept queues once more, as far as there is room, and closes the listeners: what is
    /// queued on a socket that no other process holds would be reset.
    pub(crate) fn stop_listening(&mut self) {
        for listener in 0..self.listeners.len() {
            while self.accept_one(listener) {}
        }
        for listener in &mut self.listeners {
            let _ = self.sockets.unwatch_listener(listener.socket.as_fd());
        }
        self.listeners.clear();
    }

    /// Accepts from a listener that has connections; what is left is reported again.
    pub(crate) fn accept(&mut self, listener: usize) {
        let turn = self.intake.turn;
        let Some(listening) = self.listeners.get_mut(listener) else {
            return;
        };
        let had_some = listening.reported + 1 == turn;
        let more = if had_some { 2 * listening.batch } else { 1 };
        listening.batch = more.min(TURN_BUDGET);
        listening.reported = turn;
        for _ in 0..listening.batch {
            if !self.accept_one(listener) {
                return;
            }
        }
    }

    /// Accepts the next connection of a listener; false: there is none, or it has to wait.
    fn accept_one(&mut self, listener: usize) -> bool {
        let Some(server) = self.listeners.get(listener).map(|listening| listening.server) else {
            return false;
        };
        let full = self.is_full(server);
        if full {
            self.tell_full();
        }
        let listening = &mut self.listeners[listener];
        listening.full = full;
        if full || listening.resting {
            self.heed(listener);
            return false;
        }
        match listening.socket.accept() {
            Ok((stream, remote)) => {
                self.intake.accepted += u32::from(listening.socket.is_chosen());
                self.begin(listener, stream, remote);
                true
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                listening.batch = 1;
                false
            }
            // The connection was gone before it was accepted (accept(2)): the next one may be fine.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(nix::libc::ECONNABORTED | nix::libc::EPROTO)
                ) =>
            {
                log::debug!(
                    "a connection on {} was lost before it was accepted",
                    listening.address
                );
                true
            }
            // Most likely EMFILE, ENFILE, ENOBUFS or ENOMEM: trying again at once would spin.
            Err(error) => {
                log::warn!(
                    "failed to accept on {}: {error}; resting for {REST_MS} ms",
                    listening.address
                );
                listening.resting = true;
                // All that rest try again at once (as in nginx): one after the other must not put the first one off.
                self.wheel.set_earlier(ACCEPT_TIMER, clock::now_ms() + REST_MS);
                self.heed(listener);
                false
            }
        }
    }

    /// Whether the worker holds as many connections as it may of the kind that a server's are.
    fn is_full(&self, server: usize) -> bool {
        let (held, own) = self.held();
        let is_own = !matches!(self.config.servers[server].action, Action::Proxy(_));
        held >= self.config.worker_connections && !(is_own && own < OWN_CONNECTIONS)
    }

    /// Says now and then that clients wait because the worker is full.
    fn tell_full(&mut self) {
        let now_ms = clock::now_ms();
        if now_ms < self.intake.tell_full_ms {
            return;
        }
        self.intake.tell_full_ms = now_ms + FULL_MS;
        let most = self.config.worker_connections;
        log::warn!(
            "worker_connections = {most} sessions are held: further clients that come to this worker wait until one \
             ends; raise it, or worker_processes"
        );
    }

    /// What it holds: what counts as sessions, and the connections that it answers itself.
    fn held(&self) -> (u32, u32) {
        let sessions = self.gauges().sessions.load(Relaxed);
        let all = u32::try_from(self.table.len()).unwrap_or(u32::MAX);
        let own = all.saturating_sub(sessions);
        (sessions + own.saturating_sub(OWN_CONNECTIONS), own)
    }

    /// Watches a listener that may bring connections, and no other: it would be reported again and again.
    fn heed(&mut self, listener: usize) {
        let listening = &mut self.listeners[listener];
        let unheeded = listening.full || listening.resting;
        if unheeded != listening.unheeded {
            // It cannot fail: it is watched, and nothing is allocated for it.
            let _ = self
                .sockets
                .heed_listener(listening.socket.as_fd(), listener, !unheeded);
            listening.unheeded = unheeded;
        }
    }

    /// Tells the programs that choose among workers what this one holds and how much more it can. Once a turn
    /// is enough: what it has accepted since counts as coming to it.
    pub(crate) fn tell_load(&mut self) {
        let Some(load) = &self.intake.load else { return };
        // While it drains, its slot is another worker's.
        if !self.draining {
            let rests = self.listeners.iter().any(|listener| listener.resting);
            let limit = if rests { 0 } else { self.config.worker_connections };
            let (sessions, _) = self.held();
            load.publish(sessions, limit.saturating_sub(sessions));
        }
        load.count_taken(std::mem::take(&mut self.intake.accepted));
    }

    /// Its slot is another worker's from now on. That has told its own load when it began, and this one since: a slot without
    /// room would be passed over, so that nothing wakes the other one, which would say how it is.
    pub(crate) fn leave_slot(&self) {
        if let Some(load) = &self.intake.load {
            load.publish(0, self.config.worker_connections);
        }
    }

    /// A session has ended: listeners that rest for want of room may go on.
    pub(crate) fn make_room(&mut self) {
        for listener in 0..self.listeners.len() {
            if std::mem::take(&mut self.listeners[listener].full) {
                self.heed(listener);
            }
        }
    }

    /// Listeners that rest for want of descriptors may try again.
    pub(crate) fn end_rest(&mut self) {
        for listener in 0..self.listeners.len() {
            if std::mem::take(&mut self.listeners[listener].resting) {
                self.heed(listener);
            }
        }
    }

    fn begin(&mut self, listener: usize, downstream: OwnedFd, remote: SocketAddr) {
        let listening = &self.listeners[listener];
        let (server, row) = (listening.server, listening.row);
        let local = listening.address.tcp().unwrap_or(client::UNIX);
        let header_first = listening.proxy_protocol;
        let now_ms = clock::now_ms();
        let ends = Ends::new(remote, local);
        let settings = Rc::clone(&self.settings[server]);
        let is_http = self.config.servers[server].action == Action::Http;
        let proxied = matches!(self.config.servers[server].action, Action::Proxy(_));
        let number = match proxied {
            true => 1 + self.board[0].sessions.fetch_add(1, Relaxed),
            false => 0,
        };
        let mut session = Session::new(number, downstream, ends, row, settings, now_ms);
        session.server = Some(server);
        session.is_status = !proxied;
        Board::add(&self.board[0].listeners[row].accepted, 1);
        let token = self.table.reserve();
        self.table.put(token, Box::new(session));
        if proxied {
            WorkerRow::up(&self.gauges().sessions);
            Board::add(&self.gauges().accepted, 1);
            WorkerRow::up(&self.gauges().listener_active[row]);
        }
        self.with_session(token, |worker, session| {
            if is_http {
                worker.answer_http(session)
            } else {
                worker.enter(token, session, header_first)
            }
        });
    }
}
