//! A worker without its thread: real sockets, turns made one by one.

use std::io::{Read, Write};
use std::net::TcpStream;

use bytes::Bytes;
use crossbeam_channel::{Sender, bounded};
use prometheus_client::registry::Registry;
use prost::Message;
use proto::{Command, frame, wire};

use super::*;
use crate::batch::{DownItem, Ticket};
use crate::config::Limits;
use crate::sys::EventFd;

mod attack;
mod slow_reader;
mod split;
mod tokens;

struct Rig {
    worker: Box<Worker>,
    events: Vec<Event>,
    up: Receiver<UpBatch>,
    /// A worker stops without it.
    down: Sender<Down>,
    burst: Arc<Burst>,
}

impl Rig {
    fn new(clients_bytes_max: usize) -> Rig {
        Rig::with(Config::default(), clients_bytes_max)
    }

    fn with(config: Config, clients_bytes_max: usize) -> Rig {
        let limits = Limits { connections_max: 1000, ..config.limits.clone() };
        let config = Arc::new(config);
        let (up_sender, up) = bounded(16);
        let (down_sender, down) = bounded(1);
        let burst = Arc::new(Burst::new(clients_bytes_max, 1 << 20));
        let shared = Shared {
            config,
            admission: Arc::new(Admission::new(&limits)),
            burst: burst.clone(),
            metrics: Metrics::new(1, &mut Registry::default()),
            up: up_sender,
            up_wake: Wake::new(EventFd::new().unwrap()),
        };
        let wake = Wake::new(EventFd::new().unwrap());
        let inbox = Inbox { down, wake, starved: Starved::new() };
        let worker = Worker::new(0, 1, "127.0.0.1:0".parse().unwrap(), 1000, shared, inbox).unwrap();
        Rig { worker, events: sys::event_buffer(64), up, down: down_sender, burst }
    }

    fn connect(&self) -> TcpStream {
        let client = TcpStream::connect(self.worker.address().unwrap()).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        client
    }

    /// A client that is logged in as this user, and its connection's id.
    fn bound(&mut self, user: u64) -> (TcpStream, u64) {
        let client = self.connect();
        self.bind(client, user)
    }

    fn bind(&mut self, mut client: TcpStream, user: u64) -> (TcpStream, u64) {
        client.write_all(&login()).unwrap();
        // Others may be leaving meanwhile.
        let frame = loop {
            self.turn_until(|rig| !rig.up.is_empty());
            let mut frames = self.up.try_iter().flat_map(|batch| batch.frames);
            if let Some(frame) = frames.find(|frame| frame.command == Command::Login as u8) {
                break frame;
            }
        };
        let bind = Some(proto::link::Bind { user, device: 1, binding: 1, valid_ms: 0 });
        let frames = frame::encode(Command::LoginAck, &wire::LoginAck::default());
        let (connection, login) = (frame.connection, frame.binding);
        self.worker.deliver(DownItem { connection, user, frames, bind, login, ..DownItem::default() });
        self.turn_until(|rig| rig.worker.dirty.is_empty());
        let mut ack = [0; 4];
        client.read_exact(&mut ack).unwrap();
        assert_eq!(ack, [0, 0, 0, Command::LoginAck as u8]);
        (client, connection)
    }

    /// One turn, which does not wait for anything to happen.
    fn step(&mut self) {
        self.worker.inbox.wake.wake();
        assert!(self.worker.turn(&mut self.events).unwrap());
    }

    /// The clock goes on by so much.
    fn pass(&mut self, ms: u64) {
        self.worker.started -= Duration::from_millis(ms);
    }

    /// Turns until `is_so`, at most for a minute.
    fn turn_until(&mut self, is_so: impl Fn(&Rig) -> bool) {
        let begin = Instant::now();
        while !is_so(self) {
            assert!(begin.elapsed() < Duration::from_secs(60), "it never came to that");
            assert!(self.worker.turn(&mut self.events).unwrap());
        }
    }
}

fn login() -> Vec<u8> {
    frame::encode(Command::Login, &wire::Login { user: "alice".to_owned(), ..Default::default() }).to_vec()
}

