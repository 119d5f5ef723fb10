//! The line to etcd: one HTTP/2 connection to one of the configured endpoints, and the calls over it. Shared by the tasks
//! of a registry.
//!
//! Trap: tonic's channel reconnects to the same address for ever, so a failed call hangs the line up, and the next call
//! dials the next endpoint. Every call has a limit of its own: a channel without a server makes calls wait, not fail.

use std::error::Error;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint as Address};
use tonic::{Code, Request, Response, Status, Streaming};

use super::pb::{self, kv_client::KvClient, lease_client::LeaseClient, watch_client::WatchClient};
use crate::registry::{Endpoint, RegistryError};

pub(super) struct Line {
    endpoints: Vec<(String, Address)>,
    call_max: Duration,
    dialled: Mutex<Dialled>,
}

#[derive(Default)]
struct Dialled {
    channel: Option<Channel>,
    /// Counts dials, so that a late failure of an old channel does not hang up the new one.
    generation: u64,
    /// The endpoint to try next.
    next: usize,
}

/// The endpoints under a folder, each with its key, and the revision at which that was so.
pub(super) struct Listing {
    pub(super) revision: i64,
    pub(super) endpoints: Vec<(Vec<u8>, Arc<Endpoint>)>,
}

/// An open watch.
pub(super) struct Watching {
    pub(super) asks: mpsc::Sender<pb::WatchRequest>,
    pub(super) answers: Streaming<pb::WatchResponse>,
}

impl Line {
    pub(super) fn new(endpoints: &[String], call_max: Duration) -> Result<Self, RegistryError> {
        let endpoints: Vec<_> = endpoints
            .iter()
            .map(|url| Ok((url.clone(), address(url, call_max)?)))
            .collect::<Result<_, _>>()?;
        if endpoints.is_empty() {
            return Err(RegistryError::Config(
                "registry.endpoints is empty: name at least one, such as http://127.0.0.1:2379".into(),
            ));
        }
        Ok(Self { endpoints, call_max, dialled: Mutex::default() })
    }

    pub(super) async fn list(&self, folder: &str) -> Result<Listing, RegistryError> {
        let request = pb::RangeRequest { key: folder.into(), range_end: range_end(folder) };
        let answer = self.call(async |channel| client_kv(channel).range(request).await).await?;
        let revision = answer.header.map_or(0, |header| header.revision);
        let endpoints =
            answer.kvs.into_iter().filter_map(|kv| Some((kv.key.clone(), read(folder, &kv)?))).collect();
        Ok(Listing { revision, endpoints })
    }

    pub(super) async fn put(&self, key: &str, value: Vec<u8>, lease: i64) -> Result<(), RegistryError> {
        let request = pb::PutRequest { key: key.into(), value, lease };
        self.call(async |channel| client_kv(channel).put(request).await).await.map(drop)
    }

    pub(super) async fn grant(&self, ttl: Duration) -> Result<i64, RegistryError> {
        let request = pb::LeaseGrantRequest { ttl: i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX) };
        self.call(async |channel| LeaseClient::new(channel).lease_grant(request).await)
            .await
            .map(|answer| answer.id)
    }

    pub(super) async fn revoke(&self, lease: i64) -> Result<(), RegistryError> {
        let request = pb::LeaseRevokeRequest { id: lease };
        self.call(async |channel| LeaseClient::new(channel).lease_revoke(request).await).await.map(drop)
    }

    /// Renews a lease. `false`: there is no such lease any more. One short stream a time: nothing can go stale.
    pub(super) async fn keep_alive(&self, lease: i64) -> Result<bool, RegistryError> {
        let once = tokio_stream::once(pb::LeaseKeepAliveRequest { id: lease });
        let answer = self
            .call(async |channel| {
                let mut answers =
                    LeaseClient::new(channel).lease_keep_alive(with_leader(once)).await?.into_inner();
                let first = answers.message().await?;
                Ok(Response::new(first.ok_or_else(|| Status::unavailable("no answer to a keep-alive"))?))
            })
            .await?;
        Ok(answer.ttl > 0)
    }

    /// Opens a watch on a folder, from `revision` on.
    pub(super) async fn watch(&self, folder: &str, revision: i64) -> Result<Watching, RegistryError> {
        let create = pb::WatchCreateRequest {
            key: folder.into(),
            range_end: range_end(folder),
            start_revision: revision,
        };
        let request = pb::watch_request::RequestUnion::CreateRequest(create);
        let (asks, requests) = mpsc::channel(4);
        // There is room for four, and this is the first.
        let _ = asks.try_send(pb::WatchRequest { request_union: Some(request) });
        let requests = ReceiverStream::new(requests);
        let open = async |channel| {
            WatchClient::new(channel)
                .max_decoding_message_size(ANSWER_BYTES_MAX)
                .watch(with_leader(requests))
                .await
        };
        Ok(Watching { asks, answers: self.call(open).await? })
    }

    async fn call<T, C>(&self, call: C) -> Result<T, RegistryError>
    where
        C: AsyncFnOnce(Channel) -> Result<Response<T>, Status>,
    {
        let (channel, generation) = self.dial().await?;
        let reason = match tokio::time::timeout(self.call_max, call(channel)).await {
            Ok(Ok(answer)) => return Ok(answer.into_inner()),
            Ok(Err(status)) if is_refusal(status.code()) => {
                return Err(RegistryError::Refused(status.message().to_owned()));
            }
            Ok(Err(status)) => said(&status),
            Err(_) => format!("no answer in {:?}", self.call_max),
        };
        self.hang_up(generation).await;
        Err(self.unreachable(reason))
    }

    /// The open channel, or one to the first endpoint that lets us connect, beginning behind the one that failed.
    async fn dial(&self) -> Result<(Channel, u64), RegistryError> {
        let mut dialled = self.dialled.lock().await;
        if let Some(channel) = &dialled.channel {
            return Ok((channel.clone(), dialled.generation));
        }
        let mut reason = String::new();
        // Together they take no longer than one call may.
        let each = self.call_max / self.endpoints.len() as u32;
        for _ in 0..self.endpoints.len() {
            let (url, address) = &self.endpoints[dialled.next % self.endpoints.len()];
            match limited(each, address.connect()).await {
                Ok(channel) => {
                    tracing::debug!(url, "connected to etcd");
                    dialled.generation += 1;
                    dialled.channel = Some(channel.clone());
                    return Ok((channel, dialled.generation));
                }
                Err(error) => {
                    dialled.next += 1;
                    reason = error;
                }
            }
        }
        Err(self.unreachable(reason))
    }

    /// Forgets the channel that a call failed on.
    async fn hang_up(&self, generation: u64) {
        let mut dialled = self.dialled.lock().await;
        if dialled.generation == generation && dialled.channel.take().is_some() {
            dialled.next += 1;
        }
    }

    fn unreachable(&self, reason: String) -> RegistryError {
        let urls: Vec<&str> = self.endpoints.iter().map(|(url, _)| url.as_str()).collect();
        RegistryError::Unreachable { endpoints: urls.join(", "), reason }
    }
}

