//! Groups through real processes: state servers, gateways and the real client library, on both stores.
//!
//! Trap: that somebody sees nothing more is shown by what they do see behind it (a message of another chat, sent later), never
//! by waiting.

use std::path::Path;
use std::time::Duration;

use client::{
    AskError, Body, Client, Content, Event, Events, Keep, Message, Options, SendError, Target, change,
};
use loadtest::supervisor::{Cluster, ClusterOptions};
use loadtest::torture::tool::aof;
use loadtest::torture::tool::process::metric;
use proto::wire::{Code, GroupAction, Role};

/// Longest that anything here may take before it counts as broken.
const PATIENCE: Duration = Duration::from_secs(60);

struct Device {
    client: Client,
    events: Events,
}

impl Device {
    async fn login(cluster: &Cluster, folder: &Path, user: &str, device: &str) -> Device {
        let target = Target::Gateway(cluster.gateways.iter().map(|g| g.client.to_string()).collect());
        let options = Options { keep: Keep::Under(folder.to_owned()), ..Options::new(user, device, target) };
        let login = tokio::time::timeout(PATIENCE, Client::connect(options));
        let (client, events) = login.await.expect("a login in time").unwrap();
        Device { client, events }
    }

    /// The next message, confirmed. Nothing is missing in between.
    async fn next(&mut self) -> Message {
        let next = async {
            loop {
                match self.events.next().await.expect("the session goes on") {
                    Event::Message(message) => return message,
                    other @ (Event::Gap { .. } | Event::HistoryLost { .. } | Event::Ended(_)) => {
                        panic!("not in this story: {other:?}")
                    }
                    _ => {}
                }
            }
        };
        let message = tokio::time::timeout(PATIENCE, next).await.expect("a message arrives");
        self.events.confirm(&message);
        message
    }

    /// (chat, seq) of the messages up to that text.
    async fn until(&mut self, text: &str) -> Vec<(String, u64)> {
        let mut seen = Vec::new();
        loop {
            let message = self.next().await;
            seen.push((message.chat.to_string(), message.seq));
            if message.body == text {
                return seen;
            }
        }
    }

    async fn send(&self, chat: &str, body: impl Into<Body>) {
        let sent = tokio::time::timeout(PATIENCE, self.client.send(chat, body));
        sent.await.expect("an answer in time").expect("it is accepted");
    }

    async fn refused(&self, chat: &str, body: impl Into<Body>) -> Code {
        let answer = tokio::time::timeout(PATIENCE, self.client.send(chat, body));
        match answer.await.expect("an answer in time") {
            Err(SendError::Refused { code, .. }) => code,
            other => panic!("{other:?}"),
        }
    }
}

fn seqs(seen: &[(String, u64)], chat: &str) -> Vec<u64> {
    seen.iter().filter(|(of, _)| of == chat).map(|(_, seq)| *seq).collect()
}

fn named(action: GroupAction, members: &[(&str, Role)]) -> Body {
    Body::group(&change(action, "", members))
}

