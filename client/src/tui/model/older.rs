//! Messages that this device does not hold: older ones, pulled when somebody scrolls beyond the top, and hidden ones, taken away.
//!
//! Trap: what is pulled is shown and not kept. The transcript goes on holding the last messages and no others.

use std::sync::Arc;

use client::{AskError, Content, Page, SendError, Sent};

use super::{Effect, Model};
use crate::tui::chat::{Older, Stored};
use crate::tui::transcript::Record;

impl Model {
    /// What came of asking for older messages.
    pub fn older(&mut self, name: &str, answer: Result<Page, AskError>) {
        let Some(chat) = self.chats.iter_mut().find(|chat| *chat.name == *name) else { return };
        let held = chat.oldest();
        self.changed = true;
        let page = match answer {
            Ok(page) if held.is_none_or(|(history, _)| history == page.history) => page,
            // Of another history: the library is about to tell.
            Ok(_) => {
                chat.older = Older::Maybe;
                return;
            }
            Err(error) => {
                chat.older = Older::Maybe;
                return self.say(error.to_string());
            }
        };
        chat.older = if page.next.is_some() { Older::Maybe } else { Older::None };
        chat.looked_back = (page.history, page.next.unwrap_or(1));
        for message in &page.messages {
            let text = message.body.describe();
            let stored = Stored {
                id: (message.history, message.seq),
                sender: &message.sender,
                mine: message.sender == self.me,
                time_us: message.time_us,
                text: &text,
            };
            if !matches!(message.body.content(), Content::Hide { .. }) {
                chat.put(&stored);
            }
        }
        if self.open.as_deref() == Some(name) {
            self.scroll(self.page());
        }
    }

    /// Somebody wants to see what lies before the messages that are held.
    pub(super) fn want_older(&mut self, name: &Arc<str>) {
        let Some(chat) = self.chats.iter_mut().find(|chat| chat.name == *name) else { return };
        let before = chat.older_before();
        if before == 1 {
            chat.older = Older::None;
        }
        if chat.older != Older::Maybe {
            return;
        }
        if !chat.has_room() {
            return self.say("so much is shown at a time; PgDn to the end lets go of it".to_owned());
        }
        chat.older = Older::Asked;
        self.effects.push_back(Effect::Older { chat: name.clone(), before });
    }

    /// Our user does not want to see the message that stands so far from the end. It goes when its hiding comes back as a message.
    pub(super) fn want_hidden(&mut self, place: usize) {
        let open = self.open.as_ref().and_then(|open| self.chats.iter().find(|chat| chat.name == *open));
        match open.and_then(|chat| Some((chat.name.clone(), chat.at_from_end(place)?))) {
            Some((chat, id)) => self.effects.push_back(Effect::Hide { chat, id }),
            None => self.remark = Some("there is no such message here".to_owned()),
        }
    }

    /// What became of that.
    pub fn hid(&mut self, answer: &Result<Sent, SendError>) {
        if let Err(error) = answer {
            self.say(format!("not hidden: {error}"));
        }
    }

    /// Our user has hidden this message.
    pub(super) fn hide(&mut self, name: &str, id: (u64, u64)) {
        let Some(chat) = self.chats.iter_mut().find(|chat| *chat.name == *name) else { return };
        if chat.hide(id) {
            self.changed = true;
            let record = Record::Hidden { history: id.0, seq: id.1 };
            self.effects.push_back(Effect::Keep { chat: name.into(), record });
            self.scroll(0);
        }
    }
}
