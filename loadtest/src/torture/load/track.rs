//! Which deliveries are still owed while a load runs, so that it knows when it is quiet. Pure; under the load's lock.
//!
//! Trap: this is no checker. It forgets a message as soon as everybody has seen it.

use std::collections::HashMap;
use std::sync::Arc;

use super::super::audience::Audience;
use super::super::history::{Device, MessageId, To};

/// See the head of this file.
#[derive(Debug)]
pub(super) struct Track {
    audience: Audience,
    messages: HashMap<MessageId, Owed>,
    unanswered: HashMap<u32, u32>,
    owed: u64,
}

#[derive(Debug)]
struct Owed {
    acked: bool,
    /// Devices that have yet to see it.
    devices: Vec<u32>,
}

impl Track {
    pub fn new(devices: &[Device]) -> Track {
        let audience = Audience::new(devices);
        Track { audience, messages: HashMap::new(), unanswered: HashMap::new(), owed: 0 }
    }

    pub fn made(&mut self, chat: Arc<str>, members: Vec<u32>) {
        self.audience.add_group(chat, members);
    }

    pub fn sent(&mut self, id: MessageId, to: To) {
        self.messages.insert(id, Owed { acked: false, devices: self.audience.of(id.from, to) });
        *self.unanswered.entry(id.from).or_default() += 1;
    }

    pub fn answered(&mut self, id: MessageId, acked: bool) {
        if let Some(count) = self.unanswered.get_mut(&id.from) {
            *count = count.saturating_sub(1);
        }
        let Some(owed) = self.messages.get_mut(&id) else { return };
        if !acked || owed.devices.is_empty() {
            self.messages.remove(&id);
        } else if !std::mem::replace(&mut owed.acked, true) {
            self.owed += owed.devices.len() as u64;
        }
    }

    pub fn shown(&mut self, device: u32, id: MessageId) {
        let Some(owed) = self.messages.get_mut(&id) else { return };
        let Some(at) = owed.devices.iter().position(|one| *one == device) else { return };
        owed.devices.swap_remove(at);
        if owed.acked {
            self.owed -= 1;
            if owed.devices.is_empty() {
                self.messages.remove(&id);
            }
        }
    }

    /// Messages of a user without an answer.
    pub fn unanswered(&self, user: u32) -> u32 {
        self.unanswered.get(&user).copied().unwrap_or(0)
    }

    /// Acknowledged messages times devices that have yet to see them.
    pub fn owed(&self) -> u64 {
        self.owed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owed_from_the_acknowledgement_until_every_device_saw_it() {
        let device = |user: u32| Device { user, name: user.to_string(), device: "d".into(), away: false };
        let mut track = Track::new(&[device(0), device(1), device(1), device(2)]);
        let (one, two) = (MessageId { from: 0, n: 1 }, MessageId { from: 0, n: 2 });
        track.sent(one, To::User(1));
        track.sent(two, To::User(1));
        assert_eq!((track.owed(), track.unanswered(0)), (0, 2));
        track.shown(1, one);
        track.answered(one, true);
        assert_eq!((track.owed(), track.unanswered(0)), (2, 1));
        track.shown(1, one);
        track.shown(3, one);
        assert_eq!(track.owed(), 2, "seen twice, or by somebody else, is not seen by all");
        track.shown(0, one);
        track.shown(2, one);
        track.answered(two, false);
        assert_eq!((track.owed(), track.unanswered(0)), (0, 0));
    }
}
