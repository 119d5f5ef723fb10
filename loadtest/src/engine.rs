//! The client side of every load: many connections on few threads, each thread with a private fd table, an epoll and a
//! table of connections of its own. What is said on a connection is decided by a [`Mode`]; what is counted comes back
//! as [`Sample`]s to the main thread.
//!
//! Trap: fds of an engine thread mean nothing elsewhere. Everything that crosses threads here is a number, a sample or
//! the [`Control`], and the eventfds that wake the threads are made before the first of them parts from our table.

mod conn;
mod io;
mod mode;
mod sample;
mod schedule;
mod strain;
mod worker;

pub use io::Io;
pub use mode::{Mode, Share};
pub use sample::{Sample, Times, histogram, millis};
pub use schedule::{Rate, RateError};
pub use strain::Strain;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};
use gateway::sys;

use crate::sources::Sources;

/// What an engine is to do.
#[derive(Debug, Clone)]
pub struct Plan {
    /// How many connections in all.
    pub connections: u32,
    /// Connection `i` goes to target `i % targets`.
    pub targets: Vec<SocketAddr>,
    /// When each is begun; `None`: as fast as the window allows.
    pub rate: Option<Rate>,
    /// Connections begun and not yet ready, over all threads. Ignored with a rate.
    pub window: usize,
    /// A connection that is not ready after this long has failed.
    pub ready_ms_max: u64,
    /// For loads whose latency is measured: TCP_NODELAY, and threads that are woken at once. A storm needs neither: each
    /// of its writes follows an answer, and SCHED_BATCH makes it faster.
    pub prompt: bool,
}

impl Default for Plan {
    fn default() -> Plan {
        Plan {
            connections: 0,
            targets: Vec::new(),
            rate: None,
            window: 1_024,
            ready_ms_max: 30_000,
            prompt: false,
        }
    }
}

/// Why an engine could not start or end well.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum EngineError {
    #[error("cannot read or raise the fd limit: {0}")]
    FdLimit(std::io::Error),
    #[error("an fd limit of {limit} leaves no room for connections")]
    FdLimitTooLow { limit: u64 },
    #[error("an engine thread cannot start: {0}")]
    Thread(std::io::Error),
    #[error("an engine thread panicked")]
    Panicked,
}

/// What the main thread tells the engine threads.
#[derive(Debug, Default)]
pub struct Control {
    stop: AtomicBool,
    /// When opening begins; 0: not yet.
    begin_us: AtomicU64,
    /// When the mode's own work begins; 0: not yet.
    go_us: AtomicU64,
    /// Threads that have begun all their connections.
    opened_threads: AtomicUsize,
    /// How many cuts were asked for, and how many percent the last takes.
    cuts: AtomicU32,
    cut_percent: AtomicU32,
}

impl Control {
    /// When the mode's own work (chat: sending) begins, in run time.
    pub fn go_us(&self) -> Option<u64> {
        Some(self.go_us.load(Ordering::Acquire)).filter(|us| *us > 0)
    }
}

/// Run time: microseconds since the engine was made.
#[derive(Debug, Clone, Copy)]
pub struct Clock(Instant);

impl Clock {
    /// Now, never 0.
    pub fn now_us(self) -> u64 {
        self.0.elapsed().as_micros() as u64 + 1
    }

    /// That time as an instant.
    pub fn instant(self, us: u64) -> Instant {
        self.0 + Duration::from_micros(us)
    }

    /// That instant in run time, rounded up: for deadlines.
    pub fn us(self, instant: Instant) -> u64 {
        instant.saturating_duration_since(self.0).as_nanos().div_ceil(1_000) as u64
    }
}

/// Running engine threads. `P` is what each hands back at its end.
pub struct Engine<P> {
    control: Arc<Control>,
    wakes: Arc<[sys::EventFd]>,
    threads: Vec<JoinHandle<P>>,
    samples: Receiver<Sample>,
    clock: Clock,
}

