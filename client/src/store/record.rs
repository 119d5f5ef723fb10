//! The records of a device's log, and the state that they add up to. Pure.
//!
//! A record is: length of the body (u32 LE), CRC32C of the body (u32 LE), body (protobuf). Field and kind numbers stay.

use bytes::Bytes;
use prost::Message;

use super::{Chat, State};
use crate::body::Body;

#[derive(Clone, PartialEq, Message)]
pub(super) struct Record {
    #[prost(uint32, tag = "1")]
    kind: u32,
    #[prost(string, tag = "2")]
    chat: String,
    #[prost(fixed64, tag = "3")]
    history: u64,
    #[prost(uint64, tag = "4")]
    seq: u64,
    #[prost(fixed64, tag = "5")]
    stream: u64,
    /// The attempt, the number of a message, the next number of a stream, or up to where a cursor is acknowledged (0 in logs of older
    /// versions: it is once more).
    #[prost(uint64, tag = "6")]
    n: u64,
    #[prost(bytes = "bytes", tag = "7")]
    body: Bytes,
    #[prost(uint64, tag = "8")]
    time_ms: u64,
    // Tag 9 is used up.
    /// What the body is.
    #[prost(int32, tag = "10")]
    of: i32,
}

const ATTEMPT: u32 = 1;
const CURSOR: u32 = 2;
const COMPLETE: u32 = 3;
const STREAM: u32 = 4;
const MESSAGE: u32 = 5;
const ANSWERED: u32 = 6;
const HIDDEN: u32 = 7;

impl Record {
    pub fn attempt(n: u64) -> Self {
        Record { kind: ATTEMPT, n, ..Default::default() }
    }

    pub fn cursor(chat: &str, history: u64, seq: u64, acked: u64) -> Self {
        Record { kind: CURSOR, chat: chat.to_owned(), history, seq, n: acked, ..Default::default() }
    }

    pub fn complete() -> Self {
        Record { kind: COMPLETE, ..Default::default() }
    }

    pub fn stream(chat: &str, stream: u64, n: u64) -> Self {
        Record { kind: STREAM, chat: chat.to_owned(), stream, n, ..Default::default() }
    }

    pub fn message(chat: &str, n: u64, body: Body, time_ms: u64) -> Self {
        let Body { kind: of, bytes } = body;
        Record { kind: MESSAGE, chat: chat.to_owned(), n, body: bytes, of, time_ms, ..Default::default() }
    }

    pub fn answered(chat: &str, n: u64) -> Self {
        Record { kind: ANSWERED, chat: chat.to_owned(), n, ..Default::default() }
    }

    pub fn hidden(chat: &str, history: u64, seq: u64) -> Self {
        Record { kind: HIDDEN, chat: chat.to_owned(), history, seq, ..Default::default() }
    }

    pub fn append_to(&self, out: &mut Vec<u8>) {
        let body = self.encode_to_vec();
        out.extend_from_slice(&(body.len() as u32).to_le_bytes());
        out.extend_from_slice(&crc32c::crc32c(&body).to_le_bytes());
        out.extend_from_slice(&body);
    }

    /// The first record and what is behind it.
    fn cut(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let (length, rest) = bytes.split_first_chunk::<4>()?;
        let (crc, rest) = rest.split_first_chunk::<4>()?;
        let (body, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        // An empty body is no record, and what a file filled with zeros would hold.
        let intact = !body.is_empty() && crc32c::crc32c(body) == u32::from_le_bytes(*crc);
        Some((Record::decode(body).ok().filter(|_| intact)?, rest))
    }
}

impl State {
    /// Everything up to the first record that cannot be read.
    pub fn read(mut bytes: &[u8]) -> Self {
        let mut state = State::default();
        while let Some((record, rest)) = Record::cut(bytes) {
            state.apply(record);
            bytes = rest;
        }
        state.torn = !bytes.is_empty();
        state
    }

