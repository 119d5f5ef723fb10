//! What the store said of a batch, made into answers. On the state server's thread.
//!
//! Trap: outcomes belong to steps by the range that each step noted when its operations were put together. Every
//! operation is used, in order, or the next step would read somebody else's.

mod members;
mod rest;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use prost::Message;
use proto::Command;
use proto::link::{Bind, DownFrame, UpFrame};
use proto::wire::{self, Code};

use crate::answer;
use crate::core::Core;
use crate::fan_out::{Accepted, UNKNOWN};
use crate::ghost::From;
use crate::marks;
use crate::store::{Appended, Bound, Head, MessageId, Outcome, Page, Standing, StoreError, read};
use crate::turn::{Gateway, Grant, Outcomes, Planned, Step, not_a_member};
use crate::visible::{self, Seen};

pub use rest::{has_more, rest};

/// Makes the answers, in the order of the frames.
pub fn settle(
    core: &Arc<Core>,
    gateway: &Gateway,
    steps: Vec<Step>,
    mut outcomes: Vec<Outcome>,
    out: &mut Outcomes,
    began: Instant,
) {
    let missing = || Err(StoreError::Unknown("not asked".to_owned()));
    // The clock is read once: a batch may be hundreds of logins.
    let took_s = began.elapsed().as_secs_f64();
    out.answers.reserve(steps.len());
    for step in steps {
        let Step { frame, user_name, ask, ops } = step;
        if let Planned::Members { members, .. } = ask {
            // Others may have the same outcomes.
            out.answers.push(members::answer(core, gateway, (&frame, &user_name), members, &outcomes[ops]));
            continue;
        }
        let mut results = outcomes[ops].iter_mut().map(|slot| std::mem::replace(slot, missing()));
        match ask {
            Planned::Login { login, device, number, grant } => {
                let bound = results.next().unwrap_or_else(missing).and_then(|answer| read::bound(Ok(answer)));
                login_answer(core, gateway, &frame, (&login, grant), (number, device), bound, out);
                core.metrics.login.observe(took_s);
            }
            Planned::Send { send, chat, .. } => {
                let appended =
                    results.next().unwrap_or_else(missing).and_then(|answer| read::appended(Ok(answer)));
                send_answer(core, &frame, send, chat.to_string(), user_name, appended, out);
            }
            Planned::Sync { sync, chats, more } => {
                let heads: Result<Vec<Head>, StoreError> =
                    results.by_ref().take(chats.len()).map(read::head).collect();
                let standings: Result<Vec<Standing>, StoreError> = results.map(read::standing).collect();
                let heads = heads.and_then(|heads| Ok(seen(&chats, heads, standings?, &sync.cursors)));
                out.answers.push(sync_answer(
                    core,
                    gateway,
                    (&frame, &user_name),
                    sync,
                    (chats, more),
                    heads,
                ));
            }
            Planned::Pull { pull, chat, limit } => {
                let page = results.next().unwrap_or_else(missing).and_then(|answer| read::page(Ok(answer)));
                let page = match (page, results.next().map(read::standing)) {
                    (Ok(page), None) => {
                        let begins = if page.since > 0 { page.since + 1 } else { 0 };
                        Ok(Some((page, begins)))
                    }
                    (Ok(page), Some(Ok(standing))) => Ok(visible::page(page, &standing, (&pull).into())),
                    (Err(error), _) | (_, Some(Err(error))) => Err(error),
                };
                out.answers.push(pull_answer(core, gateway, &frame, pull, chat.to_string(), limit, page));
            }
            Planned::Members { .. } => {}
            Planned::Ghost(end) => out.answers.push(end),
            Planned::Closed => {
                core.presence.closed(frame.connection, frame.user);
                if let Some(Err(error)) = results.next() {
                    core.store_failed(&error);
                    marks::unbind_later(core, (frame.user, frame.connection));
                }
            }
        }
    }
}

