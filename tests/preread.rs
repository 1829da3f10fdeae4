//! Sessions led by their TLS hello. The hello itself is forwarded by the kernel, with all that follows.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::harness::pattern::{fill, pause};
use crate::harness::program::{Running, need, run};
use crate::harness::{Bytes, Ending, Plan, Port, Scratch, Upstream, connect, receive};
use nix::sys::signal::Signal;

const TLS: &str = "ssl_preread = true";
const QUICK: Duration = Duration::from_secs(20);

/// A hello that asks for this name, with `padding` bytes that say nothing.
fn hello(name: &str, padding: usize) -> Vec<u8> {
    let long = |bytes: &[u8]| [&(bytes.len() as u16).to_be_bytes()[..], bytes].concat();
    let list = long(&[&[0][..], &long(name.as_bytes())].concat());
    let extensions = [&[0, 21][..], &long(&vec![0; padding]), &[0, 0], &long(&list)].concat();
    let body = [
        &[3, 3][..],
        &[7; 32],
        &[0, 0, 2, 0x13, 1, 1, 0],
        &long(&extensions),
    ]
    .concat();
    let length = (body.len() as u32).to_be_bytes();
    let message = [&[1][..], &length[1..], &body].concat();
    message
        .chunks(4000)
        .flat_map(|part| [&[22, 3, 1][..], &long(part)].concat())
        .collect()
}

/// An upstream of this name that says its number, then gives back what comes.
fn marked(name: &str, mark: u8) -> (Upstream<()>, String) {
    let upstream = Upstream::serve("127.0.0.1", move |mut stream| {
        let _ = stream.write_all(&[mark]);
        crate::harness::upstream::echo(stream);
    });
    let table = format!(
        "[[upstream]]\nname = \"{name}\"\nserver = \"{}\"\n",
        upstream.address
    );
    (upstream, table)
}

/// Sends the pieces with pauses between them; the upstream of this mark must give all of it back.
#[track_caller]
fn assert_led_to(mark: u8, front: SocketAddr, pieces: &[&[u8]]) {
    let mut client = connect(front);
    for piece in pieces {
        client.write_all(piece).expect("a piece");
        if pieces.len() > 1 {
            pause(1);
        }
    }
    let sent = pieces.concat();
    let mut answer = vec![0; 1 + sent.len()];
    client.read_exact(&mut answer).expect("an answer");
    assert_eq!(answer[0], mark, "the upstream that was chosen");
    assert!(
        answer[1..] == sent[..],
        "the hello and what followed arrived as they were sent"
    );
    client.shutdown(Shutdown::Write).expect("the end of the stream");
    receive(&mut client, 1).must_be_whole(0);
}

#[test]
fn a_hello_leads_its_session_however_it_is_cut_and_the_kernel_forwards_it_too() {
    let ((_one, one), (_two, two), (_none, none)) = (
        marked("to-one.example", 1),
        marked("to-two.example", 2),
        marked("to-", 3),
    );
    let mut plan = Plan::new().tables(&one).tables(&two).tables(&none);
    let front = plan.server_with("127.0.0.1", "to-$ssl_preread_server_name", TLS);
    let proxy = plan.start();
    let mut bytes = 0;
    let mut payload = vec![0; 30_000];
    fill(4, 0, &mut payload);
    for (name, mark) in [("one.example", 1), ("two.example", 2)] {
        let small = hello(name, 100);
        let large = hello(name, 15_000);
        assert_led_to(mark, front, &[&small]);
        assert_led_to(mark, front, &[&[&large[..], &payload].concat()]);
        let single: Vec<&[u8]> = small.chunks(1).collect();
        assert_led_to(mark, front, &single);
        let pieces: Vec<&[u8]> = large.chunks(1448).collect();
        assert_led_to(mark, front, &pieces);
        bytes += 2 * (small.len() + large.len()) + payload.len();
    }
    // No TLS, and no name.
    for stranger in [&b"GET / HTTP/1.1\r\n\r\n"[..], &hello("", 0), &hello("a name", 0)] {
        assert_led_to(3, front, &[stranger]);
        bytes += stranger.len();
    }
    let status = proxy.settle();
    assert_eq!(status.number("/closes/finished"), 11, "{:#}", status.json());
    assert_eq!(status.fallbacks(), 0);
    assert_eq!(status.relay(), Bytes::default());
    let bytes = bytes as u64;
    let carried = Bytes {
        to_upstream: bytes,
        to_downstream: bytes + 11,
    };
    assert_eq!(status.sockmap(), carried);
}

