//! What the model does with keys and events, without a terminal or a server.

use client::{AskError, Group, Page};
use proptest::prelude::*;
use proto::wire::Code;

use super::super::chat::{Older, What};
use super::*;

/// As a test wants it: alice, 80 by 20, UTC.
pub(in super::super) fn model() -> Model {
    Model::new("alice", "chat", TimeZone::UTC, Size::new(80, 20))
}

/// A message as the library hands it out.
pub(in super::super) fn message(chat: &str, seq: u64, sender: &str, text: &str) -> Message {
    let body = text.to_owned().into();
    Message { chat: chat.into(), history: 7, seq, sender: sender.to_owned(), time_us: seq * 60_000_000, body }
}

/// Types a line and enters it.
pub(in super::super) fn enter(model: &mut Model, line: &str) {
    model.act(Action::Insert(line.to_owned()), 1);
    model.act(Action::Enter, 1);
}

fn effects(model: &mut Model) -> Vec<Effect> {
    std::iter::from_fn(|| model.next_effect()).collect()
}

fn titles(model: &Model) -> Vec<(&str, usize)> {
    model.chats().iter().map(|chat| (chat.title.as_str(), chat.unread)).collect()
}

fn texts(model: &Model) -> Vec<String> {
    let text = |what: &What| match what {
        What::Message { text, .. } => text.clone(),
        What::Failed { text, in_doubt, why } => format!("{text} ({in_doubt}: {why})"),
        What::Remark(remark) => format!("({remark})"),
    };
    model
        .open_chat()
        .map_or(Vec::new(), |chat| chat.entries().iter().map(|entry| text(&entry.what)).collect())
}

fn read_flags(model: &mut Model) -> Vec<bool> {
    let read = |effect| match effect {
        Effect::Keep { record: Record::Message { read, .. }, .. } => read,
        other => panic!("{other:?}"),
    };
    effects(model).into_iter().map(read).collect()
}

#[test]
fn chats_are_listed_by_activity_and_count_what_is_unread() {
    let mut model = model();
    model.message(&message("alice:bob", 1, "bob", "hi"));
    model.message(&message("alice:carol", 2, "carol", "hello"));
    model.message(&message("alice:carol", 3, "carol", "there?"));
    assert_eq!(titles(&model), [("carol", 2), ("bob", 0)], "the first to write is shown");
    assert_eq!(read_flags(&mut model), [true, false, false]);
    model.message(&message("alice:bob", 4, "bob", "still me"));
    model.message(&message("alice:carol", 4, "alice", "from my phone"));
    assert_eq!(titles(&model), [("bob", 0), ("carol", 2)], "our own is not unread");
    effects(&mut model);
    model.act(Action::NextChat, 1);
    assert_eq!(titles(&model), [("bob", 0), ("carol", 0)]);
    let keep = Effect::Keep { chat: "alice:carol".into(), record: Record::Read };
    assert_eq!(effects(&mut model), [keep]);
    model.act(Action::NextChat, 1);
    assert_eq!(model.open_chat().unwrap().title, "bob");
    assert_eq!(effects(&mut model), [], "nothing was unread");
}

#[test]
fn what_is_read_elsewhere_is_not_unread_here_and_what_is_seen_here_is_told_once() {
    let mut model = model();
    model.message(&message("alice:bob", 1, "bob", "hi"));
    assert_eq!(model.take_read(), Some(("alice:bob".into(), (7, 1))));
    assert_eq!(model.take_read(), None);
    for seq in 1..=3 {
        model.message(&message("alice:carol", seq, "carol", "hello"));
    }
    assert_eq!(model.take_read(), None);
    assert_eq!(titles(&model)[0], ("carol", 3));
    effects(&mut model);
    model.read("alice:carol", "alice", (7, 2));
    model.read("alice:carol", "carol", (7, 3));
    assert_eq!(effects(&mut model), []);
    assert_eq!(titles(&model)[0], ("carol", 1));
    model.read_elsewhere("alice:carol", (8, 3));
    assert_eq!(titles(&model)[0], ("carol", 0), "what is held is of a history that is over");
    model.read_elsewhere("alice:carol", (7, 5));
    model.message(&message("alice:carol", 4, "carol", "read before it came"));
    model.message(&message("alice:carol", 5, "carol", "this too"));
    model.message(&message("alice:carol", 6, "carol", "this not"));
    assert_eq!(titles(&model)[0], ("carol", 1));
    model.act(Action::NextChat, 1);
    assert_eq!(model.take_read(), Some(("alice:carol".into(), (7, 6))));
}

