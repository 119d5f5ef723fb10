//! What crosses between a worker and the bridge: one batch a loop turn in each direction. Plain data.
//!
//! Trap: bodies of a batch up share one buffer, so that a frame costs no allocation. Whoever keeps one body keeps them
//! all; the link keeps batches only until they are acknowledged.

use bytes::{Bytes, BytesMut};

/// From a worker to the bridge.
#[derive(Debug, Default)]
pub struct UpBatch {
    /// In the order in which they were read, so in order per connection.
    pub frames: Vec<UpFrame>,
    /// The bodies, one behind the other.
    pub bodies: BytesMut,
    /// Targets of down batches that were not there.
    pub gone: Vec<proto::link::Gone>,
    /// Down batches whose part for this worker is placed, but for what `gone` above tells.
    pub placed: Vec<Placed>,
    /// What it is charged to the burst budget, from its worker to the bridge.
    pub charge: crate::burst::Batch,
}

impl UpBatch {
    /// Whether there is anything to send.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty() && self.placed.is_empty() && self.gone.is_empty()
    }

    /// Memory that it holds.
    pub fn held_bytes(&self) -> usize {
        self.bodies.capacity()
            + self.frames.capacity() * size_of::<UpFrame>()
            + self.gone.capacity() * size_of::<proto::link::Gone>()
            + self.placed.capacity() * size_of::<Placed>()
    }
}

/// One frame of a client, with who sent it stamped on.
#[derive(Debug)]
pub struct UpFrame {
    /// The connection's id.
    pub connection: u64,
    /// 0 before login.
    pub user: u64,
    /// 0 before login.
    pub device: u32,
    /// 0 before login.
    pub binding: u64,
    /// The command byte; 0: the connection has closed.
    pub command: u8,
    /// Bytes in `UpBatch::bodies`, behind those of the frame before.
    pub body_bytes: u32,
}

/// Says which down batch of which stream something belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket {
    /// One opened stream; never used twice.
    pub stream: u64,
    /// The batch's number in it.
    pub number: u64,
    /// Whoever sent it waits for the news that it is placed.
    pub awaited: bool,
}

/// A down batch whose part for one worker is placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placed {
    /// Which.
    pub ticket: Ticket,
    /// How many of `UpBatch::gone`, behind those of the one before, were in it: whoever sent them wants to know.
    pub gone: usize,
}

/// From the bridge to a worker.
#[derive(Debug)]
pub enum Down {
    /// Frames for connections.
    Batch {
        /// In order per connection.
        items: Vec<DownItem>,
        /// To be handed back when they are placed. None for answers of the bridge itself.
        ticket: Option<Ticket>,
    },
    /// Accept no more; ask everybody to leave within this time.
    Drain {
        /// Milliseconds that clients are told.
        within_ms: u32,
    },
    /// Ask everybody to Sync.
    Resync,
    /// Close everything and end.
    Stop,
}

/// One delivery.
#[derive(Debug, Default)]
pub struct DownItem {
    /// The connection's id.
    pub connection: u64,
    /// Delivered only if the connection is bound to this user; 0: whoever is there.
    pub user: u64,
    /// Whole wire frames.
    pub frames: Bytes,
    /// Who the connection is from now on.
    pub bind: Option<proto::link::Bind>,
    /// Close behind the frames.
    pub close: bool,
    /// With `user` 0: the login that this answers, see `Connection::binding`.
    pub login: u64,
    /// May be skipped for a slow reader, who Syncs later.
    pub push: bool,
    /// It refuses a login that may have been a guess.
    pub guess: bool,
    /// Written behind whatever else there is to write.
    pub later: bool,
    /// Why the gateway itself closes it.
    pub refused: Option<proto::wire::Code>,
}
