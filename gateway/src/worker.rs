//! One worker: a thread with its own fd table, listener, epoll instance and connections. This file is the loop; what a
//! turn does with bytes in is in `receive`, with bytes out in `deliver`, by the clock in `sweep`.
//!
//! A turn, in this order: frames of connections that were there before, deliveries from the bridge, deadlines, the
//! batch up, writes, and only then new connections. So a storm of arrivals waits for the living, not the reverse.
//!
//! Trap: nothing is closed in the middle of handling it by its place alone; every use of a [`Place`] looks it up again,
//! because anything may have been closed since.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::admission::Admission;
use crate::batch::{Down, Ticket, UpBatch, UpFrame};
use crate::burst::Burst;
use crate::config::Config;
use crate::connection::Stage;
use crate::door::Door;
use crate::early_end::EarlyEnds;
use crate::early_leaver::EarlyLeavers;
use crate::everybody::{Drain, Resync};
use crate::expiry::Expiry;
use crate::id::{self, Place};
use crate::metrics::{Metrics, Why, WorkerStats};
use crate::send_queue::QueuePool;
use crate::sys::{self, Epoll, Event, Fd, Interest};
use crate::table::Table;
use crate::tail::Tails;
use crate::up::UP_WAIT;
use crate::wake::{Starved, Wake};
use bytes::BytesMut;
use crossbeam_channel::{Receiver, Sender};
use proto::wire::Code;

/// What a worker shares with the bridge and the main thread.
#[derive(Clone)]
pub struct Shared {
    /// Every limit.
    pub config: Arc<Config>,
    /// Counters of connections.
    pub admission: Arc<Admission>,
    /// The burst budget.
    pub burst: Arc<Burst>,
    /// Metrics.
    pub metrics: Metrics,
    /// Batches up, of all workers.
    pub up: Sender<UpBatch>,
    /// Wakes the bridge.
    pub up_wake: Wake,
}

/// One worker's inbox, as its own side sees it.
pub struct Inbox {
    /// Batches down.
    pub down: Receiver<Down>,
    /// Wakes this worker.
    pub wake: Wake,
    /// The bridge waits for room in `down`.
    pub starved: Starved,
}

/// A delivery whose sender waits for the news that it is written.
pub(crate) struct Part {
    /// It is when so many of [`Worker::bulk`] are.
    pub upto: u64,
    pub ticket: Ticket,
    pub gone: Vec<proto::link::Gone>,
}

/// How a worker ended its loop.
type Ended = io::Result<()>;

pub(crate) struct Worker {
    pub(crate) index: u8,
    pub(crate) incarnation: u32,
    pub(crate) shared: Shared,
    pub(crate) epoll: Epoll,
    pub(crate) listener: Option<Fd>,
    pub(crate) door: Door,
    pub(crate) table: Table,
    pub(crate) queues: QueuePool,
    pub(crate) tails: Tails,
    /// What is read into, see [`Worker::lend_buffer`].
    pub(crate) buffer: Vec<u8>,
    /// It was lent in the last second.
    pub(crate) buffer_used: bool,
    pub(crate) batch: UpBatch,
    pub(crate) dirty: VecDeque<Place>,
    /// The same of what is to be written later: parts of what goes to many, and what nothing rests on.
    pub(crate) bulk: VecDeque<Place>,
    /// Of all that ever stood in `bulk`, how many stand there no more.
    pub(crate) bulk_written: u64,
    /// What is awaited and not written, in the order of `bulk`.
    pub(crate) parts: VecDeque<Part>,
    pub(crate) logins: Expiry,
    pub(crate) stalls: Expiry,
    pub(crate) lingers: Expiry,
    pub(crate) early_ends: EarlyEnds,
    pub(crate) early_leavers: EarlyLeavers,
    pub(crate) now_ms: u64,
    pub(crate) login_number: u64,
    pub(crate) inbox: Inbox,
    started: Instant,
    /// As `started`, but goes on while this process is paused: the clock of what ends by itself.
    pub(crate) born: Instant,
    pub(crate) swept_tick: u8,
    /// The bridge gave the last batch back: nothing more is read until it takes it.
    pub(crate) held_back: bool,
    /// Something in the batch is waited for.
    pub(crate) urgent: bool,
    /// Since when the batch waits with nothing in it that anybody waits for.
    pub(crate) idle_since_ms: Option<u64>,
    /// The bridge keeps up, so what has just arrived may be read.
    pub(crate) reads_arrivals: bool,
    /// Thread CPU time at the end of the last turn.
    cpu_used: Duration,
    /// What this turn has read, and what the batch held before. A frame counts with what it takes beside its body, here and as an answer:
    /// many small ones are as much as one large one.
    pub(crate) turn_bytes: usize,
    /// The pongs of the connection that is being read, which leave together.
    pub(crate) pongs: BytesMut,
    /// When epoll was last left.
    turn_at: Instant,
    /// Who was found silent for too long and is not closed yet.
    pub(crate) idle: VecDeque<Place>,
    /// Where in the list of ready connections the next turn begins, when the last one had read enough before its end.
    first_event: usize,
    /// What the last batch came to, which the next may come to as well.
    pub(crate) batch_frames: usize,
    pub(crate) batch_bytes: usize,
    /// Deliveries are left in the inbox.
    pub(crate) down_waiting: bool,
    /// The list of ready connections had no room for more.
    events_full: bool,
    /// What a burst has left behind was given back in this turn.
    pub(crate) rested: bool,
    /// What everybody here is being told.
    pub(crate) drain: Option<Drain>,
    pub(crate) resync: Option<Resync>,
}

