//! One thing that is to be pushed again: which buckets of the recency index, since when, to whom, and how far it has come. Pure.

use std::collections::{BTreeMap, VecDeque};

use crate::store::{CHAT_BUCKETS, Recent};
use crate::takeover::{Buckets, Life};

/// Buckets, and chats of one bucket, that are asked for at a time.
const BUCKETS_PER_STEP: usize = 64;
pub const CHATS_PER_BUCKET: usize = 256;

/// Buckets that are gone through.
#[derive(Debug, Clone)]
pub struct Job {
    pub from_us: u64,
    /// `u64::MAX`: to the end.
    pub upto_us: u64,
    pub buckets: Buckets,
    /// The bucket that is next, and how far its index is read.
    pub bucket: u32,
    pub after_us: u64,
    /// Gateways whose connections are pushed to, and since when they miss something; empty: all.
    pub to: BTreeMap<u32, u64>,
    pub of: Option<Life>,
    /// Chats that are still to be pushed, oldest news first, and where in the one in front.
    pub chats: VecDeque<Recent>,
    pub at: Option<Walk>,
    pub pushed: u64,
}

/// Going up through a chat that has more than one page.
#[derive(Debug, Clone)]
pub struct Walk {
    pub cursor: u64,
    pub head: u64,
}

impl Job {
    pub fn new(
        from_us: u64,
        upto_us: u64,
        buckets: Buckets,
        to: BTreeMap<u32, u64>,
        of: Option<Life>,
    ) -> Job {
        let chats = VecDeque::new();
        Job { from_us, upto_us, buckets, bucket: 0, after_us: from_us, to, of, chats, at: None, pushed: 0 }
    }

    /// The next buckets to ask for, with the time behind which.
    pub fn ask(&self) -> Vec<(u32, u64)> {
        let after = |bucket| if bucket == self.bucket { self.after_us } else { self.from_us };
        (self.bucket..CHAT_BUCKETS)
            .filter(|bucket| self.buckets.has(*bucket))
            .take(BUCKETS_PER_STEP)
            .map(|bucket| (bucket, after(bucket)))
            .collect()
    }

    /// Takes what the index said of these buckets, up to the first that has more than was asked for.
    pub fn found(&mut self, asked: &[(u32, u64)], found: Vec<Vec<Recent>>) {
        for ((bucket, after_us), chats) in asked.iter().zip(found) {
            let full = chats.len() >= CHATS_PER_BUCKET;
            let last_us = chats.last().map_or(0, |recent| recent.time_us);
            self.chats.extend(chats);
            self.bucket = *bucket;
            if full {
                // Others may have the same time as the last one; twice is harmless. But it must go on.
                self.after_us = if last_us > after_us + 1 { last_us - 1 } else { last_us };
                return;
            }
            self.bucket = bucket + 1;
            self.after_us = self.from_us;
        }
    }
}
