//! Who is to see a message: every device of whoever sent it, and of whoever it is addressed to. Pure.
//!
//! Trap: groups keep their members from the first message to the last. A load that changes them would need to know at which seq.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::history::{Device, To};

/// See the head of this file.
#[derive(Debug, Default)]
pub struct Audience {
    devices_of: BTreeMap<u32, Vec<u32>>,
    names: BTreeMap<u32, String>,
    groups: Vec<Group>,
}

#[derive(Debug)]
struct Group {
    chat: Arc<str>,
    members: Vec<u32>,
}

impl Audience {
    /// Of these devices, and no group yet.
    pub fn new(devices: &[Device]) -> Audience {
        let mut audience = Audience::default();
        for (number, device) in devices.iter().enumerate() {
            audience.devices_of.entry(device.user).or_default().push(number as u32);
            audience.names.insert(device.user, device.name.clone());
        }
        audience
    }

    /// One more group, of these users; its number is the next from 0.
    pub fn add_group(&mut self, chat: Arc<str>, members: Vec<u32>) {
        self.groups.push(Group { chat, members });
    }

    /// The devices that a message of this user is addressed to, in order.
    pub fn of(&self, from: u32, to: To) -> Vec<u32> {
        match to {
            To::User(to) => self.devices(&[from, to]),
            To::Group(group) => self.devices(&[&[from], self.members(group)].concat()),
        }
    }

    /// The devices of all members of a group, in order.
    pub fn of_group(&self, group: u32) -> Vec<u32> {
        self.devices(self.members(group))
    }

    fn members(&self, group: u32) -> &[u32] {
        self.groups.get(group as usize).map_or(&[], |group| &group.members)
    }

    fn devices(&self, users: &[u32]) -> Vec<u32> {
        let devices = users.iter().filter_map(|user| self.devices_of.get(user)).flatten().copied();
        devices.collect::<BTreeSet<u32>>().into_iter().collect()
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_devices_of_both_or_of_all_members() {
        let device = |user: u32, device: &str| Device {
            user,
            name: format!("u{user}"),
            device: device.into(),
            away: false,
        };
        let mut audience =
            Audience::new(&[device(0, "phone"), device(1, "phone"), device(2, "phone"), device(1, "desk")]);
        audience.add_group("#7".into(), vec![1, 2]);
        assert_eq!(audience.of(0, To::User(1)), [0, 1, 3]);
        assert_eq!(audience.of(0, To::User(0)), [0]);
        assert_eq!(audience.of(1, To::Group(0)), [1, 2, 3]);
        assert_eq!(audience.of_group(0), [1, 2, 3]);
        assert_eq!(audience.of(1, To::Group(1)), [1, 3], "a group that nobody made");
        assert!(audience.is_chat_of("u0:u1", 1, To::User(0)) && audience.is_chat_of("u0:u1", 0, To::User(1)));
        assert!(!audience.is_chat_of("u0:u1", 0, To::User(2)) && !audience.is_chat_of("#7", 0, To::User(1)));
        assert!(audience.is_chat_of("#7", 1, To::Group(0)) && !audience.is_chat_of("#8", 1, To::Group(0)));
    }
}
