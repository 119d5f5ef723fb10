//! Which connection watches whom, and what it was told last. Pure.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use proto::wire;

use crate::store::{Route, Seen};

/// See the head of this file.
#[derive(Debug)]
pub struct Watches {
    connections: HashMap<u64, Watcher>,
    users: HashMap<u64, Watched>,
    /// Names that have no number yet, with their connections.
    nameless: BTreeMap<String, Vec<u64>>,
    /// Pairs of a connection and a user.
    count: usize,
    count_max: usize,
    /// How long one lives without being renewed.
    life: Duration,
}

#[derive(Debug)]
struct Watcher {
    user: u64,
    users: Vec<u64>,
    names: Vec<String>,
    until: Instant,
}

#[derive(Debug)]
struct Watched {
    name: String,
    connections: Vec<u64>,
    told: Option<There>,
}

/// Whether a user is there, as others are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct There {
    online: bool,
    last_seen_s: u64,
}

/// More is watched than may be.
#[derive(Debug, PartialEq, Eq)]
pub struct Full;

/// A change that is to be told: whose, and to which connections with their users.
pub type Change = (wire::Seen, Vec<(u64, u64)>);

impl There {
    /// By the routes of a user and what is kept of them. A route counts when its connection can be reached.
    pub fn of(routes: &[Route], seen: Seen, is_reached: impl Fn(u64) -> bool) -> There {
        let online = !seen.hides.presence && routes.iter().any(|route| is_reached(route.connection));
        // Who is there is not away since some time; and while routes lead nowhere nobody knows since when.
        let is_known = !seen.hides.presence && routes.is_empty();
        There { online, last_seen_s: if is_known { seen.last_s } else { 0 } }
    }

    /// As a client is told it.
    pub fn seen(self, user: String) -> wire::Seen {
        wire::Seen { user, online: self.online, last_seen_s: self.last_seen_s }
    }
}

impl Watches {
    /// None, and at most so many pairs of a connection and a user.
    pub fn new(count_max: usize, life: Duration) -> Self {
        let (connections, users, nameless) = (HashMap::new(), HashMap::new(), BTreeMap::new());
        Watches { connections, users, nameless, count: 0, count_max, life }
    }

    /// Nobody is watched.
    pub fn is_empty(&self) -> bool {
        self.connections.is_empty()
    }

    /// A connection of this user watches these, by name and number if they have one, and nobody else any more.
    pub fn set(
        &mut self,
        connection: u64,
        user: u64,
        watched: &[(String, Option<u64>)],
        now: Instant,
    ) -> Result<(), Full> {
        let before = self.connections.get(&connection).map_or(0, Watcher::count);
        if self.count - before + watched.len() > self.count_max {
            return Err(Full);
        }
        self.end(connection);
        if watched.is_empty() {
            return Ok(());
        }
        let mut watcher = Watcher { user, users: Vec::new(), names: Vec::new(), until: now + self.life };
        for (name, number) in watched {
            match number {
                Some(number) => {
                    self.watched(*number, name).connections.push(connection);
                    watcher.users.push(*number);
                }
                None => {
                    self.nameless.entry(name.clone()).or_default().push(connection);
                    watcher.names.push(name.clone());
                }
            }
        }
        self.count += watcher.count();
        self.connections.insert(connection, watcher);
        Ok(())
    }

    fn watched(&mut self, number: u64, name: &str) -> &mut Watched {
        let new = || Watched { name: name.to_owned(), connections: Vec::new(), told: None };
        self.users.entry(number).or_insert_with(new)
    }

    /// Goes on watching whom it watched. `false`: nobody.
    pub fn renew(&mut self, connection: u64, now: Instant) -> bool {
        let watcher = self.connections.get_mut(&connection);
        watcher.map(|watcher| watcher.until = now + self.life).is_some()
    }

    /// It watches nobody any more.
    pub fn end(&mut self, connection: u64) {
        let Some(watcher) = self.connections.remove(&connection) else { return };
        self.count -= watcher.count();
        for number in &watcher.users {
            if let Some(watched) = self.users.get_mut(number) {
                watched.connections.retain(|other| *other != connection);
                if watched.connections.is_empty() {
                    self.users.remove(number);
                }
            }
        }
        for name in &watcher.names {
            if let Some(connections) = self.nameless.get_mut(name) {
                connections.retain(|other| *other != connection);
                if connections.is_empty() {
                    self.nameless.remove(name);
                }
            }
        }
    }

