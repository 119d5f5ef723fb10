//! An everyday story, told once on each store: three users with two devices each, tokens, a group, receipts, presence, the HTTP door, a
//! revoked token, a week away, an edit and a recall. Real processes; every step is seen through the client library.
//!
//! Trap: that somebody does not see something is shown by what they do see behind it, never by waiting.

use std::collections::HashMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use client::{
    Body, Client, ConnectError, Content, Ended, Event, Events, Keep, Message, Options, SendError, Target,
    Token, change,
};
use crpc::token::{KeyAlgorithm, KeyConfig, NewToken, Signer};
use loadtest::supervisor::{Cluster, ClusterOptions, binary};
use loadtest::torture::tool::clock::Clock;
use proto::wire::{Code, GroupAction, Role};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(60);
const HOUR_S: u64 = 3_600;
const WEEK_S: i64 = 8 * 86_400;

struct World {
    cluster: Cluster,
    signer: Signer,
    folder: tempfile::TempDir,
    clock: Option<Clock>,
    web: reqwest::Client,
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

impl World {
    fn start(embedded: bool) -> World {
        let folder = tempfile::tempdir().unwrap();
        let secret = folder.path().join("secret");
        std::fs::write(&secret, "a secret that is as long as it has to be").unwrap();
        let key =
            format!("auth.keys=[{{ kid = \"k\", algorithm = \"HS256\", file = \"{}\" }}]", secret.display());
        let sets = vec![key, "auth.leeway_s=0".to_owned()];
        let key = KeyConfig { kid: "k".into(), algorithm: KeyAlgorithm::HS256, file: secret };
        // Debian's Redis cannot live with the library that moves clocks: there what a week does to the store is done by hand.
        let clock = embedded.then(|| Clock::make(folder.path()).unwrap());
        let cluster = Cluster::start(ClusterOptions {
            embedded,
            api: true,
            state_sets: sets.clone(),
            api_sets: sets,
            state_env: clock.iter().flat_map(Clock::environment).collect(),
            ..ClusterOptions::default()
        });
        let (signer, web) = (Signer::open(&key).unwrap(), reqwest::Client::new());
        World { cluster: cluster.unwrap(), signer, folder, clock, web }
    }

    fn token(&self, user: &str, issued_s: u64) -> String {
        let expires_s = issued_s + 20 * 24 * HOUR_S;
        let token = NewToken { user, device: None, issuer: "", audience: "", issued_s, expires_s };
        self.signer.sign(&token).unwrap()
    }

    fn options(&self, user: &str, device: &str, issued_s: u64) -> Options {
        let target = Target::Gateway(vec![self.cluster.gateways[0].client.to_string()]);
        let keep = Keep::Under(self.folder.path().join("devices"));
        let token = Token::fixed(self.token(user, issued_s));
        Options { keep, token, ..Options::new(user, device, target) }
    }

    async fn login(&self, user: &str, device: &str) -> Device {
        let login = Client::connect(self.options(user, device, now_s() - 60));
        let (client, events) = tokio::time::timeout(PATIENCE, login).await.expect("a login in time").unwrap();
        Device::new(client, events)
    }

    /// What a week leaves of ids that nobody has used: nothing.
    fn a_week_passes(&self) {
        if let Some(clock) = &self.clock {
            return clock.jump(WEEK_S).unwrap();
        }
        let mut redis = self.cluster.redis.as_ref().unwrap().connection().unwrap();
        let forget = "for _, key in ipairs(redis.call('KEYS', '*:ids:*')) do redis.call('DEL', key) end";
        redis::cmd("EVAL").arg(forget).arg(0).exec(&mut redis).unwrap();
    }

    async fn post(&self, user: &str, body: Value) -> (u16, Value) {
        let url = format!("http://{}/api/send", self.cluster.api.as_ref().unwrap().http);
        let request = self.web.post(url).bearer_auth(self.token(user, now_s() - 60)).json(&body);
        let response = request.send().await.unwrap();
        (response.status().as_u16(), response.json().await.unwrap())
    }

