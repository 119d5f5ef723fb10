//! The state server process: start, run, stop, and the core that its tasks share. One tokio thread: run more servers to
//! use more cores.
//!
//! Trap: nothing in the core is the truth. Users and listed chats are caches of facts that do not change, delivered
//! cursors may be lost, and everything else is in the store.

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::pin::pin;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crpc::registry::{Endpoint, Registration, Registry};
use crpc::token::Verifier;
use crpc::{Fatal, Readiness, Shutdown};
use futures_util::future::{self, Either};
use lru::LruCache;
use parking_lot::Mutex;
use proto::link::link_server::LinkServer;
use proto::state::state_server::StateServer;
use proto::wire::Durability;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc};
use tonic::service::Routes;

use crate::calls::StateService;
use crate::clock::{Clock, TokioClock};
use crate::config::Config;
use crate::delivered::{self, Delivered, Histories};
use crate::doubts::Doubts;
use crate::fan_out::{self, Accepted};
use crate::gateways::Gateways;
use crate::ledger::Ledger;
use crate::losses::Losses;
use crate::marks;
use crate::metrics::Metrics;
use crate::pace::Pace;
use crate::presence::{self, Presence};
use crate::rate::Rate;
use crate::relay;
use crate::repush::{self, Repush};
use crate::roster::Rosters;
use crate::service::LinkService;
use crate::store::{Op, Outcome, Store, StoreError};
use crate::store_redb::{OpenError, RedbStore};
use crate::store_redis::RedisStore;
use crate::takeover::Judge;
use crate::users::Users;

/// What the tasks share.
pub struct Core {
    /// Every limit.
    pub config: Config,
    /// The truth.
    pub store: Box<dyn Store>,
    /// Names and numbers.
    pub users: Users,
    /// Of messages for many.
    pub pace: Pace,
    /// Who reads groups, as read lately.
    pub rosters: Rosters,
    /// Who watches whom.
    pub presence: Presence,
    /// Delivered cursors on their way to the store.
    pub delivered: Delivered,
    /// Open streams.
    pub gateways: Gateways,
    /// Bytes of one-to-one messages that may still be handed to the fan-out.
    pub backlog: Arc<Semaphore>,
    /// To the fan-out.
    pub accepted: mpsc::Sender<Accepted>,
    /// The clock that decides.
    pub clock: Arc<dyn Clock>,
    /// What is accepted and not pushed yet.
    pub ledger: Ledger,
    /// What the other servers' marks say.
    pub judge: Mutex<Judge>,
    /// What is to be pushed again.
    pub repush: Repush,
    /// What may have been stored without an answer.
    pub doubts: Doubts,
    /// Store time at which this life wrote its first mark: nothing was accepted before.
    pub began_us: OnceLock<u64>,
    /// Buckets whose history a client's word has ended lately.
    pub losses: Losses,
    /// Histories seen lately.
    pub histories: Histories,
    /// Users and connections that are gone and whose routes are to be removed.
    pub unbinds: Mutex<VecDeque<(u64, u64)>>,
    /// What tokens are verified with. `None`: logins are development logins.
    pub tokens: Option<Verifier>,
    /// How fast users and devices may send. `None`: as they like.
    pub rate: Option<Rate>,
    /// How many others a user may put into groups.
    pub naming: Option<Rate>,
    /// How often a user may ask who is in a group.
    pub listing: Option<Rate>,
    /// Where the other state servers are found.
    pub peers: OnceLock<Arc<dyn Registry>>,
    /// Metrics.
    pub metrics: Metrics,
    /// The wish to stop.
    pub shutdown: Shutdown,
    readiness: Readiness,
    durability: AtomicI32,
    /// Of the store, when the caches were last known to be right.
    generation: AtomicU64,
    listed: Mutex<LruCache<String, ()>>,
}

/// What a core is made of.
struct Parts {
    config: Config,
    store: Box<dyn Store>,
    clock: Box<dyn Clock>,
    /// Number of this life of the server.
    life: u64,
    tokens: Option<Verifier>,
    metrics: Metrics,
    readiness: Readiness,
    shutdown: Shutdown,
}

/// Longest message on the link, bytes.
const LINK_MESSAGE_BYTES_MAX: usize = 64 * 1024 * 1024;

/// How often the store is asked how it is, and what it promises.
const STORE_CHECK: Duration = Duration::from_secs(1);

/// How long the end of the process waits for what blocks.
const BLOCKING_MAX: Duration = Duration::from_secs(2);

/// How often a warning about development logins from elsewhere is repeated.
const INSECURE_WARNING: Duration = Duration::from_secs(60);

