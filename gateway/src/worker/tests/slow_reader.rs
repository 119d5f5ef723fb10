//! Clients that do not read, over real sockets: skipped and told to sync at the soft limit, told why and closed at the hard
//! one, closed when they take nothing for too long; and never half a frame before something else.
//!
//! Trap: how much the kernel takes before a socket is blocked is its own affair. Both ends have small buffers, so that what
//! it may still take then is little beside the limits.

use std::io::ErrorKind;

use bytes::Bytes;

use super::*;
use crate::config::{Limits, Listen};
use crate::connection::flag;

const SOFT: usize = 64 * 1024;
const HARD: usize = 2 * SOFT;
const USER: u64 = 7;

fn rig(limits: Limits) -> Rig {
    let limits = Limits { queue_bytes_soft: SOFT, queue_bytes_hard: HARD, ..limits };
    let listen = Listen { send_buffer_bytes: 4096, ..Listen::default() };
    Rig::with(Config { limits, listen, ..Config::default() }, 64 << 20)
}

/// A frame of `bytes` bytes with a number in it.
fn numbered(command: Command, number: u32, bytes: usize) -> Bytes {
    let mut body = vec![0; bytes - frame::HEADER_BYTES];
    body[..4].copy_from_slice(&number.to_be_bytes());
    Bytes::from([&(body.len() as u32).to_be_bytes()[1..], &[command as u8], &body[..]].concat())
}

impl Rig {
    /// A client that is logged in, whose kernel holds little for it.
    fn slow(&mut self, user: u64) -> (TcpStream, u64) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        // Later it would not make the window smaller that was offered first.
        socket.set_recv_buffer_size(4096).unwrap();
        let client = runtime.block_on(socket.connect(self.worker.address().unwrap())).unwrap();
        let client = client.into_std().unwrap();
        client.set_nonblocking(false).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        self.bind(client, user)
    }

    fn give(&mut self, connection: u64, frames: Bytes, push: bool) {
        let item = DownItem { connection, user: USER, frames, push, ..DownItem::default() };
        self.worker.deliver(item);
        self.step();
    }

    /// Gives numbered frames of 4 KiB until `is_enough`; how many.
    fn give_until(&mut self, connection: u64, push: bool, is_enough: impl Fn(&mut Rig) -> bool) -> u32 {
        for number in 0.. {
            if is_enough(self) {
                return number;
            }
            assert!(number < 10_000, "it is never enough");
            let command = if push { Command::Push } else { Command::PullAck };
            self.give(connection, numbered(command, number, 4096), push);
        }
        unreachable!()
    }

    fn has(&mut self, connection: u64, bit: u8) -> bool {
        self.worker.table.get_mut(id::place(connection)).is_some_and(|connection| connection.has(bit))
    }

    /// Turns and reads until `is_enough`, or the end (`None` is put there).
    fn listen(&mut self, client: &mut TcpStream, is_enough: impl Fn(&[Heard]) -> bool) -> Vec<Heard> {
        client.set_nonblocking(true).unwrap();
        let (mut heard, mut bytes) = (Vec::new(), Vec::new());
        let begin = Instant::now();
        while !is_enough(&heard) {
            assert!(begin.elapsed() < Duration::from_secs(60), "{} frames", heard.len());
            self.step();
            let mut buffer = [0; 16 * 1024];
            match client.read(&mut buffer) {
                Ok(0) => {
                    assert!(bytes.is_empty(), "half a frame at the end");
                    heard.push(None);
                    break;
                }
                Ok(count) => bytes.extend_from_slice(&buffer[..count]),
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
            while let Some(frame) = frame::cut(&bytes, proto::FRAME_BYTES_MAX).unwrap() {
                let command = Command::try_from(frame.command).expect("the stream of frames is whole");
                heard.push(Some((command, frame.body.to_vec())));
                let used = frame.wire_bytes();
                bytes.drain(..used);
            }
        }
        heard
    }
}

/// A frame, or the end.
type Heard = Option<(Command, Vec<u8>)>;

