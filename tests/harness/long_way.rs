//! A long way between two networks of a test: packets wait for a place on the link, as in a router, and then for as long as the way is;
//! some are lost, doubled, or overtaken by later ones. Made of two TUN devices and a thread that carries packets from one
//! to the other, for not every kernel has netem.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::libc;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::{TimeSpec, TimeValLike};

use super::PATIENCE;
use super::networks::Networks;
use super::program::shell;
use super::random::Random;

/// What the way does to packets, the same in both directions.
#[derive(Debug, Clone, Copy)]
pub struct Way {
    /// How long it is.
    pub delay: Duration,
    /// What it carries in a second.
    pub mbit_s: u64,
    /// What waits for it at most; whatever else comes is dropped.
    pub queue_bytes: u64,
    /// Of a million packets, how many are lost. Those with a reset are not: nobody sends them again.
    pub lost: u64,
    /// Of a million, how many arrive twice.
    pub doubled: u64,
    /// Of a million, how many arrive after those that were sent up to half a delay later.
    pub late: u64,
}

impl Way {
    /// One that does nothing to packets but make them wait.
    pub fn faultless(delay: Duration, mbit_s: u64, queue_bytes: u64) -> Way {
        Way {
            delay,
            mbit_s,
            queue_bytes,
            lost: 0,
            doubled: 0,
            late: 0,
        }
    }
}

/// What became of the packets.
#[derive(Debug, Clone, Copy, Default)]
pub struct Packets {
    /// That arrived.
    pub carried: u64,
    /// That the way lost.
    pub lost: u64,
    /// That found the queue full.
    pub dropped: u64,
    /// That arrived twice.
    pub doubled: u64,
    /// That arrived late.
    pub late: u64,
}

/// The way, in use. It is gone with this value.
#[derive(Debug)]
pub struct LongWay {
    switches: Arc<Switches>,
    thread: Option<JoinHandle<Packets>>,
}

#[derive(Debug, Default)]
struct Switches {
    is_over: AtomicBool,
    /// What is sent from these ends is lost.
    cut: [AtomicBool; 2],
}

impl LongWay {
    /// Between two of some networks, with the first addresses of 10.`net`.0.0/24 and fd00:`net`::/64, as `name` in both.
    pub fn between<const N: usize>(
        networks: &Networks<N>,
        ends: [usize; 2],
        name: &str,
        net: u8,
        way: Way,
    ) -> LongWay {
        let devices = ends.map(|end| networks.within(end, || device(name)));
        for (end, host) in ends.into_iter().zip(1..) {
            let network = &networks.names[end];
            shell(
                &format!(
                    "ip -n {network} addr add 10.{net}.0.{host}/24 dev {name};
                     ip -n {network} addr add fd00:{net}::{host}/64 dev {name} nodad;
                     ip -n {network} link set {name} txqueuelen 20000 up"
                ),
                PATIENCE,
            );
        }
        let switches = Arc::new(Switches::default());
        let shared = switches.clone();
        let thread = std::thread::spawn(move || carry(devices, way, &shared));
        LongWay {
            switches,
            thread: Some(thread),
        }
    }

    /// Loses everything but resets that is sent from the first or the second of its ends, from now on or no longer.
    pub fn cut(&self, end: usize, is_cut: bool) {
        self.switches.cut[end].store(is_cut, Ordering::Relaxed);
    }

    /// Ends it.
    pub fn end(mut self) -> Packets {
        self.switches.is_over.store(true, Ordering::Relaxed);
        let thread = self.thread.take().expect("it ends once");
        thread.join().expect("the way between the networks")
    }
}

impl Drop for LongWay {
    fn drop(&mut self) {
        self.switches.is_over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A TUN device of that name in the caller's network.
fn device(name: &str) -> File {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .unwrap_or_else(|e| panic!("/dev/net/tun: {e} (as root, and with the module tun?)"));
    // SAFETY: every field of this structure of numbers may be 0.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    assert!(name.len() < libc::IFNAMSIZ, "{name} is too long for a device");
    for (place, letter) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = letter as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: the descriptor is open, and TUNSETIFF reads and writes one ifreq.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &mut request) };
    assert_eq!(result, 0, "TUNSETIFF: {}", std::io::Error::last_os_error());
    file
}

/// A packet under way; the one that arrives first is the least.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Packet {
    arrives: Instant,
    number: u64,
    bytes: Vec<u8>,
}

