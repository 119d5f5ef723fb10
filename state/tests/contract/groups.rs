//! Groups: whatever is said and changed, every store decides as `state::group` does, and keeps who was in them when.

use std::collections::BTreeMap;

use bytes::Bytes;
use proto::wire::{Code, GroupAction, Kind, Role};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use state::group::{Act, Change, Group, Member, Named, PAST_STAYS_MAX, Stay, decide, remember};
use state::store::{Append, Appended, MessageId, Op, Roster, Standing, Store, read};

use super::{appended, one, pull};

const MEMBERS_MAX: usize = 5;

const MEMBERS_IN_A_CHANGE: usize = 400;

fn say(chat: &str, sender: &str, (stream, n): (u64, u64), kind: Kind, act: Act) -> Op {
    let body = Bytes::from(format!("{sender}/{stream}/{n}"));
    let (chat, sender) = (chat.to_owned(), sender.to_owned());
    let id = MessageId::Numbered { stream, n };
    Op::Append(Append { chat, sender, id, body, kind, act, ..Append::default() })
}

fn change(action: GroupAction, named: &[(&str, Role)]) -> Act {
    let number = |user: &str| u64::from(crc32c::crc32c(user.as_bytes()));
    let name =
        |(user, role): &(&str, Role)| Named { user: (*user).to_owned(), number: number(user), role: *role };
    let title = if action == GroupAction::GroupCreate { "Türme" } else { "" }.to_owned();
    let named = named.iter().map(name).collect();
    Act::Change(Change { action, title, named, members_max: MEMBERS_MAX })
}

async fn roster(store: &dyn Store, chat: &str) -> Roster {
    read::roster(one(store, Op::Members { chat: chat.to_owned(), cursors: false }).await).unwrap()
}

async fn cursors(store: &dyn Store, chat: &str) -> Vec<(String, (u64, u64))> {
    let Roster { members, cursors, .. } =
        read::roster(one(store, Op::Members { chat: chat.to_owned(), cursors: true }).await).unwrap();
    assert_eq!(members.len(), cursors.len());
    members.into_iter().map(|(user, _)| user).zip(cursors).collect()
}

async fn standing(store: &dyn Store, chat: &str, user: &str) -> Standing {
    let op = Op::Member { chat: chat.to_owned(), user: user.to_owned() };
    read::standing(one(store, op).await).unwrap()
}

/// A group that is made, said things in, and left; and an id that is answered again.
pub async fn groups_are_their_members(store: &dyn Store) {
    let chat = "#9007199254740991";
    assert_eq!(standing(store, chat, "ann").await, Standing::default());
    assert_eq!(roster(store, chat).await, Roster::default());
    let text = |sender: &str, n| say(chat, sender, (1, n), Kind::Text, Act::Nothing);
    assert_eq!(appended(store, text("ann", 1)).await, Appended::Refused(Code::NotAMember));
    let made = change(GroupAction::GroupCreate, &[("ann", Role::Owner), ("bob", Role::Member)]);
    let make = say(chat, "ann", (1, 2), Kind::Group, made);
    let first = appended(store, make.clone()).await;
    assert!(matches!(first, Appended::Stored { seq: 1, version: 1, again: false, .. }), "{first:?}");
    let again = appended(store, make).await;
    assert!(matches!(again, Appended::Stored { seq: 1, again: true, .. }), "{again:?}");
    let said = appended(store, text("bob", 1)).await;
    assert!(matches!(said, Appended::Stored { seq: 2, version: 1, again: false, .. }), "{said:?}");
    let away = say(chat, "bob", (1, 2), Kind::Group, change(GroupAction::GroupLeave, &[]));
    let left = appended(store, away).await;
    assert!(matches!(left, Appended::Stored { seq: 3, version: 3, .. }), "{left:?}");
    assert_eq!(appended(store, text("bob", 3)).await, Appended::Refused(Code::NotAMember));
    let Standing { group, member, past } = standing(store, chat, "bob").await;
    assert_eq!(past, []);
    assert_eq!(group, Group { version: 3, title: "Türme".to_owned(), count: 1, rows: 2, deleted: 0 });
    let bob = member.unwrap();
    assert_eq!((bob.sees(&group), bob.is_in(&group), bob.role), ((1, 3), false, Role::Member));
    let page = read::page(one(store, pull(chat, 0, 9, false)).await).unwrap();
    let kinds: Vec<Kind> = page.messages.iter().map(|message| message.kind).collect();
    assert_eq!(kinds, [Kind::Group, Kind::Text, Kind::Group]);
    assert_eq!(page.messages[1].body, Bytes::from_static(b"bob/1/1"));
}

