//! What a worker and the bridge decide about one delivery or one frame, modelled after `deliver.rs` and `bridge.rs` there. Pure.
//!
//! Trap: the two must stay alike; a simulation of other rules shows nothing about ours.

use gateway::batch::DownItem;
use gateway::connection::Stage;
use prost::Message;
use proto::link::{Gone, UpFrame};
use proto::wire::{self, Code};
use proto::{Command, frame};

/// A client's connection, as far as its worker knows it.
#[allow(missing_docs)]
pub struct Conn {
    pub pipe: usize,
    pub generation: u16,
    pub stage: Stage,
    pub user: u64,
    pub device: u32,
    pub binding: u64,
    /// It does not read: pushes are skipped until then, and a Resync follows.
    pub slow_until_us: u64,
    pub owes_resync: bool,
}

/// As the worker decides it, `deliver.rs` there.
pub fn accepts(conn: &Conn, item: &DownItem) -> bool {
    match (conn.stage, &item.bind) {
        (Stage::Closing | Stage::Fresh, _) => false,
        (Stage::LoggingIn, Some(_)) => item.login == conn.binding,
        (Stage::Bound, Some(bind)) => conn.user == bind.user && conn.binding == bind.binding,
        (Stage::Bound, None) => conn.user == item.user,
        (Stage::LoggingIn, None) => item.user == 0 && item.login == conn.binding,
    }
}

/// Notes what must be told to whoever sent it.
pub fn note_gone(item: &DownItem, gone: &mut Vec<Gone>) {
    if item.push || item.bind.is_some() {
        gone.push(gone_of(item));
    }
}

/// What is told of it.
pub fn gone_of(item: &DownItem) -> Gone {
    let bind = item.bind.unwrap_or_default();
    Gone {
        connection: item.connection,
        user: item.user.max(bind.user),
        device: bind.device,
        binding: bind.binding,
        pushed: item.push,
    }
}

/// As the bridge answers what no state server can take.
pub fn refuse(frame: &UpFrame, retry_after_ms: u64) -> Option<DownItem> {
    let command = Command::try_from(u8::try_from(frame.command).ok()?).ok()?;
    let mut error = wire::Error {
        code: Code::Unavailable as i32,
        command: frame.command,
        retry_after_ms: retry_after_ms as u32,
        closing: command == Command::Login,
        ..Default::default()
    };
    match command {
        Command::Login => {}
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
        bind: None,
        close: error.closing,
        login: frame.binding,
        push: false,
        guess: false,
        later: false,
        refused: None,
    })
}
