//! A store in memory, for tests and simulation: the [`Store`] trait without disk, network or wait. Any thread; one lock.
//!
//! What a server is asked for is decided in [`MemoryStore::apply_one`] at once, so that a simulation can choose itself when a
//! call arrives, how far it gets and whether its answer does. [`Plants`] are faults to be switched on: a checker that does not
//! find them checks nothing.
//!
//! Trap: nothing here survives the process, so no server may offer it. Every map is ordered: a seed must replay.

use std::collections::{BTreeMap, BTreeSet};

use parking_lot::Mutex;
use proto::wire::Durability;

use crate::store::{
    Answer, Append, Appended, Bound, CHAT_BUCKETS, Head, Mark, Marks, MessageId, Moved, Op, Outcome, Page,
    Recent, Route, Seen, Standing, Store, StoreError, Stored, TokenOf, chat_bucket, first_behind,
    message_crc, peer,
};
use crate::store_memory_chat::{Chat, Kept};

/// Faults on purpose.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Plants {
    /// An id that comes again is stored again.
    pub dedupe_off: bool,
    /// Answers come before the change is durable: [`MemoryStore::crash`] takes back what [`MemoryStore::persist`] has not seen.
    pub acknowledge_before_persist: bool,
    /// Whoever logs in last is bound, whatever the attempt.
    pub binding_unchecked: bool,
    /// A final refusal leaves its id for another try.
    pub refusal_keeps_id: bool,
}

/// See the head of this file.
pub struct MemoryStore {
    clock_us: Box<dyn Fn() -> u64 + Send + Sync>,
    terms: Terms,
    inner: Mutex<Inner>,
}

/// What a store is told when it is made.
#[derive(Debug, Clone, Copy)]
pub struct Terms {
    /// Faults on purpose.
    pub plants: Plants,
    /// Hours that a name is remembered.
    pub named_ids_hours: u64,
    /// Messages that a chat keeps; 0: all.
    pub retention_messages_max: u64,
    /// Days that a message is kept; 0: for ever.
    pub retention_days: u64,
    /// From which history numbers are drawn.
    pub seed: u64,
}

#[derive(Default)]
struct Inner {
    now: Data,
    /// What a crash leaves, when that is less.
    durable: Data,
}

#[derive(Debug, Clone, Default)]
struct Data {
    incarnations: u64,
    users: u64,
    draws: u64,
    numbers: BTreeMap<String, u64>,
    names: BTreeMap<u64, String>,
    retired: BTreeSet<u64>,
    routes: BTreeMap<u64, Vec<Route>>,
    seen: BTreeMap<u64, Seen>,
    /// By user and device: tokens of before that time (s) are revoked, and how long that is kept (µs).
    revoked: BTreeMap<(u64, Option<u32>), (u64, u64)>,
    listed: BTreeMap<String, BTreeSet<String>>,
    chats: BTreeMap<String, Chat>,
    recent: BTreeMap<u32, BTreeSet<(u64, String)>>,
    histories: BTreeMap<u32, u64>,
    /// How far each life has pushed, and when it said so.
    marks: BTreeMap<(String, u64), (u64, u64)>,
    /// Time of the newest message.
    said_us: u64,
    /// Of each bucket the chat that `Expire` looked at last.
    expired: BTreeMap<u32, String>,
}

impl Default for MemoryStore {
    /// With the clock of this machine.
    fn default() -> Self {
        let clock = || {
            let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            since.map_or(0, |since| since.as_micros() as u64)
        };
        MemoryStore::new(clock, Terms::default())
    }
}

impl Default for Terms {
    fn default() -> Self {
        Terms {
            plants: Plants::default(),
            named_ids_hours: 24,
            retention_messages_max: 100_000,
            retention_days: 30,
            seed: 1,
        }
    }
}

impl MemoryStore {
    /// Empty. `clock_us`: Unix time.
    pub fn new(clock_us: impl Fn() -> u64 + Send + Sync + 'static, terms: Terms) -> Self {
        MemoryStore { clock_us: Box::new(clock_us), terms, inner: Mutex::default() }
    }

    /// Does one operation.
    pub fn apply_one(&self, op: &Op) -> Outcome {
        let mut now_us = (self.clock_us)();
        let mut inner = self.inner.lock();
        if matches!(op, Op::Append(_)) {
            // No two messages at one time: what is asked for "since" one is the other.
            now_us = now_us.max(inner.now.said_us + 1);
            inner.now.said_us = now_us;
        }
        Step { data: &mut inner.now, terms: &self.terms, now_us }.apply(op)
    }

    /// What was answered until now is durable. Only means something with [`Plants::acknowledge_before_persist`].
    pub fn persist(&self) {
        if self.terms.plants.acknowledge_before_persist {
            let mut inner = self.inner.lock();
            inner.durable = inner.now.clone();
        }
    }

