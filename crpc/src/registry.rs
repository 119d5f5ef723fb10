//! Who is there: servers register under a lease, and others watch them. Tables may be read on any thread; registering
//! and watching happen inside a tokio runtime.
//!
//! Trap: a table may be old. When the registry is away the last one stays in use, so an endpoint in it may be gone, and
//! whoever calls it must cope.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

use crate::config::RegistryConfig;
use crate::process::Fatal;
use crate::registry_dir::DirRegistry;
use crate::registry_etcd::EtcdRegistry;

/// A server that can be reached. This is the JSON value of its key.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Endpoint {
    /// What it is: `state`, `gateway`, …
    pub service: String,
    /// Its name among its kind, such as `g-1`.
    pub id: String,
    /// `HOST:PORT` where it is reached.
    pub addr: String,
    /// Where it stands; may be empty.
    #[serde(default)]
    pub zone: String,
    /// Version of its build.
    #[serde(default)]
    pub version: String,
    /// What it last said about itself; see [`crate::report`].
    #[serde(default)]
    pub report: serde_json::Value,
}

impl Endpoint {
    /// With this build's version, no zone and no report.
    pub fn new(service: impl Into<String>, id: impl Into<String>, addr: impl Into<String>) -> Self {
        let version = crate::VERSION.to_owned();
        Self { service: service.into(), id: id.into(), addr: addr.into(), version, ..Default::default() }
    }

    /// Refuses names that cannot be parts of a key.
    pub(crate) fn check(&self) -> Result<(), RegistryError> {
        check_name("service", &self.service)?;
        check_name("id", &self.id)
    }
}

/// Names become parts of keys and of paths: not empty, not long, nothing but letters, digits, `-`, `_` and `.`, and
/// neither of the two folders that every folder has.
pub(crate) fn check_name(what: &str, name: &str) -> Result<(), RegistryError> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if !(1..=NAME_BYTES_MAX).contains(&name.len()) || !name.chars().all(fits) || [".", ".."].contains(&name) {
        return Err(RegistryError::Config(format!(
            "{what} {name:?} cannot be registered: use 1 to {NAME_BYTES_MAX} letters, digits, '-', '_' or '.'"
        )));
    }
    Ok(())
}

const NAME_BYTES_MAX: usize = 64;

/// The endpoints of one service, sorted by id. Cheap to clone.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Table {
    endpoints: Arc<[Arc<Endpoint>]>,
}

impl Table {
    /// Sorts them by id; of two with one id the later stays.
    pub fn new(endpoints: impl IntoIterator<Item = Arc<Endpoint>>) -> Self {
        let by_id = endpoints.into_iter().map(|endpoint| (endpoint.id.clone(), endpoint));
        let sorted: std::collections::BTreeMap<_, _> = by_id.collect();
        Self { endpoints: sorted.into_values().collect() }
    }

    /// The endpoint with this id.
    pub fn get(&self, id: &str) -> Option<&Arc<Endpoint>> {
        let place = self.endpoints.binary_search_by(|endpoint| endpoint.id.as_str().cmp(id)).ok()?;
        self.endpoints.get(place)
    }
}

impl std::ops::Deref for Table {
    type Target = [Arc<Endpoint>];

    fn deref(&self) -> &Self::Target {
        &self.endpoints
    }
}

/// Why the registry did not do what was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RegistryError {
    /// The configuration cannot work.
    #[error("{0}")]
    Config(String),
    /// etcd: nobody answers.
    #[error("etcd at {endpoints} does not answer: {reason}; start it or change registry.endpoints")]
    Unreachable {
        /// Where it was looked for.
        endpoints: String,
        /// What happened.
        reason: String,
    },
    /// etcd: it answered with an error.
    #[error("etcd refused: {0}")]
    Refused(String),
    /// Directory: it cannot be read or written.
    #[error("the registry's directory {path} cannot be used: {reason}; change registry.path")]
    Unusable {
        /// Where it is.
        path: String,
        /// What the system said.
        reason: String,
    },
    /// Directory: a living process has this name. (On etcd the later registration replaces the earlier one.)
    #[error(
        "{service} {id} is registered already, by {holder}: stop it, or give this server another node.id"
    )]
    Held {
        /// Of the endpoint.
        service: String,
        /// Of the endpoint.
        id: String,
        /// `process PID`, if it said so.
        holder: String,
    },
}

impl From<RegistryError> for Fatal {
    fn from(error: RegistryError) -> Self {
        match error {
            RegistryError::Config(message) => Fatal::config(message),
            other => Fatal::unavailable(other.to_string()),
        }
    }
}

