//! Which connections have something un-acknowledged, on which stream and in which lane. Pure; owned by the link's core.
//!
//! Trap: looked up twice per frame, so it hashes by one multiplication and without a secret. That is safe for connection
//! ids alone: the gateway makes them, and what a client can bring about is which of its own are in here.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::{BuildHasherDefault, Hasher};

use super::StreamKey;
use super::lane::LaneKind;

/// Where a connection's next frame has to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pin {
    /// The stream.
    pub stream: StreamKey,
    /// The lane of it.
    pub lane: LaneKind,
    /// Its frames there.
    pub frames: u32,
}

/// Room that is kept whatever there is.
const ROOM_KEPT: usize = 64;

/// All of them, by connection.
#[derive(Debug, Default)]
pub struct Pins(HashMap<u64, Pin, BuildHasherDefault<IdHasher>>);

impl Pins {
    /// The place of a connection.
    pub fn entry(&mut self, connection: u64) -> Entry<'_, u64, Pin> {
        self.0.entry(connection)
    }

    /// One frame of this connection is not pending any more.
    pub fn remove_one(&mut self, connection: u64) {
        if let Entry::Occupied(mut pin) = self.0.entry(connection) {
            pin.get_mut().frames -= 1;
            if pin.get().frames == 0 {
                pin.remove();
            }
        }
    }

    /// Gives memory back that a storm or a mass departure needed.
    pub fn rest(&mut self) {
        if self.0.capacity() > ROOM_KEPT && self.0.capacity() / 8 > self.0.len() {
            self.0.shrink_to(ROOM_KEPT.max(2 * self.0.len()));
        }
    }

    /// Connections that are pinned.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.0.len()
    }
}

/// Multiplies, and folds the halves of the product: every bit of the id reaches those that the table uses.
#[derive(Debug, Default)]
struct IdHasher(u64);

impl Hasher for IdHasher {
    fn write_u64(&mut self, id: u64) {
        let product = u128::from(id ^ 0x9e37_79b9_7f4a_7c15) * 0xd6e8_feb8_6659_fd93;
        self.0 = product as u64 ^ (product >> 64) as u64;
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(self.0 ^ u64::from(*byte));
        }
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ids as a gateway gives them: workers, slots counted up, some generations. Seen as the table sees them: by the low
    /// bits for the place, by the high seven for the tag.
    #[test]
    fn ids_are_spread_like_random_numbers() {
        let ids = (0..8u64).flat_map(|worker| {
            (0..4_096u64)
                .flat_map(move |slot| (0..2u64).map(move |g| (7 << 40) | (worker << 32) | (slot << 12) | g))
        });
        let (mut places, mut tags, mut count) = (vec![0u32; 4_096], [0u32; 128], 0u32);
        for id in ids {
            let mut hasher = IdHasher::default();
            hasher.write_u64(id);
            places[(hasher.finish() & 4_095) as usize] += 1;
            tags[(hasher.finish() >> 57) as usize] += 1;
            count += 1;
        }
        // 16 a place on average: random numbers reach about 36 somewhere in 4,096.
        assert_eq!(count, 65_536);
        assert!(*places.iter().max().unwrap() <= 48, "{:?}", places.iter().max());
        assert!(tags.iter().all(|tag| (350..700).contains(tag)), "{tags:?}");
    }
}
