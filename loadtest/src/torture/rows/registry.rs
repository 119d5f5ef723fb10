//! F13: the registry's leader dies, all of it dies, a lease is lost under a live server, a watch is dead. Main thread.
//!
//! Trap: the registry says where servers are and never what is accepted, so in no case may a connection or a message notice.

use std::process::Command;
use std::time::{Duration, Instant};

use super::common::{PATIENCE, expect_acked, pairs, settle};
use crate::monitor::interrupted;
use crate::supervisor::{ClusterOptions, PortLease, Process, Ready, Spec};
use crate::torture::tool::firewall::{Fate, Rule, Way};
use crate::torture::tool::process::{metric, ports_to};
use crate::torture::tool::{ToolError, wait_until};
use crate::torture::{Load, Plan, Round, Row, TortureError, World};

/// The rows of this file.
pub const ROWS: &[Row] = &[Row {
    name: "F13",
    fault: "etcd: leader killed, all down, lease lost, watch dead",
    full_rounds: 125,
    gate: false,
    run: registry,
}];

fn registry(round: &mut Round) -> Result<(), TortureError> {
    // By weight of the table: 50 leaders, 5 outages, 50 leases, 20 watches of 125.
    // Seven has no divisor of 25, and rounds that follow each other are of different kinds.
    match round.seed.wrapping_mul(7) % 25 {
        0..10 => leader_killed(round),
        10 => all_down(round),
        11..21 => lease_lost(round),
        _ => watch_dead(round),
    }
}

fn leader_killed(round: &mut Round) -> Result<(), TortureError> {
    let mut etcd = Members::start()?;
    // Later settings win, so the cluster's own single etcd is there and unused.
    let endpoints = format!("registry.endpoints={}", etcd.endpoints());
    let options =
        ClusterOptions { gateway_sets: vec![endpoints.clone()], state_sets: vec![endpoints], ..pairs() };
    let mut world = round.world(options)?;
    let load = world.load(Plan::default())?;
    load.wait_acked(300, PATIENCE)?;
    let leader = etcd.leader()?;
    round.fault(&load, format!("etcd's leader killed, member {leader}"));
    etcd.members[leader].0.kill()?;
    expect_acked(round, &load, 200, PATIENCE, "accepting_s");
    // A server that starts without a registry says so and ends: that is another promise.
    let began = Instant::now();
    let elected = wait_until(PATIENCE, || etcd.leader().is_ok());
    round.worst("elected_s", began.elapsed().as_secs_f64());
    round.expect(elected, || "etcd has no new leader".into());
    expect_found(round, &mut world, &load)?;
    etcd.members[leader].0.restart()?;
    settle(round, load, PATIENCE)?;
    Ok(())
}

/// The last table stays in use, and what was registered is registered again.
fn all_down(round: &mut Round) -> Result<(), TortureError> {
    let mut world = round.world(pairs())?;
    let load = world.load(Plan { per_s: 200, ..Plan::default() })?;
    load.wait_acked(100, PATIENCE)?;
    let down = Duration::from_secs(if round.tenth || round.gate { 60 } else { 600 });
    round.fault(&load, format!("etcd down for {} s", down.as_secs()));
    etcd(&mut world)?.kill()?;
    let until = Instant::now() + down;
    while Instant::now() < until && !interrupted() {
        expect_acked(round, &load, 100, PATIENCE, "accepting_while_down_s");
        std::thread::sleep(Duration::from_secs(1).min(until.saturating_duration_since(Instant::now())));
    }
    etcd(&mut world)?.restart()?;
    load.healed("etcd runs again");
    expect_found(round, &mut world, &load)?;
    settle(round, load, PATIENCE)?;
    Ok(())
}

fn lease_lost(round: &mut Round) -> Result<(), TortureError> {
    let mut world = round.world(pairs())?;
    let load = world.load(Plan::default())?;
    load.wait_acked(300, PATIENCE)?;
    let endpoint = endpoint(&world)?;
    let of = if round.seed.is_multiple_of(2) { "state-0" } else { "gateway-0" };
    let lease = lease_of(&endpoint, of)?;
    let lease = lease.ok_or_else(|| ToolError::Failed(format!("{of} is not registered")))?;
    round.fault(&load, format!("the lease of {of} revoked"));
    etcdctl(&endpoint, &["lease", "revoke", &format!("{lease:x}")])?;
    let began = Instant::now();
    let back =
        wait_until(REGISTERED_MAX, || matches!(lease_of(&endpoint, of), Ok(Some(found)) if found != lease));
    round.worst("registered_again_s", began.elapsed().as_secs_f64());
    round.expect(back, || format!("{of} had not registered again after {REGISTERED_MAX:?}"));
    expect_acked(round, &load, 200, PATIENCE, "accepting_s");
    settle(round, load, PATIENCE)?;
    round.keep(world)
}

/// What etcd tells a gateway never arrives on the connections that it has; a new state server is found all the same.
fn watch_dead(round: &mut Round) -> Result<(), TortureError> {
    let mut world = round.world(pairs())?;
    let load = world.load(Plan { per_s: 200, ..Plan::default() })?;
    load.wait_acked(100, PATIENCE)?;
    let port = world.cluster.etcd.as_ref().map(|etcd| etcd.address().port()).unwrap_or_default();
    let mut watching = Vec::new();
    for gateway in &world.cluster.gateways {
        watching.extend(ports_to(gateway.process.pid()?, port)?);
    }
    round.expect(!watching.is_empty(), || "the gateways have no connection to etcd".into());
    round.fault(&load, format!("what etcd says to {watching:?} is dropped"));
    let rule = Rule::set(&watching, Way::ToServer, Fate::Drop)?;
    expect_found(round, &mut world, &load)?;
    rule.lift()?;
    load.healed("the watch");
    settle(round, load, PATIENCE)?;
    Ok(())
}

