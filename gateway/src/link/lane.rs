//! One lane of a stream: what waits to leave, and what has left and is not acknowledged. Pure; owned by the link's core.
//!
//! Trap: both sums of bytes are kept running. Whatever enters or leaves a list changes them in the same method, and in no
//! other.

use std::collections::VecDeque;

use proto::Command;
use proto::link::UpFrame;

/// Which lane of its stream a frame takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LaneKind {
    /// Of connections that are logged in. Always first.
    Live,
    /// Logins.
    Logins,
}

impl LaneKind {
    /// Where this frame goes if nothing else of its connection is pending.
    pub fn of(frame: &UpFrame) -> LaneKind {
        if frame.command == Command::Login as u32 { LaneKind::Logins } else { LaneKind::Live }
    }
}

/// A batch that is out.
pub struct Sent {
    /// Its number.
    pub number: u64,
    /// When it left.
    pub sent_ms: u64,
    /// Others had to stay behind, so it was as large as it may be.
    pub full: bool,
    /// Kept in case the stream breaks.
    pub frames: Vec<UpFrame>,
    bytes: usize,
}

/// One lane.
#[derive(Default)]
pub struct Lane {
    queue: VecDeque<UpFrame>,
    unacked: VecDeque<Sent>,
    queued_bytes: usize,
    out_bytes: usize,
    out_frames: usize,
    progress_ms: u64,
}

/// What a batch may hold.
#[derive(Debug, Clone, Copy)]
pub struct Room {
    /// Frames.
    pub frames: usize,
    /// Bytes, as [`held_bytes`] counts them.
    pub bytes: usize,
}

/// Frames that the queue keeps room for whatever there is.
const ROOM_KEPT: usize = 64;

/// Fixed cost that a queued frame is counted with beside its body.
const FRAME_OVERHEAD_BYTES: usize = 64;

/// What a frame is counted with while it is kept.
pub fn held_bytes(frame: &UpFrame) -> usize {
    frame.body.len() + FRAME_OVERHEAD_BYTES
}

impl Lane {
    /// Whether an acknowledgement is due, or would be if the frames that wait could leave.
    pub fn is_due(&self) -> bool {
        !self.unacked.is_empty() || !self.queue.is_empty()
    }

    /// Gives memory back that a storm or a mass departure needed.
    pub fn rest(&mut self) {
        if self.queue.capacity() > ROOM_KEPT && self.queue.capacity() / 8 > self.queue.len() {
            self.queue.shrink_to(ROOM_KEPT.max(2 * self.queue.len()));
        }
    }

    /// Due, and without progress for longer than that.
    pub fn is_stalled(&self, now_ms: u64, stalled_ms_max: u64) -> bool {
        self.is_due() && now_ms > self.progress_ms + stalled_ms_max
    }

    /// Frames that have not left.
    pub fn waiting(&self) -> usize {
        self.queue.len()
    }

    /// Bytes of those, as [`held_bytes`] counts them.
    pub fn waiting_bytes(&self) -> usize {
        self.queued_bytes
    }

    /// Frames that wait or are not acknowledged.
    pub fn pending(&self) -> usize {
        self.queue.len() + self.out_frames
    }

    /// Bytes of the same.
    pub fn held_bytes(&self) -> usize {
        self.queued_bytes + self.out_bytes
    }

    /// Bytes of frames that are out.
    pub fn out_bytes(&self) -> usize {
        self.out_bytes
    }

    /// Batches that are out.
    pub fn batches_out(&self) -> usize {
        self.unacked.len()
    }

    /// One more waits. Returns whether it is the only one.
    pub fn push(&mut self, frame: UpFrame, now_ms: u64) -> bool {
        let first = !self.is_due();
        if first {
            // Nothing was asked of the server until now, so nothing could progress.
            self.progress_ms = now_ms;
        }
        self.queued_bytes += held_bytes(&frame);
        self.queue.push_back(frame);
        first
    }

    /// Whoever slept judges nobody by that time.
    pub fn forgive(&mut self, now_ms: u64) {
        self.progress_ms = now_ms;
    }

    /// How many frames the next batch takes; 0: none that fit.
    pub fn fitting(&self, room: Room) -> usize {
        let mut bytes = 0;
        let fitting = self.queue.iter().take(room.frames).take_while(|frame| {
            bytes += held_bytes(frame);
            bytes <= room.bytes
        });
        match fitting.count() {
            // The first of an empty window always fits, or a small credit would stop everything.
            0 if self.unacked.is_empty() => self.queue.len().min(1),
            count => count,
        }
    }

    /// Whether a batch of so many frames may be out beside those that are, in the lane of logins. A state server knows a batch of
    /// logins by the Logins in it, and carries out all others beside them: so one with only what followed a Login is out
    /// alone, or it might overtake.
    pub fn may_leave_with_logins(&self, count: usize) -> bool {
        let is_login = |frame: &UpFrame| LaneKind::of(frame) == LaneKind::Logins;
        let is_of_logins = |sent: &Sent| sent.frames.iter().any(is_login);
        self.unacked
            .back()
            .is_none_or(|last| is_of_logins(last) && self.queue.iter().take(count).any(is_login))
    }

    /// Takes the frames of the next batch, and keeps them under this number. `None`: that is none.
    pub fn leave(&mut self, number: u64, count: usize, now_ms: u64) -> Option<Vec<UpFrame>> {
        if count == 0 {
            return None;
        }
        let frames: Vec<UpFrame> = self.queue.drain(..count).collect();
        let bytes = frames.iter().map(held_bytes).sum();
        self.queued_bytes -= bytes;
        self.out_bytes += bytes;
        self.out_frames += count;
        let full = !self.queue.is_empty();
        self.unacked.push_back(Sent { number, sent_ms: now_ms, full, frames: frames.clone(), bytes });
        Some(frames)
    }

    /// The oldest batch that is out, if its number fits; it is acknowledged then.
    pub fn acked(&mut self, fits: impl Fn(u64) -> bool, now_ms: u64) -> Option<Sent> {
        let sent = self.unacked.pop_front_if(|sent| fits(sent.number))?;
        self.out_bytes -= sent.bytes;
        self.out_frames -= sent.frames.len();
        self.progress_ms = now_ms;
        Some(sent)
    }

    /// Numbers of the batches that are out.
    #[cfg(test)]
    pub fn numbers_out(&self) -> impl Iterator<Item = u64> {
        self.unacked.iter().map(|sent| sent.number)
    }

    /// Everything that is not acknowledged.
    #[cfg(test)]
    pub fn frames(&self) -> impl Iterator<Item = &UpFrame> {
        self.unacked.iter().flat_map(|sent| &sent.frames).chain(&self.queue)
    }

    /// Everything that is not acknowledged, in the order in which it came.
    pub fn into_frames(self) -> impl Iterator<Item = UpFrame> {
        self.unacked.into_iter().flat_map(|sent| sent.frames).chain(self.queue)
    }
}
