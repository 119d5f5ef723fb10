//! Who is to see what: every device of whoever sent a message and of whoever it is addressed to. Pure.
//!
//! The members of a group come and go by messages in its own order, so who sees a seq is known when every change up to it is.
//! A member sees from the change that brought it in to the one that took it out, both included. Whoever comes back is still owed the stays
//! before; nobody has more of them than servers remember.
//!
//! Trap: changes are learned out of order, from whoever asked for them and from whoever is shown them. What was true of a seq may
//! change with the next one that is learned.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::Arc;

use super::history::{Change, Device, Place, To};

/// See the head of this file.
#[derive(Debug, Default)]
pub struct Audience {
    /// By device.
    user_of: Vec<u32>,
    names: BTreeMap<u32, String>,
    groups: Vec<Group>,
}

#[derive(Debug)]
struct Group {
    chat: Arc<str>,
    /// The seqs of the changes count in this one. Where it is lost, groups have to keep their members: under any other, whoever was ever in
    /// is in.
    history: u64,
    changes: BTreeMap<u64, Change>,
}

impl Audience {
    /// Of these devices, and no group yet.
    pub fn new(devices: &[Device]) -> Audience {
        Audience {
            user_of: devices.iter().map(|device| device.user).collect(),
            names: devices.iter().map(|device| (device.user, device.name.clone())).collect(),
            groups: Vec::new(),
        }
    }

    /// One more group, made there by a message that brought these users in; its number is the next from 0.
    pub fn add_group(&mut self, made: &Place, members: Vec<u32>) {
        let mut group = Group { chat: made.chat.clone(), history: made.history, changes: BTreeMap::new() };
        group.changes.insert(made.seq, Change { joins: members, leaves: Vec::new() });
        self.groups.push(group);
    }

    /// Such a change stands there. Whether that was news.
    pub fn learn(&mut self, place: &Place, change: &Change) -> bool {
        let group = self.groups.iter_mut().find(|group| group.chat == place.chat);
        match group {
            Some(group) if group.history == place.history && !group.changes.contains_key(&place.seq) => {
                group.changes.insert(place.seq, change.clone());
                true
            }
            _ => false,
        }
    }

    /// The change that stands there.
    pub fn change_at(&self, place: &Place) -> Option<&Change> {
        let group = self.group_of(place)?;
        if group.history == place.history { group.changes.get(&place.seq) } else { None }
    }

    /// The devices that a message is owed to, in order: whoever sent it, to whom, and where it stands.
    pub fn owed(&self, from: u32, to: To, place: &Place) -> Vec<u32> {
        match to {
            To::User(to) => self.devices(|user| user == from || user == to),
            To::Group(_) => self.owed_at(place),
        }
    }

    /// The devices that what stands there is owed to, in order, if it is in a group.
    pub fn owed_at(&self, place: &Place) -> Vec<u32> {
        self.group_of(place).map_or_else(Vec::new, |group| self.devices(|user| group.sees(user, place)))
    }

    /// Whether this device may be shown such a message there.
    pub fn may_see(&self, device: u32, from: u32, to: To, place: &Place) -> bool {
        let Some(user) = self.user_of.get(device as usize).copied() else { return false };
        match to {
            To::User(to) => user == from || user == to,
            To::Group(_) => self.sees(user, place),
        }
    }

    /// Whether this device may be shown what stands there, if it is in a group.
    pub fn sees_at(&self, device: u32, place: &Place) -> bool {
        self.user_of.get(device as usize).is_some_and(|user| self.sees(*user, place))
    }

    /// Whether this user is in the group when what stands there is stored, or comes or goes by it.
    pub fn sees(&self, user: u32, place: &Place) -> bool {
        self.group_of(place).is_some_and(|group| group.sees(user, place))
    }

    /// What this device is to be shown next in a group, behind that seq, on its way to this place. `None`: whatever comes next.
    pub fn next(&self, device: u32, behind: u64, place: &Place) -> Option<u64> {
        let user = self.user_of.get(device as usize).copied();
        let (user, group) = user.zip(self.group_of(place))?;
        group.next(user, behind, place)
    }

    /// Whether this chat is the one that such a message belongs in.
    pub fn is_chat_of(&self, chat: &str, from: u32, to: To) -> bool {
        match to {
            To::Group(group) => self.groups.get(group as usize).is_some_and(|group| &*group.chat == chat),
            To::User(to) => chat.split_once(':').is_some_and(|(one, other)| {
                let is_named = |user, name| self.names.get(&user).is_some_and(|its| its == name);
                is_named(from, one) && is_named(to, other) || is_named(to, one) && is_named(from, other)
            }),
        }
    }

    fn group_of(&self, place: &Place) -> Option<&Group> {
        self.groups.iter().find(|group| group.chat == place.chat)
    }

    fn devices(&self, is_of: impl Fn(u32) -> bool) -> Vec<u32> {
        let devices = self.user_of.iter().enumerate().filter(|(_, user)| is_of(**user));
        devices.map(|(device, _)| device as u32).collect()
    }
}

