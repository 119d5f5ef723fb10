//! The state server process: start, run, stop, and the core that its tasks share. One tokio thread: run more servers to
//! use more cores.
//!
//! Trap: nothing in the core is the truth. Users and listed chats are caches of facts that do not change, delivered
//! cursors may be lost, and everything else is in the store.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crpc::registry::{Endpoint, Registration};
use crpc::{Fatal, Readiness, Shutdown};
use lru::LruCache;
use parking_lot::Mutex;
use proto::link::link_server::LinkServer;
use proto::state::state_server::StateServer;
use proto::wire::Durability;
use tokio::sync::mpsc;

use crate::calls::StateService;
use crate::config::Config;
use crate::delivered::{self, Delivered};
use crate::fan_out::{self, Accepted};
use crate::gateways::Gateways;
use crate::metrics::Metrics;
use crate::service::LinkService;
use crate::store::{Op, Outcome, Store, StoreError};
use crate::store_redb::{OpenError, RedbStore};
use crate::store_redis::RedisStore;
use crate::users::Users;

/// What the tasks share.
pub struct Core {
    /// Every limit.
    pub config: Config,
    /// The truth.
    pub store: Box<dyn Store>,
    /// Names and numbers.
    pub users: Users,
    /// Delivered cursors on their way to the store.
    pub delivered: Delivered,
    /// Open streams.
    pub gateways: Gateways,
    /// To the fan-out.
    pub accepted: mpsc::Sender<Accepted>,
    /// Metrics.
    pub metrics: Metrics,
    /// The wish to stop.
    pub shutdown: Shutdown,
    readiness: Readiness,
    durability: AtomicI32,
    listed: Mutex<LruCache<String, ()>>,
}

/// Longest message on the link, bytes.
const LINK_MESSAGE_BYTES_MAX: usize = 64 * 1024 * 1024;

/// How often the store is asked how it is, and what it promises.
const STORE_CHECK: Duration = Duration::from_secs(1);

/// How often a warning about development logins from elsewhere is repeated.
const INSECURE_WARNING: Duration = Duration::from_secs(60);

/// Recency entries older than this are forgotten.
const RECENCY_KEPT: Duration = Duration::from_secs(600);

impl Core {
    /// One store call, measured.
    pub async fn apply(&self, ops: &[Op]) -> Vec<Outcome> {
        if ops.is_empty() {
            return Vec::new();
        }
        let began = Instant::now();
        let outcomes = self.store.apply(ops).await;
        self.metrics.store.observe(began.elapsed().as_secs_f64());
        self.metrics.store_ops.inc_by(ops.len() as u64);
        self.metrics.store_errors.inc_by(outcomes.iter().filter(|outcome| outcome.is_err()).count() as u64);
        debug_assert_eq!(outcomes.len(), ops.len());
        outcomes
    }

    /// Tells readiness and the log that the store failed; the check of every second tells when it is back.
    pub fn store_failed(&self, error: &StoreError) {
        self.readiness.set("store", Err(error.to_string()));
        tracing::debug!(%error, "an operation failed");
    }

    /// Whether the store answered when it was last asked.
    pub fn store_answers(&self) -> bool {
        !self.readiness.reasons().iter().any(|(name, _)| name == "store")
    }

    /// What the store promised when it was last asked.
    pub fn durability(&self) -> Durability {
        Durability::try_from(self.durability.load(Ordering::Relaxed)).unwrap_or(Durability::Unknown)
    }

    /// Whether this chat is known to stand in its members' lists.
    pub fn chat_is_listed(&self, chat: &str) -> bool {
        self.listed.lock().get(chat).is_some()
    }

    /// These chats stand in their members' lists.
    pub fn chats_are_listed(&self, chats: &[&str]) {
        let mut listed = self.listed.lock();
        for chat in chats {
            listed.put((*chat).to_owned(), ());
        }
    }

    /// Returns when this server is stopping and everybody has had time to turn to others: the links are to be closed.
    pub async fn time_to_close(&self) {
        self.shutdown.wait().await;
        tokio::time::sleep(Duration::from_millis(self.config.shutdown.drain_ms)).await;
    }

    /// Unix time of this machine, µs. For display only: messages carry the store's time.
    pub fn unix_us(&self) -> u64 {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
    }
}

