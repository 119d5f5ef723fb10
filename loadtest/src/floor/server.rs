//! The least server: accept, epoll ADD, and with echo one read and one write. One thread per worker, as many as the
//! gateway would use, each with a private fd table and its own SO_REUSEPORT listener.
//!
//! Trap: the kernel spreads connections over the listeners that exist when a SYN comes. All must listen before the first
//! client connects.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use gateway::sys::{self, Epoll, EventFd, Fd, Interest};

use super::ECHO_BYTES;
use crate::engine::{EngineError, cores};
use crate::monitor::RunError;

/// Running workers.
pub struct FloorServer {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    stop: AtomicBool,
    /// One per worker, so that they do not fight over a cache line.
    accepted: Vec<Counter>,
    wakes: Vec<EventFd>,
    began: Instant,
}

#[repr(align(64))]
#[derive(Default)]
struct Counter {
    accepted: AtomicU64,
    /// After the begin.
    last_us: AtomicU64,
}

impl FloorServer {
    /// Starts the workers; all listen when this returns.
    pub fn start(address: SocketAddr, connections: u32, echo: bool) -> Result<FloorServer, RunError> {
        let limit = sys::raise_fd_limit().map_err(EngineError::FdLimit)?;
        let room = limit.saturating_sub(FDS_LEFT_FREE);
        if room == 0 {
            return Err(EngineError::FdLimitTooLow { limit }.into());
        }
        let workers = cores().max(u64::from(connections).div_ceil(room) as usize);
        let wakes: io::Result<Vec<_>> = (0..workers).map(|_| EventFd::new()).collect();
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            accepted: (0..workers).map(|_| Counter::default()).collect(),
            wakes: wakes.map_err(EngineError::Thread)?,
            began: Instant::now(),
        });
        let (listens_sender, listens) = crossbeam_channel::bounded(workers);
        let mut threads = Vec::with_capacity(workers);
        for worker in 0..workers {
            let (shared, listens) = (shared.clone(), listens_sender.clone());
            let run = move || work(worker, address, echo, &shared, &listens);
            let thread = std::thread::Builder::new().name(format!("floor-{worker}")).spawn(run);
            threads.push(thread.map_err(EngineError::Thread)?);
        }
        for _ in 0..workers {
            let listening = listens.recv().map_err(|_| EngineError::Panicked)?;
            let what = format!("the floor server cannot listen on {address}");
            listening.map_err(|error| RunError::Io { what, error })?;
        }
        Ok(FloorServer { shared, threads })
    }

    /// How many workers.
    pub fn workers(&self) -> usize {
        self.threads.len()
    }

    /// Connections accepted so far.
    pub fn accepted(&self) -> u64 {
        self.shared.sum()
    }

    /// When the last one was.
    pub fn last_accept(&self) -> Option<Instant> {
        let last_us =
            self.shared.accepted.iter().map(|counter| counter.last_us.load(Ordering::Acquire)).max()?;
        (last_us > 0).then(|| self.shared.began + Duration::from_micros(last_us))
    }

    /// Tells the workers to close everything.
    pub fn begin_stop(&self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wakes.iter().for_each(|wake| wake.wake());
    }

    /// Closes everything and waits until it is done.
    pub fn stop(self) {
        self.begin_stop();
        for thread in self.threads {
            // A worker that panicked has said so on stderr.
            let _ = thread.join();
        }
        sys::close_wakes(&self.shared.wakes);
    }
}

impl Shared {
    fn sum(&self) -> u64 {
        self.accepted.iter().map(|counter| counter.accepted.load(Ordering::Acquire)).sum()
    }
}

fn work(worker: usize, address: SocketAddr, echo: bool, shared: &Shared, listens: &Sender<io::Result<()>>) {
    let set_up = || {
        sys::unshare_files()?;
        sys::schedule_batch()?;
        let epoll = Epoll::new()?;
        epoll.add(&shared.wakes[worker], TOKEN_WAKE, Interest::Wake)?;
        let listener = sys::listen(address, BACKLOG, 0)?;
        epoll.add(&listener, TOKEN_LISTENER, Interest::Read)?;
        Ok((epoll, listener))
    };
    match set_up() {
        Ok((epoll, listener)) => {
            let _ = listens.send(Ok(()));
            serve(worker, echo, shared, &epoll, &listener);
        }
        Err(error) => drop(listens.send(Err(error))),
    }
}

fn serve(worker: usize, echo: bool, shared: &Shared, epoll: &Epoll, listener: &Fd) {
    let mut connections: Vec<Fd> = Vec::new();
    let mut events = sys::event_buffer(512);
    let mut buffer = Vec::with_capacity(ECHO_BYTES);
    while !shared.stop.load(Ordering::Acquire) {
        let Ok(ready) = epoll.wait(&mut events, None) else { return };
        for event in ready {
            match event.token() {
                TOKEN_WAKE => {}
                TOKEN_LISTENER => accept(worker, shared, epoll, listener, &mut connections),
                _ if !echo => {}
                index => {
                    // Whoever is reset meanwhile fails here, and is closed with all the others at the end.
                    let fd = &connections[index as usize];
                    if sys::read(fd, &mut buffer).is_ok() {
                        let _ = sys::write(fd, &buffer);
                    }
                }
            }
        }
    }
    for fd in &connections {
        let _ = sys::reset_on_close(fd);
    }
}

fn accept(worker: usize, shared: &Shared, epoll: &Epoll, listener: &Fd, connections: &mut Vec<Fd>) {
    let counter = &shared.accepted[worker].accepted;
    for _ in 0..ACCEPTS_PER_TURN_MAX {
        let Ok(fd) = sys::accept_unnamed(listener) else { break };
        if epoll.add(&fd, connections.len() as u64, Interest::Read).is_ok() {
            connections.push(fd);
            counter.store(connections.len() as u64, Ordering::Release);
        }
    }
    shared.accepted[worker].last_us.store(shared.began.elapsed().as_micros() as u64, Ordering::Release);
}

/// As the gateway leaves free: SO_REUSEPORT's hash is even to about five sigma of this.
const FDS_LEFT_FREE: u64 = 700;
const BACKLOG: i32 = 65_535;
const ACCEPTS_PER_TURN_MAX: usize = 128;
const TOKEN_WAKE: u64 = u64::MAX;
const TOKEN_LISTENER: u64 = u64::MAX - 1;
