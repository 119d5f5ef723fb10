//! A1, A2, A5, A8, A11: thousands of connections that mean harm, or mean well all at once. Main thread.
//!
//! Trap: attackers come from 127.16.0.0/12, everybody else from 127.0.0.1; that is how a limit per address, and a rule that
//! makes attackers vanish, tell them apart.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use proto::Command;
use proto::command::ServerFrame;
use proto::wire::{self, Code};

use super::common::{Beside, PATIENCE};
use crate::supervisor::ClusterOptions;
use crate::torture::tool::firewall::Rule;
use crate::torture::tool::horde::{Horde, Member};
use crate::torture::tool::process::{memory, metric, open_files};
use crate::torture::tool::raw::{Raw, encode, login};
use crate::torture::tool::wait_until;
use crate::torture::{Round, Row, TortureError};

/// The rows of this file.
pub const ROWS: &[Row] = &[
    Row {
        name: "A1",
        fault: "slowloris: 10,000 connections, a byte at a time before login",
        full_rounds: 5,
        gate: true,
        run: slowloris,
    },
    Row {
        name: "A2",
        fault: "half-open: 5,000 vanish after login",
        full_rounds: 5,
        gate: false,
        run: half_open,
    },
    Row {
        name: "A5",
        fault: "flood of 5,000 connections/s from one address",
        full_rounds: 5,
        gate: false,
        run: flood,
    },
    Row {
        name: "A11",
        fault: "all gateways killed at 15,000 connections",
        full_rounds: 10,
        gate: false,
        run: storm,
    },
];

