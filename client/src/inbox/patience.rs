//! How long the inbox waits for answers. Pure, owned by the inbox, anew for each connection.
//!
//! Trap: an answer of 64 KiB takes its time on a slow link, the more so behind others. Whoever asks again too early gets
//! everything twice and is later still; whoever never does waits for ever for an answer that was lost.

use std::time::{Duration, Instant};

#[derive(Debug)]
pub(super) struct Patience {
    least_ms: u64,
    /// Doubles with each answer that came although it had been given up.
    ms: u64,
    /// When the last frame came.
    heard_at: Option<Instant>,
}

impl Patience {
    pub fn new(answer_ms_max: u64) -> Self {
        Patience { least_ms: answer_ms_max, ms: answer_ms_max, heard_at: None }
    }

    /// A frame has come, so that the connection works and others may stand behind it.
    pub fn heard(&mut self, now: Instant) {
        self.heard_at = Some(now);
    }

    /// An answer came to what had been asked again already.
    pub fn was_too_short(&mut self) {
        self.ms = (self.ms * 2).min(self.least_ms * TIMES_MAX);
    }

    /// When the answer to a question of now is due.
    pub fn from(&self, now: Instant) -> Instant {
        now + Duration::from_millis(self.ms)
    }

    /// When an answer that was due at `due` is given up: not while frames come, within reason.
    pub fn ends(&self, due: Instant) -> Instant {
        let longest = due + Duration::from_millis(self.least_ms * TIMES_MAX);
        self.heard_at.map_or(due, |at| self.from(at).clamp(due, longest))
    }
}

/// So many times the least, then an answer is taken for lost whatever else comes.
const TIMES_MAX: u64 = 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_lasts_while_frames_come_but_not_for_ever_and_grows_with_late_answers() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut patience = Patience::new(1_000);
        let due = patience.from(start);
        assert_eq!(patience.ends(due), at(1_000));
        patience.heard(start);
        assert_eq!(patience.ends(due), at(1_000));
        patience.heard(at(900));
        assert_eq!(patience.ends(due), at(1_900));
        patience.heard(at(60_000));
        assert_eq!(patience.ends(due), at(9_000));
        patience.was_too_short();
        assert_eq!(patience.from(start), at(2_000));
        (0..10).for_each(|_| patience.was_too_short());
        assert_eq!(patience.from(start), at(8_000));
    }
}
