//! Calling other servers: one channel per endpoint of a watched service, a pick, a deadline, and a retry elsewhere for
//! what is safe. Shared freely inside a tokio runtime.
//!
//! Trap: a channel connects lazily and reconnects by itself, so having one says nothing about the server being there.
//! A call that must not be done twice is retried only where it was surely not sent ([`was_not_sent`]): `Unavailable` alone
//! does not say so, a connection that broke under the call may end in it too. And calls to a server that takes none wait
//! for a second each, one behind the other: after the first of them it is left alone ([`crate::outage`]).

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::balance::rendezvous;
use crate::outage::Outages;
use crate::registry::{Endpoint, Table};

/// Which endpoint a call goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pick {
    /// The next in turn.
    RoundRobin,
    /// The one that this key hashes to, as long as it is there.
    Hash(u64),
}

/// How a call is made.
#[derive(Debug, Clone, Copy)]
pub struct CallOptions {
    /// Longest for everything, retries included.
    pub deadline: Duration,
    /// Whether doing it twice is harmless. Only then it is tried elsewhere.
    pub idempotent: bool,
}

/// How channels are built.
#[derive(Debug, Clone)]
pub struct ChannelOptions {
    /// Longest that a connect may take.
    pub connect_max: Duration,
    /// HTTP/2 ping when nothing came for so long.
    pub keepalive_interval: Duration,
    /// How long a ping may be unanswered before the connection counts as dead.
    pub keepalive_timeout: Duration,
}

impl Default for ChannelOptions {
    fn default() -> Self {
        Self {
            connect_max: Duration::from_secs(1),
            keepalive_interval: Duration::from_secs(1),
            keepalive_timeout: Duration::from_secs(2),
        }
    }
}

/// One try of a call.
#[derive(Debug, Clone)]
pub struct Attempt {
    /// Where it goes.
    pub endpoint: Arc<Endpoint>,
    /// The way there.
    pub channel: Channel,
    /// Time left.
    pub left: Duration,
}

impl Attempt {
    /// A request that carries the time left as its deadline.
    pub fn request<M>(&self, message: M) -> tonic::Request<M> {
        let mut request = tonic::Request::new(message);
        request.set_timeout(self.left);
        request
    }
}

/// The channels to one service.
#[derive(Debug, Clone)]
pub struct Channels {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    table: watch::Receiver<Arc<Table>>,
    options: ChannelOptions,
    /// One for each call, however often it is tried: two would bring every call to the same one of two.
    turns: AtomicUsize,
    open: Mutex<Open>,
    budget: Mutex<Budget>,
}

#[derive(Debug, Default)]
struct Open {
    /// The table that `channels` was last cleaned for.
    table: Option<Arc<Table>>,
    /// By address: an endpoint that comes back elsewhere needs another channel.
    channels: HashMap<String, Channel>,
    outages: Outages,
}

impl Channels {
    /// For the service that `table` follows.
    pub fn new(table: watch::Receiver<Arc<Table>>, options: ChannelOptions) -> Self {
        Self {
            inner: Arc::new(Inner {
                table,
                options,
                turns: AtomicUsize::default(),
                open: Mutex::default(),
                budget: Mutex::default(),
            }),
        }
    }

    /// The endpoints as last heard.
    pub fn table(&self) -> Arc<Table> {
        self.inner.table.borrow().clone()
    }

    /// Follows the endpoints.
    pub fn watch(&self) -> watch::Receiver<Arc<Table>> {
        self.inner.table.clone()
    }

    /// Makes a unary call: `call` gets the channel and the time left, and is made again elsewhere when it was not sent, or was
    /// idempotent and the first endpoint was unavailable or the connection broke. Endpoints that gave no answer lately come
    /// last.
    pub async fn call<T, F, Fut>(&self, pick: Pick, options: CallOptions, mut call: F) -> Result<T, Status>
    where
        F: FnMut(Attempt) -> Fut,
        Fut: Future<Output = Result<T, Status>>,
    {
        let deadline = Instant::now() + options.deadline;
        let turn = self.inner.turns.fetch_add(1, Ordering::Relaxed);
        self.inner.budget.lock().earn();
        let mut tried: Vec<String> = Vec::new();
        let mut last = Status::unavailable("no server of this service is registered");
        last.set_source(Arc::new(NoServer));
        loop {
            let Some((endpoint, channel)) = self.pick(pick, turn, &tried) else { return Err(last) };
            let asked =
                Asked { inner: &self.inner, addr: &endpoint.addr, since: Instant::now(), is_over: false };
            let left = deadline.saturating_duration_since(asked.since);
            let attempt = Attempt { endpoint: endpoint.clone(), channel, left };
            let outcome = tokio::time::timeout_at(deadline, call(attempt)).await;
            // tonic's own timer, or ours: whichever is first.
            let is_late = Instant::now() >= deadline;
            // What it said itself, an error included, is an answer.
            let answered = outcome.as_ref().is_ok_and(|said| !said.as_ref().is_err_and(broke));
            // Who was left a rest of the time only is not to be blamed for it.
            asked.over((answered || !is_late || tried.is_empty()).then_some(answered));
            last = match outcome {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(status)) => status,
                Err(_) => {
                    return Err(Status::deadline_exceeded(format!("no answer in {:?}", options.deadline)));
                }
            };
            if is_late {
                return Err(last);
            }
            let failed = last.code() == Code::Unavailable || broke(&last);
            // What was not sent is no load, and costs nothing of the budget.
            let is_free = was_not_sent(&last);
            let again = is_free || options.idempotent && failed;
            if !again || tried.len() >= RETRIES_MAX || !is_free && !self.inner.budget.lock().spend() {
                return Err(last);
            }
            tried.push(endpoint.id.clone());
        }
    }

    /// An endpoint that was not tried, and its channel, which connects on first use; none when there is no such endpoint.
    fn pick(&self, pick: Pick, turn: usize, tried: &[String]) -> Option<(Arc<Endpoint>, Channel)> {
        let (table, now) = (self.table(), Instant::now());
        let mut open = self.inner.open.lock();
        open.follow(&table);
        let left = table.iter().filter(|endpoint| !tried.contains(&endpoint.id));
        let (mut out, mut left): (Vec<_>, Vec<_>) =
            left.partition(|endpoint| open.outages.is_out(&endpoint.addr, now));
        loop {
            if left.is_empty() {
                left = std::mem::take(&mut out);
            }
            let index = match pick {
                Pick::RoundRobin => turn.checked_rem(left.len()),
                Pick::Hash(key) => rendezvous(key, left.iter().map(|endpoint| endpoint.id.as_str())),
            }?;
            let endpoint = left.swap_remove(index);
            match open.channel(&endpoint.addr, &self.inner.options) {
                Ok(channel) => {
                    open.outages.tried(&endpoint.addr, now);
                    return Some((endpoint.clone(), channel));
                }
                Err(status) => tracing::warn!(
                    id = endpoint.id,
                    addr = endpoint.addr,
                    error = status.message(),
                    "left out"
                ),
            }
        }
    }
}

