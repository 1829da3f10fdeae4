//! The pid file: who the running master is.
//!
//! The file is locked (flock) by the master for as long as it lives, so "alive and a master" is one
//! question to the kernel that a recycled process id cannot answer wrongly. The content is written
//! elsewhere and renamed into place: a reader never sees half a number.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::Pid;

/// A `-s` in another process holds the lock for a moment to look; a starting master outwaits it.
const LOOKERS_PATIENCE: Duration = Duration::from_millis(200);

/// In which a starting master has emptied the stale file that it has locked.
const EMPTIED_WITHIN: Duration = Duration::from_millis(20);

/// The pid file of this process; removed when dropped.
#[derive(Debug)]
pub struct PidFile {
    path: PathBuf,
    file: Flock<File>,
    owner: u32,
}

/// What a pid file says.
#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    /// A running master.
    Master(Pid),
    /// There is no such file.
    Missing,
    /// The file is there, but no master is behind it; with the number in it, if it is one.
    Stale(Option<Pid>),
}

impl PidFile {
    /// Writes this process's id; creates the folder if need be, replaces a stale file.
    ///
    /// # Errors
    /// A master is running with this file, or it cannot be written.
    pub fn acquire(path: &Path) -> Result<PidFile> {
        let what = || format!("failed to take the pid file {}", path.display());
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            fs::create_dir_all(folder).with_context(what)?;
        }
        // Whoever holds the lock on what the path names now is the one who may replace it.
        let before = lock_current(path).with_context(what)?;
        let mut new = path.as_os_str().to_owned();
        new.push(".new");
        let new = PathBuf::from(new);
        let placed = write_locked(&new).and_then(|file| fs::rename(&new, path).map(|()| file));
        // The disk may be full.
        let file = placed
            .inspect_err(|_| drop(fs::remove_file(&new)))
            .with_context(what)?;
        drop(before);
        Ok(PidFile {
            path: path.to_owned(),
            file,
            owner: std::process::id(),
        })
    }

    /// The pid file that this process has acquired before it executed another binary.
    ///
    /// # Errors
    /// It is not locked by this process.
    pub fn taken_over(path: PathBuf, file: OwnedFd) -> Result<PidFile> {
        let file = Flock::lock(File::from(file), FlockArg::LockExclusiveNonblock)
            .map_err(|(_, error)| error)
            .with_context(|| format!("failed to keep the pid file {}", path.display()))?;
        Ok(PidFile {
            path,
            file,
            owner: std::process::id(),
        })
    }

    /// Its descriptor, which holds the lock.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The path that it was acquired with.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // A forked child has a copy of this value, and an administrator may have put another file there.
        if self.owner == std::process::id() && same_file(&self.file, &self.path) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Looks at a pid file without changing it.
///
/// # Errors
/// It is there, but cannot be read.
pub fn look(path: &Path) -> Result<Found> {
    let what = || format!("failed to read the pid file {}", path.display());
    let file = match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Found::Missing),
        other => other.with_context(what)?,
    };
    let mut text = String::new();
    match Flock::lock(file, FlockArg::LockSharedNonblock) {
        Ok(mut stale) => {
            stale.read_to_string(&mut text).with_context(what)?;
            decide(&text, false).with_context(what)
        }
        Err((mut held, Errno::EWOULDBLOCK)) => {
            // By a master that runs, or by one that starts: then what stands in it is an old number, for a moment.
            std::thread::sleep(EMPTIED_WITHIN);
            held.read_to_string(&mut text).with_context(what)?;
            decide(&text, true).with_context(what)
        }
        Err((_, error)) => Err(error).with_context(what),
    }
}

fn decide(text: &str, locked: bool) -> Result<Found> {
    let pid = text.trim().parse().ok().filter(|pid| *pid > 0).map(Pid::from_raw);
    match (locked, pid) {
        (true, Some(pid)) => Ok(Found::Master(pid)),
        (true, None) => bail!("a master holds it, but it has no process id in it: try again in a moment"),
        (false, pid) => Ok(Found::Stale(pid)),
    }
}