#[test]
fn a_login_that_is_there_goes_up_with_the_turn_that_accepts() {
    let mut rig = Rig::new(1 << 20);
    let mut client = rig.connect();
    client.write_all(&login()).unwrap();
    rig.turn_until(|rig| rig.worker.table.count() == 1);
    let batch = rig.up.try_recv().expect("the same turn has sent it");
    assert_eq!((batch.frames.len(), batch.frames[0].command), (1, Command::Login as u8));
    assert!(rig.burst.batches_bytes() > 0);
    drop(batch);
    assert_eq!(rig.burst.batches_bytes(), 0);
    // And it is watched: its end is seen.
    drop(client);
    rig.turn_until(|rig| rig.worker.table.count() == 0);
}

#[test]
fn a_drain_tells_everybody_and_few_at_a_time() {
    let mut config = Config::default();
    config.workers.writes_per_turn_max = 2;
    let mut rig = Rig::with(config, 1 << 20);
    let mut clients: Vec<TcpStream> = (1..=7).map(|user| rig.bound(user).0).collect();
    drop(clients.remove(3));
    rig.turn_until(|rig| rig.worker.table.count() == 6);
    rig.down.send(Down::Drain { within_ms: 5_000 }).unwrap();
    for _ in 0..20 {
        rig.step();
        assert!(rig.worker.dirty.len() <= 2);
    }
    assert!(rig.worker.drain.is_none());
    for client in &mut clients {
        let mut header = [0; 4];
        client.read_exact(&mut header).unwrap();
        assert_eq!(header[3], Command::GoAway as u8);
    }
}

#[test]
fn whoever_is_logged_in_is_told_to_sync_and_few_at_a_time() {
    let limits = Limits { resyncs_per_s: 20, login_ms_max: 0, ..Limits::default() };
    let mut rig = Rig::with(Config { limits, ..Config::default() }, 1 << 20);
    let mut clients: Vec<TcpStream> = (1..=5).map(|user| rig.bound(user).0).collect();
    let stranger = rig.connect();
    rig.turn_until(|rig| rig.worker.table.count() == 6);
    rig.down.send(Down::Resync).unwrap();
    for told in [2, 4, 5] {
        rig.step();
        assert_eq!(rig.worker.stats().resyncs.get(), told);
        rig.pass(100);
    }
    rig.turn_until(|rig| rig.worker.resync.is_none());
    for client in &mut clients {
        let mut header = [0; 4];
        client.read_exact(&mut header).unwrap();
        assert_eq!(header[3], Command::Resync as u8);
    }
    assert_eq!(rig.worker.stats().resyncs.get(), 5, "who has not logged in will Sync by itself");
    drop(stranger);
}

#[test]
fn a_worker_whose_bridge_is_gone_stops() {
    let mut rig = Rig::new(1 << 20);
    let (mut client, _) = rig.bound(1);
    rig.down = bounded(1).0;
    rig.worker.inbox.wake.wake();
    assert!((0..100).any(|_| !rig.worker.turn(&mut rig.events).unwrap()), "it goes on");
    let mut told = Vec::new();
    client.read_to_end(&mut told).unwrap();
    assert_eq!(told[3], Command::Error as u8);
}

#[test]
fn in_a_rush_newcomers_are_let_in_together() {
    // Longer than this test may take.
    const RUSH_MS: u64 = 60_000;
    let workers = crate::config::Workers { rush_ms: RUSH_MS, ..Default::default() };
    let limits = crate::config::Limits { login_ms_max: 0, ..Default::default() };
    let mut rig = Rig::with(Config { workers, limits, ..Config::default() }, 1 << 20);
    let metrics = rig.worker.shared.metrics.clone();
    let batch = rig.worker.shared.config.link.login_batch_frames_max as u64;
    metrics.bridge.logins_waiting.set(batch);
    let mut clients = vec![rig.connect()];
    rig.turn_until(|rig| rig.worker.table.count() == 1);
    // The door is shut from then on, whoever comes.
    clients.extend([rig.connect(), rig.connect()]);
    (0..10).for_each(|_| rig.step());
    assert_eq!((rig.worker.table.count(), rig.worker.door.opens_ms().is_some()), (1, true));
    // It opens by the clock alone, for both. Meanwhile the rush has ended: the next one is let in at once again.
    metrics.bridge.logins_waiting.set(batch - 1);
    rig.pass(RUSH_MS);
    rig.turn_until(|rig| rig.worker.table.count() > 1);
    assert_eq!((rig.worker.table.count(), rig.worker.door.opens_ms()), (3, None));
    clients.push(rig.connect());
    rig.turn_until(|rig| rig.worker.table.count() == 4);
}

