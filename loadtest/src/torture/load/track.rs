//! Which deliveries are still owed while a load runs, so that it knows when it is quiet. Pure; under the load's lock.
//!
//! Trap: this is no checker. Between two it forgets a message as soon as everybody has seen it; what stands in a group it keeps, because
//! a change in front of it may be learned later.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::super::audience::Audience;
use super::super::history::{Change, Device, Place, To};

/// See the head of this file.
#[derive(Debug)]
pub(super) struct Track {
    audience: Audience,
    standing: BTreeMap<Place, Standing>,
    unanswered: HashMap<u32, u32>,
    owed: u64,
}

/// What is known of one place.
#[derive(Debug, Default)]
struct Standing {
    /// Whoever sent it and to whom, once that is acknowledged; of a change of a group, once it is known.
    what: Option<What>,
    seen: BTreeSet<u32>,
    /// So many devices have yet to see it.
    missing: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Message { from: u32, to: To },
    Change,
}

impl Track {
    pub fn new(devices: &[Device]) -> Track {
        let audience = Audience::new(devices);
        Track { audience, standing: BTreeMap::new(), unanswered: HashMap::new(), owed: 0 }
    }

    pub fn made(&mut self, place: &Place, members: Vec<u32>) {
        self.audience.add_group(place, members);
        self.stands(place, What::Change);
    }

    /// Such a change stands there, as somebody was answered or shown.
    pub fn changed(&mut self, place: &Place, change: &Change) {
        if !self.audience.learn(place, change) {
            return;
        }
        self.stands(place, What::Change);
        // It decides who is owed what comes behind it, and what came long before is not owed any more.
        let in_chat = self.standing.range(Place { history: 0, seq: 0, ..place.clone() }..);
        let again: Vec<Place> = in_chat
            .take_while(|(at, _)| at.chat == place.chat)
            .filter(|(at, standing)| **at > *place || standing.missing > 0)
            .map(|(at, _)| at.clone())
            .collect();
        for at in again {
            self.count(&at);
        }
    }

    pub fn sent(&mut self, from: u32) {
        *self.unanswered.entry(from).or_default() += 1;
    }

    /// A message of this user to that one or that group was accepted, if `place` says where.
    pub fn answered(&mut self, from: u32, to: To, place: Option<&Place>) {
        if let Some(count) = self.unanswered.get_mut(&from) {
            *count = count.saturating_sub(1);
        }
        if let Some(place) = place {
            self.stands(place, What::Message { from, to });
        }
    }

    pub fn shown(&mut self, device: u32, place: &Place) {
        self.standing.entry(place.clone()).or_default().seen.insert(device);
        self.count(place);
    }

    /// Messages of a user without an answer.
    pub fn unanswered(&self, user: u32) -> u32 {
        self.unanswered.get(&user).copied().unwrap_or(0)
    }

    /// What stands, times the devices that have yet to see it.
    pub fn owed(&self) -> u64 {
        self.owed
    }

    fn stands(&mut self, place: &Place, what: What) {
        self.standing.entry(place.clone()).or_default().what = Some(what);
        self.count(place);
    }

    /// Counts anew who has yet to see what stands there.
    fn count(&mut self, place: &Place) {
        let Some(standing) = self.standing.get_mut(place) else { return };
        let owed = match standing.what {
            None => return,
            Some(What::Message { from, to }) => self.audience.owed(from, to, place),
            Some(What::Change) => self.audience.owed_at(place),
        };
        let missing = owed.iter().filter(|device| !standing.seen.contains(device)).count() as u64;
        self.owed = self.owed + missing - std::mem::replace(&mut standing.missing, missing);
        if missing == 0 && matches!(standing.what, Some(What::Message { to: To::User(_), .. })) {
            self.standing.remove(place);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn track() -> Track {
        let device = |user: u32| Device { user, name: user.to_string(), device: "d".into(), away: false };
        Track::new(&[device(0), device(1), device(1), device(2)])
    }

    fn at(chat: &str, seq: u64) -> Place {
        Place { chat: chat.into(), history: 5, seq }
    }

    #[test]
    fn owed_from_the_acknowledgement_until_every_device_saw_it() {
        let mut track = track();
        let one = at("0:1", 1);
        track.sent(0);
        track.sent(0);
        assert_eq!((track.owed(), track.unanswered(0)), (0, 2));
        track.shown(1, &one);
        track.answered(0, To::User(1), Some(&one));
        assert_eq!((track.owed(), track.unanswered(0)), (2, 1));
        track.shown(1, &one);
        track.shown(3, &one);
        assert_eq!(track.owed(), 2, "seen twice, or by somebody else, is not seen by all");
        track.shown(0, &one);
        track.shown(2, &one);
        track.answered(0, To::User(1), None);
        assert_eq!((track.owed(), track.unanswered(0)), (0, 0));
    }

    #[test]
    fn a_change_that_is_learned_late_counts_for_what_stands_behind_it() {
        let mut track = track();
        track.made(&at("#7", 1), vec![0, 1]);
        assert_eq!(track.owed(), 3, "that it was made is told to all");
        for device in 0..3 {
            track.shown(device, &at("#7", 1));
            track.shown(device, &at("#7", 3));
        }
        track.answered(0, To::Group(0), Some(&at("#7", 3)));
        track.answered(0, To::Group(0), Some(&at("#7", 4)));
        assert_eq!(track.owed(), 3);
        // Carol came at 2: her one device is owed that, 3 and 4, the others 2.
        let carol = Change { joins: vec![2], leaves: vec![] };
        track.changed(&at("#7", 2), &carol);
        track.changed(&at("#7", 2), &carol);
        assert_eq!(track.owed(), 4 + 1 + 4);
        // Bob went at 5 and is back at 6: what he was owed he is still owed. He goes again at 7, in front of what stands at 8.
        track.changed(&at("#7", 5), &Change { joins: vec![], leaves: vec![1] });
        track.changed(&at("#7", 6), &Change { joins: vec![1], leaves: vec![] });
        assert_eq!(track.owed(), (4 + 1 + 4) + 4 + 4);
        track.answered(0, To::Group(0), Some(&at("#7", 8)));
        assert_eq!(track.owed(), (4 + 1 + 4) + 4 + 4 + 4);
        track.changed(&at("#7", 7), &Change { joins: vec![], leaves: vec![1] });
        assert_eq!(track.owed(), (4 + 1 + 4) + 4 + 4 + 4 + 2);
    }
}
