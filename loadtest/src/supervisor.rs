//! Starts real processes for tests, benches and fault injection, and ends them by pid when dropped. Plain blocking
//! code, any thread; a [`Process`] belongs to whoever holds it.
//!
//! Trap: a test that is itself SIGKILLed runs no drops, so its servers live on. Their ports are then simply not picked
//! again (see [`PortLease`]), and `ps` shows them under the temp dir.
//!
//! ```no_run
//! use loadtest::supervisor::{Cluster, ClusterOptions};
//! let mut cluster = Cluster::start(ClusterOptions::default())?;
//! let target = cluster.gateways[0].client;      // HOST:PORT for clients
//! cluster.states[0].process.kill()?;            // SIGKILL ...
//! cluster.states[0].process.restart()?;         // ... and again with the same arguments, until ready
//! # Ok::<(), loadtest::supervisor::SupervisorError>(())
//! ```

mod cluster;
mod http;
mod port;
mod process;
mod services;

pub use cluster::{Api, Cluster, ClusterOptions, Gateway, Ipconf, State};
pub use http::{HttpAnswer, http_get};
pub use port::PortLease;
pub use process::{Process, Ready, Server, Spec, binary};
pub use services::{AOF_FOLDER, Etcd, Redis};

use std::path::PathBuf;
use std::time::Duration;

/// Why a process could not be started, signalled or awaited.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum SupervisorError {
    #[error("no binary `{name}` in {}; build the binaries first: cargo build --bins", .looked_in.display())]
    NotBuilt { name: String, looked_in: PathBuf },
    #[error("cannot start {label} ({program}): {error}")]
    Spawn { label: String, program: String, error: std::io::Error },
    #[error("{label} ended with {status} before it was ready; its output:\n{output}")]
    EndedEarly { label: String, status: String, output: String },
    #[error("{label} was not ready after {} s: {why}; its output:\n{output}", .waited.as_secs())]
    NotReady { label: String, waited: Duration, why: String, output: String },
    #[error("{label} still runs {} s after {signal}", .waited.as_secs())]
    StillRunning { label: String, signal: &'static str, waited: Duration },
    #[error("{label} is not running")]
    NotRunning { label: String },
    #[error("no free port found between {from} and {to}")]
    NoPort { from: u16, to: u16 },
    #[error("{what}: {error}")]
    Io { what: String, error: std::io::Error },
    #[error("redis: {0}")]
    Redis(#[from] redis::RedisError),
}

impl SupervisorError {
    fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |error| SupervisorError::Io { what, error }
    }
}
