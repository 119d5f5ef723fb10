//! Who may use the door, and how fast: tokens that are revoked, users who are deleted, and the limit that connections and the
//! door share.
//!
//! Trap: needs the binaries `state` and `gateway` beside `api`, as `cargo build --workspace` leaves them. Nothing waits for a time
//! to pass but for the second of a revocation, which is waited for by asking.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use client::{Client, Keep, Options, Target};
use crpc::token::{KeyAlgorithm, KeyConfig, NewToken, Signer};
use loadtest::supervisor::{Cluster, ClusterOptions, binary};
use reqwest::StatusCode;
use serde_json::{Value, json};

const LONG: Duration = Duration::from_secs(60);

struct Door {
    cluster: Cluster,
    web: reqwest::Client,
}

/// Status, seconds of Retry-After, body.
type Answer = (StatusCode, Option<u64>, Value);

impl Door {
    fn open(options: ClusterOptions) -> Door {
        let cluster = Cluster::start(ClusterOptions { api: true, ..options }).unwrap();
        Door { cluster, web: reqwest::Client::new() }
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.cluster.api.as_ref().unwrap().http)
    }

    async fn send(&self, sender: &str, token: &str) -> Answer {
        let body = json!({ "Chat": format!("{sender}:z"), "Text": "x", "Sender": sender });
        read(self.web.post(self.url("/api/send")).bearer_auth(token).json(&body)).await
    }

    async fn pull(&self, chat: &str, token: &str) -> Answer {
        read(self.web.get(self.url(&format!("/api/pull?chat={chat}"))).bearer_auth(token)).await
    }

    /// A `state ctl` command.
    async fn ctl(&self, args: &[&str]) -> (i32, String, String) {
        let target = self.cluster.states[0].rpc.to_string();
        let mut shell = tokio::process::Command::new(binary("state").unwrap());
        let output = shell.arg("ctl").args(args).args(["--target", &target]).output().await.unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
    }
}

