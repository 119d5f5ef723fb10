//! What a worker does by the clock: deadlines that are met, whoever is silent for too long, and memory that a burst has left behind.
//! On the worker's thread.
//!
//! Trap: what is given back here is only what is empty, or less than a quarter full: whoever is busy must not pay for it.

use std::collections::VecDeque;

use bytes::BytesMut;
use proto::wire::Code;

use crate::connection::{Stage, flag};
use crate::worker::Worker;

impl Worker {
    pub(crate) fn expire(&mut self) {
        let now_ms = self.now_ms;
        while let Some(place) = {
            let table = &mut self.table;
            self.logins.pop_due(now_ms, |place| table.get_mut(place).is_none_or(|c| c.stage != Stage::Fresh))
        } {
            self.refuse(place, Code::LoginTimeout);
        }
        while let Some(place) = {
            let table = &mut self.table;
            self.stalls.pop_due(now_ms, |place| {
                table.get_mut(place).is_none_or(|connection| {
                    let over = !connection.has(flag::BLOCKED);
                    if over {
                        connection.flags &= !flag::STALL;
                    }
                    over
                })
            })
        } {
            self.stall_due(place);
        }
        while let Some(place) = {
            let table = &mut self.table;
            self.lingers
                .pop_due(now_ms, |at| table.get_mut(at).is_none_or(|c| !c.has(flag::SHUT | flag::LAST)))
        } {
            self.close(place, None);
        }
        self.sweep();
        self.close_idle();
    }

    /// Once a second: whoever was silent for too long, and a listener that had to pause.
    fn sweep(&mut self) {
        let tick = self.tick();
        if tick == self.swept_tick {
            return;
        }
        self.swept_tick = tick;
        self.resume_listener();
        self.shrink();
        let now_s = self.born.elapsed().as_secs() as u32;
        for place in self.table.overdue(now_s) {
            self.refuse(place, Code::TokenExpired);
        }
        if self.idle.is_empty() {
            self.idle = self.table.idle(tick, self.idle_ticks()).into();
        }
    }

    /// A tick is up to a second old when it is set: whoever is gone is gone within the limit.
    fn idle_ticks(&self) -> u8 {
        (self.shared.config.limits.idle_ms_max / 1000 - 1) as u8
    }

    /// Closes some of those who are silent, as many as a turn writes to: thousands may fall silent together.
    fn close_idle(&mut self) {
        let tick = self.tick();
        for _ in 0..self.shared.config.workers.writes_per_turn_max {
            let Some(place) = self.idle.pop_front() else { return };
            if !self.table.is_idle(place, tick, self.idle_ticks()) {
                continue;
            }
            match self.table.get_mut(place) {
                // Its silence is our doing; the stall deadline watches it instead.
                Some(connection) if connection.has(flag::PARKED) => self.table.touch(place, tick),
                Some(connection) if connection.stage == Stage::Closing => self.close(place, None),
                Some(_) => {
                    // Whoever is silent has sent nothing that the close could overtake, and may be gone without a word: the
                    // kernel alone tells it why.
                    self.refuse(place, Code::Idle);
                    self.flush_one(place);
                    self.close(place, None);
                }
                None => {}
            }
        }
    }

    /// Gives back what a burst has left behind.
    fn shrink(&mut self) {
        self.queues.shrink();
        self.tails.shrink();
        for deadlines in [&mut self.logins, &mut self.stalls, &mut self.lingers] {
            deadlines.shrink();
        }
        for written in [&mut self.dirty, &mut self.bulk] {
            if written.is_empty() {
                *written = VecDeque::new();
            }
        }
        self.pongs = BytesMut::new();
        self.early_leavers.shrink(self.now_ms);
        if self.idle.is_empty() {
            self.idle = VecDeque::new();
        }
        if !std::mem::take(&mut self.buffer_used) {
            self.buffer = Vec::new();
        }
        (self.batch_frames, self.batch_bytes) = (0, 0);
        self.rested = true;
    }
}
