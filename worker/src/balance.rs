//! Which peer of an upstream group a session goes to. Pure; one state for each group and worker.

/// Smooth weighted round robin: each peer gains its weight, the one with the most is taken and pays the
/// sum back, so that heavy peers are spread among light ones (nginx, ngx_http_upstream_get_peer).
pub struct RoundRobin {
    weights: Vec<i64>,
    current: Vec<i64>,
}

impl RoundRobin {
    /// A group of peers with these weights, each at least 1.
    pub fn new(weights: impl Iterator<Item = u32>) -> RoundRobin {
        let weights: Vec<i64> = weights.map(i64::from).collect();
        RoundRobin {
            current: vec![0; weights.len()],
            weights,
        }
    }

    /// The index of the next peer, leaving out those already tried; `None` when none is left.
    pub fn pick(&mut self, tried: &[usize]) -> Option<usize> {
        let mut best: Option<usize> = None;
        let mut sum = 0;
        for (peer, weight) in self.weights.iter().enumerate() {
            if tried.contains(&peer) {
                continue;
            }
            self.current[peer] += weight;
            sum += weight;
            if best.is_none_or(|best| self.current[peer] > self.current[best]) {
                best = Some(peer);
            }
        }
        self.current[best?] -= sum;
        best
    }

    /// Whether every peer has been tried.
    pub fn is_last(&self, tried: &[usize]) -> bool {
        (0..self.weights.len()).all(|peer| tried.contains(&peer))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_follow_the_weights_and_heavy_peers_are_spread_out() {
        let mut group = RoundRobin::new([5, 1, 1].into_iter());
        let picks: Vec<usize> = (0..7).filter_map(|_| group.pick(&[])).collect();
        assert_eq!(picks, [0, 0, 1, 0, 2, 0, 0]);
    }

    #[test]
    fn a_tried_peer_is_left_out_until_none_is_left() {
        let mut group = RoundRobin::new([1, 1].into_iter());
        assert_eq!(group.pick(&[0]), Some(1));
        assert_eq!(group.pick(&[0, 1]), None);
    }
}
