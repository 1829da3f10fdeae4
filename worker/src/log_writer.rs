//! The thread that writes an access log: takes whole batches of lines from the worker, and is alone in waiting
//! for the disk. Knows nothing of sessions.

use std::io::{ErrorKind, Write};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use crossbeam::channel::{Sender, bounded};
use culvert_shared::output::Output;

/// Bytes that may wait for a slow disk, for each log and worker: some seconds of lines at full speed.
pub const QUEUED_BYTES: usize = 8 << 20;
/// Batches that may wait.
const QUEUED_BATCHES: usize = 8192;
/// After which time a reader that takes nothing is asked again, if it is still the one to ask.
const RETRY: Duration = Duration::from_millis(100);
/// Why lines are dropped of which nobody has tried to write any.
const TOO_SLOW: &str = "it does not take them as fast as they come";
/// Why those are that wait for a file when the process exits.
const TOO_LATE: &str = "it did not take them before the worker had to exit";

/// Lines, each with its end.
#[derive(Debug, Default)]
pub struct Batch {
    /// Their bytes.
    pub bytes: Vec<u8>,
    /// How many they are.
    pub lines: u64,
}

/// What became of lines: how many were written, how many were dropped, and why.
pub type Report = dyn Fn(u64, u64, &str) + Send + Sync;

enum Item {
    Batch(Batch),
    Flush(Sender<()>),
}

