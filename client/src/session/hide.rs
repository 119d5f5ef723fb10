//! Messages that their user hides: said by a message in the chat with oneself, remembered in the device's store. On the session's
//! task.
//!
//! Trap: a message may be handed out before the one that hides it comes, since chats are pulled side by side. Whoever shows
//! messages takes those away when they are told.

use std::time::Instant;

use proto::name::Chat;
use proto::wire::Code;
use tokio::sync::oneshot;

use super::{Session, Submission};
use crate::body::{Body, Content};
use crate::client::{SendError, Sent};
use crate::event::Event;
use crate::inbox::Message;

impl Session {
    /// The user wants to hide a message of what was handed out.
    pub(super) fn hide(
        &mut self,
        chat: &str,
        (history, seq): (u64, u64),
        answer: oneshot::Sender<Result<Sent, SendError>>,
        now: Instant,
    ) {
        let is_known = |(known, cursor)| known == history && history > 0 && (1..=cursor).contains(&seq);
        match Chat::pair(&self.options.user, &self.options.user) {
            Ok(own) if self.inbox.cursor(chat).is_some_and(is_known) => {
                let body = Body::hide(chat, history, seq);
                self.submit(Submission { chat: own.to_string(), body, answer }, now);
            }
            _ => {
                let text = "no such message of this chat was handed out here".to_owned();
                let _ = answer.send(Err(SendError::Refused { code: Code::BadChange, text }));
            }
        }
    }

    /// What the application is told of a message.
    pub(super) fn shown(&mut self, message: Message) -> Event {
        let user = &*self.options.user;
        let is_own = message.sender == user && message.chat.split_once(':') == Some((user, user));
        if is_own && let Content::Hide { chat, history, seq } = message.body.content() {
            self.store.put_hidden(&chat, history, seq);
        }
        let Message { chat, history, seq, .. } = &message;
        if self.store.is_hidden(chat, *history, *seq) {
            return Event::Hidden { chat: chat.clone(), history: *history, seq: *seq };
        }
        Event::Message(message)
    }
}
