//! Where connections to peers come from: `proxy_bind`, with the client's address in network namespaces of the test's
//! own. What else needs a network of its own is here as well: probes of a client that is gone, data in a SYN.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use crate::harness::greeter::{greeter, visit};
use crate::harness::networks::Networks;
use crate::harness::pattern::{exchange_and_end, pause, ping};
use crate::harness::program::{need, run, shell};
use crate::harness::{PATIENCE, Plan, Port, Upstream, connect, process};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, SockaddrStorage, setsockopt, socket, sockopt,
};

/// CAP_NET_RAW, as a set of capabilities in /proc.
const NET_RAW: u64 = 1 << 13;

const CLIENT: usize = 0;
const PROXY: usize = 1;
const SERVER: usize = 2;

/// A client, the proxy and a server, each in a network of its own. The server's way to the client leads through
/// the proxy's, which takes what comes from there for itself.
///
/// ```text
///   client 10.77.1.2 ─── 10.77.1.1 proxy 10.77.2.1 ─── 10.77.2.2 server
///        fd77:1::2          fd77:1::1    fd77:2::1         fd77:2::2
/// ```
fn networks() -> Networks<3> {
    Networks::new(["c", "p", "s"], |[c, p, s]| {
        vec![
            format!("ip -n {p} link add to-c type veth peer name to-p netns {c}"),
            format!("ip -n {p} link add to-s type veth peer name to-p netns {s}"),
            // A sysctl that only new devices take would come too late.
            format!(
                "for n in {c} {p} {s}; do ip netns exec $n sysctl -qw net.ipv4.conf.all.rp_filter=0; done"
            ),
            format!(
                "ip -n {c} addr add 10.77.1.2/24 dev to-p; ip -n {c} addr add fd77:1::2/64 dev to-p nodad"
            ),
            format!(
                "ip -n {p} addr add 10.77.1.1/24 dev to-c; ip -n {p} addr add fd77:1::1/64 dev to-c nodad"
            ),
            format!(
                "ip -n {p} addr add 10.77.2.1/24 dev to-s; ip -n {p} addr add fd77:2::1/64 dev to-s nodad"
            ),
            format!(
                "ip -n {s} addr add 10.77.2.2/24 dev to-p; ip -n {s} addr add fd77:2::2/64 dev to-p nodad"
            ),
            format!("ip -n {c} link set to-p up; ip -n {s} link set to-p up"),
            format!("ip -n {p} link set to-c up; ip -n {p} link set to-s up"),
            format!(
                "ip -n {s} route add default via 10.77.2.1; ip -n {s} -6 route add default via fd77:2::1"
            ),
            // What the server sends, to whomever, is the proxy's.
            format!(
                "ip -n {p} rule add iif to-s lookup 77; ip -n {p} route add local default dev lo table 77"
            ),
            format!(
                "ip -n {p} -6 rule add iif to-s lookup 77; ip -n {p} -6 route add local default dev lo table 77"
            ),
        ]
    })
}

/// A listener of the server's.
fn serve(networks: &Networks<3>, ip: &str) -> TcpListener {
    networks.within(SERVER, || {
        TcpListener::bind((ip, 0)).expect("binding in the server's network")
    })
}

/// Says whom the server sees, and echoes.
fn seen(listener: TcpListener) -> Upstream<SocketAddr> {
    Upstream::on(listener, |stream| {
        let peer = stream.peer_addr().expect("the peer's address");
        crate::harness::upstream::echo(stream);
        peer
    })
}

fn capabilities(pid: i32, set: &str) -> u64 {
    u64::from_str_radix(&process::field(pid, set), 16).expect("a set of capabilities")
}

