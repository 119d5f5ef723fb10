//! Looking back and hiding: pages of a chat that no device holds any more, and messages that their user does not want to see.
//! Through real processes and the real client library, on both stores.
//!
//! Trap: chats are pulled side by side, so a message may come before the one that hides it. Tests look at what is handed out
//! anew, which is after that.

use std::path::Path;
use std::time::Duration;

use client::{
    AskError, Body, Client, Content, Event, Events, Keep, Message, Options, Page, SendError, Target,
};
use loadtest::supervisor::{Cluster, ClusterOptions};
use proto::wire::Code;

/// Longest that anything here may take before it counts as broken.
const PATIENCE: Duration = Duration::from_secs(60);
const CHAT: &str = "alice:bob";

struct Device {
    client: Client,
    events: Events,
}

impl Device {
    async fn login(cluster: &Cluster, folder: &Path, user: &str, device: &str) -> Device {
        let target = Target::Gateway(vec![cluster.gateways[0].client.to_string()]);
        let options = Options { keep: Keep::Under(folder.to_owned()), ..Options::new(user, device, target) };
        let login = tokio::time::timeout(PATIENCE, Client::connect(options));
        let (client, events) = login.await.expect("a login in time").unwrap();
        Device { client, events }
    }

    /// The next event of which that is true, not confirmed.
    async fn until(&mut self, good: impl Fn(&Event) -> bool) -> Event {
        let next = async {
            loop {
                let event = self.events.next().await.expect("the session goes on");
                if good(&event) {
                    return event;
                }
            }
        };
        tokio::time::timeout(PATIENCE, next).await.expect("it is told")
    }

    async fn message(&mut self, of: &str, seq: u64) -> Message {
        let good = |event: &Event| matches!(event, Event::Message(m) if (&*m.chat, m.seq) == (of, seq));
        match self.until(good).await {
            Event::Message(message) => message,
            other => panic!("{other:?}"),
        }
    }

    async fn page(&self, chat: &str, cursor: u64, limit: u32, reverse: bool) -> Page {
        let page = tokio::time::timeout(PATIENCE, self.client.pull(chat, cursor, limit, reverse));
        page.await.expect("an answer in time").unwrap()
    }

    async fn refused(&self, chat: &str, limit: u32) -> Code {
        let page = tokio::time::timeout(PATIENCE, self.client.pull(chat, 0, limit, false));
        match page.await.expect("an answer in time") {
            Err(AskError::Refused { code, .. }) => code,
            other => panic!("{other:?}"),
        }
    }

    async fn send(&self, to: &str, body: impl Into<Body>) {
        let sent = tokio::time::timeout(PATIENCE, self.client.send(to, body));
        sent.await.expect("an answer in time").expect("it is accepted");
    }
}

fn seqs(page: &Page) -> Vec<u64> {
    page.messages.iter().map(|message| message.seq).collect()
}

/// A new device looks back to the beginning, and its own place in the chat is where it was.
async fn a_new_device_looks_back(embedded: bool) {
    let mut cluster = Cluster::start(ClusterOptions { embedded, ..ClusterOptions::default() }).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().to_owned();
    let alice = Device::login(&cluster, &root, "alice", "phone").await;
    let mut bob = Device::login(&cluster, &root, "bob", "phone").await;
    for n in 1..=120 {
        alice.send("bob", format!("message {n}")).await;
    }
    let last = bob.message(CHAT, 120).await;
    bob.events.confirm(&last);
    bob.client.close().await;

    let mut tablet = Device::login(&cluster, &root, "bob", "tablet").await;
    tablet.until(|event| *event == Event::Synced).await;
    let mut cursor = 0;
    let mut found = Vec::new();
    for wanted in [Some(71), Some(21), None] {
        let page = tablet.page("alice", cursor, 50, true).await;
        assert_eq!((page.next, page.head, page.first, &*page.chat), (wanted, 120, 1, CHAT));
        assert!(page.messages.iter().all(|message| message.history == page.history));
        found.extend(seqs(&page));
        cursor = page.next.unwrap_or(0);
    }
    assert_eq!(found, (1..=120).rev().collect::<Vec<_>>());
    let page = tablet.page(CHAT, 115, 0, false).await;
    assert_eq!((seqs(&page), page.next), ((116..=120).collect(), None));
    assert_eq!(page.messages[4].body, "message 120");

    // What is not to be had.
    assert_eq!(tablet.refused("alice:carol", 5).await, Code::NotAMember);
    assert_eq!(tablet.refused("#17", 5).await, Code::NotAMember);
    assert_eq!(tablet.refused(CHAT, 101).await, Code::BadRequest);
    assert!(matches!(tablet.client.pull("", 0, 5, false).await, Err(AskError::Name(_))));

    // Asked while no state server runs it is answered once one does, and nothing was moved by all that.
    cluster.states[0].process.kill().unwrap();
    let (page, ()) = tokio::join!(tablet.page("alice", 0, 2, true), async {
        cluster.states[0].process.restart().unwrap();
    });
    assert_eq!(seqs(&page), [120, 119]);
    alice.send("bob", "one more").await;
    let message = tablet.until(|event| matches!(event, Event::Message(_) | Event::Gap { .. })).await;
    assert!(matches!(&message, Event::Message(message) if message.seq == 121), "{message:?}");
}

