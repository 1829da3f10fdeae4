//! What the master tells a worker over its control socket, at once or when there is room to hear it. Why it is told
//! that is decided in `worker.rs` and by its callers.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use culvert_shared::hosts::{Answer, Question};
use culvert_shared::message::ToWorker;
use culvert_shared::sys::fdpass;
use nix::errno::Errno;

use super::Worker;
use crate::error_log::ErrorLog;

/// How long a worker is told nothing more after the host had no room for it.
const REST: Duration = Duration::from_millis(20);

/// Answers that wait for a worker to listen: more than it may have asked for at once.
const UNHEARD_MAX: usize = 2048;

impl Worker {
    /// Hands it the error log that it shall write to.
    pub fn write_log_to(&mut self, log: &ErrorLog) {
        self.say(ToWorker::Log(log.syslog().cloned()), &[log.as_fd()]);
    }

    /// The same, with the access logs as they are now.
    pub fn write_logs_to(&mut self, log: &ErrorLog) {
        let access_logs = self.access_logs.clone();
        let logs: Vec<BorrowedFd<'_>> = std::iter::once(log.as_fd())
            .chain(access_logs.descriptors())
            .collect();
        self.say(ToWorker::Log(log.syslog().cloned()), &logs);
    }

    /// Gives an order, or keeps it until there is room to hear it: clients decide how many answers there are.
    pub(super) fn say(&mut self, order: ToWorker, descriptors: &[BorrowedFd<'_>]) {
        let Some(control) = &self.control else { return };
        let sent = match self.orders.is_empty() {
            true => fdpass::send(control.as_fd(), &order.encode(), descriptors),
            false => Err(Errno::EAGAIN),
        };
        let error = match sent {
            Ok(()) => return,
            // Dying; its death is reported by SIGCHLD.
            Err(Errno::EPIPE | Errno::ECONNRESET) => return,
            Err(errno) if is_full(errno) => {
                let own = descriptors.iter().map(BorrowedFd::try_clone_to_owned);
                match own.collect::<Result<Vec<OwnedFd>, _>>() {
                    Ok(descriptors) => {
                        // Of logs the last ones count.
                        if matches!(order, ToWorker::Log(_)) {
                            self.orders
                                .retain(|(before, _)| !matches!(before, ToWorker::Log(_)));
                        }
                        return self.orders.push_back((order, descriptors));
                    }
                    Err(error) => error.to_string(),
                }
            }
            Err(errno) => errno.desc().to_owned(),
        };
        log::error!(
            "failed to tell worker {} (process {}) to {order:?}: {error}",
            self.slot,
            self.pid
        );
    }

    /// Tells it what came of a question, as soon as it has room to hear it. One that asks and never listens is not
    /// told everything.
    pub fn answer(&mut self, question: Question, answer: Answer) {
        if self.unheard.len() >= UNHEARD_MAX {
            return;
        }
        self.unheard.push_back(ToWorker::Answer(question, answer));
        self.say_on();
    }

    /// Whether something waits until it has room to hear it.
    pub fn has_unheard(&self) -> bool {
        !self.to_adopt.is_empty() || !self.orders.is_empty() || !self.unheard.is_empty()
    }

    /// Until when it is told nothing, because the host has no room for it.
    pub fn rest_until(&self, now: Instant) -> Option<Instant> {
        self.rest_until.filter(|until| *until > now && self.has_unheard())
    }

    /// The host had no room for what it was to be told.
    pub fn rest(&mut self) {
        self.rest_until = Some(Instant::now() + REST);
    }

    /// Whether to wait until its socket has room.
    pub fn waits_for_room(&self, now: Instant) -> bool {
        self.has_unheard() && self.rest_until(now).is_none()
    }

    /// Says what it had no room to hear, orders first.
    pub(super) fn say_on(&mut self) {
        if self.try_to_say_on().is_err_and(|errno| errno != Errno::EAGAIN) {
            self.rest();
        }
    }

    fn try_to_say_on(&mut self) -> Result<(), Errno> {
        let Some(control) = &self.control else {
            self.orders.clear();
            self.unheard.clear();
            return Ok(());
        };
        while let Some((order, descriptors)) = self.orders.front() {
            let descriptors: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
            match fdpass::send(control.as_fd(), &order.encode(), &descriptors) {
                Err(errno) if is_full(errno) => return Err(errno),
                Ok(()) | Err(_) => drop(self.orders.pop_front()),
            }
        }
        while let Some(answer) = self.unheard.front() {
            match fdpass::send(control.as_fd(), &answer.encode(), &[]) {
                Ok(()) => drop(self.unheard.pop_front()),
                Err(errno) if is_full(errno) => return Err(errno),
                // Dying; its death is reported by SIGCHLD.
                Err(_) => self.unheard.clear(),
            }
        }
        Ok(())
    }
}

/// Whether a control socket has no room for a message now, or the host none for what comes along: where the master may not do
/// as it likes, so many descriptors may be under way at once as it may have open (too_many_unix_fds, net/unix/scm.c).
fn is_full(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::EAGAIN | Errno::ENOBUFS | Errno::ENOMEM | Errno::ETOOMANYREFS
    )
}

