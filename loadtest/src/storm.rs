//! `storm`: opens, logs in and holds many sessions. The mode lives on the engine threads, [`run`] on the main thread.
//!
//! Trap: a connection counts as one of `connections` only if it still stands at the end of the hold. One that logged in
//! and was dropped counts as failed, and its fault is named `dropped_...`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use bytes::BytesMut;
use proto::frame;
use serde::Serialize;

use crate::engine::{Engine, Io, Mode, Plan, Rate, Sample, Share, millis};
use crate::fault::Fault;
use crate::monitor::{Monitor, RunError};
use crate::session::{Heard, Session, random_run};

/// What to do.
#[derive(Debug, Clone)]
pub struct StormOptions {
    /// Gateways.
    pub targets: Vec<SocketAddr>,
    /// How many.
    pub connections: u32,
    /// Open-loop rate.
    pub rate: Option<Rate>,
    /// Connections in flight without a rate.
    pub window: usize,
    /// How long they stay after the last is open.
    pub hold: Duration,
    /// Only connect.
    pub no_login: bool,
    /// The end of everything.
    pub timeout: Duration,
    /// The server's process, if its memory is wanted.
    pub pid: Option<u32>,
    /// No progress lines.
    pub quiet: bool,
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
}

/// Runs it.
pub fn run(options: &StormOptions) -> Result<StormReport, RunError> {
    let rss_before = options.pid.map(resident_bytes).transpose()?;
    let plan = Plan {
        connections: options.connections,
        targets: options.targets.clone(),
        rate: options.rate,
        window: options.window,
        ready_ms_max: READY_MS_MAX,
    };
    let (run, login) = (random_run(), !options.no_login);
    let engine = Engine::start(plan, move |share| StormMode::new(&run, share, login))?;
    let mut monitor = Monitor::new(u64::from(options.connections), options.timeout, options.quiet);
    let begun_us = engine.begin();
    monitor.watch(&engine, |sum| sum.ready + sum.failed >= u64::from(options.connections));
    let opened = monitor.sum().clone();
    if !monitor.is_over() {
        monitor.hold(&engine, options.hold);
    }
    let rss_after = options.pid.map(resident_bytes).transpose()?;
    let held = monitor.sum().ready_now();
    let (last, _) = engine.stop()?;
    monitor.add(&last);
    monitor.finish();
    let seconds = opened.last_ready_us.saturating_sub(begun_us) as f64 / 1e6;
    Ok(report(options, &opened, monitor.sum(), held, seconds, rss_before.zip(rss_after)))
}

fn report(
    options: &StormOptions,
    opened: &Sample,
    all: &Sample,
    held: u64,
    seconds: f64,
    rss: Option<(u64, u64)>,
) -> StormReport {
    let timed = (!options.no_login).then_some(&opened.login);
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
    }
}

/// Resident memory of a process on this machine.
fn resident_bytes(pid: u32) -> Result<u64, RunError> {
    let path = PathBuf::from(format!("/proc/{pid}/status"));
    let text = std::fs::read_to_string(&path)
        .map_err(|error| RunError::Usage(format!("--pid {pid}: cannot read {}: {error}", path.display())))?;
    crate::machine::kib_field(&text, "VmRSS:")
        .map(|kib| kib * 1024)
        .ok_or_else(|| RunError::Usage(format!("--pid {pid}: no VmRSS in {}", path.display())))
}

struct StormMode {
    session: Session,
    login: bool,
}

impl StormMode {
    fn new(run: &str, share: Share, login: bool) -> StormMode {
        StormMode { session: Session::new(run, share.first), login }
    }
}

impl Mode for StormMode {
    type Part = ();

    fn greet(&mut self, index: u32, attempt: u64, out: &mut BytesMut) {
        if self.login {
            self.session.login(index, attempt, out);
        }
    }

    fn ready_at_once(&self) -> bool {
        !self.login
    }

    fn receive(&mut self, index: u32, bytes: &[u8], io: &mut Io) -> Result<usize, Fault> {
        let mut used = 0;
        while let Some(frame) =
            frame::cut(&bytes[used..], proto::FRAME_BYTES_MAX).map_err(|_| Fault::BadFrame)?
        {
            used += frame.wire_bytes();
            // Pushes and the like do not concern a storm.
            let _: Heard = self.session.hear(index, &frame, io)?;
        }
        Ok(used)
    }

    fn lost(&mut self, _: u32, _: &Fault, _: &mut Io) -> Option<u64> {
        None
    }

    fn tick(&mut self, io: &mut Io) -> Option<u64> {
        self.session.tick(io)
    }

    fn finish(self) {}
}

/// From begin to LoginAck.
const READY_MS_MAX: u64 = 30_000;
