//! The only wait: sessions, listeners, and mio's poll with all that is rare (the master's messages, the programs' events,
//! health checks), timers between. Hands each event to the file that knows what it means.

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use anyhow::{Context, Result};
use culvert_bpf::Totals;
use culvert_shared::busy::Lookout;
use culvert_shared::config::{self, Address, Algorithm, Config};
use culvert_shared::congestion;
use culvert_shared::counters::{Board, CloseReason, WorkerRow};
use culvert_shared::ids::Owner;
use culvert_shared::members::MemberSet;
use culvert_shared::message::ToMaster;
use culvert_shared::sys::{fdpass, shm::Shared};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll};
use nix::sys::epoll::EpollFlags;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use crate::accept::{Intake, Listening};
use crate::access_log::AccessLogs;
use crate::balance::Group;
use crate::brevity::Brevity;
use crate::check::{self, Checks};
use crate::clock;
use crate::drive::Next;
use crate::hosts::Hosts;
use crate::keep::Keeping;
use crate::preread::Glance;
use crate::pressure::Pressure;
use crate::queue::Queues;
use crate::relay::Scratch;
use crate::route::Router;
use crate::session::Session;
use crate::sockets::{BufferLimits, Sockets, Source};
use crate::start::WorkerStart;
use crate::store::Ward;
use crate::table::{Side, Table, Token};
use crate::tally::Tally;
use crate::timer::Wheel;

const CONTROL: mio::Token = mio::Token(usize::MAX);
const KERNEL: mio::Token = mio::Token(usize::MAX - 1);
const LOOKOUT: mio::Token = mio::Token(usize::MAX - 2);
pub(crate) const QUEUE_BELL: mio::Token = mio::Token(usize::MAX - 3);

/// The timer that lets listeners out of their rest; ids from [`FIRST_SESSION`] are sessions'.
pub(crate) const ACCEPT_TIMER: u32 = 0;
/// The timer that ends a drain.
pub(crate) const DRAIN_TIMER: u32 = 1;
/// The timer that looks at sources that are held back.
pub(crate) const PRESSURE_TIMER: u32 = 2;
/// The timer that gives sessions that have lived long enough to the master's keeping.
pub(crate) const KEEP_TIMER: u32 = 3;
/// The timer that hands lines of access logs over.
pub(crate) const LOG_TIMER: u32 = 4;
/// The timer that looks for the busiest sessions.
pub(crate) const BUSY_TIMER: u32 = 5;
/// The timer that ends what this process serves itself and is not done with when it has to leave.
pub(crate) const SERVICE_TIMER: u32 = 6;
/// The timer that begins health checks, and ends those that take too long.
pub(crate) const CHECK_TIMER: u32 = 7;
/// The timer that looks at sessions that wait for a place.
pub(crate) const QUEUE_TIMER: u32 = 8;
/// The timer that tells the master of hosts that it had no room to hear of.
pub(crate) const NAMING_TIMER: u32 = 9;
/// The timer that counts anew what the sessions have outstanding.
pub(crate) const RECOUNT_TIMER: u32 = 10;
const FIRST_SESSION: u32 = 11;

