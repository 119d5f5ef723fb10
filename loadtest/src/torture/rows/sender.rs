//! Senders that say the same thing again and again, with bare bytes, through two gateways at once. Main thread.
//!
//! Trap: the two connections race, so a copy may come before its predecessor and be told to wait. It is then said again,
//! as the protocol wants; what counts is what is answered in the end.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use bytes::Bytes;
use proto::command::{Command, ServerFrame};
use proto::wire::{self, Code};

use super::common::{PATIENCE, pairs};
use crate::torture::tool::raw::{self, Raw};
use crate::torture::{Round, Row, TortureError, World};

/// F15: every id ten times, half of the copies through each gateway.
fn resent(round: &mut Round) -> Result<(), TortureError> {
    let world = round.world(pairs())?;
    let (user, stream) = (world.user("a"), rand::random::<u64>() | 1);
    let chat = format!("{user}:{}", world.user("b"));
    let mut sides = both(&world, &user)?;
    let mut places: BTreeMap<u64, BTreeSet<(u64, u64)>> = BTreeMap::new();
    let mut first = 1;
    while first <= IDS {
        let last = (first + WINDOW - 1).min(IDS);
        let until = Instant::now() + PATIENCE;
        let mut copies = COPIES;
        // Ten copies of each; then, as long as one is not answered, one more.
        while copies > 0 || (first..=last).any(|n| !places.contains_key(&n)) {
            if Instant::now() > until {
                return Err(TortureError::Late { what: "answer to every id", waited: PATIENCE });
            }
            for side in &mut sides {
                for n in first..=last {
                    side.say(Command::Send, &send(stream, n, &chat, body(n))).map_err(broken)?;
                }
            }
            copies = copies.saturating_sub(2);
            for side in &mut sides {
                answers(side, last - first + 1, &mut places)?;
            }
        }
        first = last + 1;
    }
    for side in &mut sides {
        // Answers to late copies.
        while let Some(frame) = side.next(Duration::from_millis(100)).map_err(broken)? {
            note(&frame, &mut places);
        }
    }
    round.facts.faults += 1;
    round.worst("copies", (IDS * u64::from(COPIES)) as f64);
    round.facts.sent += IDS;
    round.facts.acked += places.len() as u64;
    let twice = places.iter().filter(|(_, places)| places.len() > 1).count() as u64;
    round.facts.doubled += twice;
    round.expect(twice == 0, || format!("{twice} of {IDS} ids got more than one seq"));
    let stored = pull_all(&mut sides[0], &chat)?;
    let wanted: Vec<(u64, Bytes)> = (1..=IDS).map(|n| (n, body(n))).collect();
    if stored.len() as u64 > IDS {
        round.facts.doubled += stored.len() as u64 - IDS;
    }
    round.expect(stored == wanted, || {
        format!("the chat has {} messages; {IDS} with seqs from 1 in order were sent", stored.len())
    });
    drop(sides);
    round.keep(world)
}

/// F25: a frame that was refused comes again, late, also through the other gateway.
fn refused(round: &mut Round) -> Result<(), TortureError> {
    let world = round.world(pairs())?;
    let (user, stream) = (world.user("a"), rand::random::<u64>() | 1);
    let chat = format!("{user}:{}", world.user("b"));
    let mut sides = both(&world, &user)?;
    let too_long = Bytes::from(vec![b'x'; proto::MESSAGE_BYTES_MAX + 1]);
    let mut wanted = Vec::new();
    let refusals = if round.gate { 25 } else { 100 };
    for number in 0..refusals {
        let (bad, good) = (2 * number + 1, 2 * number + 2);
        let frame = send(stream, bad, &chat, too_long.clone());
        let near = (number % 2) as usize;
        let code = ask(&mut sides[near], &frame)?.err();
        round.expect(code == Some(Code::MessageTooLarge), || format!("n {bad} was answered {code:?}"));
        // Its copy through the other gateway, before and behind the next message.
        let early = ask(&mut sides[1 - near], &frame)?.err();
        let seq = ask(&mut sides[near], &send(stream, good, &chat, body(good)))?;
        let late = ask(&mut sides[1 - near], &frame)?.err();
        for (when, code) in [("before", early), ("behind", late)] {
            round.expect(code == Some(Code::MessageTooLarge), || {
                format!("a copy of n {bad} {when} the next message was answered {code:?}")
            });
        }
        round.expect(seq == Ok(number + 1), || format!("n {good}, behind a refusal, was answered {seq:?}"));
        round.facts.sent += 2;
        round.facts.refused += 1;
        round.facts.acked += u64::from(seq.is_ok());
        wanted.push((number + 1, body(good)));
    }
    round.facts.faults += 1;
    round.worst("copies", 2.0 * refusals as f64);
    let stored = pull_all(&mut sides[0], &chat)?;
    let appeared = stored.iter().filter(|(_, body)| *body == too_long).count() as u64;
    round.facts.refused_delivered += appeared;
    round.expect(stored == wanted, || {
        format!("the chat has {} messages, {appeared} of them refused", stored.len())
    });
    drop(sides);
    round.keep(world)
}

