//! The attack: 10,000 slow readers whom others keep writing to and 15,000 half frames before login, among 50,000 idle, at a
//! gateway of their own; a thousand people chat all the while. Main thread.
//!
//! Trap: the kernel would take megabytes for each slow reader on loopback before the gateway had to keep a byte. So the
//! gateway's send buffers are capped (`listen.send_buffer_bytes`), and the readers' receive buffers are small.

use std::fmt;
use std::time::{Duration, Instant};

use super::attack::{self, Attack};
use super::crowd::{Crowd, Who};
use super::live::{Live, Talk};
use super::report::MillionReport;
use super::system::{Gateway, System};
use crate::monitor::RunError;
use crate::session::random_run;

/// What to do.
pub struct Plan {
    /// Further `section.key=value` for the gateway.
    pub sets: Vec<String>,
    /// How big the whole bench is; below 100,000 the attack shrinks with it.
    pub connections: u32,
    /// Memory of a fresh gateway, bytes.
    pub fresh: u64,
    /// How long the others are listened to, before it and during it.
    pub minute: Duration,
    /// The end of everything.
    pub timeout: Duration,
    /// No progress lines.
    pub quiet: bool,
}

/// What it came to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Burst {
    over_budget: f64,
    bytes: u64,
    connections: u64,
    queues: u64,
    slow_closed: u64,
    writer_returns: u64,
    before_p99_ms: Option<f64>,
    during_p99_ms: Option<f64>,
    /// Messages that had been sent and had not come at its end: the percentile does not know them. Some always are.
    during_open: u64,
}

/// Runs it.
pub fn run(system: &System, plan: Plan) -> Result<Burst, RunError> {
    let size = Size::of(plan.connections);
    let run = random_run();
    let gateway = system.gateway("gateway-burst", &settings(&plan, size))?;
    let who = Who { run: run.clone(), visit: 0, login: true };
    let mut crowd = Crowd::new(gateway.client, size.idle, who, plan.timeout, plan.quiet)?;
    crowd.begin();
    while !crowd.is_settled() && !crowd.is_over() {
        crowd.step();
    }
    let talk = Talk { people: PEOPLE, rate_per_s: PER_S, seconds: 3_600.0 };
    let mut live = Live::start(gateway.client, talk, plan.timeout)?;
    live.go();
    live.talk(WARM_UP);
    live.begin_stretch();
    live.talk(plan.minute);
    let before_p99_ms = live.end_stretch().map(|latency| latency.p99_ms);

    live.begin_stretch();
    let attack = Attack::start(gateway.client, &run, size.slow, size.half);
    let mut burst = Burst { before_p99_ms, ..Burst::default() };
    let until = Instant::now() + (plan.minute / 2).max(ATTACK_MIN);
    while Instant::now() < until && !crowd.is_over() {
        live.talk(LOOK_EVERY);
        burst.look(&gateway, plan.fresh)?;
    }
    burst.during_p99_ms = live.end_stretch().map(|latency| latency.p99_ms);
    burst.during_open = live.open();
    burst.slow_closed = gateway.metric("closed_total{reason=\"slow_reader\"}").unwrap_or(0.0) as u64;
    burst.writer_returns = attack.stop()?;
    live.leave()?;
    crowd.leave()?;
    gateway.stop()?;
    Ok(burst)
}

/// Connections of each kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Size {
    idle: u32,
    slow: u32,
    half: u32,
}

impl Size {
    fn of(connections: u32) -> Size {
        let share = |full: u32| {
            (u64::from(full) * u64::from(connections.min(FULL_FROM)) / u64::from(FULL_FROM)) as u32
        };
        Size { idle: share(50_000), slow: share(10_000).max(64), half: share(15_000).max(64) }
    }
}

