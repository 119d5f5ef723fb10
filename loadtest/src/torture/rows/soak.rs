//! Long ones: a hundred kills under thousands of connections, and hours of a crowd that stays. Main thread; the crowd is the
//! engine's.
//!
//! Trap: a history of hours would fill the memory, so loads follow each other, each judged by itself. And what a server takes while
//! it works goes up and down by more in a second than a leak grows in an hour: it is looked at in between, when nobody writes.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rand::Rng;

use super::common::{PATIENCE, QUIET_MAX, expect_pushed};
use crate::million::crowd::{Crowd, Who};
use crate::supervisor::ClusterOptions;
use crate::torture::tool::{ToolError, process};
use crate::torture::{Plan, Round, Row, TortureError, World};

/// K100: state killed again and again under load, with a crowd that must not notice.
fn hundred_kills(round: &mut Round) -> Result<(), TortureError> {
    let (kills, people) = if round.tenth || round.gate { (10, 2_000) } else { (100, 10_000) };
    let mut world = round.world(one())?;
    let mut crowd = crowd(&world, people, Duration::from_secs(3_600))?;
    let mut probe = world.probe(0)?;
    let mut done = 0;
    while done < kills {
        let load = world.load(Plan { per_s: KILLS_PER_S, ..Plan::default() })?;
        let (acked, began) = (load.acked(), Instant::now());
        for _ in 0..kills.min(KILLS_PER_LOAD) {
            load.wait_acked(round.random.random_range(500..2_500), PATIENCE)?;
            let process = &mut world.cluster.states[0].process;
            round.fault(&load, "state-0 SIGKILL");
            let killed = Instant::now();
            process.kill()?;
            process.spawn_again()?;
            let accepted = probe.accepted(PATIENCE).map_err(|error| TortureError::io("the probe", error))?;
            let accepting = accepted.map_or(PATIENCE, |at| at - killed).as_secs_f64();
            round.worst("accepting_s", accepting);
            round.expect(accepting <= ACCEPTING_S_MAX, || format!("accepting again after {accepting:.2} s"));
            process.wait_ready(PATIENCE)?;
            load.healed("state-0");
            load.wait_acked(500, PATIENCE)?;
            crowd.step();
            done += 1;
        }
        let per_s = (load.acked() - acked) as f64 / began.elapsed().as_secs_f64();
        eprintln!("K100: {done} of {kills} kills, {per_s:.0} acknowledged per second");
        let verdict = round.judge(&load.finish(QUIET_MAX)?);
        expect_pushed(round, &verdict);
    }
    crowd.hold(Duration::from_secs(1));
    let dropped = crowd.sum().dropped;
    round.facts.connections_dropped += dropped;
    round.worst("crowd_connections", crowd.sum().ready_now() as f64);
    round.expect(dropped == 0, || format!("{dropped} of {people} idle connections were dropped"));
    crowd.leave()?;
    round.keep(world)
}

