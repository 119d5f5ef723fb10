//! When somebody was there last, and what is not to be told of them.

use std::time::{SystemTime, UNIX_EPOCH};

use state::store::{Answer, Hides, Op, Seen, Store, read};

use super::one;

const USER: u64 = 70_000;
const HIDES: Hides = Hides { presence: false, typing: true };

fn bind(user: u64, device: u32, connection: u64) -> Op {
    Op::Bind { user, device, attempt: 5, connection, devices_max: 4, issued_s: 0 }
}

fn unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// Everything in here.
pub async fn hold(store: &dyn Store) {
    let seen = async |user| read::seen(one(store, Op::Seen { user }).await).unwrap();
    let done = async |op| drop(one(store, op).await.unwrap());
    assert_eq!(seen(USER).await, Seen::default());
    done(bind(USER, 1, 0xE1)).await;
    done(bind(USER, 2, 0xE2)).await;
    done(Op::Unbind { user: USER, connection: 0xE1 }).await;
    done(Op::Unbind { user: USER, connection: 0xE9 }).await;
    assert_eq!(seen(USER).await, Seen::default(), "one of them is still there");
    let before_s = unix_s();
    done(Op::Unbind { user: USER, connection: 0xE2 }).await;
    let left = seen(USER).await;
    assert!((before_s..=unix_s()).contains(&left.last_s) && left.hides == Hides::default(), "{left:?}");
    done(Op::Unbind { user: USER, connection: 0xE2 }).await;
    assert_eq!(seen(USER).await, left, "nobody left this time");

    assert_eq!(one(store, Op::Hide { user: USER, hides: HIDES }).await, Ok(Answer::Done));
    assert_eq!(seen(USER).await, Seen { hides: HIDES, ..left });
    let both = Hides { presence: true, typing: true };
    done(Op::Hide { user: USER + 1, hides: both }).await;
    assert_eq!(seen(USER + 1).await, Seen { last_s: 0, hides: both });
    done(Op::Hide { user: USER + 1, hides: Hides::default() }).await;
    assert_eq!(seen(USER + 1).await, Seen::default());

    // In one call, in its order; and many at once.
    let user = USER + 2;
    let ops = [
        bind(user, 1, 0xF1),
        Op::Seen { user },
        Op::Unbind { user, connection: 0xF1 },
        Op::Seen { user },
        Op::Hide { user, hides: HIDES },
        Op::Seen { user },
    ];
    let outcomes = store.apply(&ops).await;
    let at = |at: usize| read::seen(outcomes[at].clone()).unwrap();
    assert_eq!(at(1), Seen::default());
    assert!(at(3).last_s >= before_s && at(5) == Seen { hides: HIDES, ..at(3) });
    let many = USER + 100..USER + 400;
    let binds: Vec<Op> = many.clone().map(|user| bind(user, 1, user)).collect();
    store.apply(&binds).await;
    let unbinds: Vec<Op> = many.clone().map(|user| Op::Unbind { user, connection: user }).collect();
    store.apply(&unbinds).await;
    for user in many {
        assert!(seen(user).await.last_s >= before_s);
    }
}

/// What was written before the store was opened again.
pub async fn hold_after_reopening(store: &dyn Store) {
    let seen = read::seen(one(store, Op::Seen { user: USER }).await).unwrap();
    assert!(seen.last_s > 0 && seen.hides == HIDES, "{seen:?}");
}
