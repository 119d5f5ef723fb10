//! What the engine speaks: our protocol, MQTT 3.1.1, HTTP/1.1 keepalive, so that a comparison differs in the server only.
//! [`Crowd`] is many connections of one [`Protocol`] that only stay; main thread, its modes on engine threads.
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
pub use session_mode::SessionOptions;

use std::time::Duration;

use crate::engine::{Engine, EngineError, Plan, Sample};
use crate::monitor::{Monitor, RunError};
use crate::session::random_run;
use http_mode::HttpMode;
use mqtt_mode::MqttMode;
use session_mode::SessionMode;

/// What is spoken.
#[derive(Debug, Clone)]
pub enum Protocol {
    /// Ours.
    Rookery(SessionOptions),
    /// MQTT 3.1.1.
    Mqtt(MqttOptions),
    /// HTTP/1.1 with keepalive.
    Http,
}

impl Default for Protocol {
    fn default() -> Protocol {
        Protocol::Rookery(SessionOptions::default())
    }
}

impl Protocol {
    /// An engine of connections that speak it; whatever they are called has `run` in it.
    pub fn engine(&self, plan: Plan, run: &str) -> Result<Engine<()>, EngineError> {
        let run = run.to_owned();
        match self.clone() {
            Protocol::Rookery(options) => {
                Engine::start(plan, move |share| SessionMode::new(&run, share, options.clone()))
            }
            Protocol::Mqtt(options) => {
                Engine::start(plan, move |share| MqttMode::new(&run, share, options.clone()))
            }
            Protocol::Http => {
                let host = plan.targets.first().map_or_else(String::new, ToString::to_string);
                Engine::start(plan, move |_| HttpMode::new(&host))
            }
        }
    }
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
        let engine = protocol.engine(plan, &random_run())?;
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
