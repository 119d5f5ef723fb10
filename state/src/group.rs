//! Groups: what may happen to one, who may do it, and what comes of it. Pure: the embedded stores decide by it, inside their
//! atomic step; the Redis store decides the same in `lua/append.lua`, and one contract test holds all of them together.
//!
//! A group is its chat, whose row says title, members in all and the seq of the last change (its version), and a row for
//! everybody who was ever in it. A message of [`Kind::Group`] changes it at the message's own seq; so whoever knows the seq
//! of a message knows who may see it: those who joined at or before it and had not left before it.
//!
//! Trap: a row outlives the membership, because who has left may still read what was said until then; and who comes back has a new one,
//! but may read what was said in the stays before. Being in it is [`Member::left`] 0 *and* the group not deleted.

use prost::Message;
use proto::name::{self, Chat};
use proto::wire::{self, Code, GroupAction, Kind, Role};

use crate::store::Stored;

/// Longest title, and longest content type of a payload, bytes.
pub const TITLE_BYTES_MAX: usize = 128;

/// Members that one change may name.
pub const CHANGE_MEMBERS_MAX: usize = 500;

/// Users that one payload may mention.
pub const MENTIONS_MAX: usize = 64;

/// Earlier stays of somebody in a group that are remembered, the latest ones. What was said in an older one and was not read by then is
/// passed over.
pub const PAST_STAYS_MAX: usize = 16;

/// From the seq that brought somebody into a group to the one that took them out, both included.
pub type Stay = (u64, u64);

/// Rows that a group may have, of members and of those who left, for each member that it may have.
const ROWS_PER_MEMBER: usize = 2;

/// What the atomic step of a message does beside storing it.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Act {
    /// Nothing.
    #[default]
    Nothing,
    /// It refers to this seq, which must be a message of the same sender that can be edited.
    Refer(u64),
    /// It changes its group.
    Change(Change),
}

/// A change of a group, checked as far as it can be without the group.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    /// Never [`GroupAction::GroupUnspecified`].
    pub action: GroupAction,
    /// Of a group that is made or renamed.
    pub title: String,
    /// Who is named. With Create the first one is the sender.
    pub named: Vec<Named>,
    /// Members that the group may have.
    pub members_max: usize,
}

/// Somebody in a change.
#[derive(Debug, Clone, PartialEq)]
pub struct Named {
    /// Name.
    pub user: String,
    /// Number; 0 where nobody joins by it.
    pub number: u64,
    /// What they are to be.
    pub role: Role,
}

/// Somebody who is or was in a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member {
    /// The user's number.
    pub number: u64,
    /// What they are, or were.
    pub role: Role,
    /// Seq of the first message that they may see.
    pub joined: u64,
    /// Seq of the last one; 0: they are in it.
    pub left: u64,
}

/// A group's row.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Group {
    /// Seq of the last change; 0: there is no such group.
    pub version: u64,
    /// Its name for people.
    pub title: String,
    /// Members.
    pub count: u64,
    /// Rows of members and of those who left.
    pub rows: u64,
    /// Seq at which it was deleted; 0: it was not.
    pub deleted: u64,
}

impl Group {
    /// Whether so many are in it at most, and no more than some times as many have ever been: their rows are read with those of members.
    pub fn is_small(&self, members_max: u64) -> bool {
        self.count <= members_max && self.rows <= ROWS_OF_SMALL * members_max
    }
}

/// See [`Group::is_small`].
const ROWS_OF_SMALL: u64 = 8;

impl Member {
    /// First and last seq that they may see.
    pub fn sees(&self, group: &Group) -> (u64, u64) {
        let ends = [self.left, group.deleted].into_iter().filter(|end| *end > 0);
        (self.joined, ends.min().unwrap_or(u64::MAX))
    }

    /// Whether they are in it.
    pub fn is_in(&self, group: &Group) -> bool {
        self.left == 0 && group.deleted == 0
    }
}

/// What a message brings about in its group.
#[derive(Debug, Clone, PartialEq)]
pub struct Effect {
    /// The group's row afterwards.
    pub group: Group,
    /// Rows of members to be written.
    pub rows: Vec<(String, Member)>,
    /// Of those who come back, the stay that their row tells until then: to be remembered. `None`: the name was another's, and with it what
    /// is remembered.
    pub past: Vec<(String, Option<Stay>)>,
}

