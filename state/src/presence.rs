//! Who wants to know whether whom is there, and who is told that somebody writes. On the state server's thread.
//!
//! A Watch lives in the memory of the state server that its connection talks to, and nowhere else: the client renews it, and names its
//! users again where nobody knows it. Whoever logs in or leaves is noted by number; a tick later the store is asked where the watched
//! ones among them are, and what differs from what was told last is pushed. The numbers also go to the other state servers, which do the
//! same (`presence/run.rs`).
//!
//! Trap: nothing rests on presence, so nothing waits for it and nothing makes good for what is lost but the next renewal of all names. A
//! storm of logins must cost no more than a number in a set, and not even that while nobody watches anybody.

mod run;
mod watches;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures_util::{future, poll};
use lru::LruCache;
use parking_lot::Mutex;
use proto::link::UpFrame;
use proto::name::{self, Chat};
use proto::wire::{self, Code};
use proto::{Command, frame};

pub use run::{heard, retired, run};
use watches::{Full, There, Watches};

use crate::answer;
use crate::config::Limits;
use crate::core::Core;
use crate::store::{Answer, Hides, Op, Outcome, Route, Seen, StoreError, read};
use crate::turn::{Ask, Outcomes};

/// See the head of this file.
#[derive(Debug)]
pub struct Presence {
    /// Nobody here or elsewhere wants to know anything.
    is_quiet: AtomicBool,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    watches: Watches,
    /// Users of whom something may have changed since the last tick, as seen here and by another state server.
    changed: BTreeSet<u64>,
    heard: BTreeSet<u64>,
    /// So many did that it is easier to look at everybody.
    all_changed: bool,
    /// Everybody who is watched is looked at again at that time: a gateway has come or gone.
    look_at: Option<Instant>,
    /// When what each connection asked, and what it said of its writing, is paid for.
    asked: LruCache<u64, Instant>,
    wrote: LruCache<u64, Instant>,
}

/// A connection may ask so often on average, and so many times at once.
const ASKS: (Duration, u32) = (Duration::from_secs(1), 5);
/// The same of Typing. Clients say it every 3 s, in each chat, and when they stop.
const NOTES: (Duration, u32) = (Duration::from_secs(1), 10);
/// Connections whose pace is remembered; who was forgotten is served.
const PACES_MAX: usize = 16_384;
/// Users noted between two ticks; beyond it everybody who is watched is looked at.
const CHANGED_MAX: usize = 65_536;
/// A gateway that has gone may be back by then.
const GATEWAY_AWAY: Duration = Duration::from_secs(5);

impl Presence {
    /// Nobody watches anybody.
    pub fn new(limits: &Limits) -> Self {
        let room = NonZeroUsize::new(PACES_MAX).unwrap_or(NonZeroUsize::MIN);
        let inner = Inner {
            watches: Watches::new(
                limits.watches_max,
                2 * Duration::from_millis(limits.presence_renew_ms.into()),
            ),
            changed: BTreeSet::new(),
            heard: BTreeSet::new(),
            all_changed: false,
            look_at: None,
            asked: LruCache::new(room),
            wrote: LruCache::new(room),
        };
        Presence { is_quiet: AtomicBool::new(true), inner: Mutex::new(inner) }
    }

    /// This user has logged in somewhere, or has left, or hides something now.
    pub fn changed(&self, user: u64) {
        if !self.is_quiet.load(Ordering::Relaxed) {
            self.inner.lock().note(user);
        }
    }

    /// A connection has closed.
    pub fn closed(&self, connection: u64, user: u64) {
        if !self.is_quiet.load(Ordering::Relaxed) {
            let mut inner = self.inner.lock();
            inner.watches.end(connection);
            inner.note(user);
        }
    }

    /// A gateway has a stream here, or has not any more: the routes to it count, or do not. What was on its way to those who watch from
    /// there may be lost with the stream, so they are told again.
    pub fn gateway_changed(&self, incarnation: u32, now: Instant) {
        let mut inner = self.inner.lock();
        inner.watches.lost(|connection| proto::incarnation_of(connection) == incarnation);
        inner.look_at = inner.look_at.or(Some(now + GATEWAY_AWAY));
    }
}

impl Inner {
    fn note(&mut self, user: u64) {
        if self.changed.len() < CHANGED_MAX {
            self.changed.insert(user);
        } else {
            self.all_changed = true;
        }
    }
}

