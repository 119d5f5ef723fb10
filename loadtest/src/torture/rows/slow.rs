//! A8: people who stop reading, and those beside them. Main thread.
//!
//! Trap: a slow reader is slow only when the kernel has no room either. Its receive buffer is as small as the kernel makes
//! them, and the gateway's send buffers are capped.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use proto::Command;
use proto::command::ServerFrame;
use proto::wire::{self, Code};

use super::common::{Beside, PATIENCE};
use super::crowd::{BURST_BYTES_MAX, attacked, enter, seqs_of, with};
use crate::torture::tool::horde::Horde;
use crate::torture::tool::process::{memory, metric};
use crate::torture::tool::raw::{Raw, encode, login};
use crate::torture::{Round, Row, TortureError};

/// The rows of this file.
pub const ROWS: &[Row] =
    &[Row { name: "A8", fault: "one in five stops reading", full_rounds: 5, gate: true, run: slow_readers }];

fn slow_readers(round: &mut Round) -> Result<(), TortureError> {
    let sets =
        ["limits.queue_bytes_soft=65536", "limits.queue_bytes_hard=262144", "listen.send_buffer_bytes=16384"];
    let mut world = round.world(with(&sets.map(str::to_owned)))?;
    let (gateway, admin) = (world.cluster.gateways[0].client, world.cluster.gateways[0].admin);
    let pid = world.cluster.gateways[0].process.pid()?;
    let (slow, quick) = if round.gate { (200, 800) } else { (1_000, 4_000) };
    let (slow_name, quick_name) = (world.user("s"), world.user("q"));
    let mut readers = Horde::new(gateway, quick, None).map_err(attacked)?;
    enter(&mut readers, quick, &quick_name)?;
    let mut sleepers = Horde::new(gateway, slow, Some(4_096)).map_err(attacked)?;
    enter(&mut sleepers, slow, &slow_name)?;
    sleepers.set_reads(false);
    sleepers.clear_heard();
    readers.clear_heard();
    let mut beside = Beside::start(round, &mut world, "slow readers")?;
    let before = memory(pid)?;

    let mut writer = Writer::start(gateway, &world.user("w"))?;
    let users = |name: &str, count: u32| (0..count).map(|at| format!("{name}{at}")).collect::<Vec<_>>();
    let mut most = 0;
    for n in 1..MESSAGES {
        writer.write(&users(&slow_name, slow), n, LONG_BYTES)?;
        if n <= MESSAGES_TO_QUICK {
            writer.write(&users(&quick_name, quick), n, SHORT_BYTES)?;
        }
        readers.pump();
        most = most.max(memory(pid)?);
    }
    let grown = most.saturating_sub(before);
    round.worst("memory_grown_mib", grown as f64 / 1_048_576.0);
    let hard = u64::from(slow) * 262_144;
    round.expect(grown <= hard.min(BURST_BYTES_MAX) + BATCHES_BYTES, || {
        format!("the gateway grew by {} MiB for {slow} slow readers", grown >> 20)
    });
    let skipped = metric(admin, "rookery_gateway_pushes_skipped_total")?;
    round.expect(skipped > 0.0, || "no push was skipped: the readers were not slow".into());

    let complete = |member: &crate::torture::tool::horde::Member, wanted: u64| {
        let seqs: BTreeSet<u64> = member.heard.iter().flat_map(seqs_of).collect();
        seqs.len() as u64 == wanted
    };
    let all = |horde: &Horde, wanted| horde.all().all(|member| complete(member, wanted));
    let heard = readers.pump_until(PATIENCE, |horde| all(horde, MESSAGES_TO_QUICK));
    round.expect(heard, || "some of those who read did not hear everything".into());
    let dropped = readers.all().filter(|member| member.ended.is_some()).count();
    round.expect(dropped == 0, || format!("{dropped} of those who read were disconnected"));

    // The queues are full, nobody empties them, and more comes for each.
    beside.attack_stands(|time| {
        let (users, began) = (users(&slow_name, slow), Instant::now());
        let parts = users.chunks(users.len().div_ceil(PARTS as usize));
        for (part, at) in parts.zip(0..) {
            std::thread::sleep((began + time * at / PARTS).saturating_duration_since(Instant::now()));
            writer.write(part, MESSAGES, SHORT_BYTES)?;
            readers.pump();
        }
        Ok(())
    })?;
    // Then they fetch what they missed, all at once: as much work as it is for everybody.
    beside.attack_ends();
    sleepers.set_reads(true);
    let began = Instant::now();
    let mut again = Again {
        writer: writer.user.clone(),
        attempts: vec![1; slow as usize],
        asked: vec![None; slow as usize],
    };
    let mut failed = None;
    let resumed = sleepers.pump_until(PATIENCE, |horde| {
        for index in 0..horde.members.len() {
            let is_complete = complete(&horde.members[index], MESSAGES);
            if !is_complete && let Err(error) = again.step(horde, index, &format!("{slow_name}{index}")) {
                failed = Some(error);
                return true;
            }
        }
        all(horde, MESSAGES)
    });
    if let Some(error) = failed {
        return Err(error);
    }
    round.worst("complete_after_s", began.elapsed().as_secs_f64());
    round.expect(resumed, || {
        let missing = sleepers.all().filter(|member| !complete(member, MESSAGES)).count();
        format!("{missing} of {slow} had not everything {PATIENCE:?} after they read again")
    });
    round.facts.acked += writer.acked;
    drop((sleepers, readers));
    beside.end(round)?;
    round.keep(world)
}

