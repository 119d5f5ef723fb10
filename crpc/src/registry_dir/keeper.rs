//! One task per registration: writes the latest report, and takes the name again when its files were removed.
//!
//! Trap: only the first try may fail. Afterwards whatever is wrong with the directory is a reason to try again; ending is
//! `stop`'s privilege.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

use super::claim::{Claim, Kept, Paths};
use super::folder::Folder;
use super::{blocking, lock, unusable};
use crate::registry::{Endpoint, RegistryError};

pub(super) struct Keeper {
    root: Arc<Path>,
    folder: Folder,
    paths: Paths,
    endpoint: Endpoint,
    reports: watch::Receiver<serde_json::Value>,
    /// None while the name is lost, or for good when a later registration has it.
    claim: Option<Arc<Claim>>,
}

impl Keeper {
    /// Removes what the dead left, takes the name and writes the endpoint.
    pub(super) async fn enter(
        root: Arc<Path>,
        folder: Folder,
        endpoint: Endpoint,
        reports: watch::Receiver<serde_json::Value>,
    ) -> Result<Self, RegistryError> {
        let paths = folder.paths(&endpoint.id);
        let mut keeper = Self { root, folder, paths, endpoint, reports, claim: None };
        let deadline = Instant::now() + TAKE_MAX;
        while !keeper.take().await? {
            if Instant::now() > deadline {
                return Err(keeper.held());
            }
            sleep(TAKE_PAUSE).await;
        }
        keeper.write(true).await?;
        tracing::info!(file = %keeper.paths.endpoint.display(), "registered");
        Ok(keeper)
    }

    /// Keeps the endpoint registered until `stopped`, then removes it.
    pub(super) async fn run(mut self, mut stopped: oneshot::Receiver<()>) {
        let mut look = interval(LOOK_EVERY);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut told = String::new();
        loop {
            let news = tokio::select! {
                biased;
                _ = &mut stopped => break,
                changed = self.reports.changed() => changed.is_ok(),
                _ = look.tick() => false,
            };
            match self.refresh(news).await {
                Ok(Kept::Superseded) => {
                    tracing::warn!(file = %self.paths.endpoint.display(), "registered again by this process");
                    self.claim = None;
                    let _ = stopped.await;
                    return;
                }
                Ok(_) => told.clear(),
                Err(error) => {
                    let error = error.to_string();
                    if error != told {
                        tracing::warn!(error, "not registered; trying again");
                        told = error;
                    }
                }
            }
            // Reports that come meanwhile are one write. And when the handle has gone, `stopped` is about to say so.
            tokio::select! {
                biased;
                _ = &mut stopped => break,
                () = sleep(WRITE_PAUSE) => {}
            }
        }
        self.leave().await;
    }

    /// Makes the files right, whatever happened to them.
    async fn refresh(&mut self, news: bool) -> Result<Kept, RegistryError> {
        crate::failpoint::here("lease_renewal");
        if self.claim.is_some() {
            match self.write(news).await? {
                Kept::Lost => tracing::warn!(lock = %self.paths.lock.display(), "the lock file was removed"),
                kept => return Ok(kept),
            }
            // Its lock is on a file that nobody finds any more.
            self.claim = None;
        }
        if !self.take().await? {
            return Err(self.held());
        }
        tracing::info!(file = %self.paths.endpoint.display(), "registered again");
        self.write(true).await
    }

    /// One try.
    async fn take(&mut self) -> Result<bool, RegistryError> {
        let (folder, paths) = (self.folder.clone(), self.paths.clone());
        let taking = blocking(move || {
            folder.create()?;
            folder.clean()?;
            Claim::try_take(&paths)
        });
        self.claim = taking.await.map_err(|error| unusable(&self.root, &error))?.map(Arc::new);
        Ok(self.claim.is_some())
    }

    async fn write(&mut self, news: bool) -> Result<Kept, RegistryError> {
        let Some(claim) = self.claim.clone() else { return Ok(Kept::Lost) };
        self.endpoint.report = self.reports.borrow_and_update().clone();
        let text = serde_json::to_vec(&self.endpoint)
            .map_err(|error| RegistryError::Config(format!("endpoint cannot be written: {error}")))?;
        let kept = blocking(move || claim.keep(&text, news)).await;
        if kept.is_err() {
            // The report was not written, and nobody will say again that it is new.
            self.reports.mark_changed();
        }
        kept.map_err(|error| unusable(&self.root, &error))
    }

    async fn leave(mut self) {
        let Some(claim) = self.claim.take() else { return };
        match blocking(move || claim.release()).await {
            Ok(()) => tracing::info!(file = %self.paths.endpoint.display(), "deregistered"),
            Err(error) => {
                tracing::warn!(%error, "not removed; without its owner's lock it is dead all the same")
            }
        }
    }

    fn held(&self) -> RegistryError {
        let (service, id) = (self.endpoint.service.clone(), self.endpoint.id.clone());
        RegistryError::Held { service, id, holder: lock::holder(&self.paths.lock) }
    }
}

/// How long somebody may be in the way: others that look, each for microseconds, and a predecessor that is ending.
const TAKE_MAX: Duration = Duration::from_secs(1);
const TAKE_PAUSE: Duration = Duration::from_millis(10);

/// How often the files are looked after though nothing changed, in case somebody removed them.
const LOOK_EVERY: Duration = Duration::from_secs(1);
const WRITE_PAUSE: Duration = Duration::from_millis(50);
