//! Who may connect, how many at once, and how fast.

use std::io::{self, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::harness::pattern::ping;
use crate::harness::sockets::try_connect;
use crate::harness::{Bytes, Ending, Plan, Status, Upstream, connect, receive};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, bind, socket};
use nix::unistd::Pid;
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
        .set_read_timeout(Some(crate::harness::PATIENCE))
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
    let proxy = crate::harness::Proxy::start_file(plan, &file);
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
    let port = crate::harness::Port::claim();
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

const ZONE: &str = "[[limit_conn_zone]]\nname = \"per_client\"\nkey = \"$remote_addr\"\n";

/// Opens a session and waits for its first answer; `None`: it was reset.
fn open(front: SocketAddr, ip: &str) -> Option<TcpStream> {
    let mut client = connect_from(ip, front).ok()?;
    ping(&mut client, 1, 1).ok()?;
    Some(client)
}

/// Exactly `room` more sessions of an address are let in; they stay open.
#[track_caller]
fn fill_up(front: SocketAddr, ip: &str, room: usize) -> Vec<TcpStream> {
    let opened: Vec<_> = (0..room + 5).map(|_| open(front, ip)).collect();
    let opened: Vec<TcpStream> = opened.into_iter().flatten().collect();
    assert_eq!(opened.len(), room, "sessions that {ip} got");
    opened
}

fn end(client: TcpStream) {
    client.shutdown(Shutdown::Write).expect("the end of the stream");
    let _ = receive(&mut &client, 1);
}

#[test]
fn a_client_has_as_many_sessions_as_limit_conn_says_over_all_workers_and_servers() {
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new().workers(3).tables(ZONE);
    let front = plan.server_with("127.0.0.1", &echo, "limit_conn = \"per_client 7\"");
    let other = plan.server_with("127.0.0.1", &echo, "limit_conn = [\"per_client 8\"]");
    let unlimited = plan.server(&echo);
    let proxy = plan.start();
    let mut open_here = fill_up(front, "127.0.0.1", 7);
    let elsewhere = fill_up(front, "127.0.0.2", 7);
    // The servers count together; the other one lets in one more.
    let one_more = fill_up(other, "127.0.0.1", 1);
    let free: Vec<TcpStream> = (0..20).filter_map(|_| open(unlimited, "127.0.0.1")).collect();
    assert_eq!(free.len(), 20);
    for client in open_here.drain(..4).chain(one_more) {
        end(client);
    }
    proxy.wait("they have ended", |s| s.active() == 3 + 7 + 20);
    open_here.extend(fill_up(front, "127.0.0.1", 4));
    let status = proxy.status();
    assert_eq!(status.number("/closes/limit_conn"), 20, "{:#}", status.json());
    assert_eq!(status.relay(), Bytes::default());
    assert_eq!(status.fallbacks(), 0);
    drop((open_here, elsewhere, free));
    proxy.settle();
    drop(fill_up(front, "127.0.0.1", 7));
    proxy.settle();
}

#[test]
fn counts_stay_right_over_reloads_and_killed_workers() {
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new().workers(2).tables(ZONE);
    let front = plan.server_with("127.0.0.1", &echo, "limit_conn = \"per_client 6\"");
    let proxy = plan.start();
    let kept = fill_up(front, "127.0.0.1", 6);
    // Handed over, twice.
    for reloads in 1..=2 {
        proxy.reload();
        proxy.wait("the sessions are with the next workers", |s| {
            s.number("/sessions/adopted") == 6 * reloads && s.workers().len() == 2
        });
        fill_up(front, "127.0.0.1", 0);
    }
    // Their workers killed; young sessions of another address die with them.
    let young = fill_up(front, "127.0.0.2", 6);
    for worker in proxy.status().workers() {
        kill(Pid::from_raw(worker.pid), Signal::SIGKILL).expect("killing a worker");
    }
    proxy.wait("the kept sessions are with the next workers", |s| {
        s.number("/sessions/adopted") >= 18 && s.number("/worker_restarts") == 2
    });
    fill_up(front, "127.0.0.1", 0);
    assert_eq!(
        proxy.status().active(),
        6,
        "the kept sessions live, young ones die with their worker"
    );
    let again = fill_up(front, "127.0.0.2", 6);
    drop(young);
    for client in kept {
        let mut client = client;
        ping(&mut client, 2, 2).expect("an answer");
        end(client);
    }
    drop(again);
    proxy.settle();
    let again = (fill_up(front, "127.0.0.1", 6), fill_up(front, "127.0.0.2", 6));
    drop(again);
    proxy.settle();
}

#[test]
fn connections_of_a_key_come_at_the_rate_and_a_burst_at_once() {
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new().workers(2).tables(ZONE);
    let front = plan.server_with(
        "127.0.0.1",
        &echo,
        "limit_conn_rate = \"per_client 10r/s burst=4\"",
    );
    let proxy = plan.start();
    let begun = Instant::now();
    let (mut let_in, mut missed) = (0.0, 0.0);
    while begun.elapsed() < Duration::from_millis(1500) {
        let since = begun.elapsed();
        let_in += open(front, "127.0.0.1").iter().count() as f64;
        // What comes while nobody asks is kept up to the burst.
        missed += 10.0 * ((begun.elapsed() - since).as_secs_f64() - 0.3).max(0.0);
    }
    let due = 5.0 + 10.0 * begun.elapsed().as_secs_f64();
    assert!(
        (due - 3.0 - missed..=due + 1.0).contains(&let_in),
        "5 at once and ten a second, {due} of them, got {let_in}"
    );
    assert!(
        open(front, "127.0.0.2").is_some(),
        "another key has a rate of its own"
    );
    let status = proxy.settle();
    assert!(
        status.number("/closes/limit_conn_rate") > 0,
        "{:#}",
        status.json()
    );
    assert_eq!(status.fallbacks(), 0);
}

#[test]
fn an_empty_key_does_not_count() {
    let echo = Upstream::echo("127.0.0.1");
    let zone = ZONE.replace("remote_addr", "proxy_protocol_addr");
    let mut plan = Plan::new().tables(&zone);
    let front = plan.server_with("127.0.0.1", &echo, "limit_conn = \"per_client 1\"");
    let proxy = plan.start();
    let clients: Vec<TcpStream> = (0..5).filter_map(|_| open(front, "127.0.0.1")).collect();
    assert_eq!(clients.len(), 5);
    drop(clients);
    proxy.settle();
}