/// The worker's end of one log.
pub struct LogWriter {
    items: Sender<Item>,
    queued_bytes: Arc<AtomicUsize>,
    /// Lines that were handed over and not reported.
    waiting: Arc<AtomicU64>,
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
        let waiting = Arc::new(AtomicU64::new(0));
        let (queued, unreported, told) = (
            Arc::clone(&queued_bytes),
            Arc::clone(&waiting),
            Arc::clone(&report),
        );
        std::thread::Builder::new()
            .name("access-log".into())
            .spawn(move || {
                for item in queue {
                    match item {
                        Item::Batch(batch) => {
                            let (written, why) = out.write(&batch);
                            queued.fetch_sub(batch.bytes.len(), Relaxed);
                            let fewer = |waiting: u64| waiting.checked_sub(batch.lines);
                            // Otherwise they are given up already.
                            if unreported.fetch_update(Relaxed, Relaxed, fewer).is_ok() {
                                told(written, batch.lines - written, &why);
                            }
                        }
                        Item::Flush(done) => drop(done),
                    }
                }
            })
            .context("failed to start the writer thread of an access log")?;
        Ok(LogWriter {
            items,
            queued_bytes,
            waiting,
            output,
            report,
        })
    }

    /// Hands lines over, or drops them when too much is waiting.
    pub fn write(&self, batch: Batch) {
        let (bytes, lines) = (batch.bytes.len(), batch.lines);
        self.waiting.fetch_add(lines, Relaxed);
        if self.queued_bytes.fetch_add(bytes, Relaxed) + bytes > QUEUED_BYTES
            || self.items.try_send(Item::Batch(batch)).is_err()
        {
            self.queued_bytes.fetch_sub(bytes, Relaxed);
            self.waiting.fetch_sub(lines, Relaxed);
            (self.report)(0, lines, TOO_SLOW);
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

    /// The process exits: what is not written now never will be.
    pub fn give_up(&self) {
        match self.waiting.swap(0, Relaxed) {
            0 => {}
            lines => (self.report)(0, lines, TOO_LATE),
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
    /// Says how many lines were written whole, and why the others were not.
    fn write(&mut self, batch: &Batch) -> (u64, String) {
        let mut rest = batch.bytes.as_slice();
        let (mut lost, mut why) = (0, String::new());
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
            let some = &rest[..portion(rest, output.at_once())];
            match self.write_some(&output, some) {
                Ok(bytes) => rest = &rest[bytes..],
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => output.wait(RETRY),
                Err(error) => {
                    why = error.to_string();
                    if let Output::Syslog(_) = &*output {
                        // The next line may be taken.
                        (rest, lost) = (&rest[some.len()..], lost + 1);
                        continue;
                    }
                    if start_of_line(&batch.bytes, done) != done {
                        self.torn = Some(output);
                    }
                    break;
                }
            }
        }
        let done = &batch.bytes[..batch.bytes.len() - rest.len()];
        let lines = done.iter().filter(|byte| **byte == b'\n').count() as u64;
        (lines.min(batch.lines).saturating_sub(lost), why)
    }

    /// How many bytes of them are written.
    fn write_some(&mut self, output: &Arc<Output>, lines: &[u8]) -> std::io::Result<usize> {
        let mut file = match &**output {
            Output::Syslog(syslog) => return syslog.send(lines).map(|()| lines.len()),
            Output::File(file) | Output::Pipe(file) => file,
        };
        if self.torn.take_if(|torn| Arc::ptr_eq(torn, output)).is_some()
            && let Err(error) = file.write_all(b"\n")
        {
            self.torn = Some(Arc::clone(output));
            return Err(error);
        }
        match file.write(lines)? {
            0 => Err(ErrorKind::WriteZero.into()),
            written => Ok(written),
        }
    }

    fn output(&self) -> Arc<Output> {
        Arc::clone(&self.output.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// How much of the lines is written at once: whole ones up to a limit, or the first one.
fn portion(lines: &[u8], limit: usize) -> usize {
    let end = |lines: &[u8], at: Option<usize>| at.map_or(lines.len(), |at| at + 1);
    let Some(head) = lines.get(..limit) else {
        return lines.len();
    };
    let last = head.iter().rposition(|byte| *byte == b'\n');
    match last {
        Some(_) => end(head, last),
        None => end(lines, lines.iter().position(|byte| *byte == b'\n')),
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
    use std::fs::File;
    use std::io::{BufRead, BufReader, Read};
    use std::os::fd::OwnedFd;
    use std::sync::atomic::AtomicU64;

    /// A writer on a pipe, and its counters of written and dropped lines.
    fn on_a_pipe() -> (LogWriter, std::io::PipeReader, Arc<[AtomicU64; 2]>) {
        let (reader, writer) = std::io::pipe().unwrap();
        let counts = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
        let told = Arc::clone(&counts);
        let report = move |written, dropped, why: &str| {
            assert!(dropped == 0 || !why.is_empty());
            told[0].fetch_add(written, Relaxed);
            told[1].fetch_add(dropped, Relaxed);
        };
        let log = LogWriter::start(Output::of_file(OwnedFd::from(writer)), Arc::new(report)).unwrap();
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
        assert!(started.elapsed() < Duration::from_secs(10));
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
        log.set_output(Output::of_file(OwnedFd::from(writer)));
        log.write(line("new\n"));
        log.flush(soon());
        drop(log);
        let mut text = [String::new(), String::new()];
        old.read_to_string(&mut text[0]).unwrap();
        new.read_to_string(&mut text[1]).unwrap();
        assert_eq!(text, ["old\n", "new\n"]);
    }

    #[test]
    fn lines_of_several_writers_come_through_a_full_pipe_whole() {
        let (reader, writer) = std::io::pipe().unwrap();
        let end = OwnedFd::from(writer);
        let counted = |_, _, _: &str| {};
        let logs = [b'a', b'b'].map(|letter| {
            let output = Output::of_file(end.try_clone().unwrap());
            let log = LogWriter::start(output, Arc::new(counted)).unwrap();
            let mut line = vec![letter; 99];
            line.push(b'\n');
            for _ in 0..20 {
                let bytes = line.repeat(655);
                log.write(Batch { bytes, lines: 655 });
            }
            log
        });
        drop(end);
        let mut reader = BufReader::with_capacity(4096, reader);
        let mut line = Vec::new();
        for count in 0..2 * 20 * 655 {
            if count % 64 == 0 {
                // Both find it full.
                std::thread::sleep(Duration::from_micros(200));
            }
            line.clear();
            reader.read_until(b'\n', &mut line).unwrap();
            let first = line[0];
            assert!(
                line.len() == 100 && line[..99].iter().all(|byte| *byte == first),
                "line {count}: {}",
                String::from_utf8_lossy(&line)
            );
        }
        drop(logs);
    }

    #[test]
    fn what_is_not_written_when_the_process_exits_is_counted_as_dropped() {
        let (log, mut reader, counts) = on_a_pipe();
        let now = || [&counts[0], &counts[1]].map(|count| count.load(Relaxed));
        for _ in 0..5 {
            let mut bytes = vec![b'x'; 100_000];
            bytes[99_999] = b'\n';
            log.write(Batch { bytes, lines: 1 });
        }
        log.flush(Instant::now() + Duration::from_millis(50));
        log.give_up();
        assert_eq!(now(), [0, 5]);
        log.give_up();
        drop(log);
        // Nothing is counted twice, whatever comes through after all.
        reader.read_to_end(&mut Vec::new()).unwrap();
        assert_eq!(now(), [0, 5]);
    }
}
