//! The store on Redis: one pipelined round trip per call, with a command or a Lua script for each operation. Some
//! logins take a second round trip (`store_redis_round`).
//!
//! Two connections: bulk (calls of nothing but delivered cursors, or many logins and departures) has its own. Redis takes
//! some 16 kB of each connection in turn, so a message behind a thousand logins waits for a few dozen of them.
//!
//! Keys (`store_redis_key` has the names). `{cNNNN}` is the bucket of a chat, so that a chat stands in one slot also in
//! Redis Cluster: `{cNNNN}:chat:CHAT` hash `seq` and `time` of the head, `first` kept, time of the `oldest`, `d:USER`, `r:USER`, `s:USER`;
//! `{cNNNN}:messages:CHAT` stream with id `SEQ-0`; `{cNNNN}:ids:CHAT:SENDER:STREAM` hash `w` and a ring of answers;
//! `{cNNNN}:named:CHAT:SENDER:NAME` string, digest and answer; `{cNNNN}:events` stream, with `store.events`; `{cNNNN}:recent` zset of all chats by time; `{cNNNN}:history`. `route:NNNNN` hash user → entries of 20 bytes.
//! `revoked:{route:NNNNN}:USER` hash device or nothing → before when tokens are revoked. `seen:{route:NNNNN}` hash user → seconds
//! at which the last route was removed, `hUSER` → what is hidden. `{pNN}:presence` stream, with `store.events`.
//! `user:NNNNN` hash name → number. `name:NNNNN` hash number → name. `chats:USER` zset, all of score 0. `rookery:meta`
//! hash: layout and record. `rookery:marks` hash. `rookery:incarnations`, `rookery:users` counters.
//!
//! Trap: scripts vanish when Redis restarts. An operation answered NOSCRIPT was not done, and every later script of that
//! call was not done either, so they are loaded and those operations are sent again, in order; so are routes read behind
//! them, which else would be older than the message that they are for. Between calls, and so between the connections,
//! there is no order.
//!
//! Trap for a cluster of several nodes, which is not served yet: that routes are read behind the appends rests on one
//! connection to one Redis, scripts for many (Bind, Unbind, Delivered) take keys of many slots, and a message that rests on a
//! token is stored and its user's revocations read in one script.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use proto::link;
use proto::wire::Durability;
use redis::{Cmd, Pipeline, RedisResult, RedisWrite, Value};

use crate::config::StoreConfig;
use crate::group::Act;
use crate::store::{
    Answer, Appended, CHAT_BUCKETS, MessageId, Op, Outcome, Store, StoreError, body_digest, chat_bucket,
    message_crc, peer, retention_step,
};
use crate::store_redis_command::{command, delivered, members, put_change, registered, unnamed, user_number};
use crate::store_redis_connection::{Connection, Dialer};
use crate::store_redis_key as key;
use crate::store_redis_layout::{self as layout, load_scripts, new_history, refused, unknown};
use crate::store_redis_read::{Sweep, stamp, swept};
use crate::store_redis_record::Seen;
use crate::store_redis_round::{Ask, Hints, Rounds, is_bulk, is_read_behind};
use crate::store_redis_script::Script;

/// Redis.
pub struct RedisStore {
    connection: Connection,
    /// For what nobody waits for, and for storms.
    bulk: Connection,
    seen: Arc<Seen>,
    hints: Hints,
    /// Of each bucket: the time behind which retention goes on, µs; 0: at the beginning.
    sweeps: Vec<Mutex<Sweep>>,
    route_buckets: u32,
    dedupe_seconds: u64,
    named_seconds: u64,
    /// Events that a bucket keeps; 0: none are written.
    events_max: u64,
    messages_max: u64,
    kept_us: u64,
}

impl RedisStore {
    /// Connects, checks, writes or migrates the layout.
    pub async fn open(config: &StoreConfig) -> Result<RedisStore, StoreError> {
        let seen = Arc::new(Seen::default());
        let dialer = Dialer::new(config, seen.clone())?;
        Ok(RedisStore {
            connection: Connection::open(&dialer).await?,
            bulk: Connection::open(&dialer).await?,
            seen,
            hints: Hints::new(config.events),
            sweeps: (0..CHAT_BUCKETS).map(|_| Mutex::default()).collect(),
            route_buckets: config.route_buckets,
            dedupe_seconds: u64::from(config.dedupe_days) * 86_400,
            named_seconds: u64::from(config.named_ids_hours) * 3_600,
            events_max: if config.events { config.events_max } else { 0 },
            messages_max: config.retention_messages_max,
            kept_us: u64::from(config.retention_days) * 86_400 * 1_000_000,
        })
    }