#[test]
fn peers_see_the_address_that_the_server_says() {
    let server = seen(TcpListener::bind("127.0.0.1:0").expect("binding"));
    let port = Port::claim();
    let mut plan = Plan::new().stream("proxy_bind = \"127.0.0.9\"");
    let inherited = plan.server(&server);
    let own = plan.server_with(
        "127.0.0.1",
        &server,
        &format!("proxy_bind = \"127.0.0.10:{}\"", port.number),
    );
    let off = plan.server_with("127.0.0.1", &server, "proxy_bind = \"off\"");
    let proxy = plan.start();
    let session = |front| {
        let mut client = connect(front);
        ping(&mut client, 1, 3).expect("a session");
        drop(client);
        server.result()
    };
    assert_eq!(session(inherited).ip().to_string(), "127.0.0.9");
    // The port is free for the next one at once.
    for _ in 0..2 {
        assert_eq!(session(own).to_string(), format!("127.0.0.10:{}", port.number));
    }
    assert_eq!(session(off).ip().to_string(), "127.0.0.1");
    let status = proxy.settle();
    assert_eq!(status.fallbacks(), 0);
    assert!(status.sockmap().to_upstream > 0 && status.relay().sum() == 0);
}

#[test]
fn an_address_that_the_host_lacks_fails_the_session_and_is_said() {
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new();
    let front = plan.server_with("127.0.0.1", &echo, "proxy_bind = \"192.0.2.1\"");
    let other_kind = plan.server_with("127.0.0.1", &echo, "proxy_bind = \"::1\"");
    let proxy = plan.start();
    for front in [front, other_kind] {
        // The reset may come before connecting has returned.
        match crate::harness::sockets::try_connect(front) {
            Ok(mut client) => assert!(!matches!(client.read(&mut [0]), Ok(1..))),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
        }
    }
    let failed = format!(
        "failed to connect to {} from 192.0.2.1:0, as proxy_bind says: ",
        echo.address
    );
    for said in [&*failed, "no address of this host", "they are of two kinds"] {
        proxy.must_say(said);
    }
}

#[test]
fn a_peer_to_which_no_port_is_left_costs_an_attempt_and_is_not_blamed() {
    let (one, two) = (greeter(1), greeter(2));
    let port = Port::claim();
    let server = |upstream: &Upstream<()>, weight| {
        format!(
            "{{ address = \"{}\", weight = {weight}, max_fails = 1 }}",
            upstream.address
        )
    };
    let table = format!(
        "[[upstream]]\nname = \"app\"\nserver = [{}, {}]\n",
        server(&one, 1000),
        server(&two, 1)
    );
    let mut plan = Plan::new().tables(&table);
    // One port: a connection to each peer, and no more.
    let bind = format!("proxy_bind = \"127.0.0.11:{}\"", port.number);
    let front = plan.server_with("127.0.0.1", "app", &bind);
    let proxy = plan.start();
    let (first, by_one) = visit(front).expect("a greeting");
    let (second, by_two) = visit(front).expect("a greeting of the other peer");
    assert_eq!((by_one, by_two), (1, 2));
    assert!(visit(front).is_none(), "neither has a port left");
    drop((first, second));
    let status = proxy.settle();
    assert_eq!(status.number("/closes/resource"), 1, "{:#}", status.json());
    assert_eq!(visit(front).expect("a greeting").1, 1, "nobody was taken out");
}

/// The addresses of one family: client, proxy's side to it, server.
const FAMILIES: [[&str; 3]; 2] = [
    ["10.77.1.2", "10.77.1.1", "10.77.2.2"],
    ["fd77:1::2", "fd77:1::1", "fd77:2::2"],
];

