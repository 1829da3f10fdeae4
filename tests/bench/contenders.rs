//! What is compared, each with the settings that its own documentation recommends for this work: as many pinned
//! workers, one listening socket per worker, no access log. Writes their configurations, starts them, stops
//! them by their process ids. Never measures.

use std::fmt::Write;
use std::fs::File;
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::harness::ports::Port;
use crate::harness::process;
use crate::site::Site;

/// The binary under test, built by cargo with this program.
pub const CULVERT: &str = env!("CARGO_BIN_EXE_master");
/// nginx's stream module, where Debian's package puts it.
const STREAM_MODULE: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";

/// One way from the client to the server.
#[derive(Debug)]
pub struct Contender {
    /// A word for the command line and the raw data.
    pub name: &'static str,
    /// The same in the tables and the plot.
    pub title: &'static str,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Direct,
    Culvert {
        stream: &'static str,
        /// With an access log, access rules, and metrics that somebody reads.
        equipped: bool,
    },
    Nginx {
        buffer: &'static str,
    },
    Haproxy,
}

/// Everybody, the one that all are compared with first.
pub const ALL: &[Contender] = &[
    Contender {
        name: "direct",
        title: "direct",
        kind: Kind::Direct,
    },
    Contender {
        name: "culvert",
        title: "Culvert, offloaded",
        kind: Kind::Culvert {
            stream: "ebpf_enable = true",
            equipped: false,
        },
    },
    Contender {
        name: "at_once",
        title: "Culvert, each session at once",
        kind: Kind::Culvert {
            stream: "ebpf_offload_after = \"0\"",
            equipped: false,
        },
    },
    Contender {
        name: "relayed",
        title: "Culvert, relayed",
        kind: Kind::Culvert {
            stream: "ebpf_enable = false",
            equipped: false,
        },
    },
    Contender {
        name: "equipped",
        title: "Culvert, with log, rules, metrics",
        kind: Kind::Culvert {
            stream: "ebpf_enable = true",
            equipped: true,
        },
    },
    Contender {
        name: "nginx16k",
        title: "nginx, 16k buffers",
        kind: Kind::Nginx { buffer: "16k" },
    },
    Contender {
        name: "nginx256k",
        title: "nginx, 256k buffers",
        kind: Kind::Nginx { buffer: "256k" },
    },
    Contender {
        name: "haproxy",
        title: "HAProxy, splice",
        kind: Kind::Haproxy,
    },
];

/// What all contenders have in common.
#[derive(Debug)]
pub struct Setup {
    /// Where the contenders, the servers and the clients are.
    pub site: Site,
    /// Configurations and logs.
    pub dir: PathBuf,
    /// Workers of each proxy.
    pub workers: usize,
}

/// One listening port and where it leads.
#[derive(Debug)]
struct Route {
    listen: Port,
    upstream: u16,
}

/// A contender that serves. Dropping it stops it.
#[derive(Debug)]
pub struct Proxy {
    server: Option<Background>,
    ip: IpAddr,
    routes: Vec<Route>,
    status: Option<Port>,
    /// Culvert's, where it serves them.
    metrics: Option<Port>,
    upstreams: Vec<u16>,
}

/// Fails with everything that is missing, and where Debian has it.
pub fn check_installed(contenders: &[&Contender]) -> Result<()> {
    let mut needs = vec![("iperf3", "iperf3"), ("setpriv", "util-linux")];
    for contender in contenders {
        match contender.kind {
            Kind::Nginx { .. } => {
                needs.extend([("nginx", "nginx-light"), (STREAM_MODULE, "libnginx-mod-stream")])
            }
            Kind::Haproxy => needs.push(("haproxy", "haproxy")),
            Kind::Direct | Kind::Culvert { .. } => {}
        }
    }
    let mut missing: Vec<&str> = needs
        .into_iter()
        .filter(|(program, _)| find(program).is_none())
        .map(|(_, package)| package)
        .collect();
    missing.dedup();
    if !missing.is_empty() {
        bail!("missing programs: apt-get install {}", missing.join(" "));
    }
    Ok(())
}

/// The path of a program; an absolute path is itself.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut dirs: Vec<PathBuf> = std::env::split_paths(&path).collect();
    dirs.extend(["/usr/sbin", "/sbin"].map(PathBuf::from));
    dirs.into_iter()
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

