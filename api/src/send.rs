//! `POST /api/send`: one message into a chat. On the server's tokio runtime.
//!
//! Trap: without a ClientMsgId nobody can tell a second try from a second message, so there is none.

use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use bytes::Bytes;
use proto::name::{self, Chat};
use proto::state::SendRequest;
use serde::Serialize;

use crate::fields::Fields;
use crate::http::Door;
use crate::refusal::Refusal;

/// The answer to a message that is stored.
#[derive(Debug, Serialize)]
pub struct Sent {
    status: &'static str,
    seq: u64,
    send_time_us: u64,
}

const NAMES: [&str; 4] = ["Chat", "Text", "Sender", "ClientMsgId"];

/// Longest ClientMsgId, bytes.
const CLIENT_MSG_ID_BYTES_MAX: usize = 64;

/// Does it.
pub async fn send(State(door): State<Door>, headers: HeaderMap, body: Bytes) -> Result<Json<Sent>, Refusal> {
    let caller = door.auth.caller(&headers)?;
    let request = read(Fields::of_body(&headers, &body, &NAMES)?)?;
    caller.may_be(&request.sender)?;
    let stored = door.state.send(SendRequest { issued_s: caller.issued_s(), ..request }).await?;
    Ok(Json(Sent { status: "success", seq: stored.seq, send_time_us: stored.time_us }))
}

fn read(mut fields: Fields) -> Result<SendRequest, Refusal> {
    let missing = |field| Refusal::Field(field, "is missing".to_owned());
    let chat = fields.text("Chat")?.ok_or(missing("Chat"))?;
    let text = fields.text("Text")?.ok_or(missing("Text"))?;
    let sender = fields.text("Sender")?.ok_or(missing("Sender"))?;
    let named = fields.text("ClientMsgId")?;
    let chat = pair(&chat)?;
    name::check(&sender).map_err(|error| Refusal::Field("Sender", error.to_string()))?;
    if !chat.pair_members().is_some_and(|(low, high)| low == sender || high == sender) {
        return Err(Refusal::Field("Sender", "is not in this chat".to_owned()));
    }
    if text.is_empty() || text.len() > proto::MESSAGE_BYTES_MAX {
        let why = format!("must be 1 to {} bytes long", proto::MESSAGE_BYTES_MAX);
        return Err(Refusal::Field("Text", why));
    }
    if named.as_ref().is_some_and(|name| !(1..=CLIENT_MSG_ID_BYTES_MAX).contains(&name.len())) {
        let why = format!("must be 1 to {CLIENT_MSG_ID_BYTES_MAX} bytes long");
        return Err(Refusal::Field("ClientMsgId", why));
    }
    Ok(SendRequest {
        sender,
        chat: chat.to_string(),
        body: text.into(),
        name: named.unwrap_or_default(),
        ..SendRequest::default()
    })
}

/// A chat of two.
pub fn pair(chat: &str) -> Result<Chat, Refusal> {
    match Chat::parse(chat) {
        Ok(chat @ Chat::Pair(..)) => Ok(chat),
        Ok(Chat::Group(_)) => Err(Refusal::Field("Chat", "must be two names joined by ':'".to_owned())),
        Err(error) => Err(Refusal::Field("Chat", error.to_string())),
    }
}
