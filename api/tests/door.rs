//! The door against real processes on both stores: what comes in by HTTP is pushed to whoever is connected and the reverse,
//! what is sent again is one message, and what is wrong is said.
//!
//! Trap: needs the binaries `state` and `gateway` beside `api`, as `cargo build --workspace` leaves them.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use client::{Client, Event, Events, Keep, Options, Target};
use loadtest::supervisor::{Cluster, ClusterOptions};
use reqwest::{Response, StatusCode};
use serde_json::{Value, json};

const LONG: Duration = Duration::from_secs(60);

fn cluster(embedded: bool, states: usize) -> (Cluster, Door) {
    let options = ClusterOptions { api: true, embedded, states, ..ClusterOptions::default() };
    let cluster = Cluster::start(options).unwrap();
    let door = Door { http: cluster.api.as_ref().unwrap().http, web: reqwest::Client::new() };
    (cluster, door)
}

async fn connect(cluster: &Cluster, user: &str) -> (Client, Events) {
    let target = Target::Gateway(vec![cluster.gateways[0].client.to_string()]);
    let options = Options { keep: Keep::Memory, ..Options::new(user, "phone", target) };
    tokio::time::timeout(LONG, Client::connect(options)).await.unwrap().unwrap()
}

async fn next_message(events: &mut Events) -> client::Message {
    let next = async {
        loop {
            if let Event::Message(message) = events.next().await.expect("it goes on") {
                return message;
            }
        }
    };
    tokio::time::timeout(LONG, next).await.expect("a push")
}

struct Door {
    http: SocketAddr,
    web: reqwest::Client,
}

impl Door {
    async fn post(&self, body: &Value) -> (StatusCode, Value) {
        read(self.web.post(format!("http://{}/api/send", self.http)).json(body).send().await.unwrap()).await
    }

    async fn pull(&self, query: &str, body: Option<Value>) -> (StatusCode, Value) {
        let mut request = self.web.get(format!("http://{}/api/pull?{query}", self.http));
        if let Some(body) = body {
            request = request.json(&body);
        }
        read(request.send().await.unwrap()).await
    }

    /// The seqs of all pages, as a caller goes through them.
    async fn pages(&self, chat: &str, limit: usize, reverse: bool) -> Vec<u64> {
        let (mut cursor, mut seqs) = (0, Vec::new());
        for _ in 0..100 {
            let query = format!("chat={chat}&cursor={cursor}&limit={limit}&reverse={reverse}");
            let (status, page) = self.pull(&query, None).await;
            assert_eq!(status, 200, "{page}");
            let found: Vec<u64> =
                page["messages"].as_array().unwrap().iter().map(|m| m["seq"].as_u64().unwrap()).collect();
            assert!(found.len() <= limit);
            let next = page["next_cursor"].as_u64().unwrap();
            assert_eq!(next, found.last().copied().unwrap_or(cursor));
            cursor = next;
            seqs.extend(found);
            if page["has_more"] == false {
                return seqs;
            }
        }
        panic!("it never ends: {seqs:?}");
    }
}

async fn read(response: Response) -> (StatusCode, Value) {
    let status = response.status();
    assert_eq!(response.headers()["content-type"], "application/json");
    (status, response.json().await.unwrap())
}

fn said(text: &str) -> Value {
    json!({ "Chat": "a:b", "Text": text, "Sender": "a" })
}

async fn is_a_door_between_web_and_devices(embedded: bool) {
    let (cluster, door) = cluster(embedded, 1);
    let (bob, mut events) = connect(&cluster, "b").await;

    let (status, answer) = door.post(&json!({ "Chat": "b:a", "Text": "Hello World", "Sender": "a" })).await;
    assert_eq!((status, &answer["status"], &answer["seq"]), (StatusCode::OK, &json!("success"), &json!(1)));
    let pushed = next_message(&mut events).await;
    assert_eq!(
        (&*pushed.chat, pushed.seq, &*pushed.sender, &pushed.body[..]),
        ("a:b", 1, "a", &b"Hello World"[..])
    );
    assert_eq!(json!(pushed.time_us), answer["send_time_us"]);

    let sent = bob.send("a", "Hello web").await.unwrap();
    assert_eq!(sent.seq, 2);
    // The same chat by either name, from a body, from a query, and from both.
    for (query, body) in [
        ("", Some(json!({ "Chat": "b:a", "Cursor": 1, "Limit": 5 }))),
        ("CHAT=a%3Ab&cursor=1&LIMIT=5", None),
        ("chat=b:a&reverse=true&limit=1", Some(json!({ "chat": "x:y", "CURSOR": null, "Limit": 99 }))),
    ] {
        let (status, page) = door.pull(query, body).await;
        assert_eq!(status, 200, "{page}");
        let message = json!({
            "chat": "a:b", "text": "Hello web", "sender": "b", "seq": 2,
            "send_time": sent.time_us / 1_000_000, "send_time_us": sent.time_us,
        });
        assert_eq!(page["messages"], json!([message]), "{query}");
        assert_eq!((&page["next_cursor"], &page["has_more"]), (&json!(2), &json!(query.contains("reverse"))));
    }
    let (status, page) = door.pull("chat=no:body&cursor=7", None).await;
    assert_eq!(
        (status, page),
        (StatusCode::OK, json!({ "messages": [], "has_more": false, "next_cursor": 7 }))
    );

    same_id_same_message(&door).await;
    for n in 0..45 {
        assert_eq!(door.post(&said(&format!("message {n}"))).await.0, 200);
    }
    let head = 2 + 3 + 45;
    for limit in [1, 7, 20, 100] {
        assert_eq!(door.pages("b:a", limit, false).await, (1..=head).collect::<Vec<_>>(), "{limit}");
        assert_eq!(door.pages("a:b", limit, true).await, (1..=head).rev().collect::<Vec<_>>(), "{limit}");
    }
    for (limit, count) in [("", 20), ("&limit=0", 20), ("&limit=100000000000000000000", 50)] {
        let (_, page) = door.pull(&format!("chat=a:b{limit}"), None).await;
        assert_eq!(page["messages"].as_array().unwrap().len(), count, "{limit}");
    }
    // Device and web see one order.
    let mut seen = Vec::new();
    while seen.last() != Some(&head) {
        seen.push(next_message(&mut events).await.seq);
    }
    // Its own is an event, too.
    assert_eq!(seen, (2..=head).collect::<Vec<_>>());
}