impl Core {
    fn new(parts: Parts) -> (Arc<Core>, mpsc::Receiver<Accepted>) {
        let Parts { config, store, clock, life, tokens, metrics, readiness, shutdown } = parts;
        let clock: Arc<dyn Clock> = clock.into();
        let (sender, accepted) = mpsc::channel(config.limits.fan_out_max);
        let room = NonZeroUsize::new(config.limits.chat_cache_max).unwrap_or(NonZeroUsize::MIN);
        let core = Core {
            users: Users::new(config.limits.user_cache_max),
            pace: Pace::new(clock.clone()),
            rosters: Rosters::new(config.limits.group_cache_members_max),
            presence: Presence::new(&config.limits),
            delivered: Delivered::new(config.limits.delivered_waiting_max),
            gateways: Gateways::default(),
            backlog: Arc::new(Semaphore::new(config.limits.fan_out_bytes_max)),
            accepted: sender,
            rate: Rate::new(&config.limits, clock.now()),
            naming: Rate::of_naming(&config.limits, clock.now()),
            listing: Rate::of_listing(&config.limits, clock.now()),
            tokens,
            peers: OnceLock::new(),
            clock,
            ledger: Ledger::default(),
            judge: Mutex::new(Judge::new((config.id(), life))),
            repush: Repush::default(),
            doubts: Doubts::default(),
            began_us: OnceLock::new(),
            losses: Losses::default(),
            histories: Histories::default(),
            unbinds: Mutex::default(),
            metrics,
            shutdown,
            readiness,
            durability: AtomicI32::new(Durability::Unknown as i32),
            generation: AtomicU64::new(store.generation()),
            listed: Mutex::new(LruCache::new(room)),
            store,
            config,
        };
        (Arc::new(core), accepted)
    }

    /// For a simulation: without a runtime, a network, or a clock of its own. The life's number comes from the seed.
    pub fn for_simulation(
        config: Config,
        store: Box<dyn Store>,
        clock: Box<dyn Clock>,
        life: u64,
    ) -> (Arc<Core>, mpsc::Receiver<Accepted>) {
        let metrics = Metrics::new(&mut crpc::metrics::Metrics::new("state"));
        let (readiness, shutdown) = (Readiness::new(), Shutdown::new());
        Core::new(Parts { config, store, clock, life, tokens: None, metrics, readiness, shutdown })
    }

    /// One store call, which is given up at that time: what is not asked by then surely did not happen, and of what is
    /// asked nothing is known.
    pub async fn apply_until(&self, until: Instant, ops: &[Op]) -> Vec<Outcome> {
        self.until(until, ops, self.apply(ops)).await
    }

    /// Both: see [`Core::apply_as`].
    pub async fn apply_as_until(&self, generation: u64, until: Instant, ops: &[Op]) -> Vec<Outcome> {
        self.until(until, ops, self.apply_as(generation, ops)).await
    }

    async fn until(
        &self,
        until: Instant,
        ops: &[Op],
        call: impl Future<Output = Vec<Outcome>>,
    ) -> Vec<Outcome> {
        let left = until.saturating_duration_since(self.clock.now());
        if ops.is_empty() {
            return Vec::new();
        }
        if left.is_zero() {
            let late = || Err(StoreError::Refused("there was no time left to ask".to_owned()));
            return ops.iter().map(|_| late()).collect();
        }
        match future::select(pin!(call), self.clock.pause(left)).await {
            Either::Left((outcomes, _)) => outcomes,
            Either::Right(_) => {
                let late = || Err(StoreError::Unknown("it took too long".to_owned()));
                ops.iter().map(|_| late()).collect()
            }
        }
    }

    /// One store call, measured.
    pub async fn apply(&self, ops: &[Op]) -> Vec<Outcome> {
        self.measured(ops, self.store.apply(ops)).await
    }

    /// One store call that was decided on by what is remembered here since [`Core::generation`] was this: if the store is
    /// another by now, nothing is done and all is refused.
    pub async fn apply_as(&self, generation: u64, ops: &[Op]) -> Vec<Outcome> {
        if self.generation() != generation {
            return ops.iter().map(|_| Err(StoreError::another())).collect();
        }
        self.measured(ops, self.store.apply_as(generation, ops)).await
    }

    /// Of the store, as far as what is remembered here follows it.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Relaxed)
    }

    async fn measured(&self, ops: &[Op], call: impl Future<Output = Vec<Outcome>>) -> Vec<Outcome> {
        if ops.is_empty() {
            return Vec::new();
        }
        let began = Instant::now();
        let outcomes = call.await;
        self.follow_generation();
        self.metrics.store.observe(began.elapsed().as_secs_f64());
        self.metrics.store_ops.inc_by(ops.len() as u64);
        self.metrics.store_errors.inc_by(outcomes.iter().filter(|outcome| outcome.is_err()).count() as u64);
        debug_assert_eq!(outcomes.len(), ops.len());
        outcomes
    }

    /// Facts that never change are others when the store is another.
    fn follow_generation(&self) {
        let generation = self.store.generation();
        if self.generation.swap(generation, Ordering::Relaxed) != generation {
            tracing::warn!("the store is not what it was; what was remembered of it is forgotten");
            self.users.forget();
            self.listed.lock().clear();
            self.histories.forget();
        }
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

    /// Unix time of this machine, ms: what tokens are held against.
    pub fn unix_ms(&self) -> u64 {
        self.unix_us() / 1_000
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
    check_store(&core).await;
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
    if let Some(tokens) = &core.tokens {
        tracing::info!(?tokens, "a login needs a token");
        return;
    }
    tracing::warn!(
        "development logins: whoever names a user is that user; only loopback gateways are served; set auth.keys"
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

#[cfg(test)]
pub(crate) mod tests;
