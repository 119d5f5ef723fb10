//! The bridge between worker threads and state servers: takes batches up from the workers, hands deliveries down to
//! them, and answers by itself what no state server can take. One tokio thread; the only user of the [`Link`] core.
//!
//! Trap: waking must not wait for working. One small task reads the eventfd and only passes the news on; the task that
//! drains may be waiting for room in a worker's inbox, and the worker that makes room wakes through the same eventfd.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use crossbeam_channel::Receiver;
use parking_lot::Mutex;
use proto::Command;
use proto::link::{DownBatch, Gone, Stored, Up, UpFrame, up};
use proto::wire::Code;
use tokio::sync::Notify;

use crate::batch::{Down, DownItem, Placed, Ticket, UpBatch};
use crate::config::Config;
use crate::id;
use crate::link::{Bounds, LaneKind, Link, StreamKey};
use crate::login_rate::LoginRate;
use crate::metrics::Metrics;
use crate::outbox::Outboxes;
use crate::refusal::refusal;
use crate::stored::Known;
use crate::sys;
use crate::wake::Wake;

pub use crate::outbox::Outbox;

/// Shared by the bridge's tasks.
pub struct Bridge {
    /// Every limit.
    pub config: Arc<Config>,
    /// Metrics.
    pub metrics: Metrics,
    /// This life of the gateway.
    pub incarnation: u32,
    link: Mutex<Link>,
    login_rate: Mutex<LoginRate>,
    senders: Mutex<HashMap<StreamKey, Arc<Notify>>>,
    workers: Outboxes,
    up: Receiver<UpBatch>,
    up_wake: Wake,
    work: Notify,
    room: Notify,
    settled: Notify,
    /// What the store holds, as state servers say.
    stored: Mutex<Known>,
    started: Instant,
}

/// Batches taken before other tasks get their turn.
const BATCHES_PER_ROUND: usize = 64;

/// Answers of the bridge itself after which they are handed to the workers before more is taken.
const REFUSED_PER_ROUND_MAX: usize = 4_096;

/// Frames of one connection in one batch that are refused with an answer. A client that sends so much sends what is not answered again.
const REFUSED_IN_A_ROW_MAX: usize = 64;

/// A body that is so much smaller than the buffer which it shares with others of its turn, where that is not small, is kept on its own.
const SHARE_MIN: usize = 8;
const SHARED_BUFFER_MIN: usize = 64 * 1024;

impl Bridge {
    /// Over the workers' queues.
    pub fn new(
        config: Arc<Config>,
        metrics: Metrics,
        incarnation: u32,
        workers: Vec<Outbox>,
        up: Receiver<UpBatch>,
        up_wake: Wake,
    ) -> Arc<Bridge> {
        let link = Link::new(Bounds {
            batch_frames_max: config.link.batch_frames_max,
            batches_in_flight_max: config.link.batches_in_flight_max,
            batch_beside_frames_min: config.link.batch_beside_frames_min,
            login_batch_frames_max: config.link.login_batch_frames_max,
            login_batches_in_flight_max: config.link.login_batches_in_flight_max,
            logins_waiting_max: config.link.logins_waiting_max,
            login_wait_ms_max: config.link.login_wait_ms_max,
            login_retry_ms_max: config.link.login_retry_ms_max,
            retry_after_ms: u64::from(config.link.retry_after_ms),
            queue_bytes_max: config.link.queue_bytes_max,
            connection_frames_max: config.link.connection_frames_max,
            stalled_ms_max: config.link.stalled_ms_max,
            dead_ms: config.link.dead_ms,
        });
        let login_rate = LoginRate::new(
            config.limits.logins_per_s_max,
            u64::from(config.link.retry_after_ms),
            config.link.login_retry_ms_max,
        );
        let workers = Outboxes::new(workers, config.link.late_bytes_max);
        Arc::new(Bridge {
            config,
            metrics,
            incarnation,
            link: Mutex::new(link),
            login_rate: Mutex::new(login_rate),
            senders: Mutex::default(),
            workers,
            up,
            up_wake,
            work: Notify::new(),
            room: Notify::new(),
            settled: Notify::new(),
            stored: Mutex::default(),
            started: Instant::now(),
        })
    }

    /// The core, for the tasks that own a stream.
    pub fn link(&self) -> &Mutex<Link> {
        &self.link
    }

