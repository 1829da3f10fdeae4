//! The error log: `env_logger` formats, this file decides where a line goes.
//!
//! The master writes its few lines itself. A worker hands them to a writer thread through a bounded
//! channel, so that a slow disk or a full pipe never holds up its sessions; a line that does not fit is
//! dropped and counted.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use anyhow::{Context, Result};
use crossbeam::channel::{Receiver, Sender, bounded};
use log::LevelFilter;

use crate::config::LogTarget;

/// Lines that may wait for the writer thread: at 200 bytes a line, under 2 MiB.
const QUEUED_LINES: usize = 8192;
/// How long an exiting worker waits for its last lines to be written.
const FLUSH_PATIENCE: Duration = Duration::from_secs(2);

static OUTPUT: RwLock<Option<Arc<File>>> = RwLock::new(None);
static WRITER: OnceLock<Writer> = OnceLock::new();

struct Writer {
    lines: Sender<Item>,
    on_drop: Box<dyn Fn() + Send + Sync>,
}

enum Item {
    Line(Vec<u8>),
    Flush(Sender<()>),
}

struct Sink;

impl Write for Sink {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match WRITER.get() {
            Some(writer) => {
                if writer.lines.try_send(Item::Line(line.to_vec())).is_err() {
                    (writer.on_drop)();
                }
            }
            None => write_out(line),
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes to the log's descriptor. There is nowhere to report a failure of the log itself.
fn write_out(line: &[u8]) {
    let output = OUTPUT.read().unwrap_or_else(PoisonError::into_inner).clone();
    let _ = match output {
        Some(file) => (&*file).write_all(line),
        None => io::stderr().write_all(line),
    };
}

/// Installs the logger; lines go to standard error until [`set_output`] says otherwise. Call once.
pub fn init(level: LevelFilter) {
    let installed = env_logger::Builder::new()
        .filter_level(LevelFilter::Trace)
        .target(env_logger::Target::Pipe(Box::new(Sink)))
        .write_style(env_logger::WriteStyle::Never)
        .format(|buffer, record| {
            let time = buffer.timestamp_millis();
            let level = record.level().as_str().to_ascii_lowercase();
            writeln!(
                buffer,
                "{time} [{level}] {}: {}",
                std::process::id(),
                record.args()
            )
        })
        .try_init();
    debug_assert!(installed.is_ok(), "the logger is installed once");
    set_level(level);
}

/// Sets the least severe level that is written.
pub fn set_level(level: LevelFilter) {
    log::set_max_level(level);
}

/// Opens the place that the configuration names. A file is appended to, and created if need be.
pub fn open(target: &LogTarget) -> Result<OwnedFd> {
    match target {
        LogTarget::Stderr => io::stderr()
            .as_fd()
            .try_clone_to_owned()
            .context("failed to duplicate standard error"),
        LogTarget::File(path) => Ok(open_file(path)?.into()),
    }
}

fn open_file(path: &Path) -> Result<File> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .open(path)
        .with_context(|| format!("failed to open the log file {}", path.display()))
}

/// Sends all further lines to this descriptor.
pub fn set_output(output: OwnedFd) {
    *OUTPUT.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(File::from(output)));
}

/// Starts the writer thread of this process. `on_drop` is called for each line that did not fit.
pub fn start_writer(on_drop: impl Fn() + Send + Sync + 'static) -> Result<()> {
    let (lines, queue) = bounded(QUEUED_LINES);
    std::thread::Builder::new()
        .name("log".into())
        .spawn(move || write_all(&queue))
        .context("failed to start the log writer thread")?;
    let _ = WRITER.set(Writer {
        lines,
        on_drop: Box::new(on_drop),
    });
    Ok(())
}

fn write_all(queue: &Receiver<Item>) {
    let mut batch = Vec::new();
    while let Ok(first) = queue.recv() {
        let mut flushed = None;
        for item in std::iter::once(first).chain(queue.try_iter()) {
            match item {
                Item::Line(line) => batch.extend_from_slice(&line),
                Item::Flush(done) => flushed = Some(done),
            }
            if flushed.is_some() || batch.len() > 64 * 1024 {
                break;
            }
        }
        write_out(&batch);
        batch.clear();
        if let Some(done) = flushed {
            let _ = done.send(());
        }
    }
}

/// Waits until all lines logged so far are written, or for two seconds. For a process that exits.
pub fn flush() {
    if let Some(writer) = WRITER.get() {
        let (done, written) = bounded(1);
        if writer
            .lines
            .send_timeout(Item::Flush(done), FLUSH_PATIENCE)
            .is_ok()
        {
            let _ = written.recv_timeout(FLUSH_PATIENCE);
        }
    }
}
