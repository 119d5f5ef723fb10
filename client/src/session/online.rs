//! The session while it is logged in: one loop over the connection, the application and the timers.
//!
//! Trap: a frame is judged and acted upon before the next read waits, so the store's order is the wire's order.

use std::time::{Duration, Instant, SystemTime};

use proto::Command;
use proto::command::ServerFrame;
use proto::wire::{self, Code};

use super::{Leave, Session, clock_ms};
use crate::connection::Connection;
use crate::event::{Ended, Event, Status};
use crate::heartbeat::{Beat, Heartbeat};
use crate::receipts::Receipts;
use crate::store::StoreError;

impl Session {
    pub(super) async fn online(
        &mut self,
        mut connection: Connection,
        ack: wire::LoginAck,
    ) -> Result<Leave, StoreError> {
        let now = Instant::now();
        let mut heartbeat = Heartbeat::new(ack.heartbeat_ms, now, SystemTime::now());
        // Set by GoAway: when to leave.
        let mut leave_at: Option<(Instant, String)> = None;
        let address = connection.address().to_owned();
        tracing::info!(address, durability = ack.durability().as_str_name(), "logged in");
        self.app.tell(Event::Connected { address, durability: ack.durability() });
        self.status.send_replace(Status::Online);
        if self.options.receive {
            let frame_bytes_max = match ack.frame_bytes_max as usize {
                // It does not say.
                0 => proto::FRAME_BYTES_MAX,
                told => told,
            };
            self.inbox.frames_up_to(frame_bytes_max);
            self.presence.connected(frame_bytes_max);
            self.inbox.connected(now);
            self.receipts.iter_mut().for_each(|receipts| receipts.connected(frame_bytes_max));
        }
        let resend_ms_max = self.options.outbox.resend_days_max * 24 * 3_600_000;
        self.store.overdue(clock_ms(), resend_ms_max).for_each(|chat| self.outbox.expire(chat));
        self.outbox.bodies_up_to(ack.message_bytes_max as usize);
        self.outbox.connected(ack.unanswered_max, now);
        self.lists.forget_connection();
        self.settings.forget_connection();
        self.pulls.forget_connection();
        loop {
            if self.act(Some(&mut connection)).await? {
                heartbeat.sent(Instant::now());
            }
            if self.closing.is_some() {
                self.inbox.flush_acks();
                self.receipts.iter_mut().for_each(Receipts::flush);
                self.act(Some(&mut connection)).await?;
                connection.close(Duration::from_millis(self.options.close_ms_max)).await;
                return Ok(Leave::End(Ended::Closed));
            }
            let receipts = self.receipts.as_ref().and_then(Receipts::next_deadline);
            let leave = leave_at.as_ref().map(|leave| leave.0);
            let presence = self.presence.next_deadline();
            let asks =
                [self.lists.next_deadline(), self.pulls.next_deadline(), self.settings.next_deadline()];
            let asks = asks.into_iter().flatten().min();
            let wake =
                [self.inbox.next_deadline(), self.outbox.next_deadline(), receipts, presence, asks, leave];
            let wake = wake.into_iter().flatten().fold(heartbeat.deadline(), Instant::min);
            let room = self.may_take(connection.output_bytes());
            tokio::select! {
                frame = connection.next() => {
                    let mut next = frame.map(Some);
                    for _ in 0..FRAMES_PER_TURN_MAX {
                        let frame = match next {
                            Ok(Some(frame)) => frame,
                            Ok(None) => break,
                            Err(error) => return Ok(lost(error, leave_at)),
                        };
                        heartbeat.received(Instant::now());
                        if let Some(leave) = self.frame(frame, &mut leave_at) {
                            // Answers in front of it count.
                            self.act(Some(&mut connection)).await?;
                            return Ok(leave);
                        }
                        next = connection.take();
                    }
                    if let Err(error) = next {
                        return Ok(lost(error, leave_at));
                    }
                }
                input = self.app.next(room) => {
                    self.take(input);
                    for _ in 0..INPUTS_PER_TURN_MAX {
                        let room = self.may_take(connection.output_bytes());
                        let Some(input) = self.app.take(room) else { break };
                        self.take(input);
                    }
                }
                () = tokio::time::sleep_until(wake.into()) => {
                    let now = Instant::now();
                    self.inbox.tick(now);
                    self.outbox.tick(now);
                    self.receipts.iter_mut().for_each(|receipts| receipts.tick(now));
                    self.presence.tick(now);
                    match heartbeat.tick(now, SystemTime::now()) {
                        Beat::Quiet => {}
                        Beat::Ping => connection.put(Command::Ping, &wire::Ping { nonce: 0 }),
                        Beat::Dead => {
                            let reason = "the gateway does not answer pings".to_owned();
                            return Ok(Leave::Again { reason, after: None });
                        }
                    }
                    if let Some((_, reason)) = leave_at.take_if(|(at, _)| now >= *at) {
                        connection.close(Duration::from_millis(self.options.close_ms_max)).await;
                        return Ok(Leave::Elsewhere { reason });
                    }
                }
            }
        }
    }

