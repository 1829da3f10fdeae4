//! The thread that writes an access log: takes whole batches of lines from the worker, and is alone in waiting
//! for the disk. Knows nothing of sessions.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use crossbeam::channel::{Sender, bounded};
use culvert_shared::output::{Output, SyslogOutput};

/// Bytes that may wait for a slow disk, for each log and worker: some seconds of lines at full speed.
pub const QUEUED_BYTES: usize = 8 << 20;
/// Batches that may wait.
const QUEUED_BATCHES: usize = 8192;
/// How long a file that cannot take bytes at the moment is left alone.
const RETRY: Duration = Duration::from_millis(10);
/// After which time a syslog server that takes no line is asked again, if it is still the one to ask.
const SYSLOG_RETRY: Duration = Duration::from_millis(100);

/// Lines, each with its end.
#[derive(Debug, Default)]
pub struct Batch {
    /// Their bytes.
    pub bytes: Vec<u8>,
    /// How many they are.
    pub lines: u64,
}

/// What became of lines: written, dropped.
pub type Report = dyn Fn(u64, u64) + Send + Sync;

enum Item {
    Batch(Batch),
    Flush(Sender<()>),
}

/// The worker's end of one log.
pub struct LogWriter {
    items: Sender<Item>,
    queued_bytes: Arc<AtomicUsize>,
    output: Arc<RwLock<Arc<Output>>>,
    report: Arc<Report>,
}

impl LogWriter {
    /// Starts the thread.
    pub fn start(output: Output, report: Arc<Report>) -> Result<LogWriter> {
        let (items, queue) = bounded(QUEUED_BATCHES);
        let queued_bytes = Arc::new(AtomicUsize::new(0));
        let output = Arc::new(RwLock::new(Arc::new(output)));
        let mut out = Out {
            output: Arc::clone(&output),
            torn: None,
        };
        let (queued, told) = (Arc::clone(&queued_bytes), Arc::clone(&report));
        std::thread::Builder::new()
            .name("access-log".into())
            .spawn(move || {
                for item in queue {
                    match item {
                        Item::Batch(batch) => {
                            let written = out.write(&batch);
                            queued.fetch_sub(batch.bytes.len(), Relaxed);
                            told(written, batch.lines - written);
                        }
                        Item::Flush(done) => drop(done),
                    }
                }
            })
            .context("failed to start the writer thread of an access log")?;
        Ok(LogWriter {
            items,
            queued_bytes,
            output,
            report,
        })
    }

    /// Hands lines over, or drops them when too much is waiting.
    pub fn write(&self, batch: Batch) {
        let (bytes, lines) = (batch.bytes.len(), batch.lines);
        if self.queued_bytes.fetch_add(bytes, Relaxed) + bytes > QUEUED_BYTES
            || self.items.try_send(Item::Batch(batch)).is_err()
        {
            self.queued_bytes.fetch_sub(bytes, Relaxed);
            (self.report)(0, lines);
        }
    }

    /// Sends all lines that are not yet written there.
    pub fn set_output(&self, output: Output) {
        *self.output.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(output);
    }

    /// Waits until what was handed over is written, or until `deadline`.
    pub fn flush(&self, deadline: Instant) {
        let (done, written) = bounded(0);
        if self.items.send_deadline(Item::Flush(done), deadline).is_ok() {
            let _ = written.recv_deadline(deadline);
        }
    }
}

/// Where the thread writes.
struct Out {
    output: Arc<RwLock<Arc<Output>>>,
    /// The file that ends in the middle of a line, because it took no more.
    torn: Option<Arc<Output>>,
}

impl Out {
    /// Says how many lines were written whole.
    fn write(&mut self, batch: &Batch) -> u64 {
        let mut rest = batch.bytes.as_slice();
        let mut lost = 0;
        let mut last = self.output();
        while !rest.is_empty() {
            // Looked at each time: what the old file does not take may go to the new one.
            let output = self.output();
            let mut done = batch.bytes.len() - rest.len();
            if !Arc::ptr_eq(&output, &last) {
                // A line that was cut there is written again here, whole.
                done = start_of_line(&batch.bytes, done);
                rest = &batch.bytes[done..];
                last = Arc::clone(&output);
            }
            let step = match &*output {
                Output::File(file) => self.write_some(&output, file, rest),
                Output::Syslog(syslog) => send_line(syslog, rest),
            };
            match step {
                Step::Done(bytes) => rest = &rest[bytes..],
                Step::Lost(bytes) => (rest, lost) = (&rest[bytes..], lost + 1),
                Step::Again => {}
                Step::End => {
                    if start_of_line(&batch.bytes, done) != done {
                        self.torn = Some(output);
                    }
                    break;
                }
            }
        }
        let done = &batch.bytes[..batch.bytes.len() - rest.len()];
        let lines = done.iter().filter(|byte| **byte == b'\n').count() as u64;
        lines.min(batch.lines).saturating_sub(lost)
    }

