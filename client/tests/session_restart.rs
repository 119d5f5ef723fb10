//! What is left of a session when its program comes back: on one device's store, against a gateway in this process.

mod fake;

use bytes::Bytes;
use client::{Client, ConnectError, Event, SendError};
use fake::device::{kept, message, told};
use fake::{Fake, Fault};
use proto::Command;
use proto::wire::{self, Code};

fn fault_of_sends(fake: &Fake, fault: Fault) {
    let of = move |command| if command == Command::Send { fault } else { Fault::None };
    fake.world().fault = Some(Box::new(of));
}

#[tokio::test]
async fn a_device_goes_on_where_it_confirmed() {
    let fake = Fake::start().await;
    let root = tempfile::tempdir().unwrap();
    let (bob, mut events) = Client::connect(kept(&fake, "bob", root.path())).await.unwrap();
    for number in 1..=10 {
        fake.world().append("alice:bob", "alice", format!("{number}").into(), 0);
    }
    for seq in 1..=10 {
        let got = message(&mut events).await;
        assert_eq!(got.seq, seq);
        if seq <= 5 {
            events.confirm(&got);
        }
    }
    assert!(matches!(Client::start(kept(&fake, "bob", root.path())), Err(ConnectError::Store(_))), "locked");
    bob.close().await;
    fake.until(|world| world.push_acks.last().is_some_and(|ack| ack.seq == 5)).await;
    fake.world().append("alice:bob", "alice", Bytes::new(), 0);
    let (bob, mut events) = Client::connect(kept(&fake, "bob", root.path())).await.unwrap();
    for seq in 6..=11 {
        assert_eq!(message(&mut events).await.seq, seq);
    }
    bob.close().await;
    let attempts: Vec<_> = fake.world().logins.iter().map(|login| login.attempt).collect();
    assert!(attempts.windows(2).all(|pair| pair[0] < pair[1]), "{attempts:?}");
}

#[tokio::test]
async fn what_was_confirmed_without_a_connection_is_acknowledged_by_the_next_run() {
    let fake = Fake::start().await;
    let root = tempfile::tempdir().unwrap();
    let (bob, mut events) = Client::connect(kept(&fake, "bob", root.path())).await.unwrap();
    fake.world().append("alice:bob", "alice", "hello".into(), 0);
    let got = message(&mut events).await;
    fake.world().refuse.push_back(wire::Error {
        code: Code::Unavailable as i32,
        retry_after_ms: 60_000,
        ..Default::default()
    });
    fake.break_all();
    while !matches!(events.next().await, Some(Event::Disconnected { .. })) {}
    events.confirm(&got);
    bob.close().await;
    assert!(fake.world().push_acks.is_empty());
    fake.world().refuse.clear();
    let (_bob, _events) = Client::connect(kept(&fake, "bob", root.path())).await.unwrap();
    fake.until(|world| world.push_acks.last().is_some_and(|ack| ack.seq == 1)).await;
}

#[tokio::test]
async fn a_message_without_an_answer_is_resent_under_its_id_after_a_restart() {
    let fake = Fake::start().await;
    let root = tempfile::tempdir().unwrap();
    fault_of_sends(&fake, Fault::BreakAfter);
    let (alice, _events) = Client::connect(kept(&fake, "alice", root.path())).await.unwrap();
    let pending = alice.enqueue("bob", "once").await.unwrap();
    fake.until(|world| !world.chats.is_empty()).await;
    alice.close().await;
    assert_eq!(pending.await, Err(SendError::Unanswered));
    fake.world().fault = None;
    let (alice, mut events) = Client::connect(kept(&fake, "alice", root.path())).await.unwrap();
    assert_eq!(alice.send("bob", "twice").await.unwrap().seq, 2);
    assert_eq!(message(&mut events).await.body, "once");
    assert_eq!(message(&mut events).await.body, "twice");
    assert_eq!(fake.world().chats["alice:bob"].len(), 2);
}

