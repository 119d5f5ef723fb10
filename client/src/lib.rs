//! The client of Rookery: send with resend until answered, receive in order and once, resume where the device was.
//!
//! [`Client::connect`] gives two handles. [`Client`] sends; [`Events`] is what happens, messages above all, each of which
//! the application confirms. Behind them one task owns the connection, the [`store`] and the two parts that decide
//! without I/O or clock: [`inbox`] and [`outbox`]. A program with an event loop of its own uses those two directly.
//!
//! [`Client::read`] says what the user has read; [`Event::Delivered`] and [`Event::Read`] tell how far others are, and
//! [`Client::group`] how far everybody in a group is: [`Group::reached`] counts. [`Client::pull`] brings what this device does not hold,
//! [`Client::hide`] takes a message out of its user's sight on every device.
//!
//! [`Client::watch`] asks who is there, [`Client::typing`] says that the user is writing; [`Event::Presence`] and [`Event::Typing`] tell of
//! others.
//!
//! Nothing is lost or doubled by a crash of the application either, if it stores first and confirms then: `examples/once.rs`.
//!
//! Trap: a message that is never confirmed is handed out again after a restart, and when
//! [`inbox::Limits::unconfirmed_messages_max`] are unconfirmed no more are handed out.

mod answer;
mod backoff;
mod body;
mod client;
mod connection;
mod event;
mod heartbeat;
pub mod inbox;
mod login;
mod options;
pub mod outbox;
pub mod presence;
pub mod receipts;
mod resolve;
mod retry;
mod session;
pub mod store;
mod token;

pub use answer::{AskError, Group, Page, Reached};
pub use body::{Body, Content, change};
pub use client::{Client, Pending, SendError, Sent, Settings};
pub use event::{Ended, Event, Events, Status};
pub use inbox::Message;
pub use options::{ConnectError, Keep, Options};
pub use resolve::Target;
pub use token::{Token, TokenError};
