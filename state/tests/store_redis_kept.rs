//! What the Redis store keeps and for how long, looked at by its own keys and scripts.
//!
//! Trap: times are Redis's own.

#[path = "contract/ops.rs"]
mod ops;
#[path = "contract/redis.rs"]
mod rig;

use loadtest::supervisor::Redis;
use ops::{append, appended, one, pull, seqs};
use rig::{CHAT, config, head, open, say};
use state::config::StoreConfig;
use state::store::{Answer, Append, Appended, MessageId, Moved, Op, Store, StoreError, chat_bucket, read};
use state::store_redis::RedisStore;

/// An older copy has counted less far, and what was given out behind it is in use.
#[tokio::test]
async fn numbers_are_never_behind_the_clock() {
    let redis = Redis::start().unwrap();
    let store = open(&redis).await;
    let draw = Op::UserNumbers { count: 1 };
    let user = async || read::user_numbers(one(&*store, draw.clone()).await).unwrap();
    let life = async || read::incarnation(one(&*store, Op::Incarnate).await).unwrap();
    let (first_user, first_life) = (user().await, life().await);
    let mut connection = redis.connection().unwrap();
    for counter in ["rookery:users", "rookery:incarnations"] {
        redis::cmd("SET").arg(counter).arg(1_000).exec(&mut connection).unwrap();
    }
    let (second_user, second_life) = (user().await, life().await);
    assert!(second_user >= first_user, "{first_user}, {second_user}");
    // It wraps around twice a year.
    assert!(
        (first_life..first_life + 60).contains(&second_life) || second_life < 60,
        "{first_life}, {second_life}"
    );
}

/// Messages of long ago, which nobody can send: put there by hand.
#[tokio::test]
async fn a_chat_that_goes_on_loses_what_is_too_old() {
    let redis = Redis::start().unwrap();
    let store = open(&redis).await;
    for n in 1..=126 {
        say(&store, n).await;
    }
    let tag = format!("{{c{:04}}}", chat_bucket(CHAT));
    let (chat, messages) = (format!("{tag}:chat:{CHAT}"), format!("{tag}:messages:{CHAT}"));
    let day_us: u64 = 86_400 * 1_000_000;
    let newest = read::page(one(&*store, pull(CHAT, 125, 9, false)).await).unwrap().messages[0].time_us;
    let mut connection = redis.connection().unwrap();
    // 70 are older than 30 days, the others are not.
    redis::cmd("DEL").arg(&messages).exec(&mut connection).unwrap();
    let age_us = |seq: u64| if seq <= 70 { 30 * day_us + (71 - seq) * 60_000_000 } else { 29 * day_us };
    for seq in 1..=126 {
        let mut add = redis::cmd("XADD");
        add.arg(&messages).arg(format!("{seq}-0")).arg("sender").arg("r").arg("time");
        add.arg(newest - age_us(seq)).arg("crc").arg(0).arg("body").arg("").exec(&mut connection).unwrap();
    }
    redis::cmd("HSET").arg(&chat).arg("oldest").arg(newest - age_us(1)).exec(&mut connection).unwrap();
    say(&store, 127).await;
    assert_eq!(head(&store, CHAT).await.first, 1, "nobody looks before the 64th message");
    say(&store, 128).await;
    let at = head(&store, CHAT).await;
    assert_eq!((at.seq, at.first), (128, 71));
    let left: Vec<String> = redis::cmd("XRANGE")
        .arg(&messages)
        .arg("-")
        .arg("+")
        .query::<Vec<(String, redis::Value)>>(&mut connection)
        .unwrap()
        .into_iter()
        .map(|(id, _)| id)
        .collect();
    assert_eq!((left.len(), left[0].as_str()), (58, "71-0"));
    assert_eq!(seqs(&*store, pull(CHAT, 120, 9, false)).await, [127, 128]);
}

#[tokio::test]
async fn what_is_read_behind_a_script_that_had_to_be_loaded_is_read_again() {
    let redis = Redis::start().unwrap();
    let store = open(&redis).await;
    redis::cmd("SCRIPT").arg("FLUSH").exec(&mut redis.connection().unwrap()).unwrap();
    let bind = Op::Bind { user: 7, device: 1, attempt: 5, connection: 70, devices_max: 2, issued_s: 0 };
    let outcomes = store.apply(&[bind, Op::Routes { user: 7 }]).await;
    assert!(matches!(&outcomes[1], Ok(Answer::Routes(routes)) if routes.len() == 1), "{outcomes:?}");
}

