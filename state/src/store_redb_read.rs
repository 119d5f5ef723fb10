//! Questions to the redb store, over a read or a write transaction alike. On whatever thread asks.
//!
//! Trap: a row that makes no sense is told as such for the one question ([`Fault::Row`]); only the file's own failure
//! ([`Fault::File`]) takes the others of the transaction with it.

use std::collections::HashMap;
use std::ops::Bound;

use redb::{ReadTransaction, ReadableTable, TableDefinition};

use crate::group::{Group, Member, Stay};
use crate::store::{
    Answer, Head, Hides, Op, Outcome, PULL_BYTES_MAX, Page, Recent, Roster, Route, Seen, Standing,
    StoreError, Stored, chat_bucket, first_behind, peer,
};
use crate::store_redb_group;
use crate::store_redb_history::Histories;
use crate::store_redb_row::{self as row, ChatRow, Kind};

/// A table of bytes.
pub type Definition = TableDefinition<'static, &'static [u8], &'static [u8]>;

/// Everything of chats: see [`Kind`].
pub const CHAT: Definition = TableDefinition::new("chat");
/// Bucket, time, chat → nothing: one entry a chat, at its newest message.
pub const RECENT: Definition = TableDefinition::new("recent");
/// Bucket, time, chat → nothing: one entry a chat that keeps messages, at its oldest one.
pub const OLDEST: Definition = TableDefinition::new("oldest");
/// Server, life → how far it has pushed.
pub const MARK: Definition = TableDefinition::new("mark");
/// User, device → attempt, connection.
pub const ROUTE: Definition = TableDefinition::new("route");
/// Name → number.
pub const USER: Definition = TableDefinition::new("user");
/// Number → name.
pub const NAME: Definition = TableDefinition::new("name");
/// User, chat → nothing.
pub const LISTED: Definition = TableDefinition::new("listed");
/// Day of last use, key of a stream's row → nothing: what may be forgotten after that day plus `dedupe_days`.
pub const FORGET: Definition = TableDefinition::new("forget");
/// Time until which a name is remembered, key of its row → nothing.
pub const NAMED: Definition = TableDefinition::new("named");
/// User, and a device or all of them → before when tokens are revoked, and until when that is kept. Not in [`TABLES`]: it is
/// made when it is first looked at, so that a file of before it needs no migration.
pub const REVOKED: Definition = TableDefinition::new("revoked");
/// User → seconds at which the last route was removed (8 bytes), what is hidden (1). Made when it is first looked at, as
/// [`REVOKED`] is.
pub const SEEN: Definition = TableDefinition::new("seen");
/// Layout, counters, histories.
pub const META: TableDefinition<&str, u64> = TableDefinition::new("meta");

/// All tables but [`META`].
pub const TABLES: [Definition; 10] = [CHAT, RECENT, OLDEST, MARK, ROUTE, USER, NAME, LISTED, FORGET, NAMED];

/// Why there is no answer.
#[derive(Debug)]
pub enum Fault {
    /// This row makes no sense; the others may.
    Row(String),
    /// The file cannot be read or written.
    File(redb::Error),
}

impl<E: Into<redb::Error>> From<E> for Fault {
    fn from(error: E) -> Fault {
        Fault::File(error.into())
    }
}

/// What the helpers give.
pub type Read<T> = Result<T, Fault>;

/// Whether an operation changes nothing.
pub fn is_question(op: &Op) -> bool {
    matches!(
        op,
        Op::User { .. }
            | Op::Name { .. }
            | Op::IsRevoked { .. }
            | Op::Routes { .. }
            | Op::Seen { .. }
            | Op::Chats { .. }
            | Op::Member { .. }
            | Op::Members { .. }
            | Op::Head { .. }
            | Op::Pull { .. }
            | Op::Recent { .. }
    )
}

