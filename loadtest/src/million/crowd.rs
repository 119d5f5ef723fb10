//! The many: connections that log in (or only connect), answer nothing, and keep their heartbeats. The mode lives on the
//! engine threads, [`Crowd`] on the main thread.
//!
//! Trap: a user's number of attempts must rise from one crowd of the same users to the next, or the store calls the
//! second one stale.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use proto::frame;

use super::floors::WINDOW;
use crate::engine::{Engine, Io, Mode, Plan, Sample, Share};
use crate::fault::Fault;
use crate::monitor::{Monitor, RunError};
use crate::session::{Heard, Session};

/// Who comes.
#[derive(Debug, Clone)]
pub struct Who {
    /// In user names.
    pub run: String,
    /// Which time they come; 0 is the first.
    pub visit: u64,
    /// Whether they log in.
    pub login: bool,
}

/// See the head of this file.
pub struct Crowd {
    engine: Engine<()>,
    monitor: Monitor,
    begun_us: u64,
    wanted: u64,
}

impl Crowd {
    /// Makes the threads; [`Crowd::begin`] lets them connect.
    pub fn new(
        target: SocketAddr,
        connections: u32,
        who: Who,
        timeout: Duration,
        quiet: bool,
    ) -> Result<Crowd, RunError> {
        let plan = Plan {
            connections,
            targets: vec![target],
            window: WINDOW,
            ready_ms_max: READY_MS_MAX,
            ..Plan::default()
        };
        let engine = Engine::start(plan, move |share| CrowdMode::new(&who, share))?;
        let monitor = Monitor::new(u64::from(connections), timeout, quiet);
        Ok(Crowd { engine, monitor, begun_us: 0, wanted: u64::from(connections) })
    }

    /// Opens the doors.
    pub fn begin(&mut self) {
        self.begun_us = self.engine.begin();
    }

    /// Takes what was counted within a moment; call it often.
    pub fn step(&mut self) {
        self.monitor.step(&self.engine);
    }

    /// Whether nobody is on the way any more.
    pub fn is_settled(&self) -> bool {
        let sum = self.monitor.sum();
        sum.ready + sum.failed >= self.wanted
    }

    /// Steps for so long.
    pub fn hold(&mut self, wait: Duration) {
        let until = Instant::now() + wait;
        while Instant::now() < until && !self.is_over() {
            self.step();
        }
    }

    /// Out of time, or interrupted.
    pub fn is_over(&self) -> bool {
        self.monitor.is_over()
    }

    /// What was counted.
    pub fn sum(&self) -> &Sample {
        self.monitor.sum()
    }

    /// From the begin to the last that was ready.
    pub fn seconds(&self) -> f64 {
        self.sum().last_ready_us.saturating_sub(self.begun_us) as f64 / 1e6
    }

    /// From the begin to now.
    pub fn seconds_so_far(&self) -> f64 {
        self.engine.now_us().saturating_sub(self.begun_us) as f64 / 1e6
    }

    /// Everybody leaves, by reset.
    pub fn leave(self) -> Result<(), RunError> {
        self.monitor.finish();
        self.engine.stop()?;
        Ok(())
    }
}

struct CrowdMode {
    session: Session,
    attempt_base: u64,
    login: bool,
}

impl CrowdMode {
    fn new(who: &Who, share: Share) -> CrowdMode {
        let attempt_base = who.visit * ATTEMPTS_PER_VISIT;
        CrowdMode { session: Session::new(&who.run, share.first), attempt_base, login: who.login }
    }
}

impl Mode for CrowdMode {
    type Part = ();

    fn greet(&mut self, index: u32, attempt: u64, out: &mut BytesMut) {
        if self.login {
            self.session.login(index, self.attempt_base + attempt, out);
        }
    }

    fn ready_at_once(&self) -> bool {
        !self.login
    }

    fn receive(&mut self, index: u32, bytes: &[u8], io: &mut Io) -> Result<usize, Fault> {
        let mut used = 0;
        while let Some(frame) =
            frame::cut(&bytes[used..], proto::FRAME_BYTES_MAX).map_err(|_| Fault::BadFrame)?
        {
            used += frame.wire_bytes();
            // Nobody writes to them, so nothing else comes.
            let _: Heard = self.session.hear(index, &frame, io)?;
        }
        Ok(used)
    }

    fn lost(&mut self, index: u32, fault: &Fault, _: &mut Io) -> Option<u64> {
        // Who is told to come again does, spread a little; who is dropped or refused otherwise has failed.
        (fault.wait_ms() > 0).then(|| fault.wait_ms() + u64::from(index) % SPREAD_MS)
    }

    fn tick(&mut self, io: &mut Io) -> Option<u64> {
        self.session.tick(io)
    }

    fn finish(self) {}
}

/// From begin to LoginAck.
const READY_MS_MAX: u64 = 30_000;
/// More than one visit can use.
const ATTEMPTS_PER_VISIT: u64 = 1 << 20;
const SPREAD_MS: u64 = 97;
