//! The verdict against clean histories, and against the same with one thing planted in them. Pure.
//!
//! Trap: one fault may be wrong in several ways at once; each test says which ones it expects.

use super::super::history::{Device, Record, To};
use super::*;
use proptest::prelude::*;

const PHONE: u32 = 1;

/// Alice (0), bob (1) with two devices, carol (2).
fn devices() -> Vec<Device> {
    let device = |user: u32, device: &str, away| Device {
        user,
        name: format!("u{user}"),
        device: device.into(),
        away,
    };
    vec![
        device(0, "phone", false),
        device(1, "phone", false),
        device(1, "desk", true),
        device(2, "phone", false),
    ]
}

fn id(n: u32) -> MessageId {
    MessageId { from: 0, n }
}

fn place(seq: u64) -> Place {
    Place { chat: "u0:u1".into(), history: 7, seq }
}

fn shown(who: u32, n: u32) -> Record {
    Record {
        at_us: 0,
        who: Some(who),
        what: What::Shown { id: Some(id(n)), place: place(n.into()), liar: None },
    }
}

/// Alice sends so many to bob; each is acknowledged and shown to her phone and both of bob's devices.
fn clean(messages: u32) -> History {
    let mut records = Vec::new();
    for n in 1..=messages {
        let add = |what| Record { at_us: 0, who: Some(0), what };
        records.push(add(What::Sent { id: id(n), to: To::User(1) }));
        records.push(add(What::Acked { id: id(n), place: place(n.into()) }));
        records.extend([shown(0, n), shown(PHONE, n), shown(2, n)]);
    }
    for (at, record) in records.iter_mut().enumerate() {
        record.at_us = at as u64 * 1_000;
    }
    History { devices: devices(), records, gateways_live: true }
}

fn judged(history: &History) -> Verdict {
    Verdict::of(history, Excuses::default())
}

fn position(history: &History, who: u32, n: u32) -> usize {
    let is_it = |record: &Record| {
        record.who == Some(who)
            && matches!(record.what, What::Shown { id: Some(shown), .. } if shown == id(n))
    };
    history.records.iter().position(is_it).unwrap()
}

/// The wrong counts, in the order of their names in the contract.
fn wrong(verdict: &Verdict) -> [u64; 7] {
    let v = verdict;
    [v.lost, v.doubled, v.reordered, v.phantom, v.gaps, v.refused_delivered, v.connections_dropped]
}

#[test]
fn nothing_is_wrong_with_a_clean_history() {
    let verdict = judged(&clean(50));
    assert_eq!((verdict.sent, verdict.acked, verdict.shown, verdict.unknown), (50, 50, 150, 0));
    assert!(verdict.is_clean(), "{verdict:?}");
    assert_eq!(verdict.ack_ms.max, 1.0);
    assert_eq!(verdict.push_ms.max, 2.0, "whoever is away does not count");
    assert!(judged(&History::default()).is_clean());
}

#[test]
fn what_was_never_acknowledged_may_come_or_not() {
    let mut history = clean(3);
    history.records.retain(|record| !matches!(record.what, What::Acked { .. }));
    assert!(judged(&history).is_clean());
    history.records.retain(|record| record.who == Some(0));
    let verdict = judged(&history);
    assert_eq!((verdict.lost, verdict.unknown), (0, 3));
}

#[test]
fn a_place_is_given_once() {
    let mut history = clean(3);
    let twice = What::Acked { id: id(2), place: place(9) };
    history.records.push(Record { at_us: 0, who: Some(0), what: twice });
    assert_eq!(judged(&history).doubled, 1, "one id at two places");
    let mut history = clean(3);
    history.records.push(Record { at_us: 0, who: Some(0), what: What::Sent { id: id(4), to: To::User(1) } });
    let same = What::Acked { id: id(4), place: place(3) };
    history.records.push(Record { at_us: 0, who: Some(0), what: same });
    let verdict = judged(&history);
    assert_eq!((verdict.doubled, verdict.lost), (1, 1), "one place for two ids");
}

