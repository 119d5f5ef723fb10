//! What happened since the last look: counters and histograms that engine threads send to the main thread, which adds
//! them up. Plain data.
//!
//! Trap: a `Sample` is a difference. Only sums of all samples of a run mean anything.

use std::collections::BTreeMap;

use hdrhistogram::Histogram;

/// Counts and times. Times are microseconds.
#[derive(Debug, Clone)]
pub struct Sample {
    /// Connections begun, retries included.
    pub begun: u64,
    /// TCP handshakes done.
    pub made: u64,
    /// Connections that became ready (logged in), again after a break too.
    pub ready: u64,
    /// Failed for good before they were ready.
    pub failed: u64,
    /// Broke after they were ready.
    pub dropped: u64,
    /// Attempts that failed and are tried again.
    pub retried: u64,
    /// When the last one became ready (run time).
    pub last_ready_us: u64,
    /// Begin to handshake done.
    pub connect: Histogram<u64>,
    /// Begin (scheduled, if there is a rate) to ready.
    pub login: Histogram<u64>,
    /// Faults by name.
    pub faults: BTreeMap<String, u64>,
    /// Chat: devices whose first Sync is complete.
    pub synced: u64,
    /// Chat: messages handed to the outbox.
    pub sent: u64,
    /// Chat: messages acknowledged.
    pub acked: u64,
    /// Chat: messages refused, or of unknown fate.
    pub unsure: u64,
    /// Chat: messages shown to an addressed user for the first time.
    pub delivered: u64,
    /// Chat: scheduled send to delivery.
    pub latency: Histogram<u64>,
}

impl Default for Sample {
    fn default() -> Self {
        Sample {
            begun: 0,
            made: 0,
            ready: 0,
            failed: 0,
            dropped: 0,
            retried: 0,
            last_ready_us: 0,
            connect: histogram(2),
            login: histogram(2),
            faults: BTreeMap::new(),
            synced: 0,
            sent: 0,
            acked: 0,
            unsure: 0,
            delivered: 0,
            latency: histogram(3),
        }
    }
}

impl Sample {
    /// Adds another.
    pub fn add(&mut self, other: &Sample) {
        self.begun += other.begun;
        self.made += other.made;
        self.ready += other.ready;
        self.failed += other.failed;
        self.dropped += other.dropped;
        self.retried += other.retried;
        self.last_ready_us = self.last_ready_us.max(other.last_ready_us);
        // Same bounds on both sides, so that adding cannot fail.
        let _ = self.connect.add(&other.connect);
        let _ = self.login.add(&other.login);
        let _ = self.latency.add(&other.latency);
        for (name, count) in &other.faults {
            *self.faults.entry(name.clone()).or_default() += count;
        }
        self.synced += other.synced;
        self.sent += other.sent;
        self.acked += other.acked;
        self.unsure += other.unsure;
        self.delivered += other.delivered;
    }

    /// Counts a fault.
    pub fn fault(&mut self, name: String) {
        *self.faults.entry(name).or_default() += 1;
    }

    /// Whether it says anything.
    pub fn is_empty(&self) -> bool {
        self.begun == 0
            && self.made == 0
            && self.ready == 0
            && self.synced == 0
            && self.sent == 0
            && self.acked == 0
            && self.unsure == 0
            && self.delivered == 0
            && self.faults.is_empty()
    }

    /// Ready now, when this is the sum of all samples.
    pub fn ready_now(&self) -> u64 {
        self.ready - self.dropped
    }

    /// Begun and neither ready nor failed, when this is the sum of all samples.
    pub fn in_flight(&self) -> u64 {
        self.begun.saturating_sub(self.ready + self.failed + self.retried)
    }
}

/// A histogram of microseconds up to ten minutes.
pub fn histogram(digits: u8) -> Histogram<u64> {
    Histogram::new_with_bounds(1, TIME_US_MAX, digits).expect("constant bounds are right")
}

/// A quantile in milliseconds; none when nothing was recorded.
pub fn millis(histogram: &Histogram<u64>, quantile: f64) -> Option<f64> {
    (!histogram.is_empty()).then(|| histogram.value_at_quantile(quantile) as f64 / 1_000.0)
}

const TIME_US_MAX: u64 = 600_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_add_up() {
        let mut one = Sample { begun: 3, ready: 2, ..Sample::default() };
        one.login.saturating_record(1_000);
        one.fault("x".into());
        let mut sum = Sample::default();
        assert!(sum.is_empty() && !one.is_empty());
        sum.add(&one);
        sum.add(&one);
        assert_eq!((sum.begun, sum.in_flight(), sum.faults["x"]), (6, 2, 2));
        assert!((millis(&sum.login, 0.5).unwrap() - 1.0).abs() < 0.02);
        assert_eq!(millis(&sum.connect, 0.5), None);
    }
}
