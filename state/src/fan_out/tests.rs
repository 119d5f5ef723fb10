//! Who is ended, and how a message for many leaves.

use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::poll;
use prost::Message as _;
use proto::wire::{Kind, Role};

use super::*;
use crate::core::tests::{Scripted, core_over};
use crate::group::{Group, Member};
use crate::store::{Answer, Head, Op, Page, Roster, StoreError, Stored};

/// A message of a group, all of whose members see it.
fn of_group(seq: u64) -> Accepted {
    let message = wire::Message { seq, time_us: seq, sender: "nobody".into(), ..wire::Message::default() };
    Accepted { version: 1, ..Accepted::pushed_again("#1".into(), 7, message) }
}

/// Every other one at another worker of the same gateway.
fn connection_of(user: u64) -> u64 {
    (1 << 40) + ((user % 2) << 32) + user
}

/// A store with a group of so many, each connected once; and how many routes were asked for.
fn store_of_group(members: u64) -> (Scripted, Arc<AtomicU64>) {
    let routes_read = Arc::new(AtomicU64::new(0));
    let reads = routes_read.clone();
    let store = Scripted::new(move |op| {
        Ok(match op {
            Op::Members { .. } => {
                let member = |number| Member { number, role: Role::Member, joined: 1, left: 0 };
                // Names are not in the order of numbers.
                let members = (1..=members).rev().map(|number| (format!("u{number}"), member(number)));
                let group = Group { version: 1, ..Group::default() };
                Answer::Roster(Roster { group, members: members.collect(), ..Roster::default() })
            }
            Op::Routes { user } => {
                reads.fetch_add(1, Ordering::Relaxed);
                Answer::Routes(vec![Route { device: 1, attempt: 1, connection: connection_of(*user) }])
            }
            _ => Answer::User(None),
        })
    });
    (store, routes_read)
}

fn taken(waiting: &mut crate::gateways::Waiting) -> Vec<Pushes> {
    let pushes = |outgoing| if let Outgoing::Pushes(pushes) = outgoing { Some(pushes) } else { None };
    waiting.take_now().into_iter().filter_map(pushes).collect()
}

fn ack_within_ms_of(push: &Push) -> u32 {
    wire::Push::decode(&push.frame[proto::frame::HEADER_BYTES..]).unwrap().ack_within_ms
}

#[tokio::test]
async fn a_message_for_many_leaves_in_parts_for_one_worker_and_each_waits_for_the_one_before() {
    let many = 2 * PARTS_FROM_READERS as u64;
    let (store, routes_read) = store_of_group(many);
    let core = core_over(store);
    let (_stream, mut waiting) = core.gateways.open(proto::incarnation_of(1 << 40));
    let mut two = vec![of_group(1), of_group(2)];
    let mut round = std::pin::pin!(round(&core, &mut two));
    let (mut connections, mut parts, mut is_over) = (Vec::new(), 0_usize, false);
    while !is_over {
        is_over = poll!(round.as_mut()).is_ready();
        let left = taken(&mut waiting);
        let Some(part) = left.first() else {
            // It rests.
            tokio::task::yield_now().await;
            continue;
        };
        parts += 1;
        assert_eq!((left.len(), part.turn.is_some()), (1, true), "the next one waits until this is placed");
        let [first, second] = &part.pushes[..] else { panic!("both messages, in their order") };
        assert_eq!(first.connections, second.connections);
        assert!(first.later && second.later, "behind everybody else");
        let worker = proto::worker_of(first.connections[0]);
        assert!(first.connections.iter().all(|connection| proto::worker_of(*connection) == worker));
        assert_eq!(ack_within_ms_of(first), many as u32, "a millisecond each");
        connections.extend(first.connections.clone());
        // Meanwhile routes are read, until as many wait again.
        let read = routes_read.load(Ordering::Relaxed) as usize;
        assert!(read == many as usize || read - connections.len() == PARTS_FROM_READERS, "{read}");
    }
    assert_eq!(parts, 4);
    connections.sort_unstable_by_key(|connection| *connection as u32);
    assert!(connections.into_iter().eq((1..=many).map(connection_of)));
}

