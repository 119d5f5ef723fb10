//! The message load of one engine thread: its users, its part of the schedule, its part of the checker.
//!
//! Trap: most connections of a big run only sit there. Only those that send or are sent to have an inbox and an outbox.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use proto::frame;
use proto::name::Chat;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::body::Body;
use super::participant::{News, Participant};
use super::plan::ChatPlan;
use crate::checker::{Checker, Lane};
use crate::engine::{Io, Mode, Share};
use crate::fault::Fault;
use crate::session::{Heard, Session, user};

/// What all threads of a run share.
#[derive(Debug)]
pub struct ChatRun {
    /// In user names.
    pub name: String,
    /// In bodies.
    pub number: u64,
    /// Who sends what.
    pub plan: ChatPlan,
}

/// See the head of this file.
pub struct ChatMode {
    run: Arc<ChatRun>,
    share: Share,
    session: Session,
    people: HashMap<u32, Participant>,
    /// People with something due.
    due: BinaryHeap<Reverse<(u64, u32)>>,
    senders: Vec<u32>,
    /// The next message: round, and place among `senders`.
    next: (u64, usize),
    checker: Checker,
    /// Attempts in a row that failed, of connections that are away.
    failures: HashMap<u32, u32>,
    synced: HashMap<u32, ()>,
    random: SmallRng,
    out: BytesMut,
    news: Vec<News>,
}

impl ChatMode {
    /// This thread's part of a run.
    pub fn new(run: Arc<ChatRun>, share: Share) -> ChatMode {
        let range = share.first..share.first + share.count;
        let mut random = SmallRng::seed_from_u64(run.number ^ u64::from(share.thread));
        let mine = run.plan.participants().into_iter().filter(|number| range.contains(number));
        let people = mine
            .map(|number| (number - share.first, Participant::new(user(&run.name, number), random.random())))
            .collect();
        ChatMode {
            session: Session::new(&run.name, share.first),
            senders: run.plan.senders_in(range),
            run,
            share,
            people,
            due: BinaryHeap::new(),
            next: (0, 0),
            checker: Checker::default(),
            failures: HashMap::new(),
            synced: HashMap::new(),
            random,
            out: BytesMut::new(),
            news: Vec::new(),
        }
    }

    /// Submits what is due. When the next message is.
    fn send_due(&mut self, io: &mut Io) -> Option<u64> {
        let go_us = io.control.go_us()?;
        loop {
            let (round, place) = self.next;
            let due = self.run.plan.due(*self.senders.get(place)?, round)?;
            let due_us = go_us + due.after_us;
            if due_us > io.now_us() {
                return Some(due_us);
            }
            self.next = if place + 1 == self.senders.len() { (round + 1, 0) } else { (round, place + 1) };
            self.submit(due.lane, due.counter, due_us, io);
        }
    }

    fn submit(&mut self, lane: Lane, counter: u64, due_us: u64, io: &mut Io) {
        let index = lane.from - self.share.first;
        let (mine, theirs) = (user(&self.run.name, lane.from), user(&self.run.name, lane.to));
        let Some(person) = self.people.get_mut(&index) else { return };
        let Ok(chat) = Chat::pair(&mine, &theirs) else { return };
        let body = Body { run: self.run.number, from: lane.from, counter, due_us }.encode();
        let now = io.clock.instant(io.now_us());
        io.sample.sent += 1;
        if !person.submit(ticket(lane.to, counter), &chat.to_string(), body, now) {
            io.sample.unsure += 1;
            io.sample.fault("message_queue_full".into());
        }
        self.carry_out(index, io);
    }

    /// Sends what this user has to say and counts what it has to tell.
    fn carry_out(&mut self, index: u32, io: &mut Io) {
        let Some(person) = self.people.get_mut(&index) else { return };
        let now = io.clock.instant(io.now_us());
        self.out.clear();
        person.carry_out(now, &mut self.out, &mut self.news);
        if let Some(at) = person.next_deadline() {
            let at = io.clock.us(at).max(io.now_us() + 1);
            if person.looked_at_us.is_none_or(|looked| at < looked) {
                person.looked_at_us = Some(at);
                self.due.push(Reverse((at, index)));
            }
        }
        if !self.out.is_empty() {
            io.send(index, &self.out);
        }
        let mut news = std::mem::take(&mut self.news);
        for one in news.drain(..) {
            self.count(index, one, io);
        }
        self.news = news;
    }

