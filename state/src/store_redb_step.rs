//! Changes to the redb store: the operations of one write transaction, in their order. On the writer's thread.
//!
//! What concerns one chat is in `store_redb_append`.
//!
//! Trap: while a step runs, the row in memory is the truth and the one in the table is old. Whoever needs a head asks
//! [`Step::row`].

use std::collections::BTreeMap;
use std::sync::Arc;

use redb::{ReadableTable, Table, WriteTransaction};

use crate::store::{
    Answer, Bound, Head, Moved, Op, Outcome, Page, Route, Seen, StoreError, chat_bucket, first_behind,
};
use crate::store_redb_append::Row;
use crate::store_redb_history::{self as history, Histories};
use crate::store_redb_marks::LifeMarks;
use crate::store_redb_read::{
    self as ask, CHAT, Definition, Fault, LISTED, META, NAME, RECENT, REVOKED, ROUTE, Read, SEEN, USER, wrong,
};
use crate::store_redb_row as row;

/// What does not change while the store is open.
#[derive(Debug, Clone, Copy)]
pub struct Terms {
    /// How long ids are remembered.
    pub dedupe_s: u64,
    /// How long a name is remembered.
    pub named_us: u64,
    /// Messages that a chat keeps; 0: all.
    pub messages_max: u64,
    /// How long they are kept; 0: for ever.
    pub kept_us: u64,
}

/// What a transaction leaves behind.
#[derive(Debug)]
pub struct Finished {
    /// There is something to commit.
    pub changed: bool,
    /// The marks are among it.
    pub marked: bool,
    /// From the commit on.
    pub histories: Arc<Histories>,
}

/// The operations of one transaction.
pub struct Step<'t> {
    pub(crate) transaction: &'t WriteTransaction,
    pub(crate) terms: Terms,
    pub(crate) now_us: u64,
    pub(crate) histories: Arc<Histories>,
    marks: &'t mut LifeMarks,
    pub(crate) chat: Slot<'t>,
    pub(crate) recent: Slot<'t>,
    pub(crate) oldest: Slot<'t>,
    route: Slot<'t>,
    revoked: Slot<'t>,
    seen: Slot<'t>,
    user: Slot<'t>,
    name: Slot<'t>,
    listed: Slot<'t>,
    pub(crate) forget: Slot<'t>,
    pub(crate) named: Slot<'t>,
    pub(crate) rows: BTreeMap<String, Row>,
    pub(crate) changed: bool,
}

/// A table, once it is open.
pub type Slot<'t> = Option<Table<'t, &'static [u8], &'static [u8]>>;

impl<'t> Step<'t> {
    /// Nothing done yet. `now_us`: Unix time of all that is done.
    pub fn new(
        transaction: &'t WriteTransaction,
        terms: Terms,
        histories: Arc<Histories>,
        marks: &'t mut LifeMarks,
        now_us: u64,
    ) -> Self {
        Step {
            transaction,
            terms,
            now_us,
            histories,
            marks,
            chat: None,
            recent: None,
            oldest: None,
            route: None,
            revoked: None,
            seen: None,
            user: None,
            name: None,
            listed: None,
            forget: None,
            named: None,
            rows: BTreeMap::new(),
            changed: false,
        }
    }

    /// Does one operation. `Err`: the file failed, and with it the whole transaction.
    pub fn apply(&mut self, op: &Op) -> Result<Outcome, redb::Error> {
        match self.one(op) {
            Ok(answer) => Ok(Ok(answer)),
            Err(Fault::Row(reason)) => Ok(Err(StoreError::Corrupt(reason))),
            Err(Fault::File(error)) => Err(error),
        }
    }

    /// Writes what is still in memory.
    pub fn finish(mut self) -> Result<Finished, redb::Error> {
        self.flush()?;
        let marked = self.marks.is_due() || (self.changed && self.marks.is_unwritten());
        if marked {
            self.marks.write(self.transaction)?;
        }
        Ok(Finished { changed: self.changed || marked, marked, histories: self.histories })
    }

    /// The tables are the truth again, until the next message.
    pub fn flush(&mut self) -> Result<(), redb::Error> {
        for (chat, row) in std::mem::take(&mut self.rows) {
            if row.changed {
                self.write(&chat, row)?;
            }
        }
        Ok(())
    }

