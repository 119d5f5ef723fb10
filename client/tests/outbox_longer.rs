//! Messages that are longer than the server of this connection takes. Scripted; no I/O.

use std::time::{Duration, Instant};

use bytes::Bytes;
use client::outbox::{Action, Limits, Outbox, Outcome};
use proto::wire::{self, Code};

/// The messages that leave, by n and length, and the tickets that were refused.
fn drain(outbox: &mut Outbox) -> (Vec<(u64, usize)>, Vec<u64>) {
    let (mut sent, mut refused) = (Vec::new(), Vec::new());
    while let Some(action) = outbox.next_action() {
        match action {
            Action::Send(send) => sent.push((send.n, send.body.len())),
            Action::Done { ticket, outcome, .. } => {
                assert!(
                    matches!(outcome, Outcome::Refused { code: Code::MessageTooLarge, .. }),
                    "{outcome:?}"
                );
                refused.push(ticket.unwrap());
            }
            Action::Store { .. }
            | Action::StoreStream { .. }
            | Action::StoreAnswered { .. }
            | Action::Trouble { .. } => {}
        }
    }
    (sent, refused)
}

fn body(bytes: usize) -> Bytes {
    vec![b'x'; bytes].into()
}

#[test]
fn what_never_left_is_refused_and_the_rest_goes_out_in_order() {
    let now = Instant::now();
    let mut outbox = Outbox::new(Limits::default(), 1);
    // 32 get a number while there is no server, the others wait.
    for ticket in 1..=40 {
        outbox.submit(ticket, "a:b", body(if ticket % 4 == 0 { 2_000 } else { 10 }), now).unwrap();
    }
    outbox.bodies_up_to(1_000);
    outbox.connected(32, now);
    let (sent, refused) = drain(&mut outbox);
    assert_eq!(refused, (1..=10).map(|number| number * 4).collect::<Vec<_>>());
    assert_eq!(sent, (1..=30).map(|n| (n, 10)).collect::<Vec<_>>());
    assert_eq!((outbox.queued(), outbox.unanswered()), (0, 30));
    outbox.submit(41, "a:b", body(1_001), now).unwrap();
    outbox.submit(42, "a:b", body(1_000), now).unwrap();
    assert_eq!(drain(&mut outbox), (vec![(31, 1_000)], vec![41]));
}

#[test]
fn what_may_be_stored_is_sent_again_and_only_its_answer_decides() {
    let now = Instant::now();
    let mut outbox = Outbox::new(Limits::default(), 1);
    outbox.connected(32, now);
    outbox.submit(1, "a:b", body(2_000), now).unwrap();
    assert_eq!(drain(&mut outbox), (vec![(1, 2_000)], vec![]));
    outbox.disconnected();
    let now = now + Duration::from_secs(1);
    outbox.submit(2, "a:b", body(3_000), now).unwrap();
    outbox.submit(3, "a:b", body(10), now).unwrap();
    outbox.bodies_up_to(1_000);
    outbox.connected(32, now);
    let stream = {
        let mut sends = Vec::new();
        while let Some(action) = outbox.next_action() {
            match action {
                Action::Send(send) => sends.push(send),
                Action::Done { .. } => panic!("{action:?}"),
                _ => {}
            }
        }
        // The second has its number in between: the server refuses it, or has to.
        assert_eq!(sends.iter().map(|send| send.n).collect::<Vec<_>>(), [1, 2, 3]);
        sends[0].stream
    };
    let ack = wire::SendAck { stream, n: 1, chat: "a:b".into(), seq: 1, ..Default::default() };
    outbox.ack(ack, now);
    let mut done = std::iter::from_fn(|| outbox.next_action());
    assert!(done.any(|action| matches!(
        action,
        Action::Done { ticket: Some(1), outcome: Outcome::Sent { seq: 1, .. }, .. }
    )));
}

#[test]
fn a_server_that_does_not_say_takes_everything() {
    let now = Instant::now();
    let mut outbox = Outbox::new(Limits::default(), 1);
    outbox.bodies_up_to(0);
    outbox.connected(32, now);
    outbox.submit(1, "a:b", body(32_768), now).unwrap();
    assert_eq!(drain(&mut outbox), (vec![(1, 32_768)], vec![]));
}
