//! Groups in the redb store: their rows, and what a message decides and brings about in one. On the writer's thread.
//!
//! Trap: the rows of these kinds are part of the layout, as those of `store_redb_row` are.

use proto::wire::{Code, Role};

use crate::group::{self, Act, Effect, Group, Member, Stay};
use crate::store::Append;
use crate::store_redb_read::{self as ask, CHAT, Read};
use crate::store_redb_row::{self as row, Kind, Reader};
use crate::store_redb_step::{Step, open};

impl Step<'_> {
    /// Whether the sender may say this, and what it brings about in a group.
    pub fn decide(&mut self, append: &Append) -> Read<Result<Option<Effect>, Code>> {
        let Append { chat, sender, act, refusal, .. } = append;
        if let Some(code) = refusal {
            return Ok(Err(*code));
        }
        let in_group = chat.starts_with('#');
        if !in_group && *act == Act::Nothing {
            return Ok(Ok(None));
        }
        let head = self.row(chat)?.chat.seq;
        let table = open(&mut self.chat, self.transaction, CHAT)?;
        let effect = if in_group {
            let group = ask::group(table, chat)?;
            match group::decide(act, sender, &group, head, |user| ask::member(table, chat, user))? {
                Ok(effect) => effect,
                refused => return Ok(refused),
            }
        } else {
            None
        };
        if let Act::Refer(seq) = act {
            let since = ask::since(table, chat, sender)?;
            let meant = ask::message(table, chat, *seq)?.filter(|_| *seq > since);
            if let Err(code) = group::may_edit(meant.as_ref(), sender) {
                return Ok(Err(code));
            }
        }
        Ok(Ok(effect))
    }

    /// Writes what a message brought about in its group. The group's version behind it, 0 in a one-to-one chat.
    pub fn take_effect(&mut self, chat: &str, effect: Option<Effect>) -> Read<u64> {
        if !chat.starts_with('#') {
            return Ok(0);
        }
        let table = open(&mut self.chat, self.transaction, CHAT)?;
        let Some(effect) = effect else { return Ok(ask::group(table, chat)?.version) };
        for (user, stay) in &effect.past {
            let mut past = ask::past(table, chat, user)?;
            group::remember(&mut past, *stay);
            table.insert(&row::cursor_key(chat, user, Kind::Past)[..], &past_row(&past)[..])?;
        }
        for (user, member) in &effect.rows {
            table.insert(&row::member_key(chat, user)[..], &member_row(member)[..])?;
        }
        table.insert(&row::chat_key(chat, Kind::Group)[..], &group_row(&effect.group)[..])?;
        Ok(effect.group.version)
    }
}

/// A member's row.
fn member_row(member: &Member) -> Vec<u8> {
    let numbers = [member.number, member.joined, member.left].map(u64::to_be_bytes);
    [&[member.role as u8][..], &numbers.concat()].concat()
}

/// Reads it.
pub fn member(row: &[u8]) -> Option<Member> {
    let mut reader = Reader(row);
    let role = Role::try_from(i32::from(*reader.take(1)?.first()?)).ok()?;
    let member = Member { role, number: reader.u64()?, joined: reader.u64()?, left: reader.u64()? };
    reader.0.is_empty().then_some(member)
}

/// A row of earlier stays.
fn past_row(past: &[Stay]) -> Vec<u8> {
    past.iter().flat_map(|(joined, left)| [joined.to_be_bytes(), left.to_be_bytes()]).flatten().collect()
}

/// Reads it.
pub fn past(row: &[u8]) -> Option<Vec<Stay>> {
    let mut reader = Reader(row);
    let mut past = Vec::new();
    while !reader.0.is_empty() {
        past.push((reader.u64()?, reader.u64()?));
    }
    Some(past)
}

/// A group's row.
fn group_row(group: &Group) -> Vec<u8> {
    let numbers = [group.version, group.count, group.rows, group.deleted].map(u64::to_be_bytes);
    [&numbers.concat(), group.title.as_bytes()].concat()
}

/// Reads it.
pub fn group(row: &[u8]) -> Option<Group> {
    let mut reader = Reader(row);
    let (version, count, rows) = (reader.u64()?, reader.u64()?, reader.u64()?);
    let deleted = reader.u64()?;
    Some(Group { version, title: String::from_utf8(reader.0.to_vec()).ok()?, count, rows, deleted })
}
