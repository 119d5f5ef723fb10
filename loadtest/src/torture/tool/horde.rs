//! Thousands of connections of bare bytes, all on the thread that calls, none of which ever blocks it. The kernel says who has
//! something to read: to ask ten thousand sockets in turn takes a core's time from those whose patience is measured.
//!
//! Trap: all fds are in the process's one table: [`gateway::sys::raise_fd_limit`] first, and no more than it gives. Dropped,
//! each resets its connection, or the ports would stay in TIME_WAIT and be missing to the next round.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, SocketAddrV4, TcpStream};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use gateway::sys;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrIn, SockaddrStorage, sockopt};
use proto::command::ServerFrame;
use proto::wire;
use slab::Slab;

use super::raw::{is_not_yet, take_frame};
use crate::sources::Sources;

/// One of them.
#[derive(Debug)]
pub struct Member {
    socket: Option<TcpStream>,
    unsent: Vec<u8>,
    received: Vec<u8>,
    /// When it was connected.
    pub began: Instant,
    /// When the server's end of it was seen, or it broke.
    pub ended: Option<Instant>,
    /// The closing Error, if one came.
    pub error: Option<wire::Error>,
    /// Frames that came and were not taken yet.
    pub heard: Vec<ServerFrame>,
    /// False: what comes is left in the kernel.
    reads: bool,
}

/// See the head of this file.
#[derive(Debug)]
pub struct Horde {
    /// Numbered in the order in which they were opened, as long as none is taken out.
    pub members: Slab<Member>,
    target: SocketAddr,
    sources: Sources,
    receive_bytes: Option<usize>,
    /// Edge-triggered: whoever is told of reads until there is no more.
    epoll: Epoll,
    /// Who has more to say than the kernel took.
    unsent: Vec<usize>,
    buffer: Vec<u8>,
}

impl Horde {
    /// Nobody yet; for so many in all. `receive_bytes`: as small a receive buffer as that, for those who will not read.
    pub fn new(target: SocketAddr, count: u32, receive_bytes: Option<usize>) -> io::Result<Horde> {
        sys::raise_fd_limit()?;
        Ok(Horde {
            members: Slab::new(),
            target,
            sources: Sources::plan(count, &[target]),
            receive_bytes,
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            unsent: Vec::new(),
            buffer: vec![0; 65_536],
        })
    }

    /// Opens one more, with this to say first. Its index.
    pub fn open(&mut self, first: &[u8]) -> io::Result<usize> {
        let index = self.members.vacant_key();
        self.open_from(self.sources.of(index as u32), first)
    }

    /// As [`Horde::open`], from this address.
    pub fn open_from(&mut self, source: Option<IpAddr>, first: &[u8]) -> io::Result<usize> {
        let index = self.members.vacant_key();
        let member = self.connected(index, source)?;
        self.members.insert(member);
        self.say(index, first);
        Ok(index)
    }

    /// A new connection in the place of one that ended.
    pub fn reopen(&mut self, index: usize, first: &[u8]) -> io::Result<()> {
        self.members[index] = self.connected(index, self.sources.of(index as u32))?;
        self.say(index, first);
        Ok(())
    }

