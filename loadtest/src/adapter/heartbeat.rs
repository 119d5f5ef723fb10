//! When each connection's next heartbeat is due. Owned by one engine thread.
//!
//! Trap: entries leave in the order in which they came, which is right because all have the same interval. An entry of a
//! connection that is gone is found out by its epoch when its time comes.

use std::collections::VecDeque;

use crate::engine::Io;

/// Heartbeats of one thread's connections.
#[derive(Debug)]
pub(super) struct Heartbeats {
    interval_us: u64,
    bytes: &'static [u8],
    due: VecDeque<(u64, u32, u16)>,
}

impl Heartbeats {
    /// These bytes, so often.
    pub fn new(interval_us: u64, bytes: &'static [u8]) -> Heartbeats {
        Heartbeats { interval_us, bytes, due: VecDeque::new() }
    }

    /// A connection became ready.
    pub fn begin(&mut self, index: u32, io: &Io) {
        self.due.push_back((io.now_us() + self.interval_us, index, io.epoch(index)));
    }

    /// Sends those that are due. When the next is.
    pub fn tick(&mut self, io: &mut Io) -> Option<u64> {
        while let Some((due, index, epoch)) = self.due.front().copied() {
            if due > io.now_us() {
                return Some(due);
            }
            self.due.pop_front();
            if io.epoch(index) == epoch && io.is_ready(index) {
                io.send(index, self.bytes);
                // From when it was due, so that a late turn does not bunch the next round.
                self.due.push_back((due + self.interval_us, index, epoch));
            }
        }
        None
    }
}