async fn same_id_same_message(door: &Door) {
    let named =
        |id: &str, text: &str| json!({ "chat": "a:b", "text": text, "sender": "a", "clientmsgid": id });
    let (status, first) = door.post(&named("id", "one")).await;
    assert_eq!((status, &first["seq"]), (StatusCode::OK, &json!(3)));
    for _ in 0..3 {
        assert_eq!(door.post(&named("id", "one")).await, (StatusCode::OK, first.clone()));
    }
    let (status, answer) = door.post(&named("id", "another")).await;
    assert_eq!((status, &answer["field"]), (StatusCode::CONFLICT, &json!("ClientMsgId")), "{answer}");
    let longest = "ü".repeat(32);
    assert_eq!(door.post(&named(&longest, "one")).await.1["seq"], 4);
    // Of another sender it is another.
    let (_, other) =
        door.post(&json!({ "Chat": "a:b", "Text": "x", "Sender": "b", "ClientMsgId": "id" })).await;
    assert_eq!(other["seq"], 5);
}

#[tokio::test]
async fn web_and_devices_meet_on_redis() {
    is_a_door_between_web_and_devices(false).await;
}

#[tokio::test]
async fn web_and_devices_meet_on_redb() {
    is_a_door_between_web_and_devices(true).await;
}

#[tokio::test]
async fn what_is_wrong_is_said_and_the_field_named() {
    let (_cluster, door) = cluster(true, 1);
    let long = "x".repeat(proto::MESSAGE_BYTES_MAX + 1);
    let with = |field: &str, value: Value| {
        let mut body = said("x");
        body[field] = value;
        body
    };
    let missing = |field: &str| with(field, Value::Null);
    for (body, field) in [
        (missing("Chat"), "Chat"),
        (missing("Text"), "Text"),
        (missing("Sender"), "Sender"),
        (with("Chat", json!("a")), "Chat"),
        (with("Chat", json!("a:b:c")), "Chat"),
        (with("Chat", json!("#7")), "Chat"),
        (with("Chat", json!(["a", "b"])), "Chat"),
        (with("Sender", json!("c")), "Sender"),
        (with("Sender", json!("")), "Sender"),
        (with("Text", json!("")), "Text"),
        (with("Text", json!(7)), "Text"),
        (with("Text", json!(long)), "Text"),
        (with("ClientMsgId", json!("")), "ClientMsgId"),
        (with("ClientMsgId", json!("x".repeat(65))), "ClientMsgId"),
        (with("chat", json!("a:b")), "Chat"),
    ] {
        let (status, answer) = door.post(&body).await;
        assert_eq!((status, &answer["field"]), (StatusCode::BAD_REQUEST, &json!(field)), "{answer}");
        assert!(answer["error"].as_str().unwrap().starts_with(field), "{answer}");
    }
    for body in [json!([]), json!("x"), with("ClientMsgID2", json!("x"))] {
        assert_eq!(door.post(&body).await.0, 400);
    }
    for query in [
        "",
        "chat=a",
        "chat=a:b&cursor=-1",
        "chat=a:b&limit=-1",
        "chat=a:b&reverse=yes",
        "chat=a:b&from=1",
        "chat=a:b&cursor=9007199254740992",
    ] {
        let (status, answer) = door.pull(query, None).await;
        assert_eq!(status, 400, "{query}: {answer}");
    }
    for body in [json!({ "Cursor": -1 }), json!({ "Chat": "a" }), json!({ "Cursor": 1u64 << 53 })] {
        let (status, answer) = door.pull("chat=a:b&cursor=0", Some(body)).await;
        assert_eq!(status, 400, "though the query has both: {answer}");
    }
    assert_eq!(door.pull("chat=a:b", None).await.1["messages"], json!([]), "nothing was stored");

    let url = |path: &str| format!("http://{}{path}", door.http);
    let status = async |request: reqwest::RequestBuilder| read(request.send().await.unwrap()).await.0;
    assert_eq!(status(door.web.post(url("/api/send")).body(said("x").to_string())).await, 415);
    let cut = door.web.post(url("/api/send")).header("content-type", "application/json").body("{\"Chat\":");
    assert_eq!(status(cut).await, 400);
    assert_eq!(status(door.web.get(url("/api/send"))).await, 405);
    assert_eq!(status(door.web.post(url("/api/pull")).json(&json!({}))).await, 405);
    assert_eq!(status(door.web.get(url("/api/none"))).await, 404);
    // Far more than is kept by sockets on the way: the answer must not be lost to a reset.
    for megabytes in [1, 3] {
        let huge = door.web.post(url("/api/send")).body(vec![b'x'; megabytes * 1024 * 1024]);
        assert_eq!(status(huge).await, 413);
    }
}

