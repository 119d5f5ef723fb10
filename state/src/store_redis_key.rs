//! The names of keys in Redis. Pure.
//!
//! Trap: every name is part of the layout. What changes here needs a migration (`store_redis_layout`).

use redis::{Cmd, RedisWrite};

use crate::store::chat_bucket;

/// Hash: the layout, and what [`crate::store_redis_record`] records.
pub const META: &str = "rookery:meta";
/// Counter of lives of gateways.
pub const INCARNATIONS: &str = "rookery:incarnations";
/// Counter of users' numbers.
pub const USERS: &str = "rookery:users";
/// Hash: SERVER/LIFE → how far it has pushed, and [`STAMP`].
pub const MARKS: &str = "rookery:marks";
/// Field of [`MARKS`] that rises with each of them. No server is called so.
pub const STAMP: &str = "#";

/// Buckets of users, both ways. Part of the layout: 1 M users are 31 a bucket, which stay listpacks.
pub const USER_BUCKETS: u32 = 32_768;

/// What all keys of a bucket begin with, so that they stand in one slot.
pub fn tag(bucket: u32) -> String {
    format!("{{c{bucket:04}}}")
}

/// Hash: where a chat stands.
pub fn chat(chat: &str) -> String {
    format!("{}:chat:{chat}", tag(chat_bucket(chat)))
}

/// The chat of such a key.
pub fn chat_of(key: &str) -> Option<&str> {
    key.split_once("}:chat:").map(|(_, chat)| chat)
}

/// Glob for the keys of all chats.
pub const ALL_CHATS: &str = "{c????}:chat:*";

/// Stream: the messages of a chat.
pub fn messages(chat: &str) -> String {
    format!("{}:messages:{chat}", tag(chat_bucket(chat)))
}

/// Hash: everybody who is or was in a group.
pub fn members(chat: &str) -> String {
    format!("{}:members:{chat}", tag(chat_bucket(chat)))
}

/// Hash: the newest ids of a sender's stream, and their answers.
pub fn ids(chat: &str, sender: &str, stream: u64) -> String {
    format!("{}:ids:{chat}:{sender}:{stream:016x}", tag(chat_bucket(chat)))
}

/// String, expires: digest of the body and answer of a message that its sender named.
pub fn named(chat: &str, sender: &str, name: &str) -> String {
    // No sender's name holds a colon, so that no two have one key.
    format!("{}:named:{chat}:{sender}:{name}", tag(chat_bucket(chat)))
}

/// String: the history of a bucket.
/// `lua/append.lua` makes the name of the stream of events from it, with `:events` in the place of `:history`.
pub fn history(bucket: u32) -> String {
    format!("{}:history", tag(bucket))
}

/// Sorted set: the chats of a bucket by their newest message.
pub fn recent(bucket: u32) -> String {
    format!("{}:recent", tag(bucket))
}

/// Sorted set: the chats of a user.
pub fn chats(user: &str) -> String {
    format!("chats:{user}")
}

/// Field of a life in [`MARKS`].
pub fn mark(server: &str, life: u64) -> String {
    format!("{server}/{life}")
}

/// Hash: a user's revocations, in the slot of his routes, which stand in this bucket.
pub fn revoked(route_bucket: u64, user: u64) -> String {
    format!("revoked:{{route:{route_bucket:05}}}:{user}")
}

/// Appends the hash of when the users of `route`, a hash of routes, were seen last, and what they hide; in its slot.
/// `lua/unbind.lua` makes the same name.
pub fn put_seen(command: &mut Cmd, route: std::fmt::Arguments<'_>) {
    command.write_arg_fmt(format_args!("seen:{{{route}}}"));
}

/// Hash: the user's number.
pub fn user(name: &str) -> String {
    format!("user:{:05}", user_bucket(name))
}

/// Appends that hash.
pub fn put_user(command: &mut Cmd, name: &str) {
    command.write_arg_fmt(format_args!("user:{:05}", user_bucket(name)));
}

fn user_bucket(name: &str) -> u32 {
    crc32c::crc32c(name.as_bytes()) % USER_BUCKETS
}

/// Appends the hash that has the number's user.
pub fn put_name(command: &mut Cmd, user: u64) {
    command.write_arg_fmt(format_args!("name:{:05}", user % u64::from(USER_BUCKETS)));
}
