//! From accepted messages to pushes: who is addressed, where they are connected, one push per message and gateway. One
//! task for one-to-one chats and one for groups, so that pushes of a chat leave in the order of acceptance as far as one
//! server knows it, and nobody waits behind the thousands of routes of somebody else's group.
//!
//! Trap: routes are read after the append, every time, and never cached: a device that logs in later than that sees the
//! message in its first Sync. A turn reads them right behind its appends, in the same call of the store; what it read is good
//! for its own messages alone, because another turn's may have been stored later.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::{self, Either};
use proto::link::{DownFrame, Push};
use proto::name::Chat;
use proto::wire::{self, Code};
use tokio::sync::mpsc;

use crate::answer;
use crate::gateways::{Outgoing, push_to};
use crate::ledger::Token;
use crate::roster::Readers;
use crate::server::Core;
use crate::store::{Op, Outcome, Route, StoreError, read};
use crate::unplaced::{Pushes, Turn};

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
}

/// Routes that were read in one call of the store with the appends of a turn, behind them.
#[derive(Debug)]
pub struct RoutesBehind {
    /// Of the store when that call was made: in another, a number may be somebody else's.
    pub generation: u64,
    /// By the user's number. Users of whom nothing could be read are not in it.
    pub of: HashMap<u64, Vec<Route>>,
}

/// The connection that sent a message. It is not pushed to: its SendAck stands for the message.
#[derive(Debug, Clone, Copy, Default)]
pub struct From {
    /// Its id; 0: the message did not come over a connection.
    pub connection: u64,
    /// Its device, within the sender.
    pub device: u32,
    /// The attempt that bound it.
    pub binding: u64,
}

impl Accepted {
    /// One that is pushed again.
    pub fn pushed_again(chat: String, history: u64, message: wire::Message) -> Self {
        let from = From::default();
        let (at, held, routes) = (Instant::now(), None, None);
        Accepted { chat, history, message, version: UNKNOWN, again: false, from, at, held, routes }
    }

    /// The routes of a user, if they were read behind this message's append, of a store of this generation.
    fn routes_of(&self, user: u64, generation: u64) -> Option<&Vec<Route>> {
        let routes = self.routes.as_ref().filter(|routes| routes.generation == generation)?;
        routes.of.get(&user)
    }
}

/// A group version that no list is as new as: the list is read again.
pub const UNKNOWN: u64 = u64::MAX;

/// Routes that are read, and connections that are pushed to, at a time: others have their turn in between.
const READERS_AT_ONCE: usize = 512;

/// Parts on their way at a time: one that is placed while the next one travels.
pub const PARTS_MAX: usize = 2;

/// Longest that a part waits for those before it.
const PART_MAX: Duration = Duration::from_millis(100);

/// Messages taken at a time.
const MESSAGES_PER_ROUND: usize = 1024;

/// The same of groups: few, because their readers are read once a round.
const GROUP_MESSAGES_PER_ROUND: usize = 16;

/// Pushes for ever.
pub async fn run(core: Arc<Core>, mut accepted: mpsc::Receiver<Accepted>) {
    let (to_groups, of_groups) = mpsc::channel(core.config.limits.fan_out_max);
    let groups = async {
        let mut of_groups = of_groups;
        let mut taken = Vec::with_capacity(GROUP_MESSAGES_PER_ROUND);
        while of_groups.recv_many(&mut taken, GROUP_MESSAGES_PER_ROUND).await > 0 {
            round(&core, &mut taken).await;
        }
    };
    let pairs = pairs(&core, &mut accepted, to_groups);
    futures_util::future::join(pairs, groups).await;
}

