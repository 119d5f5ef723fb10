//! The frames that a state server sends to clients. Pure.
//!
//! Trap: an answer names whom it is for. The gateway delivers only where the connection is still bound to that user.

use bytes::{Bytes, BytesMut};
use prost::Message;
use proto::link::{Bind, DownFrame, UpFrame};
use proto::wire::{self, Code};
use proto::{Command, frame};

use crate::store::Moved;

/// An answer to the connection that sent `to`.
pub fn reply<M: Message>(to: &UpFrame, command: Command, body: &M) -> DownFrame {
    DownFrame {
        connection: to.connection,
        user: to.user,
        frames: frame::encode(command, body),
        bind: None,
        close: false,
        login: if to.user == 0 { to.binding } else { 0 },
        guess: false,
    }
}

/// A refusal of one frame; `closing` in it closes the connection.
pub fn error(to: &UpFrame, error: wire::Error) -> DownFrame {
    let error = wire::Error { command: to.command, ..error };
    DownFrame { close: error.closing, ..reply(to, Command::Error, &error) }
}

/// An error with code and text.
pub fn because(code: Code, text: impl Into<String>) -> wire::Error {
    wire::Error { code: code as i32, text: text.into(), ..Default::default() }
}

/// An error that ends the connection.
pub fn closing(code: Code, text: impl Into<String>) -> wire::Error {
    wire::Error { closing: true, ..because(code, text) }
}

/// An error about one Send.
pub fn about_send(send: &wire::Send, code: Code, text: impl Into<String>) -> wire::Error {
    wire::Error { stream: send.stream, n: send.n, chat: send.chat.clone(), ..because(code, text) }
}

/// The store did not answer; try again.
pub fn unavailable(retry_after_ms: u32) -> wire::Error {
    wire::Error { retry_after_ms, ..because(Code::Unavailable, "the store does not answer right now") }
}

/// The answer to a login that succeeded.
pub fn logged_in(to: &UpFrame, bind: Bind, ack: &wire::LoginAck) -> DownFrame {
    DownFrame { user: 0, bind: Some(bind), ..reply(to, Command::LoginAck, ack) }
}

/// The end of a connection that a login elsewhere or an operator has ended.
pub fn kick(connection: u64, user: u64, code: Code) -> DownFrame {
    let text = match code {
        Code::TooManyDevices => "so many devices of this user are logged in that the oldest login had to end",
        Code::Ended => "an operator has ended this connection",
        Code::TokenRevoked => "the token that this login rests on was revoked; log in with a newer one",
        _ => "this device has logged in on another connection",
    };
    let kick = wire::Kick { code: code as i32, text: text.to_owned() };
    DownFrame {
        connection,
        user,
        frames: frame::encode(Command::Kick, &kick),
        close: true,
        ..Default::default()
    }
}

/// The end of a connection to which no route leads any more: its client is to log in again.
pub fn end(connection: u64, user: u64) -> DownFrame {
    let error = closing(Code::Unavailable, "this login is not known any more; log in again");
    DownFrame {
        connection,
        user,
        frames: frame::encode(Command::Error, &error),
        close: true,
        ..Default::default()
    }
}

/// How far a user has a chat, as everybody gets it who is told.
pub fn receipt(chat: &str, history: u64, user: &str, moved: Moved) -> Bytes {
    let Moved { delivered, read, .. } = moved;
    let body = wire::Receipt { chat: chat.to_owned(), history, user: user.to_owned(), delivered, read };
    frame::encode(Command::Receipt, &body)
}

/// One push, as every receiver gets it. `ack_within_ms`: over so long they are to acknowledge it; 0: at once.
pub fn push(chat: &str, history: u64, message: wire::Message, ack_within_ms: u32) -> Bytes {
    let body = wire::Push { chat: chat.to_owned(), history, message: Some(message), ack_within_ms };
    let mut out = BytesMut::new();
    frame::put(Command::Push, &body, &mut out);
    out.freeze()
}