    async fn send(
        &self,
        generation: Option<u64>,
        ops: &[Op],
        asks: &[Ask],
    ) -> Result<Vec<RedisResult<Value>>, StoreError> {
        let to = if is_bulk(ops) { &self.bulk } else { &self.connection };
        let (mut connection, found) = to.get_looked_at().await?;
        if generation.is_some_and(|generation| generation != found) {
            if found < self.seen.generation() {
                // The other connection has found another store: this one is to look too.
                to.reset();
            }
            return Err(StoreError::another());
        }
        let mut pipe = Pipeline::with_capacity(asks.len());
        for ask in asks {
            pipe.add_command(self.ask(ops, ask));
        }
        pipe.ignore_errors().query_async(&mut connection).await.map_err(unknown)
    }

    fn ask(&self, ops: &[Op], ask: &Ask) -> Cmd {
        match ask {
            Ask::Op(op) => self.command(&ops[*op]),
            Ask::NameRow(op) | Ask::Forget(op) => {
                let (name, candidate) = registered(&ops[*op]);
                if matches!(ask, Ask::Forget(_)) {
                    return unnamed(candidate);
                }
                let mut command = command("HSETNX", 4);
                key::put_name(&mut command, candidate);
                command.arg(candidate).arg(name);
                command
            }
            Ask::Claim(op) => {
                let (name, candidate) = registered(&ops[*op]);
                let mut command = command("HSETNX", 4);
                key::put_user(&mut command, name);
                command.arg(name).arg(candidate);
                command
            }
            Ask::Unclaim(op) => {
                let name = registered(&ops[*op]).0;
                let mut command = command("HDEL", 3);
                key::put_user(&mut command, name);
                command.arg(name);
                command
            }
            Ask::Known(op) | Ask::Winner { op, .. } => user_number(registered(&ops[*op]).0),
            Ask::FirstRoute(op) => {
                let mut command = command("HSETNX", 4);
                if let Op::Bind { user, device, attempt, connection, .. } = &ops[*op] {
                    let mut entry = [0; 20];
                    entry[..4].copy_from_slice(&device.to_be_bytes());
                    entry[4..12].copy_from_slice(&attempt.to_be_bytes());
                    entry[12..].copy_from_slice(&connection.to_be_bytes());
                    self.put_route_key(&mut command, *user);
                    command.arg(user).arg(&entry);
                }
                command
            }
            Ask::Bind(some) => self.bind(ops, some),
            Ask::Unbind(some) => self.unbind(ops, some),
            Ask::Delivered(some) => delivered(ops, some),
        }
    }

    fn bind(&self, ops: &[Op], some: &[usize]) -> Cmd {
        let mut command = Script::Bind.of(some.len(), 96 * some.len());
        let binds = || {
            some.iter().filter_map(|op| match &ops[*op] {
                Op::Bind { user, device, attempt, connection, devices_max, issued_s } => {
                    Some((*user, device, attempt, connection, devices_max, issued_s))
                }
                _ => None,
            })
        };
        binds().for_each(|bind| self.put_route_key(&mut command, bind.0));
        // One configuration, so one limit for all.
        command.arg(binds().map(|bind| bind.4).next()).arg(self.events_max);
        for (user, device, attempt, connection, _, issued_s) in binds() {
            command.arg(user).arg(&device.to_be_bytes()).arg(&attempt.to_be_bytes());
            command.arg(&connection.to_be_bytes()).arg(attempt).arg(issued_s);
        }
        command
    }

    fn unbind(&self, ops: &[Op], some: &[usize]) -> Cmd {
        let mut command = Script::Unbind.of(some.len(), 48 * some.len());
        let unbinds = || {
            some.iter().filter_map(|op| match &ops[*op] {
                Op::Unbind { user, connection } => Some((*user, connection)),
                _ => None,
            })
        };
        unbinds().for_each(|unbind| self.put_route_key(&mut command, unbind.0));
        command.arg(self.events_max);
        for (user, connection) in unbinds() {
            command.arg(user).arg(&connection.to_be_bytes());
        }
        command
    }

