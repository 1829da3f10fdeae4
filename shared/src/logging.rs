//! The error log: `env_logger` formats, this file decides where a line goes.
//!
//! The master writes its few lines itself. A worker hands them to a writer thread through a bounded
//! channel, so that a slow disk or a full pipe never holds up its sessions; a line that does not fit is
//! dropped and counted.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
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

/// How long the writer thread waits at once for a pipe or a syslog server whose reader has not read what it has.
const READER_RETRY: Duration = Duration::from_millis(100);
/// How long a process without a writer thread waits for it, once in a row.
const READER_PATIENCE: Duration = Duration::from_millis(20);

/// What is told of lines that were dropped: how many.
type OnDrop = Box<dyn Fn(u64) + Send + Sync>;

static OUTPUT: RwLock<Option<Arc<Output>>> = RwLock::new(None);
static WRITER: OnceLock<Writer> = OnceLock::new();
static ON_DROP: OnceLock<OnDrop> = OnceLock::new();
/// The last line was dropped because its reader does not read.
static STUCK: AtomicBool = AtomicBool::new(false);

struct Writer {
    lines: Sender<Item>,
    /// Lines that were handed over, and of which nobody knows yet what becomes of them.
    waiting: AtomicU64,
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
                writer.waiting.fetch_add(1, Relaxed);
                if writer.lines.try_send(Item::Line(line.to_vec())).is_err() {
                    writer.waiting.fetch_sub(1, Relaxed);
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
    let Some(output) = output() else {
        return drop(io::stderr().write_all(line));
    };
    let once = || output.write_line(severity(line), line);
    let written = once().or_else(|error| {
        // The master has more to do than to wait for somebody else's program, each time anew.
        if error.kind() != io::ErrorKind::WouldBlock || STUCK.load(Relaxed) {
            return Err(error);
        }
        output.wait(READER_PATIENCE);
        once()
    });
    STUCK.store(written.is_err(), Relaxed);
    if written.is_err()
        && let Some(told) = ON_DROP.get()
    {
        told(1);
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
        waiting: AtomicU64::new(0),
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
    while !rest.is_empty() {
        // Asked for anew each time, because another log may be in force meanwhile.
        let output = output();
        let (some, others) = rest.split_at(together(output.as_deref(), rest));
        let written = match output.as_deref() {
            Some(Output::Syslog(syslog)) => syslog.send_as(severity(&some[0]), &some[0]),
            Some(Output::File(file) | Output::Pipe(file)) => (&*file).write_all(&some.concat()),
            None => io::stderr().write_all(&some.concat()),
        };
        match (written, output) {
            (Ok(()), _) => rest = others,
            (Err(error), Some(output)) if error.kind() == io::ErrorKind::WouldBlock => {
                output.wait(READER_RETRY)
            }
            (Err(_), _) => (dropped, rest) = (dropped + some.len() as u64, others),
        }
    }
    let Some(writer) = WRITER.get() else { return };
    // Those of a process that exits, and has waited for long enough, are counted already.
    let taken = writer.waiting.fetch_update(Relaxed, Relaxed, |waiting| {
        waiting.checked_sub(lines.len() as u64)
    });
    if dropped > 0 && taken.is_ok() {
        (writer.on_drop)(dropped);
    }
}

/// How many of the lines are written at once.
fn together(output: Option<&Output>, lines: &[Vec<u8>]) -> usize {
    let limit = output.map_or(usize::MAX, Output::at_once);
    let ends = lines.iter().scan(0, |end, line| {
        *end += line.len();
        Some(*end)
    });
    ends.take_while(|end| *end <= limit).count().max(1)
}

/// Waits until all lines logged so far are written, or for two seconds; those that are not written then are counted as
/// dropped. For a process that exits.
pub fn flush() {
    if let Some(writer) = WRITER.get() {
        let (done, written) = bounded(1);
        let flushed = writer
            .lines
            .send_timeout(Item::Flush(done), FLUSH_PATIENCE)
            .is_ok()
            && written.recv_timeout(FLUSH_PATIENCE).is_ok();
        let lost = match flushed {
            true => 0,
            false => writer.waiting.swap(0, Relaxed),
        };
        if lost > 0 {
            (writer.on_drop)(lost);
        }
    }
}
