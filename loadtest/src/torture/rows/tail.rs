//! F18 and F22: the store's file comes back torn, shorter, flipped, older, or not at all. Main thread.
//!
//! Trap: what is cut off was durable once and acknowledged. Nobody can bring it back; what is promised is that nobody is told
//! that all is well: history changes, clients hear of it, and no place of a chat is given out twice in one history.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use proto::Command;
use proto::command::ServerFrame;
use proto::wire::{self, Code};
use rand::Rng;

use super::common::{PATIENCE, everybody_syncs, expect_acked, redis, settle, settle_after_loss};
use super::disk::unrewritten;
use crate::supervisor::ClusterOptions;
use crate::torture::tool::raw::{Raw, login};
use crate::torture::tool::{ToolError, aof};
use crate::torture::{Plan, Round, Row, TortureError, World};

/// The rows of this file.
pub const ROWS: &[Row] = &[
    Row {
        name: "F18",
        fault: "tail of the store torn, cut or flipped",
        full_rounds: 20,
        gate: false,
        run: tail,
    },
    Row {
        name: "F22",
        fault: "Redis came back empty or older",
        full_rounds: 10,
        gate: false,
        run: came_back,
    },
];

fn tail(round: &mut Round) -> Result<(), TortureError> {
    match round.seed % 3 {
        0 => torn(round),
        1 => cut(round),
        _ => flipped(round),
    }
}

/// The last command is there in part: it was never acknowledged, and nothing is wrong.
fn torn(round: &mut Round) -> Result<(), TortureError> {
    let mut world = round.world(ClusterOptions { states: 2, ..unrewritten() })?;
    let load = world.load(Plan::default())?;
    load.wait_acked(500, PATIENCE)?;
    round.fault(&load, "Redis killed, half a command at the end of its file");
    redis(&mut world)?.process.kill()?;
    let whole = b"*3\r\n$3\r\nSET\r\n$12\r\ntorture:torn\r\n$5\r\nwhole\r\n";
    let half = round.random.random_range(1..whole.len());
    aof::append(&tail_of(&mut world)?, &whole[..half])?;
    redis(&mut world)?.process.restart()?;
    load.healed("Redis runs again");
    expect_acked(round, &load, 200, PATIENCE, "accepting_s");
    settle(round, load, PATIENCE)?;
    round.keep(world)
}

/// Acknowledged messages are cut off: a cursor above the head proves it.
fn cut(round: &mut Round) -> Result<(), TortureError> {
    let mut world = round.world(ClusterOptions { states: 2, ..unrewritten() })?;
    let talk = Talk::new(&world);
    let mut alice = Raw::login(talk.gateway, &login(&talk.alice, "raw", 1)).map_err(talked)?;
    let mut places = HashSet::new();
    let count = round.random.random_range(5..40);
    for n in 1..=count {
        let ack = talk.send(&mut alice, 1, n)?;
        places.insert((ack.history, ack.seq));
        round.facts.acked += 1;
    }
    let history = places.iter().next().map(|(history, _)| *history).unwrap_or_default();
    round.facts.faults += 1;
    redis(&mut world)?.process.kill()?;
    let file = tail_of(&mut world)?;
    // In the middle of the command that stored one of them: it and all behind it are gone.
    let first_gone = round.random.random_range(2..=count);
    let at = aof::find(&file, talk.body(1, first_gone).as_bytes())?;
    let at = at.first().ok_or_else(|| ToolError::Failed("a stored message is not in the file".into()))?;
    aof::cut(&file, *at)?;
    redis(&mut world)?.process.restart()?;
    round.worst("cut_messages", (count - first_gone + 1) as f64);

    // Bob has seen all of them, and says so.
    let new = talk.sync_until_new(history, count)?;
    round.expect(new.is_some(), || {
        format!("a cursor at {count} over a head at {} changed nothing", first_gone - 1)
    });
    let mut alice = talk.comes_back(&talk.alice, 2)?;
    for n in 1..=3 {
        let ack = talk.send(&mut alice, 2, n)?;
        round.expect(places.insert((ack.history, ack.seq)), || {
            format!("seq {} of history {} was given to two messages", ack.seq, ack.history)
        });
    }
    round.keep(world)
}

