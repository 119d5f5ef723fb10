//! Processes that hang: SIGSTOP, some seconds, SIGCONT. Main thread.
//!
//! Trap: a process that wakes up goes on with what it was about to do. So the round lasts on behind the fault, and judges
//! what the late one did.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use super::common::{PATIENCE, QUIET_MAX, expect_acked, pairs};
use crate::supervisor::{ClusterOptions, Process};
use crate::torture::history::{History, MessageId, What};
use crate::torture::{Plan, Round, Row, TortureError, World};

/// F5: one part after the other, round by round.
fn one_part(round: &mut Round) -> Result<(), TortureError> {
    let part = PARTS[(round.seed % 4) as usize];
    let pause = match (round.gate, round.seed / 4 % 3) {
        (true, _) | (_, 0) => Duration::from_secs(1),
        (_, 1) => Duration::from_secs(5),
        _ => Duration::from_secs(30),
    };
    let mut world = round.world(pairs())?;
    let load = world.load(Plan { gateways_live: part != "gateway", ..Plan::default() })?;
    load.wait_acked(round.many(50 + round.seed % 300), PATIENCE)?;
    let process = find(&mut world, part)?;
    let fault = format!("{} SIGSTOP {} s", process.label(), pause.as_secs());
    process.pause()?;
    round.fault(&load, fault.clone());
    let before = load.acked();
    std::thread::sleep(pause);
    let meanwhile = load.acked() - before;
    find(&mut world, part)?.resume()?;
    load.healed(fault);
    if part == "etcd" || part == "state" {
        // Whoever is not on the stopped server goes on; with etcd away all do.
        let least = pause.as_secs() * if part == "etcd" { 200 } else { 100 };
        round.expect(meanwhile >= least, || format!("only {meanwhile} messages were acknowledged meanwhile"));
    }
    let more = round.many(500);
    expect_acked(round, &load, more, PATIENCE, "more_acked_s");
    round.judge(&load.finish(QUIET_MAX)?);
    round.keep(world)
}

fn find<'a>(world: &'a mut World, part: &str) -> Result<&'a mut Process, TortureError> {
    world
        .processes()
        .into_iter()
        .find(|process| process.label().starts_with(part))
        .ok_or_else(|| TortureError::Missing(format!("needs {part}")))
}

/// P3: one of three state servers; the others' users hardly notice.
fn one_of_three(round: &mut Round) -> Result<(), TortureError> {
    let pause = Duration::from_secs(if round.tenth || round.gate { 10 } else { 30 });
    let mut world = round.world(ClusterOptions { states: 3, ..pairs() })?;
    // Many users, so that each server has some; the same rate, so that queues are no part of it.
    let plan = Plan { users: 48, second_devices: 0, away: 0, per_s: APART_PER_S, ..Plan::default() };
    let load = world.load(plan)?;
    load.wait_acked(1_000, PATIENCE)?;
    let from_us = load.now_us();
    std::thread::sleep(pause);
    let victim = (round.seed % 3) as usize;
    world.cluster.states[victim].process.pause()?;
    round.fault(&load, format!("state-{victim} SIGSTOP {} s", pause.as_secs()));
    let stopped_us = load.now_us();
    std::thread::sleep(pause);
    let until_us = load.now_us();
    world.cluster.states[victim].process.resume()?;
    load.healed("state SIGSTOP");
    expect_acked(round, &load, 500, PATIENCE, "more_acked_s");
    let history = load.finish(QUIET_MAX)?;
    round.judge(&history);
    let waits = waits(&history);
    let hit = hit(&waits, stopped_us);
    let others = |from_us: u64, until_us: u64| {
        let mut times: Vec<u64> = waits
            .iter()
            .filter(|(id, (sent_us, _))| !hit.contains(&id.from) && (from_us..until_us).contains(sent_us))
            .map(|(_, (_, took_us))| *took_us)
            .collect();
        times.sort_unstable();
        times.get(times.len() * 99 / 100).map_or(0.0, |us| *us as f64 / 1_000.0)
    };
    let (before, meanwhile) = (others(from_us, stopped_us), others(stopped_us, until_us));
    round.worst("users_hit_percent", hit.len() as f64 * 100.0 / 48.0);
    round.worst("others_p99_before_ms", before);
    round.worst("others_p99_meanwhile_ms", meanwhile);
    round.worst("others_p99_ratio", meanwhile / before.max(0.001));
    round.expect(!hit.is_empty() && hit.len() <= HIT_MAX, || format!("{} of 48 users were hit", hit.len()));
    round.expect(meanwhile <= before * 2.0, || {
        format!("p99 of the others was {before:.2} ms before and {meanwhile:.2} ms meanwhile")
    });
    round.keep(world)
}