#[tokio::test]
async fn a_message_for_fewer_leaves_at_once() {
    let (store, _) = store_of_group(PARTS_FROM_READERS as u64 - 1);
    let core = core_over(store);
    let (_stream, mut waiting) = core.gateways.open(proto::incarnation_of(1 << 40));
    round(&core, &mut vec![of_group(1)]).await;
    let left = taken(&mut waiting);
    let [part] = &left[..] else { panic!("{} parts", left.len()) };
    assert!(part.turn.is_none() && !part.pushes[0].later);
    assert!(part.pushes[0].connections.len() == PARTS_FROM_READERS - 1);
    assert_eq!(ack_within_ms_of(&part.pushes[0]), 0);
}

#[tokio::test]
async fn a_number_that_is_nobodys_any_more_is_looked_up_again() {
    let connection = (1 << 40) + 2;
    let store = Scripted::new(move |op| {
        Ok(match op {
            Op::Routes { user: 1 } => Answer::Retired(vec![Route { device: 1, attempt: 1, connection: 9 }]),
            Op::Routes { user: 2 } => Answer::Routes(vec![Route { device: 1, attempt: 1, connection }]),
            Op::Routes { .. } => Answer::Routes(Vec::new()),
            Op::User { .. } => Answer::User(Some(2)),
            Op::Head { .. } => Answer::Head(Head::default()),
            _ => return Err(StoreError::Corrupt("not asked for here".into())),
        })
    });
    let core = core_over(store);
    [("alice", 1), ("bob", 3)].into_iter().for_each(|(name, number)| core.users.learn(name, number));
    let (_stream, mut waiting) = core.gateways.open(proto::incarnation_of(connection));
    let message = wire::Message { seq: 1, sender: "bob".into(), time_us: 1, ..Default::default() };
    let accepted = Accepted::pushed_again("alice:bob".into(), 7, message);
    push_all(&core, &[accepted], &BTreeMap::new()).await;
    let pushed =
        |outgoing: &Outgoing| matches!(outgoing, Outgoing::Pushes(pushes) if pushes.pushes.len() == 1);
    let sent = waiting.take_now();
    assert!(sent.len() == 1 && sent.iter().all(pushed));
    assert_eq!((core.users.number("alice"), core.users.name(1)), (Some(2), None));
}

#[tokio::test]
async fn whoever_bears_a_name_now_is_not_pushed_what_was_anothers() {
    let connection = |user: u64| (1 << 40) + user;
    let store = Scripted::new(move |op| {
        Ok(match op {
            Op::Routes { user } => {
                Answer::Routes(vec![Route { device: 1, attempt: 1, connection: connection(*user) }])
            }
            // Up to 50 the chat was with another bob.
            Op::Head { user, .. } => {
                Answer::Head(Head { since: if user == "bob" { 50 } else { 0 }, ..Head::default() })
            }
            _ => return Err(StoreError::Corrupt("not asked for here".into())),
        })
    });
    let core = core_over(store);
    [("alice", 1), ("bob", 2)].into_iter().for_each(|(name, number)| core.users.learn(name, number));
    let (_stream, mut waiting) = core.gateways.open(proto::incarnation_of(connection(1)));
    let of = |seq| {
        let message = wire::Message { seq, sender: "alice".into(), time_us: seq, ..Default::default() };
        Accepted::pushed_again("alice:bob".into(), 7, message)
    };
    push_all(&core, &[of(50), of(51)], &BTreeMap::new()).await;
    let pushes = taken(&mut waiting).into_iter().flat_map(|part| part.pushes);
    let connections: Vec<_> = pushes.map(|push| push.connections).collect();
    assert_eq!(connections, [vec![connection(1)], vec![connection(1), connection(2)]]);
}

#[tokio::test]
async fn what_is_pushed_again_for_a_resend_is_as_stored_and_under_the_present_history() {
    let store = Scripted::new(|op| {
        let Op::Pull { cursor: 4, .. } = op else {
            return Err(StoreError::Corrupt("not asked for here".into()));
        };
        let body = "as stored".into();
        let stored = Stored { seq: 5, sender: "alice".into(), time_us: 9, body, kind: Kind::Text };
        Ok(Answer::Messages(Page {
            history: 8,
            head: 5,
            first: 1,
            since: 0,
            messages: vec![stored],
            read_to: 5,
        }))
    });
    let message =
        wire::Message { seq: 5, sender: "alice".into(), body: "as sent".into(), ..Default::default() };
    let resent = Accepted { again: true, ..Accepted::pushed_again("alice:bob".into(), 7, message) };
    let mut taken = vec![resent];
    restore(&core_over(store), &mut taken).await;
    assert_eq!((taken[0].history, &taken[0].message.body[..]), (8, &b"as stored"[..]));
}
