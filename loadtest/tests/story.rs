//! Two people chat through real processes: Redis, etcd, state, gateway, and the real client library.
//!
//! Trap: the rounds with kills are seeded. A failing round prints its seed; `ROUNDS=1 SEED=n` runs it again.

use std::collections::BTreeMap;
use std::time::Duration;

use client::{Client, Event, Events, Keep, Message, Options, Target};
use loadtest::supervisor::{Cluster, ClusterOptions};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Longest that anything here may take before it counts as broken.
const PATIENCE: Duration = Duration::from_secs(60);

fn cluster(embedded: bool) -> Cluster {
    Cluster::start(ClusterOptions { embedded, ..ClusterOptions::default() }).unwrap()
}

fn options(cluster: &Cluster, user: &str, device: &str, folder: &std::path::Path) -> Options {
    let target = Target::Gateway(cluster.gateways.iter().map(|g| g.client.to_string()).collect());
    Options { keep: Keep::Under(folder.to_owned()), ..Options::new(user, device, target) }
}

async fn next_message(events: &mut Events) -> Message {
    let next = async {
        loop {
            match events.next().await.expect("the session goes on") {
                Event::Message(message) => return message,
                Event::Gap { .. } | Event::HistoryLost { .. } | Event::Ended(_) => {
                    panic!("not in this story")
                }
                Event::Connected { .. } | Event::Synced | Event::Disconnected { .. } => {}
                Event::Delivered { .. }
                | Event::Read { .. }
                | Event::Unread { .. }
                | Event::Hidden { .. }
                | Event::Presence { .. }
                | Event::Typing { .. }
                | Event::WatchRefused { .. }
                | Event::EarlierFailed { .. }
                | Event::Trouble { .. } => {}
            }
        }
    };
    tokio::time::timeout(PATIENCE, next).await.expect("a message arrives")
}

async fn receive(events: &mut Events, count: usize) -> Vec<Message> {
    let mut messages = Vec::with_capacity(count);
    while messages.len() < count {
        let message = next_message(events).await;
        events.confirm(&message);
        messages.push(message);
    }
    messages
}

fn texts(messages: &[Message]) -> Vec<String> {
    messages.iter().map(|message| String::from_utf8(message.body.to_vec()).unwrap()).collect()
}

fn numbered(count: usize) -> Vec<String> {
    (1..=count).map(|n| format!("message {n}")).collect()
}

/// Everything that two people and their devices see when nothing fails.
async fn two_people_chat(embedded: bool) {
    let cluster = cluster(embedded);
    let folder = tempfile::tempdir().unwrap();
    let (alice, mut alice_events) =
        Client::connect(options(&cluster, "alice", "phone", folder.path())).await.unwrap();
    let (_desk, mut desk_events) =
        Client::connect(options(&cluster, "alice", "desk", folder.path())).await.unwrap();
    let (bob, mut bob_events) =
        Client::connect(options(&cluster, "bob", "phone", folder.path())).await.unwrap();

    let sent = alice.send("bob", "hello").await.unwrap();
    assert_eq!((&*sent.chat, sent.seq), ("alice:bob", 1));
    let seen = receive(&mut bob_events, 1).await.remove(0);
    assert_eq!((seen.seq, &*seen.sender, &*seen.chat, seen.time_us), (1, "alice", "alice:bob", sent.time_us));
    assert_eq!(receive(&mut desk_events, 1).await[0].seq, 1, "her other device sees it");

    let answered = bob.send("bob:alice", "hello yourself").await.unwrap();
    assert_eq!((&*answered.chat, answered.seq), ("alice:bob", 2), "either spelling is one chat");
    for events in [&mut alice_events, &mut desk_events] {
        let seen = loop {
            let message = next_message(events).await;
            events.confirm(&message);
            if message.seq == 2 {
                break message;
            }
        };
        assert_eq!((&*seen.sender, &seen.body[..]), ("bob", &b"hello yourself"[..]));
    }
    let note = alice.send("alice", "a note to myself").await.unwrap();
    assert_eq!((&*note.chat, note.seq), ("alice:alice", 1));
    assert_eq!(&*receive(&mut desk_events, 1).await[0].chat, "alice:alice");
}

