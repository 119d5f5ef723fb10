//! One chat as this device holds it: messages in their order, what is on its way, what was read. Pure.
//!
//! Trap: our own message is heard of twice, as the answer to sending it and as a message of the chat, in either order.
//! (history, seq) names it, and the second one finds it there.

use std::sync::Arc;

use super::circle::Circle;
use super::editor::Editor;
use super::text::{harmless, harmless_line};

/// See the head of this file.
#[derive(Debug)]
pub struct Chat {
    /// Its name on the wire.
    pub name: Arc<str>,
    /// What it is called on the screen.
    pub title: String,
    /// Our user, for the screen.
    pub me: String,
    /// What is being typed for it.
    pub editor: Editor,
    /// Messages not seen yet.
    pub unread: usize,
    /// Of the newest message, or when it was opened. Chats are listed by it.
    pub active_us: u64,
    /// Our user has read up to here, on some device: (history, seq).
    pub read: (u64, u64),
    /// The other user of the chat has it up to here.
    pub delivered: (u64, u64),
    /// The other user has read up to here.
    pub peer_read: (u64, u64),
    /// The server was asked to remember that our user has read up to here.
    pub read_told: (u64, u64),
    /// Of a group: the others.
    pub circle: Circle,
    /// Whether there is more than what is held.
    pub older: Older,
    /// Older messages down to here were asked for: (history, seq).
    pub looked_back: (u64, u64),
    /// Rows hidden below the view; 0 follows the newest message.
    pub below: usize,
    entries: Vec<Entry>,
    entries_bytes: usize,
    outgoing: Vec<Outgoing>,
}

/// What lies before the oldest message that is held.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum Older {
    /// The server may have some.
    #[default]
    Maybe,
    /// It is being asked.
    Asked,
    /// Nothing.
    None,
}

/// One thing in the course of a chat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// When, in microseconds since 1970.
    pub time_us: u64,
    /// What.
    pub what: What,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// A stored message.
    Message {
        /// History and seq.
        id: (u64, u64),
        /// Who.
        sender: String,
        /// It is our user's own.
        mine: bool,
        /// Fit for the terminal.
        text: String,
    },
    /// A message of this device that was not accepted.
    Failed {
        /// Fit for the terminal.
        text: String,
        /// The server may have it all the same.
        in_doubt: bool,
        /// Why, in words.
        why: String,
    },
    /// A remark of ours.
    Remark(String),
}

/// A message of this device without an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outgoing {
    /// What its answer is found by.
    pub ticket: u64,
    /// When it was entered.
    pub time_us: u64,
    /// Fit for the terminal.
    pub text: String,
}

/// A stored message on its way into a chat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored<'a> {
    /// History and seq.
    pub id: (u64, u64),
    /// Who.
    pub sender: &'a str,
    /// It is our user's own.
    pub mine: bool,
    /// The store's time.
    pub time_us: u64,
    /// As it came.
    pub text: &'a str,
}

impl Chat {
    /// A chat without messages.
    pub fn new(name: Arc<str>, me: &str) -> Self {
        let title = harmless_line(peer(&name, me));
        Chat {
            name,
            title,
            me: harmless_line(me),
            editor: Editor::default(),
            unread: 0,
            active_us: 0,
            read: (0, 0),
            delivered: (0, 0),
            peer_read: (0, 0),
            read_told: (0, 0),
            circle: Circle::default(),
            older: Older::default(),
            looked_back: (0, 0),
            below: 0,
            entries: Vec::new(),
            entries_bytes: 0,
            outgoing: Vec::new(),
        }
    }

    /// What has happened, oldest first.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// What is on its way, oldest first.
    pub fn outgoing(&self) -> &[Outgoing] {
        &self.outgoing
    }

    /// (history, seq) of the newest message.
    pub fn newest(&self) -> Option<(u64, u64)> {
        self.entries.iter().rev().find_map(|entry| match &entry.what {
            What::Message { id, .. } => Some(*id),
            _ => None,
        })
    }

