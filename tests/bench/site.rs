//! Where a run takes place: all on loopback, or the clients in a network of their own at the other end of a long way. Never
//! measures.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::harness::long_way::{LongWay, Way};
use crate::harness::networks::Networks;

const CLIENTS: usize = 0;
const SERVERS: usize = 1;

/// The place.
#[derive(Debug)]
pub struct Site {
    far: Option<(LongWay, Networks<2>)>,
}

impl Site {
    /// Makes it. The caller's thread is then where the servers and the contenders are, and so is whatever it starts.
    pub fn new(way: Option<Way>) -> Result<Site> {
        let Some(way) = way else {
            return Ok(Site { far: None });
        };
        let networks = Networks::new(["c", "s"], |_| Vec::new());
        let long_way = LongWay::between(&networks, [CLIENTS, SERVERS], "way", 83, way);
        networks.enter(SERVERS).context("entering a network")?;
        Ok(Site {
            far: Some((long_way, networks)),
        })
    }

    /// The address of everything that listens.
    pub fn ip(&self) -> IpAddr {
        match self.far {
            Some(_) => IpAddr::from([10, 83, 0, 2]),
            None => IpAddr::from(Ipv4Addr::LOCALHOST),
        }
    }

    /// Does something where the clients are.
    pub fn among_clients<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        match &self.far {
            Some((_, networks)) => networks.within(CLIENTS, work),
            None => work(),
        }
    }
}

/// The way that the command line describes. Its queue is what it carries in 20 ms or, where it is longer than that, while a packet
/// goes there and back.
pub fn way(text: &str) -> Result<Way> {
    let numbers: Vec<Option<u64>> = text.split(',').map(|number| number.parse().ok()).collect();
    let &[Some(ms), Some(mbit_s), Some(lost)] = &numbers[..] else {
        bail!("--way takes three whole numbers, as in 20,500,100, and not {text}");
    };
    ensure!(
        ms <= 1000 && (1..=10_000).contains(&mbit_s) && lost <= 1_000_000,
        "--way {text} is out of range"
    );
    let queue_bytes = mbit_s * 125 * (2 * ms).max(20);
    Ok(Way {
        lost,
        ..Way::faultless(Duration::from_millis(ms), mbit_s, queue_bytes)
    })
}
