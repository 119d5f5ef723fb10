//! Bytes in: accepting, reading, cutting frames, and putting them into the turn's batch. On the worker's thread.
//!
//! Trap: one read per connection and turn, into the worker's one buffer. Only a frame that is not whole yet gets memory
//! of its own, and only as much as has come.

use std::io;
use std::net::IpAddr;

use bytes::BufMut;
use prost::Message;
use proto::wire::{self, Code};
use proto::{Command, frame};

use crate::batch::UpFrame;
use crate::connection::{self, Connection, NONE, Stage, Verdict, flag, judge};
use crate::id::Place;
use crate::metrics::Why;
use crate::sys::{self, Fd, Interest};
use crate::worker::{FRAME_OVERHEAD_BYTES, Worker};

/// Pongs share pieces of memory of this size: enough for those of a turn, and no more than each worker may keep.
const PONGS_BYTES: usize = 2 * 1024;

/// Read from a connection of which no unfinished frame is held: more than nearly all ever send at once, and few enough small frames.
pub(crate) const FIRST_READ_BYTES: usize = 32 * 1024;

impl Worker {
    /// Accepts what is waiting, at most so many a turn. Whether more may wait.
    pub(crate) fn accept(&mut self) -> bool {
        for _ in 0..self.shared.config.workers.accepts_per_turn_max {
            let Some(listener) = &self.listener else { return false };
            match sys::accept(listener) {
                Ok((fd, address)) => self.admit(fd, address.ip()),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => return false,
                    Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS) => {
                        if !self.out_of_room(&error) {
                            return false;
                        }
                    }
                    // The peer went away while it waited, or the like: the next one may be fine.
                    _ => self.stats().accept_errors.add(1),
                },
            }
        }
        self.more_wait();
        true
    }

    fn admit(&mut self, fd: Fd, address: IpAddr) {
        self.stats().accepted.add(1);
        let room = if self.table.has_room() { self.shared.admission.enter(address) } else { None };
        let Some(address_slot) = room else {
            // One address that has too many is not told of: anybody could fill the log with it.
            if self.shared.admission.is_full() || !self.table.has_room() {
                let what = "this gateway is full (limits.connections_max, or a worker's part of it): new connections are turned away";
                self.warn(what, None);
            }
            return self.turn_away(&fd);
        };
        let tick = self.tick();
        let Some(place) = self.table.insert(Connection::new(fd, address_slot), tick) else {
            self.shared.admission.leave(address_slot);
            return;
        };
        if self.reads_arrivals && !self.has_read_enough() {
            // In a storm its Login is here already: that saves it a round through epoll.
            self.receive(place);
        }
        let added = match self.table.get_mut(place) {
            Some(connection) => {
                if connection.stage == Stage::Fresh {
                    self.logins.start(place, self.now_ms);
                }
                self.epoll.add(&connection.fd, u64::from(place.bits()), Interest::Read)
            }
            // It has said something that ended it, or was gone before it was here.
            None => Ok(()),
        };
        if let Err(error) = added {
            // max_user_watches: the kernel's limit, not the client's doing.
            self.warn("a connection could not be watched; see fs.epoll.max_user_watches", Some(&error));
            let mut buffer = self.lend_buffer();
            if let Some(connection) = self.table.get_mut(place) {
                self.door.tell(&connection.fd, &mut buffer);
            }
            self.return_buffer(buffer);
            self.close(place, Some(Why::Code(Code::TooManyConnections)));
        }
    }

    /// Reads once, and handles every whole frame.
    pub(crate) fn receive(&mut self, place: Place) {
        let mut buffer = self.lend_buffer();
        self.receive_into(place, &mut buffer);
        self.return_buffer(buffer);
    }

    fn receive_into(&mut self, place: Place, buffer: &mut Vec<u8>) {
        let Some(connection) = self.table.get_mut(place) else { return };
        if connection.has(flag::DIRTY) {
            // Its answers of the last turn have not left yet. Whoever asks faster than we write waits like this.
            return;
        }
        if connection.has(flag::PARKED) {
            // Only an error or a hang-up gets here while reads are parked.
            return self.close(place, Some(Why::Socket));
        }
        let read_max = if connection.tail == NONE { FIRST_READ_BYTES } else { buffer.capacity() };
        match sys::read_at_most(&connection.fd, buffer, read_max) {
            Ok(0) => {
                let why = (connection.stage != Stage::Closing).then_some(Why::Peer);
                self.close(place, why);
            }
            Ok(_) => self.received(place, buffer),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(_) => {
                let why = (connection.stage != Stage::Closing).then_some(Why::Socket);
                self.close(place, why);
            }
        }
    }

    pub(crate) fn received(&mut self, place: Place, bytes: &[u8]) {
        self.stats().bytes_in.add(bytes.len() as u64);
        self.turn_bytes += bytes.len();
        let tick = self.tick();
        let Some(connection) = self.table.get_mut(place) else { return };
        match connection.stage {
            Stage::Closing => return,
            Stage::Bound => self.table.touch(place, tick),
            Stage::Fresh | Stage::LoggingIn => {}
        }
        let Some(connection) = self.table.get_mut(place) else { return };
        if connection.tail == NONE {
            let used = self.frames(place, bytes);
            return self.keep_tail(place, &bytes[used..]);
        }
        let mut whole = self.tails.take(connection.tail);
        whole.extend_from_slice(bytes);
        let used = self.frames(place, &whole);
        let Some(connection) = self.table.get_mut(place) else { return };
        if connection.tail == NONE {
            // A frame ended it; its memory was given back then.
            return;
        }
        if used < whole.len() {
            if !self.tails.keep(connection.tail, whole, used) {
                self.no_room(place);
            }
        } else {
            let index = std::mem::replace(&mut connection.tail, NONE);
            self.tails.remove(index);
        }
    }

    fn keep_tail(&mut self, place: Place, rest: &[u8]) {
        if rest.is_empty() {
            return;
        }
        if let Some(connection) = self.table.get_mut(place)
            && connection.stage != Stage::Closing
        {
            match self.tails.insert(rest) {
                Some(index) => connection.tail = index,
                None => self.no_room(place),
            }
        }
    }

    /// The burst budget has no room for an unfinished frame of this size.
    fn no_room(&mut self, place: Place) {
        self.stats().burst_refused.add(1);
        self.refuse_with(
            place,
            wire::Error {
                code: Code::Unavailable as i32,
                text: "too many frames are unfinished or unread on this gateway; send whole frames, or come back".to_owned(),
                retry_after_ms: self.shared.config.link.retry_after_ms,
                ..Default::default()
            },
        );
    }

    /// Handles the whole frames at the front of `bytes` and returns how many bytes they took (all, if what follows does
    /// not matter any more).
    fn frames(&mut self, place: Place, bytes: &[u8]) -> usize {
        let used = self.frames_in(place, bytes);
        self.flush_pongs(place);
        used
    }

    /// The pongs of the connection that is being read, together.
    pub(crate) fn flush_pongs(&mut self, place: Place) {
        if !self.pongs.is_empty() {
            let pongs = self.pongs.split().freeze();
            self.enqueue(place, pongs, false);
        }
    }

    fn frames_in(&mut self, place: Place, bytes: &[u8]) -> usize {
        let mut used = 0;
        loop {
            let Some(connection) = self.table.get_mut(place) else { return bytes.len() };
            let limit_bytes = match connection.stage {
                Stage::Closing => return bytes.len(),
                Stage::Bound => self.shared.config.limits.frame_bytes_max,
                Stage::Fresh | Stage::LoggingIn => self.shared.config.limits.login_frame_bytes_max,
            };
            match frame::cut(&bytes[used..], limit_bytes) {
                Ok(None) => return used,
                Ok(Some(frame)) => {
                    used += frame.wire_bytes();
                    self.frame(place, frame);
                }
                Err(_) => {
                    self.refuse(place, Code::FrameTooLarge);
                    return bytes.len();
                }
            }
        }
    }

    fn frame(&mut self, place: Place, frame: frame::Frame<'_>) {
        self.stats().frames_in.add(1);
        self.turn_bytes += FRAME_OVERHEAD_BYTES;
        let id = self.connection_id(place);
        let Some(connection) = self.table.get_mut(place) else { return };
        match judge(connection.stage, frame.command) {
            Verdict::Refuse(code) => return self.refuse(place, code),
            Verdict::Pong => return self.pong(place, frame.body),
            Verdict::Login => {
                if let Err(retry_after_ms) = self.shared.admission.may_log_in(connection.address) {
                    return self.refuse_guessing(place, retry_after_ms);
                }
                self.login_number += 1;
                connection.stage = Stage::LoggingIn;
                connection.binding = self.login_number;
            }
            Verdict::Forward => {}
        }
        let up = UpFrame {
            connection: id,
            user: connection.user,
            device: connection.device,
            binding: connection.binding,
            command: frame.command,
            body_bytes: frame.body.len() as u32,
        };
        self.batch_up(up, frame.body);
        crpc::failpoint::here("gateway_after_decode");
    }

    /// Too many logins of this address were guesses.
    fn refuse_guessing(&mut self, place: Place, retry_after_ms: u32) {
        self.stats().guessing_refused.add(1);
        let error =
            wire::Error { command: Command::Login as u32, retry_after_ms, ..refusal(Code::RateLimited) };
        self.refuse_with(place, error);
    }

    /// Ping and Pong have the same body, so the answer is the question under another command.
    fn pong(&mut self, place: Place, body: &[u8]) {
        if wire::Ping::decode(body).is_err() {
            return self.refuse(place, Code::BadBody);
        }
        let room = frame::HEADER_BYTES + body.len();
        if self.pongs.capacity() < self.pongs.len() + room {
            self.pongs.reserve(room.max(PONGS_BYTES));
        }
        self.pongs.put_uint(body.len() as u64, 3);
        self.pongs.put_u8(Command::Pong as u8);
        self.pongs.extend_from_slice(body);
    }
}

/// The last frame of a connection that the gateway refuses.
pub(crate) fn refusal(code: Code) -> wire::Error {
    let text = connection::reason_text(code).to_owned();
    wire::Error { code: code as i32, text, ..Default::default() }
}
