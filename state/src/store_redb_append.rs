//! What a write transaction of the redb store does to chats: messages, ids, the recency index. On the writer's thread.
//!
//! A chat's row is read once a transaction, changed in memory by every message, and written once at the end: that is where a
//! batch is cheaper than its messages.
//!
//! Trap: while a step runs, the row in memory is the truth and the one in the table is old. Whoever needs a head asks
//! [`Step::row`].

use redb::ReadableTable;

use crate::group::Effect;
use crate::store::{Append, Appended, MessageId};
use crate::store_redb_read::{CHAT, FORGET, Fault, OLDEST, RECENT, Read, wrong};
use crate::store_redb_row::{self as row, ChatRow, Given, Kind, Stream, USED_STEP_S};
use crate::store_redb_step::{Step, open};

/// Streams in a chat's row. Two people with two devices each; more take a row of their own when others are newer.
pub const STREAMS_IN_ROW: usize = 4;

/// Streams forgotten in one transaction at most, so that none takes long.
const FORGET_MAX: usize = 256;

const DAY_S: u64 = 86_400;

/// A chat's row in memory.
pub struct Row {
    /// The row.
    pub chat: ChatRow,
    /// As the recency index has it; 0: not there.
    indexed_us: u64,
    /// As the index by oldest message has it; `None`: not there.
    oldest_us: Option<u64>,
    /// Of these streams there are rows of their own.
    apart: Vec<(String, u64)>,
    /// To be written.
    pub changed: bool,
}

