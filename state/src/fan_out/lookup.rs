//! What the fan-out must know and asks the store for: what was stored, who reads it, and where they are connected.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use proto::name::Chat;

use super::{Accepted, UNKNOWN};
use crate::core::Core;
use crate::roster::Readers;
use crate::store::{Op, Outcome, Route, StoreError, read};

/// Routes that are read at a time: others have their turn in between.
const ROUTES_AT_ONCE: usize = 512;

/// Before a store that did not answer is asked again.
const READ_PAUSE: Duration = Duration::from_millis(100);

/// A resent message is pushed again, because the first pushes may have died with their server; but with the body that was
/// stored, which is the only one of that id, and under the history that is in force.
pub(super) async fn restore(core: &Core, taken: &mut Vec<Accepted>) {
    let ops: Vec<Op> = taken
        .iter()
        .filter(|accepted| accepted.again)
        .map(|accepted| {
            let cursor = accepted.message.seq - 1;
            let (chat, reader) = (accepted.chat.clone(), String::new());
            Op::Pull { chat, reader, cursor, limit: 1, reverse: false }
        })
        .collect();
    let mut stored = insist(core, &ops).await.into_iter();
    taken.retain_mut(|accepted| {
        if !accepted.again {
            return true;
        }
        let page = stored.next().map(read::page).and_then(Result::ok);
        let found = page.and_then(|page| Some((page.history, page.messages.into_iter().next()?)));
        let Some((history, found)) = found else { return false };
        if found.seq != accepted.message.seq {
            return false;
        }
        accepted.message = found.into();
        // Its answer tells the history of its time.
        accepted.history = history;
        true
    });
}

/// Who reads a message of a group: out of a list that is as new as the message.
pub(super) async fn readers_of(core: &Core, accepted: &Accepted, generation: u64) -> Arc<Readers> {
    if let Some(known) = core.rosters.get(&accepted.chat, accepted.version, generation) {
        return known;
    }
    let outcome =
        insist(core, &[Op::Members { chat: accepted.chat.clone(), cursors: false }]).await.swap_remove(0);
    let roster = read::roster(outcome).inspect_err(|error| {
        tracing::error!(chat = accepted.chat, %error, "the readers of a group are not to be had");
    });
    let readers = Arc::new(Readers::new(&roster.unwrap_or_default(), generation));
    core.rosters.put(&accepted.chat, readers.clone());
    readers
}

/// Up to where one-to-one chats were others', who bore the names before, by chat and name. Asked for messages that may be old, and
/// when a name turned out to have another number: whoever bears it now gets nothing from before.
pub(super) async fn others_upto<'a>(
    core: &Core,
    taken: &'a [Accepted],
    chats: &'a [Option<Chat>],
    looked_anew: bool,
) -> HashMap<(&'a str, &'a str), u64> {
    let is_old = |accepted: &Accepted| looked_anew || accepted.again || accepted.version == UNKNOWN;
    let mut names = BTreeSet::new();
    for (accepted, chat) in taken.iter().zip(chats).filter(|(accepted, _)| is_old(accepted)) {
        if let Some((low, high)) = chat.as_ref().and_then(Chat::pair_members) {
            names.extend([(accepted.chat.as_str(), low), (accepted.chat.as_str(), high)]);
        }
    }
    let head = |(chat, user): &(&str, &str)| Op::Head { chat: (*chat).to_owned(), user: (*user).to_owned() };
    let ops: Vec<Op> = names.iter().map(head).collect();
    // What cannot be read is nobody's to be told; they find it by a Sync, if it is theirs.
    let upto = |outcome| read::head(outcome).map_or(u64::MAX, |head| head.since);
    names.into_iter().zip(insist(core, &ops).await.into_iter().map(upto)).collect()
}

pub(super) fn members<'a>(chats: impl Iterator<Item = &'a Chat>) -> BTreeSet<&'a str> {
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

pub(super) async fn numbers_of<'a>(core: &Core, names: &BTreeSet<&'a str>) -> HashMap<&'a str, u64> {
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
    for some in ops.chunks(ROUTES_AT_ONCE) {
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
pub async fn insist(core: &Core, ops: &[Op]) -> Vec<Outcome> {
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
