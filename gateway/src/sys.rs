//! System calls, and the only file with `unsafe`. Used by gateway workers and by loadtest's engine.
//!
//! Trap: threads here may have a **private fd table** ([`unshare_files`]). An fd number means nothing on another
//! thread, so [`Fd`] is `!Send`: dropping it elsewhere would close something else. What must be reachable from several
//! tables (an [`EventFd`]) is made before the tables part.

#![allow(unsafe_code)]

use std::io;
use std::marker::PhantomData;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

use libc::{c_int, c_void, socklen_t};
use tokio::io::unix::AsyncFd;

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

/// Allocations of this size and more are mappings of their own, which go back to the kernel when they are freed.
pub const MMAP_THRESHOLD_BYTES: usize = 128 * 1024;

/// Heaps that malloc may spread threads over. Workers allocate little and keep most of it in malloc's caches per thread, so
/// they hardly meet; and every heap keeps some pages that a storm has left half used.
const HEAPS_MAX: c_int = 4;

/// Settles how malloc and the kernel lay out this process's memory, so that what is freed is really given back: the
/// threshold above stays where it is (glibc raises it with every larger block that is freed, and keeps such blocks in its
/// heaps from then on), and nothing is rounded up to huge pages. Call it once, before threads start.
pub fn steady_heap() {
    // SAFETY: both calls take plain numbers and change only how later allocations are laid out.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES as c_int);
        libc::mallopt(libc::M_ARENA_MAX, HEAPS_MAX);
        libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0);
    }
}

/// Gives free heap pages back to the kernel.
pub fn trim_heap() {
    // SAFETY: glibc's malloc_trim takes its own locks.
    unsafe { libc::malloc_trim(0) };
}

// ---------------------------------------------------------------------------------------------------------- eventfd

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

// ------------------------------------------------------------------------------------------------------------ epoll

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

// ---------------------------------------------------------------------------------------------------------- sockets

/// A non-blocking TCP listener with SO_REUSEPORT, SO_REUSEADDR and TCP_NODELAY, which accepted sockets inherit.
/// `send_buffer_bytes` caps SO_SNDBUF of accepted sockets (0: the kernel's default).
pub fn listen(address: SocketAddr, backlog: i32, send_buffer_bytes: usize) -> io::Result<Fd> {
    let fd = tcp_socket(address)?;
    set_option(&fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    set_option(&fd, libc::SOL_SOCKET, libc::SO_REUSEPORT, 1)?;
    set_option(&fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, 1)?;
    if send_buffer_bytes > 0 {
        set_option(&fd, libc::SOL_SOCKET, libc::SO_SNDBUF, send_buffer_bytes as c_int)?;
    }
    with_address(address, |pointer, length| {
        // SAFETY: `with_address` gives a valid sockaddr of that length.
        check(unsafe { libc::bind(fd.raw, pointer, length) })
    })?;
    // SAFETY: no memory involved.
    check(unsafe { libc::listen(fd.raw, backlog) })?;
    Ok(fd)
}

/// The address a socket is bound to.
pub fn local_address(fd: &impl AsRawFd) -> io::Result<SocketAddr> {
    read_address(|storage, length| {
        // SAFETY: `read_address` gives writable room of that length.
        unsafe { libc::getsockname(fd.as_raw_fd(), storage, length) }
    })
    .map(|(_, address)| address)
}

/// Takes one connection off a listener, non-blocking. `WouldBlock` when there is none.
pub fn accept(listener: &impl AsRawFd) -> io::Result<(Fd, SocketAddr)> {
    let (raw, address) = read_address(|storage, length| {
        // SAFETY: `read_address` gives writable room of that length.
        unsafe {
            libc::accept4(listener.as_raw_fd(), storage, length, libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC)
        }
    })?;
    Ok((Fd::new(raw)?, address))
}

/// Takes one connection off a listener as [`accept`] does, without asking who it is.
pub fn accept_unnamed(listener: &impl AsRawFd) -> io::Result<Fd> {
    // SAFETY: null pointers say that no address is wanted.
    Fd::new(unsafe {
        libc::accept4(
            listener.as_raw_fd(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
        )
    })
}

/// Begins a connection from `source` (its port is chosen at connect, so that one source address serves many
/// destinations). Ready for write when it is made; [`take_error`] then tells how it went. `nodelay` is for those that
/// write again before the first answer: it costs a system call.
pub fn connect(source: Option<IpAddr>, target: SocketAddr, nodelay: bool) -> io::Result<Fd> {
    let fd = tcp_socket(target)?;
    if nodelay {
        set_option(&fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, 1)?;
    }
    if let Some(source) = source {
        set_option(&fd, libc::SOL_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1)?;
        with_address(SocketAddr::new(source, 0), |pointer, length| {
            // SAFETY: `with_address` gives a valid sockaddr of that length.
            check(unsafe { libc::bind(fd.raw, pointer, length) })
        })?;
    }
    let begun = with_address(target, |pointer, length| {
        // SAFETY: as above.
        check(unsafe { libc::connect(fd.raw, pointer, length) })
    });
    match begun {
        Ok(_) => Ok(fd),
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Ok(fd),
        Err(error) => Err(error),
    }
}

/// The error that a socket holds (a connect that failed), and clears it.
pub fn take_error(fd: &impl AsRawFd) -> io::Result<()> {
    let mut code: c_int = 0;
    let mut length = size_of::<c_int>() as socklen_t;
    // SAFETY: `code` and `length` are valid for the call.
    check(unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ERROR,
            (&raw mut code).cast::<c_void>(),
            &mut length,
        )
    })?;
    if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(code)) }
}

