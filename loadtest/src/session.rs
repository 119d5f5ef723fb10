//! The part of the client protocol that every logged-in load speaks: login, heartbeats, faults. Owned by one engine
//! thread.
//!
//! Trap: heartbeats leave in the order in which connections logged in, which is right only because one server gives all
//! the same interval. Servers that differ would make some heartbeats late, never wrong.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use prost::Message;
use proto::command::{Command, ServerFrame};
use proto::frame::{self, Frame};
use proto::wire;

use crate::engine::Io;
use crate::fault::Fault;
use crate::tokens::Tokens;

/// Login and heartbeats of one thread's connections.
#[derive(Debug)]
pub struct Session {
    run: String,
    /// The first connection of this thread, of all.
    first: u32,
    out: BytesMut,
    /// The first heartbeat of each connection, drawn over the whole interval so that a storm does not beat as one.
    first_heartbeats: BinaryHeap<Reverse<(u64, u32, u16)>>,
    /// The following ones, in the order in which they are due.
    heartbeats: VecDeque<(u64, u32, u16)>,
    interval_us: u64,
    /// Never beats.
    silent: bool,
    /// None: development logins.
    tokens: Option<Arc<Tokens>>,
}

/// What a frame meant to the session.
#[derive(Debug, PartialEq)]
pub enum Heard {
    /// Nothing for anybody else.
    Nothing,
    /// The login was accepted.
    LoggedIn(wire::LoginAck),
    /// Not the session's business.
    Other(ServerFrame),
}

impl Session {
    /// Of a run with this name.
    pub fn new(run: &str, first: u32) -> Session {
        Session {
            run: run.to_owned(),
            first,
            out: BytesMut::new(),
            first_heartbeats: BinaryHeap::new(),
            heartbeats: VecDeque::new(),
            interval_us: 0,
            silent: false,
            tokens: None,
        }
    }

    /// The same without heartbeats.
    pub fn without_heartbeats(mut self) -> Session {
        self.silent = true;
        self
    }

    /// The same with a token for each login.
    pub fn with_tokens(mut self, tokens: Option<Arc<Tokens>>) -> Session {
        self.tokens = tokens;
        self
    }

    /// The login of a connection.
    pub fn login(&self, index: u32, attempt: u64, out: &mut BytesMut) {
        let user = user(&self.run, self.first + index);
        let login = wire::Login {
            wire_min: proto::WIRE_VERSION,
            wire_max: proto::WIRE_VERSION,
            token: self.tokens.as_ref().map_or_else(String::new, |tokens| tokens.of(&user)),
            user,
            device: "lt".into(),
            attempt: attempt.max(1),
            agent: concat!("rookery-loadtest/", env!("CARGO_PKG_VERSION")).into(),
        };
        frame::put(Command::Login, &login, out);
    }

    /// A frame came.
    pub fn hear(&mut self, index: u32, frame: &Frame<'_>, io: &mut Io) -> Result<Heard, Fault> {
        if frame.command == Command::Pong as u8 {
            let pong = wire::Pong::decode(frame.body).map_err(|_| Fault::BadFrame)?;
            pong_came(pong.nonce, io);
            return Ok(Heard::Nothing);
        }
        // A body of its own: what is kept of it must not pin the read buffer.
        let body = Bytes::copy_from_slice(frame.body);
        match ServerFrame::decode(frame.command, body).map_err(|_| Fault::BadFrame)? {
            ServerFrame::LoginAck(ack) => {
                io.ready(index);
                self.logged_in(index, &ack, io);
                Ok(Heard::LoggedIn(ack))
            }
            ServerFrame::Kick(kick) => Err(Fault::Code { code: kick.code(), retry_after_ms: 0 }),
            ServerFrame::Error(error) if error.closing || !io.is_ready(index) => {
                Err(Fault::Code { code: error.code(), retry_after_ms: error.retry_after_ms })
            }
            other => Ok(Heard::Other(other)),
        }
    }