/// One-to-one chats; what is of a group is passed on.
async fn pairs(core: &Core, accepted: &mut mpsc::Receiver<Accepted>, groups: mpsc::Sender<Accepted>) {
    let mut taken = Vec::with_capacity(MESSAGES_PER_ROUND);
    while accepted.recv_many(&mut taken, MESSAGES_PER_ROUND).await > 0 {
        if crpc::failpoint::due("state_after_ack") {
            // Until the acknowledgements have left.
            core.clock.pause(Duration::from_millis(50)).await;
            crpc::failpoint::die();
        }
        for accepted in taken.extract_if(.., |accepted| accepted.version > 0) {
            // It ends behind this.
            let _ = groups.send(accepted).await;
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

/// A resent message is pushed again, because the first pushes may have died with their server; but with the body that was
/// stored, which is the only one of that id.
async fn restore(core: &Core, taken: &mut Vec<Accepted>) {
    let ops: Vec<Op> = taken
        .iter()
        .filter(|accepted| accepted.again)
        .map(|accepted| {
            let cursor = accepted.message.seq - 1;
            Op::Pull { chat: accepted.chat.clone(), cursor, limit: 1, reverse: false }
        })
        .collect();
    let mut stored = insist(core, &ops).await.into_iter();
    taken.retain_mut(|accepted| {
        if !accepted.again {
            return true;
        }
        let page = stored.next().map(read::page).and_then(Result::ok);
        let Some(found) = page.and_then(|page| page.messages.into_iter().next()) else { return false };
        if found.seq != accepted.message.seq {
            return false;
        }
        accepted.message = found.into();
        true
    });
}

/// Sends everything to whoever reads it; with `only`, to connections of these gateways, and what is newer than that.
pub async fn push_all(core: &Core, taken: &[Accepted], only: &BTreeMap<u32, u64>) {
    let chats: Vec<Option<Chat>> = taken.iter().map(|accepted| Chat::parse(&accepted.chat).ok()).collect();
    let names = members(chats.iter().flatten());
    let (generation, numbers, readers, read) = loop {
        let generation = core.generation();
        let numbers = numbers_of(core, &names).await;
        let mut readers = Vec::with_capacity(taken.len());
        let mut unread = BTreeSet::new();
        for (accepted, chat) in taken.iter().zip(&chats) {
            let all = match chat {
                Some(Chat::Group(_)) => {
                    Audience::Group(readers_of(core, accepted, generation).await, accepted.message.seq)
                }
                _ => Audience::Pair(numbers_in(&numbers, chat)),
            };
            let is_unread = |number: &u64| accepted.routes_of(*number, generation).is_none();
            unread.extend(all.numbers().filter(is_unread));
            readers.push(all);
        }
        let read = routes_of(core, unread).await;
        // In another store a number may be somebody else's.
        if core.generation() == generation {
            break (generation, numbers, readers, read);
        }
    };
    let mut per_gateway: BTreeMap<u32, (Vec<Push>, u64)> = BTreeMap::new();
    for (accepted, readers) in taken.iter().zip(&readers) {
        let time_us = accepted.message.time_us;
        let routes = |number: u64| accepted.routes_of(number, generation).or_else(|| read.get(&number));
        let targets = readers
            .numbers()
            .flat_map(|number| {
                routes(number).into_iter().flatten().map(move |route| (route.connection, number))
            })
            .filter(|(connection, _)| *connection != accepted.from.connection);
        let mut by_gateway: BTreeMap<u32, Vec<(u64, u64)>> = BTreeMap::new();
        for (connection, number) in targets {
            let incarnation = proto::incarnation_of(connection);
            if only.is_empty() || only.get(&incarnation).is_some_and(|since_us| time_us > *since_us) {
                by_gateway.entry(incarnation).or_default().push((connection, number));
            }
        }
        let sender = accepted.message.sender.as_str();
        if let Some(number) = numbers.get(sender).copied().or_else(|| core.users.number(sender))
            && let Some(routes) = routes(number)
            && let Some(end) = end_of_ghost(&accepted.from, number, routes)
        {
            tell(core, end);
        }
        if by_gateway.is_empty() {
            continue;
        }
        let frame = answer::push(&accepted.chat, accepted.history, accepted.message.clone());
        for (incarnation, targets) in by_gateway {
            let (pushes, since_us) = per_gateway.entry(incarnation).or_insert((Vec::new(), u64::MAX));
            pushes.extend(targets.chunks(READERS_AT_ONCE).map(|some| push_to(frame.clone(), some)));
            *since_us = time_us.min(*since_us);
        }
    }
    let held = tokens(taken);
    for (incarnation, (pushes, since_us)) in per_gateway {
        let parts = in_parts(pushes);
        let many = parts.len() > 1;
        for pushes in parts {
            let turn = if many { turn(core).await } else { None };
            hand_over(
                core,
                incarnation,
                Pushes { pushes, since_us, held: held.clone(), second: false, turn },
            );
        }
    }
}

/// Waits until few enough parts are on their way, or a gateway has had its time to place them.
async fn turn(core: &Core) -> Option<Turn> {
    let turn = std::pin::pin!(core.parts.clone().acquire_owned());
    match future::select(turn, core.clock.pause(PART_MAX)).await {
        Either::Left((turn, _)) => turn.ok().map(Arc::new),
        Either::Right(_) => None,
    }
}

/// Pushes of at most some connections together, so that what else goes to that gateway comes in between.
fn in_parts(pushes: Vec<Push>) -> Vec<Vec<Push>> {
    let mut parts: Vec<Vec<Push>> = Vec::with_capacity(1);
    let mut connections = usize::MAX;
    for push in pushes {
        connections = connections.saturating_add(push.connections.len());
        match parts.last_mut() {
            Some(part) if connections <= 2 * READERS_AT_ONCE => part.push(push),
            _ => {
                connections = push.connections.len();
                parts.push(vec![push]);
            }
        }
    }
    parts
}

/// Who reads a message of a group: out of a list that is as new as the message.
async fn readers_of(core: &Core, accepted: &Accepted, generation: u64) -> Arc<Readers> {
    if let Some(known) = core.rosters.get(&accepted.chat, accepted.version, generation) {
        return known;
    }
    let outcome = insist(core, &[Op::Members { chat: accepted.chat.clone() }]).await.swap_remove(0);
    let roster = read::roster(outcome).inspect_err(|error| {
        tracing::error!(chat = accepted.chat, %error, "the readers of a group are not to be had");
    });
    let readers = Arc::new(Readers::new(&roster.unwrap_or_default(), generation));
    core.rosters.put(&accepted.chat, readers.clone());
    readers
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

/// A connection that sends though no route leads to it is never pushed anything: another one of its device has taken its
/// place and its Kick was lost, or the route was. The routes were read after its message was stored, and a binding
/// stands before its login is answered; so what is not there is gone.
fn end_of_ghost(from: &From, user: u64, routes: &[Route]) -> Option<DownFrame> {
    if from.connection == 0 || routes.iter().any(|route| route.connection == from.connection) {
        return None;
    }
    let newer = routes.iter().any(|route| route.device == from.device && route.attempt > from.binding);
    Some(if newer {
        answer::kick(from.connection, user, Code::Replaced)
    } else {
        answer::end(from.connection, user)
    })
}

/// Whom a message is for.
enum Audience {
    Pair([Option<u64>; 2]),
    /// Those of the group who may see this seq.
    Group(Arc<Readers>, u64),
}

impl Audience {
    fn numbers(&self) -> impl Iterator<Item = u64> + '_ {
        let (pair, group) = match self {
            Audience::Pair(pair) => (*pair, None),
            Audience::Group(readers, seq) => ([None; 2], Some(readers.of(*seq))),
        };
        pair.into_iter().flatten().chain(group.into_iter().flatten())
    }
}

/// The numbers of a chat's members, as far as they have one.
fn numbers_in(numbers: &HashMap<&str, u64>, chat: &Option<Chat>) -> [Option<u64>; 2] {
    let (low, high) = chat.as_ref().and_then(Chat::pair_members).unzip();
    let high = high.filter(|high| Some(*high) != low);
    [low, high].map(|name| numbers.get(name?).copied())
}

fn members<'a>(chats: impl Iterator<Item = &'a Chat>) -> BTreeSet<&'a str> {
    chats.filter_map(Chat::pair_members).flat_map(|(low, high)| [low, high]).collect()
}

/// Where the members of these chats are connected, by name.
pub async fn routes_of_members<'a>(
    core: &Core,
    chats: impl Iterator<Item = &'a Chat>,
) -> HashMap<&'a str, Vec<Route>> {
    let numbers = numbers_of(core, &members(chats)).await;
    let mut routes = routes_of(core, numbers.values().copied().collect()).await;
    // A number has one name.
    numbers.into_iter().filter_map(|(name, number)| Some((name, routes.remove(&number)?))).collect()
}

