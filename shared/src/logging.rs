//! The error log: `env_logger` formats, this file decides where a line goes.
//!
//! The master writes its few lines itself. A worker hands them to a writer thread through a bounded
//! channel, so that a slow disk or a full pipe never holds up its sessions; a line that does not fit is
//! dropped and counted.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use anyhow::{Context, Result};
use crossbeam::channel::{Receiver, Sender, bounded};
use log::LevelFilter;

use crate::output::Output;

/// Lines that may wait for the writer thread: at 200 bytes a line, under 2 MiB.
const QUEUED_LINES: usize = 8192;
/// How long an exiting worker waits for its last lines to be written.
const FLUSH_PATIENCE: Duration = Duration::from_secs(2);

/// How long the writer thread waits at once for a syslog server that has not read what it has.
const SYSLOG_RETRY: Duration = Duration::from_millis(100);
/// How long a process without a writer thread waits for it, once in a row.
const SYSLOG_PATIENCE: Duration = Duration::from_millis(20);

/// What is told of lines that were dropped: how many.
type OnDrop = Box<dyn Fn(u64) + Send + Sync>;

static OUTPUT: RwLock<Option<Arc<Output>>> = RwLock::new(None);
static WRITER: OnceLock<Writer> = OnceLock::new();
static ON_DROP: OnceLock<OnDrop> = OnceLock::new();
/// The last line was dropped because the syslog server does not read.
static STUCK: AtomicBool = AtomicBool::new(false);

struct Writer {
    lines: Sender<Item>,
    on_drop: OnDrop,
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
                    (writer.on_drop)(1);
                }
            }
            None => write_here(line),
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn output() -> Option<Arc<Output>> {
    OUTPUT.read().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Writes a line in a process that has no writer thread. There is nowhere to report a failure of the log itself
/// but the counter.
fn write_here(line: &[u8]) {
    match output().as_deref() {
        Some(Output::Syslog(syslog)) => {
            let once = || syslog.send_as(severity(line), line);
            let sent = once().or_else(|error| {
                // The master has more to do than to wait for somebody else's program, each time anew.
                if error.kind() != io::ErrorKind::WouldBlock || STUCK.load(Relaxed) {
                    return Err(error);
                }
                syslog.wait(SYSLOG_PATIENCE);
                once()
            });
            STUCK.store(sent.is_err(), Relaxed);
            if sent.is_err()
                && let Some(told) = ON_DROP.get()
            {
                told(1);
            }
        }
        Some(Output::File(file)) => drop((&*file).write_all(line)),
        None => drop(io::stderr().write_all(line)),
    }
}

/// What a line says of itself, by the names that [`init`] writes, as a severity of syslog.
fn severity(line: &[u8]) -> u8 {
    let start = line.iter().position(|byte| *byte == b'[').map_or(0, |at| at + 1);
    match line.get(start) {
        Some(b'e') => 3,
        Some(b'w') => 4,
        Some(b'i') => 6,
        _ => 7,
    }
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

/// Sends all further lines there.
pub fn set_output(output: Output) {
    *OUTPUT.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(output));
}

/// Has this called, with their number, when lines of a process without a writer thread were dropped. Call once.
pub fn on_drop(told: impl Fn(u64) + Send + Sync + 'static) {
    let _ = ON_DROP.set(Box::new(told));
}

/// Starts the writer thread of this process. `on_drop` is told how many lines did not fit or were not taken.
pub fn start_writer(on_drop: impl Fn(u64) + Send + Sync + 'static) -> Result<()> {
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
        let mut bytes = 0;
        for item in std::iter::once(first).chain(queue.try_iter()) {
            match item {
                Item::Line(line) => {
                    bytes += line.len();
                    batch.push(line);
                }
                Item::Flush(done) => flushed = Some(done),
            }
            if flushed.is_some() || bytes > 64 * 1024 {
                break;
            }
        }
        write_batch(&batch);
        batch.clear();
        if let Some(done) = flushed {
            let _ = done.send(());
        }
    }
}

fn write_batch(lines: &[Vec<u8>]) {
    let mut dropped = 0;
    let mut rest = lines;
    while let Some((line, others)) = rest.split_first() {
        match output().as_deref() {
            Some(Output::Syslog(syslog)) => match syslog.send_as(severity(line), line) {
                Ok(()) => rest = others,
                // Asked for anew each time, because another log may be in force meanwhile.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => syslog.wait(SYSLOG_RETRY),
                Err(_) => (dropped, rest) = (dropped + 1, others),
            },
            Some(Output::File(file)) => return drop((&*file).write_all(&rest.concat())),
            None => return drop(io::stderr().write_all(&rest.concat())),
        }
    }
    if let Some(writer) = WRITER.get().filter(|_| dropped > 0) {
        (writer.on_drop)(dropped);
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
