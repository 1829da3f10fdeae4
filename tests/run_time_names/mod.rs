//! Hosts that `$variables` of `proxy_pass` name when the session comes: looked up for it, with dnsmasq, and with name servers
//! that are slow, silent or wrong. `outlive` replaces workers and the program meanwhile.

mod outlive;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::harness::dns::{DnsServer, OK, a_record, fake, reply, resolver};
use crate::harness::greeter::greeter_on;
use crate::harness::hello::hello;
use crate::harness::pattern::fill;
use crate::harness::program::{Running, need};
use crate::harness::{Ending, Flag, PATIENCE, Plan, Port, Proxy, Status, Upstream, connect, receive, within};

const TLS: &str = "ssl_preread = true";

/// Says hello to a name.
fn ask_for(front: SocketAddr, name: &str) -> TcpStream {
    let mut client = connect(front);
    client.write_all(&hello(name)).expect("a hello");
    client
}

/// Which greeter the session leads to; it must have the hello. `None`: it was reset.
fn answer_of(client: &mut TcpStream, name: &str) -> Option<u64> {
    let mut greeting = [0u8; 8];
    client.read_exact(&mut greeting).ok()?;
    let mut heard = vec![0; hello(name).len()];
    client.read_exact(&mut heard).expect("the hello again");
    assert_eq!(heard, hello(name));
    let seed = (1..10).find(|seed| {
        let mut expected = [0u8; 8];
        fill(*seed, 0, &mut expected);
        greeting == expected
    });
    Some(seed.expect("a greeting"))
}

fn led_to(front: SocketAddr, name: &str) -> Option<u64> {
    answer_of(&mut ask_for(front, name), name)
}

/// Sends so many bytes; they must come back.
#[track_caller]
fn echoes(client: &mut TcpStream, bytes: usize) {
    let mut sent = vec![0; bytes];
    fill(7, 0, &mut sent);
    client.write_all(&sent).expect("the payload");
    let mut heard = vec![0; bytes];
    client.read_exact(&mut heard).expect("the payload again");
    assert!(heard == sent);
}

fn by_sni(port: u16) -> String {
    format!("$ssl_preread_server_name:{port}")
}

fn hosts(status: &Status, name: &str) -> u64 {
    status.number(&format!("/hosts/{name}"))
}

fn name_failed(status: &Status) -> u64 {
    status.number("/closes/name_failed")
}

/// A name server that says nothing until the flag is up, and then this address. Counts questions.
fn slow(ready: &Arc<Flag>, ip: [u8; 4]) -> (SocketAddr, Arc<AtomicUsize>) {
    let ready = Arc::clone(ready);
    fake(move |_, question| match ready.is_up() {
        true => vec![reply(question, OK, &[&a_record(ip)])],
        false => Vec::new(),
    })
}

/// An access log with the peers that were tried, nginx's status and the reason.
fn access_log(plan: &Plan) -> (String, std::path::PathBuf) {
    let log = plan.file("access.log");
    let lines = format!(
        "access_log = {{ path = \"{}\", format = \"tried\", flush = \"0\" }}",
        log.display()
    );
    (lines, log)
}

const FORMAT: &str = "[[log_format]]\nname = \"tried\"\nformat = \"$upstream_addr $status $close_reason $ssl_preread_server_name\"";

fn lines_of(log: &std::path::Path, count: usize) -> Vec<String> {
    let read = || std::fs::read_to_string(log).unwrap_or_default();
    let there = within(PATIENCE, || read().lines().count() >= count);
    assert!(there, "{count} lines: {}", read());
    read().lines().map(str::to_owned).collect()
}

