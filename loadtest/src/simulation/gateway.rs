//! A gateway: the real link core, judge and memory of what was heard, around them a small model of what the bridge and one
//! worker do. Its connections stand in slots that are used again.
//!
//! Trap: between the bridge and the worker lies a queue. A batch down counts as placed when the worker has placed it, later
//! than it came; and what the worker reads meanwhile may overtake the news of it.

use std::collections::BTreeMap;

use bytes::Bytes;
use gateway::batch::{DownItem, Ticket};
use gateway::bridge::deliveries;
use gateway::connection::{Stage, Verdict, judge};
use gateway::heard::{Heard, Hearing};
use gateway::id::{self, Place};
use gateway::link::{Bounds, Link, StreamKey};
use gateway::refusal::refusal;
use proto::link::{Down, Gone, Up, UpFrame, UpHello, down, up};
use proto::wire::{self, Code};
use proto::{Command, frame};

use super::event::Event;
use super::net::{Host, Net, Packet, Side};
use super::plan::MS;
use super::worker::{Conn, accepts, gone_of, is_bound_by, note_gone};

/// One gateway slot of the simulated fleet.
pub struct GatewayHost {
    index: usize,
    /// Which life; events of others are void.
    pub life: u64,
    /// Of this life, as the store gave it; 0: it is down.
    incarnation: u32,
    link: Link,
    heard: Heard,
    slots: BTreeMap<u32, Conn>,
    generations: BTreeMap<u32, u16>,
    by_pipe: BTreeMap<usize, u32>,
    streams: BTreeMap<StreamKey, Stream>,
    opening: BTreeMap<usize, (usize, u64)>,
    login_number: u64,
    pump_is_due: bool,
    last_placing_us: u64,
    heartbeat_ms: u32,
    failures: BTreeMap<usize, u32>,
}

struct Stream {
    pipe: usize,
    server: usize,
    hearing: Hearing,
}

impl GatewayHost {
    /// Not started.
    pub fn new(index: usize, heartbeat_ms: u32) -> Self {
        GatewayHost {
            index,
            life: 0,
            incarnation: 0,
            link: Link::new(bounds()),
            heard: Heard::default(),
            slots: BTreeMap::new(),
            generations: BTreeMap::new(),
            by_pipe: BTreeMap::new(),
            streams: BTreeMap::new(),
            opening: BTreeMap::new(),
            login_number: 0,
            pump_is_due: false,
            last_placing_us: 0,
            heartbeat_ms,
            failures: BTreeMap::new(),
        }
    }

    /// Whether it runs.
    pub fn is_up(&self) -> bool {
        self.incarnation != 0
    }

    /// Begins a life.
    pub fn start(&mut self, incarnation: u32, servers: usize, net: &mut Net) {
        *self =
            GatewayHost { life: self.life, incarnation, ..GatewayHost::new(self.index, self.heartbeat_ms) };
        net.after(1, self.pings());
        for server in 0..servers {
            net.after(1 + net.now_us % 7, self.follows(server));
        }
    }

    /// The process dies.
    pub fn die(&mut self, net: &mut Net) {
        let pipes: Vec<usize> = self.by_pipe.keys().copied().collect();
        let streams = self.streams.values().map(|stream| stream.pipe);
        for pipe in pipes.into_iter().chain(streams.collect::<Vec<_>>()).chain(self.opening.keys().copied()) {
            let side = if net.is_link(pipe) { Side::Opener } else { Side::Other };
            let in_flight = net.draw.permille(500);
            net.close(pipe, side, in_flight);
        }
        self.life += 1;
        self.incarnation = 0;
    }

