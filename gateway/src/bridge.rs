//! The bridge between worker threads and state servers: takes batches up from the workers, hands deliveries down to
//! them, and answers by itself what no state server can take. One tokio thread; the only user of the [`Link`] core.
//!
//! Trap: waking must not wait for working. One small task reads the eventfd and only passes the news on; the task that
//! drains may be waiting for room in a worker's inbox, and the worker that makes room wakes through the same eventfd.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender, TrySendError};
use parking_lot::Mutex;
use prost::Message;
use proto::link::{Gone, UpFrame};
use proto::wire::{self, Code};
use proto::{Command, frame};
use tokio::sync::Notify;

use crate::batch::{Down, DownItem, Ticket, UpBatch};
use crate::config::Config;
use crate::connection::reason_text;
use crate::id;
use crate::link::{Bounds, Link, StreamKey};
use crate::metrics::Metrics;
use crate::sys;
use crate::wake::Wake;

/// One worker's inbox, as the bridge sees it.
pub struct Outbox {
    /// Batches down.
    pub down: Sender<Down>,
    /// Wakes the worker.
    pub wake: Wake,
    /// Set while the bridge waits for room in `down`.
    pub starved: Arc<AtomicBool>,
}

/// Shared by the bridge's tasks.
pub struct Bridge {
    /// Every limit.
    pub config: Arc<Config>,
    /// Metrics.
    pub metrics: Metrics,
    /// This life of the gateway.
    pub incarnation: u32,
    link: Mutex<Link>,
    senders: Mutex<HashMap<StreamKey, Arc<Notify>>>,
    workers: Vec<Outbox>,
    up: Receiver<UpBatch>,
    up_wake: Wake,
    work: Notify,
    room: Notify,
    settled: Notify,
    started: Instant,
}