    /// Milliseconds of the bridge's clock.
    pub fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// Passes wake-ups from the workers on. Never returns but with an error of the eventfd.
    pub async fn listen_for_wakes(&self) -> std::io::Result<()> {
        let eventfd = sys::async_eventfd(self.up_wake.eventfd())?;
        loop {
            let mut ready = eventfd.readable().await?;
            // Spurious readiness reads nothing, which is fine.
            let _ = eventfd.get_ref().clear();
            ready.clear_ready();
            self.up_wake.begin();
            self.work.notify_one();
            self.workers.flush();
            self.metrics.bridge.late_bytes.set(self.workers.late_bytes() as u64);
            self.room.notify_waiters();
        }
    }

    /// Takes batches from the workers for ever.
    pub async fn run_up(&self) {
        loop {
            let mut refused = Vec::new();
            let mut taken = 0;
            while taken < BATCHES_PER_ROUND && refused.len() < REFUSED_PER_ROUND_MAX {
                let Ok(batch) = self.up.try_recv() else { break };
                self.take(batch, &mut refused);
                taken += 1;
            }
            if !refused.is_empty() {
                let count = refused.len();
                self.deliver(refused, count, None).await;
            }
            self.settled.notify_waiters();
            if taken < BATCHES_PER_ROUND && self.up.is_empty() {
                self.work.notified().await;
            } else {
                tokio::task::yield_now().await;
            }
        }
    }

    fn take(&self, batch: UpBatch, refused: &mut Vec<DownItem>) {
        if !batch.gone.is_empty() || !batch.placed.is_empty() {
            self.report_placed(batch.gone, &batch.placed);
        }
        let shared_bytes = batch.bodies.capacity();
        let mut bodies = batch.bodies.freeze();
        let frames = batch.frames.into_iter().map(|frame| UpFrame {
            connection: frame.connection,
            user: frame.user,
            device: frame.device,
            binding: frame.binding,
            command: u32::from(frame.command),
            body: own(frame.command, bodies.split_to(frame.body_bytes as usize), shared_bytes),
        });
        let mut rate = self.login_rate.lock();
        self.offer(frames, Some(&mut rate), refused);
    }

    /// Tells each state server what of its batches is placed, and what found nobody.
    fn report_placed(&self, gone: Vec<Gone>, placed: &[Placed]) {
        let mut touched = Vec::new();
        let now_ms = self.now_ms();
        let mut gone = gone.into_iter();
        let mut link = self.link.lock();
        for Placed { ticket, gone: count } in placed {
            // A login whose answer found nobody has left a route behind. Nothing else will ever mention it, so the news goes as
            // that of a connection which was there and has closed: kept until it is acknowledged, whatever breaks.
            let (pushed, answered): (Vec<Gone>, Vec<Gone>) =
                gone.by_ref().take(*count).partition(|gone| gone.pushed);
            for Gone { connection, user, .. } in answered {
                touched.extend(link.depart(UpFrame { connection, user, ..UpFrame::default() }, now_ms));
            }
            if !pushed.is_empty() {
                // Before the batch counts as placed.
                touched.extend(link.gone(ticket.stream, pushed));
            }
            if link.placed(*ticket) {
                touched.push(ticket.stream);
            }
        }
        drop(link);
        touched.sort_unstable();
        touched.dedup();
        self.notify_streams(touched);
    }

    /// Queues frames for their state servers; answers for those that nobody can take are put into `refused`. With a rate,
    /// logins count.
    fn offer(
        &self,
        frames: impl Iterator<Item = UpFrame>,
        mut rate: Option<&mut LoginRate>,
        refused: &mut Vec<DownItem>,
    ) {
        let now_ms = self.now_ms();
        let mut touched = Vec::new();
        let mut link = self.link.lock();
        // The frames of a connection stand side by side in a batch.
        let mut refused_of = (0, 0);
        for frame in frames {
            if frame.command == 0 {
                touched.extend(link.depart(frame, now_ms).filter(|stream| !touched.contains(stream)));
                continue;
            }
            if let Some(rate) = &mut rate
                && LaneKind::of(&frame) == LaneKind::Logins
                && let Err(retry_after_ms) = rate.ask(now_ms)
            {
                refused.extend(self.refuse(&frame, Code::RateLimited, retry_after_ms));
                continue;
            }
            match link.offer(frame, now_ms) {
                Ok(stream) if touched.contains(&stream) => {}
                Ok(stream) => touched.push(stream),
                Err(back) => {
                    let connection = back.frame.connection;
                    refused_of = (connection, if refused_of.0 == connection { refused_of.1 + 1 } else { 1 });
                    if refused_of.1 <= REFUSED_IN_A_ROW_MAX {
                        refused.extend(self.refuse(&back.frame, Code::Unavailable, back.retry_after_ms));
                    }
                }
            }
        }
        self.metrics.bridge.logins_waiting.set(link.logins_waiting() as u64);
        drop(link);
        self.notify_streams(touched);
    }

