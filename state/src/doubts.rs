//! Messages that the store may have taken, or may still take, without this server knowing: it did not answer in time. The
//! sender is told to send again, and whoever does gets the message pushed; who never comes back leaves it stored and pushed
//! to nobody. So the chat is looked at again a few times. Shared by all tasks of the state server's thread; pure but for the
//! lock.
//!
//! Trap: after a store that was away everything on its way is in doubt, and nearly all of it is sent again at once. So what is
//! answered is forgotten before the first look.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::ledger::Token;
use crate::store::MessageId;

/// See the head of this file.
#[derive(Debug, Default)]
pub struct Doubts {
    doubts: Mutex<BTreeMap<Id, Doubt>>,
}

/// Chat, sender, and which of his messages. Those without a name share a doubt.
type Id = (String, String, MessageId);

#[derive(Debug)]
struct Doubt {
    /// Before the store was asked first.
    began: Instant,
    due: Instant,
    looks: usize,
    /// Holds the mark: should this server die, others push what is newer.
    _held: Token,
}

/// Before the first look, and between the others. A call that was given up may reach the store seconds later.
const PAUSES: [Duration; 5] = [
    Duration::from_secs(2),
    Duration::from_secs(2),
    Duration::from_secs(2),
    Duration::from_secs(2),
    Duration::from_secs(8),
];

/// Messages; others wait for their sender.
const DOUBTS_MAX: usize = 16_384;

impl Doubts {
    /// The store was asked after `began` to append this, and has not answered by now.
    pub fn note(&self, of: (&str, &str, &MessageId), began: Instant, now: Instant, held: &Token) {
        let mut doubts = self.doubts.lock();
        let is_full = doubts.len() >= DOUBTS_MAX;
        let id = owned(of);
        let due = now + PAUSES[0];
        match doubts.get_mut(&id) {
            // Sent again, in vain again.
            Some(doubt) => (doubt.due, doubt.looks) = (due, 0),
            None if is_full => {}
            None => drop(doubts.insert(id, Doubt { began, due, looks: 0, _held: held.clone() })),
        }
    }

    /// It has been sent again and is stored. What has no name is never sent again.
    pub fn settled(&self, of: (&str, &str, &MessageId)) {
        let mut doubts = self.doubts.lock();
        if !doubts.is_empty() && *of.2 != MessageId::Unnamed {
            doubts.remove(&owned(of));
        }
    }

    /// The chats that are to be looked at, and since when: now and then, then never again.
    pub fn due(&self, now: Instant) -> BTreeMap<String, Instant> {
        let mut chats: BTreeMap<String, Instant> = BTreeMap::new();
        self.doubts.lock().retain(|(chat, ..), doubt| {
            if now < doubt.due {
                return true;
            }
            let since = chats.entry(chat.clone()).or_insert(doubt.began);
            *since = doubt.began.min(*since);
            doubt.looks += 1;
            let next = PAUSES.get(doubt.looks);
            next.inspect(|pause| doubt.due = now + **pause).is_some()
        });
        chats
    }
}

fn owned((chat, sender, id): (&str, &str, &MessageId)) -> Id {
    (chat.to_owned(), sender.to_owned(), id.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::Ledger;

    fn id(n: u64) -> MessageId {
        MessageId::Numbered { stream: 9, n }
    }

    #[test]
    fn a_chat_is_looked_at_a_few_times_unless_the_message_is_sent_again() {
        let (doubts, ledger, start) = (Doubts::default(), Ledger::default(), Instant::now());
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let token = ledger.hold();
        doubts.note(("a:b", "a", &id(1)), start, at(2), &token);
        doubts.note(("a:b", "a", &id(2)), at(1), at(3), &token);
        doubts.note(("a:c", "a", &id(1)), at(1), at(2), &token);
        drop(token);
        doubts.settled(("a:c", "a", &id(1)));
        assert!(doubts.due(at(3)).is_empty());
        let mut looks = Vec::new();
        for second in 4..60 {
            let due = doubts.due(at(second));
            if let Some(since) = due.get("a:b") {
                looks.push((second, since.duration_since(start).as_secs()));
            }
            assert!(!due.contains_key("a:c"));
        }
        let of_first = [4, 6, 8, 10, 18].map(|second| (second, 0));
        let of_second = [5, 7, 9, 11, 19].map(|second| (second, 1));
        let mut wanted: Vec<(u64, u64)> = of_first.into_iter().chain(of_second).collect();
        wanted.sort();
        assert_eq!(looks, wanted);
        assert!(ledger.is_clear());
    }

    #[test]
    fn names_are_of_their_sender_and_what_has_none_stays_in_doubt() {
        let (doubts, ledger, start) = (Doubts::default(), Ledger::default(), Instant::now());
        let token = ledger.hold();
        let named = MessageId::Named("x".into());
        doubts.note(("a:b", "a", &named), start, start, &token);
        doubts.note(("a:b", "a", &MessageId::Unnamed), start, start, &token);
        doubts.settled(("a:b", "b", &named));
        doubts.settled(("a:b", "a", &MessageId::Unnamed));
        assert_eq!(doubts.doubts.lock().len(), 2);
        doubts.settled(("a:b", "a", &named));
        assert_eq!(doubts.doubts.lock().len(), 1);
    }

    #[test]
    fn what_is_in_doubt_is_bounded_and_a_vain_resend_begins_anew_from_the_first_time() {
        let (doubts, ledger, start) = (Doubts::default(), Ledger::default(), Instant::now());
        let token = ledger.hold();
        for n in 0..2 * DOUBTS_MAX as u64 {
            doubts.note(("a:b", "a", &id(n)), start, start, &token);
        }
        assert_eq!(doubts.doubts.lock().len(), DOUBTS_MAX);
        let later = start + Duration::from_secs(1);
        doubts.note(("a:b", "a", &id(0)), later, later, &token);
        assert_eq!(doubts.due(start + PAUSES[0]).len(), 1);
        assert_eq!(doubts.due(later + PAUSES[0])["a:b"], start);
    }
}
