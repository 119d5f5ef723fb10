//! The state server process: start, run, stop. One tokio thread: run more servers to use more cores.

use std::sync::Arc;
use std::time::Duration;

use crpc::registry::{Endpoint, Registration};
use crpc::token::Verifier;
use crpc::{Fatal, Readiness, Shutdown};
use proto::link::link_server::LinkServer;
use proto::state::state_server::StateServer;
use tokio::net::TcpListener;
use tonic::service::Routes;

use crate::calls::StateService;
use crate::clock::TokioClock;
use crate::config::Config;
use crate::core::{Core, Parts};
use crate::delivered;
use crate::fan_out;
use crate::marks;
use crate::metrics::Metrics;
use crate::presence;
use crate::relay;
use crate::repush;
use crate::service::LinkService;
use crate::store::{Op, Store, StoreError};
use crate::store_redb::{OpenError, RedbStore};
use crate::store_redis::RedisStore;

/// Longest message on the link, bytes.
const LINK_MESSAGE_BYTES_MAX: usize = 64 * 1024 * 1024;

/// How often the store is asked how it is, and what it promises.
const STORE_CHECK: Duration = Duration::from_secs(1);

/// How long the end of the process waits for what blocks.
const BLOCKING_MAX: Duration = Duration::from_secs(2);

/// How often a warning about development logins from elsewhere is repeated.
const INSECURE_WARNING: Duration = Duration::from_secs(60);

/// Runs until a signal.
pub fn run(config: Config) -> Result<(), Fatal> {
    config.check().map_err(Fatal::config)?;
    crpc::log::init(&config.log)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Fatal::internal(format!("starting the runtime: {e}")))?;
    let outcome = runtime.block_on(serve(config));
    // For what blocks, so that a store in a file is closed; but not for long: one that is still being opened when a signal came.
    runtime.shutdown_timeout(BLOCKING_MAX);
    outcome
}

/// Opens the store of this configuration; the error says what to change.
pub async fn open_store(config: &Config) -> Result<Box<dyn Store>, Fatal> {
    if let Some(path) = config.store.redb_path() {
        return match RedbStore::open(path, &config.store).await {
            Ok(store) => Ok(Box::new(store)),
            Err(OpenError::Layout(reason)) => Err(Fatal::config(reason)),
            Err(error) => Err(Fatal::unavailable(error.to_string())),
        };
    }
    let url = config.store.shown();
    match RedisStore::open(&config.store).await {
        Ok(store) => Ok(Box::new(store)),
        Err(StoreError::Unknown(reason)) => Err(Fatal::unavailable(format!(
            "the store at {url} cannot be reached ({reason}): start Redis there or change store.url"
        ))),
        Err(StoreError::Refused(reason) | StoreError::Corrupt(reason)) => Err(Fatal::config(reason)),
    }
}

async fn serve(config: Config) -> Result<(), Fatal> {
    let tokens = config.auth.verifier().map_err(Fatal::config)?;
    let shutdown = Shutdown::on_signals()?;
    let readiness = Readiness::starting(&["registry", "store", "listener"]);
    let mut registry = crpc::metrics::Metrics::new("state");
    let metrics = Metrics::new(&mut registry);
    crpc::admin::spawn_thread(config.admin.listen, readiness.clone(), Arc::new(registry), shutdown.clone())?;
    tracing::info!(
        version = crpc::VERSION,
        id = config.id(),
        rpc = %config.rpc.listen,
        admin = %config.admin.listen,
        store = config.store.shown(),
        registry = %config.registry,
        "state starts"
    );
    let starting = start(config, tokens, metrics, readiness.clone(), shutdown.clone());
    let (core, listener, routes, registration) = tokio::select! {
        biased;
        // What was just registered goes with its lease.
        () = shutdown.wait() => {
            tracing::info!("stopped before it had started");
            return Ok(());
        }
        started = starting => started?,
    };
    let leaving = leave(shutdown.clone(), registration, readiness.clone());
    let served = crpc::server::serve(listener, routes, readiness, shutdown.clone(), &core.config.shutdown);
    let stopping = async {
        let (served, ()) = tokio::join!(served, leaving);
        delivered::flush(&core).await;
        marks::leave(&core).await;
        tracing::info!("state has stopped");
        served
    };
    tokio::select! {
        biased;
        outcome = stopping => outcome,
        // As if it had been killed: its lease ends by itself, and others push what it had not.
        () = shutdown.wait_hard() => Ok(()),
    }
}