/// A bit of a stored body is another: it is never shown, and the others are.
fn flipped(round: &mut Round) -> Result<(), TortureError> {
    let mut world = round.world(ClusterOptions { states: 2, ..unrewritten() })?;
    let talk = Talk::new(&world);
    let mut alice = Raw::login(talk.gateway, &login(&talk.alice, "raw", 1)).map_err(talked)?;
    let count = 10;
    for n in 1..=count {
        talk.send(&mut alice, 1, n)?;
        round.facts.acked += 1;
    }
    round.facts.faults += 1;
    redis(&mut world)?.process.kill()?;
    let file = tail_of(&mut world)?;
    let hurt = round.random.random_range(1..=count);
    let body = talk.body(1, hurt);
    for at in aof::find(&file, body.as_bytes())? {
        let place = at + round.random.random_range(0..body.len() as u64);
        aof::flip(&file, place, 1 << round.random.random_range(0..8))?;
    }
    redis(&mut world)?.process.restart()?;
    let mut bob = talk.comes_back(&talk.bob, 1)?;
    let pull = wire::Pull { request: 1, chat: talk.chat(), ..wire::Pull::default() };
    let answer = talk.ask_pull(&mut bob, &pull)?;
    let ServerFrame::PullAck(ack) = answer else {
        round.expect(false, || format!("a Pull over a damaged message was answered {answer:?}"));
        return Ok(());
    };
    let shown: Vec<u64> = ack.messages.iter().map(|message| message.seq).collect();
    let others: Vec<u64> = (1..=count).filter(|seq| *seq != hurt).collect();
    round.expect(shown == others, || format!("shown: {shown:?}; {hurt} of {count} is damaged"));
    let is_right = |message: &wire::Message| message.body == talk.body(1, message.seq).as_bytes();
    let wrong = ack.messages.iter().find(|message| !is_right(message));
    round.expect(wrong.is_none(), || format!("shown with another body: {wrong:?}"));
    // Its file is broken for good.
    Ok(())
}

/// Under load, with everything that lived before still alive.
fn came_back(round: &mut Round) -> Result<(), TortureError> {
    let mut world = round.world(ClusterOptions { states: 2, ..unrewritten() })?;
    let empty = round.seed.is_multiple_of(2);
    // Who was in a group when is not known any more where its changes are lost. An older copy knows everybody who is logged in, so no
    // connection may end; an empty one knows nobody.
    let plan = Plan { per_s: 300, gateways_live: !empty, change_every_ms: 0, ..Plan::default() };
    let load = world.load(plan)?;
    load.wait_acked(300, PATIENCE)?;
    let folder = redis(&mut world)?.folder().to_owned();
    let older = aof::Copy::take(&folder)?;
    load.wait_acked(round.random.random_range(100..500), PATIENCE)?;
    round.fault(&load, if empty { "Redis came back empty" } else { "Redis came back older" });
    redis(&mut world)?.process.kill()?;
    if empty {
        aof::erase(&folder)?
    } else {
        older.put_back(&folder)?
    }
    redis(&mut world)?.process.restart()?;
    load.healed("Redis runs again");
    expect_acked(round, &load, 100, PATIENCE, "accepting_s");
    everybody_syncs(&load);
    let verdict = settle_after_loss(round, load)?;
    round.worst("cut_messages", verdict.cut as f64);
    round.expect(verdict.histories_lost > 0, || "no client was told that history was lost".into());
    Ok(())
}

fn tail_of(world: &mut World) -> Result<PathBuf, TortureError> {
    Ok(aof::tail(redis(world)?.folder())?)
}

/// Two people who talk by bare bytes.
struct Talk {
    gateway: SocketAddr,
    alice: String,
    bob: String,
}