#[tokio::test]
async fn without_a_state_server_it_says_so_and_nothing_is_lost() {
    let (mut cluster, door) = cluster(true, 1);
    assert_eq!(door.post(&said("before")).await.0, 200);
    cluster.states[0].process.kill().unwrap();
    let url = format!("http://{}/api/send", door.http);
    let deadline = Instant::now() + LONG;
    // A connection that has just broken may leave the first one unknown.
    loop {
        let response = door.web.post(&url).json(&said("away")).send().await.unwrap();
        if response.status() == 503 {
            let after: u64 = response.headers()["retry-after"].to_str().unwrap().parse().unwrap();
            assert!(after >= 1);
            break;
        }
        assert_eq!(response.status(), 504);
        let answer: Value = response.json().await.unwrap();
        assert_eq!(answer["status"], "unknown");
        assert!(Instant::now() < deadline);
    }
    assert_eq!(door.pull("chat=a:b", None).await.0, 503);
    cluster.states[0].process.restart().unwrap();
    let deadline = Instant::now() + LONG;
    while door.pull("chat=a:b", None).await.0 != 200 {
        assert!(Instant::now() < deadline, "it comes back");
        tokio::time::sleep(Duration::from_millis(20)).await; // the pace of asking
    }
    assert_eq!(door.pages("a:b", 10, false).await, [1]);
}

/// Sends with an id until it is answered, however often that takes.
async fn send_until_answered(door: &Door, n: usize) -> u64 {
    let text = format!("message {n}");
    let body = json!({ "Chat": "a:b", "Text": text, "Sender": "a", "ClientMsgId": format!("id {n}") });
    let deadline = Instant::now() + LONG;
    loop {
        let (status, answer) = door.post(&body).await;
        match status.as_u16() {
            200 => return answer["seq"].as_u64().unwrap(),
            503 | 504 => assert!(Instant::now() < deadline, "{answer}"),
            other => panic!("{other}: {answer}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await; // the pace of asking
    }
}

async fn a_killed_state_server_leaves_one_copy_of_each(embedded: bool, states: usize) {
    let (mut cluster, door) = cluster(embedded, states);
    let (_bob, mut events) = connect(&cluster, "b").await;
    let count = 120;
    let door = std::sync::Arc::new(door);
    let (told, mut done) = tokio::sync::mpsc::unbounded_channel();
    let senders: Vec<_> = (0..4)
        .map(|sender| {
            let (door, told) = (door.clone(), told.clone());
            tokio::spawn(async move {
                for n in (sender..count).step_by(4) {
                    let seq = send_until_answered(&door, n).await;
                    told.send((n, seq)).unwrap();
                }
            })
        })
        .collect();
    drop(told);
    let mut answered = Vec::new();
    for _ in 0..count / 4 {
        answered.push(tokio::time::timeout(LONG, done.recv()).await.unwrap().unwrap());
    }
    cluster.states[0].process.kill().unwrap();
    cluster.states[0].process.restart().unwrap();
    while let Some(one) = tokio::time::timeout(2 * LONG, done.recv()).await.unwrap() {
        answered.push(one);
    }
    for sender in senders {
        sender.await.unwrap();
    }
    let mut seqs: Vec<u64> = answered.iter().map(|(_, seq)| *seq).collect();
    seqs.sort_unstable();
    assert_eq!(seqs, (1..=count as u64).collect::<Vec<_>>(), "each id is one message");
    assert_eq!(door.pages("a:b", 50, false).await, seqs);
    for (n, seq) in answered {
        let (_, page) = door.pull(&format!("chat=a:b&limit=1&cursor={}", seq - 1), None).await;
        assert_eq!(page["messages"][0]["text"], format!("message {n}"), "and its answer is its place");
    }
    for seq in 1..=count as u64 {
        assert_eq!(next_message(&mut events).await.seq, seq, "and nobody is left deaf");
    }
}

#[tokio::test]
async fn ids_survive_a_killed_state_server_on_redis() {
    a_killed_state_server_leaves_one_copy_of_each(false, 2).await;
}

#[tokio::test]
async fn ids_survive_a_killed_state_server_on_redb() {
    a_killed_state_server_leaves_one_copy_of_each(true, 1).await;
}
