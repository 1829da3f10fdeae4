//! What names stand for: asks name servers again whenever an answer is not valid any more, remembers the last good one,
//! and says what peers an upstream has by that. Never waits: the master's loop tells it when to look.
//!
//! `message` knows the bytes, `lookup` one question under way, `publish` brings what has changed to the workers. `hosts` asks for names
//! that sessions lead to.

pub mod hosts;
mod lookup;
mod message;
mod publish;

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use culvert_shared::config::{Config, Named, Resolver};
use culvert_shared::members::{MAX_PRESENT, NameState};
use nix::poll::{PollFd, PollTimeout, poll};

use hosts::Hosts;
use lookup::{Lookup, Outcome};
use message::{Kind, Question, Records};

/// How long the first answers are waited for before connections are accepted: a name server on the host or next to it
/// answers within milliseconds, and without one the rest of the configuration should be served soon.
pub const FIRST_ANSWERS: Duration = Duration::from_secs(2);

/// Questions that are under way at once.
const RUNNING_MAX: usize = 32;

/// An answer is believed for this long at least, whatever it says: a second, the least that nginx can say.
const TTL_MIN: u32 = 1;
/// A day: nobody means more (RFC 8767, section 4, recommends a limit of days).
const TTL_MAX: u32 = 86_400;
/// As long as it is believed that there is nothing, so that a name that comes is there soon.
const NOTHING_MAX: u32 = 30;

/// The longest wait after lookups that failed one after the other; the first is a second.
const RETRY_MAX: Duration = Duration::from_secs(10);

/// Hosts of one service that are looked up.
const TARGETS_MAX: usize = 64;

/// One peer that a name stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Where to connect.
    pub address: SocketAddr,
    /// Its share.
    pub weight: u32,
    /// Takes sessions only when no other peer does.
    pub backup: bool,
}

/// Everything that is known of names.
#[derive(Default)]
pub struct Names {
    wanted: Vec<Named>,
    entries: HashMap<Key, Entry>,
    known: HashMap<String, Known>,
    states: HashMap<String, NameState>,
    /// What sessions lead to by its name.
    pub hosts: Hosts,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    question: Question,
    resolver: Resolver,
}

/// One question that is asked again and again.
struct Entry {
    /// The last good answer; empty: there is nothing.
    records: Option<Records>,
    /// A lookup has ended, one way or the other.
    is_heard: bool,
    failures: u32,
    /// The server that answered last.
    server: usize,
    /// When it is asked again.
    due: Instant,
    lookup: Option<Lookup>,
}

/// What a name stood for last.
#[derive(Default)]
struct Known {
    found: Vec<Found>,
    /// Since when the answer is that there is nothing any more.
    empty_since: Option<Instant>,
    hold: Duration,
}

