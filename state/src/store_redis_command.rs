//! Commands to Redis that need nothing of the store but their operation. Pure.
//!
//! Trap: what a script reads by place is written here by place; each names its script.

use redis::Cmd;

use crate::group::Act;
use crate::store::Op;
use crate::store_redis_key as key;
use crate::store_redis_script::Script;

/// Delivered and read cursors, for `lua/delivered.lua`.
pub fn delivered(ops: &[Op], some: &[usize]) -> Cmd {
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
pub fn members(chat: &str, cursors: bool) -> Cmd {
    let mut command = Script::Members.call(&[&key::chat(chat), &key::members(chat)]);
    command.arg(u8::from(cursors));
    command
}

/// What a message changes in its group, as `lua/group.lua` reads it.
pub fn put_change(command: &mut Cmd, act: &Act) {
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
pub fn command(name: &str, args: usize) -> Cmd {
    let mut command = Cmd::with_capacity(args, 64);
    command.arg(name);
    command
}

/// Name and new number of a Register or Renumber.
pub fn registered(op: &Op) -> (&str, u64) {
    match op {
        Op::Register { name, candidate: number } | Op::Renumber { name, to: number, .. } => (name, *number),
        _ => ("", 0),
    }
}

/// Forgets the name of a number.
pub fn unnamed(user: u64) -> Cmd {
    let mut command = command("HDEL", 3);
    key::put_name(&mut command, user);
    command.arg(user);
    command
}

/// Asks for a user's number.
pub fn user_number(name: &str) -> Cmd {
    let mut command = command("HGET", 3);
    key::put_user(&mut command, name);
    command.arg(name);
    command
}
