//! What the gateway counts. Workers add to plain atomics of their own; a scrape adds them up.
//!
//! Trap: nothing here may cost a worker more than an uncontended atomic add, or a histogram's short lock once a turn.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use proto::wire::Code;

/// One number that a worker adds to.
#[derive(Debug, Default)]
pub struct Cell(AtomicU64);

impl Cell {
    /// Adds.
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// Sets, for what goes up and down.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// Reads.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Counters of one worker, on cache lines of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
#[allow(missing_docs)]
pub struct WorkerStats {
    pub connections: Cell,
    pub bound: Cell,
    pub queues: Cell,
    pub accepted: Cell,
    pub accept_errors: Cell,
    pub frames_in: Cell,
    pub frames_out: Cell,
    pub bytes_in: Cell,
    pub bytes_out: Cell,
    pub pushes_skipped: Cell,
    pub slow_readers: Cell,
    pub resyncs: Cell,
    pub burst_refused: Cell,
    pub burst_closed: Cell,
    pub gone: Cell,
    pub guessing_refused: Cell,
    pub turns: Cell,
    pub up_full: Cell,
    /// Closes by [`CLOSES`].
    pub closes: [Cell; CLOSES.len()],
    /// Turns by the CPU time that they took: bucket n up to [`turn_bound_ns`], the last one above all.
    pub turn_buckets: [Cell; TURN_BUCKETS],
    pub turn_ns: Cell,
}

/// Upper bound of a bucket of turns. That of the eighth is 1 ms, which a turn is to stay below.
fn turn_bound_ns(bucket: usize) -> u64 {
    (1_000_000 << bucket) >> 7
}

const TURN_BUCKETS: usize = 16;

/// Why connections ended, with the label of the counter.
pub const CLOSES: [(Why, &str); 16] = [
    (Why::Peer, "peer_closed"),
    (Why::Socket, "socket_error"),
    (Why::State, "closed_by_state"),
    (Why::Code(Code::FrameTooLarge), "frame_too_large"),
    (Why::Code(Code::UnknownCommand), "unknown_command"),
    (Why::Code(Code::BadBody), "bad_body"),
    (Why::Code(Code::NotLoggedIn), "not_logged_in"),
    (Why::Code(Code::AlreadyLoggedIn), "already_logged_in"),
    (Why::Code(Code::LoginTimeout), "login_timeout"),
    (Why::Code(Code::TooManyConnections), "too_many_connections"),
    (Why::Code(Code::Idle), "idle"),
    (Why::Code(Code::SlowReader), "slow_reader"),
    (Why::Code(Code::ShuttingDown), "shutting_down"),
    (Why::Code(Code::Unavailable), "unavailable"),
    (Why::Code(Code::RateLimited), "rate_limited"),
    (Why::Code(Code::TokenExpired), "token_expired"),
];

/// Why a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// Its client closed it.
    Peer,
    /// Reset, timed out, or another error of the socket.
    Socket,
    /// A state server asked for it (kicked, login refused).
    State,
    /// This gateway, for this reason.
    Code(Code),
}

impl WorkerStats {
    /// Counts a turn.
    pub fn turn(&self, cpu: Duration) {
        let ns = cpu.as_nanos() as u64;
        let bucket = (0..TURN_BUCKETS - 1).find(|n| ns <= turn_bound_ns(*n)).unwrap_or(TURN_BUCKETS - 1);
        self.turns.add(1);
        self.turn_ns.add(ns);
        self.turn_buckets[bucket].add(1);
    }

    /// Counts an ended connection.
    pub fn closed(&self, why: Why) {
        if let Some(index) = CLOSES.iter().position(|(known, _)| *known == why) {
            self.closes[index].add(1);
        }
    }

    /// Connections that ended for this reason.
    pub fn closed_for(&self, why: Why) -> u64 {
        let index = CLOSES.iter().position(|(known, _)| *known == why);
        index.map_or(0, |index| self.closes[index].get())
    }
}

