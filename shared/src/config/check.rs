//! The whole: a tree of values → a [`Config`], with every name resolved and every clash found.
//!
//! After an error a stand-in value takes the wrong one's place, so that the rest is checked as well; whoever calls
//! this throws the result away when anything was found.

use std::path::PathBuf;
use std::time::Duration;

use config::{Map, Value, ValueKind};

use super::access_log::AccessLogs;
use super::diagnostic::{Fault, Findings, OriginId};
use super::servers::Servers;
use super::source::{entries, join};
use super::valid::{self, Given};
use super::world::World;
use super::{Config, FlowSteering, User};
use super::{cpus, units};
use crate::counters::MAX_WORKERS;

/// During a reload the old and the new worker of a slot exist at the same time.
const WORKERS_MAX: u32 = MAX_WORKERS as u32 / 2;

/// A session takes two descriptors, and fs.nr_open is 1,048,576 unless somebody raised it a lot.
const CONNECTIONS_MAX: u32 = 1 << 20;

/// More memory than a worker's kernel side can sensibly take.
const BACKLOG_TOTAL_MAX_BYTES: usize = 1 << 40;

/// Nothing that a proxy waits for takes longer.
pub(super) const YEAR: Duration = Duration::from_secs(365 * 86_400);

/// Turns the tree into what is used.
pub(super) fn check(world: &dyn World, findings: &mut Findings, root: &Map<String, Value>) -> Config {
    let mut check = Check { world, findings };
    let user = check.at(root, "", "user", |given| user(given, world));
    let workers = check.at(root, "", "worker_processes", |given| {
        valid::auto_or_number(given, 1..=WORKERS_MAX)
    });
    let worker_cpus = check.worker_cpus(root, workers.flatten());
    let worker_connections = check
        .at(root, "", "worker_connections", |given| {
            valid::number(given, 1..=CONNECTIONS_MAX)
        })
        .unwrap_or(1);
    let backlog = check.at(root, "", "worker_backlog_size", |given| {
        units::size(given, 0..=BACKLOG_TOTAL_MAX_BYTES)
    });
    let shutdown = check.at(root, "", "worker_shutdown_timeout", |given| {
        units::duration(given, Duration::ZERO..=YEAR)
    });
    let flow_steering = check.at(root, "", "flow_steering", |given| {
        match valid::text(given, "\"off\"")? {
            "off" => Ok(FlowSteering::Off),
            "rfs" => Ok(FlowSteering::Rfs),
            _ => Err(Fault::new("unknown way of steering", "allowed: \"off\", \"rfs\"")),
        }
    });
    let pid = check.pid(root).unwrap_or_default();
    let error_log = check.error_log(root);
    let maps = check.maps(root);
    let resolver = check.stream_resolver(root);
    let upstreams = check.upstreams(root, &maps, &resolver);
    let limit_zones = check.limit_zones(root, &maps);
    let access_logs = AccessLogs::read(&mut check, root);
    let (upstreams, stream, servers) =
        Servers::new(&mut check, upstreams, (&limit_zones, &maps), access_logs).read(root, &resolver);
    Config {
        user,
        worker_cpus,
        worker_connections,
        // 0 means: no limit.
        worker_backlog_size: backlog.filter(|bytes| *bytes != 0).map(|bytes| bytes as u64),
        // 0 means: wait as long as it takes.
        worker_shutdown_timeout: shutdown.filter(|timeout| !timeout.is_zero()),
        flow_steering: flow_steering.unwrap_or(FlowSteering::Off),
        pid,
        error_log,
        upstreams,
        stream,
        maps,
        limit_zones,
        servers,
    }
}

/// Only the file that has the master's process id.
pub(super) fn pid(world: &dyn World, findings: &mut Findings, root: &Map<String, Value>) -> Option<PathBuf> {
    Check { world, findings }.pid(root)
}

/// Reads values and collects what is wrong with them.
pub(super) struct Check<'a> {
    pub world: &'a dyn World,
    pub findings: &'a mut Findings,
}

