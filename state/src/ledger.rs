//! Up to which store time everything that this server accepted is pushed. Shared by all tasks of the state server's
//! thread; pure but for the lock.
//!
//! A turn with messages holds a token from before its store call; each accepted message holds it on, and so do its pushes
//! until the gateways have placed them, or their stream is gone. A token stands for the store time that was known when it was
//! taken, so everything it is held for has a later one. The mark is the oldest token's time.
//!
//! Trap: a token that nobody drops holds the mark still, and once this server dies the others push everything since then
//! again. Whoever keeps one needs a bound for how long.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;

/// See the head of this file.
#[derive(Debug, Default)]
pub struct Ledger {
    epochs: Arc<Mutex<Epochs>>,
}

/// Holds the mark at the time when it was taken, until the last of its clones is dropped.
pub type Token = Arc<Held>;

/// What a [`Token`] shares.
#[derive(Debug)]
pub struct Held {
    epochs: Arc<Mutex<Epochs>>,
    number: u64,
    time_us: u64,
}

/// The times at which the store told its clock, oldest first, as far as something is held since then.
#[derive(Debug, Default)]
struct Epochs {
    /// Number of the epoch in front.
    first: u64,
    queue: VecDeque<Epoch>,
    /// What the store told last, and when.
    told: Option<(u64, Instant)>,
}

#[derive(Debug)]
struct Epoch {
    time_us: u64,
    held: usize,
}

/// Epochs kept: eight minutes of something being held. Beyond it new tokens count as older than they are, which is safe.
const EPOCHS_MAX: usize = 1_024;

impl Ledger {
    /// The store told its time, at `now` of this machine.
    pub fn told(&self, now_us: u64, now: Instant) {
        let mut epochs = self.epochs.lock();
        epochs.told = Some((now_us, now));
        // A store's clock that was put back: what is held will be stored with the new times.
        for epoch in &mut epochs.queue {
            epoch.time_us = epoch.time_us.min(now_us);
        }
        let full = epochs.queue.len() >= EPOCHS_MAX;
        match epochs.queue.back_mut() {
            Some(last) if last.held == 0 => last.time_us = now_us,
            Some(_) if full => {}
            _ => epochs.queue.push_back(Epoch { time_us: now_us, held: 0 }),
        }
    }

    /// A token for what comes now.
    pub fn hold(&self) -> Token {
        let mut epochs = self.epochs.lock();
        if epochs.queue.is_empty() {
            // Nothing is known of the store's time: as old as can be, but not the 0 of "not known".
            epochs.queue.push_back(Epoch { time_us: 1, held: 0 });
        }
        let number = epochs.first + epochs.queue.len() as u64 - 1;
        let mut time_us = 1;
        if let Some(last) = epochs.queue.back_mut() {
            last.held += 1;
            time_us = last.time_us;
        }
        Arc::new(Held { epochs: self.epochs.clone(), number, time_us })
    }

    /// The mark; 0: nothing is known yet, and nothing is held.
    pub fn mark_us(&self) -> u64 {
        let epochs = self.epochs.lock();
        let held = epochs.queue.iter().find(|epoch| epoch.held > 0);
        held.map_or(epochs.told.map_or(0, |(told_us, _)| told_us), |epoch| epoch.time_us)
    }

    /// Whether nothing is held.
    pub fn is_clear(&self) -> bool {
        self.epochs.lock().queue.iter().all(|epoch| epoch.held == 0)
    }

    /// About what time it is at the store; `None`: not known yet.
    pub fn store_now_us(&self, now: Instant) -> Option<u64> {
        let told = self.epochs.lock().told;
        told.map(|(told_us, at)| told_us + now.saturating_duration_since(at).as_micros() as u64)
    }
}

impl Held {
    /// Everything that this is held for has a later store time.
    pub fn time_us(&self) -> u64 {
        self.time_us
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut epochs = self.epochs.lock();
        let index = self.number.checked_sub(epochs.first).map(|index| index as usize);
        debug_assert!(index.is_some_and(|index| index < epochs.queue.len()));
        if let Some(epoch) = index.and_then(|index| epochs.queue.get_mut(index)) {
            epoch.held = epoch.held.saturating_sub(1);
        }
        while epochs.queue.len() > 1 && epochs.queue.front().is_some_and(|epoch| epoch.held == 0) {
            epochs.queue.pop_front();
            epochs.first += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_mark_is_the_oldest_token_or_what_the_store_told() {
        let (ledger, now) = (Ledger::default(), Instant::now());
        assert_eq!(ledger.mark_us(), 0);
        ledger.told(100, now);
        let early = ledger.hold();
        ledger.told(200, now);
        let late = ledger.hold();
        assert_eq!((ledger.mark_us(), early.time_us(), late.time_us()), (100, 100, 200));
        let pushes = early.clone();
        drop(early);
        assert_eq!(ledger.mark_us(), 100, "the pushes hold it on");
        drop(pushes);
        assert_eq!(ledger.mark_us(), 200);
        ledger.told(300, now);
        drop(late);
        assert_eq!((ledger.mark_us(), ledger.is_clear()), (300, true));
    }

    #[test]
    fn a_clock_put_back_takes_what_is_held_with_it() {
        let (ledger, now) = (Ledger::default(), Instant::now());
        ledger.told(1_000, now);
        let token = ledger.hold();
        ledger.told(400, now);
        assert_eq!(ledger.mark_us(), 400);
        drop(token);
        ledger.told(500, now);
        assert_eq!(ledger.mark_us(), 500);
    }

    #[test]
    fn before_the_store_has_told_its_time_a_token_is_older_than_everything() {
        let ledger = Ledger::default();
        let token = ledger.hold();
        ledger.told(100, Instant::now());
        assert_eq!(ledger.mark_us(), 1);
        drop(token);
        assert_eq!(ledger.mark_us(), 100);
    }

    proptest! {
        /// Against a list of what is held: the mark is never newer than anything held, and memory is bounded.
        #[test]
        fn the_mark_is_never_newer_than_what_is_held(steps in proptest::collection::vec((0u8..3, any::<prop::sample::Index>()), 1..3_000)) {
            let (ledger, now) = (Ledger::default(), Instant::now());
            let mut held: Vec<(u64, Token)> = Vec::new();
            let mut clock = 0;
            for (step, index) in steps {
                match step {
                    0 => {
                        clock += 10;
                        ledger.told(clock, now);
                    }
                    1 => held.push((clock, ledger.hold())),
                    _ if held.is_empty() => {}
                    _ => drop(held.swap_remove(index.index(held.len()))),
                }
                let oldest = held.iter().map(|(time, _)| *time).min();
                let mark = ledger.mark_us();
                prop_assert!(mark <= oldest.unwrap_or(clock).max(1), "{mark} {oldest:?} {clock}");
                prop_assert_eq!(ledger.is_clear(), held.is_empty());
                prop_assert!(ledger.epochs.lock().queue.len() <= EPOCHS_MAX);
                if held.is_empty() {
                    prop_assert_eq!(mark, clock);
                }
            }
        }
    }
}