/// One worker process.
pub struct Worker {
    pub(crate) config: Arc<Config>,
    pub(crate) board: Arc<Shared<Board>>,
    pub(crate) row: usize,
    pub(crate) owner: Owner,
    /// The settings of each server.
    pub(crate) settings: Vec<Rc<config::Stream>>,
    /// The row of each listener and its server.
    pub(crate) rows: Vec<(usize, usize)>,
    /// The address of each listener, as configured.
    pub(crate) addresses: Vec<Address>,
    pub(crate) access_logs: AccessLogs,
    pub(crate) lookout: Arc<Lookout>,
    /// HTTP connections that it holds.
    pub(crate) http_connections: usize,
    /// The stores that it cares for, its own slot's first.
    pub(crate) wards: Vec<Ward>,
    pub(crate) relay_reason: Option<String>,
    /// How short the sessions of each listener are.
    pub(crate) brevity: Brevity,
    pub(crate) totals: Option<Arc<Totals>>,
    pub(crate) pressure: Pressure,
    pub(crate) keeping: Keeping,
    /// Sessions that it took over.
    pub(crate) adopted: u64,
    /// The peers that names stand for, for each group.
    pub(crate) members: Arc<Shared<MemberSet>>,
    pub(crate) poll: Poll,
    pub(crate) sockets: Sockets,
    pub(crate) control: OwnedFd,
    pub(crate) listeners: Vec<Listening>,
    pub(crate) intake: Intake,
    pub(crate) router: Router,
    pub(crate) groups: Vec<Group>,
    pub(crate) checks: Checks,
    pub(crate) queues: Queues,
    pub(crate) hosts: Hosts,
    /// Who is asked for the hosts of each server's sessions.
    pub(crate) resolvers: Vec<Option<u16>>,
    /// The row of each group.
    pub(crate) group_rows: Vec<usize>,
    /// The last number of a row that looks like chance.
    pub(crate) random: u64,
    pub(crate) table: Table<Session>,
    pub(crate) wheel: Wheel,
    /// Sessions whose turn's budget ran out before their sockets did.
    pub(crate) again: VecDeque<Token>,
    pub(crate) scratch: Scratch,
    pub(crate) glance: Glance,
    pub(crate) limits: BufferLimits,
    /// What the host's sockets begin with.
    pub(crate) congestion: Option<Algorithm>,
    pub(crate) tally: Tally,
    pub(crate) draining: bool,
    pub(crate) stopping: bool,
}

impl Worker {
    /// Sets the worker up; nothing is accepted before [`Worker::serve`].
    pub fn new(start: WorkerStart) -> Result<Worker> {
        let poll = Poll::new().context("failed to create the worker's poll")?;
        let sockets = Sockets::new()?;
        let registry = poll.registry();
        sockets
            .watch_poll(registry.as_fd())
            .context("failed to watch the worker's poll")?;
        registry
            .register(
                &mut SourceFd(&start.control.as_raw_fd()),
                CONTROL,
                Interest::READABLE,
            )
            .context("failed to watch the master's socket")?;
        registry
            .register(
                &mut SourceFd(&start.lookout.raw_fd()),
                LOOKOUT,
                Interest::READABLE,
            )
            .context("failed to watch for questions")?;
        start.lookout.forget(start.row);
        let wards = start
            .stores
            .into_iter()
            .map(|store| Ward::open(store, start.owner))
            .collect::<Result<Vec<Ward>>>()?;
        for fd in wards.iter().filter_map(|ward| ward.reader.raw_fd()) {
            registry
                .register(&mut SourceFd(&fd), KERNEL, Interest::READABLE)
                .context("failed to watch the events of the BPF programs")?;
        }
        if let Some(maps) = wards.first().and_then(|own| own.store.maps.as_ref()) {
            start.board[0].workers[start.row].set_slot_number(maps.number());
        }
        let rows = start.served.iter().map(|served| (served.row, served.server));
        let rows = rows.collect();
        let addresses = start.served.into_iter().map(|served| served.address).collect();
        let listeners = Listening::open_all(start.listeners)?;
        let hostname =
            nix::unistd::gethostname().map_or(String::new(), |name| name.to_string_lossy().into_owned());
        let access_logs = AccessLogs::new(&start.config, start.access_logs, start.slot, &hostname);
        let rows_of_groups = start.group_rows.iter().zip(&start.peer_rows);
        let groups = start.config.upstreams.iter().zip(rows_of_groups);
        Ok(Worker {
            router: Router::new(&start.config.upstreams, hostname).with_maps(&start.config.maps),
            groups: groups
                .map(|(group, (row, peers))| Group::new(group, *row, peers))
                .collect(),
            group_rows: start.group_rows,
            checks: Checks::default(),
            queues: Queues::new(start.config.upstreams.len(), start.bell),
            hosts: Hosts::new(clock::now_ns()),
            resolvers: resolvers_of(&start.config),
            // Never zero, and another for each worker.
            random: clock::now_ns() ^ u64::from(start.owner.0) << 40 | 1,
            settings: start
                .config
                .servers
                .iter()
                .map(|server| Rc::new(server.stream.clone()))
                .collect(),
            scratch: Scratch::new(&start.config),
            tally: Tally::new(start.limits, start.owner),
            glance: Glance::new(&start.config),
            limits: BufferLimits::read(),
            congestion: congestion::default(),
            config: start.config,
            board: start.board,
            row: start.row,
            owner: start.owner,
            wards,
            rows,
            pressure: Pressure::default(),
            addresses,
            access_logs,
            lookout: start.lookout,
            http_connections: 0,
            keeping: Keeping::default(),
            adopted: 0,
            relay_reason: start.relay_reason,
            brevity: Brevity::default(),
            totals: start.totals,
            members: start.members,
            poll,
            sockets,
            control: start.control,
            listeners,
            intake: Intake::new(start.load, start.accept_reason),
            table: Table::new(),
            wheel: Wheel::new(clock::now_ms()),
            again: VecDeque::new(),
            draining: false,
            stopping: false,
        })
    }