#[test]
fn dropped_connections_and_gaps_that_were_told() {
    let mut history = clean(3);
    let cut = What::Disconnected { reason: "reset".into() };
    history.records.push(Record { at_us: 0, who: Some(1), what: cut });
    let gap = What::Gap { place: place(4), to: 6 };
    history.records.push(Record { at_us: 0, who: Some(1), what: gap });
    assert_eq!(wrong(&judged(&history)), [0, 0, 0, 0, 3, 0, 1]);
    history.gateways_live = false;
    let excused = Verdict::of(&history, Excuses { gaps: true, ..Excuses::default() });
    assert!(excused.is_clean());
}

#[test]
fn a_lost_history_excuses_only_where_it_is_allowed() {
    let mut history = clean(3);
    let at = position(&history, 2, 3);
    history.records.remove(at);
    let new = Place { history: 8, seq: 1, ..place(1) };
    history.records.push(Record { at_us: 0, who: Some(2), what: What::HistoryLost { place: new.clone() } });
    // What the server still has comes again under the new number.
    let again = What::Shown { id: Some(id(1)), place: new, liar: None };
    history.records.push(Record { at_us: 0, who: Some(2), what: again });
    let strict = judged(&history);
    assert_eq!((strict.lost, strict.histories_lost), (1, 1));
    assert!(strict.doubled > 0);
    let excused = Verdict::of(&history, Excuses { history_lost: true, ..Excuses::default() });
    assert_eq!((excused.cut, excused.histories_lost), (1, 1));
    assert!(excused.is_clean(), "{excused:?}");
    // Another device that had something of it must be told, too.
    let missing = position(&history, 1, 3);
    history.records.remove(missing);
    let silent = Verdict::of(&history, Excuses { history_lost: true, ..Excuses::default() });
    assert_eq!((silent.cut, silent.lost), (0, 1));
}

#[test]
fn only_what_is_too_large_is_refused() {
    let mut history = clean(3);
    for (n, code) in [(4, "MESSAGE_TOO_LARGE"), (5, "TOO_OLD")] {
        let refused = What::Refused { id: id(n), code: code.into() };
        for what in [What::Sent { id: id(n), to: To::User(1) }, refused] {
            history.records.push(Record { at_us: 0, who: Some(0), what });
        }
    }
    let verdict = judged(&history);
    assert!(verdict.is_clean());
    assert_eq!((verdict.refused, verdict.refused_wrongly, verdict.unknown), (2, 1, 0));
}

#[test]
fn phantoms() {
    let strange = [
        What::Shown { id: None, place: place(4), liar: None },
        What::Shown { id: Some(id(99)), place: place(4), liar: None },
        What::Shown { id: Some(id(3)), place: place(4), liar: Some("u2".into()) },
        What::Shown { id: Some(id(3)), place: Place { chat: "u0:u2".into(), ..place(4) }, liar: None },
    ];
    for what in strange {
        let mut history = clean(3);
        history.records.push(Record { at_us: 0, who: Some(PHONE), what });
        assert_eq!(wrong(&judged(&history)), [0, 0, 0, 1, 0, 0, 0], "{:?}", history.records.last());
    }
    let mut history = clean(3);
    history.records.push(shown(3, 2));
    assert_eq!(judged(&history).phantom, 1, "carol has no part in it");
}

