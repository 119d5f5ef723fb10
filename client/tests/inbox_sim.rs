//! The inbox against a simulated server and a connection that drops, doubles and reorders pushes, breaks, skips and
//! answers `unavailable`. Seeded by proptest; no I/O.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use client::inbox::{Action, Inbox, Limits};
use proptest::prelude::*;
use proto::wire::{self, Code};

struct ServerChat {
    history: u64,
    head: u64,
    delivered: u64,
}

struct World {
    now: Instant,
    inbox: Inbox,
    chats: BTreeMap<String, ServerChat>,
    /// Pushes on their way.
    pushes: Vec<wire::Push>,
    questions: VecDeque<Action>,
    connected: bool,
    shown: BTreeMap<(String, u64), Vec<u64>>,
    unconfirmed: VecDeque<(String, u64, u64)>,
    stored: BTreeMap<String, (u64, u64)>,
    complete: bool,
    acks: BTreeMap<String, Vec<Instant>>,
    /// Acknowledgements on their way.
    acks_up: Vec<wire::PushAck>,
    lost: u32,
    page: usize,
}

impl World {
    fn new(limits: Limits) -> Self {
        World {
            now: Instant::now(),
            inbox: Inbox::new(limits),
            chats: BTreeMap::new(),
            pushes: Vec::new(),
            questions: VecDeque::new(),
            connected: false,
            shown: BTreeMap::new(),
            unconfirmed: VecDeque::new(),
            stored: BTreeMap::new(),
            complete: false,
            acks: BTreeMap::new(),
            acks_up: Vec::new(),
            lost: 0,
            page: 3,
        }
    }

    fn drain(&mut self) {
        while let Some(action) = self.inbox.next_action() {
            match action {
                Action::Deliver(message) => {
                    assert_eq!(message.body, body(message.seq));
                    let shown = self.shown.entry((message.chat.to_string(), message.history)).or_default();
                    assert!(
                        shown.last().is_none_or(|last| last + 1 == message.seq),
                        "{shown:?} then {}",
                        message.seq
                    );
                    shown.push(message.seq);
                    self.unconfirmed.push_back((message.chat.to_string(), message.history, message.seq));
                }
                Action::Gap { .. } => panic!("this server has no gaps"),
                Action::HistoryLost { .. } => self.lost += 1,
                Action::Store { chat, history, seq } => {
                    self.stored.insert(chat.to_string(), (history, seq));
                }
                Action::StoreComplete => self.complete = true,
                Action::Synced => {}
                Action::Ack(ack) => {
                    assert!(self.connected);
                    assert_eq!(
                        self.stored[&ack.chat],
                        (ack.history, ack.seq),
                        "acknowledged what is confirmed"
                    );
                    self.acks.entry(ack.chat.clone()).or_default().push(self.now);
                    self.acks_up.push(ack);
                }
                question => {
                    assert!(self.connected);
                    self.questions.push_back(question);
                }
            }
        }
    }

    fn take_acks(&mut self) {
        for ack in self.acks_up.drain(..) {
            let chat = self.chats.get_mut(&ack.chat).unwrap();
            if chat.history == ack.history {
                chat.delivered = chat.delivered.max(ack.seq);
            }
        }
    }

    fn append(&mut self, name: &str, own: bool) {
        let chat =
            self.chats.entry(name.to_owned()).or_insert(ServerChat { history: 9, head: 0, delivered: 0 });
        chat.head += 1;
        let message = message(chat.head);
        let history = chat.history;
        if own && self.connected {
            self.inbox.sent(name, history, message, self.now);
        } else if self.connected {
            self.pushes.push(wire::Push { chat: name.to_owned(), history, message: Some(message) });
        }
        self.drain();
    }

    fn arrive(&mut self, index: usize, copies: usize) {
        if self.pushes.is_empty() {
            return;
        }
        let push = self.pushes.remove(index % self.pushes.len());
        for _ in 0..copies {
            self.inbox.push(push.clone(), self.now);
        }
        self.drain();
    }