async fn read(request: reqwest::RequestBuilder) -> Answer {
    let response = request.send().await.unwrap();
    let (status, headers) = (response.status(), response.headers());
    assert_eq!(headers.contains_key("www-authenticate"), status == StatusCode::UNAUTHORIZED);
    let after = headers.get("retry-after").map(|value| value.to_str().unwrap().parse().unwrap());
    (status, after, response.json().await.unwrap())
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// Of so many seconds ago, for an hour.
fn token(signer: &Signer, user: &str, age_s: u64) -> String {
    let (issued_s, expires_s) = (now_s() - age_s, now_s() + 3_600);
    signer.sign(&NewToken { user, device: None, issuer: "", audience: "", issued_s, expires_s }).unwrap()
}

/// The first answer to a token made now that is not 401.
async fn let_in_again(door: &Door, signer: &Signer, user: &str) -> Answer {
    let begin = Instant::now();
    loop {
        let answer = door.send(user, &token(signer, user, 0)).await;
        if answer.0 != StatusCode::UNAUTHORIZED {
            return answer;
        }
        assert!(begin.elapsed() < LONG, "a newer token is not taken");
    }
}

/// A secret in this folder, the key that it is, and what servers are told of it.
fn key(folder: &std::path::Path) -> (Signer, Vec<String>) {
    let file = folder.join("secret");
    std::fs::write(&file, "a secret, which is as long as one must be").unwrap();
    let sets = vec![
        format!("auth.keys=[{{ kid = \"k\", algorithm = \"HS256\", file = \"{}\" }}]", file.display()),
        "auth.leeway_s=0".to_owned(),
    ];
    (Signer::open(&KeyConfig { kid: "k".into(), algorithm: KeyAlgorithm::HS256, file }).unwrap(), sets)
}

async fn revoked_and_deleted(options: ClusterOptions) {
    let folder = tempfile::tempdir().unwrap();
    let (signer, keys) = key(folder.path());
    let door = Door::open(ClusterOptions { state_sets: keys.clone(), api_sets: keys, ..options });
    let (alice, zoe) = (token(&signer, "alice", 60), token(&signer, "z", 60));
    let refused = |answer: Answer| {
        assert_eq!((answer.0, answer.1), (StatusCode::UNAUTHORIZED, None), "{}", answer.2);
        assert_eq!(answer.2, json!({ "error": "the token was revoked" }));
    };

    // Nobody has logged in; then what the door was given counts all the same.
    assert_eq!(door.pull("alice:z", &alice).await.0, 200, "of somebody unknown nothing is revoked");
    assert_eq!(door.send("alice", &alice).await.2["seq"], 1);
    assert_eq!(door.ctl(&["revoke", "--user", "alice", "--device", "phone"]).await.1, "ended 0\n");
    assert_eq!(door.send("alice", &alice).await.2["seq"], 2, "a token of no device is not a device's");
    assert_eq!(door.ctl(&["revoke", "--user", "alice"]).await.1, "ended 0\n");
    refused(door.send("alice", &alice).await);
    refused(door.pull("alice:z", &alice).await);
    assert_eq!(door.pull("alice:z", &zoe).await.2["messages"].as_array().unwrap().len(), 2);
    let (status, _, answer) = let_in_again(&door, &signer, "alice").await;
    assert_eq!((status, &answer["seq"]), (StatusCode::OK, &json!(3)));

    // A user who is deleted leaves the messages to the other, and nothing to the next of that name.
    let before = token(&signer, "alice", 0);
    let (code, said, wrong) = door.ctl(&["user", "delete", "--user", "alice"]).await;
    assert_eq!((code, &*said, &*wrong), (0, "deleted, ended 0, left 0 groups, 1 chats\n", ""));
    refused(door.send("alice", &before).await);
    refused(door.pull("alice:z", &before).await);
    let (status, _, answer) = let_in_again(&door, &signer, "alice").await;
    assert_eq!((status, &answer["seq"]), (StatusCode::OK, &json!(4)));
    let seqs = |answer: &Answer| {
        let messages = answer.2["messages"].as_array().unwrap();
        messages.iter().map(|message| message["seq"].as_u64().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(seqs(&door.pull("alice:z", &token(&signer, "alice", 0)).await), [4]);
    assert_eq!(seqs(&door.pull("z:alice", &zoe).await), [1, 2, 3, 4]);

    let (code, _, said) = door.ctl(&["user", "delete", "--user", "nobody"]).await;
    assert!(code == 64 && said.contains("there is no user \"nobody\""), "{code} {said}");
}

#[tokio::test]
async fn a_token_that_is_revoked_opens_nothing_on_redis() {
    revoked_and_deleted(ClusterOptions { states: 2, ..ClusterOptions::default() }).await;
}

#[tokio::test]
async fn a_token_that_is_revoked_opens_nothing_on_redb() {
    revoked_and_deleted(ClusterOptions { embedded: true, ..ClusterOptions::default() }).await;
}

/// A door that takes older tokens than state servers keep revocations for would take revoked ones.
#[tokio::test]
async fn a_token_of_which_no_revocation_would_be_known_opens_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (signer, keys) = key(folder.path());
    let state_sets = [keys.clone(), vec!["auth.token_ttl_max_s=7200".to_owned()]].concat();
    let door =
        Door::open(ClusterOptions { embedded: true, state_sets, api_sets: keys, ..Default::default() });
    for (age_s, status) in [(7_000, StatusCode::OK), (10_000, StatusCode::UNAUTHORIZED)] {
        let alice = token(&signer, "alice", age_s);
        assert_eq!(door.send("alice", &alice).await.0, status, "{age_s}");
        assert_eq!(door.pull("alice:z", &alice).await.0, status, "{age_s}");
    }
}

/// However long this takes, in all there are no more than those at once and one a second.
#[tokio::test]
async fn a_user_has_one_limit_for_connections_and_door() {
    let state_sets = ["limits.user_messages_per_s=1", "limits.user_messages_burst=5"].map(str::to_owned);
    let door =
        Door::open(ClusterOptions { embedded: true, state_sets: state_sets.to_vec(), ..Default::default() });
    let target = Target::Gateway(vec![door.cluster.gateways[0].client.to_string()]);
    let options = Options { keep: Keep::Memory, ..Options::new("alice", "phone", target) };
    let (alice, _events) = tokio::time::timeout(LONG, Client::connect(options)).await.unwrap().unwrap();
    let begin = Instant::now();
    for seq in 1..=4 {
        assert_eq!(alice.send("z", "x").await.unwrap().seq, seq);
    }
    let mut stored = 4;
    let (after, answer) = loop {
        let (status, after, answer) = door.send("alice", "").await;
        if status == StatusCode::TOO_MANY_REQUESTS {
            break (after, answer);
        }
        stored += 1;
        assert_eq!((status, &answer["seq"]), (StatusCode::OK, &json!(stored)));
        assert!(stored <= 5 + begin.elapsed().as_secs() + 1, "{stored} in {:?}", begin.elapsed());
        assert!(begin.elapsed() < LONG, "it is never too fast");
    };
    assert_eq!(after, Some(1), "whole seconds, rounded up");
    assert!(answer["error"].as_str().unwrap().contains("Retry-After"), "{answer}");
    assert_eq!(door.send("bob", "").await.0, 200, "others have their own");
}
