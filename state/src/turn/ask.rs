//! What a frame asks, decoded, and whether a Login may be tried at all. Pure.
//!
//! Trap: a gateway does not look into bodies, so whatever stands in one comes from a client.

use prost::Message;
use proto::Command;
use proto::link::UpFrame;
use proto::name;
use proto::wire::{self, Code};

use super::Gateway;
use super::grant::{Grant, Refused};
use crate::answer;
use crate::core::Core;

/// A frame, decoded.
#[allow(missing_docs)]
pub enum Ask {
    /// With the user's number, once it is known, and what it rests on, once that is judged.
    Login(wire::Login, Option<u64>, Grant),
    Send(wire::Send),
    Sync(wire::Sync),
    Pull(wire::Pull),
    PushAck(wire::PushAck),
    Members(wire::Members),
    Read(wire::Read),
    Watch(wire::Watch),
    Typing(wire::Typing),
    Settings(wire::Settings),
    Closed,
}

/// Reads a frame; the error is for the client.
pub fn decode(frame: &UpFrame) -> Result<Ask, String> {
    fn body<M: Message + Default>(frame: &UpFrame) -> Result<M, String> {
        M::decode(frame.body.clone()).map_err(|error| format!("the body does not decode: {error}"))
    }
    if frame.command == 0 {
        return Ok(Ask::Closed);
    }
    let command = u8::try_from(frame.command).ok().and_then(|byte| Command::try_from(byte).ok());
    match command {
        Some(Command::Login) => body(frame).map(|login| Ask::Login(login, None, Grant::default())),
        Some(Command::Send) => body(frame).map(Ask::Send),
        Some(Command::Sync) => body(frame).map(Ask::Sync),
        Some(Command::Pull) => body(frame).map(Ask::Pull),
        Some(Command::PushAck) => body(frame).map(Ask::PushAck),
        Some(Command::Members) => body(frame).map(Ask::Members),
        Some(Command::Read) => body(frame).map(Ask::Read),
        Some(Command::Watch) => body(frame).map(Ask::Watch),
        Some(Command::Typing) => body(frame).map(Ask::Typing),
        Some(Command::Settings) => body(frame).map(Ask::Settings),
        _ => Err("no such command goes to a state server".to_owned()),
    }
}

/// Whether its client waits for an answer to it. Of the others the next one says as much, or they are of a moment.
pub fn waits_for_answer(ask: &Ask) -> bool {
    !matches!(ask, Ask::PushAck(_) | Ask::Read(_) | Ask::Typing(_) | Ask::Closed)
}

/// An error with the ids by which the client knows what it is about.
pub fn about(ask: &Ask, error: wire::Error) -> wire::Error {
    match ask {
        Ask::Send(send) => wire::Error { stream: send.stream, n: send.n, chat: send.chat.clone(), ..error },
        Ask::Sync(sync) => wire::Error { request: sync.request, ..error },
        Ask::Pull(pull) => wire::Error { request: pull.request, chat: pull.chat.clone(), ..error },
        Ask::Members(asked) => wire::Error { request: asked.request, chat: asked.chat.clone(), ..error },
        Ask::Watch(asked) => wire::Error { request: asked.request, ..error },
        Ask::Settings(asked) => wire::Error { request: asked.request, ..error },
        Ask::Login(..) | Ask::PushAck(_) | Ask::Read(_) | Ask::Typing(_) | Ask::Closed => error,
    }
}

/// Versions, names, and who may log in from where.
pub fn check_login(core: &Core, gateway: &Gateway, login: &wire::Login) -> Result<Grant, Refused> {
    check_fields(login).map_err(|error| Refused { error: Box::new(error), guess: false })?;
    Grant::of(core.tokens.as_ref(), &core.config, gateway, login, || core.unix_ms())
}

fn check_fields(login: &wire::Login) -> Result<(), wire::Error> {
    if !(login.wire_min..=login.wire_max).contains(&proto::WIRE_VERSION) {
        let text = format!("this server speaks wire version {}", proto::WIRE_VERSION);
        return Err(answer::closing(Code::UnsupportedVersion, text));
    }
    for (what, text) in [("user", &login.user), ("device", &login.device)] {
        name::check(text).map_err(|error| answer::closing(Code::BadName, format!("{what}: {error}")))?;
    }
    if !(1..=proto::NUMBER_MAX).contains(&login.attempt) {
        return Err(answer::closing(Code::BadRequest, "attempt is 1 to 2^53-1"));
    }
    Ok(())
}
