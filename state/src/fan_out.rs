//! From accepted messages to pushes: who is addressed, where they are connected, one push per message and gateway. One
//! task for one-to-one chats and some for groups, each chat always in the same, so that pushes of a chat leave in the order of
//! acceptance as far as one server knows it, and nobody waits behind the thousands of readers of somebody else's group.
//!
//! Trap: routes are read after the append, every time, and never cached: a device that logs in later than that sees the
//! message in its first Sync. A turn reads them right behind its appends, in the same call of the store; what it read is good
//! for its own messages alone, because another turn's may have been stored later.

mod lookup;
mod parts;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future;
use proto::link::{DownFrame, Push};
use proto::name::Chat;
use proto::wire;
use tokio::sync::mpsc;

use crate::answer;
use crate::backlog::{self, Lane, Room};
use crate::core::Core;
use crate::gateways::{Outgoing, push_to};
use crate::ghost::{From, end_of_ghost};
use crate::ledger::Token;
use crate::roster::Readers;
use crate::store::{Route, chat_bucket};
use crate::unplaced::Pushes;
pub use lookup::{insist, routes_of, routes_of_members};
use lookup::{members, numbers_of, others_upto, readers_of, restore};
use parts::{Part, Parts};

/// A message that has been stored, on its way to its readers.
#[derive(Debug)]
pub struct Accepted {
    /// The chat.
    pub chat: String,
    /// Its history.
    pub history: u64,
    /// As stored, unless `again`.
    pub message: wire::Message,
    /// Version of its group then; 0: a one-to-one chat.
    pub version: u64,
    /// The id was answered before: what was stored then counts, not the body that came now.
    pub again: bool,
    /// The connection that sent it.
    pub from: From,
    /// When it was accepted.
    pub at: Instant,
    /// Holds this server's mark until it is pushed.
    pub held: Option<Token>,
    /// Routes that were read behind its append.
    pub routes: Option<Arc<RoutesBehind>>,
    /// What it takes of the backlog.
    pub room: Option<Room>,
}

/// Routes that were read in one call of the store with the appends of a turn, behind them.
#[derive(Debug)]
pub struct RoutesBehind {
    /// Of the store when that call was made: in another, a number may be somebody else's.
    pub generation: u64,
    /// By the user's number. Users of whom nothing could be read are not in it.
    pub of: HashMap<u64, Vec<Route>>,
}

impl Accepted {
    /// One that is pushed again.
    pub fn pushed_again(chat: String, history: u64, message: wire::Message) -> Self {
        let from = From::default();
        let (at, held, routes, room) = (Instant::now(), None, None, None);
        Accepted { chat, history, message, version: UNKNOWN, again: false, from, at, held, routes, room }
    }

    /// The routes of a user, if they were read behind this message's append, of a store of this generation.
    fn routes_of(&self, user: u64, generation: u64) -> Option<&Vec<Route>> {
        let routes = self.routes.as_ref().filter(|routes| routes.generation == generation)?;
        routes.of.get(&user)
    }
}

/// A group version that no list is as new as: the list is read again.
pub const UNKNOWN: u64 = u64::MAX;

/// Messages of groups that so many read leave in parts: of so many that are to be written to, those of one worker.
const PARTS_FROM_READERS: usize = 1024;

/// Readers of many whose routes are read at a time: others wait that long for store and server.
const READERS_PER_READING: usize = 64;

/// A thousand acknowledgements a second of one group.
const ACK_MS_PER_READER: u32 = 1;

/// Messages taken at a time.
const MESSAGES_PER_ROUND: usize = 1024;

/// Who is in another lane than a large group does not wait behind its readers.
const GROUP_LANES: usize = 8;

/// Pushes for ever.
pub async fn run(core: Arc<Core>, mut accepted: mpsc::Receiver<Accepted>) {
    let limits = &core.config.limits;
    let lane = |_| Lane::new(limits.fan_out_max / GROUP_LANES, limits.fan_out_bytes_max / GROUP_LANES);
    let (lanes, queues): (Vec<Lane>, Vec<_>) = (0..GROUP_LANES).map(lane).unzip();
    let groups = lanes.iter().zip(queues).map(|(lane, queue)| backlog::run(&core, lane, queue));
    future::join(pairs(&core, &mut accepted, &lanes), future::join_all(groups)).await;
}

/// One-to-one chats; what is of a group is passed on.
async fn pairs(core: &Core, accepted: &mut mpsc::Receiver<Accepted>, lanes: &[Lane]) {
    let mut taken = Vec::with_capacity(MESSAGES_PER_ROUND);
    while accepted.recv_many(&mut taken, MESSAGES_PER_ROUND).await > 0 {
        if crpc::failpoint::due("state_after_ack") {
            // Until the acknowledgements have left.
            core.clock.pause(Duration::from_millis(50)).await;
            crpc::failpoint::die();
        }
        for accepted in taken.extract_if(.., |accepted| accepted.version > 0) {
            lanes[chat_bucket(&accepted.chat) as usize % lanes.len()].put(core, accepted).await;
        }
        round(core, &mut taken).await;
    }
}