    fn one(&mut self, op: &Op) -> Read<Answer> {
        let transaction = self.transaction;
        match op {
            Op::Incarnate => {
                let n = self.count("incarnations", 1, 1)?;
                // Wraps around below 2^24 and leaves out 0.
                Ok(Answer::Incarnation(((n - 1) % 0xff_ffff + 1) as u32))
            }
            Op::UserNumbers { count } => {
                Ok(Answer::UserNumbers(self.count("users", *count, 1 << 20)? + 1 - count))
            }
            Op::Register { name, candidate } => self.register(name, *candidate).map(Answer::User),
            Op::User { name } => ask::user(open(&mut self.user, transaction, USER)?, name).map(Answer::User),
            Op::Name { user } => ask::name(open(&mut self.name, transaction, NAME)?, *user).map(Answer::Name),
            Op::Bind { user, device, issued_s, .. }
                if *issued_s > 0 && self.is_revoked(*user, Some(*device), *issued_s)? =>
            {
                Ok(Answer::Bound(Bound::Revoked))
            }
            Op::Bind { user, device, attempt, connection, devices_max, .. } => {
                self.bind(*user, *device, *attempt, *connection, *devices_max).map(Answer::Bound)
            }
            Op::Retire { user } => {
                let table = open(&mut self.route, transaction, ROUTE)?;
                table.insert(&row::retired_key(*user)[..], &[][..])?;
                open(&mut self.seen, transaction, SEEN)?.remove(&user.to_be_bytes()[..])?;
                self.changed = true;
                Ok(Answer::Done)
            }
            Op::Unname { user } => {
                let gone = open(&mut self.name, transaction, NAME)?.remove(&user.to_be_bytes()[..])?;
                self.changed |= gone.is_some();
                Ok(Answer::Done)
            }
            Op::Renumber { name, from, to } => {
                if ask::user(open(&mut self.user, transaction, USER)?, name)? == Some(*from) {
                    self.name_number(name, *to)?;
                }
                Ok(Answer::Done)
            }
            Op::Revoke { user, device, before_s, keep_s } => {
                self.revoke(&row::revoked_key(*user, *device), *before_s, *keep_s).map(|()| Answer::Done)
            }
            Op::IsRevoked { user, issued_s } => self.is_revoked(*user, None, *issued_s).map(Answer::Revoked),
            Op::Unbind { user, connection } => self.unbind(*user, *connection).map(|()| Answer::Done),
            Op::Seen { user } => ask::seen(open(&mut self.seen, transaction, SEEN)?, *user).map(Answer::Seen),
            Op::Hide { user, hides } => {
                let table = open(&mut self.seen, transaction, SEEN)?;
                let seen = Seen { hides: *hides, ..ask::seen(table, *user)? };
                self.put_seen(*user, seen).map(|()| Answer::Done)
            }
            Op::Routes { user } => ask::routes(open(&mut self.route, transaction, ROUTE)?, *user),
            Op::ListChat { user, chat } => {
                let table = open(&mut self.listed, transaction, LISTED)?;
                let key = row::listed_key(user, chat);
                if table.get(&key[..])?.is_none() {
                    table.insert(&key[..], &[][..])?;
                    self.changed = true;
                }
                Ok(Answer::Done)
            }
            Op::Chats { user, after, until, limit } => {
                let table = open(&mut self.listed, transaction, LISTED)?;
                ask::chats(table, user, after, until, *limit).map(Answer::Chats)
            }
            Op::Append(append) => self.append(append).map(Answer::Appended),
            Op::Head { chat, user } => {
                let row = &self.row(chat)?.chat;
                let (seq, first) = (row.seq, row.first);
                let history = self.history(chat);
                let table = open(&mut self.chat, transaction, CHAT)?;
                let since = ask::since(table, chat, user)?;
                let first = first_behind(since, first);
                let head = Head { history, seq, first, since, ..Head::default() };
                ask::with_cursors(table, (chat, user), head).map(Answer::Head)
            }
            Op::Pull { chat, reader, cursor, limit, reverse } => {
                let row = &self.row(chat)?.chat;
                let (head, first) = (row.seq, row.first);
                let table = open(&mut self.chat, transaction, CHAT)?;
                let since = ask::since(table, chat, reader)?;
                let (messages, read_to) = ask::messages(table, chat, (since, *cursor), *limit, *reverse)?;
                let (history, first) = (self.history(chat), first_behind(since, first));
                Ok(Answer::Messages(Page { history, head, first, since, messages, read_to }))
            }
            Op::Vacate { chat, user } => self.vacate(chat, user).map(|()| Answer::Done),
            Op::Delivered { chat, user, seq, read } => {
                let head = self.row(chat)?.chat.seq;
                let (before, delivered) =
                    self.move_cursor(chat, user, row::Kind::Delivered, head.min(*seq))?;
                let is_news = delivered > before;
                let mut moved = Moved { delivered: if is_news { delivered } else { 0 }, read: 0, is_news };
                if *read > 0 {
                    let (before, read) = self.move_cursor(chat, user, row::Kind::Read, head.min(*read))?;
                    (moved.read, moved.is_news) = (read, is_news || read > before);
                }
                Ok(Answer::Moved(moved))
            }
            Op::Member { chat, user } => {
                let table = open(&mut self.chat, transaction, CHAT)?;
                ask::standing(table, chat, user).map(Answer::Standing)
            }
            Op::Members { chat, cursors } => {
                ask::roster(open(&mut self.chat, transaction, CHAT)?, chat, *cursors).map(Answer::Roster)
            }
            Op::Mark { server, life, pushed_us } => {
                Ok(Answer::Marks(self.marks.mark(server, *life, *pushed_us, self.now_us)))
            }
            Op::DropMark { server, life } => {
                self.marks.forget(server, *life);
                Ok(Answer::Done)
            }
            Op::Recent { bucket, after_us, limit } => {
                self.flush()?;
                let table = open(&mut self.recent, transaction, RECENT)?;
                ask::recent(table, *bucket, *after_us, *limit).map(Answer::Recent)
            }
            Op::LoseHistory { bucket, history } => {
                if self.histories.of(*bucket) == *history {
                    let new = history::new_history();
                    transaction.open_table(META)?.insert(history::key(*bucket).as_str(), new)?;
                    Arc::make_mut(&mut self.histories).draw(*bucket, new);
                    self.changed = true;
                }
                Ok(Answer::Done)
            }
            Op::Expire { bucket, before_us, limit } => {
                self.expire(*bucket, *before_us, *limit)?;
                Ok(Answer::Done)
            }
        }
    }

