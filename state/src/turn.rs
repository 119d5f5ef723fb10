//! One batch of frames from a gateway: decided, put to the store, answered. Runs on the state server's thread; several
//! turns may be under way.
//!
//! At most three store calls, and one on the common path: what must be known first (names, new devices), what must
//! stand first (chat lists), and then everything at once; behind the messages in it, the routes of who reads them.
//!
//! All of them together have [`crate::config::StoreConfig::response_ms_max`]; what is not answered by then is unknown, and
//! the client asks again.
//!
//! Trap: between two store calls anything may have changed. What must not (membership, order, binding) is decided by
//! the store inside one operation, never here from an answer of an earlier call.

mod ask;
mod enrol;
mod grant;
mod learn;
mod ops;

use std::collections::{BTreeSet, VecDeque};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use proto::Command;
use proto::link::{DownFrame, UpFrame};
use proto::name::Chat;
use proto::wire::{self, Code};

use ask::{about, decode, waits_for_answer};
use learn::learn;
use ops::last_ops;

pub use ask::Ask;
pub use grant::Grant;

use crate::answer;
use crate::core::Core;
use crate::delivered::Cursor;
use crate::fan_out::{Accepted, RoutesBehind};
use crate::ghost::{From, end_of_ghost};
use crate::group::{self, Act};
use crate::lane::Place;
use crate::ledger::Token;
use crate::losses;
use crate::presence;
use crate::rate;
use crate::settle;
use crate::store::{Answer, Op, Outcome, StoreError, read};
use crate::users::device_number;
use crate::visible;

/// What a gateway said of itself when it opened the stream.
#[derive(Debug, Clone)]
pub struct Gateway {
    /// Its id.
    pub id: String,
    /// Its life.
    pub incarnation: u32,
    /// Only this machine reaches its listener.
    pub loopback: bool,
    /// For login answers.
    pub heartbeat_ms: u32,
    /// For login answers, and the bound of Sync and Pull answers.
    pub frame_bytes_max: u32,
    /// It lets Read through.
    pub takes_read: bool,
    /// The same of Watch, Typing and Settings.
    pub takes_presence: bool,
}

/// What came of a batch.
#[derive(Debug, Default)]
pub struct Outcomes {
    /// To the gateway that asked.
    pub answers: Vec<DownFrame>,
    /// To whichever gateway holds the connection.
    pub elsewhere: Vec<DownFrame>,
    /// To be pushed.
    pub accepted: Vec<Accepted>,
}

/// A frame with what the store is to do for it: where its operations begin in the last call, and how many.
pub struct Step {
    /// The frame.
    pub frame: UpFrame,
    /// Name of the user behind it; empty for Login and a closed connection.
    pub user_name: String,
    /// What it asks.
    pub ask: Planned,
    /// Its operations in the last call.
    pub ops: std::ops::Range<usize>,
}

/// A frame that needs the store.
#[allow(missing_docs)]
pub enum Planned {
    Login { login: wire::Login, device: u32, number: u64, grant: Grant },
    Send { send: wire::Send, chat: Chat, act: Decided },
    Sync { sync: wire::Sync, chats: Vec<String>, more: bool },
    Pull { pull: wire::Pull, chat: Chat, limit: usize },
    Members { members: wire::Members, chat: Chat },
    Ghost(DownFrame),
    Closed,
}

/// What is to come of a message, as far as it is decided before the store's step.
#[derive(Debug, Clone, PartialEq)]
pub enum Decided {
    /// The step decides, and does this besides.
    Step(Act),
    /// It is refused for ever, and its id used up.
    Refused(Code),
    /// What must stand first does not: it waits for a resend.
    NotNow,
}