    fn connected(&self, index: usize, source: Option<IpAddr>) -> io::Result<Member> {
        let socket = connect(source, self.target, self.receive_bytes)?;
        sys::reset_on_close(&socket)?;
        socket.set_nonblocking(true)?;
        self.epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, index as u64))?;
        Ok(Member {
            socket: Some(socket),
            unsent: Vec::new(),
            received: Vec::new(),
            began: Instant::now(),
            ended: None,
            error: None,
            heard: Vec::new(),
            reads: true,
        })
    }

    /// Says something, as far as the connection lives. What the kernel does not take goes with the next [`Horde::pump`].
    pub fn say(&mut self, index: usize, bytes: &[u8]) {
        let member = &mut self.members[index];
        let waits = !member.unsent.is_empty();
        member.unsent.extend_from_slice(bytes);
        if !member.flush() && !waits {
            self.unsent.push(index);
        }
    }

    /// Reads and writes whatever can be, for all.
    pub fn pump(&mut self) {
        let members = &mut self.members;
        self.unsent.retain(|index| members.get_mut(*index).is_some_and(|member| !member.flush()));
        while self.hear(Duration::ZERO).len() == EVENTS_MAX {}
    }

    /// Reads what came to some of them, waiting until it comes, at most so long: to whom.
    pub fn hear(&mut self, wait: Duration) -> Vec<usize> {
        let mut events = [EpollEvent::empty(); EVENTS_MAX];
        let wait = EpollTimeout::try_from(wait).unwrap_or(EpollTimeout::ZERO);
        // Interrupted: nobody heard anything.
        let count = self.epoll.wait(&mut events, wait).unwrap_or(0);
        let ready: Vec<usize> = events[..count].iter().map(|event| event.data() as usize).collect();
        for index in &ready {
            if let Some(member) = self.members.get_mut(*index).filter(|member| member.reads) {
                member.read(&mut self.buffer);
            }
        }
        ready
    }

    /// Everybody reads, or nobody does.
    pub fn set_reads(&mut self, reads: bool) {
        for (_, member) in &mut self.members {
            member.reads = reads;
            if reads {
                // What came meanwhile was told of already.
                member.read(&mut self.buffer);
            }
        }
    }

    /// Takes out who is connected no more.
    pub fn take_ended(&mut self) -> Vec<Member> {
        let ended: Vec<usize> = self
            .members
            .iter()
            .filter(|(_, member)| member.ended.is_some())
            .map(|(index, _)| index)
            .collect();
        ended.into_iter().filter_map(|index| self.members.try_remove(index)).collect()
    }

    /// Forgets what everybody has heard.
    pub fn clear_heard(&mut self) {
        self.members.iter_mut().for_each(|(_, member)| member.heard.clear());
    }

    /// Each of them, in order.
    pub fn all(&self) -> impl Iterator<Item = &Member> {
        self.members.iter().map(|(_, member)| member)
    }

    /// Pumps until it is so. False: it was not within `wait`.
    pub fn pump_until(&mut self, wait: Duration, mut is_so: impl FnMut(&mut Horde) -> bool) -> bool {
        let until = Instant::now() + wait;
        loop {
            let began = Instant::now();
            self.pump();
            if is_so(self) {
                return true;
            }
            if Instant::now() >= until {
                return false;
            }
            // To look through so many takes time, and the machine is the others' too. But an end is seen only when it is looked for.
            std::thread::sleep((began.elapsed() * 9).clamp(PUMP_EVERY, PUMP_LATE_MAX));
        }
    }

    /// How many are connected as far as we know.
    pub fn alive(&self) -> usize {
        self.all().filter(|member| member.ended.is_none()).count()
    }

    /// Forgets the connection without a word; the kernel resets it.
    pub fn leave(&mut self, index: usize) {
        self.members[index].end();
    }
}

impl Member {
    /// Of the closing Error.
    pub fn code(&self) -> Option<wire::Code> {
        self.error.as_ref().map(wire::Error::code)
    }

    /// Whether it has been let in.
    pub fn is_logged_in(&self) -> bool {
        self.ended.is_none() && self.heard.iter().any(|frame| matches!(frame, ServerFrame::LoginAck(_)))
    }

    /// Whether nothing is left to say.
    fn flush(&mut self) -> bool {
        while let Some(socket) = &mut self.socket
            && !self.unsent.is_empty()
        {
            match socket.write(&self.unsent) {
                Ok(count) => drop(self.unsent.drain(..count)),
                Err(error) if is_not_yet(&error) => return false,
                // What the server said before it closed is still to be read, so that reading finds the end.
                Err(_) if self.reads => self.unsent.clear(),
                Err(_) => self.end(),
            }
        }
        true
    }

    fn read(&mut self, buffer: &mut [u8]) {
        while let Some(socket) = &mut self.socket {
            match socket.read(buffer) {
                Ok(0) => self.end(),
                Ok(count) => self.received.extend_from_slice(&buffer[..count]),
                Err(error) if is_not_yet(&error) => return,
                Err(_) => self.end(),
            }
            loop {
                match take_frame(&mut self.received) {
                    Ok(Some(ServerFrame::Error(error))) if error.closing => self.error = Some(error),
                    Ok(Some(frame)) => self.heard.push(frame),
                    Ok(None) => break,
                    Err(_) => return self.end(),
                }
            }
        }
    }

    fn end(&mut self) {
        if self.socket.take().is_some() {
            self.ended = Some(Instant::now());
        }
    }
}

fn connect(
    source: Option<IpAddr>,
    target: SocketAddr,
    receive_bytes: Option<usize>,
) -> io::Result<TcpStream> {
    let fd = socket::socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    if let Some(bytes) = receive_bytes {
        socket::setsockopt(&fd, sockopt::RcvBuf, &bytes)?;
    }
    if let Some(IpAddr::V4(source)) = source {
        socket::bind(fd.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(source, 0)))?;
    }
    match socket::connect(fd.as_raw_fd(), &SockaddrStorage::from(target)) {
        Ok(()) => Ok(TcpStream::from(fd)),
        Err(error) => Err(io::Error::new(io::Error::from(error).kind(), format!("connect: {error}"))),
    }
}

/// Told of at once.
const EVENTS_MAX: usize = 512;
const PUMP_EVERY: Duration = Duration::from_millis(5);
const PUMP_LATE_MAX: Duration = Duration::from_millis(100);
