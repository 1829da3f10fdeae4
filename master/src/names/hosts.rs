//! Host names that sessions lead to: asked for when a worker asks, and remembered as long as the answer says, so that all
//! workers, and those of the next generation, share one question. Never waits: the master's loop tells it when to look.
//!
//! Such names come from clients, any number of them. So what is open at once and what is remembered are bounded, and these
//! lookups take no room from those of upstreams.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use culvert_shared::config::Resolver;
use culvert_shared::counters::{Board, HostCounters};
use culvert_shared::hosts::{ADDRESSES_MAX, Answer, Question};
use culvert_shared::ids::Owner;
use nix::poll::PollFd;

use super::lookup::{Lookup, Outcome};
use super::message::Records;
use super::{NOTHING_MAX, TTL_MAX, TTL_MIN, host_questions};

/// Hosts that are asked for at once, those included that wait for their turn: a burst of clients after a start, and a
/// bound for somebody who makes names up.
const OPEN_MAX: usize = 1024;

/// Hosts of those whose lookups are under way. A name server within reach answers in milliseconds, so more of them
/// would only be more to look at; each takes a socket for each kind of address.
pub const RUNNING_MAX: usize = 256;

/// How long a host that is asked for may keep others from their turn.
const CROWDED: Duration = Duration::from_secs(5);

/// Hosts that are remembered.
const KNOWN_MAX: usize = 4096;

/// Of those, how many are forgotten at once where there is no room for another.
const FORGOTTEN: usize = KNOWN_MAX / 16;

/// How long the addresses of one kind wait for those of the other. Some name servers never answer for IPv6, and the
/// session is better off without than after `resolver_timeout`.
const OTHER_KIND: Duration = Duration::from_secs(1);

/// How long those who ask wait for a new answer where there is an old one: name servers that are away take down no host
/// that was known (RFC 8767, section 5, has 1.8 seconds).
const STALE_AFTER: Duration = Duration::from_secs(2);

/// How long an old answer counts that is given while a new one is waited for.
const STALE_MS: u64 = 1000;

/// Resolvers whose best server is remembered: those of some generations.
const SERVERS_MAX: usize = 64;

/// Everything that is known of such hosts.
#[derive(Default)]
pub struct Hosts {
    hosts: HashMap<Key, Host>,
    /// Those that are open, in the order in which they were asked for; the first of them are under way.
    open: VecDeque<Key>,
    /// The server of each resolver that answered last.
    servers: HashMap<Arc<Resolver>, usize>,
    answers: Vec<(Owner, Question, Answer)>,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    host: String,
    resolver: Arc<Resolver>,
}

/// ```text
///                ┌──────────── asked when it is not valid any more ◄──┐
///                ▼                                                   │
/// asked ──────► Open ──all is answered, or time is up──────────────► Known ──no room──► gone
/// ```
enum Host {
    Open(Open),
    Known(Known),
}

struct Open {
    /// Who is to hear of it, and by which index of the resolver.
    askers: Vec<(Owner, u16)>,
    /// Empty until it is its turn.
    kinds: Vec<Asked>,
    /// When that was.
    begun_at: Option<Instant>,
    /// When addresses of one kind were there.
    found_at: Option<Instant>,
    /// The addresses that it had.
    before: Option<Vec<IpAddr>>,
    /// They are an old answer already.
    was_stale: bool,
    /// When they are given to those who ask.
    stale_at: Instant,
    until: Instant,
}

enum Asked {
    Running(Box<Lookup>),
    Ended(Outcome),
}

#[derive(Clone)]
struct Known {
    outcome: Result<Vec<IpAddr>, String>,
    until: Instant,
    /// The last lookup failed: the addresses are those of one before.
    is_stale: bool,
    /// When a worker last asked for it.
    used: Instant,
}

