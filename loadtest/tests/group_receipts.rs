//! Sent, delivered, read in groups: through real processes and the real client library, on both stores.
//!
//! Trap: that somebody is not told is shown by what they are told behind it (a message that was sent once all others had been
//! told), never by waiting.

use std::path::Path;
use std::time::Duration;

use client::{Body, Client, Event, Events, Group, Keep, Options, Reached, Target, change};
use loadtest::supervisor::{Cluster, ClusterOptions};
use proto::wire::{GroupAction, Role};

/// Longest that anything here may take before it counts as broken.
const PATIENCE: Duration = Duration::from_secs(60);

/// A device whose application confirms whatever it is shown, and remembers it.
struct Device {
    label: String,
    client: Client,
    events: Events,
    seen: Vec<Event>,
}

impl Device {
    async fn login(cluster: &Cluster, folder: &Path, user: &str, device: &str) -> Device {
        let target = Target::Gateway(cluster.gateways.iter().map(|g| g.client.to_string()).collect());
        let options = Options { keep: Keep::Under(folder.to_owned()), ..Options::new(user, device, target) };
        let login = tokio::time::timeout(PATIENCE, Client::connect(options));
        let (client, events) = login.await.expect("a login in time").unwrap();
        Device { label: format!("{user}/{device}"), client, events, seen: Vec::new() }
    }

    /// Until an event has come of which that is true.
    async fn until(&mut self, what: &str, good: impl Fn(&Event) -> bool) {
        let next = async {
            while !self.seen.iter().any(&good) {
                let event = self.events.next().await.expect("the session goes on");
                self.events.confirm_event(&event);
                self.seen.push(event);
            }
        };
        let found = tokio::time::timeout(PATIENCE, next).await;
        found.unwrap_or_else(|_| panic!("{} is not told: {what}", self.label));
    }

    async fn shows(&mut self, of: &str, wanted: u64) {
        let good = |event: &Event| matches!(event, Event::Message(m) if (&*m.chat, m.seq) == (of, wanted));
        self.until(&format!("{of} {wanted}"), good).await;
    }

    async fn delivered(&mut self, of: &str, to: &str, wanted: u64) {
        let good = |event: &Event| matches!(event, Event::Delivered { chat, user, seq, .. } if (&**chat, &**user, *seq) == (of, to, wanted));
        self.until(&format!("{wanted} delivered to {to}"), good).await;
    }

    async fn read_by(&mut self, of: &str, who: &str, wanted: u64) {
        let good = |event: &Event| matches!(event, Event::Read { chat, user, seq, .. } if (&**chat, &**user, *seq) == (of, who, wanted));
        self.until(&format!("{wanted} read by {who}"), good).await;
    }

    async fn send(&self, to: &str, body: impl Into<Body>) -> u64 {
        let sent = tokio::time::timeout(PATIENCE, self.client.send(to, body)).await;
        sent.expect("an answer comes").unwrap().seq
    }

    async fn group(&self, chat: &str) -> Group {
        tokio::time::timeout(PATIENCE, self.client.group(chat)).await.expect("an answer comes").unwrap()
    }

    /// All up to there of a chat of which something was shown.
    fn read(&self, of: &str, seq: u64) {
        let history = self.seen.iter().find_map(|event| match event {
            Event::Message(message) if &*message.chat == of => Some(message.history),
            _ => None,
        });
        self.client.read(of, history.unwrap(), seq).unwrap();
    }

    /// (user, seq) of the receipts of a chat, delivered and read alike.
    fn receipts(&self, of: &str) -> Vec<(String, u64)> {
        let receipt = |event: &Event| match event {
            Event::Delivered { chat, user, seq, .. } | Event::Read { chat, user, seq, .. }
                if &**chat == of =>
            {
                Some((user.clone(), *seq))
            }
            _ => None,
        };
        self.seen.iter().filter_map(receipt).collect()
    }
}

fn reached(of: usize, delivered: usize, read: usize) -> Reached {
    Reached { of, delivered, read }
}

/// On Redis with two state servers and gateways.
fn options(embedded: bool) -> ClusterOptions {
    let servers = if embedded { 1 } else { 2 };
    ClusterOptions { embedded, states: servers, gateways: servers, ..ClusterOptions::default() }
}

