//! What happens to a client, as its application sees it.

use std::sync::Arc;

use proto::wire::{Code, Durability};
use tokio::sync::mpsc;

use crate::body::Body;
use crate::client::SendError;
use crate::inbox::Message;
use crate::presence;
use crate::receipts::News;
use crate::session::Control;

/// One thing that happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A message, in the order of its chat and once. To be confirmed with [`Events::confirm`].
    Message(Message),
    /// From `from` to `to` (both included) the server has nothing to show: retention, damage, or not ours to see. In the
    /// order of the chat and once; to be confirmed with [`Events::confirm_event`], or it comes again after a restart.
    Gap {
        /// The chat.
        chat: Arc<str>,
        /// Its history.
        history: u64,
        /// First seq that is missing.
        from: u64,
        /// Last seq that is missing.
        to: u64,
    },
    /// A message stands here that this user has hidden ([`Client::hide`](crate::Client::hide)), on any device. In the order of the
    /// chat and once, in the message's place; to be confirmed with [`Events::confirm_event`].
    Hidden {
        /// The chat.
        chat: Arc<str>,
        /// Its history.
        history: u64,
        /// The message's.
        seq: u64,
    },
    /// The server lost history of this chat. What it has now follows under the new number, from `from_seq` on. To be
    /// confirmed with [`Events::confirm_event`], or it comes again after a restart.
    HistoryLost {
        /// The chat.
        chat: Arc<str>,
        /// The new history.
        history: u64,
        /// First seq that is handed out anew.
        from_seq: u64,
    },
    /// Some device of a user has everything up to `seq` of the chat. Told of others: of the other user of a one-to-one chat, and of
    /// each member of a group that is not too large (32 by default). May come again after a restart; of a group what happened
    /// while this device was away is not told, [`Client::group`](crate::Client::group) says it.
    Delivered {
        /// The chat.
        chat: Arc<str>,
        /// Its history.
        history: u64,
        /// Whose device.
        user: String,
        /// Up to here.
        seq: u64,
    },
    /// A user has read everything up to `seq` of the chat; also told of one's own user, when any device says so. May come
    /// again after a restart.
    Read {
        /// The chat.
        chat: Arc<str>,
        /// Its history.
        history: u64,
        /// Who.
        user: String,
        /// Up to here.
        seq: u64,
    },
    /// What a Sync says of a chat with news: this user has read up to `read`, and `unread` messages above it are kept, one's
    /// own among them.
    Unread {
        /// The chat.
        chat: Arc<str>,
        /// Its history.
        history: u64,
        /// Up to here.
        read: u64,
        /// So many.
        unread: u64,
    },
    /// A watched user is there or is not ([`Client::watch`](crate::Client::watch)): told of each when it is known, and when it changes.
    /// Between [`Disconnected`](Event::Disconnected) and [`Synced`](Event::Synced) nobody knows; what is still so then is not told again.
    Presence {
        /// Who.
        user: String,
        /// Some device of theirs is logged in.
        online: bool,
        /// Unix time at which the last one left, seconds; 0: not known, or hidden.
        last_seen_s: u64,
    },
    /// Another user is writing into a chat: to be shown until `stopped`, a message of theirs, or for 6 s.
    Typing {
        /// The chat.
        chat: Arc<str>,
        /// Who.
        user: String,
        /// Not any more.
        stopped: bool,
    },
    /// The server does not watch those users for us, and would not if asked again: too many, most likely.
    WatchRefused {
        /// Why.
        code: Code,
        /// In the server's words.
        text: String,
    },
    /// A message that an earlier run of the program left without an answer is not accepted, or nobody knows what became of it: what
    /// whoever sent it would have been told then. Said once, and not again after a restart. Of one that is accepted nothing is said;
    /// it comes as a [`Message`](Event::Message).
    EarlierFailed {
        /// The chat.
        chat: Arc<str>,
        /// What it says.
        body: Body,
        /// [`Refused`](SendError::Refused) or [`Unknown`](SendError::Unknown).
        error: SendError,
    },
    /// The server says that it has a fault (INTERNAL) with this chat: what is unanswered of it is sent again, what is missing of it asked
    /// for again, until it has none. Its operator's log says more. Once a connection, or behind an answer.
    Trouble {
        /// The chat.
        chat: Arc<str>,
        /// What, in the server's words.
        text: String,
    },
    /// Logged in.
    Connected {
        /// The gateway.
        address: String,
        /// What an acknowledgement is worth there.
        durability: Durability,
    },
    /// Every chat's news are known; what was missed is being pulled.
    Synced,
    /// The connection is gone; another one is being made.
    Disconnected {
        /// Why.
        reason: String,
    },
    /// The last event: the session does not come back by itself.
    Ended(Ended),
}

