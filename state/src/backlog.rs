//! How much is accepted and waits to be pushed, and what becomes of what finds no room: it is stored, so it is left where it is, and
//! [`crate::repush`] reads its chat again. Nobody else waits for a group that more is written to than can be told to its members.
//!
//! Trap: once a chat is behind, what follows has to stay behind it, or its readers see a gap with each message and pull.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use tokio::sync::mpsc::error::TrySendError;

use crate::fan_out::Accepted;
use crate::server::Core;

/// Bytes that wait.
#[derive(Debug, Default)]
pub struct Backlog {
    bytes: Arc<AtomicUsize>,
}

/// What a message takes of it until it is dropped.
#[derive(Debug)]
pub struct Room {
    of: Arc<AtomicUsize>,
    bytes: usize,
}

/// Of a message beside its body: names, places in queues.
const BESIDE_BODY_BYTES: usize = 256;

impl Backlog {
    /// Room for a body, if there is some.
    fn enter(&self, body_bytes: usize, bytes_max: usize) -> Option<Room> {
        let bytes = BESIDE_BODY_BYTES + body_bytes;
        let waiting = self.bytes.fetch_add(bytes, Ordering::Relaxed);
        let room = Room { of: self.bytes.clone(), bytes };
        (waiting + bytes <= bytes_max).then_some(room)
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.of.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Hands a message to the fan-out. It waits only where very many chats are behind.
pub async fn enter(core: &Core, mut accepted: Accepted) {
    let room = match core.repush.is_behind(&accepted.chat) {
        true => None,
        false => core.backlog.enter(accepted.message.body.len(), core.config.limits.fan_out_bytes_max),
    };
    let accepted = match room {
        None => later(core, accepted),
        room => {
            accepted.room = room;
            // It may wait for long, and what it was cut from is not kept for it.
            accepted.message.body = Bytes::copy_from_slice(&accepted.message.body);
            match core.accepted.try_send(accepted) {
                Err(TrySendError::Full(accepted)) => later(core, accepted),
                // Only a server that has stopped drops the receiver; the message is stored all the same.
                Ok(()) | Err(TrySendError::Closed(_)) => None,
            }
        }
    };
    if let Some(accepted) = accepted {
        let _ = core.accepted.send(accepted).await;
    }
}

/// It is pushed out of the store, with what follows it in its chat; given back where too many chats are.
pub fn later(core: &Core, mut accepted: Accepted) -> Option<Accepted> {
    let from_us = accepted.message.time_us.saturating_sub(1);
    let is_taken = core.repush.catch_up(&accepted.chat, from_us, &mut accepted.held);
    if is_taken {
        core.metrics.left_behind.inc();
    }
    (!is_taken).then_some(accepted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::tests::{Scripted, core_over};
    use crate::store::{Answer, Page};
    use proto::wire;

    fn accepted(core: &Core, chat: &str, time_us: u64) -> Accepted {
        let message = wire::Message { seq: time_us, time_us, body: "hello".into(), ..Default::default() };
        let held = Some(core.ledger.hold());
        Accepted { held, ..Accepted::pushed_again(chat.into(), 7, message) }
    }

    #[test]
    fn room_comes_back_with_what_took_it() {
        let backlog = Backlog::default();
        let of_one = BESIDE_BODY_BYTES + 10;
        let room = backlog.enter(10, of_one).unwrap();
        assert!(backlog.enter(10, 2 * of_one - 1).is_none());
        drop(room);
        assert!(backlog.enter(10, of_one).is_some());
        assert_eq!(backlog.bytes.load(Ordering::Relaxed), 0, "also what found none");
    }

    #[tokio::test]
    async fn a_chat_that_is_behind_stays_behind_until_it_has_been_read_again() {
        let core = core_over(Scripted::new(|_| Ok(Answer::Messages(Page::default()))));
        let first = accepted(&core, "#1", 10);
        assert!(later(&core, first).is_none());
        // Its receiver is gone; whatever is handed over there is dropped, and its hold with it.
        enter(&core, accepted(&core, "#1", 11)).await;
        enter(&core, accepted(&core, "#2", 11)).await;
        assert!(core.repush.is_behind("#1") && !core.repush.is_behind("#2"));
        assert_eq!(core.metrics.left_behind.get(), 2);
        assert!(!core.ledger.is_clear(), "the mark stands until it is pushed");
        while crate::repush::step(&core).await != crate::repush::Stepped::Idle {}
        assert!(!core.repush.is_behind("#1"));
    }
}
