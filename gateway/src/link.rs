//! The link's core: which state server gets a frame, what is un-acknowledged where, what to do when a stream breaks.
//! Pure (takes `now_ms`); owned by the bridge, behind one lock that only its thread takes.
//!
//! A frame is queued in one of two lanes of one stream, leaves in a numbered batch, and is kept until that number is
//! acknowledged. Logins have a lane of their own, with its own bounds: live frames leave first, and what waits for
//! a storm of logins is logins. When a stream breaks, everything un-acknowledged comes back, in order, to be offered
//! anew: every command is idempotent.
//!
//! Trap: frames of one connection must not overtake each other through two state servers, or through two lanes. A
//! connection is pinned to stream and lane while it has anything un-acknowledged there; only then do hash and command decide.

use std::collections::VecDeque;
use std::collections::hash_map::Entry;

use proto::link::{DownDone, Gone, LinkPing, Up, UpBatch, UpFrame, up};

use crate::batch::Ticket;
use crate::login_rate::{Pace, Returns};
use lane::{Lane, Room, held_bytes};
use pins::{Pin, Pins};

pub use lane::LaneKind;

mod lane;
#[cfg(test)]
mod model;
mod pins;
#[cfg(test)]
mod tests;

/// Names one opened stream; never used twice in a process.
pub type StreamKey = u64;

/// Limits of the core; see `config::Link`.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct Bounds {
    pub batch_frames_max: usize,
    pub batches_in_flight_max: usize,
    pub batch_beside_frames_min: usize,
    pub login_batch_frames_max: usize,
    pub login_batches_in_flight_max: usize,
    pub logins_waiting_max: usize,
    pub login_wait_ms_max: u64,
    pub login_retry_ms_max: u64,
    pub queue_bytes_max: usize,
    pub connection_frames_max: u32,
    pub stalled_ms_max: u64,
    pub dead_ms: u64,
    pub retry_after_ms: u64,
}

/// The part of `queue_bytes_max`, and of a stream's credit, that logins may take: live frames have the rest for certain.
pub(crate) const LOGIN_BYTES_PART: usize = 4;

/// A frame that no state server can take now.
#[derive(Debug, PartialEq)]
pub struct Refused {
    /// It.
    pub frame: UpFrame,
    /// When its client may come back.
    pub retry_after_ms: u64,
}

/// All streams.
pub struct Link {
    bounds: Bounds,
    streams: Vec<Stream>,
    pinned: Pins,
    /// Connections that have closed and whose users are to be unbound, as far as the lanes had no room for that: connection
    /// and user.
    departed: VecDeque<(u64, u64)>,
    notices: Vec<StreamKey>,
    next_key: StreamKey,
    pinged_ms: u64,
}

/// So many bytes leave beside a batch that is out, however few frames they are: waiting saves nothing any more.
const BATCH_BESIDE_BYTES_MIN: usize = 64 * 1024;

/// Live frames behind which departures wait elsewhere, so that a million of them stand before nobody's message.
const DEPARTURES_AHEAD_MAX: usize = 1_024;

/// Departures whose way was not clear, after which no more are tried at once.
const DEPARTURES_MISSED_MAX: usize = 64;

/// Departures that wait at most; twice as many as a gateway was ever measured with. 16 bytes each.
const DEPARTED_MAX: usize = 1 << 21;

struct Stream {
    key: StreamKey,
    state_id: String,
    /// What rendezvous hashing makes of the id.
    id_hash: u64,
    preferred: bool,
    live: Lane,
    logins: Lane,
    pace: Pace,
    returns: Returns,
    credit_bytes: usize,
    next_number: u64,
    pong_ms: u64,
    ping_due: Option<u64>,
    placing: VecDeque<(u64, usize)>,
    done_due: Option<u64>,
    done_also: Vec<u64>,
    gone: Vec<Gone>,
}

impl Link {
    /// Without streams.
    pub fn new(bounds: Bounds) -> Self {
        Link {
            bounds,
            streams: Vec::new(),
            pinned: Pins::default(),
            departed: VecDeque::new(),
            notices: Vec::new(),
            next_key: 1,
            pinged_ms: 0,
        }
    }

