//! One try: the phases in their order, and what each adds to the report. Main thread; the work is in the files beside.
//!
//! Trap: what is compared is taken at rest. Before the storm the kernel's slabs settle; nobody chats while memory is read.

mod pace;

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use super::burst;
use super::crowd::{Crowd, Who};
use super::floors::{self, Floor, Floors};
use super::live::{Latency, Live, Talk};
use super::plan::*;
use super::probe::Probe;
use super::report::MillionReport;
use super::system::{Gateway, System, Turns};
use super::usage::{Kernel, settle};
use super::{MillionArgs, Phase};
use crate::fsync::FsyncProbe;
use crate::monitor::{Monitor, RunError};
use crate::session::random_run;

/// See the head of this file.
pub struct Try<'a> {
    args: &'a MillionArgs,
    folder: &'a Path,
    began: Instant,
    until: Instant,
    /// Only asked whether it is over.
    clock: Monitor,
    report: MillionReport,
    floors: Floors,
    floors_took: Duration,
    /// Users of this try.
    name: String,
    before: Before,
    heartbeats: Heartbeats,
}

/// How things stood before the storm.
#[derive(Debug, Default, Clone, Copy)]
struct Before {
    kernel: u64,
    state: u64,
    names: u64,
}

/// Gateway CPU in those stretches in which nothing but heartbeats went on.
#[derive(Debug, Default, Clone, Copy)]
struct Heartbeats {
    cpu: Duration,
    time: Duration,
    turns: Turns,
}

