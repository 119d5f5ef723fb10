//! What a device wants to send: ids, the window of unanswered messages, resends. Pure: submissions, answers and `now` go
//! in, [`Action`]s come out; whoever owns the connection owns this and carries them out in order.
//!
//! Trap: [`Action::Store`] must be durable before the [`Action::Send`] behind it leaves. An id that was sent and
//! forgotten would be given to another body, and the server would answer that one with the first one's seq.
//!
//! An id is (`stream`, `n`): here every chat has a stream of its own. A new stream is drawn by each process, and when the server's memory of
//! the old one does not fit ours (it lost the row). Then a message that is still unanswered gets a new
//! id only when it cannot be stored under the old one: it never left, or each copy that left was answered OUT_OF_ORDER,
//! and no further copy of it can be accepted because this stream is never used again. Any other is
//! [`Outcome::Unknown`]: it may be stored, and sending it under a new id could show it twice.

mod queue;

use std::collections::BTreeMap;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::wire::{self, Code};

use crate::body::Body;
use queue::{Queue, Waiting};

/// What bounds an [`Outbox`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Ids per chat between the oldest unanswered one and the newest, both included. At most 32.
    pub unanswered_max: u64,
    /// Messages that wait for a place among these, over all chats.
    pub queued_messages_max: usize,
    /// A message unanswered for so long on a live connection is sent again.
    pub resend_ms: u64,
    /// A message unanswered for so long is unknown, and not sent again: servers remember ids for 7 days.
    pub resend_days_max: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            unanswered_max: proto::UNANSWERED_MAX,
            queued_messages_max: 4_096,
            resend_ms: 5_000,
            resend_days_max: 6,
        }
    }
}

/// What became of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Durable, and on its way to everybody.
    Sent {
        /// History of the chat.
        history: u64,
        /// Its place in the chat.
        seq: u64,
        /// The store's time.
        time_us: u64,
    },
    /// Final: it never appears.
    Refused {
        /// Why.
        code: Code,
        /// Why, in the server's words.
        text: String,
    },
    /// Stored or not: nobody can tell any more.
    Unknown,
}

/// What is to be done now, in this order.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Make this message and its id durable.
    Store {
        /// The chat.
        chat: Arc<str>,
        /// The stream of this chat.
        stream: u64,
        /// The number within stream and chat.
        n: u64,
        /// The body.
        body: Body,
    },
    /// The chat has a new stream; whatever was kept of the old one is void.
    StoreStream {
        /// The chat.
        chat: Arc<str>,
        /// The new stream.
        stream: u64,
    },
    /// This id is done with. Need not be durable at once: asking again gives the same answer.
    StoreAnswered {
        /// The chat.
        chat: Arc<str>,
        /// The number that was answered.
        n: u64,
    },
    /// Send this frame.
    Send(wire::Send),
    /// Tell the application: the server has a fault, and what is unanswered of this chat is sent again until it has none. Once a
    /// connection, or behind an answer.
    Trouble {
        /// The chat.
        chat: Arc<str>,
        /// What, in the server's words.
        text: String,
    },
    /// Tell whoever submitted it. No ticket: it was submitted before a restart.
    Done {
        /// What `submit` was given.
        ticket: Option<u64>,
        /// The chat.
        chat: Arc<str>,
        /// What it says.
        body: Body,
        /// What became of it.
        outcome: Outcome,
    },
}

/// The queue behind the unanswered messages is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{queued_messages_max} messages are waiting to be sent already")]
pub struct Full {
    /// The limit.
    pub queued_messages_max: usize,
}

/// A chat as it was stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredChat {
    /// The chat.
    pub chat: String,
    /// Its stream.
    pub stream: u64,
    /// The next n.
    pub next_n: u64,
    /// Unanswered messages, ascending.
    pub unanswered: Vec<(u64, Body)>,
}