impl Step<'_> {
    /// The atomic step of a message: dedupe, next seq, time, append; the recency index follows in [`Step::write`].
    pub fn append(&mut self, append: &Append) -> Read<Appended> {
        if let Some(token) = append.token
            && self.is_revoked(token.user, None, token.issued_s)?
        {
            return Ok(Appended::Revoked);
        }
        match &append.id {
            MessageId::Numbered { stream, n } => self.append_numbered(append, *stream, *n),
            MessageId::Named(name) => self.append_named(append, name),
            MessageId::Unnamed => self.append_new(append),
        }
    }

    /// Whatever its id.
    pub fn append_new(&mut self, append: &Append) -> Read<Appended> {
        match self.decide(append)? {
            Err(code) => Ok(Appended::Refused(code)),
            Ok(effect) => {
                let (seq, time_us) = self.next(&append.chat)?;
                self.put(append, seq, time_us, effect)
            }
        }
    }

    fn append_numbered(&mut self, append: &Append, stream: u64, n: u64) -> Read<Appended> {
        let Append { chat, sender, .. } = append;
        let (now_s, history) = (self.now_s(), self.history(chat));
        let dedupe_s = self.terms.dedupe_s;
        self.load_stream(chat, sender, stream)?;
        let row = self.row(chat)?;
        let streams = &mut row.chat.streams;
        streams.retain(|stream| !stream.is_forgotten(now_s, dedupe_s));
        let at = streams.iter().position(|known| known.stream == stream && known.sender == *sender);
        let watermark = at.map_or(0, |at| streams[at].watermark);
        if let Some(at) = at
            && n <= watermark
        {
            if watermark - n >= proto::UNANSWERED_MAX {
                return Ok(Appended::TooOld);
            }
            let known = &mut streams[at];
            if known.used_s + USED_STEP_S < now_s {
                known.used_s = now_s;
                row.changed = true;
            }
            return match known.given(n).ok_or_else(|| wrong("a stream of", chat))? {
                Given::Stored { seq, time_us } => {
                    Ok(Appended::Stored { seq, time_us, history, version: 0, again: true })
                }
                Given::Refused(code) => Ok(Appended::Refused(code)),
            };
        }
        if n != watermark + 1 {
            return Ok(Appended::Expected(watermark + 1));
        }
        let decided = self.decide(append)?;
        let given = match &decided {
            Err(code) => Given::Refused(*code),
            Ok(_) => {
                let (seq, time_us) = self.next(chat)?;
                Given::Stored { seq, time_us }
            }
        };
        let row = self.row(chat)?;
        let new = || Stream { sender: sender.clone(), stream, ..Stream::default() };
        let mut known = at.map_or_else(new, |at| row.chat.streams.remove(at));
        known.give(given);
        known.used_s = now_s;
        row.chat.streams.insert(0, known);
        row.changed = true;
        match given {
            Given::Refused(code) => Ok(Appended::Refused(code)),
            Given::Stored { seq, time_us } => self.put(append, seq, time_us, decided.ok().flatten()),
        }
    }

    /// Seq and time of a chat's next message, which its row has from now on.
    fn next(&mut self, chat: &str) -> Read<(u64, u64)> {
        let now_us = self.now_us;
        let row = self.row(chat)?;
        row.chat.seq += 1;
        row.chat.time_us = now_us.max(row.chat.time_us + 1);
        if row.chat.first == row.chat.seq {
            row.chat.first_us = row.chat.time_us;
        }
        row.changed = true;
        Ok((row.chat.seq, row.chat.time_us))
    }

    fn put(&mut self, append: &Append, seq: u64, time_us: u64, effect: Option<Effect>) -> Read<Appended> {
        let Append { chat, sender, body, kind, .. } = append;
        let value = row::message_row(chat, sender, time_us, *kind, body);
        let table = open(&mut self.chat, self.transaction, CHAT)?;
        if table.insert(&row::message_key(chat, seq)[..], &value[..])?.is_some() {
            // A message that its head does not know was acknowledged once. Nothing of this is committed.
            let wrong = format!("message {seq} of {chat} is behind its head");
            return Err(Fault::File(redb::Error::Corrupted(wrong)));
        }
        self.retain(chat)?;
        let version = self.take_effect(chat, effect)?;
        Ok(Appended::Stored { seq, time_us, history: self.history(chat), version, again: false })
    }

    /// The row of a chat, from memory or from the table.
    pub fn row(&mut self, chat: &str) -> Read<&mut Row> {
        if !self.rows.contains_key(chat) {
            let table = open(&mut self.chat, self.transaction, CHAT)?;
            let found = match table.get(&row::chat_key(chat, Kind::Head)[..])? {
                Some(found) => ChatRow::read(found.value()).ok_or_else(|| wrong("the row of", chat))?,
                None => ChatRow::default(),
            };
            let (indexed_us, oldest_us) = (found.time_us, oldest(&found));
            let row = Row { indexed_us, oldest_us, chat: found, apart: Vec::new(), changed: false };
            self.rows.insert(chat.to_owned(), row);
        }
        self.rows.get_mut(chat).ok_or_else(|| wrong("the row of", chat))
    }

    /// Brings a stream that has a row of its own into the chat's row in memory.
    fn load_stream(&mut self, chat: &str, sender: &str, stream: u64) -> Read<()> {
        let known = |known: &Stream| known.stream == stream && known.sender == sender;
        if self.row(chat)?.chat.streams.iter().any(known) {
            return Ok(());
        }
        let table = open(&mut self.chat, self.transaction, CHAT)?;
        let found = match table.get(&row::stream_key(chat, sender, stream)[..])? {
            Some(found) => Stream::read(found.value()).ok_or_else(|| wrong("a stream of", chat))?,
            None => return Ok(()),
        };
        let row = self.row(chat)?;
        row.chat.streams.push(found);
        row.apart.push((sender.to_owned(), stream));
        Ok(())
    }

    /// Writes a chat's row, gives the streams that found no place a row of their own, moves it in the recency index.
    pub fn write(&mut self, chat: &str, mut row: Row) -> Result<(), redb::Error> {
        self.changed = true;
        let table = open(&mut self.chat, self.transaction, CHAT)?;
        let others = row.chat.streams.split_off(row.chat.streams.len().min(STREAMS_IN_ROW));
        for (sender, stream) in &row.apart {
            table.remove(&row::stream_key(chat, sender, *stream)[..])?;
        }
        for stream in others {
            let key = row::stream_key(chat, &stream.sender, stream.stream);
            let mut value = Vec::with_capacity(128);
            stream.write(&mut value);
            table.insert(&key[..], &value[..])?;
            let forget = open(&mut self.forget, self.transaction, FORGET)?;
            let day = stream.used_s / DAY_S;
            forget.insert(&[&day.to_be_bytes()[..], &key].concat()[..], &[][..])?;
        }
        table.insert(&row::chat_key(chat, Kind::Head)[..], &row.chat.write()[..])?;
        if row.chat.time_us != row.indexed_us {
            let recent = open(&mut self.recent, self.transaction, RECENT)?;
            if row.indexed_us != 0 {
                recent.remove(&row::recent_key(row.indexed_us, chat)[..])?;
            }
            recent.insert(&row::recent_key(row.chat.time_us, chat)[..], &[][..])?;
        }
        let oldest_us = oldest(&row.chat);
        if oldest_us != row.oldest_us {
            let table = open(&mut self.oldest, self.transaction, OLDEST)?;
            if let Some(before) = row.oldest_us {
                table.remove(&row::recent_key(before, chat)[..])?;
            }
            if let Some(now) = oldest_us {
                table.insert(&row::recent_key(now, chat)[..], &[][..])?;
            }
        }
        Ok(())
    }

    /// Removes streams that nobody used for longer than promised, a few at a time.
    pub fn forget(&mut self) -> Result<(), redb::Error> {
        let day = self.now_s().saturating_sub(self.terms.dedupe_s + USED_STEP_S) / DAY_S;
        let forget = open(&mut self.forget, self.transaction, FORGET)?;
        let upper = day.to_be_bytes();
        let mut due = Vec::new();
        for entry in forget.range::<&[u8]>(..&upper[..])?.take(FORGET_MAX) {
            due.push(entry?.0.value().to_vec());
        }
        let chat = open(&mut self.chat, self.transaction, CHAT)?;
        for key in due {
            let of_stream = key.get(8..).unwrap_or_default();
            // Used since: then there is an entry of a later day, too.
            let stream = chat.get(of_stream)?.and_then(|found| Stream::read(found.value()));
            if stream.is_some_and(|stream| stream.is_forgotten(self.now_us / 1_000_000, self.terms.dedupe_s))
            {
                chat.remove(of_stream)?;
            }
            forget.remove(&key[..])?;
            self.changed = true;
        }
        Ok(())
    }

    fn now_s(&self) -> u64 {
        self.now_us / 1_000_000
    }
}