    /// (history, seq) of the oldest message that is held.
    pub fn oldest(&self) -> Option<(u64, u64)> {
        self.entries.iter().find_map(|entry| match &entry.what {
            What::Message { id, .. } => Some(*id),
            _ => None,
        })
    }

    /// The message that stands so far from the end, of those that the server still has; 1: the newest.
    pub fn at_from_end(&self, place: usize) -> Option<(u64, u64)> {
        let (history, _) = self.newest()?;
        let mut ids = self.entries.iter().rev().filter_map(|entry| match &entry.what {
            What::Message { id, .. } if id.0 == history => Some(*id),
            _ => None,
        });
        ids.nth(place.checked_sub(1)?)
    }

    /// It is one.
    pub fn is_group(&self) -> bool {
        self.name.starts_with('#')
    }

    /// Others' messages above `read`, as far as they are held.
    pub fn above(&self, read: (u64, u64)) -> usize {
        let is_above = |entry: &&Entry| match &entry.what {
            What::Message { id, mine, .. } => !mine && id.0 == read.0 && id.1 > read.1,
            _ => false,
        };
        self.entries.iter().filter(is_above).count()
    }

    /// What became of a message of ours.
    pub fn mark(&self, id: (u64, u64)) -> &'static str {
        let reaches = |cursor: (u64, u64)| cursor.0 == id.0 && cursor.1 >= id.1;
        let (of, delivered, read) = self.circle.reached(id);
        let all = |reached: usize| of.is_some_and(|of| of > 0 && reached >= of);
        match () {
            () if reaches(self.peer_read) || all(read) => "●✓",
            () if reaches(self.delivered) || all(delivered) => "✓✓",
            () => "✓",
        }
    }

    /// How many in a group have a message of ours, while not all have read it.
    pub fn counts(&self, id: (u64, u64)) -> Option<String> {
        let (of, delivered, read) = self.circle.reached(id);
        if !self.is_group() || delivered + read == 0 || of.is_some_and(|of| read >= of) {
            return None;
        }
        let of = of.map_or_else(String::new, |of| format!("/{of}"));
        let read = if read > 0 { format!(" ●✓ {read}{of}") } else { String::new() };
        Some(format!("✓✓ {delivered}{of}{read}"))
    }

    /// Takes a message away. False: it is not here.
    pub fn hide(&mut self, hidden: (u64, u64)) -> bool {
        let is_it = |entry: &Entry| matches!(&entry.what, What::Message { id, .. } if *id == hidden);
        let Some(at) = self.entries.iter().position(is_it) else { return false };
        let others = |entry: &&Entry| matches!(&entry.what, What::Message { mine: false, .. });
        let newer = self.entries[at + 1..].iter().filter(others).count();
        let entry = self.entries.remove(at);
        self.entries_bytes -= entry.bytes();
        if others(&&entry) && newer < self.unread {
            self.unread -= 1;
        }
        true
    }

    /// There is room for older messages.
    pub fn has_room(&self) -> bool {
        self.entries.len() < SCROLLED_MAX && self.entries_bytes < SCROLLED_BYTES_MAX
    }

    /// Puts a message into its place. False: it is there already.
    pub fn put(&mut self, message: &Stored<'_>) -> bool {
        let (history, seq) = message.id;
        let mut place = self.entries.len();
        for (at, entry) in self.entries.iter().enumerate().rev() {
            let What::Message { id, .. } = &entry.what else { continue };
            if *id == message.id {
                return false;
            }
            if id.0 == history && id.1 < seq {
                break;
            }
            if id.0 == history {
                place = at;
            }
        }
        let what = What::Message {
            id: message.id,
            sender: harmless_line(message.sender),
            mine: message.mine,
            text: harmless(message.text),
        };
        self.insert(place, Entry { time_us: message.time_us, what });
        self.active_us = self.active_us.max(message.time_us);
        true
    }

    /// Says something in the course of the chat. False: that was the last thing said.
    pub fn remark(&mut self, remark: String, now_us: u64) -> bool {
        let is_said = |last: &Entry| matches!(&last.what, What::Remark(said) if *said == remark);
        if self.entries.last().is_some_and(is_said) {
            return false;
        }
        // At the time of its neighbour, lest it looks like another day.
        let time_us = self.entries.last().map_or(now_us, |last| last.time_us);
        self.insert(self.entries.len(), Entry { time_us, what: What::Remark(remark) });
        true
    }

    /// A message leaves.
    pub fn begin(&mut self, ticket: u64, text: &str, now_us: u64) {
        self.active_us = self.active_us.max(now_us);
        self.outgoing.push(Outgoing { ticket, time_us: now_us, text: harmless(text) });
    }

    /// It was answered.
    pub fn finish(&mut self, ticket: u64) -> Option<Outgoing> {
        let at = self.outgoing.iter().position(|outgoing| outgoing.ticket == ticket)?;
        Some(self.outgoing.remove(at))
    }

    /// It was not accepted, and stays visible as such.
    pub fn fail(&mut self, outgoing: Outgoing, in_doubt: bool, why: String) {
        let what = What::Failed { text: outgoing.text, in_doubt, why };
        self.insert(self.entries.len(), Entry { time_us: outgoing.time_us, what });
    }

    fn insert(&mut self, at: usize, entry: Entry) {
        self.entries_bytes += entry.bytes();
        self.entries.insert(at, entry);
        let (most, bytes_max) = if self.below > 0 {
            (SCROLLED_MAX, SCROLLED_BYTES_MAX)
        } else {
            (ENTRIES_MAX, ENTRIES_BYTES_MAX)
        };
        let mut excess = 0;
        while self.entries.len() - excess > most
            || (self.entries_bytes > bytes_max && self.entries.len() - excess > 1)
        {
            self.entries_bytes -= self.entries[excess].bytes();
            excess += 1;
            // They may be asked for again.
            (self.older, self.looked_back) = (Older::Maybe, (0, 0));
        }
        self.entries.drain(..excess);
    }

    /// Older messages begin before this seq; 0: the newest does.
    pub fn older_before(&self) -> u64 {
        match self.oldest() {
            // Where all that was looked at is hidden, nothing of it is held.
            Some((history, seq)) if self.looked_back.0 == history => seq.min(self.looked_back.1),
            Some((_, seq)) => seq,
            None => self.looked_back.1,
        }
    }
}