#[test]
fn a_name_in_a_hello_is_looked_up_and_the_kernel_carries_the_session() {
    let port = Port::claim().number;
    let told = TcpListener::bind(("127.0.0.3", port)).expect("binding an upstream");
    let told = Upstream::on(told, |mut stream| {
        let mut line = Vec::new();
        let mut byte = [0];
        while !line.ends_with(b"\n") && stream.read(&mut byte).is_ok_and(|read| read == 1) {
            line.push(byte[0]);
        }
        let _ = stream.write_all(&line);
        crate::harness::upstream::echo(stream);
    });
    let _two = greeter_on("127.0.0.2", port, 2);
    let server = DnsServer::started("127.0.0.2 app.test\n127.0.0.3 told.test");
    let mut plan = Plan::new().workers(2).stream(&server.resolver("")).tables(FORMAT);
    let (log_lines, log) = access_log(&plan);
    let front = plan.server_with("127.0.0.1", &by_sni(port)[..], &format!("{TLS}\n{log_lines}"));
    let header = format!("{TLS}\nproxy_protocol = \"v1\"");
    let with_header = plan.server_with("127.0.0.1", &by_sni(port)[..], &header);
    let proxy = plan.start();

    let mut client = ask_for(front, "App.Test");
    assert_eq!(answer_of(&mut client, "App.Test"), Some(2));
    echoes(&mut client, 50_000);
    client.shutdown(Shutdown::Write).expect("the end");
    receive(&mut client, 1).must_be_whole(0);
    let status = proxy.settle();
    let sent = (hello("App.Test").len() + 50_000) as u64;
    assert_eq!(status.sockmap().to_upstream, sent, "{:#}", status.json());
    assert_eq!(status.sockmap().to_downstream, sent + 8);
    assert_eq!((status.relay().sum(), status.fallbacks()), (0, 0));
    assert_eq!(status.number("/closes/finished"), 1);
    assert_eq!((hosts(&status, "sessions"), hosts(&status, "lookups")), (1, 1));
    assert_eq!(
        lines_of(&log, 1),
        [format!("127.0.0.2:{port} 200 finished App.Test")]
    );

    let mut client = ask_for(with_header, "told.test");
    let own = client.local_addr().expect("an address");
    let mut line = Vec::new();
    let mut byte = [0];
    while !line.ends_with(b"\n") && client.read(&mut byte).is_ok_and(|read| read == 1) {
        line.push(byte[0]);
    }
    let line = String::from_utf8_lossy(&line);
    assert_eq!(
        line,
        format!(
            "PROXY TCP4 127.0.0.1 127.0.0.1 {} {}\r\n",
            own.port(),
            with_header.port()
        )
    );
    drop(told);
}

#[test]
fn all_addresses_of_a_name_are_used_in_turn_and_one_that_refuses_is_followed_by_the_next() {
    let port = Port::claim().number;
    let two = greeter_on("127.0.0.2", port, 2);
    let _three = greeter_on("127.0.0.3", port, 3);
    let _six = greeter_on("::1", port, 6);
    let server = DnsServer::started("127.0.0.2 app.test\n127.0.0.3 app.test\n::1 app.test");
    let valid = ", valid = \"1m\"";
    let mut plan = Plan::new().stream(&server.resolver(valid)).tables(FORMAT);
    let (log_lines, log) = access_log(&plan);
    let target = by_sni(port);
    let front = plan.server_with("127.0.0.1", &target[..], &format!("{TLS}\n{log_lines}"));
    let single = format!("{TLS}\nproxy_next_upstream = false");
    let single = plan.server_with("127.0.0.1", &target[..], &single);
    let once = plan.server_with(
        "127.0.0.1",
        &target[..],
        &format!("{TLS}\nproxy_next_upstream_tries = 1"),
    );
    let proxy = plan.start();
    let mut seen: BTreeMap<Option<u64>, u32> = BTreeMap::new();
    (0..9).for_each(|_| *seen.entry(led_to(front, "app.test")).or_default() += 1);
    assert_eq!(seen, BTreeMap::from([(Some(2), 3), (Some(3), 3), (Some(6), 3)]));
    drop(two);
    // What is closed may take a connection yet.
    let gone = within(PATIENCE, || TcpStream::connect(("127.0.0.2", port)).is_err());
    assert!(gone);
    proxy.settle();
    let before = lines_of(&log, 9).len();
    let mut seen: BTreeMap<Option<u64>, u32> = BTreeMap::new();
    (0..9).for_each(|_| *seen.entry(led_to(front, "app.test")).or_default() += 1);
    assert_eq!(
        seen,
        BTreeMap::from([(Some(3), 6), (Some(6), 3)]),
        "the next one takes what it refuses"
    );
    proxy.settle();
    let lines = lines_of(&log, before + 9);
    let retried = format!("127.0.0.2:{port}, 127.0.0.3:{port} 200");
    let count = lines.iter().filter(|line| line.starts_with(&retried)).count();
    assert_eq!(count, 3, "{lines:#?}");
    for alone in [single, once] {
        let failed = (0..9).filter(|_| led_to(alone, "app.test").is_none()).count();
        assert_eq!(failed, 3, "nobody looks for another one");
    }
    assert_eq!(proxy.status().number("/closes/connect_failed"), 6);
    assert_eq!(
        hosts(&proxy.status(), "lookups"),
        1,
        "one question for all of them"
    );
    proxy.must_say(&format!("attempt 1: failed to connect to 127.0.0.2:{port}"));
}

