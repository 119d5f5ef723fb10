//! A store on a Redis of a test's own.

use std::sync::Arc;
use std::time::{Duration, Instant};

use loadtest::supervisor::Redis;
use state::config::StoreConfig;
use state::store::{Answer, Appended, Head, Op, read};
use state::store_redis::RedisStore;

use super::ops::{append, appended, one};

pub const CHAT: &str = "a:r";

pub fn config(redis: &Redis) -> StoreConfig {
    StoreConfig { url: redis.url(), ..StoreConfig::default() }
}

pub async fn open(redis: &Redis) -> Arc<RedisStore> {
    Arc::new(RedisStore::open(&config(redis)).await.expect("the store opens"))
}

/// The answer, as soon as there is one.
pub async fn soon(store: &RedisStore, op: Op) -> Answer {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match one(store, op.clone()).await {
            Ok(answer) => return answer,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
    }
}

pub async fn head(store: &RedisStore, chat: &str) -> Head {
    read::head(Ok(soon(store, Op::Head { chat: chat.into(), user: "r".into() }).await)).unwrap()
}

pub async fn say(store: &RedisStore, n: u64) {
    let answer = appended(store, append(CHAT, "r", 1, n)).await;
    assert!(matches!(answer, Appended::Stored { .. }), "{answer:?}");
}
