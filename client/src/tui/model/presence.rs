//! Who is there and who is writing, on the screen; and what our user's keys tell others of it.
//!
//! Trap: a note of writing has an end even if nobody says so; whoever draws asks [`Model::writing_until_us`] when.

use std::sync::Arc;

use super::{Effect, Link, Model};

/// A user who is writing into a chat.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Writing {
    chat: Arc<str>,
    user: String,
    until_us: u64,
}

/// How long a note counts, and how long ours lasts before it is said again: both are the protocol's.
const WRITING_US: u64 = 6_000_000;
const SAY_AGAIN_US: u64 = 3_000_000;
/// Users that a server watches for us by default.
const WATCHED_MAX: usize = 200;

impl Model {
    /// How a user is: online, and when last seen (Unix seconds, 0: not known).
    pub fn presence(&mut self, user: &str, online: bool, last_seen_s: u64) {
        self.there.insert(user.to_owned(), (online, last_seen_s));
        self.changed = true;
    }

    /// Somebody is writing into a chat, or is not any more.
    pub fn typing(&mut self, chat: &Arc<str>, user: &str, stopped: bool, now_us: u64) {
        self.stopped_writing(chat, user);
        if !stopped {
            let writing =
                Writing { chat: chat.clone(), user: user.to_owned(), until_us: now_us + WRITING_US };
            self.writing.push(writing);
        }
        self.changed = true;
    }

    /// A message of theirs says so too.
    pub(super) fn stopped_writing(&mut self, chat: &str, user: &str) {
        self.writing.retain(|writing| *writing.chat != *chat || writing.user != user);
    }

    /// Forgets notes that are over. When the next one will be.
    pub fn writing_until_us(&mut self, now_us: u64) -> Option<u64> {
        let before = self.writing.len();
        self.writing.retain(|writing| writing.until_us > now_us);
        self.changed |= self.writing.len() < before;
        self.writing.iter().map(|writing| writing.until_us).min()
    }

    /// The other users of the chats with one of them, the most recently active first: once, when they are others than before.
    pub fn take_watched(&mut self) -> Option<Vec<String>> {
        let me = self.me.as_str();
        let peer = |name: &str| {
            let (low, high) = name.split_once(':')?;
            [low, high].into_iter().find(|user| *user != me).map(str::to_owned)
        };
        let mut users: Vec<String> =
            self.chats.iter().filter_map(|chat| peer(&chat.name)).take(WATCHED_MAX).collect();
        users.sort_unstable();
        if users == self.watched {
            return None;
        }
        self.watched.clone_from(&users);
        Some(users)
    }

    /// The line of the open chat was changed by a key.
    pub(super) fn line_changed(&mut self, now_us: u64) {
        let Some(chat) = self.open.clone() else { return };
        // A command is nobody's business.
        let line = self.editor_mut().text();
        let is_writing = !line.trim().is_empty() && !line.starts_with('/');
        let said = self.said_writing.as_ref().filter(|(said, _)| *said == chat).map(|(_, at_us)| *at_us);
        match (is_writing, said) {
            (true, said) if said.is_none_or(|at_us| now_us >= at_us + SAY_AGAIN_US) => {
                self.said_writing = Some((chat.clone(), now_us));
                self.effects.push_back(Effect::Typing { chat, stopped: false });
            }
            (false, Some(_)) => {
                self.said_writing = None;
                self.effects.push_back(Effect::Typing { chat, stopped: true });
            }
            _ => {}
        }
    }

    /// Whether the other user of a chat is there, and since when not (Unix seconds, 0: not known); `None`: nobody knows, as long as there is
    /// no connection, or it is a group.
    pub fn there(&self, chat: &str) -> Option<(bool, u64)> {
        if !matches!(self.link, Link::Online { .. }) {
            return None;
        }
        let (low, high) = chat.split_once(':')?;
        let user = [low, high].into_iter().find(|user| *user != self.me)?;
        self.there.get(user).copied()
    }

    /// Who is writing into the open chat.
    pub fn writing(&self) -> impl Iterator<Item = &str> {
        let open = self.open.as_deref();
        let here = move |writing: &&Writing| Some(&*writing.chat) == open;
        self.writing.iter().filter(here).map(|writing| writing.user.as_str())
    }
}