impl Check<'_> {
    /// The value of a key of a table. `None`: it is not there, or wrong, which is then reported.
    pub(super) fn at<'v, T>(
        &mut self,
        table: &'v Map<String, Value>,
        prefix: &str,
        name: &str,
        read: impl FnOnce(Given<'v>) -> Result<T, Fault>,
    ) -> Option<T> {
        self.read(&join(prefix, name), table.get(name)?, read)
    }

    /// A single value. `None`: it is wrong, which is (or was before) reported.
    pub(super) fn read<'v, T>(
        &mut self,
        key: &str,
        value: &'v Value,
        read: impl FnOnce(Given<'v>) -> Result<T, Fault>,
    ) -> Option<T> {
        if value.kind == ValueKind::Nil {
            return None;
        }
        let at = self.findings.origin_of(value);
        let loose = value.origin().is_some() && self.findings.get(at).is_some_and(|origin| origin.loose);
        match read(Given {
            kind: &value.kind,
            loose,
        }) {
            Ok(read) => Some(read),
            Err(fault) => {
                self.findings.fault(at, key, fault);
                None
            }
        }
    }

    /// What stands under a key that takes one value or a list of them. `None`: it is not there. What is wrong is
    /// reported and left out.
    pub(super) fn list<'v, T>(
        &mut self,
        table: &'v Map<String, Value>,
        prefix: &str,
        name: &str,
        read: impl Fn(Given<'v>) -> Result<T, Fault>,
    ) -> Option<Vec<T>> {
        let entries = entries(&join(prefix, name), table.get(name)?);
        let read = entries
            .iter()
            .filter_map(|(key, entry)| self.read(key, entry, &read));
        Some(read.collect())
    }

    /// The tables of a list such as `[[server]]`, each with its key and origin.
    pub(super) fn tables<'v>(
        &mut self,
        root: &'v Map<String, Value>,
        name: &str,
    ) -> Vec<(String, OriginId, &'v Map<String, Value>)> {
        let items = match root.get(name).map(|value| &value.kind) {
            Some(ValueKind::Array(items)) => items.as_slice(),
            _ => &[],
        };
        let numbered = items.iter().enumerate();
        let tables = numbered.filter_map(|(index, item)| match &item.kind {
            ValueKind::Table(table) => {
                Some((format!("{name}[{index}]"), self.findings.origin_of(item), table))
            }
            _ => None,
        });
        tables.collect()
    }

    fn pid(&mut self, root: &Map<String, Value>) -> Option<PathBuf> {
        self.at(root, "", "pid", |given| {
            valid::path(given, "\"/run/culvert/master.pid\"")
        })
    }

    /// Where a value was written, for another error to point to.
    pub(super) fn place(&self, at: OriginId) -> String {
        self.findings
            .get(at)
            .map(|origin| origin.place.to_string())
            .unwrap_or_default()
    }

    /// The CPUs of each worker. `count`: `None` for as many as there are CPUs that may be used.
    fn worker_cpus(&mut self, root: &Map<String, Value>, count: Option<u32>) -> Vec<Vec<usize>> {
        let allowed = self.world.allowed_cpus();
        let count = count.map_or(allowed.len().min(WORKERS_MAX as usize), |count| count as usize);
        let Some(value) = root.get("worker_cpu_affinity") else {
            return Vec::new();
        };
        let key = "worker_cpu_affinity";
        let entries: Vec<(String, &Value, String)> = match &value.kind {
            ValueKind::String(text) if text.trim() == "auto" => {
                return (0..count)
                    .map(|slot| vec![allowed[slot % allowed.len()]])
                    .collect();
            }
            // nginx separates masks by spaces.
            ValueKind::String(text) => text
                .split_whitespace()
                .map(|entry| (key.to_owned(), value, entry.to_owned()))
                .collect(),
            ValueKind::Array(items) => {
                let entries = items.iter().enumerate().filter_map(|(index, item)| {
                    let key = format!("{key}[{index}]");
                    let text = self.read(&key, item, |given| valid::text(given, "\"0101\" or \"0-3,8\""))?;
                    Some((key, item, text.to_owned()))
                });
                entries.collect()
            }
            _ => {
                self.read(key, value, |given| Err::<(), _>(given.wrong_type(cpus::REMEDY)));
                return Vec::new();
            }
        };
        let texts: Vec<&str> = entries.iter().map(|(.., text)| text.as_str()).collect();
        if cpus::is_ambiguous(&texts) {
            self.read(key, value, |_| Err::<(), _>(cpus::ambiguous()));
            return Vec::new();
        }
        let empty = match &value.kind {
            ValueKind::Array(items) => items.is_empty(),
            _ => entries.is_empty(),
        };
        if empty {
            self.read(key, value, |_| Err::<(), _>(Fault::new("empty", cpus::REMEDY)));
        }
        let online = self.world.online_cpus();
        let sets: Vec<Vec<usize>> = entries
            .iter()
            .filter_map(|(key, value, text)| self.read(key, value, |_| cpus::entry(text, &online)))
            .collect();
        // As nginx does: with fewer entries than workers the last one goes on; with more, the rest waits for workers.
        let Some(last) = sets.last() else {
            return Vec::new();
        };
        (0..count)
            .map(|slot| sets.get(slot).unwrap_or(last).clone())
            .collect()
    }
}

fn user(given: Given, world: &dyn World) -> Result<User, Fault> {
    let name = valid::text(given, "\"nobody\"")?;
    match world.user(name) {
        Ok(Some(user)) => Ok(user),
        Ok(None) => Err(Fault::new(
            "unknown user",
            "name an existing one, or leave the key out",
        )),
        Err(error) => Err(Fault::new(
            format!("user cannot be looked up: {error}"),
            "see getent passwd",
        )),
    }
}
