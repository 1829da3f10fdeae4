//! `[[upstream]]`: groups, their peers, and how a peer is chosen.

use std::time::Duration;

use config::{Map, Value, ValueKind};

use super::check::{Check, YEAR};
use super::diagnostic::{Fault, OriginId};
use super::names::Written;
use super::source::{entries, join};
use super::valid::{self, Given};
use super::world::World;
use super::{Address, Balance, Named, Resolver, VariableMap};
use super::{address, balance, defaults, health, units};
use crate::counters::{MAX_GROUPS, MAX_PEERS};
use crate::members::MAX_NAMES;

/// nginx has no limit; smooth weighted round robin needs none above what a share can mean.
const WEIGHT_MAX: u32 = 65_535;

/// Each unit of weight is 160 points of 8 bytes on a consistent hash's ring: 10 MiB for each worker.
const RING_WEIGHT_MAX: u64 = 8_192;

/// As many sessions as all workers of the largest host can hold.
const CONNS_MAX: u32 = 1 << 30;

/// A named group of peers.
#[derive(Clone, Debug, PartialEq)]
pub struct Upstream {
    /// Its name, unique in the file.
    pub name: String,
    /// How a peer is chosen.
    pub balance: Balance,
    /// Its peers, in file order; empty only where there are names.
    pub peers: Vec<Peer>,
    /// How they are checked; `None`: not at all.
    pub check: Option<health::Check>,
    /// Where sessions wait while all peers are at `max_conns`; `None`: they do not.
    pub queue: Option<Queue>,
    /// Names whose addresses are peers as well, looked up while the program runs; in file order.
    pub names: Vec<Named>,
}

/// Where sessions wait for a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queue {
    /// How many at most, of all workers together.
    pub size: u32,
    /// How long at most.
    pub timeout: Duration,
}

/// One address of an upstream group.
#[derive(Clone, Debug, PartialEq)]
pub struct Peer {
    /// Where to connect.
    pub address: Address,
    /// Share of the sessions, at least 1.
    pub weight: u32,
    /// Takes sessions only when no other peer does.
    pub backup: bool,
    /// Takes none; the operator says so.
    pub down: bool,
    /// Sessions that it takes at once, from the whole program; 0: no limit.
    pub max_conns: u32,
    /// Failed attempts within `fail_timeout` that take it out for as long; 0: none do.
    pub max_fails: u32,
    /// See `max_fails`.
    pub fail_timeout: Duration,
    /// How long its weight grows back when it is alive again; 0: it is there at once.
    pub slow_start: Duration,
}

impl Peer {
    /// A peer with the defaults.
    pub fn new(address: Address) -> Peer {
        Peer {
            address,
            weight: defaults::WEIGHT,
            backup: false,
            down: false,
            max_conns: 0,
            max_fails: defaults::MAX_FAILS,
            fail_timeout: defaults::FAIL_TIMEOUT,
            slow_start: Duration::ZERO,
        }
    }
}