fn number(heard: &Heard, command: Command) -> u32 {
    match heard {
        Some((is, body)) if *is == command => u32::from_be_bytes(body[..4].try_into().unwrap()),
        other => panic!("{:?}", other.as_ref().map(|(command, _)| *command)),
    }
}

#[test]
fn beyond_the_soft_limit_pushes_are_skipped_and_made_up_for_by_a_resync() {
    let mut rig = rig(Limits::default());
    let (mut client, connection) = rig.slow(USER);
    let given = rig.give_until(connection, true, |rig| rig.worker.stats().pushes_skipped.get() == 5);
    let place = id::place(connection);
    let queue = rig.worker.table.get_mut(place).unwrap().queue;
    let waiting = rig.worker.queues.get_mut(queue).bytes();
    assert!((SOFT..=SOFT + 4096).contains(&waiting), "{waiting}");
    assert_eq!((rig.worker.stats().slow_readers.get(), rig.worker.stats().resyncs.get()), (1, 0));

    let heard = rig.listen(&mut client, |heard| heard.iter().flatten().any(|(c, _)| *c == Command::Resync));
    let (resync, pushes) = heard.split_last().unwrap();
    assert_eq!(resync.as_ref().unwrap().0, Command::Resync);
    let numbers: Vec<u32> = pushes.iter().map(|heard| number(heard, Command::Push)).collect();
    assert_eq!(numbers, (0..given - 5).collect::<Vec<_>>(), "what came is whole and in order");
    assert_eq!(rig.worker.stats().resyncs.get(), 1);
    // And it is like any other again.
    rig.give(connection, numbered(Command::Push, 77, 4096), true);
    let heard = rig.listen(&mut client, |heard| !heard.is_empty());
    assert_eq!(number(&heard[0], Command::Push), 77);
    assert_eq!((rig.worker.queues.count(), rig.burst.clients_bytes()), (0, 0));
    assert_eq!(rig.worker.stats().closed_for(Why::Code(Code::SlowReader)), 0);
}

#[test]
fn beyond_the_soft_limit_its_own_frames_wait_until_half_is_read() {
    let mut rig = rig(Limits::default());
    let (mut client, connection) = rig.slow(USER);
    rig.give_until(connection, false, |rig| rig.has(connection, flag::PARKED));
    let sync = frame::encode(Command::Sync, &wire::Sync { request: 5, ..Default::default() });
    client.write_all(&sync).unwrap();
    for _ in 0..20 {
        rig.step();
    }
    assert!(rig.up.is_empty(), "nothing of it is read");
    let heard = rig.listen(&mut client, |heard| heard.iter().flatten().any(|(c, _)| *c == Command::Pong));
    assert!(heard.len() > 10, "a Pong unasked, behind what waited");
    rig.turn_until(|rig| !rig.up.is_empty());
    assert_eq!(rig.up.try_recv().unwrap().frames[0].command, Command::Sync as u8);
    assert!(!rig.has(connection, flag::PARKED));
}

#[test]
fn at_the_hard_limit_a_client_that_reads_on_learns_why() {
    let mut rig = rig(Limits::default());
    let (mut client, connection) = rig.slow(USER);
    let closed = |rig: &Rig| rig.worker.stats().closed_for(Why::Code(Code::SlowReader));
    let given = rig.give_until(connection, false, |rig| closed(rig) > 0);
    // What it held is given back at once, but for the end of the frame that is begun.
    assert!(rig.burst.clients_bytes() < 4096 + 1024, "{}", rig.burst.clients_bytes());
    assert_eq!(rig.worker.table.count(), 1);
    let heard = rig.listen(&mut client, |heard| heard.last() == Some(&None));
    let [answers @ .., Some((Command::Error, error)), None] = &heard[..] else { panic!("{}", heard.len()) };
    let numbers: Vec<u32> = answers.iter().map(|heard| number(heard, Command::PullAck)).collect();
    assert!(numbers.len() < given as usize);
    assert_eq!(numbers, (0..numbers.len() as u32).collect::<Vec<_>>());
    let error = wire::Error::decode(&error[..]).unwrap();
    assert_eq!((error.code(), error.closing), (Code::SlowReader, true));
    assert!(error.retry_after_ms > 0);
    drop(client);
    rig.turn_until(|rig| rig.worker.table.count() == 0);
    assert_eq!((closed(&rig), rig.worker.queues.count(), rig.burst.clients_bytes()), (1, 0, 0));
}

