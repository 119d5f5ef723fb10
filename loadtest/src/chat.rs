//! `chat`: message load with a checker. The mode lives on the engine threads, [`run`] on the main thread.
//!
//! Trap: latency counts from the scheduled send to the delivery to the receiver's application, both in this process. It
//! includes whatever the generator itself was late, so a generator that is starved of CPU shows as a slow server.

mod body;
pub(crate) mod mode;
mod participant;
pub(crate) mod plan;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::Rng;
use serde::Serialize;

use crate::checker::{Checker, Verdict};
use crate::engine::{Engine, Plan, Sample, millis};
use crate::hdr_log::HdrLogs;
use crate::monitor::{Monitor, RunError};
use crate::session::random_run;
use mode::{ChatMode, ChatRun};
use plan::ChatPlan;

/// What to do.
#[derive(Debug, Clone)]
pub struct ChatOptions {
    /// Gateways.
    pub targets: Vec<SocketAddr>,
    /// How many log in.
    pub connections: u32,
    /// How many of them send.
    pub senders: u32,
    /// Messages per second in all.
    pub rate_per_s: f64,
    /// For how long.
    pub seconds: f64,
    /// Draws the partners.
    pub seed: u64,
    /// Connections in flight while logging in.
    pub window: usize,
    /// The end of everything.
    pub timeout: Duration,
    /// No progress lines.
    pub quiet: bool,
    /// Prefix of HdrHistogram logs.
    pub hdr_log: Option<PathBuf>,
}

/// The JSON object.
#[derive(Debug, Clone, Serialize)]
#[allow(missing_docs)]
pub struct ChatReport {
    pub sent: u64,
    pub acked: u64,
    pub delivered: u64,
    pub lost: u64,
    pub doubled: u64,
    pub reordered: u64,
    pub chats: u64,
    pub messages_per_chat_min: u64,
    pub seed: u64,
    pub p50_ms: Option<f64>,
    pub p90_ms: Option<f64>,
    pub p99_ms: Option<f64>,
    pub p999_ms: Option<f64>,
    pub p9999_ms: Option<f64>,
    pub max_ms: Option<f64>,
    /// Connections that broke while they were logged in.
    pub dropped: u64,
    /// Messages that were refused, or whose fate nobody knows.
    pub unsure: u64,
    /// Deliveries that no sender of this run can have caused.
    pub foreign: u64,
    pub generator_is_bottleneck: bool,
    /// Faults by name.
    pub errors: BTreeMap<String, u64>,
}

/// A report, and what stands beside it.
#[derive(Debug, Clone)]
pub struct ChatResult {
    /// The JSON object.
    pub report: ChatReport,
    /// How long the login of all took.
    pub login_seconds: f64,
}

impl ChatResult {
    /// Whether the promise was kept.
    pub fn is_clean(&self) -> bool {
        let report = &self.report;
        [report.lost, report.doubled, report.reordered, report.foreign] == [0; 4]
    }
}

/// Runs it.
pub fn run(options: &ChatOptions) -> Result<ChatResult, RunError> {
    let plan = check(options)?;
    let hdr = options.hdr_log.as_deref().map(HdrLogs::create).transpose()?;
    let participants = plan.participants().len() as u64;
    let messages = plan.messages;
    let run = Arc::new(ChatRun { name: random_run(), number: rand::rng().random(), plan });
    let engine_plan = Plan {
        connections: options.connections,
        targets: options.targets.clone(),
        rate: None,
        window: options.window,
        ready_ms_max: READY_MS_MAX,
        prompt: true,
    };
    let engine = Engine::start(engine_plan, move |share| ChatMode::new(run.clone(), share))?;
    let mut monitor =
        Monitor::new(u64::from(options.connections), options.timeout, options.quiet).log_to(hdr);
    let begun_us = engine.begin();
    let all = u64::from(options.connections);
    let logged_in = monitor.watch(&engine, |sum| sum.ready_now() >= all && sum.synced >= participants);
    let login_seconds = monitor.sum().last_ready_us.saturating_sub(begun_us) as f64 / 1e6;
    let mut is_whole = false;
    if logged_in {
        engine.go(GO_MS);
        // Late senders are part of the measurement; the schedule itself ends in time.
        is_whole =
            monitor.watch(&engine, |sum| sum.sent >= messages) && wait_for_quiet(&mut monitor, &engine);
    }
    let (last, parts) = engine.stop()?;
    monitor.add(&last);
    monitor.end_logs();
    monitor.finish();
    if !logged_in {
        return Err(not_logged_in(options, monitor.sum()));
    }
    let mut checker = Checker::default();
    parts.into_iter().for_each(|part| checker.merge(part));
    let mut verdict = checker.verdict();
    // The other faults are ones however it ended.
    if !is_whole && [verdict.doubled, verdict.reordered, verdict.foreign] == [0; 3] {
        let Sample { sent, delivered, .. } = monitor.sum();
        return Err(RunError::CutShort(format!(
            "{sent} of {messages} messages were sent and {delivered} had arrived when it was interrupted, or --timeout was over; \
             what was on its way is not lost"
        )));
    }
    if !is_whole {
        verdict.lost = 0;
    }
    let result = result(options, &verdict, &monitor, login_seconds);
    let least = result.report.messages_per_chat_min;
    if least < MESSAGES_PER_CHAT_MIN && result.is_clean() {
        return Err(too_few(least));
    }
    Ok(result)
}

