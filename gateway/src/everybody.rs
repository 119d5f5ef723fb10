//! What a worker tells all its connections: to leave, or to Sync. On the worker's thread.
//!
//! Trap: what is said to everybody at once would stand in memory for all of them, and what they do about it comes back at once. So it
//! is said to a few in each turn, or by the clock.

use proto::wire::{self, Code};
use proto::{Command, frame};

use crate::connection::{Stage, flag};
use crate::worker::Worker;

/// GoAway is told.
pub(crate) struct Drain {
    /// From here on.
    from_slot: u32,
    within_ms: u32,
}

/// Resync is told.
pub(crate) struct Resync {
    /// From here on.
    from_slot: u32,
    /// When the next ones are.
    pub next_ms: u64,
}

/// Between those who are told to Sync and the next ones.
const RESYNC_STEP_MS: u64 = 100;

/// Taken out of the table together, as each time costs a walk through a page.
const PLACES_AT_ONCE: usize = 256;

impl Worker {
    pub(crate) fn begin_drain(&mut self, within_ms: u32) {
        // Who stands before a door that was to open in a moment hears of it too, and is not reset.
        let rounds = self.shared.config.listen.backlog.unsigned_abs() as usize
            / self.shared.config.workers.accepts_per_turn_max;
        for _ in 0..=rounds {
            if !self.accept() {
                break;
            }
        }
        self.listener = None;
        self.drain = Some(Drain { from_slot: 0, within_ms });
    }

    /// Tells some connections to leave, as many as a turn writes to.
    pub(crate) fn continue_drain(&mut self) {
        let Some(Drain { from_slot, within_ms }) = self.drain else { return };
        let writes_max = self.shared.config.workers.writes_per_turn_max;
        if self.dirty.len() >= writes_max {
            return;
        }
        let Some((places, next_slot)) = self.table.places(from_slot, writes_max) else {
            self.drain = None;
            return;
        };
        self.drain = Some(Drain { from_slot: next_slot, within_ms });
        let text = crate::connection::reason_text(Code::ShuttingDown).to_owned();
        let frame = frame::encode(Command::GoAway, &wire::GoAway { within_ms, text });
        for place in places {
            self.enqueue(place, frame.clone(), false);
        }
    }

    /// The store lost something: whoever is logged in is to find out what, and whether it still knows of the login.
    pub(crate) fn begin_resync(&mut self) {
        self.resync = Some(Resync { from_slot: 0, next_ms: self.now_ms });
    }

    /// Looks at some connections, at this worker's share of `limits.resyncs_per_s`, and tells them to Sync. Who logs in behind them Syncs by
    /// itself.
    pub(crate) fn continue_resync(&mut self) {
        let Some(Resync { mut from_slot, next_ms }) = self.resync else { return };
        if self.now_ms < next_ms {
            return;
        }
        let per_s = u64::from(self.shared.config.limits.resyncs_per_s);
        let workers = self.shared.metrics.workers.len() as u64;
        // Of fewer than one in a step, one in several.
        let step_ms = RESYNC_STEP_MS.max(1_000 * workers / per_s);
        let mut room = (per_s * step_ms / 1_000 / workers).max(1);
        let frame = frame::encode(Command::Resync, &wire::Resync {});
        while room > 0 {
            let Some((places, next_slot)) = self.table.places(from_slot, PLACES_AT_ONCE) else {
                self.resync = None;
                return;
            };
            from_slot = next_slot;
            for place in places {
                if room == 0 {
                    from_slot = place.slot;
                    break;
                }
                match self.table.get_mut(place) {
                    Some(connection) if connection.stage != Stage::Bound => {}
                    // It is told once it has read.
                    Some(connection) if connection.has(flag::BLOCKED) => connection.flags |= flag::RESYNC,
                    Some(_) => {
                        self.stats().resyncs.add(1);
                        self.enqueue(place, frame.clone(), false);
                    }
                    None => {}
                }
                room -= 1;
            }
        }
        self.resync = Some(Resync { from_slot, next_ms: self.now_ms + step_ms });
    }
}
