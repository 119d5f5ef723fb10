//! The contract of the `Store` trait, against a real Redis, against redb files, and against the store in memory that simulations
//! use.

mod contract;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant, UNIX_EPOCH};

use contract::{Fixture, append, one, pull, seqs};
use loadtest::supervisor::Redis;
use proto::wire::Durability;
use state::config::StoreConfig;
use state::store::{Answer, Appended, Op, Outcome, Store, StoreError};
use state::store_memory::{MemoryStore, Terms};
use state::store_redb::RedbStore;
use state::store_redis::RedisStore;

impl Fixture for Redis {
    fn start() -> Redis {
        Redis::start().expect("Redis starts")
    }

    async fn open(&self) -> Arc<dyn Store> {
        let config = StoreConfig { url: self.url(), ..StoreConfig::default() };
        Arc::new(RedisStore::open(&config).await.expect("the store opens"))
    }

    async fn open_keeping(&self, retention_messages_max: u64) -> Arc<dyn Store> {
        let config = StoreConfig { url: self.url(), retention_messages_max, ..StoreConfig::default() };
        Arc::new(RedisStore::open(&config).await.expect("the store opens"))
    }

    async fn open_as_another(&self) -> (String, [&'static str; 2]) {
        let config = StoreConfig { url: self.url(), route_buckets: 16, ..StoreConfig::default() };
        let error = RedisStore::open(&config).await.err().expect("it must refuse");
        (error.to_string(), ["route_buckets = 8192", "16"])
    }

    async fn damage(&self, chat: &str, body: &[u8]) {
        let key = format!("{{c{:04}}}:messages:{chat}", state::store::chat_bucket(chat));
        let mut connection = self.connection().unwrap();
        let found: Vec<(String, HashMap<String, String>)> =
            redis::cmd("XRANGE").arg(&key).arg("-").arg("+").query(&mut connection).unwrap();
        redis::cmd("DEL").arg(&key).exec(&mut connection).unwrap();
        for (at, (id, fields)) in found.iter().enumerate() {
            let body = if at == 0 { body } else { fields["body"].as_bytes() };
            let mut add = redis::cmd("XADD");
            add.arg(&key).arg(id).arg("sender").arg(&fields["sender"]).arg("time").arg(&fields["time"]);
            add.arg("crc").arg(&fields["crc"]).arg("body").arg(body).exec(&mut connection).unwrap();
        }
    }
}

/// A redb file in a folder that it has to make.
struct RedbFile {
    folder: tempfile::TempDir,
}

impl RedbFile {
    fn path(&self) -> std::path::PathBuf {
        self.folder.path().join("made/by/it/store.redb")
    }
}

impl Fixture for RedbFile {
    fn start() -> RedbFile {
        RedbFile { folder: tempfile::tempdir().expect("a folder") }
    }

    async fn open(&self) -> Arc<dyn Store> {
        Arc::new(RedbStore::open(&self.path(), &StoreConfig::default()).await.expect("the store opens"))
    }

    async fn open_keeping(&self, retention_messages_max: u64) -> Arc<dyn Store> {
        let config = StoreConfig { retention_messages_max, ..StoreConfig::default() };
        Arc::new(RedbStore::open(&self.path(), &config).await.expect("the store opens"))
    }

    async fn open_as_another(&self) -> (String, [&'static str; 2]) {
        let database = redb::Database::open(self.path()).unwrap();
        let change = database.begin_write().unwrap();
        let meta = redb::TableDefinition::<&str, u64>::new("meta");
        change.open_table(meta).unwrap().insert("layout", 99).unwrap();
        change.commit().unwrap();
        drop(database);
        let error = RedbStore::open(&self.path(), &StoreConfig::default()).await.err();
        (error.expect("it must refuse").to_string(), ["layout = 99", "layout = 2"])
    }

    async fn damage(&self, chat: &str, body: &[u8]) {
        // The chat and the kind of row in front of the seq, then the row: checksum, time, sender, body.
        let key =
            [&(chat.len() as u16).to_be_bytes()[..], chat.as_bytes(), &[2], &1u64.to_be_bytes()].concat();
        let database = redb::Database::open(self.path()).unwrap();
        let change = database.begin_write().unwrap();
        {
            let mut table = change.open_table(redb::TableDefinition::<&[u8], &[u8]>::new("chat")).unwrap();
            let mut row = table.remove(&key[..]).unwrap().expect("the message is there").value().to_vec();
            let at = row.len() - body.len();
            row[at..].copy_from_slice(body);
            table.insert(&key[..], &row[..]).unwrap();
        }
        change.commit().unwrap();
    }
}

/// The store in memory, which is there as long as its fixture.
struct Memory(Arc<MemoryStore>);

/// One opening of it.
struct Opened(Arc<MemoryStore>);

#[async_trait::async_trait]
impl Store for Opened {
    async fn apply(&self, ops: &[Op]) -> Vec<Outcome> {
        self.0.apply(ops).await
    }

