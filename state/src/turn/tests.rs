//! Turns beside each other, in time, and what they prove.

use prost::Message;

use super::ops::GROUPS_LISTED_MAX;
use super::*;
use crate::core::tests::{Scripted, core_and_accepted, core_at_rest, core_over};
use crate::fan_out;
use crate::gateways::Outgoing;
use crate::lane::Lane;
use crate::store::{Answer, Append, Appended, Head, MessageId, Page, Route, StoreError, chat_bucket};

fn gateway() -> Gateway {
    Gateway {
        id: "g".into(),
        incarnation: 1,
        loopback: true,
        heartbeat_ms: 1,
        frame_bytes_max: 65_536,
        takes_read: true,
        takes_presence: true,
    }
}

fn frame(command: Command, body: &impl Message) -> UpFrame {
    let body = body.encode_to_vec().into();
    UpFrame { connection: 10, user: 1, device: 1, binding: 1, command: command as u32, body }
}

fn send(chat: &str, n: u64) -> UpFrame {
    frame(
        Command::Send,
        &wire::Send { stream: 9, n, chat: chat.into(), body: "x".into(), ..Default::default() },
    )
}

/// Of [`frame`]'s connection.
fn route() -> Route {
    Route { device: 1, attempt: 1, connection: 10 }
}

fn n_of(append: &Append) -> u64 {
    if let MessageId::Numbered { n, .. } = append.id { n } else { 0 }
}

fn stored(seq: u64) -> Outcome {
    Ok(Answer::Appended(Appended::Stored { seq, time_us: seq, history: 7, version: 0, again: false }))
}

/// The last store call as what the answers say: command byte and body.
fn answers(out: &Outcomes) -> Vec<(u8, &[u8])> {
    out.answers
        .iter()
        .map(|answer| (answer.frames[3], &answer.frames[proto::frame::HEADER_BYTES..]))
        .collect()
}

#[tokio::test]
async fn a_turn_that_must_ask_first_is_not_overtaken_by_the_next_of_its_lane() {
    let store = Scripted::new(|op| match op {
        Op::Append(_) => stored(1),
        _ => Ok(Answer::Done),
    });
    let (core, _accepted) = core_and_accepted(store.clone());
    core.users.learn("alice", 1);
    core.chats_are_listed(&["alice:bob"]);
    store.hold(true);
    let (gateway, mut lane) = (gateway(), Lane::default());
    // One more chat, which must be listed first.
    let first = run(&core, &gateway, vec![send("alice:bob", 1), send("alice:carol", 1)], lane.next());
    let second = run(&core, &gateway, vec![send("alice:bob", 2)], lane.next());
    let (mut first, mut second) = (Box::pin(first), Box::pin(second));
    assert!(futures_util::poll!(first.as_mut()).is_pending());
    assert!(futures_util::poll!(second.as_mut()).is_pending());
    assert_eq!(store.calls(), 1, "the second waits behind the first, which lists a chat");
    store.hold(false);
    let (first, second) = tokio::join!(first, second);
    assert_eq!((first.accepted.len(), second.accepted.len()), (2, 1));
    let appended: Vec<u64> = store
        .asked()
        .iter()
        .filter_map(|op| if let Op::Append(append) = op { Some(n_of(append)) } else { None })
        .collect();
    assert_eq!(appended, [1, 1, 2]);
}

#[tokio::test]
async fn turns_that_need_not_ask_do_not_wait_for_each_other() {
    let store = Scripted::new(|_| stored(1));
    let (core, _accepted) = core_and_accepted(store.clone());
    core.users.learn("alice", 1);
    core.chats_are_listed(&["alice:bob"]);
    store.hold(true);
    let (gateway, mut lane) = (gateway(), Lane::default());
    let mut first = Box::pin(run(&core, &gateway, vec![send("alice:bob", 1)], lane.next()));
    let mut second = Box::pin(run(&core, &gateway, vec![send("alice:bob", 2)], lane.next()));
    assert!(futures_util::poll!(first.as_mut()).is_pending());
    assert!(futures_util::poll!(second.as_mut()).is_pending());
    assert_eq!(store.calls(), 2, "both are under way");
}

