//! The store on Redis: one pipelined round trip per call, with a command or a Lua script for each operation. Some
//! logins take a second round trip (`store_redis_round`).
//!
//! Two connections: bulk (calls of nothing but delivered cursors, or many logins and departures) has its own. Redis takes
//! some 16 kB of each connection in turn, so a message behind a thousand logins waits for a few dozen of them.
//!
//! Keys. `{cNNNN}` is the bucket of a chat, so that a chat stands in one slot also in Redis Cluster:
//! `{cNNNN}:chat:CHAT` hash `seq` `time` `d:USER`; `{cNNNN}:messages:CHAT` stream with id `SEQ-0`;
//! `{cNNNN}:ids:CHAT:SENDER:STREAM` hash `w` and a ring of answers; `{cNNNN}:recent` zset of chats by time;
//! `{cNNNN}:history`. `route:NNNNN` hash user → entries of 20 bytes. `user:NNNNN` hash name → number.
//! `name:NNNNN` hash number → name. `chats:USER` zset, all of score 0. `rookery:meta` hash, `rookery:incarnations`,
//! `rookery:users` counters.
//!
//! Trap: scripts vanish when Redis restarts. An operation answered NOSCRIPT was not done, and every later script of that
//! call was not done either, so they are loaded and those operations alone are sent again, in order. Between calls, and so
//! between the connections, there is no order.

use std::time::Duration;

use proto::wire::Durability;
use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use redis::{Cmd, Pipeline, RedisError, RedisResult, RedisWrite, Value};

use crate::config::StoreConfig;
use crate::store::{Op, Outcome, Store, StoreError, chat_bucket, message_crc};
use crate::store_redis_round::{Ask, Hints, Rounds};
use crate::store_redis_script::{SCRIPTS, Script};

/// Redis.
pub struct RedisStore {
    connection: ConnectionManager,
    /// For what nobody waits for, and for storms.
    bulk: ConnectionManager,
    hints: Hints,
    route_buckets: u32,
    dedupe_seconds: u64,
}

/// Buckets of users, both ways. Part of the layout: 1 M users are 31 a bucket, which stay listpacks.
const USER_BUCKETS: u32 = 32_768;

impl RedisStore {
    /// Connects, checks or writes the layout, and loads the scripts.
    pub async fn open(config: &StoreConfig) -> Result<RedisStore, StoreError> {
        let client = redis::Client::open(config.url.as_str())
            .map_err(|e| StoreError::Refused(format!("store.url {:?} is not usable: {e}", config.url)))?;
        let manager = ConnectionManagerConfig::new()
            .set_response_timeout(Some(Duration::from_millis(config.response_ms_max)))
            .set_connection_timeout(Some(Duration::from_millis(config.connect_ms_max)))
            // Callers wait for a reconnect; they had better hear soon that there is nobody.
            .set_number_of_retries(1)
            .set_min_delay(Duration::from_millis(20))
            .set_max_delay(Duration::from_millis(100));
        let connect = async || ConnectionManager::new_with_config(client.clone(), manager.clone()).await;
        let store = RedisStore {
            connection: connect().await.map_err(unknown)?,
            bulk: connect().await.map_err(unknown)?,
            hints: Hints::default(),
            route_buckets: config.route_buckets,
            dedupe_seconds: u64::from(config.dedupe_days) * 86_400,
        };
        store.check_layout().await?;
        store.load_scripts().await?;
        Ok(store)
    }

    async fn check_layout(&self) -> Result<(), StoreError> {
        let ours = [
            ("layout", proto::STORE_LAYOUT),
            ("chat_buckets", crate::store::CHAT_BUCKETS),
            ("route_buckets", self.route_buckets),
            ("user_buckets", USER_BUCKETS),
        ];
        let mut pipe = redis::pipe();
        for (field, value) in ours {
            pipe.hset_nx(META, field, value).ignore();
        }
        for (field, _) in ours {
            pipe.hget(META, field);
        }
        let stored: Vec<u32> = pipe.query_async(&mut self.connection.clone()).await.map_err(unknown)?;
        for ((field, ours), stored) in ours.into_iter().zip(stored) {
            if ours != stored {
                return Err(StoreError::Corrupt(format!(
                    "this store was made with {field} = {stored}, this server is set to {ours}: \
                     use the version and store.{field} it was made with, or another store"
                )));
            }
        }
        Ok(())
    }

    async fn load_scripts(&self) -> Result<(), StoreError> {
        let mut pipe = redis::pipe();
        for script in SCRIPTS.iter() {
            pipe.cmd("SCRIPT").arg("LOAD").arg(script.text).ignore();
        }
        pipe.query_async(&mut self.connection.clone()).await.map_err(unknown)
    }

    async fn send(&self, ops: &[Op], asks: &[Ask]) -> RedisResult<Vec<RedisResult<Value>>> {
        let mut pipe = Pipeline::with_capacity(asks.len());
        for ask in asks {
            pipe.add_command(self.ask(ops, ask));
        }
        let mut connection = if is_bulk(ops) { self.bulk.clone() } else { self.connection.clone() };
        pipe.ignore_errors().query_async(&mut connection).await
    }