    fn frame(&mut self, frame: ServerFrame, leave_at: &mut Option<(Instant, String)>) -> Option<Leave> {
        let now = Instant::now();
        let receive = self.options.receive;
        match frame {
            ServerFrame::SendAck(ack) => self.outbox.ack(ack, now),
            ServerFrame::Push(push) if receive => self.inbox.push(push, now),
            ServerFrame::SyncAck(ack) if receive => {
                self.receipts.iter_mut().for_each(|receipts| receipts.sync_ack(&ack, now));
                self.presence.sync_ack(&ack, now);
                self.inbox.sync_ack(ack, now);
            }
            ServerFrame::Receipt(receipt) => {
                self.receipts.iter_mut().for_each(|receipts| receipts.receipt(&receipt));
            }
            ServerFrame::PullAck(ack) => {
                let store = &self.store;
                let is_hidden = |chat: &str, history, seq| store.is_hidden(chat, history, seq);
                if let Some(ack) = self.pulls.take(ack, is_hidden).filter(|_| receive) {
                    self.inbox.pull_ack(ack, now);
                }
            }
            ServerFrame::MembersAck(ack) => self.lists.take(ack),
            ServerFrame::Presence(presence) => self.presence.presence(presence, now),
            ServerFrame::TypingNote(note) => self.presence.typing_note(note),
            ServerFrame::SettingsAck(ack) => self.settings.take(&ack),
            ServerFrame::Resync(_) if receive => self.inbox.resync(now),
            ServerFrame::Push(_)
            | ServerFrame::SyncAck(_)
            | ServerFrame::Resync(_)
            | ServerFrame::Pong(_)
            | ServerFrame::LoginAck(_) => {}
            ServerFrame::Kick(kick) => {
                return Some(Leave::End(Ended::Kicked { code: kick.code(), text: kick.text }));
            }
            ServerFrame::GoAway(away) => {
                let wait = rand::random_range(0..=u64::from(away.within_ms));
                let reason = format!("the gateway is going: {}", away.text);
                leave_at.get_or_insert((now + Duration::from_millis(wait), reason));
            }
            ServerFrame::Error(error) => return self.error(error, now),
        }
        None
    }

    fn error(&mut self, error: wire::Error, now: Instant) -> Option<Leave> {
        if error.closing {
            let reason = format!("closed: {}: {}", error.code().as_str_name(), error.text);
            if error.code() == Code::Replaced {
                return Some(Leave::End(Ended::Kicked { code: Code::Replaced, text: error.text }));
            }
            let after =
                (error.retry_after_ms > 0).then(|| Duration::from_millis(error.retry_after_ms.into()));
            return Some(Leave::Again { reason, after });
        }
        tracing::debug!(code = error.code().as_str_name(), text = error.text, chat = error.chat, "error");
        let is_ours = |session: &mut Session| {
            session.lists.refused(&error)
                || session.pulls.refused(&error)
                || session.presence.refused(&error, now)
                || session.settings.refused(&error)
        };
        if error.request != 0 && is_ours(self) {
            return None;
        }
        let jitter = Duration::from_millis(rand::random_range(0..=u64::from(error.retry_after_ms) / 2));
        if error.request != 0 {
            self.inbox.error(&error, jitter, now);
        } else {
            self.outbox.error(error, jitter, now);
        }
        None
    }
}

/// A gateway that said it is going and then goes is no failure.
fn lost(error: crate::connection::ConnectionError, leave_at: Option<(Instant, String)>) -> Leave {
    match leave_at {
        Some((_, reason)) => Leave::Elsewhere { reason },
        None => Leave::Again { reason: error.to_string(), after: None },
    }
}

const FRAMES_PER_TURN_MAX: usize = 256;
const INPUTS_PER_TURN_MAX: usize = 64;
