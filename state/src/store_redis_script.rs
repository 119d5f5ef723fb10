//! The Lua scripts of the Redis store. Each is one atomic step in one slot, but for Bind, Unbind and Delivered, which take many
//! operations, each a step of its own in a slot of its own, and Draw, which changes all buckets or none.
//!
//! Trap: Lua numbers are doubles, and `tostring` of a large one gives `1.7e+15`. Numbers that leave a script go through
//! `%.0f`; what needs 64 bits (connections, histories) stays a string.

use std::sync::LazyLock;

use redis::Cmd;

/// A script's text and the name that Redis gives it.
pub struct Source {
    /// Lua.
    pub text: &'static str,
    sha: String,
}

/// Names a script in [`SCRIPTS`].
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub enum Script {
    Append,
    Bind,
    Unbind,
    Revoke,
    Retire,
    Renumber,
    Vacate,
    Delivered,
    Head,
    Pull,
    Incarnate,
    UserNumbers,
    Mark,
    Lose,
    Expire,
    Draw,
    Member,
    Members,
}

/// Wraps around below 2^24 and leaves out 0. Both counters are never behind the clock: a store that came back empty, or as an older
/// copy, must not give out numbers that are still in use.
const INCARNATE: &str = "local now = redis.call('TIME')[1] \
if (tonumber(redis.call('GET', KEYS[1])) or 0) < tonumber(now) then redis.call('SET', KEYS[1], now) end \
return (redis.call('INCR', KEYS[1]) - 1) % 16777215 + 1";

/// Seconds × 2^20: a million users a second for 270 years fit what a double holds. The low bits go on where they were: buckets are
/// chosen by them.
const USER_NUMBERS: &str = "local now, at = redis.call('TIME')[1] * 1048576, tonumber(redis.call('GET', KEYS[1])) or 0 \
if at < now then redis.call('SET', KEYS[1], string.format('%.0f', now + at % 1048576)) end \
return redis.call('INCRBY', KEYS[1], ARGV[1])";

/// KEYS: 1 the name's row (hash)   ARGV: 1 name, 2 number that it has, 3 number that it gets
const RENUMBER: &str = "if redis.call('HGET', KEYS[1], ARGV[1]) == ARGV[2] then \
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3]) end return 1";

/// A group, one of its rows, and the stays before that. KEYS: 1 chat (hash), 2 members (hash)   ARGV: 1 user
const MEMBER: &str = "local at = redis.call('HMGET', KEYS[1], 'gv', 'gt', 'gn', 'gr', 'gd', 'p:' .. ARGV[1]) \
for i = 1, 6 do at[i] = at[i] or '' end \
local past = table.remove(at) \
return {at, redis.call('HGET', KEYS[2], ARGV[1]) or '', past}";

/// In the order of [`Script`].
pub static SCRIPTS: LazyLock<[Source; 18]> = LazyLock::new(|| {
    [
        concat!(include_str!("lua/trim.lua"), include_str!("lua/group.lua"), include_str!("lua/append.lua")),
        concat!(include_str!("lua/presence.lua"), include_str!("lua/bind.lua")),
        concat!(include_str!("lua/presence.lua"), include_str!("lua/unbind.lua")),
        include_str!("lua/revoke.lua"),
        concat!(include_str!("lua/presence.lua"), include_str!("lua/retire.lua")),
        RENUMBER,
        concat!(include_str!("lua/trim.lua"), include_str!("lua/vacate.lua")),
        include_str!("lua/delivered.lua"),
        include_str!("lua/head.lua"),
        include_str!("lua/pull.lua"),
        INCARNATE,
        USER_NUMBERS,
        include_str!("lua/mark.lua"),
        include_str!("lua/lose.lua"),
        concat!(include_str!("lua/trim.lua"), include_str!("lua/expire.lua")),
        include_str!("lua/draw.lua"),
        MEMBER,
        include_str!("lua/members.lua"),
    ]
    .map(|text| Source { text, sha: redis::Script::new(text).get_hash().to_owned() })
});

impl Script {
    /// The call with its keys; arguments are appended behind.
    pub fn call(self, keys: &[&str]) -> Cmd {
        let mut command = self.of(keys.len(), 16 + 48 * keys.len());
        command.arg(keys);
        command
    }

    /// The call that so many keys and then arguments are to be appended to, about so many bytes.
    pub fn of(self, keys: usize, bytes: usize) -> Cmd {
        let sha = &SCRIPTS[self as usize].sha;
        let mut command = Cmd::with_capacity(8 + 6 * keys, bytes + sha.len() + 16);
        command.arg("EVALSHA").arg(sha).arg(keys);
        command
    }
}
