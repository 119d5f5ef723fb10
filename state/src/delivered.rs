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

/// Written in one store call. Each is a script of some 6 µs in Redis: at 512 a call, five times a second, every fiftieth
/// message waited for several ms (p99 of a delivery).
const WRITES_PER_CALL: usize = 32;

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

    /// What is noted here and may not be written yet.
    pub fn noted(&self, chat: &str, user: &str) -> Option<u64> {
        self.waiting.lock().get(&(chat.to_owned(), user.to_owned())).copied()
    }

    fn pending(&self) -> Vec<((String, String), u64)> {
        self.waiting.lock().iter().map(|(key, seq)| (key.clone(), *seq)).collect()
    }

    /// Written: forgotten, unless there is newer news.
    fn written(&self, key: &(String, String), seq: u64) {
        let mut waiting = self.waiting.lock();
        if waiting.get(key) == Some(&seq) {
            waiting.remove(key);
        }
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

/// Writes what waits now. What the store did not take waits for the next time.
pub async fn flush(core: &Core) {
    for part in core.delivered.pending().chunks(WRITES_PER_CALL) {
        let ops: Vec<Op> = part
            .iter()
            .map(|((chat, user), seq)| Op::Delivered { chat: chat.clone(), user: user.clone(), seq: *seq })
            .collect();
        let mut failed = false;
        for ((key, seq), outcome) in part.iter().zip(core.apply(&ops).await) {
            match outcome {
                Ok(_) => core.delivered.written(key, *seq),
                Err(error) => {
                    failed = true;
                    core.store_failed(&error);
                }
            }
        }
        if failed {
            // A store that stands still would be waited for once per part, also at the end of the process.
            return;
        }
    }
}
