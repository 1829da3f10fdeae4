//! Limits on sessions: what they are counted by (`[[limit_conn_zone]]`), how many a key may have at once (`limit_conn`), and
//! how fast they may come (`limit_conn_rate`).

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::Duration;

use config::{Map, Value};

use super::check::Check;
use super::diagnostic::Fault;
use super::source::join;
use super::template::{self, is_name_char};
use super::valid::{self, Given};
use super::{Part, Template, VariableMap};
use crate::limits::MAX_HOLDS;

/// More sessions of one key than this are no limit; nginx's own maximum.
const CONNECTIONS_MAX: u32 = 65_535;

const CONN: &str = "write a zone and a number, for example \"per_client 10\"";
const RATE: &str =
    "write a zone, a rate and, if you like, a burst, for example \"per_client 10/s burst=20\" (or 30/m)";

/// What sessions are counted by.
#[derive(Clone, Debug, PartialEq)]
pub struct LimitZone {
    /// Its name: servers that name the same zone count together.
    pub name: String,
    /// The key; a session for which it is empty does not count.
    pub key: Template,
}

/// One entry of `limit_conn`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LimitConn {
    /// The index of its zone.
    pub zone: usize,
    /// Sessions that a key may have at once, at least 1.
    pub connections: u32,
}

/// One entry of `limit_conn_rate`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LimitRate {
    /// The index of its zone.
    pub zone: usize,
    /// Connections that may come in a period, on average; at least 1.
    pub connections: u32,
    /// The period: a second or a minute.
    pub period: Duration,
    /// How many more may come at once.
    pub burst: u32,
}

impl LimitConn {
    /// The entry as a file has it.
    pub(super) fn text(&self, zones: &[LimitZone]) -> String {
        format!(
            "{} {}",
            zones.get(self.zone).map_or("", |zone| &zone.name),
            self.connections
        )
    }
}

impl LimitRate {
    /// The time between two connections at this rate.
    pub fn interval(&self) -> Duration {
        self.period / self.connections.max(1)
    }

    /// The entry as a file has it.
    pub(super) fn text(&self, zones: &[LimitZone]) -> String {
        let zone = zones.get(self.zone).map_or("", |zone| &zone.name);
        let unit = if self.period.as_secs() == 1 { "s" } else { "m" };
        format!("{zone} {}/{unit} burst={}", self.connections, self.burst)
    }
}