/// One user's two devices, one at each gateway.
fn both(world: &World, user: &str) -> Result<Vec<Raw>, TortureError> {
    let logins = ["one", "two"].into_iter().zip(&world.cluster.gateways);
    logins
        .map(|(device, gateway)| Raw::login(gateway.client, &raw::login(user, device, 1)).map_err(broken))
        .collect()
}

fn send(stream: u64, n: u64, chat: &str, body: Bytes) -> wire::Send {
    wire::Send { stream, n, chat: chat.to_owned(), body, ..Default::default() }
}

fn body(n: u64) -> Bytes {
    Bytes::from(format!("message {n}"))
}

/// Says it until it is accepted or refused for good: the seq, or why not.
fn ask(side: &mut Raw, frame: &wire::Send) -> Result<Result<u64, Code>, TortureError> {
    let until = Instant::now() + PATIENCE;
    while Instant::now() < until {
        side.say(Command::Send, frame).map_err(broken)?;
        let again = Instant::now() + AGAIN_AFTER;
        while let Some(answer) = side.next(again.saturating_duration_since(Instant::now())).map_err(broken)? {
            match answer {
                ServerFrame::SendAck(ack) if ack.n == frame.n => return Ok(Ok(ack.seq)),
                ServerFrame::Error(error) if error.n == frame.n && is_final(error.code()) => {
                    return Ok(Err(error.code()));
                }
                _ => {}
            }
        }
    }
    Err(TortureError::Late { what: "answer to a Send", waited: PATIENCE })
}

fn is_final(code: Code) -> bool {
    !matches!(code, Code::Unavailable | Code::RateLimited | Code::OutOfOrder)
}

/// Takes so many answers, or what comes within a moment.
fn answers(
    side: &mut Raw,
    mut count: u64,
    places: &mut BTreeMap<u64, BTreeSet<(u64, u64)>>,
) -> Result<(), TortureError> {
    while count > 0 {
        let Some(frame) = side.next(AGAIN_AFTER).map_err(broken)? else { return Ok(()) };
        count -= u64::from(note(&frame, places));
    }
    Ok(())
}

/// Whether it answers a Send.
fn note(frame: &ServerFrame, places: &mut BTreeMap<u64, BTreeSet<(u64, u64)>>) -> bool {
    match frame {
        ServerFrame::SendAck(ack) => {
            places.entry(ack.n).or_default().insert((ack.history, ack.seq));
            true
        }
        ServerFrame::Error(_) => true,
        _ => false,
    }
}

/// Everything in a chat: seq and body.
fn pull_all(side: &mut Raw, chat: &str) -> Result<Vec<(u64, Bytes)>, TortureError> {
    let (mut all, mut request): (Vec<(u64, Bytes)>, u32) = (Vec::new(), 0);
    let mut history = 0;
    let until = Instant::now() + PATIENCE;
    while Instant::now() < until {
        request += 1;
        let cursor = all.last().map_or(0, |(seq, _)| *seq);
        let pull = wire::Pull {
            request,
            chat: chat.to_owned(),
            history,
            cursor,
            limit: proto::PULL_LIMIT_MAX,
            reverse: false,
        };
        side.say(Command::Pull, &pull).map_err(broken)?;
        let again = Instant::now() + AGAIN_AFTER;
        while let Some(frame) = side.next(again.saturating_duration_since(Instant::now())).map_err(broken)? {
            let ServerFrame::PullAck(ack) = frame else { continue };
            if ack.request != request {
                continue;
            }
            history = ack.history;
            all.extend(ack.messages.into_iter().map(|message| (message.seq, message.body)));
            if !ack.has_more {
                return Ok(all);
            }
            break;
        }
    }
    Err(TortureError::Late { what: "answer to a Pull", waited: PATIENCE })
}

fn broken(error: std::io::Error) -> TortureError {
    TortureError::io("a client of bare bytes", error)
}

/// Of one round.
const IDS: u64 = 1_000;
const COPIES: u32 = 10;
/// As many as a client may have unanswered.
const WINDOW: u64 = 16;
const AGAIN_AFTER: Duration = Duration::from_millis(500);

/// Of this file.
pub const ROWS: &[Row] = &[
    Row {
        name: "F15",
        fault: "a thousand ids, each sent ten times through two gateways at once",
        full_rounds: 100,
        gate: true,
        run: resent,
    },
    Row {
        name: "F25",
        fault: "refused frames sent again behind their answer, through another gateway",
        full_rounds: 10,
        gate: true,
        run: refused,
    },
];