    /// Bytes from a client.
    pub fn client_frames(&mut self, pipe: usize, bytes: &Bytes, net: &mut Net) {
        let slot = match self.by_pipe.get(&pipe) {
            Some(slot) => *slot,
            None => self.accept(pipe),
        };
        let mut rest = &bytes[..];
        while let Ok(Some(found)) = frame::cut(rest, proto::FRAME_BYTES_MAX) {
            rest = &rest[found.wire_bytes()..];
            let Some(conn) = self.slots.get_mut(&slot) else { return };
            let verdict = judge(conn.stage, found.command);
            match verdict {
                Verdict::Pong => {
                    let pong = frame::encode(Command::Pong, &wire::Pong::default());
                    net.send(pipe, Side::Other, Packet::Frames(pong));
                    continue;
                }
                Verdict::Refuse(code) => {
                    let error = wire::Error { code: code as i32, closing: true, ..Default::default() };
                    let bytes = frame::encode(Command::Error, &error);
                    net.send(pipe, Side::Other, Packet::Frames(bytes));
                    return self.close(slot, net);
                }
                Verdict::Login => {
                    self.login_number += 1;
                    conn.stage = Stage::LoggingIn;
                    conn.binding = self.login_number;
                }
                Verdict::Forward => {}
            }
            let up = UpFrame {
                connection: id::connection_id(
                    self.incarnation,
                    0,
                    Place { slot, generation: conn.generation },
                ),
                user: conn.user,
                device: conn.device,
                binding: conn.binding,
                command: u32::from(found.command),
                body: Bytes::copy_from_slice(found.body),
            };
            self.offer([up], net);
        }
    }

    /// A connection or a stream has ended.
    pub fn ended(&mut self, pipe: usize, net: &mut Net) {
        if let Some(slot) = self.by_pipe.get(&pipe).copied() {
            return self.close(slot, net);
        }
        if let Some((server, _)) = self.opening.remove(&pipe) {
            return self.follow_later(server, net);
        }
        let key = self.streams.iter().find(|(_, stream)| stream.pipe == pipe).map(|(key, _)| *key);
        if let Some(key) = key {
            self.broken(key, net);
        }
    }

    /// Opens a stream to a state server, if its machine answers.
    pub fn follow(&mut self, server: usize, listens: bool, net: &mut Net) {
        let open = self.streams.values().any(|stream| stream.server == server);
        if open || self.opening.values().any(|(to, _)| *to == server) {
            return;
        }
        if !listens {
            return self.follow_later(server, net);
        }
        let pipe = net.open(Host::Gateway(self.index), Host::Server(server));
        let asked_ms = net.now_ms();
        self.opening.insert(pipe, (server, asked_ms));
        let hello = UpHello {
            version_min: proto::LINK_VERSION,
            version_max: proto::LINK_VERSION,
            gateway_id: format!("g{}", self.index),
            incarnation: self.incarnation,
            loopback: true,
            features: Vec::new(),
            heartbeat_ms: self.heartbeat_ms,
            frame_bytes_max: proto::FRAME_BYTES_MAX as u32,
            replay_ms: self.heard.replay_ms(&state_id(server), asked_ms),
            ..UpHello::default()
        };
        net.send(pipe, Side::Opener, Packet::Up(Up { kind: Some(up::Kind::Hello(hello)) }));
        net.after(HELLO_MS_MAX * MS, Event::HelloExpires { gateway: self.index, pipe });
    }

    /// A state server has not said hello in time.
    pub fn hello_expires(&mut self, pipe: usize, net: &mut Net) {
        if let Some((server, _)) = self.opening.remove(&pipe) {
            let in_flight = net.draw.permille(500);
            net.close(pipe, Side::Opener, in_flight);
            self.follow_later(server, net);
        }
    }

    /// Something from a state server.
    pub fn down(&mut self, pipe: usize, down: Down, net: &mut Net) {
        if let Some((server, asked_ms)) = self.opening.remove(&pipe) {
            let Some(down::Kind::Hello(hello)) = down.kind else { return };
            let hearing = self.heard.opened(&state_id(server), asked_ms);
            let key = self.link.opened(&hello.state_id, hello.credit_bytes, net.now_ms());
            self.streams.insert(key, Stream { pipe, server, hearing });
            self.failures.remove(&server);
            return self.pump_soon(net);
        }
        let Some((key, stream)) = self.streams.iter_mut().find(|(_, stream)| stream.pipe == pipe) else {
            return;
        };
        let key = *key;
        match down.kind {
            Some(down::Kind::Batch(batch)) => {
                let number = batch.number;
                let (_, items) = deliveries(batch);
                let (ours, strangers): (Vec<_>, Vec<_>) =
                    items.partition(|item| id::incarnation(item.connection) == self.incarnation);
                if !strangers.is_empty() {
                    self.link.gone(key, strangers.iter().map(gone_of).collect());
                }
                self.link.placing(key, number, usize::from(!ours.is_empty()));
                if !ours.is_empty() {
                    self.place_later(ours, Some((key, number)), net);
                }
            }
            Some(down::Kind::Pong(pong)) => {
                self.heard.pong(&state_id(stream.server), &mut stream.hearing, pong.nonce);
            }
            Some(down::Kind::Hello(_)) | None => {}
        }
        self.link.pong(key, net.now_ms());
        if down.credit_bytes > 0 {
            self.link.credit(key, down.credit_bytes);
        }
        if down.acked > 0 || !down.acked_also.is_empty() {
            self.link.acked(key, down.acked, &down.acked_also, net.now_ms());
        }
        self.pump_soon(net);
    }

