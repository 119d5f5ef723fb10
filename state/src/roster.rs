//! Who reads a group, as the fan-out needs it: numbers and what they may see, kept from the last reading. On the state
//! server's thread, behind a lock of its own.
//!
//! Trap: a list is good for a message whose group version is not above the list's, and only in the store that it was read
//! from. Whoever has left is still in it, with the last seq that was theirs; so an older message finds its readers too.

use std::num::NonZeroUsize;
use std::ops::RangeInclusive;
use std::sync::Arc;

use lru::LruCache;
use parking_lot::Mutex;

use crate::store::Roster;

/// The readers of a group.
#[derive(Debug, PartialEq, Eq)]
pub struct Readers {
    generation: u64,
    version: u64,
    /// Number of the user, first and last seq that they may see; by number.
    members: Vec<(u64, u64, u64)>,
}

impl Readers {
    /// Out of a store of this generation.
    pub fn new(roster: &Roster, generation: u64) -> Self {
        let sees = |(_, member): &(String, crate::group::Member)| {
            let (first, last) = member.sees(&roster.group);
            (member.number, first, last)
        };
        let mut members: Vec<_> = roster.members.iter().map(sees).collect();
        members.sort_unstable();
        Readers { generation, version: roster.group.version, members }
    }

    /// Those of these numbers who may see this message.
    pub fn of(&self, seq: u64, some: &RangeInclusive<u64>) -> impl Iterator<Item = u64> + '_ {
        let begin = self.members.partition_point(|(number, ..)| number < some.start());
        let end = self.members.partition_point(|(number, ..)| number <= some.end());
        let sees = move |(_, first, last): &&(u64, u64, u64)| (*first..=*last).contains(&seq);
        self.members[begin..end.max(begin)].iter().filter(sees).map(|(number, ..)| *number)
    }

    /// Numbers of those who are in it.
    pub fn now(&self) -> impl Iterator<Item = u64> + '_ {
        self.members.iter().filter(|member| is_in(member)).map(|(number, ..)| *number)
    }

    /// Whether this user is in it.
    pub fn holds(&self, number: u64) -> bool {
        self.find(number).is_some_and(is_in)
    }

    /// Whether this user is or was in it.
    pub fn knows(&self, number: u64) -> bool {
        self.find(number).is_some()
    }

    /// Whether nothing has changed up to this version of the group.
    pub fn is_as_new_as(&self, version: u64) -> bool {
        self.version >= version
    }

    fn find(&self, number: u64) -> Option<&(u64, u64, u64)> {
        let at = self.members.binary_search_by_key(&number, |member| member.0).ok()?;
        self.members.get(at)
    }
}

/// Whoever may see whatever comes.
fn is_in((_, _, last): &(u64, u64, u64)) -> bool {
    *last == u64::MAX
}

/// Lists read lately.
#[derive(Debug)]
pub struct Rosters {
    kept: Mutex<Kept>,
    members_max: usize,
}

#[derive(Debug)]
struct Kept {
    lists: LruCache<String, Arc<Readers>>,
    members: usize,
}

impl Rosters {
    /// Keeps lists of so many members in all, and always the last one.
    pub fn new(members_max: usize) -> Self {
        let lists = LruCache::new(NonZeroUsize::MAX.min(LISTS_MAX));
        Rosters { kept: Mutex::new(Kept { lists, members: 0 }), members_max }
    }

    /// A list that is good for a message of this group version.
    pub fn get(&self, chat: &str, version: u64, generation: u64) -> Option<Arc<Readers>> {
        let mut kept = self.kept.lock();
        let found = kept.lists.get(chat)?;
        (found.generation == generation && found.is_as_new_as(version)).then(|| found.clone())
    }

    /// Keeps a list.
    pub fn put(&self, chat: &str, readers: Arc<Readers>) {
        let mut kept = self.kept.lock();
        kept.members += readers.members.len();
        if let Some((_, out)) = kept.lists.push(chat.to_owned(), readers) {
            kept.members -= out.members.len();
        }
        while kept.members > self.members_max && kept.lists.len() > 1 {
            if let Some((_, out)) = kept.lists.pop_lru() {
                kept.members -= out.members.len();
            }
        }
    }
}

const LISTS_MAX: NonZeroUsize = match NonZeroUsize::new(4_096) {
    Some(lists) => lists,
    None => NonZeroUsize::MIN,
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::group::{Group, Member};
    use proto::wire::Role;

    fn readers(version: u64, members: u64) -> Arc<Readers> {
        let member = |number| {
            let left = if number == 0 { 5 } else { 0 };
            (format!("u{number}"), Member { number, role: Role::Member, joined: 3, left })
        };
        let group = Group { version, ..Group::default() };
        Arc::new(Readers::new(
            &Roster { group, members: (0..members).map(member).collect(), cursors: Vec::new() },
            1,
        ))
    }

    #[test]
    fn a_list_finds_the_readers_of_messages_up_to_its_version() {
        let list = readers(9, 3);
        let of = |seq| list.of(seq, &(0..=u64::MAX)).collect::<Vec<_>>();
        assert_eq!((of(2), of(3), of(5), of(6)), (vec![], vec![0, 1, 2], vec![0, 1, 2], vec![1, 2]));
        let some = |some| list.of(5, &some).collect::<Vec<_>>();
        assert_eq!((some(0..=1), some(1..=9), some(3..=9)), (vec![0, 1], vec![1, 2], vec![]));
        assert_eq!(list.now().collect::<Vec<_>>(), [1, 2]);
        let known = |number| (list.knows(number), list.holds(number));
        assert_eq!((known(0), known(1), known(9)), ((true, false), (true, true), (false, false)));
    }

    #[test]
    fn lists_are_kept_while_they_are_good_and_there_is_room() {
        let rosters = Rosters::new(10);
        rosters.put("#1", readers(9, 6));
        assert!(rosters.get("#1", 9, 1).is_some());
        assert!(rosters.get("#1", 10, 1).is_none() && rosters.get("#1", 9, 2).is_none());
        rosters.put("#1", readers(10, 7));
        rosters.put("#2", readers(1, 3));
        assert!(rosters.get("#1", 10, 1).is_some(), "the list before it is not counted any more");
        rosters.put("#3", readers(1, 20));
        assert!(rosters.get("#1", 1, 1).is_none() && rosters.get("#2", 1, 1).is_none());
        assert!(rosters.get("#3", 1, 1).is_some(), "the last one is kept, however large");
    }
}