/// The row of ids lives as long as was asked for behind every message, and is not written for it every time.
#[tokio::test]
async fn ids_are_remembered_from_their_last_use_on() {
    let redis = Redis::start().unwrap();
    let store = open(&redis).await;
    let asked_s = i64::from(config(&redis).dedupe_days) * 86_400;
    let mut connection = redis.connection().unwrap();
    say(&store, 1).await;
    let keys: Vec<String> = redis::cmd("KEYS").arg("*:ids:*").query(&mut connection).unwrap();
    let [key] = &keys[..] else { panic!("{keys:?}") };
    let mut ttl_s = |say: Option<i64>| -> i64 {
        if let Some(seconds) = say {
            redis::cmd("EXPIRE").arg(key).arg(seconds).exec(&mut connection).unwrap();
        }
        redis::cmd("TTL").arg(key).query(&mut connection).unwrap()
    };
    assert!((asked_s + 3_500..=asked_s + 3_600).contains(&ttl_s(None)));
    // Still longer than asked for: left alone. Less, and it is written anew; also by an id that comes again.
    ttl_s(Some(asked_s + 1_000));
    say(&store, 2).await;
    assert!((asked_s..=asked_s + 1_000).contains(&ttl_s(None)));
    for n in [3, 3] {
        ttl_s(Some(asked_s - 10));
        say(&store, n).await;
        assert!(ttl_s(None) >= asked_s + 3_500, "behind {n}");
    }
}

/// From its first use on; the store itself takes it away.
#[tokio::test]
async fn names_are_remembered_for_their_hours() {
    let redis = Redis::start().unwrap();
    let config = StoreConfig { named_ids_hours: 3, ..config(&redis) };
    let store = RedisStore::open(&config).await.unwrap();
    let id = MessageId::Named("x".into());
    let named = Append { chat: CHAT.into(), sender: "r".into(), id, body: "1".into(), ..Append::default() };
    let mut connection = redis.connection().unwrap();
    appended(&store, Op::Append(named.clone())).await;
    let keys: Vec<String> = redis::cmd("KEYS").arg("*:named:*").query(&mut connection).unwrap();
    let [key] = &keys[..] else { panic!("{keys:?}") };
    let ttl_s: i64 = redis::cmd("TTL").arg(key).query(&mut connection).unwrap();
    assert!((3 * 3_600 - 120..=3 * 3_600).contains(&ttl_s), "{ttl_s}");
    redis::cmd("EXPIRE").arg(key).arg(1_000).exec(&mut connection).unwrap();
    let answer = appended(&store, Op::Append(named.clone())).await;
    assert!(matches!(answer, Appended::Stored { seq: 1, again: true, .. }), "{answer:?}");
    let ttl_s: i64 = redis::cmd("TTL").arg(key).query(&mut connection).unwrap();
    assert!(ttl_s <= 1_000, "use does not make it last longer");
    redis::cmd("DEL").arg(key).exec(&mut connection).unwrap();
    let other = Append { body: "2".into(), ..named };
    let answer = appended(&store, Op::Append(other)).await;
    assert!(matches!(answer, Appended::Stored { seq: 2, again: false, .. }), "{answer:?}");
}

#[tokio::test]
async fn one_damaged_chat_keeps_nobody_elses_cursor() {
    let redis = Redis::start().unwrap();
    let store = open(&redis).await;
    let chats = ["a:x", "a:y", "a:z"];
    for chat in chats {
        appended(&*store, append(chat, "a", 1, 1)).await;
    }
    let mut connection = redis.connection().unwrap();
    let keys: Vec<String> = redis::cmd("KEYS").arg("*:chat:a:y").query(&mut connection).unwrap();
    let [key] = &keys[..] else { panic!("{keys:?}") };
    redis::cmd("SET").arg(key).arg("no hash").exec(&mut connection).unwrap();
    let cursor = |chat: &str| Op::Delivered { chat: chat.into(), user: "a".into(), seq: 1, read: 0 };
    let outcomes = store.apply(&chats.map(cursor)).await;
    let moved = Ok(Answer::Moved(Moved { delivered: 1, read: 0, is_news: true }));
    assert_eq!((&outcomes[0], &outcomes[2]), (&moved, &moved));
    assert!(matches!(outcomes[1], Err(StoreError::Refused(_))), "{outcomes:?}");
    assert_eq!(
        read::head(one(&*store, Op::Head { chat: "a:z".into(), user: "a".into() }).await).unwrap().delivered,
        1
    );
}