/// Ends the sending direction: the peer reads what was sent, then the end.
pub fn shutdown_write(fd: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: no memory involved.
    check(unsafe { libc::shutdown(fd.as_raw_fd(), libc::SHUT_WR) }).map(drop)
}

/// Makes the close of this socket a reset: nothing lingers, nothing stays in TIME_WAIT.
pub fn reset_on_close(fd: &impl AsRawFd) -> io::Result<()> {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    set_option_value(fd, libc::SOL_SOCKET, libc::SO_LINGER, &linger)
}

/// Unacknowledged data for this long ends the connection (TCP_USER_TIMEOUT). Inherited from a listener.
pub fn set_user_timeout(fd: &impl AsRawFd, timeout: Duration) -> io::Result<()> {
    set_option(
        fd,
        libc::IPPROTO_TCP,
        libc::TCP_USER_TIMEOUT,
        timeout.as_millis().min(i32::MAX as u128) as c_int,
    )
}

/// Reads what is there. `Ok(0)` is the peer's end.
pub fn read(fd: &impl AsRawFd, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: `buffer` is writable for its length.
    check_size(unsafe { libc::read(fd.as_raw_fd(), buffer.as_mut_ptr().cast::<c_void>(), buffer.len()) })
}

/// Sends what fits, without SIGPIPE.
pub fn write(fd: &impl AsRawFd, bytes: &[u8]) -> io::Result<usize> {
    // SAFETY: `bytes` is readable for its length.
    check_size(unsafe {
        libc::send(fd.as_raw_fd(), bytes.as_ptr().cast::<c_void>(), bytes.len(), libc::MSG_NOSIGNAL)
    })
}

/// Sends what fits of several pieces, in one call.
pub fn write_vectored(fd: &impl AsRawFd, pieces: &[io::IoSlice<'_>]) -> io::Result<usize> {
    // SIGPIPE is ignored by the Rust runtime, so writev is as safe as send here.
    // SAFETY: IoSlice is guaranteed to have iovec's layout, and each piece is readable.
    check_size(unsafe {
        libc::writev(fd.as_raw_fd(), pieces.as_ptr().cast::<libc::iovec>(), pieces.len().min(1024) as c_int)
    })
}

fn tcp_socket(address: SocketAddr) -> io::Result<Fd> {
    let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    // SAFETY: no memory involved.
    Fd::new(unsafe { libc::socket(family, libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC, 0) })
}

fn set_option(fd: &impl AsRawFd, level: c_int, name: c_int, value: c_int) -> io::Result<()> {
    set_option_value(fd, level, name, &value)
}

fn set_option_value<T>(fd: &impl AsRawFd, level: c_int, name: c_int, value: &T) -> io::Result<()> {
    // SAFETY: `value` is readable for its own size, and options used here are plain C structs or ints.
    check(unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            std::ptr::from_ref(value).cast::<c_void>(),
            size_of::<T>() as socklen_t,
        )
    })
    .map(drop)
}

fn with_address<R>(address: SocketAddr, call: impl FnOnce(*const libc::sockaddr, socklen_t) -> R) -> R {
    match address {
        SocketAddr::V4(v4) => {
            let raw = libc::sockaddr_in {
                sin_family: libc::AF_INET as u16,
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from(*v4.ip()).to_be() },
                sin_zero: [0; 8],
            };
            call((&raw const raw).cast(), size_of_val(&raw) as socklen_t)
        }
        SocketAddr::V6(v6) => {
            let raw = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as u16,
                sin6_port: v6.port().to_be(),
                sin6_flowinfo: v6.flowinfo(),
                sin6_addr: libc::in6_addr { s6_addr: v6.ip().octets() },
                sin6_scope_id: v6.scope_id(),
            };
            call((&raw const raw).cast(), size_of_val(&raw) as socklen_t)
        }
    }
}

fn read_address(
    call: impl FnOnce(*mut libc::sockaddr, *mut socklen_t) -> c_int,
) -> io::Result<(c_int, SocketAddr)> {
    // sockaddr_in6 is the longest that a TCP socket answers with.
    let mut raw = libc::sockaddr_in6 {
        sin6_family: 0,
        sin6_port: 0,
        sin6_flowinfo: 0,
        sin6_addr: libc::in6_addr { s6_addr: [0; 16] },
        sin6_scope_id: 0,
    };
    let mut length = size_of_val(&raw) as socklen_t;
    let result = check(call((&raw mut raw).cast(), &mut length))?;
    let port = u16::from_be(raw.sin6_port);
    let ip = if c_int::from(raw.sin6_family) == libc::AF_INET {
        // In sockaddr_in the address stands where sockaddr_in6 has its flow info.
        IpAddr::V4(Ipv4Addr::from(raw.sin6_flowinfo.to_ne_bytes()))
    } else {
        IpAddr::V6(Ipv6Addr::from(raw.sin6_addr.s6_addr))
    };
    Ok((result, SocketAddr::new(ip, port)))
}

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn check_size(result: isize) -> io::Result<usize> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as usize) }
}

#[cfg(test)]
mod tests {
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
                for event in epoll.wait(&mut events, Some(Duration::from_secs(10))).unwrap() {
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
        let ready = epoll.wait(&mut events, Some(Duration::from_secs(10))).unwrap();
        assert_eq!(ready.first().map(Event::token), Some(7));
        server.join().unwrap();
    }
}
