//! The outbox against a simulated server that follows the dedupe rules of the wire protocol, over connections that lose
//! answers and break, with a store that restarts. Seeded by proptest; no I/O.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use bytes::Bytes;
use client::outbox::{Action, Limits, Outbox, Outcome, StoredChat};
use proptest::prelude::*;
use proto::wire::{self, Code};

/// The row of (chat, stream): watermark, and the answers to the last 32 ids.
#[derive(Default, Clone)]
struct Row {
    watermark: u64,
    answers: VecDeque<(u64, Option<u64>)>,
}

#[derive(Default, Clone)]
struct Server {
    rows: BTreeMap<(String, u64), Row>,
    chats: BTreeMap<String, Vec<Bytes>>,
}

enum Answer {
    Ack(wire::SendAck),
    Error(wire::Error),
}

impl Server {
    fn send(&mut self, send: &wire::Send, unavailable: bool) -> Answer {
        let error = |code: Code, expected: u64| {
            Answer::Error(wire::Error {
                code: code as i32,
                stream: send.stream,
                n: send.n,
                chat: send.chat.clone(),
                expected,
                retry_after_ms: if code == Code::Unavailable { 300 } else { 0 },
                ..Default::default()
            })
        };
        if unavailable {
            return error(Code::Unavailable, 0);
        }
        let row = self.rows.entry((send.chat.clone(), send.stream)).or_default();
        if send.n > row.watermark + 1 {
            return error(Code::OutOfOrder, row.watermark + 1);
        }
        if send.n == row.watermark + 1 {
            let refused = send.body.starts_with(b"refuse");
            let seq = (!refused).then(|| {
                let chat = self.chats.entry(send.chat.clone()).or_default();
                chat.push(send.body.clone());
                chat.len() as u64
            });
            row.watermark = send.n;
            row.answers.push_back((send.n, seq));
            if row.answers.len() > 32 {
                row.answers.pop_front();
            }
        }
        match row.answers.iter().find(|(n, _)| *n == send.n) {
            None => error(Code::TooOld, 0),
            Some((_, None)) => error(Code::MessageTooLarge, 0),
            Some((_, Some(seq))) => Answer::Ack(wire::SendAck {
                stream: send.stream,
                n: send.n,
                chat: send.chat.clone(),
                seq: *seq,
                time_us: 1,
                history: 7,
            }),
        }
    }
}

/// What a store would hold.
#[derive(Default)]
struct Disk(BTreeMap<String, (u64, u64, BTreeMap<u64, Bytes>)>);

struct World {
    now: Instant,
    outbox: Outbox,
    server: Server,
    disk: Disk,
    up: VecDeque<wire::Send>,
    down: VecDeque<Answer>,
    connected: bool,
    outcomes: BTreeMap<u64, Outcome>,
    /// What the answered messages said.
    bodies: BTreeMap<u64, Bytes>,
    /// Tickets whose outbox was restarted: their answers come without ticket.
    orphaned: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        World {
            now: Instant::now(),
            outbox: Outbox::new(Limits::default(), seed),
            server: Server::default(),
            disk: Disk::default(),
            up: VecDeque::new(),
            down: VecDeque::new(),
            connected: false,
            outcomes: BTreeMap::new(),
            bodies: BTreeMap::new(),
            orphaned: 0,
        }
    }

    fn drain(&mut self) {
        while let Some(action) = self.outbox.next_action() {
            match action {
                Action::Store { chat, stream, n, body } => {
                    let row = self.disk.0.entry(chat.to_string()).or_default();
                    assert_eq!((row.0, row.1), (stream, n), "numbers rise without gaps");
                    row.1 = n + 1;
                    row.2.insert(n, body.bytes);
                }
                Action::StoreStream { chat, stream } => {
                    self.disk.0.insert(chat.to_string(), (stream, 1, BTreeMap::new()));
                }
                Action::StoreAnswered { chat, n } => {
                    self.disk.0.get_mut(&*chat).unwrap().2.remove(&n).expect("answered once");
                }
                Action::Trouble { .. } => panic!("this server has no faults"),
                Action::Send(send) => {
                    assert!(self.connected);
                    let row = &self.disk.0[&send.chat];
                    assert_eq!(row.0, send.stream);
                    assert_eq!(row.2.get(&send.n), Some(&send.body), "stored before it is sent");
                    let oldest = *row.2.first_key_value().unwrap().0;
                    assert!(send.n - oldest < 32 && row.2.len() <= 32, "never more than 32 outstanding");
                    self.up.push_back(send);
                }
                Action::Done { ticket, body, outcome, .. } => match ticket {
                    Some(ticket) => {
                        assert_eq!(self.outcomes.insert(ticket, outcome), None, "answered once");
                        self.bodies.insert(ticket, body.bytes);
                    }
                    None => self.orphaned += 1,
                },
            }
        }
    }

    fn connect(&mut self) {
        self.break_off();
        self.connected = true;
        self.outbox.connected(32, self.now);
        self.drain();
    }

    /// Frames on their way up may still reach the server; their answers are lost.
    fn break_off(&mut self) {
        self.connected = false;
        self.outbox.disconnected();
        self.drain();
        for send in std::mem::take(&mut self.up) {
            self.server.send(&send, false);
        }
        self.down.clear();
    }

    fn restart(&mut self, seed: u64) {
        self.break_off();
        let stored = self.disk.0.iter().map(|(chat, (stream, next_n, unanswered))| StoredChat {
            chat: chat.clone(),
            stream: *stream,
            next_n: *next_n,
            unanswered: unanswered.iter().map(|(n, body)| (*n, body.clone().into())).collect(),
        });
        self.outbox = Outbox::restore(Limits::default(), seed, stored.collect::<Vec<_>>());
    }

    fn step(&mut self, unavailable: bool, lose_answer: bool) {
        if let Some(send) = self.up.pop_front() {
            let answer = self.server.send(&send, unavailable);
            if !lose_answer {
                self.down.push_back(answer);
            }
        }
    }

    fn answer(&mut self) {
        match self.down.pop_front() {
            Some(Answer::Ack(ack)) => self.outbox.ack(ack, self.now),
            Some(Answer::Error(error)) => self.outbox.error(error, Duration::from_millis(3), self.now),
            None => {}
        }
        self.drain();
    }

    fn settle(&mut self) {
        self.connect();
        for _ in 0..200_000 {
            while !self.up.is_empty() || !self.down.is_empty() {
                self.step(false, false);
                self.answer();
            }
            if self.outbox.unanswered() + self.outbox.queued() == 0 {
                return;
            }
            self.now = self
                .outbox
                .next_deadline()
                .expect("something is due while something is unanswered")
                .max(self.now);
            self.outbox.tick(self.now);
            self.drain();
        }
        panic!("never settles");
    }
}

