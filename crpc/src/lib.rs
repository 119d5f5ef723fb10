//! What every Rookery server shares: configuration, start and stop, health, metrics, discovery, and calls between
//! servers over tonic.
//!
//! Trap: nothing here belongs on a gateway worker's thread. Channels, watches and registrations are made inside a
//! tokio runtime and live there; what other threads may ask (tables, readiness, shutdown) is said at each type.

pub mod admin;
pub mod balance;
pub mod client;
pub mod config;
mod config_sections;
pub mod failpoint;
pub mod health;
pub mod heap;
pub mod http;
pub mod listen;
pub mod log;
pub mod metrics;
pub mod notify;
mod outage;
pub mod process;
pub mod registry;
mod registry_dir;
mod registry_etcd;
pub mod report;
pub mod server;
pub mod shutdown;
pub mod token;
mod token_crypto;

pub use health::Readiness;
pub use process::{Fatal, ServerArgs};
pub use shutdown::Shutdown;

/// The version of this build, for `--version`, registrations and readiness.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
