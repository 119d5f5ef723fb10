//! Connections of which only heartbeats are heard: when they wait for the next look, and when they do not.

use super::*;
use crate::config::{Listen, Workers};
use crate::connection::flag;
use crate::id;

/// Longer than a test may take.
const QUIET_MS: u64 = 600_000;

fn rig() -> Rig {
    let workers = Workers { quiet_ms: QUIET_MS, ..Workers::default() };
    // Whoever waits for the clock here is not to be closed for it.
    let limits = Limits { idle_ms_max: 255_000, ..Limits::default() };
    let mut rig = Rig::with(Config { workers, limits, ..Config::default() }, 1 << 20);
    rig.pass(QUIET_MS);
    rig
}

fn ping(client: &mut TcpStream) {
    client.write_all(&frame::encode(Command::Ping, &wire::Ping { nonce: 1 })).unwrap();
}

fn pong(client: &mut TcpStream) {
    let expected = frame::encode(Command::Pong, &wire::Pong { nonce: 1 });
    let mut got = vec![0; expected.len()];
    client.read_exact(&mut got).unwrap();
    assert_eq!(got, expected);
}

fn send(client: &mut TcpStream) {
    client.write_all(&frame::encode(Command::Send, &wire::Send::default())).unwrap();
}

impl Rig {
    fn is_quiet(&mut self, connection: u64) -> bool {
        self.worker.table.get_mut(id::place(connection)).unwrap().has(flag::QUIET)
    }

    /// A client that was heard once as a quiet one, and its connection.
    fn quiet(&mut self, user: u64) -> (TcpStream, u64) {
        let (mut client, connection) = self.bound(user);
        // Or what it says next would wait in its own kernel until the last is read.
        client.set_nodelay(true).unwrap();
        self.hear(&mut client);
        assert!(self.is_quiet(connection));
        (client, connection)
    }

    /// The client pings, and is answered.
    fn hear(&mut self, client: &mut TcpStream) {
        let before = self.worker.stats().frames_out.get();
        ping(client);
        self.turn_until(|rig| rig.worker.stats().frames_out.get() > before && rig.worker.dirty.is_empty());
        pong(client);
    }

    /// Pings and turns, until the worker goes by the clock. The client has pinged and got no answer then.
    fn tire(&mut self, client: &mut TcpStream) {
        // The first one may still be told of at once.
        self.hear(client);
        ping(client);
        self.turn_until(|rig| rig.worker.quiet.looks.next_ms().is_some());
        self.step();
        client.set_nonblocking(true).unwrap();
        let nothing = client.read(&mut [0]).unwrap_err();
        assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
        client.set_nonblocking(false).unwrap();
    }

    fn frames_up(&self) -> Vec<u8> {
        self.up.try_iter().flat_map(|batch| batch.frames).map(|frame| frame.command).collect()
    }
}

#[test]
fn a_calm_worker_answers_at_once() {
    let mut rig = rig();
    let (mut client, _) = rig.quiet(7);
    rig.hear(&mut client);
    assert_eq!(rig.worker.quiet.looks.next_ms(), None);
}

#[test]
fn heartbeats_that_come_too_often_wait_and_nobody_is_woken_by_them() {
    let mut rig = rig();
    let (mut one, _) = rig.quiet(7);
    let (mut other, _) = rig.quiet(8);
    rig.tire(&mut one);
    ping(&mut other);
    // The worker's own instance has nothing to tell: it would sleep.
    let told = rig.worker.epoll.wait(&mut rig.events, Some(Duration::ZERO)).unwrap();
    assert!(told.is_empty());
    rig.pass(QUIET_MS);
    rig.step();
    pong(&mut one);
    pong(&mut other);
    // In all that time nobody comes.
    rig.pass(QUIET_MS);
    rig.step();
    assert_eq!(rig.worker.quiet.looks.next_ms(), None);
    rig.hear(&mut one);
}

