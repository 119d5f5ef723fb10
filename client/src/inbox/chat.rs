//! One chat of the inbox: cursor, early messages, hole, what is confirmed and acknowledged. Pure, owned by the inbox.
//!
//! Trap: `told` above `cursor` means that something is missing; whoever raises it sees to it that a Pull follows.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::wire;

use super::patience::Patience;
use super::{Action, Limits, Message};
use crate::body::Body;

#[derive(Debug, Default)]
pub(super) struct Chat {
    /// The cursor means something. Else the first Sync of a new device has yet to say where the chat starts.
    pub known: bool,
    /// 0: not told yet.
    pub history: u64,
    /// Everything up to here was handed out.
    pub cursor: u64,
    /// Everything up to here was confirmed by the application.
    pub confirmed: u64,
    /// Messages that were handed out and are not confirmed, ascending.
    unconfirmed: VecDeque<u64>,
    /// The application was told of this history and has not confirmed that: what is stored is of the one before.
    loss_unconfirmed: bool,
    /// Highest seq that the server has named.
    pub told: u64,
    pub pull: PullState,
    /// Somebody named another history since the last Pull left; only the answer to a later one decides.
    pub hinted: bool,
    /// Answers in a row that put the head below the cursor that was asked with. The store came back older, so that the
    /// server will draw another history, and nothing of this one is handed out any more.
    pub behind_us: u32,
    /// A hole is open, and is pulled at this time unless a push fills it.
    pub hole_until: Option<Instant>,
    /// The application was told that the server has a fault.
    pub in_trouble: bool,
    /// Pulls in a row that brought nothing although `told` is above `cursor`.
    pub empty_answers: u32,
    /// Acknowledged on this connection, or an earlier one but for certain.
    pub acked: u64,
    /// The next acknowledgement may leave at this time.
    ack_at: Option<Instant>,
    /// Highest seq handed out whose acknowledgement others wait for: all but what this device sent.
    awaited: u64,
    /// What nobody waits for is acknowledged at this time.
    own_ack_at: Option<Instant>,
    early: BTreeMap<u64, wire::Message>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) enum PullState {
    #[default]
    Idle,
    /// In the inbox's queue.
    Queued,
    /// In flight; its answer is due at this time.
    Asked(Instant),
    /// To be queued at this time, or as soon as somebody hints at news.
    Later(Instant),
    /// To be queued at this time, as the server said.
    Refused(Instant),
}

impl Chat {
    pub fn known(history: u64, cursor: u64) -> Self {
        Chat {
            known: true,
            history,
            cursor,
            confirmed: cursor,
            told: cursor,
            acked: cursor,
            ..Default::default()
        }
    }

    /// As kept over a restart; somebody may wait for what was not acknowledged.
    pub fn restored(history: u64, cursor: u64, acked: u64) -> Self {
        Chat { acked: acked.min(cursor), awaited: cursor, ..Chat::known(history, cursor) }
    }

    pub fn unknown(history: u64) -> Self {
        Chat { history, ..Default::default() }
    }

    /// The first Sync says where this chat starts. Held messages of another history are dropped.
    pub fn start(&mut self, history: u64, cursor: u64) {
        let mut early = std::mem::take(&mut self.early);
        if history != self.history {
            early.clear();
        }
        early.retain(|seq, _| *seq > cursor);
        let held = early.last_key_value().map_or(cursor, |(seq, _)| *seq);
        // Also what was told and could not be held.
        let told = if history == self.history { held.max(self.told) } else { held };
        *self = Chat { early, told, ack_at: self.ack_at, ..Chat::known(history, cursor) };
    }

    /// Messages that the application has and did not confirm.
    pub fn lag(&self) -> u64 {
        self.unconfirmed.len() as u64
    }

    /// Everything from the first message on again, under another number. What is stored stays until the application
    /// confirms that it heard of it, so that it hears of it again if it crashes before.
    pub fn reset(&mut self, name: &Arc<str>, history: u64, actions: &mut VecDeque<Action>) {
        *self = Chat { loss_unconfirmed: true, ..Chat::known(history, 0) };
        actions.push_back(Action::HistoryLost { chat: name.clone(), history, from_seq: 1 });
    }

    /// The application has everything up to `seq`. True: that is news, to be stored.
    pub fn confirm(&mut self, history: u64, seq: u64) -> bool {
        let seq = seq.min(self.cursor);
        if history != self.history || (seq <= self.confirmed && !self.loss_unconfirmed) {
            return false;
        }
        self.loss_unconfirmed = false;
        self.confirmed = self.confirmed.max(seq);
        while self.unconfirmed.front().is_some_and(|at| *at <= seq) {
            self.unconfirmed.pop_front();
        }
        true
    }

