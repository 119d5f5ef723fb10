//! The Lua scripts of the Redis store. Each is one atomic step in one slot.
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
    User,
    Delivered,
    Head,
    Pull,
    Incarnate,
}

/// Wraps around below 2^24 and leaves out 0.
const INCARNATE: &str = "return (redis.call('INCR', KEYS[1]) - 1) % 16777215 + 1";

/// In the order of [`Script`].
pub static SCRIPTS: LazyLock<[Source; 8]> = LazyLock::new(|| {
    [
        include_str!("lua/append.lua"),
        include_str!("lua/bind.lua"),
        include_str!("lua/unbind.lua"),
        include_str!("lua/user.lua"),
        include_str!("lua/delivered.lua"),
        include_str!("lua/head.lua"),
        include_str!("lua/pull.lua"),
        INCARNATE,
    ]
    .map(|text| Source { text, sha: redis::Script::new(text).get_hash().to_owned() })
});

impl Script {
    /// The call with its keys; arguments are appended behind.
    pub fn call(self, keys: &[&str]) -> Cmd {
        let mut command = redis::cmd("EVALSHA");
        command.arg(&SCRIPTS[self as usize].sha).arg(keys.len()).arg(keys);
        command
    }
}
