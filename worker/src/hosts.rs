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

/// Of those, how many are forgotten at once where there is no room for another.
const FORGOTTEN: usize = KNOWN_MAX / 16;

/// Hosts that are asked for at once.
const ASKED_MAX: usize = 1024;

/// Sessions that go on in one turn of the event loop after their host was answered for, so that one name that
/// thousands have waited for does not make the others wait.
const TURN_BUDGET: usize = 64;

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
    /// Who has waited and may go on, with what was answered.
    ready: VecDeque<(Token, Rc<(Question, Answer)>)>,
    /// Which of a host's addresses comes first; another one each time.
    turn: usize,
}

struct Known {
    outcome: Result<Vec<IpAddr>, Rc<str>>,
    until_ms: u64,
    /// When a session last led there.
    used_ms: u64,
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
        if let Some(known) = self.known.get_mut(question) {
            known.used_ms = now_ms;
            if now_ms < known.until_ms {
                return match &known.outcome {
                    Ok(addresses) => Look::Addresses(rotated(addresses, &mut self.turn)),
                    Err(why) => Look::Nothing(Rc::clone(why)),
                };
            }
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
            // Whoever makes names up need not wait for an answer.
            self.asked.retain(|_, asked| !asked.waiting.is_empty());
        }
        if self.asked.len() >= ASKED_MAX {
            // What made-up names take is not to be missing for a host that is known.
            return match self.known.get(question).map(|known| &known.outcome) {
                Some(Ok(addresses)) => Look::Addresses(rotated(addresses, &mut self.turn)),
                _ => Look::Full,
            };
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

    /// The answer to a question; [`Hosts::ready`] says who has waited for it.
    pub fn take(&mut self, question: Question, answer: Answer, now_ms: u64) {
        let waiting = self.asked.remove(&question).map(|asked| asked.waiting);
        let (outcome, valid_ms) = match &answer {
            Answer::Addresses { addresses, valid_ms } => (Ok(addresses.clone()), *valid_ms),
            Answer::Nothing { why, valid_ms } => (Err(Rc::from(why.as_str())), *valid_ms),
        };
        if valid_ms > 0 {
            self.make_room();
            let known = Known {
                outcome,
                until_ms: now_ms.saturating_add(valid_ms),
                used_ms: now_ms,
            };
            self.known.insert(question.clone(), known);
        }
        let said = Rc::new((question, answer));
        let waiting = waiting.into_iter().flatten();
        self.ready.extend(waiting.map(|token| (token, Rc::clone(&said))));
    }

    /// The next ones who may go on, as many as one turn is for.
    pub fn ready(&mut self) -> Vec<(Token, Rc<(Question, Answer)>)> {
        let count = self.ready.len().min(TURN_BUDGET);
        self.ready.drain(..count).collect()
    }

    /// Whether there are more of them.
    pub fn has_ready(&self) -> bool {
        !self.ready.is_empty()
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

    /// If too much is remembered, forgets what leads nowhere first, and then what nobody has asked for for longest: names
    /// that somebody makes up must not drive out those that are served.
    fn make_room(&mut self) {
        if self.known.len() < KNOWN_MAX {
            return;
        }
        let order = |known: &Known| (known.outcome.is_ok(), known.used_ms);
        let mut orders: Vec<_> = self.known.values().map(order).collect();
        let (_, last, _) = orders.select_nth_unstable(FORGOTTEN - 1);
        let last = *last;
        let mut left = FORGOTTEN;
        self.known.retain(|_, known| {
            let goes = left > 0 && order(known) <= last;
            left -= usize::from(goes);
            !goes
        });
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
        hosts.take(question(1), found(&[1], 500), 100);
        let told = hosts.ready().into_iter().map(|(token, _)| token);
        assert_eq!(HashSet::from_iter(told), HashSet::from([one, two]));
        assert!(!hosts.has_ready());
        first(hosts.look(&question(1), late, 599, PATIENCE_MS));
        assert_eq!(hosts.look(&question(1), late, 600, PATIENCE_MS), Look::Asked);
        assert_eq!(hosts.untold(9), [question(1)]);
    }

    #[test]
    fn each_session_begins_with_another_address_and_tries_each_once() {
        let mut hosts = Hosts::new(7);
        let [token] = tokens();
        hosts.take(question(1), found(&[1, 2, 3], 500), 0);
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
        hosts.take(question(1), nothing(10), 0);
        assert_eq!(
            hosts.look(&question(1), token, 9, PATIENCE_MS),
            Look::Nothing("so".into())
        );
        hosts.take(question(2), nothing(0), 0);
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
        // A host that was known is served as before.
        hosts.take(question(0), found(&[1], 10), 0);
        hosts.look(&question(ASKED_MAX + 1), token, 5, PATIENCE_MS);
        assert!(matches!(
            hosts.look(&question(0), token, 20, PATIENCE_MS),
            Look::Addresses(_)
        ));
        // Those that nobody waits for make room.
        (0..=ASKED_MAX + 1).for_each(|n| hosts.leave(&question(n), token));
        let late = hosts.look(&question(ASKED_MAX), token, 0, PATIENCE_MS);
        assert_eq!(late, Look::Asked);
        assert_eq!(hosts.asked.len(), 1);
    }

    #[test]
    fn names_that_somebody_makes_up_do_not_drive_out_those_that_are_used() {
        let mut hosts = Hosts::new(0);
        let [token] = tokens();
        let nothing = || Answer::Nothing {
            why: "so".to_owned(),
            valid_ms: 1_000_000,
        };
        hosts.take(question(0), found(&[1], 10), 0);
        for n in 1..3 * KNOWN_MAX {
            let answer = if n % 2 == 0 {
                nothing()
            } else {
                found(&[2], 1_000_000)
            };
            hosts.take(question(n), answer, n as u64);
            // Its time is over again and again: it is asked for anew.
            hosts.look(&question(0), token, n as u64, PATIENCE_MS);
            assert!(hosts.known.len() <= KNOWN_MAX);
        }
        assert!(hosts.known.contains_key(&question(0)));
        let of_nothing = hosts.known.values().filter(|known| known.outcome.is_err());
        assert!(of_nothing.count() <= KNOWN_MAX / 16, "they go first");
    }

    #[test]
    fn of_thousands_who_waited_for_one_name_some_go_on_in_each_turn() {
        let mut hosts = Hosts::new(0);
        for token in tokens::<200>() {
            hosts.look(&question(1), token, 0, PATIENCE_MS);
        }
        hosts.take(question(1), found(&[1], 0), 100);
        let mut turns = 0;
        let mut gone_on = HashSet::new();
        while hosts.has_ready() {
            let some = hosts.ready();
            assert!(some.len() <= TURN_BUDGET);
            gone_on.extend(some.into_iter().map(|(token, _)| token));
            turns += 1;
        }
        assert_eq!((turns, gone_on.len()), (4, 200));
    }
}
