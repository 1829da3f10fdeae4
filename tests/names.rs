//! Peers that are found by name while the program runs: `resolve`, `service`, `resolver`; against dnsmasq, and against
//! servers that answer wrongly.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::harness::dns::{DnsServer, OK, a_record, fake, reply, resolver};
use crate::harness::greeter::{greeter_on, seed, visit};
use crate::harness::pattern::ping;
use crate::harness::{PATIENCE, Plan, Port, Proxy, Scratch, Status, connect, within};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

fn group(server: &str) -> String {
    format!("[[upstream]]\nname = \"group\"\nserver = [{server}]\n")
}

fn upstream(status: &Status) -> Value {
    let upstreams = status.json()["upstreams"].as_array().expect("upstreams");
    let group = upstreams.iter().find(|group| group["name"] == "group");
    group.expect("the group").clone()
}

/// The addresses of the peers that get sessions.
fn peers(status: &Status) -> Vec<String> {
    let group = upstream(status);
    let peers = group["peers"].as_array().expect("peers").iter();
    peers
        .filter(|peer| peer["state"] != "gone")
        .map(|peer| {
            let backup = if peer["backup"] == true { " backup" } else { "" };
            format!(
                "{} {}{backup}",
                peer["address"].as_str().expect("an address"),
                peer["weight"]
            )
        })
        .collect()
}

#[track_caller]
fn wait_for_peers(proxy: &Proxy, expected: &[String]) -> Status {
    proxy.wait(&format!("the peers are {expected:?}"), |status| {
        peers(status) == expected
    })
}

fn failing(status: &Status) -> bool {
    upstream(status)["names"][0]["failing"] == true
}

#[test]
fn addresses_that_change_count_after_their_time_without_a_reload_and_sessions_go_on() {
    let port = Port::claim().number;
    let (_two, _three) = (greeter_on("127.0.0.2", port, 2), greeter_on("127.0.0.3", port, 3));
    let server = DnsServer::started("127.0.0.2 backend.test");
    let mut plan = Plan::new()
        .workers(2)
        .stream(&server.resolver(""))
        .tables(&group(&format!(
            "{{ address = \"backend.test:{port}\", resolve = true }}"
        )));
    let front = plan.server("group");
    let proxy = plan.start();
    // The first connection finds its peer: the answer was waited for.
    let (mut old, first) = visit(front).expect("a greeting");
    assert_eq!(first, 2);
    ping(&mut old, 9, 20).expect("an echo");

    server.change("127.0.0.3 backend.test");
    let at = Instant::now();
    wait_for_peers(&proxy, &[format!("127.0.0.3:{port} 1")]);
    assert!(at.elapsed() < Duration::from_secs(10), "{:?}", at.elapsed());
    // On whichever of the two workers.
    (0..8).for_each(|_| assert_eq!(seed(front), Some(3)));
    ping(&mut old, 9, 20).expect("an echo of a session whose peer is gone");
    let status = proxy.wait("the short ones are gone", |s| s.active() == 1);
    let peers = upstream(&status)["peers"].clone();
    assert_eq!(peers[1]["state"], "gone", "{peers:#}");
    assert_eq!(peers[1]["active"], 1, "{peers:#}");
    assert_eq!(status.generation(), 1);

    drop(old);
    let status = proxy.settle();
    let group = upstream(&status);
    assert_eq!(group["peers"].as_array().expect("peers").len(), 1, "{group:#}");
    assert_eq!(group["former"]["connected"], 1, "{group:#}");
    assert_eq!(
        group["former"]["bytes"]["to_downstream"],
        group["former"]["bytes"]["to_upstream"].as_u64().unwrap() + 8
    );
    assert!(group["names"][0]["lookups"].as_u64() >= Some(2), "{group:#}");
    assert!(
        status.sockmap().sum() > 0,
        "the kernel carries them: {:#}",
        status.json()
    );
    let log = proxy.log();
    let line =
        format!("upstream group: its names stand for 127.0.0.3:{port} now, before for 127.0.0.2:{port}");
    assert_eq!(log.matches(&line).count(), 1, "{log}");
}