/// Where a chat belongs in the index by oldest message.
fn oldest(chat: &ChatRow) -> Option<u64> {
    (chat.first <= chat.seq).then_some(chat.first_us)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use redb::{Database, ReadableDatabase, ReadableTableMetadata};

    use super::*;
    use crate::store::{Answer, Op};
    use crate::store_redb_history::Histories;
    use crate::store_redb_marks::LifeMarks;
    use crate::store_redb_read::{Definition, NAMED, TABLES};
    use crate::store_redb_step::Terms;

    const TERMS: Terms = Terms {
        dedupe_s: 7 * DAY_S,
        named_us: 24 * 3_600_000_000,
        messages_max: 0,
        kept_us: 30 * DAY_S * 1_000_000,
    };
    const BEGAN_S: u64 = 20_000 * DAY_S;

    fn database() -> Database {
        let backend = redb::backends::InMemoryBackend::new();
        let database = redb::Builder::new().create_with_backend(backend).unwrap();
        let change = database.begin_write().unwrap();
        TABLES.iter().for_each(|table| drop(change.open_table(*table).unwrap()));
        change.commit().unwrap();
        database
    }

    /// The outcomes, and whether anything was written.
    fn at(database: &Database, s: u64, ops: &[Op]) -> (Vec<Answer>, bool) {
        let change = database.begin_write().unwrap();
        let (histories, mut marks) = (Arc::new(Histories::new(5)), LifeMarks::default());
        let mut step = Step::new(&change, TERMS, histories, &mut marks, (BEGAN_S + s) * 1_000_000);
        let answers = ops.iter().map(|op| step.apply(op).unwrap().unwrap()).collect();
        step.forget().unwrap();
        step.forget_names().unwrap();
        let changed = step.finish().unwrap().changed;
        change.commit().unwrap();
        (answers, changed)
    }

    fn append(chat: &str, stream: u64, n: u64) -> Op {
        let (chat, sender) = (chat.to_owned(), "s".to_owned());
        let id = MessageId::Numbered { stream, n };
        Op::Append(Append { chat, sender, id, body: "b".into(), ..Append::default() })
    }

    fn rows(database: &Database, table: Definition) -> u64 {
        database.begin_read().unwrap().open_table(table).unwrap().len().unwrap()
    }

    #[test]
    fn ids_are_forgotten_after_their_days_and_not_before() {
        let database = database();
        let streams: Vec<Op> = (1..=20).map(|stream| append("a:s", stream, 1)).collect();
        at(&database, 0, &streams);
        let (messages, kept) = (20, 1 + 20 - STREAMS_IN_ROW as u64);
        assert_eq!(rows(&database, CHAT), messages + kept);
        let days = 7 * DAY_S;
        for (answer, op) in at(&database, days - 1, &streams[..2]).0.iter().zip(1..) {
            assert!(
                matches!(answer, Answer::Appended(Appended::Stored { seq, again: true, .. }) if *seq == op),
                "{answer:?}"
            );
        }
        // What was used then is known for as long again; the rest is gone, also from the file.
        let late = days + DAY_S + 2 * USED_STEP_S;
        let (answers, _) =
            at(&database, late, &[append("a:s", 1, 1), append("a:s", 9, 2), append("a:s", 9, 1)]);
        assert!(matches!(answers[0], Answer::Appended(Appended::Stored { seq: 1, again: true, .. })));
        assert_eq!(answers[1], Answer::Appended(Appended::Expected(1)));
        assert!(matches!(answers[2], Answer::Appended(Appended::Stored { seq: 21, again: false, .. })));
        let row = database.begin_read().unwrap().open_table(CHAT).unwrap();
        let row =
            row.get(&row::chat_key("a:s", Kind::Head)[..]).unwrap().map(|row| ChatRow::read(row.value()));
        let streams: Vec<u64> = row.flatten().unwrap().streams.iter().map(|stream| stream.stream).collect();
        assert_eq!((streams, rows(&database, CHAT), rows(&database, FORGET)), (vec![9, 1], 23, 2));
    }

    #[test]
    fn names_are_forgotten_after_their_hours_and_not_before() {
        let database = database();
        let named = |name: &str, body: &'static str| {
            let id = MessageId::Named(name.into());
            let (chat, sender) = ("a:s".into(), "s".into());
            Op::Append(Append { chat, sender, id, body: body.into(), ..Append::default() })
        };
        at(&database, 0, &[named("x", "1"), named("y", "1")]);
        at(&database, 10, &[named("z", "1")]);
        assert_eq!((rows(&database, CHAT), rows(&database, NAMED)), (1 + 3 + 3, 3));
        let day = 24 * 3_600;
        let stored = |answers: Vec<Answer>| match answers[..] {
            [Answer::Appended(Appended::Stored { seq, again, .. })] => (seq, again),
            _ => panic!("{answers:?}"),
        };
        assert_eq!(stored(at(&database, day - 1, &[named("x", "1")]).0), (1, true), "to the last second");
        assert_eq!(rows(&database, NAMED), 3, "use does not make it last longer");
        // Forgotten in time, whether or not it has been taken out of the file.
        assert_eq!(stored(at(&database, day, &[named("x", "2")]).0), (4, false));
        assert_eq!(
            (rows(&database, CHAT), rows(&database, NAMED)),
            (1 + 4 + 2, 2),
            "and y is out of the file"
        );
        at(&database, 2 * day, &[append("b:s", 1, 1)]);
        assert_eq!((rows(&database, CHAT), rows(&database, NAMED)), (1 + 4 + 2, 0));
    }

    #[test]
    fn the_recency_index_has_a_chat_once() {
        let database = database();
        at(&database, 0, &[append("a:s", 1, 1), append("b:s", 1, 1), append("a:s", 1, 2)]);
        at(&database, 5, &[append("a:s", 1, 3)]);
        assert_eq!(rows(&database, RECENT), 2);
        let expire = |chat, s: u64| Op::Expire {
            bucket: crate::store::chat_bucket(chat),
            before_us: (BEGAN_S + s) * 1_000_000,
            limit: 9,
        };
        at(&database, 6, &[expire("a:s", 5), expire("b:s", 5)]);
        assert_eq!(
            (rows(&database, RECENT), rows(&database, OLDEST)),
            (2, 1),
            "whoever keeps nothing is recent"
        );
        at(&database, 6, &[append("b:s", 1, 2), expire("a:s", 6)]);
        assert_eq!((rows(&database, RECENT), rows(&database, OLDEST)), (2, 1));
    }

    #[test]
    fn a_chat_that_goes_on_loses_what_is_too_old() {
        let database = database();
        let days = |days: u64| days * DAY_S;
        let head = Op::Head { chat: "a:s".into(), user: "s".into() };
        let first = |s, stream, n| match at(&database, s, &[append("a:s", stream, n), head.clone()]).0[..] {
            [_, Answer::Head(head)] => head.first,
            ref other => panic!("{other:?}"),
        };
        for day in 0..=30 {
            assert_eq!(first(days(day), 1, day + 1), 1, "not yet");
        }
        assert_eq!(first(days(31), 1, 32), 2);
        assert_eq!(first(days(90), 2, 1), 33, "all but the new one");
        assert_eq!((rows(&database, OLDEST), rows(&database, CHAT)), (1, 2), "a row and a message");
    }

    #[test]
    fn what_changes_nothing_writes_nothing() {
        let database = database();
        let bind = Op::Bind { user: 1, device: 1, attempt: 5, connection: 9, devices_max: 8, issued_s: 0 };
        let list = Op::ListChat { user: "s".into(), chat: "a:s".into() };
        let changes = [append("a:s", 1, 1), bind, list];
        assert!(at(&database, 0, &changes).1);
        let questions = [append("a:s", 1, 3), Op::Expire { bucket: 7, before_us: u64::MAX, limit: 9 }];
        assert!(!at(&database, 1, &[&changes[..], &questions[..]].concat()).1);
    }

    #[test]
    fn times_rise_when_the_clock_does_not() {
        let database = database();
        let time = |answers: Vec<Answer>| match answers[..] {
            [.., Answer::Appended(Appended::Stored { time_us, .. })] => time_us,
            _ => panic!("{answers:?}"),
        };
        let first = time(at(&database, 100, &[append("a:s", 1, 1)]).0);
        assert_eq!(time(at(&database, 0, &[append("a:s", 1, 2), append("a:s", 1, 3)]).0), first + 2);
    }
}
