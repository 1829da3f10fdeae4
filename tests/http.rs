//! The HTTP side: metrics, status, health, and clients that do not behave.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::harness::metrics::{CONTENT_TYPE, samples};
use crate::harness::pattern::ping;
use crate::harness::sockets::try_connect;
use crate::harness::{PATIENCE, Plan, Port, Proxy, Upstream, connect, within};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// Less than a client that says nothing is waited for.
const SOON: Duration = Duration::from_secs(4);

/// A plan with an HTTP listener, and where that is.
fn plan(workers: usize) -> (Plan, SocketAddr, Port) {
    let port = Port::claim();
    let http = port.on("127.0.0.1");
    let plan = Plan::new()
        .workers(workers)
        .global(&format!("http = {{ listen = \"{http}\" }}"));
    (plan, http, port)
}

/// An answer.
#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: String,
}

/// Reads one answer from a connection that may go on.
fn answer(stream: &mut TcpStream, has_body: bool) -> Answer {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).expect("the head of an answer");
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).expect("a head in ASCII");
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("Content-Length: "))
        .expect("a length");
    let mut body = vec![
        0;
        if has_body {
            length.parse().expect("a number")
        } else {
            0
        }
    ];
    stream.read_exact(&mut body).expect("the body of an answer");
    Answer {
        status: head[9..12].parse().expect("a status"),
        head,
        body: String::from_utf8(body).expect("text"),
    }
}

fn ask(http: SocketAddr, request: &str) -> Answer {
    let mut stream = connect(http);
    stream.write_all(request.as_bytes()).expect("asking");
    answer(&mut stream, !request.starts_with("HEAD"))
}