/// Locks the file that the path names, creating an empty one if there is none.
fn lock_current(path: &Path) -> Result<Flock<File>> {
    let deadline = Instant::now() + LOOKERS_PATIENCE;
    loop {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o644)
            .open(path)?;
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            // Between open and lock another master may have renamed its own file into place.
            Ok(locked) if same_file(&locked, path) => {
                // Whoever looks now takes the lock for that of a master, and must not find another one's number.
                locked.set_len(0)?;
                return Ok(locked);
            }
            Ok(_) => {}
            Err((_, Errno::EWOULDBLOCK)) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err((_, Errno::EWOULDBLOCK)) => match text.trim() {
                "" => bail!("another master is starting with it"),
                pid => bail!(
                    "a master is running with it, process {pid}: stop that one first (master -s quit), or give \
                     this one a `pid` of its own"
                ),
            },
            Err((_, error)) => return Err(error.into()),
        }
    }
}

fn write_locked(path: &Path) -> std::io::Result<Flock<File>> {
    let _ = fs::remove_file(path);
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(path)?;
    let mut file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| error)?;
    writeln!(file, "{}", std::process::id())?;
    Ok(file)
}

fn same_file(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(ours), Ok(theirs)) => (ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Folder {
            let path = std::env::temp_dir().join(format!("culvert-{}-{name}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Folder(path)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_live_master_is_found_and_keeps_others_out() {
        let folder = Folder::new("live");
        let path = folder.0.join("deep/er/master.pid");
        let held = PidFile::acquire(&path).unwrap();
        let me = Pid::this();
        assert_eq!(look(&path).unwrap(), Found::Master(me));
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{me}\n"));
        let error = format!("{:#}", PidFile::acquire(&path).unwrap_err());
        assert!(
            error.contains(&format!("a master is running with it, process {me}")),
            "{error}"
        );
        drop(held);
        assert_eq!(look(&path).unwrap(), Found::Missing);
    }

    #[test]
    fn a_stale_file_is_reported_as_such_and_replaced() {
        let folder = Folder::new("stale");
        let path = folder.0.join("master.pid");
        // Process 1 is alive, but no master of ours: the lock tells, not the number.
        fs::write(&path, "1\n").unwrap();
        assert_eq!(look(&path).unwrap(), Found::Stale(Some(Pid::from_raw(1))));
        let held = PidFile::acquire(&path).unwrap();
        assert_eq!(look(&path).unwrap(), Found::Master(Pid::this()));
        assert_eq!(
            fs::read_dir(&folder.0).unwrap().count(),
            1,
            "nothing else is left in the folder"
        );
        drop(held);
    }

    #[test]
    fn the_number_in_a_stale_file_is_nobodys_while_a_master_starts() {
        let folder = Folder::new("starting");
        let path = folder.0.join("master.pid");
        fs::write(&path, "1\n").unwrap();
        let starting = lock_current(&path).unwrap();
        let error = format!("{:#}", look(&path).unwrap_err());
        assert!(error.contains("it has no process id in it"), "{error}");
        drop(starting);
        assert_eq!(look(&path).unwrap(), Found::Stale(None));
    }

    #[test]
    fn a_file_that_another_put_in_its_place_is_not_removed() {
        let folder = Folder::new("foreign");
        let path = folder.0.join("master.pid");
        let held = PidFile::acquire(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "not ours").unwrap();
        drop(held);
        assert_eq!(fs::read_to_string(&path).unwrap(), "not ours");
        assert_eq!(look(&path).unwrap(), Found::Stale(None));
    }

    #[test]
    fn what_is_no_process_id_is_never_signalled() {
        for text in ["", "0", "-1", "-4\n", "12a", "99999999999"] {
            assert_eq!(decide(text, false).unwrap(), Found::Stale(None));
            assert!(decide(text, true).is_err(), "{text:?}");
        }
        assert_eq!(decide(" 12\n", true).unwrap(), Found::Master(Pid::from_raw(12)));
    }
}
