//! Operations as tests write them, and their answers read.
//!
//! Trap: included by several test programs, each of which must use all of it.

use bytes::Bytes;
use state::store::{Append, Appended, MessageId, Op, Outcome, Store, read};

/// One operation, one outcome.
pub async fn one(store: &dyn Store, op: Op) -> Outcome {
    let mut outcomes = store.apply(&[op]).await;
    assert_eq!(outcomes.len(), 1);
    outcomes.swap_remove(0)
}

/// A message that says which one it is.
pub fn append(chat: &str, sender: &str, stream: u64, n: u64) -> Op {
    let body = Bytes::from(format!("{sender}/{stream}/{n}"));
    let id = MessageId::Numbered { stream, n };
    Op::Append(Append { chat: chat.into(), sender: sender.into(), id, body, ..Append::default() })
}

/// The outcome of an append.
pub async fn appended(store: &dyn Store, op: Op) -> Appended {
    read::appended(one(store, op).await).unwrap()
}

/// Messages of a chat.
pub fn pull(chat: &str, cursor: u64, limit: usize, reverse: bool) -> Op {
    Op::Pull { chat: chat.into(), reader: String::new(), cursor, limit, reverse }
}

/// The seqs of a pull.
#[allow(dead_code, reason = "not every file of tests asks")]
pub async fn seqs(store: &dyn Store, op: Op) -> Vec<u64> {
    read::page(one(store, op).await).unwrap().messages.iter().map(|message| message.seq).collect()
}
