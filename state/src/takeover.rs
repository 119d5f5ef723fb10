//! Whose marks stand still, and which buckets of theirs are this server's to push again. Pure.
//!
//! Every server sees the same marks and ranks by the same arithmetic, so all share the work without a word; while their
//! views differ, a bucket may be taken twice, which is harmless, and one that nobody took is taken at a later look, because
//! the mark stands there until it has been still for long.
//!
//! What stands still is the beat, not the mark: a server whose mark is held up by a gateway that does not answer goes on
//! beating, and sees to its pushes itself.
//!
//! Trap: "still" does not mean dead. A paused server goes on where it stopped, with what had been on its way. When its beat
//! moves again, all that was concluded is forgotten: should it stop once more, it is taken over anew, from the mark that it has
//! then. And before a mark is dropped, what came later than the first takeover is taken over too.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::store::{CHAT_BUCKETS, Mark, Marks};

/// One life of a state server: its name and a number drawn at its start.
pub type Life = (String, u64);

/// What has been seen of the other servers' marks.
#[derive(Debug)]
pub struct Judge {
    me: Life,
    lives: BTreeMap<Life, Seen>,
    looked: Option<Instant>,
}

#[derive(Debug)]
struct Seen {
    mark_us: u64,
    beat_us: u64,
    since: Instant,
    /// Looks at which the beat was still that.
    looks: u32,
    taken: Buckets,
    /// Up to where the first takeover went; 0: there was none.
    upto_us: u64,
    /// The takeover of what came later has begun.
    last: bool,
}

/// Buckets to be pushed again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Takeover {
    /// Whose they were.
    pub of: Life,
    /// What is newer than this, store time.
    pub from_us: u64,
    /// And not newer than this: then its beat had been standing still already.
    pub upto_us: u64,
    /// Which.
    pub buckets: Buckets,
}

/// What a look at the marks leads to.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// To be pushed again by this server.
    pub takeovers: Vec<Takeover>,
    /// Marks that have been still for so long that whoever could take over has.
    pub drop: Vec<Life>,
}

/// Own looks, and time, after which a beat counts as still. Servers beat every half second.
const STILL_LOOKS: u32 = 4;
const STILL: Duration = Duration::from_secs(2);

/// An earlier life of this very server is over for sure.
const OWN_STILL_LOOKS: u32 = 1;

/// Stillness after which a mark is dropped. Long, because whoever took its buckets over may die himself before he is through with
/// them, and then only this mark tells the others that they are to be pushed again.
const DROPPED_AFTER: Duration = Duration::from_secs(600);

/// And what came after the first takeover is taken over so long before.
const LAST_BEFORE: Duration = Duration::from_secs(60);

/// A look that comes later than this after the one before tells nothing about the others: we stood still ourselves.
const LOOK_GAP_MAX: Duration = Duration::from_secs(2);

/// Clocks of two store nodes may differ by so much.
const MARGIN_US: u64 = 100_000;

/// Marks that are looked at; others wait until some of these are dropped.
const LIVES_MAX: usize = 256;

impl Judge {
    /// For this server.
    pub fn new(me: Life) -> Self {
        Judge { me, lives: BTreeMap::new(), looked: None }
    }

    /// This server.
    pub fn me(&self) -> &Life {
        &self.me
    }

    /// The store did not answer: what was unchanged since may be so because nobody could write.
    pub fn blind(&mut self) {
        self.looked = None;
    }

