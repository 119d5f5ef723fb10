//! What a device has received: per chat the cursor, early messages, holes, acknowledgements. Pure: frames and `now` go
//! in, [`Action`]s come out; whoever owns the connection owns this and carries them out.
//!
//! Trap: nothing is handed out twice or out of order, and the cursor never passes a seq that the server has not either
//! sent or, in the answer to a Pull, left out. A push alone never changes a chat's history: pushes can be old, so one
//! that does not fit only makes us ask the store. Nor does a Sync, which may have been read long ago: only the answer to a
//! Pull, of which a chat has one at a time, decides.
//!
//! Bodies that are held or handed out are slices of what was given in: give in frames of their own, not slices of a big
//! receive buffer.

mod chat;
mod patience;
mod pull;
mod sync;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::body::Body;
use crate::retry::Retry;
use proto::wire::{self, Code};

use chat::{Chat, PullState};
use patience::Patience;
use pull::Asked;
use sync::SyncState;

/// What bounds an [`Inbox`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// How long a hole may stay open before it is pulled.
    pub hole_ms_max: u64,
    /// Least time between two acknowledgements of one chat.
    pub ack_ms_min: u64,
    /// How long an acknowledgement of nothing but what this device sent waits for company. Nobody is told of it but a new device
    /// of the same user.
    pub own_ack_ms: u64,
    /// Where in the time that a server gives for the acknowledgements of a large group this device's fall, thousandths. Each
    /// [`Limits::default`] draws it, so that other devices' fall elsewhere.
    pub ack_permille: u32,
    /// How long a Sync or Pull may stay unanswered before it is asked again, while nothing else comes either. Longer where
    /// answers turn out to take longer.
    pub answer_ms_max: u64,
    /// Early messages held per chat; more are dropped and pulled later.
    pub early_messages_max: usize,
    /// Messages handed out and not confirmed. At this bound pushes are dropped, and pulled when there is room again.
    pub unconfirmed_messages_max: u64,
    /// Pulls in flight, over all chats.
    pub pulls_max: usize,
    /// Chat names and cursors in one Sync, bytes.
    pub sync_bytes_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            hole_ms_max: 100,
            ack_ms_min: 50,
            own_ack_ms: 30_000,
            ack_permille: rand::random_range(0..1_000),
            answer_ms_max: 5_000,
            early_messages_max: 1_024,
            unconfirmed_messages_max: 1_024,
            pulls_max: 8,
            sync_bytes_max: proto::FRAME_BYTES_MAX - SYNC_OVERHEAD_BYTES,
        }
    }
}

impl Limits {
    /// How long an acknowledgement waits that is to fall into `within`, `elapsed` after a clock of this device's own began: until this device's
    /// turn comes round, which it does once in each `within`, however many messages come meanwhile. 0 for 0.
    pub fn ack_wait(&self, elapsed: Duration, within: Duration) -> Duration {
        let within_ms = within.as_millis();
        let Some(into_ms) = elapsed.as_millis().checked_rem(within_ms) else { return Duration::ZERO };
        let turn_ms = within_ms * u128::from(self.ack_permille) / 1_000 % within_ms;
        let wait_ms = if turn_ms > into_ms { turn_ms - into_ms } else { turn_ms + within_ms - into_ms };
        Duration::from_millis(wait_ms as u64)
    }
}

/// One stored message, as the application gets it. (chat, history, seq) names it for ever.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Message {
    pub chat: Arc<str>,
    pub history: u64,
    pub seq: u64,
    pub sender: String,
    pub time_us: u64,
    pub body: Body,
}

/// What is to be done now, in this order.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Hand this to the application, which answers with [`Inbox::confirm`].
    Deliver(Message),
    /// The server has nothing to show from `from` to `to` (both included): retention, damage, or not ours to see. Told
    /// again after a restart, unless `to` or something behind it was confirmed.
    Gap {
        /// The chat.
        chat: Arc<str>,
        /// Its history.
        history: u64,
        /// First seq that is missing.
        from: u64,
        /// Last seq that is missing.
        to: u64,
    },
    /// The server lost history of this chat. What it has now, from `from_seq` on, is handed out under the new number.
    /// Told again after a restart, unless `from_seq - 1` or something behind it was confirmed under that number.
    HistoryLost {
        /// The chat.
        chat: Arc<str>,
        /// The new history.
        history: u64,
        /// First seq that is handed out anew.
        from_seq: u64,
    },
    /// Keep this cursor over restarts: the application confirmed it, or the chat starts here for this device.
    Store {
        /// The chat.
        chat: Arc<str>,
        /// Its history.
        history: u64,
        /// Everything up to this seq is done with.
        seq: u64,
        /// The server was told of everything up to here. An [`Action::Ack`] raises it to its own seq.
        acked: u64,
    },
    /// The first Sync of this device is complete: remember it, and say `complete` to [`Inbox::restore`].
    StoreComplete,
    /// Tell the application: the server has a fault, and what is missing of this chat is asked for again until it has none. Once a
    /// connection, or behind an answer.
    Trouble {
        /// The chat.
        chat: Arc<str>,
        /// What, in the server's words.
        text: String,
    },
    /// A Sync of this connection is complete; Pulls may still run.
    Synced,
    /// Send this frame.
    Sync(wire::Sync),
    /// Send this frame.
    Pull(wire::Pull),
    /// Send this frame.
    Ack(wire::PushAck),
}

