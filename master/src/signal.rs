//! `-s`: signals the running master, after making sure that there is one.

use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{self, kill};

use crate::args::Signal;
use crate::pidfile::{self, Found};

/// Sends the signal to the master that a pid file names.
///
/// # Errors
/// No master is running with that pid file, or it may not be signalled.
pub fn send(signal: Signal, pid_file: &Path) -> Result<()> {
    let path = pid_file.display();
    let pid = match pidfile::look(pid_file)? {
        Found::Master(pid) => pid,
        Found::Missing => bail!("no master is running: there is no pid file {path}"),
        Found::Stale(pid) => {
            let number = pid.map_or("no process id".to_owned(), |pid| format!("process {pid}"));
            bail!(
                "no master is running: the pid file {path} is stale (it names {number}, but no master holds it); \
                 the next start replaces it"
            );
        }
    };
    let number = match signal {
        Signal::Reload => signal::Signal::SIGHUP,
        Signal::Quit => signal::Signal::SIGQUIT,
        Signal::Stop => signal::Signal::SIGTERM,
        Signal::Reopen => signal::Signal::SIGUSR1,
    };
    kill(pid, number)
        .with_context(|| format!("failed to signal the master, process {pid} ({})", signal.name()))
}
