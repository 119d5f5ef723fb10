//! What the tests of both registries share. Compiled into each of them.
//!
//! Trap: nothing sleeps until something "should have happened". Every wait has a condition and a deadline.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crpc::registry::{Endpoint, Table};
use tokio::sync::watch;

/// A gateway with this id.
pub fn gateway(id: &str) -> Endpoint {
    Endpoint::new("gateway", id, format!("127.0.0.1:{}", 7000 + id.len()))
}

/// The ids in a table.
pub fn ids(table: &Table) -> Vec<&str> {
    table.iter().map(|endpoint| endpoint.id.as_str()).collect()
}

/// Waits until a table fits; says how long that took.
pub async fn until(
    tables: &mut watch::Receiver<Arc<Table>>,
    within: Duration,
    what: &str,
    fits: impl FnMut(&Arc<Table>) -> bool,
) -> Duration {
    let began = Instant::now();
    let waited = tokio::time::timeout(within, tables.wait_for(fits)).await.map(|table| drop(table.unwrap()));
    assert!(waited.is_ok(), "not within {within:?}: {what}; the table is {:?}", ids(&tables.borrow()));
    began.elapsed()
}
