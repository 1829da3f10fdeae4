//! Process calls that are unsafe to make: fork and closing descriptors by number.

use std::os::fd::RawFd;

use anyhow::{Context, Result};
use nix::libc;
use nix::unistd::{ForkResult, Pid, fork};

/// Which process a call to [`fork_here`] returned in.
pub enum Side {
    /// The parent, with the child's process id.
    Parent(Pid),
    /// The child.
    Child,
}

/// Forks a process that has one thread, which is what the master promises to be: it starts no thread,
/// and workers start theirs only after they were forked. An error is returned if there is a second one.
pub fn fork_here() -> Result<Side> {
    let threads = std::fs::read_dir("/proc/self/task")
        .map(|tasks| tasks.count())
        .unwrap_or(1);
    anyhow::ensure!(
        threads == 1,
        "refusing to fork: this process has {threads} threads, a child would inherit their locks"
    );
    // SAFETY: with a single thread no lock can be held by a thread that the child lacks, so the child
    // may go on using all of the standard library.
    match unsafe { fork() }.context("failed to fork a worker")? {
        ForkResult::Parent { child } => Ok(Side::Parent(child)),
        ForkResult::Child => Ok(Side::Child),
    }
}

/// Closes every descriptor from 3 up that is not in `keep`. For a freshly forked child whose memory
/// still names descriptors of its parent: what is closed here must not be used or dropped afterwards,
/// so the child has to leave by `std::process::exit`.
pub fn close_all_except(keep: &[RawFd]) {
    let mut keep: Vec<RawFd> = keep.iter().copied().filter(|fd| *fd >= 3).collect();
    keep.sort_unstable();
    keep.dedup();
    let mut first = 3;
    for fd in keep.into_iter().chain([RawFd::MAX]) {
        if first < fd {
            let last = if fd == RawFd::MAX {
                u32::MAX
            } else {
                (fd - 1) as u32
            };
            // SAFETY: close_range(2) takes plain numbers; the caller gives these descriptors up.
            unsafe { libc::syscall(libc::SYS_close_range, first as u32, last, 0u32) };
        }
        first = fd.saturating_add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn a_test_runner_has_threads_so_forking_is_refused() {
        assert!(fork_here().is_err());
    }

    #[test]
    fn keeping_every_open_descriptor_closes_none() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let keep: Vec<RawFd> = (3..65_536).collect();
        close_all_except(&keep);
        assert!(nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_GETFD).is_ok());
        assert!(file.as_raw_fd() >= 3);
    }
}
