//! Delivered cursors on their way to the store: merged per (chat, user), written a few times a second.
//!
//! Trap: losing some only delays a status and lets a new device see a little more; so they wait in memory, bounded, and
//! nothing waits for them.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use crate::server::Core;
use crate::store::Op;

/// What waits.
#[derive(Debug)]
pub struct Delivered {
    waiting: Mutex<HashMap<(String, String), u64>>,
    waiting_max: usize,
}

/// Written in one store call.
const WRITES_PER_CALL: usize = 512;

impl Delivered {
    /// At most so many (chat, user) at a time; beyond that news of others is dropped until the next write.
    pub fn new(waiting_max: usize) -> Self {
        Delivered { waiting: Mutex::default(), waiting_max }
    }

    /// A user has everything of the chat up to `seq`.
    pub fn note(&self, chat: String, user: &str, seq: u64) {
        let mut waiting = self.waiting.lock();
        let full = waiting.len() >= self.waiting_max;
        let key = (chat, user.to_owned());
        match waiting.get_mut(&key) {
            Some(noted) => *noted = seq.max(*noted),
            None if full => {}
            None => drop(waiting.insert(key, seq)),
        }
    }

    fn take(&self) -> Vec<Op> {
        let waiting = std::mem::take(&mut *self.waiting.lock());
        waiting.into_iter().map(|((chat, user), seq)| Op::Delivered { chat, user, seq }).collect()
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

/// Writes what waits now.
pub async fn flush(core: &Core) {
    for ops in core.delivered.take().chunks(WRITES_PER_CALL) {
        if let Some(Err(error)) = core.apply(ops).await.into_iter().find(Result::is_err) {
            core.store_failed(&error);
        }
    }
}
