//! Messages that their user has hidden. Pure.
//!
//! Trap: there is room for so many; the ones heard of longest ago are forgotten first, and shown again when they are pulled.

use std::collections::{HashSet, VecDeque};

/// See the head of this file.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct Hidden {
    /// Chat, history, seq.
    all: HashSet<Id>,
    /// The same, in the order in which they came.
    order: VecDeque<Id>,
}

type Id = (String, u64, u64);

impl Hidden {
    /// False: that is known.
    pub fn insert(&mut self, chat: &str, history: u64, seq: u64) -> bool {
        let id = (chat.to_owned(), history, seq);
        if !self.all.insert(id.clone()) {
            return false;
        }
        self.order.push_back(id);
        if self.order.len() > HIDDEN_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.all.remove(&oldest);
        }
        true
    }

    pub fn holds(&self, chat: &str, history: u64, seq: u64) -> bool {
        // Most users never hide anything.
        !self.all.is_empty() && self.all.contains(&(chat.to_owned(), history, seq))
    }

    /// In the order in which they came.
    pub fn iter(&self) -> impl Iterator<Item = &Id> {
        self.order.iter()
    }
}

/// About 1 MB at the most.
const HIDDEN_MAX: usize = 10_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_makes_room() {
        let mut hidden = Hidden::default();
        assert!(hidden.insert("a:b", 7, 1) && !hidden.insert("a:b", 7, 1));
        assert!(hidden.holds("a:b", 7, 1) && !hidden.holds("a:b", 8, 1) && !hidden.holds("a:c", 7, 1));
        (2..=HIDDEN_MAX as u64).for_each(|seq| assert!(hidden.insert("a:b", 7, seq)));
        assert!(hidden.holds("a:b", 7, 1));
        hidden.insert("#7", 7, 1);
        assert!(!hidden.holds("a:b", 7, 1) && hidden.holds("a:b", 7, 2) && hidden.holds("#7", 7, 1));
        assert_eq!(hidden.iter().count(), HIDDEN_MAX);
    }
}