/// Answers a question from a read transaction.
pub fn answer(transaction: &ReadTransaction, histories: &Histories, op: &Op) -> Outcome {
    let ask = || match op {
        Op::User { name } => user(&transaction.open_table(USER)?, name).map(Answer::User),
        Op::Name { user } => name(&transaction.open_table(NAME)?, *user).map(Answer::Name),
        Op::IsRevoked { user, issued_s } => {
            let table = match transaction.open_table(REVOKED) {
                Err(redb::TableError::TableDoesNotExist(_)) => return Ok(Answer::Revoked(false)),
                table => table?,
            };
            // Kept for longer than a token of before it may live: no clock is needed.
            let found = revocation(&table, *user, None)?;
            Ok(Answer::Revoked(found.is_some_and(|(before_s, _)| *issued_s < before_s)))
        }
        Op::Routes { user } => routes(&transaction.open_table(ROUTE)?, *user),
        Op::Seen { user } => match transaction.open_table(SEEN) {
            Ok(table) => seen(&table, *user).map(Answer::Seen),
            Err(redb::TableError::TableDoesNotExist(_)) => Ok(Answer::Seen(Seen::default())),
            Err(error) => Err(error.into()),
        },
        Op::Chats { user, after, until, limit } => {
            chats(&transaction.open_table(LISTED)?, user, after, until, *limit).map(Answer::Chats)
        }
        Op::Head { chat, user } => {
            let table = transaction.open_table(CHAT)?;
            let (seq, first) = head(&table, chat)?;
            let history = histories.of(chat_bucket(chat));
            let since = since(&table, chat, user)?;
            let first = first_behind(since, first);
            with_cursors(&table, (chat, user), Head { history, seq, first, since, ..Head::default() })
                .map(Answer::Head)
        }
        Op::Pull { chat, reader, cursor, limit, reverse } => {
            let table = transaction.open_table(CHAT)?;
            let since = since(&table, chat, reader)?;
            let (messages, read_to) = messages(&table, chat, (since, *cursor), *limit, *reverse)?;
            let (head, first) = head(&table, chat)?;
            let (history, first) = (histories.of(chat_bucket(chat)), first_behind(since, first));
            Ok(Answer::Messages(Page { history, head, first, since, messages, read_to }))
        }
        Op::Member { chat, user } => {
            standing(&transaction.open_table(CHAT)?, chat, user).map(Answer::Standing)
        }
        Op::Members { chat, cursors } => {
            roster(&transaction.open_table(CHAT)?, chat, *cursors).map(Answer::Roster)
        }
        Op::Recent { bucket, after_us, limit } => {
            recent(&transaction.open_table(RECENT)?, *bucket, *after_us, *limit).map(Answer::Recent)
        }
        other => Err(Fault::Row(format!("{other:?} is no question"))),
    };
    ask().map_err(|fault| match fault {
        Fault::Row(reason) => StoreError::Corrupt(reason),
        Fault::File(redb::Error::Corrupted(reason)) => StoreError::Corrupt(reason),
        Fault::File(error) => StoreError::Refused(error.to_string()),
    })
}

/// Seqs of the newest message (0: none) and of the oldest one that is kept.
fn head(table: &impl Bytes, chat: &str) -> Read<(u64, u64)> {
    match table.get(&row::chat_key(chat, Kind::Head)[..])? {
        Some(found) => ChatRow::read_head(found.value()).ok_or_else(|| wrong("the row of", chat)),
        None => Ok((0, 1)),
    }
}

/// What is kept of a user who is not there.
pub fn seen(table: &impl Bytes, user: u64) -> Read<Seen> {
    let Some(found) = table.get(&user.to_be_bytes()[..])? else { return Ok(Seen::default()) };
    match found
        .value()
        .split_last_chunk::<1>()
        .map(|(time, bits)| (time.try_into().map(u64::from_be_bytes), bits[0]))
    {
        Some((Ok(last_s), bits)) => Ok(Seen { last_s, hides: Hides::of_bits(bits) }),
        _ => Err(wrong("when was seen", &user.to_string())),
    }
}

/// Chats of a bucket from behind this time on.
pub fn recent(table: &impl Bytes, bucket: u32, after_us: u64, limit: usize) -> Read<Vec<Recent>> {
    let from = row::recent_from(bucket, after_us.saturating_add(1));
    let until = row::recent_from(bucket + 1, 0);
    let range = table.range::<&[u8]>(&from[..]..&until[..])?;
    range
        .take(limit)
        .map(|entry| {
            let (key, _) = entry?;
            let (time_us, chat) =
                row::recent_of(key.value()).ok_or_else(|| wrong("the recency of", &bucket.to_string()))?;
            Ok(Recent { chat, time_us })
        })
        .collect()
}

/// How far a user has a chat: delivered or read.
pub fn cursor(table: &impl Bytes, chat: &str, user: &str, kind: Kind) -> Read<u64> {
    match table.get(&row::cursor_key(chat, user, kind)[..])? {
        Some(found) => number(found.value()).ok_or_else(|| wrong("a cursor of", chat)),
        None => Ok(0),
    }
}

/// Up to where the chat was another's, who had this name; of the server itself, which has none, 0.
pub fn since(table: &impl Bytes, chat: &str, user: &str) -> Read<u64> {
    if user.is_empty() { Ok(0) } else { cursor(table, chat, user, Kind::Since) }
}

/// One message; `None`: it is not there, or damaged.
pub fn message(table: &impl Bytes, chat: &str, seq: u64) -> Read<Option<Stored>> {
    let found = table.get(&row::message_key(chat, seq)[..])?;
    Ok(found.and_then(|found| row::message(chat, seq, found.value())))
}

