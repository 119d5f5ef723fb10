//! The inbox on slow links and with news that come while it waits: late answers, hints, pages of which nothing is left.
//! Scripted, without a server; no I/O.

use std::time::{Duration, Instant};

use client::inbox::{Action, Inbox, Limits};
use proto::wire::{self, Code};

/// An inbox that was logged in, and its clock.
struct Device {
    inbox: Inbox,
    start: Instant,
    now: Instant,
    pulls: Vec<wire::Pull>,
    told: Vec<Action>,
}

impl Device {
    /// A device with cursor 0 in so many chats, `a:0` and so on. A Sync has told it of `head` messages in each.
    fn behind(chats: usize, head: u64, limits: Limits) -> Device {
        let start = Instant::now();
        let names: Vec<_> = (0..chats).map(|number| format!("a:{number}")).collect();
        let inbox = Inbox::restore(limits, names.iter().map(|name| (name.as_str(), 9, 0, 0)), true);
        let mut device = Device { inbox, start, now: start, pulls: Vec::new(), told: Vec::new() };
        device.inbox.connected(start);
        let Some(Action::Sync(sync)) = device.inbox.next_action() else { panic!("a Sync") };
        let chats =
            names.into_iter().map(|chat| wire::ChatHead { chat, history: 9, head, ..Default::default() });
        let ack = wire::SyncAck { request: sync.request, chats: chats.collect(), ..Default::default() };
        device.inbox.sync_ack(ack, start);
        device.drain();
        device.told.clear();
        device
    }

    fn drain(&mut self) {
        while let Some(action) = self.inbox.next_action() {
            match action {
                Action::Pull(pull) => self.pulls.push(pull),
                action => self.told.push(action),
            }
        }
    }

    /// Until so many ms after the start, as the session does it: at each deadline.
    fn until(&mut self, ms: u64) {
        let end = self.start + Duration::from_millis(ms);
        while let Some(at) = self.inbox.next_deadline().filter(|at| *at <= end) {
            self.now = self.now.max(at);
            self.inbox.tick(self.now);
            self.drain();
        }
        self.now = end;
    }

    fn answer(&mut self, pull: &wire::Pull, messages: Vec<wire::Message>, head: u64) {
        let has_more = messages.last().is_some_and(|last| last.seq < head);
        self.give(wire::PullAck { messages, has_more, head, history: 9, ..answer_to(pull) });
    }

    fn give(&mut self, ack: wire::PullAck) {
        self.inbox.pull_ack(ack, self.now);
        self.drain();
    }

    fn push(&mut self, history: u64, seq: u64) {
        self.push_to_many(history, seq, 0);
    }

    fn push_to_many(&mut self, history: u64, seq: u64, ack_within_ms: u32) {
        let push = wire::Push { chat: "a:0".into(), history, message: Some(message(seq)), ack_within_ms };
        self.inbox.push(push, self.now);
        self.drain();
    }

    fn confirm(&mut self, seq: u64) {
        self.inbox.confirm("a:0", 9, seq, self.now);
        self.drain();
    }

    /// Seqs that were acknowledged since the last look.
    fn acknowledged(&mut self) -> Vec<u64> {
        self.drain();
        let told = std::mem::take(&mut self.told);
        let seq = |action| if let Action::Ack(ack) = action { Some(ack.seq) } else { None };
        told.into_iter().filter_map(seq).collect()
    }

    /// Seqs that were handed out since the last look.
    fn shown(&mut self) -> Vec<u64> {
        let told = std::mem::take(&mut self.told);
        let seq = |action| if let Action::Deliver(message) = action { Some(message.seq) } else { None };
        told.into_iter().filter_map(seq).collect()
    }
}

fn answer_to(pull: &wire::Pull) -> wire::PullAck {
    wire::PullAck { request: pull.request, chat: pull.chat.clone(), ..Default::default() }
}

fn message(seq: u64) -> wire::Message {
    wire::Message { seq, sender: "a".into(), ..Default::default() }
}

#[test]
fn one_of_many_readers_acknowledges_when_its_turn_comes_and_before_it_closes() {
    let mut device = Device::behind(1, 0, Limits { ack_permille: 250, ..Limits::default() });
    let say = |device: &mut Device, seq, within_ms| {
        device.push_to_many(9, seq, within_ms);
        device.confirm(seq);
    };
    say(&mut device, 1, 10_000);
    device.until(2_000);
    say(&mut device, 2, 10_000);
    device.until(2_499);
    assert!(device.acknowledged().is_empty());
    device.until(2_500);
    assert_eq!(device.acknowledged(), [2]);
    // Once in that time, however many come.
    for seq in 3..=12 {
        device.until(seq * 1_000);
        say(&mut device, seq, 10_000);
    }
    device.until(12_499);
    assert!(device.acknowledged().is_empty());
    device.until(12_500);
    assert_eq!(device.acknowledged(), [12]);
    say(&mut device, 13, u32::MAX);
    device.until(14_999);
    assert!(device.acknowledged().is_empty(), "a quarter of the longest that a server may ask for");
    device.until(15_000);
    assert_eq!(device.acknowledged(), [13]);
    say(&mut device, 14, 10_000);
    device.inbox.flush_acks();
    assert_eq!(device.acknowledged(), [14]);
}