/// A registry of servers.
#[async_trait::async_trait]
pub trait Registry: Send + Sync {
    /// Enters an endpoint, and keeps it there while the handle lives: after a lost lease or a restart of the registry it
    /// comes back by itself. Fails only when the first try does.
    async fn register(&self, endpoint: Endpoint) -> Result<Registration, RegistryError>;

    /// Follows a service. The table is there on return and stays at its last state while the registry is away.
    async fn watch(&self, service: &str) -> Result<watch::Receiver<Arc<Table>>, RegistryError>;

    /// The service's endpoints now.
    async fn list(&self, service: &str) -> Result<Table, RegistryError>;
}

/// What contradicts, without asking anybody.
pub fn check(config: &RegistryConfig) -> Result<(), RegistryError> {
    match config.kind.as_str() {
        "etcd" => EtcdRegistry::check(config),
        "directory" => DirRegistry::check(config).map(drop),
        other => Err(RegistryError::Config(format!(
            "registry.kind {other:?} is not known: set it to \"etcd\" or \"directory\""
        ))),
    }
}

/// Opens the configured registry. etcd must answer within `connect_ms_max`; a directory is created if it is missing.
pub async fn open(config: &RegistryConfig) -> Result<Arc<dyn Registry>, RegistryError> {
    check(config)?;
    if config.kind == "directory" {
        Ok(Arc::new(DirRegistry::open(config).await?))
    } else {
        Ok(Arc::new(EtcdRegistry::open(config).await?))
    }
}

/// A registered endpoint. Dropping it stops the renewal and deletes the entry as well as it can;
/// [`Registration::deregister`] waits for that.
#[derive(Debug)]
pub struct Registration {
    report: watch::Sender<serde_json::Value>,
    stop: Option<oneshot::Sender<()>>,
    task: Option<JoinHandle<()>>,
}

impl Registration {
    /// For implementations: `task` ends, with the entry deleted, when `stop` is sent or dropped.
    pub(crate) fn new(
        report: watch::Sender<serde_json::Value>,
        stop: oneshot::Sender<()>,
        task: JoinHandle<()>,
    ) -> Self {
        Self { report, stop: Some(stop), task: Some(task) }
    }

    /// Replaces the report. The latest wins; several in quick succession may become one write.
    pub fn report(&self, report: serde_json::Value) {
        self.report.send_if_modified(|last| {
            let changed = *last != report;
            *last = report;
            changed
        });
    }

    /// Deletes the entry, and returns when it is gone (or the registry could not be told in time: then the lease, or this
    /// process's end, does it).
    pub async fn deregister(mut self) {
        drop(self.stop.take());
        if let Some(task) = self.task.take() {
            let _ = tokio::time::timeout(DEREGISTER_MAX, task).await;
        }
    }

    /// Leaves the entry to its lease, or without its lock, as a killed process does. For tests.
    pub fn abandon(mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
        }
    }
}

const DEREGISTER_MAX: Duration = Duration::from_secs(3);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_sorted_and_found_by_id() {
        let endpoint = |id: &str, addr: &str| Arc::new(Endpoint::new("gateway", id, addr));
        let table = Table::new([endpoint("g-2", "b"), endpoint("g-1", "a"), endpoint("g-2", "c")]);
        let ids: Vec<_> =
            table.iter().map(|endpoint| (endpoint.id.as_str(), endpoint.addr.as_str())).collect();
        assert_eq!(ids, [("g-1", "a"), ("g-2", "c")]);
        assert_eq!(table.get("g-2").unwrap().addr, "c");
        assert!(table.get("g-3").is_none());
    }

    #[test]
    fn names_cannot_leave_their_key() {
        assert!(Endpoint::new("gateway", "g-1", "x").check().is_ok());
        for bad in ["", ".", "..", "a/b", "a b", "é", &"x".repeat(65)] {
            assert!(Endpoint::new("gateway", bad, "x").check().is_err(), "{bad:?}");
            assert!(Endpoint::new(bad, "g-1", "x").check().is_err(), "{bad:?}");
        }
    }

    #[tokio::test]
    async fn kinds_that_are_unknown_or_incomplete_are_refused_clearly() {
        for (kind, wanted) in [("zookeeper", "\"etcd\" or \"directory\""), ("directory", "set registry.path")]
        {
            let config = RegistryConfig { kind: kind.into(), ..Default::default() };
            assert!(check(&config).is_err());
            let fatal = Fatal::from(open(&config).await.err().unwrap());
            assert_eq!(fatal.exit_code(), 64);
            assert!(fatal.message().contains(wanted), "{fatal}");
        }
    }
}