    pub(super) fn apply(&mut self, record: Record) {
        match record.kind {
            ATTEMPT => self.attempt = self.attempt.max(record.n),
            CURSOR => {
                self.cursors.insert(record.chat, (record.history, record.seq, record.n));
            }
            COMPLETE => self.complete = true,
            STREAM => {
                let chat = Chat { stream: record.stream, next_n: record.n.max(1), ..Chat::default() };
                self.chats.insert(record.chat, chat);
            }
            MESSAGE => {
                let Some(chat) = self.chats.get_mut(&record.chat) else { return };
                chat.next_n = chat.next_n.max(record.n + 1);
                let body = Body { kind: record.of, bytes: record.body };
                chat.unanswered.insert(record.n, (body, record.time_ms));
            }
            ANSWERED => {
                if let Some(chat) = self.chats.get_mut(&record.chat) {
                    chat.unanswered.remove(&record.n);
                }
            }
            HIDDEN => drop(self.hidden.insert(&record.chat, record.history, record.seq)),
            // A newer version wrote it.
            _ => {}
        }
    }

    /// The shortest log that reads as this state.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.records().for_each(|record| record.append_to(&mut bytes));
        bytes
    }

    fn records(&self) -> impl Iterator<Item = Record> {
        let head = [Record::attempt(self.attempt)].into_iter().chain(self.complete.then(Record::complete));
        let cursor =
            |(chat, (history, seq, acked)): (&String, &_)| Record::cursor(chat, *history, *seq, *acked);
        let cursors = self.cursors.iter().map(cursor);
        let chats = self.chats.iter().flat_map(|(name, chat)| {
            let stream = Record::stream(name, chat.stream, chat.next_n);
            let messages = chat
                .unanswered
                .iter()
                .map(move |(n, (body, time_ms))| Record::message(name, *n, body.clone(), *time_ms));
            [stream].into_iter().chain(messages)
        });
        let hidden = self.hidden.iter().map(|(chat, history, seq)| Record::hidden(chat, *history, *seq));
        head.chain(cursors).chain(chats).chain(hidden)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record() -> impl Strategy<Value = Record> {
        let chat = (0..3u8).prop_map(|number| format!("a:{number}"));
        (1u32..8, chat, 1u64..9, 0u64..99, 1u64..50, proptest::collection::vec(any::<u8>(), 0..20)).prop_map(
            |(kind, chat, history, seq, n, body)| match kind {
                ATTEMPT => Record::attempt(n),
                CURSOR => Record::cursor(&chat, history, seq, n),
                COMPLETE => Record::complete(),
                STREAM => Record::stream(&chat, history, 1),
                MESSAGE => Record::message(&chat, n, Body { kind: (n % 5) as i32, bytes: body.into() }, 5),
                HIDDEN => Record::hidden(&chat, history, seq),
                _ => Record::answered(&chat, n),
            },
        )
    }

    fn write<'a>(records: impl IntoIterator<Item = &'a Record>) -> Vec<u8> {
        let mut bytes = Vec::new();
        records.into_iter().for_each(|record| record.append_to(&mut bytes));
        bytes
    }

    proptest! {
        #[test]
        fn a_rewritten_log_reads_as_the_same_state(records in proptest::collection::vec(record(), 0..60)) {
            let state = State::read(&write(&records));
            prop_assert_eq!(State::read(&state.to_bytes()), state);
        }

        #[test]
        fn a_torn_or_flipped_log_reads_as_its_intact_head(
            records in proptest::collection::vec(record(), 1..20),
            at in any::<proptest::sample::Index>(),
            flip in proptest::option::of(0u8..8),
        ) {
            let mut bytes = write(&records);
            let at = at.index(bytes.len());
            match flip {
                Some(bit) => bytes[at] ^= 1 << bit,
                None => bytes.truncate(at),
            }
            let mut end = 0;
            let whole = records.iter().take_while(|record| {
                end += write([*record]).len();
                end <= at
            }).count();
            let mut expected = State::read(&write(&records[..whole]));
            expected.torn = bytes.len() != write(&records[..whole]).len();
            prop_assert_eq!(State::read(&bytes), expected);
        }
    }
}
