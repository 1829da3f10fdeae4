//! Other programs: run to their end within a time limit, or kept running until the test ends.
//! A missing program is a failure that names the Debian package.

use std::fs::File;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::plan::{Plan, Scratch};
use super::{PATIENCE, watchdog, within};

/// How a program ended and what it wrote.
#[derive(Debug)]
pub struct Finished {
    /// The exit code; None if a signal or the time limit ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

/// Copies a program that is to be run at once. Another process does it: a file that is open for writing cannot be executed
/// (ETXTBSY), and whatever another test starts meanwhile would inherit this one's descriptor for an instant.
#[track_caller]
pub fn copy(from: &str, to: impl AsRef<std::path::Path>) {
    let status = Command::new("cp").arg(from).arg(to.as_ref()).status();
    assert!(
        status.as_ref().is_ok_and(std::process::ExitStatus::success),
        "copying {from}: {status:?}"
    );
}

/// Copies the program into a plan's directory and gives that to a user, to whom the build directory may be closed.
#[track_caller]
pub fn copy_for(user: u32, plan: &Plan) -> PathBuf {
    let binary = plan.file("master");
    copy(env!("CARGO_BIN_EXE_master"), &binary);
    std::fs::set_permissions(&binary, std::fs::Permissions::from_mode(0o755)).expect("permissions");
    let dir = binary.parent().expect("a directory");
    std::os::unix::fs::chown(dir, Some(user), Some(user)).expect("giving the directory away");
    binary
}

impl Finished {
    /// Panics unless it succeeded; returns its output.
    #[track_caller]
    pub fn must_succeed(self, what: &str) -> String {
        assert_eq!(self.code, Some(0), "{what} failed: {}\n{}", self.err, self.out);
        self.out
    }
}

/// Runs a program to its end, or kills it at the limit.
#[track_caller]
pub fn run(mut command: Command, limit: Duration) -> Finished {
    let scratch = Scratch::new();
    let (out, err) = (scratch.file("out"), scratch.file("err"));
    let name = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(File::create(&out).expect("a file for the output"))
        .stderr(File::create(&err).expect("a file for the errors"))
        .spawn()
        .unwrap_or_else(|e| panic!("failed to run {name}: {e}"));
    let mut exit = None;
    if !within(limit, || {
        exit = child.try_wait().expect("asking for the exit status");
        exit.is_some()
    }) {
        let _ = child.kill();
        let _ = child.wait();
    }
    let read = |path: PathBuf| String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned();
    let mut finished = Finished {
        code: exit.and_then(|e| e.code()),
        out: read(out),
        err: read(err),
    };
    if exit.is_none() {
        finished
            .err
            .push_str(&format!("\n({name} was killed after {limit:?})"));
    }
    finished
}

/// Runs a shell line to its end; it must succeed. `pipefail` makes every part of a pipe count.
#[track_caller]
pub fn shell(line: &str, limit: Duration) -> String {
    let mut command = Command::new("bash");
    command.args(["-c", &format!("set -euo pipefail; {line}")]);
    run(command, limit).must_succeed(line)
}

/// The path of a program, or a failure that names the package to install.
#[track_caller]
pub fn need(program: &str, package: &str) -> PathBuf {
    let path = std::env::var("PATH").unwrap_or_default();
    let postgres = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten();
    let mut places: Vec<PathBuf> = std::env::split_paths(&path).collect();
    places.extend(["/usr/sbin", "/usr/bin", "/sbin"].map(PathBuf::from));
    places.extend(postgres.map(|entry| entry.path().join("bin")));
    places
        .into_iter()
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
        .unwrap_or_else(|| panic!("{program} is not installed: apt-get install {package}"))
}

/// A program that runs in the background and ends with this value.
#[derive(Debug)]
pub struct Running {
    child: Child,
    stop_with: Signal,
    name: String,
    log: PathBuf,
    _scratch: Scratch,
}

impl Running {
    /// Starts the program.
    #[track_caller]
    pub fn start(mut command: Command) -> Running {
        let scratch = Scratch::new();
        let log = scratch.file("log");
        let file = File::create(&log).expect("a log file");
        let name = command.get_program().to_string_lossy().into_owned();
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone().expect("a second handle"))
            .stderr(file)
            .spawn()
            .unwrap_or_else(|e| panic!("failed to start {name}: {e}"));
        watchdog::watch(child.id() as i32, watchdog::LIFETIME * 2);
        Running {
            child,
            stop_with: Signal::SIGTERM,
            name,
            log,
            _scratch: scratch,
        }
    }

    /// The signal that ends it in good order.
    pub fn stopped_by(mut self, signal: Signal) -> Running {
        self.stop_with = signal;
        self
    }

    /// Waits until it accepts connections.
    #[track_caller]
    pub fn wait_for(mut self, address: SocketAddr) -> Running {
        let ready = within(PATIENCE * 2, || {
            if let Ok(Some(exit)) = self.child.try_wait() {
                panic!("{} ended at its start with {exit}: {}", self.name, self.log());
            }
            TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok()
        });
        assert!(
            ready,
            "{} does not listen on {address}: {}",
            self.name,
            self.log()
        );
        self
    }

    /// What it wrote so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("what {} wrote:\n{}", self.name, self.log());
        }
        if let Ok(None) = self.child.try_wait() {
            let _ = kill(Pid::from_raw(self.pid()), self.stop_with);
            if !within(Duration::from_secs(5), || {
                !matches!(self.child.try_wait(), Ok(None))
            }) {
                watchdog::kill_family(self.pid());
                let _ = self.child.wait();
            }
        }
        watchdog::forget(self.pid());
    }
}
