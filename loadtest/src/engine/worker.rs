//! The loop of one engine thread: open what is due, wait, read, tell the mode. Runs on its own thread with a private fd
//! table, made in [`Seat::run`].
//!
//! Trap: with a window, only a few threads open at a time, in turn. If all fifty did, each would have a few connections
//! in flight and every wake-up would carry one event.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet, VecDeque};
use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::BytesMut;
use crossbeam_channel::Sender;
use gateway::sys::{self, Epoll, Event, Interest};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::conn::{Conn, Phase, split};
use super::{Io, Mode, Sample, Seat, Share, cores};
use crate::fault::Fault;

impl Seat {
    /// The body of the thread. Says through `ready` whether it could set itself up.
    pub(super) fn run<M: Mode>(
        self,
        ready: &Sender<io::Result<()>>,
        make: impl FnOnce(Share) -> M,
    ) -> M::Part {
        let mode = make(self.share);
        // The other end waits for exactly one word from each thread.
        match Worker::new(self, mode) {
            Ok(mut worker) => {
                let _ = ready.send(Ok(()));
                worker.run();
                worker.mode.finish()
            }
            Err((error, mode)) => {
                let _ = ready.send(Err(error));
                mode.finish()
            }
        }
    }
}

struct Worker<M> {
    seat: Seat,
    mode: M,
    io: Io,
    timer: TimerFd,
    armed_us: u64,
    /// The next connection to begin for the first time.
    next: u32,
    told_opened: bool,
    /// Connections to begin again, by when.
    retries: BinaryHeap<Reverse<(u64, u32)>>,
    /// Connections in flight, in the order in which they run out of time. Those that are done stay until then.
    patience: VecDeque<(u64, u32, u16)>,
    sampled_us: u64,
    /// Cuts that are done.
    cuts: u32,
    read_buffer: Vec<u8>,
    greeting: BytesMut,
}

impl<M: Mode> Worker<M> {
    fn new(seat: Seat, mode: M) -> Result<Self, (io::Error, M)> {
        match set_up(&seat) {
            Ok((io, timer)) => Ok(Worker {
                seat,
                mode,
                io,
                timer,
                armed_us: 0,
                next: 0,
                told_opened: false,
                retries: BinaryHeap::new(),
                patience: VecDeque::new(),
                sampled_us: 0,
                cuts: 0,
                read_buffer: Vec::with_capacity(READ_BYTES),
                greeting: BytesMut::new(),
            }),
            Err(error) => Err((error, mode)),
        }
    }

    fn run(&mut self) {
        let mut events = sys::event_buffer(EVENTS_PER_TURN_MAX);
        while !self.seat.control.stop.load(Ordering::Acquire) {
            self.io.now_us = self.seat.clock.now_us();
            self.cut();
            let mut due = self.open();
            due = earlier(due, self.open_again());
            due = earlier(due, self.lose_patience());
            due = earlier(due, self.mode.tick(&mut self.io));
            self.bury();
            due = earlier(due, self.send_sample());
            let timeout = self.arm(due);
            let ready = match self.io.epoll.wait(&mut events, timeout) {
                Ok(ready) => ready,
                // Cannot happen with a valid epoll; the run then ends by its timeout.
                Err(_) => continue,
            };
            self.note_lag(due);
            for event in ready {
                self.io.now_us = self.seat.clock.now_us();
                self.handle(event);
            }
            self.bury();
        }
        self.tear_down();
    }

    /// Begins connections that are due or that the window has room for. When the next is due.
    fn open(&mut self) -> Option<u64> {
        let begin_us = self.seat.control.begin_us.load(Ordering::Acquire);
        if begin_us == 0 || self.next == self.seat.share.count {
            return None;
        }
        let share = self.seat.share;
        if let Some(rate) = self.seat.plan.rate {
            for _ in 0..OPENS_PER_TURN_MAX {
                if self.next == share.count {
                    return self.all_begun();
                }
                // Threads take turns within the schedule, so that each has an even rate.
                let order = u64::from(self.next) * u64::from(share.threads) + u64::from(share.thread);
                let due = begin_us + rate.due_us(order, u64::from(self.seat.plan.connections));
                if due > self.io.now_us {
                    return Some(due);
                }
                self.io.sample.lag.saturating_record(self.io.now_us - due);
                self.begin(self.next, due);
                self.next += 1;
            }
            return Some(self.io.now_us);
        }
        let opening = (3 * cores()).min(share.threads as usize);
        if share.thread as usize >= self.seat.control.opened_threads.load(Ordering::Acquire) + opening {
            return None;
        }
        let window = (self.seat.plan.window / opening).max(1);
        for _ in 0..OPENS_PER_TURN_MAX {
            if self.next == share.count {
                return self.all_begun();
            }
            if self.io.in_flight >= window {
                return None;
            }
            self.io.now_us = self.seat.clock.now_us();
            self.begin(self.next, self.io.now_us);
            self.next += 1;
        }
        Some(self.io.now_us)
    }

