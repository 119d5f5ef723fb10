//! Twice a second: how far this server has pushed is written, and the marks of the others are looked at. A task of its own
//! around [`tick`].
//!
//! Trap: when the store does not answer, nobody's mark moves. Then nothing is concluded from what stands still.

use std::sync::Arc;
use std::time::Duration;

use crate::core::Core;
use crate::fan_out;
use crate::repush::Missing;
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
    look_again(core);
    unbind_again(core).await;
}

/// Chats in which something may stand that nobody was told of are pushed again since then.
fn look_again(core: &Core) {
    let now = core.clock.now();
    let Some(now_us) = core.ledger.store_now_us(now) else { return };
    if crpc::failpoint::switch("recency_off") {
        return;
    }
    for (chat, since) in core.doubts.due(now) {
        let ago = now.saturating_duration_since(since) + REPLAY_MARGIN;
        core.repush.look_again(chat, now_us.saturating_sub(ago.as_micros() as u64));
    }
}

/// Writes this server's mark, and begins what the others' lead to.
pub async fn mark(core: &Core) -> Result<(), StoreError> {
    let (server, life) = core.judge.lock().me().clone();
    let op = Op::Mark { server, life, pushed_us: core.ledger.mark_us() };
    let seen = read::marks(core.apply(&[op]).await.swap_remove(0))?;
    core.ledger.told(seen.now_us, core.clock.now());
    core.began_us.get_or_init(|| seen.now_us);
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
///
/// What this life could not push is known exactly. So what the gateway says only counts for what earlier lives did, and only
/// shortly before this one began: what they had accepted and not pushed is taken over from their marks, and what is still
/// missing after that is what they knew to be missing there.
pub fn catch_up(core: &Core, incarnation: u32, replay: Option<Duration>) {
    let (missed_us, kicks) = core.gateways.missed().take(incarnation);
    for kick in kicks {
        fan_out::tell(core, kick);
    }
    if crpc::failpoint::switch("recency_off") {
        return;
    }
    let told = replay.and_then(|replay| {
        let now_us = core.ledger.store_now_us(core.clock.now())?;
        said(now_us, *core.began_us.get()?, replay)
    });
    // Exclusive, so that the oldest message missed is among what is newer.
    let known = missed_us.map(|missed_us| Missing { from_us: missed_us - 1, upto_us: u64::MAX });
    for missing in [known, told].into_iter().flatten() {
        core.repush.replay(incarnation, missing);
    }
}

/// What a gateway may miss by its own word, of a server that began then.
fn said(now_us: u64, began_us: u64, replay: Duration) -> Option<Missing> {
    let since_us = now_us.saturating_sub((replay + REPLAY_MARGIN).as_micros() as u64);
    let from_us = since_us.max(began_us.saturating_sub(REPLAY_MAX.as_micros() as u64));
    (from_us < began_us).then_some(Missing { from_us, upto_us: began_us })
}

/// On top of what a gateway says: between the two clocks and what was on its way.
const REPLAY_MARGIN: Duration = Duration::from_secs(3);

/// Before this life began.
const REPLAY_MAX: Duration = Duration::from_secs(60);

/// Removes the routes of connections that have gone; those that the store did not take are tried again at the next ticks.
pub async fn unbind(core: &Core, gone: Vec<(u64, u64)>) {
    let ops: Vec<Op> =
        gone.iter().map(|(user, connection)| Op::Unbind { user: *user, connection: *connection }).collect();
    let outcomes = core.apply(&ops).await;
    for (gone, outcome) in gone.into_iter().zip(outcomes) {
        core.presence.closed(gone.1, gone.0);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gateways_word_counts_for_the_minute_before_this_life_alone() {
        let s = |seconds: u64| seconds * 1_000_000;
        let ago = Duration::from_secs;
        let began_us = s(1_000);
        assert_eq!(said(s(1_100), began_us, ago(90)), None, "this life knows itself");
        let upto_us = began_us;
        assert_eq!(said(s(1_010), began_us, ago(30)), Some(Missing { from_us: s(977), upto_us }));
        assert_eq!(said(s(1_010), began_us, ago(86_400)), Some(Missing { from_us: s(940), upto_us }));
    }
}
