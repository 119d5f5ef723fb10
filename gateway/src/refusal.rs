//! What the gateway answers by itself to a frame that no state server can take. Pure.
//!
//! Trap: an answer names what it is about, or its client would not know which of its questions is over.

use prost::Message;
use proto::link::UpFrame;
use proto::wire::{self, Code};
use proto::{Command, frame};

use crate::batch::DownItem;
use crate::connection::reason_text;

const LOGIN_REFUSED_TEXT: &str =
    "more are logging in than are let in at a time; come back after retry_after_ms";

/// The answer; a Login's ends its connection. None where the client waits for none.
pub fn refusal(frame: &UpFrame, code: Code, retry_after_ms: u64) -> Option<DownItem> {
    let command = Command::try_from(u8::try_from(frame.command).ok()?).ok()?;
    let mut error = wire::Error {
        code: code as i32,
        text: reason_text(code).to_owned(),
        command: frame.command,
        retry_after_ms: u32::try_from(retry_after_ms).unwrap_or(u32::MAX),
        ..Default::default()
    };
    match command {
        Command::Login => {
            error.closing = true;
            error.text = LOGIN_REFUSED_TEXT.to_owned();
        }
        Command::Send => {
            let send = wire::Send::decode(frame.body.clone()).ok()?;
            (error.stream, error.n, error.chat) = (send.stream, send.n, send.chat);
        }
        Command::Sync => error.request = wire::Sync::decode(frame.body.clone()).ok()?.request,
        Command::Pull => error.request = wire::Pull::decode(frame.body.clone()).ok()?.request,
        Command::Members => error.request = wire::Members::decode(frame.body.clone()).ok()?.request,
        Command::Watch => error.request = wire::Watch::decode(frame.body.clone()).ok()?.request,
        Command::Settings => error.request = wire::Settings::decode(frame.body.clone()).ok()?.request,
        _ => return None,
    }
    Some(DownItem {
        connection: frame.connection,
        user: frame.user,
        frames: frame::encode(Command::Error, &error),
        close: error.closing,
        login: frame.binding,
        refused: Some(code),
        ..DownItem::default()
    })
}
