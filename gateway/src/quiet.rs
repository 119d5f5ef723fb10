//! Connections of which nothing is heard but heartbeats, so nearly all of them. On the worker's thread.
//!
//! They are watched by an epoll instance of their own, at which the worker looks every `workers.quiet_ms` and which never
//! wakes it. At a million over 53 workers each heartbeat found its worker asleep, and to wake it cost more than the
//! answer. Whoever says anything else is watched as everybody from then on, so only the first word behind a silence may
//! wait that long; and where so few are there that a look would find nobody, nobody is quiet.
//!
//! Trap: a connection stands in one of the two instances, and [`flag::QUIET`] says in which. A socket that is not read, or
//! that takes no more, does not stand among the quiet.
//!
//! Trap: the worker's own instance must not watch this one, as epoll could: the kernel then takes a lock of the whole
//! machine for each change of it, and walks all its connections when it is added.

use std::io;
use std::time::Duration;

use proto::Command;

use crate::connection::{Stage, flag};
use crate::id::Place;
use crate::sys::{Epoll, Event, Interest};
use crate::worker::Worker;

/// What a worker keeps of them.
pub(crate) struct Quiet {
    pub(crate) epoll: Epoll,
    connections: usize,
    /// The next look.
    look_ms: u64,
    /// Where it begins, see [`Worker::connections_ready`].
    first_event: usize,
}

impl Quiet {
    /// Nobody yet.
    pub fn new() -> io::Result<Quiet> {
        Ok(Quiet { epoll: Epoll::new()?, connections: 0, look_ms: 0, first_event: 0 })
    }

    /// When the worker is to look, if there is anybody.
    pub fn look_ms(&self) -> Option<u64> {
        (self.connections > 0).then_some(self.look_ms)
    }

    /// One of them is closed.
    pub fn closed(&mut self) {
        self.connections -= 1;
    }
}

impl Worker {
    /// Hears the quiet ones, when it is time.
    pub(crate) fn hear_quiet(&mut self, events: &mut [Event]) -> io::Result<()> {
        if self.held_back || self.quiet.look_ms().is_none_or(|look_ms| self.now_ms < look_ms) {
            return Ok(());
        }
        let room = events.len();
        let found = self.quiet.epoll.wait(events, Some(Duration::ZERO))?;
        let first = std::mem::take(&mut self.quiet.first_event);
        self.quiet.first_event = self.connections_ready(found, first);
        let more = found.len() == room || self.quiet.first_event > 0;
        if !more && !found.is_empty() {
            // Epoll asks each that it told of again, and better now than when all of it has left the processor's caches.
            let found = self.quiet.epoll.wait(events, Some(Duration::ZERO))?;
            self.connections_ready(found, 0);
        }
        self.quiet.look_ms =
            if more { self.now_ms } else { self.now_ms + self.shared.config.workers.quiet_ms };
        Ok(())
    }

    /// A heartbeat was heard: with nothing else since the last one it is that of a quiet one.
    pub(crate) fn beat(&mut self, place: Place) {
        let (quiet_ms, beat_ms) =
            (self.shared.config.workers.quiet_ms, u64::from(self.shared.config.limits.heartbeat_ms));
        let is_worth_it = self.table.count() as u64 * quiet_ms >= beat_ms;
        let Some(connection) = self.table.get_mut(place) else { return };
        if connection.has(flag::SPOKE) {
            connection.flags &= !flag::SPOKE;
            return;
        }
        let is_read = !connection.has(flag::QUIET | flag::PARKED | flag::BLOCKED);
        if quiet_ms == 0 || !is_worth_it || connection.stage != Stage::Bound || !is_read {
            return;
        }
        // The new one first: if the kernel has no room for that, all is as before.
        if self.quiet.epoll.add(&connection.fd, u64::from(place.bits()), Interest::Read).is_ok() {
            connection.flags |= flag::QUIET;
            self.quiet.connections += 1;
            let _ = self.epoll.remove(&connection.fd);
        }
    }

    /// A frame for state was heard. That a client is there, or has got a message, says nothing about who sits in front of it.
    pub(crate) fn spoke(&mut self, place: Place, command: u8) {
        if [Command::Login, Command::PushAck].iter().any(|quiet| *quiet as u8 == command) {
            return;
        }
        if let Some(connection) = self.table.get_mut(place) {
            connection.flags |= flag::SPOKE;
        }
        self.stir(place);
    }

    /// It is not among the quiet from now on.
    pub(crate) fn stir(&mut self, place: Place) {
        if let Some(connection) = self.table.get_mut(place)
            && connection.has(flag::QUIET)
            && self.epoll.add(&connection.fd, u64::from(place.bits()), Interest::Read).is_ok()
        {
            connection.flags &= !flag::QUIET;
            self.quiet.connections -= 1;
            let _ = self.quiet.epoll.remove(&connection.fd);
        }
    }
}