#[test]
fn both_kinds_of_addresses_are_peers_and_each_can_be_left_out() {
    let port = Port::claim().number;
    let (_two, _six) = (greeter_on("127.0.0.2", port, 2), greeter_on("::1", port, 6));
    let server = DnsServer::started("127.0.0.2 backend.test\n::1 backend.test");
    let one = |host: &str| format!("{{ address = \"{host}:{port}\", resolve = true }}");
    let mut plan = Plan::new()
        .stream(&server.resolver(""))
        .tables(&group(&one("backend.test")));
    for (name, without) in [("v4", "ipv6"), ("v6", "ipv4")] {
        let resolver = server.resolver(&format!(", {without} = false"));
        let server = one("Backend.Test.");
        plan = plan.tables(&format!(
            "[[upstream]]\nname = \"{name}\"\n{resolver}\nserver = [{server}]\n"
        ));
    }
    let fronts = ["group", "v4", "v6"].map(|name| plan.server(name));
    let _proxy = plan.start();
    let mut seen: Vec<_> = (0..4).map(|_| seed(fronts[0])).collect();
    seen.sort();
    assert_eq!(seen, [Some(2), Some(2), Some(6), Some(6)]);
    assert_eq!([seed(fronts[1]), seed(fronts[1])], [Some(2); 2]);
    assert_eq!([seed(fronts[2]), seed(fronts[2])], [Some(6); 2]);
}

#[test]
fn records_of_a_service_say_ports_and_weights_and_who_is_a_backup() {
    let ports = [Port::claim().number, Port::claim().number, Port::claim().number];
    let one = greeter_on("127.0.0.2", ports[0], 1);
    let two = greeter_on("127.0.0.3", ports[1], 2);
    let _three = greeter_on("127.0.0.3", ports[2], 3);
    let mut server = DnsServer::new();
    server.write("127.0.0.2 one.test\n127.0.0.3 two.test");
    let record = |host: &str, port: u16, priority: u8, weight: u8| {
        format!("--srv-host=_http._tcp.backend.test,{host}.test,{port},{priority},{weight}")
    };
    server.options = vec![
        record("one", ports[0], 1, 3),
        record("two", ports[1], 1, 1),
        record("two", ports[2], 5, 2),
    ];
    server.start();
    let mut plan = Plan::new().stream(&server.resolver("")).tables(&group(
        "{ address = \"backend.test\", resolve = true, service = \"http\" }",
    ));
    let front = plan.server("group");
    let proxy = plan.start();
    let expected = [
        format!("127.0.0.2:{} 3", ports[0]),
        format!("127.0.0.3:{} 1", ports[1]),
        format!("127.0.0.3:{} 2 backup", ports[2]),
    ];
    wait_for_peers(&proxy, &expected);
    let mut seen: Vec<_> = (0..8).map(|_| seed(front).expect("a greeting")).collect();
    seen.sort_unstable();
    assert_eq!(seen, [1, 1, 1, 1, 1, 1, 2, 2]);
    drop((one, two));
    // What is closed may take a connection yet.
    assert!(within(PATIENCE, || seed(front) == Some(3)), "the backup serves");

    server.stop();
    server.options = vec![record("two", ports[2], 7, 9)];
    server.start();
    wait_for_peers(&proxy, &[format!("127.0.0.3:{} 9", ports[2])]);
    assert_eq!(proxy.status().generation(), 1);
}

#[test]
fn when_no_server_answers_the_last_addresses_stay_until_one_does_again() {
    let port = Port::claim().number;
    let (_two, _three) = (greeter_on("127.0.0.2", port, 2), greeter_on("127.0.0.3", port, 3));
    let mut server = DnsServer::started("127.0.0.2 backend.test");
    let mut plan = Plan::new().stream(&server.resolver("")).tables(&group(&format!(
        "{{ address = \"backend.test:{port}\", resolve = true }}"
    )));
    let front = plan.server("group");
    let proxy = plan.start();
    assert_eq!(seed(front), Some(2));
    server.stop();
    proxy.wait("lookups fail", failing);
    let count = |status: &Status| {
        upstream(status)["names"][0]["failures"]
            .as_u64()
            .expect("a number")
    };
    proxy.wait("they have failed often", |status| count(status) >= 4);
    assert_eq!(seed(front), Some(2));
    let log = proxy.log();
    assert_eq!(
        log.matches("failed to look up backend.test (A)").count(),
        1,
        "the first failure is told: {log}"
    );
    server.write("127.0.0.3 backend.test");
    server.start();
    let status = wait_for_peers(&proxy, &[format!("127.0.0.3:{port} 1")]);
    assert!(count(&status) >= 4);
    assert_eq!(seed(front), Some(3));
    proxy.wait("lookups succeed", |status| !failing(status));
    proxy.must_say("backend.test (A) is answered again");
}