    /// Tells the threads that wait for their turn.
    fn all_begun(&mut self) -> Option<u64> {
        if !std::mem::replace(&mut self.told_opened, true) {
            self.seat.control.opened_threads.fetch_add(1, Ordering::AcqRel);
            self.seat.wakes.iter().for_each(|wake| wake.wake());
        }
        None
    }

    /// Cuts the share that the main thread asked for.
    fn cut(&mut self) {
        let cuts = self.seat.control.cuts.load(Ordering::Acquire);
        if cuts == self.cuts {
            return;
        }
        self.cuts = cuts;
        let percent = self.seat.control.cut_percent.load(Ordering::Acquire);
        for index in 0..self.seat.share.count {
            if self.io.is_ready(index) && is_cut(self.seat.share.first + index, cuts, percent) {
                self.io.close(index);
                self.io.sample.cut += 1;
                self.io.conns[index as usize].begun_us = self.io.now_us;
                self.retries.push(Reverse((self.io.now_us, index)));
            }
        }
        self.io.sample.cuts_done += 1;
    }

    /// How late this turn is at what it was to wake for.
    fn note_lag(&mut self, due: Option<u64>) {
        let slept_us = self.io.now_us;
        self.io.now_us = self.seat.clock.now_us();
        if let Some(due) = due.filter(|due| *due > slept_us && *due <= self.io.now_us) {
            self.io.sample.lag.saturating_record(self.io.now_us - due);
        }
    }

    fn open_again(&mut self) -> Option<u64> {
        let window = (self.seat.plan.window / self.seat.share.threads as usize).max(OPENS_PER_TURN_MAX);
        let mut begun = 0;
        while let Some(Reverse((due, index))) = self.retries.peek().copied() {
            if due > self.io.now_us {
                return Some(due);
            }
            // A whole share that comes back is let in as the window says, and answers are looked after in between.
            begun += 1;
            if begun > OPENS_PER_TURN_MAX {
                return Some(self.io.now_us);
            }
            if self.seat.plan.rate.is_none() && self.io.in_flight >= window {
                return None;
            }
            self.retries.pop();
            self.io.now_us = self.seat.clock.now_us();
            // Whoever was told to come back has waited since it was first begun.
            let since_us = self.io.conns[index as usize].begun_us;
            self.begin(index, if since_us > 0 { since_us } else { self.io.now_us });
        }
        None
    }

    fn lose_patience(&mut self) -> Option<u64> {
        while let Some((until, index, epoch)) = self.patience.front().copied() {
            let conn = &self.io.conns[index as usize];
            let waits = conn.epoch == epoch && conn.in_flight();
            if waits && until > self.io.now_us {
                return Some(until);
            }
            self.patience.pop_front();
            if waits {
                self.io.broken.push((index, Fault::Timeout));
            }
        }
        None
    }

    fn begin(&mut self, index: u32, due_us: u64) {
        let number = self.seat.share.first + index;
        let targets = &self.seat.plan.targets;
        let target = targets[number as usize % targets.len()];
        let called_us = self.io.now_us;
        let connected = sys::connect(self.seat.sources.of(number), target, self.seat.plan.prompt);
        let conn = &mut self.io.conns[index as usize];
        conn.epoch = conn.epoch.wrapping_add(1);
        conn.begun_us = due_us;
        conn.late_us = called_us.saturating_sub(due_us).min(u64::from(u32::MAX)) as u32;
        conn.phase = Phase::Connecting;
        self.io.in_flight += 1;
        self.io.sample.begun += 1;
        let patience_us = called_us + self.seat.plan.ready_ms_max * 1_000;
        self.patience.push_back((patience_us, index, conn.epoch));
        match connected {
            Ok(fd) => {
                conn.fd = Some(fd);
                self.greet(index, called_us, true);
            }
            Err(error) => self.io.broken.push((index, Fault::Io(error))),
        }
    }

