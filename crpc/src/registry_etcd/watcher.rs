//! One task per watched service: applies what a watch says, lists everything now and then, and publishes tables.
//!
//! Trap: a watch is a hint. It may be cancelled, compacted away or silently dead; whatever happens to it, the answer is
//! the same: list, and open a new one. Until that works the last table stays published.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};

use super::line::{self, Line, Listing, Watching};
use super::{Backoff, pb};
use crate::registry::{Endpoint, RegistryError, Table};

pub(super) struct Watcher {
    line: Arc<Line>,
    folder: String,
    relist: Duration,
    tables: watch::Sender<Arc<Table>>,
    endpoints: BTreeMap<Vec<u8>, Arc<Endpoint>>,
    /// What is at or below this revision is in `endpoints` already.
    revision: i64,
}

impl Watcher {
    /// Lists once, so that the first table is real.
    pub(super) async fn start(
        line: Arc<Line>,
        folder: String,
        relist: Duration,
    ) -> Result<(Self, watch::Receiver<Arc<Table>>), RegistryError> {
        let (tables, receiver) = watch::channel(Arc::default());
        let listing = line.list(&folder).await?;
        let mut watcher = Self { line, folder, relist, tables, endpoints: BTreeMap::new(), revision: 0 };
        watcher.replace(listing);
        Ok((watcher, receiver))
    }

    /// Follows until nobody listens any more.
    pub(super) async fn run(mut self) {
        let tables = self.tables.clone();
        tokio::select! {
            () = tables.closed() => {}
            () = self.follow() => {}
        }
    }

    async fn follow(&mut self) {
        let mut backoff = Backoff::new();
        loop {
            let began = Instant::now();
            let why = match self.watch_once().await {
                Ok(never) => match never {},
                Err(why) => why,
            };
            tracing::warn!(folder = self.folder, why, "watch ended; the last table stays in use");
            if began.elapsed() > HEALTHY {
                backoff.reset();
            }
            loop {
                sleep(backoff.take()).await;
                match self.line.list(&self.folder).await {
                    Ok(listing) => {
                        tracing::info!(folder = self.folder, "listed again");
                        break self.replace(listing);
                    }
                    Err(error) => tracing::debug!(folder = self.folder, %error, "not listed; trying again"),
                }
            }
        }
    }

    /// Opens a watch behind the last revision and applies it until something is wrong with it.
    async fn watch_once(&mut self) -> Result<std::convert::Infallible, String> {
        let Watching { asks, mut answers } =
            self.line.watch(&self.folder, self.revision + 1).await.map_err(|error| error.to_string())?;
        let mut relist_at = Instant::now() + self.jittered_relist();
        let mut heard_at = Instant::now();
        let mut ask_at = heard_at + HEARTBEAT;
        loop {
            tokio::select! {
                answer = answers.message() => {
                    let answer = answer.map_err(|status| line::said(&status))?;
                    heard_at = Instant::now();
                    self.apply(answer.ok_or("closed by etcd")?)?;
                }
                () = sleep_until(ask_at) => {
                    if heard_at.elapsed() > HEARTBEAT * 3 {
                        return Err(format!("silent for {:?}", heard_at.elapsed()));
                    }
                    let progress = pb::watch_request::RequestUnion::ProgressRequest(pb::WatchProgressRequest {});
                    // A full queue means that etcd reads nothing; the silence will tell.
                    let _ = asks.try_send(pb::WatchRequest { request_union: Some(progress) });
                    ask_at = Instant::now() + HEARTBEAT;
                }
                () = sleep_until(relist_at) => {
                    let listing = self.line.list(&self.folder).await.map_err(|error| error.to_string())?;
                    self.replace(listing);
                    relist_at = Instant::now() + self.jittered_relist();
                }
            }
        }
    }

    fn apply(&mut self, answer: pb::WatchResponse) -> Result<(), String> {
        if answer.canceled || answer.compact_revision > 0 {
            return Err(format!("cancelled by etcd: {}", answer.cancel_reason));
        }
        for event in answer.events {
            let deleted = event.r#type() == pb::event::EventType::Delete;
            let Some(kv) = event.kv else { continue };
            if kv.mod_revision <= self.revision {
                continue; // a list made since has it
            }
            match if deleted { None } else { line::read(&self.folder, &kv) } {
                Some(endpoint) => drop(self.endpoints.insert(kv.key, endpoint)),
                None => drop(self.endpoints.remove(&kv.key)),
            }
        }
        self.publish();
        Ok(())
    }

    fn replace(&mut self, listing: Listing) {
        self.revision = listing.revision;
        self.endpoints = listing.endpoints.into_iter().collect();
        self.publish();
    }

    fn publish(&self) {
        let table = Table::new(self.endpoints.values().cloned());
        self.tables.send_if_modified(|last| {
            let changed = **last != table;
            if changed {
                *last = Arc::new(table);
            }
            changed
        });
    }

    /// Watchers that started together do not list together.
    fn jittered_relist(&self) -> Duration {
        self.relist.mul_f64(rand::random_range(0.9..1.0))
    }
}

/// How often etcd is asked for a sign of life on the watch.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// A watch that lived so long was no failure to start.
const HEALTHY: Duration = Duration::from_secs(10);