    /// Moves a cursor forward: where it stood and where it stands.
    fn move_cursor(&mut self, chat: &str, user: &str, kind: row::Kind, seq: u64) -> Read<(u64, u64)> {
        let table = open(&mut self.chat, self.transaction, CHAT)?;
        let before = ask::cursor(table, chat, user, kind)?;
        if seq > before {
            table.insert(&row::cursor_key(chat, user, kind)[..], &seq.to_be_bytes()[..])?;
            self.changed = true;
        }
        Ok((before, before.max(seq)))
    }

    /// Of the bucket that a chat is in.
    pub fn history(&self, chat: &str) -> u64 {
        self.histories.of(chat_bucket(chat))
    }

    /// Adds to a counter: the new value. It is never behind the clock: a new file, or an older copy, must not give out numbers that are
    /// still in use from the one before.
    fn count(&mut self, counter: &str, more: u64, per_s: u64) -> Read<u64> {
        let begin = self.now_us / 1_000_000 * per_s;
        let mut meta = self.transaction.open_table(META)?;
        let value = meta.get(counter)?.map_or(0, |found| found.value());
        // The low bits go on where they were: buckets are chosen by them.
        let value = if value < begin { begin + value % per_s } else { value } + more;
        meta.insert(counter, value)?;
        self.changed = true;
        Ok(value)
    }

    fn register(&mut self, name: &str, candidate: u64) -> Read<Option<u64>> {
        let table = open(&mut self.user, self.transaction, USER)?;
        if let Some(number) = ask::user(table, name)? {
            return Ok(Some(number));
        }
        self.name_number(name, candidate)?;
        Ok(Some(candidate))
    }

    /// Both ways.
    fn name_number(&mut self, name: &str, number: u64) -> Read<()> {
        let users = open(&mut self.user, self.transaction, USER)?;
        users.insert(name.as_bytes(), &number.to_be_bytes()[..])?;
        let names = open(&mut self.name, self.transaction, NAME)?;
        names.insert(&number.to_be_bytes()[..], name.as_bytes())?;
        self.changed = true;
        Ok(())
    }

