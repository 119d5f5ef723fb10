//! What happens on every new connection to Redis before anything else goes over it: the layout is compared, written or
//! migrated, and the histories are kept or drawn anew as `store_redis_record` judges.
//!
//! Trap: a kill may come between any two commands. The layout's number is written last, and so is the run id; everything
//! before may be done again.

use std::collections::HashMap;

use redis::aio::ConnectionLike;
use redis::{FromRedisValue, Pipeline, RedisError, RedisResult, Value};

use crate::store::{CHAT_BUCKETS, StoreError, chat_bucket};
use crate::store_redis_key as key;
use crate::store_redis_record::{Found, Record, STRICT, Seen, Verdict, judge, promise};
use crate::store_redis_script::{SCRIPTS, Script};

/// Looks at the store at the other end, and makes it one that this server may use.
pub async fn prepare(
    connection: &mut impl ConnectionLike,
    route_buckets: u32,
    seen: &Seen,
) -> Result<(), StoreError> {
    let ours = [
        ("layout", proto::STORE_LAYOUT),
        ("chat_buckets", CHAT_BUCKETS),
        ("route_buckets", route_buckets),
        ("user_buckets", key::USER_BUCKETS),
    ];
    // One and the same for question and judgement: answers on their way may still add to it.
    let known = seen.known();
    let newest = known.as_ref().and_then(|known| known.newest.as_ref()).map(|(chat, _)| chat.as_str());
    let (mut found, mut meta) = look(connection, newest).await?;
    let is_empty = !meta.contains_key("layout");
    // Whoever knew another one before has lost it.
    let is_new = is_empty && known.is_none();
    if is_empty {
        let mut pipe = redis::pipe();
        // The layout last: it says that the others are there.
        for (field, value) in ours.into_iter().rev() {
            pipe.hset_nx(key::META, field, value).ignore();
        }
        pipe.exec_async(connection).await.map_err(unknown)?;
        (found, meta) = look(connection, newest).await?;
    }
    compare(&meta, &ours)?;
    load_scripts(connection).await?;
    if meta.get("layout").is_some_and(|layout| layout == "1") {
        migrate(connection, &found, usize::MAX).await?;
        (found, _) = look(connection, newest).await?;
    }
    let strict = u8::from(found.strict);
    let id = match judge(&found, known.as_ref()) {
        Verdict::Draw(why) => {
            if is_new {
                tracing::info!(run = found.run, "the store is new: its histories are drawn");
            } else {
                tracing::warn!(run = found.run, "all histories are drawn anew: {why}");
            }
            draw(connection, &found.run, strict).await?
        }
        verdict => {
            if verdict == Verdict::Record {
                let fields = [("run", found.run.clone()), ("strict", strict.to_string())];
                let () = redis::Cmd::hset_multiple(key::META, &fields)
                    .query_async(connection)
                    .await
                    .map_err(unknown)?;
            }
            found.record.as_ref().map(|record| record.id.clone()).unwrap_or_default()
        }
    };
    seen.adopt(&found.run, &id, found.stamp);
    Ok(())
}

/// Gives Redis the scripts that it forgets at every start.
pub async fn load_scripts(connection: &mut impl ConnectionLike) -> Result<(), StoreError> {
    let mut pipe = redis::pipe();
    for script in SCRIPTS.iter() {
        pipe.cmd("SCRIPT").arg("LOAD").arg(script.text).ignore();
    }
    pipe.exec_async(connection).await.map_err(unknown)
}

/// Asks for the settings that [`promise`] compares.
fn ask_promise(pipe: &mut Pipeline) {
    let command = pipe.cmd("CONFIG").arg("GET");
    for (name, _) in STRICT {
        command.arg(name);
    }
}

/// Reads them. A Redis that does not tell promises nothing.
fn promised(reply: RedisResult<Value>) -> Result<(), String> {
    match reply.map(HashMap::<String, String>::from_redis_value) {
        Ok(Ok(config)) => promise(&config),
        Ok(Err(error)) => Err(error.to_string()),
        Err(error) => Err(format!("Redis does not tell its settings: {error}")),
    }
}

/// What a connection that is in use tells of its store: what it promises, which it is, and whether it is recorded as strict.
pub async fn look_again(
    connection: &mut impl ConnectionLike,
) -> Result<(Result<(), String>, Option<String>, Option<String>), StoreError> {
    let mut pipe = redis::pipe();
    ask_promise(&mut pipe);
    pipe.cmd("HMGET").arg(key::META).arg("id").arg("strict");
    let replies: Vec<RedisResult<Value>> =
        pipe.ignore_errors().query_async(connection).await.map_err(unknown)?;
    let mut replies = replies.into_iter();
    let mut next = || replies.next().unwrap_or(Ok(Value::Nil));
    let (promised, record) = (promised(next()), next().map_err(refused)?);
    let (id, strict) =
        redis::from_redis_value(record).map_err(|error| StoreError::Corrupt(error.to_string()))?;
    Ok((promised, id, strict))
}

/// The newest stamp.
pub async fn stamp(connection: &mut impl ConnectionLike) -> Result<u64, StoreError> {
    let found: RedisResult<Option<u64>> =
        redis::Cmd::hget(key::MARKS, key::STAMP).query_async(connection).await;
    Ok(found.map_err(unknown)?.unwrap_or(0))
}

