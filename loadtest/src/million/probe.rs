//! One client of bare bytes that asks every 10 ms whether messages are accepted. Blocking, on the main thread.
//!
//! Trap: it sends one message id again and again until it is acknowledged, as the protocol wants of clients: a next id
//! before that would be refused as out of order, and time nothing.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use prost::Message;
use proto::command::{Command, ServerFrame};
use proto::{frame, wire};

use crate::monitor::RunError;

/// See the head of this file.
pub struct Probe {
    socket: TcpStream,
    received: Vec<u8>,
    chat: String,
    stream: u64,
    n: u64,
}

impl Probe {
    /// Logs in and has a first message accepted. `attempt` rises with every start of one user.
    pub fn start(target: SocketAddr, user: &str, attempt: u64) -> Result<Probe, RunError> {
        let failed = |error| RunError::Io { what: format!("the probe at {target}"), error };
        let socket = TcpStream::connect_timeout(&target, ANSWER_MAX).map_err(failed)?;
        socket.set_nodelay(true).map_err(failed)?;
        let stream = rand::random::<u64>() | 1;
        let mut probe = Probe { socket, received: Vec::new(), chat: format!("{user}:{user}"), stream, n: 0 };
        let login = wire::Login {
            wire_min: proto::WIRE_VERSION,
            wire_max: proto::WIRE_VERSION,
            user: user.to_owned(),
            device: "probe".into(),
            attempt,
            token: String::new(),
            agent: concat!("rookery-loadtest/", env!("CARGO_PKG_VERSION")).into(),
        };
        probe.send(Command::Login, &login).map_err(failed)?;
        let until = Instant::now() + ANSWER_MAX;
        while Instant::now() < until {
            if let Some(ServerFrame::LoginAck(_)) = probe.next(until).map_err(failed)? {
                return match probe.accepted(ANSWER_MAX).map_err(failed)? {
                    Some(_) => Ok(probe),
                    None => Err(RunError::Unreachable("the probe's first message was not accepted".into())),
                };
            }
        }
        Err(RunError::Unreachable("the probe could not log in".into()))
    }

    /// Asks until a new message is accepted: when that was. None: not within `wait`. An error: the connection broke.
    pub fn accepted(&mut self, wait: Duration) -> std::io::Result<Option<Instant>> {
        self.n += 1;
        let asked = wire::Send {
            stream: self.stream,
            n: self.n,
            chat: self.chat.clone(),
            body: Bytes::copy_from_slice(&self.n.to_be_bytes()),
            ..Default::default()
        };
        let until = Instant::now() + wait;
        while Instant::now() < until {
            let next = Instant::now() + EVERY;
            self.send(Command::Send, &asked)?;
            while let Some(frame) = self.next(next)? {
                if matches!(&frame, ServerFrame::SendAck(ack) if ack.n == self.n) {
                    return Ok(Some(Instant::now()));
                }
            }
        }
        Ok(None)
    }

    /// Says something.
    pub fn send(&mut self, command: Command, body: &impl Message) -> std::io::Result<()> {
        let mut out = BytesMut::new();
        frame::put(command, body, &mut out);
        self.socket.write_all(&out)
    }

    /// The next frame, if one comes before `until`.
    pub fn next(&mut self, until: Instant) -> std::io::Result<Option<ServerFrame>> {
        let broken = || std::io::Error::from(ErrorKind::InvalidData);
        loop {
            if let Some(frame) = frame::cut(&self.received, proto::FRAME_BYTES_MAX).map_err(|_| broken())? {
                let used = frame.wire_bytes();
                let body = Bytes::copy_from_slice(frame.body);
                let decoded = ServerFrame::decode(frame.command, body).map_err(|_| broken())?;
                self.received.drain(..used);
                return Ok(Some(decoded));
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.socket.set_read_timeout(Some(left))?;
            let mut buffer = [0; 4_096];
            match self.socket.read(&mut buffer) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(got) => self.received.extend_from_slice(&buffer[..got]),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    return Ok(None);
                }
                Err(error) => return Err(error),
            }
        }
    }
}

const EVERY: Duration = Duration::from_millis(10);
const ANSWER_MAX: Duration = Duration::from_secs(10);