#[test]
fn what_was_kept_is_shown_after_a_restart_and_nothing_is_new_twice() {
    let mut first = model();
    first.message(&message("alice:bob", 1, "bob", "seen"));
    first.message(&message("alice:carol", 2, "carol", "not seen"));
    let kept = |effects: &[Effect], name: &str| -> Vec<Record> {
        let of = |effect: &Effect| match effect {
            Effect::Keep { chat, record } if **chat == *name => Some(record.clone()),
            _ => None,
        };
        effects.iter().filter_map(of).collect()
    };
    let effects_before = effects(&mut first);
    let mut second = model();
    second.load("alice:carol", &kept(&effects_before, "alice:carol"));
    second.load("alice:bob", &kept(&effects_before, "alice:bob"));
    assert_eq!(titles(&second), [("carol", 1), ("bob", 0)]);
    second.start();
    assert_eq!((titles(&second)[0], texts(&second)), (("carol", 0), vec!["not seen".to_owned()]));
    effects(&mut second);
    // The kill came between keeping and confirming.
    second.message(&message("alice:bob", 1, "bob", "seen"));
    assert_eq!(effects(&mut second), []);
    assert_eq!(titles(&second)[1], ("bob", 0));
    // What is missing is said again after a restart, and once.
    second.gap("alice:carol", 3, 5, 9);
    let missing = kept(&effects(&mut second), "alice:carol");
    let mut third = model();
    third.load("alice:carol", &missing);
    third.start();
    third.gap("alice:carol", 3, 5, 9);
    assert_eq!(texts(&third), ["(messages 3 to 5 are not there any more)"]);
    assert_eq!(effects(&mut third), []);
}

#[test]
fn a_message_goes_from_sending_to_accepted_whichever_way_it_is_heard_of() {
    for event_first in [false, true] {
        let mut model = model();
        enter(&mut model, "/chat bob");
        enter(&mut model, "hello");
        let chat: Arc<str> = "alice:bob".into();
        let send = Effect::Send { ticket: 1, chat: chat.clone(), body: "hello".into() };
        let typing = Effect::Typing { chat: chat.clone(), stopped: false };
        assert_eq!(effects(&mut model), [typing, send]);
        assert_eq!((model.unanswered(), texts(&model).len()), (1, 0));
        let sent = Ok(Sent { chat: chat.clone(), history: 7, seq: 1, time_us: 60_000_000 });
        let event = message("alice:bob", 1, "alice", "hello");
        if event_first {
            model.message(&event);
            model.answered(1, sent);
        } else {
            model.answered(1, sent);
            model.message(&event);
        }
        assert_eq!((model.unanswered(), texts(&model)), (0, vec!["hello".to_owned()]));
        assert_eq!(read_flags(&mut model), [true], "kept once");
    }
}

#[test]
fn what_is_to_be_hidden_goes_when_its_hiding_comes_back() {
    let mut model = model();
    enter(&mut model, "/hide");
    assert!(model.remark().is_some(), "no chat is open");
    enter(&mut model, "/chat bob");
    (1..=3).for_each(|seq| model.message(&message("alice:bob", seq, "bob", &format!("m{seq}"))));
    effects(&mut model);
    enter(&mut model, "/hide 2");
    let chat: Arc<str> = "alice:bob".into();
    assert!(effects(&mut model).contains(&Effect::Hide { chat: chat.clone(), id: (7, 2) }));
    assert_eq!(texts(&model).len(), 3);
    model.hid(&Err(SendError::NotSent));
    assert!(model.remark().is_some_and(|remark| remark.contains("not hidden")));
    let hides = Message { body: Body::hide("alice:bob", 7, 2), ..message("alice:alice", 1, "alice", "") };
    model.message(&hides);
    assert_eq!(texts(&model), ["m1", "m3"]);
    enter(&mut model, "/hide 3");
    assert!(model.remark().is_some(), "there are two");
}

