//! The link's core: which state server gets a frame, what is un-acknowledged where, what to do when a stream breaks.
//! Pure (takes `now_ms`); owned by the bridge, behind one lock that only its thread takes.
//!
//! A frame is queued for one stream, leaves in a numbered batch, and is kept until that number is acknowledged. When a
//! stream breaks, everything un-acknowledged comes back, in order, to be offered anew: every command is idempotent.
//!
//! Trap: frames of one connection must not overtake each other through two state servers. A connection is pinned to its
//! stream while it has anything un-acknowledged there; only then does the hash decide.

use std::collections::{HashMap, VecDeque};

use proto::link::{DownDone, Gone, LinkPing, Up, UpBatch, UpFrame, up};

/// Names one opened stream; never used twice in a process.
pub type StreamKey = u64;

/// Limits of the core; see `config::Link`.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct Bounds {
    pub batch_frames_max: usize,
    pub batches_in_flight_max: usize,
    pub queue_bytes_max: usize,
    pub connection_frames_max: u32,
    pub stalled_ms_max: u64,
    pub dead_ms: u64,
}

/// Fixed cost that a queued frame is counted with beside its body.
const FRAME_OVERHEAD_BYTES: usize = 64;

/// All streams.
pub struct Link {
    bounds: Bounds,
    streams: Vec<Stream>,
    pinned: HashMap<u64, Pin>,
    next_key: StreamKey,
    pinged_ms: u64,
}

#[derive(Clone, Copy)]
struct Pin {
    stream: StreamKey,
    frames: u32,
}

struct Stream {
    key: StreamKey,
    state_id: String,
    preferred: bool,
    queue: VecDeque<UpFrame>,
    unacked: VecDeque<SentBatch>,
    held_bytes: usize,
    credit_bytes: usize,
    next_number: u64,
    progress_ms: u64,
    pong_ms: u64,
    ping_due: Option<u64>,
    placing: VecDeque<(u64, usize)>,
    done_due: Option<u64>,
    gone: Vec<Gone>,
}

struct SentBatch {
    number: u64,
    frames: Vec<UpFrame>,
    sent_ms: u64,
}

impl Link {
    /// Without streams.
    pub fn new(bounds: Bounds) -> Self {
        Link { bounds, streams: Vec::new(), pinned: HashMap::new(), next_key: 1, pinged_ms: 0 }
    }

    /// A stream to `state_id` is open.
    pub fn opened(&mut self, state_id: &str, credit_bytes: u64, now_ms: u64) -> StreamKey {
        let key = self.next_key;
        self.next_key += 1;
        self.streams.push(Stream {
            key,
            state_id: state_id.to_owned(),
            preferred: true,
            queue: VecDeque::new(),
            unacked: VecDeque::new(),
            held_bytes: 0,
            credit_bytes: credit_bytes as usize,
            next_number: 1,
            progress_ms: now_ms,
            pong_ms: now_ms,
            ping_due: None,
            placing: VecDeque::new(),
            done_due: None,
            gone: Vec::new(),
        });
        key
    }

    /// The stream is no more. Returns what it had not acknowledged, in the order in which it was offered.
    pub fn broken(&mut self, key: StreamKey) -> Vec<UpFrame> {
        let Some(index) = self.streams.iter().position(|stream| stream.key == key) else { return Vec::new() };
        let stream = self.streams.remove(index);
        let frames: Vec<UpFrame> =
            stream.unacked.into_iter().flat_map(|batch| batch.frames).chain(stream.queue).collect();
        for frame in &frames {
            self.unpin(frame.connection);
        }
        frames
    }

    /// Streams that are open.
    pub fn len(&self) -> usize {
        self.streams.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.streams.is_empty()
    }

    /// Frames that are queued or not acknowledged, over all streams.
    pub fn pending(&self) -> usize {
        self.streams
            .iter()
            .map(|s| s.queue.len() + s.unacked.iter().map(|b| b.frames.len()).sum::<usize>())
            .sum()
    }

    /// Queues a frame. `Ok` names the stream that has something to send; `Err` gives the frame back because there is
    /// no stream for it, or it is stalled or full.
    pub fn offer(&mut self, frame: UpFrame, now_ms: u64) -> Result<StreamKey, UpFrame> {
        let pinned = self.pinned.get(&frame.connection).copied();
        if pinned.is_some_and(|pin| pin.frames >= self.bounds.connection_frames_max) {
            return Err(frame);
        }
        let index = match pinned.map(|pin| pin.stream) {
            Some(key) => self.streams.iter().position(|stream| stream.key == key),
            None => self.home(frame.connection),
        };
        let Some(stream) = index.and_then(|index| self.streams.get_mut(index)) else { return Err(frame) };
        let bytes = held_bytes(&frame);
        let due = !stream.unacked.is_empty() || !stream.queue.is_empty();
        let stalled = due && now_ms > stream.progress_ms + self.bounds.stalled_ms_max;
        if stalled || stream.held_bytes + bytes > self.bounds.queue_bytes_max {
            return Err(frame);
        }
        if !due {
            // Nothing was asked of it until now, so nothing could progress.
            stream.progress_ms = now_ms;
        }
        stream.held_bytes += bytes;
        let pin = self.pinned.entry(frame.connection).or_insert(Pin { stream: stream.key, frames: 0 });
        pin.frames += 1;
        stream.queue.push_back(frame);
        Ok(stream.key)
    }

