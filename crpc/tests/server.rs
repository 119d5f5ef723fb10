//! A real gRPC server and real channels: health follows readiness, deadlines, retries past a dead endpoint, and a stop
//! that ends. The service called is the health service, which every server has.

#![allow(clippy::result_large_err)] // tonic's Status, as it comes

use std::sync::Arc;
use std::time::{Duration, Instant};

use crpc::client::{CallOptions, ChannelOptions, Channels, Pick, connect_lazy};
use crpc::config::ShutdownConfig;
use crpc::registry::{Endpoint, Table};
use crpc::{Fatal, Readiness, Shutdown, server};
use tokio::sync::watch;
use tonic::service::Routes;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

struct Running {
    endpoint: Endpoint,
    readiness: Readiness,
    shutdown: Shutdown,
    task: tokio::task::JoinHandle<Result<(), Fatal>>,
}

async fn start(config: ShutdownConfig) -> Running {
    let listener = crpc::listen::bind("127.0.0.1:0".parse().unwrap(), "grpc.listen").await.unwrap();
    let endpoint = Endpoint::new("test", "t-1", listener.local_addr().unwrap().to_string());
    let (readiness, shutdown) = (Readiness::new(), Shutdown::new());
    let routes = server::reflection(Routes::default(), &[]).unwrap();
    let serving = {
        let (readiness, shutdown) = (readiness.clone(), shutdown.clone());
        async move { server::serve(listener, routes, readiness, shutdown, &config).await }
    };
    Running { endpoint, readiness, shutdown, task: tokio::spawn(serving) }
}

fn channels(endpoints: &[&Endpoint]) -> (watch::Sender<Arc<Table>>, Channels) {
    let table = Table::new(endpoints.iter().map(|endpoint| Arc::new((*endpoint).clone())));
    let (sender, receiver) = watch::channel(Arc::new(table));
    (sender, Channels::new(receiver, ChannelOptions::default()))
}

fn health(endpoint: &Endpoint) -> HealthClient<Channel> {
    HealthClient::new(connect_lazy(&endpoint.addr, &ChannelOptions::default()).unwrap())
}

const OPTIONS: CallOptions = CallOptions { deadline: Duration::from_secs(10), idempotent: true };

async fn check(channels: &Channels) -> Result<ServingStatus, Status> {
    check_as(channels, OPTIONS).await
}

async fn check_as(channels: &Channels, options: CallOptions) -> Result<ServingStatus, Status> {
    let answer: tonic::Response<HealthCheckResponse> = channels
        .call(Pick::RoundRobin, options, |attempt| async move {
            let request = attempt.request(HealthCheckRequest::default());
            HealthClient::new(attempt.channel).check(request).await
        })
        .await?;
    Ok(answer.into_inner().status())
}

#[tokio::test]
async fn health_follows_readiness_and_the_stop() {
    let server = start(ShutdownConfig { drain_ms: 60_000, hard_ms: 60_000 }).await;
    let (_table, channels) = channels(&[&server.endpoint]);
    assert_eq!(check(&channels).await.unwrap(), ServingStatus::Serving);
    let mut health = health(&server.endpoint);
    let mut changes = health.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    let mut next = async || changes.message().await.unwrap().unwrap().status();
    assert_eq!(next().await, ServingStatus::Serving);
    server.readiness.set("store", Err("gone".into()));
    assert_eq!(next().await, ServingStatus::NotServing);
    server.readiness.set("store", Ok(()));
    assert_eq!(next().await, ServingStatus::Serving);
    server.shutdown.begin();
    assert_eq!(next().await, ServingStatus::NotServing);
    // Still draining: whoever has not noticed is served.
    assert_eq!(check(&channels).await.unwrap(), ServingStatus::NotServing);
    server.shutdown.begin_hard();
    server.task.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_stop_ends_at_the_hard_limit_though_a_stream_is_open() {
    let server = start(ShutdownConfig { drain_ms: 10, hard_ms: 300 }).await;
    let mut health = health(&server.endpoint);
    let mut changes = health.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    changes.message().await.unwrap();
    let began = Instant::now();
    server.shutdown.begin();
    tokio::time::timeout(Duration::from_secs(60), server.task).await.expect("must end").unwrap().unwrap();
    assert!(began.elapsed() >= Duration::from_millis(290), "the stream got its time: {:?}", began.elapsed());
}

#[tokio::test]
async fn a_stop_without_work_does_not_wait_for_the_limit() {
    let server = start(ShutdownConfig { drain_ms: 10, hard_ms: 3_600_000 }).await;
    let (_table, channels) = channels(&[&server.endpoint]);
    check(&channels).await.unwrap();
    server.shutdown.begin();
    tokio::time::timeout(Duration::from_secs(60), server.task).await.expect("must end").unwrap().unwrap();
}

#[tokio::test]
async fn a_deadline_that_has_passed_is_refused() {
    let server = start(ShutdownConfig::default()).await;
    let mut request = Request::new(HealthCheckRequest::default());
    request.metadata_mut().insert("grpc-timeout", "0m".parse().unwrap());
    let status = health(&server.endpoint).check(request).await.unwrap_err();
    // The client's own timer of zero may be faster than the answer.
    assert!(matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled), "{status:?}");
}

#[tokio::test]
async fn calls_go_past_a_dead_endpoint() {
    let server = start(ShutdownConfig::default()).await;
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let dead = Endpoint::new("test", "t-0", nobody.to_string());
    let (table, channels) = channels(&[&dead, &server.endpoint]);
    for _ in 0..8 {
        assert_eq!(check(&channels).await.unwrap(), ServingStatus::Serving);
    }
    table.send(Arc::new(Table::new([Arc::new(dead)]))).unwrap();
    assert_eq!(check(&channels).await.unwrap_err().code(), Code::Unavailable);
}

#[tokio::test]
async fn a_server_that_takes_calls_and_answers_none_is_left_alone() {
    let server = start(ShutdownConfig::default()).await;
    // The kernel accepts for it; nobody reads.
    let dead = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent = Endpoint::new("test", "t-0", dead.local_addr().unwrap().to_string());
    let (_table, channels) = channels(&[&server.endpoint, &silent]);
    // Two calls, one for each: what was sent to the silent one is not known to be done, so nobody else is asked.
    let once = CallOptions { idempotent: false, ..OPTIONS };
    let outcomes = [check_as(&channels, once).await, check_as(&channels, once).await];
    assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1, "{outcomes:?}");
    let mut lost = 0;
    for _ in 0..100 {
        lost += u32::from(check_as(&channels, once).await.is_err());
    }
    // Those that try it again; the pause behind each is longer than the rest takes.
    assert!(lost <= 2, "{lost} of 100");
}
