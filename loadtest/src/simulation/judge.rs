//! What must hold whatever happens, as devices and servers report it. Pure.
//!
//! Trap: only what a program outside could see is judged: what was submitted, answered, and confirmed in an application's own
//! store. Nothing is asked of the parts that are judged, but for what the store holds at the end.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use state::store::Stored;

/// (history, seq).
pub type At = (u64, u64);

/// See the head of this file.
#[derive(Default)]
pub struct Judge {
    /// Body → chat it was sent to.
    sent: BTreeMap<Bytes, String>,
    ids: BTreeMap<Id, Fate>,
    /// Bodies refused for ever.
    refused: BTreeSet<Bytes>,
    /// (chat, history, seq) → body, as anybody was shown it.
    shown: BTreeMap<(String, u64, u64), Bytes>,
    /// (chat, body) → place, as anybody was shown it.
    places: BTreeMap<(String, Bytes), At>,
    /// The highest seq that any device of a user has confirmed, per chat.
    confirmed: BTreeMap<(String, String), u64>,
    /// The first thing that must not be.
    pub violation: Option<String>,
    /// When everything healed; 0: not yet. Virtual microseconds, as all times here.
    pub healed_us: u64,
    /// Longest that a device waited for a message, counted from then.
    pub deaf_us: u64,
    /// Messages acknowledged.
    pub acked: u64,
    /// Messages shown, over all devices.
    pub deliveries: u64,
    /// Messages refused.
    pub refusals: u64,
    /// Messages of which nobody can tell any more.
    pub unknown: u64,
}

/// (user, chat, stream, n).
pub type Id = (String, String, u64, u64);

#[derive(Debug, Default)]
struct Fate {
    body: Bytes,
    ack: Option<At>,
    refused: bool,
}

/// What one application has in its own store: it outlives the device's program.
#[derive(Debug, Default, Clone)]
pub struct Shown {
    /// Per chat: history, where it began, and where it is.
    pub chats: BTreeMap<String, (u64, u64, u64)>,
    bodies: BTreeSet<Bytes>,
}

impl Judge {
    /// Something is wrong. Only the first is kept: the rest follows from it.
    pub fn wrong(&mut self, what: impl FnOnce() -> String) {
        if self.violation.is_none() {
            self.violation = Some(what());
        }
    }

    /// An application has submitted a message.
    pub fn submitted(&mut self, chat: &str, body: &Bytes) {
        self.sent.insert(body.clone(), chat.to_owned());
    }

    /// A frame with this id has left.
    pub fn left(&mut self, id: Id, body: &Bytes) {
        let fate = self.ids.entry(id.clone()).or_default();
        if fate.body.is_empty() {
            fate.body = body.clone();
        } else if fate.body != body {
            let was = fate.body.clone();
            self.wrong(|| format!("{id:?} was {was:?} and is now {body:?}"));
        }
    }

    /// A SendAck has arrived.
    pub fn acked(&mut self, id: Id, at: At) {
        let fate = self.ids.entry(id.clone()).or_default();
        let (before, refused) = (fate.ack.replace(at), fate.refused);
        match before {
            None => self.acked += 1,
            Some(before) if before == at => {}
            Some(before) => self.wrong(|| format!("{id:?} acknowledged as {before:?} and as {at:?}")),
        }
        if refused {
            self.wrong(|| format!("{id:?} was refused for ever and is acknowledged"));
        }
    }

    /// A final refusal has arrived.
    pub fn refused(&mut self, id: Id) {
        let fate = self.ids.entry(id.clone()).or_default();
        self.refusals += u64::from(!fate.refused);
        fate.refused = true;
        let (body, acked) = (fate.body.clone(), fate.ack);
        self.refused.insert(body.clone());
        if let Some(at) = acked {
            self.wrong(|| format!("{id:?} was acknowledged as {at:?} and is refused"));
        }
        if let Some(((chat, _), at)) = self.places.iter().find(|((_, shown), _)| *shown == body) {
            let (chat, at) = (chat.clone(), *at);
            self.wrong(|| format!("{body:?} was shown in {chat} at {at:?} and is refused"));
        }
    }

