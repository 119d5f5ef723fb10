//! What was promised against what came: lost, doubled, reordered. Pure sets; each engine thread fills its own, the main
//! thread merges them at the end.
//!
//! A lane is what one user sent to one other. Its messages carry counters 1, 2, 3, ... A message is **lost** when its
//! sender was told "accepted" and the receiver's application never got it, **doubled** when the application got it more
//! than once, **reordered** when it came behind a later one of its lane, by counter or by seq.
//!
//! Trap: this looks at what the application got, behind the client library. A push that comes twice over the wire is no
//! double, and a hole that was pulled is no loss.

use std::collections::HashMap;

/// Who sent to whom, by number of the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Lane {
    /// The sender.
    pub from: u32,
    /// The receiver.
    pub to: u32,
}

/// What a set of users knows, or all of them together.
#[derive(Debug, Default)]
pub struct Checker {
    acked: HashMap<Lane, Numbers>,
    delivered: HashMap<Lane, Delivered>,
    foreign: u64,
}

#[derive(Debug, Default)]
struct Delivered {
    numbers: Numbers,
    last_counter: u64,
    last_seq: u64,
    history: u64,
    doubled: u64,
    reordered: u64,
}

/// What came out.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// Messages accepted, by what their senders were told.
    pub acked: u64,
    /// Different messages that their receivers got.
    pub delivered: u64,
    /// Accepted and never delivered.
    pub lost: u64,
    /// Deliveries of what had been delivered before.
    pub doubled: u64,
    /// Deliveries behind a later message of the same lane.
    pub reordered: u64,
    /// Deliveries that no sender of this run can have caused.
    pub foreign: u64,
    /// Chats with an accepted message.
    pub chats: u64,
    /// Accepted messages of the chat that has fewest.
    pub messages_per_chat_min: u64,
}

impl Checker {
    /// A sender was told that its message is accepted.
    pub fn acked(&mut self, lane: Lane, counter: u64) {
        self.acked.entry(lane).or_default().insert(counter);
    }

    /// An application got a message. Whether for the first time.
    pub fn delivered(&mut self, lane: Lane, counter: u64, history: u64, seq: u64) -> bool {
        let seen = self.delivered.entry(lane).or_default();
        if seen.history != history {
            (seen.history, seen.last_seq) = (history, 0);
        }
        let first = seen.numbers.insert(counter);
        if !first {
            seen.doubled += 1;
        } else if counter < seen.last_counter || seq <= seen.last_seq {
            seen.reordered += 1;
        }
        seen.last_counter = seen.last_counter.max(counter);
        seen.last_seq = seen.last_seq.max(seq);
        first
    }

    /// An application got something that is not from this run.
    pub fn foreign(&mut self) {
        self.foreign += 1;
    }

    /// Adds what other users know. No lane's senders may be in both, nor its receivers.
    pub fn merge(&mut self, other: Checker) {
        self.acked.extend(other.acked);
        self.delivered.extend(other.delivered);
        self.foreign += other.foreign;
    }

    /// Compares.
    pub fn verdict(&self) -> Verdict {
        let mut chats: HashMap<(u32, u32), u64> = HashMap::new();
        let mut verdict = Verdict { foreign: self.foreign, ..Verdict::default() };
        for (lane, acked) in &self.acked {
            *chats.entry((lane.from.min(lane.to), lane.from.max(lane.to))).or_default() += acked.len();
            verdict.acked += acked.len();
            verdict.lost += match self.delivered.get(lane) {
                Some(delivered) => acked.missing_in(&delivered.numbers),
                None => acked.len(),
            };
        }
        for delivered in self.delivered.values() {
            verdict.delivered += delivered.numbers.len();
            verdict.doubled += delivered.doubled;
            verdict.reordered += delivered.reordered;
        }
        verdict.chats = chats.len() as u64;
        verdict.messages_per_chat_min = chats.values().copied().min().unwrap_or(0);
        verdict
    }
}

/// A set of small, dense numbers.
#[derive(Debug, Default, Clone)]
struct Numbers {
    words: Vec<u64>,
}

impl Numbers {
    /// Whether it is new.
    fn insert(&mut self, number: u64) -> bool {
        let (word, bit) = ((number / 64) as usize, 1 << (number % 64));
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        let new = self.words[word] & bit == 0;
        self.words[word] |= bit;
        new
    }

