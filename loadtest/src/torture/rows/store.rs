//! F20 and F21: Redis out of memory; a replica promoted that had not heard everything. Main thread.
//!
//! Trap: asynchronous failover is not promised to lose nothing. What it lost is measured and printed, and that clients are
//! told is the promise.

use std::time::{Duration, Instant};

use super::common::{
    PATIENCE, everybody_syncs, expect_acked, expect_no_acks, redis, restart_with, settle, settle_after_loss,
};
use super::disk::unrewritten;
use crate::supervisor::{ClusterOptions, Redis};
use crate::torture::tool::proxy::{Proxy, Shape};
use crate::torture::tool::{ToolError, wait_until};
use crate::torture::{Plan, Round, Row, TortureError};

/// The rows of this file.
pub const ROWS: &[Row] = &[
    Row {
        name: "F20",
        fault: "Redis out of memory, noeviction",
        full_rounds: 20,
        gate: false,
        run: out_of_memory,
    },
    Row { name: "F21", fault: "replica promoted under a cut", full_rounds: 10, gate: false, run: promoted },
];

fn out_of_memory(round: &mut Round) -> Result<(), TortureError> {
    let mut world = round.world(ClusterOptions { states: 2, ..unrewritten() })?;
    let load = world.load(Plan::default())?;
    load.wait_acked(500, PATIENCE)?;
    let mut store = redis(&mut world)?.connection()?;
    let used = info(&mut store, "used_memory")?;
    round.fault(&load, "Redis may use no more memory");
    let mut limit =
        |bytes: u64| redis::cmd("CONFIG").arg("SET").arg("maxmemory").arg(bytes).query::<()>(&mut store);
    // Well below: Redis leaves out what waits for the append-only file, and buffers that shrink would make room for some.
    limit(used / 2)?;
    expect_no_acks(round, &load, Duration::from_secs(2));
    round.expect(load.refused() == 0, || "messages were refused for good, for want of memory".into());
    limit(0)?;
    load.healed("memory");
    let evicted = info(&mut store, "evicted_keys")?;
    round.expect(evicted == 0, || format!("Redis evicted {evicted} keys"));
    expect_acked(round, &load, 200, PATIENCE, "accepting_s");
    settle(round, load, PATIENCE)?;
    round.keep(world)
}

fn promoted(round: &mut Round) -> Result<(), TortureError> {
    let mut world = round.world(ClusterOptions { states: 2, ..unrewritten() })?;
    let replica = Redis::start()?;
    let primary = redis(&mut world)?.address();
    // What the replica hears goes through one proxy, which cuts it; what state says through another, which is aimed anew.
    let (hears, says) = (Proxy::start(primary, Shape::default())?, Proxy::start(primary, Shape::default())?);
    for state in &mut world.cluster.states {
        restart_with(&mut state.process, &[format!("store.url=redis://{}", says.address())])?;
    }
    let mut follower = replica.connection()?;
    let (host, port) = (hears.address().ip().to_string(), hears.address().port());
    let () = redis::cmd("REPLICAOF").arg(host).arg(port).query(&mut follower)?;
    // Who was in a group when is not known any more where its changes are lost.
    let plan = Plan { per_s: 300, change_every_ms: 0, ..Plan::default() };
    let load = world.load(plan)?;
    load.wait_acked(200, PATIENCE)?;
    let follows = wait_until(PATIENCE, || said(&mut follower, "master_link_status").as_deref() == Some("up"));
    round.expect(follows, || "the replica never followed".into());
    load.wait_acked(200, PATIENCE)?;
    round.fault(&load, "the replica hears nothing, then the primary dies and the replica is promoted");
    hears.set(Shape { delay: Duration::from_secs(3_600), ..Shape::default() });
    load.wait_acked(200, PATIENCE)?;
    redis(&mut world)?.process.kill()?;
    let () = redis::cmd("REPLICAOF").arg("NO").arg("ONE").query(&mut follower)?;
    let began = Instant::now();
    says.aim(replica.address());
    load.healed("the replica serves");
    expect_acked(round, &load, 100, PATIENCE, "accepting_s");
    everybody_syncs(&load);
    let verdict = settle_after_loss(round, load)?;
    round.worst("promotion_to_quiet_s", began.elapsed().as_secs_f64());
    round.worst("cut_messages", verdict.cut as f64);
    round.expect(verdict.histories_lost > 0, || "no client was told that history was lost".into());
    // The state servers first, then what they rest on.
    drop(world);
    Ok(())
}

fn info(store: &mut redis::Connection, field: &str) -> Result<u64, TortureError> {
    let value = said(store, field).and_then(|value| value.parse().ok());
    Ok(value.ok_or_else(|| ToolError::Failed(format!("Redis does not say {field}")))?)
}

fn said(store: &mut redis::Connection, field: &str) -> Option<String> {
    let text: String = redis::cmd("INFO").query(store).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    Some(line.trim().to_owned())
}
