//! Host names that sessions lead to, as far as this worker knows them: what was answered and still counts, what is asked
//! and who waits for it. Pure: time comes in, what is to be asked comes out; the master asks (`naming`).
//!
//! The names come from clients, so whatever is held of them is bounded.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;

use culvert_shared::hosts::{Answer, Question};

use crate::table::Token;

/// Hosts that are remembered. With the most addresses and the longest names, 6 MiB.
const KNOWN_MAX: usize = 4096;

/// Hosts that are asked for at once.
const ASKED_MAX: usize = 1024;

/// The host that a session leads to by its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// Its name, and who is asked.
    pub question: Question,
    /// The port of all its addresses.
    pub port: u16,
    /// Its addresses that were not tried yet, in their order.
    pub left: VecDeque<IpAddr>,
    /// Attempts to connect to it.
    pub attempts: usize,
}

impl Host {
    /// One of which nothing is known yet.
    pub fn new(question: Question, port: u16) -> Host {
        Host {
            question,
            port,
            left: VecDeque::new(),
            attempts: 0,
        }
    }

    /// The next address.
    pub fn next(&mut self) -> Option<SocketAddr> {
        let ip = self.left.pop_front()?;
        self.attempts += 1;
        Some(SocketAddr::new(ip, self.port))
    }
}

/// What is known of a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Look {
    /// Its addresses, in the order in which this session is to try them.
    Addresses(VecDeque<IpAddr>),
    /// It has none, or nobody can say; why.
    Nothing(Rc<str>),
    /// It is asked for: the session is named when the answer comes.
    Asked,
    /// Too many are.
    Full,
}

/// All that is known of hosts.
#[derive(Default)]
pub struct Hosts {
    known: HashMap<Question, Known>,
    asked: HashMap<Question, Asked>,
    /// What the master was not told yet.
    untold: VecDeque<Question>,
    /// Which of a host's addresses comes first; another one each time.
    turn: usize,
}

struct Known {
    outcome: Result<Vec<IpAddr>, Rc<str>>,
    until_ms: u64,
}

struct Asked {
    waiting: HashSet<Token>,
    /// When the master has given it up for certain, if it has heard of it.
    until_ms: u64,
}

impl Hosts {
    /// A worker's own; `random` is any number, so that not all workers begin with the same address.
    pub fn new(random: u64) -> Hosts {
        Hosts {
            turn: random as usize,
            ..Hosts::default()
        }
    }

    /// What is known for a session; if nothing is, it waits from now on. `patience_ms`: how long the master may take.
    pub fn look(&mut self, question: &Question, token: Token, now_ms: u64, patience_ms: u64) -> Look {
        if let Some(known) = self.known.get(question).filter(|known| now_ms < known.until_ms) {
            return match &known.outcome {
                Ok(addresses) => Look::Addresses(rotated(addresses, &mut self.turn)),
                Err(why) => Look::Nothing(Rc::clone(why)),
            };
        }
        let until_ms = now_ms + patience_ms;
        if let Some(asked) = self.asked.get_mut(question) {
            asked.waiting.insert(token);
            // The answer was lost with a master that has become another program.
            if asked.until_ms <= now_ms {
                asked.until_ms = until_ms;
                self.untold.push_back(question.clone());
            }
            return Look::Asked;
        }
        if self.asked.len() >= ASKED_MAX {
            self.asked
                .retain(|_, asked| now_ms < asked.until_ms || !asked.waiting.is_empty());
        }
        if self.asked.len() >= ASKED_MAX {
            return Look::Full;
        }
        let waiting = HashSet::from([token]);
        self.asked.insert(question.clone(), Asked { waiting, until_ms });
        self.untold.push_back(question.clone());
        Look::Asked
    }

    /// The session waits no more. Its question stays asked: the next one will want to know.
    pub fn leave(&mut self, question: &Question, token: Token) {
        if let Some(asked) = self.asked.get_mut(question) {
            asked.waiting.remove(&token);
        }
    }

    /// The answer to a question; says who has waited for it.
    pub fn take(&mut self, question: Question, answer: &Answer, now_ms: u64) -> Vec<Token> {
        let waiting = self.asked.remove(&question).map(|asked| asked.waiting);
        let (outcome, valid_ms) = match answer {
            Answer::Addresses { addresses, valid_ms } => (Ok(addresses.clone()), *valid_ms),
            Answer::Nothing { why, valid_ms } => (Err(Rc::from(why.as_str())), *valid_ms),
        };
        if valid_ms > 0 {
            self.make_room(now_ms);
            let until_ms = now_ms.saturating_add(valid_ms);
            self.known.insert(question, Known { outcome, until_ms });
        }
        waiting.into_iter().flatten().collect()
    }

    /// The addresses of an answer in the order in which the next session is to try them.
    pub fn order(&mut self, addresses: &[IpAddr]) -> VecDeque<IpAddr> {
        rotated(addresses, &mut self.turn)
    }

    /// Nobody is left who could be asked; says who waits in vain.
    pub fn give_up(&mut self) -> Vec<Token> {
        self.untold.clear();
        let asked = std::mem::take(&mut self.asked);
        asked.into_values().flat_map(|asked| asked.waiting).collect()
    }

    /// The first questions that the master was not told yet.
    pub fn untold(&self, most: usize) -> Vec<Question> {
        self.untold.iter().take(most).cloned().collect()
    }

    /// It was told so many.
    pub fn told(&mut self, count: usize) {
        self.untold.drain(..count.min(self.untold.len()));
    }

