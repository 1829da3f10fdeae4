//! The error log's destination: opened by the master, handed to workers, which may not have the right
//! to open it themselves.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use anyhow::{Context, Result};
use culvert_shared::config::{self, LogTarget, Syslog};
use culvert_shared::logging;
use culvert_shared::output::{self, Output};

/// An opened log.
pub struct ErrorLog {
    output: OwnedFd,
    target: LogTarget,
}

impl ErrorLog {
    /// Opens what the configuration names. Lines go there only after [`ErrorLog::install`].
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn open(configured: &config::ErrorLog) -> Result<ErrorLog> {
        Ok(ErrorLog {
            output: output::open(&configured.target)?,
            target: configured.target.clone(),
        })
    }

    /// A log that another binary has opened, for this configuration.
    pub fn of(output: OwnedFd, configured: &config::ErrorLog) -> ErrorLog {
        ErrorLog {
            output,
            target: configured.target.clone(),
        }
    }

    /// The syslog server that it is, if it is one.
    pub fn syslog(&self) -> Option<&Syslog> {
        match &self.target {
            LogTarget::Syslog(settings) => Some(settings),
            LogTarget::Stderr | LogTarget::File(_) => None,
        }
    }

    /// Sends the lines of this process to the log.
    ///
    /// # Errors
    /// No more descriptors are to be had.
    pub fn install(&self) -> Result<RawFd> {
        let output = self
            .output
            .try_clone()
            .context("failed to duplicate the error log's descriptor")?;
        let raw = output.as_raw_fd();
        logging::set_output(Output::of(output, &self.target));
        Ok(raw)
    }
}

impl AsFd for ErrorLog {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.output.as_fd()
    }
}
