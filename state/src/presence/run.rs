//! Looks at those who came and went, tells the other state servers who they were, and whoever watches them how they are now. A task
//! of the state server's thread.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures_util::future;
use proto::state::ChangedRequest;
use proto::wire;
use proto::{Command, frame};

use super::watches::Change;
use super::{GATEWAY_AWAY, look, numbers};
use crate::core::Core;
use crate::peers::Peers;

/// Between two looks. Who came or went is looked at in the second one behind it, so that a short reconnect says nothing.
const TICK: Duration = Duration::from_millis(500);
/// Users read in one call of the store.
const USERS_PER_CALL: usize = 256;
/// Ticks between two looks at watches that were not renewed, at names without a number, and at the other state servers.
const RARELY: u64 = 10;
/// Longest that another server may take to hear.
const PEER_MAX: Duration = Duration::from_secs(1);

/// For ever.
pub async fn run(core: Arc<Core>) {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut peers = Peers::default();
    // Of the tick before.
    let mut waiting = BTreeSet::new();
    for tick in 0_u64.. {
        ticks.tick().await;
        let now = core.clock.now();
        if tick.is_multiple_of(RARELY) {
            // Those that were known stay so.
            let _ = peers.find(&core).await;
            expire(&core, now, !peers.is_empty());
            name_the_nameless(&core, now).await;
        }
        let (changed, all) = take(&core, now, &mut peers);
        let due = std::mem::replace(&mut waiting, changed);
        tell(&core, if all { everybody(&core) } else { due }).await;
    }
}

/// Another state server says that these came or went.
pub fn heard(core: &Core, users: &[u64]) {
    let mut inner = core.presence.inner.lock();
    let watched: Vec<u64> = users.iter().copied().filter(|user| inner.watches.is_watched(*user)).collect();
    inner.heard.extend(watched);
}

/// A number is nobody's any more: it is not there, and its name has another one, or will have.
pub fn retired(core: &Core, user: u64) {
    let change = core.presence.inner.lock().watches.unnamed(user);
    push_changes(core, change);
}

/// Whom a gateway could not be told of is told again: when it has a stream here, or, where that one is full, some
/// seconds later.
fn push_changes(core: &Core, changes: impl IntoIterator<Item = Change>) {
    let frames = changes.into_iter().map(|(seen, targets)| {
        let presence = wire::Presence { users: vec![seen], ..Default::default() };
        (frame::encode(Command::Presence, &presence), targets)
    });
    let hinted = core.gateways.hint(frames);
    core.metrics.presence_changes.inc_by(hinted.pushed);
    if !hinted.refused.is_empty() {
        let mut inner = core.presence.inner.lock();
        inner.watches.lost(|connection| hinted.refused.contains(&proto::incarnation_of(connection)));
        if hinted.refused.iter().any(|incarnation| core.gateways.is_open(*incarnation)) {
            inner.look_at = inner.look_at.or(Some(core.clock.now() + GATEWAY_AWAY));
        }
    }
}

fn expire(core: &Core, now: Instant, has_peers: bool) {
    let mut inner = core.presence.inner.lock();
    inner.watches.expire(now);
    let is_quiet = inner.watches.is_empty() && !has_peers;
    core.presence.is_quiet.store(is_quiet, Ordering::Relaxed);
}

/// Who changed, and whether everybody is to be looked at. Other servers are told of what was seen here.
fn take(core: &Core, now: Instant, peers: &mut Peers) -> (BTreeSet<u64>, bool) {
    let mut inner = core.presence.inner.lock();
    let is_due = inner.look_at.is_some_and(|at| at <= now);
    inner.look_at = inner.look_at.filter(|_| !is_due);
    let all = std::mem::take(&mut inner.all_changed) || is_due;
    let mut changed = std::mem::take(&mut inner.changed);
    let mut heard = std::mem::take(&mut inner.heard);
    drop(inner);
    tell_others(peers, &changed);
    changed.append(&mut heard);
    (changed, all)
}

fn everybody(core: &Core) -> BTreeSet<u64> {
    core.presence.inner.lock().watches.users().into_iter().collect()
}

async fn name_the_nameless(core: &Core, now: Instant) {
    let names = core.presence.inner.lock().watches.nameless();
    for some in names.chunks(USERS_PER_CALL) {
        let some: BTreeSet<&str> = some.iter().map(String::as_str).collect();
        let Ok(found) = numbers(core, &some, now + within(core)).await else { return };
        let mut inner = core.presence.inner.lock();
        for (name, number) in found {
            if let Some(number) = number {
                inner.watches.named(&name, number);
                inner.note(number);
            }
        }
    }
}

fn within(core: &Core) -> Duration {
    Duration::from_millis(core.config.store.response_ms_max)
}

async fn tell(core: &Core, mut due: BTreeSet<u64>) {
    {
        let inner = core.presence.inner.lock();
        due.retain(|user| inner.watches.is_watched(*user));
    }
    while !due.is_empty() {
        let some: BTreeSet<u64> = due.iter().copied().take(USERS_PER_CALL).collect();
        due.retain(|user| !some.contains(user));
        let again = some.clone();
        let found = look(core, some, core.clock.now() + within(core)).await;
        let mut inner = core.presence.inner.lock();
        match found {
            Ok(found) => {
                let changes: Vec<_> =
                    found.into_iter().filter_map(|(user, there)| inner.watches.found(user, there)).collect();
                drop(inner);
                push_changes(core, changes);
            }
            Err(error) => {
                inner.heard.extend(again.into_iter().chain(std::mem::take(&mut due)));
                drop(inner);
                core.store_failed(&error);
            }
        }
    }
}

/// Tells the others, in a task of its own: who does not hear holds up nobody.
fn tell_others(peers: &Peers, changed: &BTreeSet<u64>) {
    if changed.is_empty() || peers.is_empty() {
        return;
    }
    let request = ChangedRequest { users: changed.iter().copied().collect() };
    let calls = peers.iter().map(|(_, mut peer)| {
        let request = request.clone();
        async move { tokio::time::timeout(PEER_MAX, peer.changed(request)).await }
    });
    let all = future::join_all(calls.collect::<Vec<_>>());
    tokio::spawn(async move { drop(all.await) });
}