#[test]
fn refused_and_unknown_are_marked() {
    let mut model = model();
    enter(&mut model, "/chat #17");
    enter(&mut model, "one");
    enter(&mut model, "two");
    model.answered(1, Err(SendError::Refused { code: Code::NotAMember, text: "no\u{1b}".to_owned() }));
    model.answered(2, Err(SendError::Unknown));
    let unknown = SendError::Unknown.to_string();
    assert_eq!(
        texts(&model),
        ["one (false: refused: NOT_A_MEMBER: no\u{fffd})", &format!("two (true: {unknown})")]
    );
}

#[test]
fn what_is_typed_stays_with_its_chat() {
    let mut model = model();
    enter(&mut model, "to nobody");
    assert_eq!((model.remark().is_some(), model.editor().text()), (true, "to nobody"));
    model.act(Action::Edit(Edit::DeleteToStart), 1);
    enter(&mut model, "/chat bob");
    enter(&mut model, "/chat carol");
    model.act(Action::Insert("for carol".to_owned()), 1);
    model.act(Action::NextChat, 1);
    assert_eq!((model.open_chat().unwrap().title.as_str(), model.editor().text()), ("bob", ""));
    model.act(Action::OlderLine, 1);
    assert_eq!(model.editor().text(), "/chat carol");
    model.act(Action::PreviousChat, 1);
    assert_eq!(model.editor().text(), "for carol");
    model.act(Action::NextChat, 1);
    assert_eq!(model.editor().text(), "", "what was called back was no draft");
}

#[test]
fn commands_and_what_is_none() {
    let mut model = model();
    enter(&mut model, "/help");
    assert!(model.help());
    model.act(Action::Insert("x".to_owned()), 1);
    assert_eq!((model.help(), model.editor().text()), (false, ""));
    for bad in ["/nonsense", "/chat bob:carol", "/chat a:b:c", "/chat", "/chat #x"] {
        enter(&mut model, bad);
        assert!(model.remark().is_some() && model.chats().is_empty(), "{bad}");
    }
    enter(&mut model, "  ");
    assert_eq!(effects(&mut model), []);
    assert_eq!(model.remark(), None);
    enter(&mut model, "/quit");
    assert_eq!(effects(&mut model), [Effect::Quit]);
    model.act(Action::Quit, 1);
    assert_eq!(effects(&mut model), [Effect::Quit]);
}

#[test]
fn whoever_has_scrolled_up_sees_the_same_while_messages_come() {
    let mut model = model();
    (1..=100).for_each(|seq| model.message(&message("alice:bob", seq, "bob", "a line")));
    model.act(Action::PageUp, 1);
    let below = model.open_chat().unwrap().below;
    assert!(below > 0);
    model.message(&message("alice:bob", 101, "bob", "one\ntwo"));
    assert_eq!(model.open_chat().unwrap().below, below + 2);
    (0..50).for_each(|_| model.act(Action::PageUp, 1));
    let top = model.open_chat().unwrap().below;
    model.act(Action::PageUp, 1);
    assert_eq!(model.open_chat().unwrap().below, top, "the top is the top");
    (0..50).for_each(|_| model.act(Action::PageDown, 1));
    assert_eq!(model.open_chat().unwrap().below, 0);
    model.act(Action::PageUp, 1);
    enter(&mut model, "mine");
    assert_eq!(model.open_chat().unwrap().below, 0, "who writes wants to see it");
}

fn page(seqs: &[u64], next: Option<u64>) -> Page {
    let messages = seqs.iter().map(|seq| message("alice:bob", *seq, "bob", "an older line")).collect();
    Page { chat: "alice:bob".into(), history: 7, messages, next, head: 200, first: 1 }
}

