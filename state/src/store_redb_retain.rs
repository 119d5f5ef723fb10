//! Retention in the redb store: what a chat no longer keeps. On the writer's thread.
//!
//! Trap: seqs are never used again, so a head stays when all its messages are gone.

use redb::ReadableTable;

use crate::store::{peer, retention_step};
use crate::store_redb_read::{self as ask, CHAT, OLDEST, Read, wrong};
use crate::store_redb_row::{self as row, Kind};
use crate::store_redb_step::{Step, open};

/// Messages removed from a chat at once, so that no transaction takes long.
const REMOVED_MAX: usize = 1_024;

impl Step<'_> {
    /// Behind a new message: what is due by number, or by age.
    pub fn retain(&mut self, chat: &str) -> Read<()> {
        let (most, kept) = (self.terms.messages_max, self.terms.kept_us);
        let chat_row = &self.row(chat)?.chat;
        let (seq, now_us) = (chat_row.seq, chat_row.time_us);
        let many = most > 0 && seq % retention_step(most) == 0 && seq + 1 - chat_row.first > most;
        let old = kept > 0 && chat_row.first_us + kept < now_us;
        if many || old {
            let low = if many { seq + 1 - most } else { 0 };
            let before = if old { now_us.saturating_sub(kept) } else { 0 };
            self.remove(chat, low, before)?;
        }
        Ok(())
    }

    /// Retention by age of chats of a bucket, those with the oldest messages first.
    pub fn expire(&mut self, bucket: u32, before_us: u64, limit: usize) -> Read<()> {
        self.flush()?;
        let table = open(&mut self.oldest, self.transaction, OLDEST)?;
        let (from, until) = (row::recent_from(bucket, 0), row::recent_from(bucket, before_us));
        let mut due = Vec::new();
        for entry in table.range::<&[u8]>(&from[..]..&until[..])?.take(limit) {
            let found = row::recent_of(entry?.0.value());
            due.push(found.ok_or_else(|| wrong("the oldest of", &bucket.to_string()))?.1);
        }
        due.iter().try_for_each(|chat| self.remove(chat, 0, before_us))
    }

    /// What is in a chat so far is not the user's any more; what nobody may see is removed.
    pub fn vacate(&mut self, chat: &str, user: &str) -> Read<()> {
        let seq = self.row(chat)?.chat.seq;
        if seq == 0 {
            return Ok(());
        }
        let table = open(&mut self.chat, self.transaction, CHAT)?;
        table.insert(&row::cursor_key(chat, user, Kind::Since)[..], &seq.to_be_bytes()[..])?;
        for kind in [Kind::Delivered, Kind::Read, Kind::Past] {
            table.remove(&row::cursor_key(chat, user, kind)[..])?;
        }
        self.changed = true;
        if chat.starts_with('#') {
            return Ok(());
        }
        let nobodys = ask::since(table, chat, peer(chat, user).unwrap_or(user))?;
        // In one transaction, however many they are: this is rare.
        while self.row(chat)?.chat.first <= nobodys {
            self.remove(chat, nobodys + 1, 0)?;
        }
        Ok(())
    }

    /// Removes messages below a seq, and those that are older.
    fn remove(&mut self, chat: &str, low: u64, before_us: u64) -> Read<()> {
        let at = self.row(chat)?.chat.seq;
        let table = open(&mut self.chat, self.transaction, CHAT)?;
        let messages = row::message_key(chat, 0)..row::chat_key(chat, Kind::Delivered);
        let (mut gone, mut kept) = (Vec::new(), None);
        for entry in table.range::<&[u8]>(&messages.start[..]..&messages.end[..])? {
            let (key, value) = entry?;
            let seq = row::seq_of(key.value()).ok_or_else(|| wrong("a message of", chat))?;
            // One that is not readable is as old as its neighbour.
            let time_us = row::message_time(value.value()).unwrap_or(0);
            if gone.len() == REMOVED_MAX || (seq >= low && time_us >= before_us) {
                kept = Some((seq, time_us));
                break;
            }
            gone.push(key.value().to_vec());
        }
        for key in gone {
            table.remove(&key[..])?;
        }
        let row = self.row(chat)?;
        (row.chat.first, row.chat.first_us) = kept.unwrap_or((at + 1, 0));
        row.changed = true;
        Ok(())
    }
}
