//! What is left of a user who is deleted, and that no token which is revoked stores anything.

use proto::wire::{Code, Kind};
use state::group::Act;
use state::store::{
    Answer, Append, Appended, Bound, Head, Hides, MessageId, Op, Page, Seen, Store, TokenOf, read,
};

use super::{append, appended, one, pull};

/// Everything in here.
pub async fn is_for_good(store: &dyn Store) {
    nobodys_number_binds_nothing(store).await;
    a_name_gets_another_number(store).await;
    a_chat_begins_behind_it(store).await;
    what_nobody_may_see_is_gone(store).await;
    revoked_tokens_store_nothing(store).await;
}

/// What was written before the store was opened again.
pub async fn is_there_after_reopening(store: &dyn Store) {
    assert_eq!(bound(store, bind(60_000, 1, 99, 0)).await, Bound::Retired);
    assert_eq!(seqs(store, "dead:left", "dead", (0, true)).await, (vec![8, 7, 6], 6, 5));
}

async fn done(store: &dyn Store, op: Op) {
    assert_eq!(one(store, op).await, Ok(Answer::Done));
}

async fn bound(store: &dyn Store, op: Op) -> Bound {
    read::bound(one(store, op).await).unwrap()
}

fn bind(user: u64, device: u32, attempt: u64, issued_s: u64) -> Op {
    Op::Bind { user, device, attempt, connection: attempt, devices_max: 2, issued_s }
}

async fn nobodys_number_binds_nothing(store: &dyn Store) {
    let user = 60_000;
    let yes = Bound::Yes { replaced: None, evicted: None };
    assert_eq!(bound(store, bind(user, 1, 5, 0)).await, yes);
    assert_eq!(bound(store, bind(user, 2, 6, 0)).await, yes);
    let left = async || match one(store, Op::Routes { user }).await {
        Ok(Answer::Retired(mut routes)) => {
            routes.sort_by_key(|route| route.device);
            routes.iter().map(|route| route.connection).collect::<Vec<_>>()
        }
        other => panic!("{other:?}"),
    };
    done(store, Op::Hide { user, hides: Hides { presence: true, typing: true } }).await;
    for _ in 0..2 {
        done(store, Op::Retire { user }).await;
        assert_eq!(left().await, [5, 6], "those that are to end");
    }
    // The same login again, a newer one, another device, and one by a token.
    for op in [bind(user, 1, 5, 0), bind(user, 1, 9, 0), bind(user, 3, 9, 0), bind(user, 1, 9, 1_000)] {
        assert_eq!(bound(store, op).await, Bound::Retired);
    }
    for (connection, rest) in [(5, vec![6]), (7, vec![6]), (6, vec![])] {
        done(store, Op::Unbind { user, connection }).await;
        assert_eq!(left().await, rest);
    }
    assert_eq!(bound(store, bind(user, 1, 9, 0)).await, Bound::Retired, "also when nothing is left");
    let seen = read::seen(one(store, Op::Seen { user }).await).unwrap();
    assert_eq!(seen, Seen::default(), "nor is kept when it was there");
    // Who was never bound, among many who are, and in the order of one call.
    done(store, Op::Retire { user: user + 1 }).await;
    let mut ops: Vec<Op> = (1..50).map(|n| bind(user + n, 1, 1, 0)).collect();
    ops.extend([Op::Retire { user: user + 2 }, bind(user + 2, 1, 2, 0), Op::Routes { user: user + 2 }]);
    let outcomes = store.apply(&ops).await;
    let logins: Vec<Bound> = outcomes[..49].iter().cloned().map(|one| read::bound(one).unwrap()).collect();
    assert_eq!((&logins[0], logins[1..].iter().all(|bound| *bound == yes)), (&Bound::Retired, true));
    assert_eq!(outcomes[50], Ok(Answer::Bound(Bound::Retired)));
    assert!(matches!(&outcomes[51], Ok(Answer::Retired(routes)) if routes.len() == 1), "{:?}", outcomes[51]);
}