/// Does a batch.
pub async fn run(core: &Arc<Core>, gateway: &Gateway, frames: Vec<UpFrame>, mut place: Place) -> Outcomes {
    let began = Instant::now();
    let until = core.clock.now() + Duration::from_millis(core.config.store.response_ms_max);
    let mut out = Outcomes::default();
    // Before anything can be stored.
    let with_sends = frames.iter().any(|frame| frame.command == Command::Send as u32);
    let held = with_sends.then(|| core.ledger.hold());
    let mut asks: Vec<(UpFrame, Ask)> = frames
        .into_iter()
        .filter_map(|frame| match decode(&frame) {
            Ok(ask) => Some((frame, ask)),
            Err(text) => {
                out.answers.push(answer::error(&frame, answer::closing(Code::BadBody, text)));
                None
            }
        })
        .collect();
    let presence_asks = presence::take(&mut asks);
    let asks = rate::let_pass(core, asks, &mut out);
    // What is decided from here on by what is remembered must not reach another store.
    let generation = core.generation();
    let asks = learn(core, gateway, asks, (generation, until), &mut out).await;
    let (steps, mut ops) = plan(core, asks, (generation, until), &mut out).await;
    let asked = ops.len();
    ops.extend(readers(core, &steps).into_iter().map(|user| Op::Routes { user }));
    place.come_up().await;
    if with_sends {
        crpc::failpoint::here("state_before_store");
    }
    let mut outcomes = {
        let mut call = pin!(core.apply_as_until(generation, until, &ops));
        // Asked once polled: the store does calls in the order in which they are asked.
        let polled = futures_util::poll!(call.as_mut());
        drop(place);
        match polled {
            Poll::Ready(outcomes) => outcomes,
            Poll::Pending => call.await,
        }
    };
    if with_sends {
        crpc::failpoint::here("state_after_store");
    }
    let routes = routes_behind(generation, &ops[asked..], outcomes.split_off(asked));
    ops.truncate(asked);
    if let Some(held) = &held {
        note_doubts(core, until, &ops, &outcomes, held);
    }
    losses::prove(core, until, &steps, &ops, &mut outcomes).await;
    visible::read_again(core, until, &steps, &ops, &mut outcomes).await;
    settle::settle(core, gateway, steps, outcomes, &mut out, began);
    for accepted in &mut out.accepted {
        accepted.held.clone_from(&held);
        accepted.routes = Some(routes.clone());
    }
    presence::answer(core, presence_asks, until, &mut out).await;
    core.metrics.acknowledge.observe(began.elapsed().as_secs_f64());
    out
}

/// Who reads the messages of this turn, as far as their numbers are known here: their routes are read in the same call, behind
/// all appends. That saves the fan-out a round trip, and acknowledgement and push leave in one batch.
fn readers(core: &Core, steps: &[Step]) -> BTreeSet<u64> {
    let mut readers = BTreeSet::new();
    for step in steps {
        if let Planned::Send { chat, .. } = &step.ask
            && !step.ops.is_empty()
            && let Some((low, high)) = chat.pair_members()
        {
            readers.extend([low, high].into_iter().filter_map(|name| core.users.number(name)));
        }
    }
    readers
}

fn routes_behind(generation: u64, ops: &[Op], outcomes: Vec<Outcome>) -> Arc<RoutesBehind> {
    let read = ops.iter().zip(outcomes).filter_map(|(op, outcome)| match op {
        // What failed is read again by the fan-out.
        Op::Routes { user } => Some((*user, read::routes(outcome).ok()?)),
        _ => None,
    });
    Arc::new(RoutesBehind { generation, of: read.collect() })
}

/// The messages of this turn of which the store has not said what became of them.
fn note_doubts(core: &Core, until: Instant, ops: &[Op], outcomes: &[Outcome], held: &Token) {
    let began = until - Duration::from_millis(core.config.store.response_ms_max);
    for (op, outcome) in ops.iter().zip(outcomes) {
        if let (Op::Append(append), Err(StoreError::Unknown(_))) = (op, outcome) {
            let of = (append.chat.as_str(), append.sender.as_str(), &append.id);
            core.doubts.note(of, began, core.clock.now(), held);
        }
    }
}