    /// Says hello. On loopback the handshake is done when connect() returns, so it is tried at once; a write, even of
    /// nothing, tells whether it is.
    fn greet(&mut self, index: u32, called_us: u64, fresh: bool) {
        let conn = &mut self.io.conns[index as usize];
        let Some(fd) = &conn.fd else { return };
        self.greeting.clear();
        self.mode.greet(index, u64::from(conn.epoch), &mut self.greeting);
        let token = conn.token(index);
        let watch = |interest| match fresh {
            true => self.io.epoll.add(fd, token, interest),
            false => self.io.epoll.modify(fd, token, interest),
        };
        let result = match sys::write(fd, &self.greeting) {
            Ok(sent) if sent == self.greeting.len() => watch(Interest::Read).map(|()| true),
            Ok(sent) => {
                self.io.outs.insert(index, self.greeting.split_off(sent));
                watch(Interest::ReadWrite).map(|()| true)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => watch(Interest::Write).map(|()| false),
            Err(error) => Err(error),
        };
        match result {
            Ok(true) => {
                conn.phase = Phase::Greeted;
                self.io.now_us = self.seat.clock.now_us();
                self.io.sample.made += 1;
                self.io.sample.connect.saturating_record(self.io.now_us.saturating_sub(called_us));
                if self.mode.ready_at_once() {
                    self.io.ready(index);
                }
            }
            Ok(false) => {}
            Err(error) => self.io.broken.push((index, Fault::Io(error))),
        }
    }

    fn handle(&mut self, event: &Event) {
        let (index, epoch) = split(event.token());
        if index >= self.seat.share.count {
            return; // a wake-up or the timer
        }
        let conn = &self.io.conns[index as usize];
        let Some(fd) = conn.fd.as_ref().filter(|_| conn.epoch == epoch) else { return };
        if conn.phase == Phase::Connecting {
            match sys::take_error(fd) {
                // Since the call: what was late before it is in the login's time.
                Ok(()) => self.greet(index, conn.begun_us + u64::from(conn.late_us), false),
                Err(error) => self.io.broken.push((index, Fault::Io(error))),
            }
            return;
        }
        if event.writable() {
            self.io.flush(index);
        }
        if event.readable() || event.broken() {
            self.read(index);
        }
    }

    fn read(&mut self, index: u32) {
        loop {
            let Some(fd) = &self.io.conns[index as usize].fd else { return };
            let got = match sys::read(fd, &mut self.read_buffer) {
                Ok(0) => return self.io.broken.push((index, Fault::Closed)),
                Ok(got) => got,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => return self.io.broken.push((index, Fault::Io(error))),
            };
            let bytes = &self.read_buffer[..got];
            let tail = if self.io.tails.is_empty() { None } else { self.io.tails.remove(&index) };
            let used = match tail {
                None => self.mode.receive(index, bytes, &mut self.io).map(|used| bytes[used..].to_vec()),
                Some(mut tail) => {
                    tail.extend_from_slice(bytes);
                    self.mode.receive(index, &tail, &mut self.io).map(|used| tail.split_off(used))
                }
            };
            match used {
                Ok(rest) if rest.is_empty() => {}
                Ok(rest) => drop(self.io.tails.insert(index, rest)),
                Err(fault) => return self.io.broken.push((index, fault)),
            }
            if got < READ_BYTES {
                return;
            }
        }
    }

    /// Closes what was found broken, counts it, and asks the mode whether to try again.
    fn bury(&mut self) {
        while let Some((index, fault)) = self.io.broken.pop() {
            let Some(was) = self.io.close(index) else { continue };
            let was_ready = was == Phase::Ready;
            let name = fault.name();
            self.io.sample.fault(if was_ready { format!("dropped_{name}") } else { name });
            self.io.sample.dropped += u64::from(was_ready);
            if was_ready {
                self.io.conns[index as usize].begun_us = 0;
            }
            match self.mode.lost(index, &fault, &mut self.io) {
                Some(wait_ms) => {
                    self.io.sample.retried += u64::from(!was_ready);
                    self.retries.push(Reverse((self.io.now_us + wait_ms * 1_000, index)));
                }
                None => {
                    self.io.sample.failed += u64::from(!was_ready);
                    self.io.conns[index as usize].phase = Phase::Dead;
                }
            }
        }
    }

    /// A few times a second, if there is something to say. When next.
    fn send_sample(&mut self) -> Option<u64> {
        if self.io.sample.is_empty() {
            return None;
        }
        let due = self.sampled_us + SAMPLE_EVERY_US;
        if due > self.io.now_us {
            return Some(due);
        }
        self.sampled_us = self.io.now_us;
        // A main thread that is behind gets more in one later.
        match self.seat.samples.try_send(std::mem::take(&mut self.io.sample)) {
            Ok(()) => None,
            Err(refused) => {
                self.io.sample = refused.into_inner();
                Some(self.sampled_us + SAMPLE_EVERY_US)
            }
        }
    }

    /// Sets the timer to the next due time. epoll's own timeout counts in milliseconds, which would make every open-loop
    /// send up to one late.
    fn arm(&mut self, due: Option<u64>) -> Option<Duration> {
        let due = due?;
        let now = self.seat.clock.now_us();
        if due <= now {
            return Some(Duration::ZERO);
        }
        if due - now > FAR_US {
            return Some(Duration::from_micros(due - now - FAR_US / 2));
        }
        if due != self.armed_us {
            let wait = Expiration::OneShot(TimeSpec::from_duration(Duration::from_micros(due - now)));
            if self.timer.set(wait, TimerSetTimeFlags::empty()).is_err() {
                return Some(Duration::from_millis(1));
            }
            self.armed_us = due;
        }
        None
    }

    fn tear_down(&mut self) {
        for index in 0..self.seat.share.count {
            let flying = self.io.conns[index as usize].in_flight();
            if self.io.close(index).is_some() && flying {
                self.io.sample.fault(Fault::Unfinished.name());
                self.io.sample.failed += 1;
            }
        }
        // The main thread may be gone (an error elsewhere); then nobody wants to know.
        let _ = self.seat.samples.send(std::mem::take(&mut self.io.sample));
    }
}

/// Parts from the process's fd table and makes what a thread needs in its own.
fn set_up(seat: &Seat) -> io::Result<(Io, TimerFd)> {
    sys::unshare_files()?;
    if !seat.plan.prompt {
        sys::schedule_batch()?;
    }
    let epoll = Epoll::new()?;
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?;
    epoll.add(&seat.wakes[seat.share.thread as usize], TOKEN_WAKE, Interest::Wake)?;
    epoll.add(&timer.as_fd(), TOKEN_WAKE, Interest::Wake)?;
    let mut conns = Vec::new();
    conns.resize_with(seat.share.count as usize, Conn::default);
    let io = Io {
        conns,
        epoll,
        tails: HashMap::new(),
        outs: HashMap::new(),
        deaf: HashSet::new(),
        broken: Vec::new(),
        in_flight: 0,
        now_us: seat.clock.now_us(),
        sample: Sample::default(),
        clock: seat.clock,
        control: seat.control.clone(),
    };
    Ok((io, timer))
}

/// Whether a connection is in the share of a cut; each cut takes another one.
fn is_cut(number: u32, cut: u32, percent: u32) -> bool {
    let mut mixed = number ^ cut.wrapping_mul(0x9E37_79B9);
    mixed = (mixed ^ (mixed >> 16)).wrapping_mul(0x7FEB_352D);
    mixed = (mixed ^ (mixed >> 15)).wrapping_mul(0x846C_A68B);
    mixed ^= mixed >> 16;
    (u64::from(mixed) * 100) >> 32 < u64::from(percent)
}

fn earlier(one: Option<u64>, other: Option<u64>) -> Option<u64> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.min(other)),
        (one, other) => one.or(other),
    }
}

/// No connection's index.
const TOKEN_WAKE: u64 = u32::MAX as u64;
const EVENTS_PER_TURN_MAX: usize = 512;
/// Then answers are looked after again.
const OPENS_PER_TURN_MAX: usize = 64;
/// One frame of the longest kind, and more.
const READ_BYTES: usize = 128 * 1024;
const SAMPLE_EVERY_US: u64 = 200_000;
/// What is due later than this needs no timer yet: epoll's own timeout wakes early enough to set one.
const FAR_US: u64 = 20_000;

#[cfg(test)]
mod tests {
    use super::is_cut;

    #[test]
    fn a_cut_takes_its_share_and_each_another() {
        for percent in [0, 10, 50, 100] {
            let taken = (0..100_000).filter(|number| is_cut(*number, 1, percent)).count();
            assert!(taken.abs_diff(1_000 * percent as usize) < 1_500, "{percent}: {taken}");
        }
        let both = (0..100_000).filter(|number| is_cut(*number, 1, 50) && is_cut(*number, 2, 50)).count();
        assert!((10_000..40_000).contains(&both), "{both}");
    }
}
