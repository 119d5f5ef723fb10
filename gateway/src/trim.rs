//! Gives memory back to the kernel after a storm or a burst has gone. A thread of its own, because malloc walks its heaps
//! for that and no worker's turn may.
//!
//! Trap: glibc keeps what is freed in the heap of the thread that allocated it, for ever as far as anybody else is
//! concerned. Pages of the table are not concerned (they are mappings); what is left are the small things of a storm, some
//! kilobytes in each heap, and after an attack the partial frames and queues of thousands of clients.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::admission::Admission;
use crate::burst::Burst;
use crate::metrics::Metrics;
use crate::sys;

/// Starts looking, once a second, until the process ends.
pub(crate) fn spawn(admission: Arc<Admission>, burst: Arc<Burst>, metrics: Metrics) -> io::Result<()> {
    let look = move || {
        let mut trim = Trim::default();
        loop {
            std::thread::sleep(LOOK_EVERY);
            let seen = Seen {
                connections: admission.connections(),
                burst_bytes: burst.clients_bytes(),
                work: metrics.sum(|w| &w.accepted),
            };
            metrics.bridge.burst_bytes.set(seen.burst_bytes as u64);
            if trim.is_due(seen) {
                sys::trim_heap();
                metrics.bridge.trims.add(1);
            }
        }
    };
    std::thread::Builder::new().name("trim".to_owned()).stack_size(64 * 1024).spawn(look).map(drop)
}

const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What is looked at.
#[derive(Debug, Clone, Copy, Default)]
struct Seen {
    connections: usize,
    burst_bytes: usize,
    /// Connections accepted, ever.
    work: u64,
}

/// When it is time. Pure.
#[derive(Debug, Default)]
struct Trim {
    last: Seen,
    /// As it was when memory was given back last.
    trimmed: Seen,
    calm: u32,
    waited: u32,
}

/// Work behind which it is worth it.
const WORK_MIN: u64 = 1_000;

/// Work per look below which it is calm: nothing is about to take again what is given back.
const CALM_WORK_MAX: u64 = 100;

/// Looks that have to be calm one after the other.
const CALM_LOOKS: u32 = 3;

/// Looks after which it is done in the middle of traffic too, if a tenth of the connections or a megabyte have gone.
const PATIENCE_LOOKS: u32 = 10;

impl Trim {
    fn is_due(&mut self, seen: Seen) -> bool {
        let work = seen.work.wrapping_sub(self.last.work);
        let is_calm = work <= CALM_WORK_MAX
            && seen.connections.abs_diff(self.last.connections) <= CALM_WORK_MAX as usize;
        // What is held now may be more than at the last time: then the fall counts from here.
        self.trimmed.connections = self.trimmed.connections.max(self.last.connections);
        self.trimmed.burst_bytes = self.trimmed.burst_bytes.max(self.last.burst_bytes);
        self.last = seen;
        self.calm = if is_calm { self.calm + 1 } else { 0 };
        self.waited += 1;
        let connections_gone = self.trimmed.connections.saturating_sub(seen.connections);
        let much_gone = connections_gone > (self.trimmed.connections / 10).max(WORK_MIN as usize)
            || self.trimmed.burst_bytes.saturating_sub(seen.burst_bytes) > 1 << 20;
        let worked = seen.work.wrapping_sub(self.trimmed.work) >= WORK_MIN;
        let is_due =
            (much_gone || worked) && self.calm >= CALM_LOOKS || much_gone && self.waited >= PATIENCE_LOOKS;
        if is_due {
            self.trimmed = seen;
            self.waited = 0;
        }
        is_due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(connections: usize, burst_bytes: usize, work: u64) -> Seen {
        Seen { connections, burst_bytes, work }
    }

    #[test]
    fn once_behind_a_storm_and_once_behind_its_leaving() {
        let mut trim = Trim::default();
        assert!((0..10).all(|_| !trim.is_due(seen(0, 0, 0))));
        assert!(!(1..6).any(|n| trim.is_due(seen(n * 10_000, 0, n as u64 * 20_000))));
        let held: Vec<bool> = (0..20).map(|_| trim.is_due(seen(50_000, 0, 100_000))).collect();
        assert_eq!(held.iter().filter(|due| **due).count(), 1);
        let left: Vec<bool> = (0..20).map(|_| trim.is_due(seen(0, 0, 100_000))).collect();
        assert_eq!(left.iter().filter(|due| **due).count(), 1);
    }

    #[test]
    fn in_the_middle_of_traffic_only_for_much_and_not_often() {
        let mut trim = Trim::default();
        let mut work = 0;
        let mut busy = |trim: &mut Trim, connections, burst_bytes| {
            work += 5_000;
            trim.is_due(seen(connections, burst_bytes, work))
        };
        assert!((0..60).all(|_| !busy(&mut trim, 10_000, 8 << 20)));
        assert!(busy(&mut trim, 10_000, 0));
        let falling = (1..=20).filter(|n| busy(&mut trim, 10_000 - n * 400, 0)).count();
        assert_eq!(falling, 2);
        assert!((0..60).all(|_| !busy(&mut trim, 2_000, 0)));
    }
}
