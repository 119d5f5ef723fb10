//! A coalesced wake-up between threads: many pushes, one system call. Used with a queue beside it, in both directions.
//!
//! Trap: the order is everything. The pushing side pushes, then [`Wake::wake`]s. The waiting side wakes up, then
//! [`Wake::begin`]s, **then** drains. Clearing the flag behind the drain loses what was pushed in between.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::sys::EventFd;

/// Cheap to clone; both sides hold one.
#[derive(Debug, Clone)]
pub struct Wake {
    raised: Arc<AtomicBool>,
    eventfd: EventFd,
}

impl Wake {
    /// Over an eventfd that was made before the fd tables part.
    pub fn new(eventfd: EventFd) -> Self {
        Wake { raised: Arc::new(AtomicBool::new(false)), eventfd }
    }

    /// Something was pushed. Costs a system call only when the other side has begun since the last one.
    pub fn wake(&self) {
        if !self.raised.swap(true, Ordering::AcqRel) {
            self.eventfd.wake();
        }
    }

    /// Awake; a drain follows.
    pub fn begin(&self) {
        self.raised.swap(false, Ordering::AcqRel);
    }

    /// What the waiting side polls.
    pub fn eventfd(&self) -> EventFd {
        self.eventfd
    }
}