/// Decides what the last store call is to hold, after putting new chats into their members' lists and reading the chat
/// lists of those who sync.
async fn plan(
    core: &Arc<Core>,
    asks: Vec<(UpFrame, Ask)>,
    (generation, until): (u64, Instant),
    out: &mut Outcomes,
) -> (Vec<Step>, Vec<Op>) {
    let mut first = Vec::new();
    let mut pulls = 0;
    let syncs = asks.iter().filter(|(_, ask)| matches!(ask, Ask::Sync(_))).count();
    let chats_max = chats_per_sync(core.config.limits.sync_chats_max, syncs);
    let mut steps = Vec::with_capacity(asks.len());
    for (frame, ask) in asks {
        pulls += usize::from(matches!(ask, Ask::Pull(_)));
        let planned = match ask {
            // Each may bring a whole frame out of the store.
            Ask::Pull(_) if pulls > core.config.limits.pulls_per_turn_max => {
                Err(about(&ask, answer::unavailable(core.config.limits.retry_after_ms)))
            }
            Ask::Closed => Ok(Some((Planned::Closed, String::new()))),
            Ask::Login(login, number, grant) => {
                plan_login(core, login, number, grant).map(|planned| Some((planned, String::new())))
            }
            ask => match core.users.name(frame.user) {
                Some(user_name) => plan_bound(core, &frame, ask, &user_name, (&mut first, chats_max))
                    .map(|p| p.map(|p| (p, user_name))),
                // The store does not answer, or is another since this turn began; or it does not know this user any more: then only a
                // new login helps.
                None => {
                    let closing = core.store_answers() && core.generation() == generation;
                    if closing || waits_for_answer(&ask) {
                        let error = answer::unavailable(core.config.limits.retry_after_ms);
                        Err(wire::Error { closing, ..about(&ask, error) })
                    } else {
                        Ok(None)
                    }
                }
            },
        };
        match planned {
            Ok(Some((ask, user_name))) => steps.push(Step { frame, user_name, ask, ops: 0..0 }),
            Ok(None) => {}
            Err(error) => out.answers.push(answer::error(&frame, error)),
        }
    }
    enrol::enrol(core, &mut steps, (generation, until), out).await;
    prepare(core, &mut steps, (first, chats_max), (generation, until), out).await;
    let ops = last_ops(core, &mut steps, out);
    (steps, ops)
}

/// Chats that are looked at for each Sync of a turn with so many: where they are many, answers are shorter, and clients ask for more.
fn chats_per_sync(sync_chats_max: usize, syncs: usize) -> usize {
    let share = SYNCS_IN_FULL * sync_chats_max / syncs.max(1);
    share.clamp(CHATS_PER_SYNC_MIN.min(sync_chats_max), sync_chats_max)
}

/// Syncs of a turn that may look at as many chats as one may.
const SYNCS_IN_FULL: usize = 8;

/// However many there are, each looks at so many: a client goes on to name no more than that in one Sync.
const CHATS_PER_SYNC_MIN: usize = 64;

fn plan_login(
    core: &Core,
    login: wire::Login,
    number: Option<u64>,
    grant: Grant,
) -> Result<Planned, wire::Error> {
    match number {
        Some(number) => Ok(Planned::Login { device: device_number(&login.device), login, number, grant }),
        // The store did not answer.
        None => Err(wire::Error { closing: true, ..answer::unavailable(core.config.limits.retry_after_ms) }),
    }
}