#[test]
fn a_crowd_that_does_not_log_in_is_let_in_together() {
    // Longer than this test may take.
    const RUSH_MS: u64 = 60_000;
    let workers = crate::config::Workers { rush_ms: RUSH_MS, ..Default::default() };
    let limits = crate::config::Limits { login_ms_max: 0, idle_ms_max: 250_000, ..Default::default() };
    let link = crate::config::Link { login_batch_frames_max: 3, ..Default::default() };
    let mut rig = Rig::with(Config { workers, limits, link, ..Config::default() }, 1 << 20);
    let metrics = rig.worker.shared.metrics.clone();
    let mut clients = Vec::new();
    let mut one_more_is_let_in = |rig: &mut Rig| {
        clients.push(rig.connect());
        rig.turn_until(|rig| rig.worker.table.count() == clients.len());
    };
    (0..3).for_each(|_| one_more_is_let_in(&mut rig));
    assert_eq!(rig.worker.door.opens_ms(), None, "three came, and nobody has looked since");
    one_more_is_let_in(&mut rig);
    // The door is shut from then on, whoever comes, until the clock opens it for both.
    let waiting = [rig.connect(), rig.connect()];
    (0..10).for_each(|_| rig.step());
    assert_eq!((rig.worker.table.count(), rig.worker.door.opens_ms().is_some()), (4, true));
    rig.pass(RUSH_MS);
    rig.turn_until(|rig| rig.worker.table.count() == 6);
    clients.extend(waiting);
    // Few came in that time: the next one is let in at once again.
    rig.pass(RUSH_MS);
    rig.turn_until(|rig| rig.worker.door.opens_ms().is_none());
    // So are others when somebody logs in meanwhile.
    for logins in 1..=8 {
        metrics.bridge.logins_up.set(logins);
        clients.push(rig.connect());
        rig.turn_until(|rig| rig.worker.table.count() == clients.len());
    }
    assert_eq!(rig.worker.door.opens_ms(), None);
}

#[test]
fn half_a_frame_is_charged_until_it_is_whole_or_gone() {
    let mut rig = Rig::new(1 << 20);
    let login = login();
    let (mut one, mut two) = (rig.connect(), rig.connect());
    one.write_all(&login[..5]).unwrap();
    two.write_all(&login[..5]).unwrap();
    rig.turn_until(|rig| rig.burst.clients_bytes() >= 2 * 5);
    one.write_all(&login[5..]).unwrap();
    rig.turn_until(|rig| !rig.up.is_empty());
    drop(two);
    rig.turn_until(|rig| rig.burst.clients_bytes() == 0);
    assert_eq!(rig.worker.table.count(), 1);
    drop(one);
    rig.turn_until(|rig| rig.worker.table.count() == 0);
}

#[test]
fn without_room_half_a_frame_is_refused_and_told_when_to_come_back() {
    let mut rig = Rig::new(16 * 100);
    let mut client = rig.connect();
    // A header that announces 1,000 bytes, and 200 of them.
    client.write_all(&[&[0, 3, 232, Command::Login as u8][..], &[0; 200]].concat()).unwrap();
    rig.turn_until(|rig| rig.worker.table.count() == 1);
    rig.turn_until(|rig| rig.worker.stats().burst_refused.get() == 1 && rig.worker.dirty.is_empty());
    let mut told = vec![0; 1024];
    let count = client.read(&mut told).unwrap();
    let cut = frame::cut(&told[..count], 4096).unwrap().unwrap();
    let error = wire::Error::decode(cut.body).unwrap();
    assert_eq!((error.code(), error.closing), (Code::Unavailable, true));
    assert!(error.retry_after_ms > 0);
    drop(client);
    rig.turn_until(|rig| rig.worker.table.count() == 0);
    assert_eq!(rig.burst.clients_bytes(), 0);
}

#[test]
fn what_was_not_read_in_one_turn_is_read_first_in_the_next() {
    let mut rig = Rig::new(1 << 20);
    let config = Config {
        workers: crate::config::Workers { read_bytes_per_turn_max: 1, ..Default::default() },
        ..Config::default()
    };
    rig.worker.shared.config = Arc::new(config);
    let mut clients: Vec<TcpStream> = (0..8).map(|_| rig.connect()).collect();
    rig.turn_until(|rig| rig.worker.table.count() == 8);
    for client in &mut clients {
        client.write_all(&login()).unwrap();
    }
    for turn in 1..=8 {
        rig.turn_until(|rig| rig.up.len() == turn);
    }
    let connections: std::collections::HashSet<u64> =
        rig.up.try_iter().flat_map(|batch| batch.frames).map(|frame| frame.connection).collect();
    assert_eq!(connections.len(), 8, "one Login a turn, each client's once");
}

