//! Bytes out: placing deliveries, the send queues, one `writev` per connection and turn, and how connections end. On
//! the worker's thread.
//!
//! Trap: "slow" means that the socket did not take what we wrote, not that much is queued: a burst within one turn is
//! written before anybody is judged by it.

use bytes::Bytes;
use crossbeam_channel::TryRecvError;
use proto::wire::{self, Code};
use proto::{Command, frame};

use crate::batch::{Down, DownItem, Placed, Ticket};
use crate::connection::{Connection, NONE, Stage, flag};
use crate::id::{self, Place};
use crate::metrics::Why;
use crate::receive::refusal;
use crate::send_queue::Detached;
use crate::sys::{self, Interest};
use crate::worker::{Part, Worker};

impl Worker {
    /// Takes batches from the bridge until the writes of this turn are enough. `false`: told to stop.
    pub(crate) fn take_deliveries(&mut self) -> bool {
        self.inbox.wake.begin();
        self.down_waiting = false;
        // One at least: clients that keep us writing must not keep everybody else from getting anything.
        for taken in 0.. {
            let waiting = self.dirty.len() + self.bulk.len();
            if taken > 0 && waiting >= self.shared.config.workers.writes_per_turn_max {
                self.down_waiting = true;
                break;
            }
            match self.inbox.down.try_recv() {
                Ok(Down::Batch { items, ticket }) => self.place(items, ticket),
                Ok(Down::Drain { within_ms }) => self.begin_drain(within_ms),
                Ok(Down::Resync) => self.begin_resync(),
                // Without a bridge there is nobody to work for.
                Ok(Down::Stop) | Err(TryRecvError::Disconnected) => return false,
                Err(TryRecvError::Empty) => break,
            }
        }
        if self.inbox.starved.take() {
            self.shared.up_wake.wake();
        }
        true
    }

    /// Places what came together, and notes that for whoever sent it; of what is awaited when it is written.
    pub(crate) fn place(&mut self, items: Vec<DownItem>, ticket: Option<Ticket>) {
        let gone_before = self.batch.gone.len();
        for item in items {
            let (later, dirty_before) = (item.later, self.dirty.len());
            self.deliver(item);
            if later {
                self.postpone(dirty_before);
            }
        }
        let Some(ticket) = ticket else { return };
        if ticket.awaited {
            let upto = self.bulk_written + self.bulk.len() as u64;
            let gone = self.batch.gone.split_off(gone_before);
            self.parts.push_back(Part { upto, ticket, gone });
        } else {
            let gone = self.batch.gone.len() - gone_before;
            self.batch.placed.push(Placed { ticket, gone });
        }
    }

    /// Whoever is to be written to from this one on is written to behind everybody else.
    fn postpone(&mut self, from: usize) {
        for place in self.dirty.drain(from..) {
            let Some(connection) = self.table.get_mut(place) else { continue };
            connection.flags &= !flag::DIRTY;
            if !connection.has(flag::BULK) {
                connection.flags |= flag::BULK;
                self.bulk.push_back(place);
            }
        }
    }

    /// The news of parts of what goes to many, behind their writes and at once: the next ones wait for it.
    pub(crate) fn tell_placed(&mut self) {
        if self.note_written() {
            self.urgent = true;
            self.send_up();
        }
    }

    /// Puts what is awaited and written into the batch. Whether there was any.
    pub(crate) fn note_written(&mut self) -> bool {
        let mut any = false;
        while let Some(part) = self.parts.pop_front_if(|part| part.upto <= self.bulk_written) {
            self.batch.placed.push(Placed { ticket: part.ticket, gone: part.gone.len() });
            self.batch.gone.extend(part.gone);
            any = true;
        }
        any
    }