/// A group; of version 0 if there is none.
pub fn group(table: &impl Bytes, chat: &str) -> Read<Group> {
    match table.get(&row::chat_key(chat, Kind::Group)[..])? {
        Some(found) => store_redb_group::group(found.value()).ok_or_else(|| wrong("the group", chat)),
        None => Ok(Group::default()),
    }
}

/// Somebody who is or was in a group.
pub fn member(table: &impl Bytes, chat: &str, user: &str) -> Read<Option<Member>> {
    match table.get(&row::member_key(chat, user)[..])? {
        Some(found) => {
            store_redb_group::member(found.value()).map(Some).ok_or_else(|| wrong("a member of", chat))
        }
        None => Ok(None),
    }
}

/// Earlier stays of somebody in a group.
pub fn past(table: &impl Bytes, chat: &str, user: &str) -> Read<Vec<Stay>> {
    match table.get(&row::cursor_key(chat, user, Kind::Past)[..])? {
        Some(found) => store_redb_group::past(found.value()).ok_or_else(|| wrong("a past member of", chat)),
        None => Ok(Vec::new()),
    }
}

/// All of that.
pub fn standing(table: &impl Bytes, chat: &str, user: &str) -> Read<Standing> {
    let member = member(table, chat, user)?;
    // Whoever never was in it was never in it before.
    let past = if member.is_some() { past(table, chat, user)? } else { Vec::new() };
    Ok(Standing { group: group(table, chat)?, member, past })
}

/// A group and everybody who is or was in it, with how far they have it if that is asked for.
pub fn roster(table: &impl Bytes, chat: &str, with_cursors: bool) -> Read<Roster> {
    let (from, until) = (row::chat_key(chat, Kind::Member), row::chat_key(chat, Kind::Group));
    let range = table.range::<&[u8]>(&from[..]..&until[..])?;
    let members = range.map(|entry| {
        let (key, value) = entry?;
        let user = key.value().get(from.len()..).map(<[u8]>::to_vec).map(String::from_utf8);
        let member = store_redb_group::member(value.value());
        user.and_then(Result::ok).zip(member).ok_or_else(|| wrong("a member of", chat))
    });
    let members: Vec<(String, Member)> = members.collect::<Read<_>>()?;
    let cursors = if with_cursors {
        let (delivered, read) = (cursors(table, chat, Kind::Delivered)?, cursors(table, chat, Kind::Read)?);
        let of = |all: &HashMap<Vec<u8>, u64>, user: &str| all.get(user.as_bytes()).copied().unwrap_or(0);
        members.iter().map(|(user, _)| (of(&delivered, user), of(&read, user))).collect()
    } else {
        Vec::new()
    };
    Ok(Roster { group: group(table, chat)?, members, cursors })
}

/// How far everybody has a chat, by name: one range instead of a look for each of thousands.
fn cursors(table: &impl Bytes, chat: &str, kind: Kind) -> Read<HashMap<Vec<u8>, u64>> {
    let from = row::chat_key(chat, kind);
    let mut until = from.clone();
    if let Some(kind) = until.last_mut() {
        *kind += 1;
    }
    let range = table.range::<&[u8]>(&from[..]..&until[..])?;
    range
        .map(|entry| {
            let (key, value) = entry?;
            let user = key.value().get(from.len()..).unwrap_or_default().to_vec();
            Ok((user, number(value.value()).ok_or_else(|| wrong("a cursor of", chat))?))
        })
        .collect()
}

/// The same head, with the cursors of the user and the other one.
pub fn with_cursors(table: &impl Bytes, (chat, user): (&str, &str), head: Head) -> Read<Head> {
    let of = |user: Option<&str>, kind| user.map_or(Ok(0), |user| cursor(table, chat, user, kind));
    let peer = peer(chat, user);
    Ok(Head {
        delivered: of(Some(user), Kind::Delivered)?,
        read: of(Some(user), Kind::Read)?,
        peer_delivered: of(peer, Kind::Delivered)?,
        peer_read: of(peer, Kind::Read)?,
        ..head
    })
}

