//! How long to wait before what was refused for now is asked again: longer with each round in a row. Pure.
//!
//! Trap: one round has many refusals, of each message in the window or each Pull under way; they count once.

use std::time::{Duration, Instant};

/// Refusals in a row of one kind of question.
#[derive(Debug, Default)]
pub(crate) struct Retry {
    rounds: u32,
    until: Option<Instant>,
}

impl Retry {
    /// Refused, and not to be asked again for `least`: when to.
    pub fn refused(&mut self, least: Duration, now: Instant) -> Instant {
        if self.until.is_none_or(|until| now >= until) {
            self.rounds = self.rounds.saturating_add(1);
        }
        let longer = (least * (1 << (self.rounds - 1).min(DOUBLINGS_MAX))).min(LONGER_MAX);
        let at = now + longer.max(least);
        self.until = self.until.max(Some(at));
        at
    }

    /// Answered: the next refusal is the first one.
    pub fn answered(&mut self) {
        *self = Retry::default();
    }
}

/// Servers ask for 250 ms by default.
const DOUBLINGS_MAX: u32 = 2;
/// A store that is back is to be noticed soon, so no longer than that unless the server wants it.
const LONGER_MAX: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_grow_to_a_bound_and_begin_anew_behind_an_answer() {
        let (start, least) = (Instant::now(), Duration::from_millis(250));
        let mut retry = Retry::default();
        let mut now = start;
        for wait_ms in [250, 500, 1_000, 1_000] {
            let at = retry.refused(least, now);
            assert_eq!(at - now, Duration::from_millis(wait_ms));
            assert_eq!(retry.refused(least, now), at, "of the same round");
            now = at;
        }
        retry.answered();
        assert_eq!(retry.refused(least, now) - now, least);
        let asked = Duration::from_secs(60);
        let mut retry = Retry::default();
        for _ in 0..3 {
            assert_eq!(retry.refused(asked, now) - now, asked);
            now += asked;
        }
    }
}
