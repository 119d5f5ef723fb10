//! A user who is deleted, through real processes: what ends, what stays for the others, and what somebody finds who takes the
//! name next.
//!
//! Trap: that somebody sees nothing is shown by what they see instead, sent later, never by waiting.

use std::time::Duration;

use client::{
    Body, Client, ConnectError, Content, Ended, Event, Events, Keep, Message, Options, Target, change,
};
use loadtest::supervisor::{Cluster, ClusterOptions, binary};
use proto::state::state_client::StateClient;
use proto::state::{PullReply, PullRequest};
use proto::wire::{Code, GroupAction, Role};

const PATIENCE: Duration = Duration::from_secs(60);

struct Device {
    client: Client,
    events: Events,
}

impl Device {
    async fn login(cluster: &Cluster, gateway: usize, user: &str, device: &str) -> Device {
        let target = Target::Gateway(vec![cluster.gateways[gateway].client.to_string()]);
        let options = Options { keep: Keep::Memory, ..Options::new(user, device, target) };
        let login = tokio::time::timeout(PATIENCE, Client::connect(options));
        let (client, events) = login.await.expect("a login in time").unwrap();
        Device { client, events }
    }

    async fn next(&mut self) -> Event {
        let next = tokio::time::timeout(PATIENCE, self.events.next());
        next.await.expect("something happens").expect("an event")
    }

    /// The next message. Nothing is missing in between.
    async fn message(&mut self) -> Message {
        loop {
            match self.next().await {
                Event::Message(message) => {
                    self.events.confirm(&message);
                    return message;
                }
                other @ (Event::Gap { .. } | Event::HistoryLost { .. } | Event::Ended(_)) => {
                    panic!("not in this story: {other:?}")
                }
                _ => {}
            }
        }
    }

    /// Chat and seq of the messages up to that text, without notes to oneself.
    async fn until(&mut self, text: &str) -> Vec<(String, u64)> {
        let mut seen = Vec::new();
        loop {
            let message = self.message().await;
            if &*message.chat != "alice:alice" {
                seen.push((message.chat.to_string(), message.seq));
            }
            if message.body == text {
                return seen;
            }
        }
    }

    async fn ended(&mut self) -> Ended {
        loop {
            if let Event::Ended(ended) = self.next().await {
                return ended;
            }
        }
    }

    async fn send(&self, chat: &str, body: impl Into<Body>) -> u64 {
        let sent = tokio::time::timeout(PATIENCE, self.client.send(chat, body));
        sent.await.expect("an answer in time").expect("it is accepted").seq
    }
}

async fn pull(cluster: &Cluster, reader: &str, chat: &str) -> PullReply {
    let mut state = StateClient::connect(format!("http://{}", cluster.states[0].rpc)).await.unwrap();
    let request = PullRequest { reader: reader.into(), chat: chat.into(), ..PullRequest::default() };
    state.pull(request).await.unwrap().into_inner()
}

/// A `state ctl user delete`: exit code and what it says.
async fn delete(cluster: &Cluster, server: usize, user: &str) -> (i32, String) {
    let target = cluster.states[server].rpc.to_string();
    let mut shell = tokio::process::Command::new(binary("state").unwrap());
    shell.args(["ctl", "user", "delete", "--user", user, "--target", &target]);
    let output = shell.output().await.unwrap();
    (output.status.code().unwrap(), String::from_utf8(output.stdout).unwrap())
}

fn seqs(page: &PullReply) -> Vec<u64> {
    page.messages.iter().map(|message| message.seq).collect()
}

/// What a message changes in its group.
fn action(message: &Message) -> GroupAction {
    match message.body.content() {
        Content::Group(change) => change.action(),
        other => panic!("{other:?}"),
    }
}