/// Reads the endpoint under a key; a value that is none is left out and said so.
pub(super) fn read(folder: &str, kv: &pb::KeyValue) -> Option<Arc<Endpoint>> {
    let id = kv.key.strip_prefix(folder.as_bytes()).unwrap_or_default();
    match serde_json::from_slice::<Endpoint>(&kv.value) {
        Ok(endpoint) if endpoint.id.as_bytes() == id => return Some(Arc::new(endpoint)),
        Ok(endpoint) => {
            tracing::warn!(key = %kv.key.escape_ascii(), id = endpoint.id, "left out: the id is not the key's")
        }
        Err(error) => {
            tracing::warn!(key = %kv.key.escape_ascii(), %error, "left out: the value is no endpoint")
        }
    }
    None
}

fn address(url: &str, connect_max: Duration) -> Result<Address, RegistryError> {
    let refuse = |why: &str| {
        RegistryError::Config(format!(
            "registry.endpoints: {url:?} {why}; write it like http://127.0.0.1:2379"
        ))
    };
    if !url.starts_with("http://") {
        return Err(refuse("does not begin with http:// (TLS is not supported)"));
    }
    let address = Address::from_shared(url.to_owned()).map_err(|_| refuse("is no URL"))?;
    Ok(address
        .connect_timeout(connect_max)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(true))
}

async fn limited(
    max: Duration,
    connecting: impl Future<Output = Result<Channel, tonic::transport::Error>>,
) -> Result<Channel, String> {
    match tokio::time::timeout(max, connecting).await {
        Ok(connected) => connected.map_err(|error| innermost(&error)),
        Err(_) => Err(format!("no connection in {max:?}")),
    }
}

/// "transport error" says nothing; what the system said stands at the end of the chain.
fn innermost(error: &(dyn Error + 'static)) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}

/// Why a call failed: etcd's own words, or the system's.
pub(super) fn said(status: &Status) -> String {
    status.source().map_or_else(|| status.message().to_owned(), innermost)
}

fn client_kv(channel: Channel) -> KvClient<Channel> {
    KvClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX)
}

/// Lets etcd end a stream when its member has lost the leader, instead of leaving it silent.
fn with_leader<S>(stream: S) -> Request<S> {
    let mut request = Request::new(stream);
    request.metadata_mut().insert("hasleader", tonic::metadata::MetadataValue::from_static("true"));
    request
}

/// Answers of an etcd that works: another endpoint would say the same.
fn is_refusal(code: Code) -> bool {
    use Code::*;
    matches!(
        code,
        NotFound
            | InvalidArgument
            | PermissionDenied
            | Unauthenticated
            | FailedPrecondition
            | OutOfRange
            | Unimplemented
            | ResourceExhausted
    )
}

/// The end of the range of keys that begin with `folder`, which ends in `/`: `0` is the character behind it.
fn range_end(folder: &str) -> Vec<u8> {
    let mut end = folder.as_bytes().to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}

/// Tens of thousands of endpoints fit.
const ANSWER_BYTES_MAX: usize = 64 << 20;
const PING_INTERVAL: Duration = Duration::from_secs(2);
const PING_TIMEOUT: Duration = Duration::from_secs(2);
