//! The streams to state servers: who is there, one task for each, its life from connect to break. On the bridge's
//! thread.
//!
//! Trap: a server that has left the registry keeps its stream while that lives: it is draining, or the registry is
//! wrong. Only new connections prefer others. What ends a stream is the stream itself, or silence to pings.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crpc::client::{ChannelOptions, connect_lazy};
use crpc::registry::{Endpoint, Table};
use futures_util::stream;
use parking_lot::Mutex;
use proto::link::{Down, Stored, Up, UpHello, down, link_client::LinkClient, up};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tonic::Streaming;

use crate::batch::Ticket;
use crate::bridge::{Bridge, deliveries};
use crate::heard::{Heard, Hearing};
use crate::link::StreamKey;

/// Longest message on the link, bytes; far above what one batch or fan-out needs.
const LINK_MESSAGE_BYTES_MAX: usize = 64 * 1024 * 1024;

/// How long a state server may take to say hello.
const HELLO_MAX: Duration = Duration::from_secs(2);

/// Keeps a task for every state server in the table.
pub struct Upstreams {
    bridge: Arc<Bridge>,
    live: Arc<Mutex<HashMap<StreamKey, Arc<LiveStream>>>>,
    heard: Arc<Mutex<Heard>>,
    readiness: crpc::Readiness,
}

/// The task that keeps a stream to one server.
struct Follower {
    addr: String,
    /// Cleared when the server has left the registry, or came back elsewhere.
    listed: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

#[derive(Default)]
struct LiveStream {
    cut: Notify,
    /// Its messages are being handed to workers: silence is ours, not the server's.
    busy: AtomicBool,
}

impl Upstreams {
    /// None yet.
    pub fn new(bridge: Arc<Bridge>, readiness: crpc::Readiness) -> Self {
        Upstreams { bridge, live: Arc::default(), heard: Arc::default(), readiness }
    }

