//! What every registry must keep: one suite, run on etcd and on a directory. Each test starts a registry of its own.
//!
//! Trap: nothing sleeps until something "should have happened". Every wait has a condition and a deadline.

mod common;
mod etcd;

use std::sync::Arc;
use std::time::Duration;

use crpc::config::RegistryConfig;
use crpc::registry::{self, Endpoint, Registry, Table};
use serde_json::json;

use common::{gateway, ids, until};
use etcd::Etcd;

/// A registry of a test, and what is particular to it.
trait Fixture {
    /// Shortest that the dead stay.
    const DEATH_MIN: Duration;

    fn start() -> Self;

    fn config(&self) -> RegistryConfig;

    /// With full lists every so many seconds.
    async fn open_listing(&self, relist_s: u64) -> Arc<dyn Registry> {
        registry::open(&RegistryConfig { relist_s, ..self.config() }).await.unwrap()
    }

    /// Deletes an entry behind its owner's back.
    fn delete(&self, service: &str, id: &str);

    async fn open(&self) -> Arc<dyn Registry> {
        registry::open(&self.config()).await.unwrap()
    }
}

impl Fixture for Etcd {
    // The lease is 5 s. Sooner were no lease.
    const DEATH_MIN: Duration = Duration::from_secs(1);

    fn start() -> Self {
        Etcd::start()
    }

    fn config(&self) -> RegistryConfig {
        let endpoints = vec![self.url()];
        RegistryConfig { endpoints, lease_s: 5, relist_s: RELIST_S, ..Default::default() }
    }

    fn delete(&self, service: &str, id: &str) {
        self.etcdctl(&["del", &format!("/rookery/{service}/{id}")]);
    }
}

/// Longest that anything here may take before it counts as broken. It is the watches that tell: a full list is not due.
const LONG: Duration = Duration::from_secs(60);
const RELIST_S: u64 = 3_600;

/// A directory below one that does not exist yet.
struct Directory(tempfile::TempDir);

impl Fixture for Directory {
    const DEATH_MIN: Duration = Duration::ZERO;

    fn start() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn config(&self) -> RegistryConfig {
        let path = Some(self.0.path().join("not/yet"));
        RegistryConfig { kind: "directory".into(), path, ..Default::default() }
    }

    fn delete(&self, service: &str, id: &str) {
        std::fs::remove_file(self.0.path().join(format!("not/yet/{service}/{id}.json"))).unwrap();
    }
}

/// A module per registry, and in it a test per promise.
macro_rules! contract {
    ($($registry:ident on $fixture:ty),*; $promises:tt) => {
        $(contract!(@ $registry $fixture, $promises);)*
    };
    (@ $registry:ident $fixture:ty, { $($promise:ident,)* }) => {
        mod $registry {
            use super::*;

            $(#[tokio::test]
            async fn $promise() {
                super::$promise(<$fixture>::start()).await;
            })*
        }
    };
}

contract! {
    etcd_keeps on Etcd, directory_keeps on Directory; {
        registered_is_listed_and_watched_in_order,
        what_cannot_be_a_name_is_refused,
        every_opener_sees_the_same,
        reports_are_seen_and_the_latest_stays,
        deregistered_is_gone_at_once,
        dead_is_gone_in_time,
        the_dead_may_come_back,
        a_successor_in_the_same_process_keeps_its_entry,
        an_entry_that_somebody_deleted_is_written_again,
        many_come_and_go,
    }
}

async fn registered_is_listed_and_watched_in_order<F: Fixture>(fixture: F) {
    let registry = fixture.open().await;
    let mut tables = registry.watch("gateway").await.unwrap();
    assert!(tables.borrow().is_empty());
    let mut handles = Vec::new();
    for id in ["g-3", "g-1", "g-2"] {
        handles.push(registry.register(gateway(id)).await.unwrap());
    }
    let other = registry.register(Endpoint::new("gateways", "x-1", "127.0.0.1:1")).await.unwrap();
    until(&mut tables, LONG, "all three, sorted", |table| ids(table) == ["g-1", "g-2", "g-3"]).await;
    let listed = registry.list("gateway").await.unwrap();
    assert_eq!(ids(&listed), ["g-1", "g-2", "g-3"]);
    assert_eq!(**listed.get("g-2").unwrap(), gateway("g-2"));
    assert_eq!(ids(&registry.list("gateways").await.unwrap()), ["x-1"]);
    assert!(registry.list("nothing").await.unwrap().is_empty());
    drop((handles, other));
}

async fn what_cannot_be_a_name_is_refused<F: Fixture>(fixture: F) {
    let registry = fixture.open().await;
    for bad in ["g/1", "", "..", "g 1", "\n"] {
        assert!(registry.register(gateway(bad)).await.is_err(), "{bad:?}");
        assert!(registry.register(Endpoint::new(bad, "g-1", "a:1")).await.is_err(), "{bad:?}");
    }
    // What looks like a file name is a name like others.
    let names = ["a", "a.json", "a.lock", ".b", "A"];
    let mut handles = Vec::new();
    for id in names {
        handles.push(registry.register(gateway(id)).await.unwrap());
    }
    let mut sorted = names;
    sorted.sort();
    assert_eq!(ids(&registry.list("gateway").await.unwrap()), sorted);
    for (handle, left) in handles.into_iter().zip((0..names.len()).rev()) {
        handle.deregister().await;
        assert_eq!(registry.list("gateway").await.unwrap().len(), left);
    }
}

