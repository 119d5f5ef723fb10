//! The lanes in which messages of groups wait to be pushed, and what becomes of what finds no room in one: it is stored, so it is left there,
//! and the lane reads it again when it comes to it. So a group that more is written to than its members can be told takes no memory, and
//! holds up nobody in another lane. On the state server's thread.
//!
//! What is read again are all messages of the group from there on: where several state servers are behind in one group, each pushes them.
//!
//! Trap: once a group is behind, what follows has to stay behind it, or its readers see a hole with each message and pull.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::core::Core;
use crate::fan_out::{self, Accepted};
use crate::ledger::Token;
use crate::store::{Op, StoreError, Stored, read};

/// What a message takes of the bytes that may wait, until it is dropped.
pub type Room = OwnedSemaphorePermit;

/// Of a message beside its body: names, places in queues.
const BESIDE_BODY_BYTES: usize = 256;

/// Places of a lane that only messages get which were answered before. They have no body, and what is behind does not cover them.
const PLACES_FOR_RESENT: usize = 64;

/// Groups of a lane that may be behind at a time, some 200 bytes each; then all others, of one-to-one chats too, wait for one of
/// these. More than one user can make for a long time.
const BEHIND_MAX: usize = 32_768;

/// Messages taken at a time, also of what is behind: few, because their readers are read once a round.
const MESSAGES_PER_ROUND: usize = 16;

/// See the head of this file.
pub struct Lane {
    queue: mpsc::Sender<Accepted>,
    bytes: Arc<Semaphore>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// By name of the group.
    behind: BTreeMap<String, Behind>,
    /// Messages that were put into the queue and taken out of it, ever.
    put: u64,
    taken: u64,
}

/// What is to be read again of a group.
#[derive(Debug)]
struct Behind {
    /// All up to here was there before, or has been pushed.
    cursor: u64,
    /// The newest message that found no room.
    last: u64,
    /// So many messages were put into the queue before it; they come first.
    after: u64,
    /// Of what was left up to there the oldest: the mark stands until all of that is pushed.
    held: Option<Token>,
    held_upto: u64,
    /// The same of what was left behind that. A group may be behind for hours, and the mark must not.
    later: Option<Token>,
    /// Messages that were left, ever.
    left: u64,
}

impl Behind {
    /// Nothing is left yet, and the first will be this.
    fn from(seq: u64, after: u64) -> Behind {
        Behind { cursor: seq - 1, last: seq, after, held: None, held_upto: seq, later: None, left: 0 }
    }

    fn leave(&mut self, seq: u64, held: Option<Token>) {
        self.cursor = self.cursor.min(seq - 1);
        self.last = self.last.max(seq);
        self.left += 1;
        let of = if seq <= self.held_upto { &mut self.held } else { &mut self.later };
        let is_older = |held: &Token| of.as_ref().is_none_or(|of| held.time_us() < of.time_us());
        if held.as_ref().is_some_and(is_older) {
            *of = held;
        }
    }
}

/// What a lane reads of a group that is behind, of one moment.
#[derive(Debug)]
struct Turn {
    chat: String,
    /// From here, exclusive, and up to there.
    cursor: u64,
    last: u64,
    held: Option<Token>,
    left: u64,
}

impl Lane {
    /// One with room for so many messages and bytes, and what is put into it.
    pub fn new(messages_max: usize, bytes_max: usize) -> (Lane, mpsc::Receiver<Accepted>) {
        let (queue, accepted) = mpsc::channel(messages_max.max(1) + PLACES_FOR_RESENT);
        (Lane { queue, bytes: Arc::new(Semaphore::new(bytes_max)), state: Mutex::default() }, accepted)
    }

    /// Puts a message in, or leaves it in the store.
    pub async fn put(&self, core: &Core, mut accepted: Accepted) {
        if accepted.again {
            if !self.is_to_be_read(&accepted) {
                // If not even these places are free its sender floods it, and the first push was lost as well.
                accepted.message.body = Bytes::new();
                accepted.room = None;
                let is_in = self.queue.try_send(accepted).is_ok();
                self.state.lock().put += u64::from(is_in);
            }
            return;
        }
        let is_full = self.queue.capacity() <= PLACES_FOR_RESENT;
        let room = if is_full { None } else { room(&self.bytes, &accepted) };
        let unsent = match room {
            Some(room) if !self.is_behind(&accepted.chat) => {
                accepted.room = Some(room);
                match self.queue.try_send(accepted) {
                    // It ends behind this.
                    Ok(()) | Err(TrySendError::Closed(_)) => return self.state.lock().put += 1,
                    Err(TrySendError::Full(accepted)) => accepted,
                }
            }
            _ => accepted,
        };
        if let Some(accepted) = self.leave(core, unsent) {
            let _ = self.queue.send(accepted).await;
            self.state.lock().put += 1;
        }
    }