/// S1: fifteen thousand stay for hours while some write.
fn soak(round: &mut Round) -> Result<(), TortureError> {
    let minutes = match (round.minutes, round.gate, round.tenth) {
        (Some(minutes), ..) => minutes,
        (_, true, _) => 2,
        (_, _, true) => 24,
        _ => 240,
    };
    let long = Duration::from_secs(60 * u64::from(minutes));
    // Every load has users, chats and groups of its own, and a cache that takes them in until it is full would look like a leak for hours: these
    // are full within the first tenth of the shortest soak.
    let state_sets =
        ["limits.user_cache_max=48", "limits.chat_cache_max=96", "limits.group_cache_members_max=24"]
            .map(str::to_owned)
            .into();
    let mut world = round.world(ClusterOptions { state_sets, ..one() })?;
    let mut crowd = crowd(&world, SOAK_PEOPLE, long + Duration::from_secs(600))?;
    let (gateway, state) = (&world.cluster.gateways[0], &world.cluster.states[0]);
    let servers = [(gateway.process.pid()?, gateway.admin), (state.process.pid()?, state.admin)];
    let began = Instant::now();
    // Seconds, then gateway and state.
    let mut samples: Vec<(f64, [Sample; 2])> = Vec::new();
    while began.elapsed() < long {
        let is_first = samples.is_empty();
        let per_s = if is_first { SOAK_FIRST_PER_S } else { SOAK_PER_S };
        let load = world.load(Plan { per_s, ..Plan::default() })?;
        if is_first {
            // A buffer stays as large as the largest batch that went through it, and batches are large behind whatever stands still: it is for
            // the first load to fill them, or a busy moment of this machine in the middle would look like a leak.
            for server in [&world.cluster.states[0].process, &world.cluster.gateways[0].process] {
                load.wait_acked(u64::from(per_s), PATIENCE)?;
                server.pause()?;
                std::thread::sleep(SOAK_PAUSE);
                server.resume()?;
            }
        }
        crowd.hold(SOAK_LOAD);
        round.judge(&load.finish(QUIET_MAX)?);
        // What is free goes back to the kernel a second later.
        crowd.hold(Duration::from_secs(2));
        for _ in 0..SAMPLES_AT_REST {
            crowd.hold(Duration::from_secs(1));
            let [gateway, state] = servers.map(|(pid, admin)| Sample::take(pid, admin));
            samples.push((began.elapsed().as_secs_f64(), [gateway?, state?]));
        }
        if let Some((at_s, [gateway, state])) = samples.last() {
            eprintln!("S1: {:.1} min, gateway {gateway}, state {state}", at_s / 60.0);
        }
        if crate::monitor::interrupted() {
            break;
        }
    }
    // The first tenth is for filling what is filled once.
    let settled: Vec<_> = samples.split_off(samples.len() / 10);
    let lasted = Duration::from_secs_f64(settled.last().map_or(0.0, |(at, ..)| *at));
    for (place, memory, heap, mib, files) in [
        (0, "gateway_percent_per_h", "gateway_heap_percent_per_h", "gateway_mib", "gateway_files"),
        (1, "state_percent_per_h", "state_heap_percent_per_h", "state_mib", "state_files"),
    ] {
        let line = |of: fn(&Sample) -> f64| -> Vec<(f64, f64)> {
            settled.iter().map(|(at, servers)| (*at, of(&servers[place]))).collect()
        };
        let most =
            |of: fn(&Sample) -> f64| line(of).iter().fold(0.0, |most: f64, (_, value)| most.max(*value));
        let slope = slope_percent_per_h(&line(|sample| sample.memory));
        round.worst(memory, slope);
        round.worst(heap, slope_percent_per_h(&line(|sample| sample.heap)));
        round.worst(mib, most(|sample| sample.memory) / f64::from(1 << 20));
        // What a cache takes once is no slope, but looks like one to whoever looks for a short while.
        round.expect(slope < SLOPE_MAX || lasted < SLOPE_AFTER, || format!("{memory} is {slope:.2}"));
        let open = line(|sample| sample.files);
        let growth = open.last().map_or(0.0, |(_, last)| last - open[0].1);
        round.worst(files, most(|sample| sample.files));
        round.expect(growth.abs() <= FILES_GROWTH_MAX, || format!("{files} grew by {growth:.0}"));
    }
    let dropped = crowd.sum().dropped;
    round.facts.connections_dropped += dropped;
    round.expect(dropped == 0, || format!("{dropped} of {SOAK_PEOPLE} idle connections were dropped"));
    round.worst("minutes", began.elapsed().as_secs_f64() / 60.0);
    crowd.leave()?;
    round.keep(world)
}

/// What a server takes: bytes that are resident, bytes that its allocator has given out (which tells a leak from pages that
/// come and go), open files.
struct Sample {
    memory: f64,
    heap: f64,
    files: f64,
}