#[test]
fn a_transparent_proxy_connects_from_the_client_and_the_kernel_carries_the_bytes() {
    // Less than ebpf_backlog_size, so that no source is held back: what it has left when it ends then is copied.
    const BYTES: u64 = 2 << 20;
    let networks = &networks();
    for [client_ip, front_ip, server_ip] in FAMILIES {
        let server = Upstream::on(serve(networks, server_ip), |stream| {
            let peer = stream.peer_addr().expect("the peer's address");
            exchange_and_end(stream, 2, BYTES, 1, BYTES);
            peer
        });
        networks.within(PROXY, move || {
            let mut plan = Plan::new().workers(2).global("user = \"nobody\"");
            let address = server.address;
            let any = plan.server_with(front_ip, address, "proxy_bind = \"transparent\"");
            let same_port = plan.server_with(
                front_ip,
                address,
                "proxy_bind = \"$remote_addr:$remote_port transparent\"",
            );
            let proxy = plan.start();
            for (front, port_too) in [(any, false), (same_port, true)] {
                let client = networks.within(CLIENT, || connect(front));
                let own = client.local_addr().expect("the client's address").port();
                exchange_and_end(client, 1, BYTES, 2, BYTES);
                let peer = server.result();
                assert_eq!(peer.ip(), client_ip.parse::<IpAddr>().expect("an address"));
                assert!(!port_too || peer.port() == own, "{peer} instead of port {own}");
            }
            let status = proxy.settle();
            assert_eq!(status.sockmap().to_upstream, 2 * BYTES);
            assert_eq!(status.sockmap().to_downstream, 2 * BYTES);
            assert_eq!(status.fallbacks(), 0);
        });
    }
}

#[test]
fn workers_have_the_one_right_that_transparency_needs_as_long_as_a_server_is_transparent() {
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new().workers(2).global("user = \"nobody\"");
    plan.server_with("127.0.0.1", &echo, "proxy_bind = \"transparent\"");
    let proxy = plan.start();
    let held = |wanted: u64| {
        for worker in proxy.status().workers() {
            for (set, wanted) in [
                ("CapPrm", wanted),
                ("CapEff", wanted),
                ("CapInh", 0),
                ("CapAmb", 0),
                ("CapBnd", 0),
            ] {
                assert_eq!(capabilities(worker.pid, set), wanted, "{set} of a worker");
            }
            assert_eq!(process::field(worker.pid, "NoNewPrivs"), "1");
            assert!(process::field(worker.pid, "Uid").starts_with("65534"));
        }
    };
    held(NET_RAW);
    proxy.edit("proxy_bind = \"transparent\"", "proxy_bind = \"off\"");
    proxy.reload();
    proxy.wait("new workers alone serve", |s| s.workers().len() == 2);
    held(0);
    proxy.edit("proxy_bind = \"off\"", "proxy_bind = \"transparent\"");
    proxy.reload();
    proxy.wait("new workers alone serve", |s| s.workers().len() == 2);
    held(NET_RAW);
}

#[test]
fn transparency_without_its_right_is_refused_at_the_start() {
    need("setpriv", "util-linux");
    let mut plan = Plan::new();
    plan.server_with("127.0.0.1", "127.0.0.1:1", "proxy_bind = \"transparent\"");
    let binary = plan.file("master");
    crate::harness::program::copy(env!("CARGO_BIN_EXE_master"), &binary);
    std::fs::set_permissions(&binary, std::fs::Permissions::from_mode(0o755)).expect("permissions");
    let file = plan.file("proxy.toml");
    std::fs::write(&file, plan.text()).expect("writing the configuration");
    let mut command = std::process::Command::new("setpriv");
    command.args(["--bounding-set=-net_raw", "--inh-caps=-net_raw", "--"]);
    command.arg(&binary).arg("-c").arg(&file);
    let refused = run(command, Duration::from_secs(10));
    assert_eq!(refused.code, Some(1), "{}", refused.err);
    assert!(
        refused.err.contains("the master lacks CAP_NET_RAW"),
        "{}",
        refused.err
    );
}

#[test]
fn a_client_that_is_gone_without_a_word_is_noticed_by_probes() {
    let networks = networks();
    networks.within(PROXY, || {
        let echo = Upstream::echo("127.0.0.1");
        let (probed, not) = (Port::claim(), Port::claim());
        let server = |port: &Port, options: &str| {
            format!(
                "[[server]]\nlisten = {{ address = \"10.77.1.1:{}\"{options} }}\nproxy_pass = \"{}\"\n",
                port.number, echo.address
            )
        };
        let plan = Plan::new()
            .tables(&server(&probed, ", so_keepalive = \"1s:1s:2\""))
            .tables(&server(&not, ""));
        let proxy = plan.start();
        let mut clients =
            [&probed, &not].map(|port| networks.within(CLIENT, || connect(port.on("10.77.1.1"))));
        for client in &mut clients {
            ping(client, 1, 2).expect("a session");
        }
        proxy.wait("both are in the kernel", |s| s.offloaded() == 2);
        // What is not acknowledged would be sent again, and nothing is probed meanwhile.
        pause(500);
        // Nobody there takes the probes, and nobody says so.
        let line = format!("ip -n {} addr del 10.77.1.2/24 dev to-p", networks.names[CLIENT]);
        shell(&line, PATIENCE);
        proxy.wait("the one that is probed has ended", |s| s.active() == 1);
        assert_eq!(proxy.status().number("/closes/downstream_reset"), 1);
    });
}

