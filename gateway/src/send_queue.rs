//! Bytes waiting to be written to one connection. Exists only while there are some; owned by one worker, lent from a
//! pool.
//!
//! Trap: a piece is a slice of whatever buffer it came in. Within a turn that is free; a piece that has to wait for a
//! slow socket would pin that whole buffer, so it is copied first ([`QueuePool::detach`]). From then on the queue is charged
//! to the burst budget, with its capacity.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::AsRawFd;
use std::sync::Arc;

use bytes::{Buf, Bytes};

use crate::burst::{Burst, HOLDER_BYTES};
use crate::sys;

/// Pieces in one `writev`.
const PIECES_PER_WRITE_MAX: usize = 64;

/// A queue of a blocked connection grows by its own size, but by no more than this.
const GROWTH_BYTES_MAX: usize = 64 * 1024;

/// What a queue costs beside its bytes: itself, twice because the pool's table may have grown to twice what it holds.
const QUEUE_BYTES: usize = 2 * size_of::<SendQueue>() + HOLDER_BYTES;

/// The queue.
#[derive(Debug, Default)]
pub struct SendQueue {
    /// Slices of shared buffers, while nothing has to wait.
    pieces: VecDeque<Piece>,
    /// Bytes at the front that end a frame which is partly written; 0: a frame begins there.
    rest: usize,
    /// Bytes of our own, once something had to wait; those before `written` are gone.
    own: Vec<u8>,
    written: usize,
    bytes: usize,
    /// What the burst budget is charged with; 0 until something had to wait.
    charged: usize,
    /// Worker's clock, ms, when the socket last took something while this queue waited.
    pub progress_ms: u64,
}

#[derive(Debug)]
struct Piece {
    frames: Bytes,
    push: bool,
}

/// What became of a queue whose socket takes no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detached {
    /// It waits, whole.
    Whole,
    /// It waits without its pushes, for which there was no room.
    WithoutPushes,
    /// There is no room even for the rest.
    NoRoom,
}