    pub fn forget_connection(&mut self) {
        self.pull = PullState::Idle;
        self.hole_until = None;
        (self.empty_answers, self.hinted, self.behind_us, self.in_trouble) = (0, false, 0, false);
        self.early = BTreeMap::new();
        // The Sync of the next connection tells anew.
        self.told = self.cursor;
        self.own_ack_at = None;
        if self.ack_at.take().is_some() {
            // Acknowledged on this connection, perhaps in vain.
            self.acked = 0;
        }
    }

    /// A pushed message above the cursor, or what this device sent: handed out if it is the next, else held.
    pub fn take_pushed(
        &mut self,
        name: &Arc<str>,
        message: wire::Message,
        is_own: bool,
        limits: &Limits,
        actions: &mut VecDeque<Action>,
    ) {
        if message.seq == self.cursor + 1 {
            let awaited = self.awaited;
            self.deliver(name, message, actions);
            if is_own {
                self.awaited = awaited;
            }
            self.take_early(name, actions);
        } else {
            self.hold(message, limits);
        }
    }

    /// A pulled message: what lies between it and the cursor does not exist for us.
    pub fn take_pulled(&mut self, name: &Arc<str>, message: wire::Message, actions: &mut VecDeque<Action>) {
        self.take_early_below(name, message.seq, actions);
        self.deliver_over_gap(name, message, actions);
    }

    /// What lies below the first seq of a group that is ours is nothing that we miss.
    pub fn begin_at(&mut self, joined: u64) {
        if joined > self.cursor + 1 && self.early.keys().next().is_none_or(|early| *early >= joined) {
            if self.unconfirmed.is_empty() {
                self.confirmed = joined - 1;
            }
            self.cursor = joined - 1;
            self.told = self.told.max(self.cursor);
        }
    }

    /// The server has nothing up to `seq` that we do not hold.
    pub fn skip_to(&mut self, name: &Arc<str>, seq: u64, actions: &mut VecDeque<Action>) {
        self.take_early_below(name, seq.saturating_add(1), actions);
        if seq > self.cursor {
            self.gap(name, seq, actions);
            self.cursor = seq;
            self.told = self.told.max(seq);
        }
    }

    fn take_early_below(&mut self, name: &Arc<str>, seq: u64, actions: &mut VecDeque<Action>) {
        while let Some(entry) = self.early.first_entry().filter(|entry| *entry.key() < seq) {
            let early = entry.remove();
            self.deliver_over_gap(name, early, actions);
        }
    }

    /// Hands out the held messages that follow the cursor.
    pub fn take_early(&mut self, name: &Arc<str>, actions: &mut VecDeque<Action>) {
        while let Some(entry) = self.early.first_entry().filter(|entry| *entry.key() <= self.cursor + 1) {
            let message = entry.remove();
            if message.seq == self.cursor + 1 {
                self.deliver(name, message, actions);
            }
        }
        if self.early.is_empty() {
            self.early = BTreeMap::new();
            self.hole_until = None;
        }
    }

    /// Keeps an early message, if there is room.
    pub fn hold(&mut self, message: wire::Message, limits: &Limits) {
        if self.early.len() < limits.early_messages_max {
            self.early.insert(message.seq, message);
        }
    }

    /// Starts the clock of a hole, unless it runs or a Pull is on its way.
    pub fn watch_hole(&mut self, now: Instant, limits: &Limits) -> Option<Instant> {
        if self.told <= self.cursor {
            self.hole_until = None;
        } else if self.pull == PullState::Idle && self.hole_until.is_none() {
            self.hole_until = Some(now + Duration::from_millis(limits.hole_ms_max));
        }
        self.hole_until
    }

    /// A Pull brought nothing. Asks again a few times (head and messages may be read apart), then gives up.
    pub fn after_empty_answer(&mut self, now: Instant) -> Option<Instant> {
        if self.told <= self.cursor {
            return None;
        }
        self.empty_answers += 1;
        if self.empty_answers > EMPTY_ANSWERS_MAX {
            self.give_up();
            return None;
        }
        let at = now + Duration::from_millis(EMPTY_RETRY_MS << self.empty_answers);
        self.pull = PullState::Later(at);
        Some(at)
    }

    /// Somebody named another history, or a head below our cursor: a Pull is to decide, at once.
    pub fn hint(&mut self) {
        self.hinted = true;
        if matches!(self.pull, PullState::Later(_)) {
            self.pull = PullState::Idle;
        }
    }