/// When each message was sent, and how long its answer took: that it is accepted, or refused, as some of groups are whose members
/// come and go. What was never answered has taken all the time that there was.
fn waits(history: &History) -> HashMap<MessageId, (u64, u64)> {
    let end_us = history.records.iter().map(|record| record.at_us).max().unwrap_or(0);
    let mut waits = HashMap::new();
    for record in &history.records {
        match &record.what {
            What::Sent { id, .. } => drop(waits.insert(*id, (record.at_us, end_us - record.at_us))),
            What::Acked { id, .. } | What::Refused { id, .. } => {
                if let Some((sent_us, took_us)) = waits.get_mut(id) {
                    *took_us = record.at_us.saturating_sub(*sent_us);
                }
            }
            _ => {}
        }
    }
    waits
}

/// The users of the stopped server: those whose messages of its first moments had to wait until it was declared dead.
/// Nothing else tells a client where its connection is hashed to.
fn hit(waits: &HashMap<MessageId, (u64, u64)>, stopped_us: u64) -> HashSet<u32> {
    let first = stopped_us..stopped_us + 300_000;
    let waited =
        waits.iter().filter(|(_, (sent_us, took_us))| first.contains(sent_us) && *took_us > HIT_US_MIN);
    waited.map(|(id, _)| id.from).collect()
}

const PARTS: [&str; 4] = ["state", "redis", "gateway", "etcd"];
/// So few that nobody waits for the machine.
const APART_PER_S: u32 = 1_000;
/// A third of 48, and three and a third standard deviations: by chance it is more once in two thousand.
const HIT_MAX: usize = 27;
/// The gateway answers for a server that is silent for 500 ms.
const HIT_US_MIN: u64 = 150_000;

/// Of this file.
pub const ROWS: &[Row] = &[
    Row {
        name: "F5",
        fault: "state, Redis, gateway, etcd paused by turns for 1, 5, 30 s (SIGSTOP)",
        full_rounds: 240,
        gate: true,
        run: one_part,
    },
    Row {
        name: "P3",
        fault: "one of three state servers paused for 30 s (SIGSTOP): the others' users",
        full_rounds: 3,
        gate: false,
        run: one_of_three,
    },
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::torture::history::{Place, Record, To};

    #[test]
    fn an_answer_is_one_whatever_it_says() {
        let id = |n| MessageId { from: 1, n };
        let place = Place { chat: "".into(), history: 1, seq: 1 };
        let record = |at_us, what| Record { at_us, who: Some(1), what };
        let sent = |n| What::Sent { id: id(n), to: To::User(2) };
        let records = vec![
            record(10, sent(1)),
            record(20, sent(2)),
            record(30, sent(3)),
            record(35, What::Refused { id: id(2), code: String::new() }),
            record(40, What::Acked { id: id(1), place }),
            record(90, sent(4)),
        ];
        let history = History { records, ..History::default() };
        let waits = waits(&history);
        let took = |n| waits[&id(n)];
        assert_eq!([1, 2, 3, 4].map(took), [(10, 30), (20, 15), (30, 60), (90, 0)]);
    }

    #[test]
    fn who_waited_at_first_was_hit() {
        let id = |from| MessageId { from, n: 1 };
        let waits = HashMap::from([
            (id(1), (1_010_000, 900_000)),
            (id(2), (1_010_000, 2_000)),
            (id(3), (2_010_000, 900_000)),
        ]);
        assert_eq!(hit(&waits, 1_000_000), HashSet::from([1]));
    }
}
