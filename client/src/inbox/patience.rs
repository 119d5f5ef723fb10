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
    /// When the last answer came.
    answered_at: Option<Instant>,
    /// When the last push came.
    pushed_at: Option<Instant>,
}

impl Patience {
    pub fn new(answer_ms_max: u64) -> Self {
        Patience { least_ms: answer_ms_max, ms: answer_ms_max, answered_at: None, pushed_at: None }
    }

    /// An answer has come, so that the link works and others may stand behind it.
    pub fn answered(&mut self, now: Instant) {
        self.answered_at = Some(now);
    }

    /// A push has come. Answers may stand behind it, but pushes come as well when an answer was lost.
    pub fn pushed(&mut self, now: Instant) {
        self.pushed_at = Some(now);
    }

    /// An answer came to what had been asked again already.
    pub fn was_too_short(&mut self) {
        self.ms = (self.ms * 2).min(self.least_ms * TIMES_MAX);
    }

    /// When the answer to a question of now is due.
    pub fn from(&self, now: Instant) -> Instant {
        now + Duration::from_millis(self.ms)
    }

    /// When an answer that was due at `due` is given up: not while others come, within reason, nor in the midst of pushes,
    /// but those make it twice the time at most.
    pub fn ends(&self, due: Instant) -> Instant {
        let longest = due + Duration::from_millis(self.least_ms * TIMES_MAX);
        let by_answers = self.answered_at.map_or(due, |at| self.from(at).clamp(due, longest));
        let silence = Duration::from_millis(self.ms / PUSHES_APART);
        let by_pushes = self.pushed_at.map_or(due, |at| (at + silence).clamp(due, self.from(due)));
        by_answers.max(by_pushes)
    }
}

/// So many times the least, then an answer is taken for lost whatever else comes.
const TIMES_MAX: u64 = 8;
/// Of the time for an answer: pushes that are further apart have nothing in front of them.
const PUSHES_APART: u64 = 5;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_lasts_while_answers_come_but_not_for_ever_and_grows_with_late_answers() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut patience = Patience::new(1_000);
        let due = patience.from(start);
        assert_eq!(patience.ends(due), at(1_000));
        patience.answered(start);
        assert_eq!(patience.ends(due), at(1_000));
        patience.answered(at(900));
        assert_eq!(patience.ends(due), at(1_900));
        patience.answered(at(60_000));
        assert_eq!(patience.ends(due), at(9_000));
        patience.was_too_short();
        assert_eq!(patience.from(start), at(2_000));
        (0..10).for_each(|_| patience.was_too_short());
        assert_eq!(patience.from(start), at(8_000));
    }
    #[test]
    fn pushes_make_it_longer_while_they_are_close_and_at_most_twice_as_long() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut patience = Patience::new(1_000);
        let due = patience.from(start);
        patience.pushed(at(700));
        assert_eq!(patience.ends(due), at(1_000));
        patience.pushed(at(900));
        assert_eq!(patience.ends(due), at(1_100));
        patience.pushed(at(1_900));
        assert_eq!(patience.ends(due), at(2_000));
        patience.answered(at(1_500));
        assert_eq!(patience.ends(due), at(2_500));
        patience.was_too_short();
        assert_eq!(patience.ends(due), at(3_500));
    }
}
