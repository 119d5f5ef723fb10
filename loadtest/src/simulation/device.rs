//! A device: the real outbox and inbox, what its program keeps over restarts, and an application with a store of its own.
//!
//! What the session's task does with a connection is done here by hand, in the same order: first into the records, then
//! onto the wire.
//!
//! Trap: a crash takes everything but the records and the application's store.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use client::inbox::{self, Inbox};
use client::outbox::{self, Outbox, Outcome, StoredChat};
use prost::Message;
use proto::command::ServerFrame;
use proto::wire::{self, Code};
use proto::{Command, frame};

use super::event::Event;
use super::judge::{Judge, Shown};
use super::net::{Host, Net, Packet, Side};
use super::plan::{MS, Plan, Plant};
use super::storage::EPOCH_US;

/// One device of a user.
pub struct Device {
    index: usize,
    /// Whose.
    pub user: String,
    name: String,
    start: Instant,
    cursor_early: bool,
    confirm_us: u64,
    /// Which life of its program; events of others are void.
    pub life: u64,
    /// Whether the program runs.
    pub is_up: bool,
    records: Records,
    /// The application's own store.
    pub app: Shown,
    unconfirmed: VecDeque<inbox::Message>,
    inbox: Inbox,
    outbox: Outbox,
    pipe: Option<usize>,
    online: bool,
    online_since_us: u64,
    failures: u32,
    stale_in_a_row: u32,
    avoid: Option<usize>,
    heartbeat: Heartbeat,
    wake_us: u64,
    submitted: u64,
}

/// What outlives a crash.
#[derive(Debug, Default, Clone)]
struct Records {
    attempt: u64,
    complete: bool,
    /// History, seq, up to where that is acknowledged.
    cursors: BTreeMap<String, (u64, u64, u64)>,
    chats: BTreeMap<String, RecordedChat>,
}

#[derive(Debug, Default, Clone)]
struct RecordedChat {
    stream: u64,
    next_n: u64,
    unanswered: BTreeMap<u64, Bytes>,
}

#[derive(Default)]
struct Heartbeat {
    every_us: u64,
    received_us: u64,
    pinged_us: u64,
    missed: u32,
}

impl Device {
    /// Not started.
    pub fn new(index: usize, user: &str, name: &str, plan: &Plan, start: Instant) -> Self {
        Device {
            index,
            user: user.to_owned(),
            name: name.to_owned(),
            start,
            cursor_early: plan.has(Plant::CursorEarly),
            confirm_us: plan.confirm_us,
            life: 0,
            is_up: false,
            records: Records::default(),
            app: Shown::default(),
            unconfirmed: VecDeque::new(),
            inbox: Inbox::new(inbox_limits()),
            outbox: Outbox::new(outbox_limits(), 1),
            pipe: None,
            online: false,
            online_since_us: 0,
            failures: 0,
            stale_in_a_row: 0,
            avoid: None,
            heartbeat: Heartbeat::default(),
            wake_us: u64::MAX,
            submitted: 0,
        }
    }

    /// The program starts with what it kept.
    pub fn start(&mut self, net: &mut Net) {
        self.is_up = true;
        let cursors = self.records.cursors.iter();
        let cursors = cursors.map(|(chat, (history, seq, acked))| (chat.as_str(), *history, *seq, *acked));
        self.inbox = Inbox::restore(inbox_limits(), cursors, self.records.complete);
        let chats = self.records.chats.iter().map(|(chat, kept)| StoredChat {
            chat: chat.clone(),
            stream: kept.stream,
            next_n: kept.next_n,
            unanswered: kept.unanswered.iter().map(|(n, body)| (*n, body.clone().into())).collect(),
        });
        self.outbox = Outbox::restore(outbox_limits(), net.draw.bits(), chats);
        (self.failures, self.stale_in_a_row, self.wake_us) = (0, 0, u64::MAX);
        net.after(1, self.connects());
    }

    /// The program dies. `lost`: and with it everything that it kept, the application's store too.
    pub fn die(&mut self, lost: bool, net: &mut Net) {
        self.is_up = false;
        self.life += 1;
        self.leave_pipe(net);
        self.unconfirmed.clear();
        if lost {
            self.records = Records::default();
            self.app = Shown::default();
        }
    }

    /// Whether it is logged in.
    pub fn is_online(&self) -> bool {
        self.online
    }

    /// Messages without an answer, numbered or not.
    pub fn unsent(&self) -> usize {
        self.outbox.unanswered() + self.outbox.queued()
    }