fn get(http: SocketAddr, path: &str) -> String {
    let answer = ask(http, &format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n"));
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.body
}

#[test]
fn metrics_follow_the_format_and_count_what_happened() {
    let upstream = Upstream::echo("127.0.0.1");
    let (plan, http, _port) = plan(2);
    // The same address twice, and a name that has to be escaped where it is a label.
    let group = format!(
        "[[upstream]]\nname = \"group\"\nserver = [\"{0}\", \"{0}\", 'unix:/a \\ \"b']\n",
        upstream.address
    );
    let mut plan = plan.tables(&group);
    let front = plan.server("group");
    let proxy = plan.start();
    for seed in 0..9 {
        ping(&mut connect(front), seed, 2).expect("an echo");
    }
    let status = proxy.settle();
    // The worker that answers may be quicker than the other.
    let ready = || ask(http, "GET /readyz HTTP/1.1\r\n\r\n").status == 200;
    assert!(within(PATIENCE, ready));
    // Nothing else is promised to those that would rather have OpenMetrics, as Prometheus does.
    let page = ask(
        http,
        "GET /metrics HTTP/1.1\r\nHost: x\r\n\
         Accept: application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5\r\n\r\n",
    );
    assert!(page.head.contains(CONTENT_TYPE), "{}", page.head);
    let samples = samples(&page.body);
    let is =
        |series: &str, value: f64| assert_eq!(samples.get(series), Some(&value), "{series}: {samples:#?}");
    is("culvert_sessions_begun_total", 9.0);
    is(
        &format!("culvert_sessions_total{{listener=\"{front}\",close_reason=\"finished\"}}"),
        9.0,
    );
    is(
        "culvert_sessions_total{listener=\"\",close_reason=\"worker_died\"}",
        0.0,
    );
    is("culvert_session_duration_seconds_count", 9.0);
    is("culvert_upstream_connect_duration_seconds_count", 9.0);
    is("culvert_workers{state=\"ready\"}", 2.0);
    is(
        &format!("culvert_listener_connections_accepted_total{{listener=\"{front}\"}}"),
        9.0,
    );
    is(
        &format!("culvert_listener_received_bytes_total{{listener=\"{front}\"}}"),
        9.0 * 48.0,
    );
    is(
        &format!(
            "culvert_upstream_connections_total{{upstream=\"group\",peer=\"{}\"}}",
            upstream.address
        ),
        9.0,
    );
    let carried =
        |path| samples[&format!("culvert_datapath_bytes_total{{path=\"{path}\",direction=\"to_upstream\"}}")];
    assert_eq!(carried("sockmap"), status.sockmap().to_upstream as f64);
    assert_eq!(carried("sockmap") + carried("relay"), 9.0 * 48.0);
    is(
        &format!("culvert_listener_connections_rejected_total{{listener=\"{front}\",reason=\"denied\"}}"),
        0.0,
    );
    for reason in ["timeout", "error"] {
        is(
            &format!(
                "culvert_upstream_connect_failures_total{{upstream=\"group\",peer=\"{}\",reason=\"{reason}\"}}",
                upstream.address
            ),
            0.0,
        );
    }
    assert!(
        samples
            .keys()
            .any(|series| series.contains("peer=\"unix:/a \\\\ \\\"b\"")),
        "{samples:#?}"
    );
}

#[test]
fn who_is_not_let_in_and_who_refuses_is_counted_where_it_happened() {
    let upstream = Upstream::echo("127.0.0.1");
    let nobody = Port::claim();
    let (mut plan, http, _port) = plan(2);
    let shut = plan.server_with("127.0.0.1", &upstream, "access = [\"deny all\"]");
    let peer = nobody.on("127.0.0.1");
    let dead = plan.server(peer);
    let proxy = plan.start();
    for front in [shut, shut, dead] {
        let mut nothing = Vec::new();
        // The reset may be there before it is connected.
        let _ = try_connect(front).and_then(|mut client| client.read_to_end(&mut nothing));
        assert!(nothing.is_empty());
    }
    proxy.settle();
    let samples = samples(&get(http, "/metrics"));
    let is = |series: String, value: f64| {
        assert_eq!(
            samples.get(series.as_str()),
            Some(&value),
            "{series}: {samples:#?}"
        );
    };
    let rejected = "culvert_listener_connections_rejected_total";
    is(
        format!("{rejected}{{listener=\"{shut}\",reason=\"denied\"}}"),
        2.0,
    );
    is(
        format!("{rejected}{{listener=\"{dead}\",reason=\"denied\"}}"),
        0.0,
    );
    let ended = "culvert_sessions_total";
    is(
        format!("{ended}{{listener=\"{shut}\",close_reason=\"denied\"}}"),
        2.0,
    );
    is(
        format!("{ended}{{listener=\"{dead}\",close_reason=\"connect_failed\"}}"),
        1.0,
    );
    let failures = format!("culvert_upstream_connect_failures_total{{upstream=\"{peer}\",peer=\"{peer}\"");
    is(format!("{failures},reason=\"error\"}}"), 1.0);
    is(format!("{failures},reason=\"timeout\"}}"), 0.0);
}

#[test]
fn a_full_worker_can_be_looked_at_and_says_that_it_is_full() {
    let upstream = Upstream::echo("127.0.0.1");
    let (plan, http, _port) = plan(1);
    let mut plan = plan.global("worker_connections = 2");
    let front = plan.server(&upstream);
    let proxy = plan.start();
    let mut held = [connect(front), connect(front)];
    for (seed, client) in held.iter_mut().enumerate() {
        ping(client, seed as u64, 2).expect("an echo");
    }
    // It waits for its turn, without an answer.
    let mut third = connect(front);
    third.write_all(b"x").expect("the queue takes it");
    proxy.must_say("worker_connections = 2 sessions are held");
    for path in ["/healthz", "/readyz", "/metrics"] {
        get(http, path);
    }
    assert_eq!(proxy.status().active(), 2);
    drop(held);
    let mut byte = [0];
    third.read_exact(&mut byte).expect("an echo, once there is room");
}

#[test]
fn a_proxy_header_counts_on_the_side_that_has_it() {
    const V1: &[u8] = b"PROXY TCP4 192.0.2.7 198.51.100.9 40000 443\r\n";
    // Of version 2 for IPv4: 12 bytes of signature, 4 more, and 12 of addresses.
    const V2_BYTES: usize = 28;
    for kernel in [true, false] {
        let upstream = Upstream::serve("127.0.0.1", |mut stream| {
            let mut asked = [0; V2_BYTES + 1000];
            stream.read_exact(&mut asked).expect("a header and a question");
            stream.write_all(&[7; 3000]).expect("answering");
            let _ = stream.read(&mut [0]);
        });
        let (plan, http, _port) = plan(1);
        let group = format!(
            "[[upstream]]\nname = \"group\"\nserver = [\"{}\"]\n",
            upstream.address
        );
        let mut plan = plan.tables(&group).stream(&format!("ebpf_enable = {kernel}"));
        let lines = "proxy_protocol = \"v2\"\nset_real_ip_from = [\"127.0.0.1\"]";
        let front = plan.server_listening("proxy_protocol = true", "group", lines);
        let proxy = plan.start();
        let mut client = connect(front);
        client.write_all(V1).expect("a header");
        client.write_all(&[9; 1000]).expect("a question");
        client.shutdown(Shutdown::Write).expect("an end");
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).expect("an answer");
        assert_eq!(answer.len(), 3000);
        let status = proxy.settle();
        let samples = samples(&get(http, "/metrics"));
        for (side, received, sent) in [
            ("listener", V1.len() + 1000, 3000),
            ("upstream", 3000, V2_BYTES + 1000),
        ] {
            for (what, bytes) in [("received", received), ("sent", sent)] {
                let name = format!("culvert_{side}_{what}_bytes_total{{");
                let found: f64 = samples
                    .iter()
                    .filter(|(series, _)| series.starts_with(&name))
                    .map(|(_, value)| value)
                    .sum();
                assert_eq!(found, bytes as f64, "{name}: {samples:#?}");
            }
        }
        let of = |pointer: &str| status.number(pointer) as usize;
        assert_eq!(of("/upstreams/0/peers/0/bytes/to_upstream"), V2_BYTES + 1000);
        assert_eq!(of("/upstreams/0/peers/0/bytes/to_downstream"), 3000);
        assert_eq!(status.carried().to_upstream as usize, V2_BYTES + 1000);
        assert_eq!(status.carried().to_downstream, 3000);
    }
}

