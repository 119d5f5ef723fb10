//! The wish to stop, shared by all parts of a process. Cloneable, any thread; a small thread of its own listens for
//! signals.
//!
//! Trap: a second signal means "now": [`Shutdown::wait_hard`] and [`Shutdown::with_hard_limit`] see it, `wait` alone
//! does not.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use crate::process::Fatal;

/// A switch that goes from running to stopping to "now", and never back.
#[derive(Debug, Clone)]
pub struct Shutdown {
    stage: Arc<watch::Sender<Stage>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Running,
    Begun,
    Hard,
}

impl Shutdown {
    /// One that only [`Shutdown::begin`] sets off.
    pub fn new() -> Self {
        Self { stage: Arc::new(watch::Sender::new(Stage::Running)) }
    }

    /// One that SIGTERM and SIGINT set off too; the second signal makes it hard. Handlers are in place on return.
    pub fn on_signals() -> Result<Self, Fatal> {
        let shutdown = Self::new();
        let (ready, installed) = std::sync::mpsc::channel();
        let listener = shutdown.clone();
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || listen(&listener, &ready))
            .map_err(|error| Fatal::internal(format!("cannot start the signal thread: {error}")))?;
        match installed.recv() {
            Ok(Ok(())) => Ok(shutdown),
            Ok(Err(error)) => Err(Fatal::internal(format!("cannot listen for signals: {error}"))),
            Err(_) => Err(Fatal::internal("the signal thread died")),
        }
    }

    /// Begins to stop. Harmless when it has begun.
    pub fn begin(&self) {
        self.raise(Stage::Begun);
    }

    /// Stops now: hard limits count as passed.
    pub fn begin_hard(&self) {
        self.raise(Stage::Hard);
    }

    /// Whether stopping has begun.
    pub fn is_begun(&self) -> bool {
        *self.stage.borrow() >= Stage::Begun
    }

    /// Waits until stopping has begun.
    pub async fn wait(&self) {
        self.reach(Stage::Begun).await;
    }

    /// Waits until stopping may not take any longer.
    pub async fn wait_hard(&self) {
        self.reach(Stage::Hard).await;
    }

    /// Runs `future` to its end, but no longer than `limit` after stopping has begun (or after this call, if that is later),
    /// and not beyond a second signal. `None`: it was cut off.
    pub async fn with_hard_limit<F: Future>(&self, future: F, limit: Duration) -> Option<F::Output> {
        let cut = async {
            self.wait().await;
            tokio::select! {
                () = tokio::time::sleep(limit) => {}
                () = self.wait_hard() => {}
            }
        };
        tokio::select! {
            biased;
            output = future => Some(output),
            () = cut => None,
        }
    }

    fn raise(&self, to: Stage) {
        self.stage.send_if_modified(|stage| {
            let raise = *stage < to;
            if raise {
                *stage = to;
            }
            raise
        });
    }

    async fn reach(&self, wanted: Stage) {
        let mut stage = self.stage.subscribe();
        // The sender lives in `self`, so this cannot fail while we wait.
        let _ = stage.wait_for(|stage| *stage >= wanted).await;
    }
}

impl Default for Shutdown {
    fn default() -> Self {
        Self::new()
    }
}

type Installed = std::sync::mpsc::Sender<std::io::Result<()>>;

fn listen(shutdown: &Shutdown, ready: &Installed) {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_io().build() {
        Ok(runtime) => runtime,
        Err(error) => return drop(ready.send(Err(error))),
    };
    runtime.block_on(async {
        let (mut term, mut int) = match both() {
            Ok(signals) => signals,
            Err(error) => return drop(ready.send(Err(error))),
        };
        let _ = ready.send(Ok(()));
        loop {
            let name = tokio::select! {
                _ = term.recv() => "SIGTERM",
                _ = int.recv() => "SIGINT",
            };
            if shutdown.is_begun() {
                tracing::warn!(signal = name, "second signal, stopping now");
                shutdown.begin_hard();
            } else {
                tracing::info!(signal = name, "stopping");
                shutdown.begin();
            }
        }
    });
}

fn both() -> std::io::Result<(Signal, Signal)> {
    Ok((signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn hard_limit_counts_from_the_beginning_of_the_stop() {
        let shutdown = Shutdown::new();
        let limit = Duration::from_millis(20);
        let free = shutdown.with_hard_limit(tokio::time::sleep(limit * 3), limit).await;
        assert!(free.is_some(), "nothing is cut while running");
        shutdown.begin();
        let before = tokio::time::Instant::now();
        assert!(shutdown.with_hard_limit(std::future::pending::<()>(), limit).await.is_none());
        assert!(before.elapsed() >= limit);
    }

    #[tokio::test]
    async fn a_second_signal_cuts_at_once() {
        let shutdown = Shutdown::new();
        let other = shutdown.clone();
        shutdown.begin();
        other.begin_hard();
        shutdown.begin();
        let limit = Duration::from_secs(3600);
        assert!(shutdown.with_hard_limit(std::future::pending::<()>(), limit).await.is_none());
    }
}
