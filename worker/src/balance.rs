//! Which peer of a group comes next, and what failed or successful attempts mean for it: nginx's rules, on state
//! that is common to all workers (`culvert_shared::peers`). No I/O; time and chance are passed in.

mod choose;
mod ring;
#[cfg(test)]
mod tests;

use std::sync::atomic::Ordering::Relaxed;

use culvert_shared::config::{Address, Balance, Part, Peer, Template, Upstream, Variable};
use culvert_shared::counters::{Board, PeerRow, WorkerRow};
use culvert_shared::members::MemberSet;

use ring::Ring;

/// One group as one configuration has it, with the peers that names stand for at the moment.
pub struct Group {
    method: Method,
    peers: Vec<Member>,
    /// Its row on the board.
    row: usize,
    /// A lone peer is never taken out, as with nginx.
    is_single: bool,
    /// How many sessions each peer has matters.
    counts: bool,
    /// What checks find counts.
    checked: bool,
    /// Sessions wait for places.
    has_queue: bool,
    /// Peers that have their address from the file, with their rows.
    fixed: Vec<(Peer, usize)>,
    /// What the peers of each name are like.
    likes: Vec<Peer>,
    /// The version of the set that the peers were taken from.
    version: u64,
    /// Peers that names stood for, with their rows: they get no new sessions.
    former: Vec<(Address, usize)>,
}

enum Method {
    RoundRobin,
    LeastConn,
    LeastTime,
    Random,
    RandomTwo(culvert_shared::config::Metric),
    Hash(Template),
    Ring(Template, Ring),
}

/// One peer of a group.
pub struct Member {
    /// Its row on the board.
    pub row: usize,
    /// Where to connect.
    pub address: Address,
    /// Its share.
    pub weight: u32,
    /// Takes sessions only when no other peer does.
    pub backup: bool,
    /// The operator has taken it out.
    pub down: bool,
    /// `u32::MAX`: no limit.
    max_conns: u32,
    /// Failed attempts that take it out.
    pub max_fails: u32,
    /// For how long.
    pub fail_timeout_ms: u64,
    slow_start_ms: u64,
    /// What checks find counts.
    checked: bool,
}

impl Member {
    fn new(peer: &Peer, row: usize, checked: bool) -> Member {
        Member {
            row,
            address: peer.address.clone(),
            weight: peer.weight,
            backup: peer.backup,
            down: peer.down,
            max_conns: if peer.max_conns == 0 {
                u32::MAX
            } else {
                peer.max_conns
            },
            max_fails: peer.max_fails,
            fail_timeout_ms: peer.fail_timeout.as_millis() as u64,
            slow_start_ms: peer.slow_start.as_millis() as u64,
            checked,
        }
    }

    /// As the file has it: 0 is no limit.
    pub fn max_conns(&self) -> u32 {
        match self.max_conns {
            u32::MAX => 0,
            limit => limit,
        }
    }
}

/// What a choice needs besides the group.
pub struct Scene<'a> {
    /// The board.
    pub board: &'a Board,
    /// The choosing worker's row.
    pub worker: usize,
    /// The time.
    pub now_ms: u64,
}

/// What came of a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pick {
    /// This one; the session is counted in at it.
    Peer(usize),
    /// There are peers, and all have as many sessions as they take.
    Full,
    /// None is left to be tried.
    Nobody,
}

/// What an attempt has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The peer is out for its `fail_timeout`.
    TakenOut,
    /// It is alive again.
    Revived,
}

/// The state of a peer, as the status document has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// It takes sessions.
    Up,
    /// The operator has taken it out.
    Down,
    /// Failed attempts have.
    Unavailable,
    /// Failed checks have.
    Unhealthy,
}

impl Health {
    /// nginx's word for it.
    pub fn name(self) -> &'static str {
        match self {
            Health::Up => "up",
            Health::Down => "down",
            Health::Unavailable => "unavail",
            Health::Unhealthy => "unhealthy",
        }
    }
}

impl Group {
    /// A group whose state lies in these rows.
    pub fn new(upstream: &Upstream, row: usize, peer_rows: &[usize]) -> Group {
        let method = match &upstream.balance {
            Balance::RoundRobin => Method::RoundRobin,
            Balance::LeastConn => Method::LeastConn,
            Balance::LeastTime => Method::LeastTime,
            Balance::Random => Method::Random,
            Balance::RandomTwo(metric) => Method::RandomTwo(*metric),
            Balance::Hash {
                key,
                consistent: true,
            } => Method::Ring(key.clone(), Ring::default()),
            Balance::Hash {
                key,
                consistent: false,
            } => Method::Hash(key.clone()),
            Balance::Source => Method::Ring(
                Template(vec![Part::Variable(Variable::RemoteAddr)]),
                Ring::default(),
            ),
        };
        let fixed: Vec<(Peer, usize)> = upstream
            .peers
            .iter()
            .cloned()
            .zip(peer_rows.iter().copied())
            .collect();
        let mut group = Group {
            method,
            peers: Vec::new(),
            row,
            is_single: false,
            counts: false,
            checked: upstream.check.is_some(),
            has_queue: upstream.queue.is_some(),
            likes: upstream.names.iter().map(|named| named.like.clone()).collect(),
            version: 0,
            former: Vec::new(),
            fixed: Vec::new(),
        };
        group.arrange(&fixed);
        group.fixed = fixed;
        group
    }

