//! Sent, delivered, read: two users with two devices each through real processes and the real client library.
//!
//! Trap: receipts are merged and may come again, so tests wait for the one that says enough and never count them.

use std::path::Path;
use std::time::Duration;

use client::{Client, Event, Events, Keep, Options, Target};
use loadtest::supervisor::{Cluster, ClusterOptions};

/// Longest that anything here may take before it counts as broken.
const PATIENCE: Duration = Duration::from_secs(60);
const CHAT: &str = "alice:bob";

fn cluster(embedded: bool) -> Cluster {
    Cluster::start(ClusterOptions { embedded, ..ClusterOptions::default() }).unwrap()
}

/// A device whose application confirms whatever it is shown.
struct Device {
    label: String,
    client: Client,
    events: Events,
    shown: u64,
    history: u64,
}

impl Device {
    async fn login(cluster: &Cluster, folder: &Path, user: &str, device: &str) -> Device {
        let target = Target::Gateway(vec![cluster.gateways[0].client.to_string()]);
        let options = Options { keep: Keep::Under(folder.to_owned()), ..Options::new(user, device, target) };
        let (client, events) = Client::connect(options).await.unwrap();
        Device { label: format!("{user}/{device}"), client, events, shown: 0, history: 0 }
    }

    /// The first event of which that is true.
    async fn until(&mut self, what: &str, good: impl Fn(&Event) -> bool) -> Event {
        let next = async {
            loop {
                let event = self.events.next().await.expect("the session goes on");
                self.events.confirm_event(&event);
                if let Event::Message(message) = &event {
                    (self.shown, self.history) = (message.seq, message.history);
                }
                if good(&event) {
                    return event;
                }
            }
        };
        let found = tokio::time::timeout(PATIENCE, next).await;
        found.unwrap_or_else(|_| panic!("{} is not told: {what}", self.label))
    }

    fn read(&self, seq: u64) {
        self.client.read(CHAT, self.history, seq).unwrap();
    }

    async fn shows(&mut self, wanted: u64) {
        if self.shown < wanted {
            self.until("a message", |e| matches!(e, Event::Message(m) if m.seq == wanted)).await;
        }
    }

    async fn delivered(&mut self, to: &str, wanted: u64) {
        self.until(&format!("{wanted} delivered to {to}"), |event| {
            matches!(event, Event::Delivered { chat, user, seq, .. } if (&**chat, &**user, *seq) == (CHAT, to, wanted))
        })
        .await;
    }

    async fn read_by(&mut self, who: &str, wanted: u64) {
        self.until(&format!("{wanted} read by {who}"), |event| {
            matches!(event, Event::Read { chat, user, seq, .. } if (&**chat, &**user, *seq) == (CHAT, who, wanted))
        })
        .await;
    }

    async fn unread(&mut self, wanted: (u64, u64)) {
        self.until(&format!("{wanted:?} read and unread"), |event| {
            matches!(event, Event::Unread { chat, read, unread, .. } if &**chat == CHAT && (*read, *unread) == wanted)
        })
        .await;
    }
}

async fn send(device: &Device, to: &str, count: usize) {
    for _ in 0..count {
        let sent = tokio::time::timeout(PATIENCE, device.client.send(to, "hello")).await;
        sent.expect("an answer comes").unwrap();
    }
}

