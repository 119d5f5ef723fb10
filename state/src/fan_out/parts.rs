//! Whom a message goes to, gathered by where they are connected until enough of them wait. Pure.
//!
//! Trap: whoever is added leaves with the part that its gateway gets next, or, behind the last of them, in any case.

use std::collections::BTreeMap;

use super::PARTS_FROM_READERS;

/// Where a part goes: a gateway, and for many one of its workers, or each part would wake all of them for a few writes.
pub type Stop = (u32, u8);

/// All that wait.
#[derive(Default)]
pub struct Parts {
    waiting: BTreeMap<Stop, Part>,
}

/// What leaves together.
#[derive(Default)]
pub struct Part {
    /// Connections and users, by the message's place in the round.
    pub targets: Vec<Vec<(u64, u64)>>,
}

/// A part is of one worker, if that has so many.
const READERS_PER_PART: usize = 128;

impl Parts {
    /// This message, by its place in the round, goes to this connection and user.
    pub fn add(&mut self, stop: Stop, message: usize, connection: u64, user: u64) {
        let Part { targets } = self.waiting.entry(stop).or_default();
        if targets.len() <= message {
            targets.resize_with(message + 1, Vec::new);
        }
        targets[message].push((connection, user));
    }

    /// The largest part and its gateway, if there are enough readers in all of them that the next ones are read while it is on its way. Of a
    /// gateway with many workers those of several, or there would be hundreds of parts to wait for.
    pub fn next(&mut self, is_last: bool) -> Option<(u32, Part)> {
        let readers: usize = self.waiting.values().map(Part::readers).sum();
        if !is_last && readers < PARTS_FROM_READERS {
            return None;
        }
        let stop = *self.waiting.iter().max_by_key(|(_, part)| part.readers())?.0;
        let mut part = self.waiting.remove(&stop)?;
        while part.readers() < READERS_PER_PART {
            let theirs = self.waiting.range((stop.0, 0)..=(stop.0, u8::MAX));
            let largest = theirs.max_by_key(|(_, part)| part.readers()).map(|(stop, _)| *stop);
            let Some(other) = largest.and_then(|stop| self.waiting.remove(&stop)) else { break };
            part.append(other);
        }
        Some((stop.0, part))
    }
}

impl Part {
    /// Several messages for one reader leave in one write.
    fn readers(&self) -> usize {
        self.targets.iter().map(Vec::len).max().unwrap_or(0)
    }

    fn append(&mut self, mut other: Part) {
        self.targets.resize_with(self.targets.len().max(other.targets.len()), Vec::new);
        self.targets.iter_mut().zip(&mut other.targets).for_each(|(all, more)| all.append(more));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_many_workers_several_leave_together_and_everybody_once() {
        let mut parts = Parts::default();
        let (mut left, mut sizes) = (Vec::new(), Vec::new());
        let mut take = |parts: &mut Parts, is_last| {
            while let Some((gateway, part)) = parts.next(is_last) {
                assert!(
                    part.targets
                        .iter()
                        .flatten()
                        .all(|(connection, _)| *connection >> 8 == u64::from(gateway))
                );
                sizes.push(part.readers());
                left.extend(part.targets.into_iter().flatten());
            }
        };
        // Two gateways of 53 workers; every third message is the round's second.
        for user in 0..2_000_u64 {
            let (gateway, worker) = ((user % 2) as u32, (user / 2 % 53) as u8);
            let message = usize::from(user % 3 == 0);
            parts.add((gateway, worker), message, u64::from(gateway) << 8 | u64::from(worker), user);
            take(&mut parts, user == 1_999);
        }
        left.sort_unstable_by_key(|(_, user)| *user);
        assert!(left.iter().map(|(_, user)| *user).eq(0..2_000));
        let small = sizes.iter().filter(|size| **size < READERS_PER_PART).count();
        assert!(sizes.len() > 4 && small <= 2, "the last of each gateway may be small: {sizes:?}");
        assert!(parts.waiting.is_empty());
    }

    #[test]
    fn few_wait_for_more_unless_they_are_the_last() {
        let mut parts = Parts::default();
        parts.add((7, 0), 1, 9, 3);
        assert!(parts.next(false).is_none());
        let (gateway, part) = parts.next(true).expect("the last");
        assert_eq!((gateway, part.targets), (7, vec![vec![], vec![(9, 3)]]));
        assert!(parts.next(true).is_none());
    }
}
