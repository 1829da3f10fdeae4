//! What must hold for every group, whatever happens to its peers.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use culvert_shared::config::{Address, Metric};
use culvert_shared::health::{Outcome, Pace, Turn};
use culvert_shared::sys::shm::Shared;
use proptest::prelude::*;

use super::*;

const WORKERS: usize = 4;

/// A group on a board of its own.
struct World {
    board: Shared<Board>,
    upstream: Upstream,
    group: Group,
    now_ms: u64,
    random: u64,
}

fn peer(port: usize, weight: u32) -> Peer {
    let address = Address::Tcp(([10, 0, 0, 1], port as u16).into());
    Peer {
        weight,
        ..Peer::new(address)
    }
}

fn peers(weights: &[u32]) -> Vec<Peer> {
    weights
        .iter()
        .enumerate()
        .map(|(n, weight)| peer(1000 + n, *weight))
        .collect()
}

fn by_key(consistent: bool) -> Balance {
    let key = Template(vec![Part::Variable(Variable::RemoteAddr)]);
    Balance::Hash { key, consistent }
}

impl World {
    fn new(balance: Balance, peers: Vec<Peer>) -> World {
        let upstream = Upstream {
            name: "u".into(),
            balance,
            peers,
            check: None,
            queue: None,
            names: Vec::new(),
        };
        let rows: Vec<usize> = (0..upstream.peers.len()).collect();
        let board = Shared::<Board>::anonymous(1).expect("memory");
        board[0].worker_rows.store(WORKERS as u32, Relaxed);
        World {
            board,
            group: Group::new(&upstream, 0, &rows),
            upstream,
            now_ms: 1_000_000,
            random: 1,
        }
    }

    fn scene(&self, worker: usize) -> Scene<'_> {
        Scene {
            board: &self.board[0],
            worker,
            now_ms: self.now_ms,
        }
    }

    fn pick(&mut self, worker: usize, tried: &[usize], key: &str) -> Pick {
        self.random = self
            .random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        self.group.pick(
            &self.scene(worker),
            tried,
            key,
            self.random ^ self.random >> 33,
            None,
        )
    }

    #[track_caller]
    fn next(&mut self, worker: usize, key: &str) -> usize {
        match self.pick(worker, &[], key) {
            Pick::Peer(peer) => peer,
            other => panic!("{other:?}"),
        }
    }

    fn end(&self, worker: usize, peer: usize) {
        WorkerRow::down(&self.board[0].workers[worker].peer_active[peer]);
    }

    fn shares(&mut self, picks: usize) -> Vec<usize> {
        let mut shares = vec![0; self.upstream.peers.len()];
        for n in 0..picks {
            let peer = self.next(n % WORKERS, &format!("192.0.2.{n}"));
            self.end(n % WORKERS, peer);
            shares[peer] += 1;
        }
        shares
    }
}

#[test]
fn sessions_follow_the_weights_and_heavy_peers_are_spread_out_whichever_worker_picks() {
    let mut world = World::new(Balance::RoundRobin, peers(&[5, 1, 1]));
    let picks: Vec<usize> = (0..7).map(|n| world.next(n % WORKERS, "")).collect();
    assert_eq!(picks, [0, 0, 1, 0, 2, 0, 0]);
}

#[test]
fn a_tried_peer_is_left_out_until_none_is_left() {
    let mut world = World::new(Balance::RoundRobin, peers(&[1, 1]));
    assert_eq!(world.pick(0, &[0], ""), Pick::Peer(1));
    assert_eq!(world.pick(0, &[0, 1], ""), Pick::Nobody);
}

#[test]
fn a_failed_peer_is_out_for_its_time_then_gets_one_try_and_a_success_revives_it() {
    let mut world = World::new(Balance::RoundRobin, peers(&[1, 1]));
    assert_eq!(world.group.failed(&world.scene(0), 0), Some(Change::TakenOut));
    assert_eq!(world.group.health(&world.scene(0), 0), Health::Unavailable);
    assert_eq!(world.shares(20), [0, 20]);
    world.now_ms += 10_001;
    assert_eq!(world.shares(20)[0], 1, "one try, until it is known how it went");
    assert_eq!(
        world.group.connected(&world.scene(1), 0, 100),
        Some(Change::Revived)
    );
    let shares = world.shares(100);
    assert!(shares[0].abs_diff(50) <= 2, "{shares:?}");
}

