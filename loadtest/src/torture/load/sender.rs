//! The senders: one task that asks the sessions to send, and one for each answer that is awaited.
//!
//! Trap: a message is noted as sent before it is handed over, or it could be shown before anybody knows of it. What is too
//! large must be so for the store and not for the library, which would say no itself and use no number for it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use client::{Client, Pending, SendError};
use proto::wire::Code;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

use super::super::history::{MessageId, Place, To, What};
use super::super::world::MESSAGE_BYTES_MAX;
use super::{Phase, Shared, body, place_of};

/// Sends at the plan's rate. `groups`: their chats; user `u` is a member of the `u % groups.len()`-th.
pub(super) async fn run(
    shared: Arc<Shared>,
    clients: Vec<Client>,
    groups: Vec<Arc<str>>,
    phases: watch::Receiver<Phase>,
) {
    let (users, partners) = (shared.plan.users, shared.plan.partners.max(1));
    let mut random = StdRng::seed_from_u64(shared.seed);
    let mut counters = vec![0_u32; users as usize];
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let (mut credit, mut looked) = (0.0_f64, Instant::now());
    loop {
        tick.tick().await;
        let passed = std::mem::replace(&mut looked, Instant::now()).elapsed();
        let phase = *phases.borrow();
        if phase == Phase::Last && !shared.closed.load(Ordering::Relaxed) {
            for (from, partner) in (0..users).flat_map(|from| (0..=partners).map(move |to| (from, to))) {
                let counter = &mut counters[from as usize];
                // What is refused is no last word.
                *counter += u32::from(is_too_large(&shared, MessageId { from, n: *counter + 1 }));
                say(&shared, &clients, &groups, &mut counters, (from, partner));
            }
            shared.closed.store(true, Ordering::Release);
        }
        if phase != Phase::Send {
            credit = 0.0;
            continue;
        }
        // What a late tick owes is sent, what a long pause owes is not: no burst behind a stopped machine.
        credit += f64::from(shared.plan.per_s) * passed.min(CATCH_UP_MAX).as_secs_f64();
        while credit >= 1.0 {
            credit -= 1.0;
            let from = random.random_range(0..users);
            // A group is one partner more.
            let partner = random.random_range(0..partners + u32::from(!groups.is_empty()));
            if shared.track.lock().unanswered(from) < shared.plan.unanswered_max {
                say(&shared, &clients, &groups, &mut counters, (from, partner));
            }
        }
    }
}

/// The next message of a user, to one of those it writes to or, behind them, to its group.
fn say(
    shared: &Arc<Shared>,
    clients: &[Client],
    groups: &[Arc<str>],
    counters: &mut [u32],
    (from, partner): (u32, u32),
) {
    let (to, chat) = if partner < shared.plan.partners.max(1) {
        let user = (from + 1 + partner) % shared.plan.users;
        (To::User(user), &*shared.devices[user as usize].name)
    } else if let Some(group) = (from as usize).checked_rem(groups.len()) {
        (To::Group(group as u32), &*groups[group])
    } else {
        return;
    };
    let counter = &mut counters[from as usize];
    *counter += 1;
    send(shared, &clients[from as usize], MessageId { from, n: *counter }, to, chat);
}

fn send(shared: &Arc<Shared>, client: &Client, id: MessageId, to: To, chat: &str) {
    let sent_us = shared.journal.now_us();
    shared.journal.add(Some(id.from), What::Sent { id, to });
    shared.track.lock().sent(id.from);
    shared.sent.fetch_add(1, Ordering::Relaxed);
    shared.unanswered.fetch_add(1, Ordering::Relaxed);
    let bytes = if is_too_large(shared, id) { MESSAGE_BYTES_MAX + 1 } else { shared.plan.body_bytes };
    match client.try_enqueue(chat, body(&shared.run, id, bytes)) {
        Ok(pending) => drop(tokio::spawn(answer(shared.clone(), (id, sent_us), to, pending))),
        Err(error) => answered(shared, (id, sent_us), to, Err(error)),
    }
}

async fn answer(shared: Arc<Shared>, sent: (MessageId, u64), to: To, pending: Pending) {
    let result = pending.await;
    answered(&shared, sent, to, result.map(place_of));
}

fn is_too_large(shared: &Shared, id: MessageId) -> bool {
    let every = shared.plan.too_large_every;
    id.from == 0 && every > 0 && id.n.is_multiple_of(every)
}

fn answered(shared: &Shared, (id, sent_us): (MessageId, u64), to: To, result: Result<Place, SendError>) {
    shared.track.lock().answered(id.from, to, result.as_ref().ok());
    let what = match result {
        Ok(place) => {
            if is_too_large(shared, id) {
                *shared.failed.lock() = Some(format!("{id} was accepted, and is too large"));
            }
            shared.acked.fetch_add(1, Ordering::Relaxed);
            shared.acked_from_us[id.from as usize].fetch_max(sent_us, Ordering::Relaxed);
            What::Acked { id, place }
        }
        Err(SendError::Refused { code, .. }) => {
            let is_out =
                code == Code::NotAMember && matches!(to, To::Group(_)) && shared.plan.change_every_ms > 0;
            if !(is_out || code == Code::MessageTooLarge && is_too_large(shared, id)) {
                shared.refused.fetch_add(1, Ordering::Relaxed);
            }
            What::Refused { id, code: code.as_str_name().into() }
        }
        Err(_) => What::Unknown { id },
    };
    shared.journal.add(Some(id.from), what);
    shared.unanswered.fetch_sub(1, Ordering::Relaxed);
}

const TICK: Duration = Duration::from_millis(2);
const CATCH_UP_MAX: Duration = Duration::from_millis(200);
