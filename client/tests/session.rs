//! The whole library against a gateway in this process that breaks, doubles, reorders, skips and refuses.

mod fake;

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use client::{Client, ConnectError, Ended, Event, Events, Options, SendError, Target};
use fake::device::{ended, message, options};
use fake::{Fake, Fault, PushFault};
use proto::Command;
use proto::wire::{self, Code};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

#[tokio::test]
async fn everything_arrives_once_and_in_order_whatever_breaks() {
    for seed in 0..3 {
        let fake = Fake::start().await;
        let mut random = StdRng::seed_from_u64(seed);
        let mut push_random = StdRng::seed_from_u64(seed + 1_000);
        fake.world().fault = Some(Box::new(move |command| match random.random_range(0..100) {
            0..=1 if command != Command::Login => Fault::BreakBefore,
            2..=3 => Fault::BreakAfter,
            4..=8 if command != Command::Login => Fault::Unavailable,
            9 if command != Command::Login => Fault::Swallow,
            _ => Fault::None,
        }));
        fake.world().push_fault = Some(Box::new(move || match push_random.random_range(0..20) {
            0..=2 => PushFault::Twice,
            3..=5 => PushFault::Late,
            6..=7 => PushFault::SkipAndResync,
            _ => PushFault::None,
        }));
        let (bob, mut bob_events) = Client::connect(options(&fake, "bob")).await.unwrap();
        let (alice, mut alice_events) = Client::connect(options(&fake, "alice")).await.unwrap();
        let sending = async {
            let mut pending = Vec::new();
            for number in 0..400u32 {
                pending.push(alice.enqueue("bob", format!("message {number}")).await.unwrap());
            }
            for (index, pending) in pending.into_iter().enumerate() {
                assert_eq!(pending.await.unwrap().seq, index as u64 + 1);
            }
        };
        let receiving = |mut events: Events| async move {
            for seq in 1..=400 {
                let got = message(&mut events).await;
                assert_eq!((&*got.chat, got.history, got.seq), ("alice:bob", 77, seq));
                assert_eq!(got.body, format!("message {}", seq - 1));
                events.confirm(&got);
            }
            events
        };
        // A reordered last push would wait for a next one.
        let heal = async {
            fake.until(|world| world.chats.get("alice:bob").is_some_and(|messages| messages.len() == 400))
                .await;
            (fake.world().fault, fake.world().push_fault) = (None, None);
            fake.tell("bob", Command::Resync, &wire::Resync {});
        };
        ((), bob_events, alice_events, ()) =
            tokio::join!(sending, receiving(bob_events), receiving(alice_events), heal);
        alice.close().await;
        bob.close().await;
        // A lost acknowledgement only delays what is shown as delivered; one too high would be a lie.
        assert!(fake.world().delivered.values().all(|seq| *seq <= 400));
        assert!(matches!(ended(&mut bob_events).await, Ended::Closed));
        assert!(matches!(ended(&mut alice_events).await, Ended::Closed));
    }
}

#[tokio::test]
async fn what_is_written_offline_is_sent_later() {
    let fake = Fake::start().await;
    fake.world().refuse.extend((0..3).map(|_| wire::Error {
        code: Code::Unavailable as i32,
        retry_after_ms: 10,
        ..Default::default()
    }));
    let (alice, _events) = Client::start(options(&fake, "alice")).unwrap();
    let pending: Vec<_> = (0..100).map(|n| alice.try_enqueue("bob", format!("{n}")).unwrap()).collect();
    for (index, pending) in pending.into_iter().enumerate() {
        assert_eq!(pending.await.unwrap().seq, index as u64 + 1);
    }
    assert_eq!(fake.world().logins.len(), 4);
}

/// Woken with an answer, it looks at once how the session is doing.
struct Asks(Client, std::sync::Mutex<Option<client::Status>>);

impl std::task::Wake for Asks {
    fn wake(self: Arc<Self>) {
        *self.1.lock().unwrap() = Some(self.0.status());
    }
}

#[tokio::test]
async fn whoever_gets_the_last_answer_can_ask_why() {
    let fake = Fake::start().await;
    let text = "no".to_owned();
    fake.world().refuse.push_back(wire::Error {
        code: Code::LoginRefused as i32,
        text: text.clone(),
        closing: true,
        ..Default::default()
    });
    let (alice, mut events) = Client::start(options(&fake, "alice")).unwrap();
    let mut pending = std::pin::pin!(alice.try_enqueue("bob", "hello").unwrap());
    let asks = Arc::new(Asks(alice.clone(), std::sync::Mutex::new(None)));
    let waker = asks.clone().into();
    let poll = pending.as_mut().poll(&mut std::task::Context::from_waker(&waker));
    assert!(poll.is_pending(), "nobody else had a turn yet");
    let refused = Ended::LoginRefused { code: Code::LoginRefused, text };
    assert_eq!(ended(&mut events).await, refused);
    assert!(pending.await.is_err());
    assert_eq!(*asks.1.lock().unwrap(), Some(client::Status::Ended(refused)));
}

