//! A state server without its edge: no tonic, no tokio runtime, no clock of its own. For simulation; nothing else uses it.
//!
//! What `service`, `fan_out` and `marks` do in endless tasks is here one future each, polled by whoever simulates.
//!
//! Trap: the order in which a caller passes on what turns answer is the promise of the link; this hands it over as it is.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use proto::link::{Down, DownDone, UpBatch, UpHello};
use tokio::sync::mpsc;

use crate::config::Config;
use crate::core::Core;
use crate::fan_out::{self, Accepted};
use crate::gateways::{GatewayStream, Outgoing, Waiting};
use crate::lane::{Lane, Place};
use crate::store::Store;
use crate::turn::{Gateway, Outcomes};
use crate::{delivered, marks, repush, service};

pub use crate::clock::Clock;

/// Something under way.
pub type Job<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// A state server.
pub struct Server {
    core: Arc<Core>,
    accepted: mpsc::Receiver<Accepted>,
}

/// One stream of a gateway to it.
pub struct Stream {
    gateway: Gateway,
    down: GatewayStream,
    /// None: its gateway does not listen any more.
    waiting: Option<Waiting>,
    lane: Lane,
    number: u64,
    answered: service::Answered,
}

/// What came of a batch.
pub struct Turned {
    number: u64,
    outcomes: Outcomes,
}

impl Server {
    /// A life of its own.
    pub fn new(config: Config, life: u64, store: Box<dyn Store>, clock: Box<dyn Clock>) -> Self {
        let (core, accepted) = Core::for_simulation(config, store, clock, life);
        Server { core, accepted }
    }

    /// Pushes again what others did not, for ever.
    pub fn repush(&self) -> Job<()> {
        Box::pin(repush::run(self.core.clone()))
    }

    /// A gateway opens a stream: the stream, and what goes down it first.
    pub fn open(&self, hello: UpHello) -> (Stream, Down) {
        let (down, waiting) = self.core.gateways.open(hello.incarnation);
        let replay = Some(hello.replay_ms).filter(|ms| *ms > 0).map(Duration::from_millis);
        marks::catch_up(&self.core, hello.incarnation, replay);
        let first = service::first_down(&self.core);
        let (waiting, answered) = (Some(waiting), service::Answered::default());
        let gateway = service::gateway(hello);
        (Stream { gateway, down, waiting, lane: Lane::default(), number: 1, answered }, first)
    }

    /// A stream has ended, and what was begun on it.
    pub fn close(&self, stream: Stream) {
        self.core.gateways.close(stream.gateway.incarnation, &stream.down);
    }

    /// Whether another stream of the same gateway has taken the place of this one.
    pub fn is_over(&self, stream: &Stream) -> bool {
        stream.down.is_over(stream.gateway.incarnation, &self.core.gateways)
    }

    /// Does a batch.
    pub fn turn(&self, stream: &mut Stream, batch: UpBatch) -> Job<Turned> {
        let place = if service::has_logins(&batch) { Place::default() } else { stream.lane.next() };
        let job = service::turn(self.core.clone(), stream.gateway.clone(), batch, place);
        Box::pin(async move {
            let (number, outcomes) = job.await;
            Turned { number, outcomes }
        })
    }

    /// Hands on what came of a batch.
    pub fn pass_on(&self, stream: &Stream, turned: Turned) -> Job<()> {
        let (core, down) = (self.core.clone(), stream.down.clone());
        Box::pin(async move {
            service::pass_on(&core, &down, turned.number, turned.outcomes).await;
        })
    }

    /// A gateway has placed what was sent down; what is to be done about the rest.
    pub fn done(&self, stream: &Stream, done: DownDone) -> Option<Job<()>> {
        let gone = service::placed(&stream.down, done);
        let core = self.core.clone();
        (!gone.is_empty()).then(|| -> Job<()> { Box::pin(service::after_gone(core, gone)) })
    }

    /// Answers a ping.
    pub fn pong(&self, stream: &Stream, nonce: u64) -> Job<()> {
        let down = stream.down.clone();
        Box::pin(async move {
            down.send(Outgoing::Pong(nonce)).await;
        })
    }

    /// Pushes everything that was accepted since the last time: how many new messages, and the work.
    pub fn push(&mut self) -> Option<(u64, Job<()>)> {
        let mut round = Vec::new();
        while let Ok(accepted) = self.accepted.try_recv() {
            round.push(accepted);
        }
        let fresh = round.iter().filter(|accepted| !accepted.again).count() as u64;
        let core = self.core.clone();
        (!round.is_empty()).then(|| {
            let job: Job<()> = Box::pin(async move { fan_out::round(&core, &mut round).await });
            (fresh, job)
        })
    }

    /// Writes the mark, looks at those of others, and does what follows.
    pub fn tick(&self) -> Job<()> {
        let core = self.core.clone();
        Box::pin(async move { marks::tick(&core).await })
    }

    /// Writes delivered cursors.
    pub fn flush_delivered(&self) -> Job<()> {
        let core = self.core.clone();
        Box::pin(async move { delivered::flush(&core).await })
    }
}

impl Stream {
    /// Everything that waits to go down.
    pub fn downs(&mut self) -> Vec<Down> {
        let Some(waiting) = &mut self.waiting else { return Vec::new() };
        let some = waiting.take_now();
        if some.is_empty() {
            return Vec::new();
        }
        let (downs, number) = service::merge(some, self.number, &mut self.answered, waiting.unplaced());
        self.number = number;
        downs
    }

    /// Nobody is at its other end any more.
    pub fn hang_up(&mut self) {
        self.waiting = None;
    }
}

/// Logins have batches, and an order, of their own.
pub fn has_logins(batch: &UpBatch) -> bool {
    service::has_logins(batch)
}