    /// Forgets what counts no more, or else what would so first, if too much is remembered.
    fn make_room(&mut self, now_ms: u64) {
        if self.known.len() < KNOWN_MAX {
            return;
        }
        self.known.retain(|_, known| now_ms < known.until_ms);
        if self.known.len() < KNOWN_MAX {
            return;
        }
        let first = self.known.iter().min_by_key(|(_, known)| known.until_ms);
        if let Some(question) = first.map(|(question, _)| question.clone()) {
            self.known.remove(&question);
        }
    }
}

fn rotated(addresses: &[IpAddr], turn: &mut usize) -> VecDeque<IpAddr> {
    let mut order = VecDeque::from(addresses.to_vec());
    *turn = turn.wrapping_add(1);
    order.rotate_left(*turn % addresses.len().max(1));
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::Table;

    const PATIENCE_MS: u64 = 1_000;

    fn question(n: usize) -> Question {
        let host = format!("h{n}.test");
        Question { resolver: 0, host }
    }

    fn tokens<const N: usize>() -> [Token; N] {
        let mut table: Table<()> = Table::new();
        [(); N].map(|()| table.reserve())
    }

    fn found(ips: &[u8], valid_ms: u64) -> Answer {
        let addresses = ips.iter().map(|last| IpAddr::from([10, 0, 0, *last])).collect();
        Answer::Addresses { addresses, valid_ms }
    }

    fn first(look: Look) -> IpAddr {
        match look {
            Look::Addresses(order) => order[0],
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn one_question_serves_all_who_wait_and_whoever_comes_while_the_answer_counts() {
        let mut hosts = Hosts::new(0);
        let [one, two, gone, late] = tokens();
        for token in [one, two, gone] {
            assert_eq!(hosts.look(&question(1), token, 0, PATIENCE_MS), Look::Asked);
        }
        assert_eq!(hosts.untold(9), [question(1)]);
        hosts.told(1);
        assert_eq!(hosts.untold(9), []);
        hosts.leave(&question(1), gone);
        let told = hosts.take(question(1), &found(&[1], 500), 100);
        assert_eq!(HashSet::from_iter(told), HashSet::from([one, two]));
        first(hosts.look(&question(1), late, 599, PATIENCE_MS));
        assert_eq!(hosts.look(&question(1), late, 600, PATIENCE_MS), Look::Asked);
        assert_eq!(hosts.untold(9), [question(1)]);
    }

    #[test]
    fn each_session_begins_with_another_address_and_tries_each_once() {
        let mut hosts = Hosts::new(7);
        let [token] = tokens();
        hosts.take(question(1), &found(&[1, 2, 3], 500), 0);
        let mut begun: Vec<IpAddr> = (0..6)
            .map(|_| first(hosts.look(&question(1), token, 1, PATIENCE_MS)))
            .collect();
        assert!(begun.windows(2).all(|pair| pair[0] != pair[1]), "{begun:?}");
        begun.sort();
        begun.dedup();
        assert_eq!(begun.len(), 3);
        let Look::Addresses(left) = hosts.look(&question(1), token, 1, PATIENCE_MS) else {
            panic!("it is known");
        };
        let mut host = Host::new(question(1), 443);
        host.left = left;
        let mut tried: Vec<SocketAddr> = std::iter::from_fn(|| host.next()).collect();
        tried.sort();
        tried.dedup();
        assert_eq!((tried.len(), host.attempts, tried[0].port()), (3, 3, 443));
    }

    #[test]
    fn that_there_is_nothing_is_remembered_only_if_it_is_to_count() {
        let mut hosts = Hosts::new(0);
        let [token] = tokens();
        let nothing = |valid_ms| Answer::Nothing {
            why: "so".to_owned(),
            valid_ms,
        };
        hosts.take(question(1), &nothing(10), 0);
        assert_eq!(
            hosts.look(&question(1), token, 9, PATIENCE_MS),
            Look::Nothing("so".into())
        );
        hosts.take(question(2), &nothing(0), 0);
        assert_eq!(hosts.look(&question(2), token, 0, PATIENCE_MS), Look::Asked);
    }

    #[test]
    fn an_answer_that_was_lost_is_asked_for_again() {
        let mut hosts = Hosts::new(0);
        let [one, two] = tokens();
        hosts.look(&question(1), one, 0, PATIENCE_MS);
        hosts.told(1);
        hosts.look(&question(1), two, PATIENCE_MS - 1, PATIENCE_MS);
        assert_eq!(hosts.untold(9), []);
        hosts.look(&question(1), two, PATIENCE_MS, PATIENCE_MS);
        assert_eq!(hosts.untold(9), [question(1)]);
    }

    #[test]
    fn what_is_asked_and_what_is_remembered_is_bounded() {
        let mut hosts = Hosts::new(0);
        let [token] = tokens();
        for n in 0..ASKED_MAX {
            assert_eq!(hosts.look(&question(n), token, 0, PATIENCE_MS), Look::Asked);
        }
        assert_eq!(
            hosts.look(&question(ASKED_MAX), token, 0, PATIENCE_MS),
            Look::Full
        );
        // A session more for a host that is asked for costs nothing.
        assert_eq!(hosts.look(&question(0), token, 0, PATIENCE_MS), Look::Asked);
        // Those that nobody waits for and that will not be answered any more make room.
        (0..ASKED_MAX).for_each(|n| hosts.leave(&question(n), token));
        let late = hosts.look(&question(ASKED_MAX), token, PATIENCE_MS, PATIENCE_MS);
        assert_eq!(late, Look::Asked);
        assert_eq!(hosts.asked.len(), 1);

        for n in 0..=KNOWN_MAX {
            let valid_ms = if n == 5 { 100 } else { 200 };
            hosts.take(question(n), &found(&[1], valid_ms), 0);
        }
        assert_eq!(hosts.known.len(), KNOWN_MAX);
        assert!(
            !hosts.known.contains_key(&question(5)),
            "it would have gone first"
        );
    }
}