/// Batches taken before other tasks get their turn.
const BATCHES_PER_ROUND: usize = 64;

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
            queue_bytes_max: config.link.queue_bytes_max,
            connection_frames_max: config.link.connection_frames_max,
            stalled_ms_max: config.link.stalled_ms_max,
            dead_ms: config.link.dead_ms,
        });
        Arc::new(Bridge {
            config,
            metrics,
            incarnation,
            link: Mutex::new(link),
            senders: Mutex::default(),
            workers,
            up,
            up_wake,
            work: Notify::new(),
            room: Notify::new(),
            settled: Notify::new(),
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
            self.room.notify_waiters();
        }
    }

    /// Takes batches from the workers for ever.
    pub async fn run_up(&self) {
        loop {
            let mut refused = Vec::new();
            let mut taken = 0;
            while taken < BATCHES_PER_ROUND {
                let Ok(batch) = self.up.try_recv() else { break };
                self.take(batch, &mut refused);
                taken += 1;
            }
            if !refused.is_empty() {
                self.deliver(refused, None).await;
            }
            self.settled.notify_waiters();
            if taken < BATCHES_PER_ROUND {
                self.work.notified().await;
            } else {
                tokio::task::yield_now().await;
            }
        }
    }

    fn take(&self, batch: UpBatch, refused: &mut Vec<DownItem>) {
        let mut bodies = batch.bodies.freeze();
        let frames: Vec<UpFrame> = batch
            .frames
            .into_iter()
            .map(|frame| UpFrame {
                connection: frame.connection,
                user: frame.user,
                device: frame.device,
                binding: frame.binding,
                command: u32::from(frame.command),
                body: bodies.split_to(frame.body_bytes as usize),
            })
            .collect();
        self.report_placed(batch.gone, &batch.placed);
        self.offer(frames, refused);
    }

    fn report_placed(&self, gone: Vec<Gone>, placed: &[Ticket]) {
        let mut touched = Vec::new();
        {
            let mut link = self.link.lock();
            if !gone.is_empty() {
                touched.extend(link.gone(placed.last().map(|ticket| ticket.stream), gone));
            }
            for ticket in placed {
                if link.placed(ticket.stream, ticket.number) {
                    touched.push(ticket.stream);
                }
            }
        }
        self.notify_streams(touched);
    }

    /// Queues frames for their state servers; answers for those that nobody can take are put into `refused`.
    pub fn offer(&self, frames: Vec<UpFrame>, refused: &mut Vec<DownItem>) {
        let now_ms = self.now_ms();
        let mut touched = Vec::new();
        {
            let mut link = self.link.lock();
            for frame in frames {
                match link.offer(frame, now_ms) {
                    Ok(stream) if touched.contains(&stream) => {}
                    Ok(stream) => touched.push(stream),
                    Err(frame) => refused.extend(self.refuse(&frame)),
                }
            }
        }
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

    /// The answer to a frame that no state server can take now. None where the client waits for none.
    fn refuse(&self, frame: &UpFrame) -> Option<DownItem> {
        let command = Command::try_from(u8::try_from(frame.command).ok()?).ok()?;
        let mut error = wire::Error {
            code: Code::Unavailable as i32,
            text: reason_text(Code::Unavailable).to_owned(),
            command: frame.command,
            retry_after_ms: self.config.link.retry_after_ms,
            ..Default::default()
        };
        match command {
            Command::Login => error.closing = true,
            Command::Send => {
                let send = wire::Send::decode(frame.body.clone()).ok()?;
                (error.stream, error.n, error.chat) = (send.stream, send.n, send.chat);
            }
            Command::Sync => error.request = wire::Sync::decode(frame.body.clone()).ok()?.request,
            Command::Pull => error.request = wire::Pull::decode(frame.body.clone()).ok()?.request,
            _ => return None,
        }
        self.metrics.bridge.refused_unavailable.add(1);
        Some(DownItem {
            connection: frame.connection,
            user: frame.user,
            frames: frame::encode(Command::Error, &error),
            bind: None,
            close: error.closing,
            login: frame.binding,
            push: false,
        })
    }

    /// Hands deliveries to their workers; waits while an inbox is full. With a ticket, each worker hands it back when
    /// its part is placed.
    pub async fn deliver(&self, items: Vec<DownItem>, ticket: Option<Ticket>) {
        let mut parts: Vec<Vec<DownItem>> = Vec::new();
        parts.resize_with(self.workers.len(), Vec::new);
        let mut strangers = Vec::new();
        for item in items {
            match parts.get_mut(id::worker(item.connection)) {
                Some(part) if id::incarnation(item.connection) == self.incarnation => part.push(item),
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
                link.gone(Some(ticket.stream), strangers);
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

    /// Tells every worker the same.
    pub async fn tell_workers(&self, mut make: impl FnMut() -> Down) {
        for worker in 0..self.workers.len() {
            self.send_down(worker, make()).await;
        }
    }

    async fn send_down(&self, worker: usize, mut down: Down) {
        let outbox = &self.workers[worker];
        loop {
            let room = self.room.notified();
            match outbox.down.try_send(down) {
                Ok(()) => return outbox.wake.wake(),
                Err(TrySendError::Disconnected(_)) => return,
                Err(TrySendError::Full(back)) => down = back,
            }
            // Say that we wait, then look once more: room made in between is seen, room made later wakes us.
            outbox.starved.store(true, Ordering::Release);
            match outbox.down.try_send(down) {
                Ok(()) => return outbox.wake.wake(),
                Err(TrySendError::Disconnected(_)) => return,
                Err(TrySendError::Full(back)) => down = back,
            }
            outbox.wake.wake();
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
        self.offer(frames, &mut refused);
        self.deliver(refused, None).await;
        self.settled.notify_waiters();
    }

    /// Batches up to `number` are answered.
    pub fn acked(&self, key: StreamKey, number: u64) {
        let out_ms = self.link.lock().acked(key, number, self.now_ms());
        for ms in &out_ms {
            self.metrics.link_acknowledge.observe(*ms as f64 / 1000.0);
        }
        if !out_ms.is_empty() {
            self.notify_streams(vec![key]);
            self.settled.notify_waiters();
        }
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

/// Turns a batch from a state server into deliveries.
pub fn deliveries(batch: proto::link::DownBatch) -> Vec<DownItem> {
    let pushes = batch.pushes.iter().map(|push| push.connections.len()).sum::<usize>();
    let mut items = Vec::with_capacity(batch.frames.len() + pushes);
    for frame in batch.frames {
        items.push(DownItem {
            connection: frame.connection,
            user: frame.user,
            frames: frame.frames,
            bind: frame.bind,
            close: frame.close,
            login: frame.login,
            push: false,
        });
    }
    for push in batch.pushes {
        let bytes: Bytes = push.frame;
        for (connection, user) in push.connections.into_iter().zip(push.users) {
            items.push(DownItem {
                connection,
                user,
                frames: bytes.clone(),
                bind: None,
                close: false,
                login: 0,
                push: true,
            });
        }
    }
    items
}
