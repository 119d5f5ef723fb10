//! How far users have their chats: delivered and read.
//!
//! Trap: an operation answers what is new by it, which is not where the cursors stand.

use state::store::{Head, Moved, Op, Store, read};

use super::{append, one};

/// Each by itself, and a call of several in its order.
pub async fn only_rise_and_not_past_the_head(store: &dyn Store) {
    let ops: Vec<Op> = (1..=5).map(|n| append("del:v", "v", 1, n)).collect();
    store.apply(&ops).await;
    let cursors = |seq, read| Op::Delivered { chat: "del:v".into(), user: "v".into(), seq, read };
    let moved = |delivered, read| Moved { delivered, read, is_news: true };
    let stays = |read| Moved { delivered: 0, read, is_news: false };
    for (seq, to, new, stands) in [
        (3, 0, moved(3, 0), (3, 0)),
        (2, 0, stays(0), (3, 0)),
        (0, 2, moved(0, 2), (3, 2)),
        (4, 1, moved(4, 2), (4, 2)),
        (4, 2, stays(2), (4, 2)),
        (99, 0, moved(5, 0), (5, 2)),
        (1, 99, moved(0, 5), (5, 5)),
        (99, 99, stays(5), (5, 5)),
    ] {
        assert_eq!(read::moved(one(store, cursors(seq, to)).await).unwrap(), new, "{seq} {to}");
        let at = head(store, "del:v", "v").await;
        assert_eq!((at.seq, at.delivered, at.read), (5, stands.0, stands.1), "{seq} {to}");
    }
    let other = |seq, read| Op::Delivered { chat: "del:v".into(), user: "del".into(), seq, read };
    let outcomes = store.apply(&[other(1, 0), other(0, 1), other(2, 0), cursors(5, 5), other(3, 2)]).await;
    let new: Vec<Moved> = outcomes.into_iter().map(|outcome| read::moved(outcome).unwrap()).collect();
    assert_eq!(new, [moved(1, 0), moved(0, 1), moved(2, 0), stays(5), moved(3, 2)]);
    // Where nothing was ever said there is nothing to have.
    let nowhere = Op::Delivered { chat: "del:nobody".into(), user: "del".into(), seq: 7, read: 7 };
    assert_eq!(read::moved(one(store, nowhere).await).unwrap(), Moved::default());
    let at = head(store, "del:nobody", "del").await;
    assert_eq!(at, Head { history: at.history, first: 1, ..Head::default() });
}

/// One's own and the other user's; of a chat with oneself there is no other.
pub async fn are_told_with_the_head(store: &dyn Store) {
    let sends: Vec<Op> =
        (1..=3).flat_map(|n| [append("pe:er", "pe", 1, n), append("pe:pe", "pe", 1, n)]).collect();
    store.apply(&sends).await;
    let cursors =
        |chat: &str, user: &str, seq, read| Op::Delivered { chat: chat.into(), user: user.into(), seq, read };
    let all = [cursors("pe:er", "pe", 3, 2), cursors("pe:er", "er", 2, 1), cursors("pe:pe", "pe", 3, 3)];
    assert!(store.apply(&all).await.iter().all(Result::is_ok));
    let of = |head: Head| [head.delivered, head.read, head.peer_delivered, head.peer_read];
    assert_eq!(of(head(store, "pe:er", "pe").await), [3, 2, 2, 1]);
    assert_eq!(of(head(store, "pe:er", "er").await), [2, 1, 3, 2]);
    assert_eq!(of(head(store, "pe:pe", "pe").await), [3, 3, 0, 0]);
    assert_eq!(of(head(store, "pe:er", "else").await), [0; 4], "not a member's");
}

/// What [`only_rise_and_not_past_the_head`] left.
pub async fn are_there_after_reopening(store: &dyn Store) {
    let at = head(store, "del:v", "v").await;
    assert_eq!((at.seq, at.delivered, at.read, at.peer_delivered, at.peer_read), (5, 5, 5, 3, 2));
}

async fn head(store: &dyn Store, chat: &str, user: &str) -> Head {
    read::head(one(store, Op::Head { chat: chat.into(), user: user.into() }).await).unwrap()
}
