//! Crashes at the points where a message changes hands, and the negative controls that rest on them. Needs binaries built
//! with the cargo feature `failpoints`. Main thread.
//!
//! Trap: a point is set by the environment of a process when it starts. It is taken off again before the restart, or the
//! process would die at it again.

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::time::Duration;

use rand::Rng;

use super::common::{PATIENCE, QUIET_MAX, expect_acked, expect_pushed, pairs, redis};
use super::net::cut_line;
use crate::supervisor::{ClusterOptions, Process};
use crate::torture::{Excuses, Plan, Round, Row, TortureError, Verdict, World};

/// One point.
struct Point {
    name: &'static str,
    /// Whose: `gateway` or `state`.
    part: &'static str,
    /// Passed at least so often before, and at most.
    passes: (u32, u32),
    /// On the way down: somebody must send SIGTERM.
    on_term: bool,
}

const fn point(name: &'static str, part: &'static str, passes: (u32, u32), on_term: bool) -> Point {
    Point { name, part, passes, on_term }
}

const POINTS: [Point; 8] = [
    point("state_before_store", "state", (20, 150), false),
    point("state_after_store", "state", (20, 150), false),
    point("state_after_ack", "state", (20, 150), false),
    point("gateway_after_push", "gateway", (20, 300), false),
    point("gateway_after_decode", "gateway", (20, 300), false),
    point("state_drain", "state", (0, 0), true),
    point("gateway_drain", "gateway", (0, 0), true),
    point("lease_renewal", "state", (0, 1), false),
];

/// F7: one point after the other, round by round.
fn crash(round: &mut Round) -> Result<(), TortureError> {
    let point = &POINTS[(round.seed % POINTS.len() as u64) as usize];
    let mut world = round.world(with_failpoints()?)?;
    let victim = round.random.random_range(0..2_usize);
    let passes = round.random.random_range(point.passes.0..=point.passes.1);
    arm(part(&mut world, point.part, victim), &format!("{}={passes}*off->return", point.name))?;
    let load = world.load(Plan { gateways_live: point.part != "gateway", ..Plan::default() })?;
    load.wait_acked(100, PATIENCE)?;
    let process = part(&mut world, point.part, victim);
    if point.on_term {
        process.signal(nix::sys::signal::Signal::SIGTERM)?;
    }
    round.fault(&load, format!("{} dies at {}, passed {passes} times", process.label(), point.name));
    if !died(process) {
        return Err(TortureError::Late { what: "crash at the failpoint", waited: CRASH_MAX });
    }
    disarm(process)?;
    load.healed(point.name);
    let more = round.many(300);
    expect_acked(round, &load, more, PATIENCE, "more_acked_s");
    let verdict = round.judge(&load.finish(QUIET_MAX)?);
    expect_pushed(round, &verdict);
    round.keep(world)
}

/// N-dedupe: without dedupe a resend after a crash between store and acknowledgement is stored twice.
fn no_dedupe(round: &mut Round) -> Result<(), TortureError> {
    let verdict =
        planted(round, "dedupe_off=return;state_after_store=40*off->return", "dedupe_off=return", false)?;
    round.control(verdict.doubled, "resends stored twice");
    Ok(())
}

/// N-ack: a server that acknowledges whatever the store says loses what comes while Redis is dead.
fn early_ack(round: &mut Round) -> Result<(), TortureError> {
    let options =
        ClusterOptions { states: 1, state_env: env("ack_before_persist=return"), ..with_failpoints()? };
    let mut world = round.world(options)?;
    let load = world.load(Plan { per_s: CONTROL_PER_S, away: 0, ..Plan::default() })?;
    load.wait_acked(200, PATIENCE)?;
    load.fault("redis SIGKILL, ack_before_persist");
    let process = &mut redis(&mut world)?.process;
    process.kill()?;
    let waited = load.wait_acked(200, PATIENCE);
    process.restart()?;
    waited?;
    // What was never stored never comes.
    let history = load.finish(CONTROL_QUIET)?;
    drop(world);
    round.control(Verdict::of(&history, Excuses::default()).lost, "messages acknowledged and never stored");
    Ok(())
}

/// N-recency: nobody takes over what a dead server had accepted and not pushed, so it is never shown to who is online.
fn no_recency(round: &mut Round) -> Result<(), TortureError> {
    let mut owed = 0;
    // A later message of the same chat would make the silence heard, so few are sent and then none.
    for _ in 0..CONTROL_TRIES_MAX {
        owed +=
            planted(round, "recency_off=return;state_after_ack=25*off->return", "recency_off=return", true)?
                .lost;
        if owed > 0 {
            break;
        }
    }
    round.control(owed, "accepted messages that nobody pushed");
    Ok(())
}

