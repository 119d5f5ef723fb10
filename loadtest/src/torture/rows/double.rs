//! F24: two random faults at once, again and again. Main thread.
//!
//! Trap: whatever is drawn is undone before the next two are, so that a long run is many faults and not one long outage.

use std::time::{Duration, Instant};

use rand::Rng;
use rand::seq::IndexedRandom;

use super::common::{PATIENCE, expect_acked, pairs, redis, settle, state_ports};
use crate::torture::tool::firewall::{Fate, Rule, Way};
use crate::torture::tool::trace::{Inject, Trace};
use crate::torture::{Load, Plan, Round, Row, TortureError, World};

/// The rows of this file.
pub const ROWS: &[Row] = &[Row {
    name: "F24",
    fault: "two random faults at once, for 30 min",
    full_rounds: 20,
    gate: false,
    run: two_at_once,
}];

/// What can be drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    KillState,
    KillGateway,
    KillRedis,
    KillEtcd,
    PauseState,
    PauseGateway,
    PauseRedis,
    CutState,
    CutRedis,
    ResetState,
    Loss,
    SlowSync,
}

const FAULTS: [Fault; 12] = [
    Fault::KillState,
    Fault::KillGateway,
    Fault::KillRedis,
    Fault::KillEtcd,
    Fault::PauseState,
    Fault::PauseGateway,
    Fault::PauseRedis,
    Fault::CutState,
    Fault::CutRedis,
    Fault::ResetState,
    Fault::Loss,
    Fault::SlowSync,
];

fn two_at_once(round: &mut Round) -> Result<(), TortureError> {
    let mut world = round.world(pairs())?;
    let load = world.load(Plan { per_s: 500, gateways_live: false, ..Plan::default() })?;
    load.wait_acked(300, PATIENCE)?;
    let minutes = if round.gate {
        1
    } else if round.tenth {
        3
    } else {
        30
    };
    let until = Instant::now() + Duration::from_secs(60 * minutes);
    while Instant::now() < until {
        let two: Vec<Fault> = FAULTS.choose_multiple(&mut round.random, 2).copied().collect();
        round.fault(&load, format!("{two:?}"));
        let which = round.random.random_range(0..2);
        let mut undone_by_drop = Vec::new();
        for fault in &two {
            undone_by_drop.extend(begin(round, &mut world, *fault, which)?);
            std::thread::sleep(Duration::from_millis(round.random.random_range(0..500)));
        }
        std::thread::sleep(Duration::from_millis(round.random.random_range(100..5_000)));
        drop(undone_by_drop);
        round.heal(&mut world)?;
        load.healed(format!("{two:?}"));
        expect_acked(round, &load, 100, PATIENCE, "accepting_s");
        check_still_up(&load)?;
    }
    settle(round, load, PATIENCE)?;
    round.keep(world)
}

/// After a wait that was too long the rest would only repeat it.
fn check_still_up(load: &Load) -> Result<(), TortureError> {
    load.wait_acked(1, PATIENCE)
}

/// What is undone by being dropped.
type Undone = Box<dyn std::any::Any>;

/// Killed and paused processes are brought back by [`World::heal`].
fn begin(
    round: &mut Round,
    world: &mut World,
    fault: Fault,
    which: usize,
) -> Result<Option<Undone>, TortureError> {
    let redis_port = redis(world)?.address().port();
    let state_port = state_ports(world)[which];
    let rule =
        |ports: &[u16], fate| Rule::set(ports, Way::Both, fate).map(|rule| Some(Box::new(rule) as Undone));
    let cluster = &mut world.cluster;
    match fault {
        Fault::KillState => cluster.states[which].process.kill()?,
        Fault::KillGateway => cluster.gateways[which].process.kill()?,
        Fault::KillRedis => redis(world)?.process.kill()?,
        Fault::KillEtcd => {
            if let Some(etcd) = &mut cluster.etcd {
                etcd.process.kill()?;
            }
        }
        // The other fault may have killed it.
        Fault::PauseState => drop(cluster.states[which].process.pause()),
        Fault::PauseGateway => drop(cluster.gateways[which].process.pause()),
        Fault::PauseRedis => drop(redis(world)?.process.pause()),
        Fault::CutState => return Ok(rule(&[state_port], Fate::Drop)?),
        Fault::CutRedis => return Ok(rule(&[redis_port], Fate::Drop)?),
        Fault::ResetState => return Ok(rule(&[state_port], Fate::Reset)?),
        Fault::Loss => {
            return Ok(rule(&[state_port, redis_port], Fate::Lose(round.random.random_range(1..30)))?);
        }
        Fault::SlowSync => {
            let slow = Duration::from_millis(round.random.random_range(10..300));
            let store = redis(world)?;
            let log = store.folder().join("strace");
            // Not if it was killed just now.
            let Ok(pid) = store.process.pid() else { return Ok(None) };
            return Ok(Trace::attach(pid, &Inject::SlowSync(slow), &log)
                .ok()
                .map(|trace| Box::new(trace) as Undone));
        }
    }
    Ok(None)
}
