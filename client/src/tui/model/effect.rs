//! What the model asks the event loop to do.

use std::sync::Arc;

use client::Body;

use crate::tui::transcript::Record;

/// What is to be done now, in this order.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Send this; its answer goes to [`Model::answered`](super::Model::answered).
    Send {
        /// Names the message.
        ticket: u64,
        /// Where to.
        chat: Arc<str>,
        /// What.
        body: Body,
    },
    /// Keep this over restarts.
    Keep {
        /// The chat.
        chat: Arc<str>,
        /// What.
        record: Record,
    },
    /// Tell the others in a chat that our user is writing, or not any more.
    Typing {
        /// The chat.
        chat: Arc<str>,
        /// Not any more.
        stopped: bool,
    },
    /// Ask who is in this group; the answer goes to [`Model::members`](super::Model::members).
    Members {
        /// The group.
        chat: Arc<str>,
    },
    /// Ask for messages before this one (0: the newest); the answer goes to [`Model::older`](super::Model::older).
    Older {
        /// The chat.
        chat: Arc<str>,
        /// The seq.
        before: u64,
    },
    /// Hide this message from our user on all devices; the answer goes to [`Model::hid`](super::Model::hid).
    Hide {
        /// The chat.
        chat: Arc<str>,
        /// History and seq.
        id: (u64, u64),
    },
    /// Draw everything anew, whatever the terminal shows.
    Redraw,
    /// Leave.
    Quit,
}
