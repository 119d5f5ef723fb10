//! The gateways that have a stream open to this server, by incarnation, and what waits to go down each. Shared by all
//! tasks of the state server's thread.
//!
//! Trap: a gateway that does not read must not hold up the others. What a turn answers waits for room, because only its
//! own gateway waits with it; what goes to other gateways (pushes, kicks) never waits, and is noted as missed instead.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use bytes::Bytes;
use parking_lot::RwLock;
use proto::link::{DownFrame, Push};
use tokio::sync::mpsc;

use crate::missed::Missed;
use crate::unplaced::{Pushes, Unplaced};

/// Something on its way down one stream.
#[derive(Debug)]
pub enum Outgoing {
    /// Answers, and the batch they answer when they are all.
    Answers {
        /// May be empty.
        frames: Vec<DownFrame>,
        /// The up batch that this answers; 0: none.
        acked: u64,
    },
    /// Pushes.
    Pushes(Pushes),
    /// Pushes that nothing rests on: receipts, presence, who is writing.
    Hints(Vec<Push>),
    /// The answer to a ping.
    Pong(u64),
}

/// The way down one stream.
#[derive(Debug, Clone)]
pub struct GatewayStream {
    key: u64,
    down: mpsc::Sender<Outgoing>,
    waiting_bytes: Arc<AtomicUsize>,
    unplaced: Arc<Unplaced>,
}

/// The other end of that way.
#[derive(Debug)]
pub struct Waiting {
    down: mpsc::Receiver<Outgoing>,
    waiting_bytes: Arc<AtomicUsize>,
    unplaced: Arc<Unplaced>,
}

impl Outgoing {
    /// About what it takes in memory and on the stream.
    fn bytes(&self) -> usize {
        match self {
            Outgoing::Answers { frames, .. } => frames.iter().map(|frame| frame.frames.len() + 48).sum(),
            Outgoing::Pushes(Pushes { pushes, .. }) | Outgoing::Hints(pushes) => {
                pushes.iter().map(|push| push.frame.len() + 16 * push.connections.len() + 16).sum()
            }
            Outgoing::Pong(_) => 16,
        }
    }
}

/// All of them.
#[derive(Debug, Default)]
pub struct Gateways {
    streams: RwLock<HashMap<u32, GatewayStream>>,
    next_key: AtomicU64,
    missed: Arc<Missed>,
}

/// Messages that may wait on one stream.
const DOWN_WAITING_MAX: usize = 4096;

/// Bytes that may wait on one stream before pushes to it are not taken any more.
const DOWN_WAITING_BYTES_MAX: usize = 32 * 1024 * 1024;

impl Gateways {
    /// A gateway has opened a stream. A newer stream of the same incarnation takes the older one's place.
    pub fn open(&self, incarnation: u32) -> (GatewayStream, Waiting) {
        let (down, waiting) = mpsc::channel(DOWN_WAITING_MAX);
        let waiting_bytes = Arc::new(AtomicUsize::new(0));
        let unplaced = Arc::new(Unplaced::new(incarnation, self.missed.clone()));
        let waiting =
            Waiting { down: waiting, waiting_bytes: waiting_bytes.clone(), unplaced: unplaced.clone() };
        let key = self.next_key.fetch_add(1, Ordering::Relaxed);
        let stream = GatewayStream { key, down, waiting_bytes, unplaced };
        self.streams.write().insert(incarnation, stream.clone());
        (stream, waiting)
    }

    /// The stream has ended.
    pub fn close(&self, incarnation: u32, stream: &GatewayStream) {
        let mut streams = self.streams.write();
        if streams.get(&incarnation).is_some_and(|known| known.key == stream.key) {
            streams.remove(&incarnation);
        }
    }

    /// What could not be handed to gateways.
    pub fn missed(&self) -> &Missed {
        &self.missed
    }

    /// Whether this gateway has a stream here that takes more.
    pub fn has_room(&self, incarnation: u32) -> bool {
        self.streams.read().get(&incarnation).is_some_and(|stream| {
            stream.waiting_bytes.load(Ordering::Relaxed) < DOWN_WAITING_BYTES_MAX / 2
                && stream.down.capacity() > DOWN_WAITING_MAX / 2
        })
    }

    /// Whether this gateway has a stream here.
    pub fn is_open(&self, incarnation: u32) -> bool {
        self.streams.read().contains_key(&incarnation)
    }

    /// Streams that are open.
    pub fn count(&self) -> usize {
        self.streams.read().len()
    }