impl<'a> Try<'a> {
    /// A try that ends before `until`.
    pub fn new(args: &'a MillionArgs, folder: &'a Path, until: Instant) -> Try<'a> {
        Try {
            args,
            folder,
            began: Instant::now(),
            until,
            clock: Monitor::new(0, until.saturating_duration_since(Instant::now()), true),
            report: MillionReport::default(),
            floors: Floors::default(),
            floors_took: Duration::ZERO,
            name: random_run(),
            before: Before::default(),
            heartbeats: Heartbeats::default(),
        }
    }

    /// All of it.
    pub fn run(mut self) -> Result<(MillionReport, Floors), RunError> {
        let began = Instant::now();
        (self.floors.accept.before, self.floors.echo.before) = self.floor_pair("before")?;
        self.floors_took = began.elapsed();
        self.say("system: Redis (appendfsync always), state");
        let mut system = System::start(self.folder, &self.args.state_set)?;
        self.fresh(&system)?;
        self.accept(&system)?;
        let gateway = system.gateway("gateway-million", &self.gateway_sets(EXTRA))?;
        self.quiet(&system, &gateway)?;
        let mut crowd = self.storm(&system, &gateway)?;
        self.hold(&system, &gateway, &mut crowd)?;
        self.messages(&system, &gateway)?;
        self.kill(&mut system, &gateway, &mut crowd)?;
        self.leave(&system, &gateway, crowd)?;
        // Before the known users: when time runs out, they are what nobody has set a goal for.
        self.burst(&system)?;
        self.known(&system, &gateway)?;
        gateway.stop()?;
        drop(system);
        if self.time_for("floors, after", self.floors_took) {
            (self.floors.accept.after, self.floors.echo.after) = self.floor_pair("after")?;
        }
        let Heartbeats { cpu, time, turns } = self.heartbeats;
        self.report.heartbeat_turns_over_1ms = turns.share_over();
        if !time.is_zero() {
            self.report.heartbeat_cpu_seconds = Some(time.as_secs_f64());
            self.report.heartbeat_cpu_cores = Some(cpu.as_secs_f64() / time.as_secs_f64());
        }
        self.report.divide(&self.floors);
        self.report.run_seconds = self.began.elapsed().as_secs_f64();
        self.say("done");
        Ok((self.report, self.floors))
    }

    fn floor_pair(&self, when: &str) -> Result<(Option<Floor>, Option<Floor>), RunError> {
        if self.skips(Phase::Floors) {
            return Ok((None, None));
        }
        let mut floors = [None; 2];
        for (floor, echo) in floors.iter_mut().zip([false, true]) {
            let kind = if echo { "one echo each" } else { "accept only" };
            self.say(&format!("floor {when}: {kind}"));
            let measured = match floors::measure(self.args.connections, echo, self.left()?, self.args.quiet) {
                Ok(measured) => measured,
                // What was measured before is worth more than this floor.
                Err(error) => {
                    self.say(&format!("  left out: {error}"));
                    continue;
                }
            };
            self.say(&format!(
                "  {:.1} s, {:.0}/s, {:.0} B of kernel memory per end",
                measured.seconds, measured.per_s, measured.end_bytes
            ));
            *floor = Some(measured);
        }
        Ok((floors[0], floors[1]))
    }

    /// What a gateway takes before anybody comes.
    fn fresh(&mut self, system: &System) -> Result<(), RunError> {
        let gateway =
            system.gateway("gateway-fresh", &self.with_own(["limits.connections_max=1000".to_owned()]))?;
        self.nap(FRESH_REST)?;
        let bytes = gateway.bytes()?;
        self.report.gateway_rss_before_bytes = Some(bytes);
        self.say(&format!("gateway, fresh: {:.1} MiB", mib(bytes)));
        gateway.stop()
    }

    fn accept(&mut self, system: &System) -> Result<(), RunError> {
        if self.skips(Phase::Accept) {
            return Ok(());
        }
        let mut sets = self.gateway_sets(EXTRA);
        sets.push("limits.login_ms_max=0".to_owned());
        let gateway = system.gateway("gateway-accept", &sets)?;
        settle()?;
        self.say("storm without login");
        let mut crowd = self.crowd(gateway.client, 0, false)?;
        crowd.begin();
        while !crowd.is_settled() && !crowd.is_over() {
            crowd.step();
        }
        let ready = crowd.sum().ready_now() as f64;
        // The gateway's side of the last ones may still be under way.
        while gateway.metric("connections")? < ready && !crowd.is_over() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let seconds = crowd.seconds_so_far();
        self.say(&format!("  {seconds:.1} s, {:.0}/s, {} failed", ready / seconds, crowd.sum().failed));
        if crowd.sum().failed == 0 {
            self.report.accept_seconds = Some(seconds);
        }
        crowd.leave()?;
        self.emptied(&gateway)?;
        gateway.stop()
    }

    fn quiet(&mut self, system: &System, gateway: &Gateway) -> Result<(), RunError> {
        if self.skips(Phase::Quiet) {
            return Ok(());
        }
        self.say("messages with nobody idle");
        if let Some(heard) = self.speak(system, gateway)? {
            self.report.quiet_p50_ms = Some(heard.latency.p50_ms);
            self.report.quiet_p99_ms = Some(heard.latency.p99_ms);
            self.report.quiet_fsync_p50_ms = Some(heard.fsync_p50_ms);
        }
        Ok(())
    }

    fn storm(&mut self, system: &System, gateway: &Gateway) -> Result<Crowd, RunError> {
        self.before = Before { kernel: settle()?.sum(), state: system.state_bytes()?, names: 0 };
        let mut live = None;
        if !self.skips(Phase::Live) {
            let talk =
                Talk { people: LIVE_PEOPLE, rate_per_s: LIVE_PER_S, seconds: self.left()?.as_secs_f64() };
            let mut people = Live::start(gateway.client, talk, self.left()?)?;
            people.go();
            people.talk(WARM_UP);
            live = Some(people);
        }
        self.say(&format!("storm of {} logins", self.args.connections));
        self.before.names = names(system)?;
        let mut crowd = self.crowd(gateway.client, 0, true)?;
        if let Some(live) = &mut live {
            live.begin_stretch();
        }
        let turns = gateway.turns()?;
        crowd.begin();
        while !crowd.is_settled() && !crowd.is_over() {
            crowd.step();
            if let Some(live) = &mut live {
                live.drain();
            }
        }
        self.left()?;
        self.report.storm_turns_over_1ms = gateway.turns()?.since(turns).share_over();
        let sum = crowd.sum();
        self.say(&format!(
            "  {:.1} s, {} logged in, {} failed, {} told to come again {:?}",
            crowd.seconds(),
            sum.ready_now(),
            sum.failed,
            sum.retried,
            sum.faults
        ));
        self.report.login_seconds = Some(crowd.seconds());
        self.report.login_p50_ms = crate::engine::millis(&sum.login, 0.5);
        self.report.login_p99_ms = crate::engine::millis(&sum.login, 0.99);
        if let Some(mut live) = live {
            live.talk(COLLECT);
            let latency = live.end_stretch();
            // What has been sent and has not come yet is missing in the percentiles; some always is.
            let open = live.open();
            self.report.storm_live_p50_ms = latency.map(|latency| latency.p50_ms);
            self.report.storm_live_p99_ms = latency.map(|latency| latency.p99_ms);
            self.report.storm_live_open = Some(open);
            self.say(&format!("  live messages: {}, {open} on the way", shown(latency)));
            live.leave()?;
        }
        Ok(crowd)
    }

    fn hold(&mut self, system: &System, gateway: &Gateway, crowd: &mut Crowd) -> Result<(), RunError> {
        if !self.skips(Phase::Hold) {
            self.say("everybody idle, heartbeats every 60 s");
            crowd.hold(COLLECT);
            let round = self.wait(HOLD);
            self.only_heartbeats(gateway, |_| crowd.hold(round))?;
        }
        self.left()?;
        let held = crowd.sum().ready_now();
        let each = |now: u64, before: u64| (now as f64 - before as f64) / held.max(1) as f64;
        self.report.connections = held;
        self.report.failed = u64::from(self.args.connections) - held;
        let fresh = self.report.gateway_rss_before_bytes.unwrap_or(0);
        let user = each(gateway.bytes()?, fresh);
        let state = each(system.state_bytes()?, self.before.state);
        let kernel = each(Kernel::now()?.sum(), self.before.kernel);
        self.report.redis_per_user_bytes = Some(each(names(system)?, self.before.names));
        self.report.gateway_rss_per_conn_bytes = Some(user);
        self.report.state_rss_per_session_bytes = Some(state);
        self.report.kernel_pair_bytes = Some(kernel);
        self.say(&format!("  {held} held; per connection: gateway {user:.1} B, state {state:.1} B, kernel, both ends, {kernel:.0} B"));
        Ok(())
    }

    fn messages(&mut self, system: &System, gateway: &Gateway) -> Result<(), RunError> {
        let takes = self.wait(TALK) + Duration::from_secs(5);
        if self.skips(Phase::Messages) || !self.time_for("messages", takes) {
            return Ok(());
        }
        self.say("messages among the idle");
        let turns = gateway.turns()?;
        let Some(heard) = self.speak(system, gateway)? else { return Ok(()) };
        let report = &mut self.report;
        report.latency_turns_over_1ms = gateway.turns()?.since(turns).share_over();
        report.latency_p50_ms = Some(heard.latency.p50_ms);
        report.latency_p99_ms = Some(heard.latency.p99_ms);
        report.latency_messages_open = Some(heard.open);
        report.fsync_p50_ms = Some(heard.fsync_p50_ms);
        report.fsync_p99_ms = Some(heard.fsync_p99_ms);
        report.latency_p50_over_fsync_ms = Some(heard.latency.p50_ms - heard.fsync_p50_ms);
        report.latency_p99_over_fsync_ms = Some(heard.latency.p99_ms - heard.fsync_p50_ms);
        report.latency_over_quiet = report.quiet_p50_ms.map(|quiet| heard.latency.p50_ms / quiet);
        Ok(())
    }

    fn kill(&mut self, system: &mut System, gateway: &Gateway, crowd: &mut Crowd) -> Result<(), RunError> {
        let after = self.wait(AFTER_KILL);
        if self.skips(Phase::Kill) || !self.time_for("state killed", after + BACK_MAX) {
            return Ok(());
        }
        self.say("state killed with SIGKILL and started again");
        let mut probe = Probe::start(gateway.client, &format!("probe-{}", self.name), 1)?;
        crowd.hold(COLLECT);
        let (dropped, bound) = (crowd.sum().dropped, gateway.metric("bound_connections")?);
        let killed = Instant::now();
        system.kill_state()?;
        // A probe that is dropped is a dropped connection, and nothing came back to it.
        let (back, mut lost) = match probe.accepted(BACK_MAX) {
            Ok(back) => (back.map(|at| at.saturating_duration_since(killed)), 0),
            Err(_) => (None, 1),
        };
        let shown = back.map_or_else(|| "never".into(), |back| format!("{:.2} s", back.as_secs_f64()));
        self.say(&format!("  back after {shown}; watched for {:.0} s", after.as_secs_f64()));
        self.report.state_kill_back_s = back.map(|back| back.as_secs_f64());
        let rest = after.saturating_sub(killed.elapsed());
        crowd.hold(rest.min(CALM_AFTER));
        let round = self.wait(HOLD);
        self.only_heartbeats(gateway, |_| crowd.hold(round))?;
        crowd.hold(after.saturating_sub(killed.elapsed()));
        let gone = (bound - gateway.metric("bound_connections")?).max(0.0) as u64;
        lost += crowd.sum().dropped - dropped;
        self.report.state_kill_dropped = Some(lost.max(gone));
        self.say(&format!("  dropped: {lost} by the clients' count, {gone} by the gateway's"));
        Ok(())
    }

    fn leave(&mut self, system: &System, gateway: &Gateway, crowd: Crowd) -> Result<(), RunError> {
        let online = system.redis_bytes()?;
        self.say("everybody leaves, by reset");
        crowd.leave()?;
        self.emptied(gateway)?;
        if !self.skips(Phase::After) {
            self.say("  the last is gone; half a minute of rest");
            self.nap(self.wait(AFTER_LEAVE))?;
            let bytes = gateway.bytes()?;
            self.report.gateway_rss_after_bytes = Some(bytes);
            self.report.rss_after_over_before =
                self.report.gateway_rss_before_bytes.map(|before| bytes as f64 / before as f64);
            self.say(&format!("  gateway: {:.1} MiB", mib(bytes)));
        }
        let each = (online as f64 - self.offline(system)? as f64) / self.report.connections.max(1) as f64;
        self.report.redis_per_session_bytes = Some(each);
        self.say(&format!("  Redis: {each:.1} B less per session"));
        Ok(())
    }

    /// The same users once more: what a login costs when the store knows them, and what a session adds.
    fn known(&mut self, system: &System, gateway: &Gateway) -> Result<(), RunError> {
        let takes = Duration::from_secs_f64(self.report.login_seconds.unwrap_or(0.0) * 1.3 + 10.0);
        if self.skips(Phase::Known) || !self.time_for("known users", takes) {
            return Ok(());
        }
        let offline = self.offline(system)?;
        self.say("storm of the same users, who are known now");
        let mut crowd = self.crowd(gateway.client, 1, true)?;
        crowd.begin();
        while !crowd.is_settled() && !crowd.is_over() {
            crowd.step();
        }
        let (ready, failed) = (crowd.sum().ready_now(), crowd.sum().failed);
        let each = (system.redis_bytes()? as f64 - offline as f64) / ready.max(1) as f64;
        self.say(&format!("  {:.1} s, {failed} failed; Redis: {each:.1} B per session", crowd.seconds()));
        self.report.login_known_seconds = Some(crowd.seconds());
        self.report.redis_per_session_bytes = Some(each);
        crowd.leave()?;
        self.emptied(gateway)
    }

    fn burst(&mut self, system: &System) -> Result<(), RunError> {
        let minute = self.wait(HOLD);
        if self.skips(Phase::Burst) || !self.time_for("burst", minute + burst::TAKES) {
            return Ok(());
        }
        self.say("burst: slow readers and half frames");
        let fresh = self.report.gateway_rss_before_bytes.unwrap_or(0);
        let plan = burst::Plan {
            sets: self.args.gateway_set.clone(),
            connections: self.args.connections,
            fresh,
            minute,
            timeout: self.left()?,
            quiet: self.args.quiet,
        };
        let burst = burst::run(system, plan)?;
        self.say(&format!("  {burst}"));
        burst.report(&mut self.report);
        Ok(())
    }

    /// 5,000 messages a second, with the time of an fsync on Redis's disk before and after.
    fn speak(&self, system: &System, gateway: &Gateway) -> Result<Option<Heard>, RunError> {
        let seconds = (WARM_UP + self.wait(TALK)).as_secs_f64();
        let talk = Talk { people: TALK_PEOPLE, rate_per_s: TALK_PER_S, seconds };
        let mut fsync = FsyncProbe::new(Some(&system.store_folder()));
        fsync.measure()?;
        let mut live = Live::start(gateway.client, talk, self.left()?)?;
        live.go();
        // The first message of a chat is dearer; each has had one by then.
        live.talk(WARM_UP);
        live.begin_stretch();
        live.talk_to_the_end();
        let latency = live.end_stretch();
        let open = live.open();
        let (sent, delivered) = (live.sum().sent, live.sum().delivered);
        live.leave()?;
        fsync.measure()?;
        let (fsync_p50_ms, fsync_p99_ms) = (fsync.millis(0.5), fsync.millis(0.99));
        self.say(&format!(
            "  {}; {delivered} of {sent} delivered; fsync {fsync_p50_ms:.3} / {fsync_p99_ms:.3} ms",
            shown(latency)
        ));
        Ok(latency.map(|latency| Heard { latency, open, fsync_p50_ms, fsync_p99_ms }))
    }

    /// Does something while nothing but heartbeats goes on, and counts the gateway's CPU.
    fn only_heartbeats(&mut self, gateway: &Gateway, wait: impl FnOnce(&Self)) -> Result<(), RunError> {
        let (turns, cpu, began) = (gateway.turns()?, gateway.cpu()?, Instant::now());
        wait(self);
        self.heartbeats.turns = self.heartbeats.turns.and(gateway.turns()?.since(turns));
        self.heartbeats.cpu += gateway.cpu()?.saturating_sub(cpu);
        self.heartbeats.time += began.elapsed();
        Ok(())
    }

    /// What Redis uses when no route is left.
    fn offline(&self, system: &System) -> Result<u64, RunError> {
        let until = Instant::now() + ROUTES_MAX;
        while system.redis_family_bytes("route:*")? > 0 {
            if Instant::now() > until {
                self.say("  routes are left in Redis; its figures are too small by them");
                break;
            }
            self.nap(Duration::from_secs(1))?;
        }
        system.redis_bytes()
    }

    fn emptied(&self, gateway: &Gateway) -> Result<(), RunError> {
        while gateway.metric("connections")? > 0.0 {
            self.nap(Duration::from_millis(100))?;
        }
        Ok(())
    }

    fn crowd(&self, target: SocketAddr, visit: u64, login: bool) -> Result<Crowd, RunError> {
        let who = Who { run: self.name.clone(), visit, login };
        Crowd::new(target, self.args.connections, who, self.left()?, self.args.quiet)
    }

    /// One config for all rows; only the phase without login has no login deadline.
    fn gateway_sets(&self, extra: u32) -> Vec<String> {
        self.with_own([
            format!("limits.connections_max={}", self.args.connections + extra),
            format!("limits.heartbeat_ms={HEARTBEAT_MS}"),
            format!("limits.idle_ms_max={}", 2 * HEARTBEAT_MS),
        ])
    }

    fn with_own<const N: usize>(&self, sets: [String; N]) -> Vec<String> {
        sets.into_iter().chain(self.args.gateway_set.iter().cloned()).collect()
    }
}

/// A stretch of messages.
struct Heard {
    latency: Latency,
    open: u64,
    fsync_p50_ms: f64,
    fsync_p99_ms: f64,
}

/// What the names of users take in Redis.
fn names(system: &System) -> Result<u64, RunError> {
    Ok(system.redis_family_bytes("user:*")? + system.redis_family_bytes("name:*")?)
}

fn shown(latency: Option<Latency>) -> String {
    latency.map_or_else(
        || "nothing was delivered".into(),
        |latency| format!("p50 {:.2} ms, p99 {:.2} ms", latency.p50_ms, latency.p99_ms),
    )
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