    /// The store's process dies and comes back.
    pub fn crash(&self) {
        if self.terms.plants.acknowledge_before_persist {
            let mut inner = self.inner.lock();
            inner.now = inner.durable.clone();
        }
    }

    /// Every chat, and what it holds.
    pub fn chats(&self) -> Vec<(String, Vec<Stored>)> {
        let inner = self.inner.lock();
        let messages = |chat: &Chat| chat.messages.values().map(|kept| kept.message.clone()).collect();
        inner.now.chats.iter().map(|(name, chat)| (name.clone(), messages(chat))).collect()
    }

    /// Puts another body in the place of a message's, behind the back of its checksum.
    pub fn damage(&self, chat: &str, seq: u64, body: &[u8]) {
        let mut inner = self.inner.lock();
        if let Some(kept) = inner.now.chats.get_mut(chat).and_then(|chat| chat.messages.get_mut(&seq)) {
            kept.message.body = body.to_vec().into();
        }
    }
}

#[async_trait::async_trait]
impl Store for MemoryStore {
    async fn apply(&self, ops: &[Op]) -> Vec<Outcome> {
        ops.iter().map(|op| self.apply_one(op)).collect()
    }

    async fn durability(&self) -> Result<(Durability, String), StoreError> {
        Ok((Durability::Strict, "in memory, as far as a simulation goes".to_owned()))
    }
}

/// One operation on the data.
struct Step<'a> {
    data: &'a mut Data,
    terms: &'a Terms,
    now_us: u64,
}