    /// Pushes each frame to its connections with their users, where their gateways take it now.
    pub fn hint(&self, frames: impl IntoIterator<Item = (Bytes, Vec<(u64, u64)>)>) -> Hinted {
        let mut per_gateway: BTreeMap<u32, (Vec<Push>, u64)> = BTreeMap::new();
        for (frame, targets) in frames {
            let mut by_gateway: BTreeMap<u32, Vec<(u64, u64)>> = BTreeMap::new();
            for (connection, user) in targets {
                by_gateway.entry(proto::incarnation_of(connection)).or_default().push((connection, user));
            }
            for (incarnation, targets) in by_gateway {
                let (pushes, count) = per_gateway.entry(incarnation).or_default();
                *count += targets.len() as u64;
                pushes.push(push_to(frame.clone(), &targets, true));
            }
        }
        let mut hinted = Hinted::default();
        for (incarnation, (pushes, count)) in per_gateway {
            match self.try_send(incarnation, Outgoing::Hints(pushes)) {
                Ok(()) => hinted.pushed += count,
                Err(_) => hinted.refused.push(incarnation),
            }
        }
        hinted
    }

    /// Sends without waiting. Given back: there is no such gateway here, or it does not read.
    pub fn try_send(&self, incarnation: u32, outgoing: Outgoing) -> Result<(), Outgoing> {
        let streams = self.streams.read();
        let Some(stream) = streams.get(&incarnation) else { return Err(outgoing) };
        if stream.waiting_bytes.load(Ordering::Relaxed) > DOWN_WAITING_BYTES_MAX {
            return Err(outgoing);
        }
        let bytes = outgoing.bytes();
        stream.waiting_bytes.fetch_add(bytes, Ordering::Relaxed);
        stream.down.try_send(outgoing).map_err(|error| {
            stream.waiting_bytes.fetch_sub(bytes, Ordering::Relaxed);
            match error {
                mpsc::error::TrySendError::Full(back) | mpsc::error::TrySendError::Closed(back) => back,
            }
        })
    }
}

/// What became of frames that are told once.
#[derive(Debug, Default)]
pub struct Hinted {
    /// So many connections are told.
    pub pushed: u64,
    /// These gateways did not take theirs.
    pub refused: Vec<u32>,
}

impl GatewayStream {
    /// Sends, waiting for room. `false`: the stream has ended.
    pub async fn send(&self, outgoing: Outgoing) -> bool {
        self.waiting_bytes.fetch_add(outgoing.bytes(), Ordering::Relaxed);
        self.down.send(outgoing).await.is_ok()
    }

    /// What its gateway has not placed yet.
    pub fn unplaced(&self) -> &Unplaced {
        &self.unplaced
    }

    /// Whether another stream of the same gateway has taken the place of this one, or nobody is at its other end.
    pub fn is_over(&self, incarnation: u32, gateways: &Gateways) -> bool {
        let streams = gateways.streams.read();
        self.down.is_closed() || streams.get(&incarnation).is_none_or(|known| known.key != self.key)
    }
}

impl Waiting {
    /// Everything that waits, up to about `bytes_max`; waits for the first. Empty: the stream has ended.
    pub async fn take(&mut self, bytes_max: usize) -> Vec<Outgoing> {
        let mut some = Vec::new();
        let mut bytes = 0;
        let mut next = self.down.recv().await;
        while let Some(outgoing) = next {
            bytes += outgoing.bytes();
            some.push(outgoing);
            next = if bytes < bytes_max { self.down.try_recv().ok() } else { None };
        }
        self.waiting_bytes.fetch_sub(bytes, Ordering::Relaxed);
        some
    }

    /// Everything that waits now.
    pub fn take_now(&mut self) -> Vec<Outgoing> {
        let mut some = Vec::new();
        while let Ok(outgoing) = self.down.try_recv() {
            self.waiting_bytes.fetch_sub(outgoing.bytes(), Ordering::Relaxed);
            some.push(outgoing);
        }
        some
    }

    /// Where the batches that leave are noted.
    pub fn unplaced(&self) -> &Unplaced {
        &self.unplaced
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.down.close();
        while let Ok(outgoing) = self.down.try_recv() {
            if let Outgoing::Pushes(pushes) = outgoing {
                self.unplaced.never_left(&pushes);
            }
        }
    }
}

/// A push to several connections, as columns. `later`: behind whatever else their gateway has to write.
pub fn push_to(frame: Bytes, targets: &[(u64, u64)], later: bool) -> Push {
    Push {
        frame,
        later,
        connections: targets.iter().map(|(connection, _)| *connection).collect(),
        users: targets.iter().map(|(_, user)| *user).collect(),
    }
}
