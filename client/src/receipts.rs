//! How far users have their chats: what is told of the others, and what is read here. Pure: frames and `now` go in, Reads and
//! [`News`] come out; owned by the session. In a group every member is told of for himself; what is lost of that no Sync tells
//! again, so an application asks [`Client::group`](crate::Client::group).
//!
//! News of a chat that nobody has taken become one with what comes later, so that an application that never looks costs no
//! more than its chats.
//!
//! Trap: a Read has no answer but the Receipt that comes back to all devices of its user, and a server that does not know the
//! command closes the connection. So nothing is sent before a SyncAck has said that it is taken, and what no Receipt has
//! confirmed is sent again.

mod chat;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use prost::Message;
use proto::wire;

use chat::Chat;

/// What an application is told.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum News {
    /// Some device of this user has everything up to `seq`.
    Delivered { chat: Arc<str>, history: u64, user: String, seq: u64 },
    /// This user has read everything up to `seq`; it may be our own, on any device.
    Read { chat: Arc<str>, history: u64, user: String, seq: u64 },
    /// What a Sync said: read up to `read`, and so many messages behind it.
    Unread { chat: Arc<str>, history: u64, read: u64, unread: u64 },
}

/// See the head of this file. One per device.
#[derive(Debug)]
pub struct Receipts {
    user: String,
    /// This connection's server takes Read.
    taken: bool,
    /// Longest frame that it takes.
    frame_bytes_max: usize,
    chats: BTreeMap<Arc<str>, Chat>,
    /// Of these not all that is read is confirmed.
    pending: BTreeSet<Arc<str>>,
    frames: VecDeque<wire::Read>,
    /// Chats of which there are news, each once.
    untold: VecDeque<Arc<str>>,
    /// Nothing is due earlier. May be early, never late.
    deadline: Option<Instant>,
}

impl Receipts {
    /// Of this user's device. Nothing is kept over restarts: the first Sync tells.
    pub fn new(user: impl Into<String>) -> Self {
        Receipts {
            user: user.into(),
            taken: false,
            frame_bytes_max: proto::FRAME_BYTES_MAX,
            chats: BTreeMap::new(),
            pending: BTreeSet::new(),
            frames: VecDeque::new(),
            untold: VecDeque::new(),
            deadline: None,
        }
    }

    /// Logged in. `frame_bytes_max`: the longest frame that the server takes.
    pub fn connected(&mut self, frame_bytes_max: usize) {
        self.disconnected();
        self.frame_bytes_max = frame_bytes_max;
    }

    /// The connection is gone, and with it what was sent on it.
    pub fn disconnected(&mut self) {
        (self.taken, self.deadline) = (false, None);
        self.frames.clear();
        for name in &self.pending {
            let Some(chat) = self.chats.get_mut(name) else { continue };
            chat.forget_connection();
        }
    }

    /// Puts into a Sync what is known, so that it tells what is not. What finds no room in the frame is told again.
    pub fn fill(&self, sync: &mut wire::Sync) {
        sync.receipts = true;
        let mut room = self.frame_bytes_max.saturating_sub(proto::frame::HEADER_BYTES + sync.encoded_len());
        for cursor in &mut sync.cursors {
            let known = self.chats.get(&*cursor.chat).filter(|chat| chat.history == cursor.history);
            let Some(chat) = known else { continue };
            let other = peer(&cursor.chat, &self.user).map(|peer| chat.other(peer)).unwrap_or_default();
            let filled = wire::Cursor {
                read_seq: chat.read,
                peer_delivered: other.delivered,
                peer_read: other.read,
                ..cursor.clone()
            };
            // Its length in front may grow too.
            let more = filled.encoded_len() - cursor.encoded_len() + 1;
            if more <= room {
                room -= more;
                *cursor = filled;
            }
        }
    }

