//! Processes that die: state, gateway, Redis, all of them, by SIGKILL at a moment drawn from the seed; and all of them one
//! by one, by SIGTERM. Main thread.
//!
//! Trap: the time to accept again counts from the kill, the restart included, and there is one state server in every other
//! round, so that nobody else accepts meanwhile.

use std::path::Path;
use std::time::{Duration, Instant};

use rand::Rng;

use super::common::{PATIENCE, QUIET_MAX, expect_acked, expect_no_acks, expect_pushed, pairs, redis};
use crate::monitor::interrupted;
use crate::supervisor::ClusterOptions;
use crate::torture::history::{History, What};
use crate::torture::idlers::Idlers;
use crate::torture::tool::aof;
use crate::torture::tool::trace::{Inject, Trace};
use crate::torture::{Excuses, Load, Plan, Round, Row, TortureError, Verdict};

/// F1: a state server.
fn state(round: &mut Round) -> Result<(), TortureError> {
    let states = 1 + (round.seed % 2) as usize;
    let mut world = round.world(ClusterOptions { gateways: 2, states, ..ClusterOptions::default() })?;
    let mut probe = world.probe(0)?;
    let load = world.load(Plan::default())?;
    let before = round.random.random_range(50..800);
    load.wait_acked(round.many(before), PATIENCE)?;
    let victim = round.random.random_range(0..states);
    let process = &mut world.cluster.states[victim].process;
    round.fault(&load, format!("{} SIGKILL", process.label()));
    let killed = Instant::now();
    process.kill()?;
    process.spawn_again()?;
    let accepted = probe.accepted(PATIENCE).map_err(|error| TortureError::io("the probe", error))?;
    let accepting = accepted.map_or(PATIENCE, |at| at - killed).as_secs_f64();
    round.worst("accepting_s", accepting);
    round.expect(accepting <= ACCEPTING_S_MAX, || format!("accepting again after {accepting:.2} s"));
    process.wait_ready(PATIENCE)?;
    load.healed("state");
    let more = round.many(300);
    expect_acked(round, &load, more, PATIENCE, "more_acked_s");
    let verdict = round.judge(&load.finish(QUIET_MAX)?);
    expect_pushed(round, &verdict);
    round.keep(world)
}

/// F2: a gateway with a crowd that does nothing.
fn gateway(round: &mut Round) -> Result<(), TortureError> {
    let crowd = if round.gate { 500 } else { 5_000 };
    let mut world = round.world(pairs())?;
    let victim = round.random.random_range(0..2);
    // The other one is where they can go.
    let addresses = [victim, 1 - victim].map(|gateway| world.cluster.gateways[gateway].client);
    let idlers = Idlers::start(crowd, &addresses, &world.user("idle"), PATIENCE)?;
    let load = world.load(Plan { gateways_live: false, ..Plan::default() })?;
    let before = round.random.random_range(50..400);
    load.wait_acked(round.many(before), PATIENCE)?;
    let process = &mut world.cluster.gateways[victim].process;
    round.fault(&load, format!("{} SIGKILL", process.label()));
    let killed = Instant::now();
    process.kill()?;
    process.spawn_again()?;
    let fell = idlers.wait_below(crowd / 100, PATIENCE);
    round.expect(fell, || "the crowd did not notice that its gateway died".into());
    let back = idlers.wait_online(crowd - crowd / 100, PATIENCE).then(|| killed.elapsed());
    let back = back.unwrap_or(PATIENCE).as_secs_f64();
    round.worst("back_99_s", back);
    round.expect(back <= BACK_S_MAX, || format!("99 % of {crowd} were back after {back:.1} s"));
    process.wait_ready(PATIENCE)?;
    load.healed("gateway");
    let more = round.many(300);
    expect_acked(round, &load, more, PATIENCE, "more_acked_s");
    round.judge(&load.finish(QUIET_MAX)?);
    drop(idlers);
    round.keep(world)
}

/// F3: Redis, while its syncs are slow.
fn store(round: &mut Round) -> Result<(), TortureError> {
    let mut world = round.world(pairs())?;
    let load = world.load(Plan::default())?;
    load.wait_acked(50, PATIENCE)?;
    let pid = redis(&mut world)?.process.pid()?;
    let slow = Duration::from_millis(round.random.random_range(5..60));
    let log = round.folder().join(format!("F3-{}.strace", round.seed));
    let trace = Trace::attach(pid, &Inject::SlowSync(slow), &log)?;
    let before = round.random.random_range(50..400);
    load.wait_acked(round.many(before), PATIENCE)?;
    let process = &mut redis(&mut world)?.process;
    round.fault(&load, format!("redis SIGKILL, syncs slowed by {slow:?}"));
    process.kill()?;
    drop(trace);
    for path in [log.with_extension("complaints"), log] {
        // It is of no use any more.
        let _ = std::fs::remove_file(path);
    }
    expect_no_acks(round, &load, Duration::from_millis(if round.gate { 700 } else { 2_000 }));
    let began = Instant::now();
    process.restart()?;
    load.healed("redis");
    load.wait_acked(1, PATIENCE)?;
    round.worst("accepting_s", began.elapsed().as_secs_f64());
    let more = round.many(300);
    expect_acked(round, &load, more, PATIENCE, "more_acked_s");
    round.judge(&load.finish(QUIET_MAX)?);
    round.keep(world)
}