    /// Serves until the master says stop, or a drain is over.
    pub fn serve(&mut self) -> Result<()> {
        // The worker before may have been told.
        self.recount_later();
        let mut events = Events::with_capacity(256);
        let mut due = Vec::new();
        self.listen()?;
        self.tell_load();
        self.begin_checks();
        self.gauges().ready.store(1, Relaxed);
        self.begin_checks();
        fdpass::send(self.control.as_fd(), &ToMaster::Ready.encode(), &[])
            .context("failed to tell the master that the worker is ready")?;
        while !self.is_done() {
            let patience = self.patience();
            let happened = self.sockets.wait(patience).context("failed to wait for events")?;
            self.intake.turn();
            for index in 0..happened {
                match self.sockets.event(index) {
                    (Source::Session(token, side), flags) => self.note(token, side, flags),
                    (Source::Listener(listener), _) => self.accept(listener),
                    (Source::Poll, _) => self.take_poll_events(&mut events)?,
                }
            }
            self.make_up_for_lost_events();
            self.arm_recount();
            for _ in 0..self.again.len() {
                let Some(token) = self.again.pop_front() else {
                    break;
                };
                self.with_session(token, |worker, session| {
                    session.queued = false;
                    worker.drive(token, session)
                });
            }
            self.wheel.turn(clock::now_ms(), &mut due);
            for timer in due.drain(..) {
                self.fire(timer);
            }
            self.go_on_named();
            self.tell_master();
            self.tell_questions();
            self.tell_load();
        }
        for token in self.table.tokens() {
            self.with_session(token, |_, _| Next::Close(CloseReason::Shutdown));
        }
        self.drop_checks();
        self.access_logs.finish();
        Ok(())
    }

    fn is_done(&self) -> bool {
        let is_empty = self.table.len() == 0 && self.checks.is_idle();
        self.stopping || (self.draining && is_empty && self.keeping.is_told())
    }

    /// How long the poll may sleep.
    fn patience(&self) -> Option<Duration> {
        if !self.again.is_empty() || self.hosts.has_ready() {
            return Some(Duration::ZERO);
        }
        self.wheel
            .next_ms()
            .map(|next| Duration::from_millis(next.saturating_sub(clock::now_ms())))
    }

    fn take_poll_events(&mut self, events: &mut Events) -> Result<()> {
        if let Err(error) = self.poll.poll(events, Some(Duration::ZERO))
            && error.kind() != std::io::ErrorKind::Interrupted
        {
            return Err(error).context("failed to take events");
        }
        for event in &*events {
            match event.token() {
                CONTROL => self.hear_master(),
                KERNEL => self.take_kernel_events(),
                LOOKOUT => self.tell_busiest(),
                QUEUE_BELL => self.look_at_queues(),
                mio::Token(check) if check >= check::FIRST_TOKEN => self.check_event(check),
                mio::Token(_) => {}
            }
        }
        Ok(())
    }

