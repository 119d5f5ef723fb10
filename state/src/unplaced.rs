//! The down batches of one stream that its gateway has not placed yet: what to push a second time when a connection was
//! gone, and what holds the mark meanwhile. On the state server's thread.
//!
//! Trap: frames are shared with what is on its way, so an entry costs a few dozen bytes; but a gateway that reads and never
//! reports would make them many. Beyond the bound the oldest are given up as missed, to be pushed again later.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use proto::link::{Gone, Push};

use crate::ledger::Token;
use crate::missed::Missed;
use crate::pace::Turn;

/// Pushes on their way to one gateway.
#[derive(Debug, Default)]
pub struct Pushes {
    /// One a message.
    pub pushes: Vec<Push>,
    /// Store time of the oldest message.
    pub since_us: u64,
    /// What holds the mark for them.
    pub held: Arc<[Token]>,
    /// They came back gone once: if they do again, that is that.
    pub second: bool,
    /// They are a part of what leaves in parts: the next one waits for the news that they are placed.
    pub turn: Option<Turn>,
}

/// A push whose connection was gone, and that is to be tried once more.
#[derive(Debug)]
pub struct Returned {
    /// The user whose connection it was.
    pub user: u64,
    /// As it was sent.
    pub frame: Bytes,
    /// As in [`Pushes`].
    pub since_us: u64,
    /// As in [`Pushes`].
    pub held: Arc<[Token]>,
}

/// See the head of this file.
#[derive(Debug)]
pub struct Unplaced {
    incarnation: u32,
    missed: Arc<Missed>,
    batches: Mutex<Batches>,
}

#[derive(Debug, Default)]
struct Batches {
    queue: VecDeque<Batch>,
    bytes: usize,
}

#[derive(Debug)]
struct Batch {
    number: u64,
    since_us: u64,
    held: Arc<[Token]>,
    turn: Option<Turn>,
    frames: Vec<Bytes>,
    /// Who gets them: connection, and place in `frames`. Empty for a second push.
    targets: Vec<(u64, u32)>,
    bytes: usize,
}

/// Bytes of frames, and batches, of one stream that may be unplaced.
const UNPLACED_BYTES_MAX: usize = 32 * 1024 * 1024;
const UNPLACED_BATCHES_MAX: usize = 65_536;

impl Unplaced {
    /// Of the gateway's life; what is unplaced when the last handle is dropped is noted as missed.
    pub fn new(incarnation: u32, missed: Arc<Missed>) -> Self {
        Unplaced { incarnation, missed, batches: Mutex::default() }
    }

    /// These pushes leave with the down batch of this number.
    pub fn leaves(&self, number: u64, pushes: &Pushes) {
        let mut targets = Vec::new();
        let mut frames = Vec::new();
        if !pushes.second {
            targets.reserve(pushes.pushes.iter().map(|push| push.connections.len()).sum());
            frames.reserve(pushes.pushes.len());
            for (place, push) in pushes.pushes.iter().enumerate() {
                targets.extend(push.connections.iter().map(|connection| (*connection, place as u32)));
                frames.push(push.frame.clone());
            }
        }
        let bytes = frames.iter().map(Bytes::len).sum::<usize>() + 16 * targets.len() + size_of::<Batch>();
        let (held, turn) = (pushes.held.clone(), pushes.turn.clone());
        let batch = Batch { number, since_us: pushes.since_us, held, turn, frames, targets, bytes };
        let mut batches = self.batches.lock();
        batches.bytes += bytes;
        batches.queue.push_back(batch);
        while batches.bytes > UNPLACED_BYTES_MAX || batches.queue.len() > UNPLACED_BATCHES_MAX {
            let Some(oldest) = batches.queue.pop_front() else { break };
            batches.bytes -= oldest.bytes;
            self.missed.note(self.incarnation, oldest.since_us, &[]);
        }
    }

    /// These connections were not there: what was sent to them is given back, each (user, message) once. Asked before
    /// [`Unplaced::placed`], which forgets it.
    pub fn gone(&self, gone: &[Gone]) -> Vec<Returned> {
        let pushed: BTreeSet<(u64, u64)> =
            gone.iter().filter(|gone| gone.pushed).map(|gone| (gone.connection, gone.user)).collect();
        let mut returned = Vec::new();
        if pushed.is_empty() {
            return returned;
        }
        for batch in &self.batches.lock().queue {
            for (connection, place) in &batch.targets {
                let Some((_, user)) = pushed.range((*connection, 0)..=(*connection, u64::MAX)).next() else {
                    continue;
                };
                if let Some(frame) = batch.frames.get(*place as usize) {
                    let (since_us, held) = (batch.since_us, batch.held.clone());
                    returned.push(Returned { user: *user, frame: frame.clone(), since_us, held });
                }
            }
        }
        returned
    }

