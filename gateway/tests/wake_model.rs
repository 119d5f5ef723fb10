//! The wake-up protocols between worker threads and the bridge, in every interleaving and with every value that the memory
//! model lets a load see: `src/wake.rs` itself, compiled over loom's atomics. A wake-up that is lost shows as a deadlock.
//!
//! The queues beside it are modelled weaker than the real ones: they order nothing by themselves, so what holds here does not
//! lean on fences that a queue happens to have inside.
//!
//! Trap: loom's types work inside `loom::model` only, and each more thread or step multiplies the time.

use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;

#[path = "../src/wake.rs"]
mod wake;

use sync::Arc;
use sys::EventFd;
use wake::{Starved, Wake};

/// What `src/wake.rs` is written over, here.
mod sync {
    pub use loom::sync::atomic;

    /// Never dropped: what loom has made must not be touched again while a deadlock that it found unwinds.
    #[derive(Debug)]
    pub struct Arc<T: 'static>(&'static T);

    impl<T> Arc<T> {
        pub fn new(value: T) -> Self {
            Arc(Box::leak(Box::new(value)))
        }
    }

    impl<T> Clone for Arc<T> {
        fn clone(&self) -> Self {
            Arc(self.0)
        }
    }

    impl<T> std::ops::Deref for Arc<T> {
        type Target = T;

        fn deref(&self) -> &T {
            self.0
        }
    }
}

/// An eventfd as the kernel has it: a counter, and an edge behind each write.
mod sys {
    use loom::sync::Notify;
    use loom::sync::atomic::{AtomicU64, Ordering};

    #[derive(Debug, Clone, Copy)]
    pub struct EventFd(&'static Kernel);

    #[derive(Debug)]
    struct Kernel {
        count: AtomicU64,
        edge: Notify,
    }

    impl EventFd {
        pub fn new() -> Self {
            EventFd(Box::leak(Box::new(Kernel { count: AtomicU64::new(0), edge: Notify::new() })))
        }

        pub fn wake(self) {
            self.0.count.fetch_add(1, Ordering::AcqRel);
            self.0.edge.notify();
        }

        /// As a worker waits: edge-triggered, the counter is never read.
        pub fn wait_edge(self) {
            self.0.edge.wait();
        }

        /// As the bridge waits: until there is something to be read.
        pub fn wait_readable(self) {
            while self.0.count.load(Ordering::Acquire) == 0 {
                self.0.edge.wait();
            }
        }

        pub fn clear(self) {
            self.0.count.swap(0, Ordering::AcqRel);
        }
    }
}

/// What one thread has pushed, which others see as late as they may.
#[derive(Debug, Clone)]
struct Pushed(Arc<AtomicUsize>);

impl Pushed {
    fn new() -> Self {
        Pushed(Arc::new(AtomicUsize::new(0)))
    }

    fn push(&self, upto: usize) {
        self.0.store(upto, Ordering::Relaxed);
    }