    /// Places one delivery, or notes that its connection is gone.
    pub(crate) fn deliver(&mut self, item: DownItem) {
        let place = id::place(item.connection);
        let ours = id::incarnation(item.connection) == self.incarnation
            && id::worker(item.connection) == usize::from(self.index);
        let there = ours && self.table.get_mut(place).is_some_and(|connection| accepts(connection, &item));
        if item.guess && ours {
            self.count_guess(place, item.login);
        }
        if !there {
            // A push that overtook the login's answer: the route is right, and the first Sync will show the message.
            let early = ours && self.table.get_mut(place).is_some_and(|c| c.stage == Stage::LoggingIn);
            return match (early, item.push) {
                (true, true) => self.stats().pushes_skipped.add(1),
                // Another server's answer to the same login was a better one.
                _ if ours
                    && item.close
                    && self.table.get_mut(place).is_some_and(|c| is_bound_by(c, &item)) => {}
                (true, false) if item.close && item.user != 0 && item.bind.is_none() => {
                    self.end_early(place, item)
                }
                _ => self.note_gone(&item),
            };
        }
        let mut end = None;
        if let Some(bind) = &item.bind
            && let Some(connection) = self.table.get_mut(place)
            && connection.stage == Stage::LoggingIn
        {
            connection.stage = Stage::Bound;
            connection.user = bind.user;
            connection.device = bind.device;
            connection.binding = bind.binding;
            self.stats().bound.set(self.stats().bound.get() + 1);
            let tick = self.tick();
            self.table.touch(place, tick);
            if bind.valid_ms > 0 {
                let until_s = self.end_s(bind.valid_ms);
                self.table.set_validity(place, until_s);
            }
            end = self.early_ends.take(place, bind.user);
        }
        self.enqueue(place, item.frames, item.push);
        if item.push && crpc::failpoint::due("gateway_after_push") {
            self.flush_one(place);
            crpc::failpoint::die();
        }
        if item.close {
            let is_closing = self.table.get_mut(place).is_none_or(|c| c.stage == Stage::Closing);
            if !is_closing {
                self.stats().closed(item.refused.map_or(Why::State, Why::Code));
            }
            self.begin_closing(place);
        }
        if let Some(end) = end {
            self.deliver(end);
        }
    }

    /// A login was refused that may have been a guess; whoever tried may have gone on, or away.
    fn count_guess(&mut self, place: Place, login: u64) {
        let still =
            self.table.get_mut(place).filter(|c| c.user == 0 && c.binding == login).map(|c| c.address);
        if let Some(address) = still.or_else(|| self.early_leavers.take(login)) {
            self.shared.admission.guessed(address);
        }
    }

    /// The second, of the clock that goes on, in which so many milliseconds are over.
    pub(crate) fn end_s(&self, left_ms: u64) -> u32 {
        let end_ms = (self.born.elapsed().as_millis() as u64).saturating_add(left_ms);
        u32::try_from(end_ms.div_ceil(1_000)).unwrap_or(u32::MAX - 1)
    }

    /// The end of a login whose answer is still on its way waits for it.
    fn end_early(&mut self, place: Place, end: DownItem) {
        if self.early_ends.keep(place, end).is_err() {
            self.close(place, Some(Why::State));
        }
    }

    fn note_gone(&mut self, item: &DownItem) {
        self.stats().gone.add(1);
        if item.push || item.bind.is_some() {
            let bind = item.bind.unwrap_or_default();
            self.batch.gone.push(proto::link::Gone {
                connection: item.connection,
                user: item.user.max(bind.user),
                device: bind.device,
                binding: bind.binding,
                pushed: item.push,
            });
        }
    }

    /// Appends whole frames to a connection's queue; they leave at the end of the turn.
    pub(crate) fn enqueue(&mut self, place: Place, frames: Bytes, push: bool) {
        let limits = &self.shared.config.limits;
        let (soft, hard) = (limits.queue_bytes_soft, limits.queue_bytes_hard);
        let Some(connection) = self.table.get_mut(place) else { return };
        if connection.stage == Stage::Closing || frames.is_empty() {
            return;
        }
        if connection.queue == NONE {
            connection.queue = self.queues.take();
        }
        let blocked = connection.has(flag::BLOCKED);
        let bytes = frames.len() as u64;
        let is_skipped = blocked
            && push
            && self.queues.get_mut(connection.queue).bytes() >= soft.min(self.queues.share_bytes());
        if is_skipped || !self.queues.push(connection.queue, frames, push) {
            // What is skipped is found by the Sync that a Resync asks for; an answer would never come again.
            return if push { self.owe_resync(place) } else { self.no_room_to_wait(place) };
        }
        let waiting = self.queues.get_mut(connection.queue).bytes();
        if blocked && waiting > hard {
            return self.close_slow(place);
        }
        if blocked && waiting > soft && !connection.has(flag::PARKED) {
            connection.flags |= flag::PARKED;
            self.watch(place);
        }
        let stats = self.stats();
        stats.frames_out.add(1);
        stats.bytes_out.add(bytes);
        if blocked {
            return;
        }
        self.mark_dirty(place);
        if waiting > soft {
            self.flush_one(place);
        }
    }

    fn owe_resync(&mut self, place: Place) {
        let Some(connection) = self.table.get_mut(place) else { return };
        let is_new = !connection.has(flag::RESYNC);
        connection.flags |= flag::RESYNC;
        self.stats().pushes_skipped.add(1);
        self.stats().slow_readers.add(u64::from(is_new));
    }