#[tokio::test]
async fn a_stale_attempt_is_overtaken() {
    let fake = Fake::start().await;
    let stored = 1 << 50;
    let stale = wire::Error {
        code: Code::StaleAttempt as i32,
        expected: stored,
        closing: true,
        ..Default::default()
    };
    fake.world().refuse.push_back(stale);
    let (_alice, _events) = Client::connect(options(&fake, "alice")).await.unwrap();
    assert_eq!(fake.world().logins[1].attempt, stored + 1);
}

/// An ipconf that knows one gateway, and counts how often it was asked.
async fn ipconf(gateway: String) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let asked = Arc::new(AtomicUsize::new(0));
    let counter = asked.clone();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            counter.fetch_add(1, Ordering::SeqCst);
            let _ = stream.read(&mut [0; 4096]).await;
            let body = format!(r#"{{"gateways":[{{"addr":"{gateway}","zone":"","load":0.1}}],"wait_ms":0}}"#);
            let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close";
            let _ = stream
                .write_all(format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).as_bytes())
                .await;
        }
    });
    (url, asked)
}

/// A gateway without room, which names an ipconf, and counts who came.
async fn full_gateway(ipconf: String) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let came = Arc::new(AtomicUsize::new(0));
    let counter = came.clone();
    let code = Code::TooManyConnections as i32;
    let error = wire::Error { code, closing: true, ipconf, ..Default::default() };
    let refusal = proto::frame::encode(Command::Error, &error);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            counter.fetch_add(1, Ordering::SeqCst);
            let _ = stream.write_all(&refusal).await;
            let _ = stream.read(&mut [0; 4096]).await;
        }
    });
    (address, came)
}

#[tokio::test]
async fn who_finds_no_room_asks_where_there_is_some() {
    let other = Fake::start().await;
    let (url, asked) = ipconf(other.address.to_string()).await;
    let (full, came) = full_gateway(url).await;
    let options = Options { target: Target::Gateway(vec![full]), ..options(&other, "alice") };
    let (alice, _events) = Client::connect(options).await.unwrap();
    assert_eq!(alice.send("bob", "x").await.unwrap().seq, 1);
    assert_eq!((came.load(Ordering::SeqCst), asked.load(Ordering::SeqCst)), (1, 1));
}

#[tokio::test]
async fn a_kick_and_a_refused_login_are_final() {
    let fake = Fake::start().await;
    let (alice, mut events) = Client::connect(options(&fake, "alice")).await.unwrap();
    fake.tell("alice", Command::Kick, &wire::Kick { code: Code::Replaced as i32, text: String::new() });
    assert!(matches!(ended(&mut events).await, Ended::Kicked { code: Code::Replaced, .. }));
    assert!(events.next().await.is_none());
    assert_eq!(alice.send("bob", "x").await, Err(SendError::NotSent));
    assert_eq!(fake.world().logins.len(), 1);
    fake.world().refuse.push_back(wire::Error { code: Code::LoginRefused as i32, ..Default::default() });
    let refused = Client::connect(options(&fake, "alice")).await;
    let Err(ConnectError::Ended(Ended::LoginRefused { code, .. })) = refused else { panic!("not refused") };
    assert_eq!(code, Code::LoginRefused);
    assert!(matches!(Client::start(options(&fake, "a:b")), Err(ConnectError::Name { what: "user", .. })));
}

#[tokio::test]
async fn refusals_reach_the_sender_and_stop_nobody() {
    let fake = Fake::start().await;
    let (alice, _events) = Client::connect(options(&fake, "alice")).await.unwrap();
    let refused = alice.send("bob:carol", "x").await;
    assert!(matches!(refused, Err(SendError::Refused { code: Code::NotAMember, .. })));
    assert!(matches!(alice.send("b:o:b", "x").await, Err(SendError::Name(_))));
    let long = vec![0u8; proto::MESSAGE_BYTES_MAX + 1];
    assert!(matches!(
        alice.send("bob", long).await,
        Err(SendError::Refused { code: Code::MessageTooLarge, .. })
    ));
    let longest = vec![0u8; proto::MESSAGE_BYTES_MAX];
    assert_eq!(alice.send("bob", longest).await.unwrap().seq, 1);
}

