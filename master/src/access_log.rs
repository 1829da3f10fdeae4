//! The files of the access logs, and the sockets of those that go to syslog: opened by the master, handed to workers, which may not have the right to open
//! them themselves.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use anyhow::{Context, Result};
use culvert_shared::config::{Config, LogTarget};
use culvert_shared::output;
use culvert_shared::sys::local_time::local_time;

/// The files of one configuration, in the order of [`Config::access_logs`]. Cloning shares them.
#[derive(Clone, Default)]
pub struct AccessLogs(Vec<(LogTarget, Arc<OwnedFd>)>);

impl AccessLogs {
    /// Opens them; each is appended to, and created if need be.
    ///
    /// # Errors
    /// One of them cannot be opened.
    pub fn open(config: &Config) -> Result<AccessLogs> {
        AccessLogs::with(config, Files::default())
    }

    /// The same where some are open already.
    ///
    /// # Errors
    /// One of the others cannot be opened.
    pub fn with(config: &Config, mut files: Files) -> Result<AccessLogs> {
        // Workers have the time zone from here, because they may not open its file.
        local_time(0);
        let logs = config.access_logs();
        let open = logs
            .iter()
            .map(|log| Ok((log.target.clone(), files.get(&log.target)?)));
        open.collect::<Result<_>>().map(AccessLogs)
    }

    /// Copies for a worker to own.
    ///
    /// # Errors
    /// No more descriptors are to be had.
    pub fn duplicate(&self) -> Result<Vec<OwnedFd>> {
        let copies = self.0.iter().map(|(target, file)| {
            let what = || format!("failed to hand over the access log {}", target);
            file.try_clone().with_context(what)
        });
        copies.collect()
    }

    /// The names of the places, in order.
    pub fn names(&self) -> impl Iterator<Item = String> {
        self.0.iter().map(|(target, _)| target.to_string())
    }

    /// The files, in order.
    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.0.iter().map(|(_, file)| file.as_fd())
    }

    /// Opens the same places anew; what cannot be opened stays as it is, and the log says so.
    pub fn reopen(&mut self, files: &mut Files) {
        for (target, file) in &mut self.0 {
            match files.get(target) {
                Ok(new) => *file = new,
                Err(error) => log::error!("the old access log goes on: {error:#}"),
            }
        }
    }
}

/// Files that were opened just now, each once.
#[derive(Default)]
pub struct Files(HashMap<LogTarget, Arc<OwnedFd>>);

impl Files {
    /// Those that another binary has opened, by their names, as far as the configuration has them.
    pub fn of(config: &Config, opened: &HashMap<String, Arc<OwnedFd>>) -> Files {
        let logs = config.access_logs();
        let own = logs.iter().filter_map(|log| {
            let file = opened.get(&log.target.to_string())?;
            Some((log.target.clone(), Arc::clone(file)))
        });
        Files(own.collect())
    }

    fn get(&mut self, target: &LogTarget) -> Result<Arc<OwnedFd>> {
        if let Some(file) = self.0.get(target) {
            return Ok(Arc::clone(file));
        }
        let what = || format!("failed to open the access log {}", target);
        let file = match target {
            LogTarget::File(path) => output::open_file(path).with_context(what)?,
            LogTarget::Stderr | LogTarget::Syslog(_) => output::open(target)?,
        };
        let file = Arc::new(file);
        self.0.insert(target.clone(), Arc::clone(&file));
        Ok(file)
    }
}