/// A number that the kernel counts in a network.
fn counted(networks: &Networks<3>, name: &str) -> u64 {
    let text = networks.within(PROXY, || {
        std::fs::read_to_string("/proc/thread-self/net/netstat").expect("the kernel's counters")
    });
    let lines: Vec<Vec<&str>> = text
        .lines()
        .filter(|line| line.starts_with("TcpExt:"))
        .map(|line| line.split_whitespace().collect())
        .collect();
    let at = lines[0].iter().position(|word| *word == name).expect(name);
    lines[1][at].parse().expect("a number")
}

/// Connects with data in the SYN, as far as the server has given a cookie for that before. With `late_ack` the handshake
/// is over 200 ms later only (tcp_rcv_synsent_state_process).
fn connect_with_data(address: SocketAddr, data: &[u8], late_ack: bool) -> TcpStream {
    let socket = socket(
        AddressFamily::Inet,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .expect("a socket");
    setsockopt(&socket, sockopt::TcpFastOpenConnect, &true).expect("TCP_FASTOPEN_CONNECT");
    if late_ack {
        setsockopt(&socket, crate::harness::sockets::DeferAccept, &1).expect("TCP_DEFER_ACCEPT");
    }
    nix::sys::socket::connect(socket.as_raw_fd(), &SockaddrStorage::from(address)).expect("connecting");
    nix::sys::socket::send(socket.as_raw_fd(), data, MsgFlags::empty()).expect("sending");
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    stream.set_write_timeout(Some(PATIENCE)).expect("a timeout");
    stream
}

#[test]
fn a_client_may_send_data_in_its_syn() {
    let networks = networks();
    networks.within(PROXY, || {
        for name in [&networks.names[CLIENT], &networks.names[PROXY]] {
            let line = format!("ip netns exec {name} sysctl -qw net.ipv4.tcp_fastopen=3");
            shell(&line, PATIENCE);
        }
        let echo = Upstream::echo("127.0.0.1");
        let port = Port::claim();
        let plan = Plan::new().tables(&format!(
            "[[server]]\nlisten = {{ address = \"10.77.1.1:{}\", fastopen = 16 }}\nproxy_pass = \"{}\"\n",
            port.number, echo.address
        ));
        let proxy = plan.start();
        let front = port.on("10.77.1.1");
        let session = |late_ack| {
            let mut client = networks.within(CLIENT, || connect_with_data(front, b"early", late_ack));
            let mut answer = [0; 5];
            client.read_exact(&mut answer).expect("an answer");
            assert_eq!(&answer, b"early");
            client.write_all(b"later").expect("sending");
            client.read_exact(&mut answer).expect("an answer");
            assert_eq!(&answer, b"later");
        };
        session(false);
        let before = counted(&networks, "TCPFastOpenPassive");
        for _ in 0..5 {
            session(false);
        }
        let early = counted(&networks, "TCPFastOpenPassive") - before;
        assert_eq!(early, 5, "connections with data in their SYN");
        let status = proxy.settle();
        assert_eq!(status.sockmap().to_upstream, 6 * 10);
        // The answer is sent before the handshake is over, and the kernel takes established connections only. A worker
        // that is held up may come too late for that.
        let early = (1..=10).find(|_| {
            session(true);
            proxy.settle().number("/fallbacks/early_end") == 1
        });
        let sessions = 6 + early.expect("an answer before the handshake was over");
        assert_eq!(proxy.settle().carried().to_upstream, sessions * 10);
    });
}
