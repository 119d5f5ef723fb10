//! TCP sockets: opening, options, bytes in and out. All of them non-blocking.
//!
//! Trap: options are set on the listener where accepted sockets inherit them; one set per connection would cost a system call
//! in every storm.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::time::Duration;

use libc::{c_int, c_void, socklen_t};

use super::{Fd, check};

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
        check(unsafe { libc::bind(fd.raw(), pointer, length) })
    })?;
    // SAFETY: no memory involved.
    check(unsafe { libc::listen(fd.raw(), backlog) })?;
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
            check(unsafe { libc::bind(fd.raw(), pointer, length) })
        })?;
    }
    let begun = with_address(target, |pointer, length| {
        // SAFETY: as above.
        check(unsafe { libc::connect(fd.raw(), pointer, length) })
    });
    match begun {
        Ok(_) => Ok(fd),
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Ok(fd),
        Err(error) => Err(error),
    }
}

/// The error that a socket holds (a connect that failed), and clears it.
pub fn take_error(fd: &impl AsRawFd) -> io::Result<()> {
    let code = option(fd, libc::SOL_SOCKET, libc::SO_ERROR)?;
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

/// What [`set_user_timeout`] has set, or the socket has inherited; zero: the kernel's own limit.
pub fn user_timeout(fd: &impl AsRawFd) -> io::Result<Duration> {
    option(fd, libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT)
        .map(|ms| Duration::from_millis(ms.unsigned_abs().into()))
}

/// Reads what is there, as much as `buffer` has room for, in place of what it held. `Ok(0)` is the peer's end.
///
/// The room is not zeroed first, so that only as much of it becomes resident as has ever come.
pub fn read(fd: &impl AsRawFd, buffer: &mut Vec<u8>) -> io::Result<usize> {
    read_at_most(fd, buffer, buffer.capacity())
}

/// The same, of no more than so many bytes.
pub fn read_at_most(fd: &impl AsRawFd, buffer: &mut Vec<u8>, bytes_max: usize) -> io::Result<usize> {
    buffer.clear();
    let bytes_max = bytes_max.min(buffer.capacity());
    // SAFETY: `buffer` owns its capacity, which may be written to whatever is in it.
    let count =
        check_size(unsafe { libc::read(fd.as_raw_fd(), buffer.as_mut_ptr().cast::<c_void>(), bytes_max) })?;
    // SAFETY: the kernel has written so many bytes from the start, and no more than the capacity.
    unsafe { buffer.set_len(count) };
    Ok(count)
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

fn option(fd: &impl AsRawFd, level: c_int, name: c_int) -> io::Result<c_int> {
    let mut value: c_int = 0;
    let mut length = size_of::<c_int>() as socklen_t;
    // SAFETY: `value` and `length` are valid for the call, and options asked for here are ints.
    check(unsafe {
        libc::getsockopt(fd.as_raw_fd(), level, name, (&raw mut value).cast::<c_void>(), &mut length)
    })?;
    Ok(value)
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

fn check_size(result: isize) -> io::Result<usize> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as usize) }
}
