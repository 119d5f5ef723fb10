//! The burst budget: one account of all memory that exists only while something goes on (partial frames, unsent bytes of
//! slow readers, batches on their way up). Shared by all workers through atomics; an idle connection never touches it.
//!
//! Clients share what the batches leave. Each may hold at most a sixteenth of what is still free, so the more is taken, the
//! less one can take, the last byte is never given away, and a newcomer with a small need always finds room: ten thousand
//! readers that stop at once end up with some kilobytes each, instead of the first few with everything.
//!
//! Trap: what counts is what the allocator handed out (capacity and its own overhead), not what is in use. Whoever
//! charges must release the same number, so holders keep it ([`Batch`] does it by itself).

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// One client may hold this part of what is free.
const SHARE: usize = 16;

/// What the allocator and the table of holders cost beside the bytes themselves, per holder.
pub const HOLDER_BYTES: usize = 64;

/// The account.
#[derive(Debug)]
pub struct Burst {
    clients: AtomicUsize,
    clients_bytes_max: usize,
    batches: AtomicUsize,
    batches_bytes_max: usize,
}

impl Burst {
    /// Nothing charged. `clients_bytes_max`: partial frames and unsent bytes; `batches_bytes_max`: batches up.
    pub fn new(clients_bytes_max: usize, batches_bytes_max: usize) -> Self {
        Burst {
            clients: AtomicUsize::new(0),
            clients_bytes_max,
            batches: AtomicUsize::new(0),
            batches_bytes_max,
        }
    }

    /// The most that one client may hold now.
    pub fn share_bytes(&self) -> usize {
        self.clients_bytes_max.saturating_sub(self.clients.load(Ordering::Relaxed)) / SHARE
    }

    /// A client that is charged `from` bytes wants `to`. `false`: not now, and nothing has changed. To shrink is always
    /// possible.
    #[must_use]
    pub fn resize(&self, from: usize, to: usize) -> bool {
        if to <= from {
            self.release(from - to);
            return true;
        }
        let more = to - from;
        let before = self.clients.fetch_add(more, Ordering::Relaxed);
        if to <= self.clients_bytes_max.saturating_sub(before) / SHARE {
            return true;
        }
        self.release(more);
        false
    }

    /// A client gives back what it is charged.
    pub fn release(&self, bytes: usize) {
        let before = self.clients.fetch_sub(bytes, Ordering::Relaxed);
        debug_assert!(before >= bytes, "{bytes} bytes released of {before}");
    }

    /// Charges a batch. `None`: too many bytes are on their way; one batch is let through when there is no other.
    pub fn batch(self: &Arc<Self>, bytes: usize) -> Option<Batch> {
        let before = self.batches.fetch_add(bytes, Ordering::Relaxed);
        let batch = Batch { account: Some(self.clone()), bytes };
        // Dropping it takes the charge back.
        (before == 0 || before + bytes <= self.batches_bytes_max).then_some(batch)
    }

    /// Bytes charged to clients.
    pub fn clients_bytes(&self) -> usize {
        self.clients.load(Ordering::Relaxed)
    }

    /// Bytes charged to batches.
    pub fn batches_bytes(&self) -> usize {
        self.batches.load(Ordering::Relaxed)
    }
}

/// The charge of one batch; released with this value.
#[derive(Debug, Default)]
pub struct Batch {
    account: Option<Arc<Burst>>,
    bytes: usize,
}

impl Drop for Batch {
    fn drop(&mut self) {
        if let Some(account) = &self.account {
            account.batches.fetch_sub(self.bytes, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_more_is_taken_the_less_one_may_take() {
        let burst = Burst::new(16_000, 0);
        assert!(!burst.resize(0, 1_001));
        assert_eq!(burst.clients_bytes(), 0);
        assert!(burst.resize(0, 1_000));
        assert!(!burst.resize(0, 1_000) && burst.resize(0, 900));
        assert!(burst.resize(1_000, 10) && burst.resize(900, 0));
        assert_eq!((burst.clients_bytes(), burst.share_bytes()), (10, 999));
    }

    #[test]
    fn a_crowd_gets_something_each() {
        let burst = Burst::new(32 << 20, 0);
        let mut held = vec![0usize; 10_000];
        for _ in 0..2_000 {
            for bytes in &mut held {
                if burst.resize(*bytes, *bytes + 512) {
                    *bytes += 512;
                }
            }
        }
        assert!(held.iter().all(|bytes| *bytes >= 2_048), "{:?}", held.iter().min());
        assert!(burst.resize(0, 2_048), "and a newcomer too");
    }

    #[test]
    fn batches_are_released_with_their_charge() {
        let burst = Arc::new(Burst::new(0, 100));
        let first = burst.batch(500).expect("alone, any size passes");
        assert!(burst.batch(1).is_none());
        drop(first);
        let (a, b) = (burst.batch(50), burst.batch(50));
        assert!(a.is_some() && b.is_some() && burst.batch(1).is_none());
        drop((a, b));
        assert_eq!(burst.batches_bytes(), 0);
    }

    proptest! {
        /// Whatever holders do, the account is the sum of what they hold and never above its bound.
        #[test]
        fn it_always_balances(steps in proptest::collection::vec((0..20usize, 0..3_000usize), 0..400)) {
            let burst = Burst::new(20_000, 0);
            let mut held = [0usize; 20];
            for (who, to) in steps {
                if burst.resize(held[who], to) {
                    held[who] = to;
                }
                prop_assert_eq!(burst.clients_bytes(), held.iter().sum::<usize>());
                prop_assert!(burst.clients_bytes() <= 20_000);
            }
            for bytes in held {
                burst.release(bytes);
            }
            prop_assert_eq!(burst.clients_bytes(), 0);
        }
    }
}
