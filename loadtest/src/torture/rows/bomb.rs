//! A9: a message to everybody in a group of ten thousand, each of whom acknowledges it, again and again, and those who have nothing
//! to do with it. A13: a group that is written to faster than its members can be told. Main thread.
//!
//! Trap: how long the last delivery took is read off by whoever receives all of them, on the same two cores: it is an upper bound.

use std::time::{Duration, Instant};

use client::inbox;
use prost::Message;
use proto::Command;
use proto::command::ServerFrame;
use proto::wire::{self, GroupAction, Kind, Role};

use super::common::{Beside, PATIENCE};
use super::crowd::{attacked, enter, seqs_of, with};
use crate::supervisor::ClusterOptions;
use crate::torture::tool::horde::Horde;
use crate::torture::tool::process;
use crate::torture::tool::raw::{Raw, encode, login};
use crate::torture::{Round, Row, TortureError, World};

/// The rows of this file.
pub const ROWS: &[Row] = &[
    Row {
        name: "A9",
        fault: "fan-out bomb: messages to 10,000 members",
        full_rounds: 10,
        gate: false,
        run: bomb,
    },
    Row {
        name: "A13",
        fault: "a group of 1,500 written to faster than its members can be told",
        full_rounds: 3,
        gate: false,
        run: flood,
    },
];

/// So many come into a group, and have seen how the others came.
fn crowd(world: &World, count: u32) -> Result<(Horde, Group), TortureError> {
    let gateway = world.cluster.gateways[0].client;
    let (owner, name) = (world.user("owner"), world.user("m"));
    let mut members = Horde::new(gateway, count, None).map_err(attacked)?;
    enter(&mut members, count, &name)?;
    let mut group = Group::make(Raw::login(gateway, &login(&owner, "raw", 1)).map_err(attacked)?)?;
    for first in (0..count).step_by(MEMBERS_PER_CHANGE) {
        let some = first..(first + MEMBERS_PER_CHANGE as u32).min(count);
        group.add(some.map(|at| format!("{name}{at}")))?;
    }
    // Whoever came early has seen how the others came.
    let last = group.seq;
    let ready = members.pump_until(PATIENCE, |horde| {
        let is_up_to = |frame: &ServerFrame| seqs_of(frame).contains(&last);
        horde.all().all(|member| member.heard.iter().any(is_up_to))
    });
    if !ready {
        return Err(TortureError::Late {
            what: "the last of the new members, told to all",
            waited: PATIENCE,
        });
    }
    members.clear_heard();
    Ok((members, group))
}

/// A thousand messages as fast as they are accepted: what finds no room is told late, in order, and nobody else is without answers.
fn flood(round: &mut Round) -> Result<(), TortureError> {
    // Less room than they need, so that the bound is met.
    let state_sets = vec![format!("limits.fan_out_max={}", FLOOD / 2)];
    let mut world = round.world(ClusterOptions { state_sets, ..with(&[]) })?;
    let (mut members, mut group) = crowd(&world, FLOODED)?;
    let state = world.cluster.states[0].admin;
    let mut beside = Beside::start(round, &mut world, "a flood of messages to a group of 1,500")?;
    let (began, first) = (Instant::now(), group.seq + 1);
    group.flood(FLOOD)?;
    round.worst("accepted_s", began.elapsed().as_secs_f64());
    round.facts.acked += u64::from(FLOOD);
    let mut next = vec![first; members.members.len()];
    let (mut missing, mut holes) = (u64::from(FLOOD) * u64::from(FLOODED), 0_u64);
    let mut pinged = Instant::now();
    while missing > 0 && began.elapsed() < FLOOD_MAX {
        heartbeat(&mut members, &mut pinged);
        for index in members.hear(Duration::from_millis(100)) {
            let heard = std::mem::take(&mut members.members[index].heard);
            for seq in heard.iter().flat_map(seqs_of) {
                // Again, or behind a hole; whoever sees one pulls.
                holes += u64::from(seq > next[index]);
                if seq == next[index] {
                    next[index] += 1;
                    missing -= 1;
                }
            }
        }
    }
    round.worst("last_delivery_s", began.elapsed().as_secs_f64());
    beside.attack_ends();
    let left_behind = process::metric(state, "rookery_state_left_behind_total")?;
    round.worst("left_behind", left_behind);
    round.expect(left_behind > 0.0, || {
        "everything found room: the flood was too slow to show anything".into()
    });
    round.expect(missing == 0 && holes == 0, || {
        format!("{missing} deliveries in order were missing after {FLOOD_MAX:?}, {holes} came behind a hole")
    });
    let dropped = members.all().filter(|member| member.ended.is_some()).count();
    round.expect(dropped == 0, || format!("{dropped} members were disconnected"));
    drop((members, group));
    beside.end(round)?;
    round.keep(world)
}