    /// A stream to `state_id` is open.
    pub fn opened(&mut self, state_id: &str, credit_bytes: u64, now_ms: u64) -> StreamKey {
        let key = self.next_key;
        self.next_key += 1;
        self.streams.push(Stream {
            key,
            state_id: state_id.to_owned(),
            id_hash: crpc::balance::id_hash(state_id),
            preferred: true,
            live: Lane::default(),
            logins: Lane::default(),
            pace: Pace::default(),
            returns: Returns::new(self.bounds.retry_after_ms, self.bounds.login_retry_ms_max),
            credit_bytes: credit_bytes as usize,
            next_number: 1,
            pong_ms: now_ms,
            ping_due: None,
            placing: VecDeque::new(),
            done_due: None,
            done_also: Vec::new(),
            gone: Vec::new(),
        });
        key
    }

    /// The stream is no more. Returns what it had not acknowledged: live frames first, and each connection's in the order
    /// in which they were offered.
    pub fn broken(&mut self, key: StreamKey) -> Vec<UpFrame> {
        let Some(index) = self.streams.iter().position(|stream| stream.key == key) else { return Vec::new() };
        let stream = self.streams.remove(index);
        let frames: Vec<UpFrame> = stream.live.into_frames().chain(stream.logins.into_frames()).collect();
        for frame in &frames {
            self.pinned.remove_one(frame.connection);
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
        // Without a stream nobody will ever ask for them.
        let departed = if self.streams.is_empty() { 0 } else { self.departed.len() };
        departed + self.streams.iter().map(|s| s.live.pending() + s.logins.pending()).sum::<usize>()
    }

    /// Logins that have not left for a state server, over all streams.
    pub fn logins_waiting(&self) -> usize {
        self.streams.iter().map(|stream| stream.logins.waiting()).sum()
    }

    /// Queues a frame. `Ok` names the stream that has something to send; `Err` gives the frame back because there is
    /// no stream for it, or its lane is stalled or full.
    pub fn offer(&mut self, frame: UpFrame, now_ms: u64) -> Result<StreamKey, Refused> {
        let bounds = &self.bounds;
        let refused = |frame| Refused { frame, retry_after_ms: bounds.retry_after_ms };
        let entry = self.pinned.entry(frame.connection);
        let (index, kind) = match &entry {
            Entry::Occupied(pin) if pin.get().frames >= bounds.connection_frames_max => {
                return Err(refused(frame));
            }
            Entry::Occupied(pin) => {
                let key = pin.get().stream;
                (self.streams.iter().position(|stream| stream.key == key), pin.get().lane)
            }
            Entry::Vacant(_) => (home(&self.streams, frame.connection), LaneKind::of(&frame)),
        };
        let Some(stream) = index.and_then(|index| self.streams.get_mut(index)) else {
            return Err(refused(frame));
        };
        if !stream.has_room(kind, held_bytes(&frame), bounds, now_ms) {
            let retry_after_ms = match kind {
                LaneKind::Live => bounds.retry_after_ms,
                LaneKind::Logins => stream.login_retry_ms(now_ms),
            };
            return Err(Refused { frame, retry_after_ms });
        }
        entry.or_insert(Pin { stream: stream.key, lane: kind, frames: 0 }).frames += 1;
        match kind {
            LaneKind::Live => {
                stream.live.push(frame, now_ms);
            }
            LaneKind::Logins => {
                if stream.logins.push(frame, now_ms) {
                    stream.pace.begins(now_ms);
                }
            }
        }
        Ok(stream.key)
    }

    /// Queues the news that a connection has closed. It is never refused: without a lane for it, it waits until there is one.
    /// Gives the stream that has something to send.
    pub fn depart(&mut self, frame: UpFrame, now_ms: u64) -> Option<StreamKey> {
        let (connection, user) = (frame.connection, frame.user);
        if self.departed.is_empty()
            && self.is_clear(connection)
            && let Ok(key) = self.offer(frame, now_ms)
        {
            return Some(key);
        }
        if self.departed.len() < DEPARTED_MAX {
            self.departed.push_back((connection, user));
        }
        None
    }

    /// Streams that got something to send from among the departures, since the last time this was asked.
    pub fn take_notices(&mut self) -> Vec<StreamKey> {
        std::mem::take(&mut self.notices)
    }

    fn is_clear(&self, connection: u64) -> bool {
        home(&self.streams, connection)
            .is_some_and(|index| self.streams[index].live.waiting() < DEPARTURES_AHEAD_MAX)
    }

    /// Nothing follows a departure on its connection, so the order among them does not matter: those whose way is not clear
    /// go behind the others.
    fn let_depart(&mut self, now_ms: u64) {
        let mut misses = 0;
        for _ in 0..self.departed.len() {
            if misses == DEPARTURES_MISSED_MAX {
                return;
            }
            let Some((connection, user)) = self.departed.pop_front() else { return };
            let frame = UpFrame { connection, user, ..UpFrame::default() };
            match self.is_clear(connection).then(|| self.offer(frame, now_ms)) {
                Some(Ok(key)) if self.notices.contains(&key) => {}
                Some(Ok(key)) => self.notices.push(key),
                Some(Err(_)) | None => {
                    misses += 1;
                    self.departed.push_back((connection, user));
                }
            }
        }
        if self.departed.is_empty() && self.departed.capacity() > 0 {
            self.departed = VecDeque::new();
        }
    }

    /// Connections that are free to move go to these servers as long as one of them has a stream: the others have left
    /// the registry, and are draining.
    pub fn prefer(&mut self, state_ids: &[&str]) {
        for stream in &mut self.streams {
            stream.preferred = state_ids.contains(&stream.state_id.as_str());
        }
    }

    /// What to send next on this stream; `None`: nothing now.
    pub fn next_up(&mut self, key: StreamKey, now_ms: u64) -> Option<Up> {
        self.let_depart(now_ms);
        let bounds = &self.bounds;
        let stream = self.streams.iter_mut().find(|stream| stream.key == key)?;
        let kind = if let Some(nonce) = stream.ping_due.take() {
            up::Kind::Ping(LinkPing { nonce })
        } else if stream.done_due.is_some() || !stream.gone.is_empty() || !stream.done_also.is_empty() {
            let number = stream.done_due.take().unwrap_or(0);
            let (gone, also) = (std::mem::take(&mut stream.gone), std::mem::take(&mut stream.done_also));
            up::Kind::Done(DownDone { number, gone, also })
        } else {
            up::Kind::Batch(stream.next_batch(bounds, now_ms)?)
        };
        Some(Up { kind: Some(kind) })
    }

    /// Batches up to `upto` are answered, and those of `also`. Returns the newly acknowledged ones: of which
    /// lane, and for how long they were out, ms.
    pub fn acked(&mut self, key: StreamKey, upto: u64, also: &[u64], now_ms: u64) -> Vec<(LaneKind, u64)> {
        let Some(stream) = self.streams.iter_mut().find(|stream| stream.key == key) else {
            return Vec::new();
        };
        let mut out = Vec::new();
        // A lane is answered in order, so what is answered beyond the others is the oldest of its lane.
        let fits = |number: u64| number <= upto || also.contains(&number);
        while let Some(sent) = stream.live.acked(fits, now_ms) {
            out.push((LaneKind::Live, now_ms.saturating_sub(sent.sent_ms)));
            sent.frames.iter().for_each(|frame| self.pinned.remove_one(frame.connection));
        }
        while let Some(sent) = stream.logins.acked(fits, now_ms) {
            out.push((LaneKind::Logins, now_ms.saturating_sub(sent.sent_ms)));
            sent.frames.iter().for_each(|frame| self.pinned.remove_one(frame.connection));
            stream.pace.answered(sent.frames.len(), sent.full, now_ms);
        }
        out
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
        self.pinned.rest();
        for stream in &mut self.streams {
            stream.live.rest();
            stream.logins.rest();
            stream.ping_due = Some(now_ms);
            if we_slept {
                stream.pong_ms = now_ms;
                stream.live.forgive(now_ms);
                stream.logins.forgive(now_ms);
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

    /// One worker has placed its part of a down batch. `true`: there is something to tell. What is awaited does not wait for the
    /// batches before it, of which workers tell in their own time.
    pub fn placed(&mut self, ticket: Ticket) -> bool {
        let Ticket { stream: key, number, awaited } = ticket;
        let Some(stream) = self.streams.iter_mut().find(|stream| stream.key == key) else { return false };
        let Some((_, parts)) = stream.placing.iter_mut().find(|(n, _)| *n == number) else { return false };
        *parts = parts.saturating_sub(1);
        let is_whole = *parts == 0;
        if stream.count_done() {
            return true;
        }
        if awaited && is_whole {
            stream.done_also.push(number);
        }
        awaited && is_whole
    }

    /// Deliveries that found nobody, to be told to the state server that sent them; if it is not there any more, to any: the
    /// routes are stale for all.
    pub fn gone(&mut self, key: StreamKey, gone: Vec<Gone>) -> Option<StreamKey> {
        let index = self.streams.iter().position(|stream| stream.key == key).unwrap_or(0);
        let stream = self.streams.get_mut(index)?;
        stream.gone.extend(gone);
        Some(stream.key)
    }
}

/// Where a connection without a pin belongs: [`crpc::balance::rendezvous`], with the ids' hashes kept.
fn home(streams: &[Stream], connection: u64) -> Option<usize> {
    if streams.len() <= 1 {
        return streams.len().checked_sub(1);
    }
    let any_preferred = streams.iter().any(|stream| stream.preferred);
    let candidates = streams.iter().enumerate().filter(|(_, stream)| stream.preferred || !any_preferred);
    candidates
        .max_by_key(|(_, stream)| {
            (crpc::balance::score(connection, stream.id_hash), stream.state_id.as_str())
        })
        .map(|(index, _)| index)
}

impl Stream {
    fn has_room(&self, kind: LaneKind, bytes: usize, bounds: &Bounds, now_ms: u64) -> bool {
        let (lane, bytes_max) = match kind {
            LaneKind::Live => (&self.live, bounds.queue_bytes_max),
            LaneKind::Logins => (&self.logins, bounds.queue_bytes_max / LOGIN_BYTES_PART),
        };
        let all_bytes = self.live.held_bytes() + self.logins.held_bytes();
        if lane.is_stalled(now_ms, bounds.stalled_ms_max)
            || lane.held_bytes() + bytes > bytes_max
            || all_bytes + bytes > bounds.queue_bytes_max
        {
            return false;
        }
        if kind == LaneKind::Live {
            return true;
        }
        let waiting = self.logins.waiting();
        // Better told to come back than kept until nobody waits for the answer any more. But as many as leave others behind
        // may always wait: without such a batch nothing would tell that the pace has risen.
        let is_too_late = waiting > bounds.login_batch_frames_max
            && self.pace.wait_ms(waiting).is_some_and(|wait| wait > bounds.login_wait_ms_max);
        waiting < bounds.logins_waiting_max && !is_too_late
    }

    /// When a login that finds no room is to come back: behind those who wait, and behind those who were told so before.
    fn login_retry_ms(&mut self, now_ms: u64) -> u64 {
        let per_s = self.pace.per_s();
        let wait_ms = self.logins.pending() as u64 * 1000 / u64::from(per_s);
        self.returns.promise(now_ms, wait_ms, per_s)
    }

    fn next_batch(&mut self, bounds: &Bounds, now_ms: u64) -> Option<UpBatch> {
        let number = self.next_number;
        let free_bytes = self.credit_bytes.saturating_sub(self.live.out_bytes() + self.logins.out_bytes());
        let mut frames = None;
        // Few frames do not leave beside a batch that is out: they go with the next, which costs everybody behind less.
        let is_worth_it = self.live.batches_out() == 0
            || self.live.waiting() >= bounds.batch_beside_frames_min
            || self.live.waiting_bytes() >= BATCH_BESIDE_BYTES_MIN;
        if is_worth_it && self.live.batches_out() < bounds.batches_in_flight_max {
            let room = Room { frames: bounds.batch_frames_max, bytes: free_bytes };
            frames = self.live.leave(number, self.live.fitting(room), now_ms);
        }
        if frames.is_none() && self.logins.batches_out() < bounds.login_batches_in_flight_max {
            let of_logins = (self.credit_bytes / LOGIN_BYTES_PART).saturating_sub(self.logins.out_bytes());
            let room = Room { frames: bounds.login_batch_frames_max, bytes: free_bytes.min(of_logins) };
            let count = self.logins.fitting(room);
            if self.logins.may_leave_with_logins(count) {
                frames = self.logins.leave(number, count, now_ms);
            }
        }
        let frames = frames?;
        self.next_number += 1;
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
