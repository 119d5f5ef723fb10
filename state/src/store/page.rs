//! What a store tells of a chat: where it stands, and messages of it. Pure.
//!
//! Trap: what one user is told is not another's: cursors are of the one asked for, and so is what is in front of them.

use bytes::Bytes;
use proto::wire::{self, Kind};

/// Where a chat stands. `seq` 0: nothing was ever stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(missing_docs)]
pub struct Head {
    pub history: u64,
    pub seq: u64,
    pub delivered: u64,
    pub read: u64,
    /// Of the other user of a one-to-one chat.
    pub peer_delivered: u64,
    pub peer_read: u64,
    /// The lowest seq that is kept for the user: 1 in an empty chat, behind the head when nothing is kept.
    pub first: u64,
    /// Up to here the chat was another's, who had the user's name: see [`super::Op::Vacate`].
    pub since: u64,
}

/// What is new of a user's cursors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Moved {
    /// Where it stands now; 0: it did not move.
    pub delivered: u64,
    /// Where it stands now, moved or not; 0: nothing was said of it.
    pub read: u64,
    /// One of them moved.
    pub is_news: bool,
}

/// A stored message.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Stored {
    pub seq: u64,
    pub sender: String,
    pub time_us: u64,
    pub body: Bytes,
    pub kind: Kind,
}

impl From<Stored> for wire::Message {
    fn from(stored: Stored) -> Self {
        let Stored { seq, sender, time_us, body, kind } = stored;
        wire::Message { seq, sender, time_us, body, kind: kind as i32 }
    }
}

/// Messages, with where the chat stands.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[allow(missing_docs)]
pub struct Page {
    pub history: u64,
    pub head: u64,
    /// As in [`Head`]: what is below was removed by retention, or is not the reader's.
    pub first: u64,
    /// As in [`Head`].
    pub since: u64,
    pub messages: Vec<Stored>,
    /// The last seq that was looked at, also where it is damaged and so left out; 0: there was none.
    pub read_to: u64,
}