async fn every_opener_sees_the_same<F: Fixture>(fixture: F) {
    let (one, two) = (fixture.open().await, fixture.open().await);
    let mut tables = two.watch("gateway").await.unwrap();
    let full = Endpoint {
        zone: "z-é".into(),
        version: "9.9".into(),
        report: json!({ "connections": 1, "text": "\"\n" }),
        ..gateway("g-1")
    };
    let handle = one.register(full.clone()).await.unwrap();
    until(&mut tables, LONG, "g-1", |table| table.len() == 1).await;
    assert_eq!(**tables.borrow().get("g-1").unwrap(), full);
    assert_eq!(*two.list("gateway").await.unwrap()[0], full);
    handle.deregister().await;
    assert!(two.list("gateway").await.unwrap().is_empty());
}

async fn reports_are_seen_and_the_latest_stays<F: Fixture>(fixture: F) {
    let registry = fixture.open().await;
    let mut tables = registry.watch("gateway").await.unwrap();
    let handle = registry.register(gateway("g-1")).await.unwrap();
    for n in 0..500 {
        handle.report(json!({ "connections": n }));
    }
    until(&mut tables, LONG, "the last report", |table| {
        table.get("g-1").is_some_and(|gateway| gateway.report["connections"] == 499)
    })
    .await;
    handle.deregister().await;
}

async fn deregistered_is_gone_at_once<F: Fixture>(fixture: F) {
    let registry = fixture.open().await;
    let mut tables = registry.watch("gateway").await.unwrap();
    let (one, two) =
        (registry.register(gateway("g-1")).await.unwrap(), registry.register(gateway("g-2")).await.unwrap());
    until(&mut tables, LONG, "both", |table| table.len() == 2).await;
    one.deregister().await;
    assert_eq!(ids(&registry.list("gateway").await.unwrap()), ["g-2"]);
    until(&mut tables, LONG, "only g-2", |table| ids(table) == ["g-2"]).await;
    drop(two);
    until(&mut tables, LONG, "nobody: dropping deletes too", |table| table.is_empty()).await;
}

async fn dead_is_gone_in_time<F: Fixture>(fixture: F) {
    let registry = fixture.open().await;
    let mut tables = registry.watch("gateway").await.unwrap();
    let (dead, _alive) =
        (registry.register(gateway("g-1")).await.unwrap(), registry.register(gateway("g-2")).await.unwrap());
    until(&mut tables, LONG, "both", |table| table.len() == 2).await;
    dead.abandon();
    let took = until(&mut tables, LONG, "only the living", |table| ids(table) == ["g-2"]).await;
    assert!(took >= F::DEATH_MIN, "gone after {took:?}: that was too soon");
}

async fn the_dead_may_come_back<F: Fixture>(fixture: F) {
    let registry = fixture.open().await;
    let mut tables = registry.watch("gateway").await.unwrap();
    registry.register(gateway("g-1")).await.unwrap().abandon();
    let _again = registry.register(Endpoint { addr: "127.0.0.1:9".into(), ..gateway("g-1") }).await.unwrap();
    until(&mut tables, LONG, "the new life", |table| {
        table.get("g-1").is_some_and(|gateway| gateway.addr == "127.0.0.1:9")
    })
    .await;
    assert_eq!(registry.list("gateway").await.unwrap().len(), 1);
}

async fn a_successor_in_the_same_process_keeps_its_entry<F: Fixture>(fixture: F) {
    let (registry, other) = (fixture.open().await, fixture.open().await);
    let old = registry.register(gateway("g-1")).await.unwrap();
    let new = other.register(Endpoint { addr: "127.0.0.1:9".into(), ..gateway("g-1") }).await.unwrap();
    old.deregister().await;
    let listed = registry.list("gateway").await.unwrap();
    assert_eq!(listed.get("g-1").unwrap().addr, "127.0.0.1:9");
    new.deregister().await;
    assert!(registry.list("gateway").await.unwrap().is_empty());
}

async fn an_entry_that_somebody_deleted_is_written_again<F: Fixture>(fixture: F) {
    // It is such a list that finds it missing.
    let registry = fixture.open_listing(1).await;
    let mut tables = registry.watch("gateway").await.unwrap();
    let handle = registry.register(gateway("g-1")).await.unwrap();
    handle.report(json!({ "connections": 7 }));
    let reported = |table: &Table| table.get("g-1").is_some_and(|gateway| gateway.report["connections"] == 7);
    until(&mut tables, LONG, "g-1", |table| reported(table)).await;
    fixture.delete("gateway", "g-1");
    // Whoever looks meanwhile finds it missing, or repaired already.
    let listed = registry.list("gateway").await.unwrap();
    assert!(listed.is_empty() || reported(&listed));
    tokio::time::timeout(LONG, async {
        while !reported(&registry.list("gateway").await.unwrap()) {
            tokio::time::sleep(Duration::from_millis(20)).await; // the pace of asking
        }
    })
    .await
    .expect("written again, with its report");
    until(&mut tables, LONG, "g-1 again", |table| reported(table)).await;
}

async fn many_come_and_go<F: Fixture>(fixture: F) {
    let registry = fixture.open().await;
    let mut tables = registry.watch("gateway").await.unwrap();
    let mut handles = Vec::new();
    for n in 0..100 {
        let handle = registry.register(gateway(&format!("g-{n}"))).await.unwrap();
        handle.report(json!({ "connections": n }));
        handles.push(handle);
    }
    until(&mut tables, LONG, "all with their reports", |table| {
        table.len() == 100 && table.iter().all(|gateway| gateway.report.is_object())
    })
    .await;
    for handle in handles.drain(..50) {
        handle.deregister().await;
    }
    drop(handles);
    until(&mut tables, LONG, "nobody", |table| table.is_empty()).await;
}