#[test]
fn an_answer_counts_for_its_time_and_is_asked_for_again_then() {
    let port = Port::claim().number;
    let (_two, _three) = (greeter_on("127.0.0.2", port, 2), greeter_on("127.0.0.3", port, 3));
    const SECONDS: u8 = 3;
    let answers = |seconds: u8| {
        fake(move |n, question| {
            let mut record = a_record([127, 0, 0, if n == 0 { 2 } else { 3 }]);
            record[9] = seconds;
            vec![reply(question, OK, &[&record])]
        })
    };
    let ((short, short_asked), (long, long_asked)) = (answers(SECONDS), answers(1));
    let mut plan = Plan::new().workers(2).stream(&resolver(short, ", ipv6 = false"));
    let front = plan.server_with("127.0.0.1", &by_sni(port)[..], TLS);
    let own = format!("{TLS}\n{}", resolver(long, ", ipv6 = false, valid = \"1h\""));
    let elsewhere = plan.server_with("127.0.0.1", &by_sni(port)[..], &own);
    let proxy = plan.start();
    let asked = |count: &AtomicUsize| count.load(Ordering::SeqCst);
    let first = led_to(front, "app.test");
    let answered = Instant::now();
    assert_eq!(first, Some(2));
    let again = 12;
    for _ in 0..again {
        assert_eq!(led_to(front, "app.test"), Some(2));
    }
    assert_eq!(asked(&short_asked), 1, "it was remembered, by both workers");
    let over = answered + Duration::from_millis(1000 * u64::from(SECONDS) + 100);
    std::thread::sleep(over.saturating_duration_since(Instant::now()));
    assert_eq!(led_to(front, "app.test"), Some(3), "it was asked for again");
    assert!(asked(&short_asked) >= 2);
    // `valid` of the server's own resolver counts more than the record.
    assert_eq!(led_to(elsewhere, "app.test"), Some(2));
    std::thread::sleep(Duration::from_millis(1200));
    (0..4).for_each(|_| assert_eq!(led_to(elsewhere, "app.test"), Some(2)));
    assert_eq!(asked(&long_asked), 1);
    let status = proxy.status();
    assert!(hosts(&status, "remembered") >= again, "{:#}", status.json());
}

