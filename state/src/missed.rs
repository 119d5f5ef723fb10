//! What could not be handed to a gateway: since when pushes to it are missing, and the kicks it is owed. By incarnation,
//! until it opens a stream, or its stream has room again, or another state server has taken the pushes on (`relay.rs`). Shared by all tasks
//! of the state server's thread; pure but for the lock.
//!
//! Trap: most gateways that pushes are missing for are dead and never come back, while routes still lead to them. So this
//! is bounded by count, those heard of longest ago go first, a token is kept for the first push alone, and not for long, and others are
//! asked less and less often.

use std::collections::{BTreeMap, BTreeSet};

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
    /// The same of those that others are being asked to push; 0: they are not.
    asked_us: u64,
    /// Ticks until others are asked, and how often they were in vain.
    ask_in: u32,
    asks: u32,
    /// What held the mark for these.
    asked_held: Vec<Token>,
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

/// Ticks (half seconds) for which tokens are held: until others were asked and have had time to answer.
const HELD_TICKS: u32 = 6;

/// Ticks before others are asked: a gateway that comes in that time needs nobody else. Doubled each time in vain, up to a minute.
const ASK_TICKS: u32 = 2;
const ASK_TICKS_MAX: u32 = 120;

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
            if entry.asks == 0 {
                entry.ask_in = ASK_TICKS;
            }
        }
        entry.since_us = entry.since_us.min(since_us.max(1));
    }

    /// What others are to be asked for now: gateways that are not to be reached from here, and since when they miss pushes. To be
    /// followed by [`Missed::asked`].
    pub fn ask_for(&self, is_reached: impl Fn(u32) -> bool) -> BTreeMap<u32, u64> {
        let mut all = BTreeMap::new();
        for (incarnation, entry) in self.owed.lock().iter_mut() {
            if entry.since_us > 0 && entry.ask_in == 0 && !is_reached(*incarnation) {
                entry.asked_us = oldest(entry.asked_us, std::mem::take(&mut entry.since_us));
                entry.asked_held.append(&mut entry.held);
                all.insert(*incarnation, entry.asked_us);
            }
        }
        all
    }

    /// They were asked for these, and see to some of them.
    pub fn asked<'a>(&self, of: impl IntoIterator<Item = &'a u32>, taken: &BTreeSet<u32>) {
        let mut owed = self.owed.lock();
        for incarnation in of {
            // A gateway that has come meanwhile was told of all of it.
            let Some(entry) = owed.get_mut(incarnation) else { continue };
            let asked_us = std::mem::take(&mut entry.asked_us);
            let mut asked_held = std::mem::take(&mut entry.asked_held);
            if taken.contains(incarnation) {
                (entry.asks, entry.ask_in) = (0, ASK_TICKS);
            } else {
                entry.held.append(&mut asked_held);
                entry.since_us = oldest(entry.since_us, asked_us);
                entry.asks = (entry.asks + 1).min(ASK_TICKS_MAX.ilog2());
                entry.ask_in = (ASK_TICKS << entry.asks).min(ASK_TICKS_MAX);
            }
        }
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
        let since_us = oldest(owed.since_us, owed.asked_us);
        (Some(since_us).filter(|since_us| *since_us > 0), owed.kicks)
    }

    /// Half a second has passed.
    pub fn tick(&self) {
        self.owed.lock().retain(|_, entry| {
            entry.ticks += 1;
            entry.quiet_ticks += 1;
            entry.ask_in = entry.ask_in.saturating_sub(1);
            if entry.ticks >= HELD_TICKS {
                (entry.held, entry.asked_held) = Default::default();
            }
            entry.quiet_ticks < KEPT_TICKS
        });
    }

    /// Whom something is kept for.
    pub fn incarnations(&self) -> Vec<u32> {
        self.owed.lock().keys().copied().collect()
    }
}

/// Of two store times of which 0 is none.
fn oldest(one_us: u64, other_us: u64) -> u64 {
    if one_us == 0 || other_us == 0 { one_us.max(other_us) } else { one_us.min(other_us) }
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
        for _ in 1..HELD_TICKS {
            missed.tick();
        }
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
    fn others_are_asked_for_what_is_not_to_be_reached_from_here() {
        let (missed, ledger) = (Missed::default(), Ledger::default());
        let nobody = BTreeSet::new();
        missed.note(7, 500, &[ledger.hold()]);
        missed.note(8, 500, &[]);
        assert!(missed.ask_for(|_| false).is_empty(), "it may be just coming");
        (0..ASK_TICKS).for_each(|_| missed.tick());
        let asked = missed.ask_for(|incarnation| incarnation == 8);
        assert_eq!(asked, BTreeMap::from([(7, 500)]));
        missed.note(7, 900, &[ledger.hold()]);
        missed.asked(asked.keys(), &nobody);
        assert!(missed.ask_for(|_| false).keys().eq(&[8]), "not at once again");
        missed.asked(&[8], &BTreeSet::from([8]));
        for _ in 0..2 * ASK_TICKS {
            missed.tick();
        }
        let asked = missed.ask_for(|_| false);
        assert_eq!(asked, BTreeMap::from([(7, 500)]), "all of it, and nothing of what was taken");
        missed.note(7, 1_000, &[]);
        missed.asked(asked.keys(), &BTreeSet::from([7]));
        assert_eq!(missed.take(7).0, Some(1_000), "what came since is still missing");
    }

    #[test]
    fn what_was_taken_on_holds_the_mark_no_more() {
        let (missed, ledger) = (Missed::default(), Ledger::default());
        missed.note(7, 500, &[ledger.hold()]);
        (0..ASK_TICKS).for_each(|_| missed.tick());
        let asked = missed.ask_for(|_| false);
        assert!(!ledger.is_clear());
        ledger.told(1_000, std::time::Instant::now());
        let later = ledger.hold();
        let later_us = later.time_us();
        missed.note(7, 900, &[later]);
        missed.asked(asked.keys(), &BTreeSet::from([7]));
        assert_eq!(ledger.mark_us(), later_us, "what came meanwhile holds it");
        assert_eq!(missed.take(7).0, Some(900));
        assert!(ledger.is_clear());
    }

    #[test]
    fn others_are_asked_in_vain_less_and_less_often() {
        let missed = Missed::default();
        missed.note(7, 500, &[]);
        let mut asks = 0;
        for _ in 0..KEPT_TICKS - 1 {
            missed.tick();
            let asked = missed.ask_for(|_| false);
            asks += asked.len();
            missed.asked(asked.keys(), &BTreeSet::new());
        }
        assert!((60..80).contains(&asks), "{asks} in an hour");
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