/// Remembers one more stay that is over, or forgets them.
pub fn remember(past: &mut Vec<Stay>, stay: Option<Stay>) {
    match stay {
        Some(stay) => past.push(stay),
        None => past.clear(),
    }
    past.drain(..past.len().saturating_sub(PAST_STAYS_MAX));
}

/// Decides on a message of a group: may the sender, and what changes? `head`: seq of the newest message, `find` gives rows.
/// The outer error is `find`'s; the inner one refuses the message for ever.
pub fn decide<E>(
    act: &Act,
    sender: &str,
    group: &Group,
    head: u64,
    mut find: impl FnMut(&str) -> Result<Option<Member>, E>,
) -> Result<Result<Option<Effect>, Code>, E> {
    let seq = head + 1;
    let mut after = Group { version: seq, ..group.clone() };
    let mut rows: Vec<(String, Member)> = Vec::new();
    let mut past = Vec::new();
    let Act::Change(change) = act else {
        let is_in = find(sender)?.is_some_and(|me| me.is_in(group));
        return Ok(if is_in { Ok(None) } else { Err(Code::NotAMember) });
    };
    if change.action == GroupAction::GroupCreate {
        if head > 0 {
            return Ok(Err(Code::GroupExists));
        }
        if change.named.len() > change.members_max {
            return Ok(Err(Code::GroupFull));
        }
        for named in &change.named {
            let member = Member { number: named.number, role: named.role, joined: seq, left: 0 };
            rows.push((named.user.clone(), member));
        }
        after.title.clone_from(&change.title);
        (after.count, after.rows) = (rows.len() as u64, rows.len() as u64);
        return Ok(Ok(Some(Effect { group: after, rows, past })));
    }
    let Some(me) = find(sender)?.filter(|me| me.is_in(group)) else { return Ok(Err(Code::NotAMember)) };
    let leads = me.role != Role::Member;
    match change.action {
        GroupAction::GroupRename if leads => after.title.clone_from(&change.title),
        GroupAction::GroupAdd if leads => {
            for named in &change.named {
                if named.role >= me.role {
                    return Ok(Err(Code::NotAllowed));
                }
                let known = find(&named.user)?;
                if known.is_some_and(|known| known.is_in(group)) {
                    continue;
                }
                after.rows += u64::from(known.is_none());
                let stay =
                    |known: Member| (known.number == named.number).then_some((known.joined, known.left));
                past.extend(known.map(|known| (named.user.clone(), stay(known))));
                after.count += 1;
                let member = Member { number: named.number, role: named.role, joined: seq, left: 0 };
                rows.push((named.user.clone(), member));
            }
            let most = change.members_max as u64;
            if after.count > most || after.rows > most * ROWS_PER_MEMBER as u64 {
                return Ok(Err(Code::GroupFull));
            }
        }
        GroupAction::GroupRemove if leads => {
            for named in &change.named {
                let Some(member) = find(&named.user)?.filter(|member| member.is_in(group)) else { continue };
                if member.role >= me.role {
                    return Ok(Err(Code::NotAllowed));
                }
                after.count -= 1;
                rows.push((named.user.clone(), Member { left: seq, ..member }));
            }
        }
        GroupAction::GroupLeave if me.role != Role::Owner || group.count == 1 => {
            after.count -= 1;
            rows.push((sender.to_owned(), Member { left: seq, ..me }));
        }
        GroupAction::GroupRole if me.role == Role::Owner => {
            let Some(named) = change.named.first().filter(|named| named.user != sender) else {
                return Ok(Err(Code::BadChange));
            };
            let Some(member) = find(&named.user)?.filter(|member| member.is_in(group)) else {
                return Ok(Err(Code::BadChange));
            };
            rows.push((named.user.clone(), Member { role: named.role, ..member }));
            if named.role == Role::Owner {
                rows.push((sender.to_owned(), Member { role: Role::Admin, ..me }));
            }
        }
        GroupAction::GroupDelete if me.role == Role::Owner => (after.deleted, after.count) = (seq, 0),
        _ => return Ok(Err(Code::NotAllowed)),
    }
    Ok(Ok(Some(Effect { group: after, rows, past })))
}

