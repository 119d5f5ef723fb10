//! `storm`: opens, logs in and holds many sessions, of ours or of another protocol. Main thread.
//!
//! Trap: a connection counts as one of `connections` only if it still stands at the end of the hold. One that logged in
//! and was dropped counts as failed, and its fault is named `dropped_...`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::{Map, Value};

use crate::adapter::{Protocol, SessionOptions};
use crate::engine::{Engine, Plan, Rate, Sample, millis};
use crate::hdr_log::HdrLogs;
use crate::machine::{self, KernelBytes};
use crate::misfit::{Misfit, MisfitMode};
use crate::monitor::{Monitor, RunError, interrupted};
use crate::report::{percentile_keys, percentiles};
use crate::session::random_run;

/// What to do.
#[derive(Debug, Clone)]
pub struct StormOptions {
    /// What they speak.
    pub protocol: Protocol,
    /// Gateways, or servers of that protocol.
    pub targets: Vec<SocketAddr>,
    /// How many.
    pub connections: u32,
    /// Open-loop rate.
    pub rate: Option<Rate>,
    /// Connections in flight without a rate.
    pub window: usize,
    /// How long they stay after the last is open.
    pub hold: Duration,
    /// The end of everything.
    pub timeout: Duration,
    /// The server's process, if its memory is wanted.
    pub pid: Option<u32>,
    /// No progress lines.
    pub quiet: bool,
    /// While they are held: cut so many percent by reset, so often, and let them come back.
    pub reconnect: Option<(u32, Duration)>,
    /// Badly behaved clients of our protocol beside the others while these are held, so many of each kind.
    pub misfits: Vec<(Misfit, u32)>,
    /// Where HdrHistogram logs go: `PREFIX.login.hlog` and others.
    pub hdr_log: Option<PathBuf>,
}

impl Default for StormOptions {
    fn default() -> StormOptions {
        StormOptions {
            protocol: Protocol::default(),
            targets: Vec::new(),
            connections: 0,
            rate: None,
            window: Plan::default().window,
            hold: Duration::ZERO,
            timeout: Duration::from_secs(600),
            pid: None,
            quiet: true,
            reconnect: None,
            misfits: Vec::new(),
            hdr_log: None,
        }
    }
}

/// The JSON object.
#[derive(Debug, Clone, Serialize)]
#[allow(missing_docs)]
pub struct StormReport {
    pub connections: u64,
    pub failed: u64,
    pub seconds: f64,
    pub per_s: f64,
    pub connect_p99_ms: Option<f64>,
    pub login_p50_ms: Option<f64>,
    pub login_p99_ms: Option<f64>,
    pub errors: std::collections::BTreeMap<String, u64>,
    /// With `--pid` only, as are the next two.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rss_before_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rss_after_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rss_per_conn_bytes: Option<f64>,
    /// Percentiles and what else [`more_keys`] names.
    #[serde(flatten)]
    pub more: Map<String, Value>,
}

/// Keys of a report beside the fields of [`StormReport`]; some stand in it only when they were asked for.
pub fn more_keys() -> Vec<String> {
    let names = [
        "connect",
        "login",
        "login_uncorrected",
        "reconnect_connect",
        "reconnect_login",
        "ping",
        "ping_uncorrected",
        "generator_lag",
    ];
    let mut keys: Vec<String> = names.into_iter().flat_map(percentile_keys).collect();
    keys.extend(MORE_KEYS.iter().map(|key| (*key).to_owned()));
    keys
}

/// What is done while holding needs time for it.
fn check(options: &StormOptions) -> Result<(), RunError> {
    let usage = |text: &str| Err(RunError::Usage(text.to_owned()));
    if options.hold >= options.timeout {
        return usage("--hold must be shorter than --timeout, which ends everything");
    }
    if !options.misfits.is_empty() && options.hold.is_zero() {
        return usage(
            "--half-frames, --half-open and --slow-readers come while holding: give --hold SECONDS",
        );
    }
    if !options.misfits.is_empty() && !matches!(options.protocol, Protocol::Rookery(_)) {
        return usage("--half-frames, --half-open and --slow-readers need --protocol rookery");
    }
    if options.reconnect.is_some_and(|(_, every)| every >= options.hold) {
        return usage(
            "--reconnect cuts every --reconnect-every seconds (10) while holding: give a longer --hold",
        );
    }
    Ok(())
}