/// Sessions that are open, with bytes on their way through them.
fn open_sessions(front: SocketAddr, count: u64) -> Vec<TcpStream> {
    let open = |seed| {
        let mut client = connect(front);
        ping(&mut client, seed, 5).expect("an echo");
        client
    };
    (0..count).map(open).collect()
}

#[test]
fn whichever_worker_is_asked_tells_of_the_open_sessions_of_all_with_their_live_bytes() {
    let upstream = Upstream::echo("127.0.0.1");
    let (mut plan, http, _port) = plan(2);
    let front = plan.server(&upstream);
    let proxy = plan.start();
    let clients = open_sessions(front, 8);
    let status = proxy.wait("both workers have sessions", |s| s.active() == 8);
    let busy = status
        .workers()
        .iter()
        .filter(|worker| worker.sessions > 0)
        .count();
    let expected: BTreeSet<String> = clients
        .iter()
        .map(|client| client.local_addr().expect("an address").to_string())
        .collect();
    for _ in 0..8 {
        // Each time on a connection of its own, so that either worker is asked. The other one is waited for, but not
        // for long: it may be held up.
        let (mut document, mut clients) = (Value::Null, BTreeSet::new());
        within(PATIENCE, || {
            document = serde_json::from_str(&get(http, "/status")).expect("JSON");
            let sessions = document["busiest"].as_array().expect("a list");
            let client = |session: &Value| session["client"].as_str().expect("an address").to_owned();
            clients = sessions.iter().map(client).collect();
            clients == expected
        });
        assert_eq!(clients, expected);
        let sessions = document["busiest"].as_array().expect("a list");
        let workers: BTreeSet<u64> = sessions
            .iter()
            .filter_map(|session| session["worker"].as_u64())
            .collect();
        assert_eq!(workers.len(), busy);
        for session in sessions {
            assert_eq!(session["bytes"]["to_upstream"], 5 * 24, "{session}");
            assert_eq!(session["bytes"]["to_downstream"], 5 * 24, "{session}");
            assert_eq!(session["datapath"], "sockmap");
            assert_eq!(session["listener"], front.to_string());
            assert_eq!(session["peer"], upstream.address.to_string());
        }
        assert_eq!(document["sessions"]["active"], 8);
    }
    drop(clients);
    assert!(within(PATIENCE, || {
        let document: Value = serde_json::from_str(&get(http, "/status")).expect("JSON");
        document["busiest"].as_array().is_some_and(Vec::is_empty)
    }));
}

#[test]
fn people_get_a_page_and_programs_get_the_document() {
    let (plan, http, _port) = plan(1);
    let proxy = plan.start();
    let with = |accept: &str| {
        ask(
            http,
            &format!("GET /status HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\n\r\n"),
        )
    };
    let page = with("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8");
    assert!(page.head.contains("Content-Type: text/html"), "{}", page.head);
    assert!(page.body.starts_with("<!DOCTYPE html>") && page.body.contains("Busiest sessions"));
    assert!(
        !page.body.contains("<script") && !page.body.contains("http://") && !page.body.contains("https://")
    );
    let document: Value = serde_json::from_str(&with("*/*").body).expect("JSON");
    let plain = proxy.status();
    for key in plain.json().as_object().expect("an object").keys() {
        assert!(document.get(key).is_some(), "{key} is missing");
    }
}