/// Epoll tokens beside places, which are below 2^32.
pub(crate) const LISTENER: u64 = u64::MAX;
const WAKE: u64 = u64::MAX - 1;

/// Late writes beyond which a worker yields its core before a turn that has nothing else: several turns of them.
const YIELD_BULK_MIN: usize = 64;

/// What a frame costs beside its body: a record on its way up, and an answer that refuses it.
pub(crate) const FRAME_OVERHEAD_BYTES: usize = 256;

/// Ready connections that a turn is told of while there are few; the list grows with them, and is short again a second later.
const EVENTS_IN_CALM: usize = 32;

impl Worker {
    /// Binds the listener and makes everything that lives in this thread's fd table. Boxed, because a thread's stack keeps what
    /// it ever touched.
    pub(crate) fn new(
        index: u8,
        incarnation: u32,
        listen: SocketAddr,
        connections_max: usize,
        shared: Shared,
        inbox: Inbox,
    ) -> io::Result<Box<Worker>> {
        let limits = &shared.config.limits;
        let epoll = Epoll::new()?;
        let listener =
            sys::listen(listen, shared.config.listen.backlog, shared.config.listen.send_buffer_bytes)?;
        if limits.unacknowledged_ms_max > 0 {
            // Every accepted socket inherits it, for nothing.
            sys::set_user_timeout(&listener, Duration::from_millis(limits.unacknowledged_ms_max))?;
        }
        epoll.add(&listener, LISTENER, Interest::Read)?;
        epoll.add(&inbox.wake.eventfd(), WAKE, Interest::Wake)?;
        Ok(Box::new(Worker {
            index,
            incarnation,
            epoll,
            listener: Some(listener),
            door: Door::new(&shared.config.listen.ipconf_url)?,
            table: Table::new(connections_max),
            queues: QueuePool::new(shared.burst.clone()),
            tails: Tails::new(shared.burst.clone()),
            buffer: Vec::new(),
            buffer_used: false,
            batch: UpBatch::default(),
            dirty: VecDeque::new(),
            bulk: VecDeque::new(),
            bulk_written: 0,
            parts: VecDeque::new(),
            logins: Expiry::new(limits.login_ms_max),
            stalls: Expiry::new(limits.stalled_ms_max),
            lingers: Expiry::new(limits.linger_ms_max),
            early_ends: EarlyEnds::default(),
            early_leavers: EarlyLeavers::default(),
            now_ms: 0,
            login_number: 0,
            inbox,
            started: Instant::now(),
            born: Instant::now(),
            swept_tick: 0,
            held_back: false,
            urgent: false,
            idle_since_ms: None,
            reads_arrivals: false,
            cpu_used: Duration::ZERO,
            turn_bytes: 0,
            pongs: BytesMut::new(),
            turn_at: Instant::now(),
            idle: VecDeque::new(),
            first_event: 0,
            batch_frames: 0,
            batch_bytes: 0,
            down_waiting: false,
            events_full: false,
            rested: false,
            drain: None,
            resync: None,
            shared,
        }))
    }

