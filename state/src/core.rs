//! What all tasks of a state server share: configuration, store, caches, and what is on its way.
//!
//! Trap: nothing in here is the truth. Users and listed chats are caches of facts that do not change, delivered
//! cursors may be lost, and everything else is in the store.

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::pin::pin;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crpc::registry::Registry;
use crpc::token::Verifier;
use crpc::{Readiness, Shutdown};
use futures_util::future::{self, Either};
use lru::LruCache;
use parking_lot::Mutex;
use proto::wire::Durability;
use tokio::sync::{Semaphore, mpsc};

use crate::clock::Clock;
use crate::config::Config;
use crate::delivered::{Delivered, Histories};
use crate::doubts::Doubts;
use crate::fan_out::Accepted;
use crate::gateways::Gateways;
use crate::ledger::Ledger;
use crate::losses::Losses;
use crate::metrics::Metrics;
use crate::pace::Pace;
use crate::presence::Presence;
use crate::rate::Rate;
use crate::repush::Repush;
use crate::roster::Rosters;
use crate::store::{Op, Outcome, Store, StoreError};
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
pub(crate) struct Parts {
    pub(crate) config: Config,
    pub(crate) store: Box<dyn Store>,
    pub(crate) clock: Box<dyn Clock>,
    /// Number of this life of the server.
    pub(crate) life: u64,
    pub(crate) tokens: Option<Verifier>,
    pub(crate) metrics: Metrics,
    pub(crate) readiness: Readiness,
    pub(crate) shutdown: Shutdown,
}

impl Core {
    pub(crate) fn new(parts: Parts) -> (Arc<Core>, mpsc::Receiver<Accepted>) {
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
            rate: Rate::of_messages(&config.limits, clock.now()),
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

    /// Asks the store how it is and what it promises, and tells readiness and the log.
    pub(crate) async fn check_store(&self) {
        let (durability, why) = match self.store.durability().await {
            Ok(told) => told,
            Err(error) => return self.readiness.set("store", Err(error.to_string())),
        };
        self.readiness.set("store", Ok(()));
        if self.durability.swap(durability as i32, Ordering::Relaxed) == durability as i32 {
            return;
        }
        if durability == Durability::Strict {
            self.readiness.note("durability", "strict");
            tracing::info!("durability=strict: {why}");
        } else {
            self.readiness.note("durability", "weak");
            tracing::warn!("durability=weak, acknowledged messages may be lost: {why}");
        }
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

#[cfg(test)]
pub(crate) mod tests;