#[test]
fn as_many_failures_as_max_fails_allows_take_nothing_out() {
    let mut all = peers(&[1, 1]);
    all[0].max_fails = 3;
    all[1].max_fails = 0;
    let world = World::new(Balance::RoundRobin, all);
    assert_eq!(world.group.failed(&world.scene(0), 0), None);
    assert_eq!(world.group.failed(&world.scene(1), 0), None);
    assert_eq!(world.group.failed(&world.scene(2), 0), Some(Change::TakenOut));
    for _ in 0..10 {
        assert_eq!(world.group.failed(&world.scene(0), 1), None);
    }
    assert_eq!(world.group.health(&world.scene(0), 1), Health::Up);
}

#[test]
fn when_all_have_failed_all_are_tried_again() {
    let mut world = World::new(Balance::LeastConn, peers(&[1, 1]));
    world.group.failed(&world.scene(0), 0);
    world.group.failed(&world.scene(0), 1);
    let first = world.next(0, "");
    assert!(matches!(world.pick(0, &[first], ""), Pick::Peer(other) if other != first));
    let mut alone = World::new(Balance::RoundRobin, peers(&[1]));
    assert_eq!(alone.group.failed(&alone.scene(0), 0), None);
    assert_eq!(alone.next(0, ""), 0, "a lone peer is never out");
}

#[test]
fn backups_serve_only_while_all_primaries_are_out_or_full() {
    let mut all = peers(&[1, 1, 1]);
    all[2].backup = true;
    all[1].max_conns = 1;
    for balance in [Balance::RoundRobin, by_key(false), by_key(true), Balance::Random] {
        let mut world = World::new(balance, all.clone());
        assert_eq!(world.shares(50)[2], 0);
        world.group.failed(&world.scene(0), 0);
        assert_eq!(world.next(0, "k"), 1);
        assert_eq!(world.next(0, "k"), 2, "the primaries are out and full");
        world.end(0, 1);
        assert_eq!(world.next(0, "k"), 1);
    }
}

#[test]
fn of_peers_that_have_all_failed_backups_are_not_tried_before_the_primaries() {
    let mut all = peers(&[1, 1, 1]);
    all[0].backup = true;
    for balance in [Balance::RoundRobin, by_key(false), by_key(true), Balance::Random] {
        let mut world = World::new(balance, all.clone());
        (0..3).for_each(|peer| _ = world.group.failed(&world.scene(0), peer));
        let first = world.next(0, "k");
        world.group.failed(&world.scene(0), first);
        let second = match world.pick(0, &[first], "k") {
            Pick::Peer(peer) => peer,
            other => panic!("{other:?}"),
        };
        assert_eq!((first.min(second), first.max(second)), (1, 2));
        assert_eq!(world.pick(0, &[1, 2], "k"), Pick::Peer(0));
    }
}

#[test]
fn a_peer_that_has_failed_gets_its_share_again_however_peers_are_chosen() {
    let two = |metric| Balance::RandomTwo(metric);
    for balance in [
        Balance::LeastConn,
        Balance::LeastTime,
        two(Metric::Connections),
        two(Metric::Time),
    ] {
        let name = format!("{balance:?}");
        let mut world = World::new(balance, peers(&[1, 1]));
        (0..2).for_each(|peer| _ = world.group.connected(&world.scene(0), peer, 100));
        world.group.failed(&world.scene(0), 0);
        // The other one has what a busy peer has.
        let busy = &world.board[0].workers[1].peer_active[1];
        busy.store(40, Relaxed);
        world.now_ms += 10_001;
        while world.next(0, "") != 0 {}
        assert_eq!(
            world.group.connected(&world.scene(0), 0, 100),
            Some(Change::Revived)
        );
        for n in 0..200 {
            world.next(n % WORKERS, "");
        }
        let held = [0, 1].map(|peer| world.board[0].peer_active(peer, world.now_ms));
        assert!(held[0].abs_diff(held[1]) <= 2, "{name}: {held:?}");
    }
}

#[test]
fn sessions_without_a_key_are_shared_out_in_turn() {
    for consistent in [false, true] {
        let mut world = World::new(by_key(consistent), peers(&[2, 1]));
        let picks: Vec<usize> = (0..6).map(|_| world.next(0, "")).collect();
        assert_eq!(picks, [0, 1, 0, 0, 1, 0]);
    }
}