fn slowloris(round: &mut Round) -> Result<(), TortureError> {
    let (deadline, every) = match round.gate {
        true => (Duration::from_secs(3), Duration::from_secs(1)),
        false => (Duration::from_secs(10), Duration::from_millis(2_500)),
    };
    let mut world = round.world(with(&[format!("limits.login_ms_max={}", deadline.as_millis())]))?;
    let gateway = world.cluster.gateways[0].client;
    let pid = world.cluster.gateways[0].process.pid()?;
    let frame = encode(Command::Login, &login(&world.user("slow"), "raw", 1));
    let beside = Beside::start(round, &mut world, "slowloris")?;
    let before = memory(pid)?;
    let count = 10_000;
    let mut horde = Horde::new(gateway, count, None).map_err(attacked)?;
    // Bytes of each.
    let (mut said, mut most) = (vec![1; count as usize], 0);
    let say_on = |horde: &mut Horde, said: &mut [usize]| {
        for index in 0..horde.members.len() {
            let (member, said) = (&horde.members[index], &mut said[index]);
            let is_due = member.began.elapsed() >= every * *said as u32;
            if member.ended.is_none() && is_due && *said < frame.len() {
                horde.say(index, &frame[*said..=*said]);
                *said += 1;
            }
        }
    };
    for number in 0..count as usize {
        horde.open(&frame[..1]).map_err(attacked)?;
        // About 5,000 a second.
        if number.is_multiple_of(50) {
            horde.pump();
            say_on(&mut horde, &mut said);
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    let all_gone = horde.pump_until(deadline + CLOSED_LATE_MAX + PATIENCE, |horde| {
        most = most.max(memory(pid).unwrap_or(0));
        say_on(horde, &mut said);
        horde.alive() == 0
    });
    let least = said.iter().min().copied().unwrap_or(0);
    round.expect(least >= BYTES_SAID_MIN, || format!("somebody said {least} bytes only, so was just silent"));
    round.expect(all_gone, || format!("{} of {count} are still connected", horde.alive()));
    let told = horde.all().filter(|member| member.code() == Some(Code::LoginTimeout)).count();
    let lives = horde.all().filter_map(|member| Some(member.ended? - member.began));
    let (first, last) =
        lives.fold((PATIENCE, Duration::ZERO), |(first, last), life| (first.min(life), last.max(life)));
    round.worst("closed_after_s", last.as_secs_f64());
    round.worst("memory_grown_mib", most.saturating_sub(before) as f64 / MIB);
    round.expect(told == count as usize, || format!("{told} of {count} were told LOGIN_TIMEOUT"));
    round.expect(first + EARLY_MAX >= deadline && last <= deadline + CLOSED_LATE_MAX, || {
        format!("closed {first:?} to {last:?} after connecting; the deadline is {deadline:?}")
    });
    round.expect(most.saturating_sub(before) <= BURST_BYTES_MAX, || {
        format!("the gateway grew by {} MiB", (most - before) >> 20)
    });
    drop(horde);
    beside.end(round)?;
    round.keep(world)
}

/// They log in, and then no packet of theirs arrives any more, nor one to them.
fn half_open(round: &mut Round) -> Result<(), TortureError> {
    let mut world = round.world(with(&[]))?;
    let (gateway, admin) = (world.cluster.gateways[0].client, world.cluster.gateways[0].admin);
    let pid = world.cluster.gateways[0].process.pid()?;
    let beside = Beside::start(round, &mut world, "half-open")?;
    let (files, bound) = (open_files(pid)?, metric(admin, BOUND)?);
    let count = 5_000;
    let mut horde = Horde::new(gateway, count, None).map_err(attacked)?;
    enter(&mut horde, count, &world.user("gone"))?;
    let rule = Rule::set_network(ATTACKERS)?;
    let began = Instant::now();
    let gone = wait_until(GONE_MAX, || metric(admin, BOUND).is_ok_and(|now| now <= bound));
    round.worst("gone_after_s", began.elapsed().as_secs_f64());
    horde.pump();
    let told = horde.members.len() - horde.alive();
    round.expect(told == 0, || format!("{told} of {count} heard of their end: the line was not dead"));
    round.expect(gone, || format!("half-open connections are there after {GONE_MAX:?}"));
    // A worker may still be on its way through the closes.
    let closed = wait_until(Duration::from_secs(2), || open_files(pid).is_ok_and(|now| now <= files + 8));
    round.expect(closed, || format!("open files: {files} before, {:?} after", open_files(pid)));
    // Their resets must not get through either: first they go, then the rule.
    drop(horde);
    rule.lift()?;
    beside.end(round)?;
    round.keep(world)
}

fn flood(round: &mut Round) -> Result<(), TortureError> {
    let cap = 200;
    let mut world = round.world(with(&[format!("limits.connections_per_address_max={cap}")]))?;
    let gateway = world.cluster.gateways[0].client;
    let beside = Beside::start(round, &mut world, "flood")?;
    let seconds = if round.gate || round.tenth { 5 } else { 20 };
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let flooding = std::thread::spawn(move || flood_from_one(gateway, &stopped));
    let (until, mut times, mut number) = (Instant::now() + Duration::from_secs(seconds), Vec::new(), 0);
    let mut failed = Vec::new();
    while Instant::now() < until {
        number += 1;
        let began = Instant::now();
        match Raw::login(gateway, &login(&world.user(&format!("other{number}")), "raw", 1)) {
            Ok(_) => times.push(began.elapsed()),
            Err(error) => failed.push(error.to_string()),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    stop.store(true, Ordering::Relaxed);
    let flooded =
        flooding.join().unwrap_or_else(|_| Err(io::Error::other("the flood panicked"))).map_err(attacked)?;
    times.sort_unstable();
    let p99 = times.get(times.len() * 99 / 100).copied().unwrap_or(PATIENCE);
    round.worst("accept_p99_ms", p99.as_secs_f64() * 1_000.0);
    round.worst("flood_per_s", flooded.opened as f64 / seconds as f64);
    round.expect(failed.is_empty(), || {
        format!("others were not let in: {} times, {:?}", failed.len(), failed.first())
    });
    round.expect(flooded.most_held <= cap, || {
        format!("{} connections of one address, {cap} are allowed", flooded.most_held)
    });
    round.expect(flooded.refused > 0, || "nobody of the flood was refused".into());
    let tolerated = round.gate;
    round.expect(tolerated || p99 <= Duration::from_millis(100), || {
        format!("others were let in within {p99:?} at p99")
    });
    beside.end(round)?;
    round.keep(world)
}

struct Flooded {
    opened: usize,
    refused: usize,
    most_held: usize,
}

/// 5,000 a second, those that are let in held on to.
fn flood_from_one(gateway: SocketAddr, stopped: &AtomicBool) -> io::Result<Flooded> {
    let source = Some(IpAddr::V4(Ipv4Addr::new(127, 16, 0, 1)));
    let mut horde = Horde::new(gateway, 1, None)?;
    let mut flooded = Flooded { opened: 0, refused: 0, most_held: 0 };
    let (began, mut looked) = (Instant::now(), Instant::now());
    while !stopped.load(Ordering::Relaxed) {
        let due = (began.elapsed().as_secs_f64() * FLOOD_PER_S) as usize;
        while flooded.opened < due {
            flooded.opened += 1;
            if let Err(error) = horde.open_from(source, b"") {
                // Turned away before we saw it, or the address has no port left for now.
                let known = [
                    io::ErrorKind::ConnectionReset,
                    io::ErrorKind::AddrNotAvailable,
                    io::ErrorKind::AddrInUse,
                ];
                if !known.contains(&error.kind()) {
                    return Err(error);
                }
                flooded.refused += 1;
            }
        }
        horde.pump();
        flooded.refused += horde.take_ended().len();
        std::thread::sleep(Duration::from_millis(2));
        horde.pump();
        if looked.elapsed() >= LOOK_EVERY {
            looked = Instant::now();
            // Who came in the last moment may not have heard yet.
            let held =
                horde.all().filter(|member| member.ended.is_none() && member.began.elapsed() > HEARD_MAX);
            flooded.most_held = flooded.most_held.max(held.count());
        }
        // Who came in the last moment may not have heard yet.
        if horde.alive() > 2 * FLOOD_PER_S as usize {
            return Err(io::Error::other("the gateway refuses nobody"));
        }
    }
    // The last word on how many are held: everybody has heard by now.
    std::thread::sleep(Duration::from_millis(500));
    horde.pump();
    flooded.most_held = flooded.most_held.max(horde.alive());
    Ok(flooded)
}

fn storm(round: &mut Round) -> Result<(), TortureError> {
    let cap = 2_000.0;
    let sets = [format!("limits.logins_per_s_max={cap}")];
    let mut world = round.world(ClusterOptions { gateways: 2, ..with(&sets) })?;
    let half = if round.gate { 1_000 } else { 7_500 };
    let users = [world.user("x"), world.user("y")];
    let mut hordes = Vec::new();
    for (gateway, user) in world.cluster.gateways.iter().zip(&users) {
        let mut horde = Horde::new(gateway.client, half, None).map_err(attacked)?;
        enter(&mut horde, half, user)?;
        hordes.push(horde);
    }
    round.facts.faults += 1;
    for gateway in &mut world.cluster.gateways {
        gateway.process.kill()?;
    }
    for gateway in &mut world.cluster.gateways {
        gateway.process.spawn_again()?;
    }
    let began = Instant::now();
    let mut back = hordes.iter().zip(&users).map(|(horde, user)| Return::of(horde, user)).collect::<Vec<_>>();
    let (mut rates, mut all_back) = (Vec::new(), false);
    while !all_back && began.elapsed() < BACK_MAX {
        all_back = true;
        for (horde, back) in hordes.iter_mut().zip(&mut back) {
            horde.pump();
            all_back &= back.step(horde)?;
        }
        rates.push((Instant::now(), back.iter().map(|back| back.logged_in).max().unwrap_or(0)));
        std::thread::sleep(Duration::from_millis(2));
    }
    round.worst("all_back_s", began.elapsed().as_secs_f64());
    let back: usize = back.iter().map(|back| back.logged_in).sum();
    round.expect(all_back, || format!("{back} of {} were back after {BACK_MAX:?}", 2 * half));
    // A second's worth, and the burst of a quarter that the configuration names.
    let most = most_in_a_second(&rates);
    round.worst("logins_in_a_second", most);
    round.expect(most <= cap * 1.25, || {
        format!("{most} logins in one second at one gateway, {cap} are allowed")
    });
    Ok(())
}

/// Some of one gateway who come back.
struct Return {
    user: String,
    since: Instant,
    attempts: Vec<u64>,
    due: Vec<Instant>,
    logged_in: usize,
}

impl Return {
    fn of(horde: &Horde, user: &str) -> Return {
        let count = horde.members.len();
        let since = Instant::now();
        Return {
            user: user.to_owned(),
            since,
            attempts: vec![1; count],
            due: vec![since; count],
            logged_in: 0,
        }
    }

    /// Reconnects whoever is out and due. Whether all are in.
    fn step(&mut self, horde: &mut Horde) -> Result<bool, TortureError> {
        let now = Instant::now();
        for index in 0..horde.members.len() {
            let member = &horde.members[index];
            let Some(ended) = member.ended else { continue };
            let told = member.error.as_ref().map_or(0, |error| error.retry_after_ms);
            // A client without advice waits a little; each one for another time.
            let wait = if told > 0 { u64::from(told) } else { 50 + index as u64 % 100 };
            self.due[index] = self.due[index].max(ended + Duration::from_millis(wait));
            if self.due[index] > now {
                continue;
            }
            self.attempts[index] += 1;
            let frame =
                encode(Command::Login, &login(&format!("{}{index}", self.user), "raw", self.attempts[index]));
            match horde.reopen(index, &frame) {
                Ok(()) => {}
                // It is not back yet.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    self.due[index] = now + Duration::from_millis(50 + index as u64 % 100);
                }
                Err(error) => return Err(attacked(error)),
            }
        }
        let is_back = |member: &&Member| member.began > self.since && member.is_logged_in();
        self.logged_in = horde.all().filter(is_back).count();
        Ok(self.logged_in == horde.members.len())
    }
}

fn most_in_a_second(rates: &[(Instant, usize)]) -> f64 {
    let mut most = 0;
    for (at, (then, before)) in rates.iter().enumerate() {
        let within = rates[at..].iter().take_while(|(now, _)| *now - *then <= Duration::from_secs(1)).last();
        most = most.max(within.map_or(0, |(_, after)| after.saturating_sub(*before)));
    }
    most as f64
}

/// Lets so many log in, as users `NAME0`, `NAME1`, ...
pub fn enter(horde: &mut Horde, count: u32, name: &str) -> Result<(), TortureError> {
    let mut waiting = BTreeSet::new();
    let mut attempts = vec![1u64; count as usize];
    let frame = |index: usize, attempt: u64| {
        encode(Command::Login, &login(&format!("{name}{index}"), "raw", attempt))
    };
    for index in 0..count as usize {
        horde.open(&frame(index, 1)).map_err(attacked)?;
        waiting.insert(index);
        if index.is_multiple_of(256) {
            horde.pump();
        }
    }
    let until = Instant::now() + PATIENCE;
    while !waiting.is_empty() {
        horde.pump();
        waiting.retain(|index| !horde.members[*index].is_logged_in());
        for index in waiting.clone() {
            let member = &horde.members[index];
            let told =
                Duration::from_millis(member.error.as_ref().map_or(100, |error| error.retry_after_ms.into()));
            if member.ended.is_some_and(|ended| ended.elapsed() >= told) {
                attempts[index] += 1;
                horde.reopen(index, &frame(index, attempts[index])).map_err(attacked)?;
            }
        }
        if Instant::now() > until {
            let why = waiting.first().map(|index| horde.members[*index].error.clone());
            return Err(TortureError::Load(format!(
                "{} of {count} could not log in: {why:?}",
                waiting.len()
            )));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// One gateway and one state server, with these settings.
pub fn with(gateway_sets: &[String]) -> ClusterOptions {
    ClusterOptions { gateway_sets: gateway_sets.to_vec(), ..ClusterOptions::default() }
}

/// An attack that could not be carried out.
pub fn attacked(error: io::Error) -> TortureError {
    TortureError::io("the attack", error)
}

/// What a frame from the server says of a chat: the seqs that it shows.
pub fn seqs_of(frame: &ServerFrame) -> Vec<u64> {
    match frame {
        ServerFrame::Push(push) => push.message.iter().map(|message: &wire::Message| message.seq).collect(),
        ServerFrame::PullAck(ack) => ack.messages.iter().map(|message| message.seq).collect(),
        _ => Vec::new(),
    }
}

const ATTACKERS: &str = "127.16.0.0/12";
const BOUND: &str = "rookery_gateway_bound_connections";
/// `burst_bytes_max` by default: what clients together may make a gateway keep.
pub const BURST_BYTES_MAX: u64 = 64 << 20;
/// For telling why and reading the end, with 10,000 at once.
const CLOSED_LATE_MAX: Duration = Duration::from_secs(2);
/// Ticks of the gateway's clock.
const EARLY_MAX: Duration = Duration::from_millis(100);
/// `idle_ms_max` by default, which is the promise.
const GONE_MAX: Duration = Duration::from_secs(90);
const BACK_MAX: Duration = Duration::from_secs(30);
const FLOOD_PER_S: f64 = 5_000.0;
/// Whoever is turned away has heard of it by then, on a machine that is full.
const HEARD_MAX: Duration = Duration::from_secs(2);
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Two in time would be a client that stopped.
const BYTES_SAID_MIN: usize = 3;
const MIB: f64 = 1_048_576.0;