/// One more at this pace (GCRA, as in `rate.rs`). `Err`: not now, but in that time.
fn pay(
    paid: &mut LruCache<u64, Instant>,
    key: u64,
    pace: (Duration, u32),
    now: Instant,
) -> Result<(), Duration> {
    let (interval, burst) = pace;
    let until = paid.get(&key).map_or(now, |until| now.max(*until));
    let ahead = until - now;
    let most = interval * (burst - 1);
    if ahead > most {
        return Err(ahead - most);
    }
    paid.put(key, until + interval);
    Ok(())
}

/// Takes out of a turn what is of presence.
pub fn take(asks: &mut Vec<(UpFrame, Ask)>) -> Vec<(UpFrame, Ask)> {
    let is_ours = |ask: &Ask| matches!(ask, Ask::Watch(_) | Ask::Typing(_) | Ask::Settings(_));
    if asks.iter().any(|(_, ask)| is_ours(ask)) {
        asks.extract_if(.., |(_, ask)| is_ours(ask)).collect()
    } else {
        Vec::new()
    }
}

/// Answers that, by then. What nobody waits for is begun here and goes on in a task of its own: the acknowledgements of the turn do
/// not wait for it.
pub async fn answer(core: &Arc<Core>, asks: Vec<(UpFrame, Ask)>, until: Instant, out: &mut Outcomes) {
    let mut by_connection: BTreeMap<u64, Vec<(UpFrame, Ask)>> = BTreeMap::new();
    for (frame, ask) in asks {
        by_connection.entry(frame.connection).or_default().push((frame, ask));
    }
    // Side by side: one behind the other, a gateway's restart would hold up the acknowledgements of this turn by all its Watches.
    let answers = by_connection.into_values().map(async |asks| {
        let mut answers = Vec::new();
        for (frame, ask) in asks {
            match ask {
                Ask::Watch(watch) => answers.push(match watched(core, &frame, &watch, until).await {
                    Ok(presence) => answer::reply(&frame, Command::Presence, &presence),
                    Err(error) => answer::error(&frame, wire::Error { request: watch.request, ..error }),
                }),
                Ask::Settings(settings) => answers.push(match set(core, &frame, &settings, until).await {
                    Ok(ack) => answer::reply(&frame, Command::SettingsAck, &ack),
                    Err(error) => answer::error(&frame, wire::Error { request: settings.request, ..error }),
                }),
                Ask::Typing(typing) => {
                    let mut note = Box::pin(note_typing(core.clone(), frame, typing, until));
                    if poll!(note.as_mut()).is_pending() {
                        tokio::spawn(note);
                    }
                }
                _ => {}
            }
        }
        answers
    });
    out.answers.extend(future::join_all(answers).await.into_iter().flatten());
}

async fn watched(
    core: &Core,
    frame: &UpFrame,
    watch: &wire::Watch,
    until: Instant,
) -> Result<wire::Presence, wire::Error> {
    let limits = &core.config.limits;
    let now = core.clock.now();
    let request = watch.request;
    if !limits.presence {
        return Err(answer::because(Code::BadRequest, "presence is off here"));
    }
    if watch.renew {
        let known = core.presence.inner.lock().watches.renew(frame.connection, now);
        let renew_ms = if known { limits.presence_renew_ms } else { 0 };
        return Ok(wire::Presence { request, renew_ms, unknown: !known, users: Vec::new() });
    }
    may_ask(core, frame, now)?;
    let names: BTreeSet<&str> = watch.users.iter().map(|watched| watched.user.as_str()).collect();
    if names.len() > limits.watched_users_max {
        let text = format!("at most {} users are watched", limits.watched_users_max);
        return Err(answer::because(Code::BadRequest, text));
    }
    if let Some(error) = names.iter().find_map(|name| name::check(name).err()) {
        return Err(answer::because(Code::BadRequest, error.to_string()));
    }
    let numbers = numbers(core, &names, until).await?;
    {
        let mut inner = core.presence.inner.lock();
        // Before they are read: what changes in between is noted.
        inner.watches.set(frame.connection, frame.user, &numbers, now).map_err(|Full| {
            let retry_after_ms = limits.presence_renew_ms;
            wire::Error { retry_after_ms, ..answer::because(Code::RateLimited, "too much is watched here") }
        })?;
        core.presence.is_quiet.store(false, Ordering::Relaxed);
    }
    let there = look(core, numbers.iter().filter_map(|(_, number)| *number).collect(), until).await;
    let there = there.map_err(|error| not_now(core, &error))?;
    let mut inner = core.presence.inner.lock();
    let users = numbers.into_iter().map(|(name, number)| {
        let there = number.and_then(|number| {
            let there = there.get(&number).copied();
            if let Some(there) = there
                && inner.watches.told_first(number, there)
            {
                inner.note(number);
            }
            there
        });
        there.unwrap_or_default().seen(name)
    });
    let users: Vec<wire::Seen> = users.collect();
    let renew_ms = if users.is_empty() { 0 } else { limits.presence_renew_ms };
    Ok(wire::Presence { request, users, renew_ms, unknown: false })
}