    /// Of an operation that is one command.
    fn command(&self, op: &Op) -> Cmd {
        match op {
            Op::Incarnate => Script::Incarnate.call(&[key::INCARNATIONS]),
            Op::UserNumbers { count } => {
                let mut command = Script::UserNumbers.call(&[key::USERS]);
                command.arg(count);
                command
            }
            Op::User { name } => user_number(name),
            Op::Name { user } => {
                let mut command = command("HGET", 3);
                key::put_name(&mut command, *user);
                command.arg(user);
                command
            }
            Op::Retire { user } => {
                let mut command = Script::Retire.of(1, 64);
                self.put_route_key(&mut command, *user);
                command.arg(user).arg(self.events_max);
                command
            }
            Op::Unname { user } => unnamed(*user),
            Op::Renumber { name, from, to } => {
                let mut command = Script::Renumber.call(&[&key::user(name)]);
                command.arg(name).arg(from).arg(to);
                command
            }
            Op::Routes { user } => {
                let mut command = command("HGET", 3);
                self.put_route_key(&mut command, *user);
                command.arg(user);
                command
            }
            Op::Seen { user } => {
                let mut command = command("HMGET", 4);
                key::put_seen(&mut command, format_args!("route:{:05}", self.route_bucket(*user)));
                command.arg(user).arg(format!("h{user}"));
                command
            }
            Op::Hide { user, hides } => {
                let mut command = command("HSET", 4);
                key::put_seen(&mut command, format_args!("route:{:05}", self.route_bucket(*user)));
                command.arg(format!("h{user}")).arg(hides.bits());
                command
            }
            Op::Revoke { user, device, before_s, keep_s } => {
                let mut command = Script::Revoke.call(&[&self.revoked_key(*user)]);
                let device = device.map(u32::to_be_bytes);
                command.arg(device.as_ref().map_or(&[][..], |device| &device[..])).arg(before_s).arg(keep_s);
                command
            }
            Op::IsRevoked { user, .. } => {
                let mut command = command("HGET", 3);
                command.arg(self.revoked_key(*user)).arg("");
                command
            }
            // Asked in ways of their own.
            Op::Register { .. } | Op::Bind { .. } | Op::Unbind { .. } | Op::Delivered { .. } => {
                command("PING", 1)
            }
            Op::ListChat { user, chat } => {
                let mut command = redis::cmd("ZADD");
                command.arg(key::chats(user)).arg(0).arg(chat);
                command
            }
            Op::Chats { user, after, until, limit } => {
                let mut command = redis::cmd("ZRANGEBYLEX");
                command.arg(key::chats(user));
                command.arg(if after.is_empty() { "-".to_owned() } else { format!("({after}") });
                command.arg(if until.is_empty() { "+".to_owned() } else { format!("[{until}") });
                command.arg("LIMIT").arg(0).arg(limit);
                command
            }
            Op::Append(append) => {
                let chat = &append.chat;
                let in_group = chat.starts_with('#');
                let (ids, seconds) = match &append.id {
                    MessageId::Numbered { stream, .. } => {
                        (key::ids(chat, &append.sender, *stream), self.dedupe_seconds)
                    }
                    MessageId::Named(name) => (key::named(chat, &append.sender, name), self.named_seconds),
                    // Any key of the slot: it is not looked at.
                    MessageId::Unnamed => (key::chat(chat), 0),
                };
                let mut keys = vec![
                    key::chat(chat),
                    ids,
                    key::messages(chat),
                    key::recent(chat_bucket(chat)),
                    key::history(chat_bucket(chat)),
                ];
                let token = append.token.filter(|_| !in_group);
                keys.extend(in_group.then(|| key::members(chat)));
                keys.extend(token.map(|token| self.revoked_key(token.user)));
                let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
                let mut command = Script::Append.call(&keys);
                let refused = append.refusal.is_some();
                let body: &[u8] = if refused { &[] } else { &append.body };
                match &append.id {
                    MessageId::Numbered { n, .. } => command.arg(n),
                    MessageId::Named(_) => {
                        let digest = u128::from_be_bytes(body_digest(&append.body));
                        command.arg(format!("={digest:032x}"))
                    }
                    MessageId::Unnamed => command.arg("-"),
                };
                command.arg(chat).arg(&append.sender).arg(body);
                command.arg(message_crc(chat, &append.sender, append.kind, body));
                command.arg(append.refusal.map_or(0, |code| code as i32));
                command.arg(seconds).arg(proto::UNANSWERED_MAX).arg(new_history());
                command.arg(self.messages_max).arg(self.kept_us).arg(retention_step(self.messages_max));
                command.arg(append.kind as i32);
                command.arg(if let Act::Refer(seq) = append.act { seq } else { 0 });
                command.arg(self.events_max);
                if in_group {
                    put_change(&mut command, &append.act);
                }
                command.arg(token.map(|token| token.issued_s));
                command
            }
            Op::Head { chat, user } => {
                let mut command = Script::Head.call(&[&key::chat(chat), &key::history(chat_bucket(chat))]);
                command.arg(user).arg(peer(chat, user));
                command
            }
            Op::Pull { chat, reader, cursor, limit, reverse } => {
                let history = key::history(chat_bucket(chat));
                let mut command = Script::Pull.call(&[&key::chat(chat), &key::messages(chat), &history]);
                command.arg(cursor).arg(limit).arg(u8::from(*reverse)).arg(crate::store::PULL_BYTES_MAX);
                command.arg(reader);
                command
            }
            Op::Vacate { chat, user } => {
                let mut command = Script::Vacate.call(&[&key::chat(chat), &key::messages(chat)]);
                let other = if chat.starts_with('#') { "" } else { peer(chat, user).unwrap_or(user) };
                command.arg(user).arg(other);
                command
            }
            Op::Member { chat, user } => {
                let mut command = Script::Member.call(&[&key::chat(chat), &key::members(chat)]);
                command.arg(user);
                command
            }
            Op::Members { chat, cursors } => members(chat, *cursors),
            Op::Mark { server, life, pushed_us } => {
                let mut command = Script::Mark.call(&[key::MARKS]);
                command.arg(key::mark(server, *life)).arg(pushed_us);
                command
            }
            Op::DropMark { server, life } => {
                let mut command = command("HDEL", 3);
                command.arg(key::MARKS).arg(key::mark(server, *life));
                command
            }
            Op::Recent { bucket, after_us, limit } => {
                let mut command = redis::cmd("ZRANGEBYSCORE");
                command.arg(key::recent(*bucket)).arg(format!("({after_us}")).arg("+inf");
                command.arg("WITHSCORES").arg("LIMIT").arg(0).arg(limit);
                command
            }
            Op::LoseHistory { bucket, history } => {
                let mut command = Script::Lose.call(&[&key::history(*bucket)]);
                command.arg(history).arg(new_history());
                command
            }
            Op::Expire { bucket, before_us, limit } => {
                let at = self.sweeps.get(*bucket as usize).map_or_else(Sweep::default, |at| *at.lock());
                let mut command = Script::Expire.call(&[&key::recent(*bucket)]);
                command.arg(key::tag(*bucket)).arg(at.behind_us).arg(before_us).arg(limit).arg(at.began_us);
                command
            }
        }
    }

