//! The order in which turns of one stream put their changes to the store. Pure; of whoever serves the stream.
//!
//! Trap: a place holds up those behind it until it is dropped. Drop it as soon as the store has been asked, not when it has
//! answered, or turns run one at a time.

use tokio::sync::oneshot;

/// The turns of one lane of a stream, each of which puts its changes to the store behind those of the turn before: one that
/// must ask for names first is not overtaken by one that need not.
#[derive(Debug, Default)]
pub struct Lane {
    last: Option<oneshot::Receiver<()>>,
}

/// A turn's place among those of its lane.
#[derive(Debug, Default)]
pub struct Place {
    before: Option<oneshot::Receiver<()>>,
    /// Dropped when this turn has asked for its changes, or has ended without any.
    _asked: Option<oneshot::Sender<()>>,
}

impl Lane {
    /// The place of the next turn.
    pub fn next(&mut self) -> Place {
        let (asked, last) = oneshot::channel();
        Place { before: self.last.replace(last), _asked: Some(asked) }
    }
}

impl Place {
    /// Returns when all turns before have asked.
    pub async fn come_up(&mut self) {
        if let Some(before) = self.before.take() {
            // It only ever ends by being dropped.
            let _ = before.await;
        }
    }
}
