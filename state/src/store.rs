//! What the state server asks of a store. The trait is batch first: a call takes a slice of operations and answers
//! each, in one round trip.
//!
//! **Durable.** When `apply` returns an answer, the change behind it survives the end of this process. Whether it
//! survives the end of the store's process or of the machine is what [`Store::durability`] says: `Strict` when it does,
//! `Weak` when the store may lose the last second. Nothing is acknowledged to a client before `apply` has returned.
//!
//! **Atomic.** Each operation happens wholly or not at all, and operations on one chat (or one user's routes) never
//! interleave. Operations of one call are done in their order. Between calls there is no order.
//!
//! Trap: an error does not mean that nothing happened. [`StoreError::Unknown`] is what a timeout is, and whoever gets it
//! may only ask again, under the same id; who has none ([`MessageId::Unnamed`]) may never.

mod error;
mod marks;
mod page;
pub mod read;
mod rules;

use std::time::Duration;

use bytes::Bytes;
use proto::link;
use proto::wire::{Code, Durability, Kind};

use crate::group::{Act, Group, Member, Stay};

pub use error::StoreError;
pub use marks::{Mark, Marks, Recent};
pub use page::{Head, Moved, Page, Stored};
pub use rules::{
    CHAT_BUCKETS, PULL_BYTES_MAX, body_digest, chat_bucket, first_behind, message_crc, peer, retention_step,
};