async fn a_name_gets_another_number(store: &dyn Store) {
    let (name, old, new) = ("mort".to_owned(), 61_000, 61_001);
    let number = async || read::user(one(store, Op::User { name: name.clone() }).await).unwrap();
    let name_of = async |user| read::name(one(store, Op::Name { user }).await).unwrap();
    let register = |candidate| Op::Register { name: name.clone(), candidate };
    assert_eq!(read::user(one(store, register(old)).await).unwrap(), Some(old));
    done(store, Op::Unname { user: old }).await;
    assert_eq!((number().await, name_of(old).await), (Some(old), None));
    assert_eq!(read::user(one(store, register(61_009)).await).unwrap(), Some(old), "until it has another");
    done(store, Op::Renumber { name: name.clone(), from: old, to: new }).await;
    assert_eq!((number().await, name_of(new).await), (Some(new), Some(name.clone())));
    // Who comes too late changes nothing.
    done(store, Op::Renumber { name: name.clone(), from: old, to: 61_002 }).await;
    assert_eq!((number().await, name_of(old).await), (Some(new), None));
}

/// Seqs of a page, the first that is kept for the reader, and up to where it was another's.
async fn seqs(
    store: &dyn Store,
    chat: &str,
    reader: &str,
    (cursor, reverse): (u64, bool),
) -> (Vec<u64>, u64, u64) {
    let op = Op::Pull { chat: chat.into(), reader: reader.into(), cursor, limit: 99, reverse };
    let Page { first, since, messages, .. } = read::page(one(store, op).await).unwrap();
    (messages.iter().map(|message| message.seq).collect(), first, since)
}

async fn head(store: &dyn Store, chat: &str, user: &str) -> Head {
    let head = read::head(one(store, Op::Head { chat: chat.into(), user: user.into() }).await).unwrap();
    Head { history: 0, ..head }
}

async fn vacate(store: &dyn Store, chat: &str, user: &str) {
    done(store, Op::Vacate { chat: chat.into(), user: user.into() }).await;
}

async fn a_chat_begins_behind_it(store: &dyn Store) {
    let chat = "dead:left";
    vacate(store, chat, "dead").await;
    assert_eq!(head(store, chat, "dead").await, Head { first: 1, ..Head::default() }, "there was nothing");
    for n in 1..=5 {
        appended(store, append(chat, "dead", 1, n)).await;
    }
    let cursors = |user: &str| Op::Delivered { chat: chat.into(), user: user.into(), seq: 4, read: 3 };
    for user in ["dead", "left"] {
        one(store, cursors(user)).await.unwrap();
    }
    for _ in 0..2 {
        vacate(store, chat, "dead").await;
        assert_eq!(seqs(store, chat, "dead", (0, false)).await, (vec![], 6, 5));
    }
    assert_eq!(seqs(store, chat, "dead", (3, false)).await, (vec![], 6, 5));
    assert_eq!(seqs(store, chat, "dead", (0, true)).await, (vec![], 6, 5));
    assert_eq!(seqs(store, chat, "dead", (3, true)).await, (vec![], 6, 5));
    let all = (vec![1, 2, 3, 4, 5], 1, 0);
    assert_eq!(
        (seqs(store, chat, "left", (0, false)).await, seqs(store, chat, "", (0, false)).await),
        (all.clone(), all)
    );
    let expected = Head { seq: 5, first: 6, since: 5, peer_delivered: 4, peer_read: 3, ..Head::default() };
    assert_eq!(head(store, chat, "dead").await, expected);
    let expected = Head { seq: 5, first: 1, delivered: 4, read: 3, ..Head::default() };
    assert_eq!(head(store, chat, "left").await, expected, "and nothing is told of who is not there any more");
    // Somebody has the name again.
    for (sender, stream) in [("left", 1), ("dead", 2)] {
        appended(store, append(chat, sender, stream, 1)).await;
    }
    assert_eq!(seqs(store, chat, "dead", (0, false)).await, (vec![6, 7], 6, 5));
    assert_eq!(seqs(store, chat, "dead", (6, false)).await, (vec![7], 6, 5));
    assert_eq!(seqs(store, chat, "dead", (7, true)).await, (vec![6], 6, 5));
    assert_eq!(seqs(store, chat, "left", (0, true)).await, (vec![7, 6, 5, 4, 3, 2, 1], 1, 0));
    let edit = |seq, stream| {
        let id = MessageId::Numbered { stream, n: 1 };
        let (chat, sender) = (chat.to_owned(), "dead".to_owned());
        Op::Append(Append { chat, sender, id, kind: Kind::Edit, act: Act::Refer(seq), ..Append::default() })
    };
    assert_eq!(appended(store, edit(5, 3)).await, Appended::Refused(Code::BadChange), "another's");
    let edited = appended(store, edit(7, 4)).await;
    assert!(matches!(edited, Appended::Stored { seq: 8, .. }), "{edited:?}");
}

