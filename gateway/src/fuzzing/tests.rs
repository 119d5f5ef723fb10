//! Each target over its kept corpus, and over so many inputs made from that by a seeded random mutation.

use std::fs;
use std::path::Path;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

/// Longest input made here, bytes; what is found in longer ones is a matter for the fuzzer.
const INPUT_BYTES_MAX: usize = 2_048;

#[test]
fn codec() {
    replay("codec", super::codec::run);
    vary("codec", super::codec::run, 300_000);
}

#[test]
fn connection() {
    replay("connection", super::connection::run);
    vary("connection", super::connection::run, 150_000);
}

/// The inputs that are kept: `cargo fuzz cmin` leaves those that reach something no other does, and whoever mends a crash
/// adds its input.
fn corpus(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut paths: Vec<_> = fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    assert!(paths.len() >= 20, "{} has {} inputs", folder.display(), paths.len());
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

fn replay(target: &str, run: fn(&[u8])) {
    for input in corpus(target) {
        tell(target, run, &input);
    }
}

/// Always the same inputs for the same corpus.
fn vary(target: &str, run: fn(&[u8]), count: usize) {
    let corpus = corpus(target);
    let mut random = StdRng::seed_from_u64(SEED);
    for _ in 0..count {
        let mut input = corpus.choose(&mut random).unwrap().clone();
        for _ in 0..random.random_range(1..=4) {
            mutate(&mut input, &corpus, &mut random);
        }
        input.truncate(INPUT_BYTES_MAX);
        tell(target, run, &input);
    }
}

const SEED: u64 = 0x2007;

fn mutate(input: &mut Vec<u8>, corpus: &[Vec<u8>], random: &mut StdRng) {
    let at = random.random_range(0..=input.len());
    let upto = random.random_range(at..=input.len().min(at + 32));
    match random.random_range(0..6) {
        0 if at < input.len() => input[at] = random.random(),
        1 if at < input.len() => input[at] ^= 1 << random.random_range(0..8),
        2 => drop(input.drain(at..upto)),
        3 => input.insert(at, random.random()),
        4 => {
            let again = input[at..upto].to_vec();
            input.splice(at..at, again);
        }
        _ => {
            let other = corpus.choose(random).unwrap();
            let from = random.random_range(0..=other.len());
            input.splice(at.., other[from..].iter().copied());
        }
    }
}

/// Runs an input, and says which it was if that panics.
fn tell(target: &str, run: fn(&[u8]), input: &[u8]) {
    struct Told<'a>(&'a str, &'a [u8]);
    impl Drop for Told<'_> {
        fn drop(&mut self) {
            if std::thread::panicking() {
                let hex: String = self.1.iter().map(|byte| format!("{byte:02x}")).collect();
                eprintln!("{} panics over {hex}", self.0);
            }
        }
    }
    let _told = Told(target, input);
    run(input);
}