/// Runs until a signal.
pub fn run(config: Config) -> Result<(), Fatal> {
    config.check().map_err(Fatal::config)?;
    crpc::log::init(&config.log)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Fatal::internal(format!("starting the runtime: {e}")))?;
    runtime.block_on(serve(config))
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
    let url = &config.store.url;
    match RedisStore::open(&config.store).await {
        Ok(store) => Ok(Box::new(store)),
        Err(StoreError::Unknown(reason)) => Err(Fatal::unavailable(format!(
            "the store at {url} cannot be reached ({reason}): start Redis there or change store.url"
        ))),
        Err(StoreError::Refused(reason) | StoreError::Corrupt(reason)) => Err(Fatal::config(reason)),
    }
}

async fn serve(config: Config) -> Result<(), Fatal> {
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
        store = config.store.url,
        registry = %config.registry,
        "state starts"
    );
    let listener = crpc::listen::bind(config.rpc.listen, "rpc.listen").await?;
    let store = open_store(&config).await?;
    let servers = crpc::registry::open(&config.registry).await?;
    let (sender, accepted) = mpsc::channel(config.limits.fan_out_max);
    let room = NonZeroUsize::new(config.limits.chat_cache_max).unwrap_or(NonZeroUsize::MIN);
    let core = Arc::new(Core {
        users: Users::new(config.limits.user_cache_max),
        delivered: Delivered::new(config.limits.delivered_waiting_max),
        gateways: Gateways::default(),
        accepted: sender,
        metrics,
        shutdown: shutdown.clone(),
        readiness: readiness.clone(),
        durability: AtomicI32::new(Durability::Unknown as i32),
        listed: Mutex::new(LruCache::new(room)),
        store,
        config,
    });
    check_store(&core).await;
    tokio::spawn(watch_store(core.clone()));
    tokio::spawn(fan_out::run(core.clone(), accepted));
    tokio::spawn(delivered::run(core.clone()));
    tokio::spawn(trim_recency(core.clone()));
    warn_of_open_doors(&core);

    let link = LinkServer::new(LinkService::new(core.clone()))
        .max_decoding_message_size(LINK_MESSAGE_BYTES_MAX)
        .max_encoding_message_size(LINK_MESSAGE_BYTES_MAX);
    let calls = StateServer::new(StateService::new(core.clone()));
    let routes = tonic::service::Routes::new(link).add_service(calls);
    readiness.set("registry", Ok(()));
    readiness.set("listener", Ok(()));
    let endpoint = Endpoint {
        zone: core.config.node.zone.clone(),
        ..Endpoint::new("state", core.config.id(), core.config.advertised())
    };
    let registration = servers.register(endpoint).await?;
    tracing::info!(durability = core.durability().as_str_name(), "state is listening");

    let leaving = leave(shutdown.clone(), registration, readiness.clone());
    let served = crpc::server::serve(listener, routes, readiness, shutdown, &core.config.shutdown);
    let (served, ()) = tokio::join!(served, leaving);
    delivered::flush(&core).await;
    tracing::info!("state has stopped");
    served
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
        check_store(&core).await;
    }
}

async fn check_store(core: &Core) {
    match core.store.durability().await {
        Ok((durability, why)) => {
            core.readiness.set("store", Ok(()));
            let before = core.durability.swap(durability as i32, Ordering::Relaxed);
            if before != durability as i32 {
                let word = if durability == Durability::Strict { "strict" } else { "weak" };
                core.readiness.note("durability", word);
                if durability == Durability::Strict {
                    tracing::info!("durability=strict: {why}");
                } else {
                    tracing::warn!("durability=weak, acknowledged messages may be lost: {why}");
                }
            }
        }
        Err(error) => core.readiness.set("store", Err(error.to_string())),
    }
}

/// Says loudly who may log in.
fn warn_of_open_doors(core: &Arc<Core>) {
    tracing::warn!(
        "development logins: whoever names a user is that user; only loopback gateways are served"
    );
    if core.config.auth.insecure {
        tokio::spawn(async {
            let mut ticks = tokio::time::interval(INSECURE_WARNING);
            loop {
                ticks.tick().await;
                tracing::warn!("auth.insecure = true: anybody who reaches a gateway can be any user");
            }
        });
    }
}

/// Keeps the recency index small: one bucket at a time, all within a minute.
async fn trim_recency(core: Arc<Core>) {
    let pause = Duration::from_secs(60) / crate::store::CHAT_BUCKETS;
    let mut ticks = tokio::time::interval(pause);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    for bucket in (0..crate::store::CHAT_BUCKETS).cycle() {
        ticks.tick().await;
        let before_us = core.unix_us().saturating_sub(RECENCY_KEPT.as_micros() as u64);
        core.apply(&[Op::TrimRecency { bucket, before_us }]).await;
    }
}