    fn is_behind(&self, chat: &str) -> bool {
        self.state.lock().behind.contains_key(chat)
    }

    /// Whether it is one of those that are to be read again anyway.
    fn is_to_be_read(&self, accepted: &Accepted) -> bool {
        let state = self.state.lock();
        let behind = state.behind.get(&accepted.chat);
        behind.is_some_and(|behind| (behind.cursor + 1..=behind.last).contains(&accepted.message.seq))
    }

    /// It is read from the store, behind what is behind already; given back where too many groups are.
    fn leave(&self, core: &Core, mut accepted: Accepted) -> Option<Accepted> {
        let seq = accepted.message.seq;
        let mut state = self.state.lock();
        let (is_full, after) = (state.behind.len() >= BEHIND_MAX, state.put);
        match state.behind.get_mut(&accepted.chat) {
            Some(behind) => behind.leave(seq, accepted.held.take()),
            None if is_full => return Some(accepted),
            None => {
                let behind = state.behind.entry(accepted.chat).or_insert(Behind::from(seq, after));
                behind.leave(seq, accepted.held.take());
            }
        }
        core.metrics.left_behind.inc();
        None
    }

    /// What is to be read next, of the group behind that one in turn.
    fn next(&self, behind: &str) -> Option<Turn> {
        let state = self.state.lock();
        let from = |bounds| {
            let mut some = state.behind.range::<str, _>((bounds, Bound::Unbounded));
            some.find(|(_, behind)| behind.after <= state.taken)
        };
        let next = from(Bound::Excluded(behind)).or_else(|| from(Bound::Unbounded));
        next.map(|(chat, at)| Turn {
            chat: chat.clone(),
            cursor: at.cursor,
            last: at.last,
            held: at.held.clone(),
            left: at.left,
        })
    }

    fn took(&self, messages: usize) {
        self.state.lock().taken += messages as u64;
    }

    /// All up to `read` is pushed of what was to be read; `None`: there was nothing to be read.
    fn done(&self, turn: &Turn, read: Option<u64>) {
        let mut state = self.state.lock();
        let Some(behind) = state.behind.get_mut(&turn.chat) else { return };
        if behind.cursor < turn.cursor {
            // Something older has come meanwhile.
            return;
        }
        match read {
            Some(read) if read < behind.last => {
                behind.cursor = read;
                if read >= behind.held_upto {
                    behind.held = behind.later.take();
                    behind.held_upto = behind.last;
                }
            }
            // It may have come while that was read.
            None if behind.left != turn.left => {}
            _ => drop(state.behind.remove(&turn.chat)),
        }
    }
}

/// Room for a message, if there is some.
fn room(bytes: &Arc<Semaphore>, accepted: &Accepted) -> Option<Room> {
    bytes.clone().try_acquire_many_owned(cost(accepted)).ok()
}

fn cost(accepted: &Accepted) -> u32 {
    (BESIDE_BODY_BYTES + accepted.message.body.len()) as u32
}

/// Hands a message to the fan-out. It waits where as much waits as may.
pub async fn enter(core: &Core, mut accepted: Accepted) {
    // Nobody closes it.
    accepted.room = core.backlog.clone().acquire_many_owned(cost(&accepted)).await.ok();
    // It may wait for long, and what it was cut from is not kept for it.
    accepted.message.body = Bytes::copy_from_slice(&accepted.message.body);
    // Only a server that has stopped drops the receiver; the message is stored all the same.
    let _ = core.accepted.send(accepted).await;
}