#[test]
fn a_name_that_does_not_exist_any_more_keeps_its_addresses_for_a_while_and_loses_them_then() {
    let port = Port::claim().number;
    let _two = greeter_on("127.0.0.2", port, 2);
    let server = DnsServer::started("127.0.0.2 backend.test");
    let mut plan = Plan::new()
        .stream(&server.resolver(", hold = \"3s\""))
        .tables(&group(&format!(
            "{{ address = \"backend.test:{port}\", resolve = true }}"
        )));
    let front = plan.server("group");
    let proxy = plan.start();
    assert_eq!(seed(front), Some(2));
    server.change("127.0.0.9 other.test");
    proxy.must_say("there are no addresses any more");
    assert_eq!(seed(front), Some(2), "it is held");
    let gone = Instant::now();
    wait_for_peers(&proxy, &[]);
    assert!(gone.elapsed() > Duration::from_secs(1), "{:?}", gone.elapsed());
    assert_eq!(seed(front), None);
    assert!(!failing(&proxy.status()), "that there is nothing is an answer");
    server.change("127.0.0.2 backend.test");
    wait_for_peers(&proxy, &[format!("127.0.0.2:{port} 1")]);
    assert_eq!(seed(front), Some(2));
}

#[test]
fn an_answer_that_has_no_room_in_a_datagram_comes_over_tcp() {
    let port = Port::claim().number;
    let hosts: Vec<String> = (1..=200).map(|n| format!("127.0.1.{n} backend.test")).collect();
    let server = DnsServer::started(&hosts.join("\n"));
    let mut plan = Plan::new()
        .stream(&server.resolver(", ipv6 = false"))
        .tables(&group(&format!(
            "{{ address = \"backend.test:{port}\", resolve = true }}"
        )));
    plan.server("group");
    let proxy = plan.start();
    let expected: Vec<String> = (1..=200).map(|n| format!("127.0.1.{n}:{port} 1")).collect();
    assert_eq!(peers(&proxy.status()), expected);
}

#[test]
fn the_program_starts_without_a_name_server_and_serves_when_there_is_one() {
    let port = Port::claim().number;
    let (_two, other) = (greeter_on("127.0.0.2", port, 2), greeter_on("127.0.0.5", 0, 5));
    let mut server = DnsServer::new();
    server.write("127.0.0.2 backend.test");
    let mut plan = Plan::new().stream(&server.resolver("")).tables(&group(&format!(
        "{{ address = \"backend.test:{port}\", resolve = true }}"
    )));
    let (front, elsewhere) = (plan.server("group"), plan.server(&other));
    let proxy = plan.start();
    assert_eq!(seed(front), None);
    assert_eq!(seed(elsewhere), Some(5), "what needs no name is served");
    assert!(failing(&proxy.status()));
    assert_eq!(upstream(&proxy.status())["refused"], 1);
    server.start();
    wait_for_peers(&proxy, &[format!("127.0.0.2:{port} 1")]);
    assert_eq!(seed(front), Some(2));
}