#[test]
fn an_access_log_tells_what_a_header_and_a_hello_said() {
    let (_one, one) = marked("one.example", 1);
    let format = "[[log_format]]\nname = \"said\"\nformat = \"$ssl_preread_server_name $ssl_preread_protocol \
                  [$ssl_preread_alpn_protocols] $proxy_protocol_addr $proxy_protocol_port $proxy_protocol_server_addr \
                  $proxy_protocol_server_port $remote_addr\"";
    let mut plan = Plan::new().tables(&one).tables(format);
    let log = plan.file("access.log");
    let lines = format!(
        "{TLS}\naccess_log = {{ path = \"{}\", format = \"said\", flush = \"0\" }}",
        log.display()
    );
    let with_header = plan.server_listening("proxy_protocol = true", "$ssl_preread_server_name", &lines);
    let without = plan.server_with("127.0.0.1", "one.example", &lines);
    let proxy = plan.start();
    let hello = hello("one.example", 10);
    let header = &b"PROXY TCP4 192.0.2.7 198.51.100.9 40000 443\r\n"[..];
    // The worker that writes the line need not be the one that has read them.
    for goes_on_in_another in [false, true] {
        for (front, said) in [
            (with_header, [header, &hello].concat()),
            (without, b"no TLS".to_vec()),
        ] {
            let mut client = connect(front);
            client.write_all(&said).expect("what is said first");
            client.read_exact(&mut [0]).expect("the upstream's mark");
            if goes_on_in_another {
                let first = proxy.worker();
                proxy.signal(Signal::SIGHUP);
                proxy.wait("another worker has the session", |s| {
                    let workers = s.workers();
                    workers.len() == 1 && workers[0].pid != first && workers[0].sessions == 1
                });
            }
            client.shutdown(Shutdown::Write).expect("the end of the stream");
            let _ = client.read_to_end(&mut Vec::new());
            proxy.settle();
        }
    }
    let wanted =
        "one.example TLSv1.2 [-] 192.0.2.7 40000 198.51.100.9 443 127.0.0.1\n- - [-] - - - - 127.0.0.1\n"
            .repeat(2);
    let read = || std::fs::read_to_string(&log).unwrap_or_default();
    assert!(
        crate::harness::within(QUICK, || read().len() >= wanted.len()),
        "{}",
        read()
    );
    assert_eq!(read(), wanted);
}

#[test]
fn a_hello_may_follow_a_proxy_header() {
    let (_one, one) = marked("one.example-192.0.2.7", 1);
    let mut plan = Plan::new().tables(&one);
    let lines = format!("{TLS}\nset_real_ip_from = \"127.0.0.1\"");
    let front = plan.server_listening(
        "proxy_protocol = true",
        "$ssl_preread_server_name-$remote_addr",
        &lines,
    );
    let proxy = plan.start();
    let header = &b"PROXY TCP4 192.0.2.7 198.51.100.9 40000 443\r\n"[..];
    let hello = hello("one.example", 50);
    for cut in [0, 10, header.len(), header.len() + 20] {
        let glued = [header, &hello].concat();
        let mut client = connect(front);
        client.write_all(&glued[..cut]).expect("the first piece");
        pause(20);
        client.write_all(&glued[cut..]).expect("the second piece");
        let mut answer = vec![0; 1 + hello.len()];
        client.read_exact(&mut answer).expect("an answer");
        assert!(answer[1..] == hello[..]);
        client.shutdown(Shutdown::Write).expect("the end of the stream");
        receive(&mut client, 1).must_be_whole(0);
    }
    let status = proxy.settle();
    assert_eq!(status.number("/closes/finished"), 4, "{:#}", status.json());
    assert_eq!(status.relay(), Bytes::default());
}

