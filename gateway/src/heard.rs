//! Up to when each state server's pushes have surely come: what a new stream asks to be pushed again. Pure (takes
//! milliseconds of the bridge's clock); owned by the bridge, which remembers it as long as this gateway lives.
//!
//! A message that was read tells nothing about those that were still on their way when the stream broke, and it may have waited
//! long: a pong does, because it says when it was asked for. What the state server had queued until then came before it, or
//! with what it was sent together with; so the pong before the last one is believed, which is a quarter of a second older.
//!
//! Trap: the pushes that a new stream asked for take a while, and nothing says when they are all there. Until
//! [`SETTLE_MS`] have passed a break counts from where the stream before had come.

use std::collections::HashMap;

/// How long a stream must have lived before what it asked for counts as delivered.
const SETTLE_MS: u64 = 10_000;

/// State servers that are remembered; far more than there ever are at once.
const STATES_MAX: usize = 1_024;

/// All state servers that this life of the gateway had a stream to.
#[derive(Debug, Default)]
pub struct Heard {
    sure_ms: HashMap<String, u64>,
}

/// What one stream has said so far.
#[derive(Debug)]
pub struct Hearing {
    believed_from_ms: u64,
    asked_ms: Option<u64>,
}

impl Heard {
    /// For the hello of a new stream: pushes from so many ms before `now_ms` on may be missing; 0: there was no stream.
    pub fn replay_ms(&self, state_id: &str, now_ms: u64) -> u64 {
        self.sure_ms.get(state_id).map_or(0, |sure_ms| now_ms.saturating_sub(*sure_ms).max(1))
    }

    /// A stream whose hello left at `asked_ms` is open.
    pub fn opened(&mut self, state_id: &str, asked_ms: u64) -> Hearing {
        if !self.sure_ms.contains_key(state_id) {
            self.make_room();
            self.sure_ms.insert(state_id.to_owned(), asked_ms);
        }
        Hearing { believed_from_ms: asked_ms + SETTLE_MS, asked_ms: None }
    }

    /// On a stream to this state server came the answer to what was asked at `asked_ms`.
    pub fn pong(&mut self, state_id: &str, hearing: &mut Hearing, asked_ms: u64) {
        let before = hearing.asked_ms.replace(asked_ms);
        if let Some(before) = before.filter(|before| *before >= hearing.believed_from_ms)
            && let Some(sure_ms) = self.sure_ms.get_mut(state_id)
        {
            *sure_ms = before.max(*sure_ms);
        }
    }

    /// Forgets the one of whom nothing was heard for longest.
    fn make_room(&mut self) {
        if self.sure_ms.len() >= STATES_MAX
            && let Some(oldest) = self.sure_ms.iter().min_by_key(|(_, ms)| **ms).map(|(id, _)| id.clone())
        {
            self.sure_ms.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pong_before_the_last_is_believed() {
        let mut heard = Heard::default();
        assert_eq!(heard.replay_ms("s-1", 5), 0);
        let mut hearing = heard.opened("s-1", 1_000);
        assert_eq!(heard.replay_ms("s-1", 1_000), 1, "0 would say that there was no stream");
        for asked_ms in (1_250..=60_000).step_by(250) {
            heard.pong("s-1", &mut hearing, asked_ms);
        }
        assert_eq!(heard.replay_ms("s-1", 61_000), 61_000 - 59_750);
        assert_eq!(heard.replay_ms("s-2", 61_000), 0);
    }

    #[test]
    fn what_a_short_stream_asked_for_is_asked_for_again() {
        let mut heard = Heard::default();
        let mut hearing = heard.opened("s-1", 0);
        for asked_ms in (250..=30_000).step_by(250) {
            heard.pong("s-1", &mut hearing, asked_ms);
        }
        // It flaps: each life is too short to bring everything.
        for opened_ms in [32_000, 36_000, 44_000] {
            let mut hearing = heard.opened("s-1", opened_ms);
            heard.pong("s-1", &mut hearing, opened_ms + 1_000);
            heard.pong("s-1", &mut hearing, opened_ms + 2_000);
            assert_eq!(heard.replay_ms("s-1", opened_ms + 3_000), opened_ms + 3_000 - 29_750);
        }
    }

    #[test]
    fn a_late_answer_of_an_older_stream_takes_nothing_back() {
        let mut heard = Heard::default();
        let mut old = heard.opened("s-1", 0);
        let mut new = heard.opened("s-1", 20_000);
        for asked_ms in [30_000, 40_000, 41_000] {
            heard.pong("s-1", &mut new, asked_ms);
        }
        heard.pong("s-1", &mut old, 15_000);
        heard.pong("s-1", &mut old, 15_250);
        assert_eq!(heard.replay_ms("s-1", 50_000), 10_000);
    }

    #[test]
    fn the_table_is_bounded() {
        let mut heard = Heard::default();
        for number in 0..STATES_MAX as u64 + 10 {
            heard.opened(&format!("s-{number}"), number);
        }
        assert_eq!(heard.sure_ms.len(), STATES_MAX);
        assert_eq!(heard.replay_ms("s-0", 2_000), 0);
        assert!(heard.replay_ms(&format!("s-{}", STATES_MAX + 9), 2_000) > 0);
    }
}