    async fn durability(&self) -> Result<(Durability, String), StoreError> {
        self.0.durability().await
    }
}

impl Fixture for Memory {
    fn start() -> Memory {
        Memory(Arc::default())
    }

    async fn open(&self) -> Arc<dyn Store> {
        Arc::new(Opened(self.0.clone()))
    }

    async fn open_keeping(&self, retention_messages_max: u64) -> Arc<dyn Store> {
        let clock = || u64::try_from(UNIX_EPOCH.elapsed().unwrap().as_micros()).unwrap();
        Arc::new(MemoryStore::new(clock, Terms { retention_messages_max, ..Terms::default() }))
    }

    async fn open_as_another(&self) -> (String, [&'static str; 2]) {
        unreachable!("it has no layout")
    }

    async fn damage(&self, chat: &str, body: &[u8]) {
        self.0.damage(chat, 1, body);
    }
}

#[tokio::test]
async fn the_contract_holds_in_memory() {
    contract::holds::<Memory>().await;
}

#[tokio::test]
async fn what_must_be_kept_is_kept_in_memory() {
    contract::keeps_what_it_must::<Memory>().await;
}

#[test]
fn any_sequence_of_appends_follows_the_model_in_memory() {
    contract::follows_the_model::<Memory>();
}

#[test]
fn any_sequence_of_logins_follows_the_model_in_memory() {
    contract::routes_follow_the_model::<Memory>();
}

#[tokio::test]
async fn a_flipped_body_fails_its_checksum_in_memory() {
    contract::tells_of_a_flipped_body::<Memory>().await;
}

#[tokio::test]
async fn the_contract_holds_on_redis() {
    contract::holds::<Redis>().await;
}

#[tokio::test]
async fn the_contract_holds_on_redb() {
    contract::holds::<RedbFile>().await;
}

#[tokio::test]
async fn what_must_be_kept_is_kept_on_redis() {
    contract::keeps_what_it_must::<Redis>().await;
}

#[tokio::test]
async fn what_must_be_kept_is_kept_on_redb() {
    contract::keeps_what_it_must::<RedbFile>().await;
}

#[test]
fn any_sequence_of_appends_follows_the_model_on_redis() {
    contract::follows_the_model::<Redis>();
}

#[test]
fn any_sequence_of_appends_follows_the_model_on_redb() {
    contract::follows_the_model::<RedbFile>();
}

#[test]
fn any_sequence_of_logins_follows_the_model_on_redis() {
    contract::routes_follow_the_model::<Redis>();
}

#[test]
fn any_sequence_of_logins_follows_the_model_on_redb() {
    contract::routes_follow_the_model::<RedbFile>();
}

#[tokio::test]
async fn another_layout_refuses_to_open_on_redis() {
    contract::refuses_another_layout::<Redis>().await;
}

#[tokio::test]
async fn another_layout_refuses_to_open_on_redb() {
    contract::refuses_another_layout::<RedbFile>().await;
}

#[tokio::test]
async fn a_flipped_body_fails_its_checksum_on_redis() {
    contract::tells_of_a_flipped_body::<Redis>().await;
}

#[tokio::test]
async fn a_flipped_body_fails_its_checksum_on_redb() {
    contract::tells_of_a_flipped_body::<RedbFile>().await;
}

/// Strict: what was answered is there after SIGKILL; and scripts that vanished are no reason to fail. What redb does
/// then is in `store_redb_crash.rs`.
#[tokio::test]
async fn what_was_answered_survives_a_kill_of_redis() {
    let mut redis = Redis::start().unwrap();
    let store = redis.open().await;
    let ops: Vec<Op> = (1..=200).map(|n| append("kill:w", "w", 1, n)).collect();
    assert!(store.apply(&ops).await.iter().all(Result::is_ok));
    redis.process.kill().unwrap();
    // Not done where the loss was noticed before, else unknown.
    let error = one(&*store, append("kill:w", "w", 1, 201)).await.unwrap_err();
    assert!(matches!(error, StoreError::Unknown(_) | StoreError::Refused(_)), "{error}");
    redis.process.restart().unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    let answer = loop {
        match one(&*store, append("kill:w", "w", 1, 201)).await {
            Ok(answer) => break answer,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
    };
    assert!(matches!(answer, Answer::Appended(Appended::Stored { seq: 201, .. })), "{answer:?}");
    assert_eq!(seqs(&*store, pull("kill:w", 0, 1000, false)).await, (1..=201).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_redis_that_promises_less_says_so() {
    let redis = Redis::start_with(&[("appendfsync", "everysec")]).unwrap();
    let (durability, why) = redis.open().await.durability().await.unwrap();
    assert_eq!(durability, Durability::Weak);
    assert!(why.contains("appendfsync"), "{why}");
}
