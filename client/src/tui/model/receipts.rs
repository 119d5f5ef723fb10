//! How far users have their chats, on the screen: marks of our messages, and what our user has read on other devices.
//!
//! Trap: a seq means something within its history only. Of another one than the messages that are held nothing is shown.

use super::{Effect, Model};
use crate::tui::chat::Chat;
use crate::tui::text::harmless_line;
use crate::tui::transcript::Record;
use client::Group;
use std::sync::Arc;

impl Model {
    /// Another user of a chat has everything up to here.
    pub fn delivered(&mut self, chat: &str, user: &str, id: (u64, u64)) {
        self.of_chat(chat, |chat| match chat.is_group() {
            true => chat.circle.delivered(user, id),
            false => chat.delivered = id,
        });
    }

    /// Somebody has read everything up to here: the other user of a chat, or ours.
    pub fn read(&mut self, chat: &str, user: &str, id: (u64, u64)) {
        if user == self.me {
            self.read_elsewhere(chat, id);
        } else {
            self.of_chat(chat, |chat| match chat.is_group() {
                true => chat.circle.read(user, id),
                false => chat.peer_read = id,
            });
        }
    }

    /// Who is in a group, if that could be had.
    pub fn members(&mut self, chat: &str, group: Option<&Group>) {
        let (mut again, me) = (false, self.me.clone());
        self.of_chat(chat, |chat| again = chat.circle.told(&me, group));
        group.iter().for_each(|group| self.titled(chat, &group.title));
        if again {
            self.effects.push_back(Effect::Members { chat: chat.into() });
        }
    }

    /// A group is called so.
    pub(super) fn titled(&mut self, chat: &str, title: &str) {
        if !title.is_empty() {
            self.of_chat(chat, |chat| chat.title = harmless_line(title));
        }
    }

    /// Receipts of the group that is open may be missing, or it has changed.
    pub fn want_members(&mut self) {
        let Some(name) = self.open.clone().filter(|name| name.starts_with('#')) else { return };
        let chat = self.chats.iter_mut().find(|chat| chat.name == name);
        // Of one that nothing has come of yet, it may not even exist.
        if chat.is_some_and(|chat| chat.newest().is_some() && chat.circle.want()) {
            self.effects.push_back(Effect::Members { chat: name });
        }
    }

    /// Our user has read up to here, says the server.
    pub fn read_elsewhere(&mut self, chat: &str, id: (u64, u64)) {
        let mut is_read = false;
        self.of_chat(chat, |chat| {
            chat.read = id;
            let unread = chat.unread.min(chat.above(id));
            is_read = unread == 0 && chat.unread > 0;
            chat.unread = unread;
        });
        if is_read {
            self.effects.push_back(Effect::Keep { chat: chat.into(), record: Record::Read });
        }
    }

    /// What is to be told as read of the open chat, once: its name, history and seq of its newest message.
    pub fn take_read(&mut self) -> Option<(Arc<str>, (u64, u64))> {
        let open = self.open.as_ref()?;
        let chat = self.chats.iter_mut().find(|chat| chat.name == *open)?;
        let newest = chat.newest()?;
        if chat.read_told.0 == newest.0 && chat.read_told.1 >= newest.1 {
            return None;
        }
        chat.read_told = newest;
        Some((chat.name.clone(), newest))
    }

    /// Only where there is something to see it by.
    fn of_chat(&mut self, name: &str, change: impl FnOnce(&mut Chat)) {
        if let Some(chat) = self.chats.iter_mut().find(|chat| *chat.name == *name) {
            change(chat);
            self.changed = true;
        }
    }
}