/// Messages behind a cursor, or before it, and behind `since`, as many as fit, and the last seq that was looked at.
pub fn messages(
    table: &impl Bytes,
    chat: &str,
    (since, cursor): (u64, u64),
    limit: usize,
    reverse: bool,
) -> Read<(Vec<Stored>, u64)> {
    let upper = match (reverse, cursor) {
        (false, _) | (true, 0) => row::chat_key(chat, Kind::Delivered),
        (true, _) => row::message_key(chat, cursor.max(since + 1)),
    };
    let lower = row::message_key(chat, if reverse { since } else { cursor.max(since) });
    let (lower, upper) = (Bound::Excluded(lower), Bound::Excluded(upper));
    let range = table.range::<&[u8]>((slice(&lower), slice(&upper)))?;
    let read = |entry: Result<(Guard, Guard), redb::StorageError>| {
        let (key, value) = entry?;
        let seq = key.value().last_chunk().copied().map_or(0, u64::from_be_bytes);
        let message = row::message(chat, seq, value.value());
        if message.is_none() {
            // Left out and told of: its neighbours are none the worse for it.
            tracing::error!(chat, seq, "a message fails its checksum and is left out");
        }
        Ok::<_, redb::StorageError>((seq, message))
    };
    let (mut forwards, mut backwards);
    let entries: &mut dyn Iterator<Item = _> = if reverse {
        backwards = range.rev();
        &mut backwards
    } else {
        forwards = range;
        &mut forwards
    };
    let (mut found, mut bytes, mut read_to) = (Vec::new(), 0, 0);
    while found.len() < limit
        && bytes < PULL_BYTES_MAX
        && let Some(entry) = entries.next()
    {
        let (seq, message) = read(entry)?;
        read_to = seq;
        if let Some(message) = message {
            bytes += message.body.len();
            found.push(message);
        }
    }
    Ok((found, read_to))
}

/// The user of a name.
pub fn user(table: &impl Bytes, name: &str) -> Read<Option<u64>> {
    let Some(found) = table.get(name.as_bytes())? else { return Ok(None) };
    row::user(found.value()).map(Some).ok_or_else(|| wrong("the row of", name))
}

/// The name of a user.
pub fn name(table: &impl Bytes, user: u64) -> Read<Option<String>> {
    let Some(found) = table.get(&user.to_be_bytes()[..])? else { return Ok(None) };
    let name = String::from_utf8(found.value().to_vec());
    name.map(Some).map_err(|_| wrong("the name of", &user.to_string()))
}

/// Before when tokens of a user are revoked, for a device or for all, and until when that is kept.
pub fn revocation(table: &impl Bytes, user: u64, device: Option<u32>) -> Read<Option<(u64, u64)>> {
    let Some(found) = table.get(&row::revoked_key(user, device)[..])? else { return Ok(None) };
    row::pair(found.value()).map(Some).ok_or_else(|| wrong("a revocation of", &user.to_string()))
}

/// Where a user's devices are, by device; also when the number is nobody's any more.
pub fn routes(table: &impl Bytes, user: u64) -> Read<Answer> {
    let from = row::retired_key(user);
    let (mut retired, mut routes) = (false, Vec::new());
    for entry in table.range::<&[u8]>(&from[..]..=&row::route_key(user, u32::MAX)[..])? {
        let (key, value) = entry?;
        if key.value().len() == from.len() {
            retired = true;
            continue;
        }
        let device = key.value().last_chunk().copied().map_or(0, u32::from_be_bytes);
        let (attempt, connection) =
            row::pair(value.value()).ok_or_else(|| wrong("a route of", &user.to_string()))?;
        routes.push(Route { device, attempt, connection });
    }
    Ok(if retired { Answer::Retired(routes) } else { Answer::Routes(routes) })
}

/// A page of a user's chats.
pub fn chats(table: &impl Bytes, user: &str, after: &str, until: &str, limit: usize) -> Read<Vec<String>> {
    // Empty bounds would otherwise meet a range that ends before it begins.
    if !until.is_empty() && after >= until {
        return Ok(Vec::new());
    }
    let begin = row::listed_key(user, "");
    let lower = row::listed_key(user, after);
    let upper = if until.is_empty() {
        // Names are UTF-8, so 0xff is behind them all.
        Bound::Excluded([&begin[..], &[0xff]].concat())
    } else {
        Bound::Included(row::listed_key(user, until))
    };
    let lower = Bound::Excluded(lower);
    let range = table.range::<&[u8]>((slice(&lower), slice(&upper)))?;
    range
        .take(limit)
        .map(|entry| {
            let (key, _) = entry?;
            let chat = key.value().get(begin.len()..).unwrap_or_default().to_vec();
            String::from_utf8(chat).map_err(|_| wrong("the chats of", user))
        })
        .collect()
}

/// A readable table of bytes.
pub trait Bytes: ReadableTable<&'static [u8], &'static [u8]> {}
impl<T: ReadableTable<&'static [u8], &'static [u8]>> Bytes for T {}

type Guard<'a> = redb::AccessGuard<'a, &'static [u8]>;

/// A number of 64 bits.
pub fn number(value: &[u8]) -> Option<u64> {
    value.try_into().ok().map(u64::from_be_bytes)
}

/// A row that makes no sense.
pub fn wrong(what: &str, whose: &str) -> Fault {
    Fault::Row(format!("{what} {whose} is not readable"))
}

fn slice(bound: &Bound<Vec<u8>>) -> Bound<&[u8]> {
    bound.as_ref().map(Vec::as_slice)
}
