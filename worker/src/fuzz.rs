//! The parsers of what clients send, on inputs that [`culvert_fuzz`] makes.

use culvert_fuzz::run;

use crate::{client_hello, http, proxy_protocol};

/// Mutations in each run of the tests.
const ROUNDS: usize = 30_000;

#[test]
fn fuzz_what_a_proxy_header_is_does_not_change_when_more_arrives() {
    use proxy_protocol::{LONGEST, Read, read};
    run("proxy_protocol", ROUNDS, |bytes, cut| {
        match (read(&bytes[..cut]), read(bytes)) {
            (Read::Incomplete, Read::Header(header)) => {
                assert!(cut < header.bytes && header.bytes <= bytes.len())
            }
            (Read::Incomplete, _) => assert!(cut < LONGEST, "all that is looked at says nothing"),
            (Read::Header(header), whole) => {
                assert!(header.bytes <= cut && header.bytes <= LONGEST);
                assert_eq!(whole, Read::Header(header));
            }
            (Read::Invalid(_), whole) => assert!(matches!(whole, Read::Invalid(_)), "{bytes:?} at {cut}"),
        }
    });
}

#[test]
fn fuzz_what_a_hello_is_does_not_change_when_more_arrives() {
    use client_hello::{Read, read};
    run("client_hello", ROUNDS, |bytes, cut| {
        match (read(&bytes[..cut]), read(bytes)) {
            (Read::Incomplete, _) => {}
            (before, whole) => assert_eq!(before, whole, "{bytes:?} at {cut}"),
        }
    });
}

#[test]
fn fuzz_what_a_request_is_does_not_change_when_more_arrives() {
    let mut counts = [0u64; 3];
    run("http", ROUNDS, |bytes, cut| {
        let before = http::parse(&bytes[..cut]);
        match (&before, http::parse(bytes)) {
            (Ok(None), _) => counts[0] += 1,
            (Ok(Some(request)), whole) => {
                counts[1] += 1;
                // Or it would be answered for ever.
                assert!(request.length > 0 && request.length <= cut);
                assert_eq!(whole.as_ref(), Ok(&Some(request.clone())), "{bytes:?} at {cut}");
                assert_eq!(http::parse(&bytes[..request.length]), before);
            }
            (Err((status, _)), whole) => {
                counts[2] += 1;
                assert!((400..500).contains(status));
                assert!(whole.is_err(), "{bytes:?} at {cut}");
            }
        }
    });
    assert!(counts.iter().all(|count| *count > 0), "{counts:?}");
}