    /// The burst budget has no room for what this client does not read.
    fn no_room_to_wait(&mut self, place: Place) {
        self.stats().burst_closed.add(1);
        self.close_slow(place);
    }

    /// Too much waits for this client. All that has not begun to leave is given up at once; in its place stands the reason,
    /// for a client that reads on within the time that refused ones have.
    fn close_slow(&mut self, place: Place) {
        let Some(connection) = self.table.get_mut(place) else { return };
        if connection.stage == Stage::Closing {
            return self.close(place, None);
        }
        let (queue, link) = (connection.queue, &self.shared.config.link);
        let error =
            wire::Error { closing: true, retry_after_ms: link.retry_after_ms, ..refusal(Code::SlowReader) };
        self.stats().closed(Why::Code(Code::SlowReader));
        let can_wait = self.shared.config.limits.linger_ms_max > 0;
        if !can_wait || !self.queues.end_with(queue, &frame::encode(Command::Error, &error)) {
            return self.close(place, None);
        }
        self.begin_closing(place);
        if let Some(connection) = self.table.get_mut(place) {
            connection.flags |= flag::LAST;
            self.lingers.start(place, self.now_ms);
            self.watch(place);
        }
    }

    fn mark_dirty(&mut self, place: Place) {
        if let Some(connection) = self.table.get_mut(place)
            && !connection.has(flag::DIRTY)
        {
            connection.flags |= flag::DIRTY;
            self.dirty.push_back(place);
        }
    }

    /// Writes to the connections of this turn, at most so many; the others are first in the next. Few of what is
    /// to be written later, so that whoever sends or is sent something meanwhile does not wait for its end.
    pub(crate) fn flush(&mut self) {
        let mut left = self.shared.config.workers.writes_per_turn_max;
        while left > 0
            && let Some(place) = self.dirty.pop_front()
        {
            self.flush_one(place);
            left -= 1;
        }
        for _ in 0..left.clamp(1, BULK_WRITES_PER_TURN) {
            let Some(place) = self.bulk.pop_front() else { return };
            self.bulk_written += 1;
            self.flush_one(place);
        }
    }

    pub(crate) fn flush_one(&mut self, place: Place) {
        let now_ms = self.now_ms;
        let Some(connection) = self.table.get_mut(place) else { return };
        connection.flags &= !(flag::DIRTY | flag::BULK);
        if connection.queue == NONE {
            return self.written_out(place);
        }
        if connection.has(flag::BLOCKED) {
            return;
        }
        let queue = self.queues.get_mut(connection.queue);
        match queue.write_to(&connection.fd) {
            Ok(true) => {
                let index = std::mem::replace(&mut connection.queue, NONE);
                self.queues.give_back(index);
                self.written_out(place);
            }
            Ok(false) => {
                queue.progress_ms = now_ms;
                connection.flags |= flag::BLOCKED;
                match self.queues.detach(connection.queue) {
                    Detached::Whole => {}
                    Detached::WithoutPushes => self.owe_resync(place),
                    Detached::NoRoom => return self.no_room_to_wait(place),
                }
                let Some(connection) = self.table.get_mut(place) else { return };
                if !connection.has(flag::STALL) {
                    connection.flags |= flag::STALL;
                    self.stalls.start(place, now_ms);
                }
                self.watch(place);
            }
            Err(_) => self.close(place, Some(Why::Socket)),
        }
    }

    /// The socket takes bytes again.
    pub(crate) fn writable(&mut self, place: Place) {
        let low = self.shared.config.limits.queue_bytes_soft.min(self.queues.share_bytes()) / 2;
        let now_ms = self.now_ms;
        let Some(connection) = self.table.get_mut(place) else { return };
        if !connection.has(flag::BLOCKED) {
            return;
        }
        let queue = self.queues.get_mut(connection.queue);
        match queue.write_to(&connection.fd) {
            Ok(all_gone) => {
                queue.progress_ms = now_ms;
                let waiting = queue.bytes();
                if all_gone {
                    connection.flags &= !flag::BLOCKED;
                    let index = std::mem::replace(&mut connection.queue, NONE);
                    self.queues.give_back(index);
                }
                if waiting <= low {
                    self.caught_up(place);
                }
                self.watch(place);
                if all_gone {
                    self.written_out(place);
                }
            }
            Err(_) => self.close(place, Some(Why::Socket)),
        }
    }

