//! What the fuzz tests share: a parser meets its corpus, cut anywhere, and what becomes of the corpus when bytes are changed at
//! random, the same each time. A longer run by hand: `FUZZ_ROUNDS=2000000 cargo test --release --workspace fuzz`. An input
//! that finds something goes into `tests/data/fuzz/PARSER`, and is tried in each run from then on.

use std::path::Path;

/// Numbers from a seed, the same each time (xorshift64).
pub struct Dice(u64);

impl Dice {
    /// A number below `limit`; 0 if that is 0.
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit.max(1) as u64) as usize
    }
}

/// The inputs in `tests/data/fuzz/PARSER`, in the order of their names.
///
/// # Panics
///
/// When they cannot be read, or are so few that something is wrong.
pub fn corpus(parser: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../data/fuzz")
        .join(parser);
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut files: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    files.sort();
    assert!(
        files.len() >= 8,
        "only {} inputs in {}",
        files.len(),
        folder.display()
    );
    let read =
        |file| std::fs::read(file).unwrap_or_else(|error| panic!("a file of {}: {error}", folder.display()));
    files.iter().map(read).collect()
}

/// One of the corpus with up to five changes.
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
            4 if at < bytes.len() => bytes[at] = [0, 1, 0x7f, 0x80, 0xc0, 0xff][dice.below(6)],
            _ if at < bytes.len() => bytes[at] ^= 1 << dice.below(8),
            _ => {}
        }
    }
    bytes
}

/// Runs `check` on each input of the corpus and on `rounds` mutations (as many as `FUZZ_ROUNDS` says, where that is set).
/// It is given an input and where it is cut, which may be its end: a parser has to say the same when more arrives.
///
/// # Panics
///
/// As [`corpus`]; when `FUZZ_ROUNDS` is no number; and when `check` does.
pub fn run(parser: &str, rounds: usize, mut check: impl FnMut(&[u8], usize)) {
    let rounds =
        std::env::var("FUZZ_ROUNDS").map_or(rounds, |text| text.parse().expect("a number of rounds"));
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
