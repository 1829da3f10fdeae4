//! One running proxy: the real binary with its own configuration. Waits until it serves, signals it,
//! reads its status and its log, and leaves no process behind, however the test ends.

use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::plan::{Plan, Scratch};
use super::ports::Port;
use super::program::Finished;
use super::status::Status;
use super::{PATIENCE, patient, process, program, watchdog, within};

/// A running `master -c FILE`.
#[derive(Debug)]
pub struct Proxy {
    child: Child,
    command: Vec<String>,
    lifetime: Duration,
    binary: PathBuf,
    scratch: Scratch,
    status: SocketAddr,
    workers: usize,
    ended: bool,
    _ports: Vec<Port>,
}

impl Proxy {
    /// Writes the file, starts the binary and waits until every worker is in the status and serves.
    #[track_caller]
    pub fn start(plan: Plan) -> Proxy {
        let file = plan.scratch.file("proxy.toml");
        std::fs::write(&file, plan.text()).expect("writing the configuration");
        Proxy::start_file(plan, &file)
    }

    /// The same with a file that exists already and has the plan's status listener.
    #[track_caller]
    pub fn start_file(plan: Plan, file: &Path) -> Proxy {
        let log = std::fs::File::create(plan.scratch.file("stderr.log")).expect("creating the log file");
        let mut command = plan.launcher.clone();
        command.push(plan.binary.display().to_string());
        command.extend(["-c".to_owned(), file.display().to_string()]);
        let mut proxy = Proxy {
            child: spawn(&command, log),
            command,
            lifetime: plan.lifetime,
            binary: plan.binary,
            scratch: plan.scratch,
            status: plan.status,
            workers: plan.workers,
            ended: false,
            _ports: plan.ports,
        };
        watchdog::watch(proxy.pid(), proxy.lifetime);
        proxy.wait_until_serving(|_, worker| worker > 0);
        proxy
    }

    /// Starts it once more after it has ended, on the same file; its log goes on.
    #[track_caller]
    pub fn start_again(&mut self) {
        assert!(self.ended, "the program still runs");
        let log = std::fs::File::options()
            .append(true)
            .open(self.scratch.file("stderr.log"));
        self.child = spawn(&self.command, log.expect("the log file"));
        self.ended = false;
        watchdog::watch(self.pid(), self.lifetime);
        // Workers that a killed master has left behind may still answer for a moment.
        self.wait_until_serving(|master, worker| process::children(master).contains(&worker));
    }

    #[track_caller]
    fn wait_until_serving(&mut self, is_one: impl Fn(i32, i32) -> bool) {
        let mut last = String::new();
        let serving = within(PATIENCE * 2, || {
            if let Some(exit) = self.child.try_wait().expect("asking for the exit status") {
                self.ended = true;
                panic!(
                    "the proxy ended at its start with {exit}; its log:\n{}",
                    self.log()
                );
            }
            match Status::fetch(self.status) {
                Ok(status) => {
                    let workers = status.workers();
                    last = format!("{workers:?}");
                    workers.len() == self.workers
                        && workers
                            .iter()
                            .all(|w| is_one(self.pid(), w.pid) && process::is_past_its_start(w.pid))
                }
                Err(e) => {
                    last = e;
                    false
                }
            }
        });
        assert!(serving, "the proxy does not serve: {last}");
    }