impl Step<'_> {
    fn apply(&mut self, op: &Op) -> Outcome {
        let now_us = self.now_us;
        Ok(match op {
            Op::Incarnate => {
                let begin = now_us / 1_000_000;
                let count = &mut self.data.incarnations;
                *count = if *count == 0 { begin + 1 } else { *count + 1 };
                Answer::Incarnation(((*count - 1) % 0xff_ffff + 1) as u32)
            }
            Op::UserNumbers { count } => {
                let users = &mut self.data.users;
                *users = if *users == 0 { (now_us / 1_000_000) << 20 } else { *users } + count;
                Answer::UserNumbers(*users + 1 - count)
            }
            Op::Register { name, candidate } => {
                let Data { numbers, names, .. } = &mut *self.data;
                let number = *numbers.entry(name.clone()).or_insert_with(|| {
                    names.insert(*candidate, name.clone());
                    *candidate
                });
                Answer::User(Some(number))
            }
            Op::User { name } => Answer::User(self.data.numbers.get(name).copied()),
            Op::Name { user } => Answer::Name(self.data.names.get(user).cloned()),
            Op::Retire { user } => {
                self.data.retired.insert(*user);
                self.data.seen.remove(user);
                Answer::Done
            }
            Op::Unname { user } => {
                self.data.names.remove(user);
                Answer::Done
            }
            Op::Renumber { name, from, to } => {
                if self.data.numbers.get(name) == Some(from) {
                    self.data.numbers.insert(name.clone(), *to);
                    self.data.names.insert(*to, name.clone());
                }
                Answer::Done
            }
            Op::Bind { user, device, attempt, connection, devices_max, issued_s } => {
                let new = Route { device: *device, attempt: *attempt, connection: *connection };
                if *issued_s > 0 && self.is_revoked(*user, Some(*device), *issued_s) {
                    return Ok(Answer::Bound(Bound::Revoked));
                }
                if self.data.retired.contains(user) {
                    return Ok(Answer::Bound(Bound::Retired));
                }
                Answer::Bound(self.bind(*user, new, *devices_max))
            }
            Op::Revoke { user, device, before_s, keep_s } => {
                self.data.revoked.retain(|_, (_, until_us)| *until_us > now_us);
                let until_us = now_us.saturating_add(keep_s.saturating_mul(1_000_000));
                let row = self.data.revoked.entry((*user, *device)).or_default();
                *row = (row.0.max(*before_s), row.1.max(until_us));
                Answer::Done
            }
            Op::IsRevoked { user, issued_s } => Answer::Revoked(self.is_revoked(*user, None, *issued_s)),
            Op::Unbind { user, connection } => {
                if let Some(routes) = self.data.routes.get_mut(user) {
                    let before = routes.len();
                    routes.retain(|route| route.connection != *connection);
                    if routes.is_empty() && before > 0 && !self.data.retired.contains(user) {
                        self.data.seen.entry(*user).or_default().last_s = now_us / 1_000_000;
                    }
                }
                Answer::Done
            }
            Op::Routes { user } => {
                let routes = self.data.routes.get(user).cloned().unwrap_or_default();
                if self.data.retired.contains(user) {
                    Answer::Retired(routes)
                } else {
                    Answer::Routes(routes)
                }
            }
            Op::Seen { user } => Answer::Seen(self.data.seen.get(user).copied().unwrap_or_default()),
            Op::Hide { user, hides } => {
                self.data.seen.entry(*user).or_default().hides = *hides;
                Answer::Done
            }
            Op::ListChat { user, chat } => {
                self.data.listed.entry(user.clone()).or_default().insert(chat.clone());
                Answer::Done
            }
            Op::Chats { user, after, until, limit } => {
                let all = self.data.listed.get(user).into_iter().flatten();
                let fits = |chat: &&String| *chat > after && (until.is_empty() || *chat <= until);
                Answer::Chats(all.filter(fits).take(*limit).cloned().collect())
            }
            Op::Append(append) => Answer::Appended(self.append(append)),
            Op::Head { chat, user } => {
                let history = self.history(chat);
                let found = self.data.chats.get(chat);
                let cursors = |user: &str| found.and_then(|chat| chat.cursors.get(user).copied());
                let mine = cursors(user).unwrap_or_default();
                let peer = peer(chat, user).and_then(cursors).unwrap_or_default();
                let since = found.map_or(0, |chat| chat.since_of(user));
                Answer::Head(Head {
                    history,
                    seq: found.map_or(0, |chat| chat.seq),
                    delivered: mine.delivered,
                    read: mine.read,
                    peer_delivered: peer.delivered,
                    peer_read: peer.read,
                    first: first_behind(since, found.map_or(1, Chat::first)),
                    since,
                })
            }
            Op::Pull { chat, reader, cursor, limit, reverse } => {
                let history = self.history(chat);
                let found = self.data.chats.get(chat);
                let since = found.map_or(0, |chat| chat.since_of(reader));
                let read = found.map(|found| found.pull(chat, (since, *cursor), *limit, *reverse));
                let (messages, read_to) = read.unwrap_or_default();
                Answer::Messages(Page {
                    history,
                    head: found.map_or(0, |chat| chat.seq),
                    first: first_behind(since, found.map_or(1, Chat::first)),
                    since,
                    messages,
                    read_to,
                })
            }
            Op::Delivered { chat, user, seq, read } => {
                let Some(chat) = self.data.chats.get_mut(chat) else {
                    return Ok(Answer::Moved(Moved::default()));
                };
                let (seq, read) = ((*seq).min(chat.seq), (*read).min(chat.seq));
                let cursors = chat.cursors.entry(user.clone()).or_default();
                let delivered = if seq > cursors.delivered { seq } else { 0 };
                let is_news = delivered > 0 || read > cursors.read;
                cursors.delivered = cursors.delivered.max(seq);
                cursors.read = cursors.read.max(read);
                Answer::Moved(Moved { delivered, read: if read > 0 { cursors.read } else { 0 }, is_news })
            }
            Op::Vacate { chat, user } => {
                if let Some(found) = self.data.chats.get_mut(chat) {
                    found.vacate(chat, user);
                }
                Answer::Done
            }
            Op::Member { chat, user } => {
                let found = self.data.chats.get(chat);
                let standing = |chat: &Chat| Standing {
                    group: chat.group.clone(),
                    member: chat.members.get(user).copied(),
                    past: chat.past.get(user).cloned().unwrap_or_default(),
                };
                Answer::Standing(found.map(standing).unwrap_or_default())
            }
            Op::Members { chat, cursors } => {
                let found = self.data.chats.get(chat);
                Answer::Roster(found.map(|chat| chat.roster(*cursors)).unwrap_or_default())
            }
            Op::Mark { server, life, pushed_us } => {
                let pushed_us = if *pushed_us == 0 { now_us } else { *pushed_us };
                self.data.marks.insert((server.clone(), *life), (pushed_us, now_us));
                let mark = |((server, life), (pushed_us, beat_us)): (&(String, u64), &(u64, u64))| Mark {
                    server: server.clone(),
                    life: *life,
                    pushed_us: *pushed_us,
                    beat_us: *beat_us,
                };
                Answer::Marks(Marks { now_us, marks: self.data.marks.iter().map(mark).collect() })
            }
            Op::DropMark { server, life } => {
                self.data.marks.remove(&(server.clone(), *life));
                Answer::Done
            }
            Op::Recent { bucket, after_us, limit } => {
                let newer = self.data.recent.get(bucket).into_iter().flatten();
                let newer = newer.filter(|(time_us, _)| time_us > after_us).take(*limit);
                Answer::Recent(
                    newer.map(|(time_us, chat)| Recent { chat: chat.clone(), time_us: *time_us }).collect(),
                )
            }
            Op::LoseHistory { bucket, history } => {
                if self.data.histories.get(bucket) == Some(history) {
                    self.data.histories.remove(bucket);
                }
                Answer::Done
            }
            Op::Expire { bucket, before_us, limit } => {
                self.expire(*bucket, *before_us, *limit);
                Answer::Done
            }
        })
    }

    /// `device`: beside all of them.
    fn is_revoked(&self, user: u64, device: Option<u32>, issued_s: u64) -> bool {
        [None, device].into_iter().any(|device| {
            let row = self.data.revoked.get(&(user, device));
            row.is_some_and(|(before_s, until_us)| issued_s < *before_s && *until_us > self.now_us)
        })
    }

    fn bind(&mut self, user: u64, new: Route, devices_max: usize) -> Bound {
        let routes = self.data.routes.entry(user).or_default();
        let mine = routes.iter().position(|route| route.device == new.device);
        if let Some(old) = mine.map(|at| routes[at])
            && (old.attempt > new.attempt || (old.attempt == new.attempt && old.connection != new.connection))
            && !self.terms.plants.binding_unchecked
        {
            return Bound::Stale { stored: old.attempt };
        }
        let replaced = mine.map(|at| routes.remove(at).connection).filter(|old| *old != new.connection);
        let oldest = (0..routes.len()).min_by_key(|at| routes[*at].attempt);
        let evicted = oldest.filter(|_| routes.len() >= devices_max).map(|at| routes.remove(at).connection);
        routes.push(new);
        Bound::Yes { replaced, evicted }
    }

    fn append(&mut self, append: &Append) -> Appended {
        let is_revoked = |token: TokenOf| self.is_revoked(token.user, None, token.issued_s);
        if append.token.is_some_and(is_revoked) {
            return Appended::Revoked;
        }
        let bucket = chat_bucket(&append.chat);
        let history = self.history(&append.chat);
        let (now_us, terms) = (self.now_us, *self.terms);
        let chat = self.data.chats.entry(append.chat.clone()).or_default();
        if let Some(answer) = chat.known(append, terms.plants, now_us) {
            return answer;
        }
        let (refusal, effect) = match append.refusal {
            Some(code) => (Some(code), None),
            None => match chat.decide(append) {
                Ok(effect) => (None, effect),
                Err(code) => (Some(code), None),
            },
        };
        if let Some(code) = refusal {
            let answer = Appended::Refused(code);
            if !terms.plants.refusal_keeps_id && matches!(append.id, MessageId::Numbered { .. }) {
                chat.remember(append, &answer, 0);
            }
            return answer;
        }
        let seq = chat.seq + 1;
        let time_us = now_us.max(chat.time_us + 1);
        if let Some(effect) = effect {
            chat.group = effect.group;
            chat.members.extend(effect.rows);
            for (user, stay) in effect.past {
                crate::group::remember(chat.past.entry(user).or_default(), stay);
            }
        }
        let version = chat.group.version;
        let answer = Appended::Stored { seq, time_us, history, version, again: false };
        chat.remember(append, &answer, now_us + terms.named_ids_hours * 3_600_000_000);
        let old_time_us = std::mem::replace(&mut chat.time_us, time_us);
        chat.seq = seq;
        let (sender, body, kind) = (append.sender.clone(), append.body.clone(), append.kind);
        let crc = message_crc(&append.chat, &sender, kind, &body);
        chat.messages.insert(seq, Kept { crc, message: Stored { seq, sender, time_us, body, kind } });
        chat.retain(&terms, now_us);
        let recent = self.data.recent.entry(bucket).or_default();
        recent.remove(&(old_time_us, append.chat.clone()));
        recent.insert((time_us, append.chat.clone()));
        answer
    }

    /// The history of a chat's bucket, drawn when it is asked for first.
    fn history(&mut self, chat: &str) -> u64 {
        let draws = &mut self.data.draws;
        let seed = self.terms.seed;
        *self.data.histories.entry(chat_bucket(chat)).or_insert_with(|| {
            *draws += 1;
            mix(seed.wrapping_add(draws.wrapping_mul(0x9e37_79b9_7f4a_7c15))).max(1)
        })
    }

    fn expire(&mut self, bucket: u32, before_us: u64, limit: usize) {
        debug_assert!(bucket < CHAT_BUCKETS);
        let here = || self.data.chats.keys().filter(|name| chat_bucket(name) == bucket);
        let after = self.data.expired.get(&bucket);
        let next: Vec<String> =
            here().filter(|name| after.is_none_or(|after| *name > after)).take(limit).cloned().collect();
        // Behind the last one the next call begins anew.
        match next.last() {
            Some(last) if next.len() == limit => drop(self.data.expired.insert(bucket, last.clone())),
            _ => drop(self.data.expired.remove(&bucket)),
        }
        for name in next {
            if let Some(chat) = self.data.chats.get_mut(&name) {
                chat.messages.retain(|_, kept| kept.message.time_us >= before_us);
            }
        }
    }
}

/// SplitMix64's last step: another number for each number, looking like chance.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
