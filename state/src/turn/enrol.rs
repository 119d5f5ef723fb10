//! What must stand before a group gets new members: their numbers, which the fan-out finds them by, and the group in their
//! chat lists, which their Syncs find it by. Two store calls, and only for turns with such a message.
//!
//! Trap: whoever is named here is not in the group yet, and may never be: the atomic step decides. A group that stands in
//! somebody's list who is not in it has nothing to tell them. What is written here stays, so how many one may name is limited.

use std::time::Instant;

use proto::name::Chat;
use proto::wire::{self, Code, GroupAction};

use super::{Decided, Outcomes, Planned, Step};
use crate::answer;
use crate::core::Core;
use crate::group::{Act, Change};
use crate::store::{Op, read};

/// Gives numbers to those who are to join, and lists the group for them. Changes for which that fails wait for a resend; whoever names too
/// many is told when to come again, and the step is left out.
pub async fn enrol(
    core: &Core,
    steps: &mut Vec<Step>,
    (generation, until): (u64, Instant),
    out: &mut Outcomes,
) {
    for mut step in std::mem::take(steps) {
        if let Planned::Send { send, chat: chat @ Chat::Group(_), act } = &mut step.ask
            && let Decided::Step(Act::Change(change)) = act
            && matches!(change.action, GroupAction::GroupCreate | GroupAction::GroupAdd)
        {
            let (user, now) = (step.frame.user, core.clock.now());
            // Whoever makes a group is the first of its members; and it costs as much as one more.
            let is_new = change.action == GroupAction::GroupCreate;
            let count = (change.named.len() - usize::from(is_new)).max(usize::from(is_new));
            if let Some(Err(retry_after_ms)) =
                core.naming.as_ref().map(|naming| naming.take(user, count, now))
            {
                core.metrics.sends_rate_limited.inc();
                let text = "this user puts others into groups faster than is allowed here";
                let error = answer::about_send(send, Code::RateLimited, text);
                out.answers.push(answer::error(&step.frame, wire::Error { retry_after_ms, ..error }));
                continue;
            }
            if !enter(core, &chat.to_string(), change, (generation, until)).await {
                core.naming.iter().for_each(|naming| naming.give_back(user, count));
                *act = Decided::NotNow;
            }
        }
        steps.push(step);
    }
}

async fn enter(core: &Core, chat: &str, change: &mut Change, (generation, until): (u64, Instant)) -> bool {
    for named in &mut change.named {
        named.number = core.users.number(&named.user).unwrap_or(0);
    }
    let strangers = change.named.iter().filter(|named| named.number == 0).count();
    let candidates = match core.users.candidates(&*core.store, generation, strangers as u64).await {
        Ok(candidates) => candidates,
        Err(error) => {
            core.store_failed(&error);
            return false;
        }
    };
    let unknown = change.named.iter().filter(|named| named.number == 0);
    let mut ops: Vec<Op> = unknown
        .zip(candidates)
        .map(|(named, candidate)| Op::Register { name: named.user.clone(), candidate })
        .collect();
    let registers = ops.len();
    let list = |user: &String| Op::ListChat { user: user.clone(), chat: chat.to_owned() };
    // A number stands in the group for long: what is remembered of one may be of somebody who was deleted.
    let known = change.named.iter().filter(|named| named.number > 0);
    ops.extend(known.map(|named| Op::User { name: named.user.clone() }));
    let numbers = ops.len();
    ops.extend(change.named.iter().map(|named| list(&named.user)));
    let mut outcomes = core.apply_as_until(generation, until, &ops).await.into_iter();
    let mut all = core.generation() == generation && registers == strangers;
    let (unknown, known): (Vec<_>, Vec<_>) = change.named.iter_mut().partition(|named| named.number == 0);
    for (named, outcome) in unknown.into_iter().chain(known).zip(outcomes.by_ref().take(numbers)) {
        match read::user(outcome) {
            Ok(Some(number)) => named.number = number,
            Ok(None) => all = false,
            Err(error) => {
                // If a number was taken, so may its neighbours be.
                core.users.drop_candidates();
                core.store_failed(&error);
                all = false;
            }
        }
    }
    for outcome in outcomes {
        if let Err(error) = outcome {
            core.store_failed(&error);
            all = false;
        }
    }
    if all {
        change.named.iter().for_each(|named| core.users.learn(&named.user, named.number));
    }
    all
}
