//! The files of the access logs: opened by the master, handed to workers, which may not have the right to open
//! them themselves.

use std::collections::HashMap;
use std::fs::OpenOptions;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use culvert_shared::config::Config;
use culvert_shared::sys::local_time::local_time;

/// The files of one configuration, in the order of [`Config::access_logs`]. Cloning shares them.
#[derive(Clone, Default)]
pub struct AccessLogs(Vec<(PathBuf, Arc<OwnedFd>)>);

impl AccessLogs {
    /// Opens them; each is appended to, and created if need be.
    ///
    /// # Errors
    /// One of them cannot be opened.
    pub fn open(config: &Config) -> Result<AccessLogs> {
        // Workers have the time zone from here, because they may not open its file.
        local_time(0);
        let mut files = Files::default();
        let logs = config.access_logs();
        let open = logs
            .iter()
            .map(|log| Ok((log.path.clone(), files.get(&log.path)?)));
        open.collect::<Result<_>>().map(AccessLogs)
    }

    /// Copies for a worker to own.
    ///
    /// # Errors
    /// No more descriptors are to be had.
    pub fn duplicate(&self) -> Result<Vec<OwnedFd>> {
        let copies = self.0.iter().map(|(path, file)| {
            let what = || format!("failed to hand over the access log {}", path.display());
            file.try_clone().with_context(what)
        });
        copies.collect()
    }

    /// The files, in order.
    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.0.iter().map(|(_, file)| file.as_fd())
    }

    /// Opens the same paths anew; what cannot be opened stays as it is, and the log says so.
    pub fn reopen(&mut self, files: &mut Files) {
        for (path, file) in &mut self.0 {
            match files.get(path) {
                Ok(new) => *file = new,
                Err(error) => log::error!("the old access log goes on: {error:#}"),
            }
        }
    }
}

/// Files that were opened just now, each once.
#[derive(Default)]
pub struct Files(HashMap<PathBuf, Arc<OwnedFd>>);

impl Files {
    fn get(&mut self, path: &Path) -> Result<Arc<OwnedFd>> {
        if let Some(file) = self.0.get(path) {
            return Ok(Arc::clone(file));
        }
        let what = || format!("failed to open the access log {}", path.display());
        let file = Arc::new(open(path).with_context(what)?);
        self.0.insert(path.to_owned(), Arc::clone(&file));
        Ok(file)
    }
}

fn open(path: &Path) -> std::io::Result<OwnedFd> {
    // Opened for writing alone, a pipe that nobody reads yet would hold up the whole program.
    let is_pipe = std::fs::metadata(path).is_ok_and(|data| data.file_type().is_fifo());
    let file = OpenOptions::new()
        .read(is_pipe)
        .append(true)
        .create(true)
        .open(path)?;
    Ok(file.into())
}