#[tokio::test]
async fn a_message_holds_the_mark_from_before_its_store_call_until_it_is_dropped() {
    let store = Scripted::new(|_| stored(1));
    let (core, _accepted) = core_and_accepted(store.clone());
    core.users.learn("alice", 1);
    core.chats_are_listed(&["alice:bob"]);
    store.hold(true);
    let gateway = gateway();
    let mut turn = Box::pin(run(&core, &gateway, vec![send("alice:bob", 1)], Place::default()));
    assert!(futures_util::poll!(turn.as_mut()).is_pending());
    assert!(!core.ledger.is_clear(), "it may be stored any moment");
    store.hold(false);
    let out = turn.await;
    assert!(!core.ledger.is_clear());
    drop(out);
    assert!(core.ledger.is_clear());
}

#[tokio::test]
async fn routes_are_read_behind_the_appends_and_are_good_for_this_store_alone() {
    let store = Scripted::new(|op| match op {
        Op::Append(append) => stored(n_of(append)),
        Op::Routes { user } => {
            let connection = (1 << 40) + user;
            Ok(Answer::Routes(vec![crate::store::Route { device: 1, attempt: 1, connection }]))
        }
        _ => Ok(Answer::Done),
    });
    let (core, _accepted) = core_and_accepted(store.clone());
    [("alice", 1), ("bob", 2)].into_iter().for_each(|(name, number)| core.users.learn(name, number));
    core.chats_are_listed(&["alice:bob"]);
    let sends = vec![send("alice:bob", 1), send("alice:bob", 2)];
    let mut out = run(&core, &gateway(), sends, Place::default()).await;
    let kinds: Vec<&str> = store
        .asked()
        .iter()
        .map(|op| match op {
            Op::Append(_) => "append",
            Op::Routes { user: 1 } => "alice",
            Op::Routes { user: 2 } => "bob",
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(kinds, ["append", "append", "alice", "bob"]);
    let (stream, mut waiting) = core.gateways.open(proto::incarnation_of((1 << 40) + 1));
    fan_out::round(&core, &mut out.accepted).await;
    assert_eq!(store.calls(), 1, "the fan-out has nothing to ask");
    let pushed: usize = waiting
        .take_now()
        .iter()
        .map(|some| if let Outgoing::Pushes(pushes) = some { pushes.pushes.len() } else { 0 })
        .sum();
    assert_eq!(pushed, 2);
    // Behind a change of the store a number may be somebody else's: what was read before is not used.
    let mut out = run(&core, &gateway(), vec![send("alice:bob", 3)], Place::default()).await;
    store.becomes_another();
    core.apply(&[Op::Incarnate]).await;
    // The same numbers, of each other.
    [("alice", 2), ("bob", 1)].into_iter().for_each(|(name, number)| core.users.learn(name, number));
    let asked_before = store.asked().len();
    fan_out::round(&core, &mut out.accepted).await;
    assert_eq!(store.asked()[asked_before..], [Op::Routes { user: 1 }, Op::Routes { user: 2 }]);
    drop(stream);
}

#[tokio::test]
async fn a_message_without_an_answer_is_in_doubt_until_it_is_sent_again() {
    let away = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let is_away = away.clone();
    let store = Scripted::new(move |op| match op {
        Op::Append(append) if is_away.load(std::sync::atomic::Ordering::Relaxed) && n_of(append) == 1 => {
            Err(StoreError::Unknown("no answer in time".into()))
        }
        Op::Append(append) if n_of(append) == 2 => Err(StoreError::Refused("nothing was done".into())),
        _ => stored(1),
    });
    let (core, _accepted) = core_and_accepted(store);
    core.users.learn("alice", 1);
    core.chats_are_listed(&["alice:bob", "alice:carol"]);
    let gateway = gateway();
    let turn = || run(&core, &gateway, vec![send("alice:bob", 1), send("alice:carol", 2)], Place::default());
    let due = || core.doubts.due(core.clock.now() + Duration::from_secs(60));
    assert!(turn().await.accepted.is_empty());
    assert!(!core.ledger.is_clear(), "should this server die, others look");
    assert!(due().into_keys().eq(["alice:bob".to_owned()]));
    away.store(false, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(turn().await.accepted.len(), 1);
    assert!(due().is_empty() && core.ledger.is_clear());
}

#[tokio::test]
async fn all_calls_of_a_turn_share_one_limit_and_every_frame_is_answered() {
    let store = Scripted::new(|_| Ok(Answer::Done));
    let mut config = crate::config::Config::default();
    config.store.response_ms_max = 500;
    let clock = Box::new(crate::clock::TokioClock);
    let (core, _accepted) = Core::for_simulation(config, Box::new(store.clone()), clock, 1);
    store.hold(true);
    // Nothing is known of the user: three calls, each of which is silent.
    let gateway = gateway();
    let turn = run(&core, &gateway, vec![send("alice:bob", 1), send("alice:bob", 2)], Place::default());
    let out = tokio::time::timeout(Duration::from_secs(60), turn).await.expect("it ends");
    assert_eq!(out.answers.len(), 2);
    assert!(answers(&out).iter().all(|(command, _)| *command == Command::Error as u8));
    assert_eq!(store.calls(), 1, "later calls are not made without time");
}

/// A Sync to which no route leads any more is not answered: whoever sent it is told to log in again, or that it was replaced.
#[tokio::test]
async fn a_sync_without_a_route_ends_the_connection() {
    let newer = Route { device: 1, attempt: 9, connection: 77 };
    for (routes, code, command) in [
        (vec![route(), newer], None, Command::SyncAck),
        (vec![], Some(Code::Unavailable), Command::Error),
        (vec![newer], Some(Code::Replaced), Command::Kick),
    ] {
        let core = core_over(Scripted::new(move |op| {
            Ok(match op {
                Op::Routes { .. } => Answer::Routes(routes.clone()),
                Op::Chats { .. } => Answer::Chats(Vec::new()),
                _ => return Err(StoreError::Corrupt("not asked for here".into())),
            })
        }));
        core.users.learn("alice", 1);
        let sync = frame(Command::Sync, &wire::Sync { request: 1, ..Default::default() });
        let out = run(&core, &gateway(), vec![sync], Place::default()).await;
        let (answered, body) = answers(&out)[0];
        assert_eq!((answered, out.answers[0].close), (command as u8, code.is_some()));
        let told = match command {
            Command::Error => Some(wire::Error::decode(body).unwrap().code()),
            Command::Kick => Some(wire::Kick::decode(body).unwrap().code()),
            _ => None,
        };
        assert_eq!(told, code);
    }
}

#[tokio::test]
async fn a_sync_whose_news_do_not_fit_a_frame_goes_on_behind_it() {
    let all: Vec<String> = (0..200).map(|n| format!("alice:{n:03}-{}", "x".repeat(50))).collect();
    let listed = all.clone();
    let core = core_over(Scripted::new(move |op| {
        Ok(match op {
            Op::Routes { .. } => Answer::Routes(vec![route()]),
            Op::Chats { after, .. } => {
                Answer::Chats(listed.iter().filter(|chat| *chat > after).cloned().collect())
            }
            Op::Head { .. } => Answer::Head(Head { history: 7, seq: 10, first: 1, ..Head::default() }),
            _ => return Err(StoreError::Corrupt("not asked for here".into())),
        })
    }));
    core.users.learn("alice", 1);
    let gateway = Gateway { frame_bytes_max: 4_096, ..gateway() };
    let (mut after, mut told, mut pages) = (String::new(), Vec::new(), 0);
    loop {
        let sync = frame(Command::Sync, &wire::Sync { request: 1, after, ..Default::default() });
        let out = run(&core, &gateway, vec![sync], Place::default()).await;
        assert!(out.answers[0].frames.len() <= 4_096);
        let ack = wire::SyncAck::decode(answers(&out)[0].1).unwrap();
        told.extend(ack.chats.into_iter().map(|head| head.chat));
        pages += 1;
        if !ack.has_more {
            break;
        }
        after = ack.next;
    }
    assert_eq!((told, pages > 3), (all, true));
}

#[tokio::test]
async fn a_cursor_above_the_head_draws_a_new_history_before_the_answer() {
    let lost = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let drawn = lost.clone();
    let store = Scripted::new(move |op| {
        let history = || if lost.load(std::sync::atomic::Ordering::Relaxed) { 8 } else { 7 };
        Ok(match op {
            Op::Routes { .. } => Answer::Routes(vec![route()]),
            Op::Chats { .. } => Answer::Chats(vec!["alice:bob".into()]),
            Op::Head { .. } => {
                Answer::Head(Head { history: history(), seq: 10, first: 1, ..Head::default() })
            }
            Op::Pull { .. } => {
                Answer::Messages(Page { history: history(), head: 10, first: 1, ..Page::default() })
            }
            Op::LoseHistory { bucket, history: 7 } if *bucket == chat_bucket("alice:bob") => {
                lost.store(true, std::sync::atomic::Ordering::Relaxed);
                Answer::Done
            }
            _ => return Err(StoreError::Corrupt("not asked for here".into())),
        })
    });
    let core = core_over(store);
    core.users.learn("alice", 1);
    let sync = |history, seq| {
        let cursors = vec![wire::Cursor { chat: "alice:bob".into(), history, seq, ..Default::default() }];
        frame(Command::Sync, &wire::Sync { request: 1, cursors, ..Default::default() })
    };
    let pull = |history, cursor| {
        let pull =
            wire::Pull { request: 2, chat: "alice:bob".into(), history, cursor, limit: 1, reverse: false };
        frame(Command::Pull, &pull)
    };
    let gateway = gateway();
    let told = async |frame: UpFrame| {
        let out = run(&core, &gateway, vec![frame], Place::default()).await;
        let (command, body) = answers(&out)[0];
        if command == Command::SyncAck as u8 {
            wire::SyncAck::decode(body).unwrap().chats.first().map_or(0, |head| head.history)
        } else {
            wire::PullAck::decode(body).unwrap().history
        }
    };
    for harmless in [sync(6, 11), sync(7, 9), pull(7, 10), pull(6, 11), pull(0, 11)] {
        assert_eq!(told(harmless).await, 7);
    }
    assert_eq!(told(sync(7, 11)).await, 8);
    drawn.store(false, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(told(pull(7, 11)).await, 7, "a bucket is redrawn on a client's word once an hour");
    let ask = Op::LoseHistory { bucket: chat_bucket("alice:bob"), history: 7 };
    core.losses.drawn(&core, &ask, &Err(StoreError::Unknown("away".into())));
    assert_eq!(told(pull(7, 11)).await, 8);
    assert_eq!((core.metrics.histories_redrawn.get(), core.metrics.proofs_refused.get()), (2, 1));
}

#[tokio::test]
async fn who_holds_messages_of_a_chat_that_is_gone_is_told_its_new_history() {
    let store = Scripted::new(|op| {
        Ok(match op {
            Op::Routes { .. } => Answer::Routes(vec![route()]),
            // The list went with the rest.
            Op::Chats { .. } => Answer::Chats(Vec::new()),
            Op::Head { .. } => Answer::Head(Head { history: 8, first: 1, ..Head::default() }),
            _ => return Err(StoreError::Corrupt("not asked for here".into())),
        })
    });
    let core = core_over(store);
    core.users.learn("alice", 1);
    let cursors = vec![wire::Cursor { chat: "alice:bob".into(), history: 7, seq: 11, ..Default::default() }];
    let sync = wire::Sync { request: 1, cursors, ..Default::default() };
    let out = run(&core, &gateway(), vec![frame(Command::Sync, &sync)], Place::default()).await;
    let ack = wire::SyncAck::decode(answers(&out)[0].1).unwrap();
    let told: Vec<_> = ack.chats.iter().map(|head| (&*head.chat, head.history, head.head)).collect();
    assert_eq!((told, ack.has_more), (vec![("alice:bob", 8, 0)], false));
}

#[tokio::test]
async fn a_turn_lists_each_group_once_and_few_groups() {
    use crate::group::{Group, Member};
    use crate::store::Roster;
    let store = Scripted::new(|op| {
        Ok(match op {
            Op::Head { .. } => Answer::Head(Head { history: 8, first: 1, ..Head::default() }),
            Op::Members { .. } => {
                let group = Group { version: 1, count: 1, ..Group::default() };
                let member = Member { number: 1, role: wire::Role::Owner, joined: 1, left: 0 };
                Answer::Roster(Roster { group, members: vec![("alice".into(), member)], ..Roster::default() })
            }
            _ => return Err(StoreError::Corrupt("not asked for here".into())),
        })
    });
    let core = core_over(store.clone());
    core.users.learn("alice", 1);
    let of = |group: &u64| {
        let asked = wire::Members { request: 1, chat: format!("#{group}"), ..Default::default() };
        frame(Command::Members, &asked)
    };
    let groups: Vec<u64> = (1..=3).chain(1..=3).chain(4..=6).chain([4]).collect();
    let out = run(&core, &gateway(), groups.iter().map(of).collect(), Place::default()).await;
    let listed = store.asked().iter().filter(|op| matches!(op, Op::Members { .. })).count();
    assert_eq!(listed, GROUPS_LISTED_MAX);
    let told: Vec<&[u8]> = answers(&out)
        .into_iter()
        .filter(|(command, _)| *command == Command::MembersAck as u8)
        .map(|(_, body)| body)
        .collect();
    assert_eq!(told.len(), 8, "all but 5 and 6");
    let acks = told.into_iter().map(|body| wire::MembersAck::decode(body).unwrap());
    assert!(acks.into_iter().all(|ack| ack.history == 8 && ack.members.len() == 1));
    let later = answers(&out).into_iter().filter(|(command, _)| *command == Command::Error as u8);
    let codes: Vec<_> = later.map(|(_, body)| wire::Error::decode(body).unwrap().code()).collect();
    assert_eq!(codes, [Code::Unavailable; 2]);
}

#[tokio::test]
async fn nobody_has_the_members_of_others_groups_read_and_nobody_asks_without_end() {
    use crate::group::Group;
    use crate::store::Standing;
    let store = Scripted::new(|op| {
        let Op::Member { .. } = op else { return Err(StoreError::Corrupt("not asked for here".into())) };
        let group = Group { version: 1, count: 1, ..Group::default() };
        Ok(Answer::Standing(Standing { group, ..Standing::default() }))
    });
    let (core, _accepted) = core_at_rest(store.clone());
    core.users.learn("alice", 1);
    let burst = core.config.limits.user_lists_burst;
    let asked = |request| {
        frame(Command::Members, &wire::Members { request, chat: "#1".into(), ..Default::default() })
    };
    let out = run(&core, &gateway(), (1..=burst + 50).map(asked).collect(), Place::default()).await;
    let codes: Vec<Code> =
        answers(&out).into_iter().map(|(_, body)| wire::Error::decode(body).unwrap().code()).collect();
    let count = |code| codes.iter().filter(|told| **told == code).count() as u32;
    assert_eq!((count(Code::NotAMember), count(Code::RateLimited)), (burst, 50));
    assert!(!store.asked().iter().any(|op| matches!(op, Op::Members { .. })));
}

#[test]
fn many_syncs_of_a_turn_look_at_fewer_chats_each() {
    assert_eq!([1, 8, 16, 100, 1_024].map(|syncs| chats_per_sync(1_000, syncs)), [1_000, 1_000, 500, 80, 64]);
    assert_eq!((chats_per_sync(3, 1_024), chats_per_sync(1_000, 0)), (3, 1_000));
}

#[tokio::test]
async fn whoever_names_too_many_is_told_when_to_come_again_and_the_store_is_not_blamed() {
    let store = Scripted::new(|op| match op {
        Op::Append(append) => stored(n_of(append)),
        Op::Register { candidate, .. } => Ok(Answer::User(Some(*candidate))),
        Op::UserNumbers { .. } => Ok(Answer::UserNumbers(1_000)),
        _ => Ok(Answer::Done),
    });
    let (core, _accepted) = core_at_rest(store.clone());
    core.users.learn("alice", 1);
    let add = |n: u64, first: usize| {
        let member = |at| wire::Member { user: format!("u{at}"), ..Default::default() };
        let members = (first..first + group::CHANGE_MEMBERS_MAX).map(member).collect();
        let action = wire::GroupAction::GroupAdd as i32;
        let body = wire::GroupChange { action, members, ..Default::default() }.encode_to_vec().into();
        let kind = wire::Kind::Group as i32;
        frame(Command::Send, &wire::Send { stream: 9, n, chat: "#7".into(), body, kind })
    };
    let mut lane = Lane::default();
    let changes = core.config.limits.user_named_burst as usize / group::CHANGE_MEMBERS_MAX;
    for at in 0..changes {
        let out = run(&core, &gateway(), vec![add(at as u64 + 1, 500 * at)], lane.next()).await;
        assert_eq!(out.accepted.len(), 1, "change {at}");
    }
    let calls = store.calls();
    let out = run(&core, &gateway(), vec![add(99, 0), send("#7", 100)], lane.next()).await;
    let [(command, body), ..] = answers(&out)[..] else { panic!("an answer") };
    let error = wire::Error::decode(body).unwrap();
    assert_eq!((command, error.code(), error.n), (Command::Error as u8, Code::RateLimited, 99));
    assert!((1..=1_000).contains(&error.retry_after_ms), "{}", error.retry_after_ms);
    assert_eq!(out.accepted.len(), 1, "the step decides of what stands behind it");
    assert_eq!(store.calls(), calls + 1);
    assert!(core.store_answers());
}

/// Whoever ends the connection is told whose it may be: a route may stand there.
#[tokio::test]
async fn a_login_that_the_store_did_not_answer_is_refused_as_one_that_may_be_bound() {
    let store = Scripted::new(|op| match op {
        Op::User { .. } | Op::Register { .. } => Ok(Answer::User(Some(7))),
        Op::UserNumbers { .. } => Ok(Answer::UserNumbers(7)),
        _ => Err(StoreError::Unknown("away".into())),
    });
    let login = wire::Login {
        wire_min: proto::WIRE_VERSION,
        wire_max: proto::WIRE_VERSION,
        user: "alice".into(),
        device: "phone".into(),
        attempt: 5,
        ..Default::default()
    };
    let up = UpFrame { user: 0, device: 0, binding: 33, ..frame(Command::Login, &login) };
    let out = run(&core_over(store), &gateway(), vec![up], Place::default()).await;
    let refused = &out.answers[0];
    let bind = refused.bind.unwrap();
    assert_eq!((refused.connection, refused.login, refused.close), (10, 33, true));
    assert_eq!((bind.user, bind.binding), (7, 5));
    assert_eq!(wire::Error::decode(answers(&out)[0].1).unwrap().code(), Code::Unavailable);
}

/// What nobody waits for is not answered either, unless the connection ends with it.
#[tokio::test]
async fn while_the_store_is_away_only_questions_are_answered() {
    let asked = || {
        vec![
            frame(
                Command::PushAck,
                &wire::PushAck { chat: "alice:bob".into(), seq: 1, ..Default::default() },
            ),
            frame(Command::Read, &wire::Read { chat: "alice:bob".into(), seq: 1, ..Default::default() }),
            frame(Command::Typing, &wire::Typing { chat: "alice:bob".into(), ..Default::default() }),
            frame(Command::Sync, &wire::Sync { request: 7, ..Default::default() }),
        ]
    };
    let away = core_over(Scripted::new(|_| Err(StoreError::Unknown("away".into()))));
    let out = run(&away, &gateway(), asked(), Place::default()).await;
    let told: Vec<_> = answers(&out).iter().map(|(_, body)| wire::Error::decode(*body).unwrap()).collect();
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!((told[0].code(), told[0].request, told[0].closing), (Code::Unavailable, 7, false));
    let forgotten = core_over(Scripted::new(|_| Ok(Answer::Name(None))));
    let out = run(&forgotten, &gateway(), asked(), Place::default()).await;
    let told: Vec<_> = answers(&out).iter().map(|(_, body)| wire::Error::decode(*body).unwrap()).collect();
    // Typing is of a moment, whoever says it.
    assert!(told.len() == 3 && told.iter().all(|error| error.closing), "{told:?}");
}