fn may_ask(core: &Core, frame: &UpFrame, now: Instant) -> Result<(), wire::Error> {
    let paid = pay(&mut core.presence.inner.lock().asked, frame.connection, ASKS, now);
    paid.map_err(|wait| wire::Error {
        retry_after_ms: u32::try_from(wait.as_millis() + 1).unwrap_or(u32::MAX),
        ..answer::because(Code::RateLimited, "this connection asks faster than once a second")
    })
}

fn not_now(core: &Core, error: &StoreError) -> wire::Error {
    core.store_failed(error);
    answer::unavailable(core.config.limits.retry_after_ms)
}

/// Their numbers, as far as they have one.
async fn numbers(
    core: &Core,
    names: &BTreeSet<&str>,
    until: Instant,
) -> Result<Vec<(String, Option<u64>)>, wire::Error> {
    let mut numbers: Vec<(String, Option<u64>)> =
        names.iter().map(|name| ((*name).to_owned(), core.users.number(name))).collect();
    let unknown = || numbers.iter().filter(|(_, number)| number.is_none());
    let ops: Vec<Op> = unknown().map(|(name, _)| Op::User { name: name.clone() }).collect();
    let found = core.apply_until(until, &ops).await;
    let unknown = numbers.iter_mut().filter(|(_, number)| number.is_none());
    for ((_, number), outcome) in unknown.zip(found) {
        *number = read::user(outcome).map_err(|error| not_now(core, &error))?;
    }
    Ok(numbers)
}

/// Whether these users are there.
async fn look(core: &Core, users: BTreeSet<u64>, until: Instant) -> Result<HashMap<u64, There>, StoreError> {
    let ops: Vec<Op> =
        users.iter().flat_map(|user| [Op::Routes { user: *user }, Op::Seen { user: *user }]).collect();
    let mut outcomes = core.apply_until(until, &ops).await.into_iter();
    let mut found = HashMap::with_capacity(users.len());
    let mut next = || outcomes.next().unwrap_or(Err(StoreError::Corrupt("an answer is missing".to_owned())));
    let mut gone = Vec::new();
    for user in users {
        let routes = match next() {
            // The connections of a user who is deleted are ended.
            Ok(Answer::Retired(_)) => {
                gone.push(user);
                Vec::new()
            }
            outcome => read::routes(outcome)?,
        };
        let seen = read::seen(next())?;
        found.insert(user, There::of(&routes, seen, |connection| is_reached(core, connection)));
    }
    for user in gone {
        // As if this server had been told of it, as it should have been.
        core.users.name(user).into_iter().for_each(|name| core.users.forget_user(&name, user));
        retired(core, user);
    }
    Ok(found)
}

/// A gateway that died leaves routes behind that lead nowhere.
fn is_reached(core: &Core, connection: u64) -> bool {
    core.gateways.is_open(proto::incarnation_of(connection))
}

async fn set(
    core: &Core,
    frame: &UpFrame,
    settings: &wire::Settings,
    until: Instant,
) -> Result<wire::SettingsAck, wire::Error> {
    may_ask(core, frame, core.clock.now())?;
    let user = frame.user;
    let hides = Hides { presence: settings.hide_presence, typing: settings.hide_typing };
    let mut ops = vec![Op::Seen { user }];
    if settings.change {
        ops.insert(0, Op::Hide { user, hides });
    }
    let mut outcomes = core.apply_until(until, &ops).await;
    let seen = outcomes.pop().map_or(Ok(Seen::default()), read::seen);
    let changed = outcomes.pop().map_or(Ok(()), |outcome| outcome.map(drop));
    let hides = changed.and(seen).map_err(|error| not_now(core, &error))?.hides;
    if settings.change {
        core.presence.changed(user);
    }
    Ok(wire::SettingsAck {
        request: settings.request,
        hide_presence: hides.presence,
        hide_typing: hides.typing,
    })
}

