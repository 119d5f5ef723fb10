//! The same engine against servers of other protocols: MQTT 3.1.1 and HTTP/1.1 keepalive, so that a comparison differs
//! in the server only. [`Crowd`] is many connections of one [`Protocol`]; main thread, its modes on engine threads.
//!
//! Trap: "ready" means what it costs there: a session that state and store know with us, CONNACK (or SUBACK) at a
//! broker, one answered request at a web server. Set-up rates of different protocols compare servers, not work.

mod heartbeat;
pub mod http;
mod http_mode;
pub mod mqtt;
mod mqtt_mode;
mod session_mode;

pub use mqtt_mode::MqttOptions;

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use crate::engine::{Engine, Plan, Sample, millis};
use crate::machine;
use crate::monitor::{Monitor, RunError};
use crate::session::random_run;
use http_mode::HttpMode;
use mqtt_mode::MqttMode;
use session_mode::SessionMode;

/// What is spoken.
#[derive(Debug, Clone)]
pub enum Protocol {
    /// Ours.
    Rookery,
    /// MQTT 3.1.1.
    Mqtt(MqttOptions),
    /// HTTP/1.1 with keepalive.
    Http,
}

/// Connections of one protocol, from their begin on. They end with this value.
pub struct Crowd {
    engine: Engine<()>,
    monitor: Monitor,
    connections: u64,
    begun_us: u64,
}

impl Crowd {
    /// Begins them. All must be ready, and gone again, within `timeout`.
    pub fn begin(protocol: &Protocol, plan: Plan, timeout: Duration, quiet: bool) -> Result<Crowd, RunError> {
        let connections = u64::from(plan.connections);
        let run = random_run();
        let engine = match protocol.clone() {
            Protocol::Rookery => Engine::start(plan, move |share| SessionMode::new(&run, share)),
            Protocol::Mqtt(options) => {
                Engine::start(plan, move |share| MqttMode::new(&run, share, options.clone()))
            }
            Protocol::Http => {
                let host = plan.targets.first().map_or_else(String::new, ToString::to_string);
                Engine::start(plan, move |_| HttpMode::new(&host))
            }
        }?;
        let monitor = Monitor::new(connections, timeout, quiet);
        let begun_us = engine.begin();
        Ok(Crowd { engine, monitor, connections, begun_us })
    }

    /// Waits until each is ready or has failed. How long that took; `None`: the time ended before.
    pub fn wait_ready(&mut self) -> Option<f64> {
        let all = self.connections;
        let done = self.monitor.watch(&self.engine, |sum| sum.ready + sum.failed >= all);
        done.then(|| self.monitor.sum().last_ready_us.saturating_sub(self.begun_us) as f64 / 1e6)
    }

    /// Keeps them for so long, with heartbeats.
    pub fn hold(&mut self, hold: Duration) {
        self.monitor.hold(&self.engine, hold);
    }

    /// Out of time, or interrupted.
    pub fn is_over(&self) -> bool {
        self.monitor.is_over()
    }

    /// Everything counted so far.
    pub fn sum(&self) -> &Sample {
        self.monitor.sum()
    }

    /// Closes them by reset. Everything that was counted.
    pub fn end(mut self) -> Result<Sample, RunError> {
        let (last, _) = self.engine.stop()?;
        self.monitor.add(&last);
        self.monitor.finish();
        Ok(self.monitor.sum().clone())
    }
}

/// A storm at a server of another protocol.
#[derive(Debug, Clone)]
pub struct PeerStormOptions {
    /// What it speaks.
    pub protocol: Protocol,
    /// What to open.
    pub plan: Plan,
    /// How long they stay after the last is open.
    pub hold: Duration,
    /// The end of everything.
    pub timeout: Duration,
    /// The server's process, if its memory is wanted.
    pub pid: Option<u32>,
    /// No progress lines.
    pub quiet: bool,
}

/// The JSON object, with the keys of our own storm.
#[derive(Debug, Clone, Serialize)]
#[allow(missing_docs)]
pub struct PeerStormReport {
    pub connections: u64,
    pub failed: u64,
    pub seconds: f64,
    pub per_s: f64,
    pub connect_p99_ms: Option<f64>,
    pub login_p50_ms: Option<f64>,
    pub login_p99_ms: Option<f64>,
    pub errors: BTreeMap<String, u64>,
    /// With a pid only, as are the next two.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rss_before_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rss_after_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rss_per_conn_bytes: Option<f64>,
}

/// Runs it.
pub fn run(options: &PeerStormOptions) -> Result<PeerStormReport, RunError> {
    let rss_before = options.pid.map(resident_bytes).transpose()?;
    let connections = u64::from(options.plan.connections);
    let mut crowd = Crowd::begin(&options.protocol, options.plan.clone(), options.timeout, options.quiet)?;
    let all_ready = crowd.wait_ready();
    let opened = crowd.sum().clone();
    if all_ready.is_some() {
        crowd.hold(options.hold);
    }
    let rss_after = options.pid.map(resident_bytes).transpose()?;
    let held = crowd.sum().ready_now();
    let seconds = opened.last_ready_us.saturating_sub(crowd.begun_us) as f64 / 1e6;
    let all = crowd.end()?;
    let rss = rss_before.zip(rss_after);
    Ok(PeerStormReport {
        connections: held,
        failed: connections - held,
        seconds,
        per_s: if seconds > 0.0 { opened.ready as f64 / seconds } else { 0.0 },
        connect_p99_ms: millis(&opened.connect, 0.99),
        login_p50_ms: millis(&opened.login, 0.5),
        login_p99_ms: millis(&opened.login, 0.99),
        errors: all.faults,
        rss_before_bytes: rss.map(|(before, _)| before),
        rss_after_bytes: rss.map(|(_, after)| after),
        rss_per_conn_bytes: rss.map(|(before, after)| (after as f64 - before as f64) / held.max(1) as f64),
    })
}

/// Resident memory of a process on this machine.
fn resident_bytes(pid: u32) -> Result<u64, RunError> {
    let path = format!("/proc/{pid}/status");
    let text = std::fs::read_to_string(&path)
        .map_err(|error| RunError::Usage(format!("--pid {pid}: cannot read {path}: {error}")))?;
    machine::kib_field(&text, "VmRSS:")
        .map(|kib| kib * 1024)
        .ok_or_else(|| RunError::Usage(format!("--pid {pid}: no VmRSS in {path}")))
}
