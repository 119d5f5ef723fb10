//! The pace at which a message for thousands leaves: in parts, one on its way at a time, and behind each a rest as long as it
//! took. So others come in between, and half of the time is theirs alone, however fast the machine is. On the state server's
//! thread. Measured by row A9, in which others' p99 before is 3 to 8 ms and two cores do everything: with rests half as long it
//! was at most 10.2 ms, and 0.36 s to the last of 10,000; with these 8.3 and 11.4 ms, 0.42 and 0.48 s; with rests twice as long 8.1 ms and 0.65 s.
//!
//! Trap: a part has taken as long as its gateway says. One that stands still must hold up no other: a part that is not placed
//! in time is not waited for, and until one is again the next ones are waited for but shortly.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::{self, Either};
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::clock::Clock;

/// See the head of this file.
pub struct Pace {
    shared: Arc<Shared>,
}

struct Shared {
    clock: Arc<dyn Clock>,
    way: Arc<Semaphore>,
    /// Until when there is a rest.
    rests: Mutex<Option<Instant>>,
    is_late: AtomicBool,
}

/// Of a part that is on its way. When the last copy is dropped it is placed, or never will be.
#[derive(Clone)]
pub struct Turn {
    _part: Arc<OnItsWay>,
}

struct OnItsWay {
    since: Instant,
    shared: Arc<Shared>,
    _permit: OwnedSemaphorePermit,
}

/// Longest that a part waits for the one before it.
const PART_MAX: Duration = Duration::from_millis(100);

/// The same while a gateway is late.
const PART_BESIDE_LATE_MAX: Duration = Duration::from_millis(10);

/// Longest rest: who shares the machine with others has them to blame, too, for what a part takes.
const REST_MAX: Duration = Duration::from_millis(10);

impl Pace {
    /// Nothing is on its way.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        let (way, rests, is_late) = (Arc::new(Semaphore::new(1)), Mutex::default(), AtomicBool::new(false));
        Pace { shared: Arc::new(Shared { clock, way, rests, is_late }) }
    }

    /// Waits until the next part may leave. `None`: the one before is late, and not waited for any longer.
    pub async fn turn(&self) -> Option<Turn> {
        let Shared { clock, way, rests, is_late } = &*self.shared;
        let wait = if is_late.load(Ordering::Relaxed) { PART_BESIDE_LATE_MAX } else { PART_MAX };
        let free = std::pin::pin!(way.clone().acquire_owned());
        let Either::Left((permit, _)) = future::select(free, clock.pause(wait)).await else {
            is_late.store(true, Ordering::Relaxed);
            return None;
        };
        is_late.store(false, Ordering::Relaxed);
        let permit = permit.ok()?;
        let rests = *rests.lock();
        let left = rests.map_or(Duration::ZERO, |until| until.saturating_duration_since(clock.now()));
        if !left.is_zero() {
            clock.pause(left).await;
        }
        let (since, shared) = (clock.now(), self.shared.clone());
        Some(Turn { _part: Arc::new(OnItsWay { since, shared, _permit: permit }) })
    }
}

impl Drop for OnItsWay {
    fn drop(&mut self) {
        let now = self.shared.clock.now();
        let took = now.saturating_duration_since(self.since);
        *self.shared.rests.lock() = Some(now + took.min(REST_MAX));
    }
}

impl std::fmt::Debug for Turn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Turn")
    }
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;
    use std::task::Poll;

    use futures_util::poll;

    use super::*;

    /// Stands still until it is told to go on. Who waits for it is to be asked anew.
    #[derive(Clone)]
    struct Hand(Arc<Mutex<Instant>>);

    impl Clock for Hand {
        fn now(&self) -> Instant {
            *self.0.lock()
        }

        fn pause(&self, wait: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>> {
            let (hand, until) = (self.clone(), self.now() + wait);
            Box::pin(future::poll_fn(
                move |_| if hand.now() < until { Poll::Pending } else { Poll::Ready(()) },
            ))
        }
    }

    fn pace() -> (Pace, impl Fn(u64)) {
        let hand = Hand(Arc::new(Mutex::new(Instant::now())));
        (Pace::new(Arc::new(hand.clone())), move |ms| *hand.0.lock() += Duration::from_millis(ms))
    }

    #[tokio::test]
    async fn a_part_waits_for_the_one_before_and_as_long_again() {
        let (pace, passes) = pace();
        let first = pace.turn().await.expect("nothing is on its way");
        let copy = first.clone();
        passes(8);
        drop(first);
        let mut second = std::pin::pin!(pace.turn());
        assert!(poll!(second.as_mut()).is_pending(), "it has left, and is not placed");
        drop(copy);
        assert!(poll!(second.as_mut()).is_pending());
        passes(7);
        assert!(poll!(second.as_mut()).is_pending());
        passes(1);
        assert!(matches!(poll!(second.as_mut()), Poll::Ready(Some(_))));
        // Who comes when the rest is over does not wait.
        passes(1);
        assert!(pace.turn().await.is_some());
    }

    #[tokio::test]
    async fn who_is_late_is_waited_for_once() {
        let (pace, passes) = pace();
        let late = pace.turn().await;
        for wait_ms in [100, 10, 10] {
            let mut next = std::pin::pin!(pace.turn());
            assert!(poll!(next.as_mut()).is_pending());
            passes(wait_ms - 1);
            assert!(poll!(next.as_mut()).is_pending());
            passes(1);
            assert!(matches!(poll!(next.as_mut()), Poll::Ready(None)));
        }
        drop(late);
        let mut next = std::pin::pin!(pace.turn());
        assert!(poll!(next.as_mut()).is_pending(), "a rest, and not a long one");
        passes(10);
        let Poll::Ready(Some(_part)) = poll!(next.as_mut()) else { panic!("it is on its way") };
        let mut next = std::pin::pin!(pace.turn());
        assert!(poll!(next.as_mut()).is_pending());
        passes(99);
        assert!(poll!(next.as_mut()).is_pending());
    }
}
