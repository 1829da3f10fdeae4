//! Who may connect.

mod harness;

use std::io::{self, Write};
use std::net::{SocketAddr, TcpStream};

use harness::pattern::ping;
use harness::sockets::try_connect;
use harness::{Bytes, Ending, Plan, Status, Upstream, connect, receive};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, bind, socket};
use std::os::fd::AsRawFd;

/// Connects from an address of this host.
fn connect_from(ip: &str, front: SocketAddr) -> io::Result<TcpStream> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let new = socket(AddressFamily::Inet, SockType::Stream, flags, None).expect("a socket");
    let own = SocketAddr::new(ip.parse().expect("an address"), 0);
    bind(new.as_raw_fd(), &SockaddrStorage::from(own)).expect("binding");
    nix::sys::socket::connect(new.as_raw_fd(), &SockaddrStorage::from(front))?;
    let stream = TcpStream::from(new);
    stream
        .set_read_timeout(Some(harness::PATIENCE))
        .expect("a timeout");
    Ok(stream)
}

#[track_caller]
fn assert_let_in(client: io::Result<TcpStream>) {
    ping(&mut client.expect("a connection"), 1, 2).expect("an answer");
}

#[track_caller]
fn assert_denied(client: io::Result<TcpStream>) {
    // The reset may come before the client's kernel says that it is connected.
    match client {
        Ok(mut client) => assert_eq!(receive(&mut client, 1).ending, Ending::Reset),
        Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset),
    }
}

#[track_caller]
fn denied(status: &Status) -> u64 {
    status.number("/closes/denied")
}

const PINGS: u64 = 2 * 24;

fn both(bytes: u64) -> Bytes {
    Bytes {
        to_upstream: bytes,
        to_downstream: bytes,
    }
}

#[test]
fn the_first_rule_that_fits_decides_and_the_kernel_carries_who_is_let_in() {
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new().stream("access = \"deny all\"");
    let rules = "access = [\"deny 127.0.0.3\", \"allow 127.0.0.0/30\", \"deny all\"]";
    let front = plan.server_with("127.0.0.1", &echo, rules);
    let inherited = plan.server(&echo);
    let open = plan.server_with("127.0.0.1", &echo, "access = []");
    let v6 = plan.server_with("::1", &echo, "access = [\"allow ::1\", \"deny all\"]");
    let v6_denied = plan.server_with("::1", &echo, "access = [\"allow 127.0.0.1\", \"deny ::/0\"]");
    // The status listener inherits what [stream] says.
    let text = plan.text().replace(
        "ebpf_status_return = true",
        "ebpf_status_return = true\naccess = \"allow 127.0.0.1\"",
    );
    let file = plan.file("open-status.toml");
    std::fs::write(&file, text).expect("the configuration");
    let proxy = harness::Proxy::start_file(plan, &file);
    assert_let_in(connect_from("127.0.0.1", front));
    assert_let_in(connect_from("127.0.0.2", front));
    assert_denied(connect_from("127.0.0.3", front));
    assert_denied(connect_from("127.0.0.4", front));
    assert_denied(connect_from("127.0.0.1", inherited));
    assert_let_in(connect_from("127.0.0.9", open));
    assert_let_in(try_connect(v6));
    assert_denied(try_connect(v6_denied));
    let status = proxy.settle();
    assert_eq!(denied(&status), 4, "{:#}", status.json());
    assert_eq!(status.sockmap(), both(4 * PINGS));
    assert_eq!(status.relay(), Bytes::default());
    assert_eq!(
        status.number("/upstreams/0/peers/0/connected"),
        4,
        "no peer heard of the others"
    );
}

#[test]
fn the_client_that_a_believed_header_names_is_the_one_that_counts() {
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new().stream("access = [\"deny 192.0.2.0/24\", \"deny 2001:db8::/32\"]");
    let trusting = plan.server_listening("proxy_protocol = true", &echo, "set_real_ip_from = \"127.0.0.1\"");
    let other = plan.server_listening("proxy_protocol = true", &echo, "");
    let proxy = plan.start();
    let open = |front: SocketAddr, header: &str| {
        let mut client = connect(front);
        client.write_all(header.as_bytes()).expect("the header");
        Ok(client)
    };
    let v4 = "PROXY TCP4 192.0.2.7 198.51.100.9 40000 443\r\n";
    assert_denied(open(trusting, v4));
    assert_denied(open(trusting, "PROXY TCP6 ::ffff:192.0.2.7 ::1 40000 443\r\n"));
    assert_denied(open(trusting, "PROXY TCP6 2001:db8::1 ::1 40000 443\r\n"));
    assert_let_in(open(
        trusting,
        "PROXY TCP4 198.51.100.7 198.51.100.9 40000 443\r\n",
    ));
    assert_let_in(open(trusting, "PROXY UNKNOWN\r\n"));
    assert_let_in(open(other, v4));
    let status = proxy.settle();
    assert_eq!(denied(&status), 3, "{:#}", status.json());
    assert_eq!(status.sockmap(), both(3 * PINGS));
}

#[test]
fn the_status_document_is_for_those_who_may_connect() {
    let mut plan = Plan::new();
    let echo = Upstream::echo("127.0.0.1");
    let front = plan.server(&echo);
    let port = harness::Port::claim();
    let hidden = port.on("127.0.0.1");
    let plan = plan.tables(&format!(
        "[[server]]\nlisten = \"{hidden}\"\nebpf_status_return = true\naccess = [\"allow 127.0.0.1\", \"deny all\"]\n"
    ));
    let proxy = plan.start();
    let mut text = String::new();
    std::io::Read::read_to_string(
        &mut connect_from("127.0.0.1", hidden).expect("a connection"),
        &mut text,
    )
    .expect("the status");
    assert!(text.starts_with('{'), "{text:?}");
    assert_denied(connect_from("127.0.0.2", hidden));
    assert_let_in(try_connect(front));
    assert_eq!(denied(&proxy.settle()), 1);
}