#[test]
fn a_host_that_does_not_exist_ends_the_session_with_nginxs_status_and_says_so() {
    let server = DnsServer::started("127.0.0.2 app.test");
    let mut plan = Plan::new().stream(&server.resolver("")).tables(FORMAT);
    let (log_lines, log) = access_log(&plan);
    let front = plan.server_with("127.0.0.1", &by_sni(443)[..], &format!("{TLS}\n{log_lines}"));
    let proxy = plan.start();
    for _ in 0..3 {
        let mut client = ask_for(front, "nowhere.test");
        assert_eq!(receive(&mut client, 1).ending, Ending::Reset);
    }
    let status = proxy.settle();
    assert_eq!(name_failed(&status), 3, "{:#}", status.json());
    assert_eq!(hosts(&status, "failed"), hosts(&status, "lookups"));
    assert_eq!(lines_of(&log, 3), ["- 500 name_failed nowhere.test"; 3]);
    let line = "nowhere.test could not be resolved for client 127.0.0.1:";
    let told = within(PATIENCE, || proxy.log().matches(line).count() == 3);
    assert!(told, "{}", proxy.log());
    proxy.must_say("there is no such host, or it has no address");
    // It may come to be; that there is nothing is not believed for long.
    server.change("127.0.0.1 nowhere.test");
    let there = within(PATIENCE, || {
        let _ = ask_for(front, "nowhere.test").read(&mut [0]);
        proxy.log().contains("failed to connect to 127.0.0.1:443")
    });
    assert!(there, "{}", proxy.log());
}

#[test]
fn a_host_that_was_known_is_served_while_its_name_server_is_away() {
    let port = Port::claim().number;
    let (_two, _three) = (greeter_on("127.0.0.2", port, 2), greeter_on("127.0.0.3", port, 3));
    let mut server = DnsServer::started("127.0.0.2 app.test");
    let mut plan = Plan::new().workers(2).stream(&server.resolver(""));
    let front = plan.server_with("127.0.0.1", &by_sni(port)[..], TLS);
    let proxy = plan.start();
    assert_eq!(led_to(front, "app.test"), Some(2));
    server.stop();
    // Its answer counts for a second.
    std::thread::sleep(Duration::from_millis(1100));
    for _ in 0..6 {
        assert_eq!(led_to(front, "app.test"), Some(2));
    }
    proxy.must_say("failed to look up app.test, its last addresses stay: ");
    let status = proxy.reload();
    assert!(hosts(&status, "failed") >= 1, "{:#}", status.json());
    proxy.wait("only new workers serve", |status| {
        status.workers().iter().all(|worker| !worker.draining)
    });
    assert_eq!(
        led_to(front, "app.test"),
        Some(2),
        "the next workers know it as well"
    );
    assert_eq!(name_failed(&proxy.status()), 0);
}

#[test]
fn a_silent_name_server_is_given_up_after_resolver_timeout_and_a_client_that_leaves_before_is_let_go() {
    let (address, asked) = fake(|_, _| Vec::new());
    let line = format!("{}\nresolver_timeout = \"1500ms\"", resolver(address, ""));
    let mut plan = Plan::new().stream(&line);
    let front = plan.server_with("127.0.0.1", &by_sni(443)[..], TLS);
    let proxy = plan.start();
    let begun = Instant::now();
    let mut patient = ask_for(front, "app.test");
    let leaving = ask_for(front, "app.test");
    proxy.wait("both wait", |status| hosts(status, "sessions") == 2);
    crate::harness::sockets::reset(leaving);
    proxy.wait("the one that left is gone", |status| {
        status.number("/closes/downstream_left_connecting") == 1
    });
    assert_eq!(name_failed(&proxy.status()), 0);
    assert_eq!(receive(&mut patient, 1).ending, Ending::Reset);
    let took = begun.elapsed();
    assert!(
        (Duration::from_millis(1450)..Duration::from_secs(15)).contains(&took),
        "{took:?}"
    );
    assert!(
        asked.load(Ordering::SeqCst) >= 2,
        "it was asked more than once meanwhile"
    );
    assert_eq!(name_failed(&proxy.settle()), 1);
    let said = format!(
        "app.test could not be resolved for client {}: no answer",
        patient.local_addr().unwrap()
    );
    proxy.must_say(&said);
}