    /// A SyncAck arrived.
    pub fn sync_ack(&mut self, ack: &wire::SyncAck, now: Instant) {
        self.taken = ack.receipts;
        if !self.taken {
            return;
        }
        for head in &ack.chats {
            let name = self.name(&head.chat);
            let Some(chat) = chat(&mut self.chats, &name, head.history, true) else { continue };
            chat.read = chat.read.max(head.read_seq);
            if let Some(peer) = peer(&name, &self.user) {
                chat.told_of(peer, head.peer_delivered, head.peer_read);
            }
            chat.news.unread = Some(head.unread);
            self.is_news(name);
        }
        self.pump(now);
    }

    /// A Receipt arrived.
    pub fn receipt(&mut self, receipt: &wire::Receipt) {
        let name = self.name(&receipt.chat);
        let Some(chat) = chat(&mut self.chats, &name, receipt.history, false) else { return };
        if receipt.user == self.user {
            chat.news.read |= receipt.read > chat.read;
            chat.read = chat.read.max(receipt.read);
        } else if name.starts_with('#') || peer(&name, &self.user) == Some(&receipt.user) {
            chat.told_of(&receipt.user, receipt.delivered, receipt.read);
        }
        self.is_news(name);
    }

    /// The user has read everything up to `seq`, which was handed out.
    pub fn read(&mut self, name: &str, history: u64, seq: u64, now: Instant) {
        let name = self.name(name);
        let Some(chat) = chat(&mut self.chats, &name, history, true) else { return };
        if seq > chat.wanted.max(chat.read) {
            chat.wanted = seq;
            self.pending.insert(name);
            self.pump(now);
        }
    }

    /// Does what is due. Cheap when nothing is.
    pub fn tick(&mut self, now: Instant) {
        if self.deadline.is_some_and(|at| now >= at) {
            self.pump(now);
        }
    }

    /// When [`Receipts::tick`] should be called next.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Sends at once whatever is read and not told: the connection is about to be closed.
    pub fn flush(&mut self) {
        if self.taken {
            for (name, chat) in self.chats.iter_mut().filter(|(name, _)| self.pending.contains(&**name)) {
                if chat.wanted > chat.read.max(chat.sent) {
                    chat.sent = chat.wanted;
                    self.frames.push_back(chat.frame(name));
                }
            }
        }
    }

    /// The next frame to send.
    pub fn next_frame(&mut self) -> Option<wire::Read> {
        self.frames.pop_front()
    }

    /// The next news.
    pub fn next_news(&mut self) -> Option<News> {
        loop {
            let name = self.untold.front()?.clone();
            if let Some(chat) = self.chats.get_mut(&name) {
                if let Some(news) = chat.next_news(&name, &self.user) {
                    return Some(news);
                }
                chat.news.queued = false;
            }
            self.untold.pop_front();
        }
    }

    fn is_news(&mut self, name: Arc<str>) {
        let Some(chat) = self.chats.get_mut(&name) else { return };
        if chat.has_news() && !std::mem::replace(&mut chat.news.queued, true) {
            self.untold.push_back(name);
        }
    }

    fn pump(&mut self, now: Instant) {
        self.deadline = None;
        if !self.taken {
            return;
        }
        let mut deadline: Option<Instant> = None;
        self.pending.retain(|name| {
            let at = self.chats.get_mut(name).and_then(|chat| chat.send(name, now, &mut self.frames));
            deadline = [deadline, at].into_iter().flatten().min();
            at.is_some()
        });
        self.deadline = deadline;
    }

    fn name(&self, chat: &str) -> Arc<str> {
        self.chats.get_key_value(chat).map_or_else(|| chat.into(), |(name, _)| name.clone())
    }
}

/// The other user of a one-to-one chat; in a chat with oneself, and in a group, there is none.
fn peer<'a>(chat: &'a str, user: &str) -> Option<&'a str> {
    let (low, high) = chat.split_once(':')?;
    [low, high].into_iter().find(|name| *name != user)
}

