//! The error log's destination: opened by the master, handed to workers, which may not have the right
//! to open it themselves.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use anyhow::{Context, Result};
use culvert_shared::config;
use culvert_shared::logging;

/// An opened log.
pub struct ErrorLog {
    output: OwnedFd,
}

impl ErrorLog {
    /// Opens what the configuration names. Lines go there only after [`ErrorLog::install`].
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn open(configured: &config::ErrorLog) -> Result<ErrorLog> {
        Ok(ErrorLog {
            output: logging::open(&configured.target)?,
        })
    }

    /// A log that another binary has opened.
    pub fn of(output: OwnedFd) -> ErrorLog {
        ErrorLog { output }
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
        logging::set_output(output);
        Ok(raw)
    }
}

impl AsFd for ErrorLog {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.output.as_fd()
    }
}