#[cfg(test)]
mod tests {
    use super::super::tests::{heard, worker};
    use super::*;

    #[test]
    fn answers_wait_for_a_worker_that_has_no_room_to_hear_them_and_are_bounded() {
        let (mut worker, theirs, now) = worker();
        let host = |n: usize| format!("h{n}.test");
        let most = 10 * UNHEARD_MAX;
        for n in 0..most {
            let question = Question {
                resolver: 0,
                host: host(n),
            };
            let why = String::new();
            worker.answer(question, Answer::Nothing { why, valid_ms: 0 });
        }
        assert_eq!(worker.unheard.len(), UNHEARD_MAX);
        assert!(worker.has_unheard());
        let mut heard_of = Vec::new();
        loop {
            match heard(&theirs) {
                Some(ToWorker::Answer(question, _)) => heard_of.push(question.host),
                _ if worker.has_unheard() => worker.advance(now),
                _ => break,
            }
        }
        assert!(
            (UNHEARD_MAX..most / 2).contains(&heard_of.len()),
            "{}",
            heard_of.len()
        );
        let expected: Vec<String> = (0..heard_of.len()).map(host).collect();
        assert_eq!(heard_of, expected);
    }

    #[test]
    fn an_order_that_finds_no_room_is_given_before_what_else_waits() {
        let (mut worker, theirs, now) = worker();
        for n in 0..10_000 {
            let host = format!("h{n}.test");
            let why = String::new();
            worker.answer(
                Question { resolver: 0, host },
                Answer::Nothing { why, valid_ms: 0 },
            );
        }
        let (reader, log) = nix::unistd::pipe().unwrap();
        worker.say(ToWorker::Log(None), &[reader.as_fd()]);
        worker.say(ToWorker::Log(None), &[log.as_fd()]);
        drop((reader, log));
        worker.hand_over(None, now);
        assert_eq!(worker.orders.len(), 2);
        let mut orders = Vec::new();
        let mut answers_between = 0;
        loop {
            match fdpass::receive(theirs.as_fd()) {
                Ok(received) => match ToWorker::decode(&received.message).unwrap() {
                    ToWorker::Answer(..) if orders.len() == 1 => answers_between += 1,
                    ToWorker::Answer(..) => {}
                    order => orders.push((order, received.descriptors.len())),
                },
                Err(_) if worker.has_unheard() => worker.advance(now),
                Err(_) => break,
            }
        }
        assert_eq!(orders, [(ToWorker::Log(None), 1), (ToWorker::HandOver, 0)]);
        assert_eq!(answers_between, 0);
    }
}