/// Opens everything, and registers last.
async fn start(
    config: Config,
    tokens: Option<Verifier>,
    metrics: Metrics,
    readiness: Readiness,
    shutdown: Shutdown,
) -> Result<(Arc<Core>, TcpListener, Routes, Registration), Fatal> {
    let listener = crpc::listen::bind(config.rpc.listen, "rpc.listen").await?;
    let store = open_store(&config).await?;
    let servers = crpc::registry::open(&config.registry).await?;
    let (core, accepted) = Core::new(Parts {
        config,
        store,
        clock: Box::new(TokioClock),
        life: rand::random(),
        tokens,
        metrics,
        readiness: readiness.clone(),
        shutdown,
    });
    let _ = core.peers.set(servers.clone());
    core.check_store().await;
    // The mark stands before anything can be accepted.
    marks::mark(&core).await.map_err(|error| Fatal::unavailable(error.to_string()))?;
    tokio::spawn(watch_store(core.clone()));
    tokio::spawn(fan_out::run(core.clone(), accepted));
    tokio::spawn(marks::run(core.clone()));
    tokio::spawn(repush::run(core.clone()));
    tokio::spawn(relay::run(core.clone()));
    tokio::spawn(delivered::run(core.clone()));
    tokio::spawn(presence::run(core.clone()));
    tokio::spawn(trim_recency(core.clone()));
    warn_of_open_doors(&core);

    let link = LinkServer::new(LinkService::new(core.clone()))
        .max_decoding_message_size(LINK_MESSAGE_BYTES_MAX)
        .max_encoding_message_size(LINK_MESSAGE_BYTES_MAX);
    let calls = StateServer::new(StateService::new(core.clone()));
    let routes = Routes::new(link).add_service(calls);
    readiness.set("registry", Ok(()));
    readiness.set("listener", Ok(()));
    let endpoint = Endpoint {
        zone: core.config.node.zone.clone(),
        ..Endpoint::new("state", core.config.id(), core.config.advertised())
    };
    let registration = servers.register(endpoint).await?;
    tracing::info!(durability = core.durability().as_str_name(), "state is listening");
    Ok((core, listener, routes, registration))
}

/// Deregisters first, so that nobody new comes.
async fn leave(shutdown: Shutdown, registration: Registration, readiness: Readiness) {
    shutdown.wait().await;
    readiness.set("listener", Err("stopping".to_owned()));
    registration.deregister().await;
}

async fn watch_store(core: Arc<Core>) {
    let mut ticks = tokio::time::interval(STORE_CHECK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        core.check_store().await;
    }
}

/// Says loudly who may log in.
fn warn_of_open_doors(core: &Arc<Core>) {
    if let Some(tokens) = &core.tokens {
        tracing::info!(?tokens, "a login needs a token");
        return;
    }
    if core.config.auth.insecure {
        tokio::spawn(async {
            let mut ticks = tokio::time::interval(INSECURE_WARNING);
            loop {
                ticks.tick().await;
                tracing::warn!("auth.insecure = true: anybody who reaches a gateway can be any user");
            }
        });
    } else {
        tracing::warn!(
            "development logins: whoever names a user is that user; only loopback gateways are served; set auth.keys"
        );
    }
}

/// Retention by age: one bucket at a time, all within a minute.
async fn trim_recency(core: Arc<Core>) {
    let days = core.config.store.retention_days;
    if days == 0 {
        return;
    }
    let kept = Duration::from_secs(u64::from(days) * 86_400);
    let pause = Duration::from_secs(60) / crate::store::CHAT_BUCKETS;
    let mut ticks = tokio::time::interval(pause);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    for bucket in (0..crate::store::CHAT_BUCKETS).cycle() {
        ticks.tick().await;
        let Some(now_us) = core.ledger.store_now_us(core.clock.now()) else { continue };
        let before_us = now_us.saturating_sub(kept.as_micros() as u64);
        core.apply(&[Op::Expire { bucket, before_us, limit: 100 }]).await;
    }
}
