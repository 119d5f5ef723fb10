//! The contract of the `Store` trait, as functions over any store; run here against a real Redis.
//!
//! Trap: one server serves the whole suite, so every function uses names of its own.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use loadtest::supervisor::Redis;
use proptest::prelude::*;
use proto::wire::{Code, Durability};
use state::config::StoreConfig;
use state::store::{Answer, Append, Appended, Bound, Head, Op, Outcome, Store, StoreError, UserRow, read};
use state::store_redis::RedisStore;

async fn open(redis: &Redis) -> Arc<dyn Store> {
    let config = StoreConfig { url: redis.url(), ..StoreConfig::default() };
    Arc::new(RedisStore::open(&config).await.expect("the store opens"))
}

async fn one(store: &dyn Store, op: Op) -> Outcome {
    let mut outcomes = store.apply(&[op]).await;
    assert_eq!(outcomes.len(), 1);
    outcomes.swap_remove(0)
}

fn append(chat: &str, sender: &str, stream: u64, n: u64) -> Op {
    let body = Bytes::from(format!("{sender}/{stream}/{n}"));
    Op::Append(Append { chat: chat.into(), sender: sender.into(), stream, n, body, refusal: None })
}

fn refuse(chat: &str, sender: &str, stream: u64, n: u64) -> Op {
    let refusal = Some(Code::MessageTooLarge);
    Op::Append(Append { chat: chat.into(), sender: sender.into(), stream, n, body: Bytes::new(), refusal })
}

async fn appended(store: &dyn Store, op: Op) -> Appended {
    read::appended(one(store, op).await).unwrap()
}

fn pull(chat: &str, cursor: u64, limit: usize, reverse: bool) -> Op {
    Op::Pull { chat: chat.into(), cursor, limit, reverse }
}

async fn seqs(store: &dyn Store, op: Op) -> Vec<u64> {
    read::page(one(store, op).await).unwrap().messages.iter().map(|message| message.seq).collect()
}

#[tokio::test]
async fn the_contract_holds_on_redis() {
    let mut redis = Redis::start().unwrap();
    let store = open(&redis).await;
    batches_of_every_size(&*store).await;
    an_id_is_answered_once_and_for_ever(&*store).await;
    a_refusal_uses_its_id_up(&*store).await;
    bodies_are_any_bytes(&*store).await;
    ranges(&*store).await;
    users_and_devices_keep_their_numbers(&*store).await;
    bindings_follow_the_attempt(&*store).await;
    chat_lists_come_in_pages(&*store).await;
    delivered_only_rises_and_not_past_the_head(&*store).await;
    numbers_are_given_once(&*store).await;
    assert_eq!(store.durability().await.unwrap().0, Durability::Strict);
    what_was_answered_survives_a_kill(&*store, &mut redis).await;
}

/// Seqs without gaps, times that rise, in one call and over calls.
async fn batches_of_every_size(store: &dyn Store) {
    let (mut n, mut last_time) = (0, 0);
    for size in [1u64, 2, 63, 1000] {
        let ops: Vec<Op> = (n + 1..=n + size).map(|n| append("batch:es", "es", 9, n)).collect();
        for outcome in store.apply(&ops).await {
            n += 1;
            let Appended::Stored { seq, time_us, history, again } = read::appended(outcome).unwrap() else {
                panic!()
            };
            assert_eq!((seq, again), (n, false));
            assert!(time_us > last_time && history != 0);
            last_time = time_us;
        }
    }
    assert_eq!(store.apply(&[]).await, Vec::new());
}