async fn what_nobody_may_see_is_gone(store: &dyn Store) {
    let both = "gone1:gone2";
    for n in 1..=3 {
        appended(store, append(both, "gone1", 1, n)).await;
    }
    vacate(store, both, "gone1").await;
    appended(store, append(both, "gone2", 1, 1)).await;
    vacate(store, both, "gone2").await;
    assert_eq!(
        seqs(store, both, "", (0, false)).await,
        (vec![4], 4, 0),
        "the first of them may see the last"
    );
    assert_eq!(seqs(store, both, "gone1", (0, false)).await, (vec![4], 4, 3));
    assert_eq!(seqs(store, both, "gone2", (0, false)).await, (vec![], 5, 4));
    // Notes to oneself: more of them than are removed at once.
    let own = "gone3:gone3";
    let ops: Vec<Op> = (1..=2_100).map(|n| append(own, "gone3", 1, n)).collect();
    assert!(store.apply(&ops).await.iter().all(Result::is_ok));
    vacate(store, own, "gone3").await;
    assert_eq!(seqs(store, own, "", (0, false)).await, (vec![], 2_101, 0));
    let next = appended(store, append(own, "gone3", 2, 1)).await;
    assert!(matches!(next, Appended::Stored { seq: 2_101, .. }), "{next:?}");
    assert_eq!(seqs(store, own, "gone3", (0, false)).await, (vec![2_101], 2_101, 2_100));
    // A group is its members'.
    let group = "#4711";
    let named = vec![state::group::Named { user: "gone4".into(), number: 1, role: proto::wire::Role::Owner }];
    let action = proto::wire::GroupAction::GroupCreate;
    let change = state::group::Change { action, title: "t".into(), named, members_max: 9 };
    let (chat, sender, kind) = (group.to_owned(), "gone4".to_owned(), Kind::Group);
    let made = Append { chat, sender, kind, act: Act::Change(change), ..Append::default() };
    assert!(matches!(appended(store, Op::Append(made)).await, Appended::Stored { seq: 1, .. }));
    vacate(store, group, "gone4").await;
    assert_eq!(seqs(store, group, "", (0, false)).await, (vec![1], 1, 0));
    assert_eq!(head(store, group, "gone4").await.since, 1);
}

async fn revoked_tokens_store_nothing(store: &dyn Store) {
    let (chat, user) = ("token:u", 62_000);
    let revoke = |device, before_s| Op::Revoke { user, device, before_s, keep_s: 3_600 };
    let is_revoked =
        async |user, issued_s| read::revoked(one(store, Op::IsRevoked { user, issued_s }).await).unwrap();
    assert!(!is_revoked(user, 1).await);
    done(store, revoke(Some(1), 2_000)).await;
    assert!(!is_revoked(user, 1).await, "one device is not all");
    done(store, revoke(None, 1_000)).await;
    assert_eq!((is_revoked(user, 999).await, is_revoked(user, 1_000).await), (true, false));
    assert!(!is_revoked(user + 1, 999).await);
    // Behind what is read, in one call, and behind a change in it.
    let asked = Op::IsRevoked { user, issued_s: 1_000 };
    let outcomes = store.apply(&[pull(chat, 0, 1, false), asked.clone(), revoke(None, 1_001), asked]).await;
    assert_eq!((&outcomes[1], &outcomes[3]), (&Ok(Answer::Revoked(false)), &Ok(Answer::Revoked(true))));

    let ids = [MessageId::Unnamed, MessageId::Named("n".into()), MessageId::Numbered { stream: 1, n: 1 }];
    let say = |id: &MessageId, issued_s| {
        let token = Some(TokenOf { user, issued_s });
        let (chat, sender) = (chat.to_owned(), "u".to_owned());
        Op::Append(Append { chat, sender, id: id.clone(), body: "x".into(), token, ..Append::default() })
    };
    for id in &ids {
        assert_eq!(appended(store, say(id, 1_000)).await, Appended::Revoked);
    }
    assert_eq!(head(store, chat, "u").await.seq, 0);
    for (id, wanted) in ids.iter().zip(1..) {
        let stored = appended(store, say(id, 1_001)).await;
        assert!(matches!(stored, Appended::Stored { seq, again: false, .. } if seq == wanted), "{stored:?}");
        assert_eq!(appended(store, say(id, 1_000)).await, Appended::Revoked, "also what is answered again");
    }
}
