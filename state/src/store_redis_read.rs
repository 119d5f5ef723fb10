//! What Redis answered, read as the answer of an operation. Pure.
//!
//! Trap: numbers come as integers from commands and as digits from scripts; both are read by [`number`].

use bytes::Bytes;
use proto::wire::{Code, Kind, Role};
use redis::Value;

use crate::group::{Group, Member, Stay};
use crate::store::{
    Answer, Append, Appended, Bound, Head, Hides, Mark, Marks, Moved, Op, Outcome, Page, Recent, Roster,
    Route, Seen, Standing, StoreError, Stored, first_behind, message_crc,
};

/// Reads the reply to `op`.
pub fn answer(op: &Op, value: Value) -> Outcome {
    let read = match op {
        Op::Incarnate => number(&value).map(|n| Answer::Incarnation(n as u32)),
        Op::UserNumbers { count } => number(&value).map(|last| Answer::UserNumbers(last + 1 - count)),
        Op::Register { .. } | Op::User { .. } => user(&value).map(Answer::User),
        Op::Name { .. } => match &value {
            Value::Nil => Some(Answer::Name(None)),
            value => text(value).map(|name| Answer::Name(Some(name))),
        },
        Op::Bind { .. } => bound(&value).map(Answer::Bound),
        // Until when tokens are revoked; nothing: none is.
        Op::IsRevoked { issued_s, .. } => user(&value)
            .map(|before_s| Answer::Revoked(before_s.is_some_and(|before_s| *issued_s < before_s))),
        Op::Routes { .. } => routes(&value),
        Op::Seen { .. } => seen(&value).map(Answer::Seen),
        Op::Chats { .. } => items(&value).and_then(|i| i.iter().map(text).collect()).map(Answer::Chats),
        Op::Append(append) => appended(append, &value).map(Answer::Appended),
        Op::Member { .. } => standing(&value).map(Answer::Standing),
        Op::Members { .. } => roster(&value).map(Answer::Roster),
        Op::Head { .. } => head(&value).map(Answer::Head),
        Op::Pull { chat, .. } => return page(chat, &value).map(Answer::Messages),
        Op::Mark { .. } => marks(&value).map(Answer::Marks),
        Op::Recent { .. } => recent(&value).map(Answer::Recent),
        Op::Delivered { .. } => moved(&value).map(Answer::Moved),
        Op::Unbind { .. }
        | Op::Retire { .. }
        | Op::Unname { .. }
        | Op::Renumber { .. }
        | Op::Vacate { .. }
        | Op::Revoke { .. }
        | Op::Hide { .. }
        | Op::ListChat { .. }
        | Op::DropMark { .. }
        | Op::LoseHistory { .. }
        | Op::Expire { .. } => Some(Answer::Done),
    };
    read.ok_or_else(|| StoreError::Corrupt(format!("{op:?} was answered {value:?}")))
}

fn items(value: &Value) -> Option<&[Value]> {
    match value {
        Value::Array(items) => Some(items),
        _ => None,
    }
}

fn bytes(value: &Value) -> Option<&[u8]> {
    match value {
        Value::BulkString(bytes) => Some(bytes),
        Value::SimpleString(text) => Some(text.as_bytes()),
        _ => None,
    }
}

fn text(value: &Value) -> Option<String> {
    String::from_utf8(bytes(value)?.to_vec()).ok()
}

fn number(value: &Value) -> Option<u64> {
    match value {
        Value::Int(number) => u64::try_from(*number).ok(),
        value => std::str::from_utf8(bytes(value)?).ok()?.parse().ok(),
    }
}

/// An empty string says that there is none.
fn number_or_0(value: &Value) -> Option<u64> {
    if bytes(value).is_some_and(<[u8]>::is_empty) { Some(0) } else { number(value) }
}

fn user(value: &Value) -> Option<Option<u64>> {
    if *value == Value::Nil { Some(None) } else { number(value).map(Some) }
}

fn bound(value: &Value) -> Option<Bound> {
    if *value == Value::Int(1) {
        return Some(Bound::Yes { replaced: None, evicted: None });
    }
    // An empty string says that there is none.
    let connection = |value: &Value| match bytes(value)? {
        [] => Some(None),
        bytes => Some(Some(u64::from_be_bytes(bytes.try_into().ok()?))),
    };
    match items(value)? {
        [kind, replaced, evicted] if bytes(kind)? == b"bound" => {
            Some(Bound::Yes { replaced: connection(replaced)?, evicted: connection(evicted)? })
        }
        [kind] if bytes(kind)? == b"revoked" => Some(Bound::Revoked),
        [kind] if bytes(kind)? == b"retired" => Some(Bound::Retired),
        [kind, stored] if bytes(kind)? == b"stale" => Some(Bound::Stale { stored: number(stored)? }),
        _ => None,
    }
}