impl Check<'_> {
    /// The zones of a file.
    pub(super) fn limit_zones(&mut self, root: &Map<String, Value>, maps: &[VariableMap]) -> Vec<LimitZone> {
        let mut zones: Vec<LimitZone> = Vec::new();
        for (key, at, table) in self.tables(root, "limit_conn_zone") {
            for name in ["name", "key"] {
                if !table.contains_key(name) {
                    let text =
                        "missing, a [[limit_conn_zone]] needs a name and a key such as \"$remote_addr\"";
                    self.findings.report(at, &join(&key, name), text);
                }
            }
            let name = self.at(table, &key, "name", |given| {
                let name = valid::text(given, "\"per_client\"")?;
                if !name.chars().all(is_name_char) {
                    return Err(Fault::new("not a name", "a name has letters, digits and _"));
                }
                match zones.iter().any(|zone| zone.name == name) {
                    true => Err(Fault::new(
                        "already the name of another zone",
                        "give each zone a name of its own",
                    )),
                    false => Ok(name.to_owned()),
                }
            });
            let template = self.at(table, &key, "key", |given| {
                let text = valid::text(given, "\"$remote_addr\"")?;
                let template = template::resolve(text, &BTreeMap::new(), maps).map_err(|unresolved| {
                    let remedy = "a key is made of a session's variables, such as $remote_addr";
                    Fault::new(unresolved.fault.what, remedy)
                })?;
                match template.0.iter().any(|part| matches!(part, Part::Variable(_))) {
                    true => Ok(template),
                    false => Err(Fault::new(
                        "a key without a variable",
                        "write for example \"$remote_addr\"",
                    )),
                }
            });
            zones.push(LimitZone {
                name: name.unwrap_or_default(),
                key: template.unwrap_or(Template(Vec::new())),
            });
        }
        zones
    }

    pub(super) fn limit_conn(
        &mut self,
        table: &Map<String, Value>,
        key: &str,
        zones: &[LimitZone],
    ) -> Option<Vec<LimitConn>> {
        let used = RefCell::default();
        let entries = self.list(table, key, "limit_conn", |given| {
            let words = words(given, CONN)?;
            match words.as_slice() {
                [name, number] => Ok(LimitConn {
                    connections: number_of(number, 1, CONN)?,
                    zone: zone(name, zones, &used)?,
                }),
                _ => Err(Fault::new("not a zone and a number", CONN)),
            }
        })?;
        self.not_too_many(table, key, entries.len());
        Some(entries)
    }

    fn not_too_many(&mut self, table: &Map<String, Value>, key: &str, entries: usize) {
        if entries > MAX_HOLDS {
            let value = &table["limit_conn"];
            let fault = Fault::new(
                format!("{entries} limits for one session"),
                format!("write at most {MAX_HOLDS}"),
            );
            let at = self.findings.origin_of(value);
            self.findings.fault(at, &join(key, "limit_conn"), fault);
        }
    }

    pub(super) fn limit_conn_rate(
        &mut self,
        table: &Map<String, Value>,
        key: &str,
        zones: &[LimitZone],
    ) -> Option<Vec<LimitRate>> {
        let used = RefCell::default();
        self.list(table, key, "limit_conn_rate", |given| {
            let words = words(given, RATE)?;
            let (name, rate, burst) = match words.as_slice() {
                [name, rate] => (name, rate, 0),
                [name, rate, burst] => match burst.strip_prefix("burst=") {
                    Some(burst) => (name, rate, number_of(burst, 0, RATE)?),
                    None => return Err(Fault::new("not a burst", RATE)),
                },
                _ => return Err(Fault::new("not a zone and a rate", RATE)),
            };
            let (number, unit) = rate.split_once('/').unwrap_or((rate, ""));
            let seconds = match unit {
                "s" => 1,
                "m" => 60,
                _ => return Err(Fault::new("not a rate", RATE)),
            };
            Ok(LimitRate {
                // nginx writes 10r/s.
                connections: number_of(number.strip_suffix('r').unwrap_or(number), 1, RATE)?,
                zone: zone(name, zones, &used)?,
                period: Duration::from_secs(seconds),
                burst,
            })
        })
    }
}

fn words<'v>(given: Given<'v>, remedy: &str) -> Result<Vec<&'v str>, Fault> {
    match given.str() {
        Some(text) => Ok(text.split_whitespace().collect()),
        None => Err(given.wrong_type(remedy)),
    }
}

/// The zone of that name. `used`: those of the entries before. What is counted for a key is counted once in a zone, so a
/// second limit would count every session again (nginx: "is duplicate").
fn zone(name: &str, zones: &[LimitZone], used: &RefCell<Vec<usize>>) -> Result<usize, Fault> {
    let found = zones.iter().position(|zone| zone.name == name).ok_or_else(|| {
        Fault::new(
            "there is no limit_conn_zone of that name",
            "write a [[limit_conn_zone]] with its name and a key such as \"$remote_addr\"",
        )
    })?;
    if used.borrow().contains(&found) {
        return Err(Fault::new(
            "an entry before it has that zone already",
            "write one limit for each zone; a second zone may have the same key",
        ));
    }
    used.borrow_mut().push(found);
    Ok(found)
}

fn number_of(text: &str, least: u32, remedy: &str) -> Result<u32, Fault> {
    match text.parse::<u32>() {
        Ok(number) if (least..=CONNECTIONS_MAX).contains(&number) => Ok(number),
        _ => Err(Fault::new(
            format!("not a whole number from {least} to {CONNECTIONS_MAX}"),
            remedy,
        )),
    }
}
