//! The registry in a directory, for the servers of one machine: `PATH/SERVICE/ID.json` holds the endpoint, and its owner
//! lives as long as it holds the lock on `ID.lock` beside it. Tasks on the caller's tokio runtime, and its threads for
//! blocking work.
//!
//! Trap: the kernel takes the lock from a process that ends, so the dead are gone at the next look; but one that hangs or
//! is stopped keeps it, where etcd's lease would have ended.

mod claim;
mod folder;
mod keeper;
mod lock;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{oneshot, watch};

use self::folder::{Folder, Listing};
use self::keeper::Keeper;
use crate::config::RegistryConfig;
use crate::registry::{self, Endpoint, Registration, Registry, RegistryError, Table};

/// A directory that all servers of this machine can see.
pub(crate) struct DirRegistry {
    root: Arc<Path>,
}

impl DirRegistry {
    /// The path, if it is given.
    pub(crate) fn check(config: &RegistryConfig) -> Result<PathBuf, RegistryError> {
        config.path.clone().filter(|path| !path.as_os_str().is_empty()).ok_or_else(|| {
            RegistryError::Config(
                "registry.kind is \"directory\": set registry.path to a directory that all servers of this machine share"
                    .into(),
            )
        })
    }

    /// Creates the directory if it is missing.
    pub(crate) async fn open(config: &RegistryConfig) -> Result<Self, RegistryError> {
        let path = DirRegistry::check(config)?;
        let opening = {
            let path = path.clone();
            // Absolute from here on: names of locks are compared, and a process may change its directory.
            move || std::fs::create_dir_all(&path).and_then(|()| path.canonicalize())
        };
        let root: PathBuf = blocking(opening).await.map_err(|error| unusable(&path, &error))?;
        tracing::debug!(path = %root.display(), "the registry is a directory");
        Ok(Self { root: root.into() })
    }

    fn folder(&self, service: &str) -> Result<Folder, RegistryError> {
        registry::check_name("service", service)?;
        Ok(Folder::new(self.root.clone(), service))
    }

    async fn look(&self, folder: &Folder) -> Result<Listing, RegistryError> {
        look(folder).await.map_err(|error| unusable(&self.root, &error))
    }
}

#[async_trait::async_trait]
impl Registry for DirRegistry {
    async fn register(&self, endpoint: Endpoint) -> Result<Registration, RegistryError> {
        endpoint.check()?;
        let folder = self.folder(&endpoint.service)?;
        let (report, reports) = watch::channel(endpoint.report.clone());
        let (stop, stopped) = oneshot::channel();
        let keeper = Keeper::enter(self.root.clone(), folder, endpoint, reports).await?;
        Ok(Registration::new(report, stop, tokio::spawn(keeper.run(stopped))))
    }

    async fn watch(&self, service: &str) -> Result<watch::Receiver<Arc<Table>>, RegistryError> {
        let folder = self.folder(service)?;
        let first = self.look(&folder).await?;
        let (tables, receiver) = watch::channel(Arc::new(first.table.clone()));
        tokio::spawn(async move {
            tokio::select! {
                () = tables.closed() => {}
                () = follow(&folder, first, &tables) => {}
            }
        });
        Ok(receiver)
    }

    async fn list(&self, service: &str) -> Result<Table, RegistryError> {
        let listing = self.look(&self.folder(service)?).await?;
        warn_of(&listing.left_out, &[]);
        Ok(listing.table)
    }
}

/// Looks again and again. Whatever goes wrong, the last table stays published.
async fn follow(folder: &Folder, first: Listing, tables: &watch::Sender<Arc<Table>>) {
    warn_of(&first.left_out, &[]);
    let mut last = Ok(first);
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let now = look(folder).await.map_err(|error| error.to_string());
        match (&now, &last) {
            (Ok(now), Ok(last)) if now == last => continue,
            (Ok(now), _) => {
                warn_of(&now.left_out, last.as_ref().map_or(&[], |last| &last.left_out));
                tables.send_if_modified(|table| {
                    let changed = **table != now.table;
                    if changed {
                        *table = Arc::new(now.table.clone());
                    }
                    changed
                });
            }
            (Err(error), Ok(_)) => {
                tracing::warn!(error, "the registry's directory cannot be read; the last table stays in use");
            }
            (Err(_), Err(_)) => {}
        }
        last = now;
    }
}

/// Says what is wrong once, not at every look.
fn warn_of(left_out: &[String], known: &[String]) {
    for what in left_out.iter().filter(|what| !known.contains(what)) {
        tracing::warn!(what, "left out of the registry");
    }
}

async fn look(folder: &Folder) -> io::Result<Listing> {
    let folder = folder.clone();
    blocking(move || folder.list()).await
}

/// File systems make wait at times, and the caller's runtime may be a gateway's only one.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(io::Error::other(error)))
}

fn unusable(path: &Path, error: &io::Error) -> RegistryError {
    RegistryError::Unusable { path: path.display().to_string(), reason: error.to_string() }
}

/// Four times the pace at which others should notice.
const LOOK_EVERY: Duration = Duration::from_millis(250);
