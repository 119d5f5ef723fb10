//! The marks of a redb store, in the memory of its writer. They are written with whatever else is written, and otherwise
//! every few seconds: an idle server would fsync twice a second for them.
//!
//! Trap: so a mark may come back older than it was. Never one of a life that accepted anything: that was written with it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use redb::{ReadTransaction, ReadableTable, WriteTransaction};

use crate::store::{Mark, Marks};
use crate::store_redb_read::MARK;

/// How far each life of a server has pushed.
#[derive(Debug, Default)]
pub struct LifeMarks {
    marks: BTreeMap<(String, u64), Pushed>,
    unwritten: bool,
    written: Option<Instant>,
}

/// What a mark says, and when it was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pushed {
    /// Store time up to which everything is pushed, µs.
    pub upto_us: u64,
    /// Store time, µs.
    pub beat_us: u64,
}

/// Longest that a mark waits for company.
const WRITE_EVERY: Duration = Duration::from_secs(10);

impl LifeMarks {
    /// As they were written.
    pub fn read(transaction: &ReadTransaction) -> Result<LifeMarks, redb::Error> {
        let mut all = LifeMarks { written: Some(Instant::now()), ..LifeMarks::default() };
        for entry in transaction.open_table(MARK)?.iter()? {
            let (key, value) = entry?;
            let mark = mark_of(key.value()).zip(pushed(value.value()));
            let (life, pushed) = mark.ok_or_else(|| redb::Error::Corrupted("a mark".to_owned()))?;
            all.marks.insert(life, pushed);
        }
        Ok(all)
    }

    /// Sets one. What there is then.
    pub fn mark(&mut self, server: &str, life: u64, pushed_us: u64, now_us: u64) -> Marks {
        let upto_us = if pushed_us == 0 { now_us } else { pushed_us };
        self.marks.insert((server.to_owned(), life), Pushed { upto_us, beat_us: now_us });
        self.unwritten = true;
        let marks = self.marks.iter();
        let marks = marks.map(|((server, life), pushed)| Mark {
            server: server.clone(),
            life: *life,
            pushed_us: pushed.upto_us,
            beat_us: pushed.beat_us,
        });
        Marks { now_us, marks: marks.collect() }
    }

    /// Forgets one.
    pub fn forget(&mut self, server: &str, life: u64) {
        self.unwritten |= self.marks.remove(&(server.to_owned(), life)).is_some();
    }

    /// Whether they must be written, though nothing else is.
    pub fn is_due(&self) -> bool {
        self.unwritten && self.written.is_none_or(|written| written.elapsed() >= WRITE_EVERY)
    }

    /// Whether the table has others.
    pub fn is_unwritten(&self) -> bool {
        self.unwritten
    }

    /// Writes them, in place of what is there.
    pub fn write(&self, transaction: &WriteTransaction) -> Result<(), redb::Error> {
        let mut table = transaction.open_table(MARK)?;
        table.retain(|_, _| false)?;
        for ((server, life), pushed) in &self.marks {
            table.insert(&mark_key(server, *life)[..], &pushed_row(*pushed)[..])?;
        }
        Ok(())
    }

    /// That is committed.
    pub fn written(&mut self) {
        (self.unwritten, self.written) = (false, Some(Instant::now()));
    }
}

/// Key of the mark of a server's life.
fn mark_key(server: &str, life: u64) -> Vec<u8> {
    [server.as_bytes(), &life.to_be_bytes()].concat()
}

/// Server and life of such a key.
fn mark_of(key: &[u8]) -> Option<(String, u64)> {
    let (server, life) = key.split_last_chunk()?;
    Some((String::from_utf8(server.to_vec()).ok()?, u64::from_be_bytes(*life)))
}

/// Row of a mark.
fn pushed_row(pushed: Pushed) -> Vec<u8> {
    [pushed.upto_us.to_be_bytes(), pushed.beat_us.to_be_bytes()].concat()
}

/// Reads it, also one that was written before there was a beat.
fn pushed(row: &[u8]) -> Option<Pushed> {
    let (upto_us, beat_us) = row.split_first_chunk()?;
    let beat_us = if beat_us.is_empty() { [0; 8] } else { beat_us.try_into().ok()? };
    Some(Pushed { upto_us: u64::from_be_bytes(*upto_us), beat_us: u64::from_be_bytes(beat_us) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_say_what_was_written() {
        assert_eq!(mark_of(&mark_key("s-1", 9)), Some(("s-1".to_owned(), 9)));
        let mark = Pushed { upto_us: 7, beat_us: 9 };
        assert_eq!(pushed(&pushed_row(mark)), Some(mark));
        assert_eq!(pushed(&7u64.to_be_bytes()), Some(Pushed { beat_us: 0, ..mark }));
        assert_eq!((pushed(&[7; 7]), pushed(&[7; 17])), (None, None));
    }
}
