//! The board: every counter and gauge, in memory that the master creates before its first fork.
//!
//! Counters only rise, and outlive workers and reloads because they live here. Gauges stand in the row
//! of the worker process that they describe: the master clears the row of a dead worker, so a killed
//! worker leaves no session behind in the figures. Accesses are relaxed: the figures are independent of each other, but for
//! those of sessions that go from one worker to another ([`Transit`]), and for what limits the sessions that the master
//! keeps ([`Board::reserve_keeping`]).

use std::sync::atomic::Ordering::{Acquire, Relaxed, SeqCst};
use std::sync::atomic::{AtomicU32, AtomicU64, fence};

use crate::ids::Direction;
pub use crate::peers::{GroupRow, PeerRow, Transit};
use crate::queue::QueueRow;
use crate::sys::shm::Shareable;

/// Worker processes that can exist at once, old generations included.
pub const MAX_WORKERS: usize = 512;
/// Listeners that the program can have had since its start.
pub const MAX_LISTENERS: usize = 1024;
/// Peers that the program can have had since its start.
pub const MAX_PEERS: usize = 4096;
/// Upstream groups that the program can have had since its start.
pub const MAX_GROUPS: usize = 1024;

/// The version of this layout: another binary may go on with a board if it has the same ([`layout`]). Change
/// it whenever a field or a reason changes its place or meaning.
const LAYOUT: &str = "culvert counters, layout 9";

macro_rules! reasons {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(usize)]
        pub enum $name { $($(#[$vdoc])* $variant,)+ }

        impl $name {
            /// All of them, in index order.
            pub const ALL: &[$name] = &[$($name::$variant,)+];
            /// How many there are.
            pub const COUNT: usize = Self::ALL.len();

            /// The name that status documents and logs use.
            pub fn name(self) -> &'static str {
                match self { $($name::$variant => $text,)+ }
            }
        }
    };
}

reasons! {
    /// Why a session that should be forwarded in the kernel is copied in user space.
    FallbackReason {
        /// The BPF objects could not be loaded, or the kernel is not trusted; the log says why.
        BpfUnavailable = "bpf_unavailable",
        /// All pairs of the worker slot's sockmap are in use.
        SlotsUsedUp = "slots_used_up",
        /// One side is not a TCP socket.
        NotTcp = "not_tcp",
        /// One side had already ended its stream when the session was to be offloaded.
        EarlyEnd = "early_end",
        /// The kernel refused to take a socket into the sockmap.
        KernelRefused = "kernel_refused",
        /// `proxy_upload_rate` or `proxy_download_rate` limits it: a direction that is limited is copied, the other one is not.
        RateLimited = "rate_limited",
    }
}

reasons! {
    /// Why a session ended: who, and in which phase.
    CloseReason {
        /// Both streams ended, and every byte was delivered.
        Finished = "finished",
        /// The downstream reset its connection.
        DownstreamReset = "downstream_reset",
        /// The upstream reset its connection.
        UpstreamReset = "upstream_reset",
        /// The downstream left before the upstream was connected.
        DownstreamLeftConnecting = "downstream_left_connecting",
        /// No peer could be connected to.
        ConnectFailed = "connect_failed",
        /// Connecting took longer than `proxy_connect_timeout`.
        ConnectTimeout = "connect_timeout",
        /// `proxy_pass` led to no upstream and no address.
        NoRoute = "no_route",
        /// `proxy_pass` led to a host name that could not be resolved.
        NameFailed = "name_failed",
        /// No byte moved for `proxy_timeout`.
        IdleTimeout = "idle_timeout",
        /// One stream ended and `proxy_half_close` is off.
        HalfClosed = "half_closed",
        /// The proxy was stopped, or `worker_shutdown_timeout` ran out.
        Shutdown = "shutdown",
        /// A descriptor or memory limit was reached.
        Resource = "resource",
        /// The kernel's counters did not add up; the session was reset.
        Integrity = "integrity",
        /// Its worker died, and the session could not be taken over.
        WorkerDied = "worker_died",
        /// Its listener or its peer is gone since a reload, and `on_reload` is `"close"`.
        Removed = "removed",
        /// What the client sent first is not what the listener is for: no valid PROXY header, or a TLS hello longer than
        /// `preread_buffer_size`.
        BadRequest = "bad_request",
        /// `access` does not let the client in.
        Denied = "denied",
        /// Its key has as many sessions as `limit_conn` allows.
        LimitConn = "limit_conn",
        /// The connections of its key come faster than `limit_conn_rate` allows.
        LimitRate = "limit_conn_rate",
        /// The client did not send in time what has to be read before its peer is chosen.
        ReadTimeout = "read_timeout",
        /// The client left before it had sent that.
        DownstreamLeftReading = "downstream_left_reading",
        /// The status document was written.
        Status = "status",
    }
}