/// A state server that is new is used by every gateway, and by then nobody has lost anything.
fn expect_found(round: &mut Round, world: &mut World, load: &Load) -> Result<(), TortureError> {
    let began = Instant::now();
    world.cluster.add_state()?;
    let states = world.cluster.states.len() as f64;
    let streams = |world: &World| {
        let of = |gateway: &crate::supervisor::Gateway| {
            metric(gateway.admin, "rookery_gateway_link_streams").unwrap_or(0.0)
        };
        world.cluster.gateways.iter().all(|gateway| of(gateway) >= states)
    };
    let found = wait_until(FOUND_MAX, || streams(world));
    round.worst("found_s", began.elapsed().as_secs_f64());
    round.expect(found, || format!("a new state server was not found within {FOUND_MAX:?}"));
    expect_acked(round, load, 100, PATIENCE, "accepting_s");
    Ok(())
}

fn etcd(world: &mut World) -> Result<&mut Process, TortureError> {
    let etcd = world.cluster.etcd.as_mut().map(|etcd| &mut etcd.process);
    etcd.ok_or_else(|| TortureError::Missing("needs an etcd of its own".into()))
}

fn endpoint(world: &World) -> Result<String, TortureError> {
    let endpoint = world.cluster.etcd.as_ref().map(|etcd| etcd.address().to_string());
    endpoint.ok_or_else(|| TortureError::Missing("needs an etcd of its own".into()))
}

/// The number of the lease under which a server stands in the registry.
fn lease_of(endpoint: &str, server: &str) -> Result<Option<u64>, ToolError> {
    let said = etcdctl(endpoint, &["get", "--prefix", "/rookery/", "--write-out", "fields"])?;
    Ok(lease_in(&said, server))
}

/// `"Key" : "/rookery/state/state-0"` ... `"Lease" : 123`.
fn lease_in(said: &str, server: &str) -> Option<u64> {
    let mut lines = said.lines();
    lines.find(|line| {
        line.starts_with("\"Key\"") && line.trim_end_matches('"').ends_with(&format!("/{server}"))
    })?;
    lines.find_map(|line| line.strip_prefix("\"Lease\" : "))?.trim().parse().ok()
}

fn etcdctl(endpoint: &str, args: &[&str]) -> Result<String, ToolError> {
    let output =
        Command::new("etcdctl").env("ETCDCTL_API", "3").args(["--endpoints", endpoint]).args(args).output();
    let output = match output {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(ToolError::Missing("needs etcdctl, of the package etcd-client".into()));
        }
        other => other.map_err(ToolError::io("etcdctl"))?,
    };
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => {
            Err(ToolError::Failed(format!("etcdctl: {}", String::from_utf8_lossy(&output.stderr).trim())))
        }
    }
}

/// An etcd of three members: process, port for clients, port for the others.
struct Members {
    members: Vec<(Process, PortLease, PortLease)>,
    _folder: tempfile::TempDir,
}

impl Members {
    fn start() -> Result<Members, TortureError> {
        let folder =
            tempfile::tempdir().map_err(|error| TortureError::io("cannot make a temp dir", error))?;
        let mut ports = Vec::new();
        for _ in 0..3 {
            ports.push((PortLease::take()?, PortLease::take()?));
        }
        let url = |port: &PortLease| format!("http://{}", port.address());
        let everybody: Vec<String> =
            ports.iter().enumerate().map(|(at, (_, peer))| format!("m{at}={}", url(peer))).collect();
        let mut members = Vec::new();
        for (at, (client, peer)) in ports.into_iter().enumerate() {
            let pairs = [
                ("--name", format!("m{at}")),
                ("--data-dir", folder.path().join(format!("m{at}")).display().to_string()),
                ("--listen-client-urls", url(&client)),
                ("--advertise-client-urls", url(&client)),
                ("--listen-peer-urls", url(&peer)),
                ("--initial-advertise-peer-urls", url(&peer)),
                ("--initial-cluster", everybody.join(",")),
            ];
            let spec = Spec {
                label: format!("etcd-{at}"),
                program: "etcd".into(),
                args: pairs.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]).collect(),
                ready: Ready::Http(client.address(), "/health"),
                folder: folder.path().to_owned(),
            };
            members.push((Process::spawn(spec)?, client, peer));
        }
        for (process, _, _) in &mut members {
            process.wait_ready(PATIENCE)?;
        }
        Ok(Members { members, _folder: folder })
    }

    /// As a value of the configuration.
    fn endpoints(&self) -> String {
        let urls: Vec<String> =
            self.members.iter().map(|(_, client, _)| format!("\"http://{}\"", client.address())).collect();
        format!("[{}]", urls.join(", "))
    }

    fn leader(&self) -> Result<usize, ToolError> {
        for (at, (_, client, _)) in self.members.iter().enumerate() {
            // A dead one says nothing.
            if metric(client.address(), "etcd_server_is_leader").is_ok_and(|leads| leads == 1.0) {
                return Ok(at);
            }
        }
        Err(ToolError::Failed("etcd has no leader".into()))
    }
}

/// What a lost lease is promised.
const REGISTERED_MAX: Duration = Duration::from_secs(2);
/// What a dead watch is promised: the time between two full lists.
const FOUND_MAX: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_that_of_the_server() {
        let said = "\"Key\" : \"/rookery/gateway/gateway-0\"\n\"Lease\" : 7\n\n\"Key\" : \"/rookery/state/state-0\"\n\"Version\" : 1\n\"Value\" : \"x\"\n\"Lease\" : 77\n";
        assert_eq!(lease_in(said, "state-0"), Some(77));
        assert_eq!(lease_in(said, "state-1"), None);
    }
}
