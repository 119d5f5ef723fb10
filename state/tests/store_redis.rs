//! What the Redis store does when Redis goes away and comes back: the same, with less, emptied, or not at all.
//!
//! Trap: a Redis that is started again takes no connection for a moment, and the store tells so in errors. [`soon`] asks
//! until there is an answer; the store itself waits in between.

#[path = "contract/ops.rs"]
mod ops;
#[path = "contract/redis.rs"]
mod rig;

use std::path::Path;
use std::time::{Duration, Instant};

use loadtest::supervisor::Redis;
use ops::{append, appended, one, pull};
use proto::link::Stored;
use proto::wire::Durability;
use rig::{CHAT, config, head, open, say, soon};
use state::config::StoreConfig;
use state::store::{Answer, Appended, Head, Op, Store, StoreError};
use state::store_redis::RedisStore;

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
