//! Something of everything that layout 2 keeps: written once, by the version whose folder is in `fixtures/`, and held ever after.
//!
//! Trap: what is written here must not be changed, or a fixture that is there says nothing any more. What a later version keeps
//! besides has a layout of its own, or a file of its own.

use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use proto::wire::{Code, GroupAction, Kind, Role};
use state::group::{Act, Change, Member, Named};
use state::store::{
    Answer, Append, Appended, Bound, Hides, Marks, MessageId, Op, Roster, Store, chat_bucket, read,
};

use super::ops::{append, appended, one, pull, seqs};

/// For a hundred years, as a test that opens it may come late.
const KEPT_S: u64 = 100 * 365 * 86_400;
const GROUP: &str = "#4711";
const HIDES: Hides = Hides { presence: true, typing: false };

fn named(text: &'static str) -> Op {
    let (id, body) = (MessageId::Named("order-17".into()), Bytes::from_static(text.as_bytes()));
    Op::Append(Append { chat: "ann:bob".into(), sender: "bob".into(), id, body, ..Append::default() })
}

fn in_group(sender: &str, n: u64, kind: Kind, act: Act) -> Op {
    let Op::Append(said) = append(GROUP, sender, 5, n) else { unreachable!() };
    Op::Append(Append { kind, act, ..said })
}

fn change(action: GroupAction, users: &[(&str, u64, Role)]) -> Act {
    let title = if action == GroupAction::GroupCreate { "Türme" } else { "" }.to_owned();
    let named = |(user, number, role): &(&str, u64, Role)| Named {
        user: (*user).into(),
        number: *number,
        role: *role,
    };
    Act::Change(Change { action, title, named: users.iter().map(named).collect(), members_max: 10 })
}

fn bind(user: u64, device: u32, attempt: u64, issued_s: u64) -> Op {
    Op::Bind { user, device, attempt, connection: 1_000 + attempt, devices_max: 4, issued_s }
}

/// Into a store with nothing in it.
pub async fn write(store: &dyn Store) {
    let done = async |op| drop(one(store, op).await.unwrap());
    for (name, candidate) in [("ann", 71), ("bob", 72), ("cy", 73), ("gone", 74), ("again", 75)] {
        done(Op::Register { name: name.into(), candidate }).await;
    }
    for (device, attempt) in [(1, 5), (2, 6)] {
        done(bind(71, device, attempt, 0)).await;
    }
    done(bind(72, 3, 9, 0)).await;
    done(Op::Unbind { user: 72, connection: 1_009 }).await;
    done(Op::Hide { user: 72, hides: HIDES }).await;
    done(Op::Revoke { user: 73, device: None, before_s: 500, keep_s: KEPT_S }).await;
    done(Op::Revoke { user: 73, device: Some(4), before_s: 900, keep_s: KEPT_S }).await;

    for n in 1..=40 {
        done(append("ann:bob", "ann", 7, n)).await;
    }
    let Op::Append(refused) = append("ann:bob", "ann", 7, 41) else { unreachable!() };
    done(Op::Append(Append { refusal: Some(Code::MessageTooLarge), ..refused })).await;
    done(named("named")).await;
    for (user, chat) in [("ann", "ann:bob"), ("bob", "ann:bob"), ("ann", GROUP)] {
        done(Op::ListChat { user: user.into(), chat: chat.into() }).await;
    }
    done(Op::Delivered { chat: "ann:bob".into(), user: "bob".into(), seq: 30, read: 20 }).await;

    let made = [("ann", 71, Role::Owner), ("bob", 72, Role::Admin), ("cy", 73, Role::Member)];
    done(in_group("ann", 1, Kind::Group, change(GroupAction::GroupCreate, &made))).await;
    done(in_group("cy", 1, Kind::Text, Act::Nothing)).await;
    done(in_group("cy", 2, Kind::Edit, Act::Refer(2))).await;
    done(in_group("cy", 3, Kind::Group, change(GroupAction::GroupLeave, &[]))).await;
    done(in_group("bob", 1, Kind::Text, Act::Nothing)).await;
    done(in_group("ann", 2, Kind::Group, change(GroupAction::GroupAdd, &made[2..]))).await;
    done(Op::Delivered { chat: GROUP.into(), user: "bob".into(), seq: 4, read: 3 }).await;

    // Deleted, and the name borne by somebody else since.
    done(bind(74, 1, 3, 0)).await;
    done(append("ann:gone", "gone", 8, 1)).await;
    done(append("ann:gone", "ann", 8, 1)).await;
    done(Op::Retire { user: 74 }).await;
    done(Op::Vacate { chat: "ann:gone".into(), user: "gone".into() }).await;
    done(Op::Renumber { name: "gone".into(), from: 74, to: 76 }).await;
    done(Op::Unname { user: 75 }).await;
    done(append("ann:gone", "ann", 8, 2)).await;

    done(Op::Mark { server: "state-1".into(), life: 17, pushed_us: 5 }).await;
    let history = read::head(head_of(store, "lost:lost", "lost").await).unwrap().history;
    done(Op::LoseHistory { bucket: chat_bucket("lost:lost"), history }).await;
}

async fn head_of(store: &dyn Store, chat: &str, user: &str) -> state::store::Outcome {
    one(store, Op::Head { chat: chat.into(), user: user.into() }).await
}

/// All of it, and that it goes on from there.
pub async fn holds(store: &dyn Store) {
    users(store).await;
    one_to_one(store).await;
    group(store).await;
    deleted(store).await;
    let Marks { marks, .. } =
        read::marks(one(store, Op::Mark { server: "state-2".into(), life: 1, pushed_us: 1 }).await).unwrap();
    assert!(
        marks.iter().any(|mark| (&*mark.server, mark.life, mark.pushed_us) == ("state-1", 17, 5)),
        "{marks:?}"
    );
}