#[test]
fn a_client_that_sends_no_hello_in_time_or_too_long_a_one_is_reset() {
    let upstream = Upstream::sink("127.0.0.1", 1);
    let mut plan = Plan::new().stream("preread_buffer_size = \"1k\"");
    let hasty = plan.server_with(
        "127.0.0.1",
        &upstream,
        &format!("{TLS}\npreread_timeout = \"1500ms\""),
    );
    let front = plan.server_with("127.0.0.1", &upstream, TLS);
    let proxy = plan.start();
    let ends = |client: &mut TcpStream| receive(client, 1).ending;
    let begun = Instant::now();
    let mut silent = connect(hasty);
    assert_eq!(ends(&mut silent), Ending::Reset);
    assert!((Duration::from_millis(1450)..Duration::from_secs(15)).contains(&begun.elapsed()));
    let mut half = connect(hasty);
    half.write_all(&hello("one.example", 0)[..30])
        .expect("half a hello");
    assert_eq!(ends(&mut half), Ending::Reset);
    let mut long = connect(front);
    let begun = Instant::now();
    long.write_all(&hello("one.example", 1100)).expect("a long hello");
    assert_eq!(ends(&mut long), Ending::Reset);
    assert!(
        begun.elapsed() < Duration::from_secs(15),
        "at once, not at the timeout of half a minute"
    );
    let mut gone = connect(front);
    gone.write_all(&hello("one.example", 0)[..30])
        .expect("half a hello");
    gone.shutdown(Shutdown::Write).expect("the end of the stream");
    assert_eq!(ends(&mut gone), Ending::Reset);
    let status = proxy.settle();
    assert_eq!(status.number("/closes/read_timeout"), 2, "{:#}", status.json());
    assert_eq!(status.number("/closes/bad_request"), 1, "{:#}", status.json());
    assert_eq!(
        status.number("/closes/downstream_left_reading"),
        1,
        "{:#}",
        status.json()
    );
    assert_eq!(status.number("/upstreams/0/peers/0/connected"), 0);
}

/// `openssl s_server` with a certificate for this name.
fn tls_server(scratch: &Scratch, name: &str) -> (Running, SocketAddr) {
    let openssl = need("openssl", "openssl");
    let (key, certificate) = (
        scratch.file(&format!("{name}.key")),
        scratch.file(&format!("{name}.crt")),
    );
    let mut make = Command::new(&openssl);
    make.args([
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "1",
    ]);
    make.args(["-subj", &format!("/CN={name}"), "-keyout"])
        .arg(&key)
        .arg("-out")
        .arg(&certificate);
    run(make, QUICK).must_succeed("making a certificate");
    let port = Port::claim();
    let address = port.on("127.0.0.1");
    let mut server = Command::new(openssl);
    server.args([
        "s_server",
        "-www",
        "-alpn",
        "h2,http/1.1",
        "-accept",
        &address.to_string(),
    ]);
    server.arg("-key").arg(&key).arg("-cert").arg(&certificate);
    (Running::start(server).wait_for(address), address)
}

/// The common name that a server shows to `openssl s_client`.
#[track_caller]
fn shown(front: SocketAddr, options: &[&str]) -> String {
    let mut client = Command::new(need("openssl", "openssl"));
    client
        .args(["s_client", "-connect", &front.to_string()])
        .args(options);
    let out = run(client, QUICK).must_succeed("openssl s_client");
    let subject = out
        .lines()
        .find_map(|line| line.strip_prefix("subject="))
        .unwrap_or_default();
    subject.replace("CN = ", "").trim().to_owned()
}