/// See the head of this file. One per device.
#[derive(Debug)]
pub struct Inbox {
    limits: Limits,
    chats: BTreeMap<Arc<str>, Chat>,
    actions: VecDeque<Action>,
    /// Chats that wait for a free Pull.
    wanting: VecDeque<Arc<str>>,
    /// Pulls in flight, at most `pulls_max`.
    asked: Vec<Asked>,
    /// Pulls that were asked again for want of an answer, which may still come.
    late: VecDeque<Asked>,
    patience: Patience,
    /// Refusals for now, on this connection.
    retry: Retry,
    request: u32,
    /// Cursors in one Sync, as this server's frames allow.
    sync_bytes_max: usize,
    /// Chats that a server looked at for one Sync, as far as one has told. More cursors would be sent twice.
    page_chats: usize,
    sync: SyncState,
    /// Every chat that existed at some finished Sync has a cursor, so a chat without one is new: it starts at 0.
    complete: bool,
    /// Sum over the chats of messages handed out and not confirmed.
    lag: u64,
    /// Pushes were dropped because of `lag`.
    behind: bool,
    /// Nothing is due earlier. May be early, never late.
    deadline: Option<Instant>,
    /// What turns of acknowledging are counted from.
    began: Option<Instant>,
}

impl Inbox {
    /// A new device: it starts from what its user has acknowledged so far.
    pub fn new(limits: Limits) -> Self {
        Inbox {
            limits,
            chats: BTreeMap::new(),
            actions: VecDeque::new(),
            wanting: VecDeque::new(),
            asked: Vec::new(),
            late: VecDeque::new(),
            patience: Patience::new(limits.answer_ms_max),
            retry: Retry::default(),
            request: 0,
            sync_bytes_max: limits.sync_bytes_max,
            page_chats: usize::MAX,
            sync: SyncState::Offline,
            complete: false,
            lag: 0,
            behind: false,
            deadline: None,
            began: None,
        }
    }

    /// A device that comes back with the cursors that [`Action::Store`] named: chat, history, seq, acked. What was confirmed and not
    /// acknowledged is so with the next connection. `complete`: [`Action::StoreComplete`] was seen.
    pub fn restore<'a>(
        limits: Limits,
        cursors: impl IntoIterator<Item = (&'a str, u64, u64, u64)>,
        complete: bool,
    ) -> Self {
        let mut inbox = Inbox { complete, ..Inbox::new(limits) };
        for (name, history, seq, acked) in cursors {
            inbox.chats.insert(name.into(), Chat::restored(history, seq, acked));
        }
        inbox
    }

    /// The longest frame that the server takes.
    pub fn frames_up_to(&mut self, frame_bytes_max: usize) {
        self.sync_bytes_max =
            frame_bytes_max.saturating_sub(SYNC_OVERHEAD_BYTES).min(self.limits.sync_bytes_max);
    }

    /// The connection is logged in. Asks for a Sync, and acknowledges again what may have been lost with the last one.
    pub fn connected(&mut self, now: Instant) {
        self.disconnected();
        for (name, chat) in &mut self.chats {
            if let Some(at) = chat.acknowledge(name, now, &self.limits, &mut self.actions) {
                wake(&mut self.deadline, at);
            }
        }
        self.start_sync(now);
    }

    /// The connection is gone, with every question that was open on it.
    pub fn disconnected(&mut self) {
        self.sync = SyncState::Offline;
        self.wanting.clear();
        self.asked.clear();
        self.late.clear();
        self.patience = Patience::new(self.limits.answer_ms_max);
        self.retry.answered();
        self.deadline = None;
        self.chats.retain(|_, chat| {
            chat.forget_connection();
            chat.known
        });
        self.actions.retain(|action| !matches!(action, Action::Sync(_) | Action::Pull(_) | Action::Ack(_)));
    }

