//! A socket of the self-test: sends and receives known bytes, and says what was expected where something else
//! comes. Non-blocking; every wait ends at the step's deadline.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use culvert_shared::sys::socket;
use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::{Linger, RcvBuf, SndBuf, TcpMaxSeg};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, SockaddrIn, setsockopt};

/// How long a condition that nothing reports is left alone between two looks.
pub(super) const LOOK: Duration = Duration::from_micros(200);

/// The segments of connections with small buffers. Loopback's own are of 64 KiB: with a window that is no
/// larger, the sender waits for its probe timer (tcp_snd_wnd_test).
const SEGMENT_BYTES: u32 = 4096;

/// One end of a connection; non-blocking.
pub struct Socket {
    pub(super) stream: TcpStream,
    name: &'static str,
    /// Bytes read from it so far.
    received: usize,
    pub(super) deadline: Instant,
}

impl Socket {
    /// The socket, for a test of the self-test.
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Writes all of it.
    pub(super) fn send(&mut self, bytes: &[u8]) -> Result<()> {
        let mut sent = 0;
        while sent < bytes.len() {
            if self.wait_for(PollFlags::POLLOUT).is_err() {
                bail!(
                    "{}: {sent} of {} bytes could be sent in time",
                    self.name,
                    bytes.len()
                );
            }
            sent += self.offer(&bytes[sent..])?;
        }
        Ok(())
    }

    /// Writes what fits.
    pub(super) fn offer(&mut self, bytes: &[u8]) -> Result<usize> {
        match self.stream.write(bytes) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            result => result.with_context(|| format!("{}: failed to send", self.name)),
        }
    }

    /// Sends so few bytes and the end of the stream that they go in one segment.
    pub(super) fn send_with_end(&mut self, bytes: &[u8]) -> Result<()> {
        let flags = MsgFlags::from_bits_retain(libc::MSG_MORE) | MsgFlags::MSG_NOSIGNAL;
        let sent = nix::sys::socket::send(self.stream.as_raw_fd(), bytes, flags)
            .with_context(|| format!("{}: failed to send", self.name))?;
        ensure!(
            sent == bytes.len(),
            "{}: {sent} of {} bytes could be sent",
            self.name,
            bytes.len()
        );
        self.end_stream();
        Ok(())
    }

    /// Ends what it sends. It can only fail on a connection that is gone, which its peer then notices.
    pub(super) fn end_stream(&self) {
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// Reads exactly these bytes.
    pub(super) fn receive(&mut self, expected: &[u8]) -> Result<()> {
        let mut came = 0;
        while came < expected.len() {
            if self.wait_for(PollFlags::POLLIN).is_err() {
                bail!("{}: {came} of {} bytes came in time", self.name, expected.len());
            }
            came += self.take(&expected[came..])?;
        }
        Ok(())
    }

    /// Reads what is there, which must be the beginning of `expected`; returns how much it was.
    pub(super) fn take(&mut self, expected: &[u8]) -> Result<usize> {
        let mut buffer = [0; 16 * 1024];
        let room = expected.len().min(buffer.len());
        let came = match self.stream.read(&mut buffer[..room]) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(0),
            result => result.with_context(|| format!("{}: failed to receive", self.name))?,
        };
        ensure!(
            came > 0 || room == 0,
            "{}: the stream ended after {} bytes, more were expected",
            self.name,
            self.received
        );
        same(&expected[..came], &buffer[..came], self.received).with_context(|| self.name)?;
        self.received += came;
        Ok(came)
    }

    /// Reads the end of the stream.
    pub(super) fn receive_end(&mut self) -> Result<()> {
        if self.wait_for(PollFlags::POLLIN).is_err() {
            bail!("{}: the end of the stream did not come in time", self.name);
        }
        let mut byte = [0];
        let came = self.stream.read(&mut byte);
        let came = came.with_context(|| format!("{}: failed to receive the end of the stream", self.name))?;
        ensure!(
            came == 0,
            "{}: {:#04x} came after byte {}, the end of the stream was expected",
            self.name,
            byte[0],
            self.received
        );
        Ok(())
    }

    /// Waits until so many bytes have arrived, read or not.
    pub(super) fn await_arrival(&self, bytes: usize) -> Result<()> {
        let arrived = || socket::tcp_info(self.stream.as_fd()).map_or(0, |info| info.bytes_received);
        let in_time = wait_until(self.deadline, || arrived() >= bytes as u64);
        ensure!(
            in_time,
            "{}: {} of {bytes} bytes arrived in time",
            self.name,
            arrived()
        );
        Ok(())
    }

    /// Bytes that its TCP has taken to send, the SYN of one that asked for its connection included. Exact
    /// while the peer does not read.
    pub(super) fn written_bytes(&self) -> Result<u64> {
        let fd = self.stream.as_fd();
        let acked = socket::tcp_info(fd).map(|info| info.bytes_acked);
        acked
            .and_then(|acked| Ok(acked + socket::unacknowledged_bytes(fd)?))
            .with_context(|| format!("{}: failed to ask for its state", self.name))
    }

    /// An error of the socket is a failure.
    pub(super) fn must_be_well(&self) -> Result<()> {
        match self.stream.take_error().context("failed to read SO_ERROR")? {
            None => Ok(()),
            Some(error) => bail!(
                "{}: the socket has an error, none was expected: {error}",
                self.name
            ),
        }
    }

    fn wait_for(&self, what: PollFlags) -> nix::Result<()> {
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.stream.as_fd(), what)], timeout) {
                Ok(0) => return Err(Errno::ETIMEDOUT),
                Err(Errno::EINTR) => {}
                result => return result.map(|_| ()),
            }
        }
    }
}