proptest! {
    /// One fault planted anywhere in a clean history is found, as what it is.
    #[test]
    fn a_planted_fault_is_found(messages in 2_u32..60, at in 1_u32..60, who in 0_u32..3, kind in 0..7) {
        let n = 1 + at % messages;
        let mut history = clean(messages);
        let shown_at = position(&history, who, n);
        let expected = match kind {
            0 => {
                // Lost: never shown. Unless it is the last of its chat, or was the first, that is a gap as well.
                history.records.remove(shown_at);
                [1, 0, 0, 0, u64::from(n < messages && n > 1), 0, 0]
            }
            1 => {
                // Doubled under the same seq, some time later: its seq comes behind itself, too.
                let again = history.records[shown_at].clone();
                history.records.push(again);
                [0, 1, 1, 0, 0, 0, 0]
            }
            2 if n < messages => {
                // Reordered: the next one first. Passing over it is a gap, coming back is out of order, twice judged:
                // by seq and by the sender's counter.
                let next = position(&history, who, n + 1);
                let late = history.records.remove(shown_at);
                history.records.insert(next, late);
                [0, 0, 2, 0, u64::from(n > 1), 0, 0]
            }
            3 => {
                let what = What::Shown { id: Some(MessageId { from: 2, n }), place: place(u64::from(messages) + 1), liar: None };
                history.records.push(Record { at_us: 0, who: Some(who), what });
                [0, 0, 0, 1, 0, 0, 0]
            }
            4 => {
                // Refused, and shown.
                for record in &mut history.records {
                    if matches!(record.what, What::Acked { id: acked, .. } if acked == id(n)) {
                        record.what = What::Refused { id: id(n), code: "MESSAGE_TOO_LARGE".into() };
                    }
                }
                [0, 0, 0, 0, 0, 1, 0]
            }
            5 => {
                // A seq that was never given: everything behind it is one higher.
                for record in &mut history.records {
                    let place = match &mut record.what {
                        What::Acked { place, .. } | What::Shown { place, .. } => place,
                        _ => continue,
                    };
                    place.seq += u64::from(place.seq >= u64::from(n));
                }
                // Three devices pass over it; but nobody knows of one in front of the first.
                [0, 0, 0, 0, if n > 1 { 3 } else { 0 }, 0, 0]
            }
            _ => {
                let cut = What::Disconnected { reason: "cut".into() };
                history.records.insert(shown_at, Record { at_us: 0, who: Some(who), what: cut });
                [0, 0, 0, 0, 0, 0, 1]
            }
        };
        let verdict = judged(&history);
        prop_assert_eq!(wrong(&verdict), if kind == 2 && n == messages { [0, 0, 0, 0, 0, 0, 1] } else { expected });
    }
}

#[test]
fn a_group_s_message_is_for_all_its_members_and_for_nobody_else() {
    let place = |seq| Place { chat: "#5".into(), history: 7, seq };
    let record = |who, what| Record { at_us: 0, who, what };
    let shown = |who| record(Some(who), What::Shown { id: Some(id(1)), place: place(2), liar: None });
    let made = Change { joins: vec![0, 1], leaves: vec![] };
    let told = |who| record(Some(who), What::Told { place: place(1), change: made.clone() });
    let mut history = History { devices: devices(), records: Vec::new(), gateways_live: true };
    history.records = vec![
        // Whoever made it is shown it before the answer is here.
        told(0),
        record(None, What::Made { place: place(1), members: vec![0, 1] }),
        told(PHONE),
        told(2),
        record(Some(0), What::Sent { id: id(1), to: To::Group(0) }),
        record(Some(0), What::Acked { id: id(1), place: place(2) }),
        shown(0),
        shown(PHONE),
        shown(2),
    ];
    let verdict = judged(&history);
    assert_eq!((verdict.acked, verdict.wrong()), (1, 0), "{verdict:?}");
    history.records.pop();
    assert_eq!(judged(&history).lost, 1, "a member's second device has not seen it");
    history.records.push(shown(2));
    history.records.push(shown(3));
    assert_eq!(judged(&history).phantom, 1, "carol is no member");
    history.records.pop();
    history.records.push(record(Some(PHONE), What::Told { place: place(4), change: Change::default() }));
    assert_eq!(judged(&history).gaps, 1, "a change of the group has a place like any message");
    history.records.pop();
    let announced = history.records.remove(2);
    assert_eq!(
        judged(&history).lost,
        1,
        "{announced:?} is missing: somebody in the group does not know of it"
    );
}