/// How far everybody has a group comes with who is in it, of few and of as many as one command of Redis cannot name.
pub async fn groups_tell_how_far_everybody_is(store: &dyn Store) {
    let chat = "#88";
    assert_eq!(cursors(store, chat).await, []);
    let users: Vec<String> = (0..600).map(|n| format!("m{n:04}")).collect();
    for (n, some) in users.chunks(MEMBERS_IN_A_CHANGE).enumerate() {
        let action = if n == 0 { GroupAction::GroupCreate } else { GroupAction::GroupAdd };
        let role = |at| if (n, at) == (0, 0) { Role::Owner } else { Role::Member };
        let named: Vec<_> = some.iter().enumerate().map(|(at, user)| (user.as_str(), role(at))).collect();
        let Act::Change(made) = change(action, &named) else { panic!() };
        let act = Act::Change(Change { members_max: 1_000, ..made });
        let answer = appended(store, say(chat, "m0000", (1, n as u64 + 1), Kind::Group, act)).await;
        assert!(matches!(answer, Appended::Stored { .. }), "{answer:?}");
    }
    let ops: Vec<Op> = users
        .iter()
        .enumerate()
        .filter(|(n, _)| n % 3 > 0)
        .map(|(n, user)| Op::Delivered {
            chat: chat.into(),
            user: user.clone(),
            seq: 2,
            read: if n % 3 == 2 { 1 } else { 0 },
        })
        .collect();
    assert!(store.apply(&ops).await.iter().all(Result::is_ok));
    // Of somebody who never was in it nothing is told.
    let stranger = Op::Delivered { chat: chat.into(), user: "zoe".into(), seq: 2, read: 2 };
    store.apply(&[stranger]).await;
    let wanted = |(n, user): (usize, &String)| (user.clone(), [(0, 0), (2, 0), (2, 1)][n % 3]);
    assert_eq!(cursors(store, chat).await, users.iter().enumerate().map(wanted).collect::<Vec<_>>());
}

/// Only the sender edits, and only what can be edited and is there.
pub async fn edits_are_their_senders(store: &dyn Store) {
    for chat in ["edit:or", "#77"] {
        if chat.starts_with('#') {
            let named = [("edit", Role::Owner), ("or", Role::Member)];
            appended(store, say(chat, "edit", (9, 1), Kind::Group, change(GroupAction::GroupCreate, &named)))
                .await;
        }
        let seq_of = |answer: Appended| match answer {
            Appended::Stored { seq, .. } => Ok(seq),
            Appended::Refused(code) => Err(code),
            other => panic!("{other:?}"),
        };
        let mut n = 0;
        let mut say = async |sender: &str, kind, act| {
            n += 1;
            let stream = u64::from(crc32c::crc32c(sender.as_bytes())) + n;
            seq_of(appended(store, say(chat, sender, (stream, 1), kind, act)).await)
        };
        let text = say("edit", Kind::Text, Act::Nothing).await.unwrap();
        let payload = say("edit", Kind::Payload, Act::Nothing).await.unwrap();
        let edit = say("edit", Kind::Edit, Act::Refer(text)).await.unwrap();
        say("edit", Kind::Recall, Act::Refer(payload)).await.unwrap();
        assert_eq!(say("or", Kind::Edit, Act::Refer(text)).await, Err(Code::NotAllowed));
        assert_eq!(say("edit", Kind::Edit, Act::Refer(edit)).await, Err(Code::BadChange));
        assert_eq!(say("edit", Kind::Edit, Act::Refer(99)).await, Err(Code::BadChange));
        let head = say("edit", Kind::Text, Act::Nothing).await.unwrap();
        assert_eq!(head, payload + 3, "what is refused takes no seq");
    }
}

