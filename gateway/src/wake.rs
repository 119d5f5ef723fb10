//! A coalesced wake-up between threads: many pushes, one system call. Used with a queue beside it, in both directions.
//!
//! Trap: the order is everything. The pushing side pushes, then [`Wake::wake`]s. The waiting side wakes up, then
//! [`Wake::begin`]s, **then** drains. Clearing the flag behind the drain loses what was pushed in between.
//!
//! `tests/wake_model.rs` compiles this very file over loom's atomics (that is what `crate::sync` is for) and tries every
//! interleaving. What is changed here must stay within its reach.

use crate::sync::Arc;
use crate::sync::atomic::{AtomicBool, Ordering};
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

/// How the pushing side of a bounded queue asks to be woken when there is room again. One for each queue; cheap to clone.
///
/// The pushing side finds no room, [`Starved::say`]s so, and tries **once more** before it waits. The popping side pops,
/// and then [`Starved::take`]s. Both swap, so one of them is second, and sees all that the first did before: the popping side
/// that somebody waits, or the pushing side the room. With a plain store in place of one swap, both might see what was
/// before, and the one would wait for ever.
#[derive(Debug, Clone)]
pub struct Starved(Arc<AtomicBool>);

impl Starved {
    /// Nobody waits.
    pub fn new() -> Self {
        Starved(Arc::new(AtomicBool::new(false)))
    }

    /// Pushing side: no room. The last try follows.
    pub fn say(&self) {
        self.0.swap(true, Ordering::AcqRel);
    }

    /// Popping side, behind its pops: whether the other waits and is to be woken now.
    pub fn take(&self) -> bool {
        self.0.swap(false, Ordering::AcqRel)
    }
}

impl Default for Starved {
    fn default() -> Self {
        Starved::new()
    }
}
