//! The gateways that have a stream open to this server, by incarnation, and what waits to go down each. Shared by all
//! tasks of the state server's thread.
//!
//! Trap: a gateway that does not read must not hold up the others. What a turn answers waits for room, because only its
//! own gateway waits with it; what goes to other gateways (pushes, kicks) never waits.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::RwLock;
use proto::link::{DownFrame, Push};
use tokio::sync::mpsc;

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
    Pushes(Vec<Push>),
    /// The answer to a ping.
    Pong(u64),
}

/// The way down one stream.
#[derive(Debug, Clone)]
pub struct GatewayStream {
    key: u64,
    down: mpsc::Sender<Outgoing>,
}

/// All of them.
#[derive(Debug, Default)]
pub struct Gateways {
    streams: RwLock<HashMap<u32, GatewayStream>>,
    next_key: AtomicU64,
}

/// Messages that may wait on one stream.
const DOWN_WAITING_MAX: usize = 4096;

impl Gateways {
    /// A gateway has opened a stream. A newer stream of the same incarnation takes the older one's place.
    pub fn open(&self, incarnation: u32) -> (GatewayStream, mpsc::Receiver<Outgoing>) {
        let (down, waiting) = mpsc::channel(DOWN_WAITING_MAX);
        let stream = GatewayStream { key: self.next_key.fetch_add(1, Ordering::Relaxed), down };
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

    /// Streams that are open.
    pub fn count(&self) -> usize {
        self.streams.read().len()
    }

    /// Sends without waiting. `false`: there is no such gateway here, or it does not read.
    pub fn try_send(&self, incarnation: u32, outgoing: Outgoing) -> bool {
        self.streams.read().get(&incarnation).is_some_and(|stream| stream.down.try_send(outgoing).is_ok())
    }
}

impl GatewayStream {
    /// Sends, waiting for room. `false`: the stream has ended.
    pub async fn send(&self, outgoing: Outgoing) -> bool {
        self.down.send(outgoing).await.is_ok()
    }
}

/// A push to several connections, as columns.
pub fn push_to(frame: bytes::Bytes, targets: &[(u64, u64)]) -> Push {
    Push {
        frame,
        connections: targets.iter().map(|(connection, _)| *connection).collect(),
        users: targets.iter().map(|(_, user)| *user).collect(),
    }
}