async fn an_id_is_answered_once_and_for_ever(store: &dyn Store) {
    let chat = "dedupe:x";
    assert_eq!(appended(store, append(chat, "x", 1, 2)).await, Appended::Expected(1), "a stream begins at 1");
    let mut first = Vec::new();
    for n in 1..=40 {
        first.push(appended(store, append(chat, "x", 1, n)).await);
    }
    assert_eq!(appended(store, append(chat, "x", 1, 42)).await, Appended::Expected(41));
    for n in 9..=40u64 {
        let Appended::Stored { seq, time_us, history, .. } = first[n as usize - 1].clone() else { panic!() };
        let again = Appended::Stored { seq, time_us, history, again: true };
        assert_eq!(
            appended(store, append(chat, "x", 1, n)).await,
            again,
            "the last 32 are answered the same"
        );
    }
    assert_eq!(appended(store, append(chat, "x", 1, 8)).await, Appended::TooOld);
    assert_eq!(
        appended(store, append(chat, "dedupe", 1, 41)).await,
        Appended::Expected(1),
        "ids are per sender"
    );
    assert_eq!(seqs(store, pull(chat, 0, 100, false)).await, (1..=40).collect::<Vec<_>>());
    // The same id ten times in one call is one message.
    let ops = vec![append(chat, "x", 1, 41); 10];
    let answers = store.apply(&ops).await.into_iter().map(|outcome| read::appended(outcome).unwrap());
    let stored: Vec<u64> = answers
        .map(|appended| match appended {
            Appended::Stored { seq, .. } => seq,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(stored, vec![41; 10]);
}

async fn a_refusal_uses_its_id_up(store: &dyn Store) {
    let chat = "refuse:y";
    assert_eq!(appended(store, refuse(chat, "y", 1, 1)).await, Appended::Refused(Code::MessageTooLarge));
    assert_eq!(
        appended(store, append(chat, "y", 1, 1)).await,
        Appended::Refused(Code::MessageTooLarge),
        "an old copy of it, whatever it holds now, is refused the same"
    );
    assert!(matches!(appended(store, append(chat, "y", 1, 2)).await, Appended::Stored { seq: 1, .. }));
    assert!(
        matches!(
            appended(store, refuse(chat, "y", 1, 2)).await,
            Appended::Stored { seq: 1, again: true, .. }
        ),
        "and what was accepted stays so"
    );
}

async fn bodies_are_any_bytes(store: &dyn Store) {
    let body = Bytes::from((0..=255u8).cycle().take(proto::MESSAGE_BYTES_MAX).collect::<Vec<_>>());
    let chat = "bytes:ü 日本".to_owned();
    let op = Append {
        chat: chat.clone(),
        sender: "ü 日本".into(),
        stream: u64::MAX,
        n: 1,
        body: body.clone(),
        refusal: None,
    };
    appended(store, Op::Append(op)).await;
    let page = read::page(one(store, pull(&chat, 0, 1, false)).await).unwrap();
    assert_eq!((page.messages[0].body.clone(), page.messages[0].sender.as_str()), (body, "ü 日本"));
}

async fn ranges(store: &dyn Store) {
    let ops: Vec<Op> = (1..=10).map(|n| append("range:z", "z", 1, n)).collect();
    store.apply(&ops).await;
    for (cursor, limit, reverse, expected) in [
        (0, 3, false, vec![1, 2, 3]),
        (3, 3, false, vec![4, 5, 6]),
        (9, 5, false, vec![10]),
        (10, 5, false, vec![]),
        (99, 5, false, vec![]),
        (0, 3, true, vec![10, 9, 8]),
        (8, 3, true, vec![7, 6, 5]),
        (1, 3, true, vec![]),
    ] {
        assert_eq!(
            seqs(store, pull("range:z", cursor, limit, reverse)).await,
            expected,
            "{cursor} {limit} {reverse}"
        );
    }
    let page = read::page(one(store, pull("range:z", 4, 1, false)).await).unwrap();
    assert_eq!(page.head, 10);
    let nothing = read::page(one(store, pull("no:body", 0, 5, false)).await).unwrap();
    assert_eq!((nothing.head, nothing.messages.len()), (0, 0));
}

async fn users_and_devices_keep_their_numbers(store: &dyn Store) {
    let register = |name: &str, device: &str, candidate| Op::Register {
        name: name.into(),
        device: device.into(),
        candidate,
        devices_max: 2,
    };
    let row = |number, devices: &[&str]| {
        Some(UserRow { number, devices: devices.iter().map(|d| (*d).into()).collect() })
    };
    let user = async |op| read::user(one(store, op).await).unwrap();
    assert_eq!(user(Op::User { name: "ann".into() }).await, None);
    assert_eq!(user(register("ann", "phone", 70_001)).await, row(70_001, &["phone"]));
    assert_eq!(user(register("ann", "desk", 70_002)).await, row(70_001, &["phone", "desk"]));
    assert_eq!(user(register("ann", "phone", 70_003)).await, row(70_001, &["phone", "desk"]));
    assert_eq!(user(register("ann", "watch", 70_003)).await, None, "two devices at most");
    assert_eq!(user(Op::User { name: "ann".into() }).await, row(70_001, &["phone", "desk"]));
    one(store, Op::NameUser { user: 70_001, name: "ann".into() }).await.unwrap();
    assert_eq!(read::name(one(store, Op::Name { user: 70_001 }).await).unwrap().as_deref(), Some("ann"));
    assert_eq!(read::name(one(store, Op::Name { user: 70_002 }).await).unwrap(), None);
}

async fn bindings_follow_the_attempt(store: &dyn Store) {
    let bind = |device, attempt, connection| Op::Bind { user: 5, device, attempt, connection };
    let bound = async |op| read::bound(one(store, op).await).unwrap();
    let routes = async || {
        let mut found = read::routes(one(store, Op::Routes { user: 5 }).await).unwrap();
        found.sort_by_key(|route| route.device);
        found.iter().map(|route| (route.device, route.attempt, route.connection)).collect::<Vec<_>>()
    };
    assert_eq!(bound(bind(1, 100, 0xA1)).await, Bound::Yes { replaced: None });
    assert_eq!(bound(bind(1, 100, 0xA1)).await, Bound::Yes { replaced: None }, "a replay kicks nobody");
    assert_eq!(bound(bind(1, 100, 0xA2)).await, Bound::Stale { stored: 100 });
    assert_eq!(bound(bind(1, 99, 0xA3)).await, Bound::Stale { stored: 100 });
    assert_eq!(bound(bind(2, 7, u64::MAX)).await, Bound::Yes { replaced: None }, "devices are apart");
    let newest = proto::NUMBER_MAX;
    assert_eq!(bound(bind(1, newest, 0xA4)).await, Bound::Yes { replaced: Some(0xA1) });
    assert_eq!(bound(bind(1, newest - 1, 0xA5)).await, Bound::Stale { stored: newest });
    assert_eq!(routes().await, [(1, newest, 0xA4), (2, 7, u64::MAX)]);
    one(store, Op::Unbind { user: 5, connection: 0xA1 }).await.unwrap();
    assert_eq!(routes().await.len(), 2, "an old connection removes nothing");
    one(store, Op::Unbind { user: 5, connection: 0xA4 }).await.unwrap();
    assert_eq!(routes().await, [(2, 7, u64::MAX)]);
    one(store, Op::Unbind { user: 5, connection: u64::MAX }).await.unwrap();
    assert_eq!(routes().await, []);
}

async fn chat_lists_come_in_pages(store: &dyn Store) {
    let chats: Vec<String> = (0..10).map(|n| format!("list:u{n}")).collect();
    let ops: Vec<Op> =
        chats.iter().rev().map(|chat| Op::ListChat { user: "list".into(), chat: chat.clone() }).collect();
    store.apply(&ops).await;
    store.apply(&ops).await;
    let page = async |after: &str, until: &str, limit| {
        let op = Op::Chats { user: "list".into(), after: after.into(), until: until.into(), limit };
        read::chats(one(store, op).await).unwrap()
    };
    assert_eq!(page("", "", 100).await, chats);
    assert_eq!(page("", "", 3).await, chats[..3]);
    assert_eq!(page("list:u2", "", 3).await, chats[3..6]);
    assert_eq!(page("list:u2", "list:u4", 9).await, chats[3..5]);
    assert_eq!(page("list:u9", "", 9).await, Vec::<String>::new());
}

async fn delivered_only_rises_and_not_past_the_head(store: &dyn Store) {
    let ops: Vec<Op> = (1..=5).map(|n| append("del:v", "v", 1, n)).collect();
    store.apply(&ops).await;
    let delivered = |seq| Op::Delivered { chat: "del:v".into(), user: "v".into(), seq };
    let head = async |chat: &str, user: &str| {
        read::head(one(store, Op::Head { chat: chat.into(), user: user.into() }).await).unwrap()
    };
    for (seq, expected) in [(3, 3), (2, 3), (99, 5)] {
        one(store, delivered(seq)).await.unwrap();
        let at = head("del:v", "v").await;
        assert_eq!((at.seq, at.delivered), (5, expected));
    }
    assert_eq!(head("del:v", "del").await.delivered, 0);
    assert_eq!(head("del:nobody", "v").await, Head { seq: 0, delivered: 0, ..head("del:nobody", "v").await });
}

async fn numbers_are_given_once(store: &dyn Store) {
    let first = read::user_numbers(one(store, Op::UserNumbers { count: 10 }).await).unwrap();
    let second = read::user_numbers(one(store, Op::UserNumbers { count: 1 }).await).unwrap();
    assert!(first >= 1 && second >= first + 10);
    let lives = store.apply(&vec![Op::Incarnate; 20]).await;
    let mut lives: Vec<u32> = lives.into_iter().map(|outcome| read::incarnation(outcome).unwrap()).collect();
    assert!(lives.iter().all(|life| (1..1 << 24).contains(life)));
    lives.dedup();
    assert_eq!(lives.len(), 20);
}

/// Strict: what was answered is there after SIGKILL; and scripts that vanished are no reason to fail.
async fn what_was_answered_survives_a_kill(store: &dyn Store, redis: &mut Redis) {
    let ops: Vec<Op> = (1..=200).map(|n| append("kill:w", "w", 1, n)).collect();
    assert!(store.apply(&ops).await.iter().all(Result::is_ok));
    redis.process.kill().unwrap();
    assert!(matches!(one(store, append("kill:w", "w", 1, 201)).await, Err(StoreError::Unknown(_))));
    redis.process.restart().unwrap();
    // The connection manager notices on use; an error in between is what "unknown" is for.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    let answer = loop {
        match one(store, append("kill:w", "w", 1, 201)).await {
            Ok(answer) => break answer,
            Err(error) => assert!(std::time::Instant::now() < deadline, "{error}"),
        }
    };
    assert!(matches!(answer, Answer::Appended(Appended::Stored { seq: 201, .. })), "{answer:?}");
    assert_eq!(seqs(store, pull("kill:w", 0, 1000, false)).await, (1..=201).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_store_that_promises_less_says_so() {
    let redis = Redis::start_with(&[("appendfsync", "everysec")]).unwrap();
    let (durability, why) = open(&redis).await.durability().await.unwrap();
    assert_eq!(durability, Durability::Weak);
    assert!(why.contains("appendfsync"), "{why}");
}

#[tokio::test]
async fn another_layout_refuses_to_open() {
    let redis = Redis::start().unwrap();
    drop(open(&redis).await);
    let config = StoreConfig { url: redis.url(), route_buckets: 16, ..StoreConfig::default() };
    let error = RedisStore::open(&config).await.err().expect("it must refuse").to_string();
    assert!(error.contains("route_buckets = 8192") && error.contains("16"), "{error}");
}

/// A damaged message is told as such, not shown.
#[tokio::test]
async fn a_flipped_body_fails_its_checksum() {
    let redis = Redis::start().unwrap();
    let store = open(&redis).await;
    appended(&*store, append("crc:q", "q", 1, 1)).await;
    let bucket = state::store::chat_bucket("crc:q");
    let key = format!("{{c{bucket:04}}}:messages:crc:q");
    let mut connection = redis.connection().unwrap();
    let crc: Vec<(String, HashMap<String, String>)> =
        redis::cmd("XRANGE").arg(&key).arg("-").arg("+").query(&mut connection).unwrap();
    redis::cmd("DEL").arg(&key).exec(&mut connection).unwrap();
    let fields = &crc[0].1;
    let mut add = redis::cmd("XADD");
    add.arg(&key).arg("1-0").arg("sender").arg("q").arg("time").arg(&fields["time"]);
    add.arg("crc").arg(&fields["crc"]).arg("body").arg("q/1/2").exec(&mut connection).unwrap();
    assert!(matches!(one(&*store, pull("crc:q", 0, 5, false)).await, Err(StoreError::Corrupt(_))));
}

/// Whatever comes in whatever batches: ids behave like a counter per stream, seqs like one per chat.
#[test]
fn any_sequence_of_appends_follows_the_model() {
    let redis = Redis::start().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let store = runtime.block_on(open(&redis));
    let case = std::cell::Cell::new(0);
    let step = (0u64..3, -3i64..4, any::<bool>());
    let strategy = proptest::collection::vec(proptest::collection::vec(step, 1..20), 1..12);
    proptest!(ProptestConfig::with_cases(48), |(batches in strategy)| {
        case.set(case.get() + 1);
        let chat = format!("model:m{}", case.get());
        let mut watermarks: HashMap<u64, Vec<Option<u64>>> = HashMap::new();
        let mut head = 0;
        for batch in batches {
            let mut ops = Vec::new();
            let mut expected = Vec::new();
            for (stream, offset, refused) in batch {
                let answers = watermarks.entry(stream).or_default();
                let n = (answers.len() as i64 + 1 + offset).max(1) as u64;
                expected.push(if n <= answers.len() as u64 {
                    if answers.len() as u64 - n >= proto::UNANSWERED_MAX { Err(0) } else { Ok(answers[n as usize - 1]) }
                } else if n == answers.len() as u64 + 1 {
                    if !refused { head += 1; }
                    answers.push((!refused).then_some(head));
                    Ok(answers[n as usize - 1])
                } else {
                    Err(answers.len() as u64 + 1)
                });
                ops.push(if refused { refuse(&chat, "model", stream, n) } else { append(&chat, "model", stream, n) });
            }
            let outcomes = runtime.block_on(store.apply(&ops));
            for (outcome, expected) in outcomes.into_iter().zip(expected) {
                let found = match read::appended(outcome).unwrap() {
                    Appended::Stored { seq, .. } => Ok(Some(seq)),
                    Appended::Refused(_) => Ok(None),
                    Appended::Expected(n) => Err(n),
                    Appended::TooOld => Err(0),
                };
                prop_assert_eq!(found, expected);
            }
        }
    });
}