impl Talk {
    fn new(world: &World) -> Talk {
        Talk { gateway: world.cluster.gateways[0].client, alice: world.user("alice"), bob: world.user("bob") }
    }

    fn chat(&self) -> String {
        format!("{}:{}", self.alice, self.bob)
    }

    fn body(&self, stream: u64, n: u64) -> String {
        format!("<{} says {n} on {stream}, and not a bit else>", self.alice)
    }

    /// Until it is acknowledged.
    fn send(&self, raw: &mut Raw, stream: u64, n: u64) -> Result<wire::SendAck, TortureError> {
        let send = wire::Send {
            stream,
            n,
            chat: self.chat(),
            body: self.body(stream, n).into(),
            ..Default::default()
        };
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            raw.say(Command::Send, &send).map_err(talked)?;
            match raw.next(AGAIN).map_err(talked)? {
                Some(ServerFrame::SendAck(ack)) => return Ok(ack),
                Some(ServerFrame::Error(error)) if error.code() == Code::Unavailable => {
                    std::thread::sleep(AGAIN / 5)
                }
                Some(ServerFrame::Error(error)) => {
                    return Err(TortureError::Load(format!("a Send was answered {error:?}")));
                }
                _ => {}
            }
        }
        Err(TortureError::Late { what: "acknowledgement", waited: PATIENCE })
    }

    /// Logs in, with this attempt or the next ones, until they are let in: the store may be away at first.
    fn comes_back(&self, user: &str, first_attempt: u64) -> Result<Raw, TortureError> {
        let until = Instant::now() + PATIENCE;
        for attempt in first_attempt.. {
            match Raw::login(self.gateway, &login(user, "raw", attempt)) {
                Ok(raw) => return Ok(raw),
                Err(error) if Instant::now() >= until => return Err(talked(error)),
                Err(_) => std::thread::sleep(AGAIN / 5),
            }
        }
        Err(TortureError::Late { what: "login", waited: PATIENCE })
    }

    fn ask_pull(&self, raw: &mut Raw, pull: &wire::Pull) -> Result<ServerFrame, TortureError> {
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            raw.say(Command::Pull, pull).map_err(talked)?;
            match raw.next(AGAIN).map_err(talked)? {
                Some(ServerFrame::Error(error)) if error.code() == Code::Unavailable => {
                    std::thread::sleep(AGAIN / 5)
                }
                Some(answer @ (ServerFrame::PullAck(_) | ServerFrame::Error(_))) => return Ok(answer),
                _ => {}
            }
        }
        Err(TortureError::Late { what: "answer to a Pull", waited: PATIENCE })
    }

    /// Bob says that he has seen everything up to `seq` of `history`, until he hears of another one.
    fn sync_until_new(&self, history: u64, seq: u64) -> Result<Option<u64>, TortureError> {
        let mut bob = self.comes_back(&self.bob, 1)?;
        let until = Instant::now() + NEW_HISTORY_MAX;
        while Instant::now() < until {
            let cursor = wire::Cursor { chat: self.chat(), history, seq, ..Default::default() };
            let sync = wire::Sync { request: 1, cursors: vec![cursor], ..wire::Sync::default() };
            bob.say(Command::Sync, &sync).map_err(talked)?;
            if let Some(ServerFrame::SyncAck(ack)) = bob.next(AGAIN).map_err(talked)? {
                let of_chat = ack.chats.iter().find(|head| head.chat == self.chat());
                if let Some(head) = of_chat.filter(|head| head.history != history) {
                    return Ok(Some(head.history));
                }
            }
            std::thread::sleep(AGAIN / 5);
        }
        Ok(None)
    }
}

fn talked(error: std::io::Error) -> TortureError {
    TortureError::io("talking to a gateway", error)
}

const AGAIN: Duration = Duration::from_millis(500);
/// How long a proof of loss may be ignored.
const NEW_HISTORY_MAX: Duration = Duration::from_secs(5);