    /// The worker places what came from a state server, or from the bridge itself.
    pub fn place(&mut self, items: Vec<DownItem>, ticket: Option<(StreamKey, u64)>, net: &mut Net) {
        let mut gone = Vec::new();
        for item in items {
            self.deliver(item, &mut gone, net);
        }
        let Some((key, number)) = ticket else { return };
        let (pushed, answered): (Vec<Gone>, Vec<Gone>) = gone.into_iter().partition(|gone| gone.pushed);
        for Gone { connection, user, .. } in answered {
            self.link.depart(UpFrame { connection, user, ..UpFrame::default() }, net.now_ms());
        }
        if !pushed.is_empty() {
            self.link.gone(key, pushed);
        }
        self.link.placed(Ticket { stream: key, number, awaited: false });
        self.pump_soon(net);
    }

    /// Pings all streams, and leaves those that are silent.
    pub fn ping(&mut self, net: &mut Net) {
        for key in self.link.ping(net.now_ms()) {
            self.broken(key, net);
        }
        self.pump(net);
        net.after(PING_MS * MS, self.pings());
    }

    /// Hands out what waits.
    pub fn pump(&mut self, net: &mut Net) {
        self.pump_is_due = false;
        for (key, stream) in &self.streams {
            while let Some(up) = self.link.next_up(*key, net.now_ms()) {
                net.send(stream.pipe, Side::Opener, Packet::Up(up));
            }
        }
        if !self.link.take_notices().is_empty() {
            self.pump_soon(net);
        }
    }

    /// A connection that did not read reads again.
    pub fn reads(&mut self, connection: u64, net: &mut Net) {
        let place = id::place(connection);
        if let Some(conn) = self.slots.get_mut(&place.slot).filter(|conn| conn.generation == place.generation)
        {
            conn.slow_until_us = 0;
            if std::mem::take(&mut conn.owes_resync) {
                let resync = frame::encode(Command::Resync, &wire::Resync {});
                net.send(conn.pipe, Side::Other, Packet::Frames(resync));
            }
        }
    }

    /// One of its connections stops reading for a while. Which, if there is one.
    pub fn slows(&mut self, until_us: u64, net: &mut Net) -> Option<u64> {
        let at = net.draw.index(self.slots.len());
        let (slot, conn) = self.slots.iter_mut().nth(at)?;
        conn.slow_until_us = until_us;
        let place = Place { slot: *slot, generation: conn.generation };
        let connection = id::connection_id(self.incarnation, 0, place);
        net.after(until_us - net.now_us, Event::Reads { gateway: self.index, life: self.life, connection });
        Some(connection)
    }

    fn accept(&mut self, pipe: usize) -> u32 {
        let slot = (0..).find(|slot| !self.slots.contains_key(slot)).unwrap_or(0);
        let generation = self.generations.entry(slot).or_default();
        *generation = (*generation + 1) % id::GENERATIONS;
        let conn = Conn {
            pipe,
            generation: *generation,
            stage: Stage::Fresh,
            user: 0,
            device: 0,
            binding: 0,
            slow_until_us: 0,
            owes_resync: false,
        };
        self.slots.insert(slot, conn);
        self.by_pipe.insert(pipe, slot);
        slot
    }

    fn close(&mut self, slot: u32, net: &mut Net) {
        let Some(conn) = self.slots.remove(&slot) else { return };
        self.by_pipe.remove(&conn.pipe);
        net.close(conn.pipe, Side::Other, true);
        if conn.user != 0 {
            let place = Place { slot, generation: conn.generation };
            let connection = id::connection_id(self.incarnation, 0, place);
            self.link.depart(UpFrame { connection, user: conn.user, ..UpFrame::default() }, net.now_ms());
            self.pump_soon(net);
        }
    }

