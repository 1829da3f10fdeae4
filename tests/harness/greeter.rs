//! Servers that are told apart by their greeting.

use std::io::Read;
use std::net::{SocketAddr, TcpListener, TcpStream};

use super::pattern::fill;
use super::{PATIENCE, Upstream, send};

/// Greets with eight bytes of its own, then gives back what comes.
pub fn greeter(seed: u64) -> Upstream<()> {
    greeter_on("127.0.0.1", 0, seed)
}

/// The same at this address; port 0: any.
pub fn greeter_on(ip: &str, port: u16, seed: u64) -> Upstream<()> {
    let listener = TcpListener::bind((ip, port)).expect("binding an upstream");
    Upstream::on(listener, move |stream| greet(stream, seed))
}

/// What a greeter does with each connection.
pub fn greet(mut stream: TcpStream, seed: u64) {
    if send(&mut stream, seed, 0, 8).is_ok() {
        super::upstream::echo(stream);
    }
}

/// Connects, and tells which greeter answered; `None`: none did.
pub fn visit(front: SocketAddr) -> Option<(TcpStream, u64)> {
    let mut greeting = [0u8; 8];
    // A session for which there is no peer may be reset before this end has returned from connecting.
    let mut stream = TcpStream::connect(front).ok()?;
    stream
        .set_read_timeout(Some(PATIENCE))
        .expect("setting a timeout");
    stream.read_exact(&mut greeting).ok()?;
    let seed = (1..10).find(|seed| {
        let mut expected = [0u8; 8];
        fill(*seed, 0, &mut expected);
        greeting == expected
    });
    Some((stream, seed.expect("a greeting")))
}

/// Which greeter answers.
pub fn seed(front: SocketAddr) -> Option<u64> {
    visit(front).map(|(_, seed)| seed)
}
