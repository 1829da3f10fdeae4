//! The ways of choosing one peer of those that are ready.

use std::cmp::Ordering;
use std::sync::atomic::Ordering::Relaxed;

use culvert_shared::config::Metric;

use super::{Group, Method, Scene, ring};

/// What a unit of weight counts, so that a part of it can be told: slow starts take many small steps.
const SCALE: u64 = 256;

/// How often each peer of a group could have had a session before one that got none, as too slow, is taken for twice as
/// fast. Nothing else would ever tell that it is slow no more: one lost SYN is a thousand times what connecting takes nearby.
const FADE: u64 = 64;

impl Group {
    /// One of `ready`, which are indices in ascending order; `None` only if there is none.
    pub(super) fn choose(
        &self,
        scene: &Scene<'_>,
        ready: &[usize],
        active: &[u64],
        key: &str,
        random: u64,
    ) -> Option<usize> {
        if ready.len() <= 1 {
            return ready.first().copied();
        }
        // Keys and rings know the primaries only, and say nothing of a session without a key: such ones would all go
        // to one peer (nginx: in turn as well).
        let in_turn = key.is_empty() || self.peers[ready[0]].backup;
        let is_ready = |peer: usize| ready.contains(&peer);
        match &self.method {
            Method::RoundRobin => self.smooth(scene, ready),
            Method::LeastConn => self.least(scene, ready, |peer| u128::from(active[peer])),
            Method::LeastTime => {
                let fastest = self.least(scene, ready, |peer| self.time(scene, active, peer));
                self.pass_over(scene, ready, fastest);
                fastest
            }
            Method::Random => self.by_chance(ready, random),
            Method::RandomTwo(metric) => self.of_two(scene, ready, active, random, *metric),
            Method::Hash(_) | Method::Ring(..) if in_turn => self.smooth(scene, ready),
            Method::Ring(_, ring) => ring.pick(key, is_ready).or_else(|| self.smooth(scene, ready)),
            Method::Hash(_) => {
                let primaries = self.peers.iter().enumerate().filter(|(_, peer)| !peer.backup);
                let weights: Vec<(usize, u64)> = primaries
                    .map(|(index, peer)| (index, u64::from(peer.weight)))
                    .collect();
                ring::plain(key, &weights, is_ready).or_else(|| self.smooth(scene, ready))
            }
        }
    }

    /// nginx's smooth weighted round robin: each gains its weight, the furthest ahead is taken and pays for all. What
    /// failures have taken off a weight comes back here, a unit with each turn.
    fn smooth(&self, scene: &Scene<'_>, ready: &[usize]) -> Option<usize> {
        let mut best: Option<(usize, i64)> = None;
        let mut sum = 0;
        for &index in ready {
            let row = self.board_row(scene, index);
            let penalty = row.penalty.load(Relaxed);
            let weight = self.grown(scene, index, self.peers[index].weight.saturating_sub(penalty)) as i64;
            let turn = row.turn.load(Relaxed).saturating_add(weight);
            row.turn.store(turn, Relaxed);
            sum += weight;
            row.penalty.store(penalty.saturating_sub(1), Relaxed);
            if best.is_none_or(|(_, most)| turn > most) {
                best = Some((index, turn));
            }
        }
        let (best, turn) = best?;
        self.board_row(scene, best).turn.store(turn - sum, Relaxed);
        Some(best)
    }

    /// What a slow start leaves of a weight, in units of [`SCALE`].
    fn grown(&self, scene: &Scene<'_>, index: usize, weight: u32) -> u64 {
        let (peer, row) = (&self.peers[index], self.board_row(scene, index));
        let weight = SCALE * u64::from(weight);
        let since = row.live_since_ms.load(Relaxed);
        let lived = scene.now_ms.saturating_sub(since);
        if self.is_single || since == 0 || lived >= peer.slow_start_ms {
            return weight;
        }
        (weight * lived / peer.slow_start_ms).max(1)
    }

    /// Those with the least for their weight; among equals in turn.
    fn least(&self, scene: &Scene<'_>, ready: &[usize], load: impl Fn(usize) -> u128) -> Option<usize> {
        let mut best: Vec<usize> = Vec::with_capacity(ready.len());
        for &index in ready {
            match best.first() {
                None => best.push(index),
                Some(first) => match self.compare(scene, (index, load(index)), (*first, load(*first))) {
                    Ordering::Less => best = vec![index],
                    Ordering::Equal => best.push(index),
                    Ordering::Greater => {}
                },
            }
        }
        match best.as_slice() {
            [] => None,
            [only] => Some(*only),
            equal => self.smooth(scene, equal),
        }
    }

    /// Loads in proportion to weights. Failures take nothing off these (nginx: the same): where peers are not chosen in
    /// turn it would never come back.
    fn compare(&self, scene: &Scene<'_>, one: (usize, u128), other: (usize, u128)) -> Ordering {
        let weight = |index: usize| u128::from(self.grown(scene, index, self.peers[index].weight));
        (one.1 * weight(other.0)).cmp(&(other.1 * weight(one.0)))
    }

    /// The time to connect, as many times as there are sessions to share the peer with.
    fn time(&self, scene: &Scene<'_>, active: &[u64], index: usize) -> u128 {
        // One that has never been connected to is tried.
        u128::from(self.connect_us(scene, index)) * (u128::from(active[index]) + 1)
    }

    /// How long connecting takes, as far as that still counts.
    pub(super) fn connect_us(&self, scene: &Scene<'_>, index: usize) -> u64 {
        let row = self.board_row(scene, index);
        let halvings = row.passed_over.load(Relaxed) / (FADE * self.peers.len() as u64);
        row.connect_us.load(Relaxed) >> halvings.min(63)
    }

    /// Notes that one of these was preferred because it is faster.
    fn pass_over(&self, scene: &Scene<'_>, ready: &[usize], fastest: Option<usize>) {
        for index in ready.iter().filter(|index| Some(**index) != fastest) {
            self.board_row(scene, *index).passed_over.fetch_add(1, Relaxed);
        }
    }

    fn by_chance(&self, ready: &[usize], random: u64) -> Option<usize> {
        let weight = |index: usize| u64::from(self.peers[index].weight);
        let total: u64 = ready.iter().map(|index| weight(*index)).sum();
        let mut at = random % total.max(1);
        ready.iter().copied().find(|index| {
            let own = weight(*index);
            let here = at < own;
            at = at.saturating_sub(own);
            here
        })
    }

    fn of_two(
        &self,
        scene: &Scene<'_>,
        ready: &[usize],
        active: &[u64],
        random: u64,
        metric: Metric,
    ) -> Option<usize> {
        let one = self.by_chance(ready, random >> 32)?;
        let others: Vec<usize> = ready.iter().copied().filter(|index| *index != one).collect();
        let other = self.by_chance(&others, random & 0xffff_ffff)?;
        let load = |index| match metric {
            Metric::Connections => u128::from(active[index]),
            Metric::Time => self.time(scene, active, index),
        };
        let better = match self.compare(scene, (other, load(other)), (one, load(one))) {
            Ordering::Less => other,
            _ => one,
        };
        if metric == Metric::Time {
            self.pass_over(scene, &[one, other], Some(better));
        }
        Some(better)
    }
}
