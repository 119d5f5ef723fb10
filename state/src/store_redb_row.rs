//! How the redb store writes its keys and rows. Pure: bytes in, bytes out.
//!
//! Numbers in keys are big-endian, so that byte order is number order. Texts in keys carry their length in front, so that
//! no name is the beginning of another. In rows, numbers that are mostly small are varints.
//!
//! Trap: every change here is another layout. Raise [`LAYOUT`] with it: a store of another layout refuses to open. But a further kind of
//! row that an older version does not miss is none.

use std::collections::VecDeque;

use bytes::Bytes;
use proto::wire::{Code, Kind as MessageKind};

use crate::store::{Stored, chat_bucket, message_crc};

/// Version of everything in this file.
pub const LAYOUT: u64 = 2;

/// What a chat's row begins with. In layout 1 it began with the seq, whose first byte is 0.
const CHAT_ROW: u8 = 2;

/// What a row of a chat is; the byte behind the chat in its key.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    /// Head, time and the streams used last: one row.
    Head = 0,
    /// A stream that was used longer ago.
    Stream = 1,
    /// A message, by seq.
    Message = 2,
    /// The delivered cursor of a user.
    Delivered = 3,
    /// A message that its sender named, by sender and name.
    Named = 4,
    /// The read cursor of a user.
    Read = 5,
    /// Somebody who is or was in a group.
    Member = 6,
    /// A group: one row.
    Group = 7,
    /// Up to where the chat was another's, who had the name of this user.
    Since = 8,
    /// Earlier stays in a group of somebody who came back: pairs of seqs.
    Past = 9,
}

/// The key of a chat's row, or the beginning of the keys of its rows of that kind.
pub fn chat_key(chat: &str, kind: Kind) -> Vec<u8> {
    let mut key = Vec::with_capacity(chat.len() + 32);
    text(&mut key, chat);
    key.push(kind as u8);
    key
}

/// Key of a message.
pub fn message_key(chat: &str, seq: u64) -> Vec<u8> {
    let mut key = chat_key(chat, Kind::Message);
    key.extend(seq.to_be_bytes());
    key
}

/// Key of a stream that has a row of its own.
pub fn stream_key(chat: &str, sender: &str, stream: u64) -> Vec<u8> {
    let mut key = chat_key(chat, Kind::Stream);
    key.extend(stream.to_be_bytes());
    key.extend(sender.as_bytes());
    key
}

/// Key of a user's cursor: delivered or read.
pub fn cursor_key(chat: &str, user: &str, kind: Kind) -> Vec<u8> {
    let mut key = chat_key(chat, kind);
    key.extend(user.as_bytes());
    key
}

/// Key of a named id.
pub fn named_key(chat: &str, sender: &str, name: &str) -> Vec<u8> {
    let mut key = chat_key(chat, Kind::Named);
    text(&mut key, sender);
    key.extend(name.as_bytes());
    key
}

/// Key of somebody in a group.
pub fn member_key(chat: &str, user: &str) -> Vec<u8> {
    let mut key = chat_key(chat, Kind::Member);
    key.extend(user.as_bytes());
    key
}

/// Key of a revocation: of one device, or of all.
pub fn revoked_key(user: u64, device: Option<u32>) -> Vec<u8> {
    let mut key = user.to_be_bytes().to_vec();
    key.extend(device.iter().flat_map(|device| device.to_be_bytes()));
    key
}

/// What all keys of a chat are in front of.
pub fn behind_chat(chat: &str) -> Vec<u8> {
    let mut key = chat_key(chat, Kind::Head);
    if let Some(kind) = key.last_mut() {
        *kind = u8::MAX;
    }
    key
}

/// The chat in a key of it.
pub fn chat_of(key: &[u8]) -> Option<String> {
    Reader(key).text()
}

/// The seq in the key of a message.
pub fn seq_of(key: &[u8]) -> Option<u64> {
    key.last_chunk().copied().map(u64::from_be_bytes)
}

/// Time and chat in a key of the recency index, or of the one by oldest message.
pub fn recent_of(key: &[u8]) -> Option<(u64, String)> {
    let mut reader = Reader(key.get(4..)?);
    Some((reader.u64()?, String::from_utf8(reader.0.to_vec()).ok()?))
}