/// `master -t` on a file; whether it is right, and what it says.
fn test_file(path: &Path, text: &str) -> (bool, String) {
    std::fs::write(path, text).expect("writing a configuration");
    let mut command = Command::new(env!("CARGO_BIN_EXE_master"));
    command.arg("-t").arg("-c").arg(path);
    let output = command.output().expect("starting the program");
    (
        output.status.success(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

#[test]
fn a_name_must_be_known_at_the_start_only_where_it_is_not_looked_up_later() {
    let scratch = Scratch::new();
    let file = scratch.file("a.toml");
    let text = |server: &str| {
        format!(
            "[stream]\nresolver = \"127.0.0.1:1\"\n{}\n[[server]]\nlisten = \"127.0.0.1:1\"\nproxy_pass = \"group\"\n",
            group(server)
        )
    };
    let (right, said) = test_file(
        &file,
        &text("{ address = \"nowhere.invalid:80\", resolve = true }"),
    );
    assert!(right, "{said}");
    let (right, said) = test_file(&file, &text("{ address = \"nowhere.invalid:80\" }"));
    assert!(
        !right && said.contains("host nowhere.invalid cannot be resolved"),
        "{said}"
    );
}

#[test]
fn a_reload_brings_a_new_name_with_its_addresses_and_keeps_sessions_of_peers_that_are_gone() {
    let port = Port::claim().number;
    let (_two, _three) = (greeter_on("127.0.0.2", port, 2), greeter_on("127.0.0.3", port, 3));
    let server = DnsServer::started("127.0.0.2 backend.test\n127.0.0.3 other.test");
    let mut plan = Plan::new()
        .workers(2)
        .stream(&format!("{}\non_reload = \"close\"", server.resolver("")))
        .tables(&group(&format!(
            "{{ address = \"backend.test:{port}\", resolve = true }}"
        )));
    let front = plan.server("group");
    let proxy = plan.start();
    let (mut old, first) = visit(front).expect("a greeting");
    assert_eq!(first, 2);
    ping(&mut old, 9, 20).expect("an echo");
    server.change("127.0.0.3 backend.test\n127.0.0.2 other.test");
    wait_for_peers(&proxy, &[format!("127.0.0.3:{port} 1")]);
    let status = proxy.reload();
    assert_eq!(
        peers(&status),
        [format!("127.0.0.3:{port} 1")],
        "what was known goes on at once"
    );
    ping(&mut old, 9, 20).expect("an echo after the reload");
    assert_eq!(upstream(&proxy.status())["former"]["connected"], 1);

    proxy.edit("backend.test", "other.test");
    let status = proxy.reload();
    assert_eq!(
        peers(&status),
        [format!("127.0.0.2:{port} 1")],
        "the first answer is waited for"
    );
    proxy.wait("only the new workers accept", |s| s.workers().len() == 2);
    assert_eq!(seed(front), Some(2));
    ping(&mut old, 9, 20).expect("an echo: its peer is one of the group again");
}

#[test]
fn a_worker_that_takes_the_place_of_a_dead_one_has_the_present_addresses() {
    let port = Port::claim().number;
    let (_two, _three) = (greeter_on("127.0.0.2", port, 2), greeter_on("127.0.0.3", port, 3));
    let server = DnsServer::started("127.0.0.2 backend.test");
    let mut plan = Plan::new().stream(&server.resolver("")).tables(&group(&format!(
        "{{ address = \"backend.test:{port}\", resolve = true }}"
    )));
    let front = plan.server("group");
    let proxy = plan.start();
    server.change("127.0.0.3 backend.test");
    wait_for_peers(&proxy, &[format!("127.0.0.3:{port} 1")]);
    let worker = proxy.worker();
    kill(Pid::from_raw(worker), Signal::SIGKILL).expect("killing the worker");
    proxy.wait("another worker serves", |s| {
        s.workers().iter().any(|w| w.pid != worker)
    });
    assert_eq!(seed(front), Some(3));
}

#[test]
fn answers_that_are_not_to_the_question_are_passed_over_and_what_makes_no_sense_harms_nobody() {
    let port = Port::claim().number;
    let (_two, _three) = (greeter_on("127.0.0.2", port, 2), greeter_on("127.0.0.3", port, 3));
    let (address, asked) = fake(|n, question| {
        let good = reply(question, OK, &[&a_record([127, 0, 0, 2])]);
        let evil = reply(question, OK, &[&a_record([127, 0, 0, 3])]);
        let changed = |at: usize, bit: u8| {
            let mut bytes = evil.clone();
            bytes[at] ^= bit;
            bytes
        };
        // Another id, another name, another kind of question, no answer at all, a question, nothing.
        let strays = [
            changed(0, 1),
            changed(13, 1),
            changed(question.len() - 3, 1),
            evil[..11].to_vec(),
            changed(2, 0x80),
            Vec::new(),
        ];
        let loops = reply(
            question,
            OK,
            &[&[
                0xc0,
                question.len() as u8,
                0,
                1,
                0,
                1,
                0,
                0,
                0,
                1,
                0,
                4,
                127,
                0,
                0,
                3,
            ]],
        );
        let mut huge = evil.clone();
        huge.resize(60_000, 0xc0);
        let mut many = evil.clone();
        many[6..12].fill(0xff);
        let garbled = [loops, many, reply(question, OK, &[&[0xff; 40]])];
        match n {
            // The right one comes last: one that was taken before would show.
            0 => strays.into_iter().chain([huge, good]).collect(),
            n => match garbled.get(n % 4) {
                Some(bytes) => vec![bytes.clone()],
                None => vec![good],
            },
        }
    });
    let mut plan = Plan::new()
        .stream(&resolver(address, ", ipv6 = false"))
        .tables(&group(&format!(
            "{{ address = \"backend.test:{port}\", resolve = true }}"
        )));
    let front = plan.server("group");
    let proxy = plan.start();
    assert_eq!(seed(front), Some(2));
    let expected = [format!("127.0.0.2:{port} 1")];
    proxy.wait("every kind of nonsense was answered", |status| {
        assert_eq!(peers(status), expected);
        asked.load(Ordering::SeqCst) >= 9
    });
    assert_eq!(seed(front), Some(2));
    let log = proxy.log();
    assert!(log.contains("an answer that makes no sense from"), "{log}");
    assert!(!log.contains("127.0.0.3"), "{log}");
}

#[test]
fn a_server_that_fails_keeps_the_last_addresses_and_another_one_is_asked() {
    let port = Port::claim().number;
    let (_two, _three) = (greeter_on("127.0.0.2", port, 2), greeter_on("127.0.0.3", port, 3));
    // Answers once, then fails.
    let (bad, _) = fake(|n, question| match n {
        0 => vec![reply(question, OK, &[&a_record([127, 0, 0, 2])])],
        _ => vec![reply(question, 0x8182, &[])],
    });
    let alone = resolver(bad, ", ipv6 = false");
    let mut plan = Plan::new().stream(&alone).tables(&group(&format!(
        "{{ address = \"backend.test:{port}\", resolve = true }}"
    )));
    let front = plan.server("group");
    let proxy = plan.start();
    assert_eq!(seed(front), Some(2));
    proxy.wait("the server fails", failing);
    assert_eq!(seed(front), Some(2));
    assert!(proxy.log().contains("SERVFAIL from"), "{}", proxy.log());
    let (good, _) = fake(|_, question| vec![reply(question, OK, &[&a_record([127, 0, 0, 3])])]);
    proxy.edit(
        &alone,
        &format!("resolver = {{ addresses = [\"{bad}\", \"{good}\"], ipv6 = false }}"),
    );
    proxy.reload();
    wait_for_peers(&proxy, &[format!("127.0.0.3:{port} 1")]);
    assert!(!failing(&proxy.status()));
    assert_eq!(seed(front), Some(3));
}

#[test]
fn an_alias_of_which_the_answer_says_no_more_is_asked_for_in_turn_and_a_circle_ends() {
    let port = Port::claim().number;
    let _two = greeter_on("127.0.0.2", port, 2);
    let (address, asked) = fake(|_, question| {
        let alias = |name: &[u8]| {
            let mut bytes = vec![0xc0, 12, 0, 5, 0, 1, 0, 0, 0, 1, 0, name.len() as u8];
            bytes.extend(name);
            bytes
        };
        vec![match &question[13..20] {
            b"backend" => reply(question, OK, &[&alias(b"\x05other\x04test\x00")]),
            b"circle1" => reply(question, OK, &[&alias(b"\x07circle2\x04test\x00")]),
            b"circle2" => reply(question, OK, &[&alias(b"\x07circle1\x04test\x00")]),
            _ => reply(question, OK, &[&a_record([127, 0, 0, 2])]),
        }]
    });
    let circle = format!(
        "[[upstream]]\nname = \"circle\"\nserver = [{{ address = \"circle1.test:{port}\", resolve = true }}]\n"
    );
    let mut plan = Plan::new()
        .stream(&resolver(address, ", ipv6 = false, valid = \"10m\""))
        .tables(&group(&format!(
            "{{ address = \"backend.test:{port}\", resolve = true }}"
        )))
        .tables(&circle);
    let fronts = [plan.server("group"), plan.server("circle")];
    let proxy = plan.start();
    assert_eq!(seed(fronts[0]), Some(2));
    assert_eq!(seed(fronts[1]), None);
    proxy.must_say("more than 8 names that lead to each other");
    // Two for the one, nine for each round of the other; none more for the next seconds but for its next rounds.
    std::thread::sleep(Duration::from_millis(1500));
    let asked = asked.load(Ordering::SeqCst);
    assert!((11..=29).contains(&asked), "{asked} questions");
}

#[test]
fn a_hostile_flood_of_answers_costs_the_master_nothing_but_that_lookup() {
    let port = Port::claim().number;
    let other = greeter_on("127.0.0.5", 0, 5);
    let (address, asked) = fake(|_, question| {
        let mut bytes = reply(question, OK, &[&a_record([127, 0, 0, 3])]);
        bytes[0] ^= 0xff;
        vec![bytes; 3000]
    });
    let mut plan = Plan::new()
        .stream(&resolver(address, ", ipv6 = false"))
        .tables(&group(&format!(
            "{{ address = \"backend.test:{port}\", resolve = true }}"
        )));
    let (front, elsewhere) = (plan.server("group"), plan.server(&other));
    let proxy = plan.start();
    proxy.wait("it was asked more than once", |_| {
        asked.load(Ordering::SeqCst) >= 3
    });
    assert_eq!(seed(front), None);
    assert_eq!(seed(elsewhere), Some(5));
    assert_eq!(peers(&proxy.reload()), [""; 0], "the master does its work");
    drop(connect(elsewhere));
}