/// One check of a peer, for which all are due at any time.
fn check(world: &World, peer: usize, outcome: Outcome) -> Option<Turn> {
    let row = &world.board[0].peers[peer];
    let pace = Pace {
        interval_ms: 0,
        timeout_ms: 1,
    };
    let lease = row.check.claim(0, pace, world.now_ms).expect("it is due");
    let turn = row.check.settle(lease, outcome, 1, 1);
    if turn == Some(Turn::Up) {
        row.revive(world.now_ms);
    }
    turn
}

fn checked(peers: Vec<Peer>) -> World {
    let mut world = World::new(Balance::RoundRobin, peers);
    world.upstream.check = Some(culvert_shared::config::Check {
        interval: Duration::from_secs(5),
        rise: 1,
        fall: 1,
        timeout: Duration::from_secs(5),
        port: None,
        send: Vec::new(),
        expect: None,
    });
    let rows: Vec<usize> = (0..world.upstream.peers.len()).collect();
    world.group = Group::new(&world.upstream, 0, &rows);
    world
}

#[test]
fn a_peer_whose_checks_fail_gets_nothing_though_all_others_have_failed() {
    let mut world = checked(peers(&[1, 1]));
    assert_eq!(check(&world, 0, Outcome::NoAnswer), Some(Turn::Down));
    assert_eq!(world.group.health(&world.scene(0), 0), Health::Unhealthy);
    assert_eq!(world.shares(10), [0, 10]);
    world.group.failed(&world.scene(0), 1);
    assert_eq!(
        world.next(0, ""),
        1,
        "what failed attempts say is forgotten first"
    );
    assert_eq!(check(&world, 1, Outcome::NoAnswer), Some(Turn::Down));
    assert_eq!(world.pick(0, &[], ""), Pick::Nobody);
    assert_eq!(check(&world, 0, Outcome::Passed), Some(Turn::Up));
    assert_eq!(world.shares(10), [10, 0]);
}

#[test]
fn a_peer_that_checks_find_up_again_starts_slowly() {
    let mut all = peers(&[10, 10]);
    all[0].slow_start = Duration::from_secs(100);
    let mut world = checked(all);
    assert_eq!(world.shares(20), [10, 10], "at the start all are there at once");
    check(&world, 0, Outcome::Closed);
    world.now_ms += 1_000_000;
    check(&world, 0, Outcome::Passed);
    let young = world.shares(110)[0];
    world.now_ms += 100_000;
    let grown = world.shares(110)[0];
    assert!(
        young <= 2 && (53..=57).contains(&grown),
        "{young} of 110 at once, {grown} later"
    );
}

#[test]
fn a_slow_start_grows_with_time() {
    let mut all = peers(&[10, 10]);
    all[0].slow_start = Duration::from_secs(100);
    let mut world = World::new(Balance::RoundRobin, all);
    world.group.failed(&world.scene(0), 0);
    world.now_ms += 10_001;
    while world.next(0, "") != 0 {}
    assert_eq!(
        world.group.connected(&world.scene(0), 0, 100),
        Some(Change::Revived)
    );
    let young = world.shares(110)[0];
    world.now_ms += 50_000;
    let middle = world.shares(110)[0];
    world.now_ms += 50_000;
    let grown = world.shares(110)[0];
    assert!(
        young <= 2 && (34..=40).contains(&middle) && (53..=57).contains(&grown),
        "{young} {middle} {grown}"
    );
}

#[test]
fn the_least_time_wins_and_an_unknown_one_is_tried() {
    let mut world = World::new(Balance::LeastTime, peers(&[1, 1, 1]));
    world.group.connected(&world.scene(0), 0, 100);
    world.group.connected(&world.scene(0), 1, 10_000);
    assert_eq!(world.shares(5), [0, 0, 5]);
    world.group.connected(&world.scene(0), 2, 20_000);
    assert_eq!(world.shares(50), [50, 0, 0]);
}

#[test]
fn a_peer_that_was_slow_once_is_tried_again_and_one_that_is_slow_gets_little() {
    for balance in [Balance::LeastTime, Balance::RandomTwo(Metric::Time)] {
        let mut world = World::new(balance, peers(&[1, 1]));
        world.group.connected(&world.scene(0), 0, 100);
        // Its SYN was lost.
        world.group.connected(&world.scene(0), 1, 1_000_000);
        let mut visit = |slow_us: u64| {
            let peer = world.next(0, "");
            let took_us = if peer == 0 { 100 } else { slow_us };
            world.group.connected(&world.scene(0), peer, took_us);
            world.end(0, peer);
            peer
        };
        let slow = (0..4_000).filter(|_| visit(1_000_000) == 1).count();
        assert!((1..40).contains(&slow), "{slow} of 4000 to a slow peer");
        (0..4_000).for_each(|_| _ = visit(100));
        let held = (0..100).filter(|_| world.next(0, "") == 1).count();
        assert!((40..=60).contains(&held), "{held} of 100");
    }
}

