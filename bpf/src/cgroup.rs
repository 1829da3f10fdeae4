//! The cgroup that the `sock_ops` programs are attached to: one of the program's own below the one that it
//! was started in, so that they see its sockets and nobody else's. Where none can be made (a read-only
//! cgroup file system in a container), the one that it was started in.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Begins the names of cgroups that masters make.
const PREFIX: &str = "culvert-";

/// How often a cgroup is made: whoever starts at the same moment may take it for an abandoned one.
const TRIES: u32 = 5;

/// A cgroup (version 2) that this process, and so every socket and worker that it makes, belongs to.
pub struct Cgroup {
    path: PathBuf,
    directory: File,
    /// The cgroup that it was started in, if `path` is one of our own.
    parent: Option<PathBuf>,
    /// Why it is not.
    shared: Option<String>,
    /// The process that made it: a forked worker must not remove it.
    maker: u32,
}

impl Cgroup {
    /// Moves this process into a cgroup of its own, if that is allowed; else uses the present one. A socket belongs to
    /// the cgroup that its maker was in, one that was accepted to that of its listener: so this comes before the first.
    ///
    /// # Errors
    /// There are no cgroups of version 2.
    pub fn enter() -> Result<Cgroup> {
        let present = present()?;
        match make_own(&present) {
            Ok(own) => Cgroup::of(own, Some(present), None),
            Err(error) => Cgroup::of(present, None, Some(error.to_string())),
        }
    }

    /// The present one, where what is to be seen is in it already.
    ///
    /// # Errors
    /// There are no cgroups of version 2.
    pub fn stay() -> Result<Cgroup> {
        Cgroup::of(present()?, None, None)
    }

    /// The cgroup that the program before this one, in the same process, has entered.
    ///
    /// # Errors
    /// It is not there.
    pub fn take_over(path: PathBuf, parent: Option<PathBuf>) -> Result<Cgroup> {
        Cgroup::of(path, parent, None)
    }

    fn of(path: PathBuf, parent: Option<PathBuf>, shared: Option<String>) -> Result<Cgroup> {
        let directory =
            File::open(&path).with_context(|| format!("failed to open the cgroup {}", path.display()))?;
        Ok(Cgroup {
            path,
            directory,
            parent,
            shared,
            maker: std::process::id(),
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The cgroup that the program was started in, if this one is its own.
    pub fn parent(&self) -> Option<&Path> {
        self.parent.as_deref()
    }

    /// Why there is none of its own.
    pub fn shared(&self) -> Option<&str> {
        self.shared.as_deref()
    }

    /// The cgroup's directory.
    pub fn directory(&self) -> &File {
        &self.directory
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Some(parent) = self.parent.as_ref().filter(|_| self.maker == std::process::id()) {
            // What cannot be removed, because a worker is still in it or because the right to is given up
            // (`parent` is the root of all, which nobody may write to), is removed by the next start.
            let _ = join(parent);
            let _ = fs::remove_dir(&self.path);
        }
    }
}

/// The directory of the cgroup that this process is in.
fn present() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("failed to read /proc/self/mounts")?;
    let root = mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            Some((fields.next()?, fields.next()?))
        })
        .find(|(_, kind)| *kind == "cgroup2")
        .map(|(path, _)| PathBuf::from(path))
        .context("no cgroup2 file system is mounted, which sock_ops programs are attached through")?;
    let groups = fs::read_to_string("/proc/self/cgroup").context("failed to read /proc/self/cgroup")?;
    let own = groups
        .lines()
        .find_map(|line| line.strip_prefix("0::"))
        .unwrap_or("/");
    Ok(root.join(own.trim_start_matches('/')))
}

fn make_own(present: &Path) -> io::Result<PathBuf> {
    remove_abandoned(present);
    let path = present.join(format!("{PREFIX}{}", std::process::id()));
    let mut tries = 1;
    loop {
        fs::create_dir(&path)?;
        match join(&path) {
            Ok(()) => return Ok(path),
            Err(_) if !path.exists() && tries < TRIES => tries += 1,
            Err(error) => {
                let _ = fs::remove_dir(&path);
                return Err(error);
            }
        }
    }
}

fn join(path: &Path) -> io::Result<()> {
    fs::write(path.join("cgroup.procs"), std::process::id().to_string())
}

/// Removes what killed masters left. A cgroup with processes in it cannot be removed; an empty one of another name is
/// somebody else's, who may be about to use it.
fn remove_abandoned(present: &Path) {
    for entry in fs::read_dir(present).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
        if number.is_some_and(|number| number.parse::<u32>().is_ok()) {
            let _ = fs::remove_dir(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_cgroups_that_a_master_made_are_taken_for_abandoned() {
        let present = std::env::temp_dir().join(format!("culvert-cgroups-{}", std::process::id()));
        let names = [
            "culvert-17",
            "culvert-17.slice",
            "culvert-backup",
            "culvert-",
            "other",
        ];
        for name in names {
            fs::create_dir_all(present.join(name)).expect("a directory");
        }
        remove_abandoned(&present);
        let left = names.map(|name| present.join(name).exists());
        fs::remove_dir_all(&present).expect("removing the directories");
        assert_eq!(left, [false, true, true, true, true]);
    }
}
