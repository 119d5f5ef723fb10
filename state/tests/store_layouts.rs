//! Stores of every released layout, opened by this version. `fixtures/README.md` says how they were made.
//!
//! Trap: the fixtures grow old. They are opened with nothing that expires.

#[path = "layouts/layout2.rs"]
mod layout2;
#[path = "contract/ops.rs"]
mod ops;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::time::Duration;

use loadtest::supervisor::Redis;
use ops::{append, appended, one, pull, seqs};
use proto::wire::Code;
use state::config::StoreConfig;
use state::store::{Appended, CHAT_BUCKETS, Op, Store, chat_bucket, read};
use state::store_redb::RedbStore;
use state::store_redis::RedisStore;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn keeping_all() -> StoreConfig {
    StoreConfig {
        dedupe_days: 36_500,
        named_ids_hours: 36_500 * 24,
        retention_days: 0,
        retention_messages_max: 0,
        ..StoreConfig::default()
    }
}

/// A Redis with these commands done.
fn redis_with(name: &str) -> Redis {
    let redis = Redis::start().unwrap();
    let mut stream = TcpStream::connect(redis.address()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let commands = std::fs::read(fixture(name)).unwrap();
    let reader = std::thread::spawn({
        let mut stream = stream.try_clone().unwrap();
        move || {
            let mut replies = Vec::new();
            stream.read_to_end(&mut replies).unwrap();
            assert!(!replies.windows(3).any(|at| at == b"\n-E"), "a command failed");
        }
    });
    stream.write_all(&commands).unwrap();
    stream.write_all(b"*1\r\n$4\r\nQUIT\r\n").unwrap();
    reader.join().unwrap();
    redis
}

async fn open_redis(redis: &Redis) -> RedisStore {
    RedisStore::open(&StoreConfig { url: redis.url(), ..keeping_all() }).await.expect("it is migrated")
}

/// Everything that was in it, and what layout 2 has besides.
async fn holds_what_layout_1_held(store: &dyn Store, history: u64) {
    let head = async |chat: &str| {
        read::head(one(store, Op::Head { chat: chat.into(), user: "ann".into() }).await).unwrap()
    };
    let at = head("ann:bob").await;
    assert_eq!((at.seq, at.first, at.delivered, at.history), (46, 1, 30, history));
    assert_eq!(seqs(store, pull("ann:bob", 0, 100, false)).await, (1..=46).collect::<Vec<_>>());
    let mut chats: Vec<String> = (0..60).map(|n| format!("u{n}:v{n}")).collect();
    for chat in &chats {
        let at = head(chat).await;
        assert_eq!((at.seq, at.first), (3, 1), "{chat}");
    }
    assert_eq!((head("refused:only").await.seq, head("refused:only").await.first), (0, 1));
    chats.push("ann:bob".to_owned());
    chats.sort();
    let ops: Vec<Op> =
        (0..CHAT_BUCKETS).map(|bucket| Op::Recent { bucket, after_us: 0, limit: 100 }).collect();
    let mut recent = Vec::new();
    for outcome in store.apply(&ops).await {
        recent.extend(read::recent(outcome).unwrap().into_iter().map(|recent| recent.chat));
    }
    recent.sort();
    assert_eq!(recent, chats, "every chat with a message, also those trimmed before");
    let user = read::user(one(store, Op::User { name: "bob".into() }).await).unwrap();
    let routes = read::routes(one(store, Op::Routes { user: 71 }).await).unwrap();
    assert_eq!((user, routes.len(), routes[0].connection), (Some(72), 1, 99));
}

/// It goes on where it was, and retention finds what is old.
async fn goes_on(store: &dyn Store) {
    let again = appended(store, append("ann:bob", "ann", 7, 40)).await;
    assert!(matches!(again, Appended::Stored { seq: 40, again: true, .. }), "{again:?}");
    // Whatever it says now.
    let refused = appended(store, append("ann:bob", "ann", 7, 41)).await;
    assert_eq!(refused, Appended::Refused(Code::MessageTooLarge));
    let new = appended(store, append("ann:bob", "ann", 7, 42)).await;
    let Appended::Stored { seq: 47, time_us, .. } = new else { panic!("{new:?}") };
    for chat in ["ann:bob", "u3:v3"] {
        let expire = Op::Expire { bucket: chat_bucket(chat), before_us: time_us, limit: 100 };
        one(store, expire).await.unwrap();
    }
    let first = async |chat: &str| {
        read::head(one(store, Op::Head { chat: chat.into(), user: "ann".into() }).await).unwrap().first
    };
    assert_eq!((first("ann:bob").await, first("u3:v3").await, first("u4:v4").await), (47, 4, 1));
}

#[tokio::test]
async fn layout_1_of_redis_is_migrated() {
    let redis = redis_with("layout1/redis.resp");
    let get = |key: &str| redis::cmd("GET").arg(key).query::<Option<u64>>(&mut redis.connection().unwrap());
    let history = get(&format!("{{c{:04}}}:history", chat_bucket("ann:bob"))).unwrap().unwrap();
    let (store, another) = tokio::join!(open_redis(&redis), open_redis(&redis));
    holds_what_layout_1_held(&store, history).await;
    holds_what_layout_1_held(&another, history).await;
    drop(store);
    let store = open_redis(&redis).await;
    holds_what_layout_1_held(&store, history).await;
    goes_on(&store).await;
    assert_eq!(another.generation(), 0);
}

/// As a kill leaves it: some chats done, the number not.
#[tokio::test]
async fn a_migration_of_redis_is_taken_up_again() {
    let redis = redis_with("layout1/redis.resp");
    drop(open_redis(&redis).await);
    let mut connection = redis.connection().unwrap();
    let fields = ["run", "id", "strict", "drawn"];
    redis::cmd("HDEL").arg("rookery:meta").arg(&fields).exec(&mut connection).unwrap();
    redis::cmd("HSET").arg("rookery:meta").arg("layout").arg(1).exec(&mut connection).unwrap();
    for chat in (0..60).step_by(2).map(|n| format!("u{n}:v{n}")).chain(["ann:bob".to_owned()]) {
        let tag = format!("{{c{:04}}}", chat_bucket(&chat));
        redis::cmd("ZREM").arg(format!("{tag}:recent")).arg(&chat).exec(&mut connection).unwrap();
        redis::cmd("HDEL").arg(format!("{tag}:chat:{chat}")).arg("oldest").exec(&mut connection).unwrap();
    }
    let key = format!("{{c{:04}}}:history", chat_bucket("ann:bob"));
    let history: u64 = redis::cmd("GET").arg(key).query(&mut connection).unwrap();
    let store = open_redis(&redis).await;
    holds_what_layout_1_held(&store, history).await;
    goes_on(&store).await;
}

#[tokio::test]
async fn layout_1_of_redb_is_migrated() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.redb");
    std::fs::copy(fixture("layout1/store.redb"), &path).unwrap();
    let history = {
        let database = redb::Database::open(&path).unwrap();
        let meta = redb::TableDefinition::<&str, u64>::new("meta");
        let read = redb::ReadableDatabase::begin_read(&database).unwrap();
        read.open_table(meta).unwrap().get("history").unwrap().unwrap().value()
    };
    for _ in 0..2 {
        let store = RedbStore::open(&path, &keeping_all()).await.expect("it is migrated");
        holds_what_layout_1_held(&store, history).await;
    }
    goes_on(&RedbStore::open(&path, &keeping_all()).await.unwrap()).await;
}

