//! F16, F17, F19: the disk below Redis is full, fails to sync, or loses what no sync covered. Main thread.
//!
//! Trap: a Redis with `appendfsync always` ends itself when it cannot write or sync. That is what we rest on: the rows expect
//! it to, and start it again.

use std::time::{Duration, Instant};

use rand::Rng;

use super::common::{PATIENCE, expect_acked, expect_no_acks, redis, settle};
use crate::supervisor::ClusterOptions;
use crate::torture::tool::disk::SmallDisk;
use crate::torture::tool::trace::{Inject, Trace, covered_bytes};
use crate::torture::tool::{aof, wait_until};
use crate::torture::{Load, Plan, Round, Row, TortureError, World};

/// The rows of this file.
pub const ROWS: &[Row] = &[
    Row { name: "F16", fault: "disk full under Redis", full_rounds: 20, gate: true, run: disk_full },
    Row { name: "F17", fault: "fdatasync fails with EIO", full_rounds: 20, gate: false, run: sync_fails },
    Row {
        name: "F19",
        fault: "power lost: the file is cut to what the last sync covered",
        full_rounds: 50,
        gate: false,
        run: power_loss,
    },
];

/// The file stands on a disk of 16 MiB, which something else fills.
fn disk_full(round: &mut Round) -> Result<(), TortureError> {
    // Declared first: it goes when the Redis on it is gone.
    let disk = SmallDisk::mount(16 << 20)?;
    let folder = disk.path().display().to_string();
    let options = ClusterOptions { states: 2, ..unrewritten() };
    let mut options = options;
    options.redis_settings.push(("dir".into(), folder));
    let mut world = round.world(options)?;
    let load = world.load(Plan::default())?;
    load.wait_acked(500, PATIENCE)?;
    round.fault(&load, "the disk is full");
    let filler = disk.fill(round.random.random_range(0..64 * 1024))?;
    expect_redis_ends(round, &mut world)?;
    expect_no_acks(round, &load, DOWN);
    drop(filler);
    restart_redis(round, &mut world, &load)?;
    settle(round, load, PATIENCE)?;
    Ok(())
}

fn sync_fails(round: &mut Round) -> Result<(), TortureError> {
    let mut world = round.world(ClusterOptions { states: 2, ..unrewritten() })?;
    let load = world.load(Plan::default())?;
    load.wait_acked(500, PATIENCE)?;
    let from = round.random.random_range(1..50);
    let pid = redis(&mut world)?.process.pid()?;
    let log = redis(&mut world)?.folder().join("strace");
    round.fault(&load, format!("sync number {from} from now fails"));
    let trace = Trace::attach(pid, &Inject::FailSync(from), &log)?;
    expect_redis_ends(round, &mut world)?;
    drop(trace);
    expect_no_acks(round, &load, DOWN);
    restart_redis(round, &mut world, &load)?;
    settle(round, load, PATIENCE)?;
    round.keep(world)
}

/// Killed at a random instant with slow syncs, and everything that no completed sync covers is gone.
fn power_loss(round: &mut Round) -> Result<(), TortureError> {
    let mut world = round.world(ClusterOptions { states: 2, ..unrewritten() })?;
    let load = world.load(Plan::default())?;
    load.wait_acked(500, PATIENCE)?;
    let store = redis(&mut world)?;
    let (folder, pid) = (store.folder().to_owned(), store.process.pid()?);
    let file = aof::tail(&folder)?;
    // Stopped meanwhile, so that the length is that of the moment at which the trace begins.
    store.process.pause()?;
    let stopped = wait_until(PATIENCE, || is_stopped(pid));
    let before = aof::bytes(&file)?;
    let slow = Duration::from_millis(round.random.random_range(2..30));
    let trace = Trace::attach(pid, &Inject::NoteSync(slow), &folder.join("strace"));
    store.process.resume()?;
    let trace = trace?;
    round.expect(stopped, || "Redis could not be stopped for the trace".into());
    load.wait_acked(100, PATIENCE)?;
    std::thread::sleep(Duration::from_micros(round.random.random_range(0..200_000)));
    round.fault(&load, "power lost under Redis");
    redis(&mut world)?.process.kill()?;
    let log = trace.detach()?;
    let (written, covered) = (aof::bytes(&file)?, covered_bytes(&log, &file, before));
    round.expect(before < covered && covered <= written, || {
        format!("the trace is wrong: {before} bytes before, {covered} covered, {written} written")
    });
    round.worst("cut_bytes", written.saturating_sub(covered) as f64);
    // Of what was not synced a part may have reached the disk all the same.
    let kept = round.random.random_range(covered.min(written)..=written);
    aof::cut(&file, if round.random.random_bool(0.5) { covered } else { kept })?;
    restart_redis(round, &mut world, &load)?;
    settle(round, load, PATIENCE)?;
    round.keep(world)
}

/// A rewrite would put another file in the place of the one that is looked at.
pub fn unrewritten() -> ClusterOptions {
    let never = ("auto-aof-rewrite-percentage".to_owned(), "0".to_owned());
    ClusterOptions { redis_settings: vec![never], ..ClusterOptions::default() }
}

fn expect_redis_ends(round: &mut Round, world: &mut World) -> Result<(), TortureError> {
    let process = &mut redis(world)?.process;
    let ended = wait_until(PATIENCE, || !process.is_running());
    round.expect(ended, || "Redis lives on although it cannot write durably".into());
    Ok(())
}

fn restart_redis(round: &mut Round, world: &mut World, load: &Load) -> Result<(), TortureError> {
    let began = Instant::now();
    redis(world)?.process.restart()?;
    round.worst("redis_start_s", began.elapsed().as_secs_f64());
    load.healed("Redis runs again");
    expect_acked(round, load, 200, PATIENCE, "accepting_s");
    Ok(())
}

fn is_stopped(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.lines().any(|line| line.starts_with("State:") && line.contains("T (stopped)"))
}

/// How long the store stays away.
const DOWN: Duration = Duration::from_secs(1);
