//! The simulated server, its connection and the application, around one inbox. What is wrong at once is asserted here; what
//! must hold in the end, by the tests.
//!
//! Trap: a body names the history under which it was stored, so a message shown under another one is seen.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use client::inbox::{Action, Inbox, Limits};
use proto::wire::{self, Code};

pub struct ServerChat {
    pub history: u64,
    pub head: u64,
    pub delivered: u64,
    /// What is below was cut by retention.
    pub first: u64,
    pub damaged: BTreeSet<u64>,
    /// The store came back older, and nobody has noticed yet.
    pub older: bool,
}

impl ServerChat {
    pub fn new(history: u64, head: u64, delivered: u64) -> Self {
        ServerChat { history, head, delivered, first: 1, damaged: BTreeSet::new(), older: false }
    }

    pub fn has(&self, seq: u64) -> bool {
        (self.first..=self.head).contains(&seq) && !self.damaged.contains(&seq)
    }

    pub fn draw_history(&mut self, history: u64) {
        (self.history, self.delivered, self.older) = (history, 0, false);
    }
}

pub struct World {
    pub now: Instant,
    pub inbox: Inbox,
    pub chats: BTreeMap<String, ServerChat>,
    /// Pushes on their way.
    pub pushes: Vec<wire::Push>,
    pub questions: VecDeque<Action>,
    pub connected: bool,
    /// By chat and history.
    pub shown: BTreeMap<(String, u64), Vec<u64>>,
    /// Shown or told as a gap up to here.
    pub covered: BTreeMap<(String, u64), u64>,
    pub next_history: u64,
    pub unconfirmed: VecDeque<(String, u64, u64)>,
    pub stored: BTreeMap<String, (u64, u64, u64)>,
    pub complete: bool,
    pub acks: BTreeMap<String, Vec<Instant>>,
    /// Acknowledgements on their way.
    pub acks_up: Vec<wire::PushAck>,
    /// Histories told as lost, by this life of the program.
    pub lost: BTreeSet<(String, u64)>,
    /// Of which the application confirmed something.
    pub heard: BTreeSet<(String, u64)>,
    pub page: usize,
    /// A Sync with a cursor above the head is taken for proof, not only a Pull.
    pub sync_proves: bool,
    pub limits: Limits,
}

impl World {
    pub fn new(limits: Limits) -> Self {
        World {
            now: Instant::now(),
            inbox: Inbox::new(limits),
            chats: BTreeMap::new(),
            pushes: Vec::new(),
            questions: VecDeque::new(),
            connected: false,
            shown: BTreeMap::new(),
            covered: BTreeMap::new(),
            next_history: 100,
            unconfirmed: VecDeque::new(),
            stored: BTreeMap::new(),
            complete: false,
            acks: BTreeMap::new(),
            acks_up: Vec::new(),
            lost: BTreeSet::new(),
            heard: BTreeSet::new(),
            page: 3,
            sync_proves: true,
            limits,
        }
    }

