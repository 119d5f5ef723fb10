//! What several rows do alike: worlds, waits that become findings, and how a load ends. Main thread.
//!
//! Trap: a wait that ends late is a finding and not an error: the round goes on to its verdict, which says what was lost.

use std::time::{Duration, Instant};

use crate::monitor::interrupted;
use crate::supervisor::{ClusterOptions, Process, Redis, SupervisorError};
use crate::torture::history::{History, MessageId, What};
use crate::torture::tool::wait_until;
use crate::torture::{Excuses, Load, Plan, Round, TortureError, Verdict, World};

/// Two gateways and two state servers on Redis and etcd.
pub fn pairs() -> ClusterOptions {
    ClusterOptions { gateways: 2, states: 2, ..ClusterOptions::default() }
}

/// Time that a fault lasts. Ended early when the run is.
pub fn rest(time: Duration) {
    let _ = wait_until(time, interrupted);
}

/// The ports of the state servers.
pub fn state_ports(world: &World) -> Vec<u16> {
    world.cluster.states.iter().map(|state| state.rpc.port()).collect()
}

/// The store of a world that is not embedded.
pub fn redis(world: &mut World) -> Result<&mut Redis, TortureError> {
    world.cluster.redis.as_mut().ok_or_else(|| TortureError::Missing("needs a Redis of its own".into()))
}

/// Gives a server further settings and starts it anew with them.
pub fn restart_with(process: &mut Process, sets: &[String]) -> Result<(), SupervisorError> {
    process.args_mut().extend(sets.iter().flat_map(|set| ["--set".to_owned(), set.clone()]));
    process.restart()
}

/// Waits for so many more acknowledgements, and until everybody who sends has one of a message sent from now on: who is on a server
/// that nothing was done to must not speak for the others. Reports how long that took as `figure`, seconds.
pub fn expect_acked(round: &mut Round, load: &Load, more: u64, within: Duration, figure: &'static str) {
    let (began, now_us) = (Instant::now(), load.now_us());
    let waited = load
        .wait_acked(more, within)
        .and_then(|()| load.wait_everybody_acked(now_us, within.saturating_sub(began.elapsed())));
    round.worst(figure, began.elapsed().as_secs_f64());
    if let Err(error) = waited {
        round.expect(false, || format!("after the fault: {error}"));
    }
}

/// Stops sending, expects that all that is acknowledged is shown within `within`, and judges.
pub fn settle(round: &mut Round, load: Load, within: Duration) -> Result<Verdict, TortureError> {
    load.hold();
    let began = Instant::now();
    let shown = load.wait_shown(within);
    round.worst("shown_s", began.elapsed().as_secs_f64());
    if let Err(error) = shown {
        round.expect(false, || format!("nobody sends any more: {error}"));
    }
    let history = load.finish(QUIET_MAX)?;
    Ok(round.judge(&history))
}

/// Nobody who was there may be shown a message much later than it was acknowledged.
pub fn expect_pushed(round: &mut Round, verdict: &Verdict) {
    let latest_ms = verdict.push_ms.max;
    round.worst("push_ms", latest_ms);
    round.expect(latest_ms <= PUSH_MS_MAX, || {
        format!("somebody was shown a message {latest_ms:.0} ms behind its acknowledgement")
    });
}

/// The same where the store has lost what was acknowledged: to show all of it would be waited for in vain.
pub fn settle_after_loss(round: &mut Round, load: Load) -> Result<Verdict, TortureError> {
    let history = load.finish(LOSSY_QUIET_MAX)?;
    Ok(round.judge_with(&history, Excuses { history_lost: true, unknown: true, gaps: false }))
}

/// Gives the gateways time to ask everybody to Sync: nobody has to send for it, or to log in anew.
pub fn everybody_syncs(load: &Load) {
    load.hold();
    // It is over when all have caught up, or when that has had its time.
    let _ = load.wait_shown(SYNC_MAX);
}

/// Expects that nobody is told "accepted" while `for_so_long`, once what was on its way has arrived.
pub fn expect_no_acks(round: &mut Round, load: &Load, for_so_long: Duration) {
    std::thread::sleep(ON_ITS_WAY.min(for_so_long));
    let before = load.acked();
    std::thread::sleep(for_so_long.saturating_sub(ON_ITS_WAY));
    let more = load.acked() - before;
    round.expect(more == 0, || format!("{more} messages were acknowledged while nothing could be stored"));
}

/// The 99th percentile of the times from asking to the acknowledgement, of messages sent between two moments, ms.
pub fn ack_p99_ms(history: &History, from_us: u64, to_us: u64) -> f64 {
    let mut sent: std::collections::HashMap<MessageId, u64> = std::collections::HashMap::new();
    let mut times = Vec::new();
    for record in &history.records {
        match &record.what {
            What::Sent { id, .. } if (from_us..to_us).contains(&record.at_us) => {
                sent.insert(*id, record.at_us);
            }
            What::Acked { id, .. } => times.extend(sent.remove(id).map(|then| record.at_us - then)),
            _ => {}
        }
    }
    // Without an answer it took at least until now.
    let last = history.records.last().map_or(0, |record| record.at_us);
    times.extend(sent.values().map(|then| last.saturating_sub(*then)));
    times.sort_unstable();
    times
        .get((times.len() * 99 / 100).min(times.len().saturating_sub(1)))
        .map_or(0.0, |us| *us as f64 / 1_000.0)
}

/// A load that goes on beside an attack: how others fare before and meanwhile, in the same round.
pub struct Beside {
    load: Load,
    /// How long they are alone, and with an attack that stands: what both 99th percentiles are of.
    alone: Duration,
    began_us: u64,
    attacked_us: u64,
    over_us: Option<u64>,
}

