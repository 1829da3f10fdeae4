//! Addresses for one test alone. Ports come from below the range of outgoing connections, and each is
//! claimed for as long as the test runs by a UDP socket on the same number, which tests in other
//! threads and processes see. Never binds the TCP port itself longer than to see that it is free.

use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::sync::atomic::{AtomicU32, Ordering};

/// Below Linux's default `ip_local_port_range`, above what services commonly take.
const FIRST: u32 = 12_000;
const COUNT: u32 = 20_000;

/// A port number that nobody else uses while this value lives.
#[derive(Debug)]
pub struct Port {
    /// The number, free on every local address when it was claimed.
    pub number: u16,
    _claim: UdpSocket,
}

impl Port {
    /// Claims a free port.
    pub fn claim() -> Port {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        for _ in 0..COUNT {
            let step = NEXT.fetch_add(1, Ordering::Relaxed);
            // Processes start at different places, so that they rarely try the same number.
            let offset = std::process::id().wrapping_mul(7919).wrapping_add(step) % COUNT;
            let number = u16::try_from(FIRST + offset).expect("the range lies within u16");
            let Ok(claim) = UdpSocket::bind(("127.0.0.1", number)) else {
                continue;
            };
            let free = TcpListener::bind(("0.0.0.0", number)).is_ok();
            if free && TcpListener::bind(("::1", number)).is_ok() {
                return Port {
                    number,
                    _claim: claim,
                };
            }
        }
        panic!("no free port between {FIRST} and {}", FIRST + COUNT);
    }

    /// The port on the given address, such as `127.0.0.1` or `::1`.
    pub fn on(&self, ip: &str) -> SocketAddr {
        SocketAddr::new(ip.parse().expect("an IP address"), self.number)
    }
}