/// One direction.
#[derive(Debug)]
struct Direction {
    way: Way,
    random: Random,
    under_way: BinaryHeap<Reverse<Packet>>,
    is_free_at: Instant,
    number: u64,
    packets: Packets,
}

impl Direction {
    /// A packet has come to the beginning of the way.
    fn take(&mut self, bytes: &[u8], now: Instant) {
        const MILLION: u64 = 1_000_000;
        let mut happens = |of_a_million: u64| self.random.below(MILLION) < of_a_million;
        if happens(self.way.lost) && !is_reset(bytes) {
            self.packets.lost += 1;
            return;
        }
        let (is_double, is_late) = (happens(self.way.doubled), happens(self.way.late));
        let time = |bytes: u64| Duration::from_nanos(bytes * 8_000 / self.way.mbit_s);
        let begins = self.is_free_at.max(now);
        if begins - now > time(self.way.queue_bytes) {
            self.packets.dropped += 1;
            return;
        }
        self.is_free_at = begins + time(bytes.len() as u64);
        let mut arrives = self.is_free_at + self.way.delay;
        if is_late {
            self.packets.late += 1;
            arrives += self.way.delay / 2 * self.random.below(100) as u32 / 100;
        }
        self.packets.doubled += u64::from(is_double);
        for _ in 0..1 + u64::from(is_double) {
            self.number += 1;
            let (number, bytes) = (self.number, bytes.to_vec());
            self.under_way.push(Reverse(Packet {
                arrives,
                number,
                bytes,
            }));
        }
    }

    fn next(&self) -> Option<Instant> {
        self.under_way.peek().map(|Reverse(packet)| packet.arrives)
    }
}

/// Whether the TCP segment in an IP packet without options or extensions is a reset.
fn is_reset(packet: &[u8]) -> bool {
    const RST: u8 = 4;
    let tcp = match packet.first().map(|byte| byte >> 4) {
        Some(4) => 20,
        _ => 40,
    };
    packet.get(tcp + 13).is_some_and(|flags| flags & RST != 0)
}

fn carry(mut devices: [File; 2], way: Way, switches: &Switches) -> Packets {
    const AT_ONCE: usize = 64;
    const LONGEST_WAIT: Duration = Duration::from_millis(10);
    let mut directions = [0, 1].map(|direction| Direction {
        way,
        random: Random(direction),
        under_way: BinaryHeap::new(),
        is_free_at: Instant::now(),
        number: 0,
        packets: Packets::default(),
    });
    let mut buffer = vec![0; 64 * 1024];
    while !switches.is_over.load(Ordering::Relaxed) {
        let now = Instant::now();
        for (from, direction) in directions.iter_mut().enumerate() {
            let is_cut = switches.cut[from].load(Ordering::Relaxed);
            for _ in 0..AT_ONCE {
                match devices[from].read(&mut buffer) {
                    Ok(length) if is_cut && !is_reset(&buffer[..length]) => direction.packets.lost += 1,
                    Ok(length) => direction.take(&buffer[..length], now),
                    // Nothing is there, or the network is gone and with it the test.
                    Err(_) => break,
                }
            }
            while direction.next().is_some_and(|arrives| arrives <= now) {
                let Some(Reverse(packet)) = direction.under_way.pop() else {
                    break;
                };
                // A device that has no room, or is gone, loses it as a wire would.
                let arrived = devices[1 - from].write(&packet.bytes).is_ok();
                direction.packets.carried += u64::from(arrived);
            }
        }
        let next = directions.iter().filter_map(Direction::next).min();
        let wait = next.map_or(LONGEST_WAIT, |next| {
            next.saturating_duration_since(Instant::now()).min(LONGEST_WAIT)
        });
        let mut fds = [&devices[0], &devices[1]].map(|device| PollFd::new(device.as_fd(), PollFlags::POLLIN));
        // An interruption, like a time-out, is a reason to look.
        let _ = ppoll(
            &mut fds,
            Some(TimeSpec::nanoseconds(wait.as_nanos() as i64)),
            None,
        );
    }
    let [one, other] = directions.map(|direction| direction.packets);
    Packets {
        carried: one.carried + other.carried,
        lost: one.lost + other.lost,
        dropped: one.dropped + other.dropped,
        doubled: one.doubled + other.doubled,
        late: one.late + other.late,
    }
}
