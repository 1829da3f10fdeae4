//! The parsers of what clients send, on a corpus and on what becomes of it when bytes are changed at random. A longer run by
//! hand: `FUZZ_ROUNDS=2000000 cargo test --release --workspace --lib fuzz -- --nocapture`. What is found goes into `tests/data/fuzz`.

use std::path::Path;

use crate::{client_hello, proxy_protocol};

/// Numbers from a seed, the same each time (xorshift64).
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit.max(1) as u64) as usize
    }
}

fn corpus(parser: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/data/fuzz")
        .join(parser);
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(
        files.len() >= 8,
        "only {} inputs in {}",
        files.len(),
        folder.display()
    );
    files.iter().map(|file| std::fs::read(file).unwrap()).collect()
}

fn mutate(dice: &mut Dice, corpus: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = corpus[dice.below(corpus.len())].clone();
    for _ in 0..dice.below(6) {
        let at = dice.below(bytes.len() + 1);
        match dice.below(6) {
            0 => bytes.truncate(at),
            1 => bytes.insert(at, dice.below(256) as u8),
            2 if at < bytes.len() => drop(bytes.remove(at)),
            3 => {
                // A piece of another input.
                let other = &corpus[dice.below(corpus.len())];
                let from = dice.below(other.len());
                let to = from + dice.below(other.len() - from);
                bytes.splice(at..at, other[from..to].iter().copied());
            }
            4 if at < bytes.len() => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][dice.below(5)],
            _ if at < bytes.len() => bytes[at] ^= 1 << dice.below(8),
            _ => {}
        }
    }
    bytes
}

/// Runs `check` on the corpus and on its mutations.
fn fuzz(parser: &str, check: impl Fn(&[u8], usize)) {
    let rounds =
        std::env::var("FUZZ_ROUNDS").map_or(30_000, |text| text.parse().expect("a number of rounds"));
    let corpus = corpus(parser);
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    for bytes in &corpus {
        (0..=bytes.len()).for_each(|cut| check(bytes, cut));
    }
    for _ in 0..rounds {
        let bytes = mutate(&mut dice, &corpus);
        let cut = dice.below(bytes.len() + 1);
        check(&bytes, cut);
    }
}

#[test]
fn what_a_proxy_header_is_does_not_change_when_more_arrives() {
    use proxy_protocol::{LONGEST, Read, read};
    fuzz("proxy_protocol", |bytes, cut| {
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
fn what_a_hello_is_does_not_change_when_more_arrives() {
    use client_hello::{Read, read};
    fuzz("client_hello", |bytes, cut| {
        match (read(&bytes[..cut]), read(bytes)) {
            (Read::Incomplete, _) => {}
            (before, whole) => assert_eq!(before, whole, "{bytes:?} at {cut}"),
        }
    });
}