    fn count(&mut self, index: u32, news: News, io: &mut Io) {
        let me = self.share.first + index;
        match news {
            News::Synced => {
                if self.synced.insert(index, ()).is_none() {
                    io.sample.synced += 1;
                }
            }
            News::Acked(ticket) => {
                let (to, counter) = of_ticket(ticket);
                self.checker.acked(Lane { from: me, to }, counter);
                io.sample.acked += 1;
            }
            News::Unsure(_, why) => {
                io.sample.unsure += 1;
                io.sample.fault(format!("message_{why}"));
            }
            News::Delivered(message) => match Body::decode(self.run.number, &message.body) {
                Some(body) if body.from == me => {}
                Some(body) => {
                    let lane = Lane { from: body.from, to: me };
                    if self.checker.delivered(lane, body.counter, message.history, message.seq) {
                        io.sample.delivered += 1;
                        io.sample.latency.saturating_record(io.now_us().saturating_sub(body.due_us));
                    }
                }
                None => self.checker.foreign(),
            },
        }
    }

    /// Looks after the people with something due. When the next is.
    fn look_after(&mut self, io: &mut Io) -> Option<u64> {
        while let Some(Reverse((at, index))) = self.due.peek().copied() {
            if at > io.now_us() {
                return Some(at);
            }
            self.due.pop();
            let Some(person) = self.people.get_mut(&index) else { continue };
            if person.looked_at_us != Some(at) {
                continue; // looked after earlier meanwhile
            }
            person.looked_at_us = None;
            person.tick(io.clock.instant(io.now_us()));
            self.carry_out(index, io);
        }
        None
    }
}

impl Mode for ChatMode {
    type Part = Checker;

    fn greet(&mut self, index: u32, attempt: u64, out: &mut BytesMut) {
        self.session.login(index, attempt, out);
    }

    fn ready_at_once(&self) -> bool {
        false
    }

    fn receive(&mut self, index: u32, bytes: &[u8], io: &mut Io) -> Result<usize, Fault> {
        let mut used = 0;
        let jitter = Duration::from_millis(self.random.random_range(0..JITTER_MS));
        while let Some(frame) =
            frame::cut(&bytes[used..], proto::FRAME_BYTES_MAX).map_err(|_| Fault::BadFrame)?
        {
            used += frame.wire_bytes();
            let heard = self.session.hear(index, &frame, io)?;
            let now = io.clock.instant(io.now_us());
            match (heard, self.people.get_mut(&index)) {
                (Heard::LoggedIn(ack), person) => {
                    self.failures.remove(&index);
                    if let Some(person) = person {
                        person.connected(ack.unanswered_max, now);
                    }
                }
                (Heard::Other(proto::command::ServerFrame::GoAway(go)), _) => {
                    return Err(Fault::GoAway { within_ms: go.within_ms });
                }
                (Heard::Other(frame), Some(person)) => person.hear(frame, jitter, now),
                (Heard::Other(_) | Heard::Nothing, _) => {}
            }
        }
        self.carry_out(index, io);
        Ok(used)
    }

    fn lost(&mut self, index: u32, fault: &Fault, _: &mut Io) -> Option<u64> {
        if let Some(person) = self.people.get_mut(&index) {
            person.disconnected();
        }
        let failures = self.failures.entry(index).or_default();
        *failures += 1;
        let backoff = (BACKOFF_MS_MIN << (*failures).min(6)).min(BACKOFF_MS_MAX);
        let jittered = self.random.random_range(backoff / 2..=backoff);
        let asked = match fault {
            Fault::GoAway { within_ms } => self.random.random_range(0..=u64::from(*within_ms)),
            other => other.wait_ms(),
        };
        Some(jittered.max(asked))
    }

    fn tick(&mut self, io: &mut Io) -> Option<u64> {
        let dues = [self.session.tick(io), self.send_due(io), self.look_after(io)];
        dues.into_iter().flatten().min()
    }

    fn finish(self) -> Checker {
        self.checker
    }
}

/// A message, as the outbox hands it back.
fn ticket(to: u32, counter: u64) -> u64 {
    u64::from(to) << 32 | counter
}

fn of_ticket(ticket: u64) -> (u32, u64) {
    ((ticket >> 32) as u32, ticket & u64::from(u32::MAX))
}

const BACKOFF_MS_MIN: u64 = 50;
const BACKOFF_MS_MAX: u64 = 3_000;
/// Added to the wait that a server asks for, so that not all come back at once.
const JITTER_MS: u64 = 100;