#[derive(Debug, Clone)]
enum Event {
    Submit { chat: u8, count: u8, refuse: bool },
    Step { times: u8, unavailable: bool, lose_answer: bool },
    Answer(u8),
    Wait(u16),
    Break,
    Connect,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => (0u8..3, 1u8..40, prop::bool::weighted(0.1)).prop_map(|(chat, count, refuse)| Event::Submit { chat, count, refuse }),
        6 => (1u8..40, prop::bool::weighted(0.15), prop::bool::weighted(0.1)).prop_map(|(times, unavailable, lose_answer)| Event::Step { times, unavailable, lose_answer }),
        6 => (1u8..40).prop_map(Event::Answer),
        2 => (0u16..8_000).prop_map(Event::Wait),
        1 => Just(Event::Break),
        2 => Just(Event::Connect),
    ]
}

fn run(world: &mut World, events: &[Event], submitted: &mut BTreeMap<String, Vec<(u64, Bytes)>>) {
    let mut ticket = submitted.values().map(|list| list.len() as u64).sum::<u64>();
    for event in events {
        match *event {
            Event::Submit { chat, count, refuse } => {
                for _ in 0..count {
                    let body = Bytes::from(format!("{}{ticket}", if refuse { "refuse" } else { "body" }));
                    let chat = format!("a:{chat}");
                    world.outbox.submit(ticket, &chat, body.clone(), world.now).expect("below the limit");
                    submitted.entry(chat).or_default().push((ticket, body));
                    ticket += 1;
                    world.drain();
                }
            }
            Event::Step { times, unavailable, lose_answer } => {
                for _ in 0..times {
                    world.step(unavailable, lose_answer);
                }
            }
            Event::Answer(times) => (0..times).for_each(|_| world.answer()),
            Event::Wait(ms) => {
                world.now += Duration::from_millis(ms.into());
                world.outbox.tick(world.now);
                world.drain();
            }
            Event::Break => world.break_off(),
            Event::Connect => world.connect(),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases.max(300), ..ProptestConfig::default() })]

    #[test]
    fn every_message_is_answered_once_and_stored_once_in_order(seed in any::<u64>(), events in prop::collection::vec(event(), 1..60)) {
        let mut world = World::new(seed);
        let mut submitted = BTreeMap::new();
        run(&mut world, &events, &mut submitted);
        world.settle();
        for (chat, list) in &submitted {
            let expected: Vec<_> = list.iter().filter(|(_, body)| !body.starts_with(b"refuse")).collect();
            let stored = world.server.chats.remove(chat).unwrap_or_default();
            prop_assert_eq!(&stored, &expected.iter().map(|(_, body)| body.clone()).collect::<Vec<_>>());
            for (index, (ticket, body)) in expected.iter().enumerate() {
                let outcome = Outcome::Sent { history: 7, seq: index as u64 + 1, time_us: 1 };
                prop_assert_eq!(world.outcomes.remove(ticket), Some(outcome));
                prop_assert_eq!(&world.bodies[ticket], body);
            }
            for (ticket, _) in list.iter().filter(|(_, body)| body.starts_with(b"refuse")) {
                prop_assert!(matches!(world.outcomes.remove(ticket), Some(Outcome::Refused { code: Code::MessageTooLarge, .. })), "refused");
            }
        }
        prop_assert!(world.outcomes.is_empty());
    }

    #[test]
    fn a_restart_loses_no_stored_message_and_doubles_none(
        seed in any::<u64>(),
        before in prop::collection::vec(event(), 1..40),
        is_old in any::<bool>(),
        after in prop::collection::vec(event(), 1..40),
    ) {
        let mut world = World::new(seed);
        let mut submitted = BTreeMap::new();
        run(&mut world, &before, &mut submitted);
        if is_old {
            // The folder is an older copy of itself: it lacks the last ids, which have been sent.
            for row in world.disk.0.values_mut() {
                row.1 = row.1.saturating_sub(3).max(1);
                row.2.retain(|n, _| *n < row.1);
            }
        }
        let kept: usize = world.disk.0.values().map(|row| row.2.len()).sum();
        world.restart(seed ^ 1);
        run(&mut world, &after, &mut submitted);
        world.settle();
        prop_assert_eq!(world.orphaned as usize, kept);
        for (chat, list) in &submitted {
            let stored = world.server.chats.remove(chat).unwrap_or_default();
            // In order and once; what had no number yet at the restart may be missing.
            let mut rest = list.iter().map(|(_, body)| body);
            for body in &stored {
                prop_assert!(rest.any(|other| other == body), "{body:?} doubled or out of order");
            }
            for (ticket, body) in list {
                if let Some(Outcome::Sent { .. }) = world.outcomes.get(ticket) {
                    prop_assert!(stored.contains(body));
                }
            }
        }
    }

    #[test]
    fn a_store_that_came_back_older_gets_no_message_twice(
        seed in any::<u64>(),
        before in prop::collection::vec(event(), 1..30),
        lost in prop::collection::vec(event(), 1..30),
        restarts in any::<bool>(),
        after in prop::collection::vec(event(), 1..30),
    ) {
        let mut world = World::new(seed);
        let mut submitted = BTreeMap::new();
        run(&mut world, &before, &mut submitted);
        let older = world.server.clone();
        run(&mut world, &lost, &mut submitted);
        world.server = older;
        if restarts {
            world.restart(seed ^ 1);
        }
        run(&mut world, &after, &mut submitted);
        world.settle();
        for (chat, list) in &submitted {
            let stored = world.server.chats.remove(chat).unwrap_or_default();
            // In order and once. What was answered and is gone is what the history's new number tells of.
            let mut rest = list.iter();
            for body in &stored {
                prop_assert!(rest.any(|(_, other)| other == body), "{body:?} doubled or out of order");
            }
            for (ticket, body) in list {
                if matches!(world.outcomes.get(ticket), Some(Outcome::Refused { .. })) {
                    prop_assert!(!stored.contains(body));
                }
            }
            if !restarts {
                prop_assert!(list.iter().all(|(ticket, _)| world.outcomes.contains_key(ticket)));
            }
        }
    }

    #[test]
    fn a_server_that_forgot_gets_no_message_twice(seed in any::<u64>(), before in prop::collection::vec(event(), 1..30), after in prop::collection::vec(event(), 1..30)) {
        let mut world = World::new(seed);
        let mut submitted = BTreeMap::new();
        run(&mut world, &before, &mut submitted);
        // Rows expire, messages stay. No first id is resent, and none is on its way, for so long: `resend_days_max`.
        let disk = &world.disk;
        let up = &world.up;
        world.server.rows.retain(|(chat, stream), _| {
            let unanswered = disk.0.get(chat).is_some_and(|row| row.0 == *stream && row.2.contains_key(&1));
            unanswered || up.iter().any(|send| (&send.chat, send.stream, send.n) == (chat, *stream, 1))
        });
        run(&mut world, &after, &mut submitted);
        world.settle();
        for (chat, list) in &submitted {
            let stored = world.server.chats.remove(chat).unwrap_or_default();
            for (ticket, body) in list {
                let times = stored.iter().filter(|other| *other == body).count();
                match &world.outcomes[ticket] {
                    Outcome::Sent { seq, .. } => prop_assert_eq!((times, &stored[*seq as usize - 1]), (1, body)),
                    Outcome::Refused { .. } => prop_assert_eq!(times, 0),
                    Outcome::Unknown => prop_assert!(times <= 1),
                }
            }
        }
    }
}