impl Hosts {
    /// A worker asks. The answer comes with [`Hosts::answers`], most often later.
    pub fn ask(
        &mut self,
        owner: Owner,
        question: Question,
        resolver: &Arc<Resolver>,
        now: Instant,
        counters: &HostCounters,
    ) {
        let key = Key {
            host: question.host.clone(),
            resolver: Arc::clone(resolver),
        };
        let (before, was_stale) = match self.hosts.get_mut(&key) {
            Some(Host::Known(known)) if now < known.until => {
                known.used = now;
                let answer = known.answer(now);
                return self.answers.push((owner, question, answer));
            }
            Some(Host::Open(open)) => {
                let asker = (owner, question.resolver);
                match open.stale(now) {
                    Some(answer) => self.answers.push((owner, question, answer)),
                    None if open.askers.contains(&asker) => {}
                    None => open.askers.push(asker),
                }
                return;
            }
            Some(Host::Known(known)) => (known.outcome.clone().ok(), known.is_stale),
            None => (None, false),
        };
        if self.open.len() >= OPEN_MAX {
            let answer = match before {
                Some(addresses) => stale(addresses),
                None => {
                    Board::add(&counters.refused, 1);
                    let why = format!("{OPEN_MAX} names are being looked up already");
                    Answer::Nothing { why, valid_ms: 0 }
                }
            };
            return self.answers.push((owner, question, answer));
        }
        self.make_room();
        let open = Open {
            askers: vec![(owner, question.resolver)],
            kinds: Vec::new(),
            begun_at: None,
            found_at: None,
            before,
            was_stale,
            stale_at: now + STALE_AFTER,
            until: now + resolver.timeout,
        };
        self.hosts.insert(key.clone(), Host::Open(open));
        if self.open.len() < RUNNING_MAX {
            self.begin(&key, now, counters);
        }
        self.open.push_back(key);
    }

    /// A worker that asks by a resolver that nobody knows: it is of a generation before the binary that runs now.
    pub fn refuse(&mut self, owner: Owner, question: Question) {
        let why = "the resolver of an earlier configuration is not known any more".to_owned();
        self.answers
            .push((owner, question, Answer::Nothing { why, valid_ms: 0 }));
    }

    /// A worker is gone. What it has asked for is asked on: whoever takes its sessions over wants to know the same.
    pub fn forget(&mut self, owner: Owner) {
        for host in self.hosts.values_mut() {
            if let Host::Open(open) = host {
                open.askers.retain(|(asker, _)| *asker != owner);
            }
        }
        self.answers.retain(|(asker, ..)| *asker != owner);
    }

    /// What workers are to be told, and have not been.
    pub fn answers(&mut self) -> Vec<(Owner, Question, Answer)> {
        std::mem::take(&mut self.answers)
    }