fn routes(value: &Value) -> Option<Answer> {
    if *value == Value::Nil {
        return Some(Answer::Routes(Vec::new()));
    }
    let row = bytes(value)?;
    // As the scripts mark a number that is nobody's any more.
    let marked = row.strip_prefix(b"-").filter(|entries| entries.len() % 20 == 0);
    let (entries, rest) = marked.unwrap_or(row).as_chunks::<20>();
    let eight =
        |entry: &[u8; 20], at: usize| entry[at..at + 8].try_into().map(u64::from_be_bytes).unwrap_or(0);
    let routes = entries.iter().map(|entry| Route {
        device: u32::from_be_bytes([entry[0], entry[1], entry[2], entry[3]]),
        attempt: eight(entry, 4),
        connection: eight(entry, 12),
    });
    let routes = rest.is_empty().then(|| routes.collect())?;
    Some(if marked.is_some() { Answer::Retired(routes) } else { Answer::Routes(routes) })
}

fn seen(value: &Value) -> Option<Seen> {
    let or_0 = |value: &Value| if *value == Value::Nil { Some(0) } else { number(value) };
    match items(value)? {
        [last, hides] => Some(Seen { last_s: or_0(last)?, hides: Hides::of_bits(or_0(hides)? as u8) }),
        _ => None,
    }
}

fn appended(append: &Append, value: &Value) -> Option<Appended> {
    let [kind, what] = items(value)? else { return None };
    let again = match bytes(kind)? {
        b"ok" => false,
        b"again" => true,
        b"expected" => return Some(Appended::Expected(number(what)?)),
        b"old" => return Some(Appended::TooOld),
        b"conflict" => return Some(Appended::Conflict),
        b"revoked" => return Some(Appended::Revoked),
        _ => return None,
    };
    let answer = text(what)?;
    if let Some(code) = answer.strip_prefix("! ") {
        return Some(Appended::Refused(Code::try_from(code.parse::<i32>().ok()?).ok()?));
    }
    let mut parts = answer.split(' ');
    let mut next = || parts.next()?.parse::<u64>().ok();
    let (seq, time_us, history) = (next()?, next()?, next()?);
    // Of groups only.
    let stored = Appended::Stored { seq, time_us, history, version: next().unwrap_or(0), again };
    debug_assert!(append.refusal.is_none() || again, "a refusal was stored as a message");
    Some(stored)
}

fn group(value: &Value) -> Option<Group> {
    let [version, title, count, rows, deleted] = items(value)? else { return None };
    Some(Group {
        version: number_or_0(version)?,
        title: text(title)?,
        count: number_or_0(count)?,
        rows: number_or_0(rows)?,
        deleted: number_or_0(deleted)?,
    })
}

/// As the script writes it: role, number, joined, left.
fn member(value: &Value) -> Option<Member> {
    let row = std::str::from_utf8(bytes(value)?).ok()?;
    let mut parts = row.split(' ').map(str::parse::<u64>);
    let mut next = || parts.next()?.ok();
    let role = Role::try_from(i32::try_from(next()?).ok()?).ok()?;
    Some(Member { role, number: next()?, joined: next()?, left: next()? })
}

fn standing(value: &Value) -> Option<Standing> {
    let [at, row, past] = items(value)? else { return None };
    let member = if bytes(row)?.is_empty() { None } else { Some(member(row)?) };
    Some(Standing { group: group(at)?, member, past: stays(past)? })
}

/// As the script writes them: joined and left of each.
fn stays(value: &Value) -> Option<Vec<Stay>> {
    let text = std::str::from_utf8(bytes(value)?).ok()?;
    let numbers: Vec<u64> = text.split_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?;
    let (pairs, rest) = numbers.as_chunks::<2>();
    rest.is_empty().then(|| pairs.iter().map(|[joined, left]| (*joined, *left)).collect())
}

fn roster(value: &Value) -> Option<Roster> {
    let [at, rows, cursors] = items(value)? else { return None };
    let (rows, rest) = items(rows)?.as_chunks::<2>();
    let (cursors, behind) = items(cursors)?.as_chunks::<2>();
    let asked = !cursors.is_empty();
    if !rest.is_empty() || !behind.is_empty() || asked && cursors.len() != rows.len() {
        return None;
    }
    let mut all = Vec::with_capacity(rows.len());
    for (n, [user, row]) in rows.iter().enumerate() {
        let cursors = match cursors.get(n) {
            Some([delivered, read]) => (number_or_0(delivered)?, number_or_0(read)?),
            None => (0, 0),
        };
        all.push(((text(user)?, member(row)?), cursors));
    }
    all.sort_unstable_by(|one, other| one.0.0.cmp(&other.0.0));
    let (members, cursors): (Vec<_>, Vec<_>) = all.into_iter().unzip();
    Some(Roster { group: group(at)?, members, cursors: if asked { cursors } else { Vec::new() } })
}

fn head(value: &Value) -> Option<Head> {
    let [history, seq, delivered, first, read, since, peer_delivered, peer_read] = items(value)? else {
        return None;
    };
    let since = number_or_0(since)?;
    Some(Head {
        history: number_or_0(history)?,
        seq: number_or_0(seq)?,
        delivered: number_or_0(delivered)?,
        read: number_or_0(read)?,
        peer_delivered: number_or_0(peer_delivered)?,
        peer_read: number_or_0(peer_read)?,
        // Not written before anything was removed.
        first: first_behind(since, number_or_0(first)?.max(1)),
        since,
    })
}

