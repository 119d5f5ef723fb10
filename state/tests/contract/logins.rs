//! Who is bound where: storms, attempts, and tokens that are not taken any more.
//!
//! Trap: a store may have another way for a login without a token and for one with: both must hold.

use state::store::{Answer, Bound, Op, Store, read};

use super::one;

/// Everything in here.
pub async fn hold(store: &dyn Store) {
    storms_of_logins(store).await;
    bindings_follow_the_attempt(store).await;
    revoked_tokens_bind_nothing(store).await;
    a_storm_with_tokens(store).await;
}

/// What was written before the store was opened again.
pub async fn hold_after_reopening(store: &dyn Store) {
    let bound = async |op| read::bound(one(store, op).await).unwrap();
    assert_eq!(bound(bind(50_000, 1, 900, 1, 999)).await, Bound::Revoked);
    assert_eq!(bound(bind(50_000, 3, 900, 1, 1_000)).await, YES);
}

const YES: Bound = Bound::Yes { replaced: None, evicted: None };

fn bind(user: u64, device: u32, attempt: u64, connection: u64, issued_s: u64) -> Op {
    Op::Bind { user, device, attempt, connection, devices_max: 2, issued_s }
}

async fn revoked_tokens_bind_nothing(store: &dyn Store) {
    let bound = async |op| read::bound(one(store, op).await).unwrap();
    let revoke = async |user, device, before_s, keep_s| {
        let op = Op::Revoke { user, device, before_s, keep_s };
        assert_eq!(one(store, op).await, Ok(Answer::Done));
    };
    let routes = async |user| {
        let found = read::routes(one(store, Op::Routes { user }).await).unwrap();
        found.iter().map(|route| (route.device, route.attempt)).collect::<Vec<_>>()
    };
    let user = 50_000;
    assert_eq!(bound(bind(user, 1, 5, 0xA1, 999)).await, YES);
    revoke(user, None, 1_000, 3_600).await;
    // The same login again, a new one, and one that would be stale: nothing of it happens.
    for attempt in [5, 6, 1] {
        assert_eq!(bound(bind(user, 1, attempt, 0xA1, 999)).await, Bound::Revoked);
    }
    assert_eq!(bound(bind(user, 2, 1, 0xA2, 1)).await, Bound::Revoked, "another device");
    assert_eq!(routes(user).await, [(1, 5)]);
    assert_eq!(bound(bind(user + 1, 1, 5, 0xB1, 1)).await, YES, "another user");
    assert_eq!(
        bound(bind(user, 1, 6, 0xA3, 1_000)).await,
        Bound::Yes { replaced: Some(0xA1), evicted: None }
    );
    assert_eq!(bound(bind(user, 2, 1, 0xA4, 0)).await, YES, "without a token there is none to revoke");
    // What reaches less far takes nothing back.
    revoke(user, None, 500, 60).await;
    assert_eq!(bound(bind(user, 1, 7, 0xA3, 999)).await, Bound::Revoked);
    // One device alone.
    revoke(user, Some(2), 2_000, 3_600).await;
    assert_eq!(bound(bind(user, 2, 9, 0xA4, 1_999)).await, Bound::Revoked);
    assert_eq!(bound(bind(user, 2, 9, 0xA4, 2_000)).await, YES);
    assert_eq!(bound(bind(user, 1, 9, 0xA3, 1_999)).await, YES);
    // Its time is over at once.
    revoke(user + 2, None, 1_000, 0).await;
    assert_eq!(bound(bind(user + 2, 1, 1, 0xC1, 5)).await, YES);
    // In one call, in its order.
    let user = user + 3;
    let ops = [
        bind(user, 1, 1, 0xD1, 5),
        Op::Revoke { user, device: Some(1), before_s: 6, keep_s: 60 },
        bind(user, 1, 2, 0xD1, 5),
        bind(user, 1, 2, 0xD2, 6),
    ];
    let outcomes: Vec<_> = store.apply(&ops).await.into_iter().collect();
    let at = |at: usize| read::bound(outcomes[at].clone()).unwrap();
    assert_eq!((at(0), at(2)), (YES, Bound::Revoked));
    assert_eq!(at(3), Bound::Yes { replaced: Some(0xD1), evicted: None });
    // As it was, for whoever opens the store again.
    for connection in [0xA3, 0xA4] {
        one(store, Op::Unbind { user: 50_000, connection }).await.unwrap();
    }
}

/// Many at once, every third of them revoked.
async fn a_storm_with_tokens(store: &dyn Store) {
    let users = 51_000..51_300u64;
    let revoked = users.clone().step_by(3);
    let ops: Vec<Op> =
        revoked.map(|user| Op::Revoke { user, device: None, before_s: 1_000, keep_s: 60 }).collect();
    assert!(store.apply(&ops).await.into_iter().all(|outcome| outcome == Ok(Answer::Done)));
    let ops: Vec<Op> = users.clone().map(|user| bind(user, 1, 1, user, 999)).collect();
    let outcomes: Vec<Bound> =
        store.apply(&ops).await.into_iter().map(|outcome| read::bound(outcome).unwrap()).collect();
    let expected: Vec<Bound> =
        (0..300).map(|at| if at % 3 == 0 { Bound::Revoked } else { YES.clone() }).collect();
    assert_eq!(outcomes, expected);
}

