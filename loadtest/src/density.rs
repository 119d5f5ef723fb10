//! `density`: our gateway and peers, each with the same number of idle logged-in connections from the same engine: user
//! memory per connection, and set-ups per second. Main thread.
//!
//! Trap: memory is the slope between a third of the connections and all of them, so that what a server takes at its start
//! (nginx: 420 bytes for every connection that it may ever have) costs it nothing here.

mod memory;
mod server;
mod table;

pub use server::{Running, Server};
pub use table::table;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::adapter::Crowd;
use crate::engine::Plan;
use crate::monitor::{RunError, watch_terminate};
use crate::supervisor::SupervisorError;

/// What to do.
#[derive(Debug, Clone)]
pub struct DensityOptions {
    /// Which servers, in this order.
    pub servers: Vec<Server>,
    /// Idle connections at each.
    pub connections: u32,
    /// How often everything is done; medians are reported.
    pub rounds: u32,
    /// Connections in flight.
    pub window: usize,
    /// Memory that has stood still for so long has settled. Our gateway gives back what a storm took some seconds later.
    pub settle: Duration,
    /// Where servers put their files.
    pub data: PathBuf,
    /// The end of everything.
    pub timeout: Duration,
    /// No progress lines.
    pub quiet: bool,
}

/// The JSON object.
#[derive(Debug, Clone, Serialize)]
pub struct DensityReport {
    /// By name; ourselves as `rookery`.
    pub peers: BTreeMap<String, Figures>,
}

/// Of one server: medians.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[allow(missing_docs)]
pub struct Figures {
    pub bytes_per_conn: f64,
    pub setups_per_s: f64,
}

/// Where a server's figures stand in the JSON object.
pub fn keys(server: Server) -> [String; 2] {
    ["bytes_per_conn", "setups_per_s"].map(|figure| format!("peers.{}.{figure}", server.name()))
}

/// A report, and what stands beside it.
#[derive(Debug, Clone)]
pub struct DensityResult {
    /// The JSON object.
    pub report: DensityReport,
    /// Each server's rounds, in the order of the options.
    pub rounds: Vec<Rounds>,
    /// What was left out, and why.
    pub notes: Vec<String>,
}

/// Everything measured at one server.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct Rounds {
    pub server: Server,
    pub version: String,
    pub bytes_per_conn: Vec<f64>,
    pub setups_per_s: Vec<f64>,
}

/// Runs it.
pub fn run(options: &DensityOptions) -> Result<DensityResult, RunError> {
    std::fs::create_dir_all(&options.data)
        .map_err(|error| RunError::Io { what: format!("cannot make {}", options.data.display()), error })?;
    if options.servers.contains(&Server::Rookery) {
        // So that the supervisor's folders go there as well. Once per process; what stands already is as good.
        let _ = tempfile::env::override_temp_dir(&options.data);
    }
    // The servers must go with it.
    watch_terminate();
    let mut notes = Vec::new();
    let mut all = Vec::new();
    for server in &options.servers {
        match server.version() {
            Some(version) => all.push(Rounds {
                server: *server,
                version,
                bytes_per_conn: Vec::new(),
                setups_per_s: Vec::new(),
            }),
            None => notes.push(format!("{} is not installed: left out", server.name())),
        }
    }
    let until = Instant::now() + options.timeout;
    for round in 1..=options.rounds {
        // One after another within a round, so that a machine that slows down slows all of them.
        for one in &mut all {
            let trial = Trial { options, server: one.server, until };
            let (bytes, settled) = trial.bytes_per_conn()?;
            if !settled {
                notes.push(format!("{}: memory did not stand still in round {round}", one.server.name()));
            }
            let setups = trial.setups_per_s()?;
            one.bytes_per_conn.push(bytes);
            one.setups_per_s.push(setups);
            if !options.quiet {
                let name = one.server.name();
                eprintln!("round {round}  {name}: {bytes:.1} bytes/connection, {setups:.0} set-ups/s");
            }
        }
    }
    let figures = |one: &Rounds| Figures {
        bytes_per_conn: median(&one.bytes_per_conn),
        setups_per_s: median(&one.setups_per_s),
    };
    let peers = all.iter().map(|one| (one.server.name().to_owned(), figures(one))).collect();
    Ok(DensityResult { report: DensityReport { peers }, rounds: all, notes })
}