impl From<News> for Event {
    fn from(news: News) -> Event {
        match news {
            News::Delivered { chat, history, user, seq } => Event::Delivered { chat, history, user, seq },
            News::Read { chat, history, user, seq } => Event::Read { chat, history, user, seq },
            News::Unread { chat, history, read, unread } => Event::Unread { chat, history, read, unread },
        }
    }
}

impl From<presence::News> for Event {
    fn from(news: presence::News) -> Event {
        match news {
            presence::News::Presence { user, online, last_seen_s } => {
                Event::Presence { user, online, last_seen_s }
            }
            presence::News::Typing { chat, user, stopped } => Event::Typing { chat, user, stopped },
            presence::News::WatchRefused { code, text } => Event::WatchRefused { code, text },
        }
    }
}

/// Why a session ended for good.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Ended {
    /// The server refuses this login, and would again.
    #[error("login refused: {}: {text}", code.as_str_name())]
    LoginRefused {
        /// Why.
        code: Code,
        /// In the server's words.
        text: String,
    },
    /// The server ended the session; REPLACED: another program logged in as this user and device.
    #[error("ended by the server: {}: {text}", code.as_str_name())]
    Kicked {
        /// Why.
        code: Code,
        /// In the server's words.
        text: String,
    },
    /// Nothing can be stored, so nothing can be sent safely.
    #[error("state cannot be written: {0}")]
    Store(String),
    /// The application closed it.
    #[error("closed")]
    Closed,
}

/// How a session is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    /// Not logged in (yet, or again).
    Connecting {
        /// Why the last try failed.
        problem: Option<String>,
    },
    /// Logged in.
    Online,
    /// Over.
    Ended(Ended),
}

/// The stream of events. Dropping it stops nothing but the telling.
///
/// To have every message **once in a store of your own**, whatever dies when: keep (chat, history, seq) beside what you
/// store, in the same transaction; when a message comes that is there already, do not store it again; confirm it either
/// way, and not before the transaction is durable. A message that was not confirmed comes again after a restart, with
/// the same three; one that was confirmed may do so only when the machine lost its power or the state folder was lost.
/// `examples/once.rs` does this with a file.
#[derive(Debug)]
pub struct Events {
    pub(crate) events: mpsc::Receiver<Event>,
    pub(crate) controls: mpsc::UnboundedSender<Control>,
}

impl Events {
    /// The next event; `None` behind the last one.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// The application has this message, and everything before it in its chat, in its own store: the cursor moves, is
    /// stored, and the server is told.
    pub fn confirm(&self, message: &Message) {
        self.confirm_up_to(&message.chat, message.history, message.seq);
    }

    /// Confirms what this event told: a message, a hidden one, a gap, a lost history. Of other events there is nothing to confirm.
    /// Confirming a message confirms all that was told of its chat before.
    pub fn confirm_event(&self, event: &Event) {
        match event {
            Event::Message(message) => self.confirm(message),
            Event::Gap { chat, history, to, .. } => self.confirm_up_to(chat, *history, *to),
            Event::Hidden { chat, history, seq } => self.confirm_up_to(chat, *history, *seq),
            Event::HistoryLost { chat, history, from_seq } => {
                self.confirm_up_to(chat, *history, from_seq.saturating_sub(1));
            }
            Event::Delivered { .. }
            | Event::Read { .. }
            | Event::Unread { .. }
            | Event::Presence { .. }
            | Event::Typing { .. }
            | Event::WatchRefused { .. }
            | Event::EarlierFailed { .. }
            | Event::Trouble { .. }
            | Event::Connected { .. }
            | Event::Synced
            | Event::Disconnected { .. }
            | Event::Ended(_) => {}
        }
    }

    fn confirm_up_to(&self, chat: &Arc<str>, history: u64, seq: u64) {
        // Over means that nobody can be told any more; what was told comes again after a restart.
        let _ = self.controls.send(Control::Confirm { chat: chat.clone(), history, seq });
    }
}