#[test]
fn the_fewest_sessions_for_the_weight_win_wherever_the_sessions_are() {
    let mut world = World::new(Balance::LeastConn, peers(&[3, 1]));
    let mut held = [0; 2];
    for n in 0..40 {
        held[world.next(n % WORKERS, "")] += 1;
    }
    assert_eq!(held, [30, 10]);
    // All of one worker's end: the others' count on.
    world.board[0].workers[1].peer_active[0].store(0, Relaxed);
    let left = world.board[0].peer_active(0, world.now_ms);
    for _ in left..30 {
        assert_eq!(world.next(2, ""), 0);
    }
}

#[test]
fn a_peer_more_or_less_moves_only_its_share_of_a_rings_keys() {
    let keys: Vec<String> = (0..4000)
        .map(|n| format!("198.51.{}.{}", n / 250, n % 250))
        .collect();
    for n in [2usize, 5, 20] {
        let mut before = World::new(by_key(true), peers(&vec![1; n]));
        let mut after = World::new(by_key(true), peers(&vec![1; n + 1]));
        let mut moved = 0;
        for key in &keys {
            let (old, new) = (before.next(0, key), after.next(0, key));
            assert!(old == new || new == n, "{key} went from {old} to {new}");
            moved += usize::from(old != new);
        }
        let fair = keys.len() / (n + 1);
        assert!(
            moved * 2 > fair && moved * 2 < fair * 3,
            "{moved} of {fair} moved"
        );
    }
}

#[test]
fn keys_are_shared_out_by_weight_and_stay() {
    for balance in [by_key(false), by_key(true), Balance::Source] {
        let mut world = World::new(balance, peers(&[3, 1]));
        let first = world.shares(4000);
        assert!((2600..=3400).contains(&first[0]), "{first:?}");
        assert_eq!(world.shares(4000), first);
    }
}

fn balances() -> impl Strategy<Value = Balance> {
    prop::sample::select(vec![
        Balance::RoundRobin,
        Balance::LeastConn,
        Balance::LeastTime,
        Balance::Random,
        Balance::RandomTwo(Metric::Connections),
        Balance::RandomTwo(Metric::Time),
        Balance::Source,
        by_key(false),
        by_key(true),
    ])
}

#[derive(Clone, Debug)]
enum Step {
    Pick(usize, u8),
    End(prop::sample::Index),
    Fail(prop::sample::Index),
    Wait(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0..WORKERS, any::<u8>()).prop_map(|(worker, key)| Step::Pick(worker, key)),
        2 => any::<prop::sample::Index>().prop_map(Step::End),
        1 => any::<prop::sample::Index>().prop_map(Step::Fail),
        1 => (0u64..20_000).prop_map(Step::Wait),
    ];
    prop::collection::vec(step, 1..120)
}