/// Everything that is counted.
#[repr(C)]
pub struct Board {
    /// The configuration's generation: 1 at start, one more at each successful reload.
    pub generation: AtomicU64,
    /// When the program started, in milliseconds since the Unix epoch.
    pub started_unix_ms: AtomicU64,
    /// The same by CLOCK_MONOTONIC: the host's time may be set while the program runs.
    pub started_ms: AtomicU64,
    /// Successful reloads.
    pub reloads_succeeded: AtomicU64,
    /// Reloads that were refused; the old configuration went on.
    pub reloads_failed: AtomicU64,
    /// 1: the last reload was refused.
    pub last_reload_failed: AtomicU64,
    /// When a reload last succeeded, in milliseconds since the Unix epoch; 0: never.
    pub last_reload_unix_ms: AtomicU64,
    /// How long connecting to a peer took, where it succeeded.
    pub connect_duration: Histogram,
    /// How long ended sessions lasted.
    pub session_duration: Histogram,
    /// Workers that died and were replaced.
    pub worker_restarts: AtomicU64,
    /// Sessions accepted.
    pub sessions: AtomicU64,
    /// Sessions that entered the kernel.
    pub sessions_offloaded: AtomicU64,
    /// Times that the pieces of a direction were so small, and came so fast, that user space copied them for a while.
    pub gathers: AtomicU64,
    /// Sessions that user space began to copy because they might be short (`ebpf_offload_after`).
    pub sessions_copied_first: AtomicU64,
    /// Sessions that the master keeps, so that they outlive their worker.
    pub kept: AtomicU64,
    /// How many it may keep: its limit on descriptors decides. See [`Board::reserve_keeping`].
    pub kept_limit: AtomicU64,
    /// Sessions that it was to keep and could not, because their sockets did not arrive.
    pub unkept: AtomicU64,
    /// Sessions that a worker took over from another one.
    pub adopted: AtomicU64,
    /// Log lines dropped because the log could not keep up.
    pub log_lines_dropped: AtomicU64,
    /// Lines of access logs that were written.
    pub access_lines_written: AtomicU64,
    /// Lines of access logs that were dropped: the file took no more, or not fast enough.
    pub access_lines_dropped: AtomicU64,
    /// Sessions that led to a host name, and what was asked for them.
    pub hosts: HostCounters,
    /// Bytes copied in user space, by direction.
    pub relay_bytes: [AtomicU64; 2],
    /// Sessions that were to be offloaded and were not, by [`FallbackReason`].
    pub fallbacks: [AtomicU64; FallbackReason::COUNT],
    /// Ended sessions, by [`CloseReason`].
    pub closes: [AtomicU64; CloseReason::COUNT],
    /// Sessions that are between two workers.
    pub transit: Transit,
    /// Those of them that the kernel forwards.
    pub offloaded_transit: Transit,
    /// 1 since a session has waited for a place at a peer.
    pub has_queued: AtomicU32,
    /// Worker rows that were ever taken, counted from the first: those behind are empty.
    pub worker_rows: AtomicU32,
    /// One row for each worker process.
    pub workers: [WorkerRow; MAX_WORKERS],
    /// One row for each listener; the master gives the places.
    pub listeners: [ListenerRow; MAX_LISTENERS],
    /// One row for each peer of each upstream; the master gives the places.
    pub peers: [PeerRow; MAX_PEERS],
    /// One row for each upstream group; the master gives the places.
    pub groups: [GroupRow; MAX_GROUPS],
}

