//! Twice a second: how far this server has pushed is written, and the marks of the others are looked at. A task of its own
//! around [`tick`].
//!
//! Trap: when the store does not answer, nobody's mark moves. Then nothing is concluded from what stands still.

use std::sync::Arc;
use std::time::Duration;

use crate::fan_out;
use crate::server::Core;
use crate::store::{Marks, Op, StoreError, read};

/// How often.
pub const TICK: Duration = Duration::from_millis(500);

/// Departed connections whose routes could not be removed yet, in memory and in one tick.
pub const UNBINDS_MAX: usize = 16_384;
const UNBINDS_PER_TICK: usize = 256;

/// Ticks for ever.
pub async fn run(core: Arc<Core>) {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        tick(&core).await;
    }
}

/// One tick: everything that is done now and then so that nobody is left deaf.
pub async fn tick(core: &Core) {
    core.gateways.missed().tick();
    tell_those_with_room(core);
    if let Err(error) = mark(core).await {
        core.judge.lock().blind();
        core.store_failed(&error);
        return;
    }
    unbind_again(core).await;
}

/// Writes this server's mark, and begins what the others' lead to.
pub async fn mark(core: &Core) -> Result<(), StoreError> {
    let (server, life) = core.judge.lock().me().clone();
    let op = Op::Mark { server, life, pushed_us: core.ledger.mark_us() };
    let seen = read::marks(core.apply(&[op]).await.swap_remove(0))?;
    core.ledger.told(seen.now_us, core.clock.now());
    if !crpc::failpoint::switch("recency_off") {
        take_over(core, &seen).await;
    }
    Ok(())
}

async fn take_over(core: &Core, seen: &Marks) {
    if !core.repush.has_room() {
        return;
    }
    let verdict = core.judge.lock().look(core.clock.now(), seen);
    for takeover in verdict.takeovers {
        let (server, life) = &takeover.of;
        tracing::info!(
            server,
            life,
            from_us = takeover.from_us,
            "a mark stands still; pushing again what is newer"
        );
        core.metrics.takeovers.inc();
        core.repush.take_over(takeover);
    }
    let drop: Vec<Op> = verdict
        .drop
        .into_iter()
        .filter(|life| !core.repush.is_busy_with(life))
        .map(|(server, life)| Op::DropMark { server, life })
        .collect();
    core.apply(&drop).await;
}

/// Nothing is owed any more, so nobody need look after this server: its mark goes with it. Otherwise it stays, and the others
/// see to the rest.
pub async fn leave(core: &Core) {
    if core.ledger.is_clear() {
        let (server, life) = core.judge.lock().me().clone();
        core.apply(&[Op::DropMark { server, life }]).await;
    }
}

/// Gateways whose streams were full, or came while an older one was ending.
fn tell_those_with_room(core: &Core) {
    for incarnation in core.gateways.missed().incarnations() {
        if core.gateways.has_room(incarnation) {
            catch_up(core, incarnation, None);
        }
    }
}

/// A gateway can be reached: it gets the kicks that it is owed, and what it missed is pushed again, from what is known here and
/// what it says itself: pushes of the last `replay` may be missing.
pub fn catch_up(core: &Core, incarnation: u32, replay: Option<Duration>) {
    let (missed_us, kicks) = core.gateways.missed().take(incarnation);
    for kick in kicks {
        fan_out::tell(core, kick);
    }
    if crpc::failpoint::switch("recency_off") {
        return;
    }
    let said_us = replay.and_then(|replay| {
        let now_us = core.ledger.store_now_us(core.clock.now())?;
        Some(now_us.saturating_sub((replay + REPLAY_MARGIN).as_micros() as u64))
    });
    // Exclusive, so that the oldest message missed is among what is newer.
    let from_us = [missed_us.map(|missed_us| missed_us - 1), said_us].into_iter().flatten().min();
    if let Some(from_us) = from_us {
        core.repush.replay(incarnation, from_us);
    }
}

/// On top of what a gateway says: between the two clocks and what was on its way.
const REPLAY_MARGIN: Duration = Duration::from_secs(1);

/// Removes the routes of connections that have gone; those that the store did not take are tried again at the next ticks.
pub async fn unbind(core: &Core, gone: Vec<(u64, u64)>) {
    let ops: Vec<Op> =
        gone.iter().map(|(user, connection)| Op::Unbind { user: *user, connection: *connection }).collect();
    let outcomes = core.apply(&ops).await;
    for (gone, outcome) in gone.into_iter().zip(outcomes) {
        if let Err(error) = outcome {
            core.store_failed(&error);
            unbind_later(core, gone);
        }
    }
}

/// Removes this (user, connection) at a later tick. Beyond the bound it stays until a push finds it gone.
pub fn unbind_later(core: &Core, gone: (u64, u64)) {
    let mut waiting = core.unbinds.lock();
    if waiting.len() < UNBINDS_MAX {
        waiting.push_back(gone);
    }
}

async fn unbind_again(core: &Core) {
    let some: Vec<(u64, u64)> = {
        let mut waiting = core.unbinds.lock();
        let count = waiting.len().min(UNBINDS_PER_TICK);
        waiting.drain(..count).collect()
    };
    if !some.is_empty() {
        unbind(core, some).await;
    }
}