/// Plans the frame of a bound connection. `None`: nothing more to do for it.
fn plan_bound(
    core: &Core,
    frame: &UpFrame,
    ask: Ask,
    user_name: &str,
    (first, chats_max): (&mut Vec<Op>, usize),
) -> Result<Option<Planned>, wire::Error> {
    match ask {
        Ask::Send(send) => {
            let of_send = |code, text: String| answer::about_send(&send, code, text);
            let chat = Chat::parse(&send.chat).map_err(|e| of_send(Code::BadChat, e.to_string()))?;
            if !(1..=proto::NUMBER_MAX).contains(&send.n) {
                return Err(of_send(Code::BadRequest, "n is 1 to 2^53-1".to_owned()));
            }
            if let Some(members) = chat.pair_members() {
                check_member(members, user_name).map_err(|e| of_send(Code::NotAMember, e.text))?;
                let name = chat.to_string();
                if !core.chat_is_listed(&name) {
                    let users =
                        if members.0 == members.1 { vec![members.0] } else { vec![members.0, members.1] };
                    first.extend(
                        users
                            .into_iter()
                            .map(|user| Op::ListChat { user: user.to_owned(), chat: name.clone() }),
                    );
                }
            }
            let most = core.config.limits.group_members_max;
            let act = group::act_of(send.kind, &send.body, &chat, user_name, most);
            Ok(Some(Planned::Send { send, chat, act: act.map_or_else(Decided::Refused, Decided::Step) }))
        }
        Ask::Sync(sync) => {
            let of_sync =
                |text: &str| wire::Error { request: sync.request, ..answer::because(Code::BadRequest, text) };
            if !sync.until.is_empty() && sync.until <= sync.after {
                return Err(of_sync("until must stand behind after"));
            }
            // What is stored behind this Sync comes by the route, so there must be one. It stood before the login was answered, but a
            // store can lose it.
            first.push(Op::Routes { user: frame.user });
            first.push(Op::Chats {
                user: user_name.to_owned(),
                after: sync.after.clone(),
                until: sync.until.clone(),
                limit: chats_max + 1,
            });
            Ok(Some(Planned::Sync { sync, chats: Vec::new(), more: false }))
        }
        Ask::Pull(pull) => {
            let of_pull =
                |error: wire::Error| wire::Error { request: pull.request, chat: pull.chat.clone(), ..error };
            let chat = Chat::parse(&pull.chat)
                .map_err(|e| of_pull(answer::because(Code::BadChat, e.to_string())))?;
            // Of a group its own rows tell, read behind the messages.
            if let Some(members) = chat.pair_members() {
                check_member(members, user_name).map_err(of_pull)?;
            }
            if pull.limit > proto::PULL_LIMIT_MAX || pull.cursor > proto::NUMBER_MAX {
                return Err(of_pull(answer::because(
                    Code::BadRequest,
                    "limit is at most 100, cursor at most 2^53-1",
                )));
            }
            let limit = if pull.limit == 0 { proto::PULL_LIMIT_MAX } else { pull.limit } as usize;
            Ok(Some(Planned::Pull { pull, chat, limit }))
        }
        Ask::PushAck(wire::PushAck { chat, history, seq }) => {
            let cursor = Cursor { history, seq: seq.min(proto::NUMBER_MAX), read: 0 };
            note_cursor(core, frame.user, &chat, user_name, cursor);
            Ok(None)
        }
        Ask::Read(_) if !core.config.limits.receipts => Ok(None),
        Ask::Read(wire::Read { chat, history, seq }) => {
            let cursor = Cursor { history, seq: 0, read: seq.min(proto::NUMBER_MAX) };
            note_cursor(core, frame.user, &chat, user_name, cursor);
            Ok(None)
        }
        Ask::Members(members) => {
            let refused = |error: wire::Error| wire::Error {
                request: members.request,
                chat: members.chat.clone(),
                ..error
            };
            match Chat::parse(&members.chat) {
                Ok(chat @ Chat::Group(_)) => {
                    let paid = core.listing.as_ref().map(|rate| rate.take(frame.user, 1, core.clock.now()));
                    if let Some(Err(retry_after_ms)) = paid {
                        let text = "this user asks for members faster than is allowed here";
                        let error = answer::because(Code::RateLimited, text);
                        return Err(refused(wire::Error { retry_after_ms, ..error }));
                    }
                    // Before everybody is read.
                    first.push(Op::Member { chat: chat.to_string(), user: user_name.to_owned() });
                    Ok(Some(Planned::Members { members, chat }))
                }
                Ok(_) => Err(refused(answer::because(Code::BadChat, "only groups have members to list"))),
                Err(error) => Err(refused(answer::because(Code::BadChat, error.to_string()))),
            }
        }
        // Some of these are planned elsewhere, others not at all.
        Ask::Login(..) | Ask::Closed | Ask::Watch(_) | Ask::Typing(_) | Ask::Settings(_) => Ok(None),
    }
}