    /// Remembers what tells a store that lacks something, and where retention goes on.
    fn saw(&self, op: &Op, value: &Value) {
        match op {
            Op::Mark { .. } => {
                if let Some(stamp) = stamp(value) {
                    self.seen.stamp(stamp);
                }
            }
            Op::Expire { bucket, .. } => {
                if let (Some(sweep), Some(at)) = (swept(value), self.sweeps.get(*bucket as usize)) {
                    *at.lock() = sweep;
                }
            }
            _ => {}
        }
    }

    fn route_bucket(&self, user: u64) -> u64 {
        user % u64::from(self.route_buckets)
    }

    fn revoked_key(&self, user: u64) -> String {
        key::revoked(self.route_bucket(user), user)
    }

    fn put_route_key(&self, command: &mut Cmd, user: u64) {
        command.write_arg_fmt(format_args!("route:{:05}", self.route_bucket(user)));
    }
}

/// Most that one operation takes: known? claim, winner, forget; and one round in which the scripts were not there.
const ROUNDS_MAX: usize = 6;

impl RedisStore {
    async fn apply_to(&self, generation: Option<u64>, ops: &[Op]) -> Vec<Outcome> {
        let mut rounds = Rounds::new(ops, &self.hints);
        // Scripts are loaded once: if they vanish again the clients ask again.
        let mut loaded = false;
        for _ in 0..ROUNDS_MAX {
            let asks = rounds.next();
            if asks.is_empty() {
                break;
            }
            let replies = match self.send(generation, ops, &asks).await {
                Ok(replies) => replies,
                Err(error) => {
                    asks.iter().for_each(|ask| rounds.failed(ask, &error));
                    break;
                }
            };
            let mut unscripted = false;
            for (ask, reply) in asks.into_iter().zip(replies) {
                match reply {
                    Err(error) if error.code() == Some("NOSCRIPT") && !loaded => {
                        unscripted = true;
                        rounds.again(ask);
                    }
                    Err(error) => rounds.failed(&ask, &refused(error)),
                    Ok(_) if unscripted && is_read_behind(ops, &ask) => rounds.again(ask),
                    Ok(value) => {
                        if let Ask::Op(op) = &ask {
                            self.saw(&ops[*op], &value);
                        }
                        rounds.answered(ask, value);
                    }
                }
            }
            if unscripted {
                loaded = true;
                let Ok(mut connection) = self.connection.get().await else { break };
                if load_scripts(&mut connection).await.is_err() {
                    break;
                }
            }
        }
        let outcomes = rounds.done(&self.hints);
        let newest = ops.iter().zip(&outcomes).rev().find_map(|both| match both {
            // One that is answered again may be old, and be there where newer ones are not.
            (Op::Append(append), Ok(Answer::Appended(Appended::Stored { seq, again: false, .. }))) => {
                Some((&append.chat, *seq))
            }
            _ => None,
        });
        if let Some((chat, seq)) = newest {
            self.seen.message(chat, seq);
        }
        outcomes
    }
}

