//! Bytes waiting to be written to one connection. Exists only while there are some; owned by one worker, lent from a
//! pool.
//!
//! Trap: a piece is a slice of whatever buffer it came in. Within a turn that is free; a piece that has to wait for a
//! slow socket would pin that whole buffer, so it is copied first ([`SendQueue::detach`]).

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::AsRawFd;

use bytes::{Buf, Bytes, BytesMut};

use crate::sys;

/// Pieces in one `writev`.
const PIECES_PER_WRITE_MAX: usize = 64;

/// The queue.
#[derive(Debug, Default)]
pub struct SendQueue {
    /// Slices of shared buffers, while nothing has to wait.
    pieces: VecDeque<Bytes>,
    /// Bytes of our own, once something had to.
    own: BytesMut,
    bytes: usize,
    detached: bool,
    /// Worker's clock, ms, when the socket last took something while this queue waited.
    pub progress_ms: u64,
}

impl SendQueue {
    /// Bytes waiting.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Appends whole frames.
    pub fn push(&mut self, frames: Bytes) {
        self.bytes += frames.len();
        if self.detached {
            self.own.extend_from_slice(&frames);
        } else {
            self.pieces.push_back(frames);
        }
    }

    /// Writes until all is gone or the socket takes no more. `Ok(true)`: all is gone.
    pub fn write_to(&mut self, fd: &impl AsRawFd) -> io::Result<bool> {
        while self.bytes > 0 {
            let written = match (self.detached, self.pieces.len()) {
                (true, _) => sys::write(fd, &self.own),
                (false, 1) => sys::write(fd, &self.pieces[0]),
                (false, pieces) => {
                    let mut slices = [IoSlice::new(&[]); PIECES_PER_WRITE_MAX];
                    for (slice, piece) in slices.iter_mut().zip(&self.pieces) {
                        *slice = IoSlice::new(piece);
                    }
                    sys::write_vectored(fd, &slices[..pieces.min(PIECES_PER_WRITE_MAX)])
                }
            };
            match written {
                Ok(count) => self.advance(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// From now on this queue holds bytes of its own, not slices of shared buffers.
    pub fn detach(&mut self) {
        if !self.detached {
            self.detached = true;
            self.own.reserve(self.bytes);
            for piece in self.pieces.drain(..) {
                self.own.extend_from_slice(&piece);
            }
        }
    }

    fn advance(&mut self, mut count: usize) {
        self.bytes -= count;
        if self.detached {
            return self.own.advance(count);
        }
        while count > 0 {
            let piece = &mut self.pieces[0];
            if count < piece.len() {
                return piece.advance(count);
            }
            count -= piece.len();
            self.pieces.pop_front();
        }
    }
}

/// Queues that are not in use keep a little room for the next one.
#[derive(Debug, Default)]
pub struct QueuePool {
    queues: slab::Slab<SendQueue>,
    spare: Vec<SendQueue>,
    spare_max: usize,
}

/// Pieces that a spare queue may keep room for.
const SPARE_PIECES_MAX: usize = 32;

impl QueuePool {
    /// Keeps at most `spare_max` empty queues.
    pub fn new(spare_max: usize) -> Self {
        QueuePool { spare_max, ..QueuePool::default() }
    }

    /// Lends a queue.
    pub fn take(&mut self) -> u32 {
        let queue = self.spare.pop().unwrap_or_default();
        self.queues.insert(queue) as u32
    }

    /// Takes it back, with whatever is in it thrown away.
    pub fn give_back(&mut self, index: u32) {
        let mut queue = self.queues.remove(index as usize);
        queue.pieces.clear();
        if self.spare.len() < self.spare_max && queue.pieces.capacity() <= SPARE_PIECES_MAX {
            self.spare.push(SendQueue { pieces: queue.pieces, ..SendQueue::default() });
        }
        if self.queues.is_empty() && self.queues.capacity() > 4 * self.spare_max {
            self.queues = slab::Slab::new();
        }
    }

    /// The queue that was lent as `index`.
    pub fn get_mut(&mut self, index: u32) -> &mut SendQueue {
        &mut self.queues[index as usize]
    }

    /// Queues lent.
    pub fn count(&self) -> usize {
        self.queues.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advancing_crosses_pieces() {
        let mut queue = SendQueue::default();
        for piece in ["abc", "de", "fghi"] {
            queue.push(Bytes::from_static(piece.as_bytes()));
        }
        queue.advance(4);
        assert_eq!((queue.bytes(), &queue.pieces[0][..]), (5, &b"e"[..]));
        queue.detach();
        assert_eq!((queue.pieces.len(), &queue.own[..]), (0, &b"efghi"[..]));
        queue.push(Bytes::from_static(b"j"));
        queue.advance(6);
        assert!(queue.own.is_empty() && queue.bytes() == 0);
    }

    #[test]
    fn a_queue_comes_back_empty() {
        let mut pool = QueuePool::new(4);
        let index = pool.take();
        pool.get_mut(index).push(Bytes::from_static(b"left over"));
        pool.give_back(index);
        let again = pool.take();
        assert_eq!(pool.get_mut(again).bytes(), 0);
        assert!(pool.get_mut(again).pieces.is_empty());
    }
}