/// Nobody is told of it: it goes along with what somebody is, or after a while.
#[test]
fn what_this_device_sent_is_acknowledged_in_company_or_late() {
    let mut device = Device::behind(1, 0, Limits { ack_permille: 0, ..Limits::default() });
    let send = |device: &mut Device, seq| {
        device.inbox.sent("a:0", 9, message(seq), device.now);
        device.confirm(seq);
    };
    send(&mut device, 1);
    device.until(20_000);
    send(&mut device, 2);
    device.until(29_999);
    assert!(device.acknowledged().is_empty());
    device.until(30_000);
    assert_eq!(device.acknowledged(), [2], "half a minute behind the first of them");
    send(&mut device, 3);
    device.push(9, 4);
    device.confirm(4);
    device.until(30_050);
    assert_eq!(device.acknowledged(), [4], "others wait for this one");
    send(&mut device, 5);
    device.push_to_many(9, 6, 10_000);
    device.confirm(6);
    device.until(39_999);
    assert!(device.acknowledged().is_empty(), "its own hurries nothing");
    device.until(40_000);
    assert_eq!(device.acknowledged(), [6]);
    // One that comes too early waits for the hole like a pushed one.
    device.inbox.sent("a:0", 9, message(8), device.now);
    device.drain();
    device.push(9, 7);
    device.confirm(8);
    device.until(40_050);
    assert_eq!(device.acknowledged(), [8]);
    send(&mut device, 9);
    device.inbox.connected(device.now);
    assert_eq!(device.acknowledged(), [9], "at once on the next connection, with what may be lost");
    send(&mut device, 10);
    device.inbox.flush_acks();
    assert_eq!(device.acknowledged(), [10]);
}

#[test]
fn a_push_that_comes_twice_puts_no_acknowledgement_off() {
    let mut device = Device::behind(1, 0, Limits { ack_permille: 500, ..Limits::default() });
    device.push_to_many(9, 1, 10_000);
    device.confirm(1);
    device.until(4_999);
    device.push_to_many(9, 1, 10_000);
    // Due, and the clock has not been asked yet.
    device.now = device.start + Duration::from_millis(5_001);
    device.push_to_many(9, 1, 10_000);
    device.until(5_001);
    assert_eq!(device.acknowledged(), [1]);
}

/// Ten thousand who are brought in acknowledge together once, unless the first message of a chat waits too.
#[test]
fn the_first_message_of_a_chat_waits_for_the_turn_too() {
    for complete in [true, false] {
        let mut device = Device::behind(0, 0, Limits { ack_permille: 300, ..Limits::default() });
        if !complete {
            device.inbox = Inbox::new(Limits { ack_permille: 300, ..Limits::default() });
            device.inbox.connected(device.now);
            let Some(Action::Sync(sync)) = device.inbox.next_action() else { panic!("a Sync") };
            device.push_to_many(9, 1, 10_000);
            let head = wire::ChatHead { chat: "a:0".into(), history: 9, head: 1, ..Default::default() };
            let ack = wire::SyncAck { request: sync.request, chats: vec![head], ..Default::default() };
            device.inbox.sync_ack(ack, device.now);
            device.drain();
        } else {
            device.push_to_many(9, 1, 10_000);
        }
        assert_eq!(device.inbox.cursor("a:0"), Some((9, 1)), "complete: {complete}");
        device.confirm(1);
        device.until(2_999);
        assert!(device.acknowledged().is_empty(), "complete: {complete}");
        device.until(3_000);
        assert_eq!(device.acknowledged(), [1], "complete: {complete}");
    }
}

#[test]
fn turns_to_acknowledge_are_spread_over_the_time_given() {
    let ms = Duration::from_millis;
    let wait = |ack_permille, elapsed, within| {
        Limits { ack_permille, ..Limits::default() }.ack_wait(ms(elapsed), ms(within)).as_millis()
    };
    assert_eq!((wait(0, 0, 1_000), wait(0, 1, 1_000), wait(999, 0, 1_000)), (1_000, 999, 999));
    assert_eq!((wait(400, 1_400, 1_000), wait(400, 1_399, 1_000), wait(1_000, 250, 1_000)), (1_000, 1, 750));
    assert_eq!((wait(700, 5, 0), wait(700, 5, 1)), (0, 1));
}