    /// The application sends something.
    pub fn submit(&mut self, chat: &str, body_bytes: usize, net: &mut Net, judge: &mut Judge) {
        if !self.is_up {
            return;
        }
        self.submitted += 1;
        let mut body = format!("{}/{}#{}.{} ", self.user, self.name, self.life, self.submitted).into_bytes();
        body.resize(body.len().max(body_bytes), b'.');
        let body = Bytes::from(body);
        judge.submitted(chat, &body);
        // Full: the application is told so, and nothing was promised.
        let _ = self.outbox.submit(self.submitted, chat, body, self.now(net));
        self.act(net, judge);
    }

    /// The application has what it was handed, up to this message of the chat.
    pub fn confirm(&mut self, chat: &str, history: u64, seq: u64, net: &mut Net, judge: &mut Judge) {
        let fits = |message: &inbox::Message| {
            &*message.chat == chat && message.history == history && message.seq <= seq
        };
        let (kept, taken): (VecDeque<_>, VecDeque<_>) =
            std::mem::take(&mut self.unconfirmed).into_iter().partition(|m| !fits(m));
        self.unconfirmed = kept;
        for message in taken {
            let at = (message.history, message.seq);
            judge.shown(&mut self.app, &self.user, &message.chat, at, &message.body);
        }
        // Between its own store and ours, a program may die.
        if net.draw.permille(985) {
            self.inbox.confirm(chat, history, seq, self.now(net));
            self.act(net, judge);
        }
    }

    /// Connects to one of the gateways that listen.
    pub fn connect(&mut self, listening: &[usize], net: &mut Net) {
        if self.pipe.is_some() {
            return;
        }
        let others: Vec<usize> = listening.iter().copied().filter(|at| Some(*at) != self.avoid).collect();
        let candidates = if others.is_empty() { listening } else { &others };
        if candidates.is_empty() {
            return self.connect_later(None, net);
        }
        let gateway = candidates[net.draw.index(candidates.len())];
        self.avoid = Some(gateway);
        let pipe = net.open(Host::Device(self.index), Host::Gateway(gateway));
        self.pipe = Some(pipe);
        let clock_ms = (EPOCH_US + net.now_us) / 1_000;
        self.records.attempt = clock_ms.max(self.records.attempt + 1);
        let login = wire::Login {
            wire_min: proto::WIRE_VERSION,
            wire_max: proto::WIRE_VERSION,
            user: self.user.clone(),
            device: self.name.clone(),
            attempt: self.records.attempt,
            token: String::new(),
            agent: String::new(),
        };
        net.send(pipe, Side::Opener, Packet::Frames(frame::encode(Command::Login, &login)));
        net.after(LOGIN_MS_MAX * MS, Event::LoginExpires { device: self.index, pipe });
    }

    /// A login was not answered in time.
    pub fn login_expires(&mut self, pipe: usize, net: &mut Net, judge: &mut Judge) {
        if self.pipe == Some(pipe) && !self.online {
            self.leave(None, net, judge);
        }
    }

    /// The connection has ended.
    pub fn ended(&mut self, pipe: usize, net: &mut Net, judge: &mut Judge) {
        if self.pipe == Some(pipe) {
            self.leave(None, net, judge);
        }
    }

    /// Bytes from the gateway.
    pub fn frames(&mut self, pipe: usize, bytes: &Bytes, net: &mut Net, judge: &mut Judge) {
        let mut at = 0;
        while self.pipe == Some(pipe)
            && let Ok(Some(found)) = frame::cut(&bytes[at..], proto::FRAME_BYTES_MAX)
        {
            at += found.wire_bytes();
            let body = Bytes::copy_from_slice(found.body);
            match ServerFrame::decode(found.command, body) {
                Ok(frame) => self.frame(frame, net, judge),
                Err(error) => judge.wrong(|| format!("a frame that no client can read: {error}")),
            }
        }
        (self.heartbeat.received_us, self.heartbeat.missed) = (net.now_us, 0);
        if self.online {
            self.act(net, judge);
        }
    }

    /// Does what is due.
    pub fn tick(&mut self, net: &mut Net, judge: &mut Judge) {
        self.wake_us = u64::MAX;
        let now = self.now(net);
        self.inbox.tick(now);
        self.outbox.tick(now);
        if self.online && net.now_us >= self.beat_us() {
            if self.heartbeat.missed >= 2 {
                return self.leave(None, net, judge);
            }
            self.heartbeat.missed += 1;
            self.heartbeat.pinged_us = net.now_us;
            self.send(Command::Ping, &wire::Ping { nonce: 0 }, net);
        }
        self.act(net, judge);
    }

