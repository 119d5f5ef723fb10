//! Delivered and read cursors on their way to the store: merged per (chat, user), written a few times a second.
//!
//! Trap: losing some only delays a status and lets a new device see a little more; so they wait in memory, bounded, and
//! nothing waits for them.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use crate::circle::{self, Place};
use crate::core::Core;
use crate::losses;
use crate::receipts::{Readers, Written};
use crate::roster;
use crate::store::{CHAT_BUCKETS, Head, Op, Outcome, StoreError, chat_bucket, read};

/// What waits.
#[derive(Debug)]
pub struct Delivered {
    waiting: Mutex<BTreeMap<Key, Cursor>>,
    waiting_max: usize,
}

/// Chat and user.
type Key = (String, String);

/// How far a user has a chat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cursor {
    /// 0: the client did not say.
    pub history: u64,
    /// Delivered up to here.
    pub seq: u64,
    /// Read up to here. Does not prove that the store has lost anything: an application says so, and not what it was given.
    pub read: u64,
}

/// Written in one store call, which holds up messages for as long as it takes: at 512 scripts of some 6 µs a call, five times
/// a second, every fiftieth message waited for several ms (p99 of a delivery). Now one script takes them all.
const WRITES_PER_CALL: usize = 64;

impl Delivered {
    /// At most so many (chat, user) at a time; beyond that news of others is dropped until the next write.
    pub fn new(waiting_max: usize) -> Self {
        Delivered { waiting: Mutex::default(), waiting_max }
    }

    /// A user has this much of the chat.
    pub fn note(&self, chat: String, user: &str, cursor: Cursor) {
        let mut waiting = self.waiting.lock();
        let full = waiting.len() >= self.waiting_max;
        let key = (chat, user.to_owned());
        match waiting.get_mut(&key) {
            Some(noted) if noted.history == cursor.history => {
                (noted.seq, noted.read) = (cursor.seq.max(noted.seq), cursor.read.max(noted.read));
            }
            // What came last is the more likely to be in force; the write decides.
            Some(noted) => *noted = cursor,
            None if full => {}
            None => drop(waiting.insert(key, cursor)),
        }
    }

    /// What is noted here of this history and may not be written yet.
    pub fn noted(&self, chat: &str, user: &str, history: u64) -> Option<Cursor> {
        let waiting = self.waiting.lock();
        if waiting.is_empty() {
            return None;
        }
        let cursor = waiting.get(&(chat.to_owned(), user.to_owned()))?;
        (cursor.history == history || cursor.history == 0).then_some(*cursor)
    }

    fn pending(&self) -> Vec<(Key, Cursor)> {
        self.waiting.lock().iter().map(|(key, cursor)| (key.clone(), *cursor)).collect()
    }

    /// Written, or not worth it: forgotten, unless there is newer news.
    fn settled(&self, key: &Key, cursor: Cursor) {
        let mut waiting = self.waiting.lock();
        if waiting.get(key) == Some(&cursor) {
            waiting.remove(key);
        }
    }
}

/// The histories of the buckets as far as this server has seen them lately. One that has changed since is noticed at the
/// next message or question.
#[derive(Debug)]
pub struct Histories {
    of_bucket: Mutex<Vec<u64>>,
}

impl Default for Histories {
    fn default() -> Self {
        Histories { of_bucket: Mutex::new(vec![0; CHAT_BUCKETS as usize]) }
    }
}

impl Histories {
    /// The store said this of the chat's bucket just now.
    pub fn note(&self, chat: &str, history: u64) {
        if let Some(known) = self.of_bucket.lock().get_mut(chat_bucket(chat) as usize) {
            *known = history;
        }
    }

    /// Nothing is known any more.
    pub fn forget(&self) {
        self.of_bucket.lock().fill(0);
    }

    fn is(&self, chat: &str, history: u64) -> bool {
        self.of(chat) == history
    }

    /// 0: nothing is known.
    fn of(&self, chat: &str) -> u64 {
        self.of_bucket.lock().get(chat_bucket(chat) as usize).copied().unwrap_or(0)
    }
}

