//! What a gateway misses that has no stream here, while it has one at another state server: that one is asked to push it again. A task of
//! its own, and the other end of it.
//!
//! Without this, whoever is at a gateway that is cut off from one state server alone would hear of what that one accepts with the next
//! message of the chat that goes another way.
//!
//! Trap: who answers has taken it on and not done it yet. Should it die before, the gateway's own word to its next stream covers the last
//! seconds alone; what is older, because others were asked in vain before, waits for the next message of its chat.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use proto::state::{Missed, ReplayRequest};

use crate::core::Core;
use crate::marks;
use crate::peers::Peers;
use crate::repush::Missing;

/// Longest that another server may take to answer.
const PEER_MAX: Duration = Duration::from_secs(1);

/// Asks between two looks at which others there are.
const FIND_EVERY: u64 = 10;

/// For ever.
pub async fn run(core: Arc<Core>) {
    let mut ticks = tokio::time::interval(marks::TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut peers = Peers::default();
    for asks in 0_u64.. {
        let missing = loop {
            ticks.tick().await;
            let missing = core.gateways.missed().ask_for(|incarnation| core.gateways.is_open(incarnation));
            if !missing.is_empty() {
                break missing;
            }
        };
        // A registry that hangs must not hold up what those can do who are known.
        if (peers.is_empty() || asks.is_multiple_of(FIND_EVERY))
            && let Err(error) = peers.find(&core).await
        {
            tracing::debug!(%error, "the other state servers are not known");
        }
        let taken = ask(&peers, &missing).await;
        if !taken.is_empty() {
            tracing::info!(gateways = ?taken, "others push what these miss");
        }
        core.gateways.missed().asked(missing.keys(), &taken);
    }
}

/// One after the other, until each gateway is reached by one.
async fn ask(peers: &Peers, missing: &BTreeMap<u32, u64>) -> BTreeSet<u32> {
    let mut taken = BTreeSet::new();
    for (addr, mut peer) in peers.iter() {
        let left = missing.iter().filter(|(incarnation, _)| !taken.contains(*incarnation));
        let missed: Vec<Missed> =
            left.map(|(&incarnation, &since_us)| Missed { incarnation, since_us }).collect();
        if missed.is_empty() {
            break;
        }
        match tokio::time::timeout(PEER_MAX, peer.replay(ReplayRequest { missed })).await {
            Ok(Ok(reply)) => taken.extend(reply.into_inner().taken),
            Ok(Err(error)) => tracing::debug!(addr, error = error.message(), "could not be asked to push"),
            Err(_) => tracing::debug!(addr, "did not answer when asked to push"),
        }
    }
    taken
}

/// Another server cannot reach these gateways. Those that have a stream here.
pub fn take(core: &Core, missed: &[Missed]) -> Vec<u32> {
    let mut taken = Vec::new();
    for Missed { incarnation, since_us } in missed {
        if core.gateways.is_open(*incarnation) {
            // Exclusive, so that the oldest one is among what is newer.
            let missing = Missing { from_us: since_us.saturating_sub(1), upto_us: u64::MAX };
            core.repush.replay(*incarnation, missing);
            taken.push(*incarnation);
        }
    }
    taken
}
