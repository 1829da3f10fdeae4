//! What is made of answers: peers, backups, weights, how long each is believed. No network; time is passed in.

use std::time::{Duration, Instant};

use culvert_shared::config::{Address, Peer};

use super::message::Service;
use super::*;

fn named(service: Option<&str>) -> Named {
    Named {
        host: "a.test".into(),
        port: if service.is_some() { 0 } else { 80 },
        service: service.map(str::to_owned),
        like: Peer::new(Address::Unix(Default::default())),
        resolver: Resolver {
            // Nobody answers there.
            servers: vec!["127.0.0.1:1".parse().unwrap()],
            valid: None,
            hold: Duration::from_secs(30),
            ipv4: true,
            ipv6: true,
            timeout: Duration::from_secs(30),
        },
    }
}

fn names(wanted: &[&Named], now: Instant) -> Names {
    let mut names = Names {
        wanted: wanted.iter().map(|named| (*named).clone()).collect(),
        ..Names::default()
    };
    names.keep_needed(now);
    names
}

/// What comes of a question, as if it had been asked.
fn hear(names: &mut Names, name: &str, kind: Kind, outcome: Outcome, now: Instant) {
    let entries = names.entries.iter_mut();
    let concerned = |key: &Key| key.question.name == name && key.question.kind == kind;
    let mut heard = Vec::new();
    for (key, entry) in entries.filter(|(key, _)| concerned(key)) {
        entry.settle(key, outcome.clone(), now);
        heard.push((key.clone(), matches!(outcome, Outcome::Failed(_))));
    }
    assert!(!heard.is_empty(), "nobody asks for {name} {kind}");
    for (key, failed) in heard {
        names.tally(&key, failed);
    }
    names.keep_needed(now);
}

fn found(list: &[&str], ttl: u32) -> Outcome {
    Outcome::Found(
        Records::Addresses(list.iter().map(|ip| ip.parse().unwrap()).collect()),
        ttl,
    )
}

fn services(list: &[(u16, u16, &str, u16)]) -> Outcome {
    let one = |(priority, weight, target, port): &(u16, u16, &str, u16)| Service {
        priority: *priority,
        weight: *weight,
        target: (*target).to_owned(),
        port: *port,
    };
    Outcome::Found(Records::Services(list.iter().map(one).collect()), 60)
}

fn listed(peers: &[Found]) -> Vec<String> {
    let one = |peer: &Found| {
        let backup = if peer.backup { " backup" } else { "" };
        format!("{} {}{backup}", peer.address, peer.weight)
    };
    peers.iter().map(one).collect()
}

fn due(names: &Names, kind: Kind, now: Instant) -> Duration {
    let entry = names.entries.iter().find(|(key, _)| key.question.kind == kind);
    entry.unwrap().1.due - now
}

#[test]
fn both_kinds_of_addresses_are_peers_and_one_that_fails_keeps_its_own() {
    let (named, now) = (named(None), Instant::now());
    let mut names = names(&[&named], now);
    assert!(!names.are_heard());
    hear(
        &mut names,
        "a.test",
        Kind::A,
        found(&["10.0.0.2", "10.0.0.1"], 60),
        now,
    );
    hear(&mut names, "a.test", Kind::Aaaa, found(&["2001:db8::1"], 60), now);
    assert!(names.are_heard());
    let both = ["10.0.0.1:80 1", "10.0.0.2:80 1", "[2001:db8::1]:80 1"];
    assert_eq!(listed(&names.peers_of(&named, now)), both);
    assert!(!names.state_of(&named).failing);

    hear(
        &mut names,
        "a.test",
        Kind::A,
        Outcome::Failed("SERVFAIL".into()),
        now,
    );
    hear(&mut names, "a.test", Kind::Aaaa, Outcome::Nothing(None), now);
    assert_eq!(listed(&names.peers_of(&named, now)), both[..2]);
    let state = names.state_of(&named);
    assert!(
        state.failing && state.lookups == 4 && state.failures == 1,
        "{state:?}"
    );
}