/// Writes for ever.
pub async fn run(core: Arc<Core>) {
    let mut ticks = tokio::time::interval(Duration::from_millis(core.config.limits.delivered_flush_ms));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        flush(&core).await;
    }
}

/// Writes what waits now. What the store did not take waits for the next time; of a row that cannot be read it is forgotten.
pub async fn flush(core: &Core) {
    for part in core.delivered.pending().chunks(WRITES_PER_CALL) {
        let written = match flush_part(core, part).await {
            Err(StoreError::Corrupt(_)) => flush_each(core, part).await,
            written => written,
        };
        if let Err(error) = written {
            // A store that stands still would be waited for once per part, also at the end of the process.
            core.store_failed(&error);
            return;
        }
    }
}

/// One by one, without what would hold up the others for ever. A store of which nothing can be read is another matter.
async fn flush_each(core: &Core, part: &[(Key, Cursor)]) -> Result<(), StoreError> {
    let mut damaged = Vec::new();
    for one in part {
        match flush_part(core, std::slice::from_ref(one)).await {
            Err(StoreError::Corrupt(text)) => damaged.push((one, text)),
            written => written?,
        }
    }
    if damaged.len() == part.len() && part.len() > 1 {
        return damaged.pop().map_or(Ok(()), |(_, text)| Err(StoreError::Corrupt(text)));
    }
    for ((key, cursor), text) in damaged {
        tracing::warn!(chat = key.0, user = key.1, text, "a cursor is forgotten");
        core.delivered.settled(key, *cursor);
    }
    Ok(())
}

/// The cursors of a part but those of groups that their user never was in, which are forgotten, and the places of the others in
/// their groups. Whoever was in a group stays known to it, so that nothing changes until they are written.
async fn of_members<'a>(
    core: &Core,
    generation: u64,
    part: &'a [(Key, Cursor)],
) -> Result<(Vec<&'a (Key, Cursor)>, Places<'a>), StoreError> {
    let in_group = |entry: &&(Key, Cursor)| entry.0.0.starts_with('#');
    let (of_groups, mut theirs): (Vec<_>, Vec<_>) = part.iter().partition(in_group);
    let keys: Vec<(&str, &str)> = of_groups.iter().map(|((chat, user), _)| (&**chat, &**user)).collect();
    let mut places = Places::new();
    for (entry, place) in of_groups.into_iter().zip(circle::places(core, generation, &keys).await?) {
        match place {
            Some(place) => {
                places.insert(&entry.0, place);
                theirs.push(entry);
            }
            None => core.delivered.settled(&entry.0, entry.1),
        }
    }
    Ok((theirs, places))
}

/// Of those whose cursors are of groups.
type Places<'a> = HashMap<&'a Key, Place>;

async fn flush_part(core: &Core, part: &[(Key, Cursor)]) -> Result<(), StoreError> {
    let generation = core.generation();
    let (part, places) = of_members(core, generation, part).await?;
    let mut writes = Vec::with_capacity(part.len());
    let mut doubtful = Vec::new();
    for (key, cursor) in part {
        let known = cursor.history == 0 || core.histories.is(&key.0, cursor.history);
        if known { writes.push((key, *cursor)) } else { doubtful.push((key, *cursor)) }
    }
    let ops: Vec<Op> = doubtful
        .iter()
        .map(|((chat, user), _)| Op::Head { chat: chat.clone(), user: user.clone() })
        .collect();
    let mut lost = Vec::new();
    for ((key, cursor), outcome) in doubtful.into_iter().zip(core.apply(&ops).await) {
        let Head { history, seq, .. } = read::head(outcome)?;
        let is_proof = losses::is_proof((cursor.history, cursor.seq), (history, seq));
        if is_proof && core.losses.hear(core, (&key.1, chat_bucket(&key.0), history)) {
            lost.push((Op::LoseHistory { bucket: chat_bucket(&key.0), history }, key, cursor));
            continue;
        }
        core.histories.note(&key.0, history);
        if cursor.history == history && !is_proof {
            writes.push((key, cursor));
        } else {
            // Of messages that are not there any more, or on which nobody is heard.
            core.delivered.settled(key, cursor);
        }
    }
    let ops: Vec<Op> = lost.iter().map(|(op, ..)| op.clone()).collect();
    for ((op, key, cursor), outcome) in lost.into_iter().zip(core.apply(&ops).await) {
        core.losses.drawn(core, &op, &outcome);
        outcome?;
        core.delivered.settled(key, cursor);
    }
    write(core, generation, writes, places).await
}

