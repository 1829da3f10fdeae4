//! What this version knows, for whoever writes a configuration by program.

use super::file::{self, Shape};
use super::{log_format, template};

/// Whether a key may be written. `path` names its tables, as in `server.listen.backlog`.
pub fn knows_key(path: &str) -> bool {
    let mut keys = file::ROOT;
    let mut names = path.split('.').peekable();
    while let Some(name) = names.next() {
        let Some(key) = file::find(keys, name) else {
            return false;
        };
        match key.shape {
            _ if names.peek().is_none() => return true,
            Shape::Table(inner) | Shape::Tables(inner) | Shape::Mixed(inner) => keys = inner,
            Shape::Value | Shape::Free => return false,
        }
    }
    false
}

/// Whether every session has this variable before its peer is chosen. The name is without `$`.
pub fn knows_variable(name: &str) -> bool {
    template::session_variable(name).is_some()
}

/// Whether a log format may hold this variable. The name is without `$`.
pub fn knows_log_variable(name: &str) -> bool {
    log_format::VARIABLES.iter().any(|(known, _)| *known == name)
}

/// Whether a log format of this name is there without being written.
pub fn has_ready_made_format(name: &str) -> bool {
    log_format::is_ready_made(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_known_by_their_path() {
        for known in [
            "user",
            "stream",
            "stream.proxy_timeout",
            "server.listen.backlog",
            "upstream.server.weight",
        ] {
            assert!(knows_key(known), "{known}");
        }
        for unknown in [
            "",
            "users",
            "stream.listen",
            "user.name",
            "server.set.any",
            "server.listen.port",
        ] {
            assert!(!knows_key(unknown), "{unknown}");
        }
    }
}
