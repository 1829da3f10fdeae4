//! The start order, read top to bottom. What fails is reported by the caller; what was made before it is
//! undone by dropping it.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use culvert_bpf::Cgroup;
use culvert_shared::config::{Config, LogTarget};
use culvert_shared::counters::Board;
use culvert_shared::logging;
use culvert_shared::sys::shm::Shared;
use culvert_shared::sys::signals;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::args::Args;
use crate::check;
use crate::error_log::ErrorLog;
use crate::generation::Generation;
use crate::kernel::Kernel;
use crate::names::Names;
use crate::pidfile::PidFile;
use crate::retain;
use crate::steering::Steering;
use crate::supervise::{Master, Outside, now_ms};
use crate::tune;
use crate::upgrade::Upgrade;

/// The signals that the master acts on.
const SIGNALS: [Signal; 8] = [
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGHUP,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGWINCH,
    Signal::SIGCHLD,
];

/// Runs the program in the foreground until it is told to stop.
///
/// # Errors
/// It cannot be started.
pub fn run(args: Args) -> Result<ExitCode> {
    // First, because in a directory that nobody may write to, as the root of all is, it takes a right that is
    // dropped next; and because sockets belong to the cgroup that they were made in.
    let cgroup = Cgroup::enter();
    retain::drop_the_rest()?;
    let Some(config) = check::load(&args) else {
        return Ok(ExitCode::FAILURE);
    };

    // Whoever started this program may ignore the deaths of its children, which is inherited: then the kernel reaps them and
    // says nothing (do_notify_parent), and their ids may be others' at once. Not at an upgrade, which has it from here.
    signals::restore(&[Signal::SIGCHLD])?;
    // From here on a signal waits until the loop reads it, so none can interrupt the start half-way.
    let signals = take_signals()?;

    logging::init(config.error_log.level);
    let log = ErrorLog::open(&config.error_log)?;
    log.install()?;
    // Whoever looks for the reason looks there; standard error has it in any case.
    let is_elsewhere = config.error_log.target != LogTarget::Stderr;
    serve(args, config, cgroup, &signals, log).inspect_err(|error| {
        if is_elsewhere {
            log::error!("{error:#}");
        }
    })
}

/// All of it that comes when there is a log.
fn serve(
    args: Args,
    config: Config,
    cgroup: Result<Cgroup>,
    signals: &SignalFd,
    log: ErrorLog,
) -> Result<ExitCode> {
    retain::report(&config);
    tune::report(&config);

    let pid_file = PidFile::acquire(&config.pid)?;

    let (board, board_file) = Shared::<Board>::in_file(c"culvert-board", 1)?;
    let board = Arc::new(board);
    board[0].generation.store(1, Relaxed);
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .context("the clock is before 1970: set it")?;
    board[0].started_unix_ms.store(now.as_millis() as u64, Relaxed);
    board[0].started_ms.store(now_ms(), Relaxed);

    // Before anything listens, so that the first connections find peers.
    let mut names = Names::default();
    names.want([&config], Instant::now());
    names.wait_for_first();

    let mut kernel = Kernel::new(cgroup);
    let mut generation = Generation::first(config, &mut kernel)?;
    generation.publish(&mut names, &board[0], Instant::now());
    board[0].kept_limit.store(generation.keeper_room, Relaxed);
    let steering = Steering::begin(&generation.config);

    log::info!(
        "culvert {} serves with {} workers, process {}",
        env!("CARGO_PKG_VERSION"),
        generation.slots(),
        std::process::id()
    );
    let outside = Outside {
        log,
        pid_file,
        steering,
        upgrade: Upgrade::new(board_file)?,
    };
    let mut master = Master::new(args, generation, kernel, board, outside);
    master.names = names;
    master.run(signals)?;
    Ok(ExitCode::SUCCESS)
}

/// Blocks the signals that the master acts on, and makes the descriptor that it reads them from.
///
/// # Errors
/// No more descriptors are to be had.
pub fn take_signals() -> Result<SignalFd> {
    let set = SigSet::from_iter(SIGNALS);
    set.thread_block().context("failed to block signals")?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .context("failed to make a descriptor for signals")
}