impl Beside {
    /// Starts it, and lets it be alone for a while.
    pub fn start(round: &mut Round, world: &mut World, attack: &str) -> Result<Beside, TortureError> {
        Beside::start_with(round, world, attack, Plan::default())
    }

    /// The same with another plan.
    pub fn start_with(
        round: &mut Round,
        world: &mut World,
        attack: &str,
        plan: Plan,
    ) -> Result<Beside, TortureError> {
        // Without groups: who answers how fast is compared with what was measured before there were any.
        let load = world.load(Plan { per_s: 500, group_users: 0, ..plan })?;
        load.wait_acked(300, PATIENCE)?;
        let alone = if round.gate { ALONE_GATE } else { ALONE };
        let began_us = load.now_us();
        std::thread::sleep(alone);
        round.fault(&load, attack);
        let attacked_us = load.now_us();
        Ok(Beside { load, alone, began_us, attacked_us, over_us: None })
    }

    /// From here on others are compared: what came before was the attack's own work. `attack` goes on with it, in the time that it is given.
    pub fn attack_stands(
        &mut self,
        attack: impl FnOnce(Duration) -> Result<(), TortureError>,
    ) -> Result<(), TortureError> {
        self.attacked_us = self.load.now_us();
        let until = Instant::now() + self.alone;
        attack(self.alone)?;
        std::thread::sleep(until.saturating_duration_since(Instant::now()));
        Ok(())
    }

    /// Up to here others are compared: what comes now is work that anybody may ask for.
    pub fn attack_ends(&mut self) {
        self.over_us = Some(self.load.now_us());
    }

    /// The attack is over. Nobody else may have lost anything, or been slowed down by more than what is promised; that is
    /// not judged with `--gate`, which runs on machines that do other things too.
    pub fn end(self, round: &mut Round) -> Result<(), TortureError> {
        let end_us = self.load.now_us();
        let over_us = self.over_us.unwrap_or(end_us);
        self.load.healed("the attack");
        self.load.hold();
        let history = self.load.finish(QUIET_MAX)?;
        round.judge(&history);
        let attacked_us = self.attacked_us.min(self.began_us + self.alone.as_micros() as u64);
        // All of it: a stall of seconds must not hide behind the seconds around it. The median over seconds says how much of a difference is
        // the machine's, which stalls too.
        let of = [(self.began_us, attacked_us), (self.attacked_us, over_us), (over_us, end_us)];
        let [before, meanwhile, behind] = of.map(|(from_us, to_us)| ack_p99_ms(&history, from_us, to_us));
        let [calm, under] = [of[0], of[1]].map(|(from_us, to_us)| median_p99_ms(&history, from_us, to_us));
        round.worst("p99_before_ms", before);
        round.worst("p99_meanwhile_ms", meanwhile);
        round.worst("p99_of_most_seconds_over_before", under / calm.max(0.001));
        if over_us < end_us {
            round.worst("p99_behind_it_ms", behind);
        }
        let ratio = meanwhile / before.max(0.001);
        round.worst("p99_meanwhile_over_before", ratio);
        round.expect(round.gate || ratio <= OTHERS_P99_MAX, || {
            format!("the p99 of the others became {ratio:.1} times what it was")
        });
        Ok(())
    }
}

/// The median over seconds of [`ack_p99_ms`].
fn median_p99_ms(history: &History, from_us: u64, to_us: u64) -> f64 {
    let slices = (to_us.saturating_sub(from_us) / SLICE_US).max(1);
    let slice =
        |at: u64| ack_p99_ms(history, from_us + at * SLICE_US, (from_us + (at + 1) * SLICE_US).min(to_us));
    let mut all: Vec<f64> = (0..slices).map(slice).collect();
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

/// For what must come, however slow the machine is.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// Until all is answered and shown at the end of a round.
pub const QUIET_MAX: Duration = Duration::from_secs(60);
/// Nobody online stays deaf for longer.
const PUSH_MS_MAX: f64 = 5_000.0;
/// P5 of GUARANTEES.md, over what it was before.
const OTHERS_P99_MAX: f64 = 2.0;
/// As many slices as a median needs.
const ALONE: Duration = Duration::from_secs(10);
/// Not judged then.
const ALONE_GATE: Duration = Duration::from_secs(3);
const SLICE_US: u64 = 1_000_000;
/// For what can still be answered and shown.
const LOSSY_QUIET_MAX: Duration = Duration::from_secs(15);
/// For logging in and catching up.
const SYNC_MAX: Duration = Duration::from_secs(5);
/// Longest that an answer which had left already may take.
const ON_ITS_WAY: Duration = Duration::from_millis(300);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::torture::history::{Place, Record, To};

    #[test]
    fn a_percentile_is_of_what_was_sent_in_the_window() {
        let id = |n| MessageId { from: 0, n };
        let place = Place { chat: "a:b".into(), history: 1, seq: 1 };
        let record = |at_us, what| Record { at_us, who: Some(0), what };
        let records = vec![
            record(1_000, What::Sent { id: id(1), to: To::User(1) }),
            record(2_000, What::Sent { id: id(2), to: To::User(1) }),
            record(7_000, What::Acked { id: id(2), place: place.clone() }),
            record(90_000, What::Acked { id: id(1), place }),
        ];
        let history = History { records, ..History::default() };
        assert_eq!(ack_p99_ms(&history, 1_500, 3_000), 5.0);
        assert_eq!(ack_p99_ms(&history, 0, 1_500), 89.0);
        assert_eq!(ack_p99_ms(&history, 50_000, 60_000), 0.0);
    }
}
