//! `torture`: faults against real processes under load, and a checker of what was promised. This file has the options and
//! the run over rows and rounds; `row.rs` the table.
//!
//! Trap: servers are started beside this program and ended by their ids. A torture that is itself SIGKILLed leaves them
//! behind.

pub mod audience;
pub mod child;
pub mod guarantees;
pub mod history;
pub mod idlers;
pub mod load;
pub mod report;
pub mod round;
pub mod row;
pub mod rows;
pub mod run;
pub mod tool;
pub mod verdict;
pub mod world;

use std::time::Duration;

use client::ConnectError;

use crate::monitor::RunError;
use crate::supervisor::SupervisorError;

pub use child::ChildArgs;
pub use history::History;
pub use load::{KeepIn, Load, Plan};
pub use round::{Facts, Round};
pub use row::Row;
pub use run::{TortureArgs, run};
pub use verdict::{Excuses, Verdict};
pub use world::World;

/// Why a round came to no result.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum TortureError {
    #[error(transparent)]
    Supervisor(#[from] SupervisorError),
    #[error(transparent)]
    Run(#[from] RunError),
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(transparent)]
    Redis(#[from] redis::RedisError),
    #[error("the load failed: {0}")]
    Load(String),
    #[error("no {what} within {} s", .waited.as_secs_f64())]
    Late { what: &'static str, waited: Duration },
    /// Something that this row needs is not here: the row counts as not run.
    #[error("not possible here: {0}")]
    Missing(String),
    #[error("{what}: {error}")]
    Io { what: String, error: std::io::Error },
}

impl TortureError {
    /// An error of the system, and what it hit.
    pub fn io(what: impl Into<String>, error: std::io::Error) -> TortureError {
        TortureError::Io { what: what.into(), error }
    }
}