    /// Sends the heartbeats that are due. When the next is.
    pub fn tick(&mut self, io: &mut Io) -> Option<u64> {
        loop {
            let early = self.first_heartbeats.peek().map(|first| first.0);
            let late = self.heartbeats.front().copied();
            let (due, index, epoch) = match (early, late) {
                (Some(early), Some(late)) => early.min(late),
                (early, late) => early.or(late)?,
            };
            if due > io.now_us() {
                return Some(due);
            }
            if early == Some((due, index, epoch)) {
                self.first_heartbeats.pop();
                if self.first_heartbeats.is_empty() {
                    self.first_heartbeats.shrink_to_fit();
                }
            } else {
                self.heartbeats.pop_front();
            }
            if io.epoch(index) == epoch && io.is_ready(index) {
                self.out.clear();
                frame::put(Command::Ping, &wire::Ping { nonce: nonce(due, io.now_us()) }, &mut self.out);
                io.send(index, &self.out);
                io.sample.pings += 1;
                // From when it was due, so that a late turn does not bunch the next round.
                self.heartbeats.push_back((on_beat(due + self.interval_us), index, epoch));
            }
        }
    }

    fn logged_in(&mut self, index: u32, ack: &wire::LoginAck, io: &Io) {
        if ack.heartbeat_ms > 0 && !self.silent {
            // "At least this often": a tenth earlier leaves room for the way.
            self.interval_us = u64::from(ack.heartbeat_ms) * 900;
            let due = on_beat(io.now_us() + first_after(self.first + index, self.interval_us));
            self.first_heartbeats.push(Reverse((due, index, io.epoch(index))));
        }
    }
}

/// When a connection's first heartbeat is due, after its login: at the end of the interval, for whoever has just spoken needs
/// none; up to an eighth earlier, so that a quick storm does not beat as one. The golden section spreads any run of
/// numbers evenly.
fn first_after(number: u32, interval_us: u64) -> u64 {
    let part = u64::from(number.wrapping_add(1).wrapping_mul(0x9E37_79B9));
    let early_us = interval_us / 8;
    interval_us - early_us + ((u128::from(early_us) * u128::from(part)) >> 32) as u64
}

/// Heartbeats have a slack, as timers of clients do: they leave on the beat of all threads. One wake-up of this machine for
/// each would cost it as much as the heartbeat itself.
fn on_beat(due_us: u64) -> u64 {
    due_us.next_multiple_of(BEAT_US)
}

const BEAT_US: u64 = 10_000;

/// What a heartbeat carries and its answer brings back: when it was due, and how much later it was sent. Nothing has to
/// be kept for it.
fn nonce(due_us: u64, sent_us: u64) -> u64 {
    due_us << LATE_BITS | sent_us.saturating_sub(due_us).min((1 << LATE_BITS) - 1)
}

fn pong_came(nonce: u64, io: &mut Io) {
    let (due_us, late_us) = (nonce >> LATE_BITS, nonce & ((1 << LATE_BITS) - 1));
    // A server may send one unasked, with nothing in it.
    if due_us == 0 || due_us > io.now_us() {
        return;
    }
    let took_us = io.now_us() - due_us;
    io.sample.ping.saturating_record(took_us);
    io.sample.ping_uncorrected.saturating_record(took_us.saturating_sub(late_us));
}

/// A second of lateness in microseconds.
const LATE_BITS: u32 = 20;

/// The user of connection `number`.
pub fn user(run: &str, number: u32) -> String {
    format!("lt-{run}-{number}")
}

/// A short random name, so that runs do not meet in the store.
pub fn random_run() -> String {
    use rand::Rng;
    const LETTERS: &[u8] = b"0123456789abcdefghijklmnopqrstuvwxyz";
    let mut random = rand::rng();
    (0..6).map(|_| LETTERS[random.random_range(0..LETTERS.len())] as char).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_heartbeats_spread_over_the_last_eighth_of_the_interval() {
        let mut tenths = [0; 10];
        for number in 500_000..501_000 {
            let after = first_after(number, 54_000_000);
            assert!((47_250_000..54_000_000).contains(&after));
            tenths[((after - 47_250_000) / 675_000) as usize] += 1;
        }
        assert!(tenths.iter().all(|count| (90..=110).contains(count)), "{tenths:?}");
        assert_eq!((on_beat(1), on_beat(20_000)), (10_000, 20_000));
    }

    #[test]
    fn a_login_is_one_small_frame() {
        let session = Session::new("abc123", 900_000);
        let mut out = BytesMut::new();
        session.login(7, 3, &mut out);
        let frame = frame::cut(&out, proto::LOGIN_FRAME_BYTES_MAX).unwrap().unwrap();
        assert_eq!(frame.wire_bytes(), out.len());
        let login = wire::Login::decode(frame.body).unwrap();
        assert_eq!((&*login.user, login.attempt, &*login.device), ("lt-abc123-900007", 3, "lt"));
        assert!(proto::name::check(&login.user).is_ok());
    }
}