    /// Takes the peers that names stand for from the set, if it has changed.
    pub fn refresh(&mut self, set: &MemberSet) {
        if self.likes.is_empty() || set.version() == self.version {
            return;
        }
        // One that is being written is read the next time.
        let Some((version, members)) = set.read() else {
            return;
        };
        self.version = version;
        let mut peers = self.fixed.clone();
        self.former.clear();
        for member in members {
            let address = Address::Tcp(member.address);
            match self.likes.get(member.name) {
                _ if member.former => self.former.push((address, member.row)),
                Some(like) => {
                    let peer = Peer {
                        address,
                        weight: member.weight,
                        backup: member.backup,
                        ..like.clone()
                    };
                    peers.push((peer, member.row));
                }
                None => {}
            }
        }
        self.arrange(&peers);
    }

    fn arrange(&mut self, peers: &[(Peer, usize)]) {
        if let Method::Ring(_, ring) = &mut self.method {
            let numbered = peers.iter().map(|(peer, _)| peer).enumerate();
            *ring = Ring::new(numbered.filter(|(_, peer)| !peer.backup));
        }
        self.counts = matches!(
            self.method,
            Method::LeastConn | Method::LeastTime | Method::RandomTwo(_)
        ) || peers.iter().any(|(peer, _)| peer.max_conns != 0);
        self.is_single = peers.len() == 1;
        self.peers = peers
            .iter()
            .map(|(peer, row)| Member::new(peer, *row, self.checked))
            .collect();
    }

    /// Its peers, in the order of their indexes. They change at [`Group::refresh`]; a row stays a peer's own.
    pub fn members(&self) -> &[Member] {
        &self.peers
    }

    /// Peers that names stood for, with their rows.
    pub fn former(&self) -> &[(Address, usize)] {
        &self.former
    }

    /// The index of the peer with this row, if it is still there.
    pub fn index_of(&self, row: usize) -> Option<usize> {
        self.peers.iter().position(|peer| peer.row == row)
    }

    /// Where the peer of this row is, or was.
    pub fn address_of(&self, row: usize) -> Option<&Address> {
        let former = || self.former.iter().find(|(_, former)| *former == row);
        match self.index_of(row) {
            Some(index) => Some(&self.peers[index].address),
            None => former().map(|(address, _)| address),
        }
    }

    /// Whether a session may stay with the peer of this row: those of names keep their sessions when they are gone.
    pub fn knows(&self, row: usize) -> bool {
        self.address_of(row).is_some()
    }

    /// What the session's key is made of, if the group goes by one.
    pub fn key(&self) -> Option<&Template> {
        match &self.method {
            Method::Hash(key) | Method::Ring(key, _) => Some(key),
            _ => None,
        }
    }

    /// Chooses a peer whose row was not tried yet, and counts the session in at it. `random` is any number, `ticket` the
    /// session's if it waits for a place. While others wait, nobody goes before them.
    pub fn pick(
        &self,
        scene: &Scene<'_>,
        tried: &[usize],
        key: &str,
        random: u64,
        ticket: Option<u64>,
    ) -> Pick {
        let _held = scene.board.groups[self.row].lock.take(scene.worker);
        if self.has_queue
            && let Some(first) = scene.board.first_in_queue(self.row, scene.now_ms)
            && ticket.is_none_or(|own| first < own)
        {
            return Pick::Full;
        }
        let active = if self.counts {
            self.active(scene)
        } else {
            Vec::new()
        };
        let mut ready = Vec::with_capacity(self.peers.len());
        let mut full = false;
        for backup in [false, true] {
            for (index, peer) in self.peers.iter().enumerate() {
                let is_away = self.is_away(scene, index) || self.is_out(scene, index);
                if peer.backup != backup || tried.contains(&peer.row) || is_away {
                    continue;
                }
                match active.get(index) {
                    Some(active) if *active >= u64::from(peer.max_conns) => full = true,
                    _ => ready.push(index),
                }
            }
            if let Some(peer) = self.choose(scene, &ready, &active, key, random) {
                return self.take(scene, peer);
            }
        }
        if full {
            return Pick::Full;
        }
        // Nobody is left but those that have failed: rather than refuse everybody for fail_timeout, they are
        // all taken for alive, the backups only if that brings no other.
        for backup in [false, true] {
            for (index, peer) in self.peers.iter().enumerate() {
                let is_out = self.is_out(scene, index) && !self.is_away(scene, index);
                if peer.backup != backup || tried.contains(&peer.row) || !is_out {
                    continue;
                }
                self.board_row(scene, index).fails.store(0, Relaxed);
                match active.get(index) {
                    Some(active) if *active >= u64::from(peer.max_conns) => full = true,
                    _ => ready.push(index),
                }
            }
            if let Some(peer) = self.choose(scene, &ready, &active, key, random) {
                return self.take(scene, peer);
            }
        }
        if full { Pick::Full } else { Pick::Nobody }
    }

