//! The worker threads of a gateway: how each parts with its fd table, waits for its time, and ends.
//!
//! Trap: a thread's stack keeps what it ever held, and there are fifty of them. What a worker begins with is done with in a call of its
//! own, so that the stack under its loop fits two pages.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;

use crossbeam_channel::bounded;
use crpc::Fatal;

use crate::bridge::Outbox;
use crate::config::Plan;
use crate::sys;
use crate::wake::{Starved, Wake};
use crate::worker::{Inbox, Shared, Worker};

/// What a worker thread is told when everything is there to begin.
pub struct Start {
    pub incarnation: u32,
    pub listen: std::net::SocketAddr,
    pub answer: mpsc::Sender<std::io::Result<std::net::SocketAddr>>,
}

pub struct WorkerThread {
    pub start: mpsc::Sender<Start>,
    pub thread: JoinHandle<std::io::Result<()>>,
}

/// Starts the threads and waits until each has its own fd table.
pub fn start_workers(
    plan: &Plan,
    wakes: &[Wake],
    shared: &Shared,
    failed: &Arc<AtomicBool>,
) -> Result<(Vec<WorkerThread>, Vec<Outbox>), Fatal> {
    let (parted, parting) = mpsc::channel();
    let mut threads = Vec::new();
    let mut outboxes = Vec::new();
    for (index, wake) in wakes.iter().enumerate() {
        let (down_sender, down) = bounded(shared.config.workers.down_batches_max);
        let starved = Starved::new();
        let inbox = Inbox { down, wake: wake.clone(), starved: starved.clone() };
        outboxes.push(Outbox { down: down_sender, wake: wake.clone(), starved });
        let (start, started) = mpsc::channel();
        let newcomer = Box::new(Newcomer {
            index: index as u8,
            slots_max: plan.connections_per_worker_max,
            shared: shared.clone(),
            inbox,
            parted: parted.clone(),
            started,
        });
        let alarm = Alarm(failed.clone());
        let thread = sys::spawn(format!("worker-{index}"), move |stack| {
            let worked = match newcomer.begin() {
                Some(worker) => worker.run(&stack),
                None => Ok(()),
            };
            ended(index, worked, alarm)
        })
        .map_err(|e| Fatal::internal(format!("starting worker {index}: {e}")))?;
        threads.push(WorkerThread { start, thread });
    }
    drop(parted);
    for _ in 0..plan.workers {
        match parting.recv() {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                return Err(Fatal::internal(format!(
                    "a worker cannot have its own fd table (unshare(CLONE_FILES): {error}); a container's seccomp profile must \
                     allow unshare, see scripts/docker/seccomp.json"
                )));
            }
            Err(_) => return Err(Fatal::internal("a worker ended before it began")),
        }
    }
    Ok((threads, outboxes))
}

/// Raised when a worker ends by an error or a panic. A plain flag, which the main thread looks at: a worker must not wake
/// a tokio runtime, whose fds are not in its table.
struct Alarm(Arc<AtomicBool>);

impl Alarm {
    fn all_is_well(self) {
        std::mem::forget(self);
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// What a worker's thread begins with. Boxed, and done with in a call of its own: a thread's stack keeps what it ever held, and there are
/// fifty of them.
struct Newcomer {
    index: u8,
    slots_max: usize,
    shared: Shared,
    inbox: Inbox,
    parted: mpsc::Sender<std::io::Result<()>>,
    started: mpsc::Receiver<Start>,
}

impl Newcomer {
    /// Parts with the fd table, waits for its time, and binds the listener. `None`: there is nothing to begin.
    #[inline(never)]
    #[expect(
        clippy::boxed_local,
        reason = "a thread's closure lies on its stack as long as the thread lives"
    )]
    fn begin(self: Box<Self>) -> Option<Box<Worker>> {
        let Newcomer { index, slots_max, shared, inbox, parted, started } = *self;
        let alone = nix::sys::signal::SigSet::all().thread_block().map_err(std::io::Error::from);
        // Nobody listens any more when the start failed elsewhere; then there is nothing to begin either.
        let _ = parted.send(alone.and_then(|()| sys::unshare_files()));
        let Start { incarnation, listen, answer } = started.recv().ok()?;
        // A channel keeps room for 31 messages, a worker lives as long as the process.
        drop((parted, started));
        let worker = Worker::new(index, incarnation, listen, slots_max, shared, inbox);
        match worker.and_then(|worker| Ok((worker.address()?, worker))) {
            Ok((address, worker)) => {
                let _ = answer.send(Ok(address));
                Some(worker)
            }
            Err(error) => {
                let _ = answer.send(Err(error));
                None
            }
        }
    }
}

/// How a worker's thread ends.
#[inline(never)]
fn ended(index: usize, worked: std::io::Result<()>, alarm: Alarm) -> std::io::Result<()> {
    match &worked {
        Ok(()) => alarm.all_is_well(),
        Err(error) => tracing::error!(worker = index, %error, "a worker ended"),
    }
    worked
}