#[test]
fn openssl_reaches_the_server_that_its_hello_names() {
    let scratch = Scratch::new();
    let ((_one, one), (_two, two)) = (
        tls_server(&scratch, "one.example"),
        tls_server(&scratch, "two.example"),
    );
    let group = |name: &str, address: SocketAddr| {
        format!("[[upstream]]\nname = \"{name}\"\nserver = \"{address}\"\n")
    };
    let mut plan = Plan::new()
        .workers(2)
        .tables(&group("one.example", one))
        .tables(&group("two.example", two))
        .tables(&group("TLSv1.2-", two));
    let by_name = plan.server_with("127.0.0.1", "$ssl_preread_server_name", TLS);
    let by_version = plan.server_with(
        "127.0.0.1",
        "$ssl_preread_protocol-$ssl_preread_alpn_protocols",
        TLS,
    );
    let proxy = plan.start();
    for _ in 0..3 {
        assert_eq!(shown(by_name, &["-servername", "one.example"]), "one.example");
        assert_eq!(
            shown(by_name, &["-servername", "two.example", "-tls1_2"]),
            "two.example"
        );
    }
    assert_eq!(shown(by_version, &["-tls1_2", "-noservername"]), "two.example");
    let status = proxy.settle();
    assert_eq!(status.relay(), Bytes::default(), "{:#}", status.json());
    assert!(status.sockmap().to_upstream > 0 && status.sockmap().to_downstream > 0);
    assert_eq!(status.fallbacks(), 0);
}

#[test]
fn a_map_leads_names_to_upstreams_and_the_kernel_carries_them() {
    let ((_one, one), (_two, two), (_rest, rest)) = (marked("one", 1), marked("two", 2), marked("rest", 3));
    let map = r#"
[[map]]
source = "$ssl_preread_server_name"
variable = "$class"
hostnames = true
values = ["exact.example first", "*.one.example first", "~^x[0-9]+[.] second", "default third"]

[[map]]
source = "$class-$remote_addr"
variable = "$backend"
values = ["first-127.0.0.1 one", "second-127.0.0.1 two", "default rest"]
"#;
    let mut plan = Plan::new().tables(&one).tables(&two).tables(&rest).tables(map);
    let front = plan.server_with("127.0.0.1", "$backend", TLS);
    let proxy = plan.start();
    let names = [
        ("exact.example", 1),
        ("Exact.Example", 1),
        ("a.b.one.example", 1),
        ("one.example", 3),
        ("x12.example", 2),
        ("x.example", 3),
        ("", 3),
    ];
    for (name, mark) in names {
        assert_led_to(mark, front, &[&hello(name, 20)]);
    }
    let status = proxy.settle();
    assert_eq!(status.number("/closes/finished"), names.len() as u64);
    assert_eq!(status.relay(), Bytes::default());
    assert_eq!(status.fallbacks(), 0);
}

#[test]
fn what_a_regular_expression_finds_names_the_upstream() {
    let ((_one, one), (_two, two), (_rest, rest)) = (marked("one", 1), marked("two-7", 2), marked("rest", 3));
    let map = r#"
[[map]]
source = "$ssl_preread_server_name"
variable = "$backend"
values = [
  "~*^(?<name>[a-z]+)-([0-9])[.]example$ $name-$2",
  "~^(o)(n)(e|x)[.]example$ $1$2e",
  "~^(unmatched)?t(.*)[.]example$ t$1$2",
  "default rest",
]
"#;
    let mut plan = Plan::new().tables(&one).tables(&two).tables(&rest).tables(map);
    let front = plan.server_with("127.0.0.1", "$backend", TLS);
    let proxy = plan.start();
    let names = [
        ("two-7.example", 2),
        ("one.example", 1),
        ("onx.example", 1),
        ("two-7.Example", 2),
        ("twoo.other", 3),
    ];
    for (name, mark) in names {
        assert_led_to(mark, front, &[&hello(name, 20)]);
    }
    let status = proxy.settle();
    assert_eq!(status.number("/closes/finished"), names.len() as u64);
    assert_eq!(status.relay(), Bytes::default());
}
