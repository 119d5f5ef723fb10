//! The store as state servers see it: calls that travel, are done late, in part or not at all, and whose answers get lost.
//!
//! A server's task asks through [`Handle`], which puts the call on the [`Desk`] and waits; [`Storage`] takes it from there, as
//! events. Pauses of a server's tasks go the same way.
//!
//! Trap: a call that was given up may still be done. "Unknown" is the only truth about it.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use proto::wire::Durability;
use state::simulation::Clock;
use state::store::{Answer, Appended, Op, Outcome, Store, StoreError};
use state::store_memory::{MemoryStore, Plants, Terms};

use super::event::Event;
use super::net::Net;
use super::plan::{MS, Plan, Plant, SMALL_BYTES_MAX};

/// A task of a life of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(missing_docs)]
pub struct Caller {
    pub server: usize,
    pub life: u64,
    pub task: u64,
}

/// Between the tasks of all servers and the world.
#[derive(Default)]
pub struct Desk {
    now_us: u64,
    /// Whose task is being polled.
    caller: Caller,
    next: u64,
    calls: Vec<(u64, Caller, Vec<Op>)>,
    answers: BTreeMap<u64, Vec<Outcome>>,
    pauses: Vec<(Caller, Duration)>,
}

/// What a server holds in the place of a store.
pub struct Handle {
    desk: Arc<Mutex<Desk>>,
    /// Users that were offline once, when that is remembered on purpose.
    offline: Option<Mutex<BTreeSet<u64>>>,
}

/// What a server holds in the place of a clock.
pub struct VirtualClock {
    desk: Arc<Mutex<Desk>>,
    start: Instant,
}

/// See the head of this file.
pub struct Storage {
    /// What is stored.
    pub memory: MemoryStore,
    desk: Arc<Mutex<Desk>>,
    calls: BTreeMap<u64, Call>,
    down: bool,
    /// Of each server: until when nothing gets through to the store.
    cut_until_us: Vec<u64>,
    /// New messages that were stored at the wish of a life of a server, not counted yet by whoever asks.
    pub stored: Vec<Caller>,
}

struct Call {
    caller: Caller,
    ops: Vec<Op>,
    outcomes: Vec<Outcome>,
    answer_is_lost: bool,
    given_up: bool,
}

impl Desk {
    /// What the tasks polled next will be known as.
    pub fn begin(&mut self, caller: Caller, now_us: u64) {
        (self.caller, self.now_us) = (caller, now_us);
    }

    fn fresh(&mut self) -> u64 {
        self.next += 1;
        self.next
    }
}

impl Storage {
    /// Empty.
    pub fn new(plan: &Plan) -> Self {
        let desk: Arc<Mutex<Desk>> = Arc::default();
        let clock = desk.clone();
        let plants = Plants {
            dedupe_off: plan.has(Plant::DedupeOff),
            acknowledge_before_persist: plan.has(Plant::AckBeforePersist),
            binding_unchecked: plan.has(Plant::BindingUnchecked),
            refusal_keeps_id: plan.has(Plant::RefusalKeepsId),
        };
        let terms = Terms { plants, seed: plan.seed, ..Terms::default() };
        Storage {
            memory: MemoryStore::new(move || EPOCH_US + clock.lock().now_us, terms),
            desk,
            calls: BTreeMap::new(),
            down: false,
            cut_until_us: vec![0; plan.servers],
            stored: Vec::new(),
        }
    }

    /// For the tasks of a server.
    pub fn handle(&self, plan: &Plan) -> Handle {
        Handle {
            desk: self.desk.clone(),
            offline: plan.has(Plant::OfflineCached).then(|| Mutex::new(BTreeSet::new())),
        }
    }

    /// For the tasks of a server. `start`: the instant of virtual time 0.
    pub fn clock(&self, start: Instant) -> VirtualClock {
        VirtualClock { desk: self.desk.clone(), start }
    }

    /// Says whose task is polled next.
    pub fn begin(&self, caller: Caller, now_us: u64) {
        self.desk.lock().begin(caller, now_us);
    }