/// F3n: the same with a sync per second, which loses; a negative control.
fn store_everysec(round: &mut Round) -> Result<(), TortureError> {
    let redis_settings = vec![("appendfsync".to_owned(), "everysec".to_owned())];
    let mut world = round.world(ClusterOptions { redis_settings, ..pairs() })?;
    // Whoever is there is shown a message before it is lost, so everybody has a device that is away.
    let plan = Plan { per_s: CONTROL_PER_S, too_large_every: 0, ..Plan::default() };
    let load = world.load(Plan { second_devices: plan.users, away: plan.users, ..plan })?;
    load.wait_acked(200 + round.random.random_range(0..400), PATIENCE)?;
    let log = round.folder().join(format!("F3n-{}.strace", round.seed));
    let mut holds_back = false;
    for _ in 0..CONTROL_KILLS_MAX {
        let redis = redis(&mut world)?;
        // Redis keeps what it would append to itself while a sync is under way, for up to two seconds.
        let trace = Trace::attach(redis.process.pid()?, &Inject::SlowSync(CONTROL_SYNC), &log)?;
        let bytes = bytes_held_back(&load, redis.folder())?;
        load.fault(format!("redis SIGKILL, everysec, syncs slowed by {CONTROL_SYNC:?}"));
        redis.process.kill()?;
        drop(trace);
        // Something was written between the last look and the kill: that kill proves nothing.
        holds_back = aof::bytes(&aof::tail(redis.folder())?)? == bytes;
        redis.process.restart()?;
        if holds_back {
            break;
        }
        load.wait_acked(1, PATIENCE)?;
    }
    for path in [log.with_extension("complaints"), log] {
        let _ = std::fs::remove_file(path);
    }
    round.expect(holds_back, || "Redis was never killed with acknowledged messages unwritten".into());
    // Whoever is there is told with the next message of a chat.
    let told = load.wait_history_lost(PATIENCE);
    // What was lost never comes: no need to wait for it long.
    let history = load.finish(Duration::from_secs(6))?;
    let verdict = Verdict::of(&history, Excuses::default());
    round.control(verdict.lost, "acknowledged messages that Redis had not written");
    round.worst("lost", verdict.lost as f64);
    round.expect(told.is_ok() && verdict.histories_lost > 0, || {
        "nobody was told that history was lost".into()
    });
    // The store lost its tail; the next round gets a new one.
    drop(world);
    Ok(())
}

/// Waits until messages are acknowledged that Redis has yet to append to its file: more are than had been sent when the file
/// had its present length, which is returned.
fn bytes_held_back(load: &Load, folder: &Path) -> Result<u64, TortureError> {
    let look = || Ok::<u64, TortureError>(aof::bytes(&aof::tail(folder)?)?);
    let until = Instant::now() + PATIENCE;
    let (mut bytes, mut sent) = (look()?, load.sent());
    while load.acked() < sent + CONTROL_UNWRITTEN {
        if Instant::now() > until || interrupted() {
            return Err(TortureError::Late { what: "unwritten messages", waited: PATIENCE });
        }
        std::thread::sleep(Duration::from_millis(2));
        let now = look()?;
        if now != bytes {
            (bytes, sent) = (now, load.sent());
        }
    }
    Ok(bytes)
}

/// F4: everything.
fn everything(round: &mut Round) -> Result<(), TortureError> {
    let mut world = round.world(pairs())?;
    let load = world.load(Plan { gateways_live: false, ..Plan::default() })?;
    let before = round.random.random_range(50..800);
    load.wait_acked(round.many(before), PATIENCE)?;
    round.fault(&load, "everything SIGKILL");
    let killed = Instant::now();
    for process in world.processes() {
        process.kill()?;
    }
    world.heal()?;
    let accepted = load.wait_online(PATIENCE).and_then(|()| load.wait_acked(100, PATIENCE));
    let service = killed.elapsed().as_secs_f64();
    load.healed("everything");
    accepted?;
    round.worst("full_service_s", service);
    round.expect(service <= FULL_SERVICE_S_MAX, || format!("full service after {service:.1} s"));
    round.judge(&load.finish(QUIET_MAX)?);
    round.keep(world)
}