proptest! {
    #[test]
    fn round_robin_is_exact_over_each_round(weights in prop::collection::vec(1u32..20, 1..6), rounds in 1usize..4) {
        let mut world = World::new(Balance::RoundRobin, peers(&weights));
        let round: u32 = weights.iter().sum();
        for n in 1..=rounds {
            let shares = world.shares(round as usize);
            prop_assert_eq!(&shares, &weights.iter().map(|w| *w as usize).collect::<Vec<_>>(), "round {}", n);
        }
    }

    #[test]
    fn no_peer_gets_what_it_must_not_have(
        balance in balances(),
        shape in prop::collection::vec((1u32..5, any::<[bool; 2]>(), 0u32..4, 0u32..3), 1..6),
        steps in steps(),
    ) {
        let mut all = peers(&vec![1; shape.len()]);
        for (peer, (weight, [backup, down], max_conns, max_fails)) in all.iter_mut().zip(shape) {
            (peer.weight, peer.backup, peer.down) = (weight, backup, down);
            (peer.max_conns, peer.max_fails) = (max_conns, max_fails);
        }
        all[0].backup = false;
        let mut world = World::new(balance, all.clone());
        let mut held: Vec<(usize, usize)> = Vec::new();
        for step in steps {
            match step {
                Step::Pick(worker, key) => {
                    let active: Vec<u32> = (0..all.len()).map(|p| held.iter().filter(|(_, at)| *at == p).count() as u32).collect();
                    let health: Vec<Health> = (0..all.len()).map(|p| world.group.health(&world.scene(0), p)).collect();
                    let has_room = |p: usize| all[p].max_conns == 0 || active[p] < all[p].max_conns;
                    let lives = |p: usize| health[p] == Health::Up && has_room(p);
                    let picked = world.pick(worker, &[], &key.to_string());
                    let Pick::Peer(peer) = picked else {
                        prop_assert!((0..all.len()).all(|p| all[p].down || !has_room(p) || !lives(p)), "{picked:?} though one lives");
                        continue;
                    };
                    prop_assert!(!all[peer].down, "down by the operator");
                    prop_assert!(has_room(peer), "over max_conns");
                    prop_assert!(lives(peer) || !(0..all.len()).any(lives), "out while another lives");
                    prop_assert!(!all[peer].backup || !(0..all.len()).any(|p| lives(p) && !all[p].backup), "a backup too early");
                    held.push((worker, peer));
                }
                Step::End(which) if !held.is_empty() => {
                    let (worker, peer) = held.swap_remove(which.index(held.len()));
                    world.end(worker, peer);
                }
                Step::End(_) => {}
                Step::Fail(which) => {
                    let peer = which.index(all.len());
                    world.group.failed(&world.scene(0), peer);
                }
                Step::Wait(ms) => world.now_ms += ms,
            }
        }
    }
}

#[test]
fn peers_that_names_stand_for_come_and_go_and_the_file_says_what_they_are_like() {
    use culvert_shared::config::{Named, Resolver};
    use culvert_shared::members::{Member, MemberSet};
    let mut like = peers(&[1]).remove(0);
    like.max_conns = 1;
    let named = Named {
        host: "a.test".into(),
        port: 80,
        service: None,
        like,
        resolver: Resolver {
            servers: Vec::new(),
            valid: None,
            hold: std::time::Duration::ZERO,
            ipv4: true,
            ipv6: true,
            timeout: std::time::Duration::ZERO,
        },
    };
    let upstream = Upstream {
        name: "u".into(),
        balance: by_key(true),
        peers: peers(&[1]),
        check: None,
        queue: None,
        names: vec![named],
    };
    let set = Shared::<MemberSet>::anonymous(1).expect("memory");
    let member = |row: usize, weight: u32, former: bool| Member {
        row,
        name: 0,
        address: std::net::SocketAddr::from(([10, 9, 9, row as u8], 80)),
        weight,
        backup: false,
        former,
    };
    let mut group = Group::new(&upstream, 0, &[7]);
    group.refresh(&set[0]);
    assert_eq!(group.len(), 1);
    // A record may say more weight than a ring has room for.
    set[0].write(&[member(8, 65_535, false), member(9, 1, false), member(10, 1, true)]);
    group.refresh(&set[0]);
    let rows: Vec<usize> = group.members().iter().map(|peer| peer.row).collect();
    assert_eq!(rows, [7, 8, 9]);
    assert_eq!(group.members()[1].max_conns(), 1);
    assert!(group.knows(10) && group.index_of(10).is_none() && !group.knows(11));
    let board = Shared::<Board>::anonymous(1).expect("memory");
    board[0].worker_rows.store(1, Relaxed);
    let scene = Scene {
        board: &board[0],
        worker: 0,
        now_ms: 1_000_000,
    };
    // max_conns holds for each: a row that was tried is not tried again, the one that is gone is never taken.
    let picks: Vec<Pick> = (0..4).map(|_| group.pick(&scene, &[7], "key", 1, None)).collect();
    assert_eq!(picks[2..], [Pick::Full, Pick::Full]);
    let mut taken = [picks[0], picks[1]];
    taken.sort_by_key(|pick| format!("{pick:?}"));
    assert_eq!(taken, [Pick::Peer(1), Pick::Peer(2)]);
    set[0].write(&[member(9, 1, false), member(8, 1, true)]);
    group.refresh(&set[0]);
    assert_eq!(group.index_of(9), Some(1));
    assert_eq!(
        group.address_of(8).map(ToString::to_string).as_deref(),
        Some("10.9.9.8:80")
    );
}