async fn alice_goes_and_another_comes(options: ClusterOptions) {
    let cluster = Cluster::start(options).unwrap();
    // On every gateway, and so on every state server.
    let last = cluster.gateways.len() - 1;
    let mut alice = Device::login(&cluster, 0, "alice", "phone").await;
    let mut desk = Device::login(&cluster, last, "alice", "desk").await;
    let mut bob = Device::login(&cluster, last, "bob", "phone").await;
    let dan = Device::login(&cluster, 0, "dan", "phone").await;
    for text in ["one", "two"] {
        alice.send("bob", text).await;
    }
    bob.send("alice", "three").await;
    alice.send("alice", "a note").await;
    let members = [("bob", Role::Member), ("dan", Role::Member)];
    let rooks = alice.client.create_group("Rooks", &members).await.unwrap().chat.to_string();
    dan.send(&rooks, "hello").await;
    bob.until("hello").await;

    let (code, said) = delete(&cluster, cluster.states.len() - 1, "alice").await;
    assert_eq!((code, &*said), (0, "deleted, ended 2, left 1 groups, 3 chats\n"));
    for device in [&mut alice, &mut desk] {
        assert!(matches!(device.ended().await, Ended::Kicked { code: Code::TokenRevoked, .. }));
    }

    // For the others: her group has another owner, her messages are where they were, and may be answered.
    let inherited = bob.message().await;
    assert_eq!((action(&inherited), inherited.seq, &*inherited.sender), (GroupAction::GroupRole, 3, "alice"));
    let left = bob.message().await;
    assert_eq!((action(&left), left.seq), (GroupAction::GroupLeave, 4));
    let group = bob.client.group(&rooks).await.unwrap();
    let roles: Vec<_> = group.members.iter().map(|member| (&*member.user, member.role())).collect();
    assert_eq!(roles, [("bob", Role::Owner), ("dan", Role::Member)]);
    assert_eq!(seqs(&pull(&cluster, "bob", "alice:bob").await), [1, 2, 3]);
    assert_eq!(bob.send("alice", "are you there?").await, 4);

    // Whoever takes the name next is told what came behind it, and nothing else.
    let mut next = Device::login(&cluster, 0, "alice", "phone").await;
    let first = next.message().await;
    assert_eq!((&*first.chat, first.seq, &first.body[..]), ("alice:bob", 4, &b"are you there?"[..]));
    assert_eq!(seqs(&pull(&cluster, "alice", "alice:bob").await), [4]);
    assert_eq!(seqs(&pull(&cluster, "alice", "alice:alice").await), Vec::<u64>::new());
    assert_eq!(next.send("alice", "a note of mine").await, 2);
    let edit = next.client.send("bob", Body::edit(1, "not mine")).await;
    assert!(format!("{edit:?}").contains("BadChange"), "{edit:?}");
    // Every server pushes to the new one.
    for (who, text, place) in
        [(&bob, "by one way", ("alice:bob", 5)), (&dan, "by the other", ("alice:dan", 1))]
    {
        who.send("alice", text).await;
        assert_eq!(next.until(text).await, [(place.0.to_owned(), place.1)]);
    }
    let again = Body::group(&change(GroupAction::GroupAdd, "", &[("alice", Role::Member)]));
    assert_eq!(bob.send(&rooks, again).await, 5);
    dan.send(&rooks, "welcome").await;
    assert_eq!(next.until("welcome").await, [(rooks.clone(), 5), (rooks.clone(), 6)]);

    assert_eq!(delete(&cluster, 0, "carol").await.0, 64, "who never was");
    assert_eq!(delete(&cluster, 0, "a:b").await.0, 64);
    // And once more, as after a try that did not get to its end.
    let (code, said) = delete(&cluster, 0, "alice").await;
    assert_eq!((code, &*said), (0, "deleted, ended 1, left 1 groups, 4 chats\n"));
    assert!(matches!(next.ended().await, Ended::Kicked { code: Code::TokenRevoked, .. }));
}

#[tokio::test]
async fn a_user_is_deleted_embedded() {
    alice_goes_and_another_comes(ClusterOptions { embedded: true, ..ClusterOptions::default() }).await;
}

#[tokio::test]
async fn a_user_is_deleted_by_any_of_two_state_servers() {
    alice_goes_and_another_comes(ClusterOptions { gateways: 2, states: 2, ..ClusterOptions::default() })
        .await;
}

/// Devices log in all the while: whoever got in before is put out, and nobody gets in who is half of the old user.
#[tokio::test]
async fn logins_beside_it_are_refused_or_of_the_new_user() {
    let cluster =
        Cluster::start(ClusterOptions { gateways: 2, states: 2, ..ClusterOptions::default() }).unwrap();
    let mut bob = Device::login(&cluster, 1, "bob", "phone").await;
    let alice = Device::login(&cluster, 0, "alice", "phone").await;
    alice.send("bob", "before").await;
    bob.until("before").await;
    let logins = (0..20).map(|n| {
        let target = Target::Gateway(vec![cluster.gateways[n % 2].client.to_string()]);
        let options = Options { keep: Keep::Memory, ..Options::new("alice", format!("d{n}"), target) };
        tokio::spawn(async move { tokio::time::timeout(PATIENCE, Client::connect(options)).await })
    });
    let logins: Vec<_> = logins.collect();
    assert_eq!(delete(&cluster, 0, "alice").await.0, 0);
    let mut devices = Vec::new();
    for login in logins {
        match login.await.unwrap().expect("it is answered") {
            Ok((client, events)) => devices.push(Device { client, events }),
            Err(ConnectError::Ended(Ended::Kicked { code, .. })) => assert_eq!(code, Code::TokenRevoked),
            Err(error) => panic!("{error}"),
        }
    }
    bob.send("alice", "behind it").await;
    for device in &mut devices {
        // Put out, or shown what came behind it and nothing else that can be shown to the new user.
        let mut before = false;
        loop {
            match device.next().await {
                Event::Ended(Ended::Kicked { code, .. }) => break assert_eq!(code, Code::TokenRevoked),
                Event::Message(message) if message.body == "before" => before = true,
                Event::Message(message) => {
                    assert_eq!(message.body, "behind it");
                    break assert!(!before, "half of the old user");
                }
                _ => {}
            }
        }
    }
}
