//! People who chat while others come, stand or are gone: the mode of `loadtest chat` with an engine of its own, so that
//! its latencies can be had for a stretch of time. Owned by the main thread.
//!
//! Trap: a message belongs to the stretch in which it was delivered, give or take the 200 ms in which engine threads
//! collect. Its time counts from when it was due.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use rand::Rng;

use crate::chat::mode::{ChatMode, ChatRun};
use crate::chat::plan::ChatPlan;
use crate::checker::Checker;
use crate::engine::{Engine, Plan, Sample, histogram, millis};
use crate::monitor::{Monitor, RunError};
use crate::session::random_run;

/// How much they talk.
#[derive(Debug, Clone, Copy)]
pub struct Talk {
    /// How many people; each sends to 4 others.
    pub people: u32,
    /// Messages a second, all together.
    pub rate_per_s: f64,
    /// At most for so long.
    pub seconds: f64,
}

/// See the head of this file.
pub struct Live {
    engine: Engine<Checker>,
    sum: Sample,
    stretch: Histogram<u64>,
    messages: u64,
    /// Only asked whether the run is over.
    clock: Monitor,
}

/// What a stretch of time had.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Latency {
    /// Median, ms.
    pub p50_ms: f64,
    /// 99 %, ms.
    pub p99_ms: f64,
}

impl Live {
    /// Logs them in; they stay silent until [`Live::go`].
    pub fn start(target: SocketAddr, talk: Talk, timeout: Duration) -> Result<Live, RunError> {
        let seed = u64::from(rand::rng().random::<u32>());
        let plan = ChatPlan::new(talk.people, talk.people, talk.rate_per_s, talk.seconds, seed);
        let (messages, participants) = (plan.messages, plan.participants().len() as u64);
        let run = Arc::new(ChatRun { name: random_run(), number: rand::rng().random(), plan });
        let engine_plan =
            Plan { connections: talk.people, targets: vec![target], prompt: true, ..Plan::default() };
        let engine = Engine::start(engine_plan, move |share| ChatMode::new(run.clone(), share))?;
        let people = u64::from(talk.people);
        let clock = Monitor::new(people, timeout, true);
        let mut live = Live { engine, sum: Sample::default(), stretch: histogram(3), messages, clock };
        live.engine.begin();
        let until = Instant::now() + LOGIN_MAX;
        while live.sum.ready_now() < people || live.sum.synced < participants {
            if Instant::now() > until || live.clock.is_over() {
                let sum = &live.sum;
                let (ready, faults) = (sum.ready_now(), &sum.faults);
                return Err(RunError::Unreachable(format!(
                    "{ready} of {people} who chat logged in: {faults:?}"
                )));
            }
            live.take(STEP);
        }
        Ok(live)
    }

    /// They begin to talk.
    pub fn go(&self) {
        self.engine.go(GO_MS);
    }

    /// Takes what was counted, without waiting.
    pub fn drain(&mut self) {
        self.take(Duration::ZERO);
    }

    /// Lets them talk for so long.
    pub fn talk(&mut self, wait: Duration) {
        let until = Instant::now() + wait;
        while Instant::now() < until && !self.clock.is_over() {
            self.take(STEP);
        }
    }

    /// Until the last message of the plan is sent, and a moment more.
    pub fn talk_to_the_end(&mut self) {
        while self.sum.sent < self.messages && !self.clock.is_over() {
            self.take(STEP);
        }
        let until = Instant::now() + LATE_MAX;
        while self.open() > 0 && Instant::now() < until {
            self.take(STEP);
        }
    }

    /// A stretch begins.
    pub fn begin_stretch(&mut self) {
        self.drain();
        self.stretch.reset();
    }

    /// It ends: its latency. None when nothing was delivered.
    pub fn end_stretch(&mut self) -> Option<Latency> {
        self.drain();
        Some(Latency { p50_ms: millis(&self.stretch, 0.5)?, p99_ms: millis(&self.stretch, 0.99)? })
    }

    /// Messages sent and neither delivered nor refused yet.
    pub fn open(&self) -> u64 {
        self.sum.sent.saturating_sub(self.sum.delivered + self.sum.unsure)
    }

    /// Everything counted so far.
    pub fn sum(&self) -> &Sample {
        &self.sum
    }

    /// They leave.
    pub fn leave(self) -> Result<(), RunError> {
        self.engine.stop()?;
        Ok(())
    }

    fn take(&mut self, wait: Duration) {
        let mut wait = wait;
        while let Some(sample) = self.engine.sample(wait) {
            // Bounds are the same on both sides.
            let _ = self.stretch.add(&sample.latency);
            self.sum.add(&sample);
            wait = Duration::ZERO;
        }
    }
}

const STEP: Duration = Duration::from_millis(20);
const GO_MS: u64 = 200;
const LOGIN_MAX: Duration = Duration::from_secs(30);
/// For the last messages to arrive.
const LATE_MAX: Duration = Duration::from_secs(3);