/// Everything at random, compared with the model.
pub async fn groups_follow_the_model(store: &dyn Store) {
    let mut random = StdRng::seed_from_u64(7);
    for number in 1..=30u64 {
        let chat = format!("#{}", 1000 + number);
        let (mut group, mut rows, mut head) = (Group::default(), BTreeMap::<String, Member>::new(), 0);
        let mut past: BTreeMap<String, Vec<Stay>> = BTreeMap::new();
        let users = ["u0", "u1", "u2", "u3", "u4", "u5", "u6"];
        for n in 1..=40 {
            let sender = users[random.random_range(0..users.len())];
            let any = users[random.random_range(0..users.len())];
            let other = users[random.random_range(0..users.len())];
            let role = [Role::Member, Role::Admin, Role::Owner][random.random_range(0..3)];
            let low = if role == Role::Owner { Role::Member } else { role };
            let two = if any == other { vec![(any, low)] } else { vec![(any, low), (other, Role::Member)] };
            let act = match random.random_range(0..16) {
                _ if n == 1 => change(GroupAction::GroupCreate, &[(sender, Role::Owner)]),
                0 => change(GroupAction::GroupCreate, &[(sender, Role::Owner)]),
                1..=5 => change(GroupAction::GroupAdd, &two),
                6..=7 => change(GroupAction::GroupRemove, &two),
                8 => change(GroupAction::GroupLeave, &[]),
                9..=10 => change(GroupAction::GroupRole, &[(any, role)]),
                11 => change(GroupAction::GroupRename, &[]),
                12 if n > 30 => change(GroupAction::GroupDelete, &[]),
                _ => Act::Nothing,
            };
            let find = |user: &str| Ok::<_, ()>(rows.get(user).copied());
            let expected = decide(&act, sender, &group, head, find).unwrap();
            let kind = if act == Act::Nothing { Kind::Text } else { Kind::Group };
            let answer = appended(store, say(&chat, sender, (number * 100 + n, 1), kind, act.clone())).await;
            match expected {
                Err(code) => assert_eq!(answer, Appended::Refused(code), "{chat} {sender} {act:?}"),
                Ok(effect) => {
                    head += 1;
                    if let Some(effect) = effect {
                        group = effect.group;
                        rows.extend(effect.rows);
                        for (user, stay) in effect.past {
                            remember(past.entry(user).or_default(), stay);
                        }
                    }
                    let wanted = (head, group.version);
                    assert!(
                        matches!(answer, Appended::Stored { seq, version, .. } if (seq, version) == wanted),
                        "{chat} {sender} {act:?}: {answer:?}, not {wanted:?}"
                    );
                }
            }
        }
        let Roster { group: kept, members, cursors } = roster(store, &chat).await;
        assert_eq!(cursors, [], "not asked for");
        assert_eq!((kept, members), (group.clone(), rows.clone().into_iter().collect()), "{chat}");
        for user in users {
            let alone = standing(store, &chat, user).await;
            let before = past.remove(user).unwrap_or_default();
            assert_eq!(
                (alone.group, alone.member, alone.past),
                (group.clone(), rows.get(user).copied(), before)
            );
        }
    }
}

/// Whoever comes back may see what was said in the stays before: the latest ones are remembered.
pub async fn groups_remember_who_was_there_before(store: &dyn Store) {
    let chat = "#90210";
    let change = |action, named: &[(&str, Role)]| change(action, named);
    let mut n = 0;
    let mut changed = async |act| {
        n += 1;
        let answer = appended(store, say(chat, "ann", (1, n), Kind::Group, act)).await;
        assert!(matches!(answer, Appended::Stored { seq, .. } if seq == n), "{answer:?}");
    };
    changed(change(GroupAction::GroupCreate, &[("ann", Role::Owner), ("bob", Role::Member)])).await;
    for stay in 1..=20u64 {
        changed(change(GroupAction::GroupRemove, &[("bob", Role::Member)])).await;
        changed(change(GroupAction::GroupAdd, &[("bob", Role::Member)])).await;
        let all: Vec<Stay> = (1..=stay).map(|at| (2 * at - 1, 2 * at)).collect();
        let Standing { group, member, past } = standing(store, chat, "bob").await;
        assert_eq!(past, all[all.len().saturating_sub(PAST_STAYS_MAX)..]);
        assert_eq!(member.map(|bob| bob.sees(&group)), Some((2 * stay + 1, u64::MAX)));
    }
    let vacate = Op::Vacate { chat: chat.to_owned(), user: "bob".to_owned() };
    one(store, vacate).await.unwrap();
    assert_eq!(standing(store, chat, "bob").await.past, [], "the name may be another's next");
}