/// Refuses what cannot be judged, before anything is started.
fn check(options: &ChatOptions) -> Result<ChatPlan, RunError> {
    let usage = |text: &str| Err(RunError::Usage(text.to_owned()));
    if options.connections < 2 {
        return usage("--connections must be at least 2: somebody must receive");
    }
    if options.senders == 0 || options.senders > options.connections {
        return usage("--senders must be from 1 to --connections");
    }
    if !(options.rate_per_s > 0.0 && options.seconds > 0.0) {
        return usage("--rate and --seconds must be above 0");
    }
    let plan = ChatPlan::new(
        options.connections,
        options.senders,
        options.rate_per_s,
        options.seconds,
        options.seed,
    );
    let least = plan.messages_per_chat_min();
    if least < MESSAGES_PER_CHAT_MIN { Err(too_few(least)) } else { Ok(plan) }
}

fn too_few(least: u64) -> RunError {
    RunError::TooFewPerChat(format!(
        "{least} messages in one of them, {MESSAGES_PER_CHAT_MIN} are needed; raise --rate or --seconds, or lower --senders"
    ))
}

fn not_logged_in(options: &ChatOptions, sum: &Sample) -> RunError {
    RunError::Unreachable(format!(
        "only {} of {} connections logged in and synced: {:?}",
        sum.ready_now(),
        options.connections,
        sum.faults
    ))
}

/// Until every message is answered and every accepted one delivered, or nothing has changed for a while. Whether there was
/// time for it.
fn wait_for_quiet<P: Send + 'static>(monitor: &mut Monitor, engine: &Engine<P>) -> bool {
    let mut seen = (0, 0, 0);
    let mut since = Instant::now();
    while since.elapsed() < QUIET_MAX {
        if monitor.is_over() {
            return false;
        }
        let sum = monitor.sum();
        let now = (sum.acked, sum.unsure, sum.delivered);
        // What is unsure may have been delivered too, and must not stand in for an accepted one.
        if now.0 + now.1 >= sum.sent && now.2 >= now.0 + now.1 {
            return true;
        }
        if now != seen {
            (seen, since) = (now, Instant::now());
        }
        monitor.step(engine);
    }
    true
}

fn result(options: &ChatOptions, verdict: &Verdict, monitor: &Monitor, login_seconds: f64) -> ChatResult {
    let sum = monitor.sum();
    let at = |quantile| millis(&sum.latency, quantile);
    ChatResult {
        report: ChatReport {
            sent: sum.sent,
            acked: verdict.acked,
            delivered: verdict.delivered,
            lost: verdict.lost,
            doubled: verdict.doubled,
            reordered: verdict.reordered,
            chats: verdict.chats,
            messages_per_chat_min: verdict.messages_per_chat_min,
            seed: options.seed,
            p50_ms: at(0.5),
            p90_ms: at(0.9),
            p99_ms: at(0.99),
            p999_ms: at(0.999),
            p9999_ms: at(0.9999),
            max_ms: at(1.0),
            dropped: sum.dropped,
            unsure: sum.unsure,
            foreign: verdict.foreign,
            generator_is_bottleneck: monitor.strained().is_bottleneck(),
            errors: sum.faults.clone(),
        },
        login_seconds,
    }
}

/// Fewer in a chat say nothing about their order.
const MESSAGES_PER_CHAT_MIN: u64 = 20;
/// From the last login to the first send.
const GO_MS: u64 = 200;
const READY_MS_MAX: u64 = 30_000;
const QUIET_MAX: Duration = Duration::from_secs(10);