    /// A session waits for a place from now on; `None`: too many do. `is_first`: none of its worker's waits already.
    pub fn enqueue(
        &self,
        scene: &Scene<'_>,
        size: u64,
        until_ms: u64,
        is_first: bool,
        own: Option<u64>,
    ) -> Option<u64> {
        let _held = scene.board.groups[self.row].lock.take(scene.worker);
        scene
            .board
            .enqueue(self.row, scene.worker, size, until_ms, is_first, own)
    }

    /// An attempt has failed.
    pub fn failed(&self, scene: &Scene<'_>, index: usize) -> Option<Change> {
        let peer = &self.peers[index];
        if self.is_single || peer.max_fails == 0 {
            return None;
        }
        let _held = scene.board.groups[self.row].lock.take(scene.worker);
        let row = self.board_row(scene, index);
        let fails = row.fails.load(Relaxed).saturating_add(1);
        row.fails.store(fails, Relaxed);
        row.failed_ms.store(scene.now_ms, Relaxed);
        row.checked_ms.store(scene.now_ms, Relaxed);
        let penalty = row
            .penalty
            .load(Relaxed)
            .saturating_add(peer.weight / peer.max_fails);
        row.penalty.store(penalty.min(peer.weight), Relaxed);
        (fails == peer.max_fails).then_some(Change::TakenOut)
    }

    /// An attempt has succeeded, after so long.
    pub fn connected(&self, scene: &Scene<'_>, index: usize, took_us: u64) -> Option<Change> {
        let row = self.board_row(scene, index);
        row.note_connect_time(self.connect_us(scene, index), took_us);
        let fails = row.fails.load(Relaxed);
        // As with nginx, a success counts once the peer was let in for a try after the failure's time was over.
        if fails == 0 || row.failed_ms.load(Relaxed) >= row.checked_ms.load(Relaxed) {
            return None;
        }
        row.fails.store(0, Relaxed);
        let max_fails = self.peers[index].max_fails;
        if max_fails == 0 || fails < max_fails {
            return None;
        }
        row.live_since_ms.store(scene.now_ms, Relaxed);
        Some(Change::Revived)
    }

    /// How a peer is.
    pub fn health(&self, scene: &Scene<'_>, index: usize) -> Health {
        if self.peers[index].down {
            Health::Down
        } else if self.is_away(scene, index) {
            Health::Unhealthy
        } else if self.is_out(scene, index) {
            Health::Unavailable
        } else {
            Health::Up
        }
    }

    /// How many attempts a session can make at most.
    pub fn len(&self) -> usize {
        self.peers.len()
    }

    fn board_row<'a>(&self, scene: &Scene<'a>, index: usize) -> &'a PeerRow {
        &scene.board.peers[self.peers[index].row]
    }

    /// Whether it gets nothing, whatever becomes of the others: the operator or the checks say so.
    fn is_away(&self, scene: &Scene<'_>, index: usize) -> bool {
        let peer = &self.peers[index];
        peer.down || (peer.checked && self.board_row(scene, index).check.is_down())
    }

    /// Whether failed attempts have taken it out.
    fn is_out(&self, scene: &Scene<'_>, index: usize) -> bool {
        let (peer, row) = (&self.peers[index], self.board_row(scene, index));
        let age_ms = scene.now_ms.saturating_sub(row.checked_ms.load(Relaxed));
        !self.is_single
            && peer.max_fails > 0
            && row.fails.load(Relaxed) >= peer.max_fails
            && age_ms <= peer.fail_timeout_ms
    }

    /// The sessions of each peer, in the whole program.
    fn active(&self, scene: &Scene<'_>) -> Vec<u64> {
        let active = |peer: &Member| scene.board.peer_active(peer.row, scene.now_ms);
        self.peers.iter().map(active).collect()
    }

    fn take(&self, scene: &Scene<'_>, index: usize) -> Pick {
        let (peer, row) = (&self.peers[index], self.board_row(scene, index));
        if scene.now_ms.saturating_sub(row.checked_ms.load(Relaxed)) > peer.fail_timeout_ms {
            row.checked_ms.store(scene.now_ms, Relaxed);
        }
        // Under the lock, so that nobody else has counted the same place as free.
        WorkerRow::up(&scene.board.workers[scene.worker].peer_active[peer.row]);
        Pick::Peer(index)
    }
}
