//! Deletes a user for an operator. On the state server's thread.
//!
//! What goes: connections and tokens, the number and its name, cursors, membership of groups. What stays: the messages, under the
//! name that they were sent with, for those who have them; and of each chat the seq up to which it was theirs, so that whoever
//! takes the name next finds none of it.
//!
//! In this order, each step of which can be done again; the name has its old number until the last but one, by which a second
//! try finds everything:
//! 1. The number is nobody's: no login binds it. Its name is forgotten, here and by the other servers, so that no frame of its
//!    connections is taken any more; and they are ended.
//! 2. When nothing can be under way that was taken before: out of every group, by a message in the group's own order, and out of
//!    every chat.
//! 3. The name gets a new number, for whom the tokens of now are revoked as well. A login is refused until then, and a new
//!    user's from then on.
//! 4. Once more through the groups, for whom somebody may have added under the old number meanwhile.
//!
//! Trap: chats stay in the list of the name. That they stand there is remembered by all servers, so that none would list them
//! again for the next one to bear it.

use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use proto::name::{self, Chat};
use proto::state::{DeleteReply, DeleteRequest, EndReply, EndRequest};
use proto::wire::{self, GroupAction, Kind, Role};
use tonic::Status;

use crate::calls::store_and_push;
use crate::core::Core;
use crate::end::{self, Relayed, status};
use crate::group::{self, Member};
use crate::presence;
use crate::store::{Append, Appended, Op, Roster, Standing, StoreError, read};

/// Chats that are looked at in one call.
const CHATS_AT_ONCE: usize = 64;

/// Changes that are tried in one group, others changing it meanwhile.
const CHANGES_MAX: usize = 16;

/// Does it.
pub async fn delete(core: Arc<Core>, request: DeleteRequest) -> Result<DeleteReply, Status> {
    let name = request.user;
    name::check(&name).map_err(|error| Status::invalid_argument(format!("user: {error}")))?;
    if request.forget > 0 {
        forget_here(&core, &name, request.forget);
        return Ok(DeleteReply::default());
    }
    let ask = Op::User { name: name.clone() };
    let found = read::user(core.apply(&[ask]).await.swap_remove(0)).map_err(status)?;
    let number = found.ok_or_else(|| Status::not_found(format!("there is no user {name:?}")))?;
    done(&core, &[Op::Retire { user: number }, Op::Unname { user: number }]).await.map_err(status)?;
    forget(&core, &name, number).await;
    let taken = core.clock.now();
    let end = EndRequest { user: name.clone(), revoke: true, ..EndRequest::default() };
    let EndReply { ended, left } = end::end(core.clone(), end).await?;
    let waited = core.clock.now().saturating_duration_since(taken);
    core.clock.pause(turn_max(&core).saturating_sub(waited)).await;
    let (chats, groups) = walk(&core, &name, None).await.map_err(status)?;
    renumber(&core, &name, number).await.map_err(status)?;
    forget(&core, &name, number).await;
    core.clock.pause(turn_max(&core)).await;
    let (_, late) = walk(&core, &name, Some(number)).await.map_err(status)?;
    let groups = groups + late;
    tracing::info!(user = name, ended, left, groups, chats, "a user was deleted by an operator");
    Ok(DeleteReply { ended, left, groups, chats })
}

/// Longest that a turn goes on which was decided by what was remembered before.
fn turn_max(core: &Core) -> Duration {
    Duration::from_millis(core.config.store.response_ms_max)
}

/// What is remembered of the number, here and elsewhere. Whoever is not reached notices when the store says that it is nobody's.
async fn forget(core: &Arc<Core>, name: &str, number: u64) {
    forget_here(core, name, number);
    let request = DeleteRequest { user: name.to_owned(), forget: number };
    end::ask_others(core.clone(), Relayed::Forget(request)).await;
}

fn forget_here(core: &Core, name: &str, number: u64) {
    core.users.forget_user(name, number);
    presence::retired(core, number);
}

/// The number of whoever bears the name next.
async fn renumber(core: &Core, name: &str, from: u64) -> Result<(), StoreError> {
    let generation = core.generation();
    let to = core.users.candidates(&*core.store, generation, 1).await?[0];
    end::revoke(core, to, None).await?;
    let renumber = [Op::Renumber { name: name.to_owned(), from, to }];
    core.apply_as(generation, &renumber).await.swap_remove(0).map(drop)
}

