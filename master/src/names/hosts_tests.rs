//! With name servers of the test's own, and time as the test says it.

use std::net::{SocketAddr, UdpSocket};

use super::*;

const OWNERS: [Owner; 2] = [Owner(1), Owner(2)];

fn counters() -> HostCounters {
    HostCounters {
        sessions: 0.into(),
        remembered: 0.into(),
        lookups: 0.into(),
        failed: 0.into(),
        refused: 0.into(),
    }
}

struct Scene {
    server: UdpSocket,
    resolver: Arc<Resolver>,
    hosts: Hosts,
    counters: HostCounters,
    now: Instant,
}

/// What was asked for, in lower case, its type, and who is to be answered what.
struct Heard {
    name: String,
    is_v6: bool,
    bytes: Vec<u8>,
    from: SocketAddr,
}

impl Scene {
    fn new(change: impl FnOnce(&mut Resolver)) -> Scene {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        server.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut resolver = Resolver {
            servers: vec![server.local_addr().unwrap()],
            valid: None,
            hold: Duration::ZERO,
            ipv4: true,
            ipv6: false,
            timeout: Duration::from_secs(10),
        };
        change(&mut resolver);
        Scene {
            server,
            resolver: Arc::new(resolver),
            hosts: Hosts::default(),
            counters: counters(),
            now: Instant::now(),
        }
    }

    fn ask(&mut self, owner: Owner, resolver: u16, host: &str) {
        let host = host.to_owned();
        let question = Question { resolver, host };
        self.hosts
            .ask(owner, question, &self.resolver, self.now, &self.counters);
    }

    fn heard(&self) -> Heard {
        let mut buffer = [0; 512];
        let (length, from) = self.server.recv_from(&mut buffer).unwrap();
        let bytes = buffer[..length].to_vec();
        let mut labels = Vec::new();
        let mut at = 12;
        while bytes[at] != 0 {
            let label = &bytes[at + 1..][..usize::from(bytes[at])];
            labels.push(str::from_utf8(label).unwrap().to_owned());
            at += 1 + label.len();
        }
        Heard {
            name: labels.join("."),
            is_v6: bytes[at + 2] == 28,
            bytes,
            from,
        }
    }

