//! From accepted messages to pushes: who is addressed, where they are connected, one push per message and gateway. One
//! task, so that pushes of a chat leave in the order of acceptance as far as one server knows it.
//!
//! Trap: routes are read after the append, every time, and never cached: a device that logs in later than that sees the
//! message in its first Sync.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Instant;

use proto::link::Push;
use proto::name::Chat;
use proto::wire;
use tokio::sync::mpsc;

use crate::answer;
use crate::gateways::{Outgoing, push_to};
use crate::server::Core;
use crate::store::{Op, Route, read};

/// A message that has been stored, on its way to its readers.
#[derive(Debug)]
pub struct Accepted {
    /// The chat.
    pub chat: String,
    /// Its history.
    pub history: u64,
    /// As stored.
    pub message: wire::Message,
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
    while accepted.recv_many(&mut round, MESSAGES_PER_ROUND).await > 0 {
        push_all(&core, &round).await;
        for message in round.drain(..) {
            core.metrics.deliver.observe(message.at.elapsed().as_secs_f64());
        }
    }
}

async fn push_all(core: &Core, round: &[Accepted]) {
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
        let count = pushes.iter().map(|push| push.connections.len() as u64).sum();
        if core.gateways.try_send(incarnation, Outgoing::Pushes(pushes)) {
            core.metrics.pushes.inc_by(count);
        } else {
            core.metrics.pushes_dropped.inc_by(count);
        }
    }
}

async fn numbers_of<'a>(core: &Core, names: &BTreeSet<&'a str>) -> HashMap<&'a str, u64> {
    let mut numbers = HashMap::with_capacity(names.len());
    let mut unknown = Vec::new();
    for name in names {
        match core.users.row(name) {
            Some(row) => drop(numbers.insert(*name, row.number)),
            None => unknown.push(*name),
        }
    }
    if unknown.is_empty() {
        return numbers;
    }
    let ops: Vec<Op> = unknown.iter().map(|name| Op::User { name: (*name).to_owned() }).collect();
    for (name, outcome) in unknown.into_iter().zip(core.apply(&ops).await) {
        match read::user(outcome) {
            Ok(Some(row)) => {
                numbers.insert(name, row.number);
                core.users.learn(name, row);
            }
            // Has never logged in: nobody to push to, and the message waits in the chat.
            Ok(None) => {}
            Err(error) => core.store_failed(&error),
        }
    }
    numbers
}

async fn routes_of(core: &Core, numbers: BTreeSet<u64>) -> HashMap<u64, Vec<Route>> {
    let ops: Vec<Op> = numbers.iter().map(|user| Op::Routes { user: *user }).collect();
    let outcomes = core.apply(&ops).await;
    let mut routes = HashMap::with_capacity(numbers.len());
    for (number, outcome) in numbers.into_iter().zip(outcomes) {
        match read::routes(outcome) {
            Ok(found) => drop(routes.insert(number, found)),
            Err(error) => core.store_failed(&error),
        }
    }
    routes
}