#[test]
fn older_messages_are_fetched_at_the_top_until_there_are_none() {
    let mut model = model();
    (101..=140).for_each(|seq| model.message(&message("alice:bob", seq, "bob", "a line")));
    effects(&mut model);
    model.act(Action::PageUp, 1);
    assert_eq!(effects(&mut model), [], "there is more to see first");
    (0..5).for_each(|_| model.act(Action::PageUp, 1));
    let asked = |before| [Effect::Older { chat: "alice:bob".into(), before }];
    assert_eq!(effects(&mut model), asked(101), "once, however often");
    let top = model.open_chat().unwrap().below;
    model.older("alice:bob", Ok(page(&(51..=100).rev().collect::<Vec<_>>(), Some(51))));
    assert!(model.open_chat().unwrap().below > top, "and what came is seen");
    assert_eq!(texts(&model).len(), 90);
    // All of the next page is hidden: it goes on behind it.
    (0..9).for_each(|_| model.act(Action::PageUp, 1));
    assert_eq!(effects(&mut model), asked(51));
    model.older("alice:bob", Ok(page(&[], Some(3))));
    assert_eq!(effects(&mut model), asked(3));
    model.older("alice:bob", Err(AskError::Over));
    assert!(model.remark().is_some());
    model.act(Action::PageUp, 1);
    assert_eq!(effects(&mut model), asked(3));
    model.older("alice:bob", Ok(page(&[2], None)));
    (0..9).for_each(|_| model.act(Action::PageUp, 1));
    assert_eq!((effects(&mut model), model.open_chat().unwrap().older), (vec![], Older::None));
    // Of another history nothing is shown beside it.
    enter(&mut model, "/chat carol");
    model.message(&message("alice:carol", 5, "carol", "hi"));
    model.older("alice:carol", Ok(Page { history: 8, ..page(&[1], None) }));
    assert_eq!(texts(&model), ["hi"]);
}

#[test]
fn what_is_hidden_is_taken_away_and_stays_away() {
    let mut model = model();
    (1..=2).for_each(|seq| model.message(&message("alice:bob", seq, "bob", &format!("line {seq}"))));
    let mut kept = effects(&mut model);
    let hide = Message { body: Body::hide("alice:bob", 7, 1), ..message("alice:alice", 1, "alice", "") };
    model.message(&hide);
    assert_eq!((texts(&model), titles(&model)), (vec!["line 2".to_owned()], vec![("bob", 0)]));
    model.message(&hide);
    kept.extend(effects(&mut model));
    let record = |effect: &Effect| match effect {
        Effect::Keep { chat, record } if &**chat == "alice:bob" => record.clone(),
        other => panic!("{other:?}"),
    };
    let records: Vec<Record> = kept.iter().map(record).collect();
    assert_eq!(records.len(), 3);
    let mut again = super::tests::model();
    again.load("alice:bob", &records);
    again.start();
    assert_eq!(texts(&again), ["line 2"]);
}

#[test]
fn the_members_of_a_group_are_asked_for_when_it_is_looked_at_and_when_it_changes() {
    let mut model = model();
    let asked = |effects: Vec<Effect>| {
        effects.into_iter().filter(|effect| matches!(effect, Effect::Members { .. })).count()
    };
    let made = change(GroupAction::GroupCreate, "Rooks", &[]);
    model.message(&Message { body: Body::group(&made), ..message("#7", 1, "bob", "") });
    assert_eq!(asked(effects(&mut model)), 1, "it is the first chat, and opened");
    model.want_members();
    assert_eq!(asked(effects(&mut model)), 0);
    let group = Group { version: 1, title: "Rooks".to_owned(), history: 7, members: Vec::new() };
    model.members("#7", Some(&group));
    assert_eq!(asked(effects(&mut model)), 1, "once more, for what came meanwhile");
    model.members("#7", None);
    model.message(&Message { body: Body::group(&made), ..message("#7", 2, "bob", "") });
    assert_eq!(asked(effects(&mut model)), 1);
    model.message(&message("alice:bob", 1, "bob", "hi"));
    model.want_members();
    assert_eq!(asked(effects(&mut model)), 0);
}