    fn answer(&mut self, unavailable: bool) {
        self.take_acks();
        let now = self.now;
        match self.questions.pop_front() {
            Some(Action::Sync(sync)) => {
                if unavailable {
                    self.inbox.error(&error(sync.request), now);
                } else {
                    self.inbox.sync_ack(self.sync(&sync), now);
                }
            }
            Some(Action::Pull(pull)) => {
                if unavailable {
                    self.inbox.error(&error(pull.request), now);
                } else {
                    self.inbox.pull_ack(self.pull(&pull), now);
                }
            }
            _ => {}
        }
        self.drain();
    }

    fn sync(&self, sync: &wire::Sync) -> wire::SyncAck {
        assert!(sync.cursors.windows(2).all(|pair| pair[0].chat < pair[1].chat));
        let inside = |name: &str| name > &*sync.after && (sync.until.is_empty() || name <= &*sync.until);
        assert!(sync.cursors.iter().all(|cursor| inside(&cursor.chat)));
        let news = |name: &str, chat: &ServerChat| {
            let held = sync.cursors.iter().find(|cursor| cursor.chat == name);
            held.is_none_or(|held| (held.history, held.seq) != (chat.history, chat.head))
        };
        let mut chats: Vec<_> = self
            .chats
            .iter()
            .filter(|(name, chat)| inside(name) && news(name, chat))
            .map(|(name, chat)| wire::ChatHead {
                chat: name.clone(),
                history: chat.history,
                head: chat.head,
                delivered: chat.delivered,
            })
            .collect();
        let has_more = chats.len() > self.page;
        chats.truncate(self.page);
        let next = if has_more { chats.last().unwrap().chat.clone() } else { String::new() };
        wire::SyncAck { request: sync.request, chats, has_more, next }
    }

    fn pull(&self, pull: &wire::Pull) -> wire::PullAck {
        let chat = &self.chats[&pull.chat];
        let last = chat.head.min(pull.cursor + 5);
        wire::PullAck {
            request: pull.request,
            chat: pull.chat.clone(),
            history: chat.history,
            messages: (pull.cursor + 1..=last).map(message).collect(),
            has_more: last < chat.head,
            head: chat.head,
        }
    }

    fn connect(&mut self) {
        self.break_off();
        self.connected = true;
        self.inbox.connected(self.now);
        self.drain();
    }

    fn break_off(&mut self) {
        self.connected = false;
        self.inbox.disconnected();
        self.drain();
        self.pushes.clear();
        self.questions.clear();
        self.acks_up.clear();
    }

    fn confirm(&mut self, count: usize) {
        for _ in 0..count {
            let Some((chat, history, seq)) = self.unconfirmed.pop_front() else { return };
            self.inbox.confirm(&chat, history, seq, self.now);
            self.drain();
        }
    }

    fn wait(&mut self, ms: u64) {
        self.now += Duration::from_millis(ms);
        self.inbox.tick(self.now);
        self.drain();
    }

    /// Everything arrives and is answered, on the connection that there is.
    fn settle(&mut self) {
        for _ in 0..100_000 {
            while !self.pushes.is_empty() {
                self.arrive(0, 1);
            }
            while !self.questions.is_empty() {
                self.answer(false);
            }
            self.confirm(usize::MAX);
            match self.inbox.next_deadline() {
                Some(at) => self.wait(at.saturating_duration_since(self.now).as_millis() as u64 + 1),
                None => {
                    self.take_acks();
                    return assert!(self.inbox.is_caught_up());
                }
            }
        }
        panic!("never settles");
    }
}

fn message(seq: u64) -> wire::Message {
    wire::Message { seq, sender: "a".into(), time_us: seq, body: body(seq).into() }
}

fn body(seq: u64) -> String {
    format!("body {seq}")
}

fn error(request: u32) -> wire::Error {
    wire::Error { code: Code::Unavailable as i32, request, retry_after_ms: 250, ..Default::default() }
}

