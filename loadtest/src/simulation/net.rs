//! Virtual time, the events that wait for it, and the network: pipes that carry packets in order, late, or not at all. Pure.
//!
//! A pipe is a TCP connection. In each direction packets arrive in order and none is lost while it lives; a cut loses what
//! had not arrived, and either end hears of it soon or not at all.
//!
//! Trap: time only moves from event to event, and events at one instant come in the order in which they were scheduled.

use std::collections::BTreeMap;

use bytes::Bytes;
use proto::link::{Down, Up};

use super::draw::Draw;
use super::event::Event;
use super::plan::{MS, Plan};

/// Which end of a pipe: the one that opened it, or the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Side {
    Opener,
    Other,
}

/// What a pipe carries.
#[derive(Debug, Clone)]
pub enum Packet {
    /// Whole frames of the client protocol.
    Frames(Bytes),
    /// From a gateway to a state server.
    Up(Up),
    /// And back.
    Down(Down),
}

/// Where the end of a pipe is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Host {
    Device(usize),
    Gateway(usize),
    Server(usize),
}

#[derive(Debug)]
struct Pipe {
    hosts: [Host; 2],
    open: [bool; 2],
    /// Of the direction that starts at this side.
    last_arrival_us: [u64; 2],
    stalled_until_us: [u64; 2],
    lost_after_us: [u64; 2],
}

/// See the head of this file.
pub struct Net {
    /// Virtual microseconds since the start.
    pub now_us: u64,
    /// Chance.
    pub draw: Draw,
    /// The network's delays, until everything heals.
    usual_us: u64,
    slow_us: u64,
    pipes: Vec<Pipe>,
    waiting: BTreeMap<(u64, u64), Event>,
    next: u64,
    /// Events that came.
    pub events: u64,
}

impl Side {
    /// The other one.
    pub fn across(self) -> Side {
        if self == Side::Opener { Side::Other } else { Side::Opener }
    }
}

impl Net {
    /// Nothing scheduled.
    pub fn new(plan: &Plan, draw: Draw) -> Self {
        Net {
            now_us: 0,
            draw,
            usual_us: plan.network_us,
            slow_us: plan.network_slow_us,
            pipes: Vec::new(),
            waiting: BTreeMap::new(),
            next: 0,
            events: 0,
        }
    }

    /// Milliseconds, as servers count them.
    pub fn now_ms(&self) -> u64 {
        self.now_us / MS
    }

    /// Schedules an event.
    pub fn after(&mut self, delay_us: u64, event: Event) {
        self.next += 1;
        self.waiting.insert((self.now_us.saturating_add(delay_us), self.next), event);
    }

    /// The next event, unless it comes after this time.
    pub fn next_event(&mut self, until_us: u64) -> Option<Event> {
        let (at, _) = *self.waiting.first_key_value()?.0;
        if at > until_us {
            self.now_us = until_us;
            return None;
        }
        let ((at, _), event) = self.waiting.pop_first()?;
        self.now_us = at;
        self.events += 1;
        Some(event)
    }

    /// From now on the network is quick, no stall lasts, and whoever has not heard of a cut soon does.
    pub fn heal(&mut self) {
        self.slow_us = self.usual_us;
        let now_us = self.now_us;
        for pipe in 0..self.pipes.len() {
            let state = &mut self.pipes[pipe];
            state.stalled_until_us = state.stalled_until_us.map(|until| until.min(now_us));
            let is_cut = state.lost_after_us.iter().any(|lost_us| *lost_us < u64::MAX);
            for side in [Side::Opener, Side::Other] {
                if is_cut && self.is_open(pipe, side) {
                    let heard_us = self.draw.between(1, 200 * MS);
                    self.after(heard_us, Event::Ended { pipe, side });
                }
            }
        }
    }

    /// A new pipe.
    pub fn open(&mut self, from: Host, to: Host) -> usize {
        self.pipes.push(Pipe {
            hosts: [from, to],
            open: [true; 2],
            last_arrival_us: [0; 2],
            stalled_until_us: [0; 2],
            lost_after_us: [u64::MAX; 2],
        });
        self.pipes.len() - 1
    }

    /// Who is at this end.
    pub fn host(&self, pipe: usize, side: Side) -> Host {
        self.pipes[pipe].hosts[side as usize]
    }

    /// Whether this end is open.
    pub fn is_open(&self, pipe: usize, side: Side) -> bool {
        self.pipes[pipe].open[side as usize]
    }

    /// Pipes of which both ends are open.
    pub fn living(&self) -> Vec<usize> {
        (0..self.pipes.len()).filter(|at| self.pipes[*at].open == [true; 2]).collect()
    }

    /// Whether a living pipe leads to a state server.
    pub fn is_link(&self, pipe: usize) -> bool {
        matches!(self.pipes[pipe].hosts[1], Host::Server(_))
    }

    /// Sends from this end.
    pub fn send(&mut self, pipe: usize, from: Side, packet: Packet) {
        if let Some(delay_us) = self.arrival(pipe, from) {
            self.after(delay_us, Event::Arrives { pipe, side: from.across(), packet });
        }
    }

    /// This end is closed. `in_flight`: what it sent before still arrives, and then the end.
    pub fn close(&mut self, pipe: usize, side: Side, in_flight: bool) {
        if !self.is_open(pipe, side) {
            return;
        }
        if !in_flight {
            let now_us = self.now_us;
            self.pipes[pipe].lost_after_us[side as usize] = now_us;
        }
        let delay_us = self.arrival(pipe, side).unwrap_or(self.usual_us);
        self.pipes[pipe].open[side as usize] = false;
        self.after(delay_us, Event::Ended { pipe, side: side.across() });
    }

    /// This end has heard that the pipe is no more.
    pub fn ended(&mut self, pipe: usize, side: Side) {
        self.pipes[pipe].open[side as usize] = false;
    }

    /// The network loses the pipe. Each end hears of it at once, or only by its own timers.
    pub fn cut(&mut self, pipe: usize) {
        for side in [Side::Opener, Side::Other] {
            let lost_after_us = self.now_us + self.draw.between(0, self.usual_us);
            let lost = &mut self.pipes[pipe].lost_after_us[side as usize];
            *lost = (*lost).min(lost_after_us);
            let heard_us = if self.draw.permille(600) { self.draw.between(1, 20 * MS) } else { DEAF_US };
            self.after(heard_us, Event::Ended { pipe, side });
        }
    }

    /// Nothing arrives for a while, in one direction or both; nothing is lost.
    pub fn stall(&mut self, pipe: usize, for_us: u64) {
        let both = self.draw.permille(500);
        let side = self.draw.index(2);
        let until_us = self.now_us + for_us;
        for (at, until) in self.pipes[pipe].stalled_until_us.iter_mut().enumerate() {
            if both || at == side {
                *until = (*until).max(until_us);
            }
        }
    }

    /// How long until what is sent now arrives; `None`: never.
    fn arrival(&mut self, pipe: usize, from: Side) -> Option<u64> {
        let delay_us = self.draw.delay(self.usual_us, 30, self.slow_us);
        let now_us = self.now_us;
        let (pipe, from) = (&mut self.pipes[pipe], from as usize);
        if !pipe.open[from] {
            return None;
        }
        let at = (now_us + delay_us).max(pipe.last_arrival_us[from] + 1).max(pipe.stalled_until_us[from] + 1);
        if at > pipe.lost_after_us[from] {
            return None;
        }
        pipe.last_arrival_us[from] = at;
        Some(at - now_us)
    }
}

/// The kernel gives a silent connection up after that.
const DEAF_US: u64 = 9_000 * MS;
