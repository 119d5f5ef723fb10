//! What a question to the server brought: a group with its members, messages of a chat. Plain data.
//!
//! Trap: all of it is as of the moment in which the server read it, and none of it moves a cursor.

use std::sync::Arc;

use proto::name::NameError;
use proto::wire::{Code, Member};

use crate::inbox::Message;

/// A group, and who is in it.
#[derive(Debug, Clone, PartialEq)]
pub struct Group {
    /// Seq of the last change.
    pub version: u64,
    /// Its name for people.
    pub title: String,
    /// What seqs count in; 0: the server does not say, nor how far members are.
    pub history: u64,
    /// Everybody, in byte order of their names, with how far they have the group.
    pub members: Vec<Member>,
}

/// How many have a message of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reached {
    /// Members whom it is for: those in the group now who were in it then, but for its sender.
    pub of: usize,
    /// So many of them have it on some device.
    pub delivered: usize,
    /// So many have read it.
    pub read: usize,
}

impl Group {
    /// How many have the message of this sender at `seq`.
    pub fn reached(&self, sender: &str, seq: u64) -> Reached {
        let addressed = |member: &&Member| member.user != sender && member.joined <= seq;
        let mut reached = Reached::default();
        for member in self.members.iter().filter(addressed) {
            reached.of += 1;
            reached.delivered += usize::from(member.delivered.max(member.read) >= seq);
            reached.read += usize::from(member.read >= seq);
        }
        reached
    }
}

/// Messages of a chat as the server has them.
#[derive(Debug, Clone, PartialEq)]
pub struct Page {
    /// The chat, in its one spelling.
    pub chat: Arc<str>,
    /// What seqs count in now.
    pub history: u64,
    /// In the order asked for: ascending, with `reverse` descending. Without those that this user has hidden, as far as this device
    /// knows.
    pub messages: Vec<Message>,
    /// Ask again with this cursor: there are more in that direction.
    pub next: Option<u64>,
    /// The newest seq.
    pub head: u64,
    /// The lowest seq that is still kept and ours to see; 0: not told.
    pub first: u64,
}

/// Why a question has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AskError {
    /// The name of the peer or chat breaks the rules.
    #[error("{0}")]
    Name(#[from] NameError),
    /// No such thing, not ours to know, or asked wrongly.
    #[error("refused: {}: {text}", code.as_str_name())]
    Refused {
        /// Why.
        code: Code,
        /// In the server's words.
        text: String,
    },
    /// The session is over.
    #[error("not asked: the session is over")]
    Over,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_joined_later_or_sent_it_is_not_counted() {
        let member = |user: &str, joined, delivered, read| Member {
            user: user.to_owned(),
            joined,
            delivered,
            read,
            ..Default::default()
        };
        let members = vec![
            member("ann", 1, 9, 9),
            member("bob", 1, 9, 5),
            member("cy", 1, 4, 0),
            member("dan", 2, 0, 7),
            member("eve", 8, 9, 9),
        ];
        let group = Group { version: 8, title: "t".to_owned(), history: 7, members };
        let of = |seq| {
            let Reached { of, delivered, read } = group.reached("ann", seq);
            (of, delivered, read)
        };
        assert_eq!((of(5), of(6), of(1)), ((3, 2, 2), (3, 2, 1), (2, 2, 1)));
    }
}
