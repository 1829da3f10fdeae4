//! What a service manager is told (sd_notify(3)): ready, reloading, stopping, a line of status, and that the
//! master's loop still turns. One datagram to the socket that NOTIFY_SOCKET names; without it, nothing.
//!
//! `Teller` decides what to say from what the master is, and is asked once in each turn of the loop. A few
//! lines instead of a library: the protocol is one datagram of text.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

use crate::supervise::{Master, Phase};
use crate::worker::State;

/// How long a service manager that does not read may hold the master up.
const SEND_PATIENCE: Duration = Duration::from_millis(200);

/// What there is to say something about.
#[derive(Clone, Debug, PartialEq, Eq)]
struct View {
    phase: Phase,
    generation: u64,
    /// A new generation is about to take over.
    reloading: bool,
    /// Reloads that are over, refused ones included: one may begin and end between two looks.
    reloads: u64,
    slots: usize,
    /// Workers of the current generation that accept.
    serving: usize,
    sessions: u64,
    in_kernel: bool,
}

impl View {
    /// Whether the program does what it is there for.
    fn is_healthy(&self) -> bool {
        self.phase != Phase::Serving || self.serving > 0
    }

    fn status(&self) -> String {
        let View {
            generation,
            serving,
            slots,
            sessions,
            ..
        } = self;
        match self.phase {
            Phase::Serving => {
                let by = if self.in_kernel {
                    "in the kernel"
                } else {
                    "by copying"
                };
                format!(
                    "generation {generation}: {serving} of {slots} workers serve, {by}; {sessions} sessions"
                )
            }
            Phase::Paused => format!("paused until SIGHUP; {sessions} sessions"),
            Phase::Quitting => format!("finishing {sessions} sessions"),
            Phase::Stopping => "stopping".to_owned(),
        }
    }
}

/// How far the service manager was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    Nothing,
    Ready,
    Reloading,
    Stopping,
}

struct Teller {
    told: Told,
    reloads: u64,
    status: String,
    /// Half of what the service manager waits for a sign of life.
    beat_every: Option<Duration>,
    beat_at: Option<Instant>,
}

impl Teller {
    fn new(watchdog: Option<Duration>) -> Teller {
        Teller {
            told: Told::Nothing,
            reloads: 0,
            status: String::new(),
            beat_every: watchdog.map(|limit| limit / 2),
            beat_at: None,
        }
    }

    /// What is to be said now, a datagram each.
    fn next(&mut self, view: &View, now: Instant, now_us: i64) -> Vec<String> {
        let mut say = Vec::new();
        let ready = format!("READY=1\nMAINPID={}", std::process::id());
        let ending = matches!(view.phase, Phase::Quitting | Phase::Stopping);
        if ending && self.told != Told::Stopping {
            self.told = Told::Stopping;
            say.push("STOPPING=1".to_owned());
        }
        // A program that is paused may have become another binary, which has told nothing yet and owes signs of life.
        let is_ready = view.serving >= view.slots || view.phase == Phase::Paused;
        if self.told == Told::Nothing && is_ready {
            self.told = Told::Ready;
            self.reloads = view.reloads;
            self.beat_at = self.beat_every.map(|_| now);
            say.push(ready.clone());
        }
        if self.told == Told::Ready && (view.reloading || view.reloads != self.reloads) {
            self.told = Told::Reloading;
            say.push(format!("RELOADING=1\nMONOTONIC_USEC={now_us}"));
        }
        if self.told == Told::Reloading && !view.reloading {
            self.told = Told::Ready;
            self.reloads = view.reloads;
            say.push(ready);
        }
        let status = view.status();
        if status != self.status {
            say.push(format!("STATUS={status}"));
            self.status = status;
        }
        if let (Some(at), Some(every)) = (self.beat_at, self.beat_every)
            && at <= now
        {
            if view.is_healthy() {
                say.push("WATCHDOG=1".to_owned());
                self.beat_at = Some(now + every);
            } else {
                // Asked again well before the service manager's patience ends.
                self.beat_at = Some(now + every / 4);
            }
        }
        say
    }
}

/// The way to the service manager.
pub struct Notifier {
    socket: Option<(UnixDatagram, SocketAddr)>,
    teller: Teller,
}

impl Notifier {
    /// From what systemd leaves in the environment: NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID.
    pub fn from_environment() -> Notifier {
        let number = |name| std::env::var(name).ok()?.parse::<u64>().ok();
        let for_us = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let watchdog = number("WATCHDOG_USEC").filter(|limit| *limit > 0 && for_us);
        let address = std::env::var_os("NOTIFY_SOCKET").filter(|address| !address.is_empty());
        let socket = address.and_then(|address| match open(address.as_bytes()) {
            Ok(socket) => Some(socket),
            Err(error) => {
                log::warn!(
                    "the service manager is told nothing: NOTIFY_SOCKET={}: {error}",
                    address.display()
                );
                None
            }
        });
        Notifier {
            teller: Teller::new(watchdog.map(Duration::from_micros).filter(|_| socket.is_some())),
            socket,
        }
    }

    /// When the next sign of life is due.
    pub fn deadline(&self) -> Option<Instant> {
        self.teller.beat_at
    }

    fn tell(&mut self, view: &View, now: Instant) {
        let Some((socket, address)) = &self.socket else {
            return;
        };
        let now_us = clock_gettime(ClockId::CLOCK_MONOTONIC)
            .map_or(0, |time| time.tv_sec() * 1_000_000 + time.tv_nsec() / 1000);
        for message in self.teller.next(view, now, now_us) {
            if let Err(error) = socket.send_to_addr(message.as_bytes(), address) {
                log::warn!("failed to tell the service manager {message:?}: {error}");
            }
        }
    }
}

