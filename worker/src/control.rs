//! What the master says: drain, stop, write the log elsewhere, these are the addresses of a host. And what its silence
//! means: it is gone.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering::Relaxed;

use culvert_shared::logging;
use culvert_shared::message::ToWorker;
use culvert_shared::output::{Output, SyslogOutput};
use culvert_shared::sys::fdpass;
use nix::errno::Errno;

use crate::clock;
use crate::event_loop::{DRAIN_TIMER, Worker};

impl Worker {
    pub(crate) fn hear_master(&mut self) {
        let (begun_ns, before) = (clock::now_ns(), self.adopted);
        self.hear_all();
        if self.adopted > before {
            log::info!(
                "adopted {} sessions in {} ms",
                self.adopted - before,
                clock::now_ns().saturating_sub(begun_ns).div_ceil(1_000_000)
            );
        }
    }

    fn hear_all(&mut self) {
        loop {
            let received = match fdpass::receive(self.control.as_fd()) {
                Ok(received) => received,
                Err(Errno::EAGAIN) => return,
                Err(Errno::EINTR) => continue,
                Err(error) => {
                    log::error!("failed to read the master's message: {error}; draining");
                    self.end_naming();
                    self.drop_checks();
                    return self.drain();
                }
            };
            let mut descriptors = received.descriptors.into_iter();
            match ToWorker::decode(&received.message) {
                Some(ToWorker::Drain) => {
                    self.drop_checks();
                    self.drain();
                }
                Some(ToWorker::HandOver) => self.hand_over(),
                Some(ToWorker::Adopt(sessions)) => self.adopted += self.adopt(sessions, descriptors),
                Some(ToWorker::Answer(question, answer)) => {
                    self.hosts.take(question, answer, clock::now_ms())
                }
                Some(ToWorker::Stop) => self.stopping = true,
                Some(ToWorker::Log(syslog)) => {
                    if received.are_missing {
                        log::error!(
                            "not every log was opened anew, the others go on as they are: the limit on open descriptors is \
                             too low"
                        );
                    }
                    if let Some(descriptor) = descriptors.next() {
                        logging::set_output(match syslog {
                            Some(settings) => Output::Syslog(SyslogOutput::new(descriptor, &settings)),
                            None => Output::of_file(descriptor),
                        });
                    }
                    self.access_logs.reopen(descriptors);
                }
                None if received.message.is_empty() => {
                    self.end_naming();
                    if !self.draining {
                        log::error!("the master is gone, finishing {} sessions", self.table.len());
                        self.drop_checks();
                        self.drain();
                    }
                    return;
                }
                None => log::warn!("ignoring an unknown message of the master"),
            }
        }
    }

    /// Takes no new sessions and finishes the old ones, at most for `worker_shutdown_timeout`.
    pub(crate) fn drain(&mut self) {
        if self.draining {
            return;
        }
        self.draining = true;
        self.gauges().draining.store(1, Relaxed);
        self.stop_listening();
        self.leave_slot();
        self.end_idle_http();
        if let Some(limit) = self.config.worker_shutdown_timeout {
            let due_ms = clock::now_ms() + limit.as_millis() as u64;
            self.wheel.set(DRAIN_TIMER, due_ms);
        }
    }
}
