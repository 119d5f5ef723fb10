//! Hostile clients: slow readers, half frames, and one who writes to the slow readers. Three threads; those that hold
//! connections have private fd tables.
//!
//! Trap: their sockets mean nothing outside their thread, and die with it. So a thread opens, waits to be stopped, closes.

use std::collections::BTreeSet;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use gateway::sys;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrIn, SockaddrStorage, sockopt};
use proto::command::{Command, ServerFrame};
use proto::name::Chat;
use proto::{frame, wire};

use super::probe::Probe;
use crate::monitor::RunError;
use crate::sources::Sources;

/// See the head of this file.
pub struct Attack {
    stop: Sender<()>,
    threads: Vec<JoinHandle<io::Result<u64>>>,
}

impl Attack {
    /// Begins it.
    pub fn start(target: SocketAddr, run: &str, slow: u32, half: u32) -> Attack {
        let (stop, stopped) = crossbeam_channel::bounded::<()>(0);
        let (filled, users) = (stopped.clone(), slow.div_ceil(DEVICES));
        let name = run.to_owned();
        let readers = {
            let (name, stopped) = (name.clone(), stopped.clone());
            move || hold(target, slow, &stopped, |number| login(&name, number))
        };
        let halves = move || hold(target, half, &stopped, |_| half_frame());
        let writer = move || write_to(target, &name, users, &filled);
        let threads =
            vec![std::thread::spawn(readers), std::thread::spawn(halves), std::thread::spawn(writer)];
        Attack { stop, threads }
    }

    /// Ends it: how often the writer was thrown out and came back. Or what went wrong on our side.
    pub fn stop(self) -> Result<u64, RunError> {
        drop(self.stop);
        let mut returns = 0;
        for thread in self.threads {
            let ended = thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread panicked")));
            returns += ended.map_err(|error| RunError::Io { what: "the attack failed".into(), error })?;
        }
        Ok(returns)
    }
}

