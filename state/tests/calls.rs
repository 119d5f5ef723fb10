//! The state service as other servers call it, against real processes: what comes in this way is pushed to whoever is
//! connected, and refused like what clients send.

use client::{Client, Event, Keep, Options, Target};
use loadtest::supervisor::{Cluster, ClusterOptions};
use proto::state::state_client::StateClient;
use proto::state::{PullRequest, Refusal, SendRequest, Why};
use tonic::Code;

fn message(sender: &str, chat: &str, n: u64) -> SendRequest {
    let body = format!("message {n}").into();
    SendRequest { sender: sender.into(), chat: chat.into(), body, stream: 9, n, ..SendRequest::default() }
}

#[tokio::test]
async fn calls_store_push_and_read() {
    let cluster = Cluster::start(ClusterOptions::default()).unwrap();
    let target = Target::Gateway(vec![cluster.gateways[0].client.to_string()]);
    let options = Options { keep: Keep::Memory, ..Options::new("bob", "phone", target) };
    let (_bob, mut events) = Client::connect(options).await.unwrap();
    let mut state = StateClient::connect(format!("http://{}", cluster.states[0].rpc)).await.unwrap();

    let stored = state.send(message("alice", "bob:alice", 1)).await.unwrap().into_inner();
    assert_eq!((stored.chat.as_str(), stored.seq), ("alice:bob", 1));
    let again = state.send(message("alice", "alice:bob", 1)).await.unwrap().into_inner();
    assert_eq!(again, stored, "one id, one answer");
    let pushed = loop {
        if let Event::Message(message) = events.next().await.unwrap() {
            break message;
        }
    };
    assert_eq!((pushed.seq, &*pushed.sender, &pushed.body[..]), (1, "alice", &b"message 1"[..]));
    for n in 2..=5 {
        state.send(message("alice", "alice:bob", n)).await.unwrap();
    }
    let pull = |reader: &str, cursor, limit| PullRequest {
        reader: reader.into(),
        chat: "alice:bob".into(),
        cursor,
        limit,
        ..PullRequest::default()
    };
    let page = state.pull(pull("bob", 1, 3)).await.unwrap().into_inner();
    assert_eq!(page.messages.iter().map(|m| m.seq).collect::<Vec<_>>(), [2, 3, 4]);
    assert_eq!((page.has_more, page.head), (true, 5));

    let code = async |state: &mut StateClient<_>, request| state.send(request).await.unwrap_err().code();
    let named = |name: &str, body: &'static str| SendRequest {
        stream: 0,
        name: name.into(),
        body: body.into(),
        ..message("alice", "alice:bob", 0)
    };
    let first = state.send(named("x", "named")).await.unwrap().into_inner();
    assert_eq!((first.seq, &state.send(named("x", "named")).await.unwrap().into_inner()), (6, &first));
    assert_eq!(code(&mut state, named("x", "another")).await, Code::AlreadyExists);
    assert_eq!(code(&mut state, named(&"x".repeat(65), "named")).await, Code::InvalidArgument);
    assert_eq!(code(&mut state, SendRequest { n: 6, ..named("x", "named") }).await, Code::InvalidArgument);
    for seq in 7..=8 {
        assert_eq!(state.send(named("", "twice")).await.unwrap().into_inner().seq, seq, "it has no id");
    }
    let status = state.send(message("eve", "alice:bob", 1)).await.unwrap_err();
    let told: Refusal = prost::Message::decode(status.details()).unwrap();
    assert_eq!(told, Refusal { why: Why::NotAMember as i32, retry_after_ms: 0 });

    assert_eq!(code(&mut state, message("eve", "alice:bob", 1)).await, Code::PermissionDenied);
    assert_eq!(code(&mut state, message("alice", "alice", 1)).await, Code::InvalidArgument);
    assert_eq!(code(&mut state, message("alice", "alice:bob", 9)).await, Code::FailedPrecondition);
    let long = SendRequest { body: vec![0; 32_769].into(), ..message("alice", "alice:bob", 6) };
    assert_eq!(code(&mut state, long).await, Code::OutOfRange);
    assert_eq!(state.pull(pull("eve", 0, 1)).await.unwrap_err().code(), Code::PermissionDenied);
    assert_eq!(state.pull(pull("bob", 0, 101)).await.unwrap_err().code(), Code::InvalidArgument);
}