/// One question or change.
#[derive(Debug, Clone, PartialEq)]
pub enum Op {
    /// A number for one life of a gateway, 1 to 2^24-1. → [`Answer::Incarnation`]
    Incarnate,
    /// `count` user numbers, never given before. → [`Answer::UserNumbers`], the first of them
    UserNumbers {
        /// How many.
        count: u64,
    },
    /// A user's number, given if new; then its name is remembered too. → [`Answer::User`]
    Register {
        /// Name of the user.
        name: String,
        /// The number that the user gets if new. Never given as a candidate for another name.
        candidate: u64,
    },
    /// A user's number. → [`Answer::User`], `None` when unknown
    User {
        /// Name of the user.
        name: String,
    },
    /// The name of a number. → [`Answer::Name`]
    Name {
        /// Number.
        user: u64,
    },
    /// Makes a number nobody's: no login binds it any more, its routes are told as [`Answer::Retired`], and nothing is kept of when it
    /// was there. For good.
    /// → [`Answer::Done`]
    Retire {
        /// Number.
        user: u64,
    },
    /// Forgets the name of a number. → [`Answer::Done`]
    Unname {
        /// Number.
        user: u64,
    },
    /// Gives a name another number, if it still has this one; then that number has the name too. → [`Answer::Done`]
    Renumber {
        /// Name of the user.
        name: String,
        /// The number that it has.
        from: u64,
        /// As a candidate of [`Op::Register`].
        to: u64,
    },
    /// Binds a device to a connection if the attempt is newer, or the same with the same connection. → [`Answer::Bound`]
    Bind {
        /// Whose.
        user: u64,
        /// Which device.
        device: u32,
        /// Of the login, 1 to 2^53-1.
        attempt: u64,
        /// Connection id.
        connection: u64,
        /// Devices of one user that may be bound; the one that logged in longest ago makes room. The same in all of a call.
        devices_max: usize,
        /// When the token was issued that the login rests on, Unix seconds: one that is revoked binds nothing. 0: it rests on
        /// none.
        issued_s: u64,
    },
    /// Logins that rest on a token of before that time bind nothing from now on, of this device or of all. What was told
    /// before and reaches further stays. → [`Answer::Done`]
    Revoke {
        /// Whose.
        user: u64,
        /// Which device; `None`: all.
        device: Option<u32>,
        /// Unix seconds, exclusive.
        before_s: u64,
        /// For so long this is remembered, seconds.
        keep_s: u64,
    },
    /// Whether a token of that time, good for any device, is revoked. → [`Answer::Revoked`]
    IsRevoked {
        /// Whose.
        user: u64,
        /// When it was issued, Unix seconds.
        issued_s: u64,
    },
    /// Removes a route if it still leads to this connection; of the last one the time is kept. → [`Answer::Done`]
    Unbind {
        /// Whose.
        user: u64,
        /// Connection id.
        connection: u64,
    },
    /// Where a user's devices are connected. → [`Answer::Routes`], [`Answer::Retired`]
    Routes {
        /// Whose.
        user: u64,
    },
    /// When the last device of a user left, and what is not to be told of them. → [`Answer::Seen`]
    Seen {
        /// Whose.
        user: u64,
    },
    /// What is not to be told of a user from now on. → [`Answer::Done`]
    Hide {
        /// Whose.
        user: u64,
        /// What.
        hides: Hides,
    },
    /// Adds a chat to a user's list. → [`Answer::Done`]
    ListChat {
        /// Name of the user.
        user: String,
        /// The chat.
        chat: String,
    },
    /// A page of a user's chats in byte order. → [`Answer::Chats`]
    Chats {
        /// Name of the user.
        user: String,
        /// Only chats behind this one; empty: from the first.
        after: String,
        /// Only chats up to this one; empty: to the last.
        until: String,
        /// At most so many.
        limit: usize,
    },
    /// The atomic step of a message. → [`Answer::Appended`]
    Append(Append),
    /// A group, and what somebody is or was in it. Asked behind [`Op::Pull`] or [`Op::Head`] in the same call it says what of
    /// their answers this user may see. → [`Answer::Standing`]
    Member {
        /// The group.
        chat: String,
        /// Name of the user.
        user: String,
    },
    /// A group, and everybody who is or was in it, in byte order of their names. → [`Answer::Roster`]
    Members {
        /// The group.
        chat: String,
        /// How far each has it, too.
        cursors: bool,
    },
    /// Where a chat stands. → [`Answer::Head`]
    Head {
        /// The chat.
        chat: String,
        /// Whose cursors.
        user: String,
    },
    /// Messages of a chat, as many as fit [`PULL_BYTES_MAX`], one at least. Those that fail their checksum are left out. → [`Answer::Messages`]
    Pull {
        /// The chat.
        chat: String,
        /// Name of the user who reads, to whom nothing is told from before [`Op::Vacate`]; empty: the server itself.
        reader: String,
        /// Exclusive; backwards 0 means from the newest.
        cursor: u64,
        /// At most so many.
        limit: usize,
        /// Downwards.
        reverse: bool,
    },
    /// Moves a user's cursors forward, neither beyond the head. → [`Answer::Moved`]
    Delivered {
        /// The chat.
        chat: String,
        /// Name of the user.
        user: String,
        /// Delivered up to here.
        seq: u64,
        /// Read up to here; 0: nothing was said of that.
        read: u64,
    },
    /// What the chat holds up to now is not a user's any more, nor are the cursors: whoever bears the name next begins behind
    /// it. What no user of a one-to-one chat may see any more is removed. → [`Answer::Done`]
    Vacate {
        /// The chat.
        chat: String,
        /// Name of the user.
        user: String,
    },
    /// Writes how far a life of a state server has pushed, and reads the marks of all. → [`Answer::Marks`]
    Mark {
        /// Name of the server.
        server: String,
        /// Which life of it.
        life: u64,
        /// Everything accepted up to this store time (µs) is pushed. 0: not known yet, the store writes its own now.
        pushed_us: u64,
    },
    /// Forgets a mark. → [`Answer::Done`]
    DropMark {
        /// Name of the server.
        server: String,
        /// Which life of it.
        life: u64,
    },
    /// The chats of a bucket whose newest message is newer than this, oldest first. → [`Answer::Recent`]
    Recent {
        /// Bucket of chats.
        bucket: u32,
        /// Store time, µs, exclusive.
        after_us: u64,
        /// At most so many.
        limit: usize,
    },
    /// Draws a new history for a bucket if it still has this one. → [`Answer::Done`]
    LoseHistory {
        /// Bucket of chats.
        bucket: u32,
        /// The history that was lost.
        history: u64,
    },
    /// Retention by age: removes what is older from chats of a bucket; heads stay. Looks at so many chats at most, at others
    /// in the next call, and at all of them in as many calls as that takes. → [`Answer::Done`]
    Expire {
        /// Bucket of chats.
        bucket: u32,
        /// Store time, µs, exclusive.
        before_us: u64,
        /// Chats looked at in this call.
        limit: usize,
    },
}

/// A message on its way in.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Append {
    /// As [`proto::name::Chat`] writes it.
    pub chat: String,
    /// Name of the sender.
    pub sender: String,
    /// Which of the sender's messages in this chat it is.
    pub id: MessageId,
    /// The message.
    pub body: Bytes,
    /// Answer with this final refusal instead of storing, unless the id has been answered before. A number is used up by it,
    /// a name is not.
    pub refusal: Option<Code>,
    /// What the body is.
    pub kind: Kind,
    /// What else the step does. In a group it decides first whether the sender may.
    pub act: Act,
    /// The token that it rests on, which the step looks at first. In one-to-one chats only; connections rest on their login.
    pub token: Option<TokenOf>,
}

/// A token that is good for any device of its user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct TokenOf {
    pub user: u64,
    /// Unix seconds.
    pub issued_s: u64,
}

/// What tells a message that is sent again from a new one, within chat and sender.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum MessageId {
    /// Of a connected client.
    Numbered {
        /// Drawn at random by the client.
        stream: u64,
        /// From 1 without gaps.
        n: u64,
    },
    /// Any text of 1 to [`MESSAGE_NAME_BYTES_MAX`] bytes, bound to one body for `store.named_ids_hours`.
    Named(String),
    /// None: whatever comes is another message.
    #[default]
    Unnamed,
}