    fn frame(&mut self, frame: ServerFrame, net: &mut Net, judge: &mut Judge) {
        let now = self.now(net);
        match frame {
            // A replay behind a broken stream is answered a second time.
            ServerFrame::LoginAck(_) if self.online => {}
            ServerFrame::LoginAck(ack) => {
                (self.online, self.failures, self.stale_in_a_row) = (true, 0, 0);
                self.online_since_us = net.now_us;
                self.heartbeat = Heartbeat {
                    every_us: u64::from(ack.heartbeat_ms) * 3 / 4 * MS,
                    received_us: net.now_us,
                    ..Heartbeat::default()
                };
                self.inbox.connected(now);
                self.outbox.connected(ack.unanswered_max, now);
            }
            ServerFrame::SendAck(ack) => {
                let id = (self.user.clone(), ack.chat.clone(), ack.stream, ack.n);
                judge.acked(id, (ack.history, ack.seq));
                self.outbox.ack(ack, now);
            }
            ServerFrame::Push(push) => self.inbox.push(push, now),
            ServerFrame::SyncAck(ack) => self.inbox.sync_ack(ack, now),
            ServerFrame::PullAck(ack) => self.inbox.pull_ack(ack, now),
            ServerFrame::Resync(_) => self.inbox.resync(now),
            ServerFrame::Pong(_) => {}
            ServerFrame::Kick(kick) => {
                let (user, name, code) = (&self.user, &self.name, kick.code());
                judge.wrong(|| format!("{user}/{name} is kicked from its newest connection: {code:?}"));
            }
            ServerFrame::GoAway(_)
            | ServerFrame::MembersAck(_)
            | ServerFrame::Receipt(_)
            | ServerFrame::Presence(_)
            | ServerFrame::TypingNote(_)
            | ServerFrame::SettingsAck(_) => {}
            ServerFrame::Error(error) => self.error(error, net, judge),
        }
    }

    fn error(&mut self, error: wire::Error, net: &mut Net, judge: &mut Judge) {
        let code = error.code();
        if code == Code::StaleAttempt {
            self.stale_in_a_row += 1;
            self.records.attempt = self.records.attempt.max(error.expected);
        }
        if error.closing {
            let at_once = code == Code::StaleAttempt && self.stale_in_a_row <= 2;
            let after = if at_once { Some(1) } else { Some(u64::from(error.retry_after_ms) * MS) };
            return self.leave(after.filter(|us| *us > 0), net, judge);
        }
        let jitter = Duration::from_millis(net.draw.between(0, u64::from(error.retry_after_ms) / 2));
        if error.request != 0 {
            return self.inbox.error(&error, jitter, self.now(net));
        }
        if matches!(code, Code::MessageTooLarge | Code::NotAMember) {
            judge.refused((self.user.clone(), error.chat.clone(), error.stream, error.n));
        }
        self.outbox.error(error, jitter, self.now(net));
    }

    /// Carries out what outbox and inbox decided, as the session does.
    fn act(&mut self, net: &mut Net, judge: &mut Judge) {
        loop {
            if let Some(action) = self.outbox.next_action() {
                self.act_out(action, net, judge);
            } else if let Some(action) = self.inbox.next_action() {
                self.act_in(action, net, judge);
            } else {
                break;
            }
        }
        let deadlines = [self.inbox.next_deadline(), self.outbox.next_deadline()];
        let mut wake_us =
            deadlines.into_iter().flatten().map(|at| (at - self.start).as_micros() as u64).min();
        if self.online {
            wake_us = Some(wake_us.map_or(self.beat_us(), |at| at.min(self.beat_us())));
        }
        if let Some(at) = wake_us.filter(|at| *at < self.wake_us) {
            self.wake_us = at;
            let ticks = Event::Ticks { device: self.index, life: self.life };
            // A timer is never early, and never exact.
            net.after(at.saturating_sub(net.now_us) + 1, ticks);
        }
    }

    fn act_out(&mut self, action: outbox::Action, net: &mut Net, judge: &mut Judge) {
        match action {
            outbox::Action::Store { chat, n, body, .. } => {
                if let Some(kept) = self.records.chats.get_mut(&*chat) {
                    kept.next_n = kept.next_n.max(n + 1);
                    kept.unanswered.insert(n, body.bytes);
                }
            }
            outbox::Action::StoreStream { chat, stream } => {
                let fresh = RecordedChat { stream, next_n: 1, unanswered: BTreeMap::new() };
                self.records.chats.insert(chat.to_string(), fresh);
            }
            outbox::Action::StoreAnswered { chat, n } => {
                if let Some(kept) = self.records.chats.get_mut(&*chat) {
                    kept.unanswered.remove(&n);
                }
            }
            outbox::Action::Trouble { chat, text } => {
                let user = &self.user;
                judge.wrong(|| format!("{user} is told of a fault with {chat}: {text}"));
            }
            outbox::Action::Send(send) => {
                let id = (self.user.clone(), send.chat.clone(), send.stream, send.n);
                judge.left(id, &send.body);
                self.send(Command::Send, &send, net);
            }
            outbox::Action::Done { chat, body, outcome, .. } => match outcome {
                Outcome::Sent { history, seq, time_us } => {
                    let message = body.into_message(seq, self.user.clone(), time_us);
                    self.inbox.sent(&chat, history, message, self.now(net));
                }
                Outcome::Refused { .. } => {}
                Outcome::Unknown => judge.unknown += 1,
            },
        }
    }