#[tokio::test]
async fn of_a_message_that_is_refused_after_a_restart_the_application_hears() {
    let fake = Fake::start().await;
    let root = tempfile::tempdir().unwrap();
    fault_of_sends(&fake, Fault::BreakBefore);
    let (alice, _events) = Client::connect(kept(&fake, "alice", root.path())).await.unwrap();
    // A chat that is not hers.
    let pending = alice.enqueue("bob:carol", "psst").await.unwrap();
    fake.until(|world| world.received.iter().any(|(command, _)| *command == Command::Send)).await;
    alice.close().await;
    assert_eq!(pending.await, Err(SendError::Unanswered));
    fake.world().fault = None;
    let (alice, mut events) = Client::connect(kept(&fake, "alice", root.path())).await.unwrap();
    let Event::EarlierFailed { chat, body, error } = told(&mut events).await else { panic!("it is refused") };
    assert_eq!((&*chat, &body.bytes[..]), ("bob:carol", &b"psst"[..]));
    assert!(matches!(error, SendError::Refused { code: Code::NotAMember, .. }), "{error}");
    alice.close().await;
    // Once.
    let (alice, mut events) = Client::connect(kept(&fake, "alice", root.path())).await.unwrap();
    alice.send("bob", "next").await.unwrap();
    assert!(matches!(told(&mut events).await, Event::Message(_)));
}

#[tokio::test]
async fn what_was_handed_in_before_a_close_is_kept() {
    let fake = Fake::start().await;
    let root = tempfile::tempdir().unwrap();
    fake.world().refuse.extend((0..3).map(|_| wire::Error {
        code: Code::Unavailable as i32,
        retry_after_ms: 60_000,
        ..Default::default()
    }));
    let (alice, _events) = Client::start(kept(&fake, "alice", root.path())).unwrap();
    let pending: Vec<_> = (0..40).map(|n| alice.try_enqueue("bob", format!("{n}")).unwrap()).collect();
    alice.close().await;
    let mut kept_ones = 0;
    for (n, pending) in pending.into_iter().enumerate() {
        // As many as may have an id; the others are told so.
        let expected = if n < 32 { SendError::Unanswered } else { SendError::NotSent };
        assert_eq!(pending.await, Err(expected), "{n}");
        kept_ones += usize::from(n < 32);
    }
    fake.world().refuse.clear();
    let (alice, _events) = Client::connect(kept(&fake, "alice", root.path())).await.unwrap();
    assert_eq!(alice.send("bob", "last").await.unwrap().seq, kept_ones as u64 + 1);
}

/// Nobody waits for the end of a session whose handles are dropped; whoever comes back at once finds it about to let go.
#[tokio::test]
async fn whoever_dropped_a_session_can_come_back_at_once() {
    let fake = Fake::start().await;
    let root = tempfile::tempdir().unwrap();
    for n in 1..=3 {
        let (alice, events) = Client::connect(kept(&fake, "alice", root.path())).await.unwrap();
        assert_eq!(alice.send("bob", "hello").await.unwrap().seq, n);
        drop((alice, events));
    }
}

#[tokio::test]
async fn a_gap_and_a_lost_history_come_again_after_a_restart_until_they_are_confirmed() {
    let fake = Fake::start().await;
    let root = tempfile::tempdir().unwrap();
    for _ in 0..3 {
        fake.world().append("alice:bob", "alice", Bytes::new(), 0);
    }
    // Nothing is left, so that no message stands behind the gap.
    fake.world().first = 4;
    for confirm in [false, true] {
        let (bob, mut events) = Client::connect(kept(&fake, "bob", root.path())).await.unwrap();
        let gap = told(&mut events).await;
        assert!(matches!(&gap, Event::Gap { history: 77, from: 1, to: 3, .. }), "{gap:?}");
        if confirm {
            events.confirm_event(&gap);
        }
        bob.close().await;
    }
    fake.world().history = 78;
    for confirm in [false, true] {
        let (bob, mut events) = Client::connect(kept(&fake, "bob", root.path())).await.unwrap();
        let lost = told(&mut events).await;
        assert!(matches!(&lost, Event::HistoryLost { history: 78, from_seq: 1, .. }), "{lost:?}");
        let gap = told(&mut events).await;
        assert!(matches!(&gap, Event::Gap { history: 78, from: 1, to: 3, .. }), "{gap:?}");
        if confirm {
            events.confirm_event(&lost);
            events.confirm_event(&gap);
        }
        bob.close().await;
    }
    let (_bob, mut events) = Client::connect(kept(&fake, "bob", root.path())).await.unwrap();
    fake.world().append("alice:bob", "alice", Bytes::new(), 0);
    assert!(matches!(told(&mut events).await, Event::Message(message) if message.seq == 4));
}
