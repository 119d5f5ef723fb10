//! Who sends what to whom, and when: a pure function of the options and the seed.
//!
//! Message `k` of the run is due `k / rate` after the start; senders take turns, and each takes turns among its partners.
//!
//! Trap: the schedule never waits. A message that leaves late was still due at its time, and its latency counts from
//! then: that is what corrects for coordinated omission.

use std::collections::{HashMap, HashSet};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::checker::Lane;

/// See the head of this file.
#[derive(Debug, Clone)]
pub struct ChatPlan {
    rate_per_s: f64,
    /// Messages in all.
    pub messages: u64,
    /// Connection of each sender.
    senders: Vec<u32>,
    /// Their partners, `partners_each` for each sender.
    partners: Vec<u32>,
    partners_each: u64,
}

/// One message of the schedule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Due {
    /// Microseconds after the start.
    pub after_us: u64,
    /// Who sends to whom.
    pub lane: Lane,
    /// Its number in that lane, from 1.
    pub counter: u64,
}

impl ChatPlan {
    /// `senders` is at least 1, and `connections` at least 2 and `senders`.
    pub fn new(connections: u32, senders: u32, rate_per_s: f64, seconds: f64, seed: u64) -> ChatPlan {
        let mut random = StdRng::seed_from_u64(seed);
        let partners_each = PARTNERS.min(connections - 1);
        // Spread over all connections, and so over all threads.
        let who = |sender: u32| (u64::from(sender) * u64::from(connections) / u64::from(senders)) as u32;
        let senders: Vec<u32> = (0..senders).map(who).collect();
        let mut partners = Vec::with_capacity(senders.len() * partners_each as usize);
        for sender in &senders {
            let mut mine = HashSet::new();
            while mine.len() < partners_each as usize {
                let partner = random.random_range(0..connections);
                if partner != *sender && mine.insert(partner) {
                    partners.push(partner);
                }
            }
        }
        let messages = (rate_per_s * seconds) as u64;
        ChatPlan { rate_per_s, messages, senders, partners, partners_each: u64::from(partners_each) }
    }

    /// Connections that send or are sent to.
    pub fn participants(&self) -> HashSet<u32> {
        self.senders.iter().chain(&self.partners).copied().collect()
    }

    /// Places in the order of senders whose connection is in this range.
    pub fn senders_in(&self, range: std::ops::Range<u32>) -> Vec<u32> {
        let places = 0..self.senders.len() as u32;
        places.filter(|place| range.contains(&self.senders[*place as usize])).collect()
    }

    /// What the sender at `place` sends in `round` (each sender sends once a round). None: the run is over by then.
    pub fn due(&self, place: u32, round: u64) -> Option<Due> {
        let number = round * self.senders.len() as u64 + u64::from(place);
        if number >= self.messages {
            return None;
        }
        let slot = u64::from(place) * self.partners_each + round % self.partners_each;
        Some(Due {
            after_us: (number as f64 / self.rate_per_s * 1e6) as u64,
            lane: Lane { from: self.senders[place as usize], to: self.partners[slot as usize] },
            counter: round / self.partners_each + 1,
        })
    }

    /// Messages of the chat that carries fewest, both directions together.
    pub fn messages_per_chat_min(&self) -> u64 {
        let mut chats: HashMap<(u32, u32), u64> = HashMap::new();
        let count = self.senders.len() as u64;
        for (place, sender) in self.senders.iter().enumerate() {
            let rounds = (self.messages + count - 1 - place as u64) / count;
            for slot in 0..self.partners_each {
                let partner = self.partners[(place as u64 * self.partners_each + slot) as usize];
                let here = (rounds + self.partners_each - 1 - slot) / self.partners_each;
                *chats.entry((*sender.min(&partner), *sender.max(&partner))).or_default() += here;
            }
        }
        chats.values().copied().min().unwrap_or(0)
    }
}

/// Partners of a sender.
const PARTNERS: u32 = 4;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_draws_the_same() {
        let plan = |seed| ChatPlan::new(1_000, 100, 500.0, 10.0, seed);
        assert_eq!(plan(1).partners, plan(1).partners);
        assert_ne!(plan(1).partners, plan(2).partners);
        assert_eq!(plan(1).senders[99], 990);
    }

    #[test]
    fn the_schedule_is_even_and_whole() {
        let plan = ChatPlan::new(50, 7, 1_000.0, 2.0, 3);
        let mut all: Vec<Due> = (0..7)
            .flat_map(|place| (0..).map_while(|round| plan.due(place, round)).collect::<Vec<_>>())
            .collect();
        all.sort_by_key(|due| due.after_us);
        assert_eq!(all.len(), 2_000);
        assert!(all.iter().enumerate().all(|(k, due)| due.after_us.abs_diff(k as u64 * 1_000) <= 1));
        let mut counters: HashMap<Lane, u64> = HashMap::new();
        let mut chats: HashMap<(u32, u32), u64> = HashMap::new();
        for due in &all {
            assert_ne!(due.lane.from, due.lane.to);
            let last = counters.entry(due.lane).or_default();
            assert_eq!(due.counter, *last + 1);
            *last += 1;
            *chats.entry((due.lane.from.min(due.lane.to), due.lane.from.max(due.lane.to))).or_default() += 1;
        }
        assert_eq!(plan.messages_per_chat_min(), *chats.values().min().unwrap());
    }

    #[test]
    fn two_connections_are_enough() {
        let plan = ChatPlan::new(2, 2, 100.0, 1.0, 0);
        assert_eq!(plan.due(0, 0).unwrap().lane, Lane { from: 0, to: 1 });
        assert_eq!(plan.messages_per_chat_min(), 100);
        assert_eq!(plan.participants().len(), 2);
    }
}