async fn numbers_of<'a>(core: &Core, names: &BTreeSet<&'a str>) -> HashMap<&'a str, u64> {
    let mut numbers = HashMap::with_capacity(names.len());
    let mut unknown = Vec::new();
    for name in names {
        match core.users.number(name) {
            Some(number) => drop(numbers.insert(*name, number)),
            None => unknown.push(*name),
        }
    }
    if unknown.is_empty() {
        return numbers;
    }
    let ops: Vec<Op> = unknown.iter().map(|name| Op::User { name: (*name).to_owned() }).collect();
    for (name, outcome) in unknown.into_iter().zip(insist(core, &ops).await) {
        // None: has never logged in. Nobody to push to, and the message waits in the chat.
        if let Ok(Some(number)) = read::user(outcome) {
            numbers.insert(name, number);
            core.users.learn(name, number);
        }
    }
    numbers
}

/// Where these users are connected.
pub async fn routes_of(core: &Core, numbers: BTreeSet<u64>) -> HashMap<u64, Vec<Route>> {
    let ops: Vec<Op> = numbers.iter().map(|user| Op::Routes { user: *user }).collect();
    let mut outcomes = Vec::with_capacity(ops.len());
    for some in ops.chunks(READERS_AT_ONCE) {
        outcomes.extend(insist(core, some).await);
    }
    numbers
        .into_iter()
        .zip(outcomes)
        .filter_map(|(number, outcome)| Some((number, read::routes(outcome).ok()?)))
        .collect()
}