    /// Sends off what the tasks asked for since the last time.
    pub fn take(&mut self, net: &mut Net, plan: &Plan, healed: bool) {
        let (calls, pauses) = {
            let mut desk = self.desk.lock();
            (std::mem::take(&mut desk.calls), std::mem::take(&mut desk.pauses))
        };
        for (caller, for_) in pauses {
            let Caller { server, life, task } = caller;
            net.after(for_.as_micros() as u64, Event::Wakes { server, life, task });
        }
        for (id, caller, ops) in calls {
            let mut travel_us = net.draw.delay(plan.store_us, 40, 80 * MS);
            let fate = if healed { 1_000 } else { net.draw.between(0, 999) };
            let is_cut = !healed && net.now_us < self.cut_until_us[caller.server];
            let (late, lost) = (plan.call_late, plan.call_late + plan.call_lost);
            let is_lost = is_cut || (late..lost).contains(&fate);
            let binds = ops.iter().any(|op| matches!(op, Op::Bind { .. }));
            let is_large = |op: &Op| matches!(op, Op::Append(append) if append.refusal.is_none() && append.body.len() > SMALL_BYTES_MAX);
            let large = ops.iter().any(is_large);
            if fate < late
                || (binds && !healed && net.draw.permille(plan.late_bind))
                || (large && !healed && net.draw.permille(plan.late_large))
            {
                travel_us += net.draw.between(1_000 * MS, 6_000 * MS);
            }
            net.after(CALL_MS_MAX * MS, Event::CallExpires { call: id });
            let answer_is_lost = (lost..lost + plan.call_reply_lost).contains(&fate);
            let outcomes = Vec::with_capacity(ops.len());
            self.calls.insert(id, Call { caller, ops, outcomes, answer_is_lost, given_up: false });
            if !is_lost {
                net.after(travel_us, Event::CallArrives { call: id });
            }
        }
    }

    /// Whose call it is.
    pub fn caller(&self, call: u64) -> Option<Caller> {
        self.calls.get(&call).map(|call| call.caller)
    }

    /// A call reaches the store: done, or done in part and the rest a little later.
    pub fn arrives(&mut self, id: u64, net: &mut Net, plan: &Plan) {
        self.desk.lock().now_us = net.now_us;
        let Some(call) = self.calls.get_mut(&id) else { return };
        let left = call.ops.len() - call.outcomes.len();
        if self.down {
            let error = StoreError::Unknown("the connection was lost".to_owned());
            call.outcomes.resize(call.ops.len(), Err(error));
        } else {
            // Pipelines of different servers interleave.
            let now = if left > 1 && net.draw.permille(60) {
                net.draw.between(1, left as u64 - 1)
            } else {
                left as u64
            };
            for _ in 0..now {
                let op = &call.ops[call.outcomes.len()];
                let outcome = self.memory.apply_one(op);
                if matches!(outcome, Ok(Answer::Appended(Appended::Stored { again: false, .. }))) {
                    self.stored.push(call.caller);
                }
                call.outcomes.push(outcome);
            }
            if (now as usize) < left {
                let rest_us = net.draw.between(1, 5 * MS);
                return net.after(rest_us, Event::CallArrives { call: id });
            }
        }
        if call.given_up {
            self.calls.remove(&id);
        } else if !call.answer_is_lost {
            let travel_us = net.draw.delay(plan.store_us, 40, 80 * MS);
            net.after(travel_us, Event::CallAnswered { call: id });
        }
    }

    /// The answer is there. Whose task goes on.
    pub fn answered(&mut self, id: u64) -> Option<Caller> {
        if self.calls.get(&id)?.answer_is_lost {
            return None;
        }
        let call = self.calls.remove(&id)?;
        if call.given_up {
            return None;
        }
        self.desk.lock().answers.insert(id, call.outcomes);
        Some(call.caller)
    }

    /// Nobody waits any longer. Whose task goes on.
    pub fn expires(&mut self, id: u64) -> Option<Caller> {
        let call = self.calls.get_mut(&id)?;
        if call.given_up {
            return None;
        }
        call.given_up = true;
        let unknown = vec![Err(StoreError::Unknown("no answer in time".to_owned())); call.ops.len()];
        self.desk.lock().answers.insert(id, unknown);
        Some(call.caller)
    }