impl Check<'_> {
    pub(super) fn upstreams(
        &mut self,
        root: &Map<String, Value>,
        maps: &[VariableMap],
        stream_resolver: &Written,
    ) -> Vec<Upstream> {
        let mut found: Vec<(Upstream, OriginId)> = Vec::new();
        for (key, at, table) in self.tables(root, "upstream") {
            let name_key = join(&key, "name");
            if !table.contains_key("name") {
                self.findings.report(
                    at,
                    &name_key,
                    "missing, an [[upstream]] needs a name for proxy_pass",
                );
            }
            let name = self.at(table, &key, "name", |given| {
                valid::text(given, "\"backend\"").and_then(upstream_name)
            });
            let same = name.and_then(|name| found.iter().position(|(before, _)| before.name == name));
            if let Some(index) = same {
                let place = self.place(found[index].1);
                let what = format!("already the name of upstream[{index}] at {place}");
                self.at(table, &key, "name", |_| {
                    Err::<(), _>(Fault::new(what, "give each upstream a name of its own"))
                });
            }
            let balance = self.at(table, &key, "balance", |given| balance::read(given, maps));
            let name_at = table.get("name").map_or(at, |name| self.findings.origin_of(name));
            let balance = balance.unwrap_or(Balance::RoundRobin);
            let resolver = self.written_resolver(table, &key).or(stream_resolver);
            let (peers, names) = self.peers(&key, at, table, &balance, resolver.as_ref());
            let before = found.iter().map(|(upstream, _)| upstream);
            if let Some(value) = table.get("server") {
                self.read(&join(&key, "server"), value, |_| room(before, peers.len()));
            }
            let check = self.health(&key, table);
            if let (Some(port), Some(value)) =
                (check.as_ref().and_then(|check| check.port), table.get("check"))
            {
                self.check_port(&join(&key, "check.port"), value, port, &peers);
            }
            let name = name.unwrap_or_default().to_owned();
            let upstream = Upstream {
                name,
                balance,
                peers,
                check,
                queue: self.queue(&key, table),
                names,
            };
            found.push((upstream, name_at));
        }
        found.into_iter().map(|(upstream, _)| upstream).collect()
    }

    /// The peers of one upstream, and the names of others.
    fn peers(
        &mut self,
        key: &str,
        at: OriginId,
        table: &Map<String, Value>,
        balance: &Balance,
        resolver: Option<&Resolver>,
    ) -> (Vec<Peer>, Vec<Named>) {
        let list_key = join(key, "server");
        let key = list_key.clone();
        let Some(value) = table.get("server") else {
            self.findings.report(
                at,
                &key,
                "missing, an upstream needs at least one server = [\"host:port\"]",
            );
            return (Vec::new(), Vec::new());
        };
        let items = entries(&key, value);
        if items.is_empty() {
            self.read(&key, value, |_| {
                Err::<(), _>(Fault::new("empty", "give at least one \"host:port\""))
            });
        }
        let world = self.world;
        let (mut peers, mut names) = (Vec::new(), Vec::new());
        for (key, item) in items {
            let (addresses, like) = match &item.kind {
                ValueKind::Table(table) => {
                    if !table.contains_key("address") {
                        let at = self.findings.origin_of(item);
                        self.findings.report(
                            at,
                            &join(&key, "address"),
                            "missing, a server needs an address",
                        );
                    }
                    let like = self.peer(&key, table, balance);
                    if let Some(named) = self.named(&key, table, &like, resolver) {
                        names.extend(named);
                        continue;
                    }
                    let addresses = self.at(table, &key, "address", |given| peer_addresses(given, world));
                    (addresses, like)
                }
                _ => (
                    self.read(&key, item, |given| peer_addresses(given, world)),
                    Peer::new(Address::Unix(Default::default())),
                ),
            };
            let addresses = addresses.into_iter().flatten();
            peers.extend(addresses.map(|address| Peer {
                address,
                ..like.clone()
            }));
        }
        self.check_together(&list_key, value, (&peers, &names), balance);
        (peers, names)
    }

    /// What a server's table says besides its address.
    fn peer(&mut self, key: &str, table: &Map<String, Value>, balance: &Balance) -> Peer {
        let mut peer = Peer::new(Address::Unix(Default::default()));
        let wait = |given: Given| units::duration(given, Duration::from_millis(1)..=YEAR);
        let set = self.at(table, key, "weight", |given| valid::number(given, 1..=WEIGHT_MAX));
        peer.weight = set.unwrap_or(peer.weight);
        peer.backup = self.at(table, key, "backup", valid::boolean).unwrap_or(false);
        peer.down = self.at(table, key, "down", valid::boolean).unwrap_or(false);
        // 0 means: no limit, as with nginx.
        let set = self.at(table, key, "max_conns", |given| {
            valid::number(given, 0..=CONNS_MAX)
        });
        peer.max_conns = set.unwrap_or(0);
        // 0 means: failures take nothing out, as with nginx.
        let set = self.at(table, key, "max_fails", |given| {
            valid::number(given, 0..=WEIGHT_MAX)
        });
        peer.max_fails = set.unwrap_or(peer.max_fails);
        peer.fail_timeout = self
            .at(table, key, "fail_timeout", wait)
            .unwrap_or(peer.fail_timeout);
        let by_key_or_chance = matches!(
            balance,
            Balance::Hash { .. } | Balance::Source | Balance::Random | Balance::RandomTwo(_)
        );
        let slow_start = self.at(table, key, "slow_start", |given| {
            let read = units::duration(given, Duration::ZERO..=YEAR)?;
            match by_key_or_chance && !read.is_zero() {
                true => Err(Fault::new(
                    format!("balance = \"{}\" knows no slow start", balance::kind(balance)),
                    "remove it, or balance by round_robin, least_conn or least_time",
                )),
                false => Ok(read),
            }
        });
        peer.slow_start = slow_start.unwrap_or_default();
        peer
    }

    /// The `queue` of one upstream.
    fn queue(&mut self, key: &str, upstream: &Map<String, Value>) -> Option<Queue> {
        let key = join(key, "queue");
        let value = upstream.get("queue")?;
        let ValueKind::Table(table) = &value.kind else {
            // Anything else was reported as being no table.
            return None;
        };
        if !table.contains_key("size") {
            let at = self.findings.origin_of(value);
            self.findings.report(
                at,
                &join(&key, "size"),
                "missing, a queue needs a size: how many sessions wait at most",
            );
        }
        let size = self.at(table, &key, "size", |given| valid::number(given, 1..=CONNS_MAX));
        let timeout = self.at(table, &key, "timeout", |given| {
            units::duration(given, Duration::from_millis(1)..=YEAR)
        });
        Some(Queue {
            size: size.unwrap_or(1),
            timeout: timeout.unwrap_or(defaults::QUEUE_TIMEOUT),
        })
    }

    /// A unix socket has no other port.
    fn check_port(&mut self, key: &str, check: &Value, port: u16, peers: &[Peer]) {
        if let ValueKind::Table(table) = &check.kind
            && let Some(value) = table.get("port")
            && let Some(peer) = peers.iter().find(|peer| matches!(peer.address, Address::Unix(_)))
        {
            let what = format!("{} has no port {port}", peer.address);
            self.read(key, value, |_| {
                Err::<(), _>(Fault::new(
                    what,
                    "leave port out, or give unix sockets an upstream of their own",
                ))
            });
        }
    }

    /// What only all peers of a group together show.
    fn check_together(
        &mut self,
        key: &str,
        value: &Value,
        (peers, names): (&[Peer], &[Named]),
        balance: &Balance,
    ) {
        if names.len() > MAX_NAMES {
            self.read(key, value, |_| {
                Err::<(), _>(Fault::new(
                    format!("{} names to look up", names.len()),
                    format!("an upstream has room for {MAX_NAMES}"),
                ))
            });
        }
        let mut all = peers.iter().chain(names.iter().map(|named| &named.like));
        if all.next().is_some_and(|first| first.backup) && all.all(|peer| peer.backup) {
            self.read(key, value, |_| {
                Err::<(), _>(Fault::new(
                    "all servers are backups, of nothing",
                    "leave backup out for at least one",
                ))
            });
        }
        let on_a_ring = matches!(balance, Balance::Hash { consistent: true, .. } | Balance::Source);
        let weight: u64 = peers.iter().map(|peer| u64::from(peer.weight)).sum();
        if on_a_ring && weight > RING_WEIGHT_MAX {
            self.read(key, value, |_| {
                Err::<(), _>(Fault::new(
                    format!(
                        "the weights add up to {weight}, balance = \"{}\" has room for {RING_WEIGHT_MAX}",
                        balance::kind(balance)
                    ),
                    "divide all of them by the same number",
                ))
            });
        }
    }
}