#[test]
fn the_first_message_after_the_row_expired_is_sent_all_the_same() {
    let mut world = World::new(3);
    let mut submitted = BTreeMap::new();
    run(&mut world, &[Event::Connect, Event::Submit { chat: 1, count: 3, refuse: false }], &mut submitted);
    world.settle();
    world.server.rows.clear();
    run(&mut world, &[Event::Submit { chat: 1, count: 5, refuse: false }], &mut submitted);
    while world.outbox.unanswered() > 0 {
        while !world.up.is_empty() || !world.down.is_empty() {
            world.step(false, false);
            world.answer();
        }
        world.now = world.outbox.next_deadline().unwrap_or(world.now).max(world.now);
        world.outbox.tick(world.now);
        world.drain();
    }
    assert_eq!(world.server.chats["a:1"].len(), 8);
    assert!(world.outcomes.values().all(|outcome| matches!(outcome, Outcome::Sent { .. })));
}

#[test]
fn an_unanswered_message_older_than_the_servers_memory_is_unknown_and_not_sent() {
    let now = Instant::now();
    let stored =
        StoredChat { chat: "a:b".into(), stream: 5, next_n: 2, unanswered: vec![(1, Bytes::new().into())] };
    let mut outbox = Outbox::restore(Limits::default(), 1, [stored]);
    outbox.expire("a:b");
    outbox.connected(32, now);
    outbox.submit(1, "a:b", Bytes::new(), now).unwrap();
    let actions: Vec<_> = std::iter::from_fn(|| outbox.next_action()).collect();
    assert!(matches!(&actions[1], Action::Done { ticket: None, outcome: Outcome::Unknown, .. }));
    let sent: Vec<_> = actions.iter().filter(|action| matches!(action, Action::Send(_))).collect();
    assert!(matches!(sent[..], [Action::Send(send)] if send.stream != 5 && send.n == 1));
}

