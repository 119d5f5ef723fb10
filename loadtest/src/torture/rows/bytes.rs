//! A3, A4, A7, A12: bytes that no client would send, or not there, or not again. Main thread.
//!
//! Trap: a server that closes answers first; who writes on after that may be reset before it reads why. So these write once,
//! then listen.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use proto::command::ServerFrame;
use proto::wire::{self, Code};
use proto::{Command, frame};
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, IteratorRandom};

use super::common::{PATIENCE, pairs};
use super::crowd::{attacked, seqs_of, with};
use crate::torture::tool::process::memory;
use crate::torture::tool::raw::{Raw, encode, login};
use crate::torture::{Round, Row, TortureError, World};

/// The rows of this file.
pub const ROWS: &[Row] = &[
    Row {
        name: "A3",
        fault: "giant lengths: every header value",
        full_rounds: 1,
        gate: true,
        run: giant_lengths,
    },
    Row {
        name: "A4",
        fault: "hostile bytes; logins split at every byte",
        full_rounds: 10,
        gate: true,
        run: hostile,
    },
    Row { name: "A7", fault: "frames replayed", full_rounds: 10, gate: true, run: replayed },
    Row {
        name: "A12",
        fault: "commands before login, wrong version, unknown command",
        full_rounds: 10,
        gate: true,
        run: out_of_place,
    },
];

/// All 2^24 lengths by the codec that the gateway uses; the edges and a sample of the others over the wire.
fn giant_lengths(round: &mut Round) -> Result<(), TortureError> {
    for limit in [proto::LOGIN_FRAME_BYTES_MAX, proto::FRAME_BYTES_MAX] {
        let wrong = (0..1u32 << 24).find(|length| {
            let [_, a, b, c] = length.to_be_bytes();
            let fits = *length as usize + frame::HEADER_BYTES <= limit;
            frame::cut(&[a, b, c, Command::Login as u8], limit).is_ok() != fits
        });
        round.expect(wrong.is_none(), || {
            format!("a header of length {wrong:?} is misjudged at the limit {limit}")
        });
    }
    let mut world = round.world(with(&[]))?;
    let gateway = world.cluster.gateways[0].client;
    let pid = world.cluster.gateways[0].process.pid()?;
    let samples = if round.gate { 150 } else { 5_000 };
    // The first turn is for pages that any use of a gateway touches.
    let mut before = 0;
    for turn in 0..2 {
        before = if turn == 0 { 0 } else { memory(pid)? };
        for number in 0..samples {
            let logged_in = number % 3 == 2;
            let limit = if logged_in { proto::FRAME_BYTES_MAX } else { proto::LOGIN_FRAME_BYTES_MAX };
            let first = (limit - frame::HEADER_BYTES + 1) as u32;
            let length = match number {
                0..3 => first,
                3..6 => 0xff_ffff,
                _ => round.random.random_range(first..1 << 24),
            };
            let [_, a, b, c] = length.to_be_bytes();
            let header = [a, b, c, round.random.random()];
            let user = world.user(&format!("l{turn}-{number}"));
            let mut raw = if logged_in { enter(gateway, &user)? } else { connect(gateway)? };
            raw.write(&header).map_err(attacked)?;
            expect_end(round, &mut raw, &[Code::FrameTooLarge, Code::UnknownCommand], &|| {
                format!("the header {header:?}")
            });
            round.facts.faults += 1;
        }
    }
    let grown = memory(pid)?.saturating_sub(before);
    round.worst("memory_grown_kib", grown as f64 / 1_024.0);
    round.expect(grown <= MEMORY_NOISE_BYTES, || format!("the gateway grew by {grown} bytes"));
    still_serves(round, &mut world)?;
    round.keep(world)
}