    fn len(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    fn missing_in(&self, other: &Numbers) -> u64 {
        let others = other.words.iter().copied().chain(std::iter::repeat(0));
        self.words.iter().zip(others).map(|(word, other)| u64::from((word & !other).count_ones())).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LANE: Lane = Lane { from: 1, to: 2 };

    /// Sends 1 to 30 along a lane and hands out what `deliver` makes of it, with seqs as they come.
    fn judged(deliver: impl FnOnce(Vec<u64>) -> Vec<u64>) -> Verdict {
        let mut checker = Checker::default();
        for counter in 1..=30 {
            checker.acked(LANE, counter);
        }
        for (place, counter) in deliver((1..=30).collect()).into_iter().enumerate() {
            checker.delivered(LANE, counter, 7, place as u64 + 1);
        }
        checker.verdict()
    }

    #[test]
    fn a_clean_run_is_clean() {
        let verdict = judged(|all| all);
        let clean =
            Verdict { acked: 30, delivered: 30, chats: 1, messages_per_chat_min: 30, ..Verdict::default() };
        assert_eq!(verdict, clean);
    }

    #[test]
    fn each_fault_is_found() {
        let without_the_fifth = judged(|mut all| {
            all.remove(4);
            all
        });
        assert_eq!(
            (without_the_fifth.lost, without_the_fifth.doubled, without_the_fifth.reordered),
            (1, 0, 0)
        );
        let the_last_twice = judged(|mut all| {
            all.push(30);
            all
        });
        assert_eq!((the_last_twice.lost, the_last_twice.doubled, the_last_twice.reordered), (0, 1, 0));
        let swapped = judged(|mut all| {
            all.swap(3, 4);
            all
        });
        assert_eq!((swapped.lost, swapped.doubled, swapped.reordered), (0, 0, 1));
        let nothing = judged(|_| Vec::new());
        assert_eq!((nothing.lost, nothing.delivered), (30, 0));
    }

    #[test]
    fn a_seq_that_falls_is_found() {
        let mut checker = Checker::default();
        checker.delivered(LANE, 1, 7, 5);
        checker.delivered(LANE, 2, 7, 5);
        assert_eq!(checker.verdict().reordered, 1);
        // Another history counts from its own start.
        checker.delivered(LANE, 3, 8, 1);
        assert_eq!(checker.verdict().reordered, 1);
    }

    #[test]
    fn both_directions_are_one_chat_and_what_was_never_acknowledged_may_come() {
        let mut checker = Checker::default();
        checker.acked(LANE, 1);
        checker.acked(Lane { from: 2, to: 1 }, 1);
        checker.acked(Lane { from: 1, to: 3 }, 1);
        checker.delivered(LANE, 1, 7, 1);
        checker.delivered(LANE, 2, 7, 2);
        let verdict = checker.verdict();
        assert_eq!((verdict.chats, verdict.messages_per_chat_min, verdict.lost), (2, 1, 2));
        assert_eq!((verdict.acked, verdict.delivered, verdict.doubled), (3, 2, 0));
    }

    proptest! {
        /// Against the plainest possible checker, on sets and lists.
        #[test]
        fn it_agrees_with_a_naive_one(
            acked in proptest::collection::hash_set((0u32..3, 0u32..3, 1u64..200), 0..100),
            delivered in proptest::collection::vec((0u32..3, 0u32..3, 1u64..200), 0..150),
            halves in any::<bool>(),
        ) {
            use std::collections::HashSet;
            let (mut senders, mut receivers) = (Checker::default(), Checker::default());
            for (from, to, counter) in &acked {
                senders.acked(Lane { from: *from, to: *to }, *counter);
            }
            let (mut seen, mut doubled, mut reordered) = (HashSet::new(), 0, 0);
            for (place, (from, to, counter)) in delivered.iter().enumerate() {
                let lane = Lane { from: *from, to: *to };
                let one = if halves { &mut receivers } else { &mut senders };
                let first = one.delivered(lane, *counter, 7, place as u64 + 1);
                prop_assert_eq!(first, !seen.contains(&(*from, *to, *counter)));
                if !first {
                    doubled += 1;
                } else if seen.iter().any(|(f, t, c)| (f, t) == (from, to) && c > counter) {
                    reordered += 1;
                }
                seen.insert((*from, *to, *counter));
            }
            senders.merge(receivers);
            let verdict = senders.verdict();
            prop_assert_eq!(verdict.lost, acked.difference(&seen).count() as u64);
            prop_assert_eq!(verdict.doubled, doubled);
            prop_assert_eq!(verdict.reordered, reordered);
            prop_assert_eq!(verdict.delivered, seen.len() as u64);
            prop_assert_eq!(verdict.acked, acked.len() as u64);
        }
    }
}