fn settings(plan: &Plan, size: Size) -> Vec<String> {
    let all = size.idle + size.slow + size.half + 4_000;
    let mut sets = vec![
        format!("limits.connections_max={all}"),
        format!("limits.burst_bytes_max={BURST_BYTES}"),
        format!("listen.send_buffer_bytes={SEND_BUFFER_BYTES}"),
        // Half frames would be gone after ten seconds; here they stay as long as the slow readers.
        "limits.login_ms_max=0".to_owned(),
        // The same for readers who take nothing at all.
        "limits.stalled_ms_max=600000".to_owned(),
        "limits.heartbeat_ms=60000".to_owned(),
        "limits.idle_ms_max=120000".to_owned(),
    ];
    sets.extend_from_slice(&plan.sets);
    sets
}

impl Default for Burst {
    fn default() -> Burst {
        Burst {
            over_budget: 0.0,
            bytes: 0,
            connections: 0,
            queues: 0,
            slow_closed: 0,
            writer_returns: 0,
            before_p99_ms: None,
            during_p99_ms: None,
            during_open: 0,
        }
    }
}

impl Burst {
    /// Keeps the worst moment.
    fn look(&mut self, gateway: &Gateway, fresh: u64) -> Result<(), RunError> {
        let (bytes, connections) = (gateway.bytes()?, gateway.metric("connections")? as u64);
        let over = over_budget(bytes, fresh, connections);
        if over > self.over_budget {
            let queues = gateway.metric("send_queues")? as u64;
            *self = Burst { over_budget: over, bytes, connections, queues, ..*self };
        }
        Ok(())
    }

    /// Into the report.
    pub fn report(&self, report: &mut MillionReport) {
        report.burst_over_budget = Some(self.over_budget);
        report.burst_bytes = Some(self.bytes);
        report.burst_others_p99_ms = self.during_p99_ms;
        report.burst_others_open = Some(self.during_open);
        let ratio = self.during_p99_ms.zip(self.before_p99_ms).map(|(during, before)| during / before);
        report.burst_others_p99_over_before = ratio;
    }
}

impl fmt::Display for Burst {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |value: Option<f64>| value.map_or_else(|| "-".into(), |value| format!("{value:.2}"));
        write!(
            f,
            "at worst {:.1} MiB with {} connections, {:.3} of the budget; {} had bytes waiting, {} closed as slow, who writes to them thrown out {} times; others' p99 {} ms, {} on the way, {} ms before",
            self.bytes as f64 / f64::from(1 << 20),
            self.connections,
            self.over_budget,
            self.queues,
            self.slow_closed,
            self.writer_returns,
            ms(self.during_p99_ms),
            self.during_open,
            ms(self.before_p99_ms)
        )
    }
}

fn over_budget(bytes: u64, fresh: u64, connections: u64) -> f64 {
    bytes as f64 / (fresh + connections * CONNECTION_BYTES + BURST_BYTES) as f64
}

/// Beside the time before.
pub const TAKES: Duration = Duration::from_secs(60);
/// What a connection may cost.
const CONNECTION_BYTES: u64 = 64;
/// The gateway's default, said all the same: the figure divides by it.
const BURST_BYTES: u64 = 64 << 20;
const SEND_BUFFER_BYTES: u32 = 8_192;
const FULL_FROM: u32 = 100_000;
const PEOPLE: u32 = 1_000;
const PER_S: f64 = 1_000.0;
const WARM_UP: Duration = Duration::from_secs(5);
/// To open all and to fill their queues.
const ATTACK_MIN: Duration = attack::FILL;
const LOOK_EVERY: Duration = Duration::from_millis(200);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_is_before_and_connections_and_burst() {
        let exactly = (8 << 20) + 75_000 * 64 + (64 << 20);
        assert_eq!(over_budget(exactly, 8 << 20, 75_000), 1.0);
    }

    #[test]
    fn small_benches_have_small_attacks() {
        assert_eq!(Size::of(1_000_000), Size { idle: 50_000, slow: 10_000, half: 15_000 });
        assert_eq!(Size::of(20_000), Size { idle: 10_000, slow: 2_000, half: 3_000 });
    }
}