    /// Forgets those that were not renewed.
    pub fn expire(&mut self, now: Instant) {
        let over: Vec<u64> =
            self.connections.iter().filter(|(_, watcher)| watcher.until < now).map(|(id, _)| *id).collect();
        over.into_iter().for_each(|connection| self.end(connection));
    }

    /// Whether anybody watches this user.
    pub fn is_watched(&self, user: u64) -> bool {
        self.users.contains_key(&user)
    }

    /// Everybody who is watched.
    pub fn users(&self) -> Vec<u64> {
        self.users.keys().copied().collect()
    }

    /// The names that have no number yet.
    pub fn nameless(&self) -> Vec<String> {
        self.nameless.keys().cloned().collect()
    }

    /// A name has a number now.
    pub fn named(&mut self, name: &str, number: u64) {
        let Some(connections) = self.nameless.remove(name) else { return };
        for connection in &connections {
            if let Some(watcher) = self.connections.get_mut(connection) {
                watcher.names.retain(|other| other != name);
                watcher.users.push(number);
            }
        }
        let watched = self.watched(number, name);
        watched.connections.extend(connections);
        // As they were told when they asked. Where others know better, all are told again.
        if watched.told.get_or_insert_default() != &There::default() {
            watched.told = None;
        }
    }

    /// A number is nobody's any more, and its name has none that is known. What is to be told, if it is news.
    pub fn unnamed(&mut self, user: u64) -> Option<Change> {
        let change = self.found(user, There::default());
        let Watched { name, connections, .. } = self.users.remove(&user)?;
        for connection in &connections {
            if let Some(watcher) = self.connections.get_mut(connection) {
                watcher.users.retain(|other| *other != user);
                watcher.names.push(name.clone());
            }
        }
        self.nameless.entry(name).or_default().extend(connections);
        change
    }

    /// Somebody who asked was told so. `true`: others were told otherwise, and all are to be told how it is.
    pub fn told_first(&mut self, user: u64, there: There) -> bool {
        let Some(watched) = self.users.get_mut(&user) else { return false };
        let differs = *watched.told.get_or_insert(there) != there;
        if differs {
            watched.told = None;
        }
        differs
    }

    /// What such connections were told last may not have come there: whom they watch is told of once more, when it is found.
    pub fn lost(&mut self, is_such: impl Fn(u64) -> bool) {
        for watched in self.users.values_mut() {
            if watched.connections.iter().any(|connection| is_such(*connection)) {
                watched.told = None;
            }
        }
    }

    /// The user was found so: what is to be told, if it is news.
    pub fn found(&mut self, user: u64, there: There) -> Option<Change> {
        let watched = self.users.get_mut(&user)?;
        if watched.told.replace(there) == Some(there) {
            return None;
        }
        let with_user = |connection: &u64| Some((*connection, self.connections.get(connection)?.user));
        Some((there.seen(watched.name.clone()), watched.connections.iter().filter_map(with_user).collect()))
    }
}