#[test]
fn a_connection_is_kept_for_further_requests_and_several_may_come_at_once() {
    let (plan, http, _port) = plan(1);
    let _proxy = plan.start();
    let mut stream = connect(http);
    let one = "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n";
    let head = "HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n";
    let last = "GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    // In pieces that keep to no boundary.
    for piece in format!("{one}{head}{one}{last}").as_bytes().chunks(13) {
        stream.write_all(piece).expect("asking");
    }
    assert_eq!(answer(&mut stream, true).body, "ok\n");
    let metrics = answer(&mut stream, false);
    assert!(
        metrics.status == 200 && !metrics.head.contains("Content-Length: 0"),
        "{metrics:?}"
    );
    assert_eq!(answer(&mut stream, true).body, "ok\n");
    let ready = answer(&mut stream, true);
    assert!(
        ready.body == "ready\n" && ready.head.contains("Connection: close"),
        "{ready:?}"
    );
    assert_eq!(
        stream.read(&mut [0]).expect("an end"),
        0,
        "the end of the stream, not a reset"
    );
}

#[test]
fn a_client_of_http_1_0_is_told_what_becomes_of_its_connection() {
    let (plan, http, _port) = plan(1);
    let _proxy = plan.start();
    let mut stream = connect(http);
    for (asked, told) in [("Connection: Keep-Alive\r\n", "keep-alive"), ("", "close")] {
        let request = format!("GET /healthz HTTP/1.0\r\n{asked}\r\n");
        stream.write_all(request.as_bytes()).expect("asking");
        let got = answer(&mut stream, true);
        assert!(
            got.body == "ok\n" && got.head.contains(&format!("Connection: {told}\r\n")),
            "{got:?}"
        );
    }
    assert_eq!(stream.read(&mut [0]).expect("an end, not a reset"), 0);
}

#[test]
fn what_is_no_good_request_is_refused_with_its_number() {
    let (plan, http, _port) = plan(1);
    let _proxy = plan.start();
    let long = format!("GET / HTTP/1.1\r\nA: {}\r\n\r\n", "x".repeat(9000));
    for (request, status) in [
        ("GET /nothing HTTP/1.1\r\n\r\n", 404),
        ("POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", 405),
        ("GET /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", 413),
        ("\x01\x02 nothing\r\n\r\n", 400),
        (&long, 431),
    ] {
        let mut stream = connect(http);
        stream.write_all(request.as_bytes()).expect("asking");
        let got = answer(&mut stream, true);
        assert_eq!(got.status, status, "{request:.40}");
        if status != 404 {
            assert!(got.head.contains("Connection: close"));
            assert_eq!(stream.read(&mut [0]).expect("an end, not a reset"), 0);
        }
    }
}

#[test]
fn clients_that_say_nothing_or_never_stop_take_no_session_from_anybody() {
    let upstream = Upstream::echo("127.0.0.1");
    let (plan, http, _port) = plan(1);
    let mut plan = plan.global("worker_connections = 80");
    let front = plan.server(&upstream);
    let proxy = plan.start();
    let mut silent: Vec<TcpStream> = (0..150).filter_map(|_| TcpStream::connect(http).ok()).collect();
    for (at, stream) in silent.iter_mut().enumerate() {
        // Those above the limit are reset, maybe before they can say this much.
        let _ = stream.write_all(&b"GET / HTTP/1.1\r\n"[..at % 16]);
    }
    let started = Instant::now();
    for seed in 0..10 {
        ping(&mut connect(front), seed, 3).expect("an echo");
    }
    assert!(started.elapsed() < SOON);
    // Their time runs out, and whoever behaves is served again.
    let mut text = String::new();
    assert!(
        within(PATIENCE, || {
            let Ok(mut stream) = TcpStream::connect(http) else {
                return false;
            };
            text.clear();
            let _ = stream.write_all(b"GET /healthz HTTP/1.0\r\n\r\n");
            let _ = stream.read_to_string(&mut text);
            text.ends_with("ok\n")
        }),
        "{text:?}"
    );
    // A flood of requests whose answers nobody reads.
    let mut flood = connect(http);
    flood.set_nonblocking(true).expect("a socket that does not block");
    let requests = "GET /metrics HTTP/1.1\r\n\r\n".repeat(1000);
    for seed in 0..20 {
        let _ = flood.write(requests.as_bytes());
        ping(&mut connect(front), seed, 3).expect("an echo");
    }
    drop(silent);
    drop(flood);
    proxy.settle();
}