/// Writes them, and tells of what moved.
async fn write(
    core: &Core,
    generation: u64,
    writes: Vec<(&Key, Cursor)>,
    mut places: Places<'_>,
) -> Result<(), StoreError> {
    let written: Vec<Written<'_>> = writes
        .iter()
        .map(|(key, cursor)| Written {
            chat: &key.0,
            user: &key.1,
            history: core.histories.of(&key.0),
            with_read: cursor.read > 0,
            place: places.remove(key),
        })
        .collect();
    let readers = Readers::of(core, generation, &written).await;
    let op = |((chat, user), cursor): &(&Key, Cursor)| Op::Delivered {
        chat: chat.clone(),
        user: user.clone(),
        // What is read was delivered.
        seq: cursor.seq.max(cursor.read),
        read: cursor.read,
    };
    let groups = told_groups(&written);
    let look =
        |(chat, user): (&&str, &&str)| Op::Member { chat: (*chat).to_owned(), user: (*user).to_owned() };
    let ops: Vec<Op> = writes.iter().map(op).chain(readers.ops()).chain(groups.iter().map(look)).collect();
    let mut outcomes = core.apply_as(generation, &ops).await;
    let versions = outcomes.split_off(ops.len() - groups.len());
    let versions = groups.keys().copied().zip(versions.into_iter().map(version)).collect();
    let routes = outcomes.split_off(writes.len());
    let mut moved = Vec::with_capacity(writes.len());
    let mut failed = Ok(());
    for (((key, cursor), mut written), outcome) in writes.into_iter().zip(written).zip(outcomes) {
        forget_changed(&mut written, &versions);
        match read::moved(outcome) {
            Ok(new) => {
                core.delivered.settled(key, cursor);
                moved.push((written, new));
            }
            Err(error) => failed = Err(error),
        }
    }
    readers.tell(core, routes, &moved);
    failed
}

/// The groups whose members are to be told, each with one of its users.
fn told_groups<'a>(written: &[Written<'a>]) -> BTreeMap<&'a str, &'a str> {
    let is_told = |written: &&Written<'_>| written.place.as_ref().is_some_and(|place| place.circle.is_some());
    written.iter().filter(is_told).map(|written| (written.chat, written.user)).collect()
}

/// `None`: not to be had.
fn version(outcome: Outcome) -> Option<u64> {
    read::standing(outcome).ok().map(|standing| standing.group.version)
}

