//! Where the lines of a log go: a descriptor that is written to, or a syslog server that gets a datagram for each.
//! Opened by the master and used by workers, which cannot open anything.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, SockaddrStorage, UnixAddr, connect, send, socket,
};

use crate::config::{Address, LogTarget, Syslog};
use crate::sys::local_time::{LocalTime, local_time};

/// nginx's names of months; RFC 3164, 4.1.2.
const MONTHS: [&str; 12] = [
    "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
];

/// An open log.
#[derive(Debug)]
pub enum Output {
    /// Written to as it is.
    File(File),
    /// Lines are sent.
    Syslog(SyslogOutput),
}

impl Output {
    /// What the descriptor that was opened for this target is.
    pub fn of(descriptor: OwnedFd, target: &LogTarget) -> Output {
        match target {
            LogTarget::Syslog(settings) => Output::Syslog(SyslogOutput::new(descriptor, settings)),
            LogTarget::Stderr | LogTarget::File(_) => Output::File(descriptor.into()),
        }
    }
}

/// Opens the place that a configuration names. A file is appended to, and created if need be. A syslog server
/// need not be there.
///
/// # Errors
/// It cannot be opened.
pub fn open(target: &LogTarget) -> Result<OwnedFd> {
    match target {
        LogTarget::Stderr => io::stderr()
            .as_fd()
            .try_clone_to_owned()
            .context("failed to duplicate standard error"),
        LogTarget::File(path) => open_file(path),
        LogTarget::Syslog(settings) => open_syslog(settings),
    }
}

fn open_file(path: &Path) -> Result<OwnedFd> {
    let file = OpenOptions::new().append(true).create(true).open(path);
    Ok(file
        .with_context(|| format!("failed to open the log file {}", path.display()))?
        .into())
}

/// A socket that never waits, connected if the server is there.
///
/// # Errors
/// No descriptor is to be had.
pub fn open_syslog(settings: &Syslog) -> Result<OwnedFd> {
    let what = || format!("failed to open a socket for syslog at {}", settings.server);
    let family = match &settings.server {
        Address::Tcp(address) if address.is_ipv4() => AddressFamily::Inet,
        Address::Tcp(_) => AddressFamily::Inet6,
        Address::Unix(_) => AddressFamily::Unix,
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let opened = socket(family, SockType::Datagram, flags, None).with_context(what)?;
    // It is tried again for each line: the log of a program must not keep it from starting.
    let _ = connect_to(&opened, &settings.server);
    Ok(opened)
}

fn connect_to(socket: &OwnedFd, server: &Address) -> nix::Result<()> {
    let socket = socket.as_raw_fd();
    match server {
        Address::Tcp(address) => connect(socket, &SockaddrStorage::from(*address)),
        Address::Unix(path) => connect(socket, &UnixAddr::new(path)?),
    }
}

/// A syslog server as lines are sent to it.
#[derive(Debug)]
pub struct SyslogOutput {
    socket: OwnedFd,
    settings: Syslog,
    /// What stands between the time and the line.
    origin: String,
}

impl SyslogOutput {
    /// Over a socket from [`open_syslog`].
    pub fn new(socket: OwnedFd, settings: &Syslog) -> SyslogOutput {
        let hostname = match settings.hostname {
            true => nix::unistd::gethostname()
                .map_or_else(|_| "- ".to_owned(), |name| format!("{} ", name.to_string_lossy())),
            false => String::new(),
        };
        SyslogOutput {
            socket,
            origin: format!("{hostname}{}: ", settings.tag),
            settings: settings.clone(),
        }
    }

    /// Sends one line, without its end, as the severity that the settings name.
    ///
    /// # Errors
    /// As with [`SyslogOutput::send_as`].
    pub fn send(&self, line: &[u8]) -> io::Result<()> {
        self.send_as(self.settings.severity, line)
    }

    /// Sends one line, without its end. Never waits.
    ///
    /// # Errors
    /// It is not sent. `WouldBlock`: because the server has not read what it has; [`SyslogOutput::wait`] for it.
    pub fn send_as(&self, severity: u8, line: &[u8]) -> io::Result<()> {
        let seconds = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |now| now.as_secs() as i64);
        let mut datagram = self.header(severity, &local_time(seconds)).into_bytes();
        datagram.extend_from_slice(line.strip_suffix(b"\n").unwrap_or(line));
        let once = || send(self.socket.as_raw_fd(), &datagram, MsgFlags::MSG_NOSIGNAL);
        let sent = match once() {
            Err(Errno::EINTR) => once(),
            // Over UDP this tells of an earlier line. On a unix socket the server was not there, or is another
            // one since; connecting anew serves all processes that share the socket.
            Err(Errno::ECONNREFUSED | Errno::ENOTCONN | Errno::ECONNRESET | Errno::EDESTADDRREQ) => {
                connect_to(&self.socket, &self.settings.server)?;
                once()
            }
            other => other,
        };
        Ok(sent.map(drop)?)
    }

    /// Waits until a line may be taken, at most for so long.
    pub fn wait(&self, patience: Duration) {
        let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::ZERO);
        let _ = poll(
            &mut [PollFd::new(self.socket.as_fd(), PollFlags::POLLOUT)],
            timeout,
        );
    }

    /// As nginx writes it (RFC 3164, 4.1): priority, local time, host, tag.
    fn header(&self, severity: u8, now: &LocalTime) -> String {
        let month = MONTHS[usize::from(now.month.clamp(1, 12)) - 1];
        format!(
            "<{}>{month} {:2} {:02}:{:02}:{:02} {}",
            self.settings.facility * 8 + severity.min(7),
            now.day,
            now.hour,
            now.minute,
            now.second,
            self.origin
        )
    }
}