/// Ann makes a group; everybody sees everything while they are in it, and nothing else.
async fn a_groups_life(options: ClusterOptions) {
    let mut cluster = Cluster::start(options).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().to_owned();
    let ann = Device::login(&cluster, &root, "ann", "phone").await;
    let mut desk = Device::login(&cluster, &root, "ann", "desk").await;
    let mut bob = Device::login(&cluster, &root, "bob", "phone").await;
    let mut carol = Device::login(&cluster, &root, "carol", "phone").await;

    let made =
        ann.client.create_group("Rooks", &[("bob", Role::Admin), ("dave", Role::Member)]).await.unwrap();
    let chat = made.chat.to_string();
    assert_eq!(made.seq, 1);
    let told = bob.next().await;
    let Content::Group(first) = told.body.content() else { panic!("{told:?}") };
    assert_eq!((first.action(), &*first.title, &*told.sender), (GroupAction::GroupCreate, "Rooks", "ann"));
    ann.send(&chat, "one").await;
    bob.send(&chat, "two").await;
    assert_eq!(seqs(&bob.until("one").await, &chat), [2]);
    assert_eq!(seqs(&desk.until("two").await, &chat), [1, 2, 3], "her other device sees it all");

    // Who is not in it neither reads nor writes.
    assert_eq!(carol.refused(&chat, "let me in").await, Code::NotAMember);
    let asked = carol.client.group(&chat).await;
    assert!(matches!(asked, Err(AskError::Refused { code: Code::NotAMember, .. })), "{asked:?}");
    assert_eq!(bob.refused(&chat, named(GroupAction::GroupDelete, &[])).await, Code::NotAllowed);

    // Bob, an admin, brings her in: she sees what comes from there on, and misses nothing.
    bob.send(&chat, named(GroupAction::GroupAdd, &[("carol", Role::Member)])).await;
    carol.send(&chat, "three").await;
    assert_eq!(seqs(&bob.until("three").await, &chat), [3, 4, 5]);
    let joined = carol.next().await;
    assert_eq!((joined.seq, &*joined.chat), (4, &*chat));
    let group = ann.client.group(&chat).await.unwrap();
    let roles: Vec<_> = group.members.iter().map(|member| (&*member.user, member.role())).collect();
    let member = Role::Member;
    assert_eq!(roles, [("ann", Role::Owner), ("bob", Role::Admin), ("carol", member), ("dave", member)]);
    assert_eq!((&*group.title, group.version), ("Rooks", 4));

    // An edit and a recall are their sender's.
    ann.send(&chat, Body::edit(2, "one, rather")).await;
    ann.send(&chat, Body::recall(2)).await;
    assert_eq!(bob.refused(&chat, Body::recall(2)).await, Code::NotAllowed);
    let edited = bob.next().await;
    assert_eq!(edited.body.content(), Content::Edit { seq: 2, body: "one, rather".into() });
    assert_eq!(bob.next().await.body.content(), Content::Recall { seq: 2 });

    // She is taken out, while another server may still hold the old list.
    ann.send(&chat, named(GroupAction::GroupRemove, &[("carol", Role::Member)])).await;
    for text in ["four", "five"] {
        bob.send(&chat, text).await;
    }
    assert_eq!(seqs(&desk.until("five").await, &chat), [4, 5, 6, 7, 8, 9, 10]);
    ann.send("carol", "behind it").await;
    let seen = carol.until("behind it").await;
    assert_eq!(seqs(&seen, &chat), [5, 6, 7, 8], "her removal is the last that she sees");
    assert_eq!(carol.refused(&chat, "hello?").await, Code::NotAMember);

    // Not by a device that Syncs and Pulls anew either; and everything survives a state server that is killed.
    cluster.states[0].process.kill().unwrap();
    cluster.states[0].process.restart().unwrap();
    let mut tablet = Device::login(&cluster, &root, "carol", "tablet").await;
    ann.send("carol", "to the tablet").await;
    let seen = tablet.until("to the tablet").await;
    assert!(seqs(&seen, &chat).iter().all(|seq| (4..=8).contains(seq)), "{seen:?}");

    // Dave was away all the time.
    let mut dave = Device::login(&cluster, &root, "dave", "phone").await;
    assert_eq!(seqs(&dave.until("five").await, &chat), (1..=10).collect::<Vec<_>>());
    dave.send(&chat, "was away").await;
    bob.until("was away").await;

    // She comes back: what was said meanwhile is not hers, and is no gap either.
    ann.send(&chat, named(GroupAction::GroupAdd, &[("carol", Role::Member)])).await;
    bob.send(&chat, "welcome back").await;
    assert_eq!(seqs(&carol.until("welcome back").await, &chat), [12, 13]);

    // The end of the group.
    ann.send(&chat, named(GroupAction::GroupDelete, &[])).await;
    assert_eq!(ann.refused(&chat, "anybody?").await, Code::NotAMember);
    let last = carol.next().await;
    assert!(
        matches!(last.body.content(), Content::Group(change) if change.action() == GroupAction::GroupDelete)
    );
    for device in [ann, desk, bob, carol, tablet, dave] {
        device.client.close().await;
    }
}