/// See the head of this file. One per device.
#[derive(Debug)]
pub struct Outbox {
    limits: Limits,
    /// What this server allows, at most `limits.unanswered_max`.
    window: u64,
    /// The longest body that this server takes.
    body_bytes_max: usize,
    draw: SplitMix,
    chats: BTreeMap<Arc<str>, Queue>,
    actions: VecDeque<Action>,
    queued: usize,
    connected: bool,
    /// Nothing is due earlier. May be early, never late.
    deadline: Option<Instant>,
}

impl Outbox {
    /// Without memory. `seed`: 64 random bits, other ones at every start, from which streams are drawn.
    pub fn new(limits: Limits, seed: u64) -> Self {
        Outbox {
            limits,
            window: limits.unanswered_max.clamp(1, proto::UNANSWERED_MAX),
            body_bytes_max: usize::MAX,
            draw: SplitMix(seed),
            chats: BTreeMap::new(),
            actions: VecDeque::new(),
            queued: 0,
            connected: false,
            deadline: None,
        }
    }

    /// With what was stored, which may be an older copy. Its unanswered messages are sent again under their ids; new ones are of new streams,
    /// for an id that is not remembered may have been given.
    pub fn restore(limits: Limits, seed: u64, chats: impl IntoIterator<Item = StoredChat>) -> Self {
        let mut outbox = Outbox::new(limits, seed);
        for stored in chats {
            outbox.chats.insert(stored.chat.as_str().into(), Queue::restore(stored));
        }
        outbox
    }

    /// Takes a message for a chat (in the form that answers use). `ticket` comes back in [`Action::Done`].
    pub fn submit(
        &mut self,
        ticket: u64,
        chat: &str,
        body: impl Into<Body>,
        now: Instant,
    ) -> Result<(), Full> {
        let name: Arc<str> =
            self.chats.get_key_value(chat).map_or_else(|| chat.into(), |(name, _)| name.clone());
        let body = body.into();
        if self.connected && body.len() > self.body_bytes_max {
            self.actions.push_back(too_long(Some(ticket), &name, &body, self.body_bytes_max));
            return Ok(());
        }
        let queue = self.chats.entry(name.clone()).or_default();
        if self.queued >= self.limits.queued_messages_max && !queue.has_room(self.window) {
            return Err(Full { queued_messages_max: self.limits.queued_messages_max });
        }
        queue.waiting.push_back(Waiting { ticket: Some(ticket), body });
        self.queued += 1;
        self.advance(&name, now);
        Ok(())
    }

    /// The longest body that the server takes, as LoginAck says; 0: it does not. To be said before
    /// [`Outbox::connected`], which then refuses what is longer and cannot be stored yet; what may be is sent again all
    /// the same, for only its answer says what became of it.
    pub fn bodies_up_to(&mut self, message_bytes_max: usize) {
        self.body_bytes_max = if message_bytes_max == 0 { usize::MAX } else { message_bytes_max };
    }

    /// The oldest unanswered message of this chat is older than [`Limits::resend_days_max`] by the wall clock, which goes on while a
    /// machine sleeps: with the next connection it is unknown.
    pub fn expire(&mut self, chat: &str) {
        if let Some(queue) = self.chats.get_mut(chat) {
            queue.end();
        }
    }

    /// Logged in: everything unanswered goes out again, in order. `unanswered_max`: as LoginAck says, 0 if it does not.
    pub fn connected(&mut self, unanswered_max: u32, now: Instant) {
        self.disconnected();
        self.connected = true;
        self.window = match u64::from(unanswered_max) {
            0 => self.limits.unanswered_max,
            told => told.min(self.limits.unanswered_max),
        }
        .clamp(1, proto::UNANSWERED_MAX);
        let age_max = Duration::from_secs(self.limits.resend_days_max * 24 * 3600);
        let names: Vec<_> = self.chats.keys().cloned().collect();
        for name in names {
            if let Some(queue) = self.chats.get_mut(&name) {
                queue.expire(now, age_max);
                let queued = queue.waiting.len();
                queue.refuse_longer(&name, self.body_bytes_max, &mut self.draw, &mut self.actions);
                self.queued = self.queued + queue.waiting.len() - queued;
            }
            self.advance(&name, now);
        }
    }