/// Both cursors where both were asked of.
fn moved(value: &Value) -> Option<Moved> {
    match value {
        Value::Array(both) => match &both[..] {
            [delivered, read, is_news] => Some(Moved {
                delivered: number(delivered)?,
                read: number(read)?,
                is_news: number(is_news)? > 0,
            }),
            _ => None,
        },
        delivered => {
            let delivered = number(delivered)?;
            Some(Moved { delivered, read: 0, is_news: delivered > 0 })
        }
    }
}

fn marks(value: &Value) -> Option<Marks> {
    let [now, _, fields] = items(value)? else { return None };
    let (pairs, rest) = items(fields)?.as_chunks::<2>();
    let mut marks = Vec::with_capacity(pairs.len());
    for [field, pushed] in pairs {
        let field = text(field)?;
        // The stamp is no life.
        if let Some((server, life)) = field.rsplit_once('/') {
            let pushed = text(pushed)?;
            // The beat is missing in a mark that was written before there was one.
            let (pushed_us, beat_us) = pushed.split_once(' ').unwrap_or((&pushed, "0"));
            marks.push(Mark {
                server: server.to_owned(),
                life: life.parse().ok()?,
                pushed_us: pushed_us.parse().ok()?,
                beat_us: beat_us.parse().ok()?,
            });
        }
    }
    rest.is_empty().then_some(Marks { now_us: number(now)?, marks })
}

/// The stamp in the answer to a mark.
pub fn stamp(value: &Value) -> Option<u64> {
    number(items(value)?.get(1)?)
}

/// How far a round of retention has come in a bucket, Unix time of the store in µs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sweep {
    /// The next chat is behind this one's time; 0: a round begins.
    pub behind_us: u64,
    /// When this round began: it goes as far as that.
    pub began_us: u64,
}

/// The answer to retention.
pub fn swept(value: &Value) -> Option<Sweep> {
    let [behind_us, began_us] = items(value)? else { return None };
    Some(Sweep { behind_us: number(behind_us)?, began_us: number(began_us)? })
}

fn recent(value: &Value) -> Option<Vec<Recent>> {
    let (pairs, rest) = items(value)?.as_chunks::<2>();
    let chats = pairs.iter().map(|[chat, time]| Some(Recent { chat: text(chat)?, time_us: number(time)? }));
    if rest.is_empty() { chats.collect() } else { None }
}

fn page(chat: &str, value: &Value) -> Result<Page, StoreError> {
    let wrong = || StoreError::Corrupt(format!("messages of {chat} were answered as something else"));
    let Some([history, head, first, since, entries]) = items(value) else { return Err(wrong()) };
    let since = number_or_0(since).ok_or_else(wrong)?;
    let entries = items(entries).ok_or_else(wrong)?;
    Ok(Page {
        history: number_or_0(history).ok_or_else(wrong)?,
        head: number_or_0(head).ok_or_else(wrong)?,
        first: first_behind(since, number_or_0(first).ok_or_else(wrong)?.max(1)),
        since,
        messages: entries.iter().filter_map(|entry| legible(chat, entry)).collect(),
        read_to: entries.last().map_or(Some(0), seq_of).ok_or_else(wrong)?,
    })
}

fn seq_of(entry: &Value) -> Option<u64> {
    text(items(entry)?.first()?)?.strip_suffix("-0")?.parse().ok()
}

/// A damaged message is left out and told of: its neighbours are none the worse for it.
fn legible(chat: &str, entry: &Value) -> Option<Stored> {
    message(chat, entry).inspect_err(|error| tracing::error!(%error, "a message is left out")).ok()
}

fn message(chat: &str, entry: &Value) -> Result<Stored, StoreError> {
    let read = || {
        let [_, fields] = items(entry)? else { return None };
        let seq = seq_of(entry)?;
        let fields = items(fields)?;
        let field = |name: &[u8]| {
            let (pairs, _) = fields.as_chunks::<2>();
            pairs.iter().find(|[key, _]| bytes(key) == Some(name)).map(|[_, value]| value)
        };
        let stored = Stored {
            seq,
            sender: text(field(b"sender")?)?,
            time_us: number(field(b"time")?)?,
            body: Bytes::copy_from_slice(bytes(field(b"body")?)?),
            // Text has none.
            kind: match field(b"kind") {
                Some(kind) => Kind::try_from(i32::try_from(number(kind)?).ok()?).ok()?,
                None => Kind::Text,
            },
        };
        Some((stored, number(field(b"crc")?)?))
    };
    let (stored, crc) =
        read().ok_or_else(|| StoreError::Corrupt(format!("a message of {chat} is not readable")))?;
    if u64::from(message_crc(chat, &stored.sender, stored.kind, &stored.body)) != crc {
        return Err(StoreError::Corrupt(format!("message {} of {chat} fails its checksum", stored.seq)));
    }
    Ok(stored)
}
