//! Receipts: how far a user has a chat, told to the devices of the other one, or of all others in a group that is not too large;
//! and to the user's own, so that all of them know what is read. Behind each write of cursors; on the state server's thread.
//!
//! Trap: routes are read behind the cursors, in the same call of the store: a device that logs in later sees them in its first
//! Sync. Nothing is repeated, and nothing waits: a Receipt that is lost is made good by the next one or by a Sync.

use std::collections::{BTreeSet, HashMap};

use crate::answer;
use crate::circle::Place;
use crate::core::Core;
use crate::store::{Moved, Op, Outcome, Route, peer, read};

/// Cursors of a user in a chat that are being written.
#[derive(Debug, Clone)]
pub struct Written<'a> {
    /// The chat.
    pub chat: &'a str,
    /// Whose.
    pub user: &'a str,
    /// What they count in; 0: not known.
    pub history: u64,
    /// Whether read is among them.
    pub with_read: bool,
    /// In a group: theirs.
    pub place: Option<Place>,
}

/// Who is to be told, with the numbers by which routes are kept. Asked before the write.
#[derive(Debug, Default)]
pub struct Readers {
    /// Of one-to-one chats.
    numbers: HashMap<String, u64>,
    users: BTreeSet<u64>,
}

impl Written<'_> {
    /// The names of those who are told of it; of a group the numbers are known.
    fn readers(&self) -> impl Iterator<Item = &str> {
        let own = (self.with_read && self.place.is_none()).then_some(self.user);
        peer(self.chat, self.user).into_iter().chain(own)
    }

    /// The numbers of those in a group who are told of it.
    fn members(&self) -> impl Iterator<Item = u64> {
        self.place.iter().flat_map(|place| {
            let own = self.with_read.then_some(place.number);
            let others = place.circle.iter().flat_map(|circle| circle.now());
            others.filter(|number| *number != place.number).chain(own)
        })
    }
}

impl Readers {
    /// Of these cursors. None when receipts are off.
    pub async fn of(core: &Core, generation: u64, written: &[Written<'_>]) -> Readers {
        let mut readers = Readers::default();
        if !core.config.limits.receipts {
            return readers;
        }
        let mut unknown = BTreeSet::new();
        for name in written.iter().flat_map(Written::readers) {
            match core.users.number(name) {
                Some(number) => readers.learn(name, number),
                None => drop(unknown.insert(name)),
            }
        }
        if !unknown.is_empty() {
            let ops: Vec<Op> = unknown.iter().map(|name| Op::User { name: (*name).to_owned() }).collect();
            let found = core.apply_as(generation, &ops).await;
            for (name, outcome) in unknown.into_iter().zip(found) {
                // Others have never logged in, or are told another time.
                if let Ok(Some(number)) = read::user(outcome) {
                    core.users.learn(name, number);
                    readers.learn(name, number);
                }
            }
        }
        readers.users.extend(written.iter().flat_map(Written::members));
        readers
    }

    fn learn(&mut self, name: &str, number: u64) {
        if !self.numbers.contains_key(name) {
            self.numbers.insert(name.to_owned(), number);
            self.users.insert(number);
        }
    }

    /// What reads their routes, behind the cursors of the same call.
    pub fn ops(&self) -> impl Iterator<Item = Op> {
        self.users.iter().map(|user| Op::Routes { user: *user })
    }

    /// Tells of what is new, by what `ops` brought.
    pub fn tell(&self, core: &Core, routes: Vec<Outcome>, moved: &[(Written<'_>, Moved)]) {
        let routes: HashMap<u64, Vec<Route>> = self
            .users
            .iter()
            .zip(routes)
            .filter_map(|(user, outcome)| Some((*user, read::routes(outcome).ok()?)))
            .collect();
        // Nobody's any more: the next receipt goes to whoever has the name by then.
        let gone = self.numbers.iter().filter(|(_, number)| !routes.contains_key(number));
        gone.for_each(|(name, number)| core.users.forget_user(name, *number));
        let news = moved.iter().filter(|(_, moved)| *moved != Moved::default());
        let frames = news.filter_map(|(written, moved)| {
            let names = written.readers().filter_map(|name| self.numbers.get(name).copied());
            let of =
                |user| routes.get(&user).into_iter().flatten().map(move |route| (route.connection, user));
            // What is no news is told to those alone who said it: they say it again until they hear of it.
            let own = written.place.as_ref().map(|place| place.number);
            let own = own.or_else(|| self.numbers.get(written.user).copied());
            let is_told = |user: &u64| moved.is_news || own == Some(*user);
            let targets: Vec<(u64, u64)> =
                names.chain(written.members()).filter(is_told).flat_map(of).collect();
            let frame = || answer::receipt(written.chat, written.history, written.user, *moved);
            (!targets.is_empty()).then(|| (frame(), targets))
        });
        core.metrics.receipts.inc_by(core.gateways.hint(frames).pushed);
    }
}