/// F6: everything of ours, one after the other, in order.
fn rolling(round: &mut Round) -> Result<(), TortureError> {
    let drain_ms = if round.gate { 1_000 } else { 5_000 };
    let gateway_sets = vec![format!("shutdown.drain_ms={drain_ms}"), "shutdown.hard_ms=500".into()];
    let mut world = round.world(ClusterOptions { gateway_sets, ..pairs() })?;
    let load = world.load(Plan { gateways_live: false, ..Plan::default() })?;
    load.wait_acked(round.many(100), PATIENCE)?;
    for state in 0..2 {
        let process = &mut world.cluster.states[state].process;
        round.fault(&load, format!("{} SIGTERM", process.label()));
        process.terminate()?;
        process.restart()?;
        load.healed(process.label());
        let more = round.many(100);
        expect_acked(round, &load, more, PATIENCE, "more_acked_s");
    }
    let mut drains = Vec::new();
    for gateway in 0..2 {
        let process = &mut world.cluster.gateways[gateway].process;
        round.fault(&load, format!("{} SIGTERM", process.label()));
        let from_us = load.now_us();
        process.terminate()?;
        drains.push((from_us, load.now_us()));
        process.restart()?;
        load.healed(process.label());
        load.wait_online(PATIENCE)?;
        let more = round.many(100);
        expect_acked(round, &load, more, PATIENCE, "more_acked_s");
    }
    let history = load.finish(QUIET_MAX)?;
    round.judge(&history);
    for (from_us, to_us) in drains {
        let (closes, spread_ms) = closes(&history, from_us, to_us);
        round.worst("closes_spread_ms", spread_ms);
        // A few draws may fall together; many do not.
        let wanted = f64::from(drain_ms) / 3.0;
        round.expect(closes < 8 || spread_ms >= wanted, || {
            format!("{closes} connections were closed within {spread_ms:.0} ms of a drain of {drain_ms} ms")
        });
    }
    // What ended a state server must not have ended a connection.
    let first_drain_us = history.records.iter().find_map(|record| match &record.what {
        What::FaultBegin { fault } if fault.starts_with("gateway") => Some(record.at_us),
        _ => None,
    });
    let early = history.records.iter().filter(|record| {
        matches!(record.what, What::Disconnected { .. }) && Some(record.at_us) < first_drain_us
    });
    let early = early.count() as u64;
    round.facts.connections_dropped += early;
    round.expect(early == 0, || format!("{early} connections ended with a state server"));
    round.keep(world)
}

/// Connections that ended between two moments, and the time between the first and the last of them.
fn closes(history: &History, from_us: u64, to_us: u64) -> (usize, f64) {
    let times: Vec<u64> = history
        .records
        .iter()
        .filter(|record| matches!(record.what, What::Disconnected { .. }))
        .map(|record| record.at_us)
        .filter(|at_us| (from_us..=to_us).contains(at_us))
        .collect();
    let spread_us = times.last().zip(times.first()).map_or(0, |(last, first)| last - first);
    (times.len(), spread_us as f64 / 1_000.0)
}

/// Few enough for a slow machine to acknowledge [`CONTROL_UNWRITTEN`] of them between two writes of Redis.
const CONTROL_PER_S: u32 = 200;
/// So many acknowledged messages at least are lost with what Redis holds back.
const CONTROL_UNWRITTEN: u64 = 20;
/// Longer than Redis waits for a sync: it then appends without, every two seconds.
const CONTROL_SYNC: Duration = Duration::from_secs(10);
/// A kill that falls between two writes is tried again.
const CONTROL_KILLS_MAX: u32 = 10;
/// Of promises: state accepts again after a kill.
const ACCEPTING_S_MAX: f64 = 2.0;
/// Of promises: 99 % of a gateway's connections are back.
const BACK_S_MAX: f64 = 10.0;
/// Of promises: everything serves again.
const FULL_SERVICE_S_MAX: f64 = 10.0;

/// Of this file.
pub const ROWS: &[Row] = &[
    Row {
        name: "F1",
        fault: "state server killed at a random moment (SIGKILL), restarted",
        full_rounds: 300,
        gate: true,
        run: state,
    },
    Row {
        name: "F2",
        fault: "gateway with a crowd killed (SIGKILL), restarted",
        full_rounds: 300,
        gate: true,
        run: gateway,
    },
    Row {
        name: "F3",
        fault: "Redis killed (SIGKILL) while its syncs are slow",
        full_rounds: 300,
        gate: true,
        run: store,
    },
    Row {
        name: "F3n",
        fault: "the same with appendfsync everysec: must be found to lose",
        full_rounds: 5,
        gate: true,
        run: store_everysec,
    },
    Row {
        name: "F4",
        fault: "everything killed at once (SIGKILL)",
        full_rounds: 50,
        gate: true,
        run: everything,
    },
    Row {
        name: "F6",
        fault: "rolling restart (SIGTERM, one by one)",
        full_rounds: 50,
        gate: true,
        run: rolling,
    },
];
