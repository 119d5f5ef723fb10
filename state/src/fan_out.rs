//! From accepted messages to pushes: who is addressed, where they are connected, one push per message and gateway. One
//! task, so that pushes of a chat leave in the order of acceptance as far as one server knows it.
//!
//! Trap: routes are read after the append, every time, and never cached: a device that logs in later than that sees the
//! message in its first Sync.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::link::Push;
use proto::name::Chat;
use proto::wire;
use tokio::sync::mpsc;

use crate::answer;
use crate::gateways::{Outgoing, push_to};
use crate::server::Core;
use crate::store::{Op, Outcome, Route, read};

/// A message that has been stored, on its way to its readers.
#[derive(Debug)]
pub struct Accepted {
    /// The chat.
    pub chat: String,
    /// Its history.
    pub history: u64,
    /// As stored, unless `again`.
    pub message: wire::Message,
    /// The id was answered before: what was stored then counts, not the body that came now.
    pub again: bool,
    /// The sender's connection, which is not pushed to: its SendAck stands for the message.
    pub from: u64,
    /// When it was accepted.
    pub at: Instant,
}

/// Messages taken at a time.
const MESSAGES_PER_ROUND: usize = 1024;

/// Pushes for ever.
pub async fn run(core: Arc<Core>, mut accepted: mpsc::Receiver<Accepted>) {
    let mut round = Vec::with_capacity(MESSAGES_PER_ROUND);
    let mut owed = Owed::default();
    loop {
        tokio::select! {
            taken = accepted.recv_many(&mut round, MESSAGES_PER_ROUND) => if taken == 0 { return },
            () = tokio::time::sleep(OWED_PAUSE), if !owed.is_empty() => {}
        }
        owed.try_again(&core);
        restore(&core, &mut round).await;
        push_all(&core, &round, &mut owed).await;
        for message in round.drain(..) {
            core.metrics.deliver.observe(message.at.elapsed().as_secs_f64());
        }
    }
}

/// A resent message is pushed again, because the first pushes may have died with their server; but with the body that was
/// stored, which is the only one of that id.
async fn restore(core: &Core, round: &mut Vec<Accepted>) {
    let ops: Vec<Op> = round
        .iter()
        .filter(|accepted| accepted.again)
        .map(|accepted| {
            let cursor = accepted.message.seq - 1;
            Op::Pull { chat: accepted.chat.clone(), cursor, limit: 1, reverse: false }
        })
        .collect();
    let mut stored = core.apply(&ops).await.into_iter();
    round.retain_mut(|accepted| {
        if !accepted.again {
            return true;
        }
        let page = stored.next().map(read::page).and_then(Result::ok);
        let Some(found) = page.and_then(|page| page.messages.into_iter().next()) else { return false };
        if found.seq != accepted.message.seq {
            return false;
        }
        let body = found.body;
        accepted.message =
            wire::Message { seq: found.seq, sender: found.sender, time_us: found.time_us, body };
        true
    });
}

async fn push_all(core: &Core, round: &[Accepted], owed: &mut Owed) {
    let chats: Vec<Option<Chat>> = round.iter().map(|accepted| Chat::parse(&accepted.chat).ok()).collect();
    let names: BTreeSet<&str> =
        chats.iter().flatten().filter_map(Chat::pair_members).flat_map(|(low, high)| [low, high]).collect();
    let numbers = numbers_of(core, &names).await;
    let routes = routes_of(core, numbers.values().copied().collect()).await;
    let mut per_gateway: BTreeMap<u32, Vec<Push>> = BTreeMap::new();
    for (accepted, chat) in round.iter().zip(&chats) {
        let Some((low, high)) = chat.as_ref().and_then(Chat::pair_members) else { continue };
        let members = if low == high { vec![low] } else { vec![low, high] };
        let targets = members
            .iter()
            .filter_map(|name| numbers.get(name))
            .flat_map(|number| {
                routes.get(number).into_iter().flatten().map(move |route| (route.connection, *number))
            })
            .filter(|(connection, _)| *connection != accepted.from);
        let mut by_gateway: BTreeMap<u32, Vec<(u64, u64)>> = BTreeMap::new();
        for (connection, number) in targets {
            by_gateway.entry(proto::incarnation_of(connection)).or_default().push((connection, number));
        }
        if by_gateway.is_empty() {
            continue;
        }
        let frame = answer::push(&accepted.chat, accepted.history, accepted.message.clone());
        for (incarnation, targets) in by_gateway {
            per_gateway.entry(incarnation).or_default().push(push_to(frame.clone(), &targets));
        }
    }
    for (incarnation, pushes) in per_gateway {
        let count = targets(&pushes);
        match core.gateways.try_send(incarnation, Outgoing::Pushes(pushes)) {
            Ok(()) => drop(core.metrics.pushes.inc_by(count)),
            Err(Outgoing::Pushes(pushes)) => owed.keep(core, incarnation, pushes),
            Err(_) => {}
        }
    }
}

fn targets(pushes: &[Push]) -> u64 {
    pushes.iter().map(|push| push.connections.len() as u64).sum()
}

/// Pushes whose gateway has no stream here just now: it may be opening one to this server, which has just started.
#[derive(Default)]
struct Owed {
    waiting: VecDeque<(Instant, u32, Vec<Push>)>,
}

/// How long a push may be owed, how often it is tried, and how many batches of them are kept.
const OWED_MAX: Duration = Duration::from_secs(3);
const OWED_PAUSE: Duration = Duration::from_millis(50);
const OWED_BATCHES_MAX: usize = 1024;

impl Owed {
    fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    fn keep(&mut self, core: &Core, incarnation: u32, pushes: Vec<Push>) {
        if self.waiting.len() >= OWED_BATCHES_MAX {
            core.metrics.pushes_dropped.inc_by(targets(&pushes));
        } else {
            self.waiting.push_back((Instant::now(), incarnation, pushes));
        }
    }

    fn try_again(&mut self, core: &Core) {
        for _ in 0..self.waiting.len() {
            let Some((since, incarnation, pushes)) = self.waiting.pop_front() else { return };
            let count = targets(&pushes);
            match core.gateways.try_send(incarnation, Outgoing::Pushes(pushes)) {
                Ok(()) => drop(core.metrics.pushes.inc_by(count)),
                Err(Outgoing::Pushes(pushes)) if since.elapsed() < OWED_MAX => {
                    self.waiting.push_back((since, incarnation, pushes));
                }
                Err(_) => drop(core.metrics.pushes_dropped.inc_by(count)),
            }
        }
    }
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

async fn routes_of(core: &Core, numbers: BTreeSet<u64>) -> HashMap<u64, Vec<Route>> {
    let ops: Vec<Op> = numbers.iter().map(|user| Op::Routes { user: *user }).collect();
    let outcomes = insist(core, &ops).await;
    numbers
        .into_iter()
        .zip(outcomes)
        .filter_map(|(number, outcome)| Some((number, read::routes(outcome).ok()?)))
        .collect()
}

/// Reads, again and again while the store fails: the messages are stored, and nobody else will push them.
async fn insist(core: &Core, ops: &[Op]) -> Vec<Outcome> {
    for _ in 0..READS_MAX {
        let outcomes = core.apply(ops).await;
        match outcomes.iter().find_map(|outcome| outcome.as_ref().err()) {
            None => return outcomes,
            Some(error) => core.store_failed(error),
        }
        tokio::time::sleep(READ_PAUSE).await;
    }
    core.apply(ops).await
}

/// Some seconds, in which a store comes back or is gone for long.
const READS_MAX: u32 = 50;
const READ_PAUSE: Duration = Duration::from_millis(100);