/// Key in the recency index, and in the one by oldest message.
pub fn recent_key(time_us: u64, chat: &str) -> Vec<u8> {
    let mut key = recent_from(chat_bucket(chat), time_us);
    key.extend(chat.as_bytes());
    key
}

/// Where this time begins in a bucket of the recency index.
pub fn recent_from(bucket: u32, time_us: u64) -> Vec<u8> {
    [&bucket.to_be_bytes()[..], &time_us.to_be_bytes()].concat()
}

/// Key of a chat in a user's list; the list begins where the chat is empty.
pub fn listed_key(user: &str, chat: &str) -> Vec<u8> {
    let mut key = Vec::with_capacity(user.len() + chat.len() + 2);
    text(&mut key, user);
    key.extend(chat.as_bytes());
    key
}

/// Key of a route.
pub fn route_key(user: u64, device: u32) -> [u8; 12] {
    let mut key = [0; 12];
    key[..8].copy_from_slice(&user.to_be_bytes());
    key[8..].copy_from_slice(&device.to_be_bytes());
    key
}

/// Key in front of the routes of a user: the number is nobody's any more.
pub fn retired_key(user: u64) -> [u8; 8] {
    user.to_be_bytes()
}

/// Two numbers of 64 bits: a route's attempt and connection.
pub fn pair(row: &[u8]) -> Option<(u64, u64)> {
    let mut reader = Reader(row);
    let both = (reader.u64()?, reader.u64()?);
    reader.0.is_empty().then_some(both)
}

/// A message's row.
pub fn message_row(chat: &str, sender: &str, time_us: u64, kind: MessageKind, body: &[u8]) -> Vec<u8> {
    let mut row = Vec::with_capacity(body.len() + sender.len() + 16);
    row.extend(message_crc(chat, sender, kind, body).to_be_bytes());
    row.extend(time_us.to_be_bytes());
    if kind != MessageKind::Text {
        // No sender has an empty name: behind one stands the kind.
        text(&mut row, "");
        row.push(kind as u8);
    }
    text(&mut row, sender);
    row.extend(body);
    row
}

/// Reads a message's row. `None`: not readable, or it fails its checksum.
pub fn message(chat: &str, seq: u64, row: &[u8]) -> Option<Stored> {
    let mut reader = Reader(row);
    let crc = u32::from_be_bytes(reader.take(4)?.try_into().ok()?);
    let time_us = reader.u64()?;
    let (mut sender, mut kind) = (reader.text()?, MessageKind::Text);
    if sender.is_empty() {
        kind = MessageKind::try_from(i32::from(*reader.take(1)?.first()?)).ok()?;
        sender = reader.text()?;
    }
    let body = Bytes::copy_from_slice(reader.0);
    (message_crc(chat, &sender, kind, &body) == crc).then_some(Stored { seq, sender, time_us, body, kind })
}

/// Reads the time alone.
pub fn message_time(row: &[u8]) -> Option<u64> {
    Reader(row.get(4..)?).u64()
}

/// Reads a user's row, which is the number.
pub fn user(row: &[u8]) -> Option<u64> {
    row.try_into().ok().map(u64::from_be_bytes)
}

/// Where a chat stands, with the streams used last in front.
#[derive(Debug, Clone, PartialEq)]
pub struct ChatRow {
    /// Of the newest message; 0: none.
    pub seq: u64,
    /// Of the newest message, µs.
    pub time_us: u64,
    /// Of the oldest message that is kept; behind `seq`: none is.
    pub first: u64,
    /// Of that message, µs.
    pub first_us: u64,
    /// The latest first.
    pub streams: Vec<Stream>,
}

/// What is remembered of a sender's stream.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Stream {
    /// Whose.
    pub sender: String,
    /// Which.
    pub stream: u64,
    /// The newest id answered.
    pub watermark: u64,
    /// When it was used last, Unix seconds, up to [`USED_STEP_S`] too old.
    pub used_s: u64,
    /// To the newest ids, oldest first.
    pub answers: VecDeque<Given>,
}

/// An answer given to an id.
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(missing_docs)]
pub enum Given {
    Stored { seq: u64, time_us: u64 },
    Refused(Code),
}

/// A stream that only answers again is written anew when its time of use is so much behind.
pub const USED_STEP_S: u64 = 3_600;