impl Entry {
    fn bytes(&self) -> usize {
        match &self.what {
            What::Message { sender, text, .. } => sender.len() + text.len(),
            What::Failed { text, why, .. } => text.len() + why.len(),
            What::Remark(remark) => remark.len(),
        }
    }
}

/// The other one of a pair, or the chat's name where there is none: as the user would write it.
pub fn peer<'a>(chat: &'a str, me: &str) -> &'a str {
    match chat.split_once(':') {
        Some((one, other)) if one == me => other,
        Some((one, other)) if other == me => one,
        _ => chat,
    }
}

/// Entries held per chat, and their texts.
pub const ENTRIES_MAX: usize = 1_000;
const ENTRIES_BYTES_MAX: usize = 1 << 20;
/// The same while somebody looks at older ones.
const SCROLLED_MAX: usize = 5_000;
const SCROLLED_BYTES_MAX: usize = 8 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn put(chat: &mut Chat, history: u64, seq: u64) -> bool {
        chat.put(&Stored { id: (history, seq), sender: "bob", mine: false, time_us: seq, text: "x" })
    }

    fn seqs(chat: &Chat) -> Vec<(u64, u64)> {
        let id = |entry: &Entry| match &entry.what {
            What::Message { id, .. } => *id,
            _ => (0, 0),
        };
        chat.entries().iter().map(id).collect()
    }

    #[test]
    fn messages_stand_in_order_and_once() {
        let mut chat = Chat::new("alice:bob".into(), "alice");
        assert_eq!(chat.title, "bob");
        assert!(put(&mut chat, 7, 1) && put(&mut chat, 7, 3) && put(&mut chat, 7, 2));
        assert!(!put(&mut chat, 7, 1) && !put(&mut chat, 7, 3));
        let mut remark = || chat.remark("history lost".to_owned(), 9);
        assert!(remark() && !remark(), "once");
        assert!(put(&mut chat, 8, 1) && put(&mut chat, 8, 2) && !put(&mut chat, 8, 1));
        assert_eq!(seqs(&chat), [(7, 1), (7, 2), (7, 3), (0, 0), (8, 1), (8, 2)]);
        assert_eq!(chat.active_us, 3);
    }

    #[test]
    fn what_was_not_accepted_stays_where_it_failed() {
        let mut chat = Chat::new("#17".into(), "alice");
        chat.begin(1, "one", 50);
        chat.begin(2, "two\u{7}", 51);
        let two = chat.finish(2).unwrap();
        assert_eq!((chat.finish(2), two.text.as_str()), (None, "two\u{fffd}"));
        chat.fail(two, true, "unknown".to_owned());
        put(&mut chat, 7, 1);
        assert_eq!(seqs(&chat), [(0, 0), (7, 1)]);
        assert_eq!((chat.outgoing().len(), chat.title.as_str()), (1, "#17"));
    }

    #[test]
    fn what_is_hidden_is_gone_and_was_unread_once_at_most() {
        let mut chat = Chat::new("alice:bob".into(), "alice");
        (1..=4).for_each(|seq| assert!(put(&mut chat, 7, seq)));
        chat.unread = 2;
        let at = |place| chat.at_from_end(place);
        assert_eq!([0, 1, 4, 5].map(at), [None, Some((7, 4)), Some((7, 1)), None]);
        assert!(chat.hide((7, 1)) && !chat.hide((7, 1)) && !chat.hide((8, 2)));
        assert_eq!((chat.unread, seqs(&chat)), (2, vec![(7, 2), (7, 3), (7, 4)]));
        assert!(chat.hide((7, 3)));
        assert_eq!((chat.unread, chat.oldest(), chat.newest()), (1, Some((7, 2)), Some((7, 4))));
    }

    #[test]
    fn whoever_looks_back_holds_more_until_they_return() {
        let mut chat = Chat::new("alice:bob".into(), "alice");
        (1_001..=2_000).for_each(|seq| assert!(put(&mut chat, 7, seq)));
        (chat.below, chat.older) = (9, Older::None);
        (901..=1_000).for_each(|seq| assert!(put(&mut chat, 7, seq)));
        assert_eq!((chat.entries().len(), chat.oldest(), chat.older), (1_100, Some((7, 901)), Older::None));
        chat.below = 0;
        put(&mut chat, 7, 2_001);
        assert_eq!(
            (chat.entries().len(), chat.oldest(), chat.older),
            (1_000, Some((7, 1_002)), Older::Maybe)
        );
    }

    #[test]
    fn a_chat_holds_so_much_and_no_more() {
        let mut chat = Chat::new("alice:bob".into(), "alice");
        (1..=ENTRIES_MAX as u64 + 5).for_each(|seq| assert!(put(&mut chat, 7, seq)));
        assert_eq!((chat.entries().len(), seqs(&chat)[0]), (ENTRIES_MAX, (7, 6)));
        let long = "x".repeat(ENTRIES_BYTES_MAX);
        chat.put(&Stored { id: (7, 2_000), sender: "bob", mine: false, time_us: 1, text: &long });
        assert_eq!(seqs(&chat), [(7, 2_000)]);
    }
}