    /// `device`: beside all of them.
    pub fn is_revoked(&mut self, user: u64, device: Option<u32>, issued_s: u64) -> Read<bool> {
        let now_us = self.now_us;
        let table = open(&mut self.revoked, self.transaction, REVOKED)?;
        for device in [None, device] {
            if ask::revocation(table, user, device)?
                .is_some_and(|(before_s, until_us)| issued_s < before_s && until_us > now_us)
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Looks through all that are kept, to forget those that are over: they are few, and this is rare.
    fn revoke(&mut self, key: &[u8], before_s: u64, keep_s: u64) -> Read<()> {
        let now_us = self.now_us;
        let table = open(&mut self.revoked, self.transaction, REVOKED)?;
        table.retain(|_, row| row::pair(row).is_none_or(|(_, until_us)| until_us > now_us))?;
        let old = table.get(key)?.and_then(|found| row::pair(found.value())).unwrap_or_default();
        let until_us = now_us.saturating_add(keep_s.saturating_mul(1_000_000));
        let row = [before_s.max(old.0).to_be_bytes(), until_us.max(old.1).to_be_bytes()].concat();
        table.insert(key, &row[..])?;
        self.changed = true;
        Ok(())
    }

    fn unbind(&mut self, user: u64, connection: u64) -> Read<()> {
        let table = open(&mut self.route, self.transaction, ROUTE)?;
        let (routes, retired) = routes_of(ask::routes(table, user)?);
        // A connection id names one binding only, so comparing it compares the attempt too.
        let is_gone = |route: &&Route| route.connection == connection;
        let gone: Vec<&Route> = routes.iter().filter(is_gone).collect();
        for route in &gone {
            table.remove(&row::route_key(user, route.device)[..])?;
            self.changed = true;
        }
        if retired || gone.is_empty() || gone.len() < routes.len() {
            return Ok(());
        }
        let seen = ask::seen(open(&mut self.seen, self.transaction, SEEN)?, user)?;
        self.put_seen(user, Seen { last_s: self.now_us / 1_000_000, ..seen })
    }

    fn put_seen(&mut self, user: u64, Seen { last_s, hides }: Seen) -> Read<()> {
        let table = open(&mut self.seen, self.transaction, SEEN)?;
        let row = [&last_s.to_be_bytes()[..], &[hides.bits()]].concat();
        table.insert(&user.to_be_bytes()[..], &row[..])?;
        self.changed = true;
        Ok(())
    }

    fn bind(
        &mut self,
        user: u64,
        device: u32,
        attempt: u64,
        connection: u64,
        devices_max: usize,
    ) -> Read<Bound> {
        let table = open(&mut self.route, self.transaction, ROUTE)?;
        let (routes, retired) = routes_of(ask::routes(table, user)?);
        if retired {
            return Ok(Bound::Retired);
        }
        let key = row::route_key(user, device);
        let stored = match table.get(&key[..])? {
            Some(found) => {
                Some(row::pair(found.value()).ok_or_else(|| wrong("a route of", &user.to_string()))?)
            }
            None => None,
        };
        let mut replaced = None;
        if let Some((bound, to)) = stored {
            if bound > attempt || (bound == attempt && to != connection) {
                return Ok(Bound::Stale { stored: bound });
            }
            if bound == attempt {
                return Ok(Bound::Yes { replaced: None, evicted: None });
            }
            replaced = (to != connection).then_some(to);
        }
        let others: Vec<_> = routes.into_iter().filter(|route| route.device != device).collect();
        let oldest = others.iter().min_by_key(|route| route.attempt).filter(|_| others.len() >= devices_max);
        if let Some(oldest) = oldest {
            table.remove(&row::route_key(user, oldest.device)[..])?;
        }
        let value = [attempt.to_be_bytes(), connection.to_be_bytes()].concat();
        table.insert(&key[..], &value[..])?;
        self.changed = true;
        Ok(Bound::Yes { replaced, evicted: oldest.map(|route| route.connection) })
    }
}

/// What was read of a number, and whether it is nobody's any more.
fn routes_of(read: Answer) -> (Vec<Route>, bool) {
    match read {
        Answer::Routes(routes) => (routes, false),
        Answer::Retired(routes) => (routes, true),
        _ => (Vec::new(), false),
    }
}

/// The table, opened at its first use in this transaction.
pub fn open<'a, 't>(
    slot: &'a mut Slot<'t>,
    transaction: &'t WriteTransaction,
    definition: Definition,
) -> Result<&'a mut Table<'t, &'static [u8], &'static [u8]>, redb::Error> {
    if slot.is_none() {
        *slot = Some(transaction.open_table(definition)?);
    }
    slot.as_mut().ok_or(redb::Error::DatabaseClosed)
}