/// The chat in this history. `decides`: whoever says so knows which is in force, and another one begins anew.
fn chat<'a>(
    chats: &'a mut BTreeMap<Arc<str>, Chat>,
    name: &Arc<str>,
    history: u64,
    decides: bool,
) -> Option<&'a mut Chat> {
    let chat = chats.entry(name.clone()).or_default();
    if chat.history != history && history != 0 {
        if chat.history != 0 && !decides {
            return None;
        }
        chat.begin_anew(history);
    }
    Some(chat)
}

#[cfg(test)]
mod tests {
    use super::chat::{AGAIN_AFTER, PACE};
    use super::*;

    const CHAT: &str = "alice:bob";

    fn frames(receipts: &mut Receipts) -> Vec<u64> {
        std::iter::from_fn(|| receipts.next_frame()).map(|read| read.seq).collect()
    }

    fn news(receipts: &mut Receipts) -> Vec<News> {
        std::iter::from_fn(|| receipts.next_news()).collect()
    }

    fn ack(heads: Vec<wire::ChatHead>) -> wire::SyncAck {
        wire::SyncAck { chats: heads, receipts: true, ..Default::default() }
    }

    fn receipt(user: &str, delivered: u64, read: u64) -> wire::Receipt {
        wire::Receipt { chat: CHAT.into(), history: 7, user: user.into(), delivered, read }
    }

    fn delivered(seq: u64) -> News {
        News::Delivered { chat: CHAT.into(), history: 7, user: "bob".into(), seq }
    }

    fn read(user: &str, seq: u64) -> News {
        News::Read { chat: CHAT.into(), history: 7, user: user.into(), seq }
    }

    #[test]
    fn reads_wait_for_a_server_that_takes_them_and_for_each_other() {
        let now = Instant::now();
        let mut receipts = Receipts::new("alice");
        receipts.read(CHAT, 7, 3, now);
        receipts.sync_ack(&wire::SyncAck::default(), now);
        assert!(frames(&mut receipts).is_empty(), "an older server would close the connection");
        receipts.sync_ack(&ack(Vec::new()), now);
        assert_eq!(frames(&mut receipts), [3]);
        receipts.read(CHAT, 7, 2, now);
        receipts.read(CHAT, 7, 4, now);
        receipts.read(CHAT, 7, 5, now);
        assert_eq!((frames(&mut receipts), receipts.next_deadline()), (vec![], Some(now + PACE)));
        receipts.tick(now + PACE);
        assert_eq!(frames(&mut receipts), [5]);
        receipts.read(CHAT, 7, 6, now + PACE);
        receipts.flush();
        assert_eq!(frames(&mut receipts), [6]);
    }

    #[test]
    fn what_is_not_confirmed_is_sent_again_also_on_the_next_connection() {
        let now = Instant::now();
        let mut receipts = Receipts::new("alice");
        receipts.sync_ack(&ack(Vec::new()), now);
        receipts.read(CHAT, 7, 3, now);
        assert_eq!(frames(&mut receipts), [3]);
        receipts.tick(now + AGAIN_AFTER);
        assert_eq!(frames(&mut receipts), [3]);
        assert_eq!(receipts.next_deadline(), Some(now + 3 * AGAIN_AFTER), "twice as long");
        receipts.disconnected();
        assert_eq!(receipts.next_deadline(), None);
        receipts.sync_ack(&ack(Vec::new()), now);
        assert_eq!(frames(&mut receipts), [3]);
        receipts.receipt(&receipt("alice", 0, 3));
        assert_eq!(news(&mut receipts), [read("alice", 3)]);
        receipts.tick(now + 100 * AGAIN_AFTER);
        assert_eq!((frames(&mut receipts), receipts.next_deadline()), (vec![], None));
    }