#[test]
fn answers_are_valid_as_long_as_they_say_within_bounds_or_as_long_as_the_file_says() {
    let (mut named, now) = (named(None), Instant::now());
    let mut all = names(&[&named], now);
    for (ttl, seconds) in [(0, 1), (1, 1), (300, 300), (u32::MAX, 86_400)] {
        hear(&mut all, "a.test", Kind::A, found(&["10.0.0.1"], ttl), now);
        assert_eq!(due(&all, Kind::A, now), Duration::from_secs(seconds));
    }
    for (ttl, seconds) in [(None, 1), (Some(0), 1), (Some(7), 7), (Some(3600), 30)] {
        hear(&mut all, "a.test", Kind::A, Outcome::Nothing(ttl), now);
        assert_eq!(due(&all, Kind::A, now), Duration::from_secs(seconds));
    }
    for seconds in [1, 2, 4, 8, 10, 10] {
        hear(
            &mut all,
            "a.test",
            Kind::A,
            Outcome::Failed("SERVFAIL".into()),
            now,
        );
        assert_eq!(due(&all, Kind::A, now), Duration::from_secs(seconds));
    }
    named.resolver.valid = Some(Duration::from_millis(1500));
    let mut all = names(&[&named], now);
    hear(&mut all, "a.test", Kind::A, found(&["10.0.0.1"], 300), now);
    assert_eq!(due(&all, Kind::A, now), Duration::from_millis(1500));
}

#[test]
fn a_name_that_has_nothing_any_more_keeps_what_it_had_for_a_while_and_one_that_never_had_has_nothing() {
    let (named, now) = (named(None), Instant::now());
    let mut names = names(&[&named], now);
    hear(&mut names, "a.test", Kind::A, Outcome::Nothing(None), now);
    hear(&mut names, "a.test", Kind::Aaaa, Outcome::Nothing(None), now);
    assert_eq!(listed(&names.peers_of(&named, now)), [""; 0]);

    hear(&mut names, "a.test", Kind::A, found(&["10.0.0.1"], 60), now);
    assert_eq!(listed(&names.peers_of(&named, now)), ["10.0.0.1:80 1"]);
    hear(&mut names, "a.test", Kind::A, Outcome::Nothing(None), now);
    let second = Duration::from_secs(1);
    assert_eq!(listed(&names.peers_of(&named, now)), ["10.0.0.1:80 1"]);
    assert_eq!(
        listed(&names.peers_of(&named, now + 29 * second)),
        ["10.0.0.1:80 1"]
    );
    assert!(names.deadline().unwrap() <= now + 30 * second);
    assert!(names.advance(now + 30 * second), "there is something to tell");
    assert_eq!(listed(&names.peers_of(&named, now + 30 * second)), [""; 0]);

    // One that comes back in time has lost nothing, and its time begins anew.
    hear(&mut names, "a.test", Kind::A, found(&["10.0.0.1"], 60), now);
    names.peers_of(&named, now);
    hear(&mut names, "a.test", Kind::A, Outcome::Nothing(None), now);
    names.peers_of(&named, now);
    hear(
        &mut names,
        "a.test",
        Kind::A,
        found(&["10.0.0.2"], 60),
        now + 20 * second,
    );
    assert_eq!(
        listed(&names.peers_of(&named, now + 20 * second)),
        ["10.0.0.2:80 1"]
    );
    hear(
        &mut names,
        "a.test",
        Kind::A,
        Outcome::Nothing(None),
        now + 25 * second,
    );
    assert_eq!(
        listed(&names.peers_of(&named, now + 25 * second)),
        ["10.0.0.2:80 1"]
    );
    assert_eq!(
        listed(&names.peers_of(&named, now + 54 * second)),
        ["10.0.0.2:80 1"]
    );
}