/// Pushes what is in a lane, and what was left behind, in turn.
pub async fn run(core: &Core, lane: &Lane, mut accepted: mpsc::Receiver<Accepted>) {
    let mut taken = Vec::with_capacity(MESSAGES_PER_ROUND);
    let mut last = String::new();
    loop {
        let next = lane.next(&last);
        if next.is_none() || !accepted.is_empty() {
            let count = accepted.recv_many(&mut taken, MESSAGES_PER_ROUND).await;
            if count == 0 {
                return;
            }
            fan_out::round(core, &mut taken).await;
            lane.took(count);
        }
        if let Some(turn) = next {
            catch_up(core, lane, &turn).await;
            last = turn.chat;
        }
    }
}

/// Pushes some of a group that is behind.
async fn catch_up(core: &Core, lane: &Lane, turn: &Turn) {
    let (chat, cursor) = (&turn.chat, turn.cursor);
    let limit = MESSAGES_PER_ROUND.min((turn.last - cursor) as usize);
    let op = Op::Pull { chat: chat.clone(), reader: String::new(), cursor, limit, reverse: false };
    let page = match read::page(fan_out::insist(core, &[op]).await.swap_remove(0)) {
        Ok(page) => page,
        Err(StoreError::Corrupt(text)) => {
            tracing::error!(chat, text, "what is behind cannot be read");
            return lane.done(turn, None);
        }
        // It insists on an answer.
        Err(_) => return,
    };
    let store_now_us = core.ledger.store_now_us(core.clock.now());
    let again = |stored: Stored| {
        // It has waited since then.
        let waited = Duration::from_micros(store_now_us.unwrap_or(0).saturating_sub(stored.time_us));
        let again = Accepted::pushed_again(chat.clone(), page.history, stored.into());
        let at = again.at.checked_sub(waited).unwrap_or(again.at);
        Accepted { held: turn.held.clone(), at, ..again }
    };
    let mut round: Vec<Accepted> = page.messages.into_iter().map(again).collect();
    fan_out::round(core, &mut round).await;
    // Also where it is damaged; nothing was there: the chat ends here, its history is another.
    lane.done(turn, (page.read_to > cursor).then_some(page.read_to));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::tests::{Scripted, core_over};
    use crate::store::{Answer, Page, Roster};
    use proto::wire;

    fn accepted(core: &Core, chat: &str, seq: u64) -> Accepted {
        let message = wire::Message { seq, time_us: seq, body: "hello".into(), ..Default::default() };
        Accepted { held: Some(core.ledger.hold()), ..Accepted::pushed_again(chat.into(), 7, message) }
    }

    fn waiting(queue: &mut mpsc::Receiver<Accepted>) -> Vec<(String, u64)> {
        std::iter::from_fn(|| queue.try_recv().ok()).map(|one| (one.chat, one.message.seq)).collect()
    }

    #[tokio::test]
    async fn what_finds_no_room_is_read_again_behind_what_did() {
        let core = core_over(Scripted::new(|_| Ok(Answer::Done)));
        let (lane, mut queue) = Lane::new(2, 1_000_000);
        for seq in [1, 2, 4, 3] {
            lane.put(&core, accepted(&core, "#1", seq)).await;
        }
        assert_eq!(lane.next("").map(|turn| turn.chat), None, "what is in the lane comes first");
        assert_eq!(waiting(&mut queue), [("#1".to_owned(), 1), ("#1".to_owned(), 2)]);
        lane.took(2);
        // There is room again, but not for what would overtake; another group is not behind.
        lane.put(&core, accepted(&core, "#1", 5)).await;
        lane.put(&core, accepted(&core, "#2", 1)).await;
        assert_eq!(waiting(&mut queue), [("#2".to_owned(), 1)]);
        let next = |behind: &str| lane.next(behind).map(|turn| (turn.chat, turn.cursor, turn.last));
        assert_eq!(next(""), Some(("#1".into(), 2, 5)));
        assert_eq!(next("#1"), next(""), "in turn");
        assert!(!core.ledger.is_clear(), "the mark stands");
        // What comes meanwhile is read later, and so is what is older.
        let turn = lane.next("").unwrap();
        lane.put(&core, accepted(&core, "#1", 6)).await;
        lane.done(&turn, Some(5));
        drop(turn);
        assert_eq!(next(""), Some(("#1".into(), 5, 6)));
        let turn = lane.next("").unwrap();
        lane.put(&core, accepted(&core, "#1", 2)).await;
        lane.done(&turn, Some(6));
        drop(turn);
        assert_eq!(next(""), Some(("#1".into(), 1, 6)));
        // Nothing was there, but something has come since.
        let turn = lane.next("").unwrap();
        lane.put(&core, accepted(&core, "#1", 7)).await;
        lane.done(&turn, None);
        drop(turn);
        assert_eq!(next(""), Some(("#1".into(), 1, 7)));
        // What is sent again is read with the rest.
        lane.put(&core, Accepted { again: true, ..accepted(&core, "#1", 7) }).await;
        assert_eq!(waiting(&mut queue), []);
        lane.done(&lane.next("").unwrap(), Some(7));
        assert_eq!(next(""), None);
        assert!(core.ledger.is_clear());
        assert_eq!(core.metrics.left_behind.get(), 6);
        lane.put(&core, accepted(&core, "#1", 8)).await;
        assert_eq!(waiting(&mut queue), [("#1".to_owned(), 8)]);
    }

    #[tokio::test]
    async fn the_mark_goes_on_though_a_group_stays_behind() {
        let core = core_over(Scripted::new(|_| Ok(Answer::Done)));
        let (lane, mut queue) = Lane::new(1, 1_000_000);
        let put = async |seq: u64| {
            core.ledger.told(seq * 1_000_000, core.clock.now());
            lane.put(&core, accepted(&core, "#1", seq)).await;
        };
        put(1).await;
        put(2).await;
        assert_eq!((waiting(&mut queue).len(), core.ledger.mark_us()), (1, 2_000_000));
        lane.took(1);
        for seq in 3..=20 {
            put(seq).await;
            // One comes for each that is pushed.
            let turn = lane.next("").unwrap();
            lane.done(&turn, Some(seq - 1));
        }
        assert!(lane.is_behind("#1") && core.ledger.mark_us() >= 19_000_000, "{}", core.ledger.mark_us());
    }

    #[tokio::test]
    async fn bytes_are_bounded_and_resends_have_places_of_their_own() {
        let core = core_over(Scripted::new(|_| Ok(Answer::Done)));
        let (lane, mut queue) = Lane::new(100, 2 * (BESIDE_BODY_BYTES + 5));
        for seq in 1..=3 {
            lane.put(&core, accepted(&core, "#1", seq)).await;
        }
        let resent = |seq| Accepted { again: true, ..accepted(&core, "#1", seq) };
        for seq in 0..200 {
            lane.put(&core, resent(900 + seq)).await;
        }
        lane.took(2);
        assert_eq!(lane.next("").map(|turn| (turn.chat, turn.cursor, turn.last)), Some(("#1".into(), 2, 3)));
        assert_eq!(
            waiting(&mut queue).len(),
            100 + PLACES_FOR_RESENT,
            "and no more, however many are resent"
        );
        assert_eq!(lane.bytes.available_permits(), 2 * (BESIDE_BODY_BYTES + 5));
    }

    #[tokio::test]
    async fn a_lane_pushes_what_is_behind_until_nothing_is() {
        let store = Scripted::new(|op| match op {
            Op::Pull { cursor, limit, .. } => {
                let stored = |seq| Stored {
                    seq,
                    sender: "a".into(),
                    time_us: seq,
                    body: "x".into(),
                    kind: wire::Kind::Text,
                };
                let messages: Vec<Stored> = (cursor + 1..=50).take(*limit).map(stored).collect();
                let read_to = messages.last().map_or(0, |last| last.seq);
                Ok(Answer::Messages(Page { history: 7, head: 50, first: 1, since: 0, messages, read_to }))
            }
            Op::Members { .. } => Ok(Answer::Roster(Roster::default())),
            _ => Err(StoreError::Corrupt("not asked for here".into())),
        });
        let core = core_over(store.clone());
        let (lane, queue) = Lane::new(1, 1_000_000);
        for seq in 1..=40 {
            lane.put(&core, accepted(&core, "#1", seq)).await;
        }
        let Lane { bytes, state, queue: open } = lane;
        // Nobody can put anything in any more: it ends when it is through.
        drop(open);
        let (closed, _) = mpsc::channel(1);
        run(&core, &Lane { queue: closed, bytes, state }, queue).await;
        let pulls = store.asked().into_iter().filter(|op| matches!(op, Op::Pull { .. })).count();
        assert_eq!((pulls, core.ledger.is_clear()), (3, true), "2 to 40 by sixteen");
    }
}