async fn users(store: &dyn Store) {
    for (name, number) in [("ann", Some(71)), ("bob", Some(72)), ("gone", Some(76)), ("nobody", None)] {
        assert_eq!(read::user(one(store, Op::User { name: name.into() }).await).unwrap(), number, "{name}");
    }
    for (user, name) in [(71, Some("ann")), (76, Some("gone")), (75, None)] {
        assert_eq!(read::name(one(store, Op::Name { user }).await).unwrap().as_deref(), name, "{user}");
    }
    let mut routes = read::routes(one(store, Op::Routes { user: 71 }).await).unwrap();
    routes.sort_by_key(|route| route.device);
    let routes: Vec<_> = routes.iter().map(|route| (route.device, route.attempt, route.connection)).collect();
    assert_eq!(routes, [(1, 5, 1_005), (2, 6, 1_006)]);
    let bound = async |op| read::bound(one(store, op).await).unwrap();
    assert_eq!(bound(bind(71, 1, 4, 0)).await, Bound::Stale { stored: 5 });
    let seen = read::seen(one(store, Op::Seen { user: 72 }).await).unwrap();
    let now_s = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    assert!((1..=now_s).contains(&seen.last_s) && seen.hides == HIDES, "{seen:?}");
    let is_revoked = async |issued_s| read::revoked(one(store, Op::IsRevoked { user: 73, issued_s }).await);
    assert_eq!((is_revoked(499).await, is_revoked(500).await), (Ok(true), Ok(false)));
    assert_eq!(bound(bind(73, 4, 1, 899)).await, Bound::Revoked);
    let chats = Op::Chats { user: "ann".into(), after: String::new(), until: String::new(), limit: 9 };
    assert_eq!(read::chats(one(store, chats).await).unwrap(), [GROUP, "ann:bob"]);
}

async fn one_to_one(store: &dyn Store) {
    let head = read::head(head_of(store, "ann:bob", "bob").await).unwrap();
    assert_eq!((head.seq, head.first, head.since, head.delivered, head.read), (41, 1, 0, 30, 20));
    assert_eq!(seqs(store, pull("ann:bob", 0, 100, false)).await, (1..=41).collect::<Vec<_>>());
    let page = read::page(one(store, pull("ann:bob", 39, 2, false)).await).unwrap();
    let told: Vec<_> = page.messages.iter().map(|message| (&*message.sender, &message.body[..])).collect();
    assert_eq!(told, [("ann", &b"ann/7/40"[..]), ("bob", b"named")]);
    let history = head.history;
    let again = appended(store, append("ann:bob", "ann", 7, 40)).await;
    assert!(
        matches!(again, Appended::Stored { seq: 40, again: true, history: of, .. } if of == history),
        "{again:?}"
    );
    let refused = appended(store, append("ann:bob", "ann", 7, 41)).await;
    assert_eq!(refused, Appended::Refused(Code::MessageTooLarge), "whatever it says now");
    assert_eq!(appended(store, append("ann:bob", "ann", 7, 50)).await, Appended::Expected(42));
    let again = appended(store, named("named")).await;
    assert!(matches!(again, Appended::Stored { seq: 41, again: true, .. }), "{again:?}");
    assert_eq!(appended(store, named("another")).await, Appended::Conflict);
    let recent = Op::Recent { bucket: chat_bucket("ann:bob"), after_us: 0, limit: 9 };
    let recent = read::recent(one(store, recent).await).unwrap();
    assert_eq!(recent.iter().map(|recent| &*recent.chat).collect::<Vec<_>>(), ["ann:bob"]);
}

async fn group(store: &dyn Store) {
    let Roster { group, members, cursors } =
        read::roster(one(store, Op::Members { chat: GROUP.into(), cursors: true }).await).unwrap();
    assert_eq!((&*group.title, group.version, group.count, group.rows, group.deleted), ("Türme", 6, 3, 3, 0));
    let member = |number, role, joined| Member { number, role, joined, left: 0 };
    let (ann, bob, cy) =
        (member(71, Role::Owner, 1), member(72, Role::Admin, 1), member(73, Role::Member, 6));
    assert_eq!(members, [("ann".into(), ann), ("bob".into(), bob), ("cy".into(), cy)]);
    assert_eq!(cursors[1], (4, 3));
    let standing = Op::Member { chat: GROUP.into(), user: "cy".into() };
    assert_eq!(read::standing(one(store, standing).await).unwrap().past, [(1, 4)]);
    let page = read::page(one(store, pull(GROUP, 0, 9, false)).await).unwrap();
    let kinds: Vec<_> = page.messages.iter().map(|message| message.kind).collect();
    assert_eq!(kinds, [Kind::Group, Kind::Text, Kind::Edit, Kind::Group, Kind::Text, Kind::Group]);
    let not_theirs = appended(store, in_group("bob", 2, Kind::Edit, Act::Refer(2))).await;
    assert_eq!(not_theirs, Appended::Refused(Code::NotAllowed));
}

async fn deleted(store: &dyn Store) {
    let Ok(Answer::Retired(routes)) = one(store, Op::Routes { user: 74 }).await else {
        panic!("it is retired")
    };
    assert_eq!(routes.iter().map(|route| route.connection).collect::<Vec<_>>(), [1_003]);
    assert_eq!(read::bound(one(store, bind(74, 1, 9, 0)).await).unwrap(), Bound::Retired);
    let head = read::head(head_of(store, "ann:gone", "gone").await).unwrap();
    assert_eq!((head.seq, head.since, head.first), (3, 2, 3), "behind what was another's");
    assert_eq!(read::head(head_of(store, "ann:gone", "ann").await).unwrap().first, 1);
}