    /// Looks at all marks. What it names is noted as taken.
    pub fn look(&mut self, now: Instant, seen: &Marks) -> Verdict {
        let gap = self.looked.is_none_or(|looked| now.saturating_duration_since(looked) > LOOK_GAP_MAX);
        self.looked = Some(now);
        self.note(now, gap, &seen.marks);
        let moving: Vec<Life> = self
            .lives
            .iter()
            .filter(|(life, seen)| !self.is_still(life, seen, now))
            .map(|(life, _)| life.clone())
            .chain([self.me.clone()])
            .collect();
        let mine = mine(&self.me, &moving);
        let mut verdict = Verdict::default();
        let still: Vec<Life> = self.lives.keys().filter(|life| !moving.contains(life)).cloned().collect();
        for life in still {
            let Some(of) = self.lives.get_mut(&life) else { continue };
            let still_for = now.saturating_duration_since(of.since);
            if !of.last && still_for >= DROPPED_AFTER - LAST_BEFORE {
                // What was still on its way to the store when the first takeover began.
                of.last = true;
                if of.upto_us > 0 {
                    of.mark_us = of.upto_us;
                    of.taken = Buckets::default();
                }
            }
            let buckets = mine.without(&of.taken);
            if !buckets.is_empty() {
                of.taken.join(&buckets);
                if of.upto_us == 0 {
                    of.upto_us = seen.now_us;
                }
                verdict.takeovers.push(Takeover {
                    of: life.clone(),
                    from_us: of.mark_us.saturating_sub(MARGIN_US),
                    upto_us: seen.now_us,
                    buckets,
                });
            }
            if still_for >= DROPPED_AFTER {
                verdict.drop.push(life);
            }
        }
        verdict
    }

    fn note(&mut self, now: Instant, gap: bool, marks: &[Mark]) {
        let others = marks.iter().filter(|mark| (&mark.server, mark.life) != (&self.me.0, self.me.1));
        let mut found: BTreeMap<Life, Seen> = BTreeMap::new();
        for mark in others {
            let life = (mark.server.clone(), mark.life);
            let known = self.lives.remove(&life).filter(|seen| seen.beat_us == mark.beat_us);
            let fresh = || Seen {
                mark_us: mark.pushed_us,
                beat_us: mark.beat_us,
                since: now,
                looks: 0,
                taken: Buckets::default(),
                upto_us: 0,
                last: false,
            };
            let seen = match known {
                Some(seen) if gap => Seen { since: now, looks: 0, ..seen },
                Some(seen) => Seen { looks: seen.looks.saturating_add(1), ..seen },
                None if found.len() < LIVES_MAX => fresh(),
                None => continue,
            };
            found.insert(life, seen);
        }
        self.lives = found;
    }

    fn is_still(&self, life: &Life, seen: &Seen, now: Instant) -> bool {
        if life.0 == self.me.0 {
            return seen.looks >= OWN_STILL_LOOKS;
        }
        seen.looks >= STILL_LOOKS && now.saturating_duration_since(seen.since) >= STILL
    }
}

/// The buckets in which this server ranks first among those whose beats move.
fn mine(me: &Life, moving: &[Life]) -> Buckets {
    let hash = |life: &Life| crpc::balance::id_hash(&format!("{}/{}", life.0, life.1));
    let ranked: Vec<(u64, &Life)> = moving.iter().map(|life| (hash(life), life)).collect();
    let mut buckets = Buckets::default();
    for bucket in 0..CHAT_BUCKETS {
        let first =
            ranked.iter().max_by_key(|(hash, life)| (crpc::balance::score(u64::from(bucket), *hash), *life));
        if first.is_some_and(|(_, life)| *life == me) {
            buckets.add(bucket);
        }
    }
    buckets
}

/// A set of buckets.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Buckets {
    bits: [u64; CHAT_BUCKETS as usize / 64],
}

impl Buckets {
    /// All of them.
    pub fn all() -> Self {
        Buckets { bits: [u64::MAX; CHAT_BUCKETS as usize / 64] }
    }

    /// Adds one.
    pub fn add(&mut self, bucket: u32) {
        self.bits[bucket as usize / 64 % self.bits.len()] |= 1 << (bucket % 64);
    }

    /// Whether it is one of them.
    pub fn has(&self, bucket: u32) -> bool {
        self.bits[bucket as usize / 64 % self.bits.len()] & (1 << (bucket % 64)) != 0
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.bits.iter().all(|bits| *bits == 0)
    }

    fn without(&self, others: &Buckets) -> Buckets {
        let mut left = self.clone();
        left.bits.iter_mut().zip(others.bits).for_each(|(bits, others)| *bits &= !others);
        left
    }

    fn join(&mut self, others: &Buckets) {
        self.bits.iter_mut().zip(others.bits).for_each(|(bits, others)| *bits |= others);
    }
}

#[cfg(test)]
mod tests;