#[test]
fn what_nobody_waits_for_waits_for_company_but_not_long_and_not_large() {
    let mut rig = Rig::new(1 << 20);
    let put = |rig: &mut Rig, command: Command, body: &[u8]| {
        let (command, body_bytes) = (command as u8, body.len() as u32);
        let up = UpFrame { connection: 1, user: 1, device: 1, binding: 1, command, body_bytes };
        rig.worker.batch_up(up, body);
        rig.worker.send_up();
    };
    let sent = |rig: &Rig| -> Vec<u8> {
        rig.up.try_iter().flat_map(|batch| batch.frames).map(|frame| frame.command).collect()
    };
    let (ack, send) = (Command::PushAck as u8, Command::Send as u8);
    rig.worker.now_ms = 1_000;
    put(&mut rig, Command::PushAck, b"");
    rig.worker.now_ms = 1_049;
    rig.worker.send_up();
    assert_eq!(sent(&rig), [0; 0]);
    rig.worker.now_ms = 1_050;
    rig.worker.send_up();
    assert_eq!(sent(&rig), [ack]);
    // Somebody waits for a Send: both leave at once, in their order.
    put(&mut rig, Command::PushAck, b"");
    assert_eq!(sent(&rig), [0; 0]);
    put(&mut rig, Command::Send, b"hello");
    assert_eq!(sent(&rig), [ack, send]);
    put(&mut rig, Command::PushAck, &[0; 16 * 1024]);
    assert_eq!(sent(&rig), [ack]);
}

#[test]
fn that_a_part_for_many_is_placed_is_told_behind_its_writes_and_at_once() {
    let mut rig = Rig::new(1 << 20);
    let (mut client, connection) = rig.bound(7);
    let news = |rig: &Rig| -> Vec<u64> {
        rig.up.try_iter().flat_map(|batch| batch.placed).map(|placed| placed.ticket.number).collect()
    };
    let place = |rig: &mut Rig, number, awaited| {
        let frames = Bytes::from_static(&[0, 0, 0, Command::Resync as u8]);
        let item =
            DownItem { connection, user: 7, frames, push: true, later: awaited, ..DownItem::default() };
        rig.worker.place(vec![item], Some(Ticket { stream: 1, number, awaited }));
    };
    place(&mut rig, 1, false);
    rig.worker.send_up();
    rig.worker.flush();
    rig.worker.tell_placed();
    assert_eq!(news(&rig), [0; 0], "nobody waits for it");
    place(&mut rig, 2, true);
    rig.worker.send_up();
    rig.worker.tell_placed();
    assert_eq!(news(&rig), [0; 0], "it is not written");
    rig.worker.urgent = true;
    rig.worker.send_up();
    assert_eq!(news(&rig), [1], "nor told with what leaves meanwhile");
    rig.worker.flush();
    rig.worker.tell_placed();
    assert_eq!(news(&rig), [2]);
    client.read_exact(&mut [0; 8]).unwrap();
}

#[test]
fn somebody_else_is_written_to_before_the_end_of_a_part_for_many() {
    let mut rig = Rig::new(1 << 20);
    let mut clients: Vec<_> = (1..=21).map(|user| rig.bound(user)).collect();
    let frames = Bytes::from_static(&[0, 0, 0, Command::Resync as u8]);
    let item = |user, connection, later| {
        let frames = frames.clone();
        DownItem { connection, user, frames, push: true, later, ..DownItem::default() }
    };
    let mut others = clients.split_off(20);
    let part = (1..).zip(&clients).map(|(user, (_, connection))| item(user, *connection, true));
    let answers = [item(21, others[0].1, false), item(20, clients[19].1, false)];
    let all = part.chain(answers).collect();
    rig.worker.place(all, Some(Ticket { stream: 1, number: 1, awaited: true }));
    rig.worker.flush();
    assert_eq!((rig.worker.dirty.len(), rig.worker.bulk.len()), (0, 4), "all of the one, some of the other");
    assert_eq!(rig.worker.timeout(), Duration::ZERO, "the rest follows in the next turn");
    clients[19].0.read_exact(&mut [0; 4]).expect("who has an answer to get is not behind the others");
    rig.worker.flush();
    assert!(rig.worker.bulk.is_empty());
    for (client, _) in clients.iter_mut().chain(&mut others) {
        client.read_exact(&mut [0; 4]).unwrap();
    }
}
