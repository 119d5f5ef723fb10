//! Frames that are not whole yet: what has come of them, one entry per connection that has one. Owned by one worker.
//!
//! Trap: an entry is charged with the capacity it has, and only [`Tails`] changes either. Memory grows with what has come,
//! never with what a header announces.

use std::sync::Arc;

use slab::Slab;

use crate::burst::{Burst, HOLDER_BYTES};

/// All of one worker.
#[derive(Debug)]
pub struct Tails {
    entries: Slab<Vec<u8>>,
    burst: Arc<Burst>,
}

/// Entries that the table may keep room for while it is empty, until [`Tails::shrink`].
const SPARE_ENTRIES_MAX: usize = 64;

impl Tails {
    /// None yet.
    pub fn new(burst: Arc<Burst>) -> Self {
        Tails { entries: Slab::new(), burst }
    }

    /// Keeps a copy of `bytes`. `None`: the burst budget has no room for it.
    pub fn insert(&mut self, bytes: &[u8]) -> Option<u32> {
        let entry = bytes.to_vec();
        self.burst.resize(0, charge(&entry)).then(|| self.entries.insert(entry) as u32)
    }

    /// The bytes of an entry, to be read with what came behind them; [`Tails::keep`] or [`Tails::remove`] follows.
    pub fn take(&mut self, index: u32) -> Vec<u8> {
        let entry = std::mem::take(&mut self.entries[index as usize]);
        self.burst.release(entry.capacity());
        entry
    }

    /// Puts back what is left of a taken entry behind `used` bytes. `false`: no room, and the entry is empty.
    #[must_use]
    pub fn keep(&mut self, index: u32, whole: Vec<u8>, used: usize) -> bool {
        // Who sends a frame byte by byte does not make us copy it as often.
        let entry = if used == 0 { whole } else { whole[used..].to_vec() };
        if !self.burst.resize(HOLDER_BYTES, charge(&entry)) {
            return false;
        }
        self.entries[index as usize] = entry;
        true
    }

    /// Throws an entry away.
    pub fn remove(&mut self, index: u32) {
        let entry = self.entries.remove(index as usize);
        self.burst.release(charge(&entry));
        if self.entries.is_empty() && self.entries.capacity() > SPARE_ENTRIES_MAX {
            self.entries = Slab::new();
        }
    }

    /// Gives memory back that a burst has left behind.
    pub fn shrink(&mut self) {
        if self.entries.is_empty() {
            self.entries = Slab::new();
        }
    }
}

fn charge(entry: &Vec<u8>) -> usize {
    HOLDER_BYTES + entry.capacity()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_charged_and_what_goes_is_released() {
        let burst = Arc::new(Burst::new(16 * 1024, 0));
        let mut tails = Tails::new(burst.clone());
        let index = tails.insert(&[1; 100]).unwrap();
        assert_eq!(burst.clients_bytes(), HOLDER_BYTES + 100);
        let taken = tails.take(index);
        assert_eq!((taken.len(), burst.clients_bytes()), (100, HOLDER_BYTES));
        assert!(tails.keep(index, [taken, vec![2; 30]].concat(), 100));
        assert_eq!(burst.clients_bytes(), HOLDER_BYTES + 30);
        tails.remove(index);
        assert_eq!(burst.clients_bytes(), 0);
    }

    #[test]
    fn without_room_nothing_is_kept() {
        let burst = Arc::new(Burst::new(16 * 1024, 0));
        let mut tails = Tails::new(burst.clone());
        assert!(tails.insert(&[0; 1024]).is_none());
        let index = tails.insert(&[0; 500]).unwrap();
        let _ = tails.take(index);
        assert!(!tails.keep(index, vec![0; 1024], 0));
        // The connection is refused, and gives its entry back.
        tails.remove(index);
        assert_eq!(burst.clients_bytes(), 0);
    }

    #[test]
    fn half_frames_of_a_crowd_stay_within_the_bound() {
        let burst = Arc::new(Burst::new(1 << 20, 0));
        let mut tails = Tails::new(burst.clone());
        let kept: Vec<u32> = (0..15_000).filter_map(|_| tails.insert(&[0; 2048])).collect();
        assert!(kept.len() > 100 && burst.clients_bytes() <= 1 << 20);
        kept.into_iter().for_each(|index| tails.remove(index));
        assert_eq!((burst.clients_bytes(), tails.entries.capacity()), (0, 0));
    }
}
