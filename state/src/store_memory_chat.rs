//! A chat of the store in memory: its messages, and the ids that it remembers. Pure.

use std::collections::BTreeMap;

use proto::wire::Code;

use crate::group::{self, Act, Effect, Group, Member, Stay};
use crate::store::{
    Append, Appended, MessageId, PULL_BYTES_MAX, Roster, Stored, body_digest, message_crc, peer,
};
use crate::store_memory::{Plants, Terms};

#[derive(Debug, Clone, Default)]
pub(crate) struct Chat {
    pub seq: u64,
    pub time_us: u64,
    pub messages: BTreeMap<u64, Kept>,
    ids: BTreeMap<(String, u64), Ids>,
    /// By sender and name.
    named: BTreeMap<(String, String), Named>,
    /// By user.
    pub cursors: BTreeMap<String, Cursors>,
    /// By user: up to where the chat was another's of that name.
    since: BTreeMap<String, u64>,
    /// Earlier stays of those who came back.
    pub past: BTreeMap<String, Vec<Stay>>,
    pub group: Group,
    pub members: BTreeMap<String, Member>,
}

/// How far a user has a chat.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Cursors {
    pub delivered: u64,
    pub read: u64,
}

#[derive(Debug, Clone)]
pub(crate) struct Kept {
    pub crc: u32,
    pub message: Stored,
}

/// Of one stream: the answers to the last ids.
#[derive(Debug, Clone, Default)]
struct Ids {
    watermark: u64,
    answers: BTreeMap<u64, Appended>,
}

/// What is remembered of a name.
#[derive(Debug, Clone)]
struct Named {
    digest: [u8; 16],
    answer: Appended,
    until_us: u64,
}

impl Chat {
    /// The answer to an id that has one, or is not the next.
    pub fn known(&mut self, append: &Append, plants: Plants, now_us: u64) -> Option<Appended> {
        let again = |answer: Appended| match answer {
            Appended::Stored { seq, time_us, history, version, .. } => {
                Appended::Stored { seq, time_us, history, version, again: true }
            }
            answer => answer,
        };
        match &append.id {
            MessageId::Numbered { stream, n } => {
                let ids = self.ids.entry((append.sender.clone(), *stream)).or_default();
                if *n <= ids.watermark && !plants.dedupe_off {
                    return Some(ids.answers.get(n).cloned().map_or(Appended::TooOld, again));
                }
                (*n > ids.watermark + 1).then_some(Appended::Expected(ids.watermark + 1))
            }
            MessageId::Named(name) => {
                self.named.retain(|_, named| named.until_us > now_us);
                let since = self.since_of(&append.sender);
                let is_theirs =
                    |named: &&Named| matches!(named.answer, Appended::Stored { seq, .. } if seq > since);
                let known = self.named.get(&(append.sender.clone(), name.clone())).filter(is_theirs);
                known.filter(|_| !plants.dedupe_off).map(|known| {
                    if known.digest == body_digest(&append.body) {
                        again(known.answer.clone())
                    } else {
                        Appended::Conflict
                    }
                })
            }
            MessageId::Unnamed => None,
        }
    }

    pub fn remember(&mut self, append: &Append, answer: &Appended, until_us: u64) {
        let sender = append.sender.clone();
        match &append.id {
            MessageId::Numbered { stream, n } => {
                self.ids.entry((sender, *stream)).or_default().remember(*n, answer.clone());
            }
            MessageId::Named(name) => {
                let named = Named { digest: body_digest(&append.body), answer: answer.clone(), until_us };
                self.named.insert((sender, name.clone()), named);
            }
            MessageId::Unnamed => {}
        }
    }