async fn members_hear_of_each_other(embedded: bool) {
    let cluster = Cluster::start(options(embedded)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let login = async |user: &str, device: &str| Device::login(&cluster, folder.path(), user, device).await;
    let (mut phone, mut desk) = (login("ann", "phone").await, login("ann", "desk").await);
    let (mut bob, mut carol) = (login("bob", "phone").await, login("carol", "phone").await);
    let members = [("bob", Role::Member), ("carol", Role::Member), ("dave", Role::Member)];
    let chat = phone.client.create_group("Rooks", &members).await.unwrap().chat.to_string();

    // All devices of all others are told.
    assert_eq!(phone.send(&chat, "hello").await, 2);
    bob.shows(&chat, 2).await;
    carol.shows(&chat, 2).await;
    for device in [&mut phone, &mut desk] {
        device.delivered(&chat, "bob", 2).await;
        device.delivered(&chat, "carol", 2).await;
    }
    bob.read(&chat, 2);
    for device in [&mut phone, &mut desk, &mut bob, &mut carol] {
        device.read_by(&chat, "bob", 2).await;
    }
    let group = desk.group(&chat).await;
    assert_eq!((group.reached("ann", 2), group.reached("ann", 1)), (reached(3, 2, 1), reached(3, 2, 1)));
    assert!(group.history > 0);

    // Carol is taken out. Her device acknowledges that as the last thing that it sees.
    let out = phone
        .send(&chat, Body::group(&change(GroupAction::GroupRemove, "", &[("carol", Role::Member)])))
        .await;
    carol.shows(&chat, out).await;
    let last = phone.send(&chat, "without her").await;
    bob.shows(&chat, last).await;
    phone.delivered(&chat, "bob", last).await;
    bob.read(&chat, last);
    phone.read_by(&chat, "bob", last).await;
    // A new one hears of the others, and is not counted for what was before.
    let mut eve = login("eve", "phone").await;
    let joined =
        phone.send(&chat, Body::group(&change(GroupAction::GroupAdd, "", &[("eve", Role::Member)]))).await;
    eve.shows(&chat, joined).await;
    bob.shows(&chat, joined).await;
    phone.delivered(&chat, "eve", joined).await;
    eve.delivered(&chat, "bob", joined).await;
    let group = eve.group(&chat).await;
    assert_eq!(
        (group.reached("ann", last), group.reached("ann", joined)),
        (reached(2, 1, 1), reached(3, 2, 0))
    );

    // Neither is Carol told of anything since, nor is anybody told of her.
    let behind = bob.send("carol", "behind it").await;
    carol.shows("bob:carol", behind).await;
    carol.read(&chat, out);
    carol.read_by(&chat, "carol", out).await;
    phone.send("carol", "and behind that").await;
    carol.shows("ann:carol", 1).await;
    phone.delivered("ann:carol", "carol", 1).await;
    let told: Vec<_> = carol.receipts(&chat).into_iter().filter(|(user, _)| user != "carol").collect();
    assert!(told.iter().all(|(_, seq)| *seq <= out), "{told:?}");
    let told: Vec<_> = phone.receipts(&chat).into_iter().filter(|(user, _)| user == "carol").collect();
    assert!(told.iter().all(|(_, seq)| *seq < out), "{told:?}");

    // What happened while a device was away the group says.
    desk.client.close().await;
    eve.read(&chat, joined);
    phone.read_by(&chat, "eve", joined).await;
    let desk = login("ann", "desk").await;
    assert_eq!(desk.group(&chat).await.reached("ann", joined), reached(3, 2, 1));
}

/// A group that is larger than that: who wants to know asks.
async fn members_of_large_groups_ask(embedded: bool) {
    let state_sets = vec!["limits.receipt_members_max=2".into()];
    let cluster = Cluster::start(ClusterOptions { state_sets, ..options(embedded) }).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let login = async |user: &str, device: &str| Device::login(&cluster, folder.path(), user, device).await;
    let (mut ann, mut bob) = (login("ann", "phone").await, login("bob", "phone").await);
    let mut tablet = login("bob", "tablet").await;
    let members = [("bob", Role::Member), ("carol", Role::Member)];
    let chat = ann.client.create_group("Rooks", &members).await.unwrap().chat.to_string();
    let seq = ann.send(&chat, "hello").await;
    bob.shows(&chat, seq).await;
    bob.read(&chat, seq);
    // His own devices are told, and then it is stored.
    bob.read_by(&chat, "bob", seq).await;
    tablet.read_by(&chat, "bob", seq).await;
    assert_eq!(ann.group(&chat).await.reached("ann", seq), reached(2, 1, 1));
    let behind = bob.send("ann", "behind it").await;
    ann.shows("ann:bob", behind).await;
    assert_eq!(ann.receipts(&chat), []);
    // With one member less it is small enough.
    let left =
        ann.send(&chat, Body::group(&change(GroupAction::GroupRemove, "", &[("carol", Role::Member)]))).await;
    bob.shows(&chat, left).await;
    ann.delivered(&chat, "bob", left).await;
    // What is unread is counted in groups, too.
    let mut desk = login("bob", "desk").await;
    let good = |event: &Event| matches!(event, Event::Unread { chat: of, read, unread, .. } if **of == *chat && (*read, *unread) == (seq, 1));
    desk.until("what is unread", good).await;
}

loadtest::on_both! {
    members_hear_of_each_other
    members_of_large_groups_ask
}
