//! F23: the wall clock jumps by an hour, there and back, under running servers. Main thread.
//!
//! Trap: Debian's Redis has an allocator that libfaketime cannot live with. So the store's clock is made to jump where the
//! store is a state server's own file, and in the other rounds it stands still while the servers' clocks jump.

use std::time::Duration;

use rand::seq::IndexedRandom;

use super::common::{PATIENCE, expect_acked, settle};
use crate::supervisor::ClusterOptions;
use crate::torture::tool::clock::Clock;
use crate::torture::tool::process::{cpu, metric};
use crate::torture::{Plan, Round, Row, TortureError};

/// The rows of this file.
pub const ROWS: &[Row] = &[Row {
    name: "F23",
    fault: "wall clock jumps by an hour, both ways",
    full_rounds: 10,
    gate: false,
    run: jumps,
}];

fn jumps(round: &mut Round) -> Result<(), TortureError> {
    let folder = tempfile::tempdir().map_err(|error| TortureError::io("cannot make a temp dir", error))?;
    let clock = Clock::make(folder.path())?;
    let embedded = round.seed.is_multiple_of(2);
    let states = if embedded { 1 } else { 2 };
    let mut world = round.world(ClusterOptions {
        states,
        embedded,
        gateway_env: clock.environment(),
        state_env: clock.environment(),
        ..ClusterOptions::default()
    })?;
    let load = world.load(Plan { per_s: 300, ..Plan::default() })?;
    load.wait_acked(300, PATIENCE)?;
    let pid = world.cluster.gateways[0].process.pid()?;
    let quiet = cpu_of(pid, ONE)?;
    let hours = [3_600, -3_600].choose(&mut round.random).copied().unwrap_or(3_600);
    for off in [hours, 0, -hours, 0] {
        round.fault(&load, format!("clocks are {off:+} s off"));
        clock.jump(off)?;
        expect_acked(round, &load, 300, PATIENCE, "accepting_s");
        // A storm of timers would show as a gateway that does nothing else.
        let busy = cpu_of(pid, ONE)?;
        round.worst("gateway_busy_over_quiet", busy / quiet.max(0.05));
        round.expect(busy < 0.5 + 2.0 * quiet, || {
            format!("the gateway used {busy:.2} cores behind a jump of {off:+} s, {quiet:.2} before")
        });
    }
    let admin = world.cluster.gateways[0].admin;
    let idle = metric(admin, "rookery_gateway_closed_total{reason=\"idle\"}")?;
    round.expect(idle == 0.0, || format!("{idle} connections were closed as idle"));
    settle(round, load, PATIENCE)?;
    // The clock's file goes with this round.
    Ok(())
}

/// Cores that a process uses in the next `wait`.
fn cpu_of(pid: u32, wait: Duration) -> Result<f64, TortureError> {
    let before = cpu(pid)?;
    std::thread::sleep(wait);
    Ok((cpu(pid)? - before).as_secs_f64() / wait.as_secs_f64())
}

const ONE: Duration = Duration::from_secs(1);