/// Looks again and again until it is true; false when the deadline came first.
pub(super) fn wait_until(deadline: Instant, mut condition: impl FnMut() -> bool) -> bool {
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(LOOK);
    }
}

/// A connection over loopback: the end that asked for it and the one that was accepted.
pub(super) fn connection(
    names: [&'static str; 2],
    deadline: Instant,
    buffer_bytes: Option<usize>,
) -> Result<[Socket; 2]> {
    let why = "on loopback (127.0.0.1)";
    let listener =
        TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).with_context(|| format!("failed to bind {why}"))?;
    listener
        .set_nonblocking(true)
        .context("failed to make a listener non-blocking")?;
    let address = listener.local_addr().context("failed to read a local address")?;
    // Accepted sockets inherit the listener's sizes.
    size(&listener, buffer_bytes)?;
    let SocketAddr::V4(to) = address else {
        bail!("{address} is no IPv4 address");
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let asked = nix::sys::socket::socket(AddressFamily::Inet, SockType::Stream, flags, None)
        .context("failed to create a socket")?;
    size(&asked, buffer_bytes)?;
    match nix::sys::socket::connect(asked.as_raw_fd(), &SockaddrIn::from(to)) {
        Ok(()) | Err(Errno::EINPROGRESS) => {}
        Err(errno) => return Err(errno).with_context(|| format!("failed to connect {why}")),
    }
    let asked = prepared(TcpStream::from(asked))?;
    let own = asked.local_addr().context("failed to read a local address")?;
    let mut accepted = None;
    wait_until(deadline, || {
        // Anybody on this host may connect.
        accepted = listener.accept().ok().filter(|(_, from)| *from == own);
        accepted.is_some()
    });
    let (accepted, _) = accepted.with_context(|| format!("no connection to accept came in time {why}"))?;
    let accepted = prepared(accepted)?;
    let [first, second] = names;
    Ok([(asked, first), (accepted, second)].map(|(stream, name)| Socket {
        stream,
        name,
        received: 0,
        deadline,
    }))
}

fn size(socket: &impl AsFd, buffer_bytes: Option<usize>) -> Result<()> {
    let Some(bytes) = buffer_bytes else {
        return Ok(());
    };
    setsockopt(socket, SndBuf, &bytes)
        .and_then(|()| setsockopt(socket, RcvBuf, &bytes))
        .and_then(|()| setsockopt(socket, TcpMaxSeg, &SEGMENT_BYTES))
        .context("failed to size a socket's buffers")
}

pub(super) fn prepared(stream: TcpStream) -> Result<TcpStream> {
    // Closing it leaves nothing behind, no TIME_WAIT either.
    let reset = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    stream
        .set_nodelay(true)
        .and_then(|()| stream.set_nonblocking(true))
        .and_then(|()| setsockopt(&stream, Linger, &reset).map_err(io::Error::from))
        .context("failed to prepare a socket")?;
    Ok(stream)
}

/// A stream that differs from itself at every small shift, and from those of other seeds.
pub(super) fn pattern(seed: u32, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let mut next = || {
        // Marsaglia's xorshift: any state but zero will do.
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    (0..bytes).map(|_| next()).collect()
}

/// Compares; `from` is where the bytes stand in their stream.
fn same(expected: &[u8], came: &[u8], from: usize) -> Result<()> {
    let at = expected
        .iter()
        .zip(came)
        .position(|(expected, came)| expected != came);
    let Some(at) = at else { return Ok(()) };
    let show = |bytes: &[u8]| -> String {
        let shown = bytes[at..].iter().take(8);
        shown
            .map(|byte| format!("{byte:02x}"))
            .collect::<Vec<_>>()
            .join(" ")
    };
    bail!(
        "from byte {} on {} was expected, {} came",
        from + at,
        show(expected),
        show(came)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_byte_is_named_with_its_place_and_what_was_expected() {
        assert!(same(&[1, 2, 3], &[1, 2, 3], 0).is_ok());
        let error = same(&[1, 2, 3], &[1, 2, 4], 100).unwrap_err().to_string();
        assert_eq!(error, "from byte 102 on 03 was expected, 04 came");
    }

    #[test]
    fn a_pattern_never_equals_itself_shifted() {
        let stream = pattern(1, 4096);
        for shift in 1..64 {
            assert_ne!(stream[shift..], stream[..stream.len() - shift]);
        }
        assert_ne!(stream, pattern(2, 4096));
    }

    #[test]
    fn a_wait_ends_at_its_deadline() {
        let deadline = Instant::now() + Duration::from_millis(5);
        assert!(!wait_until(deadline, || false));
        assert!(Instant::now() >= deadline);
        assert!(wait_until(deadline, || true));
    }
}
