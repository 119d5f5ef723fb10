//! The core over a store that answers as a test says.

use super::*;
use crate::clock::TokioClock;

type Answers = dyn Fn(&Op) -> Outcome + Send + Sync;

/// A store that answers as a test says, and notes what it was asked.
#[derive(Clone)]
pub(crate) struct Scripted {
    answers: Arc<Answers>,
    asked: Arc<Mutex<Vec<Vec<Op>>>>,
    generation: Arc<AtomicU64>,
    held: Arc<tokio::sync::watch::Sender<bool>>,
}

impl Scripted {
    pub(crate) fn new(answers: impl Fn(&Op) -> Outcome + Send + Sync + 'static) -> Self {
        Scripted {
            answers: Arc::new(answers),
            asked: Arc::default(),
            generation: Arc::default(),
            held: Arc::new(tokio::sync::watch::Sender::new(false)),
        }
    }

    /// Answers wait while it is held.
    pub(crate) fn hold(&self, held: bool) {
        self.held.send_replace(held);
    }

    /// It was emptied, or is an older copy.
    pub(crate) fn becomes_another(&self) {
        self.generation.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn calls(&self) -> usize {
        self.asked.lock().len()
    }

    pub(crate) fn last(&self) -> Option<Op> {
        self.asked.lock().last().and_then(|ops| ops.last().cloned())
    }

    pub(crate) fn asked(&self) -> Vec<Op> {
        self.asked.lock().iter().flatten().cloned().collect()
    }
}

#[async_trait::async_trait]
impl Store for Scripted {
    async fn apply(&self, ops: &[Op]) -> Vec<Outcome> {
        self.asked.lock().push(ops.to_vec());
        let mut held = self.held.subscribe();
        let _ = held.wait_for(|held| !held).await;
        ops.iter().map(|op| (self.answers)(op)).collect()
    }

    async fn durability(&self) -> Result<(Durability, String), StoreError> {
        Ok((Durability::Strict, "says the test".to_owned()))
    }

    fn generation(&self) -> u64 {
        self.generation.load(Ordering::Relaxed)
    }
}

pub(crate) fn core_over(store: Scripted) -> Arc<Core> {
    core_and_accepted(store).0
}

/// One time for as long as the test takes; pauses are real.
struct StillClock(Instant);

impl Clock for StillClock {
    fn now(&self) -> Instant {
        self.0
    }

    fn pause(&self, wait: Duration) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send>> {
        TokioClock.pause(wait)
    }
}

/// Where nothing is earned by waiting.
pub(crate) fn core_at_rest(store: Scripted) -> (Arc<Core>, mpsc::Receiver<Accepted>) {
    let clock = StillClock(Instant::now());
    Core::for_simulation(Config::default(), Box::new(store), Box::new(clock), 1)
}

pub(crate) fn core_and_accepted(store: Scripted) -> (Arc<Core>, mpsc::Receiver<Accepted>) {
    Core::for_simulation(Config::default(), Box::new(store), Box::new(TokioClock), 1)
}

#[tokio::test]
async fn a_store_that_is_silent_is_given_up_and_one_asked_too_late_is_not_asked() {
    let store = Scripted::new(|_| Ok(crate::store::Answer::Done));
    let core = core_over(store.clone());
    let op = [Op::DropMark { server: "s".into(), life: 1 }];
    assert!(core.apply_until(core.clock.now() + Duration::from_secs(60), &op).await[0].is_ok());
    store.hold(true);
    let late = core.apply_until(core.clock.now() + Duration::from_secs(1), &op).await;
    assert!(matches!(late[0], Err(StoreError::Unknown(_))), "{late:?}");
    let calls = store.calls();
    let late = core.apply_until(core.clock.now(), &op).await;
    assert!(matches!(late[0], Err(StoreError::Refused(_))), "{late:?}");
    assert_eq!(store.calls(), calls);
}

#[tokio::test]
async fn another_generation_of_the_store_empties_the_caches() {
    let store = Scripted::new(|_| Ok(crate::store::Answer::Done));
    let core = core_over(store.clone());
    let known = || (core.users.number("alice"), core.chat_is_listed("alice:bob"));
    core.users.learn("alice", 7);
    core.chats_are_listed(&["alice:bob"]);
    core.apply(&[Op::Incarnate]).await;
    assert_eq!(known(), (Some(7), true));
    store.generation.store(1, Ordering::Relaxed);
    let stale = core.apply_as(core.generation(), &[Op::Incarnate]).await;
    assert!(matches!(stale[0], Err(StoreError::Refused(_))), "{stale:?}");
    assert_eq!((known(), store.calls()), ((None, false), 1));
    assert!(core.apply_as(0, &[Op::Incarnate]).await[0].is_err(), "decided before");
    assert!(core.apply_as(core.generation(), &[Op::Incarnate]).await[0].is_ok());
}
