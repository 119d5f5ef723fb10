//! Connections of which nothing is heard but heartbeats, so nearly all of them. On the worker's thread.
//!
//! They are watched by an epoll instance of their own, which is watched by the worker's. The first heartbeat wakes the
//! worker as any frame does; while they come closer together than `workers.quiet_ms`, it looks at them that often and is
//! not woken in between. At a million over 53 workers each heartbeat found its worker asleep, and to wake it cost more
//! than the answer: 25 µs each, where many at a time take 10. Whoever says anything else is watched as before, so only
//! the first word behind a silence may wait that long, and only on a gateway that has that much to do.
//!
//! Trap: a connection stands in one of the two instances, and [`flag::QUIET`] says in which. A socket that is not read, or
//! that takes no more, never stands among the quiet.

use std::io;

use proto::Command;

use crate::connection::{Stage, flag};
use crate::id::Place;
use crate::sys::{Epoll, Event, Interest};
use crate::worker::{QUIET, Worker};

/// What a worker keeps of them.
pub(crate) struct Quiet {
    pub(crate) epoll: Epoll,
    pub(crate) looks: Looks,
    /// Epoll has told in this turn that somebody is heard.
    pub(crate) told: bool,
    /// The worker's epoll instance tells.
    watched: bool,
    /// Where the next look begins, see [`Worker::ready`].
    first_event: usize,
}

impl Quiet {
    /// Nobody yet, watched by `epoll`. `every_ms`: between two looks; 0: nobody is ever quiet.
    pub fn new(epoll: &Epoll, every_ms: u64) -> io::Result<Quiet> {
        let quiet = Epoll::new()?;
        epoll.add(&quiet, QUIET, Interest::Read)?;
        let looks = Looks { every_ms, last_ms: 0, next_ms: None };
        Ok(Quiet { epoll: quiet, looks, told: false, watched: true, first_event: 0 })
    }
}

/// When to look: when told, and by the clock while told too often. Pure.
#[derive(Debug)]
pub(crate) struct Looks {
    every_ms: u64,
    /// The last that found somebody.
    last_ms: u64,
    /// By the clock: the next.
    next_ms: Option<u64>,
}

impl Looks {
    /// When the worker must turn for it.
    pub fn next_ms(&self) -> Option<u64> {
        self.next_ms
    }

    /// Whether now is the time; `told` by epoll that somebody is heard.
    fn is_due(&mut self, told: bool, now_ms: u64) -> bool {
        if self.next_ms.is_none() && told {
            // Too soon behind the last one: from now on by the clock.
            let too_soon = now_ms < self.last_ms + self.every_ms;
            self.next_ms = too_soon.then_some(self.last_ms + self.every_ms);
            return !too_soon;
        }
        self.next_ms.is_some_and(|next_ms| now_ms >= next_ms)
    }

    /// A look found so many; `more` may be left.
    fn looked(&mut self, found: usize, more: bool, now_ms: u64) {
        if found == 0 {
            self.next_ms = None;
            return;
        }
        self.last_ms = now_ms;
        if self.next_ms.is_some() {
            self.next_ms = Some(if more { now_ms } else { now_ms + self.every_ms });
        }
    }
}

impl Worker {
    /// Hears the quiet ones, when it is time.
    pub(crate) fn hear_quiet(&mut self, events: &mut [Event]) -> io::Result<()> {
        let told = std::mem::take(&mut self.quiet.told);
        if !self.held_back && self.quiet.looks.is_due(told, self.now_ms) {
            let room = events.len();
            let found = self.quiet.epoll.wait(events, Some(std::time::Duration::ZERO))?;
            let first = std::mem::take(&mut self.quiet.first_event);
            self.quiet.first_event = self.connections_ready(found, first);
            let more = found.len() == room || self.quiet.first_event > 0;
            self.quiet.looks.looked(found.len(), more, self.now_ms);
        }
        self.watch_quiet()
    }

    /// Brings the worker's epoll instance in line with whether it is to tell.
    fn watch_quiet(&mut self) -> io::Result<()> {
        let watched = self.quiet.looks.next_ms().is_none();
        if watched != self.quiet.watched {
            let interest = if watched { Interest::Read } else { Interest::Nothing };
            self.epoll.modify(&self.quiet.epoll, QUIET, interest)?;
            self.quiet.watched = watched;
        }
        Ok(())
    }

    /// A heartbeat was heard: the second with nothing between them is that of a quiet one.
    pub(crate) fn beat(&mut self, place: Place) {
        let Some(connection) = self.table.get_mut(place) else { return };
        if connection.has(flag::SPOKE) {
            connection.flags &= !flag::SPOKE;
            return;
        }
        let is_read = !connection.has(flag::QUIET | flag::PARKED | flag::BLOCKED);
        if self.quiet.looks.every_ms == 0 || connection.stage != Stage::Bound || !is_read {
            return;
        }
        // The new one first: if the kernel has no room for that, all is as before.
        if self.quiet.epoll.add(&connection.fd, u64::from(place.bits()), Interest::Read).is_ok() {
            connection.flags |= flag::QUIET;
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
            let _ = self.quiet.epoll.remove(&connection.fd);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_follow_heartbeats_until_these_come_too_often() {
        let mut looks = Looks { every_ms: 20, last_ms: 0, next_ms: None };
        assert!(!looks.is_due(false, 100), "nobody is heard");
        assert!(looks.is_due(true, 100), "at once");
        looks.looked(1, false, 100);
        assert_eq!(looks.next_ms(), None, "one was no reason for a clock");
        assert!(!looks.is_due(true, 105), "another so soon is");
        assert_eq!(looks.next_ms(), Some(120));
        assert!(!looks.is_due(true, 119) && looks.is_due(false, 120));
        looks.looked(256, true, 121);
        assert!(looks.is_due(false, 121), "some are left");
        looks.looked(5, false, 121);
        assert!(!looks.is_due(false, 140) && looks.is_due(false, 141));
        looks.looked(0, false, 141);
        assert_eq!(looks.next_ms(), None, "nobody came in all that time");
        assert!(looks.is_due(true, 142), "at once again");
    }
}
