//! The life of the server: configuration, registry, ports, serve, stop. Called by `main`, on its thread.
//!
//! Trap: it answers `/ping` from the start, but is not ready before a state server is registered: whoever balances
//! requests asks `/readyz`, on the admin port.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crpc::client::{ChannelOptions, Channels};
use crpc::listen;
use crpc::metrics::Metrics as Registry;
use crpc::registry::{self, Table};
use crpc::{Fatal, Readiness, ServerArgs, Shutdown, admin};
use tokio::sync::watch;

use crate::access::Access;
use crate::auth::Auth;
use crate::config::Config;
use crate::http::{self, Door};
use crate::metrics::Metrics;
use crate::state::State;

/// Runs api until it is told to stop.
pub fn run(args: &ServerArgs) -> Result<(), Fatal> {
    let config: Config = crpc::config::load("api", args)?;
    config.check()?;
    crpc::log::init(&config.log)?;
    if args.check { crpc::process::block_on(check(config)) } else { crpc::process::block_on(serve(config)) }
}

async fn check(config: Config) -> Result<(), Fatal> {
    config.auth.verifier().map_err(Fatal::config)?;
    registry::open(&config.registry).await?;
    println!("api: configuration and registry are fine");
    Ok(())
}

async fn serve(config: Config) -> Result<(), Fatal> {
    let shutdown = Shutdown::on_signals()?;
    let readiness = Readiness::starting(&["registry", "state"]);
    let mut registry_of_metrics = Registry::new("api");
    let metrics = Metrics::new(&mut registry_of_metrics);

    let auth = Auth::new(config.auth.verifier().map_err(Fatal::config)?);
    let registry = registry::open(&config.registry).await?;
    let mut tables = registry.watch("state").await?;
    readiness.set("registry", Ok(()));
    // Once before anybody can ask.
    judge(&tables.borrow_and_update(), &readiness, &metrics);
    tokio::spawn(follow(tables, readiness.clone(), metrics.clone()));

    let channels = Channels::new(registry.watch("state").await?, ChannelOptions::default());
    let call_ms_max = config.state.call_ms_max.min(config.http.request_ms_max);
    let state = State::new(channels, Duration::from_millis(call_ms_max));
    if !config.http.listen.ip().is_loopback() && config.auth.keys.is_empty() {
        tokio::spawn(warn_insecure(config.http.listen));
    }

    let (listener, addr) = listen::bind_known(config.http.listen, "http.listen").await?;
    let (admin, _) =
        admin::spawn_thread(config.admin.listen, readiness, Arc::new(registry_of_metrics), shutdown.clone())?;
    tracing::info!(
        version = crpc::VERSION,
        http = %addr,
        admin = %admin,
        registry = %config.registry,
        "api listens; it depends on the registry for the list of state servers"
    );
    let door = Door::new(auth, state, &config.http);
    let router = http::router(door, Access::new(&config.http, metrics));
    crpc::http::serve(listener, router, config.http.limits(), &shutdown, &config.shutdown).await
}

async fn warn_insecure(listen: SocketAddr) {
    loop {
        tracing::warn!(%listen, "auth.insecure: anybody who reaches this address can send and read as any user");
        tokio::time::sleep(WARNED_EVERY).await;
    }
}

const WARNED_EVERY: Duration = Duration::from_secs(60);

async fn follow(mut tables: watch::Receiver<Arc<Table>>, readiness: Readiness, metrics: Metrics) {
    while tables.changed().await.is_ok() {
        judge(&tables.borrow_and_update(), &readiness, &metrics);
    }
}

/// Ready while a state server is registered.
fn judge(table: &Table, readiness: &Readiness, metrics: &Metrics) {
    let count = i64::try_from(table.len()).unwrap_or(i64::MAX);
    let none = || Err("no state server is registered".to_owned());
    readiness.set("state", if count > 0 { Ok(()) } else { none() });
    if metrics.state_servers.set(count) != count {
        tracing::info!(registered = count, "state servers");
    }
}
