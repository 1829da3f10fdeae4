//! What servers answer, right and wrong; and what becomes of it when bytes are changed at random.

use super::*;

fn question(name: &str, kind: Kind) -> Question {
    Question {
        name: name.to_owned(),
        kind,
    }
}

/// An answer from its pieces: flags and counts (answer, authority), then the records as bytes.
fn message(question: &Question, flags: u16, counts: [u16; 2], records: &[u8]) -> Vec<u8> {
    let mut bytes = query(question, 7).unwrap();
    bytes[2..4].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&counts[0].to_be_bytes());
    bytes[8..10].copy_from_slice(&counts[1].to_be_bytes());
    bytes.extend_from_slice(records);
    bytes
}

const OK: u16 = 0x8180;

/// The question's own name, as a pointer.
const SAME: [u8; 2] = [0xc0, 12];

fn record(owner: &[u8], rtype: u16, ttl: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = owner.to_vec();
    bytes.extend(rtype.to_be_bytes());
    bytes.extend(1u16.to_be_bytes());
    bytes.extend(ttl.to_be_bytes());
    bytes.extend((data.len() as u16).to_be_bytes());
    bytes.extend(data);
    bytes
}

fn wire(name: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for label in name.split('.') {
        bytes.push(label.len() as u8);
        bytes.extend(label.as_bytes());
    }
    bytes.push(0);
    bytes
}

fn addresses(list: &[&str]) -> Records {
    Records::Addresses(list.iter().map(|ip| ip.parse().unwrap()).collect())
}

