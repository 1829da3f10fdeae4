//! `balance`: how a group chooses among its peers, in nginx's words, both ways.

use std::collections::BTreeMap;

use super::diagnostic::Fault;
use super::template::{self, name_of};
use super::valid::{self, Given};
use super::{Part, Template, VariableMap};

const REMEDY: &str = "allowed: \"round_robin\", \"least_conn\", \"least_time\", \"random\", \"random two\" (or \"random two \
                      least_time\"), \"source\", \"hash $remote_addr\", \"hash $remote_addr consistent\"";

/// How an upstream group chooses a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Balance {
    /// Smooth weighted round robin (nginx's default).
    RoundRobin,
    /// The fewest sessions for its weight.
    LeastConn,
    /// By a hash of the key.
    Hash {
        /// What is hashed.
        key: Template,
        /// On a ring (ketama), so that a peer more or less moves few keys.
        consistent: bool,
    },
    /// By chance, by weight.
    Random,
    /// Of two by chance the better one.
    RandomTwo(Metric),
    /// The shortest time to connect for its weight and sessions.
    LeastTime,
    /// By the client's address, on a ring.
    Source,
}

/// What makes one of two peers the better one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// Fewer sessions.
    Connections,
    /// Less time to connect.
    Time,
}

/// What a person wrote.
pub(super) fn read(given: Given, maps: &[VariableMap]) -> Result<Balance, Fault> {
    let text = valid::text(given, "\"round_robin\"")?;
    let words: Vec<&str> = text.split_whitespace().collect();
    match words.as_slice() {
        ["round_robin"] => Ok(Balance::RoundRobin),
        ["least_conn"] => Ok(Balance::LeastConn),
        // nginx has a word for what is measured; of a stream that nobody reads it can only be this.
        ["least_time"] | ["least_time", "connect"] => Ok(Balance::LeastTime),
        ["random"] => Ok(Balance::Random),
        ["random", "two"] | ["random", "two", "least_conn"] => Ok(Balance::RandomTwo(Metric::Connections)),
        ["random", "two", "least_time"] => Ok(Balance::RandomTwo(Metric::Time)),
        ["source"] => Ok(Balance::Source),
        ["hash", key] => hash(key, false, maps),
        ["hash", key, "consistent"] => hash(key, true, maps),
        ["hash"] => Err(Fault::new(
            "a hash without a key",
            "write \"hash $remote_addr consistent\"",
        )),
        ["hash", ..] => Err(Fault::new(
            "not a hash's key and its way",
            "write \"hash $remote_addr\" or \"hash $remote_addr consistent\", the key without spaces",
        )),
        _ => Err(Fault::new("unknown way of balancing", REMEDY)),
    }
}

fn hash(key: &str, consistent: bool, maps: &[VariableMap]) -> Result<Balance, Fault> {
    let key = template::resolve(key, &BTreeMap::new(), maps).map_err(|unresolved| unresolved.fault)?;
    if !key.0.iter().any(|part| matches!(part, Part::Variable(_))) {
        return Err(Fault::new(
            "the key has no $variable, so all sessions would go to one server",
            "write for example \"hash $remote_addr\"",
        ));
    }
    Ok(Balance::Hash { key, consistent })
}

/// What [`read`] takes for the same.
pub(super) fn write(balance: &Balance, maps: &[VariableMap]) -> String {
    match balance {
        Balance::Hash { key, consistent } => {
            let way = if *consistent { " consistent" } else { "" };
            format!("hash {}{way}", text_of(key, maps))
        }
        other => kind(other).to_owned(),
    }
}

/// The same without a hash's key.
pub(super) fn kind(balance: &Balance) -> &'static str {
    match balance {
        Balance::RoundRobin => "round_robin",
        Balance::LeastConn => "least_conn",
        Balance::LeastTime => "least_time",
        Balance::Random => "random",
        Balance::RandomTwo(Metric::Connections) => "random two least_conn",
        Balance::RandomTwo(Metric::Time) => "random two least_time",
        Balance::Source => "source",
        Balance::Hash { consistent: true, .. } => "hash ... consistent",
        Balance::Hash {
            consistent: false, ..
        } => "hash",
    }
}

/// A key is one word with its variables in it: a literal behind a variable never begins with a letter of a name, and
/// none holds a dollar.
fn text_of(key: &Template, maps: &[VariableMap]) -> String {
    let parts = key.0.iter().map(|part| match part {
        Part::Literal(text) => text.clone(),
        Part::Variable(variable) => format!("${}", name_of(maps, *variable)),
    });
    parts.collect()
}
