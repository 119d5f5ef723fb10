//! The inbox against a simulated server and a connection that drops, doubles and reorders pushes, breaks, skips and
//! answers `unavailable`; over restarts, retention, damaged messages, lost histories and stores that came back older.
//! Seeded by proptest; no I/O.
//!
//! Trap: the server and the connection are of `inbox_sim/world.rs`, which asserts while it runs.

#[path = "inbox_sim/world.rs"]
mod world;

use std::time::{Duration, Instant};

use client::inbox::{Action, Inbox, Limits};
use proptest::prelude::*;
use proto::wire;

use world::{ServerChat, World, message};

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
    Retain(u8, u64),
    Damage(u8, u64),
    /// The store came back older; so many messages are left.
    Older(u8, u64),
    LoseHistory(u8),
    Restart,
}

/// What befalls servers and programs, beside what connections do.
fn blow() -> impl Strategy<Value = Event> {
    prop_oneof![
        20 => event(),
        1 => (0u8..6, 1u64..12).prop_map(|(chat, count)| Event::Retain(chat, count)),
        1 => (0u8..6, 1u64..20).prop_map(|(chat, seq)| Event::Damage(chat, seq)),
        1 => (0u8..6, 0u64..6).prop_map(|(chat, left)| Event::Older(chat, left)),
        1 => (0u8..6).prop_map(Event::LoseHistory),
        1 => Just(Event::Restart),
    ]
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
                    let message = Some(message(chat.history, seq));
                    world.pushes.push(wire::Push {
                        chat: name,
                        history: chat.history,
                        message,
                        ack_within_ms: 0,
                    });
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
            Event::Retain(chat, count) => {
                if let Some(chat) = world.chats.get_mut(&format!("a:{chat}")) {
                    chat.first = (chat.first + count).min(chat.head + 1);
                }
            }
            Event::Damage(chat, seq) => {
                if let Some(chat) = world.chats.get_mut(&format!("a:{chat}")) {
                    chat.damaged.insert(seq.min(chat.head));
                }
            }
            Event::Older(chat, left) => {
                if let Some(chat) = world.chats.get_mut(&format!("a:{chat}")).filter(|chat| chat.head > left)
                {
                    (chat.head, chat.delivered, chat.older) = (left, chat.delivered.min(left), true);
                    chat.first = chat.first.min(left + 1);
                    chat.damaged.retain(|seq| *seq <= left);
                }
            }
            Event::LoseHistory(chat) => world.draw_history(&format!("a:{chat}")),
            Event::Restart => world.restart(),
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
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases.max(500), ..ProptestConfig::default() })]

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
            prop_assert_eq!(world.stored.get(name), Some(&(9, chat.head, chat.head)));
            prop_assert_eq!(chat.delivered, chat.head);
        }
        prop_assert!(world.lost.is_empty());
    }

    #[test]
    fn whatever_is_lost_below_is_told_and_everything_else_is_shown_once(
        events in prop::collection::vec(blow(), 1..200),
        sync_proves in any::<bool>(),
    ) {
        let mut world = World { sync_proves, ..World::new(small()) };
        world.connect();
        world.settle();
        run(&mut world, &events);
        // Whoever comes back asks, so that also an older store is noticed; what it drew behind its answers is told then.
        for _ in 0..3 {
            world.connect();
            world.settle();
        }
        for (name, chat) in world.chats.iter().filter(|(_, chat)| chat.head > 0) {
            let stored = world.stored.get(name).map(|(history, seq, _)| (*history, *seq));
            prop_assert_eq!(stored, Some((chat.history, chat.head)), "{}", name);
            // An acknowledgement that died with the program only delays this.
            prop_assert!(chat.delivered <= chat.head, "{}", name);
        }
    }

    #[test]
    fn a_restart_shows_what_was_not_confirmed_and_nothing_else(before in prop::collection::vec(event(), 1..80), after in prop::collection::vec(event(), 1..80)) {
        let mut world = World::new(small());
        world.connect();
        world.settle();
        run(&mut world, &before);
        world.restart();
        let stored = world.stored.clone();
        run(&mut world, &after);
        world.connect();
        world.settle();
        for (name, chat) in &world.chats {
            let from = stored.get(name).map_or(0, |(_, seq, _)| *seq);
            let shown = world.shown.get(&(name.clone(), 9)).cloned().unwrap_or_default();
            prop_assert_eq!(shown, (from + 1..=chat.head).collect::<Vec<_>>(), "{}", name);
        }
    }

    #[test]
    fn a_new_device_starts_at_what_its_user_has(heads in prop::collection::vec((1u64..30, 0u64..30), 1..12), events in prop::collection::vec(event(), 0..40)) {
        let mut world = World::new(small());
        for (index, (head, delivered)) in heads.iter().enumerate() {
            world.chats.insert(format!("b:{index:02}"), ServerChat::new(9, *head, *delivered.min(head)));
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
            *chat = ServerChat::new(11, head, 0);
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

/// A hint that comes while a Pull of before is on its way must outlive the answer to it.
#[test]
fn a_push_of_another_history_is_not_forgotten_while_a_pull_is_on_its_way() {
    let mut world = World::new(Limits::default());
    world.connect();
    world.settle();
    world.append("a:b", false);
    world.append("a:b", false);
    world.arrive(1, 1);
    world.wait(100);
    let Some(Action::Pull(pull)) = world.questions.pop_front() else { panic!("a Pull") };
    let early = world.pull(&pull);
    world.draw_history("a:b");
    world.append("a:b", false);
    world.arrive(1, 1);
    world.inbox.pull_ack(early, world.now);
    world.pushes.clear();
    world.drain();
    world.settle();
    let history = world.chats["a:b"].history;
    assert_eq!(world.shown[&("a:b".to_owned(), history)], [1, 2, 3]);
    assert_eq!(world.shown[&("a:b".to_owned(), 9)], [1, 2]);
}

/// A server that looks at three chats a time gets each cursor once, from the second Sync on.
#[test]
fn no_cursor_is_sent_twice_once_a_server_has_told_how_many_it_looks_at() {
    let names: Vec<String> = (0..8).map(|number| format!("a:{number}")).collect();
    let cursors = names.iter().map(|name| (name.as_str(), 9, 1, 1));
    let now = Instant::now();
    let mut inbox = Inbox::restore(Limits::default(), cursors, true);
    for expected in [vec![8, 3, 2], vec![3, 3, 2]] {
        inbox.connected(now);
        let mut sent = Vec::new();
        while let Some(action) = inbox.next_action() {
            let Action::Sync(sync) = action else { continue };
            sent.push(sync.cursors.len());
            let looked_at: Vec<_> =
                names.iter().filter(|name| **name > sync.after).take(3).cloned().collect();
            let last = looked_at.last().unwrap().clone();
            let has_more = last != names[7] && (sync.until.is_empty() || last < sync.until);
            let next = if has_more { last } else { String::new() };
            let ack = wire::SyncAck { request: sync.request, has_more, next, ..Default::default() };
            inbox.sync_ack(ack, now);
        }
        assert_eq!(sent, expected);
        assert!(inbox.is_caught_up());
    }
}

#[test]
fn what_retention_cut_is_a_gap() {
    let now = Instant::now();
    let mut inbox = Inbox::restore(Limits::default(), [("a:b", 9, 4, 4)], true);
    inbox.connected(now);
    let request = |inbox: &mut Inbox| loop {
        match inbox.next_action().unwrap() {
            Action::Sync(sync) => return sync.request,
            Action::Pull(pull) => return pull.request,
            _ => {}
        }
    };
    let asked = request(&mut inbox);
    let head = wire::ChatHead {
        chat: "a:b".into(),
        history: 9,
        head: 12,
        delivered: 4,
        first: 0,
        ..Default::default()
    };
    inbox.sync_ack(wire::SyncAck { request: asked, chats: vec![head], ..Default::default() }, now);
    let asked = request(&mut inbox);
    let messages = (10..=12).map(|seq| message(9, seq)).collect();
    inbox.pull_ack(
        wire::PullAck {
            request: asked,
            chat: "a:b".into(),
            history: 9,
            messages,
            has_more: false,
            head: 12,
            first: 0,
            ..Default::default()
        },
        now,
    );
    let gap = Action::Gap { chat: "a:b".into(), history: 9, from: 5, to: 9 };
    assert_eq!(inbox.next_action(), Some(gap));
    assert!(matches!(inbox.next_action(), Some(Action::Deliver(message)) if message.seq == 10));
}