/// Whether this message, if there is one, may be edited or recalled by this sender. The error is final.
pub fn may_edit(message: Option<&Stored>, sender: &str) -> Result<(), Code> {
    match message {
        Some(message) if message.sender != sender => Err(Code::NotAllowed),
        Some(Stored { kind: Kind::Text | Kind::Payload, .. }) => Ok(()),
        _ => Err(Code::BadChange),
    }
}

/// What a message wants beside being stored, out of its kind and body; the error is final. Numbers are not known here, and are 0.
pub fn act_of(kind: i32, body: &[u8], chat: &Chat, sender: &str, members_max: usize) -> Result<Act, Code> {
    let kind = Kind::try_from(kind).map_err(|_| Code::BadChange)?;
    match kind {
        Kind::Text => Ok(Act::Nothing),
        Kind::Group if matches!(chat, Chat::Group(_)) => {
            let change = wire::GroupChange::decode(body).map_err(|_| Code::BadChange)?;
            checked(change, sender, members_max).map(Act::Change).ok_or(Code::BadChange)
        }
        Kind::Group => Err(Code::BadChange),
        Kind::Edit | Kind::Recall => {
            let edit = wire::Edit::decode(body).map_err(|_| Code::BadChange)?;
            let fits = (1..=proto::NUMBER_MAX).contains(&edit.seq);
            let fits = fits && (kind == Kind::Edit || edit.body.is_empty());
            if fits { Ok(Act::Refer(edit.seq)) } else { Err(Code::BadChange) }
        }
        Kind::Payload => {
            let payload = wire::Payload::decode(body).map_err(|_| Code::BadChange)?;
            let fits = is_title(&payload.content_type)
                && payload.reply_to <= proto::NUMBER_MAX
                && payload.mentions.len() <= MENTIONS_MAX
                && payload.mentions.iter().all(|mention| name::check(&mention.user).is_ok());
            if fits { Ok(Act::Nothing) } else { Err(Code::BadChange) }
        }
        // Elsewhere others would hear of it.
        Kind::Hide if chat.pair_members() != Some((sender, sender)) => Err(Code::BadChange),
        Kind::Hide => {
            let hide = wire::Hide::decode(body).map_err(|_| Code::BadChange)?;
            if may_hide(&hide, sender) { Ok(Act::Nothing) } else { Err(Code::BadChange) }
        }
    }
}

/// Whether it names a message that this user may have been shown. Whether there is such a message makes no difference to anybody.
fn may_hide(hide: &wire::Hide, user: &str) -> bool {
    let is_theirs = |chat: Chat| {
        let spelled = chat.to_string() == hide.chat;
        spelled && chat.pair_members().is_none_or(|(low, high)| low == user || high == user)
    };
    let is_theirs = Chat::parse(&hide.chat).is_ok_and(is_theirs);
    is_theirs && hide.history != 0 && (1..=proto::NUMBER_MAX).contains(&hide.seq)
}

fn checked(change: wire::GroupChange, sender: &str, members_max: usize) -> Option<Change> {
    let action = change.action();
    let mut named = Vec::with_capacity(change.members.len() + 1);
    if action == GroupAction::GroupCreate {
        named.push(Named { user: sender.to_owned(), number: 0, role: Role::Owner });
    }
    for member in change.members {
        let role = Role::try_from(member.role).ok()?;
        if named.len() > CHANGE_MEMBERS_MAX || name::check(&member.user).is_err() {
            return None;
        }
        // Who is named twice is what is said last; nobody makes anybody else the owner but by GROUP_ROLE.
        let owner = role == Role::Owner && action != GroupAction::GroupRole;
        match named.iter_mut().find(|known| known.user == member.user) {
            Some(known) if known.role != Role::Owner || action != GroupAction::GroupCreate => {
                known.role = role;
            }
            Some(_) => {}
            None => named.push(Named { user: member.user, number: 0, role }),
        }
        if owner {
            return None;
        }
    }
    let titled = matches!(action, GroupAction::GroupCreate | GroupAction::GroupRename);
    let names = match action {
        GroupAction::GroupCreate => 1..=CHANGE_MEMBERS_MAX + 1,
        GroupAction::GroupAdd | GroupAction::GroupRemove => 1..=CHANGE_MEMBERS_MAX,
        GroupAction::GroupRole => 1..=1,
        GroupAction::GroupRename | GroupAction::GroupLeave | GroupAction::GroupDelete => 0..=0,
        GroupAction::GroupUnspecified => return None,
    };
    let fits = names.contains(&named.len())
        && (if titled { is_title(&change.title) } else { change.title.is_empty() });
    fits.then_some(Change { action, title: change.title, named, members_max })
}