    /// Whether the sender may say this, and what it brings about in a group.
    pub fn decide(&self, append: &Append) -> Result<Option<Effect>, Code> {
        let effect = if append.chat.starts_with('#') {
            let find = |user: &str| Ok::<_, std::convert::Infallible>(self.members.get(user).copied());
            let Ok(decided) = group::decide(&append.act, &append.sender, &self.group, self.seq, find);
            decided?
        } else {
            None
        };
        if let Act::Refer(seq) = append.act {
            let meant = self.messages.get(&seq).filter(|_| seq > self.since_of(&append.sender));
            group::may_edit(meant.map(|kept| &kept.message), &append.sender)?;
        }
        Ok(effect)
    }

    /// Everybody in it, with how far they have it if that is asked for.
    pub fn roster(&self, cursors: bool) -> Roster {
        let of = |user| self.cursors.get(user).map_or((0, 0), |at| (at.delivered, at.read));
        Roster {
            group: self.group.clone(),
            members: self.members.iter().map(|(user, row)| (user.clone(), *row)).collect(),
            cursors: if cursors { self.members.keys().map(of).collect() } else { Vec::new() },
        }
    }

    /// Up to here the chat was another's, who had this name.
    pub fn since_of(&self, user: &str) -> u64 {
        self.since.get(user).copied().unwrap_or(0)
    }

    /// What is here so far is not the user's any more.
    pub fn vacate(&mut self, name: &str, user: &str) {
        self.cursors.remove(user);
        self.past.remove(user);
        self.since.insert(user.to_owned(), self.seq);
        if !name.starts_with('#') {
            let nobodys = self.since_of(peer(name, user).unwrap_or(user));
            self.messages.retain(|seq, _| *seq > nobodys);
        }
    }

    /// The first seq that is kept.
    pub fn first(&self) -> u64 {
        self.messages.first_key_value().map_or(self.seq + 1, |(seq, _)| *seq)
    }

    /// What is over the bounds goes: of many messages a 64th at a time.
    pub fn retain(&mut self, terms: &Terms, now_us: u64) {
        let most = match terms.retention_messages_max {
            0 => u64::MAX,
            most => most,
        };
        if self.messages.len() as u64 > most.saturating_add(most / 64) {
            self.messages.retain(|seq, _| *seq + most > self.seq);
        }
        let oldest_us = match terms.retention_days {
            0 => 0,
            days => now_us.saturating_sub(days * 24 * 3_600_000_000),
        };
        while let Some(first) =
            self.messages.first_entry().filter(|first| first.get().message.time_us < oldest_us)
        {
            first.remove();
        }
    }

    /// What is behind `since` alone.
    pub fn pull(
        &self,
        name: &str,
        (since, cursor): (u64, u64),
        limit: usize,
        reverse: bool,
    ) -> (Vec<Stored>, u64) {
        let mut bytes = 0;
        let fits = |kept: &&Kept| {
            let room = bytes < PULL_BYTES_MAX;
            bytes += kept.message.body.len();
            room
        };
        let found: Vec<&Kept> = if reverse {
            let until = if cursor == 0 { u64::MAX } else { cursor.max(since + 1) };
            self.messages
                .range(since + 1..until)
                .rev()
                .map(|(_, kept)| kept)
                .take(limit)
                .take_while(fits)
                .collect()
        } else {
            self.messages
                .range(cursor.max(since) + 1..)
                .map(|(_, kept)| kept)
                .take(limit)
                .take_while(fits)
                .collect()
        };
        let intact = |kept: &&Kept| {
            let Stored { sender, kind, body, .. } = &kept.message;
            message_crc(name, sender, *kind, body) == kept.crc
        };
        let read_to = found.last().map_or(0, |kept| kept.message.seq);
        (found.into_iter().filter(intact).map(|kept| kept.message.clone()).collect(), read_to)
    }
}

impl Ids {
    pub fn remember(&mut self, n: u64, answer: Appended) {
        self.watermark = self.watermark.max(n);
        self.answers.insert(n, answer);
        while self.answers.len() as u64 > proto::UNANSWERED_MAX {
            self.answers.pop_first();
        }
    }
}