/// 64 KiB each 0.7 s: the eighth answer takes longer than an answer may, and is on its way all the time.
#[test]
fn a_pull_is_not_given_up_while_answers_to_others_come() {
    let mut device = Device::behind(8, 1, Limits::default());
    let asked = std::mem::take(&mut device.pulls);
    assert_eq!(asked.len(), 8);
    for (number, pull) in asked.iter().enumerate() {
        device.until(700 * (number as u64 + 1));
        device.answer(pull, vec![message(1)], 1);
    }
    assert!(device.pulls.is_empty(), "asked twice: {:?}", device.pulls);
    assert_eq!(device.shown().len(), 8);
    assert!(device.inbox.is_caught_up());
}

/// Pushes that come all the time must not hide that an answer was lost.
#[test]
fn a_pull_whose_answer_was_lost_is_asked_again_on_a_busy_connection_too() {
    let mut device = Device::behind(1, 5, Limits::default());
    device.pulls.clear();
    for ms in (100..60_000).step_by(100) {
        device.until(ms);
        device.push(9, 100 + ms / 100);
        if !device.pulls.is_empty() {
            return assert!(ms >= 5_000);
        }
    }
    panic!("never asked again");
}

/// A link on which one answer takes 8 s: it gets on with every answer, and in the end asks once for each.
#[test]
fn answers_that_take_longer_than_expected_are_used() {
    let mut device = Device::behind(1, 4, Limits::default());
    let (mut ms, mut asked) = (0, Vec::new());
    for seq in 1..=4 {
        let pulls = std::mem::take(&mut device.pulls);
        let first = pulls.first().expect("a Pull").clone();
        assert_eq!(first.cursor, seq - 1);
        ms += 8_000;
        device.until(ms);
        asked.push(1 + device.pulls.len());
        let again = std::mem::take(&mut device.pulls);
        device.answer(&first, vec![message(seq)], 4);
        assert_eq!(device.shown(), [seq]);
        // The answers to what was asked twice change nothing.
        let next = std::mem::take(&mut device.pulls);
        for pull in &again {
            device.answer(pull, vec![message(seq)], 4);
        }
        assert!(device.shown().is_empty() && device.pulls.is_empty());
        device.pulls = next;
    }
    assert_eq!(asked, [2, 1, 1, 1]);
    assert!(device.inbox.is_caught_up());
}

/// The answer to a Pull that left before the hint does not settle it.
#[test]
fn a_hint_outlives_a_late_answer() {
    let mut device = Device::behind(1, 1, Limits::default());
    let first = device.pulls.pop().unwrap();
    device.until(1_000);
    device.push(11, 1);
    device.until(9_000);
    let again = std::mem::take(&mut device.pulls);
    assert_eq!(again.len(), 1);
    device.answer(&first, vec![message(1)], 1);
    assert_eq!(device.shown(), [1]);
    let third = device.pulls.pop().expect("another Pull");
    device.give(wire::PullAck { history: 11, head: 1, ..answer_to(&third) });
    assert!(matches!(device.told[..], [Action::HistoryLost { history: 11, from_seq: 1, .. }]));
}

/// The server has yet to find out that its store is older; the waits have grown to a minute. Whoever names the new history
/// ends that at once.
#[test]
fn news_of_another_history_end_the_wait_for_it() {
    for by_push in [true, false] {
        let mut device = Device::behind(1, 3, Limits::default());
        let pull = device.pulls.pop().unwrap();
        device.answer(&pull, (1..=3).map(message).collect(), 3);
        device.push(11, 1);
        let mut ms = 0;
        for _ in 0..8 {
            while device.pulls.is_empty() {
                ms += 300;
                device.until(ms);
            }
            let pull = device.pulls.pop().unwrap();
            device.answer(&pull, vec![], 1);
        }
        device.until(ms + 30_000);
        assert!(device.pulls.is_empty());
        device.told.clear();
        if by_push {
            device.push(11, 2);
        } else {
            device.inbox.resync(device.now);
            let Some(Action::Sync(sync)) = device.inbox.next_action() else { panic!("a Sync") };
            let head = wire::ChatHead { chat: "a:0".into(), history: 11, head: 2, ..Default::default() };
            let ack = wire::SyncAck { request: sync.request, chats: vec![head], ..Default::default() };
            device.inbox.sync_ack(ack, device.now);
            device.drain();
        }
        let pull = device.pulls.pop().expect("a Pull at once");
        assert_eq!((pull.history, pull.cursor), (9, 3));
        device.told.clear();
        device.give(wire::PullAck { history: 11, head: 2, ..answer_to(&pull) });
        assert!(matches!(device.told[..], [Action::HistoryLost { history: 11, .. }]));
    }
}