#[test]
fn who_is_in_no_group_any_more_is_excused_only_if_nothing_of_it_is_left() {
    let place = |history, seq| Place { chat: "#5".into(), history, seq };
    let record = |who, what| Record { at_us: 0, who, what };
    let refused = What::Refused { id: id(1), code: Code::NotAMember.as_str_name().into() };
    let mut history = History { devices: devices(), records: Vec::new(), gateways_live: true };
    history.records = vec![
        record(None, What::Made { place: place(7, 1), members: vec![0] }),
        record(Some(0), What::Told { place: place(7, 1), change: Change { joins: vec![0], leaves: vec![] } }),
        record(Some(0), What::Sent { id: id(1), to: To::Group(0) }),
        record(Some(0), refused),
    ];
    let excuses = Excuses { history_lost: true, ..Excuses::default() };
    assert_eq!(Verdict::of(&history, excuses).refused_wrongly, 1, "nobody was told of a loss");
    history.records.push(record(Some(0), What::HistoryLost { place: place(8, 1) }));
    assert_eq!(Verdict::of(&history, excuses).refused_wrongly, 0);
    assert_eq!(judged(&history).refused_wrongly, 1);
    // The group goes on under the new history.
    history.records.push(record(Some(0), What::Sent { id: id(2), to: To::Group(0) }));
    history.records.push(record(Some(0), What::Acked { id: id(2), place: place(8, 2) }));
    assert_eq!(Verdict::of(&history, excuses).refused_wrongly, 1);
}

/// Alice makes a group with bob and carol and writes 2 and 6; bob goes at 3 and is back at 5; carol writes 4 and goes at 7.
fn coming_and_going() -> History {
    let place = |seq| Place { chat: "#5".into(), history: 7, seq };
    let carol = MessageId { from: 2, n: 1 };
    let mut history = History { devices: devices(), records: Vec::new(), gateways_live: true };
    let mut add = |who: u32, what| {
        let at_us = history.records.len() as u64;
        history.records.push(Record { at_us, who: Some(who), what });
    };
    let change = |joins: &[u32], leaves: &[u32]| Change { joins: joins.to_vec(), leaves: leaves.to_vec() };
    add(0, What::Made { place: place(1), members: vec![0, 1, 2] });
    for who in 0..4 {
        add(who, What::Told { place: place(1), change: change(&[0, 1, 2], &[]) });
    }
    let says = |id: MessageId, seq, to: &[u32]| {
        let shown = |who: &u32| (*who, What::Shown { id: Some(id), place: place(seq), liar: None });
        let said = [What::Sent { id, to: To::Group(0) }, What::Acked { id, place: place(seq) }];
        said.map(|what| (id.from, what)).into_iter().chain(to.iter().map(shown)).collect::<Vec<_>>()
    };
    let changes = |seq, change: Change, to: &[u32]| {
        let told = |who: &u32| (*who, What::Told { place: place(seq), change: change.clone() });
        let changed = [
            What::Asked { group: 0, change: change.clone() },
            What::Changed { place: place(seq), change: change.clone() },
        ];
        changed.map(|what| (0, what)).into_iter().chain(to.iter().map(told)).collect::<Vec<_>>()
    };
    let happened = [
        says(id(1), 2, &[0, 1, 3]),
        changes(3, change(&[], &[1]), &[0, 1, 3]),
        says(carol, 4, &[0, 3]),
        vec![(2, What::Shown { id: Some(id(1)), place: place(2), liar: None })],
        vec![(2, What::Told { place: place(3), change: change(&[], &[1]) })],
        changes(5, change(&[1], &[]), &[0, 1, 2, 3]),
        says(id(2), 6, &[0, 1, 2, 3]),
        changes(7, change(&[], &[2]), &[0, 1, 2, 3]),
    ];
    for (who, what) in happened.into_iter().flatten() {
        add(who, what);
    }
    history
}