    pub fn drain(&mut self) {
        while let Some(action) = self.inbox.next_action() {
            match action {
                Action::Deliver(message) => {
                    assert_eq!(message.body, body(message.history, message.seq));
                    let key = (message.chat.to_string(), message.history);
                    self.cover(&key, message.seq, message.seq);
                    self.shown.entry(key.clone()).or_default().push(message.seq);
                    self.unconfirmed.push_back((key.0, key.1, message.seq));
                }
                Action::Gap { chat, history, from, to } => {
                    let key = (chat.to_string(), history);
                    self.cover(&key, from, to);
                    let chat = &self.chats[&key.0];
                    let lie = (from..=to).find(|seq| chat.history == history && chat.has(*seq));
                    assert_eq!(lie, None, "{from} to {to} told as a gap");
                    self.unconfirmed.push_back((key.0, key.1, to));
                }
                Action::HistoryLost { chat, history, from_seq } => {
                    let key = (chat.to_string(), history);
                    assert_eq!(from_seq, 1);
                    assert!(!self.covered.contains_key(&key), "nothing of it was told before");
                    assert!(self.lost.insert(key.clone()), "{key:?} told twice");
                    assert!(!self.heard.contains(&key), "{key:?} told again, after it was confirmed");
                    self.unconfirmed.push_back((key.0, key.1, 0));
                }
                Action::Store { chat, history, seq, acked } => {
                    let old = self.stored.get(&*chat).map_or(0, |(history, ..)| *history);
                    assert!(old == 0 || old == history || self.heard.contains(&(chat.to_string(), history)));
                    self.stored.insert(chat.to_string(), (history, seq, acked));
                }
                Action::StoreComplete => self.complete = true,
                Action::Synced => {}
                Action::Ack(ack) => {
                    assert!(self.connected);
                    let (history, seq, acked) = self.stored.get_mut(&ack.chat).unwrap();
                    assert_eq!((*history, *seq), (ack.history, ack.seq), "acknowledged what is confirmed");
                    *acked = ack.seq;
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

    /// From where the device was, everything is told once, in order and without holes.
    pub fn cover(&mut self, key: &(String, u64), from: u64, to: u64) {
        let started =
            self.stored.get(&key.0).filter(|(history, ..)| *history == key.1).map_or(0, |(_, seq, _)| *seq);
        let covered = self.covered.entry(key.clone()).or_insert(started);
        assert_eq!(*covered + 1, from, "{key:?}");
        let of_another =
            self.stored.get(&key.0).is_some_and(|(history, ..)| *history != 0 && *history != key.1);
        assert!(!of_another || self.lost.contains(key), "the loss is told first");
        assert!(to >= from);
        *covered = to;
    }

    pub fn draw_history(&mut self, name: &str) {
        self.next_history += 1;
        if let Some(chat) = self.chats.get_mut(name) {
            chat.draw_history(self.next_history);
        }
    }

    /// The program dies and comes back with what was stored.
    pub fn restart(&mut self) {
        self.break_off();
        let cursors = self.stored.iter();
        let cursors = cursors.map(|(chat, (history, seq, acked))| (chat.as_str(), *history, *seq, *acked));
        self.inbox = Inbox::restore(self.limits, cursors, self.complete);
        self.shown.clear();
        self.covered.clear();
        self.lost.clear();
        self.unconfirmed.clear();
    }

    pub fn take_acks(&mut self) {
        for ack in self.acks_up.drain(..) {
            let chat = self.chats.get_mut(&ack.chat).unwrap();
            if chat.history == ack.history {
                chat.delivered = chat.delivered.max(ack.seq);
            }
        }
    }

    pub fn append(&mut self, name: &str, own: bool) {
        if self.chats.get(name).is_some_and(|chat| chat.older) {
            self.draw_history(name);
        }
        let chat = self.chats.entry(name.to_owned()).or_insert(ServerChat::new(9, 0, 0));
        chat.head += 1;
        let message = message(chat.history, chat.head);
        let history = chat.history;
        if own && self.connected {
            self.inbox.sent(name, history, message, self.now);
        } else if self.connected {
            self.pushes.push(wire::Push {
                chat: name.to_owned(),
                history,
                message: Some(message),
                ack_within_ms: 0,
            });
        }
        self.drain();
    }

    pub fn arrive(&mut self, index: usize, copies: usize) {
        if self.pushes.is_empty() {
            return;
        }
        let push = self.pushes.remove(index % self.pushes.len());
        for _ in 0..copies {
            self.inbox.push(push.clone(), self.now);
        }
        self.drain();
    }

    pub fn answer(&mut self, unavailable: bool) {
        self.take_acks();
        let now = self.now;
        match self.questions.pop_front() {
            Some(Action::Sync(sync)) => {
                if unavailable {
                    self.inbox.error(&error(sync.request), Duration::ZERO, now);
                } else {
                    self.inbox.sync_ack(self.sync(&sync), now);
                    let proofs = if self.sync_proves { &sync.cursors[..] } else { &[] };
                    for cursor in proofs {
                        self.judge(&cursor.chat, cursor.history, cursor.seq);
                    }
                }
            }
            Some(Action::Pull(pull)) => {
                if unavailable {
                    self.inbox.error(&error(pull.request), Duration::ZERO, now);
                } else {
                    self.inbox.pull_ack(self.pull(&pull), now);
                    self.judge(&pull.chat, pull.history, pull.cursor);
                }
            }
            _ => {}
        }
        self.drain();
    }

    /// A cursor above the head is proof of loss: behind the answer, the server draws a new history.
    pub fn judge(&mut self, name: &str, history: u64, cursor: u64) {
        if self.chats.get(name).is_some_and(|chat| chat.history == history && cursor > chat.head) {
            self.draw_history(name);
        }
    }

    pub fn sync(&self, sync: &wire::Sync) -> wire::SyncAck {
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
                first: chat.first,
                ..Default::default()
            })
            .collect();
        let has_more = chats.len() > self.page;
        chats.truncate(self.page);
        let next = if has_more { chats.last().unwrap().chat.clone() } else { String::new() };
        wire::SyncAck { request: sync.request, chats, has_more, next, ..Default::default() }
    }

    pub fn pull(&self, pull: &wire::Pull) -> wire::PullAck {
        let chat = &self.chats[&pull.chat];
        let kept = (pull.cursor + 1..=chat.head).filter(|seq| chat.has(*seq));
        let messages: Vec<_> = kept.take(5).map(|seq| message(chat.history, seq)).collect();
        wire::PullAck {
            request: pull.request,
            chat: pull.chat.clone(),
            history: chat.history,
            has_more: messages.last().is_some_and(|last| last.seq < chat.head),
            messages,
            head: chat.head,
            first: chat.first,
            ..Default::default()
        }
    }

    pub fn connect(&mut self) {
        self.break_off();
        self.connected = true;
        self.inbox.connected(self.now);
        self.drain();
    }

    pub fn break_off(&mut self) {
        self.connected = false;
        self.inbox.disconnected();
        self.drain();
        self.pushes.clear();
        self.questions.clear();
        self.acks_up.clear();
    }

    pub fn confirm(&mut self, count: usize) {
        for _ in 0..count {
            let Some((chat, history, seq)) = self.unconfirmed.pop_front() else { return };
            self.heard.insert((chat.clone(), history));
            self.inbox.confirm(&chat, history, seq, self.now);
            self.drain();
        }
    }

    pub fn wait(&mut self, ms: u64) {
        self.now += Duration::from_millis(ms);
        self.inbox.tick(self.now);
        self.drain();
    }

    /// Everything arrives and is answered, on the connection that there is.
    pub fn settle(&mut self) {
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

pub fn message(history: u64, seq: u64) -> wire::Message {
    wire::Message {
        seq,
        sender: "a".into(),
        time_us: seq,
        body: body(history, seq).into(),
        ..Default::default()
    }
}

pub fn body(history: u64, seq: u64) -> String {
    format!("body {seq} of {history}")
}

pub fn error(request: u32) -> wire::Error {
    wire::Error { code: Code::Unavailable as i32, request, retry_after_ms: 250, ..Default::default() }
}
