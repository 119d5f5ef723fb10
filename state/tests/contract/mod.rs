//! The contract of the `Store` trait, as functions over any store.
//!
//! Trap: one store serves the whole suite, so every function uses names of its own.

mod cursors;
mod deletion;
mod groups;
mod kept;
mod logins;
mod model;
mod named;
mod ops;
mod seen;

use std::sync::Arc;

use bytes::Bytes;
use proto::wire::{Code, Durability};
use state::store::{Append, Appended, MessageId, Op, PULL_BYTES_MAX, Store, read};

pub use kept::{keeps_what_it_must, tells_of_a_flipped_body};
pub use model::{follows_the_model, routes_follow_the_model};
pub use ops::{append, appended, one, pull, seqs};

/// A store of one's own, and what it takes to hurt it.
pub trait Fixture: Sized {
    /// With nothing in it.
    fn start() -> Self;

    /// Opens it.
    async fn open(&self) -> Arc<dyn Store>;

    /// Opens it with `retention_messages_max` set so.
    async fn open_keeping(&self, messages_max: u64) -> Arc<dyn Store>;

    /// Opens it as a server would that keeps another layout: the refusal, and what it must name.
    async fn open_as_another(&self) -> (String, [&'static str; 2]);

    /// Puts other bytes in the place of the only message's body, behind the back of the store. Nobody has it open.
    async fn damage(&self, chat: &str, body: &[u8]);
}

/// Everything that a strictly durable store promises, but for crashes.
pub async fn holds<F: Fixture>() {
    let fixture = F::start();
    let store = fixture.open().await;
    batches_of_every_size(&*store).await;
    an_id_is_answered_once_and_for_ever(&*store).await;
    many_streams_are_remembered(&*store).await;
    a_refusal_uses_its_id_up(&*store).await;
    named::a_name_is_bound_to_its_body(&*store).await;
    named::a_refusal_leaves_its_name(&*store).await;
    named::what_has_no_name_is_always_new(&*store).await;
    bodies_are_any_bytes(&*store).await;
    ranges(&*store).await;
    a_pull_stops_at_its_bytes(&*store).await;
    one_call_is_done_in_order(&*store).await;
    calls_at_once_make_one_sequence(&store).await;
    users_keep_their_numbers(&*store).await;
    users_of_one_call(&*store).await;
    logins::hold(&*store).await;
    seen::hold(&*store).await;
    chat_lists_come_in_pages(&*store).await;
    cursors::only_rise_and_not_past_the_head(&*store).await;
    cursors::are_told_with_the_head(&*store).await;
    numbers_are_given_once(&*store).await;
    groups::groups_are_their_members(&*store).await;
    groups::groups_tell_how_far_everybody_is(&*store).await;
    groups::groups_remember_who_was_there_before(&*store).await;
    groups::edits_are_their_senders(&*store).await;
    groups::groups_follow_the_model(&*store).await;
    deletion::is_for_good(&*store).await;
    assert_eq!(store.durability().await.unwrap().0, Durability::Strict);
    drop(store);
    let store = fixture.open().await;
    everything_is_there_after_reopening(&*store).await;
    named::names_are_there_after_reopening(&*store).await;
    seen::hold_after_reopening(&*store).await;
}

/// A store made with another layout is left alone.
pub async fn refuses_another_layout<F: Fixture>() {
    let fixture = F::start();
    drop(fixture.open().await);
    let (error, named) = fixture.open_as_another().await;
    assert!(named.iter().all(|part| error.contains(part)), "{error}");
}

/// A final refusal.
pub fn refuse(chat: &str, sender: &str, stream: u64, n: u64) -> Op {
    let refusal = Some(Code::MessageTooLarge);
    let id = MessageId::Numbered { stream, n };
    Op::Append(Append { chat: chat.into(), sender: sender.into(), id, refusal, ..Append::default() })
}

/// Seqs without gaps, times that rise, in one call and over calls.
async fn batches_of_every_size(store: &dyn Store) {
    let (mut n, mut last_time) = (0, 0);
    for size in [1u64, 2, 63, 1000] {
        let ops: Vec<Op> = (n + 1..=n + size).map(|n| append("batch:es", "es", 9, n)).collect();
        for outcome in store.apply(&ops).await {
            n += 1;
            let Appended::Stored { seq, time_us, history, again, .. } = read::appended(outcome).unwrap()
            else {
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
        let again = Appended::Stored { seq, time_us, history, version: 0, again: true };
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
        id: MessageId::Numbered { stream: u64::MAX, n: 1 },
        body: body.clone(),
        ..Append::default()
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

async fn users_keep_their_numbers(store: &dyn Store) {
    let register = |name: &str, candidate| Op::Register { name: name.into(), candidate };
    let user = async |op| read::user(one(store, op).await).unwrap();
    assert_eq!(user(Op::User { name: "ann".into() }).await, None);
    assert_eq!(user(register("ann", 70_001)).await, Some(70_001));
    assert_eq!(user(register("ann", 70_002)).await, Some(70_001));
    assert_eq!(user(Op::User { name: "ann".into() }).await, Some(70_001));
    assert_eq!(read::name(one(store, Op::Name { user: 70_001 }).await).unwrap().as_deref(), Some("ann"));
    assert_eq!(read::name(one(store, Op::Name { user: 70_002 }).await).unwrap(), None);
}

/// New ones, known ones, and twice the same name in one call; in calls of every kind, as a store may do many otherwise than few.
async fn users_of_one_call(store: &dyn Store) {
    let mut candidate = 80_000;
    let mut numbers = std::collections::HashMap::new();
    for (call, (from, until)) in
        [(0, 100), (0, 100), (50, 150), (100, 110), (105, 160)].into_iter().enumerate()
    {
        let mut ops = Vec::new();
        for n in (from..until).chain([from, until - 1]) {
            candidate += 1;
            ops.push((n, candidate, Op::Register { name: format!("crowd{n}"), candidate }));
        }
        let asked: Vec<Op> = ops.iter().map(|(.., op)| op.clone()).collect();
        for ((n, candidate, _), outcome) in ops.into_iter().zip(store.apply(&asked).await) {
            let number = read::user(outcome).unwrap();
            assert_eq!(number, Some(*numbers.entry(n).or_insert(candidate)), "call {call}, user {n}");
        }
    }
    // Each number has the name of its user, and candidates that lost have none.
    let names: Vec<Op> = (80_001..=candidate).map(|user| Op::Name { user }).collect();
    let users: std::collections::HashMap<u64, u64> =
        numbers.into_iter().map(|(n, number)| (number, n)).collect();
    for (user, outcome) in (80_001..).zip(store.apply(&names).await) {
        let name = users.get(&user).map(|n| format!("crowd{n}"));
        assert_eq!(read::name(outcome).unwrap(), name, "{user}");
    }
    // What is asked behind a change of the same call sees it.
    let register = |name: &str, candidate| Op::Register { name: name.into(), candidate };
    let question = Op::User { name: "late".into() };
    let (name, other) = (Op::Name { user: 90_001 }, Op::Name { user: 80_001 });
    let outcomes = store
        .apply(&[question.clone(), register("late", 90_001), question, name, register("late", 90_002), other])
        .await;
    let numbers = [0, 1, 2, 4].map(|at| read::user(outcomes[at].clone()).unwrap());
    assert_eq!(numbers, [None, Some(90_001), Some(90_001), Some(90_001)]);
    let names = [3, 5].map(|at| read::name(outcomes[at].clone()).unwrap());
    assert_eq!(names, [Some("late".to_owned()), Some("crowd0".to_owned())]);
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

async fn numbers_are_given_once(store: &dyn Store) {
    let first = read::user_numbers(one(store, Op::UserNumbers { count: 10 }).await).unwrap();
    let second = read::user_numbers(one(store, Op::UserNumbers { count: 1 }).await).unwrap();
    assert!(second >= first + 10);
    let now_s = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let (from, until) = ((now_s - 600) << 20, (now_s + 600) << 20);
    assert!((from..until).contains(&first), "a new store gives no number that an older one gave: {first}");
    let lives = store.apply(&vec![Op::Incarnate; 20]).await;
    let mut lives: Vec<u32> = lives.into_iter().map(|outcome| read::incarnation(outcome).unwrap()).collect();
    assert!(lives.iter().all(|life| (1..1 << 24).contains(life)));
    lives.dedup();
    assert_eq!(lives.len(), 20);
}

/// A chat with more streams than anybody keeps at hand: each answers its ids, however long ago it was used.
async fn many_streams_are_remembered(store: &dyn Store) {
    let chat = "streams:s";
    let ops: Vec<Op> = (1..=40).map(|stream| append(chat, "s", stream, 1)).collect();
    assert!(store.apply(&ops).await.iter().all(Result::is_ok));
    for stream in [1, 40, 17, 1] {
        let answer = appended(store, append(chat, "s", stream, 1)).await;
        assert!(matches!(answer, Appended::Stored { seq, again: true, .. } if seq == stream), "{answer:?}");
    }
    assert_eq!(appended(store, append(chat, "s", 2, 3)).await, Appended::Expected(2));
    assert!(matches!(appended(store, append(chat, "s", 2, 2)).await, Appended::Stored { seq: 41, .. }));
    // And all of them in one call.
    let again = store.apply(&ops).await.into_iter().map(|outcome| read::appended(outcome).unwrap());
    for (stream, answer) in (1..).zip(again) {
        assert!(matches!(answer, Appended::Stored { seq, again: true, .. } if seq == stream), "{answer:?}");
    }
}

/// Whatever its limit; and what is larger alone comes alone.
async fn a_pull_stops_at_its_bytes(store: &dyn Store) {
    let size = PULL_BYTES_MAX / 4 + 1;
    let large = |n| {
        let Op::Append(append) = append("large:l", "l", 1, n) else { unreachable!() };
        Op::Append(Append { body: vec![0; size].into(), ..append })
    };
    let ops: Vec<Op> = (1..=20).map(large).collect();
    store.apply(&ops).await;
    assert_eq!(seqs(store, pull("large:l", 0, 100, false)).await, [1, 2, 3, 4]);
    assert_eq!(seqs(store, pull("large:l", 0, 2, false)).await, [1, 2]);
    assert_eq!(seqs(store, pull("large:l", 18, 100, false)).await, [19, 20]);
    assert_eq!(seqs(store, pull("large:l", 0, 100, true)).await, [20, 19, 18, 17]);
    assert_eq!(seqs(store, pull("large:l", 3, 100, true)).await, [2, 1]);
}

/// A question behind a change of the same call sees it.
async fn one_call_is_done_in_order(store: &dyn Store) {
    let chat = "order:o";
    let head = || Op::Head { chat: chat.into(), user: "o".into() };
    let outcomes = store
        .apply(&[
            head(),
            append(chat, "o", 1, 1),
            append(chat, "o", 1, 2),
            head(),
            Op::Delivered { chat: chat.into(), user: "o".into(), seq: 9, read: 1 },
            append(chat, "o", 1, 3),
            head(),
            pull(chat, 1, 9, false),
        ])
        .await;
    let heads = [0, 3, 6].map(|at| read::head(outcomes[at].clone()).unwrap());
    assert_eq!(heads.map(|head| (head.seq, head.delivered, head.read)), [(0, 0, 0), (2, 0, 0), (3, 2, 1)]);
    let page = read::page(outcomes[7].clone()).unwrap();
    assert_eq!((page.head, page.messages.len()), (3, 2));
    assert_eq!((page.history, page.messages[0].seq), (heads[1].history, 2));
}

/// Callers that write into one chat at the same time get seqs without gaps, each seq once.
async fn calls_at_once_make_one_sequence(store: &Arc<dyn Store>) {
    let writers = (1..=16).map(|stream| {
        let store = store.clone();
        tokio::spawn(async move {
            let mut got = Vec::new();
            for n in 0..10 {
                let ops: Vec<Op> = (1..=5).map(|i| append("once:p", "p", stream, 5 * n + i)).collect();
                for outcome in store.apply(&ops).await {
                    let Ok(Appended::Stored { seq, .. }) = read::appended(outcome) else { panic!() };
                    assert!(got.last().is_none_or(|last| seq > *last), "a sender keeps its order");
                    got.push(seq);
                }
            }
            got
        })
    });
    let mut seqs = Vec::new();
    for writer in writers.collect::<Vec<_>>() {
        seqs.extend(writer.await.unwrap());
    }
    seqs.sort_unstable();
    assert_eq!(seqs, (1..=800).collect::<Vec<_>>());
}

/// What the suite left behind, as a server finds it that comes later.
async fn everything_is_there_after_reopening(store: &dyn Store) {
    assert_eq!(seqs(store, pull("batch:es", 0, 2000, false)).await, (1..=1066).collect::<Vec<_>>());
    let again = appended(store, append("batch:es", "es", 9, 1066)).await;
    assert!(matches!(again, Appended::Stored { seq: 1066, again: true, .. }), "{again:?}");
    assert_eq!(
        appended(store, append("refuse:y", "y", 1, 1)).await,
        Appended::Refused(Code::MessageTooLarge)
    );
    let ann = read::user(one(store, Op::User { name: "ann".into() }).await).unwrap();
    assert_eq!(ann, Some(70_001));
    cursors::are_there_after_reopening(store).await;
    logins::hold_after_reopening(store).await;
    deletion::is_there_after_reopening(store).await;
}