// SAFETY: only atomics, in a `repr(C)` layout; all zeros is a valid value.
unsafe impl Shareable for Board {}

/// The gauges of one worker process.
#[repr(C)]
pub struct WorkerRow {
    /// Its process id; 0: the row is free.
    pub pid: AtomicU32,
    /// Its worker slot.
    pub slot: AtomicU32,
    /// Its generation of the configuration.
    pub generation: AtomicU64,
    /// Sockmap pairs of its slot.
    pub pairs_total: AtomicU32,
    /// One more than the number that the BPF programs know its slot by; 0: it has no maps.
    slot_number: AtomicU32,
    /// The CPUs that it may run on, a bit each; CPUs from 1024 up are not shown.
    pub cpus: [AtomicU64; 16],
    /// 1 once it accepts connections.
    pub ready: AtomicU32,
    /// 1 while it takes no new sessions and finishes its old ones.
    pub draining: AtomicU32,
    /// Sessions that it has accepted.
    pub accepted: AtomicU64,
    /// Sessions that it holds.
    pub sessions: AtomicU32,
    /// Sessions of those that are forwarded in the kernel.
    pub offloaded: AtomicU32,
    /// Sockmap pairs that it holds.
    pub pairs: AtomicU32,
    /// Sessions for each listener.
    pub listener_active: [AtomicU32; MAX_LISTENERS],
    /// Sessions for each peer.
    pub peer_active: [AtomicU32; MAX_PEERS],
    /// Sessions for which it has reserved room with the master, which has not yet heard of them.
    pub reserved: AtomicU32,
    /// Sessions that wait for a place, for any group.
    pub waiting: AtomicU32,
    /// Those that wait for each group.
    pub queues: [QueueRow; MAX_GROUPS],
}

/// What became of host names that `proxy_pass` gave sessions.
#[repr(C)]
pub struct HostCounters {
    /// Sessions that led to one.
    pub sessions: AtomicU64,
    /// Those of them whose worker remembered the answer.
    pub remembered: AtomicU64,
    /// Hosts that name servers were asked for.
    pub lookups: AtomicU64,
    /// Those of them that brought no address.
    pub failed: AtomicU64,
    /// Hosts that were not asked for because too many others were.
    pub refused: AtomicU64,
}

/// The counters of one listener.
#[repr(C)]
pub struct ListenerRow {
    /// Connections accepted.
    pub accepted: AtomicU64,
    /// Bytes of ended sessions: from clients, to clients.
    pub bytes: [AtomicU64; 2],
    /// Ended sessions, by [`CloseReason`].
    pub closes: [AtomicU64; CloseReason::COUNT],
    /// Its sessions that are between two workers.
    pub transit: Transit,
    /// The current generation does not have it any more.
    pub gone: AtomicU32,
    padding: AtomicU32,
}

/// How the board is laid out, for two binaries to compare.
pub fn layout() -> String {
    let rows = [
        size_of::<WorkerRow>(),
        size_of::<ListenerRow>(),
        size_of::<PeerRow>(),
        size_of::<GroupRow>(),
    ];
    format!(
        "{LAYOUT}, {} bytes with rows of {rows:?}, {} fallback and {} close reasons",
        size_of::<Board>(),
        FallbackReason::COUNT,
        CloseReason::COUNT
    )
}

/// The upper limits of a histogram's buckets, in microseconds; one more bucket takes the rest.
pub const HISTOGRAM_US: [u64; 12] = [
    100,
    500,
    1_000,
    5_000,
    25_000,
    100_000,
    500_000,
    1_000_000,
    10_000_000,
    60_000_000,
    600_000_000,
    3_600_000_000,
];

/// How often something took how long.
#[repr(C)]
pub struct Histogram {
    /// Counts, each bucket for itself.
    pub buckets: [AtomicU64; HISTOGRAM_US.len() + 1],
    /// The sum, in microseconds.
    pub sum_us: AtomicU64,
}