impl SendQueue {
    /// Bytes waiting.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Writes until all is gone or the socket takes no more. `Ok(true)`: all is gone.
    pub fn write_to(&mut self, fd: &impl AsRawFd) -> io::Result<bool> {
        while self.bytes > 0 {
            let written = match (self.is_detached(), self.pieces.len()) {
                (true, _) => sys::write(fd, &self.own[self.written..]),
                (false, 1) => sys::write(fd, &self.pieces[0].frames),
                (false, pieces) => {
                    let mut slices = [IoSlice::new(&[]); PIECES_PER_WRITE_MAX];
                    for (slice, piece) in slices.iter_mut().zip(&self.pieces) {
                        *slice = IoSlice::new(&piece.frames);
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

    /// What waits.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn copy_to(&self, out: &mut Vec<u8>) {
        self.pieces.iter().for_each(|piece| out.extend_from_slice(&piece.frames));
        out.extend_from_slice(&self.own[self.written..]);
    }

    fn is_detached(&self) -> bool {
        self.charged > 0
    }

    fn push(&mut self, frames: Bytes, push: bool, burst: &Burst) -> bool {
        let bytes = frames.len();
        if self.is_detached() {
            if !self.make_room(bytes, burst) {
                return false;
            }
            self.own.extend_from_slice(&frames);
        } else {
            self.pieces.push_back(Piece { frames, push });
        }
        self.bytes += bytes;
        true
    }

    /// Room for `more` bytes of our own, within the budget.
    fn make_room(&mut self, more: usize, burst: &Burst) -> bool {
        if self.written >= self.own.len() - self.written {
            // What is gone is at least what is left: closing the hole costs less than it frees.
            self.own.drain(..self.written);
            self.written = 0;
        }
        let needed = self.own.len() + more;
        if needed <= self.own.capacity() {
            return true;
        }
        let ample = needed.max(self.own.capacity() + self.own.capacity().min(GROWTH_BYTES_MAX));
        [ample, needed].into_iter().any(|capacity| self.reserve(capacity, burst))
    }

    fn reserve(&mut self, capacity: usize, burst: &Burst) -> bool {
        if !burst.resize(self.charged, QUEUE_BYTES + capacity) {
            return false;
        }
        self.charged = QUEUE_BYTES + capacity;
        self.own.reserve_exact(capacity - self.own.len());
        true
    }

    /// From now on this queue holds bytes of its own, not slices of shared buffers.
    fn detach(&mut self, burst: &Burst) -> Detached {
        if self.is_detached() {
            return Detached::Whole;
        }
        let mut end = Detached::Whole;
        if !self.reserve(self.bytes, burst) {
            // What is begun must be finished, or the client loses the place in the stream of frames.
            let mut first = self.rest > 0;
            self.pieces.retain(|piece| std::mem::take(&mut first) || !piece.push);
            let bytes = self.pieces.iter().map(|piece| piece.frames.len()).sum();
            if !self.reserve(bytes, burst) {
                return Detached::NoRoom;
            }
            self.bytes = bytes;
            end = Detached::WithoutPushes;
        }
        for piece in std::mem::take(&mut self.pieces) {
            self.own.extend_from_slice(&piece.frames);
        }
        end
    }

    fn advance(&mut self, mut count: usize) {
        self.bytes -= count;
        if self.is_detached() {
            self.rest = rest_behind(&self.own[self.written..], self.rest, count);
            self.written += count;
            return;
        }
        while count > 0 {
            let piece = &mut self.pieces[0].frames;
            if count < piece.len() {
                self.rest = rest_behind(piece, self.rest, count);
                return piece.advance(count);
            }
            count -= piece.len();
            // A piece is whole frames.
            self.rest = 0;
            self.pieces.pop_front();
        }
    }

    /// Throws away what has not begun to leave, and ends with these frames instead. `false`: no room even for that, and
    /// nothing has changed.
    fn end_with(&mut self, last: &[u8], burst: &Burst) -> bool {
        let front = match (self.is_detached(), self.pieces.front()) {
            (true, _) => &self.own[self.written..],
            (false, Some(piece)) => &piece.frames,
            (false, None) => &[],
        };
        let own = [&front[..self.rest], last].concat();
        if !burst.resize(self.charged, QUEUE_BYTES + own.capacity()) {
            return false;
        }
        self.charged = QUEUE_BYTES + own.capacity();
        self.bytes = own.len();
        (self.own, self.written) = (own, 0);
        self.pieces = VecDeque::new();
        true
    }
}

/// `count` bytes of `front` are written, whose first `rest` end a begun frame: how many bytes of the frame that is begun then
/// are left.
fn rest_behind(front: &[u8], rest: usize, count: usize) -> usize {
    let mut end = rest;
    while end < count {
        // They are all whole; what is not would count as one frame.
        let frame = proto::frame::cut(&front[end..], proto::FRAME_BYTES_MAX).ok().flatten();
        end = frame.map_or(front.len(), |frame| end + frame.wire_bytes());
    }
    end - count
}

/// Queues that are not in use keep a little room for the next one.
#[derive(Debug)]
pub struct QueuePool {
    queues: slab::Slab<SendQueue>,
    spare: Vec<SendQueue>,
    burst: Arc<Burst>,
}

/// Queues that are kept for the next use, each with room for as many pieces.
const SPARE_MAX: usize = 64;
const SPARE_PIECES_MAX: usize = 8;

impl QueuePool {
    /// Queues that wait are charged to `burst`.
    pub fn new(burst: Arc<Burst>) -> Self {
        QueuePool { queues: slab::Slab::new(), spare: Vec::new(), burst }
    }

    /// Lends a queue.
    pub fn take(&mut self) -> u32 {
        let queue = self.spare.pop().unwrap_or_default();
        self.queues.insert(queue) as u32
    }

    /// Takes it back, with whatever is in it thrown away.
    pub fn give_back(&mut self, index: u32) {
        let mut queue = self.queues.remove(index as usize);
        self.burst.release(queue.charged);
        queue.pieces.clear();
        if self.spare.len() < SPARE_MAX && (1..=SPARE_PIECES_MAX).contains(&queue.pieces.capacity()) {
            self.spare.push(SendQueue { pieces: queue.pieces, ..SendQueue::default() });
        }
    }

    /// Appends whole frames. `false`: the queue waits for its socket, and the burst budget has no room for them.
    #[must_use]
    pub fn push(&mut self, index: u32, frames: Bytes, push: bool) -> bool {
        self.queues[index as usize].push(frames, push, &self.burst)
    }

    /// The socket takes no more: what is left waits in memory of its own.
    pub fn detach(&mut self, index: u32) -> Detached {
        self.queues[index as usize].detach(&self.burst)
    }

    /// Throws away what has not begun to leave, and ends with these frames instead. `false`: the burst budget has no room
    /// even for that.
    #[must_use]
    pub fn end_with(&mut self, index: u32, last: &[u8]) -> bool {
        self.queues[index as usize].end_with(last, &self.burst)
    }

    /// The most that the queue of one connection may hold now, as far as the burst budget goes.
    pub fn share_bytes(&self) -> usize {
        self.burst.share_bytes()
    }

    /// The queue that was lent as `index`.
    pub fn get_mut(&mut self, index: u32) -> &mut SendQueue {
        &mut self.queues[index as usize]
    }

    /// Queues lent.
    pub fn count(&self) -> usize {
        self.queues.len()
    }

    /// Gives memory back that a burst has left behind.
    pub fn shrink(&mut self) {
        if self.queues.is_empty() {
            self.queues = slab::Slab::new();
            self.spare = Vec::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(clients_bytes_max: usize) -> (QueuePool, Arc<Burst>) {
        let burst = Arc::new(Burst::new(clients_bytes_max, 0));
        (QueuePool::new(burst.clone()), burst)
    }

    fn held(queue: &SendQueue) -> &[u8] {
        &queue.own[queue.written..]
    }

    #[test]
    fn advancing_crosses_pieces() {
        let (mut pool, burst) = pool(1 << 20);
        let index = pool.take();
        for piece in ["abc", "de", "fghi"] {
            assert!(pool.push(index, Bytes::from_static(piece.as_bytes()), false));
        }
        let queue = pool.get_mut(index);
        queue.advance(4);
        assert_eq!((queue.bytes(), &queue.pieces[0].frames[..]), (5, &b"e"[..]));
        assert_eq!(burst.clients_bytes(), 0, "what leaves at once is not charged");
        assert_eq!(pool.detach(index), Detached::Whole);
        assert_eq!((pool.get_mut(index).pieces.len(), held(pool.get_mut(index))), (0, &b"efghi"[..]));
        assert!(pool.push(index, Bytes::from_static(b"j"), false));
        let queue = pool.get_mut(index);
        assert_eq!(burst.clients_bytes(), queue.charged);
        assert!(queue.charged >= QUEUE_BYTES + queue.own.capacity());
        queue.advance(6);
        assert!(held(queue).is_empty() && queue.bytes() == 0);
        pool.give_back(index);
        assert_eq!(burst.clients_bytes(), 0);
    }

    #[test]
    fn a_queue_comes_back_empty() {
        let (mut pool, _) = pool(1 << 20);
        let index = pool.take();
        assert!(pool.push(index, Bytes::from_static(b"left over"), false));
        pool.give_back(index);
        let again = pool.take();
        assert_eq!(pool.get_mut(again).bytes(), 0);
        assert!(pool.get_mut(again).pieces.is_empty());
    }

    #[test]
    fn without_room_pushes_go_first_but_never_the_half_of_a_frame() {
        let (mut pool, burst) = pool(16 * (QUEUE_BYTES + 50));
        let index = pool.take();
        for (bytes, push) in [(&[b'a'; 40], true), (&[b'b'; 40], true), (&[b'c'; 40], false)] {
            assert!(pool.push(index, Bytes::from_static(bytes), push));
        }
        pool.get_mut(index).advance(30);
        assert_eq!(pool.detach(index), Detached::WithoutPushes);
        assert_eq!(held(pool.get_mut(index)), [&[b'a'; 10][..], &[b'c'; 40]].concat());
        assert!(!pool.push(index, Bytes::from_static(&[b'd'; 40]), false));
        assert_eq!(pool.get_mut(index).bytes(), 50);
        let other = pool.take();
        assert!(pool.push(other, Bytes::from_static(&[b'e'; 200]), false));
        assert_eq!(pool.detach(other), Detached::NoRoom);
        pool.give_back(other);
        pool.give_back(index);
        assert_eq!(burst.clients_bytes(), 0);
    }

    #[test]
    fn the_last_words_stand_behind_the_frame_that_is_begun() {
        let frame = |byte: u8, bytes: usize| {
            Bytes::from([&(bytes as u32).to_be_bytes()[1..], &[byte], &vec![byte; bytes][..]].concat())
        };
        let (a, b, c) = (frame(b'a', 10), frame(b'b', 0), frame(b'c', 300));
        let stream = [&a[..], &b, &c, &a].concat();
        let ends = [0, 14, 18, 322, 336];
        // However it was queued: a piece a frame, several in a piece, and bytes of its own from some point on.
        for pieces in [vec![a.clone(), b.clone(), c.clone(), a.clone()], vec![Bytes::from(stream.clone())]] {
            for (written, detached_at) in (0..stream.len()).flat_map(|at| [(at, 0), (at, at / 2), (at, at)]) {
                let (mut pool, burst) = pool(1 << 20);
                let index = pool.take();
                for piece in &pieces {
                    assert!(pool.push(index, piece.clone(), false));
                }
                pool.get_mut(index).advance(detached_at);
                assert_eq!(pool.detach(index), Detached::Whole);
                pool.get_mut(index).advance(written - detached_at);
                assert!(pool.end_with(index, b"last"));
                let end = *ends.iter().find(|end| **end >= written).unwrap();
                let left = [&stream[written..end], b"last"].concat();
                let queue = pool.get_mut(index);
                assert_eq!((held(queue), queue.bytes()), (&left[..], left.len()), "{written} of {stream:?}");
                assert_eq!(burst.clients_bytes(), queue.charged);
                pool.give_back(index);
                assert_eq!(burst.clients_bytes(), 0);
            }
        }
    }

    #[test]
    fn last_words_find_no_room_when_nothing_does() {
        let (mut pool, burst) = pool(16 * (QUEUE_BYTES + 50));
        let index = pool.take();
        assert!(pool.push(index, Bytes::from_static(&[0; 200]), false));
        assert_eq!(pool.detach(index), Detached::NoRoom);
        assert!(!pool.end_with(index, &[1; 51]) && pool.end_with(index, &[1; 50]));
        assert_eq!(held(pool.get_mut(index)), [1; 50]);
        pool.give_back(index);
        assert_eq!(burst.clients_bytes(), 0);
    }

    #[test]
    fn a_queue_that_is_read_slowly_does_not_keep_what_is_gone() {
        let (mut pool, burst) = pool(1 << 20);
        let index = pool.take();
        assert!(pool.push(index, Bytes::from_static(&[1; 1000]), false));
        assert_eq!(pool.detach(index), Detached::Whole);
        for _ in 0..1_000 {
            pool.get_mut(index).advance(900);
            assert!(pool.push(index, Bytes::from_static(&[1; 900]), false));
        }
        assert_eq!(pool.get_mut(index).bytes(), 1_000);
        assert!(burst.clients_bytes() < QUEUE_BYTES + 4_000, "{}", burst.clients_bytes());
    }
}