impl Contender {
    /// Starts it with one listener for each of the upstream ports, and waits until it serves. The last upstream
    /// must be one that tolerates a connection without a byte.
    pub fn start(&self, upstreams: &[u16], setup: &Setup) -> Result<Proxy> {
        let ip = setup.site.ip();
        let mut proxy = Proxy {
            server: None,
            ip,
            routes: Vec::new(),
            status: None,
            metrics: None,
            upstreams: upstreams.to_vec(),
        };
        if matches!(self.kind, Kind::Direct) {
            return Ok(proxy);
        }
        for &upstream in upstreams {
            let listen = Port::claim();
            proxy.routes.push(Route { listen, upstream });
        }
        let workers = setup.workers;
        // The first port in the names: the same contender may run twice at a time.
        let stem = setup
            .dir
            .join(format!("{}-{}", self.name, proxy.routes[0].listen.number));
        let file = stem.with_extension("conf");
        let (program, args, text) = match self.kind {
            Kind::Direct => return Ok(proxy),
            Kind::Culvert { stream, equipped } => {
                let status = proxy.status.insert(Port::claim()).number;
                let mut text = culvert(&proxy, workers, stream, status, &stem);
                if equipped {
                    let metrics = proxy.metrics.insert(Port::claim()).number;
                    text = equip(&text, ip, metrics, &stem);
                }
                (PathBuf::from(CULVERT), vec!["-c"], text)
            }
            Kind::Nginx { buffer } => {
                let text = nginx(&proxy, workers, buffer, &stem);
                (PathBuf::from("nginx"), vec!["-e", "stderr", "-c"], text)
            }
            Kind::Haproxy => {
                let text = haproxy(&proxy, workers);
                (PathBuf::from("haproxy"), vec!["-db", "-f"], text)
            }
        };
        std::fs::write(&file, text).with_context(|| format!("failed to write {}", file.display()))?;
        let program = find(&program.display().to_string()).unwrap_or(program);
        let mut command = Command::new("setpriv");
        // The proxy must not outlive this program, however this program ends.
        command.args(["--pdeathsig", "TERM"]).arg(program);
        command.args(args).arg(&file);
        let last = proxy.routes.last().map_or(0, |route| route.listen.number);
        let log = stem.with_extension("log");
        let server = Background::serving(command, &log, SocketAddr::new(ip, last))
            .with_context(|| format!("{} does not serve", self.title))?;
        proxy.server = Some(server);
        Ok(proxy)
    }
}

impl Proxy {
    /// Where the client connects to reach the upstream of that index.
    pub fn address(&self, upstream: usize) -> SocketAddr {
        let port = self
            .routes
            .get(upstream)
            .map_or(self.upstreams[upstream], |route| route.listen.number);
        SocketAddr::new(self.ip, port)
    }

    /// Every process of it; none where there is no proxy.
    pub fn processes(&self) -> Vec<i32> {
        self.server.iter().flat_map(Background::family).collect()
    }

    /// Reads Culvert's metrics, as a monitoring system does.
    pub fn scrape(&self) {
        let Some(port) = &self.metrics else { return };
        if let Ok(mut stream) = TcpStream::connect((self.ip, port.number)) {
            let _ = stream.set_read_timeout(Some(Duration::from_secs(5)));
            let _ = stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n");
            let _ = std::io::copy(&mut stream, &mut std::io::sink());
        }
    }