impl Histogram {
    /// Counts something that took so long.
    pub fn count(&self, us: u64) {
        let bucket = HISTOGRAM_US.partition_point(|limit| *limit < us);
        Board::add(&self.buckets[bucket], 1);
        Board::add(&self.sum_us, us);
    }
}

impl Board {
    /// Adds to a counter.
    pub fn add(counter: &AtomicU64, n: u64) {
        counter.fetch_add(n, Relaxed);
    }

    /// Counts bytes that user space copied.
    pub fn add_relayed(&self, direction: Direction, bytes: u64) {
        Self::add(&self.relay_bytes[direction.index()], bytes);
    }

    /// Counts a session that stays in user space although it should not.
    pub fn count_fallback(&self, reason: FallbackReason) {
        Self::add(&self.fallbacks[reason as usize], 1);
    }

    /// Counts the end of a session, of which the listener's row may not be known.
    pub fn count_close(&self, listener: Option<usize>, reason: CloseReason) {
        Self::add(&self.closes[reason as usize], 1);
        if let Some(row) = listener.and_then(|row| self.listeners.get(row)) {
            Self::add(&row.closes[reason as usize], 1);
        }
    }

    /// Reserves room in the master's keeping for a session of the worker in that row; without it, its sockets are not to be
    /// sent. False: there is none. The room is the session's until the master has it ([`Board::note_kept`]), the worker
    /// gives it back, or its row is cleared.
    pub fn reserve_keeping(&self, row: usize) -> bool {
        let own = &self.workers[row].reserved;
        own.fetch_add(1, SeqCst);
        // Each adds before it counts, so of two at once one at least sees both: room may be refused that there is, but
        // none is given that there is not. What the master has taken in is counted twice for a moment, for the same
        // reason, and never not at all, because the rows are read first.
        let rows = (self.worker_rows.load(SeqCst) as usize).min(MAX_WORKERS);
        let reserved = self.workers[..rows]
            .iter()
            .map(|row| u64::from(row.reserved.load(SeqCst)));
        let reserved: u64 = reserved.sum();
        let fits = reserved + self.kept.load(SeqCst) <= self.kept_limit.load(SeqCst);
        if !fits {
            self.give_keeping_back(row);
        }
        fits
    }

    /// A session that room was reserved for is not sent after all.
    pub fn give_keeping_back(&self, row: usize) {
        let lower = |reserved: u32| reserved.checked_sub(1);
        let _ = self.workers[row].reserved.fetch_update(SeqCst, SeqCst, lower);
    }

    /// The master has heard of a session that the worker in that row had reserved room for; it keeps so many now.
    pub fn note_kept(&self, kept: u64, row: usize) {
        self.kept.store(kept, SeqCst);
        self.give_keeping_back(row);
    }

    /// The rows of living workers, with their places.
    pub fn live_workers(&self) -> impl Iterator<Item = (usize, &WorkerRow)> {
        self.workers
            .iter()
            .enumerate()
            .filter(|(_, row)| row.pid.load(Relaxed) != 0)
    }

    /// Open sessions, those included that are between two workers.
    pub fn active(&self, now_ms: u64) -> u64 {
        self.held(&self.transit, now_ms, |row| &row.sessions)
    }

    /// Open sessions that the kernel forwards.
    pub fn offloaded(&self, now_ms: u64) -> u64 {
        self.held(&self.offloaded_transit, now_ms, |row| &row.offloaded)
    }

    /// Open sessions of a listener.
    pub fn listener_active(&self, listener: usize, now_ms: u64) -> u64 {
        self.held(&self.listeners[listener].transit, now_ms, |row| {
            &row.listener_active[listener]
        })
    }

    fn held(&self, transit: &Transit, now_ms: u64, gauge: impl Fn(&WorkerRow) -> &AtomicU32) -> u64 {
        let rows = self.live_workers().map(|(_, row)| gauge(row));
        counted(rows, transit, now_ms)
    }

    /// Sessions that the program holds for a peer, those included that are between two workers.
    pub fn peer_active(&self, peer: usize, now_ms: u64) -> u64 {
        let rows = self.worker_rows.load(Relaxed) as usize;
        let rows = self.workers[..rows.min(MAX_WORKERS)].iter();
        let rows = rows.map(|row| &row.peer_active[peer]);
        counted(rows, &self.peers[peer].transit, now_ms)
    }

