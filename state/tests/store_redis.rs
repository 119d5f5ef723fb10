//! What the Redis store does when Redis goes away and comes back: the same, with less, emptied, or not at all.
//!
//! Trap: a Redis that is started again takes no connection for a moment, and the store tells so in errors. [`soon`] asks
//! until there is an answer; the store itself waits in between.

#[path = "contract/ops.rs"]
mod ops;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use loadtest::supervisor::Redis;
use ops::{append, appended, one, pull, seqs};
use proto::link::Stored;
use proto::wire::Durability;
use state::config::StoreConfig;
use state::store::{
    Answer, Append, Appended, Head, MessageId, Moved, Op, Store, StoreError, chat_bucket, read,
};
use state::store_redis::RedisStore;

const CHAT: &str = "a:r";

fn config(redis: &Redis) -> StoreConfig {
    StoreConfig { url: redis.url(), ..StoreConfig::default() }
}

async fn open(redis: &Redis) -> Arc<RedisStore> {
    Arc::new(RedisStore::open(&config(redis)).await.expect("the store opens"))
}

/// The answer, as soon as there is one.
async fn soon(store: &RedisStore, op: Op) -> Answer {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match one(store, op.clone()).await {
            Ok(answer) => return answer,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
    }
}

async fn head(store: &RedisStore, chat: &str) -> Head {
    read::head(Ok(soon(store, Op::Head { chat: chat.into(), user: "r".into() }).await)).unwrap()
}

async fn say(store: &RedisStore, n: u64) {
    let answer = appended(store, append(CHAT, "r", 1, n)).await;
    assert!(matches!(answer, Appended::Stored { .. }), "{answer:?}");
}

fn mark() -> Op {
    Op::Mark { server: "s".into(), life: 1, pushed_us: 0 }
}