/// Everything that the judgement needs, in one round trip.
async fn look(
    connection: &mut impl ConnectionLike,
    newest: Option<&str>,
) -> Result<(Found, HashMap<String, String>), StoreError> {
    let mut pipe = redis::pipe();
    ask_promise(&mut pipe);
    pipe.cmd("INFO").arg("server").hgetall(key::META).hget(key::MARKS, key::STAMP);
    // Of no chat at all when none is known.
    pipe.hget(newest.map_or_else(|| key::META.to_owned(), key::chat), "seq");
    let replies: Vec<RedisResult<Value>> =
        pipe.ignore_errors().query_async(connection).await.map_err(unknown)?;
    let mut replies = replies.into_iter();
    let mut next = || replies.next().unwrap_or(Ok(Value::Nil));
    let strict = promised(next()).is_ok();
    let info: String = read(next())?;
    let meta: HashMap<String, String> = read(next())?;
    let stamp: Option<u64> = read(next())?;
    let newest_seq: Option<u64> = read(next())?;
    let run = info.lines().find_map(|line| line.strip_prefix("run_id:")).map(str::trim);
    let run = run.ok_or_else(|| StoreError::Corrupt("Redis tells no run_id".to_owned()))?.to_owned();
    let found = Found {
        run,
        strict,
        record: Record::read(&meta),
        stamp: stamp.unwrap_or(0),
        newest_seq: newest_seq.unwrap_or(0),
    };
    Ok((found, meta))
}

fn compare(meta: &HashMap<String, String>, ours: &[(&str, u32)]) -> Result<(), StoreError> {
    for (field, ours) in ours {
        let stored = meta.get(*field).map_or("none", String::as_str);
        if stored == ours.to_string() || (*field == "layout" && stored == "1") {
            continue;
        }
        let newer = *field == "layout" && stored.parse().is_ok_and(|stored: u32| stored > *ours);
        let advice = if newer {
            "use the version that it was made with or a newer one, or another store".to_owned()
        } else {
            format!("use the version and store.{field} it was made with, or another store")
        };
        return Err(StoreError::Corrupt(format!(
            "this store was made with {field} = {stored}, this server is set to {ours}: {advice}"
        )));
    }
    Ok(())
}

/// Draws all histories anew, unless somebody has done so under this run. The id of what the store holds now.
async fn draw(connection: &mut impl ConnectionLike, run: &str, strict: u8) -> Result<String, StoreError> {
    let keys: Vec<String> =
        std::iter::once(key::META.to_owned()).chain((0..CHAT_BUCKETS).map(key::history)).collect();
    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
    let mut command = Script::Draw.call(&keys);
    command.arg(run).arg(strict).arg(new_id());
    for _ in 0..CHAT_BUCKETS {
        command.arg(new_history());
    }
    command.query_async(connection).await.map_err(unknown)
}

/// From layout 1, in place: every chat into the recency index, with the time of its oldest message. Stops behind so many
/// chats. Histories stay, for nothing was lost.
async fn migrate(
    connection: &mut impl ConnectionLike,
    found: &Found,
    chats_max: usize,
) -> Result<(), StoreError> {
    tracing::info!("the store is migrated from layout 1 to 2: another version must not use it meanwhile");
    let (mut cursor, mut chats) = ("0".to_owned(), 0);
    loop {
        let mut scan = redis::cmd("SCAN");
        scan.arg(&cursor).arg("MATCH").arg(key::ALL_CHATS).arg("COUNT").arg(SCANNED_AT_ONCE.min(chats_max));
        let (next, keys): (String, Vec<String>) = scan.query_async(connection).await.map_err(unknown)?;
        let mut pipe = redis::pipe();
        for chat in keys.iter().filter_map(|key| key::chat_of(key)) {
            pipe.cmd("EVAL").arg(include_str!("lua/migrate.lua")).arg(3).arg(key::chat(chat));
            pipe.arg(key::messages(chat)).arg(key::recent(chat_bucket(chat))).arg(chat).ignore();
            chats += 1;
        }
        if !pipe.is_empty() {
            pipe.exec_async(connection).await.map_err(unknown)?;
        }
        if chats / LOGGED_CHATS > (chats - keys.len()) / LOGGED_CHATS {
            tracing::info!(chats, "the store is being migrated");
        }
        if chats >= chats_max {
            return Ok(());
        }
        if next == "0" {
            break;
        }
        cursor = next;
    }
    let mut last = redis::cmd("EVAL");
    last.arg(include_str!("lua/migrated.lua")).arg(1).arg(key::META);
    last.arg(&found.run).arg(u8::from(found.strict)).arg(new_id());
    let _: i64 = last.query_async(connection).await.map_err(unknown)?;
    tracing::info!(chats, "the store is migrated to layout 2");
    Ok(())
}

/// Keys that one SCAN looks at: some ms of Redis with the scripts behind it.
const SCANNED_AT_ONCE: usize = 1_000;

/// Chats between two lines of the log.
const LOGGED_CHATS: usize = 100_000;

/// Never 0, which on the wire means "none known".
pub fn new_history() -> u64 {
    rand::random_range(1..=u64::MAX)
}

fn new_id() -> String {
    format!("{:016x}", new_history())
}

fn read<T: FromRedisValue>(reply: RedisResult<Value>) -> Result<T, StoreError> {
    let value = reply.map_err(unknown)?;
    T::from_redis_value(value).map_err(|error| StoreError::Corrupt(error.to_string()))
}

/// A command that may have been done or not.
pub fn unknown(error: RedisError) -> StoreError {
    StoreError::Unknown(error.to_string())
}

/// An error that Redis itself answered: the command was not done.
pub fn refused(error: RedisError) -> StoreError {
    if error.is_io_error() { unknown(error) } else { StoreError::Refused(error.to_string()) }
}
