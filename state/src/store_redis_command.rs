//! Commands to Redis: what is asked of it, as it reads it. Pure, but for how far retention has come.
//!
//! Trap: what a script reads by place is written here by place; each names its script.

use parking_lot::Mutex;
use redis::{Cmd, RedisWrite};

use crate::config::StoreConfig;
use crate::group::Act;
use crate::store::{
    CHAT_BUCKETS, MessageId, Op, body_digest, chat_bucket, message_crc, peer, retention_step,
};
use crate::store_redis_key as key;
use crate::store_redis_layout::new_history;
use crate::store_redis_read::Sweep;
use crate::store_redis_round::Ask;
use crate::store_redis_script::Script;

/// Commands as one configuration has them.
pub struct Commands {
    /// Of each bucket: how far retention has come.
    sweeps: Vec<Mutex<Sweep>>,
    route_buckets: u32,
    dedupe_seconds: u64,
    named_seconds: u64,
    /// Events that a bucket keeps; 0: none are written.
    events_max: u64,
    messages_max: u64,
    kept_us: u64,
}

impl Commands {
    /// As configured.
    pub fn new(config: &StoreConfig) -> Self {
        Commands {
            sweeps: (0..CHAT_BUCKETS).map(|_| Mutex::default()).collect(),
            route_buckets: config.route_buckets,
            dedupe_seconds: u64::from(config.dedupe_days) * 86_400,
            named_seconds: u64::from(config.named_ids_hours) * 3_600,
            events_max: if config.events { config.events_max } else { 0 },
            messages_max: config.retention_messages_max,
            kept_us: u64::from(config.retention_days) * 86_400 * 1_000_000,
        }
    }

    /// Retention has come so far in this bucket.
    pub fn swept(&self, bucket: u32, sweep: Sweep) {
        if let Some(at) = self.sweeps.get(bucket as usize) {
            *at.lock() = sweep;
        }
    }

    /// The command for something that is asked.
    pub fn ask(&self, ops: &[Op], ask: &Ask) -> Cmd {
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

/// Delivered and read cursors, for `lua/delivered.lua`.
fn delivered(ops: &[Op], some: &[usize]) -> Cmd {
    let mut command = Script::Delivered.of(some.len(), 96 * some.len());
    let cursors = || {
        some.iter().filter_map(|op| match &ops[*op] {
            Op::Delivered { chat, user, seq, read } => Some((chat, user, seq, read)),
            _ => None,
        })
    };
    for (chat, ..) in cursors() {
        command.arg(key::chat(chat));
    }
    for (_, user, seq, read) in cursors() {
        command.arg(user).arg(seq).arg(read);
    }
    command
}

/// A group and everybody in it, by `lua/members.lua`.
fn members(chat: &str, cursors: bool) -> Cmd {
    let mut command = Script::Members.call(&[&key::chat(chat), &key::members(chat)]);
    command.arg(u8::from(cursors));
    command
}

/// What a message changes in its group, as `lua/group.lua` reads it.
fn put_change(command: &mut Cmd, act: &Act) {
    let Act::Change(change) = act else {
        command.arg(0);
        return;
    };
    command.arg(change.action as i32).arg(&change.title).arg(change.members_max);
    for named in &change.named {
        command.arg(&named.user).arg(named.number).arg(named.role as i32);
    }
}

/// A command whose arguments are small.
fn command(name: &str, args: usize) -> Cmd {
    let mut command = Cmd::with_capacity(args, 64);
    command.arg(name);
    command
}

/// Name and new number of a Register or Renumber.
fn registered(op: &Op) -> (&str, u64) {
    match op {
        Op::Register { name, candidate: number } | Op::Renumber { name, to: number, .. } => (name, *number),
        _ => ("", 0),
    }
}

/// Forgets the name of a number.
fn unnamed(user: u64) -> Cmd {
    let mut command = command("HDEL", 3);
    key::put_name(&mut command, user);
    command.arg(user);
    command
}

/// Asks for a user's number.
fn user_number(name: &str) -> Cmd {
    let mut command = command("HGET", 3);
    key::put_user(&mut command, name);
    command.arg(name);
    command
}