fn hostile(round: &mut Round) -> Result<(), TortureError> {
    let mut world = round.world(with(&[]))?;
    let gateway = world.cluster.gateways[0].client;
    // A valid login in two pieces, cut at every byte.
    let whole = encode(Command::Login, &login(&world.user("split"), "raw", 1));
    for at in 1..whole.len() {
        let frame = encode(Command::Login, &login(&world.user("split"), "raw", at as u64));
        let mut raw = connect(gateway)?;
        raw.write(&frame[..at.min(frame.len())]).map_err(attacked)?;
        std::thread::sleep(Duration::from_millis(1));
        raw.write(&frame[at.min(frame.len())..]).map_err(attacked)?;
        let answer = raw.next(PATIENCE).map_err(attacked)?;
        round.expect(matches!(answer, Some(ServerFrame::LoginAck(_))), || {
            format!("split at {at}: {answer:?}")
        });
        round.facts.faults += 1;
    }
    let count = if round.gate { 300 } else { 3_000 };
    for number in 0..count {
        let logged_in = number % 2 == 1;
        let user = world.user(&format!("h{number}"));
        let mut raw = if logged_in { enter(gateway, &user)? } else { connect(gateway)? };
        let bytes = hostile_bytes(&mut round.random, &user);
        // It may be closed while we still write.
        let _ = raw.write(&bytes).and_then(|()| raw.say_no_more());
        let end = raw.end(PATIENCE);
        round.expect(end.is_some(), || {
            format!("still connected {PATIENCE:?} after {} hostile bytes and the end", bytes.len())
        });
        round.facts.faults += 1;
    }
    still_serves(round, &mut world)?;
    round.keep(world)
}

/// Noise, or frames of which some bytes are others.
fn hostile_bytes(random: &mut StdRng, user: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    if random.random_bool(0.3) {
        bytes.extend((0..random.random_range(1..2_000)).map(|_| random.random::<u8>()));
        return bytes;
    }
    for n in 1..=random.random_range(1..10) {
        let chat = format!("{user}:{user}");
        let send = wire::Send {
            stream: 1,
            n,
            chat: chat.clone(),
            body: vec![7; random.random_range(0..200)].into(),
            ..Default::default()
        };
        let frames = [
            encode(Command::Login, &login(user, "raw", n)),
            encode(Command::Send, &send),
            encode(Command::Ping, &wire::Ping { nonce: n }),
            encode(Command::Pull, &wire::Pull { chat: chat.clone(), ..wire::Pull::default() }),
            encode(Command::Sync, &wire::Sync { request: 1, ..wire::Sync::default() }),
            encode(Command::PushAck, &wire::PushAck { chat, history: n, seq: n }),
        ];
        bytes.extend(frames.choose(random).cloned().unwrap_or_default());
    }
    for _ in 0..random.random_range(1..8) {
        let at = random.random_range(0..bytes.len());
        bytes[at] = random.random();
    }
    let keep = random.random_range(1..=bytes.len());
    bytes.truncate(keep);
    bytes
}