    /// What to wait for.
    pub fn sources(&self) -> impl Iterator<Item = PollFd<'_>> {
        self.running().flat_map(Open::lookups).filter_map(Lookup::source)
    }

    /// When to look even if nothing is heard.
    pub fn deadline(&self) -> Option<Instant> {
        let is_crowded = self.is_crowded();
        let opens = self.open.iter().filter_map(|key| self.open_of(key));
        opens.map(|open| open.deadline(is_crowded)).min()
    }

    /// Reads what has come, and begins what has room.
    pub fn advance(&mut self, now: Instant, counters: &HostCounters) {
        let mut ended = 0;
        let is_crowded = self.is_crowded();
        for key in std::mem::take(&mut self.open) {
            let Some(Host::Open(open)) = self.hosts.get_mut(&key) else {
                continue;
            };
            for asked in &mut open.kinds {
                let Asked::Running(lookup) = asked else { continue };
                if let Some(outcome) = lookup.advance(now) {
                    if self.servers.len() >= SERVERS_MAX && !self.servers.contains_key(&key.resolver) {
                        self.servers.clear();
                    }
                    self.servers.insert(Arc::clone(&key.resolver), lookup.server());
                    if matches!(outcome, Outcome::Found(..)) {
                        open.found_at.get_or_insert(now);
                    }
                    *asked = Asked::Ended(outcome);
                }
            }
            let mut tell = |askers: Vec<(Owner, u16)>, answer: Answer| {
                self.answers.extend(askers.into_iter().map(|(owner, resolver)| {
                    let host = key.host.clone();
                    (owner, Question { resolver, host }, answer.clone())
                }));
            };
            if open.is_running() && now < open.patience(is_crowded) {
                if let Some(answer) = open.stale(now) {
                    tell(std::mem::take(&mut open.askers), answer);
                }
                self.open.push_back(key);
                continue;
            }
            let known = open.settle(&key, now, counters);
            tell(std::mem::take(&mut open.askers), known.answer(now));
            self.hosts.insert(key, Host::Known(known));
            ended += 1;
        }
        // Those behind them in the line, whose turn it is now.
        let next: Vec<Key> = match ended {
            0 => return,
            _ => self
                .open
                .iter()
                .take(RUNNING_MAX)
                .rev()
                .take(ended)
                .cloned()
                .collect(),
        };
        for key in next.iter().rev() {
            self.begin(key, now, counters);
        }
    }

    /// Begins to ask for a host, unless that was done.
    fn begin(&mut self, key: &Key, now: Instant, counters: &HostCounters) {
        let Some(Host::Open(open)) = self.hosts.get_mut(key) else {
            return;
        };
        if !open.kinds.is_empty() {
            return;
        }
        counters.lookups.fetch_add(1, Relaxed);
        open.begun_at = Some(now);
        let server = self.servers.get(&key.resolver).copied().unwrap_or(0);
        open.kinds = host_questions(&key.host, &key.resolver)
            .map(|asked| Lookup::begin(asked.question, &key.resolver, server, now))
            .map(|lookup| Asked::Running(Box::new(lookup)))
            .collect();
    }

    /// Whether some wait for their turn.
    fn is_crowded(&self) -> bool {
        self.open.len() > RUNNING_MAX
    }

    fn open_of(&self, key: &Key) -> Option<&Open> {
        match self.hosts.get(key)? {
            Host::Open(open) => Some(open),
            Host::Known(_) => None,
        }
    }

    fn running(&self) -> impl Iterator<Item = &Open> {
        let first = self.open.iter().take(RUNNING_MAX);
        first.filter_map(|key| self.open_of(key))
    }

    /// If too much is remembered, forgets what leads nowhere first, and then what nobody has asked for for longest: names
    /// that somebody makes up must not drive out those that are served, nor their old addresses.
    fn make_room(&mut self) {
        if self.hosts.len() < KNOWN_MAX + self.open.len() {
            return;
        }
        let order = |host: &Host| match host {
            Host::Known(known) => Some((known.outcome.is_ok(), known.used)),
            Host::Open(_) => None,
        };
        let mut orders: Vec<_> = self.hosts.values().filter_map(order).collect();
        let mut left = FORGOTTEN.min(orders.len());
        let Some(last) = left.checked_sub(1) else { return };
        let last = *orders.select_nth_unstable(last).1;
        self.hosts.retain(|_, host| {
            let goes = left > 0 && order(host).is_some_and(|order| order <= last);
            left -= usize::from(goes);
            !goes
        });
    }
}

impl Open {
    fn lookups(&self) -> impl Iterator<Item = &Lookup> {
        self.kinds.iter().filter_map(|asked| match asked {
            Asked::Running(lookup) => Some(&**lookup),
            Asked::Ended(_) => None,
        })
    }

    /// Whether there is something to wait for.
    fn is_running(&self) -> bool {
        self.kinds.is_empty() || self.lookups().next().is_some()
    }

    /// Until when that is waited for. `is_crowded`: others wait for their turn.
    fn patience(&self, is_crowded: bool) -> Instant {
        let other = self.found_at.map(|at| at + OTHER_KIND);
        let turn = self.begun_at.filter(|_| is_crowded).map(|at| at + CROWDED);
        other.into_iter().chain(turn).fold(self.until, Instant::min)
    }

    fn deadline(&self, is_crowded: bool) -> Instant {
        let lookups = self.lookups().map(Lookup::deadline);
        let stale = self.before.is_some() && !self.askers.is_empty();
        lookups
            .chain(stale.then_some(self.stale_at))
            .fold(self.patience(is_crowded), Instant::min)
    }

    /// The old answer, if it is time for it.
    fn stale(&self, now: Instant) -> Option<Answer> {
        let before = self.before.as_ref().filter(|_| self.stale_at <= now)?;
        Some(stale(before.clone()))
    }