/// Those who read again: pull what is missing, and come back when they were closed.
struct Again {
    writer: String,
    attempts: Vec<u64>,
    asked: Vec<Option<Instant>>,
}

impl Again {
    fn step(&mut self, horde: &mut Horde, index: usize, user: &str) -> Result<(), TortureError> {
        let now = Instant::now();
        if let Some(ended) = horde.members[index].ended {
            if ended.elapsed() >= ASK_AGAIN {
                self.attempts[index] += 1;
                let frame = encode(Command::Login, &login(user, "raw", self.attempts[index]));
                let heard = std::mem::take(&mut horde.members[index].heard);
                horde.reopen(index, &frame).map_err(attacked)?;
                // What it was shown before it has. That it is let in must be heard anew.
                let is_old = |frame: &ServerFrame| !matches!(frame, ServerFrame::LoginAck(_));
                horde.members[index].heard = heard.into_iter().filter(is_old).collect();
                self.asked[index] = Some(now);
            }
            return Ok(());
        }
        if self.asked[index].is_none_or(|then| now - then >= ASK_AGAIN) {
            self.asked[index] = Some(now);
            let seqs: BTreeSet<u64> = horde.members[index].heard.iter().flat_map(seqs_of).collect();
            // The first that is missing.
            let cursor = (1..).take_while(|seq| seqs.contains(seq)).last().unwrap_or(0);
            let chat = format!("{user}:{}", self.writer);
            let pull = wire::Pull { request: 1, chat, cursor, ..wire::Pull::default() };
            horde.say(index, &encode(Command::Pull, &pull));
        }
        Ok(())
    }
}

/// One who writes to many, a window of answers behind.
struct Writer {
    raw: Raw,
    user: String,
    acked: u64,
}

impl Writer {
    fn start(gateway: SocketAddr, user: &str) -> Result<Writer, TortureError> {
        let raw = Raw::login(gateway, &login(user, "raw", 1)).map_err(attacked)?;
        Ok(Writer { raw, user: user.to_owned(), acked: 0 })
    }

    /// The `n`-th message to each of these, until all are acknowledged.
    fn write(&mut self, users: &[String], n: u64, bytes: usize) -> Result<(), TortureError> {
        let body = bytes::Bytes::from(vec![b'x'; bytes]);
        let chat_of = |user: &String| format!("{user}:{}", self.user);
        let mut open: BTreeSet<String> = BTreeSet::new();
        let mut waiting: Vec<String> = users.iter().map(chat_of).collect();
        let until = Instant::now() + PATIENCE;
        while !open.is_empty() || !waiting.is_empty() {
            while open.len() < WINDOW
                && let Some(chat) = waiting.pop()
            {
                let send =
                    wire::Send { stream: 1, n, chat: chat.clone(), body: body.clone(), ..Default::default() };
                self.raw.say(Command::Send, &send).map_err(attacked)?;
                open.insert(chat);
            }
            match self.raw.next(ASK_AGAIN).map_err(attacked)? {
                Some(ServerFrame::SendAck(ack)) if ack.n == n => {
                    self.acked += u64::from(open.remove(&sorted_as(&open, &ack.chat)));
                }
                Some(ServerFrame::Error(error)) if error.code() == Code::Unavailable => {
                    waiting.extend(open.take(&sorted_as(&open, &error.chat)));
                }
                Some(ServerFrame::Error(error)) => {
                    return Err(TortureError::Load(format!("the writer was answered {error:?}")));
                }
                Some(_) => {}
                // Unanswered for so long: again.
                None => waiting.extend(std::mem::take(&mut open)),
            }
            if Instant::now() > until {
                return Err(TortureError::Late { what: "acknowledgements of the writer", waited: PATIENCE });
            }
        }
        Ok(())
    }
}

/// A chat as we wrote it: answers have its names sorted.
fn sorted_as(open: &BTreeSet<String>, chat: &str) -> String {
    let turned = chat.split_once(':').map(|(one, other)| format!("{other}:{one}")).unwrap_or_default();
    if open.contains(&turned) { turned } else { chat.to_owned() }
}

/// 152 KiB for each slow reader: more than its kernel, the gateway's, and the soft limit hold. The last is short, and comes while others are
/// compared.
const MESSAGES: u64 = 20;
const LONG_BYTES: usize = 8 * 1_024;
const MESSAGES_TO_QUICK: u64 = 3;
const SHORT_BYTES: usize = 256;
const WINDOW: usize = 64;
/// In which the last message leaves: a few at a time, or others would wait for a burst of ours.
const PARTS: u32 = 250;
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// What a gateway's queues of batches and its heap take while 8 KiB messages pass through it.
const BATCHES_BYTES: u64 = 32 << 20;
