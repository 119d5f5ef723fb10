//! Metrics of one process in OpenMetrics text. Registered at start by one thread, then shared; scraping reads atomics.
//!
//! Trap: label values must come from a fixed, small set. Anything that a client can choose (names, addresses) would grow
//! the process without bound.

use std::fmt::Write as _;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets_range};
pub use prometheus_client::registry::{Metric, Registry, Unit};

/// All metrics of a server: its own with the prefix `rookery_NAME`, and those of the process.
#[derive(Debug)]
pub struct Metrics {
    own: Registry,
    process: Registry,
}

impl Metrics {
    /// Empty, but for the metrics of the process. Names get the prefix `rookery_NAME_`.
    pub fn new(name: &str) -> Self {
        let mut process = Registry::with_prefix("process");
        process.register_collector(Box::new(ProcessCollector));
        Self { own: Registry::with_prefix(format!("rookery_{name}")), process }
    }

    /// Adds a metric. Counters get `_total` from the encoder; write no unit into the name but through
    /// [`Metrics::register_with_unit`].
    pub fn register(&mut self, name: &str, help: &str, metric: impl Metric) {
        self.own.register(name, help, metric);
    }

    /// Adds a metric whose name ends in its unit.
    pub fn register_with_unit(&mut self, name: &str, help: &str, unit: Unit, metric: impl Metric) {
        self.own.register_with_unit(name, help, unit, metric);
    }

    /// Adds a latency histogram `NAME_seconds` and returns it.
    pub fn latency(&mut self, name: &str, help: &str) -> Histogram {
        let histogram = latency_histogram();
        self.own.register_with_unit(name, help, Unit::Seconds, histogram.clone());
        histogram
    }

    /// The registry behind, for collectors and sub-registries.
    pub fn registry_mut(&mut self) -> &mut Registry {
        &mut self.own
    }

    /// Everything as OpenMetrics text.
    pub fn encode(&self) -> String {
        let mut out = String::with_capacity(8192);
        let written = text::encode_registry(&mut out, &self.process)
            .and_then(|()| text::encode_registry(&mut out, &self.own))
            .and_then(|()| text::encode_eof(&mut out));
        if written.is_err() {
            // Half an exposition would be read as counters that vanished; none at all is noticed.
            out.clear();
            let _ = writeln!(out, "# EOF");
        }
        out
    }
}

/// The content type of [`Metrics::encode`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// A histogram for seconds: 18 buckets from 50 µs to 10 s, each about twice the last.
pub fn latency_histogram() -> Histogram {
    Histogram::new(exponential_buckets_range(50e-6, 10.0, 18))
}

/// Memory, processor time, threads and descriptors of this process, read at scrape.
#[derive(Debug)]
struct ProcessCollector;

impl Collector for ProcessCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), std::fmt::Error> {
        let mut gauge = |name: &str, help: &str, unit: Option<&Unit>, value: Option<u64>| {
            let Some(value) = value else { return Ok(()) };
            let gauge = ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
            gauge.encode(encoder.encode_descriptor(name, help, unit, gauge.metric_type())?)
        };
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        gauge(
            "resident_memory",
            "Resident memory.",
            Some(&Unit::Bytes),
            status_field(&status, "VmRSS:").map(|kib| kib * 1024),
        )?;
        gauge(
            "heap_in_use",
            "What the allocator has given out and not got back.",
            Some(&Unit::Bytes),
            crate::heap::in_use(),
        )?;
        gauge("threads", "Threads.", None, status_field(&status, "Threads:"))?;
        gauge("open_fds", "Open descriptors of the main thread's table.", None, open_fds())?;
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
        if let Some(seconds) = cpu_seconds(&stat) {
            let counter = ConstCounter::new(seconds);
            let unit = Some(&Unit::Seconds);
            counter.encode(encoder.encode_descriptor(
                "cpu",
                "Processor time, user and system.",
                unit,
                counter.metric_type(),
            )?)?;
        }
        Ok(())
    }
}

fn status_field(status: &str, name: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Threads with private tables are not in it: their owner counts them.
fn open_fds() -> Option<u64> {
    let entries = std::fs::read_dir("/proc/self/fd").ok()?.count() as u64;
    Some(entries.saturating_sub(1)) // the directory that we are reading
}

/// utime and stime are fields 14 and 15; field 2 is the name, which may hold spaces and parentheses.
fn cpu_seconds(stat: &str) -> Option<f64> {
    let (_, behind_name) = stat.rsplit_once(')')?;
    let mut fields = behind_name.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some((user + system) as f64 / USER_HZ)
}

/// Ticks per second in /proc, the same on every Linux that we build for.
const USER_HZ: f64 = 100.0;

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus_client::metrics::counter::Counter;

    #[test]
    fn text_has_prefix_unit_help_and_process() {
        let mut metrics = Metrics::new("test");
        let counter: Counter = Counter::default();
        metrics.register("logins", "Logins answered", counter.clone());
        let latency = metrics.latency("login", "Login to its answer");
        counter.inc();
        latency.observe(0.001);
        let text = metrics.encode();
        for wanted in [
            "rookery_test_logins_total 1",
            "# HELP rookery_test_logins Logins answered.",
            "rookery_test_login_seconds_count 1",
            "process_resident_memory_bytes ",
            "process_cpu_seconds_total ",
            "process_open_fds ",
        ] {
            assert!(text.contains(wanted), "{wanted} missing in\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn cpu_time_survives_odd_names() {
        assert_eq!(cpu_seconds("1 (a ) b) S 0 0 0 0 0 0 0 0 0 0 150 50 0"), Some(2.0));
        assert_eq!(cpu_seconds("nonsense"), None);
    }
}
