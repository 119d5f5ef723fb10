//! System calls, and with the files below it the only one with `unsafe`. Used by gateway workers and by loadtest's engine.
//! Here: fds, fd tables, and what is asked of the process; the rest by kind.
//!
//! Trap: threads here may have a **private fd table** ([`unshare_files`]). An fd number means nothing on another
//! thread, so [`Fd`] is `!Send`: dropping it elsewhere would close something else. What must be reachable from several
//! tables (an [`EventFd`]) is made before the tables part.

#![allow(unsafe_code)]

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use libc::c_int;

pub use epoll::{Epoll, Event, Interest, event_buffer};
pub use eventfd::{EventFd, async_eventfd, close_wakes};
pub use socket::{
    accept, accept_unnamed, connect, listen, local_address, read, read_at_most, reset_on_close,
    set_user_timeout, shutdown_write, take_error, user_timeout, write, write_vectored,
};

pub use stack::{Stack, spawn};

mod epoll;
mod eventfd;
mod socket;
mod stack;

/// An fd that lives in this thread's fd table and is closed with this value. Not `Send`.
#[derive(Debug)]
pub struct Fd {
    raw: RawFd,
    _this_thread: PhantomData<*const ()>,
}

impl Fd {
    fn new(raw: c_int) -> io::Result<Fd> {
        if raw < 0 { Err(io::Error::last_os_error()) } else { Ok(Fd { raw, _this_thread: PhantomData }) }
    }

    /// The number, valid on this thread only.
    pub fn raw(&self) -> RawFd {
        self.raw
    }
}

impl AsRawFd for Fd {
    fn as_raw_fd(&self) -> RawFd {
        self.raw
    }
}

impl Drop for Fd {
    fn drop(&mut self) {
        // SAFETY: this value owns the number in this thread's table, and is dropped once.
        unsafe { libc::close(self.raw) };
    }
}

/// Gives the calling thread an fd table of its own: a copy of the present one. Call it early, while few fds are open.
pub fn unshare_files() -> io::Result<()> {
    // SAFETY: takes a flag word and touches no memory of ours.
    check(unsafe { libc::unshare(libc::CLONE_FILES) }).map(drop)
}

/// Raises this process's soft fd limit to its hard one and returns it. It counts per fd table.
pub fn raise_fd_limit() -> io::Result<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid rlimit for both calls.
    check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) })?;
    if limit.rlim_cur < limit.rlim_max {
        limit.rlim_cur = limit.rlim_max;
        // SAFETY: as above.
        check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) })?;
    }
    Ok(limit.rlim_cur)
}

/// Puts the calling thread under SCHED_BATCH: a wake-up then does not interrupt whoever runs, so that work piles up into
/// batches. On two busy cores this made bare accepting 1.4 times as fast (62,000 to 87,000 connections/s, with a sixth of
/// the context switches); an idle core still takes the thread at once. Needs no privilege; threads started by this one
/// inherit it.
pub fn schedule_batch() -> io::Result<()> {
    // SAFETY: a `sched_param` is plain integers, and the call only reads it; 0 names the calling thread.
    check(unsafe {
        let parameter: libc::sched_param = std::mem::zeroed();
        libc::sched_setscheduler(0, libc::SCHED_BATCH, &raw const parameter)
    })
    .map(drop)
}

/// Lets libc keep one arena of its own for all threads, as nothing here but libc itself uses its malloc: a thread that starts asks where
/// its stack ends, which would leave an arena to each of the first sixteen. Call it before they start.
pub fn one_libc_arena() {
    #[cfg(target_env = "gnu")]
    // SAFETY: sets a number within libc.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// CPU time that this thread has used.
pub fn thread_cpu_time() -> Duration {
    clock(libc::CLOCK_THREAD_CPUTIME_ID)
}

/// CPU time that this process has used, user and system.
pub fn process_cpu_time() -> Duration {
    clock(libc::CLOCK_PROCESS_CPUTIME_ID)
}

fn clock(id: libc::clockid_t) -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid timespec; the clock ids used here always exist.
    unsafe { libc::clock_gettime(id, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    #[test]
    fn bytes_cross_a_connection_between_private_tables() {
        let wake = EventFd::new().unwrap();
        let (sender, receiver) = std::sync::mpsc::channel();
        let server = std::thread::spawn(move || {
            unshare_files().unwrap();
            let listener = listen("127.0.0.1:0".parse().unwrap(), 16, 0).unwrap();
            let epoll = Epoll::new().unwrap();
            epoll.add(&wake, 1, Interest::Wake).unwrap();
            epoll.add(&listener, 2, Interest::Read).unwrap();
            sender.send(local_address(&listener).unwrap()).unwrap();
            let mut events = event_buffer(8);
            let mut seen = Vec::new();
            while seen.len() < 2 {
                for event in epoll.wait(&mut events, Some(Duration::from_secs(60))).unwrap() {
                    if !seen.contains(&event.token()) {
                        seen.push(event.token());
                    }
                }
            }
            let (connection, peer) = accept(&listener).unwrap();
            assert_eq!(peer.ip(), "127.0.0.9".parse::<IpAddr>().unwrap());
            write_vectored(&connection, &[io::IoSlice::new(b"he"), io::IoSlice::new(b"llo")]).unwrap();
            reset_on_close(&connection).unwrap();
        });
        let target = receiver.recv().unwrap();
        wake.wake();
        let client = connect(Some("127.0.0.9".parse().unwrap()), target, true).unwrap();
        let epoll = Epoll::new().unwrap();
        epoll.add(&client, 7, Interest::Read).unwrap();
        let mut events = event_buffer(1);
        let ready = epoll.wait(&mut events, Some(Duration::from_secs(60))).unwrap();
        assert_eq!(ready.first().map(Event::token), Some(7));
        server.join().unwrap();
    }
}