impl Stream {
    /// The answer to an id at or below the watermark.
    pub fn given(&self, n: u64) -> Option<Given> {
        let back = self.watermark.checked_sub(n)?;
        self.answers.iter().rev().nth(usize::try_from(back).ok()?).copied()
    }

    /// Remembers the answer to the id behind the watermark.
    pub fn give(&mut self, given: Given) {
        self.watermark += 1;
        self.answers.push_back(given);
        if self.answers.len() as u64 > proto::UNANSWERED_MAX {
            self.answers.pop_front();
        }
    }

    /// Whether it has not been used for so long, surely.
    pub fn is_forgotten(&self, now_s: u64, dedupe_s: u64) -> bool {
        self.used_s + USED_STEP_S + dedupe_s < now_s
    }

    /// The row of a stream.
    pub fn write(&self, row: &mut Vec<u8>) {
        text(row, &self.sender);
        row.extend(self.stream.to_be_bytes());
        varint(row, self.watermark);
        varint(row, self.used_s);
        varint(row, self.answers.len() as u64);
        let (mut last_seq, mut last_us) = (0, 0);
        for given in &self.answers {
            match *given {
                Given::Refused(code) => {
                    varint(row, 0);
                    varint(row, u64::from(code as u32));
                }
                // Seqs and times only rise: the difference is never 0, and small.
                Given::Stored { seq, time_us } => {
                    varint(row, seq.wrapping_sub(last_seq));
                    varint(row, time_us.wrapping_sub(last_us));
                    (last_seq, last_us) = (seq, time_us);
                }
            }
        }
    }

    /// Reads a row that holds nothing else.
    pub fn read(row: &[u8]) -> Option<Stream> {
        let mut reader = Reader(row);
        let stream = reader.stream()?;
        reader.0.is_empty().then_some(stream)
    }
}

impl Default for ChatRow {
    fn default() -> Self {
        ChatRow { seq: 0, time_us: 0, first: 1, first_us: 0, streams: Vec::new() }
    }
}

/// Whether a chat's row need not be migrated.
pub fn is_of_layout_2(row: &[u8]) -> bool {
    row.first() == Some(&CHAT_ROW)
}

impl ChatRow {
    /// The row of a chat.
    pub fn write(&self) -> Vec<u8> {
        let mut row = Vec::with_capacity(256);
        row.push(CHAT_ROW);
        for number in [self.seq, self.time_us, self.first, self.first_us] {
            row.extend(number.to_be_bytes());
        }
        self.streams.iter().for_each(|stream| stream.write(&mut row));
        row
    }

    /// Reads the row of a chat.
    pub fn read(row: &[u8]) -> Option<ChatRow> {
        let mut reader = Reader(row.strip_prefix(&[CHAT_ROW])?);
        let (seq, time_us) = (reader.u64()?, reader.u64()?);
        let (first, first_us) = (reader.u64()?, reader.u64()?);
        Some(ChatRow { seq, time_us, first, first_us, streams: reader.streams()? })
    }

    /// Reads a row of layout 1, which did not say what is kept.
    pub fn read_layout_1(row: &[u8]) -> Option<ChatRow> {
        let mut reader = Reader(row);
        let (seq, time_us) = (reader.u64()?, reader.u64()?);
        Some(ChatRow { seq, time_us, streams: reader.streams()?, ..ChatRow::default() })
    }

    /// Reads seq and first alone.
    pub fn read_head(row: &[u8]) -> Option<(u64, u64)> {
        let mut reader = Reader(row.strip_prefix(&[CHAT_ROW])?);
        let seq = reader.u64()?;
        reader.u64()?;
        Some((seq, reader.u64()?))
    }
}

