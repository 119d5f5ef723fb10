//! The life of the server: configuration, registry, ports, serve, stop. Called by `main`, on its thread.
//!
//! Trap: the order is part of what operators see. The registry is asked before a port is opened, so that a wrong address
//! is one line and an exit code, and no half-started server.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crpc::http::Limits;
use crpc::listen;
use crpc::metrics::Metrics as Registry;
use crpc::registry::{self, Table};
use crpc::{Fatal, Readiness, ServerArgs, Shutdown, admin};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::config::Config;
use crate::fleet::Fleet;
use crate::http::{self, App};
use crate::metrics::Metrics;

/// Runs ipconf until it is told to stop.
pub fn run(args: &ServerArgs) -> Result<(), Fatal> {
    let config: Config = crpc::config::load("ipconf", args)?;
    config.check()?;
    crpc::log::init(&config.log)?;
    if args.check { crpc::process::block_on(check(config)) } else { crpc::process::block_on(serve(config)) }
}

async fn check(config: Config) -> Result<(), Fatal> {
    registry::open(&config.registry).await?;
    println!("ipconf: configuration and registry are fine");
    Ok(())
}

async fn serve(config: Config) -> Result<(), Fatal> {
    let shutdown = Shutdown::on_signals()?;
    let readiness = Readiness::starting(&["registry"]);
    let mut registry_of_metrics = Registry::new("ipconf");
    let metrics = Metrics::new(&mut registry_of_metrics);

    let registry = registry::open(&config.registry).await?;
    let tables = registry.watch("gateway").await?;
    let fleet = Arc::new(Mutex::new(Fleet::new(config.rank.clone())));
    tokio::spawn(follow(tables, fleet.clone(), metrics.clone()));

    let (listener, addr) = listen::bind_known(config.http.listen, "http.listen").await?;
    let (admin, _) = admin::spawn_thread(
        config.admin.listen,
        readiness.clone(),
        Arc::new(registry_of_metrics),
        shutdown.clone(),
    )?;
    tracing::info!(
        version = crpc::VERSION,
        http = %addr,
        admin = %admin,
        registry = %config.registry,
        "ipconf listens; it depends on the registry for the list of gateways"
    );
    readiness.set("registry", Ok(()));

    let limits = Limits {
        connections_max: config.http.connections_max,
        connection_max: Duration::from_secs(config.http.connection_s_max),
    };
    let router = http::router(App { fleet, list: config.list, metrics });
    crpc::http::serve(listener, router, limits, &shutdown, &config.shutdown).await
}

/// Takes over every table.
async fn follow(mut tables: watch::Receiver<Arc<Table>>, fleet: Arc<Mutex<Fleet>>, metrics: Metrics) {
    loop {
        let table = tables.borrow_and_update().clone();
        let now = Instant::now();
        let (registered, usable) = {
            let mut fleet = fleet.lock();
            fleet.update(&table, now);
            fleet.counts(now)
        };
        let gauge = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        let before = metrics.gateways.set(gauge(registered));
        let usable_before = metrics.gateways_usable.set(gauge(usable));
        if (before, usable_before) != (gauge(registered), gauge(usable)) {
            tracing::info!(registered, usable, "gateways");
        }
        if tables.changed().await.is_err() {
            return;
        }
    }
}