/// Old Sends, on the same connection, on others, through the other gateway, by somebody else; and old Logins.
fn replayed(round: &mut Round) -> Result<(), TortureError> {
    let world = round.world(pairs())?;
    let gateways: Vec<SocketAddr> = world.cluster.gateways.iter().map(|gateway| gateway.client).collect();
    let (alice, bob, eve) = (world.user("alice"), world.user("bob"), world.user("eve"));
    let chat = format!("{alice}:{bob}");
    let mut raw = Raw::login(gateways[0], &login(&alice, "raw", 1)).map_err(attacked)?;
    let (mut sent, mut seqs) = (Vec::new(), BTreeMap::new());
    let count = 100u64;
    for n in 1..=count {
        let send = wire::Send {
            stream: 9,
            n,
            chat: chat.clone(),
            body: format!("message {n}").into(),
            ..Default::default()
        };
        raw.say(Command::Send, &send).map_err(attacked)?;
        if let Some(ack) = answer_to(&mut raw, n)? {
            seqs.insert(n, ack.map(|ack| ack.seq).unwrap_or(0));
        }
        sent.push(send);
    }
    round.expect(seqs.values().copied().eq(1..=count), || format!("seqs {seqs:?}"));
    round.facts.acked += count;
    let mut elsewhere = Raw::login(gateways[1], &login(&alice, "other", 1)).map_err(attacked)?;
    let mut by_eve = Raw::login(gateways[0], &login(&eve, "raw", 1)).map_err(attacked)?;
    for number in 0..REPLAYS {
        let at = round.random.random_range(0..sent.len());
        // Often one of those whose answer is kept.
        let at = if number.is_multiple_of(2) { sent.len() - 1 - at % 32 } else { at };
        let (send, n) = (&sent[at], at as u64 + 1);
        let (by, may_be_accepted) = match number % 3 {
            0 => (&mut raw, true),
            1 => (&mut elsewhere, true),
            _ => (&mut by_eve, false),
        };
        by.say(Command::Send, send).map_err(attacked)?;
        let answer = answer_to(by, n)?;
        let right = match &answer {
            Some(Ok(ack)) => may_be_accepted && Some(&ack.seq) == seqs.get(&n),
            Some(Err(error)) if may_be_accepted => error.code() == Code::TooOld && n + 32 <= count,
            Some(Err(error)) => error.code() == Code::NotAMember,
            None => false,
        };
        round.expect(right, || format!("the replay of {n} was answered {answer:?}"));
        round.facts.faults += 1;
    }
    // An old Login on another connection: refused, and nobody is thrown out.
    for _ in 0..10 {
        let mut late = connect(gateways[1])?;
        late.say(Command::Login, &login(&alice, "raw", 1)).map_err(attacked)?;
        expect_end(round, &mut late, &[Code::StaleAttempt], &|| "an old Login".into());
        round.facts.faults += 1;
    }
    raw.say(Command::Ping, &wire::Ping { nonce: 5 }).map_err(attacked)?;
    let mut alive = false;
    while let Some(frame) = raw.next(Duration::from_secs(5)).map_err(attacked)? {
        alive |= matches!(frame, ServerFrame::Pong(_));
        if alive {
            break;
        }
    }
    round.expect(alive, || "an old Login threw the present one out".into());
    // What is stored is what was sent, once.
    let mut bob = Raw::login(gateways[1], &login(&bob, "raw", 1)).map_err(attacked)?;
    let (mut cursor, mut stored) = (0, Vec::new());
    loop {
        let pull = wire::Pull { request: 1, chat: chat.clone(), cursor, ..wire::Pull::default() };
        bob.say(Command::Pull, &pull).map_err(attacked)?;
        let Some(frame @ ServerFrame::PullAck(_)) = bob.next(PATIENCE).map_err(attacked)? else { break };
        stored.extend(seqs_of(&frame));
        match frame {
            ServerFrame::PullAck(ack) if ack.has_more => cursor = stored.last().copied().unwrap_or(0),
            _ => break,
        }
    }
    let doubled = stored.len() as u64 - count.min(stored.len() as u64);
    round.facts.doubled += doubled;
    round.expect(stored.iter().copied().eq(1..=count), || format!("stored: {} messages", stored.len()));
    round.keep(world)
}

/// The answer to the Send with this n.
fn answer_to(raw: &mut Raw, n: u64) -> Result<Option<Result<wire::SendAck, wire::Error>>, TortureError> {
    while let Some(frame) = raw.next(PATIENCE).map_err(attacked)? {
        match frame {
            ServerFrame::SendAck(ack) if ack.n == n => return Ok(Some(Ok(ack))),
            ServerFrame::Error(error) if error.n == n => return Ok(Some(Err(error))),
            _ => {}
        }
    }
    Ok(None)
}

fn out_of_place(round: &mut Round) -> Result<(), TortureError> {
    let mut world = round.world(with(&[]))?;
    let gateway = world.cluster.gateways[0].client;
    let count = if round.gate { 200 } else { 1_000 };
    let mut seen = BTreeSet::new();
    for number in 0..count {
        let user = world.user(&format!("p{number}"));
        let (what, logged_in, bytes, code) = misplaced(&mut round.random, &user);
        let mut raw = if logged_in { enter(gateway, &user)? } else { connect(gateway)? };
        raw.write(&bytes).map_err(attacked)?;
        expect_end(round, &mut raw, &[code], &|| what.to_owned());
        seen.insert(what);
        round.facts.faults += 1;
    }
    round.expect(seen.len() == KINDS as usize, || format!("only {seen:?} were tried"));
    still_serves(round, &mut world)?;
    round.keep(world)
}