#[derive(Debug, Clone)]
enum Event {
    Append {
        chat: u8,
        own: bool,
    },
    Arrive {
        index: usize,
        copies: usize,
    },
    Skip,
    Answer(bool),
    Confirm(usize),
    Wait(u64),
    Break,
    Connect,
    OldPush(u8, u64),
    LoseAnswer,
    /// Another device of this user acknowledges everything.
    OtherDevice(u8),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        10 => (0u8..6, prop::bool::weighted(0.2)).prop_map(|(chat, own)| Event::Append { chat, own }),
        10 => (0usize..8, 1usize..3).prop_map(|(index, copies)| Event::Arrive { index, copies }),
        2 => Just(Event::Skip),
        8 => prop::bool::weighted(0.2).prop_map(Event::Answer),
        4 => (1usize..10).prop_map(Event::Confirm),
        4 => (0u64..300).prop_map(Event::Wait),
        1 => Just(Event::Break),
        2 => Just(Event::Connect),
        1 => (0u8..6, 1u64..20).prop_map(|(chat, seq)| Event::OldPush(chat, seq)),
        1 => Just(Event::LoseAnswer),
        2 => (0u8..6).prop_map(Event::OtherDevice),
    ]
}

fn run(world: &mut World, events: &[Event]) {
    for event in events {
        match *event {
            Event::Append { chat, own } => world.append(&format!("a:{chat}"), own),
            Event::Arrive { index, copies } => world.arrive(index, copies),
            Event::Skip if world.connected => {
                world.pushes.clear();
                world.inbox.resync(world.now);
                world.drain();
            }
            Event::Skip => {}
            Event::Answer(unavailable) => world.answer(unavailable),
            Event::Confirm(count) => world.confirm(count),
            Event::Wait(ms) => world.wait(ms),
            Event::Break => world.break_off(),
            Event::Connect => world.connect(),
            Event::OldPush(chat, seq) => {
                let name = format!("a:{chat}");
                if let Some(chat) = world.chats.get(&name).filter(|chat| world.connected && seq <= chat.head)
                {
                    let push = wire::Push { chat: name, history: chat.history, message: Some(message(seq)) };
                    world.pushes.push(push);
                }
            }
            Event::OtherDevice(chat) => {
                if let Some(chat) = world.chats.get_mut(&format!("a:{chat}")) {
                    chat.delivered = chat.head;
                }
            }
            Event::LoseAnswer => {
                world.questions.pop_front();
            }
        }
    }
}