    fn notify_streams(&self, streams: Vec<StreamKey>) {
        let senders = self.senders.lock();
        for stream in streams {
            if let Some(sender) = senders.get(&stream) {
                sender.notify_one();
            }
        }
    }

    /// The answer to a frame that no state server can take now, counted. None where the client waits for none.
    fn refuse(&self, frame: &UpFrame, code: Code, mut retry_after_ms: u64) -> Option<DownItem> {
        let is_login = LaneKind::of(frame) == LaneKind::Logins;
        if is_login {
            // Later, never earlier: others may have told theirs the same.
            retry_after_ms += rand::random_range(0..=retry_after_ms / 8);
        }
        let answer = refusal(frame, code, retry_after_ms)?;
        let stats = &self.metrics.bridge;
        stats.logins_told_to_wait.add(is_login.into());
        stats.refused_unavailable.add((code == Code::Unavailable).into());
        Some(answer)
    }

    /// Hands about `count` deliveries to their workers; waits only while too much waits for one already. With a ticket,
    /// each worker hands it back when its part is placed.
    pub async fn deliver(
        &self,
        items: impl IntoIterator<Item = DownItem>,
        count: usize,
        ticket: Option<Ticket>,
    ) {
        // As much again for the unevenness of a few.
        let part_items = 2 * count / self.workers.len().max(1) + 4;
        let mut parts: Vec<Vec<DownItem>> = Vec::new();
        parts.resize_with(self.workers.len(), Vec::new);
        let mut strangers = Vec::new();
        for item in items {
            match parts.get_mut(id::worker(item.connection)) {
                Some(part) if id::incarnation(item.connection) == self.incarnation => {
                    if part.capacity() == 0 {
                        part.reserve(part_items.min(count));
                    }
                    part.push(item);
                }
                _ => strangers.push(Gone {
                    connection: item.connection,
                    user: item.user,
                    pushed: item.push,
                    ..Default::default()
                }),
            }
        }
        let count = parts.iter().filter(|part| !part.is_empty()).count();
        if let Some(ticket) = ticket {
            let mut link = self.link.lock();
            if !strangers.is_empty() {
                link.gone(ticket.stream, strangers);
            }
            let done = link.placing(ticket.stream, ticket.number, count);
            drop(link);
            if done {
                self.notify_streams(vec![ticket.stream]);
            }
        }
        for (worker, items) in parts.into_iter().enumerate().filter(|(_, items)| !items.is_empty()) {
            self.send_down(worker, Down::Batch { items, ticket }).await;
        }
    }

    /// What the store holds, as far as this gateway has heard, and for how long it has known that, ms.
    pub fn stored(&self) -> (Stored, u64) {
        let known = self.stored.lock();
        (known.stored, self.now_ms().saturating_sub(known.heard_ms))
    }

    /// A state server says what the store holds, which told `before` last time. If that is another thing, some of it was lost, and
    /// whoever is logged in here may be known to it no more: everybody is to Sync.
    pub async fn store_holds(&self, before: Option<Stored>, now: Stored) {
        if self.stored.lock().learn(before, now, self.now_ms()) {
            tracing::warn!("the store lost something: all clients are asked to Sync");
            self.tell_workers(|| Down::Resync).await;
        }
    }

    /// Tells every worker the same.
    pub async fn tell_workers(&self, mut make: impl FnMut() -> Down) {
        for worker in 0..self.workers.len() {
            self.send_down(worker, make()).await;
        }
    }

    async fn send_down(&self, worker: usize, mut down: Down) {
        loop {
            // Before the try, so that room made behind it wakes us.
            let room = self.room.notified();
            match self.workers.send(worker, down) {
                Ok(()) => return,
                Err(back) => down = back,
            }
            room.await;
        }
    }

    /// A stream is open; `sender` is notified when there is something to send on it.
    pub fn stream_opened(&self, state_id: &str, credit_bytes: u64, sender: Arc<Notify>) -> StreamKey {
        let mut link = self.link.lock();
        let key = link.opened(state_id, credit_bytes, self.now_ms());
        self.senders.lock().insert(key, sender);
        self.metrics.bridge.streams.set(link.len() as u64);
        key
    }

