//! Wake-ups between threads whose fd tables are their own.
//!
//! Trap: one must be made before the tables part, and is never closed while anybody may use it: its number is all that the
//! threads share.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use libc::c_void;
use tokio::io::unix::AsyncFd;

use super::check;

/// A wake-up that works across fd tables, if made before they part: the number is then the same in each. Never closed,
/// because it lives as long as the process and in as many tables.
#[derive(Debug, Clone, Copy)]
pub struct EventFd {
    raw: RawFd,
}

impl EventFd {
    /// A non-blocking eventfd. Make it before any thread unshares.
    pub fn new() -> io::Result<EventFd> {
        // SAFETY: no memory involved.
        check(unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) }).map(|raw| EventFd { raw })
    }

    /// Wakes whoever polls it. A counter that is full is a wake-up that is already there.
    pub fn wake(self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: eight readable bytes, as eventfd wants.
        unsafe { libc::write(self.raw, one.as_ptr().cast::<c_void>(), one.len()) };
    }

    /// Takes the wake-ups that have come. Not needed under edge-triggered epoll.
    pub fn clear(self) -> io::Result<()> {
        let mut count = [0u8; 8];
        // SAFETY: eight writable bytes, as eventfd wants.
        let got = unsafe { libc::read(self.raw, count.as_mut_ptr().cast::<c_void>(), count.len()) };
        if got < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// Ends wake-ups for good: closes them in this thread's table, which must be the last that holds them, with nobody left who
/// would use them. For programs that make them again and again.
pub fn close_wakes(wakes: &[EventFd]) {
    for wake in wakes {
        // SAFETY: no memory involved. A number used afterwards would name another file; the caller has ended all users.
        unsafe { libc::close(wake.raw) };
    }
}

/// The same wake-up for a tokio task. Called on a thread of the main fd table, inside a runtime.
pub fn async_eventfd(eventfd: EventFd) -> io::Result<AsyncFd<EventFd>> {
    // SAFETY: an EventFd of a server is never closed and its number never changes, so what is registered stays registered.
    let registered = unsafe { AsyncFd::register_with_interest(eventfd, tokio::io::Interest::READABLE) };
    registered.map_err(io::Error::from)
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: an EventFd is never closed, so the number stays valid in every table that holds it.
        unsafe { BorrowedFd::borrow_raw(self.raw) }
    }
}

impl AsRawFd for EventFd {
    fn as_raw_fd(&self) -> RawFd {
        self.raw
    }
}