#[test]
fn a_slot_without_worker_is_not_ready() {
    let (plan, http, _port) = plan(2);
    let proxy = plan.start();
    // The worker that answers may be quicker than the other.
    let ready = || ask(http, "GET /readyz HTTP/1.1\r\n\r\n").status == 200;
    assert!(within(PATIENCE, ready));
    // More than one worker is given on a single CPU: some are with the slot that lives on (accept.bpf.c).
    let mut streams: Vec<TcpStream> = (0..40).map(|_| connect(http)).collect();
    let request = b"GET /readyz HTTP/1.1\r\n\r\n";
    let mut refused = None;
    // Each death makes the slot wait longer for its next worker.
    let end = Instant::now() + PATIENCE;
    while refused.is_none() && Instant::now() < end {
        let workers = proxy.status().workers();
        if let Some(victim) = workers.iter().find(|worker| worker.slot == 0) {
            let _ = kill(Pid::from_raw(victim.pid), Signal::SIGKILL);
        }
        // The master takes a moment to see the death.
        let until = Instant::now() + Duration::from_millis(60);
        while refused.is_none() && Instant::now() < until {
            // All of them may have been with the slot that dies.
            if streams.is_empty() {
                streams = (0..4).map(|_| connect(http)).collect();
                for stream in &streams {
                    let short = Some(Duration::from_millis(50));
                    stream.set_read_timeout(short).expect("a timeout");
                }
            }
            streams.retain_mut(|stream| {
                let mut byte = [0; 1];
                let asked = stream.write_all(request).is_ok()
                    && stream.peek(&mut byte).is_ok_and(|peeked| peeked > 0);
                if asked {
                    let got = answer(stream, true);
                    if got.status == 503 {
                        refused = Some(got.body);
                    }
                }
                asked
            });
        }
    }
    assert_eq!(refused.as_deref(), Some("no worker is ready in slots [0]\n"));
    assert!(within(PATIENCE, ready));
}

#[test]
fn a_kept_connection_keeps_no_worker_from_leaving() {
    let (plan, http, _port) = plan(1);
    let mut proxy: Proxy = plan.start();
    let mut stream = connect(http);
    stream
        .write_all(b"GET /healthz HTTP/1.1\r\n\r\n")
        .expect("asking");
    assert_eq!(answer(&mut stream, true).body, "ok\n");
    proxy.signal(Signal::SIGQUIT);
    // What is kept is kept for 75 s.
    assert!(proxy.wait_for_exit(PATIENCE).is_some(), "the master still runs");
    assert_eq!(stream.read(&mut [0]).expect("an end, not a reset"), 0);
    let _ = stream.shutdown(Shutdown::Both);
}

/// The names that begin with `culvert_` in a text.
fn names(text: &str) -> BTreeSet<&str> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("culvert_")).collect()
}

#[test]
fn the_dashboard_names_only_metrics_that_are_served_and_nearly_all_of_them() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../conf/grafana-dashboard.json");
    let text = std::fs::read_to_string(&path).expect("the dashboard");
    let dashboard: Value = serde_json::from_str(&text).expect("JSON");
    let mut expressions = String::new();
    for panel in dashboard["panels"].as_array().expect("panels") {
        for target in panel["targets"].as_array().expect("targets") {
            expressions.push_str(target["expr"].as_str().expect("an expression"));
            expressions.push('\n');
        }
    }
    let upstream = Upstream::echo("127.0.0.1");
    let (mut plan, http, _port) = plan(1);
    let front = plan.server(&upstream);
    let _proxy = plan.start();
    ping(&mut connect(front), 1, 1).expect("an echo");
    let page = get(http, "/metrics");
    let served: BTreeSet<&str> = samples(&page)
        .keys()
        .filter_map(|series| series.split('{').next())
        .filter_map(|name| names(&page).get(name).copied())
        .collect();
    let shown = names(&expressions);
    assert!(shown.len() > 20, "{shown:?}");
    for name in shown
        .iter()
        .chain(&names(&text))
        .filter(|name| **name != "culvert_datapath_cpu_bytes_total")
    {
        assert!(served.contains(name), "{name} is not served: {served:?}");
    }
    let of_samples = |name: &&&str| !["_sum", "_count"].iter().any(|end| name.ends_with(end));
    let unseen: Vec<_> = served.difference(&shown).filter(of_samples).collect();
    let kept_out = [
        "culvert_build_info",
        "culvert_config_generation",
        "culvert_config_last_reload_timestamp_seconds",
        "culvert_config_reloads_total",
        "culvert_datapath_sockmap",
        "culvert_sessions_adopted_total",
        "culvert_sessions_offloaded_total",
        "culvert_start_time_seconds",
    ];
    assert!(
        unseen.iter().all(|name| kept_out.contains(name)),
        "not on the dashboard: {unseen:?}"
    );
}