/// A call on its way. Dropped when its caller is gone.
struct Asked<'a> {
    inner: &'a Inner,
    addr: &'a str,
    since: Instant,
    is_over: bool,
}

impl Asked<'_> {
    /// Whether it was answered; `None`: that says nothing of the endpoint.
    fn over(mut self, answered: Option<bool>) {
        self.is_over = true;
        self.note(answered);
    }

    fn note(&self, answered: Option<bool>) {
        let outages = &mut self.inner.open.lock().outages;
        match answered {
            Some(true) => {
                if outages.answered(self.addr) {
                    tracing::info!(addr = self.addr, "it answers again");
                }
            }
            Some(false) => {
                if outages.failed(self.addr, Instant::now()) {
                    tracing::warn!(addr = self.addr, "no answer; calls go elsewhere while there are others");
                }
            }
            None => outages.untried(self.addr, Instant::now()),
        }
    }
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        if !self.is_over {
            // A caller that had no patience says nothing; one that waited long does.
            self.note((self.since.elapsed() >= ANSWERED_IN).then_some(false));
        }
    }
}

impl Open {
    /// Forgets who left.
    fn follow(&mut self, table: &Arc<Table>) {
        if self.table.as_ref().is_none_or(|last| !Arc::ptr_eq(last, table)) {
            let is_there = |addr: &str| table.iter().any(|endpoint| endpoint.addr == addr);
            self.channels.retain(|addr, _| is_there(addr));
            self.outages.retain(is_there);
            self.table = Some(table.clone());
        }
    }

    fn channel(&mut self, addr: &str, options: &ChannelOptions) -> Result<Channel, Status> {
        if let Some(channel) = self.channels.get(addr) {
            return Ok(channel.clone());
        }
        let channel = connect_lazy(addr, options)?;
        self.channels.insert(addr.to_owned(), channel.clone());
        Ok(channel)
    }
}

/// There is nobody to call.
#[derive(Debug, thiserror::Error)]
#[error("no server of this service is registered")]
struct NoServer;

/// Whether a call that ended so surely never left: nobody was there, or the connection could not be made.
pub fn was_not_sent(status: &Status) -> bool {
    let mut error = std::error::Error::source(status);
    while let Some(cause) = error {
        if cause.is::<NoServer>() || cause.is::<tonic::ConnectError>() {
            return true;
        }
        error = cause.source();
    }
    false
}

/// Whether it ended here and not with a word of the server.
fn broke(status: &Status) -> bool {
    std::error::Error::source(status).is_some()
}

/// A channel to `addr` that connects on first use, and again after a break.
pub fn connect_lazy(addr: &str, options: &ChannelOptions) -> Result<Channel, Status> {
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{addr}"))
        .map_err(|error| Status::unavailable(format!("{addr:?} is no address: {error}")))?;
    Ok(endpoint
        .connect_timeout(options.connect_max)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(options.keepalive_interval)
        .keep_alive_timeout(options.keepalive_timeout)
        .keep_alive_while_idle(true)
        .connect_lazy())
}

/// What may be spent on retries: a tenth of the calls, and a few at once. When everything fails, retries would only
/// double the load.
#[derive(Debug)]
struct Budget {
    tenths: u32,
}

impl Default for Budget {
    fn default() -> Self {
        Self { tenths: BUDGET_TENTHS_MAX }
    }
}

impl Budget {
    fn earn(&mut self) {
        self.tenths = (self.tenths + 1).min(BUDGET_TENTHS_MAX);
    }

    fn spend(&mut self) -> bool {
        let enough = self.tenths >= 10;
        if enough {
            self.tenths -= 10;
        }
        enough
    }
}

/// A server that is there answers sooner, even if its store is slow.
const ANSWERED_IN: Duration = Duration::from_secs(3);
const BUDGET_TENTHS_MAX: u32 = 100;
const RETRIES_MAX: usize = 2;

#[cfg(test)]
mod tests;