impl Sample {
    fn take(pid: u32, admin: SocketAddr) -> Result<Sample, ToolError> {
        Ok(Sample {
            memory: process::memory(pid)? as f64,
            heap: process::metric(admin, "process_heap_in_use_bytes")?,
            files: process::open_files(pid)? as f64,
        })
    }
}

impl std::fmt::Display for Sample {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.0} kB, of these in use {:.0}", self.memory / 1_024.0, self.heap / 1_024.0)
    }
}

fn one() -> ClusterOptions {
    ClusterOptions::default()
}

/// So many logged in at the first gateway.
fn crowd(world: &World, people: u32, timeout: Duration) -> Result<Crowd, TortureError> {
    let who = Who { run: world.user("c"), visit: 0, login: true };
    let mut crowd = Crowd::new(world.cluster.gateways[0].client, people, who, timeout, true)?;
    crowd.begin();
    let until = Instant::now() + CROWD_LOGIN_MAX;
    while !crowd.is_settled() {
        if Instant::now() > until {
            return Err(TortureError::Late { what: "login of the crowd", waited: CROWD_LOGIN_MAX });
        }
        crowd.step();
    }
    if crowd.sum().failed > 0 {
        return Err(TortureError::Load(format!("{} of the crowd cannot log in", crowd.sum().failed)));
    }
    Ok(crowd)
}

/// The least squares line through (seconds, value), in percent of the mean per hour.
fn slope_percent_per_h(points: &[(f64, f64)]) -> f64 {
    let count = points.len() as f64;
    let mean = |pick: fn(&(f64, f64)) -> f64| points.iter().map(pick).sum::<f64>() / count;
    let (mean_x, mean_y) = (mean(|point| point.0), mean(|point| point.1));
    let over: f64 = points.iter().map(|(x, y)| (x - mean_x) * (y - mean_y)).sum();
    let under: f64 = points.iter().map(|(x, _)| (x - mean_x).powi(2)).sum();
    if under == 0.0 || mean_y == 0.0 { 0.0 } else { over / under * 3_600.0 / mean_y * 100.0 }
}

/// Of the issue: 100 kills under 2,000 messages a second.
const KILLS_PER_S: u32 = 2_000;
const KILLS_PER_LOAD: u32 = 10;
const ACCEPTING_S_MAX: f64 = 2.0;
const SOAK_PEOPLE: u32 = 15_000;
const SOAK_PER_S: u32 = 200;
/// Of the first load.
const SOAK_FIRST_PER_S: u32 = 2_000;
/// Shorter than what a gateway takes for death (`link.dead_ms`).
const SOAK_PAUSE: Duration = Duration::from_millis(500);
/// With what follows a load, a minute.
const SOAK_LOAD: Duration = Duration::from_secs(48);
const SAMPLES_AT_REST: u32 = 8;
const SLOPE_MAX: f64 = 1.0;
const SLOPE_AFTER: Duration = Duration::from_secs(1_200);
/// Connections between servers come and go.
const FILES_GROWTH_MAX: f64 = 8.0;
/// Of thousands, on a machine that has other things to do.
const CROWD_LOGIN_MAX: Duration = Duration::from_secs(120);

/// Of this file.
pub const ROWS: &[Row] = &[
    Row {
        name: "K100",
        fault: "state killed 100 times (SIGKILL) under 2,000 messages a second and 10,000 connections",
        full_rounds: 1,
        gate: false,
        run: hundred_kills,
    },
    Row {
        name: "S1",
        fault: "soak: 15,000 connections for four hours",
        full_rounds: 1,
        gate: false,
        run: soak,
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slope_in_percent_of_the_mean() {
        let line: Vec<(f64, f64)> =
            (0..100).map(|at| (f64::from(at) * 36.0, 1_000.0 + f64::from(at))).collect();
        assert!((slope_percent_per_h(&line) - 100.0 / 1_049.5 * 100.0).abs() < 0.1);
        assert_eq!(slope_percent_per_h(&[(1.0, 5.0)]), 0.0);
    }
}
