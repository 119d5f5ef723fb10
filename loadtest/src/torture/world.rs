//! A cluster to be hurt, and what is done to it. Owned by a round, kept from one round to the next.
//!
//! Trap: whoever hurts it heals it before giving it back ([`World::heal`]); a world that does not heal is thrown away.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::TortureError;
use super::history::{Device, Journal, Scribe};
use super::load::{Load, Plan};
use crate::million::probe::Probe;
use crate::supervisor::{Cluster, ClusterOptions, Process};

/// See the head of this file.
#[derive(Debug)]
pub struct World {
    /// The processes.
    pub cluster: Cluster,
    pub(super) options: ClusterOptions,
    pub(super) desk: Arc<Desk>,
}

/// Where a round's histories go, and names that nobody else has.
#[derive(Debug)]
pub(super) struct Desk {
    pub folder: PathBuf,
    /// `F1-SEED`.
    pub stem: String,
    /// In user names: differs from round to round, as a world may serve many.
    pub run: String,
    pub seed: u64,
    /// For plans that do not say otherwise.
    pub per_s: u32,
    pub loads: AtomicU32,
    pub probes: AtomicU32,
}

impl Desk {
    /// Where the `number`-th history lies.
    pub fn path(&self, number: u32) -> PathBuf {
        let more = if number == 0 { String::new() } else { format!("-{number}") };
        self.folder.join(format!("{}{more}.jsonl", self.stem))
    }
}

impl World {
    /// Starts a workload of users that nobody else has; when this returns, all have logged in.
    pub fn load(&mut self, mut plan: Plan) -> Result<Load, TortureError> {
        if plan.per_s == 0 {
            plan.per_s = self.desk.per_s;
        }
        let number = self.desk.loads.fetch_add(1, Ordering::Relaxed);
        let gateways: Vec<SocketAddr> = self.cluster.gateways.iter().map(|gateway| gateway.client).collect();
        let run = format!("{}.{number}", self.desk.run);
        let seed = self.desk.seed.wrapping_add(number.into());
        Load::start(plan, &gateways, &run, seed, &self.desk.path(number))
    }

    /// A history of its own, for rows whose devices are no [`Load`]'s.
    pub fn journal(
        &self,
        devices: Vec<Device>,
        gateways_live: bool,
    ) -> Result<(Journal, Scribe), TortureError> {
        let number = self.desk.loads.fetch_add(1, Ordering::Relaxed);
        Journal::begin(&self.desk.path(number), devices, gateways_live)
    }

    /// Where clients connect.
    pub fn addresses(&self) -> Vec<String> {
        self.cluster.gateways.iter().map(|gateway| gateway.client.to_string()).collect()
    }

    /// One client of bare bytes at a gateway, logged in, whose first message was accepted.
    pub fn probe(&self, gateway: usize) -> Result<Probe, TortureError> {
        let number = self.desk.probes.fetch_add(1, Ordering::Relaxed);
        let user = format!("{}-probe-{number}", self.desk.run);
        Ok(Probe::start(self.cluster.gateways[gateway].client, &user, 1)?)
    }

    /// A name that nothing else in this world has.
    pub fn user(&self, name: &str) -> String {
        format!("{}-{name}", self.desk.run)
    }

    /// Wakes what is stopped, starts what is dead, and waits until all are ready. Which of them had ended although nobody ended them.
    pub fn heal(&mut self) -> Result<Vec<String>, TortureError> {
        let mut ended = Vec::new();
        for process in self.processes() {
            if let Some(status) = process.ended_by_itself() {
                ended.push(format!("{} ended by itself: {status}", process.label()));
            }
            if process.is_running() {
                process.resume()?;
            } else {
                // One after the other: a server that finds no store ends again.
                process.restart()?;
            }
        }
        for process in self.processes() {
            process.wait_ready(READY_MAX)?;
        }
        Ok(ended)
    }

    /// Every process, what others rest on first.
    pub fn processes(&mut self) -> Vec<&mut Process> {
        let cluster = &mut self.cluster;
        let services = [
            cluster.redis.as_mut().map(|redis| &mut redis.process),
            cluster.etcd.as_mut().map(|etcd| &mut etcd.process),
        ];
        let states = cluster.states.iter_mut().map(|state| &mut state.process);
        let gateways = cluster.gateways.iter_mut().map(|gateway| &mut gateway.process);
        let ipconf = cluster.ipconf.as_mut().map(|ipconf| &mut ipconf.process);
        services.into_iter().flatten().chain(states).chain(gateways).chain(ipconf).collect()
    }
}

const READY_MAX: Duration = Duration::from_secs(30);
/// What the state servers of every world accept: less than the client library, so that it can send what they refuse.
pub(super) const MESSAGE_BYTES_MAX: usize = 16 * 1024;
