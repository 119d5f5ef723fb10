//! Who is in a group, as those who are in it are told, page by page. On the state server's thread.
//!
//! Trap: a cursor of before somebody joined (again) says nothing of what they may see now, and is not told.

use prost::Message;
use proto::Command;
use proto::link::{DownFrame, UpFrame};
use proto::wire;

use super::ANSWER_OVERHEAD_BYTES;
use crate::answer;
use crate::core::Core;
use crate::group::Member;
use crate::store::{Answer, Head, Outcome, Roster, StoreError};
use crate::turn::{Gateway, not_a_member};

/// The answer, by what the store found: the chat's head, of which the history counts, and the group.
pub fn answer(
    core: &Core,
    gateway: &Gateway,
    (frame, user_name): (&UpFrame, &str),
    asked: wire::Members,
    outcomes: &[Outcome],
) -> DownFrame {
    let chat = asked.chat;
    let refused = |error: wire::Error| wire::Error { request: asked.request, chat: chat.clone(), ..error };
    let [Ok(Answer::Head(Head { history, .. })), Ok(Answer::Roster(Roster { group, members, cursors }))] =
        outcomes
    else {
        let error = outcomes.iter().find_map(|outcome| outcome.as_ref().err().cloned());
        core.store_failed(&error.unwrap_or_else(|| StoreError::Corrupt("members of a group".to_owned())));
        return answer::error(frame, refused(answer::unavailable(core.config.limits.retry_after_ms)));
    };
    if !members.iter().any(|(user, member)| user == user_name && member.is_in(group)) {
        return answer::error(frame, refused(not_a_member()));
    }
    let mut ack = wire::MembersAck {
        request: asked.request,
        chat,
        history: *history,
        version: group.version,
        count: group.count as u32,
        ..Default::default()
    };
    let mut room = (gateway.frame_bytes_max as usize).saturating_sub(ANSWER_OVERHEAD_BYTES);
    for (at, (user, member)) in members.iter().enumerate() {
        if *user <= asked.after || !member.is_in(group) {
            continue;
        }
        let one = told(user, member, cursors.get(at).copied().unwrap_or_default());
        // Key and length in front of it.
        let bytes = one.encoded_len() + 2;
        if bytes > room {
            ack.has_more = true;
            break;
        }
        room -= bytes;
        ack.next.clone_from(user);
        ack.members.push(one);
    }
    if !ack.has_more {
        ack.next.clear();
    }
    ack.title.clone_from(&group.title);
    answer::reply(frame, Command::MembersAck, &ack)
}

/// What is read was delivered.
fn told(user: &str, member: &Member, (delivered, read): (u64, u64)) -> wire::Member {
    let since = |seq: u64| if seq >= member.joined { seq } else { 0 };
    wire::Member {
        user: user.to_owned(),
        role: member.role as i32,
        joined: member.joined,
        delivered: since(delivered.max(read)),
        read: since(read),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::wire::Role;

    #[test]
    fn cursors_of_before_they_joined_are_not_told() {
        let member = Member { number: 1, role: Role::Member, joined: 20, left: 0 };
        let of = |cursors| {
            let told = told("ann", &member, cursors);
            (told.delivered, told.read)
        };
        assert_eq!(of((19, 7)), (0, 0));
        assert_eq!(of((20, 19)), (20, 0));
        assert_eq!(of((20, 30)), (30, 30));
    }
}