    fn act_in(&mut self, action: inbox::Action, net: &mut Net, judge: &mut Judge) {
        match action {
            inbox::Action::Deliver(message) => {
                if self.cursor_early {
                    let at = (message.history, message.seq, message.seq);
                    self.records.cursors.insert(message.chat.to_string(), at);
                }
                let stored_us = message.time_us.saturating_sub(EPOCH_US);
                judge.handed(stored_us.max(self.online_since_us), net.now_us);
                let (chat, history, seq) = (message.chat.clone(), message.history, message.seq);
                self.unconfirmed.push_back(message);
                let wait_us = net.draw.between(1, self.confirm_us.max(1));
                let (device, life) = (self.index, self.life);
                net.after(wait_us, Event::Confirms { device, life, chat, history, seq });
            }
            inbox::Action::Gap { chat, from, to, .. } => {
                let user = &self.user;
                judge.wrong(|| format!("{user} is told of a gap in {chat} from {from} to {to}"));
            }
            inbox::Action::HistoryLost { chat, .. } => {
                let user = &self.user;
                judge.wrong(|| format!("{user} is told that {chat} lost its history"));
            }
            inbox::Action::Store { chat, history, seq, acked } => {
                self.keep_cursor(&chat, (history, seq, acked), judge);
            }
            inbox::Action::Trouble { chat, text } => {
                let user = &self.user;
                judge.wrong(|| format!("{user} is told of a fault with {chat}: {text}"));
            }
            inbox::Action::StoreComplete => self.records.complete = true,
            inbox::Action::Synced => {}
            inbox::Action::Sync(sync) => self.send(Command::Sync, &sync, net),
            inbox::Action::Pull(pull) => self.send(Command::Pull, &pull, net),
            inbox::Action::Ack(ack) => {
                self.records.cursors.insert(ack.chat.clone(), (ack.history, ack.seq, ack.seq));
                self.send(Command::PushAck, &ack, net);
            }
        }
    }

    fn keep_cursor(&mut self, chat: &Arc<str>, cursor: (u64, u64, u64), judge: &mut Judge) {
        if !self.app.chats.contains_key(&**chat) {
            let (history, seq, _) = cursor;
            judge.begins(&mut self.app, &self.user, chat, history, seq);
        }
        self.records.cursors.insert(chat.to_string(), cursor);
    }

    fn send<M: Message>(&self, command: Command, body: &M, net: &mut Net) {
        if let Some(pipe) = self.pipe {
            net.send(pipe, Side::Opener, Packet::Frames(frame::encode(command, body)));
        }
    }

    fn leave(&mut self, after_us: Option<u64>, net: &mut Net, judge: &mut Judge) {
        self.leave_pipe(net);
        self.inbox.disconnected();
        self.outbox.disconnected();
        self.act(net, judge);
        self.connect_later(after_us, net);
    }

    fn leave_pipe(&mut self, net: &mut Net) {
        self.online = false;
        if let Some(pipe) = self.pipe.take() {
            let in_flight = net.draw.permille(700);
            net.close(pipe, Side::Opener, in_flight);
        }
    }

    fn connect_later(&mut self, after_us: Option<u64>, net: &mut Net) {
        let ceiling_ms = (BACKOFF_MS_MIN << self.failures.min(10)).min(BACKOFF_MS_MAX);
        self.failures += 1;
        let wait_us = match after_us {
            Some(asked) => asked + net.draw.between(0, asked / 2),
            None => net.draw.between(ceiling_ms / 2 * MS, ceiling_ms * MS),
        };
        net.after(wait_us, self.connects());
    }

    fn connects(&self) -> Event {
        Event::Connects { device: self.index, life: self.life }
    }

    fn beat_us(&self) -> u64 {
        self.heartbeat.received_us.max(self.heartbeat.pinged_us) + self.heartbeat.every_us
    }

    fn now(&self, net: &Net) -> Instant {
        self.start + Duration::from_micros(net.now_us)
    }
}

fn inbox_limits() -> inbox::Limits {
    // Small enough to be reached.
    inbox::Limits { early_messages_max: 8, unconfirmed_messages_max: 24, pulls_max: 2, ..Default::default() }
}

fn outbox_limits() -> outbox::Limits {
    outbox::Limits { unanswered_max: 16, queued_messages_max: 64, ..Default::default() }
}

const LOGIN_MS_MAX: u64 = 3_000;
const BACKOFF_MS_MIN: u64 = 100;
const BACKOFF_MS_MAX: u64 = 1_000;