#[test]
fn many_sessions_that_lead_to_one_name_share_one_question_and_what_they_sent_early_is_carried() {
    const CLIENTS: usize = 40;
    let port = Port::claim().number;
    let _two = greeter_on("127.0.0.2", port, 2);
    let ready = Arc::new(Flag::default());
    let _end = ready.raise_at_the_end();
    let (address, asked) = slow(&ready, [127, 0, 0, 2]);
    let mut plan = Plan::new()
        .workers(2)
        .stream(&resolver(address, ", ipv6 = false"));
    let front = plan.server_with("127.0.0.1", &by_sni(port)[..], TLS);
    let proxy = plan.start();
    let mut early = vec![0; 20_000];
    fill(5, 0, &mut early);
    let mut clients: Vec<TcpStream> = (0..CLIENTS)
        .map(|_| {
            let mut client = ask_for(front, "app.test");
            client.write_all(&early).expect("what is sent early");
            client
        })
        .collect();
    let status = proxy.wait("all wait, and the master has asked", |s| {
        hosts(s, "sessions") == CLIENTS as u64 && hosts(s, "lookups") > 0
    });
    assert_eq!(hosts(&status, "lookups"), 1, "{:#}", status.json());
    ready.raise();
    for client in &mut clients {
        assert_eq!(answer_of(client, "app.test"), Some(2));
        let mut heard = vec![0; early.len()];
        client.read_exact(&mut heard).expect("what was sent early");
        assert!(heard == early);
    }
    // The question is sent again each second as long as nobody answers.
    assert!(asked.load(Ordering::SeqCst) <= 6, "{asked:?}");
    drop(clients);
    let status = proxy.settle();
    assert_eq!((hosts(&status, "lookups"), status.relay().sum()), (1, 0));
}

/// Sockets of this host that ask a name server something.
fn questions_to(server: SocketAddr) -> usize {
    let table = std::fs::read_to_string("/proc/net/udp").expect("the sockets of this host");
    let remote = format!(" 0100007F:{:04X} ", server.port());
    table
        .lines()
        .filter(|line| line.get(20..).is_some_and(|rest| rest.contains(&remote)))
        .count()
}

#[test]
fn made_up_names_find_bounds_and_a_name_that_is_remembered_is_served_all_the_while() {
    const ASKED_MAX: usize = 1024;
    let port = Port::claim().number;
    let _two = greeter_on("127.0.0.2", port, 2);
    let (address, _) = fake(|_, question| match &question[13..16] {
        b"app" => vec![reply(question, OK, &[&a_record([127, 0, 0, 2])])],
        _ => Vec::new(),
    });
    let line = format!(
        "{}\nresolver_timeout = \"20s\"",
        resolver(address, ", ipv6 = false, valid = \"1m\"")
    );
    let mut plan = Plan::new().global("worker_connections = 1200").stream(&line);
    let front = plan.server_with("127.0.0.1", &by_sni(port)[..], TLS);
    let proxy = plan.start();
    assert_eq!(led_to(front, "app.test"), Some(2));
    let waiting: Vec<TcpStream> = (0..ASKED_MAX)
        .map(|n| ask_for(front, &format!("x{n}.test")))
        .collect();
    proxy.wait("all wait", |status| {
        hosts(status, "sessions") == 1 + ASKED_MAX as u64
    });
    assert_eq!(hosts(&proxy.status(), "refused"), 0);
    let mut over = ask_for(front, "over.test");
    assert_eq!(receive(&mut over, 1).ending, Ending::Reset);
    assert_eq!(led_to(front, "app.test"), Some(2));
    let status = proxy.status();
    assert_eq!(
        (hosts(&status, "refused"), name_failed(&status)),
        (1, 1),
        "{:#}",
        status.json()
    );
    // No more of them are under way than there are sockets for.
    let under_way = questions_to(address);
    assert!((200..=256).contains(&under_way), "{under_way} are under way");
    proxy.must_say("over.test could not be resolved");
    drop(waiting);
    proxy.wait("all have left", |status| status.active() == 0);
    assert_eq!(led_to(front, "app.test"), Some(2));
}

