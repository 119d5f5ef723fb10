//! What happened since the last look: counters and histograms that engine threads send to the main thread, which adds
//! them up. Plain data.
//!
//! Trap: a `Sample` is a difference. Only sums of all samples of a run mean anything.

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::ops::Deref;

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
    /// Cut on purpose while they were ready, to be opened again.
    pub cut: u64,
    /// Threads that have done a cut.
    pub cuts_done: u64,
    /// Begin to handshake done.
    pub connect: Times,
    /// Begin (scheduled, if there is a rate; the first one, if it was told to come back) to ready.
    pub login: Times,
    /// The same from when the attempt was really begun: it hides what the generator and the waiting cost.
    pub login_uncorrected: Times,
    /// Heartbeats sent whose answers are timed.
    pub pings: u64,
    /// Heartbeat from when it was due to its answer.
    pub ping: Times,
    /// The same from when it was really sent.
    pub ping_uncorrected: Times,
    /// How late threads were at what was due.
    pub lag: Times,
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
    pub latency: Times,
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
            cut: 0,
            cuts_done: 0,
            connect: Times::new(2),
            login: Times::new(2),
            login_uncorrected: Times::new(2),
            pings: 0,
            ping: Times::new(2),
            ping_uncorrected: Times::new(2),
            lag: Times::new(2),
            faults: BTreeMap::new(),
            synced: 0,
            sent: 0,
            acked: 0,
            unsure: 0,
            delivered: 0,
            latency: Times::new(3),
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
        self.cut += other.cut;
        self.cuts_done += other.cuts_done;
        self.connect.add(&other.connect);
        self.login.add(&other.login);
        self.login_uncorrected.add(&other.login_uncorrected);
        self.pings += other.pings;
        self.ping.add(&other.ping);
        self.ping_uncorrected.add(&other.ping_uncorrected);
        self.lag.add(&other.lag);
        self.latency.add(&other.latency);
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
            && self.cuts_done == 0
            && self.pings == 0
            && self.ping.is_empty()
            && self.synced == 0
            && self.sent == 0
            && self.acked == 0
            && self.unsure == 0
            && self.delivered == 0
            && self.faults.is_empty()
    }

    /// Ready now, when this is the sum of all samples.
    pub fn ready_now(&self) -> u64 {
        self.ready - self.dropped - self.cut
    }

    /// Begun and neither ready nor failed, when this is the sum of all samples.
    pub fn in_flight(&self) -> u64 {
        self.begun.saturating_sub(self.ready + self.failed + self.retried)
    }
}

/// A histogram of microseconds up to ten minutes that takes no more room than its largest value needs: fifty threads make
/// several of them a few times a second.
#[derive(Debug, Clone)]
pub struct Times(Histogram<u64>);

impl Times {
    /// An empty one.
    pub fn new(digits: u8) -> Times {
        Times(Histogram::new(digits).expect("constant digits are right"))
    }

    /// One more.
    pub fn saturating_record(&mut self, us: u64) {
        // It grows on its own, so that recording cannot fail.
        let _ = self.0.record(us.min(TIME_US_MAX));
    }

    /// Adds another.
    pub fn add(&mut self, other: &Times) {
        if !other.is_empty() {
            let _ = self.0.add(&other.0);
        }
    }

    /// What was recorded since it was a copy of `before`.
    pub fn since(&self, before: &Times) -> Times {
        let mut times = self.clone();
        let _ = times.0.subtract(&before.0);
        times
    }
}

impl Deref for Times {
    type Target = Histogram<u64>;

    fn deref(&self) -> &Histogram<u64> {
        &self.0
    }
}

impl Borrow<Histogram<u64>> for &Times {
    fn borrow(&self) -> &Histogram<u64> {
        &self.0
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
        sum.connect.saturating_record(u64::MAX);
        assert!(millis(&sum.connect, 1.0).unwrap() >= 600_000.0);
    }
}