/// Whether there are counters for one more group of so many peers.
pub(super) fn room<'u>(before: impl Iterator<Item = &'u Upstream>, peers: usize) -> Result<(), Fault> {
    let (mut groups, mut all) = (1, peers);
    for upstream in before {
        groups += 1;
        all += upstream.peers.len();
    }
    let over = |what: &str, limit| {
        Err(Fault::new(
            format!("with it there are more than {limit} {what}"),
            "leave some out; an address in proxy_pass is an upstream as well",
        ))
    };
    match (groups > MAX_GROUPS, all > MAX_PEERS) {
        (true, _) => over("upstreams", MAX_GROUPS),
        (_, true) => over("peers", MAX_PEERS),
        _ => Ok(()),
    }
}

/// A name that can be told from an address and from a variable.
fn upstream_name(name: &str) -> Result<&str, Fault> {
    match name
        .chars()
        .all(|c| c.is_alphanumeric() || matches!(c, '_' | '-' | '.'))
    {
        true => Ok(name),
        false => Err(Fault::new("not a name", "a name has letters, digits, _, - and .")),
    }
}

fn peer_addresses(given: Given, world: &dyn World) -> Result<Vec<Address>, Fault> {
    address::peers(valid::text(given, "\"127.0.0.1:8000\"")?, world)
}
