//! One chat of the outbox: numbered messages without an answer, and those waiting for a number. Pure, owned by the outbox.
//!
//! Trap: the window counts ids from the oldest unanswered to the newest, not messages: the server remembers the answers
//! to its last 32 ids, answered ones included.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::wire;

use crate::body::Body;
use crate::retry::Retry;

use super::{Action, Outcome, SplitMix, StoredChat, too_long};

#[derive(Debug, Default)]
pub(super) struct Queue {
    /// 0: none drawn yet.
    stream: u64,
    next_n: u64,
    pub unanswered: VecDeque<Unanswered>,
    pub waiting: VecDeque<Waiting>,
    /// Nothing is sent before this time, and then everything unanswered.
    stalled_until: Option<Instant>,
    /// Refusals for now, on this connection.
    pub retry: Retry,
    /// The application was told that the server has a fault.
    pub in_trouble: bool,
    /// An answer in this round did not fit our memory of the stream.
    pub struck: bool,
    /// Rounds in a row of which that is true. One may be a late answer to an old copy; after two the stream ends.
    strikes: u8,
    /// An earlier process began this stream: no new number in it. Its folder may be an older copy of itself, and lack numbers that were
    /// given.
    inherited: bool,
}

/// A message without a number.
#[derive(Debug)]
pub(super) struct Waiting {
    pub ticket: Option<u64>,
    pub body: Body,
}

/// A message with an id.
#[derive(Debug)]
pub(super) struct Unanswered {
    n: u64,
    pub body: Body,
    pub ticket: Option<u64>,
    /// Copies on their way, on this connection.
    copies: u32,
    /// Last sent, on this connection.
    sent_at: Option<Instant>,
    /// A copy may have been stored.
    doubt: bool,
    /// First tried by this process.
    since: Option<Instant>,
}

impl Queue {
    pub fn begin(stream: u64) -> Self {
        Queue { stream, next_n: 1, ..Queue::default() }
    }

    pub fn restore(stored: StoredChat) -> Self {
        let unanswered = stored.unanswered.into_iter().map(|(n, body)| Unanswered {
            n,
            body,
            ticket: None,
            copies: 0,
            sent_at: None,
            doubt: true,
            since: None,
        });
        Queue {
            stream: stored.stream,
            next_n: stored.next_n,
            unanswered: unanswered.collect(),
            inherited: true,
            ..Queue::default()
        }
    }

    pub fn is_idle(&self) -> bool {
        self.unanswered.is_empty() && self.waiting.is_empty()
    }

    /// One more message would get a number at once.
    pub fn has_room(&self, window: u64) -> bool {
        self.waiting.is_empty() && self.may_number(window)
    }

    pub fn holds(&self, stream: u64, n: u64) -> bool {
        stream == self.stream && self.unanswered.iter().any(|entry| entry.n == n)
    }

    /// The server expects an n that we can send: one of the unanswered, or one between them that it did answer.
    pub fn fits(&self, expected: u64) -> bool {
        let oldest = self.unanswered.front().map_or(self.next_n, |entry| entry.n);
        (oldest..self.next_n).contains(&expected)
    }

    pub fn take(&mut self, stream: u64, n: u64) -> Option<Unanswered> {
        if stream != self.stream {
            return None;
        }
        let at = self.unanswered.iter().position(|entry| entry.n == n)?;
        (self.struck, self.strikes, self.in_trouble) = (false, 0, false);
        self.retry.answered();
        self.unanswered.remove(at)
    }

    /// This copy was not stored.
    pub fn answered_out_of_order(&mut self, n: u64) {
        if let Some(entry) = self.unanswered.iter_mut().find(|entry| entry.n == n) {
            entry.copies = entry.copies.saturating_sub(1);
        }
    }

    /// This copy was answered, and may have been stored all the same (a store call that timed out).
    pub fn answered_in_doubt(&mut self, n: u64) {
        if let Some(entry) = self.unanswered.iter_mut().find(|entry| entry.n == n) {
            entry.copies = entry.copies.saturating_sub(1);
            entry.doubt = true;
        }
    }

    pub fn forget_connection(&mut self) {
        (self.stalled_until, self.struck, self.in_trouble) = (None, false, false);
        self.retry.answered();
        if self.strikes < STRIKES_MAX {
            self.strikes = 0;
        }
        for entry in &mut self.unanswered {
            entry.doubt |= entry.copies > 0;
            entry.copies = 0;
            entry.sent_at = None;
        }
    }

    /// Sends nothing before `until`; an earlier, longer stall stands.
    pub fn stall(&mut self, until: Instant) {
        self.stalled_until = Some(self.stalled_until.map_or(until, |old| old.max(until)));
    }

    /// Over when the time has come and every copy is answered, so that answers to old copies do not cause new resends;
    /// in any case some seconds later.
    pub fn stall_is_over(&self, now: Instant, resend_ms: u64) -> bool {
        self.stalled_until.is_none_or(|until| {
            let answered = self.unanswered.iter().all(|entry| entry.copies == 0);
            now >= until && (answered || now >= until + Duration::from_millis(resend_ms))
        })
    }

    /// A new connection: ends the stream when its oldest message has been tried for too long.
    pub fn expire(&mut self, now: Instant, age_max: Duration) {
        let Some(oldest) = self.unanswered.front_mut() else { return };
        if now.saturating_duration_since(*oldest.since.get_or_insert(now)) > age_max {
            self.end();
        }
    }

    /// The stream ends with the next connection.
    pub fn end(&mut self) {
        self.strikes = STRIKES_MAX;
    }

