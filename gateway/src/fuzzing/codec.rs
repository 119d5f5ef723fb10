//! The codec under any bytes: frames come out the same however the bytes arrive, and what decodes survives being encoded.
//!
//! An input is: one byte for the frame limit, one for the length of the pieces, and the stream. The stream is read as one message
//! of the gateway-state link as well.

use bytes::Bytes;
use prost::Message;
use proto::command::ServerFrame;
use proto::name::{self, Chat};
use proto::{Command, frame, link, wire};

use crate::bridge;

/// Longest stream, bytes: one frame of the largest size and as much of another.
const STREAM_BYTES_MAX: usize = 2 * proto::FRAME_BYTES_MAX;

/// Runs one input.
pub fn run(input: &[u8]) {
    let [limit, piece, stream @ ..] = input else { return };
    if stream.len() > STREAM_BYTES_MAX {
        return;
    }
    let limit_bytes = [proto::FRAME_BYTES_MAX, proto::LOGIN_FRAME_BYTES_MAX, 64, 4][usize::from(*limit % 4)];
    let whole = frames(stream, stream.len().max(1), limit_bytes);
    assert_eq!(frames(stream, usize::from(*piece) + 1, limit_bytes), whole, "cut in pieces");
    for (command, body) in &whole.frames {
        frame_holds(*command, body);
    }
    round_trip::<link::Up>(stream);
    if let Some(down) = round_trip::<link::Down>(stream)
        && let Some(link::down::Kind::Batch(batch)) = down.kind
    {
        // Columns of a push may be of different lengths.
        let (announced, items) = bridge::deliveries(batch);
        assert!(items.count() <= announced);
    }
}

/// What a reader of the stream saw.
#[derive(Debug, PartialEq)]
struct Seen {
    frames: Vec<(u8, Vec<u8>)>,
    end: Result<Vec<u8>, frame::TooLarge>,
}

/// Reads the stream in pieces, keeping what is not whole yet.
fn frames(stream: &[u8], piece_bytes: usize, limit_bytes: usize) -> Seen {
    let (mut frames, mut kept) = (Vec::new(), Vec::new());
    for piece in stream.chunks(piece_bytes) {
        kept.extend_from_slice(piece);
        let mut used = 0;
        loop {
            match frame::cut(&kept[used..], limit_bytes) {
                Ok(Some(frame)) => {
                    assert!(frame.wire_bytes() <= limit_bytes);
                    used += frame.wire_bytes();
                    frames.push((frame.command, frame.body.to_vec()));
                }
                Ok(None) => break,
                Err(error) => return Seen { frames, end: Err(error) },
            }
        }
        kept.drain(..used);
        assert!(kept.len() < limit_bytes.max(frame::HEADER_BYTES), "what is kept is less than a frame");
    }
    Seen { frames, end: Ok(kept) }
}

fn frame_holds(command: u8, body: &[u8]) {
    let from_server = ServerFrame::decode(command, Bytes::copy_from_slice(body)).is_ok();
    let Ok(known) = Command::try_from(command) else {
        return assert!(!from_server, "nobody knows command {command}");
    };
    let decodes = match known {
        Command::Login => framed::<wire::Login>(known, body).is_some_and(|login| {
            let _ = (name::check(&login.user), name::check(&login.device));
            true
        }),
        Command::LoginAck => framed::<wire::LoginAck>(known, body).is_some(),
        Command::Ping => framed::<wire::Ping>(known, body).is_some(),
        Command::Pong => framed::<wire::Pong>(known, body).is_some(),
        Command::Send => framed::<wire::Send>(known, body).is_some_and(|send| {
            chat_has_one_spelling(&send.chat);
            true
        }),
        Command::SendAck => framed::<wire::SendAck>(known, body).is_some(),
        Command::Sync => framed::<wire::Sync>(known, body).is_some(),
        Command::SyncAck => framed::<wire::SyncAck>(known, body).is_some(),
        Command::Pull => framed::<wire::Pull>(known, body).is_some(),
        Command::PullAck => framed::<wire::PullAck>(known, body).is_some(),
        Command::PushAck => framed::<wire::PushAck>(known, body).is_some(),
        Command::Read => framed::<wire::Read>(known, body).is_some(),
        Command::Receipt => framed::<wire::Receipt>(known, body).is_some(),
        Command::Push => framed::<wire::Push>(known, body).is_some(),
        Command::Resync => framed::<wire::Resync>(known, body).is_some(),
        Command::Kick => framed::<wire::Kick>(known, body).is_some(),
        Command::GoAway => framed::<wire::GoAway>(known, body).is_some(),
        Command::Error => framed::<wire::Error>(known, body).is_some(),
        Command::Members => framed::<wire::Members>(known, body).is_some(),
        Command::MembersAck => framed::<wire::MembersAck>(known, body).is_some(),
        Command::Watch => framed::<wire::Watch>(known, body).is_some(),
        Command::Presence => framed::<wire::Presence>(known, body).is_some(),
        Command::Typing => framed::<wire::Typing>(known, body).is_some(),
        Command::TypingNote => framed::<wire::TypingNote>(known, body).is_some(),
        Command::Settings => framed::<wire::Settings>(known, body).is_some(),
        Command::SettingsAck => framed::<wire::SettingsAck>(known, body).is_some(),
    };
    assert_eq!(from_server, decodes && !known.is_from_client(), "{known:?}");
}

fn chat_has_one_spelling(text: &str) {
    if let Ok(chat) = Chat::parse(text) {
        let spelled = chat.to_string();
        assert_eq!(Chat::parse(&spelled).as_ref(), Ok(&chat));
        assert_eq!(Chat::parse(&spelled).map(|chat| chat.to_string()), Ok(spelled));
    }
}

/// The body's message, if it is one; then its frame is cut and decoded to the same again.
fn framed<M: Message + Default + PartialEq + std::fmt::Debug>(command: Command, body: &[u8]) -> Option<M> {
    let message = round_trip::<M>(body)?;
    let encoded = frame::encode(command, &message);
    let again = frame::cut(&encoded, frame::BODY_BYTES_WIRE_MAX).unwrap().expect("a whole frame");
    assert_eq!((again.command, again.wire_bytes()), (command as u8, encoded.len()));
    assert_eq!(again.body, message.encode_to_vec());
    Some(message)
}

/// Decodes, encodes and decodes again.
fn round_trip<M: Message + Default + PartialEq + std::fmt::Debug>(bytes: &[u8]) -> Option<M> {
    let message = M::decode(bytes).ok()?;
    let encoded = message.encode_to_vec();
    // A negative enum takes five bytes at least and is written with ten.
    assert!(encoded.len() <= 2 * bytes.len(), "{} bytes became {}", bytes.len(), encoded.len());
    assert!(M::decode(&*encoded).as_ref() == Ok(&message), "not the same again");
    Some(message)
}