    /// Connections that are free to move go to these servers as long as one of them has a stream: the others have left
    /// the registry, and are draining.
    pub fn prefer(&mut self, state_ids: &[&str]) {
        for stream in &mut self.streams {
            stream.preferred = state_ids.contains(&stream.state_id.as_str());
        }
    }

    fn home(&self, connection: u64) -> Option<usize> {
        let all = || self.streams.iter().enumerate();
        let any_preferred = all().any(|(_, stream)| stream.preferred);
        let candidates: Vec<(usize, &str)> = all()
            .filter(|(_, stream)| stream.preferred || !any_preferred)
            .map(|(index, stream)| (index, stream.state_id.as_str()))
            .collect();
        crpc::balance::rendezvous(connection, candidates.iter().map(|(_, id)| *id)).map(|at| candidates[at].0)
    }

    /// What to send next on this stream; `None`: nothing now.
    pub fn next_up(&mut self, key: StreamKey, now_ms: u64) -> Option<Up> {
        let bounds = &self.bounds;
        let stream = self.streams.iter_mut().find(|stream| stream.key == key)?;
        let kind = if let Some(nonce) = stream.ping_due.take() {
            up::Kind::Ping(LinkPing { nonce })
        } else if stream.done_due.is_some() || !stream.gone.is_empty() {
            let number = stream.done_due.take().unwrap_or(0);
            up::Kind::Done(DownDone { number, gone: std::mem::take(&mut stream.gone) })
        } else {
            up::Kind::Batch(stream.next_batch(bounds, now_ms)?)
        };
        Some(Up { kind: Some(kind) })
    }

    /// Batches up to `number` are answered. Returns for how long each newly acknowledged one was out, ms.
    pub fn acked(&mut self, key: StreamKey, number: u64, now_ms: u64) -> Vec<u64> {
        let Some(stream) = self.streams.iter_mut().find(|stream| stream.key == key) else {
            return Vec::new();
        };
        let mut out_ms = Vec::new();
        let mut done = Vec::new();
        while stream.unacked.front().is_some_and(|batch| batch.number <= number) {
            let Some(batch) = stream.unacked.pop_front() else { break };
            stream.held_bytes -= batch.frames.iter().map(held_bytes).sum::<usize>();
            out_ms.push(now_ms.saturating_sub(batch.sent_ms));
            done.extend(batch.frames.into_iter().map(|frame| frame.connection));
            stream.progress_ms = now_ms;
        }
        for connection in done {
            self.unpin(connection);
        }
        out_ms
    }

    /// The state server allows so many bytes from now on.
    pub fn credit(&mut self, key: StreamKey, credit_bytes: u64) {
        if let Some(stream) = self.streams.iter_mut().find(|stream| stream.key == key) {
            stream.credit_bytes = credit_bytes as usize;
        }
    }

    /// Asks every stream for a pong, and returns those that have not answered for too long.
    pub fn ping(&mut self, now_ms: u64) -> Vec<StreamKey> {
        // If we ourselves stood still, their pongs wait unread: everybody gets the full time again.
        let we_slept = now_ms > self.pinged_ms + self.bounds.dead_ms / 2;
        self.pinged_ms = now_ms;
        for stream in &mut self.streams {
            stream.ping_due = Some(now_ms);
            if we_slept {
                stream.pong_ms = now_ms;
                stream.progress_ms = now_ms;
            }
        }
        let dead = self.streams.iter().filter(|stream| now_ms > stream.pong_ms + self.bounds.dead_ms);
        dead.map(|stream| stream.key).collect()
    }

    /// The state server answered a ping.
    pub fn pong(&mut self, key: StreamKey, now_ms: u64) {
        if let Some(stream) = self.streams.iter_mut().find(|stream| stream.key == key) {
            stream.pong_ms = now_ms;
        }
    }

    /// Down batch `number` went to `parts` workers. `true`: it is placed already, and there is something to tell.
    pub fn placing(&mut self, key: StreamKey, number: u64, parts: usize) -> bool {
        let Some(stream) = self.streams.iter_mut().find(|stream| stream.key == key) else { return false };
        stream.placing.push_back((number, parts));
        stream.count_done()
    }

