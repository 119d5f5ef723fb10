//! Named ids in the redb store: messages of web services, which name them or not. On the writer's thread.
//!
//! Trap: a name is bound to its body until a time that its row says, whether or not the row has been removed by then. An
//! index by that time, in a table of its own, tells which rows may go, so that the file does not grow.

use redb::ReadableTable;

use crate::store::{Append, Appended, body_digest};
use crate::store_redb_read::{self as ask, CHAT, NAMED, Read, wrong};
use crate::store_redb_row as row;
use crate::store_redb_step::{Step, open};

/// Names forgotten in one transaction at most, so that none takes long.
const FORGET_MAX: usize = 4_096;

/// What is remembered of a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Named {
    digest: [u8; 16],
    seq: u64,
    time_us: u64,
    until_us: u64,
}

impl Step<'_> {
    /// The atomic step of a named message.
    pub fn append_named(&mut self, append: &Append, name: &str) -> Read<Appended> {
        let Append { chat, sender, body, .. } = append;
        let (key, digest) = (row::named_key(chat, sender, name), body_digest(body));
        let table = open(&mut self.chat, self.transaction, CHAT)?;
        let known = match table.get(&key[..])? {
            Some(found) => Some(Named::read(found.value()).ok_or_else(|| wrong("a named id of", chat))?),
            None => None,
        };
        // What was said under this name by somebody who was deleted is nobody's.
        let since = ask::since(table, chat, sender)?;
        if let Some(known) = known.filter(|known| known.until_us > self.now_us && known.seq > since) {
            let Named { seq, time_us, .. } = known;
            let again =
                Appended::Stored { seq, time_us, history: self.history(chat), version: 0, again: true };
            return Ok(if known.digest == digest { again } else { Appended::Conflict });
        }
        let appended = self.append_new(append)?;
        if let Appended::Stored { seq, time_us, .. } = appended {
            let named = Named { digest, seq, time_us, until_us: self.now_us + self.terms.named_us };
            let table = open(&mut self.chat, self.transaction, CHAT)?;
            table.insert(&key[..], &named.write()[..])?;
            let index = open(&mut self.named, self.transaction, NAMED)?;
            index.insert(&index_key(named.until_us, &key)[..], &[][..])?;
        }
        Ok(appended)
    }

    /// Removes names whose time is over, a number at a time. Whether there may be more.
    pub fn forget_names(&mut self) -> Result<bool, redb::Error> {
        let index = open(&mut self.named, self.transaction, NAMED)?;
        let until = self.now_us.saturating_add(1).to_be_bytes();
        let mut due = Vec::new();
        for entry in index.range::<&[u8]>(..&until[..])?.take(FORGET_MAX) {
            due.push(entry?.0.value().to_vec());
        }
        let more = due.len() == FORGET_MAX;
        for key in due {
            index.remove(&key[..])?;
            self.changed = true;
            let of_name = key.get(8..).unwrap_or_default();
            let chat = open(&mut self.chat, self.transaction, CHAT)?;
            // Given anew since: then there is an entry of a later time, too.
            let named = chat.get(of_name)?.and_then(|found| Named::read(found.value()));
            if named.is_some_and(|named| named.until_us <= self.now_us) {
                chat.remove(of_name)?;
            }
        }
        Ok(more)
    }
}

impl Named {
    fn write(&self) -> [u8; 40] {
        let mut row = [0; 40];
        row[..16].copy_from_slice(&self.digest);
        row[16..24].copy_from_slice(&self.seq.to_be_bytes());
        row[24..32].copy_from_slice(&self.time_us.to_be_bytes());
        row[32..].copy_from_slice(&self.until_us.to_be_bytes());
        row
    }

    fn read(row: &[u8]) -> Option<Named> {
        let row: &[u8; 40] = row.try_into().ok()?;
        let eight = |at: usize| row[at..at + 8].try_into().ok().map(u64::from_be_bytes);
        let digest = row[..16].try_into().ok()?;
        Some(Named { digest, seq: eight(16)?, time_us: eight(24)?, until_us: eight(32)? })
    }
}

fn index_key(until_us: u64, key: &[u8]) -> Vec<u8> {
    [&until_us.to_be_bytes()[..], key].concat()
}