/// One server, once; each measurement with a fresh process.
struct Trial<'a> {
    options: &'a DensityOptions,
    server: Server,
    until: Instant,
}

impl Trial<'_> {
    /// The slope between a third of the connections and all, and whether memory stood still at both.
    fn bytes_per_conn(&self) -> Result<(f64, bool), RunError> {
        let all = self.options.connections;
        let few = (all / 3).max(1);
        let running = self.start()?;
        let pid = running.pid().map_err(cannot)?;
        let mut first = self.crowd(&running, few)?;
        self.all_ready(&mut first, few)?;
        let (at_few, few_settled) = self.settled(pid, &mut [&mut first]);
        let mut second = self.crowd(&running, all - few)?;
        self.all_ready(&mut second, all - few)?;
        let (at_all, all_settled) = self.settled(pid, &mut [&mut first, &mut second]);
        for (crowd, count) in [(first, few), (second, all - few)] {
            let held = crowd.sum().ready_now();
            if held != u64::from(count) {
                return Err(self.failed(&format!("{held} of {count} connections stayed"), crowd.sum()));
            }
            crowd.end()?;
        }
        let slope = (at_all as f64 - at_few as f64) / f64::from((all - few).max(1));
        if !self.options.quiet {
            let name = self.server.name();
            eprintln!("{name}: {} kB at {few} connections, {} kB at {all}", at_few / 1024, at_all / 1024);
        }
        Ok((slope, few_settled && all_settled))
    }

    fn setups_per_s(&self) -> Result<f64, RunError> {
        let all = self.options.connections;
        let running = self.start()?;
        let mut crowd = self.crowd(&running, all)?;
        let seconds = self.all_ready(&mut crowd, all)?;
        crowd.end()?;
        Ok(f64::from(all) / seconds.max(1e-6))
    }

    fn start(&self) -> Result<Running, RunError> {
        self.server.start(&self.options.data, self.options.connections).map_err(cannot)
    }

    fn crowd(&self, running: &Running, connections: u32) -> Result<Crowd, RunError> {
        let plan = Plan {
            connections,
            targets: vec![running.target()],
            window: self.server.window(self.options.window),
            ..Plan::default()
        };
        let left = self.until.saturating_duration_since(Instant::now());
        Crowd::begin(&self.server.protocol(), plan, left, true)
    }

    fn all_ready(&self, crowd: &mut Crowd, connections: u32) -> Result<f64, RunError> {
        let seconds = crowd.wait_ready();
        let ready = crowd.sum().ready;
        match seconds {
            Some(seconds) if ready == u64::from(connections) => Ok(seconds),
            Some(_) => Err(self.failed(&format!("{ready} of {connections} connections"), crowd.sum())),
            None => Err(self.failed("interrupted, or out of time", crowd.sum())),
        }
    }

    /// Memory when it stands still; meanwhile the connections are kept.
    fn settled(&self, pid: u32, crowds: &mut [&mut Crowd]) -> (u64, bool) {
        let wait = SETTLE_MAX.min(self.until.saturating_duration_since(Instant::now()));
        memory::settled(pid, self.options.settle, wait, |moment| {
            let share = moment / crowds.len() as u32;
            crowds.iter_mut().for_each(|crowd| crowd.hold(share));
            !crowds.iter().any(|crowd| crowd.is_over())
        })
    }

    fn failed(&self, what: &str, sum: &crate::engine::Sample) -> RunError {
        let error = std::io::Error::other(format!("{what}; errors: {:?}", sum.faults));
        RunError::Io { what: self.server.name().to_owned(), error }
    }
}

fn cannot(error: SupervisorError) -> RunError {
    RunError::Unreachable(error.to_string())
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => 0.0,
        count if count % 2 == 1 => sorted[middle],
        _ => (sorted[middle - 1] + sorted[middle]) / 2.0,
    }
}

const SETTLE_MAX: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0]), 2.5);
        assert_eq!(median(&[]), 0.0);
    }
}
