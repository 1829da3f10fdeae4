//! How sessions are shared out among the peers of a group by all workers together, and what failures do.

use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use crate::harness::greeter::{greet, greeter, visit};
use crate::harness::pattern::ping;
use crate::harness::{PATIENCE, Plan, Port, Proxy, Status, Upstream, connect, send, within};

fn group(balance: &str, servers: &[String]) -> String {
    let servers: Vec<String> = servers
        .iter()
        .map(|server| format!("  {{ {server} }},\n"))
        .collect();
    format!(
        "[[upstream]]\nname = \"group\"\nbalance = \"{balance}\"\nserver = [\n{}]\n",
        servers.concat()
    )
}

fn at(address: SocketAddr, more: &str) -> String {
    format!("address = \"{address}\"{more}")
}

/// Something of a peer of the first group.
fn peer(status: &Status, index: usize, key: &str) -> serde_json::Value {
    let upstreams = status.json()["upstreams"].as_array().expect("upstreams");
    let group = upstreams.iter().find(|group| group["name"] == "group");
    group.expect("the group")["peers"][index][key].clone()
}

fn is_carried_by_the_kernel(proxy: &Proxy) {
    let status = proxy.status();
    assert!(
        status.sockmap().sum() > 0,
        "the kernel carried nothing: {:#}",
        status.json()
    );
    assert_eq!(status.relay().sum(), 0, "user space copied: {:#}", status.json());
}

#[test]
fn round_robin_is_exact_over_all_workers() {
    let (one, two) = (greeter(1), greeter(2));
    let servers = [at(one.address, ", weight = 3"), at(two.address, "")];
    let mut plan = Plan::new().workers(3).tables(&group("round_robin", &servers));
    let front = plan.server("group");
    let proxy = plan.start();
    let seeds: Vec<u64> = (0..40).map(|_| visit(front).expect("a greeting").1).collect();
    for round in seeds.chunks(4) {
        assert_eq!(round.iter().filter(|seed| **seed == 1).count(), 3, "{seeds:?}");
    }
    proxy.settle();
    is_carried_by_the_kernel(&proxy);
}

#[test]
fn the_turn_goes_on_where_it_was_after_a_reload_and_after_a_workers_death() {
    let (one, two) = (greeter(1), greeter(2));
    let servers = [at(one.address, ""), at(two.address, "")];
    let mut plan = Plan::new().tables(&group("round_robin", &servers));
    let front = plan.server("group");
    let proxy = plan.start();
    assert_eq!(visit(front).expect("a greeting").1, 1);
    proxy.reload();
    assert_eq!(visit(front).expect("a greeting").1, 2);
    assert_eq!(visit(front).expect("a greeting").1, 1);
    let worker = proxy.worker();
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(worker),
        nix::sys::signal::Signal::SIGKILL,
    )
    .expect("killing the worker");
    proxy.wait("another worker serves", |s| {
        s.workers().iter().any(|w| w.pid != worker)
    });
    assert_eq!(visit(front).expect("a greeting").1, 2);
}

#[test]
fn max_conns_holds_for_the_whole_program_and_across_a_reload() {
    let (one, two) = (greeter(1), greeter(2));
    let servers = [
        at(one.address, ", max_conns = 5"),
        at(two.address, ", max_conns = 3"),
    ];
    let mut plan = Plan::new().workers(3).tables(&group("least_conn", &servers));
    let front = plan.server("group");
    let proxy = plan.start();
    let mut held: Vec<(TcpStream, u64)> = (0..8).map(|_| visit(front).expect("a greeting")).collect();
    assert_eq!(held.iter().filter(|(_, seed)| *seed == 1).count(), 5);
    assert!(visit(front).is_none(), "all places are taken");
    std::thread::sleep(Duration::from_millis(1500));
    proxy.reload();
    proxy.wait("the sessions have moved", |s| s.number("/sessions/adopted") == 8);
    assert!(visit(front).is_none(), "all places are still taken");
    // For an instant a session that moves counts twice, never not at all.
    proxy.wait("five sessions are counted", |s| peer(s, 0, "active") == 5);
    let gone = held
        .iter()
        .position(|(_, seed)| *seed == 2)
        .expect("a session of the second");
    held.swap_remove(gone);
    assert!(within(PATIENCE, || visit(front).is_some_and(|(_, seed)| seed == 2)));
}

#[test]
fn one_client_stays_with_one_peer_by_its_address() {
    let servers: Vec<Upstream<()>> = (1..=4).map(greeter).collect();
    let lines: Vec<String> = servers.iter().map(|server| at(server.address, "")).collect();
    for balance in ["source", "hash $remote_addr", "hash $remote_addr consistent"] {
        let mut plan = Plan::new().workers(2).tables(&group(balance, &lines));
        let front = plan.server("group");
        let proxy = plan.start();
        let first = visit(front).expect("a greeting").1;
        for _ in 0..10 {
            assert_eq!(visit(front).expect("a greeting").1, first, "{balance}");
        }
        is_carried_by_the_kernel(&proxy);
    }
}

#[test]
fn chance_reaches_every_peer() {
    let (one, two) = (greeter(1), greeter(2));
    let lines = [at(one.address, ""), at(two.address, "")];
    for balance in ["random", "random two", "random two least_time", "least_time"] {
        let mut plan = Plan::new().tables(&group(balance, &lines));
        let front = plan.server("group");
        let _proxy = plan.start();
        let held: Vec<(TcpStream, u64)> = (0..60).map(|_| visit(front).expect("a greeting")).collect();
        let ones = held.iter().filter(|(_, seed)| *seed == 1).count();
        assert!((1..60).contains(&ones), "{balance}: {ones} of 60");
    }
}