    /// Everything up to this down batch is placed.
    pub fn placed(&self, upto: u64) {
        let mut batches = self.batches.lock();
        while batches.queue.front().is_some_and(|batch| batch.number <= upto) {
            let Some(batch) = batches.queue.pop_front() else { break };
            batches.bytes -= batch.bytes;
        }
    }

    /// This down batch is placed, but not all before it: what waits for it alone may leave.
    pub fn may_follow(&self, number: u64) {
        let mut batches = self.batches.lock();
        let begin = batches.queue.partition_point(|batch| batch.number < number);
        let end = batches.queue.partition_point(|batch| batch.number <= number);
        batches.queue.range_mut(begin..end).for_each(|batch| batch.turn = None);
    }

    /// These pushes will never leave: the stream has ended.
    pub fn never_left(&self, pushes: &Pushes) {
        self.missed.note(self.incarnation, pushes.since_us, &pushes.held);
    }
}

impl Drop for Unplaced {
    fn drop(&mut self) {
        for batch in &self.batches.get_mut().queue {
            self.missed.note(self.incarnation, batch.since_us, &batch.held);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::TokioClock;
    use crate::gateways::push_to;
    use crate::ledger::Ledger;
    use crate::pace::Pace;
    use futures_util::poll;

    fn pushes(ledger: &Ledger, since_us: u64, targets: &[(u64, u64)]) -> Pushes {
        let frame = Bytes::from(format!("message of {since_us}"));
        Pushes {
            pushes: vec![push_to(frame, targets, false)],
            since_us,
            held: Arc::from([ledger.hold()]),
            second: false,
            turn: None,
        }
    }

    fn gone(connection: u64, user: u64) -> Gone {
        Gone { connection, user, pushed: true, ..Gone::default() }
    }

    #[test]
    fn what_went_to_a_gone_connection_comes_back_until_it_is_placed() {
        let (ledger, missed) = (Ledger::default(), Arc::new(Missed::default()));
        let unplaced = Unplaced::new(3, missed.clone());
        unplaced.leaves(1, &pushes(&ledger, 10, &[(100, 1), (101, 2)]));
        unplaced.leaves(2, &pushes(&ledger, 20, &[(101, 2)]));
        let returned = unplaced.gone(&[gone(101, 2), gone(999, 9)]);
        let told: Vec<(u64, &[u8])> = returned.iter().map(|back| (back.user, &back.frame[..])).collect();
        assert_eq!(told, [(2, &b"message of 10"[..]), (2, b"message of 20")]);
        drop(returned);
        unplaced.placed(1);
        assert_eq!(unplaced.gone(&[gone(101, 2)]).len(), 1);
        assert!(!ledger.is_clear());
        unplaced.placed(2);
        assert!(unplaced.gone(&[gone(101, 2)]).is_empty() && ledger.is_clear());
        drop(unplaced);
        assert!(missed.incarnations().is_empty());
    }

    #[tokio::test]
    async fn the_next_part_follows_what_is_awaited_and_nothing_else_is_forgotten() {
        let ledger = Ledger::default();
        let unplaced = Unplaced::new(3, Arc::new(Missed::default()));
        let pace = Pace::new(Arc::new(TokioClock));
        unplaced.leaves(1, &pushes(&ledger, 10, &[(100, 1)]));
        unplaced.leaves(2, &Pushes { turn: pace.turn().await, ..pushes(&ledger, 20, &[(101, 2)]) });
        unplaced.may_follow(1);
        unplaced.may_follow(9);
        assert!(poll!(std::pin::pin!(pace.turn())).is_pending());
        unplaced.may_follow(2);
        assert!(pace.turn().await.is_some());
        assert_eq!(unplaced.gone(&[gone(100, 1), gone(101, 2)]).len(), 2);
        assert!(!ledger.is_clear());
        unplaced.placed(2);
        assert!(ledger.is_clear());
    }

    #[test]
    fn a_second_push_that_comes_back_is_not_tried_again() {
        let (ledger, missed) = (Ledger::default(), Arc::new(Missed::default()));
        let unplaced = Unplaced::new(3, missed);
        unplaced.leaves(1, &Pushes { second: true, ..pushes(&ledger, 10, &[(100, 1)]) });
        assert!(unplaced.gone(&[gone(100, 1)]).is_empty());
    }

    #[test]
    fn what_is_unplaced_when_the_stream_ends_is_missed_and_held_a_little() {
        let (ledger, missed) = (Ledger::default(), Arc::new(Missed::default()));
        let unplaced = Unplaced::new(3, missed.clone());
        unplaced.leaves(1, &pushes(&ledger, 30, &[(100, 1)]));
        unplaced.never_left(&pushes(&ledger, 20, &[(100, 1)]));
        drop(unplaced);
        assert!(!ledger.is_clear());
        assert_eq!(missed.take(3).0, Some(20));
        assert!(ledger.is_clear());
    }
}