    /// One worker has placed its part of a down batch. `true`: there is something to tell.
    pub fn placed(&mut self, key: StreamKey, number: u64) -> bool {
        let Some(stream) = self.streams.iter_mut().find(|stream| stream.key == key) else { return false };
        if let Some((_, parts)) = stream.placing.iter_mut().find(|(n, _)| *n == number) {
            *parts = parts.saturating_sub(1);
        }
        stream.count_done()
    }

    /// Deliveries that found nobody, to be told to any state server; the one that sent them, if it is still there.
    pub fn gone(&mut self, key: Option<StreamKey>, gone: Vec<Gone>) -> Option<StreamKey> {
        let index = self.streams.iter().position(|stream| Some(stream.key) == key).unwrap_or(0);
        let stream = self.streams.get_mut(index)?;
        stream.gone.extend(gone);
        Some(stream.key)
    }

    fn unpin(&mut self, connection: u64) {
        if let Some(pin) = self.pinned.get_mut(&connection) {
            pin.frames -= 1;
            if pin.frames == 0 {
                self.pinned.remove(&connection);
            }
        }
    }
}

impl Stream {
    fn next_batch(&mut self, bounds: &Bounds, now_ms: u64) -> Option<UpBatch> {
        if self.queue.is_empty() || self.unacked.len() >= bounds.batches_in_flight_max {
            return None;
        }
        let out_bytes: usize = self.unacked.iter().flat_map(|batch| &batch.frames).map(held_bytes).sum();
        let mut room = self.credit_bytes.saturating_sub(out_bytes);
        let mut frames = Vec::with_capacity(self.queue.len().min(bounds.batch_frames_max));
        while let Some(frame) = self.queue.front() {
            let bytes = held_bytes(frame);
            // The first of an empty window always fits, or a small credit would stop everything.
            let first = frames.is_empty() && self.unacked.is_empty();
            if frames.len() >= bounds.batch_frames_max || (bytes > room && !first) {
                break;
            }
            room = room.saturating_sub(bytes);
            frames.extend(self.queue.pop_front());
        }
        if frames.is_empty() {
            return None;
        }
        let number = self.next_number;
        self.next_number += 1;
        self.unacked.push_back(SentBatch { number, frames: frames.clone(), sent_ms: now_ms });
        Some(UpBatch { number, frames })
    }

    fn count_done(&mut self) -> bool {
        let mut any = false;
        while let Some((number, 0)) = self.placing.front().copied() {
            self.placing.pop_front();
            self.done_due = Some(number);
            any = true;
        }
        any
    }
}