    /// A device begins with a chat: behind nothing that its user has not had.
    pub fn begins(&mut self, app: &mut Shown, user: &str, chat: &str, history: u64, seq: u64) {
        let had = self.confirmed.get(&(user.to_owned(), chat.to_owned())).copied().unwrap_or(0);
        if seq > had {
            self.wrong(|| format!("a device of {user} begins {chat} at {seq}, and {user} had {had}"));
        }
        app.chats.insert(chat.to_owned(), (history, seq, seq));
    }

    /// An application has put a message into its own store.
    pub fn shown(&mut self, app: &mut Shown, user: &str, chat: &str, at: At, body: &Bytes) {
        let (history, seq) = at;
        let Some((began, _, last)) = app.chats.get_mut(chat) else {
            return self.wrong(|| format!("{user} is shown {body:?} of {chat}, which has not begun"));
        };
        let key = (chat.to_owned(), history, seq);
        if *began == history && seq <= *last {
            // Handed out again because the cursor was lost; the application knows it by its place.
            if self.shown.get(&key) != Some(body) {
                self.wrong(|| format!("{user} is shown {body:?} at {key:?}, which was another message"));
            }
            return;
        }
        if *began != history || seq != *last + 1 {
            let last = *last;
            return self.wrong(|| format!("{user} is shown {seq} of {chat} behind {last}"));
        }
        *last = seq;
        self.deliveries += 1;
        let confirmed = self.confirmed.entry((user.to_owned(), chat.to_owned())).or_default();
        *confirmed = seq.max(*confirmed);
        if !app.bodies.insert(body.clone()) {
            self.wrong(|| format!("{user} is shown {body:?} a second time, at {key:?}"));
        }
        self.place(key, body);
    }

    /// A device was handed a message that it could have since then: it was stored, and the device was online.
    pub fn handed(&mut self, since_us: u64, now_us: u64) {
        if self.healed_us > 0 {
            let waited_us = now_us - since_us.max(self.healed_us).min(now_us);
            self.deaf_us = self.deaf_us.max(waited_us);
            if waited_us > DEAF_US_MAX {
                self.wrong(|| format!("a device was deaf for {} ms", waited_us / 1_000));
            }
        }
    }

    /// The end: what the store holds is what was acknowledged and shown.
    pub fn stored(&mut self, chats: &[(String, Vec<Stored>)]) {
        let stored: BTreeMap<&str, &Vec<Stored>> =
            chats.iter().map(|(name, messages)| (name.as_str(), messages)).collect();
        for (name, messages) in chats {
            for (message, seq) in messages.iter().zip(1..) {
                if message.seq != seq {
                    self.wrong(|| format!("{name} has {} where {seq} should be", message.seq));
                }
            }
        }
        let fates = std::mem::take(&mut self.ids);
        for ((user, chat, ..), fate) in &fates {
            let Some((_, seq)) = fate.ack else { continue };
            let found = stored.get(chat.as_str()).and_then(|messages| messages.get(seq as usize - 1));
            if found.is_none_or(|found| found.body != fate.body || found.sender != *user) {
                let body = &fate.body;
                self.wrong(|| {
                    format!("{body:?} of {user} was acknowledged as {seq} of {chat} and is not there")
                });
            }
        }
        self.ids = fates;
    }

    /// (history, seq) is one message, a message has one (history, seq), and somebody sent it.
    fn place(&mut self, key: (String, u64, u64), body: &Bytes) {
        let (chat, at) = (key.0.clone(), (key.1, key.2));
        if let Some(other) = self.shown.insert(key.clone(), body.clone()).filter(|other| *other != body) {
            self.wrong(|| format!("{key:?} is {other:?} to one and {body:?} to another"));
        }
        if let Some(other) = self.places.insert((chat.clone(), body.clone()), at).filter(|other| *other != at)
        {
            self.wrong(|| format!("{body:?} stands in {chat} at {other:?} and at {at:?}"));
        }
        if self.refused.contains(body) {
            self.wrong(|| format!("{body:?} was refused and is shown at {key:?}"));
        }
        match self.sent.get(body).cloned() {
            None => self.wrong(|| format!("nobody sent {body:?}, shown at {key:?}")),
            Some(to) if to != chat => {
                self.wrong(|| format!("{body:?} was sent to {to} and is shown at {key:?}"))
            }
            Some(_) => {}
        }
    }
}

/// Longest that anybody who is online may wait for a message that is stored, once everything has healed.
const DEAF_US_MAX: u64 = 5_000_000;