/// Pushes these messages.
pub async fn round(core: &Core, taken: &mut Vec<Accepted>) {
    restore(core, taken).await;
    push_all(core, taken, &BTreeMap::new()).await;
    for message in taken.drain(..) {
        core.metrics.deliver.observe(message.at.elapsed().as_secs_f64());
    }
}

/// Sends everything to whoever reads it; with `only`, to connections of these gateways, and what is newer than that.
pub async fn push_all(core: &Core, taken: &[Accepted], only: &BTreeMap<u32, u64>) {
    // In another store a number may be somebody else's; and one that is nobody's any more is looked up anew, once.
    let mut looked_anew = false;
    while !push_from(core, core.generation(), taken, only, &mut looked_anew).await {}
}

/// The same out of a store of this generation. `false`: it is another one now, or a name has another number, and what has left
/// goes once more.
async fn push_from(
    core: &Core,
    generation: u64,
    taken: &[Accepted],
    only: &BTreeMap<u32, u64>,
    looked_anew: &mut bool,
) -> bool {
    let chats: Vec<Option<Chat>> = taken.iter().map(|accepted| Chat::parse(&accepted.chat).ok()).collect();
    let names = members(chats.iter().flatten());
    let numbers = numbers_of(core, &names).await;
    let others = others_upto(core, taken, &chats, *looked_anew).await;
    let mut addressed = Vec::with_capacity(taken.len());
    // A list that was read for one of these is as new as the others of its group: all of them are stored.
    let mut lists: HashMap<&str, Arc<Readers>> = HashMap::new();
    for (accepted, chat) in taken.iter().zip(&chats) {
        let audience = match chat {
            Some(Chat::Group(_)) => {
                let list = match lists.get(accepted.chat.as_str()) {
                    Some(list) => list.clone(),
                    None => readers_of(core, accepted, generation).await,
                };
                if accepted.version == UNKNOWN {
                    lists.insert(&accepted.chat, list.clone());
                }
                Audience::Group(list, accepted.message.seq)
            }
            _ => {
                let seq = accepted.message.seq;
                let is_theirs =
                    |name: &str| others.get(&(accepted.chat.as_str(), name)).is_none_or(|upto| seq > *upto);
                Audience::Pair(numbers_in(&numbers, chat, is_theirs))
            }
        };
        let ack_within_ms = ack_within_ms(audience.among(&ALL).count());
        addressed.push(Addressed { accepted, audience, ack_within_ms, frame: None });
    }
    let mut everybody: Vec<u64> = addressed.iter().flat_map(|one| one.audience.among(&ALL)).collect();
    everybody.sort_unstable();
    everybody.dedup();
    let is_for_many = everybody.len() >= PARTS_FROM_READERS
        && addressed.iter().any(|one| matches!(one.audience, Audience::Group(..)));
    let at_once = if is_for_many { READERS_PER_READING } else { everybody.len().max(1) };
    let held = tokens(taken);
    let mut parts = Parts::default();
    let mut left = everybody.len();
    for some in everybody.chunks(at_once) {
        left -= some.len();
        let some = some[0]..=some[some.len() - 1];
        let mut unread = BTreeSet::new();
        for Addressed { accepted, audience, .. } in &addressed {
            let is_unread = |number: &u64| accepted.routes_of(*number, generation).is_none();
            unread.extend(audience.among(&some).filter(is_unread));
        }
        let asked = unread.clone();
        let read = routes_of(core, unread).await;
        if core.generation() != generation {
            return false;
        }
        // Who has no routes to tell is nobody any more, and the name may be somebody's again.
        let nobodys = |number: &u64| asked.contains(number) && !read.contains_key(number);
        let gone: Vec<_> = numbers.iter().filter(|(_, number)| nobodys(number)).collect();
        gone.iter().for_each(|(name, number)| core.users.forget_user(name, **number));
        if !gone.is_empty() && !std::mem::replace(looked_anew, true) {
            return false;
        }
        for (index, one) in addressed.iter().enumerate() {
            let accepted = one.accepted;
            let routes = |number: u64| accepted.routes_of(number, generation).or_else(|| read.get(&number));
            for (connection, number) in one.targets(&some, routes, only) {
                let worker = if is_for_many { proto::worker_of(connection) } else { 0 };
                let stop = (proto::incarnation_of(connection), worker);
                parts.add(stop, index, connection, number);
            }
            let sender = accepted.message.sender.as_str();
            if let Some(number) = numbers.get(sender).copied().or_else(|| core.users.number(sender))
                && some.contains(&number)
                && let Some(routes) = routes(number)
                && let Some(end) = end_of_ghost(&accepted.from, number, routes)
            {
                tell(core, end);
            }
        }
        while let Some((incarnation, part)) = parts.next(left == 0) {
            let (pushes, since_us) = pushes_of(part, &mut addressed);
            let turn = if is_for_many { core.pace.turn().await } else { None };
            hand_over(
                core,
                incarnation,
                Pushes { pushes, since_us, held: held.clone(), second: false, turn },
            );
        }
    }
    core.generation() == generation
}

