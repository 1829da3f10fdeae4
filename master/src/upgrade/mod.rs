//! USR2: this process becomes the binary that now stands where it was started from. `document` is what is
//! handed over, `check` is what the new binary says when it is asked first, `take_over` how it goes on.
//!
//! Nothing is changed before the new binary has said that it can: it is asked in a process of its own, while
//! this one goes on serving. Then it is executed in place, so that workers stay children and the process id,
//! the pid file's lock and every descriptor that the document names stay as they are. It starts workers of its
//! own as at a reload, and those that run hand their sessions over to them.

pub mod check;
pub mod document;
mod state;
pub mod take_over;

use std::ffi::{CString, OsString};
use std::fs;
use std::io::{PipeReader, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use culvert_shared::counters::Board;
use culvert_shared::sys::inherit;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::WaitStatus;
use nix::unistd::{Pid, execve};

use crate::args::Args;
use crate::supervise::{Master, ending};
use document::Descriptors;

/// How long the new binary may think about it. It tries the kernel, which takes a tenth of a second.
const ANSWER_PATIENCE: Duration = Duration::from_secs(10);
/// How much of what it says is logged.
const WORDS: usize = 2000;

/// What the master needs to become another binary.
pub struct Upgrade {
    /// Where this one was started from, by the name that was used: a link may lead elsewhere by now.
    binary: PathBuf,
    /// The board's memory.
    board_file: OwnedFd,
    /// It was asked for during a reload.
    wanted: bool,
    attempt: Option<Attempt>,
}

/// The new binary is being asked.
struct Attempt {
    child: Pid,
    words: PipeReader,
    file: FileMark,
    /// When it is given up; `None`: it was.
    deadline: Option<Instant>,
    ended: Option<WaitStatus>,
}

/// Tells a file from one that replaced it or was written over it.
#[derive(Debug, PartialEq, Eq)]
struct FileMark([i64; 5]);

impl FileMark {
    fn of(path: &Path) -> Result<FileMark> {
        let file = fs::metadata(path).with_context(|| format!("failed to look at {}", path.display()))?;
        ensure!(file.is_file(), "{} is not a file", path.display());
        Ok(FileMark([
            file.dev() as i64,
            file.ino() as i64,
            file.size() as i64,
            file.mtime(),
            file.mtime_nsec(),
        ]))
    }
}

impl Upgrade {
    /// For a binary that was just started.
    ///
    /// # Errors
    /// It is not to be found out where it stands.
    pub fn new(board_file: OwnedFd) -> Result<Upgrade> {
        Ok(Upgrade::from(own_path()?, board_file))
    }

    fn from(binary: PathBuf, board_file: OwnedFd) -> Upgrade {
        Upgrade {
            binary,
            board_file,
            wanted: false,
            attempt: None,
        }
    }

    /// When something is to be done if nothing happens before.
    pub fn deadline(&self) -> Option<Instant> {
        self.attempt.as_ref().and_then(|attempt| attempt.deadline)
    }

    /// A process ended that is no worker.
    pub fn note_end(&mut self, pid: Pid, status: WaitStatus) {
        if let Some(attempt) = self.attempt.as_mut().filter(|attempt| attempt.child == pid) {
            attempt.ended = Some(status);
        }
    }

    /// Forgets it: the program does something else now.
    pub fn abandon(&mut self) {
        self.wanted = false;
        // The id of one that has ended may be another's by now.
        if let Some(attempt) = self.attempt.take().filter(|attempt| attempt.ended.is_none()) {
            let _ = kill(attempt.child, Signal::SIGKILL);
        }
    }
}

impl Master {
    /// Asks the new binary whether it can take over.
    pub fn begin_upgrade(&mut self, now: Instant) {
        if self.is_ending() {
            return log::warn!("upgrade ignored: the program is stopping");
        }
        if self.is_reloading() {
            self.upgrade.wanted = true;
            return log::info!("SIGUSR2: upgrading when the reload is over");
        }
        if self.upgrade.attempt.is_some() {
            return;
        }
        if !self.has_served {
            return self.refuse_upgrade("no worker has served yet");
        }
        log::info!("SIGUSR2: upgrading to {}", self.upgrade.binary.display());
        match self.ask(now) {
            Ok(attempt) => self.upgrade.attempt = Some(attempt),
            Err(error) => self.refuse_upgrade(&format!("{error:#}")),
        }
    }

    fn ask(&self, now: Instant) -> Result<Attempt> {
        let binary = &self.upgrade.binary;
        let file = FileMark::of(binary)?;
        let document = document::write(&self.to_state(&mut Descriptors::default(), now)?)?;
        let (words, said) = std::io::pipe().context("failed to make a pipe")?;
        fcntl(&words, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).context("failed to set up a pipe")?;
        let mut command = Command::new(binary);
        command
            .args(arguments(&self.args, "--take-over-check", &document))
            .stdin(Stdio::null())
            .stdout(said.try_clone().context("failed to duplicate a pipe")?)
            .stderr(said);
        inherit::set_inheritable([document.as_fd()], true)?;
        // Not waited for here: the loop reaps it with the workers.
        let child = command
            .spawn()
            .with_context(|| format!("failed to execute {}", binary.display()))?;
        Ok(Attempt {
            child: Pid::from_raw(child.id() as i32),
            words,
            file,
            deadline: Some(now + ANSWER_PATIENCE),
            ended: None,
        })
    }

    /// Goes on when the new binary has answered, gives it up when it takes too long.
    pub fn advance_upgrade(&mut self, now: Instant) {
        // Until a reload is over, two generations are about to be one.
        if !self.is_reloading() && std::mem::take(&mut self.upgrade.wanted) {
            self.begin_upgrade(now);
        }
        let Some(attempt) = &mut self.upgrade.attempt else {
            return;
        };
        if attempt.ended.is_none() {
            if attempt.deadline.is_some_and(|deadline| deadline <= now) {
                attempt.deadline = None;
                let _ = kill(attempt.child, Signal::SIGKILL);
            }
            return;
        }
        attempt.deadline = None;
        if self.is_reloading() {
            return;
        }
        let Some(attempt) = self.upgrade.attempt.take() else {
            return;
        };
        if let Err(error) = attempt.verdict().and_then(|file| self.execute(&file, now)) {
            self.refuse_upgrade(&format!("{error:#}"));
        }
    }

    /// Becomes the new binary. Returns only if that fails; everything is as before then.
    fn execute(&self, file: &FileMark, now: Instant) -> Result<()> {
        let binary = &self.upgrade.binary;
        ensure!(
            FileMark::of(binary)? == *file,
            "the file was replaced once more while it was asked: send SIGUSR2 again"
        );
        let mut descriptors = Descriptors::default();
        let document = document::write(&self.to_state(&mut descriptors, now)?)?;
        let own_name = std::env::args_os().next().unwrap_or_else(|| binary.into());
        let arguments: Vec<CString> = std::iter::once(own_name)
            .chain(arguments(&self.args, "--take-over", &document))
            .map(c_string)
            .collect::<Result<_>>()?;
        let environment: Vec<CString> = std::env::vars_os()
            .map(|(name, value)| c_string([name, value].join("=".as_ref())))
            .collect::<Result<_>>()?;
        let path = c_string(binary.into())?;
        let all = || descriptors.all().chain([document.as_fd()]);
        let executed = inherit::set_inheritable(all(), true).and_then(|()| {
            match execve(&path, &arguments, &environment) {
                Err(error) => Err(error).context("failed to execute it"),
                Ok(never) => match never {},
            }
        });
        inherit::set_inheritable(all(), false)?;
        executed
    }

    fn refuse_upgrade(&self, why: &str) {
        Board::add(&self.board[0].reloads_failed, 1);
        log::error!(
            "upgrade to {} refused, this binary goes on: {why}",
            self.upgrade.binary.display()
        );
    }
}

impl Attempt {
    fn verdict(self) -> Result<FileMark> {
        let Attempt {
            mut words,
            file,
            ended,
            ..
        } = self;
        let mut said = Vec::new();
        // Up to its end, or to what there is if a process that it left holds the other end.
        let _ = words.by_ref().take(64 * 1024).read_to_end(&mut said);
        let said = String::from_utf8_lossy(&said);
        let said: Vec<&str> = said
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
            .collect();
        let words: String = said.join("; ").chars().take(WORDS).collect();
        match ended {
            Some(WaitStatus::Exited(_, 0)) if said.last() == Some(&check::YES) => Ok(file),
            Some(WaitStatus::Exited(_, 0)) => {
                bail!("it is no culvert that could take over, it said \"{words}\"")
            }
            Some(WaitStatus::Exited(..)) if !words.is_empty() => bail!("{words}"),
            Some(WaitStatus::Signaled(_, Signal::SIGKILL, _)) | None => {
                bail!("it did not say within {ANSWER_PATIENCE:?} whether it can take over")
            }
            Some(status) => bail!("it {} when it was asked", ending(status)),
        }
    }
}

/// The command line of the new binary: the present one, and the document.
fn arguments(args: &Args, option: &str, document: &OwnedFd) -> Vec<OsString> {
    let mut all: Vec<OsString> = vec!["-c".into(), args.config.clone().into()];
    for set in &args.set {
        all.extend(["--set".into(), set.into()]);
    }
    all.extend([option.into(), document.as_raw_fd().to_string().into()]);
    all
}

fn c_string(text: OsString) -> Result<CString> {
    CString::new(text.into_vec()).context("an argument or an environment variable has a NUL in it")
}

/// The name that this binary was started by, if that still leads to it, else the kernel's name for it.
fn own_path() -> Result<PathBuf> {
    let given = std::env::args_os().next().unwrap_or_default();
    let candidates: Vec<PathBuf> = if given.as_bytes().contains(&b'/') {
        std::path::absolute(&given).into_iter().collect()
    } else {
        let folders = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&folders)
            .map(|folder| folder.join(&given))
            .collect()
    };
    let mark = |path: &Path| fs::metadata(path).map(|file| (file.dev(), file.ino())).ok();
    let own = mark(Path::new("/proc/self/exe"));
    match candidates
        .into_iter()
        .find(|path| own.is_some() && mark(path) == own)
    {
        Some(path) => Ok(path),
        None => std::env::current_exe().context("failed to find out where this binary stands"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attempt(said: &str, ended: Option<WaitStatus>) -> Result<FileMark> {
        use std::io::Write;
        let (words, mut writer) = std::io::pipe().unwrap();
        writer.write_all(said.as_bytes()).unwrap();
        drop(writer);
        let file = FileMark([0; 5]);
        let child = Pid::from_raw(1);
        Attempt {
            child,
            words,
            file,
            deadline: None,
            ended,
        }
        .verdict()
    }

    #[test]
    fn only_the_right_words_and_a_success_are_a_yes() {
        let exited = |code| Some(WaitStatus::Exited(Pid::from_raw(1), code));
        let killed = Some(WaitStatus::Signaled(Pid::from_raw(1), Signal::SIGKILL, false));
        let yes = format!("a warning\n{}\n", check::YES);
        assert!(attempt(&yes, exited(0)).is_ok());
        assert!(attempt(&yes, exited(1)).is_err());
        assert!(attempt(&yes, killed).is_err());
        let why = |said, ended| format!("{:#}", attempt(said, ended).unwrap_err());
        assert!(why("", exited(0)).contains("no culvert"));
        assert_eq!(why("first\n\nsecond\n", exited(1)), "first; second");
        assert!(why("", exited(3)).contains("exited with status 3"));
        assert!(why("", killed).contains("did not say within 10s"));
    }

    #[test]
    fn the_id_of_a_program_that_has_answered_and_ended_is_not_signalled() {
        let mut innocent = Command::new("sleep").arg("50").spawn().unwrap();
        let child = Pid::from_raw(innocent.id() as i32);
        let (board_file, _) = culvert_shared::sys::fdpass::pair().unwrap();
        let mut upgrade = Upgrade::from("/nonexistent".into(), board_file);
        let mut ask = |ended| {
            upgrade.attempt = Some(Attempt {
                child,
                words: std::io::pipe().unwrap().0,
                file: FileMark([0; 5]),
                deadline: None,
                ended,
            });
            upgrade.abandon();
        };
        ask(Some(WaitStatus::Exited(child, 0)));
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(innocent.try_wait().unwrap(), None);
        ask(None);
        assert!(!innocent.wait().unwrap().success(), "it still runs, and is asked");
    }

    #[test]
    fn a_file_that_took_the_place_of_another_is_told_from_it() {
        let path = std::env::temp_dir().join(format!("culvert-mark-{}", std::process::id()));
        fs::write(&path, "one").unwrap();
        let before = FileMark::of(&path).unwrap();
        assert_eq!(FileMark::of(&path).unwrap(), before);
        fs::remove_file(&path).unwrap();
        assert!(FileMark::of(&path).is_err());
        fs::write(&path, "other").unwrap();
        assert_ne!(FileMark::of(&path).unwrap(), before);
        fs::remove_file(&path).unwrap();
    }

    #[test]
    fn this_binary_is_found_where_it_was_started_from() {
        let own = own_path().unwrap();
        let exe = fs::metadata("/proc/self/exe").unwrap();
        assert_eq!(fs::metadata(own).unwrap().ino(), exe.ino());
    }
}