    /// The address the listener got.
    pub(crate) fn address(&self) -> io::Result<SocketAddr> {
        self.listener.as_ref().map_or_else(|| Err(io::ErrorKind::NotConnected.into()), sys::local_address)
    }

    /// Turns until told to stop.
    pub(crate) fn run(mut self: Box<Self>, stack: &sys::Stack) -> Ended {
        if self.shared.config.workers.batch_scheduling
            && let Err(error) = sys::schedule_batch()
        {
            tracing::warn!(worker = self.index, %error, "no SCHED_BATCH: expect fewer logins per second in a storm");
        }
        self.cpu_used = sys::thread_cpu_time();
        let events_max = self.shared.config.workers.events_per_turn_max;
        let calm = EVENTS_IN_CALM.min(events_max);
        let mut events = sys::event_buffer(calm);
        while self.turn(&mut events)? {
            let mut room = events.len();
            if self.events_full {
                room = (2 * room).min(events_max);
            } else if std::mem::take(&mut self.rested) {
                stack.give_back();
                room = calm;
            }
            if room != events.len() {
                events = sys::event_buffer(room);
            }
        }
        Ok(())
    }

    fn turn(&mut self, events: &mut [Event]) -> io::Result<bool> {
        if self.bulk.len() > YIELD_BULK_MIN && self.dirty.is_empty() && !self.down_waiting {
            // A part of what goes to many can wait for whoever else is ready on this core. A few receipts are not worth it: whoever yields
            // stands behind the others for a while, and so does what comes meanwhile.
            std::thread::yield_now();
        }
        let timeout = self.timeout();
        let room = events.len();
        let ready = self.epoll.wait(events, Some(timeout))?;
        self.events_full = ready.len() == room;
        // A process that was paused must not hold its own absence against its clients, wherever in its turn it was.
        let now = Instant::now();
        let overslept = (now - std::mem::replace(&mut self.turn_at, now)).saturating_sub(timeout);
        if overslept > Duration::from_secs(1) {
            self.started += overslept;
        }
        self.now_ms = (now - self.started).as_millis() as u64;
        self.turn_bytes = self.batch.bodies.len() + self.batch.frames.len() * FRAME_OVERHEAD_BYTES;
        let arrivals = self.ready(ready);
        if self.down_waiting && !self.take_deliveries() {
            self.stop();
            return Ok(false);
        }
        self.continue_drain();
        self.continue_resync();
        self.expire();
        self.send_up();
        self.flush();
        self.tell_placed();
        if self.lets_in(arrivals) {
            self.reads_arrivals = !self.held_back;
            self.accept();
            self.send_up();
        }
        self.publish();
        Ok(true)
    }

    /// Handles what epoll has told; whether somebody waits at the listener.
    fn ready(&mut self, events: &[Event]) -> bool {
        let mut arrivals = false;
        let mut choked = self.held_back;
        // Epoll lists in turn whoever is ready, so those that were left out are where we stopped.
        let (before, behind) = events.split_at(std::mem::take(&mut self.first_event).min(events.len()));
        for (index, event) in behind.iter().chain(before).enumerate() {
            match event.token() {
                WAKE => self.down_waiting = true,
                LISTENER => arrivals = true,
                token => self.connection_ready(Place::from_bits(token as u32), event, choked),
            }
            if !choked && self.has_read_enough() {
                choked = true;
                self.first_event = (before.len() + index + 1) % events.len();
            }
        }
        arrivals
    }

    /// Whether a turn has read as much as it may.
    pub(crate) fn has_read_enough(&self) -> bool {
        self.turn_bytes >= self.shared.config.workers.read_bytes_per_turn_max
    }

    fn connection_ready(&mut self, place: Place, event: &Event, choked: bool) {
        if event.writable() {
            self.writable(place);
        }
        if !choked && (event.readable() || event.broken()) {
            self.receive(place);
        }
    }