#[test]
fn the_connection_is_told_as_it_is() {
    let mut model = model();
    model.problem("connection refused");
    assert_eq!(*model.link(), Link::Connecting { problem: Some("connection refused".to_owned()) });
    model.connected("127.0.0.1:7000".to_owned(), Durability::Strict);
    model.take_changed();
    model.problem("late");
    assert!(matches!(model.link(), Link::Online { .. }) && !model.take_changed());
    model.disconnected("closed\n\u{7}");
    assert_eq!(*model.link(), Link::Connecting { problem: Some("closed \u{fffd}".to_owned()) });
    model.message(&message("alice:bob", 5, "bob", "x"));
    model.history_lost("alice:bob", 1, 9);
    model.gap("alice:bob", 2, 4, 9);
    assert_eq!(texts(&model).len(), 3);
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..4u8, 1..9u64, any::<bool>()).prop_map(|(peer, seq, mine)| Step::Message(peer, seq, mine)),
        (0..9usize).prop_map(Step::Key),
        "[a/ 日\\n]{0,5}".prop_map(Step::Type),
        "(/chat [a-d]|/help|text)".prop_map(Step::Line),
        (0..6u64, any::<bool>()).prop_map(|(ticket, good)| Step::Answer(ticket, good)),
        (0..90u16, 0..30u16).prop_map(|(width, height)| Step::Resize(width, height)),
    ]
}

#[derive(Debug, Clone)]
enum Step {
    Message(u8, u64, bool),
    Key(usize),
    Type(String),
    Line(String),
    Answer(u64, bool),
    Resize(u16, u16),
}

proptest! {
    #[test]
    fn anything_may_happen_in_any_order(steps in proptest::collection::vec(step(), 0..60)) {
        let mut model = model();
        let keys = [Action::NextChat, Action::PreviousChat, Action::PageUp, Action::PageDown, Action::OlderLine,
            Action::NewerLine, Action::Escape, Action::Redraw, Action::Edit(Edit::DeleteWord)];
        for (now, step) in steps.into_iter().enumerate() {
            match step {
                Step::Message(peer, seq, mine) => {
                    let name = ["ann", "bob", "cid", "dan"][usize::from(peer)];
                    let chat = if name < "alice" { format!("{name}:alice") } else { format!("alice:{name}") };
                    model.message(&message(&chat, seq, if mine { "alice" } else { name }, "a text\nof two lines"));
                }
                Step::Key(key) => model.act(keys[key].clone(), now as u64),
                Step::Type(text) => model.act(Action::Insert(text), now as u64),
                Step::Line(line) => enter(&mut model, &line),
                Step::Answer(ticket, true) => {
                    let sent = Sent { chat: "x".into(), history: 7, seq: ticket + 100, time_us: 1 };
                    model.answered(ticket, Ok(sent));
                }
                Step::Answer(ticket, false) => model.answered(ticket, Err(SendError::Unknown)),
                Step::Resize(width, height) => model.resize(Size::new(width, height)),
            }
            prop_assert!(model.chats().is_sorted_by(|one, other| one.active_us >= other.active_us));
            prop_assert!(model.open_chat().is_none_or(|chat| chat.unread == 0));
            let backend = ratatui::backend::TestBackend::new(model.size.width.max(1), model.size.height.max(1));
            let mut terminal = ratatui::Terminal::new(backend).unwrap();
            terminal.draw(|frame| super::super::draw::draw(frame, &model)).unwrap();
        }
    }
}

#[test]
fn keys_tell_that_somebody_writes_every_three_seconds_and_when_the_line_is_empty_again() {
    let mut model = model();
    model.message(&message("alice:bob", 1, "bob", "hi"));
    assert_eq!(model.take_watched(), Some(vec!["bob".to_owned()]));
    assert_eq!(model.take_watched(), None);
    effects(&mut model);
    let typing = |stopped| Effect::Typing { chat: "alice:bob".into(), stopped };
    model.act(Action::Insert("h".to_owned()), 1);
    model.act(Action::Insert("i".to_owned()), 2_000_000);
    assert_eq!(effects(&mut model), [typing(false)]);
    model.act(Action::Insert("!".to_owned()), 3_000_001);
    assert_eq!(effects(&mut model), [typing(false)]);
    model.act(Action::Edit(Edit::DeleteToStart), 3_100_000);
    model.act(Action::Insert("/quit".to_owned()), 3_200_000);
    assert_eq!(effects(&mut model), [typing(true)], "and commands are nobody's business");
    model.act(Action::Edit(Edit::DeleteToStart), 3_300_000);
    enter(&mut model, "hello");
    assert!(matches!(effects(&mut model)[..], [Effect::Typing { stopped: false, .. }, Effect::Send { .. }]));
}
