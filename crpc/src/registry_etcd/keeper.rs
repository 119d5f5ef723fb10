//! One task per registration: holds the lease, writes the latest report, and enters the endpoint anew when the lease is
//! gone.
//!
//! Trap: it never gives up. etcd being away is not a reason to end, only to try again; ending is `stop`'s privilege.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep};

use super::Backoff;
use super::line::Line;
use crate::registry::{Endpoint, RegistryError};

pub(super) struct Keeper {
    line: Arc<Line>,
    key: String,
    endpoint: Endpoint,
    reports: watch::Receiver<serde_json::Value>,
    lease: Duration,
    /// How often the key is written though nothing changed, in case somebody deleted it.
    rewrite: Duration,
}

impl Keeper {
    pub(super) fn new(
        line: Arc<Line>,
        key: String,
        endpoint: Endpoint,
        reports: watch::Receiver<serde_json::Value>,
        lease: Duration,
        rewrite: Duration,
    ) -> Self {
        Self { line, key, endpoint, reports, lease, rewrite }
    }

    /// Gets a lease and writes the key under it.
    pub(super) async fn enter(&mut self) -> Result<i64, RegistryError> {
        let lease = self.line.grant(self.lease).await?;
        self.write(lease).await?;
        tracing::info!(key = self.key, lease, "registered");
        Ok(lease)
    }

    /// Keeps the endpoint registered until `stopped`, then deletes it.
    pub(super) async fn run(mut self, mut lease: i64, mut stopped: oneshot::Receiver<()>) {
        loop {
            let lost = tokio::select! {
                biased;
                _ = &mut stopped => false,
                () = self.hold(lease) => true,
            };
            if !lost {
                break;
            }
            tracing::warn!(key = self.key, lease, "the lease is gone; registering again");
            let mut entering = std::pin::pin!(self.enter_again());
            lease = tokio::select! {
                biased;
                _ = &mut stopped => return,
                lease = &mut entering => lease,
            };
        }
        // Revoking takes only what hangs on our own lease: a successor with the same id keeps its key.
        match self.line.revoke(lease).await {
            Ok(()) => tracing::info!(key = self.key, "deregistered"),
            Err(error) => tracing::warn!(key = self.key, %error, "not deregistered; the lease will end it"),
        }
    }

    /// Renews and writes until the lease is known to be gone.
    async fn hold(&mut self, lease: i64) {
        // A fifth of the lease, and at most a second: a process that was paused is back within two.
        let every = (self.lease / 5).min(RENEW_MAX);
        let mut renew = interval_at(Instant::now() + every, every);
        renew.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut rewrite_at = Instant::now() + self.rewrite;
        let mut written = true;
        loop {
            tokio::select! {
                // The lease comes first, however fast reports come.
                biased;
                _ = renew.tick() => match self.renew(lease).await {
                    Ok(true) => {}
                    Ok(false) => return,
                    Err(error) => tracing::warn!(key = self.key, %error, "lease not renewed; trying again"),
                },
                changed = self.reports.changed() => if changed.is_ok() {
                    written = false;
                } else {
                    // The handle is gone and `stopped` is about to say so.
                    std::future::pending::<()>().await;
                },
            }
            if written && Instant::now() < rewrite_at {
                continue;
            }
            match self.write(lease).await {
                Ok(()) => {
                    written = true;
                    rewrite_at = Instant::now() + self.rewrite;
                    // Reports that come meanwhile are one write.
                    sleep(WRITE_PAUSE).await;
                }
                // The next renewal comes by here again, and says whether the lease is gone. A refusal does not: an etcd that is full takes no
                // writes, and renews.
                Err(error) => tracing::warn!(key = self.key, %error, "not written; trying again"),
            }
        }
    }

    async fn renew(&self, lease: i64) -> Result<bool, RegistryError> {
        crate::failpoint::here("lease_renewal");
        self.line.keep_alive(lease).await
    }

    async fn enter_again(&mut self) -> i64 {
        let mut backoff = Backoff::new();
        loop {
            match self.enter().await {
                Ok(lease) => return lease,
                Err(error) => tracing::warn!(key = self.key, %error, "not registered; trying again"),
            }
            sleep(backoff.take()).await;
        }
    }

    async fn write(&mut self, lease: i64) -> Result<(), RegistryError> {
        self.endpoint.report = self.reports.borrow_and_update().clone();
        let value = serde_json::to_vec(&self.endpoint)
            .map_err(|error| RegistryError::Config(format!("endpoint cannot be written: {error}")))?;
        self.line.put(&self.key, value, lease).await
    }
}

const RENEW_MAX: Duration = Duration::from_secs(1);
const WRITE_PAUSE: Duration = Duration::from_millis(50);
