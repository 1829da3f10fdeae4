//! PROXY headers: read from clients, sent to upstreams. What follows a header is carried by the kernel.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::harness::pattern::{fill, pause, ping, receive_from};
use crate::harness::program::{Running, need, run};
use crate::harness::sockets::reset;
use crate::harness::{
    Bytes, Ending, Plan, Port, Proxy, Status, Upstream, connect, process, receive, receive_exactly,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const IN: &str = "proxy_protocol = true";
const TRUST: &str = "set_real_ip_from = [\"127.0.0.0/8\", \"2001:db8::/32\"]";
const V1: &[u8] = b"PROXY TCP4 192.0.2.7 198.51.100.9 40000 443\r\n";
const SEED: u64 = 5;

/// A header of version 2 over IPv6, with TLVs.
fn v2_with_tlvs() -> Vec<u8> {
    let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21\x21".to_vec();
    let tlvs = [&b"\x02\0\x0bexample.org"[..], b"\x04\0\x64", &[0; 100]].concat();
    header.extend((36 + tlvs.len() as u16).to_be_bytes());
    header.extend([0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    header.extend([0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
    header.extend([0x9c, 0x40, 0x01, 0xbb]);
    header.extend(tlvs);
    header
}

/// A server that reads a header of version 1, then answers everything with itself; returns the header.
fn echo_behind_a_header() -> Upstream<String> {
    Upstream::serve("127.0.0.1", |mut stream| {
        let line = read_line(&mut stream);
        crate::harness::upstream::echo(stream);
        line
    })
}

fn read_line(stream: &mut TcpStream) -> String {
    let (mut line, mut byte) = (Vec::new(), [0]);
    while !line.ends_with(b"\r\n") && stream.read(&mut byte).is_ok_and(|read| read == 1) {
        line.push(byte[0]);
    }
    String::from_utf8_lossy(&line).into_owned()
}

/// Sends `bytes` of the pattern, ends, and expects them all back.
#[track_caller]
fn exchange_with_echo(mut client: TcpStream, bytes: u64) {
    let mut payload = vec![0; bytes as usize];
    fill(SEED, 0, &mut payload);
    // A client that has ended before it was joined cannot be.
    client.write_all(&payload[..8]).expect("the first bytes");
    receive_exactly(&mut client, SEED, 8);
    let mut sending = client.try_clone().expect("a second handle on a socket");
    let rest = payload.split_off(8);
    let sender = std::thread::spawn(move || sending.write_all(&rest));
    assert_eq!(receive_from(&mut client, SEED, 8, bytes).bytes, bytes - 8);
    sender.join().expect("the sending thread").expect("the payload");
    // Not before: what a source has left that ends while it is held back is copied.
    client.shutdown(Shutdown::Write).expect("the end of the stream");
    receive_from(&mut client, SEED, bytes, u64::MAX).must_be_whole(0);
}

fn both(bytes: u64) -> Bytes {
    Bytes {
        to_upstream: bytes,
        to_downstream: bytes,
    }
}

/// How many sessions were closed for this reason.
#[track_caller]
fn closed(status: &Status, reason: &str) -> u64 {
    status.number(&format!("/closes/{reason}"))
}

#[track_caller]
fn assert_all_finished(status: &Status, sessions: u64) {
    assert_eq!(closed(status, "finished"), sessions, "{:#}", status.json());
    assert_eq!(status.number("/sessions/total"), sessions);
}

#[test]
fn what_follows_a_header_is_carried_by_the_kernel_however_the_header_arrives() {
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new();
    let front = plan.server_listening(IN, &echo, "");
    let proxy = plan.start();
    let v2 = v2_with_tlvs();
    let mut sessions = 0;
    for header in [V1, &v2, b"PROXY UNKNOWN\r\n", b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"] {
        // In one segment with the payload.
        let mut client = connect(front);
        let mut glued = [header, &[0; 1000]].concat();
        fill(SEED, 0, &mut glued[header.len()..]);
        client.write_all(&glued).expect("header and payload");
        receive_exactly(&mut client, SEED, 1000);
        // Byte by byte.
        let mut client = connect(front);
        for byte in header {
            client.write_all(&[*byte]).expect("a byte of the header");
        }
        exchange_with_echo(client, 1000);
        // In two pieces with a pause, and a question and answer before the rest.
        let mut client = connect(front);
        client
            .write_all(&header[..header.len() / 2])
            .expect("half a header");
        pause(50);
        client
            .write_all(&header[header.len() / 2..])
            .expect("the other half");
        ping(&mut client, 3, 1).expect("an answer");
        client.shutdown(Shutdown::Write).expect("the end of the stream");
        receive(&mut client, 3).must_be_whole(0);
        sessions += 3;
    }
    let status = proxy.settle();
    assert_all_finished(&status, sessions);
    assert_eq!(status.relay().to_downstream, 0, "{:#}", status.json());
    assert_eq!(status.fallbacks(), 0, "{:#}", status.json());
    assert_eq!(status.sockmap(), both(4 * (1000 + 1000 + 24)));
}

#[test]
fn a_header_alone_connects_a_client_that_waits_for_the_server_to_speak() {
    let greeter = Upstream::serve("127.0.0.1", |mut stream| stream.write_all(b"hello"));
    let mut plan = Plan::new();
    let front = plan.server_listening(IN, &greeter, "");
    let proxy = plan.start();
    let mut client = connect(front);
    client.write_all(V1).expect("the header");
    let mut greeting = [0; 5];
    client.read_exact(&mut greeting).expect("a greeting");
    assert_eq!(&greeting, b"hello");
    drop(client);
    proxy.settle();
}

#[test]
fn the_address_of_a_header_is_believed_from_trusted_peers_only() {
    let upstream = echo_behind_a_header();
    let mut plan = Plan::new().stream("proxy_protocol = true");
    let trusting = plan.server_listening(IN, &upstream, TRUST);
    let other = plan.server_listening(IN, &upstream, "set_real_ip_from = \"10.0.0.0/8\"");
    let nobody = plan.server_listening(IN, &upstream, "");
    let plain = plan.server(&upstream);
    let proxy = plan.start();
    let line = |front: SocketAddr, header: &[u8]| {
        let mut client = connect(front);
        let local = client.local_addr().expect("an address").port();
        client.write_all(header).expect("the header");
        exchange_with_echo(client, 100_000);
        upstream.result().replace(&format!(" {local} "), " LOCAL ")
    };
    let port = trusting.port();
    assert_eq!(
        line(trusting, V1),
        format!("PROXY TCP4 192.0.2.7 127.0.0.1 40000 {port}\r\n")
    );
    assert_eq!(
        line(trusting, &v2_with_tlvs()),
        format!("PROXY TCP6 2001:db8::1 ::ffff:127.0.0.1 40000 {port}\r\n")
    );
    let unknown = line(trusting, b"PROXY UNKNOWN\r\n");
    assert_eq!(
        unknown,
        format!("PROXY TCP4 127.0.0.1 127.0.0.1 LOCAL {port}\r\n")
    );
    for (front, header) in [(other, V1), (nobody, V1), (plain, b"")] {
        let port = front.port();
        assert_eq!(
            line(front, header),
            format!("PROXY TCP4 127.0.0.1 127.0.0.1 LOCAL {port}\r\n")
        );
    }
    let status = proxy.settle();
    assert_all_finished(&status, 6);
    assert_eq!(status.fallbacks(), 0);
    assert_eq!(
        status.sockmap(),
        both(6 * 100_000),
        "headers are not the kernel's, payload is"
    );
}

#[test]
fn a_header_sent_upstream_comes_first_and_the_kernel_carries_the_rest() {
    for (version, length) in [("\"v1\"", None), ("\"v2\"", Some(28))] {
        let upstream = Upstream::serve("127.0.0.1", move |mut stream| {
            let header = match length {
                None => read_line(&mut stream).into_bytes(),
                Some(length) => {
                    let mut header = vec![0; length];
                    stream.read_exact(&mut header).expect("a header");
                    header
                }
            };
            crate::harness::upstream::echo(stream);
            header
        });
        let mut plan = Plan::new();
        let front = plan.server_with("127.0.0.1", &upstream, &format!("proxy_protocol = {version}"));
        let proxy = plan.start();
        let mut sent = 0;
        for _ in 0..5 {
            let client = connect(front);
            let local = client.local_addr().expect("an address").port();
            exchange_with_echo(client, 300_000);
            let header = upstream.result();
            match length {
                None => {
                    let line = format!("PROXY TCP4 127.0.0.1 127.0.0.1 {local} {}\r\n", front.port());
                    assert_eq!(header, line.as_bytes());
                }
                Some(_) => {
                    assert_eq!(&header[..16], b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c");
                    assert_eq!(&header[16..24], &[127, 0, 0, 1, 127, 0, 0, 1]);
                    assert_eq!(header[24..26], local.to_be_bytes());
                    assert_eq!(header[26..], front.port().to_be_bytes());
                }
            }
            sent += header.len() as u64;
        }
        let status = proxy.settle();
        assert_all_finished(&status, 5);
        assert_eq!(status.sockmap(), both(5 * 300_000));
        let headers = Bytes {
            to_upstream: sent,
            to_downstream: 0,
        };
        assert_eq!(
            status.relay(),
            headers,
            "user space wrote the headers and nothing else"
        );
    }
}

#[test]
fn each_attempt_that_connects_gets_one_header() {
    let nobody = Port::claim();
    let upstream = echo_behind_a_header();
    let group = format!(
        "[[upstream]]\nname = \"group\"\nserver = [\"{}\", \"{}\"]\n",
        nobody.on("127.0.0.1"),
        upstream.address
    );
    let mut plan = Plan::new().tables(&group);
    let front = plan.server_with("127.0.0.1", "group", "proxy_protocol = true");
    let proxy = plan.start();
    for _ in 0..6 {
        let client = connect(front);
        exchange_with_echo(client, 5000);
        assert!(upstream.result().starts_with("PROXY TCP4 "));
    }
    assert_all_finished(&proxy.settle(), 6);
}

#[test]
fn a_header_is_sent_to_a_peer_on_a_unix_socket_too() {
    let mut plan = Plan::new();
    let path = plan.file("peer.sock");
    let results = crate::harness::upstream::unix(&path, |mut stream| {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).map(|_| all)
    });
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o666)).expect("chmod");
    let target = format!("unix:{}", path.display());
    let front = plan.server_with("127.0.0.1", target.as_str(), "proxy_protocol = true");
    let proxy = plan.start();
    let mut client = connect(front);
    client.write_all(b"payload").expect("the payload");
    client.shutdown(Shutdown::Write).expect("the end of the stream");
    let all = results
        .recv_timeout(crate::harness::PATIENCE)
        .expect("a connection")
        .expect("its bytes");
    let text = String::from_utf8(all).expect("text");
    assert!(
        text.starts_with("PROXY TCP4 127.0.0.1 127.0.0.1 ") && text.ends_with("\r\npayload"),
        "{text:?}"
    );
    drop(client);
    proxy.settle();
}

#[test]
fn a_connection_without_a_valid_header_is_closed_and_the_upstream_never_hears_of_it() {
    let upstream = Upstream::sink("127.0.0.1", 1);
    let mut plan = Plan::new();
    let front = plan.server_listening(IN, &upstream, "proxy_protocol_timeout = \"30s\"");
    let hasty = plan.server_listening(IN, &upstream, "proxy_protocol_timeout = \"500ms\"");
    let proxy = plan.start();
    let mut v2_too_long = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\xff\xff".to_vec();
    v2_too_long.resize(5000, 1);
    let bad: [&[u8]; 4] = [
        b"GET / HTTP/1.1\r\n\r\n",
        &[b'P'; 2],
        b"PROXY TCP4 1 2 3 4\r\n",
        &v2_too_long,
    ];
    for bytes in bad {
        let mut client = connect(front);
        let _ = client.write_all(bytes);
        let begun = Instant::now();
        assert_eq!(receive(&mut client, 1).ending, Ending::Reset);
        assert!(
            begun.elapsed() < Duration::from_secs(15),
            "at once, not at the timeout"
        );
    }
    // Too slow: the clock starts when the connection is accepted, and bytes do not move it.
    let mut slow = connect(hasty);
    let refused = V1[..40].iter().any(|byte| {
        pause(60);
        slow.write_all(&[*byte]).is_err()
    });
    assert!(refused, "forty bytes took longer than the timeout");
    // Gone in the middle: by an end, and by a reset.
    let mut ended = connect(front);
    ended.write_all(&V1[..20]).expect("half a header");
    ended.shutdown(Shutdown::Write).expect("the end of the stream");
    assert_eq!(receive(&mut ended, 1).ending, Ending::Reset);
    let mut gone = connect(front);
    gone.write_all(&V1[..20]).expect("half a header");
    reset(gone);
    let empty = connect(front);
    drop(empty);
    let status = proxy.settle();
    assert_eq!(closed(&status, "bad_request"), 4, "{:#}", status.json());
    assert_eq!(closed(&status, "read_timeout"), 1, "{:#}", status.json());
    assert_eq!(
        closed(&status, "downstream_left_reading"),
        3,
        "{:#}",
        status.json()
    );
    assert_eq!(status.number("/upstreams/0/peers/0/connected"), 0);
}

#[test]
fn half_a_header_does_not_keep_the_worker_busy() {
    let echo = Upstream::echo("127.0.0.1");
    let mut plan = Plan::new();
    let front = plan.server_listening(IN, &echo, "");
    let proxy = plan.start();
    let mut waiting: Vec<TcpStream> = (0..50).map(|_| connect(front)).collect();
    for client in &mut waiting {
        client.write_all(&V1[..30]).expect("half a header");
    }
    proxy.wait("all sessions are there", |s| s.active() == 50);
    let worker = proxy.worker();
    let spent = || {
        (
            process::voluntary_switches(worker),
            process::processor_time(worker),
        )
    };
    let before = spent();
    pause(1000);
    let after = spent();
    assert!(
        after.0 - before.0 < 20,
        "{} wake-ups in a second",
        after.0 - before.0
    );
    assert!(
        after.1 - before.1 < Duration::from_millis(100),
        "{:?} of CPU time in a second",
        after.1 - before.1
    );
    for client in &mut waiting {
        client.write_all(&V1[30..]).expect("the rest of the header");
        ping(client, 1, 1).expect("an answer");
    }
    assert_eq!(proxy.status().relay().sum(), 0);
    drop(waiting);
    proxy.settle();
}

#[test]
fn variables_of_the_header_lead_to_an_upstream() {
    let (one, two) = (
        Upstream::echo("127.0.0.1"),
        Upstream::serve("127.0.0.1", |mut s| s.write_all(b"two")),
    );
    let groups = format!(
        "[[upstream]]\nname = \"from-192.0.2.7-40000-to-198.51.100.9-443\"\nserver = \"{}\"\n\n\
         [[upstream]]\nname = \"from---to--\"\nserver = \"{}\"\n",
        one.address, two.address
    );
    let mut plan = Plan::new().tables(&groups);
    let name = "from-$proxy_protocol_addr-$proxy_protocol_port-to-$proxy_protocol_server_addr-\
                $proxy_protocol_server_port";
    let front = plan.server_listening(IN, name, "");
    let proxy = plan.start();
    let mut client = connect(front);
    client.write_all(V1).expect("the header");
    ping(&mut client, 1, 1).expect("the first upstream");
    drop(client);
    let mut client = connect(front);
    client.write_all(b"PROXY UNKNOWN\r\n").expect("the header");
    let mut answer = [0; 3];
    client.read_exact(&mut answer).expect("the second upstream");
    drop(client);
    proxy.settle();
}

#[test]
fn sessions_that_began_with_headers_outlive_a_reload_and_a_killed_worker() {
    let upstream = echo_behind_a_header();
    let mut plan = Plan::new();
    let front = plan.server_listening(IN, &upstream, "proxy_protocol = true");
    let proxy = plan.start();
    let open = |n: u64| {
        let mut client = connect(front);
        client.write_all(V1).expect("the header");
        ping(&mut client, n, 1).expect("an answer");
        client
    };
    let mut clients: Vec<TcpStream> = (0..5).map(open).collect();
    let before = proxy.status().generation();
    proxy.signal(Signal::SIGHUP);
    proxy.wait("the new generation has the sessions", |s| {
        s.generation() > before && s.number("/sessions/adopted") == 5
    });
    clients.extend((5..10).map(open));
    proxy.wait("the master keeps them all", |s| s.number("/sessions/kept") == 10);
    kill(Pid::from_raw(proxy.worker()), Signal::SIGKILL).expect("killing the worker");
    proxy.wait("another worker has the sessions", |s| {
        s.number("/sessions/adopted") == 15
    });
    for mut client in clients {
        ping(&mut client, 7, 2).expect("an answer");
        client.shutdown(Shutdown::Write).expect("the end of the stream");
        receive(&mut client, 7).must_be_whole(0);
    }
    let status = proxy.settle();
    assert_all_finished(&status, 10);
    assert_eq!(status.fallbacks(), 0);
}

/// nginx with this `stream` or `http` block.
fn nginx(plan: &Plan, block: &str, listens: SocketAddr) -> Running {
    let file = plan.file("nginx.conf");
    let text = format!(
        "load_module /usr/lib/nginx/modules/ngx_stream_module.so;\ndaemon off;\nmaster_process off;\n\
         error_log stderr notice;\npid {};\nevents {{ worker_connections 256; }}\n{block}\n",
        plan.file("nginx.pid").display()
    );
    std::fs::write(&file, text).expect("nginx's configuration");
    let mut command = Command::new(need("nginx", "nginx-light libnginx-mod-stream"));
    command.arg("-c").arg(&file);
    Running::start(command).wait_for(listens)
}

/// HAProxy with these sections.
fn haproxy(plan: &Plan, sections: &str, listens: SocketAddr) -> Running {
    let file = plan.file("haproxy.cfg");
    let defaults = "defaults\n timeout connect 5s\n timeout client 20s\n timeout server 20s\n";
    std::fs::write(&file, format!("global\n{defaults}{sections}")).expect("HAProxy's configuration");
    let mut command = Command::new(need("haproxy", "haproxy"));
    command.arg("-db").arg("-f").arg(&file);
    Running::start(command).wait_for(listens)
}

/// Asks with curl; returns the body and the address that curl had itself.
#[track_caller]
fn curl(url: &str, options: &[&str]) -> (String, String) {
    let mut command = Command::new(need("curl", "curl"));
    command
        .args([
            "-sS",
            "--max-time",
            "20",
            "-w",
            "\n%{local_ip}:%{local_port}",
            url,
        ])
        .args(options);
    let out = run(command, Duration::from_secs(30)).must_succeed("curl");
    let (body, own) = out.rsplit_once('\n').expect("two lines");
    (body.trim().to_owned(), own.to_owned())
}

#[track_caller]
fn assert_only_headers_were_copied(proxy: &Proxy, header_bytes: std::ops::RangeInclusive<u64>) {
    let status = proxy.settle();
    let relayed = status.relay();
    assert_eq!(relayed.to_downstream, 0, "{:#}", status.json());
    assert!(header_bytes.contains(&relayed.to_upstream), "{relayed:?} copied");
    assert!(status.sockmap().to_upstream > 0 && status.sockmap().to_downstream > 0);
    assert_eq!(status.fallbacks(), 0);
}

#[test]
fn nginx_names_the_client_and_haproxy_hears_of_it() {
    let mut plan = Plan::new();
    let (entry, last) = (Port::claim(), Port::claim());
    let (entry, last) = (entry.on("127.0.0.1"), last.on("127.0.0.1"));
    let front = plan.server_listening(IN, last, &format!("proxy_protocol = \"v2\"\n{TRUST}"));
    let _haproxy = haproxy(
        &plan,
        &format!(
            "frontend f\n mode http\n bind {last} accept-proxy\n \
             http-request return status 200 content-type text/plain lf-string \"%[src]:%[src_port]\"\n"
        ),
        last,
    );
    let _nginx = nginx(
        &plan,
        &format!("stream {{ server {{ listen {entry}; proxy_pass {front}; proxy_protocol on; }} }}"),
        entry,
    );
    let proxy = plan.start();
    proxy.settle();
    for _ in 0..3 {
        let (seen, own) = curl(&format!("http://{entry}/"), &[]);
        assert_eq!(seen, own, "HAProxy sees curl's own address");
    }
    assert_only_headers_were_copied(&proxy, 3 * 28..=3 * 28);
}

#[test]
fn haproxy_names_the_client_with_tlvs_and_nginx_hears_of_it() {
    let mut plan = Plan::new();
    let (entry, last) = (Port::claim(), Port::claim());
    let (entry, last) = (entry.on("127.0.0.1"), last.on("127.0.0.1"));
    let front = plan.server_listening(IN, last, &format!("proxy_protocol = \"v1\"\n{TRUST}"));
    let _nginx = nginx(
        &plan,
        &format!(
            "http {{ access_log off; server {{ listen {last} proxy_protocol; \
             return 200 \"$proxy_protocol_addr:$proxy_protocol_port\"; }} }}"
        ),
        last,
    );
    let _haproxy = haproxy(
        &plan,
        &format!(
            "frontend f\n mode tcp\n bind {entry}\n unique-id-format id-%pid-%rt\n default_backend b\nbackend b\n \
             mode tcp\n server s {front} send-proxy-v2 proxy-v2-options unique-id,crc32c\n"
        ),
        entry,
    );
    let proxy = plan.start();
    proxy.settle();
    for _ in 0..3 {
        let (seen, own) = curl(&format!("http://{entry}/"), &[]);
        assert_eq!(seen, own, "nginx sees curl's own address");
    }
    assert_only_headers_were_copied(&proxy, 3 * 30..=3 * 107);
}

#[test]
fn curl_names_itself_and_culvert_leads_it_on() {
    let mut plan = Plan::new();
    let last = Port::claim();
    let last = last.on("127.0.0.1");
    let front = plan.server_listening(IN, last, &format!("proxy_protocol = true\n{TRUST}"));
    let _haproxy = haproxy(
        &plan,
        &format!(
            "frontend f\n mode http\n bind {last} accept-proxy\n \
             http-request return status 200 content-type text/plain lf-string \"%[src]:%[src_port]\"\n"
        ),
        last,
    );
    let proxy = plan.start();
    let (seen, own) = curl(&format!("http://{front}/"), &["--haproxy-protocol"]);
    assert_eq!(seen, own);
    assert_only_headers_were_copied(&proxy, 30..=107);
}
