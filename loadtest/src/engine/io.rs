//! The connections of one engine thread, and what a mode may do with them. Owned by that thread.
//!
//! Trap: sending may find that a connection is broken. It is then only noted; the worker closes it when the mode is done
//! with what it does, so that nothing disappears under the mode's feet.

use std::collections::{HashMap, HashSet};
use std::io::ErrorKind;
use std::sync::Arc;

use bytes::{Buf, BytesMut};
use gateway::sys::{self, Epoll, Interest};

use super::conn::{Conn, Phase};
use super::{Clock, Control, Sample};
use crate::fault::Fault;

/// See the head of this file.
pub struct Io {
    pub(super) conns: Vec<Conn>,
    pub(super) epoll: Epoll,
    /// Bytes that are not a whole frame yet. Rare.
    pub(super) tails: HashMap<u32, Vec<u8>>,
    /// Bytes that the socket did not take. Rare.
    pub(super) outs: HashMap<u32, BytesMut>,
    /// Those that are not read any more, on purpose.
    pub(super) deaf: HashSet<u32>,
    /// Noted as broken, closed soon.
    pub(super) broken: Vec<(u32, Fault)>,
    pub(super) in_flight: usize,
    pub(super) now_us: u64,
    /// What is counted.
    pub sample: Sample,
    /// Run time.
    pub clock: Clock,
    /// What the main thread wants.
    pub control: Arc<Control>,
}

impl Io {
    /// Run time, as of this event.
    pub fn now_us(&self) -> u64 {
        self.now_us
    }

    /// Rises with every connection at this index.
    pub fn epoch(&self, index: u32) -> u16 {
        self.conns[index as usize].epoch
    }

    /// Whether it is ready.
    pub fn is_ready(&self, index: u32) -> bool {
        self.conns[index as usize].phase == Phase::Ready
    }

    /// The greeting was answered well.
    pub fn ready(&mut self, index: u32) {
        let conn = &mut self.conns[index as usize];
        if conn.phase == Phase::Ready {
            return;
        }
        conn.phase = Phase::Ready;
        self.in_flight -= 1;
        self.sample.ready += 1;
        self.sample.last_ready_us = self.now_us;
        let took_us = self.now_us.saturating_sub(conn.begun_us);
        self.sample.login.saturating_record(took_us);
        self.sample.login_uncorrected.saturating_record(took_us.saturating_sub(u64::from(conn.late_us)));
    }

    /// Sends bytes; what the socket does not take waits.
    pub fn send(&mut self, index: u32, mut bytes: &[u8]) {
        let conn = &self.conns[index as usize];
        let Some(fd) = &conn.fd else { return };
        if let Some(out) = self.outs.get_mut(&index) {
            if out.len() + bytes.len() > OUT_BYTES_MAX {
                self.broken.push((index, Fault::SendQueueFull));
            } else {
                out.extend_from_slice(bytes);
            }
            return;
        }
        match sys::write(fd, bytes) {
            Ok(sent) => bytes.advance(sent),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => {
                self.broken.push((index, Fault::Io(error)));
                return;
            }
        }
        if !bytes.is_empty() {
            match self.epoll.modify(fd, conn.token(index), self.reading(index, true)) {
                Ok(()) => drop(self.outs.insert(index, bytes.into())),
                Err(error) => self.broken.push((index, Fault::Io(error))),
            }
        }
    }

    /// Reads nothing more from a connection: what comes for it stays in the kernel. Its end is still seen.
    pub fn stop_reading(&mut self, index: u32) {
        self.deaf.insert(index);
        let conn = &self.conns[index as usize];
        let Some(fd) = &conn.fd else { return };
        let interest = self.reading(index, self.outs.contains_key(&index));
        if let Err(error) = self.epoll.modify(fd, conn.token(index), interest) {
            self.broken.push((index, Fault::Io(error)));
        }
    }

    fn reading(&self, index: u32, writing: bool) -> Interest {
        match (self.deaf.contains(&index), writing) {
            (false, false) => Interest::Read,
            (false, true) => Interest::ReadWrite,
            (true, false) => Interest::End,
            (true, true) => Interest::Write,
        }
    }

    /// The socket takes bytes again.
    pub(super) fn flush(&mut self, index: u32) {
        let after = self.reading(index, false);
        let conn = &self.conns[index as usize];
        let (Some(fd), Some(out)) = (&conn.fd, self.outs.get_mut(&index)) else { return };
        let sent = sys::write(fd, out).map(|sent| out.advance(sent));
        let done = match sent {
            Ok(()) if out.is_empty() => self.epoll.modify(fd, conn.token(index), after),
            Ok(()) => return,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            Err(error) => Err(error),
        };
        self.outs.remove(&index);
        if let Err(error) = done {
            self.broken.push((index, Fault::Io(error)));
        }
    }

    /// Closes by reset. Whether it was open, and ready.
    pub(super) fn close(&mut self, index: u32) -> Option<Phase> {
        let conn = &mut self.conns[index as usize];
        let was = conn.phase;
        if was == Phase::Waiting || was == Phase::Dead {
            return None;
        }
        if conn.in_flight() {
            self.in_flight -= 1;
        }
        conn.phase = Phase::Waiting;
        if let Some(fd) = conn.fd.take() {
            // If it fails the socket lingers a minute in TIME_WAIT; nothing else is lost.
            let _ = sys::reset_on_close(&fd);
        }
        self.tails.remove(&index);
        self.outs.remove(&index);
        self.deaf.remove(&index);
        Some(was)
    }
}

/// A peer that has not taken this much is given up.
const OUT_BYTES_MAX: usize = 4 * 1024 * 1024;
