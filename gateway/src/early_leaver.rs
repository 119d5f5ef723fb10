//! Whose logins went on without them: who guesses tokens does not wait for the answer, and is counted all the same. On the worker's
//! thread.
//!
//! Trap: this forgets the oldest. What is counted in the end is a limit of guesses, not their number.

use std::collections::VecDeque;

/// The last ones that left before their logins were answered: the login's number, and the slot of their address.
#[derive(Debug, Default)]
pub struct EarlyLeavers {
    left: VecDeque<(u64, u16)>,
    last_ms: u64,
}

/// As many as may wait for one state server before others are told to come again, about.
const LEFT_MAX: usize = 4_096;

/// No login waits for longer (`link.login_wait_ms_max`, and what a state server takes for it).
const ANSWERED_MS_MAX: u64 = 10_000;

impl EarlyLeavers {
    /// One has left.
    pub fn note(&mut self, login: u64, address: u16, now_ms: u64) {
        self.last_ms = now_ms;
        if login == 0 {
            return;
        }
        if self.left.len() == LEFT_MAX {
            self.left.pop_front();
        }
        self.left.push_back((login, address));
    }

    /// The answer to such a login is here: the slot of its address, once.
    pub fn take(&mut self, login: u64) -> Option<u16> {
        let at = self.left.iter().position(|(left, _)| *left == login)?;
        self.left.remove(at).map(|(_, address)| address)
    }

    /// Gives memory back that a storm has left behind, once whatever was on its way then has been answered.
    pub fn shrink(&mut self, now_ms: u64) {
        if now_ms > self.last_ms + ANSWERED_MS_MAX {
            self.left = VecDeque::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_ones_are_known_once() {
        let mut left = EarlyLeavers::default();
        left.note(0, 9, 0);
        (1..=LEFT_MAX as u64 + 1).for_each(|login| left.note(login, (login % 7) as u16, 5));
        assert_eq!((left.take(0), left.take(1)), (None, None));
        assert_eq!((left.take(2), left.take(2)), (Some(2), None));
        left.shrink(ANSWERED_MS_MAX + 5);
        assert_eq!(left.take(3), Some(3));
        left.shrink(ANSWERED_MS_MAX + 6);
        assert_eq!(left.take(4), None);
    }
}