/// N-relay: of what a state server accepts and cannot hand to a gateway nobody is told, so whoever is at that gateway does not see it.
fn no_relay(round: &mut Round) -> Result<(), TortureError> {
    let mut unseen = 0;
    for _ in 0..CONTROL_TRIES_MAX {
        let options = ClusterOptions { state_env: env("recency_off=return"), ..with_failpoints()? };
        let (world, load, line) = cut_line(round, options)?;
        // Judged while it lasts; then the world is spoilt.
        let history = load.finish(CONTROL_QUIET)?;
        drop((world, line));
        unseen += Verdict::of(&history, Excuses::default()).lost;
        if unseen > 0 {
            break;
        }
    }
    round.control(unseen, "accepted messages that nobody pushed over another line");
    Ok(())
}

/// A load over a crash of the only state server at a planted fault; `then` is what it runs with afterwards. `silence`:
/// nobody sends behind the crash, and few before.
fn planted(round: &mut Round, failpoints: &str, then: &str, silence: bool) -> Result<Verdict, TortureError> {
    let options = ClusterOptions { states: 1, state_env: env(failpoints), ..with_failpoints()? };
    let mut world = round.world(options)?;
    let per_s = if silence { 100 } else { CONTROL_PER_S };
    let load = world.load(Plan { per_s, away: 0, ..Plan::default() })?;
    let process = &mut world.cluster.states[0].process;
    if !died(process) {
        return Err(TortureError::Late { what: "crash at the failpoint", waited: CRASH_MAX });
    }
    load.fault(format!("state-0 died, {failpoints}"));
    if silence {
        load.hold();
    }
    process.set_env(env(then));
    process.restart()?;
    if !silence {
        load.wait_acked(300, PATIENCE)?;
    }
    // What the fault destroyed never comes; what is only late has long come by then.
    let history = load.finish(CONTROL_QUIET)?;
    // The world is spoilt.
    drop(world);
    Ok(Verdict::of(&history, Excuses::default()))
}

/// Two gateways and two state servers that can be made to die.
fn with_failpoints() -> Result<ClusterOptions, TortureError> {
    let folder = match std::env::var_os("ROOKERY_FAILPOINT_BIN_DIR").filter(|folder| !folder.is_empty()) {
        Some(folder) => PathBuf::from(folder),
        None => {
            let here =
                std::env::current_exe().map_err(|e| TortureError::io("cannot find this program", e))?;
            // target/PROFILE/loadtest, or target/PROFILE/deps/loadtest-HASH for tests.
            let found = here.ancestors().skip(1).take(3).map(|folder| folder.join("failpoints"));
            found.into_iter().find(|folder| folder.is_dir()).unwrap_or_else(|| "target/failpoints".into())
        }
    };
    if !folder.join("state").is_file() || !folder.join("gateway").is_file() {
        let text = format!(
            "needs state and gateway built with --features failpoints in {} (or ROOKERY_FAILPOINT_BIN_DIR)",
            folder.display()
        );
        return Err(TortureError::Missing(text));
    }
    Ok(ClusterOptions { bin_dir: Some(folder), ..pairs() })
}

fn env(failpoints: &str) -> Vec<(String, String)> {
    vec![("FAILPOINTS".to_owned(), failpoints.to_owned())]
}

fn part<'a>(world: &'a mut World, part: &str, number: usize) -> &'a mut Process {
    match part {
        "gateway" => &mut world.cluster.gateways[number].process,
        _ => &mut world.cluster.states[number].process,
    }
}

/// Starts it anew with these points set.
fn arm(process: &mut Process, failpoints: &str) -> Result<(), TortureError> {
    process.terminate()?;
    process.set_env(env(failpoints));
    Ok(process.restart()?)
}

/// Starts it anew with none.
fn disarm(process: &mut Process) -> Result<(), TortureError> {
    process.set_env(Vec::new());
    Ok(process.restart()?)
}

/// Waits until it has killed itself: an end in order is none.
fn died(process: &mut Process) -> bool {
    let status = process.wait_end("nothing", CRASH_MAX);
    status.is_ok_and(|status| status.signal() == Some(nix::libc::SIGKILL))
}

const CRASH_MAX: Duration = Duration::from_secs(15);
const CONTROL_QUIET: Duration = Duration::from_secs(4);
const CONTROL_TRIES_MAX: u32 = 3;
/// Enough for a control: something is always on its way.
const CONTROL_PER_S: u32 = 1_000;

/// Of this file.
pub const ROWS: &[Row] = &[
    Row {
        name: "F7",
        fault: "crash before and after the store, before the push, after decode, after the push, in drains, in a lease renewal",
        full_rounds: 400,
        gate: true,
        run: crash,
    },
    Row {
        name: "N-dedupe",
        fault: "planted: no dedupe, crash between store and acknowledgement",
        full_rounds: 3,
        gate: true,
        run: no_dedupe,
    },
    Row {
        name: "N-ack",
        fault: "planted: acknowledged whatever the store says, Redis killed",
        full_rounds: 3,
        gate: true,
        run: early_ack,
    },
    Row {
        name: "N-recency",
        fault: "planted: nobody pushes what a dead server had accepted",
        full_rounds: 3,
        gate: true,
        run: no_recency,
    },
    Row {
        name: "N-relay",
        fault: "planted: nobody pushes what a gateway misses that is cut off",
        full_rounds: 3,
        gate: true,
        run: no_relay,
    },
];