#[test]
fn what_is_no_host_s_name_is_not_asked_for_and_not_written_as_it_is() {
    let port = Port::claim().number;
    let _two = greeter_on("127.0.0.2", port, 2);
    let (address, asked) = fake(|_, question| vec![reply(question, OK, &[&a_record([127, 0, 0, 2])])]);
    let mut plan = Plan::new().stream(&resolver(address, ""));
    let front = plan.server_with("127.0.0.1", &by_sni(port)[..], TLS);
    let no_port = plan.server_with("127.0.0.1", "$ssl_preread_server_name", TLS);
    let proxy = plan.start();
    // An address is one, as ever.
    assert_eq!(led_to(front, "127.0.0.2"), Some(2));
    let long = "a".repeat(64) + ".test";
    let evil = "a\n\u{1b}[31mb";
    let wrong = [
        "",
        "127.2",
        "2130706434",
        "a..test",
        "a test",
        "ä.test",
        "*.test",
        "a.test:9",
        &long,
        evil,
    ];
    for name in wrong {
        let mut client = ask_for(front, name);
        assert_eq!(receive(&mut client, 1).ending, Ending::Reset, "{name:?}");
    }
    assert_eq!(
        receive(&mut ask_for(no_port, "app.test"), 1).ending,
        Ending::Reset
    );
    let status = proxy.settle();
    let expected = wrong.len() as u64 + 1;
    assert_eq!(status.number("/closes/no_route"), expected, "{:#}", status.json());
    assert_eq!(asked.load(Ordering::SeqCst), 0);
    proxy.must_say("\"app.test\", which is no upstream, and a host needs a port");
    // The hello's reader takes no name of such letters; nor would the log.
    assert!(!proxy.log().contains('\u{1b}'), "{}", proxy.log());
}

#[test]
fn an_answer_of_no_host_s_address_leads_nowhere() {
    let port = Port::claim().number;
    let _here = greeter_on("127.0.0.1", port, 1);
    let (address, _) = fake(|_, question| {
        let is_v6 = question[question.len() - 3] == 28;
        let six = |ip: [u8; 16]| {
            let mut bytes = vec![0xc0, 12, 0, 28, 0, 1, 0, 0, 0, 1, 0, 16];
            bytes.extend(ip);
            bytes
        };
        let mut mapped = [0; 16];
        mapped[10..12].fill(0xff);
        vec![match is_v6 {
            true => reply(question, OK, &[&six([0; 16]), &six(mapped)]),
            false => reply(question, OK, &[&a_record([0, 0, 0, 0]), &a_record([255; 4])]),
        }]
    });
    let mut plan = Plan::new().stream(&resolver(address, ""));
    let front = plan.server_with("127.0.0.1", &by_sni(port)[..], TLS);
    let proxy = plan.start();
    assert_eq!(led_to(front, "app.test"), None);
    assert_eq!(name_failed(&proxy.settle()), 1);
}

#[test]
fn without_a_resolver_a_name_leads_nowhere_and_the_log_says_what_to_write() {
    let mut plan = Plan::new();
    let front = plan.server_with("127.0.0.1", &by_sni(443)[..], TLS);
    let proxy = plan.start();
    assert_eq!(receive(&mut ask_for(front, "app.test"), 1).ending, Ending::Reset);
    assert_eq!(name_failed(&proxy.settle()), 1);
    let line =
        "there is no resolver to ask for app.test: write for example resolver = \"127.0.0.53\" in [stream]";
    proxy.must_say(line);
}