#[test]
fn at_the_hard_limit_a_client_that_does_not_read_is_gone_soon() {
    for linger_ms_max in [0, 2_000] {
        let mut rig = rig(Limits { linger_ms_max, ..Limits::default() });
        let (client, connection) = rig.slow(USER);
        let closed = |rig: &Rig| rig.worker.stats().closed_for(Why::Code(Code::SlowReader));
        rig.give_until(connection, false, |rig| closed(rig) > 0);
        if linger_ms_max > 0 {
            assert_eq!(rig.worker.table.count(), 1);
            rig.pass(linger_ms_max);
        }
        rig.turn_until(|rig| rig.worker.table.count() == 0);
        assert_eq!((closed(&rig), rig.worker.queues.count(), rig.burst.clients_bytes()), (1, 0, 0));
        drop(client);
    }
}

#[test]
fn whoever_takes_no_byte_for_too_long_is_closed_and_whoever_takes_some_is_not() {
    let mut rig = rig(Limits { stalled_ms_max: 10_000, ..Limits::default() });
    let (mut client, connection) = rig.slow(USER);
    let mut number = 0;
    while !rig.has(connection, flag::BLOCKED) {
        rig.give(connection, numbered(Command::PullAck, number, 4096), false);
        number += 1;
    }
    for _ in 0..4 {
        rig.pass(9_000);
        let progress_ms = |rig: &mut Rig| {
            let queue = rig.worker.table.get_mut(id::place(connection)).unwrap().queue;
            rig.worker.queues.get_mut(queue).progress_ms
        };
        let before_ms = progress_ms(&mut rig);
        // Enough to wait on, and then it reads until the kernel has taken some of it.
        rig.give(connection, numbered(Command::PullAck, number, 32 * 1024), false);
        let mut buffer = [0; 4096];
        while progress_ms(&mut rig) == before_ms {
            client.read_exact(&mut buffer).unwrap();
            rig.step();
        }
        assert!(rig.has(connection, flag::BLOCKED));
    }
    rig.pass(9_000);
    rig.step();
    assert_eq!(rig.worker.table.count(), 1);
    rig.pass(1_100);
    rig.turn_until(|rig| rig.worker.table.count() == 0);
    assert_eq!(rig.worker.stats().closed_for(Why::Code(Code::SlowReader)), 1);
    assert_eq!(rig.burst.clients_bytes(), 0);
}

#[test]
fn when_the_burst_budget_is_used_up_whoever_needs_more_of_it_is_closed_for_the_same_reason() {
    let mut rig = rig(Limits::default());
    let (client, connection) = rig.slow(USER);
    while !rig.has(connection, flag::BLOCKED) {
        rig.give(connection, numbered(Command::PullAck, 1, 4096), false);
    }
    // Others take what there is.
    let mut others_bytes = 0;
    while rig.burst.share_bytes() > 64 {
        let share = rig.burst.share_bytes();
        assert!(rig.burst.resize(0, share));
        others_bytes += share;
    }
    rig.give(connection, numbered(Command::Push, 1, 4096), true);
    assert_eq!(rig.worker.stats().pushes_skipped.get(), 1, "pushes can be made up for");
    rig.give_until(connection, false, |rig| rig.worker.stats().burst_closed.get() > 0);
    assert!(rig.burst.clients_bytes() - others_bytes < 4096 + 1024);
    rig.pass(Limits::default().linger_ms_max);
    rig.turn_until(|rig| rig.worker.table.count() == 0);
    assert_eq!(rig.worker.stats().closed_for(Why::Code(Code::SlowReader)), 1);
    assert_eq!(rig.burst.clients_bytes(), others_bytes);
    drop(client);
}
