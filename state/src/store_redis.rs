//! The store on Redis: one Lua script or command per operation, one pipelined round trip per call.
//!
//! Keys. `{cNNNN}` is the bucket of a chat, so that a chat stands in one slot also in Redis Cluster:
//! `{cNNNN}:chat:CHAT` hash `seq` `time` `d:USER`; `{cNNNN}:messages:CHAT` stream with id `SEQ-0`;
//! `{cNNNN}:ids:CHAT:SENDER:STREAM` hash `w` and a ring of answers; `{cNNNN}:recent` zset of chats by time;
//! `{cNNNN}:history`. `route:NNNNN` hash user → entries of 20 bytes. `user:NNNNN` hash name → number.
//! `name:NNNNN` hash number → name. `chats:USER` zset, all of score 0. `rookery:meta` hash, `rookery:incarnations`,
//! `rookery:users` counters.
//!
//! Trap: scripts vanish when Redis restarts. An operation answered NOSCRIPT was not done, and every later script of that
//! call was not done either, so they are loaded and those operations alone are sent again, in order.

use std::time::Duration;

use proto::wire::Durability;
use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use redis::{Cmd, Pipeline, RedisError, RedisResult, Value};

use crate::config::StoreConfig;
use crate::store::{Op, Outcome, Store, StoreError, chat_bucket, message_crc};
use crate::store_redis_read as reply;
use crate::store_redis_script::{SCRIPTS, Script};

/// Redis.
pub struct RedisStore {
    connection: ConnectionManager,
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
        let connection = ConnectionManager::new_with_config(client, manager).await.map_err(unknown)?;
        let store = RedisStore {
            connection,
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

    async fn send(&self, commands: &[(usize, Cmd)]) -> RedisResult<Vec<RedisResult<Value>>> {
        let mut pipe = Pipeline::with_capacity(commands.len());
        for (_, command) in commands {
            pipe.add_command(command.clone());
        }
        pipe.ignore_errors().query_async(&mut self.connection.clone()).await
    }

    fn command(&self, op: &Op) -> Cmd {
        match op {
            Op::Incarnate => Script::Incarnate.call(&[INCARNATIONS]),
            Op::UserNumbers { count } => {
                let mut command = Script::UserNumbers.call(&[USERS]);
                command.arg(count);
                command
            }
            Op::Register { name, candidate } => {
                let mut command = Script::User.call(&[&user_key(name)]);
                command.arg(name).arg(candidate);
                command
            }
            Op::User { name } => get(&user_key(name), name),
            Op::NameUser { user, name } => {
                let mut command = redis::cmd("HSETNX");
                command.arg(name_key(*user)).arg(user).arg(name);
                command
            }
            Op::Name { user } => get(&name_key(*user), &user.to_string()),
            Op::Bind { user, device, attempt, connection, devices_max } => {
                let mut command = Script::Bind.call(&[&self.route_key(*user)]);
                command.arg(user).arg(&device.to_be_bytes()).arg(&attempt.to_be_bytes());
                command.arg(&connection.to_be_bytes()).arg(attempt).arg(devices_max);
                command
            }
            Op::Unbind { user, connection } => {
                let mut command = Script::Unbind.call(&[&self.route_key(*user)]);
                command.arg(user).arg(&connection.to_be_bytes());
                command
            }
            Op::Routes { user } => get(&self.route_key(*user), &user.to_string()),
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

    fn route_key(&self, user: u64) -> String {
        format!("route:{:05}", user % u64::from(self.route_buckets))
    }
}

#[async_trait::async_trait]
impl Store for RedisStore {
    async fn apply(&self, ops: &[Op]) -> Vec<Outcome> {
        let mut outcomes: Vec<Outcome> = vec![Err(StoreError::Unknown("not sent".to_owned())); ops.len()];
        let mut left: Vec<(usize, Cmd)> = ops.iter().map(|op| self.command(op)).enumerate().collect();
        // At most twice: scripts are loaded once, and if they vanish again the clients ask again.
        for round in 0..2 {
            if left.is_empty() {
                break;
            }
            let replies = match self.send(&left).await {
                Ok(replies) => replies,
                Err(error) => {
                    left.iter().for_each(|(at, _)| outcomes[*at] = Err(unknown(error.clone())));
                    break;
                }
            };
            let mut unscripted = Vec::new();
            for ((at, command), reply) in left.into_iter().zip(replies) {
                match reply {
                    Err(error) if error.code() == Some("NOSCRIPT") && round == 0 => {
                        outcomes[at] = Err(StoreError::Refused("scripts are being loaded".to_owned()));
                        unscripted.push((at, command));
                    }
                    Err(error) => outcomes[at] = Err(refused(error)),
                    Ok(value) => outcomes[at] = reply::answer(&ops[at], value),
                }
            }
            if !unscripted.is_empty() && self.load_scripts().await.is_err() {
                break;
            }
            left = unscripted;
        }
        outcomes
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

fn get(key: &str, field: &str) -> Cmd {
    let mut command = redis::cmd("HGET");
    command.arg(key).arg(field);
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

fn user_key(name: &str) -> String {
    format!("user:{:05}", crc32c::crc32c(name.as_bytes()) % USER_BUCKETS)
}

fn name_key(user: u64) -> String {
    format!("name:{:05}", user % u64::from(USER_BUCKETS))
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
