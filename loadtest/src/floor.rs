//! `floor`: the same client engine against a server that does the least that any server must: the number to divide by.
//! Client and server run in this process, each thread with a private fd table.
//!
//! Trap: kernel memory is measured over pairs (both ends live here) and halved. The client's end costs about as much as
//! the server's; slab of other processes is noise in it.

mod server;

use std::net::SocketAddr;
use std::time::Duration;

use bytes::BytesMut;
use gateway::sys;
use serde::Serialize;

use crate::engine::{Engine, Io, Mode, Plan};
use crate::fault::Fault;
use crate::machine;
use crate::monitor::{Monitor, RunError};
use crate::supervisor::PortLease;
use server::FloorServer;

/// What to do.
#[derive(Debug, Clone)]
pub struct FloorOptions {
    /// How many.
    pub connections: u32,
    /// One 32-byte write and read each way per connection.
    pub echo: bool,
    /// Connections in flight.
    pub window: usize,
    /// The end of everything.
    pub timeout: Duration,
    /// No progress lines.
    pub quiet: bool,
}

/// The JSON object.
#[derive(Debug, Clone, Serialize)]
#[allow(missing_docs)]
pub struct FloorReport {
    pub connections: u64,
    pub seconds: f64,
    pub per_s: f64,
    pub kernel_bytes_per_conn: Option<f64>,
    /// Both ends together, until the last is made (or echoed).
    pub cpu_us_per_conn: f64,
}

/// A report, and what stands beside it.
#[derive(Debug, Clone)]
pub struct FloorResult {
    /// The JSON object.
    pub report: FloorReport,
    /// Server threads.
    pub workers: usize,
    /// Faults by name.
    pub errors: std::collections::BTreeMap<String, u64>,
}

/// Runs it.
pub fn run(options: &FloorOptions) -> Result<FloorResult, RunError> {
    let port = PortLease::take().map_err(|error| RunError::Unreachable(error.to_string()))?;
    let server = FloorServer::start(port.address(), options.connections, options.echo)?;
    let target: SocketAddr = port.address();
    let plan = Plan {
        connections: options.connections,
        targets: vec![target],
        rate: None,
        window: options.window,
        ready_ms_max: READY_MS_MAX,
        ..Plan::default()
    };
    let echo = options.echo;
    let engine = Engine::start(plan, move |share| FloorMode::new(share.count, echo))?;
    let slab_before = machine::slab_bytes();
    let mut monitor =
        Monitor::new(u64::from(options.connections), options.timeout, options.quiet).with_server_inside();
    let cpu_before = sys::process_cpu_time();
    let begun_us = engine.begin();
    monitor.watch(&engine, |sum| sum.ready + sum.failed >= u64::from(options.connections));
    // The server's side of the last ones may still be under way.
    let client_done_us = monitor.sum().last_ready_us;
    let ready = monitor.sum().ready;
    while server.accepted() < ready && !monitor.is_over() {
        std::thread::sleep(Duration::from_micros(100));
    }
    let server_done_us = if options.echo { client_done_us } else { server_done(&server, &engine, begun_us) };
    let slab_after = machine::slab_bytes();
    let cpu = sys::process_cpu_time().saturating_sub(cpu_before);
    let workers = server.workers();
    let errors = monitor.sum().faults.clone();
    monitor.finish();
    // Together: workers whose clients are gone would spin on a thousand resets.
    server.begin_stop();
    engine.stop()?;
    server.stop();
    let seconds = client_done_us.max(server_done_us).saturating_sub(begun_us) as f64 / 1e6;
    let grown = slab_before.zip(slab_after).map(|(before, after)| after as f64 - before as f64);
    let report = FloorReport {
        connections: ready,
        seconds,
        per_s: if seconds > 0.0 { ready as f64 / seconds } else { 0.0 },
        kernel_bytes_per_conn: grown.map(|grown| grown / 2.0 / ready.max(1) as f64),
        cpu_us_per_conn: cpu.as_secs_f64() * 1e6 / ready.max(1) as f64,
    };
    Ok(FloorResult { report, workers, errors })
}

/// When the server accepted the last connection, in the engine's time.
fn server_done<P: Send + 'static>(server: &FloorServer, engine: &Engine<P>, begun_us: u64) -> u64 {
    let ago_us = server.last_accept().map_or(0, |at| at.elapsed().as_micros() as u64);
    engine.now_us().saturating_sub(ago_us).max(begun_us)
}

struct FloorMode {
    echo: bool,
    /// Bytes of the echo that have come. Empty without echo.
    echoed: Vec<u8>,
}

impl FloorMode {
    fn new(count: u32, echo: bool) -> FloorMode {
        FloorMode { echo, echoed: if echo { vec![0; count as usize] } else { Vec::new() } }
    }
}

impl Mode for FloorMode {
    type Part = ();

    fn greet(&mut self, index: u32, _: u64, out: &mut BytesMut) {
        if self.echo {
            self.echoed[index as usize] = 0;
            out.extend_from_slice(&[0x55; ECHO_BYTES]);
        }
    }

    fn ready_at_once(&self) -> bool {
        !self.echo
    }

    fn receive(&mut self, index: u32, bytes: &[u8], io: &mut Io) -> Result<usize, Fault> {
        let Some(echoed) = self.echoed.get_mut(index as usize) else { return Err(Fault::BadFrame) };
        let have = usize::from(*echoed) + bytes.len();
        if have > ECHO_BYTES {
            return Err(Fault::BadFrame);
        }
        *echoed = have as u8;
        if have == ECHO_BYTES {
            io.ready(index);
        }
        Ok(bytes.len())
    }

    fn lost(&mut self, _: u32, _: &Fault, _: &mut Io) -> Option<u64> {
        None
    }

    fn tick(&mut self, _: &mut Io) -> Option<u64> {
        None
    }

    fn finish(self) {}
}

/// About a login frame and its answer.
const ECHO_BYTES: usize = 32;
const READY_MS_MAX: u64 = 30_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_with_and_without_echo() {
        for echo in [false, true] {
            let options = FloorOptions {
                connections: 2_000,
                echo,
                window: 256,
                timeout: Duration::from_secs(60),
                quiet: true,
            };
            let result = run(&options).unwrap();
            assert_eq!(result.report.connections, 2_000, "{:?}", result.errors);
            assert!(result.errors.is_empty(), "{:?}", result.errors);
            assert!(result.report.per_s > 0.0);
        }
    }
}