/// A message and whom it is for.
struct Addressed<'a> {
    accepted: &'a Accepted,
    audience: Audience,
    ack_within_ms: u32,
    /// One for all, made for the first of them.
    frame: Option<Bytes>,
}

/// Over how long so many readers acknowledge a message. All at once made others' p99 three to four times as long (row A9).
fn ack_within_ms(readers: usize) -> u32 {
    if readers < PARTS_FROM_READERS { 0 } else { readers as u32 * ACK_MS_PER_READER }
}

impl Addressed<'_> {
    /// Connection and user of some of its readers.
    fn targets<'a>(
        &self,
        some: &RangeInclusive<u64>,
        routes: impl Fn(u64) -> Option<&'a Vec<Route>>,
        only: &BTreeMap<u32, u64>,
    ) -> impl Iterator<Item = (u64, u64)> {
        let Accepted { message, from, .. } = self.accepted;
        let all = self.audience.among(some).flat_map(move |number| {
            routes(number).into_iter().flatten().map(move |route| (route.connection, number))
        });
        all.filter(move |(connection, _)| {
            let since = only.get(&proto::incarnation_of(*connection));
            let is_missing = since.is_some_and(|since_us| message.time_us > *since_us);
            *connection != from.connection && (only.is_empty() || is_missing)
        })
    }

    fn frame(&mut self) -> Bytes {
        let Accepted { chat, history, message, .. } = self.accepted;
        let make = || answer::push(chat, *history, message.clone(), self.ack_within_ms);
        self.frame.get_or_insert_with(make).clone()
    }
}

/// A push for each message, and the store time of the oldest.
fn pushes_of(part: Part, addressed: &mut [Addressed<'_>]) -> (Vec<Push>, u64) {
    let mut since_us = u64::MAX;
    let mut push = |(one, targets): (&mut Addressed<'_>, Vec<(u64, u64)>)| {
        since_us = one.accepted.message.time_us.min(since_us);
        push_to(one.frame(), &targets, one.ack_within_ms > 0)
    };
    let all = addressed.iter_mut().zip(part.targets).filter(|(_, targets)| !targets.is_empty());
    (all.map(&mut push).collect(), since_us)
}

/// What holds the mark for these: few, because those of one turn share theirs.
fn tokens(taken: &[Accepted]) -> Arc<[Token]> {
    let mut tokens: Vec<Token> = Vec::new();
    for token in taken.iter().filter_map(|accepted| accepted.held.as_ref()) {
        if tokens.last().is_none_or(|last| !Arc::ptr_eq(last, token)) {
            tokens.push(token.clone());
        }
    }
    tokens.into()
}

/// Hands pushes to their gateway's stream, or notes that it misses them.
pub fn hand_over(core: &Core, incarnation: u32, pushes: Pushes) {
    let count = pushes.pushes.iter().map(|push| push.connections.len() as u64).sum();
    match core.gateways.try_send(incarnation, Outgoing::Pushes(pushes)) {
        Ok(()) => drop(core.metrics.pushes.inc_by(count)),
        Err(Outgoing::Pushes(pushes)) => {
            core.metrics.pushes_dropped.inc_by(count);
            if !crpc::failpoint::switch("recency_off") {
                core.gateways.missed().note(incarnation, pushes.since_us, &pushes.held);
            }
        }
        Err(_) => {}
    }
}

/// Tells a connection wherever it is, now or when its gateway has a stream here.
pub fn tell(core: &Core, frame: DownFrame) {
    let incarnation = proto::incarnation_of(frame.connection);
    let outgoing = Outgoing::Answers { frames: vec![frame], acked: 0 };
    if let Err(Outgoing::Answers { frames, .. }) = core.gateways.try_send(incarnation, outgoing) {
        tracing::debug!(incarnation, "a connection that is to end cannot be told yet");
        frames.into_iter().for_each(|frame| core.gateways.missed().owe_kick(incarnation, frame));
    }
}

/// Whom a message is for.
enum Audience {
    Pair([Option<u64>; 2]),
    /// Those of the group who may see this seq.
    Group(Arc<Readers>, u64),
}

impl Audience {
    /// Those of these numbers.
    fn among(&self, some: &RangeInclusive<u64>) -> impl Iterator<Item = u64> + '_ {
        let (pair, group) = match self {
            Audience::Pair(pair) => (*pair, None),
            Audience::Group(readers, seq) => ([None; 2], Some(readers.of(*seq, some))),
        };
        let some = some.clone();
        let pair = pair.into_iter().flatten().filter(move |number| some.contains(number));
        pair.chain(group.into_iter().flatten())
    }
}

/// Every number.
const ALL: RangeInclusive<u64> = 0..=u64::MAX;

/// The numbers of a chat's members, as far as they have one and it is theirs.
fn numbers_in(
    numbers: &HashMap<&str, u64>,
    chat: &Option<Chat>,
    is_theirs: impl Fn(&str) -> bool,
) -> [Option<u64>; 2] {
    let (low, high) = chat.as_ref().and_then(Chat::pair_members).unzip();
    let high = high.filter(|high| Some(*high) != low);
    [low, high].map(|name| numbers.get(name.filter(|name| is_theirs(name))?).copied())
}

#[cfg(test)]
mod tests;
