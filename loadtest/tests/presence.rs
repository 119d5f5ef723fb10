//! Who is there and who is writing, through real processes and the real client library.
//!
//! Trap: presence is a hint and may be told twice, so tests wait for what they want and never count.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use client::{Client, Event, Events, Keep, Options, Settings, Target, change};
use loadtest::supervisor::{Cluster, ClusterOptions};
use loadtest::torture::tool::process::metric;
use proto::wire::{GroupAction, Role};

/// Longest that anything here may take before it counts as broken.
const PATIENCE: Duration = Duration::from_secs(60);

struct Device {
    label: String,
    client: Client,
    events: Events,
    /// As it was told last of each: online, and whether a time was named.
    there: HashMap<String, (bool, bool)>,
}

impl Device {
    async fn login(cluster: &Cluster, gateway: usize, folder: &Path, user: &str, device: &str) -> Device {
        let target = Target::Gateway(vec![cluster.gateways[gateway].client.to_string()]);
        let options = Options { keep: Keep::Under(folder.to_owned()), ..Options::new(user, device, target) };
        let (client, mut events) = Client::connect(options).await.unwrap();
        // Behind it the server is known to take all this.
        while !matches!(events.next().await.unwrap(), Event::Synced) {}
        Device { label: format!("{user}/{device}"), client, events, there: HashMap::new() }
    }

    /// The first event of which that is true.
    async fn until(&mut self, what: &str, good: impl Fn(&Event) -> bool) -> Event {
        let next = async {
            loop {
                let event = self.events.next().await.expect("the session goes on");
                self.events.confirm_event(&event);
                if let Event::Presence { user, online, last_seen_s } = &event {
                    self.there.insert(user.clone(), (*online, *last_seen_s > 0));
                }
                if good(&event) {
                    return event;
                }
            }
        };
        let found = tokio::time::timeout(PATIENCE, next).await;
        found.unwrap_or_else(|_| panic!("{} is not told: {what}", self.label))
    }

    async fn is_told(&mut self, who: &str, wanted: bool, seen: bool) {
        while self.there.get(who) != Some(&(wanted, seen)) {
            let what = format!("{who} online: {wanted}, seen: {seen}");
            self.until(&what, |event| matches!(event, Event::Presence { .. })).await;
        }
    }

    /// The next note of writing, or message.
    async fn hears(&mut self) -> Heard {
        let is_it = |event: &Event| matches!(event, Event::Typing { .. } | Event::Message(_));
        match self.until("a note or a message", is_it).await {
            Event::Typing { chat, user, stopped } => Heard::Typing(chat.to_string(), user, stopped),
            Event::Message(message) => Heard::Message(message.chat.to_string(), message.seq),
            other => panic!("{other:?}"),
        }
    }
}

#[derive(Debug, PartialEq)]
enum Heard {
    Typing(String, String, bool),
    Message(String, u64),
}

fn typing(chat: &str, user: &str, stopped: bool) -> Heard {
    Heard::Typing(chat.to_owned(), user.to_owned(), stopped)
}

async fn coming_and_going_is_told(embedded: bool) {
    let state_sets = vec!["limits.presence_renew_ms=1000".into()];
    let options = ClusterOptions { embedded, state_sets, ..ClusterOptions::default() };
    let mut cluster = Cluster::start(options).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut alice = Device::login(&cluster, 0, folder.path(), "alice", "phone").await;
    alice.client.watch(["bob", "carol"]).unwrap();
    alice.is_told("bob", false, false).await;
    alice.is_told("carol", false, false).await;
    // Nobody has ever heard of him.
    let bob = Device::login(&cluster, 0, folder.path(), "bob", "phone").await;
    alice.is_told("bob", true, false).await;
    bob.client.close().await;
    alice.is_told("bob", false, true).await;
    let bob = Device::login(&cluster, 0, folder.path(), "bob", "phone").await;
    alice.is_told("bob", true, false).await;

    // He does not want to be seen, on any device.
    assert_eq!(bob.client.settings().await.unwrap(), Settings::default());
    let hidden = Settings { hide_presence: true, hide_typing: false };
    assert_eq!(bob.client.change_settings(hidden).await.unwrap(), hidden);
    alice.is_told("bob", false, false).await;
    let tablet = Device::login(&cluster, 0, folder.path(), "bob", "tablet").await;
    assert_eq!(tablet.client.settings().await.unwrap(), hidden);
    tablet.client.change_settings(Settings::default()).await.unwrap();
    alice.is_told("bob", true, false).await;

    // A state server that has forgotten who watches whom is told again.
    cluster.states[0].process.kill().unwrap();
    cluster.states[0].process.restart().unwrap();
    let carol = Device::login(&cluster, 0, folder.path(), "carol", "phone").await;
    alice.is_told("carol", true, false).await;
    alice.client.watch(["bob"]).unwrap();
    carol.client.close().await;
    bob.client.close().await;
    tablet.client.close().await;
    let told = alice.until("a change", |event| matches!(event, Event::Presence { .. })).await;
    assert!(
        matches!(told, Event::Presence { user, online: false, .. } if user == "bob"),
        "carol is not watched any more"
    );
}

