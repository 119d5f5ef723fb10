//! The part of the client protocol that every logged-in load speaks: login, heartbeats, faults. Owned by one engine
//! thread.
//!
//! Trap: heartbeats leave in the order in which connections logged in, which is right only because one server gives all
//! the same interval. Servers that differ would make some heartbeats late, never wrong.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};
use proto::command::{Command, ServerFrame};
use proto::frame::{self, Frame};
use proto::wire;

use crate::engine::Io;
use crate::fault::Fault;

/// Login and heartbeats of one thread's connections.
#[derive(Debug)]
pub struct Session {
    run: String,
    /// The first connection of this thread, of all.
    first: u32,
    ping: Bytes,
    heartbeats: VecDeque<(u64, u32, u16)>,
    interval_us: u64,
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
        let ping = frame::encode(Command::Ping, &wire::Ping { nonce: 0 });
        Session { run: run.to_owned(), first, ping, heartbeats: VecDeque::new(), interval_us: 0 }
    }

    /// The login of a connection.
    pub fn login(&self, index: u32, attempt: u64, out: &mut BytesMut) {
        let login = wire::Login {
            wire_min: proto::WIRE_VERSION,
            wire_max: proto::WIRE_VERSION,
            user: user(&self.run, self.first + index),
            device: "lt".into(),
            attempt: attempt.max(1),
            token: String::new(),
            agent: concat!("rookery-loadtest/", env!("CARGO_PKG_VERSION")).into(),
        };
        frame::put(Command::Login, &login, out);
    }

    /// A frame came.
    pub fn hear(&mut self, index: u32, frame: &Frame<'_>, io: &mut Io) -> Result<Heard, Fault> {
        if frame.command == Command::Pong as u8 {
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
        while let Some((due, index, epoch)) = self.heartbeats.front().copied() {
            if due > io.now_us() {
                return Some(due);
            }
            self.heartbeats.pop_front();
            if io.epoch(index) == epoch && io.is_ready(index) {
                io.send(index, &self.ping);
                // From when it was due, so that a late turn does not bunch the next round.
                self.heartbeats.push_back((due + self.interval_us, index, epoch));
            }
        }
        None
    }

    fn logged_in(&mut self, index: u32, ack: &wire::LoginAck, io: &Io) {
        if ack.heartbeat_ms > 0 {
            // "At least this often": a tenth earlier leaves room for the way.
            self.interval_us = u64::from(ack.heartbeat_ms) * 900;
            self.heartbeats.push_back((io.now_us() + self.interval_us, index, io.epoch(index)));
        }
    }
}

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
    use prost::Message;

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