    /// Frees the row of a worker that is gone. The sessions that it had count as being between two workers: some
    /// of them will be adopted.
    pub fn clear_worker(&self, row: usize, now_ms: u64) {
        let worker = &self.workers[row];
        for (peer, gauge) in self.peers.iter().zip(&worker.peer_active) {
            match gauge.load(Relaxed) {
                0 => {}
                sessions => peer.transit.begin(sessions, now_ms),
            }
            peer.check.bury(row);
        }
        self.groups.iter().for_each(|group| group.lock.bury(row));
        worker.clear();
    }
}

/// Sessions, wherever they are.
fn counted<'a>(gauges: impl Iterator<Item = &'a AtomicU32>, transit: &Transit, now_ms: u64) -> u64 {
    // Asked before and after, because sessions may leave or arrive meanwhile; twice is better than not at all.
    let before = transit.count(now_ms);
    let held: u64 = gauges.map(|gauge| u64::from(gauge.load(Relaxed))).sum();
    fence(Acquire);
    held + u64::from(before.max(transit.count(now_ms)))
}

impl Board {
    /// Forgets what checks found of all peers but those that are checked.
    pub fn forget_checks(&self, is_checked: impl Fn(usize) -> bool) {
        let peers = self.peers.iter().enumerate();
        peers
            .filter(|(row, _)| !is_checked(*row))
            .for_each(|(_, peer)| peer.check.forget());
    }
}

impl WorkerRow {
    /// Raises a gauge.
    pub fn up(gauge: &AtomicU32) {
        gauge.fetch_add(1, Relaxed);
    }

    /// Lowers a gauge.
    pub fn down(gauge: &AtomicU32) {
        gauge.fetch_sub(1, Relaxed);
    }

    /// Takes the row for a worker that is about to start. The process id is stored when it is known.
    pub fn claim(&self, slot: usize, generation: u64, cpus: &[usize], pairs_total: u32) {
        self.clear();
        self.slot.store(slot as u32, Relaxed);
        self.generation.store(generation, Relaxed);
        self.accepted.store(0, Relaxed);
        self.pairs_total.store(pairs_total, Relaxed);
        for (word, bits) in self.cpus.iter().enumerate() {
            let own = cpus.iter().filter(|cpu| **cpu / 64 == word);
            bits.store(own.fold(0, |bits, cpu| bits | 1 << (cpu % 64)), Relaxed);
        }
    }

    /// Says what the BPF programs know the worker's slot by.
    pub fn set_slot_number(&self, number: u32) {
        self.slot_number.store(number + 1, Relaxed);
    }

    /// What the BPF programs know the worker's slot by; `None`: it has no maps.
    pub fn slot_number(&self) -> Option<u32> {
        self.slot_number.load(Relaxed).checked_sub(1)
    }

    /// The CPUs that the worker may run on.
    pub fn cpu_list(&self) -> Vec<usize> {
        let has = |cpu: &usize| self.cpus[cpu / 64].load(Relaxed) >> (cpu % 64) & 1 != 0;
        (0..64 * self.cpus.len()).filter(has).collect()
    }

