//! Hooks: a consumer group that sees every accepted message at least once, across the death of a state server and of a
//! consumer.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use loadtest::supervisor::{Cluster, ClusterOptions};
use proto::state::SendRequest;
use proto::state::state_client::StateClient;
use state::store::chat_bucket;

const CHATS: u64 = 5;
const EACH: u64 = 40;
const LONG: Duration = Duration::from_secs(60);

/// Entries of a stream, as `XREADGROUP` and `XAUTOCLAIM` give them.
type Entries = Vec<(String, HashMap<String, String>)>;

fn stream(chat: &str) -> String {
    format!("{{c{:04}}}:events", chat_bucket(chat))
}

/// Sends it, under its name, until it is answered.
async fn send(cluster: &Cluster, chat: u64, n: u64) -> u64 {
    let deadline = Instant::now() + LONG;
    loop {
        for server in &cluster.states {
            let request = SendRequest {
                sender: format!("u{chat}"),
                chat: format!("u{chat}:v{chat}"),
                body: format!("{chat}/{n}").into(),
                name: format!("{n}"),
                ..SendRequest::default()
            };
            if let Ok(mut state) = StateClient::connect(format!("http://{}", server.rpc)).await
                && let Ok(reply) = state.send(request).await
            {
                return reply.into_inner().seq;
            }
        }
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(20)).await; // the pace of asking
    }
}

/// Until no device has a route.
async fn until_nobody_is_there(redis: &mut redis::Connection) {
    const COUNT: &str = "local n = 0 \
        for _, key in ipairs(redis.call('KEYS', 'route:*')) do n = n + redis.call('HLEN', key) end return n";
    let deadline = Instant::now() + LONG;
    while redis::cmd("EVAL").arg(COUNT).arg(0).query::<usize>(redis).unwrap() > 0 {
        assert!(Instant::now() < deadline, "somebody has stayed");
        tokio::time::sleep(Duration::from_millis(20)).await; // the pace of asking
    }
}

/// Presence stands in the streams in order; without the option nothing does.
#[tokio::test]
async fn who_comes_and_goes_is_in_the_streams() {
    for events in [true, false] {
        let sets = vec![format!("store.events={events}")];
        let cluster =
            Cluster::start(ClusterOptions { state_sets: sets, ..ClusterOptions::default() }).unwrap();
        let mut redis = cluster.redis.as_ref().unwrap().connection().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let login = async |device: &str| {
            let target = client::Target::Gateway(vec![cluster.gateways[0].client.to_string()]);
            let keep = client::Keep::Under(folder.path().to_owned());
            let options = client::Options { keep, ..client::Options::new("alice", device, target) };
            client::Client::connect(options).await.unwrap()
        };
        let (phone, desk) = (login("phone").await, login("desk").await);
        phone.0.close().await;
        desk.0.close().await;
        until_nobody_is_there(&mut redis).await;
        login("phone").await.0.close().await;
        until_nobody_is_there(&mut redis).await;
        let mut told = Vec::new();
        for n in 0..64 {
            let mut read = redis::cmd("XRANGE");
            let entries: Entries =
                read.arg(format!("{{p{n:02}}}:presence")).arg("-").arg("+").query(&mut redis).unwrap();
            for (_, fields) in entries {
                assert_eq!((&*fields["type"], &*fields["user"]), ("presence", "alice"));
                assert!(fields["time_us"].parse::<u64>().unwrap() > 0);
                told.push(fields["online"].clone());
            }
        }
        let wanted: &[&str] = if events { &["1", "0", "1", "0"] } else { &[] };
        assert_eq!(told, wanted);
    }
}

#[tokio::test]
async fn a_consumer_group_sees_every_message_across_deaths() {
    let options = ClusterOptions {
        states: 2,
        state_sets: vec!["store.events=true".into()],
        ..ClusterOptions::default()
    };
    let mut cluster = Cluster::start(options).unwrap();
    let mut redis = cluster.redis.as_ref().unwrap().connection().unwrap();
    let streams: std::collections::BTreeSet<String> =
        (0..CHATS).map(|chat| stream(&format!("u{chat}:v{chat}"))).collect();
    for stream in &streams {
        let mut create = redis::cmd("XGROUP");
        create.arg("CREATE").arg(stream).arg("group").arg(0).arg("MKSTREAM").exec(&mut redis).unwrap();
    }
    let mut sent = BTreeMap::new();
    for n in 1..=EACH {
        if n == EACH / 2 {
            cluster.states[0].process.kill().unwrap();
        }
        for chat in 0..CHATS {
            let seq = send(&cluster, chat, n).await;
            sent.insert((format!("u{chat}:v{chat}"), seq), format!("{chat}/{n}"));
        }
        if n == EACH / 2 {
            // Taken by one that dies before it acknowledges.
            for stream in &streams {
                let mut read = redis::cmd("XREADGROUP");
                read.arg("GROUP")
                    .arg("group")
                    .arg("dies")
                    .arg("COUNT")
                    .arg(7)
                    .arg("STREAMS")
                    .arg(stream)
                    .arg(">");
                read.exec(&mut redis).unwrap();
            }
            cluster.states[0].process.restart().unwrap();
        }
    }
    // What is sent again is no second event.
    assert_eq!(send(&cluster, 0, 1).await, 1);
    let mut seen: BTreeMap<(String, u64), String> = BTreeMap::new();
    let mut entries = 0;
    for stream in &streams {
        let mut claim = redis::cmd("XAUTOCLAIM");
        claim.arg(stream).arg("group").arg("lives").arg(0).arg(0).arg("COUNT").arg(1_000);
        let (_, claimed, _): (String, Entries, Vec<String>) = claim.query(&mut redis).unwrap();
        let mut read = redis::cmd("XREADGROUP");
        read.arg("GROUP")
            .arg("group")
            .arg("lives")
            .arg("COUNT")
            .arg(1_000)
            .arg("STREAMS")
            .arg(stream)
            .arg(">");
        let new: Vec<(String, Entries)> = read.query(&mut redis).unwrap();
        let new = new.into_iter().flat_map(|(_, entries)| entries);
        for (id, fields) in claimed.into_iter().chain(new) {
            entries += 1;
            assert_eq!((&*fields["type"], &*fields["kind"]), ("message", "0"));
            assert!(
                fields["chat"].starts_with(&fields["sender"]) && fields["time_us"].parse::<u64>().is_ok()
            );
            seen.insert((fields["chat"].clone(), fields["seq"].parse().unwrap()), fields["body"].clone());
            redis::cmd("XACK").arg(stream).arg("group").arg(id).exec(&mut redis).unwrap();
        }
    }
    assert_eq!(seen, sent);
    assert_eq!(entries as u64, CHATS * EACH, "in the stream once");
}

#[tokio::test]
async fn without_the_key_there_are_no_streams() {
    let cluster = Cluster::start(ClusterOptions::default()).unwrap();
    send(&cluster, 1, 1).await;
    let mut redis = cluster.redis.as_ref().unwrap().connection().unwrap();
    let keys: Vec<String> = redis::cmd("KEYS").arg("*events*").query(&mut redis).unwrap();
    assert_eq!(keys, Vec::<String>::new());
}