    /// What is known from now on.
    fn settle(&mut self, key: &Key, now: Instant, counters: &HostCounters) -> Known {
        let summary = sum_up(self, &key.resolver, now);
        if summary.outcome.is_err() {
            counters.failed.fetch_add(1, Relaxed);
        }
        match (&summary.outcome, self.before.take()) {
            (Err(why), Some(before)) if summary.is_failure => {
                if !self.was_stale {
                    log::warn!("failed to look up {}, its last addresses stay: {why}", key.host);
                }
                return Known {
                    outcome: Ok(before),
                    until: now + Duration::from_secs(NOTHING_MAX.into()),
                    is_stale: true,
                    used: now,
                };
            }
            _ if self.was_stale => log::info!("{} is answered again", key.host),
            _ => {}
        }
        Known {
            outcome: summary.outcome,
            until: now + summary.valid,
            is_stale: false,
            used: now,
        }
    }
}

fn stale(addresses: Vec<IpAddr>) -> Answer {
    let valid_ms = STALE_MS;
    Answer::Addresses { addresses, valid_ms }
}

impl Known {
    fn answer(&self, now: Instant) -> Answer {
        let valid_ms = self.until.saturating_duration_since(now).as_millis() as u64;
        match &self.outcome {
            Ok(addresses) => Answer::Addresses {
                addresses: addresses.clone(),
                valid_ms,
            },
            Err(why) => Answer::Nothing {
                why: why.clone(),
                valid_ms,
            },
        }
    }
}

/// What came of the lookups of a host.
struct Summary {
    outcome: Result<Vec<IpAddr>, String>,
    /// How long that is to be believed.
    valid: Duration,
    /// Nobody could say.
    is_failure: bool,
}

fn sum_up(open: &Open, resolver: &Resolver, now: Instant) -> Summary {
    let seconds = |ttl: u32| Duration::from_secs(ttl.into());
    let (mut addresses, mut ttl) = (Vec::new(), TTL_MAX);
    let mut nothing_ttl = NOTHING_MAX;
    let mut trouble = None;
    let mut is_whole = true;
    for asked in &open.kinds {
        match asked {
            Asked::Ended(Outcome::Found(Records::Addresses(found), found_ttl)) => {
                addresses.extend_from_slice(found);
                ttl = ttl.min(*found_ttl);
            }
            Asked::Ended(Outcome::Found(Records::Services(_), _)) => {}
            Asked::Ended(Outcome::Nothing(ttl)) => nothing_ttl = nothing_ttl.min(ttl.unwrap_or(TTL_MIN)),
            Asked::Ended(Outcome::Failed(why)) => {
                trouble.get_or_insert(why.clone());
                is_whole = false;
            }
            Asked::Running(_) => is_whole = false,
        }
    }
    if !addresses.is_empty() {
        addresses.truncate(ADDRESSES_MAX);
        let valid = resolver.valid.unwrap_or(seconds(ttl.clamp(TTL_MIN, TTL_MAX)));
        // The other kind may be had the next time.
        let limit = if is_whole { valid } else { seconds(NOTHING_MAX) };
        return Summary {
            outcome: Ok(addresses),
            valid: valid.min(limit),
            is_failure: false,
        };
    }
    let why = match trouble {
        Some(why) => why,
        None if open.kinds.is_empty() => "too many other names are being looked up".to_owned(),
        None if !is_whole && open.until <= now => format!("no answer within {:?}", resolver.timeout),
        None if !is_whole => format!("no answer within {CROWDED:?}, and other names wait"),
        None => {
            let why = "there is no such host, or it has no address".to_owned();
            return Summary {
                outcome: Err(why),
                valid: seconds(nothing_ttl.max(TTL_MIN)),
                is_failure: false,
            };
        }
    };
    // nginx remembers no failure; a second of it keeps an impatient client from becoming a flood of questions.
    Summary {
        outcome: Err(why),
        valid: seconds(TTL_MIN),
        is_failure: true,
    }
}

#[cfg(test)]
#[path = "hosts_tests.rs"]
mod tests;