/// One thing that is wrong, and the code that it must be closed with.
fn misplaced(random: &mut StdRng, user: &str) -> (&'static str, bool, Vec<u8>, Code) {
    let known: Vec<u8> =
        Command::ALL.into_iter().filter(|it| it.is_from_client()).map(|it| it as u8).collect();
    let unknown = loop {
        let byte: u8 = random.random();
        if !known.contains(&byte) {
            break byte;
        }
    };
    let strange = vec![0, 0, 0, unknown];
    let may_not_come_first = |byte: &u8| *byte != Command::Login as u8;
    let early = known.iter().copied().filter(may_not_come_first).choose(random).unwrap_or(3);
    let login_with = |change: fn(&mut wire::Login)| {
        let mut login = login(user, "raw", 1);
        change(&mut login);
        encode(Command::Login, &login)
    };
    match random.random_range(0..KINDS) {
        0 => ("a command before login", false, vec![0, 0, 0, early], Code::NotLoggedIn),
        1 => ("an unknown command before login", false, strange, Code::UnknownCommand),
        2 => ("an unknown command", true, strange, Code::UnknownCommand),
        3 => ("a second login", true, login_with(|login| login.attempt = 2), Code::AlreadyLoggedIn),
        4 => {
            let versions = |login: &mut wire::Login| (login.wire_min, login.wire_max) = (2, 9);
            ("a version of the future", false, login_with(versions), Code::UnsupportedVersion)
        }
        5 => {
            let versions = |login: &mut wire::Login| (login.wire_min, login.wire_max) = (0, 0);
            ("a version of the past", false, login_with(versions), Code::UnsupportedVersion)
        }
        6 => ("a bad name", false, login_with(|login| login.user = "a:b".into()), Code::BadName),
        7 => ("no attempt", false, login_with(|login| login.attempt = 0), Code::BadRequest),
        8 => ("a login that is no message", false, vec![0, 0, 3, 1, 0xff, 0xff, 0xff], Code::BadBody),
        _ => ("a Ping that is no message", true, vec![0, 0, 3, 3, 0xff, 0xff, 0xff], Code::BadBody),
    }
}

fn connect(gateway: SocketAddr) -> Result<Raw, TortureError> {
    Raw::connect(gateway).map_err(attacked)
}

fn enter(gateway: SocketAddr, user: &str) -> Result<Raw, TortureError> {
    Raw::login(gateway, &login(user, "raw", 1)).map_err(attacked)
}

fn expect_end(round: &mut Round, raw: &mut Raw, codes: &[Code], what: &dyn Fn() -> String) {
    let end = raw.end(PATIENCE);
    let right = end.as_ref().is_some_and(|end| end.code.is_some_and(|code| codes.contains(&code)));
    round.expect(right, || format!("{} ended with {end:?} and not {codes:?}", what()));
}

/// The processes are the ones that they were, and serve.
fn still_serves(round: &mut Round, world: &mut World) -> Result<(), TortureError> {
    let dead: Vec<String> = world
        .processes()
        .into_iter()
        .filter_map(|process| (!process.is_running()).then(|| process.label().to_owned()))
        .collect();
    round.expect(dead.is_empty(), || format!("{dead:?} died"));
    let mut probe = world.probe(0)?;
    let accepted = probe.accepted(PATIENCE).map_err(attacked)?;
    round.expect(accepted.is_some(), || "nothing is accepted any more".into());
    Ok(())
}

/// In each round.
const REPLAYS: u32 = 100;
/// Arms of [`misplaced`].
const KINDS: u32 = 10;
/// Counters and log lines: not one frame's worth a connection.
const MEMORY_NOISE_BYTES: u64 = 256 * 1_024;