/// Bob is away while alice sends 1,000; he gets all of them, in order, once, and nothing again after a restart.
async fn who_was_away_gets_everything_in_order_once(embedded: bool) {
    let cluster = cluster(embedded);
    let folder = tempfile::tempdir().unwrap();
    let (bob, bob_events) = Client::connect(options(&cluster, "bob", "phone", folder.path())).await.unwrap();
    bob.close().await;
    drop(bob_events);

    let (alice, _events) = Client::connect(options(&cluster, "alice", "phone", folder.path())).await.unwrap();
    send_all(&alice, "bob", &numbered(1_000)).await;

    let (bob, mut bob_events) =
        Client::connect(options(&cluster, "bob", "phone", folder.path())).await.unwrap();
    let seen = receive(&mut bob_events, 1_000).await;
    assert_eq!(texts(&seen), numbered(1_000));
    assert!(seen.iter().map(|message| message.seq).eq(1..=1_000));
    bob.close().await;
    drop(bob_events);

    let (bob, mut bob_events) =
        Client::connect(options(&cluster, "bob", "phone", folder.path())).await.unwrap();
    alice.send("bob", "one more").await.unwrap();
    assert_eq!(texts(&receive(&mut bob_events, 1).await), ["one more"], "nothing comes twice");
    // A device that bob never had begins with what nobody delivered to him yet: nothing.
    bob.close().await;
    let (_bob, mut events) =
        Client::connect(options(&cluster, "bob", "tablet", folder.path())).await.unwrap();
    alice.send("bob", "to the tablet").await.unwrap();
    assert_eq!(texts(&receive(&mut events, 1).await), ["to the tablet"]);
}

/// Sends all, pipelined; returns text → seq as acknowledged.
async fn send_all(client: &Client, to: &str, texts: &[String]) -> BTreeMap<String, u64> {
    let mut pending = Vec::new();
    for text in texts {
        pending.push((text.clone(), client.enqueue(to, text.clone()).await.unwrap()));
    }
    let mut acked = BTreeMap::new();
    for (text, answer) in pending {
        let sent = tokio::time::timeout(PATIENCE, answer).await.expect("an answer comes").unwrap();
        acked.insert(text, sent.seq);
    }
    acked
}

