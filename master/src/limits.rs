//! The limit on open descriptors: raised as far as the system lets us, and checked before anything is
//! served, because a worker that runs out of them in the middle of the day can only refuse sessions.

use anyhow::{Context, Result, bail};
use caps::Capability;
use culvert_shared::config::Config;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::names::hosts;
use crate::retain;

/// Descriptors that a worker needs besides its listeners and sessions: standard ones, log, control
/// socket, epoll and its waker, timers, the slot's maps; with room for what libraries open for a moment.
const WORKER_RESERVE: u64 = 64;
/// The same for the master.
const MASTER_RESERVE: u64 = 64;
/// Descriptors that the master holds for each worker slot besides listeners: maps, programs, links and
/// the control sockets of the old and the new worker.
const MASTER_PER_SLOT: u64 = 24;

/// What the configuration needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Need {
    /// Descriptors of one worker: two for each session.
    worker: u64,
    /// Descriptors of the master: a listening socket for each address and slot, and lookups of hosts.
    master: u64,
    /// Listeners that a worker holds.
    listeners: u64,
}

fn need(config: &Config) -> Need {
    let listeners = config
        .servers
        .iter()
        .map(|server| server.listen.len() as u64)
        .sum::<u64>();
    let slots = config.worker_cpus.len() as u64;
    // A socket for each kind of address that is asked for.
    let lookups = match config.resolvers().is_empty() {
        true => 0,
        false => 2 * hosts::RUNNING_MAX as u64,
    };
    Need {
        // Twice the listeners: a fresh worker holds its own copies beside the inherited ones for a moment.
        worker: 2 * u64::from(config.worker_connections) + 2 * listeners + WORKER_RESERVE,
        // Twice: during a reload the old and the new sockets exist side by side.
        master: 2 * slots * (listeners + MASTER_PER_SLOT) + MASTER_RESERVE + lookups,
        listeners,
    }
}

/// Raises the limit of this process, which its workers inherit. Says how many sessions the master may keep so
/// that they outlive their workers: it holds two descriptors for each.
///
/// # Errors
/// The configuration needs more than the system allows.
pub fn raise_descriptors(config: &Config) -> Result<u64> {
    let need = need(config);
    let all = config.worker_cpus.len() as u64 * u64::from(config.worker_connections);
    let limit = raise(config, need, need.worker.max(need.master + 2 * all))?;
    let room = limit.saturating_sub(need.master) / 2;
    if room < all {
        log::warn!(
            "of {all} sessions ({} workers with worker_connections = {}) only {room} can outlive their worker: the \
             master needs two descriptors for each of them, and the limit is {limit}; {}",
            config.worker_cpus.len(),
            config.worker_connections,
            remedy(),
        );
    }
    Ok(room.min(all))
}

/// Raises the limit to `wanted`, or as far as it goes; returns what it is then.
fn raise(config: &Config, need: Need, wanted: u64) -> Result<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("failed to read the descriptor limit")?;
    if hard < wanted && setrlimit(Resource::RLIMIT_NOFILE, wanted, wanted).is_ok() {
        return Ok(wanted);
    }
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
            .with_context(|| format!("failed to raise the descriptor limit from {soft} to {hard}"))?;
    }
    check(config, need, hard.max(soft))?;
    Ok(hard.max(soft))
}

/// What helps. With the right to raise it, only the system's own bound is in the way.
fn remedy() -> String {
    match retain::missing(&[Capability::CAP_SYS_RESOURCE]) {
        Some(missing) => {
            format!("raise the limit (ulimit -Hn; LimitNOFILE= in a systemd unit), or give {missing}")
        }
        None => "raise the system's bound (sysctl fs.nr_open)".to_owned(),
    }
}

fn check(config: &Config, need: Need, limit: u64) -> Result<()> {
    let remedy = remedy();
    if need.worker > limit {
        let fits = limit.saturating_sub(need.worker - 2 * u64::from(config.worker_connections)) / 2;
        bail!(
            "worker_connections = {} needs {} descriptors in each worker (2 for each session, {} listeners, a \
             reserve), but the limit is {limit}: lower worker_connections to at most {fits}, or {remedy}",
            config.worker_connections,
            need.worker,
            need.listeners,
        );
    }
    if need.master > limit {
        bail!(
            "{} listeners in {} worker processes need {} descriptors in the master, but the limit is {limit}: \
             lower worker_processes or the number of listeners, or {remedy}",
            need.listeners,
            config.worker_cpus.len(),
            need.master,
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;
    use culvert_shared::config::{Action, Resolver, Target, Template};

    #[test]
    fn two_descriptors_a_session_and_the_listeners_are_counted() {
        let mut config = testing::config(&["127.0.0.1:1", "127.0.0.1:2"], &[]);
        config.worker_connections = 1000;
        config.worker_cpus = vec![vec![0]; 3];
        let need = need(&config);
        assert_eq!(need.listeners, 2);
        assert_eq!(need.worker, 2000 + 4 + WORKER_RESERVE);
        let without = 2 * 3 * (2 + MASTER_PER_SLOT) + MASTER_RESERVE;
        assert_eq!(need.master, without);
        // Where sessions may name hosts, a socket for each kind of address.
        let stream = &mut config.servers[1].stream;
        stream.resolver = Some(std::sync::Arc::new(Resolver {
            servers: vec![([127, 0, 0, 53], 53).into()],
            valid: None,
            hold: std::time::Duration::ZERO,
            ipv4: true,
            ipv6: true,
            timeout: std::time::Duration::from_secs(1),
        }));
        assert_eq!(super::need(&config).master, without, "none does");
        config.servers[1].action = Action::Proxy(Target::Variable(Template(Vec::new())));
        let lookups = 2 * hosts::RUNNING_MAX as u64;
        assert_eq!(super::need(&config).master, without + lookups);
    }

    #[test]
    fn a_limit_that_is_too_low_is_reported_with_the_value_that_would_fit() {
        let mut config = testing::config(&["127.0.0.1:1"], &[]);
        config.worker_connections = 100_000;
        let error = check(&config, need(&config), 4096).unwrap_err().to_string();
        assert!(
            error.contains("worker_connections = 100000 needs 200066 descriptors"),
            "{error}"
        );
        assert!(error.contains("the limit is 4096"), "{error}");
        let fits = error
            .split("at most ")
            .nth(1)
            .and_then(|rest| rest.split(',').next())
            .unwrap();
        config.worker_connections = fits.parse().unwrap();
        assert!(check(&config, need(&config), 4096).is_ok());
        config.worker_connections += 1;
        assert!(check(&config, need(&config), 4096).is_err());
    }

    #[test]
    fn the_master_needs_a_descriptor_for_each_listener_and_slot() {
        let listeners: Vec<String> = (1..=100).map(|port| format!("127.0.0.1:{port}")).collect();
        let listeners: Vec<&str> = listeners.iter().map(String::as_str).collect();
        let mut config = testing::config(&listeners, &[]);
        config.worker_cpus = vec![vec![0]; 64];
        let error = check(&config, need(&config), 4096).unwrap_err().to_string();
        assert!(error.contains("100 listeners in 64 worker processes"), "{error}");
    }
}