impl<P: Send + 'static> Engine<P> {
    /// Starts the threads; connections begin with [`Engine::begin`]. `make` builds each thread's mode, on that thread.
    pub fn start<M, F>(plan: Plan, make: F) -> Result<Engine<P>, EngineError>
    where
        M: Mode<Part = P>,
        F: Fn(Share) -> M + Send + Sync + 'static,
    {
        let limit = sys::raise_fd_limit().map_err(EngineError::FdLimit)?;
        let room = limit.saturating_sub(FDS_RESERVED).min(u64::from(u32::MAX)) as u32;
        if room == 0 {
            return Err(EngineError::FdLimitTooLow { limit });
        }
        let shares = shares(plan.connections, room, cores());
        let wakes: Result<Arc<[_]>, _> = shares.iter().map(|_| sys::EventFd::new()).collect();
        let wakes = wakes.map_err(EngineError::Thread)?;
        let control = Arc::new(Control::default());
        let clock = Clock(Instant::now());
        // Bounded, so that a main thread that is behind holds the samples back, not the memory down.
        let (sample_sender, samples) = crossbeam_channel::bounded(shares.len() * 4);
        let (ready_sender, ready) = crossbeam_channel::bounded(shares.len());
        let (plan, make) = (Arc::new(plan), Arc::new(make));
        let mut threads = Vec::with_capacity(shares.len());
        for share in shares {
            let seat = Seat {
                plan: plan.clone(),
                control: control.clone(),
                wakes: wakes.clone(),
                samples: sample_sender.clone(),
                clock,
                sources: Sources::plan(plan.connections, &plan.targets),
                share,
            };
            let (make, ready) = (make.clone(), ready_sender.clone());
            let run = move || seat.run(&ready, |share| make(share));
            let name = format!("engine-{}", share.thread);
            let thread = std::thread::Builder::new().name(name).stack_size(STACK_BYTES).spawn(run);
            threads.push(thread.map_err(EngineError::Thread)?);
        }
        drop(ready_sender);
        for _ in &threads {
            ready.recv().map_err(|_| EngineError::Panicked)?.map_err(EngineError::Thread)?;
        }
        Ok(Engine { control, wakes, threads, samples, clock })
    }

    /// Lets the threads open connections. When that is, in run time.
    pub fn begin(&self) -> u64 {
        let now = self.clock.now_us();
        self.control.begin_us.store(now, Ordering::Release);
        self.wake();
        now
    }

    /// Lets the mode's own work begin `in_ms` from now.
    pub fn go(&self, in_ms: u64) -> u64 {
        let at = self.clock.now_us() + in_ms * 1_000;
        self.control.go_us.store(at, Ordering::Release);
        self.wake();
        at
    }

    /// Cuts `percent` of the ready connections by reset and opens them again at once. How many threads will say
    /// [`Sample::cuts_done`].
    pub fn cut(&self, percent: u32) -> u64 {
        self.control.cut_percent.store(percent.min(100), Ordering::Release);
        self.control.cuts.fetch_add(1, Ordering::AcqRel);
        self.wake();
        self.threads.len() as u64
    }

    /// Run time now.
    pub fn now_us(&self) -> u64 {
        self.clock.now_us()
    }

    /// The next sample, if one comes within `wait`.
    pub fn sample(&self, wait: Duration) -> Option<Sample> {
        self.samples.recv_timeout(wait).ok()
    }

    /// Closes every connection by reset and ends the threads. What they counted last, and their parts.
    pub fn stop(self) -> Result<(Sample, Vec<P>), EngineError> {
        self.control.stop.store(true, Ordering::Release);
        self.wake();
        let mut last = Sample::default();
        // The channel ends when the last thread has dropped its end.
        while let Ok(sample) = self.samples.recv() {
            last.add(&sample);
        }
        let parts: Result<Vec<_>, _> =
            self.threads.into_iter().map(|thread| thread.join().map_err(|_| EngineError::Panicked)).collect();
        let parts = parts?;
        // Left open, those of a dozen engines would be missing in the tables of the next.
        sys::close_wakes(&self.wakes);
        Ok((last, parts))
    }

    fn wake(&self) {
        self.wakes.iter().for_each(|wake| wake.wake());
    }
}

/// What one engine thread is given.
struct Seat {
    plan: Arc<Plan>,
    control: Arc<Control>,
    wakes: Arc<[sys::EventFd]>,
    samples: Sender<Sample>,
    clock: Clock,
    sources: Sources,
    share: Share,
}

/// How many cores there are.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Splits the connections evenly over as many threads as the fd limit asks for, at least one a core.
fn shares(connections: u32, room: u32, cores: usize) -> Vec<Share> {
    let threads = connections.div_ceil(room).max(cores.min(connections as usize) as u32).max(1);
    let start = |thread: u32| (u64::from(connections) * u64::from(thread) / u64::from(threads)) as u32;
    (0..threads)
        .map(|thread| Share {
            thread,
            threads,
            first: start(thread),
            count: start(thread + 1) - start(thread),
        })
        .collect()
}

/// Below the fd limit: epoll, timer, wake-ups of all threads, and what the main thread had open.
const FDS_RESERVED: u64 = 1_000;
const STACK_BYTES: usize = 512 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_connection_has_one_thread() {
        for (connections, room, cores) in
            [(0, 19_000, 2), (1, 19_000, 2), (10, 19_000, 2), (1_000_000, 19_000, 2), (100, 7, 4)]
        {
            let shares = shares(connections, room, cores);
            let mut next = 0;
            for share in &shares {
                assert_eq!(share.first, next);
                assert!(share.count <= room);
                next += share.count;
            }
            assert_eq!(next, connections);
        }
        assert_eq!(shares(1_000_000, 19_000, 2).len(), 53);
    }
}
