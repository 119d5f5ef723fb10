//! Waiting for many sockets at once. Each instance belongs to the thread that made it.
//!
//! Trap: an entry goes with the last fd of its socket, so what was closed is never told again; what was told before the
//! close may still stand in the buffer of this turn.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use libc::c_int;

use super::{Fd, check};

/// What an epoll entry waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interest {
    /// Bytes to read, or the peer's end.
    Read,
    /// Room to write, or the peer's end.
    Write,
    /// Either.
    ReadWrite,
    /// Only the peer's end.
    End,
    /// Only the peer's reset or both directions closed, which epoll always tells.
    Nothing,
    /// A wake-up, told once (edge-triggered).
    Wake,
}

impl Interest {
    fn bits(self) -> u32 {
        let flags = match self {
            Interest::Read => libc::EPOLLIN | libc::EPOLLRDHUP,
            Interest::Write => libc::EPOLLOUT,
            Interest::ReadWrite => libc::EPOLLIN | libc::EPOLLRDHUP | libc::EPOLLOUT,
            Interest::End => libc::EPOLLRDHUP,
            Interest::Nothing => 0,
            Interest::Wake => libc::EPOLLIN | libc::EPOLLET,
        };
        flags as u32
    }
}

/// One ready entry.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Event(libc::epoll_event);

impl Event {
    /// The token that the entry was added with.
    pub fn token(&self) -> u64 {
        self.0.u64
    }

    /// There are bytes, or an end, to read.
    pub fn readable(&self) -> bool {
        self.has(libc::EPOLLIN | libc::EPOLLRDHUP)
    }

    /// There is room to write.
    pub fn writable(&self) -> bool {
        self.has(libc::EPOLLOUT)
    }

    /// Reset, refused, or closed in both directions.
    pub fn broken(&self) -> bool {
        self.has(libc::EPOLLERR | libc::EPOLLHUP)
    }

    fn has(&self, flags: c_int) -> bool {
        self.0.events & flags as u32 != 0
    }
}

/// An epoll instance of this thread.
#[derive(Debug)]
pub struct Epoll {
    fd: Fd,
}

impl Epoll {
    /// An empty one.
    pub fn new() -> io::Result<Epoll> {
        // SAFETY: no memory involved.
        Fd::new(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) }).map(|fd| Epoll { fd })
    }

    /// Watches `fd`; events carry `token`.
    pub fn add(&self, fd: &impl AsRawFd, token: u64, interest: Interest) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_ADD, fd, token, interest)
    }

    /// Changes what `fd` is watched for.
    pub fn modify(&self, fd: &impl AsRawFd, token: u64, interest: Interest) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_MOD, fd, token, interest)
    }

    fn control(&self, op: c_int, fd: &impl AsRawFd, token: u64, interest: Interest) -> io::Result<()> {
        let mut event = libc::epoll_event { events: interest.bits(), u64: token };
        // SAFETY: `event` is valid for the call; the kernel copies it.
        check(unsafe { libc::epoll_ctl(self.fd.raw, op, fd.as_raw_fd(), &mut event) }).map(drop)
    }

    /// Waits for events, at most `timeout` (rounded up to a millisecond; `None`: for ever), and returns the ready ones.
    /// A signal is no event: the slice is empty then.
    pub fn wait<'a>(&self, events: &'a mut [Event], timeout: Option<Duration>) -> io::Result<&'a [Event]> {
        let timeout_ms =
            timeout.map_or(-1, |t| t.as_nanos().div_ceil(1_000_000).min(i32::MAX as u128) as c_int);
        let room = events.len().min(c_int::MAX as usize) as c_int;
        // SAFETY: `Event` is a transparent epoll_event, and `room` of them are writable.
        let got = unsafe {
            libc::epoll_wait(self.fd.raw, events.as_mut_ptr().cast::<libc::epoll_event>(), room, timeout_ms)
        };
        match check(got) {
            Ok(count) => Ok(&events[..count as usize]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(&[]),
            Err(error) => Err(error),
        }
    }
}

/// Room for `count` events.
pub fn event_buffer(count: usize) -> Vec<Event> {
    vec![Event(libc::epoll_event { events: 0, u64: 0 }); count]
}