    fn note(&mut self, token: Token, side: Side, flags: EpollFlags) {
        self.with_session(token, |worker, session| {
            let ready = &mut session.ready[side.index()];
            let ended = flags.contains(EpollFlags::EPOLLRDHUP);
            ready.readable |= ended || flags.contains(EpollFlags::EPOLLIN);
            ready.writable |= flags.contains(EpollFlags::EPOLLOUT);
            ready.ended |= ended;
            ready.urgent |= flags.contains(EpollFlags::EPOLLPRI);
            ready.failed |= flags.contains(EpollFlags::EPOLLERR);
            worker.drive(token, session)
        });
    }

    /// Works on a session outside the table, then puts it back, or ends it.
    pub(crate) fn with_session(&mut self, token: Token, work: impl FnOnce(&mut Self, &mut Session) -> Next) {
        let Some(mut session) = self.table.take(token) else {
            return;
        };
        let mut next = work(self, &mut session);
        if !matches!(next, Next::Close(_)) && self.watch(token, &mut session).is_err() {
            next = Next::Close(CloseReason::Resource);
        }
        if !matches!(next, Next::Close(_)) {
            self.save(&session);
        }
        match next {
            Next::Wait(_) if self.is_to_leave(token, &mut session) => {
                self.wheel.cancel(timer_of(token));
                self.leave(token, session);
            }
            Next::Wait(wake_ms) => {
                self.wheel.set(timer_of(token), wake_ms);
                self.table.put(token, session);
            }
            Next::Again => {
                if !std::mem::replace(&mut session.queued, true) {
                    self.again.push_back(token);
                }
                self.table.put(token, session);
            }
            Next::Close(reason) => {
                self.wheel.cancel(timer_of(token));
                self.close(token, *session, reason);
            }
        }
    }

    /// Watches a session's sockets for what it waits for now. Once at the end of its turn is enough: what has come
    /// meanwhile is reported when they are watched for it.
    fn watch(&self, token: Token, session: &mut Session) -> nix::Result<()> {
        for side in [Side::Downstream, Side::Upstream] {
            let Some(socket) = session.socket(side) else {
                continue;
            };
            let wanted = session.interest(side);
            match session.watched[side.index()] {
                Some(present) if present == wanted => continue,
                // It cannot fail: nothing is allocated for it.
                Some(_) => self.sockets.change(socket, token, side, wanted)?,
                None => self.sockets.watch(socket, token, side, wanted)?,
            }
            session.watched[side.index()] = Some(wanted);
        }
        Ok(())
    }

    fn fire(&mut self, timer: u32) {
        match timer {
            ACCEPT_TIMER => self.end_rest(),
            PRESSURE_TIMER => self.look_at_paused(),
            RECOUNT_TIMER => self.recount(),
            KEEP_TIMER => self.keep_due(),
            LOG_TIMER => self.flush_access_logs(),
            BUSY_TIMER => self.tell_busiest(),
            SERVICE_TIMER => self.end_services(),
            CHECK_TIMER => self.run_checks(),
            QUEUE_TIMER => self.look_at_queues_in_time(),
            NAMING_TIMER => self.tell_questions(),
            DRAIN_TIMER => {
                log::warn!(
                    "worker_shutdown_timeout ran out, resetting {} sessions",
                    self.table.len()
                );
                self.stopping = true;
            }
            _ => {
                if let Some(token) = self.table.token_at(timer - FIRST_SESSION) {
                    self.with_session(token, |worker, session| worker.look_after(token, session));
                }
            }
        }
    }

    pub(crate) fn gauges(&self) -> &WorkerRow {
        &self.board[0].workers[self.row]
    }
}

fn timer_of(token: Token) -> u32 {
    token.slot() + FIRST_SESSION
}

/// For each server, the index of its resolver in [`Config::resolvers`].
fn resolvers_of(config: &Config) -> Vec<Option<u16>> {
    let known = config.resolvers();
    let index = |server: &config::Server| {
        let own = server.stream.resolver.as_ref()?;
        let at = known.iter().position(|known| known == own)?;
        u16::try_from(at).ok()
    };
    config.servers.iter().map(index).collect()
}