    /// Stops asking until the server names something new.
    pub fn give_up(&mut self) {
        self.told = self.cursor;
        self.early = BTreeMap::new();
        self.hole_until = None;
        self.pull = PullState::Idle;
        (self.empty_answers, self.hinted) = (0, false);
    }

    /// A Pull was answered with a head below the cursor that it named: the server is about to find out what that means.
    /// When to ask again.
    pub fn after_older_answer(&mut self, now: Instant) -> Instant {
        let at =
            now + Duration::from_millis((OLDER_RETRY_MS << self.behind_us.min(16)).min(OLDER_RETRY_MS_MAX));
        self.behind_us = self.behind_us.saturating_add(1);
        self.early = BTreeMap::new();
        self.hole_until = None;
        self.pull = PullState::Later(at);
        at
    }

    /// Acknowledges what is confirmed, now or at the time returned.
    pub fn acknowledge(
        &mut self,
        name: &Arc<str>,
        now: Instant,
        limits: &Limits,
        actions: &mut VecDeque<Action>,
    ) -> Option<Instant> {
        if self.confirmed <= self.acked {
            return None;
        }
        let due = if self.awaited > self.acked {
            self.ack_at
        } else {
            Some(*self.own_ack_at.get_or_insert(now + Duration::from_millis(limits.own_ack_ms)))
        };
        if let Some(at) = due.filter(|at| now < *at) {
            return Some(at);
        }
        self.acknowledge_now(name, actions);
        self.ack_at = Some(now + Duration::from_millis(limits.ack_ms_min));
        None
    }

    /// What comes now is acknowledged at that time, or with what is confirmed and waits already for others' sake.
    pub fn acknowledge_at(&mut self, at: Instant) {
        if self.confirmed <= self.acked || self.own_ack_at.is_some() {
            self.ack_at = self.ack_at.max(Some(at));
        }
    }

    pub fn acknowledge_now(&mut self, name: &Arc<str>, actions: &mut VecDeque<Action>) {
        if self.confirmed > self.acked {
            self.acked = self.confirmed;
            self.own_ack_at = None;
            actions.push_back(Action::Ack(wire::PushAck {
                chat: name.to_string(),
                history: self.history,
                seq: self.acked,
            }));
        }
    }

    /// Does what is due: whether a Pull is wanted, and when to look again.
    pub fn tick(
        &mut self,
        name: &Arc<str>,
        now: Instant,
        limits: &Limits,
        patience: &Patience,
        actions: &mut VecDeque<Action>,
    ) -> (bool, Option<Instant>) {
        let mut next = self.acknowledge(name, now, limits, actions);
        let due = match self.pull {
            PullState::Idle => self.hole_until,
            PullState::Queued => None,
            PullState::Asked(due) => Some(patience.ends(due)),
            PullState::Later(at) | PullState::Refused(at) => Some(at),
        };
        match due {
            Some(at) if now >= at => {
                self.hole_until = None;
                return (true, next);
            }
            Some(at) => next = Some(next.map_or(at, |other| other.min(at))),
            None => {}
        }
        (false, next)
    }

    fn deliver_over_gap(&mut self, name: &Arc<str>, message: wire::Message, actions: &mut VecDeque<Action>) {
        if message.seq <= self.cursor {
            return;
        }
        if message.seq > self.cursor + 1 {
            self.gap(name, message.seq - 1, actions);
        }
        self.deliver(name, message, actions);
    }

    fn gap(&self, name: &Arc<str>, to: u64, actions: &mut VecDeque<Action>) {
        let from = self.cursor + 1;
        actions.push_back(Action::Gap { chat: name.clone(), history: self.history, from, to });
    }

    fn deliver(&mut self, name: &Arc<str>, message: wire::Message, actions: &mut VecDeque<Action>) {
        debug_assert!(message.seq > self.cursor);
        self.cursor = message.seq;
        self.awaited = message.seq;
        self.told = self.told.max(message.seq);
        self.unconfirmed.push_back(message.seq);
        actions.push_back(Action::Deliver(Message {
            chat: name.clone(),
            history: self.history,
            seq: message.seq,
            sender: message.sender,
            time_us: message.time_us,
            body: Body { kind: message.kind, bytes: message.body },
        }));
    }
}

/// Empty answers to a Pull before a chat is left alone: 0.2 + 0.4 + 0.8 s.
const EMPTY_ANSWERS_MAX: u32 = 3;
const EMPTY_RETRY_MS: u64 = 100;
/// Between two Pulls of a chat whose store came back older: 0.5 s, doubling up to a minute.
const OLDER_RETRY_MS: u64 = 500;
const OLDER_RETRY_MS_MAX: u64 = 60_000;
