//! New downstream connections: how many at a turn, when not at all, and what the board is told.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;

use anyhow::{Context, Result};
use culvert_bpf::SlotLoad;
use culvert_shared::client;
use culvert_shared::config::{Action, Address};
use culvert_shared::counters::{Board, WorkerRow};
use mio::net::{TcpListener, UnixListener};
use mio::{Interest, Registry, Token};

use crate::clock;
use crate::event_loop::{ACCEPT_TIMER, Worker};
use crate::proxy_protocol::canonical;
use crate::route::Ends;
use crate::session::Session;
use crate::start::Listener;

/// Connections that one listener may bring in one turn, so that no listener starves the sessions.
const TURN_BUDGET: usize = 64;
/// How long a listener rests after the process ran out of descriptors or memory (nginx: 500 ms).
const REST_MS: u64 = 500;

/// What the programs that choose among workers are told of this one.
pub struct Intake {
    load: Option<SlotLoad>,
    reason: Option<String>,
    /// Connections accepted since they were told.
    accepted: u32,
}

impl Intake {
    pub(crate) fn new(load: Option<SlotLoad>, reason: Option<String>) -> Intake {
        Intake {
            load,
            reason,
            accepted: 0,
        }
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

    fn watch(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        match self {
            Socket::Tcp(listener) => registry.register(listener, token, Interest::READABLE),
            Socket::Unix(listener) => registry.register(listener, token, Interest::READABLE),
        }
    }

    fn unwatch(&mut self, registry: &Registry) -> io::Result<()> {
        match self {
            Socket::Tcp(listener) => registry.deregister(listener),
            Socket::Unix(listener) => registry.deregister(listener),
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
    /// The accept queue may hold more: readiness is edge-triggered and was not used up.
    more: bool,
    /// It rests: the process ran out of descriptors or memory.
    resting: bool,
    /// It rests: the worker holds `worker_connections` sessions.
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
            more: false,
            resting: false,
            full: false,
        };
        Ok(listeners.into_iter().map(open).collect())
    }

    /// Whether it has to be asked again without waiting.
    pub(crate) fn has_more(&self) -> bool {
        self.more && !self.resting && !self.full
    }
}

impl Worker {
    pub(crate) fn listen(&mut self) -> Result<()> {
        for (token, listener) in self.listeners.iter_mut().enumerate() {
            let watched = listener.socket.watch(self.poll.registry(), Token(token));
            watched.with_context(|| format!("failed to watch the listener {}", listener.address))?;
        }
        Ok(())
    }

    /// Empties the accept queues once more, as far as there is room, and closes the listeners: what is
    /// queued on a socket that no other process holds would be reset.
    pub(crate) fn stop_listening(&mut self) {
        for listener in 0..self.listeners.len() {
            self.accept(listener);
            while self.listeners[listener].has_more() {
                self.accept(listener);
            }
        }
        for listener in &mut self.listeners {
            let _ = listener.socket.unwatch(self.poll.registry());
        }
        self.listeners.clear();
    }

    /// Accepts from a listener until its queue is empty or the turn's budget is used up.
    pub(crate) fn accept(&mut self, listener: usize) {
        for _ in 0..TURN_BUDGET {
            let full = self.table.len() >= self.config.worker_connections as usize;
            let Some(listening) = self.listeners.get_mut(listener) else {
                return;
            };
            listening.more = true;
            listening.full = full;
            if full || listening.resting {
                return;
            }
            match listening.socket.accept() {
                Ok((stream, remote)) => {
                    self.intake.accepted += u32::from(listening.socket.is_chosen());
                    self.begin(listener, stream, remote);
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    listening.more = false;
                    return;
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
                }
                // Most likely EMFILE, ENFILE, ENOBUFS or ENOMEM: trying again at once would spin.
                Err(error) => {
                    log::warn!(
                        "failed to accept on {}: {error}; resting for {REST_MS} ms",
                        listening.address
                    );
                    listening.resting = true;
                    self.wheel.set(ACCEPT_TIMER, clock::now_ms() + REST_MS);
                    return;
                }
            }
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
            let sessions = u32::try_from(self.table.len()).unwrap_or(u32::MAX);
            load.publish(sessions, limit.saturating_sub(sessions));
        }
        load.count_taken(std::mem::take(&mut self.intake.accepted));
    }

    /// Asks all listeners that had more when their turn ended.
    pub(crate) fn accept_more(&mut self) {
        for listener in 0..self.listeners.len() {
            if self.listeners[listener].has_more() {
                self.accept(listener);
            }
        }
    }

    /// A session has ended: listeners that rest for want of room may go on.
    pub(crate) fn make_room(&mut self) {
        self.listeners
            .iter_mut()
            .for_each(|listener| listener.full = false);
    }

    /// Listeners that rest for want of descriptors may try again.
    pub(crate) fn end_rest(&mut self) {
        self.listeners
            .iter_mut()
            .for_each(|listener| listener.resting = false);
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
                worker.answer_http(token, session)
            } else {
                worker.enter(token, session, header_first)
            }
        });
    }
}