fn login_answer(
    core: &Core,
    gateway: &Gateway,
    frame: &UpFrame,
    (login, grant): (&wire::Login, Grant),
    (number, device): (u64, u32),
    bound: Result<Bound, StoreError>,
    out: &mut Outcomes,
) {
    match bound {
        Ok(Bound::Yes { replaced, evicted }) => {
            let ack = wire::LoginAck {
                wire: proto::WIRE_VERSION,
                user_id: number,
                device_id: device,
                server_time_us: core.unix_us(),
                heartbeat_ms: gateway.heartbeat_ms,
                durability: core.durability() as i32,
                message_bytes_max: message_bytes_max(
                    core.config.limits.message_bytes_max,
                    gateway.frame_bytes_max,
                ),
                frame_bytes_max: gateway.frame_bytes_max,
                unanswered_max: proto::UNANSWERED_MAX as u32,
            };
            let valid_ms = grant.valid_ms(|| core.unix_ms());
            let bind = Bind { user: number, device, binding: login.attempt, valid_ms };
            core.metrics.logins.inc();
            core.presence.changed(number);
            out.answers.push(answer::logged_in(frame, bind, &ack));
            out.elsewhere.extend(replaced.map(|connection| answer::kick(connection, number, Code::Replaced)));
            out.elsewhere
                .extend(evicted.map(|connection| answer::kick(connection, number, Code::TooManyDevices)));
        }
        Ok(Bound::Stale { stored }) => {
            let text = "this device has logged in with a higher attempt";
            let stale = wire::Error { expected: stored, ..answer::closing(Code::StaleAttempt, text) };
            out.answers.push(answer::error(frame, stale));
        }
        Ok(Bound::Retired) => {
            // What is remembered of this name here is of somebody who was deleted.
            core.users.forget_user(&login.user, number);
            let text = "this user is being deleted, or was; try again";
            let retry_after_ms = core.config.limits.retry_after_ms;
            let error = wire::Error { retry_after_ms, ..answer::closing(Code::Unavailable, text) };
            out.answers.push(answer::error(frame, error));
        }
        Ok(Bound::Revoked) => {
            core.metrics.logins_refused.inc();
            let text = "the token was revoked; log in with a newer one";
            out.answers.push(answer::error(frame, answer::closing(Code::TokenRevoked, text)));
        }
        Err(error) => {
            core.store_failed(&error);
            // A route may stand there. Removed from here, it might be that of the same login, which the gateway has given to another server
            // meanwhile because this one's stream broke; and then its user is pushed nothing. So the gateway is told whose connection it
            // ends, and says when it has.
            let error =
                wire::Error { closing: true, ..answer::unavailable(core.config.limits.retry_after_ms) };
            let bind = Bind { user: number, device, binding: login.attempt, valid_ms: 0 };
            out.answers.push(DownFrame { bind: Some(bind), ..answer::error(frame, error) });
        }
    }
}

/// What a Send or a Push holds beside its body: header, chat, sender, numbers.
const MESSAGE_OVERHEAD_BYTES: u32 = 512;

/// A Send with the longest body that the client is told of fits the longest frame that this gateway takes; else the client
/// would send it again and again, and be closed each time.
fn message_bytes_max(of_state: usize, frame_bytes_max: u32) -> u32 {
    // 0: a gateway that does not say.
    let of_frame = if frame_bytes_max == 0 { u32::MAX } else { frame_bytes_max };
    let fits = of_frame.saturating_sub(MESSAGE_OVERHEAD_BYTES).max(1);
    u32::try_from(of_state).unwrap_or(u32::MAX).min(fits)
}

fn send_answer(
    core: &Core,
    frame: &UpFrame,
    send: wire::Send,
    chat: String,
    sender: String,
    appended: Result<Appended, StoreError>,
    out: &mut Outcomes,
) {
    let refused = |code: Code, text: &str| answer::about_send(&send, code, text);
    let error = match appended {
        Ok(Appended::Stored { seq, time_us, history, version, again }) => {
            let id = MessageId::Numbered { stream: send.stream, n: send.n };
            core.doubts.settled((&chat, &sender, &id));
            let ack =
                wire::SendAck { stream: send.stream, n: send.n, chat: chat.clone(), seq, time_us, history };
            out.answers.push(answer::reply(frame, Command::SendAck, &ack));
            core.metrics.sends.inc();
            if !again {
                // An answer that is given again tells the history of its time.
                core.histories.note(&chat, history);
            }
            let message = wire::Message { seq, sender, time_us, body: send.body, kind: send.kind };
            // What is answered again was stored in some version before.
            let version = if again && chat.starts_with('#') { UNKNOWN } else { version };
            out.accepted.push(Accepted {
                chat,
                history,
                message,
                version,
                again,
                from: From::of(frame),
                at: Instant::now(),
                held: None,
                routes: None,
                room: None,
            });
            return;
        }
        Ok(Appended::Refused(code)) => refused(code, "refused for ever; the id is used up"),
        Ok(Appended::Expected(n)) => wire::Error {
            expected: n,
            ..refused(Code::OutOfOrder, "another n comes first in this stream and chat")
        },
        Ok(Appended::TooOld) => refused(Code::TooOld, "answered so long ago that the answer is forgotten"),
        // Of what comes by other ways: clients send numbers, and rest on their logins.
        Ok(Appended::Conflict | Appended::Revoked) => {
            refused(Code::BadRequest, "this id was given to another message")
        }
        // A fault that the tortures must find.
        Err(_) if crpc::failpoint::switch("ack_before_persist") => {
            let (seq, time_us, history) = (1, core.unix_us(), 1);
            let ack = wire::SendAck { stream: send.stream, n: send.n, chat, seq, time_us, history };
            out.answers.push(answer::reply(frame, Command::SendAck, &ack));
            return;
        }
        Err(error) => {
            core.store_failed(&error);
            let retry_after_ms = core.config.limits.retry_after_ms;
            wire::Error {
                retry_after_ms,
                ..refused(Code::Unavailable, "the store does not answer right now")
            }
        }
    };
    out.answers.push(answer::error(frame, error));
}