    /// The round is over and the answers to it, and to the one before, did not fit.
    pub fn is_struck_out(&mut self, now: Instant, resend_ms: u64) -> bool {
        if self.struck && self.stall_is_over(now, resend_ms) {
            self.struck = false;
            self.strikes += 1;
        }
        self.strikes >= STRIKES_MAX
    }

    /// Sends again what the end of a stall or a missing answer asks for; on a new connection everything.
    pub fn resend(&mut self, name: &Arc<str>, now: Instant, resend_ms: u64, actions: &mut VecDeque<Action>) {
        let Some(oldest) = self.unanswered.front() else {
            self.stalled_until = None;
            return;
        };
        let due = match (self.stalled_until, oldest.sent_at) {
            (Some(_), _) => self.stall_is_over(now, resend_ms),
            (None, None) => true,
            (None, Some(at)) => now >= at + Duration::from_millis(resend_ms),
        };
        if !due {
            return;
        }
        self.stalled_until = None;
        for entry in &mut self.unanswered {
            // A copy without an answer: it may have been stored, and its answer lost.
            entry.doubt |= entry.copies > 0;
            entry.send(name, self.stream, now, actions);
        }
    }

    /// Numbers and stores waiting messages as far as the window allows, and sends them when connected. How many.
    pub fn number(
        &mut self,
        name: &Arc<str>,
        window: u64,
        draw: &mut SplitMix,
        now: Instant,
        connected: bool,
        actions: &mut VecDeque<Action>,
    ) -> usize {
        let mut numbered = 0;
        while self.may_number(window) {
            let Some(Waiting { ticket, body }) = self.waiting.pop_front() else { break };
            if self.stream == 0 || self.inherited || self.next_n > proto::NUMBER_MAX {
                debug_assert!(self.unanswered.is_empty());
                (self.stream, self.next_n, self.inherited) = (draw.next(), 1, false);
                actions.push_back(Action::StoreStream { chat: name.clone(), stream: self.stream });
            }
            let (stream, n) = (self.stream, self.next_n);
            self.next_n += 1;
            actions.push_back(Action::Store { chat: name.clone(), stream, n, body: body.clone() });
            let mut entry =
                Unanswered { n, body, ticket, copies: 0, sent_at: None, doubt: false, since: Some(now) };
            if connected {
                entry.send(name, stream, now, actions);
            }
            self.unanswered.push_back(entry);
            numbered += 1;
        }
        numbered
    }

    /// Ends the stream. What cannot have been stored waits for a new number, in front; the rest is unknown.
    /// How many wait again.
    pub fn renew(&mut self, name: &Arc<str>, stream: u64, actions: &mut VecDeque<Action>) -> usize {
        actions.push_back(Action::StoreStream { chat: name.clone(), stream });
        let mut again = VecDeque::new();
        for entry in self.unanswered.drain(..) {
            if entry.never_left() {
                again.push_back(Waiting { ticket: entry.ticket, body: entry.body });
            } else {
                actions.push_back(entry.done(name, Outcome::Unknown));
            }
        }
        let count = again.len();
        again.append(&mut self.waiting);
        *self = Queue { waiting: again, ..Queue::begin(stream) };
        count
    }

    /// Refuses what is longer and never left. What has a number already can only be taken out with its stream, that is
    /// when nothing else of that may be stored.
    pub fn refuse_longer(
        &mut self,
        name: &Arc<str>,
        body_bytes_max: usize,
        draw: &mut SplitMix,
        actions: &mut VecDeque<Action>,
    ) {
        let is_numbered = self.unanswered.iter().any(|entry| entry.body.len() > body_bytes_max);
        if is_numbered && self.unanswered.iter().all(Unanswered::never_left) {
            self.renew(name, draw.next(), actions);
        }
        self.waiting.retain(|waiting| {
            let is_long = waiting.body.len() > body_bytes_max;
            if is_long {
                actions.push_back(too_long(waiting.ticket, name, &waiting.body, body_bytes_max));
            }
            !is_long
        });
    }

    pub fn deadline(&self, resend_ms: u64) -> Option<Instant> {
        let resend = Duration::from_millis(resend_ms);
        let oldest = self.unanswered.front()?;
        match self.stalled_until {
            Some(until) if self.unanswered.iter().all(|entry| entry.copies == 0) => Some(until),
            Some(until) => Some(until + resend),
            None => oldest.sent_at.map(|at| at + resend),
        }
    }

    fn may_number(&self, window: u64) -> bool {
        let free = match self.unanswered.front() {
            Some(oldest) => {
                !self.inherited && self.next_n <= proto::NUMBER_MAX && self.next_n - oldest.n < window
            }
            None => true,
        };
        free && self.stalled_until.is_none()
    }
}

impl Unanswered {
    /// That is what became of it.
    pub fn done(self, name: &Arc<str>, outcome: Outcome) -> Action {
        Action::Done { ticket: self.ticket, chat: name.clone(), body: self.body, outcome }
    }

    /// It cannot have been stored.
    pub fn never_left(&self) -> bool {
        !self.doubt && self.copies == 0
    }

    fn send(&mut self, name: &Arc<str>, stream: u64, now: Instant, actions: &mut VecDeque<Action>) {
        self.copies += 1;
        self.sent_at = Some(now);
        actions.push_back(Action::Send(wire::Send {
            stream,
            n: self.n,
            chat: name.to_string(),
            body: self.body.bytes.clone(),
            kind: self.body.kind,
        }));
    }
}

const STRIKES_MAX: u8 = 2;