impl Watcher {
    fn count(&self) -> usize {
        self.users.len() + self.names.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Hides;

    const LIFE: Duration = Duration::from_secs(120);

    fn of(names: &[(&str, Option<u64>)]) -> Vec<(String, Option<u64>)> {
        names.iter().map(|(name, number)| ((*name).to_owned(), *number)).collect()
    }

    fn there(online: bool, last_seen_s: u64) -> There {
        There { online, last_seen_s }
    }

    #[test]
    fn a_number_that_is_nobodys_leaves_its_name_to_the_next() {
        let now = Instant::now();
        let mut watches = Watches::new(10, LIFE);
        watches.set(1, 11, &of(&[("ann", Some(7))]), now).unwrap();
        watches.told_first(7, there(true, 0));
        let (seen, to) = watches.unnamed(7).unwrap();
        assert_eq!((seen.online, to), (false, vec![(1, 11)]));
        assert_eq!(
            (watches.unnamed(7), watches.is_watched(7), watches.nameless()),
            (None, false, vec!["ann".into()])
        );
        watches.named("ann", 8);
        let (seen, to) = watches.found(8, there(true, 0)).unwrap();
        assert_eq!((&*seen.user, seen.online, to), ("ann", true, vec![(1, 11)]));
        watches.end(1);
        assert!(watches.is_empty() && watches.count == 0 && watches.users.is_empty());
    }

    #[test]
    fn changes_go_to_whoever_watches_and_only_once() {
        let now = Instant::now();
        let mut watches = Watches::new(10, LIFE);
        watches.set(1, 100, &of(&[("bob", Some(2)), ("carol", Some(3))]), now).unwrap();
        watches.set(5, 101, &of(&[("bob", Some(2))]), now).unwrap();
        watches.told_first(2, there(false, 9));
        assert_eq!(watches.found(2, there(false, 9)), None);
        let (seen, mut targets) = watches.found(2, there(true, 0)).unwrap();
        targets.sort_unstable();
        assert_eq!((seen, targets), (there(true, 0).seen("bob".into()), vec![(1, 100), (5, 101)]));
        assert_eq!(watches.found(2, there(true, 0)), None);
        assert_eq!(watches.found(4, there(true, 0)), None, "nobody watches that one");
        watches.lost(|connection| connection == 1);
        assert_eq!(watches.found(2, there(true, 0)).unwrap().1.len(), 2, "once more");
        watches.lost(|connection| connection == 7);
        assert_eq!(watches.found(2, there(true, 0)), None);
        watches.set(1, 100, &of(&[("carol", Some(3))]), now).unwrap();
        assert_eq!(watches.found(2, there(false, 11)).unwrap().1, [(5, 101)]);
        watches.end(5);
        assert!(!watches.is_watched(2) && watches.is_watched(3));
        watches.end(1);
        assert!(watches.is_empty() && watches.users().is_empty() && watches.count == 0);
    }

    #[test]
    fn whoever_does_not_renew_is_forgotten() {
        let now = Instant::now();
        let mut watches = Watches::new(10, LIFE);
        watches.set(1, 100, &of(&[("bob", Some(2))]), now).unwrap();
        watches.set(2, 100, &of(&[("bob", Some(2))]), now).unwrap();
        assert!(watches.renew(1, now + LIFE) && !watches.renew(3, now));
        watches.expire(now + LIFE + Duration::from_secs(1));
        assert!(watches.renew(1, now) && !watches.renew(2, now));
    }

    #[test]
    fn a_name_that_gets_a_number_is_watched_under_it() {
        let now = Instant::now();
        let mut watches = Watches::new(10, LIFE);
        watches.set(1, 100, &of(&[("dora", None)]), now).unwrap();
        assert_eq!(watches.nameless(), ["dora"]);
        watches.named("dora", 9);
        assert_eq!(watches.found(9, there(false, 0)), None, "that is what was told");
        assert_eq!(watches.found(9, there(true, 0)).unwrap().1, [(1, 100)]);
        assert!(watches.nameless().is_empty());
        watches.end(1);
        assert!(watches.is_empty() && watches.count == 0 && !watches.is_watched(9));
    }

    #[test]
    fn more_than_may_be_is_refused_and_what_was_stays() {
        let now = Instant::now();
        let mut watches = Watches::new(2, LIFE);
        let two = of(&[("bob", Some(2)), ("carol", Some(3))]);
        watches.set(1, 100, &two, now).unwrap();
        assert_eq!(watches.set(2, 101, &of(&[("bob", Some(2))]), now), Err(Full));
        assert_eq!(watches.set(1, 100, &two, now), Ok(()), "what it takes the place of does not count");
        watches.set(1, 100, &[], now).unwrap();
        assert!(watches.is_empty());
        assert_eq!(watches.set(2, 101, &of(&[("bob", Some(2))]), now), Ok(()));
    }

    #[test]
    fn what_is_hidden_and_what_leads_nowhere_is_not_told() {
        let route = [Route { device: 1, attempt: 1, connection: 7 }];
        let seen = Seen { last_s: 50, hides: Hides::default() };
        assert_eq!(There::of(&route, seen, |_| true), there(true, 0));
        assert_eq!(There::of(&route, seen, |_| false), there(false, 0));
        assert_eq!(There::of(&[], seen, |_| true), there(false, 50));
        let hidden = Seen { hides: Hides { presence: true, typing: false }, ..seen };
        assert_eq!(There::of(&route, hidden, |_| true), there(false, 0));
        assert_eq!(There::of(&[], hidden, |_| true), there(false, 0));
    }
}