#[test]
fn nginx_and_this_program_log_the_same_of_such_sessions_from_one_file() {
    let port = Port::claim().number;
    let _two = greeter_on("127.0.0.2", port, 2);
    let server = DnsServer::started("127.0.0.2 app.test\n127.0.0.3 refuses.test");
    let ports: Vec<Port> = (0..4).map(|_| Port::claim()).collect();
    let fronts: Vec<SocketAddr> = ports.iter().map(|port| port.on("127.0.0.1")).collect();
    let plan = Plan::new();
    let log = plan.file("access.log");
    let dns = server.address();
    let text = format!(
        r#"
load_module /usr/lib/nginx/modules/ngx_stream_module.so;
user root;
worker_processes 1;
pid {pid};
error_log stderr notice;
events {{ worker_connections 256; }}
stream {{
    log_format led "$server_port $upstream_addr $status $ssl_preread_server_name";
    access_log {log} led;
    ssl_preread on;
    map $ssl_preread_server_name $listed {{
        hostnames;
        *.test $ssl_preread_server_name:{port};
    }}
    server {{ listen {}; resolver {dns}; proxy_pass $ssl_preread_server_name:{port}; }}
    server {{ listen {}; resolver {dns}; proxy_pass $ssl_preread_server_name; }}
    server {{ listen {}; proxy_pass $ssl_preread_server_name:{port}; }}
    server {{ listen {}; resolver {dns} valid=9s ipv6=off; resolver_timeout 3s; proxy_pass $listed; }}
}}
"#,
        fronts[0],
        fronts[1],
        fronts[2],
        fronts[3],
        pid = plan.file("master.pid").display(),
        log = log.display(),
    );
    let file = plan.file("nginx.conf");
    std::fs::write(&file, text).expect("nginx's configuration");
    let names = [
        "app.test",
        "APP.Test",
        "nowhere.test",
        "refuses.test",
        "127.0.0.2",
        "app.example",
        "127.2",
    ];
    let cases: Vec<(SocketAddr, &str)> = fronts
        .iter()
        .flat_map(|front| names.map(|name| (*front, name)))
        .collect();
    let behaviour = |before: usize| {
        for (front, name) in &cases {
            let mut client = ask_for(*front, name);
            let _ = client.read_exact(&mut [0; 8]);
        }
        let mut lines = lines_of(&log, before + cases.len()).split_off(before);
        // Sessions that were led somewhere end a moment later than others.
        lines.sort();
        lines
    };
    let mut command = Command::new(need("nginx", "nginx-light libnginx-mod-stream"));
    command.args(["-g", "daemon off;", "-c"]).arg(&file);
    let running = Running::start(command).wait_for(fronts[0]);
    // One connection was nginx's start.
    let nginxs = behaviour(1);
    drop(running);

    let mut command = Command::new(env!("CARGO_BIN_EXE_master"));
    command.arg("--from-nginx").arg(&file);
    let printed = command.output().expect("starting the program");
    assert!(
        printed.status.success(),
        "{}",
        String::from_utf8_lossy(&printed.stderr)
    );
    let status = format!(
        "\n[[server]]\nlisten = \"127.0.0.1:{}\"\nebpf_status_return = true\n",
        plan.status_port()
    );
    let toml = plan.file("from_nginx.toml");
    let printed = String::from_utf8(printed.stdout).expect("text");
    std::fs::write(&toml, printed + &status).expect("writing what was printed");
    std::fs::remove_file(&log).expect("the log of nginx");
    let _proxy = Proxy::start_file(plan, &toml);
    let ours = behaviour(0);
    assert_eq!(ours, nginxs, "\n{ours:#?}\n{nginxs:#?}");
    let ends = |end: &str| nginxs.iter().filter(|line| line.contains(end)).count();
    assert!(
        ends(" 200 ") >= 5 && ends(" 500 ") >= 5 && ends(" 502 ") >= 2,
        "{nginxs:#?}"
    );
}
