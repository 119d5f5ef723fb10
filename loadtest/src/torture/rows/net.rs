//! F8 to F12 and F28: lines that are cut, cut one way, reset, lossy, late or narrow. Main thread.
//!
//! Trap: parties are told apart by the port of the one that listens, so a cut of a state server cuts it from every gateway; but for F28,
//! whose gateway runs as a group of its own.

use std::time::{Duration, Instant};

use rand::Rng;
use rand::seq::IndexedRandom;

use super::common::{
    PATIENCE, expect_acked, expect_no_acks, expect_pushed, pairs, redis, rest, restart_with, settle,
    state_ports,
};
use crate::supervisor::ClusterOptions;
use crate::torture::tool::firewall::{Fate, Rule, Way};
use crate::torture::tool::namespace;
use crate::torture::tool::narrow::Narrow;
use crate::torture::tool::proxy::{Proxy, Shape};
use crate::torture::{Load, Plan, Round, Row, TortureError, World};

/// The rows of this file.
pub const ROWS: &[Row] = &[
    Row {
        name: "F8",
        fault: "gateways and state servers cut apart for 2, 10 or 60 s",
        full_rounds: 90,
        gate: true,
        run: cut,
    },
    Row {
        name: "F28",
        fault: "one gateway cut off from one of two state servers",
        full_rounds: 30,
        gate: true,
        run: cut_between_two,
    },
    Row { name: "F9", fault: "state and Redis cut one way", full_rounds: 60, gate: false, run: cut_one_way },
    Row {
        name: "F10",
        fault: "connections reset between servers, or to clients",
        full_rounds: 100,
        gate: false,
        run: resets,
    },
    Row { name: "F11", fault: "5 % or 20 % of packets lost", full_rounds: 10, gate: false, run: loss },
    Row {
        name: "F12",
        fault: "200 ± 100 ms late, or 1 Mbit/s for everything",
        full_rounds: 10,
        gate: false,
        run: slow_line,
    },
];

/// One state server, or both, cannot be reached.
fn cut(round: &mut Round) -> Result<(), TortureError> {
    let mut world = round.world(pairs())?;
    let load = world.load(Plan::default())?;
    load.wait_acked(500, PATIENCE)?;
    let all = state_ports(&world);
    let ports = match round.random.random_range(0..=all.len()) {
        0 => all.clone(),
        one => vec![all[one - 1]],
    };
    let seconds = if round.gate { 2 } else { [2, 10, 60][(round.seed % 3) as usize] };
    round.fault(&load, format!("{} of {} state servers cut off for {seconds} s", ports.len(), all.len()));
    let until = Instant::now() + Duration::from_secs(seconds);
    let rule = Rule::set(&ports, Way::Both, Fate::Drop)?;
    if ports.len() < all.len() {
        // The other one serves everybody.
        expect_acked(round, &load, 200, HEAL_MAX, "taken_over_s");
    }
    rest(until.saturating_duration_since(Instant::now()));
    rule.lift()?;
    load.healed("the cut");
    expect_acked(round, &load, 200, HEAL_MAX, "healed_s");
    settle(round, load, HEAL_MAX)?;
    round.keep(world)
}

/// F28: one gateway does not reach one state server, which the other gateway does: what comes through that one is for both.
fn cut_between_two(round: &mut Round) -> Result<(), TortureError> {
    let (mut world, load, line) = cut_line(round, pairs())?;
    // Nobody is deaf while it lasts.
    let verdict = settle(round, load, HEAL_MAX)?;
    expect_pushed(round, &verdict);
    line.rule.lift()?;
    let process = &mut world.cluster.gateways[line.gateway].process;
    process.set_group(None);
    process.restart()?;
    round.keep(world)
}

/// The line between one gateway and one state server is cut, and messages have gone on for longer than either needs to notice.
pub fn cut_line(round: &mut Round, options: ClusterOptions) -> Result<(World, Load, CutLine), TortureError> {
    namespace::need()?;
    let mut world = round.world(options)?;
    let (gateway, state) = (round.random.random_range(0..2), round.random.random_range(0..2));
    let process = &mut world.cluster.gateways[gateway].process;
    process.set_group(Some(CUT_GROUP));
    process.restart()?;
    let load = world.load(Plan::default())?;
    load.wait_acked(500, PATIENCE)?;
    round.fault(&load, format!("gateway {gateway} cut off from state server {state}"));
    let rule = Rule::set_from(CUT_GROUP, &[state_ports(&world)[state]])?;
    std::thread::sleep(CUT_NOTICED);
    load.wait_acked(500, PATIENCE)?;
    Ok((world, load, CutLine { rule, gateway }))
}

/// What is in force, and of which gateway.
pub struct CutLine {
    rule: Rule,
    gateway: usize,
}

/// Commands do not arrive, or answers do not: whatever was asked is unknown, and nobody may be told "accepted".
fn cut_one_way(round: &mut Round) -> Result<(), TortureError> {
    let mut world = round.world(pairs())?;
    let load = world.load(Plan::default())?;
    load.wait_acked(500, PATIENCE)?;
    let way = if round.seed.is_multiple_of(2) { Way::ToServer } else { Way::FromServer };
    let wait = Duration::from_millis(round.random.random_range(1_000..6_000));
    round.fault(&load, format!("{way:?} of Redis cut for {wait:?}"));
    let rule = Rule::set(&[redis(&mut world)?.address().port()], way, Fate::Drop)?;
    expect_no_acks(round, &load, wait);
    rule.lift()?;
    load.healed("the cut");
    expect_acked(round, &load, 200, PATIENCE, "healed_s");
    settle(round, load, PATIENCE)?;
    round.keep(world)
}

