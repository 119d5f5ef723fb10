//! Deadlines that are all equally long: a queue in which whoever came first is due first. Owned by one worker.
//!
//! Trap: entries are never taken out early, only ignored: a place whose connection has gone on or away finds nothing to
//! do. That is what makes a deadline cost 16 bytes and no search.

use std::collections::VecDeque;

use crate::id::Place;

/// One kind of deadline. Time is in milliseconds of the worker's clock.
#[derive(Debug)]
pub struct Expiry {
    after_ms: u64,
    queue: VecDeque<(u64, Place)>,
}

/// Entries that an empty queue may keep room for, until [`Expiry::shrink`].
const SPARE_MAX: usize = 64;

impl Expiry {
    /// Everything put in is due `after_ms` later; 0: never, and nothing is kept.
    pub fn new(after_ms: u64) -> Self {
        Expiry { after_ms, queue: VecDeque::new() }
    }

    /// Starts the deadline of `place`.
    pub fn start(&mut self, place: Place, now_ms: u64) {
        if self.after_ms > 0 {
            self.queue.push_back((now_ms + self.after_ms, place));
        }
    }

    /// The next place that is due, taken out; or one whose deadline `is_over` says is met already, which is dropped
    /// unseen so that the queue stays as short as what is really pending.
    pub fn pop_due(&mut self, now_ms: u64, mut is_over: impl FnMut(Place) -> bool) -> Option<Place> {
        while let Some((due_ms, place)) = self.queue.front().copied() {
            if is_over(place) {
                self.queue.pop_front();
                continue;
            }
            if due_ms > now_ms {
                return None;
            }
            self.queue.pop_front();
            return Some(place);
        }
        if self.queue.capacity() > SPARE_MAX {
            self.queue = VecDeque::new();
        }
        None
    }

    /// Gives memory back that a burst has left behind.
    pub fn shrink(&mut self) {
        if self.queue.len() < self.queue.capacity() / 4 {
            self.queue.shrink_to(2 * self.queue.len());
        }
    }

    /// When the first is due.
    pub fn next_ms(&self) -> Option<u64> {
        self.queue.front().map(|(due_ms, _)| *due_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(slot: u32) -> Place {
        Place { slot, generation: 0 }
    }

    #[test]
    fn due_in_order_and_met_ones_are_skipped() {
        let mut expiry = Expiry::new(100);
        for slot in 0..4 {
            expiry.start(place(slot), u64::from(slot) * 10);
        }
        assert_eq!(expiry.next_ms(), Some(100));
        assert_eq!(expiry.pop_due(99, |_| false), None);
        assert_eq!(expiry.pop_due(110, |at| at.slot == 0), Some(place(1)));
        assert_eq!(expiry.pop_due(115, |_| false), None);
        assert_eq!(expiry.pop_due(115, |_| true), None);
        assert_eq!(expiry.next_ms(), None);
    }

    #[test]
    fn zero_means_never() {
        let mut expiry = Expiry::new(0);
        expiry.start(place(1), 0);
        assert_eq!(expiry.pop_due(u64::MAX, |_| false), None);
    }
}