/// Nobody else is told of a cursor in a group that has changed until it was written.
fn forget_changed(written: &mut Written<'_>, versions: &BTreeMap<&str, Option<u64>>) {
    let Some(place) = &mut written.place else { return };
    let now = versions.get(written.chat).copied().flatten();
    let is_good = |circle: &Arc<roster::Readers>| now.is_some_and(|version| circle.is_as_new_as(version));
    place.circle.take_if(|circle| !is_good(circle));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::tests::{Scripted, core_over};
    use crate::store::{Answer, Moved};

    fn head(history: u64, seq: u64) -> Answer {
        Answer::Head(Head { history, seq, first: 1, ..Head::default() })
    }

    #[tokio::test]
    async fn a_flush_leaves_at_the_first_part_that_fails_and_keeps_the_rest() {
        let store = Scripted::new(|op| match op {
            Op::Delivered { chat, .. } if chat.as_str() >= "a:c020" => {
                Err(StoreError::Unknown("away".into()))
            }
            Op::Delivered { .. } => Ok(Answer::Moved(Moved::default())),
            _ => Ok(Answer::Done),
        });
        let core = core_over(store.clone());
        for n in 0..100 {
            core.delivered.note(format!("a:c{n:03}"), "a", Cursor { history: 0, seq: 1, read: 0 });
        }
        flush(&core).await;
        assert_eq!(store.calls(), 2, "one part was tried, who is told of it looked up; and not all of them");
        assert_eq!(core.delivered.pending().len(), 80, "what was written is forgotten, the rest is kept");
    }

    #[tokio::test]
    async fn a_damaged_row_holds_up_no_other() {
        let store = Scripted::new(|op| match op {
            Op::Head { chat, .. } if chat == "a:c000" => Err(StoreError::Corrupt("a row".into())),
            Op::Delivered { chat, .. } if chat == "a:c001" => Err(StoreError::Corrupt("a row".into())),
            Op::Delivered { .. } => Ok(Answer::Moved(Moved::default())),
            _ => Ok(head(7, 10)),
        });
        let core = core_over(store.clone());
        for n in 0..100 {
            let history = if n == 0 { 7 } else { 0 };
            core.delivered.note(format!("a:c{n:03}"), "a", Cursor { history, seq: 1, read: 0 });
        }
        flush(&core).await;
        assert!(core.delivered.pending().is_empty());
        assert!(core.store_answers());
    }

    #[test]
    fn who_is_in_a_group_that_has_changed_is_not_told() {
        let group = crate::group::Group { version: 3, ..Default::default() };
        let list = roster::Readers::new(&crate::store::Roster { group, ..Default::default() }, 1);
        let place = Place { number: 1, circle: Some(Arc::new(list)) };
        for (now, told) in [(Some(3), true), (Some(4), false), (None, false)] {
            let place = Some(place.clone());
            let mut written = Written { chat: "#7", user: "a", history: 1, with_read: true, place };
            assert_eq!(told_groups(std::slice::from_ref(&written)), BTreeMap::from([("#7", "a")]));
            forget_changed(&mut written, &BTreeMap::from([("#7", now)]));
            assert_eq!(written.place.is_some_and(|place| place.circle.is_some()), told, "{now:?}");
        }
    }

    #[tokio::test]
    async fn a_cursor_of_another_history_is_ignored_and_one_above_the_head_is_proof() {
        let store = Scripted::new(|op| match op {
            Op::Head { .. } => Ok(head(7, 10)),
            Op::Delivered { .. } => Ok(Answer::Moved(Moved::default())),
            _ => Ok(Answer::Done),
        });
        let core = core_over(store.clone());
        let bucket = chat_bucket("a:b");
        for (history, seq, wanted) in [
            (7, 10, Op::Delivered { chat: "a:b".into(), user: "a".into(), seq: 10, read: 0 }),
            (6, 10, Op::Head { chat: "a:b".into(), user: "a".into() }),
        ] {
            core.delivered.note("a:b".into(), "a", Cursor { history, seq, read: 0 });
            flush(&core).await;
            assert_eq!(store.last(), Some(wanted));
        }
        core.histories.forget();
        core.delivered.note("a:b".into(), "a", Cursor { history: 7, seq: 0, read: 99 });
        flush(&core).await;
        assert!(
            matches!(store.last(), Some(Op::Delivered { seq: 99, read: 99, .. })),
            "no proof of anything"
        );
        core.histories.forget();
        core.delivered.note("a:b".into(), "a", Cursor { history: 7, seq: 11, read: 0 });
        flush(&core).await;
        assert_eq!(store.last(), Some(Op::LoseHistory { bucket, history: 7 }));
        assert!(core.delivered.pending().is_empty());
        // Said again it counts for nothing, and is forgotten.
        core.histories.forget();
        core.delivered.note("a:b".into(), "a", Cursor { history: 7, seq: 11, read: 0 });
        flush(&core).await;
        assert_eq!(store.last(), Some(Op::Head { chat: "a:b".into(), user: "a".into() }));
        assert_eq!(core.metrics.proofs_refused.get(), 1);
        assert!(core.delivered.pending().is_empty());
    }
}