    #[test]
    fn what_is_told_of_the_other_only_rises_and_goes_into_the_next_sync() {
        let now = Instant::now();
        let mut receipts = Receipts::new("alice");
        let head = wire::ChatHead {
            chat: CHAT.into(),
            history: 7,
            head: 9,
            read_seq: 4,
            unread: 5,
            peer_delivered: 6,
            peer_read: 2,
            ..Default::default()
        };
        receipts.sync_ack(&ack(vec![head.clone()]), now);
        let unread = News::Unread { chat: CHAT.into(), history: 7, read: 4, unread: 5 };
        assert_eq!(news(&mut receipts), [delivered(6), read("bob", 2), unread]);
        receipts.receipt(&receipt("bob", 5, 1));
        receipts.receipt(&receipt("carol", 9, 9));
        assert_eq!(news(&mut receipts), []);
        // Untaken, they become one.
        receipts.receipt(&receipt("bob", 7, 0));
        receipts.receipt(&receipt("bob", 0, 8));
        assert_eq!(news(&mut receipts), [delivered(8), read("bob", 8)]);
        let cursor = |history| wire::Cursor { chat: CHAT.into(), history, seq: 9, ..Default::default() };
        let mut sync = wire::Sync { cursors: vec![cursor(7), cursor(8)], ..Default::default() };
        receipts.fill(&mut sync);
        let known = [&sync.cursors[0], &sync.cursors[1]].map(|c| (c.read_seq, c.peer_delivered, c.peer_read));
        assert_eq!((sync.receipts, known), (true, [(4, 8, 8), (0, 0, 0)]));
        // Of another history: a Receipt may be old, a Sync begins anew.
        receipts.receipt(&wire::Receipt { history: 8, ..receipt("bob", 9, 9) });
        assert_eq!(news(&mut receipts), []);
        receipts.sync_ack(&ack(vec![wire::ChatHead { history: 8, peer_delivered: 1, ..head }]), now);
        assert!(matches!(news(&mut receipts)[0], News::Delivered { history: 8, seq: 2, .. }));
    }

    #[test]
    fn in_a_group_everybody_is_told_of() {
        let mut receipts = Receipts::new("alice");
        let of = |user: &str, delivered, read| wire::Receipt {
            chat: "#7".into(),
            history: 7,
            user: user.into(),
            delivered,
            read,
        };
        for receipt in
            [of("bob", 3, 0), of("carol", 4, 4), of("bob", 2, 2), of("alice", 0, 5), of("bob", 1, 1)]
        {
            receipts.receipt(&receipt);
        }
        let told = |news: News| match news {
            News::Delivered { user, seq, .. } => ("delivered", user, seq),
            News::Read { user, seq, .. } => ("read", user, seq),
            News::Unread { unread, .. } => ("unread", String::new(), unread),
        };
        let seen: Vec<_> = news(&mut receipts).into_iter().map(told).collect();
        let wanted = [
            ("delivered", "bob", 3),
            ("read", "bob", 2),
            ("delivered", "carol", 4),
            ("read", "carol", 4),
            ("read", "alice", 5),
        ];
        assert_eq!(seen, wanted.map(|(what, user, seq)| (what, user.to_owned(), seq)));
        receipts.receipt(&of("bob", 3, 2));
        assert_eq!(news(&mut receipts), []);
    }

    #[test]
    fn a_sync_that_is_full_leaves_out_what_it_cannot_hold() {
        let mut receipts = Receipts::new("alice");
        receipts.sync_ack(&ack(Vec::new()), Instant::now());
        for user in ["bob", "carol"] {
            let chat = format!("alice:{user}");
            receipts.receipt(&wire::Receipt { chat, history: 7, user: user.into(), delivered: 300, read: 1 });
        }
        let cursor =
            |chat: &str| wire::Cursor { chat: chat.into(), history: 7, seq: 300, ..Default::default() };
        let mut sync = wire::Sync {
            cursors: vec![cursor(CHAT), cursor("alice:carol")],
            receipts: true,
            ..Default::default()
        };
        receipts.connected(proto::frame::HEADER_BYTES + sync.encoded_len() + 8);
        receipts.fill(&mut sync);
        assert_eq!(sync.cursors.iter().map(|c| c.peer_delivered).collect::<Vec<_>>(), [300, 0]);
        assert!(proto::frame::encode(proto::Command::Sync, &sync).len() <= receipts.frame_bytes_max);
    }
}
