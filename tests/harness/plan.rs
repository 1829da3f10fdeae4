//! The configuration of one proxy, written piece by piece: each server gets a port of its own, and
//! there is always a status listener. Owns the directory that the file and the logs live in.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::ports::Port;
use super::proxy::Proxy;
use super::watchdog;

/// A directory that disappears with this value.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// A new empty directory that other users may enter.
    pub fn new() -> Scratch {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "culvert-test-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap_or_else(|e| panic!("failed to create {}: {e}", path.display()));
        Scratch(path)
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// A file in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Where a server passes its sessions: anything that `proxy_pass` takes.
pub trait Target {
    /// The value of `proxy_pass`.
    fn proxy_pass(&self) -> String;
}

impl Target for SocketAddr {
    fn proxy_pass(&self) -> String {
        self.to_string()
    }
}

impl Target for &str {
    fn proxy_pass(&self) -> String {
        (*self).to_owned()
    }
}

/// A configuration in the making.
#[derive(Debug)]
pub struct Plan {
    pub(super) scratch: Scratch,
    pub(super) workers: usize,
    pub(super) status: SocketAddr,
    pub(super) launcher: Vec<String>,
    pub(super) binary: PathBuf,
    pub(super) lifetime: Duration,
    pub(super) ports: Vec<Port>,
    global: String,
    stream: String,
    tables: String,
}

impl Plan {
    /// One worker, no servers yet.
    pub fn new() -> Plan {
        let port = Port::claim();
        Plan {
            scratch: Scratch::new(),
            workers: 1,
            status: port.on("127.0.0.1"),
            launcher: Vec::new(),
            binary: PathBuf::from(env!("CARGO_BIN_EXE_master")),
            lifetime: watchdog::LIFETIME,
            ports: vec![port],
            global: String::new(),
            stream: String::new(),
            tables: String::new(),
        }
    }

    /// `worker_processes`.
    pub fn workers(mut self, count: usize) -> Plan {
        self.workers = count;
        self
    }

    /// Lines at the top of the file.
    pub fn global(mut self, lines: &str) -> Plan {
        self.global.push_str(lines);
        self.global.push('\n');
        self
    }

    /// Lines of `[stream]`.
    pub fn stream(mut self, lines: &str) -> Plan {
        self.stream.push_str(lines);
        self.stream.push('\n');
        self
    }

    /// Whole tables, such as an `[[upstream]]`.
    pub fn tables(mut self, lines: &str) -> Plan {
        self.tables.push_str(lines);
        self.tables.push('\n');
        self
    }

    /// A command that the binary is started through, such as `setpriv` with its options.
    pub fn launched_by(mut self, command: &[&str]) -> Plan {
        self.launcher = command.iter().map(|s| (*s).to_owned()).collect();
        self
    }

    /// The command that the binary is started through.
    pub fn launcher(&self) -> &[String] {
        &self.launcher
    }

    /// Another copy of the binary.
    pub fn binary(mut self, path: PathBuf) -> Plan {
        self.binary = path;
        self
    }

    /// How long the proxy may run before the watchdog kills it.
    pub fn lifetime(mut self, lifetime: Duration) -> Plan {
        self.lifetime = lifetime;
        self
    }

    /// A server on 127.0.0.1; returns where it listens.
    pub fn server(&mut self, target: impl Target) -> SocketAddr {
        self.server_with("127.0.0.1", target, "")
    }

    /// A server on the given address, with further lines for its table; returns where it listens.
    pub fn server_with(&mut self, ip: &str, target: impl Target, lines: &str) -> SocketAddr {
        let port = Port::claim();
        let listen = port.on(ip);
        self.ports.push(port);
        let pass = target.proxy_pass();
        self.tables.push_str(&format!(
            "[[server]]\nlisten = \"{listen}\"\nproxy_pass = \"{pass}\"\n{lines}\n\n"
        ));
        listen
    }

    /// A server on 127.0.0.1 whose `listen` is a table with these further keys; returns where it listens.
    pub fn server_listening(&mut self, options: &str, target: impl Target, lines: &str) -> SocketAddr {
        let port = Port::claim();
        let listen = port.on("127.0.0.1");
        self.ports.push(port);
        let pass = target.proxy_pass();
        self.tables.push_str(&format!(
            "[[server]]\nlisten = {{ address = \"{listen}\", {options} }}\nproxy_pass = \"{pass}\"\n{lines}\n\n"
        ));
        listen
    }

    /// A file in the directory of this proxy.
    pub fn file(&self, name: &str) -> PathBuf {
        self.scratch.file(name)
    }

    /// The port of the status listener, on 127.0.0.1.
    pub fn status_port(&self) -> u16 {
        self.status.port()
    }

    /// The file's text.
    pub fn text(&self) -> String {
        let Plan {
            workers,
            status,
            global,
            stream,
            tables,
            ..
        } = self;
        let pid = self.scratch.file("master.pid");
        format!(
            "worker_processes = {workers}\npid = \"{}\"\n{global}\n[stream]\n{stream}\n{tables}\
             [[server]]\nlisten = \"{status}\"\nebpf_status_return = true\n",
            pid.display()
        )
    }

    /// Starts the proxy and waits until it serves.
    #[track_caller]
    pub fn start(self) -> Proxy {
        Proxy::start(self)
    }
}

impl Default for Plan {
    fn default() -> Self {
        Plan::new()
    }
}