/// Counters of the bridge.
#[derive(Debug, Default)]
#[allow(missing_docs)]
pub struct BridgeStats {
    pub streams: Cell,
    pub streams_broken: Cell,
    pub frames_up: Cell,
    pub batches_up: Cell,
    pub logins_up: Cell,
    pub login_batches_up: Cell,
    pub logins_waiting: Cell,
    pub logins_told_to_wait: Cell,
    pub late_bytes: Cell,
    pub batches_down: Cell,
    pub resent: Cell,
    pub burst_bytes: Cell,
    pub refused_unavailable: Cell,
}

/// Everything that `/metrics` shows of this gateway.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// One entry a worker.
    pub workers: Arc<Vec<WorkerStats>>,
    /// The bridge's.
    pub bridge: Arc<BridgeStats>,
    /// Time from sending a batch to its acknowledgement by state.
    pub link_acknowledge: Histogram,
    /// The same for batches of logins.
    pub link_login_acknowledge: Histogram,
}

impl Metrics {
    /// Registers everything.
    pub fn new(workers: usize, registry: &mut Registry) -> Self {
        let metrics = Metrics {
            workers: Arc::new((0..workers).map(|_| WorkerStats::default()).collect()),
            bridge: Arc::default(),
            link_acknowledge: Histogram::new(seconds(5e-5, 18)),
            link_login_acknowledge: Histogram::new(seconds(5e-5, 18)),
        };
        registry.register_with_unit(
            "link_acknowledge",
            "Time from sending a batch to a state server to its acknowledgement",
            Unit::Seconds,
            metrics.link_acknowledge.clone(),
        );
        registry.register_with_unit(
            "link_login_acknowledge",
            "Time from sending a batch of logins to a state server to its acknowledgement",
            Unit::Seconds,
            metrics.link_login_acknowledge.clone(),
        );
        registry.register_collector(Box::new(Sums {
            workers: metrics.workers.clone(),
            bridge: metrics.bridge.clone(),
        }));
        metrics
    }

    /// One sum over all workers.
    pub fn sum(&self, pick: impl Fn(&WorkerStats) -> &Cell) -> u64 {
        sum(&self.workers, pick)
    }
}

fn seconds(from: f64, count: u16) -> impl Iterator<Item = f64> {
    prometheus_client::metrics::histogram::exponential_buckets(from, 2.0, count)
}

fn sum(workers: &[WorkerStats], pick: impl Fn(&WorkerStats) -> &Cell) -> u64 {
    workers.iter().map(|worker| pick(worker).get()).sum()
}

#[derive(Debug)]
struct Sums {
    workers: Arc<Vec<WorkerStats>>,
    bridge: Arc<BridgeStats>,
}

type Pick = fn(&WorkerStats) -> &Cell;

const GAUGES: [(&str, &str, Pick); 3] = [
    ("connections", "Open client connections", |w| &w.connections),
    ("bound_connections", "Connections that are logged in", |w| &w.bound),
    ("send_queues", "Connections with bytes waiting to be written", |w| &w.queues),
];

const COUNTERS: [(&str, &str, Pick); 15] = [
    ("accepted", "Connections accepted", |w| &w.accepted),
    ("accept_errors", "Failed accepts (no fd or memory, or the peer was gone)", |w| &w.accept_errors),
    ("frames_in", "Frames received from clients", |w| &w.frames_in),
    ("frames_out", "Frame groups queued to clients", |w| &w.frames_out),
    ("bytes_in", "Bytes received from clients", |w| &w.bytes_in),
    ("bytes_out", "Bytes queued to clients", |w| &w.bytes_out),
    ("pushes_skipped", "Pushes not queued because the reader is slow", |w| &w.pushes_skipped),
    ("slow_readers", "Times that pushes to a connection began to be skipped", |w| &w.slow_readers),
    (
        "resyncs",
        "Clients told to sync: slow readers that caught up, and everybody after the store lost something",
        |w| &w.resyncs,
    ),
    ("burst_refused", "Unfinished frames refused because the burst budget was used up", |w| &w.burst_refused),
    ("burst_closed", "Slow readers closed because the burst budget had no room for their answers", |w| {
        &w.burst_closed
    }),
    ("gone", "Deliveries whose connection was not there any more", |w| &w.gone),
    ("logins_guessing_refused", "Logins told to wait because too many of their address were refused", |w| {
        &w.guessing_refused
    }),
    ("turns", "Loop turns of all workers", |w| &w.turns),
    ("up_full", "Turns that ended with the queue to the bridge full", |w| &w.up_full),
];