    fn drain(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

/// Tries all that may happen; with a bound, all in which a thread is interrupted at most so often.
fn model(preemptions_max: Option<usize>, run: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = preemptions_max;
    builder.check(run);
}

/// How the waiting side goes about one wake-up. The right order, and the wrong ones that must be found out.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Order {
    BeginThenDrain,
    DrainThenBegin,
}

/// Two threads push; a third waits as a worker does until it has seen all.
fn a_worker_is_woken(order: Order, counts: [usize; 2], preemptions_max: Option<usize>) {
    model(preemptions_max, move || {
        let wake = Wake::new(EventFd::new());
        let pushed = [Pushed::new(), Pushed::new()];
        let pushers: Vec<_> = counts
            .into_iter()
            .zip(&pushed)
            .map(|(count, mine)| {
                let (wake, mine) = (wake.clone(), mine.clone());
                thread::spawn(move || {
                    for n in 1..=count {
                        mine.push(n);
                        wake.wake();
                    }
                })
            })
            .collect();
        let mut seen = 0;
        while seen < counts.iter().sum() {
            wake.eventfd().wait_edge();
            if order == Order::BeginThenDrain {
                wake.begin();
            }
            seen = pushed.iter().map(Pushed::drain).sum();
            if order == Order::DrainThenBegin {
                wake.begin();
            }
        }
        pushers.into_iter().for_each(|pusher| pusher.join().unwrap());
    });
}

#[test]
fn no_push_to_a_worker_sleeps() {
    a_worker_is_woken(Order::BeginThenDrain, [1, 1], None);
    a_worker_is_woken(Order::BeginThenDrain, [2, 1], Some(2));
}

#[test]
#[should_panic(expected = "deadlock")]
fn clearing_behind_the_drain_is_found_out() {
    a_worker_is_woken(Order::DrainThenBegin, [1, 1], None);
}

/// The bridge reads the eventfd, begins, and drains.
fn the_bridge_is_woken(clear_first: bool) {
    model(Some(3), move || {
        let (wake, pushed) = (Wake::new(EventFd::new()), Pushed::new());
        let pusher = {
            let (wake, pushed) = (wake.clone(), pushed.clone());
            thread::spawn(move || {
                for n in 1..=3 {
                    pushed.push(n);
                    wake.wake();
                }
            })
        };
        while pushed.drain() < 3 {
            wake.eventfd().wait_readable();
            if clear_first {
                wake.eventfd().clear();
                wake.begin();
            } else {
                wake.begin();
                wake.eventfd().clear();
            }
        }
        pusher.join().unwrap();
    });
}

#[test]
fn no_push_to_the_bridge_sleeps() {
    the_bridge_is_woken(true);
}

#[test]
#[should_panic(expected = "deadlock")]
fn clearing_the_eventfd_behind_the_flag_is_found_out() {
    the_bridge_is_woken(false);
}

/// An inbox with room for one.
#[derive(Debug, Clone)]
struct Inbox(Arc<AtomicUsize>);

impl Inbox {
    fn try_send(&self, number: usize) -> bool {
        let room = self.0.load(Ordering::Relaxed) == 0;
        if room {
            self.0.store(number, Ordering::Relaxed);
        }
        room
    }

    fn try_recv(&self) -> Option<usize> {
        let number = self.0.load(Ordering::Relaxed);
        (number != 0).then(|| {
            self.0.store(0, Ordering::Relaxed);
            number
        })
    }
}

/// The bridge hands three deliveries to a worker whose inbox has room for one, as `outbox.rs` and
/// `Worker::take_deliveries` do.
fn a_full_inbox_empties(tries_behind_saying: usize) {
    model(Some(3), move || {
        let (down_wake, up_wake) = (Wake::new(EventFd::new()), Wake::new(EventFd::new()));
        let (inbox, starved) = (Inbox(Arc::new(AtomicUsize::new(0))), Starved::new());
        let worker = {
            let (down_wake, up_wake) = (down_wake.clone(), up_wake.clone());
            let (inbox, starved) = (inbox.clone(), starved.clone());
            thread::spawn(move || {
                let mut got = 0;
                while got < DELIVERIES {
                    down_wake.eventfd().wait_edge();
                    down_wake.begin();
                    while let Some(number) = inbox.try_recv() {
                        assert_eq!(number, got + 1, "in order, each once");
                        got = number;
                    }
                    if starved.take() {
                        up_wake.wake();
                    }
                }
            })
        };
        for number in 1..=DELIVERIES {
            while !inbox.try_send(number) {
                starved.say();
                if (0..tries_behind_saying).any(|_| inbox.try_send(number)) {
                    break;
                }
                up_wake.eventfd().wait_readable();
                up_wake.eventfd().clear();
                up_wake.begin();
            }
            down_wake.wake();
        }
        worker.join().unwrap();
    });
}

const DELIVERIES: usize = 3;

#[test]
fn whoever_waits_for_room_is_woken() {
    a_full_inbox_empties(1);
}

#[test]
#[should_panic(expected = "deadlock")]
fn waiting_without_a_last_try_is_found_out() {
    a_full_inbox_empties(0);
}