impl Names {
    /// Says which names are of interest from now on.
    pub fn want<'a>(&mut self, configs: impl IntoIterator<Item = &'a Config>, now: Instant) {
        let mut wanted: Vec<Named> = Vec::new();
        for config in configs {
            for named in config.upstreams.iter().flat_map(|upstream| &upstream.names) {
                if !wanted.contains(named) {
                    wanted.push(named.clone());
                }
            }
        }
        self.wanted = wanted;
        self.known
            .retain(|key, _| self.wanted.iter().any(|named| key_of(named) == *key));
        self.keep_needed(now);
        self.start_due(now);
    }

    /// What to wait for.
    pub fn sources(&self) -> impl Iterator<Item = PollFd<'_>> {
        self.lookups()
            .filter_map(Lookup::source)
            .chain(self.hosts.sources())
    }

    /// When to look even if nothing is heard.
    pub fn deadline(&self) -> Option<Instant> {
        let running = self.lookups().map(Lookup::deadline);
        let has_room = self.lookups().count() < RUNNING_MAX;
        let idle = self
            .entries
            .values()
            .filter(|entry| has_room && entry.lookup.is_none());
        let held = self
            .known
            .values()
            .filter_map(|known| Some(known.empty_since? + known.hold));
        let hosts = self.hosts.deadline();
        running
            .chain(idle.map(|entry| entry.due))
            .chain(held)
            .chain(hosts)
            .min()
    }

    /// Whether every name was asked for once, whatever came of it.
    pub fn are_heard(&self) -> bool {
        self.entries.values().all(|entry| entry.is_heard)
    }

    /// Waits until that is so, as long as [`FIRST_ANSWERS`].
    pub fn wait_for_first(&mut self) {
        let until = Instant::now() + FIRST_ANSWERS;
        while !self.are_heard() && Instant::now() < until {
            let next = self.deadline().map_or(until, |at| at.min(until));
            let sleep = next.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            let mut sources: Vec<PollFd> = self.sources().collect();
            // A failure to wait makes the loop busy for these two seconds at most.
            let _ = poll(
                &mut sources,
                PollTimeout::try_from(sleep).unwrap_or(PollTimeout::ZERO),
            );
            drop(sources);
            self.advance(Instant::now());
        }
    }

    /// Reads what has come and asks what is due. Whether the peers of an upstream may have changed.
    pub fn advance(&mut self, now: Instant) -> bool {
        let mut ended = Vec::new();
        for (key, entry) in &mut self.entries {
            let Some(lookup) = &mut entry.lookup else { continue };
            if let Some(outcome) = lookup.advance(now) {
                entry.server = lookup.server();
                entry.lookup = None;
                let failed = matches!(outcome, Outcome::Failed(_));
                entry.settle(key, outcome, now);
                ended.push((key.clone(), failed));
            }
        }
        for (key, failed) in &ended {
            self.tally(key, *failed);
        }
        if !ended.is_empty() {
            self.keep_needed(now);
        }
        self.start_due(now);
        let mut changed = !ended.is_empty();
        for known in self.known.values_mut() {
            if known.empty_since.is_some_and(|since| since + known.hold <= now) {
                *known = Known::default();
                changed = true;
            }
        }
        changed
    }

    /// Nothing is asked any more for upstreams. Sessions that are to be finished may still wait for their hosts.
    pub fn stop(&mut self) {
        *self = Names {
            hosts: std::mem::take(&mut self.hosts),
            ..Names::default()
        };
    }

    /// The peers that a name stands for, sorted; those that it had, where there is no better answer.
    pub fn peers_of(&mut self, named: &Named, now: Instant) -> Vec<Found> {
        let (fresh, is_complete) = self.fresh(named);
        let known = self.known.entry(key_of(named)).or_default();
        known.hold = named.resolver.hold;
        if fresh.is_empty() && !known.found.is_empty() {
            if !is_complete {
                return known.found.clone();
            }
            let since = match known.empty_since {
                Some(since) => since,
                None => {
                    log::warn!(
                        "{named}: there are no addresses any more, the last ones stay for {:?}",
                        known.hold
                    );
                    known.empty_since = Some(now);
                    now
                }
            };
            if now < since + known.hold {
                return known.found.clone();
            }
        }
        known.empty_since = None;
        known.found.clone_from(&fresh);
        fresh
    }

    /// How it is with the looking up of a name.
    pub fn state_of(&self, named: &Named) -> NameState {
        let mut state = self.states.get(&key_of(named)).copied().unwrap_or_default();
        let mut entries = self
            .questions_of(named)
            .into_iter()
            .filter_map(|key| self.entries.get(&key));
        state.failing = entries.any(|entry| entry.failures > 0);
        state
    }

    fn lookups(&self) -> impl Iterator<Item = &Lookup> {
        self.entries.values().filter_map(|entry| entry.lookup.as_ref())
    }

    /// What the last answers say, and whether they say all.
    fn fresh(&self, named: &Named) -> (Vec<Found>, bool) {
        let mut found: Vec<Found> = Vec::new();
        let questions = self.questions_of(named);
        let is_complete = questions
            .iter()
            .all(|key| self.entries.get(key).is_some_and(|entry| entry.is_heard));
        let mut add = |host: &str, port: u16, weight: u32, backup: bool| {
            for key in host_questions(host, &named.resolver) {
                let records = self.entries.get(&key).and_then(|entry| entry.records.as_ref());
                let Some(Records::Addresses(addresses)) = records else {
                    continue;
                };
                for ip in addresses {
                    let address = SocketAddr::new(*ip, port);
                    if found.len() < MAX_PRESENT && !found.iter().any(|peer| peer.address == address) {
                        found.push(Found {
                            address,
                            weight,
                            backup,
                        });
                    }
                }
            }
        };
        let like = &named.like;
        if named.service.is_none() {
            add(&named.host, named.port, like.weight, like.backup);
        } else if let Some(Records::Services(services)) = self.services_of(named) {
            // As nginx does: the best priority makes the peers, all others make backups; where the file says backup, the
            // best priority makes the backups.
            let best = services.iter().map(|service| service.priority).min();
            for service in services.iter().take(TARGETS_MAX) {
                let is_best = Some(service.priority) == best;
                if is_best || !like.backup {
                    // A weight in the file counts more than one of a record; 0 is the least that a record can say.
                    let weight = match like.weight {
                        1 => u32::from(service.weight).max(1),
                        own => own,
                    };
                    add(&service.target, service.port, weight, like.backup || !is_best);
                }
            }
        }
        found.sort_by_key(|peer| (peer.backup, peer.address));
        (found, is_complete)
    }

    fn services_of(&self, named: &Named) -> Option<&Records> {
        let key = service_question(named)?;
        self.entries.get(&key)?.records.as_ref()
    }

    /// What has to be asked for a name, as far as it is known by now.
    fn questions_of(&self, named: &Named) -> Vec<Key> {
        let Some(service) = service_question(named) else {
            return host_questions(&named.host, &named.resolver).collect();
        };
        let mut all = vec![service];
        if let Some(Records::Services(services)) = self.services_of(named) {
            for service in services.iter().take(TARGETS_MAX) {
                all.extend(host_questions(&service.target, &named.resolver));
            }
        }
        all
    }

    /// Has an entry for each question that has to be asked, and for no other. One that is asked in another way than before
    /// begins with the answer that there was.
    fn keep_needed(&mut self, now: Instant) {
        // Hosts of a service are known only once its own entry is there.
        for _ in 0..2 {
            for key in self.needed() {
                if self.entries.contains_key(&key) {
                    continue;
                }
                let mut before = self
                    .entries
                    .iter()
                    .filter(|(other, _)| other.question == key.question);
                let records = before.find_map(|(_, entry)| entry.records.clone());
                let entry = Entry {
                    records,
                    is_heard: false,
                    failures: 0,
                    server: 0,
                    due: now,
                    lookup: None,
                };
                self.entries.insert(key, entry);
            }
        }
        let needed = self.needed();
        self.entries.retain(|key, _| needed.contains(key));
    }

    fn needed(&self) -> HashSet<Key> {
        let names = self.wanted.iter();
        names.flat_map(|named| self.questions_of(named)).collect()
    }

    fn start_due(&mut self, now: Instant) {
        let mut room = RUNNING_MAX.saturating_sub(self.lookups().count());
        for (key, entry) in &mut self.entries {
            if room == 0 {
                return;
            }
            if entry.lookup.is_none() && entry.due <= now {
                entry.lookup = Some(Lookup::begin(
                    key.question.clone(),
                    &key.resolver,
                    entry.server,
                    now,
                ));
                room -= 1;
            }
        }
    }

    fn tally(&mut self, key: &Key, failed: bool) {
        let unix_ms = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |time| time.as_millis() as u64);
        let mut concerned: Vec<String> = Vec::new();
        for named in &self.wanted {
            if self.questions_of(named).contains(key) && !concerned.contains(&key_of(named)) {
                concerned.push(key_of(named));
            }
        }
        for name in concerned {
            let state = self.states.entry(name).or_default();
            state.lookups += 1;
            state.failures += u64::from(failed);
            state.last_lookup_unix_ms = unix_ms;
        }
    }
}