/// All devices of both are told, and what is away is told when it comes back.
async fn delivered_and_read_reach_every_device(embedded: bool) {
    let cluster = cluster(embedded);
    let folder = tempfile::tempdir().unwrap();
    let login = async |user: &str, device: &str| Device::login(&cluster, folder.path(), user, device).await;
    let (mut phone, mut desk) = (login("alice", "phone").await, login("alice", "desk").await);
    let (mut bob, mut tablet) = (login("bob", "phone").await, login("bob", "tablet").await);

    send(&phone, "bob", 3).await;
    bob.shows(3).await;
    tablet.shows(3).await;
    desk.shows(3).await;
    for device in [&mut phone, &mut desk] {
        device.delivered("bob", 3).await;
    }
    bob.read(2);
    for device in [&mut phone, &mut desk, &mut bob, &mut tablet] {
        device.read_by("bob", 2).await;
    }
    // No further than what there is.
    tablet.read(99);
    for device in [&mut phone, &mut desk, &mut bob, &mut tablet] {
        device.read_by("bob", 3).await;
    }

    // Bob is away for a while.
    bob.client.close().await;
    tablet.client.close().await;
    send(&phone, "bob", 5).await;
    desk.shows(8).await;
    let mut bob = login("bob", "phone").await;
    bob.unread((3, 5)).await;
    bob.shows(8).await;
    phone.delivered("bob", 8).await;
    desk.delivered("bob", 8).await;

    // Alice's desk is away while he reads: no message is news there, and yet it is told.
    desk.client.close().await;
    bob.read(8);
    bob.read_by("bob", 8).await;
    phone.read_by("bob", 8).await;
    let mut desk = login("alice", "desk").await;
    desk.read_by("bob", 8).await;
    // And his other device that nothing is unread.
    login("bob", "tablet").await.unread((8, 0)).await;
}

/// What is read while no state server runs is told when one does; and what is stored is there.
async fn what_is_read_survives_a_dead_state_server(embedded: bool) {
    let mut cluster = cluster(embedded);
    let folder = tempfile::tempdir().unwrap();
    let mut alice = Device::login(&cluster, folder.path(), "alice", "phone").await;
    let mut bob = Device::login(&cluster, folder.path(), "bob", "phone").await;
    send(&alice, "bob", 4).await;
    bob.shows(4).await;
    bob.read(1);
    bob.read_by("bob", 1).await;
    alice.read_by("bob", 1).await;
    for seq in [2, 3] {
        cluster.states[0].process.kill().unwrap();
        bob.read(seq);
        cluster.states[0].process.restart().unwrap();
        bob.read_by("bob", seq).await;
        alice.read_by("bob", seq).await;
    }
    bob.read(4);
    bob.read_by("bob", 4).await;
    cluster.states[0].process.kill().unwrap();
    cluster.states[0].process.restart().unwrap();
    let mut tablet = Device::login(&cluster, folder.path(), "bob", "tablet").await;
    tablet.unread((4, 0)).await;
    let mut desk = Device::login(&cluster, folder.path(), "alice", "desk").await;
    desk.read_by("bob", 4).await;
}

/// A server that is told to keep receipts to itself.
async fn without_receipts_nobody_is_told(embedded: bool) {
    let state_sets = vec!["limits.receipts=false".into()];
    let cluster =
        Cluster::start(ClusterOptions { embedded, state_sets, ..ClusterOptions::default() }).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut alice = Device::login(&cluster, folder.path(), "alice", "phone").await;
    let mut bob = Device::login(&cluster, folder.path(), "bob", "phone").await;
    send(&alice, "bob", 1).await;
    bob.shows(1).await;
    bob.read(1);
    // The connection is as good as before, and a new device learns nothing either.
    send(&bob, "alice", 1).await;
    let is_receipt =
        |e: &Event| matches!(e, Event::Delivered { .. } | Event::Read { .. } | Event::Unread { .. });
    let mut desk = Device::login(&cluster, folder.path(), "alice", "desk").await;
    let told = desk.until("synced", |event| *event == Event::Synced || is_receipt(event)).await;
    assert_eq!(told, Event::Synced);
    let told =
        alice.until("bob's message", |e| is_receipt(e) || matches!(e, Event::Message(m) if m.seq == 2)).await;
    assert!(matches!(told, Event::Message(_)), "{told:?}");
}

loadtest::on_both! {
    delivered_and_read_reach_every_device
    what_is_read_survives_a_dead_state_server
    without_receipts_nobody_is_told
}