/// Runs it.
pub fn run(options: &StormOptions) -> Result<StormReport, RunError> {
    check(options)?;
    let before = options.pid.map(Memory::of).transpose()?;
    let hdr = options.hdr_log.as_deref().map(HdrLogs::create).transpose()?;
    let plan = Plan {
        connections: options.connections,
        targets: options.targets.clone(),
        rate: options.rate,
        window: options.window,
        ready_ms_max: READY_MS_MAX,
        ..Plan::default()
    };
    let run = random_run();
    let engine = options.protocol.engine(plan, &run)?;
    let mut monitor =
        Monitor::new(u64::from(options.connections), options.timeout, options.quiet).log_to(hdr);
    let begun_us = engine.begin();
    monitor.watch(&engine, |sum| sum.ready + sum.failed >= u64::from(options.connections));
    let opened = monitor.sum().clone();
    // Of these seconds alone, too: a long hold would hide them.
    let strained = monitor.strained();
    let mut more = Map::new();
    let mut is_whole = options.hold.is_zero();
    if !monitor.is_over() {
        let misfits = Misfits::start(options, &run)?;
        is_whole = match options.reconnect {
            Some((percent, every)) => {
                reconnect(&engine, &mut monitor, options.hold, percent, every, &mut more)
            }
            None => monitor.hold(&engine, options.hold),
        };
        misfits.stop(&mut more)?;
    }
    let after = options.pid.map(Memory::of).transpose()?;
    let held = monitor.sum().ready_now();
    let (last, _) = engine.stop()?;
    monitor.add(&last);
    monitor.end_logs();
    monitor.finish();
    // Whoever presses Ctrl-C wants to see what there is; whoever asked for an hour must not take less for it.
    if !is_whole && !interrupted() {
        return Err(RunError::CutShort(format!("--timeout was over before --hold; {held} stood")));
    }
    let seconds = opened.last_ready_us.saturating_sub(begun_us) as f64 / 1e6;
    let is_bottleneck = strained.is_bottleneck() || monitor.strained().is_bottleneck();
    beside(&mut more, options, &opened, monitor.sum(), is_bottleneck);
    Ok(report(options, &opened, monitor.sum(), held, seconds, before.zip(after), more))
}

/// Whether each connection is let in by an answer, and not by the kernel alone.
fn has_logins(options: &StormOptions) -> bool {
    !matches!(options.protocol, Protocol::Rookery(SessionOptions { no_login: true, .. }))
}

fn report(
    options: &StormOptions,
    opened: &Sample,
    all: &Sample,
    held: u64,
    seconds: f64,
    memory: Option<(Memory, Memory)>,
    mut more: Map<String, Value>,
) -> StormReport {
    let rss = memory.map(|(before, after)| (before.process, after.process));
    if let Some((before, after)) = memory {
        let each = |before: u64, after: u64| Value::from((after as f64 - before as f64) / held.max(1) as f64);
        let (old, new) = (before.kernel, after.kernel);
        more.insert("kernel_slab_per_conn_bytes".into(), each(old.slab, new.slab));
        more.insert("kernel_page_tables_per_conn_bytes".into(), each(old.page_tables, new.page_tables));
        more.insert("kernel_per_cpu_per_conn_bytes".into(), each(old.per_cpu, new.per_cpu));
    }
    let timed = has_logins(options).then_some(&opened.login);
    StormReport {
        connections: held,
        failed: u64::from(options.connections) - held,
        seconds,
        per_s: if seconds > 0.0 { opened.ready as f64 / seconds } else { 0.0 },
        connect_p99_ms: millis(&opened.connect, 0.99),
        login_p50_ms: timed.and_then(|login| millis(login, 0.5)),
        login_p99_ms: timed.and_then(|login| millis(login, 0.99)),
        errors: all.faults.clone(),
        rss_before_bytes: rss.map(|(before, _)| before),
        rss_after_bytes: rss.map(|(_, after)| after),
        rss_per_conn_bytes: rss.map(|(before, after)| (after as f64 - before as f64) / held.max(1) as f64),
        more,
    }
}

/// Percentiles, retries, and whether the generator held it back.
fn beside(
    more: &mut Map<String, Value>,
    options: &StormOptions,
    opened: &Sample,
    all: &Sample,
    is_bottleneck: bool,
) {
    percentiles(more, "connect", &opened.connect, &HAS);
    if has_logins(options) {
        percentiles(more, "login", &opened.login, &HAS);
        percentiles(more, "login_uncorrected", &opened.login_uncorrected, &HAS);
    }
    if options.reconnect.is_some() {
        percentiles(more, "reconnect_connect", &all.connect.since(&opened.connect), &HAS);
        percentiles(more, "reconnect_login", &all.login.since(&opened.login), &HAS);
    }
    if all.pings > 0 {
        percentiles(more, "ping", &all.ping, &HAS);
        percentiles(more, "ping_uncorrected", &all.ping_uncorrected, &HAS);
        // Those of the last moment, and those of connections that were cut.
        more.insert("ping_unanswered".into(), all.pings.saturating_sub(all.ping.len()).into());
    }
    percentiles(more, "generator_lag", &all.lag, &HAS);
    more.insert("generator_is_bottleneck".into(), is_bottleneck.into());
    more.insert("retried".into(), all.retried.into());
}

