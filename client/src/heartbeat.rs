//! When to ping, and when a connection is dead. Pure, owned by the session.
//!
//! Trap: sending alone proves nothing. A ping goes out when we were silent or when the server was. And a look at the clock
//! that comes late proves nothing either: a process that stood still has not read what the server said meanwhile. While the
//! machine sleeps `Instant` stands still with it, so that only the wall clock tells of that.

use std::time::{Duration, Instant, SystemTime};

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
    /// How long the last ping may stay without an answer.
    patience: Duration,
    sent_at: Instant,
    received_at: Instant,
    pinged_at: Instant,
    unanswered: u32,
    /// Both clocks at the last look.
    looked: (Instant, SystemTime),
}

impl Heartbeat {
    /// `heartbeat_ms` as LoginAck says; 0 when it does not.
    pub fn new(heartbeat_ms: u32, now: Instant, wall: SystemTime) -> Self {
        let told = if heartbeat_ms == 0 { HEARTBEAT_MS_DEFAULT } else { heartbeat_ms };
        // Ahead of the server's deadline by a quarter.
        let every = Duration::from_millis(u64::from(told) * 3 / 4).max(Duration::from_millis(1));
        let looked = (now, wall);
        Heartbeat {
            every,
            patience: every,
            sent_at: now,
            received_at: now,
            pinged_at: now,
            unanswered: 0,
            looked,
        }
    }

    pub fn sent(&mut self, now: Instant) {
        self.sent_at = now;
    }

    pub fn received(&mut self, now: Instant) {
        self.received_at = now;
        (self.unanswered, self.patience) = (0, self.every);
    }

    /// When to look at the clocks next.
    pub fn deadline(&self) -> Instant {
        self.due().min(self.looked.0 + LOOK_EVERY)
    }

    pub fn tick(&mut self, now: Instant, wall: SystemTime) -> Beat {
        let due = self.due();
        let slept = self.slept(now, wall);
        if now < due && !slept {
            return Beat::Quiet;
        }
        if slept || now - due >= STOOD_STILL_MIN {
            // Nothing so far counts, and one ping finds out soon whether the connection outlived the pause.
            self.unanswered = PONGS_MISSED_MAX;
            self.patience = self.every.min(PATIENCE_AFTER_PAUSE);
        } else if self.unanswered >= PONGS_MISSED_MAX {
            return Beat::Dead;
        } else {
            self.unanswered += 1;
        }
        (self.pinged_at, self.sent_at) = (now, now);
        Beat::Ping
    }

    fn due(&self) -> Instant {
        self.sent_at.min(self.received_at).max(self.pinged_at) + self.patience
    }

    /// The wall clock went on without the other one. Somebody who set it costs one ping.
    fn slept(&mut self, now: Instant, wall: SystemTime) -> bool {
        let (looked, wall_looked) = std::mem::replace(&mut self.looked, (now, wall));
        let passed = now.saturating_duration_since(looked);
        wall.duration_since(wall_looked).is_ok_and(|wall| wall >= passed + STOOD_STILL_MIN)
    }
}

const HEARTBEAT_MS_DEFAULT: u32 = 30_000;
const PONGS_MISSED_MAX: u32 = 2;
/// A tick that comes so late means that this process was stopped or starved.
const STOOD_STILL_MIN: Duration = Duration::from_secs(2);
const PATIENCE_AFTER_PAUSE: Duration = Duration::from_secs(5);
/// How soon a machine that slept notices.
const LOOK_EVERY: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_on_either_side_pings_and_two_missed_pongs_are_death() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let wall = SystemTime::UNIX_EPOCH;
        let tick = |heartbeat: &mut Heartbeat, ms| heartbeat.tick(at(ms), wall + Duration::from_millis(ms));
        let mut heartbeat = Heartbeat::new(1_000, start, wall);
        heartbeat.sent(at(700));
        assert_eq!(tick(&mut heartbeat, 749), Beat::Quiet);
        assert_eq!(tick(&mut heartbeat, 750), Beat::Ping, "the server was silent");
        assert_eq!(tick(&mut heartbeat, 800), Beat::Quiet);
        heartbeat.received(at(900));
        assert_eq!(tick(&mut heartbeat, 1_500), Beat::Ping);
        assert_eq!(tick(&mut heartbeat, 2_250), Beat::Ping);
        assert_eq!(tick(&mut heartbeat, 2_999), Beat::Quiet);
        assert_eq!(tick(&mut heartbeat, 3_000), Beat::Dead);
    }

    #[test]
    fn a_pause_of_the_process_is_not_held_against_the_server_but_looked_into_at_once() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let wall = SystemTime::UNIX_EPOCH;
        let tick = |heartbeat: &mut Heartbeat, ms| heartbeat.tick(at(ms), wall + Duration::from_millis(ms));
        let mut heartbeat = Heartbeat::new(40_000, start, wall);
        assert_eq!(tick(&mut heartbeat, 30_000), Beat::Ping);
        assert_eq!(tick(&mut heartbeat, 60_000), Beat::Ping);
        // Stopped before the pong was read; one tick later it would have been dead.
        assert_eq!(tick(&mut heartbeat, 120_000), Beat::Ping);
        assert_eq!(tick(&mut heartbeat, 124_999), Beat::Quiet);
        let mut alive = Heartbeat { ..heartbeat };
        alive.received(at(121_000));
        assert_eq!(tick(&mut alive, 125_000), Beat::Quiet, "the connection is as good as before");
        assert_eq!(alive.due(), at(150_000));
        assert_eq!(tick(&mut heartbeat, 125_000), Beat::Dead, "five seconds, not two heartbeats");
    }

    #[test]
    fn a_sleep_of_the_machine_is_noticed_within_seconds_though_one_clock_stood_still() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let wall = |ms: u64| SystemTime::UNIX_EPOCH + Duration::from_millis(ms);
        let mut heartbeat = Heartbeat::new(40_000, start, wall(0));
        assert_eq!(heartbeat.deadline(), at(5_000));
        assert_eq!(heartbeat.tick(at(5_000), wall(6_999)), Beat::Quiet);
        let hour = 3_600_000;
        assert_eq!(heartbeat.tick(at(10_000), wall(hour)), Beat::Ping);
        assert_eq!(heartbeat.tick(at(14_999), wall(hour + 4_999)), Beat::Quiet);
        let mut alive = Heartbeat { ..heartbeat };
        alive.received(at(14_999));
        assert_eq!(alive.tick(at(15_000), wall(hour + 5_000)), Beat::Quiet);
        assert_eq!(heartbeat.tick(at(15_000), wall(hour + 5_000)), Beat::Dead);
        // A wall clock that is set back says nothing.
        assert_eq!(alive.tick(at(20_000), wall(0)), Beat::Quiet);
    }
}