fn sync_answer(
    core: &Core,
    gateway: &Gateway,
    (frame, user_name): (&UpFrame, &str),
    sync: wire::Sync,
    (chats, more): (Vec<String>, bool),
    heads: Result<Vec<Seen>, StoreError>,
) -> DownFrame {
    let unread = more && chats.is_empty();
    let heads = match heads {
        Ok(heads) if !unread => heads,
        _ => {
            let error = answer::unavailable(core.config.limits.retry_after_ms);
            return answer::error(frame, wire::Error { request: sync.request, ..error });
        }
    };
    let receipts = core.config.limits.receipts && gateway.takes_read;
    let presence = core.config.limits.presence && gateway.takes_presence;
    let mut ack =
        wire::SyncAck { request: sync.request, has_more: more, receipts, presence, ..Default::default() };
    if more {
        ack.next = chats.last().cloned().unwrap_or_default();
    }
    let cursors: HashMap<&str, &wire::Cursor> = sync.cursors.iter().map(|c| (c.chat.as_str(), c)).collect();
    let mut room = (gateway.frame_bytes_max as usize).saturating_sub(ANSWER_OVERHEAD_BYTES);
    // The chat before, from which the next Sync goes on if this one does not fit any more.
    let mut before = String::new();
    for (chat, seen) in chats.into_iter().zip(heads) {
        let head = &seen.head;
        let cursor = cursors.get(chat.as_str());
        let is_news = match cursor {
            // Also where nothing is left of what it holds: just that it must be told.
            Some(cursor) if cursor.seq > 0 => (cursor.history, cursor.seq) != (head.history, head.seq),
            // What was another's is no news.
            _ => head.seq > head.since,
        };
        let has_receipts =
            || sync.receipts && receipts && cursor.is_some_and(|cursor| has_receipts(cursor, head));
        if is_news || has_receipts() {
            let news = chat_head(core, chat.clone(), user_name, &seen);
            // Key and length in front of it.
            let bytes = news.encoded_len() + 4;
            if bytes > room && !before.is_empty() {
                (ack.has_more, ack.next) = (true, before);
                break;
            }
            room = room.saturating_sub(bytes);
            ack.chats.push(news);
        }
        before = chat;
    }
    answer::reply(frame, Command::SyncAck, &ack)
}

/// Whether the store knows more than the client of how far somebody is.
fn has_receipts(cursor: &wire::Cursor, head: &Head) -> bool {
    head.read > cursor.read_seq
        || head.peer_delivered > cursor.peer_delivered
        || head.peer_read > cursor.peer_read
}

fn chat_head(core: &Core, chat: String, user_name: &str, seen: &Seen) -> wire::ChatHead {
    let head = &seen.head;
    // What this server was told lately may not be written yet.
    let noted = core.delivered.noted(&chat, user_name, head.history);
    let (noted_seq, noted_read) =
        noted.map_or((0, 0), |noted| (noted.seq.min(head.seq), noted.read.min(head.seq)));
    let read_seq = head.read.max(noted_read);
    wire::ChatHead {
        chat,
        history: head.history,
        head: head.seq,
        delivered: head.delivered.max(noted_seq).max(noted_read),
        first: head.first,
        joined: seen.joined,
        read_seq,
        unread: seen.count_behind(read_seq),
        // Whoever is not to be told of it is not told of it here.
        peer_delivered: if core.config.limits.receipts { head.peer_delivered } else { 0 },
        peer_read: if core.config.limits.receipts { head.peer_read } else { 0 },
    }
}

