//! Bytes in: accepting, reading, cutting frames, and putting them into the turn's batch. On the worker's thread.
//!
//! Trap: one read per connection and turn, into the worker's one buffer. Only a frame that is not whole yet gets memory
//! of its own, and only as much as has come.

use std::io;
use std::net::IpAddr;

use bytes::{BufMut, Bytes};
use prost::Message;
use proto::wire::{self, Code};
use proto::{Command, frame};

use crate::batch::UpFrame;
use crate::connection::{self, Connection, NONE, Stage, Verdict, flag, judge};
use crate::id::Place;
use crate::metrics::Why;
use crate::sys::{self, Fd, Interest};
use crate::worker::{LISTENER, Worker};

impl Worker {
    /// Accepts what is waiting, at most so many a turn.
    pub(crate) fn accept(&mut self) {
        for _ in 0..self.shared.config.workers.accepts_per_turn_max {
            let Some(listener) = &self.listener else { return };
            match sys::accept(listener) {
                Ok((fd, address)) => self.admit(fd, address.ip()),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => return,
                    Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS) => {
                        self.stats().accept_errors.add(1);
                        return self.pause_listener(&error);
                    }
                    // The peer went away while it waited, or the like: the next one may be fine.
                    _ => self.stats().accept_errors.add(1),
                },
            }
        }
    }

    fn admit(&mut self, fd: Fd, address: IpAddr) {
        self.stats().accepted.add(1);
        let room = if self.table.has_room() { self.shared.admission.enter(address) } else { None };
        let Some(address_slot) = room else {
            self.stats().closed(Why::Code(Code::TooManyConnections));
            // The socket's buffer is empty, so this fits; and if not, the close alone says enough.
            let _ =
                sys::write(&fd, &refusal(Code::TooManyConnections)).and_then(|_| sys::shutdown_write(&fd));
            return;
        };
        let tick = self.tick();
        let Some(place) = self.table.insert(Connection::new(fd, address_slot), tick) else {
            self.shared.admission.leave(address_slot);
            return;
        };
        self.logins.start(place, self.now_ms);
        let added = match self.table.get_mut(place) {
            Some(connection) => self.epoll.add(&connection.fd, u64::from(place.bits()), Interest::Read),
            None => Ok(()),
        };
        if let Err(error) = added {
            // max_user_watches: the kernel's limit, not the client's doing.
            tracing::warn!(%error, "a connection could not be watched; see fs.epoll.max_user_watches");
            self.close(place, Some(Why::Socket));
        }
    }

    /// No fd or memory for another connection: stop asking until the next tick, or a level-triggered listener spins.
    fn pause_listener(&mut self, error: &io::Error) {
        if let Some(listener) = &self.listener
            && self.epoll.modify(listener, LISTENER, Interest::Nothing).is_ok()
        {
            self.listener_paused = true;
            tracing::warn!(worker = self.index, %error, connections = self.table.count(), "accepting pauses for a second");
        }
    }

    pub(crate) fn resume_listener(&mut self) {
        if self.listener_paused
            && let Some(listener) = &self.listener
            && self.epoll.modify(listener, LISTENER, Interest::Read).is_ok()
        {
            self.listener_paused = false;
        }
    }

    /// Reads once, and handles every whole frame.
    pub(crate) fn receive(&mut self, place: Place) {
        let Some(connection) = self.table.get_mut(place) else { return };
        if connection.has(flag::DIRTY) {
            // Its answers of the last turn have not left yet. Whoever asks faster than we write waits like this.
            return;
        }
        if connection.has(flag::PARKED) {
            // Only an error or a hang-up gets here while reads are parked.
            return self.close(place, Some(Why::Socket));
        }
        let mut buffer = std::mem::take(&mut self.buffer);
        match sys::read(&connection.fd, &mut buffer) {
            Ok(0) => {
                let why = (connection.stage != Stage::Closing).then_some(Why::Peer);
                self.close(place, why);
            }
            Ok(count) => self.received(place, &buffer[..count]),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(_) => {
                let why = (connection.stage != Stage::Closing).then_some(Why::Socket);
                self.close(place, why);
            }
        }
        self.buffer = buffer;
    }

    fn received(&mut self, place: Place, bytes: &[u8]) {
        self.stats().bytes_in.add(bytes.len() as u64);
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
        let mut whole = std::mem::take(&mut self.tails[connection.tail as usize]);
        whole.reserve_exact(bytes.len());
        whole.extend_from_slice(bytes);
        let used = self.frames(place, &whole);
        let Some(connection) = self.table.get_mut(place) else { return };
        if connection.tail == NONE {
            // A frame ended it; its memory was given back then.
            return;
        }
        if used < whole.len() {
            // A new one, because the old one has room for what was read, and this may wait for long.
            self.tails[connection.tail as usize] = whole[used..].to_vec();
        } else {
            let index = std::mem::replace(&mut connection.tail, NONE);
            self.tails.remove(index as usize);
        }
    }

    fn keep_tail(&mut self, place: Place, rest: &[u8]) {
        if rest.is_empty() {
            return;
        }
        if let Some(connection) = self.table.get_mut(place)
            && connection.stage != Stage::Closing
        {
            connection.tail = self.tails.insert(rest.to_vec()) as u32;
        }
    }

    /// Handles the whole frames at the front of `bytes` and returns how many bytes they took (all, if what follows does
    /// not matter any more).
    fn frames(&mut self, place: Place, bytes: &[u8]) -> usize {
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
        let id = self.connection_id(place);
        let Some(connection) = self.table.get_mut(place) else { return };
        match judge(connection.stage, frame.command) {
            Verdict::Refuse(code) => return self.refuse(place, code),
            Verdict::Pong => return self.pong(place, frame.body),
            Verdict::Login => {
                self.login_number += 1;
                connection.stage = Stage::LoggingIn;
                connection.binding = self.login_number;
            }
            Verdict::Forward => {}
        }
        self.batch.bodies.extend_from_slice(frame.body);
        self.batch.frames.push(UpFrame {
            connection: id,
            user: connection.user,
            device: connection.device,
            binding: connection.binding,
            command: frame.command,
            body_bytes: frame.body.len() as u32,
        });
    }

    /// Ping and Pong have the same body, so the answer is the question under another command.
    fn pong(&mut self, place: Place, body: &[u8]) {
        if wire::Ping::decode(body).is_err() {
            return self.refuse(place, Code::BadBody);
        }
        let room = frame::HEADER_BYTES + body.len();
        if self.small_frames.capacity() < room {
            self.small_frames.reserve(room.max(16 * 1024));
        }
        self.small_frames.put_uint(body.len() as u64, 3);
        self.small_frames.put_u8(Command::Pong as u8);
        self.small_frames.extend_from_slice(body);
        let pong = self.small_frames.split().freeze();
        self.enqueue(place, pong, false);
    }
}

/// The last frame of a connection that the gateway refuses.
pub(crate) fn refusal(code: Code) -> Bytes {
    let text = connection::reason_text(code).to_owned();
    frame::encode(
        Command::Error,
        &wire::Error { code: code as i32, text, closing: true, ..Default::default() },
    )
}