#[test]
fn whoever_says_something_is_heard_at_once_from_then_on() {
    let mut rig = rig();
    let (mut client, connection) = rig.quiet(7);
    rig.tire(&mut client);
    send(&mut client);
    rig.pass(QUIET_MS);
    rig.turn_until(|rig| !rig.up.is_empty());
    assert_eq!(rig.frames_up(), [Command::Send as u8]);
    pong(&mut client);
    assert!(!rig.is_quiet(connection));
    // The clock goes on for the others.
    let (mut other, _) = rig.quiet(8);
    ping(&mut other);
    rig.turn_until(|rig| rig.worker.quiet.looks.next_ms().is_some());
    for _ in 0..3 {
        send(&mut client);
        rig.turn_until(|rig| !rig.up.is_empty());
        assert_eq!(rig.frames_up(), [Command::Send as u8]);
    }
    // Quiet again with the second heartbeat.
    rig.hear(&mut client);
    assert!(!rig.is_quiet(connection));
    rig.hear(&mut client);
    assert!(rig.is_quiet(connection));
}

#[test]
fn an_acknowledgement_of_a_push_is_no_word() {
    let mut rig = rig();
    let (mut client, connection) = rig.quiet(7);
    client.write_all(&frame::encode(Command::PushAck, &wire::PushAck::default())).unwrap();
    rig.pass(QUIET_MS);
    let before = rig.worker.stats().frames_in.get();
    rig.turn_until(|rig| rig.worker.stats().frames_in.get() > before);
    assert!(rig.is_quiet(connection));
}

#[test]
fn what_a_quiet_one_gets_does_not_wait() {
    let mut rig = rig();
    let (mut client, connection) = rig.quiet(7);
    rig.tire(&mut client);
    let frames = frame::encode(Command::Resync, &wire::Resync {});
    rig.worker.deliver(DownItem { connection, user: 7, frames, push: true, ..DownItem::default() });
    rig.step();
    let mut got = [0; 4];
    client.read_exact(&mut got).unwrap();
    assert_eq!(got[3], Command::Resync as u8);
}

#[test]
fn the_end_of_a_quiet_one_is_seen() {
    let mut rig = rig();
    let (mut client, _) = rig.quiet(7);
    rig.tire(&mut client);
    drop(client);
    // A look for what it said, and one for its end.
    for _ in 0..2 {
        rig.pass(QUIET_MS);
        rig.step();
    }
    assert_eq!(rig.worker.table.count(), 0);
}

#[test]
fn who_does_not_read_is_not_among_the_quiet() {
    let workers = Workers { quiet_ms: QUIET_MS, ..Workers::default() };
    let listen = Listen { send_buffer_bytes: 4096, ..Listen::default() };
    let mut rig = Rig::with(Config { workers, listen, ..Config::default() }, 64 << 20);
    rig.pass(QUIET_MS);
    let (_client, connection) = rig.quiet(7);
    let frames = Bytes::from(vec![0; 64 * 1024]);
    for _ in 0..1_000 {
        let frames = frames.clone();
        rig.worker.deliver(DownItem { connection, user: 7, frames, push: true, ..DownItem::default() });
        rig.step();
        if rig.worker.table.get_mut(id::place(connection)).unwrap().has(flag::BLOCKED) {
            break;
        }
    }
    let connection = rig.worker.table.get_mut(id::place(connection)).unwrap();
    assert!(connection.has(flag::BLOCKED) && !connection.has(flag::QUIET));
}

#[test]
fn with_0_nobody_is_quiet() {
    let workers = Workers { quiet_ms: 0, ..Workers::default() };
    let mut rig = Rig::with(Config { workers, ..Config::default() }, 1 << 20);
    let (mut client, connection) = rig.bound(7);
    for _ in 0..3 {
        rig.hear(&mut client);
        assert!(!rig.is_quiet(connection));
    }
}
