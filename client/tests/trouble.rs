//! A server that has a fault with a chat: the application is told once, and everything is tried again until there is none.

use std::time::{Duration, Instant};

use client::inbox::{self, Inbox};
use client::outbox::{self, Outbox, Outcome};
use proto::wire::{self, Code};

const CHAT: &str = "a:b";

fn fault(error: wire::Error) -> wire::Error {
    wire::Error { code: Code::Internal.into(), text: "a row is damaged".into(), ..error }
}

#[test]
fn a_message_is_sent_again_until_the_fault_is_mended() {
    let mut now = Instant::now();
    let mut outbox = Outbox::new(outbox::Limits::default(), 1);
    outbox.connected(32, now);
    outbox.submit(1, CHAT, bytes::Bytes::from_static(b"hello"), now).unwrap();
    let mut told = 0;
    for round in 0..4 {
        let mut sent = None;
        while let Some(action) = outbox.next_action() {
            match action {
                outbox::Action::Send(send) => sent = Some(send),
                outbox::Action::Trouble { chat, text } => {
                    assert_eq!((&*chat, text.as_str()), (CHAT, "a row is damaged"));
                    told += 1;
                }
                outbox::Action::Done { .. } => panic!("nothing is decided"),
                _ => {}
            }
        }
        let send = sent.expect("it is tried again");
        if round == 3 {
            let ack = wire::SendAck {
                chat: CHAT.into(),
                stream: send.stream,
                n: send.n,
                seq: 1,
                history: 9,
                ..Default::default()
            };
            outbox.ack(ack, now);
            break;
        }
        let error = wire::Error { chat: CHAT.into(), stream: send.stream, n: send.n, ..Default::default() };
        outbox.error(fault(error), Duration::ZERO, now);
        now = outbox.next_deadline().expect("it will be").max(now + Duration::from_secs(1));
        outbox.tick(now);
    }
    assert_eq!(told, 1, "once");
    let done = std::iter::from_fn(|| outbox.next_action());
    let is_sent = |action: &outbox::Action| {
        matches!(action, outbox::Action::Done { outcome: Outcome::Sent { seq: 1, .. }, .. })
    };
    assert_eq!(done.filter(is_sent).count(), 1);
}

#[test]
fn what_is_missing_is_asked_for_again_until_the_fault_is_mended() {
    let mut now = Instant::now();
    let mut inbox = Inbox::restore(inbox::Limits::default(), [(CHAT, 9, 0, 0)], true);
    inbox.connected(now);
    let (mut told, mut rounds, mut shown) = (0, 0, Vec::new());
    while shown.is_empty() {
        let Some(action) = inbox.next_action() else {
            now = inbox.next_deadline().expect("it goes on");
            inbox.tick(now);
            continue;
        };
        match action {
            inbox::Action::Sync(sync) => {
                let head =
                    wire::ChatHead { chat: CHAT.into(), history: 9, head: 1, first: 1, ..Default::default() };
                let ack = wire::SyncAck { request: sync.request, chats: vec![head], ..Default::default() };
                inbox.sync_ack(ack, now);
            }
            inbox::Action::Pull(pull) if rounds < 3 => {
                rounds += 1;
                let error = wire::Error { request: pull.request, ..Default::default() };
                inbox.error(&fault(error), Duration::ZERO, now);
            }
            inbox::Action::Pull(pull) => {
                let message =
                    wire::Message { seq: 1, sender: "b".into(), body: "hello".into(), ..Default::default() };
                let ack = wire::PullAck {
                    request: pull.request,
                    chat: CHAT.into(),
                    history: 9,
                    messages: vec![message],
                    head: 1,
                    first: 1,
                    ..Default::default()
                };
                inbox.pull_ack(ack, now);
            }
            inbox::Action::Trouble { .. } => told += 1,
            inbox::Action::Deliver(message) => shown.push(message.seq),
            inbox::Action::Gap { .. } => panic!("nothing is given up"),
            _ => {}
        }
    }
    assert_eq!((told, shown), (1, vec![1]));
}
