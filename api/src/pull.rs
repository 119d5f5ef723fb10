//! `GET /api/pull`: messages of a chat, page by page, in either direction. On the server's tokio runtime.
//!
//! Trap: it is GET with a body, which not every client can write and not every proxy lets through; so each field may stand
//! in the query as well, and there it wins.

use axum::Json;
use axum::extract::{RawQuery, State};
use axum::http::HeaderMap;
use bytes::Bytes;
use proto::name::Chat;
use proto::state::{PullRequest, StoredMessage};
use serde::Serialize;

use crate::fields::Fields;
use crate::http::Door;
use crate::refusal::Refusal;
use crate::send::pair;

/// A page.
#[derive(Debug, Serialize)]
pub struct Page {
    messages: Vec<Message>,
    has_more: bool,
    next_cursor: u64,
}

#[derive(Debug, Serialize)]
struct Message {
    chat: String,
    text: String,
    sender: String,
    send_time: u64,
    send_time_us: u64,
    seq: u64,
    /// Of anything but a text.
    #[serde(skip_serializing_if = "is_text")]
    kind: u32,
}

fn is_text(kind: &u32) -> bool {
    *kind == 0
}

const NAMES: [&str; 4] = ["Chat", "Cursor", "Limit", "Reverse"];

/// What a request asks for.
#[derive(Debug, Default, PartialEq)]
struct Asked {
    chat: Option<Chat>,
    cursor: Option<u64>,
    limit: Option<u64>,
    reverse: Option<bool>,
}

/// Does it.
pub async fn pull(
    State(door): State<Door>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Json<Page>, Refusal> {
    let caller = door.auth.caller(&headers)?;
    let body = Asked::read(Fields::of_body(&headers, &body, &NAMES)?)?;
    let asked = Asked::read(Fields::of_query(query.as_deref(), &NAMES)?)?.or(body);
    let chat = asked.chat.ok_or_else(|| Refusal::Field("Chat", "is missing".to_owned()))?;
    let members = chat.pair_members().unwrap_or_default();
    let cursor = asked.cursor.unwrap_or(0);
    let limit = match asked.limit {
        None | Some(0) => door.pull_limit_default,
        Some(limit) => u32::try_from(limit).unwrap_or(u32::MAX).min(door.pull_limit_max),
    };
    let request = PullRequest {
        reader: caller.reader(members)?.to_owned(),
        chat: chat.to_string(),
        cursor,
        limit,
        reverse: asked.reverse.unwrap_or(false),
        issued_s: caller.issued_s(),
    };
    let page = door.state.pull(request).await?;
    let next_cursor = page.messages.last().map_or(cursor, |last| last.seq);
    let messages = page.messages.into_iter().map(|stored| message(&page.chat, stored)).collect();
    Ok(Json(Page { messages, has_more: page.has_more, next_cursor }))
}

fn message(chat: &str, stored: StoredMessage) -> Message {
    Message {
        chat: chat.to_owned(),
        // Clients may send any bytes.
        text: String::from_utf8_lossy(&stored.body).into_owned(),
        sender: stored.sender,
        send_time: stored.time_us / 1_000_000,
        send_time_us: stored.time_us,
        seq: stored.seq,
        kind: stored.kind,
    }
}

impl Asked {
    /// Each field is looked at, also where the other place wins.
    fn read(mut fields: Fields) -> Result<Asked, Refusal> {
        let cursor = fields.number("Cursor")?;
        if cursor.is_some_and(|cursor| cursor > proto::NUMBER_MAX) {
            return Err(Refusal::Field("Cursor", "must be below 2^53".to_owned()));
        }
        Ok(Asked {
            chat: fields.text("Chat")?.map(|chat| pair(&chat)).transpose()?,
            cursor,
            limit: fields.number("Limit")?,
            reverse: fields.flag("Reverse")?,
        })
    }

    /// Field by field.
    fn or(self, other: Asked) -> Asked {
        Asked {
            chat: self.chat.or(other.chat),
            cursor: self.cursor.or(other.cursor),
            limit: self.limit.or(other.limit),
            reverse: self.reverse.or(other.reverse),
        }
    }
}
