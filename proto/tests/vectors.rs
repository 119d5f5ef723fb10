//! The codec against `vectors/wire.json`, frames in hex with what they say. A client in another language reads the same
//! file.
//!
//! Trap: a vector is a promise. If one fails, the code is wrong, or the wire version must change.

mod common;
mod page;

use std::collections::BTreeMap;

use common::{Fields, unhex};
use prost::Message;
use proto::name::{self, Chat, NameError};
use proto::{Command, frame, wire};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Vectors {
    wire_version: u32,
    #[allow(dead_code)]
    about: Vec<String>,
    frames: Vec<Frame>,
    loose: Vec<Frame>,
    invalid: Vec<Invalid>,
    names: Names,
    chats: Chats,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Frame {
    name: String,
    command: String,
    meaning: String,
    fields: serde_json::Value,
    hex: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Invalid {
    name: String,
    expect: String,
    meaning: String,
    hex: String,
    #[serde(default = "frame_bytes_max")]
    limit_bytes: usize,
}

fn frame_bytes_max() -> usize {
    proto::FRAME_BYTES_MAX
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Names {
    valid: Vec<String>,
    invalid: Vec<BadName>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BadName {
    text: String,
    reason: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Chats {
    valid: Vec<GoodChat>,
    invalid: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GoodChat {
    text: String,
    sorted: String,
}

fn vectors() -> Vectors {
    let vectors: Vectors = serde_json::from_str(include_str!("../vectors/wire.json")).expect("wire.json");
    assert_eq!(vectors.wire_version, proto::WIRE_VERSION);
    vectors
}

/// Decodes with the generated type of a command and encodes again.
fn through_the_codec(command: Command, body: &[u8]) -> Result<Vec<u8>, prost::DecodeError> {
    fn through<M: Message + Default>(command: Command, body: &[u8]) -> Result<Vec<u8>, prost::DecodeError> {
        Ok(frame::encode(command, &M::decode(body)?).to_vec())
    }
    match command {
        Command::Login => through::<wire::Login>(command, body),
        Command::LoginAck => through::<wire::LoginAck>(command, body),
        Command::Ping => through::<wire::Ping>(command, body),
        Command::Pong => through::<wire::Pong>(command, body),
        Command::Send => through::<wire::Send>(command, body),
        Command::SendAck => through::<wire::SendAck>(command, body),
        Command::Sync => through::<wire::Sync>(command, body),
        Command::SyncAck => through::<wire::SyncAck>(command, body),
        Command::Pull => through::<wire::Pull>(command, body),
        Command::PullAck => through::<wire::PullAck>(command, body),
        Command::PushAck => through::<wire::PushAck>(command, body),
        Command::Read => through::<wire::Read>(command, body),
        Command::Receipt => through::<wire::Receipt>(command, body),
        Command::Push => through::<wire::Push>(command, body),
        Command::Resync => through::<wire::Resync>(command, body),
        Command::Kick => through::<wire::Kick>(command, body),
        Command::GoAway => through::<wire::GoAway>(command, body),
        Command::Error => through::<wire::Error>(command, body),
        Command::Members => through::<wire::Members>(command, body),
        Command::MembersAck => through::<wire::MembersAck>(command, body),
        Command::Watch => through::<wire::Watch>(command, body),
        Command::Presence => through::<wire::Presence>(command, body),
        Command::Typing => through::<wire::Typing>(command, body),
        Command::TypingNote => through::<wire::TypingNote>(command, body),
        Command::Settings => through::<wire::Settings>(command, body),
        Command::SettingsAck => through::<wire::SettingsAck>(command, body),
    }
}

/// The frame that `wire.md` alone makes of the fields.
fn by_the_page(
    messages: &BTreeMap<String, Fields>,
    enums: &BTreeMap<String, u64>,
    vector: &Frame,
    command: Command,
) -> Vec<u8> {
    let body = common::encode(messages, enums, &vector.command, &vector.fields);
    let mut out = (body.len() as u32).to_be_bytes()[1..].to_vec();
    out.push(command as u8);
    out.extend(body);
    out
}

fn cut<'a>(bytes: &'a [u8], name: &str) -> (Command, &'a [u8]) {
    let frame = frame::cut(bytes, proto::FRAME_BYTES_MAX).expect(name).expect(name);
    assert_eq!(frame.wire_bytes(), bytes.len(), "{name}");
    (Command::try_from(frame.command).expect(name), frame.body)
}

#[test]
fn frames_are_encoded_and_decoded_as_written() {
    let (vectors, messages, enums) = (vectors(), common::messages(), common::enums());
    for vector in &vectors.frames {
        let bytes = unhex(&vector.hex);
        let (command, body) = cut(&bytes, &vector.name);
        assert_eq!(format!("{command:?}"), vector.command, "{}", vector.name);
        assert!(!vector.meaning.is_empty(), "{}", vector.name);
        assert_eq!(by_the_page(&messages, &enums, vector, command), bytes, "{} by wire.md", vector.name);
        assert_eq!(through_the_codec(command, body), Ok(bytes.clone()), "{}", vector.name);
    }
    for command in Command::ALL {
        let name = format!("{command:?}");
        assert!(vectors.frames.iter().any(|vector| vector.command == name), "no vector for {name}");
    }
}

#[test]
fn what_is_written_loosely_says_the_same() {
    let (vectors, messages, enums) = (vectors(), common::messages(), common::enums());
    for vector in &vectors.loose {
        let bytes = unhex(&vector.hex);
        let (command, body) = cut(&bytes, &vector.name);
        let tidy = by_the_page(&messages, &enums, vector, command);
        assert_ne!(tidy, bytes, "{} is written tidily", vector.name);
        assert_eq!(through_the_codec(command, body), Ok(tidy), "{}", vector.name);
    }
}

#[test]
fn a_field_says_what_its_name_says() {
    let vectors = vectors();
    let body = |name: &str| {
        let vector = vectors.frames.iter().find(|vector| vector.name == name).expect(name);
        unhex(&vector.hex)[frame::HEADER_BYTES..].to_vec()
    };
    let send = wire::Send::decode(&*body("send")).unwrap();
    assert_eq!((send.stream, send.n), (0x1122_3344_5566_7788, 1));
    assert_eq!((send.chat.as_str(), &*send.body), ("bob:alice", &b"hello"[..]));
    let error = wire::Error::decode(&*body("error, wrong n")).unwrap();
    assert_eq!((error.code(), error.n, error.expected), (wire::Code::OutOfOrder, 5, 3));
    let ack = wire::LoginAck::decode(&*body("login answered")).unwrap();
    assert_eq!((ack.durability(), ack.unanswered_max), (wire::Durability::Strict, 32));
}

#[test]
fn frames_behind_each_other_are_cut_apart() {
    let vectors = vectors();
    let stream: Vec<u8> = vectors.frames.iter().flat_map(|vector| unhex(&vector.hex)).collect();
    let mut rest = &stream[..];
    for vector in &vectors.frames {
        let frame = frame::cut(rest, proto::FRAME_BYTES_MAX).unwrap().expect(&vector.name);
        let (one, others) = rest.split_at(frame.wire_bytes());
        assert_eq!(one, unhex(&vector.hex), "{}", vector.name);
        rest = others;
    }
    assert!(rest.is_empty());
}

#[test]
fn invalid_bytes_get_what_they_deserve() {
    for vector in vectors().invalid {
        let bytes = unhex(&vector.hex);
        let got = match frame::cut(&bytes, vector.limit_bytes) {
            Ok(None) => "MORE",
            Err(_) => "FRAME_TOO_LARGE",
            Ok(Some(frame)) => match Command::try_from(frame.command) {
                Ok(command) if command.is_from_client() => match through_the_codec(command, frame.body) {
                    Ok(_) => "valid",
                    Err(_) => "BAD_BODY",
                },
                _ => "UNKNOWN_COMMAND",
            },
        };
        assert_eq!(got, vector.expect, "{}: {}", vector.name, vector.meaning);
    }
}

#[test]
fn names_and_chats() {
    let vectors = vectors();
    for name in &vectors.names.valid {
        assert_eq!(name::check(name), Ok(()), "{name:?}");
    }
    for BadName { text, reason } in &vectors.names.invalid {
        let got = match name::check(text) {
            Ok(()) => "none",
            Err(NameError::Length) => "length",
            Err(NameError::Character) => "character",
            Err(NameError::Group) => "group",
            Err(NameError::Chat) => "chat",
        };
        assert_eq!(got, reason, "{text:?}");
    }
    for GoodChat { text, sorted } in &vectors.chats.valid {
        assert_eq!(Chat::parse(text).map(|chat| chat.to_string()).as_ref(), Ok(sorted), "{text:?}");
    }
    for text in &vectors.chats.invalid {
        assert!(Chat::parse(text).is_err(), "{text:?}");
    }
}