fn note_cursor(core: &Core, user: u64, chat: &str, user_name: &str, cursor: Cursor) {
    // Of a group its own rows tell, read when the cursor is written.
    let may_be_theirs =
        |chat: &Chat| chat.pair_members().is_none_or(|members| check_member(members, user_name).is_ok());
    let chat = Chat::parse(chat).ok().filter(may_be_theirs);
    match chat {
        Some(chat) => core.delivered.note(chat.to_string(), user_name, cursor),
        None => tracing::debug!(user, "a cursor of a chat that is not theirs is ignored"),
    }
}

fn check_member(members: (&str, &str), user_name: &str) -> Result<(), wire::Error> {
    if members.0 == user_name || members.1 == user_name { Ok(()) } else { Err(not_a_member()) }
}

/// Whoever asks is not in it.
pub fn not_a_member() -> wire::Error {
    answer::because(Code::NotAMember, "this chat is not one of yours")
}

/// The store call before the last: chat lists, for new chats and for Syncs; and whether those who ask for the members of a group are in it.
async fn prepare(
    core: &Arc<Core>,
    steps: &mut Vec<Step>,
    (first, chats_max): (Vec<Op>, usize),
    (generation, until): (u64, Instant),
    out: &mut Outcomes,
) {
    if first.is_empty() {
        return;
    }
    let outcomes = core.apply_as_until(generation, until, &first).await;
    let (mut pages, mut routes, mut standings) = (Vec::new(), Vec::new(), VecDeque::new());
    let mut failed: Vec<&str> = Vec::new();
    let mut listed: Vec<&str> = Vec::new();
    for (op, outcome) in first.iter().zip(outcomes) {
        match op {
            Op::Chats { .. } => pages.push(read::chats(outcome)),
            Op::Routes { .. } => routes.push(outcome),
            Op::Member { .. } => standings.push_back(read::standing(outcome)),
            Op::ListChat { chat, .. } => match outcome {
                Ok(_) => listed.push(chat),
                Err(error) => {
                    core.store_failed(&error);
                    failed.push(chat);
                }
            },
            _ => {}
        }
    }
    listed.retain(|chat| !failed.contains(chat));
    if core.generation() == generation {
        core.chats_are_listed(&listed);
    }
    steps.retain(|step| {
        let Planned::Members { members, .. } = &step.ask else { return true };
        // What the store did not say now it does not say in the last call either.
        let Some(Ok(standing)) = standings.pop_front() else { return true };
        let is_in = standing.member.is_some_and(|member| member.is_in(&standing.group));
        if !is_in {
            let about =
                wire::Error { request: members.request, chat: members.chat.clone(), ..not_a_member() };
            out.answers.push(answer::error(&step.frame, about));
        }
        is_in
    });
    let mut read = routes.into_iter().zip(pages);
    for step in steps {
        if let Planned::Sync { sync, chats, more } = &mut step.ask {
            let (routes, page) = read.next().unzip();
            if let Some(Ok(Answer::Routes(routes))) = &routes
                && let Some(end) = end_of_ghost(&From::of(&step.frame), step.frame.user, routes)
            {
                step.ask = Planned::Ghost(end);
                continue;
            }
            match (routes, page) {
                (Some(Ok(_)), Some(Ok(found))) => {
                    *chats = losses::with_held(found, sync, &step.user_name);
                    *more = chats.len() > chats_max;
                    chats.truncate(chats_max);
                }
                // Told apart from "no chats" by the range of operations, which stays empty: see `settle`.
                _ => *more = true,
            }
        }
    }
}

#[cfg(test)]
mod tests;
