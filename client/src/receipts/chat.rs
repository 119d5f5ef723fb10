//! One chat of the receipts: how far its users are, what is read here, and what of it is untold. Pure, owned by the receipts.
//!
//! Trap: everything counts in one history. Under another one all of it begins anew.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::wire;

use super::News;

/// Everything counts in `history`.
#[derive(Debug, Default)]
pub(super) struct Chat {
    pub history: u64,
    /// Ours, as the server knows it.
    pub read: u64,
    /// Ours, as the application says.
    pub wanted: u64,
    /// Sent on this connection, so many times, and due again at that time.
    pub sent: u64,
    tries: u32,
    again_at: Option<Instant>,
    /// Not before: one of a chat at a time.
    next_at: Option<Instant>,
    others: BTreeMap<String, Other>,
    /// What is not told yet.
    pub news: Untold,
}

/// How far somebody else is.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Other {
    pub delivered: u64,
    pub read: u64,
    delivered_is_news: bool,
    read_is_news: bool,
}

#[derive(Debug, Default)]
pub(super) struct Untold {
    pub queued: bool,
    pub read: bool,
    pub unread: Option<u64>,
    /// Of these others there are news.
    of: BTreeSet<String>,
}

impl Chat {
    /// Of another history: everything but its place in the queue is gone.
    pub fn begin_anew(&mut self, history: u64) {
        let news = Untold { queued: self.news.queued, ..Untold::default() };
        *self = Chat { history, news, ..Chat::default() };
    }

    pub fn forget_connection(&mut self) {
        (self.sent, self.tries, self.again_at, self.next_at) = (0, 0, None, None);
    }

    /// How far another user is, as far as it was told.
    pub fn other(&self, user: &str) -> Other {
        self.others.get(user).copied().unwrap_or_default()
    }

    /// What is read was delivered.
    pub fn told_of(&mut self, user: &str, delivered: u64, read: u64) {
        let delivered = delivered.max(read);
        let known = self.other(user);
        if (delivered <= known.delivered && read <= known.read)
            || (self.others.len() >= OTHERS_MAX && !self.others.contains_key(user))
        {
            return;
        }
        let other = self.others.entry(user.to_owned()).or_default();
        other.delivered_is_news |= delivered > other.delivered;
        other.read_is_news |= read > other.read;
        other.delivered = other.delivered.max(delivered);
        other.read = other.read.max(read);
        self.news.of.insert(user.to_owned());
    }

    pub fn has_news(&self) -> bool {
        self.news.read || self.news.unread.is_some() || !self.news.of.is_empty()
    }

    /// The next that is untold of it. `me`: our own user.
    pub fn next_news(&mut self, name: &Arc<str>, me: &str) -> Option<News> {
        let (chat, history) = (name.clone(), self.history);
        while let Some(user) = self.news.of.first().cloned() {
            let other = self.others.entry(user.clone()).or_default();
            if std::mem::take(&mut other.delivered_is_news) {
                return Some(News::Delivered { chat, history, user, seq: other.delivered });
            }
            if std::mem::take(&mut other.read_is_news) {
                return Some(News::Read { chat, history, user, seq: other.read });
            }
            self.news.of.remove(&user);
        }
        if let Some(unread) = self.news.unread.take() {
            return Some(News::Unread { chat, history, read: self.read, unread });
        }
        let user = me.to_owned();
        std::mem::take(&mut self.news.read).then_some(News::Read { chat, history, user, seq: self.read })
    }

    /// Sends what is due; when to look again.
    pub fn send(&mut self, name: &str, now: Instant, frames: &mut VecDeque<wire::Read>) -> Option<Instant> {
        if self.wanted <= self.read {
            return None;
        }
        let due = if self.wanted > self.sent { self.next_at } else { self.again_at };
        if let Some(at) = due.filter(|at| now < *at) {
            return Some(at);
        }
        self.tries = if self.wanted > self.sent { 0 } else { self.tries + 1 };
        self.sent = self.wanted;
        self.next_at = Some(now + PACE);
        let again_at = now + (AGAIN_AFTER * 2_u32.pow(self.tries.min(16))).min(AGAIN_AFTER_MAX);
        self.again_at = Some(again_at);
        frames.push_back(self.frame(name));
        Some(again_at)
    }

    pub fn frame(&self, name: &str) -> wire::Read {
        wire::Read { chat: name.to_owned(), history: self.history, seq: self.wanted }
    }
}

/// Others of a chat whose cursors are kept: as many as the largest group of which servers tell.
const OTHERS_MAX: usize = 1_000;
/// Least time between two Reads of one chat.
pub(super) const PACE: Duration = Duration::from_millis(50);
/// Without a Receipt a Read is sent again, doubling up to a minute.
pub(super) const AGAIN_AFTER: Duration = Duration::from_secs(5);
const AGAIN_AFTER_MAX: Duration = Duration::from_secs(60);