#[tokio::test]
async fn a_gateway_that_does_not_answer_pings_is_left() {
    let fake = Fake::start().await;
    (fake.world().heartbeat_ms, fake.world().answer_pings) = (40, false);
    let (_alice, _events) = Client::connect(options(&fake, "alice")).await.unwrap();
    fake.until(|world| world.logins.len() >= 2).await;
    fake.world().answer_pings = true;
}

#[tokio::test]
async fn a_gateway_that_is_going_is_left_for_another() {
    let fake = Fake::start().await;
    let other = fake.another().await;
    let target = Target::Gateway(vec![fake.address.to_string(), other.address.to_string()]);
    let (alice, mut events) = Client::connect(Options { target, ..options(&fake, "alice") }).await.unwrap();
    fake.tell("alice", Command::GoAway, &wire::GoAway { within_ms: 20, text: "drain".into() });
    let mut addresses = Vec::new();
    while addresses.len() < 2 {
        if let Event::Connected { address, .. } = events.next().await.unwrap() {
            addresses.push(address);
        }
    }
    assert_eq!(addresses, [fake.address.to_string(), other.address.to_string()]);
    assert_eq!(alice.send("bob", "still here").await.unwrap().seq, 1);
}

#[tokio::test]
async fn a_device_that_only_sends_makes_nothing_look_delivered() {
    let fake = Fake::start().await;
    fake.world().append("alice:carol", "carol", Bytes::new(), 0);
    let (alice, _events) =
        Client::connect(Options { receive: false, ..options(&fake, "alice") }).await.unwrap();
    alice.send("bob", "x").await.unwrap();
    fake.world().append("alice:carol", "carol", Bytes::new(), 0);
    alice.close().await;
    fake.until(|world| world.online("alice") == 0).await;
    assert!(fake.world().push_acks.is_empty());
    let (_alice, mut events) = Client::connect(options(&fake, "alice")).await.unwrap();
    let mut seen = Vec::new();
    for _ in 0..3 {
        let got = message(&mut events).await;
        seen.push((got.chat.to_string(), got.seq));
    }
    seen.sort();
    let expected = [("alice:bob", 1), ("alice:carol", 1), ("alice:carol", 2)];
    assert_eq!(seen, expected.map(|(chat, seq)| (chat.to_owned(), seq)));
}

/// What a short cut costs somebody with many chats when nothing was missed: one question, and nothing pulled.
#[tokio::test]
async fn a_thousand_chats_without_news_cost_one_sync_and_no_pull() {
    const CHATS: usize = 1_000;
    let fake = Fake::start().await;
    for number in 0..CHATS {
        fake.world().append(&format!("bob:friend-{number:04}"), "bob", Bytes::new(), 0);
    }
    let (_bob, mut events) = Client::connect(options(&fake, "bob")).await.unwrap();
    for _ in 0..CHATS {
        let got = message(&mut events).await;
        events.confirm(&got);
    }
    fake.until(|world| world.push_acks.len() >= CHATS).await;
    fake.world().received.clear();
    fake.break_all();
    loop {
        if events.next().await.unwrap() == Event::Synced && fake.world().received.len() >= 2 {
            break;
        }
    }
    let received = std::mem::take(&mut fake.world().received);
    let of = |command| received.iter().filter(move |(got, _)| *got == command).map(|(_, bytes)| *bytes);
    println!("{} bytes of Sync", of(Command::Sync).sum::<usize>());
    assert_eq!((of(Command::Login).count(), of(Command::Sync).count(), of(Command::Pull).count()), (1, 1, 0));
    assert!(of(Command::Sync).sum::<usize>() < CHATS * 40, "{received:?}");
}

#[tokio::test]
async fn a_lost_history_is_told() {
    let fake = Fake::start().await;
    let (_bob, mut events) = Client::connect(options(&fake, "bob")).await.unwrap();
    for _ in 0..3 {
        fake.world().append("alice:bob", "alice", Bytes::new(), 0);
    }
    for _ in 0..3 {
        let got = message(&mut events).await;
        events.confirm(&got);
    }
    fake.world().history = 78;
    fake.world().chats.get_mut("alice:bob").unwrap().truncate(1);
    fake.break_all();
    let mut lost = false;
    loop {
        match events.next().await.unwrap() {
            Event::HistoryLost { history, from_seq, .. } => {
                assert_eq!((history, from_seq), (78, 1));
                lost = true;
            }
            Event::Message(message) => {
                assert!(lost);
                assert_eq!((message.history, message.seq), (78, 1));
                return;
            }
            _ => {}
        }
    }
}
