//! `million`: a crowd at one gateway, measured from an empty one to an empty one: floor, storm, hold, heartbeats, messages
//! among the idle, state killed, teardown, burst, floor. This file has the options and the tries; `phases.rs` one try.
//!
//! Trap: a try that would not end in time leaves phases out and says so; it never stretches the time, because whoever
//! started it counts on the end.

mod attack;
mod burst;
pub(crate) mod crowd;
mod floors;
pub(crate) mod live;
mod machine;
mod phases;
mod plan;
pub(crate) mod probe;
mod report;
mod system;
mod usage;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use serde_json::Value;

use crate::fail_if::FailIf;
use crate::monitor::{RunError, watch_terminate};
use crate::report::{value, write_json};
use phases::Try;
use report::{MillionReport, median};

/// The options of `loadtest million`.
#[derive(Debug, Clone, Args)]
pub struct MillionArgs {
    /// How many log in
    #[arg(long, value_name = "N", default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(100..))]
    connections: u32,
    /// How often everything is measured; with more than one the table shows medians
    #[arg(long, value_name = "K", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=9))]
    runs: u32,
    /// A run ends after so many seconds; what would not fit is left out, and said to be
    #[arg(long, value_name = "S", default_value_t = 600)]
    timeout: u64,
    /// How often a run is tried while its floors differ, if the time allows
    #[arg(long, value_name = "K", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=3))]
    tries: u32,
    /// Phases to leave out
    #[arg(long, value_name = "PHASE,...", value_delimiter = ',')]
    skip: Vec<Phase>,
    /// Waits a tenth as long, for trying; the figures then mean little
    #[arg(long)]
    short: bool,
    /// Configuration for every gateway, SECTION.KEY=VALUE; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    gateway_set: Vec<String>,
    /// The same for the state server
    #[arg(long, value_name = "KEY=VALUE")]
    state_set: Vec<String>,
    /// Data and logs of the servers [default: target/bench/million here, else the temp dir]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Write the figures as one JSON object; with more runs FILE has the medians and FILE.1, FILE.2 ... each run
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// No progress on standard error
    #[arg(long)]
    quiet: bool,
    /// Exit 1 if this holds for a key of the JSON object, e.g. 'failed>0'; may be repeated
    #[arg(long, value_name = "EXPR")]
    fail_if: Vec<FailIf>,
}

/// What can be left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Phase {
    /// The bare server, before and after
    Floors,
    /// Connecting without login
    Accept,
    /// Messages before anybody is there
    Quiet,
    /// Messages during the storm
    Live,
    /// The idle minute
    Hold,
    /// Messages among the idle
    Messages,
    /// The state server killed
    Kill,
    /// Half a minute after the last has left
    After,
    /// The same users again
    Known,
    /// Slow readers and half frames
    Burst,
}

/// Runs it all. Why it failed, if a threshold says so.
pub fn run(args: &MillionArgs) -> Result<Vec<String>, RunError> {
    let template = value(&MillionReport::default());
    if let Some(wrong) = args.fail_if.iter().find(|fail_if| template.get(fail_if.key()).is_none()) {
        return Err(RunError::Usage(format!("--fail-if: no key `{}`", wrong.key())));
    }
    machine::check(args.connections)?;
    // The servers must go with it.
    watch_terminate();
    let folder = folder(args.data.as_deref())?;
    let mut runs: Vec<Value> = Vec::new();
    for number in 1..=args.runs {
        if args.runs > 1 {
            println!("run {number} of {}", args.runs);
        }
        runs.push(value(&one_run(args, &folder)?));
        if let Some(path) = args.json.as_ref().filter(|_| args.runs > 1) {
            write_json(&PathBuf::from(format!("{}.{number}", path.display())), &runs[runs.len() - 1])?;
        }
    }
    let result = if runs.len() == 1 { runs.remove(0) } else { median(&runs) };
    if args.runs > 1 {
        println!("medians of {} runs\n{}", args.runs, crate::report::table(&result, &[]));
    } else {
        println!("goals are judged on the median of three runs: --runs 3, or the JSON files of three");
    }
    if let Some(path) = &args.json {
        write_json(path, &result)?;
    }
    Ok(args.fail_if.iter().filter_map(|fail_if| fail_if.judge(&result)).collect())
}

/// Tries until the floors agree, at most so often and only while another try fits into the time.
fn one_run(args: &MillionArgs, folder: &Path) -> Result<MillionReport, RunError> {
    let until = Instant::now() + Duration::from_secs(args.timeout);
    for number in 1.. {
        let began = Instant::now();
        let (report, floors) = Try::new(args, folder, until).run()?;
        println!("{}", report.table());
        report.remarks(&floors).iter().for_each(|remark| println!("{remark}"));
        if !report.noisy || args.skip.contains(&Phase::Floors) {
            return Ok(report);
        }
        let left = until.saturating_duration_since(Instant::now());
        match number < args.tries && fits(began.elapsed(), left) {
            true => println!("noisy: once more"),
            false => return Ok(report),
        }
    }
    unreachable!("the loop ends by its last try")
}

/// Whether there is time for one more try.
fn fits(took: Duration, left: Duration) -> bool {
    took + took / 20 < left
}

fn folder(wanted: Option<&Path>) -> Result<PathBuf, RunError> {
    let target = Path::new("target");
    let folder = match wanted {
        Some(folder) => folder.to_owned(),
        None if target.is_dir() => target.join("bench/million"),
        None => std::env::temp_dir().join("rookery-million"),
    };
    std::fs::create_dir_all(&folder)
        .and_then(|()| folder.canonicalize())
        .map_err(|error| RunError::Io { what: format!("cannot make {}", folder.display()), error })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_noisy_try_is_repeated_while_there_is_time() {
        let seconds = Duration::from_secs;
        assert!(fits(seconds(100), seconds(110)));
        assert!(!fits(seconds(100), seconds(100)));
        assert!(!fits(seconds(580), seconds(20)), "a million has one");
    }
}