#[test]
fn a_peer_that_refuses_is_out_for_fail_timeout_and_then_taken_back() {
    let (claim, two) = (Port::claim(), greeter(2));
    let away = claim.on("127.0.0.1");
    let lines = [at(away, ", fail_timeout = \"3s\""), at(two.address, "")];
    let mut plan = Plan::new().workers(2).tables(&group("round_robin", &lines));
    let front = plan.server("group");
    let proxy = plan.start();
    for _ in 0..10 {
        assert_eq!(visit(front).expect("a greeting").1, 2);
    }
    let status = proxy.status();
    assert_eq!(peer(&status, 0, "connect_failures"), 1, "{:#}", status.json());
    assert_eq!(peer(&status, 0, "state"), "unavail");
    proxy.must_say("is taken out for 3s");
    let listener = std::net::TcpListener::bind(away).expect("binding");
    let _one = Upstream::on(listener, |stream| greet(stream, 1));
    assert!(within(PATIENCE, || visit(front).expect("a greeting").1 == 1));
    proxy.must_say("is alive again");
    assert_eq!(peer(&proxy.status(), 0, "state"), "up");
}

#[test]
fn down_gets_nothing_and_a_backup_only_when_the_others_are_gone() {
    let (down, backup) = (greeter(1), greeter(3));
    let claim = Port::claim();
    let away = claim.on("127.0.0.1");
    let lines = [
        at(down.address, ", down = true"),
        at(away, ""),
        at(backup.address, ", backup = true"),
    ];
    let mut plan = Plan::new().tables(&group("round_robin", &lines));
    let front = plan.server("group");
    let listener = std::net::TcpListener::bind(away).expect("binding");
    let main = Upstream::on(listener, |stream| greet(stream, 2));
    let proxy = plan.start();
    for _ in 0..5 {
        assert_eq!(visit(front).expect("a greeting").1, 2);
    }
    drop(main);
    assert!(within(PATIENCE, || visit(front).is_some_and(|(_, seed)| seed == 3)));
    let status = proxy.status();
    assert_eq!(
        (peer(&status, 0, "state"), peer(&status, 0, "connected")),
        ("down".into(), 0.into())
    );
}

#[test]
fn a_lone_peer_is_tried_however_often_it_fails() {
    let claim = Port::claim();
    let away = claim.on("127.0.0.1");
    let mut plan = Plan::new().tables(&group("round_robin", &[at(away, "")]));
    let front = plan.server("group");
    let proxy = plan.start();
    for _ in 0..3 {
        assert!(visit(front).is_none());
    }
    assert_eq!(peer(&proxy.status(), 0, "connect_failures"), 3);
    let listener = std::net::TcpListener::bind(away).expect("binding");
    let _upstream = Upstream::on(listener, crate::harness::upstream::echo);
    ping(&mut connect(front), 7, 2).expect("an answer at once");
}

/// Three peers that refuse, then one that answers; all in one group.
fn far_away(answers: SocketAddr) -> (Vec<Port>, String) {
    let claims: Vec<Port> = (0..3).map(|_| Port::claim()).collect();
    let mut lines: Vec<String> = claims
        .iter()
        .map(|claim| at(claim.on("127.0.0.1"), ", max_fails = 0"))
        .collect();
    lines.push(at(answers, ""));
    (claims, group("round_robin", &lines))
}

#[test]
fn early_bytes_reach_the_peer_that_finally_answers_exactly_once() {
    let upstream = Upstream::sink("127.0.0.1", 5);
    let (_claims, group) = far_away(upstream.address);
    let mut plan = Plan::new().tables(&group);
    let front = plan.server("group");
    let proxy = plan.start();
    let mut client = connect(front);
    send(&mut client, 5, 0, 3_000_000).expect("sending");
    client.shutdown(std::net::Shutdown::Write).expect("ending");
    let received = upstream.result();
    assert_eq!(
        (received.bytes, received.wrong_at),
        (3_000_000, None),
        "{received:?}"
    );
    let _ = client.read_to_end(&mut Vec::new());
    let status = proxy.settle();
    assert_eq!(status.carried().to_upstream, 3_000_000);
    assert!(
        status.sockmap().to_upstream > 0,
        "the kernel carried nothing: {:#}",
        status.json()
    );
    proxy.must_say("attempt 3: failed to connect");
}

#[test]
fn a_session_makes_as_many_attempts_as_it_may() {
    let upstream = greeter(1);
    for (setting, attempts) in [
        ("proxy_next_upstream = false", 1),
        ("proxy_next_upstream_tries = 2", 2),
        ("proxy_next_upstream_tries = 4", 3),
    ] {
        let (_claims, group) = far_away(upstream.address);
        let mut plan = Plan::new().stream(setting).tables(&group);
        let front = plan.server("group");
        let proxy = plan.start();
        assert_eq!(visit(front).is_some(), attempts == 3, "{setting}");
        let status = proxy.status();
        let failures: u64 = (0..3)
            .filter_map(|index| peer(&status, index, "connect_failures").as_u64())
            .sum();
        assert_eq!(failures, attempts, "{setting}");
    }
}

#[test]
fn no_attempt_begins_after_proxy_next_upstream_timeout() {
    let (deaf, other) = (crate::harness::sockets::Deaf::new(), greeter(1));
    let lines = [at(deaf.address, ""), at(other.address, "")];
    for (limit, is_answered) in [("100ms", false), ("0", true)] {
        let settings =
            format!("proxy_connect_timeout = \"300ms\"\nproxy_next_upstream_timeout = \"{limit}\"");
        let mut plan = Plan::new()
            .stream(&settings)
            .tables(&group("round_robin", &lines));
        let front = plan.server("group");
        let _proxy = plan.start();
        assert_eq!(visit(front).is_some(), is_answered, "{limit}");
    }
}