/// Longest name of a message.
pub const MESSAGE_NAME_BYTES_MAX: usize = 64;

/// What a question brought.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum Answer {
    Incarnation(u32),
    UserNumbers(u64),
    User(Option<u64>),
    Name(Option<String>),
    Bound(Bound),
    Revoked(bool),
    Routes(Vec<Route>),
    Seen(Seen),
    /// Instead of [`Answer::Routes`]: the number is nobody's any more, and these were the last connections.
    Retired(Vec<Route>),
    Chats(Vec<String>),
    Appended(Appended),
    Standing(Standing),
    Roster(Roster),
    Head(Head),
    Messages(Page),
    Marks(Marks),
    Recent(Vec<Recent>),
    Moved(Moved),
    Done,
}

/// How a login ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Bound {
    /// The device is bound to the connection given.
    Yes {
        /// The connection it was bound to before, if another.
        replaced: Option<u64>,
        /// The connection of another device, which had to make room.
        evicted: Option<u64>,
    },
    /// A newer attempt is stored.
    Stale {
        /// That attempt.
        stored: u64,
    },
    /// The token that it rests on is revoked. Nothing has changed.
    Revoked,
    /// The number is nobody's any more: the name has another one, or will have.
    Retired,
}

/// Where a device is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Route {
    pub device: u32,
    pub attempt: u64,
    pub connection: u64,
}

/// What is kept of a user who is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Seen {
    /// Unix time at which the last route was removed, seconds; 0: none ever was.
    pub last_s: u64,
    /// What others are not told.
    pub hides: Hides,
}

/// What a user does not want to be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Hides {
    /// Whether they are there.
    pub presence: bool,
    /// That they are writing.
    pub typing: bool,
}

impl Hides {
    /// As stores keep it.
    pub fn bits(self) -> u8 {
        u8::from(self.presence) | u8::from(self.typing) << 1
    }

    /// Of what a store kept.
    pub fn of_bits(bits: u8) -> Hides {
        Hides { presence: bits & 1 != 0, typing: bits & 2 != 0 }
    }
}

/// What somebody is in a group.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Standing {
    /// The group; of version 0 if there is none.
    pub group: Group,
    /// `None`: never was in it.
    pub member: Option<Member>,
    /// Earlier stays, in order, at most [`crate::group::PAST_STAYS_MAX`].
    pub past: Vec<Stay>,
}

/// Everybody in a group.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Roster {
    /// The group.
    pub group: Group,
    /// By name, those who left included.
    pub members: Vec<(String, Member)>,
    /// Of each in the same order, delivered and read, when they were asked for.
    pub cursors: Vec<(u64, u64)>,
}

/// How a message fared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Appended {
    /// Stored, now or (`again`) when this id came first.
    Stored {
        /// Its place in the chat.
        seq: u64,
        /// Store time, µs.
        time_us: u64,
        /// History of the bucket then.
        history: u64,
        /// Version of the group with this message; 0 in a one-to-one chat.
        version: u64,
        /// This id had been answered before.
        again: bool,
    },
    /// Refused for ever, now or when this id came first.
    Refused(Code),
    /// The id is not the next one.
    Expected(u64),
    /// The id is so old that its answer is forgotten.
    TooOld,
    /// The name was given to another body.
    Conflict,
    /// The token that it rests on is revoked. Nothing has changed.
    Revoked,
}

/// One operation's outcome.
pub type Outcome = Result<Answer, StoreError>;

/// A store. See the file's head for what it promises.
#[async_trait::async_trait]
pub trait Store: Send + Sync {
    /// Does the operations in their order and answers each: the answer at `i` is for the operation at `i`.
    async fn apply(&self, ops: &[Op]) -> Vec<Outcome>;

    /// The same, for whoever decided by what it had remembered of the store: unless the store is still of this
    /// [`Store::generation`], nothing is done, and all is refused.
    async fn apply_as(&self, generation: u64, ops: &[Op]) -> Vec<Outcome> {
        if self.generation() == generation {
            return self.apply(ops).await;
        }
        ops.iter().map(|_| Err(StoreError::another())).collect()
    }

    /// What its answers are worth now, as far as it can tell.
    async fn durability(&self) -> Result<(Durability, String), StoreError>;

    /// Changes when the store turned out to hold other things than before: emptied, or an older copy. Whoever caches facts
    /// that never change otherwise (users' numbers, listed chats) drops them then.
    fn generation(&self) -> u64 {
        0
    }

    /// What is known of what it holds.
    fn stored(&self) -> link::Stored {
        link::Stored::default()
    }

    /// Somebody else has heard so long ago that it holds this. If that was more than it holds, it counts as lost. An error: not compared.
    async fn compare(&self, _heard: link::Stored, _ago: Duration) -> Result<(), StoreError> {
        Ok(())
    }
}