/// What a user hides is gone on all devices of theirs, and on nobody else's.
async fn what_is_hidden_is_hidden_on_every_device(embedded: bool) {
    let cluster = Cluster::start(ClusterOptions { embedded, ..ClusterOptions::default() }).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().to_owned();
    let mut phone = Device::login(&cluster, &root, "alice", "phone").await;
    let mut desk = Device::login(&cluster, &root, "alice", "desk").await;
    let bob = Device::login(&cluster, &root, "bob", "phone").await;
    for text in ["one", "two", "three"] {
        bob.send("alice", text).await;
    }
    let three = phone.message(CHAT, 3).await;
    desk.message(CHAT, 3).await;

    let hidden =
        tokio::time::timeout(PATIENCE, phone.client.hide("bob", three.history, 2)).await.expect("an answer");
    assert_eq!(&*hidden.unwrap().chat, "alice:alice");
    let wanted = Content::Hide { chat: CHAT.to_owned(), history: three.history, seq: 2 };
    for device in [&mut phone, &mut desk] {
        let told = device.message("alice:alice", 1).await;
        assert_eq!(told.body.content(), wanted);
        assert_eq!(seqs(&device.page("bob", 0, 9, false).await), [1, 3]);
    }
    let page = bob.page("alice", 0, 9, false).await;
    assert_eq!(seqs(&page), [1, 2, 3], "nobody else's business");

    // The desk has confirmed nothing, so that all comes again after a restart: with a gap where it was, also for a look.
    desk.client.close().await;
    let mut desk = Device::login(&cluster, &root, "alice", "desk").await;
    let mut again = Vec::new();
    while again.len() < 3 {
        let of_bob = |event: &Event| match event {
            Event::Message(message) => &*message.chat == CHAT,
            event => matches!(event, Event::Hidden { .. } | Event::Gap { .. }),
        };
        let event = desk.until(of_bob).await;
        desk.events.confirm_event(&event);
        again.push(match event {
            Event::Message(message) => (message.seq, false),
            Event::Hidden { chat, history, seq } if *chat == *CHAT && history == three.history => (seq, true),
            other => panic!("{other:?}"),
        });
    }
    assert_eq!(again, [(1, false), (2, true), (3, false)]);
    assert_eq!(seqs(&desk.page("bob", 0, 9, true).await), [3, 1]);

    // Nowhere else, and nothing that makes no sense.
    for (to, body) in [
        ("bob", Body::hide(CHAT, three.history, 2)),
        ("alice", Body::hide("bob:carol", three.history, 2)),
        ("alice", Body::hide(CHAT, three.history, 0)),
    ] {
        let answer = tokio::time::timeout(PATIENCE, phone.client.send(to, body)).await.expect("an answer");
        assert!(matches!(answer, Err(SendError::Refused { code: Code::BadChange, .. })), "{answer:?}");
    }
    for (history, seq) in [(three.history, 4), (three.history + 1, 2)] {
        let hiding = phone.client.hide("bob", history, seq);
        let never = tokio::time::timeout(PATIENCE, hiding).await.expect("an answer");
        assert!(matches!(never, Err(SendError::Refused { .. })), "{never:?}");
    }
}

loadtest::on_both! {
    a_new_device_looks_back
    what_is_hidden_is_hidden_on_every_device
}
