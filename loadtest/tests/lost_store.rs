//! What happens to those who are connected while the store loses everything. Through real processes and the real client library, on
//! both stores.

use std::time::Duration;

use client::{Client, Event, Events, Keep, Options, Target};
use loadtest::supervisor::{Cluster, ClusterOptions};

/// Longest that anything here may take before it counts as broken.
const PATIENCE: Duration = Duration::from_secs(60);

async fn login(cluster: &Cluster, user: &str) -> (Client, Events) {
    let target = Target::Gateway(vec![cluster.gateways[0].client.to_string()]);
    let options = Options { keep: Keep::Memory, ..Options::new(user, "phone", target) };
    tokio::time::timeout(PATIENCE, Client::connect(options)).await.expect("a login in time").unwrap()
}

async fn until(events: &mut Events, good: impl Fn(&Event) -> bool) -> Event {
    let next = async {
        loop {
            let event = events.next().await.expect("the session goes on");
            if good(&event) {
                return event;
            }
        }
    };
    tokio::time::timeout(PATIENCE, next).await.expect("it is told")
}

/// Bob only listens. Nothing of him is known to the empty store: not his number, not that he is connected.
async fn whoever_is_connected_hears_of_it_and_is_reached_again(embedded: bool) {
    let mut cluster = Cluster::start(ClusterOptions { embedded, ..ClusterOptions::default() }).unwrap();
    let (alice, _events) = login(&cluster, "alice").await;
    let (_bob, mut heard) = login(&cluster, "bob").await;
    alice.send("bob", "before").await.unwrap();
    let is = |event: &Event, text: &str| matches!(event, Event::Message(message) if message.body == text);
    until(&mut heard, |event| is(event, "before")).await;

    cluster.lose_store().unwrap();
    let of_alice = |event: &Event| matches!(event, Event::HistoryLost { chat, .. } if **chat == *"alice:bob");
    until(&mut heard, of_alice).await;
    let (carol, _events) = login(&cluster, "carol").await;
    let sent = tokio::time::timeout(PATIENCE, carol.send("bob", "behind it")).await;
    sent.expect("an answer in time").expect("it is accepted");
    until(&mut heard, |event| is(event, "behind it")).await;
}

loadtest::on_both! {
    whoever_is_connected_hears_of_it_and_is_reached_again
}
