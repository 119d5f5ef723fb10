//! The life of the server: configuration, registry, ports, serve, stop. Called by `main`, on its thread.
//!
//! Trap: the order is part of what operators see. The registry is asked before a port is opened, so that a wrong address
//! is one line and an exit code, and no half-started server.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crpc::listen::{self, Capped};
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
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Fatal::internal(format!("no runtime: {error}")))?;
    if args.check {
        runtime.block_on(registry::open(&config.registry))?;
        println!("ipconf: configuration and registry are fine");
        return Ok(());
    }
    let outcome = runtime.block_on(serve(config));
    // What is left are watches; nothing waits for them.
    runtime.shutdown_background();
    outcome
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

    let listener = listen::bind(config.http.listen, "http.listen").await?;
    let addr =
        listener.local_addr().map_err(|error| listen::refused(config.http.listen, "http.listen", &error))?;
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
        registry = config.registry.kind,
        endpoints = config.registry.endpoints.join(","),
        prefix = config.registry.prefix,
        "ipconf listens; it depends on the registry for the list of gateways"
    );
    readiness.set("registry", Ok(()));

    let lives = Duration::from_secs(config.http.connection_s_max);
    let capped = Capped::new(listener, config.http.connections_max, lives);
    let router = http::router(App { fleet, list: config.list, metrics });
    let (stop, drain) = (shutdown.clone(), Duration::from_millis(config.shutdown.drain_ms));
    let serving = axum::serve(capped, router).with_graceful_shutdown(async move {
        stop.wait().await;
        tokio::select! {
            () = tokio::time::sleep(drain) => {}
            () = stop.wait_hard() => {}
        }
    });
    let limit = Duration::from_millis(config.shutdown.hard_ms);
    match shutdown.with_hard_limit(serving.into_future(), limit).await {
        Some(Err(error)) => return Err(Fatal::internal(format!("the HTTP server failed: {error}"))),
        Some(Ok(())) => tracing::info!("stopped"),
        None => tracing::warn!("stopped; requests were still running and have been cut off"),
    }
    Ok(())
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