fn small() -> Limits {
    Limits {
        early_messages_max: 4,
        unconfirmed_messages_max: 12,
        pulls_max: 2,
        sync_bytes_max: 70,
        ..Limits::default()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    #[test]
    fn everything_is_shown_once_and_in_order(events in prop::collection::vec(event(), 1..150)) {
        let mut world = World::new(small());
        world.connect();
        world.settle();
        run(&mut world, &events);
        if !world.connected {
            world.connect();
        }
        world.settle();
        for (name, chat) in &world.chats {
            let shown = world.shown.get(&(name.clone(), 9)).cloned().unwrap_or_default();
            prop_assert_eq!(shown, (1..=chat.head).collect::<Vec<_>>(), "{}", name);
            prop_assert_eq!(world.stored.get(name), Some(&(9, chat.head)));
            prop_assert_eq!(chat.delivered, chat.head);
        }
        prop_assert_eq!(world.lost, 0);
    }

    #[test]
    fn a_restart_shows_what_was_not_confirmed_and_nothing_else(before in prop::collection::vec(event(), 1..80), after in prop::collection::vec(event(), 1..80)) {
        let mut world = World::new(small());
        world.connect();
        world.settle();
        run(&mut world, &before);
        world.break_off();
        let stored = world.stored.clone();
        let cursors = stored.iter().map(|(chat, (history, seq))| (chat.as_str(), *history, *seq));
        world.inbox = Inbox::restore(small(), cursors, world.complete);
        world.shown.clear();
        world.unconfirmed.clear();
        run(&mut world, &after);
        world.connect();
        world.settle();
        for (name, chat) in &world.chats {
            let from = stored.get(name).map_or(0, |(_, seq)| *seq);
            let shown = world.shown.get(&(name.clone(), 9)).cloned().unwrap_or_default();
            prop_assert_eq!(shown, (from + 1..=chat.head).collect::<Vec<_>>(), "{}", name);
        }
    }

    #[test]
    fn a_new_device_starts_at_what_its_user_has(heads in prop::collection::vec((1u64..30, 0u64..30), 1..12), events in prop::collection::vec(event(), 0..40)) {
        let mut world = World::new(small());
        for (index, (head, delivered)) in heads.iter().enumerate() {
            world.chats.insert(format!("b:{index:02}"), ServerChat { history: 9, head: *head, delivered: *delivered.min(head) });
        }
        world.connect();
        let events: Vec<_> = events.into_iter().filter(|event| !matches!(event, Event::Break | Event::Connect | Event::OtherDevice(_))).collect();
        run(&mut world, &events);
        world.inbox.resync(world.now);
        world.settle();
        for (index, (head, delivered)) in heads.iter().enumerate() {
            let shown = world.shown.get(&(format!("b:{index:02}"), 9)).cloned().unwrap_or_default();
            prop_assert_eq!(shown, (*delivered.min(head) + 1..=*head).collect::<Vec<_>>());
        }
    }

    #[test]
    fn another_history_is_told_and_shown_from_the_start(before in prop::collection::vec(event(), 1..60), heads in prop::collection::vec(1u64..40, 6), after in prop::collection::vec(event(), 1..60)) {
        let mut world = World::new(small());
        world.connect();
        world.settle();
        run(&mut world, &before);
        let known: Vec<String> = world.stored.keys().cloned().collect();
        for (chat, head) in world.chats.values_mut().zip(heads) {
            (chat.history, chat.head, chat.delivered) = (11, head, 0);
        }
        // Pushes of the old history are still on their way.
        run(&mut world, &after);
        if !world.connected {
            world.connect();
        }
        world.inbox.resync(world.now);
        world.settle();
        for name in known {
            let chat = &world.chats[&name];
            if chat.history == 11 {
                let shown = world.shown.get(&(name.clone(), 11)).cloned().unwrap_or_default();
                prop_assert_eq!(shown, (1..=chat.head).collect::<Vec<_>>(), "{}", name);
            }
        }
    }
}

#[test]
fn a_hole_is_pulled_after_100_ms_and_acknowledgements_keep_50_ms_apart() {
    let mut world = World::new(Limits::default());
    world.connect();
    world.settle();
    for _ in 0..3 {
        world.append("a:b", false);
    }
    world.arrive(0, 1);
    world.arrive(1, 1);
    let from = world.now;
    assert_eq!(world.inbox.next_deadline(), Some(from + Duration::from_millis(100)));
    world.wait(99);
    assert!(world.questions.is_empty());
    world.wait(1);
    assert!(matches!(world.questions.front(), Some(Action::Pull(pull)) if pull.cursor == 1));
    world.answer(false);
    assert_eq!(world.shown[&("a:b".to_owned(), 9)], [1, 2, 3]);
    world.pushes.clear();
    for _ in 0..40 {
        world.append("a:b", false);
        world.arrive(0, 1);
        world.confirm(usize::MAX);
        world.wait(7);
    }
    world.wait(100);
    let acks = &world.acks["a:b"];
    assert!(acks.windows(2).all(|pair| pair[1] - pair[0] >= Duration::from_millis(50)), "{acks:?}");
    world.take_acks();
    assert_eq!(world.chats["a:b"].delivered, 43);
}

#[test]
fn what_retention_cut_is_a_gap() {
    let now = Instant::now();
    let mut inbox = Inbox::restore(Limits::default(), [("a:b", 9, 4)], true);
    inbox.connected(now);
    let request = |inbox: &mut Inbox| loop {
        match inbox.next_action().unwrap() {
            Action::Sync(sync) => return sync.request,
            Action::Pull(pull) => return pull.request,
            _ => {}
        }
    };
    let asked = request(&mut inbox);
    let head = wire::ChatHead { chat: "a:b".into(), history: 9, head: 12, delivered: 4 };
    inbox.sync_ack(wire::SyncAck { request: asked, chats: vec![head], ..Default::default() }, now);
    let asked = request(&mut inbox);
    let messages = (10..=12).map(message).collect();
    inbox.pull_ack(
        wire::PullAck { request: asked, chat: "a:b".into(), history: 9, messages, has_more: false, head: 12 },
        now,
    );
    let gap = Action::Gap { chat: "a:b".into(), history: 9, from: 5, to: 9 };
    assert_eq!(inbox.next_action(), Some(gap));
    assert!(matches!(inbox.next_action(), Some(Action::Deliver(message)) if message.seq == 10));
}