/// A path, or with "@" in front the name of an abstract socket.
fn open(address: &[u8]) -> std::io::Result<(UnixDatagram, SocketAddr)> {
    let address = match address.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(address))?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_write_timeout(Some(SEND_PATIENCE))?;
    Ok((socket, address))
}

impl Master {
    /// Tells the service manager what has changed.
    pub fn tell_service_manager(&mut self, now: Instant) {
        if self.notifier.socket.is_none() {
            return;
        }
        let board = &self.board[0];
        let number = self.current.number;
        let serving = |state| matches!(state, State::Serving);
        let view = View {
            phase: self.phase,
            generation: number,
            reloading: self.is_reloading(),
            reloads: board.reloads_succeeded.load(Relaxed) + board.reloads_failed.load(Relaxed),
            slots: self.current.slots(),
            serving: self
                .workers
                .iter()
                .filter(|worker| {
                    worker.generation == number && serving(worker.state()) && !worker.is_leaving()
                })
                .count(),
            sessions: board
                .live_workers()
                .map(|(_, row)| u64::from(row.sessions.load(Relaxed)))
                .sum(),
            in_kernel: self.current.stores.reason().is_none(),
        };
        self.notifier.tell(&view, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view() -> View {
        View {
            phase: Phase::Serving,
            generation: 1,
            reloading: false,
            reloads: 0,
            slots: 2,
            serving: 2,
            sessions: 0,
            in_kernel: true,
        }
    }

    fn said(teller: &mut Teller, view: &View, now: Instant) -> Vec<String> {
        let key = |message: String| message.split('=').next().unwrap_or_default().to_owned();
        teller.next(view, now, 7).into_iter().map(key).collect()
    }

    #[test]
    fn it_is_ready_when_all_workers_are() {
        let (mut teller, now) = (Teller::new(None), Instant::now());
        assert_eq!(said(&mut teller, &View { serving: 1, ..view() }, now), ["STATUS"]);
        assert_eq!(said(&mut teller, &view(), now), ["READY", "STATUS"]);
        assert!(
            said(&mut teller, &view(), now).is_empty(),
            "nothing is said twice"
        );
        assert!(
            said(&mut teller, &View { serving: 1, ..view() }, now) == ["STATUS"],
            "a worker's death takes nothing back"
        );
    }

    #[test]
    fn a_reload_is_told_even_if_it_was_refused_at_once() {
        let (mut teller, now) = (Teller::new(None), Instant::now());
        said(&mut teller, &view(), now);
        let under_way = View {
            reloading: true,
            ..view()
        };
        assert_eq!(teller.next(&under_way, now, 7), ["RELOADING=1\nMONOTONIC_USEC=7"]);
        assert!(said(&mut teller, &under_way, now).is_empty());
        let done = View {
            generation: 2,
            reloads: 1,
            ..view()
        };
        assert_eq!(said(&mut teller, &done, now), ["READY", "STATUS"]);
        let refused = View { reloads: 2, ..done };
        assert_eq!(said(&mut teller, &refused, now), ["RELOADING", "READY"]);
    }

    #[test]
    fn an_end_before_the_first_worker_is_ready_is_told_as_well() {
        let (mut teller, now) = (Teller::new(None), Instant::now());
        let ending = View {
            phase: Phase::Stopping,
            serving: 0,
            ..view()
        };
        assert_eq!(said(&mut teller, &ending, now), ["STOPPING", "STATUS"]);
        assert!(said(&mut teller, &view(), now).iter().all(|key| key != "READY"));
    }

    #[test]
    fn a_paused_program_that_became_another_binary_gives_signs_of_life() {
        let second = Duration::from_secs(1);
        let (mut teller, now) = (Teller::new(Some(2 * second)), Instant::now());
        let paused = View {
            phase: Phase::Paused,
            serving: 0,
            ..view()
        };
        assert_eq!(said(&mut teller, &paused, now), ["READY", "STATUS", "WATCHDOG"]);
        assert_eq!(said(&mut teller, &paused, now + second), ["WATCHDOG"]);
    }

    #[test]
    fn a_sign_of_life_comes_at_half_time_and_only_from_a_healthy_program() {
        let second = Duration::from_secs(1);
        let (mut teller, now) = (Teller::new(Some(2 * second)), Instant::now());
        let starting = View { serving: 0, ..view() };
        assert_eq!(said(&mut teller, &starting, now), ["STATUS"]);
        assert_eq!(teller.beat_at, None, "not before it is ready");
        assert_eq!(said(&mut teller, &view(), now), ["READY", "STATUS", "WATCHDOG"]);
        assert!(said(&mut teller, &view(), now + second / 2).is_empty());
        assert_eq!(said(&mut teller, &view(), now + second), ["WATCHDOG"]);
        let dead = View { serving: 0, ..view() };
        assert_eq!(said(&mut teller, &dead, now + 2 * second), ["STATUS"]);
        assert_eq!(
            teller.beat_at,
            Some(now + 2 * second + second / 4),
            "it does not spin"
        );
        assert!(
            said(
                &mut teller,
                &View {
                    phase: Phase::Paused,
                    ..dead
                },
                now + 3 * second
            )
            .contains(&"WATCHDOG".into())
        );
    }
}