async fn whoever_writes_is_told_of_and_strangers_are_not_heard(embedded: bool) {
    let cluster = Cluster::start(ClusterOptions { embedded, ..ClusterOptions::default() }).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let login =
        async |user: &str, device: &str| Device::login(&cluster, 0, folder.path(), user, device).await;
    let (mut alice, mut bob, mut desk) =
        (login("alice", "phone").await, login("bob", "phone").await, login("bob", "desk").await);
    let mut carol = login("carol", "phone").await;

    carol.client.typing("alice:bob", false).unwrap();
    bob.client.typing("alice", false).unwrap();
    assert_eq!(
        alice.hears().await,
        typing("alice:bob", "bob", false),
        "and nothing of carol, whose chat it is not"
    );
    bob.client.typing("alice", true).unwrap();
    assert_eq!(alice.hears().await, typing("alice:bob", "bob", true));
    bob.client.send("alice", "hello").await.unwrap();
    assert_eq!(alice.hears().await, Heard::Message("alice:bob".into(), 1));
    assert_eq!(desk.hears().await, Heard::Message("alice:bob".into(), 1), "one's own writing is no news");

    // Hidden, until it is not.
    bob.client.change_settings(Settings { hide_presence: false, hide_typing: true }).await.unwrap();
    bob.client.typing("alice", false).unwrap();
    // Whether he hides is looked up behind the turn, and he must not have changed his mind by then.
    let hidden = || metric(cluster.states[0].admin, "rookery_state_typing_notes_hidden_total").unwrap();
    let until = Instant::now() + PATIENCE;
    while hidden() < 1.0 {
        assert!(Instant::now() < until, "a hidden note is counted");
        tokio::time::sleep(Duration::from_millis(20)).await; // the pace of asking
    }
    bob.client.change_settings(Settings::default()).await.unwrap();
    bob.client.typing("alice", true).unwrap();
    assert_eq!(alice.hears().await, typing("alice:bob", "bob", true));

    // In a group: its members, as it is now.
    let members = [("bob", Role::Member), ("carol", Role::Member)];
    let chat = alice.client.create_group("three", &members).await.unwrap().chat;
    assert_eq!(
        (bob.hears().await, carol.hears().await),
        (Heard::Message("alice:bob".into(), 1), Heard::Message(chat.to_string(), 1))
    );
    assert_eq!(bob.hears().await, Heard::Message(chat.to_string(), 1));
    alice.client.typing(&chat, false).unwrap();
    assert_eq!(
        (bob.hears().await, carol.hears().await),
        (typing(&chat, "alice", false), typing(&chat, "alice", false))
    );
    let out = change(GroupAction::GroupRemove, "", &[("carol", Role::Member)]);
    alice.client.change_group(&chat, &out).await.unwrap();
    assert_eq!(
        (bob.hears().await, carol.hears().await),
        (Heard::Message(chat.to_string(), 2), Heard::Message(chat.to_string(), 2))
    );
    carol.client.typing(&chat, false).unwrap();
    alice.client.typing(&chat, true).unwrap();
    assert_eq!(bob.hears().await, typing(&chat, "alice", true), "and nothing of carol");
    alice.client.send("carol", "sorry").await.unwrap();
    assert_eq!(
        carol.hears().await,
        Heard::Message("alice:carol".into(), 1),
        "and nothing of what bob has heard"
    );
}

/// A server that is told to keep it to itself.
async fn without_presence_nobody_is_told(embedded: bool) {
    let state_sets = vec!["limits.presence=false".into()];
    let cluster =
        Cluster::start(ClusterOptions { embedded, state_sets, ..ClusterOptions::default() }).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut alice = Device::login(&cluster, 0, folder.path(), "alice", "phone").await;
    let bob = Device::login(&cluster, 0, folder.path(), "bob", "phone").await;
    alice.client.watch(["bob"]).unwrap();
    bob.client.typing("alice", false).unwrap();
    bob.client.send("alice", "hello").await.unwrap();
    let told = alice
        .until("a message", |e| {
            matches!(e, Event::Presence { .. } | Event::Typing { .. } | Event::Message(_))
        })
        .await;
    assert!(matches!(told, Event::Message(_)), "{told:?}");
}

/// Through other gateways and state servers; and a gateway that dies takes its users with it.
#[tokio::test]
async fn whoever_is_elsewhere_is_told_of_too() {
    let mut cluster =
        Cluster::start(ClusterOptions { gateways: 2, states: 2, ..ClusterOptions::default() }).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let names: Vec<String> = (0..8).map(|n| format!("friend-{n}")).collect();
    let mut watchers = Vec::new();
    for n in 0..4 {
        let watcher = Device::login(&cluster, 0, folder.path(), &format!("watcher-{n}"), "phone").await;
        watcher.client.watch(names.iter().map(String::as_str)).unwrap();
        watchers.push(watcher);
    }
    for watcher in &mut watchers {
        watcher.is_told("friend-7", false, false).await;
    }
    let mut friends = Vec::new();
    for name in &names {
        friends.push(Device::login(&cluster, 1, folder.path(), name, "phone").await);
    }
    for watcher in &mut watchers {
        for name in &names {
            watcher.is_told(name, true, false).await;
        }
    }
    for friend in friends.drain(..) {
        friend.client.close().await;
    }
    for watcher in &mut watchers {
        for name in &names {
            watcher.is_told(name, false, true).await;
        }
    }
    for name in &names {
        friends.push(Device::login(&cluster, 1, folder.path(), name, "phone").await);
    }
    for watcher in &mut watchers {
        for name in &names {
            watcher.is_told(name, true, false).await;
        }
    }
    cluster.gateways[1].process.kill().unwrap();
    for watcher in &mut watchers {
        for name in &names {
            watcher.is_told(name, false, false).await;
        }
    }
}

loadtest::on_both! {
    coming_and_going_is_told
    whoever_writes_is_told_of_and_strangers_are_not_heard
    without_presence_nobody_is_told
}