/// A thousand at once: for the first time, the same again, with a newer attempt elsewhere, late, and gone.
async fn storms_of_logins(store: &dyn Store) {
    let users = 40_000..41_000u64;
    let bind = |user, attempt, connection| bind(user, 1, attempt, connection, 0);
    let storm = async |attempt: u64, gateway: u64| {
        let ops: Vec<Op> = users.clone().map(|user| bind(user, attempt, gateway + user)).collect();
        let outcomes = store.apply(&ops).await.into_iter();
        outcomes.map(|outcome| read::bound(outcome).unwrap()).collect::<Vec<_>>()
    };
    let routes = async || {
        let ops: Vec<Op> = users.clone().map(|user| Op::Routes { user }).collect();
        let outcomes = store.apply(&ops).await.into_iter();
        outcomes.map(|outcome| read::routes(outcome).unwrap()).collect::<Vec<_>>()
    };
    let unbind = async |gateway: u64| {
        let ops: Vec<Op> =
            users.clone().map(|user| Op::Unbind { user, connection: gateway + user }).collect();
        assert!(store.apply(&ops).await.into_iter().all(|outcome| outcome == Ok(Answer::Done)));
    };
    let yes = Bound::Yes { replaced: None, evicted: None };
    for _ in 0..2 {
        assert_eq!(storm(5, 1 << 40).await, vec![yes.clone(); 1000], "first, and a replay");
    }
    let replaced = |gateway: u64| move |user| Bound::Yes { replaced: Some(gateway + user), evicted: None };
    let expected: Vec<Bound> = users.clone().map(replaced(1 << 40)).collect();
    assert_eq!(storm(6, 2 << 40).await, expected);
    assert_eq!(storm(5, 1 << 40).await, vec![Bound::Stale { stored: 6 }; 1000]);
    unbind(1 << 40).await;
    let there: Vec<_> =
        routes().await.concat().into_iter().map(|route| (route.attempt, route.connection)).collect();
    assert_eq!(there, users.clone().map(|user| (6, (2 << 40) + user)).collect::<Vec<_>>());
    unbind(2 << 40).await;
    assert_eq!(routes().await, vec![Vec::new(); 1000]);
    assert_eq!(storm(1, 3 << 40).await, vec![yes; 1000], "bind after unbind: nothing is remembered");
    // One user among many, three times in one call: in its order.
    let mut ops: Vec<Op> = users.clone().map(|user| bind(user, 7, (4 << 40) + user)).collect();
    ops.insert(500, Op::Unbind { user: 40_900, connection: (3 << 40) + 40_900 });
    ops.push(Op::Routes { user: 40_900 });
    ops.push(bind(40_900, 8, 1));
    let mut outcomes = store.apply(&ops).await;
    assert_eq!(read::bound(outcomes.pop().unwrap()).unwrap(), replaced(4 << 40)(40_900));
    let route = read::routes(outcomes.pop().unwrap()).unwrap();
    assert_eq!(route.iter().map(|route| route.attempt).collect::<Vec<_>>(), [7]);
    let bound = read::bound(outcomes.swap_remove(901)).unwrap();
    assert_eq!(bound, Bound::Yes { replaced: None, evicted: None }, "its old route went just before");
    unbind(4 << 40).await;
}

async fn bindings_follow_the_attempt(store: &dyn Store) {
    let bind = |device, attempt, connection| bind(5, device, attempt, connection, 0);
    let bound = async |op| read::bound(one(store, op).await).unwrap();
    let routes = async || {
        let mut found = read::routes(one(store, Op::Routes { user: 5 }).await).unwrap();
        found.sort_by_key(|route| route.device);
        found.iter().map(|route| (route.device, route.attempt, route.connection)).collect::<Vec<_>>()
    };
    assert_eq!(bound(bind(1, 100, 0xA1)).await, Bound::Yes { replaced: None, evicted: None });
    assert_eq!(
        bound(bind(1, 100, 0xA1)).await,
        Bound::Yes { replaced: None, evicted: None },
        "a replay kicks nobody"
    );
    assert_eq!(bound(bind(1, 100, 0xA2)).await, Bound::Stale { stored: 100 });
    assert_eq!(bound(bind(1, 99, 0xA3)).await, Bound::Stale { stored: 100 });
    assert_eq!(
        bound(bind(2, 7, u64::MAX)).await,
        Bound::Yes { replaced: None, evicted: None },
        "devices are apart"
    );
    let newest = proto::NUMBER_MAX;
    assert_eq!(bound(bind(1, newest, 0xA4)).await, Bound::Yes { replaced: Some(0xA1), evicted: None });
    assert_eq!(bound(bind(1, newest - 1, 0xA5)).await, Bound::Stale { stored: newest });
    assert_eq!(routes().await, [(1, newest, 0xA4), (2, 7, u64::MAX)]);
    assert_eq!(
        bound(bind(3, 8, 0xB1)).await,
        Bound::Yes { replaced: None, evicted: Some(u64::MAX) },
        "the oldest login makes room for a third device"
    );
    assert_eq!(bound(bind(2, 9, u64::MAX)).await, Bound::Yes { replaced: None, evicted: Some(0xB1) });
    assert_eq!(routes().await, [(1, newest, 0xA4), (2, 9, u64::MAX)]);
    one(store, Op::Unbind { user: 5, connection: 0xA1 }).await.unwrap();
    assert_eq!(routes().await.len(), 2, "an old connection removes nothing");
    one(store, Op::Unbind { user: 5, connection: 0xA4 }).await.unwrap();
    assert_eq!(routes().await, [(2, 9, u64::MAX)]);
    one(store, Op::Unbind { user: 5, connection: u64::MAX }).await.unwrap();
    assert_eq!(routes().await, []);
}