#[test]
fn a_question_asks_for_recursion_and_repeats_the_name() {
    let bytes = query(&question("a.test", Kind::Aaaa), 0x1234).unwrap();
    assert_eq!(bytes[..12], [0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    assert_eq!(bytes[12..], *b"\x01a\x04test\x00\x00\x1c\x00\x01");
    assert_eq!(query(&question("a..b", Kind::A), 1), None);
}

#[test]
fn addresses_are_sorted_and_none_comes_twice_and_those_that_no_host_has_are_left_out() {
    let asked = question("a.test", Kind::A);
    let mut records = Vec::new();
    for (ip, ttl) in [
        ([10, 0, 0, 2], 60),
        ([10, 0, 0, 1], 30),
        ([10, 0, 0, 2], 60),
        ([0, 0, 0, 0], 9),
        ([224, 0, 0, 1], 40),
    ] {
        records.extend(record(&SAME, 1, ttl, &ip));
    }
    let bytes = message(&asked, OK, [5, 0], &records);
    let expected = Answer::Found(addresses(&["10.0.0.1", "10.0.0.2"]), 9);
    assert_eq!(read(&bytes, 7, &asked), expected);
    assert_eq!(read(&bytes, 8, &asked), Answer::Stray, "another id");
    assert_eq!(
        read(&bytes, 7, &question("b.test", Kind::A)),
        Answer::Stray,
        "another name"
    );
    assert_eq!(
        read(&bytes, 7, &question("a.test", Kind::Aaaa)),
        Answer::Stray,
        "another kind"
    );
    assert_eq!(
        read(&query(&asked, 7).unwrap(), 7, &asked),
        Answer::Stray,
        "a question"
    );
    assert_eq!(read(&bytes[..bytes.len() - 1], 7, &asked), Answer::Garbled, "cut");
    // What stands for an IPv4 address is one, and so is what stands for none.
    let asked = question("a.test", Kind::Aaaa);
    let mut records = Vec::new();
    for mapped in [[0, 0, 0, 0], [224, 0, 0, 1], [10, 0, 0, 1]] {
        let ip = std::net::Ipv4Addr::from(mapped).to_ipv6_mapped();
        records.extend(record(&SAME, 28, 60, &ip.octets()));
    }
    records.extend(record(&SAME, 28, 60, &[0; 16]));
    let six = message(&asked, OK, [4, 0], &records);
    assert_eq!(
        read(&six, 7, &asked),
        Answer::Found(addresses(&["::ffff:10.0.0.1"]), 60)
    );
    let asked = question("a.test", Kind::A);
    let mut upper = bytes.clone();
    upper[13] = b'A';
    assert_eq!(read(&upper, 7, &asked), expected, "letters have no case");
}

#[test]
fn a_chain_of_aliases_is_followed_within_an_answer_and_its_least_time_counts() {
    let asked = question("a.test", Kind::Aaaa);
    let mut records = record(
        &wire("c.test"),
        28,
        500,
        &[0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
    );
    records.extend(record(&SAME, 5, 100, &wire("b.test")));
    records.extend(record(&wire("b.test"), 5, 20, &wire("C.test")));
    let bytes = message(&asked, OK, [3, 0], &records);
    assert_eq!(
        read(&bytes, 7, &asked),
        Answer::Found(addresses(&["2001:db8::1"]), 20)
    );

    let records = record(&SAME, 5, 100, &wire("elsewhere.test"));
    let bytes = message(&asked, OK, [1, 0], &records);
    assert_eq!(
        read(&bytes, 7, &asked),
        Answer::Alias("elsewhere.test".into(), 100)
    );
}

#[test]
fn a_circle_of_aliases_is_no_answer() {
    let asked = question("a.test", Kind::A);
    let mut records = record(&SAME, 5, 100, &wire("b.test"));
    records.extend(record(&wire("b.test"), 5, 100, &wire("a.test")));
    assert_eq!(
        read(&message(&asked, OK, [2, 0], &records), 7, &asked),
        Answer::Garbled
    );
}

#[test]
fn a_name_that_points_at_itself_is_no_answer() {
    let asked = question("a.test", Kind::A);
    let itself = (12 + 8 + 4) as u8;
    let records = record(&[0xc0, itself], 1, 100, &[10, 0, 0, 1]);
    assert_eq!(
        read(&message(&asked, OK, [1, 0], &records), 7, &asked),
        Answer::Garbled
    );
}

#[test]
fn services_have_hosts_ports_priorities_and_weights() {
    let asked = question("_http._tcp.a.test", Kind::Srv);
    let service = |priority: u8, weight: u8, port: u8, target: &str| {
        let mut data = vec![0, priority, 0, weight, 0, port];
        data.extend(wire(target));
        record(&SAME, 33, 60, &data)
    };
    let mut records = service(2, 0, 81, "Two.test");
    records.extend(service(1, 9, 80, "one.test"));
    // A port that is none, and a host whose name is none.
    records.extend(service(1, 9, 0, "one.test"));
    records.extend(service(1, 9, 80, "o ne.test"));
    let one = |priority, weight, target: &str, port| Service {
        priority,
        weight,
        target: target.into(),
        port,
    };
    let expected = vec![one(1, 9, "one.test", 80), one(2, 0, "two.test", 81)];
    assert_eq!(
        read(&message(&asked, OK, [4, 0], &records), 7, &asked),
        Answer::Found(Records::Services(expected), 60)
    );
}

#[test]
fn that_there_is_nothing_and_for_how_long_is_read() {
    let asked = question("a.test", Kind::A);
    let mut data = [wire("ns.test"), wire("root.test")].concat();
    data.extend([0; 16]);
    data.extend(25u32.to_be_bytes());
    let soa = record(&wire("test"), 6, 40, &data);
    assert_eq!(
        read(&message(&asked, OK, [0, 1], &soa), 7, &asked),
        Answer::Nothing(Some(25))
    );
    assert_eq!(
        read(&message(&asked, OK | 3, [0, 1], &soa), 7, &asked),
        Answer::Nothing(Some(25))
    );
    assert_eq!(
        read(&message(&asked, OK | 3, [0, 0], &[]), 7, &asked),
        Answer::Nothing(None)
    );
}

#[test]
fn a_server_that_fails_and_an_answer_that_is_cut_are_told_apart() {
    let asked = question("a.test", Kind::A);
    assert_eq!(
        read(&message(&asked, OK | 2, [0, 0], &[]), 7, &asked),
        Answer::Refused("SERVFAIL".into())
    );
    assert_eq!(
        read(&message(&asked, OK | 5, [0, 0], &[]), 7, &asked),
        Answer::Refused("REFUSED".into())
    );
    let some = record(&SAME, 1, 60, &[10, 0, 0, 1]);
    assert_eq!(
        read(&message(&asked, OK | 0x200, [1, 0], &some), 7, &asked),
        Answer::Truncated
    );
}

#[test]
fn an_answer_of_the_greatest_size_is_bounded() {
    let asked = question("a.test", Kind::A);
    let mut records = Vec::new();
    for n in 0..4000u32 {
        let ip = (10 << 24 | n).to_be_bytes();
        records.extend(record(&SAME, 1, 60, &ip));
    }
    match read(&message(&asked, OK, [4000, 0], &records), 7, &asked) {
        Answer::Found(Records::Addresses(found), 60) => assert_eq!(found.len(), RECORDS_MAX),
        other => panic!("{other:?}"),
    }
}

/// The question that an input answers, as far as it names one.
fn asked_in(bytes: &[u8]) -> Question {
    let asked = Message::from_octets(bytes).ok().and_then(|message| {
        let asked = message.first_question()?;
        Some((text_of(asked.qname())?, asked.qtype()))
    });
    match asked {
        Some((name, Rtype::AAAA)) => question(&name, Kind::Aaaa),
        Some((name, Rtype::SRV)) => question(&name, Kind::Srv),
        Some((name, _)) => question(&name, Kind::A),
        None => question("a.test", Kind::A),
    }
}

#[test]
fn fuzz_whatever_is_answered_makes_a_bounded_value() {
    let mut counts = [0u64; 7];
    let mut check = |bytes: &[u8]| {
        let asked = asked_in(bytes);
        let id = bytes.get(..2).map_or(0, |id| u16::from_be_bytes([id[0], id[1]]));
        let answer = read(bytes, id, &asked);
        counts[match &answer {
            Answer::Stray => 0,
            Answer::Found(records, _) => {
                assert!(!records.is_empty());
                match records {
                    Records::Addresses(all) => assert!(all.len() <= RECORDS_MAX && all.is_sorted()),
                    Records::Services(all) => {
                        let right = |one: &Service| {
                            one.port != 0 && query(&question(&one.target, Kind::A), 0).is_some()
                        };
                        assert!(all.len() <= RECORDS_MAX && all.iter().all(right));
                    }
                }
                1
            }
            Answer::Nothing(_) => 2,
            Answer::Alias(name, _) => {
                assert!(name.len() <= 253 && *name != asked.name, "{name}");
                3
            }
            Answer::Truncated => 4,
            Answer::Refused(_) => 5,
            Answer::Garbled => 6,
        }] += 1;
    };
    culvert_fuzz::run("dns", 30_000, |bytes, cut| {
        check(bytes);
        check(&bytes[..cut]);
    });
    // The corpus reaches each of them, so the mutations begin near each of them.
    assert!(counts.iter().all(|count| *count > 0), "{counts:?}");
}