    /// Culvert's status document; nothing for the others.
    pub fn status(&self) -> Option<Value> {
        let port = self.status.as_ref()?.number;
        let stream = TcpStream::connect((self.ip, port)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
        serde_json::from_reader(stream).ok()
    }
}

fn culvert(proxy: &Proxy, workers: usize, stream: &str, status: u16, stem: &Path) -> String {
    let ip = proxy.ip;
    let mut text = format!(
        "worker_processes = {workers}\nworker_cpu_affinity = \"auto\"\nworker_connections = 4096\n\
         pid = \"{}\"\nerror_log = {{ path = \"stderr\", level = \"warn\" }}\n\
         [stream]\n{stream}\n\
         [[server]]\nlisten = \"{ip}:{status}\"\nebpf_status_return = true\n",
        stem.with_extension("pid").display()
    );
    for Route { listen, upstream } in &proxy.routes {
        let _ = writeln!(
            text,
            "[[server]]\nlisten = \"{ip}:{}\"\nproxy_pass = \"{ip}:{upstream}\"",
            listen.number
        );
    }
    text
}

/// Adds what a well-run proxy has beside forwarding: rules that are all looked at, a line for each session, metrics.
fn equip(text: &str, ip: IpAddr, metrics: u16, stem: &Path) -> String {
    let rules: Vec<String> = (0..16).map(|net| format!("\"deny 10.{net}.0.0/16\"")).collect();
    let stream = format!(
        "[stream]\naccess = [{}, \"allow all\"]\naccess_log = \"{}\"\n",
        rules.join(", "),
        stem.with_extension("access.log").display()
    );
    format!(
        "{}[http]\nlisten = \"{ip}:{metrics}\"\n",
        text.replacen("[stream]\n", &stream, 1)
    )
}

fn nginx(proxy: &Proxy, workers: usize, buffer: &str, stem: &Path) -> String {
    let ip = proxy.ip;
    let mut text = format!(
        "load_module {STREAM_MODULE};\ndaemon off;\nuser root;\nworker_processes {workers};\n\
         worker_cpu_affinity auto;\nworker_rlimit_nofile 16384;\npid {};\nerror_log stderr warn;\n\
         events {{ worker_connections 16384; }}\n\
         stream {{\n  access_log off;\n  proxy_buffer_size {buffer};\n",
        stem.with_extension("pid").display()
    );
    for Route { listen, upstream } in &proxy.routes {
        let port = listen.number;
        let _ = writeln!(
            text,
            "  server {{ listen {ip}:{port} reuseport; proxy_pass {ip}:{upstream}; }}"
        );
    }
    text.push_str("}\n");
    text
}

fn haproxy(proxy: &Proxy, workers: usize) -> String {
    let ip = proxy.ip;
    let mut text = format!(
        "global\n  nbthread {workers}\n  cpu-map auto:1/1-{workers} 0-{}\n  maxconn 5000\n\
         defaults\n  mode tcp\n  option splice-request\n  option splice-response\n\
         \x20 timeout connect 10s\n  timeout client 10m\n  timeout server 10m\n",
        workers - 1
    );
    for Route { listen, upstream } in &proxy.routes {
        let port = listen.number;
        let _ = writeln!(
            text,
            "listen r{port}\n  bind {ip}:{port} shards by-thread\n  server s {ip}:{upstream}"
        );
    }
    text
}

/// A program in the background. Dropping it ends it and its children.
#[derive(Debug)]
pub struct Background {
    child: Child,
    log: PathBuf,
}

impl Background {
    /// Starts a server with its output in a file, and waits until it listens.
    pub fn serving(command: Command, log: &Path, address: SocketAddr) -> Result<Background> {
        let mut server = Background::start(command, log)?;
        server.wait_for(address)?;
        Ok(server)
    }

    fn start(mut command: Command, log: &Path) -> Result<Background> {
        let file = File::create(log).with_context(|| format!("failed to create {}", log.display()))?;
        let child = command
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("failed to start {:?}", command.get_program()))?;
        Ok(Background {
            child,
            log: log.to_owned(),
        })
    }

    fn wait_for(&mut self, address: SocketAddr) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(15);
        loop {
            if TcpStream::connect(address).is_ok() {
                return Ok(());
            }
            let exit = self.child.try_wait()?;
            if exit.is_some() || Instant::now() > end {
                let log = std::fs::read_to_string(&self.log).unwrap_or_default();
                let what = exit.map_or("it still runs".to_owned(), |exit| format!("it ended with {exit}"));
                bail!("nothing listens on {address}: {what}, its log says: {log}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Its process id and those of its descendants.
    pub fn family(&self) -> Vec<i32> {
        let mut family = vec![self.child.id() as i32];
        let mut next = 0;
        while let Some(&pid) = family.get(next) {
            family.extend(process::children(pid));
            next += 1;
        }
        family
    }

    /// Ends it and waits until it is gone.
    pub fn end(&mut self) {
        let family = self.family();
        let _ = kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM);
        let end = Instant::now() + Duration::from_secs(5);
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(10));
        }
        if matches!(self.child.try_wait(), Ok(None)) {
            for pid in family {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            let _ = self.child.wait();
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.end();
    }
}