/// Several times, whatever is said on a connection is answered with a reset, for a moment.
fn resets(round: &mut Round) -> Result<(), TortureError> {
    let mut world = round.world(pairs())?;
    let to_clients = round.seed.is_multiple_of(4);
    let load = world.load(Plan { gateways_live: !to_clients, ..Plan::default() })?;
    load.wait_acked(300, PATIENCE)?;
    let mut targets = state_ports(&world);
    targets.push(redis(&mut world)?.address().port());
    targets.extend(world.cluster.etcd.as_ref().map(|etcd| etcd.address().port()));
    if to_clients {
        targets.extend(world.cluster.gateways.iter().map(|gateway| gateway.client.port()));
    }
    for _ in 0..RESETS {
        let count = round.random.random_range(1..=targets.len());
        let ports: Vec<u16> = targets.choose_multiple(&mut round.random, count).copied().collect();
        round.fault(&load, format!("resets at {ports:?}"));
        let rule = Rule::set(&ports, Way::Both, Fate::Reset)?;
        std::thread::sleep(Duration::from_millis(round.random.random_range(20..150)));
        rule.lift()?;
        std::thread::sleep(Duration::from_millis(round.random.random_range(100..800)));
    }
    expect_acked(round, &load, 200, PATIENCE, "healed_s");
    settle(round, load, PATIENCE)?;
    round.keep(world)
}

/// Everywhere at once, registry and store included.
fn loss(round: &mut Round) -> Result<(), TortureError> {
    let mut world = round.world(pairs())?;
    let load = world.load(Plan { per_s: 200, ..Plan::default() })?;
    load.wait_acked(100, PATIENCE)?;
    let mut ports = state_ports(&world);
    ports.push(redis(&mut world)?.address().port());
    ports.extend(world.cluster.etcd.as_ref().map(|etcd| etcd.address().port()));
    ports.extend(world.cluster.gateways.iter().map(|gateway| gateway.client.port()));
    let percent = if round.seed.is_multiple_of(2) { 5 } else { 20 };
    round.fault(&load, format!("{percent} % of all packets lost"));
    let rule = Rule::set(&ports, Way::Both, Fate::Lose(percent))?;
    let before = load.acked();
    rest(minutes(round));
    let under_loss = load.acked() - before;
    round.expect(under_loss > 0, || format!("nothing was acknowledged with {percent} % of packets lost"));
    rule.lift()?;
    load.healed("the loss");
    expect_acked(round, &load, 100, PATIENCE, "healed_s");
    settle(round, load, PATIENCE)?;
    round.keep(world)
}

/// One of the three legs of a message is late, or everything is narrow.
fn slow_line(round: &mut Round) -> Result<(), TortureError> {
    let late =
        Shape { delay: Duration::from_millis(200), jitter: Duration::from_millis(100), bytes_per_s: 0 };
    let mut world = round.world(ClusterOptions { states: 2, ..ClusterOptions::default() })?;
    // Proxies are dropped behind the load that goes through them.
    let (mut proxies, mut plan) = (Vec::new(), Plan { per_s: 100, ..Plan::default() });
    let leg =
        ["client to gateway", "gateway to state", "state to Redis", "everything"][(round.seed % 4) as usize];
    match leg {
        "client to gateway" => {
            proxies.push(Proxy::start(world.cluster.gateways[0].client, late)?);
            plan.gateways = Some(proxies.iter().map(Proxy::address).collect());
        }
        "gateway to state" => {
            for state in &mut world.cluster.states {
                let proxy = Proxy::start(state.rpc, late)?;
                restart_with(&mut state.process, &[format!("rpc.advertise={}", proxy.address())])?;
                proxies.push(proxy);
            }
        }
        "state to Redis" => {
            let proxy = Proxy::start(redis(&mut world)?.address(), late)?;
            for state in &mut world.cluster.states {
                restart_with(&mut state.process, &[format!("store.url=redis://{}", proxy.address())])?;
            }
            proxies.push(proxy);
        }
        _ => plan.per_s = 15,
    }
    let load = world.load(plan)?;
    round.fault(&load, format!("{leg} is slow"));
    let narrow = if proxies.is_empty() { Some(Narrow::set(1_000)?) } else { None };
    let before = load.acked();
    rest(minutes(round));
    let acked = load.acked() - before;
    round.expect(acked > 0, || format!("nothing was acknowledged while {leg} was slow"));
    for proxy in &proxies {
        proxy.set(Shape::default());
    }
    drop(narrow);
    load.healed(leg);
    expect_acked(round, &load, 30, PATIENCE, "healed_s");
    settle(round, load, PATIENCE)?;
    Ok(())
}

/// How long a bad line lasts.
fn minutes(round: &Round) -> Duration {
    Duration::from_secs(if round.tenth || round.gate { 30 } else { 300 })
}

/// What a healed line is promised.
const HEAL_MAX: Duration = Duration::from_secs(5);
const RESETS: usize = 5;
/// Twice what a gateway waits for a pong (`link.dead_ms`), and half a second.
const CUT_NOTICED: Duration = Duration::from_millis(2_500);
/// Nobody else's.
const CUT_GROUP: u32 = 61_234;
