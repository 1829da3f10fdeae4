//! The access logs of a worker: gathers the lines of ended sessions and hands them to the writer threads when
//! enough have come together, or have waited for long enough.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use culvert_shared::config::{AccessLog, Config};
use culvert_shared::counters::{Board, CloseReason};
use culvert_shared::output::Output;
use culvert_shared::sys::local_time::{LocalTime, local_time};
use culvert_shared::sys::shm::Shared;

use crate::access_line::{self, Carried, Ended, Host, Moment};
use crate::clock;
use crate::event_loop::{LOG_TIMER, Worker};
use crate::log_writer::{Batch, LogWriter};
use crate::session::Session;
use crate::sockets;

/// How long an exiting worker waits for its last lines to be written.
const FLUSH_PATIENCE: Duration = Duration::from_secs(2);
/// How long it is not said once more that a log loses lines (nginx: the same, ngx_stream_log_write).
const SAID_FOR_MS: u64 = 60_000;

/// The logs, in the order of [`Config::access_logs`].
pub struct AccessLogs {
    /// Those that have no writer yet, with their files.
    waiting: Vec<(Arc<AccessLog>, OwnedFd)>,
    logs: Vec<Log>,
    host: Host,
    /// The second of the last line, and what it is called here.
    second: (u64, LocalTime),
}

struct Log {
    configured: Arc<AccessLog>,
    writer: LogWriter,
    gathered: Batch,
    /// When they are handed over at the latest.
    due_ms: u64,
}

impl AccessLogs {
    /// The logs of a configuration; `files` are theirs, in order. Lines are written from [`AccessLogs::start`] on.
    pub fn new(config: &Config, files: Vec<OwnedFd>, slot: usize, hostname: &str) -> AccessLogs {
        AccessLogs {
            waiting: config.access_logs().into_iter().zip(files).collect(),
            logs: Vec::new(),
            host: Host {
                name: hostname.to_owned(),
                pid: std::process::id(),
                slot,
            },
            second: (0, local_time(0)),
        }
    }

    /// Starts a writer for each log.
    ///
    /// # Errors
    /// A thread cannot be started.
    pub fn start(&mut self, board: &Arc<Shared<Board>>) -> Result<()> {
        for (configured, file) in self.waiting.drain(..) {
            let board = Arc::clone(board);
            let target = configured.target.clone();
            let said_ms = AtomicU64::new(0);
            let report = move |written, dropped, why: &str| {
                Board::add(&board[0].access_lines_written, written);
                Board::add(&board[0].access_lines_dropped, dropped);
                let now_ms = clock::now_ms();
                if dropped > 0
                    && (said_ms.load(Relaxed) == 0
                        || now_ms.saturating_sub(said_ms.load(Relaxed)) >= SAID_FOR_MS)
                {
                    said_ms.store(now_ms, Relaxed);
                    log::error!(
                        "the access log {target} loses lines (dropped, in the status, counts them): {why}"
                    );
                }
            };
            let output = Output::of(file, &configured.target);
            self.logs.push(Log {
                configured,
                writer: LogWriter::start(output, Arc::new(report))?,
                gathered: Batch::default(),
                due_ms: 0,
            });
        }
        Ok(())
    }

    /// From now on lines go to these files.
    pub fn reopen(&self, files: impl Iterator<Item = OwnedFd>) {
        self.logs
            .iter()
            .zip(files)
            .for_each(|(log, file)| log.writer.set_output(Output::of(file, &log.configured.target)));
    }

    /// Hands over what is due; says when the next lines are.
    fn hand_over_due(&mut self, now_ms: u64) -> Option<u64> {
        for log in self.logs.iter_mut().filter(|log| log.due_ms <= now_ms) {
            log.hand_over();
        }
        let waiting = self.logs.iter().filter(|log| log.gathered.lines > 0);
        waiting.map(|log| log.due_ms).min()
    }

    /// Writes what is left, before the process exits.
    pub fn finish(&mut self) {
        self.logs.iter_mut().for_each(Log::hand_over);
        let deadline = Instant::now() + FLUSH_PATIENCE;
        for log in &self.logs {
            log.writer.flush(deadline);
            log.writer.give_up();
        }
    }

    fn moment(&mut self) -> Moment {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let unix_ms = now.map_or(0, |now| now.as_millis() as u64);
        if self.second.0 != unix_ms / 1000 {
            self.second = (unix_ms / 1000, local_time((unix_ms / 1000) as i64));
        }
        Moment {
            unix_ms,
            local: self.second.1,
        }
    }
}

impl Log {
    fn hand_over(&mut self) {
        if self.gathered.lines > 0 {
            self.writer.write(std::mem::take(&mut self.gathered));
        }
    }
}

impl Worker {
    /// Writes the line of a session that has ended, if its server wants one.
    pub(crate) fn log_session(
        &mut self,
        session: &Session,
        reason: CloseReason,
        carried: [Carried; 2],
        pauses: u64,
    ) {
        let wanted = session.settings.access_log.as_ref();
        let Some(at) = wanted.and_then(|wanted| {
            let mut logs = self.access_logs.logs.iter();
            logs.position(|log| Arc::ptr_eq(&log.configured, wanted))
        }) else {
            return;
        };
        let now_ms = clock::now_ms();
        let local = match session.ends.local.ip().is_unspecified() {
            true => sockets::local_address(session.downstream.as_fd()).unwrap_or(session.ends.local),
            false => session.ends.local,
        };
        let listener = self.rows.iter().position(|(row, _)| *row == session.listener);
        let ended = Ended {
            number: session.number,
            remote: session.ends.remote,
            local,
            ends: &session.ends,
            listener: listener.map(|at| &self.addresses[at]),
            reason,
            carried,
            pauses,
            datapath: session.datapath,
            limited: session.is_limited(),
            lasted_ms: now_ms.saturating_sub(session.started_ms),
            failed: &session.failed_peers,
            upstream: session.upstream.as_ref().map(|upstream| &upstream.address),
            connect_us: session.connect_us,
            upstream_ms: session
                .upstream
                .as_ref()
                .map(|_| now_ms.saturating_sub(session.connect_began_ns / 1_000_000)),
        };
        let moment = self.access_logs.moment();
        let AccessLogs { logs, host, .. } = &mut self.access_logs;
        let log = &mut logs[at];
        let configured = &log.configured;
        if log.gathered.lines == 0 && !configured.flush.is_zero() {
            log.gathered.bytes.reserve(configured.buffer_bytes.min(64 << 10));
            log.due_ms = now_ms + configured.flush.as_millis() as u64;
        }
        access_line::write(&mut log.gathered.bytes, &configured.format, &ended, &moment, host);
        log.gathered.lines += 1;
        if log.gathered.bytes.len() >= configured.buffer_bytes || configured.flush.is_zero() {
            log.hand_over();
        } else if log.gathered.lines == 1 {
            self.flush_access_logs();
        }
    }

    /// Hands over the lines that have waited for long enough.
    pub(crate) fn flush_access_logs(&mut self) {
        if let Some(due_ms) = self.access_logs.hand_over_due(clock::now_ms()) {
            self.wheel.set(LOG_TIMER, due_ms);
        }
    }
}