/// Takes the user out of all groups that they are in, and of all chats; `only`: out of the groups that they are in by this
/// number alone. How many chats, and how many groups.
async fn walk(core: &Arc<Core>, name: &str, only: Option<u64>) -> Result<(u32, u32), StoreError> {
    let (mut after, mut chats, mut groups) = (String::new(), 0, 0);
    loop {
        let page = Op::Chats { user: name.to_owned(), after, until: String::new(), limit: CHATS_AT_ONCE };
        let page = read::chats(core.apply(&[page]).await.swap_remove(0))?;
        let Some(last) = page.last() else { return Ok((chats, groups)) };
        after = last.clone();
        chats += page.len() as u32;
        for chat in page.iter().filter(|chat| chat.starts_with('#')) {
            groups += u32::from(leave(core, chat, name, only).await?);
        }
        if only.is_none() {
            let vacate = |chat: &String| Op::Vacate { chat: chat.clone(), user: name.to_owned() };
            done(core, &page.iter().map(vacate).collect::<Vec<_>>()).await?;
        }
    }
}

/// Takes the user out of a group. Whether they were in it.
async fn leave(core: &Arc<Core>, chat: &str, name: &str, only: Option<u64>) -> Result<bool, StoreError> {
    let mut was_in = false;
    for _ in 0..CHANGES_MAX {
        let (chat, user) = (chat.to_owned(), name.to_owned());
        let ask = Op::Member { chat: chat.clone(), user };
        let Standing { group, member, .. } = read::standing(core.apply(&[ask]).await.swap_remove(0))?;
        let Some(me) = member.filter(|me| me.is_in(&group) && only.is_none_or(|only| me.number == only))
        else {
            return Ok(was_in);
        };
        was_in = true;
        let (action, members) = if me.role != Role::Owner {
            (GroupAction::GroupLeave, Vec::new())
        } else {
            let ask = Op::Members { chat: chat.clone(), cursors: false };
            match heir(&read::roster(core.apply(&[ask]).await.swap_remove(0))?, name) {
                Some(user) => (GroupAction::GroupRole, vec![user]),
                None => (GroupAction::GroupDelete, Vec::new()),
            }
        };
        let owner = |user| wire::Member { user, role: Role::Owner as i32, ..Default::default() };
        let members = members.into_iter().map(owner).collect();
        let body = wire::GroupChange { action: action as i32, title: String::new(), members }.encode_to_vec();
        let most = core.config.limits.group_members_max;
        let group = Chat::parse(&chat).map_err(|error| StoreError::Corrupt(format!("{chat}: {error}")))?;
        let act = group::act_of(Kind::Group as i32, &body, &group, name, most)
            .map_err(|code| StoreError::Corrupt(format!("{chat}: {}", code.as_str_name())))?;
        let (sender, kind) = (name.to_owned(), Kind::Group);
        let append = Append { chat, sender, body: body.into(), kind, act, ..Append::default() };
        // What is refused was overtaken by another change: it is looked at again.
        let _: Appended = store_and_push(core.clone(), core.generation(), append).await?;
    }
    Err(StoreError::Refused(format!("{chat} changes too fast")))
}

/// Who gets the group of an owner who goes: whoever has been in it longest, of those who lead it if there are any.
fn heir(roster: &Roster, owner: &str) -> Option<String> {
    let others = roster.members.iter().filter(|(user, member)| user != owner && member.is_in(&roster.group));
    let rank = |(_, member): &&(String, Member)| (member.role == Role::Member, member.joined);
    others.min_by_key(rank).map(|(user, _)| user.clone())
}

/// All of these, or the first error.
async fn done(core: &Core, ops: &[Op]) -> Result<(), StoreError> {
    core.apply(ops).await.into_iter().try_for_each(|outcome| outcome.map(drop))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::group::Group;

    #[test]
    fn the_oldest_of_those_who_lead_inherits_and_else_the_oldest() {
        let member =
            |user: &str, role, joined, left| (user.to_owned(), Member { number: 1, role, joined, left });
        let mut members = vec![
            member("ann", Role::Owner, 1, 0),
            member("bob", Role::Member, 2, 0),
            member("cy", Role::Member, 2, 0),
            member("dan", Role::Admin, 1, 9),
        ];
        let heir = |members: &[(String, Member)]| {
            heir(
                &Roster {
                    group: Group { version: 9, ..Group::default() },
                    members: members.to_vec(),
                    ..Roster::default()
                },
                "ann",
            )
        };
        assert_eq!(heir(&members).as_deref(), Some("bob"), "who has left inherits nothing");
        members.push(member("eve", Role::Admin, 7, 0));
        assert_eq!(heir(&members).as_deref(), Some("eve"));
        assert_eq!(heir(&members[..1]), None);
    }
}