/// The store comes back empty: whoever holds something of a group hears of it, though nobody is in it any more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_that_the_store_lost_is_told_to_its_members() {
    let mut cluster = Cluster::start(ClusterOptions::default()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().to_owned();
    let ann = Device::login(&cluster, &root, "ann", "phone").await;
    let mut bob = Device::login(&cluster, &root, "bob", "phone").await;
    let made = ann.client.create_group("Rooks", &[("bob", Role::Member)]).await.unwrap();
    ann.send(&made.chat, "one").await;
    bob.until("one").await;
    bob.client.close().await;

    let redis = cluster.redis.as_mut().unwrap();
    redis.process.kill().unwrap();
    aof::erase(redis.folder()).unwrap();
    redis.process.restart().unwrap();

    let mut bob = Device::login(&cluster, &root, "bob", "phone").await;
    let lost = async {
        loop {
            let event = bob.events.next().await.expect("the session goes on");
            if let Event::HistoryLost { chat, history, from_seq } = event {
                return (chat, history, from_seq);
            }
        }
    };
    let (chat, history, from_seq) = tokio::time::timeout(PATIENCE, lost).await.expect("told in time");
    assert_eq!((&chat, from_seq), (&made.chat, 1));
    assert_ne!(history, made.history);
    assert_eq!(bob.refused(&chat, "anybody?").await, Code::NotAMember);
    ann.client.close().await;
    bob.client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_lives_and_ends_on_redis_with_two_state_servers() {
    a_groups_life(ClusterOptions { states: 2, gateways: 2, ..ClusterOptions::default() }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_lives_and_ends_on_redb() {
    a_groups_life(ClusterOptions { embedded: true, ..ClusterOptions::default() }).await;
}

/// What finds no room on its way to its readers is pushed out of the store: all of it arrives in order, and nobody else waits.
async fn more_than_may_wait(embedded: bool) {
    let state_sets = vec!["limits.fan_out_max=1".into()];
    let cluster =
        Cluster::start(ClusterOptions { embedded, state_sets, ..ClusterOptions::default() }).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().to_owned();
    let ann = Device::login(&cluster, &root, "ann", "phone").await;
    let mut bob = Device::login(&cluster, &root, "bob", "phone").await;
    let mut carol = Device::login(&cluster, &root, "carol", "phone").await;
    let made = ann.client.create_group("Rooks", &[("bob", Role::Member)]).await.unwrap();
    let chat = made.chat.to_string();
    for n in 1..=MANY {
        let text = if n == MANY { "over".to_owned() } else { n.to_string() };
        drop(ann.client.enqueue(&chat, text).await.unwrap());
        if n % 10 == 0 {
            drop(ann.client.enqueue("carol", n.to_string()).await.unwrap());
        }
    }
    let last = MANY.to_string();
    let seen = tokio::join!(bob.until("over"), carol.until(&last));
    assert_eq!(seqs(&seen.0, &chat), (1..=MANY + 1).collect::<Vec<u64>>());
    assert_eq!(seqs(&seen.1, "ann:carol"), (1..=MANY / 10).collect::<Vec<u64>>());
    let behind = metric(cluster.states[0].admin, "rookery_state_left_behind_total").unwrap();
    assert!(behind > 0.0, "this test means nothing if everything found room");
}

const MANY: u64 = 600;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_than_may_wait_on_redis() {
    more_than_may_wait(false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_than_may_wait_embedded() {
    more_than_may_wait(true).await;
}

/// Taken out and back in while a device is away: what was said in between is not for it, all else is.
async fn there_and_back(embedded: bool) {
    let cluster = Cluster::start(ClusterOptions { embedded, ..ClusterOptions::default() }).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().to_owned();
    let ann = Device::login(&cluster, &root, "ann", "phone").await;
    let mut bob = Device::login(&cluster, &root, "bob", "phone").await;
    let made = ann.client.create_group("Rooks", &[("bob", Role::Member)]).await.unwrap();
    let chat = made.chat.to_string();
    ann.send(&chat, "two").await;
    bob.until("two").await;
    bob.client.close().await;
    ann.send(&chat, "three").await;
    let bobs = [("bob", Role::Member)];
    for n in [4, 7] {
        ann.send(&chat, named(GroupAction::GroupRemove, &bobs)).await;
        ann.send(&chat, format!("not for bob, {}", n + 1)).await;
        ann.send(&chat, named(GroupAction::GroupAdd, &bobs)).await;
    }
    ann.send(&chat, "ten").await;
    let mut bob = Device::login(&cluster, &root, "bob", "phone").await;
    let ten = bob.until("ten").await;
    assert_eq!(seqs(&ten, &chat), [3, 4, 6, 7, 9, 10]);
    // A look backwards, page by page, sees the same.
    let (mut cursor, mut seen) = (0, Vec::new());
    loop {
        let page = bob.client.pull(&chat, cursor, 2, true).await.unwrap();
        seen.extend(page.messages.iter().map(|message| message.seq));
        match page.next {
            Some(next) => cursor = next,
            None => break,
        }
    }
    assert_eq!(seen, [10, 9, 7, 6, 4, 3, 2, 1]);
    ann.client.close().await;
    bob.client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_is_back_sees_what_was_said_before_on_redis() {
    there_and_back(false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_is_back_sees_what_was_said_before_embedded() {
    there_and_back(true).await;
}