    /// Answers a question; no address: there is no such host.
    fn answer(&self, heard: &Heard, ttl: u8, ip: Option<[u8; 4]>) {
        let mut bytes = heard.bytes.clone();
        bytes[2..4].copy_from_slice(&if ip.is_some() { 0x8180_u16 } else { 0x8183 }.to_be_bytes());
        if let Some(ip) = ip {
            bytes[7] = 1;
            bytes.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, ttl, 0, 4]);
            bytes.extend(ip);
        }
        self.server.send_to(&bytes, heard.from).unwrap();
    }

    /// Advances until somebody is answered; what was sent over loopback is there at once, a busy host gets a moment.
    fn told(&mut self) -> Vec<(Owner, Question, Answer)> {
        for _ in 0..500 {
            self.hosts.advance(self.now, &self.counters);
            let answers = self.hosts.answers();
            if !answers.is_empty() {
                return answers;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Vec::new()
    }

    fn pass(&mut self, ms: u64) {
        self.now += Duration::from_millis(ms);
    }

    /// The questions that were sent and not read yet.
    fn is_asked(&self) -> bool {
        self.server.set_nonblocking(true).unwrap();
        let asked = self.server.recv_from(&mut [0; 512]).is_ok();
        self.server.set_nonblocking(false).unwrap();
        asked
    }
}

fn addresses(ips: &[[u8; 4]], valid_ms: u64) -> Answer {
    let addresses = ips.iter().map(|ip| IpAddr::from(*ip)).collect();
    Answer::Addresses { addresses, valid_ms }
}

fn question(resolver: u16, host: &str) -> Question {
    let host = host.to_owned();
    Question { resolver, host }
}

#[test]
fn all_who_ask_for_a_host_share_one_question_and_hear_the_answer_under_their_own_index() {
    let mut scene = Scene::new(|_| {});
    scene.ask(OWNERS[0], 3, "a.test");
    scene.ask(OWNERS[1], 0, "a.test");
    scene.ask(OWNERS[0], 3, "a.test");
    let heard = scene.heard();
    assert_eq!((&heard.name[..], heard.is_v6), ("a.test", false));
    scene.answer(&heard, 60, Some([10, 0, 0, 1]));
    let expected = addresses(&[[10, 0, 0, 1]], 60_000);
    let told = scene.told();
    assert_eq!(
        told,
        [
            (OWNERS[0], question(3, "a.test"), expected.clone()),
            (OWNERS[1], question(0, "a.test"), expected),
        ]
    );
    // It is remembered, for the time that is left of it.
    scene.pass(59_000);
    scene.ask(OWNERS[1], 0, "a.test");
    let expected = addresses(&[[10, 0, 0, 1]], 1_000);
    assert_eq!(scene.told(), [(OWNERS[1], question(0, "a.test"), expected)]);
    assert!(!scene.is_asked());
    // And no longer.
    scene.pass(1_000);
    scene.ask(OWNERS[1], 0, "a.test");
    assert!(scene.is_asked());
    assert_eq!(scene.counters.lookups.load(Relaxed), 2);
}

#[test]
fn how_long_an_answer_counts_is_what_the_file_says_or_the_answer_within_bounds() {
    for (valid, ttl, expected) in [(Some(7), 60, 7_000), (None, 0, 1_000), (None, 200, 200_000)] {
        let mut scene = Scene::new(|resolver| resolver.valid = valid.map(Duration::from_secs));
        scene.ask(OWNERS[0], 0, "a.test");
        scene.answer(&scene.heard(), ttl, Some([10, 0, 0, 1]));
        assert_eq!(scene.told()[0].2, addresses(&[[10, 0, 0, 1]], expected));
    }
    // That there is nothing does not count as long as `valid` says.
    let mut scene = Scene::new(|resolver| resolver.valid = Some(Duration::from_secs(100)));
    scene.ask(OWNERS[0], 0, "a.test");
    scene.answer(&scene.heard(), 0, None);
    let told = scene.told();
    assert!(
        matches!(&told[0].2, Answer::Nothing { why, valid_ms: 1_000 } if why.starts_with("there is no such host")),
        "{told:?}"
    );
    assert_eq!(scene.counters.failed.load(Relaxed), 1);
}

#[test]
fn addresses_of_one_kind_wait_a_second_for_the_other_kind_and_count_for_less_time_without_it() {
    let mut scene = Scene::new(|resolver| resolver.ipv6 = true);
    scene.ask(OWNERS[0], 0, "a.test");
    for _ in 0..2 {
        let heard = scene.heard();
        if !heard.is_v6 {
            scene.answer(&heard, 250, Some([10, 0, 0, 1]));
        }
    }
    assert_eq!(scene.told(), []);
    scene.pass(999);
    assert_eq!(scene.told(), []);
    scene.pass(1);
    let told = scene.told();
    assert_eq!(told[0].2, addresses(&[[10, 0, 0, 1]], 30_000));
}

#[test]
fn a_silent_server_is_waited_for_as_long_as_resolver_timeout_says_and_a_second_then_passes_before_the_next_question()
 {
    let mut scene = Scene::new(|resolver| resolver.timeout = Duration::from_millis(300));
    scene.ask(OWNERS[0], 0, "a.test");
    scene.heard();
    scene.pass(299);
    assert_eq!(scene.told(), []);
    assert!(scene.hosts.deadline() <= Some(scene.now + Duration::from_millis(1)));
    scene.pass(1);
    let told = scene.told();
    assert!(
        matches!(&told[0].2, Answer::Nothing { why, valid_ms: 1_000 } if why.contains("no answer")),
        "{told:?}"
    );
    scene.pass(999);
    scene.ask(OWNERS[0], 0, "a.test");
    assert_eq!(scene.told().len(), 1);
    assert!(!scene.is_asked());
    scene.pass(1);
    scene.ask(OWNERS[0], 0, "a.test");
    assert!(scene.is_asked());
}

#[test]
fn those_that_find_no_room_wait_for_their_turn_and_beyond_that_are_refused() {
    let mut scene = Scene::new(|_| {});
    let host = |n: usize| format!("h{n}.test");
    for n in 0..OPEN_MAX + 2 {
        scene.ask(OWNERS[0], 0, &host(n));
        if n < RUNNING_MAX {
            scene.heard();
        }
    }
    assert!(!scene.is_asked(), "no more are under way at once");
    assert_eq!(scene.hosts.sources().count(), RUNNING_MAX);
    let told = scene.hosts.answers();
    assert_eq!(told.len(), 2);
    assert_eq!(told[0].1, question(0, &host(OPEN_MAX)));
    assert!(
        matches!(&told[0].2, Answer::Nothing { why, valid_ms: 0 } if why.contains("1024 names")),
        "{told:?}"
    );
    assert_eq!(scene.counters.refused.load(Relaxed), 2);
    // A worker that is gone is told nothing; what it has asked goes on, and the next ones have their turn.
    scene.ask(OWNERS[1], 0, &host(OPEN_MAX - 1));
    scene.hosts.forget(OWNERS[0]);
    scene.pass(10_000);
    let told = scene.told();
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!(
        (told[0].0, &told[0].1),
        (OWNERS[1], &question(0, &host(OPEN_MAX - 1)))
    );
    assert!(
        matches!(&told[0].2, Answer::Nothing { why, .. } if why.contains("too many other names")),
        "{told:?}"
    );
    scene.ask(OWNERS[1], 0, "late.test");
    assert_eq!(scene.heard().name, "late.test");
}

#[test]
fn the_next_in_line_is_asked_for_when_one_has_ended() {
    let mut scene = Scene::new(|_| {});
    for n in 0..RUNNING_MAX {
        scene.ask(OWNERS[0], 0, &format!("h{n}.test"));
    }
    let first = scene.heard();
    for _ in 1..RUNNING_MAX {
        scene.heard();
    }
    scene.ask(OWNERS[0], 0, "next.test");
    scene.ask(OWNERS[0], 0, "last.test");
    assert!(!scene.is_asked());
    scene.answer(&first, 9, Some([10, 0, 0, 1]));
    assert_eq!(scene.told().len(), 1);
    assert_eq!(scene.heard().name, "next.test");
    assert!(!scene.is_asked());
}

#[test]
fn what_is_remembered_is_bounded_and_names_that_are_made_up_go_before_those_that_are_used() {
    let mut scene = Scene::new(|_| {});
    let known = addresses(&[[10, 0, 0, 1]], 1_000);
    scene.ask(OWNERS[0], 0, "served.test");
    scene.answer(&scene.heard(), 1, Some([10, 0, 0, 1]));
    assert_eq!(scene.told()[0].2, known);
    for n in 0..2 * KNOWN_MAX {
        scene.pass(1);
        scene.ask(OWNERS[0], 0, &format!("h{n}.test"));
        let ip = (n % 2 == 0).then_some([10, 0, 0, 2]);
        scene.answer(&scene.heard(), 200, ip);
        assert_eq!(scene.told().len(), 1);
        // Its time is over after each second.
        if n % 500 == 0 {
            scene.ask(OWNERS[0], 0, "served.test");
            let again = scene.hosts.answers();
            if again.is_empty() {
                scene.answer(&scene.heard(), 1, Some([10, 0, 0, 1]));
                scene.told();
            }
        }
        assert!(scene.hosts.hosts.len() <= KNOWN_MAX);
    }
    let is_known = |name: &str| scene.hosts.hosts.keys().any(|key| key.host == name);
    assert!(is_known("served.test"));
    assert!(is_known(&format!("h{}.test", 2 * KNOWN_MAX - 2)));
    assert!(!is_known("h0.test") && !is_known("h1.test"));
    let of_nothing = scene.hosts.hosts.values().filter(|host| match host {
        Host::Known(known) => known.outcome.is_err(),
        Host::Open(_) => false,
    });
    assert!(of_nothing.count() <= 2 * FORGOTTEN);
}

#[test]
fn a_name_that_nobody_answers_for_does_not_keep_others_from_their_turn_for_long() {
    let mut scene = Scene::new(|_| {});
    for n in 0..RUNNING_MAX {
        scene.ask(OWNERS[0], 0, &format!("h{n}.test"));
    }
    // Nobody else waits.
    scene.pass(6_000);
    assert_eq!(scene.told(), []);
    while scene.is_asked() {}
    scene.ask(OWNERS[1], 0, "next.test");
    assert!(scene.hosts.deadline() <= Some(scene.now));
    let told = scene.told();
    assert_eq!(told.len(), RUNNING_MAX);
    assert!(
        matches!(&told[0].2, Answer::Nothing { why, .. } if why.contains("other names wait")),
        "{told:?}"
    );
    assert_eq!(scene.heard().name, "next.test");
}

#[test]
fn where_name_servers_are_away_a_host_that_was_known_is_still_known() {
    let mut scene = Scene::new(|_| {});
    let known = addresses(&[[10, 0, 0, 1]], STALE_MS);
    scene.ask(OWNERS[0], 0, "a.test");
    scene.answer(&scene.heard(), 1, Some([10, 0, 0, 1]));
    assert_eq!(scene.told()[0].2, addresses(&[[10, 0, 0, 1]], 1_000));
    scene.pass(1_000);
    // Nobody says anything: it is waited for a little.
    scene.ask(OWNERS[0], 0, "a.test");
    let late = scene.heard();
    scene.pass(1_999);
    assert_eq!(scene.told(), []);
    assert!(scene.hosts.deadline() <= Some(scene.now + Duration::from_millis(1)));
    scene.pass(1);
    assert_eq!(scene.told()[0].2, known);
    // Whoever comes then does not wait, and the question stays open.
    scene.pass(1_000);
    scene.ask(OWNERS[1], 0, "a.test");
    assert_eq!(scene.hosts.answers(), [(OWNERS[1], question(0, "a.test"), known)]);
    scene.pass(7_000);
    assert_eq!(scene.told(), [], "nobody waits");
    assert_eq!(scene.counters.failed.load(Relaxed), 1);
    // After that it is given a rest.
    scene.ask(OWNERS[1], 0, "a.test");
    assert_eq!(scene.told()[0].2, addresses(&[[10, 0, 0, 1]], 30_000));
    while scene.is_asked() {}
    drop(late);
    scene.pass(30_000);
    scene.ask(OWNERS[1], 0, "a.test");
    scene.answer(&scene.heard(), 9, Some([10, 0, 0, 2]));
    assert_eq!(scene.told()[0].2, addresses(&[[10, 0, 0, 2]], 9_000));
}

#[test]
fn that_a_host_has_no_address_any_more_is_an_answer_and_counts() {
    let mut scene = Scene::new(|_| {});
    scene.ask(OWNERS[0], 0, "a.test");
    scene.answer(&scene.heard(), 1, Some([10, 0, 0, 1]));
    scene.told();
    scene.pass(1_000);
    scene.ask(OWNERS[0], 0, "a.test");
    scene.answer(&scene.heard(), 1, None);
    assert!(matches!(&scene.told()[0].2, Answer::Nothing { .. }));
}

#[test]
fn a_host_that_was_known_is_answered_for_though_too_many_others_are_asked_for() {
    let mut scene = Scene::new(|_| {});
    scene.ask(OWNERS[0], 0, "a.test");
    scene.answer(&scene.heard(), 1, Some([10, 0, 0, 1]));
    scene.told();
    scene.pass(1_000);
    (0..OPEN_MAX).for_each(|n| scene.ask(OWNERS[0], 0, &format!("h{n}.test")));
    scene.ask(OWNERS[0], 0, "a.test");
    let expected = addresses(&[[10, 0, 0, 1]], STALE_MS);
    assert_eq!(
        scene.hosts.answers(),
        [(OWNERS[0], question(0, "a.test"), expected)]
    );
    assert_eq!(scene.counters.refused.load(Relaxed), 0);
}