    /// Follows the table for ever.
    pub async fn run(&self, mut table: watch::Receiver<Arc<Table>>) {
        let mut tasks: HashMap<String, Follower> = HashMap::new();
        loop {
            let now = table.borrow_and_update().clone();
            for endpoint in now.iter() {
                if let Some(known) = tasks.get(&endpoint.id)
                    && known.addr == endpoint.addr
                    && !known.task.is_finished()
                {
                    known.listed.store(true, Ordering::Release);
                    continue;
                }
                // A new address is a new process: the old task ends with its stream.
                if let Some(old) = tasks.remove(&endpoint.id) {
                    old.listed.store(false, Ordering::Release);
                }
                let listed = Arc::new(AtomicBool::new(true));
                let task = tokio::spawn(self.clone_parts().follow(endpoint.clone(), listed.clone()));
                tasks.insert(endpoint.id.clone(), Follower { addr: endpoint.addr.clone(), listed, task });
            }
            for (id, follower) in &tasks {
                if now.get(id).is_none() {
                    follower.listed.store(false, Ordering::Release);
                }
            }
            let ids: Vec<&str> = now.iter().map(|endpoint| endpoint.id.as_str()).collect();
            self.bridge.link().lock().prefer(&ids);
            tasks.retain(|_, follower| !follower.task.is_finished());
            if table.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    /// Cuts a stream that does not answer.
    pub fn cut(&self, key: StreamKey) {
        if let Some(stream) = self.live.lock().get(&key)
            && !stream.busy.load(Ordering::Acquire)
        {
            tracing::warn!(stream = key, "a state server does not answer pings: its stream is cut");
            stream.cut.notify_one();
        }
    }

    fn clone_parts(&self) -> Upstreams {
        Upstreams {
            bridge: self.bridge.clone(),
            live: self.live.clone(),
            heard: self.heard.clone(),
            readiness: self.readiness.clone(),
        }
    }

    /// Opens a stream to one server, again and again while it is listed.
    async fn follow(self, endpoint: Arc<Endpoint>, listed: Arc<AtomicBool>) {
        let longest = Duration::from_millis(self.bridge.config.link.reconnect_ms_max);
        let mut wait = Duration::from_millis(10);
        while listed.load(Ordering::Acquire) {
            match self.stream(&endpoint).await {
                Ok(()) => wait = Duration::from_millis(10),
                Err(reason) => {
                    tracing::debug!(state = endpoint.id, addr = endpoint.addr, reason, "no stream")
                }
            }
            self.tell_readiness();
            tokio::time::sleep(wait.mul_f64(rand::random_range(0.5..1.0))).await;
            wait = (wait * 2).min(longest);
        }
    }

    /// One stream from connect to break. `Err`: it never opened.
    async fn stream(&self, endpoint: &Endpoint) -> Result<(), String> {
        let sender = Arc::new(Notify::new());
        let turn = Arc::new(Mutex::new(Turn::Opening));
        // However this ends, what feeds the request must end too, or the transport keeps the call for ever.
        let _closing = EndsUps { turn: turn.clone(), sender: sender.clone() };
        // A channel of its own: a stream declared dead must not share its TCP connection with the next.
        let channel =
            connect_lazy(&endpoint.addr, &ChannelOptions::default()).map_err(|e| e.message().to_owned())?;
        let mut client = LinkClient::new(channel)
            .max_decoding_message_size(LINK_MESSAGE_BYTES_MAX)
            .max_encoding_message_size(LINK_MESSAGE_BYTES_MAX);
        let asked_ms = self.bridge.now_ms();
        let first = self.hello(self.heard.lock().replay_ms(&endpoint.id, asked_ms));
        let ups = up_stream(first, self.bridge.clone(), turn.clone(), sender.clone());
        let opening = async {
            let mut downs = client.open(ups).await.map_err(|e| e.message().to_owned())?.into_inner();
            let first = downs.message().await.map_err(|e| e.message().to_owned())?;
            match first {
                Some(Down { kind: Some(down::Kind::Hello(hello)), stored, .. }) => Ok((downs, hello, stored)),
                _ => Err("its first message is not a hello".to_owned()),
            }
        };
        let (downs, hello, stored) =
            tokio::time::timeout(HELLO_MAX, opening).await.map_err(|_| "no hello in time".to_owned())??;
        if hello.version != proto::LINK_VERSION {
            return Err(format!(
                "it speaks link version {}, we speak {}",
                hello.version,
                proto::LINK_VERSION
            ));
        }
        let mut hearing = self.heard.lock().opened(&endpoint.id, asked_ms);
        let stream_key = self.bridge.stream_opened(&endpoint.id, hello.credit_bytes, sender.clone());
        *turn.lock() = Turn::Open(stream_key);
        sender.notify_one();
        let live = Arc::new(LiveStream::default());
        self.live.lock().insert(stream_key, live.clone());
        self.tell_readiness();
        tracing::info!(state = hello.state_id, addr = endpoint.addr, stream = stream_key, "stream open");
        if let Some(stored) = stored {
            self.bridge.store_holds(None, stored).await;
        }
        let reason = self.serve(stream_key, downs, (&live, stored), endpoint, &mut hearing).await;
        self.live.lock().remove(&stream_key);
        tracing::warn!(state = hello.state_id, stream = stream_key, reason, "stream broken");
        self.bridge.stream_broken(stream_key).await;
        Ok(())
    }

    async fn serve(
        &self,
        key: StreamKey,
        mut downs: Streaming<Down>,
        (live, mut stored): (&LiveStream, Option<Stored>),
        endpoint: &Endpoint,
        hearing: &mut Hearing,
    ) -> String {
        loop {
            let message = tokio::select! {
                message = downs.message() => message,
                () = live.cut.notified() => return "no answer to pings".to_owned(),
            };
            let down = match message {
                Ok(Some(down)) => down,
                Ok(None) => return "closed by the state server".to_owned(),
                Err(status) => return status.message().to_owned(),
            };
            live.busy.store(true, Ordering::Release);
            match down.kind {
                Some(down::Kind::Batch(batch)) => {
                    self.bridge.metrics.bridge.batches_down.add(1);
                    let ticket = Ticket { stream: key, number: batch.number, awaited: batch.awaited };
                    let (count, items) = deliveries(batch);
                    self.bridge.deliver(items, count, Some(ticket)).await;
                }
                Some(down::Kind::Hello(_)) => {
                    tracing::warn!(state = endpoint.id, "a second hello is ignored")
                }
                Some(down::Kind::Pong(pong)) => self.heard.lock().pong(&endpoint.id, hearing, pong.nonce),
                None => {}
            }
            if let Some(now) = down.stored {
                self.bridge.store_holds(stored.replace(now), now).await;
            }
            // Whatever came, it lives.
            self.bridge.link().lock().pong(key, self.bridge.now_ms());
            live.busy.store(false, Ordering::Release);
            if down.credit_bytes > 0 {
                self.bridge.link().lock().credit(key, down.credit_bytes);
            }
            if down.acked > 0 || !down.acked_also.is_empty() {
                self.bridge.acked(key, down.acked, &down.acked_also);
            }
        }
    }

    fn hello(&self, replay_ms: u64) -> UpHello {
        let config = &self.bridge.config;
        let (stored, stored_ms) = self.bridge.stored();
        UpHello {
            version_min: proto::LINK_VERSION,
            version_max: proto::LINK_VERSION,
            gateway_id: config.id(),
            incarnation: self.bridge.incarnation,
            loopback: config.listen.client.ip().is_loopback(),
            features: vec![proto::FEATURE_READ.to_owned(), proto::FEATURE_PRESENCE.to_owned()],
            heartbeat_ms: config.limits.heartbeat_ms,
            frame_bytes_max: config.limits.frame_bytes_max as u32,
            replay_ms,
            stored: Some(stored),
            stored_ms,
        }
    }

    fn tell_readiness(&self) {
        let open = self.bridge.link().lock().len();
        let state = if open > 0 { Ok(()) } else { Err("no stream to any state server is open".to_owned()) };
        self.readiness.set("state", state);
    }
}

/// How far a stream has come, as what feeds its request sees it.
enum Turn {
    Opening,
    Open(StreamKey),
    Closed,
}

/// Ends the feeding of a request when the stream is left.
struct EndsUps {
    turn: Arc<Mutex<Turn>>,
    sender: Arc<Notify>,
}

impl Drop for EndsUps {
    fn drop(&mut self) {
        *self.turn.lock() = Turn::Closed;
        self.sender.notify_one();
    }
}

/// What goes up: hello, then whatever the core has, asked for when the transport asks. So batches form while it does
/// not, and there is no second queue.
fn up_stream(
    hello: UpHello,
    bridge: Arc<Bridge>,
    turn: Arc<Mutex<Turn>>,
    sender: Arc<Notify>,
) -> impl stream::Stream<Item = Up> + Send + 'static {
    let first = stream::iter([Up { kind: Some(up::Kind::Hello(hello)) }]);
    let rest = stream::unfold((bridge, turn, sender), |(bridge, turn, sender)| async move {
        loop {
            let next = match *turn.lock() {
                Turn::Opening => None,
                Turn::Open(key) => bridge.next_up(key),
                Turn::Closed => return None,
            };
            if let Some(up) = next {
                return Some((up, (bridge, turn, sender)));
            }
            sender.notified().await;
        }
    });
    futures_util::StreamExt::chain(first, rest)
}
