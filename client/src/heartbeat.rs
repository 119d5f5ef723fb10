//! When to ping, and when a connection is dead. Pure, owned by the session.
//!
//! Trap: sending alone proves nothing. A ping goes out when we were silent or when the server was.

use std::time::{Duration, Instant};

/// What is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Beat {
    /// Nothing.
    Quiet,
    /// Send a Ping.
    Ping,
    /// The server has not answered: give the connection up.
    Dead,
}

#[derive(Debug)]
pub(crate) struct Heartbeat {
    every: Duration,
    sent_at: Instant,
    received_at: Instant,
    pinged_at: Instant,
    unanswered: u32,
}

impl Heartbeat {
    /// `heartbeat_ms` as LoginAck says; 0 when it does not.
    pub fn new(heartbeat_ms: u32, now: Instant) -> Self {
        let told = if heartbeat_ms == 0 { HEARTBEAT_MS_DEFAULT } else { heartbeat_ms };
        // Ahead of the server's deadline by a quarter.
        let every = Duration::from_millis(u64::from(told) * 3 / 4).max(Duration::from_millis(1));
        Heartbeat { every, sent_at: now, received_at: now, pinged_at: now, unanswered: 0 }
    }

    pub fn sent(&mut self, now: Instant) {
        self.sent_at = now;
    }

    pub fn received(&mut self, now: Instant) {
        self.received_at = now;
        self.unanswered = 0;
    }

    pub fn deadline(&self) -> Instant {
        self.sent_at.min(self.received_at).max(self.pinged_at) + self.every
    }

    pub fn tick(&mut self, now: Instant) -> Beat {
        if now < self.deadline() {
            return Beat::Quiet;
        }
        if self.unanswered >= PONGS_MISSED_MAX {
            return Beat::Dead;
        }
        self.unanswered += 1;
        (self.pinged_at, self.sent_at) = (now, now);
        Beat::Ping
    }
}

const HEARTBEAT_MS_DEFAULT: u32 = 30_000;
const PONGS_MISSED_MAX: u32 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_on_either_side_pings_and_two_missed_pongs_are_death() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut heartbeat = Heartbeat::new(1_000, start);
        heartbeat.sent(at(700));
        assert_eq!(heartbeat.tick(at(749)), Beat::Quiet);
        assert_eq!(heartbeat.tick(at(750)), Beat::Ping, "the server was silent");
        assert_eq!(heartbeat.tick(at(800)), Beat::Quiet);
        heartbeat.received(at(900));
        assert_eq!(heartbeat.tick(at(1_500)), Beat::Ping);
        assert_eq!(heartbeat.tick(at(2_250)), Beat::Ping);
        assert_eq!(heartbeat.tick(at(2_999)), Beat::Quiet);
        assert_eq!(heartbeat.tick(at(3_000)), Beat::Dead);
    }
}