    /// Frees the row of a worker that is gone; its gauges read zero afterwards.
    pub fn clear(&self) {
        let gauges = [
            &self.pid,
            &self.ready,
            &self.draining,
            &self.sessions,
            &self.offloaded,
            &self.pairs,
            &self.slot_number,
            &self.reserved,
            &self.waiting,
        ];
        self.queues.iter().for_each(QueueRow::clear);
        for gauge in gauges
            .into_iter()
            .chain(&self.listener_active)
            .chain(&self.peer_active)
        {
            // A load first: storing zero would touch, and so allocate, every page of an unused row.
            if gauge.load(Relaxed) != 0 {
                gauge.store(0, Relaxed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::sys::shm::Shared;

    #[test]
    fn a_peers_session_that_goes_from_one_worker_to_another_counts_all_the_while() {
        const STEP: Duration = Duration::from_micros(50);
        let board = &Shared::<Board>::anonymous(1).expect("memory")[0];
        board.worker_rows.store(2, Relaxed);
        let gauges = [0, 1].map(|worker| &board.workers[worker].peer_active[7]);
        WorkerRow::up(gauges[0]);
        let mut missing = 0;
        std::thread::scope(|scope| {
            let mover = scope.spawn(move || {
                for (from, to) in [(0, 1), (1, 0)].into_iter().cycle().take(4_000) {
                    board.peers[7].transit.begin(1, 1_000);
                    WorkerRow::down(gauges[from]);
                    std::thread::sleep(STEP);
                    WorkerRow::up(gauges[to]);
                    board.peers[7].transit.end();
                    std::thread::sleep(STEP);
                }
            });
            while !mover.is_finished() {
                let asked = Instant::now();
                let is_missing = board.peer_active(7, 1_000) == 0;
                // Whoever was held up himself may have missed the whole way.
                missing += u32::from(is_missing && asked.elapsed() < STEP);
            }
        });
        assert_eq!(missing, 0, "times it was nowhere");
    }

    fn board(limit: u64, rows: usize) -> Shared<Board> {
        let board = Shared::<Board>::anonymous(1).unwrap();
        board[0].kept_limit.store(limit, Relaxed);
        board[0].worker_rows.store(rows as u32, Relaxed);
        board
    }

    #[test]
    fn workers_that_reserve_at_once_never_get_more_room_than_there_is() {
        const LIMIT: u64 = 1000;
        const WORKERS: usize = 4;
        let board = board(LIMIT, WORKERS);
        let reserved: u64 = std::thread::scope(|scope| {
            let worker = |row| {
                let board = &board[0];
                // In batches, which nobody takes in meanwhile.
                move || (0..LIMIT).filter(|_| board.reserve_keeping(row)).count() as u64
            };
            let workers: Vec<_> = (0..WORKERS).map(|row| scope.spawn(worker(row))).collect();
            workers.into_iter().map(|worker| worker.join().unwrap()).sum()
        });
        assert!(reserved <= LIMIT, "{reserved}");
        // What one was refused while others asked is there afterwards.
        let more = (0..LIMIT).filter(|_| board[0].reserve_keeping(0)).count() as u64;
        assert_eq!(reserved + more, LIMIT);
    }

    #[test]
    fn room_is_taken_until_the_session_that_has_it_is_over() {
        let board = board(3, 2);
        let more = || board[0].reserve_keeping(0);
        assert!([0, 1, 1].iter().all(|row| board[0].reserve_keeping(*row)));
        assert!(!more(), "all is reserved");
        for (kept, row) in [(1, 1), (2, 0), (3, 1)] {
            board[0].note_kept(kept, row);
            assert!(!more(), "{kept} are kept");
        }
        board[0].kept.store(2, Relaxed);
        assert!(more() && !more());
    }

    #[test]
    fn the_readme_says_what_each_reason_means() {
        let readme = include_str!("../../README.md");
        let rows: Vec<&str> = readme.lines().filter(|line| line.starts_with("| `")).collect();
        let closes = CloseReason::ALL.iter().map(|reason| reason.name());
        let fallbacks = FallbackReason::ALL.iter().map(|reason| reason.name());
        for name in closes.chain(fallbacks) {
            let named = format!("`{name}`");
            let is_explained = |row: &&str| row.split('|').nth(1).is_some_and(|cell| cell.contains(&named));
            assert!(rows.iter().any(is_explained), "{name}");
        }
    }

    #[test]
    fn what_a_worker_had_reserved_is_free_when_it_is_gone() {
        let board = board(2, 2);
        assert!(board[0].reserve_keeping(1) && board[0].reserve_keeping(1));
        assert!(!board[0].reserve_keeping(0));
        board[0].give_keeping_back(1);
        assert!(board[0].reserve_keeping(0) && !board[0].reserve_keeping(0));
        board[0].clear_worker(1, 0);
        assert!(board[0].reserve_keeping(0) && !board[0].reserve_keeping(0));
    }
}