/// The same while the state server and the gateway are each SIGKILLed after a seeded number of acknowledgements and
/// restarted at once: every acknowledged message once and in order.
async fn kills_during_sending_lose_and_double_nothing(embedded: bool) {
    let rounds: u64 = std::env::var("ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(2);
    let seed: u64 = std::env::var("SEED")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or_else(|| rand::random::<u32>().into());
    let mut cluster = cluster(embedded);
    let folder = tempfile::tempdir().unwrap();
    for round in 0..rounds {
        let seed = seed + round;
        let mut random = StdRng::seed_from_u64(seed);
        let mut kill_at = [random.random_range(200..=800), random.random_range(200..=800)];
        eprintln!("round {round}: seed {seed}, state killed at {}, gateway at {}", kill_at[0], kill_at[1]);
        let (alice_name, bob_name) = (format!("alice{round}"), format!("bob{round}"));
        let (alice, _events) =
            Client::connect(options(&cluster, &alice_name, "phone", folder.path())).await.unwrap();
        let mut pending = std::collections::VecDeque::new();
        for text in numbered(1_000) {
            pending.push_back((text.clone(), alice.enqueue(&bob_name, text).await.unwrap()));
        }
        let mut acked = Vec::new();
        while let Some((text, answer)) = pending.pop_front() {
            let sent = tokio::time::timeout(PATIENCE, answer)
                .await
                .unwrap_or_else(|_| panic!("seed {seed}: no answer"));
            acked.push((sent.unwrap_or_else(|error| panic!("seed {seed}: {error}")).seq, text));
            let processes = [&mut cluster.states[0].process, &mut cluster.gateways[0].process];
            for (at, process) in kill_at.iter_mut().zip(processes) {
                if acked.len() == *at {
                    process.kill().unwrap();
                    process.spawn_again().unwrap();
                }
            }
        }
        assert_eq!(acked.len(), 1_000);
        assert!(acked.iter().map(|(seq, _)| *seq).eq(1..=1_000), "seed {seed}: her own order, no gap");
        let (bob, mut events) =
            Client::connect(options(&cluster, &bob_name, "phone", folder.path())).await.unwrap();
        let seen = receive(&mut events, 1_000).await;
        let seen: Vec<(u64, String)> = seen.iter().map(|message| message.seq).zip(texts(&seen)).collect();
        assert_eq!(seen, acked, "seed {seed}");
        alice.close().await;
        bob.close().await;
    }
}

/// Two programs of one user whose state folder was lost in between: every acknowledged message appears; and a second
/// program of a user disconnects nobody.
async fn a_lost_state_folder_swallows_nothing_and_nobody_is_kicked(embedded: bool) {
    let cluster = cluster(embedded);
    let folder = tempfile::tempdir().unwrap();
    let (_bob, mut bob_events) =
        Client::connect(options(&cluster, "bob", "phone", folder.path())).await.unwrap();
    let (_listening, mut listening) =
        Client::connect(options(&cluster, "alice", "listen", folder.path())).await.unwrap();
    for round in 0..3 {
        let throw_away = tempfile::tempdir().unwrap();
        let (alice, _events) =
            Client::connect(options(&cluster, "alice", "send", throw_away.path())).await.unwrap();
        assert_eq!(alice.send("bob", format!("message {}", round + 1)).await.unwrap().seq, round + 1);
        alice.close().await;
    }
    assert_eq!(texts(&receive(&mut bob_events, 3).await), numbered(3));
    assert_eq!(texts(&receive(&mut listening, 3).await), numbered(3), "the other program heard all of it");
}

/// A state server that dies closes no connection; what is sent meanwhile is answered when it is back.
async fn a_dead_state_server_closes_no_connection(embedded: bool) {
    let mut cluster = cluster(embedded);
    let folder = tempfile::tempdir().unwrap();
    let (alice, mut events) =
        Client::connect(options(&cluster, "alice", "phone", folder.path())).await.unwrap();
    alice.send("bob", "before").await.unwrap();
    cluster.states[0].process.kill().unwrap();
    let meanwhile = alice.enqueue("bob", "meanwhile").await.unwrap();
    cluster.states[0].process.spawn_again().unwrap();
    let sent = tokio::time::timeout(PATIENCE, meanwhile).await.unwrap().unwrap();
    assert_eq!(sent.seq, 2);
    while let Ok(Some(event)) = tokio::time::timeout(Duration::ZERO, events.next()).await {
        assert!(!matches!(event, Event::Disconnected { .. }), "{event:?}");
    }
}

/// A device that logs in again ends its older connection, with the reason.
async fn the_newer_login_of_a_device_replaces_the_older(embedded: bool) {
    let cluster = cluster(embedded);
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (_old, mut old_events) =
        Client::connect(options(&cluster, "alice", "phone", one.path())).await.unwrap();
    let (new, _new_events) = Client::connect(options(&cluster, "alice", "phone", two.path())).await.unwrap();
    let ended = async {
        loop {
            if let Some(Event::Ended(ended)) = old_events.next().await {
                return ended;
            }
        }
    };
    let ended = tokio::time::timeout(PATIENCE, ended).await.unwrap();
    let client::Ended::Kicked { code, .. } = ended else { panic!("{ended:?}") };
    assert_eq!(code, proto::wire::Code::Replaced);
    new.send("bob", "still here").await.unwrap();
}

/// A user may name as many devices as programs run; only so many are logged in at a time.
async fn devices_come_and_go(embedded: bool) {
    let cluster = Cluster::start(ClusterOptions {
        embedded,
        state_sets: vec!["limits.devices_max=3".into()],
        ..ClusterOptions::default()
    })
    .unwrap();
    let device = |name: String| Options {
        keep: Keep::Memory,
        ..Options::new("alice", name, Target::Gateway(vec![cluster.gateways[0].client.to_string()]))
    };
    for n in 1..=70 {
        let (alice, _events) = Client::connect(device(format!("send-{n}"))).await.unwrap();
        assert_eq!(alice.send("bob", "from a script").await.unwrap().seq, n);
        alice.close().await;
    }
    let (_first, mut first_events) = Client::connect(device("first".into())).await.unwrap();
    let mut others = Vec::new();
    for n in 0..3 {
        others.push(Client::connect(device(format!("other-{n}"))).await.unwrap());
    }
    let ended = async {
        loop {
            if let Some(Event::Ended(client::Ended::Kicked { code, .. })) = first_events.next().await {
                return code;
            }
        }
    };
    let code = tokio::time::timeout(PATIENCE, ended).await.unwrap();
    assert_eq!(code, proto::wire::Code::TooManyDevices, "the oldest login makes room");
    others[0].0.send("bob", "still here").await.unwrap();
}

loadtest::on_both! {
    two_people_chat
    who_was_away_gets_everything_in_order_once
    kills_during_sending_lose_and_double_nothing
    a_lost_state_folder_swallows_nothing_and_nobody_is_kicked
    a_dead_state_server_closes_no_connection
    the_newer_login_of_a_device_replaces_the_older
    devices_come_and_go
}