    /// A Push arrived.
    pub fn push(&mut self, push: wire::Push, now: Instant) {
        self.patience.pushed(now);
        if let Some(message) = push.message {
            self.offer(&push.chat, push.history, (message, false), now);
            let began = *self.began.get_or_insert(now);
            let within = Duration::from_millis(push.ack_within_ms.min(ACK_WITHIN_MS_MAX).into());
            if !within.is_zero()
                && let Some(chat) = self.chats.get_mut(&*push.chat)
            {
                chat.acknowledge_at(now + self.limits.ack_wait(now - began, within));
            }
        }
    }

    /// Our own Send was acknowledged on this connection, which stands for its push.
    pub fn sent(&mut self, chat: &str, history: u64, message: wire::Message, now: Instant) {
        self.offer(chat, history, (message, true), now);
    }

    /// A SyncAck arrived.
    pub fn sync_ack(&mut self, ack: wire::SyncAck, now: Instant) {
        self.patience.answered(now);
        self.retry.answered();
        self.take_sync_ack(ack, now);
    }

    /// A PullAck arrived.
    pub fn pull_ack(&mut self, ack: wire::PullAck, now: Instant) {
        self.patience.answered(now);
        self.retry.answered();
        match self.take_asked(ack.request) {
            Some(asked) => self.take_pull_ack(&asked, ack, now),
            None => self.take_late_pull_ack(ack, now),
        }
    }

    /// The gateway skipped pushes.
    pub fn resync(&mut self, now: Instant) {
        match &mut self.sync {
            SyncState::Offline => {}
            SyncState::Asked { again, .. } | SyncState::Later { again, .. } => *again = true,
            SyncState::Done => self.start_sync(now),
        }
    }

    /// An Error arrived that answers a Sync or Pull. Others are ignored. `jitter` is added to the wait that the server asks for.
    pub fn error(&mut self, error: &wire::Error, jitter: Duration, now: Instant) {
        let is_sync = self.sync.is_asked(error.request);
        let asked = self.take_asked(error.request);
        if !is_sync && asked.is_none() {
            return;
        }
        self.patience.answered(now);
        let least = match error.code() {
            code if is_transient(code) => RETRY_MS_MIN,
            // Without a Sync nothing is known: that is asked again sooner.
            Code::Internal if !is_sync => RETRY_INTERNAL_MS,
            _ => RETRY_FINAL_MS,
        };
        let least = Duration::from_millis(u64::from(error.retry_after_ms).max(least));
        let at = self.retry.refused(least, now) + jitter;
        if is_sync {
            self.sync_later(at);
            return;
        }
        let Some((name, chat)) =
            asked.and_then(|asked| Some((asked.chat.clone(), self.chats.get_mut(&asked.chat)?)))
        else {
            return;
        };
        let has_fault = error.code() == Code::Internal;
        if has_fault && !std::mem::replace(&mut chat.in_trouble, true) {
            self.actions.push_back(Action::Trouble { chat: name, text: error.text.clone() });
        }
        if is_transient(error.code()) || has_fault {
            chat.pull = PullState::Refused(at);
            wake(&mut self.deadline, at);
        } else {
            chat.give_up();
        }
        self.pump(now);
    }

    /// The application has this message (gap, loss) and everything before it in its own store. `seq` is the message's,
    /// [`Action::Gap`]'s `to`, or one less than [`Action::HistoryLost`]'s `from_seq`.
    pub fn confirm(&mut self, chat: &str, history: u64, seq: u64, now: Instant) {
        let Some(name) = self.chats.get_key_value(chat).map(|(name, _)| name.clone()) else { return };
        let Some(state) = self.chats.get_mut(&name) else { return };
        let lag = state.lag();
        if !state.confirm(history, seq) {
            return;
        }
        self.lag -= lag - state.lag();
        let (seq, acked) = (state.confirmed, state.acked);
        self.actions.push_back(Action::Store { chat: name.clone(), history, seq, acked });
        let online = !matches!(self.sync, SyncState::Offline);
        if online && let Some(at) = state.acknowledge(&name, now, &self.limits, &mut self.actions) {
            wake(&mut self.deadline, at);
        }
        if self.behind {
            self.pump(now);
        }
    }

    /// Acknowledges at once whatever is confirmed: the connection is about to be closed.
    pub fn flush_acks(&mut self) {
        for (name, chat) in &mut self.chats {
            chat.acknowledge_now(name, &mut self.actions);
        }
    }

