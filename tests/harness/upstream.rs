//! Servers for the proxy to connect to. Each connection is served by a thread of its own, and what
//! the serving function returns is handed to the test. Every socket has a timeout.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};

use super::plan::Target;
use super::{PATIENCE, Received, receive};

/// Connections are many and their work is small.
const STACK: usize = 256 * 1024;

/// A listening TCP server; ends with this value.
#[derive(Debug)]
pub struct Upstream<T> {
    /// Where it listens.
    pub address: SocketAddr,
    results: Receiver<T>,
    stop: Arc<AtomicBool>,
}

impl<T: Send + 'static> Upstream<T> {
    /// Serves every connection with `serve`, on a free port of `ip`.
    pub fn serve(ip: &str, serve: impl Fn(TcpStream) -> T + Send + Sync + 'static) -> Upstream<T> {
        Upstream::on(TcpListener::bind((ip, 0)).expect("binding an upstream"), serve)
    }

    /// The same on a listener that exists already.
    pub fn on(listener: TcpListener, serve: impl Fn(TcpStream) -> T + Send + Sync + 'static) -> Upstream<T> {
        let address = listener.local_addr().expect("the upstream's address");
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let (sender, results) = channel();
        let serve = Arc::new(serve);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if stopping.load(Ordering::Relaxed) {
                    return;
                }
                let _ = stream.set_nodelay(true);
                let _ = stream.set_read_timeout(Some(PATIENCE));
                let _ = stream.set_write_timeout(Some(PATIENCE));
                let (serve, sender) = (Arc::clone(&serve), sender.clone());
                let connection = std::thread::Builder::new().stack_size(STACK).spawn(move || {
                    // The test may have ended, and does not want the result any more.
                    let _ = sender.send(serve(stream));
                });
                connection.expect("starting a thread for a connection");
            }
        });
        Upstream {
            address,
            results,
            stop,
        }
    }

    /// What the next connection to end returned.
    #[track_caller]
    pub fn result(&self) -> T {
        self.results
            .recv_timeout(PATIENCE)
            .expect("a connection at the upstream, served to its end")
    }
}

impl Upstream<()> {
    /// Sends back what comes, and ends when it ends.
    pub fn echo(ip: &str) -> Upstream<()> {
        Upstream::serve(ip, echo)
    }
}

impl Upstream<Received> {
    /// Checks the stream of `seed` to its end, and says nothing.
    pub fn sink(ip: &str, seed: u64) -> Upstream<Received> {
        Upstream::serve(ip, move |mut stream| receive(&mut stream, seed))
    }
}

impl<T> Target for &Upstream<T> {
    fn proxy_pass(&self) -> String {
        self.address.to_string()
    }
}

impl<T> Drop for Upstream<T> {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // The accepting thread sleeps until a connection comes.
        let _ = TcpStream::connect_timeout(&self.address, PATIENCE);
    }
}

/// Sends back what comes; half close is answered by half close.
pub fn echo(mut stream: TcpStream) {
    let mut buffer = vec![0u8; 32 * 1024];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => {
                let _ = stream.shutdown(Shutdown::Write);
                return;
            }
            Ok(got) => {
                if stream.write_all(&buffer[..got]).is_err() {
                    return;
                }
            }
            Err(_) => return,
        }
    }
}

/// Accepts one connection on a unix socket and serves it; the result comes through the channel.
pub fn unix<T: Send + 'static>(path: &Path, serve: impl Fn(UnixStream) -> T + Send + 'static) -> Receiver<T> {
    let listener =
        UnixListener::bind(path).unwrap_or_else(|e| panic!("failed to bind {}: {e}", path.display()));
    let (sender, results) = channel();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let _ = stream.set_read_timeout(Some(PATIENCE));
            let _ = stream.set_write_timeout(Some(PATIENCE));
            if sender.send(serve(stream)).is_err() {
                return;
            }
        }
    });
    results
}