fn held_bytes(frame: &UpFrame) -> usize {
    frame.body.len() + FRAME_OVERHEAD_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bounds() -> Bounds {
        Bounds {
            batch_frames_max: 4,
            batches_in_flight_max: 2,
            queue_bytes_max: 10_000,
            connection_frames_max: 400,
            stalled_ms_max: 500,
            dead_ms: 1_000,
        }
    }

    fn frame(connection: u64, command: u32) -> UpFrame {
        UpFrame { connection, command, ..Default::default() }
    }

    fn batch(up: Option<Up>) -> Option<UpBatch> {
        match up?.kind? {
            up::Kind::Batch(batch) => Some(batch),
            _ => None,
        }
    }

    #[test]
    fn two_batches_are_out_and_the_rest_waits() {
        let mut link = Link::new(bounds());
        let key = link.opened("s-1", 1 << 20, 0);
        for n in 0..10 {
            assert_eq!(link.offer(frame(n, 5), 0), Ok(key));
        }
        let first = batch(link.next_up(key, 0)).unwrap();
        let second = batch(link.next_up(key, 0)).unwrap();
        assert_eq!((first.frames.len(), second.frames.len(), second.number), (4, 4, 2));
        assert!(link.next_up(key, 0).is_none());
        assert_eq!(link.acked(key, 1, 7), vec![7]);
        assert_eq!(batch(link.next_up(key, 0)).unwrap().frames.len(), 2);
        link.acked(key, 3, 8);
        assert_eq!((link.pending(), link.pinned.len()), (0, 0));
    }

    #[test]
    fn a_break_gives_everything_back_in_order() {
        let mut link = Link::new(bounds());
        let key = link.opened("s-1", 1 << 20, 0);
        for n in 0..7 {
            link.offer(frame(1, n), 0).unwrap();
        }
        link.next_up(key, 0).unwrap();
        let back: Vec<u32> = link.broken(key).into_iter().map(|frame| frame.command).collect();
        assert_eq!(back, (0..7).collect::<Vec<_>>());
        assert!(link.offer(frame(1, 9), 0).is_err() && link.pinned.is_empty());
    }

    #[test]
    fn a_connection_stays_until_it_is_acknowledged() {
        let mut link = Link::new(bounds());
        let first = link.opened("s-1", 1 << 20, 0);
        for connection in 0..64 {
            link.offer(frame(connection, 5), 0).unwrap();
        }
        let second = link.opened("s-2", 1 << 20, 0);
        assert!((0..64).all(|c| link.offer(frame(c, 6), 0) == Ok(first)));
        let mut number = 0;
        while let Some(up) = batch(link.next_up(first, 0)) {
            number = up.number;
            link.acked(first, number, 0);
        }
        assert!(number > 0);
        let moved = (0..64).filter(|c| link.offer(frame(*c, 7), 0) == Ok(second)).count();
        assert!((10..54).contains(&moved), "{moved} of 64 moved");
    }

    #[test]
    fn a_stalled_or_full_stream_refuses() {
        let mut link = Link::new(bounds());
        let key = link.opened("s-1", 1 << 20, 0);
        // Long silence without work is no stall.
        link.offer(frame(1, 5), 10_000).unwrap();
        link.next_up(key, 10_000).unwrap();
        assert!(link.offer(frame(1, 5), 10_500).is_ok());
        assert!(link.offer(frame(1, 5), 10_501).is_err());
        link.acked(key, 1, 10_600);
        assert!(link.offer(frame(1, 5), 10_601).is_ok());
        let mut offered = 0;
        while link.offer(frame(2, 5), 10_601).is_ok() {
            offered += 1;
            assert!(offered < 1_000);
        }
    }

    #[test]
    fn silence_to_pings_is_death() {
        let mut link = Link::new(bounds());
        let key = link.opened("s-1", 1 << 20, 0);
        for now_ms in (0..=1_000).step_by(250) {
            assert!(link.ping(now_ms).is_empty(), "at {now_ms}");
        }
        assert!(matches!(link.next_up(key, 0).unwrap().kind, Some(up::Kind::Ping(_))));
        link.pong(key, 300);
        assert!(link.ping(1_250).is_empty());
        assert_eq!(link.ping(1_500), vec![key]);
        // A gateway that was paused itself judges nobody by that.
        assert!(link.ping(30_000).is_empty());
    }

    #[test]
    fn done_is_told_in_order_when_every_worker_has_placed() {
        let mut link = Link::new(bounds());
        let key = link.opened("s-1", 1 << 20, 0);
        link.placing(key, 1, 2);
        link.placing(key, 2, 1);
        assert!(!link.placed(key, 2) && !link.placed(key, 1));
        assert!(link.next_up(key, 0).is_none());
        assert!(link.placed(key, 1));
        let Some(up::Kind::Done(done)) = link.next_up(key, 0).unwrap().kind else { panic!() };
        assert_eq!(done.number, 2);
    }

    proptest! {
        /// Whatever breaks when, each frame is acknowledged or given back, once, and per connection in order.
        #[test]
        fn nothing_is_lost_or_doubled(steps in proptest::collection::vec((0u8..5, 0u64..6), 1..300)) {
            let mut link = Link::new(bounds());
            let mut keys = vec![link.opened("a", 300, 0), link.opened("b", 300, 0)];
            let mut offered = 0u32;
            let mut settled = Vec::new();
            let mut out: HashMap<StreamKey, VecDeque<UpBatch>> = HashMap::new();
            for (step, value) in steps {
                let key = keys[value as usize % 2];
                match step {
                    0 | 1 => if link.offer(frame(value, offered), 0).is_ok() { offered += 1 },
                    2 => if let Some(sent) = batch(link.next_up(key, 0)) { out.entry(key).or_default().push_back(sent) },
                    3 => if let Some(sent) = out.get_mut(&key).and_then(VecDeque::pop_front) {
                        link.acked(key, sent.number, 0);
                        settled.extend(sent.frames.iter().map(|f| (f.connection, f.command)));
                    },
                    _ => {
                        settled.extend(link.broken(key).iter().map(|f| (f.connection, f.command)));
                        out.remove(&key);
                        keys[value as usize % 2] = link.opened(if value % 2 == 0 { "a" } else { "b" }, 300, 0);
                    }
                }
            }
            for key in keys {
                settled.extend(link.broken(key).iter().map(|f| (f.connection, f.command)));
            }
            let mut numbers: Vec<u32> = settled.iter().map(|(_, n)| *n).collect();
            for connection in 0..6 {
                let of: Vec<u32> = settled.iter().filter(|(c, _)| *c == connection).map(|(_, n)| *n).collect();
                prop_assert!(of.is_sorted());
            }
            numbers.sort_unstable();
            prop_assert_eq!(numbers, (0..offered).collect::<Vec<_>>());
            prop_assert!(link.pinned.is_empty());
        }
    }
}