    /// Does what is due. Cheap when nothing is.
    pub fn tick(&mut self, now: Instant) {
        if self.deadline.is_none_or(|at| now < at) {
            return;
        }
        self.deadline = None;
        self.tick_sync(now);
        for (name, chat) in &mut self.chats {
            let (want, next) = chat.tick(name, now, &self.limits, &self.patience, &mut self.actions);
            if want {
                if let Some(at) = self.asked.iter().position(|asked| asked.chat == *name) {
                    self.late.push_back(self.asked.swap_remove(at));
                    self.late.drain(..self.late.len().saturating_sub(LATE_MAX));
                }
                chat.pull = PullState::Queued;
                self.wanting.push_back(name.clone());
            }
            if let Some(at) = next {
                wake(&mut self.deadline, at);
            }
        }
        self.pump(now);
    }

    /// When [`Inbox::tick`] should be called next; it may be called earlier at no harm.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// What is to be done next.
    pub fn next_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// History and cursor of a chat: everything up to it was handed out.
    pub fn cursor(&self, chat: &str) -> Option<(u64, u64)> {
        self.chats.get(chat).filter(|chat| chat.known).map(|chat| (chat.history, chat.cursor))
    }

    /// Nothing is missing as far as the server has told: synced, no hole, no Pull.
    pub fn is_caught_up(&self) -> bool {
        matches!(self.sync, SyncState::Done)
            && self.chats.values().all(|chat| {
                chat.known && chat.told <= chat.cursor && !chat.hinted && chat.pull == PullState::Idle
            })
    }

    /// A message that may be new, early or known, from a push or a SendAck.
    fn offer(&mut self, chat: &str, history: u64, (message, is_own): (wire::Message, bool), now: Instant) {
        let name = match self.chats.get_key_value(chat) {
            Some((name, _)) => name.clone(),
            None => self.begin_chat(chat, history),
        };
        let Some(chat) = self.chats.get_mut(&name) else { return };
        if chat.history == 0 {
            chat.history = history;
        }
        if history != chat.history {
            // Old, or the first sign of a lost history: the store says which. An unknown chat's Sync is under way.
            if chat.known {
                chat.hint();
            }
            self.want_if_behind(&name);
            self.pump(now);
            return;
        }
        if message.seq <= chat.cursor {
            return;
        }
        chat.told = chat.told.max(message.seq);
        if !chat.known {
            chat.hold(message, &self.limits);
        } else if chat.behind_us > 0 {
            // Of a history that ends. It comes again under the next one.
        } else if self.lag >= self.limits.unconfirmed_messages_max {
            self.behind = true;
        } else {
            let before = chat.lag();
            chat.take_pushed(&name, message, is_own, &self.limits, &mut self.actions);
            self.lag += chat.lag() - before;
            if let Some(at) = chat.watch_hole(now, &self.limits) {
                wake(&mut self.deadline, at);
            }
        }
    }

    /// A chat that we have no cursor for. On a complete device it is new; else the Sync under way judges it.
    fn begin_chat(&mut self, chat: &str, history: u64) -> Arc<str> {
        let name: Arc<str> = chat.into();
        let state = if self.complete { Chat::known(history, 0) } else { Chat::unknown(history) };
        if self.complete {
            self.actions.push_back(Action::Store { chat: name.clone(), history, seq: 0, acked: 0 });
        }
        self.chats.insert(name.clone(), state);
        name
    }
}

/// The server says try again; anything else it will say again.
fn is_transient(code: Code) -> bool {
    matches!(code, Code::Unavailable | Code::RateLimited | Code::TooManyConnections)
}

fn wake(deadline: &mut Option<Instant>, at: Instant) {
    *deadline = Some(deadline.map_or(at, |old| old.min(at)));
}

/// A Sync beside its cursors: the frame's header, two chat names, the request's number.
const SYNC_OVERHEAD_BYTES: usize = 512;
/// Pulls that were asked again and whose answer would still be taken.
const LATE_MAX: usize = 32;
/// Longest that a server may ask for.
const ACK_WITHIN_MS_MAX: u32 = 60_000;
/// An Error without `retry_after_ms` is not asked again faster than this.
const RETRY_MS_MIN: u64 = 100;
/// A Pull that met a fault of the server, which a person must look at.
const RETRY_INTERNAL_MS: u64 = 30_000;
/// A Sync that was refused for good. Without one nothing is known, so it is asked again all the same, rarely.
const RETRY_FINAL_MS: u64 = 5_000;
