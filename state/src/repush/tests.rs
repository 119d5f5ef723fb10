//! Pushing again over a store in memory: what is newer goes out, oldest first within a chat, to whom it is meant for.

use super::*;
use crate::core::tests::{Scripted, core_over};
use crate::gateways::Outgoing;
use crate::store::{Answer, Head, Outcome, Route, chat_bucket};
use prost::Message as _;
use proto::frame::{self, HEADER_BYTES};
use proto::wire::{self, Kind};

const GATEWAY: u32 = 5;

fn connection(incarnation: u32) -> u64 {
    u64::from(incarnation) << 40 | 1
}

/// Chats of alice with `count` messages each, of times 1,000, 1,001, …; bob is at gateway 5, carol at 6.
fn store(chats: &[(&'static str, u64)]) -> Scripted {
    let chats: Vec<(String, u64)> = chats.iter().map(|(chat, count)| ((*chat).to_owned(), *count)).collect();
    Scripted::new(move |op| answer(op, &chats))
}

fn answer(op: &Op, chats: &[(String, u64)]) -> Outcome {
    Ok(match op {
        Op::Recent { bucket, after_us, limit } => Answer::Recent(
            chats
                .iter()
                .map(|(chat, count)| Recent { chat: chat.clone(), time_us: 999 + count })
                .filter(|recent| chat_bucket(&recent.chat) == *bucket && recent.time_us > *after_us)
                .take(*limit)
                .collect(),
        ),
        Op::Pull { chat, cursor, limit, reverse, .. } => {
            let head = chats.iter().find(|(name, _)| name == chat).map_or(0, |(_, count)| *count);
            let mut seqs: Vec<u64> = (1..=head).collect();
            if *reverse {
                seqs.retain(|seq| *cursor == 0 || seq < cursor);
                seqs.reverse();
            } else {
                seqs.retain(|seq| seq > cursor);
            }
            seqs.truncate(*limit);
            let stored = |seq| {
                let (sender, time_us, body) = ("alice".into(), 999 + seq, "x".into());
                Stored { seq, sender, time_us, body, kind: Kind::Text }
            };
            let read_to = seqs.last().copied().unwrap_or(0);
            let messages = seqs.into_iter().map(stored).collect();
            Answer::Messages(Page { history: 1, head, first: 1, since: 0, messages, read_to })
        }
        Op::User { name } => {
            Answer::User(["alice", "bob", "carol"].iter().position(|n| n == name).map(|n| n as u64))
        }
        Op::Routes { user } => {
            let route = |incarnation| Route { device: 1, attempt: 1, connection: connection(incarnation) };
            Answer::Routes(match user {
                1 => vec![route(GATEWAY)],
                2 => vec![route(GATEWAY + 1)],
                _ => Vec::new(),
            })
        }
        Op::Head { .. } => Answer::Head(Head::default()),
        _ => Answer::Done,
    })
}

async fn step_until_idle(core: &Core) {
    for _ in 0..1_000 {
        match step(core).await {
            Stepped::Idle => return,
            Stepped::More => {}
            Stepped::Full => panic!("there is room"),
            Stepped::Failed => panic!("the store answers"),
        }
    }
    panic!("it goes on and on");
}

/// (chat, seq) of what waits on a stream.
async fn pushed(waiting: &mut crate::gateways::Waiting) -> Vec<(String, u64)> {
    let mut all = Vec::new();
    for outgoing in waiting.take(usize::MAX).await {
        let Outgoing::Pushes(pushes) = outgoing else { continue };
        for push in pushes.pushes {
            let body = wire::Push::decode(&push.frame[HEADER_BYTES..]).unwrap();
            assert!(frame::cut(&push.frame, proto::FRAME_BYTES_MAX).is_ok());
            all.push((body.chat, body.message.unwrap().seq));
        }
    }
    all
}

fn takeover(from_us: u64, upto_us: u64) -> Takeover {
    Takeover { of: ("s".into(), 9), from_us, upto_us, buckets: Buckets::all() }
}

fn since(from_us: u64) -> Missing {
    Missing { from_us, upto_us: u64::MAX }
}

#[tokio::test]
async fn everything_newer_goes_out_oldest_first_however_much_it_is() {
    let core = core_over(store(&[("alice:bob", 350), ("alice:carol", 3)]));
    let (_bob, mut to_bob) = core.gateways.open(GATEWAY);
    let (_carol, mut to_carol) = core.gateways.open(GATEWAY + 1);
    core.repush.take_over(takeover(1_009, 1_340));
    assert!(core.repush.is_busy_with(&("s".into(), 9)));
    step_until_idle(&core).await;
    assert!(!core.repush.is_busy_with(&("s".into(), 9)));
    let wanted: Vec<(String, u64)> = (11..=341).map(|seq| ("alice:bob".to_owned(), seq)).collect();
    assert_eq!(pushed(&mut to_bob).await, wanted);
    // All of hers is older.
    core.repush.take_over(takeover(1_000, u64::MAX));
    step_until_idle(&core).await;
    let wanted = [("alice:carol".to_owned(), 2), ("alice:carol".to_owned(), 3)];
    assert_eq!(pushed(&mut to_carol).await, wanted);
}

#[tokio::test]
async fn a_doubted_chat_is_looked_at_again_alone_and_for_all() {
    let store = store(&[("alice:bob", 350), ("alice:carol", 3)]);
    let core = core_over(store.clone());
    let (_bob, mut to_bob) = core.gateways.open(GATEWAY);
    core.repush.look_again("alice:bob".into(), 1_200);
    core.repush.look_again("alice:bob".into(), 1_100);
    // A step that fails puts it back, and it is still for all.
    let Next::Job(job) = core.repush.next(|_| false) else { panic!("there is something to do") };
    core.repush.put_back(*job);
    step_until_idle(&core).await;
    let wanted: Vec<(String, u64)> = (102..=350).map(|seq| ("alice:bob".to_owned(), seq)).collect();
    assert_eq!(pushed(&mut to_bob).await, wanted);
    assert!(!store.asked().iter().any(|op| matches!(op, Op::Recent { .. })));
}

#[tokio::test]
async fn a_gateway_that_is_back_gets_its_own_and_others_get_nothing() {
    let store = store(&[("alice:bob", 5), ("alice:carol", 5)]);
    let core = core_over(store.clone());
    let (_bob, mut to_bob) = core.gateways.open(GATEWAY);
    let (_carol, to_carol) = core.gateways.open(GATEWAY + 1);
    core.repush.replay(GATEWAY, since(1_002));
    step_until_idle(&core).await;
    let wanted = [("alice:bob".to_owned(), 4), ("alice:bob".to_owned(), 5)];
    assert_eq!(pushed(&mut to_bob).await, wanted);
    let read = |op: &Op| matches!(op, Op::Pull { chat, .. } if chat == "alice:carol");
    assert!(!store.asked().iter().any(read), "nobody reads that chat there");
    drop(to_carol);
}

#[tokio::test]
async fn a_gateway_without_room_is_waited_for_and_holds_up_nobody() {
    let core = core_over(store(&[("alice:bob", 5), ("alice:carol", 5)]));
    let (_bob, mut to_bob) = core.gateways.open(GATEWAY);
    let (carol, mut to_carol) = core.gateways.open(GATEWAY + 1);
    while core.gateways.has_room(GATEWAY + 1) {
        assert!(carol.send(Outgoing::Pong(1)).await);
    }
    core.repush.replay(GATEWAY, since(1_002));
    core.repush.replay(GATEWAY + 1, since(1_003));
    core.repush.take_over(Takeover { buckets: Buckets::default(), ..takeover(1, 2) });
    for _ in 0..100 {
        step(&core).await;
    }
    assert_eq!(pushed(&mut to_bob).await.len(), 2);
    assert!(!core.repush.is_busy_with(&("s".into(), 9)));
    assert_eq!(step(&core).await, Stepped::Full);
    assert_eq!(core.gateways.missed().take(GATEWAY + 1).0, None);
    assert!(pushed(&mut to_carol).await.is_empty(), "nothing was pushed while there was no room");
    step_until_idle(&core).await;
    assert_eq!(pushed(&mut to_carol).await, [("alice:carol".to_owned(), 5)]);
}

#[tokio::test]
async fn a_takeover_does_not_wait_until_a_long_replay_is_through() {
    let core = core_over(store(&[("alice:bob", 5_000), ("alice:carol", 5)]));
    let (_bob, _to_bob) = core.gateways.open(GATEWAY);
    let (_carol, mut to_carol) = core.gateways.open(GATEWAY + 1);
    core.repush.replay(GATEWAY, since(1_000));
    step(&core).await;
    let mut buckets = Buckets::default();
    buckets.add(chat_bucket("alice:carol"));
    core.repush.take_over(Takeover { buckets, ..takeover(1_002, u64::MAX) });
    let mut steps = 0;
    while core.repush.is_busy_with(&("s".into(), 9)) {
        step(&core).await;
        steps += 1;
    }
    assert!(steps <= 10, "{steps}");
    assert_eq!(pushed(&mut to_carol).await.len(), 2);
    assert_ne!(step(&core).await, Stepped::Idle, "the replay goes on");
}

#[tokio::test]
async fn a_gateway_that_leaves_meanwhile_gets_it_when_it_is_back() {
    let core = core_over(store(&[("alice:bob", 5)]));
    core.repush.replay(GATEWAY, since(1_002));
    step_until_idle(&core).await;
    assert_eq!(core.gateways.missed().take(GATEWAY).0, Some(1_002));
}

#[tokio::test]
async fn a_store_that_fails_is_asked_the_same_again() {
    let fails = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let failing = fails.clone();
    let chats = vec![("alice:bob".to_owned(), 350)];
    let core = core_over(Scripted::new(move |op| {
        let failing = failing.load(std::sync::atomic::Ordering::Relaxed);
        if failing && matches!(op, Op::Recent { .. } | Op::Pull { .. }) {
            return Err(StoreError::Unknown("away".into()));
        }
        answer(op, &chats)
    }));
    let (_bob, mut to_bob) = core.gateways.open(GATEWAY);
    core.repush.take_over(takeover(1_009, u64::MAX));
    let mut tries = 0;
    loop {
        fails.store(tries % 2 == 0, std::sync::atomic::Ordering::Relaxed);
        tries += 1;
        match step(&core).await {
            Stepped::Idle => break,
            Stepped::Failed => assert!(tries % 2 == 1),
            Stepped::Full | Stepped::More => {}
        }
    }
    let wanted: Vec<(String, u64)> = (11..=350).map(|seq| ("alice:bob".to_owned(), seq)).collect();
    assert_eq!(pushed(&mut to_bob).await, wanted);
}

#[test]
fn what_the_store_dated_ahead_of_its_clock_is_meant_too() {
    let stored = |seq: u64, time_us| {
        let (sender, body) = ("alice".into(), "x".into());
        Stored { seq, sender, time_us, body, kind: Kind::Text }
    };
    let ahead = 100 + AHEAD_US + 1;
    let messages = vec![stored(4, ahead), stored(3, 101), stored(2, 100), stored(1, 50)];
    let page = Page { history: 1, head: 4, first: 1, since: 0, messages, read_to: 1 };
    let job = Job::new(50, 100, Buckets::all(), BTreeMap::new(), None);
    let seqs: Vec<u64> = accepted("a:b", page, &job).iter().map(|accepted| accepted.message.seq).collect();
    assert_eq!(seqs, [2, 4], "3 came later and is its own server's, 4 is of before the clock was put back");
}

#[test]
fn a_gateway_has_one_job_at_a_time_and_what_it_misses_meanwhile_becomes_one() {
    let repush = Repush::default();
    let next = || match repush.next(|_| false) {
        Next::Job(job) => *job,
        Next::Full | Next::Nothing => panic!("there is a job"),
    };
    repush.replay(GATEWAY, since(500));
    let job = next();
    assert_eq!(job.to, BTreeMap::from([(GATEWAY, 500)]));
    repush.put_back(job);
    repush.replay(GATEWAY, since(700));
    repush.replay(GATEWAY + 1, since(800));
    repush.replay(GATEWAY, since(600));
    for _ in 0..4 {
        let job = next();
        assert_ne!(job.to, BTreeMap::from([(GATEWAY, 600)]));
        repush.put_back(job);
    }
    assert_eq!(repush.queue.lock().replaying.len(), 2);
    while next().to != BTreeMap::from([(GATEWAY, 500)]) {}
    repush.done();
    let left = std::iter::from_fn(|| match repush.next(|_| false) {
        Next::Job(job) => Some(job.to),
        Next::Full | Next::Nothing => None,
    });
    assert!(left.collect::<Vec<_>>().contains(&BTreeMap::from([(GATEWAY, 600)])));
}
