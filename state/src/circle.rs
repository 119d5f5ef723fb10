//! Cursors in groups: whether whoever moves one is or was in the group, and which others are to be told of it. On the state
//! server's thread, before each write of cursors.
//!
//! A group is known by the list that the fan-out remembers (`roster`), read anew when the group has changed since. Of a group that
//! is too large for its members to be told only the one user is looked up.
//!
//! Trap: what is found here is as of a moment before the write. So the group's version is read once more behind the cursors, in
//! the same call, and when it has changed the others are not told: somebody may have left. Little is lost by that, because
//! what changed the group is a message, which all of them acknowledge too.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::core::Core;
use crate::roster::Readers;
use crate::store::{Op, Standing, StoreError, read};

/// Somebody who is or was in a group.
#[derive(Debug, Clone)]
pub struct Place {
    /// Their number.
    pub number: u64,
    /// Those who are to be told, themselves among them. `None`: nobody is.
    pub circle: Option<Arc<Readers>>,
}

/// What is known of a group.
struct Known {
    /// Its members are told of each other's cursors.
    is_told: bool,
    list: Option<Arc<Readers>>,
}

/// The places of users in groups, of each (chat, user) in its turn; `None`: never was in it.
pub async fn places(
    core: &Core,
    generation: u64,
    of: &[(&str, &str)],
) -> Result<Vec<Option<Place>>, StoreError> {
    let member =
        |(chat, user): &(&str, &str)| Op::Member { chat: (*chat).to_owned(), user: (*user).to_owned() };
    // One user of each group, for the group's sake.
    let firsts: BTreeMap<&str, (&str, &str)> = of.iter().rev().map(|entry| (entry.0, *entry)).collect();
    let ops: Vec<Op> = firsts.values().map(member).collect();
    let mut groups: BTreeMap<&str, Known> = BTreeMap::new();
    let mut numbers: HashMap<(&str, &str), Option<u64>> = HashMap::new();
    for ((chat, first), outcome) in firsts.into_iter().zip(core.apply_as(generation, &ops).await) {
        let Standing { group, member, .. } = read::standing(outcome)?;
        let limits = &core.config.limits;
        let fits = group.version > 0 && group.is_small(limits.receipt_members_max as u64);
        let is_told = limits.receipts && fits;
        let list = core.rosters.get(chat, group.version, generation);
        groups.insert(chat, Known { is_told, list });
        numbers.insert(first, member.map(|member| member.number));
    }

    let unread = groups.iter().filter(|(_, known)| known.is_told && known.list.is_none());
    let unread: Vec<&str> = unread.map(|(chat, _)| *chat).collect();
    let mut ops: Vec<Op> =
        unread.iter().map(|chat| Op::Members { chat: (*chat).to_owned(), cursors: false }).collect();
    // Who is not to be found in a list.
    let is_unknown = |entry: &&(&str, &str)| {
        let listed = groups.get(entry.0).is_some_and(|known| known.is_told || known.list.is_some());
        !numbers.contains_key(*entry) && (!listed || core.users.number(entry.1).is_none())
    };
    let unknown: Vec<(&str, &str)> = of.iter().filter(is_unknown).copied().collect();
    ops.extend(unknown.iter().map(member));
    let mut outcomes = core.apply_as(generation, &ops).await.into_iter();
    for (chat, outcome) in unread.into_iter().zip(outcomes.by_ref()) {
        let list = Arc::new(Readers::new(&read::roster(outcome)?, generation));
        core.rosters.put(chat, list.clone());
        groups.entry(chat).and_modify(|known| known.list = Some(list));
    }
    for (entry, outcome) in unknown.into_iter().zip(outcomes) {
        numbers.insert(entry, read::standing(outcome)?.member.map(|member| member.number));
    }

    let place = |entry: &(&str, &str)| {
        let known = groups.get(entry.0)?;
        let number = match numbers.get(entry) {
            Some(number) => (*number)?,
            None => core
                .users
                .number(entry.1)
                .filter(|number| known.list.as_ref().is_some_and(|list| list.knows(*number)))?,
        };
        let circle = known.list.clone().filter(|list| known.is_told && list.holds(number));
        Some(Place { number, circle })
    };
    Ok(of.iter().map(place).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::TokioClock;
    use crate::config::Config;
    use crate::group::{Act, Change, Named};
    use crate::store::{Append, Appended, MessageId};
    use crate::store_memory::MemoryStore;
    use proto::wire::{GroupAction, Kind, Role};

    async fn say(core: &Core, chat: &str, sender: &str, action: GroupAction, users: &[(&str, u64)]) {
        let name = |(at, (user, number)): (usize, &(&str, u64))| {
            let role = if at == 0 && action == GroupAction::GroupCreate { Role::Owner } else { Role::Member };
            Named { user: (*user).to_owned(), number: *number, role }
        };
        let named = users.iter().enumerate().map(name).collect();
        let change = Change { action, title: "t".to_owned(), named, members_max: 99 };
        let append = Append {
            chat: chat.to_owned(),
            sender: sender.to_owned(),
            id: MessageId::Unnamed,
            kind: Kind::Group,
            act: Act::Change(change),
            ..Append::default()
        };
        let answer = read::appended(core.apply(&[Op::Append(append)]).await.remove(0)).unwrap();
        assert!(matches!(answer, Appended::Stored { .. }), "{answer:?}");
    }

    #[tokio::test]
    async fn who_is_in_a_small_group_is_told_and_who_never_was_is_nobody() {
        let mut config = Config::default();
        config.limits.receipt_members_max = 3;
        let store = Box::new(MemoryStore::default());
        let (core, _accepted) = Core::for_simulation(config, store, Box::new(TokioClock), 1);
        for (name, number) in [("ann", 1), ("bob", 2), ("cy", 3)] {
            core.users.learn(name, number);
        }
        say(&core, "#7", "ann", GroupAction::GroupCreate, &[("ann", 1), ("bob", 2), ("cy", 3), ("dan", 4)])
            .await;
        let of = [("#7", "ann"), ("#7", "dan"), ("#7", "eve"), ("#8", "ann"), ("#8", "bob")];
        let told = async || {
            let places = places(&core, core.generation(), &of).await.unwrap();
            let told = |place: Place| (place.number, place.circle.map(|list| list.now().collect::<Vec<_>>()));
            places.into_iter().map(|place| place.map(told)).collect::<Vec<_>>()
        };
        assert_eq!(told().await, [Some((1, None)), Some((4, None)), None, None, None], "too many to be told");
        say(&core, "#7", "bob", GroupAction::GroupLeave, &[]).await;
        let all = Some(vec![1, 3, 4]);
        assert_eq!(told().await, [Some((1, all.clone())), Some((4, all)), None, None, None]);
        say(&core, "#7", "ann", GroupAction::GroupRemove, &[("dan", 4)]).await;
        let all = Some(vec![1, 3]);
        assert_eq!(told().await, [Some((1, all)), Some((4, None)), None, None, None], "dan has left");
        assert!(core.rosters.get("#8", 0, core.generation()).is_none(), "no group, no list");
    }
}