fn copy(from: &Path, to: &Path) {
    let _ = std::fs::remove_dir_all(to);
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// Its log, and a place beside it.
fn log_and_copy(redis: &Redis) -> (std::path::PathBuf, std::path::PathBuf) {
    (redis.folder().join("appendonlydir"), redis.folder().join("older"))
}

#[tokio::test]
async fn a_strict_redis_that_starts_again_keeps_its_histories() {
    let mut redis = Redis::start().unwrap();
    let store = open(&redis).await;
    let another = open(&redis).await;
    say(&store, 1).await;
    one(&*store, mark()).await.unwrap();
    let before = head(&store, CHAT).await;
    for n in 2..5 {
        redis.process.kill().unwrap();
        redis.process.restart().unwrap();
        assert_eq!(head(&store, CHAT).await.history, before.history);
        say(&store, n).await;
        assert_eq!(head(&another, CHAT).await, Head { seq: n, ..before });
    }
    assert_eq!(head(&*open(&redis).await, CHAT).await.history, before.history, "nor does who comes new");
    assert_eq!((store.generation(), another.generation()), (0, 0));
}

#[tokio::test]
async fn a_weak_redis_that_starts_again_draws_new_histories() {
    let mut redis = Redis::start_with(&[("appendfsync", "everysec")]).unwrap();
    let store = open(&redis).await;
    say(&store, 1).await;
    let before = head(&store, CHAT).await;
    redis.process.kill().unwrap();
    redis.process.restart().unwrap();
    assert_ne!(head(&store, CHAT).await.history, before.history);
    assert_eq!(store.generation(), 1);
}

/// What was weak when it ended is not trusted because it is strict now.
#[tokio::test]
async fn what_became_weak_is_recorded() {
    let mut redis = Redis::start().unwrap();
    let store = open(&redis).await;
    say(&store, 1).await;
    let before = head(&store, CHAT).await;
    let mut set = redis::cmd("CONFIG");
    set.arg("SET").arg("appendfsync").arg("everysec").exec(&mut redis.connection().unwrap()).unwrap();
    assert_eq!(store.durability().await.unwrap().0, Durability::Weak);
    redis.process.kill().unwrap();
    redis.process.restart().unwrap();
    assert_ne!(head(&store, CHAT).await.history, before.history);
    assert_eq!(store.durability().await.unwrap().0, Durability::Strict);
}

/// What is written to a replica goes with the next copy of its master: here of one that is never there, so that nothing is copied.
#[tokio::test]
async fn a_replica_is_weak_until_it_is_a_master() {
    let redis = Redis::start_with(&[("replica-read-only", "no")]).unwrap();
    let store = open(&redis).await;
    assert_eq!(store.durability().await.unwrap().0, Durability::Strict);
    let follow = |whom: [&str; 2]| {
        redis::cmd("REPLICAOF").arg(&whom).exec(&mut redis.connection().unwrap()).unwrap();
    };
    follow(["127.0.0.1", "1"]);
    let (durability, why) = store.durability().await.unwrap();
    assert_eq!((durability, &*why), (Durability::Weak, "replicaof is 127.0.0.1 1"));
    follow(["NO", "ONE"]);
    assert_eq!(store.durability().await.unwrap().0, Durability::Strict);
}

#[tokio::test]
async fn an_emptied_redis_is_set_up_again() {
    let mut redis = Redis::start().unwrap();
    let (store, another) = (open(&redis).await, open(&redis).await);
    say(&store, 1).await;
    let before = head(&store, CHAT).await;
    assert_eq!(head(&another, CHAT).await, before);
    redis.process.kill().unwrap();
    std::fs::remove_dir_all(log_and_copy(&redis).0).unwrap();
    redis.process.restart().unwrap();
    let after = head(&store, CHAT).await;
    assert_eq!((after.seq, after.first), (0, 1));
    assert!(after.history != before.history && after.history != 0);
    say(&store, 1).await;
    assert_eq!(head(&another, CHAT).await, Head { seq: 1, ..after }, "one loss is drawn once");
    assert_eq!((store.generation(), another.generation()), (1, 1));
    let layout: u32 =
        redis::cmd("HGET").arg("rookery:meta").arg("layout").query(&mut redis.connection().unwrap()).unwrap();
    assert_eq!(layout, proto::STORE_LAYOUT);
}

/// Emptied while it ran, so no connection was lost: the question of every second finds it.
#[tokio::test]
async fn a_redis_that_is_emptied_while_it_runs_is_found() {
    let redis = Redis::start().unwrap();
    let store = open(&redis).await;
    say(&store, 1).await;
    let before = head(&store, CHAT).await;
    redis::cmd("FLUSHALL").exec(&mut redis.connection().unwrap()).unwrap();
    assert!(matches!(store.durability().await, Err(StoreError::Refused(_))));
    assert_ne!(head(&store, CHAT).await.history, before.history);
    assert_eq!(store.durability().await.unwrap().0, Durability::Strict);
    assert_eq!(store.generation(), 1);
}

/// An older copy lacks a mark, or a message, of which somebody knows, whoever comes first.
#[tokio::test]
async fn an_older_copy_draws_new_histories() {
    for marked in [true, false] {
        let mut redis = Redis::start().unwrap();
        let (log, older) = log_and_copy(&redis);
        let (store, another) = (open(&redis).await, open(&redis).await);
        say(&store, 1).await;
        let before = head(&store, CHAT).await;
        let old = append("b:r", "r", 1, 1);
        appended(&*store, old.clone()).await;
        redis.process.kill().unwrap();
        copy(&log, &older);
        redis.process.restart().unwrap();
        assert_eq!(head(&store, CHAT).await, before);
        if marked {
            soon(&store, mark()).await;
        } else {
            say(&store, 2).await;
            // That it is answered again does not make it the newest.
            assert!(matches!(appended(&*store, old).await, Appended::Stored { again: true, .. }));
        }
        redis.process.kill().unwrap();
        copy(&older, &log);
        redis.process.restart().unwrap();
        let after = head(&store, CHAT).await;
        assert_eq!(after.seq, 1);
        assert_ne!(after.history, before.history, "marked: {marked}");
        assert!(matches!(
            appended(&*store, append(CHAT, "r", 2, 1)).await,
            Appended::Stored { seq: 2, history, .. } if history == after.history
        ));
        // One that knew nothing of what is missing may have been content; it looks anew when it asks for the id.
        let deadline = Instant::now() + Duration::from_secs(10);
        while another.durability().await.is_err() || another.generation() == 0 {
            assert!(Instant::now() < deadline);
        }
        assert_eq!(head(&another, CHAT).await.history, after.history, "one loss is drawn once");
        assert_eq!((store.generation(), another.generation()), (1, 1));
    }
}

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

/// Of those who knew the store only a gateway is left.
#[tokio::test]
async fn an_older_copy_is_found_by_what_a_gateway_has_heard() {
    let mut redis = Redis::start().unwrap();
    let (log, older) = log_and_copy(&redis);
    let store = open(&redis).await;
    say(&store, 1).await;
    soon(&store, mark()).await;
    let before = head(&store, CHAT).await;
    redis.process.kill().unwrap();
    copy(&log, &older);
    redis.process.restart().unwrap();
    soon(&store, mark()).await;
    let heard = store.stored();
    assert!(heard.contents != 0 && heard.stamp == 2, "{heard:?}");

    // The same store, to a server that has begun since and knows less of it.
    let fresh = open(&redis).await;
    soon(&store, mark()).await;
    fresh.compare(store.stored(), Duration::ZERO).await.unwrap();
    assert_eq!(head(&fresh, CHAT).await, before);
    assert_eq!(fresh.generation(), 0);

    drop((store, fresh));
    redis.process.kill().unwrap();
    copy(&older, &log);
    redis.process.restart().unwrap();
    let fresh = open(&redis).await;
    assert_eq!(head(&fresh, CHAT).await, before, "nothing shows it yet");
    let other = Stored { contents: heard.contents + 1, ..heard };
    fresh.compare(other, Duration::ZERO).await.unwrap();
    assert_eq!(head(&fresh, CHAT).await, before, "heard of another store");
    // By now it has as many marks; but what was heard was heard before it was looked at.
    soon(&fresh, mark()).await;
    fresh.compare(heard, Duration::ZERO).await.unwrap();
    assert_eq!(head(&fresh, CHAT).await, before, "heard since");
    fresh.compare(heard, Duration::from_secs(3_600)).await.unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while fresh.generation() == 0 {
        assert!(Instant::now() < deadline);
        soon(&fresh, Op::Head { chat: CHAT.into(), user: "r".into() }).await;
    }
    assert_ne!(head(&fresh, CHAT).await.history, before.history);
    assert_ne!(fresh.stored().contents, heard.contents);
}

#[tokio::test]
async fn a_log_cut_at_its_end_draws_new_histories() {
    let mut redis = Redis::start().unwrap();
    let store = open(&redis).await;
    soon(&store, mark()).await;
    for n in 1..=20 {
        say(&store, n).await;
    }
    let before = head(&store, CHAT).await;
    redis.process.kill().unwrap();
    let logs = std::fs::read_dir(log_and_copy(&redis).0).unwrap().map(|entry| entry.unwrap().path());
    let log = logs.max_by_key(|log| log.metadata().unwrap().len()).unwrap();
    let file = std::fs::File::options().write(true).open(log).unwrap();
    file.set_len(file.metadata().unwrap().len() - 10).unwrap();
    redis.process.restart().unwrap();
    let after = head(&store, CHAT).await;
    assert_eq!((before.seq, after.seq), (20, 19));
    assert_ne!(after.history, before.history);
}

/// A kill between the draw and what follows: what is half done is done again.
#[tokio::test]
async fn a_record_that_is_not_whole_is_no_record() {
    let redis = Redis::start().unwrap();
    let store = open(&redis).await;
    say(&store, 1).await;
    let before = head(&store, CHAT).await;
    drop(store);
    redis::cmd("HDEL").arg("rookery:meta").arg("run").exec(&mut redis.connection().unwrap()).unwrap();
    redis::cmd("HDEL").arg("rookery:meta").arg("drawn").exec(&mut redis.connection().unwrap()).unwrap();
    assert_ne!(head(&*open(&redis).await, CHAT).await.history, before.history);
}

/// Nobody hangs: errors come within the limits, and what found no connection was surely not done.
#[tokio::test]
async fn a_redis_that_is_away_is_told_in_time() {
    let mut redis = Redis::start().unwrap();
    let limits = StoreConfig { response_ms_max: 1_000, connect_ms_max: 200, ..config(&redis) };
    let store = RedisStore::open(&limits).await.unwrap();
    redis.process.kill().unwrap();
    let _ = one(&store, append(CHAT, "r", 1, 1)).await;
    // Without limits they would never come.
    let long = Duration::from_secs(60);
    for n in 0..20 {
        let began = Instant::now();
        let outcomes = store.apply(&[append(CHAT, "r", 1, 1), pull(CHAT, 0, 9, false)]).await;
        assert!(
            outcomes.iter().all(|outcome| matches!(outcome, Err(StoreError::Refused(_)))),
            "{outcomes:?}"
        );
        assert!(began.elapsed() < long, "call {n}: {:?}", began.elapsed());
        assert!(matches!(store.durability().await, Err(StoreError::Refused(_))));
    }
    redis.process.restart().unwrap();
    assert_eq!(head(&store, CHAT).await.seq, 0, "what was refused was not done");
    // One that hangs takes what is written, and does it when it wakes up.
    redis.process.pause().unwrap();
    let began = Instant::now();
    let error = one(&store, append(CHAT, "r", 1, 1)).await.unwrap_err();
    assert!(matches!(error, StoreError::Unknown(_)), "{error}");
    assert!(began.elapsed() < long, "{:?}", began.elapsed());
    redis.process.resume().unwrap();
    let answer = soon(&store, append(CHAT, "r", 1, 1)).await;
    assert!(matches!(answer, Answer::Appended(Appended::Stored { seq: 1, again: true, .. })), "{answer:?}");
    assert_eq!(store.generation(), 0);
}

#[tokio::test]
async fn a_redis_that_is_not_there_is_unknown_at_the_start() {
    let mut redis = Redis::start().unwrap();
    redis.process.kill().unwrap();
    let error = RedisStore::open(&config(&redis)).await.err().expect("nobody is there");
    assert!(matches!(error, StoreError::Unknown(_)), "{error}");
}

#[tokio::test]
async fn a_newer_layout_says_what_to_do_also_when_it_comes_later() {
    let mut redis = Redis::start().unwrap();
    let store = open(&redis).await;
    redis::cmd("HSET")
        .arg("rookery:meta")
        .arg("layout")
        .arg(3)
        .exec(&mut redis.connection().unwrap())
        .unwrap();
    let error = RedisStore::open(&config(&redis)).await.err().expect("it must refuse");
    assert!(matches!(error, StoreError::Corrupt(_)));
    for part in ["layout = 3", "set to 2", "a newer one"] {
        assert!(error.to_string().contains(part), "{error}");
    }
    // A server that runs when it is put there is not ready, and writes nothing.
    redis.process.kill().unwrap();
    redis.process.restart().unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    let error = loop {
        match store.durability().await {
            Err(error @ StoreError::Corrupt(_)) => break error,
            _ => assert!(Instant::now() < deadline),
        }
    };
    assert!(error.to_string().contains("layout = 3"), "{error}");
    assert!(matches!(one(&*store, append(CHAT, "r", 1, 1)).await, Err(StoreError::Corrupt(_))));
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
    let moved = Ok(Answer::Moved(Moved { delivered: 1, read: 0 }));
    assert_eq!((&outcomes[0], &outcomes[2]), (&moved, &moved));
    assert!(matches!(outcomes[1], Err(StoreError::Refused(_))), "{outcomes:?}");
    assert_eq!(
        read::head(one(&*store, Op::Head { chat: "a:z".into(), user: "a".into() }).await).unwrap().delivered,
        1
    );
}
