//! A client of bare bytes: says what the client library never would. Blocking, on whatever thread has it.
//!
//! Trap: it does nothing by itself: no heartbeat, no resend. Whoever holds one for long must say something.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use prost::Message;
use proto::command::{Command, ServerFrame};
use proto::{frame, wire};

/// See the head of this file.
#[derive(Debug)]
pub struct Raw {
    socket: TcpStream,
    received: Vec<u8>,
}

/// How a connection ended.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct End {
    /// The Error that came last, with a code that closes; none: it just ended.
    pub code: Option<wire::Code>,
    /// Frames that came before.
    pub frames: usize,
    /// By a reset and not in order.
    pub reset: bool,
}

impl Raw {
    /// Connects, from wherever the kernel likes.
    pub fn connect(target: SocketAddr) -> io::Result<Raw> {
        let socket = TcpStream::connect_timeout(&target, ANSWER_MAX)?;
        socket.set_nodelay(true)?;
        socket.set_write_timeout(Some(ANSWER_MAX))?;
        Ok(Raw { socket, received: Vec::new() })
    }

    /// Connects and logs in.
    pub fn login(target: SocketAddr, login: &wire::Login) -> io::Result<Raw> {
        let mut raw = Raw::connect(target)?;
        raw.say(Command::Login, login)?;
        match raw.next(ANSWER_MAX)? {
            Some(ServerFrame::LoginAck(_)) => Ok(raw),
            other => Err(io::Error::other(format!("no LoginAck but {other:?}"))),
        }
    }

    /// Sends a frame.
    pub fn say(&mut self, command: Command, body: &impl Message) -> io::Result<()> {
        self.write(&encode(command, body))
    }

    /// Sends bytes.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.socket.write_all(bytes)
    }

    /// Says that nothing more will come.
    pub fn say_no_more(&mut self) -> io::Result<()> {
        self.socket.shutdown(std::net::Shutdown::Write)
    }

    /// The next frame; none: nothing came within `wait`. An error: it ended, or what came is no frame.
    pub fn next(&mut self, wait: Duration) -> io::Result<Option<ServerFrame>> {
        let until = Instant::now() + wait;
        loop {
            if let Some(frame) = take_frame(&mut self.received)? {
                return Ok(Some(frame));
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.socket.set_read_timeout(Some(left))?;
            let mut buffer = [0; 65_536];
            match self.socket.read(&mut buffer) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(got) => self.received.extend_from_slice(&buffer[..got]),
                Err(error) if is_not_yet(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Waits until the server ends the connection. None: it lives after `wait`.
    pub fn end(&mut self, wait: Duration) -> Option<End> {
        let (until, mut end) = (Instant::now() + wait, End::default());
        loop {
            match self.next(until.saturating_duration_since(Instant::now())) {
                Ok(None) => return None,
                Ok(Some(ServerFrame::Error(error))) if error.closing => end.code = Some(error.code()),
                Ok(Some(_)) => end.frames += 1,
                Err(error) => {
                    end.reset = error.kind() == ErrorKind::ConnectionReset;
                    return Some(end);
                }
            }
        }
    }
}

/// One frame as bytes.
pub fn encode(command: Command, body: &impl Message) -> Vec<u8> {
    let mut out = BytesMut::new();
    frame::put(command, body, &mut out);
    out.to_vec()
}

/// A development login of this user.
pub fn login(user: &str, device: &str, attempt: u64) -> wire::Login {
    wire::Login {
        wire_min: proto::WIRE_VERSION,
        wire_max: proto::WIRE_VERSION,
        user: user.to_owned(),
        device: device.to_owned(),
        attempt,
        token: String::new(),
        agent: "torture".into(),
    }
}

/// Cuts the first whole frame off what was received.
pub(super) fn take_frame(received: &mut Vec<u8>) -> io::Result<Option<ServerFrame>> {
    let broken = || io::Error::from(ErrorKind::InvalidData);
    let Some(frame) = frame::cut(received, proto::FRAME_BYTES_MAX).map_err(|_| broken())? else {
        return Ok(None);
    };
    let used = frame.wire_bytes();
    let body = Bytes::copy_from_slice(frame.body);
    let decoded = ServerFrame::decode(frame.command, body).map_err(|_| broken())?;
    received.drain(..used);
    Ok(Some(decoded))
}

pub(super) fn is_not_yet(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

/// Longest that connecting, writing, or an answer to a login may take.
pub const ANSWER_MAX: Duration = Duration::from_secs(20);