/// What a Sync or Pull answer holds beside its chats or messages, at most.
const ANSWER_OVERHEAD_BYTES: usize = 512;

fn pull_answer(
    core: &Core,
    gateway: &Gateway,
    frame: &UpFrame,
    pull: wire::Pull,
    chat: String,
    limit: usize,
    page: Result<Option<(Page, u64)>, StoreError>,
) -> DownFrame {
    let (page, joined) = match page {
        Ok(Some(page)) => page,
        Ok(None) => {
            return answer::error(frame, wire::Error { request: pull.request, chat, ..not_a_member() });
        }
        Err(error) => {
            core.store_failed(&error);
            let error = match error {
                StoreError::Corrupt(text) => answer::because(Code::Internal, text),
                _ => answer::unavailable(core.config.limits.retry_after_ms),
            };
            return answer::error(frame, wire::Error { request: pull.request, chat, ..error });
        }
    };
    let found = page.messages.len();
    let mut room = (gateway.frame_bytes_max as usize).saturating_sub(ANSWER_OVERHEAD_BYTES);
    let mut messages = Vec::with_capacity(found.min(limit));
    for stored in page.messages.into_iter().take(limit) {
        let message = wire::Message::from(stored);
        // Key and length in front of it.
        let bytes = message.encoded_len() + 8;
        if bytes > room && !messages.is_empty() {
            break;
        }
        room = room.saturating_sub(bytes);
        messages.push(message);
    }
    let last = messages.last().map(|last| last.seq);
    let (has_more, first) = rest(last, pull.reverse, (page.first, page.head), page.read_to);
    let ack = wire::PullAck {
        request: pull.request,
        chat,
        history: page.history,
        messages,
        has_more,
        head: page.head,
        first,
        joined,
    };
    answer::reply(frame, Command::PullAck, &ack)
}

/// The heads as this user may see them, with the first seq of each group that is theirs. `standings`: of the groups among the
/// chats, in their order; `cursors`: what the client holds.
fn seen(chats: &[String], heads: Vec<Head>, standings: Vec<Standing>, cursors: &[wire::Cursor]) -> Vec<Seen> {
    let mut standings = standings.into_iter();
    let held: HashMap<&str, &wire::Cursor> =
        cursors.iter().map(|cursor| (cursor.chat.as_str(), cursor)).collect();
    let mut see = |(chat, head): (&String, Head)| match chat.starts_with('#') {
        true => {
            let held = held.get(chat.as_str()).filter(|cursor| cursor.history == head.history);
            let held = held.map_or(0, |cursor| cursor.seq);
            visible::head(head, &standings.next().unwrap_or_default(), held)
        }
        false => visible::of_pair(head),
    };
    chats.iter().zip(heads).map(&mut see).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_as_long_as_a_client_is_told_fits_a_frame() {
        let longest = proto::name::NAME_BYTES_MAX;
        let chat = format!("{}:{}", "a".repeat(longest), "b".repeat(longest));
        for (of_state, frame_bytes_max) in [(32_768, 65_536), (32_768, 4_096), (32_768, 33_000), (100, 4_096)]
        {
            let body = vec![0; message_bytes_max(of_state, frame_bytes_max) as usize].into();
            let n = proto::NUMBER_MAX;
            let send = wire::Send { chat: chat.clone(), stream: u64::MAX, n, body, kind: 4 };
            let frame = proto::frame::encode(Command::Send, &send);
            assert!(frame.len() <= frame_bytes_max as usize, "{of_state} {frame_bytes_max} {}", frame.len());
            let sender = "a".repeat(longest);
            let message = wire::Message { seq: n, sender, time_us: u64::MAX, body: send.body, kind: 4 };
            let push = answer::push(&chat, u64::MAX, message, 0);
            assert!(push.len() <= frame_bytes_max as usize, "{of_state} {frame_bytes_max} {}", push.len());
        }
        assert_eq!(message_bytes_max(32_768, 65_536), 32_768);
        assert_eq!(message_bytes_max(32_768, 0), 32_768);
    }
}
