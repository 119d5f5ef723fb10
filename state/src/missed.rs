//! What could not be handed to a gateway: since when pushes to it are missing, and the kicks it is owed. By incarnation,
//! until it opens a stream, or its stream has room again. Shared by all tasks of the state server's thread; pure but for the
//! lock.
//!
//! Trap: most gateways that pushes are missing for are dead and never come back, while routes still lead to them. So this
//! is bounded by count, those heard of longest ago go first, and a token is kept for the first push alone, and not for long.

use std::collections::BTreeMap;

use parking_lot::Mutex;
use proto::link::DownFrame;

use crate::ledger::Token;

/// See the head of this file.
#[derive(Debug, Default)]
pub struct Missed {
    owed: Mutex<BTreeMap<u32, Owed>>,
}

#[derive(Debug, Default)]
struct Owed {
    /// Store time of the oldest push that is missing; 0: none.
    since_us: u64,
    /// Holds the mark for the first ticks, while a gateway that is just coming would not be known to have missed anything if
    /// this server died.
    held: Vec<Token>,
    ticks: u32,
    quiet_ticks: u32,
    kicks: Vec<DownFrame>,
}

/// Incarnations, and kicks of each.
const INCARNATIONS_MAX: usize = 1_024;
const KICKS_MAX: usize = 256;

/// Ticks (half seconds) for which tokens are held.
const HELD_TICKS: u32 = 2;

/// Ticks after the last news for which anything is kept: an hour.
const KEPT_TICKS: u32 = 7_200;

impl Missed {
    /// Pushes of messages from this store time on have not reached this gateway.
    pub fn note(&self, incarnation: u32, since_us: u64, held: &[Token]) {
        let mut owed = self.owed.lock();
        let entry = entry(&mut owed, incarnation);
        if entry.since_us == 0 {
            entry.held.extend_from_slice(held);
            entry.ticks = 0;
            entry.since_us = since_us.max(1);
        }
        entry.since_us = entry.since_us.min(since_us.max(1));
    }

    /// A kick that could not be handed on.
    pub fn owe_kick(&self, incarnation: u32, kick: DownFrame) {
        let mut owed = self.owed.lock();
        let entry = entry(&mut owed, incarnation);
        if entry.kicks.len() < KICKS_MAX {
            entry.kicks.push(kick);
        }
    }

    /// The gateway can be reached: since when it misses pushes, and its kicks.
    pub fn take(&self, incarnation: u32) -> (Option<u64>, Vec<DownFrame>) {
        let owed = self.owed.lock().remove(&incarnation).unwrap_or_default();
        (Some(owed.since_us).filter(|since_us| *since_us > 0), owed.kicks)
    }

    /// Half a second has passed.
    pub fn tick(&self) {
        self.owed.lock().retain(|_, entry| {
            entry.ticks += 1;
            entry.quiet_ticks += 1;
            if entry.ticks >= HELD_TICKS {
                entry.held = Vec::new();
            }
            entry.quiet_ticks < KEPT_TICKS
        });
    }

    /// Whom something is kept for.
    pub fn incarnations(&self) -> Vec<u32> {
        self.owed.lock().keys().copied().collect()
    }
}

fn entry(owed: &mut BTreeMap<u32, Owed>, incarnation: u32) -> &mut Owed {
    if owed.len() >= INCARNATIONS_MAX && !owed.contains_key(&incarnation) {
        let stalest =
            owed.iter().max_by_key(|(_, entry)| entry.quiet_ticks).map(|(incarnation, _)| *incarnation);
        stalest.map(|incarnation| owed.remove(&incarnation));
    }
    let entry = owed.entry(incarnation).or_default();
    entry.quiet_ticks = 0;
    entry
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::Ledger;

    #[test]
    fn the_oldest_push_counts_and_the_kicks_are_kept_with_it() {
        let missed = Missed::default();
        missed.note(7, 500, &[]);
        missed.note(7, 300, &[]);
        missed.note(7, 900, &[]);
        missed.owe_kick(7, DownFrame { connection: 1, ..DownFrame::default() });
        missed.owe_kick(8, DownFrame::default());
        let (since, kicks) = missed.take(7);
        assert_eq!((since, kicks.len()), (Some(300), 1));
        assert_eq!((missed.take(7).0, missed.take(8).0), (None, None));
    }

    #[test]
    fn a_gateway_that_never_comes_does_not_hold_the_mark_for_long() {
        let (missed, ledger) = (Missed::default(), Ledger::default());
        missed.note(7, 500, &[ledger.hold()]);
        missed.tick();
        assert!(!ledger.is_clear());
        missed.note(7, 600, &[ledger.hold()]);
        missed.tick();
        assert!(ledger.is_clear(), "later pushes to the same gateway hold nothing");
        for _ in 0..KEPT_TICKS {
            missed.tick();
        }
        assert!(missed.incarnations().is_empty());
    }

    #[test]
    fn what_is_kept_is_bounded_and_the_stalest_goes_first() {
        let missed = Missed::default();
        missed.note(0, 1, &[]);
        missed.tick();
        for incarnation in 1..=INCARNATIONS_MAX as u32 {
            missed.note(incarnation, 1, &[]);
        }
        let kept = missed.incarnations();
        assert_eq!((kept.len(), kept[0]), (INCARNATIONS_MAX, 1));
        for _ in 0..2 * KICKS_MAX {
            missed.owe_kick(5, DownFrame::default());
        }
        assert_eq!(missed.take(5).1.len(), KICKS_MAX);
    }
}