fn is_title(text: &str) -> bool {
    (1..=TITLE_BYTES_MAX).contains(&text.len()) && !text.chars().any(char::is_control)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn member(user: &str, role: Role) -> wire::Member {
        wire::Member { user: user.to_owned(), role: role as i32, ..Default::default() }
    }

    fn act(action: GroupAction, title: &str, members: Vec<wire::Member>) -> Result<Act, Code> {
        let change = wire::GroupChange { action: action as i32, title: title.to_owned(), members };
        act_of(Kind::Group as i32, &change.encode_to_vec(), &Chat::Group(7), "ann", 3)
    }

    #[test]
    fn changes_that_make_no_sense_are_refused_before_the_store() {
        let bob = || vec![member("bob", Role::Member)];
        assert!(act(GroupAction::GroupCreate, "t", vec![]).is_ok());
        assert!(act(GroupAction::GroupRole, "", vec![member("bob", Role::Owner)]).is_ok());
        let long = "t".repeat(TITLE_BYTES_MAX + 1);
        let many = (0..=CHANGE_MEMBERS_MAX).map(|n| member(&format!("u{n}"), Role::Member)).collect();
        for (action, title, members) in [
            (GroupAction::GroupUnspecified, "", vec![]),
            (GroupAction::GroupCreate, "", bob()),
            (GroupAction::GroupCreate, &*long, bob()),
            (GroupAction::GroupCreate, "a\nb", bob()),
            (GroupAction::GroupCreate, "t", vec![member("bob", Role::Owner)]),
            (GroupAction::GroupCreate, "t", vec![member("b:b", Role::Member)]),
            (GroupAction::GroupRename, "", vec![]),
            (GroupAction::GroupRename, "t", bob()),
            (GroupAction::GroupAdd, "", vec![]),
            (GroupAction::GroupAdd, "t", bob()),
            (GroupAction::GroupAdd, "", vec![member("bob", Role::Owner)]),
            (GroupAction::GroupAdd, "", many),
            (GroupAction::GroupRemove, "", vec![]),
            (GroupAction::GroupLeave, "", bob()),
            (GroupAction::GroupDelete, "t", vec![]),
            (GroupAction::GroupRole, "", vec![member("bob", Role::Admin), member("cy", Role::Admin)]),
        ] {
            assert_eq!(act(action, title, members), Err(Code::BadChange), "{action:?} {title}");
        }
        let edit = |seq, body: &'static [u8]| wire::Edit { seq, body: body.into() }.encode_to_vec();
        let pair = Chat::pair("ann", "bob").unwrap();
        assert_eq!(act_of(2, &edit(3, b"new"), &pair, "ann", 3), Ok(Act::Refer(3)));
        assert_eq!(act_of(3, &edit(3, b""), &pair, "ann", 3), Ok(Act::Refer(3)));
        for (kind, body) in [(2, edit(0, b"")), (3, edit(3, b"x")), (3, vec![0xff]), (1, vec![]), (9, vec![])]
        {
            assert_eq!(act_of(kind, &body, &pair, "ann", 3), Err(Code::BadChange), "{kind}");
        }
    }

    #[test]
    fn a_message_is_hidden_in_the_chat_with_oneself_and_nowhere_else() {
        let hide = |chat: &str, history, seq| wire::Hide { chat: chat.to_owned(), history, seq };
        let decided = |hide: &wire::Hide, chat: Chat| act_of(5, &hide.encode_to_vec(), &chat, "bob", 3);
        let own = || Chat::pair("bob", "bob").unwrap();
        for chat in ["ann:bob", "bob:bob", "bob:cy", "#7"] {
            assert_eq!(decided(&hide(chat, 9, 1), own()), Ok(Act::Nothing), "{chat}");
            for other in
                [Chat::pair("ann", "bob").unwrap(), Chat::pair("ann", "ann").unwrap(), Chat::Group(7)]
            {
                assert_eq!(decided(&hide(chat, 9, 1), other), Err(Code::BadChange), "{chat}");
            }
        }
        for bad in [
            hide("bob:ann", 9, 1),
            hide("ann:cy", 9, 1),
            hide("bob", 9, 1),
            hide("#07", 9, 1),
            hide("ann:bob", 0, 1),
            hide("ann:bob", 9, 0),
            hide("ann:bob", 9, proto::NUMBER_MAX + 1),
        ] {
            assert_eq!(decided(&bad, own()), Err(Code::BadChange), "{bad:?}");
        }
        assert_eq!(act_of(5, &[0xff], &own(), "bob", 3), Err(Code::BadChange));
    }

    /// The owner names herself: that adds nobody.
    #[test]
    fn whoever_makes_a_group_is_its_owner_once() {
        let Ok(Act::Change(change)) =
            act(GroupAction::GroupCreate, "t", vec![member("ann", Role::Member), member("bob", Role::Admin)])
        else {
            panic!()
        };
        let named: Vec<_> = change.named.iter().map(|named| (named.user.as_str(), named.role)).collect();
        assert_eq!(named, [("ann", Role::Owner), ("bob", Role::Admin)]);
    }

    #[test]
    fn who_leads_decides_and_who_has_left_sees_no_more() {
        let mut rows: BTreeMap<String, Member> = BTreeMap::new();
        let mut group = Group::default();
        let mut head = 0;
        let mut say = |sender: &str, act: Act| {
            let find = |user: &str| Ok::<_, ()>(rows.get(user).copied());
            let effect = decide(&act, sender, &group, head, find).unwrap()?;
            head += 1;
            if let Some(effect) = effect {
                group = effect.group;
                rows.extend(effect.rows);
            }
            Ok::<_, Code>((group.clone(), rows.clone()))
        };
        let change = |action, title: &str, members| act(action, title, members).unwrap();
        let add = |user: &str, role| change(GroupAction::GroupAdd, "", vec![member(user, role)]);
        let remove = |user: &str| change(GroupAction::GroupRemove, "", vec![member(user, Role::Member)]);
        let leave = || change(GroupAction::GroupLeave, "", vec![]);
        assert_eq!(say("ann", Act::Nothing), Err(Code::NotAMember));
        let bob = vec![member("bob", Role::Admin)];
        say("ann", change(GroupAction::GroupCreate, "t", bob)).unwrap();
        assert_eq!(say("ann", change(GroupAction::GroupCreate, "t", vec![])), Err(Code::GroupExists));
        assert_eq!(say("cy", add("cy", Role::Member)), Err(Code::NotAMember));
        assert_eq!(say("bob", add("cy", Role::Admin)), Err(Code::NotAllowed));
        say("bob", add("cy", Role::Member)).unwrap();
        assert_eq!(say("ann", add("dan", Role::Member)), Err(Code::GroupFull));
        assert_eq!(say("cy", remove("bob")), Err(Code::NotAllowed));
        assert_eq!(say("bob", remove("ann")), Err(Code::NotAllowed));
        assert_eq!(say("ann", leave()), Err(Code::NotAllowed), "an owner does not run away");
        say("cy", Act::Nothing).unwrap();
        let (group, rows) = say("bob", remove("cy")).unwrap();
        assert_eq!((rows["cy"].sees(&group), group.count), ((2, 4), 2));
        assert_eq!(say("cy", Act::Nothing), Err(Code::NotAMember));
        let owner = change(GroupAction::GroupRole, "", vec![member("bob", Role::Owner)]);
        assert_eq!(say("bob", owner.clone()), Err(Code::NotAllowed));
        let (_, rows) = say("ann", owner).unwrap();
        assert_eq!((rows["ann"].role, rows["bob"].role), (Role::Admin, Role::Owner));
        let (group, rows) = say("ann", add("cy", Role::Member)).unwrap();
        assert_eq!((rows["cy"].sees(&group), group.version, group.rows), ((6, u64::MAX), 6, 3));
        assert_eq!(say("ann", change(GroupAction::GroupDelete, "", vec![])), Err(Code::NotAllowed));
        let (group, rows) = say("bob", change(GroupAction::GroupDelete, "", vec![])).unwrap();
        assert_eq!((rows["cy"].sees(&group), rows["cy"].is_in(&group)), ((6, 7), false));
        assert_eq!(say("bob", Act::Nothing), Err(Code::NotAMember));
    }
}
