//! What drawing asks of the model.

use jiff::tz::TimeZone;

use super::{Link, Model};
use crate::tui::chat::Chat;
use crate::tui::editor::Editor;

impl Model {
    /// Our user.
    pub fn me(&self) -> &str {
        &self.me
    }

    /// Our device.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// Where the clock on the wall is.
    pub fn zone(&self) -> &TimeZone {
        &self.zone
    }

    /// The most recently active first.
    pub fn chats(&self) -> &[Chat] {
        &self.chats
    }

    /// The chat that is shown.
    pub fn open_chat(&self) -> Option<&Chat> {
        self.open.as_ref().and_then(|name| self.chats.iter().find(|chat| chat.name == *name))
    }

    /// The line that is typed.
    pub fn editor(&self) -> &Editor {
        self.open_chat().map_or(&self.loose, |chat| &chat.editor)
    }

    /// The connection.
    pub fn link(&self) -> &Link {
        &self.link
    }

    /// What there is to say about the last key.
    pub fn remark(&self) -> Option<&str> {
        self.remark.as_deref()
    }

    /// The help is to be seen.
    pub fn help(&self) -> bool {
        self.help
    }

    /// What stands in a message without an answer.
    pub fn sending(&self, ticket: u64) -> Option<&str> {
        let all = self.chats.iter().flat_map(|chat| chat.outgoing());
        all.clone().find(|outgoing| outgoing.ticket == ticket).map(|outgoing| &*outgoing.text)
    }

    /// Messages without an answer, over all chats.
    pub fn unanswered(&self) -> usize {
        self.chats.iter().map(|chat| chat.outgoing().len()).sum()
    }
}