    async fn pull(&self, user: &str, query: &str) -> Vec<String> {
        let url = format!("http://{}/api/pull?{query}", self.cluster.api.as_ref().unwrap().http);
        let response = self.web.get(url).bearer_auth(self.token(user, now_s() - 60)).send().await.unwrap();
        let page: Value = response.json().await.unwrap();
        let text = |message: &Value| message["text"].as_str().unwrap().to_owned();
        page["messages"].as_array().unwrap_or_else(|| panic!("{page}")).iter().map(text).collect()
    }
}

/// A device that keeps what it was shown.
struct Device {
    client: Client,
    events: Events,
    /// By chat, in order: seq, sender, what it says.
    shown: HashMap<String, Vec<(u64, String, Content)>>,
    /// By chat.
    histories: HashMap<String, u64>,
    there: HashMap<String, (bool, bool)>,
}

impl Device {
    fn new(client: Client, events: Events) -> Device {
        Device { client, events, shown: HashMap::new(), histories: HashMap::new(), there: HashMap::new() }
    }

    async fn next(&mut self) -> Event {
        let event = tokio::time::timeout(PATIENCE, self.events.next()).await.expect("something happens");
        let event = event.expect("the session goes on");
        match &event {
            Event::Message(Message { chat, history, seq, sender, body, .. }) => {
                self.histories.insert(chat.to_string(), *history);
                self.shown.entry(chat.to_string()).or_default().push((*seq, sender.clone(), body.content()));
            }
            Event::Presence { user, online, last_seen_s } => {
                self.there.insert(user.clone(), (*online, *last_seen_s > 0));
            }
            Event::Gap { .. } | Event::HistoryLost { .. } => panic!("not in this story: {event:?}"),
            _ => {}
        }
        self.events.confirm_event(&event);
        event
    }

    /// Everything of the chat up to seq, each once and in order from `from` on.
    async fn shows(&mut self, chat: &str, (from, upto): (u64, u64)) {
        let last =
            |device: &Device| device.shown.get(chat).and_then(|all| all.last()).map_or(0, |last| last.0);
        while last(self) < upto {
            self.next().await;
        }
        let seqs: Vec<u64> = self.shown[chat].iter().map(|(seq, ..)| *seq).collect();
        assert_eq!(seqs, (from..=upto).collect::<Vec<_>>(), "{chat}");
    }

    fn last(&self, chat: &str) -> &(u64, String, Content) {
        self.shown[chat].last().unwrap()
    }

    async fn sees(&mut self, who: &str, online: bool, seen: bool) {
        while self.there.get(who) != Some(&(online, seen)) {
            self.next().await;
        }
    }

    async fn is_told(&mut self, what: &str, good: impl Fn(&Event) -> bool) {
        let told = async { while !good(&self.next().await) {} };
        assert!(tokio::time::timeout(PATIENCE, told).await.is_ok(), "nobody says: {what}");
    }

    async fn send(&self, to: &str, body: impl Into<Body>) -> u64 {
        let sent =
            tokio::time::timeout(PATIENCE, self.client.send(to, body)).await.expect("an answer in time");
        sent.unwrap().seq
    }

    async fn refused(&self, to: &str, body: impl Into<Body>) -> Code {
        match tokio::time::timeout(PATIENCE, self.client.send(to, body)).await.expect("an answer in time") {
            Err(SendError::Refused { code, .. }) => code,
            other => panic!("{other:?}"),
        }
    }

    async fn ended(&mut self) -> Ended {
        loop {
            if let Event::Ended(ended) = self.next().await {
                return ended;
            }
        }
    }
}

fn text(text: &'static str) -> Content {
    Content::Text(text.into())
}

fn delivered_or_read(event: &Event, who: &str, upto: u64) -> (bool, bool) {
    let is = |user: &str, seq: u64| user == who && seq == upto;
    (
        matches!(event, Event::Delivered { user, seq, .. } if is(user, *seq)),
        matches!(event, Event::Read { user, seq, .. } if is(user, *seq)),
    )
}

async fn ctl(world: &World, arguments: &[&str]) -> String {
    let program = binary("state").unwrap();
    let target = world.cluster.states[0].rpc.to_string();
    let run =
        tokio::process::Command::new(program).arg("ctl").args(arguments).args(["--target", &target]).output();
    let done = run.await.unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).unwrap()
}

