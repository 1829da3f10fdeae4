//! Name servers: dnsmasq, and servers of the test's own that answer as it says.

use std::net::{SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::program::{Running, need};
use super::{PATIENCE, Port, Scratch, Upstream, send};

/// dnsmasq with a zone `test` of its own: addresses from a file of hosts, anything else from options.
pub struct DnsServer {
    scratch: Scratch,
    binary: PathBuf,
    port: Port,
    /// More of its command line.
    pub options: Vec<String>,
    running: Option<Running>,
}

impl DnsServer {
    /// Not started yet.
    pub fn new() -> DnsServer {
        DnsServer {
            scratch: Scratch::new(),
            binary: need("dnsmasq", "dnsmasq-base"),
            port: Port::claim(),
            options: Vec::new(),
            running: None,
        }
    }

    /// One that serves these hosts.
    pub fn started(hosts: &str) -> DnsServer {
        let mut server = DnsServer::new();
        server.write(hosts);
        server.start();
        server
    }

    fn hosts(&self) -> PathBuf {
        self.scratch.file("hosts")
    }

    /// Lines of "address name name…".
    pub fn write(&self, hosts: &str) {
        std::fs::write(self.hosts(), format!("{hosts}\n")).expect("writing the hosts");
    }

    /// Starts it, and waits until it answers.
    pub fn start(&mut self) {
        let mut command = Command::new(&self.binary);
        command
            .args([
                "--keep-in-foreground",
                "--conf-file=/dev/null",
                "--no-resolv",
                "--no-hosts",
            ])
            .args([
                "--bind-interfaces",
                "--listen-address=127.0.0.4",
                "--user=root",
                "--group=root",
            ])
            .args([
                "--pid-file=",
                "--local=/test/",
                "--local-ttl=1",
                "--log-facility=-",
            ])
            .arg(format!("--port={}", self.port.number))
            .arg(format!("--addn-hosts={}", self.hosts().display()))
            .args(&self.options);
        self.running = Some(Running::start(command).wait_for(self.address()));
    }

    /// Ends it.
    pub fn stop(&mut self) {
        self.running = None;
    }

    /// Other hosts, without a restart.
    pub fn change(&self, hosts: &str) {
        self.write(hosts);
        let pid = self.running.as_ref().expect("it runs").pid();
        kill(Pid::from_raw(pid), Signal::SIGHUP).expect("signalling dnsmasq");
    }

    /// Where it listens; not where the claim of the port is bound.
    pub fn address(&self) -> SocketAddr {
        self.port.on("127.0.0.4")
    }

    /// The line that names it, with further keys.
    pub fn resolver(&self, more: &str) -> String {
        resolver(self.address(), more)
    }
}

/// The line that names a resolver, with further keys.
pub fn resolver(address: SocketAddr, more: &str) -> String {
    format!("resolver = {{ addresses = [\"{address}\"]{more} }}")
}

/// A name server of the test's own: gives each question to `answer`, and sends what that returns. Counts questions.
pub fn fake(
    answer: impl Fn(usize, &[u8]) -> Vec<Vec<u8>> + Send + 'static,
) -> (SocketAddr, Arc<AtomicUsize>) {
    let socket = UdpSocket::bind("127.0.0.1:0").expect("binding a name server");
    let address = socket.local_addr().expect("its address");
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    std::thread::spawn(move || {
        let mut buffer = [0; 1024];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let n = count.fetch_add(1, Ordering::SeqCst);
            for bytes in answer(n, &buffer[..length]) {
                let _ = socket.send_to(&bytes, from);
            }
        }
    });
    (address, asked)
}

/// An answer to a question: its flags, and records of the name that was asked for.
pub fn reply(question: &[u8], flags: u16, records: &[&[u8]]) -> Vec<u8> {
    let mut bytes = question.to_vec();
    bytes[2..4].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&(records.len() as u16).to_be_bytes());
    records.iter().for_each(|record| bytes.extend_from_slice(record));
    bytes
}

/// A record of the name that was asked for, valid for a second.
pub fn a_record(ip: [u8; 4]) -> Vec<u8> {
    let mut bytes = vec![0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 1, 0, 4];
    bytes.extend(ip);
    bytes
}

/// The flags of a good answer.
pub const OK: u16 = 0x8180;
