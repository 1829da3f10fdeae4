//! The bytes of a stream: a seeded generator gives each offset its byte, so that a receiver checks
//! every byte of any length without storing it, and a lost, doubled, moved or foreign one is seen where it stands.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

/// How a stream ended for its receiver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// A clean end of stream.
    Fin,
    /// `ECONNRESET`.
    Reset,
    /// Nothing came for as long as the socket's read timeout; the connection still stood.
    Silent,
    /// The receiver had all it asked for and stopped looking.
    Enough,
}

/// What a receiver got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Received {
    /// Bytes up to the ending, all of them checked.
    pub bytes: u64,
    /// How it ended.
    pub ending: Ending,
    /// The offset of the first byte that was not the pattern's; nothing is read after it.
    pub wrong_at: Option<u64>,
}

impl Received {
    /// Panics unless exactly `bytes` right bytes came, and then a clean end.
    #[track_caller]
    pub fn must_be_whole(&self, bytes: u64) {
        assert_eq!(
            *self,
            Received {
                bytes,
                ending: Ending::Fin,
                wrong_at: None
            }
        );
    }

    /// Panics unless at most `at_most` right bytes came, and then a reset.
    #[track_caller]
    pub fn must_be_a_prefix_and_a_reset(&self, at_most: u64) {
        assert_eq!(self.wrong_at, None, "a byte was not the sender's: {self:?}");
        assert_eq!(
            self.ending,
            Ending::Reset,
            "the stream must end in a reset: {self:?}"
        );
        assert!(
            self.bytes <= at_most,
            "more than the {at_most} bytes that were sent: {self:?}"
        );
    }
}

/// Fills `buffer` with the bytes that stand at `offset` and after in the stream of `seed`.
pub fn fill(seed: u64, offset: u64, buffer: &mut [u8]) {
    let mut index = offset / 8;
    let head = (offset % 8) as usize;
    let mut rest = buffer;
    if head != 0 {
        let part = rest.len().min(8 - head);
        let (first, tail) = rest.split_at_mut(part);
        first.copy_from_slice(&word(seed, index).to_le_bytes()[head..head + part]);
        rest = tail;
        index += 1;
    }
    for chunk in rest.chunks_mut(8) {
        chunk.copy_from_slice(&word(seed, index).to_le_bytes()[..chunk.len()]);
        index += 1;
    }
}

/// Eight bytes of the stream: shifts and xors over the seed and the place, no state in between.
fn word(seed: u64, index: u64) -> u64 {
    let mut x = seed ^ index.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x ^= x >> 30;
    x = x.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^= x >> 27;
    x = x.wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Sends the bytes `from..to` of the stream of `seed`; the error carries how far it got in its text.
pub fn send(stream: &mut impl Write, seed: u64, from: u64, to: u64) -> std::io::Result<()> {
    let mut buffer = vec![0u8; 64 * 1024];
    let mut offset = from;
    while offset < to {
        let part = usize::try_from(to - offset).map_or(buffer.len(), |left| left.min(buffer.len()));
        fill(seed, offset, &mut buffer[..part]);
        stream.write_all(&buffer[..part]).map_err(|e| {
            std::io::Error::new(e.kind(), format!("sending after {offset} of {to} bytes: {e}"))
        })?;
        offset += part as u64;
    }
    Ok(())
}

/// Receives and checks the stream of `seed` to its end.
pub fn receive(stream: &mut impl Read, seed: u64) -> Received {
    receive_from(stream, seed, 0, u64::MAX)
}

/// Receives and checks the next bytes `from..to` of the stream of `seed`; `bytes` counts from `from`.
pub fn receive_from(stream: &mut impl Read, seed: u64, from: u64, to: u64) -> Received {
    let mut buffer = vec![0u8; 64 * 1024];
    let mut expected = vec![0u8; 64 * 1024];
    let mut offset = from;
    let result = |offset: u64, ending, wrong_at| Received {
        bytes: offset - from,
        ending,
        wrong_at,
    };
    while offset < to {
        let part = usize::try_from(to - offset).map_or(buffer.len(), |left| left.min(buffer.len()));
        let got = match stream.read(&mut buffer[..part]) {
            Ok(0) => return result(offset, Ending::Fin, None),
            Ok(got) => got,
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            Err(e) if e.kind() == ErrorKind::ConnectionReset => return result(offset, Ending::Reset, None),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                return result(offset, Ending::Silent, None);
            }
            Err(e) => panic!("reading after {offset} bytes: {e}"),
        };
        fill(seed, offset, &mut expected[..got]);
        if buffer[..got] != expected[..got] {
            let at = (0..got)
                .find(|&i| buffer[i] != expected[i])
                .map(|i| offset + i as u64);
            return result(offset, Ending::Enough, at);
        }
        offset += got as u64;
    }
    result(offset, Ending::Enough, None)
}

/// Receives exactly `bytes` from the start of the stream of `seed`, or panics with what came instead.
#[track_caller]
pub fn receive_exactly(stream: &mut impl Read, seed: u64, bytes: u64) {
    let got = receive_from(stream, seed, 0, bytes);
    assert_eq!(
        got,
        Received {
            bytes,
            ending: Ending::Enough,
            wrong_at: None
        }
    );
}

/// Both directions at once: sends `bytes` of the stream of `out` and ends that direction, while
/// receiving the stream of `into` to its end.
pub fn exchange(stream: TcpStream, out: u64, bytes: u64, into: u64) -> Received {
    let mut sending = stream.try_clone().expect("a second handle on a socket");
    let mut receiving = stream;
    let sender = std::thread::spawn(move || {
        send(&mut sending, out, 0, bytes)?;
        sending.shutdown(Shutdown::Write)
    });
    let received = receive(&mut receiving, into);
    let sent = sender.join().expect("the sending thread");
    if let Err(e) = sent {
        panic!("{e}; in the other direction: {received:?}");
    }
    received
}

/// As [`exchange`], of a stream of `expected` bytes, but ends its direction only when it has received those: what a source has left that
/// ends while it is held back is copied.
#[track_caller]
pub fn exchange_and_end(stream: TcpStream, out: u64, bytes: u64, into: u64, expected: u64) {
    let mut sending = stream.try_clone().expect("a second handle on a socket");
    let mut receiving = stream;
    let sender = std::thread::spawn(move || send(&mut sending, out, 0, bytes));
    receive_exactly(&mut receiving, into, expected);
    sender.join().expect("the sending thread").expect("sending");
    receiving.shutdown(Shutdown::Write).expect("ending the stream");
    receive_from(&mut receiving, into, expected, u64::MAX).must_be_whole(0);
}

/// Sends a short question and receives its echo, `rounds` times, each with other bytes.
pub fn ping(stream: &mut TcpStream, seed: u64, rounds: u64) -> std::io::Result<()> {
    for round in 0..rounds {
        let mut question = [0u8; 24];
        fill(seed, round * 24, &mut question);
        stream.write_all(&question)?;
        let mut answer = [0u8; 24];
        stream.read_exact(&mut answer)?;
        if question != answer {
            return Err(std::io::Error::other(format!(
                "round {round}: the echo differs from what was sent"
            )));
        }
    }
    Ok(())
}

/// Waits until the first byte is there, without taking it.
pub fn wait_for_a_byte(stream: &TcpStream) {
    stream.peek(&mut [0u8; 1]).expect("a first byte");
}

/// A pause that lets the other side come to rest where no status can tell that it has.
pub fn pause(milliseconds: u64) {
    std::thread::sleep(Duration::from_millis(milliseconds));
}
