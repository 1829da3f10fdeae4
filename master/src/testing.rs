//! Configurations and sockets for unit tests.

use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};

use culvert_shared::config::{
    Action, Address, Balance, Config, ErrorLog, FlowSteering, Listen, ListenOptions, LogTarget, OffloadAfter,
    OnReload, Peer, ProxyBind, Rate, Server, Stream, Target, TcpCongestion, Upstream,
};

/// One server for each listener, all proxying to the first upstream; one worker on CPU 0.
pub fn config(listeners: &[&str], upstreams: &[(&str, &[&str])]) -> Config {
    let stream = Stream {
        ebpf_enable: false,
        proxy_timeout: Duration::from_secs(600),
        proxy_connect_timeout: Duration::from_secs(60),
        proxy_next_upstream: true,
        proxy_next_upstream_tries: 0,
        proxy_next_upstream_timeout: Duration::ZERO,
        proxy_buffer_size: 16 * 1024,
        proxy_half_close: true,
        tcp_nodelay: true,
        tcp_congestion: TcpCongestion::Auto,
        proxy_socket_keepalive: false,
        proxy_bind: ProxyBind::Off,
        ebpf_timer_period: Duration::from_secs(2),
        ebpf_backlog_size: 4 << 20,
        ebpf_offload_after: OffloadAfter::Auto,
        on_reload: OnReload::Keep,
        proxy_protocol: None,
        proxy_protocol_timeout: Duration::from_secs(30),
        set_real_ip_from: Vec::new(),
        access: Vec::new(),
        limit_conn: Vec::new(),
        limit_conn_rate: Vec::new(),
        proxy_upload_rate: Rate::OFF,
        proxy_download_rate: Rate::OFF,
        ssl_preread: false,
        preread_buffer_size: 16 * 1024,
        preread_timeout: Duration::from_secs(30),
        resolver: None,
        access_log: None,
    };
    Config {
        user: None,
        worker_cpus: vec![vec![0]],
        worker_connections: 64,
        worker_backlog_size: None,
        worker_shutdown_timeout: None,
        flow_steering: FlowSteering::Off,
        pid: "/nonexistent/master.pid".into(),
        error_log: ErrorLog {
            target: LogTarget::Stderr,
            level: log::LevelFilter::Info,
        },
        upstreams: upstreams
            .iter()
            .map(|(name, peers)| Upstream {
                name: (*name).to_owned(),
                balance: Balance::RoundRobin,
                peers: peers
                    .iter()
                    .map(|peer| Peer::new(Address::Tcp(address(peer))))
                    .collect(),
                check: None,
                queue: None,
                names: Vec::new(),
            })
            .collect(),
        stream: stream.clone(),
        maps: Vec::new(),
        limit_zones: Vec::new(),
        servers: listeners
            .iter()
            .map(|listen| Server {
                listen: vec![Listen {
                    address: Address::Tcp(address(listen)),
                    backlog: 511,
                    proxy_protocol: false,
                    options: ListenOptions::default(),
                }],
                action: Action::Proxy(Target::Upstream(0)),
                stream: stream.clone(),
            })
            .collect(),
    }
}

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// See [`lingering`].
pub const LINGER: Duration = Duration::from_secs(6);

/// A connection whose peer reads nothing, and has not got everything: closing the first socket takes [`LINGER`].
pub fn lingering() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (peer, _) = listener.accept().unwrap();
    socket.set_nonblocking(true).unwrap();
    while socket.write(&[0; 65_536]).is_ok() {}
    linger(&socket);
    (socket, peer)
}

/// Has closing the socket wait.
pub fn linger(socket: &TcpStream) {
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: LINGER.as_secs() as libc::c_int,
    };
    setsockopt(socket, sockopt::Linger, &linger).unwrap();
}
