//! What every registry must keep, as a suite over `Arc<dyn Registry>`, and what etcd in particular must survive. Each test
//! starts an etcd of its own on free ports.
//!
//! Trap: nothing sleeps until something "should have happened". Every wait has a condition and a deadline.

mod etcd;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crpc::config::RegistryConfig;
use crpc::registry::{self, Endpoint, Registry, Table};
use serde_json::json;
use tokio::sync::watch;

use etcd::Etcd;

const LEASE: Duration = Duration::from_secs(5);
const SOON: Duration = Duration::from_secs(2);
const LONG: Duration = Duration::from_secs(20);

async fn open(etcd: &Etcd) -> Arc<dyn Registry> {
    registry::open(&config(etcd)).await.unwrap()
}

fn config(etcd: &Etcd) -> RegistryConfig {
    RegistryConfig {
        endpoints: vec![etcd.url()],
        lease_s: LEASE.as_secs(),
        relist_s: 2,
        ..Default::default()
    }
}

fn gateway(id: &str) -> Endpoint {
    Endpoint::new("gateway", id, format!("127.0.0.1:{}", 7000 + id.len()))
}

fn ids(table: &Table) -> Vec<&str> {
    table.iter().map(|endpoint| endpoint.id.as_str()).collect()
}

/// Waits until a table fits; says how long that took.
async fn until(
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

// The contract of every registry.

async fn registered_is_listed_and_watched_in_order(registry: Arc<dyn Registry>) {
    let mut tables = registry.watch("gateway").await.unwrap();
    assert!(tables.borrow().is_empty());
    let mut handles = Vec::new();
    for id in ["g-3", "g-1", "g-2"] {
        handles.push(registry.register(gateway(id)).await.unwrap());
    }
    let other = registry.register(Endpoint::new("gateways", "x-1", "127.0.0.1:1")).await.unwrap();
    until(&mut tables, SOON, "all three, sorted", |table| ids(table) == ["g-1", "g-2", "g-3"]).await;
    let listed = registry.list("gateway").await.unwrap();
    assert_eq!(ids(&listed), ["g-1", "g-2", "g-3"]);
    assert_eq!(**listed.get("g-2").unwrap(), gateway("g-2"));
    assert_eq!(ids(&registry.list("gateways").await.unwrap()), ["x-1"]);
    assert!(registry.register(gateway("g/1")).await.is_err());
    drop((handles, other));
}

async fn reports_are_seen_and_the_latest_stays(registry: Arc<dyn Registry>) {
    let mut tables = registry.watch("gateway").await.unwrap();
    let handle = registry.register(gateway("g-1")).await.unwrap();
    for n in 0..500 {
        handle.report(json!({ "connections": n }));
    }
    until(&mut tables, SOON, "the last report", |table| {
        table.get("g-1").is_some_and(|gateway| gateway.report["connections"] == 499)
    })
    .await;
    handle.deregister().await;
}

async fn deregistered_is_gone_at_once(registry: Arc<dyn Registry>) {
    let mut tables = registry.watch("gateway").await.unwrap();
    let (one, two) =
        (registry.register(gateway("g-1")).await.unwrap(), registry.register(gateway("g-2")).await.unwrap());
    until(&mut tables, SOON, "both", |table| table.len() == 2).await;
    one.deregister().await;
    assert_eq!(ids(&registry.list("gateway").await.unwrap()), ["g-2"]);
    until(&mut tables, SOON, "only g-2", |table| ids(table) == ["g-2"]).await;
    drop(two);
    until(&mut tables, SOON, "nobody: dropping deletes too", |table| table.is_empty()).await;
}

async fn dead_is_gone_within_the_lease(registry: Arc<dyn Registry>) {
    let mut tables = registry.watch("gateway").await.unwrap();
    let (dead, _alive) =
        (registry.register(gateway("g-1")).await.unwrap(), registry.register(gateway("g-2")).await.unwrap());
    until(&mut tables, SOON, "both", |table| table.len() == 2).await;
    dead.abandon();
    // etcd looks for expired leases twice a second, after its own clock.
    let took = until(&mut tables, LEASE + SOON, "only the living", |table| ids(table) == ["g-2"]).await;
    assert!(took > Duration::from_secs(1), "gone after {took:?}: that was no lease");
}

async fn a_successor_keeps_its_key(registry: Arc<dyn Registry>) {
    let old = registry.register(gateway("g-1")).await.unwrap();
    let _new = registry.register(Endpoint { addr: "127.0.0.1:9".into(), ..gateway("g-1") }).await.unwrap();
    old.deregister().await;
    let listed = registry.list("gateway").await.unwrap();
    assert_eq!(listed.get("g-1").unwrap().addr, "127.0.0.1:9");
}

#[tokio::test]
async fn etcd_keeps_the_contract() {
    registered_is_listed_and_watched_in_order(open(&Etcd::start()).await).await;
    reports_are_seen_and_the_latest_stays(open(&Etcd::start()).await).await;
    deregistered_is_gone_at_once(open(&Etcd::start()).await).await;
    a_successor_keeps_its_key(open(&Etcd::start()).await).await;
}

#[tokio::test]
async fn etcd_ends_the_dead_within_the_lease() {
    dead_is_gone_within_the_lease(open(&Etcd::start()).await).await;
}

// What etcd in particular must survive.

#[tokio::test]
async fn a_revoked_lease_is_replaced_within_two_seconds() {
    let etcd = Etcd::start();
    let registry = open(&etcd).await;
    let mut tables = registry.watch("gateway").await.unwrap();
    let handle = registry.register(gateway("g-1")).await.unwrap();
    handle.report(json!({ "connections": 7 }));
    until(&mut tables, SOON, "g-1", |table| table.get("g-1").is_some_and(|g| !g.report.is_null())).await;
    for lease in etcd.etcdctl(&["lease", "list"]).lines().skip(1) {
        etcd.etcdctl(&["lease", "revoke", lease]);
    }
    let began = Instant::now();
    until(&mut tables, SOON, "nobody", |table| table.is_empty()).await;
    until(&mut tables, SOON, "g-1 again, as it was", |table| {
        table.get("g-1").is_some_and(|gateway| gateway.report["connections"] == 7)
    })
    .await;
    assert!(began.elapsed() < SOON, "took {:?}", began.elapsed());
}

#[tokio::test]
async fn a_key_that_somebody_deleted_is_written_again() {
    let etcd = Etcd::start();
    let registry = open(&etcd).await;
    let mut tables = registry.watch("gateway").await.unwrap();
    let _handle = registry.register(gateway("g-1")).await.unwrap();
    until(&mut tables, SOON, "g-1", |table| table.len() == 1).await;
    etcd.etcdctl(&["del", "/rookery/gateway/g-1"]);
    until(&mut tables, SOON, "nobody", |table| table.is_empty()).await;
    until(&mut tables, LONG, "g-1 again", |table| table.len() == 1).await;
}

#[tokio::test]
async fn the_last_table_outlives_etcd_and_becomes_fresh_again() {
    let mut etcd = Etcd::start();
    let registry = open(&etcd).await;
    let mut tables = registry.watch("gateway").await.unwrap();
    let (one, two) =
        (registry.register(gateway("g-1")).await.unwrap(), registry.register(gateway("g-2")).await.unwrap());
    until(&mut tables, SOON, "both", |table| table.len() == 2).await;
    etcd.kill();
    // Time enough for the watch to break, be tried again, and for a full list to come due (relist_s is 2).
    let changed = tokio::time::timeout(Duration::from_secs(4), tables.changed()).await;
    assert!(changed.is_err() && tables.borrow().len() == 2, "the table must stay as it is");
    assert!(registry.list("gateway").await.unwrap_err().to_string().contains("does not answer"));
    one.abandon();
    two.report(json!({ "connections": 1 }));
    etcd.restart();
    until(&mut tables, LONG, "only the living, with its news", |table| {
        ids(table) == ["g-2"] && table[0].report["connections"] == 1
    })
    .await;
    let _three = registry.register(gateway("g-3")).await.unwrap();
    until(&mut tables, SOON, "watches work again", |table| ids(table) == ["g-2", "g-3"]).await;
}

#[tokio::test]
async fn everybody_comes_back_when_etcd_lost_its_data() {
    let mut etcd = Etcd::start();
    let registry = open(&etcd).await;
    let mut tables = registry.watch("gateway").await.unwrap();
    let _handle = registry.register(gateway("g-1")).await.unwrap();
    until(&mut tables, SOON, "g-1", |table| table.len() == 1).await;
    etcd.kill();
    etcd.wipe();
    etcd.restart();
    let fresh = open(&etcd).await;
    let mut fresh_tables = fresh.watch("gateway").await.unwrap();
    until(&mut fresh_tables, LONG, "g-1 registered again", |table| table.len() == 1).await;
    until(&mut tables, LONG, "g-1 seen by the old watcher", |table| table.len() == 1).await;
}

#[tokio::test]
async fn a_second_endpoint_is_used_when_the_first_is_dead() {
    let etcd = Etcd::start();
    let nobody = format!("http://127.0.0.1:{}", etcd::free_port());
    let config = RegistryConfig { endpoints: vec![nobody, etcd.url()], ..config(&etcd) };
    let registry = registry::open(&config).await.unwrap();
    let _handle = registry.register(gateway("g-1")).await.unwrap();
    assert_eq!(registry.list("gateway").await.unwrap().len(), 1);
}

#[tokio::test]
async fn an_etcd_that_is_away_is_one_clear_line_in_time() {
    let url = format!("http://127.0.0.1:{}", etcd::free_port());
    let config = RegistryConfig { endpoints: vec![url.clone()], connect_ms_max: 500, ..Default::default() };
    let error = registry::open(&config).await.err().unwrap().to_string();
    assert!(error.starts_with(&format!("etcd at {url} does not answer: ")), "{error}");
    assert!(error.contains("onnection refused") && error.contains("registry.endpoints"), "{error}");

    // A listener that accepts and then says nothing.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", silent.local_addr().unwrap());
    let began = Instant::now();
    let config = RegistryConfig { endpoints: vec![url], ..config };
    let error = registry::open(&config).await.err().unwrap().to_string();
    assert!(error.contains("does not answer: "), "{error}");
    assert!(began.elapsed() < Duration::from_secs(2), "took {:?}", began.elapsed());
}
