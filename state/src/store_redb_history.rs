//! The histories of a redb store: one number for the file, and one for each bucket that lost something since. Pure.
//!
//! Trap: what a transaction draws holds for readers when it is committed, not before.

use std::collections::BTreeMap;

use crate::store::CHAT_BUCKETS;

/// The number of every bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Histories {
    file: u64,
    drawn: BTreeMap<u32, u64>,
}

impl Histories {
    /// Of a file that lost nothing yet.
    pub fn new(file: u64) -> Self {
        Histories { file, drawn: BTreeMap::new() }
    }

    /// Of the file.
    pub fn file(&self) -> u64 {
        self.file
    }

    /// Of a bucket.
    pub fn of(&self, bucket: u32) -> u64 {
        self.drawn.get(&bucket).copied().unwrap_or(self.file)
    }

    /// From now on.
    pub fn draw(&mut self, bucket: u32, history: u64) {
        debug_assert!(bucket < CHAT_BUCKETS);
        self.drawn.insert(bucket, history);
    }
}

/// Key of the file's number in the meta table.
pub const FILE: &str = "history";

/// Key of a bucket's own.
pub fn key(bucket: u32) -> String {
    format!("{FILE}/{bucket:04}")
}

/// The bucket of such a key.
pub fn bucket(key: &str) -> Option<u32> {
    key.strip_prefix(FILE)?.strip_prefix('/')?.parse().ok().filter(|bucket| *bucket < CHAT_BUCKETS)
}

/// Never 0, which on the wire means "none known".
pub fn new_history() -> u64 {
    rand::random_range(1..=u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_has_the_files_until_it_loses_something() {
        let mut histories = Histories::new(5);
        histories.draw(17, 9);
        assert_eq!((histories.of(16), histories.of(17)), (5, 9));
        assert_eq!((bucket(&key(17)), bucket(FILE), bucket("history/1024")), (Some(17), None, None));
    }
}