    /// The master's process id.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("a process id")
    }

    /// Where its status is to be had.
    pub fn status_address(&self) -> SocketAddr {
        self.status
    }

    /// The directory with its configuration, pid file and logs.
    pub fn dir(&self) -> &Path {
        self.scratch.path()
    }

    /// The configuration file, where the plan wrote it.
    pub fn file(&self) -> PathBuf {
        self.scratch.file("proxy.toml")
    }

    /// Changes the configuration file: `from`, which must stand in it, becomes `to`.
    #[track_caller]
    pub fn edit(&self, from: &str, to: &str) {
        let text = std::fs::read_to_string(self.file()).expect("the configuration");
        assert!(text.contains(from), "the configuration has no {from:?}:\n{text}");
        std::fs::write(self.file(), text.replace(from, to)).expect("writing the configuration");
    }

    /// Sends HUP and waits until the next generation alone takes connections; returns its status. The number of the
    /// generation changes before the old workers have read that they are to take no more, and until then they may be who
    /// accepts, and who answers.
    #[track_caller]
    pub fn reload(&self) -> Status {
        let before = self.status().generation();
        self.signal(Signal::SIGHUP);
        self.wait("the next generation alone takes connections", |s| {
            let next = s.generation();
            next > before && s.workers().iter().all(|w| w.draining || w.generation == next)
        });
        self.status()
    }

    /// Everything on stderr so far.
    pub fn log(&self) -> String {
        let bytes = std::fs::read(self.scratch.file("stderr.log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until the log has this text: a thread of its own writes what a worker says.
    #[track_caller]
    pub fn must_say(&self, text: &str) {
        let said = within(PATIENCE, || self.log().contains(text));
        assert!(said, "{text:?} is not in the log:\n{}", self.log());
    }

    /// The status now; asks again for some seconds where a worker has just died.
    #[track_caller]
    pub fn status(&self) -> Status {
        let end = Instant::now() + patient(PATIENCE);
        loop {
            match Status::fetch(self.status) {
                Ok(status) => return status,
                Err(e) if Instant::now() > end => panic!("no status: {e}"),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    /// The process id of the one worker that serves.
    #[track_caller]
    pub fn worker(&self) -> i32 {
        let mut workers = self.status().workers();
        workers.retain(|worker| !worker.draining);
        assert_eq!(workers.len(), 1, "one worker: {workers:?}");
        workers[0].pid
    }

    /// Waits until the status fulfils `question`, and returns it.
    #[track_caller]
    pub fn wait(&self, what: &str, question: impl Fn(&Status) -> bool) -> Status {
        let end = Instant::now() + patient(PATIENCE);
        loop {
            let status = self.status();
            if question(&status) {
                return status;
            }
            assert!(
                Instant::now() < end,
                "waited in vain until {what}; the status: {:#}",
                status.json()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until no session is left, and returns the status.
    #[track_caller]
    pub fn settle(&self) -> Status {
        self.wait("no session is left and no slot used", |s| {
            s.active() == 0 && s.slots_used() == 0
        })
    }

    /// Sends a signal to the master.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).expect("signalling the master");
    }

    /// `master -s WORD -c FILE`, run to its end.
    pub fn command(&self, word: &str) -> Finished {
        let file = self.file();
        let mut command = Command::new(&self.binary);
        command.args(["-s", word, "-c"]).arg(file);
        program::run(command, PATIENCE)
    }

    /// Waits until the master has ended; None if it still runs after `limit`.
    pub fn wait_for_exit(&mut self, limit: Duration) -> Option<ExitStatus> {
        let mut exit = None;
        within(limit, || {
            exit = self.child.try_wait().expect("asking for the exit status");
            exit.is_some()
        });
        if exit.is_some() {
            self.ended = true;
            watchdog::forget(self.pid());
        }
        exit
    }

    /// Stops the proxy with TERM and checks that it ends well: at once, with code 0, its workers gone.
    #[track_caller]
    pub fn stop(&mut self) {
        let workers = process::children(self.pid());
        self.signal(Signal::SIGTERM);
        let exit = self
            .wait_for_exit(PATIENCE)
            .expect("the master must end after TERM");
        assert_eq!(
            exit.code(),
            Some(0),
            "after TERM the master ended with {exit} (signal {:?})",
            exit.signal()
        );
        let gone = within(Duration::from_secs(10), || {
            workers.iter().all(|&w| !process::is_alive(w))
        });
        assert!(gone, "workers outlived their master: {workers:?}");
    }
}

fn spawn(command: &[String], log: std::fs::File) -> Child {
    Command::new(&command[0])
        .args(&command[1..])
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap_or_else(|e| panic!("failed to start {}: {e}", command[0]))
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the proxy's log:\n{}", self.log());
            if !self.ended {
                watchdog::kill_family(self.pid());
                let _ = self.child.wait();
                watchdog::forget(self.pid());
            }
        } else if !self.ended {
            self.stop();
        }
    }
}