    /// The connection is gone, and with it the answers to what was sent on it.
    pub fn disconnected(&mut self) {
        self.connected = false;
        self.deadline = None;
        self.chats.values_mut().for_each(Queue::forget_connection);
        self.actions.retain(|action| !matches!(action, Action::Send(_)));
    }

    /// A SendAck arrived.
    pub fn ack(&mut self, ack: wire::SendAck, now: Instant) {
        let Some((name, _)) = self.chats.get_key_value(&*ack.chat) else { return };
        let name = name.clone();
        let Some(queue) = self.chats.get_mut(&name) else { return };
        let Some(entry) = queue.take(ack.stream, ack.n) else { return };
        self.actions.push_back(Action::StoreAnswered { chat: name.clone(), n: ack.n });
        let outcome = Outcome::Sent { history: ack.history, seq: ack.seq, time_us: ack.time_us };
        self.actions.push_back(entry.done(&name, outcome));
        self.advance(&name, now);
    }

    /// An Error arrived that answers a Send. Others are ignored. `jitter` is added to the wait that the server asks for.
    pub fn error(&mut self, error: wire::Error, jitter: Duration, now: Instant) {
        let Some((name, _)) = self.chats.get_key_value(&*error.chat) else { return };
        let name = name.clone();
        let Some(queue) = self.chats.get_mut(&name) else { return };
        if !queue.holds(error.stream, error.n) {
            return;
        }
        let code = error.code();
        match code {
            Code::OutOfOrder => {
                queue.answered_out_of_order(error.n);
                queue.struck |= !queue.fits(error.expected);
                queue.stall(now + Duration::from_millis(OUT_OF_ORDER_MS));
            }
            // Decided by the chat's name alone, so nothing of it is stored, no id is used, and all of it is refused.
            Code::BadChat => self.refuse_chat(&name, code, &error.text),
            Code::NotAMember if !name.starts_with('#') => self.refuse_chat(&name, code, &error.text),
            // Decided in the message's own step: the id is used up.
            Code::NotAMember
            | Code::MessageTooLarge
            | Code::GroupExists
            | Code::GroupFull
            | Code::NotAllowed
            | Code::BadChange => {
                let Some(entry) = queue.take(error.stream, error.n) else { return };
                self.actions.push_back(Action::StoreAnswered { chat: name.clone(), n: error.n });
                self.actions.push_back(entry.done(&name, Outcome::Refused { code, text: error.text }));
            }
            // A code of a newer server is final as well. Whether the id is used is not said, so the stream ends.
            Code::BadRequest | Code::Unspecified => {
                let Some(entry) = queue.take(error.stream, error.n) else { return };
                self.actions.push_back(entry.done(&name, Outcome::Refused { code, text: error.text }));
                self.queued += queue.renew(&name, self.draw.next(), &mut self.actions);
            }
            Code::TooOld => {
                queue.answered_in_doubt(error.n);
                queue.struck = true;
                queue.stall(now + Duration::from_millis(OUT_OF_ORDER_MS));
            }
            _ => {
                queue.answered_in_doubt(error.n);
                if code == Code::Internal && !std::mem::replace(&mut queue.in_trouble, true) {
                    self.actions.push_back(Action::Trouble { chat: name.clone(), text: error.text });
                }
                let least = if code == Code::Internal { RETRY_INTERNAL_MS } else { RETRY_MS_MIN };
                let wait = Duration::from_millis(u64::from(error.retry_after_ms).max(least));
                let until = queue.retry.refused(wait, now) + jitter;
                queue.stall(until);
            }
        }
        self.advance(&name, now);
    }

    /// Does what is due. Cheap when nothing is.
    pub fn tick(&mut self, now: Instant) {
        if self.deadline.is_none_or(|at| now < at) {
            return;
        }
        self.deadline = None;
        let names: Vec<_> =
            self.chats.iter().filter(|(_, queue)| !queue.is_idle()).map(|(name, _)| name.clone()).collect();
        for name in names {
            self.advance(&name, now);
        }
    }