    /// A stream broke: what it had not acknowledged goes to the others, or is answered `unavailable`.
    pub async fn stream_broken(&self, key: StreamKey) {
        let frames = {
            let mut link = self.link.lock();
            let frames = link.broken(key);
            self.senders.lock().remove(&key);
            self.metrics.bridge.streams.set(link.len() as u64);
            frames
        };
        self.metrics.bridge.streams_broken.add(1);
        self.metrics.bridge.resent.add(frames.len() as u64);
        let mut refused = Vec::new();
        self.offer(frames.into_iter(), None, &mut refused);
        let count = refused.len();
        self.deliver(refused, count, None).await;
        self.settled.notify_waiters();
    }

    /// Batches up to `upto` are answered, and those of `also`.
    pub fn acked(&self, key: StreamKey, upto: u64, also: &[u64]) {
        let out = self.link.lock().acked(key, upto, also, self.now_ms());
        for (kind, ms) in &out {
            let histogram = match kind {
                LaneKind::Live => &self.metrics.link_acknowledge,
                LaneKind::Logins => &self.metrics.link_login_acknowledge,
            };
            histogram.observe(*ms as f64 / 1000.0);
        }
        if !out.is_empty() {
            self.notify_streams(vec![key]);
            self.settled.notify_waiters();
        }
    }

    /// What goes up next on a stream, counted.
    pub fn next_up(&self, key: StreamKey) -> Option<Up> {
        let mut link = self.link.lock();
        let next = link.next_up(key, self.now_ms());
        let others: Vec<StreamKey> = link.take_notices().into_iter().filter(|other| *other != key).collect();
        if !others.is_empty() {
            self.notify_streams(others);
        }
        let next = next?;
        if let Some(up::Kind::Batch(batch)) = &next.kind {
            let stats = &self.metrics.bridge;
            let (batches, frames) = match batch.frames.first().map(LaneKind::of) {
                Some(LaneKind::Logins) => (&stats.login_batches_up, &stats.logins_up),
                _ => (&stats.batches_up, &stats.frames_up),
            };
            batches.add(1);
            frames.add(batch.frames.len() as u64);
            stats.logins_waiting.set(link.logins_waiting() as u64);
        }
        Some(next)
    }

    /// Pings every stream for ever; `dead` is called with those that do not answer.
    pub async fn run_pings(&self, dead: impl Fn(StreamKey)) {
        let mut ticks = tokio::time::interval(Duration::from_millis(self.config.link.ping_ms));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let silent = self.link.lock().ping(self.now_ms());
            silent.into_iter().for_each(&dead);
            let all: Vec<StreamKey> = self.senders.lock().keys().copied().collect();
            self.notify_streams(all);
        }
    }

    /// Waits until no frame is queued or un-acknowledged, and none waits in the workers' queue.
    pub async fn settle(&self) {
        loop {
            let settled = self.settled.notified();
            if self.up.is_empty() && self.link.lock().pending() == 0 {
                return;
            }
            settled.await;
        }
    }
}

/// A login may wait for seconds, and any frame for a state server that stands still; neither is to pin what else came in the turn that read
/// it.
fn own(command: u8, body: Bytes, shared_bytes: usize) -> Bytes {
    let is_small = shared_bytes >= SHARED_BUFFER_MIN && body.len() * SHARE_MIN < shared_bytes;
    if is_small || command == Command::Login as u8 { Bytes::copy_from_slice(&body) } else { body }
}

/// Turns a batch from a state server into deliveries; how many they are.
pub fn deliveries(batch: DownBatch) -> (usize, impl Iterator<Item = DownItem>) {
    let pushes = batch.pushes.iter().map(|push| push.connections.len()).sum::<usize>();
    let count = batch.frames.len() + pushes;
    let answers = batch.frames.into_iter().map(|frame| DownItem {
        connection: frame.connection,
        user: frame.user,
        frames: frame.frames,
        bind: frame.bind,
        close: frame.close,
        login: frame.login,
        push: false,
        guess: frame.guess,
        later: false,
        refused: None,
    });
    let pushes = batch.pushes.into_iter().flat_map(|push| {
        let (frame, later) = (push.frame, push.later);
        let targets = push.connections.into_iter().zip(push.users);
        targets.map(move |(connection, user)| DownItem {
            connection,
            user,
            frames: frame.clone(),
            bind: None,
            close: false,
            login: 0,
            push: true,
            guess: false,
            later,
            refused: None,
        })
    });
    (count, answers.chain(pushes))
}

#[cfg(test)]
mod tests;
