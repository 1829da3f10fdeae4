//! Where the lines of a log go: a descriptor that is written to, or a syslog server that gets a datagram for each.
//! Opened by the master and used by workers, which cannot open anything.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
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
    /// The same for a pipe or a socket: whoever reads it may be slow, and other processes write there too.
    Pipe(File),
    /// Lines are sent.
    Syslog(SyslogOutput),
}

impl Output {
    /// What the descriptor that was opened for this target is.
    pub fn of(descriptor: OwnedFd, target: &LogTarget) -> Output {
        match target {
            LogTarget::Syslog(settings) => Output::Syslog(SyslogOutput::new(descriptor, settings)),
            LogTarget::Stderr | LogTarget::File(_) => Output::of_file(descriptor),
        }
    }

    /// A descriptor that is written to.
    pub fn of_file(descriptor: OwnedFd) -> Output {
        let file = File::from(descriptor);
        let kind = file.metadata().map(|data| data.file_type());
        match kind.is_ok_and(|kind| kind.is_fifo() || kind.is_socket()) {
            true => Output::Pipe(file),
            false => Output::File(file),
        }
    }

    /// How many bytes of whole lines may be written at once, unless the first line alone is longer.
    pub fn at_once(&self) -> usize {
        match self {
            Output::File(_) => usize::MAX,
            // What is longer may come through in pieces, with others' lines between them (pipe(7)).
            Output::Pipe(_) => nix::libc::PIPE_BUF,
            Output::Syslog(_) => 0,
        }
    }

    /// Waits until a line may be taken, at most for so long.
    pub fn wait(&self, patience: Duration) {
        is_ready(self.as_fd(), patience);
    }

    /// Writes a line of that severity, for somebody who has no time to wait for its reader. A slow disk is waited for.
    ///
    /// # Errors
    /// It is not written. `WouldBlock`: because the reader has not read what it has.
    pub fn write_line(&self, severity: u8, line: &[u8]) -> io::Result<()> {
        match self {
            Output::Syslog(syslog) => syslog.send_as(severity, line),
            Output::Pipe(pipe) if !is_ready(pipe.as_fd(), Duration::ZERO) => {
                Err(io::ErrorKind::WouldBlock.into())
            }
            Output::Pipe(file) | Output::File(file) => (&*file).write_all(line),
        }
    }
}

impl AsFd for Output {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Output::File(file) | Output::Pipe(file) => file.as_fd(),
            Output::Syslog(syslog) => syslog.socket.as_fd(),
        }
    }
}

/// Whether something may be written, within so long; an error that waits to be told may.
fn is_ready(descriptor: BorrowedFd<'_>, patience: Duration) -> bool {
    let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::ZERO);
    poll(&mut [PollFd::new(descriptor, PollFlags::POLLOUT)], timeout).is_ok_and(|ready| ready > 0)
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
        LogTarget::File(path) => {
            open_file(path).with_context(|| format!("failed to open the log file {}", path.display()))
        }
        LogTarget::Syslog(settings) => open_syslog(settings),
    }
}

/// Opens a file to append to, and creates it if need be.
///
/// # Errors
/// It cannot be opened.
pub fn open_file(path: &Path) -> io::Result<OwnedFd> {
    let mut options = OpenOptions::new();
    options.append(true).create(true);
    // Opened for writing alone, a named pipe that nobody reads yet would hold up the whole program, and a write to a full
    // one whoever writes.
    if std::fs::metadata(path).is_ok_and(|data| data.file_type().is_fifo()) {
        options.read(true).custom_flags(nix::libc::O_NONBLOCK);
    }
    Ok(options.open(path)?.into())
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
    /// It is not sent. `WouldBlock`: because the server has not read what it has; [`Output::wait`] for it.
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