    /// Below the low mark: reads go on, and what was skipped is owed as a Resync.
    fn caught_up(&mut self, place: Place) {
        let tick = self.tick();
        let Some(connection) = self.table.get_mut(place) else { return };
        let owed = connection.flags;
        connection.flags &= !(flag::RESYNC | flag::PARKED);
        if owed & flag::RESYNC != 0 {
            self.stats().resyncs.add(1);
            self.enqueue(place, frame::encode(Command::Resync, &wire::Resync {}), false);
        }
        if owed & flag::PARKED != 0 {
            // It may have pinged into a socket that nobody read.
            self.table.touch(place, tick);
            self.enqueue(place, frame::encode(Command::Pong, &wire::Pong::default()), false);
        }
    }

    /// The queue is empty. If that was the end, say so to the peer and give it a moment to read it.
    fn written_out(&mut self, place: Place) {
        let now_ms = self.now_ms;
        let Some(connection) = self.table.get_mut(place) else { return };
        if connection.stage == Stage::Closing && !connection.has(flag::SHUT) {
            connection.flags |= flag::SHUT;
            if sys::shutdown_write(&connection.fd).is_err() || self.shared.config.limits.linger_ms_max == 0 {
                return self.close(place, None);
            }
            self.lingers.start(place, now_ms);
        }
    }

    /// Tells the client why, and ends the connection behind that.
    pub(crate) fn refuse(&mut self, place: Place, code: Code) {
        if self.table.get_mut(place).is_none_or(|connection| connection.stage == Stage::Closing) {
            return;
        }
        self.refuse_with(place, refusal(code));
    }

    /// The same with more to say.
    pub(crate) fn refuse_with(&mut self, place: Place, error: wire::Error) {
        // What it asked before is answered before.
        self.flush_pongs(place);
        self.stats().closed(Why::Code(error.code()));
        let error = wire::Error { closing: true, ..error };
        self.enqueue(place, frame::encode(Command::Error, &error), false);
        self.begin_closing(place);
    }

    fn begin_closing(&mut self, place: Place) {
        let Some(connection) = self.table.get_mut(place) else { return };
        connection.stage = Stage::Closing;
        let index = std::mem::replace(&mut connection.tail, NONE);
        let parked = connection.has(flag::PARKED);
        connection.flags &= !flag::PARKED;
        if index != NONE {
            self.tails.remove(index);
        }
        if parked {
            self.watch(place);
        }
        self.mark_dirty(place);
    }

    pub(crate) fn stall_due(&mut self, place: Place) {
        let Some(connection) = self.table.get_mut(place) else { return };
        let since_ms = self.queues.get_mut(connection.queue).progress_ms;
        if self.now_ms >= since_ms + self.shared.config.limits.stalled_ms_max {
            let why = (connection.stage != Stage::Closing).then_some(Why::Code(Code::SlowReader));
            self.close(place, why);
        } else {
            self.stalls.start(place, since_ms);
        }
    }

    /// Brings epoll's interest in line with the flags.
    fn watch(&mut self, place: Place) {
        let Some(connection) = self.table.get_mut(place) else { return };
        let interest = match (connection.has(flag::PARKED), connection.has(flag::BLOCKED)) {
            (false, false) => Interest::Read,
            (false, true) => Interest::ReadWrite,
            (true, true) => Interest::Write,
            (true, false) => Interest::Nothing,
        };
        if self.epoll.modify(&connection.fd, u64::from(place.bits()), interest).is_err() {
            self.close(place, Some(Why::Socket));
        }
    }
}

/// A quarter of a millisecond, where a write costs 15 µs.
const BULK_WRITES_PER_TURN: usize = 16;

/// Whether this delivery is for who stands at this place now.
/// Whether it is the login that this answers by which the connection is bound.
fn is_bound_by(connection: &Connection, item: &DownItem) -> bool {
    let of = (connection.user, connection.binding);
    connection.stage == Stage::Bound && item.bind.is_some_and(|bind| (bind.user, bind.binding) == of)
}

fn accepts(connection: &Connection, item: &DownItem) -> bool {
    match (connection.stage, &item.bind) {
        (Stage::Closing, _) => false,
        // A login is answered while it waits. Answered twice (a replay after a broken stream), the second is the same.
        (Stage::LoggingIn, Some(_)) => item.login == connection.binding,
        (Stage::Bound, Some(_)) => !item.close && is_bound_by(connection, item),
        (Stage::Fresh, Some(_)) => false,
        (Stage::Bound, None) => connection.user == item.user,
        (Stage::LoggingIn, None) => item.user == 0 && item.login == connection.binding,
        (Stage::Fresh, None) => false,
    }
}