#[async_trait::async_trait]
impl Store for RedisStore {
    async fn apply(&self, ops: &[Op]) -> Vec<Outcome> {
        self.apply_to(None, ops).await
    }

    async fn apply_as(&self, generation: u64, ops: &[Op]) -> Vec<Outcome> {
        self.apply_to(Some(generation), ops).await
    }

    /// Looks also whether the store is still the one that was looked at: what was emptied while Redis ran is found here.
    async fn durability(&self) -> Result<(Durability, String), StoreError> {
        let mut connection = self.connection.get().await?;
        let (promised, id, strict) = layout::look_again(&mut connection).await?;
        if id.is_none_or(|id| !self.seen.is(&id)) {
            self.connection.reset();
            self.bulk.reset();
            return Err(StoreError::another());
        }
        if promised.is_err() && strict.as_deref() == Some("1") {
            // Recorded at once: what is lost from now on is found by whoever comes after the next start of Redis.
            let weak: RedisResult<()> =
                Cmd::hset(key::META, "strict", "0").query_async(&mut connection).await;
            weak.map_err(unknown)?;
        }
        Ok(match promised {
            Ok(()) => (Durability::Strict, "Redis fsyncs before it answers".to_owned()),
            Err(why) => (Durability::Weak, why),
        })
    }

    fn generation(&self) -> u64 {
        self.seen.generation()
    }

    fn stored(&self) -> link::Stored {
        self.seen.stored()
    }

    async fn compare(&self, heard: link::Stored, ago: Duration) -> Result<(), StoreError> {
        let known = self.seen.stored();
        if heard.contents != known.contents {
            return Ok(());
        }
        let mut is_lost = self.seen.held_more(heard, ago);
        if !is_lost && heard.stamp > known.stamp {
            // Another server may have written marks meanwhile.
            let mut connection = self.connection.get().await?;
            is_lost = layout::stamp(&mut connection).await? < heard.stamp;
        }
        if is_lost && self.seen.doubt(heard) {
            self.connection.reset();
            self.bulk.reset();
        }
        Ok(())
    }
}