    /// When [`Outbox::tick`] should be called next; it may be called earlier at no harm.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// What is to be done next.
    pub fn next_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Messages that have an id and no answer.
    pub fn unanswered(&self) -> usize {
        self.chats.values().map(|queue| queue.unanswered.len()).sum()
    }

    /// Messages that wait for a place among the unanswered.
    pub fn queued(&self) -> usize {
        self.queued
    }

    /// The end: everything unanswered is unknown, tickets of what never left come back to be told so. `is_kept`: what has an id leaves
    /// another time.
    pub fn abandon(&mut self, is_kept: bool) -> Vec<u64> {
        let mut never_sent = Vec::new();
        for (name, queue) in &mut self.chats {
            for entry in queue.unanswered.drain(..) {
                if !is_kept && entry.never_left() {
                    never_sent.extend(entry.ticket);
                    continue;
                }
                self.actions.push_back(entry.done(name, Outcome::Unknown));
            }
            never_sent.extend(queue.waiting.drain(..).filter_map(|waiting| waiting.ticket));
        }
        self.queued = 0;
        never_sent
    }

    /// Sends, numbers and resends what this chat may send now.
    fn advance(&mut self, name: &Arc<str>, now: Instant) {
        let Some(queue) = self.chats.get_mut(name) else { return };
        if self.connected {
            if queue.is_struck_out(now, self.limits.resend_ms) {
                self.queued += queue.renew(name, self.draw.next(), &mut self.actions);
            }
            queue.resend(name, now, self.limits.resend_ms, &mut self.actions);
        }
        // Also offline: what has an id is stored and outlives the process.
        let numbered =
            queue.number(name, self.window, &mut self.draw, now, self.connected, &mut self.actions);
        self.queued -= numbered;
        if !self.connected {
            return;
        }
        if let Some(at) = queue.deadline(self.limits.resend_ms) {
            self.deadline = Some(self.deadline.map_or(at, |old| old.min(at)));
        }
    }

    /// Nothing for this chat will ever be taken.
    fn refuse_chat(&mut self, name: &Arc<str>, code: Code, text: &str) {
        let Some(queue) = self.chats.get_mut(name) else { return };
        self.queued -= queue.waiting.len();
        let numbered = queue.unanswered.drain(..).map(|entry| (entry.ticket, entry.body));
        let waiting = queue.waiting.drain(..).map(|waiting| (waiting.ticket, waiting.body));
        for (ticket, body) in numbered.chain(waiting) {
            let outcome = Outcome::Refused { code, text: text.to_owned() };
            self.actions.push_back(Action::Done { ticket, chat: name.clone(), body, outcome });
        }
        // The ids were not consumed, so the stream ends here.
        let stream = self.draw.next();
        *queue = Queue::begin(stream);
        self.actions.push_back(Action::StoreStream { chat: name.clone(), stream });
    }
}

fn too_long(ticket: Option<u64>, name: &Arc<str>, body: &Body, body_bytes_max: usize) -> Action {
    let text = format!("{} bytes, {body_bytes_max} allowed", body.len());
    let outcome = Outcome::Refused { code: Code::MessageTooLarge, text };
    Action::Done { ticket, chat: name.clone(), body: body.clone(), outcome }
}

/// Streams from a random seed (splitmix64): no random source in here, and no stream twice.
#[derive(Debug)]
struct SplitMix(u64);

impl SplitMix {
    /// Never 0, which means "no stream".
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)).max(1)
    }
}

/// A round that was answered OUT_OF_ORDER is not repeated faster than this.
const OUT_OF_ORDER_MS: u64 = 10;

/// A transient Error without `retry_after_ms` is not tried again faster than this.
const RETRY_MS_MIN: u64 = 100;
/// The server has a fault that a person must look at.
const RETRY_INTERNAL_MS: u64 = 1_000;