impl Entry {
    fn settle(&mut self, key: &Key, outcome: Outcome, now: Instant) {
        let Question { name, kind } = &key.question;
        self.is_heard = true;
        let seconds = |ttl: u32| Duration::from_secs(ttl.into());
        let valid = key.resolver.valid;
        match outcome {
            Outcome::Failed(why) => {
                let wait = Duration::from_secs(1 << self.failures.min(8)).min(RETRY_MAX);
                if self.failures == 0 {
                    let kept = match self.records {
                        Some(_) => "the last answer stays",
                        None => "there is no earlier answer",
                    };
                    log::warn!("failed to look up {name} ({kind}), {kept}, trying again: {why}");
                }
                self.failures = self.failures.saturating_add(1);
                self.due = now + wait;
                return;
            }
            Outcome::Found(records, ttl) => {
                self.records = Some(records);
                self.due = now + valid.unwrap_or(seconds(ttl.clamp(TTL_MIN, TTL_MAX)));
            }
            Outcome::Nothing(ttl) => {
                self.records = Some(Records::Addresses(Vec::new()));
                let ttl = ttl.unwrap_or(TTL_MIN).clamp(TTL_MIN, NOTHING_MAX);
                self.due = now + valid.unwrap_or(seconds(ttl));
            }
        }
        if self.failures > 0 {
            log::info!(
                "{name} ({kind}) is answered again, after {} failed lookups",
                self.failures
            );
            self.failures = 0;
        }
    }
}

/// Names that ask the same of the same servers, and make the same of it, are one.
fn key_of(named: &Named) -> String {
    format!(
        "{named} {} {} {:?}",
        named.like.weight, named.like.backup, named.resolver
    )
}

fn service_question(named: &Named) -> Option<Key> {
    let service = named.service.as_ref()?;
    // As nginx does: a plain name is that of a service over TCP.
    let name = match service.contains('.') {
        true => format!("{service}.{}", named.host),
        false => format!("_{service}._tcp.{}", named.host),
    };
    Some(Key {
        question: Question {
            name: name.to_ascii_lowercase(),
            kind: Kind::Srv,
        },
        resolver: named.resolver.clone(),
    })
}

fn host_questions<'a>(host: &'a str, resolver: &'a Resolver) -> impl Iterator<Item = Key> + use<'a> {
    let kinds = [(resolver.ipv4, Kind::A), (resolver.ipv6, Kind::Aaaa)];
    kinds
        .into_iter()
        .filter(|(wanted, _)| *wanted)
        .map(|(_, kind)| Key {
            question: Question {
                name: host.to_owned(),
                kind,
            },
            resolver: resolver.clone(),
        })
}

#[cfg(test)]
#[path = "names/tests.rs"]
mod tests;