#[test]
fn a_member_is_shown_what_comes_while_it_is_in() {
    let history = coming_and_going();
    let verdict = judged(&history);
    assert_eq!((verdict.acked, verdict.wrong()), (3, 0), "bob's desk slept while he went: {verdict:?}");
    let with = |who, what| {
        let mut history = history.clone();
        history.records.push(Record { at_us: 1_000, who: Some(who), what });
        judged(&history)
    };
    let place = |seq| Place { chat: "#5".into(), history: 7, seq };
    let seen = |seq, id| What::Shown { id: Some(id), place: place(seq), liar: None };
    let late = with(PHONE, seen(4, MessageId { from: 2, n: 1 }));
    assert_eq!((late.phantom, late.reordered), (1, 1), "bob was out when carol said it");
    // Whoever goes is owed what was said until then, whoever comes back what is said from then on.
    for (who, n, lost) in [(3, 1, 1), (3, 2, 1), (PHONE, 2, 1), (PHONE, 1, 1)] {
        let mut history = history.clone();
        history.records.retain(|record| {
            !(record.who == Some(who)
                && matches!(record.what, What::Shown { id: Some(one), .. } if one == id(n)))
        });
        let verdict = judged(&history);
        assert_eq!((verdict.lost, verdict.gaps), (lost, 1), "device {who} was not shown {n}");
    }
    let mut history = history.clone();
    let end = history.records.len() - 1;
    assert!(matches!(history.records[end].what, What::Told { .. }));
    history.records.truncate(end);
    assert_eq!(judged(&history).lost, 1, "carol does not know that she is out");
}

#[test]
fn whoever_is_out_is_refused_and_nobody_else() {
    let history = coming_and_going();
    let place = |seq| Place { chat: "#5".into(), history: 7, seq };
    let answered = |sent_us, from, what: &dyn Fn(MessageId) -> What| {
        let mut history = history.clone();
        let id = MessageId { from, n: 9 };
        let asked = Record { at_us: sent_us, who: Some(from), what: What::Sent { id, to: To::Group(0) } };
        history.records.push(asked);
        history.records.push(Record { at_us: sent_us + 1, who: Some(from), what: what(id) });
        judged(&history)
    };
    let refused = |sent_us, from| {
        let refuse = |id| What::Refused { id, code: Code::NotAMember.as_str_name().into() };
        answered(sent_us, from, &refuse).refused_wrongly
    };
    // Times are places in the history: bob is out from 10 to 20, carol from 30 on.
    let at = |sought: &dyn Fn(&What) -> bool| {
        history.records.iter().position(|record| sought(&record.what)).unwrap() as u64
    };
    let is_asked =
        |user: u32| move |what: &What| matches!(what, What::Asked { change, .. } if change.leaves == [user]);
    let is_back = at(&|what| matches!(what, What::Changed { change, .. } if change.joins == [1]));
    assert_eq!((refused(2, 1), refused(at(&is_asked(1)), 1), refused(is_back - 1, 1)), (1, 0, 0));
    assert_eq!((refused(is_back + 1, 1), refused(2, 2), refused(900, 2), refused(900, 0)), (1, 1, 0, 1));
    // Taken all the same.
    let taken = answered(900, 2, &|id| What::Acked { id, place: place(8) });
    assert_eq!(taken.phantom, 1, "carol is out from 7 on: {taken:?}");
    let wrongly = What::Unchanged { group: 0, code: "NOT_ALLOWED".into() };
    let other = What::Told { place: place(7), change: Change { joins: vec![], leaves: vec![1] } };
    let mut history = history.clone();
    history.records.push(Record { at_us: 900, who: Some(0), what: wrongly });
    history.records.push(Record { at_us: 900, who: Some(0), what: other });
    let verdict = judged(&history);
    assert_eq!((verdict.refused_wrongly, verdict.doubled), (1, 1), "one place has two changes");
}