    fn timeout(&self) -> Duration {
        let is_written = self.dirty.is_empty() && self.bulk.is_empty();
        if self.down_waiting || !is_written || self.drain.is_some() || !self.idle.is_empty() {
            return Duration::ZERO;
        }
        if self.held_back {
            return UP_WAIT;
        }
        let next_tick_ms = (self.now_ms / 1000 + 1) * 1000;
        let batch_ms = self.news_due_ms();
        let door_ms = self.door.opens_ms();
        let resync_ms = self.resync.as_ref().map(|resync| resync.next_ms);
        let deadlines = [&self.logins, &self.stalls, &self.lingers].map(Expiry::next_ms);
        let next_ms = deadlines
            .into_iter()
            .chain([batch_ms, door_ms, resync_ms])
            .flatten()
            .fold(next_tick_ms, u64::min);
        Duration::from_millis(next_ms.saturating_sub(self.started.elapsed().as_millis() as u64))
    }

    /// The one buffer that is read into: a whole frame and as much of the next. It is given back with
    /// [`Worker::return_buffer`]; who has not read anything for a second has none.
    pub(crate) fn lend_buffer(&mut self) -> Vec<u8> {
        self.buffer_used = true;
        match std::mem::take(&mut self.buffer) {
            none if none.capacity() == 0 => Vec::with_capacity(2 * self.shared.config.limits.frame_bytes_max),
            buffer => buffer,
        }
    }

    pub(crate) fn return_buffer(&mut self, buffer: Vec<u8>) {
        self.buffer = buffer;
    }

    /// Tells everybody, closes everything, and lets state know whose connections are gone.
    fn stop(&mut self) {
        self.listener = None;
        let mut slot = 0;
        while let Some((places, next)) = self.table.places(slot, usize::MAX) {
            for place in places {
                self.refuse(place, Code::ShuttingDown);
                self.flush_one(place);
                self.close(place, None);
            }
            slot = next;
        }
        self.dirty.clear();
        self.bulk_written += self.bulk.drain(..).count() as u64;
        self.note_written();
        self.urgent = true;
        while !self.batch.is_empty() {
            self.send_up();
            if !self.batch.is_empty() {
                std::thread::park_timeout(UP_WAIT);
            }
        }
        self.publish();
    }

    fn publish(&mut self) {
        // All of a turn, what epoll cost included: asleep, a thread uses none, so one look a turn is enough.
        let cpu_used = sys::thread_cpu_time();
        let turn = cpu_used - std::mem::replace(&mut self.cpu_used, cpu_used);
        let stats = self.stats();
        stats.turn(turn);
        stats.connections.set(self.table.count() as u64);
        stats.queues.set(self.queues.count() as u64);
    }

    /// Takes a connection out and closes it. `why`: counted, unless it was counted when its closing began.
    pub(crate) fn close(&mut self, place: Place, why: Option<Why>) {
        let Some(connection) = self.table.remove(place) else { return };
        if let Some(why) = why {
            self.stats().closed(why);
        }
        if connection.queue != crate::connection::NONE {
            self.queues.give_back(connection.queue);
        }
        if connection.tail != crate::connection::NONE {
            self.tails.remove(connection.tail);
        }
        self.early_ends.forget(place);
        if connection.stage == Stage::LoggingIn || connection.stage == Stage::Closing && connection.user == 0
        {
            self.early_leavers.note(connection.binding, connection.address, self.now_ms);
        }
        self.shared.admission.leave(connection.address);
        if connection.user != 0 {
            self.stats().bound.set(self.stats().bound.get() - 1);
            self.urgent = true;
            self.batch.frames.push(UpFrame {
                connection: self.connection_id(place),
                user: connection.user,
                device: connection.device,
                binding: connection.binding,
                command: 0,
                body_bytes: 0,
            });
        }
        if self.door.is_shut() {
            // Its fd first: whoever waits outside needs one.
            drop(connection);
            self.resume_listener();
        }
    }

    pub(crate) fn connection_id(&self, place: Place) -> u64 {
        id::connection_id(self.incarnation, self.index, place)
    }

    pub(crate) fn tick(&self) -> u8 {
        (self.now_ms / 1000) as u8
    }

    pub(crate) fn stats(&self) -> &WorkerStats {
        &self.shared.metrics.workers[usize::from(self.index)]
    }
}

#[cfg(test)]
mod tests;