/// Opens so many connections, says `first` on each, and never reads.
fn hold(
    target: SocketAddr,
    count: u32,
    stopped: &Receiver<()>,
    first: impl Fn(u32) -> BytesMut,
) -> io::Result<u64> {
    sys::unshare_files()?;
    let sources = Sources::plan(count, &[target]);
    let mut held = Vec::with_capacity(count as usize);
    for number in 0..count {
        let pause = if number % OPENS_AT_ONCE == 0 { OPENS_PAUSE } else { Duration::ZERO };
        if is_over(stopped, pause) {
            return Ok(0);
        }
        let fd = open(sources.of(number), target)?;
        // Refused and closed already: what the gateway may do.
        match sys::write(&fd, &first(number)) {
            Ok(_) => held.push(fd),
            Err(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => {}
            Err(error) => return Err(error),
        }
    }
    is_over(stopped, HOLD_MAX);
    for fd in &held {
        let _ = sys::reset_on_close(fd);
    }
    Ok(0)
}

/// A blocking socket with a receive buffer as small as the kernel makes them.
fn open(source: Option<IpAddr>, target: SocketAddr) -> io::Result<OwnedFd> {
    let fd = socket::socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    socket::setsockopt(&fd, sockopt::RcvBuf, &RECEIVE_BUFFER_BYTES)?;
    if let Some(IpAddr::V4(source)) = source {
        use std::os::fd::AsRawFd;
        socket::bind(fd.as_raw_fd(), &SockaddrIn::from(std::net::SocketAddrV4::new(source, 0)))?;
    }
    {
        use std::os::fd::AsRawFd;
        socket::connect(fd.as_raw_fd(), &SockaddrStorage::from(target))?;
    }
    Ok(fd)
}

fn login(run: &str, number: u32) -> BytesMut {
    let login = wire::Login {
        wire_min: proto::WIRE_VERSION,
        wire_max: proto::WIRE_VERSION,
        user: slow_user(run, number / DEVICES),
        device: format!("d{}", number % DEVICES),
        attempt: 1,
        token: String::new(),
        agent: "slow".into(),
    };
    let mut out = BytesMut::new();
    frame::put(Command::Login, &login, &mut out);
    out
}

/// Most of the longest login that may be announced.
fn half_frame() -> BytesMut {
    let body = proto::LOGIN_FRAME_BYTES_MAX - frame::HEADER_BYTES;
    let mut out = BytesMut::zeroed(frame::HEADER_BYTES + body * 3 / 4);
    out[..3].copy_from_slice(&(body as u32).to_be_bytes()[1..]);
    out[3] = Command::Login as u8;
    out
}

/// Writes to all slow users, round by round. What is refused for now is said again, and who is thrown out comes back:
/// when the budget is used up the gateway may refuse its unfinished frames.
fn write_to(target: SocketAddr, run: &str, users: u32, stopped: &Receiver<()>) -> io::Result<u64> {
    let me = format!("writer-{run}");
    let stream = rand::random::<u64>() | 1;
    let chat =
        |user: u32| Chat::pair(&me, &slow_user(run, user)).map(|chat| chat.to_string()).unwrap_or_default();
    let chats: Vec<String> = (0..users).map(chat).collect();
    let mut client = Probe::start(target, &me, 1).map_err(io::Error::other)?;
    let mut returns = 0;
    for n in 1.. {
        let mut open: BTreeSet<&str> = chats.iter().map(String::as_str).collect();
        while !open.is_empty() {
            if is_over(stopped, Duration::ZERO) {
                return Ok(returns);
            }
            if write_round(&mut client, stream, n, &mut open).is_err() {
                if is_over(stopped, RETURN_AFTER) {
                    return Ok(returns);
                }
                returns += 1;
                if let Ok(again) = Probe::start(target, &me, returns + 1) {
                    client = again;
                }
            }
        }
    }
    Ok(returns)
}

/// Says message `n` to all that are open, at an even pace, and takes off those that are acknowledged.
fn write_round(client: &mut Probe, stream: u64, n: u64, open: &mut BTreeSet<&str>) -> io::Result<()> {
    let body = Bytes::from(vec![n as u8; BODY_BYTES]);
    let hear = |client: &mut Probe, wait, open: &mut BTreeSet<&str>| {
        let until = Instant::now() + wait;
        while !open.is_empty()
            && let Some(answer) = client.next(until)?
        {
            if let ServerFrame::SendAck(ack) = answer
                && ack.n == n
            {
                open.remove(&*ack.chat);
            }
        }
        io::Result::Ok(())
    };
    for chat in open.clone() {
        let send = wire::Send { stream, n, chat: chat.to_owned(), body: body.clone(), ..Default::default() };
        client.send(Command::Send, &send)?;
        hear(client, WRITE_EVERY, open)?;
    }
    hear(client, AGAIN_AFTER, open)
}

fn slow_user(run: &str, user: u32) -> String {
    format!("slow-{run}-{user}")
}

/// Whether the other end is gone, or `wait` is over and it is not.
fn is_over(stopped: &Receiver<()>, wait: Duration) -> bool {
    stopped.recv_timeout(wait) == Err(RecvTimeoutError::Disconnected)
}

/// For all to be there and written to.
pub const FILL: Duration = Duration::from_secs(25);
/// A user's, all slow: one message becomes so many pushes. The state server's default allows as many.
const DEVICES: u32 = 64;
const RECEIVE_BUFFER_BYTES: usize = 4_096;
const BODY_BYTES: usize = 8 * 1024;
/// Each becomes 64 pushes. It is what the gateway keeps that is measured, not how fast it can be written to.
const WRITE_EVERY: Duration = Duration::from_millis(10);
/// So many connections are opened at once, then there is a pause.
const OPENS_AT_ONCE: u32 = 32;
const OPENS_PAUSE: Duration = Duration::from_millis(10);
const AGAIN_AFTER: Duration = Duration::from_secs(1);
const RETURN_AFTER: Duration = Duration::from_millis(50);
const HOLD_MAX: Duration = Duration::from_secs(600);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_half_frame_is_legal_so_far_and_not_whole() {
        let half = half_frame();
        assert_eq!(frame::cut(&half, proto::LOGIN_FRAME_BYTES_MAX), Ok(None));
        assert!(half.len() > 2_000);
        let whole = login("run", 65);
        let frame = frame::cut(&whole, proto::LOGIN_FRAME_BYTES_MAX).unwrap().unwrap();
        assert_eq!(frame.command, Command::Login as u8);
    }
}
