//! The registry on etcd: one key per endpoint under a lease, and watches. Tasks on the caller's tokio runtime do the work.
//!
//! Trap: etcd forgets a lease when its owner was paused for longer, and a watch can die silently. So every registration
//! asks after its lease each second and starts over when it is gone, and a watch is only a hint beside full lists.

mod keeper;
mod line;
mod watcher;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{oneshot, watch};

use self::keeper::Keeper;
use self::line::Line;
use self::watcher::Watcher;
use crate::config::RegistryConfig;
use crate::registry::{Endpoint, Registration, Registry, RegistryError, Table};

/// etcd's calls, generated from `etcd.proto`.
#[allow(missing_docs, clippy::all)]
mod pb {
    tonic::include_proto!("etcdserverpb");
}

/// A connection to etcd and the rules for keys.
pub(crate) struct EtcdRegistry {
    line: Arc<Line>,
    prefix: String,
    lease: Duration,
    relist: Duration,
}

impl EtcdRegistry {
    /// What contradicts.
    pub(crate) fn check(config: &RegistryConfig) -> Result<(), RegistryError> {
        for (key, value) in [
            ("lease_s", config.lease_s),
            ("relist_s", config.relist_s),
            ("connect_ms_max", config.connect_ms_max),
        ] {
            if value == 0 {
                return Err(RegistryError::Config(format!("registry.{key} is 0: set it to at least 1")));
            }
        }
        EtcdRegistry::line(config).map(drop)
    }

    fn line(config: &RegistryConfig) -> Result<Line, RegistryError> {
        Line::new(&config.endpoints, Duration::from_millis(config.connect_ms_max))
    }

    /// Connects; fails when none of the endpoints answers in time.
    pub(crate) async fn open(config: &RegistryConfig) -> Result<Self, RegistryError> {
        let registry = Self {
            line: Arc::new(EtcdRegistry::line(config)?),
            prefix: format!("{}/", config.prefix.trim_end_matches('/')),
            lease: Duration::from_secs(config.lease_s),
            relist: Duration::from_secs(config.relist_s),
        };
        // A server that accepts the connection may still be unable to answer (no leader, not etcd at all).
        registry.line.list(&registry.folder("nothing")).await?;
        Ok(registry)
    }

    /// What the keys of a service begin with.
    fn folder(&self, service: &str) -> String {
        format!("{}{service}/", self.prefix)
    }
}

#[async_trait::async_trait]
impl Registry for EtcdRegistry {
    async fn register(&self, endpoint: Endpoint) -> Result<Registration, RegistryError> {
        endpoint.check()?;
        let key = format!("{}{}", self.folder(&endpoint.service), endpoint.id);
        let (report, reports) = watch::channel(endpoint.report.clone());
        let (stop, stopped) = oneshot::channel();
        let mut keeper = Keeper::new(self.line.clone(), key, endpoint, reports, self.lease, self.relist);
        let lease = keeper.enter().await?;
        Ok(Registration::new(report, stop, tokio::spawn(keeper.run(lease, stopped))))
    }

    async fn watch(&self, service: &str) -> Result<watch::Receiver<Arc<Table>>, RegistryError> {
        let (watcher, receiver) =
            Watcher::start(self.line.clone(), self.folder(service), self.relist).await?;
        tokio::spawn(watcher.run());
        Ok(receiver)
    }

    async fn list(&self, service: &str) -> Result<Table, RegistryError> {
        let listing = self.line.list(&self.folder(service)).await?;
        Ok(Table::new(listing.endpoints.into_iter().map(|(_, endpoint)| endpoint)))
    }
}

/// Waits between tries: doubling from 100 ms to 1 s, each at random between half and the whole, so that a fleet does not
/// come back in step.
struct Backoff {
    next: Duration,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(100);
    const LAST: Duration = Duration::from_secs(1);

    fn new() -> Self {
        Self { next: Self::FIRST }
    }

    fn reset(&mut self) {
        self.next = Self::FIRST;
    }

    fn take(&mut self) -> Duration {
        let whole = self.next;
        self.next = (whole * 2).min(Self::LAST);
        whole.mul_f64(rand::random_range(0.5..1.0))
    }
}