/// A hint does not shorten a wait that the server has asked for.
#[test]
fn a_server_that_wants_to_be_left_alone_is() {
    let mut device = Device::behind(1, 3, Limits::default());
    let pull = device.pulls.pop().unwrap();
    let code = Code::Unavailable as i32;
    let error = wire::Error { code, request: pull.request, retry_after_ms: 2_000, ..Default::default() };
    device.inbox.error(&error, Duration::ZERO, device.now);
    device.push(11, 1);
    device.until(1_999);
    assert!(device.pulls.is_empty());
    device.until(2_000);
    assert_eq!(device.pulls.len(), 1);
}

/// Everything that the server read is damaged: `first` says how far.
#[test]
fn a_page_of_which_nothing_is_left_is_a_gap_and_is_pulled_on_from() {
    let mut device = Device::behind(1, 250, Limits::default());
    let pull = device.pulls.pop().unwrap();
    device.give(wire::PullAck { history: 9, has_more: true, head: 250, first: 101, ..answer_to(&pull) });
    assert!(
        matches!(device.told[..], [Action::Gap { history: 9, from: 1, to: 100, .. }]),
        "{:?}",
        device.told
    );
    device.told.clear();
    let pull = device.pulls.pop().expect("it pulls on, at once");
    assert_eq!((pull.history, pull.cursor), (9, 100));
    device.give(wire::PullAck { history: 9, has_more: true, head: 250, first: 201, ..answer_to(&pull) });
    assert!(matches!(device.told[..], [Action::Gap { history: 9, from: 101, to: 200, .. }]));
    device.told.clear();
    let pull = device.pulls.pop().expect("and again");
    let messages = (240..=250).map(message).collect();
    device.give(wire::PullAck { history: 9, messages, head: 250, first: 201, ..answer_to(&pull) });
    assert!(matches!(device.told[0], Action::Gap { history: 9, from: 201, to: 239, .. }));
    assert_eq!(device.shown(), (240..=250).collect::<Vec<_>>());
    assert!(device.inbox.is_caught_up() && device.pulls.is_empty());
}

/// On a link on which each answer to a Sync takes 7 s, 2 s longer than it is waited for.
#[test]
fn a_sync_over_a_slow_link_ends() {
    let start = Instant::now();
    let mut inbox = Inbox::restore(Limits::default(), [("a:0", 9, 0, 0), ("a:1", 9, 0, 0)], true);
    let mut now = start;
    inbox.connected(now);
    let mut answers: Vec<(Instant, wire::SyncAck)> = Vec::new();
    let mut asked = 0;
    while now < start + Duration::from_secs(60) {
        while let Some(action) = inbox.next_action() {
            match action {
                Action::Sync(sync) => {
                    asked += 1;
                    // Each stands behind the one before.
                    let at = answers.last().map_or(now, |(at, _)| *at) + Duration::from_secs(7);
                    answers.push((at, wire::SyncAck { request: sync.request, ..Default::default() }));
                }
                Action::Synced => {
                    assert_eq!((asked, now - start), (2, Duration::from_secs(7)));
                    // What still comes is of no page that is asked for.
                    let (at, late) = answers.pop().unwrap();
                    inbox.sync_ack(late, at);
                    assert_eq!(inbox.next_action(), None);
                    return;
                }
                _ => {}
            }
        }
        let answer = answers.first().map_or(start + Duration::from_secs(3_600), |(at, _)| *at);
        now = answer.min(inbox.next_deadline().unwrap_or(answer));
        if now == answer {
            inbox.sync_ack(answers.remove(0).1, now);
        } else {
            inbox.tick(now);
        }
    }
    panic!("asked {asked} times in vain");
}

#[test]
fn what_was_confirmed_without_a_connection_is_acknowledged_by_the_next_run() {
    let now = Instant::now();
    let cursors = [("a:0", 9, 4, 4), ("a:1", 9, 4, 2), ("a:2", 9, 0, 0)];
    let mut inbox = Inbox::restore(Limits::default(), cursors, true);
    inbox.connected(now);
    let mut acks = Vec::new();
    while let Some(action) = inbox.next_action() {
        if let Action::Ack(ack) = action {
            acks.push((ack.chat, ack.history, ack.seq));
        }
    }
    assert_eq!(acks, [("a:1".to_owned(), 9, 4)]);
}