impl Collector for Sums {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), std::fmt::Error> {
        for (name, help, pick) in GAUGES {
            let gauge = ConstGauge::new(sum(&self.workers, pick) as i64);
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        for (name, help, pick) in COUNTERS {
            let counter = ConstCounter::new(sum(&self.workers, pick));
            counter.encode(encoder.encode_descriptor(name, help, None, counter.metric_type())?)?;
        }
        self.encode_turns(&mut encoder)?;
        let gauges: [(&str, &str, &Cell); 4] = [
            (
                "burst_bytes",
                "Bytes of partial frames and slow readers' queues, of limits.burst_bytes_max; looked at once a second",
                &self.bridge.burst_bytes,
            ),
            ("link_streams", "Open streams to state servers", &self.bridge.streams),
            (
                "link_logins_waiting",
                "Logins waiting to be sent to a state server",
                &self.bridge.logins_waiting,
            ),
            (
                "link_late_bytes",
                "Bytes of deliveries waiting for workers whose inbox is full",
                &self.bridge.late_bytes,
            ),
        ];
        for (name, help, cell) in gauges {
            let gauge = ConstGauge::new(cell.get() as i64);
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        let bridge: [(&str, &str, &Cell); 9] = [
            ("link_streams_broken", "Streams to state servers that broke", &self.bridge.streams_broken),
            ("link_frames_up", "Frames sent to state servers, but for logins", &self.bridge.frames_up),
            ("link_batches_up", "Batches of them", &self.bridge.batches_up),
            ("link_logins_up", "Logins sent to state servers", &self.bridge.logins_up),
            ("link_login_batches_up", "Batches of them", &self.bridge.login_batches_up),
            (
                "logins_told_to_wait",
                "Logins answered by the gateway with a time to come back",
                &self.bridge.logins_told_to_wait,
            ),
            ("link_batches_down", "Batches received from state servers", &self.bridge.batches_down),
            ("link_resent", "Frames sent again after a stream broke", &self.bridge.resent),
            (
                "refused_unavailable",
                "Frames answered `unavailable` by the gateway",
                &self.bridge.refused_unavailable,
            ),
        ];
        for (name, help, cell) in bridge {
            let counter = ConstCounter::new(cell.get());
            counter.encode(encoder.encode_descriptor(name, help, None, counter.metric_type())?)?;
        }
        let closes = Family::<[(&'static str, &'static str); 1], prometheus_client::metrics::counter::Counter>::default();
        for (index, (_, label)) in CLOSES.iter().enumerate() {
            closes.get_or_create(&[("reason", *label)]).inc_by(sum(&self.workers, |w| &w.closes[index]));
        }
        closes.encode(encoder.encode_descriptor(
            "closed",
            "Connections ended, by reason",
            None,
            MetricType::Counter,
        )?)
    }
}

impl Sums {
    fn encode_turns(&self, encoder: &mut DescriptorEncoder) -> Result<(), std::fmt::Error> {
        let buckets: Vec<(f64, u64)> = (0..TURN_BUCKETS)
            .map(|n| {
                let bound = if n + 1 < TURN_BUCKETS { turn_bound_ns(n) as f64 / 1e9 } else { f64::INFINITY };
                (bound, sum(&self.workers, |w| &w.turn_buckets[n]))
            })
            .collect();
        let seconds = sum(&self.workers, |w| &w.turn_ns) as f64 / 1e9;
        let turns = buckets.iter().map(|(_, count)| count).sum();
        let help = "CPU time of one loop turn of a worker, waiting for events included";
        encoder
            .encode_descriptor("turn_cpu", help, Some(&Unit::Seconds), MetricType::Histogram)?
            .encode_histogram::<NoLabelSet>(seconds, turns, &buckets, None)
    }
}