    fn ask(&self, ops: &[Op], ask: &Ask) -> Cmd {
        match ask {
            Ask::Op(op) => self.command(&ops[*op]),
            Ask::NameRow(op) | Ask::Forget(op) => {
                let (name, candidate) = registered(&ops[*op]);
                if matches!(ask, Ask::Forget(_)) {
                    let mut command = command("HDEL", 3);
                    put_name_key(&mut command, candidate);
                    command.arg(candidate);
                    return command;
                }
                let mut command = command("HSETNX", 4);
                put_name_key(&mut command, candidate);
                command.arg(candidate).arg(name);
                command
            }
            Ask::Claim(op) => {
                let (name, candidate) = registered(&ops[*op]);
                let mut command = command("HSETNX", 4);
                put_user_key(&mut command, name);
                command.arg(name).arg(candidate);
                command
            }
            Ask::Unclaim(op) => {
                let name = registered(&ops[*op]).0;
                let mut command = command("HDEL", 3);
                put_user_key(&mut command, name);
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
        }
    }

    fn bind(&self, ops: &[Op], some: &[usize]) -> Cmd {
        let mut command = Script::Bind.of(some.len(), 96 * some.len());
        let binds = || {
            some.iter().filter_map(|op| match &ops[*op] {
                Op::Bind { user, device, attempt, connection, devices_max } => {
                    Some((*user, device, attempt, connection, devices_max))
                }
                _ => None,
            })
        };
        binds().for_each(|bind| self.put_route_key(&mut command, bind.0));
        // One configuration, so one limit for all.
        command.arg(binds().map(|bind| bind.4).next());
        for (user, device, attempt, connection, _) in binds() {
            command.arg(user).arg(&device.to_be_bytes()).arg(&attempt.to_be_bytes());
            command.arg(&connection.to_be_bytes()).arg(attempt);
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
        for (user, connection) in unbinds() {
            command.arg(user).arg(&connection.to_be_bytes());
        }
        command
    }

    /// Of an operation that is one command.
    fn command(&self, op: &Op) -> Cmd {
        match op {
            Op::Incarnate => Script::Incarnate.call(&[INCARNATIONS]),
            Op::UserNumbers { count } => {
                let mut command = Script::UserNumbers.call(&[USERS]);
                command.arg(count);
                command
            }
            Op::User { name } => user_number(name),
            Op::Name { user } => {
                let mut command = command("HGET", 3);
                put_name_key(&mut command, *user);
                command.arg(user);
                command
            }
            Op::Routes { user } => {
                let mut command = command("HGET", 3);
                self.put_route_key(&mut command, *user);
                command.arg(user);
                command
            }
            // Asked in ways of their own.
            Op::Register { .. } | Op::Bind { .. } | Op::Unbind { .. } => command("PING", 1),
            Op::ListChat { user, chat } => {
                let mut command = redis::cmd("ZADD");
                command.arg(chats_key(user)).arg(0).arg(chat);
                command
            }
            Op::Chats { user, after, until, limit } => {
                let mut command = redis::cmd("ZRANGEBYLEX");
                command.arg(chats_key(user));
                command.arg(if after.is_empty() { "-".to_owned() } else { format!("({after}") });
                command.arg(if until.is_empty() { "+".to_owned() } else { format!("[{until}") });
                command.arg("LIMIT").arg(0).arg(limit);
                command
            }
            Op::Append(append) => {
                let tag = tag(&append.chat);
                let chat = &append.chat;
                let mut command = Script::Append.call(&[
                    &chat_key(chat),
                    &format!("{tag}:ids:{chat}:{}:{:016x}", append.sender, append.stream),
                    &messages_key(chat),
                    &format!("{tag}:recent"),
                    &history_key(chat),
                ]);
                let refused = append.refusal.is_some();
                let body: &[u8] = if refused { &[] } else { &append.body };
                command.arg(append.n).arg(chat).arg(&append.sender).arg(body);
                command.arg(message_crc(chat, &append.sender, body));
                command.arg(append.refusal.map_or(0, |code| code as i32));
                command.arg(self.dedupe_seconds).arg(proto::UNANSWERED_MAX).arg(new_history());
                command
            }
            Op::Head { chat, user } => {
                let mut command = Script::Head.call(&[&chat_key(chat), &history_key(chat)]);
                command.arg(user);
                command
            }
            Op::Pull { chat, cursor, limit, reverse } => {
                let mut command =
                    Script::Pull.call(&[&chat_key(chat), &messages_key(chat), &history_key(chat)]);
                command.arg(cursor).arg(limit).arg(u8::from(*reverse)).arg(crate::store::PULL_BYTES_MAX);
                command
            }
            Op::Delivered { chat, user, seq } => {
                let mut command = Script::Delivered.call(&[&chat_key(chat)]);
                command.arg(user).arg(seq);
                command
            }
            Op::TrimRecency { bucket, before_us } => {
                let mut command = redis::cmd("ZREMRANGEBYSCORE");
                command.arg(format!("{{c{bucket:04}}}:recent")).arg("-inf").arg(format!("({before_us}"));
                command
            }
        }
    }

    fn put_route_key(&self, command: &mut Cmd, user: u64) {
        command.write_arg_fmt(format_args!("route:{:05}", user % u64::from(self.route_buckets)));
    }
}

/// Most that one operation takes: known? claim, winner, forget; and one round in which the scripts were not there.
const ROUNDS_MAX: usize = 6;

#[async_trait::async_trait]
impl Store for RedisStore {
    async fn apply(&self, ops: &[Op]) -> Vec<Outcome> {
        let mut rounds = Rounds::new(ops, &self.hints);
        // Scripts are loaded once: if they vanish again the clients ask again.
        let mut loaded = false;
        for _ in 0..ROUNDS_MAX {
            let asks = rounds.next();
            if asks.is_empty() {
                break;
            }
            let replies = match self.send(ops, &asks).await {
                Ok(replies) => replies,
                Err(error) => {
                    let error = unknown(error);
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
                    Ok(value) => rounds.answered(ask, value),
                }
            }
            if unscripted {
                loaded = true;
                if self.load_scripts().await.is_err() {
                    break;
                }
            }
        }
        rounds.done(&self.hints)
    }

    async fn durability(&self) -> Result<(Durability, String), StoreError> {
        let wanted = [
            ("appendonly", "yes"),
            ("appendfsync", "always"),
            ("no-appendfsync-on-rewrite", "no"),
            ("maxmemory-policy", "noeviction"),
        ];
        let mut command = redis::cmd("CONFIG");
        command.arg("GET");
        for (name, _) in wanted {
            command.arg(name);
        }
        let found: std::collections::HashMap<String, String> =
            command.query_async(&mut self.connection.clone()).await.map_err(unknown)?;
        let wrong: Vec<String> = wanted
            .iter()
            .filter(|(name, value)| found.get(*name).is_none_or(|found| found != value))
            .map(|(name, value)| {
                format!("{name} is {}, not {value}", found.get(*name).map_or("not told", String::as_str))
            })
            .collect();
        if wrong.is_empty() {
            Ok((Durability::Strict, "Redis fsyncs before it answers".to_owned()))
        } else {
            Ok((Durability::Weak, wrong.join(", ")))
        }
    }
}

const META: &str = "rookery:meta";
const INCARNATIONS: &str = "rookery:incarnations";
const USERS: &str = "rookery:users";

/// A call of at least so many operations may have a connection of its own.
const LOGINS_MIN: usize = 16;

/// Whether the call is delivered cursors alone, or logins and departures alone, and many.
fn is_bulk(ops: &[Op]) -> bool {
    let of_login = |op: &Op| matches!(op, Op::Register { .. } | Op::Bind { .. } | Op::Unbind { .. });
    let of_cursor = |op: &Op| matches!(op, Op::Delivered { .. });
    ops.iter().all(of_cursor) || ops.len() >= LOGINS_MIN && ops.iter().all(of_login)
}

/// A command whose arguments are small.
fn command(name: &str, args: usize) -> Cmd {
    let mut command = Cmd::with_capacity(args, 64);
    command.arg(name);
    command
}

fn registered(op: &Op) -> (&str, u64) {
    match op {
        Op::Register { name, candidate } => (name, *candidate),
        _ => ("", 0),
    }
}

fn user_number(name: &str) -> Cmd {
    let mut command = command("HGET", 3);
    put_user_key(&mut command, name);
    command.arg(name);
    command
}

fn tag(chat: &str) -> String {
    format!("{{c{:04}}}", chat_bucket(chat))
}

fn chat_key(chat: &str) -> String {
    format!("{}:chat:{chat}", tag(chat))
}

fn messages_key(chat: &str) -> String {
    format!("{}:messages:{chat}", tag(chat))
}

fn history_key(chat: &str) -> String {
    format!("{}:history", tag(chat))
}

fn put_user_key(command: &mut Cmd, name: &str) {
    let bucket = crc32c::crc32c(name.as_bytes()) % USER_BUCKETS;
    command.write_arg_fmt(format_args!("user:{bucket:05}"));
}

fn put_name_key(command: &mut Cmd, user: u64) {
    command.write_arg_fmt(format_args!("name:{:05}", user % u64::from(USER_BUCKETS)));
}

fn chats_key(user: &str) -> String {
    format!("chats:{user}")
}

/// Never 0, which on the wire means "none known".
fn new_history() -> u64 {
    rand::random_range(1..=u64::MAX)
}

fn unknown(error: RedisError) -> StoreError {
    StoreError::Unknown(error.to_string())
}

/// An error that Redis itself answered: the command was not done.
fn refused(error: RedisError) -> StoreError {
    if error.is_io_error() { unknown(error) } else { StoreError::Refused(error.to_string()) }
}
