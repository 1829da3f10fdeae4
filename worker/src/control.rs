//! What the master says: drain, stop, write the log elsewhere. And what its silence means: it is gone.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering::Relaxed;

use culvert_shared::logging;
use culvert_shared::message::ToWorker;
use culvert_shared::sys::fdpass;
use nix::errno::Errno;

use crate::clock;
use crate::event_loop::{DRAIN_TIMER, Worker};

impl Worker {
    pub(crate) fn hear_master(&mut self) {
        loop {
            let received = match fdpass::receive(self.control.as_fd()) {
                Ok(received) => received,
                Err(Errno::EAGAIN) => return,
                Err(Errno::EINTR) => continue,
                Err(error) => {
                    log::error!("failed to read the master's message: {error}; draining");
                    return self.drain();
                }
            };
            match (ToWorker::decode(&received.message), received.descriptor) {
                (Some(ToWorker::Drain), _) => self.drain(),
                (Some(ToWorker::Stop), _) => self.stopping = true,
                (Some(ToWorker::Log), Some(descriptor)) => logging::set_output(descriptor),
                _ if received.message.is_empty() => {
                    if !self.draining {
                        log::error!("the master is gone, finishing {} sessions", self.table.len());
                        self.drain();
                    }
                    return;
                }
                (message, _) => log::warn!("ignoring an unknown message of the master: {message:?}"),
            }
        }
    }

    /// Takes no new sessions and finishes the old ones, at most for `worker_shutdown_timeout`.
    fn drain(&mut self) {
        if self.draining {
            return;
        }
        self.draining = true;
        self.gauges().draining.store(1, Relaxed);
        self.stop_listening();
        if let Some(limit) = self.config.worker_shutdown_timeout {
            let due_ms = clock::now_ms() + limit.as_millis() as u64;
            self.wheel.set(DRAIN_TIMER, due_ms);
        }
    }
}
