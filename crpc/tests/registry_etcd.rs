//! What etcd in particular must survive, beyond the contract of every registry. Each test starts an etcd of its own on
//! free ports.
//!
//! Trap: what is to be noticed at once would be noticed in the end without it, by a full list or when a lease is due for
//! renewal. Where that matters both are set so long that the test would not see it.

mod common;
mod etcd;

use std::sync::Arc;
use std::time::Duration;

use crpc::config::RegistryConfig;
use crpc::registry::{self, Registry};
use serde_json::json;

use common::{gateway, ids, until};
use etcd::Etcd;

const LONG: Duration = Duration::from_secs(60);

async fn open(etcd: &Etcd) -> Arc<dyn Registry> {
    registry::open(&config(etcd)).await.unwrap()
}

fn config(etcd: &Etcd) -> RegistryConfig {
    RegistryConfig { endpoints: vec![etcd.url()], lease_s: 5, relist_s: 2, ..Default::default() }
}

#[tokio::test]
async fn a_revoked_lease_is_replaced_before_it_is_due() {
    let etcd = Etcd::start();
    let registry =
        registry::open(&RegistryConfig { lease_s: 3_600, relist_s: 3_600, ..config(&etcd) }).await.unwrap();
    let mut tables = registry.watch("gateway").await.unwrap();
    let handle = registry.register(gateway("g-1")).await.unwrap();
    handle.report(json!({ "connections": 7 }));
    until(&mut tables, LONG, "g-1", |table| table.get("g-1").is_some_and(|g| !g.report.is_null())).await;
    let leases = || etcd_leases(&etcd);
    let revoked = leases();
    for lease in &revoked {
        etcd.etcdctl(&["lease", "revoke", lease]);
    }
    tokio::time::timeout(LONG, async {
        while leases().iter().all(|lease| revoked.contains(lease)) {
            tokio::time::sleep(Duration::from_millis(20)).await; // the pace of asking
        }
    })
    .await
    .expect("another lease");
    until(&mut tables, LONG, "g-1 again, as it was", |table| {
        table.get("g-1").is_some_and(|gateway| gateway.report["connections"] == 7)
    })
    .await;
    let kept = etcd.etcdctl(&["get", "--prefix", "--keys-only", "/rookery/gateway/"]);
    assert!(kept.contains("g-1"), "{kept}");
}

#[tokio::test]
async fn the_last_table_outlives_etcd_and_becomes_fresh_again() {
    let mut etcd = Etcd::start();
    let registry = open(&etcd).await;
    let mut tables = registry.watch("gateway").await.unwrap();
    let (one, two) =
        (registry.register(gateway("g-1")).await.unwrap(), registry.register(gateway("g-2")).await.unwrap());
    until(&mut tables, LONG, "both", |table| table.len() == 2).await;
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
    until(&mut tables, LONG, "watches work again", |table| ids(table) == ["g-2", "g-3"]).await;
}

#[tokio::test]
async fn everybody_comes_back_when_etcd_lost_its_data() {
    let mut etcd = Etcd::start();
    let registry = open(&etcd).await;
    let mut tables = registry.watch("gateway").await.unwrap();
    let _handle = registry.register(gateway("g-1")).await.unwrap();
    until(&mut tables, LONG, "g-1", |table| table.len() == 1).await;
    etcd.kill();
    etcd.wipe();
    etcd.restart();
    let fresh = open(&etcd).await;
    let mut fresh_tables = fresh.watch("gateway").await.unwrap();
    until(&mut fresh_tables, LONG, "g-1 registered again", |table| table.len() == 1).await;
    until(&mut tables, LONG, "g-1 seen by the old watcher", |table| table.len() == 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_registered_stays_so_while_etcd_takes_no_writes() {
    let mut etcd = Etcd::start();
    let registry = open(&etcd).await;
    let handle = registry.register(gateway("g-1")).await.unwrap();
    let before = etcd_leases(&etcd);
    assert_eq!(before.len(), 1);
    etcd.kill();
    handle.report(json!({ "connections": 1 }));
    tokio::task::block_in_place(|| etcd.restart_full());
    assert!(registry.register(gateway("g-2")).await.is_err(), "it is full");
    // Longer than a lease lives that nobody renews, and nothing is waited for but that it stays.
    for n in 0..16 {
        handle.report(json!({ "connections": n }));
        tokio::time::sleep(Duration::from_millis(500)).await;
        let now = etcd_leases(&etcd);
        assert!(before.iter().all(|lease| now.contains(lease)), "{before:?} {now:?}");
    }
    let table = registry.list("gateway").await.unwrap();
    assert_eq!(ids(&table), ["g-1"]);
}

fn etcd_leases(etcd: &Etcd) -> Vec<String> {
    etcd.etcdctl(&["lease", "list"]).lines().skip(1).map(str::to_owned).collect()
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
    let config = RegistryConfig { endpoints: vec![url], ..config };
    let opened = tokio::time::timeout(LONG, registry::open(&config)).await.expect("it is given up");
    let error = opened.err().unwrap().to_string();
    assert!(error.contains("does not answer: "), "{error}");
}
