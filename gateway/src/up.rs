//! What a turn sends up: its batch, and when it leaves. On the worker's thread.
//!
//! Trap: a batch that the bridge did not take is held back, and then nothing is read until it does; a batch in which nobody
//! waits for anything stays on purpose, and reading goes on. The two must not be mixed up.

use std::time::Duration;

use crossbeam_channel::TrySendError;
use proto::Command;

use crate::batch::{UpBatch, UpFrame};
use crate::worker::Worker;

impl Worker {
    /// Appends a frame to the batch of this turn.
    pub(crate) fn batch_up(&mut self, frame: UpFrame, body: &[u8]) {
        if self.batch.frames.is_empty() {
            // The last turn's sizes: growing from nothing copies everything several times.
            self.batch.frames.reserve(self.batch_frames);
            self.batch.bodies.reserve(self.batch_bytes.max(body.len()));
        }
        let may_wait = [Command::PushAck, Command::Read, Command::Typing];
        self.urgent |= !may_wait.iter().any(|command| *command as u8 == frame.command);
        self.batch.bodies.extend_from_slice(body);
        self.batch.frames.push(frame);
    }

    /// Whether the batch may wait for the next: nobody waits for the answer to PushAck, Read or Typing, or for the news that a batch
    /// down was placed. Alone they would wake the bridge and a state server twice per message.
    fn can_wait(&mut self) -> bool {
        let full = self.batch.frames.len() >= NEWS_MAX || self.batch.bodies.len() >= NEWS_BYTES_MAX;
        if self.urgent || !self.batch.gone.is_empty() || full {
            return false;
        }
        let since_ms = *self.idle_since_ms.get_or_insert(self.now_ms);
        self.now_ms < since_ms + NEWS_MS_MAX
    }

    /// Hands the batch of this turn to the bridge.
    pub(crate) fn send_up(&mut self) {
        if self.batch.is_empty() || (!self.held_back && self.can_wait()) {
            return;
        }
        self.held_back = true;
        let Some(charge) = self.shared.burst.batch(self.batch.held_bytes()) else {
            // Too much is on its way already: as if the queue were full.
            self.stats().up_full.add(1);
            self.shared.up_wake.wake();
            // Sockets that are not read stay ready, so epoll would not wait.
            return std::thread::park_timeout(UP_WAIT);
        };
        (self.batch_frames, self.batch_bytes) = (self.batch.frames.len(), self.batch.bodies.len());
        let batch = UpBatch { charge, ..std::mem::take(&mut self.batch) };
        match self.shared.up.try_send(batch) {
            Ok(()) => self.sent_up(),
            Err(TrySendError::Full(batch)) => {
                self.stats().up_full.add(1);
                self.shared.up_wake.wake();
                // The only place where a worker waits for anybody. Its clients wait in their sockets meanwhile.
                match self.shared.up.send_timeout(batch, UP_WAIT) {
                    Ok(()) => self.sent_up(),
                    Err(error) => self.batch = UpBatch { charge: Default::default(), ..error.into_inner() },
                }
            }
            // The bridge has died; the process is about to end.
            Err(TrySendError::Disconnected(_)) => self.sent_up(),
        }
    }

    fn sent_up(&mut self) {
        (self.held_back, self.urgent, self.idle_since_ms) = (false, false, None);
        self.shared.up_wake.wake();
    }

    /// When what nobody waits for has waited long enough.
    pub(crate) fn news_due_ms(&self) -> Option<u64> {
        self.idle_since_ms.map(|since_ms| since_ms + NEWS_MS_MAX)
    }
}

/// How long acknowledgements of pushes and the like may wait for something that is waited for, and how many of them may.
/// State merges delivered cursors for 200 ms anyway.
const NEWS_MS_MAX: u64 = 50;
const NEWS_MAX: usize = 256;
const NEWS_BYTES_MAX: usize = 16 * 1024;

/// How long the bridge may keep a worker waiting when the queue up is full.
pub(crate) const UP_WAIT: Duration = Duration::from_millis(1);
