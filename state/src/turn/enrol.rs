//! What must stand before a group gets new members: their numbers, which the fan-out finds them by, and the group in their
//! chat lists, which their Syncs find it by. Two store calls, and only for turns with such a message.
//!
//! Trap: whoever is named here is not in the group yet, and may never be: the atomic step decides. A group that stands in
//! somebody's list who is not in it has nothing to tell them.

use std::time::Instant;

use proto::name::Chat;
use proto::wire::GroupAction;

use super::{Decided, Planned, Step};
use crate::group::{Act, Change};
use crate::server::Core;
use crate::store::{Op, read};

/// Gives numbers to those who are to join, and lists the group for them. Changes for which that fails wait for a resend.
pub async fn enrol(core: &Core, steps: &mut [Step], (generation, until): (u64, Instant)) {
    for step in steps {
        let Planned::Send { chat: chat @ Chat::Group(_), act, .. } = &mut step.ask else { continue };
        let Decided::Step(Act::Change(change)) = act else { continue };
        if matches!(change.action, GroupAction::GroupCreate | GroupAction::GroupAdd)
            && !enter(core, &chat.to_string(), change, (generation, until)).await
        {
            *act = Decided::NotNow;
        }
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
