//! The bridge without its tasks: batches of workers in, what goes up on each stream and down to each worker out.
//!
//! Trap: a stream's next message may be a ping or the news of placed batches; batches come behind them.

use bytes::BytesMut;
use crossbeam_channel::bounded;
use prometheus_client::registry::Registry;
use prost::Message;
use proto::frame;
use proto::link::{DownDone, UpBatch as LinkBatch};
use proto::wire;

use super::*;
use crate::batch::UpFrame as WorkerFrame;
use crate::id::{Place, connection_id};
use crate::sys::EventFd;
use crate::wake::Starved;

const INCARNATION: u32 = 3;

struct Rig {
    bridge: Arc<Bridge>,
    down: Receiver<Down>,
}

impl Rig {
    fn new() -> Rig {
        let (sender, down) = bounded(64);
        let wake = || Wake::new(EventFd::new().unwrap());
        let outbox = Outbox { down: sender, wake: wake(), starved: Starved::new() };
        let (_, up) = bounded(1);
        let metrics = Metrics::new(1, &mut Registry::default());
        let bridge = Bridge::new(Arc::default(), metrics, INCARNATION, vec![outbox], up, wake());
        Rig { bridge, down }
    }

    fn open(&self, state_id: &str) -> StreamKey {
        self.bridge.stream_opened(state_id, 1 << 20, Arc::default())
    }

    /// Everything that this stream has to say now.
    fn said(&self, key: StreamKey) -> (Vec<DownDone>, Vec<LinkBatch>) {
        let (mut dones, mut batches) = (Vec::new(), Vec::new());
        while let Some(next) = self.bridge.next_up(key) {
            match next.kind {
                Some(up::Kind::Done(done)) => dones.push(done),
                Some(up::Kind::Batch(batch)) => batches.push(batch),
                _ => {}
            }
        }
        (dones, batches)
    }
}

fn place(slot: u32) -> u64 {
    connection_id(INCARNATION, 0, Place { slot, generation: 0 })
}

fn pushed(slot: u32) -> Gone {
    Gone { connection: place(slot), user: 7, pushed: true, ..Gone::default() }
}

/// Of the first batch of a stream.
fn ticket(stream: u64) -> Ticket {
    Ticket { stream, number: 1, awaited: false }
}

/// A batch of a worker that has placed its part of these, with what of each was gone.
fn placed(parts: Vec<(Ticket, Vec<Gone>)>) -> UpBatch {
    let placed = parts.iter().map(|(ticket, gone)| Placed { ticket: *ticket, gone: gone.len() }).collect();
    let gone = parts.into_iter().flat_map(|(_, gone)| gone).collect();
    UpBatch { gone, placed, ..UpBatch::default() }
}

#[test]
fn what_was_gone_is_told_to_whoever_sent_it_before_its_batch_counts_as_placed() {
    let rig = Rig::new();
    let (one, two) = (rig.open("s-1"), rig.open("s-2"));
    for stream in [one, two] {
        rig.bridge.link().lock().placing(stream, 1, 1);
    }
    rig.bridge.take(
        placed(vec![(ticket(one), vec![pushed(1), pushed(2)]), (ticket(two), vec![pushed(3)])]),
        &mut Vec::new(),
    );
    let done = |gone| vec![DownDone { number: 1, gone, also: Vec::new() }];
    assert_eq!(rig.said(one).0, done(vec![pushed(1), pushed(2)]));
    assert_eq!(rig.said(two).0, done(vec![pushed(3)]));
}

#[tokio::test]
async fn a_login_whose_answer_found_nobody_is_told_as_a_departure_whatever_breaks() {
    let rig = Rig::new();
    let one = rig.open("s-1");
    rig.bridge.link().lock().placing(one, 1, 1);
    let bound = Gone { connection: place(5), user: 9, device: 1, binding: 2, pushed: false };
    rig.bridge.take(placed(vec![(ticket(one), vec![bound])]), &mut Vec::new());
    let is_departure = |batches: &[LinkBatch]| {
        let frames: Vec<_> = batches.iter().flat_map(|batch| &batch.frames).collect();
        assert_eq!(
            frames.iter().map(|f| (f.connection, f.user, f.command)).collect::<Vec<_>>(),
            [(place(5), 9, 0)]
        );
    };
    is_departure(&rig.said(one).1);
    // It was on its way when the stream broke. Nobody is there for a while; then somebody is.
    rig.bridge.stream_broken(one).await;
    let two = rig.open("s-2");
    let (_, batches) = rig.said(two);
    is_departure(&batches);
    rig.bridge.acked(two, batches[0].number, &[]);
    assert_eq!(rig.bridge.link().lock().pending(), 0);
    assert!(rig.down.try_recv().is_err(), "and nobody is answered");
}

#[tokio::test]
async fn what_no_server_can_take_is_answered_with_what_the_client_needs_to_know() {
    let rig = Rig::new();
    let send = wire::Send {
        stream: 5,
        n: 6,
        chat: "a:b".into(),
        body: Bytes::from_static(b"hello"),
        ..Default::default()
    };
    let sync = wire::Sync { request: 8, ..wire::Sync::default() };
    let pull = wire::Pull { request: 9, ..wire::Pull::default() };
    let commands: [(Command, Vec<u8>); 6] = [
        (Command::Send, send.encode_to_vec()),
        (Command::Sync, sync.encode_to_vec()),
        (Command::Pull, pull.encode_to_vec()),
        (Command::PushAck, Vec::new()),
        (Command::Read, Vec::new()),
        (Command::Login, Vec::new()),
    ];
    let mut batch = UpBatch { bodies: BytesMut::new(), ..UpBatch::default() };
    for (command, body) in &commands {
        batch.bodies.extend_from_slice(body);
        let (command, body_bytes) = (*command as u8, body.len() as u32);
        let frame = WorkerFrame { connection: place(1), user: 7, device: 1, binding: 1, command, body_bytes };
        batch.frames.push(frame);
    }
    let mut refused = Vec::new();
    rig.bridge.take(batch, &mut refused);
    let errors: Vec<wire::Error> = refused
        .iter()
        .map(|item| {
            let cut = frame::cut(&item.frames, 4096).unwrap().unwrap();
            let error = wire::Error::decode(cut.body).unwrap();
            assert_eq!((error.code(), item.close), (Code::Unavailable, error.closing));
            assert!(error.retry_after_ms >= 250);
            error
        })
        .collect();
    let told: Vec<_> =
        errors.iter().map(|e| (e.command, e.stream, e.n, &*e.chat, e.request, e.closing)).collect();
    let number = |command: Command| command as u32;
    assert_eq!(
        told,
        [
            (number(Command::Send), 5, 6, "a:b", 0, false),
            (number(Command::Sync), 0, 0, "", 8, false),
            (number(Command::Pull), 0, 0, "", 9, false),
            (number(Command::Login), 0, 0, "", 0, true),
        ],
        "PushAck and Read are never answered"
    );
}
