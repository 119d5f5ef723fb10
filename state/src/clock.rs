//! The clock that decisions are made by, and waiting. Of the machine in a server, of the seed in a simulation.
//!
//! Trap: whatever decides by time or waits, inside a turn, the fan-out, marks or pushing again, asks this and not tokio,
//! or a seed does not replay. Metrics may look at the real clock.

use std::future::Future;
use std::pin::Pin;
use std::time::{Duration, Instant};

/// Tells the time, and when some has passed.
pub trait Clock: Send + Sync {
    /// The time.
    fn now(&self) -> Instant;
    /// Ends when so much time has passed.
    fn pause(&self, wait: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>>;
}

/// The machine's. Needs a tokio runtime around it to wait.
#[derive(Debug, Clone, Copy, Default)]
pub struct TokioClock;

impl Clock for TokioClock {
    fn now(&self) -> Instant {
        Instant::now()
    }

    fn pause(&self, wait: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(tokio::time::sleep(wait))
    }
}