    fn broken(&mut self, key: StreamKey, net: &mut Net) {
        let Some(stream) = self.streams.remove(&key) else { return };
        let in_flight = net.draw.permille(500);
        net.close(stream.pipe, Side::Opener, in_flight);
        let frames = self.link.broken(key);
        self.offer(frames, net);
        self.follow_later(stream.server, net);
    }

    fn follow_later(&mut self, server: usize, net: &mut Net) {
        let failures = self.failures.entry(server).or_default();
        let wait_ms = (10u64 << (*failures).min(10)).min(RECONNECT_MS_MAX);
        *failures += 1;
        let wait_us = net.draw.between(wait_ms * MS / 2, wait_ms * MS);
        net.after(wait_us, self.follows(server));
    }

    fn offer(&mut self, frames: impl IntoIterator<Item = UpFrame>, net: &mut Net) {
        let mut refused = Vec::new();
        for frame in frames {
            if frame.command == 0 {
                self.link.depart(frame, net.now_ms());
            } else if let Err(back) = self.link.offer(frame, net.now_ms()) {
                refused.extend(refusal(&back.frame, Code::Unavailable, back.retry_after_ms));
            }
        }
        if !refused.is_empty() {
            self.place_later(refused, None, net);
        }
        self.pump_soon(net);
    }

    /// Frames that come within a moment leave together.
    fn pump_soon(&mut self, net: &mut Net) {
        if !self.pump_is_due {
            self.pump_is_due = true;
            let wait_us = net.draw.delay(200, 10, 4 * MS);
            net.after(wait_us, Event::Pumps { gateway: self.index, life: self.life });
        }
    }

    fn place_later(&mut self, items: Vec<DownItem>, ticket: Option<(StreamKey, u64)>, net: &mut Net) {
        let at_us = (net.now_us + net.draw.delay(200, 20, 20 * MS)).max(self.last_placing_us + 1);
        self.last_placing_us = at_us;
        let places = Event::Places { gateway: self.index, life: self.life, items, ticket };
        net.after(at_us - net.now_us, places);
    }

    fn deliver(&mut self, item: DownItem, gone: &mut Vec<Gone>, net: &mut Net) {
        let place = id::place(item.connection);
        let found = self.slots.get_mut(&place.slot).filter(|conn| {
            conn.generation == place.generation && id::incarnation(item.connection) == self.incarnation
        });
        let Some(conn) = found else { return note_gone(&item, gone) };
        if !accepts(conn, &item) {
            // A push that overtook the login's answer is found by the first Sync; another server's answer may have been a better one.
            let is_early = item.push && conn.stage == Stage::LoggingIn;
            let is_better = item.close && is_bound_by(conn, &item);
            return if is_early || is_better {
            } else {
                note_gone(&item, gone)
            };
        }
        if let Some(bind) = &item.bind
            && conn.stage == Stage::LoggingIn
        {
            conn.stage = Stage::Bound;
            (conn.user, conn.device, conn.binding) = (bind.user, bind.device, bind.binding);
        }
        if item.push && net.now_us < conn.slow_until_us {
            conn.owes_resync = true;
        } else {
            net.send(conn.pipe, Side::Other, Packet::Frames(item.frames));
        }
        if item.close {
            self.close(place.slot, net);
        }
    }

    fn pings(&self) -> Event {
        Event::Pings { gateway: self.index, life: self.life }
    }

    fn follows(&self, server: usize) -> Event {
        Event::Follows { gateway: self.index, life: self.life, server }
    }
}

/// Name of a state server.
pub fn state_id(server: usize) -> String {
    format!("s{server}")
}

/// The defaults of `config::Link`, with queues small enough to fill.
fn bounds() -> Bounds {
    Bounds {
        batch_frames_max: 8,
        batches_in_flight_max: 2,
        batch_beside_frames_min: 4,
        login_batch_frames_max: 4,
        login_batches_in_flight_max: 2,
        logins_waiting_max: 32,
        login_wait_ms_max: 5_000,
        login_retry_ms_max: 10_000,
        queue_bytes_max: 64 * 1024,
        connection_frames_max: 64,
        stalled_ms_max: 500,
        dead_ms: 1_000,
        retry_after_ms: 250,
    }
}

const PING_MS: u64 = 250;
const HELLO_MS_MAX: u64 = 2_000;
const RECONNECT_MS_MAX: u64 = 500;