fn bomb(round: &mut Round) -> Result<(), TortureError> {
    let mut world = round.world(with(&[]))?;
    let (mut members, mut group) = crowd(&world, MEMBERS)?;
    let mut beside = Beside::start(round, &mut world, "messages to a group of 10,000")?;
    let mut took_ms = Vec::new();
    let mut pinged = Instant::now();
    let mut acknowledgements = Acknowledgements::of(MEMBERS as usize);
    for _ in 0..MESSAGES {
        let began = Instant::now();
        group.say(Kind::Text, b"to everybody".to_vec())?;
        round.facts.acked += 1;
        let mut missing = MEMBERS;
        while missing > 0 && began.elapsed() < PATIENCE {
            for index in members.hear(Duration::from_millis(100)) {
                let heard = std::mem::take(&mut members.members[index].heard);
                let news = heard.iter().flat_map(seqs_of).filter(|seq| *seq == group.seq).count() as u32;
                round.facts.doubled += u64::from(news.saturating_sub(1));
                heard.iter().filter_map(pushed).for_each(|(seq, within_ms)| {
                    acknowledgements.owe(index, seq, within_ms);
                });
                missing -= news.min(1);
            }
            acknowledgements.send(&mut members, &group.chat);
        }
        round.expect(missing == 0, || format!("{missing} of {MEMBERS} had nothing after {PATIENCE:?}"));
        took_ms.push(began.elapsed().as_secs_f64() * 1_000.0);
        heartbeat(&mut members, &mut pinged);
        // So many a second, however long each takes.
        while began.elapsed() < EVERY {
            acknowledgements.send(&mut members, &group.chat);
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    beside.attack_ends();
    took_ms.sort_by(f64::total_cmp);
    round.worst("last_delivery_p50_ms", took_ms[took_ms.len() / 2]);
    round.worst("last_delivery_p99_ms", took_ms[(took_ms.len() * 99 / 100).min(took_ms.len() - 1)]);
    let dropped = members.all().filter(|member| member.ended.is_some()).count();
    round.expect(dropped == 0, || format!("{dropped} members were disconnected"));
    drop((members, group));
    beside.end(round)?;
    round.keep(world)
}

fn heartbeat(members: &mut Horde, pinged: &mut Instant) {
    if pinged.elapsed() >= HEARTBEAT {
        let ping = encode(Command::Ping, &wire::Ping::default());
        (0..members.members.len()).for_each(|index| members.say(index, &ping));
        *pinged = Instant::now();
    }
}

/// Its seq, and over how long it is to be acknowledged.
fn pushed(frame: &ServerFrame) -> Option<(u64, u32)> {
    match frame {
        ServerFrame::Push(push) => Some((push.message.as_ref()?.seq, push.ack_within_ms)),
        _ => None,
    }
}

/// When each member acknowledges, and up to where: once in the time that the server gives, as the library does.
struct Acknowledgements {
    began: Instant,
    limits: Vec<inbox::Limits>,
    due: Vec<Option<(Instant, u64)>>,
}

impl Acknowledgements {
    fn of(members: usize) -> Self {
        let limits = std::iter::repeat_with(inbox::Limits::default).take(members).collect();
        Acknowledgements { began: Instant::now(), limits, due: vec![None; members] }
    }

    fn owe(&mut self, index: usize, seq: u64, within_ms: u32) {
        let now = Instant::now();
        let wait = self.limits[index].ack_wait(now - self.began, Duration::from_millis(within_ms.into()));
        let (_, owed) = self.due[index].get_or_insert_with(|| (now + wait, 0));
        *owed = seq.max(*owed);
    }

    fn send(&mut self, members: &mut Horde, chat: &str) {
        let now = Instant::now();
        for (index, due) in self.due.iter_mut().enumerate() {
            if let Some((_, seq)) = due.take_if(|(at, _)| *at <= now) {
                let push_ack = wire::PushAck { chat: chat.to_owned(), history: 0, seq };
                members.say(index, &encode(Command::PushAck, &push_ack));
            }
        }
    }
}

/// The owner of a group.
struct Group {
    raw: Raw,
    chat: String,
    n: u64,
    /// Of the last message.
    seq: u64,
}

impl Group {
    fn make(raw: Raw) -> Result<Group, TortureError> {
        let chat = format!("#{}", rand::random_range(1..=proto::NUMBER_MAX));
        let mut group = Group { raw, chat, n: 0, seq: 0 };
        group.change(GroupAction::GroupCreate, "a crowd", Vec::new())?;
        Ok(group)
    }

    fn add(&mut self, users: impl Iterator<Item = String>) -> Result<(), TortureError> {
        let member = |user| wire::Member { user, role: Role::Member as i32, ..Default::default() };
        self.change(GroupAction::GroupAdd, "", users.map(member).collect())
    }

    fn change(
        &mut self,
        action: GroupAction,
        title: &str,
        members: Vec<wire::Member>,
    ) -> Result<(), TortureError> {
        let change = wire::GroupChange { action: action as i32, title: title.to_owned(), members };
        self.say(Kind::Group, change.encode_to_vec())
    }

    /// Says so many things, as many at once as may be unanswered.
    fn flood(&mut self, count: u32) -> Result<(), TortureError> {
        let (mut answered, last) = (self.n, self.n + u64::from(count));
        let until = Instant::now() + FLOOD_MAX;
        while answered < last && Instant::now() < until {
            while self.n < last && self.n < answered + proto::UNANSWERED_MAX {
                self.n += 1;
                let (n, chat, body) = (self.n, self.chat.clone(), vec![b'.'; FLOOD_BYTES].into());
                let send = wire::Send { stream: 1, n, chat, body, kind: Kind::Text as i32 };
                self.raw.say(Command::Send, &send).map_err(attacked)?;
            }
            match self.raw.next(ASK_AGAIN).map_err(attacked)? {
                Some(ServerFrame::SendAck(ack)) => {
                    (answered, self.seq) = (ack.n.max(answered), ack.seq.max(self.seq))
                }
                Some(ServerFrame::Error(error)) => {
                    return Err(TortureError::Load(format!("the owner was answered {error:?}")));
                }
                _ => {}
            }
        }
        let is_late = TortureError::Late { what: "acknowledgements of a flood", waited: FLOOD_MAX };
        if answered < last { Err(is_late) } else { Ok(()) }
    }

    /// Says it until it is acknowledged.
    fn say(&mut self, kind: Kind, body: Vec<u8>) -> Result<(), TortureError> {
        self.n += 1;
        let send = wire::Send {
            stream: 1,
            n: self.n,
            chat: self.chat.clone(),
            body: body.into(),
            kind: kind as i32,
        };
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            self.raw.say(Command::Send, &send).map_err(attacked)?;
            while let Some(frame) = self.raw.next(ASK_AGAIN).map_err(attacked)? {
                match frame {
                    ServerFrame::SendAck(ack) if ack.n == self.n => {
                        self.seq = ack.seq;
                        return Ok(());
                    }
                    ServerFrame::Error(error) if error.retry_after_ms > 0 => break,
                    ServerFrame::Error(error) => {
                        return Err(TortureError::Load(format!("the owner was answered {error:?}")));
                    }
                    _ => {}
                }
            }
        }
        Err(TortureError::Late { what: "acknowledgement of a group's message", waited: PATIENCE })
    }
}

/// With the owner 10,000, as many as a group may have.
const MEMBERS: u32 = 9_999;
const MEMBERS_PER_CHANGE: usize = 500;
/// As many as the percentiles need; the row is of the first of them.
const MESSAGES: u32 = 100;
const EVERY: Duration = Duration::from_millis(500);
/// As clients do, or the gateway would take them for gone.
const HEARTBEAT: Duration = Duration::from_secs(30);
const ASK_AGAIN: Duration = Duration::from_secs(2);
/// Members and messages of the flood, and bytes of each: more than a second of work for state and gateway.
const FLOODED: u32 = 1_500;
const FLOOD: u32 = 1_000;
const FLOOD_BYTES: usize = 256;
const FLOOD_MAX: Duration = Duration::from_secs(120);
