//! Connections of which only heartbeats are heard: when they wait for the next look, and when they do not.

use super::*;
use crate::config::{Listen, Workers};
use crate::connection::flag;
use crate::id;

/// Longer than a test may take, and as long as the time in which one connection is heard.
const QUIET_MS: u64 = 600_000;

fn config() -> Config {
    let workers = Workers { quiet_ms: QUIET_MS, ..Workers::default() };
    let listen = Listen { send_buffer_bytes: 4096, ..Listen::default() };
    // Whoever waits for the clock here is not to be closed for it.
    let limits = Limits { idle_ms_max: 255_000, heartbeat_ms: QUIET_MS as u32, ..Limits::default() };
    Config { workers, listen, limits, ..Config::default() }
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
    fn with_config(config: Config) -> Rig {
        Rig::with(config, 64 << 20)
    }

    fn is_quiet(&mut self, connection: u64) -> bool {
        self.worker.table.get_mut(id::place(connection)).unwrap().has(flag::QUIET)
    }

    /// A client that was heard with nothing but a heartbeat, and its connection. The next look is far away.
    fn quiet(&mut self, user: u64) -> (TcpStream, u64) {
        let (mut client, connection) = self.bound(user);
        // Or what it says next would wait in its own kernel until the last is read.
        client.set_nodelay(true).unwrap();
        self.hear(&mut client);
        assert!(self.is_quiet(connection));
        self.step();
        (client, connection)
    }

    /// A client that is watched as everybody pings, and is answered.
    fn hear(&mut self, client: &mut TcpStream) {
        let before = self.worker.stats().frames_out.get();
        ping(client);
        self.turn_until(|rig| rig.worker.stats().frames_out.get() > before && rig.worker.dirty.is_empty());
        pong(client);
    }

    /// The time of the next look.
    fn look(&mut self) {
        self.pass(QUIET_MS);
        self.step();
    }

    fn frames_up(&self) -> Vec<u8> {
        self.up.try_iter().flat_map(|batch| batch.frames).map(|frame| frame.command).collect()
    }
}

#[test]
fn heartbeats_wait_for_the_look_and_nobody_is_woken_by_them() {
    let mut rig = Rig::with_config(config());
    let (mut one, _) = rig.quiet(7);
    let (mut other, _) = rig.quiet(8);
    ping(&mut one);
    ping(&mut other);
    // The worker's own instance has nothing to tell, and it sleeps until the look.
    let told = rig.worker.epoll.wait(&mut rig.events, Some(Duration::ZERO)).unwrap();
    assert!(told.is_empty());
    rig.step();
    one.set_nonblocking(true).unwrap();
    assert_eq!(one.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    one.set_nonblocking(false).unwrap();
    rig.look();
    pong(&mut one);
    pong(&mut other);
    assert!(rig.worker.quiet.look_ms().is_some_and(|look_ms| look_ms >= rig.worker.now_ms + QUIET_MS));
}

#[test]
fn whoever_says_something_is_heard_at_once_from_then_on() {
    let mut rig = Rig::with_config(config());
    let (mut client, connection) = rig.quiet(7);
    send(&mut client);
    rig.look();
    assert_eq!(rig.frames_up(), [Command::Send as u8]);
    assert!(!rig.is_quiet(connection));
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
    let mut rig = Rig::with_config(config());
    let (mut client, connection) = rig.quiet(7);
    client.write_all(&frame::encode(Command::PushAck, &wire::PushAck::default())).unwrap();
    let before = rig.worker.stats().frames_in.get();
    rig.look();
    assert_eq!(rig.worker.stats().frames_in.get(), before + 1);
    assert!(rig.is_quiet(connection));
}

#[test]
fn what_a_quiet_one_gets_does_not_wait() {
    let mut rig = Rig::with_config(config());
    let (mut client, connection) = rig.quiet(7);
    let frames = frame::encode(Command::Resync, &wire::Resync {});
    rig.worker.deliver(DownItem { connection, user: 7, frames, push: true, ..DownItem::default() });
    rig.step();
    let mut got = [0; 4];
    client.read_exact(&mut got).unwrap();
    assert_eq!(got[3], Command::Resync as u8);
}

#[test]
fn the_end_of_a_quiet_one_is_seen() {
    let mut rig = Rig::with_config(config());
    let (mut client, _) = rig.quiet(7);
    ping(&mut client);
    drop(client);
    // A look for what it said, and one for its end.
    rig.look();
    rig.look();
    assert_eq!(rig.worker.table.count(), 0);
    assert_eq!(rig.worker.quiet.look_ms(), None, "nobody to look at");
}

#[test]
fn who_does_not_read_is_not_among_the_quiet() {
    let mut rig = Rig::with_config(config());
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
    assert_eq!(rig.worker.quiet.look_ms(), None);
}

#[test]
fn nobody_is_quiet_with_0_or_where_few_are() {
    let config = config();
    let never = Workers { quiet_ms: 0, ..config.workers.clone() };
    let few = Workers { quiet_ms: QUIET_MS - 1, ..config.workers.clone() };
    for workers in [never, few] {
        let mut rig = Rig::with_config(Config { workers, ..config.clone() });
        let (mut client, connection) = rig.bound(7);
        for _ in 0..3 {
            rig.hear(&mut client);
            assert!(!rig.is_quiet(connection));
        }
    }
}
