//! The first part of a turn: who is behind the numbers, who may log in, and what number a user that logs in has.
//!
//! Trap: a login that is refused here has cost the store nothing. Keep it so, or guessing is cheap for the one who guesses alone.

use std::sync::Arc;
use std::time::Instant;

use proto::link::{DownFrame, UpFrame};

use super::ask::{Ask, check_login};
use super::{Gateway, Outcomes};
use crate::answer;
use crate::core::Core;
use crate::store::{Op, Outcome, read};

/// Tokens that are verified before others of this thread get their turn: half a millisecond of the slower kind.
const VERIFIED_IN_A_ROW_MAX: usize = 16;

/// Finds the names behind numbers, and the numbers of users that log in; frames that fail here are answered.
pub async fn learn(
    core: &Arc<Core>,
    gateway: &Gateway,
    asks: Vec<(UpFrame, Ask)>,
    (generation, until): (u64, Instant),
    out: &mut Outcomes,
) -> Vec<(UpFrame, Ask)> {
    let mut ops = Vec::new();
    // Places of the logins whose users are not known here.
    let mut strangers: Vec<usize> = Vec::new();
    let mut verified = 0;
    let mut kept = Vec::with_capacity(asks.len());
    for (frame, mut ask) in asks {
        if let Ask::Login(login, number, grant) = &mut ask {
            if core.tokens.is_some() {
                verified += 1;
                if verified % VERIFIED_IN_A_ROW_MAX == 0 {
                    tokio::task::yield_now().await;
                }
            }
            match check_login(core, gateway, login) {
                Ok(granted) => *grant = granted,
                Err(refused) => {
                    core.metrics.logins_refused.inc();
                    let answer = answer::error(&frame, *refused.error);
                    out.answers.push(DownFrame { guess: refused.guess, ..answer });
                    continue;
                }
            }
            *number = core.users.number(&login.user);
            if number.is_none() {
                strangers.push(kept.len());
            }
        } else if !matches!(ask, Ask::Closed) && core.users.name(frame.user).is_none() {
            ops.push(Op::Name { user: frame.user });
        }
        kept.push((frame, ask));
    }
    let names = ops.len();
    if !strangers.is_empty() {
        match core.users.candidates(&*core.store, generation, strangers.len() as u64).await {
            Ok(candidates) => {
                ops.extend(strangers.iter().zip(candidates).filter_map(
                    |(at, candidate)| match &kept[*at].1 {
                        Ask::Login(login, ..) => Some(Op::Register { name: login.user.clone(), candidate }),
                        _ => None,
                    },
                ));
            }
            Err(error) => core.store_failed(&error),
        }
    }
    let mut outcomes = core.apply_as_until(generation, until, &ops).await.into_iter();
    let same = core.generation() == generation;
    for (op, outcome) in ops.iter().zip(outcomes.by_ref().take(names)).filter(|_| same) {
        learn_name(core, op, outcome);
    }
    for (at, outcome) in strangers.into_iter().zip(outcomes) {
        match read::user(outcome) {
            Ok(found) => {
                if let Ask::Login(_, number, _) = &mut kept[at].1 {
                    *number = found;
                }
            }
            Err(error) => {
                // If a number was taken, so may its neighbours be.
                core.users.drop_candidates();
                core.store_failed(&error);
            }
        }
    }
    kept
}

fn learn_name(core: &Core, op: &Op, outcome: Outcome) {
    let Op::Name { user } = op else { return };
    match read::name(outcome) {
        Ok(Some(name)) => core.users.learn_name(*user, &name),
        // Of somebody who was deleted.
        Ok(None) => tracing::info!(user, "a bound user has no name in the store"),
        Err(error) => core.store_failed(&error),
    }
}
