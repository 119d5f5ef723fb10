//! What the keys of the configuration must be, each and beside each other. Pure.
//!
//! Trap: whoever reads a message sees no code, so it names the keys and the values that they may have.

use super::Config;
use crate::link::LOGIN_BYTES_PART;

impl Config {
    /// The first thing that is wrong.
    pub(super) fn check_limits(&self) -> Result<(), String> {
        let limits = &self.limits;
        let wrong = [
            (limits.connections_max == 0, "limits.connections_max must be at least 1"),
            (
                !self.listen.ipconf_url.is_empty() && !is_http_url(&self.listen.ipconf_url),
                "listen.ipconf_url must begin with http:// or https:// and be at most 256 bytes long, without spaces",
            ),
            (limits.frame_bytes_max > proto::FRAME_BYTES_MAX, "limits.frame_bytes_max must be at most 65536"),
            (limits.frame_bytes_max < 4096, "limits.frame_bytes_max must be at least 4096"),
            (
                !(256..=limits.frame_bytes_max).contains(&limits.login_frame_bytes_max),
                "limits.login_frame_bytes_max must be between 256 and limits.frame_bytes_max",
            ),
            (
                limits.queue_bytes_soft < limits.frame_bytes_max
                    || limits.queue_bytes_hard < 2 * limits.queue_bytes_soft,
                "limits.queue_bytes_soft must be at least limits.frame_bytes_max, and queue_bytes_hard twice the soft one",
            ),
            (
                !(4_000..=250_000).contains(&limits.idle_ms_max),
                "limits.idle_ms_max must be between 4000 and 250000: idle time is counted in seconds, in one byte",
            ),
            (
                u64::from(limits.heartbeat_ms) * 2 > limits.idle_ms_max,
                "limits.heartbeat_ms must be at most half of limits.idle_ms_max",
            ),
            (
                !(limits.unacknowledged_ms_max == 0
                    || (1_000..=3_600_000).contains(&limits.unacknowledged_ms_max)),
                "limits.unacknowledged_ms_max must be 0, or between 1000 and 3600000",
            ),
            (
                self.burst().clients_bytes_max < 16 * limits.queue_bytes_hard,
                "limits.burst_bytes_max is too small: three quarters of it, less link.queue_bytes_max, must be at least 16 times \
                 limits.queue_bytes_hard, because one client may hold a sixteenth of what is free",
            ),
            (
                self.workers.read_bytes_per_turn_max < 2 * limits.frame_bytes_max
                    || 4 * self.workers.read_bytes_per_turn_max > self.burst().batches_bytes_max,
                "workers.read_bytes_per_turn_max must be between twice limits.frame_bytes_max and a sixteenth of \
                 limits.burst_bytes_max",
            ),
            (
                2 * self.link.late_bytes_max > self.burst().batches_bytes_max,
                "link.late_bytes_max must be at most an eighth of limits.burst_bytes_max",
            ),
            (
                self.workers.events_per_turn_max == 0
                    || self.workers.accepts_per_turn_max == 0
                    || self.workers.writes_per_turn_max == 0
                    || self.workers.down_batches_max == 0
                    || self.workers.up_batches_max == 0
                    || self.link.batch_frames_max == 0
                    || self.link.batches_in_flight_max == 0
                    || self.link.login_batch_frames_max == 0
                    || self.link.login_batches_in_flight_max == 0
                    || self.link.logins_waiting_max == 0
                    || self.link.connection_frames_max == 0,
                "the *_max of workers and link must be at least 1",
            ),
            (self.link.batch_beside_frames_min == 0, "link.batch_beside_frames_min must be at least 1"),
            (
                limits.stalled_ms_max == 0 || self.link.stalled_ms_max == 0,
                "limits.stalled_ms_max and link.stalled_ms_max must be at least 1",
            ),
            (
                self.shutdown.drain_ms > DRAIN_MS_MAX || self.shutdown.hard_ms > DRAIN_MS_MAX,
                "shutdown.drain_ms and shutdown.hard_ms must be at most 86400000, a day",
            ),
            (
                self.workers.up_batches_max > BATCHES_MAX || self.workers.down_batches_max > BATCHES_MAX,
                "workers.up_batches_max and workers.down_batches_max must be at most 1048576",
            ),
            (limits.resyncs_per_s == 0, "limits.resyncs_per_s must be at least 1"),
            (self.workers.rush_ms > 1_000, "workers.rush_ms must be at most 1000"),
            (
                self.link.queue_bytes_max / LOGIN_BYTES_PART < 2 * limits.frame_bytes_max,
                "link.queue_bytes_max must be at least eight times limits.frame_bytes_max, or a long Login never finds room",
            ),
            (self.link.reconnect_ms_max == 0, "link.reconnect_ms_max must be at least 1"),
            (
                self.listen.client.ip().is_unspecified() && self.listen.advertise.is_empty(),
                "listen.advertise must be set where listen.client is all addresses of the machine: it is what clients are told",
            ),
            (
                self.link.login_retry_ms_max < u64::from(self.link.retry_after_ms)
                    || self.link.login_retry_ms_max > 3_600_000,
                "link.login_retry_ms_max must be between link.retry_after_ms and 3600000",
            ),
            (
                self.link.ping_ms == 0 || self.link.ping_ms > self.link.dead_ms / 4,
                "link.ping_ms must be between 1 and a quarter of link.dead_ms",
            ),
        ];
        match wrong.into_iter().find(|(is_wrong, _)| *is_wrong) {
            Some((_, what)) => Err(what.to_owned()),
            None => Ok(()),
        }
    }
}

/// Longest that clients are asked to leave within.
const DRAIN_MS_MAX: u64 = 86_400_000;

/// Room for these is taken at the start.
const BATCHES_MAX: usize = 1 << 20;

/// Enough to tell an address from a typing error; it is sent to every client that is refused.
fn is_http_url(url: &str) -> bool {
    let host = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"));
    host.is_some_and(|host| !host.is_empty())
        && url.len() <= 256
        && url.bytes().all(|byte| byte.is_ascii_graphic())
}
