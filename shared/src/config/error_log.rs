//! `error_log`: where the lines of the program go, and from which level on.

use std::fmt;
use std::path::PathBuf;

use config::{Map, Value, ValueKind};

use super::check::Check;
use super::diagnostic::Fault;
use super::{Syslog, syslog, valid};

/// The levels that may be written: those of the program and, beside them, nginx's.
const LEVELS: &[(&str, log::LevelFilter)] = &[
    ("error", log::LevelFilter::Error),
    ("warn", log::LevelFilter::Warn),
    ("info", log::LevelFilter::Info),
    ("debug", log::LevelFilter::Debug),
    ("trace", log::LevelFilter::Trace),
    ("notice", log::LevelFilter::Info),
    ("crit", log::LevelFilter::Error),
    ("alert", log::LevelFilter::Error),
    ("emerg", log::LevelFilter::Error),
];

/// The error log.
#[derive(Clone, Debug, PartialEq)]
pub struct ErrorLog {
    /// Where lines go.
    pub target: LogTarget,
    /// The least severe level that is written.
    pub level: log::LevelFilter,
}

/// Where log lines go.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum LogTarget {
    /// Standard error.
    Stderr,
    /// A file that is appended to, and reopened by USR1.
    File(PathBuf),
    /// A syslog server; each line is a datagram.
    Syslog(Syslog),
}

impl fmt::Display for LogTarget {
    /// As a file would write it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LogTarget::Stderr => f.write_str("stderr"),
            LogTarget::File(path) => path.display().fmt(f),
            LogTarget::Syslog(settings) => f.write_str(&settings.text()),
        }
    }
}

impl Check<'_> {
    /// What the layers say of it together.
    pub(super) fn error_log(&mut self, root: &Map<String, Value>) -> ErrorLog {
        let nothing = Map::new();
        let table = match root.get("error_log").map(|value| &value.kind) {
            Some(ValueKind::Table(table)) => table,
            _ => &nothing,
        };
        let world = self.world;
        let target = self.at(table, "error_log", "path", |given| {
            const EXAMPLE: &str = "\"stderr\" or \"/var/log/culvert/error.log\"";
            match valid::text(given, EXAMPLE)? {
                "stderr" => Ok(LogTarget::Stderr),
                text => match text.strip_prefix("syslog:") {
                    Some(rest) => syslog::read(rest, world).map(LogTarget::Syslog),
                    None => valid::path(given, EXAMPLE).map(LogTarget::File),
                },
            }
        });
        let level = self.at(table, "error_log", "level", |given| {
            let text = valid::text(given, "\"info\"")?;
            let known = LEVELS.iter().find(|(name, _)| *name == text);
            known.map(|(_, level)| *level).ok_or_else(|| {
                let names: Vec<&str> = LEVELS.iter().map(|(name, _)| *name).collect();
                Fault::new("unknown level", format!("allowed: {}", names.join(", ")))
            })
        });
        ErrorLog {
            target: target.unwrap_or(LogTarget::Stderr),
            level: level.unwrap_or(log::LevelFilter::Info),
        }
    }
}
