//! `access_log`: where the lines of ended sessions go, and when. What a line is made of is in `log_format`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use config::{Map, Value, ValueKind};

use super::check::{Check, YEAR};
use super::diagnostic::{Fault, short};
use super::file::nearest;
use super::source::join;
use super::units::{write_duration, write_size};
use super::valid::{self, Given};
use super::world::World;
use super::{LogFormat, LogTarget, defaults, expand, log_format, syslog, units};

/// Each is a descriptor and a thread of every worker.
const LOGS_MAX: usize = 64;

/// More would only be lost when a worker is killed.
const BUFFER_MAX_BYTES: usize = 4 << 20;

const EXAMPLE: &str = "\"off\", \"/var/log/culvert/access.log\" or { path = \"…\", format = \"json\" }";

/// A log with a line for each ended session.
#[derive(Clone, Debug, PartialEq)]
pub struct AccessLog {
    /// Where lines go; never [`LogTarget::Stderr`].
    pub target: LogTarget,
    /// What a line is made of.
    pub format: Arc<LogFormat>,
    /// Lines are written when a worker has gathered so many bytes of them.
    pub buffer_bytes: usize,
    /// And after this time at the latest; zero: at once.
    pub flush: Duration,
}

/// The formats of a file, and every log that it names so far.
pub(super) struct AccessLogs {
    formats: BTreeMap<String, Arc<LogFormat>>,
    logs: Vec<Arc<AccessLog>>,
}

impl AccessLogs {
    /// None yet, and the formats of the file.
    pub(super) fn read(check: &mut Check<'_>, root: &Map<String, Value>) -> AccessLogs {
        AccessLogs {
            formats: log_format::read(check, root),
            logs: Vec::new(),
        }
    }

    /// The `access_log` of a table that inherits `inherited`.
    pub(super) fn of_table(
        &mut self,
        check: &mut Check<'_>,
        table: &Map<String, Value>,
        key: &str,
        inherited: &Option<Arc<AccessLog>>,
    ) -> Option<Arc<AccessLog>> {
        let key = join(key, "access_log");
        let Some(value) = table
            .get("access_log")
            .filter(|value| value.kind != ValueKind::Nil)
        else {
            return inherited.clone();
        };
        let world = check.world;
        let mut log = AccessLog {
            target: LogTarget::File(Default::default()),
            format: Arc::clone(&self.formats[defaults::LOG_FORMAT]),
            buffer_bytes: defaults::LOG_BUFFER_BYTES,
            flush: defaults::LOG_FLUSH,
        };
        let Some(settings) = table_of(value) else {
            log.target = check.read(&key, value, |given| match given.kind {
                ValueKind::String(_) => target_or_off(given, world),
                _ => Err(given.wrong_type(format!("write for example {EXAMPLE}"))),
            })??;
            log.flush = default_flush(&log.target);
            return Some(self.share(check, &key, value, log));
        };
        if !settings.contains_key("path") {
            let at = check.findings.origin_of(value);
            let text = "missing, an access log needs a path such as \"/var/log/culvert/access.log\"";
            check.findings.report(at, &join(&key, "path"), text);
        }
        if let Some(format) = check.at(settings, &key, "format", |given| self.format(given)) {
            log.format = format;
        }
        let buffer = check.at(settings, &key, "buffer", |given| {
            units::size(given, 1..=BUFFER_MAX_BYTES)
        });
        log.buffer_bytes = buffer.unwrap_or(log.buffer_bytes);
        let flush = check.at(settings, &key, "flush", |given| {
            units::duration(given, Duration::ZERO..=YEAR)
        });
        log.target = check.at(settings, &key, "path", |given| target_or_off(given, world))??;
        log.flush = flush.unwrap_or_else(|| default_flush(&log.target));
        Some(self.share(check, &key, value, log))
    }

    fn format(&self, given: Given) -> Result<Arc<LogFormat>, Fault> {
        let name = valid::text(given, "\"json\"")?;
        self.formats.get(name).cloned().ok_or_else(|| {
            let remedy = match nearest(name, self.formats.keys().map(String::as_str)) {
                Some(near) => format!("did you mean \"{near}\"?"),
                None => {
                    let known: Vec<String> = self.formats.keys().map(|name| format!("\"{name}\"")).collect();
                    format!("write a [[log_format]] of that name, or use {}", known.join(", "))
                }
            };
            Fault::new(format!("there is no log format \"{}\"", short(name)), remedy)
        })
    }

    /// One value for equal logs, so that each is opened once.
    fn share(&mut self, check: &mut Check<'_>, key: &str, value: &Value, log: AccessLog) -> Arc<AccessLog> {
        if let Some(same) = self.logs.iter().find(|same| ***same == log) {
            return Arc::clone(same);
        }
        if self.logs.len() == LOGS_MAX {
            let what = format!("more than {LOGS_MAX} different access logs");
            let fault = Fault::new(what, "let servers share a log; $listener tells them apart");
            check.read(key, value, |_| Err::<(), _>(fault));
        }
        let log = Arc::new(log);
        self.logs.push(Arc::clone(&log));
        log
    }
}

fn table_of(value: &Value) -> Option<&Map<String, Value>> {
    match &value.kind {
        ValueKind::Table(table) => Some(table),
        _ => None,
    }
}

/// `None`: off.
fn target_or_off(given: Given, world: &dyn World) -> Result<Option<LogTarget>, Fault> {
    let text = valid::text(given, EXAMPLE)?;
    match text.strip_prefix("syslog:") {
        Some(rest) => syslog::read(rest, world).map(|syslog| Some(LogTarget::Syslog(syslog))),
        None if text == "off" => Ok(None),
        None => valid::path(given, EXAMPLE).map(|path| Some(LogTarget::File(path))),
    }
}

/// Who reads at the other end of syslog wants to know at once, and a datagram holds one line anyway.
fn default_flush(target: &LogTarget) -> Duration {
    match target {
        LogTarget::Syslog(_) => Duration::ZERO,
        LogTarget::Stderr | LogTarget::File(_) => defaults::LOG_FLUSH,
    }
}

/// An access log as a file would write it; `quoted` makes a TOML string.
pub(super) fn write_log(log: Option<&AccessLog>, quoted: impl Fn(&str) -> String) -> String {
    let Some(log) = log else {
        return quoted("off");
    };
    format!(
        "{{ path = {}, format = {}, buffer = {}, flush = {} }}",
        quoted(&expand::escape(&log.target.to_string())),
        quoted(&expand::escape(&log.format.name)),
        quoted(&write_size(log.buffer_bytes)),
        quoted(&write_duration(log.flush))
    )
}