async fn the_story(embedded: bool) {
    let world = World::start(embedded);
    let (mut alice, mut alice_desk) =
        (world.login("alice", "phone").await, world.login("alice", "desk").await);
    let (mut bob, mut bob_desk) = (world.login("bob", "phone").await, world.login("bob", "desk").await);
    let (mut carol, mut carol_desk) =
        (world.login("carol", "phone").await, world.login("carol", "desk").await);

    // A group of three.
    let members = [("bob", Role::Member), ("carol", Role::Member)];
    let trip = alice.client.create_group("trip", &members).await.unwrap().chat.to_string();
    for device in [&mut alice, &mut alice_desk, &mut bob, &mut bob_desk, &mut carol, &mut carol_desk] {
        device.shows(&trip, (1, 1)).await;
    }
    assert_eq!(carol.send(&trip, "by train?").await, 2);
    for device in [&mut alice, &mut alice_desk, &mut bob, &mut bob_desk, &mut carol, &mut carol_desk] {
        device.shows(&trip, (1, 2)).await;
        assert_eq!(device.last(&trip), &(2, "carol".into(), text("by train?")));
    }

    // Who is there, and who is writing.
    alice.client.watch(["bob", "carol"]).unwrap();
    alice.sees("bob", true, false).await;
    alice.sees("carol", true, false).await;
    bob.client.typing(&trip, false).unwrap();
    for device in [&mut alice, &mut alice_desk, &mut carol] {
        let is_it = |e: &Event| matches!(e, Event::Typing { chat, user, stopped: false } if **chat == *trip && user == "bob");
        device.is_told("bob is writing", is_it).await;
    }

    // Sent, delivered, read.
    let psst = alice.send("bob", "psst").await;
    bob.shows("alice:bob", (1, psst)).await;
    bob_desk.shows("alice:bob", (1, psst)).await;
    alice_desk.shows("alice:bob", (1, psst)).await;
    alice.is_told("delivered to bob", |event| delivered_or_read(event, "bob", psst).0).await;
    bob.client.read("alice", bob.histories["alice:bob"], psst).unwrap();
    for device in [&mut alice, &mut alice_desk, &mut bob_desk] {
        device.is_told("read by bob", |event| delivered_or_read(event, "bob", psst).1).await;
    }

    // Through the HTTP door and back; nobody speaks for somebody else.
    let (status, answer) = world
        .post(
            "alice",
            json!({ "Chat": "alice:bob", "Text": "from the web", "Sender": "alice", "ClientMsgId": "1" }),
        )
        .await;
    assert_eq!((status, &answer["status"], &answer["seq"]), (200, &json!("success"), &json!(psst + 1)));
    for device in [&mut alice, &mut alice_desk, &mut bob, &mut bob_desk] {
        device.shows("alice:bob", (1, psst + 1)).await;
        assert_eq!(device.last("alice:bob"), &(psst + 1, "alice".into(), text("from the web")));
    }
    bob_desk.send("alice", "got it").await;
    assert_eq!(world.pull("alice", "chat=alice:bob").await, ["psst", "from the web", "got it"]);
    let forged = json!({ "Chat": "alice:bob", "Text": "not me", "Sender": "alice" });
    assert_eq!(world.post("carol", forged).await.0, 403);

    // Somebody has lost a desk.
    assert_eq!(ctl(&world, &["revoke", "--user", "bob", "--device", "desk"]).await, "ended 1\n");
    assert!(matches!(bob_desk.ended().await, Ended::Kicked { code: Code::TokenRevoked, .. }));
    let again =
        tokio::time::timeout(PATIENCE, Client::connect(world.options("bob", "desk", now_s() - 60))).await;
    let refused = again.expect("an answer").expect_err("it is refused");
    assert!(
        matches!(refused, ConnectError::Ended(Ended::LoginRefused { code: Code::TokenRevoked, .. })),
        "{refused}"
    );
    bob.send(&trip, "somebody has my desk").await;
    let bob_desk = async {
        loop {
            // Newer than the second of the revocation.
            match Client::connect(world.options("bob", "desk", now_s())).await {
                Ok((client, events)) => return Device::new(client, events),
                Err(ConnectError::Ended(Ended::LoginRefused { code: Code::TokenRevoked, .. })) => {}
                Err(error) => panic!("{error}"),
            }
        }
    };
    let mut bob_desk = tokio::time::timeout(PATIENCE, bob_desk).await.expect("a newer token is taken");
    bob_desk.shows(&trip, (3, 3)).await;

    // Carol is away for a week.
    for device in [&mut alice, &mut alice_desk, &mut bob, &mut carol, &mut carol_desk] {
        device.shows(&trip, (1, 3)).await;
    }
    carol.client.close().await;
    carol_desk.client.close().await;
    alice.sees("carol", false, true).await;
    world.a_week_passes();
    for n in 0..60 {
        let (one, other) = if n % 2 == 0 { (&alice, &bob) } else { (&bob, &alice) };
        one.send(&trip, format!("day {n}")).await;
        other.send("carol", format!("are you there? {n}")).await;
    }
    bob.shows(&trip, (1, 63)).await;
    let rename = change(GroupAction::GroupRename, "the trip without carol", &[]);
    alice.client.change_group(&trip, &rename).await.unwrap();
    for (name, shown) in [("phone", carol.shown), ("desk", carol_desk.shown)] {
        let mut carol = Device { shown, ..world.login("carol", name).await };
        carol.shows(&trip, (1, 64)).await;
        carol.shows("alice:carol", (1, 30)).await;
        carol.shows("bob:carol", (1, 30)).await;
        // Her ids of before are forgotten by now.
        let seq = carol.send(&trip, "here I am").await;
        carol.shows(&trip, (1, seq)).await;
        carol.client.close().await;
    }
    let mut carol = world.login("carol", "phone").await;
    alice.sees("carol", true, false).await;
    alice.shows(&trip, (1, 66)).await;

    // Said too much.
    let too_much = alice.send(&trip, "carol's present is in the cellar").await;
    assert_eq!(bob.refused(&trip, Body::recall(too_much)).await, Code::NotAllowed);
    let edit = alice.send(&trip, Body::edit(too_much, "the weather is nice")).await;
    let recall = alice.send(&trip, Body::recall(too_much)).await;
    for device in [&mut bob, &mut alice_desk] {
        device.shows(&trip, (1, recall)).await;
        assert_eq!(device.last(&trip).2, Content::Recall { seq: too_much });
        let edited = &device.shown[&trip][edit as usize - 1].2;
        assert_eq!(*edited, Content::Edit { seq: too_much, body: "the weather is nice".into() });
    }

    // Carol goes for good: she sees that, and nothing behind it.
    let out = change(GroupAction::GroupRemove, "", &[("carol", Role::Member)]);
    let gone = alice.client.change_group(&trip, &out).await.unwrap().seq;
    alice.send(&trip, "only the two of us").await;
    assert_eq!(carol.refused(&trip, "wait!").await, Code::NotAMember);
    alice.send("carol", "sorry").await;
    while !carol.shown.contains_key("alice:carol") {
        carol.next().await;
    }
    assert_eq!(carol.last(&trip).0, gone);
    bob_desk.shows(&trip, (3, gone + 1)).await;
}

#[tokio::test]
async fn an_everyday_story_on_services() {
    the_story(false).await;
}

#[tokio::test]
async fn an_everyday_story_embedded() {
    the_story(true).await;
}