pub struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    /// So many bytes.
    pub fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    /// Big-endian.
    pub fn u64(&mut self) -> Option<u64> {
        self.take(8)?.try_into().ok().map(u64::from_be_bytes)
    }

    fn text(&mut self) -> Option<String> {
        let length = u16::from_be_bytes(self.take(2)?.try_into().ok()?);
        String::from_utf8(self.take(length.into())?.to_vec()).ok()
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    fn streams(&mut self) -> Option<Vec<Stream>> {
        let mut streams = Vec::new();
        while !self.0.is_empty() {
            streams.push(self.stream()?);
        }
        Some(streams)
    }

    fn stream(&mut self) -> Option<Stream> {
        let mut stream = Stream {
            sender: self.text()?,
            stream: self.u64()?,
            watermark: self.varint()?,
            used_s: self.varint()?,
            answers: VecDeque::new(),
        };
        let (mut last_seq, mut last_us) = (0u64, 0u64);
        for _ in 0..self.varint()? {
            stream.answers.push_back(match self.varint()? {
                0 => Given::Refused(Code::try_from(i32::try_from(self.varint()?).ok()?).ok()?),
                more => {
                    last_seq = last_seq.wrapping_add(more);
                    last_us = last_us.wrapping_add(self.varint()?);
                    Given::Stored { seq: last_seq, time_us: last_us }
                }
            });
        }
        Some(stream)
    }
}

/// Names are at most 64 bytes and chats two of them; nothing that comes here is near the 65,535.
fn text(to: &mut Vec<u8>, text: &str) {
    debug_assert!(text.len() <= usize::from(u16::MAX));
    to.extend((text.len() as u16).to_be_bytes());
    to.extend(text.as_bytes());
}

fn varint(to: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        to.push(value as u8 | 0x80);
        value >>= 7;
    }
    to.push(value as u8);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_stream_keeps_as_many_answers_as_promised() {
        let mut stream = Stream::default();
        for n in 1..=100 {
            stream.give(Given::Stored { seq: 2 * n, time_us: n });
        }
        assert_eq!(stream.given(100), Some(Given::Stored { seq: 200, time_us: 100 }));
        assert_eq!(stream.given(69), Some(Given::Stored { seq: 138, time_us: 69 }));
        assert_eq!((stream.given(68), stream.given(101)), (None, None));
    }

    #[test]
    fn no_name_is_the_beginning_of_another() {
        let one = listed_key("a", "b");
        let other = listed_key("ab", "");
        assert!(!one.starts_with(&other) && !other.starts_with(&one));
        assert!(message_key("a:b", 255) < message_key("a:b", 256));
        assert!(message_key("a:b", u64::MAX) < chat_key("a:b", Kind::Delivered));
        assert!(cursor_key("a:b", "\u{10ffff}", Kind::Read) < behind_chat("a:b"));
        assert_eq!(chat_of(&cursor_key("a:b", "a", Kind::Delivered)).as_deref(), Some("a:b"));
        assert_eq!(recent_of(&recent_key(7, "a:b")), Some((7, "a:b".to_owned())));
    }

    fn given() -> impl Strategy<Value = Given> {
        prop_oneof![
            (1..u64::MAX, any::<u64>()).prop_map(|(seq, time_us)| Given::Stored { seq, time_us }),
            Just(Given::Refused(Code::MessageTooLarge)),
        ]
    }

    proptest! {
        #[test]
        fn rows_come_back(
            streams in proptest::collection::vec(
                (".{0,9}", any::<u64>(), any::<u64>(), any::<u64>(), proptest::collection::vec(given(), 0..33)),
                0..5,
            ),
            seq: u64,
            time_us: u64,
            first: u64,
            first_us: u64,
        ) {
            let streams = streams.into_iter().map(|(sender, stream, watermark, used_s, mut answers)| {
                // Seqs rise: two answers never share one.
                let mut seqs = std::collections::HashSet::new();
                answers.retain(|given| !matches!(given, Given::Stored { seq, .. } if !seqs.insert(*seq)));
                Stream { sender, stream, watermark, used_s, answers: answers.into() }
            });
            let row = ChatRow { seq, time_us, first, first_us, streams: streams.collect() };
            prop_assert_eq!(ChatRow::read(&row.write()), Some(row.clone()));
            prop_assert_eq!(ChatRow::read_head(&row.write()), Some((seq, first)));
            // Layout 1 had no first byte and did not say what is kept.
            let old = [&row.write()[1..17], &row.write()[33..]].concat();
            let unsaid = ChatRow { first: 1, first_us: 0, ..row.clone() };
            prop_assert_eq!(ChatRow::read_layout_1(&old), Some(unsaid));
            for cut in 0..row.write().len() {
                // Whatever is left is read or refused, never a panic.
                ChatRow::read(&row.write()[..cut]);
            }
        }
    }
}