/// Holds, and cuts a share every so often; each time until all of it is back. Whether there was time for the hold.
fn reconnect(
    engine: &Engine<()>,
    monitor: &mut Monitor,
    hold: Duration,
    percent: u32,
    every: Duration,
    more: &mut Map<String, Value>,
) -> bool {
    let until = Instant::now() + hold;
    let (mut rounds, mut threads_done, mut seconds) = (0u64, 0, Vec::new());
    while Instant::now() + every < until && !monitor.is_over() {
        monitor.hold(engine, every);
        let (stood, gone) = (monitor.sum().ready_now(), gone(monitor.sum()));
        let began = Instant::now();
        threads_done += engine.cut(percent);
        let back = monitor.watch(engine, |sum| {
            sum.cuts_done >= threads_done && sum.ready_now() + self::gone(sum) - gone >= stood
        });
        rounds += 1;
        if back {
            seconds.push(began.elapsed().as_secs_f64());
        }
    }
    let is_whole = monitor.hold(engine, until.saturating_duration_since(Instant::now()));
    more.insert("reconnect_rounds".into(), rounds.into());
    more.insert("reconnect_cut".into(), monitor.sum().cut.into());
    // A round that did not end has no time; then there is no worst one either.
    let worst = seconds.iter().copied().reduce(f64::max).filter(|_| seconds.len() as u64 == rounds);
    more.insert("reconnect_back_max_s".into(), worst.into());
    is_whole
}

/// Those that will not come back.
fn gone(sum: &Sample) -> u64 {
    sum.failed + sum.dropped
}

/// Badly behaved clients, each kind on an engine of its own.
struct Misfits(Vec<(Misfit, Engine<()>)>);

impl Misfits {
    fn start(options: &StormOptions, run: &str) -> Result<Misfits, RunError> {
        let mut engines = Vec::new();
        for (number, (misfit, count)) in options.misfits.iter().copied().enumerate() {
            let plan = Plan { connections: count, targets: options.targets.clone(), ..Plan::default() };
            let name = format!("{run}m{number}");
            let engine = Engine::start(plan, move |share| MisfitMode::new(misfit, &name, share))?;
            engine.begin();
            engines.push((misfit, engine));
        }
        Ok(Misfits(engines))
    }

    /// Ends them; how many of each were there, and how many the server had closed by then.
    fn stop(self, more: &mut Map<String, Value>) -> Result<(), RunError> {
        for (misfit, engine) in self.0 {
            let (sum, _) = engine.stop()?;
            let name = match misfit {
                Misfit::HalfFrame => "half_frames",
                Misfit::Silent => "half_open",
                Misfit::SlowReader => "slow_readers",
            };
            more.insert(name.into(), sum.ready.into());
            more.insert(format!("{name}_closed"), sum.dropped.into());
        }
        Ok(())
    }
}

/// What the server's process and the kernel hold.
#[derive(Debug, Clone, Copy)]
struct Memory {
    process: u64,
    kernel: KernelBytes,
}

impl Memory {
    fn of(pid: u32) -> Result<Memory, RunError> {
        let path = format!("/proc/{pid}/status");
        let text = std::fs::read_to_string(&path)
            .map_err(|error| RunError::Usage(format!("--pid {pid}: cannot read {path}: {error}")))?;
        let process = machine::process_bytes(&text)
            .ok_or_else(|| RunError::Usage(format!("--pid {pid}: no memory in {path}")))?;
        Ok(Memory { process, kernel: machine::kernel_bytes().unwrap_or_default() })
    }
}

/// Percentiles that are fields of the report.
const HAS: [&str; 3] = ["connect_p99_ms", "login_p50_ms", "login_p99_ms"];
const MORE_KEYS: [&str; 15] = [
    "ping_unanswered",
    "retried",
    "generator_is_bottleneck",
    "reconnect_rounds",
    "reconnect_cut",
    "reconnect_back_max_s",
    "half_frames",
    "half_frames_closed",
    "half_open",
    "half_open_closed",
    "slow_readers",
    "slow_readers_closed",
    "kernel_slab_per_conn_bytes",
    "kernel_page_tables_per_conn_bytes",
    "kernel_per_cpu_per_conn_bytes",
];

/// From begin to LoginAck, or to what another protocol has in its place.
const READY_MS_MAX: u64 = 30_000;