    fn write_some(&mut self, output: &Arc<Output>, mut file: &File, rest: &[u8]) -> Step {
        if self.torn.take_if(|torn| Arc::ptr_eq(torn, output)).is_some() && file.write(b"\n").is_err() {
            self.torn = Some(Arc::clone(output));
            return Step::End;
        }
        match file.write(rest) {
            Ok(0) => Step::End,
            Ok(written) => Step::Done(written),
            Err(error) if error.kind() == ErrorKind::Interrupted => Step::Again,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                std::thread::sleep(RETRY);
                Step::Again
            }
            Err(_) => Step::End,
        }
    }

    fn output(&self) -> Arc<Output> {
        Arc::clone(&self.output.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What became of the beginning of the lines that are left.
enum Step {
    /// So many bytes are written.
    Done(usize),
    /// So many bytes, a line, are dropped.
    Lost(usize),
    /// Nothing yet.
    Again,
    /// All of them are dropped.
    End,
}

/// Sends the first of the lines.
fn send_line(syslog: &SyslogOutput, rest: &[u8]) -> Step {
    let end = rest
        .iter()
        .position(|byte| *byte == b'\n')
        .map_or(rest.len(), |at| at + 1);
    match syslog.send(&rest[..end]) {
        Ok(()) => Step::Done(end),
        Err(error) if error.kind() == ErrorKind::WouldBlock => {
            syslog.wait(SYSLOG_RETRY);
            Step::Again
        }
        Err(_) => Step::Lost(end),
    }
}

/// Where the line begins that a place is in.
fn start_of_line(bytes: &[u8], at: usize) -> usize {
    bytes[..at]
        .iter()
        .rposition(|byte| *byte == b'\n')
        .map_or(0, |end| end + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::OwnedFd;
    use std::sync::atomic::AtomicU64;

    /// A writer on a pipe, and its counters of written and dropped lines.
    fn on_a_pipe() -> (LogWriter, std::io::PipeReader, Arc<[AtomicU64; 2]>) {
        let (reader, writer) = std::io::pipe().unwrap();
        let counts = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
        let told = Arc::clone(&counts);
        let report = move |written, dropped| {
            told[0].fetch_add(written, Relaxed);
            told[1].fetch_add(dropped, Relaxed);
        };
        let log =
            LogWriter::start(Output::File(File::from(OwnedFd::from(writer))), Arc::new(report)).unwrap();
        (log, reader, counts)
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    #[test]
    fn lines_that_do_not_fit_are_dropped_and_counted_and_nobody_waits() {
        let (log, mut reader, counts) = on_a_pipe();
        let started = Instant::now();
        let batches = 2 * QUEUED_BYTES as u64 / (64 << 10);
        for _ in 0..batches {
            let mut bytes = vec![b'x'; 64 << 10];
            bytes[65_535] = b'\n';
            log.write(Batch { bytes, lines: 1 });
        }
        assert!(started.elapsed() < Duration::from_secs(2));
        let dropped = counts[1].load(Relaxed);
        assert!(
            dropped > batches / 3 && dropped < batches,
            "{dropped} of {batches}"
        );
        let reading = std::thread::spawn(move || {
            let mut text = Vec::new();
            reader.read_to_end(&mut text).unwrap();
            text.iter().filter(|byte| **byte == b'\n').count() as u64
        });
        log.flush(soon());
        assert_eq!(counts[0].load(Relaxed) + dropped, batches);
        drop(log);
        assert_eq!(reading.join().unwrap() + dropped, batches);
    }

    #[test]
    fn what_a_full_disk_does_not_take_is_counted_as_dropped() {
        let (log, _reader, counts) = on_a_pipe();
        let full = File::options().write(true).open("/dev/full").unwrap();
        log.set_output(Output::File(full));
        let bytes = b"one\ntwo\n".to_vec();
        log.write(Batch { bytes, lines: 2 });
        log.flush(soon());
        assert_eq!([&counts[0], &counts[1]].map(|count| count.load(Relaxed)), [0, 2]);
    }

    #[test]
    fn lines_go_to_the_new_file_from_the_change_on() {
        let (log, mut old, _) = on_a_pipe();
        let (mut new, writer) = std::io::pipe().unwrap();
        let line = |text: &str| Batch {
            bytes: text.as_bytes().to_vec(),
            lines: 1,
        };
        log.write(line("old\n"));
        log.flush(soon());
        log.set_output(Output::File(File::from(OwnedFd::from(writer))));
        log.write(line("new\n"));
        log.flush(soon());
        drop(log);
        let mut text = [String::new(), String::new()];
        old.read_to_string(&mut text[0]).unwrap();
        new.read_to_string(&mut text[1]).unwrap();
        assert_eq!(text, ["old\n", "new\n"]);
    }
}