/// Tells the others in the chat, if there are not too many. What is wrong with it is passed over: nobody waits for an answer.
async fn note_typing(core: Arc<Core>, frame: UpFrame, typing: wire::Typing, until: Instant) {
    let core = &*core;
    let limits = &core.config.limits;
    let may_note = || {
        let mut inner = core.presence.inner.lock();
        pay(&mut inner.wrote, frame.connection, NOTES, core.clock.now()).is_ok()
    };
    let Ok(chat) = Chat::parse(&typing.chat) else { return };
    if !limits.presence || !may_note() {
        return;
    }
    let generation = core.generation();
    let Some(name) = name_of(core, frame.user, until).await else { return };
    let readers = match chat.pair_members() {
        Some((low, high)) if (low == name) != (high == name) => {
            let peer = BTreeSet::from([if low == name { high } else { low }]);
            let numbers = numbers(core, &peer, until).await.unwrap_or_default();
            numbers.into_iter().filter_map(|(_, number)| number).collect()
        }
        Some(_) => return,
        None => group_readers(core, &chat.to_string(), &name, until).await,
    };
    let mut ops: Vec<Op> = readers.iter().map(|user| Op::Routes { user: *user }).collect();
    ops.push(Op::Seen { user: frame.user });
    let mut outcomes = core.apply_as_until(generation, until, &ops).await;
    let Some(seen) = outcomes.pop().map(read::seen).and_then(Result::ok) else { return };
    if seen.hides.typing {
        core.metrics.typing_notes_hidden.inc();
        return;
    }
    let chat = chat.to_string();
    let note =
        frame::encode(Command::TypingNote, &wire::TypingNote { chat, user: name, stopped: typing.stopped });
    let routes = routes_of(readers.into_iter(), outcomes);
    core.metrics.typing_notes.inc_by(core.gateways.hint([(note, routes)]).pushed);
}

async fn name_of(core: &Core, user: u64, until: Instant) -> Option<String> {
    if let Some(name) = core.users.name(user) {
        return Some(name);
    }
    let found = core.apply_until(until, &[Op::Name { user }]).await.pop().map(read::name)?.ok()??;
    core.users.learn_name(user, &found);
    Some(found)
}

/// Everybody else who is in the group, when the user is and they are few. Read anew: whoever was taken out must hear nothing.
async fn group_readers(core: &Core, chat: &str, name: &str, until: Instant) -> Vec<u64> {
    let member = Op::Member { chat: chat.to_owned(), user: name.to_owned() };
    let standing = core.apply_until(until, &[member]).await.pop().map(read::standing);
    let Some(Ok(standing)) = standing else { return Vec::new() };
    let is_in = standing.member.is_some_and(|member| member.is_in(&standing.group));
    if !is_in || !standing.group.is_small(core.config.limits.typing_members_max) {
        return Vec::new();
    }
    let roster = core
        .apply_until(until, &[Op::Members { chat: chat.to_owned(), cursors: false }])
        .await
        .pop()
        .map(read::roster);
    let Some(Ok(roster)) = roster else { return Vec::new() };
    let others = roster.members.iter().filter(|(user, member)| user != name && member.is_in(&roster.group));
    others.map(|(_, member)| member.number).collect()
}

/// Connections with their users, out of the answers of `Routes`.
fn routes_of(users: impl Iterator<Item = u64>, outcomes: Vec<Outcome>) -> Vec<(u64, u64)> {
    let read = |(user, outcome)| Some((user, read::routes(outcome).ok()?));
    let on_each =
        |(user, routes): (u64, Vec<Route>)| routes.into_iter().map(move |route| (route.connection, user));
    users.zip(outcomes).filter_map(read).flat_map(on_each).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pace_lets_some_through_at_once_and_then_one_at_a_time() {
        let mut paid = LruCache::new(NonZeroUsize::MIN);
        let now = Instant::now();
        let pace = (Duration::from_secs(1), 3);
        let served = (0..5).filter(|_| pay(&mut paid, 7, pace, now).is_ok()).count();
        assert_eq!(served, 3);
        assert_eq!(pay(&mut paid, 7, pace, now), Err(Duration::from_secs(1)));
        assert_eq!(pay(&mut paid, 7, pace, now + Duration::from_secs(1)), Ok(()));
        assert_eq!(pay(&mut paid, 8, pace, now), Ok(()), "and each on its own");
    }
}