impl Group {
    /// From the seq that brings a user in to the one that takes it out, for each time that it is in.
    fn stays(&self, user: u32) -> Vec<RangeInclusive<u64>> {
        let (mut stays, mut joined) = (Vec::new(), None);
        for (seq, change) in &self.changes {
            if change.joins.contains(&user) {
                joined.get_or_insert(*seq);
            }
            if change.leaves.contains(&user) {
                stays.extend(joined.take().map(|joined| joined..=*seq));
            }
        }
        stays.extend(joined.map(|joined| joined..=u64::MAX));
        stays
    }

    fn sees(&self, user: u32, place: &Place) -> bool {
        let stays = self.stays(user);
        if place.history == self.history {
            stays.iter().any(|stay| stay.contains(&place.seq))
        } else {
            !stays.is_empty()
        }
    }

    /// The first seq behind that one that the user sees, at most that of the place.
    fn next(&self, user: u32, behind: u64, place: &Place) -> Option<u64> {
        if place.history != self.history {
            return None;
        }
        let stay = self.stays(user).into_iter().find(|stay| *stay.end() > behind)?;
        Some((*stay.start()).max(behind + 1).min(place.seq))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn audience() -> Audience {
        let device = |user: u32, device: &str| Device {
            user,
            name: format!("u{user}"),
            device: device.into(),
            away: false,
        };
        Audience::new(&[device(0, "phone"), device(1, "phone"), device(2, "phone"), device(1, "desk")])
    }

    fn at(seq: u64) -> Place {
        Place { chat: "#7".into(), history: 5, seq }
    }

    fn change(joins: &[u32], leaves: &[u32]) -> Change {
        Change { joins: joins.to_vec(), leaves: leaves.to_vec() }
    }

    #[test]
    fn the_devices_of_both_or_of_all_members() {
        let mut audience = audience();
        audience.add_group(&at(1), vec![1, 2]);
        assert_eq!(audience.owed(0, To::User(1), &at(1)), [0, 1, 3]);
        assert_eq!(audience.owed(0, To::User(0), &at(1)), [0]);
        assert_eq!(audience.owed(1, To::Group(0), &at(2)), [1, 2, 3]);
        assert_eq!(audience.owed_at(&at(1)), [1, 2, 3]);
        let nowhere = Place { chat: "#8".into(), ..at(2) };
        assert!(audience.owed(1, To::Group(1), &nowhere).is_empty(), "a group that nobody made");
        let anew = Place { history: 6, ..at(1) };
        assert_eq!(
            audience.owed(1, To::Group(0), &anew),
            [1, 2, 3],
            "a history that is lost keeps its members"
        );
        assert!(audience.is_chat_of("u0:u1", 1, To::User(0)) && audience.is_chat_of("u0:u1", 0, To::User(1)));
        assert!(!audience.is_chat_of("u0:u1", 0, To::User(2)) && !audience.is_chat_of("#7", 0, To::User(1)));
        assert!(audience.is_chat_of("#7", 1, To::Group(0)) && !audience.is_chat_of("#8", 1, To::Group(0)));
    }

    #[test]
    fn whoever_comes_and_goes_sees_what_is_between() {
        let mut audience = audience();
        audience.add_group(&at(1), vec![0, 1, 2]);
        // Learned out of order: bob goes at 4 and is back at 7, carol goes at 6.
        assert!(audience.learn(&at(7), &change(&[1], &[])));
        assert!(audience.learn(&at(4), &change(&[], &[1])) && audience.learn(&at(6), &change(&[], &[2])));
        assert!(!audience.learn(&at(4), &change(&[2], &[])), "a place is given once");
        assert_eq!(audience.change_at(&at(4)), Some(&change(&[], &[1])));
        let sees = |seq| {
            (0..4).filter(|device| audience.may_see(*device, 0, To::Group(0), &at(seq))).collect::<Vec<_>>()
        };
        assert_eq!((sees(3), sees(4)), (vec![0, 1, 2, 3], vec![0, 1, 2, 3]));
        assert_eq!((sees(5), sees(6), sees(7)), (vec![0, 2], vec![0, 2], vec![0, 1, 3]));
        // Also of a stay that is over.
        assert_eq!((audience.owed_at(&at(3)), audience.owed_at(&at(5))), (vec![0, 1, 2, 3], vec![0, 2]));
        assert_eq!((audience.owed_at(&at(6)), audience.owed_at(&at(8))), (vec![0, 2], vec![0, 1, 3]));
        let next = |behind, seq| audience.next(3, behind, &at(seq));
        assert_eq!(
            (next(2, 4), next(2, 7), next(4, 7), next(4, 9), next(8, 9)),
            (Some(3), Some(3), Some(7), Some(7), Some(9))
        );
        assert!(!audience.sees(2, &at(8)) && audience.sees(2, &at(2)));
    }
}