/// Reads, again and again while the store does not answer, for however long: the messages are stored, and while they are held
/// here acknowledgements wait and the mark stands. What the store cannot read is left at that.
async fn insist(core: &Core, ops: &[Op]) -> Vec<Outcome> {
    loop {
        let generation = core.generation();
        let outcomes = core.apply_as(generation, ops).await;
        let is_away = |outcome: &&StoreError| !matches!(outcome, StoreError::Corrupt(_));
        match outcomes.iter().filter_map(|outcome| outcome.as_ref().err()).find(is_away) {
            // Also what was read a moment before the store turned out to be another is read again.
            None if core.generation() == generation => return outcomes,
            None => continue,
            Some(error) => core.store_failed(error),
        }
        core.clock.pause(READ_PAUSE).await;
    }
}

const READ_PAUSE: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_sends_without_a_route_is_ended_in_the_right_way() {
        let from = From { connection: 10, device: 1, binding: 5 };
        let route = |device, attempt, connection| Route { device, attempt, connection };
        let ends =
            |routes: &[Route]| end_of_ghost(&from, 7, routes).map(|frame| (frame.connection, frame.user));
        assert_eq!(ends(&[route(2, 9, 20), route(1, 5, 10)]), None);
        assert_eq!(end_of_ghost(&From::default(), 7, &[]), None, "it came by a call");
        let replaced = end_of_ghost(&from, 7, &[route(1, 6, 11)]).unwrap();
        assert_eq!(replaced, answer::kick(10, 7, Code::Replaced));
        for lost in [&[][..], &[route(2, 9, 20)], &[route(1, 4, 11)]] {
            assert_eq!(ends(lost), Some((10, 7)));
            assert_ne!(end_of_ghost(&from, 7, lost), Some(answer::kick(10, 7, Code::Replaced)));
        }
    }
}