#[test]
fn the_best_priority_of_a_service_makes_peers_and_the_others_backups() {
    let (mut named, now) = (named(Some("http")), Instant::now());
    let answer = |named: &Named| {
        let mut names = names(&[named], now);
        let records = [
            (2, 9, "two.test", 82),
            (1, 5, "one.test", 81),
            (1, 0, "none.test", 80),
        ];
        hear(
            &mut names,
            "_http._tcp.a.test",
            Kind::Srv,
            services(&records),
            now,
        );
        assert!(!names.are_heard(), "their hosts have to be asked for");
        for (host, ip) in [
            ("one.test", "10.0.0.1"),
            ("two.test", "10.0.0.2"),
            ("none.test", "10.0.0.3"),
        ] {
            hear(&mut names, host, Kind::A, found(&[ip], 60), now);
            if named.resolver.ipv6 {
                hear(&mut names, host, Kind::Aaaa, Outcome::Nothing(None), now);
            }
        }
        assert!(names.are_heard());
        listed(&names.peers_of(named, now))
    };
    let plain = ["10.0.0.1:81 5", "10.0.0.3:80 1", "10.0.0.2:82 9 backup"];
    assert_eq!(answer(&named), plain);
    named.like.weight = 7;
    assert_eq!(
        answer(&named),
        ["10.0.0.1:81 7", "10.0.0.3:80 7", "10.0.0.2:82 7 backup"]
    );
    named.like.weight = 1;
    named.like.backup = true;
    named.resolver.ipv6 = false;
    assert_eq!(answer(&named), ["10.0.0.1:81 5 backup", "10.0.0.3:80 1 backup"]);
}

#[test]
fn a_service_with_a_dot_in_it_is_asked_for_as_it_is() {
    let now = Instant::now();
    for (service, question) in [
        ("http", "_http._tcp.a.test"),
        ("_x._udp", "_x._udp.a.test"),
        ("S.b", "s.b.a.test"),
    ] {
        let names = names(&[&named(Some(service))], now);
        let asked: Vec<&str> = names
            .entries
            .keys()
            .map(|key| key.question.name.as_str())
            .collect();
        assert_eq!(asked, [question]);
    }
}

#[test]
fn hosts_that_a_service_has_no_more_are_not_asked_for_any_more_and_what_is_incomplete_empties_nothing() {
    let (named, now) = (named(Some("http")), Instant::now());
    let mut names = names(&[&named], now);
    let service = "_http._tcp.a.test";
    hear(
        &mut names,
        service,
        Kind::Srv,
        services(&[(1, 1, "one.test", 81)]),
        now,
    );
    hear(&mut names, "one.test", Kind::A, found(&["10.0.0.1"], 60), now);
    hear(&mut names, "one.test", Kind::Aaaa, Outcome::Nothing(None), now);
    assert_eq!(listed(&names.peers_of(&named, now)), ["10.0.0.1:81 1"]);
    hear(
        &mut names,
        service,
        Kind::Srv,
        services(&[(1, 1, "two.test", 82)]),
        now,
    );
    assert_eq!(names.entries.len(), 3);
    assert_eq!(
        listed(&names.peers_of(&named, now)),
        ["10.0.0.1:81 1"],
        "two.test was not heard of"
    );
    assert_eq!(names.known[&key_of(&named)].empty_since, None);
    hear(&mut names, "two.test", Kind::A, found(&["10.0.0.2"], 60), now);
    assert_eq!(listed(&names.peers_of(&named, now)), ["10.0.0.2:82 1"]);
}

#[test]
fn a_name_that_is_asked_for_in_another_way_goes_on_with_what_was_known() {
    let (mut named, now) = (named(Some("http")), Instant::now());
    let mut names = names(&[&named], now);
    hear(
        &mut names,
        "_http._tcp.a.test",
        Kind::Srv,
        services(&[(1, 1, "one.test", 81)]),
        now,
    );
    hear(&mut names, "one.test", Kind::A, found(&["10.0.0.1"], 60), now);
    hear(&mut names, "one.test", Kind::Aaaa, Outcome::Nothing(None), now);
    named.resolver.valid = Some(Duration::from_secs(5));
    names.wanted = vec![named.clone()];
    names.keep_needed(now);
    assert!(!names.are_heard() && names.entries.len() == 3);
    let failed = Outcome::Failed("SERVFAIL".into());
    hear(&mut names, "_http._tcp.a.test", Kind::Srv, failed, now);
    assert_eq!(listed(&names.peers_of(&named, now)), ["10.0.0.1:81 1"]);
}

#[test]
fn no_more_peers_are_made_than_there_is_room_for() {
    let (named, now) = (named(None), Instant::now());
    let mut names = names(&[&named], now);
    let many: Vec<String> = (0..400)
        .map(|n| format!("10.0.{}.{}", n / 256, n % 256))
        .collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    hear(&mut names, "a.test", Kind::A, found(&many, 60), now);
    assert_eq!(names.peers_of(&named, now).len(), MAX_PRESENT);
}
