//! The groups of a load: made before anybody sends, and then, in each, one change after the other while its members write. A task
//! for each group.
//!
//! Trap: whoever is out writes on, and is refused; nobody asks for the next change before the last one is answered, so that what is asked
//! for is never refused rightly.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use client::{Client, SendError, change};
use proto::wire::{GroupAction, Role};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use state::group::PAST_STAYS_MAX;
use tokio::sync::watch;

use super::super::history::{Change, What};
use super::{Phase, Shared, place_of};

/// Makes the plan's groups, each by its first member. Their chats; user `u` is in the `u % count`-th.
pub(super) async fn make(shared: &Shared, clients: &[Client]) -> Result<Vec<Arc<str>>, String> {
    let count = shared.plan.users.checked_div(shared.plan.group_users).unwrap_or(0) as usize;
    let mut chats = Vec::new();
    for (group, owner) in clients.iter().enumerate().take(count) {
        let members = members_of(shared, group, count);
        let name = |user: &u32| (&*shared.devices[*user as usize].name, Role::Member);
        let names: Vec<(&str, Role)> = members[1..].iter().map(name).collect();
        let made = owner.create_group("torture", &names).await;
        let place = place_of(made.map_err(|error| format!("cannot make a group: {error}"))?);
        chats.push(place.chat.clone());
        shared.track.lock().made(&place, members.clone());
        shared.journal.add(None, What::Made { place, members });
    }
    Ok(chats)
}

/// One goes, by itself or sent by the owner, one comes back, brought in by the owner: at most two are out at a time, and nobody comes back
/// more often than servers remember. The owner, who is the first of them, stays.
pub(super) async fn come_and_go(
    shared: Arc<Shared>,
    clients: Vec<Client>,
    chats: Vec<Arc<str>>,
    group: usize,
    mut phases: watch::Receiver<Phase>,
) {
    let members = members_of(&shared, group, chats.len());
    let mut random = StdRng::seed_from_u64(shared.seed ^ (1 + group as u64) << 32);
    let mut out = BTreeSet::new();
    let mut returns: BTreeMap<u32, usize> = BTreeMap::new();
    let mut is_over = false;
    while !is_over {
        let every_ms = u64::from(shared.plan.change_every_ms);
        tokio::time::sleep(Duration::from_millis(random.random_range(every_ms / 2..=every_ms * 3 / 2))).await;
        if phases.wait_for(|phase| *phase == Phase::Send).await.is_err() {
            return;
        }
        let may_return = |user: &u32| returns.get(user).is_none_or(|count| *count < PAST_STAYS_MAX);
        let able: Vec<u32> =
            members[1..].iter().copied().filter(|user| out.contains(user) || may_return(user)).collect();
        let Some(user) = able.choose(&mut random).copied() else { return };
        let name = &*shared.devices[user as usize].name;
        let (by, asked, is_back) = if out.contains(&user) {
            (members[0], change(GroupAction::GroupAdd, "", &[(name, Role::Member)]), true)
        } else if out.len() >= OUT_MAX {
            continue;
        } else if random.random_bool(0.5) {
            (user, change(GroupAction::GroupLeave, "", &[]), false)
        } else {
            (members[0], change(GroupAction::GroupRemove, "", &[(name, Role::Member)]), false)
        };
        let (joins, leaves) = if is_back { (vec![user], vec![]) } else { (vec![], vec![user]) };
        let told = Change { joins, leaves };
        shared.journal.add(Some(by), What::Asked { group: group as u32, change: told.clone() });
        shared.unanswered.fetch_add(1, Ordering::Relaxed);
        let answer = clients[by as usize].change_group(&chats[group], &asked).await;
        match answer {
            Ok(sent) => {
                let place = place_of(sent);
                shared.track.lock().changed(&place, &told);
                shared.journal.add(Some(by), What::Changed { place, change: told });
                if is_back {
                    out.remove(&user);
                    *returns.entry(user).or_default() += 1;
                } else {
                    out.insert(user);
                }
            }
            Err(SendError::Refused { code, .. }) => {
                let code = code.as_str_name().into();
                shared.journal.add(Some(by), What::Unchanged { group: group as u32, code });
            }
            // The session is over, and nobody knows who is in.
            Err(_) => is_over = true,
        }
        shared.unanswered.fetch_sub(1, Ordering::Relaxed);
    }
}

fn members_of(shared: &Shared, group: usize, count: usize) -> Vec<u32> {
    (group as u32..shared.plan.users).step_by(count).collect()
}

const OUT_MAX: usize = 2;
