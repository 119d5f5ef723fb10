//! From layout 1 of the redb store to layout 2, in place: every chat's row says what is kept from when on, and every chat
//! stands in both indexes.
//!
//! Trap: a kill may come between any two transactions. A row says by its first byte which layout it has, so what is done is
//! passed over; the layout's number is written last.

use redb::{Database, ReadableTable};

use crate::store_redb_read::{CHAT, META, OLDEST, RECENT, TABLES};
use crate::store_redb_row::{self as row, ChatRow, Kind, LAYOUT};

/// Chats of one transaction.
const STEP_CHATS: usize = 1_000;

/// Chats between two lines of the log.
const LOGGED_CHATS: usize = 100_000;

/// All chats, or the first so many. Whether that was all.
pub fn migrate(database: &Database, chats_max: usize) -> Result<bool, redb::Error> {
    tracing::info!("the store is migrated from layout 1 to {LAYOUT}");
    let (mut from, mut chats) = (Vec::new(), 0);
    loop {
        let transaction = database.begin_write()?;
        for table in TABLES {
            transaction.open_table(table)?;
        }
        let count = STEP_CHATS.min(chats_max - chats);
        let done = {
            let mut table = transaction.open_table(CHAT)?;
            let mut recent = transaction.open_table(RECENT)?;
            let mut oldest = transaction.open_table(OLDEST)?;
            let mut done = 0;
            while done < count {
                let Some(chat) = next_chat(&table, &from)? else { break };
                done += 1;
                from = row::behind_chat(&chat);
                let key = row::chat_key(&chat, Kind::Head);
                let Some(new) = migrated(&table, &chat)? else { continue };
                table.insert(&key[..], &new.write()[..])?;
                if new.seq > 0 {
                    recent.insert(&row::recent_key(new.time_us, &chat)[..], &[][..])?;
                }
                if new.first <= new.seq {
                    oldest.insert(&row::recent_key(new.first_us, &chat)[..], &[][..])?;
                }
            }
            done
        };
        let last = done < count;
        if last {
            transaction.open_table(META)?.insert("layout", LAYOUT)?;
        }
        transaction.commit()?;
        chats += done;
        if last {
            tracing::info!(chats, "the store is migrated to layout {LAYOUT}");
            return Ok(true);
        }
        if chats.is_multiple_of(LOGGED_CHATS) {
            tracing::info!(chats, "the store is being migrated");
        }
        if chats >= chats_max {
            return Ok(false);
        }
    }
}

type Table<'t> = redb::Table<'t, &'static [u8], &'static [u8]>;

/// The first chat that has a row from there on.
fn next_chat(table: &Table, from: &[u8]) -> Result<Option<String>, redb::Error> {
    let Some(entry) = table.range::<&[u8]>(from..)?.next() else { return Ok(None) };
    let (key, _) = entry?;
    let chat = row::chat_of(key.value());
    chat.map(Some).ok_or_else(|| redb::Error::Corrupted("a key names no chat".to_owned()))
}

/// The row as it must be now. `None`: it is so already, or there is none.
fn migrated(table: &Table, chat: &str) -> Result<Option<ChatRow>, redb::Error> {
    let Some(found) = table.get(&row::chat_key(chat, Kind::Head)[..])? else { return Ok(None) };
    if row::is_of_layout_2(found.value()) {
        return Ok(None);
    }
    let read = ChatRow::read_layout_1(found.value());
    let mut new = read.ok_or_else(|| redb::Error::Corrupted(format!("the row of {chat} is not readable")))?;
    let messages = &row::message_key(chat, 0)[..]..&row::chat_key(chat, Kind::Delivered)[..];
    let oldest = match table.range::<&[u8]>(messages)?.next() {
        Some(entry) => {
            let (key, value) = entry?;
            row::seq_of(key.value()).zip(row::message_time(value.value()))
        }
        None => None,
    };
    (new.first, new.first_us) = oldest.unwrap_or((new.seq + 1, 0));
    Ok(Some(new))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use redb::{ReadableDatabase, ReadableTableMetadata};

    use super::*;

    /// Stopped behind any number of chats, any number of times, it comes to the same end.
    #[test]
    fn a_migration_is_taken_up_again() {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/layout1/store.redb");
        for stops in [vec![], vec![1], vec![7, 3], vec![61], vec![62], vec![40, 62, 5]] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("store.redb");
            std::fs::copy(&fixture, &path).unwrap();
            for stop in &stops {
                let database = Database::open(&path).unwrap();
                assert!(!migrate(&database, *stop).unwrap(), "the fixture has 62 chats");
                assert_eq!(layout(&database), 1);
            }
            let database = Database::open(&path).unwrap();
            assert!(migrate(&database, usize::MAX).unwrap());
            let read = database.begin_read().unwrap();
            let rows = |table| read.open_table(table).unwrap().len().unwrap();
            assert_eq!((layout(&database), rows(RECENT), rows(OLDEST)), (LAYOUT, 61, 61), "{stops:?}");
        }
    }

    fn layout(database: &Database) -> u64 {
        let read = database.begin_read().unwrap();
        read.open_table(META).unwrap().get("layout").unwrap().unwrap().value()
    }
}