    /// Nothing from or to this server gets through for a while.
    pub fn cut(&mut self, server: usize, until_us: u64) {
        let until = &mut self.cut_until_us[server];
        *until = (*until).max(until_us);
        for call in self.calls.values_mut().filter(|call| call.caller.server == server) {
            call.answer_is_lost = true;
        }
    }

    /// The store's process dies. What is under way is done as far as it is, and its answers are lost.
    pub fn crash(&mut self) {
        self.down = true;
        self.memory.crash();
        self.calls.values_mut().for_each(|call| call.answer_is_lost |= !call.outcomes.is_empty());
    }

    /// It is back.
    pub fn back(&mut self) {
        self.down = false;
    }

    /// Whether it is there.
    pub fn is_down(&self) -> bool {
        self.down
    }

    /// All cuts are over.
    pub fn heal(&mut self) {
        self.cut_until_us.fill(0);
        self.down = false;
    }

    /// A server has died: its calls that have not arrived may or may not arrive still, and nobody waits for them.
    pub fn forget(&mut self, server: usize, net: &mut Net) {
        let mut lost = Vec::new();
        for (id, call) in self.calls.iter_mut().filter(|(_, call)| call.caller.server == server) {
            call.given_up = true;
            if call.outcomes.is_empty() && net.draw.permille(500) {
                lost.push(*id);
            }
        }
        lost.iter().for_each(|id| drop(self.calls.remove(id)));
    }
}

#[async_trait::async_trait]
impl Store for Handle {
    async fn apply(&self, ops: &[Op]) -> Vec<Outcome> {
        let mut outcomes = Asked { desk: &self.desk, call: None, ops: Some(ops.to_vec()) }.await;
        if let Some(offline) = &self.offline {
            remember_offline(&mut offline.lock(), ops, &mut outcomes);
        }
        outcomes
    }

    async fn durability(&self) -> Result<(Durability, String), StoreError> {
        Ok((Durability::Strict, "simulated".to_owned()))
    }
}

/// The planted fault: who was offline once is offline until he logs in here.
fn remember_offline(offline: &mut BTreeSet<u64>, ops: &[Op], outcomes: &mut [Outcome]) {
    for (op, outcome) in ops.iter().zip(outcomes) {
        match (op, outcome) {
            (Op::Bind { user, .. }, _) => drop(offline.remove(user)),
            (Op::Routes { user }, Ok(Answer::Routes(routes))) => {
                if routes.is_empty() {
                    offline.insert(*user);
                } else if offline.contains(user) {
                    routes.clear();
                }
            }
            _ => {}
        }
    }
}

/// A call on its way.
struct Asked<'a> {
    desk: &'a Mutex<Desk>,
    call: Option<u64>,
    ops: Option<Vec<Op>>,
}

impl Future for Asked<'_> {
    type Output = Vec<Outcome>;

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Vec<Outcome>> {
        let desk = self.desk;
        let mut desk = desk.lock();
        if let Some(ops) = self.ops.take() {
            let (id, caller) = (desk.fresh(), desk.caller);
            desk.calls.push((id, caller, ops));
            self.call = Some(id);
        }
        match self.call.and_then(|id| desk.answers.remove(&id)) {
            Some(outcomes) => Poll::Ready(outcomes),
            None => Poll::Pending,
        }
    }
}

impl Clock for VirtualClock {
    fn now(&self) -> Instant {
        self.start + Duration::from_micros(self.desk.lock().now_us)
    }

    fn pause(&self, for_: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let until = self.now() + for_;
        Box::pin(Paused { desk: self.desk.clone(), start: self.start, until, asked: false, for_ })
    }
}

/// A pause of a task.
struct Paused {
    desk: Arc<Mutex<Desk>>,
    start: Instant,
    until: Instant,
    for_: Duration,
    asked: bool,
}

impl Future for Paused {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        let mut desk = this.desk.lock();
        if this.start + Duration::from_micros(desk.now_us) >= this.until {
            return Poll::Ready(());
        }
        if !this.asked {
            this.asked = true;
            let caller = desk.caller;
            desk.pauses.push((caller, this.for_));
        }
        Poll::Pending
    }
}

/// Virtual time 0, as Unix time.
pub const EPOCH_US: u64 = 1_700_000_000_000_000;

/// As `store.response_ms_max`.
const CALL_MS_MAX: u64 = 2_000;
