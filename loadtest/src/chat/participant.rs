//! One user of a message load: the client library's inbox and outbox, and an application that confirms at once. Pure:
//! frames and `now` go in, frames and [`News`] come out.
//!
//! Trap: this is the library that people use, not a copy of it. What the checker finds is therefore what an application
//! would see.

use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use client::inbox::{self, Inbox};
use client::outbox::{self, Outbox, Outcome};
use proto::command::{Command, ServerFrame};
use proto::frame;

/// What the load wants to know.
#[derive(Debug, PartialEq)]
pub enum News {
    /// The first Sync of a connection is complete.
    Synced,
    /// The application got a message, its own ones too.
    Delivered(inbox::Message),
    /// A message is accepted.
    Acked(u64),
    /// A message was refused, or nobody knows.
    Unsure(u64, String),
}

/// See the head of this file.
#[derive(Debug)]
pub struct Participant {
    user: String,
    inbox: Inbox,
    outbox: Outbox,
    /// When the heap of the thread looks at it next.
    pub looked_at_us: Option<u64>,
}

impl Participant {
    /// A new device of a new user.
    pub fn new(user: String, seed: u64) -> Participant {
        let limits = outbox::Limits { queued_messages_max: QUEUED_MESSAGES_MAX, ..Default::default() };
        Participant {
            user,
            inbox: Inbox::new(inbox::Limits::default()),
            outbox: Outbox::new(limits, seed),
            looked_at_us: None,
        }
    }

    /// Takes a message to send. False: too many wait already.
    pub fn submit(&mut self, ticket: u64, chat: &str, body: Bytes, now: Instant) -> bool {
        self.outbox.submit(ticket, chat, body, now).is_ok()
    }

    /// Logged in.
    pub fn connected(&mut self, unanswered_max: u32, now: Instant) {
        self.inbox.connected(now);
        self.outbox.connected(unanswered_max, now);
    }

    /// The connection is gone.
    pub fn disconnected(&mut self) {
        self.inbox.disconnected();
        self.outbox.disconnected();
    }

    /// A frame came.
    pub fn hear(&mut self, frame: ServerFrame, jitter: Duration, now: Instant) {
        match frame {
            ServerFrame::Push(push) => self.inbox.push(push, now),
            ServerFrame::SendAck(ack) => self.outbox.ack(ack, now),
            ServerFrame::SyncAck(ack) => self.inbox.sync_ack(ack, now),
            ServerFrame::PullAck(ack) => self.inbox.pull_ack(ack, now),
            ServerFrame::Resync(_) => self.inbox.resync(now),
            ServerFrame::Error(error) if error.command == Command::Send as u32 => {
                self.outbox.error(error, jitter, now);
            }
            ServerFrame::Error(error) => self.inbox.error(&error, jitter, now),
            ServerFrame::LoginAck(_)
            | ServerFrame::Pong(_)
            | ServerFrame::Kick(_)
            | ServerFrame::GoAway(_)
            | ServerFrame::Receipt(_)
            | ServerFrame::Presence(_)
            | ServerFrame::TypingNote(_)
            | ServerFrame::SettingsAck(_)
            | ServerFrame::MembersAck(_) => {}
        }
    }

    /// Does what is due.
    pub fn tick(&mut self, now: Instant) {
        self.inbox.tick(now);
        self.outbox.tick(now);
    }

    /// When something is due.
    pub fn next_deadline(&self) -> Option<Instant> {
        match (self.inbox.next_deadline(), self.outbox.next_deadline()) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        }
    }

    /// Carries out what inbox and outbox want: frames go to `out`, the rest to `news`.
    pub fn carry_out(&mut self, now: Instant, out: &mut BytesMut, news: &mut Vec<News>) {
        loop {
            if let Some(action) = self.outbox.next_action() {
                self.carry_out_outbox(action, now, out, news);
            } else if let Some(action) = self.inbox.next_action() {
                self.carry_out_inbox(action, now, out, news);
            } else {
                return;
            }
        }
    }

    fn carry_out_outbox(
        &mut self,
        action: outbox::Action,
        now: Instant,
        out: &mut BytesMut,
        news: &mut Vec<News>,
    ) {
        match action {
            outbox::Action::Send(send) => frame::put(Command::Send, &send, out),
            outbox::Action::Done { ticket: Some(ticket), chat, body, outcome } => match outcome {
                Outcome::Sent { history, seq, time_us } => {
                    news.push(News::Acked(ticket));
                    let message = body.into_message(seq, self.user.clone(), time_us);
                    self.inbox.sent(&chat, history, message, now);
                }
                Outcome::Refused { code, .. } => {
                    news.push(News::Unsure(ticket, code.as_str_name().to_owned()))
                }
                Outcome::Unknown => news.push(News::Unsure(ticket, "unknown".to_owned())),
            },
            // This device keeps nothing over a restart, because the run ends with the process.
            outbox::Action::Done { ticket: None, .. }
            | outbox::Action::Store { .. }
            | outbox::Action::Trouble { .. }
            | outbox::Action::StoreStream { .. }
            | outbox::Action::StoreAnswered { .. } => {}
        }
    }

    fn carry_out_inbox(
        &mut self,
        action: inbox::Action,
        now: Instant,
        out: &mut BytesMut,
        news: &mut Vec<News>,
    ) {
        match action {
            inbox::Action::Deliver(message) => {
                self.inbox.confirm(&message.chat, message.history, message.seq, now);
                news.push(News::Delivered(message));
            }
            inbox::Action::Sync(sync) => frame::put(Command::Sync, &sync, out),
            inbox::Action::Pull(pull) => frame::put(Command::Pull, &pull, out),
            inbox::Action::Ack(ack) => frame::put(Command::PushAck, &ack, out),
            inbox::Action::Synced => news.push(News::Synced),
            // A gap or a lost history shows as lost messages, if any was ours.
            inbox::Action::Gap { .. }
            | inbox::Action::HistoryLost { .. }
            | inbox::Action::Store { .. }
            | inbox::Action::Trouble { .. }
            | inbox::Action::StoreComplete => {}
        }
    }
}

/// More than one sender sends in a run: an overloaded server must not bend the schedule.
const QUEUED_MESSAGES_MAX: usize = 10_000_000;