#[tokio::test]
async fn layout_2_of_redis_is_opened() {
    let redis = redis_with("layout2/redis.resp");
    for _ in 0..2 {
        layout2::holds(&open_redis(&redis).await).await;
    }
}

#[tokio::test]
async fn layout_2_of_redb_is_opened() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.redb");
    std::fs::copy(fixture("layout2/store.redb"), &path).unwrap();
    for _ in 0..2 {
        layout2::holds(&RedbStore::open(&path, &keeping_all()).await.unwrap()).await;
    }
}

/// What the fixture is of. With `ROOKERY_FIXTURE_TO=FOLDER` in the environment the files are left there.
#[tokio::test]
async fn what_this_version_writes_is_held_to_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.redb");
    layout2::write(&RedbStore::open(&path, &keeping_all()).await.unwrap()).await;
    let redis = Redis::start().unwrap();
    layout2::write(&open_redis(&redis).await).await;
    if let Some(to) = std::env::var_os("ROOKERY_FIXTURE_TO").map(PathBuf::from) {
        std::fs::copy(&path, to.join("store.redb")).unwrap();
        let log = redis.folder().join("appendonlydir/appendonly.aof.1.incr.aof");
        std::fs::copy(log, to.join("redis.resp")).unwrap();
    }
    layout2::holds(&RedbStore::open(&path, &keeping_all()).await.unwrap()).await;
    layout2::holds(&open_redis(&redis).await).await;
}
