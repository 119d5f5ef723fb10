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

use proto::link;
use proto::wire::Durability;
use redis::{Cmd, Pipeline, RedisResult, Value};

use crate::config::StoreConfig;
use crate::store::{Answer, Appended, Op, Outcome, Store, StoreError};
use crate::store_redis_command::Commands;
use crate::store_redis_connection::{Connection, Dialer};
use crate::store_redis_key as key;
use crate::store_redis_layout::{self as layout, load_scripts, refused, unknown};
use crate::store_redis_read::{stamp, swept};
use crate::store_redis_record::Seen;
use crate::store_redis_round::{Ask, Hints, Rounds, is_bulk, is_read_behind};

/// Redis.
pub struct RedisStore {
    connection: Connection,
    /// For what nobody waits for, and for storms.
    bulk: Connection,
    seen: Arc<Seen>,
    hints: Hints,
    commands: Commands,
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
            commands: Commands::new(config),
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
            pipe.add_command(self.commands.ask(ops, ask));
        }
        pipe.ignore_errors().query_async(&mut connection).await.map_err(unknown)
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
                if let Some(sweep) = swept(value) {
                    self.commands.swept(*bucket, sweep);
                }
            }
            _ => {}
        }
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