#[test]
fn a_stall_ends_with_one_resend_of_everything() {
    let mut world = World::new(1);
    let mut submitted = BTreeMap::new();
    run(&mut world, &[Event::Connect, Event::Submit { chat: 1, count: 32, refuse: false }], &mut submitted);
    world.step(true, false);
    (1..32).for_each(|_| world.step(false, false));
    (0..16).for_each(|_| world.answer());
    let wait = Event::Wait(400);
    run(&mut world, std::slice::from_ref(&wait), &mut submitted);
    assert!(world.up.is_empty(), "half of the answers is still to come");
    (0..16).for_each(|_| world.answer());
    run(&mut world, &[wait.clone(), wait], &mut submitted);
    assert_eq!(world.up.len(), 32);
}

#[test]
fn the_queue_behind_the_window_is_bounded() {
    let now = Instant::now();
    let mut outbox = Outbox::new(Limits { queued_messages_max: 10, ..Limits::default() }, 1);
    outbox.connected(32, now);
    for ticket in 0..42 {
        outbox.submit(ticket, "a:b", Bytes::new(), now).unwrap();
    }
    assert!(outbox.submit(42, "a:b", Bytes::new(), now).is_err());
    outbox.submit(43, "a:c", Bytes::new(), now).expect("another chat has room at once");
}

#[test]
fn a_chat_that_is_not_ours_is_refused_as_a_whole() {
    for (chat, code) in [("x", Code::BadChat), ("b:c", Code::NotAMember)] {
        refused_as_a_whole(chat, code);
    }
}

fn refused_as_a_whole(chat: &str, code: Code) {
    let now = Instant::now();
    let mut outbox = Outbox::new(Limits::default(), 1);
    outbox.connected(32, now);
    for ticket in 0..3 {
        outbox.submit(ticket, chat, Bytes::new(), now).unwrap();
    }
    let mut sent = None;
    while let Some(action) = outbox.next_action() {
        if let Action::Send(send) = action {
            sent.get_or_insert(send);
        }
    }
    let send = sent.unwrap();
    let error =
        wire::Error { code: code as i32, stream: send.stream, n: 1, chat: send.chat, ..Default::default() };
    outbox.error(error, Duration::ZERO, now);
    let mut refused = 0;
    while let Some(action) = outbox.next_action() {
        refused += u32::from(matches!(action, Action::Done { outcome: Outcome::Refused { .. }, .. }));
    }
    assert_eq!((refused, outbox.unanswered()), (3, 0));
}
